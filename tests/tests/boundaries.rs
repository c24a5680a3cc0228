//! What happens exactly between two steps of a rotation: a crash at each boundary, a rewrite in
//! the middle of the scan of a proof, a partition that comes at its end.
//!
//! Failpoints of debug builds (src/failpoint.rs) kill the process or have it wait at a boundary.
//! They belong to a data directory, so each test has a cluster of its own.

use postgres::Client;
use rekey_tests::{Ask, BOUNDARIES, Cluster, Database, GATE, Options, Refusal, wait_until};

const STALE: &str = "SELECT count(*) FROM t WHERE rekey.slot_id(c) IS DISTINCT FROM \
                     (SELECT active_slot FROM rekey.keys)";
const WORKERS: &str =
    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_rekey worker'";
const WRONG: &str = "SELECT count(*) FROM t WHERE decrypt_col(c) IS DISTINCT FROM shadow";

/// A table of more blocks than the scan of a proof looks at in one go.
fn large_table(cluster: &Cluster) -> Database<'_> {
    let database = cluster.database("large");
    database.connect().run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int PRIMARY KEY, c bytea, shadow text, pad text);
         ALTER TABLE t ALTER pad SET STORAGE PLAIN;
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii'), 'v' || i, repeat('x', 4000)
           FROM generate_series(1, 1500) AS i;
         SELECT rekey.register_column('t', 'c')",
    );
    database
}

fn without_worker() -> Cluster {
    Cluster::start(
        Options::preloaded()
            .set("rekey.worker = off")
            .set("autovacuum = off"),
    )
}

fn states(client: &mut Client) -> Vec<String> {
    client.column("SELECT state FROM rekey.slots ORDER BY version")
}

/// Closes the gate; whoever reaches a boundary armed with `wait` then stands before it.
fn close_gate(database: &Database<'_>) -> Client {
    let mut gate = database.connect();
    gate.run(&format!("SELECT pg_advisory_lock({GATE})"));
    gate
}

fn open_gate(gate: &mut Client) {
    gate.run(&format!("SELECT pg_advisory_unlock({GATE})"));
}

fn wait_at_gate(client: &mut Client) {
    let waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    wait_until("somebody stands before the gate", || {
        client.number(waiting) == 1
    });
}

/// A session of a server that has just crashed.
fn again(cluster: &Cluster, database: &str) -> Client {
    let mut session = None;
    wait_until("the server takes sessions again", || {
        session = cluster.try_connect(database);
        session
            .as_mut()
            .is_some_and(|client| client.simple_query("SELECT 1").is_ok())
    });
    session.expect("a session")
}

/// CALL rekey.reencrypt() that stops at the boundary while `meanwhile` happens.
fn drain_with(database: &Database<'_>, boundary: &str, meanwhile: impl FnOnce(&mut Client)) {
    let mut client = database.connect();
    let mut gate = close_gate(database);
    database.cluster.arm(boundary, "wait");
    let mut other = database.connect();
    let run = std::thread::spawn(move || other.run("CALL rekey.reencrypt()"));
    wait_at_gate(&mut client);
    // No lock is held between two chunks: nothing here has to wait.
    client.run("SET lock_timeout = '5s'");
    meanwhile(&mut client);
    open_gate(&mut gate);
    run.join().expect("CALL reencrypt");
}

/// Lets whoever stands before the gate go on, and closes it again behind its transaction.
fn let_one_pass(database: &Database<'_>, client: &mut Client, mut gate: Client) -> Client {
    let mut second = database.connect();
    let queued = std::thread::spawn(move || {
        second.run(&format!("SELECT pg_advisory_lock({GATE})"));
        second
    });
    let waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    wait_until("the gate is about to be closed again", || {
        client.number(waiting) == 2
    });
    open_gate(&mut gate);
    queued.join().expect("the gate")
}

