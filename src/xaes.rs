//! XAES-256-GCM (C2SP), split at the seam that makes it fast: one subkey per salt.
//!
//! ```text
//! L  = AES-256(K, 0^128)       K1 = L << 1, xor 0x87 if the bit shifted out was 1
//! Kx = AES-256(K, 00 01 'X' 00 || salt xor K1) || AES-256(K, 00 02 'X' 00 || salt xor K1)
//! output = AES-256-GCM(Kx, nonce = counter, payload, AAD)
//! ```
//!
//! A counter-based CMAC-AES-256 KDF (NIST SP 800-108r1) in front of AES-256-GCM (SP 800-38D).
//! Called by `cipher` for envelopes and by `stored_key` for wrapped keys; the key cache keeps both
//! types. Invariants: no nonce is chosen here; plaintext is given out only after its tag verified;
//! key schedules are boxed, so that moving a handle leaves no copy behind, and wiped on drop.

use std::fmt;

use aes::Aes256Enc;
use aes::cipher::{BlockCipherEncrypt, KeyInit, consts::U12};
use aes_gcm::AesGcm;
use aes_gcm::aead::AeadInOut;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::envelope::{COUNTER_LEN, HEADER_LEN, SALT_LEN, TAG_LEN};

/// AES-256-GCM over the encrypting half of AES: counter mode needs no other, and the inverse key
/// schedule would be a good part of the cost of a subkey.
type Gcm = AesGcm<Aes256Enc, U12>;

/// Associated data up to this length is put together on the stack: 242 bytes of context, more than
/// a qualified column name and a key value take.
const STACK_AAD: usize = 256;

/// Bytes of u32be(length of the context).
const CONTEXT_LEN_LEN: usize = 4;

/// The tag does not verify: wrong key, wrong context or altered bytes. One error that says no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenError;

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("authentication failed")
    }
}

impl std::error::Error for OpenError {}

/// A 256-bit key made ready for XAES: its AES-256 key schedule and K1.
pub struct XaesKey(Box<Expanded>);

struct Expanded {
    aes: Aes256Enc,
    k1: Zeroizing<u128>,
}

impl XaesKey {
    /// Expands `key`; done once per key and kept.
    pub fn new(key: &[u8; 32]) -> Self {
        let aes = Aes256Enc::new(key.into());
        let mut l = Zeroizing::new([0; 16]);
        aes.encrypt_block((&mut *l).into());
        let l = Zeroizing::new(u128::from_be_bytes(*l));
        let k1 = Zeroizing::new((*l << 1) ^ ((*l >> 127) * 0x87));
        XaesKey(Box::new(Expanded { aes, k1 }))
    }

    /// Derives the subkey of `salt`: two AES blocks and one AES-256-GCM key set-up.
    pub fn subkey(&self, salt: &[u8; SALT_LEN]) -> Subkey {
        let mut kx = Zeroizing::new([0; 32]);
        let (first, second) = kx.split_at_mut(16);
        for (half, number) in [(first, 1), (second, 2)] {
            let mut m = [0; 16];
            m[..4].copy_from_slice(&[0, number, b'X', 0]);
            m[4..].copy_from_slice(salt);
            half.copy_from_slice(&(u128::from_be_bytes(m) ^ *self.0.k1).to_be_bytes());
        }
        for half in kx.as_chunks_mut::<16>().0 {
            self.0.aes.encrypt_block(half.into());
        }
        Subkey(Box::new(Gcm::new((&*kx).into())))
    }
}

impl ZeroizeOnDrop for XaesKey {}

/// The AES-256-GCM key of one (key, salt) pair. Seals and opens in place.
pub struct Subkey(Box<Gcm>);

impl Subkey {
    /// Encrypts `buf` in place and returns the tag. AAD = header, and if `context` is not empty
    /// `|| u32be(length) || context`: the header's context bit must say the same. The caller never
    /// uses a counter twice under one subkey: see [`crate::cipher::SealState`].
    #[inline]
    pub fn seal_in_place(
        &self,
        counter: &[u8; COUNTER_LEN],
        header: &[u8; HEADER_LEN],
        context: &[u8],
        buf: &mut [u8],
    ) -> [u8; TAG_LEN] {
        with_aad(header, context, |aad| self.seal_with_aad(counter, aad, buf))
    }

