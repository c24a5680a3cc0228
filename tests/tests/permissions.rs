//! Who may do what: each privilege alone, and every road by which a role acts as another.
//!
//! Attackers without key privileges (database owners, search_path and operator tricks, direct
//! changes of the catalog) are in `attackers.rs`.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded()))
}

/// A database with a key that has two slots, and a row under each in `t`, open to all roles.
fn database(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let mut admin = database.connect();
    admin.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t (c bytea);
         INSERT INTO t VALUES (encrypt_col('one', 'pii'));
         SELECT rotate_key('pii');
         INSERT INTO t VALUES (encrypt_col('two', 'pii'));
         GRANT ALL ON t TO PUBLIC",
    );
    (database, admin)
}

const OPEN: &str = "SELECT string_agg(decrypt_col(c), ' ' ORDER BY c) IS NOT NULL FROM t";
const SEAL: &str = "SELECT encrypt_col('x', 'pii')";

#[test]
fn each_privilege_allows_exactly_what_it_says() {
    let (database, mut admin) = database("matrix");
    let old = admin.number("SELECT (previous_slots)[1] FROM rekey.keys");
    let other = database.role("other");
    // Statement, who may run it, and the SQLSTATE that those get who may (empty: success).
    let actions: [(String, &[&str], &str); 17] = [
        (SEAL.to_owned(), &["encrypt", "owner"], ""),
        (
            "SELECT encrypt_col(1, 'pii', 'any context')".into(),
            &["encrypt", "owner"],
            "",
        ),
        (OPEN.to_owned(), &["decrypt", "owner"], ""),
        (
            "SELECT decrypt_col_as(c, NULL::text) FROM t".into(),
            &["decrypt", "owner"],
            "",
        ),
        ("SELECT rotate_key('pii')".into(), &["rotate", "owner"], ""),
        (
            "SELECT rekey.rollback_rotation('pii')".into(),
            &["rotate", "owner"],
            "",
        ),
        (
            "SELECT rekey.set_policy('pii', custodian => 'me')".into(),
            &["manage", "owner"],
            "",
        ),
        (
            format!(
                "SELECT rekey.grant_key('pii', '{other}', '{{encrypt,decrypt,rotate,manage}}')"
            ),
            &["manage", "owner"],
            "",
        ),
        (
            format!("SELECT rekey.revoke_key('pii', '{other}', '{{decrypt}}')"),
            &["manage", "owner"],
            "",
        ),
        (
            format!("SELECT rekey.grant_key('pii', '{other}', '{{owner}}')"),
            &["owner"],
            "",
        ),
        (
            format!("SELECT rekey.disable_slot({old})"),
            &["manage", "owner"],
            "55000",
        ),
        (
            format!("SELECT rekey.enable_slot({old})"),
            &["manage", "owner"],
            "55000",
        ),
        (
            format!("SELECT rekey.destroy_slot({old})"),
            &["manage", "owner"],
            "55000",
        ),
        (
            "SELECT rekey.drop_key('pii')".into(),
            &["manage", "owner"],
            "55000",
        ),
        (
            "SELECT rekey.shred_key('pii', 'gone')".into(),
            &["owner"],
            "",
        ),
        (
            format!("SELECT rekey.disable_slot({old}, force => true)"),
            &[],
            "",
        ),
        (
            format!("SELECT rekey.destroy_slot({old}, force => true)"),
            &[],
            "",
        ),
    ];
    for privilege in ["none", "encrypt", "decrypt", "rotate", "manage", "owner"] {
        let role = database.role(privilege);
        if privilege != "none" {
            admin.run(&format!(
                "SELECT rekey.grant_key('pii', '{role}', '{{{privilege}}}')"
            ));
        }
        let mut client = database.connect_as(&role);
        for (sql, allowed, code) in &actions {
            client.run("BEGIN");
            match (allowed.contains(&privilege), code.is_empty()) {
                (true, true) => client.run(sql),
                (true, false) => drop(client.refuse(sql, code)),
                (false, _) if sql.contains("force") => drop(client.refuse(sql, "42501")),
                (false, _) => drop(client.refuse(sql, "42501").names("pii")),
            }
            client.run("ROLLBACK");
        }
        let held = admin.column(&format!(
            "SELECT p FROM unnest('{{owner,manage,rotate,encrypt,decrypt}}'::text[]) p \
             WHERE rekey.has_key_privilege('{role}', 'pii', p)"
        ));
        let expected: Vec<&str> = match privilege {
            "none" => vec![],
            "owner" => vec!["owner", "manage", "rotate", "encrypt", "decrypt"],
            one => vec![one],
        };
        assert_eq!(held, expected, "has_key_privilege of {privilege}");
        for sql in [
            "SELECT rekey.create_key('mine')",
            "SELECT rekey.init_root_key()",
            "SELECT rekey.reload_root_keys()",
        ] {
            client.fail(sql, "42501");
        }
    }
}

