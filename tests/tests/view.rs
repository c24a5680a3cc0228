//! Views of opened columns: reads, writes, whose privileges count, what concurrency does.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options, Refusal, wait_until};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded().set("rekey.worker = off")))
}

/// A database with the table `customer` and its view `person`: an opened text that is bound to the
/// row, an opened numeric, an identity, a default, a generated column.
fn database(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let mut admin = database.connect();
    admin.run(
        "SELECT rekey.create_key('pii'), rekey.create_key('pay');
         CREATE TABLE customer (
             id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
             name text NOT NULL,
             email bytea,
             salary bytea,
             status text DEFAULT 'new',
             shout text GENERATED ALWAYS AS (upper(name)) STORED);
         SELECT rekey.register_column('customer', 'email',
             $$rekey.context('customer.email', id::text)$$);
         SELECT rekey.register_column('customer', 'salary');
         SELECT rekey.create_view('customer', 'person', 'pii',
             columns => '{\"salary\": {\"type\": \"numeric\", \"key\": \"pay\"}}')",
    );
    (database, admin)
}

/// Runs `first` in a transaction that ends once another session waits in `second`.
fn race(
    database: &Database,
    admin: &mut Client,
    first: &str,
    second: &'static str,
) -> Result<(), Refusal> {
    admin.run(&format!("BEGIN; {first}"));
    let mut session = database.connect();
    let pid = session.number("SELECT pg_backend_pid()");
    let waiting = std::thread::spawn(move || session.attempt(second));
    let mut waits = database.connect();
    wait_until("the second session waits", || {
        waits.truth(&format!(
            "SELECT cardinality(pg_blocking_pids({pid}::int)) > 0"
        ))
    });
    admin.run("COMMIT");
    waiting.join().expect("the session")
}

/// All of a row of the view, as text.
const ROWS: &str = "SELECT p::text FROM person p ORDER BY id";

#[test]
fn an_insert_seals_and_gives_back_what_the_table_has_generated() {
    let (_, mut admin) = database("insert");
    assert_eq!(
        admin.rows(
            "INSERT INTO person (name, email, salary) VALUES ('Ada', 'ada@example.org', 12.50) \
             RETURNING id, email, salary, status, shout"
        ),
        [["1", "ada@example.org", "12.50", "new", "ADA"].map(|cell| Some(cell.to_owned()))]
    );
    assert_eq!(
        admin.column(ROWS),
        ["(1,Ada,ada@example.org,12.50,new,ADA)"]
    );
    // In the table: envelopes, under the keys that were asked for, the one bound to its row.
    assert_eq!(
        admin.text(
            "SELECT (rekey.describe(email)).key_name || ' ' || (rekey.describe(salary)).key_name \
                 || ' ' || (rekey.describe(salary)).kind \
                 || ' ' || decrypt_col(email, rekey.context('customer.email', '1')) FROM customer"
        ),
        "pii pay typed ada@example.org"
    );
    // NULL stays NULL, DEFAULT is the table's, and NULL for a column with a default is NULL.
    admin.run(
        "INSERT INTO person (name) VALUES ('Bob');
         INSERT INTO person (id, name, status) VALUES (DEFAULT, 'Cid', NULL);
         INSERT INTO person (name, salary, status) SELECT 'Dora', 1, 'old'",
    );
    assert_eq!(
        admin.column(ROWS)[1..],
        [
            "(2,Bob,,,new,BOB)",
            "(3,Cid,,,,CID)",
            "(4,Dora,,1,old,DORA)"
        ]
    );
    assert_eq!(
        admin.number("SELECT count(*) FROM customer WHERE email IS NULL"),
        3
    );
    // What PostgreSQL computes is not given, as in the table itself.
    admin.fail("INSERT INTO person (id, name) VALUES (9, 'x')", "428C9");
    admin.fail(
        "INSERT INTO person (name, shout) VALUES ('x', 'X')",
        "428C9",
    );
    admin.fail("INSERT INTO person (name) VALUES (NULL)", "23502");
}

