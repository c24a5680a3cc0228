//! The secret types, and what is stored about them: wrapped keys, check values, root ids.
//!
//! ```text
//! check value  HMAC-SHA-256(DEK, "pg_rekey/v1/slot-check" || 00 || u64be(slot id))
//! wrapped key  01 || nonce[24] || ct[32] || tag[16], XAES-256-GCM under the root key with
//!              AAD = "pg_rekey/v1/dek" || 00 || root id[16] || u64be(slot id) ||
//!              u32be(len) || key name
//! root id      HMAC-SHA-256(root key, "pg_rekey/v1/root-id")[0..16]
//! root check   HMAC-SHA-256(root key, "pg_rekey/v1/root-check")
//! fingerprint  u64be(slot id) || HMAC-SHA-256(DEK, "pg_rekey/v1/fingerprint" || 00 ||
//!              u32be(length of context) || context || value)
//! ```
//!
//! Called by the cache (unwrap, check) and by key administration (generate, wrap). Invariants: a
//! secret has no Debug, Display, Clone or comparison, stays in one boxed place and wipes itself;
//! comparisons with secrets take constant time.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use zeroize::{ZeroizeOnDrop, Zeroizing};

use crate::envelope::{COUNTER_LEN, NONCE_LEN, SALT_LEN, SlotId, TAG_LEN};
use crate::hex;
use crate::random::{self, RandomError};
use crate::xaes::{OpenError, XaesKey};

const KEY_LEN: usize = 32;
const ROOT_ID_LEN: usize = 16;
/// Bytes of an HMAC-SHA-256: check values and root checks.
const CHECK_LEN: usize = 32;
/// Slot id and HMAC: shorter than any envelope, and its first byte is below 0x80.
pub const FINGERPRINT_LEN: usize = 8 + CHECK_LEN;

/// Version byte, nonce, encrypted DEK, tag.
const WRAPPED_LEN: usize = 1 + NONCE_LEN + KEY_LEN + TAG_LEN;
const WRAP_VERSION: u8 = 1;

const SLOT_CHECK: &[u8] = b"pg_rekey/v1/slot-check\0";
const WRAP: &[u8] = b"pg_rekey/v1/dek\0";
const ROOT_ID: &[u8] = b"pg_rekey/v1/root-id";
const ROOT_CHECK: &[u8] = b"pg_rekey/v1/root-check";
const FINGERPRINT: &[u8] = b"pg_rekey/v1/fingerprint\0";

/// 32 secret bytes in one place on the heap: a move of the owner copies a pointer, not the secret.
type Secret = Box<Zeroizing<[u8; KEY_LEN]>>;

/// The data-encryption key of one slot.
pub struct Dek(Secret);

impl Dek {
    /// 32 bytes from the operating system.
    pub fn generate() -> Result<Self, RandomError> {
        generate_secret().map(Dek)
    }

    /// None unless there are exactly 32 bytes. The caller wipes its own copy.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        secret_from_slice(bytes).map(Dek)
    }

    /// The key itself: for export under another key, vectors and tests. Whoever copies it wipes the
    /// copy, and it is never formatted into a message.
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// Tells whether a DEK is the one of a slot without revealing anything of it; in the catalog.
    pub fn check_value(&self, slot: SlotId) -> [u8; CHECK_LEN] {
        hmac_sha256(&self.0, &[SLOT_CHECK, &slot.to_be_bytes()])
    }

    /// Compares with a stored check value in constant time; false for one of another length.
    pub fn matches_check_value(&self, slot: SlotId, check_value: &[u8]) -> bool {
        self.check_value(slot).ct_eq(check_value).into()
    }

    /// The cipher of this key, expanded.
    pub fn cipher(&self) -> XaesKey {
        XaesKey::new(&self.0)
    }

    /// What makes fingerprints under this key, of purpose lookup.
    pub fn fingerprint_key(&self) -> FingerprintKey {
        FingerprintKey(Box::new(keyed_hmac(&self.0)))
    }
}

