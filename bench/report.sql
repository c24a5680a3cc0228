-- The report out of bench.sample and bench.fact: tables of medians, then the targets.
-- "net" is the time above the floor: what a method costs beyond detoasting, allocating, copying.

CREATE VIEW bench.median AS
SELECT part, label, method,
       (percentile_cont(0.5) WITHIN GROUP (ORDER BY micros))::numeric AS micros
FROM bench.sample JOIN bench.case USING (seq)
GROUP BY part, label, method;

CREATE VIEW bench.net AS
SELECT s.bytes, v.label, v.method, m.seals, v.micros, v.micros - f.micros AS net
FROM bench.median AS v
JOIN bench.method AS m ON m.name = v.method
JOIN bench.size AS s USING (label)
JOIN bench.median AS f
    ON f.part = 'values' AND f.label = v.label AND f.method = 'floor: ' || m.floor
WHERE v.part = 'values';

CREATE FUNCTION bench.net_of(bytes integer, method text) RETURNS numeric LANGUAGE sql AS
    'SELECT net FROM bench.net AS n WHERE n.bytes = $1 AND n.method = $2';
CREATE FUNCTION bench.micros_of(bytes integer, method text) RETURNS numeric LANGUAGE sql AS
    'SELECT micros FROM bench.net AS n WHERE n.bytes = $1 AND n.method = $2';
CREATE FUNCTION bench.keys_net(which text, verb text) RETURNS numeric LANGUAGE sql AS $$
    SELECT sum(CASE method WHEN verb THEN micros ELSE -micros END)
    FROM bench.median
    WHERE part = 'keys' AND label = which AND method IN (verb, 'floor: ' || verb)
$$;

\pset footer off
\echo
\echo 'Microseconds per value, medians. The last two columns: how many times as fast as raw AES-CBC'
\echo 'of pgcrypto (which has no tag and a zero IV) and as sha256 a method is, net of the floor.'
SELECT n.label AS size,
       n.method,
       round(n.micros, 3) AS "us/value",
       round(n.net, 3) AS net,
       round(CASE WHEN n.seals THEN bench.net_of(n.bytes, 'pgcrypto encrypt aes-cbc')
                  WHEN NOT n.seals THEN bench.net_of(n.bytes, 'pgcrypto decrypt aes-cbc')
             END / n.net, 3) AS "x pgcrypto cbc",
       round(bench.net_of(n.bytes, 'built-in sha256(c)') / n.net, 3) AS "x sha256"
FROM bench.net AS n
ORDER BY n.bytes, n.seals DESC NULLS FIRST, n.method NOT LIKE '%crypt_col%', n.method COLLATE "C";

\echo 'The floors: scan, detoast, allocate, copy (c || '''').'
SELECT label AS size, round(max(micros) FILTER (WHERE method = 'floor: plain'), 3) AS "of values",
       round(max(micros) FILTER (WHERE method = 'floor: bulk'), 3) AS "of envelopes"
FROM bench.median JOIN bench.size USING (label) WHERE part = 'values'
GROUP BY bytes, label ORDER BY bytes;

\echo 'Other types, microseconds per value with the scan.'
SELECT label AS type,
       round(max(micros) FILTER (WHERE method = 'encrypt_col'), 3) AS "encrypt_col",
       round(max(micros) FILTER (WHERE method = 'decrypt_col'), 3) AS "decrypt_col (text form)",
       round(max(micros) FILTER (WHERE method = 'decrypt_col_as'), 3) AS "decrypt_col_as",
       round(max(micros) FILTER (WHERE method = 'text form and back'), 3)
           AS "value::text::type alone"
FROM bench.median WHERE part = 'types' GROUP BY label ORDER BY label;

\echo '64 B values under 1,000 random keys of many, beside one key; net of the floor.'
SELECT verb, round(bench.keys_net('one', verb), 3) AS "one key",
       round(bench.keys_net('many', verb), 3) AS "1,000 keys",
       round(bench.keys_net('many', verb) / bench.keys_net('one', verb), 2) AS times
FROM unnest(ARRAY['encrypt_col', 'decrypt_col_as']) AS verb;

\echo 'Other figures.'
SELECT name, round(value, 2) AS value FROM bench.fact ORDER BY name;

-- What is wanted: at least so many times as fast as the peer, or at most so much.
CREATE TABLE bench.target AS
WITH small AS (SELECT bytes, label FROM bench.size WHERE bytes <= 64),
     ours (method, verb, peer, floor_of_speed) AS (VALUES
         ('encrypt_col', 'encrypt_col', 'pgcrypto encrypt aes-cbc', 4),
         ('encrypt_col', 'encrypt_col', 'built-in sha256(c)', 1),
         ('decrypt_col_as, sealed in bulk', 'decrypt_col_as', 'pgcrypto decrypt aes-cbc', 4),
         ('decrypt_col_as, sealed in bulk', 'decrypt_col_as', 'built-in sha256(c)', 1),
         ('decrypt_col_as, sealed one by one', 'sealed one by one, decrypt_col_as',
          'pgcrypto decrypt aes-cbc', 2.5)),
     t (target, measured, wanted, at_least) AS (
    SELECT format('%s: %s, net, times as fast as %s', label, verb, peer),
           bench.net_of(bytes, peer) / bench.net_of(bytes, method), floor_of_speed, true
    FROM small, ours
    UNION ALL
    SELECT '64 KiB: encrypt_col, times as fast as pgcrypto encrypt aes-cbc',
           bench.micros_of(65536, 'pgcrypto encrypt aes-cbc')
           / bench.micros_of(65536, 'encrypt_col'), 2, true
    UNION ALL
    SELECT '64 KiB: decrypt_col_as, in times of pgcrypto decrypt aes-cbc',
           bench.micros_of(65536, 'decrypt_col_as, sealed in bulk')
           / bench.micros_of(65536, 'pgcrypto decrypt aes-cbc'), 1.3, false
    UNION ALL
    SELECT format('1,000 of %s keys: %s, net, in times of one key', :'keys', verb),
           bench.keys_net('many', verb) / bench.keys_net('one', verb), 2, false
    FROM unnest(ARRAY['encrypt_col', 'decrypt_col_as']) AS verb
    UNION ALL
    SELECT name, value, 2, false
    FROM bench.fact WHERE name = 'first open of a fresh session (ms)'
    UNION ALL
    SELECT 'memory gained from the first round to the last (MiB)',
           sum(CASE WHEN name LIKE '%last%' THEN value ELSE -value END), 8, false
    FROM bench.fact WHERE name LIKE 'memory after %'
)
SELECT target, round(measured, 2) AS measured,
       CASE WHEN at_least THEN 'at least ' ELSE 'at most ' END || wanted AS wanted,
       CASE WHEN CASE WHEN at_least THEN measured >= wanted ELSE measured <= wanted END
            THEN 'PASS' ELSE 'SHORT' END AS verdict
FROM t;

\echo 'Targets.'
TABLE bench.target;
