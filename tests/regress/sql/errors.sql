-- Every error that a user can meet without a second server: SQLSTATE, message, DETAIL, HINT.
-- What is random is shown as <slot>, <root> and <time>.
\set ECHO none
SET client_min_messages = error;
CREATE EXTENSION IF NOT EXISTS pg_rekey;
SELECT NOT rekey.ready() AS fresh \gset
\if :fresh
SELECT rekey.init_root_key() AS root_id \gset
\endif
RESET client_min_messages;
\set ECHO all
\pset tuples_only on
SET DateStyle = ISO;
\pset format unaligned
CREATE FUNCTION pg_temp.refusal(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    code text; message text; detail text; hint text;
BEGIN
    EXECUTE statement;
    RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, message = MESSAGE_TEXT,
        detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    RETURN regexp_replace(regexp_replace(regexp_replace(
        format(E'%s  %s\n  DETAIL:  %s\n  HINT:  %s', code, message, detail, hint),
        '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[.0-9]*[+-][:0-9]*', '<time>', 'g'),
        '[0-9a-f]{32}', '<root>', 'g'), '\d{10,}', '<slot>', 'g');
END $$;
CREATE FUNCTION pg_temp.slot(n int) RETURNS text LANGUAGE sql AS
    $$ SELECT slot_id::text FROM rekey.slots WHERE key_name = 'errors.pii' AND version = n $$;
SELECT rekey.create_key('errors.pii') > 0;
SELECT rekey.create_key('errors.bound') > 0, rekey.set_policy('errors.bound', require_context => true);
CREATE TEMP TABLE sample AS
    SELECT encrypt_col('x', 'errors.pii') AS unbound, encrypt_col('x', 'errors.pii', 'c') AS bound,
           encrypt_col(-1, 'errors.pii') AS typed;

-- Not an envelope
SELECT pg_temp.refusal($$ SELECT decrypt_col('') $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col('\xf9') $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(substr(unbound, 1, 49)) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col('some text that was never sealed, longer than an envelope''s overhead') $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(set_byte(unbound, 0, 250)) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(set_byte(unbound, 1, 2)) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(set_byte(unbound, 1, 193)) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(set_byte(unbound, 1, 33)) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(overlay(unbound PLACING '\x0000000000000000' FROM 3)) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(overlay(unbound PLACING '\x8000000000000001' FROM 3)) FROM sample $$);

-- Altered, or under another context
SELECT pg_temp.refusal($$ SELECT decrypt_col(set_byte(unbound, 40, get_byte(unbound, 40) # 1)) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(bound, 'd') FROM sample $$);

-- Contexts and arguments
SELECT pg_temp.refusal($$ SELECT decrypt_col(bound) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(unbound, 'c') FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(unbound, 'errors.pii') FROM sample $$);
SELECT pg_temp.refusal($$ SELECT encrypt_col('x', 'errors.bound') $$);
SELECT pg_temp.refusal($$ SELECT encrypt_col('x', NULL) $$);
SELECT pg_temp.refusal($$ SELECT encrypt_col('x', 'errors.pii', NULL) $$);
SELECT pg_temp.refusal($$ SELECT encrypt_col('x') $$);
SELECT pg_temp.refusal($$ SELECT rekey.context(VARIADIC '{}'::text[]) $$);
SELECT pg_temp.refusal($$ SELECT rekey.context('a', NULL) $$);
SELECT pg_temp.refusal($$ SELECT rekey.create_key('') $$);
SELECT pg_temp.refusal($$ SELECT rekey.create_key(' x') $$);
SELECT pg_temp.refusal($$ SELECT rekey.create_key(E'a\nb') $$);
SELECT pg_temp.refusal($$ SELECT rekey.create_key(repeat('x', 201)) $$);
SELECT pg_temp.refusal($$ SELECT rekey.create_key('x', grace => '-1 day') $$);
SELECT pg_temp.refusal($$ SELECT rekey.set_policy('errors.pii', after_drain => 'burn') $$);

-- Unknown and existing things
SELECT pg_temp.refusal($$ SELECT encrypt_col('x', 'nope') $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(overlay(unbound PLACING '\x0123456789abcdef' FROM 3)) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT rekey.disable_slot(42) $$);
SELECT pg_temp.refusal($$ SELECT rekey.create_key('errors.pii') $$);
SELECT pg_temp.refusal($$ SELECT rekey.grant_key('errors.pii', 'nobody_of_that_name', '{decrypt}') $$);
SELECT pg_temp.refusal($$ SELECT rekey.grant_key('errors.pii', 'public', '{read}') $$);

-- Types
SELECT pg_temp.refusal($$ SELECT encrypt_col(ROW(1, 2), 'errors.pii') $$);
SELECT pg_temp.refusal($$ SELECT encrypt_col(1::money, 'errors.pii') $$);
SELECT pg_temp.refusal($$ SELECT encrypt_col(ARRAY['pg_class'::regclass], 'errors.pii') $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col_as(typed, NULL::date) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col_as(unbound, NULL::int) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col_as(typed, NULL::regclass) FROM sample $$);
CREATE DOMAIN pg_temp.positive AS int CHECK (VALUE > 0);
SELECT pg_temp.refusal($$ SELECT decrypt_col_as(typed, NULL::pg_temp.positive) FROM sample $$);

-- Privileges
CREATE ROLE regress_rekey_nobody;
GRANT SELECT ON sample TO regress_rekey_nobody;
SET ROLE regress_rekey_nobody;
SELECT pg_temp.refusal($$ SELECT encrypt_col('x', 'errors.pii') $$);
SELECT pg_temp.refusal($$ SELECT decrypt_col(unbound) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT rotate_key('errors.pii') $$);
SELECT pg_temp.refusal($$ SELECT rekey.shred_key('errors.pii', 'x') $$);
SELECT pg_temp.refusal($$ SELECT rekey.create_key('x') $$);
RESET ROLE;

-- States
SELECT pg_temp.refusal($$ SELECT rekey.rollback_rotation('errors.pii') $$);
SELECT pg_temp.refusal($$ SELECT rekey.destroy_slot($$ || pg_temp.slot(1) || ')');
SELECT pg_temp.refusal($$ SELECT rekey.disable_slot($$ || pg_temp.slot(1) || ')');
SELECT rotate_key('errors.pii') > 0;
SELECT pg_temp.refusal($$ SELECT rekey.enable_slot($$ || pg_temp.slot(1) || ')');
SELECT pg_temp.refusal($$ SELECT rekey.disable_slot($$ || pg_temp.slot(1) || ')');
SELECT pg_temp.refusal($$ SELECT rekey.destroy_slot($$ || pg_temp.slot(1) || ')');
SELECT pg_temp.refusal($$ SELECT rekey.drop_key('errors.pii') $$);
SELECT rekey.disable_slot(pg_temp.slot(1)::bigint, force => true);
SELECT pg_temp.refusal($$ SELECT decrypt_col(unbound) FROM sample $$);
SELECT rekey.destroy_slot(pg_temp.slot(1)::bigint, force => true);
SELECT pg_temp.refusal($$ SELECT decrypt_col(unbound) FROM sample $$);
SELECT pg_temp.refusal($$ SELECT rekey.enable_slot($$ || pg_temp.slot(1) || ')');
SELECT rekey.shred_key('errors.pii', 'the end');
SELECT pg_temp.refusal($$ SELECT encrypt_col('x', 'errors.pii') $$);
SELECT pg_temp.refusal($$ SELECT rotate_key('errors.pii') $$);
SELECT pg_temp.refusal($$ SELECT rekey.create_key('errors.pii') $$);
SELECT pg_temp.refusal($$ SELECT rekey.shred_key('errors.pii', 'again') $$);

-- Root keys
SELECT pg_temp.refusal($$ SELECT rekey.init_root_key() $$);

-- The catalog is not changed directly, and does not go while a slot opens something
SELECT pg_temp.refusal($$ UPDATE rekey.key_slot SET state = 'destroyed' $$);
SELECT pg_temp.refusal($$ DELETE FROM rekey.key $$);
SELECT pg_temp.refusal($$ TRUNCATE rekey.audit_log $$);
SELECT pg_temp.refusal($$ DROP EXTENSION pg_rekey CASCADE $$);
SELECT rekey.drop_key('errors.pii');
SELECT rekey.shred_key('errors.bound', 'the end'), rekey.drop_key('errors.bound');
DROP TABLE sample;
DROP ROLE regress_rekey_nobody;
