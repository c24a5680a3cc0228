//! The life of keys and slots: creation, rotation, rollback, disabling, destruction.
//!
//! Called by src/api/. Each act locks the key's row first, so that acts on one key come one after
//! the other, then reads the slots under a snapshot taken after the lock. A new slot is wrapped
//! and unwrapped again before anything is written: a missing or wrong root key is found first.

use std::cell::RefCell;
use std::collections::HashMap;

use pgrx::pg_sys;
use rekey_core::cipher::{Dek, RootId};
use rekey_core::envelope::SlotId;
use rekey_core::keyring::{Privilege, SlotState};

use crate::catalog::read::{self, RootRow, SlotRow};
use crate::catalog::roots::{self, Roots};
use crate::catalog::work;
use crate::catalog::write::{self, Audit};
use crate::error::{Error, Result};
use crate::ffi::{session, text};
use crate::{failpoint, root_key, standbys};

/// The slots that this top-level transaction has superseded first, by key.
#[derive(Default)]
struct FirstSuperseded {
    transaction: (i32, u32),
    of_key: HashMap<String, (pg_sys::TransactionId, SlotId)>,
}

thread_local! {
    static FIRST_SUPERSEDED: RefCell<FirstSuperseded> = RefCell::default();
}

/// Notes an active slot that this transaction supersedes now. Counts until the savepoint around it
/// is rolled back: from then on somebody else may rotate the key.
fn note_superseded(active: &SlotRow) {
    let transaction = (session::process(), session::local_transaction());
    FIRST_SUPERSEDED.with_borrow_mut(|first| {
        if first.transaction != transaction {
            *first = FirstSuperseded {
                transaction,
                of_key: HashMap::new(),
            };
        }
        let known = first.of_key.get(&active.key_name);
        if known.is_none_or(|(by, _)| !session::is_own(*by)) {
            let noted = (session::xid(), active.id);
            first.of_key.insert(active.key_name.clone(), noted);
        }
    });
}

/// The slot of a key that was active before this top-level transaction superseded it. None: it has
/// superseded none.
pub fn active_before(key: &str) -> Option<SlotId> {
    let transaction = (session::process(), session::local_transaction());
    FIRST_SUPERSEDED.with_borrow(|first| {
        let (by, slot) = first.of_key.get(key)?;
        (first.transaction == transaction && session::is_own(*by)).then_some(*slot)
    })
}

/// A slot that exists in memory only: made, wrapped and unwrapped again.
struct NewSlot {
    id: SlotId,
    check_value: [u8; 32],
    wraps: Vec<(RootId, [u8; 73])>,
}

impl NewSlot {
    fn make(key: &str) -> Result<NewSlot> {
        NewSlot::make_under(&roots_in_use()?, key)
    }

    fn make_under(roots: &[RootRow], key: &str) -> Result<NewSlot> {
        let id = SlotId::random()?;
        let dek = Dek::generate()?;
        Ok(NewSlot {
            id,
            check_value: dek.check_value(id),
            wraps: wrap_under_each(roots, &dek, id, key)?,
        })
    }

    fn insert(self, key: &str, state: SlotState, action: &str, reason: &str) -> Result<SlotId> {
        NewSlot::insert_all(&[(key, &self)], state, action, reason)?;
        Ok(self.id)
    }

    fn insert_all(
        slots: &[(&str, &NewSlot)],
        state: SlotState,
        action: &str,
        reason: &str,
    ) -> Result<()> {
        let rows: Vec<write::NewSlotRow<'_>> = slots
            .iter()
            .map(|(key, slot)| write::NewSlotRow {
                id: slot.id,
                key,
                check_value: &slot.check_value,
                wraps: &slot.wraps,
            })
            .collect();
        write::insert_slots(&rows, state, reason)?;
        let acts: Vec<Audit<'_>> = slots
            .iter()
            .map(|(key, slot)| Audit {
                action,
                key: Some(key),
                slot: Some(slot.id),
                from: None,
                to: Some(state),
                detail: reason,
            })
            .collect();
        Audit::record_all(&acts)
    }
}

