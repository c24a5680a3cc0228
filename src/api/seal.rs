//! encrypt_col: a value into an envelope, in one allocation.

use std::borrow::Cow;

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;
use rekey_core::envelope::{CIPHERTEXT_AT, HEADER_LEN, Kind, OVERHEAD, SALT_LEN};

use crate::cache::{self, Sealer};
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::hooks;
use crate::ffi::text::{self, Varlena};
use crate::guc;
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
            None => call.remember(Sealable::of(&call, call.arg_type(0))?),
        };
        match sealable {
            Sealable::Plain(Kind::Text) => seal(
                &call,
                Kind::Text,
                &[],
                &text::to_utf8(text::detoasted(value))?,
            ),
            Sealable::Plain(kind) => seal(&call, *kind, &[], text::detoasted(value)),
            Sealable::Typed { prefix, output } => {
                let form = output.output(value)?.to_bytes();
                seal(&call, Kind::Typed, prefix, &text::to_utf8(form)?)
            }
        }
    })
}

/// The key name of the call, its second argument; an empty one is the default.
#[inline]
pub(super) fn key_name(call: &Call) -> Result<&[u8]> {
    let Some(name) = call.bytes(1) else {
        return Err(Error::NullArgument("key_name"));
    };
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
    let len = prefix.len() + body.len();
    let mut envelope = Varlena::allocate(OVERHEAD + len)?;
    let bytes = envelope.data();
    bytes[CIPHERTEXT_AT..CIPHERTEXT_AT + prefix.len()].copy_from_slice(prefix);
    bytes[CIPHERTEXT_AT + prefix.len()..CIPHERTEXT_AT + len].copy_from_slice(body);
    cache::seal(key, kind, !context.is_empty(), len, |sealer| {
        let Sealer {
            header,
            salt,
            counter,
            subkey,
        } = sealer;
        let header = header.to_bytes();
        bytes[..HEADER_LEN].copy_from_slice(&header);
        bytes[HEADER_LEN..HEADER_LEN + SALT_LEN].copy_from_slice(&salt);
        bytes[HEADER_LEN + SALT_LEN..CIPHERTEXT_AT].copy_from_slice(&counter);
        let payload = &mut bytes[CIPHERTEXT_AT..CIPHERTEXT_AT + len];
        let tag = subkey.seal_in_place(&counter, &header, &context, payload);
        bytes[CIPHERTEXT_AT + len..].copy_from_slice(&tag);
    })?;
    Ok(Reply::datum(envelope.finish()))
}
