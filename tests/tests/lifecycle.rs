//! The life of keys and slots: every transition, every refusal, and what is recorded of each.
//!
//! Draining needs the worker, so slots reach `disabled` and `destroyed` by force here. What warm
//! sessions see of it is in `cache.rs`; who may do it in `permissions.rs`.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded()))
}

fn session(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let client = database.connect();
    (database, client)
}

/// The states of a key's slots by version, `1 previous, 2 active`.
fn states(client: &mut Client, key: &str) -> String {
    client
        .column(&format!(
            "SELECT version || ' ' || state FROM rekey.slots WHERE key_name = '{key}' \
             ORDER BY version"
        ))
        .join(", ")
}

/// Lines of the server's log that tell of this slot, with the fixed prefix.
fn log_lines(slot: i64) -> Vec<String> {
    let needle = format!("slot={slot} ");
    cluster()
        .log()
        .lines()
        .filter(|line| line.contains("LOG:  pg_rekey audit: ") && line.contains(&needle))
        .map(str::to_owned)
        .collect()
}

#[test]
fn create_key_returns_its_active_slot() {
    let (_database, mut client) = session("created");
    let slot = client.number(
        "SELECT rekey.create_key('pii', grace => '7 days', max_age => '90 days', comment => 'c')",
    );
    let shown = client.rows(
        "SELECT active_slot, previous_slots, grace, max_age, next_rotation - active_since, \
         after_drain, require_context, custodian, comment, owner FROM rekey.keys",
    );
    let expected = [
        &slot.to_string(),
        "{}",
        "7 days",
        "90 days",
        "90 days",
        "keep",
        "f",
        "",
        "c",
        "postgres",
    ];
    let shown: Vec<&str> = shown[0].iter().flatten().map(String::as_str).collect();
    assert_eq!(shown, expected);
    client.run("SELECT rekey.create_key('plain')");
    assert!(client.truth(
        "SELECT grace = '30 days' AND max_age = '0' AND next_rotation IS NULL \
         FROM rekey.keys WHERE key_name = 'plain'"
    ));
}

#[test]
fn create_key_on_an_existing_name() {
    let database = cluster().database("existing");
    let (mut client, notices) = database.cluster.connect_noticing("existing");
    let slot = client.number("SELECT rekey.create_key('pii')");
    client
        .refuse("SELECT rekey.create_key('pii')", "42710")
        .hints("if_not_exists");
    assert_eq!(
        client.number("SELECT rekey.create_key('pii', if_not_exists => true)"),
        slot
    );
    let new = client.number("SELECT rotate_key('pii')");
    assert_eq!(
        client.number("SELECT rekey.create_key('pii', if_not_exists => true)"),
        new
    );
    let said = notices.lock().expect("the notices").join("\n");
    assert!(said.contains("NOTICE") && said.contains("pii"), "{said}");
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.slots"),
        2,
        "and nothing is made"
    );
}

#[test]
fn key_names_follow_the_rules() {
    let (_database, mut client) = session("names");
    for name in [
        "''",
        "' x'",
        "'x '",
        "E'a\\nb'",
        "E'a\\tb'",
        "E'\\x7f'",
        "repeat('x', 201)",
        "repeat('é', 101)",
        "E'a\\u0085b'",
        "' '",
    ] {
        client.refuse(&format!("SELECT rekey.create_key({name})"), "22023");
    }
    for name in [
        "'x'",
        "'X'",
        "repeat('x', 200)",
        "'ключ 🗝 ' || 1",
        "'a b'",
        "'\"q\"'''",
        "'pg_x'",
    ] {
        client.run(&format!("SELECT rekey.create_key({name})"));
        let opened = client.text(&format!("SELECT decrypt_col(encrypt_col('v', {name}))"));
        assert_eq!(opened, "v", "{name}");
    }
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.keys"),
        7,
        "case-sensitive"
    );
}

