//! What the worker rests for: each brake shows its reason, and the work goes on when the reason is
//! gone. A server for each test, since the settings are the server's.

use postgres::Client;
use rekey_tests::{Ask, Cluster, Options, wait_until};

/// Autovacuum and checkpoints come when a test asks for them.
fn options() -> Options {
    Options::preloaded()
        .set("rekey.work_ratio = 1")
        .set("autovacuum_naptime = 1h")
        .set("checkpoint_timeout = 1h")
}

/// A registered table of several batches whose rows are about to become stale.
fn prepare(cluster: &Cluster) -> Client {
    let mut client = cluster.database("paced").connect();
    client.run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int PRIMARY KEY, c bytea, note text DEFAULT repeat('x', 100));
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii') FROM generate_series(1, 1000) AS i;
         SELECT rekey.register_column('t', 'c')",
    );
    client
}

/// Has the worker begin, and waits until it rests in the middle of the table for this reason.
fn rests_for(client: &mut Client, reason: &str) {
    client.run("SELECT rotate_key('pii')");
    let shown = "SELECT coalesce(min(waits_for), '') FROM rekey.progress WHERE phase = 'pass'";
    wait_until(&format!("it rests: {reason}"), || {
        client.text(shown).contains(reason)
    });
    assert!(client.number("SELECT count(*) FROM t WHERE rekey.is_stale(c)") > 0);
    let activity = "SELECT query FROM pg_stat_activity WHERE backend_type = 'pg_rekey worker'";
    let activity = client.text(activity);
    assert!(activity.contains(reason), "{activity}");
}

fn goes_on(client: &mut Client) {
    wait_until("the rotation is drained", || {
        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'previous'") == 0
    });
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE decrypt_col(c) = 'v' || id"),
        1000
    );
}

fn set(cluster: &Cluster, client: &mut Client, setting: &str) {
    client.run(&format!("ALTER SYSTEM SET {setting}"));
    cluster.reload(client);
}

fn reset(cluster: &Cluster, client: &mut Client, setting: &str) {
    client.run(&format!("ALTER SYSTEM RESET {setting}"));
    cluster.reload(client);
}

#[test]
fn the_pace_of_wal_is_shown_where_it_makes_long_rests() {
    let cluster = Cluster::start(options());
    let mut client = prepare(&cluster);
    set(&cluster, &mut client, "rekey.max_wal_rate = '1kB'");
    rests_for(&mut client, "rekey.max_wal_rate");
    set(&cluster, &mut client, "rekey.max_wal_rate = 0");
    goes_on(&mut client);
}

#[test]
fn a_disk_that_is_nearly_full() {
    let cluster = Cluster::start(options());
    let mut client = prepare(&cluster);
    set(&cluster, &mut client, "rekey.min_free_disk = '1024TB'");
    rests_for(&mut client, "rekey.min_free_disk");
    reset(&cluster, &mut client, "rekey.min_free_disk");
    goes_on(&mut client);
}

#[test]
fn an_archive_that_takes_no_wal() {
    let cluster = Cluster::start(
        options()
            .set("archive_mode = on")
            .set("archive_command = 'false'"),
    );
    let mut client = prepare(&cluster);
    client.run("SELECT pg_switch_wal()");
    wait_until("archiving has failed", || {
        client.number("SELECT failed_count FROM pg_stat_archiver") > 0
    });
    rests_for(&mut client, "archiving fails");
    set(&cluster, &mut client, "archive_command = 'true'");
    goes_on(&mut client);
    // The failures of an archive that was given up are history.
    set(&cluster, &mut client, "archive_command = 'false'");
    let failed = client.number("SELECT failed_count FROM pg_stat_archiver");
    client.run("SELECT pg_switch_wal()");
    wait_until("archiving has failed again", || {
        client.number("SELECT failed_count FROM pg_stat_archiver") > failed
    });
    client.run("ALTER SYSTEM SET archive_mode = off");
    drop(client);
    cluster.restart("fast");
    let mut client = cluster.connect("paced");
    client.run("SELECT rotate_key('pii')");
    goes_on(&mut client);
    assert!(client.truth("SELECT last_failed_time > last_archived_time FROM pg_stat_archiver"));
}