#[test]
fn copy_and_bound_parameters_write_through_the_view() {
    let (_, mut admin) = database("copy");
    let mut copy = admin
        .copy_in("COPY person (name, email, salary) FROM STDIN")
        .expect("COPY");
    std::io::Write::write_all(&mut copy, b"Ada\tada@example.org\t1.5\nBob\t\\N\t2\n")
        .expect("rows");
    copy.finish().expect("the end of COPY");
    let row = admin
        .query_one(
            "INSERT INTO person (name, email) VALUES ($1, $2) RETURNING id",
            &[&"Cid", &"cid@example.org"],
        )
        .expect("an INSERT with parameters");
    assert_eq!(row.get::<_, i64>(0), 3);
    let changed = admin
        .execute(
            "UPDATE person SET email = $1 WHERE id = $2",
            &[&"c@example.org", &3i64],
        )
        .expect("an UPDATE with parameters");
    assert_eq!(changed, 1, "the count that ORMs look at");
    assert_eq!(
        admin.column(ROWS),
        [
            "(1,Ada,ada@example.org,1.5,new,ADA)",
            "(2,Bob,,2,new,BOB)",
            "(3,Cid,c@example.org,,new,CID)"
        ]
    );
}

#[test]
fn an_update_seals_what_it_changes_and_nothing_else() {
    let (_, mut admin) = database("update");
    admin.run("INSERT INTO person (name, email, salary) VALUES ('Ada', 'ada@example.org', 1.0)");
    let stored = "SELECT email::text || salary::text FROM customer";
    let before = admin.text(stored);
    admin.run("UPDATE person SET status = 'kept', email = email, salary = 1.0 WHERE id = 1");
    assert_eq!(admin.text(stored), before, "nothing was sealed again");
    let salary = admin.text("SELECT salary::text FROM customer");
    admin.run("UPDATE person SET email = 'Ada@example.org' WHERE email = 'ada@example.org'");
    assert_eq!(admin.text("SELECT email FROM person"), "Ada@example.org");
    assert_eq!(admin.text("SELECT salary::text FROM customer"), salary);
    // Equal numbers with other digits are another value.
    admin.run("UPDATE person SET salary = 1.00");
    assert_eq!(admin.text("SELECT salary::text FROM person"), "1.00");
    admin.run("UPDATE person SET email = NULL, salary = NULL");
    assert!(admin.truth("SELECT email IS NULL AND salary IS NULL FROM customer"));
    admin.run("UPDATE person SET email = 'again' RETURNING email");
    assert_eq!(admin.column(ROWS), ["(1,Ada,again,,kept,ADA)"]);
    admin.fail("UPDATE person SET shout = 'X'", "428C9");
    admin.fail("UPDATE person SET id = 7", "428C9");
    admin.run("DELETE FROM person WHERE email = 'again'");
    assert_eq!(admin.number("SELECT count(*) FROM customer"), 0);
}

#[test]
fn a_value_follows_its_row_into_another_context() {
    let (_, mut admin) = database("context");
    admin.run(
        "CREATE TABLE note (id int PRIMARY KEY, body bytea);
         SELECT rekey.register_column('note', 'body', $$id  -- the row$$);
         SELECT rekey.create_view('note', 'note_plain', 'pii');
         INSERT INTO note_plain VALUES (1, 'one');
         UPDATE note_plain SET id = 2",
    );
    assert_eq!(admin.text("SELECT decrypt_col(body, '2') FROM note"), "one");
    assert_eq!(admin.text("SELECT body FROM note_plain"), "one");
    // A context that is NULL binds nothing, and is refused as in encrypt_col.
    admin.run(
        "ALTER TABLE note ADD part int;
         SELECT rekey.unregister_column('note', 'body');
         DELETE FROM note;
         SELECT rekey.register_column('note', 'body', 'part');
         SELECT rekey.create_view('note', 'note_plain', 'pii');
         INSERT INTO note_plain VALUES (1, 'one', 5)",
    );
    assert_eq!(admin.text("SELECT decrypt_col(body, '5') FROM note"), "one");
    admin.fail("UPDATE note_plain SET part = NULL", "22004");
    admin.fail("INSERT INTO note_plain VALUES (2, 'two', NULL)", "22004");
}

