//! Fuzz targets: what must hold for arbitrary bytes, one function per parser.
//!
//! Called by the runner in `tests/run.rs` (bounded, seeded, stable compiler) and by the libFuzzer
//! wrappers in `libfuzzer/` (coverage-guided, by hand). Invariant: a target panics exactly when a
//! property of the format is broken; whether bytes are accepted or refused is never a failure in
//! itself. The published vectors are the corpus, and what they do not hold must not open.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::LazyLock;

use rekey_core::cipher::{self, Dek, RootKey, XaesKey};
use rekey_core::envelope::{self, Envelope, EnvelopeError, HEADER_LEN, Header, OVERHEAD, SlotId};
use rekey_core::exported_key::{ExportedKey, ExportedSlot};
use rekey_core::keyring::SlotState;
use rekey_core::root_keyring::RootKeyring;
use serde_json::Value;

/// A parser under test.
pub struct Target {
    /// Its name, as cargo-fuzz knows it.
    pub name: &'static str,
    /// Panics when a property does not hold for `data`.
    pub run: fn(data: &[u8]),
    /// Inputs to begin with.
    pub corpus: fn() -> Vec<Vec<u8>>,
    /// Pieces of input that random bytes would hardly hit upon.
    pub dictionary: &'static [&'static [u8]],
}

/// All targets.
pub const TARGETS: [Target; 5] = [
    Target {
        name: "header",
        run: header,
        corpus: envelope_corpus,
        dictionary: &[
            b"\xf9\x01",
            b"\xf9\x11",
            b"\xf9\x41",
            b"\xf9\x81",
            b"\x00\x04int4",
        ],
    },
    Target {
        name: "opening",
        run: opening,
        corpus: envelope_corpus,
        dictionary: &[b"\xf9\x01", b"\xf9\x11", b"\xf9\x41", b"\xf9\x81"],
    },
    Target {
        name: "wrapped_key",
        run: wrapped_key,
        corpus: wrapped_key_corpus,
        dictionary: &[b"\x01"],
    },
    Target {
        name: "keyring_file",
        run: keyring_file,
        corpus: keyring_corpus,
        dictionary: &[
            b"{\"version\":1,\"keys\":[",
            b"\"id\":\"",
            b"\"key\":\"",
            b"\"created_at\":\"2025-01-31T12:00:00Z\"",
            b"\\u0030",
            b"null",
            b"]}",
            b",",
            b"\xef\xbb\xbf",
            b"1e0",
            b"[[[[[[[[",
        ],
    },
    Target {
        name: "exported_key",
        run: exported_key,
        corpus: exported_corpus,
        dictionary: &[
            b"{\"slot_id\":\"1\",\"version\":1,\"state\":\"destroyed\",",
            b"\"wraps\":[]",
            b"\"state\":\"active\"",
            b"\"purpose\":\"lookup\"",
            b"9223372036854775807",
            b"\"shredded\":true",
            b"null",
            b"1e0",
        ],
    },
];

/// The document of export_key: what is read is written and read again the same.
pub fn exported_key(data: &[u8]) {
    let Ok(key) = ExportedKey::parse(data) else {
        return;
    };
    let json = key.to_json();
    let again = ExportedKey::parse(json.as_bytes()).expect("what was written is read");
    assert_eq!(again.to_json(), json);
    let ids: BTreeSet<i64> = key.slots.iter().map(|slot| slot.id.as_i64()).collect();
    assert_eq!(ids.len(), key.slots.len());
    let active = |slot: &&ExportedSlot| slot.state == SlotState::Active;
    assert!(key.slots.iter().filter(active).count() <= 1);
    let dead = |slot: &ExportedSlot| slot.state == SlotState::Destroyed;
    assert!(
        key.slots
            .iter()
            .all(|slot| slot.wraps.is_empty() == dead(slot))
    );
}

/// Keys of one to four slots, wrapped under a root key of the corpus' own.
fn exported_corpus() -> Vec<Vec<u8>> {
    use SlotState::{Active, Destroyed, Disabled, Pending, Previous};
    let states = [Active, Destroyed, Previous, Disabled];
    let root = RootKey::from_slice(&[7; 32]).expect("32 bytes");
    let dek = Dek::from_slice(&[9; 32]).expect("32 bytes");
    let documents = (1..=states.len()).map(|count| {
        let slots = states[..count].iter().zip(1_i32..).map(|(state, version)| {
            let id = SlotId::from_i64(i64::from(version)).expect("a slot id");
            let wrapped = root.wrap_with_nonce(&dek, id, "pii", &[3; 24]);
            ExportedSlot {
                id,
                version,
                state: *state,
                check_value: dek.check_value(id),
                compromised: *state == Pending,
                wraps: match state {
                    Destroyed => Vec::new(),
                    _ => vec![(root.id(), wrapped)],
                },
            }
        });
        let key = ExportedKey {
            key_name: "pii".to_owned(),
            seals: true,
            require_context: false,
            shredded: false,
            slots: slots.collect(),
        };
        key.to_json().into_bytes()
    });
    documents.collect()
}