/// Creates a key with its first active slot; None when the name is taken.
/// (Making the slot locks the table of keys first, as `roots::lock` wants it.)
pub fn create_key(new: &write::NewKey<'_>) -> Result<Option<SlotId>> {
    let slot = NewSlot::make(new.name)?;
    if !write::insert_key(new)? {
        return Ok(None);
    }
    slot.insert(new.name, SlotState::Active, "create_key", new.comment)
        .map(Some)
}

/// Creates keys with the policy and the grants of another one, each with its first active slot, and
/// returns the names of those that are new: names that are taken already are left out.
pub fn create_keys(names: &[&str], like: &str, owner: pg_sys::Oid) -> Result<Vec<String>> {
    let roots = roots_in_use()?;
    let created = write::insert_keys_like(names, like, owner)?;
    let slots = created
        .iter()
        .map(|name| NewSlot::make_under(&roots, name))
        .collect::<Result<Vec<_>>>()?;
    let named: Vec<(&str, &NewSlot)> = created.iter().map(String::as_str).zip(&slots).collect();
    NewSlot::insert_all(&named, SlotState::Active, "create_keys", "")?;
    Ok(created)
}

/// Wraps a DEK under every root key that is in use and held here; the active one must be held.
pub fn wrap(dek: &Dek, id: SlotId, key: &str) -> Result<Vec<(RootId, [u8; 73])>> {
    wrap_under_each(&roots_in_use()?, dek, id, key)
}

/// The root keys that new slots are wrapped under, the active one first. From here on no root key
/// comes or goes until the transaction ends: a slot that is made while the root key is rotated
/// waits, and is then wrapped under the new one too.
fn roots_in_use() -> Result<Vec<RootRow>> {
    roots::lock(Roots::Use)?;
    let mut roots = read::root_keys()?;
    // The active one first: it may be what makes this session read the keyring again.
    roots.sort_by_key(|root| root.state != "active");
    if !roots.iter().any(|root| root.state == "active") {
        return Err(Error::RootKey(
            "This database has not adopted a root key yet.".to_string(),
            "As a superuser run SELECT rekey.init_root_key().".to_string(),
        ));
    }
    roots.retain(|root| root.state == "active" || root.state == "previous");
    Ok(roots)
}

fn wrap_under_each(
    roots: &[RootRow],
    dek: &Dek,
    id: SlotId,
    key: &str,
) -> Result<Vec<(RootId, [u8; 73])>> {
    let mut wraps = Vec::new();
    for root in roots {
        if root.state != "active" && !root_key::holds(root.id) {
            continue;
        }
        wraps.push((root.id, wrap_under(root, dek, id, key)?));
    }
    Ok(wraps)
}

/// Wraps a DEK under one root key, and unwraps it again.
pub fn wrap_under(root: &RootRow, dek: &Dek, id: SlotId, key: &str) -> Result<[u8; 73]> {
    root_key::with_any(&[root.id], |_, held| {
        if held.check()[..] != root.check[..] {
            return Err(wrong_root_key(root.id));
        }
        let wrapped = held.wrap(dek, id, key)?;
        match held.unwrap(&wrapped, id, key) {
            Ok(again) if again.matches_check_value(id, &dek.check_value(id)) => Ok(wrapped),
            _ => Err(Error::Internal(
                "a key did not survive its wrapping".to_string(),
            )),
        }
    })?
}

/// Unwraps the DEK of a slot with a root key that this server holds, and checks it.
pub fn unwrap(slot: &SlotRow) -> Result<Dek> {
    unwrap_one_of(slot, &read::wraps(slot.id)?)
}

