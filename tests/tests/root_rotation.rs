//! Rotation of the root key: blue-green, durable, for several databases, beside everything else.
//!
//! Nothing that happens to a root key may cost a value: whatever is interrupted, missing or wrong,
//! every row opens as soon as one root key is there that wrapped its slot.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

const OPEN: &str = "SELECT decrypt_col(c) FROM t";
const ROTATE: &str = "SELECT rekey.rotate_root_key()";
const ACTIVE: &str = "SELECT root_id FROM rekey.root_keys WHERE state = 'active'";
/// Living slots without a wrapped key under the active root key.
const LEFT_OUT: &str = "SELECT count(*) FROM rekey.key_slot s WHERE state <> 'destroyed' AND NOT \
    EXISTS (SELECT FROM rekey.slot_wrap w JOIN rekey.root_key r USING (root_id) \
             WHERE w.slot_id = s.slot_id AND r.state = 'active')";

fn start() -> Cluster {
    Cluster::start(Options::preloaded())
}

/// A database with a key, a previous and an active slot, and a row under each.
fn with_rows(cluster: &Cluster) -> Client {
    rows_in(&cluster.database("app"))
}

fn rows_in(database: &Database<'_>) -> Client {
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c;
         SELECT rotate_key('pii');
         INSERT INTO t VALUES (encrypt_col('two', 'pii'))",
    );
    client
}

fn opens(client: &mut Client) {
    assert_eq!(client.column(&format!("{OPEN} ORDER BY 1")), ["one", "two"]);
}

fn keyring(cluster: &Cluster) -> String {
    fs::read_to_string(cluster.root_key_file()).expect("the keyring")
}

/// The ids of a keyring file, in its order.
fn ids(keyring: &str) -> Vec<String> {
    let entries = keyring.split("\"id\":\"").skip(1);
    entries.map(|entry| entry[..32].to_owned()).collect()
}

/// A keyring with the entries of this one whose ids are given.
fn only(keyring: &str, wanted: &[&str]) -> String {
    let begin = keyring.find('[').expect("a list") + 1;
    let list = &keyring[begin..keyring.rfind(']').expect("its end")];
    let entries: Vec<&str> = list
        .split_inclusive('}')
        .map(|entry| entry.trim_start_matches(','))
        .filter(|entry| wanted.iter().any(|id| entry.contains(id)))
        .collect();
    format!("{{\"version\":1,\"keys\":[{}]}}", entries.join(","))
}

#[test]
fn rotation_wraps_every_slot_in_addition_and_touches_no_row() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    client.run("SELECT rekey.create_key('other'); SELECT rekey.prepare_key('pii')");
    let destroyed = client.number("SELECT rekey.create_key('gone')");
    client.run("SELECT rekey.shred_key('gone', 'test')");
    let before = fs::metadata(cluster.root_key_file()).expect("the keyring");
    let rows = client.rows("SELECT xmin, ctid, c FROM t");
    let slots = client.number("SELECT count(*) FROM rekey.slots WHERE state <> 'destroyed'");
    let old = client.text(ACTIVE);
    let new = client.text(ROTATE);
    assert_eq!(ids(&keyring(&cluster)), [old.clone(), new.clone()]);
    let after = fs::metadata(cluster.root_key_file()).expect("the keyring");
    assert_eq!(after.permissions().mode() & 0o7777, 0o600);
    assert_eq!((after.uid(), after.gid()), (before.uid(), before.gid()));
    assert_eq!(
        client.rows("SELECT root_id, state, held_here, slots FROM rekey.root_keys ORDER BY state"),
        [
            vec![
                Some(new.clone()),
                Some("active".into()),
                Some("t".into()),
                Some(slots.to_string())
            ],
            vec![
                Some(old.clone()),
                Some("previous".into()),
                Some("t".into()),
                Some(slots.to_string())
            ],
        ]
    );
    assert_eq!(client.number(LEFT_OUT), 0);
    let wraps = format!("SELECT count(*) FROM rekey.slot_wrap WHERE slot_id = {destroyed}");
    assert_eq!(client.number(&wraps), 0, "a tombstone stays one");
    assert_eq!(client.rows("SELECT xmin, ctid, c FROM t"), rows);
    opens(&mut client);
    opens(&mut cluster.connect("app"));
    let slot = client.number("SELECT rotate_key('pii')");
    let wraps = format!("SELECT count(*) FROM rekey.slot_wrap WHERE slot_id = {slot}");
    assert_eq!(client.number(&wraps), 2, "a new slot is wrapped under both");
    let audit = "SELECT detail FROM rekey.audit WHERE action = 'rotate_root_key'";
    assert!(
        client
            .text(audit)
            .starts_with(&format!("{new} in the place of {old}"))
    );
    assert!(
        cluster
            .log()
            .contains("pg_rekey audit: action=rotate_root_key")
    );
}