#[test]
fn required_arguments_must_not_be_null() {
    let (_database, mut client) = session("null_admin");
    client.run("SELECT rekey.create_key('pii')");
    for call in [
        "rekey.create_key(NULL)",
        "rekey.create_key('x', grace => NULL)",
        "rekey.create_key('x', max_age => NULL)",
        "rekey.set_policy(NULL)",
        "rotate_key(NULL)",
        "rotate_key('pii', NULL)",
        "rekey.rollback_rotation(NULL)",
        "rekey.disable_slot(NULL)",
        "rekey.enable_slot(NULL)",
        "rekey.destroy_slot(NULL)",
        "rekey.shred_key('pii', NULL)",
        "rekey.shred_key(NULL, 'x')",
        "rekey.drop_key(NULL)",
        "rekey.has_key_privilege('pii', NULL)",
    ] {
        client.refuse(&format!("SELECT {call}"), "22004");
    }
    assert_eq!(states(&mut client, "pii"), "1 active");
}

#[test]
fn unknown_keys_and_slots_are_named() {
    let (_database, mut client) = session("unknown");
    for call in [
        "rotate_key('nope')",
        "rekey.set_policy('nope', grace => '1 day')",
        "rekey.rollback_rotation('nope')",
        "rekey.shred_key('nope', 'x')",
        "rekey.drop_key('nope')",
        "rekey.has_key_privilege('nope', 'decrypt')",
    ] {
        client
            .refuse(&format!("SELECT {call}"), "42704")
            .names("nope");
    }
    for call in ["disable_slot(42)", "enable_slot(42)", "destroy_slot(42)"] {
        client
            .refuse(&format!("SELECT rekey.{call}"), "42704")
            .names("42");
    }
    client.refuse("SELECT rekey.disable_slot(-1)", "42704");
    client.refuse("SELECT rekey.destroy_slot(0, force => true)", "42704");
}

#[test]
fn rotations_count_versions_and_keep_every_slot_readable() {
    let (_database, mut client) = session("rotated");
    client.run("SELECT rekey.create_key('pii'); CREATE TABLE t (i int, c bytea)");
    for i in 1..=4 {
        client.run(&format!(
            "INSERT INTO t VALUES ({i}, encrypt_col('v{i}', 'pii'))"
        ));
        let before = client.number("SELECT active_slot FROM rekey.keys");
        let new = client.number("SELECT rotate_key('pii', reason => 'quarterly')");
        assert_ne!(before, new);
        assert_eq!(client.number("SELECT active_slot FROM rekey.keys"), new);
        assert_eq!(
            client.number("SELECT previous_slots[1] FROM rekey.keys"),
            before
        );
    }
    assert_eq!(
        states(&mut client, "pii"),
        "1 previous, 2 previous, 3 previous, 4 previous, 5 active"
    );
    let opened = client.column("SELECT decrypt_col(c) FROM t ORDER BY i");
    assert_eq!(opened, ["v1", "v2", "v3", "v4"]);
    let reasons = client.text(
        "SELECT string_agg(DISTINCT reason, ',') FROM rekey.slots \
        WHERE version > 1",
    );
    assert_eq!(reasons, "quarterly");
    client.run("SET rekey.default_key = 'pii'");
    client.run("SELECT rotate_key()");
    assert_eq!(client.number("SELECT max(version) FROM rekey.slots"), 6);
}

#[test]
fn rollback_rotation_reactivates_the_latest_superseded_slot() {
    let (_database, mut client) = session("rolled_back");
    let first = client.number("SELECT rekey.create_key('pii')");
    client.refuse("SELECT rekey.rollback_rotation('pii')", "55000");
    let second = client.number("SELECT rotate_key('pii')");
    let third = client.number("SELECT rotate_key('pii')");
    let sealed = client.text("SELECT encrypt_col('third', 'pii')");
    assert_eq!(
        client.number("SELECT rekey.rollback_rotation('pii')"),
        second
    );
    assert_eq!(
        states(&mut client, "pii"),
        "1 previous, 2 active, 3 previous"
    );
    assert_eq!(
        client.text(&format!("SELECT decrypt_col('{sealed}')")),
        "third"
    );
    assert_eq!(
        client.number("SELECT rekey.slot_id(encrypt_col('x', 'pii'))"),
        second
    );
    assert_eq!(
        client.number("SELECT rekey.rollback_rotation('pii')"),
        third,
        "the latest now"
    );
    client.run(&format!(
        "SELECT rekey.disable_slot({second}, force => true)"
    ));
    assert_eq!(
        client.number("SELECT rekey.rollback_rotation('pii')"),
        first,
        "a disabled slot is no candidate"
    );
    client.run(&format!(
        "SELECT rekey.destroy_slot({third}, force => true)"
    ));
    client.refuse("SELECT rekey.rollback_rotation('pii')", "55000");
    assert_eq!(
        states(&mut client, "pii"),
        "1 active, 2 disabled, 3 destroyed"
    );
}

