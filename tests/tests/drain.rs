//! From a rotation to a drained slot and to its end, by CALL rekey.reencrypt(): the hard cases of
//! the barrier, the passes, the proof and the horizon, each by name.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        Cluster::start(
            Options::preloaded()
                .set("rekey.worker = off")
                .set("max_prepared_transactions = 10")
                .set("autovacuum = off"),
        )
    })
}

/// A database with a key without grace and a registered table of ten rows.
fn database(name: &str) -> Database<'static> {
    let database = cluster().database(name);
    database.connect().run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int PRIMARY KEY, c bytea, shadow text, n int DEFAULT 0);
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii'), 'v' || i
           FROM generate_series(1, 10) AS i;
         SELECT rekey.register_column('t', 'c')",
    );
    database
}

const STALE: &str = "SELECT count(*) FROM t WHERE rekey.slot_id(c) IS DISTINCT FROM \
                     (SELECT active_slot FROM rekey.keys)";
const WRONG: &str = "SELECT count(*) FROM t WHERE decrypt_col(c) IS DISTINCT FROM shadow";

fn states(client: &mut Client) -> Vec<String> {
    client.column("SELECT state FROM rekey.slots ORDER BY version")
}

fn old_slot(client: &mut Client) -> String {
    client.text("SELECT min(version)::text FROM rekey.slots");
    client.text("SELECT slot_id::text FROM rekey.slots ORDER BY version LIMIT 1")
}

fn reencrypt(client: &mut Client) {
    client.run("CALL rekey.reencrypt()");
}

/// Disables or destroys a slot as soon as the transactions of the tests beside this one are over:
/// snapshots here are held back by older ones in other databases.
fn end(client: &mut Client, function: &str, slot: &str) {
    let sql = format!("SELECT rekey.{function}({slot})");
    wait_until("older transactions have ended", || {
        match client.attempt(&sql) {
            Ok(()) => true,
            Err(refusal) if refusal.detail.to_lowercase().contains("older") => false,
            Err(refusal) => panic!("{sql}: {}", refusal.text()),
        }
    });
}

/// The refusal of disable_slot or destroy_slot that names `what`, once the tests beside this one
/// are not in the way.
fn refused(client: &mut Client, function: &str, slot: &str, what: &str) {
    let sql = format!("SELECT rekey.{function}({slot})");
    wait_until("the refusal names what is in the way", || {
        let refusal = client.attempt(&sql).expect_err(&sql);
        assert_eq!(refusal.code, "55000");
        refusal.detail.contains(what)
    });
}

/// What the tables' progress says, all of it.
const WAITS: &str = "SELECT coalesce(string_agg(phase || ' ' || waits_for, ', '), '') \
                     FROM rekey.progress";

#[test]
fn a_rotation_ends_in_a_drained_slot_with_its_proof() {
    let database = database("ends");
    let mut client = database.connect();
    client.run("SELECT rotate_key('pii')");
    assert_eq!(client.number(STALE), 10);
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(client.number(STALE), 0);
    assert_eq!(client.number(WRONG), 0);
    let proof = "SELECT proof->'tables'->0->>'table' || ' ' || (proof->'tables'->0->>'rows') \
                   FROM rekey.slots WHERE state = 'drained'";
    assert_eq!(client.text(proof), "public.t 10");
    assert!(client.truth(
        "SELECT (proof->>'lsn')::pg_lsn <= pg_current_wal_insert_lsn() \
            AND proof ?& '{at,horizon,system_identifier,database,exceptions}' \
           FROM rekey.slots WHERE state = 'drained'"
    ));
    let slot = old_slot(&mut client);
    end(&mut client, "disable_slot", &slot);
    end(&mut client, "destroy_slot", &slot);
    assert_eq!(states(&mut client), ["destroyed", "active"]);
    assert_eq!(client.number(WRONG), 0);
}

#[test]
fn re_encryption_keeps_kind_payload_and_context() {
    let database = database("keeps");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE k (id int, bound bytea, num bytea, bin bytea, gone bytea);
         INSERT INTO k SELECT i, encrypt_col('b', 'pii', rekey.context('k', i::text)),
             encrypt_col(i::numeric / 3, 'pii'), encrypt_col('\\xf9ff'::bytea, 'pii'), NULL
           FROM generate_series(1, 3) AS i;
         SELECT rekey.register_column('k', 'bound', 'rekey.context(''k'', id::text)');
         SELECT rekey.register_column('k', 'num'); SELECT rekey.register_column('k', 'bin');
         SELECT rekey.register_column('k', 'gone');
         SELECT rotate_key('pii')",
    );
    reencrypt(&mut client);
    assert_eq!(
        client.column("SELECT decrypt_col(bound, rekey.context('k', id::text)) FROM k"),
        ["b", "b", "b"]
    );
    assert!(
        client
            .truth("SELECT bool_and(decrypt_col_as(num, NULL::numeric) = id::numeric / 3) FROM k")
    );
    assert!(client.truth("SELECT bool_and(decrypt_col_as(bin, NULL::bytea) = '\\xf9ff') FROM k"));
    assert_eq!(
        client.column("SELECT DISTINCT (rekey.describe(num)).kind FROM k"),
        ["typed"]
    );
    assert_eq!(states(&mut client), ["drained", "active"]);
    client.refuse("SELECT decrypt_col(bound, 'other') FROM k", "39000");
}

#[test]
fn an_old_transaction_that_seals_before_and_after_a_rotation_and_commits_late_loses_nothing() {
    let database = database("late");
    let (mut old, mut client) = (database.connect(), database.connect());
    old.run("BEGIN");
    old.run("INSERT INTO t SELECT 11, encrypt_col('v11', 'pii'), 'v11'");
    client.run("SELECT rotate_key('pii')");
    old.run("INSERT INTO t SELECT 12, encrypt_col('v12', 'pii'), 'v12'");
    let pid = old.number("SELECT pg_backend_pid()");
    let mut other = database.connect();
    let run = std::thread::spawn(move || reencrypt(&mut other));
    wait_until("the barrier names the session", || {
        client.text(WAITS) == format!("barrier waits for pid {pid}")
    });
    assert_eq!(states(&mut client), ["previous", "active"]);
    old.run("COMMIT");
    run.join().expect("CALL reencrypt");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
}

