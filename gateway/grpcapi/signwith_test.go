package grpcapi_test

import (
	"bytes"
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

// What a session offers a PKCS#11 socket: chains, and signatures by options.
func TestSessionSignsWithOptions(t *testing.T) {
	t.Parallel()
	f := gatewaytest.New(t, kindsPolicy)
	f.Key(t, "k-1", keys.RSA2048)
	f.Key(t, "k-2", keys.P256)
	spec := gateway.X509Spec{Subject: pkix.Name{CommonName: "k-1"}, Usage: gateway.CodeSign}
	k, err := f.CertifyKey(t.Context(), f.Root, "test", "k-1", spec)
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, f)
	ses, err := s.client(t, "carol").Session(t.Context(), "openpgp")
	if err != nil {
		t.Fatal(err)
	}
	chains, err := ses.Chains(t.Context())
	if err != nil || len(chains) != 1 || len(chains["k-1"]) != 1 || !bytes.Equal(chains["k-1"][0], k.X509[0]) {
		t.Errorf("chains of %d keys, %v", len(chains), err)
	}
	digest := sha256.Sum256([]byte("text"))
	for _, tt := range []struct {
		opts   crypto.SignerOpts
		scheme keys.Scheme
		salt   int
	}{
		{crypto.SHA256, keys.PKCS1v15, 0},
		{&rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthEqualsHash}, keys.PSS, 0},
		{&rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: 222}, keys.PSS, 222},
	} {
		sig, err := ses.SignWith(t.Context(), "k-1", tt.opts, digest[:], "note")
		if err == nil {
			err = keys.VerifySalted(public(t, k), tt.scheme, crypto.SHA256, tt.salt, digest[:], sig)
		}
		if err != nil {
			t.Errorf("%+v: %v", tt.opts, err)
		}
		if e := s.Store.Last(t); e.Outcome != audit.Signed || e.ClaimNote != "note" || e.Scheme != string(tt.scheme) {
			t.Errorf("audit entry %+v", e)
		}
	}
	for _, salt := range []int{rsa.PSSSaltLengthAuto, -2, 223} {
		_, err := ses.SignWith(t.Context(), "k-1", &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: salt}, digest[:], "")
		if !errors.Is(err, sigerr.Invalid) {
			t.Errorf("salt length %d: %v", salt, err)
		}
	}
	// More than the wire can carry.
	cl := s.client(t, "carol")
	r := clientRequest("k-1", "text")
	r.Scheme, r.SaltLength = keys.PSS, 1<<40
	if _, err := cl.Sign(t.Context(), r); !errors.Is(err, sigerr.Invalid) {
		t.Errorf("%v, want Invalid", err)
	}
}
