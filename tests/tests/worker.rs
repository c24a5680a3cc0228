//! The background worker: woken by a commit, silent otherwise, in nobody's way.

use std::time::{Duration, Instant};

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, GATE, Options, long_runs, wait_until};

fn cluster() -> Cluster {
    Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set("max_prepared_transactions = 10"),
    )
}

fn prepare(database: &Database<'_>) -> Client {
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int PRIMARY KEY, c bytea);
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii') FROM generate_series(1, 100) AS i;
         SELECT rekey.register_column('t', 'c')",
    );
    client
}

fn drained(client: &mut Client) -> i64 {
    client.number("SELECT count(*) FROM rekey.slots WHERE state = 'drained'")
}

fn workers(client: &mut Client) -> i64 {
    client.number("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_rekey worker'")
}

/// A worker sits in the database "busy" for as long as a test lasts.
fn busy(cluster: &Cluster) -> Client {
    let mut client = prepare(&cluster.database("busy"));
    client.run(
        "INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii') FROM generate_series(101, 200000) AS i",
    );
    client.run("ALTER SYSTEM SET rekey.work_ratio = 0.01");
    cluster.reload(&mut client);
    client.run("SELECT rotate_key('pii')");
    wait_until("a worker is there", || workers(&mut client) == 1);
    client
}

/// The client leaves "busy" to the worker.
fn leave(cluster: &Cluster, client: Client) -> Client {
    drop(client);
    let mut admin = cluster.connect("postgres");
    wait_until("the client's session has ended", || {
        admin.number(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = 'busy' \
                      AND backend_type = 'client backend'",
        ) == 0
    });
    admin
}

#[test]
fn a_committed_rotation_is_drained_and_one_that_is_not_is_left_alone() {
    let cluster = cluster();
    let database = cluster.database("woken");
    let mut client = prepare(&database);
    let mut other = database.connect();
    client.run("BEGIN; SELECT rotate_key('pii')");
    other.run("SELECT rekey.create_key('other'); SELECT rotate_key('other')");
    wait_until("the other key's slot is drained", || {
        drained(&mut other) == 1
    });
    client.run("COMMIT");
    wait_until("the rotation is drained", || drained(&mut other) == 2);
    client.run("BEGIN; SELECT rotate_key('pii')");
    client.run("PREPARE TRANSACTION 'rotation'");
    client.run("COMMIT PREPARED 'rotation'");
    wait_until("COMMIT PREPARED wakes it too", || drained(&mut other) == 3);
    assert_eq!(
        other.number("SELECT count(*) FROM t WHERE decrypt_col(c) = 'v' || id"),
        100
    );
    assert_eq!(
        other.column("SELECT DISTINCT actor FROM rekey.audit WHERE action = 'drain'"),
        ["postgres"]
    );
}

#[test]
fn a_committed_rotation_wakes_it_at_once() {
    let cluster = cluster();
    let mut client = prepare(&cluster.database("prompt"));
    // That nothing polls at all is shown below. Here: however loaded the machine is, five times in a
    // row within 5 s, and within one second where the machine lets it.
    let mut waits: Vec<f64> = Vec::new();
    for round in 1..=5 {
        wait_until("no worker is there", || workers(&mut client) == 0);
        client.run("SELECT rotate_key('pii')");
        wait_until("the rotation is drained", || drained(&mut client) == round);
        let wait = client.text(
            "SELECT extract(epoch FROM p.started_at - max(s.superseded_at))
               FROM rekey.progress p, rekey.slots s GROUP BY p.started_at",
        );
        waits.push(wait.parse().expect("seconds"));
    }
    println!("from rotation to pass: {waits:?} s");
    assert!(
        waits.iter().all(|wait| (0.0..5.0).contains(wait)),
        "{waits:?}"
    );
    assert!(waits.iter().any(|wait| *wait < 1.0), "{waits:?}");
}