#[test]
fn a_value_kept_in_a_variable_across_a_savepoint_rollback_is_found() {
    let database = database("variable");
    let (mut old, mut client) = (database.connect(), database.connect());
    old.run(
        "CREATE FUNCTION keep() RETURNS void LANGUAGE plpgsql AS $$
         DECLARE kept bytea;
         BEGIN
             BEGIN
                 kept := encrypt_col('kept', 'pii');
                 PERFORM 1 / 0;
             EXCEPTION WHEN division_by_zero THEN NULL;
             END;
             PERFORM pg_advisory_lock(1);
             INSERT INTO t VALUES (11, kept, 'kept');
         END $$",
    );
    let mut gate = database.connect();
    gate.run("SELECT pg_advisory_lock(1)");
    let sealing = std::thread::spawn(move || old.run("SELECT keep()"));
    wait_until("the function waits at the gate", || {
        client.number(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted \
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        ) == 1
    });
    client.run("SELECT rotate_key('pii')");
    let mut other = database.connect();
    let run = std::thread::spawn(move || reencrypt(&mut other));
    wait_until("the barrier waits", || {
        client.number("SELECT count(*) FROM rekey.progress WHERE phase = 'barrier'") == 1
    });
    gate.run("SELECT pg_advisory_unlock(1)");
    sealing.join().expect("the function");
    run.join().expect("CALL reencrypt");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
}

#[test]
fn a_prepared_transaction_holds_the_barrier_also_across_a_restart() {
    // Its own cluster: it is restarted.
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.worker = off")
            .set("max_prepared_transactions = 10"),
    );
    let database = cluster.database("prepared");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int PRIMARY KEY, c bytea, shadow text);
         SELECT rekey.register_column('t', 'c')",
    );
    client.run("BEGIN; INSERT INTO t SELECT 1, encrypt_col('v1', 'pii'), 'v1'");
    client.run("PREPARE TRANSACTION 'one'");
    client.run("SELECT rotate_key('pii')");
    drop(client);
    cluster.restart("fast");
    let mut client = database.connect();
    let mut other = database.connect();
    let run = std::thread::spawn(move || reencrypt(&mut other));
    wait_until("the barrier names the gid", || {
        client.text(WAITS) == "barrier waits for prepared transaction 'one'"
    });
    client.run("COMMIT PREPARED 'one'");
    run.join().expect("CALL reencrypt");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
}

#[test]
fn a_transaction_that_is_prepared_while_the_barrier_waits_is_waited_for_still() {
    let database = database("prepares");
    let (mut old, mut client) = (database.connect(), database.connect());
    old.run("BEGIN; INSERT INTO t SELECT 11, encrypt_col('v11', 'pii'), 'v11'");
    client.run("SELECT rotate_key('pii')");
    let mut other = database.connect();
    let run = std::thread::spawn(move || reencrypt(&mut other));
    wait_until("the barrier waits", || {
        client.number("SELECT count(*) FROM rekey.progress WHERE phase = 'barrier'") == 1
    });
    old.run("PREPARE TRANSACTION 'meanwhile'");
    wait_until("the barrier names the gid", || {
        client.text(WAITS).contains("'meanwhile'")
    });
    assert_eq!(states(&mut client), ["previous", "active"]);
    client.run("COMMIT PREPARED 'meanwhile'");
    run.join().expect("CALL reencrypt");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
}

#[test]
fn an_old_snapshot_that_copies_a_stale_row_after_a_clean_scan_keeps_the_slot() {
    let database = database("copies");
    let (mut old, mut client) = (database.connect(), database.connect());
    client.run("CREATE TABLE copy (LIKE t); SELECT rekey.register_column('copy', 'c')");
    client.run("SELECT rotate_key('pii')");
    old.run("BEGIN ISOLATION LEVEL REPEATABLE READ");
    old.number("SELECT count(*) FROM t");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    let slot = old_slot(&mut client);
    let pid = old.number("SELECT pg_backend_pid()");
    refused(&mut client, "disable_slot", &slot, &format!("pid {pid}"));
    old.run("INSERT INTO copy SELECT * FROM t");
    old.run("COMMIT");
    refused(&mut client, "disable_slot", &slot, "public.copy (10 rows)");
    refused(&mut client, "destroy_slot", &slot, "public.copy (10 rows)");
    assert_eq!(
        client.number("SELECT count(*) FROM copy WHERE decrypt_col(c) = shadow"),
        10,
        "a drained slot still opens"
    );
    client.run("SELECT rotate_key('pii')");
    reencrypt(&mut client);
    end(&mut client, "disable_slot", &slot);
    assert_eq!(states(&mut client), ["disabled", "drained", "active"]);
}

#[test]
fn a_copy_whose_statement_has_ended_and_whose_transaction_has_not_keeps_the_slot() {
    let database = database("uncommitted_copy");
    let (mut old, mut client) = (database.connect(), database.connect());
    client.run("CREATE TABLE copy (LIKE t); SELECT rekey.register_column('copy', 'c')");
    client.run("SELECT rotate_key('pii'); SELECT pg_advisory_lock(1)");
    let copying = std::thread::spawn(move || {
        // READ COMMITTED: its snapshot goes with the statement. Its transaction id is younger than
        // the proof: it gets one with the first row, behind the lock.
        old.run("BEGIN; INSERT INTO copy SELECT t.* FROM (SELECT pg_advisory_xact_lock(1)) l, t");
        old
    });
    let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    wait_until("the statement has its snapshot", || {
        client.number(waits) == 1
    });
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    client.run("SELECT pg_advisory_unlock(1)");
    let mut old = copying.join().expect("the copy");
    let slot = old_slot(&mut client);
    let pid = old.number("SELECT pg_backend_pid()");
    refused(&mut client, "disable_slot", &slot, &format!("pid {pid}"));
    // Prepared, it is as little at its end.
    old.run("PREPARE TRANSACTION 'copy'");
    refused(&mut client, "destroy_slot", &slot, "'copy'");
    old.run("COMMIT PREPARED 'copy'");
    refused(&mut client, "destroy_slot", &slot, "public.copy (10 rows)");
    assert_eq!(
        client.number("SELECT count(*) FROM copy WHERE decrypt_col(c) = shadow"),
        10
    );
}

