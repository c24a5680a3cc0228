//! The life of root keys in this database: rotation, retirement, compromise.
//!
//! Called by src/api/root_keys.rs. Blue-green: a new root key wraps every slot *in addition*, so
//! that a server without it goes on by the old wrapped keys; those go when the old root key is
//! retired, once every server holds the new one. No row of a user's table is touched.
//!
//! Order against crashes: the keyring file is durable before anything is wrapped under its new key,
//! and the catalog changes in one transaction. A crash in between leaves a root key in the file
//! that wraps nothing; the next rotation takes it up (`root_key::next`).

use rekey_core::cipher::RootId;
use rekey_core::envelope::SlotId;
use rekey_core::keyring::SlotState;

use crate::catalog::read::{self, RootRow, SlotRow};
use crate::catalog::roots::{self, Roots};
use crate::catalog::write::Audit;
use crate::error::{Error, Result};
use crate::root_key::{self, Next};
use crate::{failpoint, lifecycle};

/// Wrapped keys that one INSERT carries: large enough that its cost does not show, small enough
/// (some 400 kB) that it needs no thought.
const BATCH: usize = 4096;

/// Which root key a rotation makes active.
pub enum Wanted {
    /// The next one of the keyring file, or a fresh one: see [`root_key::next`].
    Next,
    /// A fresh one.
    New,
    /// One that the keyring serves.
    Named(RootId),
}

/// Makes another root key active, wraps every slot under it, and returns it.
pub fn rotate(wanted: &Wanted) -> Result<Next> {
    roots::lock(Roots::Change)?;
    let all = read::root_keys()?;
    let active = all
        .iter()
        .find(|root| root.state == "active")
        .ok_or_else(|| {
            Error::State(
                "this database has no active root key".to_string(),
                "A rotation puts another one in its place.".to_string(),
                "SELECT rekey.init_root_key() adopts the first one.".to_string(),
            )
        })?;
    let known: Vec<RootId> = all.iter().map(|root| root.id).collect();
    let next = match wanted {
        Wanted::Named(id) => Next {
            id: *id,
            there_since: None,
        },
        Wanted::Next => root_key::next(active.id, &known, false)?,
        Wanted::New => root_key::next(active.id, &known, true)?,
    };
    let id = next.id;
    failpoint::reach("root.added")?;
    let known = all.iter().find(|root| root.id == id);
    match known.map(|root| root.state.as_str()) {
        None | Some("previous") => {}
        Some(state) => {
            return Err(Error::State(
                format!("root key {id} is {state}"),
                "Only a new root key, or a previous one, becomes active.".to_string(),
                "SELECT * FROM rekey.root_keys shows their states; without a root_id a new one is \
                 added to the keyring file."
                    .to_string(),
            ));
        }
    }
    let check = root_key::with_any(&[id], |_, key| key.check())?;
    if let Some(known) = known {
        roots::activate(known.id)?;
    } else {
        roots::supersede()?;
        roots::insert(id, &check)?;
    }
    let row = RootRow {
        id,
        check: known.map_or_else(|| check.to_vec(), |root| root.check.clone()),
        state: "active".to_string(),
        created_at: 0,
        retired_at: None,
    };
    failpoint::reach("root.activated")?;
    let count = wrap_all(&row)?;
    failpoint::reach("root.wrapped")?;
    Audit::act(
        "rotate_root_key",
        None,
        &format!("{id} in the place of {}, slots: {count}", active.id),
    )
    .record()?;
    Ok(next)
}

/// Wraps every slot that is not destroyed under a root key, where it is not yet.
fn wrap_all(root: &RootRow) -> Result<usize> {
    let mut batch: Vec<(SlotId, [u8; 73])> = Vec::with_capacity(BATCH);
    let mut count = 0;
    for slot in living(read::all_slots()?) {
        pgrx::check_for_interrupts!();
        let (under, others): (Vec<_>, Vec<_>) = read::wraps(slot.id)?
            .into_iter()
            .partition(|(id, _)| *id == root.id);
        if !under.is_empty() {
            // It was active before. What it wrapped then must still be right.
            lifecycle::unwrap_one_of(&slot, &under)?;
            continue;
        }
        let dek = lifecycle::unwrap_one_of(&slot, &others)?;
        let wrapped = lifecycle::wrap_under(root, &dek, slot.id, &slot.key_name)?;
        batch.push((slot.id, wrapped));
        count += 1;
        if batch.len() == BATCH {
            roots::insert_wraps(root.id, &batch)?;
            batch.clear();
        }
    }
    if !batch.is_empty() {
        roots::insert_wraps(root.id, &batch)?;
    }
    Ok(count)
}

