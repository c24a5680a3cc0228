//! Rows that do not open or do not update, and tables whose owner means harm: they are set aside,
//! named by SQLSTATE and place, never by value, and hold up nobody else.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, wait_until};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded().set("rekey.worker = off")))
}

fn database(name: &str) -> Database<'static> {
    let database = cluster().database(name);
    database.connect().run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE t (id int PRIMARY KEY, c bytea);
         INSERT INTO t SELECT i, encrypt_col('v' || i, 'pii') FROM generate_series(1, 50) AS i;
         SELECT rekey.register_column('t', 'c')",
    );
    database
}

fn stale(client: &mut Client, table: &str) -> i64 {
    client.number(&format!(
        "SELECT count(*) FROM {table} WHERE rekey.slot_id(c) IS DISTINCT FROM \
            (SELECT active_slot FROM rekey.keys WHERE key_name = 'pii')"
    ))
}

fn states(client: &mut Client) -> Vec<String> {
    client.column("SELECT state FROM rekey.slots WHERE key_name = 'pii' ORDER BY version")
}

fn errors(client: &mut Client) -> Vec<String> {
    client.column("SELECT table_name || ' ' || sqlstate FROM rekey.errors ORDER BY 1")
}

#[test]
fn an_altered_value_is_set_aside_blocks_the_proof_and_is_dismissed_as_an_exception() {
    let database = database("altered");
    let mut client = database.connect();
    client.run("UPDATE t SET c = set_byte(c, 40, get_byte(c, 40) # 1) WHERE id = 7");
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(stale(&mut client, "t"), 1, "the other rows are done");
    assert_eq!(errors(&mut client), ["t 39000"]);
    assert_eq!(states(&mut client), ["previous", "active"]);
    let id = client.number("SELECT quarantine_id FROM rekey.errors");
    assert_eq!(
        client.text("SELECT row_ref::text FROM rekey.errors"),
        client.text("SELECT ctid::text FROM t WHERE id = 7")
    );
    client.refuse(
        &format!("SELECT rekey.dismiss_quarantine({id}, ' ')"),
        "22023",
    );
    client.run(&format!(
        "SELECT rekey.dismiss_quarantine({id}, 'test data')"
    ));
    client.run("CALL rekey.reencrypt()");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(
        client.text(
            "SELECT proof->'exceptions'->0->>'reason' FROM rekey.slots WHERE state = 'drained'"
        ),
        "test data"
    );
    client.refuse(
        &format!("SELECT rekey.dismiss_quarantine({id}, 'again')"),
        "42704",
    );
}

