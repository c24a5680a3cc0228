#!/usr/bin/env bash
# regress.sh [TEST]...: run tests/regress with PostgreSQL's own pg_regress; all by default.
# Called by test.sh. The server is a throwaway one with the debug build; results and differences
# stay in REKEY_WORK/regress. To accept a result: copy results/TEST.out to tests/regress/expected.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/cluster.sh
. "$REKEY_ROOT/scripts/cluster.sh"

input=$REKEY_ROOT/tests/regress
output=$REKEY_WORK/regress
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
    for file in "$input"/sql/*.sql; do
        [ -f "$file" ] || die "no tests in $input/sql"
        tests+=("$(basename "$file" .sql)")
    done
fi

"$REKEY_ROOT/scripts/build.sh" debug
cluster_start debug "fsync = off"
pg_regress=$(dirname "$("$CLUSTER_BIN/pg_config" --pgxs)")/../test/regress/pg_regress
# A wheel has none; the program only starts psql and compares, so that another major's serves.
if [ ! -x "$pg_regress" ]; then
    for pg_regress in /usr/lib/postgresql/*/lib/pgxs/src/test/regress/pg_regress; do :; done
fi
[ -x "$pg_regress" ] || die "no pg_regress (package postgresql-server-dev-$REKEY_PG)"

rm -rf "$output"
mkdir -p "$output"
expected=()
! "$pg_regress" --help | grep -q -- --expecteddir || expected=(--expecteddir="$input")
if ! "$pg_regress" --host="$PGHOST" --port=5432 --user=postgres --bindir="$CLUSTER_BIN" \
    --dbname=regress_rekey --inputdir="$input" "${expected[@]}" --outputdir="$output" \
    --encoding=UTF8 --no-locale "${tests[@]}"; then
    cat "$output/regression.diffs" >&2 || true
    die "pg_regress found differences"
fi
