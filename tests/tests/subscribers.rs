//! Logical subscribers of sealed tables: they get ciphertext, open it once they have the key, and
//! what is applied beside their own rotation is found by their own proof.
//!
//! The subscriber is another cluster with a root key of its own, unless a test says otherwise.
//! tests/transfer.rs shows export and import alone, tests/apply.rs a catalog that is published.

use postgres::Client;
use rekey_tests::{Ask, Cluster, Options, wait_until};

const WRONG: &str = "SELECT count(*) FROM t WHERE decrypt_col(c) IS DISTINCT FROM shadow";
const ROWS: &str = "SELECT count(*) FROM t";
const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, c bytea, shadow text, n int DEFAULT 0)";

fn publisher() -> Cluster {
    Cluster::start(
        Options::preloaded()
            .set("wal_level = logical")
            .set("rekey.work_ratio = 1"),
    )
}

fn subscriber() -> Cluster {
    Cluster::start(
        Options::preloaded()
            .set("autovacuum = off")
            .set("rekey.work_ratio = 1")
            .set("rekey.worker = off"),
    )
}

/// A key without grace and ten rows.
fn fill(client: &mut Client) {
    client.run(&format!(
        "SELECT rekey.create_key('pii', grace => '0');
         {TABLE};
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii'), 'v' || i
           FROM generate_series(1, 10) AS i;
         SELECT rekey.register_column('t', 'c')"
    ));
}

fn subscribe(client: &mut Client, publisher: &Cluster) {
    client.run(&format!(
        "CREATE SUBSCRIPTION s CONNECTION '{}' PUBLICATION p WITH (streaming = on)",
        publisher.conninfo("app")
    ));
}

/// Waits until the subscriber has applied all that the publisher has committed.
fn applied(source: &mut Client, subscriber: &mut Client) {
    wait_until("the tables are synchronised", || {
        subscriber.number("SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'") == 0
    });
    let lsn = source.text("SELECT pg_current_wal_insert_lsn()");
    wait_until("the subscriber has applied it", || {
        source.truth(&format!(
            "SELECT coalesce(bool_and(replay_lsn >= '{lsn}'), false) FROM pg_stat_replication"
        ))
    });
}

/// Takes the publisher's key over, under a transport key.
fn take_over(source: &mut Client, subscriber: &mut Client) {
    let key = "repeat('k', 32)::bytea";
    let document = source.text(&format!("SELECT rekey.export_key('pii', {key})"));
    subscriber.run(&format!("SELECT rekey.import_key($${document}$$, {key})"));
}

fn states(client: &mut Client) -> Vec<String> {
    client.column("SELECT state FROM rekey.slots ORDER BY version")
}

fn slot(client: &mut Client, version: u32) -> i64 {
    client.number(&format!(
        "SELECT slot_id FROM rekey.slots WHERE version = {version}"
    ))
}

#[test]
fn a_subscriber_gets_ciphertext_and_opens_it_once_it_has_the_key() {
    let (publisher, cluster) = (publisher(), subscriber());
    let mut source = publisher.database("app").connect();
    fill(&mut source);
    source.run("CREATE PUBLICATION p FOR TABLE t");
    let mut client = cluster.database("app").connect();
    client.run(TABLE);
    subscribe(&mut client, &publisher);
    applied(&mut source, &mut client);
    let bytes = "SELECT c FROM t ORDER BY id";
    assert_eq!(client.column(bytes), source.column(bytes));
    let first = slot(&mut source, 1);
    client.refuse(WRONG, "42704").names(&first.to_string());
    take_over(&mut source, &mut client);
    assert_eq!(client.number(WRONG), 0);
    // A rotation there: what the worker re-encrypts arrives under a slot that is not here yet.
    let second = source.number("SELECT rotate_key('pii')");
    wait_until("the publisher is drained", || {
        states(&mut source) == ["drained", "active"]
    });
    applied(&mut source, &mut client);
    assert_eq!(client.column(bytes), source.column(bytes));
    client.refuse(WRONG, "42704").names(&second.to_string());
    take_over(&mut source, &mut client);
    assert_eq!(client.number(WRONG), 0);
    // Without that gap: the slot travels before its first use.
    source.run("SELECT rekey.prepare_key('pii')");
    take_over(&mut source, &mut client);
    source.run("SELECT rekey.promote_key('pii')");
    wait_until("the publisher is drained again", || {
        states(&mut source) == ["drained", "drained", "active"]
    });
    applied(&mut source, &mut client);
    assert_eq!(client.column(bytes), source.column(bytes));
    assert_eq!(client.number(WRONG), 0);
    // A slot that ended before it could travel is answered as one that was destroyed.
    let fourth = source.number("SELECT rotate_key('pii')");
    let lost = source.text("SELECT encrypt_col('lost', 'pii')");
    source.run("SELECT rotate_key('pii')");
    source.run(&format!("SELECT rekey.destroy_slot({fourth}, true)"));
    let open = format!("SELECT decrypt_col('{lost}')");
    client.refuse(&open, "42704");
    take_over(&mut source, &mut client);
    client.refuse(&open, "55000").names("destroyed");
    source.refuse(&open, "55000").names("destroyed");
}

