//! The extension does not go while a slot can still open something, by whatever road it is dropped.
//!
//! Each road is tried in a fresh session, with and without preload, as origin and as replica; in all
//! of them the guard must load itself. The ways out, and the drops that must pass, are tried too.

use std::sync::OnceLock;

use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

fn preloaded() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded()))
}

fn unloaded() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::unloaded()))
}

/// A database whose extension belongs to a role that can be dropped, unlike the first superuser.
fn database<'a>(cluster: &'a Cluster, name: &str) -> Database<'a> {
    let database = cluster.empty_database(name, "");
    let boss = database.role("boss");
    database.connect().run(&format!(
        "ALTER ROLE {boss} SUPERUSER;
         ALTER SCHEMA public OWNER TO {boss}"
    ));
    let mut client = database.connect_as(&boss);
    client.run(
        "CREATE EXTENSION pg_rekey; SELECT rekey.init_root_key(); SELECT rekey.create_key('pii');
         CREATE SCHEMA app; CREATE TABLE app.t AS SELECT encrypt_col('one', 'pii') AS c",
    );
    database
}

fn roads(database: &Database) -> Vec<String> {
    vec![
        "DROP EXTENSION pg_rekey".to_owned(),
        "DROP EXTENSION pg_rekey CASCADE".to_owned(),
        "DROP EXTENSION IF EXISTS pg_rekey".to_owned(),
        "DROP SCHEMA public CASCADE".to_owned(),
        format!("DROP OWNED BY {}_boss", database.name),
        format!("DROP OWNED BY {}_boss CASCADE", database.name),
        "DO $$ BEGIN EXECUTE 'DROP EXTENSION pg_rekey CASCADE'; END $$".to_owned(),
    ]
}

fn guards(cluster: &Cluster, name: &str) {
    let database = database(cluster, name);
    for replica in [false, true] {
        for road in roads(&database) {
            let mut client = database.connect();
            if replica {
                client.run("SET session_replication_role = replica");
            }
            let refusal = client.fail(&road, "55000");
            assert!(
                refusal.detail.contains(|c: char| c.is_ascii_digit()),
                "{road}: {refusal:?}"
            );
            assert!(
                refusal.hint.contains("rekey.allow_drop"),
                "{road}: {refusal:?}"
            );
            assert_eq!(
                client.text("SELECT decrypt_col(c) FROM app.t"),
                "one",
                "after {road}"
            );
        }
    }
    // PostgreSQL itself refuses to drop a schema that belongs to an extension.
    database
        .connect()
        .fail("DROP SCHEMA rekey CASCADE", "2BP01");
    // Warm sessions, savepoints and slots in other states are guarded as well.
    let mut client = database.connect();
    let old = client.number("SELECT active_slot FROM rekey.keys");
    client.run("SELECT rotate_key('pii')");
    client.run(&format!("SELECT rekey.disable_slot({old}, force => true)"));
    // A worker that reads the catalog and a DROP that locks all of it may stand in a deadlock.
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_rekey worker'";
    wait_until("the worker that the rotation has woken is gone", || {
        client.number(workers) == 0
    });
    client.run("BEGIN; SAVEPOINT s");
    client.refuse("DROP EXTENSION pg_rekey CASCADE", "55000");
    client.run("ROLLBACK TO s; COMMIT");
    client.run(&format!("SELECT rekey.enable_slot({old})"));
    assert_eq!(client.text("SELECT decrypt_col(c) FROM app.t"), "one");
}

#[test]
fn with_preload_no_road_drops_keys_in_use() {
    guards(preloaded(), "guarded");
}

#[test]
fn without_preload_no_road_drops_keys_in_use() {
    guards(unloaded(), "guarded");
}

