//! Live columns: plaintext in, under clients that go on, and out again; what the trigger does with
//! each kind of write, what the end refuses, and what survives crashes, dumps and DDL.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded().set("rekey.worker = off")))
}

/// A table `t` with a plaintext column `email` in ten rows, the last of them NULL.
const TABLE: &str = "SELECT rekey.create_key('pii');
    CREATE TABLE t (id int PRIMARY KEY, email text, note text);
    INSERT INTO t SELECT i, CASE WHEN i < 10 THEN 'mail' || i END FROM generate_series(1, 10) i";
const BEGIN: &str = "SELECT rekey.encrypt_column('t', 'email', 'sealed', 'pii', \
                     $$rekey.context('t.email', id::text)$$)";
const FINISH: &str = "SELECT rekey.finish_encrypt_column('t', 'email')";
/// How many rows are not sealed as they should be.
const WRONG: &str = "SELECT count(*) FROM t WHERE email IS DISTINCT FROM \
                     decrypt_col(sealed, rekey.context('t.email', id::text))";

fn database(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let mut admin = database.connect();
    admin.run(TABLE);
    (database, admin)
}

fn fill(client: &mut Client) {
    client.run("CALL rekey.reencrypt('t')");
}

/// Triggers of live columns in the database, clones in partitions included.
const TRIGGERS: &str = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'zzz_rekey_live_%'";

#[test]
fn a_column_is_sealed_row_by_row_and_the_old_one_is_left_to_its_owner() {
    let (_, mut admin) = database("sealed");
    admin.run(BEGIN);
    assert_eq!(
        admin.text(
            "SELECT concat_ws(' ', column_name, into_column, direction, key_name, has_source) \
                    FROM rekey.live_columns"
        ),
        "email sealed encrypt pii f"
    );
    assert_eq!(
        admin.text("SELECT column_name || ' ' || context FROM rekey.columns"),
        "sealed rekey.context('t.email', id::text)"
    );
    fill(&mut admin);
    assert_eq!(
        admin.text("SELECT phase || ' ' || rows_rewritten FROM rekey.progress"),
        "done 9"
    );
    assert_eq!(admin.number(WRONG), 0);
    assert_eq!(
        admin.number("SELECT count(sealed) FROM t"),
        9,
        "NULL stays NULL"
    );
    admin.run(FINISH);
    assert_eq!(admin.number(TRIGGERS), 0);
    assert_eq!(admin.number("SELECT count(*) FROM rekey.live_columns"), 0);
    assert_eq!(
        admin.number("SELECT count(email) FROM t"),
        9,
        "the old column stays"
    );
    admin.run("ALTER TABLE t DROP COLUMN email; SELECT rotate_key('pii')");
    fill(&mut admin);
    assert_eq!(
        admin.number("SELECT count(*) FROM t WHERE rekey.is_stale(sealed)"),
        0,
        "the new column is registered"
    );
}

#[test]
fn every_kind_of_write_is_followed() {
    let (_, mut admin) = database("writes");
    admin.run(BEGIN);
    let sealed = |client: &mut Client, id: i32| {
        client.cell(&format!(
            "SELECT decrypt_col(sealed, rekey.context('t.email', id::text)) FROM t WHERE id = {id}"
        ))
    };
    admin.run("INSERT INTO t VALUES (20, 'new')");
    assert_eq!(sealed(&mut admin, 20).as_deref(), Some("new"));
    admin.run("UPDATE t SET email = 'changed' WHERE id = 20");
    assert_eq!(sealed(&mut admin, 20).as_deref(), Some("changed"));
    // A row that nobody has filled yet, updated for another reason.
    admin.run("UPDATE t SET note = 'x' WHERE id = 1");
    assert_eq!(sealed(&mut admin, 1).as_deref(), Some("mail1"));
    // Nothing is sealed anew when nothing of it changes.
    let before = admin.text("SELECT sealed::text FROM t WHERE id = 1");
    admin.run("UPDATE t SET note = 'y', email = email WHERE id = 1");
    assert_eq!(
        admin.text("SELECT sealed::text FROM t WHERE id = 1"),
        before
    );
    // The context changes, and the envelope with it.
    admin.run("UPDATE t SET id = 21 WHERE id = 20");
    assert_eq!(sealed(&mut admin, 21).as_deref(), Some("changed"));
    admin.run("UPDATE t SET email = NULL WHERE id = 21");
    assert_eq!(sealed(&mut admin, 21), None);
    admin.run(
        "INSERT INTO t VALUES (1, 'upserted') \
         ON CONFLICT (id) DO UPDATE SET email = excluded.email",
    );
    assert_eq!(sealed(&mut admin, 1).as_deref(), Some("upserted"));
    // Logical replication applies rows as a replica.
    admin.run("SET session_replication_role = replica; INSERT INTO t VALUES (31, 'applied')");
    admin.run("RESET session_replication_role");
    assert_eq!(sealed(&mut admin, 31).as_deref(), Some("applied"));
    // An application that writes both columns: the old one counts where it changes, ...
    let both = "encrypt_col('mine', 'pii', rekey.context('t.email', id::text))";
    admin.run(&format!(
        "UPDATE t SET email = 'both', sealed = {both} WHERE id = 31"
    ));
    assert_eq!(sealed(&mut admin, 31).as_deref(), Some("both"));
    // ... and nothing is overwritten where it writes the new one alone.
    admin.run(&format!("UPDATE t SET sealed = {both} WHERE id = 31"));
    assert_eq!(sealed(&mut admin, 31).as_deref(), Some("mine"));
    admin.run(&format!(
        "UPDATE t SET email = NULL, sealed = {both} WHERE id = 31"
    ));
    assert_eq!(sealed(&mut admin, 31).as_deref(), Some("mine"));
    admin.run("UPDATE t SET sealed = NULL WHERE id = 1");
    assert_eq!(
        sealed(&mut admin, 1).as_deref(),
        Some("upserted"),
        "written again"
    );
}

