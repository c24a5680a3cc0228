//! Logical subscribers of sealed tables: they get ciphertext, open it once they have the key, and
//! what is applied beside their own rotation is found by their own proof.
//!
//! The subscriber is another cluster with a root key of its own, unless a test says otherwise.
//! tests/transfer.rs shows export and import alone, tests/apply.rs a catalog that is published.

use postgres::Client;
use rekey_tests::{Ask, Cluster, Options, wait_until};

const WRONG: &str = "SELECT count(*) FROM t WHERE decrypt_col(c) IS DISTINCT FROM shadow";
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

/// The entries of two keyring files in one.
fn both(one: &Cluster, other: &Cluster) -> String {
    let [first, second] = [one, other].map(|cluster| {
        let text = std::fs::read_to_string(cluster.root_key_file()).expect("a keyring");
        let begin = text.find('[').expect("a list") + 1;
        text[begin..text.rfind(']').expect("its end")].to_owned()
    });
    format!("{{\"version\":1,\"keys\":[{first},{second}]}}")
}

#[test]
fn a_subscriber_that_holds_the_publishers_root_key_needs_no_transport_key() {
    let (publisher, cluster) = (publisher(), subscriber());
    let mut source = publisher.database("app").connect();
    fill(&mut source);
    source.run("CREATE PUBLICATION p FOR TABLE t");
    let mut client = cluster.database("app").connect();
    client.run(TABLE);
    subscribe(&mut client, &publisher);
    applied(&mut source, &mut client);
    let document = source.text("SELECT rekey.export_key('pii')");
    let import = format!("SELECT rekey.import_key($${document}$$)");
    let root = source.text("SELECT root_id FROM rekey.root_keys");
    client.refuse(&import, "F0000").names(&root);
    let keyring = both(&cluster, &publisher);
    cluster.write_file(&cluster.root_key_file(), keyring.as_bytes(), 0o600);
    assert_eq!(client.number(&import), 1);
    assert_eq!(client.number(WRONG), 0);
    // Wrapped under the root key here, the slot opens without the publisher's.
    let own = client.text("SELECT root_id FROM rekey.root_keys");
    let under = "SELECT DISTINCT encode(root_id, 'hex') FROM rekey.slot_wrap";
    assert_eq!(client.column(under), [own]);
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
    // A transaction is held in the middle of its application: nobody sees its row yet.
    let hold = "BEGIN; LOCK TABLE gate";
    let mut gate = cluster.connect("app");
    gate.run(hold);
    source.run(
        "BEGIN;
         INSERT INTO t VALUES (11, encrypt_col('v11', 'pii'), 'v11');
         INSERT INTO gate VALUES (1);
         COMMIT",
    );
    let applying = "SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
                     WHERE NOT granted AND relation = 'gate'::regclass \
                       AND backend_type LIKE 'logical replication%'";
    wait_until("it is being applied", || client.rows(applying).len() == 1);
    let pid = client.number(applying);
    client.run("CALL rekey.reencrypt()");
    assert_eq!(states(&mut client), ["drained", "active"]);
    let end = format!("SELECT rekey.disable_slot({first})");
    client.refuse(&end, "55000").names(&format!("pid {pid}"));
    gate.run("COMMIT");
    applied(&mut source, &mut client);
    wait_until("what it brought is found", || {
        let refusal = client.attempt(&end).expect_err("a stale row");
        refusal.detail.contains("public.t (1 rows)")
    });
    assert_eq!(client.number(WRONG), 0);

    // Begun after the proof: its transaction is younger than the horizon.
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    gate.run(hold);
    source.run(
        "BEGIN;
         INSERT INTO t VALUES (12, encrypt_col('v12', 'pii'), 'v12');
         INSERT INTO gate VALUES (2);
         COMMIT",
    );
    wait_until("it is being applied", || client.rows(applying).len() == 1);
    let pid = client.number(applying);
    client.refuse(&end, "55000").names(&format!("pid {pid}"));
    gate.run("COMMIT");
    applied(&mut source, &mut client);
    client.refuse(&end, "55000").names("public.t (1 rows)");

    // An update of another column brings the old envelope behind the cursor.
    client.run("SELECT rotate_key('pii')");
    gate.run(hold);
    source.run("BEGIN; UPDATE t SET n = 1 WHERE id = 3; INSERT INTO gate VALUES (3); COMMIT");
    wait_until("it is being applied", || client.rows(applying).len() == 1);
    let mut drainer = cluster.connect("app");
    std::thread::scope(|scope| {
        let drain = scope.spawn(move || drainer.run("CALL rekey.reencrypt()"));
        let stale = format!("SELECT count(*) FROM t WHERE rekey.slot_id(c) = {first}");
        wait_until("what could be re-encrypted is", || {
            client.number(&stale) == 0
        });
        let awaits = "SELECT count(*) FROM rekey.slots WHERE state = 'previous'";
        assert_eq!(client.number(awaits), 1, "no proof beside a locked row");
        gate.run("COMMIT");
        drain.join().expect("CALL reencrypt");
    });
    applied(&mut source, &mut client);
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    wait_until("the slot may go", || client.attempt(&end).is_ok());
    let rows = "SELECT count(*) FROM t";
    assert_eq!((client.number(WRONG), client.number(rows)), (0, 12));
}

