-- What scripts/bench-polite.sh measures with: the table of :rows rows of 64 bytes, the sampler of
-- waits behind the worker, and the ALTER TABLE that is timed and taken back.
SET client_min_messages = warning;
CREATE EXTENSION pg_rekey;
SELECT rekey.init_root_key(), rekey.create_key('pii', grace => '0');
CREATE TABLE account (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, c bytea);
INSERT INTO account (id, c)
SELECT i, encrypt_col(rpad('v' || i, 64, 'x'), 'pii') FROM generate_series(1, :rows) AS i;
SELECT rekey.register_column('account', 'c');
VACUUM (ANALYZE) account;

CREATE SCHEMA polite;
CREATE UNLOGGED TABLE polite.wait (
    pid int, began timestamptz, blocked_by text, ms numeric, PRIMARY KEY (pid, began, blocked_by)
);

-- Every so many ms, until so many seconds have passed or no slot awaits its drain any more: who
-- waits for a lock of whose, and for how long already. A transaction for each look: one snapshot
-- for all of them would hold back what is measured.
CREATE PROCEDURE polite.sample(seconds numeric, every numeric) LANGUAGE plpgsql AS $$
DECLARE
    until timestamptz := clock_timestamp() + seconds * interval '1 s';
BEGIN
    WHILE clock_timestamp() < until LOOP
        INSERT INTO polite.wait
        SELECT l.pid, l.waitstart, a.backend_type,
               max(1000 * extract(epoch FROM clock_timestamp() - l.waitstart))
          FROM pg_locks l
          JOIN pg_stat_activity a ON a.pid = ANY (pg_blocking_pids(l.pid))
         WHERE NOT l.granted AND l.waitstart IS NOT NULL
         GROUP BY 1, 2, 3
            ON CONFLICT (pid, began, blocked_by) DO UPDATE SET ms = excluded.ms;
        COMMIT;
        EXIT WHEN NOT EXISTS (SELECT FROM rekey.slots WHERE state = 'previous');
        PERFORM pg_sleep(every / 1000);
    END LOOP;
END
$$;

-- Milliseconds of an ALTER TABLE, nearly all of them for its lock.
CREATE FUNCTION polite.alter_ms() RETURNS numeric LANGUAGE plpgsql AS $$
DECLARE
    began timestamptz := clock_timestamp();
    took numeric;
BEGIN
    ALTER TABLE account ADD COLUMN extra int;
    took := round(1000 * extract(epoch FROM clock_timestamp() - began), 1);
    RAISE EXCEPTION USING ERRCODE = 'P0001';
EXCEPTION WHEN raise_exception THEN
    RETURN took;
END
$$;
