//! Many sessions at once: writers with a plaintext shadow, readers, and a key that keeps rotating.
//!
//! No client may see an error, every envelope opens to its shadow at every moment, and there is
//! always exactly one active slot.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Options, long_runs};

const WRITERS: usize = 3;
/// Not a multiple of the four shapes of transaction, so that each row meets each of them.
const ROWS: usize = 39;

/// Each of the rotator's five turns has come several times by then.
const ROTATIONS: usize = 30;

/// What a writer does at least.
fn steps() -> usize {
    if long_runs() { 1500 } else { 250 }
}

/// Raises the flag when the thread ends, by a panic too: the loops of others must not run for ever.
struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Inserts and changes rows of its own range, in transactions of several shapes, and goes on until
/// `enough` has happened beside it.
fn write(client: &mut Client, writer: usize, enough: impl Fn() -> bool) {
    for step in (0..).take_while(|step| *step < steps() || !enough()) {
        let id = writer * 1000 + step % ROWS;
        let value = format!("writer {writer} step {step}");
        let upsert = format!(
            "INSERT INTO t VALUES ({id}, '{value}', encrypt_col('{value}', 'pii', '{id}')) \
             ON CONFLICT (id) DO UPDATE SET shadow = excluded.shadow, c = excluded.c"
        );
        match step % 4 {
            0 => client.run(&upsert),
            1 => client.run(&format!("BEGIN; SAVEPOINT s; {upsert}; RELEASE s; COMMIT")),
            2 => client.run(&format!(
                "BEGIN; SAVEPOINT s; {upsert}; ROLLBACK TO s; {upsert}; COMMIT"
            )),
            _ => {
                client.run(&format!("BEGIN; {upsert}; ROLLBACK"));
                client.run(&format!("UPDATE t SET c = c WHERE id = {id}"));
            }
        }
    }
}

const WRONG: &str = "SELECT count(*) FROM t WHERE decrypt_col(c, id::text) IS DISTINCT FROM shadow";
const ACTIVE: &str = "SELECT count(*) FROM rekey.slots WHERE state = 'active'";

#[test]
fn every_row_opens_to_its_shadow_while_the_key_rotates() {
    let cluster = Cluster::start(Options::preloaded());
    cluster.database("app").connect().run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t (id int PRIMARY KEY, shadow text NOT NULL, c bytea NOT NULL)",
    );
    let done = AtomicBool::new(false);
    let rotations = AtomicUsize::new(0);
    thread::scope(|scope| {
        let (done, rotations) = (&done, &rotations);
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let mut client = cluster.connect("app");
                scope.spawn(move || {
                    write(&mut client, writer, || {
                        done.load(Ordering::SeqCst) || rotations.load(Ordering::SeqCst) >= ROTATIONS
                    });
                })
            })
            .collect();
        for level in ["READ COMMITTED", "REPEATABLE READ"] {
            let mut client = cluster.connect("app");
            scope.spawn(move || {
                client.run(&format!(
                    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {level}"
                ));
                while !done.load(Ordering::SeqCst) {
                    client.run("BEGIN");
                    assert_eq!(client.number(WRONG), 0, "{level}");
                    assert_eq!(client.number(ACTIVE), 1, "{level}");
                    assert_eq!(client.number(WRONG), 0, "{level}");
                    client.run("COMMIT");
                }
            });
        }
        let mut client = cluster.connect("app");
        scope.spawn(move || {
            let _raise = Raise(done);
            while !done.load(Ordering::SeqCst) {
                match rotations.fetch_add(1, Ordering::SeqCst) % 5 {
                    0 => client.run(
                        "SELECT rekey.rollback_rotation('pii')
                        WHERE EXISTS (SELECT FROM rekey.slots WHERE state = 'previous')",
                    ),
                    1 => client.run("BEGIN; SELECT rotate_key('pii'); ROLLBACK"),
                    _ => client.run("SELECT rotate_key('pii')"),
                }
            }
        });
        let _raise = Raise(done);
        for writer in writers {
            writer.join().expect("a writer");
        }
    });
    let mut client = cluster.connect("app");
    assert_eq!(
        client.number("SELECT count(*) FROM t"),
        i64::try_from(WRITERS * ROWS).expect("few")
    );
    assert_eq!(client.number(WRONG), 0);
    assert_eq!(client.number(ACTIVE), 1);
    assert!(client.number("SELECT count(DISTINCT rekey.slot_id(c)) FROM t") >= 1);
}

#[test]
fn a_crash_in_the_middle_of_rotations_loses_nothing() {
    let cluster = Cluster::start(Options::preloaded());
    cluster.database("app").connect().run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t (id serial PRIMARY KEY, shadow text NOT NULL, c bytea NOT NULL)",
    );
    for crash in 0..3 {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            // Ends the loops below if this thread fails before it has ended the server.
            let _raise = Raise(&over);
            let over = &over;
            let clients: Vec<Client> = (0..2).map(|_| cluster.connect("app")).collect();
            let cluster = &cluster;
            for (i, mut client) in clients.into_iter().enumerate() {
                scope.spawn(move || {
                    // Until the server is gone.
                    let sql = if i == 0 {
                        "INSERT INTO t (shadow, c) SELECT x, encrypt_col(x, 'pii') \
                         FROM (SELECT random()::text AS x) x"
                    } else {
                        "SELECT rotate_key('pii')"
                    };
                    while !over.load(Ordering::SeqCst) && client.batch_execute(sql).is_ok() {}
                });
            }
            let mut observer = cluster.connect("app");
            let target = (crash + 1) * 30;
            rekey_tests::wait_until("rotations and inserts have happened", || {
                observer.number("SELECT count(*) FROM t") > target
                    && observer.number("SELECT count(*) FROM rekey.slots") > target / 3
            });
            cluster.kill();
        });
        cluster.boot();
        let mut client = cluster.connect("app");
        assert_eq!(
            client.number("SELECT count(*) FROM t WHERE decrypt_col(c) <> shadow"),
            0
        );
        assert_eq!(client.number(ACTIVE), 1);
        let unwrapped = client.truth(
            "SELECT NOT EXISTS (SELECT FROM rekey.slots s WHERE NOT EXISTS \
             (SELECT FROM rekey.slot_wrap w WHERE w.slot_id = s.slot_id))",
        );
        assert!(unwrapped, "every slot has its wrapped key");
    }
}