/// A key without grace, and a registered table of ten rows; `kept` has one of them as it is now.
fn small_table<'a>(cluster: &'a Cluster, name: &str) -> Database<'a> {
    let database = cluster.database(name);
    database.connect().run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int PRIMARY KEY, c bytea, shadow text);
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii'), 'v' || i
           FROM generate_series(1, 10) AS i;
         SELECT rekey.register_column('t', 'c');
         CREATE TABLE kept AS SELECT id + 10000 AS id, c::text AS c, shadow FROM t WHERE id = 1",
    );
    database
}

/// A row that is sealed under the first slot comes back out of an application.
const COME_BACK: &str = "INSERT INTO t SELECT id, c::bytea, shadow FROM kept";

/// Destroys the first slot, or says what is in the way but for transactions that just end.
fn destroy(client: &mut Client) -> Result<(), Refusal> {
    let slot = client.text("SELECT slot_id::text FROM rekey.slots WHERE version = 1");
    let sql = format!("SELECT rekey.destroy_slot({slot})");
    let passes = |refusal: &Refusal| {
        let words = ["transactions still run", "still runs", "not ended"];
        words.iter().any(|word| refusal.detail.contains(word))
    };
    let mut answer = Ok(());
    wait_until("older transactions have ended", || {
        answer = client.attempt(&sql);
        !answer.as_ref().is_err_and(passes)
    });
    answer
}

/// destroy_slot that stops at the boundary while `meanwhile` happens.
fn destroy_with(
    database: &Database<'_>,
    boundary: &str,
    meanwhile: impl FnOnce(&mut Client),
) -> Result<(), Refusal> {
    let mut client = database.connect();
    let mut gate = close_gate(database);
    database.cluster.arm(boundary, "wait");
    let mut other = database.connect();
    let run = std::thread::spawn(move || destroy(&mut other));
    wait_at_gate(&mut client);
    client.run("SET lock_timeout = '5s'");
    meanwhile(&mut client);
    open_gate(&mut gate);
    run.join().expect("destroy_slot")
}

#[test]
fn a_crash_at_each_boundary_of_the_worker_loses_nothing_and_it_goes_on() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.work_ratio = 1"));
    let database = cluster.database("crashes");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('pii', grace => '0');
         SELECT rekey.set_policy('pii', after_drain => 'destroy');
         CREATE TABLE t (id int PRIMARY KEY, c bytea, shadow text);
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii'), 'v' || i
           FROM generate_series(1, 500) AS i;
         SELECT rekey.register_column('t', 'c')",
    );
    for boundary in BOUNDARIES {
        cluster.arm(boundary, "kill");
        // A worker that is about to end may be there first.
        let rotated = client.simple_query("SELECT rotate_key('pii')").is_ok();
        wait_until(boundary, || !cluster.is_armed());
        wait_until("the server has crashed", || {
            client.simple_query("SELECT 1").is_err()
        });
        client = again(&cluster, "crashes");
        if !rotated {
            client.run("SELECT rotate_key('pii')");
        }
        wait_until("the old slot is destroyed", || {
            client.number("SELECT count(*) FROM rekey.slots WHERE state <> 'destroyed'") == 1
        });
        assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
        assert_eq!(
            client.number("SELECT count(*) FROM t"),
            500,
            "after {boundary}"
        );
    }
    let locks = "SELECT count(*) FROM pg_locks WHERE relation = 't'::regclass AND pid NOT IN \
                 (SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_rekey worker')";
    assert_eq!(client.number(locks), 0);
}

