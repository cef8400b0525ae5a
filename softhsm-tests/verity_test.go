package softhsm_test

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// x509Key makes a key with a self-signed certificate, and returns the file that
// has it.
func (g *gateway) x509Key(t testing.TB, name, algorithm string) string {
	t.Helper()
	g.must(t, "signwarden", "key", "create", name, "--algorithm", algorithm)
	g.must(t, "signwarden", "key", "cert", name, "--self-signed", "--subject", "CN="+name)
	cert := filepath.Join(t.TempDir(), name+".pem")
	writeFile(t, cert, g.must(t, "signwarden", "key", "export", name, "--format", "x509"))
	return cert
}

// opensslVerifies has openssl verify a detached message over a content.
func opensslVerifies(t testing.TB, sig, cert string, content []byte) bool {
	t.Helper()
	path := filepath.Join(t.TempDir(), "content")
	writeFile(t, path, string(content))
	r := runEnv(t, os.Environ(), "openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", sig, "-content", path,
		"-certfile", cert, "-CAfile", cert, "-purpose", "any", "-out", "/dev/null")
	return r.code == 0
}

// Signatures for fs-verity: openssl verifies them over what fsverity says is to be
// signed. (formats/fsverity compares them with those of fsverity sign byte for byte.)
func TestSignFSVerity(t *testing.T) {
	g := newGateway(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writeFile(t, at("empty"), "")
	writeFile(t, at("app"), strings.Repeat("program", 100_000))
	files := []string{at("app"), at("empty")}
	for _, a := range []string{"rsa2048", "p256"} {
		cert := g.x509Key(t, a, a)
		for _, tree := range [][]string{nil, {"--hash=sha512", "--block-size=1024", "--salt=00ff"}} {
			rows := len(g.audit(t, 1000))
			g.must(t, "signwarden", append(append([]string{"sign", "fsverity", "--key", a, "--force", "-r", dir}, tree...), files...)...)
			if now := g.audit(t, 1000); len(now)-rows != 2 || now[rows].Entry["format"] != "cms" {
				t.Errorf("%s: %d rows, the first %v; want 2 of format cms", a, len(now)-rows, now[rows].Entry)
			}
			for _, f := range files {
				args := []string{"digest", "--for-builtin-sig", "--compact", f}
				for _, flag := range tree {
					args = append(args, strings.Replace(flag, "--hash", "--hash-alg", 1))
				}
				signed, err := hex.DecodeString(strings.TrimSpace(mustEnv(t, os.Environ(), "fsverity", args...)))
				if err != nil {
					t.Fatal(err)
				}
				if !opensslVerifies(t, f+".fsv-sig", cert, signed) {
					t.Errorf("%s %q: openssl does not verify the signature of %s", a, tree, f)
				}
				if opensslVerifies(t, f+".fsv-sig", cert, signed[1:]) {
					t.Error("openssl accepts it over something else: this test could not fail")
				}
			}
			verify := append([]string{"verify", "fsverity", "--key", a}, tree...)
			g.must(t, "signwarden", append(verify, files...)...)
			for name, args := range map[string][]string{
				"another file":    append(verify, "--signature", at("app.fsv-sig"), at("empty")),
				"another tree":    append(verify, "--salt=01", at("app")),
				"no signature":    append(verify, cert),
				"a broken one":    append(verify, "--signature", at("app"), at("app")),
				"another's":       {"verify", "fsverity", "--cert", g.x509Key(t, a+"-"+tail(tree), "p256"), at("app")},
				"its own content": append(verify, "--signature", cert, at("app")),
			} {
				if r := g.try(t, "signwarden", args...); r.code != 3 || r.stdout != "" || !strings.Contains(r.stderr, "signwarden: ") {
					t.Errorf("%s: exit code %d, want 3: %s%s", name, r.code, r.stdout, r.stderr)
				}
			}
		}
	}
	rows := len(g.audit(t, 1000))
	for _, flags := range [][]string{
		{"--hash=sha384"}, {"--hash=md5"}, {"--block-size=0"}, {"--block-size=1000"}, {"--block-size=131072"}, {"--salt=x"},
		{"--salt=" + strings.Repeat("00", 33)},
	} {
		for _, command := range []string{"sign", "verify"} {
			args := append([]string{command, "fsverity", "--key", "rsa2048"}, append(flags, at("app"))...)
			if r := g.try(t, "signwarden", args...); r.code != 2 {
				t.Errorf("%s %q: exit code %d, want 2: %s", command, flags, r.code, r.stderr)
			}
		}
	}
	if now := len(g.audit(t, 1000)); now != rows {
		t.Errorf("%d requests were sent for nothing", now-rows)
	}
}

func tail(flags []string) string {
	if len(flags) == 0 {
		return "default"
	}
	return "other"
}

// Signatures of dm-verity root hashes: of those that veritysetup computes, by
// openssl, over the digits alone.
func TestSignDMVerity(t *testing.T) {
	g := newGateway(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writeFile(t, at("disk.img"), strings.Repeat("0123456789abcdef", 4096))
	mustEnv(t, os.Environ(), "veritysetup", "format", "--root-hash-file", at("disk.roothash"), at("disk.img"), at("disk.verity"))
	line, err := os.ReadFile(at("disk.roothash"))
	if err != nil {
		t.Fatal(err)
	}
	digits := strings.TrimSpace(string(line))
	for _, a := range []string{"rsa2048", "p384"} {
		cert := g.x509Key(t, a, a)
		g.must(t, "signwarden", "sign", "dmverity", "--key", a, "--force", at("disk.roothash"))
		if !opensslVerifies(t, at("disk.roothash.p7s"), cert, []byte(digits)) {
			t.Errorf("%s: openssl does not verify the signature of %s", a, digits)
		}
		if opensslVerifies(t, at("disk.roothash.p7s"), cert, []byte(digits+"\n")) {
			t.Errorf("%s: openssl verifies it over a line", a)
		}
		g.must(t, "signwarden", "verify", "dmverity", "--key", a, at("disk.roothash"))
		g.must(t, "signwarden", "verify", "dmverity", "--cert", cert, at("disk.roothash"))

		g.must(t, "signwarden", "sign", "dmverity", "--key", a, "--force", "--root-hash", digits, "--output", at("other.p7s"))
		if e := g.audit(t, 1)[0].Entry; e["format"] != "cms" || !strings.Contains(e["claim_note"], digits) {
			t.Errorf("audit entry %v", e)
		}
		g.must(t, "signwarden", "verify", "dmverity", "--key", a, "--signature", at("other.p7s"), at("disk.roothash"))
		piped := g.must(t, "signwarden", "sign", "dmverity", "--key", a, "--root-hash", digits, "--output", "-")
		if a == "rsa2048" { // of RSA all signatures are the same
			first, err := os.ReadFile(at("disk.roothash.p7s"))
			if err != nil || piped != string(first) {
				t.Errorf("on standard output: %q, want %q (%v)", piped, first, err)
			}
		}
	}
	writeFile(t, at("bad.roothash"), "no hash")
	writeFile(t, at("upper.roothash"), strings.ToUpper(digits))
	writeFile(t, at("swapped.roothash"), digits[1:]+digits[:1])
	rows := len(g.audit(t, 1000))
	for _, tt := range []struct {
		code int
		args []string
	}{
		{1, []string{"sign", "dmverity", "--key", "rsa2048", at("bad.roothash")}},
		{1, []string{"sign", "dmverity", "--key", "rsa2048", at("upper.roothash")}},
		{1, []string{"sign", "dmverity", "--key", "rsa2048", at("disk.img")}},
		{1, []string{"sign", "dmverity", "--key", "rsa2048", "--root-hash", digits, "--output", at("other.p7s")}}, // it exists
		{2, []string{"sign", "dmverity", "--key", "rsa2048", "--root-hash", "no hash", "--output", at("new.p7s")}},
		{2, []string{"sign", "dmverity", "--key", "rsa2048", "--root-hash", "", "--output", at("new.p7s")}},
		{2, []string{"sign", "dmverity", "--key", "rsa2048", "--root-hash", digits}},
		{2, []string{"sign", "dmverity", "--key", "rsa2048", "--root-hash", digits, "--output", at("new.p7s"), at("disk.roothash")}},
		{2, []string{"sign", "dmverity", "--key", "rsa2048"}},
		{3, []string{"verify", "dmverity", "--key", "rsa2048", "--signature", at("other.p7s"), at("swapped.roothash")}},
		{3, []string{"verify", "dmverity", "--key", "rsa2048", "--signature", at("other.p7s"), at("bad.roothash")}},
		{3, []string{"verify", "dmverity", "--key", "rsa2048", at("bad.roothash")}},
		{3, []string{"verify", "dmverity", "--key", "rsa2048", "--signature", at("disk.img"), at("disk.roothash")}},
		{3, []string{"verify", "dmverity", "--key", "rsa2048", "--signature", at("other.p7s"), at("disk.roothash")}}, // of p384
	} {
		if r := g.try(t, "signwarden", tt.args...); r.code != tt.code || !strings.HasPrefix(r.stderr, "signwarden: ") {
			t.Errorf("%q: exit code %d, want %d: %s%s", tt.args, r.code, tt.code, r.stdout, r.stderr)
		}
	}
	if now := len(g.audit(t, 1000)); now != rows {
		t.Errorf("%d requests were sent for nothing", now-rows)
	}
	if b, err := os.ReadFile(at("other.p7s")); err != nil || bytes.Equal(b, line) {
		t.Errorf("the signature that existed is gone (%v)", err)
	}
}
