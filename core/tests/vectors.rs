//! The published vectors, `tests/vectors/*.json`: made here, and checked here twice.
//!
//! Run by `cargo test -p rekey-core`. Each file is compared with what this version makes of the
//! same inputs, then read back and judged by the implementation and, for all that is encrypted, by
//! the crate `xaes-256-gcm` under associated data written down anew from the design. To write the
//! files again: `REKEY_WRITE_VECTORS=1 cargo test -p rekey-core --test vectors`. A change of a file
//! that is already released is a change of the format.

use std::fs;
use std::path::PathBuf;

use hmac::{Hmac, KeyInit, Mac};
use rekey_core::cipher::{
    self, Dek, OpenEnvelopeError, RootId, RootKey, XaesKey, fingerprint_slot,
};
use rekey_core::envelope::{self, Envelope, Header, Kind, SlotId};
use rekey_core::root_keyring::RootKeyring;
use serde_json::{Value, json};
use sha2::Sha256;
use xaes_256_gcm::Xaes256Gcm;
use xaes_256_gcm::aead::{Aead, Payload};

#[test]
fn the_files_are_what_this_version_makes() {
    for (name, vectors) in [
        ("envelopes", envelopes()),
        ("envelopes_refused", envelopes_refused()),
        ("wrapped_keys", wrapped_keys()),
        ("wrapped_keys_refused", wrapped_keys_refused()),
        ("check_values", check_values()),
        ("check_values_refused", check_values_refused()),
        ("root_keys", root_keys()),
        ("fingerprints", fingerprints()),
        ("keyrings", keyrings()),
        ("keyrings_refused", keyrings_refused()),
    ] {
        let made = format!("{:#}\n", Value::from(vectors));
        if std::env::var_os("REKEY_WRITE_VECTORS").is_some() {
            fs::write(path(name), &made).expect("tests/vectors is writable");
        }
        let published = fs::read_to_string(path(name)).expect("published vectors");
        assert!(
            published == made,
            "{name}.json is not what this version makes"
        );
    }
}

#[test]
fn published_envelopes_open() {
    let vectors = read("envelopes");
    assert!(vectors.len() >= 12);
    for vector in vectors {
        let name = text(&vector, "name");
        let (dek, bytes) = (dek(&vector), hex(&vector, "envelope"));
        let context = context(&vector);
        let header = Header::parse(&bytes).expect(name);
        assert_eq!(header.kind.name(), text(&vector, "kind"), "{name}");
        assert_eq!(header.slot, slot(&vector), "{name}");
        let payload = cipher::open_envelope(&dek.cipher(), context, &bytes).expect(name);
        assert_eq!(payload, hex(&vector, "payload"), "{name}");
        match header.kind {
            Kind::Text => assert_eq!(payload, text(&vector, "value").as_bytes(), "{name}"),
            Kind::Bytea => assert_eq!(payload, hex(&vector, "value"), "{name}"),
            Kind::Typed => {
                let typed = (text(&vector, "type"), text(&vector, "value").as_bytes());
                assert_eq!(envelope::split_typed(&payload), Ok(typed), "{name}");
            }
        }
        assert_eq!(
            open_independently(dek.expose(), context, &bytes),
            Some(payload),
            "{name}"
        );
    }
}

#[test]
fn refused_envelopes_do_not_open() {
    let vectors = read("envelopes_refused");
    assert!(vectors.len() >= 12);
    for vector in vectors {
        let (dek, bytes) = (dek(&vector), hex(&vector, "envelope"));
        let opened = cipher::open_envelope(&dek.cipher(), context(&vector), &bytes);
        let typed = |payload: Vec<u8>| {
            let kind = Header::parse(&bytes).map(|header| header.kind);
            match kind {
                Ok(Kind::Typed) => envelope::split_typed(&payload).map(|_| ()),
                other => other.map(|_| ()),
            }
        };
        let error =
            match opened.and_then(|payload| typed(payload).map_err(OpenEnvelopeError::Envelope)) {
                Ok(()) => "opened",
                Err(OpenEnvelopeError::Envelope(_)) => "22P03",
                Err(OpenEnvelopeError::ContextMissing | OpenEnvelopeError::ContextUnexpected) => {
                    "22023"
                }
                Err(OpenEnvelopeError::Open(_)) => "39000",
            };
        assert_eq!(error, text(&vector, "error"), "{}", text(&vector, "name"));
        if error == "39000" {
            assert_eq!(
                open_independently(dek.expose(), context(&vector), &bytes),
                None
            );
        }
    }
}