#[test]
fn with_nothing_stale_it_is_silent() {
    // Nobody else may write: neither autovacuum nor the background writer's standby snapshots.
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set("autovacuum = off")
            .set("wal_level = minimal")
            .set("max_wal_senders = 0"),
    );
    let mut client = prepare(&cluster.database("silent"));
    client.run("SELECT rotate_key('pii')");
    wait_until("the rotation is drained", || drained(&mut client) == 1);
    wait_until("the worker has ended", || workers(&mut client) == 0);
    client.run("CHECKPOINT");
    drop(client);
    // Transactions, catalog reads and WAL. The launcher is in no database: what it reads is
    // pg_database (1262). The watcher itself reads no catalog between the readings.
    const READING: &str = "SELECT concat_ws(' ', pg_stat_get_db_xact_commit(d), \
         pg_stat_get_db_xact_rollback(d), pg_stat_get_db_tuples_returned(d), \
         pg_stat_get_db_tuples_fetched(d), pg_stat_get_db_blocks_fetched(d), \
         pg_stat_get_numscans(1262), pg_stat_get_tuples_returned(1262), \
         pg_current_wal_insert_lsn()) FROM (VALUES (DATABASE::oid)) AS v(d)";
    let mut watcher = cluster.connect("postgres");
    wait_until("the client's session has left its counts", || {
        watcher.number("SELECT count(*) FROM pg_stat_activity WHERE datname = 'silent'") == 0
    });
    let launcher = "SELECT count(*) FROM pg_stat_activity \
        WHERE backend_type = 'pg_rekey launcher' AND wait_event = 'Extension' AND backend_xmin IS NULL";
    assert_eq!(watcher.number(launcher), 1);
    let silent = watcher.text("SELECT oid FROM pg_database WHERE datname = 'silent'");
    let reading = READING.replace("DATABASE", &silent);
    // Its own reads are on record before the first reading.
    watcher.run("SELECT pg_stat_force_next_flush()");
    watcher.text(&reading);
    let before = watcher.text(&reading);
    let seconds = if long_runs() { 60 } else { 10 };
    // The span that is measured, not a synchronisation.
    watcher.run(&format!("SELECT pg_sleep({seconds})"));
    let after = watcher.text(&reading);
    println!("{seconds} s: {before} -> {after}");
    assert_eq!(before, after);
    assert_eq!(workers(&mut watcher), 0);
}

#[test]
fn several_databases_take_turns_and_ones_without_the_extension_are_left() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set("rekey.max_workers = 1"),
    );
    let bare = cluster.empty_database("bare", "");
    let mut clients: Vec<Client> = ["one", "two", "three"]
        .map(|name| prepare(&cluster.database(name)))
        .into_iter()
        .collect();
    for client in &mut clients {
        client.run("SELECT rotate_key('pii')");
    }
    for client in &mut clients {
        wait_until("every database is drained", || {
            assert!(workers(client) <= 1, "rekey.max_workers is 1");
            drained(client) == 1
        });
    }
    assert!(
        !cluster.log().contains("a step failed"),
        "the bare one is no failure"
    );
    bare.install();
    let mut client = prepare(&bare);
    client.run("SELECT rotate_key('pii')");
    wait_until("it is served once it has the extension", || {
        drained(&mut client) == 1
    });
}