/// A database with a table of one row per block: a batch is a small part of it.
fn large(name: &str) -> Database<'static> {
    let database = database(name);
    database.connect().run(
        "DROP TABLE t;
         CREATE TABLE t (id int PRIMARY KEY, c bytea, shadow text, n int DEFAULT 0, pad text);
         ALTER TABLE t ALTER pad SET STORAGE PLAIN, ALTER c SET STORAGE PLAIN;
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii'), 'v' || i, 0, repeat('x', 4100)
           FROM generate_series(1, 600) AS i;
         SELECT rekey.register_column('t', 'c'); SELECT rotate_key('pii')",
    );
    database
}

/// One batch of the pass over t: it is in the middle of the table then.
fn to_the_middle(client: &mut Client) {
    client.run("SELECT rekey.reencrypt_step('t', true)");
    let cursor = client.number("SELECT cursor_block FROM rekey.progress_state");
    assert!((1..500).contains(&cursor), "at block {cursor} of 600");
}

#[test]
fn an_update_of_another_column_behind_the_cursor_is_found_by_the_proof() {
    let database = large("behind");
    let mut client = database.connect();
    to_the_middle(&mut client);
    // Room behind the cursor: there the new version of a row that is before it is put.
    client.run("VACUUM t");
    database.connect().run("UPDATE t SET n = 1 WHERE id = 550");
    let place = client.text("SELECT (ctid::text::point)[0]::bigint FROM t WHERE id = 550");
    let behind = format!("SELECT {place} < cursor_block FROM rekey.progress_state");
    assert!(client.truth(&behind), "it lies in block {place}");
    let (mut noticing, notices) = database.cluster.connect_noticing(&database.name);
    noticing.run("CALL rekey.reencrypt()");
    let notices = notices.lock().expect("the notices").join("\n");
    assert!(
        notices.contains("the proof found 1 stale rows"),
        "{notices}"
    );
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
    assert_eq!(
        client.number("SELECT n FROM t WHERE id = 550"),
        1,
        "the application's write stays"
    );
}

#[test]
fn a_row_that_is_locked_while_the_pass_goes_by_is_looked_at_again() {
    let database = database("locked");
    let (mut old, mut client) = (database.connect(), database.connect());
    client.run("SELECT rotate_key('pii')");
    // The row is locked while the pass goes by, and keeps its stale envelope in a new version.
    old.run("BEGIN; UPDATE t SET n = 1 WHERE id = 3");
    let mut other = database.connect();
    let run = std::thread::spawn(move || reencrypt(&mut other));
    wait_until("the pass has skipped the row", || {
        client.number("SELECT coalesce(sum(rows_skipped), 0)::bigint FROM rekey.progress") > 0
    });
    assert_eq!(client.number(STALE), 1);
    old.run("COMMIT");
    run.join().expect("CALL reencrypt");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
    assert_eq!(
        client.number("SELECT n FROM t WHERE id = 3"),
        1,
        "the application's write stays"
    );
}

#[test]
fn a_second_rotation_meanwhile_leaves_no_slot_behind() {
    let database = database("twice");
    let mut client = database.connect();
    client.run("SELECT rotate_key('pii')");
    client.run("INSERT INTO t SELECT 11, encrypt_col('v11', 'pii'), 'v11'");
    client.run("SELECT rotate_key('pii')");
    assert_eq!(states(&mut client), ["previous", "previous", "active"]);
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
}

#[test]
fn a_rollback_and_another_rotation_void_what_was_scanned_before() {
    let database = database("voids");
    let mut client = database.connect();
    client.run("SELECT rotate_key('pii')");
    reencrypt(&mut client);
    client.run("SELECT rekey.rollback_rotation('pii')");
    client.run("INSERT INTO t SELECT 11, encrypt_col('v11', 'pii'), 'v11'");
    client.run("SELECT rotate_key('pii')");
    assert_eq!(states(&mut client), ["previous", "previous", "active"]);
    let slot = old_slot(&mut client);
    client.refuse(&format!("SELECT rekey.disable_slot({slot})"), "55000");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
}

#[test]
fn forty_keys_rotated_at_once_cost_one_pass_and_one_scan() {
    let database = database("forty");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE many (k text, c bytea);
         DO $$ BEGIN FOR i IN 1..40 LOOP
             PERFORM rekey.create_key('k' || i, grace => '0');
             INSERT INTO many SELECT 'k' || i, encrypt_col(i::text, 'k' || i)
               FROM generate_series(1, 20);
         END LOOP; END $$;
         SELECT rekey.register_column('many', 'c');
         SELECT rotate_key('k' || i) FROM generate_series(1, 40) AS i",
    );
    reencrypt(&mut client);
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'drained'"),
        40
    );
    // Of 800 rows, and what the first batches have put at the end of the table.
    let scanned = client
        .number("SELECT rows_scanned FROM rekey.progress WHERE table_name = 'many'::regclass");
    assert!((800..1200).contains(&scanned), "one pass: {scanned}");
    assert_eq!(
        client
            .number("SELECT count(DISTINCT proof->>'at') FROM rekey.slots WHERE state = 'drained'"),
        1,
        "one scan"
    );
}