#[test]
fn allow_drop_opens_every_road_to_a_superuser() {
    for cluster in [preloaded(), unloaded()] {
        for (i, road) in [
            "DROP EXTENSION pg_rekey",
            "DROP SCHEMA public CASCADE",
            "DROP OWNED BY",
        ]
        .iter()
        .enumerate()
        {
            let name = format!("allowed{i}");
            let database = database(cluster, &name);
            let road = if road.ends_with("BY") {
                format!("{road} {name}_boss CASCADE")
            } else {
                (*road).into()
            };
            let mut client = database.connect();
            client.run(&format!("SET rekey.allow_drop = on; {road}"));
            let left = "SELECT count(*) FROM pg_extension WHERE extname = 'pg_rekey'";
            assert_eq!(client.number(left), 0, "{road}");
            client.run(
                "CREATE SCHEMA IF NOT EXISTS public; SET rekey.allow_drop = off;
                 CREATE EXTENSION pg_rekey SCHEMA public; SELECT rekey.init_root_key();
                 SELECT rekey.create_key('pii')",
            );
            assert_eq!(
                client.text("SELECT decrypt_col(encrypt_col('x', 'pii'))"),
                "x"
            );
            client.refuse("DROP EXTENSION pg_rekey", "55000");
        }
    }
}

#[test]
fn an_ordinary_user_cannot_allow_it() {
    for cluster in [preloaded(), unloaded()] {
        let database = database(cluster, "ordinary");
        let role = database.role("user");
        let mut client = database.connect_as(&role);
        let _ = client.attempt("SET rekey.allow_drop = on");
        client.run("SELECT rekey.ready()");
        client.fail("SET rekey.allow_drop = on", "42501");
        assert_eq!(client.text("SHOW rekey.allow_drop"), "off");
        client
            .attempt("DROP EXTENSION pg_rekey CASCADE")
            .expect_err("not his");
        assert_eq!(
            database.connect().text("SELECT decrypt_col(c) FROM app.t"),
            "one"
        );
    }
}

#[test]
fn when_every_slot_is_destroyed_it_goes() {
    for cluster in [preloaded(), unloaded()] {
        let database = database(cluster, "done");
        let mut client = database.connect();
        client.run("SELECT rotate_key('pii'); SELECT rekey.shred_key('pii', 'closing down')");
        drop(client);
        let mut client = database.connect();
        client.run("DROP EXTENSION pg_rekey");
        assert_eq!(
            client.number("SELECT count(*) FROM pg_namespace WHERE nspname = 'rekey'"),
            0
        );
        let triggers = client.number("SELECT count(*) FROM pg_event_trigger");
        assert_eq!(triggers, 0, "nothing is left behind");
        client.run("CREATE EXTENSION pg_rekey");
    }
}

#[test]
fn an_unused_extension_goes_at_once() {
    let database = unloaded().empty_database("unused", "");
    let mut client = database.connect();
    client.run("CREATE EXTENSION pg_rekey; DROP EXTENSION pg_rekey; CREATE EXTENSION pg_rekey");
    client.run("DROP SCHEMA public CASCADE");
}

#[test]
fn other_drops_pass() {
    for cluster in [preloaded(), unloaded()] {
        let database = database(cluster, "others");
        let role = database.role("worker");
        let mut client = database.connect();
        // Any other extension serves, and not every server has the same ones.
        let other = client.text(
            "SELECT quote_ident(name) FROM pg_available_extensions
             WHERE name NOT IN ('pg_rekey', 'plpgsql') ORDER BY name <> 'citext', name LIMIT 1",
        );
        client.run(&format!(
            "CREATE EXTENSION {other}; CREATE SCHEMA mine AUTHORIZATION {role};
             CREATE TABLE mine.t (); ALTER TABLE mine.t OWNER TO {role}; CREATE TABLE public.x ()"
        ));
        for sql in [
            format!("DROP EXTENSION {other}"),
            "DROP TABLE public.x".to_owned(),
            "DROP SCHEMA mine CASCADE".to_owned(),
            format!("DROP OWNED BY {role} CASCADE"),
            format!("DROP ROLE {role}"),
            "DROP SCHEMA app CASCADE".to_owned(),
        ] {
            client.run(&sql);
        }
        assert_eq!(
            client.text("SELECT decrypt_col(encrypt_col('x', 'pii'))"),
            "x"
        );
        drop(client);
        cluster.connect("postgres").run("DROP DATABASE others");
    }
}

