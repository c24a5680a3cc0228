#!/usr/bin/env bash
# bench-search.sh: a lookup by fingerprint beside one by a plain indexed column.
# Called by `make bench-search`. A release build on a throwaway cluster, one client with prepared
# statements over BENCH_ROWS (1000000) rows; the best of BENCH_ROUNDS (3) runs of BENCH_SECONDS (10)
# each, in turns, so that other work on the machine counts little; taken before a rotation of the lookup key, at its beginning, half-way, after it, and once
# the old slot is gone. The status is not 0 when a lookup takes more than twice the plain one's time,
# or misses a row.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/cluster.sh
. "$REKEY_ROOT/scripts/cluster.sh"

rounds=${BENCH_ROUNDS:-3}
rows=${BENCH_ROWS:-1000000}
seconds=${BENCH_SECONDS:-10}
export PGOPTIONS='-c max_parallel_workers_per_gather=0 -c jit=off -c client_min_messages=warning'

"$REKEY_ROOT/scripts/build.sh" release
CLUSTER_KEEP_LOG=$REKEY_WORK/bench-server.log
cluster_start release "shared_buffers = 512MB" "max_wal_size = 4GB" "rekey.worker = off" \
    "fsync = off"
sql "CREATE EXTENSION pg_rekey" >/dev/null
sql "SELECT rekey.init_root_key(), rekey.create_key('pii'),
            rekey.create_key('lookup', purpose => 'lookup', grace => '0')" >/dev/null
sql "CREATE TABLE t (id int, plain text, c bytea, fp bytea)" >/dev/null
sql "INSERT INTO t SELECT i, 'user' || i, encrypt_col('user' || i, 'pii'), fingerprint_col('user' || i, 'lookup')
       FROM generate_series(1, $rows) AS i" >/dev/null
sql "CREATE INDEX t_plain ON t (plain)" >/dev/null
sql "CREATE INDEX t_fp ON t (fp)" >/dev/null
sql "SELECT rekey.register_column('t', 'c'),
            rekey.register_fingerprint('t', 'fp', 'c', 'lookup', 'pii')" >/dev/null
sql "VACUUM (ANALYZE, FREEZE) t" >/dev/null


{
    printf '\\set id random(1, %s)\n' "$rows"
    printf "SELECT id FROM t WHERE plain = 'user' || :id;\n"
} >"$SCRATCH/plain.sql"
{
    printf '\\set id random(1, %s)\n' "$rows"
    printf "SELECT id FROM t WHERE fp = ANY (rekey.fingerprints('user' || :id, 'lookup'));\n"
} >"$SCRATCH/fp.sql"

# run SCRIPT: milliseconds of one lookup.
run() {
    "$CLUSTER_BIN/pgbench" -n -M prepared -T "$seconds" -f "$SCRATCH/$1.sql" |
        sed -n 's/^latency average = \([0-9.]*\) ms$/\1/p'
}
missed=0
# moment NAME: both lookups at this moment, and whether every hundredth row is found.
moment() {
    local plain fp lost i verdict=ok
    : >"$SCRATCH/plain"
    : >"$SCRATCH/fp"
    for ((i = 0; i < rounds; i++)); do
        run plain >>"$SCRATCH/plain"
        run fp >>"$SCRATCH/fp"
    done
    plain=$(sort -g "$SCRATCH/plain" | head -n 1)
    fp=$(sort -g "$SCRATCH/fp" | head -n 1)
    lost=$(sql "SELECT count(*) FROM t WHERE id % 100 = 0 AND NOT EXISTS (SELECT FROM t AS f
         WHERE f.id = t.id AND f.fp = ANY (rekey.fingerprints(t.plain, 'lookup')))")
    awk -v a="$fp" -v b="$plain" 'BEGIN { exit !(a <= 2 * b) }' || { verdict=SHORT missed=1; }
    [ "$lost" = 0 ] || { verdict=LOST missed=1; }
    printf '%-34s plain %s ms, fingerprint %s ms: %s times, wanted <= 2  %s\n' "$1" "$plain" "$fp" \
        "$(awk -v a="$fp" -v b="$plain" 'BEGIN { printf "%.2f", a / b }')" "$verdict"
}
say "the best of $rounds runs of $seconds s, $rows rows; load of the machine $(cut -d' ' -f1 /proc/loadavg)"
moment "before the rotation"
sql "SELECT rotate_key('lookup')" >/dev/null
moment "all rows under the old slot"
sql "UPDATE t SET fp = fingerprint_col(plain, 'lookup') WHERE id % 2 = 0" >/dev/null
sql "VACUUM (ANALYZE) t" >/dev/null
moment "half of them"
sql "CALL rekey.reencrypt()" >/dev/null
sql "VACUUM (ANALYZE) t" >/dev/null
[ "$(sql "SELECT state FROM rekey.slots WHERE key_name = 'lookup' AND version = 1")" = drained ] ||
    die "the old slot is not drained"
moment "drained"
sql "SELECT rekey.destroy_slot(slot_id) FROM rekey.slots WHERE state = 'drained'" >/dev/null
moment "the old slot destroyed"
say "index on fingerprints: $(sql "SELECT pg_size_pretty(pg_relation_size('t_fp'))"), on the plain column: $(sql "SELECT pg_size_pretty(pg_relation_size('t_plain'))")"
if [ "$missed" -ne 0 ]; then
    CLUSTER_KEEP_LOG=
    die "targets are missed"
fi