/// Headers, envelopes and typed payloads: what parses is canonical, and the three parsers agree.
pub fn header(data: &[u8]) {
    let parsed = Header::parse(data);
    match parsed {
        Ok(header) => assert_eq!(header.to_bytes(), data[..HEADER_LEN]),
        Err(error) => check_envelope_detail(error),
    }
    if let Some(head) = data.get(..HEADER_LEN) {
        assert_eq!(
            Header::parse(head),
            parsed,
            "what follows the header is not looked at"
        );
    }
    match (Envelope::parse(data), parsed) {
        (Ok(envelope), parsed) => {
            assert_eq!(Ok(envelope.header), parsed);
            let parts: [&[u8]; 5] = [
                envelope.header_bytes,
                envelope.salt,
                envelope.counter,
                envelope.ciphertext,
                envelope.tag,
            ];
            assert_eq!(parts.concat(), data, "no byte is lost or read twice");
        }
        (Err(EnvelopeError::Truncated { len }), _) => {
            assert!(len == data.len() && len < OVERHEAD);
        }
        (Err(error), parsed) => assert_eq!(Err(error), parsed),
    }
    if let Ok((name, value)) = envelope::split_typed(data) {
        let prefix = envelope::typed_prefix(name).expect("what was split has a name");
        assert_eq!([&prefix, value].concat(), data);
    }
}

/// Opening: nothing opens that was not sealed, and what is sealed opens, unless a byte was changed.
pub fn opening(data: &[u8]) {
    for key in &VECTORS.deks {
        for context in &VECTORS.contexts {
            if let Ok(payload) = cipher::open_envelope(key, context.as_bytes(), data) {
                assert!(VECTORS.envelopes.contains(data), "an envelope was forged");
                assert_eq!(payload.len(), data.len() - OVERHEAD);
            }
        }
    }

    // The data as a context and a payload; its first bytes say how, and which bit is flipped after.
    let Some((&[header @ .., context_len, at, bit], rest)) = data.split_first_chunk::<13>() else {
        return;
    };
    let (context, payload) = rest.split_at(rest.len().min(usize::from(context_len)));
    let Ok(mut header) = Header::parse(&header) else {
        return;
    };
    header.context_bound = !context.is_empty();
    let key = &VECTORS.deks[0];
    let mut sealed = cipher::seal_envelope(key, header, &[1; 12], &[2; 12], context, payload);
    assert_eq!(sealed.len(), payload.len() + OVERHEAD);
    assert_eq!(
        cipher::open_envelope(key, context, &sealed).as_deref(),
        Ok(payload)
    );
    let at = usize::from(at) * 257 % sealed.len();
    sealed[at] ^= 1 << (bit & 7);
    assert!(
        cipher::open_envelope(key, context, &sealed).is_err(),
        "a bit of byte {at} is free"
    );
}

/// Wrapped keys: only the published ones unwrap, each under its own root key, slot and name.
pub fn wrapped_key(data: &[u8]) {
    for wrap in &VECTORS.wraps {
        match wrap.root_key.unwrap(data, wrap.slot, &wrap.key_name) {
            Ok(dek) => {
                assert!(data == wrap.wrapped, "a wrapped key was forged");
                assert!(dek.expose()[..] == wrap.dek, "another key came out");
            }
            Err(_) => assert!(data != wrap.wrapped, "a genuine wrapped key was refused"),
        }
    }
}

/// Keyring files: what is read is written so that it reads the same again; a refusal tells no key.
pub fn keyring_file(data: &[u8]) {
    let keyring = match RootKeyring::parse(data) {
        Ok(keyring) => keyring,
        Err(error) => {
            let detail = error.detail();
            let longest = detail
                .split(|c: char| !c.is_ascii_hexdigit())
                .map(str::len)
                .max();
            assert!(longest <= Some(32), "a run longer than a root id: {detail}");
            return;
        }
    };
    assert!(!keyring.is_empty());
    let distinct: BTreeSet<_> = keyring.ids().collect();
    assert_eq!(distinct.len(), keyring.len());
    let json = keyring.to_json();
    let again = RootKeyring::parse(json.as_bytes()).expect("we read what we write");
    assert!(
        again.ids().eq(keyring.ids()),
        "the order of the file is kept"
    );
    for id in keyring.ids() {
        let (key, same) = (
            keyring.get(&id).expect("listed"),
            again.get(&id).expect("listed"),
        );
        assert_eq!(key.id(), id);
        assert!(key.expose() == same.expose());
    }
    assert!(*again.to_json() == *json);
}