/// Deletes what a root key wraps here. Every slot must open under another root key of this server,
/// which is tried, with the keyring file as it is now: the next start reads no other.
pub fn retire(id: RootId) -> Result<()> {
    roots::lock(Roots::Change)?;
    let root = known(id)?;
    match root.state.as_str() {
        "active" => return Err(still_active(id, "be retired")),
        "retired" => return Err(repeated(id, "retired")),
        _ => {}
    }
    let in_file = root_key::in_file().map_err(|error| match error {
        Error::RootKey(detail, hint) => Error::State(
            format!("root key {id} cannot be retired while the keyring cannot be read"),
            detail,
            hint,
        ),
        other => other,
    })?;
    let lasts = |other: &RootId| in_file.as_ref().is_none_or(|ids| ids.contains(other));
    let under = read::slots_under(id)?;
    for slot in living(read::all_slots()?).filter(|slot| under.contains(&slot.id)) {
        pgrx::check_for_interrupts!();
        let mut others = read::wraps(slot.id)?;
        others.retain(|(other, _)| *other != id);
        if !others.is_empty() && !others.iter().any(|(other, _)| lasts(other)) {
            let ids: Vec<String> = others.iter().map(|(other, _)| other.to_string()).collect();
            let cause = format!(
                "The keyring file does not hold root key {}.",
                ids.join(", ")
            );
            return Err(left_without(&slot, &cause));
        }
        others.retain(|(other, _)| lasts(other));
        lifecycle::unwrap_one_of(&slot, &others).map_err(|error| match error {
            Error::RootKey(detail, _) => left_without(&slot, &detail),
            other => other,
        })?;
    }
    roots::delete_wraps_under(id)?;
    failpoint::reach("root.unwrapped")?;
    roots::set_state(id, "retired")?;
    failpoint::reach("root.retired")?;
    Audit::act(
        "retire_root_key",
        None,
        &format!("{id}, slots: {}", under.len()),
    )
    .record()
}

/// Marks a root key, and every slot that it ever wrapped here, as compromised; the active ones
/// among them rotate at once. Its wrapped keys stay until it is retired. Returns the number of
/// slots.
pub fn mark_compromised(id: RootId, reason: &str) -> Result<i32> {
    roots::lock(Roots::ChangeWithKeys)?;
    let root = known(id)?;
    match root.state.as_str() {
        "active" => return Err(still_active(id, "be marked as compromised")),
        "compromised" => return Err(repeated(id, "marked as compromised")),
        // A retired one stays retired: its wrapped keys here are gone, in backups they are not.
        "retired" => {}
        _ => roots::set_state(id, "compromised")?,
    }
    failpoint::reach("root.compromised")?;
    let under = read::slots_under(id)?;
    let mut slots = read::all_slots()?;
    // Pending ones are destroyed, and before anything rotates: a rotation would promote them.
    slots.sort_by_key(|slot| slot.state != SlotState::Pending);
    let mut count = 0;
    for slot in slots {
        pgrx::check_for_interrupts!();
        if !slot.compromised && (under.contains(&slot.id) || was_wrapped(&slot, &root)) {
            lifecycle::mark_compromised(&slot, reason)?;
            count += 1;
        }
    }
    failpoint::reach("root.marked")?;
    Audit::act(
        "mark_compromised_root",
        None,
        &format!("{id}, slots: {count}, reason: {reason}"),
    )
    .record()?;
    Ok(count)
}

/// Whether a slot may have had a wrapped key under the root key that is not there any more: every
/// slot was wrapped under every root key of its time, and lost what it had when it was destroyed or
/// the root key was retired.
fn was_wrapped(slot: &SlotRow, root: &RootRow) -> bool {
    let begun = root
        .retired_at
        .is_none_or(|retired| slot.created_at <= retired);
    let destroyed = (slot.state == SlotState::Destroyed)
        .then_some(slot.closed_at)
        .flatten();
    let lived = destroyed.is_none_or(|at| at >= root.created_at);
    let gone = root.retired_at.is_some() || destroyed.is_some();
    gone && begun && lived
}

fn living(slots: Vec<SlotRow>) -> impl Iterator<Item = SlotRow> {
    slots
        .into_iter()
        .filter(|slot| slot.state != SlotState::Destroyed)
}

fn known(id: RootId) -> Result<RootRow> {
    read::root_keys()?
        .into_iter()
        .find(|root| root.id == id)
        .ok_or_else(|| Error::UnknownRootKey(id.to_string()))
}

fn still_active(id: RootId, what: &str) -> Error {
    Error::State(
        format!("root key {id} is active and cannot {what}"),
        "New slots are wrapped under it.".to_string(),
        "SELECT rekey.rotate_root_key() first: it makes another root key active.".to_string(),
    )
}

fn left_without(slot: &SlotRow, cause: &str) -> Error {
    Error::State(
        format!(
            "slot {} would be left without a root key that this server holds",
            slot.id
        ),
        format!(
            "It is version {} of key \"{}\". {cause}",
            slot.version, slot.key_name
        ),
        "Put the keyring in place that holds the other root keys, or rotate_root_key again; then \
         retire this one."
            .to_string(),
    )
}

fn repeated(id: RootId, state: &str) -> Error {
    Error::State(
        format!("root key {id} is already {state}"),
        "Nothing was changed.".to_string(),
        "SELECT * FROM rekey.root_keys shows the states.".to_string(),
    )
}
