//! Equality search: fingerprints under lookup keys, before, during and after a rotation.
//!
//! Nobody may miss a row because of a rotation, whatever his session knows of it, and a unique rule
//! must hold at every moment of one. The worker's part is done by CALL rekey.reencrypt(); the
//! refusals that protect values from whoever can write a table are tried too.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        Cluster::start(
            Options::preloaded()
                .set("rekey.worker = off")
                .set("autovacuum = off")
                .set("max_prepared_transactions = 5"),
        )
    })
}

/// A database with a key that seals, a lookup key, and a hundred rows that can be looked up.
fn database(name: &str) -> Database<'static> {
    let database = cluster().database(name);
    database.connect().run(
        "SELECT rekey.create_key('pii', grace => '0');
         SELECT rekey.create_key('email_lookup', grace => '0', purpose => 'lookup');
         CREATE TABLE t (id int PRIMARY KEY, email bytea, email_fp bytea);
         INSERT INTO t SELECT i, encrypt_col('User' || i || '@example.org', 'pii'),
             fingerprint_col('user' || i || '@example.org', 'email_lookup')
           FROM generate_series(1, 100) AS i;
         CREATE INDEX t_email_fp ON t (email_fp);
         SELECT rekey.register_column('t', 'email');
         SELECT rekey.register_fingerprint('t', 'email_fp', 'email', 'email_lookup', 'pii',
             'lower($1)')",
    );
    database
}

fn found(client: &mut Client, email: &str) -> Vec<String> {
    client.column(&format!(
        "SELECT id FROM t WHERE email_fp = ANY (rekey.fingerprints('{email}', 'email_lookup')) \
          ORDER BY id"
    ))
}

/// Rows whose fingerprint does not name the active slot of its key.
const STALE: &str = "SELECT count(*) FROM t WHERE rekey.fingerprint_slot_id(email_fp) IS DISTINCT \
                     FROM (SELECT active_slot FROM rekey.keys WHERE purpose = 'lookup')";
/// Rows that a search for their value does not find.
const MISSED: &str = "SELECT count(*) FROM t WHERE NOT email_fp = ANY (rekey.fingerprints( \
                      lower(decrypt_col(email)), 'email_lookup'))";

fn states(client: &mut Client) -> Vec<String> {
    client.column("SELECT state FROM rekey.slots WHERE key_name = 'email_lookup' ORDER BY version")
}

fn reencrypt(client: &mut Client) {
    client.run("CALL rekey.reencrypt()");
}

/// Disables or destroys the first slot of the lookup key, once the transactions of the tests beside
/// this one are over.
fn end(client: &mut Client, function: &str) {
    let sql = format!(
        "SELECT rekey.{function}((SELECT slot_id FROM rekey.slots \
          WHERE key_name = 'email_lookup' ORDER BY version LIMIT 1))"
    );
    wait_until("older transactions have ended", || {
        match client.attempt(&sql) {
            Ok(()) => true,
            Err(refusal) if refusal.detail.to_lowercase().contains("older") => false,
            Err(refusal) => panic!("{sql}: {}", refusal.text()),
        }
    });
}

#[test]
fn a_fingerprint_is_the_published_40_bytes_and_tells_values_and_contexts_apart() {
    let database = database("bytes");
    let mut client = database.connect();
    let make = |client: &mut Client, arguments: &str| {
        client.text(&format!("SELECT fingerprint_col({arguments})"))
    };
    let plain = make(&mut client, "'a@example.org', 'email_lookup'");
    assert_eq!(
        plain,
        make(&mut client, "'a@example.org', 'email_lookup', ''")
    );
    assert_eq!(plain.len(), 2 + 2 * 40);
    let slot = client.number("SELECT active_slot FROM rekey.keys WHERE purpose = 'lookup'");
    assert_eq!(plain[2..18], format!("{slot:016x}"));
    assert_eq!(
        client.number(&format!("SELECT rekey.fingerprint_slot_id('{plain}')")),
        slot
    );
    for other in [
        "'A@example.org', 'email_lookup'",
        "'a@example.org', 'email_lookup', 'tenant 1'",
        "'a@example.org', 'email_lookup', 'tenant 2'",
    ] {
        assert_ne!(plain, make(&mut client, other), "{other}");
    }
    assert!(client.truth(
        "SELECT fingerprint_col(NULL, 'email_lookup') IS NULL \
            AND rekey.fingerprints(NULL, 'email_lookup') IS NULL \
            AND rekey.verify_fingerprint(NULL, '\\x00') IS NULL \
            AND rekey.fingerprint_slot_id('\\x00') IS NULL \
            AND rekey.fingerprint_slot_id(encrypt_col('x', 'pii')) IS NULL \
            AND rekey.slot_id(fingerprint_col('x', 'email_lookup')) IS NULL"
    ));
    client.refuse("SELECT fingerprint_col('x', NULL)", "22004");
    client.refuse("SELECT fingerprint_col('x', 'email_lookup', NULL)", "22004");
    client.refuse("SELECT rekey.fingerprints('x', 'none')", "42704");
}

#[test]
fn a_lookup_uses_an_ordinary_index_and_writes_nothing() {
    let database = database("plan");
    let mut client = database.connect();
    client.run(
        "INSERT INTO t SELECT i, NULL, fingerprint_col('user' || i, 'email_lookup')
           FROM generate_series(1000, 6000) AS i;
         SELECT rotate_key('email_lookup'); ANALYZE t",
    );
    let search = "SELECT id FROM t WHERE email_fp = ANY (rekey.fingerprints($1, 'email_lookup'))";
    client.run(&format!("PREPARE p (text) AS {search}"));
    for mode in ["force_custom_plan", "force_generic_plan"] {
        client.run(&format!("SET plan_cache_mode = {mode}"));
        let plan = client
            .column("EXPLAIN (COSTS off) EXECUTE p ('user1001')")
            .join("\n");
        assert!(
            plan.contains("Index Scan using t_email_fp") || plan.contains("Bitmap Index Scan"),
            "{plan}"
        );
        assert!(plan.contains("Index Cond"), "{plan}");
        assert_eq!(client.column("EXECUTE p ('user1001')"), ["1001"]);
    }
    client.run("RESET plan_cache_mode");
    assert!(client.truth(
        "SELECT count(*) = 1 FROM t WHERE email_fp = \
             ANY (rekey.fingerprints('user7@example.org', 'email_lookup')) \
            AND pg_current_xact_id_if_assigned() IS NULL"
    ));
    // A join looks up each row by the index too.
    let plan = client
        .column(
            "EXPLAIN (COSTS off) SELECT t.id FROM (VALUES ('user1001'), ('user2002')) AS v (email) \
               JOIN t ON t.email_fp = ANY (rekey.fingerprints(v.email, 'email_lookup'))",
        )
        .join("\n");
    assert!(plan.contains("Index Cond"), "{plan}");
}

