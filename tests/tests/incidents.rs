//! The pages of docs/incidents, run as somebody would at 3 a.m.: on a server to which it happened.
//!
//! Each test brings a server into the state that its page is about, runs the page's SQL as it
//! stands there (rekey_tests::page), and does in between what the page asks for in prose: copying
//! files, restoring dumps, starting servers.

use std::fs;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use postgres::Client;
use rekey_tests::page::docs;
use rekey_tests::{Ask, Cluster, Options, Page, wait_until};

static OIDS_APART: AtomicUsize = AtomicUsize::new(1);

/// Without autovacuum, whose transactions hold up the end of a slot on a small machine.
fn quiet() -> Options {
    Options::preloaded().set("autovacuum = off")
}

/// A server whose re-encryption is done by CALL alone.
fn by_hand() -> Cluster {
    Cluster::start(quiet().set("rekey.worker = off"))
}

/// A server with a worker that does not rest.
fn with_worker() -> Cluster {
    Cluster::start(quiet().set("rekey.work_ratio = 1"))
}

/// What all pages speak of: the table customer of the database app, sealed under the key pii.
fn app(cluster: &Cluster) -> Client {
    let mut client = cluster.database("app").connect();
    client.run(
        "CREATE ROLE shop;
         SELECT rekey.create_key('pii'), rekey.grant_key('pii', 'shop', '{encrypt,decrypt}');
         CREATE TABLE customer (id bigint PRIMARY KEY, name text NOT NULL, email bytea);
         INSERT INTO customer
         SELECT i, 'name ' || i, encrypt_col('user' || i || '@example.org', 'pii',
                rekey.context('customer.email', i::text)) FROM generate_series(1, 1000) AS i;
         SELECT rekey.register_column('customer', 'email',
                                      $$rekey.context('customer.email', id::text)$$)",
    );
    client
}