#[test]
fn each_root_key_alone_opens_everything_until_the_old_one_is_retired() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let old = client.text(ACTIVE);
    let new = client.text(ROTATE);
    let both = keyring(&cluster);
    for id in [&old, &new] {
        cluster.write_file(
            &cluster.root_key_file(),
            only(&both, &[id]).as_bytes(),
            0o600,
        );
        cluster.restart("fast");
        opens(&mut cluster.connect("app"));
    }
    let mut client = cluster.connect("app");
    client.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    assert_eq!(
        client.rows("SELECT state, slots, retired_at IS NOT NULL FROM rekey.root_keys ORDER BY 1"),
        [
            vec![Some("active".into()), Some("2".into()), Some("f".into())],
            vec![Some("retired".into()), Some("0".into()), Some("t".into())],
        ]
    );
    opens(&mut client);
    opens(&mut cluster.connect("app"));
    client.run("SELECT rotate_key('pii')");
    assert_eq!(
        client.number("SELECT slots FROM rekey.root_keys WHERE state = 'retired'"),
        0
    );
    cluster.write_file(
        &cluster.root_key_file(),
        only(&both, &[&old]).as_bytes(),
        0o600,
    );
    cluster.restart("fast");
    cluster.connect("app").refuse(OPEN, "F0000").names(&new);
}

#[test]
fn retirement_is_refused_while_it_would_lose_something() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let old = client.text(ACTIVE);
    let retire = |id: &str| format!("SELECT rekey.retire_root_key('{id}')");
    client
        .refuse(&retire(&old), "55000")
        .hints("rotate_root_key");
    client.refuse(&retire(&"0".repeat(32)), "42704");
    client.refuse(&retire("nonsense"), "22023");
    let new = client.text(ROTATE);
    let both = keyring(&cluster);
    // A server that does not hold the new root key: everything would close here.
    cluster.write_file(
        &cluster.root_key_file(),
        only(&both, &[&old]).as_bytes(),
        0o600,
    );
    cluster.restart("fast");
    let mut client = cluster.connect("app");
    client.refuse(&retire(&old), "55000").names(&new);
    opens(&mut client);
    cluster.write_file(&cluster.root_key_file(), both.as_bytes(), 0o600);
    cluster.reload(&mut client);
    // The same for a session that still holds it: the next start would not.
    for content in [&only(&both, &[&old]), ""] {
        assert!(client.truth("SELECT rekey.ready()"));
        cluster.write_file(&cluster.root_key_file(), content.as_bytes(), 0o600);
        client.refuse(&retire(&old), "55000");
        assert!(
            client.truth("SELECT rekey.ready()"),
            "it takes nothing away"
        );
        cluster.write_file(&cluster.root_key_file(), both.as_bytes(), 0o600);
    }
    // A wrapped key under the new root key that is damaged: the old one is the last.
    client.run(
        "BEGIN; SET LOCAL session_replication_role = replica;
         CREATE TABLE saved AS SELECT * FROM rekey.slot_wrap;
         UPDATE rekey.slot_wrap SET wrapped_key = set_byte(wrapped_key, 40,
             get_byte(wrapped_key, 40) # 1)
           WHERE (slot_id, root_id) IN (SELECT slot_id, root_id FROM rekey.slot_wrap
             JOIN rekey.root_key USING (root_id) WHERE state = 'active' LIMIT 1);
         COMMIT",
    );
    client
        .refuse(&retire(&old), "55000")
        .names("would be left without");
    client.run(
        "BEGIN; SET LOCAL session_replication_role = replica;
         UPDATE rekey.slot_wrap w SET wrapped_key = s.wrapped_key FROM saved s
           WHERE (w.slot_id, w.root_id) = (s.slot_id, s.root_id); COMMIT",
    );
    client.run(&retire(&old));
    client
        .refuse(&retire(&old), "55000")
        .names("already retired");
    client
        .refuse(&format!("SELECT rekey.rotate_root_key('{old}')"), "55000")
        .names("retired");
    opens(&mut cluster.connect("app"));
}

