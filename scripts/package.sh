#!/usr/bin/env bash
# package.sh: Debian packages of a release build, one for each PostgreSQL that this system has from
# Debian packages and that the extension supports; REKEY_PACKAGE_MAJORS ("15 16 18") names others,
# which are built against the headers of setup.sh's servers. Called by `make package`;
# package-check.sh tries the results on clean systems. They go to target/package/.
# Reproducible: times are those of the last commit, owners are root, paths of this machine are
# mapped to fixed ones, so that the same commit, toolchain and server packages give the same bytes.
# REKEY_PACKAGER ("Name <address>") replaces the last committer as the maintainer.
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$REKEY_ROOT"

for tool in dpkg-deb dpkg-query readelf objdump strip git; do
    command -v "$tool" >/dev/null || die "$tool is missing: this needs a Debian system with binutils"
done
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
maintainer=${REKEY_PACKAGER:-$(git log -1 --format='%cn <%ce>')}
upstream=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
# Only a tagged commit is the release; what comes before it sorts before it.
if [ "$(git describe --tags --exact-match 2>/dev/null)" = "v$upstream" ]; then
    version=$upstream-1
else
    version=$upstream~git$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d).$(git rev-parse --short=8 HEAD)-1
fi
[ -z "$(git status --porcelain --untracked-files=no)" ] ||
    say "note: there are changes that are not committed; the package names the last commit"

architecture=$(dpkg --print-architecture)
out=$REKEY_ROOT/target/package
date_of_commit=$(date -u -R -d "@$SOURCE_DATE_EPOCH")

majors() {
    local major
    while read -r major; do
        if [ -n "${REKEY_PACKAGE_MAJORS:-}" ]; then
            [[ " $REKEY_PACKAGE_MAJORS " != *" $major "* ]] || echo "$major"
        elif dpkg-query -S "/usr/lib/postgresql/$major/bin/postgres" >/dev/null 2>&1; then
            echo "$major"
        fi
    done < <(sed -n 's/^pg\([0-9]*\) = .*/\1/p' Cargo.toml)
}

