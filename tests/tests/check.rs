//! rekey.check() and rekey.metrics: each finding is provoked, seen with its remedy, mended by that
//! remedy where it is SQL, and gone. What is watched is never changed, and no value is shown.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, GATE, Options, wait_until};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded().set("rekey.worker = off")))
}

/// A database with a key of no grace and a registered column of fifty envelopes.
fn database(name: &str) -> Database<'static> {
    let database = cluster().database(name);
    database.connect().run(SETUP);
    database
}

const SETUP: &str = "
    SELECT rekey.create_key('pii', grace => '0');
    CREATE TABLE t (id int PRIMARY KEY, c bytea);
    INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii') FROM generate_series(1, 50) AS i;
    SELECT rekey.register_column('t', 'c')";

#[derive(Clone, Debug)]
struct Finding {
    severity: String,
    object: String,
    finding: String,
    remedy: String,
}

fn findings(client: &mut Client) -> Vec<Finding> {
    let rows = client.rows("SELECT severity, object, finding, remedy FROM rekey.check()");
    rows.into_iter()
        .map(|row| {
            let mut cells = row.into_iter().map(|cell| cell.expect("a cell"));
            let mut next = || cells.next().expect("four cells");
            Finding {
                severity: next(),
                object: next(),
                finding: next(),
                remedy: next(),
            }
        })
        .collect()
}

fn find(client: &mut Client, object: &str, words: &str) -> Option<Finding> {
    findings(client)
        .into_iter()
        .find(|found| found.object == object && found.finding.contains(words))
}

/// The finding about `object` in these words; it has a remedy.
#[track_caller]
fn reported(client: &mut Client, severity: &str, object: &str, words: &str) -> Finding {
    let Some(found) = find(client, object, words) else {
        panic!("{object}: {words:?} is not among {:#?}", findings(client));
    };
    assert_eq!(found.severity, severity, "{found:?}");
    assert!(!found.remedy.is_empty(), "{found:?}");
    found
}

#[track_caller]
fn gone(client: &mut Client, object: &str, words: &str) {
    let found = find(client, object, words);
    assert!(found.is_none(), "{found:?}");
}

/// Pastes a remedy, statement by statement: ALTER SYSTEM wants no transaction block.
fn apply(client: &mut Client, remedy: &str) {
    let sql = remedy.split(" -- ").next().expect("the SQL");
    for statement in sql.split("; ") {
        client.run(statement);
    }
}

/// Reported, mended by its remedy, gone.
#[track_caller]
fn mended(client: &mut Client, severity: &str, object: &str, words: &str) {
    let found = reported(client, severity, object, words);
    apply(client, &found.remedy);
    gone(client, object, words);
}

/// The same for a setting, which counts once the configuration was read again.
#[track_caller]
fn mended_by_reload(client: &mut Client, severity: &str, object: &str, words: &str) {
    let found = reported(client, severity, object, words);
    apply(client, &found.remedy);
    wait_until("the setting counts", || {
        find(client, object, words).is_none()
    });
}

fn root_id(client: &mut Client) -> String {
    client.text("SELECT root_id FROM rekey.root_keys WHERE state = 'active'")
}

#[test]
fn a_clean_installation_shows_facts_and_neither_errors_nor_warnings() {
    let mut client = cluster().database("clean").connect();
    client.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t (id int PRIMARY KEY, c bytea);
         INSERT INTO t VALUES (1, encrypt_col('x', 'pii', rekey.context('t.c', '1')));
         SELECT rekey.register_column('t', 'c', 'rekey.context(''t.c'', id::text)')",
    );
    let found = findings(&mut client);
    let root = format!("root key {}", root_id(&mut client));
    assert!(
        found.iter().all(|finding| finding.severity == "notice"),
        "{found:#?}"
    );
    assert_eq!(found.len(), 1, "{found:#?}");
    reported(&mut client, "notice", &root, "held here; it wraps 1 slots");
}

#[test]
fn a_database_without_a_root_key_is_told_to_adopt_one() {
    let database = cluster().empty_database("rootless", "");
    let mut client = database.connect();
    client.run("CREATE EXTENSION pg_rekey");
    cluster().database("rootless_first"); // the file is there, whichever test runs first
    mended(&mut client, "warning", "root keys", "adopted none");
}

#[test]
fn only_pg_monitor_may_check_and_read_metrics() {
    let database = database("callers");
    let (monitor, other) = (database.role("monitor"), database.role("other"));
    let mut client = database.connect();
    client.run(&format!("GRANT pg_monitor TO \"{monitor}\""));
    let mut monitor = database.connect_as(&monitor);
    reported(
        &mut monitor,
        "notice",
        "column public.t.c",
        "without a context",
    );
    assert_eq!(
        metric(&mut monitor, "pg_rekey_slots", "{\"state\": \"active\"}"),
        1.0
    );
    assert_eq!(metric(&mut monitor, "pg_rekey_ready", "{}"), 1.0);
    assert_eq!(
        metric(&mut monitor, "pg_rekey_root_keys_missing", "{}"),
        0.0
    );
    let mut other = database.connect_as(&other);
    other.fail("SELECT * FROM rekey.check()", "42501");
    other.fail("SELECT rekey.check_findings()", "42501");
    other.fail("SELECT * FROM rekey.metrics", "42501");
}

#[test]
fn it_writes_nothing_and_assigns_no_transaction_id() {
    let mut client = database("readonly").connect();
    client.run("SELECT rotate_key('pii'); CREATE TABLE u AS SELECT * FROM t");
    client.run("BEGIN READ ONLY");
    reported(
        &mut client,
        "warning",
        "column public.u.c",
        "not registered",
    );
    assert!(client.number("SELECT count(*) FROM rekey.metrics") > 0);
    let xid = client.cell("SELECT pg_current_xact_id_if_assigned()::text");
    assert_eq!(xid, None);
    client.run("COMMIT");
}

#[test]
fn a_probe_that_cannot_run_is_a_finding_and_hides_no_other() {
    let mut client = database("probes").connect();
    client.run("SELECT rotate_key('pii'); ALTER TABLE rekey.pause RENAME TO elsewhere");
    reported(
        &mut client,
        "warning",
        "pauses",
        "could not be looked at: SQLSTATE 42P01",
    );
    reported(&mut client, "warning", "progress", "SQLSTATE 42P01");
    let slot = client.text("SELECT slot_id FROM rekey.slots WHERE state = 'previous'");
    let slot = format!("slot {slot} of key pii");
    reported(&mut client, "warning", &slot, "not proved unused");
    client.run("ALTER TABLE rekey.elsewhere RENAME TO pause");
    gone(&mut client, "pauses", "could not be looked at");
}

#[test]
fn a_cancel_ends_the_check_and_is_no_finding() {
    let mut client = database("cancelled").connect();
    client.run("SELECT * FROM rekey.check()");
    client.run("SET statement_timeout = '1ms'");
    // Between two checks it may hit the statement, and is told in PostgreSQL's words.
    wait_until("a probe is cancelled", || {
        let sql = "SELECT count(*) FROM generate_series(1, 1000), rekey.check()";
        let refusal = client.fail(sql, "57014");
        refusal.message == "the check was cancelled" && !refusal.hint.is_empty()
    });
}

#[test]
fn no_finding_shows_a_value() {
    let mut client = database("values").connect();
    client.run(
        "INSERT INTO t VALUES (51, 'SECRET-1');
         CREATE TABLE u (c bytea DEFAULT 'SECRET-2', d bytea);
         INSERT INTO u SELECT 'SECRET-3', encrypt_col('SECRET-4', 'pii');
         ALTER TABLE t ADD CHECK (c <> 'SECRET-5')",
    );
    let shown = format!("{:?}", findings(&mut client));
    assert!(shown.contains("public.u.d"), "{shown}");
    assert!(!shown.contains("SECRET"), "{shown}");
}

