//! Values of every type: what goes in comes out, whatever the session's settings are.
//!
//! Also which types are refused, and how decrypt_col_as casts. Overloads, contexts and bad input are
//! in `verbs.rs`, server encodings in `encodings.rs`.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options};

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded()))
}

fn session(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let mut client = database.connect();
    client.run("SELECT rekey.create_key('pii')");
    (database, client)
}

/// The flags byte of an envelope: suite 1, and the payload kind in the top two bits.
const TEXT: i64 = 0x01;
const BYTEA: i64 = 0x41;
const TYPED: i64 = 0x81;

#[test]
fn text_comes_back_unchanged() {
    let (_database, mut client) = session("text_back");
    for value in [
        "''",
        "'a'",
        "'naïve 🗝 ключ'",
        "repeat('long ', 200000)",
        "E'\\n\\t \\\\x41'",
    ] {
        let same = client.truth(&format!(
            "SELECT decrypt_col(encrypt_col({value}, 'pii')) = {value}"
        ));
        assert!(same, "{value}");
        let bytes = client.number(&format!(
            "SELECT octet_length(encrypt_col({value}, 'pii')) - octet_length({value})"
        ));
        assert_eq!(bytes, 50, "overhead of {value}");
    }
}

#[test]
fn stored_compressed_and_external_values_open() {
    let (_database, mut client) = session("toast_back");
    client.run(
        "CREATE TABLE t (id int, v text, c bytea);
         ALTER TABLE t ALTER v SET STORAGE EXTENDED;
         INSERT INTO t SELECT i, repeat(chr(64 + i), 100000 * i) FROM generate_series(1, 5) i;
         UPDATE t SET c = encrypt_col(v, 'pii', id::text)",
    );
    assert_eq!(
        client.number("SELECT count(*) FROM t WHERE decrypt_col(c, id::text) = v"),
        5
    );
}

#[test]
fn bytea_opens_to_its_hex_form_whatever_bytea_output_says() {
    let (_database, mut client) = session("bytea_back");
    for output in ["hex", "escape"] {
        client.run(&format!("SET bytea_output = {output}"));
        assert_eq!(
            client.text("SELECT decrypt_col(encrypt_col('\\x00ff41'::bytea, 'pii'))"),
            "\\x00ff41"
        );
        assert!(client.truth(
            "SELECT decrypt_col_as(encrypt_col('\\x00ff41'::bytea, 'pii'), NULL::bytea) \
             = '\\x00ff41'::bytea"
        ));
    }
}

/// Settings that change how values are written and read; each pair must be able to talk.
const STYLES: [&str; 4] = [
    "SET DateStyle = ISO; SET IntervalStyle = postgres; SET TimeZone = UTC; \
     SET extra_float_digits = 1; SET bytea_output = hex",
    "SET DateStyle = 'German, DMY'; SET IntervalStyle = sql_standard; \
     SET TimeZone = 'America/St_Johns'; SET extra_float_digits = -15; SET bytea_output = escape",
    "SET DateStyle = 'SQL, MDY'; SET IntervalStyle = iso_8601; SET TimeZone = 'Asia/Kathmandu'; \
     SET extra_float_digits = 0; SET bytea_output = escape",
    "SET DateStyle = 'Postgres, YMD'; SET IntervalStyle = postgres_verbose; \
     SET TimeZone = 'Pacific/Apia'; SET extra_float_digits = 3; SET bytea_output = hex",
];

