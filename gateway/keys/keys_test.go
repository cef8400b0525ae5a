package keys_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// pairs makes a key pair of each algorithm, once: RSA 4096 takes a second.
var pairs = sync.OnceValue(func() map[keys.Algorithm]crypto.Signer {
	out := map[keys.Algorithm]crypto.Signer{}
	var err error
	for a, bits := range map[keys.Algorithm]int{keys.RSA2048: 2048, keys.RSA3072: 3072, keys.RSA4096: 4096} {
		if out[a], err = rsa.GenerateKey(rand.Reader, bits); err != nil {
			panic(err)
		}
	}
	for a, c := range map[keys.Algorithm]elliptic.Curve{keys.P256: elliptic.P256(), keys.P384: elliptic.P384()} {
		if out[a], err = ecdsa.GenerateKey(c, rand.Reader); err != nil {
			panic(err)
		}
	}
	if _, out[keys.Ed25519], err = ed25519.GenerateKey(rand.Reader); err != nil {
		panic(err)
	}
	return out
})

func spki(t *testing.T, pub crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// constants returns the values of the constants of a type, read from the source.
func constants(t *testing.T, typ string) []string {
	t.Helper()
	var out []string
	for _, name := range []string{"keys.go", "scheme.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			v, ok := n.(*ast.ValueSpec)
			if !ok {
				return true
			}
			if name, ok := v.Type.(*ast.Ident); !ok || name.Name != typ {
				return true
			}
			for _, x := range v.Values {
				if lit, ok := x.(*ast.BasicLit); ok {
					s, err := strconv.Unquote(lit.Value)
					if err != nil {
						t.Fatal(err)
					}
					out = append(out, s)
				}
			}
			return true
		})
	}
	if len(out) < 2 {
		t.Fatalf("found the constants %q of type %s", out, typ)
	}
	return out
}

func TestAlgorithms(t *testing.T) {
	var listed []string
	for _, a := range keys.Algorithms {
		listed = append(listed, string(a))
		if got, err := keys.ParseAlgorithm(string(a)); got != a || err != nil {
			t.Errorf("ParseAlgorithm(%q) = %q, %v", a, got, err)
		}
		pair := pairs()[a]
		if pair == nil {
			t.Fatalf("no key pair of %s to test with", a)
		}
		if got := keys.AlgorithmOf(pair.Public()); got != a {
			t.Errorf("AlgorithmOf a key of %s = %q", a, got)
		}
	}
	if diff := cmp.Diff(constants(t, "Algorithm"), listed); diff != "" {
		t.Errorf("Algorithms (-declared +listed):\n%s", diff)
	}
	for _, s := range []string{"", "rsa1024", "RSA2048", "p521", "rsa2048 "} {
		if got, err := keys.ParseAlgorithm(s); got != "" || !errors.Is(err, sigerr.Invalid) {
			t.Errorf("ParseAlgorithm(%q) = %q, %v; want Invalid", s, got, err)
		}
	}
	if got := keys.AlgorithmOf(foreign(t)); got != "" {
		t.Errorf("AlgorithmOf a P-521 key = %q", got)
	}
	for _, pub := range []crypto.PublicKey{nil, "x", pairs()[keys.P256]} {
		if got := keys.AlgorithmOf(pub); got != "" {
			t.Errorf("AlgorithmOf(%T) = %q", pub, got)
		}
	}
}

// foreign is a public key that is none of ours.
func foreign(t *testing.T) crypto.PublicKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k.Public()
}

func TestStates(t *testing.T) {
	all := constants(t, "State")
	for _, s := range all {
		state, err := keys.ParseState(s)
		if err != nil || string(state) != s {
			t.Errorf("the state %q has no row of transitions: ParseState = %q, %v", s, state, err)
		}
		if state.CanBecome(state) {
			t.Errorf("%q can become what it is", s)
		}
		if state.CanBecome("") || state.CanBecome("revoked") {
			t.Errorf("%q can become what is no state", s)
		}
	}
	for _, s := range []string{"", "Enabled", "revoked", "enabled "} {
		if got, err := keys.ParseState(s); got != "" || !errors.Is(err, sigerr.Invalid) {
			t.Errorf("ParseState(%q) = %q, %v; want Invalid", s, got, err)
		}
		for _, to := range all {
			if keys.State(s).CanBecome(keys.State(to)) {
				t.Errorf("%q, which is no state, can become %q", s, to)
			}
		}
	}
	if !keys.Enabled.CanBecome(keys.Disabled) || !keys.Disabled.CanBecome(keys.Enabled) {
		t.Error("enabled and disabled do not follow each other")
	}
}

