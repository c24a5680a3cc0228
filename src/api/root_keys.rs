//! Root keys: init_root_key, rotate_root_key, retire_root_key, mark_compromised_root,
//! reload_root_keys, ready, holds_root_key.

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;
use rekey_core::cipher::RootId;

use crate::catalog::read;
use crate::catalog::roots;
use crate::catalog::write::Audit;
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::{session, text};
use crate::root_key::{self, Next, Source};
use crate::root_rotation::{self, Wanted};
use crate::{failpoint, lifecycle};

/// A root id as SQL shows it.
pub fn root_id(text: &str) -> Result<RootId> {
    RootId::parse(text).ok_or_else(|| {
        Error::Argument(
            format!("\"{text}\" is not a root id"),
            "A root id has 32 lower-case hexadecimal digits.".to_string(),
            "SELECT root_id FROM rekey.root_keys shows those of this database.".to_string(),
        )
    })
}

/// The first argument; None when it is empty.
fn optional_root_id(call: &Call) -> Result<Option<RootId>> {
    let wanted = call.required_text(0, "root_id")?;
    if wanted.is_empty() {
        return Ok(None);
    }
    root_id(&wanted).map(Some)
}

#[pg_extern(sql = false)]
fn init_root_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"init_root_key()");
        let wanted = optional_root_id(&call)?;
        if let Some(root) = read::root_keys()?
            .into_iter()
            .find(|root| root.state == "active")
        {
            return Err(Error::State(
                "this database has an active root key already".to_string(),
                format!("It is {}.", root.id),
                "Root keys are replaced by a rotation, never by a second init.".to_string(),
            ));
        }
        let id = root_key::adopt(wanted)?;
        let check = root_key::with_any(&[id], |_, key| key.check())?;
        failpoint::reach("first.held")?;
        roots::insert(id, &check)?;
        failpoint::reach("first.adopted")?;
        let detail = id.to_string();
        Audit::act("init_root_key", None, &detail).record()?;
        if let Source::File(path) = root_key::source()? {
            let copy = format!(
                "copy \"{}\" to every standby and to escrow: without it the data is lost",
                path.display()
            );
            pgrx::notice!("{}", text::message(copy));
        }
        Reply::text(&id.to_string())
    })
}

#[pg_extern(sql = false)]
fn rotate_root_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"rotate_root_key()");
        let wanted = match call.required_text(0, "root_id")?.as_str() {
            "" => Wanted::Next,
            "new" => Wanted::New,
            id => Wanted::Named(root_id(id)?),
        };
        let Next { id, there_since } = root_rotation::rotate(&wanted)?;
        if let Some(since) = there_since {
            pgrx::notice!(
                "root key {id} was in the keyring file already, since {since}; if the file has \
                 leaked, or is another server's, SELECT rekey.rotate_root_key('new') adds one"
            );
        }
        if let Source::File(path) = root_key::source()? {
            let copy = format!(
                "copy \"{}\" to every standby and to escrow before the earlier root key is retired",
                path.display()
            );
            pgrx::notice!("{}", text::message(copy));
        }
        Reply::text(&id.to_string())
    })
}

#[pg_extern(sql = false)]
fn retire_root_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"retire_root_key()");
        root_rotation::retire(root_id(&call.required_text(0, "root_id")?)?)?;
        Ok(Reply::void())
    })
}

#[pg_extern(sql = false)]
fn mark_compromised_root(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"mark_compromised_root()");
        let id = root_id(&call.required_text(0, "root_id")?)?;
        let reason = call.required_text(1, "reason")?;
        root_rotation::mark_compromised(id, &reason).map(Reply::i32)
    })
}

#[pg_extern(sql = false)]
fn reload_root_keys(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |_| {
        Ok(Reply::i32(
            i32::try_from(root_key::reload()?).unwrap_or(i32::MAX),
        ))
    })
}

#[pg_extern(sql = false)]
fn ready(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |_| {
        let held = lifecycle::try_active_root_key();
        Ok(Reply::bool(held.is_ok_and(|root| root.is_some())))
    })
}

#[pg_extern(sql = false)]
fn holds_root_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        if !super::grants::monitors(session::current_user()) {
            return Ok(Reply::null());
        }
        let id = root_id(&call.required_text(0, "root_id")?)?;
        // Nobody makes the server look for root keys that no slot needs.
        let known = read::root_keys()?.iter().any(|root| root.id == id);
        Ok(Reply::bool(known && root_key::holds(id)))
    })
}
