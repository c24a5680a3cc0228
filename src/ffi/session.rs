//! Who is calling, in which transaction, with which locks: session state read and set safely.
//!
//! Called by the cache (user, transaction, barrier) and by the catalog (acting as the
//! extension's owner). Guards restore what they changed, also when an error unwinds.

use std::ffi::{CStr, c_int};

use pgrx::pg_sys;

// Plain getters of PostgreSQL that never raise: called without pgrx's per-call setjmp, since
// each runs once per value.
unsafe extern "C" {
    fn GetUserId() -> pg_sys::Oid;
    fn GetCurrentStatementStartTimestamp() -> i64;
}

/// The current user: the one whose privileges count.
#[inline]
pub fn current_user() -> pg_sys::Oid {
    // SAFETY: returns a static (src/backend/utils/init/miscinit.c).
    unsafe { GetUserId() }
}

/// When the client's current statement began, in PostgreSQL's microseconds: names a statement.
#[inline]
pub fn statement() -> i64 {
    // SAFETY: returns a static (src/backend/access/transam/xact.c).
    unsafe { GetCurrentStatementStartTimestamp() }
}

/// Hears of what other sessions have committed: what is asked of the cache behind it is not older
/// than any snapshot that was taken before it. Any lock does the same, and as little when there is
/// no news.
#[inline]
pub fn accept_invalidations() {
    // SAFETY: in a transaction. PostgreSQL calls it with each lock, in the middle of queries too.
    unsafe { pg_sys::AcceptInvalidationMessages() }
}

/// The local id of the current top-level transaction; differs from one to the next.
#[inline]
pub fn local_transaction() -> u32 {
    // SAFETY: MyProc is set in every backend that runs a query, and only we write its lxid.
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    unsafe {
        (*pg_sys::MyProc).lxid
    }
    // SAFETY: as above; the field has moved in 17.
    #[cfg(feature = "pg18")]
    unsafe {
        (*pg_sys::MyProc).vxid.lxid
    }
}

/// The id of the current transaction or subtransaction, which rows written now bear.
pub fn xid() -> pg_sys::TransactionId {
    // SAFETY: in a transaction that may write; assigns the id when there is none yet.
    unsafe { pg_sys::GetCurrentTransactionId() }
}

/// Whether an id is that of the current transaction, or of a part of it that is not rolled back.
pub fn is_own(xid: pg_sys::TransactionId) -> bool {
    // SAFETY: looks into the state of the own transaction.
    unsafe { pg_sys::TransactionIdIsCurrentTransactionId(xid) }
}

/// This process.
#[inline]
pub fn process() -> c_int {
    // SAFETY: a static that is written once after fork.
    unsafe { pg_sys::MyProcPid }
}

/// Ends this process as kill -9 does. For tests of crashes.
#[cfg(debug_assertions)]
pub fn kill_this_process() -> ! {
    // SAFETY: a signal to the own process, which does not survive it.
    unsafe {
        libc::kill(process(), libc::SIGKILL);
        libc::abort()
    }
}

/// The name of this process's database.
pub fn database_name() -> String {
    // SAFETY: a syscache look-up in a transaction; the result is NULL or a C string.
    unsafe {
        let name = pg_sys::get_database_name(pg_sys::MyDatabaseId);
        if name.is_null() {
            String::new()
        } else {
            super::text::c_string(name)
        }
    }
}

/// Whether `user` has the privileges of `role` (membership with INHERIT, superusers have all).
pub fn has_privileges_of(user: pg_sys::Oid, role: pg_sys::Oid) -> bool {
    // SAFETY: syscache look-ups only.
    unsafe { pg_sys::has_privs_of_role(user, role) }
}

/// Whether `user` is a superuser.
pub fn is_superuser(user: pg_sys::Oid) -> bool {
    // SAFETY: a syscache look-up.
    unsafe { pg_sys::superuser_arg(user) }
}

/// The name of a role, or its number when it is gone.
pub fn role_name(role: pg_sys::Oid) -> String {
    // SAFETY: with noerr the function returns NULL for a missing role.
    unsafe {
        let name = pg_sys::GetUserNameFromId(role, true);
        if name.is_null() {
            role.to_u32().to_string()
        } else {
            super::text::c_string(name)
        }
    }
}

