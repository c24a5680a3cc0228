//! The key cache of a session: slots, subkeys and privileges, ready for the next value.
//!
//! Called once per value by the verbs. Per backend and database, bounded by
//! rekey.key_cache_slots, least recently used out first, wiped on eviction and at exit. Filled on
//! a miss from the catalog snapshot. An invalidation only raises a generation number; an entry
//! of another generation is read again before use, so that a change of state, grant or active
//! slot is seen from the next transaction on, while the cipher stays (one id names one DEK for
//! ever) unless the slot no longer opens. An entry is stamped with the generation that was
//! current *before* its rows were read: one that changed meanwhile is stale at once.
//!
//! Sealing state belongs to (process, top-level transaction, slot) and is never used in another.

pub mod lookup;

use std::cell::{Cell, RefCell};
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use lru::LruCache;
use pgrx::pg_sys::{self, Oid};
use rekey_core::cipher::{OpenError, SealState, Subkey, XaesKey};
use rekey_core::envelope::{
    CIPHERTEXT_AT, Envelope, HEADER_LEN, Header, Kind, OVERHEAD, SALT_LEN, SlotId,
};
use rekey_core::keyring::{Privilege, Privileges, SlotState};

use crate::catalog::{self, read};
use crate::error::{self, Error, Result};
use crate::ffi::text::Varlena;
use crate::ffi::{hooks, session};
use crate::{guc, lifecycle, root_key};

/// What the session knows of a key by name (as in the server's encoding).
struct KeyEntry {
    generation: u64,
    may_encrypt: Verdicts,
    require_context: bool,
    seals: bool,
    active: Option<SlotId>,
}

/// What the session knows of a slot.
struct SlotEntry {
    generation: u64,
    may_decrypt: Verdicts,
    state: SlotState,
    cipher: Option<XaesKey>,
    sealing: Option<Sealing>,
}

/// Which of the latest users hold a privilege. Several, since SECURITY DEFINER functions and
/// their callers take turns within one query.
#[derive(Clone, Copy)]
struct Verdicts([(Oid, bool); 4]);

impl Verdicts {
    fn of(user: Oid, holds: bool) -> Verdicts {
        let mut verdicts = Verdicts([(Oid::INVALID, false); 4]);
        verdicts.0[0] = (user, holds);
        verdicts
    }

    /// Whether the user is known to hold the privilege.
    #[inline]
    fn allow(&self, user: Oid) -> bool {
        self.0.contains(&(user, true))
    }

    /// Remembers one more user in the place of the one that was learned first.
    fn learn(&mut self, user: Oid, holds: bool) {
        self.0.rotate_right(1);
        self.0[0] = (user, holds);
    }
}

struct Sealing {
    epoch: u64,
    process: i32,
    state: SealState,
}

type SubkeyName = (SlotId, [u8; SALT_LEN]);

/// Where envelopes of a slot go when they are re-encrypted.
struct Target {
    generation: u64,
    active: Option<SlotId>,
}

struct Cache {
    process: i32,
    targets: LruCache<SlotId, Target>,
    keys: LruCache<Box<[u8]>, KeyEntry>,
    slots: LruCache<SlotId, SlotEntry>,
    subkeys: Subkeys,
    lookups: LruCache<Box<[u8]>, lookup::LookupKey>,
    names: LruCache<SlotId, Rc<[u8]>>,
}

thread_local! {
    static CACHE: RefCell<Option<Cache>> = const { RefCell::new(None) };
    static WIPED_AT_EXIT_OF: Cell<i32> = const { Cell::new(0) };
}

/// Process and local transaction that hold the barrier lock. A static: it is read per value.
static BARRIER_HELD: AtomicU64 = AtomicU64::new(0);

/// Everything that sealing one value needs, with its place in the nonce sequence taken.
pub struct Sealer<'a> {
    /// The envelope's header.
    pub header: Header,
    /// First half of the nonce.
    pub salt: [u8; SALT_LEN],
    /// Second half, already advanced past.
    pub counter: [u8; 12],
    /// The key under the salt.
    pub subkey: &'a Subkey,
}

