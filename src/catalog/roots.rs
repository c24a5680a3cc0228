//! Root keys in the catalog: their states, the wrapped keys of all slots, and the lock that keeps
//! slots from being made beside a change of either.
//!
//! Called by src/root_rotation.rs, and for the lock by whatever makes or destroys a slot. Everything
//! runs in the caller's transaction as the owner of the catalog.

use rekey_core::cipher::RootId;
use rekey_core::envelope::SlotId;

use super::read;
use crate::error::{Error, Result};
use crate::ffi::sql::{Arg, run};

/// What a transaction is going to do with the root keys of the catalog.
#[derive(Clone, Copy)]
pub enum Roots {
    /// Make or destroy wrapped keys of a slot, under the root keys as they are.
    Use,
    /// Change a root key's state, or the wrapped keys of all slots.
    Change,
    /// The same, and slots of many keys.
    ChangeWithKeys,
}

/// Locks the root keys until the transaction ends, so that no slot is made beside a change of the
/// root keys: it would lack a wrapped key under the new one. Opening and sealing take no such lock.
///
/// Deadlocks: everybody locks rekey.key before rekey.root_key. Who makes a slot has locked the row
/// of its key before, or is about to insert it, which takes the same lock on the table; a change
/// of many keys' slots locks the whole table. Both modes let readers and pg_dump pass.
pub fn lock(roots: Roots) -> Result<()> {
    let sql = match roots {
        Roots::Use => "LOCK TABLE rekey.key, rekey.root_key IN ROW EXCLUSIVE MODE",
        Roots::Change => "LOCK TABLE rekey.root_key IN SHARE ROW EXCLUSIVE MODE",
        Roots::ChangeWithKeys => "LOCK TABLE rekey.key, rekey.root_key IN SHARE ROW EXCLUSIVE MODE",
    };
    run(sql, &[]).map(|_| ())
}

/// Adopts a root key as the active one.
pub fn insert(id: RootId, check: &[u8]) -> Result<()> {
    run(
        "INSERT INTO rekey.root_key (root_id, root_check, state) VALUES ($1, $2, 'active')",
        &[Arg::Bytea(id.as_bytes()), Arg::Bytea(check)],
    )
    .map(|_| ())
}

/// Makes a known root key active in the place of the one that is.
pub fn activate(id: RootId) -> Result<()> {
    supersede()?;
    set_state(id, "active")
}

/// Makes the active root key previous.
pub fn supersede() -> Result<()> {
    run(
        "UPDATE rekey.root_key SET state = 'previous' WHERE state = 'active'",
        &[],
    )
    .map(|_| ())
}

/// Sets the state of a root key: active, previous, compromised or retired.
pub fn set_state(id: RootId, state: &str) -> Result<()> {
    let changed = run(
        "UPDATE rekey.root_key SET state = $2, \
             retired_at = CASE WHEN $2 = 'retired' THEN clock_timestamp() END \
         WHERE root_id = $1",
        &[Arg::Bytea(id.as_bytes()), Arg::Text(state)],
    )?;
    if changed == 1 {
        Ok(())
    } else {
        Err(Error::Snapshot)
    }
}

/// Inserts the wrapped keys of many slots under one root key.
pub fn insert_wraps(root: RootId, wraps: &[(SlotId, [u8; 73])]) -> Result<()> {
    let slots: Vec<i64> = wraps.iter().map(|(slot, _)| slot.as_i64()).collect();
    let wrapped: Vec<&[u8]> = wraps.iter().map(|(_, wrapped)| &wrapped[..]).collect();
    run(
        "INSERT INTO rekey.slot_wrap (slot_id, root_id, wrapped_key) \
         SELECT w.slot_id, $2, w.wrapped_key FROM unnest($1, $3) AS w (slot_id, wrapped_key)",
        &[
            Arg::Bigints(&slots),
            Arg::Bytea(root.as_bytes()),
            Arg::Byteas(&wrapped),
        ],
    )
    .map(|_| ())
}

/// Deletes every wrapped key under a root key.
pub fn delete_wraps_under(root: RootId) -> Result<()> {
    let sql = "DELETE FROM rekey.slot_wrap WHERE root_id = $1";
    run(sql, &[Arg::Bytea(root.as_bytes())])?;
    // One that was made after this transaction's snapshot is not deleted.
    if read::slots_under(root)?.is_empty() {
        Ok(())
    } else {
        Err(Error::Snapshot)
    }
}
