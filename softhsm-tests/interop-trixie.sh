#!/usr/bin/env bash
# The agent with the tools of Debian 13: gpg 2.4, rpm 4.20, git, gpgsm, and sq 1.3
# through its gpg-agent backend, and those of PKCS#11 with p11-kit 0.25 and OpenSSL's
# pkcs11-provider, in a tree made by debootstrap. The gateway and its
# token are this machine's. Ends non-zero if any signature is not made or not accepted.
#
# Wants root, debootstrap, bin/ built, and some 900 MB; the tree is kept for the next
# time (TRIXIE_TREE names another place, DEBIAN_MIRROR another mirror).
set -euo pipefail
cd "$(dirname "$0")/.."
tree=${TRIXIE_TREE:-$PWD/.cache/trixie}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

if [ "$(id -u)" != 0 ]; then
    echo "interop-trixie: wants root, for a chroot" >&2
    exit 1
fi
# The tools of PKCS#11 are installed by the tree's own apt: debootstrap resolves too little
# for them. linux-kbuild is the one of the release's kernel.
packages="gpg gpg-agent gpgconf gpgsm rpm sq git openssl p11-kit p11-kit-modules pkcs11-provider libengine-pkcs11-openssl
sbsigntool osslsigncode systemd-ukify systemd-repart systemd-boot-efi kmod gcc libc6-dev"
ready=$tree/.packages
if [ "$(cat "$ready" 2>/dev/null)" != "$packages" ]; then
    command -v debootstrap >/dev/null || {
        echo "interop-trixie: debootstrap is missing: apt-get install debootstrap" >&2
        exit 1
    }
    if [ ! -e "$tree/etc/debian_version" ]; then
        rm -rf "$tree.new"
        mkdir -p "$tree.new"
        debootstrap --variant=minbase trixie "$tree.new" "$mirror"
        rm -rf "$tree"
        mv "$tree.new" "$tree"
    fi
    cp /etc/resolv.conf "$tree/etc/resolv.conf"
    printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d" # nothing is started there
    chmod +x "$tree/usr/sbin/policy-rc.d"
    # shellcheck disable=SC2016,SC2086 # expanded in the tree; a list of words
    DEBIAN_FRONTEND=noninteractive LC_ALL=C chroot "$tree" sh -ec '
        apt-get update -q >/dev/null
        kbuild=$(apt-cache search --names-only "^linux-kbuild-6[0-9.]*(\+deb13)?$" | cut -d" " -f1 | sort -V | head -n 1)
        apt-get install -q -y --no-install-recommends "$@" "${kbuild:?no linux-kbuild}" >/dev/null' sh $packages
    printf '%s\n' "$packages" >"$ready"
fi
# Mounts of its own: they go with the last process, whatever happens.
[ "${IN_NAMESPACE:-}" = yes ] || IN_NAMESPACE=yes TRIXIE_TREE=$tree exec unshare -m "$PWD/softhsm-tests/interop-trixie.sh"

export PATH="$PWD/bin:$PATH"
work=$(mktemp -d /tmp/sw-trixie.XXXXXX)
gateway=
cleanup() {
    if [ -n "$gateway" ]; then
        kill "$gateway" 2>/dev/null || true
        wait "$gateway" 2>/dev/null || true
    fi
    umount -l "$tree/mnt" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

port=$((20000 + RANDOM % 20000))
signwardend init --dir "$work/gw" --dev --listen "127.0.0.1:$port" >/dev/null 2>&1
signwardend serve --dir "$work/gw" 2>"$work/gateway.log" &
gateway=$!
export SIGNWARDEN_PROFILE=$work/gw/clients/admin/client.yaml
signwarden ping --wait 10s >/dev/null
for a in rsa2048 rsa4096 p256 p384 ed25519; do
    signwarden key create $a --algorithm $a --openpgp-uid "$a <$a@example.org>" >/dev/null
done
signwarden key create sm --algorithm rsa2048 >/dev/null
signwarden key cert sm --self-signed --subject "CN=sm,O=Example" >/dev/null

for k in boot=rsa2048 kec=p256; do
    signwarden key create ${k%=*} --algorithm ${k#*=} >/dev/null
    signwarden key cert ${k%=*} --self-signed --subject "CN=${k%=*}" --usage kmod >/dev/null
done

mkdir "$work/mnt"
cp -r "$work/gw/clients/admin" "$work/mnt/profile"
cp bin/signwarden softhsm-tests/interop-checks.sh softhsm-tests/interop-sign.sh softhsm-tests/interop-p11.sh "$work/mnt/"
mount --bind "$work/mnt" "$tree/mnt"
mount -t proc proc "$tree/proc" 2>/dev/null || mount --bind /proc "$tree/proc"
chroot "$tree" sh /mnt/interop-checks.sh
signed=$(signwarden audit tail -o jsonl --limit 1000 | grep -c '"outcome":"signed"')
# 14 detached, 2 and 1 and 1 in other forms, 10 and 20 in packages, git's 2, 1 of gpgsm, 3 of sq; by PKCS#11
# 5 of openssl, 2 modules, 3 images, 3 of ukify.
[ "$signed" = 67 ] || {
    echo "FAIL the audit log has $signed signatures, and 67 were made"
    exit 1
}
echo "ok   audit log: $signed signatures"
