//! What must never be seen: values in logs and errors, keys anywhere outside the keyring.
//!
//! A canary is sealed, opened, mistyped and violated against in every way that makes PostgreSQL
//! quote a statement; then the server's log and all error texts are searched for it, and for every
//! key, in raw, hexadecimal and base64 form.

use std::fs;
use std::path::Path;

use postgres::Client;
use rekey_core::envelope::SlotId;
use rekey_core::root_keyring::RootKeyring;
use rekey_tests::bytes::{base64, hex, unhex};
use rekey_tests::{Ask, Cluster, Options};

const CANARY: &str = "CANARY-4f9d1c";

fn options(preload: bool) -> Options {
    let options = if preload {
        Options::preloaded()
    } else {
        Options::unloaded()
    };
    options
        .set("log_min_error_statement = error")
        .set("log_statement = none")
}

/// Tables on which statements with the canary fail.
fn schema(client: &mut Client) {
    client.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t (id int PRIMARY KEY, c bytea NOT NULL);
         INSERT INTO t VALUES (1, encrypt_col('harmless', 'pii'));
         CREATE TABLE via (id int PRIMARY KEY, plain text, c bytea);
         CREATE FUNCTION seal_plain() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN NEW.c := encrypt_col(NEW.plain, 'pii'); NEW.plain := NULL; RETURN NEW; END $$;
         CREATE TRIGGER seal BEFORE INSERT ON via FOR EACH ROW EXECUTE FUNCTION seal_plain();
         INSERT INTO via VALUES (1, 'harmless');
         CREATE FUNCTION store(text) RETURNS void LANGUAGE plpgsql AS $$
             BEGIN INSERT INTO t VALUES (1, encrypt_col($1, 'pii')); END $$;
         CREATE FUNCTION keep(text) RETURNS bytea LANGUAGE sql
             AS $$ SELECT encrypt_col($1, 'pii') $$;
         CREATE TYPE mood AS ENUM ('CANARY-4f9d1c', 'calm');
         CREATE TABLE moods AS SELECT encrypt_col('CANARY-4f9d1c'::mood, 'pii') AS c;
         ALTER TYPE mood RENAME VALUE 'CANARY-4f9d1c' TO 'other';
         CREATE FUNCTION picky(text) RETURNS boolean LANGUAGE plpgsql STRICT AS $$
             BEGIN RAISE EXCEPTION 'no: %', $1 USING ERRCODE = 'ZZ009', DETAIL = $1, HINT = $1;
             END $$;
         CREATE DOMAIN choosy AS text CHECK (picky(VALUE));
         CREATE TYPE box2 AS (a text);
         CREATE TYPE box3 AS (b text);
         CREATE FUNCTION unbox(box2) RETURNS box3 LANGUAGE plpgsql STRICT AS $$
             BEGIN RAISE EXCEPTION 'no: %', $1.a USING ERRCODE = 'ZZ010'; END $$;
         CREATE CAST (box2 AS box3) WITH FUNCTION unbox(box2) AS ASSIGNMENT",
    );
}

/// Statements that fail, and the SQLSTATE of each.
fn failures() -> Vec<(String, &'static str)> {
    let canary = format!("'{CANARY}'");
    let seal = format!("encrypt_col({canary}, 'pii')");
    vec![
        (format!("INSERT INTO t VALUES (1, {seal})"), "23505"),
        (format!("INSERT INTO t VALUES (NULL, {seal})"), "23502"),
        (format!("INSERT INTO via VALUES (1, {canary})"), "23505"),
        (format!("SELECT store({canary})"), "23505"),
        (
            format!("DO $$ BEGIN PERFORM store({canary}); END $$"),
            "23505",
        ),
        (
            format!("DO $$ BEGIN INSERT INTO t VALUES (1, {seal}); END $$"),
            "23505",
        ),
        (
            format!(
                "PREPARE p AS INSERT INTO t VALUES ($1, encrypt_col($2, 'pii')); \
            EXECUTE p(1, {canary})"
            ),
            "23505",
        ),
        (format!("SELECT {seal}, 1 / (random() * 0)::int"), "22012"),
        (format!("SELECT keep({canary}); SELECT 1 / 0"), "22012"),
        (
            format!("DO $$ BEGIN EXECUTE $q$ SELEC encrypt_col({canary}, 'pii') $q$; END $$"),
            "42601",
        ),
        (format!("SELECT encrypt_col({canary}, 'nope')"), "42704"),
        (format!("SELECT encrypt_col({canary}, NULL)"), "22004"),
        (format!("SELECT encrypt_col(ROW({canary}), 'pii')"), "22023"),
        (format!("SELECT decrypt_col_as({seal}, NULL::int)"), "42804"),
        (format!("SELECT decrypt_col({seal}, 'pii')"), "22023"),
        (format!("SELECT decrypt_col({canary}::bytea)"), "22P03"),
        (
            format!("SELECT decrypt_col_as({seal}, NULL::choosy)"),
            "ZZ009",
        ),
        (
            "SELECT decrypt_col_as(c, NULL::mood) FROM moods".to_owned(),
            "22P02",
        ),
        (
            format!("SELECT decrypt_col_as(encrypt_col(ROW({canary})::box2, 'pii'), NULL::box3)"),
            "ZZ010",
        ),
        (format!("SELECT encrypt_col({canary}, 1, 2, 3, 4)"), "42883"),
        (format!("SELECT ENCRYPT_COL({canary}, 1, 2, 3, 4)"), "42883"),
        (format!("SELECT \"Encrypt_Col\"({canary})"), "42883"),
        (format!("SELEC encrypt_col({canary}, 'pii')"), "42601"),
        (
            format!("SELECT encrypt_col({canary}, 'pii'), pg_sleep(100)"),
            "57014",
        ),
    ]
}

