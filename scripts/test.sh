#!/usr/bin/env bash
# test.sh [STAGE]...: the project's tests, all stages by default (`make test`, .ci/run).
# Each stage prints its name and time; a failing one does not hide the others; the last line
# is a summary, and the exit status is 0 only when every stage passed.
# Invariant: nothing outside target/ and REKEY_WORK is written, and no network is used.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$REKEY_ROOT"

all_stages=(fmt clippy shell core vectors fuzz build regress cluster readme pg)

describe_stage() {
    case $1 in
    fmt) echo "formatting" ;;
    clippy) echo "clippy, warnings are errors" ;;
    shell) echo "shell scripts (shellcheck, where installed); links; released SQL is as it was" ;;
    core) echo "the pure core: unit and property tests" ;;
    vectors) echo "the pure core, release: accumulated vectors of XAES-256-GCM" ;;
    fuzz) echo "fuzz runner over the parsers" ;;
    build) echo "debug build, installed into a private PostgreSQL $REKEY_PG" ;;
    regress) echo "pg_regress: what users see" ;;
    cluster) echo "cluster tests: sessions, commits, workers, crashes, standbys" ;;
    readme) echo "the README's examples" ;;
    pg) echo "tests inside the server (#[pg_test])" ;;
    *) die "unknown stage $1; there are: ${all_stages[*]}" ;;
    esac
}

bindir() { "$("$REKEY_ROOT/scripts/prefix.sh" "$REKEY_PG" debug)" --bindir; }

stage_fmt() { cargo fmt --all --check; }

stage_clippy() {
    cargo clippy --workspace --all-targets -- -D warnings &&
        cargo clippy -p pg_rekey --all-targets --features pg_test -- -D warnings
}

stage_shell() {
    bash -n scripts/*.sh .ci/run examples/root-key/*.sh || return 1
    scripts/freeze.sh --check || return 1
    scripts/links.sh || return 1
    if command -v shellcheck >/dev/null; then
        shellcheck -x scripts/*.sh .ci/run examples/root-key/*.sh
    else
        echo "shellcheck is not installed: syntax checked only"
    fi
}

stage_core() { cargo test -p rekey-core --no-fail-fast; }

stage_vectors() { cargo test -p rekey-core --release --lib; }

# A run is a function of its seed, printed on a failure: fuzz/README.md.
stage_fuzz() {
    REKEY_FUZZ_ITERATIONS=${REKEY_FUZZ_ITERATIONS:-300000} cargo test -p rekey-fuzz --release
}

stage_build() { scripts/build.sh debug; }

stage_regress() { scripts/regress.sh; }

stage_cluster() {
    scripts/build.sh debug || return 1
    REKEY_PG_BIN=$(bindir) cargo test -p rekey-tests --no-fail-fast
}

stage_readme() {
    local page status=0
    for page in README.md docs/search.md docs/live-columns.md docs/monitoring.md docs/development.md; do
        scripts/readme.sh "$page" || status=1
    done
    return $status
}

stage_pg() {
    local data=$REKEY_WORK/pgtest keys=$REKEY_WORK/pgtest-keys
    local -a as_postgres=()
    scripts/prefix.sh "$REKEY_PG" debug >/dev/null || return 1
    if is_root; then
        rm -rf "$data"
        mkdir -p "$data"
        chown postgres:postgres "$data"
        as_postgres=(--runas postgres --pgdata "$data")
    fi
    # One at a time: each test makes the one root key and its keys in a transaction of its own, so
    # that two would wait for each other.
    rm -rf "$keys"
    mkdir -m 700 "$keys"
    ! is_root || chown postgres:postgres "$keys"
    REKEY_TEST_KEYS=$keys RUST_TEST_THREADS=1 cargo pgrx test "pg$REKEY_PG" -p pg_rekey "${as_postgres[@]}"
}

passed=()
failed=()
run_stage() {
    local stage=$1 begin=$SECONDS
    printf '\n=== %s: %s\n' "$stage" "$(describe_stage "$stage")"
    # A function called in a condition runs without errexit: each stage ends with what matters.
    if "stage_$stage"; then
        passed+=("$stage")
        printf '=== %s: passed, %d s\n' "$stage" $((SECONDS - begin))
    else
        failed+=("$stage")
        printf '=== %s: FAILED, %d s\n' "$stage" $((SECONDS - begin))
    fi
}

trap 'echo "interrupted" >&2; exit 130' INT
trap 'exit 143' TERM
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=("${all_stages[@]}")
for stage in "${stages[@]}"; do describe_stage "$stage" >/dev/null; done
scripts/setup.sh
scripts/prefix.sh "$REKEY_PG" debug >/dev/null
for stage in "${stages[@]}"; do run_stage "$stage"; done

if [ ${#failed[@]} -gt 0 ]; then
    printf '\n%d of %d stages FAILED in %d s: %s\n' \
        ${#failed[@]} ${#stages[@]} "$SECONDS" "${failed[*]}"
    exit 1
fi
printf '\nall %d stages passed in %d s: %s\n' ${#passed[@]} "$SECONDS" "${passed[*]}"
