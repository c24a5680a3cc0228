//! Settings: private statics behind typed accessors.
//!
//! Read by the cache (hot), the root keys and the guards. None needs a preload; those that the
//! server reads again at a reload are SIGHUP. The prefix is reserved, so that a misspelt
//! `rekey.` setting is an error and not silence.

use std::ffi::{CStr, CString, OsString};
use std::time::Duration;

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, pg_sys};

/// Key that an empty key_name means. Default: none.
static DEFAULT_KEY: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
/// A fresh salt for each value: hides which values were sealed together. Default: off, since it
/// costs a key derivation per value, here and at each open.
static SALT_PER_VALUE: GucSetting<bool> = GucSetting::<bool>::new(false);
/// Slots, and as many subkeys, that one session keeps. Default 4096: about 6 MB when full.
static KEY_CACHE_SLOTS: GucSetting<i32> = GucSetting::<i32>::new(4096);
/// The JSON keyring. Default: none.
static ROOT_KEY_FILE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
/// A program that prints the JSON keyring. Default: none. Either this or the file, not both.
static ROOT_KEY_COMMAND: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c""));
/// How long the program may take, in milliseconds. Default 10 s: a login and a request over a
/// network, and short enough that a hanging provider shows.
static ROOT_KEY_COMMAND_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(10_000);
/// Lets the extension go although slots can open something. Default: off; superusers.
static ALLOW_DROP: GucSetting<bool> = GucSetting::<bool>::new(false);

/// Whether the background worker runs. Default: on.
static WORKER: GucSetting<bool> = GucSetting::<bool>::new(true);
/// Databases that it visits: a comma list, or * for all. Default: all.
static DATABASES: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c"*"));
/// Databases that are worked on at once. Default 2: a server has other things to do.
static MAX_WORKERS: GucSetting<i32> = GucSetting::<i32>::new(2);
/// Time of one batch in ms. Default 100: nobody waits longer for a row that it has locked.
static BATCH_TARGET: GucSetting<i32> = GucSetting::<i32>::new(100);
/// Share of the time in which the worker works. Default 0.2: a fifth of one core and its disk.
static WORK_RATIO: GucSetting<f64> = GucSetting::<f64>::new(0.2);
/// WAL in kB per second. Default 16 MB.
static MAX_WAL_RATE: GucSetting<i32> = GucSetting::<i32>::new(16 * 1024);
/// Replay lag of a standby in ms at which the worker rests. Default 30 s.
static MAX_REPLICATION_LAG: GucSetting<i32> = GucSetting::<i32>::new(30_000);
/// Standbys whose lag counts, by application_name. Default: all.
static LAG_STANDBYS: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c"*"));
/// Share of dead rows of a table at which the worker waits for vacuum. Default 0.5: a pass makes one
/// dead row for each live one at most and uses their space again itself, so that only what others
/// leave behind counts.
static MAX_DEAD_RATIO: GucSetting<f64> = GucSetting::<f64>::new(0.5);
/// Free space of the data directory in MB below which the worker rests. Default 1 GB.
static MIN_FREE_DISK: GucSetting<i32> = GucSetting::<i32>::new(1024);
/// Age in s at which a proof gives up its snapshot. Default 1 h.
static MAX_SNAPSHOT_AGE: GucSetting<i32> = GucSetting::<i32>::new(3600);
/// Rotations by age in an hour. Default 60.
static MAX_ROTATIONS_PER_HOUR: GucSetting<i32> = GucSetting::<i32>::new(60);
/// How long queries of standbys without feedback may run, in ms. Default 30 s, as
/// max_standby_streaming_delay.
static STANDBY_QUERY_DELAY: GucSetting<i32> = GucSetting::<i32>::new(30_000);

