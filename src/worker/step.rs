//! What one step of a drainer comes to: work done, a wait, or nothing to do.
//!
//! Made by src/worker/drain.rs, backfill.rs and afterwards.rs; the worker and CALL rekey.reencrypt()
//! go by it.

use std::time::{Duration, Instant};

use pgrx::pg_sys::Oid;

/// What a step did, or what to wait for.
pub enum Step {
    /// Something; there may be more.
    Worked(Worked),
    /// Nothing for so long; why. Zero: there is nothing to wait for here.
    Wait(Duration, String),
    /// Nothing until something happens, or until so many seconds have passed.
    Idle(Option<i64>),
}

impl Step {
    /// Nothing until then; never zero, which has a meaning of its own.
    pub fn until(at: Instant, why: String) -> Step {
        let left = at.saturating_duration_since(Instant::now());
        Step::Wait(left.max(Duration::from_millis(1)), why)
    }
}

/// What a step did.
#[derive(Default)]
pub struct Worked {
    /// For people: what was done.
    pub what: String,
    /// Table, of a batch.
    pub table: Option<Oid>,
    /// Rows re-encrypted.
    pub rewritten: i64,
    /// Time that it has rested already.
    pub rested: Duration,
}

/// Of two steps the one that has done something; else the wait for both. An idle step lets the
/// worker go, and with it the memory of what a wait is for.
pub fn first_of(one: Step, other: Step) -> Step {
    /// What is due but not done is looked at so often; longer than a CALL waits.
    const SOON: Duration = Duration::from_secs(10);
    let at = |seconds: i64| Duration::from_secs(seconds.unsigned_abs()).max(SOON);
    match (one, other) {
        (Step::Worked(worked), _) | (_, Step::Worked(worked)) => Step::Worked(worked),
        (Step::Wait(time, why), Step::Wait(later, _)) if !time.is_zero() && time <= later => {
            Step::Wait(time, why)
        }
        (Step::Wait(..), Step::Wait(time, why)) => Step::Wait(time, why),
        (Step::Wait(time, why), Step::Idle(due)) | (Step::Idle(due), Step::Wait(time, why)) => {
            Step::Wait(due.map_or(time, |due| time.min(at(due))), why)
        }
        (Step::Idle(one), Step::Idle(other)) => {
            Step::Idle([one, other].into_iter().flatten().min())
        }
    }
}
