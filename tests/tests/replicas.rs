//! Streaming standbys and logical subscribers through rotations: what opens there, what waits for
//! them, what they do once they are promoted.
//!
//! A standby's root key file is a copy of its own where the test says so; else it shares the
//! primary's. tests/standby.rs shows standbys at rest, tests/apply.rs the replicated catalog.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use postgres::Client;
use rekey_tests::{Ask, BOUNDARIES, Cluster, GATE, Options, Refusal, wait_until};

const WRONG: &str = "SELECT count(*) FROM t WHERE decrypt_col(c) IS DISTINCT FROM shadow";
const ACTIVE_ROOT: &str = "SELECT root_id FROM rekey.root_keys WHERE state = 'active'";
const CURSOR: &str = "SELECT coalesce(max(cursor_block), 0) FROM rekey.progress_state";

/// A server whose worker is as fast as it can be, and where nothing but the tests holds snapshots.
fn primary() -> Cluster {
    Cluster::start(
        Options::preloaded()
            .set("autovacuum = off")
            .set("rekey.work_ratio = 1"),
    )
}

/// The same, with a worker that gets nowhere.
fn slow_primary() -> Cluster {
    Cluster::start(
        Options::preloaded()
            .set("autovacuum = off")
            .set("rekey.work_ratio = 0.01")
            .set("rekey.batch_target = 5ms"),
    )
}

/// A key without grace and a registered table.
fn fill(client: &mut Client, rows: u32) {
    client.run(&format!(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int PRIMARY KEY, c bytea, shadow text, n int DEFAULT 0);
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii'), 'v' || i
           FROM generate_series(1, {rows}) AS i;
         SELECT rekey.register_column('t', 'c')"
    ));
}

/// A database whose extension belongs to a superuser who can cease to be one.
fn owned_by_boss(cluster: &Cluster) -> (Client, String) {
    let database = cluster.empty_database("app", "");
    let boss = database.role("boss");
    let mut admin = database.connect();
    admin.run(&format!(
        "ALTER ROLE {boss} SUPERUSER; GRANT CREATE ON SCHEMA public TO {boss}"
    ));
    database
        .connect_as(&boss)
        .run("CREATE EXTENSION pg_rekey; SELECT rekey.init_root_key()");
    (admin, boss)
}

/// A standby by that name, which sends feedback or does not, with a root key file of its own.
fn standby(cluster: &Cluster, name: &str, feedback: bool) -> Cluster {
    let standby = cluster.standby();
    copy_keyring(cluster, &standby);
    let feedback = if feedback { "on" } else { "off" };
    standby.append(&format!(
        "cluster_name = '{name}'\nhot_standby_feedback = {feedback}\n\
         wal_receiver_status_interval = '1s'\nrekey.root_key_file = '{}'",
        standby.root_key_file().display()
    ));
    standby.restart("fast");
    let mut client = cluster.connect("postgres");
    wait_until("the standby streams", || {
        let sql = format!(
            "SELECT count(*) FROM pg_stat_replication WHERE application_name = '{name}' \
                AND state = 'streaming' AND (backend_xmin IS NOT NULL) = '{feedback}'"
        );
        client.number(&sql) == 1
    });
    standby
}

fn copy_keyring(from: &Cluster, to: &Cluster) {
    let keyring = fs::read(from.root_key_file()).expect("the keyring");
    to.write_file(&to.root_key_file(), &keyring, 0o600);
}

