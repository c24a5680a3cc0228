#!/usr/bin/env bash
# bench-tenants.sh: a key for each tenant: the figures of docs/tenants.md.
# Called by `make bench-tenants`; the SQL is bench/tenants.sql. A release build on a throwaway
# cluster, durable as shipped, with BENCH_TENANTS (100000) keys. Prints figures and judges none.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/cluster.sh
. "$REKEY_ROOT/scripts/cluster.sh"

tenants=${BENCH_TENANTS:-100000}
export PGOPTIONS='-c jit=off -c client_min_messages=warning'

"$REKEY_ROOT/scripts/build.sh" release
CLUSTER_KEEP_LOG=$REKEY_WORK/bench-server.log
cluster_start release "shared_buffers = 512MB" "max_wal_size = 4GB" "rekey.worker = off"
sql "CREATE EXTENSION pg_rekey" >/dev/null
sql "SELECT rekey.init_root_key()" >/dev/null
say "$tenants tenants; load of the machine $(cut -d' ' -f1 /proc/loadavg)"
sql_file "$REKEY_ROOT/bench/tenants.sql" -v tenants="$tenants"
