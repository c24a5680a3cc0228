//! Restores: base backups and points in time before, within and after a rotation, copies of a
//! database, dumps of last week, a clone for staging.
//!
//! Whatever point a server is restored to, every row opens, the worker drains what is left, and the
//! next rotation works. A proof that another server or database made ends no slot.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

const WRONG: &str = "SELECT count(*) FROM t WHERE decrypt_col(c) IS DISTINCT FROM shadow";
const ROWS: &str = "SELECT count(*) FROM t";
const ACTIVE_ROOT: &str = "SELECT root_id FROM rekey.root_keys WHERE state = 'active'";

/// A key without grace and a registered table.
fn fill(client: &mut Client, rows: u32) {
    client.run(&format!(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id bigserial PRIMARY KEY, c bytea, shadow text);
         INSERT INTO t (c, shadow) SELECT encrypt_col('v' || i, 'pii'), 'v' || i
           FROM generate_series(1, {rows}) AS i;
         SELECT rekey.register_column('t', 'c')"
    ));
}

fn states(client: &mut Client) -> Vec<String> {
    client.column("SELECT state FROM rekey.slots ORDER BY version")
}

fn slot(client: &mut Client, version: u32) -> i64 {
    client.number(&format!(
        "SELECT slot_id FROM rekey.slots WHERE version = {version}"
    ))
}

fn is_drained(client: &mut Client) -> bool {
    client.number("SELECT count(*) FROM rekey.slots WHERE state = 'previous'") == 0
}

/// Ends a slot once older transactions, of autovacuum for one, are over.
fn end(client: &mut Client, function: &str, slot: i64) {
    let sql = format!("SELECT rekey.{function}({slot})");
    wait_until("older transactions have ended", || {
        match client.attempt(&sql) {
            Ok(()) => true,
            Err(refusal) if refusal.detail.contains("lder transactions") => false,
            Err(refusal) => panic!("{sql}: {}", refusal.text()),
        }
    });
}

/// What each restored database owes: every row, a drain of what is left, another rotation, the end
/// of the slot before it.
fn goes_on(client: &mut Client) {
    assert_eq!(client.number(WRONG), 0);
    wait_until("what was left is drained", || is_drained(client));
    let old = client.number("SELECT active_slot FROM rekey.keys");
    client.run("SELECT rotate_key('pii')");
    client.run("INSERT INTO t (c, shadow) VALUES (encrypt_col('new', 'pii'), 'new')");
    wait_until("its own rotation is drained", || is_drained(client));
    end(client, "destroy_slot", old);
    assert_eq!(client.number(WRONG), 0);
    assert!(client.truth("SELECT rekey.ready()"));
}

/// An application that writes until it is told to stop.
fn write(mut client: Client, stop: &AtomicBool) {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        client.run(&format!(
            "INSERT INTO t (c, shadow) VALUES (encrypt_col('w{number}', 'pii'), 'w{number}');
             UPDATE t SET c = encrypt_col('u{number}', 'pii'), shadow = 'u{number}'
              WHERE id = 1 + {number} % 1000"
        ));
    }
}

fn set_pace(cluster: &Cluster, client: &mut Client, ratio: &str) {
    client.run(&format!("ALTER SYSTEM SET rekey.work_ratio = {ratio}"));
    cluster.reload(client);
}

