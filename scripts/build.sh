#!/usr/bin/env bash
# build.sh debug|release [cargo pgrx install options, for example --features x]
# Builds the extension and installs it into the private tree of that kind (prefix.sh).
# Called by the Makefile, demo.sh and bench.sh. Does nothing when neither the sources nor the
# installed library changed since the last time: a digest of both is kept in the tree.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

kind=${1:-debug}
[ $# -eq 0 ] || shift
case $kind in
debug) profile=() ;;
release) profile=(--release) ;;
*) die "build debug or release?" ;;
esac

make_work
pg_config=$("$REKEY_ROOT/scripts/prefix.sh" "$REKEY_PG" "$kind")
stamp_file=$REKEY_WORK/pg$REKEY_PG-$kind/.build-stamp
library=$("$pg_config" --pkglibdir)/pg_rekey.so
# 15 is the default feature; another major replaces it.
[ "$REKEY_PG" = 15 ] || profile+=(--no-default-features --features "pg$REKEY_PG")

cd "$REKEY_ROOT"
source_stamp() {
    local -a files
    mapfile -t files < <(find src sql core pg_test -type f 2>/dev/null | LC_ALL=C sort)
    echo "$* $(stamp_of "${files[@]}" Cargo.toml Cargo.lock pg_rekey.control)"
}

exec 8>"$REKEY_WORK/.build-$REKEY_PG-$kind.lock"
flock 8
sources=$(source_stamp "$@")
[ "$(cat "$stamp_file" 2>/dev/null)" != "$sources $(stamp_of "$library")" ] || exit 0

say "building pg_rekey ($kind) into $REKEY_WORK/pg$REKEY_PG-$kind"
rm -f "$stamp_file"
# An earlier version's install script would still be offered, and packed.
rm -f "$("$pg_config" --sharedir)"/extension/pg_rekey--*.sql
log=$REKEY_WORK/build-$REKEY_PG-$kind.log
# cargo's progress goes to the terminal; what cargo pgrx tells besides is kept for failures.
if ! cargo pgrx install "${profile[@]}" "$@" -c "$pg_config" >"$log" 8>&-; then
    cat "$log" >&2
    die "the build failed"
fi
[ -f "$library" ] || die "cargo pgrx install left no $library"
# The digest is of the sources before: those that changed meanwhile are built again next time.
echo "$sources $(stamp_of "$library")" >"$stamp_file"
