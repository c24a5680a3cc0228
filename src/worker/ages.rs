//! Rotation by max_age: which key's turn it is, and what becomes of those that cannot be rotated now.
//!
//! Called by src/worker/drain.rs, in the background only. A key that another session holds, or whose
//! rotation fails, is left for a while and holds up no other key and no other work. An earlier
//! rotation of a key is past its barrier before the next one by age; its drain, which may never end,
//! is not waited for.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rekey_core::envelope::SlotId;
use rekey_core::keyring::SlotState;

use super::barrier::Barrier;
use super::step::Step;
use crate::catalog::read::{self, SlotRow};
use crate::catalog::{work, write};
use crate::error::{Error, Result};
use crate::ffi::subtransaction::{Caught, subtransaction};
use crate::ffi::text;
use crate::{guc, lifecycle};

/// How often the keys are looked at.
const EVERY: Duration = Duration::from_secs(10);
/// A key that somebody holds, or whose barrier is not passed, is looked at again after so long: not
/// with the next look, so that many such keys hide no other.
const HELD: Duration = Duration::from_secs(15);
/// So many may fail in one look: what fails for all keys, as without a root key, is not tried for all
/// of them at once.
const FAILURES: u32 = 3;

/// What is remembered of keys that have passed their longest life.
#[derive(Default)]
pub(super) struct Ages {
    read_at: Option<Instant>,
    /// Keys that cannot be rotated now: how often that failed in a row, until when, why.
    put_off: HashMap<String, (u32, Instant, String)>,
    /// Barriers of the last rotation of such keys.
    barriers: HashMap<String, (SlotId, Option<i64>, Barrier)>,
}

impl Ages {
    /// Rotates a key that has passed its longest life, unless too many were rotated in this hour.
    pub(super) fn rotate(&mut self) -> Result<Option<SlotId>> {
        let now = Instant::now();
        let read = self.read_at.is_some_and(|at| at.elapsed() < EVERY);
        let again = self.put_off.values().any(|(_, until, _)| *until <= now);
        if read && !again {
            return Ok(None);
        }
        self.read_at = Some(now);
        let resting = self
            .put_off
            .iter()
            .filter(|(_, (_, until, _))| *until > now);
        let resting: Vec<&str> = resting.map(|(key, _)| key.as_str()).collect();
        let (due, recent) = work::rotations_due(&resting)?;
        self.put_off
            .retain(|key, (_, until, _)| *until > now || due.contains(key));
        self.barriers
            .retain(|key, _| due.contains(key) || self.put_off.contains_key(key));
        if recent >= guc::max_rotations_per_hour() {
            // The board says when there is room for more.
            self.put_off.clear();
            return Ok(None);
        }
        let mut failures = 0;
        for key in &due {
            if let Some(who) = self.barrier_of(key)? {
                self.leave(key, format!("its last rotation waits for {who}"));
                continue;
            }
            let tries = self.put_off.get(key).map_or(1, |(tries, ..)| tries + 1);
            match try_to_rotate(key) {
                Ok(None) => self.leave(key, "another session holds it".to_string()),
                Ok(Some(slot)) => {
                    // There may be more.
                    self.read_at = None;
                    self.put_off.remove(key);
                    self.barriers.remove(key);
                    return Ok(Some(slot));
                }
                Err(caught) => {
                    let state = caught.sqlstate();
                    pgrx::log!("pg_rekey worker: a rotation by age failed with SQLSTATE {state}");
                    let wait = rekey_core::schedule::backoff_ms(tries, u64::from(tries));
                    let why = format!("its rotation fails with SQLSTATE {state}");
                    let until = now + Duration::from_millis(wait).max(HELD);
                    self.put_off.insert(key.clone(), (tries, until, why));
                    failures += 1;
                    if failures == FAILURES {
                        return Ok(None);
                    }
                }
            }
        }
        Ok(None)
    }

    /// The wait for the first of the keys that cannot be rotated now: the worker stays.
    pub(super) fn put_off(&self) -> Step {
        let first = self.put_off.iter().min_by_key(|(_, (_, until, _))| *until);
        first.map_or(Step::Idle(None), |(_, (_, until, why))| {
            Step::until(*until, format!("a key has passed its max_age: {why}"))
        })
    }

    fn leave(&mut self, key: &str, why: String) {
        let tries = self.put_off.get(key).map_or(0, |(tries, ..)| *tries);
        let entry = (tries, Instant::now() + HELD, why);
        self.put_off.insert(key.to_string(), entry);
    }

    /// Whom the key's last rotation still waits for. Its barrier is captured once, when the next
    /// rotation is due: a worker that was started since counts those who seal then.
    fn barrier_of(&mut self, key: &str) -> Result<Option<String>> {
        let slots = read::slots_of(&text::to_server(key.as_bytes())?)?;
        let superseded = |slot: &&SlotRow| slot.state == SlotState::Previous;
        let last = slots
            .iter()
            .filter(superseded)
            .max_by_key(|slot| slot.superseded_at);
        let Some(last) = last else {
            return Ok(None);
        };
        let known = self.barriers.get(key);
        if known.is_none_or(|(slot, at, _)| (*slot, *at) != (last.id, last.superseded_at)) {
            let barrier = Barrier::capture("", std::slice::from_ref(last))?;
            let entry = (last.id, last.superseded_at, barrier);
            self.barriers.insert(key.to_string(), entry);
        }
        match self.barriers.get_mut(key) {
            Some((.., barrier)) => barrier.waits_for(),
            None => Ok(None),
        }
    }
}

/// Rotates a key; None when another session holds it. What fails is undone, its lock with it, and
/// the transaction goes on.
fn try_to_rotate(key: &str) -> std::result::Result<Option<SlotId>, Caught> {
    let rotate = || {
        if write::lock_free_keys(&[key])?.is_empty() {
            return Ok(None);
        }
        lifecycle::rotate(key, "max_age reached").map(Some)
    };
    subtransaction(|| rotate().unwrap_or_else(|error: Error| error.raise()))
}
