//! Server encodings: envelopes hold UTF-8 whatever the server uses, and what cannot be is 22021.
//!
//! A UTF-8 database is dumped into a LATIN1 one, as happens in migrations: the only way in which one
//! slot is met under two encodings. Also values near the limits of a field.

use std::sync::OnceLock;

use rekey_tests::{Ask, Cluster, Database, Options, long_runs};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::unloaded()))
}

fn database(name: &str, encoding: &str) -> Database<'static> {
    let options = format!("ENCODING '{encoding}' LOCALE 'C'");
    cluster().empty_database(name, &options)
}

#[test]
fn latin1_text_is_utf8_in_the_envelope() {
    let database = database("latin", "LATIN1");
    database.install();
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('clé')");
    assert_eq!(
        client.number("SELECT octet_length('é'::text)"),
        1,
        "one byte on the server"
    );
    assert_eq!(
        client.number("SELECT octet_length(encrypt_col('é', 'clé'))"),
        52
    );
    assert_eq!(
        client.text("SELECT decrypt_col(encrypt_col('été', 'clé', 'à'), 'à')"),
        "été"
    );
    assert!(
        client.truth(
            "SELECT decrypt_col_as(encrypt_col(ARRAY['é'], 'clé'), NULL::text[]) = ARRAY['é']"
        )
    );
    assert_eq!(client.text("SELECT key_name FROM rekey.keys"), "clé");
    assert_eq!(
        client.text("SELECT rekey.context('é')"),
        "2:é,",
        "UTF-8 lengths"
    );
}

/// A notice that is no text of the server's encoding would fail on its way to the client.
#[test]
fn notices_name_keys_in_the_servers_encoding() {
    let database = database("japanese", "EUC_JP");
    database.install();
    let mut client = database.connect();
    let create = "SELECT rekey.create_key('鍵', if_not_exists => true)";
    let slot = client.number(create);
    assert_eq!(client.number(create), slot, "kept, with a notice");
    client.run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE 表 (名 text); INSERT INTO 表 VALUES ('山')",
    );
    client.run("SELECT rekey.encrypt_column('表', '名', '封', 'pii')");
    client.run("CALL rekey.reencrypt()");
    client.run("SELECT rekey.finish_encrypt_column('表', '名')");
    assert_eq!(client.text("SELECT decrypt_col(封) FROM 表"), "山");
}

#[test]
fn an_envelope_opens_under_another_server_encoding() {
    let utf8 = cluster().database("wide");
    let mut client = utf8.connect();
    client.run(
        "SELECT rekey.create_key('clé');
         CREATE TABLE t (id int, c bytea);
         INSERT INTO t VALUES (1, encrypt_col('été', 'clé')), (2, encrypt_col('5 €', 'clé')),
             (3, encrypt_col('bound', 'clé', 'à')), (4, encrypt_col(ARRAY['€'], 'clé')),
             (5, encrypt_col('\\xe282ac'::bytea, 'clé'))",
    );
    let narrow = database("narrow", "LATIN1");
    let file = cluster().dir().join("wide.sql");
    let file = file.to_str().expect("a path in UTF-8");
    cluster().tool("pg_dump", &["-d", "wide", "-f", file]);
    cluster().tool(
        "psql",
        &[
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            "narrow",
            "-f",
            file,
        ],
    );
    let mut client = narrow.connect();
    assert_eq!(
        client.text("SELECT decrypt_col(c) FROM t WHERE id = 1"),
        "été"
    );
    assert_eq!(
        client.text("SELECT decrypt_col(c, 'à') FROM t WHERE id = 3"),
        "bound"
    );
    assert_eq!(
        client.text("SELECT decrypt_col(c) FROM t WHERE id = 5"),
        "\\xe282ac"
    );
    client.refuse("SELECT decrypt_col(c) FROM t WHERE id = 2", "22021");
    client.refuse("SELECT decrypt_col(c) FROM t WHERE id = 4", "22021");
    client.refuse(
        "SELECT decrypt_col_as(c, NULL::text[]) FROM t WHERE id = 4",
        "22021",
    );
    assert!(!client.truth("SELECT rekey.can_open(c, '') FROM t WHERE id = 2"));
}

#[test]
fn invalid_utf8_under_sql_ascii_is_refused_before_it_is_sealed() {
    let database = database("ascii", "SQL_ASCII");
    database.install();
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('pii')");
    assert_eq!(
        client.text("SELECT decrypt_col(encrypt_col('naïve', 'pii'))"),
        "naïve"
    );
    client.refuse("SELECT encrypt_col(E'\\xff\\xfe', 'pii')", "22021");
    client.refuse("SELECT encrypt_col(E'caf\\xe9', 'pii')", "22021");
    client.refuse("SELECT encrypt_col('x', 'pii', E'\\xe9')", "22021");
    client.refuse("SELECT encrypt_col(ARRAY[E'\\xe9'], 'pii')", "22021");
    client.refuse("SELECT rekey.create_key(E'\\xe9')", "22021");
    client.refuse(
        "SELECT decrypt_col(encrypt_col('x', 'pii', 'a'), E'\\xe9')",
        "22021",
    );
    assert_eq!(
        client.text("SELECT decrypt_col(encrypt_col('\\xff'::bytea, 'pii'))"),
        "\\xff",
        "bytes are bytes"
    );
}

#[test]
fn a_value_that_leaves_no_room_for_the_envelope_is_refused() {
    let database = cluster().database("huge");
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('pii')");
    let fits_no_more = "repeat('x', 1073741823 - 4 - 49)";
    client.refuse(
        &format!("SELECT length(encrypt_col({fits_no_more}, 'pii'))"),
        "54000",
    );
    assert_eq!(
        client.text("SELECT decrypt_col(encrypt_col('still here', 'pii'))"),
        "still here"
    );
}

#[test]
fn a_result_over_one_gigabyte_is_refused() {
    if !long_runs() {
        return;
    }
    let database = cluster().database("huge_result");
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('pii')");
    // One pass only: a debug build seals a few megabytes per second.
    client.run("CREATE TABLE t AS SELECT encrypt_col(repeat('x', 540000000)::bytea, 'pii') AS c");
    client.refuse("SELECT length(decrypt_col(c)) FROM t", "54000");
    assert!(!client.truth("SELECT rekey.can_open(c, '') FROM t"));
}
