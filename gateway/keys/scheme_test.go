package keys_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"math/big"
	"slices"
	"testing"

	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
	mathrand "math/rand/v2"
)

func TestSchemeFor(t *testing.T) {
	can := map[keys.Algorithm][]keys.Scheme{ // the usual one first
		keys.RSA2048: {keys.PKCS1v15, keys.PSS}, keys.RSA3072: {keys.PKCS1v15, keys.PSS}, keys.RSA4096: {keys.PKCS1v15, keys.PSS},
		keys.P256: {keys.ECDSA}, keys.P384: {keys.ECDSA}, keys.Ed25519: {keys.EdDSA},
	}
	var all []keys.Scheme
	for _, s := range constants(t, "Scheme") {
		all = append(all, keys.Scheme(s))
	}
	all = append(all, "none", "RSA-PSS", "ecdsa ")
	for _, a := range append(slices.Clone(keys.Algorithms), "", "p521") {
		got, err := keys.SchemeFor(a, "")
		if len(can[a]) > 0 && (got != can[a][0] || err != nil) || len(can[a]) == 0 && !errors.Is(err, sigerr.Invalid) {
			t.Errorf("SchemeFor(%q, \"\") = %q, %v", a, got, err)
		}
		for _, s := range all {
			got, err := keys.SchemeFor(a, s)
			if ok := slices.Contains(can[a], s); ok && (got != s || err != nil) || !ok && (got != "" || !errors.Is(err, sigerr.Invalid)) {
				t.Errorf("SchemeFor(%q, %q) = %q, %v; want ok %v", a, s, got, err, ok)
			}
		}
	}
}

func TestHashes(t *testing.T) {
	for name, h := range keys.Hashes {
		if got := keys.HashName(h); got != name {
			t.Errorf("HashName(%v) = %q, want %q", h, got, name)
		}
		if h.Size() < 32 {
			t.Errorf("%s has %d bytes", name, h.Size())
		}
	}
	for _, h := range []crypto.Hash{0, crypto.MD5, crypto.SHA1, crypto.SHA224, crypto.MD5SHA1, crypto.SHA512_256, 99} {
		if got := keys.HashName(h); got != "" {
			t.Errorf("HashName(%d) = %q", h, got)
		}
	}
}

// sign makes a signature as it leaves a token.
func sign(t *testing.T, a keys.Algorithm, digest []byte, opts crypto.SignerOpts) []byte {
	t.Helper()
	pair := pairs()[a]
	sig, err := pair.Sign(rand.Reader, digest, opts)
	if err != nil {
		t.Fatal(err)
	}
	pub, ok := pair.Public().(*ecdsa.PublicKey)
	if !ok {
		return sig
	}
	var v struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(sig, &v); err != nil {
		t.Fatal(err)
	}
	n := (pub.Curve.Params().BitSize + 7) / 8
	return append(v.R.FillBytes(make([]byte, n)), v.S.FillBytes(make([]byte, n))...)
}

func digestOf(h crypto.Hash, text string) []byte {
	w := h.New()
	w.Write([]byte(text))
	return w.Sum(nil)
}

