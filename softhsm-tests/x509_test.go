package softhsm_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// X.509 on keys: self-signed certificates and requests as openssl reads them, a
// chain issued by openssl and imported, and what is refused.
func TestX509(t *testing.T) {
	g := newGateway(t)
	dir := t.TempDir()
	openssl := func(args ...string) string {
		t.Helper()
		return mustEnv(t, os.Environ(), "openssl", args...)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, a := range []string{"rsa2048", "p256", "p384", "ed25519"} {
		g.must(t, "signwarden", "key", "create", a, "--algorithm", a)
		g.must(t, "signwarden", "key", "cert", a, "--self-signed", "--subject", `CN=Example\, modules,O=Example,C=DE`, "--usage", "kmod", "--expires", "10y")
		writeFile(t, at(a+".pem"), g.must(t, "signwarden", "key", "export", a, "--format", "x509"))
		openssl("verify", "-CAfile", at(a+".pem"), "-check_ss_sig", "-purpose", "any", at(a+".pem"))
		text := openssl("x509", "-in", at(a+".pem"), "-noout", "-text")
		for _, want := range []string{"Example\\, modules", "Code Signing, 1.3.6.1.4.1.2312.16.1.2", "Digital Signature", "CA:FALSE"} {
			if !strings.Contains(strings.ReplaceAll(text, `"Example, modules"`, `Example\, modules`), want) {
				t.Errorf("%s: openssl does not show %q:\n%s", a, want, text)
			}
		}
		writeFile(t, at(a+".csr"), g.must(t, "signwarden", "key", "csr", a, "--subject", "CN="+a))
		openssl("req", "-in", at(a+".csr"), "-noout", "-verify")
	}
	openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", at("ca.key"), "-out", at("ca.pem"), "-subj", "/CN=CA", "-days", "2")
	openssl("x509", "-req", "-in", at("p256.csr"), "-CA", at("ca.pem"), "-CAkey", at("ca.key"), "-CAcreateserial", "-days", "1", "-out", at("leaf.pem"))
	chain := openssl("x509", "-in", at("leaf.pem")) + openssl("x509", "-in", at("ca.pem"))
	writeFile(t, at("chain.pem"), chain)
	before := g.must(t, "signwarden", "key", "export", "rsa2048", "--format", "x509")
	if r := g.try(t, "signwarden", "key", "cert", "rsa2048", "--import", at("chain.pem")); r.code != 2 || !strings.Contains(r.stderr, "another public key") {
		t.Errorf("a chain of another key: exit code %d: %s", r.code, r.stderr)
	}
	if after := g.must(t, "signwarden", "key", "export", "rsa2048", "--format", "x509"); after != before {
		t.Error("the refused import changed the chain")
	}
	g.must(t, "signwarden", "key", "cert", "p256", "--import", at("chain.pem"))
	if got := g.must(t, "signwarden", "key", "export", "p256", "--format", "x509"); got != chain {
		t.Errorf("the exported chain is\n%swant\n%s", got, chain)
	}
	for _, tt := range []struct {
		args []string
		says string
	}{
		{[]string{"--self-signed", "--subject", "O=no name"}, "common name"},
		{[]string{"--self-signed", "--subject", "CN=x,SERIAL=1"}, "SERIAL"},
		{[]string{"--self-signed", "--subject", "CN=x", "--usage", "tls"}, "codesign, kmod or efi"},
		{[]string{"--import", at("ca.key")}, "PRIVATE KEY"},
		{[]string{"--import", at("p256.csr")}, "CERTIFICATE REQUEST"},
		{nil, "self-signed"},
	} {
		if r := g.try(t, "signwarden", append([]string{"key", "cert", "p256"}, tt.args...)...); r.code != 2 || !strings.Contains(r.stderr, tt.says) {
			t.Errorf("%q: exit code %d: %s; want 2, with %q", tt.args, r.code, r.stderr, tt.says)
		}
	}
}
