//! Privileges on keys: grant_key, revoke_key, has_key_privilege, and the check that every
//! administration function makes.

use pgrx::pg_sys::{FunctionCallInfo, Oid};
use pgrx::prelude::*;
use rekey_core::keyring::{Privilege, Privileges};

use super::keys::key_name;
use crate::catalog::read;
use crate::catalog::write::{self, Audit};
use crate::error::{Error, Result};
use crate::ffi::call::{Call, Reply, reply};
use crate::ffi::{session, text};

fn privileges_of(key: &str, user: Oid) -> Result<Privileges> {
    read::privileges(&text::to_server(key.as_bytes())?, user)
}

/// Refuses a caller without the privilege: 42704 for an unknown key, 42501 otherwise.
pub fn require(key: &str, privilege: Privilege) -> Result<()> {
    if read::key(&text::to_server(key.as_bytes())?)?.is_none() {
        return Err(Error::unknown_key(key.to_string()));
    }
    let user = session::current_user();
    if privileges_of(key, user)?.implies(privilege) {
        return Ok(());
    }
    Err(Error::KeyPrivilege(
        session::role_name(user),
        key.to_string(),
        privilege,
    ))
}

/// Locks a key for a change that needs the privilege: asked before, so that nobody else can hold
/// the lock up, and again behind it, since the wait may have taken the privilege or the key away.
pub fn claim(key: &str, privilege: Privilege) -> Result<()> {
    require(key, privilege)?;
    if !write::lock_key(key)? {
        return Err(Error::unknown_key(key.to_string()));
    }
    require(key, privilege)
}

/// Whether the views show a key to the current user: any privilege on it, or pg_monitor.
pub fn visible(key: &str) -> Result<bool> {
    let user = session::current_user();
    Ok(monitors(user) || !privileges_of(key, user)?.is_empty())
}

/// Whether a user sees everything: superusers and members of pg_monitor.
pub fn monitors(user: Oid) -> bool {
    session::is_superuser(user)
        || session::role("pg_monitor").is_some_and(|role| session::has_privileges_of(user, role))
}

fn privilege(name: &str) -> Result<Privilege> {
    Privilege::parse(name).ok_or_else(|| {
        Error::Argument(
            format!("unknown privilege \"{name}\""),
            "The privileges on a key are owner, manage, rotate, encrypt and decrypt.".to_string(),
            "Name them in an array, for example '{encrypt,decrypt}'.".to_string(),
        )
    })
}

/// Role 0 is everyone.
fn grantee(name: &str) -> Result<Oid> {
    if name == "public" {
        return Ok(pg_sys::InvalidOid);
    }
    session::role(name).ok_or_else(|| Error::UnknownRole(name.to_string()))
}

/// Like `grantee`, and also the bare number that the view shows for a role that was dropped.
fn former_grantee(name: &str) -> Result<Oid> {
    grantee(name).or_else(|error| name.parse().map(Oid::from_u32).map_err(|_| error))
}

/// Key, role and privileges of a grant or revocation that the caller may make.
fn change(
    call: &Call,
    role_of: fn(&str) -> Result<Oid>,
) -> Result<(String, String, Oid, Vec<Privilege>)> {
    let key = key_name(call, 0)?;
    let role = call.required_text(1, "role_name")?;
    let wanted = call
        .required_texts(2, "privileges")?
        .into_iter()
        .map(|name| privilege(&name.ok_or(Error::NullArgument("a privilege"))?))
        .collect::<Result<Vec<_>>>()?;
    let needed = if wanted.contains(&Privilege::Owner) {
        Privilege::Owner
    } else {
        Privilege::Manage
    };
    require(&key, needed)?;
    let oid = role_of(&role)?;
    claim(&key, needed)?;
    Ok((key, role, oid, wanted))
}

fn audit(action: &str, key: &str, role: &str, privileges: &[Privilege]) -> Result<()> {
    let names: Vec<&str> = privileges.iter().map(|p| p.name()).collect();
    let detail = format!("{} on {role}", names.join(", "));
    Audit::act(action, Some(key), &detail).record()
}

#[pg_extern(sql = false)]
fn grant_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"grant_key()");
        let (key, role, oid, privileges) = change(&call, grantee)?;
        for privilege in &privileges {
            write::insert_grant(&key, oid, *privilege)?;
        }
        audit("grant_key", &key, &role, &privileges)?;
        Ok(Reply::void())
    })
}

#[pg_extern(sql = false)]
fn revoke_key(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        session::refuse_read_only(c"revoke_key()");
        let (key, role, oid, privileges) = change(&call, former_grantee)?;
        for privilege in &privileges {
            write::delete_grant(&key, oid, *privilege)?;
        }
        audit("revoke_key", &key, &role, &privileges)?;
        Ok(Reply::void())
    })
}

fn has(call: &Call, user: Oid, key: usize) -> Result<Reply> {
    let name = call.required_text(key, "key_name")?;
    let wanted = privilege(&call.required_text(key + 1, "privilege")?)?;
    if read::key(&text::to_server(name.as_bytes())?)?.is_none() {
        return Err(Error::unknown_key(name));
    }
    Ok(Reply::bool(privileges_of(&name, user)?.implies(wanted)))
}

#[pg_extern(sql = false)]
fn has_key_privilege(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| has(&call, session::current_user(), 0))
}

#[pg_extern(sql = false)]
fn has_key_privilege_role(fcinfo: FunctionCallInfo) -> Reply {
    reply(fcinfo, |call| {
        let role = call.required_text(0, "role_name")?;
        has(&call, grantee(&role)?, 1)
    })
}
