package openpgp

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// An Amendment adds self-signatures to a certificate. Nothing is taken out of it: a signature over a document is judged by
// the self-signatures of its time. Software that has the old certificate and reads the new one merges the two.
type Amendment struct {
	Certificate *Certificate
	Primary     crypto.Signer
	// At is the time of the new self-signatures, in whole seconds: after LastSigned, or software could not tell
	// which holds.
	At time.Time
}

// A Reason is why a key is revoked (section 5.2.3.31).
type Reason byte

const (
	NoReason    Reason = 0
	Superseded  Reason = 1 // by a new key
	Compromised Reason = 2 // signatures of any time are in doubt
	Retired     Reason = 3
)

// MaxReason is the longest text of a revocation, in bytes.
const MaxReason = 255

// LastSigned is the time of the newest self-signature.
func (c *Certificate) LastSigned() time.Time {
	var last time.Time
	parts, err := c.parts()
	if err != nil {
		return last // it was parsed once: this cannot be
	}
	for _, p := range parts {
		for _, raw := range p.signatures {
			pkt, err := packet.Read(bytes.NewReader(raw))
			sig, ok := pkt.(*packet.Signature)
			if err == nil && ok && sig.CheckKeyIdOrFingerprint(parts[0].key) && sig.CreationTime.After(last) {
				last = sig.CreationTime.UTC()
			}
		}
	}
	return last
}

// Renew makes the certificate expire at another time, or with zero never: its primary key, by new self-signatures of every
// user ID that is not revoked, and those subkeys whose signers are given. The result was parsed and verified, as of At.
func (a Amendment) Renew(expires time.Time, subkeys ...crypto.Signer) ([]byte, error) {
	w, err := a.open(expires)
	if err != nil {
		return nil, err
	}
	for i := range w.parts {
		p := &w.parts[i]
		if p.tag != tagUserID {
			continue
		}
		id := string(p.body)
		have := w.entity.Identities[id]
		if have == nil || len(have.Revocations) > 0 {
			continue
		}
		latest, err := have.LatestValidSelfCertification(time.Time{}, policy(time.Time{}))
		if err != nil {
			continue // not the owner's word
		}
		sig, err := w.self.userID(id, w.flags, expires, latest.IsPrimaryId != nil && *latest.IsPrimaryId)
		if err != nil {
			return nil, fmt.Errorf("certifying the user ID %q: %w", id, err)
		}
		p.signatures = append(p.signatures, sig)
	}
	for _, signer := range subkeys {
		err = w.rebind(signer, expires)
		if err != nil {
			return nil, err
		}
	}
	return w.finish()
}

// ExpireSubkey makes one subkey expire at another time.
func (a Amendment) ExpireSubkey(subkey crypto.Signer, expires time.Time) ([]byte, error) {
	w, err := a.open(expires)
	if err != nil {
		return nil, err
	}
	err = w.rebind(subkey, expires)
	if err != nil {
		return nil, err
	}
	return w.finish()
}

// AddUserID adds a user ID, which is not the one shown first.
func (a Amendment) AddUserID(id string) ([]byte, error) {
	err := checkUserID(id)
	if err != nil {
		return nil, err
	}
	w, err := a.open(time.Time{})
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(w.parts, func(p part) bool { return p.tag == tagUserID && string(p.body) == id }) {
		return nil, fmt.Errorf("%w: the certificate has the user ID %q", ErrMalformed, id)
	}
	sig, err := w.self.userID(id, w.flags, w.expires, false)
	if err != nil {
		return nil, fmt.Errorf("certifying the user ID %q: %w", id, err)
	}
	at := len(w.parts)
	for at > 1 && w.parts[at-1].tag == tagPublicSubkey { // user IDs come first (section 10.1.1)
		at--
	}
	w.parts = slices.Insert(w.parts, at, part{tag: tagUserID, body: []byte(id), signatures: [][]byte{sig}})
	return w.finish()
}

