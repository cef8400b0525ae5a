package rpm_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"maps"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/rpm"
)

// gpgHome is a fresh GnuPG home, under /tmp because a path to its agent's socket may have 107 bytes.
func gpgHome(t testing.TB) []string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "g")
	if err != nil {
		t.Fatal(err)
	}
	env := []string{"GNUPGHOME=" + dir}
	t.Cleanup(func() {
		kill := exec.Command("gpgconf", "--kill", "all")
		kill.Env = append(os.Environ(), env...)
		kill.Run()
		os.RemoveAll(dir)
	})
	return env
}

// rpm's own tool works on what we signed, and we on what it made of that.
func TestRPMSign(t *testing.T) {
	env := gpgHome(t)
	out, err := run(t, env, "gpg", "--batch", "--passphrase", "", "--quick-generate-key", "peer", "rsa2048", "sign")
	if err != nil {
		t.Fatalf("gpg: %v\n%s", err, out)
	}
	cert, err := run(t, env, "gpg", "--batch", "--armor", "--export", "peer")
	if err != nil {
		t.Fatalf("gpg: %v\n%s", err, cert)
	}
	db := rpmDB(t, ed())
	must(t, "rpmkeys", "--dbpath", db, "--import", file(t, "peer.asc", []byte(cert)))
	// Debian's rpm looks for /usr/bin/gpg2, which its gnupg does not have.
	gpg := "__gpg " + peer(t, "gpg")
	rpmsign := func(t *testing.T, path string, args ...string) {
		t.Helper()
		args = append([]string{"--define", gpg, "--define", "_gpg_name peer"}, append(args, path)...)
		out, err := run(t, env, "rpmsign", args...)
		if err != nil {
			t.Fatalf("rpmsign %q: %v\n%s", args, err, out)
		}
	}
	all := corpus(t)
	for _, name := range []string{"w3.zstdio", "source", "no-reserve", "simple-1.0.1-1.i386.rpm"} {
		t.Run(name, func(t *testing.T) {
			path := file(t, "x.rpm", sign(t, all[name], ed(), rpm.Options{}))
			rpmsign(t, path, "--resign")
			rpmkeysOK(t, db, read(t, path))
			_, err := open(t, read(t, path)).Verify(ed().cert, true)
			if err == nil {
				t.Error("our signature is still there")
			}
			b := sign(t, read(t, path), ed(), rpm.Options{Payload: true})
			rpmkeysOK(t, db, b)
			_, err = open(t, b).Verify(ed().cert, true)
			if err != nil {
				t.Errorf("Verify: %v", err)
			}
			path = file(t, "x.rpm", b)
			rpmsign(t, path, "--delsign")
			rpmkeysUnsigned(t, db, read(t, path))
			sigs, err := open(t, read(t, path)).Signatures()
			if err != nil || len(sigs) != 0 {
				t.Errorf("%d signatures after --delsign: %v", len(sigs), err)
			}
			rpmkeysOK(t, db, sign(t, read(t, path), ed(), rpm.Options{}))
		})
	}
}

// go-rpmutils verifies our signatures and reads the payload. It is run from a module of its own.
func TestGoRPMUtils(t *testing.T) {
	tool := filepath.Join(t.TempDir(), "rpmutils")
	build := exec.CommandContext(t.Context(), peer(t, "go"), "build", "-o", tool, ".")
	build.Dir = "testdata/rpmutils"
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly", "GOWORK=off")
	out, err := build.CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	var armored bytes.Buffer
	err = rsa2048().cert.Armor(&armored)
	if err != nil {
		t.Fatal(err)
	}
	args := []string{file(t, "cert.asc", armored.Bytes())}
	all := corpus(t)
	delete(all, "rpm3") // its payload is no archive
	for _, name := range slices.Sorted(maps.Keys(all)) {
		args = append(args, file(t, "x.rpm", sign(t, all[name], rsa2048(), rpm.Options{})))
	}
	got, err := exec.CommandContext(t.Context(), tool, args...).CombinedOutput()
	if err != nil || bytes.Count(got, []byte("\n")) != len(all) {
		t.Errorf("rpmutils: %v\n%s", err, got)
	}
}

// rpm 4.18 takes no ECDSA: gpg verifies the signature on the bytes that it is over.
func TestGPGVerifies(t *testing.T) {
	env := gpgHome(t)
	var armored bytes.Buffer
	err := p256().cert.Armor(&armored)
	if err != nil {
		t.Fatal(err)
	}
	out, err := run(t, env, "gpg", "--batch", "--import", file(t, "cert.asc", armored.Bytes()))
	if err != nil {
		t.Fatalf("gpg: %v\n%s", err, out)
	}
	b := sign(t, demo(t), p256(), rpm.Options{Payload: true, OpenPGP: true})
	p := open(t, b)
	sigs, err := p.Signatures()
	if err != nil {
		t.Fatal(err)
	}
	_, rest := sigTags(t, b)
	var tags []int
	for _, s := range sigs {
		tags = append(tags, s.Tag)
		message := p.Header.Bytes()
		if s.Payload {
			message = rest
		}
		out, err := run(t, env, "gpg", "--batch", "--verify", file(t, "sig", s.Packet), file(t, "message", message))
		if err != nil || !strings.Contains(out, "Good signature") {
			t.Errorf("gpg on tag %d: %v\n%s", s.Tag, err, out)
		}
	}
	if want := []int{267, 278, 1005}; !slices.Equal(tags, want) {
		t.Errorf("got tags %v, want %v", tags, want)
	}
	got, err := p.Verify(p256().cert, true)
	if err != nil || len(got) != 2 {
		t.Errorf("Verify: %v, %d signatures", err, len(got))
	}
}