impl ZeroizeOnDrop for Dek {}

/// Bytes of a fingerprint, as stored.
pub type Fingerprint = [u8; FINGERPRINT_LEN];

/// A DEK of purpose lookup, its HMAC ready for the next value. Wipes itself, as its digest does.
pub struct FingerprintKey(Box<Hmac<Sha256>>);

impl FingerprintKey {
    /// A keyed digest for equality lookups: equal for equal slot, context and value, and telling
    /// nothing else without the DEK. The slot is the key's own.
    pub fn fingerprint(&self, slot: SlotId, context: &[u8], value: &[u8]) -> Fingerprint {
        let mut mac = Hmac::clone(&self.0);
        for part in [FINGERPRINT, &u32be_len(context), context, value] {
            mac.update(part);
        }
        let mut fingerprint = [0; FINGERPRINT_LEN];
        fingerprint[..8].copy_from_slice(&slot.to_be_bytes());
        fingerprint[8..].copy_from_slice(&mac.finalize().into_bytes());
        fingerprint
    }
}

/// The slot that a fingerprint names; None for what is none.
pub fn fingerprint_slot(fingerprint: &[u8]) -> Option<SlotId> {
    let fingerprint: &Fingerprint = fingerprint.try_into().ok()?;
    let (id, _) = fingerprint.split_first_chunk()?;
    SlotId::new(u64::from_be_bytes(*id))
}

/// Compares fingerprints in constant time; false for one of another length.
pub fn fingerprints_equal(one: &[u8], other: &[u8]) -> bool {
    one.ct_eq(other).into()
}

/// A key-encryption key: 32 uniformly random bytes from outside the database.
pub struct RootKey(Secret);

impl RootKey {
    /// 32 bytes from the operating system.
    pub fn generate() -> Result<Self, RandomError> {
        generate_secret().map(RootKey)
    }

    /// None unless there are exactly 32 bytes. The caller wipes its own copy.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        secret_from_slice(bytes).map(RootKey)
    }

    /// None unless `text` is exactly 64 lower-case hex digits.
    pub(crate) fn from_hex(text: &str) -> Option<Self> {
        let mut secret = empty_secret();
        hex::decode(text, &mut **secret)?;
        Some(RootKey(secret))
    }

    /// The key itself: for writing a keyring file. Whoever copies it wipes the copy, and it is
    /// never formatted into a message.
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// The key's name, computed from the key: a swapped or relabelled keyring entry shows.
    pub fn id(&self) -> RootId {
        let digest = hmac_sha256(&self.0, &[ROOT_ID]);
        let mut id = [0; ROOT_ID_LEN];
        id.copy_from_slice(&digest[..ROOT_ID_LEN]);
        RootId(id)
    }

    /// Tells whether a root key is the one the catalog knows; stored beside its id.
    pub fn check(&self) -> [u8; CHECK_LEN] {
        hmac_sha256(&self.0, &[ROOT_CHECK])
    }

    /// Wraps the DEK of a slot under a random nonce, bound to this root key, the slot id and the
    /// key's name.
    pub fn wrap(
        &self,
        dek: &Dek,
        slot: SlotId,
        key_name: &str,
    ) -> Result<[u8; WRAPPED_LEN], RandomError> {
        let mut nonce = [0; NONCE_LEN];
        random::fill(&mut nonce)?;
        Ok(self.wrap_with_nonce(dek, slot, key_name, &nonce))
    }

    /// [`RootKey::wrap`] under a given nonce: for vectors. A nonce is never used twice.
    pub fn wrap_with_nonce(
        &self,
        dek: &Dek,
        slot: SlotId,
        key_name: &str,
        nonce: &[u8; NONCE_LEN],
    ) -> [u8; WRAPPED_LEN] {
        let (salt, counter) = split_nonce(nonce);
        let mut key = Zeroizing::new(*dek.expose());
        let aad = self.wrap_aad(slot, key_name);
        let tag = XaesKey::new(&self.0)
            .subkey(salt)
            .seal_with_aad(counter, &aad, &mut *key);
        let mut wrapped = [0; WRAPPED_LEN];
        wrapped[0] = WRAP_VERSION;
        wrapped[1..][..NONCE_LEN].copy_from_slice(nonce);
        wrapped[1 + NONCE_LEN..][..KEY_LEN].copy_from_slice(&*key);
        wrapped[1 + NONCE_LEN + KEY_LEN..].copy_from_slice(&tag);
        wrapped
    }

    /// Unwraps what [`RootKey::wrap`] made for the same slot id and key name. One error for all:
    /// wrong length or version, another root key, another slot or name, altered bytes.
    pub fn unwrap(&self, wrapped: &[u8], slot: SlotId, key_name: &str) -> Result<Dek, OpenError> {
        let wrapped: &[u8; WRAPPED_LEN] = wrapped.try_into().map_err(|_| OpenError)?;
        let (&[WRAP_VERSION], rest) = wrapped.split_first_chunk().ok_or(OpenError)? else {
            return Err(OpenError);
        };
        let (nonce, rest) = rest.split_first_chunk().ok_or(OpenError)?;
        let (ciphertext, tag) = rest.split_last_chunk().ok_or(OpenError)?;
        let (salt, counter) = split_nonce(nonce);
        let mut secret = secret_from_slice(ciphertext).ok_or(OpenError)?;
        let aad = self.wrap_aad(slot, key_name);
        XaesKey::new(&self.0)
            .subkey(salt)
            .open_with_aad(counter, &aad, &mut **secret, tag)?;
        Ok(Dek(secret))
    }

    fn wrap_aad(&self, slot: SlotId, key_name: &str) -> Vec<u8> {
        let RootId(id) = self.id();
        let len = u32be_len(key_name.as_bytes());
        let parts: [&[u8]; 5] = [WRAP, &id, &slot.to_be_bytes(), &len, key_name.as_bytes()];
        parts.concat()
    }
}

