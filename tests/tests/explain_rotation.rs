//! explain_rotation: what a rotation would cost and what would hold it up; it touches nothing.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        Cluster::start(
            Options::preloaded()
                .set("rekey.worker = off")
                .set("max_prepared_transactions = 5")
                .set("wal_level = logical"),
        )
    })
}

/// A database with 300 rows of the key pii in the registered column `t.c`, 200 of another key.
fn database(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let mut admin = database.connect();
    admin.run(
        "SELECT rekey.create_key('pii'), rekey.create_key('other');
         CREATE TABLE t (id int PRIMARY KEY, c bytea);
         INSERT INTO t
             SELECT i, encrypt_col('value', CASE WHEN i <= 300 THEN 'pii' ELSE 'other' END)
             FROM generate_series(1, 500) i;
         SELECT rekey.register_column('t', 'c')",
    );
    (database, admin)
}

/// Figure and note of an item about an object.
fn line(client: &mut Client, item: &str, object: &str) -> String {
    client
        .column(&format!(
            "SELECT figure || ' | ' || note FROM rekey.explain_rotation('pii') \
              WHERE item = '{item}' AND object LIKE '{object}'"
        ))
        .join("\n")
}

#[test]
fn rows_and_bytes_are_counted_where_that_is_cheap_and_the_rows_are_those_of_the_key() {
    let (_, mut admin) = database("counted");
    let rows = line(&mut admin, "rows", "public.t");
    assert!(rows.starts_with("300 | exact"), "{rows}");
    // 5 bytes of value and 50 of overhead each.
    let bytes = line(&mut admin, "bytes", "public.t");
    assert!(
        bytes.starts_with("16 kB") || bytes.starts_with("17 kB"),
        "{bytes}"
    );
    // After the rotation the same rows are stale, and still counted.
    admin.run("SELECT rotate_key('pii')");
    assert!(line(&mut admin, "rows", "public.t").starts_with("300"));
    assert!(line(&mut admin, "key", "pii").contains("1 previous"));
    admin.run("UPDATE t SET c = NULL WHERE id <= 300");
    assert_eq!(
        line(&mut admin, "rows", "public.t"),
        "",
        "nothing is left in it"
    );
    admin.run("SELECT rekey.prepare_key('pii')");
    assert!(line(&mut admin, "key", "pii").contains("pending"));
}

#[test]
fn the_fingerprints_of_a_lookup_key_are_counted_too() {
    let (_, mut admin) = database("lookup");
    admin.run(
        "SELECT rekey.create_key('find', purpose => 'lookup');
         ALTER TABLE t ADD fp bytea;
         UPDATE t SET fp = fingerprint_col('value', 'find') WHERE id <= 200;
         CREATE TABLE copies AS SELECT fp FROM t WHERE id <= 7;
         SELECT rekey.register_fingerprint('t', 'fp', 'c', 'find', 'pii')",
    );
    let mut line = |item: &str, object: &str| {
        admin.text(&format!(
            "SELECT figure || ' | ' || note FROM rekey.explain_rotation('find') \
              WHERE item = '{item}' AND object = '{object}'"
        ))
    };
    let rows = line("rows", "public.t");
    assert!(rows.starts_with("200 | exact"), "{rows}");
    let elsewhere = line("unregistered", "public.copies.fp");
    assert!(elsewhere.starts_with("7 | exact"), "{elsewhere}");
}

#[test]
fn large_tables_are_estimated_and_said_to_be() {
    let (_, mut admin) = database("large");
    // Two rows in a block, 2000 blocks: every second row is of the key.
    admin.run(
        "CREATE TABLE large (id int, filler text, c bytea);
         ALTER TABLE large ALTER filler SET STORAGE PLAIN;
         INSERT INTO large SELECT i, repeat('x', 3500), e.c
             FROM generate_series(1, 4000) i
             JOIN (VALUES (0, encrypt_col('v', 'pii')), (1, encrypt_col('v', 'other'))) AS e(n, c)
               ON e.n = i % 2;
         SELECT rekey.register_column('large', 'c')",
    );
    let rows = line(&mut admin, "rows", "public.large");
    assert!(rows.contains("estimate: 1,000 of 2,000 blocks"), "{rows}");
    let number = rows.split(' ').next().expect("a figure").replace(',', "");
    let number: i64 = number.parse().expect("a number");
    assert!((1800..=2200).contains(&number), "{rows}");
}