#[test]
fn restores_to_before_within_and_after_a_rotation_open_every_row_and_go_on() {
    let cluster = Cluster::start(
        Options::preloaded()
            .archiving()
            .set("rekey.work_ratio = 0.01")
            .set("rekey.batch_target = 5ms"),
    );
    let database = cluster.database("app");
    let mut client = database.connect();
    fill(&mut client, 5_000);
    let kept = client.text("SELECT encrypt_col('kept', 'pii')");
    let early = cluster.base_backup("early");
    cluster.restore_point(&mut client, "before");
    let stop = AtomicBool::new(false);
    let late = std::thread::scope(|scope| {
        let writer = database.connect();
        scope.spawn(|| write(writer, &stop));
        let mut rotating = database.connect();
        rotating.run("BEGIN; SELECT rotate_key('pii')");
        cluster.restore_point(&mut client, "uncommitted");
        rotating.run("COMMIT");
        let cursor = "SELECT coalesce(max(cursor_block), 0) FROM rekey.progress_state";
        wait_until("some batches are done", || client.number(cursor) > 2);
        cluster.restore_point(&mut client, "early");
        let late = cluster.base_backup("late");
        cluster.restore_point(&mut client, "within");
        assert!(!is_drained(&mut client), "the backup fell behind the drain");
        stop.store(true, Ordering::Relaxed);
        late
    });
    set_pace(&cluster, &mut client, "1");
    wait_until("the rotation is drained", || is_drained(&mut client));
    cluster.restore_point(&mut client, "drained");
    let first = slot(&mut client, 1);
    end(&mut client, "destroy_slot", first);
    client.run("SELECT rotate_key('pii')");
    wait_until("the second rotation is drained", || is_drained(&mut client));
    cluster.restore_point(&mut client, "after");

    let check = |backup: &Path, point: &str, expected: &[&str]| {
        let restored = cluster.restore(backup, point);
        let mut client = restored.connect("app");
        assert_eq!(states(&mut client), expected, "{point}");
        assert!(client.number(ROWS) >= 5_000);
        if point == "drained" {
            // The proof came along. It is the same history, and a scan is made here all the same.
            let insert = format!("INSERT INTO t (c, shadow) VALUES ('{kept}', 'kept')");
            client.run(&insert);
            for function in ["disable_slot", "destroy_slot"] {
                let sql = format!("SELECT rekey.{function}({first})");
                wait_until("the refusal names the table", || {
                    let refusal = client.attempt(&sql).expect_err("a stale row");
                    refusal.detail.contains("public.t (1 rows)")
                });
            }
        }
        set_pace(&restored, &mut client, "1");
        goes_on(&mut client);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            check(&early, "before", &["active"]);
            check(&early, "uncommitted", &["active"]);
            check(&early, "after", &["destroyed", "drained", "active"]);
        });
        scope.spawn(|| {
            check(&early, "early", &["previous", "active"]);
            check(&late, "within", &["previous", "active"]);
            check(&late, "drained", &["drained", "active"]);
        });
    });
    assert_eq!(client.number(WRONG), 0, "the source is untouched");
}

/// The ids of a keyring file, in its order.
fn ids(keyring: &str) -> Vec<String> {
    let entries = keyring.split("\"id\":\"").skip(1);
    entries.map(|entry| entry[..32].to_owned()).collect()
}

/// The keyring with the one entry that has this id.
fn only(keyring: &str, id: &str) -> String {
    let entries = keyring.split_inclusive('}').map(|entry| {
        let begin = entry.rfind('{').unwrap_or(0);
        &entry[begin..]
    });
    let entry: String = entries.filter(|entry| entry.contains(id)).collect();
    format!("{{\"version\":1,\"keys\":[{entry}]}}")
}

fn keyring(cluster: &Cluster) -> String {
    fs::read_to_string(cluster.root_key_file()).expect("the keyring")
}

/// Leaves the server with one root key.
fn hold_only(cluster: &Cluster, id: &str) {
    let content = only(&keyring(cluster), id);
    cluster.write_file(&cluster.root_key_file(), content.as_bytes(), 0o600);
    cluster.restart("fast");
}

