//! Re-encryption on touch: which updates re-encrypt, what is left alone, what is refused.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded().set("rekey.worker = off")))
}

/// A database with a registered column `c` of `t`, sealed under a slot that is not active any more:
/// rows 1 and 2 with the column's context, row 3 not bound to any.
fn database(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let mut admin = database.connect();
    admin.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t (id int PRIMARY KEY, note text, c bytea);
         INSERT INTO t SELECT i, 'n', encrypt_col('value ' || i, 'pii', rekey.context('t.c', i::text))
             FROM generate_series(1, 2) i;
         INSERT INTO t VALUES (3, 'n', encrypt_col('value 3', 'pii'));
         SELECT rekey.register_column('t', 'c', $$rekey.context('t.c', id::text)$$);
         SELECT rotate_key('pii')",
    );
    (database, admin)
}

/// How many rows of `t` are stale.
const STALE: &str = "SELECT count(*) FROM t WHERE rekey.is_stale(c)";
/// Every value of `t`, opened with the context that it should have.
const VALUES: &str = "SELECT decrypt_col(c, CASE WHEN id < 3 THEN rekey.context('t.c', id::text) \
                          ELSE '' END) FROM t ORDER BY id";

fn all_values() -> [&'static str; 3] {
    ["value 1", "value 2", "value 3"]
}

#[test]
fn an_update_of_another_column_re_encrypts_the_row_for_a_role_without_any_privilege_on_the_key() {
    let (database, mut admin) = database("another");
    let app = database.role("app");
    admin.run(&format!("GRANT SELECT, UPDATE ON t TO {app}"));
    let mut app = database.connect_as(&app);
    app.run("UPDATE t SET note = 'before'");
    assert_eq!(
        admin.number(STALE),
        3,
        "nothing happens without the trigger"
    );
    admin.run("SELECT rekey.enable_touch('t')");
    app.run("UPDATE t SET note = 'after' WHERE id IN (1, 3)");
    assert_eq!(
        admin.number(STALE),
        1,
        "the rows that were updated, and no other"
    );
    app.run("UPDATE t SET note = 'after'");
    assert_eq!(admin.number(STALE), 0);
    assert_eq!(admin.column(VALUES), all_values());
    assert_eq!(
        admin.number("SELECT count(*) FROM t WHERE note = 'after'"),
        3
    );
    // Neither the right to open nor the right to seal came with it.
    app.refuse("SELECT decrypt_col(c) FROM t", "42501");
    app.refuse("SELECT encrypt_col('x', 'pii')", "42501");
    admin.run("SELECT rekey.disable_touch('t'); SELECT rotate_key('pii')");
    app.run("UPDATE t SET note = 'disabled'");
    assert_eq!(admin.number(STALE), 3);
}

#[test]
fn rows_without_stale_envelopes_take_no_part_in_it() {
    let (_, mut admin) = database("fresh");
    let held = "SELECT count(*) FROM pg_locks WHERE relation = 'rekey.barrier'::regclass \
                   AND pid = pg_backend_pid()";
    admin.run("SELECT rekey.enable_touch('t')");
    admin.run("INSERT INTO t VALUES (4, 'n', NULL), (5, 'n', 'not an envelope')");
    admin.run("BEGIN; UPDATE t SET note = 'x' WHERE id > 3");
    assert_eq!(admin.number(held), 0, "nothing was sealed");
    admin.run("UPDATE t SET note = 'x' WHERE id = 1");
    assert_eq!(admin.number(held), 1, "sealing holds the barrier");
    admin.run("COMMIT");
    assert_eq!(admin.number(STALE), 2);
    assert_eq!(
        admin.text("SELECT c::text FROM t WHERE id = 5"),
        admin.text("SELECT 'not an envelope'::bytea::text")
    );
}

#[test]
fn rows_that_replication_applies_are_touched_too() {
    let (_, mut admin) = database("replica");
    admin.run("SELECT rekey.enable_touch('t')");
    admin.run("SET session_replication_role = replica; UPDATE t SET note = 'applied'");
    assert_eq!(admin.number(STALE), 0);
    assert_eq!(admin.column(VALUES), all_values());
}

