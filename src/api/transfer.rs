//! Keys between databases: export_key, import_key.
//!
//! Neither asks a key privilege: EXECUTE on them is the privilege, which only superusers have by
//! default. A transport key opens everything that it wraps: its statement stays out of the log.

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;
use rekey_core::cipher::RootKey;
use rekey_core::exported_key::ExportedKey;
use rekey_core::keyring::valid_key_name;

use super::keys::key_name;
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::{hooks, session, types};
use crate::transfer;

/// The transport key of the call, if there is one.
fn transport_key(call: &Call, i: usize) -> Result<Option<RootKey>> {
    let Some(bytes) = call.bytes(i) else {
        return Ok(None);
    };
    hooks::keep_statement_out_of_log();
    match RootKey::from_slice(bytes) {
        Some(key) => Ok(Some(key)),
        None => Err(Error::Argument(
            "a transport key has exactly 32 bytes".to_string(),
            format!("{} bytes were given.", bytes.len()),
            "Make 32 random bytes outside the database (openssl rand -hex 32), use them once, and \
             pass them as a bind parameter."
                .to_string(),
        )),
    }
}

#[pg_extern(sql = false)]
fn export_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"export_key()");
        let transport = transport_key(&call, 1)?;
        let exported = transfer::export(&key_name(&call, 0)?, transport.as_ref())?;
        types::jsonb_datum(&exported.to_json()).map(Reply::datum)
    })
}

#[pg_extern(sql = false)]
fn import_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"import_key()");
        let transport = transport_key(&call, 1)?;
        let document = call.datum(0).ok_or(Error::NullArgument("exported"))?;
        let exported = ExportedKey::parse(&types::jsonb_text(document)?).map_err(|cause| {
            Error::Argument(
                "this is not an exported key".to_string(),
                cause.detail(),
                "Pass what rekey.export_key has returned, whole and unchanged.".to_string(),
            )
        })?;
        let name = match call.optional_text(2)? {
            Some(name) => {
                valid_key_name(&name)?;
                name
            }
            None => exported.key_name.clone(),
        };
        transfer::import(&exported, transport.as_ref(), &name).map(Reply::i32)
    })
}
