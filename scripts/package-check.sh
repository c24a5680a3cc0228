#!/usr/bin/env bash
# package-check.sh [PACKAGE.deb]: install a package on a clean Debian and use it.
# Called by `make package-check`. The clean Debian is a throwaway root made by debootstrap from the
# mirrors that this system's apt uses; nothing of this system but the package goes into it. There a
# cluster is made as an administrator makes one, values are sealed, a key is rotated, the server is
# restarted, everything is opened, and the package is removed without a trace.
# Needs root (chroot, mount). Invariant: however it ends, the server is stopped and the root is gone.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

is_root || die "this makes a root folder of its own and needs root"
command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"
deb=${1:-$(echo "$REKEY_ROOT"/target/package/postgresql-15-pg-rekey_*.deb)}
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
{
    inside apt-get update -q
    inside apt-get install -q -y --no-install-recommends "/tmp/$(basename "$deb")"
} >"$REKEY_WORK/package-check.log" 2>&1 ||
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
inside rm "/tmp/$(basename "$deb")"
inside find / -xdev -name '*pg_rekey*' ! -path /etc/pg_rekey >"$REKEY_WORK/package-check.after"
cmp -s "$REKEY_WORK/package-check.before" "$REKEY_WORK/package-check.after" ||
    { cat "$REKEY_WORK/package-check.after" >&2; die "files of the package are left"; }
[ ! -e "$root/usr/share/doc/$name" ] || die "documents of the package are left"
say "$(basename "$deb") installs, works and goes"
