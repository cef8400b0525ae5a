package openpgp_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/signwarden/signwarden/formats/openpgp"
)

// detach signs and fails the test on an error.
func detach(t testing.TB, s subject, message []byte, o openpgp.SignOptions) []byte {
	t.Helper()
	var sig bytes.Buffer
	err := openpgp.DetachSign(&sig, bytes.NewReader(message), s.key, s.signer, o)
	if err != nil {
		t.Fatalf("DetachSign: %v", err)
	}
	return sig.Bytes()
}

// gpgVerify asserts that gpg finds the signature good, by that very key and hash.
func gpgVerify(t testing.TB, g gpg, s subject, hash crypto.Hash, args ...string) {
	t.Helper()
	status, errOut, err := g.run(nil, append([]string{"--status-fd", "1", "--verify"}, args...)...)
	if err != nil {
		t.Fatalf("gpg --verify: %v\n%s%s", err, status, errOut)
	}
	id := map[crypto.Hash]int{crypto.SHA256: 8, crypto.SHA384: 9, crypto.SHA512: 10}[hash]
	var fields []string
	for line := range strings.Lines(status) {
		if strings.HasPrefix(line, "[GNUPG:] VALIDSIG ") {
			fields = strings.Fields(line)
		}
	}
	if len(fields) < 12 || fields[2] != s.key.Fingerprint.String() || fields[9] != fmt.Sprint(id) {
		t.Errorf("gpg verified %q, want key %s and hash %d", fields, s.key.Fingerprint, id)
	}
}

// sqVerify asserts what sq makes of a message.
func sqVerify(t testing.TB, s subject, args ...string) {
	t.Helper()
	cert := file(t, "cert.pgp", s.cert)
	args = append([]string{"verify", "--signer-cert", cert}, args...)
	out, errOut, err := run(t, nil, nil, "sq", args...)
	if err != nil || !strings.Contains(errOut, "1 good signature") {
		t.Fatalf("sq verify: %v\n%s%s", err, out, errOut)
	}
}

func TestDetachSign(t *testing.T) {
	message := []byte("a binary\r\nmessage\x00 with - all sorts \xff of bytes \n\n")
	eachSubject(t, func(t *testing.T, s subject) {
		g := newGPG(t)
		g.must(s.cert, "--import")
		path := file(t, "message", message)
		for _, armored := range []bool{false, true} {
			for _, hash := range []crypto.Hash{0, crypto.SHA256, crypto.SHA384, crypto.SHA512} {
				if hash == crypto.SHA256 && s.name == "p384" {
					continue
				}
				sig := detach(t, s, message, openpgp.SignOptions{Hash: hash, Armor: armored})
				want := hash
				if want == 0 {
					want = s.hash
				}
				sigPath := file(t, "message.sig", sig)
				gpgVerify(t, g, s, want, sigPath, path)
				sqVerify(t, s, "--detached", sigPath, path)
				info, err := openpgp.VerifyDetached(s.parsed(t), bytes.NewReader(message), bytes.NewReader(sig))
				if err != nil {
					t.Fatalf("VerifyDetached: %v", err)
				}
				if info.Signer != s.key.Fingerprint || info.Primary != s.parsed(t).Fingerprint() || info.Hash != want {
					t.Errorf("VerifyDetached: got %+v", info)
				}
				packets, _ := g.must(sig, "--list-packets", "--verbose")
				noCriticalNoSHA1(t, packets)
			}
		}
	})
}

func TestTamper(t *testing.T) {
	message := []byte("a message that will be changed\n")
	eachSubject(t, func(t *testing.T, s subject) {
		g := newGPG(t)
		g.must(s.cert, "--import")
		sigPath := file(t, "message.sig", detach(t, s, message, openpgp.SignOptions{}))
		changed := bytes.Replace(message, []byte("will"), []byte("wiII"), 1)
		status, _, err := g.run(nil, "--status-fd", "1", "--verify", sigPath, file(t, "changed", changed))
		if err == nil || !strings.Contains(status, "BADSIG") {
			t.Errorf("gpg of a changed message: %v\n%s", err, status)
		}
		sig := detach(t, s, message, openpgp.SignOptions{})
		_, err = openpgp.VerifyDetached(s.parsed(t), bytes.NewReader(changed), bytes.NewReader(sig))
		if !errors.Is(err, openpgp.ErrBadSignature) {
			t.Errorf("VerifyDetached of a changed message: got %v, want ErrBadSignature", err)
		}
	})
}

// repeat gives line again and again.
type repeat struct {
	line []byte
	left int64
	off  int
}

func (r *repeat) Read(p []byte) (int, error) {
	if r.left <= 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(int64(len(p)), r.left)], r.line[r.off:])
	r.off = (r.off + n) % len(r.line)
	r.left -= int64(n)
	return n, nil
}

