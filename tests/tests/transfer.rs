//! Slots out of backups, and keys from one cluster to another.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::bytes::hex;
use rekey_tests::{Ask, Cluster, Options};

const OPEN: &str = "SELECT decrypt_col(c) FROM t";

/// Two clusters with root keys of their own.
fn clusters() -> &'static [Cluster; 2] {
    static CLUSTERS: OnceLock<[Cluster; 2]> = OnceLock::new();
    CLUSTERS.get_or_init(|| [(); 2].map(|()| Cluster::start(Options::preloaded())))
}

/// A database on each, the first with a key of two slots and a row under each.
fn pair(name: &str) -> [Client; 2] {
    let [mut there, here] = clusters()
        .each_ref()
        .map(|cluster| cluster.database(name).connect());
    with_rows(&mut there);
    [there, here]
}

fn with_rows(client: &mut Client) {
    client.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c;
         SELECT rotate_key('pii');
         INSERT INTO t VALUES (encrypt_col('two', 'pii'))",
    );
}

/// Copies the sealed rows.
fn copy_rows(from: &mut Client, to: &mut Client) {
    to.run("CREATE TABLE IF NOT EXISTS t (c bytea); DELETE FROM t");
    for envelope in from.column("SELECT c FROM t") {
        to.run(&format!("INSERT INTO t VALUES ('{envelope}')"));
    }
}

fn export(client: &mut Client, transport: &[u8]) -> String {
    let row = client.query_one("SELECT rekey.export_key('pii', $1)::text", &[&transport]);
    row.expect("an export").get(0)
}

fn import(client: &mut Client, document: &str, transport: &[u8]) -> i32 {
    let sql = "SELECT rekey.import_key($1::text::jsonb, $2)";
    let row = client.query_one(sql, &[&document, &transport]);
    row.expect("an import").get(0)
}

#[test]
fn a_key_travels_under_a_transport_key() {
    let [mut there, mut here] = pair("transport");
    there.run("SELECT rekey.destroy_slot(rekey.prepare_key('pii'))");
    there.run("SELECT rekey.set_policy('pii', require_context => true)");
    let transport = [7; 32];
    let document = export(&mut there, &transport);
    assert!(!document.contains(&hex(&transport)));
    assert_eq!(import(&mut here, &document, &transport), 3);
    copy_rows(&mut there, &mut here);
    assert_eq!(here.column(&format!("{OPEN} ORDER BY 1")), ["one", "two"]);
    let slots = "SELECT slot_id, version, state, superseded_at IS NULL, destroyed_at IS NULL \
                 FROM rekey.slots ORDER BY version";
    assert_eq!(here.rows(slots), there.rows(slots));
    assert!(here.truth("SELECT require_context FROM rekey.keys"));
    assert_eq!(here.text("SELECT owner FROM rekey.keys"), "postgres");
    let own = "SELECT count(*) FROM rekey.slot_wrap JOIN rekey.root_key USING (root_id)";
    assert_eq!(
        here.number(own),
        2,
        "wrapped under the root key here, and nothing else"
    );
    assert_eq!(here.number("SELECT count(*) FROM rekey.slot_wrap"), 2);
    // Both write for the same subscriber now.
    let envelope = there.text("SELECT encrypt_col('x', 'pii', 'c')");
    assert_eq!(
        here.text(&format!("SELECT decrypt_col('{envelope}', 'c')")),
        "x"
    );
    let envelope = here.text("SELECT encrypt_col('y', 'pii', 'c')");
    assert_eq!(
        there.text(&format!("SELECT decrypt_col('{envelope}', 'c')")),
        "y"
    );
    for client in [&mut there, &mut here] {
        let audit = "SELECT count(*) FROM rekey.audit WHERE action IN ('export_key', 'import_key')";
        assert!(client.number(audit) >= 1);
    }
}

