//! Re-encryption of stale rows and the proof that old slots are unused (design §9).
//!
//! `drain` says what comes next and does one `step` per transaction; the background worker and
//! CALL rekey.reencrypt() both go through it. A `wave` of slots is drained together, and whoever
//! changes rows goes in by the `door`. `rewrite` re-encrypts rows of one table and has
//! `refresh` make their stale fingerprints again, `barrier` waits for those that still seal under
//! an old slot, `proof` scans, `afterwards` ends slots; `backfill` fills live columns, `ages` rotates
//! by max_age. What must survive a crash is in the catalog (catalog::work) and changes in the
//! transaction of the work itself.

pub mod afterwards;
mod ages;
pub mod backfill;
pub mod barrier;
pub mod door;
pub mod drain;
pub mod elsewhere;
pub mod ending;
pub mod forecast;
pub mod launcher;
pub mod pace;
pub mod proof;
pub mod refresh;
pub mod rewrite;
pub mod step;
pub mod throttle;
pub mod wave;
