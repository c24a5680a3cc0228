//! pg_upgrade from each major version to the next: everything opens, rotation goes on.
//!
//! Run by `make test-all`, which builds the extension for all of them and names the folders of
//! their programs: REKEY_PG15_BIN, REKEY_PG16_BIN, REKEY_PG18_BIN. Without these nothing is tried,
//! and that is said.

use std::fs;
use std::path::{Path, PathBuf};

use postgres::Client;
use rekey_tests::{Ask, Cluster, Options};

const ROWS: i64 = 300;

fn programs(major: u32) -> Option<PathBuf> {
    std::env::var_os(format!("REKEY_PG{major}_BIN")).map(PathBuf::from)
}

/// Without a worker: what is compared before and after must be what the upgrade has done.
fn by_hand(programs: &Path) -> Options {
    Options::preloaded().set("rekey.worker = off").of(programs)
}

/// Recent minor releases mark every column with an option of their own, which their pg_dump leaves
/// out of dumps. The pg_dump of an earlier minor release of the next major does not, and its
/// server refuses the option: for any table, whoever made it. The marks go first, then, so that
/// the way is open whichever minor releases meet here.
fn forget_marks(cluster: &Cluster, next: &Path) {
    const MARK: &str = "pg_attver";
    let pg_dump = fs::read(next.join("pg_dump")).expect("pg_dump");
    if pg_dump.windows(MARK.len()).any(|w| w == MARK.as_bytes()) {
        return;
    }
    cluster.connect("app").run(&format!(
        "SET allow_system_table_mods = on;
         UPDATE pg_attribute SET attoptions = NULL
          WHERE attrelid >= 16384 AND attoptions::text LIKE '{{{MARK}=%'"
    ));
}

/// What must come through as it was; the upgrade writes nothing of it anew.
fn catalog(client: &mut Client) -> Vec<Vec<Option<String>>> {
    let mut rows = Vec::new();
    for sql in [
        "SELECT * FROM rekey.keys ORDER BY key_name",
        "SELECT * FROM rekey.slots ORDER BY slot_id",
        "SELECT * FROM rekey.grants ORDER BY key_name, grantee, privilege",
        "SELECT * FROM rekey.root_keys ORDER BY root_id",
        "SELECT * FROM rekey.audit ORDER BY audit_id",
        "SELECT * FROM rekey.columns ORDER BY table_name::text, column_name",
        "SELECT * FROM rekey.live_columns ORDER BY trigger_name",
        "SELECT table_name, column_name, into_column, source FROM rekey.live_column
          ORDER BY trigger_name",
        // Triggers of the tables: they are enabled as they were.
        "SELECT tgrelid::regclass::text, tgname, tgenabled, pg_get_triggerdef(oid)
           FROM pg_trigger WHERE tgrelid IN ('t'::regclass, 'filled'::regclass)
            AND NOT tgisinternal ORDER BY 1, 2",
        "SELECT extversion FROM pg_extension WHERE extname = 'pg_rekey'",
        // What pg_dump is to carry, and who may do what.
        "SELECT c::regclass::text, d FROM pg_extension,
                LATERAL unnest(extconfig, extcondition) AS u (c, d)
          WHERE extname = 'pg_rekey' ORDER BY 1",
        "SELECT p.oid::regprocedure::text,
                (SELECT string_agg(a::text, ' ' ORDER BY a::text)
                   FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a)
           FROM pg_proc p JOIN pg_depend e ON e.objid = p.oid AND e.deptype = 'e'
           JOIN pg_extension x ON x.oid = e.refobjid AND x.extname = 'pg_rekey'
          WHERE e.classid = 'pg_proc'::regclass ORDER BY 1",
        "SELECT evtname, evtenabled FROM pg_event_trigger ORDER BY 1",
        "SELECT tgrelid::regclass::text, tgname, tgenabled FROM pg_trigger
          WHERE tgrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'rekey'::regnamespace)
            AND NOT tgisinternal ORDER BY 1, 2",
    ] {
        rows.extend(client.rows(sql));
    }
    rows
}