/// Defines the settings. Called once, from `_PG_init`.
pub fn init() {
    GucRegistry::define_string_guc(
        c"rekey.default_key",
        c"Key that an empty key_name means.",
        c"Used by encrypt_col(value) and rotate_key().",
        &DEFAULT_KEY,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"rekey.salt_per_value",
        c"Seals each value under a salt of its own.",
        c"Hides which values were sealed in one transaction, at the price of a slower open.",
        &SALT_PER_VALUE,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"rekey.key_cache_slots",
        c"Number of key slots, and of subkeys, that a session keeps ready.",
        c"Bounds the memory of a session: about 1.5 kB per slot.",
        &KEY_CACHE_SLOTS,
        16,
        1_000_000,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"rekey.root_key_file",
        c"File with the root keys, outside the data directory.",
        c"JSON keyring, mode 0600 of the server's user or 0640 of root.",
        &ROOT_KEY_FILE,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_string_guc(
        c"rekey.root_key_command",
        c"Shell command that prints the JSON keyring on its standard output.",
        c"For key management services and HSMs. Its standard error goes to the server log.",
        &ROOT_KEY_COMMAND,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_int_guc(
        c"rekey.root_key_command_timeout",
        c"Time that rekey.root_key_command may take.",
        c"Then it is killed with all that it has started.",
        &ROOT_KEY_COMMAND_TIMEOUT,
        1,
        3_600_000,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY | GucFlags::UNIT_MS,
    );
    GucRegistry::define_bool_guc(
        c"rekey.allow_drop",
        c"Allows to drop the extension while its keys can still open values.",
        c"Every value that they seal is lost with it.",
        &ALLOW_DROP,
        GucContext::Suset,
        GucFlags::default(),
    );
    init_worker();
    // SAFETY: a C string; the function copies it.
    unsafe { pg_sys::MarkGUCPrefixReserved(c"rekey".as_ptr()) }
}

/// Name that an empty key_name stands for, in the server's encoding; empty when not set.
#[inline]
pub fn default_key<'a>() -> &'a [u8] {
    // SAFETY: the setting is NULL or a C string that lives until it is set again, which cannot
    // happen within the call that reads it.
    unsafe {
        let value = *DEFAULT_KEY.as_ptr();
        if value.is_null() {
            b""
        } else {
            CStr::from_ptr(value).to_bytes()
        }
    }
}

/// Whether each value gets a salt of its own.
#[inline]
pub fn salt_per_value() -> bool {
    // SAFETY: a plain variable that PostgreSQL sets between statements of this one thread.
    unsafe { *SALT_PER_VALUE.as_ptr() }
}

/// Number of slots that the cache keeps.
#[inline]
pub fn key_cache_slots() -> usize {
    // SAFETY: as above.
    usize::try_from(unsafe { *KEY_CACHE_SLOTS.as_ptr() }).unwrap_or(16)
}

/// Path of the keyring file, or None when it is not set.
pub fn root_key_file() -> Option<std::path::PathBuf> {
    not_empty(&ROOT_KEY_FILE).map(std::path::PathBuf::from)
}

/// The keyring command, or None when it is not set.
pub fn root_key_command() -> Option<OsString> {
    not_empty(&ROOT_KEY_COMMAND)
}

/// How long the keyring command may take.
pub fn root_key_command_timeout() -> Duration {
    Duration::from_millis(u64::try_from(ROOT_KEY_COMMAND_TIMEOUT.get()).unwrap_or(0))
}

fn not_empty(setting: &GucSetting<Option<CString>>) -> Option<OsString> {
    use std::os::unix::ffi::OsStringExt;
    let bytes = setting.get()?.into_bytes();
    (!bytes.is_empty()).then(|| OsString::from_vec(bytes))
}

/// Whether a superuser has said that the keys may go.
pub fn allow_drop() -> bool {
    ALLOW_DROP.get()
}

/// The settings of the background worker; the server reads all of them again at a reload.
fn init_worker() {
    GucRegistry::define_bool_guc(
        c"rekey.worker",
        c"Re-encrypts stale rows in the background.",
        c"Needs pg_rekey in shared_preload_libraries; CALL rekey.reencrypt() does the same by hand.",
        &WORKER,
        GucContext::Sighup,
        GucFlags::default(),
    );
    for (name, short, long, setting) in [
        (
            c"rekey.databases",
            c"Databases whose rows are re-encrypted in the background.",
            c"A comma-separated list, or * for all.",
            &DATABASES,
        ),
        (
            c"rekey.lag_standbys",
            c"Standbys whose replication lag counts.",
            c"A comma-separated list of application_name, or * for all.",
            &LAG_STANDBYS,
        ),
    ] {
        let (context, flags) = (GucContext::Sighup, GucFlags::default());
        GucRegistry::define_string_guc(name, short, long, setting, context, flags);
    }
    let plain = GucFlags::default();
    let (ms, s) = (GucFlags::UNIT_MS, GucFlags::UNIT_S);
    let (kb, mb) = (GucFlags::UNIT_KB, GucFlags::UNIT_MB);
    let max = i32::MAX;
    for (name, short, long, setting, low, high, flags) in [
        (
            c"rekey.max_workers",
            c"Databases that are worked on at the same time.",
            c"Each takes one of max_worker_processes.",
            &MAX_WORKERS,
            1,
            64,
            plain,
        ),
        (
            c"rekey.batch_target",
            c"Longest time that one batch takes, its rests included.",
            c"A writer may wait so long for a row of the batch. The worker aims at a quarter.",
            &BATCH_TARGET,
            1,
            10_000,
            ms,
        ),
        (
            c"rekey.max_wal_rate",
            c"WAL that re-encryption writes in one second.",
            c"0 is no limit.",
            &MAX_WAL_RATE,
            0,
            max,
            kb,
        ),
        (
            c"rekey.max_replication_lag",
            c"Replay lag of a standby at which re-encryption rests.",
            c"0 is no limit.",
            &MAX_REPLICATION_LAG,
            0,
            max,
            ms,
        ),
        (
            c"rekey.min_free_disk",
            c"Free space of the data directory below which re-encryption rests.",
            c"0 is no limit.",
            &MIN_FREE_DISK,
            0,
            max,
            mb,
        ),
        (
            c"rekey.max_snapshot_age",
            c"Age at which a proof gives up its snapshot, which holds back vacuum.",
            c"0 is no limit.",
            &MAX_SNAPSHOT_AGE,
            0,
            max,
            s,
        ),
        (
            c"rekey.max_rotations_per_hour",
            c"Rotations by max_age in one hour.",
            c"0 is none: keys are then rotated by hand only.",
            &MAX_ROTATIONS_PER_HOUR,
            0,
            max,
            plain,
        ),
        (
            c"rekey.standby_query_delay",
            c"How long queries on standbys without hot_standby_feedback may run.",
            c"A slot is not disabled before so long after its proof; -1 waits for feedback for ever.",
            &STANDBY_QUERY_DELAY,
            -1,
            max,
            ms,
        ),
    ] {
        let context = GucContext::Sighup;
        GucRegistry::define_int_guc(name, short, long, setting, low, high, context, flags);
    }
    for (name, short, long, setting, low, high) in [
        (
            c"rekey.work_ratio",
            c"Share of the time in which re-encryption works.",
            c"1 is without pauses.",
            &WORK_RATIO,
            0.01,
            1.0,
        ),
        (
            c"rekey.max_dead_ratio",
            c"Share of dead rows of a table at which re-encryption waits for vacuum.",
            c"Acts from 100,000 dead rows on, where autovacuum is on; 0 is no limit.",
            &MAX_DEAD_RATIO,
            0.0,
            1.0,
        ),
    ] {
        let (context, flags) = (GucContext::Sighup, GucFlags::default());
        GucRegistry::define_float_guc(name, short, long, setting, low, high, context, flags);
    }
}

fn above_zero(value: i32) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

fn list(setting: &GucSetting<Option<CString>>) -> Option<Vec<String>> {
    let value = setting.get()?.to_string_lossy().into_owned();
    let names: Vec<String> = value
        .split(',')
        .map(|name| name.trim().trim_matches('"').to_string())
        .filter(|name| !name.is_empty())
        .collect();
    (names != ["*"]).then_some(names)
}

/// Whether the background worker runs.
pub fn worker() -> bool {
    WORKER.get()
}
/// The databases that it visits; None for all.
pub fn databases() -> Option<Vec<String>> {
    list(&DATABASES)
}
/// How many databases are worked on at once.
pub fn max_workers() -> usize {
    usize::try_from(MAX_WORKERS.get()).unwrap_or(1)
}
/// Time of one batch.
pub fn batch_target_ms() -> u64 {
    u64::try_from(BATCH_TARGET.get()).unwrap_or(100)
}
/// Share of the time that is worked.
pub fn work_ratio() -> f64 {
    WORK_RATIO.get()
}
/// WAL per second; None for no limit.
pub fn max_wal_rate_kb() -> Option<u64> {
    above_zero(MAX_WAL_RATE.get())
}
/// Lag of a standby at which to rest; None for no limit.
pub fn max_replication_lag_ms() -> Option<u64> {
    above_zero(MAX_REPLICATION_LAG.get())
}
/// The standbys whose lag counts; None for all.
pub fn lag_standbys() -> Option<Vec<String>> {
    list(&LAG_STANDBYS)
}
/// Share of dead rows at which to wait for vacuum; None for no limit.
pub fn max_dead_ratio() -> Option<f64> {
    Some(MAX_DEAD_RATIO.get()).filter(|ratio| *ratio > 0.0)
}
/// Free space below which to rest; None for no limit.
pub fn min_free_disk_mb() -> Option<u64> {
    above_zero(MIN_FREE_DISK.get())
}
/// Age at which a proof gives up; None for no limit.
pub fn max_snapshot_age() -> Option<std::time::Duration> {
    above_zero(MAX_SNAPSHOT_AGE.get()).map(std::time::Duration::from_secs)
}
/// Rotations by age in one hour.
pub fn max_rotations_per_hour() -> i64 {
    i64::from(MAX_ROTATIONS_PER_HOUR.get())
}
/// How long queries on standbys without feedback may run; None: as long as they like.
pub fn standby_query_delay_ms() -> Option<u64> {
    u64::try_from(STANDBY_QUERY_DELAY.get()).ok()
}