#[test]
fn a_table_at_which_workers_die_rests_longer_each_time_also_over_crashes_of_the_server() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.work_ratio = 1"));
    let database = large_table(&cluster);
    let mut client = database.connect();
    let mut gate = close_gate(&database);
    cluster.arm("rows.updated", "wait");
    client.run("SELECT rotate_key('pii')");
    wait_at_gate(&mut client);
    let attempts = "SELECT attempts FROM rekey.progress_state";
    assert_eq!(client.number(attempts), 1, "it has said that it enters");
    open_gate(&mut gate);
    wait_until("the slot is drained", || {
        states(&mut client) == ["drained", "active"]
    });
    assert_eq!(client.number(attempts), 0);

    // As after eleven workers that have died before their first batch. The one that has just
    // drained would go on without a word: it has entered the table alive.
    wait_until("the worker has ended", || client.number(WORKERS) == 0);
    client.run("UPDATE rekey.progress_state SET attempts = 11; SELECT rotate_key('pii')");
    wait_until("the table rests", || {
        client.text("SELECT waits_for FROM rekey.progress") == "a worker died at it"
    });
    assert_eq!(client.number(attempts), 12);
    assert_eq!(client.number(STALE), 1500);
    // By hand it goes on at once.
    client.run("CALL rekey.reencrypt()");
    assert_eq!(states(&mut client), ["drained", "drained", "active"]);
    assert_eq!(client.number(attempts), 0);
}

#[test]
fn a_crash_in_the_middle_of_a_rotation_undoes_it() {
    let cluster = without_worker();
    let database = cluster.database("rotation");
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('pii')");
    let before = client.text("SELECT active_slot::text FROM rekey.keys");
    for boundary in ["rotate.superseded", "rotate.activated"] {
        cluster.arm(boundary, "kill");
        let mut witness = database.connect();
        client
            .simple_query("SELECT rotate_key('pii')")
            .expect_err("a crash");
        wait_until("the server has crashed", || {
            witness.simple_query("SELECT 1").is_err()
        });
        client = again(&cluster, "rotation");
        assert!(!cluster.is_armed(), "{boundary}");
        assert_eq!(
            client.text("SELECT active_slot::text FROM rekey.keys"),
            before
        );
        assert_eq!(states(&mut client), ["active"]);
    }
    client.run("SELECT rotate_key('pii')");
    assert_eq!(states(&mut client), ["previous", "active"]);
}

#[test]
fn an_error_at_a_boundary_leaves_no_half_batch_and_the_pass_goes_on_at_its_cursor() {
    let cluster = without_worker();
    let database = large_table(&cluster);
    let mut client = database.connect();
    client.run("SELECT rotate_key('pii')");
    cluster.arm("batch.advanced", "error");
    let failed = |client: &mut Client| {
        let error = client.simple_query("CALL rekey.reencrypt()");
        let error = error.expect_err("the failpoint's error");
        assert_eq!(error.code().expect("SQLSTATE").code(), "XX000");
    };
    failed(&mut client);
    assert_eq!(client.number(STALE), 1500, "the batch is undone whole");
    cluster.arm("barrier.captured", "error");
    failed(&mut client);
    let scanned = "SELECT rows_scanned FROM rekey.progress";
    assert_eq!(client.number(scanned), 1500);
    client.run("CALL rekey.reencrypt()");
    assert_eq!(client.number(scanned), 1500, "no row is looked at twice");
    assert_eq!(states(&mut client), ["drained", "active"]);
}

#[test]
fn a_call_that_is_cancelled_leaves_no_half_batch_and_the_next_one_goes_on_at_its_cursor() {
    let cluster = without_worker();
    let database = large_table(&cluster);
    let mut client = database.connect();
    client.run("SELECT rotate_key('pii'); SELECT rekey.reencrypt_step('t', true)");
    const PLACE: &str =
        "SELECT concat_ws(' ', cursor_block, rows_scanned, blocks_left) FROM rekey.progress_state";
    for boundary in [
        "batch.rewritten",
        "batch.advanced",
        "barrier.captured",
        "proof.chunk",
        "slot.drained",
    ] {
        let gate = close_gate(&database);
        cluster.arm(boundary, "wait");
        let mut other = database.connect();
        let pid = other.number("SELECT pg_backend_pid()");
        let call = std::thread::spawn(move || {
            let refusal = other
                .attempt("CALL rekey.reencrypt()")
                .expect_err("a cancel");
            // The session is as good as before, and holds nothing.
            assert_eq!(other.number("SELECT count(*) FROM t"), 1500);
            (other, refusal)
        });
        wait_at_gate(&mut client);
        let (place, stale) = (client.text(PLACE), client.number(STALE));
        client.run(&format!("SELECT pg_cancel_backend({pid})"));
        let (_other, refusal) = call.join().expect("CALL reencrypt");
        assert_eq!(refusal.code, "57014", "{boundary}: {}", refusal.text());
        assert_eq!(
            client.text(PLACE),
            place,
            "{boundary}: what was committed stays"
        );
        assert_eq!(client.number(STALE), stale, "{boundary}");
        assert_eq!(states(&mut client), ["previous", "active"], "{boundary}");
        let locks = "SELECT count(*) FROM pg_locks WHERE relation = 't'::regclass";
        assert_eq!(client.number(locks), 0, "{boundary}");
        drop(gate);
    }
    assert_eq!(
        client.number(STALE),
        0,
        "the pass was complete before the last cancels"
    );
    client.run("CALL rekey.reencrypt()");
    let scanned = "SELECT rows_scanned FROM rekey.progress";
    assert_eq!(client.number(scanned), 1500, "no row is looked at twice");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(client.number(WRONG), 0);
}