#[test]
fn a_rotation_misses_no_row_and_ends_in_a_drained_and_a_destroyed_slot() {
    let database = database("rotation");
    let mut client = database.connect();
    assert_eq!(found(&mut client, "user7@example.org"), ["7"]);
    client.run("SELECT rotate_key('email_lookup')");
    assert_eq!((client.number(STALE), client.number(MISSED)), (100, 0));
    client.run(
        "INSERT INTO t VALUES (101, encrypt_col('user7@example.org', 'pii'), \
                               fingerprint_col('user7@example.org', 'email_lookup'))",
    );
    assert_eq!(found(&mut client, "user7@example.org"), ["7", "101"]);
    assert_eq!(
        client.number("SELECT cardinality(rekey.fingerprints('x', 'email_lookup'))"),
        2
    );
    assert!(client.truth(
        "SELECT (rekey.fingerprints('x', 'email_lookup'))[1] = fingerprint_col('x', 'email_lookup')"
    ));
    client.run("SELECT rotate_key('email_lookup')");
    assert_eq!((client.number(STALE), client.number(MISSED)), (101, 0));
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "drained", "active"]);
    assert_eq!((client.number(STALE), client.number(MISSED)), (0, 0));
    assert!(client.truth(
        "SELECT proof->'tables'->0->'columns' = '[\"email\", \"email_fp\"]' FROM rekey.slots \
          WHERE key_name = 'email_lookup' AND version = 1"
    ));
    // The sealed values are as they were: only what is stale is written.
    assert!(client.truth("SELECT bool_and(decrypt_col(email) ILIKE 'user%') FROM t"));
    end(&mut client, "disable_slot");
    assert_eq!(client.number(MISSED), 0);
    end(&mut client, "destroy_slot");
    assert_eq!(states(&mut client), ["destroyed", "drained", "active"]);
    assert_eq!(found(&mut client, "user7@example.org"), ["7", "101"]);
    // Both keys at once, and back again.
    client.run("SELECT rotate_key('pii'), rotate_key('email_lookup')");
    assert_eq!(client.number(MISSED), 0);
    client.run("SELECT rekey.rollback_rotation('email_lookup')");
    assert_eq!(client.number(MISSED), 0);
    reencrypt(&mut client);
    assert_eq!((client.number(STALE), client.number(MISSED)), (0, 0));
}

#[test]
fn a_fingerprint_that_is_left_somewhere_keeps_its_slot_from_being_destroyed() {
    let database = database("left");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE copies AS SELECT email_fp FROM t WHERE id = 1;
         SELECT rotate_key('email_lookup')",
    );
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(
        client.rows("SELECT table_name, column_name, envelopes FROM rekey.find_envelopes()"),
        [["public.copies", "email_fp", "1"].map(|cell| Some(cell.to_owned()))]
    );
    wait_until("the refusal names the copy", || {
        let refusal = client
            .attempt("SELECT rekey.destroy_slot(slot_id) FROM rekey.slots WHERE state = 'drained'")
            .expect_err("a copy is left");
        refusal.detail.contains("copies.email_fp")
    });
    // It is still found there.
    assert_eq!(
        client.number(
            "SELECT count(*) FROM copies WHERE email_fp = ANY (rekey.fingerprints( \
                 'user1@example.org', 'email_lookup'))"
        ),
        1
    );
}

/// A session that has looked up and stored already.
fn warm(database: &Database) -> Client {
    let mut client = database.connect();
    assert_eq!(found(&mut client, "user7@example.org"), ["7"]);
    client.run("SELECT fingerprint_col('x', 'email_lookup')");
    client
}

#[test]
fn a_warm_session_finds_what_others_store_under_a_slot_that_it_has_not_heard_of() {
    let database = database("race");
    let (mut reader, mut rotator, mut writer) =
        (warm(&database), database.connect(), database.connect());
    // All locks are taken and all plans are made before the rotation: nothing but the lookup
    // itself makes the reader listen.
    reader.run("BEGIN");
    reader.run(
        "CREATE FUNCTION pg_temp.look() RETURNS bigint LANGUAGE sql VOLATILE AS $$
             SELECT count(*) FROM t
              WHERE email_fp = ANY (rekey.fingerprints('user7@example.org', 'email_lookup')) $$;
         PREPARE look AS SELECT count(*) FROM t
              WHERE email_fp = ANY (rekey.fingerprints('user7@example.org', 'email_lookup'));
         SET plan_cache_mode = force_generic_plan",
    );
    assert_eq!(reader.number("EXECUTE look"), 1);
    assert_eq!(reader.number("SELECT pg_temp.look()"), 1);
    for rows in 2..6 {
        rotator.run("SELECT rotate_key('email_lookup')");
        writer.run(&format!(
            "INSERT INTO t VALUES (100 + {rows}, encrypt_col('user7@example.org', 'pii'), \
                 fingerprint_col('user7@example.org', 'email_lookup'))"
        ));
        assert_eq!(reader.number("EXECUTE look"), rows, "rotation {rows}");
        assert_eq!(reader.number("SELECT pg_temp.look()"), rows);
    }
    reader.run("COMMIT");
}

#[test]
fn a_rotation_within_one_statement_of_the_reader_is_seen_by_its_next_look() {
    let database = database("within");
    let mut reader = warm(&database);
    let mut gate = database.connect();
    gate.run("SELECT pg_advisory_lock(1)");
    // Looks, waits at the gate in between, and looks again with a new snapshot.
    reader.run(
        "CREATE FUNCTION looks() RETURNS text LANGUAGE plpgsql AS $$
         DECLARE first bigint; second bigint;
         BEGIN
             SELECT count(*) INTO first FROM t WHERE email_fp = ANY (
                 rekey.fingerprints('user7@example.org', 'email_lookup'));
             PERFORM pg_advisory_xact_lock(1);
             SELECT count(*) INTO second FROM t WHERE email_fp = ANY (
                 rekey.fingerprints('user7@example.org', 'email_lookup'));
             RETURN first || ' ' || second;
         END $$",
    );
    let looking = thread::spawn(move || reader.text("SELECT looks()"));
    let mut client = database.connect();
    wait_until("the reader waits at the gate", || {
        client.number(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted \
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        ) == 1
    });
    client.run("SELECT rotate_key('email_lookup')");
    client.run(
        "INSERT INTO t VALUES (101, encrypt_col('user7@example.org', 'pii'), \
             fingerprint_col('user7@example.org', 'email_lookup'))",
    );
    gate.run("SELECT pg_advisory_unlock(1)");
    assert_eq!(looking.join().expect("the reader"), "1 2");
}

#[test]
fn an_update_that_waits_for_the_refresh_of_its_row_still_finds_it() {
    let database = database("recheck");
    let (mut client, mut refreshing) = (database.connect(), database.connect());
    let mut updating = warm(&database);
    client.run("SELECT rotate_key('email_lookup')");
    // What the worker does to a row, held open.
    refreshing.run("BEGIN");
    refreshing.run(
        "UPDATE t SET email_fp = fingerprint_col('user7@example.org', 'email_lookup') WHERE id = 7",
    );
    let pid = updating.number("SELECT pg_backend_pid()");
    let update = thread::spawn(move || {
        updating.column(
            "UPDATE t SET id = 107 WHERE email_fp = ANY (rekey.fingerprints( \
                 'user7@example.org', 'email_lookup')) RETURNING id",
        )
    });
    wait_until("the update waits for the row", || {
        client.truth(&format!("SELECT cardinality(pg_blocking_pids({pid})) = 1"))
    });
    refreshing.run("COMMIT");
    assert_eq!(update.join().expect("the update"), ["107"]);
}

