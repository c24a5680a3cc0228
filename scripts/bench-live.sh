#!/usr/bin/env bash
# bench-live.sh: a live column goes from plaintext to envelopes while pgbench reads and writes it.
# Called by `make bench-live`; its table is bench/live.sql. A release build on a throwaway cluster,
# durable as shipped, the worker with its default settings; BENCH_ROWS (1000000) rows, BENCH_CLIENTS
# (4) clients that send BENCH_RATE (400) statements a second in all. The application has no privilege
# on the key. The status is not 0 when a target is missed.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/cluster.sh
. "$REKEY_ROOT/scripts/cluster.sh"

rows=${BENCH_ROWS:-1000000}
clients=${BENCH_CLIENTS:-4}
rate=${BENCH_RATE:-400}

"$REKEY_ROOT/scripts/build.sh" release
CLUSTER_KEEP_LOG=$REKEY_WORK/bench-server.log
# Waits for locks are told apart from a slow disk: those of 100 ms are logged.
cluster_start release "shared_buffers = 512MB" "max_wal_size = 4GB" "log_lock_waits = on" \
    "deadlock_timeout = 100ms"
sql "CREATE EXTENSION pg_rekey; SET client_min_messages = warning;
     SELECT rekey.init_root_key(), rekey.create_key('pii')" >/dev/null
sql_file "$REKEY_ROOT/bench/live.sql" -v rows="$rows"

# One statement a script: what pgbench logs is how long the application waited for it.
cat >"$SCRATCH/read.sql" <<'SQL'
\set id random(1, :rows)
SELECT email, note FROM customer WHERE id = :id;
SQL
cat >"$SCRATCH/update.sql" <<'SQL'
\set id random(1, :rows)
UPDATE customer SET email = 'changed' || random() || '@example.org' WHERE id = :id;
SQL
cat >"$SCRATCH/other.sql" <<'SQL'
\set id random(1, :rows)
UPDATE customer SET note = 'seen' WHERE id = :id;
SQL
cat >"$SCRATCH/insert.sql" <<'SQL'
INSERT INTO customer (email) VALUES ('new' || random() || '@example.org');
SQL
cat >"$SCRATCH/delete.sql" <<'SQL'
\set id random(1, :rows)
DELETE FROM customer WHERE id = :id;
SQL

now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", b - a }'; }
# Whoever cannot have the lock within 100 ms gives way to the application, and tries again.
patiently() {
    local tries=1
    until PGOPTIONS='-c lock_timeout=100ms -c client_min_messages=warning' \
        sql "$1" >/dev/null 2>"$SCRATCH/err"; do
        grep -q 'lock timeout' "$SCRATCH/err" || { cat "$SCRATCH/err" >&2; die "it failed: $1"; }
        tries=$((tries + 1))
        sleep 0.2
    done
    echo "$tries"
}

size=$(sql "SELECT pg_table_size('customer')")
lsn=$(sql "SELECT pg_current_wal_insert_lsn()")
"$CLUSTER_BIN/pgbench" -n -U app -M prepared -D rows="$rows" -c "$clients" -R "$rate" -T 86400 \
    -f "$SCRATCH/read.sql@5" -f "$SCRATCH/update.sql@2" -f "$SCRATCH/other.sql@1" \
    -f "$SCRATCH/insert.sql@1" -f "$SCRATCH/delete.sql@1" \
    --log --log-prefix="$SCRATCH/log" >"$SCRATCH/bench.out" 2>"$SCRATCH/bench.err" &
bench=$!
sleep 5
began_at=$(date +%s)
began=$(now)
context="rekey.context('customer.email', id::text)"
begin_tries=$(patiently "SELECT rekey.encrypt_column('customer', 'email', 'email_sealed', 'pii',
    \$\$$context\$\$)")
until [ "$(sql "SELECT coalesce(bool_and(phase = 'done'), false) FROM rekey.progress")" = t ]; do
    kill -0 "$bench" 2>/dev/null || { cat "$SCRATCH/bench.err" >&2; die "the clients have ended"; }
    sleep 0.5
done
filled=$(since "$began")
began=$(now)
differ=$(sql "SELECT count(*) FROM customer
    WHERE email IS DISTINCT FROM decrypt_col(email_sealed, $context)")
compared=$(since "$began")
began=$(now)
end_tries=$(patiently "SELECT rekey.finish_encrypt_column('customer', 'email')")
finished=$(since "$began")
wal=$(sql "SELECT pg_current_wal_insert_lsn() - '$lsn'")
grown=$(sql "SELECT round(pg_table_size('customer')::numeric / $size, 2)")
# The alarm that pgbench sets for the end of its -T: it finishes its transactions and writes out its
# log, where any other signal would cut both off.
kill -ALRM "$bench" 2>/dev/null || true
wait "$bench" || { cat "$SCRATCH/bench.err" >&2; die "the clients have failed"; }
in_log() { as_server grep -E "$1" "$CLUSTER_DIR/server.log" | grep -vc 'lock timeout' || true; }
errors=$(in_log '(ERROR|FATAL|PANIC):')
lock_waits=$(in_log 'still waiting for')
# time is from the scheduled start on; the client's own lag is no wait for the server.
longest_where() {
    awk "$1"'{ t = ($3 - $7) / 1000; if (t > max) max = t } END { printf "%.1f", max }' "$SCRATCH"/log.*
}
longest=$(longest_where "\$5 >= $began_at")
before=$(longest_where "\$5 < $began_at")
statements=$(cat "$SCRATCH"/log.* | wc -l)

missed=0
# compare NAME VALUE OP TARGET
compare() {
    local verdict=ok
    awk -v a="$2" -v b="$4" "BEGIN { exit !(a $3 b) }" || { verdict=SHORT missed=1; }
    printf '%-66s %8s  wanted %s %-5s %s\n' "$1" "$2" "$3" "$4" "$verdict"
}
say "$rows rows, $statements statements of $clients clients;" \
    "load of the machine $(cut -d' ' -f1 /proc/loadavg)"
compare "longest wait of an application's statement, ms" "$longest" "<=" 500
say "the longest of the 5 s before it began: $before ms; waits for a lock of 100 ms: $lock_waits"
compare "errors in the server's log" "$errors" "==" 0
compare "rows that differ, all opened by hand under load" "$differ" "==" 0
say "filled in $filled s:" \
    "$(awk -v r="$rows" -v s="$filled" 'BEGIN { printf "%d", r / s }') rows a second, rests included"
say "compared by hand in $compared s; finish_encrypt_column took $finished s"
say "the lock was had at try $begin_tries of the begin and $end_tries of the end"
say "the table with its TOAST grew to $grown times its size;" \
    "WAL, the load's own included: $((wal / 1024 / 1024)) MB, $((wal / rows)) bytes a row"
if [ "$missed" -ne 0 ]; then
    CLUSTER_KEEP_LOG=
    die "targets are missed"
fi