/// Seals one payload of `len` bytes under the active slot of the key `name` (server encoding).
///
/// Errors in this order: 42704, 42501, 55000, 22023, F0000. `seal` must not raise.
#[inline]
pub fn seal<R>(
    name: &[u8],
    kind: Kind,
    context_bound: bool,
    len: usize,
    seal: impl FnOnce(Sealer<'_>) -> R,
) -> Result<R> {
    if !holds_barrier() {
        // Asked before the lock too: who may not seal must not be able to hold up a rotation.
        sealing_slot(name, context_bound)?;
        enter_barrier()?;
    }
    let slot = sealing_slot(name, context_bound)?;
    let header = Header {
        slot,
        kind,
        context_bound,
    };
    with_cache(|cache| {
        let state = sealing_state(&mut cache.slots, slot, len)?;
        let counter = state.next(len);
        let sealer = Sealer {
            header,
            salt: *state.salt(),
            counter,
            subkey: state.subkey(),
        };
        Ok(seal(sealer))
    })
}

/// The sealing state of a slot in this process and transaction, fresh when it must be.
#[inline]
fn sealing_state(
    slots: &mut LruCache<SlotId, SlotEntry>,
    slot: SlotId,
    len: usize,
) -> Result<&mut SealState> {
    let entry = latest(slots, slot).ok_or_else(no_cipher)?;
    let epoch = hooks::sealing_epoch();
    let process = session::process();
    let usable = !guc::salt_per_value()
        && entry
            .sealing
            .as_ref()
            .is_some_and(|s| s.epoch == epoch && s.process == process && s.state.fits(len));
    if !usable {
        let cipher = entry.cipher.as_ref().ok_or_else(no_cipher)?;
        let state = SealState::new(cipher)?;
        entry.sealing = Some(Sealing {
            epoch,
            process,
            state,
        });
    }
    Ok(&mut entry.sealing.as_mut().ok_or_else(no_cipher)?.state)
}

/// Opens one parsed envelope with the slot that its header names.
///
/// Errors in this order: 42704, 42501, 55000, 22023, F0000, 39000. `open` must not raise; it gets
/// the key under the envelope's salt.
#[inline]
pub fn open<R>(
    envelope: &Envelope<'_>,
    context: &[u8],
    open: impl FnOnce(&Subkey) -> std::result::Result<R, OpenError>,
) -> Result<R> {
    let slot = envelope.header.slot;
    let bound = envelope.header.context_bound;
    let user = session::current_user();
    let mut open = Some(open);
    let mut attempt = |cache: &mut Cache, generation: u64| {
        let Cache { slots, subkeys, .. } = cache;
        let Some(entry) = latest(slots, slot) else {
            return Ok(None);
        };
        let usable = entry.generation == generation
            && entry.may_decrypt.allow(user)
            && entry.state.opens()
            && bound != context.is_empty();
        let (true, Some(cipher)) = (usable, &entry.cipher) else {
            return Ok(None);
        };
        let Some(open) = open.take() else {
            return Ok(None);
        };
        subkeys
            .open_with(cipher, (slot, *envelope.salt), open)
            .map(Some)
            .map_err(error::authentication(slot))
    };
    if let Some(opened) = with_cache(|cache| attempt(cache, hooks::generation()))? {
        return Ok(opened);
    }
    // What was read counts for this value, even if it has changed again meanwhile.
    let generation = prepare_open(slot, user, bound, context)?;
    with_cache(|cache| attempt(cache, generation))?.ok_or_else(no_cipher)
}

/// Re-encrypts one envelope under the active slot of its key: same kind, payload and context bytes
/// (UTF-8). None when its slot is that one already, or when its key has no active slot.
///
/// No privilege is asked and no plaintext leaves: for the worker and the on-touch trigger, never to
/// be called from SQL with bytes of the caller's choice. Holds the barrier like any seal, so that
/// the slot is active under it. Errors: 22P03, 42704, 55000, 22023, F0000, 39000.
pub fn reencrypt(envelope: &[u8], context: &[u8]) -> Result<Option<pg_sys::Datum>> {
    let envelope = Envelope::parse(envelope)?;
    let header = envelope.header;
    if !holds_barrier() {
        enter_barrier()?;
    }
    let from = header.slot;
    let generation = hooks::generation();
    let known = with_cache(|cache| {
        let Cache { targets, slots, .. } = cache;
        let target = targets.get(&from).filter(|t| t.generation == generation);
        let ready = |slot: &SlotId| slots.peek(slot).is_some_and(|s| s.cipher.is_some());
        Ok(target
            .map(|t| t.active)
            .filter(|active| active.is_none_or(|to| ready(&to) && ready(&from))))
    })?;
    let to = match known {
        Some(active) => active,
        None => prepare_reencryption(from)?,
    };
    let Some(to) = to else { return Ok(None) };
    // An envelope that is not bound stays so, whatever context its column has.
    let context = if header.context_bound { context } else { b"" };
    if header.context_bound && context.is_empty() {
        return Err(Error::ContextMissing(from));
    }
    let len = envelope.ciphertext.len();
    let mut fresh = Varlena::allocate(OVERHEAD + len)?;
    let bytes = fresh.data();
    let payload = CIPHERTEXT_AT..CIPHERTEXT_AT + len;
    bytes[payload.clone()].copy_from_slice(envelope.ciphertext);
    with_cache(|cache| {
        let Cache { slots, subkeys, .. } = cache;
        let cipher = slots.peek(&from).and_then(|entry| entry.cipher.as_ref());
        let cipher = cipher.ok_or_else(no_cipher)?;
        let buffer = &mut bytes[payload.clone()];
        subkeys
            .open_with(cipher, (from, *envelope.salt), |subkey| {
                let (counter, tag) = (envelope.counter, envelope.tag);
                subkey.open_in_place(counter, envelope.header_bytes, context, buffer, tag)
            })
            .map_err(error::authentication(from))?;
        let sealing = sealing_state(slots, to, len)?;
        let counter = sealing.next(len);
        let header = Header { slot: to, ..header }.to_bytes();
        bytes[..HEADER_LEN].copy_from_slice(&header);
        bytes[HEADER_LEN..HEADER_LEN + SALT_LEN].copy_from_slice(sealing.salt());
        bytes[HEADER_LEN + SALT_LEN..CIPHERTEXT_AT].copy_from_slice(&counter);
        let buffer = &mut bytes[payload];
        let tag = sealing
            .subkey()
            .seal_in_place(&counter, &header, context, buffer);
        bytes[CIPHERTEXT_AT + len..].copy_from_slice(&tag);
        Ok(())
    })?;
    Ok(Some(fresh.finish()))
}

/// Opens one parsed envelope of the key `name` (server encoding) for the extension itself: no
/// privilege is asked. For the worker alone, which gives the value to nobody. An envelope that is
/// not bound opens whatever context its column has. Errors: 42704, 55000, 22023, F0000, 39000.
pub fn open_unasked(envelope: &Envelope<'_>, name: &[u8], context: &[u8]) -> Result<Varlena> {
    let header = envelope.header;
    let slot = header.slot;
    if *lookup::key_name(slot)? != *name {
        let name = crate::ffi::text::to_utf8_string(name)?;
        return Err(Error::OtherKey(slot, name));
    }
    let context = match (header.context_bound, context.is_empty()) {
        (true, true) => return Err(Error::ContextMissing(slot)),
        (true, false) => context,
        (false, _) => b"",
    };
    let generation = hooks::generation();
    let ready = with_cache(|cache| {
        Ok(cache.slots.peek(&slot).is_some_and(|entry| {
            entry.generation == generation && entry.state.opens() && entry.cipher.is_some()
        }))
    })?;
    if !ready {
        let row = refresh_slot_for(slot, session::current_user(), None)?;
        row.slot.refuse_closed()?;
        ensure_cipher(&row.slot)?;
    }
    let mut value = Varlena::allocate(envelope.ciphertext.len())?;
    let payload = value.data();
    payload.copy_from_slice(envelope.ciphertext);
    with_cache(|cache| {
        let Cache { slots, subkeys, .. } = cache;
        let cipher = slots.peek(&slot).and_then(|entry| entry.cipher.as_ref());
        subkeys
            .open_with(
                cipher.ok_or_else(no_cipher)?,
                (slot, *envelope.salt),
                |subkey| {
                    let (counter, tag) = (envelope.counter, envelope.tag);
                    subkey.open_in_place(counter, envelope.header_bytes, context, payload, tag)
                },
            )
            .map_err(error::authentication(slot))
    })?;
    Ok(value)
}

/// Reads what re-encryption from a slot needs: the active slot of its key, and both ciphers.
#[cold]
fn prepare_reencryption(from: SlotId) -> Result<Option<SlotId>> {
    let generation = hooks::generation();
    let user = session::current_user();
    let source = read::slot(from)?.ok_or(Error::UnknownSlot(from.as_i64()))?;
    let name = crate::ffi::text::to_server(source.key_name.as_bytes())?;
    if let Some(key) = read::key(&name)?.filter(|key| !key.seals) {
        return Err(Error::Purpose(key.name, "seal"));
    }
    let active = read::active_slot(&name)?.filter(|active| *active != from);
    if let Some(to) = active {
        source.refuse_closed()?;
        for slot in [from, to] {
            let row = refresh_slot_for(slot, user, None)?;
            ensure_cipher(&row.slot)?;
        }
    }
    with_cache(|cache| {
        cache.targets.put(from, Target { generation, active });
        Ok(active)
    })
}

/// The slow half of an open: reads what is missing or stale and finds the error, if any. Returns
/// the generation of what was read.
#[cold]
fn prepare_open(slot: SlotId, user: Oid, bound: bool, context: &[u8]) -> Result<u64> {
    let row = refresh_slot(slot, user, Privilege::Decrypt)?;
    if !row.privileges.implies(Privilege::Decrypt) {
        return Err(lacks(user, &row.slot.key_name, Privilege::Decrypt));
    }
    row.slot.refuse_closed()?;
    match (bound, context.is_empty()) {
        (true, true) => return Err(Error::ContextMissing(slot)),
        (false, false) => {
            let names_key = read::key(context)?.is_some();
            return Err(Error::ContextUnexpected(slot, names_key));
        }
        _ => {}
    }
    ensure_cipher(&row.slot)?;
    Ok(row.generation)
}

/// The active slot of a key that the current user may seal under.
#[inline]
fn sealing_slot(name: &[u8], context_bound: bool) -> Result<SlotId> {
    let user = session::current_user();
    let generation = hooks::generation();
    let known = with_cache(|cache| {
        let Cache { keys, slots, .. } = cache;
        // The key of the last value is most often that of the next: no hash, no list.
        let entry = match keys.peek_mru() {
            Some((latest, _)) if **latest == *name => keys.peek_mru().map(|(_, entry)| entry),
            _ => keys.get(name),
        };
        let Some(entry) = entry else { return Ok(None) };
        let usable = entry.generation == generation
            && entry.may_encrypt.allow(user)
            && entry.seals
            && (context_bound || !entry.require_context);
        let Some(slot) = entry.active.filter(|_| usable) else {
            return Ok(None);
        };
        // The slot may have been evicted, or have lost its cipher.
        Ok(slots
            .peek(&slot)
            .is_some_and(|s| s.cipher.is_some())
            .then_some(slot))
    })?;
    match known {
        Some(slot) => Ok(slot),
        None => prepare_seal(name, user, context_bound),
    }
}

#[cold]
fn prepare_seal(name: &[u8], user: Oid, context_bound: bool) -> Result<SlotId> {
    let generation = hooks::generation();
    let Some(key) = read::key(name)? else {
        return Err(Error::unknown_key(crate::ffi::text::to_utf8_string(name)?));
    };
    let may_encrypt = read::privileges(name, user)?.implies(Privilege::Encrypt);
    let active = read::active_slot(name)?;
    with_cache(|cache| {
        let may_encrypt = match cache.keys.peek(name) {
            Some(known) if known.generation == generation => {
                let mut verdicts = known.may_encrypt;
                verdicts.learn(user, may_encrypt);
                verdicts
            }
            _ => Verdicts::of(user, may_encrypt),
        };
        let entry = KeyEntry {
            generation,
            may_encrypt,
            require_context: key.require_context,
            seals: key.seals,
            active,
        };
        cache.keys.put(name.into(), entry);
        Ok(())
    })?;
    if !may_encrypt {
        return Err(lacks(user, &key.name, Privilege::Encrypt));
    }
    let active = active.ok_or_else(|| Error::NoActiveSlot(key.name.clone()))?;
    if !key.seals {
        return Err(Error::Purpose(key.name, "seal"));
    }
    if key.require_context && !context_bound {
        return Err(Error::ContextRequired(key.name));
    }
    let row = refresh_slot(active, user, Privilege::Encrypt)?;
    ensure_cipher(&row.slot)?;
    Ok(active)
}

struct Refreshed {
    generation: u64,
    slot: read::SlotRow,
    privileges: Privileges,
}

/// Reads a slot and the user's privileges again, and drops what no longer may be kept.
fn refresh_slot(id: SlotId, user: Oid, wanted: Privilege) -> Result<Refreshed> {
    refresh_slot_for(id, user, Some(wanted))
}

/// The same, for the extension itself when no privilege is wanted: the user gains none.
fn refresh_slot_for(id: SlotId, user: Oid, wanted: Option<Privilege>) -> Result<Refreshed> {
    let generation = hooks::generation();
    let slot = read::slot(id)?.ok_or(Error::UnknownSlot(id.as_i64()))?;
    let name = crate::ffi::text::to_server(slot.key_name.as_bytes())?;
    let privileges = read::privileges(&name, user)?;
    with_cache(|cache| {
        let may_decrypt = privileges.implies(Privilege::Decrypt);
        match cache.slots.get_mut(&id) {
            Some(entry) => {
                if entry.generation == generation {
                    entry.may_decrypt.learn(user, may_decrypt);
                } else {
                    entry.may_decrypt = Verdicts::of(user, may_decrypt);
                }
                entry.generation = generation;
                entry.state = slot.state;
                if !slot.state.opens() {
                    entry.cipher = None;
                    entry.sealing = None;
                    cache.subkeys.forget(id);
                }
            }
            None if wanted.is_none_or(|wanted| privileges.implies(wanted)) => {
                let entry = SlotEntry {
                    generation,
                    may_decrypt: Verdicts::of(user, may_decrypt),
                    state: slot.state,
                    cipher: None,
                    sealing: None,
                };
                if let Some((evicted, _)) = cache.slots.push(id, entry) {
                    cache.subkeys.forget_unless(evicted, id);
                }
            }
            None => {}
        }
        Ok(())
    })?;
    Ok(Refreshed {
        generation,
        slot,
        privileges,
    })
}

/// Unwraps the slot's key if the session has no cipher of it yet. The DEK of a lookup key never
/// becomes one.
fn ensure_cipher(slot: &read::SlotRow) -> Result<()> {
    let present = with_cache(|cache| {
        Ok(cache
            .slots
            .peek(&slot.id)
            .is_some_and(|entry| entry.cipher.is_some()))
    })?;
    if present {
        return Ok(());
    }
    let name = crate::ffi::text::to_server(slot.key_name.as_bytes())?;
    if let Some(key) = read::key(&name)?.filter(|key| !key.seals) {
        return Err(Error::Purpose(key.name, "seal"));
    }
    let cipher = lifecycle::unwrap(slot)?.cipher();
    with_cache(|cache| {
        cache.slots.get_mut(&slot.id).ok_or_else(no_cipher)?.cipher = Some(cipher);
        Ok(())
    })
}

/// Holds the barrier lock for this top-level transaction. The lock also makes the session accept
/// pending invalidations: what is read of the cache after it is not older than the lock.
pub fn enter_barrier() -> Result<()> {
    session::lock_for_top_transaction(catalog::barrier()?);
    BARRIER_HELD.store(barrier_holder(), Relaxed);
    Ok(())
}

#[inline]
fn holds_barrier() -> bool {
    BARRIER_HELD.load(Relaxed) == barrier_holder()
}

/// This process and its top-level transaction, as one number.
#[inline]
fn barrier_holder() -> u64 {
    let process = u64::from(session::process().unsigned_abs());
    process << 32 | u64::from(session::local_transaction())
}

/// Runs `body` with this process's cache, made on first use. `body` must not call PostgreSQL.
#[inline]
fn with_cache<R>(body: impl FnOnce(&mut Cache) -> Result<R>) -> Result<R> {
    CACHE.with_borrow_mut(|slot| {
        let process = session::process();
        match slot {
            Some(cache) if cache.process == process && cache.fits_setting() => body(cache),
            _ => body(slot.insert(Cache::new(process))),
        }
    })
}

fn wipe() {
    let _ = CACHE.try_with(|cache| cache.try_borrow_mut().map(|mut cache| cache.take()));
    root_key::wipe();
}

impl Cache {
    #[cold]
    fn new(process: i32) -> Cache {
        if WIPED_AT_EXIT_OF.replace(process) != process {
            hooks::at_exit(wipe);
        }
        let bound = NonZeroUsize::new(guc::key_cache_slots()).unwrap_or(NonZeroUsize::MIN);
        Cache {
            process,
            targets: bounded(bound),
            keys: bounded(bound),
            slots: bounded(bound),
            subkeys: Subkeys::new(bound),
            lookups: bounded(bound),
            names: bounded(bound),
        }
    }

    fn fits_setting(&self) -> bool {
        self.slots.cap().get() == guc::key_cache_slots()
    }
}

/// The entry of a slot, as the most recently used one. The slot of the last value is most often
/// that of the next: then the list stays as it is.
#[inline]
fn latest(slots: &mut LruCache<SlotId, SlotEntry>, slot: SlotId) -> Option<&mut SlotEntry> {
    match slots.peek_mru() {
        Some((latest, _)) if *latest == slot => slots.peek_mut(&slot),
        _ => slots.get_mut(&slot),
    }
}

/// Subkeys by (slot, salt). Values sealed in bulk share a salt and open at plain AES-GCM speed;
/// salts that come once leave no trace but a fingerprint: a subkey is kept on its second use.
/// Only a subkey whose tag verified is kept, so that forged envelopes cannot flush the cache.
struct Subkeys {
    kept: LruCache<SubkeyName, Subkey>,
    last: Option<(SubkeyName, Subkey)>,
    seen: Box<[u32]>,
}

impl Subkeys {
    fn new(bound: NonZeroUsize) -> Subkeys {
        let seen = vec![0; bound.get().next_power_of_two()].into_boxed_slice();
        Subkeys {
            kept: bounded(bound),
            last: None,
            seen,
        }
    }

    #[inline]
    fn open_with<R>(
        &mut self,
        cipher: &XaesKey,
        name: SubkeyName,
        open: impl FnOnce(&Subkey) -> std::result::Result<R, OpenError>,
    ) -> std::result::Result<R, OpenError> {
        if let Some((last, subkey)) = &self.last
            && *last == name
        {
            return open(subkey);
        }
        if let Some(subkey) = self.kept.get(&name) {
            return open(subkey);
        }
        let subkey = cipher.subkey(&name.1);
        let opened = open(&subkey)?;
        if self.seen_before(&name) {
            self.kept.put(name, subkey);
        } else {
            self.last = Some((name, subkey));
        }
        Ok(opened)
    }

    /// Whether the salt was seen not long ago; remembers it. Salts are random: their own bytes
    /// serve as hash.
    fn seen_before(&mut self, name: &SubkeyName) -> bool {
        let [a, b, c, d, e, f, g, h, ..] = name.1;
        let place = u32::from_ne_bytes([a, b, c, d]) as usize & (self.seen.len() - 1);
        let fingerprint = u32::from_ne_bytes([e, f, g, h]) | 1;
        std::mem::replace(&mut self.seen[place], fingerprint) == fingerprint
    }

    fn forget(&mut self, slot: SlotId) {
        self.last.take_if(|(name, _)| name.0 == slot);
        let names: Vec<SubkeyName> = self
            .kept
            .iter()
            .map(|(name, _)| *name)
            .filter(|name| name.0 == slot)
            .collect();
        for name in names {
            self.kept.pop(&name);
        }
    }

    /// After the eviction of a slot its subkeys age out by themselves; only the latest one, which
    /// nothing would push out, goes at once.
    fn forget_unless(&mut self, evicted: SlotId, kept: SlotId) {
        if evicted != kept {
            self.last.take_if(|(name, _)| name.0 == evicted);
        }
    }
}

/// A map that grows up to `bound`, instead of taking the memory of all of it at once.
fn bounded<K: std::hash::Hash + Eq, V>(bound: NonZeroUsize) -> LruCache<K, V> {
    let mut map = LruCache::unbounded();
    map.resize(bound);
    map
}

fn lacks(user: Oid, key: &str, privilege: Privilege) -> Error {
    Error::KeyPrivilege(session::role_name(user), key.to_string(), privilege)
}

fn no_cipher() -> Error {
    Error::Internal("the key cache lost a slot in the middle of a call".to_string())
}