#[test]
fn a_transaction_that_rotates_stores_under_the_slot_that_everybody_knows() {
    let database = database("own_rotation");
    let mut client = database.connect();
    let mut reader = warm(&database);
    let old = client.number("SELECT active_slot FROM rekey.keys WHERE purpose = 'lookup'");
    let stores_under = "SELECT rekey.fingerprint_slot_id(fingerprint_col('x', 'email_lookup'))";
    client.run("BEGIN");
    client.run("SELECT rotate_key('email_lookup')");
    assert_eq!(client.number(stores_under), old);
    client.run("SELECT rotate_key('email_lookup')");
    assert_eq!(client.number(stores_under), old);
    client.run(
        "INSERT INTO t VALUES (101, encrypt_col('user7@example.org', 'pii'), \
             fingerprint_col('user7@example.org', 'email_lookup'))",
    );
    assert_eq!(found(&mut client, "user7@example.org"), ["7", "101"]);
    client.run("COMMIT");
    assert_ne!(client.number(stores_under), old);
    assert_eq!(found(&mut reader, "user7@example.org"), ["7", "101"]);
    // A key of the same transaction has one slot only.
    client.run("BEGIN");
    client.run("SELECT rekey.create_key('fresh', purpose => 'lookup')");
    client.run("SELECT fingerprint_col('x', 'fresh')");
    client.run("ROLLBACK");
    client.refuse("SELECT fingerprint_col('x', 'fresh')", "42704");
}

#[test]
fn a_transaction_that_rotates_stores_under_no_slot_but_the_one_that_was_active_before_it() {
    let database = database("not_older");
    let mut client = database.connect();
    let active = "SELECT active_slot FROM rekey.keys WHERE purpose = 'lookup'";
    let stores_under = "SELECT rekey.fingerprint_slot_id(fingerprint_col('x', 'email_lookup'))";
    let compromise = "SELECT rekey.mark_compromised(active_slot, 'leaked') FROM rekey.keys \
                       WHERE purpose = 'lookup'";
    client.run("SELECT rotate_key('email_lookup')");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    // The slot before is compromised: the new one stores, and not one that was drained long ago.
    client.run("BEGIN");
    client.run(compromise);
    let fresh = client.number(active);
    assert_eq!(client.number(stores_under), fresh);
    client.run("ROLLBACK");
    // What others have rotated since this transaction began counts.
    client.run("BEGIN; SELECT 1");
    database.connect().run("SELECT rotate_key('email_lookup')");
    let before = client.number(active);
    client.run("SELECT rotate_key('email_lookup')");
    assert_eq!(client.number(stores_under), before);
    client.run("SELECT rekey.rollback_rotation('email_lookup')");
    assert_eq!(client.number(active), before);
    assert_eq!(client.number(stores_under), before);
    client.run("ROLLBACK");
    // A savepoint that is rolled back takes nothing along.
    client.run("BEGIN; SAVEPOINT s; SELECT rotate_key('email_lookup'); ROLLBACK TO s");
    assert_eq!(client.number(stores_under), before);
    client.run("SELECT rotate_key('email_lookup')");
    assert_eq!(client.number(stores_under), before);
    client.run("COMMIT");
    assert_ne!(client.number(stores_under), before);
}

/// Ends the other threads of a test, however it ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn under_concurrent_inserts_and_rotations_no_row_is_missed() {
    let database = database("concurrent");
    let stop = AtomicBool::new(false);
    let written = AtomicI64::new(1000);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut client = database.connect();
                while !stop.load(Ordering::Relaxed) {
                    let id = written.fetch_add(1, Ordering::Relaxed);
                    client.run(&format!(
                        "INSERT INTO t VALUES ({id}, encrypt_col('NEW{id}', 'pii'), \
                             fingerprint_col('new{id}', 'email_lookup'))"
                    ));
                    // Whoever is told of the row looks for it.
                    assert_eq!(found(&mut client, &format!("new{id}")), [id.to_string()]);
                }
            });
        }
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = database.connect();
                    let mut looks = 0;
                    while !stop.load(Ordering::Relaxed) {
                        // The newest row that this statement's snapshot sees is found under it.
                        assert!(client.truth(
                            "WITH newest AS (SELECT id FROM t ORDER BY id DESC LIMIT 1) \
                             SELECT count(*) = 1 FROM newest JOIN t ON t.email_fp = ANY ( \
                                 rekey.fingerprints(CASE WHEN newest.id < 1000 \
                                     THEN 'user' || newest.id || '@example.org' \
                                     ELSE 'new' || newest.id END, 'email_lookup'))"
                        ));
                        looks += 1;
                    }
                    looks
                })
            })
            .collect();
        let stopping = Stop(&stop);
        let mut client = database.connect();
        for round in 0..5 {
            client.run("SELECT rotate_key('email_lookup')");
            if round % 2 == 1 {
                client.run("SELECT rotate_key('pii')");
            }
            reencrypt(&mut client);
            assert_eq!(client.number(MISSED), 0);
        }
        drop(stopping);
        for reader in readers {
            assert!(reader.join().expect("a reader") > 0);
        }
    });
    let mut client = database.connect();
    reencrypt(&mut client);
    assert_eq!((client.number(STALE), client.number(MISSED)), (0, 0));
    assert_eq!(
        states(&mut client),
        [
            "drained", "drained", "drained", "drained", "drained", "active"
        ]
    );
}

#[test]
fn who_stores_an_old_fingerprint_and_commits_late_holds_up_the_proof() {
    let database = database("late");
    let (mut old, mut client) = (database.connect(), database.connect());
    old.run("BEGIN");
    old.run(
        "INSERT INTO t VALUES (101, encrypt_col('late', 'pii'), \
             fingerprint_col('late', 'email_lookup'))",
    );
    client.run("SELECT rotate_key('email_lookup')");
    let pid = old.number("SELECT pg_backend_pid()");
    let mut other = database.connect();
    let run = thread::spawn(move || reencrypt(&mut other));
    wait_until("the barrier names the session", || {
        client
            .text("SELECT coalesce(string_agg(waits_for, ', '), '') FROM rekey.progress")
            .contains(&format!("pid {pid}"))
    });
    assert_eq!(states(&mut client), ["previous", "active"]);
    old.run("COMMIT");
    run.join().expect("CALL reencrypt");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(MISSED)), (0, 0));
}

#[test]
fn an_old_snapshot_finds_its_rows_after_the_drain_and_keeps_the_slot_from_its_end() {
    let database = database("snapshot");
    let (mut old, mut client) = (database.connect(), database.connect());
    old.run("BEGIN ISOLATION LEVEL REPEATABLE READ");
    assert_eq!(found(&mut old, "user7@example.org"), ["7"]);
    client.run("SELECT rotate_key('email_lookup')");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(found(&mut old, "user7@example.org"), ["7"]);
    assert_eq!(
        client
            .attempt("SELECT rekey.disable_slot(slot_id) FROM rekey.slots WHERE state = 'drained'")
            .expect_err("an older transaction runs")
            .code,
        "55000"
    );
    assert_eq!(found(&mut old, "user8@example.org"), ["8"]);
    old.run("COMMIT");
}

