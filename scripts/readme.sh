#!/usr/bin/env bash
# readme.sh [FILE.md]: run the SQL examples of a document (README.md) as a reader would.
# Called by test.sh. All ```sql blocks run in one psql session on a throwaway cluster and stop at
# the first error. A ```text block directly below one must equal what psql printed for it.
# A block below a line <!-- not run: reason --> is left out; the reason is shown.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=scripts/cluster.sh
. "$REKEY_ROOT/scripts/cluster.sh"

document=${1:-$REKEY_ROOT/README.md}
[ -f "$document" ] || die "$document is missing"
"$REKEY_ROOT/scripts/build.sh" debug
cluster_start debug "fsync = off"
work=$SCRATCH

# Writes WORK/N.sql, N.line and, where output is promised, N.text; tells what is left out.
awk -v work="$work" '
    function finish() { close(file); state = "" }
    state != "" && /^```[ \t]*$/ {
        last = (state == "sql") ? n : 0
        finish()
        next
    }
    state != "" { print > file; next }
    /^```sql[ \t]*$/ {
        if (reason != "") {
            printf "not run (line %d): %s\n", NR, reason
            reason = ""; last = 0; state = "skip"; file = "/dev/null"
            next
        }
        n++; state = "sql"; file = work "/" n ".sql"; last = 0
        printf "" > file
        printf "%d\n", NR > (work "/" n ".line")
        close(work "/" n ".line")
        next
    }
    /^```text[ \t]*$/ && last > 0 {
        state = "text"; file = work "/" last ".text"; printf "" > file
        next
    }
    /^```/ { state = "other"; file = "/dev/null"; last = 0; reason = ""; next }
    /^<!-- not run: .* -->[ \t]*$/ {
        reason = $0
        sub(/^<!-- not run: /, "", reason); sub(/ -->[ \t]*$/, "", reason)
        next
    }
    /[^ \t]/ { last = 0; reason = "" }
    END { print n + 0 > (work "/count") }
' "$document"
count=$(cat "$work/count")
[ "$count" -gt 0 ] || die "$document has no sql blocks"

for ((i = 1; i <= count; i++)); do
    printf '\\echo @@block %d\n' "$i"
    cat "$work/$i.sql"
    printf '\n'
done >"$work/all.sql"

status=0
"$CLUSTER_BIN/psql" -Xq -P pager=off -v ON_ERROR_STOP=1 -f "$work/all.sql" \
    >"$work/out" 2>"$work/err" || status=$?
awk -v work="$work" '
    /^@@block [0-9]+$/ { file = work "/" $2 ".out"; printf "" > file; next }
    { print > file }
' "$work/out"
if [ "$status" -ne 0 ]; then
    last=$(sed -n 's/^@@block //p' "$work/out" | tail -1)
    echo "the block at $(basename "$document"):$(cat "$work/${last:-1}.line") fails:" >&2
    cat "$work/${last:-1}.sql" >&2
    tail -5 "$work/err" >&2
    exit 1
fi

# Spaces at line ends and empty lines at either end are not part of the promise.
plain() { sed 's/[ \t]*$//' "$1" | sed -e '/./,$!d' | sed -e :a -e '/^\n*$/{$d;N;ba' -e '}'; }
promised=0
wrong=0
for ((i = 1; i <= count; i++)); do
    [ -f "$work/$i.text" ] || continue
    promised=$((promised + 1))
    if ! diff -u --label "$(basename "$document")" --label psql \
        <(plain "$work/$i.text") <(plain "$work/$i.out") >"$work/diff"; then
        wrong=$((wrong + 1))
        echo "the output below $(basename "$document"):$(cat "$work/$i.line") differs:"
        cat "$work/diff"
    fi
done
say "$count examples run, $((promised - wrong)) of $promised promised outputs match"
[ "$wrong" -eq 0 ]