// AddSubkey adds a signing subkey that is created at At, and returns it too.
func (a Amendment) AddSubkey(subkey crypto.Signer, expires time.Time) ([]byte, error) {
	w, err := a.open(expires)
	if err != nil {
		return nil, err
	}
	sub, err := NewKey(subkey.Public(), a.At)
	if err != nil {
		return nil, fmt.Errorf("subkey: %w", err)
	}
	if w.find(subkey.Public()) != nil || w.self.primary.holds(subkey) == nil {
		return nil, fmt.Errorf("%w: the certificate has that key already", ErrMalformed)
	}
	sig, err := w.self.subkey(sub, subkey, expires)
	if err != nil {
		return nil, fmt.Errorf("binding the subkey: %w", err)
	}
	w.parts = append(w.parts, part{tag: tagPublicSubkey, body: sub.body, signatures: [][]byte{sig}})
	return w.finish()
}

// Revoke revokes the whole certificate, for good. text is for people.
func (a Amendment) Revoke(why Reason, text string) ([]byte, error) {
	switch {
	case why > Retired:
		return nil, fmt.Errorf("%w: reason %d", ErrMalformed, why)
	case len(text) > MaxReason || !utf8.ValidString(text):
		return nil, fmt.Errorf("%w: the reason's text is not UTF-8 of at most %d bytes", ErrMalformed, MaxReason)
	}
	for _, r := range text {
		if unicode.In(r, unicode.Cc, unicode.Zl, unicode.Zp, unicode.Bidi_Control) {
			return nil, fmt.Errorf("%w: the reason's text has the control character %U", ErrMalformed, r)
		}
	}
	w, err := a.open(time.Time{})
	if err != nil {
		return nil, err
	}
	extra := appendSubpacket(nil, subReason, append([]byte{byte(why)}, text...)...)
	sig, err := newSignature(w.self.primary, sigKeyRevocation, 0, a.At, extra)
	if err != nil {
		return nil, err
	}
	sig.h.Write(appendHashedKey(nil, w.self.primary.body))
	raw, err := sig.Finish(a.Primary)
	if err != nil {
		return nil, fmt.Errorf("revoking: %w", err)
	}
	w.parts[0].signatures = append(w.parts[0].signatures, raw)
	return w.finish()
}

// part is a key or user ID of a certificate, and the signatures behind it.
type part struct {
	tag        byte
	body       []byte
	key        *packet.PublicKey // nil: a user ID
	signatures [][]byte          // packets
}

// parts takes a certificate apart.
func (c *Certificate) parts() ([]part, error) {
	r := packet.NewOpaqueReader(bytes.NewReader(c.raw))
	var list []part
	for {
		p, err := r.Next()
		if err == io.EOF {
			return list, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: certificate: %v", ErrMalformed, err)
		}
		if p.Tag == tagSignature && len(list) > 0 {
			last := &list[len(list)-1]
			last.signatures = append(last.signatures, appendPacket(nil, tagSignature, p.Contents))
			continue
		}
		n := part{tag: p.Tag, body: p.Contents}
		if p.Tag == tagPublicKey || p.Tag == tagPublicSubkey {
			n.key, err = parseKey(p.Contents)
			if err != nil {
				return nil, fmt.Errorf("%w: certificate: %v", ErrMalformed, err)
			}
		}
		list = append(list, n)
	}
}

// amending is an Amendment under way.
type amending struct {
	Amendment
	entity  *openpgp.Entity
	parts   []part
	self    selfSignature
	flags   byte      // of the primary key
	expires time.Time // the primary key, until now

	revocations int // signatures on the primary key, until now
}

// maxGrown leaves room for a revocation.
const maxGrown = MaxCertificate / 2

