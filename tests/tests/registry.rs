//! What a registration means after its table has changed, been restored, or gone; and what users'
//! code must not reach through it.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded().set("rekey.worker = off")))
}

fn database(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int PRIMARY KEY, gone int, c bytea, d bytea, other text);
         ALTER TABLE t DROP gone",
    );
    (database, client)
}

/// Registered columns: number, name and whether it is missing.
const COLUMNS: &str = "SELECT column_name || ' ' || missing FROM rekey.columns \
                        ORDER BY table_name::text COLLATE \"C\", column_name";

/// Dumps `name` and restores it into a new database `name`_2.
fn restored(name: &str) -> Client {
    let cluster = cluster();
    let dump = cluster.tool("pg_dump", &["-d", &cluster.conninfo(name)]);
    let target = format!("{name}_2");
    cluster.empty_database(&target, "");
    let file = cluster.dir().join(format!("{name}.sql"));
    cluster.write_file(&file, dump.as_bytes(), 0o644);
    let file = file.display().to_string();
    let target_at = cluster.conninfo(&target);
    let args = [
        "-X",
        "-q",
        "-v",
        "ON_ERROR_STOP=1",
        "-d",
        &target_at,
        "-f",
        &file,
    ];
    cluster.tool("psql", &args);
    cluster.connect(&target)
}

fn slots_in(client: &mut Client, state: &str) -> i64 {
    client.number(&format!(
        "SELECT count(*) FROM rekey.slots WHERE state = '{state}'"
    ))
}

#[test]
fn a_renamed_column_is_dumped_by_its_present_name_and_followed_on_after_the_restore() {
    let (_, mut client) = database("renames");
    client.run(
        "SELECT rekey.register_column('t', 'c', 'other');
         SELECT rekey.register_column('t', 'd');
         INSERT INTO t VALUES (1, encrypt_col('see', 'pii', 'o'), encrypt_col('dee', 'pii'), 'o');
         ALTER TABLE t RENAME c TO x; ALTER TABLE t RENAME d TO c; ALTER TABLE t RENAME x TO d;
         SELECT rekey.enable_touch('t')",
    );
    let contexts = "SELECT column_name || ' ' || context FROM rekey.columns ORDER BY column_name";
    assert_eq!(client.column(contexts), ["c ", "d other"]);
    let mut restored = restored("renames");
    assert_eq!(restored.column(contexts), ["c ", "d other"]);
    restored.run("ALTER TABLE t RENAME c TO plain; ALTER TABLE t RENAME d TO bound");
    assert_eq!(restored.column(COLUMNS), ["bound false", "plain false"]);
    restored.run("SELECT rotate_key('pii')");
    restored.run("UPDATE t SET id = 2");
    let stale = "SELECT rekey.is_stale(plain) || ' ' || rekey.is_stale(bound) FROM t";
    assert_eq!(
        restored.text(stale),
        "false false",
        "touched after the restore"
    );
    restored.run("SELECT rotate_key('pii')");
    restored.run("CALL rekey.reencrypt()");
    assert_eq!(slots_in(&mut restored, "drained"), 2);
    assert_eq!(
        restored.text("SELECT decrypt_col(plain) || decrypt_col(bound, other) FROM t"),
        "deesee"
    );
}

#[test]
fn an_owner_without_any_privilege_on_the_catalog_renames_and_drops() {
    let (database, mut client) = database("plain");
    let owner = database.role("owner");
    client.run(&format!("ALTER TABLE t OWNER TO {owner}"));
    let mut owner = database.connect_as(&owner);
    owner.run("SELECT rekey.register_column('t', 'c'); ALTER TABLE t RENAME c TO e");
    let stored = "SELECT column_name FROM rekey.registered_column";
    assert_eq!(client.column(stored), ["e"]);
    owner.run("BEGIN; ALTER TABLE t RENAME e TO f; ROLLBACK");
    assert_eq!(client.column(stored), ["e"]);
    // Replication that applies, and a restore, run as replicas.
    client.run("SET session_replication_role = replica; ALTER TABLE t RENAME e TO f");
    assert_eq!(client.column(stored), ["f"]);
    owner.run("DROP TABLE t");
    assert!(client.column(stored).is_empty());
}

