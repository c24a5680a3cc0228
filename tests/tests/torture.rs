//! Nothing lost: clients write, a rotator rotates, the worker drains and destroys, and a killer
//! kills -9 the worker, clients' backends and the postmaster, at random and at the boundaries between
//! two steps, all at once, against an oracle.
//!
//! The oracle: `shadow` holds in the same row what `c` seals, `mirror` repeats every row and is kept
//! by the same transactions, `log` names each transaction, and each client remembers which of its
//! transactions the server has confirmed. The rows of `bound` stay; they are sealed under a second
//! key, whose slots are disabled instead of destroyed, each with a context. It is asked each time a
//! slot has ended, and at the end. A value that a client keeps is stored by the transaction that
//! sealed or read it: copies that outlive it are documented as not covered.
//!
//! The short form takes about half a minute. `REKEY_TORTURE_MINUTES=N` runs N minutes. What each
//! thread tries follows from the seed, printed at the end and on failure and set by
//! `REKEY_TORTURE_SEED`; how the threads interleave does not.

use std::collections::HashSet;
use std::error::Error as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use postgres::{Client, Error, SimpleQueryMessage};
use rekey_tests::{Ask, BOUNDARIES, Cluster, Options, PATIENCE, wait_until};

const DATABASE: &str = "torture";
const CLIENTS: u64 = 6;
/// Rows at the start; ids are drawn from twice as many.
const ROWS: u64 = 2000;
/// How many transactions a client leaves prepared at most.
const PENDING: usize = 2;
/// How long the slots may take to drain once nobody writes any more.
const DRAIN: Duration = Duration::from_secs(120);

/// The boundaries within a rotation: beside those of the worker the killer lies in wait there.
const OF_A_ROTATION: [&str; 2] = ["rotate.superseded", "rotate.activated"];

/// Rows of the second table.
const BOUND: u64 = 300;

/// What the run must have seen, so that the checks are not vacuous.
struct Floors {
    rotations: u64,
    crashes: u64,
    checks: u64,
}

impl Floors {
    /// Of the short form, or of so many minutes: 200 rotations and 30 crashes in 20.
    fn of(minutes: Option<u64>) -> Floors {
        let minutes = minutes.unwrap_or(0);
        Floors {
            rotations: 6.max(10 * minutes),
            crashes: 3.max(3 * minutes / 2),
            checks: 1.max(minutes / 2),
        }
    }
}

/// The oracle's questions and its answers when nothing is lost, asked in one snapshot.
const ORACLE: &str = "SELECT \
    (SELECT count(*) FROM t WHERE decrypt_col(c) IS DISTINCT FROM shadow) AS wrong, \
    (SELECT count(*) FROM bound WHERE decrypt_col(c, rekey.context('bound.c', id::text)) \
        IS NOT DISTINCT FROM shadow) AS bound, \
    (SELECT count(*) FROM (SELECT c FROM t UNION ALL SELECT c FROM bound) AS x \
      WHERE rekey.slot_id(c) IN \
        (SELECT slot_id FROM rekey.slots WHERE state IN ('disabled', 'destroyed'))) AS orphaned, \
    (SELECT count(*) FROM rekey.slots WHERE state = 'active') AS active, \
    (SELECT count(*) FROM (SELECT id, shadow, n FROM t \
        EXCEPT ALL SELECT id, shadow, n FROM mirror) AS x) AS surplus, \
    (SELECT count(*) FROM (SELECT id, shadow, n FROM mirror \
        EXCEPT ALL SELECT id, shadow, n FROM t) AS x) AS lost";
const NOTHING_LOST: [&str; 6] = ["0", "300", "0", "2", "0", "0"];

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn id(&mut self) -> u64 {
        1 + self.below(2 * ROWS)
    }

    /// A value of 1 to some 130 characters.
    fn value(&mut self) -> String {
        let (word, times) = (self.next(), self.below(8));
        let word = format!("{word:x}");
        "v".to_owned() + &word.repeat(usize::try_from(times).expect("a small number"))
    }

    /// Time passes; nothing is synchronised by it.
    fn pause(&mut self, from: u64, to: u64) {
        sleep(Duration::from_millis(from + self.below(to - from)));
    }
}