/// What every server in the row owes its predecessor.
fn lives_on(cluster: &Cluster, versions: i64) {
    let mut client = cluster.connect("app");
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE decrypt_col(c, id::text) = v"),
        ROWS,
        "every value opens"
    );
    assert_eq!(
        client.text("SELECT decrypt_col_as(amount, NULL::numeric) FROM typed"),
        "12.50"
    );
    let mut reader = cluster.connect_as("app", "reader");
    assert_eq!(reader.number("SELECT count(v) FROM opened"), ROWS);
    reader.refuse("SELECT encrypt_col('x', 'pii')", "42501");
    assert!(client.truth("SELECT rekey.ready()"));
    // Direct changes and a drop are refused as before.
    client.refuse("DELETE FROM rekey.key_slot", "55000");
    client.refuse("DROP EXTENSION pg_rekey CASCADE", "55000");
    let before = client.text("SELECT active_slot FROM rekey.keys WHERE key_name = 'pii'");
    client.run("SELECT rotate_key('pii', 'after pg_upgrade')");
    let after = client.text("SELECT active_slot FROM rekey.keys WHERE key_name = 'pii'");
    assert_ne!(before, after);
    client.run("UPDATE t SET c = encrypt_col(v, 'pii', id::text) WHERE id % 3 = 0");
    assert_eq!(
        client.text("SELECT rekey.slot_id(c)::text FROM t WHERE id = 3"),
        after
    );
    assert_eq!(
        client.number("SELECT max(version) FROM rekey.slots WHERE key_name = 'pii'"),
        versions
    );
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE decrypt_col(c, id::text) = v"),
        ROWS
    );
    // An update of another column re-encrypts on touch, and a live column is kept filled.
    client.run("UPDATE t SET v = v WHERE id = 4");
    assert_eq!(
        client.text("SELECT rekey.slot_id(c)::text FROM t WHERE id = 4"),
        after
    );
    client.run(&format!("INSERT INTO filled VALUES ({versions}, 'live')"));
    assert!(client.truth("SELECT bool_and(decrypt_col(sealed) = v) FROM filled"));
    // The registration is followed by number here too, and the proof is made of this server.
    assert_eq!(
        client.column("SELECT column_name FROM rekey.columns WHERE NOT missing ORDER BY 1"),
        ["amount", "c", "sealed"]
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE rekey.is_stale(c)"),
        0
    );
    assert!(client.truth("SELECT bool_and(sealed IS NOT NULL) FROM filled"));
    assert_eq!(
        client.column(
            "SELECT DISTINCT state FROM rekey.slots WHERE key_name = 'pii' AND state <> 'active'"
        ),
        ["drained"]
    );
    assert_eq!(
        client.number(
            "SELECT jsonb_array_length(proof->'tables') FROM rekey.slots \
              WHERE key_name = 'pii' AND state = 'drained' ORDER BY version DESC LIMIT 1"
        ),
        3
    );
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE decrypt_col(c, id::text) = v"),
        ROWS
    );
}

#[test]
fn sealed_data_survives_pg_upgrade_to_each_next_major_version() {
    let majors = [15, 16, 18];
    let known: Vec<PathBuf> = majors.into_iter().filter_map(programs).collect();
    if known.len() < majors.len() {
        println!("not tried: REKEY_PG15_BIN, REKEY_PG16_BIN and REKEY_PG18_BIN are not all set");
        return;
    }
    let mut cluster = Cluster::start(by_hand(&known[0]));
    let database = cluster.database("app");
    database.connect().run(&format!(
        "CREATE ROLE reader LOGIN;
         SELECT rekey.create_key('pii', grace => '5 days'); SELECT rekey.create_key('ended');
         SELECT rekey.shred_key('ended', 'over');
         CREATE TABLE t (id int PRIMARY KEY, v text, gone text, was bytea);
         INSERT INTO t (id, v, was) SELECT i, 'v' || i, encrypt_col('v' || i, 'pii', i::text)
             FROM generate_series(1, {ROWS}) i;
         SELECT rekey.register_column('t', 'was', 'id::text');
         ALTER TABLE t RENAME was TO c; ALTER TABLE t DROP gone;
         SELECT rekey.enable_touch('t');
         CREATE TABLE filled (id int PRIMARY KEY, v text);
         INSERT INTO filled VALUES (1, 'one');
         SELECT rekey.encrypt_column('filled', 'v', 'sealed', 'pii');
         SELECT rotate_key('pii');
         UPDATE t SET c = encrypt_col(v, 'pii', id::text) WHERE id % 2 = 0;
         CREATE TABLE typed AS SELECT encrypt_col(12.50::numeric, 'pii') AS amount;
         SELECT rekey.register_column('typed', 'amount');
         CREATE VIEW opened AS SELECT id, decrypt_col(c, id::text) AS v FROM t;
         GRANT SELECT ON t, opened TO reader;
         SELECT rekey.grant_key('pii', 'reader', '{{decrypt}}')"
    ));
    for (step, programs) in known.iter().enumerate().skip(1) {
        let before = catalog(&mut cluster.connect("app"));
        forget_marks(&cluster, programs);
        cluster = cluster.upgrade(by_hand(programs));
        let after = catalog(&mut cluster.connect("app"));
        assert_eq!(before.len(), after.len());
        for (was, is) in before.iter().zip(&after) {
            assert_eq!(was, is, "to {}", programs.display());
        }
        lives_on(&cluster, 2 + i64::try_from(step).expect("a small number"));
    }
}
