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
     'SELECT count(encrypt_col(c, ''bench'', ''13:customer.note,'')) FROM bench.plain%1$s',
     'plain'),
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
SELECT 'values', s.label, 'floor: ' || form,
       format('SELECT count(c || '''') FROM bench.%I', form || s.bytes),
       CASE WHEN form = 'pgp' THEN s.pgp_rows ELSE s.rows END
FROM bench.size AS s, unnest(ARRAY['plain', 'cbc', 'pgp', 'bulk', 'single']) AS form;

-- %1$s is the column, %2$s the type.
INSERT INTO bench.case (part, label, method, query, rows)
SELECT 'types', type, method, format('SELECT count(' || query, col, type), 50000
FROM (VALUES ('text', 't'), ('jsonb', 'j'), ('numeric', 'n')) AS types (type, col),
     (VALUES ('encrypt_col', 'encrypt_col(%1$s, ''bench'')) FROM bench.typed'),
             ('decrypt_col', 'decrypt_col(%1$s)) FROM bench.typed_sealed'),
             ('decrypt_col_as', 'decrypt_col_as(%1$s, NULL::%2$s)) FROM bench.typed_sealed'),
             ('text form and back', '%1$s::text::%2$s) FROM bench.typed')) AS v (method, query);

-- %s is one_key or many_keys.
INSERT INTO bench.case (part, label, method, query, rows)
SELECT 'keys', label, method, format('SELECT count(' || query, label || suffix), 100000
FROM (VALUES ('one', '_key'), ('many', '_keys')) AS w (label, suffix),
     (VALUES ('encrypt_col', 'encrypt_col(c, k)) FROM bench.%s'),
             ('floor: encrypt_col', 'c || '''') FROM bench.%s'),
             ('decrypt_col_as', 'decrypt_col_as(c, NULL::bytea)) FROM bench.%s_sealed'),
             ('floor: decrypt_col_as', 'c || '''') FROM bench.%s_sealed')) AS v (method, query);

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
                RAISE EXCEPTION '% % %: % rows instead of %',
                    c.part, c.label, c.method, counted, c.rows;
            END IF;
            IF r > 0 THEN
                INSERT INTO bench.sample VALUES (c.seq, r, took / c.rows);
            END IF;
            COMMIT;
        END LOOP;
        IF r IN (0, rounds) THEN
            INSERT INTO bench.fact
            VALUES (format('memory after the %s round (MiB)',
                           CASE WHEN r = 0 THEN 'first' ELSE 'last' END), bench.private_memory());
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
    seconds float8;
    samples float8[];
BEGIN
    CREATE TABLE bench.stored (id bigint, c bytea);
    FOR m IN SELECT * FROM (VALUES
            ('plain', 'c'), ('encrypt_col', 'encrypt_col(c, ''bench'')'),
            ('pgcrypto encrypt aes-cbc',
             format('encrypt(c, %L, ''aes'')', '\x' || repeat('5a', 32))))
            AS t (name, expression) LOOP
        samples := '{}';
        FOR r IN 1 .. rounds LOOP
            TRUNCATE bench.stored;
            COMMIT;
            begin_at := clock_timestamp();
            EXECUTE 'INSERT INTO bench.stored SELECT row_number() OVER (), ' || m.expression
                    || ' FROM bench.plain64';
            COMMIT;
            seconds := extract(epoch FROM clock_timestamp() - begin_at);
            samples := samples || 100000 / seconds;
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
