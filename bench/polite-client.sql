-- One transaction of the application whose latency scripts/bench-polite.sh measures: it reads and
-- updates a row of the very table that is re-encrypted, and carries stale envelopes along.
\set id random(1, :rows)
SELECT decrypt_col(c) FROM account WHERE id = :id;
UPDATE account SET n = n + 1 WHERE id = :id;
