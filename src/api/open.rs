//! decrypt_col, decrypt_col_as and can_open: an envelope into its value.

use std::borrow::Cow;

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;
use rekey_core::envelope::{Envelope, Kind};

use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::hooks;
use crate::ffi::text;
use crate::sealing::open;
use crate::typed::{Target, text_form};

#[pg_extern(sql = false)]
fn decrypt_col(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let Some(bytes) = call.bytes(0) else {
            return Ok(Reply::null());
        };
        hooks::keep_statement_out_of_log();
        open_as_text(bytes, call.bytes(1)).map(Reply::datum)
    })
}

#[pg_extern(sql = false)]
fn decrypt_col_as(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let Some(bytes) = call.bytes(0) else {
            return Ok(Reply::null());
        };
        hooks::keep_statement_out_of_log();
        open_as_type(&call, bytes)
    })
}

#[pg_extern(sql = false)]
fn can_open(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let Some(bytes) = call.bytes(0) else {
            return Ok(Reply::null());
        };
        Ok(Reply::bool(open_as_text(bytes, call.bytes(1)).is_ok()))
    })
}

fn open_as_text(bytes: &[u8], context: Option<&[u8]>) -> Result<pg_sys::Datum> {
    let context = utf8_context(context)?;
    let envelope = Envelope::parse(bytes)?;
    // A text value is decrypted where the caller will read it.
    text_form(envelope.header.kind, open(&envelope, &context)?)
}

fn open_as_type(call: &Call, bytes: &[u8]) -> Result<Reply> {
    let context = utf8_context(call.bytes(2))?;
    let target = match call.remembered::<Target>() {
        Some(known) => known,
        None => call.remember(call.for_the_query(|| Target::of(call.arg_type(1)))?),
    };
    let envelope = Envelope::parse(bytes)?;
    let mut value = open(&envelope, &context)?;
    let kind = envelope.header.kind;
    if kind == Kind::Bytea && target.is_bytea()
        || kind == Kind::Text && target.is_text() && text::server_is_utf8()
    {
        return Ok(Reply::datum(value.finish()));
    }
    target.value(kind, value.data()).map(Reply::datum)
}

#[inline]
fn utf8_context(context: Option<&[u8]>) -> Result<Cow<'_, [u8]>> {
    match context {
        Some(context) => text::to_utf8(context),
        None => Err(Error::NullArgument("context")),
    }
}