#[test]
fn a_row_whose_context_changes_is_left_to_whoever_changes_it() {
    let (_, mut admin) = database("moved");
    admin.run("SELECT rekey.enable_touch('t')");
    let before = admin.text("SELECT c::text FROM t WHERE id = 1");
    admin.run("UPDATE t SET id = 10 WHERE id = 1");
    assert_eq!(admin.text("SELECT c::text FROM t WHERE id = 10"), before);
    assert_eq!(
        admin.text("SELECT decrypt_col(c, rekey.context('t.c', '1')) FROM t WHERE id = 10"),
        "value 1"
    );
    // Even where the new context would open it: what the statement makes of the row is its affair.
    admin.run(
        "SELECT rekey.rollback_rotation('pii');
         CREATE TABLE kept AS SELECT encrypt_col('kept', 'pii', rekey.context('t.c', '1')) AS c;
         SELECT rotate_key('pii');
         UPDATE t SET id = 1, c = (SELECT c FROM kept) WHERE id = 10",
    );
    assert_eq!(
        admin.text("SELECT c::text FROM t WHERE id = 1"),
        admin.text("SELECT c::text FROM kept")
    );
    // Not bound to a context: it cannot come loose from one.
    admin.run("UPDATE t SET id = 30 WHERE id = 3");
    assert!(!admin.truth("SELECT rekey.is_stale(c) FROM t WHERE id = 30"));
    // Resealed by the application with the new context in the same statement.
    admin.run(
        "UPDATE t SET id = 20, c = encrypt_col('new', 'pii', rekey.context('t.c', '20')) \
          WHERE id = 2",
    );
    assert_eq!(
        admin.text("SELECT decrypt_col(c, rekey.context('t.c', '20')) FROM t WHERE id = 20"),
        "new"
    );
}