#[test]
fn a_rotation_during_a_pass_waits_for_the_next_one_and_holds_up_no_drain() {
    let database = database("waves");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE many (c bytea, pad text DEFAULT repeat('x', 1000));
         INSERT INTO many SELECT encrypt_col('v' || i, 'pii') FROM generate_series(1, 2000) AS i;
         SELECT rekey.register_column('many', 'c');
         SELECT rekey.create_key('k' || i, grace => '0') FROM generate_series(1, 200) AS i;
         SELECT rotate_key('pii')",
    );
    // Each step of another session is followed by a rotation; it stands for a worker that is started
    // anew again and again.
    let drained = "SELECT count(*) FROM rekey.slots WHERE state = 'drained' AND key_name = 'pii'";
    let mut steps = 0;
    while client.number(drained) == 0 {
        steps += 1;
        assert!(steps <= 200, "no slot is drained in {steps} steps");
        let mut stepping = database.connect();
        stepping.run("SELECT rekey.reencrypt_step(NULL, true)");
        client.run(&format!("SELECT rotate_key('k{steps}')"));
    }
    assert!(steps > 20, "{steps} steps were no long pass");
    reencrypt(&mut client);
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'previous'"),
        0
    );
    let stale = "SELECT count(*) FROM many WHERE rekey.is_stale(c)";
    assert_eq!((client.number(stale), client.number(WRONG)), (0, 0));
}

#[test]
fn a_rotation_does_not_wait_for_a_wave_that_comes_to_no_end() {
    let database = database("endless");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('other', grace => '0');
         CREATE TABLE u (c bytea); INSERT INTO u SELECT encrypt_col('x', 'other');
         SELECT rekey.register_column('u', 'c');
         SELECT rotate_key('pii'); SELECT rekey.pause('t')",
    );
    reencrypt(&mut client);
    client.run("SELECT rotate_key('other')");
    reencrypt(&mut client);
    let stale = "SELECT count(*) FROM u WHERE rekey.is_stale(c)";
    assert_eq!(client.number(stale), 0, "another table is paused");
    client.run(
        "SELECT rekey.resume('t');
         UPDATE t SET c = set_byte(c, 40, get_byte(c, 40) # 1) WHERE id = 7",
    );
    reencrypt(&mut client);
    let of = "SELECT state FROM rekey.slots WHERE key_name = 'other' ORDER BY version";
    assert_eq!(client.column(of), ["drained", "active"]);
    client.run("SELECT rotate_key('other')");
    reencrypt(&mut client);
    assert_eq!(
        client.column(of),
        ["drained", "drained", "active"],
        "a row is under quarantine"
    );
}

#[test]
fn toasted_values_are_re_encrypted() {
    let database = database("toasted");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE big (id int, c bytea, shadow text, more text);
         INSERT INTO big SELECT i, encrypt_col(repeat('x' || i, 20000), 'pii'),
             repeat('x' || i, 20000), repeat(md5(i::text), 500) FROM generate_series(1, 5) AS i;
         SELECT rekey.register_column('big', 'c'); SELECT rotate_key('pii')",
    );
    reencrypt(&mut client);
    assert_eq!(
        client.number(
            "SELECT count(*) FROM big WHERE decrypt_col(c) = shadow AND length(more) = 16000 \
                AND rekey.slot_id(c) = (SELECT active_slot FROM rekey.keys)"
        ),
        5
    );
    assert_eq!(states(&mut client), ["drained", "active"]);
}

/// Runs SQL in a session of its own, and returns when the server has counted what it read.
fn apart(database: &Database<'_>, client: &mut Client, sql: &str) {
    let mut session = database.connect();
    let pid = session.number("SELECT pg_backend_pid()");
    session.run(sql);
    drop(session);
    let left = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}");
    wait_until("the session is gone", || client.number(&left) == 0);
}

#[test]
fn a_pass_and_a_proof_read_the_heads_of_toasted_values_that_are_not_stale_and_no_more() {
    let database = database("heads");
    let mut client = database.connect();
    apart(
        &database,
        &mut client,
        "CREATE TABLE big (c bytea); ALTER TABLE big ALTER c SET STORAGE EXTERNAL;
         INSERT INTO big SELECT encrypt_col(repeat('x', 1000000), 'pii')
           FROM generate_series(1, 4);
         SELECT rekey.register_column('big', 'c'); SELECT rekey.create_key('other');
         SELECT rotate_key('other')",
    );
    let blocks = |kind: &str| {
        format!(
            "SELECT coalesce({kind}_blks_read, 0) + coalesce({kind}_blks_hit, 0) \
               FROM pg_statio_user_tables WHERE relname = 'big'"
        )
    };
    let (heap, toast) = (blocks("heap"), blocks("toast"));
    let before = (client.number(&heap), client.number(&toast));
    apart(&database, &mut client, "CALL rekey.reencrypt()");
    let read = (
        client.number(&heap) - before.0,
        client.number(&toast) - before.1,
    );
    assert_eq!(
        client.column("SELECT state FROM rekey.slots WHERE key_name = 'other' ORDER BY version"),
        ["drained", "active"]
    );
    // One block of each value for the pass and one for the proof, of more than 125.
    assert!(read.0 > 0 && read.1 <= 16, "heap and toast: {read:?}");
}

#[test]
fn a_rewrite_of_the_table_begins_the_pass_again() {
    for (name, rewrite) in [
        ("rw_full", "VACUUM FULL t"),
        ("rw_cluster", "CLUSTER t USING t_pkey"),
        ("rw_alter", "ALTER TABLE t ALTER n TYPE bigint"),
        ("rw_truncate", "TRUNCATE t"),
    ] {
        let database = database(name);
        let mut client = database.connect();
        client.run("SELECT rotate_key('pii')");
        reencrypt(&mut client);
        client.run("SELECT rotate_key('pii')");
        client.run(rewrite);
        reencrypt(&mut client);
        assert_eq!(
            states(&mut client),
            ["drained", "drained", "active"],
            "{rewrite}"
        );
        assert_eq!(
            (client.number(STALE), client.number(WRONG)),
            (0, 0),
            "{rewrite}"
        );
    }
}

