package softhsm_test

import (
	"bufio"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Each mistake at the command line: its exit code, words that say what is wrong
// and what to do, and nothing changed.
func TestBadInput(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	g.key(t, "other", "ed25519")
	g.key(t, "off", "ed25519")
	g.must(t, "signwarden", "key", "disable", "off")
	g.must(t, "signwarden", "key", "create", "bare", "--algorithm", "p256")
	g.must(t, "signwardend", "client", "create", "ci", "--dir", g.dir)
	g.policy(t, `  - {name: ci, principals: [ci], keys: [rel, "off"], may: [sign, read], formats: [openpgp], blind: true}
`)
	ci := g.as("ci")
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	writeFile(t, file, "text")
	writeFile(t, filepath.Join(dir, "done"), "text")
	writeFile(t, filepath.Join(dir, "done.sig"), "precious")
	policy := filepath.Join(dir, "policy.yaml")
	writeFile(t, policy, "rules:\n  - {name: x, principals: [a], keys: [k], may: [sing]}\n")
	lockout := filepath.Join(dir, "lockout.yaml")
	writeFile(t, lockout, "rules: []\n")

	for _, tt := range []struct {
		name string
		g    *gateway
		args []string
		code int
		want []string // in what is printed
	}{
		{"unknown key", g, []string{"sign", "openpgp", "--key", "nope", file}, 4, []string{"no such key", "hint: ", "key list"}},
		{"another's key", ci, []string{"sign", "openpgp", "--key", "other", file}, 4, []string{"no such key", "hint: ", "key list"}},
		{"disabled key", ci, []string{"sign", "openpgp", "--key", "off", file}, 4, []string{"disabled", "key enable off"}},
		{"key without certificate", g, []string{"sign", "openpgp", "--key", "bare", file}, 2, []string{"no OpenPGP certificate", "--openpgp-uid"}},
		{"weak hash", g, []string{"sign", "openpgp", "--key", "rel", "--hash", "sha1", file}, 2, []string{"sha256, sha384 or sha512"}},
		{"missing file", g, []string{"sign", "openpgp", "--key", "rel", file + "x"}, 1, []string{"cannot be read", "no such file"}},
		{"directory", g, []string{"sign", "openpgp", "--key", "rel", dir}, 2, []string{"is a directory", "-r"}},
		{"existing signature", g, []string{"sign", "openpgp", "--key", "rel", filepath.Join(dir, "done")}, 1, []string{"exists", "--force"}},
		{"output directory missing", g, []string{"sign", "openpgp", "--key", "rel", "--output", dir + "/no/file.sig", file}, 1, []string{"cannot be written"}},
		{"some of several", g, []string{"sign", "openpgp", "--key", "rel", "--force", file, file + "x"}, 6, []string{"1 of 2"}},
		{"no key named", g, []string{"sign", "openpgp", file}, 2, []string{"key"}},
		{"unknown flag", g, []string{"key", "list", "--all"}, 2, []string{"--all", "hint: "}},
		{"algorithm", g, []string{"key", "create", "x", "--algorithm", "rsa1024"}, 2, []string{"rsa1024", "rsa4096"}},
		{"taken name", g, []string{"key", "create", "rel", "--algorithm", "p256"}, 1, []string{"exists", "another name"}},
		{"expiry", g, []string{"key", "create", "x", "--algorithm", "p256", "--openpgp-uid", "X", "--expires", "soon"}, 2, []string{"5y"}},
		{"not an administrator", ci, []string{"key", "create", "x", "--algorithm", "p256"}, 4, []string{"denied", "is not for this key"}},
		{"policy: wrong word", g, []string{"policy", "apply", "-f", policy}, 2, []string{`rule 1 ("x")`, "sing"}},
		{"policy: locks out", g, []string{"policy", "apply", "-f", lockout}, 1, []string{"no longer be an administrator"}},
		{"policy: not an administrator", ci, []string{"policy", "apply", "-f", policy}, 4, []string{"denied"}},
		{"audit: not an administrator", ci, []string{"audit", "tail"}, 4, []string{"denied"}},
		{"profile missing", g, []string{"--profile", dir + "/none.yaml", "ping"}, 1, []string{dir + "/none.yaml", "--profile"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			state := g.must(t, "signwarden", "key", "list", "-o", "json") + g.must(t, "signwarden", "policy", "show")
			r := tt.g.try(t, "signwarden", tt.args...)
			if r.code != tt.code {
				t.Errorf("exit code %d, want %d", r.code, tt.code)
			}
			for _, w := range tt.want {
				if !strings.Contains(r.stderr, w) {
					t.Errorf("does not say %q", w)
				}
			}
			if t.Failed() {
				t.Logf("%s%s", r.stdout, r.stderr)
			}
			if now := g.must(t, "signwarden", "key", "list", "-o", "json") + g.must(t, "signwarden", "policy", "show"); now != state {
				t.Error("keys or policy changed")
			}
		})
	}
	// Only the one signature of "some of several" was made, and nothing is left over.
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != "done done.sig file file.sig lockout.yaml policy.yaml" {
		t.Errorf("the directory holds %q", got)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "done.sig")); err != nil || string(b) != "precious" {
		t.Errorf("the existing signature is now %q, %v", b, err)
	}
}

