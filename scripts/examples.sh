#!/usr/bin/env bash
# examples.sh [NAME]...: run the examples for ORMs and drivers (`make test-examples`), each over a
# connection of its own and through PgBouncer in transaction mode, on a throwaway cluster.
# Each application seals, searches and opens in rounds; between two of them both of its keys are
# rotated, then everything is re-encrypted, then the old slots are destroyed.
# Not part of `make test`: it installs Debian packages, after saying so, and fetches others.
# Invariant: an example is copied to REKEY_WORK/examples and installed there, never beside itself.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/cluster.sh
. "$REKEY_ROOT/scripts/cluster.sh"

names=("$@")
[ ${#names[@]} -gt 0 ] || names=(sqlalchemy django sqlx node-postgres flyway)
PATH=$PATH:/usr/sbin # where Debian has pgbouncer
bouncer_port=6432
connections=5 # of PgBouncer to the server

# For each example: install what it needs, migrate, run the application, undo the migrations. Run
# in its copy; `run` answers each line that it reads with one line.
install_python() {
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
}

install_sqlalchemy() { install_python; }
migrate_sqlalchemy() { .venv/bin/alembic upgrade head && .venv/bin/alembic check; }
run_sqlalchemy() { exec .venv/bin/python rounds.py; }
undo_sqlalchemy() { .venv/bin/alembic downgrade base; }

install_django() { install_python; }
migrate_django() {
    .venv/bin/python manage.py migrate && .venv/bin/python manage.py makemigrations --check
}
run_django() { exec .venv/bin/python rounds.py; }
undo_django() { .venv/bin/python manage.py migrate shop zero; }

install_sqlx() { cargo build --quiet; }
migrate_sqlx() { cargo run --quiet -- migrate; }
run_sqlx() { exec cargo run --quiet; }
undo_sqlx() { :; }

install_node-postgres() { npm install --silent --no-audit --no-fund --no-package-lock; }
migrate_node-postgres() { sql_file schema.sql -1; }
run_node-postgres() { exec node rounds.js; }
undo_node-postgres() { :; }

install_flyway() { :; }
migrate_flyway() {
    local file
    for file in $(printf '%s\n' sql/V*.sql | sort -V); do sql_file "$file" -1 || return; done
}
run_flyway() {
    local name known=()
    while read -r name; do
        round_of_flyway round.sql "$name"
        known+=("$name")
        for name in "${known[@]}"; do round_of_flyway find.sql "$name"; done
        echo "${#known[@]}"
    done
}
round_of_flyway() { # FILE NAME
    "$CLUSTER_BIN/pgbench" -n -M extended -t 1 -f "$1" -D "name=$2" -D "email=$2@example.org" \
        -D "first=$2@first.example.org" >/dev/null 2>"$SCRATCH/pgbench" ||
        { cat "$SCRATCH/pgbench" >&2; exit 1; }
}
undo_flyway() { :; }

install_debian_packages() {
    local packages=()
    command -v pgbouncer >/dev/null || packages+=(pgbouncer)
    python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3 python3-venv)
    command -v node >/dev/null || packages+=(nodejs)
    command -v npm >/dev/null || packages+=(npm)
    "$REKEY_ROOT/scripts/setup.sh" "$REKEY_PG" "${packages[@]}"
}

copy() { # NAME: a fresh copy, in which what was installed stays
    app=$REKEY_WORK/examples/$1
    mkdir -p "$app"
    find "$app" -mindepth 1 -maxdepth 1 ! -name .venv ! -name node_modules ! -name target \
        ! -name Cargo.lock -exec rm -rf {} +
    cp -pR "$REKEY_ROOT/examples/$1/." "$app"
}

# Each transaction goes to another server connection than the one before it, so that whatever an
# application leaves in a session is missing, or in the way, at its next one.
start_bouncer() {
    as_server tee "$CLUSTER_DIR/pgbouncer.ini" >/dev/null <<INI
[databases]
* = host=$CLUSTER_DIR
[pgbouncer]
unix_socket_dir = $CLUSTER_DIR
listen_port = $bouncer_port
auth_type = trust
auth_file = $CLUSTER_DIR/users.txt
logfile = $CLUSTER_DIR/pgbouncer.log
pidfile = $CLUSTER_DIR/pgbouncer.pid
pool_mode = transaction
default_pool_size = $connections
server_round_robin = 1
INI
    echo '"app" ""' | as_server tee "$CLUSTER_DIR/users.txt" >/dev/null
    as_server pgbouncer -q -d "$CLUSTER_DIR/pgbouncer.ini"
}

stop_bouncer() {
    local status=$? pid=$CLUSTER_DIR/pgbouncer.pid
    [ ! -f "$pid" ] || kill "$(cat "$pid")" || true
    return $status
}

# Has PgBouncer open all of its server connections, by as many transactions at once.
fill_pool() {
    local deadline=$((SECONDS + 120))
    echo "SELECT pg_sleep(0.5)" >"$SCRATCH/sleep.sql"
    until [ "$(sql "SELECT count(*) FROM pg_stat_activity
                     WHERE usename = 'app' AND datname = current_database()")" = $connections ]; do
        [ $SECONDS -lt $deadline ] || die "PgBouncer does not open $connections connections"
        PGUSER=app PGPORT=$bouncer_port "$CLUSTER_BIN/pgbench" -n -t 1 -c $connections \
            -j $connections -f "$SCRATCH/sleep.sql" >/dev/null 2>&1
    done
}

expect() { # WHAT QUERY: the query answers t
    [ "$(sql "$2")" = t ] || die "$PGDATABASE: not so: $1"
}

new_database() { # NAME: becomes PGDATABASE, owned by the application
    PGDATABASE=postgres sql "CREATE DATABASE \"$1\" OWNER app"
    PGDATABASE=$1
    PGOPTIONS='-c client_min_messages=warning' sql_file "$REKEY_ROOT/examples/setup.sql" >/dev/null
    # Slots end as soon as they are drained, so that the whole life of one fits into a test.
    sql "SELECT rekey.set_policy(key_name, grace => '0', after_drain => 'destroy')
           FROM rekey.keys" >/dev/null
}

# The application's pipes are in `to` and `from`, the rounds so far in `n`: all are play's.
round() { # NAME OF A NEW CUSTOMER
    local answer
    n=$((n + 1))
    { echo "$1" >&"$to" && read -r -t 60 answer <&"$from" && [ "$answer" = $n ]; } 2>/dev/null ||
        { cat "$SCRATCH/errors" >&2; die "$PGDATABASE: the application fails in round $1"; }
}

rounds_until_old_slots_are_destroyed() {
    local deadline=$((SECONDS + 120)) old
    while old=$(sql "SELECT count(*) FROM rekey.slots
                      WHERE state NOT IN ('active', 'destroyed')") && [ "$old" -gt 0 ]; do
        [ $SECONDS -lt $deadline ] || {
            sql "SELECT * FROM rekey.progress; SELECT * FROM rekey.errors" >&2
            die "$PGDATABASE: the old slots are not destroyed within two minutes"
        }
        round "draining-$n"
        sleep 0.2
    done
}

# All that the application did is in the log, and no email.
check_log() { # WAY, FIRST BYTE OF THE LOG
    tail -c +"$2" "$CLUSTER_DIR/server.log" >"$SCRATCH/log"
    grep -o '\[[0-9]*\] LOG:  execute <unnamed>: ' "$SCRATCH/log" >"$SCRATCH/bound" || true
    [ "$(wc -l <"$SCRATCH/bound")" -ge $((4 * n)) ] ||
        die "$PGDATABASE: the log does not have its statements, with bound parameters"
    ! grep -i 'example\.org' "$SCRATCH/log" >&2 || die "$PGDATABASE: the log has an email"
    [ "$1" = pgbouncer ] || return 0
    [ "$(sort -u "$SCRATCH/bound" | wc -l)" = $connections ] ||
        die "$PGDATABASE: its transactions did not go over $connections server connections"
    ! grep 'LOG:  execute [^<]' "$SCRATCH/log" >&2 ||
        die "$PGDATABASE: it keeps prepared statements in a session"
}

play() { # NAME WAY
    local name=$1 way=$2 port=5432 n=0 table log_begins
    local active="(SELECT slot_id FROM rekey.slots WHERE state = 'active')"
    local -x PGDATABASE
    [ "$way" = direct ] || port=$bouncer_port
    app=$REKEY_WORK/examples/$name
    new_database "$name-$way"
    (cd "$app" && PGUSER=app "migrate_$name") >"$SCRATCH/migrate" 2>&1 ||
        { cat "$SCRATCH/migrate" >&2; die "$name: the migrations fail"; }
    table=$(sql "SELECT DISTINCT table_name FROM rekey.columns")
    [ -n "$table" ] || die "$name: no column is registered"

    log_begins=$(($(stat -c %s "$CLUSTER_DIR/server.log") + 1))
    coproc APP { cd "$app" && PGUSER=app PGPORT=$port "run_$name" 2>"$SCRATCH/errors"; }
    local application=$APP_PID to=${APP[1]} from=${APP[0]}
    round before
    [ "$way" = direct ] || fill_pool
    # Enough for a driver to find out that it executes the same statements again and again.
    while [ "$n" -lt 8 ]; do round "before-$n"; done

    sql "SELECT rekey.pause()" >/dev/null
    sql "SELECT rotate_key(key_name) FROM rekey.keys" >/dev/null
    round rotated
    expect "rows of old and new slots stand side by side" "
        SELECT count(*) FILTER (WHERE rekey.slot_id(email) IN $active) = 1
               AND count(*) FILTER (WHERE rekey.fingerprint_slot_id(email_fp) IN $active) = 1
               AND count(*) = $n FROM $table"

    sql "SELECT rekey.resume()" >/dev/null
    rounds_until_old_slots_are_destroyed
    round after
    expect "every row is under the active slots" "
        SELECT bool_and(rekey.slot_id(email) IN $active
               AND rekey.fingerprint_slot_id(email_fp) IN $active) AND count(*) = $n FROM $table"

    exec {to}>&-
    wait "$application" || die "$PGDATABASE: the application fails at its end"
    check_log "$way" "$log_begins"
    (cd "$app" && PGUSER=app "undo_$name") >"$SCRATCH/undo" 2>&1 ||
        { cat "$SCRATCH/undo" >&2; die "$name: the way back fails"; }
    say "$(printf '%-13s %-9s' "$name" "$way") $n customers sealed, found and opened before," \
        "during and after a rotation of both keys; old slots destroyed; no email in the log"
    PGDATABASE=postgres sql "DROP DATABASE \"$name-$way\" WITH (FORCE)"
}

install_debian_packages
"$REKEY_ROOT/scripts/build.sh" debug
for name in "${names[@]}"; do
    [ "$(type -t "install_$name")" = function ] || die "there is no example $name"
    copy "$name"
    (cd "$app" && "install_$name")
done
trap '' PIPE # an application that has ended is a failed round, with its errors
CLUSTER_KEEP_LOG=$REKEY_WORK/examples-server.log
cluster_start debug "fsync = off" "log_statement = all" "log_min_duration_statement = 0" \
    "log_parameter_max_length = 0"
trap 'stop_bouncer; cluster_remove' EXIT
sql "CREATE ROLE app LOGIN"
start_bouncer
for name in "${names[@]}"; do
    for way in direct pgbouncer; do play "$name" "$way"; done
done