fn replayed(primary: &mut Client, standby: &mut Client) {
    let lsn = primary.text("SELECT pg_current_wal_flush_lsn()");
    wait_until("the standby has replayed", || {
        standby.truth(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'"))
    });
}

fn waits_for(client: &mut Client, what: &str) {
    wait_until(what, || {
        let said = client.column("SELECT coalesce(waits_for, '') FROM rekey.progress");
        said.iter().any(|why| why.contains(what))
    });
}

fn drained(client: &mut Client) {
    wait_until("the slot is drained", || {
        client.number("SELECT count(*) FROM rekey.slots WHERE state = 'drained'") == 1
    });
}

/// The path of a file of this cluster, for a tool's arguments.
fn path(cluster: &Cluster, name: &str) -> String {
    let path = cluster.dir().join(name);
    path.to_str().expect("a path in UTF-8").to_owned()
}

/// Restores a dump in the custom format into a new database of a server.
fn restore(cluster: &Cluster, database: &str, dump: &str) {
    // All test servers have one system identifier. On two servers a table does not have one OID too.
    for number in 0..OIDS_APART.fetch_add(1, Ordering::Relaxed) {
        cluster.empty_database(&format!("spare_{number}"), "");
    }
    cluster.empty_database(database, "");
    cluster.tool("pg_restore", &["-d", database, dump]);
}

#[test]
fn dek_leaked() {
    let cluster = by_hand();
    app(&cluster);
    Page::open("incidents/dek-leaked.md").rest(&cluster, "app");
}

#[test]
fn root_key_leaked() {
    let cluster = by_hand();
    app(&cluster);
    Page::open("incidents/root-key-leaked.md").rest(&cluster, "app");
}

#[test]
fn root_key_lost() {
    let cluster = by_hand();
    drop(app(&cluster));
    // Only a server that has started with the file holds it for new sessions.
    cluster.restart("fast");
    fs::remove_file(cluster.root_key_file()).expect("the keyring removed");
    let mut page = Page::open("incidents/root-key-lost.md");
    page.steps(2, &cluster, "app");
    let rescue = by_hand();
    rescue.empty_database("app", "");
    rescue.connect("app").run("CREATE ROLE shop");
    page.steps(2, &rescue, "app");
    let tables = path(&cluster, "tables.sql");
    cluster.tool("pg_dump", &["-n", "public", "-d", "app", "-f", &tables]);
    rescue.tool("psql", &["-Xq", "-d", "app", "-f", &tables]);
    page.step(&rescue, "app");
    page.step(&cluster, "app");
    page.rest(&rescue, "app");
    let mut client = rescue.connect_as("app", "postgres");
    client.run("SET ROLE shop");
    assert!(client.truth("SELECT rekey.has_key_privilege('pii', 'decrypt')"));
    assert_eq!(
        client.column("SELECT column_name FROM rekey.columns"),
        [""; 0]
    );
    client.run("RESET ROLE");
    assert_eq!(
        client.column("SELECT column_name FROM rekey.columns"),
        ["email"]
    );
}

#[test]
fn root_key_wrong_after_failover() {
    let primary = by_hand();
    let mut client = app(&primary);
    let standby = primary.standby();
    let file = standby.root_key_file();
    let keyring = || fs::read(primary.root_key_file()).expect("the keyring");
    standby.write_file(&file, &keyring(), 0o600);
    standby.append(&format!("rekey.root_key_file = '{}'", file.display()));
    standby.restart("fast");
    client.run("SELECT rekey.rotate_root_key()");
    client
        .run("SELECT rekey.retire_root_key(root_id) FROM rekey.root_keys WHERE state = 'previous'");
    replayed(&mut client, &mut standby.connect("app"));
    primary.stop("immediate");
    standby.promote();
    let mut page = Page::open("incidents/root-key-wrong-after-failover.md");
    page.steps(2, &standby, "app");
    standby.write_file(&file, &keyring(), 0o600);
    page.rest(&standby, "app");
}

#[test]
fn disk_filling() {
    let cluster = Cluster::start(
        quiet()
            .set("rekey.work_ratio = 1")
            .set("rekey.min_free_disk = '1000TB'"),
    );
    let mut client = app(&cluster);
    client.run("SELECT pg_create_physical_replication_slot('old_standby', true)");
    client.run("SELECT rotate_key('pii')");
    waits_for(&mut client, "rekey.min_free_disk");
    let mut page = Page::open("incidents/disk-filling.md");
    page.steps(5, &cluster, "app");
    cluster.append("rekey.min_free_disk = '1MB'");
    page.step(&cluster, "app");
    drained(&mut client);
    page.rest(&cluster, "app");
}

#[test]
fn replication_lag() {
    let primary = Cluster::start(
        quiet()
            .set("rekey.work_ratio = 1")
            .set("rekey.max_replication_lag = '1s'"),
    );
    let mut client = app(&primary);
    let standby = primary.standby();
    let mut there = standby.connect("app");
    replayed(&mut client, &mut there);
    there.run("SELECT pg_wal_replay_pause()");
    wait_until("the standby lags", || {
        client.run("UPDATE customer SET name = name WHERE id = 1");
        client.truth("SELECT coalesce(max(replay_lag), '0') > '2 s' FROM pg_stat_replication")
    });
    client.run("SELECT rotate_key('pii')");
    waits_for(&mut client, "rekey.max_replication_lag");
    let mut page = Page::open("incidents/replication-lag.md");
    page.steps(2, &primary, "app");
    page.steps(2, &standby, "app");
    page.steps(3, &primary, "app");
    drained(&mut client);
    page.rest(&primary, "app");
}

#[test]
fn worker_stuck() {
    let cluster = with_worker();
    let mut client = app(&cluster);
    client.run(
        "BEGIN; INSERT INTO customer VALUES (1001, 'late', encrypt_col('late@example.org', 'pii'));
         PREPARE TRANSACTION 'import-7'",
    );
    client.run("SELECT rotate_key('pii')");
    waits_for(&mut client, "prepared transaction");
    let mut page = Page::open("incidents/worker-stuck.md");
    page.steps(6, &cluster, "app");
    drained(&mut client);
    page.rest(&cluster, "app");
}

#[test]
fn row_does_not_open() {
    let cluster = by_hand();
    let mut client = app(&cluster);
    client.run(
        "UPDATE customer SET email = (SELECT email FROM customer WHERE id = 500) WHERE id = 12;
         UPDATE customer SET email = set_byte(email, 40, get_byte(email, 40) # 1) WHERE id = 13;
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    Page::open("incidents/row-does-not-open.md").rest(&cluster, "app");
}

#[test]
fn old_backup_after_destroy() {
    let cluster = by_hand();
    let mut client = app(&cluster);
    let dump = path(&cluster, "app.dump");
    cluster.tool("pg_dump", &["-Fc", "-d", "app", "-f", &dump]);
    let old = client.rows("SELECT id, email FROM customer WHERE id BETWEEN 11 AND 13");
    client.run("SELECT rotate_key('pii'), rekey.set_policy('pii', grace => '0 s')");
    client.run("CALL rekey.reencrypt()");
    for step in ["disable_slot", "destroy_slot"] {
        let end = format!(
            "SELECT rekey.{step}(slot_id, force => true) FROM rekey.slots WHERE version = 1"
        );
        client.run(&end);
    }
    client.run("SELECT rekey.set_policy('pii', grace => '30 days')");
    for row in old {
        let (id, email) = (row[0].as_deref(), row[1].as_deref());
        client.run(&format!(
            "UPDATE customer SET email = '{}' WHERE id = {}",
            email.expect("an envelope"),
            id.expect("an id")
        ));
    }
    let mut page = Page::open("incidents/old-backup-after-destroy.md");
    page.steps(2, &cluster, "app");
    restore(&cluster, "last_week", &dump);
    page.rest(&cluster, "app");
}

#[test]
fn clone_to_staging() {
    let production = by_hand();
    app(&production);
    let dump = path(&production, "app.dump");
    production.tool("pg_dump", &["-Fc", "-d", "app", "-f", &dump]);
    let keyring =
        |cluster: &Cluster| fs::read_to_string(cluster.root_key_file()).expect("the keyring");
    let entry = |keyring: &str| {
        let begin = keyring.rfind("{\"id\"").expect("an entry");
        format!("{{\"version\":1,\"keys\":[{}", &keyring[begin..])
    };

    let between = by_hand();
    between.connect("postgres").run("CREATE ROLE shop");
    restore(&between, "app", &dump);
    let mut page = Page::open("incidents/clone-to-staging.md");
    page.step(&between, "app");
    // Since the dump production has another root key, which must not travel either.
    production
        .connect("app")
        .run("SELECT rekey.rotate_root_key()");
    let of_production = keyring(&production);
    between.write_file(&between.root_key_file(), of_production.as_bytes(), 0o600);
    page.steps(5, &between, "app");
    let dump = path(&between, "staging.dump");
    between.tool("pg_dump", &["-Fc", "-d", "app", "-f", &dump]);

    let staging = by_hand();
    staging.connect("postgres").run("CREATE ROLE shop");
    let only_new = entry(&keyring(&between));
    let root = "SELECT root_id FROM rekey.root_keys WHERE state = 'active'";
    let root = between.connect("app").text(root);
    assert!(only_new.contains(&root) && !of_production.contains(&root));
    staging.write_file(&staging.root_key_file(), only_new.as_bytes(), 0o600);
    restore(&staging, "app", &dump);
    page.rest(&staging, "app");
    let envelope = production
        .connect("app")
        .text("SELECT email FROM customer WHERE id = 1");
    staging
        .connect("app")
        .refuse(&format!("SELECT decrypt_col('{envelope}', 'x')"), "55000");
}

#[test]
fn every_page_has_the_same_shape_and_a_test() {
    const HEADINGS: [&str; 5] = [
        "What you see",
        "What is safe now",
        "Do this",
        "Check",
        "Why",
    ];
    static INDEX: OnceLock<String> = OnceLock::new();
    let folder = docs().join("incidents");
    let index =
        INDEX.get_or_init(|| fs::read_to_string(folder.join("README.md")).expect("the index"));
    let mut pages = 0;
    for entry in fs::read_dir(&folder).expect("docs/incidents").flatten() {
        let name = entry.file_name().into_string().expect("a name in UTF-8");
        if name == "README.md" {
            continue;
        }
        let page = fs::read_to_string(entry.path()).expect("a page");
        let headings: Vec<&str> = page
            .lines()
            .filter_map(|line| line.strip_prefix("## "))
            .collect();
        assert_eq!(headings, HEADINGS, "{name}");
        assert!(
            index.contains(&format!("]({name})")),
            "{name} is not listed"
        );
        let run = format!("Page::open(\"incidents/{name}\")");
        assert!(include_str!("incidents.rs").contains(&run), "{name}");
        pages += 1;
    }
    assert!(pages >= 10, "pages: {pages}");
}
