//! Roles without key privileges who try other roads than the front door, and get nothing.
//!
//! Database owners, readers of all data, search_path, operator and temp-table tricks against more
//! powerful callers, and direct changes of the catalog, by superusers too.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::unloaded()))
}

fn database(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let mut admin = database.connect();
    admin.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c;
         GRANT ALL ON t TO PUBLIC",
    );
    (database, admin)
}

const TABLES: [&str; 10] = [
    "key",
    "key_slot",
    "slot_wrap",
    "root_key",
    "key_grant",
    "registered_column",
    "progress_state",
    "quarantine",
    "audit_log",
    "barrier",
];

#[test]
fn a_database_owner_gets_nothing() {
    let (database, mut admin) = database("owned");
    let owner = database.role("dbo");
    admin.run(&format!(
        "ALTER DATABASE owned OWNER TO {owner}; ALTER TABLE t OWNER TO {owner};
         ALTER SCHEMA public OWNER TO {owner}"
    ));
    let mut client = database.connect_as(&owner);
    client.refuse("SELECT decrypt_col(c) FROM t", "42501");
    client.refuse("SELECT encrypt_col('x', 'pii')", "42501");
    client.refuse("SELECT rotate_key('pii')", "42501");
    client.refuse(
        &format!("SELECT rekey.grant_key('pii', '{owner}', '{{decrypt}}')"),
        "42501",
    );
    for view in ["keys", "slots", "grants", "audit", "root_keys"] {
        assert!(
            client
                .rows(&format!("SELECT * FROM rekey.{view}"))
                .is_empty(),
            "{view}"
        );
    }
    for table in TABLES {
        client.fail(&format!("TABLE rekey.{table}"), "42501");
        client.fail(&format!("TRUNCATE rekey.{table}"), "42501");
        client.fail(
            &format!("ALTER TABLE rekey.{table} OWNER TO {owner}"),
            "42501",
        );
        client.fail(
            &format!(
                "CREATE TRIGGER x AFTER INSERT ON rekey.{table} FOR EACH ROW \
             EXECUTE FUNCTION suppress_redundant_updates_trigger()"
            ),
            "42501",
        );
    }
    for sql in [
        "DROP EXTENSION pg_rekey CASCADE",
        "ALTER EXTENSION pg_rekey DROP TABLE rekey.key",
        "DROP SCHEMA rekey CASCADE",
        "CREATE FUNCTION rekey.x() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE TABLE rekey.x ()",
        "INSERT INTO rekey.key_grant VALUES ('pii', 'pg_monitor', 'decrypt')",
        "DROP EVENT TRIGGER pg_rekey_guard_drop",
        "ALTER SCHEMA rekey RENAME TO lost",
        "GRANT ALL ON SCHEMA rekey TO PUBLIC",
        "SELECT nextval('rekey.audit_id')",
    ] {
        let refusal = client.attempt(sql);
        if let Err(refusal) = refusal {
            assert_eq!(refusal.code, "42501", "{sql}: {refusal:?}");
        } else {
            assert!(sql.starts_with("GRANT"), "{sql} succeeded");
        }
    }
    assert_eq!(admin.text("SELECT decrypt_col(c) FROM t"), "one");
}

#[test]
fn pg_read_all_data_reads_wrapped_keys_but_opens_nothing() {
    let (database, mut admin) = database("dumper");
    let dumper = database.role("dumper");
    admin.run(&format!(
        "GRANT pg_read_all_data, pg_write_all_data TO {dumper}"
    ));
    let mut client = database.connect_as(&dumper);
    assert_eq!(client.number("SELECT count(*) FROM rekey.slot_wrap"), 1);
    client.refuse("SELECT decrypt_col(c) FROM t", "42501");
    for sql in [
        "UPDATE rekey.key SET comment = ''",
        "DELETE FROM rekey.key_slot",
    ] {
        client.attempt(sql).expect_err("a direct change");
    }
}