/// Unwraps the DEK of a slot out of one of these wrapped keys, and checks it.
pub fn unwrap_one_of(slot: &SlotRow, wraps: &[(RootId, Vec<u8>)]) -> Result<Dek> {
    if wraps.is_empty() {
        return Err(Error::RootKey(
            format!("Slot {} has no wrapped key in the catalog.", slot.id),
            "Was rekey.slot_wrap left out of a restore? Restore the whole dump.".to_string(),
        ));
    }
    let roots: Vec<RootId> = wraps.iter().map(|(root, _)| *root).collect();
    root_key::with_any(&roots, |root, held| {
        let wrapped = wraps
            .iter()
            .find(|(id, _)| *id == root)
            .map_or(&[][..], |(_, w)| w);
        match held.unwrap(wrapped, slot.id, &slot.key_name) {
            Ok(dek) if dek.matches_check_value(slot.id, &slot.check_value) => Ok(dek),
            _ => Err(Error::RootKey(
                format!(
                    "Root key {root} does not unwrap the key of slot {}.",
                    slot.id
                ),
                "The catalog row was altered or belongs to another key; restore it from a dump."
                    .to_string(),
            )),
        }
    })?
}

/// Whether this server holds the active root key of the database, and the right one; F0000 or 58000
/// says why not. None: the database has not adopted one.
pub fn try_active_root_key() -> Result<Option<RootId>> {
    let roots = read::root_keys()?;
    let Some(active) = roots.iter().find(|root| root.state == "active") else {
        return Ok(None);
    };
    let check = root_key::with_any(&[active.id], |_, key| key.check())?;
    if check[..] == active.check[..] {
        Ok(Some(active.id))
    } else {
        Err(wrong_root_key(active.id))
    }
}

fn wrong_root_key(id: RootId) -> Error {
    Error::RootKey(
        format!("Root key {id} does not match its check value in the catalog."),
        "Put the right keyring file in place and reload the configuration.".to_string(),
    )
}

/// Brings a destroyed slot back as previous, with a wrapped key of an older backup.
pub fn restore(slot: &SlotRow, wrapped: &[u8], root: RootId, reason: &str) -> Result<()> {
    let dek = root_key::with_any(&[root], |_, held| {
        held.unwrap(wrapped, slot.id, &slot.key_name).ok()
    })?
    .filter(|dek| dek.matches_check_value(slot.id, &slot.check_value))
    .ok_or_else(|| {
        Error::Argument(
            format!("the wrapped key is not that of slot {}", slot.id),
            format!(
                "Root key {root} does not unwrap it for version {} of key \"{}\" to the key that \
                 the tombstone's check value proves.",
                slot.version, slot.key_name
            ),
            "Pass wrapped_key and root_id of one row of rekey.slot_wrap with this slot id, from a \
             dump that was made before the slot was destroyed."
                .to_string(),
        )
    })?;
    for (root, wrapped) in wrap(&dek, slot.id, &slot.key_name)? {
        write::insert_wrap(slot.id, root, &wrapped)?;
    }
    write::transition(slot, SlotState::Previous, "restore_slot", reason)
}

/// Locks a key and returns its slots by version; 42704 when there is no such key.
pub fn lock(key: &str) -> Result<Vec<SlotRow>> {
    if !write::lock_key(key)? {
        return Err(Error::unknown_key(key.to_string()));
    }
    read::slots_of(&text::to_server(key.as_bytes())?)
}

/// The slot of that id; 42704 when there is none.
pub fn slot(id: i64) -> Result<SlotRow> {
    let unknown = || Error::UnknownSlot(id);
    read::slot(SlotId::from_i64(id).ok_or_else(unknown)?)?.ok_or_else(unknown)
}

