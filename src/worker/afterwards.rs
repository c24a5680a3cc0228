//! What is left when no slot awaits a proof: rows under quarantine that are due, proofs that do not
//! hold any more, and the end of drained slots as after_drain says.
//!
//! Called by src/worker/drain.rs, whose Drainer it goes on with. Whether a slot may go is judged by
//! src/worker/ending.rs; here it goes, under its key's lock, if it is still what it was then.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use pgrx::pg_sys::Oid;
use rekey_core::envelope::SlotId;
use rekey_core::keyring::SlotState;

use super::door::{Unable, enter, refuse_paused};
use super::drain::{Drainer, lock_free, retry_rows};
use super::ending::{self, Candidate, Quarantine};
use super::pace::Pace;
use super::proof::{self, Verdict};
use super::step::{Step, Worked, first_of};
use crate::catalog::read::{self, SlotRow};
use crate::catalog::{work, write};
use crate::error::Result;
use crate::ffi::table::Tid;
use crate::ffi::{locks, shared};
use crate::registry::{self, Leaf};
use crate::stale::{self, Standing};
use crate::{failpoint, guc, lifecycle};

/// Why a proof is void, in the audit.
const FOUND_AGAIN: &str = "values are sealed under it again";

impl Drainer {
    /// What follows a drain, and retries of rows under quarantine, when no slot awaits a proof.
    pub(super) fn afterwards(
        &mut self,
        leaves: &[Leaf],
        troubles: &[registry::Trouble],
    ) -> Result<Step> {
        let tables: Vec<Oid> = leaves.iter().map(|leaf| leaf.table).collect();
        work::forget_others(&tables)?;
        let resting = match self.retry_due(leaves)? {
            Step::Worked(worked) => return Ok(Step::Worked(worked)),
            other => other,
        };
        let step = self.end(leaves, troubles)?;
        Ok(first_of(resting, step))
    }

    /// Rows under quarantine that are due, of one table. What fails there is the table's fault: it
    /// rests, and the others go on.
    fn retry_due(&mut self, leaves: &[Leaf]) -> Result<Step> {
        let mut resting: Option<(Instant, String)> = None;
        for leaf in leaves {
            let due = work::due(leaf.table)?;
            if due.is_empty() {
                continue;
            }
            if let Some(rest) = self.resting.get(&leaf.table)
                && rest.until > Instant::now()
            {
                if resting.as_ref().is_none_or(|(at, _)| rest.until < *at) {
                    resting = Some((rest.until, rest.why.clone()));
                }
                continue;
            }
            self.current = Some(leaf.table);
            shared::working_on(leaf.table.to_u32());
            match retry(leaf, &due, &self.pace) {
                Ok(retried) => {
                    let slow = "code of its owner takes too long";
                    if retried.slow {
                        self.rest(leaf.table, slow, false)?;
                    } else {
                        self.resting.remove(&leaf.table);
                    }
                    return Ok(Step::Worked(retried.worked));
                }
                Err(Unable::Error(error)) => return Err(error),
                // Its entries come due again with the end of the pause; by hand nobody waits for a
                // table that is locked.
                Err(Unable::Paused(_)) => {}
                Err(Unable::Busy(_) | Unable::Refused(_)) if !self.background => {}
                Err(Unable::Busy(why)) => {
                    let at = self.rest(leaf.table, &why, true)?;
                    resting.get_or_insert((at, why));
                }
                Err(Unable::Refused(why)) => {
                    let at = self.rest(leaf.table, &why, false)?;
                    resting.get_or_insert((at, why));
                }
            }
        }
        self.current = None;
        shared::working_on(0);
        Ok(match resting {
            Some((at, why)) => Step::until(at, why),
            None => Step::Idle(None),
        })
    }

    /// What follows a drain.
    fn end(&mut self, leaves: &[Leaf], troubles: &[registry::Trouble]) -> Result<Step> {
        if !self.proves || self.only.is_some() {
            return Ok(Step::Idle(None));
        }
        let voided = void_proofs_made_elsewhere()?;
        if voided > 0 {
            return Ok(Step::Worked(Worked {
                what: format!("{voided} slots are proved again after a restore"),
                ..Worked::default()
            }));
        }
        if !self.background && !self.looked_at_drained && troubles.is_empty() {
            self.looked_at_drained = true;
            let found = self.found_again(leaves)?;
            if found > 0 {
                return Ok(Step::Worked(Worked {
                    what: format!("{found} drained slots have values again"),
                    ..Worked::default()
                }));
            }
        }
        self.end_slots(leaves, troubles)
    }

    /// By hand the drained slots are looked for once more: what an old snapshot has copied, a
    /// subscriber received or a restore brought is then re-encrypted like all that is stale.
    fn found_again(&self, leaves: &[Leaf]) -> Result<usize> {
        let slots = stale::slots()?;
        let mut drained = read::all_slots()?;
        drained.retain(|slot| {
            slot.state == SlotState::Drained && slots.standing(slot.id) == Standing::Stale
        });
        let quarantine = Quarantine::of(leaves)?;
        drained.retain(|slot| !quarantine.holds(slot.id));
        if drained.is_empty() {
            return Ok(0);
        }
        match proof::prove(leaves, &drained, self.limits())? {
            Verdict::Stale(_, named) => {
                drained.retain(|slot| named.contains(&slot.id));
                void_proofs(&drained, FOUND_AGAIN)
            }
            _ => Ok(0),
        }
    }