#[test]
fn a_keyring_file_that_others_may_read_or_that_lies_in_the_data_directory() {
    let cluster = Cluster::start(Options::preloaded());
    let mut client = cluster.database("files").connect();
    client.run("SELECT rekey.create_key('pii')");
    let (file, source) = (cluster.root_key_file(), "root key source");
    let keyring = std::fs::read(&file).expect("the keyring");
    cluster.write_file(&file, &keyring, 0o644);
    reported(&mut client, "error", source, "has mode 0644");
    cluster.write_file(&file, &keyring, 0o600);
    gone(&mut client, source, "");

    let inside = cluster.data().join("root.json");
    cluster.write_file(&inside, &keyring, 0o600);
    cluster.append(&format!("rekey.root_key_file = '{}'", inside.display()));
    cluster.reload(&mut client);
    reported(&mut client, "error", source, "belongs to the cluster");
    cluster.append(&format!("rekey.root_key_file = '{}'", file.display()));
    cluster.reload(&mut client);
    gone(&mut client, source, "");

    for (content, words) in [
        (&b""[..], "is not valid"),
        (&keyring[..keyring.len() / 2], "is not valid"),
        (b"\xff\xfe", "is not valid"),
    ] {
        cluster.write_file(&file, content, 0o600);
        reported(&mut client, "error", source, words);
    }
    std::fs::remove_file(&file).expect("the file removed");
    reported(&mut client, "error", source, "could not be opened");
    cluster.write_file(&file, &keyring, 0o600);
    gone(&mut client, source, "");
}

/// What a restore, or whoever passes the guards, does to the catalog.
fn as_replica(client: &mut Client, sql: &str) {
    client.run(&format!(
        "BEGIN; SET LOCAL session_replication_role = replica; {sql}; COMMIT"
    ));
}

#[test]
fn root_keys_that_the_catalog_has_wrong_that_nobody_knows_or_that_have_leaked() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.worker = off"));
    let mut client = cluster.database("wrong").connect();
    client.run(SETUP);
    let first = root_id(&mut client);
    let old = format!("root key {first}");
    client.run("CREATE TABLE saved AS SELECT * FROM rekey.slot_wrap");
    as_replica(&mut client, "DELETE FROM rekey.slot_wrap");
    let words = "1 slots have no wrapped key";
    reported(&mut client, "error", "slots", words);
    as_replica(
        &mut client,
        "INSERT INTO rekey.slot_wrap SELECT * FROM saved",
    );
    gone(&mut client, "slots", "");

    let flip = "UPDATE rekey.root_key SET root_check = set_byte(root_check, 0, \
                get_byte(root_check, 0) # 1)";
    as_replica(&mut client, flip);
    let words = "its check value in the catalog is another one";
    reported(&mut client, "error", &old, words);
    as_replica(&mut client, flip);
    gone(&mut client, &old, words);

    // Another database has rotated: the file has a root key that is not known here.
    let mut other = cluster.database("other").connect();
    let second = other.text("SELECT rekey.rotate_root_key()");
    let new = format!("root key {second}");
    cluster.reload(&mut client);
    let words = "this database does not know it";
    reported(&mut client, "notice", &new, words);
    client.run("SELECT rekey.rotate_root_key()");
    gone(&mut client, &new, words);

    // Not held, and no slot needs it.
    let both = std::fs::read_to_string(cluster.root_key_file()).expect("the keyring");
    let begin = both.rfind("{\"id\"").expect("an entry");
    let only = format!("{{\"version\":1,\"keys\":[{}", &both[begin..]);
    cluster.write_file(&cluster.root_key_file(), only.as_bytes(), 0o600);
    cluster.reload(&mut client);
    let words = "previous, not held here; it wraps 1 slots";
    reported(&mut client, "notice", &old, words);
    cluster.write_file(&cluster.root_key_file(), both.as_bytes(), 0o600);
    cluster.reload(&mut client);
    gone(&mut client, &old, "not held here");

    client.run(&format!(
        "SELECT rekey.mark_compromised_root('{first}', 'a backup was stolen')"
    ));
    mended(&mut client, "warning", &old, "compromised, held here");
    gone(&mut client, &old, "");
}

#[test]
fn a_keyring_file_that_was_exchanged_and_not_read_again() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.worker = off"));
    let other = Cluster::start(Options::preloaded());
    other.database("other");
    let database = cluster.database("exchanged");
    let mut client = database.connect();
    client.run(SETUP);
    let root = format!("root key {}", root_id(&mut client));
    let right = std::fs::read(cluster.root_key_file()).expect("the keyring");
    let wrong = std::fs::read(other.root_key_file()).expect("another keyring");
    drop(client);
    cluster.restart("fast");
    cluster.write_file(&cluster.root_key_file(), &wrong, 0o600);
    // What the server has read at its start still opens everything: nobody notices.
    let mut client = database.connect();
    assert!(client.truth("SELECT rekey.ready()"));
    assert_eq!(client.number("SELECT count(decrypt_col(c)) FROM t"), 50);
    let words = "the keyring file does not have it any more: 1 of the 1 slots";
    reported(&mut client, "error", &root, words);
    cluster.write_file(&cluster.root_key_file(), &right, 0o600);
    gone(&mut client, &root, words);
    reported(&mut client, "notice", &root, "active, held here");
}

#[test]
fn a_server_without_a_source_of_root_keys() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.root_key_file = ''"));
    let mut client = cluster.empty_database("sourceless", "").connect();
    client.run("CREATE EXTENSION pg_rekey");
    let (source, words) = ("root key source", "Neither rekey.root_key_file nor");
    reported(&mut client, "warning", source, words);
    cluster.append(&format!(
        "rekey.root_key_file = '{}'",
        cluster.root_key_file().display()
    ));
    cluster.reload(&mut client);
    gone(&mut client, source, "");
    mended(&mut client, "warning", "root keys", "adopted none");
}

#[test]
fn each_root_key_says_whether_this_server_holds_it() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.worker = off"));
    let mut client = cluster.database("roots").connect();
    client.run(SETUP);
    let first = root_id(&mut client);
    let old = std::fs::read(cluster.root_key_file()).expect("the keyring");
    client.run("SELECT rekey.rotate_root_key()");
    let second = root_id(&mut client);
    let (first, second) = (format!("root key {first}"), format!("root key {second}"));
    reported(
        &mut client,
        "notice",
        &first,
        "previous, held here; it wraps 1 slots",
    );
    reported(&mut client, "notice", &second, "active, held here");
    // A server that has not got the new file.
    let new = std::fs::read(cluster.root_key_file()).expect("the keyring");
    cluster.write_file(&cluster.root_key_file(), &old, 0o600);
    cluster.reload(&mut client);
    reported(
        &mut client,
        "error",
        &second,
        "does not hold it: 0 of the 1 slots that it wraps do not open here",
    );
    assert_eq!(metric(&mut client, "pg_rekey_root_keys_missing", "{}"), 1.0);
    assert_eq!(metric(&mut client, "pg_rekey_ready", "{}"), 0.0);
    cluster.write_file(&cluster.root_key_file(), &new, 0o600);
    cluster.reload(&mut client);
    gone(&mut client, &second, "does not hold it");
    mended(&mut client, "notice", &first, "previous, held here");
    // The remedy has retired the first: a server with the old file holds nothing that is needed.
    cluster.write_file(&cluster.root_key_file(), &old, 0o600);
    cluster.reload(&mut client);
    reported(
        &mut client,
        "error",
        &second,
        "does not hold it: 1 of the 1 slots that it wraps do not open here",
    );
}

/// Whether a library of contrib is there.
fn has_library(client: &mut Client, name: &str) -> bool {
    client.attempt(&format!("LOAD '{name}'")).is_ok()
}

/// As a restore of some rows leaves it, or an apply worker whose publisher shares the root key.
#[test]
fn slots_that_only_a_retired_root_key_opens() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.worker = off"));
    let mut client = cluster.database("app").connect();
    client.run(SETUP);
    client.run("CREATE TABLE saved AS SELECT * FROM rekey.slot_wrap");
    let old = client.text("SELECT root_id FROM rekey.root_keys");
    client.run("SELECT rekey.rotate_root_key()");
    client.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    let words = "retired root keys only";
    gone(&mut client, "slots", words);
    client.run(
        "SET session_replication_role = replica; DELETE FROM rekey.slot_wrap;
         INSERT INTO rekey.slot_wrap SELECT * FROM saved; RESET session_replication_role",
    );
    let open = "SELECT count(decrypt_col(c)) FROM t";
    assert_eq!(cluster.connect("app").number(open), 50);
    mended(&mut client, "warning", "slots", words);
    client.run("RESET ALL");
    assert_eq!(cluster.connect("app").number(open), 50);
}

