//! Rests in the middle of a step, so that its work is spread over the time instead of coming in
//! bursts.
//!
//! Called by src/worker/drain.rs and src/worker/backfill.rs between the parts of a step, by
//! src/worker/rewrite.rs between rows, by src/worker/proof.rs and src/worker/elsewhere.rs between
//! chunks. Whoever commits flushes all WAL that was written before: after a burst of a tenth
//! of a second that is megabytes, of which the application's next commits would wait for the disk.

use std::time::{Duration, Instant};

use rekey_core::schedule::{self, Facts, Limits};

use crate::ffi::{background, session};
use crate::guc;

/// So much work at least is done between two rests: a rest has its price too. On two cores whoever
/// wakes up beside a piece of 1 ms waits for its end; of 100 µs nothing more was gained.
const PIECE_OF_A_BATCH: Duration = Duration::from_micros(250);
/// A scan hardly writes.
const PIECE_OF_A_SCAN: Duration = Duration::from_millis(20);

/// The time that a batch is to take, in ms. By hand it is rekey.batch_target. The worker, which rests
/// inside a batch and whose commit costs next to nothing, aims at a quarter: a batch that turns out
/// longer than foreseen still keeps to it, and few writers meet a row that is locked.
pub fn aim_ms(in_background: bool) -> u64 {
    let target = guc::batch_target_ms();
    if in_background {
        (target / 4).max(1)
    } else {
        target
    }
}

/// Works a share of the time, and writes a share of the WAL.
pub struct Pace {
    /// None: by hand, without a rest.
    limits: Option<Limits>,
    piece: Duration,
    /// When the table was locked. Rests that do not fit into the window from then on come behind the
    /// batch: rows are locked, and the clock of the owner's code runs.
    locked_at: Option<Instant>,
    is_scan: bool,
    begin: Instant,
    wal: u64,
    rested: Duration,
}

impl Pace {
    /// Of a step that begins now, within these limits; None: without a rest.
    pub fn of_step(limits: Option<Limits>) -> Pace {
        Pace {
            limits,
            piece: PIECE_OF_A_BATCH,
            locked_at: None,
            is_scan: false,
            begin: Instant::now(),
            wal: background::wal_written(),
            rested: Duration::ZERO,
        }
    }

    /// Of a scan that begins now. What it writes, hints and images of pages, is rested for behind it,
    /// when its snapshot holds back no vacuum any more.
    pub fn of_scan(limits: Option<Limits>) -> Pace {
        let limits = limits.map(|limits| Limits {
            wal_rate: None,
            ..limits
        });
        Pace {
            piece: PIECE_OF_A_SCAN,
            is_scan: true,
            ..Pace::of_step(limits)
        }
    }

    /// The step's batch begins: its table is locked from now on.
    pub fn locked(&mut self) {
        self.locked_at = Some(Instant::now());
    }

    /// After a piece of work: rests when enough has been worked or written for it. A cancel gets
    /// through.
    pub fn rest(&mut self) {
        let Some(limits) = &self.limits else { return };
        let facts = Facts {
            took: self.begin.elapsed(),
            rested: self.rested,
            wal_bytes: background::wal_written() - self.wal,
            ..Facts::default()
        };
        let room = self.locked_at.map(|at| {
            let window = schedule::window(Duration::from_millis(aim_ms(true)));
            window.saturating_sub(at.elapsed())
        });
        let due = schedule::rest_between(&facts, limits, self.piece, room);
        if due.is_zero() {
            return;
        }
        let begin = Instant::now();
        while let Some(left) = due.checked_sub(begin.elapsed()) {
            // Of what is less than a millisecond the next rest takes account.
            match i64::try_from(left.as_millis()).unwrap_or(i64::MAX) {
                0 => break,
                ms => session::sleep_ms(ms),
            }
        }
        if self.is_scan {
            self.begin = Instant::now();
        } else {
            self.rested += begin.elapsed();
        }
    }

    /// All rests of a batch together.
    pub fn rested(&self) -> Duration {
        self.rested
    }
}
