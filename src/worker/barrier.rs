//! The barrier: waiting until no transaction seals under a superseded slot any more.
//!
//! Called by src/worker/drain.rs. Transactions that seal hold a lock on the empty table
//! rekey.barrier to their end; those that held it after the rotation's commit had become known to
//! everyone are captured once, and looked at until each has ended, prepared ones too. What seals
//! later read the new active slot under its lock (I6).

use std::time::Instant;

use crate::catalog::read::SlotRow;
use crate::catalog::{self, work};
use crate::error::Result;
use crate::ffi::locks::{self, Holder};

/// The transactions that may still seal under the slots of a wave.
pub struct Barrier {
    wave: String,
    /// When.
    pub captured_at: Instant,
    holders: Vec<Holder>,
}

impl Barrier {
    /// Captures the holders. In a transaction that began after the rotations' commit.
    pub fn capture(wave: &str, superseded: &[SlotRow]) -> Result<Barrier> {
        // A commit is visible before its invalidations are sent: only when its lock is gone does
        // every session that locks the barrier learn of it.
        for slot in superseded {
            locks::wait_for_end(slot.written_by);
        }
        Ok(Barrier {
            wave: wave.to_string(),
            captured_at: Instant::now(),
            holders: locks::holders(catalog::barrier()?),
        })
    }

    /// Whether it was captured for these rotations.
    pub fn serves(&self, wave: &str) -> bool {
        self.wave == wave
    }

    /// Slots of its wave are left, others are drained: what it has waited for counts for these too.
    pub fn goes_on_for(&mut self, wave: &str) {
        self.wave = wave.to_string();
    }

    /// None when all have ended; else who has not.
    pub fn waits_for(&mut self) -> Result<Option<String>> {
        self.holders.retain(|holder| !holder.ended());
        if self.holders.is_empty() {
            return Ok(None);
        }
        let sessions: Vec<String> = self
            .holders
            .iter()
            .filter(|holder| holder.prepared_xid().is_none())
            .map(|holder| holder.virtual_transaction())
            .collect();
        let prepared: Vec<u32> = self
            .holders
            .iter()
            .filter_map(|holder| holder.prepared_xid())
            .collect();
        work::name_holders(&sessions, &prepared).map(Some)
    }
}
