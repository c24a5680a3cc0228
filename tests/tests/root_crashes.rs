//! Crashes at each step of the life of a root key (the first one, a rotation, a retirement, a report
//! that it has leaked): kill -9 of the session and of the postmaster. Whatever is cut off,
//! everything opens, and the command is repeated.
//!
//! Failpoints of debug builds (src/failpoint.rs) mark the steps. tests/tests/root_rotation.rs shows
//! what they do when nobody interrupts them.

use std::fs;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, GATE, Options, wait_until};

const WRONG: &str = "SELECT count(*) FROM t WHERE decrypt_col(c) IS DISTINCT FROM shadow";
const ACTIVE: &str = "SELECT root_id FROM rekey.root_keys WHERE state = 'active'";
const ROTATE: &str = "SELECT rekey.rotate_root_key()";
/// Living slots by the number of their wrapped keys.
const WRAPS: &str = "SELECT DISTINCT (SELECT count(*) FROM rekey.slot_wrap w \
    WHERE w.slot_id = s.slot_id) FROM rekey.key_slot s WHERE state <> 'destroyed'";

/// The steps of rotate_root_key, in their order: the new keyring is written beside the old one,
/// takes its place, is durable; the catalog has the new root key, its wrapped keys, all of it.
const OF_A_ROTATION: [&str; 5] = [
    "keyring.drafted",
    "keyring.renamed",
    "root.added",
    "root.activated",
    "root.wrapped",
];
/// The steps of retire_root_key: the wrapped keys are gone, the state is set.
const OF_A_RETIREMENT: [&str; 2] = ["root.unwrapped", "root.retired"];
/// The steps of mark_compromised_root: the root key's state is set, all its slots are marked and the
/// active ones rotated.
const OF_A_REPORT: [&str; 2] = ["root.compromised", "root.marked"];
/// The steps of init_root_key: the first keyring is written, in its place, held by the session, the
/// catalog has the root key.
const OF_THE_FIRST: [&str; 4] = [
    "first.drafted",
    "first.linked",
    "first.held",
    "first.adopted",
];

/// Previous, active and pending slots of two keys, and a row under each that has any.
fn start() -> Cluster {
    let cluster = Cluster::start(Options::preloaded());
    cluster.database("app").connect().run(
        "SELECT rekey.create_key('pii'); SELECT rekey.create_key('other');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c, 'one' AS shadow;
         SELECT rotate_key('pii');
         INSERT INTO t VALUES (encrypt_col('two', 'pii'), 'two'),
                              (encrypt_col('three', 'other'), 'three');
         SELECT rekey.prepare_key('pii')",
    );
    cluster
}

fn ids(cluster: &Cluster) -> Vec<String> {
    let keyring = fs::read_to_string(cluster.root_key_file()).expect("the keyring");
    let entries = keyring.split("\"id\":\"").skip(1);
    entries.map(|entry| entry[..32].to_owned()).collect()
}

/// The keyring's files: itself, and drafts that a crash has left.
fn files(cluster: &Cluster) -> usize {
    let names = fs::read_dir(cluster.dir()).expect("the folder").flatten();
    names
        .filter(|entry| entry.file_name().to_string_lossy().contains("root.json"))
        .count()
}

/// A session of a server that has just crashed.
fn again(cluster: &Cluster) -> Client {
    let mut session = None;
    wait_until("the server takes sessions again", || {
        session = cluster.try_connect("app");
        session
            .as_mut()
            .is_some_and(|client| client.simple_query("SELECT 1").is_ok())
    });
    session.expect("a session")
}

/// kill -9 of the session that runs `sql`, when it reaches the step.
fn kill_session(cluster: &Cluster, sql: &str, step: &str) {
    let mut witness = cluster.connect("app");
    cluster.arm(step, "kill");
    let mut client = cluster.connect("app");
    client.simple_query(sql).expect_err("a crash");
    assert!(!cluster.is_armed(), "{step} was not reached");
    // The postmaster has to hear of it first: until then it takes sessions, and ends them.
    wait_until("the crash has ended every session", || {
        witness.simple_query("SELECT 1").is_err()
    });
}

/// kill -9 of the postmaster and all its processes while a session that runs `sql` is at the step.
fn kill_postmaster(cluster: &Cluster, sql: &str, step: &str) {
    let mut gate = cluster.connect("app");
    gate.run(&format!("SELECT pg_advisory_lock({GATE})"));
    cluster.arm(step, "wait");
    let mut client = cluster.connect("app");
    std::thread::scope(|scope| {
        scope.spawn(move || client.simple_query(sql).expect_err("a crash"));
        let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
        wait_until(step, || gate.number(waits) == 1);
        cluster.kill();
    });
    cluster.boot();
}

