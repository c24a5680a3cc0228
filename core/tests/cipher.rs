//! Sealing, opening, wrapping: round trips, tampering, nonces and their limits.
//!
//! Run by `cargo test -p rekey-core`. The independent crate `xaes-256-gcm` is the judge of what the
//! bytes should be; that nothing altered ever opens is tried bit by bit.

use proptest::prelude::*;
use rekey_core::cipher::{
    self, Dek, OpenEnvelopeError, OpenError, RootId, RootKey, SealState, Subkey, XaesKey,
    fingerprint_slot, fingerprints_equal,
};
use rekey_core::envelope::{COUNTER_LEN, Header, Kind, NONCE_LEN, SALT_LEN, SlotId};
use xaes_256_gcm::Xaes256Gcm;
use xaes_256_gcm::aead::{Aead, KeyInit, Payload};

const SALT: [u8; SALT_LEN] = *b"salt salt 12";
const COUNTER: [u8; COUNTER_LEN] = *b"counter 12 b";

fn slot(id: u64) -> SlotId {
    SlotId::new(id).expect("a legal id")
}

fn header(context: &[u8]) -> Header {
    Header {
        slot: slot(7),
        kind: Kind::Text,
        context_bound: !context.is_empty(),
    }
}

fn seal(key: &XaesKey, context: &[u8], payload: &[u8]) -> Vec<u8> {
    cipher::seal_envelope(key, header(context), &SALT, &COUNTER, context, payload)
}

/// The format again, written down from the design and the independent crate.
fn open_independently(key: &[u8; 32], context: &[u8], envelope: &[u8]) -> Option<Vec<u8>> {
    let mut aad = envelope[..10].to_vec();
    if envelope[1] & 0x10 != 0 {
        aad.extend_from_slice(&u32::try_from(context.len()).expect("short").to_be_bytes());
        aad.extend_from_slice(context);
    }
    let nonce: &[u8; NONCE_LEN] = envelope[10..34].try_into().expect("24 bytes");
    let payload = Payload {
        msg: &envelope[34..],
        aad: &aad,
    };
    Xaes256Gcm::new(key.into())
        .decrypt(nonce.into(), payload)
        .ok()
}

proptest! {
    #[test]
    fn what_was_sealed_opens(key: [u8; 32], context: Vec<u8>, payload: Vec<u8>) {
        let key = XaesKey::new(&key);
        let envelope = seal(&key, &context, &payload);
        prop_assert_eq!(cipher::open_envelope(&key, &context, &envelope), Ok(payload));
    }

    #[test]
    fn the_independent_crate_opens_what_we_seal(
        key: [u8; 32],
        context in proptest::collection::vec(any::<u8>(), 0..600),
        payload in proptest::collection::vec(any::<u8>(), 0..3000),
        salt: [u8; SALT_LEN],
        counter: [u8; COUNTER_LEN],
    ) {
        let envelope = cipher::seal_envelope(
            &XaesKey::new(&key), header(&context), &salt, &counter, &context, &payload,
        );
        prop_assert_eq!(open_independently(&key, &context, &envelope), Some(payload));
    }

    #[test]
    fn another_key_or_context_does_not_open(
        key: [u8; 32], other: [u8; 32], context in ".{1,40}", wrong in ".{1,40}",
    ) {
        let envelope = seal(&XaesKey::new(&key), context.as_bytes(), b"value");
        let failed = Err(OpenEnvelopeError::Open(OpenError));
        if key != other {
            let other = XaesKey::new(&other);
            prop_assert_eq!(
                cipher::open_envelope(&other, context.as_bytes(), &envelope), failed.clone()
            );
        }
        if context != wrong {
            let key = XaesKey::new(&key);
            prop_assert_eq!(cipher::open_envelope(&key, wrong.as_bytes(), &envelope), failed);
        }
    }

    #[test]
    fn wrapped_keys_unwrap(root: [u8; 32], dek: [u8; 32], id in 1..1u64 << 63, name in ".{1,60}") {
        let root = RootKey::from_slice(&root).expect("32 bytes");
        let dek = Dek::from_slice(&dek).expect("32 bytes");
        let wrapped = root.wrap(&dek, slot(id), &name).expect("the generator works");
        let unwrapped = root.unwrap(&wrapped, slot(id), &name);
        prop_assert_eq!(unwrapped.map(|unwrapped| *unwrapped.expose()), Ok(*dek.expose()));
    }
}