#[test]
fn a_rotation_goes_back_to_a_previous_root_key() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let old = client.text(ACTIVE);
    let new = client.text(ROTATE);
    client
        .refuse(&format!("SELECT rekey.rotate_root_key('{new}')"), "55000")
        .names("active");
    client.run("SELECT rotate_key('pii')");
    assert_eq!(
        client.text(&format!("SELECT rekey.rotate_root_key('{old}')")),
        old
    );
    assert_eq!(client.text(ACTIVE), old);
    assert_eq!(client.number(LEFT_OUT), 0);
    client.run(&format!("SELECT rekey.retire_root_key('{new}')"));
    opens(&mut cluster.connect("app"));
    let third = client.text(ROTATE);
    assert_eq!(ids(&keyring(&cluster)), [old, new, third]);
}

#[test]
fn a_second_database_adopts_the_key_that_the_first_has_added() {
    let cluster = start();
    let mut first = with_rows(&cluster);
    let mut second = rows_in(&cluster.database("second"));
    let old = first.text(ACTIVE);
    let new = first.text(ROTATE);
    assert_eq!(second.text(ACTIVE), old, "each database rotates for itself");
    opens(&mut second);
    assert_eq!(second.text(ROTATE), new);
    assert_eq!(ids(&keyring(&cluster)), [old.clone(), new.clone()]);
    // Now both stand on the last key: the next rotation needs another one, wherever it is made.
    let third = second.text(ROTATE);
    assert_eq!(first.text(ROTATE), third);
    assert_eq!(ids(&keyring(&cluster)), [old, new, third]);
    opens(&mut first);
    opens(&mut second);
}

/// A file that has leaked, or is another server's of which this is a clone, may hold a key that this
/// database does not know: it must not become the active one.
#[test]
fn a_rotation_to_a_new_root_key_takes_up_none_that_the_file_holds() {
    let cluster = start();
    let mut first = with_rows(&cluster);
    let mut second = rows_in(&cluster.database("second"));
    let mut third = rows_in(&cluster.database("third"));
    first.run("SELECT rekey.rotate_root_key()");
    for client in [&mut second, &mut third] {
        client.fail("SELECT rekey.rotate_root_key('newer')", "22023");
    }
    let before = ids(&keyring(&cluster));
    assert_eq!(before.len(), 2);
    let new = second.text("SELECT rekey.rotate_root_key('new')");
    assert_eq!(
        ids(&keyring(&cluster)),
        [before, vec![new.clone()]].concat()
    );
    opens(&mut second);
    // Without the word the last one is taken up, and that is said.
    let rotate = "SELECT rekey.rotate_root_key()";
    let output = cluster.try_tool("psql", &["-X", "-A", "-t", "-d", "third", "-c", rotate], "");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), new);
    let notices = String::from_utf8_lossy(&output.stderr).into_owned();
    let words = format!("root key {new} was in the keyring file already, since 20");
    assert!(notices.contains(&words), "{notices}");
    opens(&mut third);
    let output = cluster.try_tool("psql", &["-X", "-A", "-t", "-d", "third", "-c", rotate], "");
    let notices = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!notices.contains("already"), "{notices}");
    assert_eq!(ids(&keyring(&cluster)).len(), 4);
}

#[test]
fn rotations_of_several_databases_at_once_share_one_new_key() {
    let cluster = start();
    let names = ["a", "b", "c", "d"];
    for name in names {
        rows_in(&cluster.database(name));
    }
    let new: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = names
            .iter()
            .map(|name| {
                let mut client = cluster.connect(name);
                scope.spawn(move || client.text(ROTATE))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a rotation"))
            .collect()
    });
    assert!(new.iter().all(|id| *id == new[0]), "{new:?}");
    assert_eq!(ids(&keyring(&cluster)).len(), 2);
    for name in names {
        opens(&mut cluster.connect(name));
    }
}

