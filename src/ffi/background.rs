//! Life as a background worker: starting, sleeping, transactions whose failure is survived.
//!
//! Called by src/worker/launcher.rs. Follows src/backend/postmaster/bgworker.c and the sigsetjmp
//! block of PostgresMain: an ERROR aborts the transaction and comes back as a value.

use std::ffi::CStr;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgTryBuilder, pg_sys};

use super::subtransaction::Caught;
use crate::error::Error;

unsafe extern "C" {
    // Signal handlers: src/backend/tcop/postgres.c, src/backend/postmaster/interrupt.c.
    fn die(signal: std::ffi::c_int);
    fn SignalHandlerForConfigReload(signal: std::ffi::c_int);
}

/// Takes the signals: SIGTERM ends the process at its next interrupt check, also within a
/// statement; SIGHUP has the configuration read again at the next sleep.
fn take_signals() {
    // SAFETY: handlers of PostgreSQL's own; the mask is opened afterwards.
    unsafe {
        for (signal, handler) in [
            (libc::SIGTERM, die as *const () as usize),
            (
                libc::SIGHUP,
                SignalHandlerForConfigReload as *const () as usize,
            ),
        ] {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler;
            action.sa_flags = libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
        // A reload between our start and this line was ignored: bgworker.c has SIG_IGN for it.
        pg_sys::ConfigReloadPending = 1;
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Connects to no database: shared catalogs only.
pub fn connect_to_none() {
    take_signals();
    // SAFETY: once per process.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
    }
    read_settings();
}

/// Connects to a database as the bootstrap superuser. Does not return when it is gone.
pub fn connect_to(database: pg_sys::Oid) {
    take_signals();
    // SAFETY: once per process.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnectionByOid(database, pg_sys::InvalidOid, 0);
        // A session that holds a key's row must not hold the worker: the step fails with 55P03 and
        // is tried again. Both are shorter than a session's deadlock_timeout of 1 s: in a deadlock
        // with a DROP EXTENSION, which locks the catalog table by table, the worker gives way.
        // Rows are updated as on a replica (`ActAs::updating`), and each change of that setting would
        // throw away all kept plans. Triggers of the catalog that matter are ENABLE ALWAYS.
        for (name, value) in [
            (c"lock_timeout", c"900ms"),
            (c"deadlock_timeout", c"100ms"),
            (c"session_replication_role", c"replica"),
        ] {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_OVERRIDE,
            );
        }
    }
    read_settings();
}