// Every algorithm, scheme and hash: what Options asks of a token verifies, and
// nothing that differs in one point does.
func TestVerify(t *testing.T) {
	schemes := []keys.Scheme{keys.PKCS1v15, keys.PSS, keys.ECDSA, keys.EdDSA}
	for _, a := range keys.Algorithms {
		pub := pairs()[a].Public()
		for _, s := range schemes {
			if _, err := keys.SchemeFor(a, s); err != nil {
				continue
			}
			for name, h := range keys.Hashes {
				t.Run(string(a)+" "+string(s)+" "+name, func(t *testing.T) {
					digest := digestOf(h, "text")
					sig := sign(t, a, digest, s.Options(h))
					if err := keys.Verify(pub, s, h, digest, sig); err != nil {
						t.Fatal(err)
					}
					refused := func(what string, pub crypto.PublicKey, s keys.Scheme, h crypto.Hash, digest, sig []byte) {
						t.Helper()
						if keys.Verify(pub, s, h, digest, sig) == nil {
							t.Errorf("verifies with %s", what)
						}
					}
					for _, other := range append(slices.Clone(schemes), "", "none") {
						if other != s {
							refused("scheme "+string(other), pub, other, h, digest, sig)
						}
					}
					refused("another digest", pub, s, h, digestOf(h, "texu"), sig)
					refused("a digest cut short", pub, s, h, digest[:len(digest)-1], sig)
					refused("no digest", pub, s, h, nil, sig)
					for _, other := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
						if other != h && s != keys.EdDSA {
							refused("hash "+other.String(), pub, s, other, digest, sig)
						}
					}
					refused("no signature", pub, s, h, digest, nil)
					refused("a signature cut short", pub, s, h, digest, sig[:len(sig)-1])
					refused("a signature grown", pub, s, h, digest, append(slices.Clone(sig), 0))
					refused("a zero before it", pub, s, h, digest, append([]byte{0}, sig...))
					refused("zeros", pub, s, h, digest, make([]byte, len(sig)))
					refused("ones", pub, s, h, digest, bytes.Repeat([]byte{0xff}, len(sig)))
					for _, i := range []int{0, len(sig) / 2, len(sig) - 1} {
						bad := slices.Clone(sig)
						bad[i] ^= 1
						refused("a bit turned", pub, s, h, digest, bad)
					}
					for _, b := range keys.Algorithms {
						if b != a {
							refused("a key of "+string(b), pairs()[b].Public(), s, h, digest, sig)
						}
					}
					refused("no key", nil, s, h, digest, sig)
					refused("a private key", pairs()[a], s, h, digest, sig)
				})
			}
		}
	}
}

// Raw RSA: crypto.Hash(0) makes VerifyPKCS1v15 take any bytes for a digest.
// And hashes that are not signed do not verify, even where a token made it.
func TestVerifyRefusesOtherHashes(t *testing.T) {
	sha1 := digestOf(crypto.SHA1, "text")
	tests := []struct {
		name   string
		a      keys.Algorithm
		s      keys.Scheme
		h      crypto.Hash
		digest []byte
		opts   crypto.SignerOpts
	}{
		{"raw RSA", keys.RSA2048, keys.PKCS1v15, 0, []byte("any bytes"), crypto.Hash(0)},
		{"RSA, SHA-1", keys.RSA2048, keys.PKCS1v15, crypto.SHA1, sha1, crypto.SHA1},
		{"PSS, SHA-1", keys.RSA2048, keys.PSS, crypto.SHA1, sha1, keys.PSS.Options(crypto.SHA1)},
		{"ECDSA, SHA-1", keys.P256, keys.ECDSA, crypto.SHA1, sha1, crypto.SHA1},
		{"ECDSA, no hash", keys.P256, keys.ECDSA, 0, []byte("any bytes"), crypto.Hash(0)},
		{"ECDSA, longer than its hash", keys.P256, keys.ECDSA, crypto.SHA256, digestOf(crypto.SHA512, "text"), crypto.SHA512},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sig := sign(t, tt.a, tt.digest, tt.opts)
			if keys.Verify(pairs()[tt.a].Public(), tt.s, tt.h, tt.digest, sig) == nil {
				t.Error("verifies")
			}
		})
	}
}

// PSS with a salt of another length is valid, and not what was asked for.
func TestVerifyPSSSalt(t *testing.T) {
	digest := digestOf(crypto.SHA256, "text")
	for _, salt := range []int{20, 222} {
		sig := sign(t, keys.RSA2048, digest, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: salt})
		if keys.Verify(pairs()[keys.RSA2048].Public(), keys.PSS, crypto.SHA256, digest, sig) == nil {
			t.Errorf("a salt of %d bytes verifies", salt)
		}
	}
}

// A salt of another length, where that was asked for: it verifies as such and as nothing else.
func TestVerifySalted(t *testing.T) {
	digest, pub := digestOf(crypto.SHA256, "text"), pairs()[keys.RSA2048].Public()
	for _, salt := range []int{1, 20, 32, 222} {
		sig := sign(t, keys.RSA2048, digest, keys.PSS.SaltedOptions(crypto.SHA256, salt))
		for _, other := range []int{0, 1, 20, 32, 222} {
			err := keys.VerifySalted(pub, keys.PSS, crypto.SHA256, other, digest, sig)
			same := salt == other || salt == 32 && other == 0
			if (err == nil) != same {
				t.Errorf("salt of %d bytes, verified as one of %d: %v", salt, other, err)
			}
		}
	}
}

