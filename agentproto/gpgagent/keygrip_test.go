package gpgagent_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/ecdh"
	pgpecdsa "github.com/ProtonMail/go-crypto/openpgp/ecdsa"
	"github.com/ProtonMail/go-crypto/openpgp/eddsa"
	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"github.com/signwarden/signwarden/agentproto/gpgagent"
)

// TestKeygripVectors computes the keygrips that gpg --with-keygrip showed for the same keys.
func TestKeygripVectors(t *testing.T) {
	f, err := os.Open("testdata/keygrip-vectors-pubkeys.asc")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ring, err := openpgp.ReadArmoredKeyRing(f)
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]bool)
	add := func(pk *packet.PublicKey) {
		pub := publicKeyOf(t, pk)
		if pub == nil {
			return // Curve25519 cannot sign
		}
		got[gripOf(t, pub)] = true
	}
	for _, e := range ring {
		add(e.PrimaryKey)
		for _, sub := range e.Subkeys {
			add(sub.PublicKey)
		}
	}
	vectors, err := os.ReadFile("testdata/keygrip-vectors.txt")
	if err != nil {
		t.Fatal(err)
	}
	matched := 0
	for line := range strings.Lines(string(vectors)) {
		var grip, kind string
		fmt.Sscan(line, &grip, &kind)
		if got[grip] {
			matched++
		} else if kind != "Curve25519" {
			t.Errorf("no key has keygrip %s (%s)", grip, kind)
		}
	}
	if matched != 10 {
		t.Errorf("%d keygrips matched, want 10", matched)
	}
}

func publicKeyOf(t *testing.T, pk *packet.PublicKey) crypto.PublicKey {
	t.Helper()
	switch k := pk.PublicKey.(type) {
	case *rsa.PublicKey:
		return k
	case *eddsa.PublicKey:
		p := k.MarshalPoint()
		return ed25519.PublicKey(p[len(p)-ed25519.PublicKeySize:])
	case *pgpecdsa.PublicKey:
		return ecdsaKey(t, k.MarshalPoint())
	case *ecdh.PublicKey: // a point has one keygrip, whatever it is used for
		point := k.MarshalPoint()
		if point[0] == 4 {
			return ecdsaKey(t, point)
		}
	}
	return nil
}

func ecdsaKey(t *testing.T, point []byte) crypto.PublicKey {
	t.Helper()
	curve := elliptic.P256()
	if len(point) > 65 {
		curve = elliptic.P384()
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

func TestKeygripRefuses(t *testing.T) {
	tests := []struct {
		name string
		pub  crypto.PublicKey
	}{
		{"nil", nil},
		{"nil RSA key", (*rsa.PublicKey)(nil)},
		{"RSA without a modulus", &rsa.PublicKey{E: 3}},
		{"nil ECDSA key", (*ecdsa.PublicKey)(nil)},
		{"ECDSA without a curve", &ecdsa.PublicKey{}},
		{"unknown curve", &ecdsa.PublicKey{Curve: elliptic.P224()}},
		{"short Ed25519 key", ed25519.PublicKey("short")},
		{"another type", "text"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := gpgagent.Keygrip(tt.pub)
			if !errors.Is(err, gpgagent.ErrNoKeygrip) {
				t.Errorf("err is %v", err)
			}
		})
	}
}
