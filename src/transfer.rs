//! Keys to another database and back: for logical subscribers and for other clusters.
//!
//! Called by src/api/transfer.rs. An export holds each DEK wrapped, under the root keys of the
//! exporting server or under a one-time transport key; an import unwraps it, compares it with the
//! check value, and wraps it under the root keys here. Slot ids are unique across databases, so a
//! slot that is here already is the same slot or a mistake. An import adds slots and may move the
//! place of the active one on, as a rotation does; it never closes, destroys or revives a slot that
//! is here.

use rekey_core::cipher::{Dek, RootId, RootKey};
use rekey_core::exported_key::{ExportedKey, ExportedSlot};
use rekey_core::keyring::{Privilege, SlotState};

use crate::catalog::read::{self, KeyRow, SlotRow};
use crate::catalog::write::{self, Audit, ImportedSlot};
use crate::error::{Error, Result};
use crate::ffi::{session, text};
use crate::{lifecycle, root_key};

/// A key with all its slots: with the wrapped keys of root keys that are in use here, or of the
/// transport key.
pub fn export(key: &str, transport: Option<&RootKey>) -> Result<ExportedKey> {
    let slots = lifecycle::lock(key)?;
    let row = read::key(&text::to_server(key.as_bytes())?)?
        .ok_or_else(|| Error::unknown_key(key.to_string()))?;
    let roots: Vec<RootId> = read::root_keys()?
        .into_iter()
        .filter(|root| root.state == "active" || root.state == "previous")
        .map(|root| root.id)
        .collect();
    let exported = ExportedKey {
        key_name: key.to_string(),
        seals: row.seals,
        require_context: row.require_context,
        shredded: row.shredded,
        slots: slots
            .iter()
            .map(|slot| export_slot(slot, transport, &roots))
            .collect::<Result<_>>()?,
    };
    let how = if transport.is_some() {
        "under a transport key"
    } else {
        "under the root keys"
    };
    Audit::act(
        "export_key",
        Some(key),
        &format!("slots: {}, {how}", slots.len()),
    )
    .record()?;
    Ok(exported)
}

fn export_slot(
    slot: &SlotRow,
    transport: Option<&RootKey>,
    roots: &[RootId],
) -> Result<ExportedSlot> {
    let check_value = slot
        .check_value
        .as_slice()
        .try_into()
        .map_err(|_| Error::Internal("check value of wrong length in catalog".to_string()))?;
    let wraps = match (slot.state, transport) {
        (SlotState::Destroyed, _) => Vec::new(),
        (_, Some(transport)) => {
            let dek = lifecycle::unwrap(slot)?;
            vec![(
                transport.id(),
                transport.wrap(&dek, slot.id, &slot.key_name)?,
            )]
        }
        (_, None) => usable_wraps(slot, roots)?,
    };
    Ok(ExportedSlot {
        id: slot.id,
        version: slot.version,
        state: slot.state,
        check_value,
        compromised: slot.compromised,
        wraps,
    })
}

/// The wrapped keys under root keys that are neither compromised nor retired.
fn usable_wraps(slot: &SlotRow, roots: &[RootId]) -> Result<Vec<(RootId, [u8; 73])>> {
    let wraps: Vec<(RootId, [u8; 73])> = read::wraps(slot.id)?
        .into_iter()
        .filter(|(root, _)| roots.contains(root))
        .filter_map(|(root, wrapped)| Some((root, wrapped.try_into().ok()?)))
        .collect();
    if wraps.is_empty() {
        return Err(Error::State(
            format!("slot {} has no wrapped key that could be exported", slot.id),
            "It is wrapped under no root key that is active or previous.".to_string(),
            "SELECT rekey.rotate_root_key() first, or pass a transport_key.".to_string(),
        ));
    }
    Ok(wraps)
}

/// Takes a key in under `name`. Returns how many slots are new here.
pub fn import(exported: &ExportedKey, transport: Option<&RootKey>, name: &str) -> Result<i32> {
    let existing = claim_name(exported, name)?;
    let here = read::slots_of(&text::to_server(name.as_bytes())?)?;
    let active_here = here.iter().find(|slot| slot.state == SlotState::Active);
    // Where this key has rotated by itself its own active slot stays.
    let follows = active_here.is_none_or(|active| exported.slots.iter().any(|s| s.id == active.id));
    let pending_here = here.iter().any(|slot| slot.state == SlotState::Pending);
    let mut added = 0;
    let mut moves_to = None;
    for slot in &exported.slots {
        if is_known(slot, name)? {
            wrap_known(exported, slot, transport, name)?;
            if slot.state == SlotState::Active && follows {
                moves_to = Some(slot.id);
            }
            continue;
        }
        let state = match slot.state {
            // Its proof was about the tables there.
            SlotState::Drained => SlotState::Previous,
            SlotState::Active if !follows => SlotState::Previous,
            // The place becomes free below.
            SlotState::Active if active_here.is_some() => {
                moves_to = Some(slot.id);
                SlotState::Previous
            }
            SlotState::Pending if pending_here => SlotState::Previous,
            state => state,
        };
        insert(exported, slot, transport, name, state)?;
        added += 1;
    }
    if let Some(next) = moves_to
        && active_here.is_none_or(|active| active.id != next)
    {
        lifecycle::move_active(name, next, "import_key")?;
    }
    if exported.shredded && existing.is_none() {
        write::mark_shredded(name)?;
    }
    Audit::act(
        "import_key",
        Some(name),
        &format!("slots: {added}, from key {}", exported.key_name),
    )
    .record()?;
    Ok(added)
}