#[test]
fn disable_enable_and_destroy_follow_the_states() {
    let (_database, mut client) = session("closed");
    let old = client.number("SELECT rekey.create_key('pii')");
    client.run("CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c");
    for force in ["false", "true"] {
        let act = |name: &str| format!("SELECT rekey.{name}({old}, force => {force})");
        client.refuse(&act("disable_slot"), "55000");
        client
            .refuse(&act("destroy_slot"), "55000")
            .hints("rotate_key")
            .hints("shred_key");
    }
    client.refuse(&format!("SELECT rekey.enable_slot({old})"), "55000");
    client.run("SELECT rotate_key('pii')");
    client.refuse(&format!("SELECT rekey.enable_slot({old})"), "55000");
    client
        .refuse(&format!("SELECT rekey.disable_slot({old})"), "55000")
        .names("drained");
    client
        .refuse(&format!("SELECT rekey.destroy_slot({old})"), "55000")
        .names("drained");
    client.run(&format!("SELECT rekey.disable_slot({old}, force => true)"));
    client.refuse(
        &format!("SELECT rekey.disable_slot({old}, force => true)"),
        "55000",
    );
    client
        .refuse("SELECT decrypt_col(c) FROM t", "55000")
        .hints("enable_slot");
    assert!(client.truth(
        "SELECT disabled_at IS NOT NULL AND destroyed_at IS NULL FROM rekey.slots \
         WHERE version = 1"
    ));
    client.run(&format!("SELECT rekey.enable_slot({old})"));
    assert_eq!(states(&mut client, "pii"), "1 previous, 2 active");
    assert_eq!(client.text("SELECT decrypt_col(c) FROM t"), "one");
    client.run(&format!("SELECT rekey.disable_slot({old}, force => true)"));
    client.refuse(&format!("SELECT rekey.destroy_slot({old})"), "55000");
    client.run(&format!("SELECT rekey.destroy_slot({old}, force => true)"));
    client
        .refuse("SELECT decrypt_col(c) FROM t", "55000")
        .names(&old.to_string());
    for call in [
        "destroy_slot({}, force => true)",
        "disable_slot({}, force => true)",
        "enable_slot({})",
    ] {
        client.refuse(
            &format!("SELECT rekey.{}", call.replace("{}", &old.to_string())),
            "55000",
        );
    }
    assert!(client.truth(&format!(
        "SELECT NOT EXISTS (SELECT FROM rekey.slot_wrap WHERE slot_id = {old}) \
         AND destroyed_at IS NOT NULL FROM rekey.slots WHERE slot_id = {old}"
    )));
}

#[test]
fn destroying_in_a_rolled_back_transaction_destroys_nothing() {
    let (_database, mut client) = session("undestroyed");
    let old = client.number("SELECT rekey.create_key('pii')");
    client.run("CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c; SELECT rotate_key('pii')");
    client.run(&format!(
        "BEGIN; SELECT rekey.destroy_slot({old}, force => true); SAVEPOINT s"
    ));
    client.refuse("SELECT decrypt_col(c) FROM t", "55000");
    client.run("ROLLBACK");
    assert_eq!(client.text("SELECT decrypt_col(c) FROM t"), "one");
    client.run(&format!(
        "BEGIN; SAVEPOINT s; SELECT rekey.disable_slot({old}, force => true); ROLLBACK TO s"
    ));
    assert_eq!(client.text("SELECT decrypt_col(c) FROM t"), "one");
    client.run("COMMIT");
}

