-- One round: a hand-written UPDATE with pgcrypto beside CALL rekey.reencrypt() with its proof, on
-- tables of :rows rows of 64 bytes with a primary key, and the proof scan beside a plain one.
-- Prints one line: the figures that scripts/bench-reencrypt.sh takes the medians of. Times are in
-- seconds, growth in times of the size before, WAL in bytes a row.
\set QUIET on
\pset format unaligned
\pset tuples_only on
\o /dev/null
DROP TABLE IF EXISTS by_hand, by_us;
CREATE TABLE by_hand (id int PRIMARY KEY, c bytea);
CREATE TABLE by_us (id int PRIMARY KEY, c bytea);
INSERT INTO by_hand SELECT i, encrypt(rpad('v' || i, 64, 'x')::bytea, '0123456789abcdef', 'aes')
  FROM generate_series(1, :rows) AS i;
INSERT INTO by_us SELECT i, encrypt_col(rpad('v' || i, 64, 'x'), 'pii') FROM generate_series(1, :rows) AS i;
SELECT rekey.register_column('by_us', 'c');
VACUUM (ANALYZE) by_hand;
VACUUM (ANALYZE) by_us;
CHECKPOINT;
SELECT pg_relation_size('by_hand') AS hand_size, pg_relation_size('by_us') AS us_size,
       pg_current_wal_insert_lsn() AS lsn, extract(epoch FROM clock_timestamp()) AS began \gset
UPDATE by_hand SET c = encrypt(decrypt(c, '0123456789abcdef', 'aes'), 'fedcba9876543210', 'aes');
SELECT extract(epoch FROM clock_timestamp()) - :began AS hand_s,
       pg_current_wal_insert_lsn() - :'lsn' AS hand_wal \gset
CHECKPOINT;
SELECT rotate_key('pii');
SELECT pg_current_wal_insert_lsn() AS lsn, extract(epoch FROM clock_timestamp()) AS began \gset
CALL rekey.reencrypt();
SELECT extract(epoch FROM clock_timestamp()) - :began AS us_s,
       pg_current_wal_insert_lsn() - :'lsn' AS us_wal \gset
SELECT count(octet_length(c)) FROM by_us;
SELECT extract(epoch FROM clock_timestamp()) AS began \gset
SELECT count(octet_length(c)) FROM by_us;
SELECT extract(epoch FROM clock_timestamp()) - :began AS scan_s \gset
SELECT proof->>'seconds' AS proof_s FROM rekey.slots WHERE state = 'drained' ORDER BY version DESC LIMIT 1 \gset
SELECT rekey.unregister_column('by_us', 'c');
\o
SELECT concat_ws(' ', :hand_s, :us_s, round(pg_relation_size('by_hand')::numeric / :hand_size, 3),
    round(pg_relation_size('by_us')::numeric / :us_size, 3), round(:hand_wal::numeric / :rows),
    round(:us_wal::numeric / :rows), :scan_s, :proof_s);