impl ZeroizeOnDrop for RootKey {}

/// The public name of a root key. SQL shows it as 32 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId([u8; ROOT_ID_LEN]);

impl RootId {
    /// None unless `text` is exactly 32 lower-case hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        let mut id = [0; ROOT_ID_LEN];
        hex::decode(text, &mut id)?;
        Some(RootId(id))
    }

    /// None unless there are exactly 16 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(RootId)
    }

    /// The id as the catalog stores it.
    pub fn as_bytes(&self) -> &[u8; ROOT_ID_LEN] {
        &self.0
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::with_capacity(2 * ROOT_ID_LEN);
        hex::push(&mut text, &self.0);
        f.pad(&text)
    }
}

impl fmt::Debug for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn empty_secret() -> Secret {
    Box::new(Zeroizing::new([0; KEY_LEN]))
}

fn generate_secret() -> Result<Secret, RandomError> {
    let mut secret = empty_secret();
    random::fill(&mut **secret)?;
    Ok(secret)
}

fn secret_from_slice(bytes: &[u8]) -> Option<Secret> {
    if bytes.len() != KEY_LEN {
        return None;
    }
    let mut secret = empty_secret();
    secret.copy_from_slice(bytes);
    Some(secret)
}

fn keyed_hmac(key: &[u8; KEY_LEN]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of every length")
}

fn hmac_sha256(key: &[u8; KEY_LEN], parts: &[&[u8]]) -> [u8; CHECK_LEN] {
    let mut mac = keyed_hmac(key);
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

fn split_nonce(nonce: &[u8; NONCE_LEN]) -> (&[u8; SALT_LEN], &[u8; COUNTER_LEN]) {
    nonce
        .split_first_chunk()
        .and_then(|(salt, counter)| Some((salt, counter.try_into().ok()?)))
        .expect("a nonce is a salt and a counter")
}

fn u32be_len(text: &[u8]) -> [u8; 4] {
    u32::try_from(text.len())
        .expect("a PostgreSQL text has at most 1 GB")
        .to_be_bytes()
}
