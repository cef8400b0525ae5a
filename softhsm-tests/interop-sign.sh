# Sourced by nobody, run by interop-checks.sh in one GNUPGHOME that signwarden exec
# makes: every tool signs, in /mnt. $keys are the keys with OpenPGP certificates.
set -eu
for k in $keys; do
    for h in SHA256 SHA384 SHA512; do
        if [ $k$h = p384SHA256 ]; then # as the real agent
            ! gpg --batch --yes --status-fd 1 -u $k@example.org --digest-algo $h -o x --detach-sign file >refused 2>&1
            grep -q 'FAILURE sign 67109003' refused
            continue
        fi
        gpg --batch --yes -u $k@example.org --digest-algo $h -o $k-$h.sig --detach-sign file 2>gpg.err
        # HAVEKEY --list is answered, or gpg 2.4 would say this and ask for each key.
        if grep -q 'fast path' gpg.err; then cat gpg.err; exit 1; fi
    done
done
gpg --batch --yes -u ed25519@example.org -u rsa2048@example.org -o two.gpg --sign file 2>/dev/null
gpg --batch --yes -u p256@example.org -o clear.asc --clearsign file 2>/dev/null
gpg --batch --yes -o default.gpg --sign file 2>/dev/null
gpg --batch -K --with-keygrip >list 2>/dev/null
rpmsign --define '_gpg_name rsa4096@example.org' --addsign one/*.rpm >rpmsign.out 2>&1
rpmsign --define '_gpg_name ed25519@example.org' --addsign --rpmv3 two/*.rpm >>rpmsign.out 2>&1
git -C repo -c user.name=rsa2048 -c user.email=rsa2048@example.org commit -q --allow-empty -S -m signed
git -C repo -c user.name=rsa2048 -c user.email=rsa2048@example.org tag -s -m one v1
gpgsm --batch -u sm --include-certs -1 --output file.p7s --detach-sign file 2>gpgsm.err
for k in $keys; do sq cert import $k.asc >/dev/null 2>&1; done
sq key list >sq.list 2>&1
for k in rsa4096 p256 ed25519; do
    fpr=$(gpg --batch --with-colons -k $k@example.org 2>/dev/null | awk -F: '/^fpr/{print $10; exit}')
    sq sign --signer "$fpr" --signature-file $k.sq file
done
