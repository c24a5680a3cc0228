//! The three verbs as a client sees them: overloads, NULLs, contexts, bad input.
//!
//! Nothing here needs a second session or a rotation; see `cache.rs` and `lifecycle.rs` for
//! those. Values of every type are in `values.rs`.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::bytes::{OVERHEAD, hex, literal, slot_id, unhex};
use rekey_tests::{Ask, Cluster, Database, Options};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded()))
}

fn session(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('pii')");
    (database, client)
}

#[test]
fn null_values_give_null() {
    let (_database, mut client) = session("nulls");
    for sql in [
        "encrypt_col(NULL, 'pii')",
        "encrypt_col(NULL::text, 'pii')",
        "encrypt_col(NULL::bytea, 'pii')",
        "encrypt_col(NULL::int, 'pii')",
        "encrypt_col(NULL::text, NULL)",
        "encrypt_col(NULL::int, 'pii', NULL)",
        "decrypt_col(NULL)",
        "decrypt_col(NULL, NULL)",
        "decrypt_col_as(NULL, NULL::int)",
        "rekey.slot_id(NULL)",
        "rekey.is_envelope(NULL)",
        "rekey.can_open(NULL, '')",
    ] {
        assert_eq!(client.cell(&format!("SELECT {sql}")), None, "{sql}");
    }
}

#[test]
fn a_null_key_name_or_context_with_a_value_is_an_error() {
    let (_database, mut client) = session("null_args");
    for sql in [
        "encrypt_col('x', NULL)",
        "encrypt_col('x'::bytea, NULL)",
        "encrypt_col(1, NULL)",
        "encrypt_col('x', 'pii', NULL)",
        "encrypt_col(1, 'pii', NULL)",
        "decrypt_col(encrypt_col('x', 'pii'), NULL)",
        "decrypt_col_as(encrypt_col(1, 'pii'), NULL::int, NULL)",
    ] {
        client.refuse(&format!("SELECT {sql}"), "22004");
    }
}

#[test]
fn every_way_of_passing_a_value_finds_an_overload() {
    let (_database, mut client) = session("overloads");
    client.run("SET rekey.default_key = 'pii'");
    for sql in [
        "encrypt_col('x', 'pii')",
        "encrypt_col('x')",
        "encrypt_col(value => 'x', key_name => 'pii')",
        "encrypt_col(context => '', key_name => 'pii', value => 'x')",
        "encrypt_col('x'::varchar, key_name => 'pii')",
    ] {
        assert_eq!(
            client.text(&format!("SELECT decrypt_col({sql})")),
            "x",
            "{sql}"
        );
    }
    assert_eq!(
        client.text("SELECT decrypt_col(envelope => encrypt_col('x'), context => '')"),
        "x"
    );
    assert_eq!(
        client.number("SELECT decrypt_col_as(envelope => encrypt_col(7), as_type => NULL::int)"),
        7
    );
    let untyped = client
        .prepare("SELECT encrypt_col($1, 'pii')")
        .expect("a statement");
    assert_eq!(untyped.params(), [postgres::types::Type::TEXT]);
    let envelope: Vec<u8> = client
        .query_one(&untyped, &[&"naïve"])
        .expect("a row")
        .get(0);
    assert_eq!(
        client.text(&format!("SELECT decrypt_col({})", literal(&envelope))),
        "naïve"
    );
    let statement = client
        .prepare("SELECT decrypt_col($1)")
        .expect("a statement");
    let text: String = client
        .query_one(&statement, &[&envelope])
        .expect("a row")
        .get(0);
    assert_eq!(text, "naïve");
}

#[test]
fn the_empty_key_name_is_the_default_key_and_nothing_else() {
    let (_database, mut client) = session("default_key");
    client.run("SELECT rekey.create_key('other'); SET rekey.default_key = 'other'");
    let named = client.text("SELECT key_name FROM rekey.describe(encrypt_col('x'))");
    assert_eq!(named, "other");
    client.run("SET rekey.default_key = ''");
    let refusal = client
        .attempt("SELECT encrypt_col('x')")
        .expect_err("no key is named");
    assert!(
        ["22023", "42704"].contains(&refusal.code.as_str()),
        "{refusal:?}"
    );
    assert!(refusal.text().contains("rekey.default_key"), "{refusal:?}");
    client
        .refuse("SELECT encrypt_col('x', 'nope')", "42704")
        .names("nope");
}

