//! Which envelopes are stale: a judgement on the header alone.
//!
//! Called for every value that a pass or a proof looks at: one hash of a random id. The map of
//! all slots is kept per process and made again after any change of the catalog. An envelope is
//! stale when its slot is not the active slot of its key and the key has one.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;

use pgrx::pg_sys;
use rekey_core::cipher::{FINGERPRINT_LEN, fingerprint_slot};
use rekey_core::envelope::{CIPHERTEXT_AT, HEADER_LEN, Header, OVERHEAD, SlotId};
use rekey_core::keyring::SlotState;

use crate::catalog::read;
use crate::error::Result;
use crate::ffi::{hooks, text};

/// What an envelope's slot means for re-encryption.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Nothing to do: the active slot of its key, or a slot whose key has none.
    Current,
    /// To be re-encrypted.
    Stale,
    /// To be re-encrypted, but its slot is disabled or destroyed: it does not open.
    Closed,
    /// No slot of this database.
    Unknown,
}

/// Slot ids are random: their own bits serve as hash.
#[derive(Default)]
pub struct RandomIds(u64);

impl Hasher for RandomIds {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u64(&mut self, id: u64) {
        self.0 ^= id;
    }
}

/// A map by slot id.
pub type BySlot<T> = HashMap<SlotId, T, BuildHasherDefault<RandomIds>>;

/// The slots of this database as they stood at one moment.
pub struct Slots {
    generation: u64,
    standing: BySlot<Standing>,
}

impl Slots {
    /// What the slot of an envelope means.
    #[inline]
    pub fn standing(&self, slot: SlotId) -> Standing {
        let known = self.standing.get(&slot);
        known.copied().unwrap_or(Standing::Unknown)
    }
}

thread_local! {
    static SLOTS: RefCell<Option<Rc<Slots>>> = const { RefCell::new(None) };
}

/// The slots as this transaction sees them after its latest lock.
pub fn slots() -> Result<Rc<Slots>> {
    let generation = hooks::generation();
    let known = SLOTS.with_borrow(|slots| slots.clone());
    if let Some(slots) = known.filter(|slots| slots.generation == generation) {
        return Ok(slots);
    }
    let mut active: std::collections::HashSet<String> = std::collections::HashSet::new();
    let keys = read::living_keys()?;
    let rows = read::all_slots()?;
    for row in rows.iter().filter(|row| row.state == SlotState::Active) {
        active.insert(row.key_name.clone());
    }
    let mut standing = BySlot::default();
    for row in rows {
        let drains = active.contains(&row.key_name) && keys.contains(&row.key_name);
        let judged = match row.state {
            SlotState::Pending | SlotState::Active => Standing::Current,
            _ if !drains => Standing::Current,
            SlotState::Previous | SlotState::Drained => Standing::Stale,
            SlotState::Disabled | SlotState::Destroyed => Standing::Closed,
        };
        standing.insert(row.id, judged);
    }
    let slots = Rc::new(Slots {
        generation,
        standing,
    });
    SLOTS.with_borrow_mut(|kept| *kept = Some(slots.clone()));
    Ok(slots)
}

/// What the state of one envelope's slot means for whoever stores it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Judgement {
    /// It is not the active slot of its key, and the key has one.
    pub stale: bool,
    /// It is drained, disabled or destroyed: nothing should be stored under it any more.
    pub closed: bool,
}

/// Slots that are judged one by one: a session that updates rows meets few of them, and need not
/// read all slots of the database after each change of the catalog, as a pass does.
const JUDGED: usize = 256;

thread_local! {
    static JUDGEMENTS: RefCell<(u64, BySlot<Judgement>)> =
        RefCell::new((0, BySlot::default()));
}

