//! ALTER EXTENSION pg_rekey UPDATE: what was sealed opens, what is dumped stays dumped, and a
//! library meets a catalog of another version with words instead of wrong results.
//!
//! Versions that are not there yet are made up: their scripts go into a copy of the private tree.
//! Those that were released are taken as they were frozen, from sql/released/ (scripts/freeze.sh).

use std::path::Path;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, Tree};

const ROWS: i64 = 200;
/// What check() says about the catalog as a whole.
const CATALOG: &str =
    "SELECT severity || ' ' || object FROM rekey.check() WHERE object = 'catalog'";

/// A server of a tree's own and the version that it installs.
fn server(tree: &Tree, options: Options) -> (Cluster, String) {
    let cluster = Cluster::start(options.of(tree.programs()));
    let version = cluster
        .connect("postgres")
        .text("SELECT default_version FROM pg_available_extensions WHERE name = 'pg_rekey'");
    (cluster, version)
}

/// The version with `step` added to its part `part`, and 0 behind it.
fn later(version: &str, part: usize) -> String {
    let mut parts: Vec<u32> = version
        .split('.')
        .map(|part| part.parse().expect("a number"))
        .collect();
    parts[part] += 1;
    parts[part + 1..].fill(0);
    let parts: Vec<String> = parts.iter().map(u32::to_string).collect();
    parts.join(".")
}

fn seal_rows(database: &Database<'_>) {
    database.connect().run(&format!(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t (id int PRIMARY KEY, v text, c bytea);
         INSERT INTO t SELECT i, 'v' || i, encrypt_col('v' || i, 'pii', i::text)
             FROM generate_series(1, {ROWS}) i;
         SELECT rotate_key('pii')"
    ));
}

fn opened(client: &mut Client) -> i64 {
    client.number("SELECT count(*) FROM t WHERE decrypt_col(c, id::text) = v")
}

fn catalog_version(client: &mut Client) -> String {
    client.text("SELECT extversion FROM pg_extension WHERE extname = 'pg_rekey'")
}

/// Everything that the extension consists of, a line each: two ways to a version agree in it.
fn surface(client: &mut Client) -> Vec<String> {
    let tables = "(SELECT c.oid FROM pg_class c WHERE c.relnamespace = 'rekey'::regnamespace)";
    let functions = "(SELECT d.objid FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
        WHERE d.refclassid = 'pg_extension'::regclass AND d.classid = 'pg_proc'::regclass
          AND d.deptype = 'e' AND e.extname = 'pg_rekey')";
    let acl = |acl: &str| {
        format!(
            "(SELECT string_agg(a.grantee::regrole || '=' || a.privilege_type, ',' ORDER BY 
              a.grantee::regrole::text, a.privilege_type) FROM aclexplode({acl}) a)"
        )
    };
    let mut lines = Vec::new();
    for sql in [
        "SELECT 'member ' || pg_describe_object(d.classid, d.objid, 0) || ': '
                || coalesce(obj_description(d.objid, d.classid::regclass::name), '-')
           FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_rekey'
          WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'"
            .to_owned(),
        format!(
            "SELECT format('column %s.%s %s %s %s %s: %s', a.attrelid::regclass, a.attname,
                    row_number() OVER (PARTITION BY a.attrelid ORDER BY a.attnum),
                    format_type(a.atttypid, a.atttypmod), a.attnotnull,
                    pg_get_expr(d.adbin, d.adrelid), col_description(a.attrelid, a.attnum))
               FROM pg_attribute a
               LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
              WHERE a.attrelid IN {tables} AND a.attnum > 0 AND NOT a.attisdropped"
        ),
        format!(
            "SELECT format('constraint %s.%s %s', conrelid::regclass, conname,
                    pg_get_constraintdef(oid))
               FROM pg_constraint WHERE conrelid IN {tables}"
        ),
        format!(
            "SELECT pg_get_indexdef(indexrelid) || ': '
                    || coalesce(obj_description(indexrelid, 'pg_class'), '-')
               FROM pg_index WHERE indrelid IN {tables}"
        ),
        format!(
            "SELECT format('%s %s: %s', pg_get_triggerdef(oid), tgenabled,
                    obj_description(oid, 'pg_trigger'))
               FROM pg_trigger WHERE tgrelid IN {tables} AND NOT tgisinternal"
        ),
        format!("SELECT pg_get_functiondef(p) FROM unnest(ARRAY{functions}) p"),
        format!(
            "SELECT format('view %s %s', c.oid::regclass, pg_get_viewdef(c.oid))
               FROM pg_class c WHERE c.oid IN {tables} AND c.relkind = 'v'"
        ),
        format!(
            "SELECT format('access %s %s %s', c.oid::regclass, c.reloptions, {})
               FROM pg_class c WHERE c.oid IN {tables}",
            acl("c.relacl")
        ),
        format!(
            "SELECT format('access %s %s', p.oid::regprocedure, {})
               FROM pg_proc p WHERE p.oid IN {functions}",
            acl("coalesce(p.proacl, acldefault('f', p.proowner))")
        ),
        "SELECT format('dumped %s %s', c::regclass, d) FROM pg_extension,
                LATERAL unnest(extconfig, extcondition) AS u (c, d) WHERE extname = 'pg_rekey'"
            .to_owned(),
        "SELECT format('event trigger %s %s %s %s %s', evtname, evtevent, evtfoid::regproc,
                evtenabled, evttags) FROM pg_event_trigger"
            .to_owned(),
    ] {
        lines.extend(client.column(&sql));
    }
    lines.sort();
    lines
}