#[test]
fn stale_envelopes_that_are_applied_beside_the_subscribers_own_proof_are_found() {
    let (publisher, cluster) = (publisher(), subscriber());
    let mut source = publisher.database("app").connect();
    fill(&mut source);
    source.run("CREATE TABLE gate (id int PRIMARY KEY)");
    source.run("CREATE PUBLICATION p FOR TABLE t, gate");
    let mut client = cluster.database("app").connect();
    client.run(&format!("{TABLE}; CREATE TABLE gate (id int PRIMARY KEY)"));
    take_over(&mut source, &mut client);
    client.run("SELECT rekey.set_policy('pii', grace => '0')");
    client.run("SELECT rekey.register_column('t', 'c')");
    subscribe(&mut client, &publisher);
    applied(&mut source, &mut client);
    // The subscriber rotates for itself; the publisher seals under the old slot for ever.
    let first = slot(&mut client, 1);
    client.run("SELECT rotate_key('pii')");
    // A transaction is held in the middle of its application.
    let mut gate = cluster.connect("app");
    gate.run("BEGIN; LOCK TABLE gate");
    source.run(
        "BEGIN;
         INSERT INTO t VALUES (11, encrypt_col('v11', 'pii'), 'v11');
         UPDATE t SET n = 1 WHERE id = 3;
         INSERT INTO gate VALUES (1);
         COMMIT",
    );
    let applying = "SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
                     WHERE NOT granted AND relation = 'gate'::regclass \
                       AND backend_type = 'logical replication worker'";
    wait_until("it is being applied", || client.rows(applying).len() == 1);
    let pid = client.number(applying);
    let mut drainer = cluster.connect("app");
    std::thread::scope(|scope| {
        let drain = scope.spawn(move || drainer.run("CALL rekey.reencrypt()"));
        // The row that is being updated keeps the pass waiting, if anything does.
        wait_until("what could be re-encrypted is", || {
            let stale = format!("SELECT count(*) FROM t WHERE rekey.slot_id(c) = {first}");
            client.number(&stale) <= 1
        });
        assert_eq!(states(&mut client), ["previous", "active"], "no proof yet");
        gate.run("COMMIT");
        drain.join().expect("CALL reencrypt");
    });
    applied(&mut source, &mut client);
    client.run("CALL rekey.reencrypt()");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(client.number(WRONG), 0);
    assert_eq!(client.number(ROWS), 11);

    // Inserted only: the proof's snapshot does not see it, the horizon does.
    client.run("SELECT rotate_key('pii')");
    gate.run("BEGIN; LOCK TABLE gate");
    source.run(
        "BEGIN;
         INSERT INTO t VALUES (12, encrypt_col('v12', 'pii'), 'v12');
         INSERT INTO gate VALUES (2);
         COMMIT",
    );
    wait_until("it is being applied", || {
        client.rows(applying).len() == 1 && client.number(applying) == pid
    });
    client.run("CALL rekey.reencrypt()");
    assert_eq!(states(&mut client), ["drained", "drained", "active"]);
    let end = format!("SELECT rekey.disable_slot({first})");
    wait_until("the apply worker is named", || {
        let refusal = client.attempt(&end).expect_err("it is older");
        refusal.detail.contains(&format!("pid {pid}"))
    });
    gate.run("COMMIT");
    applied(&mut source, &mut client);
    wait_until("what it brought is found", || {
        let refusal = client.attempt(&end).expect_err("a stale row");
        refusal.detail.contains("public.t (1 rows)")
    });
    assert_eq!(client.number(WRONG), 0);
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    wait_until("the slot may go", || client.attempt(&end).is_ok());
    assert_eq!((client.number(WRONG), client.number(ROWS)), (0, 12));
}

#[test]
fn a_publication_for_all_tables_carries_the_catalog_and_stops_no_apply_worker() {
    let (publisher, cluster) = (publisher(), subscriber());
    let mut source = publisher.database("app").connect();
    fill(&mut source);
    source.run("CREATE ROLE only_there; SELECT rekey.grant_key('pii', 'only_there', '{decrypt}')");
    source.run("SELECT rekey.pause('t', reason => 'for the test'); SELECT rekey.resume('t')");
    source.run("CREATE PUBLICATION p FOR ALL TABLES");
    let keyring = std::fs::read(publisher.root_key_file()).expect("the keyring");
    cluster.write_file(&cluster.root_key_file(), &keyring, 0o600);
    let mut client = cluster.empty_database("app", "").connect();
    client.run(&format!("CREATE EXTENSION pg_rekey; {TABLE}"));
    if let Ok(x) = std::env::var("S3") {
        if x == "1" {
            client.run("SELECT rekey.init_root_key()");
        }
    }
    subscribe(&mut client, &publisher);
    std::thread::sleep(std::time::Duration::from_secs(8));
    eprintln!(
        "{:?}",
        client.rows("SELECT srrelid::regclass::text, srsubstate FROM pg_subscription_rel")
    );
    eprintln!(
        "{:?}",
        client.rows("SELECT * FROM pg_stat_subscription_stats")
    );
    for l in cluster
        .log()
        .lines()
        .filter(|l| l.contains("ERROR") || l.contains("CONTEXT"))
    {
        eprintln!("{l}");
    }
    panic!();
}
