#!/usr/bin/env bash
# freeze.sh [--check]: what was released stays as it was released.
# Without --check: called once per release (CONTRIBUTING.md, "How to release"). Keeps the install
# script of this version, as it is generated, in sql/released/, and the sums of that and of the
# update scripts to this version. tests/tests/upgrade.rs updates from each of them to the present.
# With --check: called by test.sh; fails when a released script has changed or has no sum.
# The scripts in sql/released/ are not installed: only the update scripts in sql/ are.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$REKEY_ROOT/sql"

sums=released/SHA256SUMS
version=$(sed -n 's/^version = "\(.*\)"/\1/p' ../Cargo.toml | head -1)
[ -n "$version" ] || die "Cargo.toml names no version"

is_listed() { grep -qsF "  $1" "$sums"; } # FILE, from sql/

check() {
    local file wrong=0
    if [ -f "$sums" ]; then
        sha256sum --quiet --strict -c "$sums" || wrong=1
    fi
    for file in released/*.sql pg_rekey--*.sql; do
        [ -f "$file" ] || continue
        # The update to the version that is being made may still change.
        if ! is_listed "$file" && { [[ $file != pg_rekey--*--"$version".sql ]] ||
            is_listed "released/pg_rekey--$version.sql"; }; then
            echo "sql/$file has no sum in sql/$sums" >&2
            wrong=1
        fi
    done
    [ "$wrong" -eq 0 ] || die "a released script never changes: make a new version instead"
}

freeze() {
    local script=released/pg_rekey--$version.sql config file
    ! is_listed "$script" || die "version $version is released already"
    check
    "$REKEY_ROOT/scripts/build.sh" debug
    config=$("$REKEY_ROOT/scripts/prefix.sh" "$REKEY_PG" debug)
    mkdir -p released
    cp "$("$config" --sharedir)/extension/pg_rekey--$version.sql" "$script"
    for file in "$script" pg_rekey--*--"$version".sql; do
        [ ! -f "$file" ] || sha256sum "$file" >>"$sums"
    done
    say "frozen: version $version. Commit sql/released/."
}

case ${1:-} in
--check) check ;;
'') freeze ;;
*) die "freeze.sh [--check]" ;;
esac