#[test]
fn an_extension_that_is_dropped_under_a_working_worker_leaves_it_free_for_other_databases() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set("rekey.max_workers = 1")
            .set("deadlock_timeout = 100ms"),
    );
    let database = cluster.database("dropped");
    let mut client = prepare(&database);
    let mut other = prepare(&cluster.database("other"));
    wait_until("no worker is left", || workers(&mut client) == 0);
    let mut gate = database.connect();
    gate.run(&format!("SELECT pg_advisory_lock({GATE})"));
    cluster.arm("batch.advanced", "wait");
    client.run("SELECT rotate_key('pii')");
    wait_until("the worker stands in the middle of a batch", || {
        client.number("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
            == 1
    });
    let mut session = database.connect();
    let pid = session.number("SELECT pg_backend_pid()");
    session.run("SET rekey.allow_drop = on");
    let dropping = std::thread::spawn(move || {
        // The two may stand in a deadlock, and either one may be its victim.
        wait_until("the extension is dropped", || {
            match session.attempt("DROP EXTENSION pg_rekey") {
                Ok(()) => true,
                Err(refusal) if refusal.code == "40P01" => false,
                Err(refusal) => panic!("{}", refusal.text()),
            }
        });
    });
    let waits = format!("SELECT count(*) FROM pg_locks WHERE pid = {pid} AND NOT granted");
    wait_until("the DROP waits for the worker", || {
        client.number(&waits) == 1
    });
    other.run("SELECT rotate_key('pii')");
    gate.run(&format!("SELECT pg_advisory_unlock({GATE})"));
    dropping.join().expect("DROP EXTENSION");
    wait_until("the other database is drained", || drained(&mut other) == 1);
    wait_until("no worker is left there", || workers(&mut other) == 0);
    assert_eq!(
        other.number("SELECT count(*) FROM t WHERE decrypt_col(c) = 'v' || id"),
        100
    );
    assert!(!cluster.log().contains("terminated by signal"));
    // And one that is made there anew is served as any other.
    client.run("DROP TABLE t");
    database.install();
    let mut client = prepare(&database);
    client.run("SELECT rotate_key('pii')");
    wait_until("the new one is drained", || drained(&mut client) == 1);
}

#[test]
fn a_database_can_be_dropped_copied_and_renamed_while_a_worker_sits_in_it() {
    let cluster = cluster();
    let client = busy(&cluster);
    let mut admin = leave(&cluster, client);
    admin.run("CREATE DATABASE copy TEMPLATE busy");
    wait_until("a worker is back", || workers(&mut admin) > 0);
    admin.run("ALTER DATABASE busy RENAME TO renamed");
    wait_until("a worker is back again", || {
        admin.number(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = 'renamed' \
                      AND backend_type = 'pg_rekey worker'",
        ) == 1
    });
    admin.run("DROP DATABASE renamed");
    admin.run("DROP DATABASE copy");
    assert_eq!(workers(&mut admin), 0);
}

#[test]
fn a_role_without_rights_to_a_database_ends_no_worker_in_it() {
    let cluster = cluster();
    let client = busy(&cluster);
    let mut admin = leave(&cluster, client);
    admin.run(
        "CREATE ROLE owner LOGIN CREATEDB; CREATE ROLE plain LOGIN; CREATE ROLE maker LOGIN CREATEDB;
         ALTER DATABASE busy OWNER TO owner",
    );
    wait_until("a worker is there", || workers(&mut admin) == 1);
    const PID: &str = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_rekey worker'";
    let pid = admin.text(PID);
    for role in ["plain", "maker"] {
        let mut other = cluster.connect_as("postgres", role);
        for command in [
            "DROP DATABASE busy",
            "DROP DATABASE busy WITH (FORCE)",
            "ALTER DATABASE busy RENAME TO taken",
            "ALTER DATABASE busy SET TABLESPACE pg_default",
            "CREATE DATABASE taken TEMPLATE busy",
        ] {
            other.fail(command, "42501");
            assert_eq!(admin.text(PID), pid, "{command} by {role}");
        }
    }
    admin.run("ALTER ROLE owner NOCREATEDB");
    let mut owner = cluster.connect_as("postgres", "owner");
    owner.fail("ALTER DATABASE busy RENAME TO taken", "42501");
    assert_eq!(admin.text(PID), pid);
    // Who may do it need not wait for the worker.
    admin.run("ALTER ROLE owner CREATEDB");
    owner.run("CREATE DATABASE copy TEMPLATE busy");
    owner.run("DROP DATABASE copy");
    admin.run("ALTER DATABASE busy IS_TEMPLATE true");
    wait_until("a worker is back", || workers(&mut admin) == 1);
    let mut maker = cluster.connect_as("postgres", "maker");
    maker.run("CREATE DATABASE copy TEMPLATE busy");
    maker.run("DROP DATABASE copy");
    admin.run("ALTER DATABASE busy IS_TEMPLATE false");
    wait_until("a worker is back again", || workers(&mut admin) == 1);
    owner.run("ALTER DATABASE busy RENAME TO renamed");
    wait_until("a worker is in the renamed one", || {
        workers(&mut admin) == 1
    });
    owner.run("DROP DATABASE renamed");
}

