//! Work that may fail without ending the transaction.
//!
//! Called by src/worker/ around code of tables' owners. A failure is reported by its SQLSTATE
//! alone: the message may quote a value.

use std::panic::AssertUnwindSafe;

use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgSqlErrorCode, PgTryBuilder, pg_sys};

/// An ERROR that was caught: its SQLSTATE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caught(pub PgSqlErrorCode);

impl Caught {
    /// The five characters.
    pub fn sqlstate(self) -> String {
        // MAKE_SQLSTATE of src/include/utils/elog.h: six bits a character, the first lowest.
        let mut code = self.0 as i32;
        let mut text = String::with_capacity(5);
        for _ in 0..5 {
            text.push(char::from(u8::try_from(code & 0x3f).unwrap_or(0) + b'0'));
            code >>= 6;
        }
        text
    }

    /// Whether it is a cancel, or a server in need, for which no row and no code is to blame.
    pub fn is_grave(self) -> bool {
        matches!(&self.sqlstate()[..2], "53" | "57" | "58")
    }
}

/// Runs `body` in a subtransaction: kept when it returns, undone when it raises. The caller decides
/// what a cancel (57014) means to it.
pub fn subtransaction<R>(body: impl FnOnce() -> R) -> std::result::Result<R, Caught> {
    // SAFETY: the pattern of src/pl/plpgsql/src/pl_exec.c, exec_stmt_block: the memory context and
    // the resource owner are put back whatever happens.
    unsafe {
        let context = pg_sys::CurrentMemoryContext;
        let owner = pg_sys::CurrentResourceOwner;
        // An ERROR on its way through Rust may have put a callback there: `override_sqlstate`.
        let callbacks = pg_sys::error_context_stack;
        pg_sys::BeginInternalSubTransaction(std::ptr::null());
        pg_sys::CurrentMemoryContext = context;
        let outcome = PgTryBuilder::new(AssertUnwindSafe(|| {
            let result = body();
            pg_sys::ReleaseCurrentSubTransaction();
            Ok(result)
        }))
        .catch_others(|cause| {
            let report = match &cause {
                CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => report,
                CaughtError::RustPanic { ereport, .. } => ereport,
            };
            Err(Caught(report.sql_error_code()))
        })
        .execute();
        if outcome.is_err() {
            pg_sys::error_context_stack = callbacks;
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
        outcome
    }
}