/// What the threads share.
struct Stage {
    cluster: Cluster,
    seed: u64,
    begun: Instant,
    long: bool,
    floors: Floors,
    /// The rotator and the killer end.
    calm: AtomicBool,
    /// The clients and the observer end.
    over: AtomicBool,
    rotations: AtomicU64,
    rollbacks: AtomicU64,
    crashes: AtomicU64,
    postmasters: AtomicU64,
    ambushes: AtomicU64,
    transactions: AtomicU64,
    checks: AtomicU64,
}

/// Ends the other threads when one fails.
struct Alarm<'a>(&'a Stage);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.calm.store(true, Ordering::SeqCst);
            self.0.over.store(true, Ordering::SeqCst);
            eprintln!(
                "torture: failed {:?} after the start, REKEY_TORTURE_SEED={}",
                self.0.begun.elapsed(),
                self.0.seed
            );
        }
    }
}

fn get(count: &AtomicU64) -> u64 {
    count.load(Ordering::SeqCst)
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::SeqCst);
}

impl Stage {
    fn random(&self, thread: u64) -> Random {
        Random(Random(self.seed ^ (thread << 32)).next())
    }

    fn has_seen_enough(&self) -> bool {
        get(&self.rotations) >= self.floors.rotations
            && get(&self.crashes) >= self.floors.crashes
            && get(&self.checks) >= self.floors.checks
            && get(&self.postmasters) >= 1
    }

    fn is_calm(&self) -> bool {
        self.calm.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// A session, as soon as the server is there again.
    fn session(&self) -> Client {
        let mut session = None;
        wait_until("the server takes sessions", || {
            session = self.cluster.try_connect(DATABASE);
            if let Some(client) = &mut session {
                // A prepared transaction may hold a row for long.
                if let Err(error) = client.batch_execute("SET lock_timeout = '1s'") {
                    judge(&error, "SET lock_timeout");
                    session = None;
                }
            }
            session.is_some()
        });
        session.expect("a session")
    }
}

/// Accepts what a crash, a conflict or a lock's time limit says; anything else fails the test.
fn judge(error: &Error, what: &str) {
    if let Some(db) = error.as_db_error() {
        let code = db.code().code();
        assert!(
            ["40001", "40P01", "55P03"].contains(&code) || code.starts_with("57P0"),
            "{what}: {code} {} {} {}",
            db.message(),
            db.detail().unwrap_or_default(),
            db.hint().unwrap_or_default()
        );
    } else {
        let io = error
            .source()
            .is_some_and(|source| source.is::<std::io::Error>());
        assert!(error.is_closed() || io, "{what}: {error:?}");
    }
}

fn code(error: &Error) -> &str {
    error.code().map_or("", |code| code.code())
}

/// Whether nothing has been done for certain: a crash's message may come after the deed.
fn refused(error: &Error) -> bool {
    !code(error).is_empty() && !code(error).starts_with("57P0")
}

/// The rows of a query as text; NULL is an empty text.
fn ask(client: &mut Client, sql: &str) -> Result<Vec<Vec<String>>, Error> {
    let messages = client.simple_query(sql)?;
    let rows = messages.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(
            (0..row.len())
                .map(|i| row.get(i).unwrap_or_default().to_owned())
                .collect(),
        ),
        _ => None,
    });
    Ok(rows.collect())
}

/// What became of a transaction.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Commit,
    Rollback,
    Prepare,
}

/// A prepared transaction, or one that may be since the answer was lost.
struct Pending {
    serial: u64,
    sure: bool,
}

/// A client: its random choices and what it knows of its transactions.
struct Writer<'a> {
    stage: &'a Stage,
    random: Random,
    number: u64,
    serial: u64,
    confirmed: Vec<u64>,
    undone: Vec<u64>,
    pending: Vec<Pending>,
}

