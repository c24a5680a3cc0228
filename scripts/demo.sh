#!/usr/bin/env bash
# demo.sh: rotates a key twice while an application reads and writes, and proves that nothing
# failed and nothing was lost. Called by `make demo`; the SQL is in examples/demo/.
# A release build on a throwaway cluster with PostgreSQL's own defaults for durability.
# Ends with a table of figures; the status is not 0 if a single figure is off. Cleans up, on
# Ctrl-C too. DEMO_SECONDS (15) and DEMO_CLIENTS (4) set the load.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/cluster.sh
. "$REKEY_ROOT/scripts/cluster.sh"

seconds=${DEMO_SECONDS:-15}
clients=${DEMO_CLIENTS:-4}
demo=$REKEY_ROOT/examples/demo
customers=200000
values=$((5 * customers))
problems=0

now_ms() { echo $(($(date +%s%N) / 1000000)); }
per_second() { echo $(($1 * 1000 / ($2 > 0 ? $2 : 1))); }
thousands() { sed ':a;s/\B[0-9]\{3\}\>/,&/;ta' <<<"$1"; }
as_app() { "$CLUSTER_BIN/psql" -XAtq -U shop_app -v ON_ERROR_STOP=1 "$@"; }

# figure NAME VALUE [WANTED]: a line of the table; a value that is not the wanted one is a problem.
figures=()
figure() {
    local mark=''
    if [ $# -gt 2 ] && [ "$2" != "$3" ]; then
        mark="   <-- expected $(thousands "$3")"
        problems=$((problems + 1))
    fi
    figures+=("$(printf '  %-52s %22s%s' "$1" "$(thousands "$2")" "$mark")")
}

# percentile SCRIPT P: milliseconds, out of pgbench's log (client, number, µs, script, ...).
percentile() {
    awk -v s="$1" '$4 == s { print $3 }' "$work"/log.* | sort -n |
        awk -v p="$2" '{ v[NR] = $1 } END { i = int(NR * p / 100 + 0.999999); if (i < 1) i = 1
            printf "%.2f\n", NR ? v[i] / 1000 : 0 }'
}

rotate() { # REASON: prints milliseconds; the transaction is the rotator's
    local begin
    begin=$(date +%s%N)
    "$CLUSTER_BIN/psql" -XAtq -U shop_rotator -v ON_ERROR_STOP=1 \
        -c "SELECT rotate_key('pii', '$1')" >"$work/slot"
    echo $((($(date +%s%N) - begin) / 1000000))
}

"$REKEY_ROOT/scripts/build.sh" release
say "1. A throwaway PostgreSQL $REKEY_PG, with the extension preloaded"
CLUSTER_KEEP_LOG=$REKEY_WORK/demo-server.log
cluster_start release "shared_buffers = 256MB" "max_wal_size = 4GB"
work=$SCRATCH
sql "CREATE DATABASE shop"
export PGDATABASE=shop

say "2. A root key outside the database, the key 'pii', an application role and a rotator role"
PGOPTIONS='-c client_min_messages=warning' sql_file "$demo/schema.sql" >"$work/schema.out"

say "3. The application seals $(thousands $customers) customers, five values each"
begin=$(now_ms)
as_app -f "$demo/fill.sql"
seal_ms=$(($(now_ms) - begin))
sql "VACUUM ANALYZE customers"
figure "values sealed and stored per second" "$(per_second $values $seal_ms)"

say "4. $clients clients read and write for $seconds s; the key is rotated twice meanwhile"
"$CLUSTER_BIN/pgbench" -n -U shop_app -M prepared -c "$clients" -j 1 -T "$seconds" \
    --max-tries=1 -f "$demo/writer.sql@1" -f "$demo/reader.sql@3" \
    --log --log-prefix="$work/log" --progress=5 >"$work/bench.out" 2>"$work/bench.err" &
