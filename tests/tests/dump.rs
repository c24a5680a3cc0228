//! pg_dump and restore: rows open, grants hold, rotation goes on, in another database.
//!
//! Each form of dump is restored into a new database of the same server, which has the same root
//! key, and once into another server, which has not.

use std::path::PathBuf;
use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::unloaded()))
}

const ROWS: i64 = 500;

/// A database worth dumping: two keys, rotations, a shredded key, grants, one to a dropped role.
fn source(name: &str) -> Database<'static> {
    let database = cluster().database(name);
    let (reader, gone) = (database.role("reader"), database.role("gone"));
    database.connect().run(&format!(
        "SELECT rekey.create_key('pii', grace => '5 days'); SELECT rekey.create_key('other');
         SELECT rekey.create_key('ended'); SELECT rekey.shred_key('ended', 'over');
         CREATE TABLE t (id int PRIMARY KEY, v text, c bytea);
         INSERT INTO t SELECT i, 'v' || i, encrypt_col('v' || i, 'pii', i::text)
             FROM generate_series(1, {ROWS}) i;
         SELECT rotate_key('pii');
         UPDATE t SET c = encrypt_col(v, 'pii', id::text) WHERE id % 2 = 0;
         CREATE VIEW opened AS SELECT id, decrypt_col(c, id::text) AS v FROM t;
         GRANT SELECT ON t, opened TO {reader};
         SELECT rekey.grant_key('pii', '{reader}', '{{decrypt}}');
         SELECT rekey.grant_key('pii', '{gone}', '{{decrypt}}');
         SELECT rekey.grant_key('other', 'public', '{{encrypt}}');
         DROP ROLE {gone}"
    ));
    database
}

fn path(name: &str) -> String {
    let path: PathBuf = cluster().dir().join(name);
    path.to_str().expect("a path in UTF-8").to_owned()
}

/// The catalog as far as it must be the same after a restore.
fn catalog(client: &mut Client) -> Vec<Vec<Option<String>>> {
    let mut rows = client.rows("SELECT * FROM rekey.keys ORDER BY key_name");
    rows.extend(client.rows("SELECT * FROM rekey.slots ORDER BY slot_id"));
    rows.extend(client.rows("SELECT * FROM rekey.audit ORDER BY audit_id"));
    rows.extend(client.rows(
        "SELECT * FROM rekey.grants WHERE grantee !~ '^[0-9]+$' ORDER BY key_name, grantee, privilege",
    ));
    rows
}

/// What a restored database owes its source.
fn is_whole(source: &Database, target: &Database) {
    let mut client = target.connect();
    assert_eq!(catalog(&mut client), catalog(&mut source.connect()));
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE decrypt_col(c, id::text) = v"),
        ROWS
    );
    assert!(client.truth("SELECT rekey.ready()"));
    let mut reader = target.connect_as(&format!("{}_reader", source.name));
    assert_eq!(
        reader.number("SELECT count(v) FROM opened"),
        ROWS,
        "grants hold"
    );
    reader.refuse("SELECT encrypt_col('x', 'pii')", "42501");
    reader.run("SELECT encrypt_col('x', 'other')");
    let dropped = client.number("SELECT count(*) FROM rekey.grants WHERE grantee ~ '^[0-9]+$'");
    assert_eq!(dropped, 0, "a dropped role does not travel");
    let audited = client.number("SELECT max(audit_id) FROM rekey.audit");
    client.run("SELECT rotate_key('pii')");
    assert_eq!(
        client.number("SELECT max(version) FROM rekey.slots WHERE key_name = 'pii'"),
        3
    );
    assert!(
        client.number("SELECT max(audit_id) FROM rekey.audit") > audited,
        "numbers go on"
    );
    client.run("UPDATE t SET c = encrypt_col(v, 'pii', id::text) WHERE id < 10");
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE decrypt_col(c, id::text) = v"),
        ROWS
    );
    client.refuse("SELECT encrypt_col('x', 'ended')", "55000");
    client.refuse("DROP EXTENSION pg_rekey CASCADE", "55000");
}

#[test]
fn a_plain_dump() {
    let source = source("plain");
    let file = path("plain.sql");
    cluster().tool("pg_dump", &["-d", "plain", "-f", &file]);
    let target = cluster().empty_database("plain_2", "");
    cluster().tool(
        "psql",
        &[
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            "plain_2",
            "-f",
            &file,
        ],
    );
    is_whole(&source, &target);
}

#[test]
fn a_custom_dump() {
    let source = source("custom");
    let file = path("custom.dump");
    cluster().tool("pg_dump", &["-Fc", "-d", "custom", "-f", &file]);
    let target = cluster().empty_database("custom_2", "");
    cluster().tool("pg_restore", &["-e", "-d", "custom_2", &file]);
    is_whole(&source, &target);
}

#[test]
fn a_custom_dump_restored_in_parallel() {
    let source = source("jobs");
    let file = path("jobs.dump");
    cluster().tool("pg_dump", &["-Fc", "-d", "jobs", "-f", &file]);
    let target = cluster().empty_database("jobs_2", "");
    cluster().tool("pg_restore", &["-e", "-j", "2", "-d", "jobs_2", &file]);
    is_whole(&source, &target);
}