#[test]
fn published_wrapped_keys_unwrap() {
    for vector in read("wrapped_keys") {
        let (root, wrapped) = (root_key(&vector), hex(&vector, "wrapped_key"));
        let (slot, name) = (slot(&vector), text(&vector, "key_name"));
        let unwrapped = root.unwrap(&wrapped, slot, name).expect("a genuine wrap");
        assert_eq!(unwrapped.expose()[..], hex(&vector, "dek"));

        let root_id = RootId::parse(text(&vector, "root_id")).expect("a root id");
        assert_eq!(root.id(), root_id);
        let len = u32::try_from(name.len()).expect("short").to_be_bytes();
        let aad = [
            b"pg_rekey/v1/dek\0",
            &root_id.as_bytes()[..],
            &slot.get().to_be_bytes(),
            &len,
            name.as_bytes(),
        ]
        .concat();
        assert_eq!((wrapped.len(), wrapped[0]), (73, 1));
        let nonce: &[u8; 24] = wrapped[1..25].try_into().expect("24 bytes");
        let payload = Payload {
            msg: &wrapped[25..],
            aad: &aad,
        };
        let dek = Xaes256Gcm::new(root.expose().into()).decrypt(nonce.into(), payload);
        assert_eq!(dek.ok(), Some(hex(&vector, "dek")));
    }
}

#[test]
fn refused_wrapped_keys_do_not_unwrap() {
    for vector in read("wrapped_keys_refused") {
        let (root, wrapped) = (root_key(&vector), hex(&vector, "wrapped_key"));
        let unwrapped = root.unwrap(&wrapped, slot(&vector), text(&vector, "key_name"));
        assert!(unwrapped.is_err(), "{}", text(&vector, "name"));
    }
}

#[test]
fn published_check_values_match() {
    for vector in read("check_values") {
        let (dek, slot, check) = (dek(&vector), slot(&vector), hex(&vector, "check_value"));
        assert!(dek.matches_check_value(slot, &check));
        let message = [b"pg_rekey/v1/slot-check\0", &slot.get().to_be_bytes()[..]].concat();
        assert_eq!(hmac(dek.expose(), &message), check);
    }
    for vector in read("check_values_refused") {
        let (dek, slot, check) = (dek(&vector), slot(&vector), hex(&vector, "check_value"));
        assert!(
            !dek.matches_check_value(slot, &check),
            "{}",
            text(&vector, "name")
        );
    }
}

#[test]
fn published_root_keys_have_their_ids() {
    for vector in read("root_keys") {
        let key = root_key(&vector);
        assert_eq!(key.id().to_string(), text(&vector, "root_id"));
        assert_eq!(key.check()[..], hex(&vector, "root_check"));
        assert_eq!(
            hmac(key.expose(), b"pg_rekey/v1/root-id")[..16],
            hex(&vector, "root_id")
        );
        assert_eq!(
            hmac(key.expose(), b"pg_rekey/v1/root-check"),
            hex(&vector, "root_check")
        );
    }
}

#[test]
fn published_fingerprints_are_reproduced() {
    for vector in read("fingerprints") {
        let (dek, slot, context) = (dek(&vector), slot(&vector), context(&vector));
        let value = text(&vector, "value").as_bytes();
        let published = hex(&vector, "fingerprint");
        let key = dek.fingerprint_key();
        assert_eq!(key.fingerprint(slot, context, value)[..], published);
        assert_eq!(fingerprint_slot(&published), Some(slot));
        let len = u32::try_from(context.len()).expect("short").to_be_bytes();
        let message = [b"pg_rekey/v1/fingerprint\0", &len[..], context, value].concat();
        assert_eq!(published[..8], slot.get().to_be_bytes());
        assert_eq!(hmac(dek.expose(), &message), published[8..]);
    }
}

#[test]
fn published_keyrings_are_read_or_refused() {
    for vector in read("keyrings") {
        let keyring = RootKeyring::parse(text(&vector, "keyring").as_bytes()).expect("a keyring");
        let ids: Vec<Value> = keyring.ids().map(|id| id.to_string().into()).collect();
        assert_eq!(Value::from(ids), vector["root_ids"]);
    }
    let refused = read("keyrings_refused");
    assert!(refused.len() >= 12);
    for vector in refused {
        let parsed = RootKeyring::parse(text(&vector, "keyring").as_bytes());
        assert!(parsed.is_err(), "{}", text(&vector, "name"));
    }
}