#[test]
fn settings_that_write_literals_and_a_missing_preload() {
    let cluster = Cluster::start(
        Options::unloaded()
            .set("log_statement = 'mod'")
            .set("log_min_duration_statement = 0")
            .set("log_min_duration_sample = 10")
            .set("log_transaction_sample_rate = 0.5")
            .set("log_parameter_max_length_on_error = -1")
            .set("debug_print_plan = on"),
    );
    let database = cluster.database("logs");
    let mut client = database.connect();
    client.run(SETUP);
    client.run("ALTER DATABASE logs SET log_statement = 'all'; CREATE ROLE logs_app");
    client.run("ALTER ROLE logs_app IN DATABASE logs SET log_min_duration_statement = '5s'");
    client.run("ALTER ROLE ALL SET rekey.allow_drop = on");
    drop(client);
    let mut client = database.connect();
    for object in [
        "setting log_min_duration_statement of ROLE logs_app IN DATABASE logs",
        "setting log_statement of DATABASE logs",
        "setting rekey.allow_drop of ROLE ALL",
    ] {
        mended(&mut client, "warning", object, "");
    }
    drop(client);
    let mut client = database.connect();
    let parameters = "setting log_parameter_max_length";
    reported(&mut client, "warning", parameters, "bind parameters");
    for name in [
        "log_statement",
        "log_min_duration_statement",
        "log_min_duration_sample",
        "log_transaction_sample_rate",
        "log_parameter_max_length_on_error",
        "debug_print_plan",
    ] {
        mended_by_reload(&mut client, "warning", &format!("setting {name}"), "");
    }
    gone(&mut client, parameters, "");
    let failing = "setting log_min_error_statement";
    reported(&mut client, "notice", failing, "without the preload");
    if has_library(&mut client, "auto_explain") {
        client.run("ALTER SYSTEM SET auto_explain.log_min_duration = '1s'");
        cluster.reload(&mut client);
        let object = "setting auto_explain.log_min_duration";
        mended_by_reload(&mut client, "warning", object, "plans are logged");
    } else {
        eprintln!("not tried: auto_explain is not installed");
    }
    let object = "setting shared_preload_libraries";
    let found = reported(&mut client, "warning", object, "not preloaded");
    apply(&mut client, &found.remedy);
    drop(client);
    cluster.restart("fast");
    let mut client = database.connect();
    gone(&mut client, object, "");
    gone(&mut client, failing, "");
}

#[test]
fn the_other_settings_that_write_literals_and_the_extensions_that_keep_them() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("log_statement = 'ddl'")
            .set("debug_print_parse = on")
            .set("debug_print_rewritten = on"),
    );
    let database = cluster.database("printing");
    let mut client = database.connect();
    client.run(SETUP);
    mended_by_reload(&mut client, "notice", "setting log_statement", "other DDL");
    for name in ["debug_print_parse", "debug_print_rewritten"] {
        let object = format!("setting {name}");
        mended_by_reload(&mut client, "warning", &object, "are logged");
    }
    // It need not be installed for its setting to be there.
    client.run("ALTER DATABASE printing SET pgaudit.log = 'read, write'");
    let object = "setting pgaudit.log of DATABASE printing";
    mended(&mut client, "warning", object, "statements are logged");

    let missing = ["pg_stat_statements", "auto_explain"]
        .into_iter()
        .find(|name| !has_library(&mut client, name));
    if let Some(name) = missing {
        eprintln!("not tried: {name} is not installed");
        return;
    }
    drop(client);
    cluster.append("shared_preload_libraries = 'pg_stat_statements, auto_explain, pg_rekey'");
    cluster.append("auto_explain.log_min_duration = '1s'");
    cluster.restart("fast");
    let mut client = database.connect();
    let object = "setting pg_stat_statements.track_utility";
    mended_by_reload(
        &mut client,
        "notice",
        object,
        "are kept in pg_stat_statements",
    );
    let parameters = "auto_explain.log_parameter_max_length";
    let known = format!("SELECT EXISTS (SELECT FROM pg_settings WHERE name = '{parameters}')");
    if client.truth(&known) {
        let object = format!("setting {parameters}");
        mended_by_reload(&mut client, "warning", &object, "bind parameters");
    }
    let object = "setting auto_explain.log_min_duration";
    mended_by_reload(&mut client, "warning", object, "plans are logged");
    gone(&mut client, "setting shared_preload_libraries", "");
}

#[test]
fn the_remedy_for_the_preload_keeps_what_is_preloaded() {
    let cluster = Cluster::start(Options::unloaded());
    if !has_library(&mut cluster.connect("postgres"), "auto_explain") {
        eprintln!("not tried: auto_explain is not installed");
        return;
    }
    cluster.append("shared_preload_libraries = 'auto_explain'");
    cluster.restart("fast");
    let database = cluster.database("kept");
    let mut client = database.connect();
    let object = "setting shared_preload_libraries";
    let found = reported(&mut client, "warning", object, "not preloaded");
    apply(&mut client, &found.remedy);
    drop(client);
    cluster.restart("fast");
    let mut client = database.connect();
    gone(&mut client, object, "");
    let list = client.text("SHOW shared_preload_libraries");
    assert_eq!(list.replace(' ', ""), "auto_explain,pg_rekey");
}

/// The tables of the catalog that pg_dump carries.
const CARRIED_BY_DUMPS: &[&str] = &[
    "key",
    "key_slot",
    "slot_wrap",
    "root_key",
    "key_grant",
    "registered_column",
    "live_column",
    "audit_log",
];

/// What pg_dump -a --disable-triggers writes about the catalog and about these tables.
fn as_a_restore_leaves_them(client: &mut Client, tables: &[&str]) {
    let carried = client.column(
        "SELECT unnest(extconfig)::regclass::text FROM pg_extension WHERE extname = 'pg_rekey'",
    );
    let of_catalog = CARRIED_BY_DUMPS.iter().map(|name| format!("rekey.{name}"));
    let known: BTreeSet<String> = of_catalog.clone().collect();
    let carried: BTreeSet<String> = carried
        .into_iter()
        .filter(|name| name != "rekey.audit_id")
        .collect();
    assert_eq!(carried, known);
    for table in of_catalog.chain(tables.iter().map(|name| (*name).to_owned())) {
        client.run(&format!(
            "ALTER TABLE {table} DISABLE TRIGGER ALL; ALTER TABLE {table} ENABLE TRIGGER ALL"
        ));
    }
}

#[test]
fn the_one_statement_of_the_readme_mends_every_trigger_that_a_restore_has_degraded() {
    let database = database("readme_triggers");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.enable_touch('t');
         CREATE TABLE l (id int PRIMARY KEY, email text);
         SELECT rekey.encrypt_column('l', 'email', 'sealed', 'pii')",
    );
    let ours =
        "SELECT tgrelid::regclass || ' ' || concat_ws(' ', tgname, tgenabled) FROM pg_trigger
                 WHERE NOT tgisinternal ORDER BY 1";
    let made = client.column(ours);
    as_a_restore_leaves_them(&mut client, &["t", "l"]);
    assert_ne!(client.column(ours), made);
    let readme = read("README.md");
    let block = readme
        .split("```sql\n")
        .filter_map(|rest| rest.split("```").next())
        .find(|block| block.contains("\\gexec"))
        .expect("the statement in README.md");
    let file = cluster().dir().join("mend.sql");
    cluster().write_file(&file, block.as_bytes(), 0o644);
    let file = file.display().to_string();
    let psql = ["-X", "-v", "ON_ERROR_STOP=1", "-d", "readme_triggers", "-f"];
    cluster().tool("psql", &[&psql[..], &[&file]].concat());
    assert_eq!(client.column(ours), made);
    let again = cluster().tool("psql", &[&psql[..], &[&file]].concat());
    assert_eq!(again, "", "it prints nothing more");
}

