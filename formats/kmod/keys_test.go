package kmod_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// A subject is a key with its self-signed certificate. The signer counts.
type subject struct {
	name string
	cert *x509.Certificate
	*counter
	certFile, keyFile string
}

// counter counts what reaches a key, and can be made to answer otherwise.
type counter struct {
	crypto.Signer
	calls  int
	change func([]byte) ([]byte, error)
}

func (c *counter) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	c.calls++
	sig, err := c.Signer.Sign(rand, digest, opts)
	if err == nil && c.change != nil {
		return c.change(sig)
	}
	return sig, err
}

var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
})

func newSubject(t testing.TB, name string) subject {
	t.Helper()
	var k crypto.Signer = rsaKey()
	if name == "p256" {
		var err error
		k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{Organization: []string{"Test"}, CommonName: "module key " + name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		SubjectKeyId: []byte(name + " key id"),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return subject{name, cert, &counter{Signer: k},
		file(t, "cert.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		file(t, "key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))}
}

func file(t testing.TB, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	err := os.WriteFile(path, data, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// run runs a tool of the other side and returns its output. Its absence fails the test: these tests are worth nothing
// without it.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("required peer: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out.String())
	}
	return out.String()
}

// signFile runs the kernel's sign-file, and returns what it makes of a module.
func signFile(t testing.TB, s subject, hash string, module []byte, flags ...string) []byte {
	t.Helper()
	var found []string
	for _, dir := range []string{"linux-kbuild-*", "../src/kernels/*", "../src/linux-headers-*"} { // Debian, Fedora, Ubuntu
		more, err := filepath.Glob("/usr/lib/" + dir + "/scripts/sign-file")
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, more...)
	}
	if len(found) == 0 {
		t.Fatal("required peer: no scripts/sign-file of the kernel (Debian: linux-kbuild-6.1)")
	}
	path := file(t, "module.ko", module)
	run(t, found[0], append(flags, hash, s.keyFile, s.certFile, path)...)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// newELF makes a module of the least that modinfo reads: a relocatable file with .modinfo, and padding so that it has
// a size of interest.
func newELF(pad int) []byte {
	info := "license=GPL\x00description=a test\x00name=test\x00vermagic=6.1.0 SMP\x00"
	names := "\x00.modinfo\x00.shstrtab\x00.data\x00"
	le := binary.LittleEndian
	b := make([]byte, 64)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 1)  // ET_REL
	le.PutUint16(b[18:], 62) // EM_X86_64
	le.PutUint32(b[20:], 1)
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[58:], 64)
	le.PutUint16(b[60:], 4)
	le.PutUint16(b[62:], 2)
	type section struct{ name, typ, off, size int }
	sections := []section{{}, {1, 1, len(b), len(info)}, {10, 3, len(b) + len(info), len(names)}}
	b = append(append(b, info...), names...)
	sections = append(sections, section{20, 1, len(b), pad})
	for i := range pad {
		b = append(b, byte(i*i>>12)&0xf0|byte(i>>8)&0xf) // neither constant nor random
	}
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	le.PutUint64(b[40:], uint64(len(b)))
	for _, s := range sections {
		h := make([]byte, 64)
		le.PutUint32(h, uint32(s.name))
		le.PutUint32(h[4:], uint32(s.typ))
		le.PutUint64(h[24:], uint64(s.off))
		le.PutUint64(h[32:], uint64(s.size))
		if s.typ != 0 {
			le.PutUint64(h[48:], 1)
		}
		b = append(b, h...)
	}
	return b
}
