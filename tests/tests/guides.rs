//! The guides of docs/ whose SQL is run as it stands there: rotation, views, permissions and others.
//!
//! As tests/incidents.rs for the incidents: each test makes the state that the page is about, steps
//! through the page, and does in between what the page says in prose.

use std::fs;

use postgres::Client;
use rekey_tests::page::docs;
use rekey_tests::{Ask, Cluster, Options, Page, wait_until};

fn by_hand() -> Cluster {
    Cluster::start(
        Options::preloaded()
            .set("autovacuum = off")
            .set("rekey.worker = off"),
    )
}

/// The table customer of the database app, sealed under the key pii.
fn app(cluster: &Cluster) -> Client {
    let mut client = cluster.database("app").connect();
    client.run(
        "CREATE ROLE shop;
         SELECT rekey.create_key('pii', max_age => '1 year'),
                rekey.set_policy('pii', custodian => 'security team', grace => '0 s'),
                rekey.grant_key('pii', 'shop', '{encrypt,decrypt}');
         CREATE TABLE customer (id bigint PRIMARY KEY, email bytea);
         INSERT INTO customer
         SELECT i, encrypt_col('user' || i || '@example.org', 'pii',
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

#[test]
fn rotation() {
    let cluster = by_hand();
    let mut client = cluster.database("app").connect();
    let mut page = Page::open("rotation.md");
    page.steps(4, &cluster, "app");
    client.run(
        "UPDATE customer SET email = set_byte(email, 40, get_byte(email, 40) # 1)
          WHERE id IN (12, 13)",
    );
    page.steps(3, &cluster, "app");
    client.run("CALL rekey.reencrypt()");
    page.steps(4, &cluster, "app");
    client.run("CALL rekey.reencrypt()");
    page.rest(&cluster, "app");
}

#[test]
fn permissions() {
    let cluster = by_hand();
    cluster.database("app");
    Page::open("permissions.md").rest(&cluster, "app");
}

#[test]
fn views() {
    let cluster = by_hand();
    cluster.database("app");
    Page::open("views.md").rest(&cluster, "app");
}

#[test]
fn tenants() {
    let cluster = by_hand();
    cluster.database("app");
    Page::open("tenants.md").rest(&cluster, "app");
}

#[test]
fn audit() {
    let cluster = by_hand();
    let mut client = app(&cluster);
    client.run("SELECT rotate_key('pii', 'yearly rotation')");
    client.run("CALL rekey.reencrypt()");
    for step in ["disable_slot", "destroy_slot"] {
        let end = format!("SELECT rekey.{step}(slot_id) FROM rekey.slots WHERE version = 1");
        wait_until("older transactions have ended", || {
            client.attempt(&end).is_ok()
        });
    }
    client.run("SELECT rotate_key('pii', 'officer left')");
    client.run(
        "SELECT rekey.disable_slot(slot_id, force => true) FROM rekey.slots WHERE version = 2",
    );
    client.run("SELECT rekey.enable_slot(slot_id) FROM rekey.slots WHERE version = 2");
    client.run("SELECT rekey.export_key('pii')");
    Page::open("audit.md").rest(&cluster, "app");
}

#[test]
fn high_availability() {
    let primary = by_hand();
    let mut client = app(&primary);
    let standby = primary.standby();
    let file = standby.root_key_file();
    let copy_keyring = || {
        let keyring = fs::read(primary.root_key_file()).expect("the keyring");
        standby.write_file(&file, &keyring, 0o600);
    };
    copy_keyring();
    standby.append(&format!("rekey.root_key_file = '{}'", file.display()));
    standby.restart("fast");
    let mut there = standby.connect("app");
    replayed(&mut client, &mut there);
    let mut page = Page::open("high-availability.md");
    page.step(&standby, "app");
    page.steps(3, &primary, "app");
    replayed(&mut client, &mut there);
    page.step(&standby, "app");
    copy_keyring();
    page.step(&standby, "app");
    page.step(&primary, "app");
    replayed(&mut client, &mut there);
    primary.stop("immediate");
    standby.promote();
    page.rest(&standby, "app");
}

#[test]
fn backup_and_restore() {
    let cluster = by_hand();
    let mut client = app(&cluster);
    client.run(
        "SELECT rotate_key('pii'); UPDATE customer SET email = encrypt_col('new', 'pii', \
                rekey.context('customer.email', id::text)) WHERE id > 900",
    );
    let mut page = Page::open("backup-and-restore.md");
    page.step(&cluster, "app");
    let dump = cluster.dir().join("app.dump");
    let dump = dump.to_str().expect("a path in UTF-8");
    cluster.tool("pg_dump", &["-Fc", "-d", "app", "-f", dump]);
    let restored = by_hand();
    restored.connect("postgres").run("CREATE ROLE shop");
    // All test servers have one system identifier. On two servers a table does not have one OID too.
    restored.empty_database("spare", "");
    restored.empty_database("app", "");
    restored.tool("pg_restore", &["-d", "app", dump]);
    page.step(&restored, "app");
    let keyring = fs::read(cluster.root_key_file()).expect("the keyring");
    restored.write_file(&restored.root_key_file(), &keyring, 0o600);
    page.steps(2, &restored, "app");
    // A base backup, promoted: what a restore to a point in time ends in.
    let base = cluster.standby();
    base.promote();
    page.rest(&base, "app");
}

#[test]
fn every_document_is_in_the_index() {
    let index = fs::read_to_string(docs().join("README.md")).expect("the index");
    for entry in fs::read_dir(docs()).expect("docs").flatten() {
        let name = entry.file_name().into_string().expect("a name in UTF-8");
        let listed = index.contains(&format!("]({name})")) || name == "README.md";
        assert!(listed || entry.path().is_dir(), "{name} is not listed");
    }
}
