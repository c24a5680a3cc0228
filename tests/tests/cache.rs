//! The promises of the per-backend key cache, each by its name, with warm sessions.
//!
//! A session is warm when it has sealed and opened under the key already. What other sessions commit
//! must reach it by its next transaction; what is rolled back must leave nothing behind. Parallel
//! plans and standbys are in `parallel.rs` and `standby.rs`.

use std::sync::OnceLock;
use std::thread;

use postgres::Client;
use rekey_tests::bytes::{NONCE, unhex};
use rekey_tests::{Ask, Cluster, Database, Options, long_runs, wait_until};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded()))
}

/// A database with a key and one sealed row in `t`.
fn database(name: &str) -> Database<'static> {
    let database = cluster().database(name);
    database.connect().run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t (id int, c bytea);
         INSERT INTO t VALUES (1, encrypt_col('one', 'pii'))",
    );
    database
}

/// A session that has sealed and opened already.
fn warm(database: &Database) -> Client {
    let mut client = database.connect();
    assert_eq!(
        client.text("SELECT decrypt_col(c) FROM t WHERE id = 1"),
        "one"
    );
    client.run("SELECT encrypt_col('x', 'pii')");
    client
}

/// The slot under which the session seals now.
fn seals_under(client: &mut Client) -> i64 {
    client.number("SELECT rekey.slot_id(encrypt_col('x', 'pii'))")
}

#[test]
fn a_rotation_in_another_session_is_seen_by_the_next_transaction() {
    let database = database("rotation_seen");
    let (mut one, mut two) = (warm(&database), warm(&database));
    let old = seals_under(&mut two);
    let new = one.number("SELECT rotate_key('pii')");
    assert_ne!(old, new);
    assert_eq!(seals_under(&mut two), new, "without reconnecting");
    assert_eq!(
        two.text("SELECT decrypt_col(c) FROM t"),
        "one",
        "old rows open"
    );
    let states = two.rows("SELECT slot_id, state FROM rekey.slots ORDER BY version");
    let cell = |text: &str| Some(text.to_owned());
    assert_eq!(
        states,
        [
            [cell(&old.to_string()), cell("previous")],
            [cell(&new.to_string()), cell("active")]
        ]
    );
}

#[test]
fn a_long_transaction_works_on_across_a_rotation() {
    let database = database("long_transaction");
    let (mut one, mut two) = (warm(&database), warm(&database));
    two.run("BEGIN; INSERT INTO t VALUES (2, encrypt_col('two', 'pii'))");
    let new = one.number("SELECT rotate_key('pii')");
    one.run("INSERT INTO t VALUES (3, encrypt_col('three', 'pii'))");
    two.run("INSERT INTO t VALUES (4, encrypt_col('four', 'pii'))");
    let values = two.column("SELECT decrypt_col(c) FROM t ORDER BY id");
    assert_eq!(values, ["one", "two", "three", "four"]);
    two.run("COMMIT");
    assert_eq!(seals_under(&mut two), new);
    assert_eq!(
        one.column("SELECT decrypt_col(c) FROM t ORDER BY id"),
        values
    );
}

#[test]
fn a_rolled_back_rotation_leaves_the_old_slot_active_everywhere() {
    let database = database("rotation_undone");
    let (mut one, mut two) = (warm(&database), warm(&database));
    let old = seals_under(&mut one);
    one.run("BEGIN");
    let new = one.number("SELECT rotate_key('pii')");
    assert_eq!(
        seals_under(&mut one),
        new,
        "the rotating transaction sees its own slot"
    );
    let lost = one.text("SELECT encrypt_col('lost', 'pii')");
    assert_eq!(seals_under(&mut two), old, "nobody else does");
    one.run("ROLLBACK");
    for client in [&mut one, &mut two] {
        assert_eq!(seals_under(client), old);
        client
            .refuse(&format!("SELECT decrypt_col('{lost}')"), "42704")
            .names(&new.to_string());
        assert_eq!(client.number("SELECT count(*) FROM rekey.slots"), 1);
        let audited = format!("SELECT count(*) FROM rekey.audit WHERE slot_id = {new}");
        assert_eq!(client.number(&audited), 0);
    }
}