impl Writer<'_> {
    fn new(stage: &Stage, number: u64) -> Writer<'_> {
        Writer {
            stage,
            random: stage.random(number),
            number,
            serial: 0,
            confirmed: Vec::new(),
            undone: Vec::new(),
            pending: Vec::new(),
        }
    }

    fn run(mut self) -> Self {
        let _alarm = Alarm(self.stage);
        let mut client = self.stage.session();
        while !self.stage.is_over() {
            if !self.pending.is_empty() && self.random.one_in(5) {
                self.resolve(&mut client);
            }
            let end = match self.random.below(10) {
                0 => End::Rollback,
                1 if self.pending.len() < PENDING => End::Prepare,
                _ => End::Commit,
            };
            self.transaction(&mut client, end);
            if client.is_closed() {
                client = self.stage.session();
            }
        }
        // One more to be left, now that nothing crashes.
        let left = self.pending.len() + 1;
        let deadline = Instant::now() + PATIENCE;
        while self.pending.len() < left && !thread::panicking() {
            assert!(Instant::now() < deadline, "a last transaction is prepared");
            if client.is_closed() {
                client = self.stage.session();
            }
            self.transaction(&mut client, End::Prepare);
        }
        self
    }

    fn gid(&self, serial: u64) -> String {
        format!("{}-{serial}", self.number)
    }

    fn transaction(&mut self, client: &mut Client, end: End) {
        self.serial += 1;
        let serial = self.serial;
        if let Err(error) = self.body(client) {
            judge(&error, "a transaction");
            if let Err(error) = client.batch_execute("ROLLBACK") {
                judge(&error, "ROLLBACK");
            }
            self.undone.push(serial);
            return;
        }
        let sql = match end {
            End::Commit => "COMMIT".to_owned(),
            End::Rollback => "ROLLBACK".to_owned(),
            End::Prepare => format!("PREPARE TRANSACTION '{}'", self.gid(serial)),
        };
        match (client.batch_execute(&sql), end) {
            (Ok(()), End::Commit) => self.confirmed.push(serial),
            (Ok(()), End::Rollback) => self.undone.push(serial),
            (Ok(()), End::Prepare) => self.pending.push(Pending { serial, sure: true }),
            (Err(error), _) => {
                judge(&error, &sql);
                if end == End::Prepare && !refused(&error) {
                    let sure = false;
                    self.pending.push(Pending { serial, sure });
                }
                return;
            }
        }
        add(&self.stage.transactions);
    }

    /// Ends the prepared transaction that has waited longest.
    fn resolve(&mut self, client: &mut Client) {
        let Pending { serial, sure } = self.pending.remove(0);
        let commit = self.random.one_in(2);
        let verb = if commit { "COMMIT" } else { "ROLLBACK" };
        let sql = format!("{verb} PREPARED '{}'", self.gid(serial));
        match client.batch_execute(&sql) {
            Ok(()) if commit => self.confirmed.push(serial),
            Ok(()) => self.undone.push(serial),
            // Its PREPARE, or an earlier answer to this, was lost in a crash.
            Err(error) if !sure && code(&error) == "42704" => {}
            Err(error) => {
                judge(&error, &sql);
                let sure = sure && refused(&error);
                self.pending.insert(0, Pending { serial, sure });
            }
        }
    }

    fn body(&mut self, client: &mut Client) -> Result<(), Error> {
        let repeatable = self.random.one_in(2);
        client.batch_execute(if repeatable {
            "BEGIN ISOLATION LEVEL REPEATABLE READ"
        } else {
            "BEGIN ISOLATION LEVEL READ COMMITTED"
        })?;
        if repeatable && self.random.one_in(6) {
            ask(client, "SELECT count(*) FROM t")?;
            self.random.pause(1, 300);
        }
        for _ in 0..=self.random.below(4) {
            self.operation(client, repeatable)?;
            if self.random.one_in(20) {
                self.random.pause(1, 200);
            }
        }
        client.batch_execute(&format!(
            "INSERT INTO log VALUES ({}, {})",
            self.number, self.serial
        ))
    }

    fn operation(&mut self, client: &mut Client, repeatable: bool) -> Result<(), Error> {
        let (id, other, value) = (self.random.id(), self.random.id(), self.random.value());
        match self.random.below(10) {
            0 => insert(
                client,
                &format!("SELECT {id}, encrypt_col('{value}', 'pii'), '{value}', 0"),
            ),
            1 | 2 => update(
                client,
                &format!(
                    "UPDATE t SET c = encrypt_col('{value}', 'pii'), shadow = '{value}' WHERE id = {id}"
                ),
            ),
            3 => update(
                client,
                &format!("UPDATE t SET n = n + 1 WHERE id BETWEEN {id} AND {id} + 2"),
            ),
            4 => delete(client, id),
            // The value outlives the subtransaction that sealed it.
            5 => {
                client.batch_execute("SAVEPOINT s")?;
                let rows = ask(client, &format!("SELECT encrypt_col('{value}', 'pii')"))?;
                client.batch_execute("ROLLBACK TO SAVEPOINT s")?;
                if self.random.one_in(4) {
                    self.random.pause(1, 300);
                }
                let kept = &rows[0][0];
                if self.random.one_in(2) {
                    return insert(
                        client,
                        &format!("SELECT {id}, '{kept}'::bytea, '{value}', 0"),
                    );
                }
                update(
                    client,
                    &format!("UPDATE t SET c = '{kept}', shadow = '{value}' WHERE id = {id}"),
                )
            }
            // Copies, stale or not.
            6 => insert(
                client,
                &format!(
                    "SELECT id - {id} + {other}, c, shadow, n FROM t WHERE id BETWEEN {id} AND {id} + 4"
                ),
            ),
            7 => update(
                client,
                &format!(
                    "UPDATE t SET c = s.c, shadow = s.shadow FROM t AS s \
                      WHERE s.id = {id} AND t.id = {other} AND s.id <> t.id"
                ),
            ),
            9 => {
                let row = 1 + id % BOUND;
                let sealed = format!(
                    "c = encrypt_col('{value}', 'bound', rekey.context('bound.c', id::text)), \
                     shadow = '{value}'"
                );
                let set = if self.random.one_in(2) {
                    "n = n + 1"
                } else {
                    &sealed
                };
                client.batch_execute(&format!("UPDATE bound SET {set} WHERE id = {row}"))
            }
            // A copy by way of the client, which only a snapshot protects.
            _ if repeatable => {
                let rows = ask(
                    client,
                    &format!("SELECT c, shadow, n FROM t WHERE id = {id}"),
                )?;
                let Some(row) = rows.first() else {
                    return Ok(());
                };
                if self.random.one_in(4) {
                    self.random.pause(1, 300);
                }
                let (kept, value, n) = (&row[0], &row[1], &row[2]);
                insert(
                    client,
                    &format!("SELECT {other}, '{kept}'::bytea, '{value}', {n}"),
                )
            }
            _ => delete(client, id),
        }
    }
}