#[test]
fn a_manager_can_grant_himself_what_he_grants_others() {
    let (database, mut admin) = database("manager");
    let manager = database.role("manager");
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{manager}', '{{manage}}')"
    ));
    let mut client = database.connect_as(&manager);
    client.refuse(OPEN, "42501");
    client.run(&format!(
        "SELECT rekey.grant_key('pii', '{manager}', '{{decrypt}}')"
    ));
    client.run(OPEN);
    client.refuse(
        &format!("SELECT rekey.grant_key('pii', '{manager}', '{{decrypt,owner}}')"),
        "42501",
    );
}

#[test]
fn execute_on_create_key_makes_an_owner() {
    let (database, mut admin) = database("creator");
    let creator = database.role("creator");
    admin.run(&format!(
        "DO $$ BEGIN EXECUTE (SELECT format('GRANT EXECUTE ON FUNCTION %s TO {creator}', \
         'rekey.create_key'::regproc::oid::regprocedure)); END $$"
    ));
    let mut client = database.connect_as(&creator);
    client.run("SELECT rekey.create_key('mine')");
    assert_eq!(
        client.text("SELECT decrypt_col(encrypt_col('x', 'mine'))"),
        "x"
    );
    assert_eq!(client.text("SELECT owner FROM rekey.keys"), creator);
    client.run("SELECT rotate_key('mine'); SELECT rekey.shred_key('mine', 'done')");
    client.refuse(SEAL, "42501");
}

#[test]
fn inside_security_definer_the_owner_of_the_function_counts() {
    let (database, mut admin) = database("definer");
    let (service, caller) = (database.role("service"), database.role("caller"));
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{service}', '{{decrypt}}');
         DO $$ BEGIN EXECUTE (SELECT format('GRANT EXECUTE ON FUNCTION %s TO {service}', \
         'rekey.create_key'::regproc::oid::regprocedure)); END $$;
         GRANT CREATE ON SCHEMA public TO {service}"
    ));
    database.connect_as(&service).run(
        "CREATE FUNCTION opened(bytea) RETURNS text LANGUAGE sql SECURITY DEFINER
             AS 'SELECT decrypt_col($1)';
         CREATE FUNCTION opened_as_caller(bytea) RETURNS text LANGUAGE sql
             AS 'SELECT decrypt_col($1)';
         CREATE FUNCTION make(text) RETURNS bigint LANGUAGE sql SECURITY DEFINER
             AS 'SELECT rekey.create_key($1)'",
    );
    let mut client = database.connect_as(&caller);
    assert_eq!(client.number("SELECT count(opened(c)) FROM t"), 2);
    client.refuse("SELECT opened_as_caller(c) FROM t", "42501");
    client.refuse("SELECT opened(c), decrypt_col(c) FROM t", "42501");
    client.run("SELECT make('made')");
    let owner = admin.text("SELECT owner FROM rekey.keys WHERE key_name = 'made'");
    assert_eq!(owner, service);
    client.refuse("SELECT encrypt_col('x', 'made')", "42501");
}