#[test]
fn a_session_that_ends_while_it_keeps_the_worker_out_lets_it_back_in() {
    let cluster = Cluster::start(Options::preloaded().set("autovacuum = off"));
    // The copies wait for this session for 5 s.
    let _client = busy(&cluster);
    let mut admin = cluster.connect("postgres");
    let copying = |name: &str| {
        let mut session = cluster.connect("postgres");
        let pid = session.number("SELECT pg_backend_pid()");
        let command = format!("CREATE DATABASE {name} TEMPLATE busy");
        (
            pid,
            std::thread::spawn(move || session.batch_execute(&command).is_err()),
        )
    };
    let waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'object' AND classid = 1262 \
                   AND mode = 'ShareLock' AND granted";
    // A worker that starts waits for the copy, before the statistics show it.
    let starting = "SELECT count(*) FROM pg_locks WHERE locktype = 'object' AND classid = 1262 \
                    AND mode = 'RowExclusiveLock' AND NOT granted";

    let (pid, copy) = copying("first");
    wait_until("it waits", || admin.number(waiting) == 1);
    assert_eq!(workers(&mut admin), 0);
    admin.run(&format!("SELECT pg_terminate_backend({pid})"));
    assert!(copy.join().expect("a thread"));
    wait_until("the worker is back", || workers(&mut admin) == 1);

    let (ends, first) = copying("first");
    let (_, second) = copying("second");
    wait_until("both wait", || admin.number(waiting) == 2);
    admin.run(&format!("SELECT pg_terminate_backend({ends})"));
    assert!(first.join().expect("a thread"));
    while !second.is_finished() {
        let seen = admin.number(starting) + workers(&mut admin);
        // In this order: the thread hears of the end after the worker does. The failing copy lets
        // the worker in first and gives up its lock right after that; it had kept both for 5 s.
        let deadline = Instant::now() + Duration::from_secs(1);
        while seen > 0 && admin.number(waiting) != 0 {
            assert!(Instant::now() < deadline, "the other keeps it out");
        }
    }
    assert!(second.join().expect("a thread"));
    wait_until("the worker is back again", || workers(&mut admin) == 1);
}

#[test]
fn more_databases_than_the_board_has_room_for_are_served() {
    // Its room is 16 in a debug build.
    let cluster = cluster();
    for number in 1..=18 {
        cluster.empty_database(&format!("bare{number}"), "STRATEGY file_copy");
    }
    let mut clients = ["one", "two"].map(|name| prepare(&cluster.database(name)));
    for client in &mut clients {
        client.run("SELECT rotate_key('pii')");
        wait_until("the rotation is drained", || drained(client) == 1);
    }
    // The launcher visits all of them.
    let mut admin = cluster.connect("postgres");
    admin.run("ALTER SYSTEM SET rekey.worker = off");
    cluster.reload(&mut admin);
    for client in &mut clients {
        wait_until("no worker is left", || workers(client) == 0);
        client.run("SELECT rotate_key('pii')");
    }
    cluster.restart("fast");
    let mut admin = cluster.connect("postgres");
    admin.run("ALTER SYSTEM SET rekey.worker = on");
    cluster.reload(&mut admin);
    for name in ["one", "two"] {
        let mut client = cluster.connect(name);
        wait_until("each is drained", || drained(&mut client) == 2);
    }
    wait_until("none is visited over and over", || workers(&mut admin) == 0);
}

