# Run by interop-trixie.sh in the tree, where the work directory is /mnt: has all tools
# sign, and verifies with what knows the certificates only.
set -eu
export PATH=/mnt:$PATH SIGNWARDEN_PROFILE=/mnt/profile/client.yaml HOME=/mnt/home LC_ALL=C
export keys="rsa2048 rsa4096 p256 p384 ed25519"
mkdir -p "$HOME"
cd /mnt
ok() { printf 'ok   %s\n' "$*"; }
fail() {
    printf 'FAIL %s\n' "$*"
    exit 1
}
echo text >file
for k in $keys; do signwarden key export $k >$k.asc; done
gpg --version | head -n 1
rpm --version
sq version 2>&1 | head -n 1

mkdir -m 700 verifier
echo no-autostart >verifier/gpg.conf
for k in $keys; do GNUPGHOME=/mnt/verifier gpg --batch --quiet --import $k.asc 2>/dev/null; done

cat >p.spec <<'E'
Name: p
Version: 1.0
Release: 1
Summary: A package to be signed
License: Apache-2.0
BuildArch: noarch
%description
A package to be signed.
%install
mkdir -p %{buildroot}/usr/share/p
for i in 0 1 2 3 4 5 6 7 8 9; do cp /etc/os-release %{buildroot}/usr/share/p/$i; done
%{lua: for i=0,9 do print("%package -n p"..i.."\nSummary: Number\n%description -n p"..i.."\nNumber.\n%files -n p"..i.."\n/usr/share/p/"..i.."\n") end}
E
rpmbuild -bb --quiet --define '_topdir /mnt/rpm' p.spec >rpmbuild.out 2>&1 || { cat rpmbuild.out; fail rpmbuild; }
mkdir one two
cp rpm/RPMS/noarch/*.rpm one/
cp rpm/RPMS/noarch/*.rpm two/
git init -q repo

signwarden exec -- sh /mnt/interop-sign.sh 2>exec.err || {
    cat exec.err
    [ ! -e rpmsign.out ] || cat rpmsign.out
    fail "signing"
}
ok "signed"

export GNUPGHOME=/mnt/verifier
for s in *-SHA*.sig; do gpg --batch --quiet --verify $s file 2>/dev/null || fail "gpg: $s"; done
for k in $keys; do sq verify --signer-file $k.asc --signature-file $k-SHA512.sig file >/dev/null 2>&1 || fail "sq: $k"; done
ok "gpg: $(ls ./*-SHA*.sig | wc -l) detached signatures, and P-384 with SHA-256 refused"
[ "$(gpg --batch --status-fd 1 --verify two.gpg 2>/dev/null | grep -c GOODSIG)" = 2 ] || fail "gpg: two keys"
for s in clear.asc default.gpg; do gpg --batch --verify $s 2>/dev/null || fail "gpg: $s"; done
ok "gpg: two keys, clearsign, default key"
[ "$(grep -c '^sec#' list)" = 5 ] && [ "$(grep -c '^ssb  ' list)" = 5 ] || {
    cat list
    fail "gpg -K"
}
ok "gpg -K: five subkeys, and no primary key"
mkdir db
for k in rsa4096 ed25519; do rpmkeys --dbpath /mnt/db --import $k.asc; done
for d in one two; do
    n=$(rpmkeys --dbpath /mnt/db -K $d/*.rpm | grep -c 'digests signatures OK') || true
    [ "$n" = 10 ] || {
        rpmkeys --dbpath /mnt/db -Kv $d/*.rpm
        cat rpmsign.out
        fail "rpmkeys -K: $n of 10 in $d"
    }
done
ok "rpmsign: 10 packages, and 10 with --rpmv3; rpmkeys -K says OK"
git -C repo verify-commit HEAD 2>/dev/null || fail "git verify-commit"
git -C repo verify-tag v1 2>/dev/null || fail "git verify-tag"
ok "git: commit -S, tag -s"
signwarden key export sm --format x509 >sm.pem
openssl cms -verify -binary -inform DER -in file.p7s -content file -CAfile sm.pem -purpose any -out /dev/null 2>/dev/null ||
    fail "openssl cms -verify"
ok "gpgsm: openssl verifies"
[ "$(grep -c '@gpg-agent/default: available' sq.list)" = 5 ] || {
    cat sq.list
    fail "sq key list"
}
for k in rsa4096 p256 ed25519; do
    gpg --batch --quiet --verify $k.sq file 2>/dev/null || fail "gpg: signature of sq, $k"
    sq verify --signer-file $k.asc --signature-file $k.sq file >/dev/null 2>&1 || fail "sq: its own signature, $k"
done
ok "sq: lists five keys of its gpg-agent backend, and signs with three; gpg and sq verify"
sh /mnt/interop-p11.sh
