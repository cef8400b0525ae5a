package openpgp

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// MaxCertificate is the largest certificate read, in bytes, armor included. A signer's has one or two kilobytes; one
// with many foreign certifications has some hundreds.
const MaxCertificate = 1 << 20

// A Certificate is a transferable public key that was read. It is never changed and is safe for concurrent use.
type Certificate struct {
	raw    []byte // packets
	ids    []string
	master Fingerprint
}

// policy is how strictly go-crypto verifies: it would take SHA-1 in self-signatures, and 224-bit hashes.
func policy(at time.Time) *packet.Config {
	weak := map[crypto.Hash]bool{
		crypto.MD5: true, crypto.RIPEMD160: true, crypto.SHA1: true, crypto.SHA224: true,
	}
	return &packet.Config{
		MinRSABits:                  minRSABits,
		RejectHashAlgorithms:        weak,
		RejectMessageHashAlgorithms: weak,
		Time:                        func() time.Time { return at },
	}
}

// ParseCertificate reads one version 4 public key, binary or armored, of at most MaxCertificate bytes. It refuses
// secret keys, a second key, and trailing data. At least one user ID must have a valid self-signature.
func ParseCertificate(b []byte) (*Certificate, error) {
	raw, err := dearmor(b, BlockPublicKey, MaxCertificate)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	c := &Certificate{raw: raw}
	e, err := c.entity()
	if err != nil {
		return nil, fmt.Errorf("%w: certificate: %v", ErrMalformed, err)
	}
	copy(c.master[:], e.PrimaryKey.Fingerprint)
	for id := range e.Identities {
		c.ids = append(c.ids, id)
	}
	slices.Sort(c.ids)
	return c, nil
}

// entity parses anew at each use. go-crypto notes in an entity which signatures it has found good, and never takes
// that back: it is neither safe for concurrent use nor right for a second point in time.
func (c *Certificate) entity() (*openpgp.Entity, error) {
	r := packet.NewReader(bytes.NewReader(c.raw))
	e, err := openpgp.ReadEntity(r)
	if err != nil {
		return nil, err
	}
	if e.PrivateKey != nil || slices.ContainsFunc(e.Subkeys, func(s openpgp.Subkey) bool { return s.PrivateKey != nil }) {
		return nil, fmt.Errorf("it holds a secret key")
	}
	if e.PrimaryKey.Version != 4 {
		return nil, fmt.Errorf("version %d key", e.PrimaryKey.Version)
	}
	_, err = r.Next()
	if err != io.EOF {
		return nil, fmt.Errorf("data after the first key")
	}
	_, err = e.PrimarySelfSignature(time.Time{}, policy(time.Time{}))
	if err != nil {
		return nil, err
	}
	return e, nil
}

// Fingerprint is that of the primary key.
func (c *Certificate) Fingerprint() Fingerprint { return c.master }

// UserIDs are the user IDs that carry a self-signature, sorted. They come from outside: escape them.
func (c *Certificate) UserIDs() []string { return slices.Clone(c.ids) }

// Bytes are the packets, as they were read.
func (c *Certificate) Bytes() []byte { return bytes.Clone(c.raw) }

// Armor writes the certificate in ASCII armor.
func (c *Certificate) Armor(w io.Writer) error { return Armor(w, BlockPublicKey, c.raw) }

// SigningKey is SigningKeyAt for now.
func (c *Certificate) SigningKey(pub crypto.PublicKey) (Key, error) {
	return c.SigningKeyAt(pub, time.Now())
}

// SigningKeyAt returns the key or subkey that holds pub and may sign documents at that time. It fails with
// ErrKeyNotFound if there is none, or with ErrKeyUnusable if there is one that may not.
func (c *Certificate) SigningKeyAt(pub crypto.PublicKey, at time.Time) (Key, error) {
	e, err := c.entity()
	if err != nil {
		return Key{}, fmt.Errorf("%w: certificate: %v", ErrMalformed, err)
	}
	none := fmt.Errorf("%w: %s", ErrKeyNotFound, c.master)
	for _, pk := range append([]*packet.PublicKey{e.PrimaryKey}, subkeys(e)...) {
		// The fingerprint covers all of the key, and the creation time that a bare public key lacks.
		k, err := NewKey(pub, pk.CreationTime)
		if errors.Is(err, ErrMalformed) {
			continue // a creation time that none of our keys has
		}
		if err != nil {
			return Key{}, err
		}
		if !bytes.Equal(k.Fingerprint[:], pk.Fingerprint) {
			continue
		}
		k.Expires, err = usable(e, pk, at)
		if err == nil {
			err = k.usableAt(at)
		}
		if err == nil {
			return k, nil
		}
		none = fmt.Errorf("%s: %w", k.Fingerprint, err)
	}
	return Key{}, none
}

func subkeys(e *openpgp.Entity) []*packet.PublicKey {
	var keys []*packet.PublicKey
	for _, s := range e.Subkeys {
		keys = append(keys, s.PublicKey)
	}
	return keys
}

// usable says when pk, a key of e that may sign at that time, expires. A subkey is no better than its primary.
func usable(e *openpgp.Entity, pk *packet.PublicKey, at time.Time) (time.Time, error) {
	conf := policy(at)
	self, err := e.VerifyPrimaryKey(at, conf)
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: primary key at %s: %v", ErrKeyUnusable, stamp(at), err)
	}
	flags, until := self, expiry(e.PrimaryKey, self)
	if pk != e.PrimaryKey {
		i := slices.IndexFunc(e.Subkeys, func(s openpgp.Subkey) bool { return s.PublicKey == pk })
		flags, err = e.Subkeys[i].Verify(at, conf)
		if err != nil {
			return time.Time{}, fmt.Errorf("%w: subkey at %s: %v", ErrKeyUnusable, stamp(at), err)
		}
		if own := expiry(pk, flags); until.IsZero() || !own.IsZero() && own.Before(until) {
			until = own
		}
	}
	if !flags.FlagsValid || !flags.FlagSign {
		return time.Time{}, fmt.Errorf("%w: not flagged for signing", ErrKeyUnusable)
	}
	return until, nil
}

// expiry is when the self-signature ends the key; zero: never.
func expiry(pk *packet.PublicKey, self *packet.Signature) time.Time {
	if self.KeyLifetimeSecs == nil || *self.KeyLifetimeSecs == 0 {
		return time.Time{}
	}
	return pk.CreationTime.Add(time.Duration(*self.KeyLifetimeSecs) * time.Second).UTC()
}

// dearmor returns the packets in b, which is armored or not. Any packet begins with an octet that has bit 7 set
// (section 4.2), and no armor does.
func dearmor(b []byte, blockType string, limit int) ([]byte, error) {
	if len(b) == 0 {
		return nil, fmt.Errorf("%w: empty", ErrMalformed)
	}
	if len(b) > limit {
		return nil, fmt.Errorf("%w: over %d bytes", ErrMalformed, limit)
	}
	if b[0]&0x80 != 0 {
		return bytes.Clone(b), nil
	}
	block, err := armor.Decode(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%w: no armor: %v", ErrMalformed, err)
	}
	if block.Type != blockType {
		return nil, fmt.Errorf("%w: armor of %q, not %q", ErrMalformed, block.Type, blockType)
	}
	raw, err := io.ReadAll(block.Body)
	if err != nil {
		return nil, fmt.Errorf("%w: armor: %v", ErrMalformed, err)
	}
	return raw, nil
}