#[test]
fn a_rotation_before_a_rolled_back_savepoint_leaves_nothing_behind() {
    let database = database("savepoint_undone");
    let mut client = warm(&database);
    let old = seals_under(&mut client);
    client.run("BEGIN; SAVEPOINT s");
    let new = client.number("SELECT rotate_key('pii')");
    let lost = client.text("SELECT encrypt_col('lost', 'pii')");
    assert_eq!(
        client.text(&format!("SELECT decrypt_col('{lost}')")),
        "lost"
    );
    assert_eq!(seals_under(&mut client), new);
    client.run("ROLLBACK TO s");
    assert_eq!(seals_under(&mut client), old);
    client.run("SAVEPOINT q");
    client.refuse(&format!("SELECT decrypt_col('{lost}')"), "42704");
    client.run("ROLLBACK TO q; COMMIT");
    client.refuse(&format!("SELECT decrypt_col('{lost}')"), "42704");
    assert_eq!(seals_under(&mut client), old);
}

#[test]
fn a_key_made_in_a_rolled_back_transaction_does_not_seal() {
    let database = database("key_undone");
    let mut client = warm(&database);
    client
        .run("BEGIN; SELECT rekey.create_key('brief'); SELECT encrypt_col('x', 'brief'); ROLLBACK");
    client.refuse("SELECT encrypt_col('x', 'brief')", "42704");
    client.run("SELECT rekey.create_key('brief')");
    client.run("SELECT encrypt_col('x', 'brief')");
}

#[test]
fn an_unknown_key_is_found_as_soon_as_another_session_has_made_it() {
    let database = database("key_made");
    let (mut one, mut two) = (warm(&database), warm(&database));
    two.refuse("SELECT encrypt_col('x', 'later')", "42704");
    one.run("SELECT rekey.create_key('later')");
    assert_eq!(
        two.text("SELECT decrypt_col(encrypt_col('x', 'later'))"),
        "x"
    );
}

#[test]
fn an_old_repeatable_read_snapshot_opens_and_seals_under_newer_slots() {
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let database = database(&format!("old_snapshot_{}", level.len()));
        let (mut one, mut two) = (warm(&database), database.connect());
        two.run(&format!("BEGIN ISOLATION LEVEL {level}"));
        assert_eq!(
            two.number("SELECT count(*) FROM t"),
            1,
            "the snapshot is taken"
        );
        one.run("SELECT rotate_key('pii')");
        let fresh = one.text("SELECT encrypt_col('fresh', 'pii')");
        assert_eq!(two.text(&format!("SELECT decrypt_col('{fresh}')")), "fresh");
        assert_eq!(two.text("SELECT decrypt_col(c) FROM t"), "one");
        two.run("INSERT INTO t VALUES (2, encrypt_col('two', 'pii')); COMMIT");
        assert_eq!(
            one.column("SELECT decrypt_col(c) FROM t ORDER BY id"),
            ["one", "two"]
        );
    }
}

#[test]
fn disabling_enabling_and_destroying_reach_warm_sessions() {
    let database = database("disabled");
    let (mut one, mut two) = (warm(&database), warm(&database));
    let old = seals_under(&mut one);
    one.run("SELECT rotate_key('pii')");
    let open = "SELECT decrypt_col(c) FROM t";
    let statement = two.prepare(open).expect("a statement");
    assert_eq!(two.text(open), "one");
    one.run(&format!("SELECT rekey.disable_slot({old}, force => true)"));
    two.refuse(open, "55000").names(&old.to_string());
    let error = two.query(&statement, &[]).expect_err("a disabled slot");
    assert_eq!(
        error.code().map(postgres::error::SqlState::code),
        Some("55000")
    );
    assert!(!two.truth("SELECT rekey.can_open(c, '') FROM t"));
    one.run(&format!("SELECT rekey.enable_slot({old})"));
    assert_eq!(two.text(open), "one");
    one.run(&format!("SELECT rekey.destroy_slot({old}, force => true)"));
    two.refuse(open, "55000").names(&old.to_string());
    one.refuse(open, "55000");
}

#[test]
fn grants_and_revokes_reach_warm_sessions() {
    let database = database("granted");
    let reader = database.role("reader");
    let mut admin = database.connect();
    let mut client = database.connect_as(&reader);
    admin.run(&format!("GRANT SELECT ON t TO {reader}"));
    let open = "SELECT decrypt_col(c) FROM t";
    client.refuse(open, "42501").names("pii");
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{reader}', '{{decrypt}}')"
    ));
    assert_eq!(client.text(open), "one");
    client.refuse("SELECT encrypt_col('x', 'pii')", "42501");
    admin.run(&format!(
        "SELECT rekey.revoke_key('pii', '{reader}', '{{decrypt}}')"
    ));
    client.refuse(open, "42501");
}