#[test]
fn a_rewrite_in_the_middle_of_a_pass_begins_it_again() {
    for (name, rewrite) in [
        ("mid_full", "VACUUM FULL t"),
        ("mid_cluster", "CLUSTER t USING t_pkey"),
        ("mid_alter", "ALTER TABLE t ALTER n TYPE bigint"),
        (
            "mid_truncate",
            "BEGIN; TRUNCATE t; INSERT INTO t SELECT * FROM kept; COMMIT",
        ),
    ] {
        let database = large(name);
        let mut client = database.connect();
        // Rows of before the rotation, which a TRUNCATE brings back in the same transaction.
        client.run("CREATE TABLE kept AS SELECT * FROM t");
        to_the_middle(&mut client);
        client.run(rewrite);
        // The same session goes on: what it remembers of the old file counts no more either.
        client.run("SELECT rekey.reencrypt_step('t', false)");
        assert!(
            client.truth(
                "SELECT file_node = pg_relation_filenode('t') AND rows_scanned > 0
                    AND cursor_block + blocks_left = blocks_total FROM rekey.progress_state"
            ),
            "{rewrite}: {:?}",
            client.rows("SELECT * FROM rekey.progress_state")
        );
        let (mut noticing, notices) = database.cluster.connect_noticing(&database.name);
        noticing.run("CALL rekey.reencrypt()");
        let notices = notices.lock().expect("the notices").join("\n");
        assert!(
            !notices.contains("the proof found"),
            "{rewrite}: the pass has left rows out: {notices}"
        );
        assert_eq!(states(&mut client), ["drained", "active"], "{rewrite}");
        assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
    }
}

#[test]
fn a_table_that_is_dropped_in_the_middle_of_its_pass_holds_up_no_other() {
    let database = large("mid_drop");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE u AS SELECT id, c, shadow FROM t WHERE id <= 20;
         SELECT rekey.register_column('u', 'c')",
    );
    to_the_middle(&mut client);
    client.run("DROP TABLE t");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(
        client
            .column("SELECT t->>'table' FROM rekey.slots, jsonb_array_elements(proof->'tables') t"),
        ["public.u"]
    );
    let opened = "SELECT count(*) FROM u WHERE decrypt_col(c) = shadow AND NOT rekey.is_stale(c)";
    assert_eq!(client.number(opened), 20);
}

#[test]
fn copy_on_conflict_and_merge_store_under_the_active_slot() {
    let database = database("stores");
    let mut client = database.connect();
    client.run("SELECT rotate_key('pii')");
    client.run(
        "INSERT INTO t SELECT 1, encrypt_col('a', 'pii'), 'a'
           ON CONFLICT (id) DO UPDATE SET c = excluded.c, shadow = excluded.shadow;
         MERGE INTO t USING (VALUES (2, 'b')) AS s(id, v) ON t.id = s.id
           WHEN MATCHED THEN UPDATE SET c = encrypt_col(s.v, 'pii'), shadow = s.v",
    );
    // Envelopes that a client has kept from before come in by COPY, also frozen.
    let kept = cluster().dir().join("kept");
    let kept = kept.display();
    client.run(&format!(
        "CREATE TABLE loaded (c bytea); SELECT rekey.register_column('loaded', 'c');
         COPY (SELECT c FROM t WHERE id = 3) TO '{kept}'; COPY loaded FROM '{kept}'"
    ));
    client.run(&format!(
        "BEGIN; TRUNCATE loaded; COPY loaded FROM '{kept}' (FREEZE); COMMIT"
    ));
    assert_eq!(client.number("SELECT count(*) FROM loaded"), 1);
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
    assert_eq!(client.text("SELECT decrypt_col(c) FROM loaded"), "v3");
}

#[test]
fn a_row_that_moves_to_another_partition_is_found() {
    let database = database("moves");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE p (part int, c bytea) PARTITION BY LIST (part);
         CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
         CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2);
         INSERT INTO p SELECT 2, encrypt_col('moved', 'pii');
         SELECT rekey.register_column('p', 'c'); SELECT rotate_key('pii')",
    );
    let mut old = database.connect();
    old.run("BEGIN; UPDATE p SET part = 1");
    let mut other = database.connect();
    let run = std::thread::spawn(move || reencrypt(&mut other));
    wait_until("the pass has skipped the row", || {
        client.number("SELECT coalesce(sum(rows_skipped), 0)::bigint FROM rekey.progress") > 0
    });
    old.run("COMMIT");
    run.join().expect("CALL reencrypt");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(client.text("SELECT decrypt_col(c) FROM p"), "moved");
    assert!(client.truth("SELECT rekey.slot_id(c) = (SELECT active_slot FROM rekey.keys) FROM p"));
}

#[test]
fn grace_keeps_a_drained_slot() {
    let database = database("grace");
    let mut client = database.connect();
    client.run("SELECT rekey.set_policy('pii', grace => '1 hour'); SELECT rotate_key('pii')");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    let slot = old_slot(&mut client);
    refused(&mut client, "disable_slot", &slot, "grace");
    client.run("SELECT rekey.set_policy('pii', grace => '0')");
    end(&mut client, "disable_slot", &slot);
}

#[test]
fn after_drain_acts_when_everything_is_past() {
    let database = database("after");
    let mut client = database.connect();
    client
        .run("SELECT rekey.set_policy('pii', after_drain => 'destroy'); SELECT rotate_key('pii')");
    wait_until("the slot is destroyed", || {
        reencrypt(&mut client);
        states(&mut client) == ["destroyed", "active"]
    });
    assert_eq!(
        client.column(
            "SELECT action FROM rekey.audit WHERE slot_id = \
                       (SELECT slot_id FROM rekey.slots WHERE version = 1) ORDER BY audit_id"
        ),
        ["create_key", "rotate_key", "drain", "after_drain"]
    );
    assert_eq!(client.number(WRONG), 0);
}