#[test]
fn an_update_seals_under_the_key_that_an_insert_would() {
    let (database, mut admin) = database("keys");
    admin.run(
        "SELECT rekey.create_key('tenant-1'), rekey.create_key('tenant-2');
         CREATE TABLE note (id int PRIMARY KEY, body bytea);
         SELECT rekey.register_column('note', 'body');
         SELECT rekey.create_view('note', 'note_plain');
         SET rekey.default_key = 'tenant-1';
         INSERT INTO note_plain VALUES (1, 'one'), (2, 'two');
         SET rekey.default_key = 'tenant-2';
         UPDATE note_plain SET body = 'changed' WHERE id = 1;
         UPDATE note_plain SET body = body WHERE id = 2",
    );
    let keys = "SELECT (rekey.describe(body)).key_name FROM note ORDER BY id";
    assert_eq!(admin.column(keys), ["tenant-2", "tenant-1"]);
    admin.run("RESET rekey.default_key");
    admin.fail("INSERT INTO note_plain VALUES (3, 'three')", "42704");
    admin.fail("UPDATE note_plain SET body = 'x'", "42704");
    // Who may open but not seal under a key cannot have a value sealed under it.
    let app = database.role("app");
    admin.run(&format!(
        "GRANT ALL ON note, note_plain TO {app};
         SELECT rekey.grant_key('tenant-1', '{app}', '{{decrypt}}');
         SELECT rekey.grant_key('tenant-2', '{app}', '{{encrypt,decrypt}}')"
    ));
    let mut app = database.connect_as(&app);
    app.run("SET rekey.default_key = 'tenant-1'");
    app.refuse("UPDATE note_plain SET body = 'x' WHERE id = 1", "42501");
}

#[test]
fn values_of_every_type_come_back_as_they_were_written() {
    let (_, mut admin) = database("types");
    admin.run(
        "CREATE DOMAIN word AS varchar CHECK (value <> '');
         CREATE TABLE note (id int PRIMARY KEY, v bytea, w bytea, c bytea, n bytea, b bytea,
             i bytea);
         SELECT rekey.register_column('note', column_name)
           FROM unnest('{v,w,c,n,b,i}'::name[]) AS column_name;
         SELECT rekey.create_view('note', 'note_plain', 'pii', columns => '{
             \"v\": {\"type\": \"varchar\"}, \"w\": {\"type\": \"word\"},
             \"c\": {\"type\": \"character\"}, \"n\": {\"type\": \"name\"},
             \"b\": {\"type\": \"bytea\"}, \"i\": {\"type\": \"int[]\"}}');
         INSERT INTO note_plain VALUES (1, 'v', 'w', 'c ', 'n', 'b', '{1}');
         UPDATE note_plain SET v = v || '1', w = w || '1', n = n || '1', b = b || '1', i = i || 1",
    );
    assert_eq!(
        admin.text("SELECT p::text FROM note_plain p"),
        r#"(1,v1,w1,"c ",n1,"\\x6231","{1,1}")"#
    );
    // As encrypt_col: what is text but for its name is sealed as text.
    assert_eq!(
        admin.text(
            "SELECT concat_ws(' ', (rekey.describe(v)).kind, (rekey.describe(w)).kind,
                        (rekey.describe(b)).kind, (rekey.describe(i)).kind) FROM note"
        ),
        "text text bytea typed"
    );
}

#[test]
fn nobody_chooses_the_key_of_the_next_value_by_what_he_stores() {
    let (database, mut admin) = database("chosen");
    admin.run("INSERT INTO person (name, salary) VALUES ('Ada', 50), ('Bob', 60)");
    let clerk = database.role("clerk");
    admin.run(&format!(
        "GRANT SELECT, UPDATE ON customer TO {clerk};
         SELECT rekey.grant_key('pii', '{clerk}', '{{encrypt,decrypt}}')"
    ));
    let mut clerk = database.connect_as(&clerk);
    clerk.run("UPDATE customer SET salary = encrypt_col(99::numeric, 'pii')");
    admin.run("UPDATE person SET salary = 777");
    assert_eq!(
        admin.column("SELECT (rekey.describe(salary)).key_name FROM customer"),
        ["pay", "pay"]
    );
    clerk.fail("SELECT decrypt_col(salary) FROM customer", "42501");
}

