-- A key for each of :tenants tenants: creation in bulk, first use, rotation, the end of one.
-- Prints one line for each figure: seconds and what they were spent on. scripts/bench-tenants.sh.
\set QUIET on
\pset format unaligned
\pset fieldsep ' '
\pset tuples_only on
CREATE TABLE clock (at timestamptz);
CREATE FUNCTION took(what text, units bigint) RETURNS text LANGUAGE sql AS $$
    WITH was AS (DELETE FROM clock RETURNING at),
         spent AS (SELECT extract(epoch FROM clock_timestamp() - at) AS s FROM was)
    SELECT format('%s s (%s us each): %s', round(s, 2), round(1e6 * s / units, 1), what) FROM spent
$$;
SELECT rekey.create_key('template'), rekey.grant_key('template', 'public', '{encrypt,decrypt}') \g /dev/null

INSERT INTO clock VALUES (clock_timestamp());
SELECT rekey.create_keys(array(SELECT 'tenant-' || i FROM generate_series(1, :tenants) AS i), 'template') \g /dev/null
SELECT took('create ' || :tenants || ' keys in one statement', :tenants);

-- A new session: its key cache is empty.
\c
\pset tuples_only on
CREATE TABLE document (tenant int PRIMARY KEY, body bytea);
INSERT INTO clock VALUES (clock_timestamp());
INSERT INTO document SELECT i, encrypt_col('body ' || i, 'tenant-' || i) FROM generate_series(1, 1000) AS i;
SELECT took('encrypt under each of 1000 different keys in one query, none of them known', 1000);
INSERT INTO clock VALUES (clock_timestamp());
SELECT count(*) FROM generate_series(1, 1000) AS i WHERE encrypt_col('body ' || i, 'tenant-' || i) IS NULL \g /dev/null
SELECT took('the same again in the same session', 1000);
SELECT rekey.register_column('document', 'body') \g /dev/null

INSERT INTO clock VALUES (clock_timestamp());
SELECT clock_timestamp() AS since \gset
CREATE PROCEDURE rotate_all(since timestamptz) LANGUAGE plpgsql AS $$
DECLARE
    pace record;
BEGIN
    LOOP
        SELECT * INTO pace FROM rekey.rotate_keys(since, max_keys => 1000, pattern => 'tenant-%');
        COMMIT;
        EXIT WHEN pace.remaining = 0;
    END LOOP;
END
$$;
CALL rotate_all(:'since');
SELECT took('rotate ' || :tenants || ' keys, 1000 in a transaction', :tenants);

INSERT INTO clock VALUES (clock_timestamp());
SELECT rekey.shred_key('tenant-77', 'contract ended') \g /dev/null
SELECT took('shred one tenant', 1);

INSERT INTO clock VALUES (clock_timestamp());
CALL rekey.reencrypt();
SELECT took('re-encrypt 999 rows and prove ' || :tenants || ' slots unused', :tenants);
SELECT count(*) || ' slots are drained' FROM rekey.slots WHERE state = 'drained';
