//! Slots staged ahead (prepare, promote) and slots reported compromised.
//!
//! A pending slot opens and does not seal; it is what rotations, and reports that the active slot is
//! compromised, make active. A compromised slot opens as its state says and never seals again.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded()))
}

fn session(name: &str) -> (Database<'static>, Client, i64) {
    let database = cluster().database(name);
    let mut client = database.connect();
    let slot = client.number("SELECT rekey.create_key('pii')");
    (database, client, slot)
}

fn states(client: &mut Client) -> String {
    client
        .column("SELECT version || ' ' || state FROM rekey.slots ORDER BY version")
        .join(", ")
}

fn seals_under(client: &mut Client) -> i64 {
    client.number("SELECT rekey.slot_id(encrypt_col('x', 'pii'))")
}

const PREPARE: &str = "SELECT rekey.prepare_key('pii')";
const PROMOTE: &str = "SELECT rekey.promote_key('pii')";

#[test]
fn a_pending_slot_does_not_seal_until_it_is_promoted() {
    let (database, mut client, first) = session("promoted");
    let mut warm = database.connect();
    assert_eq!(seals_under(&mut warm), first);
    let pending = client.number(PREPARE);
    assert_ne!(pending, first);
    assert_eq!(
        client.number(PREPARE),
        pending,
        "a second call returns the same slot"
    );
    assert_eq!(states(&mut client), "1 active, 2 pending");
    assert_eq!(seals_under(&mut warm), first);
    assert_eq!(client.number(PROMOTE), pending);
    assert_eq!(states(&mut client), "1 previous, 2 active");
    assert_eq!(seals_under(&mut warm), pending);
    client.refuse(PROMOTE, "55000");
}

#[test]
fn rotate_key_promotes_a_pending_slot() {
    let (_database, mut client, _) = session("rotated");
    let pending = client.number(PREPARE);
    assert_eq!(client.number("SELECT rotate_key('pii')"), pending);
    assert_eq!(states(&mut client), "1 previous, 2 active");
    assert_ne!(
        client.number("SELECT rotate_key('pii')"),
        pending,
        "and then makes a new one"
    );
    assert_eq!(states(&mut client), "1 previous, 2 previous, 3 active");
}

#[test]
fn a_rolled_back_promotion_leaves_the_slot_pending() {
    let (_database, mut client, first) = session("unpromoted");
    let pending = client.number(PREPARE);
    client.run("BEGIN");
    client.number(PROMOTE);
    assert_eq!(seals_under(&mut client), pending);
    client.run("ROLLBACK");
    assert_eq!(states(&mut client), "1 active, 2 pending");
    assert_eq!(seals_under(&mut client), first);
}

#[test]
fn a_pending_slot_may_be_destroyed_but_not_disabled() {
    let (_database, mut client, _) = session("dropped");
    let pending = client.number(PREPARE);
    client.refuse(&format!("SELECT rekey.disable_slot({pending})"), "55000");
    client.refuse(
        &format!("SELECT rekey.disable_slot({pending}, force => true)"),
        "55000",
    );
    client.refuse(&format!("SELECT rekey.enable_slot({pending})"), "55000");
    client.run(&format!("SELECT rekey.destroy_slot({pending})"));
    assert_eq!(states(&mut client), "1 active, 2 destroyed");
    client.refuse(PROMOTE, "55000");
    assert!(
        client.number(PREPARE) != pending,
        "a new slot, under a new id"
    );
    assert_eq!(states(&mut client), "1 active, 2 destroyed, 3 pending");
    assert_eq!(
        client.number("SELECT rekey.shred_key('pii', 'all of them')"),
        2
    );
    client.refuse(PREPARE, "55000");
    client.run("SELECT rekey.drop_key('pii')");
}

#[test]
fn promotion_waits_for_a_standby_or_says_that_it_did_not() {
    let primary = Cluster::start(Options::preloaded());
    let mut client = primary.database("app").connect();
    client.run("SELECT rekey.create_key('pii')");
    client.run("BEGIN");
    client.number(PREPARE);
    client.refuse(
        "SELECT rekey.promote_key('pii', wait_for_standbys => true)",
        "55000",
    );
    client.run("ROLLBACK");
    let standby = primary.standby();
    let mut replica = standby.connect("app");
    // It takes queries before it streams, and who does not stream is not waited for.
    wait_until("the standby streams", || {
        client.number("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") == 1
    });
    let pending = client.number(PREPARE);
    let promoted = client.number(
        "SELECT rekey.promote_key('pii', wait_for_standbys => true, wait_timeout => '60 s')",
    );
    assert_eq!(promoted, pending);
    let known = format!("SELECT count(*) FROM rekey.slots WHERE slot_id = {pending}");
    assert_eq!(
        replica.number(&known),
        1,
        "the standby knew the slot before its first use"
    );
    replica.run("SELECT pg_wal_replay_pause()");
    wait_until("replay is paused", || {
        replica.text("SELECT pg_get_wal_replay_pause_state()") == "paused"
    });
    let next = client.number(PREPARE);
    client
        .attempt(
            "SELECT rekey.promote_key('pii', wait_for_standbys => true, wait_timeout => '1 s')",
        )
        .expect_err("the standby does not replay");
    assert_eq!(
        client.number("SELECT active_slot FROM rekey.keys"),
        pending,
        "nothing happened"
    );
    replica.run("SELECT pg_wal_replay_resume()");
    let promoted = client.number(
        "SELECT rekey.promote_key('pii', wait_for_standbys => true, wait_timeout => '60 s')",
    );
    assert_eq!(promoted, next);
}

