//! The bytes of an envelope: what parses, what is refused and why, and that nothing is guessed.
//!
//! Run by `cargo test -p rekey-core`. Every refusal of the format has a case here that fails when
//! the check is removed; the round trips hold for arbitrary headers and payloads.

use proptest::prelude::*;
use rekey_core::envelope::{
    self, CIPHERTEXT_AT, Envelope, EnvelopeError, HEADER_LEN, Header, Kind, OVERHEAD, SlotId,
};

fn slot(id: u64) -> SlotId {
    SlotId::new(id).expect("a legal id")
}

fn header() -> [u8; HEADER_LEN] {
    Header {
        slot: slot(0x0102_0304_0506_0708),
        kind: Kind::Text,
        context_bound: false,
    }
    .to_bytes()
}

#[test]
fn the_header_is_laid_out_as_published() {
    assert_eq!(header(), [0xF9, 0x01, 1, 2, 3, 4, 5, 6, 7, 8]);
    let typed = Header {
        slot: slot(1),
        kind: Kind::Typed,
        context_bound: true,
    };
    assert_eq!(typed.to_bytes(), [0xF9, 0x91, 0, 0, 0, 0, 0, 0, 0, 1]);
    let bytea = Header {
        slot: slot((1 << 63) - 1),
        kind: Kind::Bytea,
        context_bound: false,
    };
    assert_eq!(
        bytea.to_bytes(),
        [0xF9, 0x41, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]
    );
}

#[test]
fn the_overhead_is_fifty_bytes() {
    assert_eq!((OVERHEAD, CIPHERTEXT_AT, HEADER_LEN), (50, 34, 10));
}

#[test]
fn only_the_format_byte_of_this_version_is_read() {
    for first in 0..=u8::MAX {
        let mut bytes = header();
        bytes[0] = first;
        let expected = match first {
            0xF9 => None,
            0xF8..=0xFF => Some(EnvelopeError::UnknownFormat(first - 0xF8)),
            _ => Some(EnvelopeError::NotAnEnvelope { first: Some(first) }),
        };
        assert_eq!(
            Header::parse(&bytes).err(),
            expected,
            "first byte {first:#04x}"
        );
    }
    assert_eq!(
        Header::parse(b""),
        Err(EnvelopeError::NotAnEnvelope { first: None })
    );
}

#[test]
fn no_utf8_text_begins_like_an_envelope() {
    for first in 0xF8..=0xFF {
        assert!(str::from_utf8(&[first, 0x80, 0x80, 0x80, 0x80]).is_err());
    }
}

#[test]
fn every_flag_byte_is_read_exactly_or_refused() {
    for flags in 0..=u8::MAX {
        let mut bytes = header();
        bytes[1] = flags;
        let parsed = Header::parse(&bytes);
        if flags & 0x0F != 1 {
            assert_eq!(parsed, Err(EnvelopeError::UnknownSuite(flags & 0x0F)));
        } else if flags & 0x20 != 0 {
            assert_eq!(parsed, Err(EnvelopeError::ReservedBit));
        } else if flags >> 6 == 3 {
            assert_eq!(parsed, Err(EnvelopeError::UnknownKind));
        } else {
            let parsed = parsed.expect("a legal flag byte");
            assert_eq!(parsed.context_bound, flags & 0x10 != 0);
            assert_eq!(parsed.to_bytes(), bytes);
        }
    }
}

#[test]
fn slot_ids_are_63_bit_and_not_zero() {
    for (id, legal) in [
        (0, false),
        (1, true),
        ((1 << 63) - 1, true),
        (1 << 63, false),
    ] {
        let mut bytes = header();
        bytes[2..].copy_from_slice(&u64::to_be_bytes(id));
        let parsed = Header::parse(&bytes).map(|header| header.slot.get());
        assert_eq!(
            parsed,
            if legal {
                Ok(id)
            } else {
                Err(EnvelopeError::BadSlotId)
            }
        );
        assert_eq!(SlotId::new(id).is_some(), legal);
    }
    assert_eq!(SlotId::new(u64::MAX), None);
    for (id, legal) in [
        (i64::MIN, false),
        (-1, false),
        (0, false),
        (1, true),
        (i64::MAX, true),
    ] {
        assert_eq!(
            SlotId::from_i64(id).map(SlotId::as_i64),
            legal.then_some(id)
        );
    }
    assert_eq!(slot(42).to_string(), "42");
}

#[test]
fn random_slot_ids_are_legal_and_differ() {
    let mut ids: Vec<_> = (0..1000)
        .map(|_| SlotId::random().expect("the system's generator works"))
        .collect();
    assert!(ids.iter().all(|id| id.as_i64() > 0));
    // A generator that left the top bits clear would make collisions likely.
    assert!(ids.iter().any(|id| id.get() >> 62 == 1));
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 1000);
}

