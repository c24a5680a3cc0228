//! Sealing holds the barrier lock to the end of its top transaction, whatever happens inside.
//!
//! The worker of a rotation waits for these locks; if one were dropped early, a value sealed under
//! the old slot could be stored behind the proof that the slot is unused.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::unloaded()))
}

fn database<'a>(cluster: &'a Cluster, name: &str) -> Database<'a> {
    let database = cluster.database(name);
    database.connect().run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c",
    );
    database
}

/// The modes in which this session's transaction locks the barrier.
fn held(client: &mut Client) -> Vec<String> {
    client.column(
        "SELECT mode FROM pg_locks WHERE relation = 'rekey.barrier'::regclass \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
         AND granted AND pid = pg_backend_pid()",
    )
}

const HELD: [&str; 1] = ["RowExclusiveLock"];
const SEAL: &str = "SELECT encrypt_col('x', 'pii')";

#[test]
fn the_barrier_is_held_from_the_first_seal_to_commit() {
    let database = database(cluster(), "held");
    let mut client = database.connect();
    client.run("BEGIN");
    assert!(held(&mut client).is_empty());
    client.run(SEAL);
    assert_eq!(held(&mut client), HELD);
    client.run(SEAL);
    assert_eq!(held(&mut client), HELD, "once");
    client.run("COMMIT");
    assert!(held(&mut client).is_empty());
    client.run("BEGIN");
    client.run(SEAL);
    assert_eq!(held(&mut client), HELD, "in the next transaction again");
    client.run("ROLLBACK");
    assert!(held(&mut client).is_empty());
}

#[test]
fn each_overload_and_each_type_takes_it() {
    let database = database(cluster(), "overloads");
    let mut client = database.connect();
    for value in ["'x'::text", "'x'::bytea", "1", "'{}'::jsonb"] {
        client.run(&format!("BEGIN; SELECT encrypt_col({value}, 'pii')"));
        assert_eq!(held(&mut client), HELD, "{value}");
        client.run("COMMIT");
    }
}

#[test]
fn rolling_back_the_savepoint_of_the_first_seal_does_not_release_it() {
    let database = database(cluster(), "savepoint");
    let mut client = database.connect();
    client.run("BEGIN; SAVEPOINT a; SAVEPOINT b");
    client.run(SEAL);
    client.run("ROLLBACK TO b");
    assert_eq!(held(&mut client), HELD);
    client.run("ROLLBACK TO a");
    assert_eq!(held(&mut client), HELD);
    client.run(SEAL);
    client.run("RELEASE a");
    assert_eq!(held(&mut client), HELD);
    client.run("COMMIT");
    assert!(held(&mut client).is_empty());
}

#[test]
fn an_exception_block_around_the_first_seal_does_not_release_it() {
    let database = database(cluster(), "exception");
    let mut client = database.connect();
    client.run(
        "BEGIN;
         CREATE FUNCTION pg_temp.keep() RETURNS bytea LANGUAGE plpgsql AS $$
         DECLARE kept bytea;
         BEGIN
             BEGIN
                 kept := encrypt_col('kept', 'pii');
                 RAISE EXCEPTION 'undone';
             EXCEPTION WHEN raise_exception THEN
                 NULL;
             END;
             RETURN kept;
         END $$",
    );
    let kept = client.text("SELECT pg_temp.keep()");
    assert_eq!(held(&mut client), HELD, "the variable outlived its block");
    assert_eq!(
        client.text(&format!("SELECT decrypt_col('{kept}')")),
        "kept"
    );
    client.run("COMMIT");
}

#[test]
fn a_failed_statement_in_a_savepoint_does_not_release_it() {
    let database = database(cluster(), "failed");
    let mut client = database.connect();
    client.run("BEGIN; SAVEPOINT s");
    client.fail(
        "SELECT encrypt_col('x', 'pii'), 1 / (random() * 0)::int",
        "22012",
    );
    client.run("ROLLBACK TO s");
    assert_eq!(
        held(&mut client),
        HELD,
        "it was sealed before the statement failed"
    );
    client.run("COMMIT");
    assert!(held(&mut client).is_empty());
}

#[test]
fn a_procedure_that_commits_takes_it_anew() {
    let database = database(cluster(), "procedure");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE seen (step int, locks bigint);
         CREATE FUNCTION locks() RETURNS bigint LANGUAGE sql AS $$
             SELECT count(*) FROM pg_locks WHERE relation = 'rekey.barrier'::regclass
             AND pid = pg_backend_pid() $$;
         CREATE PROCEDURE steps() LANGUAGE plpgsql AS $$
         DECLARE noted bigint[];
         BEGIN
             PERFORM encrypt_col('x', 'pii');
             noted := noted || locks();
             COMMIT;
             noted := noted || locks();
             PERFORM encrypt_col('x', 'pii');
             noted := noted || locks();
             ROLLBACK;
             noted := noted || locks();
             INSERT INTO seen SELECT ordinality, n FROM unnest(noted) WITH ORDINALITY AS u (n);
         END $$",
    );
    client.run("CALL steps()");
    let seen = client.column("SELECT step || ':' || locks FROM seen ORDER BY step");
    assert_eq!(seen, ["1:1", "2:0", "3:1", "4:0"]);
}

