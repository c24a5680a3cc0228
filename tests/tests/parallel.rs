//! Opening inside parallel plans: the first use of a session happens in a worker or a leader.
//!
//! In parallel mode a backend may neither assign a transaction id nor take a new snapshot of some
//! kinds; a cache that fills itself must do without. Tried with and without preload.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options};

fn preloaded() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded()))
}

fn unloaded() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::unloaded()))
}

const ROWS: i64 = 5000;

fn database<'a>(cluster: &'a Cluster, name: &str) -> Database<'a> {
    let database = cluster.database(name);
    database.connect().run(&format!(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t (id int, v text, c bytea);
         INSERT INTO t SELECT i, 'value ' || i, encrypt_col('value ' || i, 'pii', i::text)
           FROM generate_series(1, {ROWS}) i;
         SELECT rotate_key('pii');
         ANALYZE t"
    ));
    database
}

/// A fresh session that plans in parallel wherever it may.
fn parallel_session(database: &Database, leader: bool) -> Client {
    let mut client = database.connect();
    client.run(&format!(
        "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0;
         SET min_parallel_table_scan_size = 0; SET max_parallel_workers_per_gather = 2;
         SET parallel_leader_participation = {leader}"
    ));
    client
}

const OPEN_ALL: &str = "SELECT count(*) FROM t WHERE decrypt_col(c, id::text) = v";

fn opens_in_parallel(database: &Database) {
    for leader in [false, true] {
        let mut client = parallel_session(database, leader);
        let plan = client.column(&format!("EXPLAIN {OPEN_ALL}")).join("\n");
        assert!(
            plan.contains("Gather") && plan.contains("Partial Aggregate"),
            "{plan}"
        );
        assert_eq!(
            client.number(OPEN_ALL),
            ROWS,
            "leader participates: {leader}"
        );
        let analysed = client
            .column(&format!("EXPLAIN ANALYZE {OPEN_ALL}"))
            .join("\n");
        assert!(analysed.contains("Workers Launched: 2"), "{analysed}");
        assert_eq!(client.number(OPEN_ALL), ROWS, "and again, warm");
    }
}

#[test]
fn the_first_open_of_a_session_may_happen_in_workers_and_leader() {
    opens_in_parallel(&database(preloaded(), "preloaded"));
}

#[test]
fn the_first_open_may_happen_in_workers_that_must_load_the_library() {
    opens_in_parallel(&database(unloaded(), "unloaded"));
}

#[test]
fn the_first_open_may_happen_in_a_leader_that_got_no_workers() {
    for cluster in [preloaded(), unloaded()] {
        let database = database(cluster, "alone");
        let mut client = parallel_session(&database, true);
        client.run("SET max_parallel_workers = 0");
        assert_eq!(client.number(OPEN_ALL), ROWS);
        let plan = client
            .column(&format!("EXPLAIN ANALYZE {OPEN_ALL}"))
            .join("\n");
        assert!(plan.contains("Workers Launched: 0"), "{plan}");
    }
}

#[test]
fn sealing_stays_in_the_leader_of_a_parallel_plan() {
    let database = database(preloaded(), "sealing");
    let mut client = parallel_session(&database, true);
    let seal = "SELECT count(DISTINCT encrypt_col(v, 'pii')) FROM t";
    assert_eq!(client.number(seal), ROWS, "the first seal of the session");
    let gathered = "SELECT encrypt_col(v, 'pii') FROM t WHERE id % 2 = 0";
    let plan = client.column(&format!("EXPLAIN {gathered}")).join("\n");
    assert!(plan.contains("Gather"), "{plan}");
    let mut fresh = parallel_session(&database, true);
    let envelopes = fresh.column(gathered);
    assert_eq!(envelopes.len(), usize::try_from(ROWS / 2).expect("a count"));
    let distinct: std::collections::HashSet<&str> =
        envelopes.iter().map(|envelope| &envelope[22..70]).collect();
    assert_eq!(distinct.len(), envelopes.len(), "no nonce twice");
}

#[test]
fn an_error_in_a_parallel_worker_keeps_its_sqlstate_and_hint() {
    let database = database(preloaded(), "worker_error");
    let mut client = parallel_session(&database, false);
    client.run("INSERT INTO t VALUES (0, 'x', '\\x00')");
    client.refuse(OPEN_ALL, "22P03");
    client.run("DELETE FROM t WHERE id = 0");
    let reader = database.role("reader");
    client.run(&format!("GRANT SELECT ON t TO {reader}; SET ROLE {reader}"));
    client.refuse(OPEN_ALL, "42501");
    client.run(&format!(
        "RESET ROLE; SELECT rekey.grant_key('pii', '{reader}', '{{decrypt}}'); SET ROLE {reader}"
    ));
    assert_eq!(client.number(OPEN_ALL), ROWS, "SET ROLE holds in workers");
}

#[test]
fn everything_that_is_parallel_safe_runs_in_workers() {
    let database = database(preloaded(), "views");
    let reader = database.role("reader");
    let mut client = database.connect();
    client.run(&format!(
        "SELECT rekey.grant_key('pii', '{reader}', '{{decrypt}}')"
    ));
    client.run(&format!(
        "GRANT SELECT ON t TO {reader}; GRANT pg_monitor TO {reader}"
    ));
    let mut client = database.connect_as(&reader);
    let force = if client.number("SELECT current_setting('server_version_num')::int") < 160_000 {
        "force_parallel_mode"
    } else {
        "debug_parallel_query"
    };
    for sql in [
        "SELECT count(*) > 0 FROM rekey.keys",
        "SELECT count(*) > 0 FROM rekey.slots",
        "SELECT count(*) > 0 FROM rekey.grants",
        "SELECT count(*) > 0 FROM rekey.audit",
        "SELECT bool_and(held_here) FROM rekey.root_keys",
        "SELECT rekey.ready()",
        "SELECT rekey.has_key_privilege('pii', 'decrypt')",
        "SELECT rekey.can_open(c, '1') FROM t WHERE id = 1",
        "SELECT rekey.is_envelope(c) FROM t WHERE id = 1",
        "SELECT (rekey.describe(c)).key_name = 'pii' FROM t WHERE id = 1",
        "SELECT decrypt_col_as(c, NULL::text, '1') = v FROM t WHERE id = 1",
    ] {
        let mut fresh = database.connect_as(&reader);
        fresh.run(&format!("SET {force} = on"));
        assert!(fresh.truth(sql), "{sql}");
    }
}