func TestCheckSalt(t *testing.T) {
	for _, tt := range []struct {
		a    keys.Algorithm
		s    keys.Scheme
		h    crypto.Hash
		salt int
		ok   bool
	}{
		{keys.RSA2048, keys.PSS, crypto.SHA256, 0, true},
		{keys.RSA2048, keys.PSS, crypto.SHA256, 1, true},
		{keys.RSA2048, keys.PSS, crypto.SHA256, 222, true},
		{keys.RSA2048, keys.PSS, crypto.SHA256, 223, false},
		{keys.RSA2048, keys.PSS, crypto.SHA512, 190, true},
		{keys.RSA2048, keys.PSS, crypto.SHA512, 191, false},
		{keys.RSA4096, keys.PSS, crypto.SHA256, 478, true},
		{keys.RSA4096, keys.PSS, crypto.SHA256, 479, false},
		{keys.RSA2048, keys.PSS, crypto.SHA256, -1, false},
		{keys.RSA2048, keys.PKCS1v15, crypto.SHA256, 0, true},
		{keys.RSA2048, keys.PKCS1v15, crypto.SHA256, 32, false},
		{keys.P256, keys.ECDSA, crypto.SHA256, 32, false},
		{keys.Ed25519, keys.EdDSA, crypto.SHA256, 32, false},
	} {
		err := keys.CheckSalt(pairs()[tt.a].Public(), tt.s, tt.h, tt.salt)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, sigerr.Invalid) {
			t.Errorf("%s, %s, %v, %d: %v", tt.a, tt.s, tt.h, tt.salt, err)
		}
	}
	for salt, want := range map[int]int{rsa.PSSSaltLengthEqualsHash: 0, 1: 1, 222: 222} {
		got, err := keys.SaltLength(&rsa.PSSOptions{SaltLength: salt})
		if err != nil || got != want {
			t.Errorf("salt length %d is %d, %v", salt, got, err)
		}
	}
	for _, salt := range []int{rsa.PSSSaltLengthAuto, -2} {
		if got, err := keys.SaltLength(&rsa.PSSOptions{SaltLength: salt}); !errors.Is(err, sigerr.Invalid) {
			t.Errorf("salt length %d is %d, %v", salt, got, err)
		}
	}
}

// A signature that begins with zeros keeps them; some tokens drop them, and
// what they return is then not as long as the modulus.
func TestVerifyShortRSA(t *testing.T) {
	pub := pairs()[keys.RSA2048].Public()
	for i := range 4000 {
		digest := digestOf(crypto.SHA256, string(big.NewInt(int64(i)).Bytes()))
		sig := sign(t, keys.RSA2048, digest, crypto.SHA256)
		if sig[0] != 0 {
			continue
		}
		if err := keys.Verify(pub, keys.PKCS1v15, crypto.SHA256, digest, sig); err != nil {
			t.Errorf("with its zero: %v", err)
		}
		if keys.Verify(pub, keys.PKCS1v15, crypto.SHA256, digest, sig[1:]) == nil {
			t.Error("verifies without its zero")
		}
		return
	}
	t.Fatal("no signature of 4000 begins with a zero: one in 256 does")
}

func TestECDSAToASN1(t *testing.T) {
	for a, n := range map[keys.Algorithm]int{keys.P256: 32, keys.P384: 48} {
		pub := pairs()[a].Public().(*ecdsa.PublicKey)
		for size := range 3*n + 1 {
			der, err := keys.ECDSAToASN1(pub, bytes.Repeat([]byte{0x80}, size))
			if (err == nil) != (size == 2*n) || err != nil && der != nil {
				t.Errorf("%s, %d bytes: %x, %v", a, size, der, err)
			}
		}
		digest := digestOf(crypto.SHA384, "text")
		raw := sign(t, a, digest, crypto.SHA384)
		der, err := keys.ECDSAToASN1(pub, raw)
		if err != nil || !ecdsa.VerifyASN1(pub, digest, der) {
			t.Errorf("%s: the DER form does not verify: %v", a, err)
		}
	}
	// Leading zeros go, and a sign byte comes: DER's shortest form.
	raw := make([]byte, 64)
	raw[31], raw[63] = 0x7f, 0x80
	der, err := keys.ECDSAToASN1(pairs()[keys.P256].Public().(*ecdsa.PublicKey), raw)
	if want := []byte{0x30, 7, 2, 1, 0x7f, 2, 2, 0, 0x80}; err != nil || !bytes.Equal(der, want) {
		t.Errorf("%x, %v; want %x", der, err, want)
	}
}