#[test]
fn it_is_switched_off_and_on_by_a_reload() {
    let cluster = cluster();
    let mut client = prepare(&cluster.database("switched"));
    let mut elsewhere = prepare(&cluster.database("elsewhere"));
    client.run("ALTER SYSTEM SET rekey.worker = off");
    cluster.reload(&mut client);
    wait_until("no worker is left", || workers(&mut client) == 0);
    client.run("SELECT rotate_key('pii')");
    client.run("ALTER SYSTEM SET rekey.databases = 'elsewhere'");
    client.run("ALTER SYSTEM SET rekey.worker = on");
    cluster.reload(&mut client);
    client.run("SELECT rotate_key('pii')");
    // What is wanted later than here is served, more than once: the worker is on, and passes by.
    for round in 1..=2 {
        elsewhere.run("SELECT rotate_key('pii')");
        wait_until("the database on the list is drained", || {
            drained(&mut elsewhere) == round
        });
        wait_until("no worker is left", || workers(&mut client) == 0);
    }
    assert_eq!(drained(&mut client), 0);
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.progress_state"),
        0,
        "no worker has begun here"
    );
    client.run("ALTER SYSTEM SET rekey.databases = 'elsewhere, switched'");
    cluster.reload(&mut client);
    wait_until("what has waited is drained", || drained(&mut client) == 2);
    client.run("SELECT rotate_key('pii')");
    wait_until("all rotations are drained", || drained(&mut client) == 3);
}

#[test]
fn killed_in_the_middle_it_goes_on_at_its_cursor() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 0.05")
            .set("rekey.batch_target = 5ms"),
    );
    let database = cluster.database("killed");
    let mut client = prepare(&database);
    client.run(
        "INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii') FROM generate_series(101, 20000) AS i",
    );
    client.run("SELECT rotate_key('pii')");
    let cursor = "SELECT coalesce(max(cursor_block), 0) FROM rekey.progress_state";
    wait_until("some batches are done", || client.number(cursor) > 20);
    let done = client.number(cursor);
    // A batch is on disk with the next commit that waits for the disk.
    client.run("CREATE TABLE later ()");
    let pid =
        client.number("SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_rekey worker'");
    cluster.kill_backend(pid);
    // First the crash has to reach this session: until then the old server still takes connections.
    wait_until("the crash has ended this session", || {
        client.batch_execute("SELECT 1").is_err()
    });
    let mut back = None;
    wait_until("the server is back", || {
        back = cluster.try_connect("killed");
        back.is_some()
    });
    let mut client = back.expect("a connection");
    let mut last = client.number(cursor);
    assert!(last >= done, "the cursor stands where a batch put it");
    client.run("ALTER SYSTEM SET rekey.work_ratio = 1");
    cluster.reload(&mut client);
    wait_until("the rotation is drained", || {
        let now = client.number(cursor);
        assert!(now >= last, "it never begins again");
        last = now;
        drained(&mut client) == 1
    });
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE decrypt_col(c) = 'v' || id"),
        20000
    );
}

#[test]
fn a_standby_runs_none_and_goes_on_after_its_promotion() {
    let primary = Cluster::start(Options::preloaded().set("rekey.worker = off"));
    let database = primary.database("promoted");
    let mut client = prepare(&database);
    client.run("SELECT rotate_key('pii')");
    let standby = primary.standby();
    let mut reader = standby.connect("promoted");
    assert_eq!(
        reader.number("SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'pg_rekey%'"),
        0
    );
    standby.append("rekey.worker = on");
    standby.reload(&mut reader);
    standby.promote();
    let mut reader = standby.connect("promoted");
    wait_until("the rotation is drained there", || {
        drained(&mut reader) == 1
    });
    assert_eq!(
        reader.number("SELECT count(*) FROM t WHERE decrypt_col(c) = 'v' || id"),
        100
    );
}

#[test]
fn a_key_that_has_passed_its_longest_life_is_rotated() {
    let cluster = cluster();
    let mut client = prepare(&cluster.database("aged"));
    client.run("SELECT rekey.set_policy('pii', max_age => '2 seconds')");
    wait_until("it is rotated by age", || {
        client.number(
            "SELECT count(*) FROM rekey.audit WHERE action = 'rotate_key' \
                       AND detail LIKE 'max_age%'",
        ) > 0
    });
    client.run("SELECT rekey.set_policy('pii', max_age => '0')");
    wait_until("and drained", || drained(&mut client) > 0);
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE decrypt_col(c) = 'v' || id"),
        100
    );
}

/// Rotations of a key by age.
fn by_age(client: &mut Client, key: &str) -> i64 {
    client.number(&format!(
        "SELECT count(*) FROM rekey.audit WHERE action = 'rotate_key' AND key_name = '{key}' \
            AND detail LIKE 'max_age%'"
    ))
}