#[test]
fn triggers_as_a_restore_leaves_them_and_triggers_that_are_gone() {
    let mut client = database("triggers").connect();
    client.run("SELECT rekey.enable_touch('t')");
    gone(&mut client, "trigger zzz_rekey_touch on public.t", "");
    as_a_restore_leaves_them(&mut client, &["t"]);
    client.run("ALTER EVENT TRIGGER pg_rekey_guard_drop ENABLE");
    client.run("ALTER TABLE rekey.audit_log DISABLE TRIGGER refuse_direct_change");
    for relation in ["key", "key_slot", "slot_wrap", "key_grant"] {
        let object = format!("triggers of rekey.{relation}");
        let words = "announce_change, announce_truncate is enabled as ORIGIN, not ALWAYS";
        mended(&mut client, "warning", &object, words);
    }
    for relation in ["registered_column", "live_column"] {
        let object = format!("triggers of rekey.{relation}");
        let words = "stamp_registration is enabled as ORIGIN, not ALWAYS";
        mended(&mut client, "warning", &object, words);
    }
    for relation in CARRIED_BY_DUMPS {
        let object = format!("triggers of rekey.{relation}");
        let made = if *relation == "audit_log" {
            "ALWAYS"
        } else {
            "REPLICA"
        };
        let words = format!("yield_to_local is enabled as ORIGIN, not {made}");
        mended(&mut client, "warning", &object, &words);
    }
    for (severity, object, words) in [
        ("error", "triggers of rekey.audit_log", "is disabled"),
        (
            "warning",
            "event trigger pg_rekey_guard_drop",
            "not enabled as ALWAYS",
        ),
        (
            "warning",
            "trigger zzz_rekey_touch on public.t",
            "not enabled as ALWAYS",
        ),
    ] {
        mended(&mut client, severity, object, words);
    }
    client.run("ALTER TABLE rekey.key ENABLE ALWAYS TRIGGER refuse_direct_change");
    mended(
        &mut client,
        "warning",
        "triggers of rekey.key",
        "as ALWAYS, not ORIGIN",
    );
    for relation in ["progress_state", "backfill_state", "pause", "quarantine"] {
        let object = format!("triggers of rekey.{relation}");
        client.run(&format!(
            "ALTER TABLE rekey.{relation} DISABLE TRIGGER yield_to_local"
        ));
        mended(&mut client, "error", &object, "yield_to_local is disabled");
    }
    client.run("ALTER EVENT TRIGGER pg_rekey_follow_renames DISABLE");
    mended(
        &mut client,
        "error",
        "event trigger pg_rekey_follow_renames",
        "is disabled",
    );
    client.run("ALTER EXTENSION pg_rekey DROP EVENT TRIGGER pg_rekey_guard_drop");
    client.run("DROP EVENT TRIGGER pg_rekey_guard_drop");
    reported(
        &mut client,
        "error",
        "event trigger pg_rekey_guard_drop",
        "is gone",
    );
    // Made again, as the script of the extension makes it.
    client.run(
        "CREATE EVENT TRIGGER pg_rekey_guard_drop ON ddl_command_start
             WHEN TAG IN ('DROP EXTENSION', 'DROP SCHEMA', 'DROP OWNED')
             EXECUTE FUNCTION rekey.guard_drop()",
    );
    mended(
        &mut client,
        "warning",
        "event trigger pg_rekey_guard_drop",
        "not enabled as ALWAYS",
    );
    let trigger = client.text(
        "SELECT pg_get_triggerdef(oid) FROM pg_trigger
          WHERE tgrelid = 'rekey.key'::regclass AND tgname = 'announce_truncate'",
    );
    client.run("DROP TRIGGER announce_truncate ON rekey.key");
    let object = "triggers of rekey.key";
    reported(&mut client, "error", object, "announce_truncate is gone");
    client.run(&trigger);
    mended(
        &mut client,
        "warning",
        object,
        "is enabled as ORIGIN, not ALWAYS",
    );
    let left: Vec<Finding> = findings(&mut client)
        .into_iter()
        .filter(|found| found.object.contains("trigger"))
        .collect();
    assert!(left.is_empty(), "{left:#?}");
}

#[test]
fn envelopes_where_nobody_has_registered_them() {
    let mut client = database("places").connect();
    client.run(
        "CREATE TABLE copy AS SELECT id, c AS \"The C\" FROM t;
         CREATE TABLE big (id int, c bytea, filler text);
         INSERT INTO big SELECT i, NULL, repeat('x', 1000) FROM generate_series(1, 2000) AS i;
         INSERT INTO big SELECT 0, c, '' FROM t",
    );
    let envelope = client.text("SELECT c::text FROM t LIMIT 1");
    client.run(&format!("CREATE TABLE d (c bytea DEFAULT '{envelope}')"));
    mended(
        &mut client,
        "warning",
        "column public.copy.\"The C\"",
        "50 of 50 sampled values",
    );
    mended(
        &mut client,
        "warning",
        "column public.big.c",
        "the column is not registered",
    );
    mended(
        &mut client,
        "warning",
        "column public.d.c",
        "its default is an envelope",
    );
}

#[test]
fn a_check_reads_a_bounded_number_of_blocks_and_says_what_it_left_out() {
    let mut client = database("bounded").connect();
    client.run(
        "CREATE TABLE wide (id int, c bytea, filler text);
         ALTER TABLE wide ALTER filler SET STORAGE PLAIN;
         INSERT INTO wide SELECT i, encrypt_col('x', 'pii'), repeat('x', 2000)
           FROM generate_series(1, 400) AS i",
    );
    // Three rows a block, eight blocks: never all of the four hundred.
    let found = reported(
        &mut client,
        "warning",
        "column public.wide.c",
        "sampled values",
    );
    let sampled: i64 = found
        .finding
        .split(' ')
        .nth(2)
        .and_then(|number| number.parse().ok())
        .expect("a number of values");
    assert!((1..=32).contains(&sampled), "{found:?}");
    client.run(
        "DO $$ BEGIN FOR i IN 1 .. 260 LOOP
             EXECUTE format('CREATE TABLE many_%s (c bytea)', i);
         END LOOP; END $$",
    );
    let found = reported(
        &mut client,
        "notice",
        "unregistered columns",
        "were not looked at",
    );
    assert!(found.finding.starts_with("5 of them"), "{found:?}");
    client.run(&found.remedy);
}

#[test]
fn plaintext_and_other_strangers_in_a_registered_column() {
    let mut client = database("strangers").connect();
    let object = "column public.t.c";
    client.run("INSERT INTO t VALUES (51, 'in the clear'), (52, 'also')");
    mended(
        &mut client,
        "error",
        object,
        "2 of 52 sampled values are no envelopes",
    );
    assert_eq!(
        client.column("SELECT decrypt_col(c) FROM t WHERE id > 50 ORDER BY id"),
        ["in the clear", "also"]
    );
    client.run("INSERT INTO t SELECT 53, set_byte(c, 4, get_byte(c, 4) # 1) FROM t WHERE id = 1");
    reported(
        &mut client,
        "error",
        object,
        "1 of 53 sampled values name slots",
    );
    client.run("DELETE FROM t WHERE id = 53");
    client.run("INSERT INTO t VALUES (54, encrypt_col('x', 'pii', 'bound'))");
    reported(&mut client, "error", object, "bound to a context");
    client.run("DELETE FROM t WHERE id = 54");
    gone(&mut client, object, "sampled values");
    client.run(
        "SELECT rotate_key('pii');
         SELECT rekey.disable_slot(slot_id, force => true) FROM rekey.slots
          WHERE state = 'previous'",
    );
    let found = reported(&mut client, "error", object, "disabled or destroyed");
    client.run(found.remedy.split(';').next().expect("SQL"));
    gone(&mut client, object, "disabled or destroyed");
}

#[test]
fn plaintext_is_sealed_with_the_registered_context_by_the_remedy() {
    let mut client = database("contexts").connect();
    client.run(
        "CREATE TABLE \"It's\" (id int, \"C c\" bytea);
         INSERT INTO \"It's\" VALUES (1, encrypt_col('one', 'pii', rekey.context('x', '1'))),
                                   (2, 'two');
         SELECT rekey.register_column('\"It''s\"', 'C c', 'rekey.context(''x'', id::text)')",
    );
    mended(
        &mut client,
        "error",
        "column public.\"It's\".\"C c\"",
        "no envelopes: plaintext",
    );
    assert_eq!(
        client.column(
            "SELECT decrypt_col(\"C c\", rekey.context('x', id::text)) FROM \"It's\" ORDER BY id"
        ),
        ["one", "two"]
    );
}

#[test]
fn a_column_without_a_context_and_an_owner_who_cannot_evaluate_one() {
    let database = database("owners");
    let owner = database.role("owner");
    let mut client = database.connect();
    let object = "column public.t.c";
    mended(&mut client, "notice", object, "without a context");
    gone(&mut client, object, "cannot evaluate");
    client.run(&format!("ALTER TABLE t OWNER TO \"{owner}\""));
    client.run("REVOKE EXECUTE ON FUNCTION rekey.context(text[]) FROM PUBLIC");
    mended(&mut client, "error", object, "he lacks EXECUTE");
    client.run("REVOKE USAGE ON SCHEMA rekey FROM PUBLIC");
    mended(&mut client, "error", object, "he lacks USAGE");
}