#[test]
fn clients_go_on_while_a_column_is_sealed() {
    const CLIENTS: i32 = 3;
    let (database, mut admin) = database("clients");
    admin.run("INSERT INTO t SELECT 1000000 + i, 'bulk' || i FROM generate_series(1, 5000) i");
    let (stop, seen) = (AtomicBool::new(false), AtomicBool::new(false));
    let oracle = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (database, stop) = (&database, &stop);
                scope.spawn(move || write(&mut database.connect(), client, stop))
            })
            .collect();
        let reader = scope.spawn(|| {
            let mut reader = database.connect();
            let torn = "SELECT count(*) FROM t WHERE to_jsonb(t) ? 'sealed' \
                           AND (to_jsonb(t)->>'sealed') IS NOT NULL \
                           AND decrypt_col((to_jsonb(t)->>'sealed')::bytea, \
                               rekey.context('t.email', id::text)) IS DISTINCT FROM email";
            let mut looks = 0;
            while !seen.load(Ordering::Relaxed) {
                assert_eq!(
                    reader.number(torn),
                    0,
                    "what is sealed is what is in the clear"
                );
                looks += 1;
            }
            looks
        });
        admin.run("SET lock_timeout = '2s'");
        wait_until("the lock is had", || admin.attempt(BEGIN).is_ok());
        fill(&mut admin);
        // From the end on the old column has a life of its own.
        seen.store(true, Ordering::Relaxed);
        assert!(reader.join().expect("the reader") > 0);
        wait_until("every row agrees", || {
            fill(&mut admin);
            admin.attempt(FINISH).is_ok()
        });
        stop.store(true, Ordering::Relaxed);
        let mut oracle = HashMap::new();
        for writer in writers {
            oracle.extend(writer.join().expect("a writer"));
        }
        oracle
    });
    assert!(
        oracle.values().flatten().count() > 0,
        "the clients have written"
    );
    let rows = admin.rows("SELECT id, email FROM t WHERE id BETWEEN 100 AND 999999 ORDER BY id");
    let stored: HashMap<i32, Option<String>> = rows
        .into_iter()
        .map(|mut row| {
            let email = row.pop().flatten();
            (
                row[0].as_deref().expect("an id").parse().expect("a number"),
                email,
            )
        })
        .collect();
    assert_eq!(stored, oracle, "no write was lost or refused");
    // What was written after the end is the application's own affair: all else is sealed.
    assert_eq!(
        admin.number("SELECT count(*) FROM t WHERE id > 1000000 AND sealed IS NULL"),
        0
    );
}

/// Inserts, updates and deletes rows of the client's own until it is told to stop; what must be
/// there in the end.
fn write(session: &mut Client, client: i32, stop: &AtomicBool) -> HashMap<i32, Option<String>> {
    let mut rows = HashMap::new();
    let mut turn = 0;
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        let id = 1000 * (client + 1) + turn % 500;
        let value = format!("c{client} t{turn}");
        match turn % 7 {
            0 => {
                session.run(&format!("DELETE FROM t WHERE id = {id}"));
                rows.remove(&id);
            }
            1 => {
                session.run(&format!(
                    "BEGIN; UPDATE t SET email = 'x' WHERE id = {id}; ROLLBACK"
                ));
            }
            2 => {
                session.run(&format!(
                    "INSERT INTO t (id) VALUES ({id}) ON CONFLICT (id) DO UPDATE SET email = NULL"
                ));
                rows.insert(id, None);
            }
            _ => {
                session.run(&format!(
                    "INSERT INTO t (id, email) VALUES ({id}, '{value}') \
                     ON CONFLICT (id) DO UPDATE SET email = excluded.email"
                ));
                rows.insert(id, Some(value));
            }
        }
        // Rows of the bulk too, whose values stay.
        session.run(&format!(
            "UPDATE t SET note = 'n' WHERE id = {}",
            1_000_001 + turn % 5000
        ));
    }
    rows
}

#[test]
fn the_worker_fills_by_itself_and_waits_for_nobody() {
    let cluster = Cluster::start(Options::preloaded());
    let database = cluster.database("alone");
    let mut admin = database.connect();
    admin.run(TABLE);
    let mut other = database.connect();
    admin.run("SELECT rekey.pause('t')");
    admin.run(BEGIN);
    other.run("BEGIN; SELECT FROM t WHERE id = 3 FOR UPDATE");
    admin.run("SELECT rekey.resume('t')");
    wait_until("all rows but the locked one are filled", || {
        admin.number("SELECT count(*) FROM t WHERE sealed IS NULL AND email IS NOT NULL") == 1
    });
    wait_until("the reason is shown", || {
        admin.truth(
            "SELECT coalesce(bool_or(waits_for LIKE '1 rows are still%'), false) \
                     FROM rekey.progress",
        )
    });
    admin
        .refuse(FINISH, "55000")
        .names("Missing in \"sealed\": 1");
    other.run("COMMIT");
    wait_until("the worker is done", || {
        admin.truth("SELECT coalesce(bool_and(phase = 'done'), false) FROM rekey.progress")
    });
    admin.run(FINISH);
    assert_eq!(admin.number(WRONG), 0);
}

#[test]
fn a_killed_server_goes_on_at_the_cursor() {
    let cluster = Cluster::start(Options::unloaded());
    let database = cluster.database("killed");
    let mut admin = database.connect();
    admin.run(TABLE);
    admin.run(
        "INSERT INTO t SELECT i, 'bulk' || i, repeat('x', 500) FROM generate_series(11, 4000) i",
    );
    admin.run(BEGIN);
    let step = |client: &mut Client, first: bool| {
        client.run(&format!("SELECT rekey.reencrypt_step('t', {first})"));
    };
    step(&mut admin, true);
    step(&mut admin, false);
    step(&mut admin, false);
    let state = "SELECT rows_rewritten FROM rekey.progress";
    let filled = admin.number(state);
    assert!(filled > 0 && filled < 3999, "{filled} rows are filled");
    cluster.kill();
    cluster.boot();
    let mut admin = database.connect();
    assert_eq!(admin.number("SELECT count(sealed) FROM t"), filled);
    fill(&mut admin);
    assert_eq!(
        admin.number(state),
        3999,
        "no row was filled twice, none was left"
    );
    admin.run(FINISH);
    assert_eq!(admin.number(WRONG), 0);
}

#[test]
fn a_value_that_looks_like_an_envelope_is_sealed_like_any_other() {
    let (_, mut admin) = database("planted");
    admin.run(
        "CREATE TABLE b (id int PRIMARY KEY, raw bytea, copy bytea);
         INSERT INTO b SELECT i, encrypt_col('planted', 'pii') FROM generate_series(1, 3) i;
         UPDATE b SET copy = raw;
         SELECT rekey.encrypt_column('b', 'raw', 'sealed', 'pii');",
    );
    admin.run("CALL rekey.reencrypt('b')");
    admin.run(
        "INSERT INTO b SELECT 4, e, e FROM (SELECT encrypt_col('planted', 'pii') AS e) x;
         SELECT rekey.finish_encrypt_column('b', 'raw')",
    );
    let opened = "SELECT count(*) FROM b WHERE decrypt_col_as(sealed, NULL::bytea) = copy";
    assert_eq!(admin.number(opened), 4);
}

