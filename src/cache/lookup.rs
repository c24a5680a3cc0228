//! Fingerprints: keyed digests of values under the slots of a lookup key, for equality search.
//!
//! Called once per value by src/api/fingerprint.rs, and by src/worker/refresh.rs. Kept per key, not
//! per slot: a lookup needs all slots of a key whose fingerprints may be stored, one look finds
//! them. Invariant: whoever sees a committed row sees the slot of its fingerprint. Three rules keep
//! it, and each closes a gap of the others:
//!
//! 1. A reader accepts invalidations for each lookup: its query's snapshot may be younger than
//!    what the session has heard, since nothing but a new lock makes it listen.
//! 2. A commit is visible before its invalidations are sent. So nobody stores under a new slot
//!    before the rotation that made it active has sent them: who reads the slot waits for that.
//! 3. The rotating transaction itself cannot wait for its own end: until then it stores under the
//!    slot that was active before it, which every session knows. (Unless that one is compromised.
//!    Then, for the moment between its commit and its invalidations, a warm session misses rows
//!    that this very transaction has stored.)
//!
//! A drained slot is still looked for: transactions older than its proof may see its fingerprints.

use std::rc::Rc;

use pgrx::pg_sys::Oid;
use rekey_core::cipher::{Fingerprint, FingerprintKey, fingerprint_slot, fingerprints_equal};
use rekey_core::envelope::SlotId;
use rekey_core::keyring::{Privilege, SlotState};

use super::{Cache, Verdicts, enter_barrier, holds_barrier, lacks, no_cipher, with_cache};
use crate::catalog::read::{self, SlotRow};
use crate::error::{Error, Result};
use crate::ffi::{hooks, locks, session, text};
use crate::lifecycle;

/// What the session knows of a lookup key.
pub(super) struct LookupKey {
    generation: u64,
    may_encrypt: Verdicts,
    require_context: bool,
    /// The active slot first, then those before it, the latest first. Never empty.
    live: Vec<LiveSlot>,
    /// Which of them stores.
    stores: usize,
}

/// A slot whose fingerprints may be stored somewhere.
struct LiveSlot {
    id: SlotId,
    key: FingerprintKey,
}

impl LiveSlot {
    fn fingerprint(&self, context: &[u8], value: &[u8]) -> Fingerprint {
        self.key.fingerprint(self.id, context, value)
    }
}

impl LookupKey {
    fn slot(&self, id: SlotId) -> Option<&LiveSlot> {
        self.live.iter().find(|slot| slot.id == id)
    }

    fn storing(&self) -> &LiveSlot {
        self.live.get(self.stores).unwrap_or(&self.live[0])
    }
}

/// Who asks, and how.
#[derive(Clone, Copy)]
enum Asks {
    /// A user, for a new fingerprint: privilege and policy count.
    For(Oid, bool),
    /// A user who has one already: the privilege counts.
    About(Oid),
    /// The extension itself.
    Itself,
}

/// The fingerprint of a value under the active slot of the key `name` (server encoding), to be
/// stored. Context and value in UTF-8.
///
/// Errors in this order: 42704, 42501, 55000, 22023, F0000.
pub fn fingerprint(name: &[u8], context: &[u8], value: &[u8]) -> Result<Fingerprint> {
    let asks = Asks::For(session::current_user(), !context.is_empty());
    if !holds_barrier() {
        // Asked before the lock too: who may not store must not be able to hold up a rotation.
        with_key(name, asks, |_| ())?;
        enter_barrier()?;
    }
    with_key(name, asks, |key| key.storing().fingerprint(context, value))
}

/// The fingerprints of a value under every live slot, the active one first: what is stored of it
/// is among them. Errors as above.
pub fn fingerprints(name: &[u8], context: &[u8], value: &[u8]) -> Result<Vec<Fingerprint>> {
    session::accept_invalidations();
    let asks = Asks::For(session::current_user(), !context.is_empty());
    with_key(name, asks, |key| {
        let made = key.live.iter().map(|slot| slot.fingerprint(context, value));
        made.collect()
    })
}

/// Whether a fingerprint is that of the value, by the slot that it names.
///
/// Errors in this order: 22P03, 42704, 42501, 55000, 22023, F0000.
pub fn verify(fingerprint: &[u8], context: &[u8], value: &[u8]) -> Result<bool> {
    session::accept_invalidations();
    let id = fingerprint_slot(fingerprint).ok_or(Error::Fingerprint)?;
    let name = key_name(id)?;
    let verdict = with_key(&name, Asks::About(session::current_user()), |key| {
        key.slot(id)
            .map(|slot| fingerprints_equal(&slot.fingerprint(context, value), fingerprint))
    })?;
    match verdict {
        Some(verdict) => Ok(verdict),
        // A pending slot has made none: this one is forged.
        None => read::slot(id)?
            .ok_or(Error::UnknownSlot(id.as_i64()))?
            .refuse_closed()
            .map(|()| false),
    }
}

/// Makes a stored fingerprint again under the active slot of its key, which must be `name`; None
/// when it is that slot's already. The stored one must be that of the value: a fingerprint is
/// renewed, never replaced by that of another value.
///
/// No privilege is asked: for the worker alone, which holds the barrier. Errors: 22P03, 42704,
/// 55000, 22023, F0000, 39000.
pub fn renew(
    stored: &[u8],
    name: &[u8],
    context: &[u8],
    value: &[u8],
) -> Result<Option<Fingerprint>> {
    let id = fingerprint_slot(stored).ok_or(Error::Fingerprint)?;
    if *key_name(id)? != *name {
        let name = text::to_utf8_string(name)?;
        return Err(Error::OtherKey(id, name));
    }
    let renewed = with_key(name, Asks::Itself, |key| {
        let old = key.slot(id)?;
        if !fingerprints_equal(&old.fingerprint(context, value), stored) {
            return Some(Err(Error::Authentication(id)));
        }
        let storing = key.storing();
        let fresh = (storing.id != id).then(|| storing.fingerprint(context, value));
        Some(Ok(fresh))
    })?;
    match renewed {
        Some(renewed) => renewed,
        None => {
            let slot = read::slot(id)?.ok_or(Error::UnknownSlot(id.as_i64()))?;
            slot.refuse_closed()?;
            Err(Error::Authentication(id))
        }
    }
}