#[test]
fn restores_to_each_step_of_a_root_rotation_open_under_the_keyring_of_today() {
    let cluster = Cluster::start(Options::preloaded().archiving());
    let database = cluster.database("app");
    let mut client = database.connect();
    fill(&mut client, 300);
    let old = client.text(ACTIVE_ROOT);
    let ahead = cluster.base_backup("ahead");
    cluster.restore_point(&mut client, "before");
    let mut rotating = database.connect();
    rotating.run("BEGIN");
    let new = rotating.text("SELECT rekey.rotate_root_key()");
    // The file has the new root key, the catalog does not know it yet.
    let amid = cluster.base_backup("amid");
    cluster.restore_point(&mut client, "uncommitted");
    rotating.run("COMMIT");
    client.run("SELECT rotate_key('pii')");
    client.run("INSERT INTO t (c, shadow) VALUES (encrypt_col('late', 'pii'), 'late')");
    let between = cluster.base_backup("between");
    cluster.restore_point(&mut client, "rotated");
    client.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    client.run("SELECT rotate_key('pii')");
    cluster.restore_point(&mut client, "retired");

    let check = |backup: &Path, point: &str| {
        let (active, enough) = match point {
            "before" | "uncommitted" => (&old, vec![&old]),
            "rotated" => (&new, vec![&old, &new]),
            _ => (&new, vec![&new]),
        };
        let restored = cluster.restore(backup, point);
        assert_eq!(&restored.connect("app").text(ACTIVE_ROOT), active);
        let both = keyring(&restored);
        for id in enough {
            hold_only(&restored, id);
            assert_eq!(restored.connect("app").number(WRONG), 0, "{point}");
            restored.write_file(&restored.root_key_file(), both.as_bytes(), 0o600);
        }
        restored.restart("fast");
        let mut client = restored.connect("app");
        // Before the commit the key that the file has already is taken up.
        let next = client.text("SELECT rekey.rotate_root_key()");
        assert_eq!(next == new, active == &old, "{point}");
        for id in ids(&both).iter().filter(|id| **id != next) {
            // "retired" has retired one of them already.
            let _ = client.attempt(&format!("SELECT rekey.retire_root_key('{id}')"));
        }
        hold_only(&restored, &next);
        goes_on(&mut restored.connect("app"));
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for point in ["before", "uncommitted", "rotated", "retired"] {
                check(&ahead, point);
            }
        });
        scope.spawn(|| {
            for point in ["uncommitted", "rotated", "retired"] {
                check(&amid, point);
            }
            for point in ["rotated", "retired"] {
                check(&between, point);
            }
        });
    });
    assert_eq!(client.number(WRONG), 0);
}

/// A copy of a database on the same server.
fn copy<'a>(database: &Database<'a>, name: &str) -> Database<'a> {
    let sql = format!("CREATE DATABASE {name} TEMPLATE {}", database.name);
    let mut admin = database.cluster.connect("postgres");
    wait_until("nobody else is in the database", || {
        admin.attempt(&sql).is_ok()
    });
    Database {
        cluster: database.cluster,
        name: name.to_owned(),
    }
}

