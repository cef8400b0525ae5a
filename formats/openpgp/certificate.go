package openpgp

import (
	"crypto"
	"encoding/binary"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// MaxUserID is the longest user ID, in bytes. gpg takes 2048; a name and an address need far fewer.
const MaxUserID = 255

// Key flags, section 5.2.3.29.
const (
	flagCertify = 0x01
	flagSign    = 0x02
)

// A CertificateSpec says what NewCertificate makes. All times are whole seconds.
type CertificateSpec struct {
	UserID  string    // by custom "Name <address>"; section 5.11
	Created time.Time // of all keys; part of their fingerprints, so the caller must keep it
	Expires time.Time // of all keys; zero: never
	Signed  time.Time // of the self-signatures; zero: Created. A later one lets a new expiry replace an old one

	Primary crypto.Signer
	Subkey  crypto.Signer // signs documents; nil: Primary both certifies and signs
}

// NewCertificate makes a transferable public key (section 10.1), in binary. With a Subkey the primary may certify
// only and the subkey sign only, and each has signed for the other. Primary is asked for one signature, or two, and
// Subkey for one. The result was parsed and each signature in it verified.
func NewCertificate(spec CertificateSpec) ([]byte, error) {
	if spec.Signed.IsZero() {
		spec.Signed = spec.Created
	}
	err := checkUserID(spec.UserID)
	if err != nil {
		return nil, err
	}
	if spec.Primary == nil {
		return nil, fmt.Errorf("%w: no primary key", ErrMalformed)
	}
	primary, err := spec.key(spec.Primary)
	if err != nil {
		return nil, fmt.Errorf("primary key: %w", err)
	}
	cert := appendPacket(nil, tagPublicKey, primary.body)
	cert = appendPacket(cert, tagUserID, []byte(spec.UserID))
	self := selfSignature{primary, spec.Primary, spec.Signed}
	flags := byte(flagCertify)
	if spec.Subkey == nil {
		flags |= flagSign
	}
	selfSig, err := self.userID(spec.UserID, flags, spec.Expires, true)
	if err != nil {
		return nil, fmt.Errorf("certifying the user ID: %w", err)
	}
	cert = append(cert, selfSig...)
	signing := primary
	if spec.Subkey != nil {
		signing, err = spec.key(spec.Subkey)
		if err != nil {
			return nil, fmt.Errorf("subkey: %w", err)
		}
		if signing.Fingerprint == primary.Fingerprint {
			return nil, fmt.Errorf("%w: primary key and subkey are the same", ErrMalformed)
		}
		binding, err := self.subkey(signing, spec.Subkey, spec.Expires)
		if err != nil {
			return nil, fmt.Errorf("binding the subkey: %w", err)
		}
		cert = appendPacket(cert, tagPublicSubkey, signing.body)
		cert = append(cert, binding...)
	}
	err = spec.check(cert, signing)
	if err != nil {
		return nil, fmt.Errorf("reading back the certificate: %w", err)
	}
	return cert, nil
}

// key is the Key that signer will have in the certificate.
func (s CertificateSpec) key(signer crypto.Signer) (Key, error) {
	k, err := NewKey(signer.Public(), s.Created)
	if err != nil {
		return Key{}, err
	}
	if s.Expires.IsZero() {
		return k, nil
	}
	_, err = seconds(s.Expires)
	if err != nil {
		return Key{}, fmt.Errorf("expiry: %w", err)
	}
	if !s.Expires.After(s.Created) {
		return Key{}, fmt.Errorf("%w: expires %s, created %s", ErrMalformed, stamp(s.Expires), stamp(s.Created))
	}
	k.Expires = s.Expires.UTC()
	return k, nil
}

// lifetime is the key expiration subpacket of a key (section 5.2.3.13): seconds after its creation, absent for never.
func lifetime(b []byte, k Key, expires time.Time) []byte {
	if expires.IsZero() {
		return b
	}
	secs := expires.Unix() - k.Created.Unix() // fits: both are within 1970 to 2106
	return appendSubpacket(b, subKeyLifetime, binary.BigEndian.AppendUint32(nil, uint32(secs))...)
}

// A selfSignature is one that a primary key makes over its own certificate.
type selfSignature struct {
	primary Key
	signer  crypto.Signer // of primary
	at      time.Time
}

// userID makes the positive certification of a user ID, which says as well what the primary key is for, and until when.
func (s selfSignature) userID(id string, flags byte, expires time.Time, main bool) ([]byte, error) {
	extra := appendSubpacket(nil, subKeyFlags, flags)
	extra = lifetime(extra, s.primary, expires)
	if main {
		extra = appendSubpacket(extra, subPrimaryUserID, 1)
	}
	// Nobody can encrypt to this key, but software that asks for preferences should find no weak default:
	// AES-256, 192, 128 (section 9.3); SHA-512, 384, 256; no compression; no features but SEIPD version 1.
	extra = appendSubpacket(extra, subPrefSymmetric, 9, 8, 7)
	extra = appendSubpacket(extra, subPrefHash, 10, 9, 8)
	extra = appendSubpacket(extra, subPrefCompress, 0)
	extra = appendSubpacket(extra, subFeatures, 0x01)
	sig, err := newSignature(s.primary, sigPositiveCert, 0, s.at, extra)
	if err != nil {
		return nil, err
	}
	sig.h.Write(appendHashedKey(nil, s.primary.body))
	uid := binary.BigEndian.AppendUint32([]byte{0xb4}, uint32(len(id))) // section 5.2.4
	sig.h.Write(append(uid, id...))
	return sig.Finish(s.signer)
}

// subkey makes the binding signature of a signing subkey, and in it the subkey's own signature over the primary key:
// without that anyone could claim the subkey's signatures for a certificate of theirs (section 5.2.1.9).
func (s selfSignature) subkey(sub Key, signer crypto.Signer, expires time.Time) ([]byte, error) {
	signed := appendHashedKey(nil, s.primary.body)
	signed = appendHashedKey(signed, sub.body)
	back, err := newSignature(sub, sigPrimaryBind, 0, s.at, nil)
	if err != nil {
		return nil, err
	}
	back.h.Write(signed)
	body, err := back.finish(signer)
	if err != nil {
		return nil, err
	}
	extra := appendSubpacket(nil, subKeyFlags, flagSign)
	extra = lifetime(extra, sub, expires)
	extra = appendSubpacket(extra, subEmbedded, body...)
	sig, err := newSignature(s.primary, sigSubkeyBinding, 0, s.at, extra)
	if err != nil {
		return nil, err
	}
	sig.h.Write(signed)
	return sig.Finish(s.signer)
}

// check reads the certificate as a user of it would, as of the time it was made.
func (s CertificateSpec) check(cert []byte, signing Key) error {
	c, err := ParseCertificate(cert)
	if err != nil {
		return err
	}
	got, err := c.SigningKeyAt(signing.Public, s.Signed)
	if err != nil {
		return err
	}
	if got.Fingerprint != signing.Fingerprint || !got.Expires.Equal(signing.Expires) {
		return fmt.Errorf("read key %s until %v, wrote %s until %v",
			got.Fingerprint, got.Expires, signing.Fingerprint, signing.Expires)
	}
	return nil
}

// checkUserID keeps out what a listing of keys could be fooled with.
func checkUserID(id string) error {
	switch {
	case strings.TrimSpace(id) == "":
		return fmt.Errorf("%w: empty user ID", ErrMalformed)
	case strings.TrimSpace(id) != id:
		return fmt.Errorf("%w: user ID %q begins or ends with blanks", ErrMalformed, id)
	case len(id) > MaxUserID:
		return fmt.Errorf("%w: user ID of %d bytes, over %d", ErrMalformed, len(id), MaxUserID)
	case !utf8.ValidString(id): // section 5.11
		return fmt.Errorf("%w: user ID %q is not UTF-8", ErrMalformed, id)
	}
	for _, r := range id {
		if unicode.In(r, unicode.Cc, unicode.Zl, unicode.Zp, unicode.Bidi_Control) {
			return fmt.Errorf("%w: user ID %q has the control character %U", ErrMalformed, id, r)
		}
	}
	return nil
}