/// Errors of apply and synchronisation workers so far.
fn errors(client: &mut Client) -> i64 {
    client.number(
        "SELECT sum(apply_error_count + sync_error_count)::bigint FROM pg_stat_subscription_stats",
    )
}

/// What the publisher does to its catalog, one thing of each kind.
fn administer(source: &mut Client) {
    source.run("SELECT rotate_key('pii'); SELECT rekey.prepare_key('pii')");
    source.run("SELECT rekey.promote_key('pii')");
    source.run("UPDATE t SET c = encrypt_col(shadow, 'pii') WHERE id = 1");
    wait_until("the publisher is drained", || {
        source.number("SELECT count(*) FROM rekey.slots WHERE state = 'previous'") == 0
    });
    source.run(
        "SELECT rekey.create_key('more'); SELECT rekey.grant_key('more', 'common', '{decrypt}');
         SELECT rekey.revoke_key('more', 'common', '{decrypt}');
         SELECT rekey.set_policy('pii', custodian => 'x');
         SELECT rekey.pause('t', reason => 'for the test'); SELECT rekey.resume('t');
         SELECT rekey.unregister_column('t', 'c'); SELECT rekey.register_column('t', 'c')",
    );
    let old = source.text("SELECT root_id FROM rekey.root_keys WHERE state = 'active'");
    source.text("SELECT rekey.rotate_root_key()");
    source.run(&format!("SELECT rekey.retire_root_key('{old}')"));
    let drained = "SELECT min(slot_id) FROM rekey.slots WHERE state = 'drained'";
    let drained = source.number(drained);
    source.run(&format!("SELECT rekey.destroy_slot({drained}, true)"));
    source.run("SELECT rekey.shred_key('more', 'over'); SELECT rekey.drop_key('more')");
}

#[test]
fn a_publication_for_all_tables_makes_a_copy_of_the_catalog() {
    let (publisher, cluster) = (publisher(), subscriber());
    let mut source = publisher.database("app").connect();
    source.run("CREATE ROLE common");
    fill(&mut source);
    source.run("SELECT rekey.grant_key('pii', 'common', '{decrypt}')");
    source.run("CREATE PUBLICATION p FOR ALL TABLES");
    let mut client = cluster.empty_database("app", "").connect();
    client.run(&format!(
        "CREATE ROLE common; CREATE EXTENSION pg_rekey; {TABLE}"
    ));
    subscribe(&mut client, &publisher);
    applied(&mut source, &mut client);
    administer(&mut source);
    applied(&mut source, &mut client);
    assert_eq!(errors(&mut client), 0);
    for view in ["keys", "slots", "grants"] {
        let all = format!("SELECT * FROM rekey.{view} ORDER BY 1, 2, 3");
        assert_eq!(client.rows(&all), source.rows(&all), "{view}");
    }
    let keyring = std::fs::read(publisher.root_key_file()).expect("the keyring");
    cluster.write_file(&cluster.root_key_file(), &keyring, 0o600);
    assert_eq!(client.number(WRONG), 0);
    // It has no numbers of its own yet: its audit log goes on behind the publisher's.
    client.run("SELECT rotate_key('pii')");
    let audit = "SELECT count(*) FROM rekey.audit WHERE action = 'rotate_key'";
    assert!(client.number(audit) > source.number(audit));
}

#[test]
fn a_publication_for_all_tables_stops_no_apply_worker_of_a_subscriber_with_keys_of_its_own() {
    let (publisher, cluster) = (publisher(), subscriber());
    let mut source = publisher.database("app").connect();
    source.run("CREATE ROLE common");
    fill(&mut source);
    source.run("CREATE PUBLICATION p FOR ALL TABLES");
    let mut client = cluster.database("app").connect();
    let own_root = client.text("SELECT root_id FROM rekey.root_keys");
    client.run(&format!("CREATE ROLE common; {TABLE}"));
    client.run("SELECT rekey.register_column('t', 'c')");
    take_over(&mut source, &mut client);
    let own = client.number("SELECT rotate_key('pii')");
    subscribe(&mut client, &publisher);
    applied(&mut source, &mut client);
    assert_eq!(client.number(WRONG), 0);
    administer(&mut source);
    take_over(&mut source, &mut client);
    client.run("SELECT rotate_key('pii'); SELECT rekey.create_key('own')");
    administer(&mut source);
    applied(&mut source, &mut client);
    assert_eq!(errors(&mut client), 0);
    take_over(&mut source, &mut client);
    assert_eq!(client.number(WRONG), 0);
    let active = "SELECT root_id FROM rekey.root_keys WHERE state = 'active'";
    assert_eq!(client.text(active), own_root);
    let kept = format!("SELECT count(*) FROM rekey.slots WHERE slot_id = {own}");
    assert_eq!(client.number(&kept), 1);
    let seal = "SELECT decrypt_col(encrypt_col('x', 'pii'))";
    assert_eq!(client.text(seal), "x");
    // Both audit logs are there.
    let audit = "SELECT count(*) FROM rekey.audit WHERE action = ";
    assert_eq!(
        client.number(&format!("{audit}'import_key' AND slot_id IS NULL")),
        3
    );
    assert!(client.number(&format!("{audit}'drain'")) > 1);
}
