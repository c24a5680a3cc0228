//! No nonce repeats: over sessions of one postmaster, transactions, rollbacks, PREPARE, a restart.
//!
//! The sessions are forked from a postmaster that has the library loaded, the case in which a
//! generator copied by fork repeats itself. 100,000 values, or 1,000,000 with `REKEY_LONG=1` or in
//! a release build. All rolled-back values count: their bytes may be in the WAL.

use std::collections::HashSet;
use std::sync::Mutex;
use std::thread;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Options, long_runs};

const SESSIONS: usize = 8;
/// Values sealed by one statement.
const BATCH: usize = 250;

fn values() -> usize {
    if long_runs() || !cfg!(debug_assertions) {
        1_000_000
    } else {
        100_000
    }
}

/// The nonces of a batch, sealed as one statement.
fn batch(client: &mut Client) -> Vec<String> {
    client.column(&format!(
        "SELECT substr(encrypt_col('v', CASE WHEN i % 2 = 0 THEN 'pii' ELSE 'other' END), 11, 24) \
         FROM generate_series(1, {BATCH}) i"
    ))
}

/// One round: five batches in transactions of every shape.
fn round(client: &mut Client, name: &str) -> Vec<String> {
    let mut nonces = batch(client);
    client.run("BEGIN; SAVEPOINT s");
    nonces.extend(batch(client));
    client.run("ROLLBACK TO s");
    nonces.extend(batch(client));
    client.run("COMMIT; BEGIN");
    nonces.extend(batch(client));
    client.run("ROLLBACK; BEGIN; INSERT INTO plain DEFAULT VALUES");
    nonces.extend(batch(client));
    client.run(&format!("PREPARE TRANSACTION '{name}'"));
    client.run(&format!("COMMIT PREPARED '{name}'"));
    nonces
}

/// Rounds in eight sessions at once, fresh from the postmaster; adds what they sealed to `seen`.
fn seal(cluster: &Cluster, rounds: usize, seen: &Mutex<HashSet<String>>) {
    thread::scope(|scope| {
        for session in 0..SESSIONS {
            scope.spawn(move || {
                let mut client = cluster.connect("nonces");
                for i in 0..rounds {
                    let nonces = round(&mut client, &format!("p{session}-{i}"));
                    let mut seen = seen.lock().expect("the nonces seen");
                    for nonce in nonces {
                        assert_eq!(nonce.len(), 50, "24 bytes in hex");
                        assert!(seen.insert(nonce), "a nonce repeats");
                    }
                }
            });
        }
    });
}

#[test]
fn no_nonce_repeats_whatever_happens_to_sessions_and_transactions() {
    let cluster = Cluster::start(Options::preloaded());
    cluster.database("nonces").connect().run(
        "SELECT rekey.create_key('pii'); SELECT rekey.create_key('other');
         CREATE TABLE plain (i int)",
    );
    let rounds = values() / SESSIONS / BATCH / 5;
    let seen = Mutex::new(HashSet::new());
    seal(&cluster, rounds / 2, &seen);
    cluster.restart("fast");
    seal(&cluster, rounds - rounds / 2, &seen);
    assert_eq!(seen.lock().expect("the nonces").len(), values());
}

#[test]
fn salts_of_fresh_sessions_differ() {
    let cluster = Cluster::start(Options::preloaded());
    cluster
        .database("salts")
        .connect()
        .run("SELECT rekey.create_key('pii')");
    let mut seen = HashSet::new();
    for _ in 0..50 {
        let mut client = cluster.connect("salts");
        let salt = client.text("SELECT substr(encrypt_col('v', 'pii'), 11, 12)");
        let counter = client.text("SELECT substr(encrypt_col('v', 'pii'), 23, 12)");
        assert!(
            seen.insert(salt) && seen.insert(counter),
            "a fork copied a generator"
        );
    }
}

#[test]
fn salt_per_value_gives_each_value_its_own_salt() {
    let cluster = Cluster::start(Options::unloaded());
    let mut client = cluster.database("apart").connect();
    client.run("SELECT rekey.create_key('pii')");
    let salts = |client: &mut Client| {
        client.number(
            "SELECT count(DISTINCT substr(encrypt_col('v', 'pii'), 11, 12)) \
             FROM generate_series(1, 1000)",
        )
    };
    assert_eq!(salts(&mut client), 1);
    client.run("SET rekey.salt_per_value = on");
    assert_eq!(salts(&mut client), 1000);
    client.run("RESET rekey.salt_per_value");
    assert_eq!(salts(&mut client), 1);
}

#[test]
fn a_salt_serves_at_most_65536_values() {
    let cluster = Cluster::start(Options::unloaded());
    let mut client = cluster.database("limit").connect();
    client.run("SELECT rekey.create_key('pii')");
    let per_salt = client.rows(
        "SELECT count(*) FROM (SELECT substr(encrypt_col('v', 'pii'), 11, 12) AS salt \
         FROM generate_series(1, 70000)) s GROUP BY salt ORDER BY 1",
    );
    let cell = |n: i32| Some(n.to_string());
    assert_eq!(per_salt, [[cell(70000 - 65536)], [cell(65536)]]);
}