#[test]
fn no_bit_can_be_flipped() {
    let key = XaesKey::new(&[9; 32]);
    for context in [&b""[..], b"customer.email:42"] {
        let genuine = seal(
            &key,
            context,
            b"a value of several blocks of AES, as one sees them",
        );
        for bit in 0..genuine.len() * 8 {
            let mut altered = genuine.clone();
            altered[bit / 8] ^= 1 << (bit % 8);
            // With the context and without: a flipped context bit gains nothing either.
            for context in [context, b"", b"c"] {
                let opened = cipher::open_envelope(&key, context, &altered);
                assert!(opened.is_err(), "bit {bit} flipped, context {context:?}");
            }
        }
        assert!(cipher::open_envelope(&key, context, &genuine).is_ok());
    }
}

#[test]
fn nothing_can_be_cut_off_or_added() {
    let key = XaesKey::new(&[9; 32]);
    for context in [&b""[..], b"customer.email:42"] {
        let genuine = seal(
            &key,
            context,
            b"a value of several blocks of AES, as one sees them",
        );
        for len in 0..genuine.len() {
            assert!(
                cipher::open_envelope(&key, context, &genuine[..len]).is_err(),
                "{len} bytes"
            );
            assert!(cipher::open_envelope(&key, context, &genuine[len..][1..]).is_err());
            let mut longer = genuine.clone();
            longer.insert(len, 0);
            assert!(
                cipher::open_envelope(&key, context, &longer).is_err(),
                "a byte at {len}"
            );
        }
    }
}

#[test]
fn a_context_is_required_exactly_when_it_is_bound() {
    let key = XaesKey::new(&[9; 32]);
    let (bound, unbound) = (seal(&key, b"c", b"v"), seal(&key, b"", b"v"));
    assert_eq!(
        cipher::open_envelope(&key, b"", &bound),
        Err(OpenEnvelopeError::ContextMissing)
    );
    assert_eq!(
        cipher::open_envelope(&key, b"c", &unbound),
        Err(OpenEnvelopeError::ContextUnexpected)
    );
}

#[test]
fn contexts_and_headers_do_not_run_into_each_other() {
    // The length in the associated data: a context that is a prefix of another, or that continues
    // where one ends, is another context.
    let key = XaesKey::new(&[9; 32]);
    let envelope = seal(&key, b"ab", b"v");
    for context in [&b"a"[..], b"abc", b"ab\0", b"\0ab", b"\0\0\0\x02ab"] {
        assert!(
            cipher::open_envelope(&key, context, &envelope).is_err(),
            "{context:?}"
        );
    }
}

#[test]
fn counters_count_up_as_one_96_bit_number() {
    let cases: [([u8; 12], [u8; 12]); 4] = [
        (be96((1 << 32) - 1), be96(1 << 32)),
        (be96((1 << 64) - 1), be96(1 << 64)),
        (be96((1 << 96) - 1), be96(0)),
        (be96(0), be96(1)),
    ];
    let key = XaesKey::new(&[1; 32]);
    for (first, second) in cases {
        let mut state = SealState::with_parts(&key, SALT, first);
        assert_eq!(state.salt(), &SALT);
        for counter in [first, second] {
            assert_eq!(state.next(5), counter);
            // Every counter seals and opens, also where GCM's own block counter could be confused.
            let header = header(b"").to_bytes();
            let mut buf = *b"value";
            let tag = state
                .subkey()
                .seal_in_place(&counter, &header, b"", &mut buf);
            let reopened = key.subkey(&SALT);
            assert_eq!(
                reopened.open_in_place(&counter, &header, b"", &mut buf, &tag),
                Ok(())
            );
            assert_eq!(&buf, b"value");
        }
    }
}

fn be96(number: u128) -> [u8; 12] {
    number.to_be_bytes()[4..].try_into().expect("12 bytes")
}

