//! Tests inside the server: one backend, rolled back at the end.
//!
//! Here is what a single session can show: round trips, the nonce sequence over savepoints,
//! settings left as they were, SQLSTATEs. What needs a second session, a commit or a crash is
//! tested over a real server in tests/.

use pgrx::prelude::*;

/// A key in a database that has adopted the test server's root key.
fn key(name: &str) {
    let adopted = "SELECT EXISTS (SELECT FROM rekey.root_keys)";
    if Spi::get_one::<bool>(adopted) != Ok(Some(true)) {
        Spi::run("SELECT rekey.init_root_key()").expect("init_root_key");
    }
    let create = format!("SELECT rekey.create_key('{name}')");
    Spi::run(&create).expect("create_key");
}

fn text(sql: &str) -> String {
    Spi::get_one::<String>(sql)
        .expect("query")
        .expect("a value")
}

fn truth(sql: &str) -> bool {
    Spi::get_one::<bool>(sql).expect("query").expect("a value")
}

/// SQLSTATE, and whether DETAIL and HINT are there, of the error that a statement ends in.
fn error_of(statement: &str) -> String {
    Spi::run(
        "CREATE OR REPLACE FUNCTION pg_temp.error_of(statement text) RETURNS text \
         LANGUAGE plpgsql AS $$ DECLARE d text; h text; BEGIN EXECUTE statement; RETURN 'none'; \
         EXCEPTION WHEN OTHERS THEN GET STACKED DIAGNOSTICS d = PG_EXCEPTION_DETAIL, \
         h = PG_EXCEPTION_HINT; RETURN SQLSTATE || CASE WHEN d <> '' THEN ' detail' ELSE '' END \
         || CASE WHEN h <> '' THEN ' hint' ELSE '' END; END $$",
    )
    .expect("helper");
    let args = [statement.into()];
    Spi::get_one_with_args::<String>("SELECT pg_temp.error_of($1)", &args)
        .expect("query")
        .expect("a value")
}

#[pg_schema]
mod tests {
    use super::*;

    #[pg_test]
    fn a_value_opens_to_itself_and_names_the_active_slot() {
        key("pii");
        assert_eq!(
            text("SELECT decrypt_col(encrypt_col('håkan', 'pii'))"),
            "håkan"
        );
        assert!(truth(
            "SELECT rekey.slot_id(encrypt_col('x', 'pii')) = active_slot \
             FROM rekey.keys WHERE key_name = 'pii'"
        ));
    }

    #[pg_test]
    fn every_kind_keeps_its_value_under_other_output_settings() {
        key("pii");
        Spi::run("SET LOCAL DateStyle = 'SQL, DMY'; SET LOCAL TimeZone = 'Asia/Kolkata'")
            .expect("set");
        Spi::run(
            "CREATE TEMP TABLE sealed AS SELECT encrypt_col(t, 'pii') c, t \
                  FROM (SELECT '2026-02-03 04:05:06.7+05:30'::timestamptz) s(t)",
        )
        .expect("seal");
        let form = text("SELECT decrypt_col(c) FROM sealed");
        assert_eq!(form, "2026-02-02 22:35:06.7+00");
        Spi::run("SET LOCAL DateStyle = 'German'; SET LOCAL TimeZone = 'America/Lima'")
            .expect("set");
        assert!(truth(
            "SELECT decrypt_col_as(c, NULL::timestamptz) = t FROM sealed"
        ));
        assert_eq!(text("SELECT current_setting('DateStyle')"), "German, DMY");
        assert_eq!(text("SELECT '2026-02-03'::date::text"), "03.02.2026");
    }

    #[pg_test]
    fn the_nonce_goes_on_over_a_savepoint_rollback() {
        key("pii");
        Spi::run(
            "CREATE TEMP TABLE nonces (n bytea); \
             DO $$ DECLARE kept bytea[]; c bytea; BEGIN \
               FOR i IN 1..50 LOOP \
                 BEGIN c := encrypt_col('x', 'pii'); RAISE EXCEPTION 'back'; \
                 EXCEPTION WHEN raise_exception THEN kept := kept || c; END; \
                 kept := kept || encrypt_col('x', 'pii'); \
               END LOOP; \
               INSERT INTO nonces SELECT substr(k, 11, 24) FROM unnest(kept) k; END $$",
        )
        .expect("seal");
        assert!(truth(
            "SELECT count(*) = 100 AND count(DISTINCT n) = 100 FROM nonces"
        ));
    }