func TestCheckName(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "0": true, "Release-2027.01_x": true, strings.Repeat("a", 64): true,
		"": false, "-a": false, ".a": false, "_a": false, "..": false, "a b": false, "a/b": false, "a*": false, "*": false,
		"a\n": false, "\na": false, "a\x00": false, "é": false, "a:b": false, "a@b": false, strings.Repeat("a", 65): false,
	} {
		if err := keys.CheckName(name); (err == nil) != want || err != nil && !errors.Is(err, sigerr.Invalid) {
			t.Errorf("CheckName(%q) = %v, want ok %v", name, err, want)
		}
	}
}

func TestFingerprint(t *testing.T) {
	// sha256("abc"), FIPS 180-2 appendix B.1.
	const want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	if got := (keys.Key{Name: "x", Public: []byte("abc")}).Fingerprint(); got != want {
		t.Errorf("Fingerprint = %s, want %s", got, want)
	}
}

func TestRegistry(t *testing.T) {
	var all []keys.Key
	for _, a := range keys.Algorithms {
		all = append(all, keys.Key{Name: "z-" + string(a), Algorithm: a, State: keys.Enabled, Public: spki(t, pairs()[a].Public())})
	}
	r, err := keys.NewRegistry(all)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"z-ed25519", "z-p256", "z-p384", "z-rsa2048", "z-rsa3072", "z-rsa4096"}, r.Names()); diff != "" {
		t.Errorf("Names (-want +got):\n%s", diff)
	}
	for _, k := range all {
		got := r.Get(k.Name)
		if got == nil {
			t.Fatalf("no %s", k.Name)
		}
		if diff := cmp.Diff(k, got.Key); diff != "" {
			t.Errorf("Get(%s) (-want +got):\n%s", k.Name, diff)
		}
		if !got.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(pairs()[k.Algorithm].Public()) {
			t.Errorf("%s has another public key", k.Name)
		}
	}
	if r.Get("z") != nil || r.Get("") != nil {
		t.Error("Get finds what is not there")
	}
	if r, err := keys.NewRegistry(nil); err != nil || len(r.Names()) != 0 {
		t.Errorf("NewRegistry(nil) = %v, %v", r, err)
	}
}

func TestRegistryRefuses(t *testing.T) {
	p256 := spki(t, pairs()[keys.P256].Public())
	good := keys.Key{Name: "good", Algorithm: keys.P256, Public: p256}
	tests := []struct {
		name string
		key  keys.Key
		want string
	}{
		{"another algorithm", keys.Key{Name: "bad", Algorithm: keys.RSA2048, Public: p256}, "rsa2048"},
		{"another curve", keys.Key{Name: "bad", Algorithm: keys.P384, Public: p256}, "p384"},
		{"another size", keys.Key{Name: "bad", Algorithm: keys.RSA4096, Public: spki(t, pairs()[keys.RSA2048].Public())}, "rsa4096"},
		{"unknown algorithm", keys.Key{Name: "bad", Algorithm: "p521", Public: spki(t, foreign(t))}, "p521"},
		{"no algorithm, for a key of none", keys.Key{Name: "bad", Public: spki(t, foreign(t))}, "bad"},
		{"no public key", keys.Key{Name: "bad", Algorithm: keys.P256}, "public key"},
		{"garbage", keys.Key{Name: "bad", Algorithm: keys.P256, Public: []byte("garbage")}, "public key"},
		{"trailing data", keys.Key{Name: "bad", Algorithm: keys.P256, Public: append(append([]byte{}, p256...), 0)}, "public key"},
		{"cut short", keys.Key{Name: "bad", Algorithm: keys.P256, Public: p256[:len(p256)-1]}, "public key"},
		{"the name of another", keys.Key{Name: "good", Algorithm: keys.P256, Public: p256}, "good"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := keys.NewRegistry([]keys.Key{good, tt.key})
			if r != nil || err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), `"`+tt.key.Name+`"`) {
				t.Errorf("NewRegistry = %v, %v; want an error with %q and the name", r, err, tt.want)
			}
		})
	}
}