#[test]
fn opened_values_that_are_stored_in_the_clear() {
    let mut client = database("copies").connect();
    client.run(
        "CREATE VIEW opened AS SELECT id, decrypt_col(c) AS v FROM t;
         CREATE MATERIALIZED VIEW clear AS SELECT v FROM opened;
         CREATE MATERIALIZED VIEW sealed AS SELECT id, c FROM t;
         CREATE MATERIALIZED VIEW counted AS SELECT count(id) FROM t;
         CREATE FUNCTION opens(c bytea) RETURNS text IMMUTABLE LANGUAGE sql
             AS 'SELECT public.decrypt_col(c)';
         CREATE FUNCTION opens_too(c bytea) RETURNS text IMMUTABLE LANGUAGE sql
             RETURN public.decrypt_col(c);
         CREATE FUNCTION decrypt_column(c bytea) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT 1';
         CREATE TABLE g (c bytea, v text GENERATED ALWAYS AS (opens_too(c)) STORED);
         CREATE INDEX by_value ON t (opens(c));
         CREATE STATISTICS by_statistics ON (opens(c)), id FROM t",
    );
    for (severity, object, words) in [
        ("error", "materialized view public.clear", "in the clear"),
        ("error", "index public.by_value", "in the clear"),
        ("error", "column public.g.v", "in the clear"),
        ("error", "statistics public.by_statistics", "in the clear"),
        ("warning", "function public.opens(bytea)", "IMMUTABLE"),
        ("warning", "function public.opens_too(bytea)", "IMMUTABLE"),
    ] {
        mended(&mut client, severity, object, words);
    }
    let view = "materialized view public.sealed";
    let found = reported(&mut client, "warning", view, "not re-encrypted");
    apply(&mut client, &found.remedy);
    reported(
        &mut client,
        "warning",
        "column public.sealed.c",
        "not registered",
    );
    client.run("DROP MATERIALIZED VIEW sealed");
    gone(&mut client, view, "");
    gone(&mut client, "column public.sealed.c", "");
    gone(&mut client, "materialized view public.counted", "");
    gone(&mut client, "function public.decrypt_column(bytea)", "");
}

/// Moves the dates of a slot as time would.
fn backdate(client: &mut Client, column: &str, state: &str) {
    client.run(&format!(
        "SET session_replication_role = replica;
         UPDATE rekey.key_slot SET {column} = {column} - interval '2 days' WHERE state = '{state}';
         RESET session_replication_role"
    ));
}

#[test]
fn a_key_past_its_max_age_and_a_slot_past_its_grace() {
    let mut client = database("ages").connect();
    client.run("SELECT rekey.set_policy('pii', grace => '1 day', max_age => '1 day')");
    gone(&mut client, "key pii", "");
    backdate(&mut client, "activated_at", "active");
    assert_eq!(metric(&mut client, "pg_rekey_keys_past_max_age", "{}"), 1.0);
    let overdue = metric(
        &mut client,
        "pg_rekey_key_overdue_seconds",
        "{\"key\": \"pii\"}",
    );
    assert!((86_000.0..90_000.0).contains(&overdue), "{overdue}");
    mended(&mut client, "warning", "key pii", "its max_age is 1 day");
    let slot = client.text("SELECT slot_id FROM rekey.slots WHERE state = 'previous'");
    let object = format!("slot {slot} of key pii");
    gone(&mut client, &object, "");
    backdate(&mut client, "superseded_at", "previous");
    assert_eq!(metric(&mut client, "pg_rekey_slots_past_grace", "{}"), 1.0);
    mended(&mut client, "warning", &object, "not proved unused");
    assert_eq!(metric(&mut client, "pg_rekey_slots_past_grace", "{}"), 0.0);
    client.run(
        "SELECT rekey.mark_compromised(active_slot, 'test') FROM rekey.keys;
         SELECT rekey.set_policy('pii', grace => '1 year')",
    );
    let slot = client.text("SELECT slot_id FROM rekey.slots WHERE state = 'previous'");
    assert_eq!(metric(&mut client, "pg_rekey_compromised_slots", "{}"), 1.0);
    mended(
        &mut client,
        "error",
        &format!("slot {slot} of key pii"),
        "it is compromised",
    );
    // Nothing is registered: no proof is ever made.
    client.run("SELECT rekey.unregister_column('t', 'c'); SELECT rotate_key('pii')");
    client.run("SELECT rekey.set_policy('pii', grace => '0')");
    let slot = client.text("SELECT slot_id FROM rekey.slots WHERE state = 'previous'");
    let object = format!("slot {slot} of key pii");
    reported(&mut client, "warning", &object, "no column is registered");
    client.run("SELECT rekey.register_column('t', 'c')");
    gone(&mut client, &object, "no column is registered");
    mended(&mut client, "warning", &object, "not proved unused");
}

#[test]
fn names_that_are_not_ascii_in_a_database_that_is_not_utf8() {
    let options = "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'";
    let database = cluster().empty_database("latin", options);
    database.install();
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('cl\u{e9}', max_age => '1 day');
         CREATE TABLE \"\u{fc}ber\" AS SELECT encrypt_col('x', 'cl\u{e9}') AS \"\u{f6}\"",
    );
    backdate(&mut client, "activated_at", "active");
    mended(&mut client, "warning", "key cl\u{e9}", "max_age");
    let object = "column public.\"\u{fc}ber\".\"\u{f6}\"";
    mended(&mut client, "warning", object, "not registered");
}

#[test]
fn many_of_a_kind_are_cut_short_and_said_to_be() {
    let mut client = database("many").connect();
    client
        .run("SELECT rekey.create_key('k' || i, max_age => '1 day') FROM generate_series(1, 60) i");
    backdate(&mut client, "activated_at", "active");
    let found = findings(&mut client);
    let keys = found
        .iter()
        .filter(|f| f.object.starts_with("key "))
        .count();
    assert_eq!(keys, 50);
    reported(
        &mut client,
        "warning",
        "ages of keys",
        "more findings of this kind",
    );
    assert_eq!(
        metric(&mut client, "pg_rekey_keys_past_max_age", "{}"),
        60.0
    );
    let series = client
        .number("SELECT count(*) FROM rekey.metrics WHERE name = 'pg_rekey_key_overdue_seconds'");
    assert_eq!(series, 5, "no series for each key");
}

#[test]
fn pauses_that_have_no_end_or_are_old() {
    let mut client = database("pauses").connect();
    client.run("SELECT rekey.pause('t', now() + interval '1 hour')");
    gone(&mut client, "table t", "paused");
    client.run("UPDATE rekey.pause SET paused_at = now() - interval '8 days'");
    mended(
        &mut client,
        "warning",
        "table public.t",
        "paused by postgres",
    );
    client.run("SELECT rekey.pause(reason => 'release')");
    assert_eq!(metric(&mut client, "pg_rekey_pauses", "{}"), 1.0);
    mended(
        &mut client,
        "warning",
        "all tables",
        "without an end: release",
    );
}

#[test]
fn live_columns_without_their_trigger_that_wait_for_their_end_or_are_not_filled() {
    let mut client = database("live").connect();
    client.run(
        "CREATE TABLE l (id int PRIMARY KEY, email text);
         INSERT INTO l VALUES (1, 'mail1');
         SELECT rekey.encrypt_column('l', 'email', 'sealed', 'pii')",
    );
    client.run("CALL rekey.reencrypt('l')");
    gone(&mut client, "table public.l", "");
    let trigger = client.text("SELECT trigger_name FROM rekey.live_columns");
    for mode in ["DISABLE", "ENABLE"] {
        client.run(&format!("ALTER TABLE l {mode} TRIGGER {trigger}"));
        mended(&mut client, "error", "table public.l", "writes pass it");
    }
    client.run("UPDATE rekey.backfill_state SET updated_at = now() - interval '8 days'");
    mended(
        &mut client,
        "warning",
        "table public.l",
        "column email has been encrypted into sealed since",
    );
    client.run("SELECT rekey.encrypt_column('l', 'email', 'again', 'pii')");
    client.run("CALL rekey.reencrypt('l')");
    client.run(
        "UPDATE rekey.backfill_state SET phase = 'backfill',
             note = '1 rows are still to be filled: row (0,1) fails with SQLSTATE 22012'",
    );
    let words = "its live columns are not filled: 1 rows";
    mended(&mut client, "warning", "table public.l", words);

    let triggers = "SELECT trigger_name FROM rekey.live_columns ORDER BY 1 LIMIT 1";
    let trigger = client.text(triggers);
    let made = client.text(&format!(
        "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = '{trigger}'"
    ));
    // A trigger that is dropped takes its live column with it, unless nobody looks.
    let forget = "ALTER EVENT TRIGGER pg_rekey_forget_dropped";
    client.run(&format!(
        "{forget} DISABLE; DROP TRIGGER {trigger} ON l; {forget} ENABLE ALWAYS"
    ));
    let words = format!("trigger {trigger} is gone");
    reported(&mut client, "error", "table public.l", &words);
    client.run(&format!(
        "{made}; ALTER TABLE l ENABLE ALWAYS TRIGGER {trigger}"
    ));
    gone(&mut client, "table public.l", &words);
}