/// Waits until the standby has replayed all that the primary has written.
fn replayed(primary: &mut Client, standby: &mut Client) {
    let lsn = primary.text("SELECT pg_current_wal_insert_lsn()");
    wait_until("the standby has replayed", || {
        standby.truth(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'"))
    });
}

fn pause_replay(standby: &mut Client) {
    standby.run("SELECT pg_wal_replay_pause()");
    wait_until("replay is paused", || {
        standby.text("SELECT pg_get_wal_replay_pause_state()") == "paused"
    });
}

fn set(cluster: &Cluster, client: &mut Client, setting: &str) {
    client.run(&format!("ALTER SYSTEM SET {setting}"));
    cluster.reload(client);
}

fn slot(client: &mut Client, version: u32) -> i64 {
    client.number(&format!(
        "SELECT slot_id FROM rekey.slots WHERE version = {version}"
    ))
}

fn is_drained(client: &mut Client) -> bool {
    client.number("SELECT count(*) FROM rekey.slots WHERE state = 'previous'") == 0
}

/// Asks for the end of a slot until the refusal names `what`.
fn refused(client: &mut Client, slot: i64, what: &str) {
    let sql = format!("SELECT rekey.destroy_slot({slot})");
    wait_until(&format!("the refusal names {what:?}"), || {
        let refusal = client.attempt(&sql).expect_err(&sql);
        assert_eq!(refusal.code, "55000", "{refusal:?}");
        refusal.detail.contains(what)
    });
}

/// Destroys a slot as soon as nothing stands in the way.
fn destroy(client: &mut Client, slot: i64) {
    let sql = format!("SELECT rekey.destroy_slot({slot})");
    wait_until("the slot is destroyed", || client.attempt(&sql).is_ok());
}

/// What a promoted server owes: every row, a drain of what is left, another rotation.
fn goes_on(cluster: &Cluster) {
    let mut client = cluster.connect("app");
    set(cluster, &mut client, "rekey.work_ratio = 1");
    assert_eq!(client.number(WRONG), 0);
    wait_until("what was left is drained", || is_drained(&mut client));
    let old = client.number("SELECT active_slot FROM rekey.keys");
    client.run("SELECT rotate_key('pii')");
    client.run("INSERT INTO t VALUES (0, encrypt_col('new', 'pii'), 'new')");
    wait_until("its own rotation is drained", || is_drained(&mut client));
    destroy(&mut client, old);
    assert_eq!(client.number(WRONG), 0);
    assert!(client.truth("SELECT rekey.ready()"));
}

fn promote(standby: &Cluster) -> Client {
    standby.promote();
    let mut client = standby.connect("app");
    wait_until("the standby is a primary", || {
        !client.truth("SELECT pg_is_in_recovery()")
    });
    client
}

/// Has a thread beside the test end, also when the test fails: the scope waits for it.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_standby_opens_every_row_all_the_way_through_rotations() {
    let cluster = primary();
    let mut client = cluster.database("app").connect();
    fill(&mut client, 500);
    let standby = standby(&cluster, "reader", true);
    let (stop, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let reads = std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        let warm = scope.spawn(|| {
            let mut reads = 0;
            let mut warm = standby.connect("app");
            while !stop.load(Ordering::Relaxed) {
                // With feedback no read is cancelled, and each sees the one value or the other.
                assert_eq!(warm.number(WRONG), 0);
                assert_eq!(standby.connect("app").number(WRONG), 0, "a new session");
                reads += 1;
                done.store(true, Ordering::Relaxed);
            }
            reads
        });
        for version in 1..=3 {
            done.store(false, Ordering::Relaxed);
            let active = client.number("SELECT rotate_key('pii')");
            let mut reader = standby.connect("app");
            replayed(&mut client, &mut reader);
            let seals = "SELECT rekey.slot_id(encrypt_col('x', 'pii'))";
            assert_eq!(reader.number(seals), active, "for computation");
            wait_until("the rotation is drained", || is_drained(&mut client));
            let old = slot(&mut client, version);
            destroy(&mut client, old);
            wait_until("the standby has read meanwhile", || {
                done.load(Ordering::Relaxed) || warm.is_finished()
            });
        }
        stop.store(true, Ordering::Relaxed);
        warm.join().expect("the reader")
    });
    assert!(reads > 0);
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'pg_rekey%'";
    assert_eq!(standby.connect("app").number(workers), 0);
}

#[test]
fn a_standby_promoted_in_the_middle_of_re_encryption_goes_on_at_its_cursor() {
    let cluster = slow_primary();
    let mut client = cluster.database("app").connect();
    fill(&mut client, 5_000);
    let standby = standby(&cluster, "heir", false);
    client.run("SELECT rekey.prepare_key('pii')");
    client.run("SELECT rotate_key('pii')");
    let mut heir = standby.connect("app");
    wait_until("some batches have reached the standby", || {
        heir.attempt(CURSOR).is_ok() && heir.number(CURSOR) > 2
    });
    cluster.kill();
    let at = heir.number(CURSOR);
    let mut client = promote(&standby);
    assert!(!is_drained(&mut client));
    assert!(client.number(CURSOR) >= at);
    goes_on(&standby);
}