/// The role of that name, or None.
pub fn role(name: &str) -> Option<pg_sys::Oid> {
    let server = super::text::to_server(name.as_bytes()).ok()?.into_owned();
    let name = std::ffi::CString::new(server).ok()?;
    // SAFETY: a syscache look-up that may miss.
    let oid = unsafe { pg_sys::get_role_oid(name.as_ptr(), true) };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

/// Takes RowExclusiveLock on `table` for the whole top-level transaction: a savepoint rollback
/// does not release it. A lock also makes the session accept pending invalidations.
pub fn lock_for_top_transaction(table: pg_sys::Oid) {
    // SAFETY: the owner of the locks is that of a transaction that is open.
    as_top_transaction(|| unsafe {
        pg_sys::LockRelationOid(table, pg_sys::RowExclusiveLock as i32);
    });
}

/// Keeps the transaction id that stands in rows written now locked until the top-level transaction
/// has ended for everyone. Of itself the id of a subtransaction is unlocked when its savepoint is
/// released, long before the commit; who waits for it would wait for nothing. Whoever waits already
/// when the savepoint is rolled back waits for the end of the whole transaction too.
pub fn keep_xid_locked() {
    // SAFETY: a second hold on a lock that this very subtransaction has, or takes with its id: it
    // does not wait, and CommitSubTransaction gives back the first hold only
    // (src/backend/access/transam/xact.c). A prepared transaction takes it along.
    unsafe {
        let xid = xid();
        as_top_transaction(|| pg_sys::XactLockTableInsert(xid));
    }
}

/// Charges the locks that `lock` takes to the top-level transaction.
fn as_top_transaction(lock: impl FnOnce()) {
    // SAFETY: TopTransactionResourceOwner exists in every transaction. The owner is put back
    // before an error goes on, so that nothing else is charged to it.
    unsafe {
        let _owner = ResourceOwner(pg_sys::CurrentResourceOwner);
        pg_sys::CurrentResourceOwner = pg_sys::TopTransactionResourceOwner;
        lock();
    }
}

struct ResourceOwner(pg_sys::ResourceOwner);

impl Drop for ResourceOwner {
    fn drop(&mut self) {
        // SAFETY: the owner that was current when the guard was made, in the same transaction.
        unsafe { pg_sys::CurrentResourceOwner = self.0 }
    }
}

/// Acts as `owner` until dropped, with a search path that nobody can shadow.
///
/// `pg_catalog, pg_temp` unquoted is the only list in which a temporary table shadows nothing.
pub struct ActAs {
    user: pg_sys::Oid,
    context: c_int,
    nest: c_int,
}

/// Settings that hold for whoever acts, whatever the session has set.
const PINNED: [(&CStr, &CStr); 4] = [
    (c"standard_conforming_strings", c"on"),
    (c"search_path", c"pg_catalog, pg_temp"),
    (c"row_security", c"off"),
    (c"check_function_bodies", c"off"),
];

impl ActAs {
    /// Switches to `owner`, remembering the caller.
    pub fn owner(owner: pg_sys::Oid) -> ActAs {
        ActAs::with(owner, 0, &[])
    }

    /// The same under settings of the extension's own.
    pub fn owner_with(owner: pg_sys::Oid, settings: &[(&CStr, &CStr)]) -> ActAs {
        ActAs::with(owner, 0, settings)
    }

    /// Switches to the owner of a users' table to run a function of his within somebody else's
    /// statement: it can change neither user nor settings, and leaves nothing behind.
    pub fn restricted(owner: pg_sys::Oid) -> ActAs {
        ActAs::with(owner, pg_sys::SECURITY_RESTRICTED_OPERATION as c_int, &[])
    }

    /// The same, to update rows in his place: what his code (index expressions, constraints,
    /// triggers) can do, it could do anyway. Triggers fire as on a replica unless `fire_triggers`;
    /// nobody is waited for longer than lock_timeout. The flags are those of vacuum_rel in
    /// src/backend/commands/vacuum.c.
    pub fn updating(owner: pg_sys::Oid, fire_triggers: bool) -> ActAs {
        let role = if fire_triggers { c"origin" } else { c"replica" };
        let settings = [
            (c"session_replication_role", role),
            (c"lock_timeout", c"500ms"),
            (c"jit", c"off"),
        ];
        let flags = pg_sys::SECURITY_RESTRICTED_OPERATION as c_int;
        ActAs::with(owner, flags, &settings)
    }

    fn with(owner: pg_sys::Oid, flags: c_int, settings: &[(&CStr, &CStr)]) -> ActAs {
        let mut user = pg_sys::InvalidOid;
        let mut context = 0;
        // SAFETY: reads two statics, then sets them; the nest level is closed in drop or by the
        // transaction's abort. Same calls as ri_PerformCheck in src/backend/utils/adt/ri_triggers.c.
        // The settings are the extension's own and not the caller's, hence PGC_SUSET.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
            let nest = pg_sys::NewGUCNestLevel();
            let guard = ActAs {
                user,
                context,
                nest,
            };
            for (name, value) in PINNED.iter().chain(settings) {
                pg_sys::set_config_option(
                    name.as_ptr(),
                    value.as_ptr(),
                    pg_sys::GucContext::PGC_SUSET,
                    pg_sys::GucSource::PGC_S_SESSION,
                    pg_sys::GucAction::GUC_ACTION_SAVE,
                    true,
                    0,
                    false,
                );
            }
            pg_sys::SetUserIdAndSecContext(
                owner,
                context
                    | flags
                    | pg_sys::SECURITY_LOCAL_USERID_CHANGE as c_int
                    | pg_sys::SECURITY_NOFORCE_RLS as c_int,
            );
            guard
        }
    }
}