/// Rows of `RETURNING id, shadow, n` as a list of VALUES.
fn values(rows: &[Vec<String>]) -> String {
    let rows: Vec<String> = rows
        .iter()
        .map(|row| format!("({}, '{}', {})", row[0], row[1], row[2]))
        .collect();
    rows.join(", ")
}

fn insert(client: &mut Client, query: &str) -> Result<(), Error> {
    let rows = ask(
        client,
        &format!("INSERT INTO t {query} ON CONFLICT DO NOTHING RETURNING id, shadow, n"),
    )?;
    if rows.is_empty() {
        return Ok(());
    }
    client.batch_execute(&format!("INSERT INTO mirror VALUES {}", values(&rows)))
}

fn update(client: &mut Client, sql: &str) -> Result<(), Error> {
    let rows = ask(client, &format!("{sql} RETURNING t.id, t.shadow, t.n"))?;
    if rows.is_empty() {
        return Ok(());
    }
    let mirrored = ask(
        client,
        &format!(
            "UPDATE mirror AS m SET shadow = v.shadow, n = v.n \
               FROM (VALUES {}) AS v(id, shadow, n) WHERE m.id = v.id RETURNING m.id",
            values(&rows)
        ),
    )?;
    assert_eq!(mirrored.len(), rows.len(), "{sql} and the mirror");
    Ok(())
}

fn delete(client: &mut Client, id: u64) -> Result<(), Error> {
    let rows = ask(
        client,
        &format!("DELETE FROM t WHERE id = {id} RETURNING id"),
    )?;
    let sql = format!("DELETE FROM mirror WHERE id = {id} RETURNING id");
    if !rows.is_empty() {
        assert_eq!(ask(client, &sql)?, rows, "{sql} and the mirror");
    }
    Ok(())
}

fn rotate(stage: &Stage) {
    let _alarm = Alarm(stage);
    let mut random = stage.random(100);
    let mut client = stage.session();
    while !stage.is_calm() {
        let back = random.one_in(6);
        let key = if random.one_in(4) { "bound" } else { "pii" };
        let sql = if back {
            format!("SELECT rekey.rollback_rotation('{key}')")
        } else {
            format!("SELECT rotate_key('{key}')")
        };
        match client.simple_query(&sql) {
            Ok(_) => add(if back {
                &stage.rollbacks
            } else {
                &stage.rotations
            }),
            // Whatever it would go back to has ended.
            Err(error) if back && code(&error) == "55000" => {}
            Err(error) => judge(&error, &sql),
        }
        if client.is_closed() {
            client = stage.session();
        }
        // Now and then the worker has the time to destroy something.
        let longest = if random.one_in(4) { 2500 } else { 700 };
        random.pause(50, longest);
    }
}