#[test]
fn a_rotation_waits_for_another_one_that_writes_the_file() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let mut admin = cluster.connect("app");
    // What a rotation in another database does: lock, exchange, unlock.
    let file = fs::File::options()
        .write(true)
        .open(cluster.root_key_file());
    let file = file.expect("the keyring");
    file.lock().expect("its lock");
    let other = start();
    let new = other.database("other").connect().text(ACTIVE);
    let pid = client.number("SELECT pg_backend_pid()");
    std::thread::scope(|scope| {
        let rotation = scope.spawn(|| client.text(ROTATE));
        let waits = format!("SELECT wait_event_type FROM pg_stat_activity WHERE pid = {pid}");
        wait_until("the rotation waits, or has gone past", || {
            rotation.is_finished() || admin.cell(&waits).as_deref() == Some("Extension")
        });
        assert!(!rotation.is_finished(), "nobody waited for the lock");
        let added = keyring(&other);
        let both = format!(
            "{},{}",
            keyring(&cluster).trim_end().trim_end_matches("]}"),
            &added[added.find('[').expect("a list") + 1..]
        );
        let draft = cluster.dir().join("exchange");
        cluster.write_file(&draft, both.as_bytes(), 0o600);
        fs::rename(&draft, cluster.root_key_file()).expect("the exchange");
        drop(file);
        assert_eq!(
            rotation.join().expect("the rotation"),
            new,
            "the other one's key"
        );
    });
    assert_eq!(ids(&keyring(&cluster)).len(), 2);
    opens(&mut admin);
}

#[test]
fn a_crash_between_file_and_commit_loses_nothing_and_the_rerun_takes_the_key_up() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let old = client.text(ACTIVE);
    client.run("BEGIN");
    let new = client.text(ROTATE);
    cluster.kill();
    cluster.boot();
    let mut client = cluster.connect("app");
    assert_eq!(client.text(ACTIVE), old, "the catalog is as it was");
    assert_eq!(
        ids(&keyring(&cluster)),
        [old, new.clone()],
        "the file is durable"
    );
    opens(&mut client);
    assert_eq!(client.text(ROTATE), new);
    assert_eq!(ids(&keyring(&cluster)).len(), 2);
    cluster.kill();
    cluster.boot();
    let mut client = cluster.connect("app");
    assert_eq!(client.text(ACTIVE), new, "what was committed stays");
    opens(&mut client);
}

#[test]
fn a_rollback_leaves_a_key_that_the_next_rotation_takes_up() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    client.run("BEGIN");
    let new = client.text(ROTATE);
    opens(&mut client);
    client.run("ROLLBACK");
    opens(&mut client);
    assert_eq!(client.number("SELECT count(*) FROM rekey.root_keys"), 1);
    assert_eq!(client.text(ROTATE), new);
}

#[test]
fn a_draft_that_a_killed_rotation_has_left_goes_with_the_next_one() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let pid = client.number("SELECT pg_backend_pid()");
    for name in [
        format!(".root.json.{pid}.new"),
        ".root.json.1.new".to_owned(),
    ] {
        cluster.write_file(
            &cluster.dir().join(name),
            keyring(&cluster).as_bytes(),
            0o600,
        );
    }
    client.text(ROTATE);
    let left: Vec<String> = fs::read_dir(cluster.dir())
        .expect("the folder")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("json"))
        .collect();
    assert_eq!(left, ["root.json"]);
}

#[test]
fn the_file_behind_a_link_is_exchanged_and_keeps_its_mode() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let (link, target) = (cluster.root_key_file(), cluster.dir().join("target.json"));
    fs::rename(&link, &target).expect("the keyring moved");
    fs::set_permissions(&target, fs::Permissions::from_mode(0o600)).expect("its mode");
    symlink(&target, &link).expect("a link");
    client.text(ROTATE);
    assert!(fs::symlink_metadata(&link).expect("the link").is_symlink());
    assert_eq!(ids(&keyring(&cluster)).len(), 2);
    assert_eq!(
        fs::metadata(&target).expect("the target").mode() & 0o777,
        0o600
    );
    opens(&mut cluster.connect("app"));
}