/// Promotes a standby while the primary's worker stands at each of these boundaries, one after the
/// other; the primary goes on as well.
fn promoted_at(boundaries: &[&str]) {
    let cluster = primary();
    let mut client = cluster.database("app").connect();
    fill(&mut client, 200);
    client.run("SELECT rekey.set_policy('pii', after_drain => 'destroy')");
    set(&cluster, &mut client, "rekey.standby_query_delay = 0");
    let mut gate = cluster.connect("app");
    let open = "SELECT count(*) FROM rekey.slots WHERE state <> 'destroyed'";
    for boundary in boundaries {
        let heir = standby(&cluster, "heir", false);
        gate.run(&format!("SELECT pg_advisory_lock({GATE})"));
        cluster.arm(boundary, "wait");
        client.run("SELECT rotate_key('pii')");
        let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
        wait_until(boundary, || client.number(waits) == 1);
        // What the worker has not committed is in the WAL as well: a commit flushes it.
        client.run("SELECT pg_logical_emit_message(true, '', '')");
        let lsn = client.text("SELECT pg_current_wal_flush_lsn()");
        let mut there = heir.connect("app");
        wait_until("the standby has replayed", || {
            there.truth(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'"))
        });
        assert_eq!(there.number(open), 2, "{boundary}: it has come to its end");
        let mut promoted = promote(&heir);
        for round in ["what was left", "its own rotation"] {
            assert_eq!(promoted.number(WRONG), 0, "{boundary}");
            wait_until(&format!("{round} is drained after {boundary}"), || {
                promoted.number(open) == 1
            });
            assert_eq!(promoted.number(WRONG), 0, "{boundary}: {round}");
            promoted.run("SELECT rotate_key('pii')");
        }
        assert_eq!(promoted.number("SELECT count(*) FROM t"), 200);
        gate.run(&format!("SELECT pg_advisory_unlock({GATE})"));
        wait_until("the old primary goes on", || client.number(open) == 1);
        assert_eq!(client.number(WRONG), 0, "{boundary}");
    }
}

#[test]
fn a_standby_promoted_at_each_boundary_of_the_worker_goes_on() {
    let (first, second) = BOUNDARIES.split_at(BOUNDARIES.len() / 2);
    std::thread::scope(|scope| {
        scope.spawn(|| promoted_at(first));
        scope.spawn(|| promoted_at(second));
    });
}

#[test]
fn a_standby_promoted_in_the_middle_of_a_root_rotation_goes_on() {
    let cluster = primary();
    let mut client = cluster.database("app").connect();
    fill(&mut client, 100);
    let old = client.text(ACTIVE_ROOT);
    let [early, late] = ["early", "late"].map(|name| standby(&cluster, name, false));
    // Before the commit: the primary's file has the new root key, nothing else knows of it.
    let mut rotating = cluster.connect("app");
    rotating.run("BEGIN");
    let new = rotating.text("SELECT rekey.rotate_root_key()");
    let mut promoted = promote(&early);
    assert_eq!(promoted.text(ACTIVE_ROOT), old);
    let own = promoted.text("SELECT rekey.rotate_root_key()");
    assert_ne!(own, new);
    promoted.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    goes_on(&early);
    // After the commit, before the file has been copied.
    rotating.run("COMMIT; SELECT rotate_key('pii')");
    wait_until("the rotation is drained", || is_drained(&mut client));
    let mut reader = late.connect("app");
    replayed(&mut client, &mut reader);
    cluster.kill();
    let mut promoted = promote(&late);
    assert_eq!(promoted.text(ACTIVE_ROOT), new);
    assert!(
        !promoted.truth("SELECT rekey.ready()"),
        "it says what it lacks"
    );
    assert_eq!(promoted.number(WRONG), 0, "by the old wrapped keys");
    assert_eq!(
        promoted.text("SELECT decrypt_col(encrypt_col('x', 'pii'))"),
        "x"
    );
    promoted.fail(&format!("SELECT rekey.retire_root_key('{old}')"), "55000");
    copy_keyring(&cluster, &late);
    promoted.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    goes_on(&late);
}

/// Waits until the primary has heard that the standby has replayed everything.
fn heard(client: &mut Client, standby: &str) {
    wait_until("the primary has heard that it is replayed", || {
        client.truth(&format!(
            "SELECT coalesce(bool_and(replay_lsn >= pg_current_wal_flush_lsn()), false)
               FROM pg_stat_replication WHERE application_name = '{standby}'"
        ))
    });
}

#[test]
fn a_promotion_of_a_slot_waits_for_the_laggard_and_names_it() {
    let cluster = primary();
    let mut client = cluster.database("app").connect();
    fill(&mut client, 10);
    let [near, far] = ["near", "far"].map(|name| standby(&cluster, name, false));
    let mut laggard = far.connect("app");
    pause_replay(&mut laggard);
    let before = client.number("SELECT active_slot FROM rekey.keys");
    let pending = client.number("SELECT rekey.prepare_key('pii')");
    heard(&mut client, "near");
    let promote = |limit: &str| {
        format!(
            "SELECT rekey.promote_key('pii', wait_for_standbys => true, wait_timeout => '{limit}')"
        )
    };
    let refusal = client.refuse(&promote("300 ms"), "55000").names("far");
    assert!(!refusal.text().contains("near"), "{refusal:?}");
    assert_eq!(client.number("SELECT active_slot FROM rekey.keys"), before);
    let seals = "SELECT rekey.slot_id(encrypt_col('x', 'pii'))";
    assert_eq!(
        client.number(seals),
        before,
        "nothing is sealed under it yet"
    );
    let mut waiting = cluster.connect("app");
    std::thread::scope(|scope| {
        let promotion = scope.spawn(|| waiting.number(&promote("60 s")));
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%promote_key%' \
                        AND state = 'active' AND wait_event = 'Extension'";
        wait_until("the promotion waits", || client.number(waits) == 1);
        assert!(!promotion.is_finished());
        laggard.run("SELECT pg_wal_replay_resume()");
        assert_eq!(promotion.join().expect("the promotion"), pending);
    });
    let known = format!("SELECT count(*) FROM rekey.slots WHERE slot_id = {pending}");
    for standby in [&near, &far] {
        assert_eq!(standby.connect("app").number(&known), 1);
    }
    // A standby that is away counts as long as a replication slot stands for it.
    client.run("SELECT pg_create_physical_replication_slot('away', true)");
    client.run("SELECT rekey.prepare_key('pii')");
    client
        .refuse(&promote("300 ms"), "55000")
        .names("slot away");
    client.run("SELECT pg_drop_replication_slot('away')");
    client.run(&promote("60 s"));
}

/// Without a replication slot nothing stands for it, and it may go on serving reads.
#[test]
fn a_promotion_waits_for_a_laggard_that_disconnects_meanwhile() {
    let cluster = primary();
    let mut client = cluster.database("app").connect();
    client.run("SELECT rekey.create_key('pii')");
    let far = standby(&cluster, "far", false);
    pause_replay(&mut far.connect("app"));
    let pending = client.number("SELECT rekey.prepare_key('pii')");
    let promote = |limit: &str| {
        format!(
            "SELECT rekey.promote_key('pii', wait_for_standbys => true, wait_timeout => '{limit}')"
        )
    };
    let mut waiting = cluster.connect("app");
    std::thread::scope(|scope| {
        let promotion = scope.spawn(|| waiting.attempt(&promote("5 s")).err());
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%promote_key%' \
                        AND state = 'active' AND wait_event = 'Extension'";
        wait_until("the promotion waits", || client.number(waits) == 1);
        far.stop("fast");
        let refusal = promotion.join().expect("the promotion");
        refusal.expect("a refusal").names("far");
    });
    far.boot();
    wait_until("it is back", || {
        client.number("SELECT count(*) FROM pg_stat_replication") == 1
    });
    assert_eq!(client.number(&promote("60 s")), pending);
    let known = format!("SELECT count(*) FROM rekey.slots WHERE slot_id = {pending}");
    assert_eq!(far.connect("app").number(&known), 1);
    // One that nobody has seen behind is not waited for.
    far.stop("fast");
    client.run("SELECT rekey.prepare_key('pii')");
    client.run(&promote("60 s"));
}

/// Its commit is on no disk yet, and no standby can have heard of it.
#[test]
fn a_promotion_waits_for_a_preparation_with_synchronous_commit_off() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.worker = off")
            .set("autovacuum = off"),
    );
    let mut client = cluster.database("app").connect();
    client.run("SELECT rekey.create_key('pii')");
    let far = standby(&cluster, "far", false);
    let mut laggard = far.connect("app");
    set(&cluster, &mut client, "wal_writer_delay = '10s'");
    heard(&mut client, "far");
    pause_replay(&mut laggard);
    client.run("SET synchronous_commit = off");
    let pending = client.number("SELECT rekey.prepare_key('pii')");
    let promote = |limit: &str| {
        format!(
            "SELECT rekey.promote_key('pii', wait_for_standbys => true, wait_timeout => '{limit}')"
        )
    };
    client.refuse(&promote("300 ms"), "55000").names("far");
    laggard.run("SELECT pg_wal_replay_resume()");
    assert_eq!(client.number(&promote("60 s")), pending);
    let known = format!("SELECT count(*) FROM rekey.slots WHERE slot_id = {pending}");
    assert_eq!(laggard.number(&known), 1);
}

