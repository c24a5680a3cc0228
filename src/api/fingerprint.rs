//! fingerprint_col, fingerprints, verify_fingerprint, fingerprint_slot_id: equality search.

use std::borrow::Cow;

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;
use rekey_core::cipher::Fingerprint;

use super::seal::key_name;
use crate::cache::lookup;
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::hooks;
use crate::ffi::text;
use crate::stale::Holds;

/// Has `make` make something of the first three arguments: key name, context and value, the latter
/// two in UTF-8. NULL for a NULL value.
fn of_value<R>(
    call: &Call,
    make: impl FnOnce(&[u8], &[u8], &[u8]) -> Result<R>,
) -> Result<Option<R>> {
    let Some(value) = call.bytes(0) else {
        return Ok(None);
    };
    hooks::keep_statement_out_of_log();
    let name = key_name(call)?;
    let context = call.bytes(2).ok_or(Error::NullArgument("context"))?;
    let (context, value): (Cow<'_, [u8]>, _) = (text::to_utf8(context)?, text::to_utf8(value)?);
    make(name, &context, &value).map(Some)
}

#[pg_extern(sql = false)]
fn fingerprint_col(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let made: Option<Fingerprint> = of_value(&call, lookup::fingerprint)?;
        made.map_or_else(
            || Ok(Reply::null()),
            |made| text::bytes_datum(&made).map(Reply::datum),
        )
    })
}

#[pg_extern(sql = false)]
fn fingerprints(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let made = of_value(&call, lookup::fingerprints)?;
        made.map_or_else(
            || Ok(Reply::null()),
            |made| text::bytea_array(&made).map(Reply::datum),
        )
    })
}

#[pg_extern(sql = false)]
fn verify_fingerprint(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let (Some(value), Some(fingerprint)) = (call.bytes(0), call.bytes(1)) else {
            return Ok(Reply::null());
        };
        hooks::keep_statement_out_of_log();
        let context = call.bytes(2).ok_or(Error::NullArgument("context"))?;
        let (context, value) = (text::to_utf8(context)?, text::to_utf8(value)?);
        lookup::verify(fingerprint, &context, &value).map(Reply::bool)
    })
}

#[pg_extern(sql = false)]
fn fingerprint_slot_id(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let slot = call
            .datum(0)
            .and_then(|datum| Holds::Fingerprints.slot(datum));
        Ok(slot.map_or_else(Reply::null, |slot| Reply::i64(slot.as_i64())))
    })
}