#[test]
fn a_function_beside_the_verbs_is_not_called_in_their_place() {
    let (database, mut admin) = database("overload");
    let mallory = database.role("mallory");
    admin.run(&format!(
        "CREATE DOMAIN sealed AS bytea;
         CREATE TABLE note (id int PRIMARY KEY, amount bytea, body sealed);
         SELECT rekey.register_column('note', 'amount'), rekey.register_column('note', 'body');
         GRANT CREATE ON SCHEMA public TO {mallory}"
    ));
    let create = "SELECT rekey.create_view('note', 'note_plain', 'pii',
                      columns => '{\"amount\": {\"type\": \"numeric\"}}')";
    admin.run(create);
    // Each takes the arguments of the view better than the verb of that name.
    database.connect_as(&mallory).run(
        "CREATE FUNCTION trap() RETURNS text LANGUAGE plpgsql AS
             $$BEGIN RAISE 'called as %', current_user; END$$;
         CREATE FUNCTION public.encrypt_col(numeric, text, text) RETURNS bytea
             LANGUAGE sql AS 'SELECT trap()::bytea';
         CREATE FUNCTION public.decrypt_col_as(bytea, numeric, text) RETURNS numeric
             LANGUAGE sql AS 'SELECT trap()::numeric';
         CREATE FUNCTION public.decrypt_col_as(bytea, numeric) RETURNS numeric
             LANGUAGE sql AS 'SELECT trap()::numeric';
         CREATE FUNCTION public.decrypt_col(sealed) RETURNS text
             LANGUAGE sql AS 'SELECT trap()';
         CREATE FUNCTION public.decrypt_col(sealed, text) RETURNS text
             LANGUAGE sql AS 'SELECT trap()'",
    );
    let write = "INSERT INTO note_plain VALUES (1, 2, 'three');
                 UPDATE note_plain SET amount = amount + 1, body = 'four'";
    let read = "SELECT p::text FROM note_plain p";
    admin.run(write);
    assert_eq!(admin.column(read), ["(1,3,four)"]);
    // Made while they are there.
    admin.run(&format!("DELETE FROM note_plain; {create}"));
    admin.run(write);
    assert_eq!(admin.column(read), ["(1,3,four)"]);
}

#[test]
fn a_value_that_is_sealed_meanwhile_is_not_left_behind_in_another_context() {
    let (database, mut admin) = database("behind");
    admin.run(
        "CREATE TABLE note (id int PRIMARY KEY, tenant text, body bytea);
         SELECT rekey.register_column('note', 'body', 'tenant');
         SELECT rekey.create_view('note', 'note_plain', 'pii');
         INSERT INTO note_plain VALUES (1, 'a', NULL)",
    );
    let lost = race(
        &database,
        &mut admin,
        "UPDATE note_plain SET body = 'new'",
        "UPDATE note_plain SET tenant = 'b'",
    );
    assert_eq!(lost.expect_err("a refusal").code, "40001");
    assert_eq!(
        admin.text("SELECT n::text FROM note_plain n"),
        "(1,a,new)",
        "it opens"
    );
    admin.run("UPDATE note_plain SET body = NULL; UPDATE note_plain SET tenant = 'b'");
    assert_eq!(admin.text("SELECT n::text FROM note_plain n"), "(1,b,)");
}

#[test]
fn tables_that_others_inherit_from_are_refused() {
    let (_, mut admin) = database("inherit");
    admin.run(
        "CREATE TABLE parent (id int PRIMARY KEY, c bytea);
         SELECT rekey.register_column('parent', 'c');
         SELECT rekey.create_view('parent', 'v', 'pii');
         INSERT INTO v VALUES (1, 'one');
         CREATE TABLE child () INHERITS (parent);
         INSERT INTO child VALUES (1)",
    );
    for write in [
        "SELECT rekey.create_view('parent', 'v', 'pii')",
        "INSERT INTO v VALUES (2, 'two')",
        "UPDATE v SET c = 'other'",
        "DELETE FROM v",
    ] {
        admin.refuse(write, "55000").names("parent");
    }
    assert_eq!(admin.number("SELECT count(*) FROM parent"), 2);
    admin.run("DROP TABLE child; UPDATE v SET c = 'other'");
    assert_eq!(admin.text("SELECT c FROM v"), "other");
}