#[test]
fn what_makes_it_dearer_is_named() {
    let (_, mut admin) = database("dearer");
    admin.run(
        "ALTER TABLE t SET (fillfactor = 50);
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
         CREATE TRIGGER seen BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION f();
         ALTER TABLE t ENABLE ALWAYS TRIGGER seen;
         CREATE TRIGGER unseen BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION f();
         CREATE PUBLICATION p FOR TABLE t",
    );
    assert!(line(&mut admin, "hot", "public.t").starts_with("100 %"));
    let trigger = "SELECT string_agg(figure, ',') FROM rekey.explain_rotation('pii') \
                    WHERE item = 'trigger'";
    assert_eq!(admin.text(trigger), "seen");
    assert!(line(&mut admin, "publication", "public.t").contains("subscribers"));
    admin.run("ALTER TABLE t REPLICA IDENTITY NOTHING; CREATE INDEX on_c ON t ((length(c)))");
    assert!(line(&mut admin, "publication", "public.t").contains("NO REPLICA IDENTITY"));
    let hot = line(&mut admin, "hot", "public.t");
    assert!(hot.starts_with("0 %") && hot.contains("on_c"), "{hot}");
    admin.run("ALTER TABLE t REPLICA IDENTITY FULL");
    assert!(line(&mut admin, "publication", "public.t").contains("FULL"));
    admin.run("SELECT rekey.pause('t', reason => 'sale')");
    assert!(line(&mut admin, "pause", "public.t").contains("sale"));
    assert!(line(&mut admin, "worker", "").contains("CALL rekey.reencrypt()"));
    admin.run("SELECT pg_create_logical_replication_slot('nobody', 'pgoutput')");
    let slot = line(&mut admin, "replication slot", "nobody");
    admin.run("SELECT pg_drop_replication_slot('nobody')");
    assert!(slot.contains("nobody reads it"), "{slot}");
}

#[test]
fn the_pace_of_the_settings_gives_the_time() {
    let (_, mut admin) = database("pace");
    let time = |admin: &mut Client| line(admin, "time", "1 table");
    assert!(time(&mut admin).contains("rekey.work_ratio"));
    let seconds = |text: &str| -> i64 {
        assert!(text.contains("rekey.max_wal_rate"), "{text}");
        let words: Vec<&str> = text.split(' ').collect();
        let number: i64 = words[0].parse().expect("a number");
        if words[1] == "min" {
            number * 60
        } else {
            number
        }
    };
    admin.run("ALTER SYSTEM SET rekey.max_wal_rate = 1");
    admin.run("SELECT pg_reload_conf()");
    wait_until("the setting is read", || {
        time(&mut admin).contains("max_wal_rate")
    });
    let slow = time(&mut admin);
    admin.run("ALTER SYSTEM RESET rekey.max_wal_rate");
    admin.run("SELECT pg_reload_conf()");
    assert!(seconds(&slow) >= 60, "{slow}");
}

#[test]
fn envelopes_in_unregistered_columns_and_missing_columns_are_found() {
    let (_, mut admin) = database("unregistered");
    admin.run(
        "CREATE TABLE copy AS SELECT id, c FROM t;
         CREATE TABLE plain AS SELECT '\\x00'::bytea AS c;
         ALTER TABLE t ADD d bytea; SELECT rekey.register_column('t', 'd');
         ALTER TABLE t DROP d",
    );
    let found = "SELECT object || ' ' || figure FROM rekey.explain_rotation('pii') \
                  WHERE item = 'unregistered' AND object LIKE 'public.%'";
    assert_eq!(admin.column(found), ["public.copy.c 300"]);
    assert!(line(&mut admin, "unregistered", "2 bytea columns").contains("find_envelopes"));
    assert!(line(&mut admin, "trouble", "public.t").contains("\"d\" is gone"));
}

#[test]
fn transactions_that_would_hold_it_up_are_named() {
    let (database, mut admin) = database("holders");
    let mut sealing = database.connect();
    let pid = sealing.number("SELECT pg_backend_pid()");
    sealing.run("BEGIN; SELECT encrypt_col('v', 'pii')");
    let mut prepared = database.connect();
    prepared.run("BEGIN; SELECT encrypt_col('v', 'pii'); PREPARE TRANSACTION 'left behind'");
    let barrier = "SELECT object || ': ' || figure FROM rekey.explain_rotation('pii') \
                    WHERE item = 'barrier'";
    let held = admin.text(barrier);
    assert!(held.contains(&format!("pid {pid}")), "{held}");
    assert!(
        held.contains("'left behind'") && held.ends_with(": 2"),
        "{held}"
    );
    sealing.run("COMMIT");
    admin.run("COMMIT PREPARED 'left behind'");
    assert!(admin.column(barrier).is_empty());
}

#[test]
fn it_takes_no_transaction_id_and_waits_for_no_lock() {
    let (database, mut admin) = database("light");
    let mut locker = database.connect();
    locker.run("BEGIN; LOCK TABLE t");
    admin.run("BEGIN");
    assert!(line(&mut admin, "rows", "public.t").starts_with("? | not read"));
    assert!(line(&mut admin, "rows", "0 tables").contains("1 registered tables were not read"));
    assert_eq!(
        admin.cell("SELECT pg_current_xact_id_if_assigned()::text"),
        None
    );
    admin.run("COMMIT; BEGIN READ ONLY; SELECT * FROM rekey.explain_rotation('pii'); COMMIT");
}

#[test]
fn it_is_for_whom_it_was_granted_to() {
    let (database, mut admin) = database("who");
    let app = database.role("app");
    let mut session = database.connect_as(&app);
    let ask = "SELECT count(*) FROM rekey.explain_rotation('pii')";
    session.fail(ask, "42501");
    admin.run(&format!(
        "GRANT EXECUTE ON FUNCTION rekey.explain_rotation(text) TO {app}"
    ));
    assert!(session.number(ask) > 0);
    admin.refuse("SELECT * FROM rekey.explain_rotation('nobody')", "42704");
    admin.refuse("SELECT * FROM rekey.explain_rotation()", "42704");
    admin.run("SET rekey.default_key = 'pii'");
    assert!(admin.number("SELECT count(*) FROM rekey.explain_rotation()") > 0);
}