#[test]
fn members_of_the_extension_cannot_be_dropped_one_by_one() {
    let database = database(preloaded(), "members");
    let mut client = database.connect();
    for sql in [
        "DROP TABLE rekey.key",
        "DROP TABLE rekey.slot_wrap CASCADE",
        "DROP EVENT TRIGGER pg_rekey_guard_drop",
        "DROP FUNCTION decrypt_col(bytea, text)",
        "DROP VIEW rekey.keys",
    ] {
        client.fail(sql, "2BP01");
    }
}

#[test]
fn the_verbs_live_in_the_schema_that_one_chooses() {
    let cluster = unloaded();
    let mut client = cluster.empty_database("placed", "").connect();
    client
        .attempt("CREATE EXTENSION pg_rekey SCHEMA rekey")
        .expect_err("the schema is ours");
    client.run("CREATE SCHEMA rekey");
    client
        .attempt("CREATE EXTENSION pg_rekey SCHEMA rekey")
        .expect_err("the schema is ours");
    client
        .attempt("CREATE EXTENSION pg_rekey")
        .expect_err("a foreign schema is not adopted");
    client.run("DROP SCHEMA rekey; CREATE SCHEMA crypto; CREATE EXTENSION pg_rekey SCHEMA crypto");
    client.run("SELECT rekey.init_root_key(); SELECT rekey.create_key('pii')");
    assert_eq!(
        client.text("SELECT crypto.decrypt_col(crypto.encrypt_col('x', 'pii'))"),
        "x"
    );
    client.fail("SELECT encrypt_col('x', 'pii')", "42883");
    client.fail("ALTER EXTENSION pg_rekey SET SCHEMA public", "0A000");
    client.refuse("DROP SCHEMA crypto CASCADE", "55000");
}

#[test]
fn a_warm_session_follows_an_extension_that_is_dropped_and_made_again() {
    for cluster in [preloaded(), unloaded()] {
        let database = database(cluster, "again");
        let mut warm = database.connect();
        assert_eq!(warm.text("SELECT decrypt_col(c) FROM app.t"), "one");
        warm.run("SELECT encrypt_col('x', 'pii')");
        database.connect().run(
            "SET rekey.allow_drop = on; DROP EXTENSION pg_rekey; CREATE EXTENSION pg_rekey;
             SELECT rekey.init_root_key()",
        );
        warm.refuse("SELECT decrypt_col(c) FROM app.t", "42704");
        warm.refuse("SELECT encrypt_col('x', 'pii')", "42704");
        warm.run("SELECT rekey.create_key('pii'); BEGIN");
        assert_eq!(
            warm.text("SELECT decrypt_col(encrypt_col('x', 'pii'))"),
            "x"
        );
        let held = "SELECT count(*) FROM pg_locks WHERE relation = 'rekey.barrier'::regclass \
            AND pid = pg_backend_pid()";
        assert_eq!(warm.number(held), 1, "the lock is on the new table");
        warm.run("COMMIT");
    }
}

#[test]
fn a_session_that_has_re_encrypted_does_so_again_under_an_extension_that_was_made_anew() {
    let database = unloaded().empty_database("d_anew", "");
    let mut client = database.connect();
    client.run("CREATE EXTENSION pg_rekey; SET rekey.allow_drop = on");
    for life in ["one", "another"] {
        client.run(
            "SELECT rekey.init_root_key(), rekey.create_key('pii', grace => '0');
             CREATE TABLE t AS SELECT encrypt_col(i::text, 'pii') AS c FROM generate_series(1, 50) AS i;
             SELECT rekey.register_column('t', 'c');
             SELECT rotate_key('pii')",
        );
        client.run("CALL rekey.reencrypt()");
        assert_eq!(
            client.text("SELECT string_agg(state, ' ' ORDER BY version) FROM rekey.slots"),
            "drained active",
            "in {life} life"
        );
        client.run("DROP TABLE t; DROP EXTENSION pg_rekey CASCADE; CREATE EXTENSION pg_rekey");
    }
}