#[test]
fn slots_end_by_one_second_scan_and_one_that_may_not_go_holds_up_no_other() {
    let database = database("several");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('k' || i, grace => '0') FROM generate_series(1, 5) AS i;
         SELECT rekey.set_policy('k' || i, after_drain => CASE WHEN i = 2 THEN 'disable'
             ELSE 'destroy' END) FROM generate_series(1, 5) AS i;
         CREATE TABLE elsewhere AS SELECT encrypt_col('x', 'k1') AS c;
         SELECT rotate_key('k' || i) FROM generate_series(1, 5) AS i",
    );
    let ended = "SELECT string_agg(key_name || ' ' || state, ', ' ORDER BY key_name) \
                   FROM rekey.slots WHERE version = 1 AND key_name LIKE 'k%'";
    wait_until("four of them have ended", || {
        reencrypt(&mut client);
        client.text(ended) == "k1 drained, k2 disabled, k3 destroyed, k4 destroyed, k5 destroyed"
    });
    let together = "SELECT count(DISTINCT xid) FROM rekey.audit WHERE action = 'after_drain'";
    assert_eq!(client.number(together), 1);
    let slot = client.text("SELECT slot_id::text FROM rekey.slots WHERE state = 'drained'");
    client
        .refuse(&format!("SELECT rekey.destroy_slot({slot})"), "55000")
        .names("elsewhere");
}

#[test]
fn a_drained_slot_of_which_values_come_back_is_drained_again() {
    let database = database("again");
    let mut client = database.connect();
    client.run("CREATE TEMP TABLE kept AS SELECT * FROM t WHERE id = 1; SELECT rotate_key('pii')");
    reencrypt(&mut client);
    client.run("UPDATE t SET c = kept.c FROM kept WHERE t.id = 1");
    let slot = old_slot(&mut client);
    refused(&mut client, "destroy_slot", &slot, "public.t (1 rows)");
    reencrypt(&mut client);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(
        client.text("SELECT detail FROM rekey.audit WHERE action = 'void_proof'"),
        "values are sealed under it again"
    );
    end(&mut client, "destroy_slot", &slot);
}

#[test]
fn a_value_whose_slot_was_altered_after_the_proof_holds_up_the_end() {
    let database = database("altered");
    let mut client = database.connect();
    client.run("SELECT rotate_key('pii')");
    reencrypt(&mut client);
    client.run("UPDATE t SET c = set_byte(c, 5, get_byte(c, 5) # 1) WHERE id = 1");
    let slot = old_slot(&mut client);
    refused(
        &mut client,
        "destroy_slot",
        &slot,
        "a slot that there is not, in public.t (1 rows)",
    );
    client.run("DELETE FROM t WHERE id = 1");
    end(&mut client, "destroy_slot", &slot);
}

#[test]
fn every_registered_column_counts_however_many_a_table_has() {
    let database = database("wide");
    let mut client = database.connect();
    client.run(
        "DO $$ BEGIN
             EXECUTE 'CREATE TABLE w (id int PRIMARY KEY, '
                 || (SELECT string_agg('c' || i || ' bytea', ', ') FROM generate_series(1, 70) AS i)
                 || ')';
             PERFORM rekey.register_column('w', 'c' || i) FROM generate_series(1, 70) AS i;
         END $$;
         INSERT INTO w (id, c1, c65, c70) VALUES (1, encrypt_col('a', 'pii'),
             encrypt_col('b', 'pii'), encrypt_col('c', 'pii'));
         SELECT rotate_key('pii')",
    );
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert!(client.truth(
        "SELECT ARRAY[rekey.slot_id(c1), rekey.slot_id(c65), rekey.slot_id(c70)] \
              = array_fill((SELECT active_slot FROM rekey.keys), '{3}') FROM w"
    ));
}

#[test]
fn a_key_that_another_session_holds_holds_up_no_other_key() {
    let database = database("held");
    let (mut client, mut other) = (database.connect(), database.connect());
    client.run(
        "SELECT rekey.create_key('held', grace => '0');
         CREATE TABLE u (c bytea);
         INSERT INTO u SELECT encrypt_col('x', 'held');
         SELECT rekey.register_column('u', 'c');
         SELECT rotate_key('pii'), rotate_key('held')",
    );
    other.run("BEGIN; SELECT rekey.set_policy('held', custodian => 'somebody')");
    reencrypt(&mut client);
    let of = "SELECT key_name || ' ' || state FROM rekey.slots WHERE version = 1 ORDER BY key_name";
    assert_eq!(client.column(of), ["held previous", "pii drained"]);
    other.run("COMMIT");
    reencrypt(&mut client);
    assert_eq!(client.column(of), ["held drained", "pii drained"]);
}

#[test]
fn after_drain_waits_for_a_registered_column_that_is_missing() {
    let database = database("missing");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE u (id int PRIMARY KEY, c bytea);
         SELECT rekey.register_column('u', 'c');
         SELECT rotate_key('pii')",
    );
    reencrypt(&mut client);
    client.run(
        "ALTER TABLE u DROP COLUMN c;
         SELECT rekey.set_policy('pii', after_drain => 'destroy')",
    );
    let (mut noticing, notices) = database.cluster.connect_noticing(&database.name);
    wait_until("it says what is missing", || {
        noticing.run("CALL rekey.reencrypt()");
        let notices = notices.lock().expect("the notices");
        notices
            .iter()
            .any(|notice| notice.contains("column \"c\" is gone"))
    });
    assert_eq!(states(&mut client), ["drained", "active"]);
}

