#!/usr/bin/env bash
# install.sh [PG_CONFIG]: a release build into the PostgreSQL that pg_config belongs to.
# Called by `make install`; the only script that writes into a system's PostgreSQL. It says
# where to, and goes through sudo only when those folders are not the user's.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

pg_config=$(command -v "${1:-pg_config}") || pg_config=/usr/lib/postgresql/$REKEY_PG/bin/pg_config
[ -x "$pg_config" ] || die "${1:-pg_config} is not found; set PG_CONFIG"
major=$("$pg_config" --version | sed 's/^PostgreSQL \([0-9]*\).*/\1/')
export "PG_CONFIG_$major=$pg_config"
library_dir=$("$pg_config" --pkglibdir)
extension_dir=$("$pg_config" --sharedir)/extension

cd "$REKEY_ROOT"
grep -q "^pg$major *=" Cargo.toml || die "PostgreSQL $major is not supported"
"$REKEY_ROOT/scripts/prefix.sh" "$major" release >/dev/null
REKEY_PG=$major "$REKEY_ROOT/scripts/build.sh" release
built=$("$REKEY_ROOT/scripts/prefix.sh" "$major" release)

say "installing into $library_dir and $extension_dir"
root=()
if [ ! -w "$library_dir" ] || [ ! -w "$extension_dir" ]; then
    command -v sudo >/dev/null || die "those folders are not yours and there is no sudo"
    root=(sudo)
fi
"${root[@]}" install -m 0755 "$("$built" --pkglibdir)/pg_rekey.so" "$library_dir/"
"${root[@]}" install -m 0644 "$("$built" --sharedir)"/extension/pg_rekey{.control,--*.sql} \
    "$extension_dir/"
say "done. In postgresql.conf: shared_preload_libraries = 'pg_rekey' and rekey.root_key_file;"
say "then, in each database: CREATE EXTENSION pg_rekey; SELECT rekey.init_root_key();"