/// Expressions whose value does not depend on those settings, with their types.
const TYPED_VALUES: [(&str, &str); 32] = [
    ("true", "boolean"),
    ("42", "int4"),
    ("(-32768)::int2", "int2"),
    ("9223372036854775807", "int8"),
    ("12345678901234567890.000100", "numeric"),
    ("'NaN'::numeric", "numeric"),
    ("0.1::float8 + 0.2::float8", "float8"),
    ("(1.1::float4 * 3)::float4", "float4"),
    ("'-Infinity'::float8", "float8"),
    ("'{\"a\": [1, 2.50, null], \"b\": \"ü\"}'::jsonb", "jsonb"),
    (
        "'2024-02-29 12:34:56.789012+05:30'::timestamptz",
        "timestamptz",
    ),
    ("'0044-03-15 12:00:00+00 BC'::timestamptz", "timestamptz"),
    ("'infinity'::timestamptz", "timestamptz"),
    ("'2024-03-04 05:06:07'::timestamp", "timestamp"),
    ("'2024-03-04'::date", "date"),
    ("'12:34:56.7'::time", "time"),
    ("'12:34:56.7+03'::timetz", "timetz"),
    (
        "make_interval(years => 1, months => 2, days => -3, hours => 4, secs => -5.6)",
        "interval",
    ),
    (
        "-make_interval(years => 1, days => 3, hours => 4)",
        "interval",
    ),
    ("'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid", "uuid"),
    ("'fe80::1/64'::inet", "inet"),
    ("B'10110'::varbit", "varbit"),
    ("ARRAY[1.10, NULL, 3]::numeric[]", "numeric[]"),
    ("'[0:1][2:3]={{1,2},{3,4}}'::int4[]", "int4[]"),
    ("ARRAY['\\x00ff'::bytea, NULL, ''::bytea]", "bytea[]"),
    ("ARRAY['a,b', 'c\"d', NULL, '']", "text[]"),
    (
        "ARRAY['2024-03-04 05:06:07+00'::timestamptz]",
        "timestamptz[]",
    ),
    (
        "tstzrange('2024-03-04 05:06:07+00'::timestamptz, NULL, '(]')",
        "tstzrange",
    ),
    ("'{[1,5), [7,9)}'::int4multirange", "int4multirange"),
    (
        "'sad'::\"Odd \"\"Schema\"\"\".\"Mixed, Case\"",
        "\"Odd \"\"Schema\"\"\".\"Mixed, Case\"",
    ),
    (
        "7::\"Odd \"\"Schema\"\"\".\"do.main\"",
        "\"Odd \"\"Schema\"\"\".\"do.main\"",
    ),
    (
        "ROW(0.1::float8 + 0.2::float8, '2024-03-04 05:06:07+00'::timestamptz, 'a,\"b')\
         ::\"Odd \"\"Schema\"\"\".\"Com posite\"",
        "\"Odd \"\"Schema\"\"\".\"Com posite\"",
    ),
];

const ODD_TYPES: &str = "CREATE SCHEMA \"Odd \"\"Schema\"\"\";
     CREATE TYPE \"Odd \"\"Schema\"\"\".\"Mixed, Case\" AS ENUM ('happy', 'sad');
     CREATE DOMAIN \"Odd \"\"Schema\"\"\".\"do.main\" AS int CHECK (VALUE > 0);
     CREATE TYPE \"Odd \"\"Schema\"\"\".\"Com posite\" AS (f float8, t timestamptz, x text)";

#[test]
fn typed_values_survive_any_mixture_of_output_settings() {
    let (_database, mut client) = session("styles");
    client.run(ODD_TYPES);
    client.run("CREATE TABLE t (i int, c bytea)");
    for (sealing, seal_style) in STYLES.iter().enumerate() {
        client.run(seal_style);
        for (i, (value, _)) in TYPED_VALUES.iter().enumerate() {
            client.run(&format!(
                "INSERT INTO t VALUES ({i}, encrypt_col({value}, 'pii'))"
            ));
        }
        let open_style = STYLES[(sealing + 1) % STYLES.len()];
        client.run(open_style);
        for (i, (value, of_type)) in TYPED_VALUES.iter().enumerate() {
            let same = client.truth(&format!(
                "SELECT bool_and(decrypt_col_as(c, NULL::{of_type}) = ({value})) \
                 AND count(*) = {} FROM t WHERE i = {i}",
                sealing + 1
            ));
            assert!(
                same,
                "{value}, sealed under {seal_style}, opened under {open_style}"
            );
        }
        let kinds = client.number("SELECT count(*) FROM t WHERE get_byte(c, 1) <> 129");
        assert_eq!(kinds, 0, "all of payload kind 2");
    }
}

