-- The measuring loop. Each case is one query that counts f(value) over a table in shared
-- buffers, timed inside the server: no client is in the figures. Rounds interleave all cases,
-- forwards and backwards in turn, so that a slow moment of the machine hits all alike.
-- The floor of a case, `c || ''`, detoasts, allocates and copies as every function here must.

CREATE TABLE bench.method (
    name text PRIMARY KEY,
    seals boolean,
    query text,     -- %1$s is the size in bytes, %2$s pgcrypto's key, %3$s the rows of slow methods
    floor text,     -- likewise
    slow boolean DEFAULT false
);
INSERT INTO bench.method (name, seals, query, floor) VALUES
    ('built-in sha256(c)', NULL, 'SELECT count(sha256(c)) FROM bench.plain%1$s', 'plain'),
    ('pgcrypto encrypt aes-cbc', true,
     'SELECT count(encrypt(c, %2$s, ''aes'')) FROM bench.plain%1$s', 'plain'),
    ('pgcrypto decrypt aes-cbc', false,
     'SELECT count(decrypt(c, %2$s, ''aes'')) FROM bench.cbc%1$s', 'cbc'),
    ('encrypt_col', true,
     'SELECT count(encrypt_col(c, ''bench'')) FROM bench.plain%1$s', 'plain'),
    ('encrypt_col with a context', true,
     'SELECT count(encrypt_col(c, ''bench'', ''13:customer.note,'')) FROM bench.plain%1$s', 'plain'),
    ('decrypt_col_as, sealed in bulk', false,
     'SELECT count(decrypt_col_as(c, NULL::bytea)) FROM bench.bulk%1$s', 'bulk'),
    ('decrypt_col_as, sealed one by one', false,
     'SELECT count(decrypt_col_as(c, NULL::bytea)) FROM bench.single%1$s', 'single');
