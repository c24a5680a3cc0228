//! A time limit for code of tables' owners, by PostgreSQL's own timeouts.
//!
//! Called by src/worker/. When the limit passes the running code is cancelled as by a statement
//! timeout. Code may swallow a cancel (EXCEPTION WHEN query_canceled): it is cancelled again after
//! each further span, and in the background worker the third time ends the process, which nothing
//! can swallow; the launcher then lets the table rest (ffi::shared).

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};

use pgrx::pg_sys;

/// How often the running limit has passed.
static PASSED: AtomicI32 = AtomicI32::new(0);
/// The number that PostgreSQL gave to our timeout, and the process in which it did.
static REGISTERED: AtomicI32 = AtomicI32::new(-1);
static REGISTERED_BY: AtomicI32 = AtomicI32::new(0);
/// Whether this process is a worker of ours, which may end.
static EXPENDABLE: AtomicBool = AtomicBool::new(false);

unsafe extern "C-unwind" {
    // src/include/utils/timeout.h
    fn RegisterTimeout(id: c_int, handler: unsafe extern "C" fn()) -> c_int;
    fn enable_timeout_every(id: c_int, fin_time: pg_sys::TimestampTz, delay_ms: c_int);
    fn disable_timeout(id: c_int, keep_indicator: bool);
}

/// At least USER_TIMEOUT of every supported version: the first free number is given.
const ANY_USER_TIMEOUT: c_int = 14;
/// So many times code is asked to stop before its process ends.
const ASKED: i32 = 3;

/// Declares this process one that ends rather than being held up for ever.
pub fn expendable() {
    EXPENDABLE.store(true, Relaxed);
}

/// Runs inside the alarm's signal handler: sets flags, as StatementCancelHandler and die do.
unsafe extern "C" fn expired() {
    let passed = PASSED.fetch_add(1, Relaxed) + 1;
    // SAFETY: sig_atomic_t flags and a latch, made for signal handlers.
    unsafe {
        pg_sys::InterruptPending = 1;
        pg_sys::QueryCancelPending = 1;
        if passed >= ASKED && EXPENDABLE.load(Relaxed) {
            pg_sys::ProcDiePending = 1;
        }
        pg_sys::SetLatch(pg_sys::MyLatch);
    }
}

/// A running limit; ends when dropped.
pub struct Limit(c_int);

impl Limit {
    /// Starts to count.
    pub fn start(milliseconds: i32) -> Limit {
        PASSED.store(0, Relaxed);
        // SAFETY: registered once per process, after its timeouts were set up.
        unsafe {
            let process = super::session::process();
            if REGISTERED_BY.load(Relaxed) != process {
                REGISTERED.store(RegisterTimeout(ANY_USER_TIMEOUT, expired), Relaxed);
                REGISTERED_BY.store(process, Relaxed);
            }
            let id = REGISTERED.load(Relaxed);
            let first = pg_sys::GetCurrentTimestamp() + i64::from(milliseconds) * 1000;
            enable_timeout_every(id, first, milliseconds);
            Limit(id)
        }
    }

    /// Whether the limit has passed since it was started.
    pub fn passed(&self) -> bool {
        PASSED.load(Relaxed) > 0
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // SAFETY: registered; disabling twice is fine.
        unsafe {
            disable_timeout(self.0, false);
            // A cancel of ours that came too late must hit nobody else.
            if self.passed() {
                pg_sys::QueryCancelPending = 0;
            }
        }
    }
}