#[test]
fn shredding_closes_a_key_until_it_is_dropped() {
    let database = cluster().database("shredded");
    let (mut client, notices) = database.cluster.connect_noticing("shredded");
    client.run(
        "SELECT rekey.create_key('tenant'); CREATE TABLE t AS SELECT encrypt_col('x', 'tenant') c;
         SELECT rotate_key('tenant'); INSERT INTO t VALUES (encrypt_col('y', 'tenant'))",
    );
    client.refuse("SELECT rekey.drop_key('tenant')", "55000");
    assert_eq!(
        client.number("SELECT rekey.shred_key('tenant', 'contract ended')"),
        2
    );
    let said = notices.lock().expect("the notices").join("\n");
    for word in ["NOTICE", "WAL", "standby", "backup"] {
        assert!(
            said.contains(word),
            "the NOTICE does not speak of {word}: {said}"
        );
    }
    assert_eq!(states(&mut client, "tenant"), "1 destroyed, 2 destroyed");
    assert_eq!(client.number("SELECT count(*) FROM rekey.slot_wrap"), 0);
    client.refuse("SELECT decrypt_col(c) FROM t", "55000");
    client.refuse("SELECT encrypt_col('z', 'tenant')", "55000");
    client.refuse("SELECT rotate_key('tenant')", "55000");
    client.refuse("SELECT rekey.rollback_rotation('tenant')", "55000");
    client.refuse("SELECT rekey.create_key('tenant')", "55000");
    client.refuse(
        "SELECT rekey.create_key('tenant', if_not_exists => true)",
        "55000",
    );
    client.refuse("SELECT rekey.shred_key('tenant', 'again')", "55000");
    client.run("SELECT rekey.drop_key('tenant')");
    client.refuse("SELECT encrypt_col('z', 'tenant')", "42704");
    client.refuse("SELECT rekey.drop_key('tenant')", "42704");
    client.refuse("SELECT decrypt_col(c) FROM t", "55000");
    assert_eq!(client.number("SELECT count(*) FROM rekey.key_grant"), 0);
    client.run("SELECT rekey.create_key('tenant')");
    assert_eq!(
        states(&mut client, "tenant"),
        "1 destroyed, 2 destroyed, 3 active"
    );
    assert_eq!(
        client.text("SELECT decrypt_col(encrypt_col('new', 'tenant'))"),
        "new"
    );
    client.refuse("SELECT decrypt_col(c) FROM t", "55000");
}

#[test]
fn policy_changes_what_it_is_told_to_change() {
    let (_database, mut client) = session("policy");
    client.run("SELECT rekey.create_key('pii', grace => '3 days'); SELECT rotate_key('pii')");
    let policy = |client: &mut Client| {
        client.text(
            "SELECT concat_ws('|', grace, max_age, after_drain, require_context, custodian) \
             FROM rekey.keys",
        )
    };
    assert_eq!(policy(&mut client), "3 days|00:00:00|keep|f|");
    client.run("SELECT rekey.set_policy('pii', custodian => 'security team')");
    assert_eq!(policy(&mut client), "3 days|00:00:00|keep|f|security team");
    client.run("SELECT rekey.set_policy('pii', '0 s', '90 days', 'destroy', true)");
    assert_eq!(
        policy(&mut client),
        "00:00:00|90 days|destroy|t|security team"
    );
    assert!(
        client
            .truth("SELECT grace_until = superseded_at FROM rekey.slots WHERE state = 'previous'")
    );
    client.run("SELECT rekey.set_policy('pii', grace => '5 days')");
    assert!(client.truth(
        "SELECT grace_until = superseded_at + '5 days'::interval FROM rekey.slots \
         WHERE state = 'previous'"
    ));
    for wrong in [
        "grace => '-1 day'",
        "max_age => '-1 s'",
        "after_drain => 'burn'",
    ] {
        client.refuse(&format!("SELECT rekey.set_policy('pii', {wrong})"), "22023");
    }
    client.refuse("SELECT rekey.create_key('x', grace => '-1 day')", "22023");
    client.refuse("SELECT rekey.create_key('x', max_age => '-1 day')", "22023");
    // What would lead out of all timestamps, also where it does so on the way only.
    for wrong in [
        "grace => '1001 years'",
        "max_age => '300000 years'",
        "max_age => '-1000000 years 360000001 days'",
    ] {
        client
            .refuse(&format!("SELECT rekey.set_policy('pii', {wrong})"), "22023")
            .hints("'0' is never");
        client.refuse(&format!("SELECT rekey.create_key('x', {wrong})"), "22023");
    }
    assert_eq!(
        policy(&mut client),
        "5 days|90 days|destroy|t|security team"
    );
}