/// Judges one slot; an unknown one is neither stale nor closed.
pub fn judge(slot: SlotId) -> Result<Judgement> {
    let generation = hooks::generation();
    let known = JUDGEMENTS.with_borrow(|(of, judged)| {
        let current = *of == generation;
        current.then(|| judged.get(&slot).copied()).flatten()
    });
    if let Some(judgement) = known {
        return Ok(judgement);
    }
    let mut judgement = Judgement {
        stale: false,
        closed: false,
    };
    if let Some(row) = read::slot(slot)? {
        let name = text::to_server(row.key_name.as_bytes())?;
        let seals = read::key(&name)?.is_some_and(|key| key.seals);
        let active = read::active_slot(&name)?;
        judgement.stale = seals && active.is_some_and(|active| active != slot);
        judgement.closed = matches!(
            row.state,
            SlotState::Drained | SlotState::Disabled | SlotState::Destroyed
        );
    }
    JUDGEMENTS.with_borrow_mut(|(of, judged)| {
        if *of != generation || judged.len() >= JUDGED {
            judged.clear();
        }
        *of = generation;
        judged.insert(slot, judgement);
    });
    Ok(judgement)
}

/// What a column stores that names slots.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Holds {
    /// Sealed values.
    Envelopes,
    /// Keyed digests of them. Shorter than any envelope: no value is both.
    Fingerprints,
}

impl Holds {
    /// The slot that a datum of such a column names; None for what is nothing of the kind.
    #[inline]
    pub fn slot(self, datum: pg_sys::Datum) -> Option<SlotId> {
        match self {
            Holds::Envelopes => header(datum).map(|header| header.slot),
            Holds::Fingerprints if text::varlena_len(datum) != FINGERPRINT_LEN => None,
            Holds::Fingerprints => fingerprint_slot(text::detoasted(datum)),
        }
    }

    /// What a datum of such a column is, and the slot that it names: what belongs there, or what
    /// was registered or stored as the other kind by mistake, which names a slot all the same.
    #[inline]
    pub fn found(self, datum: pg_sys::Datum) -> Option<(Holds, SlotId)> {
        let other = match self {
            Holds::Envelopes => Holds::Fingerprints,
            Holds::Fingerprints => Holds::Envelopes,
        };
        let as_kind = |kind: Holds| kind.slot(datum).map(|slot| (kind, slot));
        as_kind(self).or_else(|| as_kind(other))
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Holds::Envelopes => "envelopes",
            Holds::Fingerprints => "fingerprints",
        }
    }

    /// The head of a datum that names a slot.
    pub fn head(self, datum: pg_sys::Datum) -> Option<Head> {
        self.slot(datum)?;
        let len = i32::try_from(CIPHERTEXT_AT).ok()?;
        // A value that is not toasted comes whole.
        let prefix = text::detoasted_prefix(datum, len);
        prefix.get(..CIPHERTEXT_AT)?.try_into().ok()
    }
}

/// Header and nonce of an envelope: they tell it from every other one. Of a fingerprint as many
/// bytes: they tell it from those of other values, not from that of another row with this value.
pub type Head = [u8; CIPHERTEXT_AT];

/// Whether a head is that of a fingerprint. It begins with its slot id, and an envelope with a byte
/// that no slot id begins with.
pub fn is_of_fingerprint(head: &Head) -> bool {
    Header::parse(head).is_err()
}

/// The slot that a head names.
pub fn slot_of(head: &Head) -> Option<SlotId> {
    if is_of_fingerprint(head) {
        return SlotId::new(u64::from_be_bytes(*head.first_chunk()?));
    }
    Header::parse(head).ok().map(|header| header.slot)
}

/// The header of a datum that is long enough to be an envelope, without its body.
#[inline]
pub fn header(datum: pg_sys::Datum) -> Option<Header> {
    let len = i32::try_from(HEADER_LEN).ok()?;
    let prefix = text::detoasted_prefix(datum, len);
    let header = Header::parse(prefix).ok()?;
    (text::varlena_len(datum) >= OVERHEAD).then_some(header)
}