#[test]
fn importing_again_adds_nothing_and_follows_rotations() {
    let [mut there, mut here] = pair("again");
    let transport = [8; 32];
    let document = export(&mut there, &transport);
    assert_eq!(import(&mut here, &document, &transport), 2);
    let slots = "SELECT slot_id, version, state FROM rekey.slots ORDER BY version";
    let before = here.rows(slots);
    assert_eq!(import(&mut here, &document, &transport), 0);
    assert_eq!(here.rows(slots), before);
    let pending = there.number("SELECT rekey.prepare_key('pii')");
    let document = export(&mut there, &transport);
    assert_eq!(import(&mut here, &document, &transport), 1);
    assert_eq!(here.rows(slots), there.rows(slots));
    there.run("SELECT rekey.promote_key('pii')");
    let promoted = export(&mut there, &transport);
    assert_eq!(import(&mut here, &promoted, &transport), 0);
    assert_eq!(here.number("SELECT active_slot FROM rekey.keys"), pending);
    assert_eq!(here.rows(slots), there.rows(slots));
    there.run("SELECT rotate_key('pii')");
    let rotated = export(&mut there, &transport);
    assert_eq!(import(&mut here, &rotated, &transport), 1);
    assert_eq!(here.rows(slots), there.rows(slots));
    // Rotated here too: the active slot here stays, and theirs opens.
    let own = here.number("SELECT rotate_key('pii')");
    there.run("SELECT rotate_key('pii')");
    let envelope = there.text("SELECT encrypt_col('theirs', 'pii')");
    let diverged = export(&mut there, &transport);
    assert_eq!(import(&mut here, &diverged, &transport), 1);
    assert_eq!(here.number("SELECT active_slot FROM rekey.keys"), own);
    assert_eq!(
        here.text(&format!("SELECT decrypt_col('{envelope}')")),
        "theirs"
    );
    // What was closed here stays closed.
    let closed = here.number("SELECT previous_slots[1] FROM rekey.keys");
    here.run(&format!("SELECT rekey.destroy_slot({closed}, true)"));
    assert_eq!(import(&mut here, &diverged, &transport), 0);
    assert_eq!(
        here.text(&format!(
            "SELECT state FROM rekey.slots WHERE slot_id = {closed}"
        )),
        "destroyed"
    );
}

#[test]
fn a_key_travels_under_a_root_key_that_both_hold() {
    let [mut there, mut other] = pair("shared");
    let document = there.text("SELECT rekey.export_key('pii')");
    let import_it = format!("SELECT rekey.import_key('{document}')");
    let root = there.text("SELECT root_id FROM rekey.root_keys");
    other.refuse(&import_it, "F0000").names(&root);
    assert_eq!(
        other.number("SELECT count(*) FROM rekey.keys"),
        0,
        "nothing is left of it"
    );
    let mut here = clusters()[0].database("shared_here").connect();
    assert_eq!(here.number(&import_it), 2);
    copy_rows(&mut there, &mut here);
    assert_eq!(here.column(&format!("{OPEN} ORDER BY 1")), ["one", "two"]);
}

#[test]
fn a_key_can_get_another_name_on_its_way() {
    let [mut there, mut here] = pair("renamed");
    let document = there.text("SELECT rekey.export_key('pii', repeat('k', 32)::bytea)");
    let sql = format!("SELECT rekey.import_key('{document}', repeat('k', 32)::bytea, 'theirs')");
    assert_eq!(here.number(&sql), 2);
    copy_rows(&mut there, &mut here);
    assert_eq!(here.column(&format!("{OPEN} ORDER BY 1")), ["one", "two"]);
    assert_eq!(here.text("SELECT key_name FROM rekey.keys"), "theirs");
    here.refuse(
        &format!("SELECT rekey.import_key('{document}', repeat('k', 32)::bytea)"),
        "55000",
    )
    .names("belongs to key \"theirs\"");
    assert_eq!(here.number("SELECT count(*) FROM rekey.keys"), 1);
}