/// Only what is to run into it has a limit: others may be slow.
fn limit(client: &mut Client, code: &str) {
    let limit = if code == "57014" { "200ms" } else { "0" };
    client.run(&format!("SET statement_timeout = '{limit}'"));
}

/// Runs all of them; no text that reaches the client or the log may hold the canary.
fn search(client: &mut Client, cluster: &Cluster) {
    for (sql, code) in failures() {
        limit(client, code);
        let before = cluster.log().len();
        let refusal = client.fail(&sql, code);
        client.run("DEALLOCATE ALL");
        assert!(
            !refusal.text().contains(CANARY),
            "{sql} tells the client: {refusal:?}"
        );
        let log = cluster.log()[before..].to_owned();
        assert!(log.contains("ERROR:"), "the error itself is logged: {log}");
        assert!(
            !log.contains(CANARY),
            "{sql} shows the value in the log:\n{log}"
        );
    }
}

#[test]
fn with_preload_no_value_reaches_the_log_or_an_error() {
    let cluster = Cluster::start(options(true));
    let mut client = cluster.database("app").connect();
    schema(&mut client);
    search(&mut client, &cluster);
    for (sql, code) in failures() {
        let before = cluster.log().len();
        let mut fresh = cluster.connect("app");
        limit(&mut fresh, code);
        fresh.fail(&sql, code);
        let log = cluster.log()[before..].to_owned();
        assert!(!log.contains(CANARY), "{sql} in a fresh session:\n{log}");
    }
}

#[test]
fn without_preload_none_does_once_the_library_is_loaded() {
    let cluster = Cluster::start(options(false));
    let mut client = cluster.database("app").connect();
    schema(&mut client);
    search(&mut client, &cluster);
    assert!(!cluster.log().contains(CANARY));
}

/// The application still writes the old column: its statements have the values that are sealed.
#[test]
fn a_statement_whose_value_a_live_column_seals_is_kept_out_of_the_log() {
    let cluster = Cluster::start(options(true).set("rekey.worker = off"));
    let mut client = cluster.database("app").connect();
    client.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE live (id int PRIMARY KEY, plain text);
         INSERT INTO live VALUES (1, 'harmless');
         SELECT rekey.encrypt_column('live', 'plain', 'sealed', 'pii')",
    );
    client.fail(&format!("INSERT INTO live VALUES (1, '{CANARY}')"), "23505");
    client.run(&format!("INSERT INTO live VALUES (2, '{CANARY}')"));
    client.fail(
        &format!("UPDATE live SET id = 1, plain = '{CANARY} too' WHERE id = 2"),
        "23505",
    );
    let log = cluster.log();
    assert!(log.contains("live_pkey"), "{log}");
    assert!(!log.contains(CANARY), "{log}");
}

#[test]
fn other_statements_are_logged_as_before() {
    let cluster = Cluster::start(options(true));
    let mut client = cluster.database("app").connect();
    schema(&mut client);
    client.run("SELECT encrypt_col('x', 'pii')");
    client.fail("SELECT 'a visible marker', 1 / 0", "22012");
    assert!(
        cluster
            .log()
            .contains("STATEMENT:  SELECT 'a visible marker', 1 / 0")
    );
    client.fail(
        "SELECT import_key, 1 / 0 FROM (SELECT 'of others' AS import_key) AS t",
        "22012",
    );
    assert!(cluster.log().contains("STATEMENT:  SELECT import_key"));
    client.fail("SELECT encrypt_col('x', 'nope')", "42704");
    client.fail("SELECT 'another marker', 1 / 0", "22012");
    assert!(
        cluster
            .log()
            .contains("STATEMENT:  SELECT 'another marker', 1 / 0")
    );
}