#[test]
fn a_keyring_that_the_server_may_not_write_needs_a_root_id() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let other = start();
    let new = other.database("other").connect().text(ACTIVE);
    let file = cluster.root_key_file();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o400)).expect("read-only");
    let before = keyring(&cluster);
    client
        .refuse(ROTATE, "F0000")
        .hints("rotate_root_key(root_id)");
    assert_eq!(keyring(&cluster), before);
    let given = format!("SELECT rekey.rotate_root_key('{new}')");
    client.refuse(&given, "F0000").names(&new);
    assert_eq!(client.number("SELECT count(*) FROM rekey.root_keys"), 1);
    let added = keyring(&other);
    let both = format!(
        "{},{}",
        before.trim_end().trim_end_matches("]}"),
        &added[added.find('[').expect("a list") + 1..]
    );
    fs::remove_file(&file).expect("the old keyring gone");
    cluster.write_file(&file, both.as_bytes(), 0o400);
    assert_eq!(
        client.text(&given),
        new,
        "the file is looked at for an unknown id"
    );
    assert_eq!(client.number(LEFT_OUT), 0);
    opens(&mut cluster.connect("app"));
}

#[test]
fn a_standby_without_the_new_file_goes_on_by_the_old_wrapped_keys() {
    let cluster = start();
    let mut primary = with_rows(&cluster);
    let standby = cluster.standby();
    let file = standby.dir().join("standby.json");
    standby.write_file(&file, keyring(&cluster).as_bytes(), 0o600);
    standby.append(&format!("rekey.root_key_file = '{}'", file.display()));
    standby.restart("fast");
    let replayed = |primary: &mut Client, client: &mut Client| {
        let lsn = primary.text("SELECT pg_current_wal_flush_lsn()");
        wait_until("the standby has replayed", || {
            client.truth(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'"))
        });
    };
    let mut client = standby.connect("app");
    opens(&mut client);
    let old = primary.text(ACTIVE);
    primary.text(ROTATE);
    primary.run("SELECT rotate_key('pii'); UPDATE t SET c = encrypt_col('two', 'pii') WHERE decrypt_col(c) = 'two'");
    replayed(&mut primary, &mut client);
    opens(&mut client);
    opens(&mut standby.connect("app"));
    assert_eq!(
        client.column("SELECT held_here FROM rekey.root_keys ORDER BY state"),
        ["f", "t"],
        "it says that it lacks the active one"
    );
    assert!(!client.truth("SELECT rekey.ready()"));
    client.fail(ROTATE, "25006");
    primary.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    replayed(&mut primary, &mut client);
    standby.connect("app").refuse(OPEN, "F0000");
    opens(&mut client);
    standby.write_file(&file, keyring(&cluster).as_bytes(), 0o600);
    opens(&mut standby.connect("app"));
}

#[test]
fn a_damaged_keyring_is_named_at_start_and_by_check_and_costs_nothing() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    client.text(ROTATE);
    let right = keyring(&cluster);
    let other = start();
    other.database("other");
    let file = cluster.root_key_file();
    let [first, second] = ids(&right).try_into().expect("two ids");
    let relabelled = right.replacen(&first, &"0".repeat(32), 1);
    let one = only(&right, &[&first]);
    let entry = &one[one.find('[').expect("a list") + 1..one.rfind(']').expect("its end")];
    let duplicated = one.replace(entry, &format!("{entry},{entry}"));
    // The labels of two entries exchanged: each key is there, under the other one's id.
    let swapped = right
        .replace(&first, "FIRST")
        .replace(&second, &first)
        .replace("FIRST", &second);
    let all = "SELECT * FROM rekey.slot_wrap ORDER BY slot_id, root_id";
    let written = "SELECT (SELECT count(*) FROM rekey.key_slot), \
                          (SELECT count(*) FROM rekey.root_key), \
                          (SELECT count(*) FROM rekey.audit_log)";
    let before = (client.rows(all), client.rows(written));
    for (content, mode, what) in [
        (keyring(&other), 0o600, second.as_str()),
        (relabelled, 0o600, "entry 1"),
        (swapped, 0o600, "entry 1"),
        (duplicated, 0o600, "twice"),
        (right[..right.len() / 2].to_owned(), 0o600, "line 1"),
        (String::new(), 0o600, "line 1"),
        (right.clone(), 0o644, "mode 0644"),
    ] {
        cluster.write_file(&file, content.as_bytes(), mode);
        let from = cluster.log().len();
        cluster.restart("fast");
        // What is no keyring, by the postmaster; another server's, by the worker that visits.
        let named = if what == second.as_str() {
            "in database \"app\""
        } else {
            file.to_str().expect("UTF-8")
        };
        wait_until("the log names it", || {
            let log = cluster.log();
            let mut lines = log[from..].lines();
            lines.any(|line| {
                line.contains("WARNING:  pg_rekey: the root key is not available")
                    && line.contains(named)
                    && line.contains(what)
            })
        });
        let mut client = cluster.connect("app");
        client.refuse(OPEN, "F0000");
        client.refuse(ROTATE, "F0000");
        client.refuse("SELECT rotate_key('pii')", "F0000");
        client.fail(&format!("SELECT rekey.retire_root_key('{first}')"), "55000");
        let checked = client
            .column("SELECT object || ': ' || finding FROM rekey.check() WHERE severity = 'error'");
        assert!(
            checked.iter().any(|finding| finding.contains(what)),
            "{what} is not in {checked:?}"
        );
        assert_eq!(
            fs::read_to_string(&file).expect("the file"),
            content,
            "{what}: rewritten"
        );
        let now = (client.rows(all), client.rows(written));
        assert_eq!(now, before, "{what}: something was written");
        cluster.write_file(&file, right.as_bytes(), 0o600);
        cluster.reload(&mut client);
        opens(&mut client);
        assert_eq!(client.text(ACTIVE), second);
    }
}

