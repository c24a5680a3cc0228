//! Many keys at once: create_keys and rotate_keys, for a key for each tenant.
//!
//! One statement, one transaction: all of it happens or nothing. Each key has its own row in the
//! audit log, as if the function for a single key had been called.

use std::collections::{BTreeSet, HashSet};

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys::{Datum, FunctionCallInfo};
use pgrx::prelude::*;
use rekey_core::keyring::{Privilege, valid_key_name};

use super::grants::claim;
use super::keys::key_name;
use crate::catalog::read;
use crate::error::{Error, Result};
use crate::ffi::call::{Reply, reply};
use crate::ffi::{session, text};
use crate::lifecycle;

/// So many names are given in a message.
const NAMED: usize = 10;

fn list<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    let more = names.len().saturating_sub(NAMED);
    let mut shown: Vec<String> = names.take(NAMED).map(|n| format!("\"{n}\"")).collect();
    if more > 0 {
        shown.push(format!("and {more} more"));
    }
    shown.join(", ")
}

/// The names, each once and each valid.
fn key_names(given: Vec<Option<String>>) -> Result<Vec<String>> {
    let names = given
        .into_iter()
        .map(|name| name.ok_or(Error::NullArgument("a key name")))
        .collect::<Result<Vec<_>>>()?;
    for name in &names {
        valid_key_name(name)?;
    }
    let mut seen = HashSet::new();
    let twice: BTreeSet<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| !seen.insert(*name))
        .collect();
    if twice.is_empty() {
        return Ok(names);
    }
    Err(Error::Argument(
        "a key name is given more than once".to_string(),
        format!("More than once: {}.", list(twice.iter().copied())),
        "Give each name once: array(SELECT DISTINCT ...).".to_string(),
    ))
}

/// 42710 or 55000 for names that are taken.
fn refuse_taken(taken: &[&str], shredded: &[&str], if_not_exists: bool) -> Result<()> {
    if !shredded.is_empty() {
        return Err(Error::State(
            format!("{} of the keys were shredded", shredded.len()),
            format!("Shredded: {}.", list(shredded.iter().copied())),
            "SELECT rekey.drop_key(key_name) frees a name.".to_string(),
        ));
    }
    if taken.is_empty() || if_not_exists {
        return Ok(());
    }
    Err(Error::Object(
        Code::ERRCODE_DUPLICATE_OBJECT,
        format!("{} of the keys exist already", taken.len()),
        format!("Taken: {}.", list(taken.iter().copied())),
        "No key was created. if_not_exists => true leaves those that exist as they are."
            .to_string(),
    ))
}

#[pg_extern(sql = false)]
fn create_keys(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"create_keys()");
        let names = key_names(call.required_texts(0, "key_names")?)?;
        let like = key_name(&call, 1)?;
        let if_not_exists = call.required_bool(2, "if_not_exists")?;
        claim(&like, Privilege::Manage)?;
        let (mut taken, mut shredded, mut new) = (Vec::new(), Vec::new(), Vec::new());
        for name in &names {
            match read::key(&text::to_server(name.as_bytes())?)? {
                Some(row) if row.shredded => shredded.push(name.as_str()),
                Some(_) => taken.push(name.as_str()),
                None => new.push(name.as_str()),
            }
        }
        refuse_taken(&taken, &shredded, if_not_exists)?;
        if read::key(&text::to_server(like.as_bytes())?)?.is_some_and(|row| row.shredded) {
            return Err(Error::State(
                format!("key \"{like}\" was shredded"),
                "It is no template any more.".to_string(),
                "Name a key with the policy and the grants that the new ones shall have."
                    .to_string(),
            ));
        }
        let created = lifecycle::create_keys(&new, &like, session::current_user())?;
        if created.len() < new.len() {
            // Another session was first: its transaction has ended by now.
            let created: HashSet<&str> = created.iter().map(String::as_str).collect();
            new.retain(|name| !created.contains(name));
            refuse_taken(&new, &[], if_not_exists)?;
            taken.append(&mut new);
        }
        if !taken.is_empty() {
            pgrx::notice!("{} of the keys exist already, keeping them", taken.len());
        }
        Ok(Reply::i64(i64::try_from(created.len()).unwrap_or(i64::MAX)))
    })
}

#[pg_extern(sql = false)]
fn rotate_keys(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"rotate_keys()");
        let than = call.datum(0).ok_or(Error::NullArgument("older_than"))?;
        let most = call.required_i32(1, "max_keys")?;
        let pattern = call.required_text(2, "pattern")?;
        let reason = call.required_text(3, "reason")?;
        if most < 1 {
            return Err(Error::Argument(
                "max_keys must be positive".to_string(),
                "It is the number of keys that one call rotates, at most.".to_string(),
                "Leave it out for 100.".to_string(),
            ));
        }
        let (rotated, left) = lifecycle::rotate_older(than, most.into(), &pattern, &reason)?;
        Ok(call.record(&mut [Some(Datum::from(rotated)), Some(Datum::from(left))]))
    })
}
