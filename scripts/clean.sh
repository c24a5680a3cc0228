#!/usr/bin/env bash
# clean.sh: stop throwaway clusters that a killed run left, remove all that was built.
# Called by `make clean`. Only what cluster.sh, prefix.sh and cargo made is touched.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

for pid_file in "$REKEY_WORK"/run.*/data/postmaster.pid /tmp/pg_rekey.*/data/postmaster.pid; do
    [ -f "$pid_file" ] || continue
    dir=$(dirname "$(dirname "$pid_file")")
    [ "$(stat -c %U "$dir")" = "$(server_user)" ] || continue
    # The number may long belong to another process: ours has the folder in its command line.
    pid=$(head -1 "$pid_file")
    if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "$dir/data"; then
        say "stopping the server in $dir"
        kill -QUIT "$pid" || true
    fi
    rm -rf "$dir"
done
if [ -d "$REKEY_WORK" ]; then
    [ -O "$REKEY_WORK" ] || die "$REKEY_WORK belongs to someone else"
    # cargo/ holds cargo-pgrx, which takes minutes to build: kept.
    find "$REKEY_WORK" -mindepth 1 -maxdepth 1 ! -name cargo -exec rm -rf {} +
fi
cd "$REKEY_ROOT"
cargo clean
