# shellcheck shell=bash
# What every script shares: where things live, and how to act as the user that may run a server.
# Sourced by scripts/*.sh, never run. Nothing here installs, builds or starts anything.
# Invariant: everything we write lies in the project's target/ or under REKEY_WORK; the
# system-wide PostgreSQL and the user's ~/.pgrx stay as they are.

umask 022
shopt -s inherit_errexit # a failing command substitution ends the script
unset RUSTFLAGS # it would override the linker flag that keeps pgrx's schema section
unset PGHOST PGHOSTADDR PGPORT PGUSER PGDATABASE PGSERVICE PGOPTIONS PGPASSFILE PGDATA
unset RUST_BACKTRACE # in a server's environment it adds backtraces to DETAIL
export LC_MESSAGES=C

REKEY_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REKEY_WORK=${REKEY_WORK:-/var/tmp/pg_rekey-$(id -un)}
REKEY_PG=${REKEY_PG:-15}
export REKEY_WORK PGRX_HOME=$REKEY_WORK/pgrx
export PATH=$REKEY_WORK/cargo/bin:$PATH # where setup.sh puts cargo-pgrx

# The one place that names the version of pgrx is Cargo.toml.
pgrx_version() {
    sed -n 's/^pgrx *= *"=\([0-9.]*\)".*/\1/p' "$REKEY_ROOT/Cargo.toml"
}

say() { printf '%s\n' "$*"; }
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# source_config MAJOR: the pg_config of the tree that prefix.sh copies: what PG_CONFIG_<MAJOR>
# names, else Debian's, else that of the wheel which wheel.sh has fetched.
source_config() {
    local variable=PG_CONFIG_$1 config
    for config in "${!variable:-}" "/usr/lib/postgresql/$1/bin/pg_config" \
        "$REKEY_WORK/wheel-$1"/*/pginstall/bin/pg_config; do
        [ -z "$config" ] || [ ! -x "$config" ] || break
    done
    printf '%s\n' "$config"
}

is_root() { [ "$(id -u)" -eq 0 ]; }

# PostgreSQL refuses to run as root: root runs servers as this user, anyone else as himself.
server_user() { if is_root; then echo postgres; else id -un; fi; }

# as_server COMMAND...: run a command as the user that owns the throwaway servers.
as_server() {
    if is_root; then
        setpriv --reuid=postgres --regid=postgres --init-groups \
            env HOME="$REKEY_WORK" USER=postgres LOGNAME=postgres "$@"
    else
        "$@"
    fi
}

# The work folder has a guessable name in a world-writable place: never use one made by another.
make_work() {
    mkdir -p "$REKEY_WORK"
    [ -O "$REKEY_WORK" ] || die "$REKEY_WORK belongs to someone else; set REKEY_WORK"
    chmod 0755 "$REKEY_WORK"
}

# stamp_of FILE...: a short digest of names, sizes and modification times; missing files count too.
stamp_of() { stat -L -c '%n %s %Y' -- "$@" 2>&1 | sha256sum | cut -c1-32; }