#[test]
fn a_database_and_its_copy_rotate_apart_and_never_mix() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.work_ratio = 1"));
    let database = cluster.database("one");
    let mut client = database.connect();
    fill(&mut client, 10);
    let common = client.text("SELECT encrypt_col('common', 'pii')");
    drop(client);
    let other = copy(&database, "two");
    let mut sessions = [database.connect(), other.connect()];
    let open = |envelope: &str| format!("SELECT decrypt_col('{envelope}')");
    // Both warm: the same slot ids, and so far the same keys.
    for session in &mut sessions {
        assert_eq!(session.text(&open(&common)), "common");
        session.run("SELECT encrypt_col('x', 'pii')");
    }
    let mut own = Vec::new();
    for session in &mut sessions {
        let slot = session.number("SELECT rotate_key('pii')");
        let envelope = session.text("SELECT encrypt_col(current_database(), 'pii')");
        assert_eq!(
            session.number(&format!("SELECT rekey.slot_id('{envelope}')")),
            slot
        );
        own.push((slot, envelope));
    }
    assert_ne!(own[0].0, own[1].0);
    for (i, session) in sessions.iter_mut().enumerate() {
        let (mine, theirs) = (&own[i], &own[1 - i]);
        assert_eq!(session.text(&open(&mine.1)), ["one", "two"][i]);
        session
            .refuse(&open(&theirs.1), "42704")
            .names(&theirs.0.to_string());
        wait_until("each is drained by a worker of its own", || {
            is_drained(session)
        });
        assert_eq!(session.number(WRONG), 0);
    }
    // The end of the common slot here is not its end there.
    let first = slot(&mut sessions[0], 1);
    sessions[0].run(&format!("SELECT rekey.destroy_slot({first}, true)"));
    sessions[0].refuse(&open(&common), "55000");
    assert_eq!(sessions[1].text(&open(&common)), "common");
    // Neither is the end of the root key's wrapped keys.
    let old = sessions[0].text(ACTIVE_ROOT);
    sessions[0].text("SELECT rekey.rotate_root_key()");
    sessions[0].run(&format!("SELECT rekey.retire_root_key('{old}')"));
    for (i, database) in [&database, &other].into_iter().enumerate() {
        let mut fresh = database.connect();
        assert_eq!(fresh.text(&open(&own[i].1)), database.name);
        goes_on(&mut fresh);
    }
}

#[test]
fn a_copy_made_in_the_middle_of_a_rotation_is_drained_by_a_worker_of_its_own() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 0.01")
            .set("rekey.batch_target = 5ms"),
    );
    let database = cluster.database("one");
    let mut client = database.connect();
    fill(&mut client, 5_000);
    client.run("SELECT rotate_key('pii')");
    let cursor = "SELECT coalesce(max(cursor_block), 0) FROM rekey.progress_state";
    wait_until("some batches are done", || client.number(cursor) > 2);
    drop(client);
    let other = copy(&database, "two");
    let mut client = other.connect();
    assert!(!is_drained(&mut client));
    assert!(client.number(cursor) > 0, "it goes on where the pass was");
    set_pace(&cluster, &mut client, "1");
    // Nobody has committed anything in the copy.
    wait_until("the copy is drained", || is_drained(&mut client));
    goes_on(&mut client);
    goes_on(&mut database.connect());
}

#[test]
fn a_proof_of_another_database_ends_no_slot_and_is_made_again() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.worker = off"));
    let database = cluster.database("one");
    let mut client = database.connect();
    fill(&mut client, 10);
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(states(&mut client), ["drained", "active"]);
    let first = slot(&mut client, 1);
    drop(client);
    let file = cluster.dir().join("dump");
    let file = file.to_str().expect("a path in UTF-8");
    cluster.tool("pg_dump", &["-Fc", "-f", file, "one"]);
    cluster.empty_database("dumped", "");
    cluster.tool("pg_restore", &["-d", "dumped", "--exit-on-error", file]);
    copy(&database, "copied");
    for name in ["dumped", "copied"] {
        let mut client = cluster.connect(name);
        assert_eq!(states(&mut client), ["drained", "active"]);
        for function in ["disable_slot", "destroy_slot"] {
            client
                .refuse(&format!("SELECT rekey.{function}({first})"), "55000")
                .names("on another server or database");
        }
        client.run("CALL rekey.reencrypt()");
        assert_eq!(states(&mut client), ["drained", "active"]);
        let here = "SELECT (proof->>'database')::oid = (SELECT oid FROM pg_database \
                      WHERE datname = current_database()) \
                      FROM rekey.slots WHERE state = 'drained'";
        assert!(client.truth(here), "{name}: the proof is of this database");
        end(&mut client, "disable_slot", first);
        end(&mut client, "destroy_slot", first);
        assert_eq!(client.number(WRONG), 0);
    }
    assert_eq!(
        states(&mut database.connect()),
        ["drained", "active"],
        "the source keeps its own"
    );
}