#[test]
fn role_membership_changes_reach_warm_sessions() {
    let database = database("members");
    let (group, member) = (database.role("grp"), database.role("member"));
    let mut admin = database.connect();
    admin.run(&format!(
        "GRANT SELECT ON t TO {member};
         SELECT rekey.grant_key('pii', '{group}', '{{encrypt,decrypt}}');
         GRANT {group} TO {member}"
    ));
    let mut client = database.connect_as(&member);
    let open = "SELECT decrypt_col(c) FROM t";
    assert_eq!(client.text(open), "one");
    admin.run(&format!("REVOKE {group} FROM {member}"));
    client.refuse(open, "42501");
    client.refuse("SELECT encrypt_col('x', 'pii')", "42501");
    admin.run(&format!("GRANT {group} TO {member}"));
    assert_eq!(client.text(open), "one");
    // Inheriting is the role's own until 15 and the membership's from 16 on.
    if admin.number("SELECT current_setting('server_version_num')::int") < 160_000 {
        admin.run(&format!("ALTER ROLE {member} NOINHERIT"));
    } else {
        admin.run(&format!("GRANT {group} TO {member} WITH INHERIT FALSE"));
    }
    client.refuse(open, "42501");
    admin.run(&format!("ALTER ROLE {member} SUPERUSER"));
    assert_eq!(client.text(open), "one");
}

#[test]
fn a_restore_into_a_running_server_is_seen_by_warm_sessions() {
    let source = database("restore_source");
    let mut from = source.connect();
    from.run("SELECT rekey.create_key('moved'); SELECT rotate_key('moved')");
    let envelope = from.text("SELECT encrypt_col('arrived', 'moved')");
    let target = database("restore_target");
    let mut client = warm(&target);
    client.refuse(&format!("SELECT decrypt_col('{envelope}')"), "42704");
    client.refuse("SELECT encrypt_col('x', 'moved')", "42704");
    let mut to = target.connect();
    let of_moved = "(SELECT s.slot_id FROM rekey.key_slot s WHERE s.key_name = 'moved')";
    for (table, filter) in [
        ("key", "key_name = 'moved'".to_owned()),
        ("key_slot", "key_name = 'moved'".to_owned()),
        ("slot_wrap", format!("slot_id IN {of_moved}")),
        ("key_grant", "key_name = 'moved'".to_owned()),
    ] {
        let file = cluster().dir().join(format!("restored-{table}"));
        let file = file.display();
        from.run(&format!(
            "COPY (SELECT * FROM rekey.{table} WHERE {filter}) TO '{file}'"
        ));
        to.run(&format!("COPY rekey.{table} FROM '{file}'"));
    }
    assert_eq!(
        client.text(&format!("SELECT decrypt_col('{envelope}')")),
        "arrived"
    );
    assert_eq!(
        client.text("SELECT decrypt_col(encrypt_col('x', 'moved'))"),
        "x"
    );
}

#[test]
fn opening_assigns_no_transaction_id() {
    let database = database("no_xid");
    let mut client = database.connect();
    client.run("BEGIN");
    assert_eq!(
        client.text("SELECT decrypt_col(c) FROM t"),
        "one",
        "a cold session"
    );
    assert_eq!(client.cell("SELECT pg_current_xact_id_if_assigned()"), None);
    assert!(client.truth("SELECT rekey.can_open(c, '') FROM t"));
    client.run("SELECT rekey.describe(c) FROM t");
    assert_eq!(client.cell("SELECT pg_current_xact_id_if_assigned()"), None);
    client.run("COMMIT");
}

#[test]
fn a_read_only_transaction_opens() {
    let database = database("read_only");
    let mut client = database.connect();
    client.run("SET default_transaction_read_only = on; BEGIN READ ONLY");
    assert_eq!(client.text("SELECT decrypt_col(c) FROM t"), "one");
    assert!(client.truth("SELECT rekey.ready()"));
    client.run("COMMIT");
}

#[test]
fn two_sessions_that_rotate_one_key_do_so_one_after_the_other() {
    let database = database("two_rotate");
    for end in ["COMMIT", "ROLLBACK"] {
        let (mut one, mut two) = (warm(&database), warm(&database));
        let mut observer = database.connect();
        one.run("BEGIN");
        let first = one.number("SELECT rotate_key('pii')");
        let pid = two.number("SELECT pg_backend_pid()");
        let second = thread::scope(|scope| {
            let waiting = scope.spawn(move || two.number("SELECT rotate_key('pii')"));
            wait_until("the second rotation waits", || {
                observer.truth(&format!(
                    "SELECT wait_event_type IS NOT DISTINCT FROM 'Lock' \
                     FROM pg_stat_activity WHERE pid = {pid}"
                ))
            });
            one.run(end);
            waiting.join().expect("the second rotation")
        });
        assert_ne!(first, second);
        let active = observer.column("SELECT slot_id FROM rekey.slots WHERE state = 'active'");
        assert_eq!(active, [second.to_string()]);
        let known = observer.truth(&format!(
            "SELECT count(*) = {} FROM rekey.slots WHERE slot_id = {first} AND state = 'previous'",
            i32::from(end == "COMMIT")
        ));
        assert!(known, "the first rotation's slot after {end}");
        assert_eq!(seals_under(&mut one), second);
    }
}

