#!/bin/sh
# Gets the source of the kernel's sign-file, two files out of Debian's linux-source
# package of 140 MB, into a directory. Nothing is installed, and nothing else is kept.
set -eu
dir=${1:?usage: sign-file-source.sh DIRECTORY}

[ ! -e "$dir/sign-file.c" ] || exit 0
command -v apt-get >/dev/null 2>&1 || { echo "sign-file-source: it is taken from Debian's linux-source, with apt-get" >&2; exit 1; }
package=$(apt-cache search --names-only '^linux-source-[0-9.]*$' | cut -d' ' -f1 | sort -V | head -n 1)
mkdir -p "$dir"
cd "$dir"
work=$(mktemp -d "$PWD/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "sign-file-source: ${package:?no linux-source among the packages: apt-get update}" >&2
(cd "$work" && apt-get download -q "$package" >/dev/null)
dpkg-deb --fsys-tarfile "$work"/*.deb | tar -xO "./usr/src/$package.tar.xz" |
    tar -xJ -C "$work" --strip-components=2 "$package/scripts/sign-file.c" "$package/scripts/ssl-common.h"
mv "$work/ssl-common.h" .
mv "$work/sign-file.c" . # the last: that it is there says that all is