#[test]
fn a_value_is_in_no_error_context_that_the_client_sees() {
    let cluster = Cluster::start(options(true));
    let mut client = cluster.database("app").connect();
    schema(&mut client);
    let sql = "SELECT decrypt_col_as(c, NULL::mood) FROM moods";
    let error = client.simple_query(sql).expect_err("the label is gone");
    let error = error.as_db_error().expect("the server's error");
    assert!(!format!("{error:?}").contains(CANARY), "{error:?}");
}

#[test]
fn a_deadlock_report_does_not_quote_a_sealing_statement() {
    let cluster = Cluster::start(options(true).set("deadlock_timeout = '50ms'"));
    let mut one = cluster.database("app").connect();
    schema(&mut one);
    let mut two = cluster.connect("app");
    one.run("BEGIN; SELECT pg_advisory_xact_lock(1)");
    two.run("BEGIN; SELECT pg_advisory_xact_lock(2)");
    let wait =
        |key: i32| format!("SELECT encrypt_col('{CANARY}', 'pii'), pg_advisory_xact_lock({key})");
    std::thread::scope(|scope| {
        let (first, second) = (wait(2), wait(1));
        let other = scope.spawn(move || one.attempt(&first).err());
        let mine = two.attempt(&second).err();
        drop(two);
        let victim = mine
            .or(other.join().expect("the other session"))
            .expect("a victim");
        assert_eq!(victim.code, "40P01");
        assert!(!victim.text().contains(CANARY), "{victim:?}");
    });
    let log = cluster.log();
    assert!(log.contains("deadlock detected"), "{log}");
    assert!(!log.contains(CANARY), "{log}");
}

/// Starts a sealing statement that would last, ends its backend, and returns the log.
fn log_of_ended_statement(cluster: &Cluster, end: impl FnOnce(&mut Client, i64)) -> String {
    let mut admin = cluster.database("app").connect();
    schema(&mut admin);
    let mut victim = cluster.connect("app");
    let pid = victim.number("SELECT pg_backend_pid()");
    std::thread::scope(|scope| {
        let sql = format!("SELECT encrypt_col('{CANARY}', 'pii'), pg_sleep(100)");
        let running = scope.spawn(move || victim.batch_execute(&sql).is_err());
        rekey_tests::wait_until("the statement sleeps", || {
            admin.truth(&format!(
                "SELECT wait_event IS NOT DISTINCT FROM 'PgSleep' \
                 FROM pg_stat_activity WHERE pid = {pid}"
            ))
        });
        end(&mut admin, pid);
        assert!(
            running.join().expect("the running statement"),
            "it was ended"
        );
    });
    cluster.log()
}

#[test]
fn the_end_of_a_session_does_not_quote_its_sealing_statement() {
    let cluster = Cluster::start(options(true));
    let log = log_of_ended_statement(&cluster, |admin, pid| {
        assert!(admin.truth(&format!("SELECT pg_terminate_backend({pid})")));
    });
    assert!(log.contains("terminating connection"), "{log}");
    assert!(!log.contains(CANARY), "{log}");
}

#[test]
fn a_crash_report_does_not_quote_a_sealing_statement() {
    let cluster = Cluster::start(options(true));
    let log = log_of_ended_statement(&cluster, |_, pid| {
        cluster.kill_backend(pid);
        rekey_tests::wait_until("the crash is reported", || {
            cluster.log().contains("was terminated by signal 9")
        });
        rekey_tests::wait_until("the server has restarted", || {
            cluster
                .log()
                .matches("database system is ready to accept connections")
                .count()
                == 2
        });
    });
    assert!(log.contains("was terminated by signal 9"), "{log}");
    assert!(!log.contains(CANARY), "{log}");
}

/// The forms in which key bytes might be written somewhere.
fn forms(key: &[u8]) -> Vec<Vec<u8>> {
    vec![
        key.to_vec(),
        hex(key).into_bytes(),
        hex(key).to_uppercase().into_bytes(),
        base64(key).trim_end_matches('=').into(),
    ]
}

/// All files below a folder.
fn files(folder: &Path, found: &mut Vec<Vec<u8>>) {
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else if path.is_file() {
            found.push(fs::read(&path).expect("a file"));
        }
    }
}

/// Which of the needles occur: one pass, a table of first byte pairs, since debug builds are slow.
fn found<'a>(content: &[u8], needles: &'a [Vec<u8>]) -> Vec<&'a [u8]> {
    let mut starts = vec![false; 1 << 16];
    for needle in needles {
        starts[usize::from(needle[0]) << 8 | usize::from(needle[1])] = true;
    }
    let (mut pair, mut hits) = (0, Vec::new());
    for (end, byte) in content.iter().enumerate() {
        pair = (pair << 8 | usize::from(*byte)) & 0xFFFF;
        if end > 0 && starts[pair] {
            let rest = &content[end - 1..];
            hits.extend(
                needles
                    .iter()
                    .filter(|n| rest.starts_with(n))
                    .map(Vec::as_slice),
            );
        }
    }
    hits
}

