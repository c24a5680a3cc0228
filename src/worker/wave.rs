//! Which slots are drained together: the wave that passes, barrier and proof are about.
//!
//! Called by src/worker/drain.rs. A wave is named by its slots and their rotations, and stands under
//! that name in the catalog, so that every drainer goes on with the same one. A rotation that comes
//! later waits for the next wave, or rotations that come fast would end none.

use std::hash::{DefaultHasher, Hash, Hasher};

use rekey_core::keyring::SlotState;

use crate::catalog::read::{self, SlotRow};
use crate::catalog::work;
use crate::error::Result;
use crate::stale::{self, Standing};

/// The slots that await a drain, in the order of their rotations: compromised ones first, alone.
pub fn targets() -> Result<Vec<SlotRow>> {
    let slots = stale::slots()?;
    let mut targets: Vec<SlotRow> = read::all_slots()?
        .into_iter()
        .filter(|slot| slot.state == SlotState::Previous)
        .filter(|slot| slots.standing(slot.id) == Standing::Stale)
        .collect();
    if targets.iter().any(|slot| slot.compromised) {
        targets.retain(|slot| slot.compromised);
    }
    targets.sort_by_key(|slot| (slot.superseded_at, slot.id.get()));
    Ok(targets)
}

/// Names the rotations that a pass and a proof serve.
pub fn name(slots: &[SlotRow]) -> String {
    names(slots).last().unwrap_or_default()
}

/// The names of the first one, the first two and so on.
fn names(slots: &[SlotRow]) -> impl Iterator<Item = String> {
    let mut hasher = DefaultHasher::new();
    slots.iter().map(move |slot| {
        (slot.id.get(), slot.superseded_at).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    })
}

/// How many of the slots, in the order of their rotations, the wave under way is about: the most that
/// the passes of the tables name. All, when no wave is under way, or when it is `over`: it comes to
/// no end for now.
pub fn under_way(slots: &[SlotRow], over: Option<&str>) -> Result<usize> {
    let named = work::waves()?;
    let names = names(slots).collect::<Vec<_>>();
    let known = names.iter().rposition(|name| named.contains(name));
    let known = known.filter(|at| over != Some(&names[*at]));
    Ok(known.map_or(slots.len(), |at| at + 1))
}