#[test]
fn a_view_checks_the_key_privilege_of_its_caller() {
    let (database, mut admin) = database("viewed");
    let reader = database.role("reader");
    admin.run(&format!(
        "CREATE VIEW opened AS SELECT decrypt_col(c) AS v FROM t;
         CREATE VIEW guarded WITH (security_barrier) AS SELECT decrypt_col(c) AS v FROM t;
         GRANT SELECT ON opened, guarded TO {reader}"
    ));
    let mut client = database.connect_as(&reader);
    client.refuse("SELECT * FROM opened", "42501");
    client.refuse("SELECT * FROM guarded", "42501");
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{reader}', '{{decrypt}}')"
    ));
    assert_eq!(client.number("SELECT count(v) FROM opened"), 2);
    assert_eq!(client.number("SELECT count(v) FROM guarded"), 2);
}

#[test]
fn set_role_and_session_authorization_change_whose_privileges_count() {
    let (database, mut admin) = database("set_role");
    let (reader, nobody) = (database.role("reader"), database.role("nobody"));
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{reader}', '{{decrypt}}')"
    ));
    admin.run(OPEN);
    admin.run(SEAL);
    admin.run(&format!("SET ROLE {nobody}"));
    admin.refuse(OPEN, "42501");
    admin.refuse(SEAL, "42501");
    assert!(!admin.truth("SELECT rekey.has_key_privilege('pii', 'decrypt')"));
    admin.run(&format!("SET ROLE {reader}"));
    admin.run(OPEN);
    admin.refuse(SEAL, "42501");
    admin.run(&format!("RESET ROLE; SET SESSION AUTHORIZATION {nobody}"));
    admin.refuse(OPEN, "42501");
    admin.run("RESET SESSION AUTHORIZATION");
    admin.run(OPEN);
    admin.run(&format!("BEGIN; SET LOCAL ROLE {nobody}"));
    admin.refuse(OPEN, "42501");
    admin.run("ROLLBACK");
    admin.run(OPEN);
    let mut pooled = database.connect_as(&reader);
    let prepared = pooled.prepare(OPEN).expect("a statement");
    pooled.query_one(&prepared, &[]).expect("the reader's row");
    let mut pooled = database.connect();
    let prepared = pooled.prepare(OPEN).expect("a statement");
    pooled.query_one(&prepared, &[]).expect("a superuser's row");
    pooled.run(&format!("SET ROLE {nobody}"));
    let error = pooled
        .query_one(&prepared, &[])
        .expect_err("a prepared plan keeps no privilege");
    assert_eq!(
        error.code().map(postgres::error::SqlState::code),
        Some("42501")
    );
}

#[test]
fn membership_counts_as_postgresql_counts_it() {
    let (database, mut admin) = database("membership");
    let (group, subgroup) = (database.role("grp"), database.role("subgroup"));
    let (direct, nested, outside) = (
        database.role("direct"),
        database.role("nested"),
        database.role("outside"),
    );
    let apart = database.role("apart");
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{group}', '{{decrypt}}');
         GRANT {group} TO {direct}, {subgroup}; GRANT {subgroup} TO {nested};
         ALTER ROLE {apart} NOINHERIT; GRANT {group} TO {apart}"
    ));
    for role in [&group, &direct, &nested] {
        database.connect_as(role).run(OPEN);
    }
    database.connect_as(&outside).refuse(OPEN, "42501");
    let mut client = database.connect_as(&apart);
    client.refuse(OPEN, "42501");
    client.run(&format!("SET ROLE {group}"));
    client.run(OPEN);
}

#[test]
fn public_is_everyone() {
    let (database, mut admin) = database("everyone");
    let mut client = database.connect_as(&database.role("anyone"));
    client.refuse(SEAL, "42501");
    admin.run("SELECT rekey.grant_key('pii', 'public', '{encrypt}')");
    client.run(SEAL);
    client.refuse(OPEN, "42501");
    let shown = admin.text("SELECT grantee FROM rekey.grants WHERE privilege = 'encrypt'");
    assert_eq!(shown, "public");
    assert_eq!(
        client.text("SELECT key_name FROM rekey.keys"),
        "pii",
        "and so he sees the key"
    );
    admin.run("SELECT rekey.revoke_key('pii', 'public', '{encrypt}')");
    client.refuse(SEAL, "42501");
}

