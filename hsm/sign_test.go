package hsm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	_ "crypto/sha1"
	"crypto/sha256"
	_ "crypto/sha512"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/signwarden/signwarden/hsm"
)

var (
	d256 = sum(crypto.SHA256)
	d512 = sum(crypto.SHA512)
)

func sum(h crypto.Hash) []byte {
	w := h.New()
	w.Write([]byte("a package"))
	return w.Sum(nil)
}

func pss(h crypto.Hash, salt int) *rsa.PSSOptions { return &rsa.PSSOptions{Hash: h, SaltLength: salt} }

func TestSignVerifies(t *testing.T) {
	p := openPool(t, newToken(t))
	for _, k := range []struct {
		algorithm string
		signs     map[string]crypto.SignerOpts
		digests   map[string][]byte
	}{
		{"rsa2048", map[string]crypto.SignerOpts{
			"pkcs1 sha1": crypto.SHA1, "pkcs1 sha256": crypto.SHA256, "pkcs1 sha384": crypto.SHA384, "pkcs1 sha512": crypto.SHA512,
			"pss sha256 hash": pss(crypto.SHA256, rsa.PSSSaltLengthEqualsHash), "pss sha512 auto": pss(crypto.SHA512, rsa.PSSSaltLengthAuto),
			"pss sha256 20": pss(crypto.SHA256, 20), "pss sha384 most": pss(crypto.SHA384, 256-2-48),
		}, nil},
		{"rsa3072", map[string]crypto.SignerOpts{"pkcs1 sha256": crypto.SHA256, "pss sha256": pss(crypto.SHA256, rsa.PSSSaltLengthAuto)}, nil},
		{"rsa4096", map[string]crypto.SignerOpts{"pkcs1 sha512": crypto.SHA512, "pss sha512": pss(crypto.SHA512, rsa.PSSSaltLengthEqualsHash)}, nil},
		// SHA-512 is longer than P-256's order and P-384's.
		{"p256", map[string]crypto.SignerOpts{"sha1": crypto.SHA1, "sha256": crypto.SHA256, "sha512": crypto.SHA512, "no hash": crypto.Hash(0)}, nil},
		{"p384", map[string]crypto.SignerOpts{"sha256": crypto.SHA256, "sha384": crypto.SHA384, "sha512": crypto.SHA512}, nil},
		{"ed25519", map[string]crypto.SignerOpts{"sha256": crypto.SHA256, "sha512": crypto.SHA512, "no hash": crypto.Hash(0), "options": &ed25519.Options{}}, nil},
	} {
		t.Run(k.algorithm, func(t *testing.T) {
			made := generate(t, p, k.algorithm, k.algorithm)
			pub, err := p.PublicKey(t.Context(), []byte(k.algorithm))
			if err != nil {
				t.Fatal(err)
			}
			if eq, ok := pub.(interface{ Equal(crypto.PublicKey) bool }); !ok || !eq.Equal(made) {
				t.Errorf("PublicKey = %v, Generate said %v", pub, made)
			}
			for name, opts := range k.signs {
				t.Run(name, func(t *testing.T) {
					digest := d256
					if h := opts.HashFunc(); h != 0 {
						digest = sum(h)
					}
					sig, err := p.Sign(t.Context(), []byte(k.algorithm), digest, opts)
					if err != nil {
						t.Fatal(err)
					}
					if err := check(pub, digest, sig, opts); err != nil {
						t.Error(err)
					}
				})
			}
		})
	}
}

func TestSignRefuses(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	for _, a := range []string{"rsa2048", "p256", "ed25519"} {
		generate(t, p, a, a)
		if _, err := p.Sign(t.Context(), []byte(a), d256, crypto.SHA256); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name, key string
		digest    []byte
		opts      crypto.SignerOpts
	}{
		{"no options", "rsa2048", d256, nil},
		{"raw RSA", "rsa2048", d256, crypto.Hash(0)},
		{"PSS without hash", "rsa2048", d256, pss(0, 20)},
		{"short digest", "rsa2048", d256[:31], crypto.SHA256},
		{"other hash's digest", "rsa2048", d256, crypto.SHA512},
		{"hash not offered", "rsa2048", d256[:16], crypto.MD5},
		{"MD5SHA1, which has no DigestInfo", "rsa2048", d512[:36], crypto.MD5SHA1},
		{"salt too long", "rsa2048", d256, pss(crypto.SHA256, 256-2-32+1)},
		{"salt negative", "rsa2048", d256, pss(crypto.SHA256, -2)},
		{"PSS with ECDSA", "p256", d256, pss(crypto.SHA256, -1)},
		{"ECDSA other length", "p256", d256, crypto.SHA384},
		{"ECDSA tiny", "p256", d256[:19], crypto.Hash(0)},
		{"ECDSA huge", "p256", append(d512, 0), crypto.Hash(0)},
		{"ECDSA with Ed25519 options", "p256", d256, &ed25519.Options{}},
		{"empty", "ed25519", nil, crypto.Hash(0)},
		{"Ed25519ph", "ed25519", d512, &ed25519.Options{Hash: crypto.SHA512}},
		{"Ed25519ctx", "ed25519", d512, &ed25519.Options{Context: "x"}},
		{"PSS with Ed25519", "ed25519", d256, pss(crypto.SHA256, -1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.arm(nil)
			sig, err := p.Sign(t.Context(), []byte(c.key), c.digest, c.opts)
			e, ok := errors.AsType[*hsm.Error](err)
			if !ok || !e.Refused() || sig != nil {
				t.Errorf("got %x, %v; want an Error that is Refused", sig, err)
			}
			if n := f.count("C_SignInit"); n != 0 {
				t.Errorf("the token was asked %d times", n)
			}
		})
	}
	if _, err := p.Sign(t.Context(), []byte("nobody"), d256, crypto.SHA256); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("unknown key: got %v, want ErrNotFound", err)
	}
	if _, err := p.PublicKey(t.Context(), []byte("nobody")); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("unknown public key: got %v, want ErrNotFound", err)
	}
}

