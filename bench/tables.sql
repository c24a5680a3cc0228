-- The benchmark's values, and each method's stored form of them. Run once by bench.sh as the
-- superuser of a throwaway cluster. One table per form, so that a scan reads only what it opens.
-- 64 KiB values are STORAGE EXTERNAL everywhere: compression would distort all columns.

CREATE EXTENSION pgcrypto;
CREATE EXTENSION pg_rekey;
SELECT rekey.init_root_key() AS root_id;
SELECT rekey.create_key('bench') AS slot_id;

CREATE SCHEMA bench;
CREATE TABLE bench.size (bytes integer PRIMARY KEY, label text, rows integer, pgp_rows integer);
INSERT INTO bench.size VALUES
    (16, '16 B', 100000, 500), (64, '64 B', 100000, 500),
    (1024, '1 KiB', 20000, 500), (65536, '64 KiB', 400, 50);

DO $$
DECLARE
    s bench.size;
    form text;
    pgcrypto_key constant text := quote_literal('\x' || repeat('5a', 32)) || '::bytea';
BEGIN
    FOR s IN SELECT * FROM bench.size ORDER BY bytes LOOP
        FOREACH form IN ARRAY ARRAY['plain', 'cbc', 'pgp', 'bulk', 'single'] LOOP
            EXECUTE format('CREATE UNLOGGED TABLE bench.%I (c bytea)', form || s.bytes);
            EXECUTE format('ALTER TABLE bench.%I ALTER c SET STORAGE EXTERNAL', form || s.bytes);
        END LOOP;
        -- pgcrypto makes at most 1,024 random bytes at a time.
        EXECUTE format('INSERT INTO bench.plain%s SELECT (
            SELECT string_agg(gen_random_bytes(least(%1$s, 1024)), '''')
            FROM generate_series(1, greatest(1, %1$s / 1024)) WHERE i > 0)
            FROM generate_series(1, %s) AS i', s.bytes, s.rows);
        EXECUTE format('INSERT INTO bench.cbc%1$s SELECT encrypt(c, %2$s, ''aes'')
            FROM bench.plain%1$s', s.bytes, pgcrypto_key);
        EXECUTE format('INSERT INTO bench.pgp%1$s
            SELECT pgp_sym_encrypt_bytea(c, ''secret'', ''cipher-algo=aes256, compress-algo=0'')
            FROM (SELECT c FROM bench.plain%1$s LIMIT %2$s) AS t', s.bytes, s.pgp_rows);
        EXECUTE format('INSERT INTO bench.bulk%1$s SELECT encrypt_col(c, ''bench'')
            FROM bench.plain%1$s', s.bytes);
        -- What rows look like that were sealed one per transaction: each has its own salt.
        SET LOCAL rekey.salt_per_value = on;
        EXECUTE format('INSERT INTO bench.single%1$s SELECT encrypt_col(c, ''bench'')
            FROM bench.plain%1$s', s.bytes);
        SET LOCAL rekey.salt_per_value = off;
    END LOOP;
END
$$;

-- Other types: what an application stores, and its sealed form.
CREATE UNLOGGED TABLE bench.typed AS
SELECT 'customer.' || i || '@example.org' AS t,
       jsonb_build_object('id', i, 'name', 'customer ' || i,
                          'tags', jsonb_build_array('a', 'b')) AS j,
       (i * 7919 % 9000000)::numeric / 100 AS n
FROM generate_series(1, 50000) AS i;
CREATE UNLOGGED TABLE bench.typed_sealed AS
SELECT encrypt_col(t, 'bench') AS t, encrypt_col(j, 'bench') AS j, encrypt_col(n, 'bench') AS n
FROM bench.typed;