fn kill(stage: &Stage) {
    let _alarm = Alarm(stage);
    let mut random = stage.random(200);
    let mut turn = 0;
    while !stage.is_calm() {
        if stage.long {
            random.pause(2000, 12000);
        } else {
            random.pause(1000, 3500);
        }
        let done = match if turn < 4 { turn } else { random.below(8) } {
            3 | 5..=7 => lie_in_wait(stage, &mut random),
            0 => strike(stage, &mut random, "backend_type = 'pg_rekey worker'"),
            1 => {
                stage.cluster.kill();
                stage.cluster.boot();
                add(&stage.postmasters);
                true
            }
            _ => strike(stage, &mut random, "backend_type = 'client backend'"),
        };
        turn += 1;
        if done {
            add(&stage.crashes);
            drop(stage.session());
        }
    }
}

/// Has whoever next reaches one of the boundaries kill itself; whether somebody has.
fn lie_in_wait(stage: &Stage, random: &mut Random) -> bool {
    let mut client = stage.session();
    let all = [&OF_A_ROTATION[..], &BOUNDARIES[..]].concat();
    let boundary = usize::try_from(random.below(all.len() as u64)).expect("an index");
    stage.cluster.arm(all[boundary], "kill");
    let deadline = Instant::now() + Duration::from_secs(10);
    while stage.cluster.is_armed() && !stage.is_calm() && Instant::now() < deadline {
        sleep(Duration::from_millis(5));
    }
    if stage.cluster.disarm() {
        return false;
    }
    add(&stage.ambushes);
    crashed(&mut client)
}

/// kill -9 of one of these processes; whether the server has crashed of it.
fn strike(stage: &Stage, random: &mut Random, whom: &str) -> bool {
    let mut client = stage.session();
    let sql = format!(
        "SELECT pid FROM pg_stat_activity \
          WHERE datname = current_database() AND pid <> pg_backend_pid() AND {whom}"
    );
    let deadline = Instant::now() + Duration::from_secs(5);
    let pids = loop {
        let pids = client.column(&sql);
        if !pids.is_empty() {
            break pids;
        }
        if stage.is_calm() || Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(5));
    };
    // A worker may just have ended: unlike the harness's, this signal may find nobody.
    let pid = &pids[usize::try_from(random.below(pids.len() as u64)).expect("an index")];
    let hit = Command::new("sh")
        .args(["-c", "kill -s KILL \"$0\" 2>/dev/null", pid])
        .status();
    hit.expect("a shell").success() && crashed(&mut client)
}

/// Waits until the server has crashed; false if it does not.
fn crashed(client: &mut Client) -> bool {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Err(error) = client.simple_query("SELECT 1") {
            judge(&error, "SELECT 1");
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(5));
    }
}

/// Asks the oracle each time a slot has ended.
fn observe(stage: &Stage) {
    let _alarm = Alarm(stage);
    let mut client = stage.session();
    let mut seen = 0;
    while !stage.is_over() {
        let mut look = || {
            let rows = ask(
                &mut client,
                "SELECT count(*) FROM rekey.slots WHERE state IN ('disabled', 'destroyed')",
            )?;
            let ended: u64 = rows[0][0].parse().expect("a number");
            assert!(ended >= seen, "a tombstone is gone");
            if ended > seen {
                let answers = ask(&mut client, ORACLE)?;
                assert_eq!(answers[0], NOTHING_LOST, "{ORACLE}");
                add(&stage.checks);
            }
            seen = ended;
            Ok::<(), Error>(())
        };
        if let Err(error) = look() {
            judge(&error, ORACLE);
        }
        if client.is_closed() {
            client = stage.session();
        }
        sleep(Duration::from_millis(30));
    }
}

/// What may tell why the slots do not drain.
fn situation(client: &mut Client) -> String {
    let mut text = String::new();
    for sql in [
        "SELECT version, state, slot_id, superseded_at, drained_at FROM rekey.slots \
          WHERE state <> 'destroyed' ORDER BY version",
        "SELECT phase, percent, rows_quarantined, waits_for, updated_at FROM rekey.progress",
        "SELECT row_ref, slot_id, sqlstate, tries FROM rekey.errors LIMIT 5",
        "SELECT gid, prepared FROM pg_prepared_xacts",
        "SELECT pid, backend_type, state, wait_event, xact_start, backend_xmin \
           FROM pg_stat_activity WHERE datname = current_database()",
    ] {
        let rows = ask(client, sql).expect("a look at the server");
        text += &format!("\n{sql}:");
        for row in rows {
            text += &format!("\n    {}", row.join(" | "));
        }
    }
    text
}