/// pg_stat_replication shows the rows of others without their columns to whoever lacks pg_monitor.
#[test]
fn a_promotion_waits_for_standbys_that_the_owner_of_the_extension_may_not_see() {
    let cluster = primary();
    let (mut admin, boss) = owned_by_boss(&cluster);
    admin.run(&format!(
        "SELECT rekey.create_key('pii'); ALTER ROLE {boss} NOSUPERUSER"
    ));
    let far = standby(&cluster, "far", false);
    let mut laggard = far.connect("app");
    pause_replay(&mut laggard);
    let pending = admin.number("SELECT rekey.prepare_key('pii')");
    let promote = |limit: &str| {
        format!(
            "SELECT rekey.promote_key('pii', wait_for_standbys => true, wait_timeout => '{limit}')"
        )
    };
    admin
        .refuse(&promote("300 ms"), "55000")
        .names("pg_monitor");
    admin.run(&format!("GRANT pg_monitor TO {boss}"));
    admin.refuse(&promote("300 ms"), "55000").names("far");
    laggard.run("SELECT pg_wal_replay_resume()");
    assert_eq!(admin.number(&promote("60 s")), pending);
}

/// It is no standby: nobody reads there what is sealed here.
#[test]
fn a_promotion_does_not_wait_for_a_consumer_of_logical_decoding() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("wal_level = logical")
            .set("rekey.worker = off"),
    );
    let mut source = cluster.database("app").connect();
    source.run(
        "SELECT rekey.create_key('pii'); CREATE TABLE rows (id int PRIMARY KEY);
         CREATE PUBLICATION away FOR TABLE rows",
    );
    source.run("SELECT pg_create_logical_replication_slot('late', 'pgoutput')");
    let mut target = cluster.empty_database("target", "").connect();
    target.run("CREATE TABLE rows (id int PRIMARY KEY)");
    target.run(&format!(
        "CREATE SUBSCRIPTION late CONNECTION 'host={} dbname=app user=postgres' PUBLICATION away
            WITH (create_slot = false, slot_name = 'late', copy_data = false)",
        cluster.dir().display()
    ));
    let mut blocker = cluster.connect("target");
    blocker.run("BEGIN; LOCK TABLE rows IN ACCESS EXCLUSIVE MODE");
    source.run("INSERT INTO rows VALUES (1)");
    let late = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'rows'::regclass";
    wait_until("its apply worker stands still", || target.number(late) == 1);
    let pending = source.number("SELECT rekey.prepare_key('pii')");
    let promote =
        "SELECT rekey.promote_key('pii', wait_for_standbys => true, wait_timeout => '5 s')";
    assert_eq!(source.number(promote), pending);
    blocker.run("ROLLBACK");
    target.run("ALTER SUBSCRIPTION late DISABLE");
    target.run("ALTER SUBSCRIPTION late SET (slot_name = NONE)");
    target.run("DROP SUBSCRIPTION late");
}