#[test]
fn a_compromised_root_key_takes_its_slots_along() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    client.run("SELECT rekey.create_key('staged'); SELECT rekey.prepare_key('staged')");
    let old = client.text(ACTIVE);
    let mark = format!("SELECT rekey.mark_compromised_root('{old}', 'a backup was stolen')");
    client.refuse(&mark, "55000").hints("rotate_root_key");
    client.text(ROTATE);
    let wrapped = client.column("SELECT slot_id::text FROM rekey.slots ORDER BY 1");
    assert_eq!(client.number(&mark), 4);
    let marked =
        "SELECT slot_id::text FROM rekey.slots WHERE compromised_at IS NOT NULL ORDER BY 1";
    assert_eq!(client.column(marked), wrapped);
    let active = "SELECT count(*) FROM rekey.slots WHERE state = 'active' AND compromised_at IS NULL \
                  AND slot_id NOT IN (SELECT slot_id FROM rekey.slot_wrap \
                                      WHERE encode(root_id, 'hex') = '";
    assert_eq!(
        client.number(&format!("{active}{old}')")),
        2,
        "all keys seal under fresh slots"
    );
    assert_eq!(
        client.text(
            "SELECT state FROM rekey.slots WHERE reason LIKE 'a backup%' AND \
                            activated_at IS NULL"
        ),
        "destroyed",
        "what was staged is not used"
    );
    opens(&mut client);
    opens(&mut cluster.connect("app"));
    assert_eq!(
        client.text(&format!(
            "SELECT state FROM rekey.root_keys WHERE root_id = '{old}'"
        )),
        "compromised"
    );
    client.refuse(&mark, "55000").names("already");
    client.refuse(&format!("SELECT rekey.rotate_root_key('{old}')"), "55000");
    client.refuse("SELECT rekey.rollback_rotation('pii')", "55000");
    client.refuse(
        &format!(
            "SELECT rekey.mark_compromised_root('{}', '')",
            "0".repeat(32)
        ),
        "42704",
    );
    client.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    opens(&mut cluster.connect("app"));
}