#[test]
fn the_primary_key_is_compared_as_its_index_does() {
    let (_, mut admin) = database("operator");
    // A type that pg_catalog has no equality for, as ltree.
    admin.run(
        "CREATE SCHEMA app;
         CREATE TYPE app.odd;
         CREATE FUNCTION app.odd_in(cstring) RETURNS app.odd
             LANGUAGE internal IMMUTABLE STRICT AS 'int4in';
         CREATE FUNCTION app.odd_out(app.odd) RETURNS cstring
             LANGUAGE internal IMMUTABLE STRICT AS 'int4out';
         CREATE TYPE app.odd (INPUT = app.odd_in, OUTPUT = app.odd_out, LIKE = int4);
         CREATE FUNCTION app.odd_cmp(app.odd, app.odd) RETURNS int
             LANGUAGE internal IMMUTABLE STRICT AS 'btint4cmp';
         CREATE FUNCTION app.odd_eq(app.odd, app.odd) RETURNS bool
             LANGUAGE internal IMMUTABLE STRICT AS 'int4eq';
         CREATE OPERATOR app.= (LEFTARG = app.odd, RIGHTARG = app.odd, FUNCTION = app.odd_eq);
         CREATE OPERATOR CLASS app.odd_ops DEFAULT FOR TYPE app.odd USING btree AS
             OPERATOR 3 app.=, FUNCTION 1 app.odd_cmp(app.odd, app.odd);
         CREATE DOMAIN app.odder AS app.odd;
         CREATE TABLE note (id app.odder, part varchar(3), c bytea, PRIMARY KEY (part, id));
         SELECT rekey.register_column('note', 'c');
         SELECT rekey.create_view('note', 'note_plain', 'pii');
         INSERT INTO note_plain VALUES ('1', 'a', 'one'), ('2', 'a', 'two'), ('3', 'a', 'three');
         UPDATE note_plain SET c = 'other' WHERE c = 'two';
         DELETE FROM note_plain WHERE c = 'three'",
    );
    assert_eq!(
        admin.column("SELECT c FROM note_plain ORDER BY id::text"),
        ["one", "other"]
    );
}

#[test]
fn the_privileges_of_whoever_asks_count_on_keys_and_table() {
    let (database, mut admin) = database("who");
    admin.run("INSERT INTO person (name, email) VALUES ('Ada', 'ada@example.org')");
    let app = database.role("app");
    let mut session = database.connect_as(&app);
    session.fail("SELECT * FROM person", "42501");
    admin.run(&format!(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON person TO {app}"
    ));
    session.fail("SELECT * FROM person", "42501");
    admin.run(&format!(
        "GRANT SELECT, INSERT, UPDATE ON customer TO {app}"
    ));
    session.refuse("SELECT * FROM person", "42501").names("pii");
    // What is not opened is there for whoever may read the table.
    assert_eq!(session.text("SELECT name FROM person"), "Ada");
    session.refuse(
        "INSERT INTO person (name, email) VALUES ('x', 'y')",
        "42501",
    );
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{app}', '{{encrypt}}')"
    ));
    session.run("INSERT INTO person (name, email) VALUES ('x', 'y')");
    admin.run(&format!(
        "SELECT rekey.grant_key('pii', '{app}', '{{decrypt}}')"
    ));
    session.run("UPDATE person SET email = 'z' WHERE name = 'x'");
    session.fail("DELETE FROM person", "42501");
    assert_eq!(session.number("SELECT count(email) FROM person"), 2);
    // Row security of the table holds through the view.
    admin.run(&format!(
        "ALTER TABLE customer ENABLE ROW LEVEL SECURITY;
         CREATE POLICY only_x ON customer TO {app} USING (name = 'x')"
    ));
    assert_eq!(session.column("SELECT email FROM person"), ["z"]);
    session.fail("INSERT INTO person (name) VALUES ('not x')", "42501");
}

