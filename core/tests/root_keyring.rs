//! The keyring file: what is read, that all else is refused, and that no refusal tells a key.
//!
//! Run by `cargo test -p rekey-core`. Every variant of the error has a case here.

use rekey_core::cipher::{RootId, RootKey};
use rekey_core::root_keyring::{KeyringError, RootKeyring};

const AT: &str = "2025-01-31T12:00:00Z";

fn key(seed: u8) -> RootKey {
    RootKey::from_slice(&[seed; 32]).expect("32 bytes")
}

fn key_hex(seed: u8) -> String {
    format!("{seed:02x}").repeat(32)
}

fn entry(seed: u8) -> String {
    entry_of(&key(seed).id().to_string(), &key_hex(seed), AT)
}

fn entry_of(id: &str, key: &str, created_at: &str) -> String {
    format!(r#"{{"id":"{id}","key":"{key}","created_at":"{created_at}"}}"#)
}

fn keyring(entries: &[String]) -> String {
    format!(r#"{{"version":1,"keys":[{}]}}"#, entries.join(","))
}

fn refusal(json: &str) -> KeyringError {
    let error = RootKeyring::parse(json.as_bytes()).err().expect("refused");
    let detail = error.detail();
    // Seeds 0x5a and 0x5b make the only keys here: neither a key nor half of one is told.
    for seed in ["5a5a5a5a", "5b5b5b5b", "5A5A5A5A"] {
        assert!(
            !detail.contains(seed) && !format!("{error:?}").contains(seed),
            "{detail}"
        );
    }
    error
}

#[test]
fn a_keyring_is_read_in_file_order() {
    let json = keyring(&[entry(0x5b), entry(0x5a)]);
    let keyring = RootKeyring::parse(json.as_bytes()).expect("a keyring");
    let ids: Vec<RootId> = keyring.ids().collect();
    assert_eq!(ids, [key(0x5b).id(), key(0x5a).id()]);
    assert_eq!((keyring.len(), keyring.is_empty()), (2, false));
    let found = keyring.get(&key(0x5a).id()).expect("there");
    assert_eq!(found.expose(), &[0x5a; 32]);
    assert!(keyring.get(&key(1).id()).is_none());
}

#[test]
fn white_space_and_field_order_are_free() {
    let (id, key) = (key(0x5a).id(), key_hex(0x5a));
    let json = format!(
        "\n{{ \"keys\" : [ {{\"created_at\":\"{AT}\",\t\"key\":\"{key}\",\"id\":\"{id}\"}} ],\r\n
        \"version\": 1 }}\n"
    );
    assert_eq!(
        RootKeyring::parse(json.as_bytes()).map(|keyring| keyring.len()),
        Ok(1)
    );
}

#[test]
fn what_is_written_is_read_back() {
    let mut keyring = RootKeyring::new();
    assert!(keyring.is_empty());
    for seed in 1..=50 {
        keyring
            .push(key(seed), format!("2025-01-31T12:00:{:02}.25+02:00", seed))
            .expect("new");
        let json = keyring.to_json();
        let read = RootKeyring::parse(json.as_bytes()).expect("our own file");
        assert!(read.ids().eq(keyring.ids()));
        assert!(read.ids().all(|id| {
            read.get(&id).map(RootKey::expose) == keyring.get(&id).map(RootKey::expose)
        }));
        assert_eq!(*read.to_json(), *json);
    }
}

#[test]
fn the_file_is_written_as_published() {
    let mut keyring = RootKeyring::new();
    keyring.push(key(0x5a), AT.to_owned()).expect("new");
    assert_eq!(*keyring.to_json(), self::keyring(&[entry(0x5a)]) + "\n");
}

#[test]
fn what_could_not_be_read_back_is_not_taken_in() {
    let mut keyring = RootKeyring::new();
    keyring.push(key(0x5a), AT.to_owned()).expect("new");
    let id = key(0x5a).id();
    assert_eq!(
        keyring.push(key(0x5a), AT.to_owned()),
        Err(KeyringError::DuplicateId { id })
    );
    assert_eq!(
        keyring.push(key(0x5b), "2025-01-31 12:00:00+00".to_owned()),
        Err(KeyringError::BadCreatedAt { entry: 2 })
    );
    assert_eq!(keyring.len(), 1);
}

#[test]
fn other_documents_are_refused() {
    let good = keyring(&[entry(0x5a)]);
    for len in 0..good.len() {
        let error = refusal(&good[..len]);
        assert!(
            matches!(error, KeyringError::NotAKeyring { .. }),
            "{len} bytes: {error:?}"
        );
    }
    let one = entry(0x5a);
    for json in [
        "null".to_owned(),
        "[]".to_owned(),
        "\"\"".to_owned(),
        key_hex(0x5a),
        format!("\"{}\"", key_hex(0x5a)),
        format!("[1,[{one}]]"),
        format!("\u{feff}{good}"),
        format!("{good}{{}}"),
        format!("{good} x"),
        format!("{good}\0"),
        format!("# comment\n{good}"),
        good.replace("]}", ",]}"),
        good.replace("]}", "],}"),
        good.replace('"', "'"),
        r#"{"version":1,"keys":{}}"#.to_owned(),
        r#"{"version":1,"keys":null}"#.to_owned(),
        r#"{"version":1,"keys":[null]}"#.to_owned(),
        r#"{"version":1,"keys":[[]]}"#.to_owned(),
        good.replace("\"version\":1", "\"version\":\"1\""),
        good.replace("\"version\":1", "\"version\":1.0"),
        good.replace("\"version\":1", "\"version\":-1"),
        good.replace("\"version\":1", "\"version\":null"),
        good.replace(&format!("\"{AT}\""), "1738324800"),
        good.replace(&format!("\"{}\"", key_hex(0x5a)), "null"),
        good.replace(&format!("\"{}\"", key_hex(0x5a)), &"5a".repeat(32)),
    ] {
        let error = refusal(&json);
        assert!(
            matches!(error, KeyringError::NotAKeyring { .. }),
            "{json}: {error:?}"
        );
    }
    let mut bytes = good.into_bytes();
    let last = bytes.len() - 4;
    bytes[last] = 0xFF;
    assert!(RootKeyring::parse(&bytes).is_err(), "not UTF-8");
}

#[test]
fn unknown_fields_are_refused() {
    let good = keyring(&[entry(0x5a)]);
    for json in [
        good.replace("{\"version\"", "{\"comment\":{},\"version\""),
        good.replace("{\"version\"", "{\"Version\""),
        good.replace("{\"version\"", "{\"id\":\"\",\"version\""),
        good.replace("\"created_at\"", "\"note\":\"5a5a5a5a\",\"created_at\""),
        good.replace("\"created_at\"", "\"version\":1,\"created_at\""),
    ] {
        assert_eq!(refusal(&json), KeyringError::UnknownField, "{json}");
    }
}

#[test]
fn duplicate_and_missing_fields_are_refused() {
    let good = keyring(&[entry(0x5a)]);
    let one = entry(0x5a);
    let (id, key) = (key(0x5a).id(), key_hex(0x5a));
    let fields = [
        ("version", "\"version\":1".to_owned()),
        ("keys", format!("\"keys\":[{one}]")),
        ("id", format!("\"id\":\"{id}\"")),
        ("key", format!("\"key\":\"{key}\"")),
        ("created_at", format!("\"created_at\":\"{AT}\"")),
    ];
    for (name, text) in fields {
        let twice = good.replace(&text, &format!("{text},{text}"));
        assert_eq!(refusal(&twice), KeyringError::DuplicateField(name));
        let without = good
            .replace(&format!("{text},"), "")
            .replace(&format!(",{text}"), "");
        assert_eq!(
            refusal(&without),
            KeyringError::MissingField(name),
            "{without}"
        );
    }
    assert_eq!(refusal("{}"), KeyringError::MissingField("version"));
}

#[test]
fn versions_other_than_1_are_refused() {
    for version in ["0", "2", "18446744073709551615"] {
        let json = keyring(&[entry(0x5a)]).replace(":1,", &format!(":{version},"));
        assert_eq!(refusal(&json), KeyringError::UnknownVersion);
    }
}

#[test]
fn an_empty_list_is_refused() {
    assert_eq!(refusal(&keyring(&[])), KeyringError::Empty);
}

#[test]
fn ids_and_keys_are_exact_lower_case_hex() {
    let (id, hex) = (key(0x5a).id().to_string(), key_hex(0x5a));
    let bad_id = KeyringError::BadId { entry: 2 };
    let bad_key = KeyringError::BadKey { entry: 2 };
    let second = |id: &str, key: &str| refusal(&keyring(&[entry(0x5b), entry_of(id, key, AT)]));
    for id in [
        "",
        &id[1..],
        &format!("{id}0"),
        &id.to_uppercase(),
        &id.replace('0', "g"),
        &hex,
    ] {
        if *id != key(0x5a).id().to_string() {
            assert_eq!(second(id, &hex), bad_id, "{id}");
        }
    }
    let escaped = hex.replacen('5', "\\u0035", 1);
    for hex in [
        "",
        &hex[1..],
        &format!("{hex}0"),
        &hex.to_uppercase(),
        &hex.replace('a', "g"),
        &escaped,
    ] {
        assert_eq!(second(&id, hex), bad_key, "{hex}");
    }
    assert_eq!(second(&id, &format!("0x{}", &hex[2..])), bad_key);
}

#[test]
fn dates_are_rfc_3339() {
    let parse = |at: &str| {
        let json = keyring(&[entry_of(&key(0x5a).id().to_string(), &key_hex(0x5a), at)]);
        RootKeyring::parse(json.as_bytes()).err()
    };
    for at in [
        "2025-01-31T12:00:00Z",
        "2024-02-29T23:59:60Z",
        "2000-02-29T00:00:00.123456789+14:00",
        "0001-12-31T00:00:00-00:30",
    ] {
        assert_eq!(parse(at), None, "{at}");
    }
    for at in [
        "",
        "2025-01-31",
        "2025-01-31 12:00:00Z",
        "2025-01-31T12:00Z",
        "2025-01-31T12:00:00",
        "2025-01-31T12:00:00+00",
        "2025-01-31T12:00:00+0000",
        "2025-01-31T12:00:00.Z",
        "2025-01-31T12:00:00ZZ",
        "2025-01-31T24:00:00Z",
        "2025-01-31T12:60:00Z",
        "2025-01-31T12:00:61Z",
        "2025-01-31T12:00:00+24:00",
        "2025-01-31T12:00:00+01:60",
        "2025-00-31T12:00:00Z",
        "2025-13-31T12:00:00Z",
        "2025-01-00T12:00:00Z",
        "2025-01-32T12:00:00Z",
        "2025-04-31T12:00:00Z",
        "2025-02-29T12:00:00Z",
        "1900-02-29T12:00:00Z",
        "+025-01-31T12:00:00Z",
        "2025-1-31T12:00:00Z",
        "２025-01-31T12:00:00Z",
    ] {
        assert_eq!(
            parse(at),
            Some(KeyringError::BadCreatedAt { entry: 1 }),
            "{at}"
        );
    }
}

#[test]
fn swapped_and_repeated_entries_are_seen() {
    let (a, b) = (key(0x5a).id(), key(0x5b).id());
    let swapped = [
        entry_of(&b.to_string(), &key_hex(0x5a), AT),
        entry_of(&a.to_string(), &key_hex(0x5b), AT),
    ];
    assert_eq!(
        refusal(&keyring(&swapped)),
        KeyringError::IdMismatch { entry: 1, id: b }
    );
    let relabelled = [entry(0x5b), entry_of(&"0".repeat(32), &key_hex(0x5a), AT)];
    assert!(matches!(
        refusal(&keyring(&relabelled)),
        KeyringError::IdMismatch { entry: 2, .. }
    ));
    let twice = [entry(0x5a), entry(0x5b), entry(0x5a)];
    assert_eq!(
        refusal(&keyring(&twice)),
        KeyringError::DuplicateId { id: a }
    );
}

#[test]
fn files_over_1_mib_are_not_read() {
    let good = keyring(&[entry(0x5a)]);
    let padded = |len: usize| good.clone() + &" ".repeat(len - good.len());
    assert!(RootKeyring::parse(padded(1 << 20).as_bytes()).is_ok());
    let len = (1 << 20) + 1;
    assert_eq!(refusal(&padded(len)), KeyringError::TooLarge { len });
}