#[test]
fn a_compromised_root_key_marks_slots_of_every_state_and_none_that_it_never_wrapped() {
    let cluster = start();
    let mut client = cluster.database("app").connect();
    // One slot of each state, and one that was destroyed before the leaked root key was there.
    client.run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c",
    );
    let active = "SELECT active_slot FROM rekey.keys";
    let before = client.text(active);
    client.run("SELECT rotate_key('pii')");
    client.run(&format!("SELECT rekey.destroy_slot({before}, true)"));
    let first = client.text(ACTIVE);
    let leaked = client.text(ROTATE);
    client.run(&format!("SELECT rekey.retire_root_key('{first}')"));
    for act in ["destroy_slot", "disable_slot", ""] {
        let slot = client.text(active);
        client.run("SELECT rotate_key('pii')");
        if !act.is_empty() {
            client.run(&format!("SELECT rekey.{act}({slot}, true)"));
        }
    }
    client.run("DELETE FROM t; INSERT INTO t VALUES (encrypt_col('one', 'pii'))");
    client.run("SELECT rekey.register_column('t', 'c')");
    wait_until("one is drained", || {
        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'drained'") >= 1
    });
    client
        .run("SELECT rekey.pause('t'); SELECT rotate_key('pii'); SELECT rekey.prepare_key('pii')");
    let wrapped = client.column(&format!(
        "SELECT slot_id::text FROM rekey.slots WHERE slot_id <> {before} ORDER BY 1"
    ));
    assert_eq!(
        client.column("SELECT DISTINCT state FROM rekey.slots ORDER BY 1"),
        [
            "active",
            "destroyed",
            "disabled",
            "drained",
            "pending",
            "previous"
        ]
    );
    let new = client.text(ROTATE);
    client.run(&format!("SELECT rekey.retire_root_key('{leaked}')"));
    let later = client.text("SELECT rekey.create_key('later')");
    let mark = format!("SELECT rekey.mark_compromised_root('{leaked}', 'found')");
    let count = i64::try_from(wrapped.len()).expect("a small number");
    assert_eq!(client.number(&mark), count);
    let marked =
        "SELECT slot_id::text FROM rekey.slots WHERE compromised_at IS NOT NULL ORDER BY 1";
    assert_eq!(client.column(marked), wrapped);
    assert!(!wrapped.contains(&later) && !wrapped.contains(&before));
    assert_eq!(client.text(ACTIVE), new);
    assert_eq!(client.text("SELECT decrypt_col(c) FROM t"), "one");
}

#[test]
fn a_root_key_that_is_found_out_after_its_retirement_marks_what_it_wrapped() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let before = client.column("SELECT slot_id::text FROM rekey.slots ORDER BY 1");
    let old = client.text(ACTIVE);
    client.text(ROTATE);
    client.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    let later = client.number("SELECT rekey.create_key('later')");
    assert_eq!(
        client.number(&format!(
            "SELECT rekey.mark_compromised_root('{old}', 'found')"
        )),
        2
    );
    let marked =
        "SELECT slot_id::text FROM rekey.slots WHERE compromised_at IS NOT NULL ORDER BY 1";
    assert_eq!(client.column(marked), before);
    assert!(!before.contains(&later.to_string()));
    assert_eq!(
        client.text(&format!(
            "SELECT state FROM rekey.root_keys WHERE root_id = '{old}'"
        )),
        "retired"
    );
}

#[test]
fn no_slot_is_left_out_that_is_made_beside_a_rotation() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let mut client = cluster.connect("app");
            let stop = &stop;
            scope.spawn(move || {
                let key = format!("key{worker}");
                client.run(&format!("SELECT rekey.create_key('{key}')"));
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    let slot = client.number(&format!("SELECT rotate_key('{key}')"));
                    client.run(&format!(
                        "BEGIN; SELECT rotate_key('{key}'); SELECT rekey.destroy_slot({slot}, true);
                         SELECT rekey.create_key('{key}-{number}'); COMMIT;
                         SELECT rekey.shred_key('{key}-{number}', 'test')"
                    ));
                }
            });
        }
        for _ in 0..12 {
            client.text(ROTATE);
            assert_eq!(client.number(LEFT_OUT), 0);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let of_tombstones = "SELECT count(*) FROM rekey.slot_wrap JOIN rekey.key_slot USING (slot_id) \
                         WHERE state = 'destroyed'";
    assert_eq!(
        client.number(of_tombstones),
        0,
        "nothing that was destroyed came back"
    );
    assert_eq!(client.number(LEFT_OUT), 0);
    opens(&mut client);
}

#[test]
fn a_slot_that_is_being_made_is_waited_for() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let mut maker = cluster.connect("app");
    let mut admin = cluster.connect("app");
    maker.run("BEGIN; SELECT rekey.create_key('unseen')");
    std::thread::scope(|scope| {
        let rotation = scope.spawn(|| client.text(ROTATE));
        wait_until("the rotation waits", || {
            admin.number("SELECT count(*) FROM pg_locks WHERE NOT granted") == 1
        });
        // Sealing and opening go on meanwhile.
        admin.run("INSERT INTO t SELECT encrypt_col('three', 'pii')");
        assert_eq!(admin.number("SELECT count(decrypt_col(c)) FROM t"), 3);
        maker.run("COMMIT");
        rotation.join().expect("the rotation");
    });
    assert_eq!(admin.number(LEFT_OUT), 0);
    assert_eq!(admin.number("SELECT min(slots) FROM rekey.root_keys"), 3);
}