/// A cluster whose worker is off until `switch_on`.
fn without_worker() -> Cluster {
    Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set("rekey.worker = off"),
    )
}

fn switch(cluster: &Cluster, client: &mut Client, on: &str) {
    client.run(&format!("ALTER SYSTEM SET rekey.worker = {on}"));
    cluster.reload(client);
}

/// Moves the beginning of the active slots' lives as time would.
fn age(client: &mut Client, by: &str) {
    client.run(&format!(
        "SET session_replication_role = replica;
         UPDATE rekey.key_slot SET activated_at = activated_at - interval '{by}'
          WHERE state = 'active';
         RESET session_replication_role"
    ));
}

#[test]
fn a_key_past_its_age_that_another_session_holds_holds_up_no_other_key() {
    let cluster = without_worker();
    let database = cluster.database("held");
    let mut client = prepare(&database);
    client.run(
        "SELECT rekey.set_policy('pii', max_age => '1 day'); SELECT rekey.create_key('other');
         CREATE TABLE u (c bytea); INSERT INTO u SELECT encrypt_col('x', 'other');
         SELECT rekey.register_column('u', 'c')",
    );
    age(&mut client, "2 days");
    let mut holder = database.connect();
    holder.run("BEGIN; SELECT rekey.set_policy('pii', custodian => 'somebody')");
    client.run("SELECT rotate_key('other')");
    switch(&cluster, &mut client, "on");
    wait_until("the other key's slot is drained", || {
        drained(&mut client) == 1
    });
    assert_eq!(by_age(&mut client, "pii"), 0);
    holder.run("COMMIT");
    wait_until("the key is rotated", || by_age(&mut client, "pii") == 1);
    wait_until("and drained", || drained(&mut client) == 2);
}

#[test]
fn a_key_whose_rotation_by_age_fails_holds_up_no_other_key() {
    let cluster = without_worker();
    let mut client = prepare(&cluster.database("fails"));
    client.run(
        "SELECT rekey.create_key('bad', max_age => '1 day'); SELECT rekey.prepare_key('bad');
         SET session_replication_role = replica;
         UPDATE rekey.slot_wrap SET wrapped_key = set_byte(wrapped_key, 40, \
             get_byte(wrapped_key, 40) # 1) FROM rekey.key_slot s \
          WHERE s.slot_id = slot_wrap.slot_id AND s.state = 'pending';
         RESET session_replication_role",
    );
    age(&mut client, "3 days");
    client.run("SELECT rekey.create_key('good', max_age => '1 day')");
    age(&mut client, "2 days");
    client.run("SELECT rotate_key('pii')");
    switch(&cluster, &mut client, "on");
    wait_until("another key is drained", || drained(&mut client) > 0);
    wait_until("another key is rotated", || {
        by_age(&mut client, "good") == 1
    });
    assert_eq!(by_age(&mut client, "bad"), 0);
    assert!(
        cluster
            .log()
            .contains("a rotation by age failed with SQLSTATE F0000")
    );
}

#[test]
fn a_key_is_not_rotated_by_age_while_its_last_rotation_waits_for_its_barrier() {
    let cluster = cluster();
    let database = cluster.database("waits");
    let (mut client, mut old) = (prepare(&database), database.connect());
    old.run("BEGIN; INSERT INTO t SELECT 101, encrypt_col('v101', 'pii')");
    client.run("SELECT rekey.set_policy('pii', max_age => '1 second')");
    wait_until("it is rotated by age", || by_age(&mut client, "pii") == 1);
    // What a worker has kept in mind goes with it.
    switch(&cluster, &mut client, "off");
    wait_until("no worker is left", || workers(&mut client) == 0);
    // Younger than the key, and past its age behind it: it is looked at after the key.
    client.run("SELECT rekey.create_key('other', max_age => '2 seconds')");
    switch(&cluster, &mut client, "on");
    wait_until("another key is rotated by age", || {
        by_age(&mut client, "other") == 1
    });
    assert_eq!(by_age(&mut client, "pii"), 1);
    old.run("COMMIT");
    wait_until("it is rotated again", || by_age(&mut client, "pii") > 1);
}

#[test]
fn a_key_that_is_never_drained_keeps_its_longest_life() {
    let cluster = cluster();
    let mut client = cluster.database("bare").connect();
    // Nothing is registered.
    client.run("SELECT rekey.create_key('bare', max_age => '1 second')");
    wait_until("it is rotated again and again", || {
        by_age(&mut client, "bare") > 2
    });
    assert_eq!(drained(&mut client), 0);
}

#[test]
fn keys_of_one_age_are_rotated_up_to_5_percent_earlier_each_at_its_time() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.worker = off")
            .set("rekey.max_rotations_per_hour = 1000"),
    );
    let mut client = cluster.database("jitter").connect();
    client.run(
        "SELECT rekey.create_key('k' || i, max_age => '1000 days') FROM generate_series(1, 60) AS i;
         CREATE TABLE first AS SELECT slot_id FROM rekey.slots",
    );
    age(&mut client, "975 days");
    switch(&cluster, &mut client, "on");
    // Half of the 5 % is over.
    let due = client.number("SELECT count(*) FROM first WHERE slot_id % 1000 >= 500");
    assert!((1..60).contains(&due), "{due} of 60");
    let rotated = "SELECT count(*) FROM rekey.audit WHERE detail LIKE 'max_age%'";
    wait_until("those whose time has come are rotated", || {
        client.number(rotated) == due
    });
    wait_until("the worker has ended", || workers(&mut client) == 0);
    assert_eq!(
        client.column(
            "SELECT slot_id::text FROM rekey.slots JOIN first USING (slot_id) \
              WHERE state = 'active' ORDER BY 1"
        ),
        client.column("SELECT slot_id::text FROM first WHERE slot_id % 1000 < 500 ORDER BY 1")
    );
}

