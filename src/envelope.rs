//! The envelope: from bytes to a typed view and back.
//!
//! Called by everything that reads or writes a stored value. It never encrypts and never allocates
//! on the reading side. Invariant: what parses is canonical (`Header::to_bytes` gives back the very
//! bytes that were read), and what is not format 1 is refused with a reason, never guessed.
//!
//! ```text
//! 0   1   0xF9: magic and format number (0xF8 | format); never occurs in UTF-8
//! 1   1   bits 0-3 suite (1 = XAES-256-GCM), bit 4 a context is bound, bit 5 zero, bits 6-7 kind
//! 2   8   slot id, big-endian, 1 ..= 2^63-1
//! 10  24  nonce = salt[12] || counter[12]
//! 34  n   ciphertext
//! +n  16  tag
//! ```

use std::fmt;
use std::num::NonZero;

use crate::random;
pub use crate::random::RandomError;

/// Bytes of the header: magic, flags, slot id. All of them are authenticated.
pub const HEADER_LEN: usize = 1 + 1 + 8;
/// Bytes of the salt, the first half of the nonce: one salt, one subkey.
pub const SALT_LEN: usize = 12;
/// Bytes of the counter, the second half of the nonce: the AES-GCM nonce under the subkey.
pub const COUNTER_LEN: usize = 12;
/// Bytes of the XAES-256-GCM nonce.
pub const NONCE_LEN: usize = SALT_LEN + COUNTER_LEN;
/// Bytes of the authentication tag.
pub const TAG_LEN: usize = 16;
/// What an envelope adds to its payload.
pub const OVERHEAD: usize = HEADER_LEN + NONCE_LEN + TAG_LEN;
/// Offset of the ciphertext.
pub const CIPHERTEXT_AT: usize = HEADER_LEN + NONCE_LEN;

/// Fixed high bits of the first byte; the low three are the format number.
const MAGIC: u8 = 0xF8;
const FORMAT: u8 = 1;
const SUITE_XAES_256_GCM: u8 = 1;
const SUITE_MASK: u8 = 0x0F;
const CONTEXT_BIT: u8 = 1 << 4;
const RESERVED_BIT: u8 = 1 << 5;
const KIND_SHIFT: u32 = 6;

/// The identity of one slot, 1 ..= 2^63-1: it fits a positive `bigint`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SlotId(NonZero<u64>);

impl SlotId {
    /// None for 0 and for ids whose top bit is set.
    #[inline]
    pub fn new(id: u64) -> Option<Self> {
        if id >> 63 != 0 {
            return None;
        }
        NonZero::new(id).map(SlotId)
    }

    /// From a `bigint`; None unless it is positive.
    #[inline]
    pub fn from_i64(id: i64) -> Option<Self> {
        u64::try_from(id).ok().and_then(Self::new)
    }

    /// The id as a number.
    #[inline]
    pub fn get(self) -> u64 {
        self.0.get()
    }

    /// The id as a `bigint`, always positive.
    #[inline]
    pub fn as_i64(self) -> i64 {
        self.get().cast_signed()
    }

    /// The id as it stands in a header and in associated data.
    #[inline]
    pub fn to_be_bytes(self) -> [u8; 8] {
        self.get().to_be_bytes()
    }

    /// A fresh id, uniform over its range: 63 bits, so that the slots of several databases can meet
    /// without a collision. The catalog's primary key catches the one that happens all the same.
    pub fn random() -> Result<Self, RandomError> {
        loop {
            let mut bytes = [0; 8];
            random::fill(&mut bytes)?;
            if let Some(id) = Self::new(u64::from_be_bytes(bytes) >> 1) {
                return Ok(id);
            }
        }
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What the payload is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// UTF-8 text.
    Text,
    /// Raw bytes.
    Bytea,
    /// The name of a type and a value's output form in it: see [`split_typed`].
    Typed,
}

impl Kind {
    /// The word that SQL shows.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Text => "text",
            Kind::Bytea => "bytea",
            Kind::Typed => "typed",
        }
    }

    fn bits(self) -> u8 {
        match self {
            Kind::Text => 0,
            Kind::Bytea => 1,
            Kind::Typed => 2,
        }
    }

    fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Kind::Text),
            1 => Some(Kind::Bytea),
            2 => Some(Kind::Typed),
            _ => None,
        }
    }
}

/// The first ten bytes of an envelope.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The slot that sealed the payload.
    pub slot: SlotId,
    /// What the payload is.
    pub kind: Kind,
    /// Whether a context (never an empty one) is bound into the associated data.
    pub context_bound: bool,
}

impl Header {
    /// The header's bytes: the beginning of an envelope and of its associated data.
    #[inline]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = MAGIC | FORMAT;
        bytes[1] = SUITE_XAES_256_GCM | self.kind.bits() << KIND_SHIFT;
        if self.context_bound {
            bytes[1] |= CONTEXT_BIT;
        }
        bytes[2..].copy_from_slice(&self.slot.to_be_bytes());
        bytes
    }

    /// Reads the first ten bytes of `bytes` and looks at nothing behind them: `bytes` may be the
    /// head of a value that was not detoasted any further.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        match bytes.first() {
            None => return Err(EnvelopeError::NotAnEnvelope { first: None }),
            Some(&first) if first & MAGIC != MAGIC => {
                return Err(EnvelopeError::NotAnEnvelope { first: Some(first) });
            }
            Some(&first) if first != MAGIC | FORMAT => {
                return Err(EnvelopeError::UnknownFormat(first & !MAGIC));
            }
            Some(_) => {}
        }
        let Some(&[_, flags, ref slot @ ..]) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(EnvelopeError::Truncated { len: bytes.len() });
        };
        if flags & SUITE_MASK != SUITE_XAES_256_GCM {
            return Err(EnvelopeError::UnknownSuite(flags & SUITE_MASK));
        }
        if flags & RESERVED_BIT != 0 {
            return Err(EnvelopeError::ReservedBit);
        }
        let kind = Kind::from_bits(flags >> KIND_SHIFT).ok_or(EnvelopeError::UnknownKind)?;
        let slot = SlotId::new(u64::from_be_bytes(*slot)).ok_or(EnvelopeError::BadSlotId)?;
        Ok(Header {
            slot,
            kind,
            context_bound: flags & CONTEXT_BIT != 0,
        })
    }
}