#[test]
fn columns_of_other_types_are_sealed_as_their_types() {
    let (_, mut admin) = database("typed");
    admin.run(
        "CREATE DOMAIN short AS varchar(10) CHECK (VALUE <> '');
         CREATE TABLE n (id int, salary numeric, born date, \"odd \"\"name\" short);
         INSERT INTO n SELECT i, i * 1.50, '2000-01-01'::date + i, 'v' || i
           FROM generate_series(1, 3) i;
         SET DateStyle = 'German';
         SELECT rekey.encrypt_column('n', 'salary', 'salary_s', 'pii');
         SELECT rekey.encrypt_column('n', 'born', 'born_s', 'pii');
         SELECT rekey.encrypt_column('n', 'odd \"name', 'odd \"sealed', 'pii');",
    );
    admin.run("CALL rekey.reencrypt('n')");
    admin.run(
        "INSERT INTO n VALUES (4, 6, '2000-01-05', 'v4');
         SELECT rekey.finish_encrypt_column('n', 'salary');
         SELECT rekey.finish_encrypt_column('n', 'odd \"name');
         SELECT rekey.finish_encrypt_column('n', 'born')",
    );
    let right = "SELECT count(*) FROM n WHERE decrypt_col_as(salary_s, NULL::numeric) = salary \
                    AND decrypt_col_as(born_s, NULL::date) = born \
                    AND decrypt_col(\"odd \"\"sealed\") = \"odd \"\"name\"";
    assert_eq!(admin.number(right), 4);
    // As encrypt_col seals them: all strings as text.
    assert_eq!(
        admin.column("SELECT DISTINCT (rekey.describe(\"odd \"\"sealed\")).kind FROM n"),
        ["text"]
    );
    admin.run("CREATE TABLE m (id int, price money)");
    admin.refuse(
        "SELECT rekey.encrypt_column('m', 'price', 's', 'pii')",
        "22023",
    );
}

#[test]
fn a_column_of_pgcrypto_moves_by_its_source() {
    let (_, mut admin) = database("pgcrypto");
    let there = "SELECT count(*) FROM pg_available_extensions WHERE name = 'pgcrypto'";
    if admin.number(there) == 0 {
        eprintln!("this server has no pgcrypto: nothing is tried");
        return;
    }
    admin.run(
        "CREATE EXTENSION pgcrypto;
         CREATE TABLE p (id int PRIMARY KEY, c bytea, note text);
         INSERT INTO p SELECT i, pgp_sym_encrypt('v' || i, 'old secret')
           FROM generate_series(1, 5) i;
         INSERT INTO p VALUES (6, 'no such thing');
         SELECT rekey.encrypt_column('p', 'c', 'sealed', 'pii', '',
             $$public.pgp_sym_decrypt(c, 'old secret')$$)",
    );
    // A row whose value cannot be had is an obstacle to nothing but the end.
    admin.run("UPDATE p SET note = 'x'");
    admin.run("CALL rekey.reencrypt('p')");
    let waits = admin.text("SELECT waits_for FROM rekey.progress");
    assert!(
        waits.starts_with("1 rows are still to be filled") && waits.contains("39000"),
        "{waits}"
    );
    let refusal = admin.refuse("SELECT rekey.finish_encrypt_column('p', 'c')", "55000");
    assert!(refusal.message.starts_with("1 of 6 rows"), "{refusal:?}");
    let bad = "INSERT INTO p VALUES (7, 'nor this')";
    admin.refuse(bad, "22023").names("39000");
    admin.run("INSERT INTO p VALUES (7, pgp_sym_encrypt('v7', 'old secret'))");
    admin.run("UPDATE p SET c = pgp_sym_encrypt('v6', 'old secret') WHERE id = 6");
    // Sealed anew by pgcrypto: other bytes, the same value.
    admin.run("UPDATE p SET c = pgp_sym_encrypt('v1', 'old secret') WHERE id = 1");
    admin.run("SELECT rekey.finish_encrypt_column('p', 'c')");
    assert_eq!(
        admin.column("SELECT decrypt_col(sealed) FROM p ORDER BY id"),
        ["v1", "v2", "v3", "v4", "v5", "v6", "v7"]
    );
    let seen = "SELECT count(*) FROM rekey.live_columns l WHERE l::text LIKE '%secret%'";
    assert_eq!(admin.number(seen), 0);
    for sources in [
        "now()::text",
        "(SELECT 'x')",
        "no_such_column",
        "ctid::text",
    ] {
        let sql =
            format!("SELECT rekey.encrypt_column('p', 'note', 's', 'pii', '', $${sources}$$)");
        assert!(admin.attempt(&sql).is_err(), "{sources} is no source");
    }
}

#[test]
fn partitions_are_in_also_those_that_come_later() {
    let (_, mut admin) = database("partitions");
    admin.run(
        "CREATE TABLE p (id int, email text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (1) TO (100);
         CREATE TABLE p2 (email text, dropped int, id int NOT NULL);
         ALTER TABLE p2 DROP COLUMN dropped;
         ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (100) TO (200);
         INSERT INTO p SELECT i, 'v' || i FROM generate_series(1, 150) i",
    );
    let context = "$$rekey.context('p', id::text)$$";
    admin
        .refuse(
            &format!("SELECT rekey.encrypt_column('p1', 'email', 's', 'pii', {context})"),
            "55000",
        )
        .hints("partitioned table");
    admin.run(&format!(
        "SELECT rekey.encrypt_column('p', 'email', 's', 'pii', {context})"
    ));
    admin.run(
        "CREATE TABLE p3 PARTITION OF p FOR VALUES FROM (200) TO (300);
         INSERT INTO p SELECT i, 'v' || i FROM generate_series(250, 260) i;",
    );
    admin.run("CALL rekey.reencrypt('p')");
    admin.run(
        "UPDATE p SET id = 170 WHERE id = 7;
         INSERT INTO p1 VALUES (99 - 200 + 200 + 0, 'v99') ON CONFLICT DO NOTHING;
         SELECT rekey.finish_encrypt_column('p', 'email')",
    );
    let wrong = "SELECT count(*) FROM p WHERE email IS DISTINCT FROM \
                 decrypt_col(s, rekey.context('p', id::text))";
    assert_eq!(admin.number(wrong), 0);
    assert_eq!(admin.number("SELECT count(*) FROM p WHERE s IS NULL"), 0);
    assert_eq!(admin.number(TRIGGERS), 0);
}

#[test]
fn other_triggers_come_first_and_the_backfill_fires_none() {
    let (_, mut admin) = database("triggers");
    admin.run(
        "ALTER TABLE t ADD COLUMN updated_at timestamptz DEFAULT '2000-01-01';
         CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN NEW.updated_at := now(); NEW.email := lower(NEW.email); RETURN NEW; END';
         CREATE TRIGGER updated_at BEFORE INSERT OR UPDATE ON t
             FOR EACH ROW EXECUTE FUNCTION stamp()",
    );
    admin.run(BEGIN);
    fill(&mut admin);
    assert_eq!(
        admin.number("SELECT count(*) FROM t WHERE updated_at > '2000-01-01'"),
        0
    );
    admin.run("INSERT INTO t VALUES (20, 'UPPER'); UPDATE t SET email = 'Mail1' WHERE id = 1");
    assert_eq!(
        admin.number("SELECT count(*) FROM t WHERE updated_at > '2000-01-01'"),
        2
    );
    let opened = "SELECT decrypt_col(sealed, rekey.context('t.email', id::text)) FROM t \
                  WHERE id IN (1, 20) ORDER BY id";
    assert_eq!(admin.column(opened), ["mail1", "upper"]);
    // With re-encryption on touch and a rotation beside it.
    admin.run("SELECT rekey.enable_touch('t'); SELECT rotate_key('pii'); UPDATE t SET note = 'n'");
    assert_eq!(
        admin.number("SELECT count(*) FROM t WHERE rekey.is_stale(sealed)"),
        0
    );
    admin.run("SELECT rotate_key('pii')");
    fill(&mut admin);
    admin.run(FINISH);
    assert_eq!(admin.number(WRONG), 0);
}

#[test]
fn the_owners_privilege_counts_and_whoever_writes_needs_none() {
    let (database, mut admin) = database("privileges");
    let (owner, app) = (database.role("owner"), database.role("app"));
    admin.run(&format!(
        "GRANT SELECT, INSERT, UPDATE ON t TO {app}; ALTER TABLE t OWNER TO {owner};
         GRANT CREATE ON SCHEMA public TO {owner}"
    ));
    database
        .connect_as(&app)
        .refuse(BEGIN, "42501")
        .names("owner of table");
    admin.refuse(BEGIN, "42501").names(&owner);
    let there = "SELECT count(*) FROM pg_attribute WHERE attrelid = 't'::regclass \
                 AND attname = 'sealed'";
    assert_eq!(admin.number(there), 0, "nothing is left of it");
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{owner}', '{{encrypt}}')"
    ));
    let mut owned = database.connect_as(&owner);
    owned.run(BEGIN);
    let mut app = database.connect_as(&app);
    app.run("INSERT INTO t VALUES (20, 'by app'); UPDATE t SET email = 'too' WHERE id = 1");
    app.refuse("SELECT encrypt_col('x', 'pii')", "42501");
    app.refuse("SELECT decrypt_col(sealed) FROM t WHERE id = 20", "42501");
    owned.run("CALL rekey.reencrypt('t')");
    assert_eq!(admin.number(WRONG), 0);
    // To compare is to open.
    owned.refuse(FINISH, "42501").names("decrypt");
    admin.run(&format!(
        "SELECT rekey.revoke_key('pii', '{owner}', '{{encrypt}}')"
    ));
    app.refuse("UPDATE t SET email = 'lost' WHERE id = 1", "42501")
        .names(&owner);
    app.run("UPDATE t SET note = 'of no concern' WHERE id = 1");
    assert_eq!(admin.text("SELECT email FROM t WHERE id = 1"), "too");
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{owner}', '{{encrypt,decrypt}}')"
    ));
    owned.run(FINISH);
}