#[test]
fn a_directory_dump_made_and_restored_in_parallel() {
    let source = source("folder");
    let folder = path("folder.dir");
    cluster().tool(
        "pg_dump",
        &["-Fd", "-j", "2", "-d", "folder", "-f", &folder],
    );
    let target = cluster().empty_database("folder_2", "");
    cluster().tool("pg_restore", &["-e", "-j", "2", "-d", "folder_2", &folder]);
    is_whole(&source, &target);
}

#[test]
fn a_dump_by_a_role_that_reads_all_data() {
    let source = source("readers");
    let dumper = source.role("dumper");
    source
        .connect()
        .run(&format!("GRANT pg_read_all_data TO {dumper}"));
    let file = path("readers.sql");
    cluster().tool("pg_dump", &["-U", &dumper, "-d", "readers", "-f", &file]);
    let target = cluster().empty_database("readers_2", "");
    cluster().tool(
        "psql",
        &[
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            "readers_2",
            "-f",
            &file,
        ],
    );
    is_whole(&source, &target);
}

#[test]
fn data_alone_with_triggers_disabled() {
    let source = source("data");
    let (schema, data) = (path("schema.sql"), path("data.sql"));
    cluster().tool("pg_dump", &["-s", "-d", "data", "-f", &schema]);
    cluster().tool(
        "pg_dump",
        &["-a", "--disable-triggers", "-d", "data", "-f", &data],
    );
    let target = cluster().empty_database("data_2", "");
    let psql = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "data_2", "-f"];
    cluster().tool("psql", &[&psql[..], &[&schema]].concat());
    let mut warm = target.connect();
    warm.refuse("SELECT encrypt_col('x', 'pii')", "42704");
    cluster().tool("psql", &[&psql[..], &[&data]].concat());
    assert_eq!(
        warm.number("SELECT count(*) FROM t WHERE decrypt_col(c, id::text) = v"),
        ROWS,
        "a session that was there before the restore"
    );
    warm.run("SELECT encrypt_col('x', 'pii')");
    is_whole(&source, &target);
}

#[test]
fn a_clean_restore_over_a_database_in_use_needs_allow_drop() {
    let source = source("clean");
    let file = path("clean.sql");
    cluster().tool(
        "pg_dump",
        &["-c", "--if-exists", "-d", "clean", "-f", &file],
    );
    let copy = cluster().empty_database("clean_2", "");
    let psql = [
        "-X",
        "-q",
        "-v",
        "ON_ERROR_STOP=1",
        "-d",
        "clean_2",
        "-f",
        &file,
    ];
    cluster().tool("psql", &psql);
    copy.connect()
        .run("INSERT INTO t VALUES (0, 'late', encrypt_col('late', 'pii', '0'))");
    let output = cluster().try_tool("psql", &psql, "");
    assert!(
        !output.status.success(),
        "the guard lets a clean restore pass"
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("rekey.allow_drop"), "{said}");
    let still = copy
        .connect()
        .number("SELECT count(*) FROM rekey.slots WHERE state IN ('active', 'previous')");
    assert_eq!(still, 3, "the keys are still there");
    let output = cluster().try_tool("psql", &psql, "-c rekey.allow_drop=on");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    is_whole(&source, &copy);
}

#[test]
fn under_another_root_key_the_error_says_which_one_is_missing() {
    let source = source("abroad");
    let file = path("abroad.dump");
    cluster().tool("pg_dump", &["-Fc", "-O", "-x", "-d", "abroad", "-f", &file]);
    let elsewhere = Cluster::start(Options::unloaded());
    elsewhere.database("local");
    elsewhere.empty_database("abroad", "");
    elsewhere
        .connect("postgres")
        .run("CREATE ROLE abroad_reader LOGIN");
    elsewhere.tool("pg_restore", &["-e", "-d", "abroad", &file]);
    let mut client = elsewhere.connect("abroad");
    let root = source.connect().text("SELECT root_id FROM rekey.root_keys");
    for sql in [
        "SELECT decrypt_col(c, id::text) FROM t",
        "SELECT encrypt_col('x', 'pii')",
        "SELECT rotate_key('pii')",
        "SELECT rekey.create_key('new')",
    ] {
        client.refuse(sql, "F0000").names(&root);
    }
    assert!(!client.truth("SELECT rekey.ready()"));
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.slots WHERE key_name = 'pii'"),
        2
    );
}

#[test]
fn a_database_copied_as_a_template() {
    let source = source("template");
    cluster()
        .connect("postgres")
        .run("CREATE DATABASE template_2 TEMPLATE template");
    let target = Database {
        cluster: cluster(),
        name: "template_2".to_owned(),
    };
    let role = "SELECT count(*) FROM rekey.key_grant WHERE grantee::text ~ '^[0-9]+$'";
    // Unlike a dump, a copy keeps the grant of the dropped role.
    assert_eq!(target.connect().number(role), 1);
    target
        .connect()
        .run("DELETE FROM rekey.key_grant WHERE grantee::text ~ '^[0-9]+$'");
    is_whole(&source, &target);
}
