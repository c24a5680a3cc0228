//! Registered columns: what is accepted, what is refused and why, what follows a change of the table.

use std::sync::OnceLock;

use rekey_tests::{Ask, Cluster, Database, Options};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded().set("rekey.worker = off")))
}

fn database<'a>(name: &str) -> Database<'a> {
    let database = cluster().database(name);
    database.connect().run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int PRIMARY KEY, c bytea, other text, at timestamptz)",
    );
    database
}

#[test]
fn a_registered_column_is_shown_and_goes_again() {
    let database = database("shown");
    let mut client = database.connect();
    client.run("SELECT rekey.register_column('t', 'c', 'rekey.context(''t.c'', id::text)')");
    let row = "SELECT table_name || ' ' || column_name || ' ' || context || ' ' || missing \
                 FROM rekey.columns";
    assert_eq!(client.text(row), "t c rekey.context('t.c', id::text) false");
    client
        .refuse("SELECT rekey.register_column('t', 'c')", "42710")
        .hints("unregister_column");
    client.run("SELECT rekey.unregister_column('t', 'c')");
    assert_eq!(client.number("SELECT count(*) FROM rekey.columns"), 0);
    client.refuse("SELECT rekey.unregister_column('t', 'c')", "42704");
    assert_eq!(
        client.column("SELECT action FROM rekey.audit WHERE detail = 'public.t.c' ORDER BY at"),
        ["register_column", "unregister_column"]
    );
}

#[test]
fn what_is_no_table_is_refused_with_its_kind() {
    let database = database("kinds");
    let mut client = database.connect();
    client.run(
        "CREATE VIEW v AS SELECT c FROM t;
         CREATE MATERIALIZED VIEW m AS SELECT c FROM t;
         CREATE TEMP TABLE tmp (c bytea);
         CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER far FOREIGN DATA WRAPPER nothing;
         CREATE FOREIGN TABLE f (c bytea) SERVER far;
         CREATE SEQUENCE s",
    );
    for (table, kind) in [
        ("v", "a view"),
        ("m", "a materialized view"),
        ("tmp", "a temporary table"),
        ("f", "a foreign table"),
        ("s", "no table"),
        ("pg_catalog.pg_statistic", "a system table"),
        ("rekey.slot_wrap", "a system table"),
    ] {
        client
            .refuse(
                &format!("SELECT rekey.register_column('{table}', 'c')"),
                "42809",
            )
            .names(kind);
    }
}

#[test]
fn columns_that_cannot_change_their_bytes_are_refused() {
    let database = database("columns");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE u (c bytea UNIQUE, p bytea PRIMARY KEY, x text,
             g bytea GENERATED ALWAYS AS (x::bytea) STORED);
         CREATE TABLE i (c bytea); CREATE UNIQUE INDEX only_some ON i (c) WHERE c IS NOT NULL;
         CREATE TABLE f (c bytea REFERENCES u);
         CREATE TABLE r (c bytea) PARTITION BY RANGE (c)",
    );
    for (table, column, code, names) in [
        ("u", "c", "55000", "constraint"),
        ("u", "p", "55000", "constraint"),
        ("u", "g", "55000", "generated"),
        ("u", "x", "42804", "bytea"),
        ("u", "nothing", "42703", "nothing"),
        ("i", "c", "55000", "only_some"),
        ("f", "c", "55000", "constraint"),
        ("r", "c", "55000", "partition key"),
    ] {
        client
            .refuse(
                &format!("SELECT rekey.register_column('{table}', '{column}')"),
                code,
            )
            .names(names);
    }
    client.refuse("SELECT rekey.register_column(NULL, 'c')", "22004");
    client.refuse("SELECT rekey.register_column('t', NULL)", "22004");
    client.refuse("SELECT rekey.register_column('t', 'c', NULL)", "22004");
}