#[test]
fn a_replication_slot_that_is_losing_wal() {
    let cluster = Cluster::start(options().set("max_slot_wal_keep_size = '1MB'"));
    let mut client = prepare(&cluster);
    client.run("SELECT pg_create_physical_replication_slot('behind', true)");
    client.run("SELECT pg_switch_wal(); CREATE TABLE filled (); SELECT pg_switch_wal()");
    client.run("DROP TABLE filled");
    assert_eq!(
        client.text("SELECT wal_status FROM pg_replication_slots"),
        "unreserved"
    );
    rests_for(&mut client, "a replication slot is losing WAL");
    client.run("SELECT pg_drop_replication_slot('behind')");
    goes_on(&mut client);
}

#[test]
fn a_table_that_waits_for_vacuum() {
    let cluster = Cluster::start(options());
    let mut client = prepare(&cluster);
    client.run(
        "INSERT INTO t (id) SELECT i FROM generate_series(2000, 102100) AS i;
         DELETE FROM t WHERE id >= 2000",
    );
    wait_until("the dead rows are counted", || {
        client.number("SELECT pg_stat_get_dead_tuples('t'::regclass)") > 100_000
    });
    rests_for(&mut client, "rekey.max_dead_ratio");
    client.run("VACUUM t");
    goes_on(&mut client);
}

#[test]
fn a_table_whose_statistics_a_crash_has_taken_does_not_wait_for_vacuum() {
    let cluster = Cluster::start(options());
    let mut client = prepare(&cluster);
    client.run("INSERT INTO t (id, note) SELECT i, '' FROM generate_series(2000, 252000) AS i");
    client.run("VACUUM ANALYZE t");
    client.run("SELECT pg_stat_force_next_flush()");
    client.run("SELECT pg_stat_reset_single_table_counters('t'::regclass)");
    client.run("UPDATE t SET note = 'x' WHERE id BETWEEN 2000 AND 102100");
    wait_until("the dead rows are counted", || {
        client.number("SELECT pg_stat_get_dead_tuples('t'::regclass)") > 100_000
    });
    assert!(client.number("SELECT pg_stat_get_live_tuples('t'::regclass)") < 100_000);
    client.run("SELECT rotate_key('pii')");
    goes_on(&mut client);
}

#[test]
fn a_table_that_waits_for_vacuum_holds_up_no_other_table_and_no_rotation_by_age() {
    let cluster = Cluster::start(options());
    let mut client = prepare(&cluster);
    client.run(
        "CREATE TABLE u (id int PRIMARY KEY, c bytea);
         INSERT INTO u SELECT i, encrypt_col('v' || i, 'pii') FROM generate_series(1, 1000) AS i;
         SELECT rekey.register_column('u', 'c');
         INSERT INTO t (id) SELECT i FROM generate_series(2000, 102100) AS i;
         DELETE FROM t WHERE id >= 2000",
    );
    wait_until("the dead rows are counted", || {
        client.number("SELECT pg_stat_get_dead_tuples('t'::regclass)") > 100_000
    });
    client.run("SELECT rotate_key('pii')");
    wait_until("it rests", || {
        client
            .text("SELECT coalesce(min(waits_for), '') FROM rekey.progress WHERE table_name = 't'::regclass")
            .contains("rekey.max_dead_ratio")
    });
    wait_until("the other table is done", || {
        client.number("SELECT count(*) FROM u WHERE rekey.is_stale(c)") == 0
    });
    client.run("SELECT rekey.create_key('aged', max_age => '1 second')");
    wait_until("another key is rotated by age", || {
        client.number("SELECT count(*) FROM rekey.audit WHERE detail LIKE 'max_age%'") > 0
    });
    client.run("SELECT rekey.set_policy('aged', max_age => '0')");
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE rekey.is_stale(c)"),
        1000,
        "nothing is added to its dead rows"
    );
    client.run("VACUUM t");
    goes_on(&mut client);
}