// open checks what every amendment needs. expires is the new time of expiry, zero for none.
func (a Amendment) open(expires time.Time) (*amending, error) {
	if a.Certificate == nil || a.Primary == nil {
		return nil, errors.New("an Amendment lacks a certificate or its primary key")
	}
	w := &amending{Amendment: a}
	var err error
	w.entity, err = a.Certificate.entity()
	if err != nil {
		return nil, fmt.Errorf("%w: certificate: %v", ErrMalformed, err)
	}
	w.parts, err = a.Certificate.parts()
	if err != nil {
		return nil, err
	}
	w.revocations = len(w.parts[0].signatures)
	if len(w.entity.Revocations) > 0 {
		return nil, fmt.Errorf("%w: the certificate is revoked", ErrKeyUnusable)
	}
	primary, err := NewKey(a.Primary.Public(), w.entity.PrimaryKey.CreationTime)
	if err != nil {
		return nil, fmt.Errorf("primary key: %w", err)
	}
	if primary.Fingerprint != a.Certificate.master {
		return nil, fmt.Errorf("%w: the signer holds another key than %s", ErrKeyNotFound, a.Certificate.master)
	}
	if last := a.Certificate.LastSigned(); !a.At.After(last) {
		return nil, fmt.Errorf("%w: self-signatures of %s, and there are some of %s", ErrMalformed, stamp(a.At), stamp(last))
	}
	if !expires.IsZero() {
		_, err = seconds(expires)
		if err == nil && !expires.After(a.At) {
			err = fmt.Errorf("%w: expires %s, signed %s", ErrMalformed, stamp(expires), stamp(a.At))
		}
		if err != nil {
			return nil, fmt.Errorf("expiry: %w", err)
		}
	}
	now, err := w.entity.PrimarySelfSignature(time.Time{}, policy(time.Time{}))
	if err != nil {
		return nil, fmt.Errorf("%w: certificate: %v", ErrMalformed, err)
	}
	w.flags = flagCertify
	if now.FlagsValid && now.FlagSign {
		w.flags |= flagSign
	}
	w.expires = expiry(w.entity.PrimaryKey, now)
	w.self = selfSignature{primary, a.Primary, a.At}
	return w, nil
}

// find is the subkey that holds pub, or nil.
func (w *amending) find(pub crypto.PublicKey) *part {
	for i := range w.parts {
		p := &w.parts[i]
		if p.tag != tagPublicSubkey {
			continue
		}
		k, err := NewKey(pub, p.key.CreationTime)
		if err == nil && bytes.Equal(k.Fingerprint[:], p.key.Fingerprint) {
			return p
		}
	}
	return nil
}

// rebind gives a subkey a new binding signature.
func (w *amending) rebind(signer crypto.Signer, expires time.Time) error {
	p := w.find(signer.Public())
	if p == nil {
		return fmt.Errorf("%w: no such subkey of %s", ErrKeyNotFound, w.Certificate.master)
	}
	sub, err := NewKey(signer.Public(), p.key.CreationTime)
	if err != nil {
		return err
	}
	sig, err := w.self.subkey(sub, signer, expires)
	if err != nil {
		return fmt.Errorf("binding the subkey %s: %w", sub.Fingerprint, err)
	}
	p.signatures = append(p.signatures, sig)
	return nil
}

// finish writes the certificate and reads it back, every signature verified.
func (w *amending) finish() ([]byte, error) {
	var out []byte
	for _, p := range w.parts {
		out = appendPacket(out, p.tag, p.body)
		for _, s := range p.signatures {
			out = append(out, s...)
		}
	}
	if len(out) > maxGrown && len(w.parts[0].signatures) == w.revocations {
		return nil, fmt.Errorf("%w: the certificate has grown to %d bytes, over %d; make a new key", ErrUnsupported, len(out), maxGrown)
	}
	c, err := ParseCertificate(out)
	if err == nil && c.master != w.Certificate.master {
		err = fmt.Errorf("the primary key is now %s", c.master)
	}
	if err == nil && !c.LastSigned().Equal(w.At) {
		err = fmt.Errorf("its newest self-signature is of %s, not %s", stamp(c.LastSigned()), stamp(w.At))
	}
	if err != nil {
		return nil, fmt.Errorf("reading back the certificate: %w", err)
	}
	return out, nil
}