func TestDetachSignConstantMemory(t *testing.T) {
	s := newSubject(t, ed, true)
	const size = 1 << 30
	message := func() io.Reader { return &repeat{line: make([]byte, 1<<16), left: size} }
	var sig bytes.Buffer
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	err := openpgp.DetachSign(&sig, message(), s.key, s.signer, openpgp.SignOptions{})
	runtime.ReadMemStats(&after)
	if err != nil {
		t.Fatal(err)
	}
	if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
		t.Errorf("allocated %d bytes to sign %d", got, size)
	}
	info, err := openpgp.VerifyDetached(s.parsed(t), message(), &sig)
	if err != nil || info.Signer != s.key.Fingerprint {
		t.Errorf("VerifyDetached: %+v, %v", info, err)
	}
}

// A countingSigner notes what it was asked.
type countingSigner struct {
	crypto.Signer
	calls  int
	digest []byte
	opts   crypto.SignerOpts
	raw    [][]byte
}

func (c *countingSigner) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	c.calls++
	c.digest, c.opts = bytes.Clone(digest), opts
	raw, err := c.Signer.Sign(r, digest, opts)
	c.raw = append(c.raw, raw)
	return raw, err
}

func TestSignerIsAsked(t *testing.T) {
	eachSubject(t, func(t *testing.T, s subject) {
		for _, hash := range []crypto.Hash{crypto.SHA384, crypto.SHA512} {
			c := &countingSigner{Signer: s.signer}
			err := openpgp.DetachSign(io.Discard, strings.NewReader("x"), s.key, c, openpgp.SignOptions{Hash: hash})
			if err != nil {
				t.Fatal(err)
			}
			if c.calls != 1 || len(c.digest) != hash.Size() {
				t.Errorf("%d calls, digest of %d bytes, want 1 and %d", c.calls, len(c.digest), hash.Size())
			}
			want := hash
			if s.algo == 22 {
				want = 0
			}
			d, ok := c.opts.(interface{ DigestHash() crypto.Hash })
			if c.opts.HashFunc() != want || !ok || d.DigestHash() != hash {
				t.Errorf("opts %+v, want HashFunc %v and DigestHash %v", c.opts, want, hash)
			}
		}
	})
}

// A brokenSigner has the right public key, and answers as it is told.
type brokenSigner struct {
	crypto.Signer
	answer func(raw []byte) ([]byte, error)
}

func (b brokenSigner) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	raw, err := b.Signer.Sign(r, digest, opts)
	if err != nil {
		return nil, err
	}
	return b.answer(raw)
}

var errToken = errors.New("token: CKR_DEVICE_ERROR")

// faults are the ways a signer fails, and what must come of it.
var faults = []struct {
	name   string
	answer func(raw []byte) ([]byte, error)
	want   error
}{
	{"error", func([]byte) ([]byte, error) { return nil, errToken }, errToken},
	{"error and signature", func(raw []byte) ([]byte, error) { return raw, errToken }, errToken},
	{"nothing", func([]byte) ([]byte, error) { return nil, nil }, openpgp.ErrSignerOutput},
	{"bit", func(raw []byte) ([]byte, error) { raw[len(raw)-1] ^= 1; return raw, nil }, openpgp.ErrSignerOutput},
	{"cut", func(raw []byte) ([]byte, error) { return raw[:len(raw)-1], nil }, openpgp.ErrSignerOutput},
	{"longer", func(raw []byte) ([]byte, error) { return append(raw, 0), nil }, openpgp.ErrSignerOutput},
	{"zeros", func(raw []byte) ([]byte, error) { return make([]byte, len(raw)), nil }, openpgp.ErrSignerOutput},
	{"huge", func(raw []byte) ([]byte, error) { return make([]byte, 1<<20), nil }, openpgp.ErrSignerOutput},
}