#[test]
fn a_truncate_in_the_middle_of_the_scan_of_a_proof_makes_it_begin_again() {
    let cluster = without_worker();
    let database = large_table(&cluster);
    let mut client = database.connect();
    client.run("CREATE TABLE kept AS SELECT * FROM t WHERE id = 1; SELECT rotate_key('pii')");
    drain_with(&database, "proof.chunk", |client| {
        client.run("BEGIN; TRUNCATE t; INSERT INTO t SELECT * FROM kept; COMMIT");
    });
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
    let proved = "SELECT (proof->'tables'->0->>'rows') FROM rekey.slots WHERE state = 'drained'";
    assert_eq!(client.text(proved), "1", "the proof is of the new file");
}

#[test]
fn a_table_that_is_refused_is_not_locked_while_the_same_step_scans_for_a_proof() {
    let cluster = without_worker();
    let database = large_table(&cluster);
    let mut client = database.connect();
    client.run(
        "CREATE TABLE filled (id int PRIMARY KEY, v text);
         INSERT INTO filled VALUES (1, 'one');
         SELECT rekey.encrypt_column('filled', 'v', 'sealed', 'pii');
         CREATE RULE also AS ON UPDATE TO filled DO ALSO NOTIFY filled;
         ALTER TABLE filled ENABLE ALWAYS RULE also;
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt('t')");
    drain_with(&database, "proof.chunk", |client| {
        client.run("DROP RULE also ON filled");
    });
    assert_eq!(states(&mut client), ["drained", "active"]);
}

#[test]
fn a_rewrite_in_the_middle_of_the_scan_of_a_proof_makes_it_begin_again() {
    let cluster = without_worker();
    let database = large_table(&cluster);
    let mut client = database.connect();
    client.run("CREATE TABLE kept AS SELECT * FROM t WHERE id = 1; SELECT rotate_key('pii')");
    drain_with(&database, "proof.chunk", |client| {
        client.run(
            "BEGIN; ALTER TABLE t ALTER id TYPE bigint; DELETE FROM t WHERE id = 1;
             INSERT INTO t SELECT * FROM kept; COMMIT",
        );
    });
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
}

#[test]
fn a_partition_that_is_attached_with_stale_rows_at_the_end_of_a_proof_is_found() {
    let cluster = without_worker();
    let database = cluster.database("attach");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int, c bytea, shadow text) PARTITION BY RANGE (id);
         CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (100);
         CREATE TABLE t2 (id int, c bytea, shadow text);
         INSERT INTO t VALUES (1, encrypt_col('v1', 'pii'), 'v1');
         INSERT INTO t2 VALUES (101, encrypt_col('v2', 'pii'), 'v2');
         SELECT rekey.register_column('t', 'c');
         SELECT rotate_key('pii')",
    );
    drain_with(&database, "proof.scanned", |client| {
        client.run("ALTER TABLE t ATTACH PARTITION t2 FOR VALUES FROM (100) TO (200)");
    });
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
    let tables =
        "SELECT jsonb_array_length(proof->'tables') FROM rekey.slots WHERE state = 'drained'";
    assert_eq!(client.text(tables), "2");
}