/// Locks the key of that name, or creates it for the current user.
fn claim_name(exported: &ExportedKey, name: &str) -> Result<Option<KeyRow>> {
    let server_name = text::to_server(name.as_bytes())?;
    if write::import_key_row(name, exported.seals, exported.require_context)? {
        write::insert_grant(name, session::current_user(), Privilege::Owner)?;
        return Ok(None);
    }
    write::lock_key(name)?;
    let row = read::key(&server_name)?.ok_or_else(|| Error::unknown_key(name.to_string()))?;
    if row.seals != exported.seals {
        return Err(Error::State(
            format!("key \"{name}\" has another purpose here"),
            "One of the two seals values, the other makes fingerprints.".to_string(),
            "Pass key_name to import it under another name.".to_string(),
        ));
    }
    if row.shredded {
        return Err(Error::State(
            format!("key \"{name}\" was shredded"),
            "An import would bring slots back that were destroyed on purpose.".to_string(),
            "SELECT rekey.drop_key(key_name) frees the name; pass key_name for another one."
                .to_string(),
        ));
    }
    Ok(Some(row))
}

/// Whether the slot is here. It must then be the same: check value and key.
fn is_known(slot: &ExportedSlot, name: &str) -> Result<bool> {
    let Some(row) = read::slot(slot.id)? else {
        return Ok(false);
    };
    if row.check_value != slot.check_value {
        return Err(Error::State(
            format!("slot {} is here with another key", slot.id),
            "Its check value differs: the two were not made by one database.".to_string(),
            "Nothing was imported. One of the catalogs was altered; restore it from a dump."
                .to_string(),
        ));
    }
    if row.key_name != name {
        return Err(Error::State(
            format!("slot {} belongs to key \"{}\" here", slot.id, row.key_name),
            format!("It would be imported for key \"{name}\"."),
            "Import it under the name that it has here: pass key_name.".to_string(),
        ));
    }
    Ok(true)
}

/// A slot that has come by logical replication is wrapped under the publisher's root keys alone: it
/// is wrapped under those here as well.
fn wrap_known(
    exported: &ExportedKey,
    slot: &ExportedSlot,
    transport: Option<&RootKey>,
    name: &str,
) -> Result<()> {
    let destroyed = |state| state == SlotState::Destroyed;
    if destroyed(slot.state) || read::slot(slot.id)?.is_none_or(|row| destroyed(row.state)) {
        return Ok(());
    }
    let wraps = read::wraps(slot.id)?;
    let is_wrapped = |id| wraps.iter().any(|(root, _)| *root == id);
    let roots = read::root_keys()?;
    if roots
        .iter()
        .any(|r| r.state == "active" && is_wrapped(r.id))
    {
        return Ok(());
    }
    let dek = unwrap(exported, slot, transport)?;
    for (root, wrapped) in lifecycle::wrap(&dek, slot.id, name)? {
        if !is_wrapped(root) {
            write::insert_wrap(slot.id, root, &wrapped)?;
        }
    }
    Ok(())
}

fn insert(
    exported: &ExportedKey,
    slot: &ExportedSlot,
    transport: Option<&RootKey>,
    name: &str,
    state: SlotState,
) -> Result<()> {
    let wraps = if state == SlotState::Destroyed {
        Vec::new()
    } else {
        let dek = unwrap(exported, slot, transport)?;
        lifecycle::wrap(&dek, slot.id, name)?
    };
    let imported = ImportedSlot {
        id: slot.id,
        state,
        check_value: &slot.check_value,
        compromised: slot.compromised,
        wraps,
    };
    write::insert_imported_slot(&imported, name)?;
    Audit {
        action: "import_key",
        key: Some(name),
        slot: Some(slot.id),
        from: None,
        to: Some(state),
        detail: "",
    }
    .record()
}

/// Unwraps the DEK with the transport key, or with a root key that both servers hold.
fn unwrap(exported: &ExportedKey, slot: &ExportedSlot, transport: Option<&RootKey>) -> Result<Dek> {
    let wrong = || {
        Error::Argument(
            format!("slot {} does not unwrap", slot.id),
            "The wrapped key does not give the key that its check value proves.".to_string(),
            "The document was altered on its way; export the key again.".to_string(),
        )
    };
    let wrapped_under = |id| slot.wraps.iter().find(|(root, _)| *root == id);
    let open = |key: &RootKey, id: RootId| {
        let (_, wrapped) = wrapped_under(id)?;
        key.unwrap(wrapped, slot.id, &exported.key_name)
            .ok()
            .filter(|dek| dek.matches_check_value(slot.id, &slot.check_value))
    };
    if let Some(transport) = transport {
        if wrapped_under(transport.id()).is_none() {
            return Err(Error::Argument(
                "this is not the transport key of the export".to_string(),
                format!(
                    "Slot {} is wrapped under another one, or under root keys.",
                    slot.id
                ),
                "Pass the transport_key that export_key was given; none if it was given none."
                    .to_string(),
            ));
        }
        return open(transport, transport.id()).ok_or_else(wrong);
    }
    let roots: Vec<RootId> = slot.wraps.iter().map(|(root, _)| *root).collect();
    root_key::with_any(&roots, |id, key| open(key, id))?.ok_or_else(wrong)
}
