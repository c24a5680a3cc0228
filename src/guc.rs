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