#[test]
fn a_standby_that_lags_if_it_is_one_that_counts() {
    let cluster = Cluster::start(options().set("rekey.max_replication_lag = '1s'"));
    let mut client = prepare(&cluster);
    let standby = cluster.standby();
    let mut replica = standby.connect("postgres");
    replica.run("SELECT pg_wal_replay_pause()");
    // The worker comes back for this row until the standby's lag has become one.
    let mut holder = cluster.connect("paced");
    let hold = "BEGIN; SELECT FROM t WHERE id = 1000 FOR UPDATE";
    holder.run(hold);
    rests_for(&mut client, "rekey.max_replication_lag");
    holder.run("COMMIT");
    set(
        &cluster,
        &mut client,
        "rekey.lag_standbys = 'another, one more'",
    );
    goes_on(&mut client);
    set(
        &cluster,
        &mut client,
        "rekey.lag_standbys = 'another, walreceiver'",
    );
    holder.run(hold);
    rests_for(&mut client, "rekey.max_replication_lag");
    holder.run("COMMIT");
    replica.run("SELECT pg_wal_replay_resume()");
    goes_on(&mut client);
}

/// Under this setting, the only one that makes it rest, the worker is seen to have rows of its own
/// and to wait for nothing but its latch.
fn rests_in_the_middle_of_a_batch(setting: &str, value: &str) {
    // A batch may last so long that it is seen.
    let options = options().set("rekey.batch_target = 10s");
    let cluster = Cluster::start(options.set("rekey.max_wal_rate = 0"));
    let mut client = prepare(&cluster);
    set(&cluster, &mut client, &format!("{setting} = '{value}'"));
    client.run("SELECT rotate_key('pii')");
    let rests = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_rekey worker' \
                    AND backend_xid IS NOT NULL AND wait_event = 'Extension'";
    wait_until("it rests in the middle of a batch", || {
        client.number(rests) == 1
    });
    reset(&cluster, &mut client, setting);
    goes_on(&mut client);
}

#[test]
fn a_batch_rests_between_its_rows_too() {
    rests_in_the_middle_of_a_batch("rekey.work_ratio", "0.01");
}

#[test]
fn a_batch_rests_in_its_middle_for_the_pace_of_wal_too() {
    rests_in_the_middle_of_a_batch("rekey.max_wal_rate", "100kB");
}

#[test]
fn a_batch_whose_rows_take_long_does_not_rest_on_them() {
    let cluster = Cluster::start(options());
    let mut client = prepare(&cluster);
    // A number that was taken stays taken when a try is undone: rests of a second for each row would
    // use up the five seconds of a try, and it would be made again.
    client.run(
        "DELETE FROM t WHERE id > 20;
         CREATE SEQUENCE calls;
         CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN PERFORM nextval('public.calls'), pg_sleep(0.05); RETURN NEW; END $$;
         CREATE TRIGGER slow BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION slow();
         ALTER TABLE t ENABLE ALWAYS TRIGGER slow",
    );
    set(&cluster, &mut client, "rekey.work_ratio = 0.01");
    client.run("SELECT rotate_key('pii')");
    wait_until("the rows are re-encrypted", || {
        client.number("SELECT count(*) FROM t WHERE rekey.is_stale(c)") == 0
    });
    assert_eq!(client.number("SELECT last_value FROM calls"), 20);
}

#[test]
fn a_batch_does_not_keep_its_rows_until_a_synchronous_standby_has_it() {
    let cluster = Cluster::start(options().set("rekey.batch_target = 5ms"));
    let mut client = prepare(&cluster);
    set(&cluster, &mut client, "rekey.work_ratio = 0.05");
    client.run("SELECT rotate_key('pii')");
    wait_until("it is in the middle of the table", || {
        client.number("SELECT coalesce(sum(rows_rewritten), 0)::bigint FROM rekey.progress") > 0
    });
    set(&cluster, &mut client, "synchronous_standby_names = 'gone'");
    // The end of the slot is one that does wait.
    wait_until("the rows are re-encrypted", || {
        client.number("SELECT count(*) FROM t WHERE rekey.is_stale(c)") == 0
    });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    wait_until("the proof waits for the standby", || {
        client.number(waits) == 1
    });
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'previous'"),
        1
    );
    reset(&cluster, &mut client, "synchronous_standby_names");
    goes_on(&mut client);
}