#[test]
fn keys_and_values_are_in_no_file_and_no_message_but_the_keyring() {
    for preload in [true, false] {
        let cluster = Cluster::start(options(preload));
        let mut client = cluster.database("app").connect();
        client.run("SELECT rekey.create_key('pii'); CREATE TABLE t (c bytea)");
        client.run(&format!(
            "INSERT INTO t VALUES (encrypt_col('{CANARY}', 'pii'))"
        ));
        client.run("SELECT rotate_key('pii'); UPDATE t SET c = encrypt_col(decrypt_col(c), 'pii')");
        let json = fs::read(cluster.root_key_file()).expect("the keyring");
        let ring = RootKeyring::parse(&json).expect("a keyring");
        let mut keys: Vec<Vec<u8>> = Vec::new();
        let text = String::from_utf8(json.clone()).expect("JSON");
        let label = text.find("\"key\"").expect("a key");
        let root = text[label + 5..].split('"').nth(1).expect("its hex");
        keys.push(unhex(root));
        for row in client.rows(
            "SELECT slot_id, key_name, encode(root_id, 'hex'), encode(wrapped_key, 'hex') \
             FROM rekey.slot_wrap JOIN rekey.key_slot USING (slot_id)",
        ) {
            let cell = |i: usize| row[i].clone().expect("a cell");
            let id = ring.ids().next().expect("a root id");
            assert_eq!(id.to_string(), cell(2));
            let slot = SlotId::from_i64(cell(0).parse().expect("a number")).expect("a slot id");
            let held = ring.get(&id).expect("the root key");
            let dek = held.unwrap(&unhex(&cell(3)), slot, &cell(1));
            keys.push(dek.expect("the slot's key unwraps").expose().to_vec());
        }
        assert_eq!(keys.len(), 3, "the root key and two slots");
        for (sql, code) in [
            ("SELECT rekey.create_key('pii')", "42710"),
            ("SELECT encrypt_col('x', 'nope')", "42704"),
            ("SELECT rekey.init_root_key()", "55000"),
            ("SELECT decrypt_col('\\xf901')", "22P03"),
        ] {
            let said = client.fail(sql, code).text();
            assert!(keys.iter().all(|key| !said.contains(&hex(key))), "{said}");
        }
        client.run("CHECKPOINT");
        cluster.stop("fast");
        let mut contents = vec![cluster.log().into_bytes()];
        files(&cluster.data(), &mut contents);
        let mut needles: Vec<Vec<u8>> = keys.iter().flat_map(|key| forms(key)).collect();
        needles.push(CANARY.as_bytes().to_vec());
        for content in &contents {
            let hits = found(content, &needles);
            assert!(hits.is_empty(), "on disk: {}", hits[0].escape_ascii());
        }
        assert_eq!(
            found(&json, &needles).len(),
            1,
            "the search finds what is there"
        );
    }
}

#[test]
fn a_damaged_keyring_is_not_quoted() {
    let cluster = Cluster::start(options(true));
    let mut client = cluster.database("app").connect();
    client.run("SELECT rekey.create_key('pii'); CREATE TABLE t AS SELECT encrypt_col('x','pii') c");
    let good = fs::read_to_string(cluster.root_key_file()).expect("the keyring");
    let label = good.find("\"key\"").expect("a key");
    let key = good[label + 5..]
        .split('"')
        .nth(1)
        .expect("its hex")
        .to_owned();
    let quoted = format!("\"{key}\"");
    for damaged in [
        format!("{{\"version\":{quoted},\"keys\":[]}}"),
        format!("{{\"version\":1,\"keys\":{quoted}}}"),
        good.replacen('{', &format!("{{{quoted}:1,"), 1),
        good.replace(&quoted, &format!("{quoted},\"{key}\":\"{key}\"")),
        good.replace(&quoted, &format!("\"{key}0\"")),
        good.replace(&quoted, &format!("[{quoted}]")),
        quoted.clone(),
        key.clone(),
        good.replace("\"key\"", &quoted),
    ] {
        let before = cluster.log().len();
        cluster.write_file(&cluster.root_key_file(), damaged.as_bytes(), 0o600);
        cluster.restart("fast");
        let mut client = cluster.connect("app");
        let refusal = client.refuse("SELECT decrypt_col(c) FROM t", "F0000");
        assert!(
            !refusal.text().contains(&key[..16]),
            "the error quotes the keyring"
        );
        assert!(
            !cluster.log()[before..].contains(&key[..16]),
            "the log quotes the keyring"
        );
    }
}