#[test]
fn what_the_owner_wrote_runs_as_the_owner() {
    let (database, mut admin) = database("code");
    let (owner, app) = (database.role("owner"), database.role("app"));
    admin.run(&format!(
        "CREATE FUNCTION who(v text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
             BEGIN
                 IF current_user <> '{owner}' THEN RAISE 'run as %', current_user; END IF;
                 RETURN v;
             END $$;
         ALTER TABLE t OWNER TO {owner}; GRANT ALL ON t TO {app};
         SELECT rekey.grant_key('pii', '{owner}', '{{encrypt,decrypt}}');
         SELECT rekey.encrypt_column('t', 'email', 'sealed', 'pii',
             $$rekey.context('t.email', public.who(id::text))$$, 'public.who(email)')"
    ));
    database
        .connect_as(&app)
        .run("INSERT INTO t VALUES (20, 'by app')");
    admin.run("INSERT INTO t VALUES (21, 'by a superuser')");
    fill(&mut admin);
    admin.run(FINISH);
    assert_eq!(admin.number(WRONG), 0);
}

#[test]
fn the_end_is_refused_while_a_row_is_missing_or_different() {
    let (_, mut admin) = database("refused");
    admin.run(BEGIN);
    admin
        .refuse(FINISH, "55000")
        .names("9 of 10 rows of public.t do not agree")
        .names("Missing in \"sealed\": 9; different: 0")
        .names("(0,1) of public.t")
        .hints("CALL rekey.reencrypt");
    fill(&mut admin);
    // Written alone, swapped, altered, unbound, garbage.
    admin.run(
        "UPDATE t SET sealed = encrypt_col('other', 'pii', rekey.context('t.email', '1'))
          WHERE id = 1;
         UPDATE t SET sealed = (SELECT sealed FROM t WHERE id = 3) WHERE id = 2;
         UPDATE t SET sealed = encrypt_col('mail4', 'pii') WHERE id = 4;
         UPDATE t SET sealed = encrypt_col('mail5'::bytea, 'pii', rekey.context('t.email', '5'))
          WHERE id = 5;
         UPDATE t SET sealed = 'garbage' WHERE id = 6;
         UPDATE t SET sealed = encrypt_col('x', 'pii') WHERE id = 10",
    );
    admin
        .refuse(FINISH, "55000")
        .names("6 of 10 rows")
        .names("Missing in \"sealed\": 0; different: 3; cannot be read: 3");
    admin.run("UPDATE t SET sealed = NULL WHERE id IN (1, 2, 4, 5, 6, 10)");
    // A trigger that is switched off has let writes pass.
    let name = admin.text("SELECT trigger_name FROM rekey.live_columns");
    admin.run(&format!("ALTER TABLE t DISABLE TRIGGER {name}"));
    admin.run("UPDATE t SET email = 'passed' WHERE id = 1");
    admin.refuse(FINISH, "55000").hints("ENABLE ALWAYS TRIGGER");
    admin.run(&format!("ALTER TABLE t ENABLE ALWAYS TRIGGER {name}"));
    admin.refuse(FINISH, "55000").names("different: 1");
    admin.run("UPDATE t SET sealed = NULL WHERE id = 1");
    admin.run(FINISH);
    assert_eq!(admin.number(WRONG), 0);
    admin.refuse(FINISH, "42704");
    // Begun again over what is there: the way back after the end.
    admin.run(BEGIN);
    fill(&mut admin);
    admin.run(FINISH);
}