bench=$!
pause() { sleep "$((seconds / 3))" & wait $!; }
pause
first_ms=$(rotate "first rotation under load")
say "   rotated: slot $(cat "$work/slot") is active ($first_ms ms with the connection)"
pause
second_ms=$(rotate "second rotation under load")
say "   rotated: slot $(cat "$work/slot") is active ($second_ms ms with the connection)"
bench_status=0
wait $bench || bench_status=$?
aborted=$(grep -c 'aborted' "$work/bench.err" || true)
failed=$(sed -n 's/^number of failed transactions: \([0-9]*\).*/\1/p' "$work/bench.out" | head -1)
tps=$(sed -n 's/^tps = \([0-9]*\).*/\1/p' "$work/bench.out" | head -1)
updates=$(awk '$4 == 0' "$work"/log.* | wc -l)
reads=$(awk '$4 == 1' "$work"/log.* | wc -l)
figure "transactions per second (1 write : 3 reads)" "${tps:-0}"
figure "reads, each checking five opened values" "$reads"
figure "  median, 99 %, slowest (ms)" \
    "$(percentile 1 50) / $(percentile 1 99) / $(percentile 1 100)"
figure "writes, each sealing three values" "$updates"
figure "  median, 99 %, slowest (ms)" \
    "$(percentile 0 50) / $(percentile 0 99) / $(percentile 0 100)"
figure "first rotation, with its connection (ms)" "$first_ms"
figure "second rotation, with its connection (ms)" "$second_ms"
figure "pgbench's exit status" "$bench_status" 0
figure "clients that met an error" "$aborted" 0
figure "failed transactions" "${failed:-unknown}" 0
figure "errors in the server's log" \
    "$(as_server grep -cE '(ERROR|FATAL|PANIC):' "$CLUSTER_DIR/server.log" || true)" 0
figure "revisions stored (writes: none lost)" "$(sql 'SELECT sum(rev) FROM customers')" "$updates"

say "5. Every value is opened again and compared"
begin=$(now_ms)
good=$(as_app -f "$demo/verify.sql")
open_ms=$(($(now_ms) - begin))
figure "values opened and compared per second" "$(per_second $values $open_ms)"
figure "customers whose five values all open right" "$good" "$customers"
figure "slots of the key (one per rotation, and the first)" \
    "$(sql "SELECT count(*) FROM rekey.slots WHERE key_name = 'pii'")" 3
figure "active slots" \
    "$(sql "SELECT count(*) FROM rekey.slots WHERE key_name = 'pii' AND state = 'active'")" 1

say "6. Who may not read, does not"
for role in shop_rotator postgres_reader; do
    [ "$role" = shop_rotator ] || sql "CREATE ROLE postgres_reader LOGIN"
    sql "GRANT SELECT ON customers TO $role"
    answer=$("$CLUSTER_BIN/psql" -XAtq -U "$role" -v VERBOSITY=sqlstate -c "
        SELECT decrypt_col(name_c, rekey.context('customer.name', id::text))
        FROM customers LIMIT 1" 2>&1 || true)
    [ "${answer##* }" != 42501 ] || answer=refused
    figure "opening as $role, without the privilege" "$answer" refused
done
sql "CREATE TABLE in_the_clear AS SELECT customer_national_id(7) || '-control' AS t; CHECKPOINT"
secret=$(sql "SELECT customer_national_id(123456)")
control=$(sql "SELECT t FROM in_the_clear")
files_with() { as_server grep -rlaF -- "$1" "$CLUSTER_DIR/data" | wc -l; }
[ "$(files_with "$control")" -gt 0 ] || die "the search for plaintext does not work"
figure "files of the server that hold a sealed value's text" "$(files_with "$secret")" 0

say ""
say "Which slot the $(thousands $values) stored values are under (read from their headers):"
"$CLUSTER_BIN/psql" -Xq -P footer=off -f "$demo/slots.sql"
say "Figures:"
printf '%s\n' "${figures[@]}"
say ""
if [ "$problems" -ne 0 ]; then
    cat "$work/bench.err" >&2
    die "$problems figures are off"
fi
say "Two rotations under load: no error, no lost write, every value opens."