#[test]
fn purposes_are_kept_apart_both_ways() {
    let database = database("purposes");
    let mut client = database.connect();
    for sql in [
        "SELECT fingerprint_col('x', 'pii')",
        "SELECT rekey.fingerprints('x', 'pii')",
        "SELECT encrypt_col('x', 'email_lookup')",
        // A fingerprint that names a slot which seals, and an envelope that names a lookup slot.
        "SELECT rekey.verify_fingerprint('x', int8send(active_slot) || decode(repeat('00', 32), 'hex')) \
           FROM rekey.keys WHERE key_name = 'pii'",
        "SELECT decrypt_col('\\xf901' || int8send(active_slot) || decode(repeat('00', 40), 'hex')) \
           FROM rekey.keys WHERE key_name = 'email_lookup'",
        "SELECT rekey.register_fingerprint('t', 'email_fp', 'email', 'pii', 'pii')",
        "SELECT rekey.register_fingerprint('t', 'email_fp', 'email', 'email_lookup', 'email_lookup')",
    ] {
        client.refuse(sql, "22023");
    }
}

#[test]
fn verify_goes_by_the_slot_in_the_fingerprint() {
    let database = database("verify");
    let mut client = database.connect();
    let verify =
        "SELECT rekey.verify_fingerprint('user7@example.org', email_fp) FROM t WHERE id = 7";
    assert!(client.truth(verify));
    client.run("SELECT rotate_key('email_lookup')");
    assert!(client.truth(verify), "previous");
    assert!(!client.truth(
        "SELECT rekey.verify_fingerprint('user8@example.org', email_fp) FROM t WHERE id = 7"
    ));
    assert!(!client.truth(
        "SELECT rekey.verify_fingerprint('user7@example.org', email_fp, 'context') FROM t WHERE id = 7"
    ));
    assert!(client.truth(
        "SELECT bool_and(NOT rekey.verify_fingerprint('user7@example.org', \
             set_byte(email_fp, i, get_byte(email_fp, i) # 1))) \
           FROM t, generate_series(8, 39) AS i WHERE id = 7"
    ));
    client.refuse("SELECT rekey.verify_fingerprint('x', '\\x00')", "22P03");
    client.refuse(
        "SELECT rekey.verify_fingerprint('x', encrypt_col('x', 'pii'))",
        "22P03",
    );
    client.refuse(
        "SELECT rekey.verify_fingerprint('x', int8send(1) || decode(repeat('00', 32), 'hex'))",
        "42704",
    );
    client.run(
        "SELECT rekey.disable_slot(slot_id, force => true) FROM rekey.slots WHERE state = 'previous'",
    );
    client.refuse(verify, "55000");
    assert!(found(&mut client, "user7@example.org").is_empty());
}

#[test]
fn who_may_look_up_may_not_open_and_who_may_not_look_up_learns_nothing() {
    let database = database("roles");
    let mut admin = database.connect();
    admin.run(
        "CREATE ROLE login_role LOGIN; CREATE ROLE reader_role LOGIN;
         GRANT SELECT, INSERT ON t TO login_role, reader_role;
         SELECT rekey.grant_key('email_lookup', 'login_role', '{encrypt}');
         SELECT rekey.grant_key('pii', 'reader_role', '{decrypt}');
         SELECT rekey.grant_key('email_lookup', 'reader_role', '{decrypt}')",
    );
    let mut login = database.connect_as("login_role");
    assert_eq!(found(&mut login, "user7@example.org"), ["7"]);
    assert!(login.truth(
        "SELECT rekey.verify_fingerprint('user7@example.org', email_fp) FROM t WHERE id = 7"
    ));
    login.refuse("SELECT decrypt_col(email) FROM t", "42501");
    login.refuse("SELECT encrypt_col('x', 'pii')", "42501");
    login.refuse(
        "SELECT rekey.register_fingerprint('t', 'email_fp', 'email', 'email_lookup', 'pii')",
        "42501",
    );
    let mut reader = database.connect_as("reader_role");
    reader.run("SELECT decrypt_col(email) FROM t");
    for sql in [
        "SELECT fingerprint_col('user7@example.org', 'email_lookup')",
        "SELECT rekey.fingerprints('user7@example.org', 'email_lookup')",
        "SELECT rekey.verify_fingerprint('user7@example.org', email_fp) FROM t WHERE id = 7",
    ] {
        reader.refuse(sql, "42501");
    }
    // Taken back, it is gone with the next statement of a warm session.
    admin.run("SELECT rekey.revoke_key('email_lookup', 'login_role', '{encrypt}')");
    login.refuse("SELECT rekey.fingerprints('x', 'email_lookup')", "42501");
    admin.run(
        "REVOKE ALL ON t FROM login_role, reader_role; DROP ROLE login_role; DROP ROLE reader_role",
    );
}

#[test]
fn a_registration_needs_the_table_and_both_keys() {
    let database = database("registering");
    let mut admin = database.connect();
    admin.run(
        "SELECT rekey.unregister_column('t', 'email_fp');
         CREATE ROLE owning_role LOGIN; ALTER TABLE t OWNER TO owning_role;
         GRANT CREATE ON SCHEMA public TO owning_role",
    );
    let register = "SELECT rekey.register_fingerprint('t', 'email_fp', 'email', 'email_lookup', \
                    'pii', 'lower($1)')";
    let mut owner = database.connect_as("owning_role");
    owner.refuse(register, "42501");
    admin.run("SELECT rekey.grant_key('email_lookup', 'owning_role', '{encrypt}')");
    owner.refuse(register, "42501").names("\"pii\"");
    admin.run("SELECT rekey.grant_key('pii', 'owning_role', '{decrypt}')");
    owner.run(register);
    owner.refuse(register, "42710");
    owner.run("SELECT rekey.unregister_column('t', 'email_fp')");
    for (arguments, code) in [
        ("'t', 'email_fp', 'none', 'email_lookup', 'pii'", "55000"),
        ("'t', 'email_fp', 'id', 'email_lookup', 'pii'", "55000"),
        (
            "'t', 'email_fp', 'email_fp', 'email_lookup', 'pii'",
            "55000",
        ),
        ("'t', 'id', 'email', 'email_lookup', 'pii'", "42804"),
        ("'t', 'email', 'email', 'email_lookup', 'pii'", "42710"),
        (
            "'t', 'email_fp', 'email', 'email_lookup', 'pii', 'random()::text'",
            "22023",
        ),
        (
            "'t', 'email_fp', 'email', 'email_lookup', 'pii', '$1, $1'",
            "22023",
        ),
        (
            "'t', 'email_fp', 'email', 'email_lookup', 'pii', '', 'email_fp::text'",
            "22023",
        ),
    ] {
        owner.refuse(
            &format!("SELECT rekey.register_fingerprint({arguments})"),
            code,
        );
    }
    for (normalise, code) in [
        ("$2", "42P02"),
        ("id::text", "42703"),
        ("(SELECT $1)", "0A000"),
    ] {
        let sql = format!(
            "SELECT rekey.register_fingerprint('t', 'email_fp', 'email', 'email_lookup', 'pii', \
             '{normalise}')"
        );
        owner.fail(&sql, code);
    }
    owner.run("CREATE UNIQUE INDEX one ON t (email_fp)");
    owner.refuse(register, "55000").names("unique index");
    // The owner's own function may see values as long as he may decrypt them.
    owner.run(
        "DROP INDEX one;
         CREATE FUNCTION public.mine(text) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT lower($1)'",
    );
    let with_function = register.replace("lower(", "public.mine(");
    owner.run(&with_function);
    admin.run("SELECT rekey.revoke_key('pii', 'owning_role', '{decrypt}')");
    admin.run("SELECT rotate_key('email_lookup')");
    let refusal = admin
        .attempt("CALL rekey.reencrypt()")
        .expect_err("his function sees no value");
    assert_eq!(refusal.code, "22023");
    admin.run("SELECT rekey.grant_key('pii', 'owning_role', '{decrypt}')");
    reencrypt(&mut admin);
    assert_eq!((admin.number(STALE), admin.number(MISSED)), (0, 0));
    admin.run(
        "ALTER TABLE t OWNER TO postgres; ALTER FUNCTION public.mine(text) OWNER TO postgres;
         REVOKE ALL ON SCHEMA public FROM owning_role; DROP ROLE owning_role",
    );
}

