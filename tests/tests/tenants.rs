//! A key for each tenant: keys created in bulk, rotated at a pace, shredded one by one.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

/// Tenants of the larger tests. `make bench-tenants` measures 100,000.
const MANY: i64 = 2000;

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded().set("rekey.worker = off")))
}

/// A database with a template key, on which the role `app` may seal and open.
fn database(name: &str) -> (Database<'static>, Client, String) {
    let database = cluster().database(name);
    let mut admin = database.connect();
    let app = database.role("app");
    admin.run(&format!(
        "SELECT rekey.create_key('template', grace => '7 days', max_age => '90 days', \
             comment => 'of the template');
         SELECT rekey.set_policy('template', after_drain => 'disable', custodian => 'ops');
         SELECT rekey.grant_key('template', '{app}', '{{encrypt,decrypt}}')"
    ));
    (database, admin, app)
}

/// Creates `count` keys tenant-1 and so on.
fn create(admin: &mut Client, count: i64) {
    let made = admin.number(&format!(
        "/* {count} keys */ SELECT rekey.create_keys( \
             array(SELECT 'tenant-' || i FROM generate_series(1, {count}) i), \
             'template')"
    ));
    assert_eq!(made, count);
}

#[test]
fn keys_come_with_the_policy_and_the_grants_of_the_template_and_an_audit_row_each() {
    let (database, mut admin, app) = database("bulk");
    create(&mut admin, MANY);
    let like_template = "SELECT count(*) FROM rekey.keys k, rekey.keys t \
         WHERE k.key_name LIKE 'tenant-%' AND t.key_name = 'template' \
           AND (k.grace, k.max_age, k.after_drain, k.require_context, k.custodian, k.purpose, \
                k.owner) \
             = (t.grace, t.max_age, t.after_drain, t.require_context, t.custodian, t.purpose, \
                t.owner) \
           AND k.active_slot IS NOT NULL AND k.comment = ''";
    assert_eq!(admin.number(like_template), MANY);
    assert_eq!(
        admin.number(
            "SELECT count(*) FROM rekey.audit WHERE action = 'create_keys' AND slot_id IS NOT NULL \
                AND to_state = 'active' AND key_name LIKE 'tenant-%'"
        ),
        MANY
    );
    let log = cluster().log();
    assert!(log.contains("action=create_keys key=\"tenant-1999\""));
    assert!(!log.contains("/* 2000 keys */"), "once for each key");
    let mut app = database.connect_as(&app);
    let opened = "SELECT count(*) FROM (SELECT i, encrypt_col('v' || i, 'tenant-' || i) AS c \
           FROM generate_series(1, 1000) i OFFSET 0) AS s WHERE decrypt_col(c) = 'v' || i";
    assert_eq!(app.number(opened), 1000, "under 1000 keys in one query");
    app.refuse("SELECT rotate_key('tenant-1')", "42501");
}

#[test]
fn all_keys_are_created_or_none_and_what_is_wrong_is_named() {
    let (_, mut admin, _) = database("none");
    admin.run(
        "SELECT rekey.create_key('taken'); SELECT rekey.create_key('gone');
         SELECT rekey.shred_key('gone', 'over')",
    );
    let keys = "SELECT count(*) FROM rekey.keys";
    let before = admin.number(keys);
    let attempt = |names: &str| format!("SELECT rekey.create_keys('{names}', 'template')");
    admin
        .refuse(&attempt("{a,taken,b}"), "42710")
        .names("\"taken\"")
        .hints("if_not_exists");
    admin
        .refuse(&attempt("{a,twice,b,twice}"), "22023")
        .names("\"twice\"");
    admin
        .refuse(&attempt("{a,gone}"), "55000")
        .names("\"gone\"");
    admin.refuse(&attempt("{a, \"b \"}"), "22023");
    admin.refuse(&attempt("{a,NULL}"), "22004");
    admin.refuse("SELECT rekey.create_keys('{a}', 'nobody')", "42704");
    admin.refuse("SELECT rekey.create_keys('{a}', 'gone')", "55000");
    admin.refuse("SELECT rekey.create_keys(NULL, 'template')", "22004");
    assert_eq!(admin.number(keys), before, "nothing was created");
    // A shredded name stays closed, if_not_exists or not.
    admin.refuse(
        "SELECT rekey.create_keys('{gone}', 'template', if_not_exists => true)",
        "55000",
    );
    let again = "SELECT rekey.create_keys('{a,taken,b}', 'template', if_not_exists => true)";
    assert_eq!(admin.number(again), 2);
    assert_eq!(admin.number(again), 0, "a migration may run twice");
    assert_eq!(
        admin.number("SELECT rekey.create_keys('{}', 'template')"),
        0
    );
}

