-- Run by bench.sh in a fresh session: what its first call of the extension costs, with the
-- look-ups of function, slot and grant, timed inside the server, in milliseconds.
-- plpgsql and the envelope are loaded before the clock starts.
SET client_min_messages = notice;
DO $$
DECLARE
    envelope bytea := (SELECT c FROM bench.bulk64 LIMIT 1);
    begin_at timestamptz;
BEGIN
    PERFORM sha256(envelope);
    begin_at := clock_timestamp();
    PERFORM decrypt_col_as(envelope, NULL::bytea);
    RAISE NOTICE 'first open: %', extract(epoch FROM clock_timestamp() - begin_at) * 1000;
END
$$;