#[test]
fn a_refresh_never_makes_a_fingerprint_of_another_value() {
    let database = database("mismatch");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE other AS SELECT encrypt_col('salary', 'pii') AS c;
         SELECT rekey.create_key('second', purpose => 'lookup');
         -- Of another value; a foreign envelope; no value at all; another lookup key's; of a slot
         -- that does not exist.
         UPDATE t SET email_fp = (SELECT email_fp FROM t WHERE id = 50) WHERE id = 1;
         UPDATE t SET email = (SELECT c FROM other) WHERE id = 2;
         UPDATE t SET email = NULL WHERE id = 3;
         UPDATE t SET email_fp = fingerprint_col('user4@example.org', 'second') WHERE id = 4;
         UPDATE t SET email_fp = int8send(1) || decode(repeat('00', 32), 'hex') WHERE id = 5;
         UPDATE t SET email_fp = '\\x00' WHERE id = 6;
         UPDATE t SET email_fp = NULL WHERE id = 7",
    );
    let before = "SELECT string_agg(email_fp::text, ',' ORDER BY id) FROM t WHERE id < 6";
    let was = client.text(before);
    client.run("SELECT rotate_key('email_lookup'), rotate_key('second')");
    reencrypt(&mut client);
    assert_eq!(client.text(before), was);
    assert_eq!(states(&mut client), ["previous", "active"]);
    assert_eq!(
        client.column("SELECT sqlstate FROM rekey.errors ORDER BY row_ref"),
        ["39000", "39000", "22004", "22023", "42704"]
    );
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE email_fp IS NULL"),
        1
    );
    // Mended or taken away, they are out of the way.
    client.run(
        "UPDATE t SET email_fp = fingerprint_col(lower(decrypt_col(email)), 'email_lookup')
          WHERE id IN (1, 2, 4);
         UPDATE t SET email_fp = NULL WHERE id IN (3, 5);
         SELECT rekey.retry_quarantine()",
    );
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
}

#[test]
fn a_fingerprint_in_a_column_of_envelopes_and_the_reverse_hold_up_the_proof() {
    let database = database("other_kind");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.unregister_column('t', 'email_fp'); SELECT rekey.register_column('t', 'email_fp');
         CREATE TABLE r (email bytea, email_fp bytea);
         INSERT INTO r SELECT encrypt_col('x', 'pii'), encrypt_col('y', 'pii');
         SELECT rekey.register_column('r', 'email');
         SELECT rekey.register_fingerprint('r', 'email_fp', 'email', 'email_lookup', 'pii');
         -- Bytes of that length that name no slot are nothing of ours.
         INSERT INTO t VALUES (101, NULL, decode(repeat('00', 7) || '01' || repeat('00', 32), 'hex'));
         SELECT rotate_key('email_lookup'), rotate_key('pii')",
    );
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["previous", "active"]);
    let seals = "SELECT state FROM rekey.slots WHERE key_name = 'pii' ORDER BY version";
    assert_eq!(client.column(seals), ["previous", "active"]);
    assert_eq!(
        client.column(
            "SELECT table_name || ' ' || sqlstate || ' ' || count(*) FROM rekey.errors \
                        GROUP BY table_name, sqlstate ORDER BY 1"
        ),
        ["r 22P03 1", "t 22P03 100"]
    );
    let finding = "SELECT string_agg(finding || remedy, ' ') FROM rekey.check() \
                    WHERE object = 'column public.t.email_fp'";
    let said = client.text(finding);
    assert!(
        said.contains("fingerprints, and the column is registered for envelopes"),
        "{said}"
    );
    // Registered as what they are, they are made again.
    client.run(
        "DELETE FROM t WHERE id = 101; SELECT rekey.unregister_column('t', 'email_fp');
         SELECT rekey.register_fingerprint('t', 'email_fp', 'email', 'email_lookup', 'pii', 'lower($1)');
         UPDATE r SET email_fp = NULL; SELECT rekey.retry_quarantine()",
    );
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(client.column(seals), ["drained", "active"]);
    assert_eq!((client.number(STALE), client.number(MISSED)), (0, 0));
}

#[test]
fn a_partition_and_the_table_above_it_agree_on_what_a_column_holds() {
    let database = database("kinds");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE p (id int, email bytea, email_fp bytea) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (50);
         SELECT rekey.register_column('p', 'email');
         SELECT rekey.register_fingerprint('p', 'email_fp', 'email', 'email_lookup', 'pii')",
    );
    client
        .refuse("SELECT rekey.register_column('p1', 'email_fp')", "55000")
        .names("fingerprints");
    client.run("SELECT rekey.unregister_column('p', 'email_fp')");
    client.run("SELECT rekey.register_column('p1', 'email_fp')");
    client
        .refuse(
            "SELECT rekey.register_fingerprint('p', 'email_fp', 'email', 'email_lookup', 'pii')",
            "55000",
        )
        .names("envelopes");
}

#[test]
fn a_fingerprint_is_not_dismissed_since_other_rows_may_have_the_same_one() {
    let database = database("dismissal");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE old AS SELECT email_fp FROM t WHERE id = 2;
         UPDATE t SET email_fp = (SELECT email_fp FROM old) WHERE id = 1;
         SELECT rotate_key('email_lookup')",
    );
    reencrypt(&mut client);
    let dismiss = "SELECT rekey.dismiss_quarantine(quarantine_id, 'wrong value') FROM rekey.errors";
    assert_eq!(
        client.column("SELECT sqlstate FROM rekey.errors"),
        ["39000"]
    );
    client.refuse(dismiss, "55000").names("fingerprint");
    // By whatever means an entry comes to be dismissed: no proof excuses a fingerprint.
    client.run(
        "SET session_replication_role = replica;
         UPDATE rekey.quarantine SET dismissed_at = now(), next_try = NULL;
         RESET session_replication_role",
    );
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["previous", "active"]);
    client.run("UPDATE t SET email_fp = NULL WHERE id = 1");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(found(&mut client, "user2@example.org"), ["2"]);
}