#[test]
fn many_sessions_rotating_never_make_two_active_slots() {
    let database = database("many_rotate");
    let (sessions, times) = (6, 10);
    thread::scope(|scope| {
        for _ in 0..sessions {
            let mut client = database.connect();
            scope.spawn(move || {
                for _ in 0..times {
                    let new = client.number("SELECT rotate_key('pii')");
                    assert!(new > 0);
                    let active =
                        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'active'");
                    assert_eq!(active, 1);
                }
            });
        }
    });
    let mut client = database.connect();
    let summary = client.rows(
        "SELECT count(*), count(DISTINCT version), count(*) FILTER (WHERE state = 'active'), \
         max(version) = max(version) FILTER (WHERE state = 'active') FROM rekey.slots",
    );
    let all = Some((sessions * times + 1).to_string());
    assert_eq!(
        summary,
        [[all.clone(), all, Some("1".to_owned()), Some("t".to_owned())]]
    );
}

#[test]
fn a_small_cache_serves_many_keys() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.key_cache_slots = 16"));
    let database = cluster.database("small");
    let mut client = database.connect();
    assert_eq!(
        client.number("SELECT current_setting('rekey.key_cache_slots')::int"),
        16
    );
    client.run(
        "SELECT rekey.create_key('k' || i) FROM generate_series(1, 200) i;
         CREATE TABLE t (id int, round int, c bytea)",
    );
    client.run(
        "BEGIN;
         INSERT INTO t SELECT i, r, encrypt_col(i || ' ' || r, 'k' || i)
           FROM generate_series(1, 5) r, generate_series(1, 200) i ORDER BY r, i;
         INSERT INTO t SELECT i, 6, encrypt_col(i || ' 6', 'k' || i)
           FROM generate_series(1, 200) i, generate_series(1, 3);
         COMMIT",
    );
    for order in ["round, id", "id, round", "md5(id::text || round)"] {
        let wrong = client.number(&format!(
            "SELECT count(*) FROM (SELECT * FROM t ORDER BY {order}) t \
             WHERE decrypt_col(c) <> id || ' ' || round"
        ));
        assert_eq!(wrong, 0, "in the order of {order}");
    }
    let distinct = client.truth("SELECT count(DISTINCT substr(c, 11, 24)) = count(*) FROM t");
    assert!(distinct, "evicted sealing states repeat no nonce");
    let salts = client.truth(
        "SELECT bool_and(salts > 1) FROM (SELECT count(DISTINCT substr(c, 11, 12)) AS salts \
         FROM t WHERE round < 6 GROUP BY id) s",
    );
    assert!(salts, "an evicted sealing state restarts with a fresh salt");
}

#[test]
fn a_statement_that_began_before_a_rotation_first_seals_under_the_new_slot() {
    let database = database("began_before");
    let (mut one, mut two) = (warm(&database), warm(&database));
    one.run(
        "CREATE FUNCTION wait_and_seal() RETURNS bigint LANGUAGE plpgsql AS $$
         BEGIN
             PERFORM pg_advisory_lock(7);
             RETURN rekey.slot_id(encrypt_col('x', 'pii'));
         END $$",
    );
    assert!(two.number("SELECT rekey.slot_id(encrypt_col('x', 'pii'))") > 0);
    one.run("SELECT pg_advisory_lock(7)");
    let pid = two.number("SELECT pg_backend_pid()");
    thread::scope(|scope| {
        let waiting = scope.spawn(move || two.number("SELECT wait_and_seal()"));
        wait_until("the statement waits", || {
            one.truth(&format!(
                "SELECT wait_event_type IS NOT DISTINCT FROM 'Lock' \
                 FROM pg_stat_activity WHERE pid = {pid}"
            ))
        });
        let new = one.number("SELECT rotate_key('pii')");
        one.run("SELECT pg_advisory_unlock(7)");
        // Nobody held the barrier when the rotation committed, so that nobody would wait for this.
        assert_eq!(waiting.join().expect("the waiting statement"), new);
    });
}