/// A refusal's facts name numbers of the header; there is no room in them for more.
fn check_envelope_detail(error: EnvelopeError) {
    let detail = error.detail();
    assert!(
        detail.ends_with('.') && detail.len() < 100 && detail.is_ascii(),
        "{detail}"
    );
}

struct Vectors {
    deks: Vec<XaesKey>,
    /// Every context that occurs, and none ("").
    contexts: BTreeSet<String>,
    envelopes: BTreeSet<Vec<u8>>,
    wraps: Vec<Wrap>,
}

struct Wrap {
    root_key: RootKey,
    slot: SlotId,
    key_name: String,
    dek: Vec<u8>,
    wrapped: Vec<u8>,
}

static VECTORS: LazyLock<Vectors> = LazyLock::new(|| {
    let envelopes = [read(ENVELOPES), read(ENVELOPES_REFUSED)].concat();
    let deks: BTreeSet<_> = envelopes.iter().map(|vector| hex(vector, "dek")).collect();
    let key = |dek: &Vec<u8>| XaesKey::new(dek[..].try_into().expect("32 bytes"));
    let context = |vector: &Value| vector["context"].as_str().unwrap_or_default().to_owned();
    Vectors {
        deks: deks.iter().map(key).collect(),
        contexts: envelopes.iter().map(context).collect(),
        envelopes: envelopes
            .iter()
            .map(|vector| hex(vector, "envelope"))
            .collect(),
        wraps: read(WRAPPED_KEYS).iter().map(wrap).collect(),
    }
});

fn wrap(vector: &Value) -> Wrap {
    let slot = text(vector, "slot_id").parse().ok().and_then(SlotId::new);
    Wrap {
        root_key: RootKey::from_slice(&hex(vector, "root_key")).expect("32 bytes"),
        slot: slot.expect("a slot id"),
        key_name: text(vector, "key_name").to_owned(),
        dek: hex(vector, "dek"),
        wrapped: hex(vector, "wrapped_key"),
    }
}

fn envelope_corpus() -> Vec<Vec<u8>> {
    VECTORS.envelopes.iter().cloned().collect()
}

fn wrapped_key_corpus() -> Vec<Vec<u8>> {
    let refused = read(WRAPPED_KEYS_REFUSED);
    let refused = refused.iter().map(|vector| hex(vector, "wrapped_key"));
    VECTORS
        .wraps
        .iter()
        .map(|wrap| wrap.wrapped.clone())
        .chain(refused)
        .collect()
}

fn keyring_corpus() -> Vec<Vec<u8>> {
    let files = [read(KEYRINGS), read(KEYRINGS_REFUSED)].concat();
    files
        .iter()
        .map(|vector| text(vector, "keyring").as_bytes().to_vec())
        .collect()
}

const ENVELOPES: &str = include_str!("../../tests/vectors/envelopes.json");
const ENVELOPES_REFUSED: &str = include_str!("../../tests/vectors/envelopes_refused.json");
const WRAPPED_KEYS: &str = include_str!("../../tests/vectors/wrapped_keys.json");
const WRAPPED_KEYS_REFUSED: &str = include_str!("../../tests/vectors/wrapped_keys_refused.json");
const KEYRINGS: &str = include_str!("../../tests/vectors/keyrings.json");
const KEYRINGS_REFUSED: &str = include_str!("../../tests/vectors/keyrings_refused.json");

fn read(json: &str) -> Vec<Value> {
    serde_json::from_str(json).expect("a list of objects")
}

fn text<'a>(vector: &'a Value, field: &str) -> &'a str {
    vector[field].as_str().expect("a text")
}

fn hex(vector: &Value, field: &str) -> Vec<u8> {
    let digit = |digit: &u8| char::from(*digit).to_digit(16).expect("a hex digit");
    let byte = |pair: &[u8]| u8::try_from(digit(&pair[0]) << 4 | digit(&pair[1]));
    let digits = text(vector, field).as_bytes();
    digits
        .chunks(2)
        .map(|pair| byte(pair).expect("two digits"))
        .collect()
}