#[test]
fn a_policy_that_changes_during_the_second_scan_counts() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.work_ratio = 1"));
    let database = cluster.database("policy");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('pii', grace => '0');
         SELECT rekey.set_policy('pii', after_drain => 'destroy');
         CREATE TABLE t (id int PRIMARY KEY, c bytea);
         INSERT INTO t VALUES (1, encrypt_col('v1', 'pii'));
         SELECT rekey.register_column('t', 'c')",
    );
    let mut gate = close_gate(&database);
    cluster.arm("end.scanned", "wait");
    client.run("SELECT rotate_key('pii')");
    wait_at_gate(&mut client);
    client.run("SELECT rekey.set_policy('pii', after_drain => 'keep', grace => '30 days')");
    open_gate(&mut gate);
    wait_until("the worker has ended", || client.number(WORKERS) == 0);
    assert_eq!(states(&mut client), ["drained", "active"]);
}

#[test]
fn the_progress_view_shows_a_proof_and_the_age_of_its_snapshot() {
    let cluster = Cluster::start(Options::preloaded().set("autovacuum = off"));
    let database = large_table(&cluster);
    let mut client = database.connect();
    let mut gate = close_gate(&database);
    cluster.arm("proof.chunk", "wait");
    client.run("SELECT rotate_key('pii')");
    wait_at_gate(&mut client);
    assert!(client.truth(
        "SELECT phase = 'proof' AND percent > 0 AND percent < 100 AND time_left > '0' \
            AND snapshot_age > '0' FROM rekey.progress"
    ));
    client.run("CREATE ROLE stranger; SET ROLE stranger");
    assert!(
        client
            .truth("SELECT since IS NULL AND blocks IS NULL FROM rekey.proof_scan('t'::regclass)")
    );
    client.run("RESET ROLE");
    open_gate(&mut gate);
    wait_until("the slot is drained", || {
        states(&mut client) == ["drained", "active"]
    });
    assert!(client.truth("SELECT phase = 'done' AND snapshot_age IS NULL FROM rekey.progress"));
}

#[test]
fn a_proof_whose_snapshot_is_too_old_is_given_up_and_made_again_at_once() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("autovacuum = off")
            .set("rekey.max_snapshot_age = 2s"),
    );
    let database = large_table(&cluster);
    let mut client = database.connect();
    let mut gate = close_gate(&database);
    cluster.arm("proof.chunk", "wait");
    client.run("SELECT rotate_key('pii')");
    wait_at_gate(&mut client);
    wait_until("the snapshot is too old", || {
        client.truth("SELECT snapshot_age > '2.1 s' FROM rekey.progress")
    });
    // The next one stops before it has written anything, and then has time on the slowest machine.
    client.run("ALTER SYSTEM SET rekey.max_snapshot_age = '1h'");
    client.run("SELECT pg_reload_conf()");
    cluster.arm("barrier.passed", "wait");
    let mut second = database.connect();
    let queued = std::thread::spawn(move || {
        second.run(&format!("SELECT pg_advisory_lock({GATE})"));
        second
    });
    wait_until("the gate is about to be closed again", || {
        let waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
        client.number(waiting) == 2
    });
    open_gate(&mut gate);
    let mut gate = queued.join().expect("the gate");
    wait_at_gate(&mut client);
    assert!(
        client
            .text("SELECT waits_for FROM rekey.progress")
            .starts_with("the snapshot reached rekey.max_snapshot_age at public.t")
    );
    open_gate(&mut gate);
    wait_until("the second one proves", || {
        states(&mut client) == ["drained", "active"]
    });
}