/// A schema that shadows what careless code would call, each piece raising an alarm.
const TRAPS: &str = "CREATE SCHEMA evil;
    CREATE FUNCTION evil.alarm() RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'attacked as %', current_user USING ERRCODE = 'ZZ001'; END $$;
    DO $do$
    DECLARE t text; o text;
    BEGIN
        FOREACH t IN ARRAY '{text,bigint,integer,bytea,oid,timestamptz,interval,name,boolean}'::text[]
        LOOP
            EXECUTE format('CREATE FUNCTION evil.cmp(%1$s, %1$s) RETURNS boolean LANGUAGE plpgsql
                AS $f$ BEGIN RETURN evil.alarm(); END $f$', t);
            FOREACH o IN ARRAY '{=,<>,<,>,<=,>=}'::text[] LOOP
                EXECUTE format('CREATE OPERATOR evil.%2$s (LEFTARG = %1$s, RIGHTARG = %1$s,
                    FUNCTION = evil.cmp)', t, o);
            END LOOP;
        END LOOP;
        FOREACH t IN ARRAY '{now(),clock_timestamp(),current_database(),pg_backend_pid(),
            encode(bytea\\,text),decode(text\\,text),nextval(regclass),format(text\\,text),
            lower(text),to_regrole(text),pg_current_xact_id(),length(text),length(bytea),
            octet_length(text),array_position(anyarray\\,anyelement),quote_ident(text)}'::text[]
        LOOP
            EXECUTE 'CREATE FUNCTION evil.' || t || ' RETURNS text LANGUAGE plpgsql
                AS $f$ BEGIN PERFORM evil.alarm(); END $f$';
        END LOOP;
    END $do$;
    CREATE FUNCTION evil.key_visible(text) RETURNS boolean LANGUAGE sql AS 'SELECT evil.alarm()';
    CREATE TABLE evil.key (key_name text); CREATE TABLE evil.key_slot (slot_id bigint);
    CREATE TABLE evil.slot_wrap (slot_id bigint); CREATE TABLE evil.key_grant (key_name text);
    CREATE TABLE evil.audit_log (x int); CREATE TABLE evil.root_key (x int);
    CREATE TABLE evil.pg_class (oid oid); CREATE TABLE evil.pg_roles (oid oid);
    CREATE TABLE evil.pg_authid (oid oid); CREATE TABLE evil.barrier (x int);
    GRANT ALL ON SCHEMA evil TO PUBLIC";

#[test]
fn search_path_operators_and_temp_tables_catch_no_powerful_caller() {
    let (database, mut admin) = database("trapped");
    let member = database.role("member");
    admin.run(TRAPS);
    let old = admin.number("SELECT active_slot FROM rekey.keys");
    admin.run(
        "CREATE TEMP TABLE key (key_name text); CREATE TEMP TABLE key_slot (slot_id bigint);
         CREATE TEMP TABLE key_grant (x int); CREATE TEMP TABLE audit_log (x int);
         CREATE TEMP TABLE slot_wrap (x int); CREATE TEMP TABLE pg_class (oid oid);
         CREATE TEMP TABLE root_key (x int);
         SET search_path = pg_temp, evil, rekey, public, pg_catalog",
    );
    admin.fail("SELECT 'a'::text = 'b'::text", "ZZ001");
    for sql in [
        "SELECT public.encrypt_col(42::int, 'pii', 'ctx')",
        "SELECT public.decrypt_col(c) FROM public.t",
        "SELECT public.decrypt_col_as(public.encrypt_col(42::int, 'pii'), NULL::bigint)",
        "SELECT public.rotate_key('pii', 'trapped')",
        "SELECT rekey.create_key('second')",
        "SELECT rekey.create_key('second', if_not_exists => true)",
        "SELECT rekey.set_policy('pii', grace => '1 day', custodian => 'me')",
        &format!("SELECT rekey.grant_key('pii', '{member}', '{{encrypt,decrypt}}')"),
        &format!("SELECT rekey.revoke_key('pii', '{member}', '{{decrypt}}')"),
        &format!("SELECT rekey.has_key_privilege('{member}', 'pii', 'encrypt')"),
        "SELECT rekey.rollback_rotation('pii')",
        "SELECT public.rotate_key('pii')",
        &format!("SELECT rekey.disable_slot({old}::bigint, force => true)"),
        &format!("SELECT rekey.enable_slot({old}::bigint)"),
        "SELECT rekey.can_open(c, ''), rekey.slot_id(c), rekey.is_envelope(c) FROM public.t",
        "SELECT d.* FROM public.t, rekey.describe(c) d",
        "SELECT rekey.ready()",
        "SELECT * FROM rekey.keys",
        "SELECT * FROM rekey.slots",
        "SELECT * FROM rekey.grants",
        "SELECT * FROM rekey.root_keys",
        "SELECT * FROM rekey.audit",
        "SELECT rekey.context('a', 'b')",
        "SELECT rekey.shred_key('second', 'done')",
        "SELECT rekey.drop_key('second')",
        "SELECT rekey.reload_root_keys()",
    ] {
        admin.run(sql);
    }
    admin
        .attempt("SELECT rekey.create_key('pii')")
        .expect_err("the key exists")
        .names("pii");
    admin.run("SET search_path = pg_catalog, public");
    assert_eq!(admin.text("SELECT decrypt_col(c) FROM public.t"), "one");
}