/// Everything opens, for a new session that has to unwrap, and the catalog is of one piece.
fn is_whole(cluster: &Cluster, active: &str, wraps: &str, when: &str) {
    let mut client = again(cluster);
    assert_eq!(client.number(WRONG), 0, "{when}");
    assert_eq!(client.text(ACTIVE), active, "{when}");
    assert_eq!(client.column(WRAPS), [wraps], "{when}");
    assert!(client.truth("SELECT rekey.ready()"), "{when}");
    assert_eq!(
        client.text("SELECT decrypt_col(encrypt_col('x', 'pii'))"),
        "x",
        "{when}"
    );
}

type Kill = fn(&Cluster, &str, &str);

fn a_rotation_survives(kill: Kill) {
    let cluster = start();
    for step in OF_A_ROTATION {
        let active = cluster.connect("app").text(ACTIVE);
        let before = ids(&cluster);
        kill(&cluster, ROTATE, step);
        is_whole(&cluster, &active, "1", step);
        let after = ids(&cluster);
        assert_eq!(after[..before.len()], before[..], "{step} took a root key");
        let added = after.len() - before.len();
        assert_eq!(added, usize::from(step != "keyring.drafted"), "{step}");
        // Repeated: it takes up what the crash has left, and nothing else.
        let new = cluster.connect("app").text(ROTATE);
        assert_eq!(ids(&cluster).len(), before.len() + 1, "{step}");
        assert_eq!(ids(&cluster).last(), Some(&new), "{step}");
        assert_eq!(files(&cluster), 1, "{step} left a draft");
        let retire = format!("SELECT rekey.retire_root_key('{active}')");
        cluster.connect("app").run(&retire);
    }
    let new = cluster.connect("app").text(ROTATE);
    cluster.kill();
    cluster.boot();
    is_whole(&cluster, &new, "2", "after the commit");
}

fn a_retirement_survives(kill: Kill) {
    let cluster = start();
    for step in OF_A_RETIREMENT {
        let mut client = cluster.connect("app");
        let old = client.text(ACTIVE);
        let new = client.text(ROTATE);
        let retire = format!("SELECT rekey.retire_root_key('{old}')");
        kill(&cluster, &retire, step);
        is_whole(&cluster, &new, "2", step);
        cluster.connect("app").run(&retire);
    }
    let active = cluster.connect("app").text(ACTIVE);
    cluster.kill();
    cluster.boot();
    is_whole(&cluster, &active, "1", "after the commit");
}

fn a_report_survives(kill: Kill) {
    let cluster = start();
    let mut client = cluster.connect("app");
    let old = client.text(ACTIVE);
    let new = client.text(ROTATE);
    let report = format!("SELECT rekey.mark_compromised_root('{old}', 'a backup was stolen')");
    let slots = "SELECT slot_id, state, compromised_at FROM rekey.key_slot ORDER BY 1";
    let before = client.rows(slots);
    for step in OF_A_REPORT {
        kill(&cluster, &report, step);
        is_whole(&cluster, &new, "2", step);
        let mut client = cluster.connect("app");
        assert_eq!(client.rows(slots), before, "{step}: half of it is there");
        let state = format!("SELECT state FROM rekey.root_keys WHERE root_id = '{old}'");
        assert_eq!(client.text(&state), "previous", "{step}");
    }
    assert_eq!(cluster.connect("app").number(&report), 4);
    cluster.kill();
    cluster.boot();
    let mut client = again(&cluster);
    assert_eq!(client.number(WRONG), 0);
    let sealing = "SELECT count(*) FROM rekey.slots WHERE state = 'active' \
                     AND compromised_at IS NULL";
    assert_eq!(client.number(sealing), 2, "what was committed stays");
}

fn the_first_root_key_survives(kill: Kill) {
    for step in OF_THE_FIRST {
        let cluster = Cluster::start(Options::preloaded());
        let database = cluster.empty_database("app", "");
        database.connect().run("CREATE EXTENSION pg_rekey");
        kill(&cluster, "SELECT rekey.init_root_key()", step);
        let mut client = again(&cluster);
        assert_eq!(client.number("SELECT count(*) FROM rekey.root_keys"), 0);
        assert!(!client.truth("SELECT rekey.ready()"), "{step}");
        let made = cluster.root_key_file().exists();
        assert_eq!(made, step != "first.drafted", "{step}");
        // Repeated: it adopts the keyring that is there already.
        let left = made.then(|| ids(&cluster));
        let id = client.text("SELECT rekey.init_root_key()");
        assert_eq!(ids(&cluster), left.unwrap_or(vec![id.clone()]), "{step}");
        client.run("SELECT rekey.create_key('pii'); CREATE TABLE t (c bytea, shadow text)");
        client.run("INSERT INTO t VALUES (encrypt_col('one', 'pii'), 'one')");
        is_whole(&cluster, &id, "1", step);
        if step == "first.drafted" {
            assert_eq!(files(&cluster), 1, "a draft with a root key is left");
        }
    }
}

