//! Streaming standbys: they open, they seal into nothing, they follow what the primary commits.
//!
//! A standby has no transaction ids and shares the primary's root key file here, as an operator who
//! has copied it would see it; what happens without the file is tried as well.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Options, wait_until};

struct Pair {
    primary: Cluster,
    standby: Cluster,
}

fn pair() -> &'static Pair {
    static PAIR: OnceLock<Pair> = OnceLock::new();
    PAIR.get_or_init(|| {
        let primary = Cluster::start(Options::preloaded());
        let standby = primary.standby();
        Pair { primary, standby }
    })
}

/// Waits until the standby has replayed all that the primary has written.
fn replayed(primary: &mut Client, standby: &mut Client) {
    let lsn = primary.text("SELECT pg_current_wal_flush_lsn()");
    wait_until("the standby has replayed", || {
        standby.truth(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'"))
    });
}

/// Sessions on both servers, with a key and one row, replayed.
fn sessions(name: &str) -> (Client, Client) {
    let pair = pair();
    let mut primary = pair.primary.database(name).connect();
    primary.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c",
    );
    let mut postgres = pair.standby.connect("postgres");
    replayed(&mut primary, &mut postgres);
    (primary, pair.standby.connect(name))
}

const OPEN: &str = "SELECT decrypt_col(c) FROM t";

#[test]
fn a_standby_opens_from_its_first_statement() {
    let (_primary, mut standby) = sessions("first");
    assert_eq!(standby.text(OPEN), "one");
    assert!(standby.truth("SELECT rekey.ready()"));
    assert!(standby.truth("SELECT rekey.can_open(c, '') FROM t"));
    assert_eq!(standby.text("SELECT key_name FROM rekey.keys"), "pii");
    assert_eq!(
        standby.text("SELECT d.state FROM t, rekey.describe(c) d"),
        "active"
    );
}

#[test]
fn a_standby_follows_rotation_grants_disabling_and_destruction() {
    let (mut primary, mut standby) = sessions("follows");
    assert_eq!(standby.text(OPEN), "one");
    let old = standby.number("SELECT active_slot FROM rekey.keys");
    let new = primary.number("SELECT rotate_key('pii')");
    primary.run("INSERT INTO t VALUES (encrypt_col('two', 'pii'))");
    replayed(&mut primary, &mut standby);
    assert_eq!(
        standby.column(&format!("{OPEN} ORDER BY 1")),
        ["one", "two"]
    );
    assert_eq!(
        standby.number("SELECT rekey.slot_id(encrypt_col('x', 'pii'))"),
        new
    );
    let of_old = format!("{OPEN} WHERE rekey.slot_id(c) = {old}");
    primary.run(&format!("SELECT rekey.disable_slot({old}, force => true)"));
    replayed(&mut primary, &mut standby);
    standby.refuse(&of_old, "55000").names(&old.to_string());
    primary.run(&format!("SELECT rekey.enable_slot({old})"));
    replayed(&mut primary, &mut standby);
    assert_eq!(standby.text(&of_old), "one");
    primary.run(&format!("SELECT rekey.destroy_slot({old}, force => true)"));
    replayed(&mut primary, &mut standby);
    standby.refuse(&of_old, "55000");
}

#[test]
fn a_standby_follows_grants_and_role_membership() {
    let (mut primary, mut standby) = sessions("grants");
    primary.run(
        "CREATE ROLE standby_group; CREATE ROLE standby_reader LOGIN;
         GRANT SELECT ON t TO standby_reader",
    );
    replayed(&mut primary, &mut standby);
    let mut reader = pair().standby.connect_as("grants", "standby_reader");
    reader.refuse(OPEN, "42501");
    primary.run(
        "SELECT rekey.grant_key('pii', 'standby_group', '{decrypt}');
         GRANT standby_group TO standby_reader",
    );
    replayed(&mut primary, &mut standby);
    assert_eq!(reader.text(OPEN), "one");
    primary.run("REVOKE standby_group FROM standby_reader");
    replayed(&mut primary, &mut standby);
    reader.refuse(OPEN, "42501");
}

#[test]
fn sealing_on_a_standby_holds_the_barrier() {
    let (_primary, mut standby) = sessions("barrier");
    standby.run("BEGIN; SELECT encrypt_col('x', 'pii')");
    let modes = standby
        .column("SELECT mode FROM pg_locks WHERE relation = 'rekey.barrier'::regclass AND granted");
    assert_eq!(modes, ["RowExclusiveLock"]);
    standby.run("COMMIT");
}

#[test]
fn administration_on_a_standby_is_refused_as_read_only() {
    let (_primary, mut standby) = sessions("admin");
    for sql in [
        "SELECT rotate_key('pii')",
        "SELECT rekey.create_key('other')",
        "SELECT rekey.set_policy('pii', custodian => 'x')",
    ] {
        standby.fail(sql, "25006");
    }
    assert_eq!(standby.text(OPEN), "one");
}

#[test]
fn a_promoted_standby_seals_opens_and_rotates() {
    let pair = pair();
    let (mut primary, _) = sessions("promoted");
    let third = pair.primary.standby();
    let mut standby = third.connect("promoted");
    assert_eq!(standby.text(OPEN), "one");
    let before = standby.text("SELECT encrypt_col('before', 'pii')");
    third.promote();
    wait_until("the standby is a primary", || {
        !standby.truth("SELECT pg_is_in_recovery()")
    });
    standby.run(&format!(
        "INSERT INTO t VALUES ('{before}'), (encrypt_col('after', 'pii'))"
    ));
    standby.run("SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('rotated', 'pii'))");
    let opened = standby.column(&format!("{OPEN} ORDER BY 1"));
    assert_eq!(opened, ["after", "before", "one", "rotated"]);
    assert_eq!(primary.text(OPEN), "one", "the old primary is untouched");
}

#[test]
fn a_standby_without_the_root_key_says_so_and_recovers_when_it_arrives() {
    let pair = pair();
    let (_primary, _standby) = sessions("late_key");
    let late = pair.primary.standby();
    let file = late.dir().join("late.json");
    late.append(&format!("rekey.root_key_file = '{}'", file.display()));
    late.restart("fast");
    let mut client = late.connect("late_key");
    client
        .refuse(OPEN, "F0000")
        .names(file.to_str().expect("a path in UTF-8"));
    assert!(!client.truth("SELECT rekey.ready()"));
    assert!(late.log().contains("WARNING"), "{}", late.log());
    let keyring = std::fs::read(pair.primary.root_key_file()).expect("the keyring");
    late.write_file(&file, &keyring, 0o600);
    late.reload(&mut client);
    assert_eq!(client.text(OPEN), "one");
    assert!(client.truth("SELECT rekey.ready()"));
}