# A panic's text names source files: cargo's folder and ours by fixed names. The variable adds to
# the linker flags that cargo-pgrx passes, where RUSTFLAGS would replace them. pgrx's bit of C, which
# lies in the target folder, names its file where it waits for a spinlock.
build() { # MAJOR
    local triple home=${CARGO_HOME:-$HOME/.cargo} variable
    triple=$(rustc -vV | sed -n 's/^host: //p')
    variable=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$triple")_RUSTFLAGS
    local flags="--remap-path-prefix=$REKEY_ROOT=/usr/src/pg-rekey"
    local registry
    for registry in "$home"/registry/src/*; do
        flags+=" --remap-path-prefix=$registry=/usr/share/cargo/registry"
    done
    # A stamp of the work tree would not tell this build from a plain one: a folder of its own.
    local -a tree=("REKEY_WORK=$REKEY_WORK/package" "PG_CONFIG_$1=$(source_config "$1")")
    env "$variable=$flags" CFLAGS="-ffile-prefix-map=$REKEY_ROOT=/usr/src/pg-rekey ${CFLAGS:-}" \
        "${tree[@]}" REKEY_PG="$1" scripts/build.sh release
    env "${tree[@]}" scripts/prefix.sh "$1" release
}

needed_libraries() { # LIBRARY: a Depends line for what it links to
    local library newest
    local -a packages=()
    while read -r library; do
        case $library in
        libc.so.6 | ld-linux*) ;;
        libgcc_s.so.1) packages+=(", libgcc-s1") ;;
        *) die "the library needs $library, of which this script knows no package" ;;
        esac
    done < <(readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
    newest=$(objdump -T "$1" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -1)
    printf 'libc6 (>= %s)%s' "${newest#GLIBC_}" "${packages[*]}"
}

changelog() { # PACKAGE
    cat <<END
$1 ($version) unstable; urgency=medium

  * Version $upstream of pg_rekey. What changed is in CHANGELOG.md beside this file.

 -- $maintainer  $date_of_commit
END
}

copyright() { # MAJOR
    cat <<END
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: pg_rekey
Comment: The library is built from these crates, each with the licence that it declares:
END
    cargo tree --locked -p pg_rekey -e normal --no-default-features --features "pg$1" \
        --prefix none --format ' {p}: {l}' |
        sed -e 's/ (\/[^)]*)//' -e 's/ (proc-macro)//' -e 's/ (\*)$//' | LC_ALL=C sort -u
    cat <<END

Files: *
Copyright: 2026 the pg_rekey authors
License: Expat or Apache-2.0

END
    # The texts as LICENSE has them, in the form that this file asks for.
    sed -e 's/[ \t]*$//' -e 's/^$/./' -e 's/^/ /' LICENSE |
        { echo "License: Expat or Apache-2.0"; cat; }
}

package() { # MAJOR
    local major=$1 name=postgresql-$1-pg-rekey stage config library doc size deb file
    config=$(build "$major" | tail -1)
    stage=$(mktemp -d "$REKEY_WORK/stage.XXXXXX")
    trap 'rm -rf "$stage"' EXIT
    chmod 0755 "$stage"

    library=$stage/usr/lib/postgresql/$major/lib/pg_rekey.so
    install -D -m 0644 "$("$config" --pkglibdir)/pg_rekey.so" "$library"
    strip --strip-unneeded --remove-section=.comment "$library"
    for file in "$("$config" --sharedir)"/extension/pg_rekey{.control,--*.sql}; do
        install -D -m 0644 "$file" \
            "$stage/usr/share/postgresql/$major/extension/$(basename "$file")"
    done
    doc=$stage/usr/share/doc/$name
    # The examples keep their mode: some are programs.
    while IFS= read -r -d '' file; do
        install -D -m "$(stat -c %a "$file")" "$file" "$doc/$file"
    done < <(git ls-files -z -- README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE docs \
        examples)
    scripts/links.sh "$doc"
    copyright "$major" >"$doc/copyright"
    changelog "$name" | gzip -9n >"$doc/changelog.Debian.gz"
    ! grep -qF -e "$REKEY_ROOT" -e "$HOME/" "$library" ||
        die "the library names folders of this machine"

    mkdir "$stage/DEBIAN"
    (cd "$stage" && find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum) \
        >"$stage/DEBIAN/md5sums"
    size=$(find "$stage/usr" -type f -printf '%s\n' | awk '{ n += int(($1 + 1023) / 1024) } END { print n }')
    cat >"$stage/DEBIAN/control" <<END
Package: $name
Source: pg-rekey
Version: $version
Architecture: $architecture
Maintainer: $maintainer
Installed-Size: $size
Depends: postgresql-$major, $(needed_libraries "$library")
Section: database
Priority: optional
Description: envelope-key rotation for PostgreSQL $major columns
 pg_rekey seals column values under envelope keys and rotates those keys
 without downtime: encrypt_col(value, key), decrypt_col(envelope) and
 rotate_key(key). Values are sealed with XAES-256-GCM; data keys lie in the
 database, wrapped under a root key that lies outside it.
END
    chmod -R u+rwX,go=rX "$stage/usr"
    find "$stage" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    mkdir -p "$out"
    deb=$out/${name}_${version}_$architecture.deb
    dpkg-deb --root-owner-group -Zxz --build "$stage" "$deb" >/dev/null
    rm -rf "$stage"
    trap - EXIT
    say "$deb"
    say "    $(sha256sum "$deb" | cut -c1-64)"
}

make_work
mkdir -p "$REKEY_WORK/package"
mapfile -t versions < <(majors)
[ ${#versions[@]} -gt 0 ] || die "no supported PostgreSQL of this system's packages is installed"
rm -f "$out"/*.deb
for major in "${versions[@]}"; do package "$major"; done