#[test]
fn a_rewrite_between_the_snapshot_of_a_proof_and_the_first_look_at_a_table_is_no_clean_scan() {
    let cluster = without_worker();
    let database = small_table(&cluster, "early");
    let mut client = database.connect();
    client.run("SELECT rotate_key('pii')");
    let mut gate = close_gate(&database);
    cluster.arm("batch.advanced", "wait");
    let mut other = database.connect();
    let run = std::thread::spawn(move || other.run("CALL rekey.reencrypt()"));
    wait_at_gate(&mut client);
    client.run(COME_BACK);
    cluster.arm("proof.begun", "wait");
    gate = let_one_pass(&database, &mut client, gate);
    wait_at_gate(&mut client);
    client.run("SET lock_timeout = '5s'; ALTER TABLE t ALTER id TYPE bigint");
    open_gate(&mut gate);
    run.join().expect("CALL reencrypt");
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
    assert_eq!(states(&mut client), ["drained", "active"]);
    // A call looks once more when it is done, and would have found the row in spite of the proof.
    let voided = "SELECT count(*) FROM rekey.audit WHERE action = 'void_proof'";
    assert_eq!(client.number(voided), 0);
}

#[test]
fn a_rewrite_between_the_snapshot_of_the_second_scan_and_the_first_look_keeps_the_slot() {
    let cluster = without_worker();
    let database = small_table(&cluster, "early_end");
    let mut client = database.connect();
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    client.run(COME_BACK);
    let answer = destroy_with(&database, "proof.begun", |client| {
        client.run("ALTER TABLE t ALTER id TYPE bigint");
    });
    answer
        .expect_err("a refusal")
        .names("Public.t changed meanwhile");
    destroy(&mut client)
        .expect_err("a refusal")
        .names("public.t (1 rows)");
    assert_eq!(client.number(WRONG), 0);
}

#[test]
fn a_column_that_gets_another_type_beside_the_scan_of_a_proof_is_not_read_as_bytea() {
    let cluster = without_worker();
    let database = small_table(&cluster, "retyped");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE later (c bytea); INSERT INTO later SELECT encrypt_col('x', 'pii');
         SELECT rekey.register_column('later', 'c'); SELECT rotate_key('pii')",
    );
    // Behind the reading of the registered columns, before the snapshot: which sees the new rows.
    drain_with(&database, "barrier.passed", |client| {
        client.run(
            "SELECT rekey.unregister_column('later', 'c');
             ALTER TABLE later ALTER c TYPE bigint USING 1",
        );
    });
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(WRONG)), (0, 0));
}

#[test]
fn tables_that_move_or_go_in_the_middle_of_the_scan_of_a_proof_make_it_begin_again() {
    let cluster = without_worker();
    let database = large_table(&cluster);
    let mut client = database.connect();
    client.run(
        "CREATE TABLE other (c bytea); INSERT INTO other SELECT encrypt_col('x', 'pii');
         SELECT rekey.register_column('other', 'c')",
    );
    let proved = "SELECT string_agg(p->>'table', ' ') FROM rekey.slots, \
                         jsonb_array_elements(proof->'tables') AS p \
                   WHERE version = (SELECT max(version) - 1 FROM rekey.slots)";
    for (what, tables) in [
        ("VACUUM FULL t", "public.t public.other"),
        ("CLUSTER t USING t_pkey", "public.t public.other"),
        ("DROP TABLE t", "public.other"),
    ] {
        client.run("SELECT rotate_key('pii')");
        drain_with(&database, "proof.chunk", |client| client.run(what));
        let states = states(&mut client);
        let (active, drained) = states.split_last().expect("slots");
        assert_eq!(active, "active", "{what}");
        assert!(drained.iter().all(|state| state == "drained"), "{what}");
        assert_eq!(client.text(proved), tables, "{what}");
    }
    assert!(
        client.truth("SELECT rekey.slot_id(c) = (SELECT active_slot FROM rekey.keys) FROM other")
    );
}