// The inputs. All secrets are patterns: nobody takes them for keys of his own.

/// A pattern of 32 bytes: seed, seed + 1, ...
fn pattern(seed: u8) -> [u8; 32] {
    std::array::from_fn(|at| seed.wrapping_add(u8::try_from(at).expect("below 32")))
}

const SALT: [u8; 12] = *b"\xa0\xa1\xa2\xa3\xa4\xa5\xa6\xa7\xa8\xa9\xaa\xab";
const COUNTER: [u8; 12] = *b"\xc0\xc1\xc2\xc3\xc4\xc5\xc6\xc7\xc8\xc9\xca\xcb";
const SLOT: u64 = 0x0123_4567_89ab_cdef;

/// What goes into one envelope; the defaults are changed case by case.
#[derive(Clone)]
struct Case {
    dek: [u8; 32],
    slot: u64,
    kind: Kind,
    salt: [u8; 12],
    counter: [u8; 12],
    context: Option<String>,
    type_name: Option<&'static str>,
    value: Vec<u8>,
}

impl Case {
    fn text(value: &str) -> Self {
        Case {
            dek: pattern(0x01),
            slot: SLOT,
            kind: Kind::Text,
            salt: SALT,
            counter: COUNTER,
            context: None,
            type_name: None,
            value: value.as_bytes().to_vec(),
        }
    }

    fn bytea(value: &[u8]) -> Self {
        Case {
            kind: Kind::Bytea,
            value: value.to_vec(),
            ..Case::text("")
        }
    }

    fn typed(type_name: &'static str, value: &str) -> Self {
        Case {
            kind: Kind::Typed,
            type_name: Some(type_name),
            ..Case::text(value)
        }
    }

    fn bound(self, context: &str) -> Self {
        Case {
            context: Some(context.to_owned()),
            ..self
        }
    }

    fn payload(&self) -> Vec<u8> {
        let prefix = self
            .type_name
            .map(|name| envelope::typed_prefix(name).expect("a type name"));
        [&prefix.unwrap_or_default()[..], &self.value].concat()
    }

    fn seal(&self) -> Vec<u8> {
        let header = Header {
            slot: SlotId::new(self.slot).expect("a legal id"),
            kind: self.kind,
            context_bound: self.context.is_some(),
        };
        let context = self.context.as_deref().unwrap_or_default().as_bytes();
        let key = XaesKey::new(&self.dek);
        cipher::seal_envelope(
            &key,
            header,
            &self.salt,
            &self.counter,
            context,
            &self.payload(),
        )
    }

    fn vector(&self, name: &str) -> Value {
        let value = match self.kind {
            Kind::Bytea => to_hex(&self.value),
            _ => String::from_utf8(self.value.clone()).expect("text"),
        };
        let mut vector = json!({
            "name": name,
            "dek": to_hex(&self.dek),
            "slot_id": self.slot.to_string(),
            "kind": self.kind.name(),
            "context": self.context,
            "value": value,
            "payload": to_hex(&self.payload()),
            "envelope": to_hex(&self.seal()),
        });
        if let Some(type_name) = self.type_name {
            vector["type"] = type_name.into();
        }
        vector
    }
}

