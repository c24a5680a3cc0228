# shellcheck shell=bash
# Throwaway PostgreSQL clusters. Sourced by demo.sh, bench.sh, readme.sh and regress.sh.
#   cluster_start debug|release [LINE OF postgresql.conf]...   sets CLUSTER_DIR, CLUSTER_BIN and
#       the PG* variables: plain psql and pgbench then reach it as its superuser; SCRATCH is a
#       folder for the caller's own files, removed with the cluster
#   sql / sql_file   run SQL, stop at the first error; sql prints unaligned rows
# Invariant: however the script ends (Ctrl-C and TERM too), its children and the server are
# stopped and the folder is gone. The socket lies in a folder that only the server's user may
# enter, since the cluster trusts whoever connects. The root key lies beside the data folder.
# CLUSTER_PRELOAD='' starts a server without the extension's library.

CLUSTER_DIR=
SCRATCH=

cluster_start() {
    local kind=$1 config line
    shift
    config=$("$REKEY_ROOT/scripts/prefix.sh" "$REKEY_PG" "$kind")
    CLUSTER_BIN=$("$config" --bindir)
    trap cluster_remove EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
    make_work
    CLUSTER_DIR=$(mktemp -d "$REKEY_WORK/run.XXXXXX")
    # A socket's path has at most 107 bytes.
    if [ ${#CLUSTER_DIR} -gt 80 ]; then
        rmdir "$CLUSTER_DIR"
        CLUSTER_DIR=$(mktemp -d /tmp/pg_rekey.XXXXXX)
    fi
    SCRATCH=$(mktemp -d "$REKEY_WORK/scratch.XXXXXX")
    mkdir "$CLUSTER_DIR/keys"
    chmod 0700 "$CLUSTER_DIR" "$CLUSTER_DIR/keys"
    ! is_root || chown -R postgres:postgres "$CLUSTER_DIR"
    as_server "$CLUSTER_BIN/initdb" -D "$CLUSTER_DIR/data" -U postgres -A trust -E UTF8 \
        --locale=C.UTF-8 --no-sync >"$REKEY_WORK/initdb.log" 2>&1 ||
        { cat "$REKEY_WORK/initdb.log" >&2; die "initdb failed"; }
    {
        echo "listen_addresses = ''"
        echo "unix_socket_directories = '$CLUSTER_DIR'"
        echo "shared_preload_libraries = '${CLUSTER_PRELOAD-pg_rekey}'"
        [ -n "${CLUSTER_PRELOAD-pg_rekey}" ] &&
            echo "rekey.root_key_file = '$CLUSTER_DIR/keys/root.json'"
        for line in "$@"; do echo "$line"; done
    } | as_server tee -a "$CLUSTER_DIR/data/postgresql.conf" >/dev/null
    export PGHOST=$CLUSTER_DIR PGUSER=postgres PGDATABASE=postgres PGAPPNAME=pg_rekey
    as_server "$CLUSTER_BIN/pg_ctl" -D "$CLUSTER_DIR/data" -l "$CLUSTER_DIR/server.log" \
        -w -t 60 start >/dev/null 8>&- 9>&- </dev/null ||
        { tail -20 "$CLUSTER_DIR/server.log" >&2; die "the server does not start"; }
}

cluster_remove() {
    local status=$? children
    trap '' INT TERM HUP
    trap - EXIT
    children=$(jobs -p)
    # shellcheck disable=SC2086
    [ -z "$children" ] || kill $children 2>/dev/null || true
    if [ -n "$CLUSTER_DIR" ] && [ -d "$CLUSTER_DIR" ]; then
        if [ -f "$CLUSTER_DIR/data/postmaster.pid" ]; then
            as_server "$CLUSTER_BIN/pg_ctl" -D "$CLUSTER_DIR/data" -m immediate -w stop \
                >/dev/null 2>&1 || true
        fi
        if [ "$status" -ne 0 ] && [ "$status" -lt 128 ] && [ -n "${CLUSTER_KEEP_LOG:-}" ]; then
            cp "$CLUSTER_DIR/server.log" "$CLUSTER_KEEP_LOG" 2>/dev/null &&
                echo "the server's log: $CLUSTER_KEEP_LOG" >&2
        fi
        rm -rf "$CLUSTER_DIR"
    fi
    [ -z "$SCRATCH" ] || rm -rf "$SCRATCH"
    exit "$status"
}

sql() { "$CLUSTER_BIN/psql" -XAtq -v ON_ERROR_STOP=1 -c "$1"; }
sql_file() { "$CLUSTER_BIN/psql" -Xq -v ON_ERROR_STOP=1 -f "$@"; }