// A key of another principal and one that does not exist: the same words, byte
// for byte, from the library too.
func TestSameWords(t *testing.T) {
	g := newGateway(t)
	g.key(t, "secret", "ed25519")
	g.must(t, "signwardend", "client", "create", "ci", "--dir", g.dir)
	ci, file := g.as("ci"), filepath.Join(t.TempDir(), "f")
	writeFile(t, file, "text")
	a := ci.try(t, "signwarden", "sign", "openpgp", "--key", "secret", file)
	b := ci.try(t, "signwarden", "sign", "openpgp", "--key", "absent", file)
	if a != b {
		t.Errorf("secret: %+v\nabsent: %+v", a, b)
	}
	c := g.client(t, "ci")
	sum := sha256.Sum256([]byte("x"))
	var texts []string
	for _, key := range []string{"secret", "absent"} {
		_, err := c.Sign(t.Context(), client.Request{Key: key, Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp"})
		texts = append(texts, fmt.Sprint(err))
	}
	if texts[0] != texts[1] || !strings.Contains(texts[0], "no such key") {
		t.Errorf("got %q", texts)
	}
}

// On one open stream: a wrong digest length, SHA-1, then a key that is disabled
// between two requests, then enabled again.
func TestBadRequestsOnOpenStream(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	c := g.client(t, "admin")
	sum := sha256.Sum256([]byte("x"))
	sign := func(digest []byte, h crypto.Hash) error {
		_, err := c.Sign(t.Context(), client.Request{Key: "rel", Digest: digest, Hash: h, Format: "openpgp"})
		return err
	}
	if err := sign(sum[:], crypto.SHA256); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		digest []byte
		hash   crypto.Hash
		want   string
	}{
		{"wrong length", sum[:20], crypto.SHA256, "the digest has 20 bytes; one of SHA-256 has 32"},
		{"sha-1", sum[:20], crypto.SHA1, "SHA-1 digests are not signed; use SHA-256"},
		{"no hash", sum[:], 0, "use SHA-256"},
	} {
		if err := sign(tt.digest, tt.hash); !errors.Is(err, sigerr.Invalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
	g.must(t, "signwarden", "key", "disable", "rel")
	if err := sign(sum[:], crypto.SHA256); !errors.Is(err, sigerr.Disabled) {
		t.Errorf("the very next request: got %v, want Disabled", err)
	}
	g.must(t, "signwarden", "key", "enable", "rel")
	if err := sign(sum[:], crypto.SHA256); err != nil {
		t.Errorf("enabled again: %v", err)
	}
}

// Clients that cannot prove who they are, as a person meets them.
func TestBadClientCertificates(t *testing.T) {
	g := newGateway(t)
	rows := len(g.audit(t, 1000))
	ca, caKey := readPair(t, g.dir+"/tls/ca.crt", g.dir+"/tls/ca.key")
	foreign, foreignKey := newCA(t)
	hour := time.Hour
	for _, tt := range []struct {
		name string
		cert *x509.Certificate
		by   *x509.Certificate
		key  *ecdsa.PrivateKey
		want string
	}{
		{"expired", &x509.Certificate{Subject: pkix.Name{CommonName: "admin"}, NotBefore: time.Now().Add(-2 * hour), NotAfter: time.Now().Add(-hour)}, ca, caKey, "expired"},
		{"foreign", &x509.Certificate{Subject: pkix.Name{CommonName: "admin"}, NotBefore: time.Now().Add(-hour), NotAfter: time.Now().Add(hour)}, foreign, foreignKey, "certificate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			issue(t, tt.cert, tt.by, tt.key, dir)
			writeFile(t, dir+"/client.yaml", fmt.Sprintf("address: %s\nca: %s/tls/ca.crt\ncertificate: client.crt\nkey: client.key\n", g.address, g.dir))
			r := g.try(t, "signwarden", "--profile", dir+"/client.yaml", "key", "list")
			if (r.code != 4 && r.code != 5) || !strings.Contains(r.stderr, tt.want) {
				t.Errorf("exit code %d: %s; want 4 or 5, with %q", r.code, r.stderr, tt.want)
			}
		})
	}
	if got := len(g.audit(t, 1000)); got != rows {
		t.Errorf("%d audit rows were written for nobody", got-rows)
	}
}

func readPair(t testing.TB, certFile, keyFile string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(b)
		return block.Bytes
	}
	cert, err := x509.ParseCertificate(read(certFile))
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(read(keyFile))
	if err != nil {
		t.Fatal(err)
	}
	return cert, key.(*ecdsa.PrivateKey)
}

func newCA(t testing.TB) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "foreign"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func issue(t testing.TB, tmpl, by *x509.Certificate, byKey *ecdsa.PrivateKey, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl.SerialNumber, tmpl.ExtKeyUsage = big.NewInt(2), []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by, key.Public(), byKey)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir+"/client.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	writeFile(t, dir+"/client.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})))
}

// A malformed Assuan line gets a well-formed ERR, and the connection goes on.
func TestMalformedAssuan(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	env, stop := g.agent(t, "rel")
	defer stop()
	path := strings.TrimSpace(mustEnv(t, env, "gpgconf", "--list-dirs", "agent-socket"))
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	line := func() string {
		t.Helper()
		s, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSuffix(s, "\n")
	}
	if s := line(); !strings.HasPrefix(s, "OK ") {
		t.Fatalf("greeting %q", s)
	}
	for _, tt := range []struct{ send, want string }{
		{" NOP", "ERR 67109140 "},
		{"\xff\xfe\x00", "ERR 67109139 "},
		{"SIGKEY zz", "ERR 67109144 "},
		{"SETHASH 2 " + strings.Repeat("00", 20), "ERR 67108948 "},
		{"SETHASH 8 00", "ERR 67109144 "},
		{"DELETE_KEY " + strings.Repeat("00", 20), "ERR 67109115 "},
		{"NOP", "OK"},
	} {
		fmt.Fprintf(c, "%s\n", tt.send)
		if s := line(); !strings.HasPrefix(s, tt.want) {
			t.Errorf("%q: got %q, want %q", tt.send, s, tt.want)
		}
	}
}