#[test]
fn a_context_is_needed_exactly_when_one_was_bound() {
    let (_database, mut client) = session("contexts");
    let bound = "encrypt_col('x', 'pii', 'customer.email:7')";
    assert_eq!(
        client.text(&format!("SELECT decrypt_col({bound}, 'customer.email:7')")),
        "x"
    );
    client.refuse(
        &format!("SELECT decrypt_col({bound}, 'customer.email:8')"),
        "39000",
    );
    client.refuse(
        &format!("SELECT decrypt_col({bound}, 'customer.email:7 ')"),
        "39000",
    );
    client
        .refuse(&format!("SELECT decrypt_col({bound})"), "22023")
        .hints("context");
    client
        .refuse(
            "SELECT decrypt_col(encrypt_col('x', 'pii'), 'pii')",
            "22023",
        )
        .hints("decrypt_col takes no key name");
    client.refuse(
        "SELECT decrypt_col_as(encrypt_col(1, 'pii', 'a'), NULL::int)",
        "22023",
    );
    client.refuse(
        "SELECT decrypt_col_as(encrypt_col(1, 'pii', 'a'), NULL::int, 'b')",
        "39000",
    );
    let bits = client.rows(
        "SELECT get_byte(encrypt_col('x', 'pii', ''), 1), get_byte(encrypt_col('x', 'pii', 'a'), 1)",
    );
    assert_eq!(
        bits,
        [[Some("1".to_owned()), Some("17".to_owned())]],
        "bit 4 says so"
    );
}

#[test]
fn require_context_refuses_unbound_sealing_only() {
    let (_database, mut client) = session("required");
    client.run("CREATE TABLE t AS SELECT encrypt_col('x', 'pii') AS c");
    client.run("SELECT rekey.set_policy('pii', require_context => true)");
    client
        .refuse("SELECT encrypt_col('x', 'pii')", "22023")
        .names("pii");
    assert_eq!(
        client.text("SELECT decrypt_col(encrypt_col('x', 'pii', 'a'), 'a')"),
        "x"
    );
    assert_eq!(
        client.text("SELECT decrypt_col(c) FROM t"),
        "x",
        "old rows still open"
    );
    // The key is warm now, by a seal that was allowed.
    client.run("SELECT encrypt_col('x', 'pii', 'a')");
    client.refuse("SELECT encrypt_col('x', 'pii')", "22023");
}

#[test]
fn context_of_several_parts_is_injective() {
    let (_database, mut client) = session("context_fn");
    for (call, expected) in [
        ("'customer.email', '17'", "14:customer.email,2:17,"),
        ("'a', 'bc'", "1:a,2:bc,"),
        ("'ab', 'c'", "2:ab,1:c,"),
        ("'é'", "2:é,"),
        ("''", "0:,"),
        ("VARIADIC ARRAY['1:a,', '']", "4:1:a,,0:,"),
    ] {
        assert_eq!(
            client.text(&format!("SELECT rekey.context({call})")),
            expected
        );
    }
    client.refuse("SELECT rekey.context(VARIADIC ARRAY[]::text[])", "22023");
    client.refuse("SELECT rekey.context('a', NULL)", "22004");
    assert_eq!(
        client.text("SELECT provolatile FROM pg_proc WHERE oid = 'rekey.context'::regproc"),
        "i"
    );
}

/// What is not an envelope, built from a true one.
fn not_envelopes(envelope: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let with = |at: usize, byte: u8| {
        let mut bytes = envelope.to_vec();
        bytes[at] = byte;
        bytes
    };
    let mut zero = envelope.to_vec();
    zero[2..10].fill(0);
    let garbage: Vec<u8> = (0..50u8)
        .map(|i| i.wrapping_mul(37).wrapping_add(11))
        .collect();
    vec![
        ("empty", Vec::new()),
        ("one byte", vec![0xF9]),
        ("another byte", vec![b'x']),
        ("49 bytes", envelope[..OVERHEAD - 1].to_vec()),
        ("50 bytes of garbage", garbage),
        (
            "text",
            "the quick brown fox jumps over the lazy dog, and again it jumps".into(),
        ),
        (
            "hex text of an envelope",
            format!("\\x{}", hex(envelope)).into_bytes(),
        ),
        ("an older format", with(0, 0xF8)),
        ("a newer format", with(0, 0xFA)),
        ("foreign magic", with(0, 0x01)),
        ("suite 0", with(1, 0x00)),
        ("suite 2", with(1, 0x02)),
        ("suite 15", with(1, 0x0F)),
        ("kind 3", with(1, 0xC1)),
        ("the reserved bit", with(1, 0x21)),
        ("slot id 0", zero),
        ("the top bit of the slot id", with(2, envelope[2] | 0x80)),
    ]
}

#[test]
fn what_is_not_an_envelope_is_refused_clearly() {
    let (_database, mut client) = session("bad_input");
    let envelope = unhex(&client.text("SELECT encrypt_col('some value', 'pii')"));
    for (what, bytes) in not_envelopes(&envelope) {
        let bytes = literal(&bytes);
        for call in ["decrypt_col", "decrypt_col_as"] {
            let as_type = if call == "decrypt_col" {
                ""
            } else {
                ", NULL::int"
            };
            let refusal = client.fail(&format!("SELECT {call}({bytes}{as_type})"), "22P03");
            assert!(
                !refusal.detail.is_empty() && !refusal.hint.is_empty(),
                "{what}: {refusal:?}"
            );
        }
        let header = client.rows(&format!(
            "SELECT rekey.slot_id({bytes}), rekey.is_envelope({bytes}), rekey.can_open({bytes}, '')"
        ));
        let no = Some("f".to_owned());
        assert_eq!(header, [[None, no.clone(), no]], "{what}");
    }
    assert_eq!(
        client.text(&format!("SELECT decrypt_col({})", literal(&envelope))),
        "some value"
    );
}