#[test]
fn a_row_under_quarantine_holds_up_the_proof_of_its_own_slot_only() {
    let database = database("own");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('other', grace => '0');
         CREATE TABLE u (id int PRIMARY KEY, c bytea);
         INSERT INTO u SELECT i, encrypt_col('v' || i, 'other') FROM generate_series(1, 5) AS i;
         SELECT rekey.register_column('u', 'c');
         UPDATE t SET c = set_byte(c, 40, get_byte(c, 40) # 1) WHERE id = 7;
         SELECT rotate_key('pii'); SELECT rotate_key('other')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(errors(&mut client), ["t 39000"]);
    assert_eq!(states(&mut client), ["previous", "active"]);
    let other = "SELECT state FROM rekey.slots WHERE key_name = 'other' ORDER BY version";
    assert_eq!(client.column(other), ["drained", "active"]);
    // Nothing is looked at again for the slot that is left.
    let scanned = client.column("SELECT rows_scanned::text FROM rekey.progress ORDER BY 1");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(
        client.column("SELECT rows_scanned::text FROM rekey.progress ORDER BY 1"),
        scanned
    );
    // An entry that names no slot of this database may have been any: it holds up all.
    client.run(
        "UPDATE u SET c = set_byte(c, 5, get_byte(c, 5) # 1) WHERE id = 1;
         SELECT rotate_key('other')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(client.column(other), ["drained", "previous", "active"]);
    // It still is that row when another column of it has changed, and when somebody has it locked.
    client.run("UPDATE u SET id = 101 WHERE id = 1; SELECT rekey.retry_quarantine()");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(client.column(other), ["drained", "previous", "active"]);
    assert_eq!(errors(&mut client), ["t 39000", "u 42704"]);
    let mut holder = database.connect();
    holder.run("BEGIN; SELECT FROM u WHERE id = 101 FOR UPDATE");
    client.run("SELECT rekey.retry_quarantine()");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(errors(&mut client), ["t 39000", "u 42704"]);
    assert!(client.truth("SELECT bool_and(next_try > now()) FROM rekey.errors"));
    assert_eq!(client.column(other), ["drained", "previous", "active"]);
}

#[test]
fn a_row_under_quarantine_whose_place_is_cut_off_the_table_leaves_it() {
    let database = database("cutoff");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE k (id int, c bytea);
         INSERT INTO k SELECT 1, encrypt_col('x', 'pii', 'wrong');
         SELECT rekey.register_column('k', 'c', 'rekey.context(''k'', id::text)');
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(errors(&mut client), ["k 39000"]);
    client.run("DELETE FROM k");
    wait_until("vacuum has cut off the file", || {
        client.run("VACUUM k");
        client.number("SELECT pg_relation_size('k')") == 0
    });
    client.run("SET statement_timeout = '30s'; SELECT rekey.retry_quarantine()");
    client.run("CALL rekey.reencrypt()");
    assert!(errors(&mut client).is_empty());
    assert_eq!(states(&mut client), ["drained", "active"]);
}

#[test]
fn a_row_that_fails_by_other_envelopes_than_before_has_one_entry_and_holds_up_no_call() {
    let database = database("others");
    let mut client = database.connect();
    client.run(
        "SELECT rekey.create_key('other', grace => '0');
         CREATE TABLE k (id int, a bytea, b bytea);
         INSERT INTO k SELECT 1, encrypt_col('x', 'pii', 'wrong'), encrypt_col('x', 'other', 'wrong');
         SELECT rekey.register_column('k', c, 'rekey.context(''k'', id::text)')
           FROM unnest('{a,b}'::name[]) AS c;
         SELECT rotate_key('pii'); SET statement_timeout = '30s'",
    );
    client.run("CALL rekey.reencrypt()");
    let concerned = "SELECT octet_length(heads) / 34 FROM rekey.quarantine";
    assert_eq!(client.column(concerned), ["1"]);
    for (rotate, envelopes) in [
        ("rotate_key('other')", "2"),
        ("rekey.rollback_rotation('other')", "1"),
    ] {
        client.run(&format!("SELECT {rotate}; SELECT rekey.retry_quarantine()"));
        client.run("CALL rekey.reencrypt()");
        assert_eq!(client.column(concerned), [envelopes], "{rotate}");
    }
    client.run("DELETE FROM k; SELECT rekey.retry_quarantine()");
    client.run("CALL rekey.reencrypt()");
    let awaiting = "SELECT count(*) FROM rekey.slots WHERE state = 'previous'";
    assert_eq!(client.number(awaiting), 0);
}

#[test]
fn a_row_may_fail_for_months() {
    let database = database("months");
    let mut client = database.connect();
    client.run("UPDATE t SET c = set_byte(c, 40, get_byte(c, 40) # 1) WHERE id = 7");
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    client.run("UPDATE rekey.quarantine SET tries = 1000000; SELECT rekey.retry_quarantine()");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(client.number("SELECT tries FROM rekey.errors"), 1_000_001);
    assert!(client.truth("SELECT next_try > now() + interval '23 hours' FROM rekey.errors"));
}

#[test]
fn a_dismissal_never_excuses_another_row_that_comes_to_lie_in_the_same_place() {
    let database = database("excuse");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE k (id int, c bytea);
         INSERT INTO k SELECT 1, encrypt_col('x', 'pii', 'wrong');
         SELECT rekey.register_column('k', 'c', 'rekey.context(''k'', id::text)');
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    let place = client.text("SELECT row_ref::text FROM rekey.errors");
    client.run("SELECT rekey.dismiss_quarantine(quarantine_id, 'test data') FROM rekey.errors");
    client.run("CALL rekey.reencrypt()");
    client.run("DELETE FROM k");
    client.run("VACUUM k");
    client.run("INSERT INTO k SELECT 2, encrypt_col('y', 'pii', 'also wrong')");
    assert_eq!(
        client.text("SELECT ctid::text FROM k"),
        place,
        "the same place"
    );
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(
        client.column("SELECT sqlstate FROM rekey.errors WHERE dismissed_at IS NULL"),
        ["39000"]
    );
    assert_eq!(states(&mut client), ["drained", "previous", "active"]);
}

#[test]
fn a_dismissed_row_stays_dismissed_wherever_it_moves() {
    let database = database("follows");
    let mut client = database.connect();
    client.run("UPDATE t SET c = set_byte(c, 40, get_byte(c, 40) # 1) WHERE id = 7");
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    client.run("SELECT rekey.dismiss_quarantine(quarantine_id, 'test data') FROM rekey.errors");
    client.run("VACUUM FULL t");
    client.run("UPDATE t SET id = 700 WHERE id = 7");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(client.number("SELECT count(*) FROM rekey.errors"), 1);
}

#[test]
fn a_row_that_is_mended_leaves_the_quarantine() {
    let database = database("mended");
    let mut client = database.connect();
    client.run("CREATE TABLE good AS SELECT c FROM t WHERE id = 7");
    client.run("UPDATE t SET c = set_byte(c, 40, get_byte(c, 40) # 1) WHERE id = 7");
    client.run("SELECT rotate_key('pii')");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(errors(&mut client), ["t 39000"]);
    client.run("UPDATE t SET c = good.c FROM good WHERE id = 7");
    assert_eq!(client.number("SELECT rekey.retry_quarantine()"), 1);
    client.run("CALL rekey.reencrypt()");
    assert!(errors(&mut client).is_empty());
    assert_eq!(states(&mut client), ["drained", "active"]);
    assert_eq!(
        client.text("SELECT decrypt_col(c) FROM t WHERE id = 7"),
        "v7"
    );
}

#[test]
fn a_wrong_context_and_a_missing_slot_are_set_aside() {
    let database = database("wrong");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE k (id int, c bytea);
         INSERT INTO k SELECT i, encrypt_col('x', 'pii', rekey.context('k', i::text))
           FROM generate_series(1, 5) AS i;
         UPDATE k SET id = 99 WHERE id = 3;
         UPDATE k SET c = overlay(c PLACING '\\x1234567812345678' FROM 3 FOR 8) WHERE id = 4;
         SELECT rekey.register_column('k', 'c', 'rekey.context(''k'', id::text)');
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(errors(&mut client), ["k 39000", "k 42704"]);
    assert_eq!(stale(&mut client, "k"), 2);
    assert_eq!(stale(&mut client, "t"), 0, "another table is done");
}

#[test]
fn a_row_that_a_constraint_or_trigger_refuses_is_bisected_out() {
    let database = database("refused");
    let mut client = database.connect();
    client.run(
        "ALTER TABLE t ADD CONSTRAINT odd CHECK (id <> 13) NOT VALID;
         DELETE FROM t WHERE id = 13; ALTER TABLE t DROP CONSTRAINT odd;
         INSERT INTO t SELECT 13, encrypt_col('v13', 'pii');
         ALTER TABLE t ADD CONSTRAINT odd CHECK (id <> 13) NOT VALID;
         CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF new.id = 20 THEN RAISE 'value is %', encode(new.c, 'hex') USING errcode = 'P1234'; END IF;
             IF new.id = 21 THEN RETURN NULL; END IF;
             RETURN new;
         END $$;
         CREATE TRIGGER no BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION no();
         ALTER TABLE t ENABLE ALWAYS TRIGGER no;
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(stale(&mut client, "t"), 3);
    let states = client.column("SELECT sqlstate FROM rekey.errors ORDER BY 1");
    assert_eq!(states.len(), 3, "{states:?}");
    assert!(states.contains(&"23514".to_owned()), "{states:?}");
    assert!(states.contains(&"09000".to_owned()), "{states:?}");
    assert!(
        !cluster().log().contains("value is"),
        "the owner's message is withheld"
    );
}

#[test]
fn user_triggers_fire_only_when_asked() {
    let database = database("triggers");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE fired (who name);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO public.fired VALUES (current_user); RETURN NULL; END';
         CREATE TRIGGER note AFTER UPDATE ON t FOR EACH ROW EXECUTE FUNCTION note();
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(client.number("SELECT count(*) FROM fired"), 0);
    client.run("SELECT rekey.unregister_column('t', 'c')");
    client.run(
        "SELECT rekey.register_column('t', 'c', fire_triggers => true); SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(client.number("SELECT count(*) FROM fired"), 50);
}

/// A table of a role that would like to be more: everything of it that runs during an update.
#[test]
fn a_hostile_owner_gains_nothing_and_delays_no_other_table() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set("rekey.databases = 'hostile'"),
    );
    let database = cluster.database("hostile");
    let owner = database.role("owner");
    let mut client = database.connect();
    client.run(&format!(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE honest (c bytea);
         INSERT INTO honest SELECT encrypt_col('v' || i, 'pii') FROM generate_series(1, 50) AS i;
         CREATE TABLE evil (id int, c bytea);
         INSERT INTO evil SELECT i, encrypt_col('secret' || i, 'pii') FROM generate_series(1, 20) AS i;
         CREATE TABLE seen (id serial, who name, session name, what text);
         GRANT ALL ON SCHEMA public TO {owner};
         ALTER TABLE evil OWNER TO {owner}; ALTER TABLE seen OWNER TO {owner}"
    ));
    let mut evil = database.connect_as(&owner);
    evil.run(
        "CREATE FUNCTION spy(what text) RETURNS void LANGUAGE plpgsql AS $$
         BEGIN
             INSERT INTO public.seen (who, session, what) VALUES (current_user, session_user, what);
             BEGIN
                 EXECUTE 'SET ROLE postgres';
                 INSERT INTO public.seen (who, what) VALUES (current_user, 'escaped by SET ROLE');
             EXCEPTION WHEN OTHERS THEN NULL; END;
             BEGIN
                 EXECUTE 'SET SESSION AUTHORIZATION postgres';
                 INSERT INTO public.seen (who, what) VALUES (current_user, 'escaped by SET SESSION');
             EXCEPTION WHEN OTHERS THEN NULL; END;
             BEGIN
                 PERFORM public.decrypt_col((SELECT c FROM public.evil LIMIT 1));
                 INSERT INTO public.seen (who, what) VALUES (current_user, 'plaintext');
             EXCEPTION WHEN OTHERS THEN NULL; END;
         END $$;
         CREATE FUNCTION checked(id int) RETURNS boolean LANGUAGE plpgsql AS
             'BEGIN PERFORM public.spy(''check''); RETURN true; END';
         CREATE FUNCTION indexed(id int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS
             'BEGIN PERFORM public.spy(''index''); RETURN 1; END';
         CREATE FUNCTION generated(c bytea) RETURNS text IMMUTABLE LANGUAGE plpgsql AS
             'BEGIN PERFORM public.spy(''generated''); RETURN 1; END';
         CREATE FUNCTION loops() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN PERFORM public.spy(''trigger''); IF new.id = 5 THEN LOOP END LOOP; END IF; RETURN new; END';
         CREATE FUNCTION fake_eq(bytea, bytea) RETURNS boolean LANGUAGE plpgsql AS
             'BEGIN PERFORM public.spy(''operator''); RETURN true; END';
         CREATE OPERATOR public.= (LEFTARG = bytea, RIGHTARG = bytea, FUNCTION = fake_eq);
         CREATE INDEX ON evil (indexed(id));
         ALTER TABLE evil ADD g text GENERATED ALWAYS AS (generated(c)) STORED;
         ALTER TABLE evil ADD CHECK (checked(id));
         CREATE TRIGGER loops BEFORE UPDATE ON evil FOR EACH ROW EXECUTE FUNCTION loops();
         ALTER TABLE evil ENABLE ALWAYS TRIGGER loops;
         ALTER TABLE evil ENABLE ROW LEVEL SECURITY; ALTER TABLE evil FORCE ROW LEVEL SECURITY;
         SELECT rekey.register_column('evil', 'c')",
    );
    client.run("SELECT rekey.register_column('honest', 'c')");
    client.run("TRUNCATE seen; SELECT rotate_key('pii')");
    wait_until("the honest table is done", || {
        stale(&mut client, "honest") == 0
    });
    wait_until("the hostile rows are set aside", || {
        client.number("SELECT count(*) FROM rekey.errors WHERE sqlstate = '57014'") == 1
    });
    wait_until("its other rows are done", || {
        stale(&mut client, "evil") == 1
    });
    assert!(client.number("SELECT count(*) FROM seen WHERE what = 'trigger'") > 0);
    assert_eq!(
        client.column("SELECT DISTINCT who FROM seen"),
        std::slice::from_ref(&owner),
        "its code ran as its owner only"
    );
    assert_eq!(
        client.number(
            "SELECT count(*) FROM seen WHERE what LIKE 'escaped%' OR what = 'plaintext' \
                       OR what = 'operator'"
        ),
        0
    );
    assert_eq!(
        states(&mut client),
        ["previous", "active"],
        "the proof waits for the row"
    );
}

#[test]
fn a_rule_or_a_deferred_trigger_that_comes_after_the_registration_has_the_table_refused() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set("rekey.databases = 'later'"),
    );
    let database = cluster.database("later");
    let owner = database.role("owner");
    let mut client = database.connect();
    client.run(&format!(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE honest (c bytea);
         INSERT INTO honest SELECT encrypt_col('v' || i, 'pii') FROM generate_series(1, 50) AS i;
         CREATE TABLE ruled AS SELECT * FROM honest; CREATE TABLE late AS SELECT * FROM honest;
         CREATE TABLE seen (who name);
         GRANT ALL ON SCHEMA public TO {owner};
         ALTER TABLE ruled OWNER TO {owner}; ALTER TABLE late OWNER TO {owner};
         ALTER TABLE seen OWNER TO {owner};
         SELECT rekey.register_column('honest', 'c')"
    ));
    let mut evil = database.connect_as(&owner);
    evil.run(
        "SELECT rekey.register_column(t, 'c') FROM unnest('{ruled,late}'::regclass[]) AS t;
         CREATE RULE instead AS ON UPDATE TO ruled
             DO INSTEAD INSERT INTO seen VALUES (current_user);
         ALTER TABLE ruled ENABLE ALWAYS RULE instead;
         CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO public.seen VALUES (current_user); RETURN NULL; END';
         CREATE CONSTRAINT TRIGGER at_commit AFTER UPDATE ON late DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION spy();
         ALTER TABLE late ENABLE ALWAYS TRIGGER at_commit",
    );
    client.run("SELECT rotate_key('pii')");
    wait_until("the honest table is done", || {
        stale(&mut client, "honest") == 0
    });
    for (table, words) in [("ruled", "rule"), ("late", "DEFERRED: at_commit")] {
        let why = format!(
            "SELECT coalesce(max(waits_for), '') FROM rekey.progress
              WHERE table_name = '{table}'::regclass"
        );
        wait_until("the table is refused", || client.text(&why).contains(words));
        assert_eq!(stale(&mut client, table), 50, "{table}");
    }
    assert_eq!(
        client.number("SELECT count(*) FROM seen"),
        0,
        "none of it ran"
    );
    assert_eq!(states(&mut client), ["previous", "active"]);
    client.run("DROP RULE instead ON ruled; DROP TRIGGER at_commit ON late");
    client.run("CALL rekey.reencrypt()");
    wait_until("both are done", || {
        states(&mut client) == ["drained", "active"]
    });
    assert_eq!(client.number("SELECT count(*) FROM seen"), 0);
}

#[test]
fn code_that_swallows_every_cancel_delays_no_other_table() {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set("rekey.databases = 'stubborn'"),
    );
    let mut client = cluster.database("stubborn").connect();
    client.run(
        "SELECT rekey.create_key('pii', grace => '0');
         CREATE TABLE a (c bytea); CREATE TABLE stubborn (c bytea); CREATE TABLE b (c bytea);
         INSERT INTO a SELECT encrypt_col('a', 'pii'); INSERT INTO b SELECT encrypt_col('b', 'pii');
         INSERT INTO stubborn SELECT encrypt_col('s', 'pii');
         CREATE FUNCTION stubborn() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             LOOP
                 BEGIN
                     LOOP END LOOP;
                 EXCEPTION WHEN query_canceled THEN NULL;
                 END;
             END LOOP;
         END $$;
         CREATE TRIGGER stubborn BEFORE UPDATE ON stubborn
             FOR EACH ROW EXECUTE FUNCTION stubborn();
         ALTER TABLE stubborn ENABLE ALWAYS TRIGGER stubborn;
         SELECT rekey.register_column(t, 'c') FROM unnest('{a,stubborn,b}'::regclass[]) AS t;
         SELECT rotate_key('pii')",
    );
    wait_until("both other tables are done", || {
        stale(&mut client, "a") + stale(&mut client, "b") == 0
    });
    wait_until("the worker was ended and the table is at rest", || {
        client.number(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_rekey worker' \
                AND query = 'a worker died at it'",
        ) == 1
    });
    assert_eq!(stale(&mut client, "stubborn"), 1);
    assert_eq!(states(&mut client), ["previous", "active"]);
    client.run("DROP TRIGGER stubborn ON stubborn");
    wait_until("the table is tried again", || {
        states(&mut client) == ["drained", "active"]
    });
}