#[test]
fn a_batch_behind_rows_that_are_not_stale_is_as_small_as_a_first_one() {
    let database = database("small");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE k (c bytea, filler text);
         INSERT INTO k SELECT NULL, repeat('x', 1000) FROM generate_series(1, 2000);
         INSERT INTO k SELECT encrypt_col('v' || i, 'pii') FROM generate_series(1, 3000) AS i;
         SELECT rekey.register_column('k', 'c'); SELECT rotate_key('pii')",
    );
    let mut rewritten = client.number("SELECT rewritten FROM rekey.reencrypt_step('k', true)");
    while rewritten == 0 {
        rewritten = client.number("SELECT rewritten FROM rekey.reencrypt_step('k', false)");
    }
    // 64 rows and the rest of their block, although there are many more blocks in the batch.
    assert!(rewritten < 200, "{rewritten} rows");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
}

#[test]
fn find_envelopes_needs_its_own_privilege_and_no_other() {
    let database = database("finders");
    let mut client = database.connect();
    client.run("CREATE TABLE stray AS SELECT c FROM t");
    let finder = database.role("finder");
    let mut finders = database.connect_as(&finder);
    let find = "SELECT table_name FROM rekey.find_envelopes()";
    finders.fail(find, "42501");
    client.run(&format!(
        "GRANT EXECUTE ON FUNCTION rekey.find_envelopes TO {finder}"
    ));
    assert_eq!(finders.column(find), ["public.stray"]);
    finders.fail("SELECT rekey.envelope_places()", "42501");
}

#[test]
fn a_registered_table_without_partitions_holds_nothing_and_no_registration_proves_nothing() {
    let database = cluster().database("leafless");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('pii', grace => '0'); SELECT rotate_key('pii');
         CREATE TABLE p (id int, c bytea) PARTITION BY RANGE (id)",
    );
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["previous", "active"]);
    client.run("SELECT rekey.register_column('p', 'c')");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(
        client.text("SELECT proof->'tables' FROM rekey.slots WHERE state = 'drained'"),
        "[]"
    );
    // What was proved while something was registered may go, but not before older snapshots.
    let mut older = database.connect();
    older.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1");
    client.run("SELECT rotate_key('pii')");
    reencrypt(&mut client);
    client.run("SELECT rekey.unregister_column('p', 'c')");
    client.run("SELECT rekey.set_policy('pii', after_drain => 'disable')");
    let newest = "SELECT state FROM rekey.slots WHERE version = 2";
    let slot = client.text("SELECT slot_id::text FROM rekey.slots WHERE version = 2");
    assert_eq!(client.text(newest), "drained");
    reencrypt(&mut client);
    assert_eq!(client.text(newest), "drained");
    refused(&mut client, "disable_slot", &slot, "transactions still run");
    older.run("COMMIT");
    wait_until("the slot is disabled", || {
        reencrypt(&mut client);
        client.text(newest) == "disabled"
    });
}

#[test]
fn destroy_refuses_while_unregistered_places_hold_the_slots_envelopes() {
    let database = database("elsewhere");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE stray (c bytea); INSERT INTO stray SELECT c FROM t LIMIT 4;
         CREATE MATERIALIZED VIEW copied AS SELECT c FROM t;
         DO $$ BEGIN EXECUTE format('CREATE TABLE defaulted (c bytea DEFAULT %L)',
             (SELECT c FROM t LIMIT 1)); END $$;
         SELECT rotate_key('pii')",
    );
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(
        client.column(
            "SELECT table_name || '.' || column_name || ' ' || envelopes \
                         FROM rekey.find_envelopes() ORDER BY 1"
        ),
        [
            "public.copied.c 10",
            "public.defaulted.c (default) 1",
            "public.stray.c 4"
        ]
    );
    let slot = old_slot(&mut client);
    end(&mut client, "disable_slot", &slot);
    refused(&mut client, "destroy_slot", &slot, "public.stray.c (4)");
    client.run("DROP TABLE stray, defaulted; REFRESH MATERIALIZED VIEW copied");
    end(&mut client, "destroy_slot", &slot);
    assert_eq!(states(&mut client), ["destroyed", "active"]);
}

#[test]
fn compromised_slots_are_drained_first_and_a_proof_of_them_is_void() {
    let database = database("compromised");
    let mut client = database.connect();
    client.run("SELECT rotate_key('pii')");
    reencrypt(&mut client);
    let slot = old_slot(&mut client);
    client.run(&format!(
        "SELECT rekey.mark_compromised({slot}, 'seen on a laptop')"
    ));
    assert_eq!(states(&mut client), ["previous", "active"]);
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    client.run(
        "SELECT rekey.mark_compromised(active_slot, 'also') FROM rekey.keys; \
         SELECT rekey.create_key('b'); SELECT rotate_key('b')",
    );
    reencrypt(&mut client);
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'drained'"),
        3
    );
    assert_eq!(client.number(WRONG), 0);
    // The other key waits until the compromised slot is proved, by a proof of its own.
    assert_eq!(
        client.column("SELECT key_name FROM rekey.audit WHERE action = 'drain' ORDER BY audit_id"),
        ["pii", "pii", "pii", "b"]
    );
    assert!(client.truth(
        "SELECT max(drained_at) FILTER (WHERE key_name = 'pii')
                < min((proof->>'at')::timestamptz) FILTER (WHERE key_name = 'b')
           FROM rekey.slots WHERE state = 'drained'"
    ));
}

#[test]
fn without_a_registered_column_nothing_is_proved() {
    let database = database("nothing");
    let mut client = database.connect();
    client.run("SELECT rekey.unregister_column('t', 'c'); SELECT rotate_key('pii')");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["previous", "active"]);
}

#[test]
fn a_table_owner_drains_his_own_table_only() {
    let database = database("owners");
    let owner = database.role("owner");
    let mut client = database.connect();
    client.run(&format!(
        "CREATE TABLE his (c bytea); INSERT INTO his SELECT c FROM t; ALTER TABLE his OWNER TO {owner};
         SELECT rekey.register_column('his', 'c'); SELECT rotate_key('pii')"
    ));
    let mut his = database.connect_as(&owner);
    his.refuse("CALL rekey.reencrypt()", "42501");
    his.refuse("CALL rekey.reencrypt('t')", "42501");
    his.run("CALL rekey.reencrypt('his')");
    assert_eq!(
        client.number(
            "SELECT count(*) FROM his WHERE rekey.slot_id(c) = \
                       (SELECT active_slot FROM rekey.keys)"
        ),
        10
    );
    assert_eq!(client.number(STALE), 10, "another's table is left alone");
    assert_eq!(states(&mut client), ["previous", "active"]);
    his.refuse("SELECT decrypt_col(c) FROM his", "42501");
}