#[test]
fn rows_under_quarantine() {
    let mut client = database("rows").connect();
    client.run(
        "UPDATE t SET c = set_byte(c, 40, get_byte(c, 40) # 1) WHERE id = 7;
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(metric(&mut client, "pg_rekey_quarantined_rows", "{}"), 1.0);
    let object = "table public.t";
    let found = reported(
        &mut client,
        "error",
        object,
        "1 rows could not be re-encrypted (SQLSTATE 39000): the slots that they name cannot",
    );
    client.run(&found.remedy);
    client.run("UPDATE t SET c = encrypt_col('v7', 'pii') WHERE id = 7");
    client.run("SELECT rekey.retry_quarantine()");
    client.run("CALL rekey.reencrypt()");
    gone(&mut client, object, "");
}

#[test]
fn a_registered_column_that_is_gone_or_that_cannot_be_served_any_more() {
    let mut client = database("gone").connect();
    client.run(
        "CREATE TABLE u AS SELECT * FROM t;
         SELECT rekey.register_column('u', 'c');
         ALTER TABLE t DROP COLUMN c",
    );
    assert_eq!(
        metric(&mut client, "pg_rekey_registered_columns_missing", "{}"),
        1.0
    );
    mended(
        &mut client,
        "error",
        "table public.t",
        "column \"c\" is gone",
    );
    client.run("CREATE RULE r AS ON UPDATE TO u DO ALSO NOTHING");
    client.run("ALTER TABLE u ENABLE ALWAYS RULE r");
    reported(
        &mut client,
        "error",
        "table public.u",
        "rule on UPDATE that would fire",
    );
    client.run("DROP RULE r ON u");
    gone(&mut client, "table public.u", "");
    client.run("CREATE UNIQUE INDEX ON u (c)");
    reported(
        &mut client,
        "error",
        "table public.u",
        "unique index on a column of envelopes",
    );
    client.run("DROP INDEX u_c_idx");
    gone(&mut client, "table public.u", "");
}

#[test]
fn a_foreign_partition_of_a_registered_table() {
    let mut client = database("foreign").connect();
    client.run(
        "CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER s FOREIGN DATA WRAPPER nothing;
         CREATE TABLE p (id int, c bytea) PARTITION BY RANGE (id);
         SELECT rekey.register_column('p', 'c');
         CREATE FOREIGN TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10) SERVER s",
    );
    let object = "table public.p1";
    reported(
        &mut client,
        "error",
        object,
        "a partition that is a foreign table",
    );
    client.run("DROP FOREIGN TABLE p1");
    gone(&mut client, object, "");
}

#[test]
fn grants_to_everyone_and_to_roles_that_are_gone() {
    let database = database("grants");
    let role = database.role("gone");
    let mut client = database.connect();
    client.run(&format!(
        "SELECT rekey.create_key('it''s');
         SELECT rekey.grant_key('it''s', 'public', '{{decrypt,encrypt}}');
         SELECT rekey.grant_key('it''s', '{role}', '{{rotate}}');
         DROP ROLE \"{role}\";
         GRANT EXECUTE ON FUNCTION rekey.export_key TO PUBLIC;
         GRANT SELECT, INSERT ON rekey.slot_wrap TO PUBLIC"
    ));
    for (object, words) in [
        ("key it's", "everyone (PUBLIC) holds decrypt, encrypt"),
        ("key it's", "which is gone, holds rotate"),
        (
            "table rekey.slot_wrap",
            "everyone (PUBLIC) holds INSERT, SELECT",
        ),
        (
            "routine rekey.export_key(text,bytea)",
            "everyone (PUBLIC) holds EXECUTE",
        ),
    ] {
        mended(&mut client, "warning", object, words);
    }
}

#[test]
fn a_worker_that_is_off_kept_out_or_without_a_free_process() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("max_worker_processes = 1")
            .set("max_logical_replication_workers = 0"),
    );
    let database = cluster.database("asleep");
    let mut client = database.connect();
    client.run(SETUP);
    client.run("SELECT rotate_key('pii')");
    let worker = "worker";
    wait_until("no process is free", || {
        find(
            &mut client,
            worker,
            "no place in max_worker_processes was free",
        )
        .is_some()
    });
    client.run("ALTER SYSTEM SET rekey.worker = off");
    cluster.reload(&mut client);
    assert_eq!(metric(&mut client, "pg_rekey_worker_enabled", "{}"), 0.0);
    mended_by_reload(&mut client, "warning", worker, "rekey.worker is off");
    client.run("ALTER SYSTEM SET rekey.databases = 'postgres, other'");
    cluster.reload(&mut client);
    mended_by_reload(
        &mut client,
        "warning",
        worker,
        "rekey.databases leaves this database out",
    );
    let found = reported(
        &mut client,
        "warning",
        worker,
        "no place in max_worker_processes",
    );
    assert_eq!(metric(&mut client, "pg_rekey_launcher_up", "{}"), 1.0);
    apply(&mut client, &found.remedy);
    drop(client);
    cluster.restart("fast");
    let mut client = database.connect();
    wait_until("the slot is drained", || {
        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'drained'") == 1
    });
    gone(&mut client, worker, "");
    client.run("ALTER SYSTEM SET max_worker_processes = 0");
    drop(client);
    cluster.restart("fast");
    let mut client = database.connect();
    reported(
        &mut client,
        "warning",
        worker,
        "its launcher is not running",
    );
    assert_eq!(metric(&mut client, "pg_rekey_launcher_up", "{}"), 0.0);
}

#[test]
fn a_worker_that_dies_at_a_table_that_fails_or_that_nobody_has_woken() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set("autovacuum = off"),
    );
    let database = cluster.database("workers");
    let mut client = database.connect();
    client.run(SETUP);
    let (worker, table) = ("worker", "table public.t");
    let mut gate = database.connect();
    gate.run(&format!("SELECT pg_advisory_lock({GATE})"));
    const AT_GATE: &str = "SELECT coalesce(max(pid), 0) FROM pg_locks \
                             WHERE locktype = 'advisory' AND NOT granted";
    let stands = |client: &mut Client| {
        wait_until("the worker stands at the gate", || {
            client.number(AT_GATE) != 0
        });
    };
    let terminate = format!("SELECT pg_terminate_backend(({AT_GATE})::int, 60000)");
    cluster.arm("rows.updated", "wait");
    client.run("SELECT rotate_key('pii')");
    stands(&mut client);
    // The next one stands at the gate before it looks at any table.
    cluster.arm("step.begun", "wait");
    client.run(&terminate);
    stands(&mut client);
    let died = "workers have died at it, 1 times";
    reported(&mut client, "warning", table, died);
    // And so does the third: until it goes on, the second one's end is the last that is known.
    cluster.arm("step.begun", "wait");
    client.run(&terminate);
    let failed = "the worker has failed 1 times in a row";
    wait_until("the launcher has heard of it", || {
        find(&mut client, worker, failed).is_some()
    });
    reported(&mut client, "warning", worker, failed);
    gate.run(&format!("SELECT pg_advisory_unlock({GATE})"));
    wait_until("it has begun again and is through", || {
        find(&mut client, worker, "").is_none() && find(&mut client, table, "").is_none()
    });
    let drained = "SELECT count(*) FROM rekey.slots WHERE state = 'drained'";
    assert_eq!(client.number(drained), 1);

    // Left out for a while, by a launcher that has forgotten the wish of this database.
    let other = cluster.database("elsewhere");
    let mut elsewhere = other.connect();
    elsewhere.run(SETUP);
    client.run("ALTER SYSTEM SET rekey.databases = 'elsewhere'");
    cluster.reload(&mut client);
    client.run("SELECT rotate_key('pii')");
    elsewhere.run("SELECT rotate_key('pii')");
    wait_until("the database on the list is drained", || {
        elsewhere.number(drained) == 1
    });
    let words = "rekey.databases leaves this database out";
    mended_by_reload(&mut client, "warning", worker, words);
    wait_until("the worker has come", || client.number(drained) == 2);
    gone(&mut client, worker, "");

    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_rekey worker'";
    wait_until("the worker has ended", || client.number(workers) == 0);
    // As a restore of data alone does it: no trigger tells anybody.
    client.run(
        "ALTER TABLE rekey.key_slot DISABLE TRIGGER ALL;
         UPDATE rekey.key_slot SET state = 'previous', drained_at = NULL, proof = NULL
          WHERE state = 'drained';
         ALTER TABLE rekey.key_slot ENABLE TRIGGER ALL",
    );
    // The launcher takes leave of it a moment later than the process list.
    let nobody = "no worker is at it";
    wait_until("the launcher has taken leave of the worker", || {
        find(&mut client, worker, nobody).is_some()
    });
    mended(&mut client, "warning", worker, nobody);
    assert_eq!(client.number(drained), 2);
}