    /// Decrypts `buf` in place if `tag` verifies over it, the header and the context. On an error
    /// `buf` is all zeros: nothing of an unauthenticated payload is ever left to be used.
    #[inline]
    pub fn open_in_place(
        &self,
        counter: &[u8; COUNTER_LEN],
        header: &[u8; HEADER_LEN],
        context: &[u8],
        buf: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), OpenError> {
        with_aad(header, context, |aad| {
            self.open_with_aad(counter, aad, buf, tag)
        })
    }

    /// [`Subkey::seal_in_place`] over associated data as given.
    #[inline]
    pub(crate) fn seal_with_aad(
        &self,
        counter: &[u8; COUNTER_LEN],
        aad: &[u8],
        buf: &mut [u8],
    ) -> [u8; TAG_LEN] {
        self.0
            .encrypt_inout_detached(counter.into(), aad, buf.into())
            .expect("a PostgreSQL value, at most 1 GB, is below the 64 GiB limit of AES-GCM")
            .into()
    }

    /// [`Subkey::open_in_place`] over associated data as given.
    #[inline]
    pub(crate) fn open_with_aad(
        &self,
        counter: &[u8; COUNTER_LEN],
        aad: &[u8],
        buf: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), OpenError> {
        let opened =
            self.0
                .decrypt_inout_detached(counter.into(), aad, (&mut *buf).into(), tag.into());
        opened.map_err(|_| {
            buf.zeroize();
            OpenError
        })
    }
}

impl ZeroizeOnDrop for Subkey {}

/// Calls `f` with the associated data of an envelope. Without a context that is the header itself.
#[inline]
fn with_aad<T>(header: &[u8; HEADER_LEN], context: &[u8], f: impl FnOnce(&[u8]) -> T) -> T {
    if context.is_empty() {
        return f(header);
    }
    let len = u32::try_from(context.len()).expect("a context is a PostgreSQL text, at most 1 GB");
    let (len_at, context_at) = (HEADER_LEN, HEADER_LEN + CONTEXT_LEN_LEN);
    let end = context_at + context.len();
    let write = |aad: &mut [u8]| {
        aad[..len_at].copy_from_slice(header);
        aad[len_at..context_at].copy_from_slice(&len.to_be_bytes());
        aad[context_at..].copy_from_slice(context);
    };
    if end <= STACK_AAD {
        let mut aad = [0; STACK_AAD];
        write(&mut aad[..end]);
        f(&aad[..end])
    } else {
        let mut aad = vec![0; end];
        write(&mut aad);
        f(&aad)
    }
}

#[cfg(test)]
mod tests {
    use sha3::Shake128;
    use sha3::digest::{ExtendableOutput, Update, XofReader};

    use super::*;
    use crate::envelope::NONCE_LEN;

    fn seal(key: &[u8; 32], nonce: &[u8; NONCE_LEN], aad: &[u8], payload: &[u8]) -> Vec<u8> {
        let (salt, counter) = nonce.split_first_chunk::<SALT_LEN>().expect("24 bytes");
        let counter = counter.try_into().expect("12 bytes");
        let mut sealed = payload.to_vec();
        let tag = XaesKey::new(key)
            .subkey(salt)
            .seal_with_aad(counter, aad, &mut sealed);
        sealed.extend_from_slice(&tag);
        sealed
    }

    fn hex(bytes: &[u8]) -> String {
        let mut text = String::new();
        crate::hex::push(&mut text, bytes);
        text
    }