/// A whole envelope, as views into its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Envelope<'a> {
    /// The header, parsed.
    pub header: Header,
    /// The header as it stands, for the associated data.
    pub header_bytes: &'a [u8; HEADER_LEN],
    /// First half of the nonce: selects the subkey.
    pub salt: &'a [u8; SALT_LEN],
    /// Second half of the nonce: the AES-GCM nonce under that subkey.
    pub counter: &'a [u8; COUNTER_LEN],
    /// The encrypted payload, exactly as long as the payload.
    pub ciphertext: &'a [u8],
    /// The authentication tag.
    pub tag: &'a [u8; TAG_LEN],
}

impl<'a> Envelope<'a> {
    /// Splits a whole envelope. What follows the header is only measured: whether it is genuine,
    /// the tag says.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, EnvelopeError> {
        let header = Header::parse(bytes)?;
        let truncated = EnvelopeError::Truncated { len: bytes.len() };
        let (header_bytes, rest) = bytes.split_first_chunk().ok_or(truncated)?;
        let (salt, rest) = rest.split_first_chunk().ok_or(truncated)?;
        let (counter, rest) = rest.split_first_chunk().ok_or(truncated)?;
        let (ciphertext, tag) = rest.split_last_chunk().ok_or(truncated)?;
        Ok(Envelope {
            header,
            header_bytes,
            salt,
            counter,
            ciphertext,
            tag,
        })
    }
}

/// Why bytes are not an envelope of this format (SQLSTATE 22P03).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EnvelopeError {
    /// Empty (`first` is None), or the first byte is not the magic of any format.
    NotAnEnvelope {
        /// The first byte.
        first: Option<u8>,
    },
    /// The magic is right, the rest is too short.
    Truncated {
        /// Bytes that are there.
        len: usize,
    },
    /// A format number, 0 to 7, other than 1.
    UnknownFormat(u8),
    /// A suite number, 0 to 15, other than 1.
    UnknownSuite(u8),
    /// Payload kind 3.
    UnknownKind,
    /// Bit 5, reserved for padding, is set.
    ReservedBit,
    /// Slot id 0, or one with the top bit set.
    BadSlotId,
    /// An authentic payload of kind 2 without a type name in front.
    MalformedTyped,
}

impl EnvelopeError {
    /// The facts, for an error's DETAIL: lengths and header bits, nothing of a value. (The first
    /// byte of what is not an envelope may be plaintext, so it is not shown.)
    pub fn detail(self) -> String {
        match self {
            EnvelopeError::NotAnEnvelope { first: None } => "The value is empty.".to_owned(),
            EnvelopeError::NotAnEnvelope { first: Some(_) } => {
                "The first byte is not the magic byte of an envelope.".to_owned()
            }
            EnvelopeError::Truncated { len } => {
                format!("The value has {len} bytes; an envelope has at least {OVERHEAD}.")
            }
            EnvelopeError::UnknownFormat(format) => {
                format!("The envelope has format {format}; this version reads format {FORMAT}.")
            }
            EnvelopeError::UnknownSuite(suite) => format!(
                "The envelope has suite {suite}; this version reads suite {SUITE_XAES_256_GCM}."
            ),
            EnvelopeError::UnknownKind => {
                "The envelope has the reserved payload kind 3.".to_owned()
            }
            EnvelopeError::ReservedBit => "A reserved bit of the header is set.".to_owned(),
            EnvelopeError::BadSlotId => {
                "The slot id in the header is outside 1 to 9223372036854775807.".to_owned()
            }
            EnvelopeError::MalformedTyped => {
                "The payload does not begin with the name of a type.".to_owned()
            }
        }
    }
}

impl fmt::Display for EnvelopeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail())
    }
}

impl std::error::Error for EnvelopeError {}

/// What stands before a typed value's text: `u16be(length) || type name`. None when the name is
/// empty or longer than 65,535 bytes.
pub fn typed_prefix(type_name: &str) -> Option<Vec<u8>> {
    let len = u16::try_from(type_name.len()).ok().filter(|&len| len > 0)?;
    let mut prefix = Vec::with_capacity(2 + type_name.len());
    prefix.extend_from_slice(&len.to_be_bytes());
    prefix.extend_from_slice(type_name.as_bytes());
    Some(prefix)
}

/// Splits a payload of kind [`Kind::Typed`] into the type's name (never empty) and the value's text
/// form (UTF-8 by contract; the caller converts it and so checks it).
pub fn split_typed(payload: &[u8]) -> Result<(&str, &[u8]), EnvelopeError> {
    let malformed = EnvelopeError::MalformedTyped;
    let (len, rest) = payload.split_first_chunk().ok_or(malformed)?;
    let len = usize::from(u16::from_be_bytes(*len));
    let (name, value) = rest.split_at_checked(len).ok_or(malformed)?;
    match str::from_utf8(name) {
        Ok(name) if !name.is_empty() => Ok((name, value)),
        _ => Err(malformed),
    }
}