#[test]
fn a_wrong_transport_key_or_an_altered_document_is_refused_and_nothing_is_kept() {
    let [mut there, mut here] = pair("altered");
    let document = there.text("SELECT rekey.export_key('pii', repeat('k', 32)::bytea)");
    let id = there.text("SELECT active_slot FROM rekey.keys");
    let import =
        |document: &str, key: &str| format!("SELECT rekey.import_key($${document}$$, {key})");
    let right = "repeat('k', 32)::bytea";
    here.refuse(&import(&document, "repeat('j', 32)::bytea"), "22023")
        .names("transport key");
    here.refuse(&import(&document, "NULL"), "F0000");
    for key in [
        "repeat('k', 31)::bytea",
        "repeat('k', 33)::bytea",
        "''::bytea",
    ] {
        here.refuse(&import(&document, key), "22023")
            .names("exactly 32 bytes");
        there.refuse(&format!("SELECT rekey.export_key('pii', {key})"), "22023");
    }
    let check = there.text("SELECT encode(check_value, 'hex') FROM rekey.key_slot LIMIT 1");
    let other_id = if id.ends_with('1') { "2" } else { "1" };
    let relabelled = format!("{}{other_id}", &id[..id.len() - 1]);
    for altered in [
        document.replace(&check, &"0".repeat(64)),
        document.replace(&id, &relabelled),
        document.replace("\"pii\"", "\"other\""),
        document.replace("\"version\": 1,", "\"version\": 2,"),
        document.replacen('{', "{\"more\": 1,", 1),
        document.replace("\"purpose\": \"seal\",", ""),
        document.replace("\"active\"", "\"destroyed\""),
        document.replace("\"previous\"", "\"active\""),
        document.replace("\"purpose\": \"seal\"", "\"purpose\": null"),
        "{}".to_owned(),
        "[]".to_owned(),
        "null".to_owned(),
        "7".to_owned(),
    ] {
        assert_ne!(altered, document);
        here.refuse(&import(&altered, right), "22023");
    }
    assert_eq!(here.number("SELECT count(*) FROM rekey.slots"), 0);
    assert_eq!(here.number("SELECT count(*) FROM rekey.keys"), 0);
    here.fail("SELECT rekey.import_key(NULL)", "22004");
    assert_eq!(here.number(&import(&document, right)), 2);
    // A slot with the same id and another key, as a catalog that was tampered with would have it.
    here.run(&format!(
        "BEGIN; SET LOCAL session_replication_role = replica;
         UPDATE rekey.key_slot SET check_value = set_byte(check_value, 0, get_byte(check_value, 0) # 1)
          WHERE slot_id = {id}; COMMIT"
    ));
    here.refuse(&import(&document, right), "55000").names(&id);
}

#[test]
fn a_shredded_key_arrives_shredded() {
    let [mut there, mut here] = pair("shredded");
    there.run("SELECT rekey.shred_key('pii', 'test')");
    let document = there.text("SELECT rekey.export_key('pii')");
    assert_eq!(
        here.number(&format!("SELECT rekey.import_key('{document}')")),
        2
    );
    here.refuse("SELECT encrypt_col('x', 'pii')", "55000");
    here.refuse("SELECT rotate_key('pii')", "55000")
        .names("shredded");
    let living = "SELECT count(*) FROM rekey.slots WHERE state <> 'destroyed'";
    assert_eq!(here.number(living), 0);
}

#[test]
fn a_transport_key_does_not_reach_the_log() {
    let [mut there, mut here] = pair("secret");
    let key = "TransportKeyOfThirtyTwoBytes!!!!";
    let document = there.text(&format!("SELECT rekey.export_key('pii', '{key}')"));
    here.refuse(
        &format!(
            "SELECT rekey.import_key('{}', '{key}')",
            document.replace("seal", "sale")
        ),
        "22023",
    );
    there.refuse(
        &format!("SELECT rekey.export_key('no such key', '{key}')"),
        "42704",
    );
    // Errors of PostgreSQL's own, before the function runs.
    let hex: String = key.bytes().map(|byte| format!("{byte:02x}")).collect();
    for call in [
        "export_key('pii', $$\\x{}$$)",
        "\"import_key\" ('{', $$\\x{}$$)",
    ] {
        for wrong in ["1/0", "nobody()"] {
            let call = call.replace("{}", &hex);
            let sql = format!("SELECT rekey.{call}, {wrong}");
            there.simple_query(&sql).expect_err("a refusal");
        }
    }
    let role = there.text("SELECT current_database() || '_nobody'");
    there.run(&format!("CREATE ROLE {role}; SET ROLE {role}"));
    there.fail(&format!("SELECT rekey.export_key('pii', '{key}')"), "42501");
    for cluster in clusters() {
        let log = cluster.log();
        for form in [key, &hex] {
            assert!(!log.contains(form), "the transport key is in the log");
        }
    }
}

#[test]
fn a_destroyed_slot_comes_back_out_of_a_backup() {
    // Of its own: it rotates the root key, which all databases of a cluster share.
    let cluster = Cluster::start(Options::preloaded());
    let mut client = cluster.database("restored").connect();
    with_rows(&mut client);
    let slot = client.number("SELECT previous_slots[1] FROM rekey.keys");
    let wrap = client.text(&format!(
        "SELECT wrapped_key FROM rekey.slot_wrap WHERE slot_id = {slot}"
    ));
    let other = client.text(&format!(
        "SELECT wrapped_key FROM rekey.slot_wrap WHERE slot_id <> {slot}"
    ));
    let root = client.text("SELECT root_id FROM rekey.root_keys");
    let restore = |slot: i64, wrap: &str| {
        format!("SELECT rekey.restore_slot({slot}, '{wrap}', '{root}', 'out of the backup')")
    };
    client
        .refuse(&restore(slot, &wrap), "55000")
        .names("previous");
    client.run(&format!("SELECT rekey.destroy_slot({slot}, true)"));
    client.refuse(OPEN, "55000");
    client.refuse(&restore(slot, &other), "22023");
    client.refuse(&restore(slot, "\\x00"), "22023");
    client.refuse(&restore(1, &wrap), "42704");
    let unknown = restore(slot, &wrap).replace(&root, &"0".repeat(32));
    client.refuse(&unknown, "F0000");
    client.refuse(OPEN, "55000");
    // In between the root key was rotated: the old backup needs the old root key, no more.
    client.run("SELECT rekey.rotate_root_key()");
    client.run(&restore(slot, &wrap));
    assert_eq!(client.column(&format!("{OPEN} ORDER BY 1")), ["one", "two"]);
    let row = format!(
        "SELECT state, destroyed_at IS NULL, reason FROM rekey.slots WHERE slot_id = {slot}"
    );
    assert_eq!(
        client.rows(&row),
        [[
            Some("previous".into()),
            Some("t".into()),
            Some("out of the backup".into())
        ]]
    );
    let wraps = format!("SELECT count(*) FROM rekey.slot_wrap WHERE slot_id = {slot}");
    assert_eq!(client.number(&wraps), 2, "under every root key in use");
    let audit =
        "SELECT from_state || ' ' || to_state FROM rekey.audit WHERE action = 'restore_slot'";
    assert_eq!(client.text(audit), "destroyed previous");
}

#[test]
fn a_shredded_slot_that_comes_back_opens_and_seals_nothing() {
    let [mut client, _] = pair("shred_back");
    let slot = client.number("SELECT active_slot FROM rekey.keys");
    let wrap = client.text(&format!(
        "SELECT wrapped_key FROM rekey.slot_wrap WHERE slot_id = {slot}"
    ));
    let root = client.text("SELECT root_id FROM rekey.root_keys");
    client.run("SELECT rekey.shred_key('pii', 'by mistake')");
    client.run(&format!(
        "SELECT rekey.restore_slot({slot}, '{wrap}', '{root}', 'mistake')"
    ));
    assert_eq!(
        client.text(&format!("{OPEN} WHERE rekey.slot_id(c) = {slot}")),
        "two"
    );
    client.refuse("SELECT encrypt_col('x', 'pii')", "55000");
    assert!(
        client.truth("SELECT superseded_at IS NOT NULL FROM rekey.slots WHERE state = 'previous'")
    );
}