#[test]
fn a_rotation_survives_kill_9_of_its_session_at_every_step() {
    a_rotation_survives(kill_session);
}

#[test]
fn a_rotation_survives_kill_9_of_the_postmaster_at_every_step() {
    a_rotation_survives(kill_postmaster);
}

#[test]
fn a_retirement_survives_kill_9_of_its_session_at_every_step() {
    a_retirement_survives(kill_session);
}

#[test]
fn a_retirement_survives_kill_9_of_the_postmaster_at_every_step() {
    a_retirement_survives(kill_postmaster);
}

#[test]
fn a_report_of_a_leak_survives_kill_9_of_its_session_at_every_step() {
    a_report_survives(kill_session);
}

#[test]
fn a_report_of_a_leak_survives_kill_9_of_the_postmaster_at_every_step() {
    a_report_survives(kill_postmaster);
}

#[test]
fn the_first_root_key_survives_kill_9_of_its_session_at_every_step() {
    the_first_root_key_survives(kill_session);
}

#[test]
fn the_first_root_key_survives_kill_9_of_the_postmaster_at_every_step() {
    the_first_root_key_survives(kill_postmaster);
}

#[test]
fn what_was_reported_done_outlives_a_crash_under_asynchronous_commits_as_well() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("synchronous_commit = off")
            .set("wal_writer_delay = '10s'")
            .set("rekey.worker = off"),
    );
    let mut client = cluster.database("app").connect();
    client.run("SELECT rekey.create_key('pii'); CREATE TABLE t (c bytea, shadow text)");
    client.run("INSERT INTO t VALUES (encrypt_col('one', 'pii'), 'one')");
    let old = client.text(ACTIVE);
    let new = client.text(ROTATE);
    for (act, proof) in [
        (
            format!("SELECT rekey.retire_root_key('{old}')"),
            format!("SELECT state = 'retired' FROM rekey.root_keys WHERE root_id = '{old}'"),
        ),
        (
            "SELECT rotate_key('pii')".to_owned(),
            "SELECT count(*) = 2 FROM rekey.slots".to_owned(),
        ),
        (
            "SELECT rekey.shred_key('pii', 'test')".to_owned(),
            "SELECT bool_and(state = 'destroyed') FROM rekey.slots".to_owned(),
        ),
    ] {
        cluster.connect("app").run(&act);
        cluster.kill();
        cluster.boot();
        let mut client = cluster.connect("app");
        assert!(client.truth(&proof), "undone: {act}");
        assert_eq!(client.text(ACTIVE), new);
    }
}

#[test]
fn an_error_at_every_step_leaves_everything_as_it_was() {
    let cluster = start();
    let mut client = cluster.connect("app");
    let old = client.text(ACTIVE);
    let before = ids(&cluster);
    for step in OF_A_ROTATION {
        cluster.arm(step, "error");
        client
            .simple_query(ROTATE)
            .expect_err("the failpoint's error");
        assert!(!cluster.is_armed(), "{step} was not reached");
        assert_eq!(files(&cluster), 1, "{step} left a draft");
        is_whole(&cluster, &old, "1", step);
        assert!(ids(&cluster).len() <= before.len() + 1, "{step}");
    }
    let new = client.text(ROTATE);
    assert_eq!(ids(&cluster).len(), before.len() + 1);
    for step in OF_A_RETIREMENT {
        cluster.arm(step, "error");
        let retire = format!("SELECT rekey.retire_root_key('{old}')");
        client
            .simple_query(&retire)
            .expect_err("the failpoint's error");
        is_whole(&cluster, &new, "2", step);
    }
}

#[test]
fn the_other_databases_of_a_server_get_along_with_a_rotation_that_was_cut_off() {
    let cluster = start();
    let other: Database<'_> = cluster.database("second");
    other.connect().run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c, 'one' AS shadow",
    );
    let old = other.connect().text(ACTIVE);
    kill_session(&cluster, ROTATE, "root.wrapped");
    again(&cluster);
    // The key that the first one has added and never used is the second one's next.
    let added = ids(&cluster).pop().expect("an id");
    let mut client = other.connect();
    assert_eq!(client.text(ROTATE), added);
    client.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    assert_eq!(client.number(WRONG), 0);
    is_whole(&cluster, &old, "1", "the first one");
    assert_eq!(cluster.connect("app").text(ROTATE), added);
    assert_eq!(ids(&cluster).len(), 2);
    is_whole(&cluster, &added, "2", "the first one");
}