#[test]
fn an_update_keeps_values_keys_and_dump_marks() {
    let tree = Tree::copy();
    let (cluster, version) = server(&tree, Options::preloaded());
    let next = later(&version, 2);
    let database = cluster.database("app");
    seal_rows(&database);
    let mut warm = database.connect();
    assert_eq!(opened(&mut warm), ROWS);
    let before = surface(&mut warm);

    tree.write(
        &format!("pg_rekey--{version}--{next}.sql"),
        "ALTER TABLE rekey.key ADD COLUMN ticket text NOT NULL DEFAULT '';
         COMMENT ON COLUMN rekey.key.ticket IS 'A column of the next version';
         CREATE TABLE rekey.note (id bigint PRIMARY KEY);
         COMMENT ON TABLE rekey.note IS 'A table of the next version';
         SELECT pg_catalog.pg_extension_config_dump('rekey.note', '');
         CREATE FUNCTION rekey.answer() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 42';
         COMMENT ON FUNCTION rekey.answer() IS 'A function of the next version';",
    );
    let mut admin = database.connect();
    admin.run(&format!("ALTER EXTENSION pg_rekey UPDATE TO '{next}'"));
    assert_eq!(catalog_version(&mut admin), next);

    // Nothing is lost, and what came is what the script made.
    let after = surface(&mut admin);
    let gone: Vec<_> = before.iter().filter(|l| !after.contains(l)).collect();
    assert!(gone.is_empty(), "{gone:#?}");
    let new: Vec<_> = after.iter().filter(|l| !before.contains(l)).collect();
    for part in [
        "rekey.key.ticket",
        "rekey.note",
        "rekey.answer",
        "dumped rekey.note",
    ] {
        assert!(new.iter().any(|l| l.contains(part)), "{part}: {new:#?}");
    }

    // This library knows nothing of the new version and serves it: only the patch level differs.
    let mut fresh = database.connect();
    for client in [&mut warm, &mut fresh] {
        assert_eq!(opened(client), ROWS);
        client.run("SELECT rotate_key('pii')");
        client.run("SELECT rekey.create_key('k' || pg_backend_pid())");
        client.run("UPDATE t SET c = encrypt_col(v, 'pii', id::text) WHERE id % 2 = 0");
        assert_eq!(opened(client), ROWS);
    }
    client_is_refused_direct_changes(&mut warm);

    // A dump carries the new table and the keys, into a database that makes the next version.
    warm.run("INSERT INTO rekey.note VALUES (7); UPDATE t SET v = v");
    let control = tree.read("pg_rekey.control");
    let default = format!("default_version = '{version}'");
    assert!(control.contains(&default));
    tree.write(
        "pg_rekey.control",
        &control.replace(&default, &format!("default_version = '{next}'")),
    );
    let dump = cluster.dir().join("app.dump");
    let dump = dump.to_str().expect("a path in UTF-8");
    cluster.tool("pg_dump", &["-Fc", "-f", dump, "app"]);
    cluster.empty_database("restored", "");
    cluster.tool("pg_restore", &["--exit-on-error", "-d", "restored", dump]);
    let mut restored = cluster.connect("restored");
    assert_eq!(catalog_version(&mut restored), next);
    assert_eq!(surface(&mut restored), after);
    assert_eq!(opened(&mut restored), ROWS);
    assert_eq!(restored.number("SELECT id FROM rekey.note"), 7);
}

fn client_is_refused_direct_changes(client: &mut Client) {
    client.refuse("DELETE FROM rekey.key_slot", "55000");
    client.refuse("DROP EXTENSION pg_rekey CASCADE", "55000");
}

