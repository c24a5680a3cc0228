//! SQL in the name of whoever called us, prepared once per query.
//!
//! Called by src/api/views.rs: what a trigger of a view does to the table beneath it, the caller
//! could do himself, with his privileges, his row security and his search path. The text holds
//! names only, each qualified and quoted; values are parameters.

use std::ffi::{CString, c_char, c_int};

use pgrx::pg_sys;

use crate::error::{Error, Result};

/// A kept plan; freed when dropped.
pub struct Statement(pg_sys::SPIPlanPtr);

/// The first row that a statement returns.
pub type FirstRow = Vec<Option<pg_sys::Datum>>;

fn failed(code: c_int) -> Error {
    Error::Internal(format!("a statement on the table of a view failed: {code}"))
}

impl Statement {
    /// Parses `sql`, whose parameters have these types.
    pub fn prepare(sql: &str, types: &[pg_sys::Oid]) -> Result<Statement> {
        let server = super::text::to_server(sql.as_bytes())?.into_owned();
        let sql = CString::new(server).map_err(|_| Error::NotEncodable)?;
        let mut types = types.to_vec();
        // SAFETY: SPI is connected around the calls; SPI_keepplan moves the plan into memory that
        // outlives SPI_finish. An ERROR closes SPI with its transaction.
        unsafe {
            pg_sys::SPI_connect();
            let count = c_int::try_from(types.len()).unwrap_or(c_int::MAX);
            let plan = pg_sys::SPI_prepare(sql.as_ptr(), count, types.as_mut_ptr());
            if plan.is_null() {
                return Err(failed(pg_sys::SPI_result));
            }
            pg_sys::SPI_keepplan(plan);
            let statement = Statement(plan);
            pg_sys::SPI_finish();
            Ok(statement)
        }
    }

    /// Runs it; None when it has processed no row. The datums live in the caller's memory context.
    pub fn execute(&self, values: &[Option<pg_sys::Datum>]) -> Result<Option<FirstRow>> {
        let null = pg_sys::Datum::null();
        let mut data: Vec<pg_sys::Datum> = values.iter().map(|v| v.unwrap_or(null)).collect();
        let nulls: Vec<c_char> = values
            .iter()
            .map(|v| if v.is_some() { b' ' } else { b'n' } as c_char)
            .collect();
        // SAFETY: as many values as the plan has parameters, of their types: the callers build both
        // from one list. SPI_copytuple copies into the context that was current at SPI_connect, and
        // the datums point into that copy.
        unsafe {
            pg_sys::SPI_connect();
            let code =
                pg_sys::SPI_execute_plan(self.0, data.as_mut_ptr(), nulls.as_ptr(), false, 0);
            if code < 0 {
                return Err(failed(code));
            }
            let mut first = (pg_sys::SPI_processed > 0).then(Vec::new);
            if let Some(row) = &mut first
                && let Some(table) = pg_sys::SPI_tuptable.as_ref()
            {
                let tuple = pg_sys::SPI_copytuple(*table.vals);
                for column in 1..=(*table.tupdesc).natts {
                    let mut null = false;
                    let datum = pg_sys::SPI_getbinval(tuple, table.tupdesc, column, &mut null);
                    row.push((!null).then_some(datum));
                }
            }
            pg_sys::SPI_finish();
            Ok(first)
        }
    }
}

impl Drop for Statement {
    fn drop(&mut self) {
        // SAFETY: kept by `prepare`, freed once.
        unsafe { pg_sys::SPI_freeplan(self.0) };
    }
}