#[test]
fn the_text_form_of_a_typed_value_is_the_same_under_all_settings() {
    let (_database, mut client) = session("text_form");
    let expected = [
        (
            "'2024-02-29 12:34:56.789012+05:30'::timestamptz",
            "2024-02-29 07:04:56.789012+00",
        ),
        ("'2024-03-04'::date", "2024-03-04"),
        (
            "make_interval(years => 1, months => 2, days => -3)",
            "1 year 2 mons -3 days",
        ),
        ("0.1::float8 + 0.2::float8", "0.30000000000000004"),
        ("ARRAY['\\x00ff'::bytea]", "{\"\\\\x00ff\"}"),
        ("1.50::numeric", "1.50"),
        ("true", "t"),
    ];
    for style in STYLES {
        client.run(style);
        let before =
            client.rows("SELECT current_setting('DateStyle'), current_setting('TimeZone')");
        for (value, text) in expected {
            let got = client.text(&format!("SELECT decrypt_col(encrypt_col({value}, 'pii'))"));
            assert_eq!(got, text, "{value} under {style}");
        }
        let after = client.rows("SELECT current_setting('DateStyle'), current_setting('TimeZone')");
        assert_eq!(before, after, "the session's settings are restored");
        let shown = client.text("SELECT '2024-03-04 05:06:07+00'::timestamptz::text");
        client.fail("SELECT encrypt_col(ROW(1, 2), 'pii')", "22023");
        client.fail("SELECT encrypt_col(1/(random() * 0)::int, 'pii')", "22012");
        let again = client.text("SELECT '2024-03-04 05:06:07+00'::timestamptz::text");
        assert_eq!(shown, again, "restored after an error as well");
    }
}

#[test]
fn text_like_types_are_sealed_as_text() {
    let (_database, mut client) = session("text_like");
    client.run("CREATE DOMAIN email AS text");
    let mut values = vec![
        "'x'",
        "'x'::varchar(9)",
        "'x'::char(5)",
        "'x'::name",
        "'x'::email",
    ];
    if client.truth("SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'citext')") {
        client.run("CREATE EXTENSION citext");
        values.push("'x'::citext");
    } else {
        eprintln!("this server has no citext: that type is not tried");
    }
    for value in values {
        let sealed = format!("encrypt_col({value}, 'pii')");
        assert_eq!(
            client.number(&format!("SELECT get_byte({sealed}, 1)")),
            TEXT,
            "{value}"
        );
        assert_eq!(
            client.text(&format!("SELECT decrypt_col({sealed})")),
            "x",
            "{value}"
        );
    }
    assert_eq!(
        client.number("SELECT get_byte(encrypt_col(''::bytea, 'pii'), 1)"),
        BYTEA
    );
    assert_eq!(
        client.number("SELECT get_byte(encrypt_col(1, 'pii'), 1)"),
        TYPED
    );
}

#[test]
fn text_and_bytea_passed_as_anyelement_keep_their_own_kinds() {
    let (_database, mut client) = session("by_any");
    client.run(
        "CREATE FUNCTION seal(v anyelement) RETURNS bytea LANGUAGE sql
           AS $$ SELECT encrypt_col(v, 'pii') $$;
         CREATE DOMAIN blob AS bytea",
    );
    assert_eq!(client.number("SELECT get_byte(seal('x'::text), 1)"), TEXT);
    assert_eq!(client.number("SELECT get_byte(seal('x'::bytea), 1)"), BYTEA);
    assert_eq!(
        client.number("SELECT get_byte(encrypt_col('x'::blob, 'pii'), 1)"),
        BYTEA
    );
    assert_eq!(client.text("SELECT decrypt_col(seal('x'::text))"), "x");
}