#[test]
fn a_prepared_transaction_keeps_it_over_a_crash() {
    let cluster = Cluster::start(Options::preloaded());
    let database = database(&cluster, "prepared");
    let held_by_prepared = |client: &mut Client| {
        client.number(
            "SELECT count(*) FROM pg_locks WHERE relation = 'rekey.barrier'::regclass \
             AND mode = 'RowExclusiveLock' AND granted AND pid IS NULL",
        )
    };
    let mut client = database.connect();
    client.run(
        "BEGIN; SAVEPOINT s; INSERT INTO t VALUES (encrypt_col('undone', 'pii')); ROLLBACK TO s;
         INSERT INTO t VALUES (encrypt_col('two', 'pii')); PREPARE TRANSACTION 'seals'",
    );
    assert!(
        held(&mut client).is_empty(),
        "handed over to the prepared transaction"
    );
    assert_eq!(held_by_prepared(&mut client), 1);
    client.run("BEGIN");
    client.run(SEAL);
    assert_eq!(
        held(&mut client),
        HELD,
        "the session's next transaction takes its own"
    );
    client.run("COMMIT");
    drop(client);
    cluster.kill();
    cluster.boot();
    let mut client = database.connect();
    assert_eq!(held_by_prepared(&mut client), 1, "after the crash");
    client.run("COMMIT PREPARED 'seals'");
    assert_eq!(held_by_prepared(&mut client), 0);
    assert_eq!(
        client.column("SELECT decrypt_col(c) FROM t ORDER BY 1"),
        ["one", "two"]
    );
}

#[test]
fn a_prepared_transaction_keeps_the_id_of_a_rotation_in_a_savepoint_locked_over_a_crash() {
    let cluster = Cluster::start(Options::preloaded());
    let database = database(&cluster, "prepared_writer");
    let mut client = database.connect();
    let locked = "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND granted \
                     AND mode = 'ExclusiveLock' AND pid IS NULL";
    client.run(
        "BEGIN; SAVEPOINT s; SELECT rotate_key('pii'); RELEASE s; PREPARE TRANSACTION 'rotates'",
    );
    assert_eq!(client.number(locked), 2, "its own and the savepoint's");
    drop(client);
    cluster.kill();
    cluster.boot();
    let mut client = database.connect();
    assert_eq!(client.number(locked), 2);
    client.run("COMMIT PREPARED 'rotates'");
    assert_eq!(client.number(locked), 0);
    assert_eq!(client.number("SELECT count(*) FROM rekey.slots"), 2);
}

#[test]
fn opening_takes_no_lock_on_the_barrier() {
    let database = database(cluster(), "opening");
    let mut client = database.connect();
    client.run("BEGIN; SELECT decrypt_col(c), rekey.can_open(c, ''), rekey.slot_id(c) FROM t");
    assert!(held(&mut client).is_empty());
    client.run("COMMIT");
}

#[test]
fn a_null_value_takes_no_lock_on_the_barrier() {
    let database = database(cluster(), "null_value");
    let mut client = database.connect();
    client.run("BEGIN; SELECT encrypt_col(NULL, 'pii')");
    assert!(held(&mut client).is_empty());
    client.run("COMMIT");
}

#[test]
fn a_thousand_keys_take_one_lock() {
    let database = database(cluster(), "many_keys");
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('k' || i) FROM generate_series(1, 1000) i");
    client.run("BEGIN; SELECT encrypt_col('x', 'k' || i) FROM generate_series(1, 1000) i");
    assert_eq!(held(&mut client), HELD);
    client.run("COMMIT");
}

#[test]
fn the_id_that_a_rotation_in_a_savepoint_writes_stays_locked_to_the_end_of_the_transaction() {
    // Who reads the new slot waits for this lock before he stores under it: until then sessions
    // that have not heard of the slot would miss what is stored.
    let database = database(cluster(), "writer_locked");
    let mut client = database.connect();
    let locked = "SELECT count(*) FROM rekey.key_slot s JOIN pg_locks l \
                      ON l.locktype = 'transactionid' AND l.transactionid = s.xmin \
                     AND l.mode = 'ExclusiveLock' AND l.granted";
    client.run("BEGIN; SAVEPOINT a; SAVEPOINT b; SELECT rotate_key('pii'); RELEASE b");
    assert!(client.truth("SELECT bool_and(xmin <> pg_current_xact_id()::xid) FROM rekey.key_slot"));
    assert_eq!(client.number(locked), 2, "the old slot and the new one");
    client.run("RELEASE a");
    assert_eq!(client.number(locked), 2);
    let sub = client.text("SELECT max(xmin::text) FROM rekey.key_slot");
    let mut other = database.connect();
    let held = format!(
        "SELECT count(*) FROM pg_locks WHERE transactionid = '{sub}' AND mode = 'ExclusiveLock'"
    );
    assert_eq!(other.number(&held), 1);
    client.run("COMMIT");
    assert_eq!(other.number(&held), 0);
    // As plpgsql and JDBC do it.
    client.run(
        "BEGIN; DO $$ BEGIN PERFORM rotate_key('pii'); EXCEPTION WHEN OTHERS THEN RAISE; END $$",
    );
    assert_eq!(client.number(locked), 2);
    client.run("ROLLBACK");
}