/// A new active slot; the one before stays readable as previous. A pending slot is promoted.
pub fn rotate(key: &str, reason: &str) -> Result<SlotId> {
    let slots = lock(key)?;
    refuse_shredded(key)?;
    if let Some(pending) = in_state(&slots, SlotState::Pending) {
        return activate(&slots, pending, "rotate_key", reason);
    }
    // Made before anything is written: a missing root key leaves everything as it was.
    let fresh = NewSlot::make(key)?;
    if let Some(active) = in_state(&slots, SlotState::Active) {
        note_superseded(active);
        write::transition(active, SlotState::Previous, "rotate_key", "")?;
    }
    failpoint::reach("rotate.superseded")?;
    let id = fresh.insert(key, SlotState::Active, "rotate_key", reason)?;
    failpoint::reach("rotate.activated")?;
    Ok(id)
}

/// Rotates up to `most` keys whose active slot was activated before a timestamptz datum, the oldest
/// first: those named like `pattern` that the current user may rotate. A pattern that takes all
/// takes those that seal: a unique rule may pin a lookup key to its slot. Returns how many were
/// rotated, and how many are left.
pub fn rotate_older(
    than: pg_sys::Datum,
    most: i64,
    pattern: &str,
    reason: &str,
) -> Result<(i64, i64)> {
    let user = session::current_user();
    let (due, in_all) = work::keys_older(than, most, pattern, user)?;
    let names: Vec<&str> = due.iter().map(|(key, _)| key.as_str()).collect();
    let locked = write::lock_keys(&names)?;
    let mut superseded = Vec::new();
    let mut rotated = 0;
    for (key, active) in due.iter().filter(|(key, _)| locked.contains(key)) {
        // The lock may have been waited for: somebody else has taken the privilege back, rotated
        // the key or shredded it.
        let name = text::to_server(key.as_bytes())?;
        if !read::privileges(&name, user)?.implies(Privilege::Rotate) {
            continue;
        }
        let slots = read::slots_of(&name)?;
        let still = in_state(&slots, SlotState::Active).filter(|slot| slot.id.as_i64() == *active);
        let Some(still) = still else { continue };
        rotated += 1;
        if in_state(&slots, SlotState::Pending).is_some() {
            rotate(key, reason)?;
        } else {
            superseded.push(still.clone());
        }
    }
    let roots = roots_in_use()?;
    let fresh = superseded
        .iter()
        .map(|slot| NewSlot::make_under(&roots, &slot.key_name))
        .collect::<Result<Vec<_>>>()?;
    superseded.iter().for_each(note_superseded);
    write::supersede(&superseded, "rotate_keys")?;
    let keys = superseded.iter().map(|slot| slot.key_name.as_str());
    let named: Vec<(&str, &NewSlot)> = keys.zip(&fresh).collect();
    NewSlot::insert_all(&named, SlotState::Active, "rotate_keys", reason)?;
    let done = i64::try_from(due.len()).unwrap_or(i64::MAX);
    Ok((rotated, in_all - done))
}

/// A pending slot: the one that is there, or a new one.
pub fn prepare(key: &str) -> Result<SlotId> {
    let slots = lock(key)?;
    refuse_shredded(key)?;
    match in_state(&slots, SlotState::Pending) {
        Some(pending) => Ok(pending.id),
        None => NewSlot::make(key)?.insert(key, SlotState::Pending, "prepare_key", ""),
    }
}

/// Makes the pending slot active; with a time limit (an interval datum) once every standby has
/// replayed it.
pub fn promote(key: &str, wait: Option<pg_sys::Datum>) -> Result<SlotId> {
    let slots = lock(key)?;
    refuse_shredded(key)?;
    let pending = in_state(&slots, SlotState::Pending).ok_or_else(|| {
        Error::State(
            format!("key \"{key}\" has no pending slot"),
            "Only a slot that prepare_key has staged is promoted.".to_string(),
            "SELECT rekey.prepare_key(key_name), or rotate_key for both steps at once.".to_string(),
        )
    })?;
    if let Some(timeout) = wait {
        if pending.made_here {
            return Err(Error::State(
                format!("slot {} was prepared in this transaction", pending.id),
                "No standby can have replayed what is not committed yet.".to_string(),
                "Commit after prepare_key, then promote_key in another transaction.".to_string(),
            ));
        }
        standbys::wait_for_replay(timeout)?;
    }
    activate(&slots, pending, "promote_key", "")
}