#[test]
fn a_domain_over_bytea_is_accepted() {
    let database = database("domains");
    let mut client = database.connect();
    client.run(
        "CREATE DOMAIN sealed AS bytea CHECK (rekey.is_envelope(VALUE));
         CREATE DOMAIN customers AS sealed NOT NULL;
         CREATE TABLE d (id int, c sealed, n customers);
         INSERT INTO d SELECT i, encrypt_col('c' || i, 'pii'),
                encrypt_col('n' || i, 'pii', rekey.context('d.n', i::text))
           FROM generate_series(1, 5) AS i",
    );
    client.run(
        "SELECT rekey.register_column('d', 'c');
         SELECT rekey.register_column('d', 'n', 'rekey.context(''d.n'', id::text)')",
    );
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(
        client
            .number("SELECT count(*) FROM d WHERE NOT rekey.is_stale(c) AND NOT rekey.is_stale(n)"),
        5
    );
    assert_eq!(
        client.number(
            "SELECT count(*) FROM d WHERE decrypt_col(c) = 'c' || id
                AND decrypt_col(n, rekey.context('d.n', id::text)) = 'n' || id"
        ),
        5
    );
    assert_eq!(
        client.column("SELECT state FROM rekey.slots ORDER BY version"),
        ["drained", "active"]
    );
}

#[test]
fn code_that_would_run_later_or_instead_is_refused() {
    let database = database("code");
    let mut client = database.connect();
    client.run(
        "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
         CREATE TABLE late (c bytea);
         CREATE CONSTRAINT TRIGGER later AFTER UPDATE ON late DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION nothing();
         CREATE TABLE ruled (c bytea);
         CREATE RULE instead AS ON UPDATE TO ruled DO INSTEAD NOTHING",
    );
    client.run("SELECT rekey.register_column('late', 'c')");
    client.run("SELECT rekey.unregister_column('late', 'c')");
    client
        .refuse(
            "SELECT rekey.register_column('late', 'c', fire_triggers => true)",
            "55000",
        )
        .names("DEFERRED");
    client.run("ALTER TABLE late ENABLE ALWAYS TRIGGER later");
    client
        .refuse("SELECT rekey.register_column('late', 'c')", "55000")
        .names("DEFERRED");
    client.run("SELECT rekey.register_column('ruled', 'c')");
    client.run("SELECT rekey.unregister_column('ruled', 'c')");
    client.run("ALTER TABLE ruled ENABLE ALWAYS RULE instead");
    client
        .refuse("SELECT rekey.register_column('ruled', 'c')", "55000")
        .names("rule");
}

#[test]
fn a_context_must_be_one_immutable_expression_over_the_row() {
    let database = database("contexts");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE secret (s text); INSERT INTO secret VALUES ('x');
         CREATE FUNCTION stable_one(int) RETURNS text STABLE LANGUAGE plpgsql AS
             'BEGIN RETURN ''x''; END'",
    );
    for context in [
        "'x' || at",
        "now()::text",
        "public.stable_one(id)",
        "other) FROM secret --",
        "other, other",
        "other FROM secret",
        "other WHERE true",
        "other UNION SELECT s FROM secret",
        "other AS name",
        "c::text",
        "ctid::text",
        "t::text",
    ] {
        let quoted = context.replace('\'', "''");
        let refusal = client
            .attempt(&format!(
                "SELECT rekey.register_column('t', 'c', '{quoted}')"
            ))
            .expect_err(context);
        assert!(
            ["22023", "42601", "0A000", "42703"].contains(&refusal.code.as_str()),
            "{context}: {}",
            refusal.text()
        );
    }
    for (context, code) in [
        ("(SELECT s FROM secret)", "0A000"),
        ("max(other)", "42803"),
        ("generate_series(1, id)::text", "0A000"),
        ("nothing", "42703"),
        ("other; DROP TABLE secret", "42601"),
        ("stable_one(id)", "42883"),
    ] {
        client.fail(
            &format!("SELECT rekey.register_column('t', 'c', '{context}')"),
            code,
        );
    }
    client
        .refuse(
            "SELECT rekey.register_column('t', 'c', '''x'' || at')",
            "22023",
        )
        .hints("rekey.context('x', id::text)");
    client.run("SELECT rekey.register_column('t', 'c', '''x'' || id::text')");
}

#[test]
fn only_the_owner_and_superusers_register() {
    let database = database("owners");
    let (owner, other) = (database.role("owner"), database.role("other"));
    database.connect().run(&format!(
        "ALTER TABLE t OWNER TO {owner}; GRANT ALL ON t TO {other}"
    ));
    let mut other = database.connect_as(&other);
    other.refuse("SELECT rekey.register_column('t', 'c')", "42501");
    let mut owner = database.connect_as(&owner);
    owner.run("SELECT rekey.register_column('t', 'c')");
    assert_eq!(owner.number("SELECT count(*) FROM rekey.columns"), 1);
    assert_eq!(
        other.number("SELECT count(*) FROM rekey.columns"),
        0,
        "not his table"
    );
    other.refuse("SELECT rekey.unregister_column('t', 'c')", "42501");
}