fn envelopes() -> Vec<Value> {
    let other_dek = |case: Case| Case {
        dek: pattern(0xe0),
        ..case
    };
    let cases = [
        ("text", Case::text("hello")),
        ("empty text", Case::text("")),
        ("text beyond ASCII", Case::text("Grüße, 世界 🔑")),
        (
            "text that is not normalised",
            Case::text("e\u{301} and \u{e9}"),
        ),
        ("text of one AES block", Case::text("0123456789abcdef")),
        (
            "text of several blocks",
            Case::text(&"The quick brown fox. ".repeat(20)),
        ),
        (
            "text, context",
            Case::text("a@example.com").bound("customer.email"),
        ),
        (
            "text, context of rekey.context('customer.email', '42')",
            Case::text("a@example.com").bound("14:customer.email,2:42,"),
        ),
        (
            "text, context beyond ASCII",
            Case::text("hello").bound("ключ/名前"),
        ),
        (
            "text, long context",
            Case::text("hello").bound(&"context ".repeat(64)),
        ),
        ("empty text, context", Case::text("").bound("c")),
        ("bytea", Case::bytea(b"\x00\x01\x7f\x80\xfe\xff")),
        ("empty bytea", Case::bytea(b"")),
        (
            "bytea, context",
            Case::bytea(&pattern(0xf8)).bound("document.body"),
        ),
        (
            "bytea that is an envelope",
            Case::bytea(&Case::text("inside").seal()),
        ),
        ("numeric", Case::typed("numeric", "12.50")),
        (
            "timestamptz, context",
            Case::typed("timestamptz", "2025-01-31 12:00:00+00").bound("t"),
        ),
        (
            "array of numeric",
            Case::typed("_numeric", "{1.5,NULL,NaN}"),
        ),
        (
            "type outside pg_catalog",
            Case::typed("public.\"Mood\"", "très content"),
        ),
        ("typed value of empty text", Case::typed("tsvector", "")),
        (
            "smallest slot id",
            Case {
                slot: 1,
                ..Case::text("hello")
            },
        ),
        (
            "largest slot id",
            Case {
                slot: (1 << 63) - 1,
                ..Case::text("hello")
            },
        ),
        (
            "nonce of zeros",
            Case {
                salt: [0; 12],
                counter: [0; 12],
                ..Case::text("hello")
            },
        ),
        (
            "counter before the wrap",
            Case {
                counter: [0xff; 12],
                ..Case::text("hello")
            },
        ),
        ("another DEK", other_dek(Case::text("hello"))),
        (
            "another DEK, context",
            other_dek(Case::bytea(b"\xff").bound("c")),
        ),
    ];
    cases.map(|(name, case)| case.vector(name)).to_vec()
}

fn envelopes_refused() -> Vec<Value> {
    let unbound = Case::text("hello");
    let bound = Case::text("hello").bound("customer.email");
    let mut vectors = Vec::new();
    let mut refuse = |name: &str, error: &str, context: Option<&str>, envelope: &[u8]| {
        vectors.push(json!({
            "name": name,
            "dek": to_hex(&unbound.dek),
            "context": context,
            "envelope": to_hex(envelope),
            "error": error,
        }));
    };
    let with = |case: &Case, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = case.seal();
        change(&mut bytes);
        bytes
    };

    refuse("empty", "22P03", None, b"");
    refuse(
        "text",
        "22P03",
        None,
        "a value that was never sealed, and not a short one".as_bytes(),
    );
    for (name, first) in [("format 0", 0xf8), ("format 2", 0xfa), ("format 7", 0xff)] {
        refuse(
            name,
            "22P03",
            None,
            &with(&unbound, &|bytes| bytes[0] = first),
        );
    }
    for (name, flags) in [
        ("suite 0", 0x00),
        ("suite 2", 0x02),
        ("suite 15", 0x0f),
        ("reserved bit", 0x21),
        ("kind 3", 0xc1),
    ] {
        refuse(
            name,
            "22P03",
            None,
            &with(&unbound, &|bytes| bytes[1] = flags),
        );
    }
    refuse(
        "slot id 0",
        "22P03",
        None,
        &with(&unbound, &|bytes| bytes[2..10].fill(0)),
    );
    refuse(
        "slot id of 64 bits",
        "22P03",
        None,
        &with(&unbound, &|bytes| bytes[2] |= 0x80),
    );
    for len in [1, 9, 10, 33, 34, 49] {
        let bytes = with(&unbound, &|bytes| bytes.truncate(len));
        refuse(&format!("cut to {len} bytes"), "22P03", None, &bytes);
    }
    for (name, payload) in [
        ("typed: empty payload", &b""[..]),
        ("typed: half a length", b"\0"),
        ("typed: empty name", b"\0\x0012.50"),
        ("typed: name beyond the end", b"\0\x08numeric"),
        ("typed: name is not UTF-8", b"\0\x01\xff12.50"),
    ] {
        let case = Case {
            kind: Kind::Typed,
            value: payload.to_vec(),
            ..unbound.clone()
        };
        refuse(name, "22P03", None, &case.seal());
    }

    refuse("bound, no context given", "22023", None, &bound.seal());
    refuse(
        "not bound, context given",
        "22023",
        Some("customer.email"),
        &unbound.seal(),
    );

    for context in [
        "customer.emai",
        "customer.email2",
        "customer.phone",
        "Customer.email",
    ] {
        refuse(
            &format!("context {context}"),
            "39000",
            Some(context),
            &bound.seal(),
        );
    }
    refuse(
        "context bit set",
        "39000",
        Some("c"),
        &with(&unbound, &|bytes| bytes[1] |= 0x10),
    );
    refuse(
        "context bit cleared",
        "39000",
        None,
        &with(&bound, &|bytes| bytes[1] &= !0x10),
    );
    refuse(
        "kind altered",
        "39000",
        None,
        &with(&unbound, &|bytes| bytes[1] ^= 0x40),
    );
    refuse(
        "slot id altered",
        "39000",
        None,
        &with(&unbound, &|bytes| bytes[9] ^= 1),
    );
    refuse(
        "salt altered",
        "39000",
        None,
        &with(&unbound, &|bytes| bytes[10] ^= 1),
    );
    refuse(
        "counter altered",
        "39000",
        None,
        &with(&unbound, &|bytes| bytes[33] ^= 1),
    );
    refuse(
        "ciphertext altered",
        "39000",
        None,
        &with(&unbound, &|bytes| bytes[34] ^= 1),
    );
    refuse(
        "tag altered",
        "39000",
        None,
        &with(&unbound, &|bytes| bytes[54] ^= 0x80),
    );
    refuse(
        "last byte missing",
        "39000",
        None,
        &with(&unbound, &|bytes| bytes.truncate(54)),
    );
    refuse(
        "a byte too many",
        "39000",
        None,
        &with(&unbound, &|bytes| bytes.push(0)),
    );
    let other = Case {
        dek: pattern(0xe0),
        ..unbound.clone()
    };
    refuse("another DEK", "39000", None, &other.seal());
    vectors
}