/// Sleeps until the time is over, for ever without one, or until roused. Reads the configuration
/// again when told to.
pub fn sleep(time: Option<Duration>) {
    let mut events = pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH;
    let mut ms = -1;
    if let Some(time) = time {
        events |= pg_sys::WL_TIMEOUT;
        ms = i64::try_from(time.as_millis().max(1)).unwrap_or(i64::MAX);
    }
    // SAFETY: as in `session::sleep_ms`.
    unsafe {
        let events = events as std::ffi::c_int;
        pg_sys::WaitLatch(pg_sys::MyLatch, events, ms, pg_sys::PG_WAIT_EXTENSION);
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
    read_settings();
}

/// Reads the configuration again when told to. Between transactions.
pub fn read_settings() {
    // SAFETY: a flag that the signal handler sets; read between transactions.
    unsafe {
        if pg_sys::ConfigReloadPending != 0 {
            pg_sys::ConfigReloadPending = 0;
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
    }
}

/// Why a transaction failed.
pub struct Failure {
    /// SQLSTATE.
    pub sqlstate: String,
}

/// Runs `body` in a transaction with a snapshot, and commits it. An ERROR, or an Err, aborts it.
pub fn transaction<R>(body: impl FnOnce() -> Result<R, Error>) -> std::result::Result<R, Failure> {
    // SAFETY: the process is connected and in no transaction; after a failure the abort puts
    // everything back as PostgresMain does.
    unsafe {
        let outcome = PgTryBuilder::new(AssertUnwindSafe(|| {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
            let result = body().map_err(|error| Failure {
                sqlstate: Caught(error.code()).sqlstate(),
            })?;
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
            Ok(result)
        }))
        .catch_others(|cause| {
            let report = match &cause {
                CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => report,
                CaughtError::RustPanic { ereport, .. } => ereport,
            };
            Err(Failure {
                sqlstate: Caught(report.sql_error_code()).sqlstate(),
            })
        })
        .execute();
        if outcome.is_err() {
            pg_sys::error_context_stack = std::ptr::null_mut();
            pg_sys::AbortCurrentTransaction();
        }
        // Autovacuum has to hear of dead rows.
        pg_sys::pgstat_report_stat(outcome.is_err());
        outcome
    }
}

/// What pg_stat_activity shows.
pub fn report(text: &str) {
    let Ok(text) = std::ffi::CString::new(text) else {
        return;
    };
    let state = if text.is_empty() {
        pg_sys::BackendState::STATE_IDLE
    } else {
        pg_sys::BackendState::STATE_RUNNING
    };
    // SAFETY: copies the text.
    unsafe { pg_sys::pgstat_report_activity(state, text.as_ptr()) }
}

/// WAL that this process has written, in bytes.
pub fn wal_written() -> u64 {
    // SAFETY: a counter of this process.
    unsafe { pg_sys::pgWalUsage.wal_bytes }
}

fn worker(name: &CStr, entry: &CStr, arg: pg_sys::Oid) -> pg_sys::BackgroundWorker {
    // SAFETY: plain data; the texts are shorter than their fields.
    let mut worker: pg_sys::BackgroundWorker = unsafe { std::mem::zeroed() };
    let fill = |field: &mut [std::ffi::c_char], text: &CStr| {
        for (to, from) in field.iter_mut().zip(text.to_bytes_with_nul()) {
            *to = std::ffi::c_char::from_ne_bytes([*from]);
        }
    };
    fill(&mut worker.bgw_name, name);
    fill(&mut worker.bgw_type, c"pg_rekey worker");
    fill(&mut worker.bgw_library_name, c"pg_rekey");
    fill(&mut worker.bgw_function_name, entry);
    worker.bgw_flags = (pg_sys::BGWORKER_SHMEM_ACCESS
        | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION) as std::ffi::c_int;
    worker.bgw_start_time = pg_sys::BgWorkerStartTime::BgWorkerStart_RecoveryFinished;
    worker.bgw_main_arg = pg_sys::Datum::from(arg);
    worker
}

/// Registers the launcher, while the libraries are preloaded: it starts when recovery has ended,
/// hence after a promotion too, and again 5 s after a crash.
pub fn register_launcher() {
    let mut launcher = worker(
        c"pg_rekey launcher",
        c"pg_rekey_launcher_main",
        pg_sys::InvalidOid,
    );
    launcher.bgw_restart_time = 5;
    for (to, from) in launcher.bgw_type.iter_mut().zip(b"pg_rekey launcher\0") {
        *to = std::ffi::c_char::from_ne_bytes([*from]);
    }
    // SAFETY: copies the description.
    unsafe { pg_sys::RegisterBackgroundWorker(&mut launcher) }
}

/// A worker that was started.
pub struct Started(*mut pg_sys::BackgroundWorkerHandle);

impl Started {
    /// Starts a worker for a database; None when no place is free.
    pub fn start(database: pg_sys::Oid) -> Option<Started> {
        let mut description = worker(c"pg_rekey worker", c"pg_rekey_worker_main", database);
        description.bgw_restart_time = pg_sys::BGW_NEVER_RESTART;
        description.bgw_notify_pid = super::session::process();
        let mut handle = std::ptr::null_mut();
        // SAFETY: copies the description; the handle lives in the memory context that is made to
        // last, and is never freed: a few bytes per visit are given back with `ended`.
        unsafe {
            let previous = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = pg_sys::TopMemoryContext;
            let started = pg_sys::RegisterDynamicBackgroundWorker(&mut description, &mut handle);
            pg_sys::CurrentMemoryContext = previous;
            // Lazily: a handle that was not given must not be dropped.
            started.then(|| Started(handle))
        }
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        let mut process = 0;
        // SAFETY: the handle is live.
        let status = unsafe { pg_sys::GetBackgroundWorkerPid(self.0, &mut process) };
        matches!(
            status,
            pg_sys::BgwHandleStatus::BGWH_STOPPED | pg_sys::BgwHandleStatus::BGWH_POSTMASTER_DIED
        )
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // SAFETY: allocated by RegisterDynamicBackgroundWorker, freed once.
        unsafe { pg_sys::pfree(self.0.cast()) }
    }
}

/// The databases that accept connections: OID and name. In a transaction.
pub fn databases() -> Vec<(u32, String)> {
    let mut found = Vec::new();
    // SAFETY: a scan of the shared catalog pg_database under the catalog snapshot, closed here.
    unsafe {
        let relation =
            pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as i32);
        let scan = pg_sys::systable_beginscan(
            relation,
            pg_sys::InvalidOid,
            false,
            std::ptr::null_mut(),
            0,
            std::ptr::null_mut(),
        );
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let data = (*tuple).t_data;
            let form: *const pg_sys::FormData_pg_database =
                data.cast::<u8>().add(usize::from((*data).t_hoff)).cast();
            if (*form).datallowconn {
                let name = super::text::c_string((*form).datname.data.as_ptr());
                found.push(((*form).oid.to_u32(), name));
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
    }
    found
}

/// The present moment, a TimestampTz in microseconds.
pub fn now() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

/// The database of this process.
pub fn database() -> u32 {
    // SAFETY: a static that is set at connection.
    unsafe { pg_sys::MyDatabaseId }.to_u32()
}