#[test]
fn every_length_below_the_overhead_is_truncated() {
    let mut bytes = header().to_vec();
    bytes.resize(OVERHEAD, 0);
    assert!(Envelope::parse(&bytes).is_ok());
    for len in 1..OVERHEAD {
        assert_eq!(
            Envelope::parse(&bytes[..len]),
            Err(EnvelopeError::Truncated { len })
        );
    }
    for len in 1..HEADER_LEN {
        assert_eq!(
            Header::parse(&bytes[..len]),
            Err(EnvelopeError::Truncated { len })
        );
    }
    assert!(
        Header::parse(&bytes[..HEADER_LEN]).is_ok(),
        "a header needs nothing behind it"
    );
}

#[test]
fn a_typed_payload_needs_a_name() {
    let malformed = Err(EnvelopeError::MalformedTyped);
    assert_eq!(envelope::split_typed(b""), malformed);
    assert_eq!(envelope::split_typed(b"\0"), malformed);
    assert_eq!(envelope::split_typed(b"\0\0"), malformed, "an empty name");
    assert_eq!(
        envelope::split_typed(b"\0\0value"),
        malformed,
        "an empty name"
    );
    assert_eq!(
        envelope::split_typed(b"\0\x05int4"),
        malformed,
        "a name longer than the payload"
    );
    assert_eq!(
        envelope::split_typed(b"\0\x01\xFF42"),
        malformed,
        "a name that is not UTF-8"
    );
    assert_eq!(
        envelope::split_typed(b"\0\x04int442"),
        Ok(("int4", &b"42"[..]))
    );
    assert_eq!(
        envelope::split_typed(b"\0\x04int4"),
        Ok(("int4", &b""[..])),
        "an empty value"
    );
}

#[test]
fn type_names_have_1_to_65535_bytes() {
    assert_eq!(envelope::typed_prefix("int4"), Some(b"\0\x04int4".to_vec()));
    assert_eq!(envelope::typed_prefix(""), None);
    assert!(envelope::typed_prefix(&"n".repeat(65_535)).is_some());
    assert_eq!(envelope::typed_prefix(&"n".repeat(65_536)), None);
}

#[test]
fn details_show_no_byte_of_what_is_not_an_envelope() {
    let detail = EnvelopeError::NotAnEnvelope { first: Some(b'x') }.detail();
    assert!(
        !detail.contains("78") && !detail.contains("120"),
        "{detail}"
    );
    assert!(EnvelopeError::Truncated { len: 49 }.detail().contains("49"));
    assert!(
        EnvelopeError::UnknownFormat(2)
            .detail()
            .contains("format 2")
    );
    assert!(EnvelopeError::UnknownSuite(2).detail().contains("suite 2"));
}

fn any_header() -> impl Strategy<Value = Header> {
    let kinds = prop_oneof![Just(Kind::Text), Just(Kind::Bytea), Just(Kind::Typed)];
    (1..1u64 << 63, kinds, any::<bool>()).prop_map(|(id, kind, context_bound)| Header {
        slot: slot(id),
        kind,
        context_bound,
    })
}

proptest! {
    #[test]
    fn headers_survive_their_bytes(header in any_header(), tail: Vec<u8>) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(&tail);
        prop_assert_eq!(Header::parse(&bytes), Ok(header));
    }

    #[test]
    fn the_parts_of_an_envelope_are_its_bytes(
        header in any_header(),
        body in proptest::collection::vec(any::<u8>(), OVERHEAD - HEADER_LEN..300),
    ) {
        let bytes = [&header.to_bytes()[..], &body].concat();
        let parsed = Envelope::parse(&bytes).expect("long enough");
        prop_assert_eq!(parsed.header, header);
        prop_assert_eq!(parsed.ciphertext.len(), bytes.len() - OVERHEAD);
        let parts = [
            &parsed.header_bytes[..], parsed.salt, parsed.counter, parsed.ciphertext, parsed.tag,
        ];
        prop_assert_eq!(parts.concat(), bytes);
    }

    #[test]
    fn what_parses_is_canonical(bytes: [u8; HEADER_LEN]) {
        if let Ok(header) = Header::parse(&bytes) {
            prop_assert_eq!(header.to_bytes(), bytes);
        }
    }

    #[test]
    fn typed_payloads_split_where_they_were_joined(name in ".{1,80}", value: Vec<u8>) {
        let mut payload = envelope::typed_prefix(&name).expect("a short name");
        payload.extend_from_slice(&value);
        prop_assert_eq!(envelope::split_typed(&payload), Ok((&name[..], &value[..])));
    }
}