/// Puts a slot in the place of the active one, after a proof that it can be unwrapped.
fn activate(slots: &[SlotRow], next: &SlotRow, action: &str, reason: &str) -> Result<SlotId> {
    unwrap(next)?;
    if let Some(active) = in_state(slots, SlotState::Active) {
        note_superseded(active);
        write::transition(active, SlotState::Previous, action, "")?;
    }
    write::transition(next, SlotState::Active, action, reason)?;
    Ok(next.id)
}

/// Puts a slot of a locked key in the place of the active one, if its state allows that.
pub fn move_active(key: &str, next: SlotId, action: &str) -> Result<()> {
    let slots = read::slots_of(&text::to_server(key.as_bytes())?)?;
    let next = slots.iter().find(|slot| slot.id == next);
    match next {
        Some(next) if next.state.may_become(SlotState::Active) && !next.compromised => {
            activate(&slots, next, action, "").map(|_| ())
        }
        // Closed here on purpose: it stays so.
        _ => Ok(()),
    }
}

fn in_state(slots: &[SlotRow], state: SlotState) -> Option<&SlotRow> {
    slots.iter().find(|slot| slot.state == state)
}

/// Marks a slot, whose key is locked, as compromised: it seals no more and no proof of it stands.
pub fn mark_compromised(slot: &SlotRow, reason: &str) -> Result<()> {
    let action = "mark_compromised";
    write::stamp_compromised(slot, action, reason)?;
    match slot.state {
        SlotState::Active => rotate(&slot.key_name, reason).map(|_| ()),
        SlotState::Pending => write::transition(slot, SlotState::Destroyed, action, ""),
        SlotState::Drained => write::transition(slot, SlotState::Previous, action, ""),
        SlotState::Previous | SlotState::Disabled | SlotState::Destroyed => Ok(()),
    }
}

/// The latest superseded slot becomes active again, the active one previous.
pub fn roll_back(key: &str) -> Result<SlotId> {
    let slots = lock(key)?;
    refuse_shredded(key)?;
    let target = slots
        .iter()
        .filter(|slot| matches!(slot.state, SlotState::Previous | SlotState::Drained))
        .filter(|slot| !slot.compromised)
        .max_by_key(|slot| (slot.superseded_at, slot.version))
        .ok_or_else(|| {
            Error::State(
                format!("key \"{key}\" has no slot to go back to"),
                "Only a previous or drained slot that is not compromised can become active again."
                    .to_string(),
                "rekey.slots shows the states; rotate_key goes forward.".to_string(),
            )
        })?;
    activate(&slots, target, "rollback_rotation", "")
}

/// Destroys every slot of a key and closes its name. Returns how many were destroyed.
pub fn shred(key: &str, reason: &str) -> Result<i32> {
    let slots = lock(key)?;
    refuse_shredded(key)?;
    let mut count = 0;
    for slot in slots
        .iter()
        .filter(|slot| slot.state != SlotState::Destroyed)
    {
        write::transition(slot, SlotState::Destroyed, "shred_key", reason)?;
        count += 1;
    }
    write::mark_shredded(key)?;
    Ok(count)
}

fn refuse_shredded(key: &str) -> Result<()> {
    match read::key(&text::to_server(key.as_bytes())?)? {
        Some(row) if row.shredded => Err(Error::State(
            format!("key \"{key}\" was shredded"),
            "All its slots were destroyed on purpose.".to_string(),
            "To use the name again: SELECT rekey.drop_key(key_name), then rekey.create_key."
                .to_string(),
        )),
        Some(_) => Ok(()),
        None => Err(Error::unknown_key(key.to_string())),
    }
}
