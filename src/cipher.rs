//! Sealing and opening: the nonce discipline, and envelopes as a whole.
//!
//! The key cache keeps [`SealState`]s and subkeys; tests, vectors and tools use [`seal_envelope`]
//! and [`open_envelope`], which spell the format out in one place. Joins what stands below it:
//! `xaes` (the construction), `stored_key` (secret types), `random`. Invariant: under one subkey a
//! [`SealState`] never gives out a counter twice, and it gives none out beyond its limits.

use std::fmt;

pub use crate::random::RandomError;
pub use crate::stored_key::{
    Dek, FINGERPRINT_LEN, Fingerprint, FingerprintKey, RootId, RootKey, fingerprint_slot,
    fingerprints_equal,
};
pub use crate::xaes::{OpenError, Subkey, XaesKey};

use crate::envelope::{COUNTER_LEN, Envelope, EnvelopeError, Header, OVERHEAD, SALT_LEN};
use crate::random;

/// Values sealed under one salt, at most.
const MAX_VALUES: u64 = 1 << 16;
/// Bytes sealed under one salt, at most. Both limits stay far below the bounds of AES-GCM under one
/// key; they also keep what a single subkey covers small.
const MAX_BYTES: u64 = 1 << 32;

/// What seals the values of one (process, top-level transaction, slot): a salt, its subkey and a
/// counter. Not `Clone`, and to be tagged by its keeper with the process id: a copy carried across
/// a fork would repeat nonces. Wiped on drop.
pub struct SealState {
    subkey: Subkey,
    salt: [u8; SALT_LEN],
    counter: [u8; COUNTER_LEN],
    values: u64,
    bytes: u64,
}

impl SealState {
    /// A fresh salt and a random first counter, both from the operating system.
    pub fn new(key: &XaesKey) -> Result<Self, RandomError> {
        let mut salt = [0; SALT_LEN];
        let mut counter = [0; COUNTER_LEN];
        random::fill(&mut salt)?;
        random::fill(&mut counter)?;
        Ok(Self::with_parts(key, salt, counter))
    }

    /// With a given salt and first counter: for vectors and tests. Anything else repeats nonces.
    pub fn with_parts(key: &XaesKey, salt: [u8; SALT_LEN], counter: [u8; COUNTER_LEN]) -> Self {
        SealState {
            subkey: key.subkey(&salt),
            salt,
            counter,
            values: 0,
            bytes: 0,
        }
    }

    /// Whether a value (a payload) of `value_len` bytes may still be sealed under this salt: 2^16
    /// values and 2^32 bytes are the limits. When not, a new state takes over before the value.
    #[inline]
    pub fn fits(&self, value_len: usize) -> bool {
        self.values < MAX_VALUES && self.bytes_with(value_len) <= MAX_BYTES
    }

    /// The counter for the next value of `value_len` bytes. The state has moved on when this
    /// returns, before anything is sealed, and never goes back: a savepoint's rollback does not
    /// take bytes out of the WAL. The first counter is the one the state began with; they count up
    /// as one 96-bit big-endian number and wrap. Asked only when [`SealState::fits`] said yes.
    #[inline]
    pub fn next(&mut self, value_len: usize) -> [u8; COUNTER_LEN] {
        debug_assert!(
            self.fits(value_len),
            "the salt had to change before this value"
        );
        let counter = self.counter;
        self.counter = successor(counter);
        self.values += 1;
        self.bytes = self.bytes_with(value_len);
        counter
    }

    /// The salt, for the envelope.
    #[inline]
    pub fn salt(&self) -> &[u8; SALT_LEN] {
        &self.salt
    }

    /// The subkey of the salt.
    #[inline]
    pub fn subkey(&self) -> &Subkey {
        &self.subkey
    }

    #[inline]
    fn bytes_with(&self, value_len: usize) -> u64 {
        self.bytes
            .saturating_add(u64::try_from(value_len).unwrap_or(u64::MAX))
    }
}

/// `counter` + 1 as a 96-bit big-endian number, modulo 2^96.
#[inline]
fn successor(counter: [u8; COUNTER_LEN]) -> [u8; COUNTER_LEN] {
    let mut number = [0; 16];
    number[16 - COUNTER_LEN..].copy_from_slice(&counter);
    let number = u128::from_be_bytes(number).wrapping_add(1).to_be_bytes();
    let mut next = [0; COUNTER_LEN];
    next.copy_from_slice(&number[16 - COUNTER_LEN..]);
    next
}

/// Seals `payload` into a whole envelope under a given nonce: for vectors, tests and tools. The
/// extension writes the same bytes straight into a PostgreSQL value, with a [`SealState`]'s nonces.
/// `header.context_bound` must say whether `context` is not empty.
pub fn seal_envelope(
    key: &XaesKey,
    header: Header,
    salt: &[u8; SALT_LEN],
    counter: &[u8; COUNTER_LEN],
    context: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let header = header.to_bytes();
    let mut bytes = Vec::with_capacity(OVERHEAD + payload.len());
    bytes.extend_from_slice(&header);
    bytes.extend_from_slice(salt);
    bytes.extend_from_slice(counter);
    let ciphertext_at = bytes.len();
    bytes.extend_from_slice(payload);
    let tag =
        key.subkey(salt)
            .seal_in_place(counter, &header, context, &mut bytes[ciphertext_at..]);
    bytes.extend_from_slice(&tag);
    bytes
}

/// Opens a whole envelope and returns its payload, in the extension's order of checks: the form,
/// the context bit, the tag. An empty `context` means that none is given.
pub fn open_envelope(
    key: &XaesKey,
    context: &[u8],
    bytes: &[u8],
) -> Result<Vec<u8>, OpenEnvelopeError> {
    let envelope = Envelope::parse(bytes).map_err(OpenEnvelopeError::Envelope)?;
    match (envelope.header.context_bound, context.is_empty()) {
        (true, true) => return Err(OpenEnvelopeError::ContextMissing),
        (false, false) => return Err(OpenEnvelopeError::ContextUnexpected),
        _ => {}
    }
    let mut payload = envelope.ciphertext.to_vec();
    key.subkey(envelope.salt)
        .open_in_place(
            envelope.counter,
            envelope.header_bytes,
            context,
            &mut payload,
            envelope.tag,
        )
        .map_err(OpenEnvelopeError::Open)?;
    Ok(payload)
}

/// Why [`open_envelope`] gave nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenEnvelopeError {
    /// The bytes are no envelope of this format (SQLSTATE 22P03).
    Envelope(EnvelopeError),
    /// A context is bound and none was given (22023).
    ContextMissing,
    /// No context is bound and one was given (22023).
    ContextUnexpected,
    /// The tag did not verify (39000).
    Open(OpenError),
}

impl fmt::Display for OpenEnvelopeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenEnvelopeError::Envelope(error) => error.fmt(f),
            OpenEnvelopeError::ContextMissing => f.write_str("a context is bound, none was given"),
            OpenEnvelopeError::ContextUnexpected => f.write_str("no context is bound"),
            OpenEnvelopeError::Open(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for OpenEnvelopeError {}