#[test]
fn contexts_and_typed_values_survive_a_refresh() {
    let database = database("contexts");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE c (id int, tenant text, birth bytea, birth_fp bytea);
         INSERT INTO c SELECT i, 'tenant ' || i % 3,
             encrypt_col(DATE '2000-01-01' + i, 'pii', rekey.context('c.birth', i::text)),
             fingerprint_col((DATE '2000-01-01' + i)::text, 'email_lookup', 'tenant ' || i % 3)
           FROM generate_series(1, 20) AS i;
         SELECT rekey.register_column('c', 'birth', 'rekey.context(''c.birth'', id::text)');
         SELECT rekey.register_fingerprint('c', 'birth_fp', 'birth', 'email_lookup', 'pii',
             context => 'tenant');
         SELECT rotate_key('email_lookup')",
    );
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert!(client.truth(
        "SELECT bool_and(birth_fp = fingerprint_col((DATE '2000-01-01' + id)::text, 'email_lookup', \
             tenant)) FROM c"
    ));
    assert_eq!(
        client.rows(
            "SELECT column_name, sealed_column, key_name, sealed_key, normalise, context \
               FROM rekey.columns WHERE sealed_column IS NOT NULL ORDER BY table_name::text"
        ),
        [
            [
                Some("birth_fp"),
                Some("birth"),
                Some("email_lookup"),
                Some("pii"),
                None,
                Some("tenant")
            ],
            [
                Some("email_fp"),
                Some("email"),
                Some("email_lookup"),
                Some("pii"),
                Some("lower($1)"),
                Some("")
            ],
        ]
        .map(|row| row.map(|cell| cell.map(str::to_owned)))
    );
    // Renames of either column are followed, and a sealed column that goes stands in the way.
    client.run(
        "ALTER TABLE c RENAME birth TO born; ALTER TABLE c RENAME birth_fp TO born_fp;
         SELECT rotate_key('email_lookup')",
    );
    assert_eq!(
        client.text("SELECT sealed_column FROM rekey.columns WHERE column_name = 'born_fp'"),
        "born"
    );
    assert_eq!(
        client.text(
            "SELECT sealed_column FROM rekey.registered_column WHERE column_name = 'born_fp'"
        ),
        "born"
    );
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "drained", "active"]);
    client.run("SELECT rekey.unregister_column('c', 'born'); SELECT rotate_key('email_lookup')");
    reencrypt(&mut client);
    assert_eq!(states(&mut client)[2..], ["previous", "active"]);
    assert!(
        client
            .text("SELECT string_agg(waits_for, ' ') FROM rekey.progress")
            .contains("the sealed column beside \"born_fp\"")
    );
}

#[test]
fn partitions_and_restored_dumps_have_other_column_numbers() {
    let database = database("numbers");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE p (gone int, id int, email bytea, email_fp bytea) PARTITION BY RANGE (id);
         ALTER TABLE p DROP COLUMN gone;
         CREATE TABLE p1 (email_fp bytea, id int, gone int, email bytea);
         ALTER TABLE p1 DROP COLUMN gone;
         ALTER TABLE p ATTACH PARTITION p1 FOR VALUES FROM (0) TO (50);
         CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (50) TO (200);
         SELECT rekey.register_column('p', 'email');
         SELECT rekey.register_fingerprint('p', 'email_fp', 'email', 'email_lookup', 'pii', 'lower($1)');
         INSERT INTO p SELECT * FROM t;
         SELECT rotate_key('email_lookup')",
    );
    let missed = MISSED.replace("FROM t ", "FROM p ");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(client.number(&missed), 0);
    let file = cluster().dir().join("numbers.sql").display().to_string();
    cluster().tool("pg_dump", &["-d", "numbers", "-f", &file]);
    let target = cluster().empty_database("numbers_2", "");
    let arguments = [
        "-X",
        "-q",
        "-v",
        "ON_ERROR_STOP=1",
        "-d",
        "numbers_2",
        "-f",
        &file,
    ];
    cluster().tool("psql", &arguments);
    let mut client = target.connect();
    assert_eq!(
        client.column(
            "SELECT sealed_column FROM rekey.columns WHERE sealed_column IS NOT NULL AND NOT missing"
        ),
        ["email", "email"]
    );
    assert!(client.truth(
        "SELECT bool_and(sealed_attnum = attnum - 1) FROM rekey.registered_column \
          WHERE sealed_column <> ''"
    ));
    client.run("SELECT rotate_key('email_lookup')");
    reencrypt(&mut client);
    assert_eq!(states(&mut client), ["drained", "drained", "active"]);
    assert_eq!((client.number(&missed), client.number(STALE)), (0, 0));
}

#[test]
fn touch_leaves_fingerprints_to_the_worker() {
    let database = database("touch");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.enable_touch('t'); SELECT rotate_key('pii'), rotate_key('email_lookup');
         UPDATE t SET id = 107 WHERE email_fp = ANY (rekey.fingerprints('user7@example.org', \
             'email_lookup'))",
    );
    assert_eq!(client.number(STALE), 100);
    assert!(client.truth("SELECT NOT rekey.is_stale(email) FROM t WHERE id = 107"));
    reencrypt(&mut client);
    assert_eq!((client.number(STALE), client.number(MISSED)), (0, 0));
}

#[test]
fn a_key_may_ask_for_a_context_and_a_shredded_one_finds_nothing() {
    let database = database("policy");
    let mut client = database.connect();
    client.run("SELECT rekey.set_policy('email_lookup', require_context => true)");
    client.refuse("SELECT fingerprint_col('x', 'email_lookup')", "22023");
    client.refuse("SELECT rekey.fingerprints('x', 'email_lookup')", "22023");
    client.run("SELECT fingerprint_col('x', 'email_lookup', 'c')");
    // A staged slot makes no fingerprints, and a lookup does not ask for them.
    client.run("SELECT rekey.prepare_key('email_lookup')");
    let count = "SELECT cardinality(rekey.fingerprints('x', 'email_lookup', 'c'))";
    assert_eq!(client.number(count), 1);
    client.run("SELECT rekey.promote_key('email_lookup')");
    assert_eq!(client.number(count), 2);
    client.run("SELECT rekey.shred_key('email_lookup', 'the end')");
    client.refuse("SELECT fingerprint_col('x', 'email_lookup', 'c')", "55000");
    client.refuse(
        "SELECT rekey.fingerprints('x', 'email_lookup', 'c')",
        "55000",
    );
}