func TestFaultySigner(t *testing.T) {
	for _, k := range []keyKind{rsa2048, p256, p384, ed} {
		s := newSubject(t, k, true)
		for _, f := range faults {
			t.Run(k.name+"/"+f.name, func(t *testing.T) {
				signer := brokenSigner{s.signer, f.answer}
				var out bytes.Buffer
				for name, sign := range map[string]func() error{
					"DetachSign": func() error {
						return openpgp.DetachSign(&out, strings.NewReader("x"), s.key, signer, openpgp.SignOptions{})
					},
					"armored": func() error {
						return openpgp.DetachSign(&out, strings.NewReader("x"), s.key, signer, openpgp.SignOptions{Armor: true})
					},
					"ClearSign": func() error {
						return openpgp.ClearSign(&out, strings.NewReader("x"), s.key, signer, openpgp.SignOptions{})
					},
					"NewCertificate": func() error {
						spec := openpgp.CertificateSpec{UserID: userID, Created: created, Primary: signer}
						cert, err := openpgp.NewCertificate(spec)
						out.Write(cert)
						return err
					},
					"NewCertificate subkey": func() error {
						spec := openpgp.CertificateSpec{UserID: userID, Created: created, Primary: k.subkey(), Subkey: signer}
						cert, err := openpgp.NewCertificate(spec)
						out.Write(cert)
						return err
					},
				} {
					err := sign()
					if !errors.Is(err, f.want) {
						t.Errorf("%s: got %v, want %v", name, err, f.want)
					}
					if out.Len() != 0 {
						t.Errorf("%s wrote %d bytes", name, out.Len())
					}
				}
			})
		}
	}
}

// PKCS #11 gives ECDSA signatures as r ‖ s; crypto.Signer demands DER, and a bridge that forgets is found out.
func TestRawECDSARefused(t *testing.T) {
	s := newSubject(t, p256, true)
	signer := brokenSigner{s.signer, func(der []byte) ([]byte, error) {
		parts := ecdsaParts(der)
		return append(parts[0], parts[1]...), nil
	}}
	err := openpgp.DetachSign(io.Discard, strings.NewReader("x"), s.key, signer, openpgp.SignOptions{})
	if !errors.Is(err, openpgp.ErrSignerOutput) {
		t.Errorf("got %v, want ErrSignerOutput", err)
	}
}

func TestSignRefuses(t *testing.T) {
	s384, sEd, sRSA := newSubject(t, p384, true), newSubject(t, ed, true), newSubject(t, rsa2048, true)
	tests := []struct {
		name string
		s    subject
		key  openpgp.Key
		o    openpgp.SignOptions
		want error
	}{
		{"sha1", sRSA, sRSA.key, openpgp.SignOptions{Hash: crypto.SHA1}, openpgp.ErrUnsupported},
		{"sha224", sRSA, sRSA.key, openpgp.SignOptions{Hash: crypto.SHA224}, openpgp.ErrUnsupported},
		{"md5", sEd, sEd.key, openpgp.SignOptions{Hash: crypto.MD5}, openpgp.ErrUnsupported},
		{"sha3", sEd, sEd.key, openpgp.SignOptions{Hash: crypto.SHA3_256}, openpgp.ErrUnsupported},
		{"short for p384", s384, s384.key, openpgp.SignOptions{Hash: crypto.SHA256}, openpgp.ErrUnsupported},
		{"no key", sEd, openpgp.Key{}, openpgp.SignOptions{}, openpgp.ErrUnsupported},
		{"other key", sEd, sRSA.key, openpgp.SignOptions{}, openpgp.ErrKeyNotFound},
		{"before the key", sEd, sEd.key, openpgp.SignOptions{Time: created.Add(-time.Second)}, openpgp.ErrKeyUnusable},
		{"after 2106", sEd, sEd.key, openpgp.SignOptions{Time: time.Unix(1<<32, 0)}, openpgp.ErrMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			c := &countingSigner{Signer: tt.s.signer}
			err := openpgp.DetachSign(&out, strings.NewReader("x"), tt.key, c, tt.o)
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if c.calls != 0 || out.Len() != 0 {
				t.Errorf("asked the signer %d times, wrote %d bytes, want none", c.calls, out.Len())
			}
		})
	}
	// The key expires between the check and the signature: the signature's own time decides.
	expiring := sEd.key
	expiring.Expires = created.Add(time.Hour)
	_, err := openpgp.NewSignature(expiring, openpgp.SigBinary, openpgp.SignOptions{Time: expiring.Expires})
	if !errors.Is(err, openpgp.ErrKeyUnusable) {
		t.Errorf("at expiry: got %v, want ErrKeyUnusable", err)
	}
	_, err = openpgp.NewSignature(sEd.key, 0x13, openpgp.SignOptions{})
	if !errors.Is(err, openpgp.ErrUnsupported) {
		t.Errorf("certification type: got %v, want ErrUnsupported", err)
	}
}

// failAfter is a message whose source breaks.
type failAfter struct{ err error }

func (f failAfter) Read([]byte) (int, error) { return 0, f.err }

// rewound is a reader that says that it can be read again.
type rewound struct{ io.Reader }

func (rewound) Seek(int64, int) (int64, error) { return 0, nil }