impl Drop for ActAs {
    fn drop(&mut self) {
        // SAFETY: sets back what `owner` read. While an error unwinds the abort closes the GUC
        // nest level; the user is put back here in any case.
        unsafe {
            pg_sys::SetUserIdAndSecContext(self.user, self.context);
            if !std::thread::panicking() {
                pg_sys::AtEOXact_GUC(false, self.nest);
            }
        }
    }
}

/// The owner of a table.
pub fn table_owner(table: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: our own table, open while its row is read.
    unsafe {
        let relation = pg_sys::table_open(table, pg_sys::AccessShareLock as i32);
        let owner = (*(*relation).rd_rel).relowner;
        pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
        owner
    }
}

/// The data directory.
pub fn data_directory() -> std::path::PathBuf {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: DataDir is a C string that is set before any library loads.
    let bytes = unsafe { CStr::from_ptr(pg_sys::DataDir) }.to_bytes();
    std::path::PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

/// Free space of the data directory's file system, in MB.
pub fn free_disk_mb() -> Option<u64> {
    let path = std::ffi::CString::new(data_directory().into_os_string().into_encoded_bytes());
    let path = path.ok()?;
    // SAFETY: fills the structure, which is plain data.
    unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut stat) == 0)
            .then(|| stat.f_bavail.saturating_mul(stat.f_frsize) / (1024 * 1024))
    }
}

/// When the server last read its configuration.
pub fn configuration_time() -> i64 {
    // SAFETY: a static that is written at reload.
    unsafe { pg_sys::PgReloadTime }
}

/// Whether the postmaster is loading its preload libraries now.
pub fn in_preload() -> bool {
    // SAFETY: a static.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// Whether a script of CREATE EXTENSION or ALTER EXTENSION UPDATE is running, of any extension.
pub fn in_extension_script() -> bool {
    // SAFETY: a static.
    unsafe { pg_sys::creating_extension }
}

/// Whether this server is a standby, or otherwise replays WAL.
pub fn in_recovery() -> bool {
    // SAFETY: reads shared memory.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// Raises 25006 in a READ ONLY transaction and on a standby.
pub fn refuse_read_only(function: &CStr) {
    // SAFETY: a C string for the message.
    unsafe { pg_sys::PreventCommandIfReadOnly(function.as_ptr()) }
}

/// The commit of the running transaction is on disk when it returns, whatever synchronous_commit
/// says: for what somebody relies on outside the database.
pub fn commit_durably() {
    // SAFETY: sets a flag, which the start of the next transaction clears.
    unsafe { pg_sys::ForceSyncCommit() }
}

/// The commit of the running transaction need not be on disk when it returns: for what is done
/// again if a crash undoes it. WAL is flushed in its order, so that whatever is committed later and
/// survives has all of this behind it.
pub fn commit_lazily() {
    // SAFETY: in a transaction, whose end undoes it: xact.c has read the setting by then.
    unsafe {
        pg_sys::set_config_option(
            c"synchronous_commit".as_ptr(),
            c"off".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
    }
}

/// Whether rows may be pruned that an old snapshot still sees.
#[cfg(any(feature = "pg15", feature = "pg16"))]
pub fn prunes_early() -> bool {
    // SAFETY: a setting that only a restart changes.
    unsafe { pg_sys::old_snapshot_threshold >= 0 }
}

/// Sleeps, but wakes for a cancel, a timeout or a shutdown, which then raise.
pub fn sleep_ms(milliseconds: i64) {
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    // SAFETY: MyLatch is this process's own; ResetLatch before looking at the interrupts, as
    // src/backend/utils/adt/misc.c does in pg_sleep.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            events as std::ffi::c_int,
            milliseconds,
            pg_sys::PG_WAIT_EXTENSION,
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
}

/// Whether the session has set up a replication origin, as whoever applies changes does.
pub fn has_origin() -> bool {
    // SAFETY: a static of this process.
    unsafe { u32::from(pg_sys::replorigin_session_origin) != pg_sys::InvalidRepOriginId }
}

/// The operating-system user that the server runs as.
pub fn server_user() -> u32 {
    // SAFETY: never fails.
    unsafe { libc::geteuid() }
}

/// Keeps a secret out of swap and core dumps, as far as the system allows.
pub fn protect_memory(secret: &[u8]) {
    // SAFETY: asks the kernel about the pages that hold the bytes, which are mapped; contents do
    // not change. Failing is allowed: the limits on locked memory are small.
    unsafe {
        let page = usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)).unwrap_or(4096);
        let start = secret.as_ptr() as usize & !(page - 1);
        let len = secret.as_ptr() as usize + secret.len() - start;
        libc::mlock(start as *const _, len);
        libc::madvise(start as *mut _, len, libc::MADV_DONTDUMP);
    }
}
