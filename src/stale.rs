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
use rekey_core::envelope::{HEADER_LEN, Header, OVERHEAD, SlotId};
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
    let seal_keys = read::sealing_keys()?;
    let rows = read::all_slots()?;
    for row in rows.iter().filter(|row| row.state == SlotState::Active) {
        active.insert(row.key_name.clone());
    }
    let mut standing = BySlot::default();
    for row in rows {
        let drains = active.contains(&row.key_name) && seal_keys.contains(&row.key_name);
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

/// The header of a datum that is long enough to be an envelope, without its body.
#[inline]
pub fn header(datum: pg_sys::Datum) -> Option<Header> {
    let len = i32::try_from(HEADER_LEN).ok()?;
    let prefix = text::detoasted_prefix(datum, len);
    let header = Header::parse(prefix).ok()?;
    (text::varlena_len(datum) >= OVERHEAD).then_some(header)
}
