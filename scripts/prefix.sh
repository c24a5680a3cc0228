#!/usr/bin/env bash
# prefix.sh MAJOR debug|release|test: make a private PostgreSQL tree; print its pg_config's path.
# Called by build.sh, cluster.sh, bench.sh, demo.sh and the Makefile.
# PostgreSQL finds its lib and share folders relative to its own binary, so real copies of the
# binaries with links to all else make a server into which an ordinary user can install. The
# system's tree is only read. debug, release and test (cargo pgrx test) never clobber each other.
# The source is Debian's tree, or a wheel's (wheel.sh), or what PG_CONFIG_<MAJOR> names.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

major=${1:-$REKEY_PG}
kind=${2:-debug}
case $kind in debug | release | test) ;; *) die "unknown kind of prefix: $kind" ;; esac

source_config=$(source_config "$major")
[ -x "$source_config" ] || die "no PostgreSQL $major: $source_config is missing (scripts/setup.sh)"

prefix=$REKEY_WORK/pg$major-$kind
bindir=$("$source_config" --bindir)
pkglibdir=$("$source_config" --pkglibdir)
libdir=$("$source_config" --libdir)
sharedir=$("$source_config" --sharedir)
private_config=$prefix$bindir/pg_config
layout=1 # raise when this script lays out a tree differently
stamp="$layout $("$source_config" --version) $(stamp_of "$bindir/postgres")"

# Links for all entries of a folder but those named.
link_all() { # FROM TO [EXCEPT...]
    local from=$1 to=$2 entry name
    shift 2
    mkdir -p "$to"
    for entry in "$from"/*; do
        name=${entry##*/}
        case " $* " in *" $name "*) continue ;; esac
        ln -sfn "$entry" "$to/$name"
    done
}

link_one() { # PATH: the same path below the prefix
    [ -e "$1" ] || return 0
    mkdir -p "$prefix$(dirname "$1")"
    [ -e "$prefix$1" ] || ln -sfn "$1" "$prefix$1"
}

make_prefix() {
    rm -rf "$prefix"
    mkdir -p "$prefix$bindir"
    cp -a "$bindir/." "$prefix$bindir/"
    chmod -R u+w,a+rX "$prefix$bindir"
    find "$prefix$bindir" -type f -exec chmod a+x {} +
    link_all "$pkglibdir" "$prefix$pkglibdir" pg_rekey.so
    link_all "$sharedir" "$prefix$sharedir" extension
    link_all "$sharedir/extension" "$prefix$sharedir/extension"
    rm -f "$prefix$sharedir"/extension/pg_rekey[.-]*
    # A relocatable tree brings its own libpq, found relative to the binaries.
    if [ "$libdir" != "$pkglibdir" ] && [ "${libdir#"${bindir%/bin}"/}" != "$libdir" ]; then
        link_all "$libdir" "$prefix$libdir" "$(basename "$pkglibdir")"
    fi
    # A wheel's libraries lie three folders up, where its binaries look for them ($ORIGIN).
    local libs
    for libs in "$(dirname "$(dirname "$(dirname "$bindir")")")"/*.libs; do link_one "$libs"; done
    link_one "$("$source_config" --includedir)"
    link_one "$("$source_config" --includedir-server)"
    printf '%s\n' "$stamp" >"$prefix/.stamp"
}

prove_private() {
    local what path
    for what in bindir pkglibdir sharedir includedir-server; do
        path=$("$private_config" "--$what")
        [ "${path#"$prefix"/}" != "$path" ] || die "$private_config answers $path for --$what"
        [ -d "$path" ] || die "$path is missing"
    done
}

# pgrx takes headers from one PostgreSQL per major, for debug and release alike, and installs
# there in `cargo pgrx test`: that is the test prefix.
register_with_pgrx() {
    local config
    config=$(REKEY_PREFIX_LOCKED=1 "${BASH_SOURCE[0]}" "$major" test)
    if ! grep -qs "^pg$major = \"$config\"" "$PGRX_HOME/config.toml"; then
        mkdir -p "$PGRX_HOME"
        cargo pgrx init "--pg$major" "$config" >"$REKEY_WORK/pgrx-init.log" 2>&1 ||
            { cat "$REKEY_WORK/pgrx-init.log" >&2; die "cargo pgrx init failed"; }
    fi
}

make_work
if [ -z "${REKEY_PREFIX_LOCKED:-}" ]; then
    exec 9>"$REKEY_WORK/.prefix.lock"
    flock 9
fi
if [ "$(cat "$prefix/.stamp" 2>/dev/null)" != "$stamp" ]; then
    make_prefix
    prove_private
fi
[ "$kind" = test ] || register_with_pgrx
printf '%s\n' "$private_config"