#[test]
fn sealing_the_same_value_twice_gives_different_envelopes() {
    let (_database, mut client) = session("twice");
    let distinct = client
        .number("SELECT count(DISTINCT encrypt_col('x', 'pii')) FROM generate_series(1, 1000)");
    assert_eq!(distinct, 1000);
}

#[test]
fn decrypt_col_as_casts_as_drivers_need_it() {
    let (_database, mut client) = session("casts");
    for (sealed, of_type, expected) in [
        ("42::int2", "int4", "42"),
        ("42::int2", "int8", "42"),
        ("42::int4", "int8", "42"),
        ("42::int4", "numeric", "42"),
        ("42::int8", "int4", "42"),
        ("42.6::numeric", "int4", "43"),
        ("42::int4", "float8", "42"),
        ("42::int4", "text", "42"),
        ("'\\x01'::bytea", "text", "\\x01"),
        ("'2024-03-04'::date", "timestamp", "2024-03-04 00:00:00"),
        ("'x'::text", "text", "x"),
        ("'{\"a\":1}'::jsonb", "text", "{\"a\": 1}"),
    ] {
        let sql = format!("SELECT decrypt_col_as(encrypt_col({sealed}, 'pii'), NULL::{of_type})");
        assert_eq!(client.text(&sql), expected, "{sealed} as {of_type}");
    }
    for (sealed, of_type) in [
        ("'42'::text", "int4"),
        ("'{}'::text", "jsonb"),
        ("'\\x01'::bytea", "int4"),
        ("42", "date"),
        ("true", "numeric"),
        ("'{}'::jsonb", "bytea"),
    ] {
        client.refuse(
            &format!("SELECT decrypt_col_as(encrypt_col({sealed}, 'pii'), NULL::{of_type})"),
            "42804",
        );
    }
    client.fail(
        "SELECT decrypt_col_as(encrypt_col(70000, 'pii'), NULL::int2)",
        "22003",
    );
    for of_type in ["oid", "regclass", "regtype", "regrole"] {
        client.refuse(
            &format!("SELECT decrypt_col_as(encrypt_col(1, 'pii'), NULL::{of_type})"),
            "22023",
        );
    }
}

#[test]
fn decrypt_col_as_checks_a_domain_target() {
    let (_database, mut client) = session("domains");
    client.run("CREATE DOMAIN positive AS int CHECK (VALUE > 0)");
    let opened = client.number("SELECT decrypt_col_as(encrypt_col(5, 'pii'), NULL::positive)");
    assert_eq!(opened, 5);
    client.fail(
        "SELECT decrypt_col_as(encrypt_col(-5, 'pii'), NULL::positive)",
        "23514",
    );
}

#[test]
fn types_without_a_lasting_text_form_are_refused() {
    let (_database, mut client) = session("refused");
    client.run(
        "CREATE DOMAIN cash AS money;
         CREATE TYPE holder AS (n int, r regclass);
         CREATE TYPE outer_holder AS (h holder[]);
         CREATE TYPE oidrange AS RANGE (subtype = oid)",
    );
    for value in [
        "ROW(1, 2)",
        "ARRAY[ROW(1, 2)]",
        "'x'::cstring",
        "1::money",
        "ARRAY[1::money]",
        "1::money::cash",
        "1::oid",
        "ARRAY[1::oid]",
        "'pg_class'::regclass",
        "ARRAY['int4'::regtype]",
        "'postgres'::regrole",
        "ROW(1, 'pg_class')::holder",
        "ROW(NULL)::outer_holder",
        "oidrange(1, 2)",
    ] {
        client.refuse(&format!("SELECT encrypt_col({value}, 'pii')"), "22023");
    }
}