#[test]
fn grants_of_nonsense_are_refused() {
    let (database, mut admin) = database("nonsense");
    let role = database.role("r");
    for (arguments, code) in [
        (format!("'nope', '{role}', '{{decrypt}}'"), "42704"),
        ("'pii', 'no_such_role', '{decrypt}'".to_owned(), "42704"),
        (format!("'pii', '{role}', '{{read}}'"), "22023"),
        (format!("NULL, '{role}', '{{decrypt}}'"), "22004"),
        ("'pii', NULL, '{decrypt}'".to_owned(), "22004"),
        (format!("'pii', '{role}', NULL"), "22004"),
        (format!("'pii', '{role}', '{{decrypt,NULL}}'"), "22004"),
    ] {
        admin.refuse(&format!("SELECT rekey.grant_key({arguments})"), code);
        admin.refuse(&format!("SELECT rekey.revoke_key({arguments})"), code);
    }
    admin.refuse("SELECT rekey.has_key_privilege('pii', 'read')", "22023");
    assert_eq!(
        admin.number(&format!(
            "SELECT count(*) FROM rekey.grants WHERE grantee = '{role}'"
        )),
        0
    );
    for _ in 0..2 {
        admin.run(&format!(
            "SELECT rekey.grant_key('pii', '{role}', '{{decrypt}}')"
        ));
    }
    for _ in 0..2 {
        admin.run(&format!(
            "SELECT rekey.revoke_key('pii', '{role}', '{{decrypt}}')"
        ));
    }
}

#[test]
fn views_show_the_keys_on_which_one_holds_a_privilege() {
    let (database, mut admin) = database("filtered");
    let (reader, monitor) = (database.role("reader"), database.role("monitor"));
    admin.run(&format!(
        "SELECT rekey.create_key('secret'); SELECT rotate_key('secret');
         SELECT rekey.grant_key('pii', '{reader}', '{{decrypt}}');
         GRANT pg_monitor TO {monitor}; GRANT CREATE ON SCHEMA public TO {reader}"
    ));
    let mut client = database.connect_as(&reader);
    for view in ["keys", "slots", "grants", "audit"] {
        let names =
            format!("SELECT DISTINCT key_name FROM rekey.{view} WHERE key_name IS NOT NULL");
        assert_eq!(client.column(&names), ["pii"], "{view}");
        let mut all = database.connect_as(&monitor).column(&names);
        all.sort();
        assert_eq!(all, ["pii", "secret"], "pg_monitor, {view}");
        assert_eq!(admin.column(&names).len(), 2, "a superuser, {view}");
    }
    assert!(client.rows("SELECT * FROM rekey.root_keys").is_empty());
    assert_eq!(
        database
            .connect_as(&monitor)
            .rows("SELECT * FROM rekey.root_keys")
            .len(),
        1
    );
    database.connect_as(&monitor).refuse(OPEN, "42501");
    // A cheap function in the WHERE clause must not be run before the filter.
    client.run(
        "CREATE TABLE seen (name text);
         CREATE FUNCTION peek(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS
             $$ BEGIN INSERT INTO seen VALUES ($1); RETURN true; END $$",
    );
    for view in ["keys", "slots", "grants", "audit"] {
        client.run(&format!("SELECT * FROM rekey.{view} WHERE peek(key_name)"));
    }
    assert_eq!(client.column("SELECT DISTINCT name FROM seen"), ["pii"]);
}

#[test]
fn describe_tells_key_and_state_only_to_the_privileged() {
    let (database, _admin) = database("described");
    let mut client = database.connect_as(&database.role("nobody"));
    let described = client.rows(
        "SELECT count(*), count(d.key_name), count(d.state), count(d.slot_id) \
         FROM t, rekey.describe(c) d",
    );
    let text = |s: &str| Some(s.to_owned());
    assert_eq!(described, [[text("2"), text("0"), text("0"), text("2")]]);
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE rekey.can_open(c, '')"),
        0
    );
}