#[test]
fn what_does_not_open_is_left_as_it_is_and_fails_no_update() {
    let (_, mut admin) = database("broken");
    admin.run("SELECT rekey.enable_touch('t')");
    // Row 1 gets altered bytes, row 2 the envelope of another row.
    admin.run(
        "ALTER TABLE t DISABLE TRIGGER zzz_rekey_touch;
         UPDATE t SET c = (SELECT c FROM t WHERE id = 1) WHERE id = 2;
         UPDATE t SET c = set_byte(c, length(c) - 1, get_byte(c, length(c) - 1) # 1) WHERE id = 1;
         ALTER TABLE t ENABLE ALWAYS TRIGGER zzz_rekey_touch",
    );
    let before = admin.column("SELECT c::text FROM t WHERE id < 3 ORDER BY id");
    admin.run("UPDATE t SET note = 'kept'");
    assert_eq!(
        admin.column("SELECT c::text FROM t WHERE id < 3 ORDER BY id"),
        before
    );
    assert_eq!(admin.number(STALE), 2, "row 3 was fine");
    assert_eq!(
        admin.number("SELECT count(*) FROM t WHERE note = 'kept'"),
        3
    );
}

#[test]
fn the_trigger_is_the_last_to_see_the_row() {
    let (_, mut admin) = database("last");
    admin.run(
        "CREATE TABLE kept AS SELECT * FROM t;
         CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN NEW.c := (SELECT c FROM kept WHERE id = NEW.id); RETURN NEW; END';
         CREATE TRIGGER zz_undo BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION undo();
         SELECT rekey.enable_touch('t')",
    );
    admin.run("UPDATE t SET note = 'x'");
    assert_eq!(admin.number(STALE), 0, "what the other trigger put back");
    assert_eq!(admin.column(VALUES), all_values());
}

#[test]
fn a_context_function_runs_as_the_owner_and_not_as_whoever_updates() {
    let (database, mut admin) = database("owner");
    let (owner, app) = (database.role("owner"), database.role("app"));
    admin.run(&format!(
        "CREATE TABLE seen (who text); GRANT ALL ON seen TO PUBLIC;
         CREATE FUNCTION who(i int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
             BEGIN
                 IF current_user <> '{owner}' THEN RAISE 'run as %', current_user; END IF;
                 RETURN rekey.context('t.c', i::text);
             END $$;
         ALTER TABLE t OWNER TO {owner}; GRANT ALL ON t TO {app};
         SELECT rekey.unregister_column('t', 'c');
         SELECT rekey.register_column('t', 'c', 'public.who(id)');
         SELECT rekey.enable_touch('t')"
    ));
    database
        .connect_as(&app)
        .run("UPDATE t SET note = 'by app'");
    admin.run("UPDATE t SET note = 'by a superuser'");
    assert_eq!(admin.number(STALE), 0);
    assert_eq!(admin.column(VALUES), all_values());
}

#[test]
fn a_context_that_fails_fails_no_update() {
    let (_, mut admin) = database("failing");
    admin.run(
        "CREATE FUNCTION picky(i int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
             BEGIN
                 IF i = 1 THEN RAISE 'not this one'; END IF;
                 RETURN rekey.context('t.c', i::text);
             END $$;
         SELECT rekey.unregister_column('t', 'c');
         SELECT rekey.register_column('t', 'c', 'public.picky(id)');
         SELECT rekey.enable_touch('t')",
    );
    let stale = "SELECT id::text FROM t WHERE rekey.is_stale(c) ORDER BY id";
    admin.run("UPDATE t SET note = 'x'");
    assert_eq!(admin.column(stale), ["1"]);
    admin.run("SELECT rotate_key('pii'); DROP FUNCTION picky");
    admin.run("UPDATE t SET note = 'y'");
    assert_eq!(admin.column(stale), ["1", "2"], "row 3 is not bound");
    assert_eq!(admin.column(VALUES), all_values());
    assert_eq!(admin.number("SELECT count(*) FROM t WHERE note = 'y'"), 3);
    // The statement's own limits still hold in the owner's code.
    admin.run(
        "CREATE FUNCTION picky(i int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS
             $$BEGIN LOOP i := i; END LOOP; END$$;
         SET statement_timeout = '200ms'",
    );
    admin.fail("UPDATE t SET note = 'z'", "57014");
}

#[test]
fn is_stale_and_is_closed_judge_the_header() {
    let (_, mut admin) = database("judged");
    let old = admin.number("SELECT rekey.slot_id(c) FROM t WHERE id = 1");
    admin.run("CREATE TABLE kept AS SELECT c FROM t WHERE id = 1");
    let judged = |client: &mut Client, envelope: &str| {
        let sql = format!(
            "SELECT coalesce(rekey.is_stale(e)::text, '-') || ' ' || \
                    coalesce(rekey.is_closed(e)::text, '-') FROM (SELECT {envelope} AS e) x"
        );
        client.text(&sql)
    };
    let kept = "(SELECT c FROM kept)";
    assert_eq!(judged(&mut admin, "NULL::bytea"), "- -");
    assert_eq!(judged(&mut admin, "'text'::bytea"), "false false");
    let unknown =
        "set_byte((SELECT c FROM kept), 9, (get_byte((SELECT c FROM kept), 9) + 1) % 256)";
    assert_eq!(judged(&mut admin, unknown), "false false");
    assert_eq!(judged(&mut admin, "encrypt_col('x', 'pii')"), "false false");
    assert_eq!(judged(&mut admin, kept), "true false");
    admin.run(&format!("SELECT rekey.disable_slot({old}, force => true)"));
    assert_eq!(judged(&mut admin, kept), "true true");
    admin.run(&format!("SELECT rekey.enable_slot({old})"));
    assert_eq!(judged(&mut admin, kept), "true false");
    admin.run("SELECT rekey.rollback_rotation('pii')");
    assert_eq!(judged(&mut admin, kept), "false false");
    admin.run("SELECT rekey.shred_key('pii', 'over')");
    assert_eq!(judged(&mut admin, kept), "false true", "no active slot");
}

#[test]
fn nothing_is_stored_under_a_closed_slot_where_that_is_refused() {
    let (_, mut admin) = database("closed");
    let old = admin.number("SELECT rekey.slot_id(c) FROM t WHERE id = 1");
    admin.run(
        "CREATE TABLE kept AS SELECT c FROM t WHERE id = 1;
         SELECT rekey.enable_touch('t')",
    );
    admin.run(&format!("SELECT rekey.disable_slot({old}, force => true)"));
    let insert = "INSERT INTO t SELECT 100 + (random() * 1e6)::int, 'n', c FROM kept";
    let update = "UPDATE t SET c = (SELECT c FROM kept) WHERE id = 2";
    admin.run(insert);
    admin.run("DELETE FROM t WHERE id > 3; SELECT rekey.enable_touch('t', refuse_closed => true)");
    for statement in [insert, "UPDATE t SET c = (SELECT c FROM kept) WHERE id = 3"] {
        admin
            .refuse(statement, "55000")
            .names(&old.to_string())
            .names("public.t")
            .hints("disable_touch");
    }
    // What is there already does not hold up an UPDATE of something else.
    admin.run("UPDATE t SET note = 'kept'");
    admin.run("INSERT INTO t VALUES (4, 'n', encrypt_col('fresh', 'pii')), (5, 'n', NULL)");
    // A copy of a drained slot's envelope is as unwanted, though it opens.
    admin.run(&format!("SELECT rekey.enable_slot({old})"));
    admin.run("UPDATE t SET note = 'touched'");
    admin.run("CALL rekey.reencrypt()");
    assert_eq!(
        admin.text(&format!(
            "SELECT state FROM rekey.slots WHERE slot_id = {old}"
        )),
        "drained"
    );
    admin.refuse(insert, "55000");
    admin.run(&format!("SELECT rekey.destroy_slot({old}, force => true)"));
    admin.refuse(update, "55000");
    // A key without any active slot.
    admin.run("UPDATE kept SET c = (SELECT c FROM t WHERE id = 4)");
    admin.run("SELECT rekey.shred_key('pii', 'over')");
    admin.refuse(insert, "55000");
    admin.run("SELECT rekey.enable_touch('t')");
    admin.run(insert);
}

#[test]
fn no_fingerprint_is_stored_under_a_closed_slot_where_that_is_refused() {
    let (_, mut admin) = database("closed_fp");
    admin.run(
        "SELECT rekey.create_key('find', grace => '0', purpose => 'lookup');
         ALTER TABLE t ADD fp bytea;
         UPDATE t SET fp = fingerprint_col('value ' || id, 'find');
         SELECT rekey.enable_touch('t', refuse_closed => true);
         SELECT rekey.register_fingerprint('t', 'fp', 'c', 'find', 'pii');
         CREATE TABLE kept AS SELECT fp FROM t WHERE id = 3;
         SELECT rotate_key('find')",
    );
    let insert = "INSERT INTO t (id, c, fp) \
                  SELECT 100 + (random() * 1e6)::int, encrypt_col('value 3', 'pii'), fp FROM kept";
    admin.run(insert);
    admin.run("CALL rekey.reencrypt()");
    let drained = "SELECT count(*) FROM rekey.slots WHERE key_name = 'find' AND state = 'drained'";
    assert_eq!(admin.number(drained), 1);
    for statement in [insert, "UPDATE t SET fp = kept.fp FROM kept WHERE id = 1"] {
        admin
            .refuse(statement, "55000")
            .names("a fingerprint of slot")
            .names("fp")
            .hints("fingerprint_col");
    }
    admin.run("UPDATE t SET note = 'other', fp = fingerprint_col('value ' || id, 'find')");
    admin.run("SELECT rekey.enable_touch('t')");
    admin.run(insert);
}

#[test]
fn the_trigger_follows_the_registered_columns_and_their_names() {
    let (_, mut admin) = database("columns");
    admin.run(
        "ALTER TABLE t ADD d bytea;
         UPDATE t SET d = encrypt_col('d ' || id, 'pii');
         SELECT rotate_key('pii');
         SELECT rekey.enable_touch('t', refuse_closed => true)",
    );
    let stale = "SELECT count(*) FROM t WHERE rekey.is_stale(d)";
    admin.run("UPDATE t SET note = 'x'");
    assert_eq!(admin.number(stale), 3, "not registered");
    admin.run("SELECT rekey.register_column('t', 'd')");
    admin.run("ALTER TABLE t RENAME d TO \"D \"\"quoted\"\" ü\"");
    admin.run("ALTER TABLE t RENAME c TO d");
    admin.run("UPDATE t SET note = 'x'");
    let stale = "SELECT count(*) FROM t WHERE rekey.is_stale(\"D \"\"quoted\"\" ü\")";
    assert_eq!(admin.number(stale), 0);
    // PostgreSQL's own: the trigger depends on its columns.
    admin.fail("ALTER TABLE t DROP d", "2BP01");
    admin.run("SELECT rekey.unregister_column('t', 'd')");
    admin.run("SELECT rotate_key('pii'); UPDATE t SET note = 'y'");
    assert_eq!(admin.number(stale), 0);
    assert_eq!(
        admin.number("SELECT count(*) FROM t WHERE rekey.is_stale(d)"),
        3,
        "not registered any more"
    );
    let trigger = "SELECT string_agg(tgenabled::text || ' ' || (tgtype & 4 <> 0), ',') FROM pg_trigger \
                    WHERE tgname = 'zzz_rekey_touch'";
    assert_eq!(admin.text(trigger), "A true", "as it was made");
    admin.run("SELECT rekey.unregister_column('t', $$D \"quoted\" ü$$)");
    assert_eq!(admin.cell(trigger), None, "nothing is left to touch");
}

#[test]
fn a_key_that_comes_later_is_not_broken() {
    let (_, mut admin) = database("keyed");
    admin.run(
        "SELECT rekey.enable_touch('t');
         ALTER TABLE t ADD UNIQUE (c);
         CREATE TABLE child AS SELECT c FROM t WHERE id = 1;
         ALTER TABLE child ADD FOREIGN KEY (c) REFERENCES t (c)",
    );
    admin.run("UPDATE t SET note = 'x'");
    assert_eq!(admin.number(STALE), 3);
}

#[test]
fn names_are_passed_on_in_the_encoding_of_the_database() {
    let options = "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'";
    let database = cluster().empty_database("latin", options);
    database.install();
    let mut admin = database.connect();
    admin.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE \"tâble\" (\"é\" bytea, note text);
         INSERT INTO \"tâble\" VALUES (encrypt_col('v', 'pii', 'è'), 'è');
         SELECT rekey.register_column('\"tâble\"', 'é', 'note');
         SELECT rekey.enable_touch('\"tâble\"');
         SELECT rotate_key('pii');
         UPDATE \"tâble\" SET note = note",
    );
    assert_eq!(
        admin.text("SELECT rekey.is_stale(\"é\") || decrypt_col(\"é\", 'è') FROM \"tâble\""),
        "falsev"
    );
    assert_eq!(admin.column("SELECT column_name FROM rekey.columns"), ["é"]);
}

#[test]
fn partitions_are_touched_through_their_table_and_those_attached_later_too() {
    let (_, mut admin) = database("partitions");
    admin.run(
        "CREATE TABLE p (id int, note text, c bytea) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);
         CREATE TABLE p2 (c bytea, gone int, note text, id int); ALTER TABLE p2 DROP gone;
         INSERT INTO p VALUES (1, '', encrypt_col('one', 'pii', '1'));
         INSERT INTO p2 (id, c) VALUES (11, encrypt_col('eleven', 'pii', '11'));
         SELECT rekey.register_column('p', 'c', 'id');
         SELECT rotate_key('pii');
         SELECT rekey.enable_touch('p');
         ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20)",
    );
    admin.run("UPDATE p SET note = 'x' WHERE id = 1; UPDATE p2 SET note = 'x'");
    assert_eq!(
        admin.number("SELECT count(*) FROM p WHERE rekey.is_stale(c)"),
        0
    );
    assert_eq!(
        admin.column("SELECT decrypt_col(c, id::text) FROM p ORDER BY id"),
        ["one", "eleven"]
    );
    for act in ["enable_touch", "disable_touch"] {
        admin
            .refuse(&format!("SELECT rekey.{act}('p1')"), "55000")
            .names("above");
    }
    admin.run("SELECT rekey.disable_touch('p'); SELECT rekey.enable_touch('p1')");
    admin
        .refuse("SELECT rekey.enable_touch('p')", "55000")
        .names("public.p1");
}