#[test]
fn an_old_library_refuses_a_newer_catalog_in_warm_sessions_too() {
    let tree = Tree::copy();
    let (cluster, version) = server(&tree, Options::preloaded());
    let newer = later(&version, 1);
    let database = cluster.database("app");
    seal_rows(&database);
    let mut warm = database.connect();
    assert_eq!(opened(&mut warm), ROWS);

    // The script touches no table: the change of version alone is told to every session.
    tree.write(
        &format!("pg_rekey--{version}--{newer}.sql"),
        "COMMENT ON SCHEMA rekey IS 'of the newer version'",
    );
    tree.write(&format!("pg_rekey--{newer}--{version}.sql"), "");
    let mut admin = database.connect();
    admin.run(&format!("ALTER EXTENSION pg_rekey UPDATE TO '{newer}'"));
    let mut fresh = database.connect();
    for client in [&mut warm, &mut fresh] {
        for sql in [
            "SELECT decrypt_col(c, id::text) FROM t LIMIT 1",
            "SELECT encrypt_col('x', 'pii')",
            "SELECT rotate_key('pii')",
            "SELECT rekey.create_key('new')",
        ] {
            client
                .refuse(sql, "55000")
                .names(&version)
                .names(&newer)
                .hints("Install the newer library and restart the server");
        }
        client_is_refused_direct_changes(client);
        // One finding, and not one for each probe that does not know the catalog.
        assert_eq!(client.column(CATALOG), ["error catalog"]);
        assert_eq!(client.number("SELECT count(*) FROM rekey.check()"), 1);
    }
    admin.run(&format!("ALTER EXTENSION pg_rekey UPDATE TO '{version}'"));
    for client in [&mut warm, &mut fresh] {
        assert_eq!(opened(client), ROWS, "the version fits again");
        assert_eq!(client.column(CATALOG), [""; 0]);
        client.run("SELECT rotate_key('pii')");
    }
}

#[test]
fn a_new_library_asks_for_the_update_of_an_older_catalog() {
    let tree = Tree::copy();
    let (cluster, version) = server(&tree, Options::unloaded());
    let older = "0.0.9";
    let script = tree.read(&format!("pg_rekey--{version}.sql"));
    tree.write(&format!("pg_rekey--{older}.sql"), &script);
    tree.write(&format!("pg_rekey--{older}--{version}.sql"), "");
    let database = cluster.empty_database("app", "");
    let mut client = database.connect();
    client.run(&format!("CREATE EXTENSION pg_rekey VERSION '{older}'"));
    for sql in [
        "SELECT rekey.create_key('pii')",
        "SELECT encrypt_col('x', 'pii')",
    ] {
        client
            .refuse(sql, "55000")
            .names(older)
            .names(&version)
            .hints("ALTER EXTENSION pg_rekey UPDATE");
    }
    client.run("ALTER EXTENSION pg_rekey UPDATE; SELECT rekey.init_root_key()");
    seal_rows(&database);
    assert_eq!(opened(&mut client), ROWS);
}

#[test]
fn every_released_version_updates_to_this_one_and_equals_it() {
    let tree = Tree::copy();
    let (cluster, version) = server(&tree, Options::unloaded());
    let expected = surface(&mut cluster.database("fresh").connect());
    let released = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sql/released");
    let mut tried = 0;
    for entry in released.read_dir().into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().expect("a name in UTF-8");
        let Some(old) = name
            .strip_prefix("pg_rekey--")
            .and_then(|rest| rest.strip_suffix(".sql"))
        else {
            continue;
        };
        let script = std::fs::read_to_string(entry.path()).expect("a frozen script");
        tree.write(&name, &script);
        let database = cluster.empty_database(old, "");
        let mut client = database.connect();
        client.run(&format!("CREATE EXTENSION pg_rekey VERSION '{old}'"));
        // A library serves catalogs of its own minor version only.
        let serves = later(old, 1) == later(&version, 1);
        if serves {
            client.run("SELECT rekey.init_root_key()");
            seal_rows(&database);
            assert_eq!(opened(&mut client), ROWS, "under {old}");
        }
        if old != version {
            client.run("ALTER EXTENSION pg_rekey UPDATE");
        }
        if serves {
            assert_eq!(opened(&mut client), ROWS, "sealed under {old}");
            client.run(
                "SELECT rotate_key('pii');
                 UPDATE t SET c = encrypt_col(v, 'pii', id::text) WHERE id % 2 = 0",
            );
            assert_eq!(opened(&mut client), ROWS, "sealed under both");
        }
        assert_eq!(catalog_version(&mut client), version);
        assert_eq!(surface(&mut client), expected, "from {old}");
        tried += 1;
    }
    println!("{tried} released versions tried");
    assert_eq!(catalog_version(&mut cluster.connect("fresh")), version);
    assert!(expected.len() > 200, "the comparison is not empty");
}