#[test]
fn what_cannot_be_sealed_is_refused_at_the_beginning() {
    let (_, mut admin) = database("wrong");
    admin.run(
        "ALTER TABLE t ADD COLUMN big text GENERATED ALWAYS AS (upper(email)) STORED;
         ALTER TABLE t ADD COLUMN words text;
         CREATE VIEW v AS SELECT * FROM t; CREATE TEMP TABLE tt (c text);
         CREATE TABLE r (c bytea); SELECT rekey.register_column('r', 'c')",
    );
    for (arguments, code) in [
        ("'t', 'nothing', 's', 'pii'", "42703"),
        ("'t', 'email', 's', 'none'", "42704"),
        ("'t', 'email', 's'", "42704"),
        ("'t', 'email', 'email', 'pii'", "22023"),
        ("'t', 'email', 'words', 'pii'", "42804"),
        ("'t', 'big', 's', 'pii'", "55000"),
        ("'v', 'email', 's', 'pii'", "42809"),
        ("'tt', 'c', 's', 'pii'", "42809"),
        ("'r', 'c', 's', 'pii'", "55000"),
        ("'t', 'email', 's', 'pii', 'now()::text'", "22023"),
        ("'t', 'email', 's', 'pii', NULL", "22004"),
    ] {
        admin.refuse(&format!("SELECT rekey.encrypt_column({arguments})"), code);
    }
    admin.refuse("SELECT rekey.decrypt_column('t', 'email', 's')", "55000");
    assert_eq!(admin.number(TRIGGERS), 0);
    admin.run(BEGIN);
    admin.refuse(BEGIN, "55000").names("being encrypted");
    admin.refuse("SELECT rekey.unregister_column('t', 'sealed')", "55000");
    admin.refuse("SELECT rekey.finish_decrypt_column('t', 'email')", "42704");
    admin.fail("ALTER TABLE t DROP COLUMN sealed", "2BP01");
    admin.fail("DROP EXTENSION pg_rekey", "2BP01");
    admin.refuse("DELETE FROM rekey.live_column", "55000");
}

#[test]
fn the_way_out_ends_with_the_extension_dropped() {
    let (_, mut admin) = database("out");
    admin.run(BEGIN);
    fill(&mut admin);
    admin.run(FINISH);
    admin.run(
        "ALTER TABLE t DROP COLUMN email;
         UPDATE t SET sealed = encrypt_col('unbound', 'pii') WHERE id = 9;
         SELECT rekey.decrypt_column('t', 'sealed', 'email')",
    );
    admin.run(
        "INSERT INTO t (id, sealed)
             VALUES (20, encrypt_col('new', 'pii', rekey.context('t.email', '20')));
         UPDATE t SET sealed = encrypt_col('changed', 'pii', rekey.context('t.email', '1'))
          WHERE id = 1",
    );
    admin.refuse("SELECT rekey.finish_decrypt_column('t', 'sealed')", "55000");
    admin.refuse("UPDATE t SET sealed = 'garbage' WHERE id = 1", "22P03");
    fill(&mut admin);
    // An envelope without the column's context may be any other column's: it is not opened.
    admin
        .refuse("SELECT rekey.finish_decrypt_column('t', 'sealed')", "55000")
        .names("Missing in \"email\": 1");
    admin.run(
        "UPDATE t SET sealed = encrypt_col('bound', 'pii', rekey.context('t.email', '9'))
          WHERE id = 9; SELECT rotate_key('pii')",
    );
    fill(&mut admin);
    assert_eq!(
        admin.number("SELECT count(*) FROM t WHERE rekey.is_stale(sealed)"),
        0
    );
    admin.run("SELECT rekey.finish_decrypt_column('t', 'sealed')");
    assert_eq!(admin.number("SELECT count(*) FROM rekey.columns"), 0);
    admin.run("ALTER TABLE t DROP COLUMN sealed; SELECT rekey.shred_key('pii', 'we leave')");
    assert_eq!(
        admin.text("SELECT string_agg(coalesce(email, '-'), ' ' ORDER BY id) FROM t"),
        "changed mail2 mail3 mail4 mail5 mail6 mail7 mail8 bound - new"
    );
    admin.run("SELECT rekey.drop_key('pii'); DROP EXTENSION pg_rekey");
    assert_eq!(admin.number("SELECT count(email) FROM t"), 10);
}

#[test]
fn values_come_out_as_the_type_of_the_column_that_waits_for_them() {
    let (_, mut admin) = database("numbers");
    admin.run(
        "CREATE TABLE n (id int, c bytea, salary numeric(10, 2));
         INSERT INTO n SELECT i, encrypt_col(i * 1.5, 'pii') FROM generate_series(1, 3) i;
         SELECT rekey.register_column('n', 'c');
         SELECT rekey.decrypt_column('n', 'c', 'salary');",
    );
    admin.run("CALL rekey.reencrypt('n')");
    admin.run("INSERT INTO n VALUES (4, encrypt_col(6.0, 'pii'))");
    assert_eq!(
        admin.column("SELECT salary FROM n ORDER BY id"),
        ["1.50", "3.00", "4.50", "6.00"]
    );
    admin.refuse(
        "INSERT INTO n VALUES (5, encrypt_col(123456789, 'pii'))",
        "22003",
    );
    admin.run("SELECT rekey.finish_decrypt_column('n', 'c')");
}

#[test]
fn nobody_opens_by_a_live_column_what_he_may_not_open() {
    let (database, mut admin) = database("deputy");
    let app = database.role("app");
    admin.run(&format!(
        "CREATE TABLE c (id int, c bytea, note text);
         INSERT INTO c VALUES (1, encrypt_col('secret', 'pii'));
         GRANT ALL ON c TO {app}; SELECT rekey.grant_key('pii', '{app}', '{{encrypt}}');
         SELECT rekey.register_column('c', 'c'); SELECT rekey.decrypt_column('c', 'c', 'plain')"
    ));
    let mut app = database.connect_as(&app);
    app.refuse("INSERT INTO c SELECT 2, c FROM c", "42501")
        .names("decrypt");
    app.run("UPDATE c SET note = 'of no concern'");
    assert_eq!(admin.number("SELECT count(plain) FROM c"), 0);
}

#[test]
fn renames_are_followed_and_a_dump_carries_the_live_column() {
    let (database, mut admin) = database("renames");
    admin.run(BEGIN);
    admin.run("UPDATE t SET note = 'x' WHERE id < 4");
    admin.run(
        "ALTER TABLE t RENAME COLUMN email TO mail; ALTER TABLE t RENAME COLUMN sealed TO sealed2;
         ALTER TABLE t RENAME TO people; ALTER TABLE people ADD COLUMN more int",
    );
    admin.run("UPDATE people SET mail = 'renamed' WHERE id = 1");
    let shown =
        "SELECT concat_ws(' ', table_name, column_name, into_column) FROM rekey.live_columns";
    assert_eq!(admin.text(shown), "people mail sealed2");
    admin.run("ALTER TABLE people DROP COLUMN more");
    let dump = cluster().dir().join("renames.dump");
    let file = dump.to_str().expect("a path in UTF-8");
    cluster().tool("pg_dump", &["-Fc", "-f", file, &database.name]);
    let restored = cluster().empty_database("renames_restored", "");
    cluster().tool(
        "pg_restore",
        &["-d", &restored.name, "--exit-on-error", file],
    );
    for mut client in [admin, restored.connect()] {
        assert_eq!(client.text(shown), "people mail sealed2");
        client.run("INSERT INTO people VALUES (20, 'after')");
        client.run("CALL rekey.reencrypt('people')");
        client.run("SELECT rekey.finish_encrypt_column('people', 'mail')");
        let wrong = "SELECT count(*) FROM people WHERE mail IS DISTINCT FROM \
                     decrypt_col(sealed2, rekey.context('t.email', id::text))";
        assert_eq!(client.number(wrong), 0);
        assert_eq!(client.number("SELECT count(sealed2) FROM people"), 10);
    }
}

