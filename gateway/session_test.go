package gateway_test

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509/pkix"
	"errors"
	"testing"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// A session signs by what the options say, and shows the chains of the keys that its
// principal may sign with.
func TestSessionSignsWithOptions(t *testing.T) {
	f := gatewaytest.New(t, gatewaytest.Policy+`
  - {name: a, principals: [alice], keys: ["a-*"], may: [sign], formats: [pkcs11], blind: true}
  - {name: b, principals: [alice], keys: ["b-*"], may: [read]}
`)
	a := f.Key(t, "a-1", keys.RSA2048)
	for _, name := range []string{"b-1", "c-1"} {
		f.Key(t, name, keys.P256)
	}
	chains := map[string][]byte{}
	for _, name := range []string{"a-1", "b-1", "c-1"} {
		k, err := f.CertifyKey(t.Context(), f.Root, "test", name, gateway.X509Spec{Subject: pkix.Name{CommonName: name}, Usage: gateway.CodeSign})
		if err != nil {
			t.Fatal(err)
		}
		chains[name] = k.X509[0]
	}
	s := f.Session(gatewaytest.Principal(t, "alice"), "pkcs11", "pkcs11")
	got, err := s.Chains(t.Context())
	if err != nil || len(got) != 1 || len(got["a-1"]) != 1 || string(got["a-1"][0]) != string(chains["a-1"]) {
		t.Errorf("chains of %d keys, %v; want that of a-1", len(got), err)
	}
	reg, err := keys.NewRegistry([]keys.Key{a})
	if err != nil {
		t.Fatal(err)
	}
	pub := reg.Get("a-1").PublicKey
	digest := sha256.Sum256([]byte("text"))
	for _, tt := range []struct {
		opts   crypto.SignerOpts
		scheme keys.Scheme
		salt   int
		detail string
	}{
		{crypto.SHA256, keys.PKCS1v15, 0, ""},
		{&rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthEqualsHash}, keys.PSS, 0, ""},
		{&rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: 32}, keys.PSS, 32, ""},
		{&rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: 222}, keys.PSS, 222, "salt of 222 bytes"},
	} {
		sig, err := s.SignWith(t.Context(), "a-1", tt.opts, digest[:], "note")
		if err == nil {
			err = keys.VerifySalted(pub, tt.scheme, crypto.SHA256, tt.salt, digest[:], sig)
		}
		if err != nil {
			t.Errorf("%+v: %v", tt.opts, err)
		}
		e := f.Store.Last(t)
		if e.Outcome != audit.Signed || e.Scheme != string(tt.scheme) || e.Detail != tt.detail || e.ClaimNote != "note" || e.FrontEnd != "pkcs11" || e.Format != "pkcs11" {
			t.Errorf("%+v: audit entry %+v", tt.opts, e)
		}
	}
	before := f.Token.Signs()
	for _, salt := range []int{rsa.PSSSaltLengthAuto, -2, 223} {
		if _, err := s.SignWith(t.Context(), "a-1", &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: salt}, digest[:], ""); !errors.Is(err, sigerr.Invalid) {
			t.Errorf("salt length %d: %v, want Invalid", salt, err)
		}
	}
	if n := f.Token.Signs() - before; n != 0 {
		t.Errorf("the token was asked %d times", n)
	}
}

// The length of the salt is part of what an idempotency id stands for.
func TestSaltIsContent(t *testing.T) {
	f := gatewaytest.New(t, "")
	f.Key(t, "k", keys.RSA2048)
	r := gatewaytest.Request("k", "text")
	r.ID, r.Scheme, r.SaltLength = "id", keys.PSS, 20
	if _, err := f.Sign(t.Context(), f.Root, r); err != nil {
		t.Fatal(err)
	}
	r.SaltLength = 21
	if _, err := f.Sign(t.Context(), f.Root, r); !errors.Is(err, sigerr.Conflict) {
		t.Errorf("the same id for another salt: %v, want Conflict", err)
	}
}
