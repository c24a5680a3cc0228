//! Catalog rows that arrive by logical replication or under the replica role reach warm sessions.
//!
//! A subscriber holds the same root key file. Its apply worker runs with the role replica, where only
//! ALWAYS triggers fire: those that announce changes must, the one that refuses them must not.

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

const TABLES: &str = "rekey.key, rekey.key_slot, rekey.slot_wrap, rekey.key_grant";

/// Opens `envelope` once the change that it needs has been applied.
fn opens_at_last(client: &mut Client, envelope: &str, value: &str) {
    let sql = format!("SELECT decrypt_col('{envelope}')");
    wait_until(&format!("{value} opens on the subscriber"), || {
        client.attempt(&sql).is_ok()
    });
    assert_eq!(client.text(&sql), value);
}

#[test]
fn logical_apply_is_seen_by_warm_sessions_of_the_subscriber() {
    let cluster = Cluster::start(Options::preloaded().set("wal_level = logical"));
    let publisher = cluster.database("publisher");
    let subscriber = cluster.database("subscriber");
    let mut source = publisher.connect();
    source.run("SELECT rekey.create_key('pii')");
    let first = source.text("SELECT encrypt_col('first', 'pii')");
    let old = source.number("SELECT active_slot FROM rekey.keys");
    let mut warm = subscriber.connect();
    warm.run("SELECT rekey.create_key('own'); SELECT encrypt_col('x', 'own')");
    warm.refuse(&format!("SELECT decrypt_col('{first}')"), "42704");
    source.run(&format!("CREATE PUBLICATION keys FOR TABLE {TABLES}"));
    source.run("SELECT pg_create_logical_replication_slot('keys', 'pgoutput')");
    let mut admin = subscriber.connect();
    admin.run(&format!(
        "CREATE SUBSCRIPTION keys CONNECTION '{}' PUBLICATION keys \
         WITH (create_slot = false, slot_name = 'keys')",
        cluster.conninfo("publisher")
    ));
    opens_at_last(&mut warm, &first, "first");
    source.run("SELECT rotate_key('pii')");
    let second = source.text("SELECT encrypt_col('second', 'pii')");
    opens_at_last(&mut warm, &second, "second");
    assert_eq!(
        warm.text(&format!("SELECT decrypt_col('{first}')")),
        "first"
    );
    source.run(&format!("SELECT rekey.disable_slot({old}, force => true)"));
    wait_until("the disabled slot is disabled on the subscriber", || {
        warm.attempt(&format!("SELECT decrypt_col('{first}')"))
            .is_err_and(|refusal| refusal.code == "55000")
    });
    admin.run("ALTER SUBSCRIPTION keys DISABLE");
    admin.run("ALTER SUBSCRIPTION keys SET (slot_name = NONE); DROP SUBSCRIPTION keys");
}

/// Copies the key `moved` from one database to the other under the role replica.
fn restore_as_replica(from: &mut Client, to: &mut Client, cluster: &Cluster) {
    to.run("SET session_replication_role = replica");
    for (table, filter) in [
        ("key", "key_name = 'moved'"),
        ("key_slot", "key_name = 'moved'"),
        (
            "slot_wrap",
            "slot_id IN (SELECT slot_id FROM rekey.key_slot WHERE key_name = 'moved')",
        ),
        ("key_grant", "key_name = 'moved'"),
    ] {
        let file = cluster.dir().join(format!("replica-{table}"));
        let file = file.display();
        from.run(&format!(
            "COPY (SELECT * FROM rekey.{table} WHERE {filter}) TO '{file}'"
        ));
        to.run(&format!("COPY rekey.{table} FROM '{file}'"));
    }
    to.run("RESET session_replication_role");
}

#[test]
fn a_restore_under_the_replica_role_is_seen_by_warm_sessions() {
    let cluster = Cluster::start(Options::unloaded());
    let (source, target): (Database, Database) = (cluster.database("s"), cluster.database("t"));
    let mut from = source.connect();
    from.run("SELECT rekey.create_key('moved')");
    let envelope = from.text("SELECT encrypt_col('arrived', 'moved')");
    let mut warm = target.connect();
    warm.refuse(&format!("SELECT decrypt_col('{envelope}')"), "42704");
    restore_as_replica(&mut from, &mut target.connect(), &cluster);
    assert_eq!(
        warm.text(&format!("SELECT decrypt_col('{envelope}')")),
        "arrived"
    );
    warm.run("SELECT encrypt_col('x', 'moved')");
}
