//! encrypt_col: a value of any type into an envelope, under the key and context of the call.

use std::borrow::Cow;

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;
use rekey_core::envelope::Kind;

use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::hooks;
use crate::ffi::text;
use crate::guc;
use crate::sealing;
use crate::typed::Sealable;

#[pg_extern(sql = false)]
fn encrypt_col_text(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let Some(value) = call.bytes(0) else {
            return Ok(Reply::null());
        };
        hooks::keep_statement_out_of_log();
        seal(&call, Kind::Text, &[], &text::to_utf8(value)?)
    })
}

#[pg_extern(sql = false)]
fn encrypt_col_bytea(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let Some(value) = call.bytes(0) else {
            return Ok(Reply::null());
        };
        hooks::keep_statement_out_of_log();
        seal(&call, Kind::Bytea, &[], value)
    })
}

#[pg_extern(sql = false)]
fn encrypt_col_anyelement(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let Some(value) = call.datum(0) else {
            return Ok(Reply::null());
        };
        hooks::keep_statement_out_of_log();
        let sealable = match call.remembered::<Sealable>() {
            Some(known) => known,
            None => call.remember(call.for_the_query(|| Sealable::of(call.arg_type(0)))?),
        };
        let (kind, prefix, body) = sealable.payload(value)?;
        seal(&call, kind, prefix, &body)
    })
}

/// The key name of the call, its second argument; an empty one is the default.
#[inline]
pub(super) fn key_name(call: &Call) -> Result<&[u8]> {
    key_or_default(call.bytes(1).ok_or(Error::NullArgument("key_name"))?)
}

/// A key's name, or that of the default key when it is empty.
#[inline]
pub(super) fn key_or_default(name: &[u8]) -> Result<&[u8]> {
    let key = if name.is_empty() {
        guc::default_key()
    } else {
        name
    };
    if key.is_empty() {
        return Err(Error::NoDefaultKey);
    }
    Ok(key)
}

/// Seals prefix and body, in UTF-8 where they are text, with the call's key name and context.
#[inline]
fn seal(call: &Call, kind: Kind, prefix: &[u8], body: &[u8]) -> Result<Reply> {
    let key = key_name(call)?;
    let Some(context) = call.bytes(2) else {
        return Err(Error::NullArgument("context"));
    };
    let context: Cow<'_, [u8]> = text::to_utf8(context)?;
    sealing::seal(key, &context, kind, prefix, body).map(Reply::datum)
}