#[test]
fn a_query_on_a_standby_of_a_standby_keeps_its_slot_by_the_feedback_of_both() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("autovacuum = off")
            .set("rekey.work_ratio = 1")
            .set("full_page_writes = on"), // for a backup of a standby
    );
    let mut client = cluster.database("app").connect();
    fill(&mut client, 50);
    let near = standby(&cluster, "near", true);
    let far = near.standby();
    let mut between = near.connect("app");
    let feedback = "SELECT count(*) FROM pg_stat_replication WHERE backend_xmin IS NOT NULL";
    wait_until("it sends feedback", || between.number(feedback) == 1);
    let mut reader = far.connect("app");
    replayed(&mut client, &mut reader);
    let first = slot(&mut client, 1);
    reader.run("BEGIN ISOLATION LEVEL REPEATABLE READ");
    assert_eq!(reader.number(&format!("{WRONG} AND id < 10")), 0);
    client.run("SELECT rotate_key('pii')");
    wait_until("the rotation is drained", || is_drained(&mut client));
    replayed(&mut client, &mut reader);
    refused(&mut client, first, "standby near");
    let stale = format!("SELECT count(*) FROM t WHERE rekey.slot_id(c) = {first}");
    assert_eq!(reader.number(&stale), 50, "it sees what was");
    assert_eq!(reader.number(WRONG), 0, "and opens it");
    reader.run("COMMIT");
    destroy(&mut client, first);
    replayed(&mut client, &mut reader);
    assert_eq!(reader.number(&stale), 0);
    assert_eq!(reader.number(WRONG), 0);
}