    #[test]
    fn c2sp_static_vectors() {
        let nonce = b"ABCDEFGHIJKLMNOPQRSTUVWX";
        let sealed = seal(&[1; 32], nonce, b"", b"XAES-256-GCM");
        assert_eq!(
            hex(&sealed),
            "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"
        );
        let sealed = seal(&[3; 32], nonce, b"c2sp.org/XAES-256-GCM", b"XAES-256-GCM");
        assert_eq!(
            hex(&sealed),
            "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"
        );
    }

    /// Both ways to K1: the static vectors are chosen so that L begins with a 0 and with a 1.
    #[test]
    fn the_static_vectors_reach_both_ways_to_k1() {
        let top_bit = |key: &[u8; 32]| {
            let mut l = [0; 16];
            Aes256Enc::new(key.into()).encrypt_block((&mut l).into());
            l[0] >> 7
        };
        assert_eq!([top_bit(&[1; 32]), top_bit(&[3; 32])], [0, 1]);
    }

    #[test]
    fn c2sp_accumulated_vectors() {
        let mut digest = Shake128::default();
        let mut generator = Shake128::default().finalize_xof();
        accumulate(10_000, &mut generator, &mut digest);
        assert_eq!(
            accumulated(&digest),
            "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939"
        );
        if cfg!(debug_assertions) {
            return; // the rest takes minutes without optimisation
        }
        accumulate(990_000, &mut generator, &mut digest);
        assert_eq!(
            accumulated(&digest),
            "2163ae1445985a30b60585ee67daa55674df06901b890593e824b8a7c885ab15"
        );
    }

    fn accumulate(iterations: u32, generator: &mut impl XofReader, digest: &mut Shake128) {
        let (mut key, mut nonce) = ([0; 32], [0; NONCE_LEN]);
        for _ in 0..iterations {
            generator.read(&mut key);
            generator.read(&mut nonce);
            let payload = read_text(generator);
            let aad = read_text(generator);
            digest.update(&seal(&key, &nonce, &aad, &payload));
        }
    }

    fn read_text(generator: &mut impl XofReader) -> Vec<u8> {
        let mut len = [0];
        generator.read(&mut len);
        let mut text = vec![0; usize::from(len[0])];
        generator.read(&mut text);
        text
    }

    fn accumulated(digest: &Shake128) -> String {
        let mut output = [0; 32];
        digest.clone().finalize_xof().read(&mut output);
        hex(&output)
    }

    /// The stack and the heap build the same associated data on both sides of their border, and
    /// both are what the format says.
    #[test]
    fn associated_data_of_every_length_around_the_stack_buffer() {
        let header = [7; HEADER_LEN];
        assert!(
            with_aad(&header, b"", |aad| aad == header),
            "no context: the header alone"
        );
        for len in (1..=3).chain(STACK_AAD - 20..=STACK_AAD + 20) {
            let context = vec![b'c'; len];
            let mut expected = header.to_vec();
            expected.extend_from_slice(&u32::try_from(len).expect("small").to_be_bytes());
            expected.extend_from_slice(&context);
            assert!(
                with_aad(&header, &context, |aad| aad == expected),
                "context of {len} bytes"
            );
        }
    }

    #[test]
    fn a_failed_open_leaves_zeros() {
        let subkey = XaesKey::new(&[5; 32]).subkey(&[6; SALT_LEN]);
        let mut buf = b"secret payload".to_vec();
        let (counter, header) = ([7; COUNTER_LEN], [8; HEADER_LEN]);
        let mut tag = subkey.seal_in_place(&counter, &header, b"", &mut buf);
        tag[0] ^= 1;
        assert_eq!(
            subkey.open_in_place(&counter, &header, b"", &mut buf, &tag),
            Err(OpenError)
        );
        assert!(buf.iter().all(|&byte| byte == 0), "{buf:?}");
    }

    /// What a wipe on drop rests on: the crates wipe their key schedules (their `zeroize` feature).
    #[test]
    fn key_schedules_wipe_themselves() {
        fn wiped<T: ZeroizeOnDrop>() {}
        wiped::<Aes256Enc>();
        wiped::<Gcm>();
        wiped::<Zeroizing<u128>>();
    }
}