#[test]
fn a_creator_needs_the_right_to_create_keys_and_to_manage_the_template() {
    let (database, mut admin, app) = database("who");
    let mut session = database.connect_as(&app);
    let create = "SELECT rekey.create_keys('{x}', 'template')";
    session.fail(create, "42501");
    admin.run(&format!(
        "GRANT EXECUTE ON FUNCTION rekey.create_keys(text[], text, boolean) TO {app}"
    ));
    session.refuse(create, "42501").names("template");
    admin.run(&format!(
        "SELECT rekey.grant_key('template', '{app}', '{{manage}}')"
    ));
    assert_eq!(session.number(create), 1);
    assert_eq!(
        admin.text("SELECT owner::text FROM rekey.keys WHERE key_name = 'x'"),
        app
    );
    // The owners of the template do not own what is made like it.
    assert_eq!(
        admin.column(
            "SELECT grantee FROM rekey.grants WHERE key_name = 'x' AND privilege = 'owner'"
        ),
        [app]
    );
}

#[test]
fn a_name_that_is_used_again_inherits_no_grants_and_its_versions_go_on() {
    let (database, mut admin, app) = database("again");
    let other = database.role("other");
    create(&mut admin, 1);
    admin.run(&format!(
        "SELECT rekey.shred_key('tenant-1', 'over'); SELECT rekey.drop_key('tenant-1');
         INSERT INTO rekey.key_grant VALUES ('tenant-1', '{other}', 'decrypt')"
    ));
    create(&mut admin, 1);
    assert_eq!(
        admin.column(
            "SELECT DISTINCT grantee FROM rekey.grants WHERE key_name = 'tenant-1' ORDER BY 1"
        ),
        [app, "postgres".to_owned()]
    );
    assert_eq!(
        admin.number(
            "SELECT version FROM rekey.slots WHERE key_name = 'tenant-1' AND state = 'active'"
        ),
        2
    );
}

#[test]
fn two_sessions_that_create_the_same_keys_do_not_deadlock_and_one_is_told() {
    let (database, mut admin, _) = database("race");
    admin.run("BEGIN; SELECT rekey.create_keys('{b,a}', 'template')");
    let (mut second, pid) = {
        let mut session = database.connect();
        let pid = session.number("SELECT pg_backend_pid()");
        (session, pid)
    };
    let waiting = std::thread::spawn(move || {
        second.attempt("SELECT rekey.create_keys('{a,c,b}', 'template')")
    });
    let mut watch = database.connect();
    wait_until("the second session waits", || {
        watch.truth(&format!(
            "SELECT cardinality(pg_blocking_pids({pid}::int)) > 0"
        ))
    });
    admin.run("COMMIT");
    let refusal = waiting.join().expect("the session").expect_err("a refusal");
    assert_eq!(refusal.code, "42710");
    assert_eq!(
        admin.number("SELECT count(*) FROM rekey.keys WHERE key_name IN ('a', 'b', 'c')"),
        2
    );
}

#[test]
fn keys_older_than_a_date_are_rotated_at_a_pace_until_none_remains() {
    let (_, mut admin, _) = database("pace");
    create(&mut admin, MANY);
    admin.run("SELECT rekey.prepare_key('tenant-8')");
    admin.run("CREATE TABLE since AS SELECT clock_timestamp() AS at");
    admin.run("SELECT rotate_key('tenant-7')");
    let step = "SELECT rotated || ' ' || remaining FROM rekey.rotate_keys( \
                    (SELECT at FROM since), max_keys => 900, pattern => 'tenant-%', \
                    reason => 'yearly')";
    assert_eq!(admin.text(step), "900 1099");
    assert_eq!(admin.text(step), "900 199");
    assert_eq!(admin.text(step), "199 0");
    assert_eq!(admin.text(step), "0 0");
    let rotated = "SELECT count(*) FROM rekey.audit WHERE action LIKE 'rotate_key%' \
                      AND to_state = 'active' AND detail = 'yearly'";
    assert_eq!(
        admin.number(rotated),
        MANY - 1,
        "all but the one that was young"
    );
    assert_eq!(
        admin.number("SELECT count(*) FROM rekey.slots WHERE key_name = 'template'"),
        1,
        "not like the pattern"
    );
    assert_eq!(
        admin.column("SELECT state FROM rekey.slots WHERE key_name = 'tenant-8' ORDER BY version"),
        ["previous", "active"],
        "the pending slot was promoted"
    );
    let superseded = "SELECT count(*) FROM rekey.audit WHERE action = 'rotate_keys' \
                         AND from_state = 'active' AND to_state = 'previous'";
    assert_eq!(admin.number(superseded), MANY - 2);
    admin.refuse("SELECT rekey.rotate_keys(now(), 0)", "22023");
    admin.refuse("SELECT rekey.rotate_keys(NULL)", "22004");
}