func TestReaderError(t *testing.T) {
	s := newSubject(t, ed, true)
	cause := errors.New("disk: I/O error")
	for name, sign := range map[string]func(io.Writer, io.Reader, crypto.Signer) error{
		"DetachSign": func(w io.Writer, r io.Reader, c crypto.Signer) error {
			return openpgp.DetachSign(w, r, s.key, c, openpgp.SignOptions{})
		},
		"ClearSign": func(w io.Writer, r io.Reader, c crypto.Signer) error {
			return openpgp.ClearSign(w, rewound{r}, s.key, c, openpgp.SignOptions{})
		},
	} {
		var out bytes.Buffer
		c := &countingSigner{Signer: s.signer}
		r := io.MultiReader(strings.NewReader("half a li"), failAfter{cause})
		err := sign(&out, r, c)
		if !errors.Is(err, cause) || out.Len() != 0 || c.calls != 0 {
			t.Errorf("%s: got %v, %d bytes, %d calls, want %v and none", name, err, out.Len(), c.calls, cause)
		}
	}
}

// The two phases apart: hash here, sign there, assemble; the trailer is what a remote hasher needs besides.
func TestTwoPhases(t *testing.T) {
	s := newSubject(t, p256, false)
	at := time.Date(2025, 5, 6, 7, 8, 9, 999, time.UTC)
	sig, err := openpgp.NewSignature(s.key, openpgp.SigBinary, openpgp.SignOptions{Time: at})
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(sig, "a message")
	digest, err := sig.Digest()
	if err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256(append([]byte("a message"), sig.Trailer()...))
	if !bytes.Equal(digest, want[:]) {
		t.Errorf("digest: %s", cmp.Diff(digest, want[:]))
	}
	_, err = sig.Write([]byte("more"))
	if err == nil {
		t.Error("Write after Digest: no error")
	}
	raw, err := s.signer.Sign(rand.Reader, digest, sig.SignerOpts())
	if err != nil {
		t.Fatal(err)
	}
	_, err = sig.Assemble([]byte("wrong"))
	if !errors.Is(err, openpgp.ErrSignerOutput) {
		t.Errorf("Assemble of nonsense: got %v, want ErrSignerOutput", err)
	}
	pkt, err := sig.Assemble(raw) // still possible
	if err != nil {
		t.Fatal(err)
	}
	info, err := openpgp.VerifyDetached(s.parsed(t), strings.NewReader("a message"), bytes.NewReader(pkt))
	if err != nil || !info.Created.Equal(at.Truncate(time.Second)) {
		t.Errorf("VerifyDetached: %+v, %v", info, err)
	}
}

// signUntil signs with later and later times until the signer's answer has the property.
func signUntil(t *testing.T, s subject, message []byte, want func(raw []byte) bool) []byte {
	t.Helper()
	for i := range 20000 {
		c := &countingSigner{Signer: s.signer}
		var sig bytes.Buffer
		o := openpgp.SignOptions{Time: created.Add(time.Duration(i) * time.Second)}
		err := openpgp.DetachSign(&sig, bytes.NewReader(message), s.key, c, o)
		if err != nil {
			t.Fatalf("DetachSign: %v, of signature %x", err, c.raw)
		}
		if want(c.raw[0]) {
			return sig.Bytes()
		}
	}
	t.Fatal("no such signature in 20000")
	return nil
}

// Signatures whose numbers begin with zero octets: MPIs lose them, verifiers must put them back.
func TestLeadingZeros(t *testing.T) {
	message := []byte("leading zeros\n")
	short := func(i int) func(raw []byte) bool {
		return func(raw []byte) bool {
			return ecdsaParts(raw)[i][0] == 0
		}
	}
	tests := []struct {
		name string
		k    keyKind
		want func(raw []byte) bool
	}{
		{"rsa", rsa2048, func(raw []byte) bool { return raw[0] == 0 }},
		{"ed25519 R", ed, func(raw []byte) bool { return raw[0] == 0 }},
		{"ed25519 S", ed, func(raw []byte) bool { return raw[32] == 0 }}, // little-endian: the low octet
		{"ecdsa r", p256, short(0)},
		{"ecdsa s", p256, short(1)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSubject(t, tt.k, false)
			sig := file(t, "sig", signUntil(t, s, message, tt.want))
			g := newGPG(t)
			g.must(s.cert, "--import")
			path := file(t, "message", message)
			gpgVerify(t, g, s, s.hash, sig, path)
			sqVerify(t, s, "--detached", sig, path)
		})
	}
}

// ecdsaParts gives r and s of a P-256 signature at full width.
func ecdsaParts(raw []byte) [2][]byte {
	var sig struct{ R, S *big.Int }
	_, err := asn1.Unmarshal(raw, &sig)
	if err != nil {
		panic(err)
	}
	return [2][]byte{sig.R.FillBytes(make([]byte, 32)), sig.S.FillBytes(make([]byte, 32))}
}