#[test]
fn a_salt_serves_65536_values() {
    let key = XaesKey::new(&[1; 32]);
    let mut state = SealState::new(&key).expect("the generator works");
    let mut counters = std::collections::HashSet::new();
    for _ in 0..1 << 16 {
        assert!(state.fits(1));
        assert!(counters.insert(state.next(1)), "a counter came twice");
    }
    assert!(!state.fits(1));
    assert!(!state.fits(0), "an empty value is a value");
}

#[test]
fn a_salt_serves_4_gib() {
    const GIB: usize = 1 << 30;
    let key = XaesKey::new(&[1; 32]);
    let mut state = SealState::with_parts(&key, SALT, COUNTER);
    for _ in 0..3 {
        assert!(state.fits(GIB));
        state.next(GIB);
    }
    assert!(state.fits(GIB), "the limit itself is within");
    assert!(
        !state.fits(GIB + 1),
        "the salt changes before the value that would pass it"
    );
    state.next(GIB - 1);
    assert!(state.fits(1));
    assert!(!state.fits(2));
    state.next(1);
    assert!(!state.fits(1));
    assert!(state.fits(0), "an empty value adds no byte");
    assert!(!state.fits(usize::MAX), "no overflow");
}

#[test]
fn states_start_anew() {
    let key = XaesKey::new(&[1; 32]);
    let mut first = SealState::new(&key).expect("the generator works");
    let mut second = SealState::new(&key).expect("the generator works");
    assert_ne!(first.salt(), second.salt());
    assert_ne!(first.next(0), second.next(0));
}

#[test]
fn a_wrapped_key_is_bound_to_root_key_slot_and_name() {
    let root = RootKey::from_slice(&[3; 32]).expect("32 bytes");
    let dek = Dek::from_slice(&[4; 32]).expect("32 bytes");
    let wrapped = root
        .wrap(&dek, slot(5), "pii")
        .expect("the generator works");
    let other = RootKey::from_slice(&[2; 32]).expect("32 bytes");
    assert!(root.unwrap(&wrapped, slot(5), "pii").is_ok());
    assert!(other.unwrap(&wrapped, slot(5), "pii").is_err());
    assert!(root.unwrap(&wrapped, slot(6), "pii").is_err());
    assert!(root.unwrap(&wrapped, slot(5), "pi").is_err());
    assert!(root.unwrap(&wrapped, slot(5), "piii").is_err());
    for bit in 0..wrapped.len() * 8 {
        let mut altered = wrapped;
        altered[bit / 8] ^= 1 << (bit % 8);
        assert!(
            root.unwrap(&altered, slot(5), "pii").is_err(),
            "bit {bit} flipped"
        );
    }
    for len in 0..wrapped.len() {
        assert!(
            root.unwrap(&wrapped[..len], slot(5), "pii").is_err(),
            "{len} bytes"
        );
    }
    assert!(
        root.unwrap(&[&wrapped[..], b"\0"].concat(), slot(5), "pii")
            .is_err()
    );
}

#[test]
fn wrapping_twice_repeats_no_nonce() {
    let root = RootKey::generate().expect("the generator works");
    let dek = Dek::generate().expect("the generator works");
    let wrap = || {
        root.wrap(&dek, slot(5), "pii")
            .expect("the generator works")
    };
    assert_ne!(wrap()[1..25], wrap()[1..25]);
}

#[test]
fn check_values_tell_keys_and_slots_apart() {
    let dek = Dek::from_slice(&[4; 32]).expect("32 bytes");
    let other = Dek::from_slice(&[5; 32]).expect("32 bytes");
    let check = dek.check_value(slot(1));
    assert!(dek.matches_check_value(slot(1), &check));
    assert!(!dek.matches_check_value(slot(2), &check));
    assert!(!other.matches_check_value(slot(1), &check));
    assert!(!dek.matches_check_value(slot(1), &check[..31]));
    assert!(!dek.matches_check_value(slot(1), b""));
    for bit in 0..256 {
        let mut altered = check;
        altered[bit / 8] ^= 1 << (bit % 8);
        assert!(
            !dek.matches_check_value(slot(1), &altered),
            "bit {bit} flipped"
        );
    }
}