#[test]
fn triggers_of_the_table_fire_and_may_change_or_suppress_the_row() {
    let (_, mut admin) = database("triggers");
    admin.run(
        "CREATE SCHEMA app; CREATE TABLE app.log (what text);
         CREATE FUNCTION app.touch() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF NEW.name = 'nobody' THEN RETURN NULL; END IF;
             INSERT INTO log VALUES (TG_OP);  -- found by the search path of the session
             NEW.status := 'touched';
             RETURN NEW;
         END $$;
         CREATE TRIGGER touch BEFORE INSERT OR UPDATE ON customer
             FOR EACH ROW EXECUTE FUNCTION app.touch();
         SET search_path = public, app",
    );
    assert_eq!(
        admin.text("INSERT INTO person (name, email) VALUES ('Ada', 'a') RETURNING status"),
        "touched"
    );
    assert!(
        admin
            .rows("INSERT INTO person (name) VALUES ('nobody') RETURNING id")
            .is_empty()
    );
    admin.run("UPDATE person SET name = name");
    assert_eq!(admin.column("SELECT what FROM log"), ["INSERT", "UPDATE"]);
    // A trigger that changes what the context is made of would leave a value that does not open.
    admin.run(
        "CREATE TABLE note (id int PRIMARY KEY, body bytea);
         SELECT rekey.register_column('note', 'body', 'id');
         SELECT rekey.create_view('note', 'note_plain', 'pii');
         CREATE FUNCTION app.renumber() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN NEW.id := 7; RETURN NEW; END';
         CREATE TRIGGER renumber BEFORE INSERT ON note
             FOR EACH ROW EXECUTE FUNCTION app.renumber()",
    );
    admin
        .refuse("INSERT INTO note_plain VALUES (1, 'one')", "55000")
        .names("body");
    admin.run("INSERT INTO note_plain VALUES (1, NULL)");
}

#[test]
fn a_change_that_somebody_else_has_made_meanwhile_is_not_overwritten() {
    let (database, mut admin) = database("race");
    admin.run("INSERT INTO person (name, salary) VALUES ('Ada', 100)");
    let mut second = database.connect();
    // The same column: not lost.
    let lost = race(
        &database,
        &mut admin,
        "UPDATE person SET salary = salary + 1",
        "UPDATE person SET salary = salary + 10",
    );
    assert_eq!(lost.expect_err("a refusal").code, "40001");
    assert_eq!(admin.number("SELECT salary FROM person"), 101);
    // Another column: both hold.
    race(
        &database,
        &mut admin,
        "UPDATE person SET salary = 5",
        "UPDATE person SET status = 'b'",
    )
    .expect("no conflict");
    assert_eq!(admin.text("SELECT status || salary FROM person"), "b5");
    // Re-encryption meanwhile is no change of the value.
    admin.run("SELECT rotate_key('pay')");
    second.run("BEGIN ISOLATION LEVEL READ COMMITTED");
    let old = second.text("SELECT salary FROM person");
    assert_eq!(old, "5");
    admin.run("CALL rekey.reencrypt('customer')");
    second.run("UPDATE person SET salary = 6; COMMIT");
    assert_eq!(admin.number("SELECT salary FROM person"), 6);
    // A row that is gone counts as none.
    let delete = "DELETE FROM person";
    race(&database, &mut admin, delete, delete).expect("nothing left to do");
}