#[test]
fn numbers_of_another_server_do_not_count_even_under_the_same_oid() {
    let (_, mut client) = database("elsewhere");
    // As from a dump of a fresh server: same OID there, column 5 was another one.
    client.run(
        "INSERT INTO rekey.registered_column \
             (table_name, column_name, attnum, stamp, registered_by)
         VALUES ('t', 'c', 4, '1/' || 't'::regclass::oid || '/700', 'them')",
    );
    assert_eq!(client.column(COLUMNS), ["c false"]);
    assert_eq!(
        client.text(
            "SELECT attnum || ' ' || (stamp = rekey.table_stamp('t')) FROM rekey.registered_column"
        ),
        "3 true"
    );
    client.refuse("SELECT rekey.register_column('t', 'c')", "42710");
    // A name that is not there is missing, not something else.
    client.run(
        "INSERT INTO rekey.registered_column \
             (table_name, column_name, attnum, stamp, registered_by)
         VALUES ('t', 'e', 4, '1/2/3', 'them')",
    );
    assert_eq!(client.column(COLUMNS), ["c false", "e true"]);
    client.run("SELECT rekey.unregister_column('t', 'e')");
    assert_eq!(client.column(COLUMNS), ["c false"]);
}

#[test]
fn a_later_table_does_not_inherit_the_registration_of_a_dropped_one() {
    let (_, mut client) = database("inherited");
    client.run(
        "SELECT rekey.register_column('t', 'c');
         INSERT INTO t (id, c) SELECT 1, encrypt_col('x', 'pii');
         SELECT rotate_key('pii')",
    );
    // What is left when the table was dropped without our event trigger and its OID came round.
    let old_stamp =
        "UPDATE rekey.registered_column SET stamp = regexp_replace(stamp, '[0-9]+$', '3')";
    client.refuse(old_stamp, "55000");
    client.run(&format!(
        "SET session_replication_role = replica; {old_stamp}; RESET session_replication_role"
    ));
    assert_eq!(client.column(COLUMNS), ["c true"]);
    client.run("CALL rekey.reencrypt()");
    assert!(client.truth("SELECT rekey.is_stale(c) FROM t"));
    assert_eq!(
        slots_in(&mut client, "previous"),
        1,
        "it is not passed over in silence"
    );
    client.run("ALTER TABLE t RENAME other TO another");
    assert_eq!(client.column(COLUMNS), ["c true"], "nor adopted later");
    client.run("SELECT rekey.unregister_column('t', 'c')");
    client.run("SELECT rekey.register_column('t', 'c')");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(slots_in(&mut client, "drained"), 1);
}

