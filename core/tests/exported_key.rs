//! The document of export_key: written and read the same, and nothing else is read.
//!
//! Run by `cargo test -p rekey-core`.

use rekey_core::cipher::{Dek, RootKey};
use rekey_core::envelope::SlotId;
use rekey_core::exported_key::{ExportedKey, ExportedSlot};
use rekey_core::keyring::SlotState;

fn root(seed: u8) -> RootKey {
    RootKey::from_slice(&[seed; 32]).expect("32 bytes")
}

fn slot(id: i64, version: i32, state: SlotState) -> ExportedSlot {
    let id = SlotId::from_i64(id).expect("a slot id");
    let dek = Dek::from_slice(&[0x5a; 32]).expect("32 bytes");
    let wrap = |seed| {
        let wrapped = root(seed).wrap(&dek, id, "pii").expect("random bytes");
        (root(seed).id(), wrapped)
    };
    let wraps = match state {
        SlotState::Destroyed => Vec::new(),
        _ => vec![wrap(1), wrap(2)],
    };
    ExportedSlot {
        id,
        version,
        state,
        check_value: dek.check_value(id),
        compromised: state == SlotState::Previous,
        wraps,
    }
}

fn key() -> ExportedKey {
    ExportedKey {
        key_name: "pii".to_owned(),
        seals: true,
        require_context: true,
        shredded: false,
        slots: vec![
            slot(7, 1, SlotState::Destroyed),
            slot(i64::MAX, 2, SlotState::Previous),
            slot(81_985_529_216_486_895, 4, SlotState::Active),
            slot(9, 5, SlotState::Pending),
        ],
    }
}

fn refusal(json: &str) -> String {
    match ExportedKey::parse(json.as_bytes()) {
        Ok(_) => panic!("accepted: {json}"),
        Err(error) => error.detail(),
    }
}

#[test]
fn what_is_written_is_read_the_same() {
    let json = key().to_json();
    let read = ExportedKey::parse(json.as_bytes()).expect("a document");
    assert_eq!(read.to_json(), json);
    assert_eq!((read.key_name.as_str(), read.seals), ("pii", true));
    assert_eq!((read.require_context, read.shredded), (true, false));
    let states: Vec<SlotState> = read.slots.iter().map(|slot| slot.state).collect();
    use SlotState::{Active, Destroyed, Pending, Previous};
    assert_eq!(states, [Destroyed, Previous, Active, Pending]);
    let previous = &read.slots[1];
    assert_eq!(previous.id.as_i64(), i64::MAX);
    assert!(previous.compromised);
    let (id, wrapped) = &previous.wraps[1];
    assert_eq!(*id, root(2).id());
    let dek = root(2)
        .unwrap(wrapped, previous.id, "pii")
        .expect("the DEK");
    assert!(dek.matches_check_value(previous.id, &previous.check_value));
    assert!(!json.contains("5a5a5a5a"), "a DEK is in the clear");
}

#[test]
fn a_document_of_another_shape_is_refused_and_its_place_named() {
    let json = key().to_json();
    let id = root(1).id().to_string();
    for (from, to, place) in [
        ("\"version\":1}", "\"version\":2}", "\"version\" is not 1"),
        ("\"version\":1}", "\"version\":1.0}", "\"version\" is not 1"),
        ("\"key_name\":\"pii\"", "\"key_name\":\"\"", "\"key_name\""),
        (
            "\"key_name\":\"pii\"",
            "\"key_name\":7",
            "\"key_name\" is not a text",
        ),
        (
            "\"purpose\":\"seal\"",
            "\"purpose\":\"sale\"",
            "\"purpose\"",
        ),
        (
            "\"purpose\":\"seal\"",
            "\"porpoise\":\"seal\"",
            "\"purpose\" is missing",
        ),
        (
            "\"require_context\":true",
            "\"require_context\":1",
            "\"require_context\"",
        ),
        ("\"shredded\":false", "\"shredded\":true", "shredded"),
        ("{\"", "{\"more\":1,\"", "not known"),
        ("\"slot_id\":\"7\"", "\"slot_id\":7", "Slot 1: \"slot_id\""),
        (
            "\"slot_id\":\"7\"",
            "\"slot_id\":\"07\"",
            "Slot 1: \"slot_id\"",
        ),
        (
            "\"slot_id\":\"7\"",
            "\"slot_id\":\"0\"",
            "Slot 1: \"slot_id\"",
        ),
        (
            "\"slot_id\":\"7\"",
            "\"slot_id\":\"-7\"",
            "Slot 1: \"slot_id\"",
        ),
        (
            "\"slot_id\":\"7\"",
            "\"slot_id\":\"9223372036854775808\"",
            "Slot 1: \"slot_id\"",
        ),
        ("\"slot_id\":\"7\"", "\"slot_id\":\"9\"", "twice"),
        ("\"version\":5", "\"version\":0", "Slot 4: \"version\""),
        ("\"version\":5", "\"version\":4", "order"),
        (
            "\"state\":\"active\"",
            "\"state\":\"Active\"",
            "Slot 3: \"state\"",
        ),
        (
            "\"state\":\"active\"",
            "\"state\":\"pending\"",
            "More than one",
        ),
        (
            "\"state\":\"previous\"",
            "\"state\":\"active\"",
            "More than one",
        ),
        (
            "\"state\":\"active\"",
            "\"state\":\"destroyed\"",
            "Slot 3: \"wraps\"",
        ),
        (
            "\"state\":\"destroyed\"",
            "\"state\":\"previous\"",
            "Slot 1: \"wraps\"",
        ),
        (
            "\"compromised\":false",
            "\"compromised\":null",
            "Slot 1: \"compromised\"",
        ),
        (
            "\"check_value\":\"",
            "\"check_value\":\"00",
            "Slot 1: \"check_value\"",
        ),
        (&id, "A", "Wrap 1 of slot 2: \"root_id\""),
        (
            &id,
            &root(2).id().to_string(),
            "Slot 2: \"wraps\" names a root id twice",
        ),
        (
            "\"wrapped_key\":\"01",
            "\"wrapped_key\":\"0G",
            "Wrap 1 of slot 2: \"wrapped_key\"",
        ),
    ] {
        let altered = json.replacen(from, to, 1);
        assert_ne!(altered, json, "{from}");
        let detail = refusal(&altered);
        assert!(detail.contains(place), "{from} as {to}: {detail}");
    }
    for json in ["", "{", "[]", "null", "7", "{}", &format!("{json}x")] {
        refusal(json);
    }
    let mut empty = key();
    empty.slots.clear();
    assert!(refusal(&empty.to_json()).contains("no slot"));
}