#[test]
fn a_new_role_of_an_old_name_has_none_of_its_privileges() {
    let (database, mut admin) = database("reborn");
    let role = database.role("reader");
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{role}', '{{decrypt}}')"
    ));
    database.connect_as(&role).run(OPEN);
    admin.run(&format!(
        "REVOKE ALL ON t FROM {role}; DROP ROLE {role}; CREATE ROLE {role} LOGIN"
    ));
    let mut client = database.connect_as(&role);
    client.refuse(OPEN, "42501");
    assert!(!client.truth("SELECT rekey.has_key_privilege('pii', 'decrypt')"));
    let shown = admin.text("SELECT grantee FROM rekey.grants WHERE privilege = 'decrypt'");
    assert!(
        shown.bytes().all(|b| b.is_ascii_digit()),
        "a dropped role is a number: {shown}"
    );
}

#[test]
fn a_read_only_transaction_administers_nothing() {
    let (_database, mut admin) = database("read_only");
    for call in [
        "rotate_key('pii')",
        "rekey.create_key('x')",
        "rekey.set_policy('pii', custodian => 'x')",
        "rekey.grant_key('pii', 'public', '{decrypt}')",
        "rekey.rollback_rotation('pii')",
        "rekey.shred_key('pii', 'x')",
    ] {
        admin.run("BEGIN READ ONLY");
        admin.fail(&format!("SELECT {call}"), "25006");
        admin.run("ROLLBACK");
    }
    admin.run(OPEN);
}

#[test]
fn roles_are_named_exactly() {
    let (database, mut admin) = database("odd_roles");
    let (odd, upper) = ("odd \"role\", 'x'", "ODD_ROLES_UPPER");
    admin.run(&format!(
        "CREATE ROLE \"odd \"\"role\"\", 'x'\" LOGIN; CREATE ROLE \"{upper}\" LOGIN;
         SELECT rekey.grant_key('pii', $${odd}$$, '{{decrypt}}')"
    ));
    admin.refuse(
        "SELECT rekey.grant_key('pii', 'odd_roles_upper', '{decrypt}')",
        "42704",
    );
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{upper}', '{{decrypt}}')"
    ));
    for role in [odd, upper] {
        database.connect_as(role).run(OPEN);
        let shown = format!("SELECT count(*) FROM rekey.grants WHERE grantee = $${role}$$");
        assert_eq!(admin.number(&shown), 1);
        admin.run(&format!(
            "SELECT rekey.revoke_key('pii', $${role}$$, '{{decrypt}}')"
        ));
        database.connect_as(role).refuse(OPEN, "42501");
    }
}

#[test]
fn administration_works_when_the_owner_of_the_extension_is_no_superuser_any_more() {
    let database = cluster().empty_database("demoted", "");
    let (boss, owner) = (database.role("boss"), database.role("owner"));
    let mut admin = database.connect();
    admin.run(&format!(
        "ALTER ROLE {boss} SUPERUSER; GRANT CREATE ON SCHEMA public TO {boss}"
    ));
    database
        .connect_as(&boss)
        .run("CREATE EXTENSION pg_rekey; SELECT rekey.init_root_key()");
    admin.run(&format!(
        "SELECT rekey.create_key('pii'); SELECT rekey.grant_key('pii', '{owner}', '{{owner}}');
         ALTER ROLE {boss} NOSUPERUSER"
    ));
    let mut client = database.connect_as(&owner);
    client.run(
        "CREATE TEMP TABLE t AS SELECT encrypt_col('one', 'pii') AS c;
         SELECT rotate_key('pii'); SELECT rekey.set_policy('pii', custodian => 'me');
         SELECT decrypt_col(c) FROM t; SELECT rekey.shred_key('pii', 'x')",
    );
    assert!(client.number("SELECT count(*) FROM rekey.audit") > 5);
    admin.run("SELECT rekey.create_key('other')");
}