#[test]
fn a_paused_table_rests_until_it_is_resumed() {
    let database = database("paused");
    let mut client = database.connect();
    client.run(
        "SELECT rotate_key('pii'); SELECT rekey.pause('t', now() + interval '1 hour', 'busy')",
    );
    reencrypt(&mut client);
    assert_eq!(client.number(STALE), 10);
    client.run("SELECT rekey.resume('t')");
    reencrypt(&mut client);
    assert_eq!(client.number(STALE), 0);
    client.refuse("SELECT rekey.resume('t')", "55000");
}

#[test]
fn the_pause_of_a_partitioned_table_is_that_of_its_partitions() {
    let database = database("paused_parts");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE p (part int, c bytea) PARTITION BY LIST (part);
         CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
         INSERT INTO p SELECT 1, encrypt_col('x', 'pii');
         SELECT rekey.register_column('p', 'c'); SELECT rotate_key('pii'); SELECT rekey.pause('p')",
    );
    reencrypt(&mut client);
    let stale = "SELECT count(*) FROM p WHERE rekey.is_stale(c)";
    assert_eq!(client.number(stale), 1);
    client.run("SELECT rekey.resume('p')");
    reencrypt(&mut client);
    assert_eq!(client.number(stale), 0);
}

#[test]
fn the_evidence_of_a_key_tells_its_slots_proofs_and_acts() {
    let database = database("evidence");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.set_policy('pii', max_age => '1 year', custodian => 'security team');
         SELECT rotate_key('pii', 'yearly')",
    );
    reencrypt(&mut client);
    client.run("CREATE TEMP TABLE e AS SELECT rekey.evidence('pii') AS e");
    let key = |path: &str| format!("SELECT e #>> '{{keys,0,{path}}}' FROM e");
    assert_eq!(client.text(&key("custodian")), "security team");
    assert_eq!(client.text(&key("cryptoperiod_kept")), "true");
    assert_eq!(client.text(&key("slots,0,state")), "drained");
    assert_eq!(client.text(&key("slots,0,proof,tables,0,rows")), "10");
    assert_eq!(client.text(&key("slots,1,reason")), "yearly");
    assert_eq!(
        client
            .column("SELECT a->>'action' FROM e, jsonb_array_elements(e #> '{keys,0,acts}') AS a"),
        [
            "create_key",
            "set_policy",
            "rotate_key",
            "rotate_key",
            "drain"
        ]
    );
    assert_eq!(
        client.text("SELECT e #>> '{registered_columns,0,table}' FROM e"),
        "public.t"
    );
    assert_eq!(
        client.number(
            "SELECT jsonb_array_length(rekey.evidence('pii', now() + interval '1 day') \
                #> '{keys,0,acts}')"
        ),
        0
    );
    let acts = |client: &mut Client, of: &str| {
        client.column(&format!(
            "SELECT a->>'action' FROM jsonb_array_elements(({of})->'acts') AS a"
        ))
    };
    // Acts on no key in particular, whichever key is asked for.
    client.run(
        "SELECT rekey.pause('t'); SELECT rekey.resume('t'); SELECT rekey.enable_touch('t');
         SELECT rekey.unregister_column('t', 'c')",
    );
    let of_none = acts(&mut client, "SELECT rekey.evidence('pii')");
    for action in [
        "init_root_key",
        "register_column",
        "pause",
        "resume",
        "enable_touch",
        "unregister_column",
    ] {
        assert!(
            of_none.iter().any(|act| act == action),
            "{action}: {of_none:?}"
        );
    }
    let later = "SELECT rekey.evidence('pii', now() + interval '1 day')";
    assert!(acts(&mut client, later).is_empty());
    // Every act of the log is in the document of all keys, those of a dropped key too.
    client.run(
        "SELECT rekey.create_key('gone', grace => '0'); SELECT rotate_key('gone');
         SELECT rekey.shred_key('gone', 'over'); SELECT rekey.drop_key('gone')",
    );
    client.run("CREATE TEMP TABLE every AS SELECT rekey.evidence() AS e");
    assert_eq!(
        client.number(
            "SELECT jsonb_array_length(e->'acts') + (SELECT sum(jsonb_array_length(k->'acts'))
                 FROM jsonb_array_elements(e->'keys') AS k)::int FROM every"
        ),
        client.number("SELECT count(*) FROM rekey.audit")
    );
    client.run("CREATE TEMP TABLE g AS SELECT rekey.evidence('gone') #> '{keys,0}' AS e");
    assert_eq!(
        client.column("SELECT s->>'state' FROM g, jsonb_array_elements(e->'slots') AS s"),
        ["destroyed", "destroyed"]
    );
    assert_eq!(
        acts(&mut client, "SELECT e FROM g")
            .last()
            .map(String::as_str),
        Some("drop_key")
    );
    assert!(client.truth(
        "SELECT e->>'dropped_at' IS NOT NULL AND e->>'cryptoperiod_kept' IS NULL
            AND e->>'key_name' = 'gone' FROM g"
    ));
    assert!(client.truth("SELECT e #>> '{keys,0,dropped_at}' IS NULL FROM e"));
    client.run("BEGIN READ ONLY; SELECT rekey.evidence('pii')");
    assert!(client.truth("SELECT pg_current_xact_id_if_assigned() IS NULL"));
    client.run("COMMIT");
    client.refuse("SELECT rekey.evidence('nothing')", "42704");
    let role = database.role("plain");
    database
        .connect_as(&role)
        .fail("SELECT rekey.evidence('pii')", "42501");
}