#[test]
fn a_superuser_cannot_change_keys_and_slots_directly() {
    let (_database, mut admin) = database("direct");
    for table in ["key", "key_slot", "slot_wrap", "root_key", "audit_log"] {
        let column = admin.text(&format!(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'rekey.{table}'::regclass \
             AND attnum = 1"
        ));
        let before = admin.rows(&format!("TABLE rekey.{table}"));
        assert!(!before.is_empty(), "{table}");
        for sql in [
            format!("UPDATE rekey.{table} SET {column} = {column}"),
            format!("DELETE FROM rekey.{table}"),
            format!("TRUNCATE rekey.{table}"),
            format!("TRUNCATE rekey.{table} CASCADE"),
            format!(
                "MERGE INTO rekey.{table} t USING (SELECT 1) s ON true WHEN MATCHED THEN DELETE"
            ),
        ] {
            let refusal = admin.attempt(&sql).expect_err("a direct change");
            assert!(!refusal.hint.is_empty(), "{sql}: {refusal:?}");
        }
        assert_eq!(admin.rows(&format!("TABLE rekey.{table}")), before);
    }
    // The extension's own right to change them must not outlive its statement, failed or not.
    admin.run("SELECT rotate_key('pii')");
    admin
        .attempt("DELETE FROM rekey.key_slot")
        .expect_err("after a rotation");
    admin.run("BEGIN; SELECT rotate_key('pii'); SAVEPOINT s");
    admin
        .attempt("DELETE FROM rekey.key_slot")
        .expect_err("in the rotating transaction");
    admin.run("ROLLBACK TO s");
    admin.refuse("SELECT rekey.create_key('pii')", "42710");
    admin.run("ROLLBACK TO s");
    admin
        .attempt("DELETE FROM rekey.key_slot")
        .expect_err("after an error inside");
    admin.run("ROLLBACK");
    assert_eq!(admin.text("SELECT decrypt_col(c) FROM t"), "one");
}

#[test]
fn inserting_into_the_catalog_stays_open_for_restores_but_makes_no_second_active_slot() {
    let (_database, mut admin) = database("inserted");
    admin.run("INSERT INTO rekey.key (key_name) VALUES ('restored')");
    assert_eq!(admin.number("SELECT count(*) FROM rekey.keys"), 2);
    admin.refuse("SELECT encrypt_col('x', 'restored')", "55000");
    admin.fail(
        "INSERT INTO rekey.key_slot (slot_id, key_name, version, state, check_value) \
         SELECT 1, key_name, 99, 'active', check_value FROM rekey.key_slot",
        "23505",
    );
}

#[test]
fn a_slot_under_anothers_check_value_or_name_does_not_open() {
    let (_database, mut admin) = database("swapped");
    admin.run("SELECT rekey.create_key('other'); SELECT encrypt_col('x', 'other')");
    // A forged slot that borrows another slot's wrapped key must not unwrap.
    admin.run(
        "INSERT INTO rekey.key (key_name) VALUES ('forged');
         INSERT INTO rekey.key_slot (slot_id, key_name, version, state, check_value)
             SELECT 4711, 'forged', 1, 'active', check_value FROM rekey.key_slot
             WHERE key_name = 'pii';
         INSERT INTO rekey.slot_wrap SELECT 4711, root_id, wrapped_key FROM rekey.slot_wrap
             JOIN rekey.key_slot USING (slot_id) WHERE key_name = 'pii'",
    );
    admin.refuse("SELECT encrypt_col('x', 'forged')", "F0000");
    assert_eq!(admin.text("SELECT decrypt_col(c) FROM t"), "one");
}

#[test]
fn default_privileges_of_the_database_open_and_close_nothing() {
    let database = cluster().empty_database("defaults", "");
    let role = database.role("someone");
    let mut admin = database.connect();
    admin.run(
        "ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC;
         ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO PUBLIC;
         ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC",
    );
    database.install();
    admin.run(&format!(
        "SELECT rekey.create_key('pii'); SELECT rekey.grant_key('pii', '{role}', \
         '{{encrypt,decrypt,rotate,manage}}')"
    ));
    let mut client = database.connect_as(&role);
    for table in TABLES {
        for sql in [
            format!("TABLE rekey.{table}"),
            format!("TRUNCATE rekey.{table}"),
        ] {
            client.fail(&sql, "42501");
        }
    }
    client.fail("INSERT INTO rekey.key (key_name) VALUES ('x')", "42501");
    client.fail("SELECT nextval('rekey.audit_id')", "42501");
    client.fail("SELECT rekey.create_key('x')", "42501");
    assert_eq!(
        client.text("SELECT decrypt_col(encrypt_col('x', 'pii'))"),
        "x"
    );
    client.run("SELECT rotate_key('pii'); SELECT rekey.ready(); TABLE rekey.keys");
    client.run("SELECT rekey.can_open(encrypt_col(1, 'pii'), ''), rekey.context('a')");
}
