package softhsm_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// signFileSums are the SHA-256 of the kernel's files that sign-file-source.sh gets, of the
// versions that were read.
var signFileSums = map[string]string{
	"38df09deece51decdf5b87c04090d462bcd6adfeb9809e01cc5c1898bc7993d1": "sign-file.c of Linux 6.1.192",
	"885378f5e4b8008ec0dc62374dd4a34bae8808e3cdd646b3deb53584e1873352": "ssl-common.h of Linux 6.1.192",
}

// engineFirst goes before sign-file.c: it takes OpenSSL's provider where that is of version
// 3 or later, and its engine before. Debian 12 has the engine alone. The headers that ask
// for the version themselves are read before it changes.
const engineFirst = `#include <openssl/bio.h>
#include <openssl/cms.h>
#include <openssl/engine.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#undef OPENSSL_VERSION_MAJOR
#define OPENSSL_VERSION_MAJOR 1
`

// signFileByEngine builds the kernel's own sign-file for libp11's engine.
func signFileByEngine(t *testing.T, dir string) string {
	t.Helper()
	source := "../.cache/sign-file/"
	for _, name := range []string{"sign-file.c", "ssl-common.h"} {
		text, err := os.ReadFile(source + name)
		if err != nil {
			t.Fatalf("%v: run softhsm-tests/sign-file-source.sh .cache/sign-file", err)
		}
		sum := sha256.Sum256(text)
		if signFileSums[hex.EncodeToString(sum[:])] == "" {
			t.Fatalf("%s has the SHA-256 %x, which signFileSums does not know: read what has changed, and add it", name, sum)
		}
	}
	writeFile(t, filepath.Join(dir, "engine.h"), engineFirst)
	out := filepath.Join(dir, "sign-file")
	mustEnv(t, os.Environ(), "gcc", "-Wno-deprecated-declarations", "-include", filepath.Join(dir, "engine.h"), "-o", out, source+"sign-file.c", "-lcrypto")
	return out
}

// generatedModules makes n kernel modules in dir, no two alike.
func generatedModules(t *testing.T, dir string, n int) []string {
	t.Helper()
	const mark = "number-0000"
	src, obj := filepath.Join(dir, "m.c"), filepath.Join(dir, "m.o")
	writeFile(t, src, `int init_module(void) { return 0; }
const char license[] __attribute__((section(".modinfo"), used)) = "license=GPL";
const char description[] __attribute__((section(".modinfo"), used)) = "description=`+mark+`";
`)
	mustEnv(t, os.Environ(), "gcc", "-c", "-o", obj, src)
	module := readFile(t, obj)
	var all []string
	for i := range n {
		path := filepath.Join(dir, fmt.Sprintf("m%04d.ko", i))
		if err := os.WriteFile(path, bytes.Replace(module, []byte(mark), fmt.Appendf(nil, "number-%04d", i), 1), 0o644); err != nil {
			t.Fatal(err)
		}
		all = append(all, path)
	}
	return all
}

// appendedSignature takes a signed module apart.
func appendedSignature(t *testing.T, module []byte) (content, signature []byte) {
	t.Helper()
	const magic = "~Module signature appended~\n"
	body, ok := bytes.CutSuffix(module, []byte(magic))
	if !ok || len(body) < 12 {
		t.Fatalf("a module of %d bytes has no signature", len(module))
	}
	body, tail := body[:len(body)-12], body[len(body)-12:]
	size := int(binary.BigEndian.Uint32(tail[8:]))
	if size > len(body) {
		t.Fatalf("a signature of %d bytes in a module of %d", size, len(body))
	}
	return body[:len(body)-size], body[len(body)-size:]
}

// signedModules asserts that each module is as it was, signed with the certificate's key: to us,
// to openssl, and to modinfo, whose signer is the issuer that the signature names.
func (s *p11Site) signedModules(t *testing.T, cert, signer string, before map[string][]byte) {
	t.Helper()
	var files []string
	for path, was := range before {
		files = append(files, path)
		content, signature := appendedSignature(t, readFile(t, path))
		if !bytes.Equal(content, was) {
			t.Fatalf("%s: what is signed is not the module as it was", path)
		}
		writeFile(t, s.at("sig"), string(signature))
		writeFile(t, s.at("content"), string(content))
		verify := func(content string) result {
			return runEnv(t, os.Environ(), "openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", s.at("sig"), "-content", content,
				"-certfile", cert, "-CAfile", cert, "-nointern", "-partial_chain", "-purpose", "any", "-out", s.at("verified"))
		}
		if r := verify(s.at("content")); r.code != 0 {
			t.Errorf("%s: openssl: exit code %d: %s", path, r.code, r.stderr)
		}
		if len(files) == 1 && verify(s.at("msg")).code == 0 {
			t.Error("openssl accepts it over another file: this test could not fail")
		}
	}
	if out := s.host(t, "modinfo", append([]string{"-F", "signer"}, files...)...); strings.Count(out, signer+"\n") != len(files) {
		t.Errorf("modinfo finds other signers than %s: %s", signer, out)
	}
	s.gateway.must(t, "signwarden", append([]string{"verify", "kmod", "--cert", cert}, files...)...)
}

// readModules are the files and what is in them.
func readModules(t *testing.T, files []string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for _, path := range files {
		out[path] = readFile(t, path)
	}
	return out
}

// The kernel's own sign-file, unmodified: one command, and a loop as kbuild's over 300 modules.
// Each signature is one request.
func TestP11SignFile(t *testing.T) {
	s := newP11Site(t)
	signFile := signFileByEngine(t, s.dir)

	one := generatedModules(t, s.dir, 2)
	before := readModules(t, one)
	rows := s.rows(t)
	s.exec(t, signFile, "sha256", "pkcs11:object=kmod", s.at("kmod.pem"), one[0])
	s.exec(t, signFile, "sha512", "pkcs11:token=signwarden;object=kmod", s.at("kmod.pem"), one[1])
	s.signed(t, rows, "kmod", 2)
	s.signedModules(t, s.at("kmod.pem"), "kmod", before)

	// A key that is not there: an error, and the module is as it was.
	fresh := generatedModules(t, s.dir, 1)[0]
	was := readFile(t, fresh)
	r := s.gateway.try(t, "signwarden", "exec", "--", signFile, "sha256", "pkcs11:object=none", s.at("kmod.pem"), fresh)
	if r.code == 0 || !bytes.Equal(readFile(t, fresh), was) {
		t.Errorf("with a key that is not there: exit code %d: %s", r.code, r.stderr)
	}

	for _, k := range []struct {
		key, signer, cert string
		n                 int
	}{{"kmod", "kmod", "kmod.pem", 300}, {"ec", "Test CA", "ec.pem", 10}} {
		dir := filepath.Join(s.dir, "loop-"+k.key)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		modules := generatedModules(t, dir, k.n)
		before := readModules(t, modules)
		row := s.audit(t, 1)[0].Row
		s.exec(t, "sh", "-ec", `for m in "$3"/*.ko; do "$0" sha256 "pkcs11:object=$1" "$2" "$m"; done`, signFile, k.key, s.at(k.cert), dir)
		if n := s.audit(t, 1)[0].Row - row; n != int64(k.n) {
			t.Errorf("%d modules signed with %s: the audit log has %d rows more", k.n, k.key, n)
		}
		s.signedModules(t, s.at(k.cert), k.signer, before)
	}
}