    #[pg_test]
    fn salt_per_value_gives_each_value_its_own_salt() {
        key("pii");
        let salts = "SELECT count(DISTINCT substr(encrypt_col('x', 'pii'), 11, 12)) \
                     FROM generate_series(1, 20)";
        assert!(truth(&format!("SELECT ({salts}) = 1")));
        Spi::run("SET LOCAL rekey.salt_per_value = on").expect("set");
        assert!(truth(&format!("SELECT ({salts}) = 20")));
    }

    #[pg_test]
    fn a_rotation_that_rolls_back_leaves_the_old_slot_active() {
        key("pii");
        Spi::run(
            "DO $$ DECLARE before bigint := rekey.slot_id(encrypt_col('x', 'pii')); inside bigint; \
             BEGIN \
               BEGIN PERFORM rotate_key('pii'); inside := rekey.slot_id(encrypt_col('x', 'pii')); \
                 ASSERT inside <> before, 'the new slot seals at once'; RAISE EXCEPTION 'back'; \
               EXCEPTION WHEN raise_exception THEN NULL; END; \
               ASSERT rekey.slot_id(encrypt_col('x', 'pii')) = before, 'the old one is back'; \
               ASSERT NOT EXISTS (SELECT FROM rekey.slots WHERE slot_id = inside); \
               ASSERT (SELECT count(*) = 1 FROM rekey.audit WHERE key_name = 'pii'); \
             END $$",
        )
        .expect("the old slot is back");
    }

    #[pg_test]
    fn errors_carry_sqlstate_detail_and_hint() {
        key("pii");
        let cases = [
            (
                "SELECT decrypt_col('plain text'::bytea)",
                "22P03 detail hint",
            ),
            ("SELECT decrypt_col('\\xf9'::bytea)", "22P03 detail hint"),
            ("SELECT encrypt_col('x', 'nobody')", "42704 detail hint"),
            ("SELECT encrypt_col('x', NULL)", "22004 detail hint"),
            ("SELECT encrypt_col('x', 'pii', NULL)", "22004 detail hint"),
            ("SELECT encrypt_col('x')", "42704 detail hint"),
            ("SELECT encrypt_col(1::money, 'pii')", "22023 detail hint"),
            (
                "SELECT decrypt_col(encrypt_col('x', 'pii'), 'pii')",
                "22023 detail hint",
            ),
            (
                "SELECT decrypt_col(encrypt_col('x', 'pii', 'a'))",
                "22023 detail hint",
            ),
            (
                "SELECT decrypt_col(encrypt_col('x', 'pii', 'a'), 'b')",
                "39000 detail hint",
            ),
            (
                "SELECT decrypt_col_as(encrypt_col('x', 'pii'), NULL::int)",
                "42804 detail hint",
            ),
            ("SELECT rekey.create_key('pii')", "42710 detail hint"),
            ("SELECT rekey.create_key(' pii')", "22023 detail hint"),
            ("SELECT rekey.rollback_rotation('pii')", "55000 detail hint"),
            (
                "UPDATE rekey.key_slot SET state = 'active'",
                "55000 detail hint",
            ),
        ];
        for (statement, expected) in cases {
            assert_eq!(error_of(statement), expected, "{statement}");
        }
    }

    #[pg_test]
    fn an_altered_envelope_does_not_open() {
        key("pii");
        assert!(truth(
            "SELECT bool_and(NOT rekey.can_open(set_byte(c, i, get_byte(c, i) # 1))) \
             FROM (SELECT encrypt_col('value', 'pii') c) s, \
                  generate_series(0, octet_length(c) - 1) i"
        ));
    }
}