#[test]
fn nothing_is_lost_whatever_crashes() {
    let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
    let minutes: Option<u64> = variable("REKEY_TORTURE_MINUTES")
        .map(|text| text.parse().expect("REKEY_TORTURE_MINUTES: a number"));
    let seed = match variable("REKEY_TORTURE_SEED") {
        Some(text) => text.parse().expect("REKEY_TORTURE_SEED: a number"),
        None => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_secs()),
    };
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set("rekey.batch_target = 20ms")
            .set("max_prepared_transactions = 20")
            .set("fsync = on")
            .set("full_page_writes = on")
            .set("deadlock_timeout = 200ms")
            .set("autovacuum_naptime = 1s"),
    );
    let database = cluster.database(DATABASE);
    database.connect().run(&format!(
        "SELECT rekey.create_key('pii', grace => '0');
         SELECT rekey.set_policy('pii', after_drain => 'destroy');
         SELECT rekey.create_key('bound', grace => '0');
         SELECT rekey.set_policy('bound', after_drain => 'disable', require_context => true);
         CREATE TABLE t (id int PRIMARY KEY, c bytea, shadow text, n int DEFAULT 0);
         CREATE TABLE mirror (id int PRIMARY KEY, shadow text, n int);
         CREATE TABLE log (client int, serial int, PRIMARY KEY (client, serial));
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii'), 'v' || i
           FROM generate_series(1, {ROWS}) AS i;
         INSERT INTO mirror SELECT id, shadow, n FROM t;
         CREATE TABLE bound (id int PRIMARY KEY, c bytea, shadow text, n int DEFAULT 0);
         INSERT INTO bound SELECT i, encrypt_col('b' || i, 'bound',
             rekey.context('bound.c', i::text)), 'b' || i FROM generate_series(1, {BOUND}) AS i;
         SELECT rekey.register_column('t', 'c');
         SELECT rekey.register_column('bound', 'c', 'rekey.context(''bound.c'', id::text)')"
    ));
    let stage = Stage {
        cluster,
        seed,
        begun: Instant::now(),
        long: minutes.is_some(),
        floors: Floors::of(minutes),
        calm: AtomicBool::new(false),
        over: AtomicBool::new(false),
        rotations: AtomicU64::new(0),
        rollbacks: AtomicU64::new(0),
        crashes: AtomicU64::new(0),
        postmasters: AtomicU64::new(0),
        ambushes: AtomicU64::new(0),
        transactions: AtomicU64::new(0),
        checks: AtomicU64::new(0),
    };
    let _alarm = Alarm(&stage);
    let span = Duration::from_secs(minutes.map_or(15, |minutes| 60 * minutes));
    let writers = storm(&stage, span);
    reckon(&stage, writers);
}

/// Everything at once, for `span` and until the minima are reached.
fn storm(stage: &Stage, span: Duration) -> Vec<Writer<'_>> {
    let reached = || stage.has_seen_enough() && get(&stage.ambushes) >= 1;
    thread::scope(|scope| {
        let _alarm = Alarm(stage);
        let writers: Vec<_> = (1..=CLIENTS)
            .map(|number| scope.spawn(move || Writer::new(stage, number).run()))
            .collect();
        let troubles = [scope.spawn(|| rotate(stage)), scope.spawn(|| kill(stage))];
        scope.spawn(|| observe(stage));
        while !stage.is_calm() && (stage.begun.elapsed() < span || !reached()) {
            assert!(
                stage.begun.elapsed() < span + 2 * PATIENCE,
                "{} rotations, {} crashes ({} of the postmaster), {} checks on the way: too few",
                get(&stage.rotations),
                get(&stage.crashes),
                get(&stage.postmasters),
                get(&stage.checks)
            );
            sleep(Duration::from_millis(20));
        }
        stage.calm.store(true, Ordering::SeqCst);
        for trouble in troubles {
            trouble.join().expect("the rotator and the killer");
        }
        stage.over.store(true, Ordering::SeqCst);
        writers
            .into_iter()
            .map(|writer| writer.join().expect("a client"))
            .collect()
    })
}

