#!/usr/bin/env bash
# bench-reencrypt.sh: re-encryption with its proof beside one UPDATE by hand with pgcrypto.
# Called by `make bench-reencrypt`; the SQL of a round is bench/reencrypt.sql. A release build on a
# throwaway cluster, durable as shipped; medians of BENCH_ROUNDS (3) rounds over BENCH_ROWS (1000000)
# rows. The status is not 0 when a target is missed.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/cluster.sh
. "$REKEY_ROOT/scripts/cluster.sh"

rounds=${BENCH_ROUNDS:-3}
rows=${BENCH_ROWS:-1000000}
export PGOPTIONS='-c max_parallel_workers_per_gather=0 -c jit=off -c client_min_messages=warning'

"$REKEY_ROOT/scripts/build.sh" release
CLUSTER_KEEP_LOG=$REKEY_WORK/bench-server.log
cluster_start release "shared_buffers = 512MB" "max_wal_size = 4GB" "rekey.worker = off"
sql "CREATE EXTENSION pg_rekey; CREATE EXTENSION pgcrypto" >/dev/null
sql "SELECT rekey.init_root_key(), rekey.create_key('pii', grace => '0')" >/dev/null
for _ in $(seq "$rounds"); do
    sql_file "$REKEY_ROOT/bench/reencrypt.sql" -v rows="$rows" | tee -a "$SCRATCH/rounds"
done
median() { cut -d' ' -f"$1" "$SCRATCH/rounds" | sort -g | sed -n "$(((rounds + 1) / 2))p"; }
missed=0
# compare NAME VALUE OP TARGET
compare() {
    local verdict=ok
    awk -v a="$2" -v b="$4" "BEGIN { exit !(a $3 b) }" || { verdict=SHORT missed=1; }
    printf '%-66s %8s  wanted %s %-5s %s\n' "$1" "$2" "$3" "$4" "$verdict"
}
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.3f", a / b }'; }
say "medians of $rounds rounds, $rows rows; load of the machine $(cut -d' ' -f1 /proc/loadavg)"
compare "re-encryption with proof, times the speed of the UPDATE" \
    "$(ratio "$(median 1)" "$(median 2)")" ">=" 0.7
compare "growth of the table (the UPDATE: $(median 3))" "$(median 4)" "<=" 1.3
compare "proof scan, times the speed of count(octet_length(c))" \
    "$(ratio "$(median 7)" "$(median 8)")" ">=" 0.5
say "WAL in bytes a row: $(median 6), the UPDATE $(median 5)"
if [ "$missed" -ne 0 ]; then
    CLUSTER_KEEP_LOG=
    die "targets are missed"
fi