#[test]
fn a_deleted_copy_that_an_older_snapshot_still_sees_keeps_the_slot() {
    let cluster = without_worker();
    let database = small_table(&cluster, "deleted");
    let (mut copier, mut reader) = (database.connect(), database.connect());
    let mut client = database.connect();
    client.run(
        "CREATE TABLE copy (LIKE t); SELECT rekey.register_column('copy', 'c');
         SELECT rotate_key('pii')",
    );
    copier.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t");
    client.run("CALL rekey.reencrypt()");
    copier.run("INSERT INTO copy SELECT * FROM t; COMMIT");
    // Younger than the proof, and has written nothing: neither horizon nor writers name it.
    reader.run("BEGIN ISOLATION LEVEL REPEATABLE READ");
    assert_eq!(reader.number("SELECT count(*) FROM copy"), 10);
    let pid = reader.number("SELECT pg_backend_pid()");
    client.run("DELETE FROM copy");
    destroy(&mut client).expect_err("a refusal").names(&format!(
        "see values of it in deleted rows, or write some: pid {pid}"
    ));
    reader.run("INSERT INTO copy SELECT * FROM copy; COMMIT");
    destroy(&mut client)
        .expect_err("a refusal")
        .names("public.copy (10 rows)");
    assert_eq!(
        client.number("SELECT count(*) FROM copy WHERE decrypt_col(c) = shadow"),
        10
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(destroy(&mut client).map_err(|r| r.text()), Ok(()));
    assert_eq!(
        client.number("SELECT count(*) FROM copy WHERE decrypt_col(c) = shadow"),
        10
    );
}

#[test]
fn what_an_older_transaction_copies_during_the_second_scan_keeps_the_slot() {
    let cluster = without_worker();
    let database = small_table(&cluster, "during");
    let (mut copier, mut reader) = (database.connect(), database.connect());
    let mut client = database.connect();
    client.run(
        "CREATE TABLE copy (LIKE t); SELECT rekey.register_column('copy', 'c');
         SELECT rotate_key('pii')",
    );
    copier.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t");
    client.run("CALL rekey.reencrypt()");
    copier.run("INSERT INTO copy SELECT * FROM t WHERE id = 1; COMMIT");
    reader.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM copy");
    let pid = reader.number("SELECT pg_backend_pid()");
    client.run("DELETE FROM copy");
    // The scan has been at t, and comes to copy when its row is gone.
    let answer = destroy_with(&database, "proof.chunk", |client| {
        reader.run("INSERT INTO t SELECT id + 100, c, shadow FROM copy; COMMIT");
        client.run("VACUUM copy");
    });
    answer
        .expect_err("a refusal")
        .names(&format!("during the scan: pid {pid}"));
    destroy(&mut client)
        .expect_err("a refusal")
        .names("public.t (1 rows)");
    assert_eq!(client.number(WRONG), 0);
}

#[test]
fn a_transaction_that_has_begun_after_the_proof_and_only_reads_holds_up_no_end() {
    let cluster = without_worker();
    let database = small_table(&cluster, "readers");
    let (mut reader, mut client) = (database.connect(), database.connect());
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    reader.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t");
    client.run("INSERT INTO t VALUES (11)");
    assert_eq!(destroy(&mut client).map_err(|r| r.text()), Ok(()));
    assert_eq!(reader.number(WRONG), 0);
    reader.run("COMMIT");
}

#[test]
fn a_column_that_is_registered_after_the_second_scan_is_looked_into_all_the_same() {
    let cluster = without_worker();
    let database = small_table(&cluster, "late");
    let mut client = database.connect();
    client.run("CREATE TABLE late AS SELECT c FROM t; SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    let answer = destroy_with(&database, "end.scanned", |client| {
        client.run("SELECT rekey.register_column('late', 'c')");
    });
    answer.expect_err("a refusal").names("public.late.c (10)");
}

#[test]
fn a_value_that_moves_between_the_two_scans_of_an_end_is_seen_where_it_was() {
    let cluster = without_worker();
    let database = small_table(&cluster, "moving");
    let mut client = database.connect();
    client.run("CREATE TABLE aside AS SELECT c FROM t WHERE id = 1; SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    let answer = destroy_with(&database, "end.scanned", |client| {
        client.run("INSERT INTO t (id, c) SELECT 77, c FROM aside; DELETE FROM aside");
    });
    answer.expect_err("a refusal").names("public.aside.c (1)");
    assert_eq!(
        client.text("SELECT decrypt_col(c) FROM t WHERE id = 77"),
        "v1"
    );
}