#[test]
fn each_transition_leaves_one_audit_row_and_one_log_line() {
    let (_database, mut client) = session("audited");
    let first = client.number("SELECT rekey.create_key('pii')");
    let second = client.number("SELECT rotate_key('pii', 'why not')");
    client.run("SELECT rekey.rollback_rotation('pii')");
    client.run(&format!(
        "SELECT rekey.disable_slot({second}, force => true)"
    ));
    client.run(&format!("SELECT rekey.enable_slot({second})"));
    client.run(&format!(
        "SELECT rekey.destroy_slot({second}, force => true)"
    ));
    client.run("SELECT rekey.shred_key('pii', 'the end')");
    let rows = client.column(
        "SELECT concat_ws(' ', action, CASE slot_id WHEN (SELECT slot_id FROM rekey.slots \
         WHERE version = 1) THEN 1 ELSE 2 END, coalesce(from_state, '-'), to_state) \
         FROM rekey.audit WHERE to_state IS NOT NULL AND slot_id IS NOT NULL ORDER BY audit_id",
    );
    let mut expected = vec![
        "create_key 1 - active",
        "rotate_key 1 active previous",
        "rotate_key 2 - active",
        "rollback_rotation 2 active previous",
        "rollback_rotation 1 previous active",
        "disable_slot 2 previous disabled",
        "enable_slot 2 disabled previous",
        "destroy_slot 2 previous destroyed",
        "shred_key 1 active destroyed",
    ];
    let (mut sorted, count) = (rows.clone(), rows.len());
    sorted.sort();
    expected.sort_unstable();
    assert_eq!(sorted, expected, "{rows:?}");
    assert_eq!(
        log_lines(first).len() + log_lines(second).len(),
        count,
        "one line per transition"
    );
    assert!(client.truth("SELECT bool_and(actor = 'postgres' AND at <= now()) FROM rekey.audit"));
    let detail = client.text("SELECT string_agg(detail, '|' ORDER BY audit_id) FROM rekey.audit");
    assert!(
        detail.contains("why not") && detail.contains("the end"),
        "{detail}"
    );
    client.run("SELECT rekey.drop_key('pii')");
    assert_eq!(
        client.number("SELECT count(*) FROM rekey.audit WHERE action = 'drop_key'"),
        1
    );
}

#[test]
fn policy_grants_and_force_are_audited() {
    let (database, mut client) = session("audited_too");
    let old = client.number("SELECT rekey.create_key('pii')");
    let role = database.role("r");
    client.run(&format!(
        "SELECT rekey.set_policy('pii', grace => '1 day');
         SELECT rekey.grant_key('pii', '{role}', '{{decrypt}}');
         SELECT rekey.revoke_key('pii', '{role}', '{{decrypt}}');
         SELECT rotate_key('pii'); SELECT rekey.disable_slot({old}, force => true)"
    ));
    for action in ["set_policy", "grant_key", "revoke_key"] {
        let count = client.number(&format!(
            "SELECT count(*) FROM rekey.audit WHERE action = '{action}' AND key_name = 'pii'"
        ));
        assert_eq!(count, 1, "{action}");
    }
    let granted = client.text("SELECT detail FROM rekey.audit WHERE action = 'grant_key'");
    assert!(
        granted.contains(&role) && granted.contains("decrypt"),
        "{granted}"
    );
    let forced = client.text("SELECT detail FROM rekey.audit WHERE action = 'disable_slot'");
    assert!(forced.contains("force"), "forced acts say so: {forced:?}");
}

