//! The rules about slots, privileges, key names and contexts, tried exhaustively.
//!
//! Run by `cargo test -p rekey-core`. The table of transitions is written down a second time, by
//! operation, so that a change of the rule has to be made twice on purpose.

use std::collections::HashMap;

use proptest::prelude::*;
use rekey_core::keyring::{
    KeyNameError, Privilege, Privileges, SlotState, bind_parts, valid_key_name,
};

#[test]
fn the_transitions_are_those_of_the_operations() {
    use SlotState::{Active, Destroyed, Disabled, Drained, Pending, Previous};
    let operations: [(&str, &[(SlotState, SlotState)]); 9] = [
        ("promote", &[(Pending, Active)]),
        ("rotate", &[(Active, Previous)]),
        (
            "rollback",
            &[(Previous, Active), (Drained, Active), (Active, Previous)],
        ),
        ("drain proof", &[(Previous, Drained)]),
        (
            "mark_compromised",
            &[
                (Drained, Previous),
                (Pending, Destroyed),
                (Active, Previous),
            ],
        ),
        ("disable", &[(Drained, Disabled), (Previous, Disabled)]),
        ("enable", &[(Disabled, Drained), (Disabled, Previous)]),
        (
            "destroy, shred",
            &[
                (Pending, Destroyed),
                (Active, Destroyed),
                (Previous, Destroyed),
                (Drained, Destroyed),
                (Disabled, Destroyed),
            ],
        ),
        ("restore", &[(Destroyed, Previous)]),
    ];
    for from in SlotState::ALL {
        for to in SlotState::ALL {
            let by = operations
                .iter()
                .find(|(_, changes)| changes.contains(&(from, to)));
            assert_eq!(from.may_become(to), by.is_some(), "{from} -> {to}: {by:?}");
        }
    }
}

#[test]
fn only_active_seals_and_four_states_open() {
    let facts = SlotState::ALL.map(|state| (state.name(), state.seals(), state.opens()));
    assert_eq!(
        facts,
        [
            ("pending", false, true),
            ("active", true, true),
            ("previous", false, true),
            ("drained", false, true),
            ("disabled", false, false),
            ("destroyed", false, false),
        ]
    );
}

#[test]
fn names_are_read_back_and_nothing_else_is() {
    for state in SlotState::ALL {
        assert_eq!(SlotState::parse(state.name()), Some(state));
    }
    for privilege in Privilege::ALL {
        assert_eq!(Privilege::parse(privilege.name()), Some(privilege));
    }
    for name in ["", "Active", "active ", "unknown"] {
        assert_eq!(SlotState::parse(name), None);
    }
    for name in ["", "OWNER", "select", "decrypt "] {
        assert_eq!(Privilege::parse(name), None);
    }
}

#[test]
fn owner_implies_everything_and_the_others_themselves() {
    for granted in Privilege::ALL {
        let set: Privileges = [granted].into_iter().collect();
        for asked in Privilege::ALL {
            let expected = granted == asked || granted == Privilege::Owner;
            assert_eq!(set.implies(asked), expected, "{granted} implies {asked}");
            assert_eq!(set.contains(asked), granted == asked);
        }
        assert!(!Privileges::NONE.implies(granted));
    }
    assert!(Privileges::NONE.is_empty());
}

#[test]
fn grants_add_up() {
    let seal: Privileges = [Privilege::Encrypt].into_iter().collect();
    let both = seal.union([Privilege::Decrypt].into_iter().collect());
    assert!(both.implies(Privilege::Encrypt) && both.implies(Privilege::Decrypt));
    assert!(!both.implies(Privilege::Rotate) && !both.is_empty());
}

#[test]
fn key_names_at_and_over_every_border() {
    for name in [
        "p",
        "pii",
        "PII",
        "tenant 42",
        "ключ",
        "🔑",
        "a\u{200b}b",
        "semi;colon'\"",
    ] {
        assert_eq!(valid_key_name(name), Ok(()), "{name:?}");
    }
    assert_eq!(valid_key_name(""), Err(KeyNameError::Empty));
    assert_eq!(valid_key_name(&"k".repeat(200)), Ok(()));
    assert_eq!(
        valid_key_name(&"k".repeat(201)),
        Err(KeyNameError::TooLong { len: 201 })
    );
    assert_eq!(
        valid_key_name(&"é".repeat(100)),
        Ok(()),
        "bytes count, not characters"
    );
    assert_eq!(
        valid_key_name(&"é".repeat(101)),
        Err(KeyNameError::TooLong { len: 202 })
    );
    for name in ["a\nb", "a\tb", "\0", "a\u{7f}", "a\u{85}b", "\n", "a\r"] {
        assert_eq!(
            valid_key_name(name),
            Err(KeyNameError::ControlCharacter),
            "{name:?}"
        );
    }
    for name in [" ", " a", "a ", "\u{a0}a", "a\u{3000}", "a\u{2028}"] {
        assert_eq!(
            valid_key_name(name),
            Err(KeyNameError::SpaceAtEnd),
            "{name:?}"
        );
    }
    assert!(KeyNameError::TooLong { len: 201 }.detail().contains("201"));
}

#[test]
fn contexts_of_parts_are_spelt_as_documented() {
    assert_eq!(
        bind_parts(&["customer.email", "42"]),
        "14:customer.email,2:42,"
    );
    assert_eq!(bind_parts(&["é"]), "2:é,", "bytes count, not characters");
    assert_eq!(bind_parts(&[""]), "0:,");
    assert_eq!(bind_parts(&["", ""]), "0:,0:,");
}

#[test]
fn contexts_of_parts_are_injective() {
    // Every list of at most three parts over an alphabet that imitates the separators.
    let parts = ["", "a", ",", ":", "1:a", "1:a,", ",1:", "0:,"];
    let mut lists: Vec<Vec<&str>> = vec![vec![]];
    for _ in 0..3 {
        let longer = lists.iter().flat_map(|list| {
            parts
                .iter()
                .map(|part| [&list[..], &[part]].concat())
                .collect::<Vec<_>>()
        });
        let longer: Vec<_> = longer.collect();
        lists.extend(longer);
    }
    lists.sort();
    lists.dedup();
    let mut seen = HashMap::new();
    for list in &lists {
        if let Some(other) = seen.insert(bind_parts(list), list) {
            panic!("{list:?} and {other:?} make one context");
        }
    }
}

proptest! {
    #[test]
    fn contexts_of_parts_can_be_taken_apart(parts in proptest::collection::vec(".{0,12}", 1..5)) {
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let context = bind_parts(&parts);
        let mut rest = &context[..];
        let mut read = Vec::new();
        while let Some((len, tail)) = rest.split_once(':') {
            let (part, tail) = tail.split_at(len.parse().expect("a length"));
            read.push(part);
            rest = tail.strip_prefix(',').expect("a comma");
        }
        prop_assert_eq!(read, parts);
    }
}