#[test]
fn a_call_leaves_a_table_whose_context_does_not_plan_and_says_so_at_the_end() {
    let database = database("plans");
    let mut client = database.connect();
    client.run(
        "CREATE FUNCTION bound(id int) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT id::text';
         CREATE TABLE a (id int, c bytea); CREATE TABLE z (id int, c bytea);
         INSERT INTO a SELECT i, encrypt_col('x', 'pii', i::text) FROM generate_series(1, 3) AS i;
         INSERT INTO z SELECT * FROM a;
         SELECT rekey.register_column(t, 'c', 'public.bound(id)') FROM unnest('{a,z}'::regclass[]) AS t;
         DROP FUNCTION bound;
         SELECT rotate_key('pii')",
    );
    client.fail("CALL rekey.reencrypt()", "42883");
    assert_eq!(stale(&mut client, "t"), 0, "another table is done");
    assert_eq!(stale(&mut client, "a"), 3);
    client.run(
        "CREATE FUNCTION bound(id int) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT id::text'",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(states(&mut client), ["drained", "active"]);
}

/// A retry of a row under quarantine runs `body` of the table's owner, when no slot awaits a proof.
fn a_retry_that_runs(name: &str, body: &str) {
    let cluster = Cluster::start(
        Options::preloaded()
            .set("rekey.work_ratio = 1")
            .set(&format!("rekey.databases = '{name}'")),
    );
    let mut client = cluster.database(name).connect();
    client.run(
        "SELECT rekey.create_key('pii', grace => '0'), rekey.create_key('live', grace => '0');
         CREATE FUNCTION bound(id int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS
             'BEGIN RETURN id; END';
         CREATE TABLE forged (id int, c bytea);
         INSERT INTO forged SELECT 1,
             overlay(encrypt_col('x', 'pii', '1') PLACING '\\x1234567812345678' FROM 3 FOR 8);
         SELECT rekey.register_column('forged', 'c', 'public.bound(id)');
         CREATE TABLE t (id int PRIMARY KEY, plain text);
         INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, 100) AS i;
         SELECT rotate_key('pii')",
    );
    wait_until("the row is set aside", || {
        errors(&mut client) == ["forged 42704"]
    });
    client.run("SELECT rekey.shred_key('pii', 'test')");
    client.run(&format!(
        "CREATE OR REPLACE FUNCTION bound(id int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $${body}$$;
         SELECT rekey.retry_quarantine()"
    ));
    client.run("SELECT rekey.encrypt_column('t', 'plain', 'sealed', 'live')");
    wait_until("another table's live column is filled", || {
        client.number("SELECT count(*) FROM t WHERE sealed IS NULL") == 0
    });
    assert_eq!(errors(&mut client), ["forged 42704"]);
}

#[test]
fn a_retry_that_blames_the_server_delays_no_other_table() {
    let body = "BEGIN RAISE 'no disk' USING errcode = '58030'; END";
    a_retry_that_runs("blames", body);
}

#[test]
fn a_retry_that_swallows_every_cancel_delays_no_other_table() {
    let body = "BEGIN LOOP BEGIN LOOP END LOOP;
                EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END";
    a_retry_that_runs("swallows", body);
}

#[test]
fn rows_beyond_the_room_of_the_quarantine_are_counted_and_listed_when_there_is_room() {
    let database = database("room");
    let mut client = database.connect();
    client.run(
        "CREATE TABLE k (id int PRIMARY KEY, c bytea);
         INSERT INTO k SELECT i, encrypt_col('v' || i, 'pii', 'wrong')
           FROM generate_series(1, 1200) AS i;
         SELECT rekey.register_column('k', 'c', 'rekey.context(''k'', id::text)');
         SELECT rotate_key('pii')",
    );
    client.run("CALL rekey.reencrypt()");
    let counted = "SELECT rows_quarantined FROM rekey.progress WHERE table_name = 'k'::regclass";
    let listed = "SELECT count(*) FROM rekey.errors WHERE table_name = 'k'::regclass";
    assert_eq!(client.number(listed), 1000);
    assert_eq!(client.number(counted), 1200);
    client.run(
        "DELETE FROM k USING rekey.errors e WHERE e.row_ref = k.ctid;
         SELECT rekey.retry_quarantine()",
    );
    client.run("CALL rekey.reencrypt()");
    assert_eq!(client.number(listed), 200);
    assert_eq!(client.number(counted), 200);
    assert_eq!(states(&mut client), ["previous", "active"]);
    client.run("DELETE FROM k; SELECT rekey.retry_quarantine()");
    client.run("CALL rekey.reencrypt()");
    assert_eq!(client.number(counted), 0);
    assert_eq!(states(&mut client), ["drained", "active"]);
}
