# Run by interop-checks.sh in the tree: the tools that load keys through PKCS#11, as they are
# packaged, in one signwarden exec each. boot is an RSA key and kec one of P-256, with
# certificates. Verified by what knows the certificates only.
set -eu
p11() { # p11 NAME COMMAND...: by the exec of one tool
    name=$1
    shift
    signwarden exec -- "$@" >p11.out 2>&1 || {
        cat p11.out
        printf 'FAIL %s\n' "$name"
        exit 1
    }
}
accepted() { # accepted NAME COMMAND...: by a verifier
    name=$1
    shift
    "$@" >verify.out 2>&1 || {
        cat verify.out
        printf 'FAIL %s: not accepted\n' "$name"
        exit 1
    }
}
for k in boot kec; do signwarden key export $k --format x509 >$k.pem; done
image=/usr/lib/systemd/boot/efi/systemd-bootx64.efi
openssl version
dpkg-query -W -f '${Package} ${Version}\n' p11-kit pkcs11-provider systemd-repart systemd-ukify

for k in boot kec; do
    key="pkcs11:token=signwarden;object=$k;type=private"
    p11 "openssl cms by the provider" openssl cms -sign -binary -provider default -provider pkcs11 -inkey "$key" -signer $k.pem -in file -outform der -out $k.provider.p7
    p11 "openssl cms by the engine" openssl cms -sign -binary -engine pkcs11 -keyform engine -inkey "$key" -signer $k.pem -in file -outform der -out $k.engine.p7
    for by in provider engine; do
        accepted "openssl cms by the $by" openssl cms -verify -binary -inform der -in $k.$by.p7 -content file -CAfile $k.pem -purpose any -out verified
    done
done
printf 'ok   openssl cms: RSA and P-256, by the provider and by the engine\n'

cat >m.c <<'C'
int init_module(void) { return 0; }
const char license[] __attribute__((section(".modinfo"), used)) = "license=GPL";
C
gcc -c -o plain.ko m.c
sign_file=$(ls /usr/lib/linux-kbuild-*/scripts/sign-file)
for k in boot kec; do
    cp plain.ko $k.ko
    p11 sign-file "$sign_file" sha256 "pkcs11:object=$k" $k.pem $k.ko
    accepted sign-file signwarden verify kmod --cert $k.pem $k.ko
    [ "$(modinfo -F signer $k.ko)" = $k ] || { modinfo $k.ko; printf 'FAIL modinfo\n'; exit 1; }
    size=$(tail -c 32 $k.ko | head -c 4 | od -An -tu4 --endian=big | tr -d ' ')
    tail -c $((size + 40)) $k.ko | head -c "$size" >$k.ko.p7
    accepted "sign-file, openssl" openssl cms -verify -binary -inform der -in $k.ko.p7 -content plain.ko -certfile $k.pem -CAfile $k.pem -nointern -purpose any -out verified
done
printf 'ok   sign-file of linux-kbuild, by the provider: RSA and P-256\n'

key="pkcs11:token=signwarden;object=boot;type=private"
p11 sbsign sbsign --engine pkcs11 --key "$key" --cert boot.pem --output sbsign.efi $image
p11 systemd-sbsign /usr/lib/systemd/systemd-sbsign sign --private-key-source=provider:pkcs11 --private-key="$key" --certificate=boot.pem --output=systemd-sbsign.efi $image
p11 "osslsigncode" sh -c "osslsigncode sign -pkcs11module \"\$PKCS11_MODULE_PATH\" -pkcs11cert 'pkcs11:token=signwarden;object=boot;type=cert' -key '$key' -h sha256 -in $image -out osslsigncode.efi"
uki() { # uki NAME OPTION...: the boot loader plays the kernel, which ukify does not look into
    out=$1
    shift
    p11 "$out" ukify build --linux=$image --uname=6.12.0-test --cmdline=quiet --secureboot-private-key="$key" --secureboot-certificate=boot.pem --output="$out.efi" "$@"
}
# Whether a kernel is signed systemd-sbsign cannot tell, and sbverify tells where ukify does not look.
uki ukify-sbsign --sign-kernel --signtool=sbsign --signing-engine=pkcs11
uki ukify-systemd-sbsign --signtool=systemd-sbsign --signing-provider=pkcs11 --no-sign-kernel
for f in sbsign systemd-sbsign osslsigncode ukify-sbsign ukify-systemd-sbsign; do
    accepted "$f, sbverify" sbverify --cert boot.pem $f.efi
    accepted "$f, signwarden" signwarden verify efi --cert boot.pem $f.efi
done
! sbverify --cert boot.pem $image >verify.out 2>&1 || { printf 'FAIL sbverify accepts the unsigned image\n'; exit 1; }
printf 'ok   sbsign, systemd-sbsign, osslsigncode, ukify by both: sbverify and signwarden verify\n'

# What setup --p11 writes for the provider: OpenSSL takes the key with no option at all.
signwarden agent setup --p11 2>setup.out || { cat setup.out; printf 'FAIL agent setup --p11\n'; exit 1; }
signwarden agent --p11-socket /mnt/p11socket 2>agent.out &
agent=$!
trap 'kill $agent' EXIT
for _ in $(seq 100); do [ -S p11socket ] || sleep 0.1; done
P11_KIT_SERVER_ADDRESS=unix:path=/mnt/p11socket OPENSSL_CONF=$HOME/.config/signwarden/openssl-provider.cnf \
    openssl cms -sign -binary -inkey "$key" -signer boot.pem -in file -outform der -out setup.p7 2>setup.err || { cat setup.err agent.out; printf 'FAIL openssl by openssl-provider.cnf\n'; exit 1; }
accepted "openssl by openssl-provider.cnf" openssl cms -verify -binary -inform der -in setup.p7 -content file -CAfile boot.pem -purpose any -out verified
p11-kit list-modules | grep -q '^module: signwarden' || { p11-kit list-modules; printf 'FAIL p11-kit list-modules\n'; exit 1; }
signwarden agent setup --p11 --remove 2>setup.out
[ ! -e /etc/pkcs11/modules/signwarden.module ] && [ ! -e "$HOME/.config/signwarden" ] || { cat setup.out; printf 'FAIL --remove\n'; exit 1; }
printf 'ok   agent setup --p11: openssl by openssl-provider.cnf, p11-kit\n'