#[test]
fn a_query_on_a_standby_with_feedback_keeps_its_slot() {
    let cluster = primary();
    let mut client = cluster.database("app").connect();
    fill(&mut client, 50);
    let standby = standby(&cluster, "reader", true);
    let mut reader = standby.connect("app");
    replayed(&mut client, &mut reader);
    let first = slot(&mut client, 1);
    reader.run("BEGIN ISOLATION LEVEL REPEATABLE READ");
    assert_eq!(reader.number(&format!("{WRONG} AND id < 10")), 0);
    client.run("SELECT rotate_key('pii')");
    wait_until("the rotation is drained", || is_drained(&mut client));
    replayed(&mut client, &mut reader);
    refused(&mut client, first, "standby reader");
    client.run("VACUUM t");
    replayed(&mut client, &mut reader);
    let stale = format!("SELECT count(*) FROM t WHERE rekey.slot_id(c) = {first}");
    assert_eq!(reader.number(&stale), 50, "it sees what was");
    assert_eq!(reader.number(WRONG), 0, "and opens it");
    refused(&mut client, first, "standby reader");
    reader.run("COMMIT");
    destroy(&mut client, first);
    replayed(&mut client, &mut reader);
    assert_eq!(reader.number(&stale), 0);
    assert_eq!(reader.number(WRONG), 0);
}

#[test]
fn a_standby_without_feedback_has_to_replay_the_proof_and_gets_time_for_its_queries() {
    let cluster = primary();
    let mut client = cluster.database("app").connect();
    fill(&mut client, 50);
    let standby = standby(&cluster, "silent", false);
    let mut admin = standby.connect("app");
    pause_replay(&mut admin);
    let first = slot(&mut client, 1);
    client.run("SELECT rotate_key('pii')");
    wait_until("the rotation is drained", || is_drained(&mut client));
    refused(&mut client, first, "not replayed the proof: silent");
    assert_eq!(admin.number(WRONG), 0);
    admin.run("SELECT pg_wal_replay_resume()");
    replayed(&mut client, &mut admin);
    refused(&mut client, first, "may still run older queries");
    set(&cluster, &mut client, "rekey.standby_query_delay = -1");
    refused(&mut client, first, "rekey.standby_query_delay is -1");
    set(&cluster, &mut client, "rekey.standby_query_delay = 0");
    // Away, it counts by its replication slot.
    client.run("SELECT pg_create_physical_replication_slot('silent', true)");
    standby.append("primary_slot_name = 'silent'");
    standby.restart("fast");
    let streams = "SELECT count(*) FROM pg_replication_slots WHERE active";
    wait_until("it streams again", || client.number(streams) == 1);
    let follows = "SELECT restart_lsn >= pg_current_wal_insert_lsn() FROM pg_replication_slots";
    wait_until("its slot follows", || {
        client.cell(follows).as_deref() == Some("t")
    });
    standby.stop("fast");
    wait_until("it is away", || client.number(streams) == 0);
    set(&cluster, &mut client, "rekey.standby_query_delay = -1");
    refused(&mut client, first, "rekey.standby_query_delay is -1");
    client.run("SELECT rotate_key('pii')");
    wait_until("the second rotation is drained", || is_drained(&mut client));
    set(&cluster, &mut client, "rekey.standby_query_delay = 0");
    let second = slot(&mut client, 2);
    refused(&mut client, second, "replication slots silent");
    standby.boot();
    destroy(&mut client, first);
    destroy(&mut client, second);
    let mut reader = standby.connect("app");
    replayed(&mut client, &mut reader);
    assert_eq!(reader.number(WRONG), 0);
}