#[test]
fn the_search_of_unregistered_places_holds_up_no_alter_table_and_names_what_it_has_not_read() {
    let cluster = without_worker();
    let database = large_table(&cluster);
    let mut client = database.connect();
    client.run(
        "SELECT rekey.unregister_column('t', 'c');
         CREATE TABLE dropped (c bytea); INSERT INTO dropped SELECT c FROM t;
         CREATE TABLE later (c bytea, d bytea); INSERT INTO later SELECT c, c FROM t;
         CREATE TABLE rewritten (c bytea); INSERT INTO rewritten SELECT c FROM t;
         CREATE TABLE same (c bytea); INSERT INTO same SELECT c FROM t LIMIT 3",
    );
    let mut gate = close_gate(&database);
    cluster.arm("elsewhere.chunk", "wait");
    let mut other = database.connect();
    let find = "SELECT table_name || '.' || column_name || ' ' || envelopes \
                  FROM rekey.find_envelopes() ORDER BY 1";
    let run = std::thread::spawn(move || other.column(find));
    wait_at_gate(&mut client);
    client.run(
        "SET lock_timeout = '5s';
         ALTER TABLE t ADD COLUMN more int;
         ALTER TABLE later ALTER c TYPE bigint USING 1;
         DROP TABLE dropped",
    );
    client.run("VACUUM FULL rewritten");
    open_gate(&mut gate);
    assert_eq!(
        run.join().expect("find_envelopes"),
        [
            "public.later.c (changed meanwhile, not read) 0",
            "public.later.d (changed meanwhile, not read) 0",
            "public.rewritten.c (changed meanwhile, not read) 0",
            "public.same.c 3",
            "public.t.c 1500",
        ]
    );
}

#[test]
fn the_search_of_unregistered_places_gives_up_a_snapshot_that_is_too_old() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.worker = off")
            .set("autovacuum = off")
            .set("rekey.max_snapshot_age = 5s"),
    );
    let database = small_table(&cluster, "old");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE wide (c bytea, pad text); ALTER TABLE wide ALTER pad SET STORAGE PLAIN;
         INSERT INTO wide SELECT '', repeat('x', 4000) FROM generate_series(1, 1500);
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    let answer = destroy_with(&database, "elsewhere.chunk", |client| {
        wait_until("the snapshot is too old", || {
            client.truth(
                "SELECT bool_or(clock_timestamp() > waitstart + '5.1 s') FROM pg_locks \
                  WHERE locktype = 'advisory' AND NOT granted",
            )
        });
    });
    answer
        .expect_err("a refusal")
        .names("public.wide.c (rekey.max_snapshot_age reached, not read)");
}

#[test]
fn the_memory_of_a_proof_does_not_grow_with_the_toasted_values_that_it_looks_at() {
    let cluster = without_worker();
    let database = small_table(&cluster, "memory");
    let mut client = database.connect();
    // Compressed in their rows: as dear to look at as values out of line, and sooner made.
    client.run(
        "CREATE TABLE many (c bytea);
         INSERT INTO many SELECT convert_to(repeat('x', 3000), 'UTF8')
           FROM generate_series(1, 300000);
         SELECT rekey.register_column('many', 'c'); SELECT rotate_key('pii')",
    );
    let before = cluster.log().len();
    drain_with(&database, "proof.scanned", |client| {
        client.run(
            "SELECT pg_log_backend_memory_contexts(pid) FROM pg_locks \
              WHERE locktype = 'advisory' AND NOT granted",
        );
        wait_until("the log has the sum", || {
            cluster.log()[before..].contains("Grand total:")
        });
    });
    let log = cluster.log();
    let (_, sum) = log[before..].split_once("Grand total: ").expect("the sum");
    let bytes: u64 = sum
        .split_once(' ')
        .and_then(|(bytes, _)| bytes.parse().ok())
        .expect("bytes");
    assert!(bytes < 8_000_000, "{bytes} bytes");
}