// evmctl verifies the signatures of the files, and makes the same ones; rpm reads them.
func TestFileSignatures(t *testing.T) {
	s := rsa2048()
	key := s.signer.(*rsa.PrivateKey)
	before := sign(t, demo(t), ed(), rpm.Options{})
	counting := &countingSigner{Signer: s.signer}
	signing, err := rpm.Prepare(open(t, before), s.key, rpm.Options{Files: &key.PublicKey})
	if err != nil {
		t.Fatal(err)
	}
	u, err := signing.Sign(counting, counting)
	if err != nil {
		t.Fatal(err)
	}
	b := apply(t, u, before)
	if counting.asked != 1+2 { // the contents "one" and the long one
		t.Errorf("the signer was asked %d times", counting.asked)
	}
	rpmkeysOK(t, rpmDB(t, s), b)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	private := file(t, "key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	public := file(t, "cert.der", der) // evmctl takes no bare public key

	pkg := file(t, "x.rpm", b)
	list := strings.Split(strings.TrimSpace(must(t, "rpm", "-qp", "--nosignature", "--qf", "[%{FILENAMES}|%{FILESIGNATURES}|\n]", pkg)), "\n")
	if len(list) != 7 {
		t.Fatalf("rpm lists %d files: %q", len(list), list)
	}
	if got := must(t, "rpm", "-qp", "--nosignature", "--qf", "%{FILESIGNATURELENGTH}", pkg); got != itoa(9+key.Size()) {
		t.Errorf("FILESIGNATURELENGTH is %s", got)
	}
	own, err := open(t, b).FileSignatures()
	if err != nil {
		t.Fatal(err)
	}
	var long strings.Builder
	for i := range 100000 {
		long.WriteString(itoa(i+1) + "\n")
	}
	contents := map[string]string{
		"/opt/demo/one": "one\n", "/opt/demo/same": "one\n", "/opt/demo/hard": "one\n", "/opt/demo/long": long.String(),
	}
	verified := 0
	for i, line := range list {
		f := strings.Split(line, "|")
		if got := hex.EncodeToString(own[i]); got != f[1] {
			t.Errorf("%s: FileSignatures has %q, rpm %q", f[0], got, f[1])
		}
		content, ok := contents[f[0]]
		if !ok {
			if f[1] != "" {
				t.Errorf("%s has a signature", f[0])
			}
			continue
		}
		sig, err := hex.DecodeString(f[1])
		if err != nil {
			t.Fatal(err)
		}
		path := file(t, "f", []byte(content))
		err = os.WriteFile(path+".sig", sig, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		out, err := run(t, nil, "evmctl", "ima_verify", "--sigfile", "--key", public, path)
		if err != nil {
			t.Errorf("evmctl: %s: %v\n%s", f[0], err, out)
		}
		out, err = run(t, nil, "evmctl", "ima_sign", "--hashalgo", "sha256", "--sigfile", "--key", private, path)
		if err != nil || !bytes.Equal(read(t, path+".sig"), sig) {
			t.Errorf("%s: evmctl makes another signature: %v\n%s", f[0], err, out)
		}
		verified++
	}
	if verified != len(contents) {
		t.Errorf("%d files verified, want %d", verified, len(contents))
	}
	// A new signature over the package leaves them, DeleteSignatures takes them if told.
	for _, tt := range []struct {
		name string
		b    []byte
		want bool
	}{
		{"signed again", sign(t, b, ed(), rpm.Options{}), true},
		{"deleted", remove(t, b, false), true},
		{"all deleted", remove(t, b, true), false},
	} {
		got, err := open(t, tt.b).FileSignatures()
		if err != nil || (got != nil) != tt.want {
			t.Errorf("%s: %d file signatures, %v", tt.name, len(got), err)
		}
	}
	if !bytes.Equal(remove(t, b, true), demo(t)) {
		t.Error("all deleted, the package is not what it was")
	}
}

// A signer of files that lies is found out.
func TestLyingFileSigner(t *testing.T) {
	s := rsa2048()
	pub := s.signer.Public().(*rsa.PublicKey)
	signing, err := rpm.Prepare(open(t, demo(t)), s.key, rpm.Options{Files: pub})
	if err != nil {
		t.Fatal(err)
	}
	u, err := signing.Sign(s.signer, &countingSigner{Signer: s.signer, lie: true})
	wantError(t, err, rpm.ErrSignerOutput)
	if u != nil {
		t.Error("an Update came with the error")
	}
	for _, r := range signing.Requests()[1:] {
		if r.File < 0 || r.Message() != nil || r.Opts.HashFunc() != crypto.SHA256 || len(r.Digest) != sha256.Size {
			t.Errorf("request %+v", r)
		}
	}
}