#[test]
fn what_is_registered_for_a_partition_alone_is_touched_through_the_table_above_it() {
    let (database, mut admin) = database("alone");
    let (above, below) = (database.role("above"), database.role("below"));
    admin.run(&format!(
        "CREATE TABLE p (id int, note text, c bytea, d bytea) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);
         CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20);
         ALTER TABLE p OWNER TO {above}; ALTER TABLE p2 OWNER TO {below};
         ALTER TABLE p1 OWNER TO {above};
         INSERT INTO p SELECT i, '', encrypt_col('c', 'pii'), encrypt_col('d', 'pii')
           FROM (VALUES (1), (11)) AS v(i);
         SELECT rekey.register_column('p', 'c'); SELECT rekey.register_column('p1', 'd')",
    ));
    let stale = "SELECT count(*) FROM p WHERE rekey.is_stale(d)";
    let rotate = "SELECT rotate_key('pii'); UPDATE p SET c = encrypt_col('c', 'pii')";
    let update = "UPDATE p SET note = note || 'x'";
    admin.run("SELECT rekey.enable_touch('p')");
    admin.run(rotate);
    admin.run(update);
    assert_eq!(admin.number(stale), 1, "p1's alone is touched");
    // Its owner may have the trigger follow, the owner of a partition may not.
    let mut owner = database.connect_as(&above);
    owner.run("SELECT rekey.unregister_column('p1', 'd')");
    admin.run(rotate);
    admin.run(update);
    assert_eq!(admin.number(stale), 2);
    database
        .connect_as(&below)
        .run("SELECT rekey.register_column('p2', 'd')");
    admin.run(update);
    assert_eq!(admin.number(stale), 2);
    owner.run("SELECT rekey.register_column('p1', 'd')");
    admin.run(update);
    assert_eq!(admin.number(stale), 0);
    assert_eq!(
        admin.column("SELECT decrypt_col(d) FROM p WHERE id < 20"),
        ["d", "d"]
    );
}

