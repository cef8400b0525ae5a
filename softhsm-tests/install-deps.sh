#!/bin/sh
# Installs what the demo and the tests need and the machine lacks, from the
# distribution's packages: Debian, Ubuntu, Fedora and their relatives.
set -eu

# Each line: what must be there (a command, or a file), its Debian package, its
# Fedora package. The module's file is in one of three places.
missing_deb= missing_rpm=
need() { # need COMMAND DEB RPM
    command -v "$1" >/dev/null 2>&1 || { missing_deb="$missing_deb $2"; missing_rpm="$missing_rpm $3"; }
}
[ -e /usr/lib/softhsm/libsofthsm2.so ] || [ -e /usr/lib64/pkcs11/libsofthsm2.so ] ||
    [ -e /usr/lib64/softhsm/libsofthsm2.so ] || { missing_deb="$missing_deb softhsm2" missing_rpm="$missing_rpm softhsm"; }
[ -d /usr/lib/systemd/boot/efi ] || { missing_deb="$missing_deb systemd-boot-efi" missing_rpm="$missing_rpm systemd-boot-unsigned"; }
[ -x /usr/bin/time ] || { missing_deb="$missing_deb time" missing_rpm="$missing_rpm time"; } # a shell has a word of that name
need gpg gnupg gnupg2
need gpgconf gpgconf gnupg2
need gpg-agent gpg-agent gnupg2
need rpm rpm rpm
need rpmbuild rpm rpm-build
need rpmsign rpm rpm-sign
need xorriso xorriso xorriso
need git git git
need gcc gcc gcc
need pkcs11-tool opensc opensc
need sq sq sequoia-sq
need openssl openssl openssl
need sqlite3 sqlite3 sqlite
need evmctl ima-evm-utils ima-evm-utils
need sbverify sbsigntool sbsigntools
need pesign pesign pesign
need osslsigncode osslsigncode osslsigncode
need sign-efi-sig-list efitools efitools
need p11-kit p11-kit p11-kit
need p11tool gnutls-bin gnutls-utils
need certutil libnss3-tools nss-tools
need jarsigner default-jdk-headless java-devel
has() { # has DEB RPM FILE...: one of the files must be there
    deb=$1 rpm=$2
    shift 2
    for f; do [ ! -e "$f" ] || return 0; done
    missing_deb="$missing_deb $deb" missing_rpm="$missing_rpm $rpm"
}
has p11-kit-modules p11-kit-server /usr/lib/*/pkcs11/p11-kit-client.so /usr/lib64/pkcs11/p11-kit-client.so
has libp11-kit-dev p11-kit-devel /usr/include/p11-kit-1/p11-kit/pkcs11.h
has libengine-pkcs11-openssl openssl-pkcs11 /usr/lib/*/engines-3/pkcs11.so /usr/lib64/engines-3/pkcs11.so
need fsverity fsverity fsverity-utils
need veritysetup cryptsetup-bin veritysetup
need modinfo kmod kmod
need gpgsm gpgsm gnupg2-smime
need debsign devscripts devscripts
need dpkg-buildpackage dpkg-dev dpkg-dev
need make make make
need apt-ftparchive apt-utils apt-utils
need createrepo_c createrepo-c createrepo_c
need ssh openssh-client openssh-clients
need systemd-socket-activate systemd systemd
need nsenter util-linux util-linux
need xz xz-utils xz
need zstd zstd zstd
# The kernel's sign-file: a package named after the kernel's version, found below.
sign_file() { ls /usr/lib/linux-kbuild-*/scripts/sign-file /usr/src/kernels/*/scripts/sign-file /usr/src/linux-headers-*/scripts/sign-file 2>/dev/null | head -n 1; }
[ -n "$(sign_file)" ] || { missing_deb="$missing_deb linux-kbuild" missing_rpm="$missing_rpm kernel-devel"; }

[ -x /usr/sbin/sshd ] || { missing_deb="$missing_deb openssh-server" missing_rpm="$missing_rpm openssh-server"; }

[ -n "$missing_deb" ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "install-deps: missing:$missing_deb (Debian) or:$missing_rpm (Fedora)" >&2
    echo "hint: install them, or run this as root once" >&2
    exit 1
fi
# The tests start an sshd of their own, on loopback. That of the distribution is not to
# listen because of them, now or after a reboot.
case $missing_deb in *openssh-server*)
    systemctl mask ssh.service ssh.socket sshd.service >/dev/null 2>&1 || true
    echo "install-deps: openssh-server is wanted for its program only; its service is masked (systemctl unmask ssh)" >&2 ;;
esac
if command -v apt-get >/dev/null 2>&1; then
    echo "install-deps: installing$missing_deb" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q >/dev/null
    kbuild=$(apt-cache search --names-only '^linux-kbuild-[0-9.]*$' | cut -d' ' -f1 | sort -V | tail -n 1)
    missing_deb=$(echo "$missing_deb" | sed "s/linux-kbuild\$/${kbuild:-linux-headers-generic}/")
    # shellcheck disable=SC2086 # a list of words
    apt-get install -q -y --no-install-recommends $missing_deb >/dev/null
elif command -v dnf >/dev/null 2>&1; then
    echo "install-deps: installing$missing_rpm" >&2
    # shellcheck disable=SC2086
    dnf install -q -y $missing_rpm >/dev/null
else
    echo "install-deps: neither apt-get nor dnf here; install:$missing_deb" >&2
    exit 1
fi
