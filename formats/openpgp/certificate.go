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
	selfSig, err := spec.certify(primary)
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
		binding, err := spec.bind(primary, signing)
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

// lifetime is the key expiration subpacket (section 5.2.3.13): seconds after the key's creation, absent for never.
func (s CertificateSpec) lifetime(b []byte) []byte {
	if s.Expires.IsZero() {
		return b
	}
	secs := s.Expires.Unix() - s.Created.Unix() // fits: both are within 1970 to 2106
	return appendSubpacket(b, subKeyLifetime, binary.BigEndian.AppendUint32(nil, uint32(secs))...)
}

// certify makes the positive certification of the user ID by its own key.
func (s CertificateSpec) certify(primary Key) ([]byte, error) {
	flags := byte(flagCertify)
	if s.Subkey == nil {
		flags |= flagSign
	}
	extra := appendSubpacket(nil, subKeyFlags, flags)
	extra = s.lifetime(extra)
	extra = appendSubpacket(extra, subPrimaryUserID, 1)
	// Nobody can encrypt to this key, but software that asks for preferences should find no weak default:
	// AES-256, 192, 128 (section 9.3); SHA-512, 384, 256; no compression; no features but SEIPD version 1.
	extra = appendSubpacket(extra, subPrefSymmetric, 9, 8, 7)
	extra = appendSubpacket(extra, subPrefHash, 10, 9, 8)
	extra = appendSubpacket(extra, subPrefCompress, 0)
	extra = appendSubpacket(extra, subFeatures, 0x01)
	sig, err := newSignature(primary, sigPositiveCert, 0, s.Signed, extra)
	if err != nil {
		return nil, err
	}
	sig.h.Write(appendHashedKey(nil, primary.body))
	uid := binary.BigEndian.AppendUint32([]byte{0xb4}, uint32(len(s.UserID))) // section 5.2.4
	sig.h.Write(append(uid, s.UserID...))
	return sig.Finish(s.Primary)
}

// bind makes the subkey binding signature, and in it the subkey's own signature over the primary key: without that
// anyone could claim the subkey's signatures for a certificate of theirs (section 5.2.1.9).
func (s CertificateSpec) bind(primary, sub Key) ([]byte, error) {
	signed := appendHashedKey(nil, primary.body)
	signed = appendHashedKey(signed, sub.body)
	back, err := newSignature(sub, sigPrimaryBind, 0, s.Signed, nil)
	if err != nil {
		return nil, err
	}
	back.h.Write(signed)
	body, err := back.finish(s.Subkey)
	if err != nil {
		return nil, err
	}
	extra := appendSubpacket(nil, subKeyFlags, flagSign)
	extra = s.lifetime(extra)
	extra = appendSubpacket(extra, subEmbedded, body...)
	sig, err := newSignature(primary, sigSubkeyBinding, 0, s.Signed, extra)
	if err != nil {
		return nil, err
	}
	sig.h.Write(signed)
	return sig.Finish(s.Primary)
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
