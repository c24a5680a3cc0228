#!/usr/bin/env bash
# package-check.sh [PACKAGE.deb]: install a package on a clean Debian and use it; without one, all
# those of target/package/. Called by `make package-check`. The clean Debian is a throwaway root made
# by debootstrap from the mirrors that this system's apt uses; nothing of this system but the package
# goes into it. There a cluster is made as an administrator makes one, values are sealed, a key is
# rotated, the server is restarted, everything is opened, and the package is removed without a trace.
# Where apt knows no server of the package's version, that of setup.sh stands in for it, laid out and
# packed as Debian's.
# Needs root (chroot, mount). Invariant: however it ends, the server is stopped and the root is gone.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

is_root || die "this makes a root folder of its own and needs root"
command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"
if [ $# -eq 0 ]; then
    for deb in "$REKEY_ROOT"/target/package/*.deb; do
        [ -f "$deb" ] || die "no packages in target/package: make package"
        "${BASH_SOURCE[0]}" "$deb"
    done
    exit
fi
deb=$1
[ -f "$deb" ] || die "$deb is missing: make package"
name=$(dpkg-deb -f "$deb" Package)
major=${name#postgresql-}
major=${major%%-*}
# shellcheck source=/etc/os-release
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")

sources() { # the lines of apt's own sources that are Debian's
    # shellcheck disable=SC2016 # apt's own variables
    apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI) $(COMPONENT)' \
        "Created-By: Packages" | awk '$1 == "Debian" { print "deb", $3, $2, $4 }' | sort -u
}

# A package of a server that apt does not know: the tree that setup.sh has fetched, where Debian has
# its files. Its binaries look for their files relative to where they lie.
stand_in() { # PACKAGE.deb
    local config prefix share pkglib stage=$root/tmp/server libs
    config=$(source_config "$major")
    [ -x "$config" ] || die "neither apt nor this machine has PostgreSQL $major: scripts/setup.sh $major"
    prefix=$(dirname "$("$config" --bindir)")
    share=$("$config" --sharedir)
    pkglib=$("$config" --pkglibdir)
    local home=$stage/usr/lib/postgresql/$major
    mkdir -p "$home" "$stage/usr/share/postgresql" "$stage/DEBIAN"
    cp -aL "$prefix/bin" "$prefix/lib" "$home/"
    cp -aL "$share" "$stage/usr/share/postgresql/$major"
    mkdir -p "$(dirname "$home/${share#"$prefix"/}")"
    ln -s "/usr/share/postgresql/$major" "$home/${share#"$prefix"/}"
    if [ "$pkglib" != "$prefix/lib" ]; then
        cp -a "$home/${pkglib#"$prefix"/}/." "$home/lib/"
        rm -rf "${home:?}/${pkglib#"$prefix"/}"
        ln -s "/usr/lib/postgresql/$major/lib" "$home/${pkglib#"$prefix"/}"
    fi
    for libs in "$(dirname "$(dirname "$prefix")")"/*.libs; do
        [ ! -d "$libs" ] || cp -aL "$libs" "$stage/usr/lib/"
    done
    chmod -R u+w,a+rX "$stage"
    chmod a+x "$home"/bin/*
    cat >"$stage/DEBIAN/control" <<END
Package: postgresql-$major
Version: $("$config" --version | grep -o '[0-9.]*$')-0standin
Architecture: $(dpkg --print-architecture)
Maintainer: nobody <nobody@localhost>
Depends: postgresql-common
Description: stand-in for a server that this system's mirrors do not have
END
    dpkg-deb --root-owner-group -Znone --build "$stage" "$1" >/dev/null
    rm -rf "$stage"
}

make_work
root=$(mktemp -d "$REKEY_WORK/root.XXXXXX")
chmod 0755 "$root" # it becomes /, where the server's user must get through
inside() {
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
        HOME=/root http_proxy="${http_proxy:-}" https_proxy="${https_proxy:-}" chroot "$root" "$@"
}
cleanup() {
    local status=$?
    trap '' INT TERM HUP
    trap - EXIT
    if [ -d "$root/var/lib/postgresql/$major/rekey" ]; then
        inside pg_ctlcluster -m immediate "$major" rekey stop >/dev/null 2>&1 || true
    fi
    umount "$root/dev/shm" "$root/proc" 2>/dev/null || true
    # Never through a mount that did not go away.
    if mountpoint -q "$root/proc" || mountpoint -q "$root/dev/shm"; then
        echo "still mounted: $root" >&2
    else
        rm -rf --one-file-system "$root"
    fi
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "1. A clean $codename"
mapfile -t lines < <(sources)
mirror=$(printf '%s\n' "${lines[@]}" | awk -v c="$codename" '$3 == c { print $2; exit }')
[ -n "$mirror" ] || die "apt knows no mirror of $codename"
debootstrap --variant=minbase "$codename" "$root" "$mirror" >"$REKEY_WORK/debootstrap.log" 2>&1 ||
    { tail -5 "$REKEY_WORK/debootstrap.log" >&2; die "debootstrap failed"; }
printf '%s\n' "${lines[@]}" >"$root/etc/apt/sources.list"
apt-config dump | grep '^Acquire::.*[Pp]roxy' >"$root/etc/apt/apt.conf.d/90mirror" || true
mount -t proc proc "$root/proc"
mount -t tmpfs -o size=256m tmpfs "$root/dev/shm"
# No service starts by itself; ours is started by hand below.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
mkdir -p "$root/etc/postgresql-common/createcluster.d"
echo "create_main_cluster = false" >"$root/etc/postgresql-common/createcluster.d/none.conf"

say "2. The package, with PostgreSQL $major and nothing else that it does not ask for"
cp "$deb" "$root/tmp/"
inside find / -xdev -name '*pg_rekey*' >"$REKEY_WORK/package-check.before"
packages=("/tmp/$(basename "$deb")")
inside apt-get update -q >"$REKEY_WORK/package-check.log" 2>&1 ||
    { tail -20 "$REKEY_WORK/package-check.log" >&2; die "apt-get update fails in the clean root"; }
if [ -z "$(inside apt-cache search --names-only "^postgresql-$major\$")" ]; then
    say "    no mirror has PostgreSQL $major: one of this machine stands in, packed as Debian's"
    stand_in "$root/tmp/stand-in.deb"
    packages=(/tmp/stand-in.deb "${packages[@]}")
fi
inside apt-get install -q -y --no-install-recommends "${packages[@]}" >>"$REKEY_WORK/package-check.log" 2>&1 ||
    { tail -20 "$REKEY_WORK/package-check.log" >&2; die "the package does not install"; }
inside dpkg --verify "$name" || die "installed files differ from the package's sums"
for file in README.md.gz README.md changelog.Debian.gz copyright; do
    if [ -e "$root/usr/share/doc/$name/$file" ]; then say "    has $file"; fi
done
[ -f "$root/usr/share/doc/$name/copyright" ] || die "the package has no copyright file"
"$REKEY_ROOT/scripts/links.sh" "$root/usr/share/doc/$name"

say "3. A cluster, set up as the README says"
inside pg_createcluster "$major" rekey -- -A trust --no-sync >/dev/null
inside install -d -m 0700 -o postgres -g postgres /etc/pg_rekey
inside pg_conftool "$major" rekey set shared_preload_libraries pg_rekey
inside pg_conftool "$major" rekey set rekey.root_key_file /etc/pg_rekey/root.json
inside pg_conftool "$major" rekey set listen_addresses ''
start() {
    inside pg_ctlcluster "$major" rekey "$1" ||
        { tail -20 "$root/var/log/postgresql/"*.log >&2; die "the server does not $1"; }
}
sql() { inside setpriv --reuid=postgres --regid=postgres --init-groups \
    psql -XAtq -v ON_ERROR_STOP=1 -d postgres -c "$1"; }
expect() { # SQL WANTED
    local found
    found=$(sql "$1")
    [ "$found" = "$2" ] || die "$1 gives $found, not $2"
}
start start

say "4. Seal, rotate, open"
sql "CREATE EXTENSION pg_rekey; SELECT rekey.init_root_key()" >/dev/null
[ "$(inside stat -c '%U %a' /etc/pg_rekey/root.json)" = "postgres 600" ] ||
    die "the root key file is not the server's alone"
sql "SELECT rekey.create_key('pii')" >/dev/null
sql "CREATE TABLE t AS SELECT i AS id, encrypt_col('value ' || i, 'pii', i::text) AS c
     FROM generate_series(1, 1000) i"
old=$(sql "SELECT DISTINCT rekey.slot_id(c) FROM t")
new=$(sql "SELECT rotate_key('pii')")
[ "$old" != "$new" ] || die "rotate_key gave the old slot"
sql "UPDATE t SET c = encrypt_col(decrypt_col(c, id::text), 'pii', id::text) WHERE id <= 500"
opened="SELECT count(*) FROM t WHERE decrypt_col(c, id::text) = 'value ' || id"
expect "$opened" 1000
expect "SELECT count(*) FROM t WHERE rekey.slot_id(c) = $old" 500
expect "SELECT count(*) FROM t WHERE rekey.slot_id(c) = $new" 500

say "5. After a restart"
start restart
expect "$opened" 1000
expect "SELECT rekey.ready()" t

say "6. Removed without a trace"
inside pg_ctlcluster "$major" rekey stop
inside dpkg -P "$name" >/dev/null
inside rm "${packages[@]}"
inside find / -xdev -name '*pg_rekey*' ! -path /etc/pg_rekey >"$REKEY_WORK/package-check.after"
cmp -s "$REKEY_WORK/package-check.before" "$REKEY_WORK/package-check.after" ||
    { cat "$REKEY_WORK/package-check.after" >&2; die "files of the package are left"; }
[ ! -e "$root/usr/share/doc/$name" ] || die "documents of the package are left"
say "$(basename "$deb") installs, works and goes"