#[test]
fn a_table_that_stands_still_or_whose_owners_code_fails() {
    let mut client = database("still").connect();
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    client.run("SELECT rotate_key('pii')");
    let object = "table public.t";
    gone(&mut client, object, "");
    client.run(
        "UPDATE rekey.progress_state SET phase = 'barrier', note = 'waits for pid 1',
                updated_at = now() - interval '25 hours'",
    );
    reported(
        &mut client,
        "warning",
        object,
        "stands still in phase barrier",
    );
    assert!(metric(&mut client, "pg_rekey_progress_age_seconds", "{}") > 86_400.0);
    client
        .run("UPDATE rekey.progress_state SET phase = 'pass', note = 'failed with SQLSTATE XX000'");
    mended(
        &mut client,
        "warning",
        object,
        "put off: failed with SQLSTATE XX000",
    );
    gone(&mut client, object, "");
}

#[test]
fn a_pause_excuses_the_standstill_of_what_it_covers_only() {
    let mut client = database("excused").connect();
    client.run(
        "CREATE TABLE u AS SELECT * FROM t;
         CREATE TABLE p (id int, c bytea) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (100);
         INSERT INTO p SELECT * FROM t;
         SELECT rekey.register_column(r, 'c') FROM unnest('{u,p}'::regclass[]) AS r;
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    client.run(
        "SELECT rotate_key('pii');
         UPDATE rekey.progress_state SET phase = 'pass', blocks_left = 1,
                updated_at = now() - interval '25 hours'",
    );
    let (words, age) = (
        "stands still in phase pass",
        "pg_rekey_progress_age_seconds",
    );
    let expect = |client: &mut Client, still: [bool; 3]| {
        for (table, still) in ["public.t", "public.u", "public.p1"].into_iter().zip(still) {
            let found = find(client, &format!("table {table}"), words);
            assert_eq!(found.is_some(), still, "{table}: {found:?}");
        }
        let stands = metric(client, age, "{}") > 86_400.0;
        assert_eq!(stands, still.contains(&true));
    };
    expect(&mut client, [true, true, true]);
    client.run("SELECT rekey.pause('u')");
    expect(&mut client, [true, false, true]);
    client.run("SELECT rekey.pause('t')");
    expect(&mut client, [false, false, true]);
    client.run("SELECT rekey.pause('p')");
    expect(&mut client, [false, false, false]);
    client.run("SELECT rekey.resume(r) FROM unnest('{t,u,p}'::regclass[]) AS r");
    expect(&mut client, [true, true, true]);
    client.run("SELECT rekey.pause()");
    expect(&mut client, [false, false, false]);
    client.run("UPDATE rekey.pause SET paused_until = now()");
    expect(&mut client, [true, true, true]);
    // What has been passed over already waits for the table that is paused.
    client.run("SELECT rekey.pause('u'); UPDATE rekey.progress_state SET blocks_left = 0");
    gone(&mut client, "table public.t", words);
}

#[test]
fn live_columns_have_metrics_of_their_own() {
    let mut client = database("live_metrics").connect();
    let backfill = |client: &mut Client| {
        let tables = |client: &mut Client, phase: &str| {
            let labels = format!("{{\"phase\": \"{phase}\"}}");
            metric(client, "pg_rekey_backfill_tables", &labels)
        };
        let left = metric(client, "pg_rekey_backfill_left_bytes", "{}") > 0.0;
        (tables(client, "backfill"), tables(client, "done"), left)
    };
    assert_eq!(metric(&mut client, "pg_rekey_live_columns", "{}"), 0.0);
    client.run(
        "CREATE TABLE l (id int PRIMARY KEY, email text);
         INSERT INTO l SELECT i, repeat('x', 1000) FROM generate_series(1, 3000) AS i;
         SELECT rekey.encrypt_column('l', 'email', 'sealed', 'pii')",
    );
    assert_eq!(metric(&mut client, "pg_rekey_live_columns", "{}"), 1.0);
    client.run("SELECT rekey.reencrypt_step('l', true)");
    assert_eq!(backfill(&mut client), (1.0, 0.0, true));
    client.run("CALL rekey.reencrypt('l')");
    assert_eq!(backfill(&mut client), (0.0, 1.0, false));
}

#[test]
fn a_proof_that_is_given_up_at_max_snapshot_age() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.worker = off")
            .set("rekey.max_snapshot_age = '1s'"),
    );
    let mut client = cluster.database("snapshot").connect();
    client.run(SETUP);
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    // That the worker leaves this note is shown in boundaries.rs, where failpoints hold its scan.
    let note = "the snapshot reached rekey.max_snapshot_age at ";
    assert!(read("src/worker/proof.rs").contains(note));
    client.run(&format!(
        "UPDATE rekey.progress_state SET note = '{note}public.big'"
    ));
    let words = "its snapshot reached rekey.max_snapshot_age (1s)";
    let found = reported(&mut client, "warning", "table public.big", words);
    apply(&mut client, &found.remedy);
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    gone(&mut client, "table public.big", "");
}

#[test]
fn standbys_that_lag_or_are_gone_and_a_check_on_a_standby() {
    let primary = Cluster::start(
        Options::preloaded()
            .set("rekey.worker = off")
            .set("rekey.max_replication_lag = '1ms'"),
    );
    let mut client = primary.database("lagging").connect();
    client.run(SETUP);
    let standby = primary.standby();
    let mut replica = standby.connect("postgres");
    wait_until("the standby has the database", || {
        replica.truth("SELECT EXISTS (SELECT FROM pg_database WHERE datname = 'lagging')")
    });
    let mut replica = standby.connect("lagging");
    wait_until("the standby has replayed", || {
        replica
            .attempt("SELECT 1/count(*) FROM rekey.columns")
            .is_ok()
    });
    reported(
        &mut replica,
        "notice",
        "column public.t.c",
        "without a context",
    );
    assert_eq!(metric(&mut replica, "pg_rekey_ready", "{}"), 1.0);
    gone(&mut replica, "worker", "");
    assert!(
        findings(&mut replica)
            .iter()
            .all(|found| !found.finding.contains("could not be looked at")),
        "every probe runs on a standby"
    );
    client.run("INSERT INTO t VALUES (51, NULL)");
    wait_until("the standby has replayed", || {
        replica.number("SELECT count(*) FROM t") == 51
    });
    replica.run("SELECT pg_wal_replay_pause()");
    wait_until("the standby lags", || {
        client.run("INSERT INTO t SELECT max(id) + 1, NULL FROM t");
        findings(&mut client)
            .iter()
            .any(|found| found.object.starts_with("standby ") && found.finding.contains("behind"))
    });
    wait_until("the standby says so itself", || {
        find(&mut replica, "this standby", "behind").is_some()
    });
    replica.run("SELECT pg_wal_replay_resume()");
    wait_until("it says no more that it lags", || {
        find(&mut replica, "this standby", "behind").is_none()
    });
    client.run("ALTER SYSTEM SET rekey.max_replication_lag = '1min'");
    primary.reload(&mut client);
    wait_until("nobody says any more that it lags", || {
        client.run("INSERT INTO t SELECT max(id) + 1, NULL FROM t");
        findings(&mut client)
            .iter()
            .all(|found| !found.object.starts_with("standby "))
    });
    client.run("SELECT pg_create_physical_replication_slot('left')");
    let object = "replication slot left";
    mended(
        &mut client,
        "warning",
        object,
        "no standby is connected to it",
    );
}

fn metric(client: &mut Client, name: &str, labels: &str) -> f64 {
    let text = client.text(&format!(
        "SELECT value FROM rekey.metrics WHERE name = '{name}' AND labels = '{labels}'"
    ));
    text.parse().expect("a number")
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(project().join(path)).expect("a file of the project")
}

/// The words of a text that are names of metrics.
fn names_in(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("pg_rekey_"))
        .map(str::to_owned)
        .collect()
}

const DASHBOARD: &str = "examples/monitoring/grafana-dashboard.json";
const COLLECTOR: &str = "examples/monitoring/pg_rekey.collector.yml";
const ALERTS: &str = "examples/monitoring/alerts.yml";