#[test]
fn renames_and_quoted_names_are_followed() {
    let (_, mut admin) = database("names");
    admin.run(
        "CREATE SCHEMA \"my app\";
         CREATE TYPE \"my app\".\"mood; DROP\" AS ENUM ('good', 'bad');
         CREATE TABLE \"my app\".\"t'\"\"x\" (
             \"the id\" int, gone int, \"sel\"\"ect'\" bytea, \"Where\" bytea,
             \"dé\" text DEFAULT E'it''s \\\\ here', PRIMARY KEY (\"the id\"));
         ALTER TABLE \"my app\".\"t'\"\"x\" DROP gone;
         SELECT rekey.create_key($$k'\\ \"$$);
         SELECT rekey.register_column('\"my app\".\"t''\"\"x\"', $$sel\"ect'$$, $$\"the id\"$$);
         SELECT rekey.register_column('\"my app\".\"t''\"\"x\"', 'Where');
         SELECT rekey.create_view('\"my app\".\"t''\"\"x\"', $$\"V'; DROP TABLE customer\"$$,
             $$k'\\ \"$$,
             '{\"Where\": {\"type\": \"\\\"my app\\\".\\\"mood; DROP\\\"\"}}');
         SET search_path = \"my app\", public;
         CREATE VIEW v AS SELECT * FROM \"V'; DROP TABLE customer\"",
    );
    let insert =
        "INSERT INTO \"V'; DROP TABLE customer\" VALUES (1, 'it''s', 'bad') RETURNING \"dé\"";
    assert_eq!(admin.text(insert), "it's \\ here");
    admin.run(
        "ALTER TABLE \"t'\"\"x\" RENAME \"sel\"\"ect'\" TO plain;
         ALTER TABLE \"t'\"\"x\" RENAME \"the id\" TO id;
         ALTER TABLE \"t'\"\"x\" RENAME TO renamed;
         UPDATE \"V'; DROP TABLE customer\" SET \"sel\"\"ect'\" = 'followed', \"Where\" = 'good'",
    );
    assert_eq!(
        admin.text("SELECT v::text FROM v"),
        "(1,followed,good,\"it's \\\\ here\")"
    );
    assert_eq!(
        admin.text("SELECT decrypt_col(plain, '1') FROM renamed"),
        "followed"
    );
}

#[test]
fn views_are_made_anew_after_a_change_of_the_table_and_keep_their_grants() {
    let (database, mut admin) = database("anew");
    let app = database.role("app");
    admin.run(&format!(
        "GRANT SELECT ON person TO {app};
         ALTER TABLE customer ADD phone bytea, ADD note text DEFAULT 'n',
             ALTER status SET DEFAULT 'newer';
         SELECT rekey.register_column('customer', 'phone')"
    ));
    // Until then the new columns have the defaults of the table.
    admin.run("INSERT INTO person (name) VALUES ('before')");
    admin.run(
        "SELECT rekey.create_view('customer', 'person', 'pii',
             columns => '{\"salary\": {\"type\": \"numeric\", \"key\": \"pay\"}}');
         INSERT INTO person (name, phone) VALUES ('after', '123')",
    );
    assert_eq!(
        admin.column("SELECT p::text FROM person p ORDER BY id"),
        [
            "(1,before,,,new,BEFORE,,n)",
            "(2,after,,,newer,AFTER,123,n)"
        ]
    );
    assert!(admin.truth(&format!(
        "SELECT has_table_privilege('{app}', 'person', 'SELECT')"
    )));
}

#[test]
fn a_dump_and_a_restore_keep_the_view_working() {
    let (_, mut admin) = database("dumped");
    admin.run(
        "ALTER TABLE customer ADD gone int, ADD last text; ALTER TABLE customer DROP gone;
         SELECT rekey.create_view('customer', 'person', 'pii',
             columns => '{\"salary\": {\"type\": \"numeric\", \"key\": \"pay\"}}');
         INSERT INTO person (name, email, salary) VALUES ('Ada', 'ada@example.org', 2)",
    );
    let cluster = cluster();
    let dump = cluster.tool("pg_dump", &["-d", &cluster.conninfo("dumped")]);
    cluster.empty_database("dumped_2", "");
    let file = cluster.dir().join("dumped.sql");
    cluster.write_file(&file, dump.as_bytes(), 0o644);
    let (file, target) = (file.display().to_string(), cluster.conninfo("dumped_2"));
    let stop = "ON_ERROR_STOP=1";
    cluster.tool(
        "psql",
        &["-X", "-q", "-v", stop, "-d", &target, "-f", &file],
    );
    let mut admin = cluster.connect("dumped_2");
    admin.run(
        "INSERT INTO person (name, email, salary) VALUES ('Bob', 'bob@example.org', 3);
         UPDATE person SET email = 'new', last = 'l' WHERE name = 'Ada'",
    );
    assert_eq!(
        admin.column(ROWS),
        [
            "(1,Ada,new,2,new,ADA,l)",
            "(2,Bob,bob@example.org,3,new,BOB,)"
        ]
    );
    assert_eq!(
        admin.column("SELECT DISTINCT (rekey.describe(salary)).key_name FROM customer"),
        ["pay"]
    );
}

#[test]
fn what_create_view_refuses() {
    let (database, mut admin) = database("refused");
    let app = database.role("app");
    admin.run(
        "CREATE TABLE plain (id int PRIMARY KEY, c bytea);
         CREATE TABLE keyless (id int, c bytea);
         CREATE TABLE taken ();
         SELECT rekey.register_column('keyless', 'c')",
    );
    let create = |arguments: &str| format!("SELECT rekey.create_view({arguments})");
    admin
        .refuse(&create("'plain', 'v'"), "55000")
        .hints("register_column");
    admin
        .refuse(&create("'keyless', 'v'"), "55000")
        .hints("PRIMARY KEY");
    admin.refuse(&create("'customer', 'taken'"), "42P07");
    admin.refuse(&create("'customer', 'a.b.c'"), "22023");
    admin
        .refuse(&create("'customer', 'v', 'nobody'"), "42704")
        .names("nobody");
    for (columns, code) in [
        ("[]", "22023"),
        ("{\"email\": \"text\"}", "22023"),
        ("{\"email\": {\"type\": 1}}", "22023"),
        ("{\"email\": {\"kind\": \"text\"}}", "22023"),
        ("{\"email\": {\"type\": \"nothing\"}}", "42704"),
        (
            "{\"email\": {\"type\": \"int); DROP TABLE customer; --\"}}",
            "42704",
        ),
        ("{\"email\": {\"type\": \"money\"}}", "22023"),
        ("{\"name\": {\"type\": \"text\"}}", "42703"),
    ] {
        admin.refuse(
            &create(&format!("'customer', 'v', columns => '{columns}'")),
            code,
        );
    }
    admin.refuse(&create("NULL, 'v'"), "22004");
    admin
        .refuse("SELECT rekey.write_view()", "55000")
        .hints("create_view");
    let mut app = database.connect_as(&app);
    app.refuse(&create("'customer', 'v'"), "42501");
    // Attached by hand to another view, the trigger does nothing that it does not understand.
    admin.run(
        "CREATE VIEW mine AS SELECT id, upper(name) AS name FROM customer;
         CREATE TRIGGER t INSTEAD OF INSERT ON mine
             FOR EACH ROW EXECUTE FUNCTION rekey.write_view()",
    );
    admin
        .refuse("INSERT INTO mine VALUES (1, 'x')", "55000")
        .names("mine");
}

#[test]
fn on_conflict_is_as_the_documents_say() {
    let (_, mut admin) = database("conflict");
    admin.run(
        "CREATE UNIQUE INDEX ON customer (name);
         INSERT INTO person (name) VALUES ('Ada')",
    );
    admin.fail(
        "INSERT INTO person (name) VALUES ('Ada') ON CONFLICT (name) DO NOTHING",
        "42P10",
    );
    admin.fail(
        "INSERT INTO person (name) VALUES ('Ada') ON CONFLICT DO NOTHING",
        "23505",
    );
}

#[test]
fn partitioned_tables_have_views_too() {
    let (_, mut admin) = database("partitions");
    admin.run(
        "CREATE TABLE p (id int, region text, c bytea, PRIMARY KEY (region, id))
             PARTITION BY LIST (region);
         CREATE TABLE p_eu PARTITION OF p FOR VALUES IN ('eu');
         CREATE TABLE p_us (c bytea, id int NOT NULL, region text NOT NULL);
         ALTER TABLE p ATTACH PARTITION p_us FOR VALUES IN ('us');
         SELECT rekey.register_column('p', 'c', $$rekey.context('p.c', region, id::text)$$);
         SELECT rekey.create_view('p', 'v', 'pii');
         INSERT INTO v VALUES (1, 'eu', 'one'), (2, 'us', 'two');
         UPDATE v SET region = 'us' WHERE id = 1",
    );
    assert_eq!(admin.column("SELECT c FROM v ORDER BY id"), ["one", "two"]);
    assert_eq!(admin.number("SELECT count(*) FROM p_us"), 2);
}

#[test]
fn a_row_that_is_touched_through_the_view_is_opened_after_a_rotation_in_the_middle() {
    let (_, mut admin) = database("rotation");
    admin
        .run("INSERT INTO person (name, email) SELECT 'n', 'e' || i FROM generate_series(1, 50) i");
    admin.run("SELECT rotate_key('pii'); UPDATE person SET email = 'x' || email WHERE id <= 25");
    admin.run("CALL rekey.reencrypt()");
    admin.run("UPDATE person SET status = 's'");
    assert_eq!(
        admin.number(
            "SELECT count(*) FROM person \
              WHERE email = CASE WHEN id <= 25 THEN 'x' ELSE '' END || 'e' || id"
        ),
        50
    );
}

#[test]
fn values_do_not_reach_the_log_when_a_write_fails() {
    let (_, mut admin) = database("log");
    admin.run("ALTER TABLE customer ADD CHECK (name <> 'forbidden')");
    admin.fail(
        "INSERT INTO person (name, email) VALUES ('forbidden', 'secret-of-the-log-test')",
        "23514",
    );
    wait_until("the failure is logged", || {
        cluster().log().contains("customer_name_check")
    });
    assert!(!cluster().log().contains("secret-of-the-log-test"));
}