#[test]
fn a_role_rotates_the_keys_that_it_may_rotate_and_no_others() {
    let (database, mut admin, app) = database("mine");
    create(&mut admin, 3);
    admin.run(&format!(
        "SELECT rekey.grant_key('tenant-2', '{app}', '{{rotate}}')"
    ));
    let mut app = database.connect_as(&app);
    let step = "SELECT rotated || ' ' || remaining FROM rekey.rotate_keys(clock_timestamp())";
    assert_eq!(app.text(step), "1 0");
    assert_eq!(
        admin.column("SELECT key_name FROM rekey.slots WHERE state = 'previous' ORDER BY key_name"),
        ["tenant-2"]
    );
}

#[test]
fn a_privilege_that_is_taken_back_while_the_keys_are_waited_for_counts_no_more() {
    let (database, mut admin, app) = database("revoked");
    create(&mut admin, 2);
    admin.run(&format!(
        "SELECT rekey.grant_key(k, '{app}', '{{rotate}}') FROM unnest('{{tenant-1,tenant-2}}'::text[]) k"
    ));
    admin.run(&format!(
        "BEGIN; SELECT rekey.revoke_key('tenant-1', '{app}', '{{rotate}}')"
    ));
    let mut app = database.connect_as(&app);
    let pid = app.number("SELECT pg_backend_pid()");
    let waiting = std::thread::spawn(move || {
        app.text("SELECT rotated FROM rekey.rotate_keys(clock_timestamp())")
    });
    let mut watch = database.connect();
    wait_until("the role waits", || {
        watch.truth(&format!(
            "SELECT cardinality(pg_blocking_pids({pid}::int)) > 0"
        ))
    });
    admin.run("COMMIT");
    assert_eq!(waiting.join().expect("the session"), "1");
    assert_eq!(
        admin.column("SELECT key_name FROM rekey.slots WHERE state = 'previous'"),
        ["tenant-2"]
    );
}

#[test]
fn lookup_keys_are_rotated_by_name_only() {
    let (_, mut admin, _) = database("lookups");
    admin.run("SELECT rekey.create_key('unique_1', purpose => 'lookup')");
    let step = |pattern: &str| {
        format!(
            "SELECT rotated || ' ' || remaining FROM rekey.rotate_keys(clock_timestamp(){pattern})"
        )
    };
    assert_eq!(admin.text(&step("")), "1 0", "the template");
    assert_eq!(admin.text(&step(", pattern => 'unique%'")), "1 0");
}

#[test]
fn a_key_that_somebody_else_rotates_meanwhile_is_not_rotated_twice() {
    let (database, mut admin, _) = database("twice");
    create(&mut admin, 1);
    admin.run("BEGIN; SELECT rotate_key('tenant-1')");
    let mut second = database.connect();
    let pid = second.number("SELECT pg_backend_pid()");
    let waiting = std::thread::spawn(move || {
        second.text(
            "SELECT rotated || ' ' || remaining \
               FROM rekey.rotate_keys(clock_timestamp(), pattern => 'tenant-%')",
        )
    });
    let mut watch = database.connect();
    wait_until("the second session waits", || {
        watch.truth(&format!(
            "SELECT cardinality(pg_blocking_pids({pid}::int)) > 0"
        ))
    });
    admin.run("COMMIT");
    assert_eq!(waiting.join().expect("the session"), "0 0");
    assert_eq!(
        admin.number("SELECT count(*) FROM rekey.slots WHERE key_name = 'tenant-1'"),
        2
    );
}

#[test]
fn one_tenant_is_shredded_and_the_others_stay() {
    let (_, mut admin, _) = database("shred");
    create(&mut admin, 3);
    admin.run(
        "CREATE TABLE t AS SELECT i, encrypt_col('v' || i, 'tenant-' || i) AS c \
           FROM generate_series(1, 3) i",
    );
    admin.run("SELECT rekey.shred_key('tenant-2', 'contract ended')");
    assert_eq!(
        admin.column("SELECT rekey.can_open(c)::text FROM t ORDER BY i"),
        ["true", "false", "true"]
    );
}