    /// What after_drain says of the slots that are drained and past their grace.
    fn end_slots(&mut self, leaves: &[Leaf], troubles: &[registry::Trouble]) -> Result<Step> {
        let mut candidates = Vec::new();
        let mut soonest: Option<Instant> = None;
        for (id, action) in work::after_drain()? {
            let slot = lifecycle::slot(id)?;
            if let Some((_, until)) = self.refused.get(&slot.id)
                && *until > Instant::now()
            {
                soonest = Some(soonest.map_or(*until, |at| at.min(*until)));
                continue;
            }
            candidates.push(Candidate {
                slot,
                destroy: action == "destroy",
            });
        }
        if let Some(at) = soonest.filter(|_| candidates.is_empty()) {
            let why = "scans have found values of the slots that are to end".to_string();
            return Ok(Step::until(at, why));
        }
        let Some(first) = candidates.first() else {
            return Ok(Step::Idle(work::next_due(guc::max_rotations_per_hour())?));
        };
        if let Some(trouble) = troubles.first() {
            let (table, what) = (&trouble.table, &trouble.what);
            let why = format!("slot {}: {table}: {what}", first.slot.id);
            return Ok(Step::Wait(Duration::from_secs(60), why));
        }
        // Where a scan was in vain since somebody older ended meanwhile, wait longer for him: 2 s,
        // up to some minutes.
        let tries = candidates.iter().filter_map(|candidate| {
            let (tries, _) = self.refused.get(&candidate.slot.id)?;
            Some(tries + 1)
        });
        let patience = Duration::from_secs(2 << tries.max().unwrap_or(0).min(7));
        let answers = ending::may_go(&candidates, leaves, self.limits(), patience)?;
        let mut why = None;
        let mut free = Vec::new();
        for (candidate, answer) in candidates.into_iter().zip(answers) {
            let id = candidate.slot.id;
            let Some(obstacle) = answer else {
                self.refused.remove(&id);
                free.push(candidate);
                continue;
            };
            if obstacle.scanned {
                self.put_off_scan(id);
            }
            if obstacle.found {
                void_proofs(std::slice::from_ref(&candidate.slot), FOUND_AGAIN)?;
            }
            why.get_or_insert_with(|| format!("slot {id}: {}", obstacle.why));
        }
        let ended = end(&free)?;
        if ended < free.len() {
            why.get_or_insert_with(|| "another session holds a key".to_string());
        }
        match why {
            Some(why) if ended == 0 => Ok(Step::Wait(Duration::from_secs(10), why)),
            _ => Ok(Step::Worked(Worked {
                what: format!("{ended} slots have ended"),
                ..Worked::default()
            })),
        }
    }

    /// A slot of which a scan has found values is not scanned for again soon: 10 s, doubling up to
    /// an hour.
    fn put_off_scan(&mut self, slot: SlotId) {
        let tries = self.refused.get(&slot).map_or(0, |(tries, _)| tries + 1);
        let wait = Duration::from_secs((10 << tries.min(9)).min(3600));
        self.refused.insert(slot, (tries, Instant::now() + wait));
    }
}

/// What became of a table's rows under quarantine.
struct Retried {
    worked: Worked,
    slow: bool,
}

/// Tries rows under quarantine again.
fn retry(leaf: &Leaf, due: &[Tid], pace: &RefCell<Pace>) -> std::result::Result<Retried, Unable> {
    refuse_paused(leaf)?;
    let table = enter(leaf)?;
    pace.borrow_mut().locked();
    let report = retry_rows(leaf, &table, due, pace)?;
    for failure in &report.failed {
        work::quarantine(leaf.table, failure)?;
    }
    Ok(Retried {
        worked: Worked {
            what: format!("retried {} rows", due.len()),
            table: Some(leaf.table),
            rewritten: report.rewritten,
            rested: pace.borrow().rested(),
        },
        slow: report.slow,
    })
}

/// After a restore or a copy what was proved there says nothing of the tables here. Returns how
/// many slots await a proof again.
fn void_proofs_made_elsewhere() -> Result<usize> {
    let mut slots = Vec::new();
    for id in work::proved_elsewhere(locks::identity())? {
        slots.push(lifecycle::slot(id)?);
    }
    void_proofs(&slots, "made on another server or database")
}

/// Drained slots of which values were found await a proof again.
fn void_proofs(slots: &[SlotRow], why: &str) -> Result<usize> {
    if slots.is_empty() {
        return Ok(0);
    }
    let free = lock_free(slots)?;
    let mut voided = 0;
    for slot in slots.iter().filter(|slot| free.contains(&slot.key_name)) {
        let slot = lifecycle::slot(slot.id.as_i64())?;
        if slot.state == SlotState::Drained {
            write::transition(&slot, SlotState::Previous, "void_proof", why)?;
            voided += 1;
        }
    }
    Ok(voided)
}

/// Ends slots that may go: those of which the policy still says so, that are what they were before
/// the scan, and whose key no other session holds. Returns how many keys were free.
fn end(candidates: &[Candidate]) -> Result<usize> {
    let slots: Vec<SlotRow> = candidates.iter().map(|c| c.slot.clone()).collect();
    let free = lock_free(&slots)?;
    let policy = work::after_drain()?;
    let mut ended = 0;
    for candidate in candidates {
        let before = &candidate.slot;
        if !free.contains(&before.key_name) {
            continue;
        }
        ended += 1;
        let (action, to) = match candidate.destroy {
            true => ("destroy", SlotState::Destroyed),
            false => ("disable", SlotState::Disabled),
        };
        let id = before.id.as_i64();
        let slot = lifecycle::slot(id)?;
        if slot.state == SlotState::Drained
            && slot.superseded_at == before.superseded_at
            && policy.iter().any(|(of, says)| *of == id && says == action)
        {
            write::transition(&slot, to, "after_drain", "")?;
            failpoint::reach("slot.ended")?;
        }
    }
    Ok(ended)
}
