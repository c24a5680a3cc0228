//! Keys and their policy: create_key, set_policy, rotate_key, rollback_rotation, shred_key,
//! drop_key.

use pgrx::pg_sys::FunctionCallInfo;
use pgrx::prelude::*;
use rekey_core::keyring::{Privilege, SlotState, valid_key_name};

use super::grants::claim;
use crate::catalog::read;
use crate::catalog::write::{self, Audit, NewKey, Policy, Span};
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::{session, text};
use crate::{guc, lifecycle};

/// A key name that an empty one replaces by the default, as a String.
pub(super) fn key_or_default(call: &Call, i: usize) -> Result<String> {
    let name = call.required_text(i, "key_name")?;
    let name = if name.is_empty() {
        text::to_utf8_string(guc::default_key())?
    } else {
        name
    };
    if name.is_empty() {
        Err(Error::NoDefaultKey)
    } else {
        Ok(name)
    }
}

/// A key name that must be given.
pub fn key_name(call: &Call, i: usize) -> Result<String> {
    let name = call.required_text(i, "key_name")?;
    valid_key_name(&name)?;
    Ok(name)
}

fn interval(call: &Call, i: usize, name: &str) -> Result<Option<pg_sys::Datum>> {
    let Some(datum) = call.datum(i) else {
        return Ok(None);
    };
    match write::span(datum)? {
        Span::Fits => Ok(Some(datum)),
        Span::Negative => Err(Error::Argument(
            format!("{name} must not be negative"),
            "It is a span of time that is waited for.".to_string(),
            "Use an interval such as '30 days', or '0'.".to_string(),
        )),
        Span::TooLong => Err(Error::Argument(
            format!("{name} must not be longer than 1000 years"),
            "A point in time behind all timestamps would stop the worker and the views."
                .to_string(),
            "Use an interval such as '30 days'; a max_age of '0' is never.".to_string(),
        )),
    }
}

#[pg_extern(sql = false)]
fn create_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"create_key()");
        let name = key_name(&call, 0)?;
        let grace = interval(&call, 1, "grace")?.ok_or(Error::NullArgument("grace"))?;
        let max_age = interval(&call, 2, "max_age")?.ok_or(Error::NullArgument("max_age"))?;
        let if_not_exists = call.required_bool(3, "if_not_exists")?;
        let comment = call.required_text(4, "comment")?;
        let purpose = call.required_text(5, "purpose")?;
        if purpose != "seal" && purpose != "lookup" {
            return Err(Error::Argument(
                format!("unknown purpose \"{purpose}\""),
                "A key's purpose is seal or lookup.".to_string(),
                "Leave it out for a key that seals values.".to_string(),
            ));
        }
        let server_name = text::to_server(name.as_bytes())?.into_owned();
        if let Some(row) = read::key(&server_name)? {
            return existing_key(&name, &server_name, row.shredded, if_not_exists);
        }
        let new = NewKey {
            name: &name,
            purpose: &purpose,
            grace,
            max_age,
            comment: &comment,
        };
        match lifecycle::create_key(&new)? {
            Some(slot) => {
                write::insert_grant(&name, session::current_user(), Privilege::Owner)?;
                Ok(Reply::i64(slot.as_i64()))
            }
            // Another session was first: its transaction has ended by now.
            None => {
                let shredded = read::key(&server_name)?.is_some_and(|row| row.shredded);
                existing_key(&name, &server_name, shredded, if_not_exists)
            }
        }
    })
}

fn existing_key(name: &str, server: &[u8], shredded: bool, accept: bool) -> Result<Reply> {
    if shredded {
        return Err(Error::State(
            format!("key \"{name}\" was shredded"),
            "Its name stays closed, so that nothing is sealed under it by mistake.".to_string(),
            "SELECT rekey.drop_key(key_name) frees the name.".to_string(),
        ));
    }
    if !accept {
        return Err(Error::KeyExists(name.to_string()));
    }
    let active = read::active_slot(server)?.ok_or_else(|| Error::NoActiveSlot(name.to_string()))?;
    let kept = format!("key \"{name}\" already exists, keeping it");
    pgrx::notice!("{}", text::message(kept));
    Ok(Reply::i64(active.as_i64()))
}

