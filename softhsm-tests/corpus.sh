#!/bin/sh
# Unpacks packages of the distribution into a directory, for `make corpus`: kernel
# modules and EFI images as they are shipped. Nothing is installed. Debian, Ubuntu.
set -eu
dir=${1:?usage: corpus.sh DIRECTORY}

command -v apt-get >/dev/null 2>&1 || { echo "corpus: real modules and images are taken from Debian packages, with apt-get" >&2; exit 1; }
kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: *\(linux-image-[^ ]*\)$/\1/p' | head -n 1)
packages="shim-unsigned shim-signed shim-helpers-amd64-signed grub-efi-amd64-bin grub-efi-amd64-signed systemd-boot-efi
efitools ${kernel:?no linux-image-cloud-amd64 among the packages: apt-get update}"

mkdir -p "$dir"
cd "$dir"
for p in $packages; do
    [ -e "$p.unpacked" ] && continue
    echo "corpus: $p" >&2
    apt-get download -q "$p" >/dev/null
    dpkg -x "$p"_*.deb root
    rm "$p"_*.deb
    touch "$p.unpacked"
done