#[test]
fn fingerprints_tell_slot_context_and_value_apart() {
    let key = Dek::from_slice(&[4; 32])
        .expect("32 bytes")
        .fingerprint_key();
    let other = Dek::from_slice(&[5; 32])
        .expect("32 bytes")
        .fingerprint_key();
    let all = [
        key.fingerprint(slot(1), b"", b"ab"),
        key.fingerprint(slot(2), b"", b"ab"),
        key.fingerprint(slot(1), b"a", b"b"),
        key.fingerprint(slot(1), b"ab", b""),
        other.fingerprint(slot(1), b"", b"ab"),
    ];
    for (at, one) in all.iter().enumerate() {
        assert!(
            all[at + 1..]
                .iter()
                .all(|other| !fingerprints_equal(one, other)),
            "fingerprint {at} came twice"
        );
    }
    let again = key.fingerprint(slot(1), b"", b"ab");
    assert!(fingerprints_equal(&all[0], &again), "deterministic");
    assert_eq!(all[1][..8], slot(2).to_be_bytes());
}

#[test]
fn only_40_bytes_with_a_slot_id_in_front_are_a_fingerprint() {
    let key = Dek::from_slice(&[4; 32])
        .expect("32 bytes")
        .fingerprint_key();
    let mut fingerprint = key.fingerprint(slot(7), b"", b"v");
    assert_eq!(fingerprint_slot(&fingerprint), Some(slot(7)));
    assert_eq!(fingerprint_slot(&fingerprint[..39]), None);
    assert_eq!(
        fingerprint_slot(&[&fingerprint[..], &[0][..]].concat()),
        None
    );
    fingerprint[0] |= 0x80;
    assert_eq!(fingerprint_slot(&fingerprint), None, "top bit");
    fingerprint[..8].fill(0);
    assert_eq!(fingerprint_slot(&fingerprint), None, "slot id 0");
}

#[test]
fn keys_have_exactly_32_bytes() {
    for len in [0, 16, 31, 33, 64] {
        assert!(Dek::from_slice(&vec![0; len]).is_none());
        assert!(RootKey::from_slice(&vec![0; len]).is_none());
    }
}

#[test]
fn generated_keys_differ() {
    let deks = [Dek::generate(), Dek::generate()].map(|dek| dek.expect("the generator works"));
    assert_ne!(deks[0].expose(), deks[1].expose());
    let roots = [RootKey::generate(), RootKey::generate()].map(|key| key.expect("it works"));
    assert_ne!(roots[0].id(), roots[1].id());
}

#[test]
fn root_ids_have_one_text() {
    let id = RootKey::from_slice(&[3; 32]).expect("32 bytes").id();
    let text = id.to_string();
    assert_eq!(text.len(), 32);
    assert_eq!(RootId::parse(&text), Some(id));
    assert_eq!(RootId::from_slice(id.as_bytes()), Some(id));
    assert_eq!(format!("{id:?}"), text);
    assert_eq!(
        RootId::parse("00000000000000000000000000000ABC"),
        None,
        "upper case"
    );
    assert_eq!(RootId::parse(&text[1..]), None);
    assert_eq!(RootId::parse(&format!("{text}0")), None);
    assert_eq!(RootId::parse(&format!(" {}", &text[1..])), None);
    assert_eq!(RootId::parse("é".repeat(16).as_str()), None);
    assert_eq!(RootId::from_slice(&[0; 15]), None);
}

/// Whether a type implements a trait: the inherent constant wins where its bound holds.
macro_rules! implements {
    ($type:ty: $trait:path) => {{
        #[allow(dead_code)]
        trait Otherwise {
            const HOLDS: bool = false;
        }
        impl<T> Otherwise for T {}
        struct Probe<T>(std::marker::PhantomData<T>);
        #[allow(dead_code)]
        impl<T: $trait> Probe<T> {
            const HOLDS: bool = true;
        }
        Probe::<$type>::HOLDS
    }};
}

#[test]
fn secrets_cannot_be_printed_copied_or_compared() {
    assert!(implements!(RootId: std::fmt::Debug), "the probe works");
    macro_rules! secret {
        ($type:ty) => {
            assert!(!implements!($type: std::fmt::Debug));
            assert!(!implements!($type: std::fmt::Display));
            assert!(!implements!($type: Clone));
            assert!(!implements!($type: PartialEq));
        };
    }
    secret!(Dek);
    secret!(RootKey);
    secret!(XaesKey);
    secret!(Subkey);
    secret!(SealState);
}
