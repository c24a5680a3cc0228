#!/usr/bin/env bash
# bench.sh: the speed of sealing and opening beside pgcrypto and sha256, and against the targets.
# Called by `make bench`; the SQL is in bench/. A release build, proved to be one, on a throwaway
# cluster; one backend, everything in shared buffers, interleaved rounds, medians.
# The status is not 0 when a target is missed. BENCH_ROUNDS (9) and BENCH_KEYS (100000) shorten
# a trial run; quiet neighbours make the figures: the load of the machine is shown.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/cluster.sh
. "$REKEY_ROOT/scripts/cluster.sh"

rounds=${BENCH_ROUNDS:-9}
keys=${BENCH_KEYS:-100000}
bench=$REKEY_ROOT/bench
export PGOPTIONS='-c max_parallel_workers_per_gather=0 -c jit=off -c client_min_messages=warning'

"$REKEY_ROOT/scripts/build.sh" release
CLUSTER_KEEP_LOG=$REKEY_WORK/bench-server.log
# Durability costs nothing in what is measured (scans); without it the set-up is quicker.
cluster_start release "shared_buffers = 768MB" "fsync = off" "synchronous_commit = off" \
    "max_wal_size = 8GB" "autovacuum = off"
say "PostgreSQL $(sql 'SHOW server_version')," \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(nproc) CPUs"

sql_file "$bench/tables.sql" >/dev/null
sql_file "$bench/harness.sql" >/dev/null
seal_ms=$(sql "SELECT bench.release_seal_ms()")
say "a 64 KiB value seals in $seal_ms ms (median of 21)"
[ "$(sql "SELECT $seal_ms <= 1")" = t ] ||
    die "that is no release build: refusing to measure"

say "creating $keys keys"
sql_file "$bench/keys.sql" -v keys="$keys" >/dev/null
sql "VACUUM (FREEZE, ANALYZE)"

say "first open of fresh sessions"
for _ in {1..25}; do
    sql_file "$bench/first_open.sql"
done 2>"$SCRATCH/first-open" || { cat "$SCRATCH/first-open" >&2; exit 1; }
median_open=$(sed -n 's/.*first open: //p' "$SCRATCH/first-open" | sort -g | sed -n 13p)
sql "INSERT INTO bench.fact VALUES ('first open of a fresh session (ms)', $median_open)"

say "measuring: $rounds rounds, load of the machine before: $(cut -d' ' -f1 /proc/loadavg)"
begin=$SECONDS
sql "CALL bench.measure($rounds)"
sql "CALL bench.measure_inserts(5)"
say "measured in $((SECONDS - begin)) s"
sql_file "$bench/report.sql" -v rounds="$rounds" -v keys="$keys"
short=$(sql "SELECT count(*) FROM bench.target WHERE verdict = 'SHORT'")
[ "$short" -eq 0 ] || {
    # A missed target is a result, not a failure of the server.
    CLUSTER_KEEP_LOG=
    die "$short targets are missed (load of the machine now: $(cut -d' ' -f1 /proc/loadavg))"
}
say "all targets are met"