#[test]
fn parallel_workers_look_up_too() {
    let database = database("parallel");
    let mut client = database.connect();
    client.run(
        "INSERT INTO t SELECT i, encrypt_col('v' || i % 10, 'pii'),
             fingerprint_col('v' || i % 10, 'email_lookup') FROM generate_series(1001, 6000) AS i;
         SELECT rotate_key('email_lookup');
         DROP INDEX t_email_fp; ANALYZE t",
    );
    for leader in [false, true] {
        let mut session = database.connect();
        session.run(&format!(
            "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0;
             SET min_parallel_table_scan_size = 0; SET max_parallel_workers_per_gather = 2;
             SET parallel_leader_participation = {leader}"
        ));
        let search = "SELECT count(*) FROM t WHERE email_fp = ANY (rekey.fingerprints( \
                      'v' || id % 10, 'email_lookup')) AND rekey.verify_fingerprint( \
                      'v' || id % 10, email_fp)";
        let plan = session.column(&format!("EXPLAIN {search}")).join("\n");
        assert!(plan.contains("Gather"), "{plan}");
        assert_eq!(session.number(search), 5000);
    }
}

#[test]
fn values_that_are_looked_up_stay_out_of_the_log() {
    let database = database("log");
    let mut client = database.connect();
    for sql in [
        "SELECT fingerprint_col('hunter2secret', 'none')",
        "SELECT rekey.fingerprints('hunter2secret', 'none')",
        "SELECT rekey.verify_fingerprint('hunter2secret', '\\x00')",
        "SELECT 1 / length(fingerprint_col('hunter2secret', 'email_lookup')) - 1 / 0",
    ] {
        client.attempt(sql).expect_err(sql);
    }
    assert!(!cluster().log().contains("hunter2secret"));
}

#[test]
fn a_standby_finds_what_the_primary_stores_and_follows_its_rotations() {
    let primary = Cluster::start(Options::preloaded().set("rekey.worker = off"));
    let standby = primary.standby();
    let mut client = primary.database("lookup").connect();
    client.run(
        "SELECT rekey.create_key('pii'); SELECT rekey.create_key('email_lookup', purpose => 'lookup');
         CREATE TABLE t (id int, email bytea, email_fp bytea);
         INSERT INTO t VALUES (1, encrypt_col('one', 'pii'), fingerprint_col('one', 'email_lookup'))",
    );
    let mut postgres = standby.connect("postgres");
    let replayed = |client: &mut Client, postgres: &mut Client| {
        let lsn = client.text("SELECT pg_current_wal_flush_lsn()");
        wait_until("the standby has replayed", || {
            postgres.truth(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'"))
        });
    };
    replayed(&mut client, &mut postgres);
    let mut reader = standby.connect("lookup");
    assert_eq!(found(&mut reader, "one"), ["1"]);
    // In one transaction all along: it takes no new lock.
    reader.run("BEGIN");
    assert_eq!(found(&mut reader, "one"), ["1"]);
    for id in 2..5 {
        client.run("SELECT rotate_key('email_lookup')");
        client.run(&format!(
            "INSERT INTO t VALUES ({id}, encrypt_col('one', 'pii'), \
                 fingerprint_col('one', 'email_lookup'))"
        ));
        replayed(&mut client, &mut postgres);
        let ids: Vec<String> = (1..=id).map(|id| id.to_string()).collect();
        assert_eq!(found(&mut reader, "one"), ids);
    }
    reader.run("COMMIT");
    assert!(reader.truth("SELECT bool_and(rekey.verify_fingerprint('one', email_fp)) FROM t"));
}

/// The accounts of a test of the unique rule, by the statements of docs/search.md.
fn unique_database(name: &str) -> Database<'static> {
    let database = cluster().database(name);
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('pii')");
    let slot = client.number("SELECT rekey.create_key('unique_1', purpose => 'lookup')");
    client.run(&format!(
        "CREATE TABLE account (
             id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, email bytea,
             email_u1 bytea UNIQUE CHECK (email_u1 IS NULL
                 OR coalesce(rekey.fingerprint_slot_id(email_u1), 0) = {slot}),
             CONSTRAINT email_has_u1 CHECK ((email IS NULL) = (email_u1 IS NULL)))"
    ));
    database
}

/// The application's statement: `columns` are those that it writes.
fn writer(columns: &[(&str, &str)]) -> String {
    let names: Vec<&str> = columns.iter().map(|(column, _)| *column).collect();
    let values: Vec<String> = columns
        .iter()
        .map(|(_, key)| format!("fingerprint_col(lower(e), '{key}')"))
        .collect();
    format!(
        "CREATE OR REPLACE FUNCTION open_account(e text) RETURNS void LANGUAGE sql AS $$
             INSERT INTO account (email, {}) VALUES (encrypt_col(e, 'pii'), {}) $$",
        names.join(", "),
        values.join(", ")
    )
}

/// Step 1: the second column, and the trigger that keeps an old writer from leaving it behind.
fn second_column(slot: i64) -> String {
    format!(
        "ALTER TABLE account ADD COLUMN email_u2 bytea CHECK (email_u2 IS NULL
             OR coalesce(rekey.fingerprint_slot_id(email_u2), 0) = {slot});
         CREATE FUNCTION forget_email_u2() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN new.email_u2 := NULL; RETURN new; END';
         CREATE TRIGGER email_u2_follows BEFORE UPDATE ON account FOR EACH ROW
             WHEN (new.email_u1 IS DISTINCT FROM old.email_u1
                   AND new.email_u2 IS NOT DISTINCT FROM old.email_u2)
             EXECUTE FUNCTION forget_email_u2()"
    )
}

/// Step 4.
const BOTH: &str = "ALTER TABLE account ADD CONSTRAINT email_has_u2 \
                        CHECK ((email IS NULL) = (email_u2 IS NULL)) NOT VALID; \
                    ALTER TABLE account VALIDATE CONSTRAINT email_has_u2";

#[test]
fn a_writer_of_the_first_unique_column_alone_never_leaves_the_second_one_behind() {
    let database = unique_database("unique_update");
    let mut client = database.connect();
    let (u1, u2) = (("email_u1", "unique_1"), ("email_u2", "unique_2"));
    client.run(&writer(&[u1]));
    client.run("SELECT open_account('Ada'), open_account('Grace')");
    let slot = client.number("SELECT rekey.create_key('unique_2', purpose => 'lookup')");
    client.run(&second_column(slot));
    client.run("CREATE UNIQUE INDEX account_email_u2 ON account (email_u2)");
    client.run(&writer(&[u1, u2]));
    let fill = "UPDATE account SET email_u2 = fingerprint_col(lower(decrypt_col(email)), \
                    'unique_2') WHERE email_u2 IS NULL AND email IS NOT NULL";
    client.run(fill);
    let change = |from: &str, to: &str| {
        format!(
            "UPDATE account SET email = encrypt_col('{to}', 'pii'), \
                    email_u1 = fingerprint_col(lower('{to}'), 'unique_1') \
              WHERE lower(decrypt_col(email)) = '{from}'"
        )
    };
    // An old writer, before step 4 and after it.
    client.run(&change("ada", "Bob"));
    assert_eq!(
        client.number("SELECT count(*) FROM account WHERE email_u2 IS NULL"),
        1
    );
    client.fail(BOTH, "23514");
    client.run(fill);
    client.run(BOTH);
    client.fail(&change("bob", "Carol"), "23514");
    // Writers of both may change a value, and seal the same one again.
    for email in ["Dora", "DORA"] {
        client.run(&format!(
            "UPDATE account SET email = encrypt_col('{email}', 'pii'), \
                    email_u1 = fingerprint_col(lower('{email}'), 'unique_1'), \
                    email_u2 = fingerprint_col(lower('{email}'), 'unique_2') \
              WHERE lower(decrypt_col(email)) IN ('bob', 'dora')"
        ));
    }
    assert_eq!(
        client.number(
            "SELECT count(*) FROM account WHERE NOT rekey.verify_fingerprint( \
                 lower(decrypt_col(email)), email_u2)"
        ),
        0
    );
    client.run("ALTER TABLE account DROP CONSTRAINT email_has_u1");
    client.run(&writer(&[u2]));
    client.fail("SELECT open_account('DORA')", "23505");
    client.run("SELECT open_account('Ada')");
}

