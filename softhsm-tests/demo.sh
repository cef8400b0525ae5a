#!/usr/bin/env bash
# The main job on real input, as a person would type it, in a throw-away
# directory: an ISO's checksums, RPMs, a git tag and 5,000 digests are signed
# with a key that never leaves a SoftHSM2 token, and each is checked by its own
# ecosystem's verifier. Ends non-zero if any of them objects.
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD
export PATH="$top/bin:$PATH"

work=$(mktemp -d /tmp/sw-demo.XXXXXX)
gateway=
cleanup() {
    if [ -n "$gateway" ]; then
        kill "$gateway" 2>/dev/null || true
        wait "$gateway" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap cleanup EXIT
cd "$work"

step() { printf '\n== %s\n' "$*"; }
run() { # print a command as a user would type it, and run it
    local shown=() w
    for w in "$@"; do
        case $w in *[!A-Za-z0-9_./:=@,+-]*) shown+=("'$w'") ;; *) shown+=("$w") ;; esac
    done
    printf '$ %s\n' "${shown[*]}"
    "$@"
}
port=$((20000 + RANDOM % 20000))

step "A gateway with a SoftHSM2 token of its own (in $work, gone afterwards)"
run signwardend init --dir gw --dev --listen "127.0.0.1:$port"
printf '$ signwardend serve --dir gw &\n'
signwardend serve --dir gw &
gateway=$!
export SIGNWARDEN_PROFILE=$work/gw/clients/admin/client.yaml
printf '$ export SIGNWARDEN_PROFILE=gw/clients/admin/client.yaml\n'
run signwarden ping --wait 10s

step "A key, generated in the token: RSA-4096, and its OpenPGP certificate"
run signwarden key create release --algorithm rsa4096 --openpgp-uid "Release <release@example.org>" --expires 5y
printf '$ signwarden key export release > release.asc\n'
signwarden key export release >release.asc

step "An ISO image from real files, and its checksums"
mkdir tree
cp "$top"/LICENSE /bin/sh /etc/os-release tree/
run xorriso -as mkisofs -quiet -V DEMO -o disc.iso tree
printf '$ sha256sum disc.iso > SHA256SUMS\n'
sha256sum disc.iso >SHA256SUMS

step "Stock gpg signs the checksums through the gateway's agent socket"
run signwarden exec -- gpg --batch --armor --local-user release@example.org --detach-sign SHA256SUMS

step "Stock gpg with only the exported certificate verifies them"
export GNUPGHOME=$work/verifier
mkdir -m 700 "$GNUPGHOME"
echo no-autostart >"$GNUPGHOME/gpg.conf"
printf '$ export GNUPGHOME=verifier\n'
run gpg --batch --quiet --import release.asc
run gpg --batch --verify SHA256SUMS.asc SHA256SUMS
run sha256sum --check SHA256SUMS

step "An RPM made by rpmbuild, and RPMs with every compressor from go-rpmutils' test data"
cat >hello.spec <<'S'
Name: hello
Version: 1.0
Release: 1
Summary: A package to sign
License: Apache-2.0
BuildArch: noarch
%description
A package to sign.
%install
install -D -m 644 /etc/os-release %{buildroot}/usr/share/hello/os-release
%files
/usr/share/hello/os-release
S
run rpmbuild --quiet -bb --define "_topdir $work/rpmbuild" hello.spec
cp rpmbuild/RPMS/noarch/hello-1.0-1.noarch.rpm .
data=$(cd "$top" && go mod download github.com/sassoftware/go-rpmutils && go list -m -f '{{.Dir}}' github.com/sassoftware/go-rpmutils)/testdata
for f in "$data"/payload-test-*.rpm "$data"/simple-*.rpm; do cp "$f" . && chmod u+w "$(basename "$f")"; done
ls ./*.rpm

step "Stock rpmsign signs them through the gateway"
run signwarden exec -- rpmsign --define '_gpg_name release@example.org' --addsign hello-1.0-1.noarch.rpm
run signwarden exec -- rpmsign --define '_gpg_name release@example.org' --resign payload-test-*.rpm simple-*.rpm

step "rpmkeys with a fresh database that holds only the exported certificate verifies them"
mkdir rpmdb
run rpmkeys --dbpath "$work/rpmdb" --import release.asc
run rpmkeys --dbpath "$work/rpmdb" -K ./*.rpm | tee rpmkeys.out
if [ "$(grep -c 'digests signatures OK' rpmkeys.out)" != "$(ls ./*.rpm | wc -l)" ]; then
    echo "rpmkeys does not find every signature OK" >&2
    exit 1
fi

step "git signs a tag through the gateway, and verifies it"
run git init -q repo
git -C repo config user.name Release
git -C repo config user.email release@example.org
run git -C repo commit -q --allow-empty -m 'First'
run signwarden exec -- git -C repo tag -s -m 'Version 1.0' v1.0
run git -C repo tag -v v1.0

step "The client signs by itself: detached and clear, hashed locally"
run signwarden sign openpgp --key release disc.iso
run gpg --batch --verify disc.iso.sig disc.iso
run signwarden sign openpgp --key release --clearsign --output SHA256SUMS.clear SHA256SUMS
run gpg --batch --verify SHA256SUMS.clear

step "5,000 digests over one gRPC stream, every signature verified by the client"
run signwarden key create bulk --algorithm p256
run signwarden bench sign --key bulk --count 5000 --concurrency 256 --verify

step "Everything is in the audit log"
run signwarden audit tail --limit 3

step "A disabled key signs nothing any more"
run signwarden key disable release
printf '$ %s\n' "signwarden exec -- gpg --batch --local-user release@example.org --detach-sign disc.iso"
if signwarden exec -- gpg --batch --yes --local-user release@example.org --detach-sign disc.iso; then
    echo "a disabled key has signed" >&2
    exit 1
fi

printf '\nAll verifiers are content.\n'