/// A last crash and rotation over the prepared transactions, their ends, and the reckoning.
fn reckon(stage: &Stage, mut writers: Vec<Writer<'_>>) {
    stage.cluster.kill();
    stage.cluster.boot();
    add(&stage.crashes);
    add(&stage.postmasters);
    let mut client = stage.session();
    client.run("SELECT rotate_key('pii'), rotate_key('bound')");
    add(&stage.rotations);
    let left = client.column("SELECT gid FROM pg_prepared_xacts ORDER BY gid");
    for writer in &writers {
        for Pending { serial, sure } in &writer.pending {
            let gid = writer.gid(*serial);
            assert!(
                !sure || left.contains(&gid),
                "{gid} is not prepared any more"
            );
        }
    }
    for (i, gid) in left.iter().enumerate() {
        let commit = i % 2 == 0;
        let verb = if commit { "COMMIT" } else { "ROLLBACK" };
        client.run(&format!("{verb} PREPARED '{gid}'"));
        let (number, serial) = gid.split_once('-').expect("a gid of ours");
        let serial: u64 = serial.parse().expect("a serial");
        let writer = writers
            .iter_mut()
            .find(|writer| writer.number.to_string() == number)
            .expect("its client");
        if commit {
            writer.confirmed.push(serial);
        } else {
            writer.undone.push(serial);
        }
    }

    let deadline = Instant::now() + DRAIN;
    let waiting = "SELECT count(*) FROM rekey.slots WHERE state IN ('pending', 'previous')";
    while client.number(waiting) > 0 {
        assert!(
            Instant::now() < deadline,
            "the slots do not drain: {}",
            situation(&mut client)
        );
        sleep(Duration::from_millis(20));
    }
    let destroyed = "SELECT count(*) FROM rekey.slots WHERE state = 'destroyed'";
    let disabled = "SELECT count(*) FROM rekey.slots WHERE state = 'disabled'";
    while client.number(destroyed) == 0 || client.number(disabled) == 0 {
        assert!(
            Instant::now() < deadline,
            "no slot is destroyed, or none disabled: {}",
            situation(&mut client)
        );
        sleep(Duration::from_millis(20));
    }
    let ends = "SELECT string_agg(DISTINCT key_name || ' ' || state, ', ' ORDER BY key_name || ' ' \
                || state) FROM rekey.slots WHERE state IN ('disabled', 'destroyed')";
    assert_eq!(client.text(ends), "bound disabled, pii destroyed");
    let answers = ask(&mut client, ORACLE).expect("the oracle's answers");
    assert_eq!(answers[0], NOTHING_LOST, "{ORACLE}");

    let log = ask(&mut client, "SELECT client, serial FROM log").expect("the log");
    let log: HashSet<(u64, u64)> = log
        .iter()
        .map(|row| {
            let number = |i: usize| row[i].parse().expect("a number");
            (number(0), number(1))
        })
        .collect();
    for writer in &writers {
        for serial in &writer.confirmed {
            let confirmed = (writer.number, *serial);
            assert!(log.contains(&confirmed), "{confirmed:?} is lost");
        }
        for serial in &writer.undone {
            let undone = (writer.number, *serial);
            assert!(!log.contains(&undone), "{undone:?} was rolled back");
        }
    }

    let text = stage.cluster.log();
    for line in text.lines() {
        let other = line
            .split_once("terminated by signal ")
            .is_some_and(|(_, rest)| !rest.starts_with("9:"));
        assert!(
            !other && !line.contains("PANIC:") && !line.contains("TRAP:"),
            "{line}"
        );
    }
    assert!(stage.has_seen_enough());
    eprintln!(
        "torture: {} rotations, {} rolled back, {} crashes ({} of the postmaster, {} at a \
         boundary), {} transactions, \
         {} left prepared, {} slots destroyed, {} disabled, {} checks on the way, {} s, seed {}",
        get(&stage.rotations),
        get(&stage.rollbacks),
        get(&stage.crashes),
        get(&stage.postmasters),
        get(&stage.ambushes),
        get(&stage.transactions),
        left.len(),
        client.number(destroyed),
        client.number(disabled),
        get(&stage.checks),
        stage.begun.elapsed().as_secs(),
        stage.seed
    );
}
