//! check(): the findings as JSON, which sql/functions.sql makes a table of.

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;
use serde_json::{Value, json};

use crate::catalog::check::Finding;
use crate::check;
use crate::ffi::call::{Reply, reply};
use crate::ffi::text;

#[pg_extern(sql = false)]
fn check_findings(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |_| {
        let row = |found: Finding| {
            json!({
                "severity": found.severity.name(),
                "object": text::representable(found.object),
                "finding": text::representable(found.finding),
                "remedy": text::representable(found.remedy),
            })
        };
        let rows: Vec<Value> = check::findings()?.into_iter().map(row).collect();
        Reply::text(&Value::Array(rows).to_string())
    })
}