#[test]
fn the_audit_row_belongs_to_the_transaction_that_acted() {
    let (database, mut client) = session("audit_xid");
    client.run("SELECT rekey.create_key('pii')");
    client.run("BEGIN; SELECT rotate_key('pii')");
    let same = client.truth(
        "SELECT bool_and(xid = pg_current_xact_id()) FROM rekey.audit WHERE action = 'rotate_key'",
    );
    assert!(same);
    let unseen = "SELECT count(*) FROM rekey.audit WHERE action = 'rotate_key'";
    assert_eq!(database.connect().number(unseen), 0);
    client.run("ROLLBACK");
    assert_eq!(client.number(unseen), 0);
    client.run("BEGIN; SAVEPOINT s; SELECT rotate_key('pii'); ROLLBACK TO s; COMMIT");
    assert_eq!(client.number(unseen), 0);
}

#[test]
fn the_actor_is_the_role_whose_privilege_was_used() {
    let (database, mut client) = session("actors");
    client.run("SELECT rekey.create_key('pii')");
    let (role, login) = (database.role("rotator"), database.role("login"));
    client.run(&format!(
        "SELECT rekey.grant_key('pii', '{role}', '{{rotate}}'); GRANT {role} TO {login}"
    ));
    let mut session = database.connect_as(&login);
    session.run(&format!("SET ROLE {role}; SELECT rotate_key('pii')"));
    let actor = client.text(
        "SELECT DISTINCT actor || ' ' || session_role FROM rekey.audit WHERE action = 'rotate_key'",
    );
    assert_eq!(actor, format!("{role} {login}"));
}

#[test]
fn every_object_of_the_extension_has_a_comment() {
    let (_database, mut client) = session("comments");
    let bare = client.column(
        "SELECT pg_describe_object(classid, objid, 0) FROM pg_depend \
         WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e' \
         AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_rekey') \
         AND classid IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_namespace'::regclass, \
             'pg_event_trigger'::regclass) \
         AND obj_description(objid, classid::regclass::name) IS NULL",
    );
    assert!(bare.is_empty(), "{bare:?}");
    let columns = client.column(
        "SELECT attrelid::regclass || '.' || attname FROM pg_attribute JOIN pg_class c \
         ON c.oid = attrelid WHERE relnamespace = 'rekey'::regnamespace AND relkind IN ('r', 'v') \
         AND attnum > 0 AND NOT attisdropped AND col_description(attrelid, attnum) IS NULL",
    );
    assert!(columns.is_empty(), "{columns:?}");
    // Of tables of the extension: no members of it, but they go with it all the same.
    let triggers = client.column(
        "SELECT tgname || ' on ' || tgrelid::regclass FROM pg_trigger t JOIN pg_class c \
         ON c.oid = tgrelid WHERE relnamespace = 'rekey'::regnamespace AND NOT tgisinternal \
         AND obj_description(t.oid, 'pg_trigger') IS NULL",
    );
    assert!(triggers.is_empty(), "{triggers:?}");
    // An index of a constraint is that constraint.
    let indexes = client.column(
        "SELECT c.oid::regclass FROM pg_class c WHERE relnamespace = 'rekey'::regnamespace \
         AND relkind = 'i' AND obj_description(c.oid, 'pg_class') IS NULL \
         AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = c.oid)",
    );
    assert!(indexes.is_empty(), "{indexes:?}");
    let looked_at = client.number(
        "SELECT least((SELECT count(*) FROM pg_trigger WHERE tgname = 'yield_to_local'), \
                      (SELECT count(*) FROM pg_class WHERE relname = 'key_slot_active'), \
                      (SELECT count(*) FROM pg_class WHERE relkind = 'v' \
                          AND relnamespace = 'rekey'::regnamespace))",
    );
    assert!(looked_at > 0);
    let keyless = client.column(
        "SELECT oid::regclass FROM pg_class c WHERE relnamespace = 'rekey'::regnamespace \
         AND relkind = 'r' AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid \
         AND indisprimary)",
    );
    assert!(
        keyless.is_empty(),
        "tables without a primary key: {keyless:?}"
    );
}