#[test]
fn no_more_keys_are_rotated_by_age_in_an_hour_than_allowed_and_no_worker_comes_back_for_them() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.worker = off")
            .set("autovacuum = off")
            .set("rekey.max_rotations_per_hour = 1"),
    );
    let mut client = cluster.database("hourly").connect();
    client.run(
        "SELECT rekey.create_key('k' || i, max_age => '1 day') FROM generate_series(1, 3) AS i",
    );
    age(&mut client, "2 days");
    switch(&cluster, &mut client, "on");
    let rotated = "SELECT count(*) FROM rekey.audit WHERE detail LIKE 'max_age%'";
    wait_until("one key is rotated", || client.number(rotated) == 1);
    wait_until("the worker has ended", || workers(&mut client) == 0);
    drop(client);
    let mut watcher = cluster.connect("postgres");
    wait_until("the client's session has left its counts", || {
        watcher.number("SELECT count(*) FROM pg_stat_activity WHERE datname = 'hourly'") == 0
    });
    let reading = "SELECT sum(xact_commit) FROM pg_stat_database WHERE datname = 'hourly'";
    let before = watcher.number(reading);
    // The span that is measured, not a synchronisation: a worker came back every 5 s.
    watcher.run("SELECT pg_sleep(8)");
    assert_eq!(watcher.number(reading), before);
    assert_eq!(cluster.connect("hourly").number(rotated), 1);
}

#[test]
fn a_key_of_the_longest_max_age_and_grace_holds_up_nothing() {
    let cluster = cluster();
    let mut client = prepare(&cluster.database("longest"));
    client.run(
        "SELECT rekey.create_key('k', grace => '1000 years', max_age => '1000 years');
         SELECT rekey.set_policy('k', after_drain => 'destroy'); SELECT rotate_key('k');
         SELECT rotate_key('pii')",
    );
    wait_until("both keys are drained", || drained(&mut client) == 2);
    assert!(client.truth(
        "SELECT next_rotation > now() + interval '999 years' FROM rekey.keys WHERE key_name = 'k'"
    ));
    assert!(client.truth(
        "SELECT grace_until > now() + interval '999 years' FROM rekey.slots \
          WHERE key_name = 'k' AND state = 'drained'"
    ));
    wait_until("the worker has ended", || workers(&mut client) == 0);
}