fn wrap(root: u8, dek: u8, slot: u64, key_name: &str) -> (RootKey, Vec<u8>) {
    let root = RootKey::from_slice(&pattern(root)).expect("32 bytes");
    let dek = Dek::from_slice(&pattern(dek)).expect("32 bytes");
    let nonce = std::array::from_fn(|at| 0xb0 + u8::try_from(at).expect("below 24"));
    let slot = SlotId::new(slot).expect("a legal id");
    let wrapped = root.wrap_with_nonce(&dek, slot, key_name, &nonce).to_vec();
    (root, wrapped)
}

fn wrapped_keys() -> Vec<Value> {
    let longest = "k".repeat(200);
    [
        (0x40, 0x01, SLOT, "pii"),
        (0x60, 0x01, SLOT, "pii"),
        (0x40, 0xe0, 1, "ключ 🔑"),
        (0x40, 0xe0, (1 << 63) - 1, &longest),
    ]
    .map(|(root, dek, slot, key_name)| {
        let (key, wrapped) = wrap(root, dek, slot, key_name);
        json!({
            "root_key": to_hex(&pattern(root)),
            "root_id": key.id().to_string(),
            "dek": to_hex(&pattern(dek)),
            "slot_id": slot.to_string(),
            "key_name": key_name,
            "wrapped_key": to_hex(&wrapped),
        })
    })
    .to_vec()
}

fn wrapped_keys_refused() -> Vec<Value> {
    let (_, genuine) = wrap(0x40, 0x01, SLOT, "pii");
    let altered = |at: usize| {
        let mut wrapped = genuine.clone();
        wrapped[at] ^= 1;
        wrapped
    };
    [
        ("another root key", 0x60, SLOT, "pii", genuine.clone()),
        ("another slot id", 0x40, SLOT + 1, "pii", genuine.clone()),
        ("another key name", 0x40, SLOT, "pi", genuine.clone()),
        ("version 0", 0x40, SLOT, "pii", altered(0)),
        ("nonce altered", 0x40, SLOT, "pii", altered(1)),
        ("ciphertext altered", 0x40, SLOT, "pii", altered(25)),
        ("tag altered", 0x40, SLOT, "pii", altered(72)),
        ("empty", 0x40, SLOT, "pii", vec![]),
        (
            "last byte missing",
            0x40,
            SLOT,
            "pii",
            genuine[..72].to_vec(),
        ),
        (
            "a byte too many",
            0x40,
            SLOT,
            "pii",
            [&genuine[..], b"\0"].concat(),
        ),
    ]
    .map(|(name, root, slot, key_name, wrapped)| {
        json!({
            "name": name,
            "root_key": to_hex(&pattern(root)),
            "slot_id": slot.to_string(),
            "key_name": key_name,
            "wrapped_key": to_hex(&wrapped),
            "error": "F0000",
        })
    })
    .to_vec()
}