#[pg_extern(sql = false)]
fn set_policy(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"set_policy()");
        let name = key_name(&call, 0)?;
        claim(&name, Privilege::Manage)?;
        let after_drain = call.optional_text(3)?;
        let after_drain = after_drain.as_deref();
        if after_drain.is_some_and(|v| !["keep", "disable", "destroy"].contains(&v)) {
            return Err(Error::Argument(
                format!(
                    "unknown after_drain \"{}\"",
                    after_drain.unwrap_or_default()
                ),
                "It is keep, disable or destroy.".to_string(),
                "keep leaves a drained slot readable.".to_string(),
            ));
        }
        let custodian = call.optional_text(5)?;
        let policy = Policy {
            grace: interval(&call, 1, "grace")?,
            max_age: interval(&call, 2, "max_age")?,
            after_drain,
            require_context: call.optional_bool(4),
            custodian: custodian.as_deref(),
        };
        lifecycle::lock(&name)?;
        write::update_policy(&name, &policy)?;
        let changed: Vec<&str> = [
            policy.grace.map(|_| "grace"),
            policy.max_age.map(|_| "max_age"),
            after_drain.map(|_| "after_drain"),
            policy.require_context.map(|_| "require_context"),
            policy.custodian.map(|_| "custodian"),
        ]
        .into_iter()
        .flatten()
        .collect();
        Audit::act("set_policy", Some(&name), &changed.join(", ")).record()?;
        Ok(Reply::void())
    })
}

#[pg_extern(sql = false)]
fn rotate_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"rotate_key()");
        let name = key_or_default(&call, 0)?;
        let reason = call.required_text(1, "reason")?;
        claim(&name, Privilege::Rotate)?;
        Ok(Reply::i64(lifecycle::rotate(&name, &reason)?.as_i64()))
    })
}

#[pg_extern(sql = false)]
fn prepare_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"prepare_key()");
        let name = key_name(&call, 0)?;
        claim(&name, Privilege::Rotate)?;
        Ok(Reply::i64(lifecycle::prepare(&name)?.as_i64()))
    })
}

#[pg_extern(sql = false)]
fn promote_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"promote_key()");
        let name = key_name(&call, 0)?;
        let wait = call.required_bool(1, "wait_for_standbys")?;
        let timeout = interval(&call, 2, "wait_timeout")?;
        let timeout = timeout.ok_or(Error::NullArgument("wait_timeout"))?;
        claim(&name, Privilege::Rotate)?;
        let timeout = wait.then_some(timeout);
        Ok(Reply::i64(lifecycle::promote(&name, timeout)?.as_i64()))
    })
}

#[pg_extern(sql = false)]
fn rollback_rotation(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"rollback_rotation()");
        let name = key_name(&call, 0)?;
        claim(&name, Privilege::Rotate)?;
        Ok(Reply::i64(lifecycle::roll_back(&name)?.as_i64()))
    })
}

#[pg_extern(sql = false)]
fn shred_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"shred_key()");
        let name = key_name(&call, 0)?;
        let reason = call.required_text(1, "reason")?;
        claim(&name, Privilege::Owner)?;
        let count = lifecycle::shred(&name, &reason)?;
        pgrx::notice!(
            "copies of the wrapped keys remain in dead tuples, WAL, standbys, dumps and base \
             backups, openable with a root key that wrapped them; a full shred retires those \
             root keys and destroys their copies"
        );
        Ok(Reply::i32(count))
    })
}

#[pg_extern(sql = false)]
fn drop_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"drop_key()");
        let name = key_name(&call, 0)?;
        claim(&name, Privilege::Manage)?;
        let slots = lifecycle::lock(&name)?;
        let in_use =
            |s: &&read::SlotRow| !matches!(s.state, SlotState::Pending | SlotState::Destroyed);
        let count = slots.iter().filter(in_use).count();
        if count > 0 {
            return Err(Error::State(
                format!("key \"{name}\" has slots in use"),
                format!("Slots that are neither pending nor destroyed: {count}."),
                "Destroy them first, or SELECT rekey.shred_key(key_name, reason).".to_string(),
            ));
        }
        for slot in slots.iter().filter(|s| s.state == SlotState::Pending) {
            write::transition(slot, SlotState::Destroyed, "drop_key", "key dropped")?;
        }
        write::delete_key(&name)?;
        Audit::act("drop_key", Some(&name), "").record()?;
        Ok(Reply::void())
    })
}
