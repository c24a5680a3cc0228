//! Attacks and mishaps that once worked, each by name, so that none works again.
//!
//! They were found by trying to break the extension over a real server: planted operators and
//! tables, privileges that outlived their source, plans and indexes that changed underneath.

use std::sync::OnceLock;
use std::thread;

use rekey_tests::{Ask, Cluster, Options, wait_until};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded()))
}

#[test]
fn a_foreign_table_named_like_ours_is_dropped_like_any_other() {
    let database = cluster().empty_database("lookalike", "");
    let mut client = database.connect();
    client.run(
        "CREATE SCHEMA rekey; CREATE TABLE rekey.key_slot (a int8, b int8, c int8, d int8);
         INSERT INTO rekey.key_slot VALUES (4, 5, 6, 12345678); DROP TABLE rekey.key_slot",
    );
    assert!(client.truth("SELECT to_regclass('rekey.key_slot') IS NULL"));
}

#[test]
fn an_operator_planted_before_the_extension_gets_into_no_view() {
    let database = cluster().empty_database("planted", "");
    let mut client = database.connect();
    client.run(
        "CREATE FUNCTION public.evil(regrole, int) RETURNS bool LANGUAGE plpgsql
             AS $$BEGIN RAISE EXCEPTION 'the planted operator ran'; END$$;
         CREATE FUNCTION public.evil(oid, regrole) RETURNS bool LANGUAGE plpgsql
             AS $$BEGIN RAISE EXCEPTION 'the planted operator ran'; END$$;
         CREATE OPERATOR public.= (leftarg = regrole, rightarg = int, function = public.evil);
         CREATE OPERATOR public.= (leftarg = oid, rightarg = regrole, function = public.evil)",
    );
    database.install();
    client.run("SELECT rekey.create_key('pii')");
    assert_eq!(client.text("SELECT grantee FROM rekey.grants"), "postgres");
    assert!(client.truth(
        "SELECT count(*) = 0 FROM pg_class WHERE relnamespace = 'rekey'::regnamespace \
         AND relkind = 'v' AND pg_get_viewdef(oid) LIKE '%OPERATOR(public%'"
    ));
}

#[test]
fn a_privilege_of_the_database_owner_goes_with_the_ownership() {
    let database = cluster().database("owned");
    let mut client = database.connect();
    let (alice, bob) = (database.role("alice"), database.role("bob"));
    client.run(&format!(
        "ALTER DATABASE owned OWNER TO {alice}; SELECT rekey.create_key('pii');
         SELECT rekey.grant_key('pii', 'pg_database_owner', '{{decrypt}}');
         CREATE TABLE t AS SELECT encrypt_col('x', 'pii') AS c; GRANT SELECT ON t TO PUBLIC"
    ));
    let mut session = database.connect_as(&alice);
    assert_eq!(session.text("SELECT decrypt_col(c) FROM t"), "x");
    client.run(&format!("ALTER DATABASE owned OWNER TO {bob}"));
    session.refuse("SELECT decrypt_col(c) FROM t", "42501");
}

#[test]
fn a_read_survives_reindex_concurrently_of_the_catalog() {
    let database = cluster().database("reindexed");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('one'), rekey.create_key('two');
         CREATE TABLE t AS SELECT k, encrypt_col(k, k) AS c FROM unnest('{one,two}'::text[]) k",
    );
    let mut reader = database.connect();
    reader.run("BEGIN");
    assert_eq!(
        reader.text("SELECT decrypt_col(c) FROM t WHERE k = 'one'"),
        "one"
    );
    for table in ["key", "key_slot", "slot_wrap", "key_grant"] {
        // The reader's transaction holds no lock between its statements: this gives the indexes
        // other OIDs in the middle of it.
        client.run(&format!("REINDEX TABLE CONCURRENTLY rekey.{table}"));
    }
    assert_eq!(
        reader.text("SELECT decrypt_col(c) FROM t WHERE k = 'two'"),
        "two"
    );
    reader.run("COMMIT");
}