fn check_value(dek: u8, slot: u64) -> [u8; 32] {
    let dek = Dek::from_slice(&pattern(dek)).expect("32 bytes");
    dek.check_value(SlotId::new(slot).expect("a legal id"))
}

fn check_values() -> Vec<Value> {
    [(0x01, SLOT), (0x01, 1), (0xe0, (1 << 63) - 1)]
        .map(|(dek, slot)| {
            json!({
                "dek": to_hex(&pattern(dek)),
                "slot_id": slot.to_string(),
                "check_value": to_hex(&check_value(dek, slot)),
            })
        })
        .to_vec()
}

fn check_values_refused() -> Vec<Value> {
    let genuine = check_value(0x01, SLOT);
    let mut altered = genuine;
    altered[31] ^= 1;
    [
        ("another slot id", 0x01, SLOT + 1, &genuine[..]),
        ("another DEK", 0xe0, SLOT, &genuine),
        ("altered", 0x01, SLOT, &altered),
        ("last byte missing", 0x01, SLOT, &genuine[..31]),
    ]
    .map(|(name, dek, slot, check_value)| {
        json!({
            "name": name,
            "dek": to_hex(&pattern(dek)),
            "slot_id": slot.to_string(),
            "check_value": to_hex(check_value),
            "error": "F0000",
        })
    })
    .to_vec()
}

fn root_keys() -> Vec<Value> {
    [pattern(0x40), pattern(0x60), [0; 32], [0xff; 32]]
        .map(|key| {
            let root = RootKey::from_slice(&key).expect("32 bytes");
            json!({
                "root_key": to_hex(&key),
                "root_id": root.id().to_string(),
                "root_check": to_hex(&root.check()),
            })
        })
        .to_vec()
}

fn fingerprints() -> Vec<Value> {
    [
        (SLOT, None, "a@example.com"),
        (SLOT, Some("customer.email"), "a@example.com"),
        (SLOT, Some("customer."), "emaila@example.com"),
        (1, None, ""),
        (SLOT, Some("名前"), "Grüße"),
    ]
    .map(|(slot, context, value)| {
        let dek = Dek::from_slice(&pattern(0x80)).expect("32 bytes");
        let slot = SlotId::new(slot).expect("a legal id");
        let bound = context.unwrap_or_default().as_bytes();
        json!({
            "dek": to_hex(&pattern(0x80)),
            "slot_id": slot.to_string(),
            "context": context,
            "value": value,
            "fingerprint": to_hex(&dek.fingerprint_key().fingerprint(slot, bound, value.as_bytes())),
        })
    })
    .to_vec()
}

const CREATED_AT: &str = "2025-01-31T12:00:00Z";

fn keyring(seeds: &[u8]) -> String {
    let mut keyring = RootKeyring::new();
    for &seed in seeds {
        let key = RootKey::from_slice(&pattern(seed)).expect("32 bytes");
        keyring.push(key, CREATED_AT.to_owned()).expect("a new key");
    }
    keyring.to_json().to_string()
}

fn keyrings() -> Vec<Value> {
    let spaced = keyring(&[0x40])
        .replace(':', " : ")
        .replace("12 : 00 : 00", "12:00:00");
    [
        ("one key", keyring(&[0x40])),
        ("two keys", keyring(&[0x60, 0x40])),
        ("spaces", spaced),
    ]
    .map(|(name, keyring)| {
        let parsed = RootKeyring::parse(keyring.as_bytes()).expect("a keyring");
        let ids: Vec<String> = parsed.ids().map(|id| id.to_string()).collect();
        json!({ "name": name, "keyring": keyring, "root_ids": ids })
    })
    .to_vec()
}

