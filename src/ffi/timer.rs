//! A time limit for code of tables' owners, by PostgreSQL's own timeouts.
//!
//! Called by src/worker/. When the limit passes the running code is cancelled as by a statement
//! timeout; code that swallows the cancel is cancelled again at each further span.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};

use pgrx::pg_sys;

static FIRED: AtomicBool = AtomicBool::new(false);
/// Process and number of the registered timeout: process << 8 is not needed, forks register anew.
static REGISTERED: AtomicI32 = AtomicI32::new(-1);
static REGISTERED_BY: AtomicI32 = AtomicI32::new(0);

unsafe extern "C-unwind" {
    // src/include/utils/timeout.h
    fn RegisterTimeout(id: c_int, handler: unsafe extern "C" fn()) -> c_int;
    fn enable_timeout_after(id: c_int, delay_ms: c_int);
    fn disable_timeout(id: c_int, keep_indicator: bool);
}

/// At least USER_TIMEOUT of every supported version: the first free number is given.
const ANY_USER_TIMEOUT: c_int = 14;

/// Runs inside the alarm's signal handler: sets flags, as StatementCancelHandler does.
unsafe extern "C" fn expired() {
    FIRED.store(true, Relaxed);
    // SAFETY: sig_atomic_t flags and a latch, made for signal handlers.
    unsafe {
        pg_sys::InterruptPending = 1;
        pg_sys::QueryCancelPending = 1;
        pg_sys::SetLatch(pg_sys::MyLatch);
    }
}

/// A running limit; ends when dropped.
pub struct Limit(c_int);

impl Limit {
    /// Starts to count.
    pub fn start(milliseconds: i32) -> Limit {
        FIRED.store(false, Relaxed);
        // SAFETY: registered once per process, after its timeouts were set up.
        unsafe {
            let process = super::session::process();
            if REGISTERED_BY.load(Relaxed) != process {
                REGISTERED.store(RegisterTimeout(ANY_USER_TIMEOUT, expired), Relaxed);
                REGISTERED_BY.store(process, Relaxed);
            }
            let id = REGISTERED.load(Relaxed);
            enable_timeout_after(id, milliseconds);
            Limit(id)
        }
    }

    /// Whether the limit has passed since it was started.
    pub fn passed(&self) -> bool {
        FIRED.load(Relaxed)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // SAFETY: registered; disabling twice is fine.
        unsafe {
            disable_timeout(self.0, false);
            // A cancel of ours that came too late must hit nobody else.
            if FIRED.load(Relaxed) {
                pg_sys::QueryCancelPending = 0;
            }
        }
    }
}