// The hot path asks the token for nothing but the signature.
func TestHotPathFindsNothing(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	generate(t, p, "k", "p256")
	for range 2 { // both sessions, at most one search
		if _, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256); err != nil {
			t.Fatal(err)
		}
	}
	f.arm(nil)
	const n = 200
	for range n {
		if _, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]int{"C_SignInit": n, "C_Sign": n}
	for call, got := range f.counts {
		if got != want[call] {
			t.Errorf("%s: %d calls, want %d", call, got, want[call])
		}
	}
}

// SoftHSM cuts a long digest itself; other tokens refuse it.
func TestLongDigestIsCut(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	for algorithm, want := range map[string]int{"p256": 32, "p384": 48, "ed25519": 64} {
		generate(t, p, algorithm, algorithm)
		if _, err := p.Sign(t.Context(), []byte(algorithm), d512, crypto.SHA512); err != nil {
			t.Fatal(err)
		}
		if f.signed != want {
			t.Errorf("%s: the token got %d bytes, want %d", algorithm, f.signed, want)
		}
	}
}

func TestConcurrent(t *testing.T) {
	for _, sessions := range []int{1, 2, 8} {
		c := newToken(t)
		c.Sessions = sessions
		p := openPool(t, c)
		algorithms := []string{"p256", "ed25519", "rsa2048"}
		pubs := map[string]crypto.PublicKey{}
		for _, a := range algorithms {
			pubs[a] = generate(t, p, a, a)
		}
		var wg sync.WaitGroup
		for g := range 64 {
			wg.Go(func() {
				for i := range 30 {
					a := algorithms[(g+i)%len(algorithms)]
					digest := sha256.Sum256([]byte{byte(g), byte(i)})
					sig, err := p.Sign(t.Context(), []byte(a), digest[:], crypto.SHA256)
					if err == nil {
						err = check(pubs[a], digest[:], sig, crypto.SHA256)
					}
					if err != nil {
						t.Errorf("%s: %v", a, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
}

func TestNormaliseRSA(t *testing.T) {
	got, err := hsm.NormaliseRSA(4, []byte{7, 8})
	if want := []byte{0, 0, 7, 8}; err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %x, %v; want %x", got, err, want)
	}
	for _, bad := range [][]byte{nil, {1, 2, 3, 4, 5}} {
		if got, err := hsm.NormaliseRSA(4, bad); err == nil {
			t.Errorf("%x: got %x, want an error", bad, got)
		}
	}
}

func TestParsePoint(t *testing.T) {
	ed := bytes.Repeat([]byte{9}, 32)
	for _, c := range []struct {
		name, algorithm string
		point           []byte
		ok              bool
	}{
		{"Ed25519 bare", "ed25519", ed, true},
		{"Ed25519 in DER", "ed25519", append([]byte{4, 32}, ed...), true},
		{"Ed25519 with a tail", "ed25519", append([]byte{4, 32}, append(ed, 0)...), false},
		{"Ed25519 short", "ed25519", ed[:31], false},
		{"P-256 not on the curve", "p256", append([]byte{4}, make([]byte, 64)...), false},
		{"P-256 compressed", "p256", append([]byte{4, 33, 2}, ed...), false},
		{"empty", "p384", nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			pub, err := hsm.ParsePoint(c.algorithm, c.point)
			if (err == nil) != c.ok {
				t.Errorf("got %v, %v; want ok = %v", pub, err, c.ok)
			}
		})
	}
	for _, c := range []struct{ n, e []byte }{
		{bytes.Repeat([]byte{255}, 64), []byte{1, 0, 1}},
		{bytes.Repeat([]byte{255}, 256), []byte{2}},
		{bytes.Repeat([]byte{255}, 256), []byte{1}},
		{bytes.Repeat([]byte{255}, 256), []byte{255, 255, 255, 255, 255}},
		{nil, nil},
	} {
		if pub, err := hsm.ParseRSA(c.n, c.e); err == nil || !strings.Contains(err.Error(), "RSA") {
			t.Errorf("n of %d bytes, e %x: got %v, %v", len(c.n), c.e, pub, err)
		}
	}
}

func FuzzParsePoint(f *testing.F) {
	f.Add("p256", append([]byte{4, 65, 4}, make([]byte, 64)...))
	f.Add("ed25519", append([]byte{4, 32}, make([]byte, 32)...))
	f.Add("p384", []byte{4, 0x82, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, algorithm string, point []byte) {
		if algorithm != "p256" && algorithm != "p384" {
			algorithm = "ed25519"
		}
		pub, err := hsm.ParsePoint(algorithm, point)
		if (pub == nil) == (err == nil) {
			t.Fatalf("got %v, %v", pub, err)
		}
		k, ok := pub.(*ecdsa.PublicKey)
		if !ok {
			return
		}
		bare, err := k.Bytes()
		if err != nil || !bytes.HasSuffix(point, bare) {
			t.Errorf("%x became %x, %v", point, bare, err)
		}
	})
}
