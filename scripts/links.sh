#!/usr/bin/env bash
# links.sh [FOLDER]: whether the links of all Markdown files below a folder lead to files below it.
# Called by test.sh for the sources, and by package.sh for the documents that a package ships.
# Links to other sites and within a page are not followed; code is not looked into.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

folder=$(realpath "${1:-$REKEY_ROOT}")
links() { # FILE: line and target of each
    awk '
        /^ *```/ { code = !code }
        code || /^    / { next }
        {
            rest = $0
            gsub(/`[^`]*`/, "code", rest)
            while (match(rest, /\]\([^)]*\)/)) {
                print FNR, substr(rest, RSTART + 2, RLENGTH - 3)
                rest = substr(rest, RSTART + RLENGTH)
            }
        }' "$1"
}
pages=0
dead=0
while IFS= read -r -d '' page; do
    pages=$((pages + 1))
    while read -r line target; do
        case $target in
        *://* | mailto:* | \#*) continue ;;
        esac
        found=$(realpath -m "$(dirname "$page")/${target%%#*}")
        if [ ! -e "$found" ] || [[ $found != "$folder"/* ]]; then
            echo "${page#"$folder"/}:$line leads to $target, which is not there" >&2
            dead=$((dead + 1))
        fi
    done < <(links "$page")
done < <(find "$folder" \( -path "$folder/target" -o -path "$folder/.git" \) -prune -o \
    -name '*.md' -print0)
[ "$pages" -gt 0 ] || die "no Markdown below $folder"
[ "$dead" -eq 0 ] || die "dead links: $dead"