#[test]
fn a_table_that_is_gone_without_a_trace_holds_up_nothing() {
    let (_, mut client) = database("gone");
    client.run(
        "CREATE TABLE other (c bytea); SELECT rekey.register_column('other', 'c');
         SELECT rekey.register_column('t', 'c');
         ALTER EVENT TRIGGER pg_rekey_forget_dropped DISABLE;
         DROP TABLE t;
         ALTER EVENT TRIGGER pg_rekey_forget_dropped ENABLE ALWAYS;
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(slots_in(&mut client, "drained"), 1);
    restored("gone");
}

#[test]
fn a_new_column_with_the_name_of_a_dropped_one_is_another_column() {
    let (_, mut client) = database("renewed");
    client.run(
        "SELECT rekey.register_column('t', 'c'); ALTER TABLE t DROP c; ALTER TABLE t ADD c bytea",
    );
    assert_eq!(client.column(COLUMNS), ["c true"]);
    client.refuse("SELECT rekey.register_column('t', 'c')", "42710");
    client.run("SELECT rekey.unregister_column('t', 'c'); SELECT rekey.register_column('t', 'c')");
    assert_eq!(client.column(COLUMNS), ["c false"]);
}

#[test]
fn contexts_take_no_star_no_generated_column_and_no_planted_name() {
    let (_, mut client) = database("names");
    client.run(
        "CREATE TABLE g (id int, other text, c bytea,
             upper_one text GENERATED ALWAYS AS (upper(other)) STORED);
         CREATE FUNCTION public.lower(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS
             $$BEGIN RAISE 'planted'; END$$;
         CREATE FUNCTION public.join_them(text, text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS
             $$BEGIN RAISE 'planted'; END$$;
         CREATE OPERATOR public.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = public.join_them);
         CREATE DOMAIN public.text AS pg_catalog.text CHECK (VALUE = 'planted');
         SET search_path = public, pg_catalog",
    );
    for context in [
        "*",
        "g.*",
        "upper_one",
        "g",
        "ctid",
        "c",
        "upper(other || c::text)",
    ] {
        client
            .refuse(
                &format!("SELECT rekey.register_column('g', 'c', '{context}')"),
                "22023",
            )
            .hints("rekey.context");
    }
    for context in ["1) FROM secret --", "other, other", "other; SELECT 1", ""] {
        let register = format!("SELECT rekey.register_column('g', 'c', '{context}')");
        match context {
            "" => client.run(&format!("BEGIN; {register}; ROLLBACK")),
            _ => assert!(client.attempt(&register).is_err(), "{context}"),
        }
    }
    client.run(
        "SELECT rekey.register_column('g', 'c', $$lower(other) || id::text$$);
         INSERT INTO g (id, other, c) SELECT 1, 'O', encrypt_col('x'::pg_catalog.text, 'pii', 'o1');
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert!(!client.truth("SELECT rekey.is_stale(c) FROM g"));
    assert_eq!(client.text("SELECT decrypt_col(c, 'o1') FROM g"), "x");
}

#[test]
fn a_context_function_runs_as_the_owner_even_when_a_superuser_registers() {
    let (database, mut client) = database("folded");
    let owner = database.role("owner");
    client.run(&format!(
        "CREATE FUNCTION who(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
             BEGIN
                 IF current_user <> '{owner}' THEN RAISE 'run as %', current_user; END IF;
                 RETURN 'x';
             END $$;
         ALTER TABLE t OWNER TO {owner};
         SELECT rekey.register_column('t', 'c', 'public.who(''folded when planned'')')"
    ));
    // Nor can it become anyone else.
    client.run(
        "CREATE FUNCTION escapes(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
             BEGIN
                 PERFORM set_config('role', 'postgres', false);
                 RETURN 'x';
             END $$",
    );
    client
        .fail(
            "SELECT rekey.register_column('t', 'd', 'public.escapes(''x'')')",
            "42501",
        )
        .names("cannot set parameter");
}

#[test]
fn a_trigger_that_any_other_could_defer_is_refused_and_postgresqls_own_are_not() {
    let (_, mut client) = database("deferrable");
    client.run(
        "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
         CREATE TABLE late (id int REFERENCES t DEFERRABLE INITIALLY DEFERRED,
             n int UNIQUE DEFERRABLE INITIALLY DEFERRED, c bytea);
         SELECT rekey.register_column('late', 'c', fire_triggers => true);
         SELECT rekey.unregister_column('late', 'c');
         CREATE CONSTRAINT TRIGGER later AFTER UPDATE ON late DEFERRABLE INITIALLY IMMEDIATE
             FOR EACH ROW EXECUTE FUNCTION nothing()",
    );
    let register = "SELECT rekey.register_column('late', 'c', fire_triggers => true)";
    client.refuse(register, "55000").names("later");
    client.run("SELECT rekey.register_column('late', 'c')");
    // Made dangerous after the registration: the batch is refused, and so is the proof.
    client.run("INSERT INTO late (c) SELECT encrypt_col('x', 'pii')");
    client.run("ALTER TABLE late ENABLE ALWAYS TRIGGER later; SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    assert!(client.truth("SELECT rekey.is_stale(c) FROM late"));
    assert_eq!(slots_in(&mut client, "previous"), 1);
}

#[test]
fn a_foreign_key_that_comes_later_stops_the_batch_on_either_side() {
    let (_, mut client) = database("references");
    client.run(
        "CREATE TABLE parent (c bytea); CREATE TABLE child (c bytea);
         INSERT INTO parent SELECT encrypt_col('x', 'pii'); INSERT INTO child SELECT c FROM parent;
         SELECT rekey.register_column('parent', 'c'); SELECT rekey.register_column('child', 'c')",
    );
    client.run(
        "ALTER TABLE parent ADD UNIQUE (c);
         ALTER TABLE child ADD CONSTRAINT same FOREIGN KEY (c) REFERENCES parent (c);
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(
        client.number("SELECT count(*) FROM parent JOIN child USING (c) WHERE rekey.is_stale(c)"),
        1,
        "as a replica the foreign key would not have been asked"
    );
    client.run("ALTER TABLE parent DROP CONSTRAINT parent_c_key CASCADE");
    client.run("CALL rekey.reencrypt()");
    let stale =
        "SELECT count(*) FROM (TABLE parent UNION ALL TABLE child) x WHERE rekey.is_stale(c)";
    assert_eq!(client.number(stale), 0);
    assert_eq!(slots_in(&mut client, "drained"), 1);
}

#[test]
fn an_expression_of_a_unique_index_counts_and_an_included_column_does_not() {
    let (_, mut client) = database("indexes");
    client.run(
        "CREATE TABLE e (c bytea); CREATE UNIQUE INDEX by_hash ON e (md5(c));
         CREATE TABLE i (id int, c bytea); CREATE UNIQUE INDEX beside ON i (id) INCLUDE (c);
         CREATE TABLE x (c bytea, EXCLUDE (md5(c) WITH =));
         CREATE TABLE w (id int, c bytea); CREATE UNIQUE INDEX partly ON w (id) WHERE c IS NOT NULL",
    );
    for table in ["e", "x"] {
        let register = format!("SELECT rekey.register_column('{table}', 'c')");
        client.refuse(&register, "55000").names("index");
    }
    client.run("SELECT rekey.register_column('i', 'c'); SELECT rekey.register_column('w', 'c')");
}

#[test]
fn a_foreign_partition_is_refused_and_blocks_the_proof_when_it_comes_later() {
    let (_, mut client) = database("foreign");
    client.run(
        "CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER s FOREIGN DATA WRAPPER nothing;
         CREATE TABLE p (id int, c bytea) PARTITION BY RANGE (id);
         CREATE FOREIGN TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10) SERVER s",
    );
    client
        .refuse("SELECT rekey.register_column('p', 'c')", "42809")
        .names("p1");
    client.run(
        "DROP FOREIGN TABLE p1;
         SELECT rekey.register_column('t', 'c'); SELECT rekey.register_column('p', 'c');
         CREATE FOREIGN TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10) SERVER s;
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(slots_in(&mut client, "previous"), 1);
    client.run("DROP FOREIGN TABLE p1");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(slots_in(&mut client, "drained"), 1);
}

#[test]
fn contexts_agree_along_partitions_and_read_no_sealed_column_of_their_table() {
    let (_, mut client) = database("agree");
    client.run(
        "CREATE TABLE p (id int, a text, c bytea, d bytea) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);
         SELECT rekey.register_column('p1', 'c', 'a')",
    );
    client
        .refuse("SELECT rekey.register_column('p', 'c', 'id')", "55000")
        .names("p1");
    client.run("SELECT rekey.register_column('p', 'c', 'a')");
    client.run("SELECT rekey.unregister_column('p1', 'c')");
    client
        .refuse("SELECT rekey.register_column('p1', 'c', 'id')", "55000")
        .hints("rekey.columns");
    // c's context reads d, then d is to be sealed.
    client.run("SELECT rekey.register_column('t', 'c', 'md5(d)')");
    client
        .refuse("SELECT rekey.register_column('t', 'd')", "22023")
        .names("sealed column");
    // An inheritance child is a table of its own.
    client.run(
        "CREATE TABLE child () INHERITS (t);
         INSERT INTO child (id, c) SELECT 1, encrypt_col('x', 'pii');
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert!(client.truth("SELECT rekey.is_stale(c) FROM child"));
}