#[test]
fn drop_key_under_an_old_snapshot_leaves_no_grant_behind() {
    let database = cluster().database("snapshots");
    let mut client = database.connect();
    let eve = database.role("eve");
    client.run("SELECT rekey.create_key('pii'); SELECT rekey.shred_key('pii', 'ended')");
    let mut old = database.connect();
    old.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class");
    client.run(&format!(
        "SELECT rekey.grant_key('pii', '{eve}', '{{decrypt}}')"
    ));
    old.fail("SELECT rekey.drop_key('pii')", "40001");
    old.run("ROLLBACK; SELECT rekey.drop_key('pii'); SELECT rekey.create_key('pii')");
    assert!(!client.truth(&format!(
        "SELECT rekey.has_key_privilege('{eve}', 'pii', 'decrypt')"
    )));
}

#[test]
fn a_grant_that_waited_for_drop_key_finds_no_key() {
    let database = cluster().database("waited");
    let mut client = database.connect();
    let eve = database.role("eve");
    client.run("SELECT rekey.create_key('pii'); SELECT rekey.shred_key('pii', 'ended')");
    client.run("BEGIN; SELECT rekey.drop_key('pii')");
    let mut granter = database.connect();
    let pid = granter.number("SELECT pg_backend_pid()");
    let grant = format!("SELECT rekey.grant_key('pii', '{eve}', '{{decrypt}}')");
    let waiting = thread::spawn(move || granter.refuse(&grant, "42704"));
    let mut watcher = database.connect();
    wait_until("the grant waits for the key", || {
        watcher.truth(&format!(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = {pid} AND NOT granted)"
        ))
    });
    client.run("COMMIT");
    waiting.join().expect("refused");
    client.run("SELECT rekey.create_key('pii')");
    assert!(!client.truth(&format!(
        "SELECT rekey.has_key_privilege('{eve}', 'pii', 'decrypt')"
    )));
}

#[test]
fn a_users_error_after_a_notice_keeps_its_own_sqlstate() {
    let database = cluster().database("noticed");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('pii');
         CREATE FUNCTION picky(int) RETURNS bool STRICT LANGUAGE plpgsql AS $$BEGIN
             BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'ZZ009';
             EXCEPTION WHEN OTHERS THEN RAISE NOTICE 'x'; RAISE; END; END$$;
         CREATE DOMAIN choosy AS int CHECK (picky(VALUE));
         CREATE FUNCTION quoting(int) RETURNS bool STRICT LANGUAGE plpgsql AS
             $$BEGIN RAISE EXCEPTION 'no %', $1 USING ERRCODE = '57014'; END$$;
         CREATE DOMAIN telling AS int CHECK (quoting(VALUE))",
    );
    client.refuse(
        "SELECT decrypt_col_as(encrypt_col(1, 'pii'), NULL::choosy)",
        "ZZ009",
    );
    let told = client.refuse(
        "SELECT decrypt_col_as(encrypt_col(424242, 'pii'), NULL::telling)",
        "57014",
    );
    assert!(!told.text().contains("424242"), "the value in {told:?}");
}

#[test]
fn a_cast_function_runs_for_those_who_may_run_it() {
    let database = cluster().database("casts");
    let mut client = database.connect();
    let eve = database.role("eve");
    client.run(&format!(
        "SELECT rekey.create_key('pii');
         SELECT rekey.grant_key('pii', '{eve}', '{{encrypt,decrypt}}');
         CREATE TYPE boxed AS (n int);
         CREATE FUNCTION to_boxed(int) RETURNS boxed LANGUAGE sql AS 'SELECT ROW($1)::boxed';
         CREATE CAST (int AS boxed) WITH FUNCTION to_boxed(int) AS ASSIGNMENT"
    ));
    let open = "SELECT decrypt_col_as(encrypt_col(5, 'pii'), NULL::boxed)";
    let mut session = database.connect_as(&eve);
    assert_eq!(session.text(open), "(5)");
    client.run("REVOKE EXECUTE ON FUNCTION to_boxed(int) FROM PUBLIC");
    database.connect_as(&eve).refuse(open, "42501");
}

#[test]
fn a_role_that_may_not_seal_cannot_hold_the_barrier() {
    let database = cluster().database("unentitled");
    let mut client = database.connect();
    let eve = database.role("eve");
    client.run("SELECT rekey.create_key('pii')");
    let mut session = database.connect_as(&eve);
    session.run("BEGIN; SAVEPOINT s");
    session.refuse("SELECT encrypt_col('x', 'pii')", "42501");
    session.run("ROLLBACK TO s");
    assert_eq!(
        client.number("SELECT count(*) FROM pg_locks WHERE relation = 'rekey.barrier'::regclass"),
        0
    );
    session.run("ROLLBACK");
}