#[test]
fn a_renamed_column_stays_registered_and_a_dropped_one_is_missing() {
    let database = database("renamed");
    let mut client = database.connect();
    client.run("SELECT rekey.register_column('t', 'c')");
    client.run("ALTER TABLE t RENAME c TO renamed; ALTER TABLE t ADD c bytea");
    assert_eq!(
        client.column("SELECT column_name FROM rekey.columns"),
        ["renamed"]
    );
    client.run("INSERT INTO t (id, renamed) SELECT 1, encrypt_col('x', 'pii')");
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'drained'"),
        1
    );
    client.run("ALTER TABLE t DROP renamed");
    assert!(client.truth("SELECT missing FROM rekey.columns"));
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'previous'"),
        1,
        "a missing column stands in the way of the proof"
    );
    client.run("SELECT rekey.unregister_column('t', 'renamed')");
}

#[test]
fn a_dropped_table_takes_its_registration_with_it() {
    let database = database("dropped");
    let mut client = database.connect();
    client.run(
        "CREATE SCHEMA s; CREATE TABLE s.a (c bytea); CREATE TABLE b (c bytea);
         SELECT rekey.register_column('s.a', 'c'); SELECT rekey.register_column('b', 'c')",
    );
    client.run("DROP TABLE b; DROP SCHEMA s CASCADE");
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.registered_column"),
        0
    );
}

#[test]
fn partitions_are_served_by_leaf_and_those_attached_later_too() {
    let database = database("partitions");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE p (id int, c bytea) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (id);
         CREATE TABLE p11 PARTITION OF p1 FOR VALUES FROM (0) TO (50);
         SELECT rekey.register_column('p', 'c');
         CREATE TABLE p12 (c bytea, gone int, id int); ALTER TABLE p12 DROP gone;
         INSERT INTO p12 (id, c) SELECT 60, encrypt_col('sixty', 'pii');
         INSERT INTO p SELECT 1, encrypt_col('one', 'pii');
         SELECT rotate_key('pii');
         ALTER TABLE p1 ATTACH PARTITION p12 FOR VALUES FROM (50) TO (100)",
    );
    client.run("CALL rekey.reencrypt('p')");
    assert_eq!(
        client.number(
            "SELECT count(*) FROM p WHERE rekey.slot_id(c) = \
                       (SELECT active_slot FROM rekey.keys)"
        ),
        2
    );
    assert_eq!(
        client.column("SELECT decrypt_col(c) FROM p ORDER BY id"),
        ["one", "sixty"]
    );
    assert_eq!(
        client.column("SELECT table_name::text FROM rekey.progress ORDER BY 1"),
        ["p11", "p12"]
    );
}

#[test]
fn a_dump_carries_the_registration() {
    let database = database("dumped");
    let mut client = database.connect();
    client.run("SELECT rekey.register_column('t', 'c', 'rekey.context(''t.c'', id::text)')");
    client.run("INSERT INTO t SELECT 7, encrypt_col('seven', 'pii', rekey.context('t.c', '7'))");
    let cluster = cluster();
    let conninfo = cluster.conninfo(&client.text("SELECT current_database()"));
    let dump = cluster.tool("pg_dump", &["-d", &conninfo]);
    let target = cluster.empty_database("dumped_target", "");
    let file = cluster.dir().join("registration.sql");
    cluster.write_file(&file, dump.as_bytes(), 0o644);
    let name = target.connect().text("SELECT current_database()");
    cluster.tool(
        "psql",
        &[
            "-X",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            &cluster.conninfo(&name),
            "-f",
            &file.display().to_string(),
        ],
    );
    let mut restored = target.connect();
    assert_eq!(
        restored.column("SELECT column_name FROM rekey.columns WHERE NOT missing"),
        ["c"]
    );
    restored.run("SELECT rotate_key('pii')");
    restored.run("CALL rekey.reencrypt()");
    assert_eq!(
        restored.text("SELECT decrypt_col(c, rekey.context('t.c', id::text)) FROM t"),
        "seven"
    );
    assert_eq!(
        restored.number("SELECT count(*) FROM rekey.slots WHERE state = 'drained'"),
        1
    );
}