/// The name of a slot's key, which never changes, in the server's encoding.
pub(super) fn key_name(id: SlotId) -> Result<Rc<[u8]>> {
    if let Some(name) = with_cache(|cache| Ok(cache.names.get(&id).cloned()))? {
        return Ok(name);
    }
    let slot = read::slot(id)?.ok_or(Error::UnknownSlot(id.as_i64()))?;
    let name: Rc<[u8]> = text::to_server(slot.key_name.as_bytes())?.into();
    with_cache(|cache| {
        cache.names.put(id, name.clone());
        Ok(name)
    })
}

/// Runs `make` with the key, read anew if need be. `make` must not call PostgreSQL.
fn with_key<R>(name: &[u8], asks: Asks, make: impl FnOnce(&LookupKey) -> R) -> Result<R> {
    let mut make = Some(make);
    let mut attempt = |cache: &mut Cache, generation: u64| {
        let known = match cache.lookups.peek_mru() {
            Some((latest, known)) if **latest == *name => Some(known),
            _ => cache.lookups.get(name),
        };
        let usable = known.filter(|key| {
            key.generation == generation
                && match asks {
                    Asks::For(user, bound) => {
                        key.may_encrypt.allow(user) && (bound || !key.require_context)
                    }
                    Asks::About(user) => key.may_encrypt.allow(user),
                    Asks::Itself => true,
                }
        });
        Ok(usable.and_then(|key| Some(make.take()?(key))))
    };
    if let Some(made) = with_cache(|cache| attempt(cache, hooks::generation()))? {
        return Ok(made);
    }
    // What was read counts for this value, even if it has changed again meanwhile.
    let generation = prepare(name, asks)?;
    with_cache(|cache| attempt(cache, generation))?.ok_or_else(no_cipher)
}

/// Reads a key, its live slots and the user's privilege, and finds the error, if any. Returns the
/// generation of what was read.
#[cold]
fn prepare(name: &[u8], asks: Asks) -> Result<u64> {
    let generation = hooks::generation();
    let Some(key) = read::key(name)? else {
        return Err(Error::unknown_key(text::to_utf8_string(name)?));
    };
    let user = match asks {
        Asks::For(user, _) | Asks::About(user) => Some(user),
        Asks::Itself => None,
    };
    if let Some(user) = user
        && !read::privileges(name, user)?.implies(Privilege::Encrypt)
    {
        return Err(lacks(user, &key.name, Privilege::Encrypt));
    }
    let rows = live_slots(name)?;
    let Some(active) = rows.first() else {
        return Err(Error::NoActiveSlot(key.name));
    };
    if key.seals {
        return Err(Error::Purpose(key.name, "lookup"));
    }
    if let Asks::For(_, bound) = asks
        && key.require_context
        && !bound
    {
        return Err(Error::ContextRequired(key.name));
    }
    locks::wait_for_end(active.written_by);
    // Keys survive: one id names one DEK for ever. Those of slots that are live no more go.
    let (may_encrypt, mut known) = with_cache(|cache| {
        Ok(match cache.lookups.pop(name) {
            Some(known) if known.generation == generation => (Some(known.may_encrypt), known.live),
            Some(known) => (None, known.live),
            None => (None, Vec::new()),
        })
    })?;
    let mut live = Vec::with_capacity(rows.len());
    for row in &rows {
        let at = known.iter().position(|slot| slot.id == row.id);
        live.push(match at {
            Some(at) => known.swap_remove(at),
            None => LiveSlot {
                id: row.id,
                key: lifecycle::unwrap(row)?.fingerprint_key(),
            },
        });
    }
    let mut may_encrypt = may_encrypt.unwrap_or(Verdicts::of(Oid::INVALID, false));
    if let Some(user) = user {
        may_encrypt.learn(user, true);
    }
    let fresh = LookupKey {
        generation,
        may_encrypt,
        require_context: key.require_context,
        live,
        stores: storing_slot(&rows),
    };
    with_cache(|cache| {
        cache.lookups.put(name.into(), fresh);
        Ok(generation)
    })
}

/// The slots of a key whose fingerprints may be stored, the active one first; none when the key
/// has no active slot.
fn live_slots(name: &[u8]) -> Result<Vec<SlotRow>> {
    let mut rows = read::slots_of(name)?;
    rows.retain(|row| row.state.opens() && row.state != SlotState::Pending);
    rows.sort_by_key(|row| {
        let superseded = row.state != SlotState::Active;
        (
            superseded,
            std::cmp::Reverse((row.superseded_at, row.version)),
        )
    });
    let usable = rows.first().is_some_and(|row| row.state.seals());
    if !usable {
        rows.clear();
    }
    Ok(rows)
}

/// The place of the slot that stores: the active one, unless this transaction has made it so.
fn storing_slot(rows: &[SlotRow]) -> usize {
    let active = rows.first();
    if active.is_none_or(|row| !row.made_here) {
        return 0;
    }
    // No other will do: an older one may be drained, and gone before this transaction commits.
    let before = active.and_then(|row| lifecycle::active_before(&row.key_name));
    let known_to_all = |row: &SlotRow| !row.compromised && Some(row.id) == before;
    rows.iter().position(known_to_all).unwrap_or(0)
}