#[test]
fn every_metric_is_documented_collected_and_everything_that_is_used_exists() {
    let mut client = database("names").connect();
    client.run("SELECT rekey.set_policy('pii', max_age => '1 day'); SELECT rotate_key('pii')");
    backdate(&mut client, "activated_at", "active");
    client.run("SELECT rekey.reencrypt_step('t', true)");
    client.run("UPDATE rekey.progress_state SET blocks_left = 1");
    let known: BTreeSet<String> = client
        .column("SELECT DISTINCT name FROM rekey.metrics")
        .into_iter()
        .collect();
    let documented = names_in(&read("docs/monitoring.md"));
    let missing: Vec<&String> = known.difference(&documented).collect();
    assert!(missing.is_empty(), "not in docs/monitoring.md: {missing:?}");
    let collected = names_in(&read(COLLECTOR));
    let missing: Vec<&String> = known.difference(&collected).collect();
    assert!(missing.is_empty(), "not in {COLLECTOR}: {missing:?}");
    let (page, collector) = (read("docs/monitoring.md"), read(COLLECTOR));
    for row in client.rows("SELECT DISTINCT name, help FROM rekey.metrics") {
        let [Some(name), Some(help)] = &row[..] else {
            panic!("{row:?}");
        };
        let line = |line: &&str| line.starts_with(&format!("| `{name}` |")) && line.contains(help);
        assert!(
            page.lines().any(|l| line(&l)),
            "{name}: {help:?} is not in the page"
        );
        let said = format!("metric_name: {name}\n    type: ");
        let words = collector
            .split(&said)
            .nth(1)
            .and_then(|rest| rest.lines().nth(1));
        assert_eq!(
            words,
            Some(format!("    help: '{help}'").as_str()),
            "{name}"
        );
    }
    for file in [DASHBOARD, COLLECTOR, ALERTS] {
        let used = names_in(&read(file));
        let unknown: Vec<&String> = used.difference(&known).collect();
        assert!(unknown.is_empty(), "{file} uses {unknown:?}");
        assert!(!used.is_empty(), "{file} uses none");
    }
    let unlike = client.column(
        "SELECT name FROM rekey.metrics WHERE name !~ '^pg_rekey_[a-z_]+$' OR help = ''
            OR value IS NULL OR name ~ 'seconds_|bytes_|_count$'",
    );
    assert!(unlike.is_empty(), "not in the convention: {unlike:?}");
}

#[test]
fn the_collectors_queries_run_and_give_what_the_metrics_have() {
    let database = database("collector");
    let role = database.role("monitor");
    let mut client = database.connect();
    client.run(&format!("GRANT pg_monitor TO \"{role}\""));
    let mut client = database.connect_as(&role);
    let file = read(COLLECTOR);
    // Each query is a block of two lines.
    let queries: Vec<&str> = file
        .split("query: |\n")
        .skip(1)
        .filter_map(|rest| rest.split("  - ").next())
        .collect();
    assert_eq!(
        queries.len(),
        names_in(&file).len(),
        "one query for each metric"
    );
    for query in queries {
        client.run(query);
    }
}

/// What every reader of YAML must take: spaces, an even indentation, no tab, and on each line a key
/// or an item; lines of a block (`|`) are free.
fn looks_like_yaml(text: &str) {
    let mut block: Option<usize> = None;
    for (number, line) in text.lines().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let rest = line.trim();
        assert!(!line.contains('\t'), "line {}: a tab", number + 1);
        if rest.is_empty() || rest.starts_with('#') || block.is_some_and(|above| indent > above) {
            continue;
        }
        block = None;
        assert!(indent % 2 == 0, "line {}: indented by {indent}", number + 1);
        let item = rest.strip_prefix("- ").unwrap_or(rest);
        let quoted = item.starts_with(['\'', '"']);
        let keyed = item.split_once(": ").is_some_and(|(key, value)| {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let open = !value.starts_with(['\'', '"', '[', '{']);
            // A plain scalar must not hold what begins a mapping or a comment.
            key.chars().all(plain) && !(open && (value.contains(": ") || value.contains(" #")))
        });
        let begins = item
            .strip_suffix(':')
            .is_some_and(|key| key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'));
        let plain_item = rest.starts_with("- ") && !item.contains(": ");
        assert!(
            keyed || begins || quoted || plain_item,
            "line {}: {line}",
            number + 1
        );
        if rest.ends_with(": |") || rest.ends_with(": >-") {
            block = Some(indent);
        }
    }
}

#[test]
fn the_examples_parse() {
    let dashboard: serde_json::Value =
        serde_json::from_str(&read(DASHBOARD)).expect("the dashboard is JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let queried = panels
        .iter()
        .filter(|panel| panel["type"] != "row")
        .all(|panel| panel["targets"][0]["expr"].is_string());
    assert!(panels.len() > 5 && queried, "every panel has a query");
    looks_like_yaml(&read(COLLECTOR));
    looks_like_yaml(&read(ALERTS));
}

#[test]
fn slots_of_lookup_keys_await_their_proof_as_others_do() {
    let database = database("lookup_slots");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('find', grace => '1 year', purpose => 'lookup');
         ALTER TABLE t ADD fp bytea;
         UPDATE t SET fp = fingerprint_col('v' || id, 'find');
         SELECT rekey.register_fingerprint('t', 'fp', 'c', 'find', 'pii');
         SELECT rekey.mark_compromised(active_slot, 'test') FROM rekey.keys WHERE key_name = 'find'",
    );
    let slot = client.text("SELECT slot_id FROM rekey.slots WHERE state = 'previous'");
    reported(&mut client, "warning", "worker", "1 slots await");
    mended(
        &mut client,
        "error",
        &format!("slot {slot} of key find"),
        "it is compromised",
    );
}

#[test]
fn fingerprints_and_envelopes_in_each_others_columns_and_strangers_among_fingerprints() {
    let mut client = database("mixed").connect();
    client.run(
        "SELECT rekey.create_key('find', purpose => 'lookup');
         ALTER TABLE t ADD fp bytea;
         UPDATE t SET fp = fingerprint_col('v' || id, 'find');
         SELECT rekey.register_fingerprint('t', 'fp', 'c', 'find', 'pii')",
    );
    let (sealed, made) = ("column public.t.c", "column public.t.fp");
    gone(&mut client, made, "");
    let right = "UPDATE t SET fp = fingerprint_col('v' || id, 'find'), \
                        c = encrypt_col('v' || id, 'pii') WHERE id = 1";
    for (wrong, object, words) in [
        ("fp = 'x'", made, "are no fingerprints"),
        (
            "fp = c",
            made,
            "are envelopes, and the column is registered for fingerprints",
        ),
        (
            "c = fp",
            sealed,
            "are fingerprints, and the column is registered for envelopes",
        ),
    ] {
        client.run(&format!("UPDATE t SET {wrong} WHERE id = 1"));
        reported(&mut client, "error", object, words);
        client.run(right);
        gone(&mut client, object, "sampled values");
    }
}

#[test]
fn a_table_that_is_locked_is_not_waited_for_and_is_said_to_be_left_out() {
    let database = database("locked");
    let (mut client, mut other) = (database.connect(), database.connect());
    other.run("BEGIN; LOCK TABLE t");
    client.run("SET lock_timeout = '10s'");
    let words = "were not looked at";
    reported(&mut client, "notice", "registered columns", words);
    other.run("COMMIT");
    gone(&mut client, "registered columns", words);
}

#[test]
fn a_fingerprint_in_a_default_is_found() {
    let database = database("default_fp");
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('find', purpose => 'lookup')");
    let fingerprint = client.text("SELECT fingerprint_col('x', 'find')");
    client.run(&format!(
        "CREATE TABLE d (fp bytea DEFAULT '{fingerprint}', other bytea DEFAULT '{fingerprint}00')"
    ));
    assert_eq!(
        client.column("SELECT table_name || ' ' || column_name FROM rekey.find_envelopes()"),
        ["public.d fp (default)"]
    );
    mended(
        &mut client,
        "warning",
        "column public.d.fp",
        "its default is",
    );
}

#[test]
fn of_thousands_of_registered_tables_only_so_many_are_opened() {
    let database = database("partitions");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE p (id int, c bytea) PARTITION BY LIST (id);
         SELECT rekey.register_column('p', 'c');
         DO $$ BEGIN FOR i IN 1..260 LOOP
             EXECUTE format('CREATE TABLE p%s PARTITION OF p FOR VALUES IN (%s)', i, i);
         END LOOP; END $$",
    );
    // t and 260 partitions; 256 of them are looked at.
    reported(
        &mut client,
        "notice",
        "registered tables",
        "5 of them were not looked at",
    );
}