#[test]
fn a_prepared_rotation_counts_from_its_commit() {
    let database = database("prepared");
    for (end, counts) in [("ROLLBACK", false), ("COMMIT", true)] {
        let (mut one, mut two) = (warm(&database), warm(&database));
        let old = seals_under(&mut one);
        one.run("BEGIN");
        let new = one.number("SELECT rotate_key('pii')");
        assert_eq!(seals_under(&mut one), new);
        one.run("PREPARE TRANSACTION 'rotation'");
        assert_eq!(seals_under(&mut one), old, "prepared is not committed");
        assert_eq!(seals_under(&mut two), old);
        database
            .connect()
            .run(&format!("{end} PREPARED 'rotation'"));
        for client in [&mut one, &mut two] {
            assert_eq!(
                seals_under(client),
                if counts { new } else { old },
                "after {end}"
            );
            assert_eq!(client.text("SELECT decrypt_col(c) FROM t"), "one");
        }
    }
}

#[test]
fn a_rotation_in_a_released_savepoint_goes_with_its_transaction() {
    let database = database("released");
    let mut client = warm(&database);
    let old = seals_under(&mut client);
    client.run("BEGIN; SAVEPOINT s");
    let new = client.number("SELECT rotate_key('pii')");
    client.run("RELEASE s");
    assert_eq!(seals_under(&mut client), new);
    client.run("ROLLBACK");
    assert_eq!(seals_under(&mut client), old);
}

#[test]
fn a_cache_that_shrinks_while_it_is_full_goes_on() {
    let cluster = Cluster::start(Options::unloaded());
    let mut client = cluster.database("shrinks").connect();
    client.run(
        "SELECT rekey.create_key('k' || i) FROM generate_series(1, 100) i;
         CREATE TABLE t AS SELECT i, encrypt_col(i::text, 'k' || i) AS c
             FROM generate_series(1, 100) i",
    );
    let opened = "SELECT count(*) FROM t WHERE decrypt_col(c) = i::text";
    assert_eq!(client.number(opened), 100);
    cluster.append("rekey.key_cache_slots = 16");
    cluster.reload(&mut client);
    for _ in 0..2 {
        assert_eq!(client.number(opened), 100);
        client
            .run("BEGIN; SELECT encrypt_col('x', 'k' || i) FROM generate_series(1, 100) i; COMMIT");
    }
    client.run("DISCARD ALL");
    assert_eq!(client.number(opened), 100);
}

#[test]
fn values_of_one_transaction_share_a_salt_and_count_on() {
    let database = database("salts");
    let mut client = database.connect();
    let sealed = |client: &mut Client| -> Vec<Vec<u8>> {
        client
            .column("SELECT encrypt_col('x', 'pii') FROM generate_series(1, 3)")
            .iter()
            .map(|envelope| unhex(envelope)[NONCE].to_vec())
            .collect()
    };
    let (one, two) = (sealed(&mut client), sealed(&mut client));
    assert_eq!(one[0][..12], one[2][..12], "one salt in one transaction");
    assert_ne!(one[0][..12], two[0][..12], "another in the next");
    let counter = |nonce: &[u8]| {
        nonce[12..]
            .iter()
            .fold(0u128, |sum, byte| sum << 8 | u128::from(*byte))
    };
    assert_eq!(
        (counter(&one[0]) + 1) % (1 << 96),
        counter(&one[1]),
        "counts up by one"
    );
    client.run("BEGIN");
    let before = sealed(&mut client);
    client.run("COMMIT AND CHAIN");
    assert_ne!(
        before[0][..12],
        sealed(&mut client)[0][..12],
        "chained transactions too"
    );
    for end in ["ROLLBACK", "PREPARE TRANSACTION 'salts'"] {
        client.run("COMMIT; BEGIN; INSERT INTO t VALUES (1, NULL)");
        let before = sealed(&mut client);
        client.run(end);
        assert_ne!(
            before[0][..12],
            sealed(&mut client)[0][..12],
            "and after {end}"
        );
    }
    client.run("ROLLBACK PREPARED 'salts'");
    client.run("SET rekey.salt_per_value = on");
    let own = sealed(&mut client);
    assert_ne!(own[0][..12], own[1][..12]);
    let opened = client.text("SELECT decrypt_col(encrypt_col('own', 'pii'))");
    assert_eq!(opened, "own");
}

#[test]
fn one_transaction_seals_under_a_hundred_thousand_keys() {
    if !long_runs() {
        return;
    }
    let database = cluster().database("very_many");
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('k' || i) FROM generate_series(1, 100000) i");
    client.run(
        "BEGIN; CREATE TABLE t AS SELECT i, encrypt_col(i::text, 'k' || i) AS c
             FROM generate_series(1, 100000) i; COMMIT",
    );
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE decrypt_col(c) <> i::text"),
        0
    );
}