#[test]
fn a_compromised_active_slot_is_rotated_at_once() {
    let (database, mut client, first) = session("compromised");
    let mut warm = database.connect();
    client.run("CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c");
    assert_eq!(seals_under(&mut warm), first);
    client.run(&format!(
        "SELECT rekey.mark_compromised({first}, 'leaked by a laptop')"
    ));
    assert_eq!(states(&mut client), "1 previous, 2 active");
    assert_ne!(seals_under(&mut warm), first, "seals no more");
    assert_eq!(
        warm.text("SELECT decrypt_col(c) FROM t"),
        "one",
        "opens as its state says"
    );
    assert!(client.truth(
        "SELECT compromised_at IS NOT NULL AND reason = 'leaked by a laptop' FROM rekey.slots \
         WHERE version = 1"
    ));
    client.refuse("SELECT rekey.rollback_rotation('pii')", "55000");
    client.refuse(
        &format!("SELECT rekey.mark_compromised({first}, 'again')"),
        "55000",
    );
    client.run("SELECT rotate_key('pii')");
    client.run("SELECT rekey.rollback_rotation('pii')");
    assert_eq!(
        states(&mut client),
        "1 previous, 2 active, 3 previous",
        "back to the sound one"
    );
    let audited = client.truth(
        "SELECT bool_or(action = 'mark_compromised' AND slot_id IS NOT NULL) FROM rekey.audit",
    );
    assert!(audited);
}

#[test]
fn a_compromised_active_slot_gives_way_to_the_pending_one() {
    let (_database, mut client, first) = session("gives_way");
    let pending = client.number(PREPARE);
    client.run(&format!("SELECT rekey.mark_compromised({first}, 'x')"));
    assert_eq!(states(&mut client), "1 previous, 2 active");
    assert_eq!(seals_under(&mut client), pending);
}

#[test]
fn a_compromised_pending_slot_is_destroyed() {
    let (_database, mut client, first) = session("never_used");
    let pending = client.number(PREPARE);
    client.run(&format!("SELECT rekey.mark_compromised({pending}, 'x')"));
    assert_eq!(states(&mut client), "1 active, 2 destroyed");
    assert_eq!(seals_under(&mut client), first);
    client.refuse(PROMOTE, "55000");
}

#[test]
fn bad_arguments_are_refused() {
    let (_database, mut client, first) = session("arguments");
    client.refuse("SELECT rekey.prepare_key(NULL)", "22004");
    client.refuse("SELECT rekey.prepare_key('nope')", "42704");
    client.refuse("SELECT rekey.promote_key(NULL)", "22004");
    client.refuse("SELECT rekey.promote_key('nope')", "42704");
    client.refuse(PROMOTE, "55000");
    client.refuse("SELECT rekey.mark_compromised(42, 'x')", "42704");
    client.refuse("SELECT rekey.mark_compromised(NULL, 'x')", "22004");
    client.refuse(
        &format!("SELECT rekey.mark_compromised({first}, NULL)"),
        "22004",
    );
    client.number(PREPARE);
    client.refuse(
        "SELECT rekey.promote_key('pii', wait_for_standbys => true, wait_timeout => '-1 s')",
        "22023",
    );
    assert_eq!(states(&mut client), "1 active, 2 pending");
}

#[test]
fn rotators_prepare_and_promote_and_managers_report() {
    let (database, mut client, first) = session("privileged");
    let (rotator, manager) = (database.role("rotator"), database.role("manager"));
    client.run(&format!(
        "SELECT rekey.grant_key('pii', '{rotator}', '{{rotate}}');
         SELECT rekey.grant_key('pii', '{manager}', '{{manage}}')"
    ));
    let report = format!("SELECT rekey.mark_compromised({first}, 'x')");
    let mut session = database.connect_as(&rotator);
    session.number(PREPARE);
    session.number(PROMOTE);
    session.refuse(&report, "42501");
    let mut session = database.connect_as(&manager);
    session.refuse(PREPARE, "42501");
    session.refuse(PROMOTE, "42501");
    session.run(&report);
}
