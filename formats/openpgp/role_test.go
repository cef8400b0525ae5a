package openpgp_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// Of our own certificates each key's role is told, whatever its algorithm and its
// primary key's.
func TestRoleOf(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec := func(c elliptic.Curve) crypto.Signer {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	other := ec(elliptic.P256())
	for name, primary := range map[string]crypto.Signer{"rsa": r, "ed25519": ed, "p256": ec(elliptic.P256()), "p384": ec(elliptic.P384())} {
		t.Run(name, func(t *testing.T) {
			expires := now.AddDate(1, 0, 0)
			spec := openpgp.CertificateSpec{UserID: "A <a@example.org>", Created: now, Expires: expires, Primary: primary}
			single := parse(t, spec)
			got, err := single.RoleOf(primary.Public(), now)
			if err != nil || got.UserID != spec.UserID || got.Primary != nil || !got.Key.Expires.Equal(expires) || !got.Key.Created.Equal(now) {
				t.Errorf("a key that signs itself: %+v, %v", got, err)
			}
			spec.Subkey = ec(elliptic.P256())
			both := parse(t, spec)
			got, err = both.RoleOf(spec.Subkey.Public(), now)
			p, ok := got.Primary.(interface{ Equal(crypto.PublicKey) bool })
			if err != nil || !ok || !p.Equal(primary.Public()) || got.Key.Fingerprint == both.Fingerprint() || !got.Key.Expires.Equal(expires) {
				t.Errorf("a subkey: %+v, %v", got, err)
			}
			for what, c := range map[string]struct {
				pub  crypto.PublicKey
				at   time.Time
				want error
			}{
				"a primary key that only certifies": {primary.Public(), now, openpgp.ErrKeyUnusable},
				"another key":                       {other.Public(), now, openpgp.ErrKeyNotFound},
				"an expired certificate":            {spec.Subkey.Public(), expires.Add(time.Hour), openpgp.ErrKeyUnusable},
			} {
				if got, err := both.RoleOf(c.pub, c.at); !errors.Is(err, c.want) || got.UserID != "" {
					t.Errorf("%s: %+v, %v", what, got, err)
				}
			}
		})
	}
}

func parse(t *testing.T, spec openpgp.CertificateSpec) *openpgp.Certificate {
	t.Helper()
	b, err := openpgp.NewCertificate(spec)
	if err != nil {
		t.Fatal(err)
	}
	c, err := openpgp.ParseCertificate(b)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
