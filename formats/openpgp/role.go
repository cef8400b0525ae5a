package openpgp

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"fmt"
	"time"

	pgpecdsa "github.com/ProtonMail/go-crypto/openpgp/ecdsa"
	pgped25519 "github.com/ProtonMail/go-crypto/openpgp/ed25519"
	pgpeddsa "github.com/ProtonMail/go-crypto/openpgp/eddsa"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// A Role is what a certificate says of one of its keys.
type Role struct {
	Key     Key              // Expires is no later than the certificate's
	UserID  string           // the main one of the certificate
	Primary crypto.PublicKey // the certificate's primary key; nil where Key is it
}

// RoleOf tells of the key that holds pub and may sign documents at that time. It fails as SigningKeyAt does, and with
// ErrUnsupported where the primary key is none of RSA, P-256, P-384 and Ed25519.
func (c *Certificate) RoleOf(pub crypto.PublicKey, at time.Time) (Role, error) {
	k, err := c.SigningKeyAt(pub, at)
	if err != nil {
		return Role{}, err
	}
	e, err := c.entity()
	if err != nil {
		return Role{}, fmt.Errorf("%w: certificate: %v", ErrMalformed, err)
	}
	_, id := e.PrimaryIdentity(at, policy(at))
	if id == nil || id.UserId == nil {
		return Role{}, fmt.Errorf("%w: certificate without a user ID that is good at %s", ErrKeyUnusable, stamp(at))
	}
	r := Role{Key: k, UserID: id.UserId.Id}
	if k.Fingerprint == c.master {
		return r, nil
	}
	if r.Primary, err = publicOf(e.PrimaryKey); err != nil {
		return Role{}, err
	}
	// The fingerprint is over all of the key: so it was read right.
	again, err := NewKey(r.Primary, e.PrimaryKey.CreationTime)
	if err != nil || again.Fingerprint != c.master {
		return Role{}, fmt.Errorf("%w: primary key %s of a form that is not written any more", ErrUnsupported, c.master)
	}
	return r, nil
}

// publicOf turns go-crypto's types of keys into those of the standard library.
func publicOf(k *packet.PublicKey) (crypto.PublicKey, error) {
	switch pub := k.PublicKey.(type) {
	case *rsa.PublicKey:
		return pub, nil
	case *pgpecdsa.PublicKey:
		for curve, nist := range map[packet.Curve]elliptic.Curve{packet.CurveNistP256: elliptic.P256(), packet.CurveNistP384: elliptic.P384()} {
			if c, err := k.Curve(); err == nil && c == curve {
				return ecdsa.ParseUncompressedPublicKey(nist, pub.MarshalPoint())
			}
		}
	case *pgpeddsa.PublicKey:
		if p := pub.MarshalPoint(); len(p) == 1+ed25519.PublicKeySize && p[0] == 0x40 {
			return ed25519.PublicKey(p[1:]), nil
		}
	case *pgped25519.PublicKey:
		if len(pub.Point) == ed25519.PublicKeySize {
			return ed25519.PublicKey(pub.Point), nil
		}
	}
	return nil, fmt.Errorf("%w: primary key of algorithm %d", ErrUnsupported, k.PubKeyAlgo)
}