func TestOptions(t *testing.T) {
	if o := keys.PKCS1v15.Options(crypto.SHA384); o != crypto.SHA384 {
		t.Errorf("PKCS1v15: %v", o)
	}
	if o := keys.ECDSA.Options(crypto.SHA512); o != crypto.SHA512 {
		t.Errorf("ECDSA: %v", o)
	}
	if o, ok := keys.PSS.Options(crypto.SHA256).(*rsa.PSSOptions); !ok || o.Hash != crypto.SHA256 || o.SaltLength != rsa.PSSSaltLengthEqualsHash {
		t.Errorf("PSS: %+v", o)
	}
	if o := keys.EdDSA.Options(crypto.SHA256); o != crypto.Hash(0) {
		t.Errorf("EdDSA: %v", o)
	}
}

// What is verified with RSA PKCS #1 v1.5 is what crypto/rsa verifies: signatures of every
// size and hash, and of each a hundred that are wrong in one bit, one byte or a multiple of
// the modulus, and encodings that are nearly right.
func TestVerifyPKCS1v15AsStandardLibrary(t *testing.T) {
	rnd := mathrand.New(mathrand.NewPCG(1, 2))
	for _, bits := range []int{2048, 3072, 4096} {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		raw := func(em []byte) []byte { // an encoding of any kind, signed
			m := new(big.Int).SetBytes(em)
			return m.Exp(m, key.D, key.N).FillBytes(make([]byte, key.Size()))
		}
		good, bad := 0, 0
		same := func(what string, h crypto.Hash, digest, sig []byte) {
			t.Helper()
			want := rsa.VerifyPKCS1v15(&key.PublicKey, h, digest, sig)
			got := keys.Verify(&key.PublicKey, keys.PKCS1v15, h, digest, sig)
			if (got == nil) != (want == nil) {
				t.Errorf("RSA-%d, %v, %s: %v, the standard library says %v", bits, h, what, got, want)
			}
			if got == nil {
				good++
			} else {
				bad++
			}
		}
		for _, h := range keys.Hashes {
			digest := digestOf(h, "message")
			sig, err := rsa.SignPKCS1v15(nil, key, h, digest)
			if err != nil {
				t.Fatal(err)
			}
			same("right", h, digest, sig)
			same("another digest", h, digestOf(h, "other"), sig)
			for range 100 {
				b := bytes.Clone(sig)
				b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8)
				same("one bit", h, digest, b)
			}
			more := new(big.Int).Add(new(big.Int).SetBytes(sig), key.N)
			if more.BitLen() <= bits {
				same("more than the modulus", h, digest, more.FillBytes(make([]byte, len(sig))))
			}
			same("zero", h, digest, make([]byte, len(sig)))
			em := new(big.Int).SetBytes(sig)
			enc := em.Exp(em, big.NewInt(int64(key.E)), key.N).FillBytes(make([]byte, len(sig)))
			same("right again", h, digest, raw(enc))
			for i, name := range map[int]string{0: "first byte", 1: "block type", 2: "padding", len(enc) - len(digest) - 1: "length", len(enc) - len(digest) - 12: "algorithm"} {
				b := bytes.Clone(enc)
				b[i] ^= 1
				if b[0] == 0 {
					same(name, h, digest, raw(b))
				}
			}
			// Bleichenbacher's of 2006: short padding, and room for anything at the end.
			short := append([]byte{0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0}, enc[bytes.IndexByte(enc[2:], 0)+3:]...)
			same("short padding", h, digest, raw(append(short, make([]byte, len(enc)-len(short))...)))
		}
		if good != 6 || bad < 300 {
			t.Errorf("RSA-%d: %d verify and %d do not", bits, good, bad)
		}
	}
}
