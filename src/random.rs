//! Random bytes: the operating system's generator and nothing else.
//!
//! Called for keys, slot ids, salts and counters. Invariant: there is no user-space generator, so
//! no generator state that a fork could copy into every backend (CVE-2013-1900), and no fallback to
//! a weaker source: a failure of the generator is an error of the caller's operation.

use std::fmt;

use rand::TryRng;
use rand::rngs::SysRng;

/// The operating system's random generator failed; nothing was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RandomError;

impl fmt::Display for RandomError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the operating system's random number generator failed")
    }
}

impl std::error::Error for RandomError {}

/// Fills `bytes` from the operating system's generator.
pub(crate) fn fill(bytes: &mut [u8]) -> Result<(), RandomError> {
    SysRng.try_fill_bytes(bytes).map_err(|_| RandomError)
}