#[test]
fn every_altered_byte_and_every_truncation_is_refused() {
    let (_database, mut client) = session("altered");
    let envelope = unhex(&client.text("SELECT encrypt_col('some value', 'pii')"));
    for at in 0..envelope.len() {
        let mut bytes = envelope.clone();
        bytes[at] ^= 1 << (at % 8);
        let sql = format!("SELECT decrypt_col({})", literal(&bytes));
        let refusal = client
            .attempt(&sql)
            .expect_err("an altered envelope opened");
        let expected: &[&str] = match at {
            0 | 1 => &["22P03", "22023", "39000"],
            2..10 => &["42704", "22P03"],
            _ => &["39000"],
        };
        assert!(
            expected.contains(&refusal.code.as_str()),
            "byte {at}: {refusal:?}"
        );
    }
    let mut texts = std::collections::BTreeSet::new();
    for length in OVERHEAD..envelope.len() {
        let sql = format!("SELECT decrypt_col({})", literal(&envelope[..length]));
        texts.insert(client.refuse(&sql, "39000").text());
    }
    let longer = [&envelope[..], b"x"].concat();
    texts.insert(
        client
            .refuse(
                &format!("SELECT decrypt_col({})", literal(&longer)),
                "39000",
            )
            .text(),
    );
    assert_eq!(texts.len(), 1, "one text for all causes: {texts:?}");
}

#[test]
fn an_unknown_slot_is_named() {
    let (_database, mut client) = session("unknown_slot");
    let mut envelope = unhex(&client.text("SELECT encrypt_col('some value', 'pii')"));
    envelope[2..10].copy_from_slice(&123_456_789_u64.to_be_bytes());
    let sql = format!("SELECT decrypt_col({})", literal(&envelope));
    client.refuse(&sql, "42704").names("123456789");
    let other = cluster().database("unknown_slot_2");
    let mut elsewhere = other.connect();
    let envelope = unhex(&client.text("SELECT encrypt_col('some value', 'pii')"));
    let sql = format!("SELECT decrypt_col({})", literal(&envelope));
    elsewhere
        .refuse(&sql, "42704")
        .names(&slot_id(&envelope).to_string());
}

#[test]
fn header_readers_read_only_the_header() {
    let (_database, mut client) = session("header");
    client.run("CREATE TABLE t AS SELECT encrypt_col(repeat('x', 9999), 'pii', 'a') AS c");
    assert!(client.truth(
        "SELECT rekey.slot_id(c) = active_slot AND rekey.is_envelope(c) FROM t, rekey.keys"
    ));
    let flags = client.rows(
        "SELECT DISTINCT provolatile, proleakproof, proparallel FROM pg_proc \
         WHERE oid IN ('rekey.slot_id'::regproc, 'rekey.is_envelope'::regproc)",
    );
    let text = |s: &str| Some(s.to_owned());
    assert_eq!(flags, [[text("i"), text("t"), text("s")]]);
    assert!(client.truth(
        "SELECT d.context_bound AND d.key_name = 'pii' AND d.state = 'active' \
         AND d.slot_id = rekey.slot_id(c) AND d.value_bytes = 9999 FROM t, rekey.describe(c) d"
    ));
    assert!(client.truth(
        "SELECT rekey.can_open(c, 'a') AND NOT rekey.can_open(c, 'b') \
         AND NOT rekey.can_open(c, '') FROM t"
    ));
}

#[test]
fn functions_are_declared_as_designed() {
    let (_database, mut client) = session("declared");
    let declared = client.rows(
        "SELECT proname, provolatile, proparallel, procost, proleakproof, proisstrict FROM pg_proc \
         WHERE proname IN ('encrypt_col', 'decrypt_col', 'decrypt_col_as') ORDER BY proname",
    );
    let declared: Vec<String> = declared
        .into_iter()
        .map(|row| row.into_iter().flatten().collect::<Vec<_>>().join(" "))
        .collect();
    let seal = "encrypt_col v r 20 f f";
    assert_eq!(
        declared,
        [
            "decrypt_col s s 20 f f",
            "decrypt_col_as s s 20 f f",
            "decrypt_col_as s s 20 f f",
            seal,
            seal,
            seal
        ]
    );
}

#[test]
fn unknown_settings_of_our_prefix_are_refused() {
    let (_database, mut client) = session("settings");
    client.fail("SET rekey.defaultkey = 'pii'", "42602");
    client.fail("SET rekey.root_key_file = '/tmp/x'", "55P02");
    client.fail("SET rekey.key_cache_slots = 1000", "55P02");
}