fn keyrings_refused() -> Vec<Value> {
    let (one, two) = (keyring(&[0x40]), keyring(&[0x40, 0x60]));
    let ids = [0x40, 0x60].map(|seed| {
        RootKey::from_slice(&pattern(seed))
            .expect("32 bytes")
            .id()
            .to_string()
    });
    let key = to_hex(&pattern(0x40));
    let entry = one[one.find('[').expect("a list") + 1..]
        .trim_end()
        .trim_end_matches("]}");
    let swapped = two
        .replace(&ids[0], "?")
        .replace(&ids[1], &ids[0])
        .replace('?', &ids[1]);
    [
        ("empty file", String::new()),
        ("no key", one.replace(entry, "")),
        ("cut off", one[..one.len() - 3].to_owned()),
        ("trailing data", format!("{one}{one}")),
        ("version 2", one.replace("\"version\":1", "\"version\":2")),
        (
            "version as text",
            one.replace("\"version\":1", "\"version\":\"1\""),
        ),
        ("no version", one.replace("\"version\":1,", "")),
        (
            "unknown field",
            one.replace("{\"version\"", "{\"comment\":\"\",\"version\""),
        ),
        (
            "unknown field of a key",
            one.replace("\"created_at\"", "\"active\":true,\"created_at\""),
        ),
        (
            "duplicate field",
            one.replace("\"version\":1", "\"version\":1,\"version\":1"),
        ),
        ("key in upper case", one.replace(&key, &key.to_uppercase())),
        (
            "id in upper case",
            one.replace(&ids[0], &ids[0].to_uppercase()),
        ),
        ("key of 31 bytes", one.replace(&key, &key[2..])),
        ("key of 33 bytes", one.replace(&key, &format!("{key}00"))),
        (
            "key that is no hex",
            one.replace(&key, &format!("g{}", &key[1..])),
        ),
        ("ids swapped", swapped),
        ("key altered", one.replace(&key, &to_hex(&pattern(0x41)))),
        (
            "the same key twice",
            one.replace(entry, &format!("{entry},{entry}")),
        ),
        (
            "no date",
            one.replace(&format!(",\"created_at\":\"{CREATED_AT}\""), ""),
        ),
        (
            "date without a time",
            one.replace(CREATED_AT, &CREATED_AT[..10]),
        ),
    ]
    .map(|(name, keyring)| json!({ "name": name, "keyring": keyring, "error": "F0000" }))
    .to_vec()
}

// Reading vectors.

fn path(name: &str) -> PathBuf {
    let file = format!("../tests/vectors/{name}.json");
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(file)
}

fn read(name: &str) -> Vec<Value> {
    let json = fs::read(path(name)).expect("published vectors");
    serde_json::from_slice(&json).expect("a list of objects")
}

fn text<'a>(vector: &'a Value, field: &str) -> &'a str {
    vector[field]
        .as_str()
        .unwrap_or_else(|| panic!("{field} of {vector}"))
}

fn hex(vector: &Value, field: &str) -> Vec<u8> {
    let digits = text(vector, field);
    assert!(digits.len().is_multiple_of(2), "{field} of {vector}");
    (0..digits.len() / 2)
        .map(|at| u8::from_str_radix(&digits[2 * at..][..2], 16).expect("hex"))
        .collect()
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn dek(vector: &Value) -> Dek {
    Dek::from_slice(&hex(vector, "dek")).expect("32 bytes")
}

fn root_key(vector: &Value) -> RootKey {
    RootKey::from_slice(&hex(vector, "root_key")).expect("32 bytes")
}

fn slot(vector: &Value) -> SlotId {
    let id = text(vector, "slot_id").parse().expect("a number");
    SlotId::new(id).expect("a legal id")
}

/// The context's bytes; none is an empty one.
fn context(vector: &Value) -> &[u8] {
    vector["context"].as_str().unwrap_or_default().as_bytes()
}

// The design once more, without our code.

fn open_independently(key: &[u8; 32], context: &[u8], bytes: &[u8]) -> Option<Vec<u8>> {
    Envelope::parse(bytes).ok()?;
    let mut aad = bytes[..10].to_vec();
    if bytes[1] & 0x10 != 0 {
        aad.extend_from_slice(&u32::try_from(context.len()).expect("short").to_be_bytes());
        aad.extend_from_slice(context);
    }
    let nonce: &[u8; 24] = bytes[10..34].try_into().expect("24 bytes");
    let payload = Payload {
        msg: &bytes[34..],
        aad: &aad,
    };
    Xaes256Gcm::new(key.into())
        .decrypt(nonce.into(), payload)
        .ok()
}

fn hmac(key: &[u8; 32], message: &[u8]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any length");
    mac.update(message);
    mac.finalize().into_bytes().to_vec()
}