#[test]
fn touch_is_for_owners_and_registered_tables() {
    let (database, mut admin) = database("who");
    let (owner, other) = (database.role("owner"), database.role("other"));
    admin.run(&format!(
        "ALTER TABLE t OWNER TO {owner}; GRANT ALL ON t TO {other};
         CREATE TABLE plain (c bytea)"
    ));
    let mut other = database.connect_as(&other);
    other.refuse("SELECT rekey.enable_touch('t')", "42501");
    let mut owner = database.connect_as(&owner);
    owner.refuse("SELECT rekey.disable_touch('t')", "55000");
    owner.run("SELECT rekey.enable_touch('t')");
    other.refuse("SELECT rekey.disable_touch('t')", "42501");
    owner.run("SELECT rekey.disable_touch('t')");
    assert_eq!(
        admin.column("SELECT action FROM rekey.audit WHERE detail = 'public.t' ORDER BY audit_id"),
        ["enable_touch", "disable_touch"]
    );
    admin
        .refuse("SELECT rekey.enable_touch('plain')", "55000")
        .hints("register_column");
    admin.refuse("SELECT rekey.enable_touch(NULL)", "22004");
    admin.refuse("SELECT rekey.enable_touch('t', NULL)", "22004");
    admin.run(
        "CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
         CREATE TRIGGER zzz_rekey_touch BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION mine()",
    );
    for act in ["enable_touch", "disable_touch"] {
        admin
            .refuse(&format!("SELECT rekey.{act}('t')"), "55000")
            .names("zzz_rekey_touch");
    }
    // Attached by hand, it does nothing that registration did not ask for.
    admin
        .refuse("SELECT rekey.touch()", "55000")
        .hints("enable_touch");
    admin.run(
        "INSERT INTO plain SELECT c FROM t;
         CREATE TRIGGER by_hand BEFORE UPDATE ON plain FOR EACH ROW EXECUTE FUNCTION rekey.touch();
         UPDATE plain SET c = c",
    );
    assert_eq!(
        admin.number("SELECT count(*) FROM plain WHERE rekey.is_stale(c)"),
        3
    );
}