#[test]
fn a_unique_rule_holds_at_every_moment_of_a_rotation() {
    let database = unique_database("unique_rule");
    let mut client = database.connect();
    let u1 = ("email_u1", "unique_1");
    let u2 = ("email_u2", "unique_2");
    client.run(&writer(&[u1]));
    client.run(
        "SELECT open_account('Ada'), open_account('Grace'); INSERT INTO account VALUES (DEFAULT)",
    );
    let stop = AtomicBool::new(false);
    let (opened, refused, phase) = (AtomicI64::new(0), AtomicI64::new(0), AtomicI64::new(0));
    let twice = "SELECT coalesce(string_agg(DISTINCT e, ' '), '') FROM ( \
                     SELECT lower(decrypt_col(email)) AS e FROM account WHERE email IS NOT NULL \
                      GROUP BY 1 HAVING count(*) > 1) AS twice";
    thread::scope(|scope| {
        // Few values and many tries: every insert meets the same one elsewhere.
        for seed in 0..4 {
            let (stop, opened, refused) = (&stop, &opened, &refused);
            let database = &database;
            scope.spawn(move || {
                let mut client = database.connect();
                let mut turn = seed;
                while !stop.load(Ordering::Relaxed) {
                    turn = (turn * 7 + 3) % 23;
                    let case = if turn % 2 == 0 { "Person" } else { "PERSON" };
                    match client.attempt(&format!("SELECT open_account('{case} {}')", turn % 5)) {
                        Ok(()) => opened.fetch_add(1, Ordering::Relaxed),
                        // 23514: a writer of before, behind the constraint; 42703: behind the drop.
                        Err(refusal) if refusal.code == "23505" => {
                            refused.fetch_add(1, Ordering::Relaxed)
                        }
                        Err(refusal) if ["23514", "42703"].contains(&&*refusal.code) => 0,
                        Err(refusal) => panic!("{refusal:?}"),
                    };
                    if turn % 7 == 0 {
                        let gone = "DELETE FROM account WHERE id = (SELECT max(id) FROM account \
                                     WHERE decrypt_col(email) ILIKE 'person%')";
                        client.run(gone);
                    }
                }
            });
        }
        let stopping = Stop(&stop);
        let moment = |client: &mut Client, what: &str| {
            // Not before everybody has tried his luck again.
            let tries = refused.load(Ordering::Relaxed);
            wait_until("duplicates are tried", || {
                refused.load(Ordering::Relaxed) > tries + 5
            });
            assert_eq!(client.text(twice), "", "{what}");
            for email in ["ada", "GRACE"] {
                let refusal = client.attempt(&format!("SELECT open_account('{email}')"));
                let refusal = refusal.expect_err("a duplicate");
                assert_eq!(refusal.code, "23505", "{what}: {refusal:?}");
            }
            phase.fetch_add(1, Ordering::Relaxed);
        };
        moment(&mut client, "before");
        let slot = client.number("SELECT rekey.create_key('unique_2', purpose => 'lookup')");
        client.run(&second_column(slot));
        client.run("CREATE UNIQUE INDEX CONCURRENTLY account_email_u2 ON account (email_u2)");
        moment(&mut client, "second column");
        client.run(&writer(&[u1, u2]));
        moment(&mut client, "writers of both");
        client.run(
            "UPDATE account SET email_u2 = fingerprint_col(lower(decrypt_col(email)), 'unique_2') \
              WHERE email_u2 IS NULL AND email IS NOT NULL",
        );
        moment(&mut client, "filled");
        client.run(
            "ALTER TABLE account ADD CONSTRAINT email_has_u2 \
                 CHECK ((email IS NULL) = (email_u2 IS NULL)) NOT VALID",
        );
        client.run("ALTER TABLE account VALIDATE CONSTRAINT email_has_u2");
        moment(&mut client, "constraint");
        client.run("ALTER TABLE account DROP CONSTRAINT email_has_u1");
        client.run(&writer(&[u2]));
        moment(&mut client, "writers of the new one");
        client.run("DROP TRIGGER email_u2_follows ON account");
        client.run("ALTER TABLE account DROP COLUMN email_u1");
        client.run("SELECT rekey.shred_key('unique_1', 'replaced')");
        moment(&mut client, "after");
        drop(stopping);
    });
    assert_eq!(phase.load(Ordering::Relaxed), 7);
    assert!(opened.load(Ordering::Relaxed) > 0);
    assert_eq!(client.text(twice), "");
}

#[test]
fn a_unique_column_refuses_a_rotation_in_place_instead_of_losing_the_rule() {
    let database = unique_database("unique_pinned");
    let mut client = database.connect();
    client.run(&writer(&[("email_u1", "unique_1")]));
    client.run("SELECT open_account('Ada')");
    client.fail("SELECT open_account('ADA')", "23505");
    client.run("SELECT rotate_key('unique_1')");
    client.fail("SELECT open_account('ADA')", "23514");
    client.fail("SELECT open_account('Grace')", "23514");
    client.run("SELECT rekey.rollback_rotation('unique_1')");
    client.fail("SELECT open_account('ADA')", "23505");
    client.run("SELECT open_account('Grace')");
    // What is no fingerprint is not unique, and stays out.
    for other in ["encrypt_col('ada', 'pii')", "'\\x00'"] {
        client.fail(
            &format!(
                "INSERT INTO account (email, email_u1) VALUES (encrypt_col('ada', 'pii'), {other})"
            ),
            "23514",
        );
    }
    // As an arbiter it serves like any unique column.
    client.run(
        "INSERT INTO account (email, email_u1) VALUES (encrypt_col('ada', 'pii'), \
             fingerprint_col('ada', 'unique_1')) ON CONFLICT (email_u1) DO NOTHING",
    );
    assert_eq!(client.number("SELECT count(*) FROM account"), 2);
    assert_eq!(
        client.number(
            "SELECT count(*) FROM account WHERE email_u1 = ANY (rekey.fingerprints('ada', 'unique_1'))"
        ),
        1
    );
    client.run("SELECT rekey.register_column('account', 'email')");
    client
        .refuse(
            "SELECT rekey.register_fingerprint('account', 'email_u1', 'email', 'unique_1', 'pii')",
            "55000",
        )
        .names("account_email_u1_key");
}
