-- 100,000 keys, and values under 1,000 random ones of them beside the same values under one key.
-- Run once by bench.sh after tables.sql. The creation rate is kept for the report.

CREATE PROCEDURE bench.make_keys(wanted integer, per_transaction integer)
    LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. wanted LOOP
        PERFORM rekey.create_key('tenant ' || i);
        IF i % per_transaction = 0 THEN
            COMMIT;
        END IF;
    END LOOP;
    COMMIT;
END
$$;
CREATE TABLE bench.fact (name text PRIMARY KEY, value numeric);
SELECT clock_timestamp() AS begin \gset
CALL bench.make_keys(:keys, 10000);
INSERT INTO bench.fact
SELECT 'keys created per second', :keys / extract(epoch FROM clock_timestamp() - :'begin');

SELECT setseed(0.5);
CREATE TABLE bench.chosen AS
SELECT row_number() OVER () AS n, 'tenant ' || i AS k
FROM (SELECT i FROM generate_series(1, :keys) AS i ORDER BY random() LIMIT 1000) AS t;
CREATE INDEX ON bench.chosen (n);

CREATE UNLOGGED TABLE bench.one_key AS SELECT c, 'bench'::text AS k FROM bench.plain64;
CREATE UNLOGGED TABLE bench.many_keys AS
SELECT p.c, chosen.k
FROM (SELECT c, 1 + floor(random() * 1000)::bigint AS n FROM bench.plain64) AS p
JOIN bench.chosen USING (n)
ORDER BY random();
CREATE UNLOGGED TABLE bench.one_key_sealed AS SELECT encrypt_col(c, k) AS c FROM bench.one_key;
CREATE UNLOGGED TABLE bench.many_keys_sealed AS SELECT encrypt_col(c, k) AS c FROM bench.many_keys;