INSERT INTO bench.method VALUES
    ('pgcrypto pgp_sym_encrypt aes256', true,
     'SELECT count(pgp_sym_encrypt_bytea(c, ''secret'', ''cipher-algo=aes256, compress-algo=0''))
      FROM (SELECT c FROM bench.plain%1$s LIMIT %3$s) AS t', 'plain', true),
    ('pgcrypto pgp_sym_decrypt', false,
     'SELECT count(pgp_sym_decrypt_bytea(c, ''secret'')) FROM bench.pgp%1$s', 'pgp', true);

CREATE TABLE bench.case (
    seq integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    part text,          -- the table of the report: values, types, keys
    label text,         -- size or type
    method text,
    query text,
    rows integer,
    UNIQUE (part, label, method)
);
CREATE TABLE bench.sample (seq integer, round integer, micros float8);

INSERT INTO bench.case (part, label, method, query, rows)
SELECT 'values', s.label, m.name,
       format(m.query, s.bytes, quote_literal('\x' || repeat('5a', 32)) || '::bytea', s.pgp_rows),
       CASE WHEN m.slow THEN s.pgp_rows ELSE s.rows END
FROM bench.size AS s, bench.method AS m
UNION ALL
SELECT 'values', s.label, 'floor: ' || form, format('SELECT count(c || '''') FROM bench.%I', form || s.bytes),
       CASE WHEN form = 'pgp' THEN s.pgp_rows ELSE s.rows END
FROM bench.size AS s, unnest(ARRAY['plain', 'cbc', 'pgp', 'bulk', 'single']) AS form
UNION ALL
SELECT 'types', type, verb, format(query, col), 50000
FROM (VALUES ('text', 't'), ('jsonb', 'j'), ('numeric', 'n')) AS types (type, col),
     (VALUES ('encrypt_col', 'SELECT count(encrypt_col(%I, ''bench'')) FROM bench.typed'),
             ('decrypt_col', 'SELECT count(decrypt_col(%I)) FROM bench.typed_sealed')) AS v (verb, query)
UNION ALL
SELECT 'types', type, 'decrypt_col_as',
       format('SELECT count(decrypt_col_as(%I, NULL::%s)) FROM bench.typed_sealed', col, type), 50000
FROM (VALUES ('text', 't'), ('jsonb', 'j'), ('numeric', 'n')) AS types (type, col)
UNION ALL
SELECT 'types', type, 'text form and back', format('SELECT count(%1$I::text::%2$s) FROM bench.typed', col, type), 50000
FROM (VALUES ('text', 't'), ('jsonb', 'j'), ('numeric', 'n')) AS types (type, col)
UNION ALL
SELECT 'keys', which, 'encrypt_col', format('SELECT count(encrypt_col(c, k)) FROM bench.%I', which || '_key' || plural),
       100000
FROM (VALUES ('one', ''), ('many', 's')) AS w (which, plural)
UNION ALL
SELECT 'keys', which, 'decrypt_col_as',
       format('SELECT count(decrypt_col_as(c, NULL::bytea)) FROM bench.%I', which || '_key' || plural || '_sealed'), 100000
FROM (VALUES ('one', ''), ('many', 's')) AS w (which, plural)
UNION ALL
SELECT 'keys', which, 'floor: ' || verb,
       format('SELECT count(c || '''') FROM bench.%I', which || '_key' || plural || suffix), 100000
FROM (VALUES ('one', ''), ('many', 's')) AS w (which, plural),
     (VALUES ('encrypt_col', ''), ('decrypt_col_as', '_sealed')) AS v (verb, suffix);

-- The backend's own memory in MiB, the shared buffers that it touched not counted.
CREATE FUNCTION bench.private_memory() RETURNS numeric LANGUAGE sql AS $$
    SELECT substring(pg_read_file('/proc/self/status') FROM 'RssAnon:\s+(\d+) kB')::numeric / 1024
$$;

CREATE PROCEDURE bench.measure(rounds integer) LANGUAGE plpgsql AS $$
DECLARE
    c record;
    begin_at timestamptz;
    took float8;
    counted bigint;
BEGIN
    -- Round 0 warms caches and buffers and is thrown away.
    FOR r IN 0 .. rounds LOOP
        FOR c IN SELECT * FROM bench.case ORDER BY CASE WHEN r % 2 = 0 THEN seq ELSE -seq END LOOP
            begin_at := clock_timestamp();
            EXECUTE c.query INTO counted;
            took := extract(epoch FROM clock_timestamp() - begin_at) * 1e6;
            IF counted <> c.rows THEN
                RAISE EXCEPTION '% % %: % rows instead of %', c.part, c.label, c.method, counted, c.rows;
            END IF;
            IF r > 0 THEN
                INSERT INTO bench.sample VALUES (c.seq, r, took / c.rows);
            END IF;
            COMMIT;
        END LOOP;
        IF r = 0 THEN
            INSERT INTO bench.fact VALUES ('memory after the first round (MiB)', bench.private_memory());
        ELSIF r = rounds THEN
            INSERT INTO bench.fact VALUES ('memory after the last round (MiB)', bench.private_memory());
        END IF;
        RAISE NOTICE 'round % of %', r, rounds;
    END LOOP;
END
$$;

-- Storing: 100,000 values of 64 B in one INSERT ... SELECT, with its WAL, in rows per second.
CREATE PROCEDURE bench.measure_inserts(rounds integer) LANGUAGE plpgsql AS $$
DECLARE
    m record;
    begin_at timestamptz;
    samples float8[];
BEGIN
    CREATE TABLE bench.stored (id bigint, c bytea);
    FOR m IN SELECT * FROM (VALUES
            ('plain', 'c'), ('encrypt_col', 'encrypt_col(c, ''bench'')'),
            ('pgcrypto encrypt aes-cbc', format('encrypt(c, %L, ''aes'')', '\x' || repeat('5a', 32))))
            AS t (name, expression) LOOP
        samples := '{}';
        FOR r IN 1 .. rounds LOOP
            TRUNCATE bench.stored;
            COMMIT;
            begin_at := clock_timestamp();
            EXECUTE 'INSERT INTO bench.stored SELECT row_number() OVER (), ' || m.expression
                    || ' FROM bench.plain64';
            COMMIT;
            samples := samples || (100000 / extract(epoch FROM clock_timestamp() - begin_at))::float8;
        END LOOP;
        INSERT INTO bench.fact
        SELECT 'rows stored per second, 64 B, ' || m.name,
               (percentile_cont(0.5) WITHIN GROUP (ORDER BY s))::numeric
        FROM unnest(samples) AS s;
        COMMIT;
    END LOOP;
END
$$;

-- A debug build seals some 300 times slower: its figures would be about something else.
CREATE FUNCTION bench.release_seal_ms() RETURNS numeric LANGUAGE plpgsql AS $$
DECLARE
    value bytea := (SELECT c FROM bench.plain65536 LIMIT 1);
    begin_at timestamptz;
    samples float8[];
BEGIN
    FOR i IN 1 .. 21 LOOP
        begin_at := clock_timestamp();
        PERFORM encrypt_col(value, 'bench');
        samples := samples || extract(epoch FROM clock_timestamp() - begin_at)::float8 * 1000;
    END LOOP;
    RETURN (SELECT round(percentile_cont(0.5) WITHIN GROUP (ORDER BY s)::numeric, 3)
            FROM unnest(samples) AS s);
END
$$;
