//! Rests in the middle of a step, so that its work is spread over the time instead of coming in
//! bursts.
//!
//! Called by src/worker/rewrite.rs between rows. Whoever commits flushes all WAL that was written
//! before: after a burst of a tenth of a second that is megabytes, of which the application's next
//! commits would wait for the disk.

use std::time::{Duration, Instant};

use rekey_core::schedule;

use crate::ffi::session;
use crate::guc;

/// So much work at least is done between two rests: a rest has its price too. On two cores whoever
/// wakes up beside a piece of 1 ms waits for its end; of 100 µs nothing more was gained.
const PIECE: Duration = Duration::from_micros(250);

/// Works a share of the time.
pub struct Pace {
    ratio: Option<f64>,
    within: Duration,
    begin: Instant,
    rested: Duration,
}

impl Pace {
    /// Of a batch that begins now, with that share; None: without a rest. Rests that do not fit
    /// into rekey.batch_target come behind the batch: rows are locked, and the clock of the owner's
    /// code runs.
    pub fn of_batch(ratio: Option<f64>) -> Pace {
        Pace {
            ratio,
            within: Duration::from_millis(guc::batch_target_ms()),
            begin: Instant::now(),
            rested: Duration::ZERO,
        }
    }

    /// After a piece of work: rests when enough has been worked for it. A cancel gets through.
    pub fn rest(&mut self) {
        let took = self.begin.elapsed();
        let Some(ratio) = self.ratio.filter(|_| took < self.within) else {
            return;
        };
        let worked = took.saturating_sub(self.rested);
        let due = schedule::rest_after(worked, ratio).saturating_sub(self.rested);
        if due.is_zero() || due < schedule::rest_after(PIECE, ratio) {
            return;
        }
        let due = due.min(self.within - took);
        let begin = Instant::now();
        while let Some(left) = due.checked_sub(begin.elapsed()) {
            // Of what is less than a millisecond the next rest takes account.
            match i64::try_from(left.as_millis()).unwrap_or(i64::MAX) {
                0 => break,
                ms => session::sleep_ms(ms),
            }
        }
        self.rested += begin.elapsed();
    }

    /// All rests together.
    pub fn rested(&self) -> Duration {
        self.rested
    }
}