#[test]
fn a_slot_that_is_being_destroyed_is_waited_for() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let mut admin = cluster.connect("app");
    client.run("SELECT rekey.create_key('doomed')");
    let mut destroyer = cluster.connect("app");
    destroyer.run("BEGIN; SELECT rekey.shred_key('doomed', 'test')");
    std::thread::scope(|scope| {
        let rotation = scope.spawn(|| client.text(ROTATE));
        let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted";
        wait_until("the rotation waits, or has gone past", || {
            rotation.is_finished() || admin.number(waits) == 1
        });
        destroyer.run("COMMIT");
        rotation.join().expect("the rotation");
    });
    let of_tombstones = "SELECT count(*) FROM rekey.slot_wrap JOIN rekey.key_slot USING (slot_id) \
                         WHERE state = 'destroyed'";
    assert_eq!(admin.number(of_tombstones), 0, "it has no wrapped key left");
}

#[test]
fn an_older_snapshot_does_not_leave_a_wrapped_key_behind() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let slot = client.number("SELECT previous_slots[1] FROM rekey.keys");
    let old = client.text(ACTIVE);
    client.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t");
    cluster.connect("app").text(ROTATE);
    client.refuse(&format!("SELECT rekey.destroy_slot({slot}, true)"), "40001");
    client.run("ROLLBACK");
    opens(&mut client);
    client.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t");
    cluster.connect("app").run("SELECT rotate_key('pii')");
    client.refuse(&format!("SELECT rekey.retire_root_key('{old}')"), "40001");
    client.run("ROLLBACK");
    client.run(&format!("SELECT rekey.destroy_slot({slot}, true)"));
    client.run(&format!("SELECT rekey.retire_root_key('{old}')"));
}

#[test]
fn root_keys_are_for_superusers_and_those_who_were_granted_execute() {
    let cluster = start();
    let database = cluster.database("app");
    let mut admin = rows_in(&database);
    let role = database.role("keeper");
    let mut keeper = database.connect_as(&role);
    let old = admin.text(ACTIVE);
    for sql in [
        ROTATE.to_owned(),
        format!("SELECT rekey.retire_root_key('{old}')"),
        format!("SELECT rekey.mark_compromised_root('{old}', '')"),
        format!("SELECT rekey.restore_slot(1, '', '{old}', '')"),
        "SELECT rekey.export_key('pii')".to_owned(),
        "SELECT rekey.import_key('{}')".to_owned(),
    ] {
        keeper.fail(&sql, "42501");
    }
    admin.run(&format!(
        "GRANT EXECUTE ON FUNCTION rekey.rotate_root_key, rekey.retire_root_key TO \"{role}\""
    ));
    keeper.text(ROTATE);
    keeper.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    let actor = "SELECT actor FROM rekey.audit WHERE action = 'rotate_root_key'";
    assert_eq!(admin.text(actor), role);
}

#[test]
fn slots_by_the_thousand_are_wrapped_in_batches() {
    let cluster = start();
    let mut client = with_rows(&cluster);
    let slots = if rekey_tests::long_runs() {
        100_000
    } else {
        9_000
    };
    client.run(&format!(
        "DO $$ BEGIN FOR i IN 1 .. {slots} LOOP PERFORM rekey.create_key('k' || i); END LOOP; END $$"
    ));
    let begin = std::time::Instant::now();
    let old = client.text(ACTIVE);
    client.text(ROTATE);
    let rotated = begin.elapsed();
    assert!(rotated.as_secs() < 30, "{rotated:?} are no seconds");
    assert_eq!(client.number(LEFT_OUT), 0);
    let begin = std::time::Instant::now();
    client.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    eprintln!(
        "{slots} slots: rotated in {rotated:?}, retired in {:?}",
        begin.elapsed()
    );
    assert_eq!(
        client.number("SELECT min(slots) + max(slots) FROM rekey.root_keys"),
        slots + 2
    );
    opens(&mut cluster.connect("app"));
}