/// To him the view shows NULLs.
#[test]
fn a_slot_does_not_end_past_a_standby_that_the_owner_of_the_extension_may_not_see() {
    let cluster = primary();
    let (mut client, boss) = owned_by_boss(&cluster);
    fill(&mut client, 50);
    client.run(&format!("ALTER ROLE {boss} NOSUPERUSER"));
    let far = standby(&cluster, "far", false);
    let mut laggard = far.connect("app");
    pause_replay(&mut laggard);
    let first = slot(&mut client, 1);
    client.run("SELECT rotate_key('pii')");
    wait_until("the rotation is drained", || is_drained(&mut client));
    set(&cluster, &mut client, "rekey.standby_query_delay = 0");
    refused(&mut client, first, "lacks pg_monitor");
    client.run(&format!("GRANT pg_monitor TO {boss}"));
    refused(&mut client, first, "not replayed the proof: far");
    laggard.run("SELECT pg_wal_replay_resume()");
    replayed(&mut client, &mut laggard);
    destroy(&mut client, first);
}

/// What an old snapshot sees: every row as it was, or the end of its slot, or of its query.
fn looks(session: &mut Client, slot: i64) -> &'static str {
    match session.simple_query(WRONG) {
        Ok(_) => {
            assert_eq!(session.number(WRONG), 0, "a wrong value");
            "opens"
        }
        Err(error) => {
            let refusal = Refusal::of(&error, WRONG);
            match refusal.code.as_str() {
                "55000" => {
                    refusal.names(&slot.to_string());
                    "closed"
                }
                "40001" => "cancelled",
                _ => panic!("{refusal:?}"),
            }
        }
    }
}

#[test]
fn an_old_snapshot_on_a_standby_sees_no_wrong_value_when_its_slot_is_destroyed() {
    let cluster = primary();
    let mut client = cluster.database("app").connect();
    fill(&mut client, 50);
    let standby = standby(&cluster, "late", false);
    // What takes rows from under a snapshot ends it. First nothing does: the worker, which prunes
    // as it goes, is off.
    set(&cluster, &mut client, "rekey.worker = off");
    let mut admin = standby.connect("app");
    set(
        &standby,
        &mut admin,
        "max_standby_streaming_delay = '100ms'",
    );
    replayed(&mut client, &mut admin);
    let first = slot(&mut client, 1);
    let sessions = || {
        let mut sessions = [(); 2].map(|()| standby.connect("app"));
        for session in &mut sessions {
            session.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t");
        }
        assert_eq!(looks(&mut sessions[0], first), "opens", "it is warm");
        sessions
    };
    let mut before = sessions();
    client.run("SELECT rotate_key('pii')");
    client.run("UPDATE t SET c = encrypt_col(shadow, 'pii')");
    replayed(&mut client, &mut admin);
    for session in &mut before {
        assert_eq!(looks(session, first), "opens");
    }
    client.run(&format!("SELECT rekey.destroy_slot({first}, true)"));
    replayed(&mut client, &mut admin);
    for session in &mut before {
        assert_eq!(looks(session, first), "closed", "warm or cold");
        session.run("ROLLBACK");
        assert_eq!(looks(session, first), "opens");
    }
    let mut before = sessions();
    client.run("SELECT rotate_key('pii')");
    client.run("UPDATE t SET c = encrypt_col(shadow, 'pii')");
    client.run("VACUUM t");
    replayed(&mut client, &mut admin);
    for session in &mut before {
        assert_eq!(looks(session, first), "cancelled");
    }
    assert_eq!(admin.number(WRONG), 0);
}