#[test]
fn what_is_dropped_is_forgotten() {
    let (_, mut admin) = database("dropped");
    let left = "SELECT (SELECT count(*) FROM rekey.live_column) \
                     + (SELECT count(*) FROM rekey.backfill_state)";
    // The new column: the way back at the beginning. A second one of the table stays.
    admin.run(BEGIN);
    admin.run("SELECT rekey.encrypt_column('t', 'note', 'note_s', 'pii')");
    fill(&mut admin);
    admin.run(
        "ALTER TABLE t DROP COLUMN sealed CASCADE; SELECT rekey.unregister_column('t', 'sealed')",
    );
    assert_eq!(
        admin.text("SELECT column_name FROM rekey.live_columns"),
        "note"
    );
    admin.run("INSERT INTO t VALUES (20, 'mail', 'note')");
    assert_eq!(
        admin.text("SELECT decrypt_col(note_s) FROM t WHERE id = 20"),
        "note"
    );
    // The old column, the trigger, the table.
    admin.run("ALTER TABLE t DROP COLUMN note CASCADE");
    assert_eq!(admin.number(left), 0);
    admin.run(BEGIN);
    let name = admin.text("SELECT trigger_name FROM rekey.live_columns");
    fill(&mut admin);
    admin.run(&format!("DROP TRIGGER {name} ON t"));
    assert_eq!(admin.number(left), 0);
    admin.run(BEGIN);
    fill(&mut admin);
    admin.run("DROP TABLE t");
    assert_eq!(admin.number(left), 0);
    // A partition that goes takes nothing of the others with it.
    admin.run(
        "CREATE TABLE p (id int, email text) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (1) TO (10);
         CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20);
         SELECT rekey.encrypt_column('p', 'email', 's', 'pii'); DROP TABLE p2;
         INSERT INTO p VALUES (1, 'x'); SELECT rekey.finish_encrypt_column('p', 'email')",
    );
    assert_eq!(admin.text("SELECT decrypt_col(s) FROM p"), "x");
}

#[test]
fn begin_and_end_are_undone_with_their_transaction() {
    let (_, mut admin) = database("undone");
    admin.run(&format!("BEGIN; {BEGIN}; ROLLBACK"));
    assert_eq!(admin.number("SELECT count(*) FROM rekey.columns"), 0);
    assert_eq!(admin.number(TRIGGERS), 0);
    // In one transaction with the rest of a migration, as migration tools run it.
    admin.run(&format!(
        "BEGIN; ALTER TABLE t ADD COLUMN more int; {BEGIN}; COMMIT"
    ));
    fill(&mut admin);
    admin.run(&format!("BEGIN; {FINISH}; ROLLBACK"));
    admin.run("INSERT INTO t VALUES (20, 'still followed')");
    assert_eq!(admin.number(WRONG), 0);
    admin.run(FINISH);
}

/// A function that runs as a superuser and fails halfway.
const RAISES: &str = "CREATE FUNCTION sd(v text) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
    AS $$BEGIN IF v LIKE 'bad%' THEN RAISE 'no'; END IF; RETURN true; END$$";

#[test]
fn a_conversion_that_fails_leaves_nobody_as_another_user() {
    let (database, mut admin) = database("definer");
    let role = database.role("owner");
    admin.run(RAISES);
    admin.run(&format!(
        "GRANT CREATE ON SCHEMA public TO {role};
         SELECT rekey.grant_key('pii', '{role}', '{{encrypt,decrypt}}')"
    ));
    let mut owner = database.connect_as(&role);
    owner.run(&format!(
        "CREATE FUNCTION seen(v text) RETURNS boolean LANGUAGE plpgsql AS $$
             BEGIN IF current_user <> '{role}' THEN RAISE LOG 'ESCAPED'; RETURN false; END IF;
             RETURN true; END $$;
         CREATE DOMAIN d AS text CONSTRAINT a CHECK (seen(VALUE)) CONSTRAINT b CHECK (sd(VALUE));
         CREATE TABLE d1 (id int, sealed bytea, x int, plain d);
         INSERT INTO d1 SELECT i, encrypt_col('bad' || i, 'pii') FROM generate_series(1, 2) i;
         INSERT INTO d1 VALUES (3, encrypt_col('good', 'pii'));
         SELECT rekey.register_column('d1', 'sealed');
         SELECT rekey.decrypt_column('d1', 'sealed', 'plain');
         UPDATE d1 SET x = 1",
    ));
    assert_eq!(owner.text("SELECT current_user::text"), role);
    owner.run("CALL rekey.reencrypt('d1')");
    assert_eq!(owner.text("SELECT current_user::text"), role);
    let filled = "SELECT plain::text FROM d1 WHERE plain IS NOT NULL";
    assert_eq!(owner.column(filled), ["good"]);
    owner
        .refuse(
            "SELECT rekey.finish_decrypt_column('d1', 'sealed')",
            "55000",
        )
        .names("Missing in \"plain\": 2");
    assert_eq!(owner.text("SELECT current_user::text"), role);
    assert!(
        !cluster().log().contains("ESCAPED"),
        "code of an owner ran as somebody else"
    );
}

