package pe_test

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
	"fmt"
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
	var k crypto.Signer
	var err error
	switch name {
	case "rsa":
		k = rsaKey()
	case "other":
		k, err = rsa.GenerateKey(rand.Reader, 2048)
	default:
		k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{Organization: []string{"Test"}, CommonName: "EFI key " + name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		SubjectKeyId: []byte(name + " key id"),
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}, // osslsigncode insists
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

// try runs a tool of the other side and returns its output. Its absence fails the test: these tests are worth nothing
// without it.
func try(t testing.TB, name string, args ...string) (string, error) {
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
	return out.String(), err
}

// run runs a tool that must succeed.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := try(t, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A shape is an image that the test makes.
type shape struct {
	pe32     bool
	sections []int // their sizes on disk
	order    []int // of the sections in the table; nil: as they lie in the file
	tail     int   // bytes behind the last section, as debug symbols have it
	gap      int   // between the first two sections, which may overlap by it
}

// newPE makes an image of the least that the tools read.
func newPE(o shape) []byte {
	le := binary.LittleEndian
	const at, headers = 0x80, 0x400
	opt, directories := 240, 112
	if o.pe32 {
		opt, directories = 224, 96
	}
	b := make([]byte, headers)
	copy(b, "MZ")
	le.PutUint32(b[60:], at)
	copy(b[at:], "PE\x00\x00")
	le.PutUint16(b[at+4:], 0x8664)
	le.PutUint16(b[at+6:], uint16(len(o.sections)))
	le.PutUint16(b[at+20:], uint16(opt))
	le.PutUint16(b[at+22:], 0x0206)
	h := b[at+24:]
	le.PutUint16(h, 0x20b)
	if o.pe32 {
		le.PutUint16(h, 0x10b)
		le.PutUint16(b[at+4:], 0x14c)
	}
	le.PutUint32(h[16:], 0x1000) // entry point
	le.PutUint32(h[32:], 0x1000)
	le.PutUint32(h[36:], 0x200)
	le.PutUint32(h[56:], uint32(0x1000*(1+len(o.sections))))
	le.PutUint32(h[60:], headers)
	le.PutUint16(h[68:], 10) // EFI application
	le.PutUint32(h[directories-4:], 16)
	for i, size := range o.sections {
		if i == 1 {
			b = append(b, make([]byte, max(0, o.gap))...)
		}
		table := b[at+24+opt:]
		slot := i
		if o.order != nil {
			slot = o.order[i]
		}
		s := table[40*slot:]
		copy(s, fmt.Sprintf(".s%d", i))
		le.PutUint32(s[8:], uint32(size))
		le.PutUint32(s[12:], uint32(0x1000*(i+1)))
		le.PutUint32(s[16:], uint32(size))
		if size > 0 {
			le.PutUint32(s[20:], uint32(len(b)+min(0, o.gap*min(i, 1))))
		}
		le.PutUint32(s[36:], 0x60000020)
		for k := range size {
			b = append(b, byte(k*(i+3)>>3))
		}
	}
	for k := range o.tail {
		b = append(b, byte(k+1))
	}
	return b
}

// shapes are those that can be signed.
var shapes = map[string]shape{
	"plain":        {sections: []int{0x200, 0x400}},
	"PE32":         {sections: []int{0x200, 0x400}, pe32: true},
	"out of order": {sections: []int{0x200, 0x400, 0x200}, order: []int{2, 0, 1}},
	"bss":          {sections: []int{0x200, 0, 0x200}},
	"tail":         {sections: []int{0x200}, tail: 0x48},
	"unpadded":     {sections: []int{0x200}, tail: 0x45},
	"odd section":  {sections: []int{0x200, 0x123}},
}
