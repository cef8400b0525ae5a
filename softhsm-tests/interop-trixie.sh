#!/usr/bin/env bash
# The agent with the tools of Debian 13: gpg 2.4, rpm 4.20, git, gpgsm, and sq 1.3
# through its gpg-agent backend, in a tree made by debootstrap. The gateway and its
# token are this machine's. Ends non-zero if any signature is not made or not accepted.
#
# Wants root, debootstrap, bin/ built, and some 430 MB; the tree is kept for the next
# time (TRIXIE_TREE names another place, DEBIAN_MIRROR another mirror).
set -euo pipefail
cd "$(dirname "$0")/.."
tree=${TRIXIE_TREE:-$PWD/.cache/trixie}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

if [ "$(id -u)" != 0 ]; then
    echo "interop-trixie: wants root, for a chroot" >&2
    exit 1
fi
if [ ! -e "$tree/usr/bin/sq" ] || [ ! -e "$tree/usr/bin/rpmsign" ]; then
    command -v debootstrap >/dev/null || {
        echo "interop-trixie: debootstrap is missing: apt-get install debootstrap" >&2
        exit 1
    }
    rm -rf "$tree.new"
    mkdir -p "$tree.new"
    debootstrap --variant=minbase --include=gpg,gpgconf,gpgsm,rpm,sq,git,openssl trixie "$tree.new" "$mirror"
    rm -rf "$tree"
    mv "$tree.new" "$tree"
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

mkdir "$work/mnt"
cp -r "$work/gw/clients/admin" "$work/mnt/profile"
cp bin/signwarden softhsm-tests/interop-checks.sh softhsm-tests/interop-sign.sh "$work/mnt/"
mount --bind "$work/mnt" "$tree/mnt"
mount -t proc proc "$tree/proc" 2>/dev/null || mount --bind /proc "$tree/proc"
chroot "$tree" sh /mnt/interop-checks.sh
signed=$(signwarden audit tail -o jsonl --limit 1000 | grep -c '"outcome":"signed"')
# 14 detached, 2 and 1 and 1 in other forms, 10 and 20 in packages, git's 2, 1 of gpgsm, 3 of sq.
[ "$signed" = 54 ] || {
    echo "FAIL the audit log has $signed signatures, and 54 were made"
    exit 1
}
echo "ok   audit log: $signed signatures"
