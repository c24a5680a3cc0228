//! What an envelope says of itself: slot_id, is_envelope, describe, and context.

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;
use rekey_core::envelope::Envelope;
use rekey_core::keyring::bind_parts;

use crate::catalog::read;
use crate::error::{Error, Result};
use crate::ffi::call::{Reply, reply};
use crate::ffi::{session, text};
use crate::stale::header;

#[pg_extern(sql = false)]
fn slot_id(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let header = call.datum(0).and_then(header);
        Ok(header.map_or_else(Reply::null, |header| Reply::i64(header.slot.as_i64())))
    })
}

#[pg_extern(sql = false)]
fn is_envelope(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        Ok(call
            .datum(0)
            .map_or_else(Reply::null, |d| Reply::bool(header(d).is_some())))
    })
}

#[pg_extern(sql = false)]
fn describe(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let Some(bytes) = call.bytes(0) else {
            return Ok(Reply::null());
        };
        let envelope = Envelope::parse(bytes)?;
        let header = envelope.header;
        let slot = read::slot(header.slot)?;
        let visible = match &slot {
            Some(slot) => super::grants::visible(&slot.key_name)?,
            None => false,
        };
        let shown = slot.filter(|_| visible);
        let key = shown
            .as_ref()
            .map(|s| text::text_datum(&s.key_name))
            .transpose()?;
        let state = shown
            .as_ref()
            .map(|s| text::text_datum(s.state.name()))
            .transpose()?;
        let kind = text::text_datum(header.kind.name())?;
        let value_bytes = i32::try_from(envelope.ciphertext.len()).unwrap_or(i32::MAX);
        Ok(call.record(&mut [
            Some(pg_sys::Datum::from(1i32)),
            Some(pg_sys::Datum::from(1i32)),
            Some(kind),
            Some(pg_sys::Datum::from(header.context_bound)),
            Some(pg_sys::Datum::from(header.slot.as_i64())),
            key,
            state,
            Some(pg_sys::Datum::from(value_bytes)),
        ]))
    })
}

#[pg_extern(sql = false)]
fn context(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let parts: Vec<String> = call
            .required_texts(0, "parts")?
            .into_iter()
            .map(|part| part.ok_or(Error::NullArgument("a part of the context")))
            .collect::<Result<_>>()?;
        if parts.is_empty() {
            return Err(Error::Argument(
                "a context needs at least one part".to_string(),
                "An empty context would bind nothing.".to_string(),
                "Name the cell, for example rekey.context('customer.email', id::text).".to_string(),
            ));
        }
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        Reply::text(&bind_parts(&parts))
    })
}

#[pg_extern(sql = false)]
fn key_visible(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        Ok(Reply::bool(match call.optional_text(0)? {
            Some(key) => super::grants::visible(&key)?,
            None => super::grants::monitors(session::current_user()),
        }))
    })
}
