//! The Python reader of examples/reader opens what the extension has sealed, without it.
//!
//! The wrapped keys reach it as docs/format.md exports them. Python and its package `cryptography`
//! are part of what scripts/setup.sh installs: without them these tests fail.

use std::path::PathBuf;
use std::process::{Command, Output};

use rekey_tests::bytes::{hex, unhex};
use rekey_tests::{Ask, Cluster, Options, Page};

/// A Python that has what the reader needs: the system's, or another one of the PATH.
fn python() -> Command {
    let import = "import cryptography.hazmat.primitives.ciphers.aead";
    let works = |program: &&str| {
        let tried = Command::new(program).args(["-c", import]).output();
        tried.is_ok_and(|output| output.status.success())
    };
    let found = ["/usr/bin/python3", "python3"].into_iter().find(works);
    Command::new(found.expect("a python3 with the package cryptography: run scripts/setup.sh"))
}

fn project(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(path)
}

/// Runs the reader, as a person would.
fn read(cluster: &Cluster, envelope: &str, context: Option<&str>) -> Output {
    python()
        .arg(project("examples/reader/open_envelope.py"))
        .args([cluster.root_key_file(), cluster.dir().join("slots.csv")])
        .arg(envelope)
        .args(context)
        .output()
        .expect("the reader")
}

#[test]
fn it_opens_every_kind_of_value_across_rotations_and_refuses_a_flipped_bit() {
    let cluster = Cluster::start(Options::preloaded());
    let mut client = cluster.database("app").connect();
    client.run(
        "SELECT rekey.create_key('pii');
         SELECT rekey.create_key('naïve, \"the\" ключ');
         CREATE TYPE \"Mood\" AS ENUM ('glad', 'low');
         CREATE TABLE sealed (id int GENERATED ALWAYS AS IDENTITY, c bytea, context text)",
    );
    let values = [
        "'hello'::text",
        "''::text",
        "'naïve 世界 🔑'::text",
        "repeat('long ', 20000)",
        "'\\x00ff'::bytea",
        "''::bytea",
        "4200.50::numeric",
        "'2026-01-31 23:59:59.5+02'::timestamptz",
        "'{1,NULL,3}'::int[]",
        "'{\"a\": [1, 2]}'::jsonb",
        "'glad'::\"Mood\"",
        "true",
    ];
    let seal = |key: &str, context: &str| -> String {
        values
            .iter()
            .map(|value| {
                format!(
                    "INSERT INTO sealed (c, context) VALUES \
                     (encrypt_col({value}, '{key}', {context}), {context});"
                )
            })
            .collect()
    };
    client.run(&seal("pii", "''"));
    client.run("SELECT rotate_key('pii'); SELECT rekey.rotate_root_key()");
    client.run(&seal("pii", "rekey.context('sealed.c', 'ключ')"));
    client.run(&seal("naïve, \"the\" ключ", "'x'"));
    let only_new = "SELECT count(DISTINCT rekey.slot_id(c)) FROM sealed";
    assert_eq!(client.number(only_new), 3, "slots");
    Page::open("format.md").rest(&cluster, "app");

    let rows = client.rows(
        "SELECT c, context, CASE WHEN context = '' THEN decrypt_col(c) ELSE decrypt_col(c, context) \
         END FROM sealed WHERE octet_length(c) < 10000 ORDER BY id",
    );
    assert_eq!(rows.len(), 3 * (values.len() - 1), "a long one is a file's");
    // Each value once, in one of its three places: a process takes its time.
    let chosen = rows
        .into_iter()
        .enumerate()
        .filter(|(i, _)| i % 3 == i / (values.len() - 1));
    for (_, row) in chosen {
        let [envelope, context, value] = row.try_into().expect("three columns");
        let (envelope, value) = (envelope.expect("bytes"), value.expect("a value"));
        let context = context.filter(|context| !context.is_empty());
        let output = read(&cluster, &envelope, context.as_deref());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{value}: {errors}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), value);
    }

    let envelope = unhex(&client.text("SELECT c FROM sealed WHERE id = 3"));
    for place in [1, 12, 40, envelope.len() - 1] {
        let mut altered = envelope.clone();
        altered[place] ^= 4;
        let output = read(&cluster, &hex(&altered), None);
        assert!(!output.status.success(), "byte {place}");
        assert!(output.stdout.is_empty(), "byte {place}");
    }
    let output = read(&cluster, &hex(&envelope), Some("x"));
    assert!(!output.status.success(), "a context that is not bound");
}

#[test]
fn it_is_short_enough_to_be_read() {
    let text = std::fs::read_to_string(project("examples/reader/open_envelope.py"));
    let text = text.expect("the reader");
    let code = text
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'));
    assert!(code.count() <= 30);
}

/// Judges the published vectors by the reader's functions.
const JUDGE: &str = r#"
import json, sys
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
from open_envelope import open_envelope, unwrap
opened = refused = 0
def vectors(name): return json.load(open(sys.argv[2] + "/" + name + ".json"))
def fails(act):
    try: act()
    except Exception: return True
    return False
for v in vectors("envelopes"):
    kind, value = open_envelope(bytes.fromhex(v["dek"]), bytes.fromhex(v["envelope"]), v["context"])
    assert kind == v.get("type", v["kind"]), v["name"]
    assert value == (bytes.fromhex if kind == "bytea" else str.encode)(v["value"]), v["name"]
    opened += 1
for v in vectors("wrapped_keys"):
    assert unwrap(bytes.fromhex(v["root_key"]), v).hex() == v["dek"], v
    opened += 1
for v in vectors("envelopes_refused"):
    dek, envelope = bytes.fromhex(v["dek"]), bytes.fromhex(v["envelope"])
    assert fails(lambda: open_envelope(dek, envelope, v["context"])), v["name"]
    refused += 1
for v in vectors("wrapped_keys_refused"):
    root_id = next(r["root_id"] for r in vectors("root_keys") if r["root_key"] == v["root_key"])
    row = {"root_id": root_id, **v}
    assert fails(lambda: unwrap(bytes.fromhex(v["root_key"]), row)), v["name"]
    refused += 1
print(opened, refused)
"#;

#[test]
fn it_opens_the_published_vectors_and_refuses_those_to_be_refused() {
    let output = python()
        .args(["-c", JUDGE])
        .args([project("examples/reader"), project("tests/vectors")])
        .output()
        .expect("python");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let counts = String::from_utf8_lossy(&output.stdout);
    let mut counts = counts.split_whitespace().map(|n| n.parse().unwrap_or(0));
    assert!(
        counts.next() >= Some(14) && counts.next() >= Some(40),
        "{counts:?}"
    );
}