#[test]
fn rows_out_of_last_weeks_dump_open_once_their_slot_is_restored_out_of_it() {
    let cluster = Cluster::start(Options::preloaded().set("rekey.work_ratio = 1"));
    let database = cluster.database("app");
    let mut client = database.connect();
    fill(&mut client, 50);
    let path = |name: &str| cluster.dir().join(name).display().to_string();
    cluster.tool("pg_dump", &["-Fc", "-f", &path("last_week"), "app"]);
    client.run("SELECT rotate_key('pii')");
    wait_until("the rotation is drained", || is_drained(&mut client));
    let first = slot(&mut client, 1);
    end(&mut client, "destroy_slot", first);
    client.run("DELETE FROM t WHERE id > 20");
    // The lost rows come back, under a slot that is gone.
    let dump = path("last_week");
    client.run("CREATE TABLE found (LIKE t)");
    let rows = cluster.tool("pg_restore", &["-a", "-t", "t", "-f", "-", &dump]);
    let sql = path("rows.sql");
    fs::write(&sql, rows.replace("COPY public.t ", "COPY public.found ")).expect("the rows");
    cluster.tool("psql", &["-q", "-d", "app", "-f", &sql]);
    client
        .refuse("SELECT decrypt_col(c) FROM found", "55000")
        .names(&first.to_string());
    cluster.empty_database("scratch", "");
    cluster.tool("pg_restore", &["-d", "scratch", "--exit-on-error", &dump]);
    let wrap = cluster.connect("scratch").rows(&format!(
        "SELECT wrapped_key, encode(root_id, 'hex') FROM rekey.slot_wrap WHERE slot_id = {first}"
    ));
    let [wrapped, root] = [0, 1].map(|i| wrap[0][i].clone().expect("a cell"));
    client.run(&format!(
        "SELECT rekey.restore_slot({first}, '{wrapped}', '{root}', 'rows of last week')"
    ));
    client.run("INSERT INTO t SELECT * FROM found WHERE id > 20; DROP TABLE found");
    assert_eq!(client.number(ROWS), 50);
    assert_eq!(client.number(WRONG), 0);
    goes_on(&mut client);
    assert_eq!(
        client.text(&format!(
            "SELECT state FROM rekey.slots WHERE slot_id = {first}"
        )),
        "drained",
        "what came back is re-encrypted and proved again"
    );
}

#[test]
fn a_clone_for_staging_gets_along_without_the_root_key_of_production() {
    let production = Cluster::start(Options::preloaded().archiving().set("rekey.work_ratio = 1"));
    let mut source = production.database("app").connect();
    fill(&mut source, 100);
    source.run("SELECT rotate_key('pii'); SELECT rekey.prepare_key('pii')");
    let backup = production.base_backup("backup");
    production.restore_point(&mut source, "clone");
    let of_production = source.text(ACTIVE_ROOT);
    let keyring_before = keyring(&production);
    let staging = production.restore(&backup, "clone");
    let mut client = staging.connect("app");
    let of_staging = client.text("SELECT rekey.rotate_root_key()");
    client.run(&format!("SELECT rekey.retire_root_key('{of_production}')"));
    drop(client);
    hold_only(&staging, &of_staging);
    assert!(!keyring(&staging).contains(&of_production));
    let mut client = staging.connect("app");
    assert_eq!(client.number(WRONG), 0);
    let under = "SELECT count(*) FROM rekey.slot_wrap WHERE encode(root_id, 'hex') = ";
    assert_eq!(client.number(&format!("{under}'{of_production}'")), 0);
    goes_on(&mut client);
    // Nothing of it reaches production: not its root key, nor what it seals under its own slots.
    assert_eq!(keyring(&production), keyring_before);
    assert_eq!(source.text(ACTIVE_ROOT), of_production);
    client.run("SELECT rotate_key('pii')");
    let foreign = client.text("SELECT encrypt_col('staging', 'pii')");
    source.refuse(&format!("SELECT decrypt_col('{foreign}')"), "42704");
    goes_on(&mut source);
}