#[test]
fn a_partition_of_another_owner_is_no_way_to_his_privileges() {
    let (database, mut admin) = database("leaf_owner");
    let role = database.role("owner");
    admin.run(&format!(
        "GRANT CREATE ON SCHEMA public TO {role};
         SELECT rekey.grant_key('pii', '{role}', '{{encrypt}}');
         CREATE TABLE secret AS SELECT 11 AS id, encrypt_col('secret', 'pii') AS s;
         GRANT SELECT ON secret TO {role}"
    ));
    let mut owner = database.connect_as(&role);
    owner.run(
        "CREATE TABLE p (id int, s bytea) PARTITION BY RANGE (id);
         CREATE FUNCTION who(v text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS
             $$BEGIN RAISE LOG 'who is %', current_user; RETURN v; END$$;
         CREATE TABLE q (id int, email text) PARTITION BY RANGE (id);
         CREATE TABLE r (id int, s bytea) PARTITION BY RANGE (id)",
    );
    admin.run(
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (10) TO (20);
         CREATE TABLE r1 PARTITION OF r FOR VALUES FROM (10) TO (20)",
    );
    owner.run("INSERT INTO p SELECT id, s FROM secret; SELECT rekey.register_column('p', 's')");
    owner
        .refuse("SELECT rekey.decrypt_column('p', 's', 'plain')", "55000")
        .names("public.p1")
        .hints(&role);
    owner
        .refuse(
            "SELECT rekey.register_column('r', 's', 'public.who(id::text)')",
            "55000",
        )
        .hints("OWNER TO");
    // One that comes later: nothing of it is filled, opened or run.
    owner.run(
        "SELECT rekey.encrypt_column('q', 'email', 's', 'pii', 'public.who(id::text)');
         DROP TABLE r; CREATE TABLE r (id int, s bytea) PARTITION BY RANGE (id);
         SELECT rekey.register_column('r', 's', 'public.who(id::text)')",
    );
    admin.run(
        "CREATE TABLE q1 PARTITION OF q FOR VALUES FROM (10) TO (20);
         CREATE TABLE r1 PARTITION OF r FOR VALUES FROM (10) TO (20)",
    );
    owner
        .refuse("INSERT INTO q VALUES (11, 'x')", "55000")
        .names("public.q1");
    admin.run(
        "ALTER TABLE q DISABLE TRIGGER USER; INSERT INTO q VALUES (11, 'x');
         INSERT INTO r VALUES (11, encrypt_col('x', 'pii', '11'));
         SELECT rekey.enable_touch('r'); SELECT rotate_key('pii');
         UPDATE r SET id = 12",
    );
    admin.run("CALL rekey.reencrypt('q')");
    admin.run("CALL rekey.reencrypt('r')");
    assert_eq!(admin.number("SELECT count(s) FROM q"), 0);
    let trigger = admin.text("SELECT trigger_name FROM rekey.live_columns");
    admin.run(&format!("ALTER TABLE q ENABLE ALWAYS TRIGGER {trigger}"));
    admin
        .refuse("SELECT rekey.finish_encrypt_column('q', 'email')", "55000")
        .names("public.q1");
    assert!(!cluster().log().contains("who is postgres"));
    // With one owner all goes on.
    admin.run(&format!(
        "ALTER TABLE q1 OWNER TO {role}; SELECT rekey.grant_key('pii', '{role}', '{{decrypt}}')"
    ));
    owner.run("CALL rekey.reencrypt('q')");
    owner.run("SELECT rekey.finish_encrypt_column('q', 'email')");
}

#[test]
fn a_sealed_type_name_runs_no_code_of_whoever_sealed() {
    let (database, mut admin) = database("evil_types");
    let role = database.role("sealer");
    admin.run(&format!(
        "GRANT CREATE ON SCHEMA public TO {role};
         SELECT rekey.grant_key('pii', '{role}', '{{encrypt}}');
         CREATE TABLE n (id int, c bytea); GRANT INSERT ON n TO {role};
         SELECT rekey.register_column('n', 'c')"
    ));
    database.connect_as(&role).run(
        "CREATE FUNCTION spy() RETURNS void LANGUAGE plpgsql AS
             $$BEGIN RAISE LOG 'spy as %', current_user; END$$;
         CREATE TYPE evil AS (x int);
         CREATE FUNCTION f(evil) RETURNS numeric LANGUAGE plpgsql AS
             'BEGIN PERFORM public.spy(); RETURN 1; END';
         CREATE CAST (evil AS numeric) WITH FUNCTION f(evil) AS ASSIGNMENT;
         CREATE TYPE later AS ENUM ('1');
         INSERT INTO n VALUES (1, encrypt_col(ROW(1)::evil, 'pii')),
                              (2, encrypt_col('1'::later, 'pii'));
         DROP TYPE later;
         CREATE FUNCTION g(numeric) RETURNS boolean LANGUAGE plpgsql AS
             'BEGIN PERFORM public.spy(); RETURN true; END';
         CREATE DOMAIN later AS numeric CHECK (g(VALUE))",
    );
    for id in [1, 2] {
        admin.refuse(
            &format!("SELECT decrypt_col_as(c, NULL::numeric) FROM n WHERE id = {id}"),
            "42501",
        );
    }
    admin.run("SELECT rekey.decrypt_column('n', 'c', 'plain')");
    admin.run("CALL rekey.reencrypt('n')");
    assert_eq!(
        admin.number("SELECT count(plain) FROM n"),
        2,
        "text needs no code"
    );
    assert!(!cluster().log().contains("spy as postgres"));
    // What the reader names himself he reads, and casts of his own serve him.
    admin.run(
        "CREATE TYPE mine AS (x int); INSERT INTO n VALUES (3, encrypt_col(ROW(7)::mine, 'pii'))",
    );
    let opened = "SELECT (decrypt_col_as(c, NULL::mine)).x FROM n WHERE id = 3";
    assert_eq!(admin.number(opened), 7);
    admin.run(
        "CREATE FUNCTION h(mine) RETURNS numeric LANGUAGE sql AS 'SELECT ($1).x::numeric';
         CREATE CAST (mine AS numeric) WITH FUNCTION h(mine) AS ASSIGNMENT",
    );
    let cast = "SELECT decrypt_col_as(c, NULL::numeric)::int FROM n WHERE id = 3";
    assert_eq!(admin.number(cast), 7);
}

#[test]
fn tables_tied_by_inheritance_are_refused() {
    let (_, mut admin) = database("inherits");
    admin.run("CREATE TABLE c () INHERITS (t); INSERT INTO c VALUES (30, 'of the child')");
    admin.refuse(BEGIN, "55000").names("inheritance");
    admin
        .refuse(
            "SELECT rekey.encrypt_column('c', 'email', 's', 'pii')",
            "55000",
        )
        .names("inheritance");
    admin.run("ALTER TABLE c NO INHERIT t");
    admin.run(BEGIN);
    fill(&mut admin);
    admin.run("ALTER TABLE c ADD COLUMN sealed bytea; ALTER TABLE c INHERIT t");
    admin.refuse(FINISH, "55000").names("inheritance");
    admin.run("ALTER TABLE c NO INHERIT t");
    admin.run(FINISH);
}

#[test]
fn the_end_knows_every_partition_or_is_refused() {
    let (database, mut admin) = database("late_partitions");
    admin.run(
        "CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER s FOREIGN DATA WRAPPER nothing;
         CREATE TABLE p (id int, email text) PARTITION BY RANGE (id);
         CREATE TABLE mid PARTITION OF p FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF mid FOR VALUES FROM (0) TO (10);
         INSERT INTO p VALUES (1, 'x');
         SELECT rekey.encrypt_column('p', 'email', 's', 'pii')",
    );
    admin.run("CALL rekey.reencrypt('p')");
    admin.run("CREATE FOREIGN TABLE far PARTITION OF p FOR VALUES FROM (100) TO (200) SERVER s");
    let finish = "SELECT rekey.finish_encrypt_column('p', 'email')";
    admin.refuse(finish, "55000").names("public.far");
    admin.run(
        "ALTER TABLE p DETACH PARTITION far;
         CREATE TABLE late (id int, email text, s bytea); INSERT INTO late VALUES (11, 'late')",
    );
    // Nobody attaches one at any level while the end looks.
    admin.run(&format!("BEGIN; {finish}"));
    let mut other = database.connect();
    other.run("SET lock_timeout = '100ms'");
    let attach = "ALTER TABLE mid ATTACH PARTITION late FOR VALUES FROM (10) TO (20)";
    other.fail(attach, "55P03");
    admin.run("ROLLBACK");
    other.run(attach);
    admin.refuse(finish, "55000").names("Missing in \"s\": 1");
}

#[test]
fn a_value_that_its_column_rounds_does_not_agree() {
    let (_, mut admin) = database("rounded");
    admin.run(
        "CREATE TABLE n (id int, c bytea, price numeric(5, 2), code char(4));
         INSERT INTO n VALUES (1, encrypt_col(12.3456, 'pii')), (2, encrypt_col(1.5, 'pii'));
         SELECT rekey.register_column('n', 'c');
         SELECT rekey.decrypt_column('n', 'c', 'price')",
    );
    admin.run("CALL rekey.reencrypt('n')");
    let finish = "SELECT rekey.finish_decrypt_column('n', 'c')";
    admin.refuse(finish, "55000").names("different: 1");
    admin.run("UPDATE n SET c = encrypt_col(12.34, 'pii') WHERE id = 1");
    admin.run(finish);
    // A column that pads loses nothing.
    admin.run(
        "UPDATE n SET c = encrypt_col('ab', 'pii'); SELECT rekey.register_column('n', 'c');
         SELECT rekey.decrypt_column('n', 'c', 'code')",
    );
    admin.run("CALL rekey.reencrypt('n')");
    admin.run(finish);
}

#[test]
fn what_passed_a_disabled_trigger_is_filled_on_demand() {
    let (_, mut admin) = database("holes");
    admin.run(BEGIN);
    fill(&mut admin);
    let name = admin.text("SELECT trigger_name FROM rekey.live_columns");
    admin.run(&format!("ALTER TABLE t DISABLE TRIGGER {name}"));
    admin.run("INSERT INTO t VALUES (20, 'passed')");
    admin.run(&format!("ALTER TABLE t ENABLE ALWAYS TRIGGER {name}"));
    admin
        .refuse(FINISH, "55000")
        .names("Missing in \"sealed\": 1");
    fill(&mut admin);
    assert_eq!(
        admin.text("SELECT phase || ' ' || rows_rewritten FROM rekey.progress"),
        "done 10",
        "the rows count on"
    );
    admin.run(FINISH);
    assert_eq!(admin.number(WRONG), 0);
}

#[test]
fn a_composite_value_with_a_null_in_it_is_a_value() {
    let (_, mut admin) = database("composite");
    admin.run(
        "CREATE TYPE pair AS (a int, b int); CREATE TABLE c (id int, v pair);
         SELECT rekey.encrypt_column('c', 'v', 's', 'pii');
         INSERT INTO c VALUES (1, ROW(1, NULL)), (2, ROW(NULL, NULL)), (3, NULL)",
    );
    let sealed = "SELECT string_agg(id::text, ' ' ORDER BY id) FROM c WHERE s IS NOT NULL";
    assert_eq!(admin.text(sealed), "1 2");
    admin.run("SELECT rekey.finish_encrypt_column('c', 'v')");
}

#[test]
fn a_trigger_that_was_renamed_and_dropped_takes_its_live_column_along() {
    let (_, mut admin) = database("renamed_trigger");
    admin.run(BEGIN);
    let name = admin.text("SELECT trigger_name FROM rekey.live_columns");
    admin.run(&format!("ALTER TRIGGER {name} ON t RENAME TO other"));
    admin
        .refuse("INSERT INTO t VALUES (20, 'x')", "55000")
        .hints("Drop the trigger");
    admin.refuse(FINISH, "55000");
    admin.run("DROP TRIGGER other ON t");
    admin.refuse(FINISH, "42704");
    admin.run(BEGIN);
    fill(&mut admin);
    admin.run(FINISH);
    assert_eq!(admin.number(WRONG), 0);
}

#[test]
fn a_context_means_the_same_whatever_the_session_says_of_backslashes() {
    let (_, mut admin) = database("backslash");
    let context = r"rekey.context('t\', id::text)";
    admin.run("SET standard_conforming_strings = off; SET escape_string_warning = off");
    admin.run(&format!(
        "SELECT rekey.encrypt_column('t', 'email', 'sealed', 'pii', $${context}$$);
         INSERT INTO t VALUES (20, 'x')"
    ));
    fill(&mut admin);
    admin.run(FINISH);
    admin.run("SET standard_conforming_strings = on");
    assert_eq!(
        admin.number(&format!(
            "SELECT count(*) FROM t WHERE decrypt_col(sealed, {context}) = email"
        )),
        10
    );
}

#[test]
fn every_column_of_a_wide_table_is_seen_by_the_worker_and_the_proof() {
    let (_, mut admin) = database("many");
    admin.run(
        "CREATE TABLE w (id int); INSERT INTO w VALUES (1);
         SELECT rekey.create_key('wide', grace => '0');
         DO $$ BEGIN FOR i IN 1..70 LOOP
             EXECUTE format('ALTER TABLE w ADD COLUMN c%s text', i);
             EXECUTE format('ALTER TABLE w ADD COLUMN s%s bytea', i);
             PERFORM rekey.register_column('w', 's' || i);
         END LOOP;
         FOR i IN 1..33 LOOP
             PERFORM rekey.encrypt_column('w', 'c' || i, 's' || i, 'pii');
         END LOOP; END $$;
         UPDATE w SET s70 = encrypt_col('v', 'wide'); SELECT rotate_key('wide')",
    );
    admin.run("CALL rekey.reencrypt('w')");
    assert_eq!(
        admin.number("SELECT count(*) FROM w WHERE rekey.is_stale(s70)"),
        0
    );
    let name = admin.text("SELECT trigger_name FROM rekey.live_columns WHERE column_name = 'c33'");
    admin.run(&format!(
        "ALTER TABLE w DISABLE TRIGGER {name}; UPDATE w SET c33 = 'v';
         ALTER TABLE w ENABLE ALWAYS TRIGGER {name}"
    ));
    admin.run("CALL rekey.reencrypt('w')");
    assert_eq!(admin.text("SELECT decrypt_col(s33) FROM w"), "v");
}
