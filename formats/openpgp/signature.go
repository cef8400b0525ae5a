package openpgp

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"math/big"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"github.com/signwarden/signwarden/internal/rsaverify"
)

// maxDER is well over a P-384 signature in DER, which has up to 104 bytes.
const maxDER = 150

// A SigType says what a signature means (section 5.2.1).
type SigType byte

const (
	SigBinary SigType = 0x00 // over a document, as it is
	SigText   SigType = 0x01 // over a text, line ends made CRLF by the caller

	sigPositiveCert  SigType = 0x13
	sigSubkeyBinding SigType = 0x18
	sigPrimaryBind   SigType = 0x19
	sigKeyRevocation SigType = 0x20
)

// SignOptions are the choices of one signature. The zero value is good.
type SignOptions struct {
	Hash  crypto.Hash // zero: Key.DefaultHash
	Time  time.Time   // of the signature, cut to seconds; zero: now
	Armor bool        // DetachSign writes ASCII armor instead of packets
}

// A Signature is one signature in the making: NewSignature, Write the message, then Finish; or Digest, have it signed
// elsewhere, and Assemble. The constructor owns the hash, and there is no reset, because a later version of
// OpenPGP hashes a salt before the message. Not safe for concurrent use.
type Signature struct {
	key    Key
	hash   crypto.Hash
	head   []byte // the hashed fields of the packet
	h      hash.Hash
	digest []byte    // nil while the message is still written
	before hash.Hash // state of h before the trailer, for the check in Assemble
}

// NewSignature starts a signature over a document. It fails with ErrKeyUnusable if the key may not sign at
// o.Time, with ErrUnsupported for a hash that is refused. Certifications are made by NewCertificate only.
func NewSignature(key Key, typ SigType, o SignOptions) (*Signature, error) {
	if typ != SigBinary && typ != SigText {
		return nil, fmt.Errorf("%w: signature type 0x%02x", ErrUnsupported, byte(typ))
	}
	t := o.Time
	if t.IsZero() {
		t = time.Now()
	}
	return newSignature(key, typ, o.Hash, t.Truncate(time.Second), nil)
}

// newSignature starts a signature of any type, with extra hashed subpackets.
func newSignature(key Key, typ SigType, h crypto.Hash, created time.Time, extra []byte) (*Signature, error) {
	if key.parsed == nil {
		return nil, fmt.Errorf("%w: empty Key", ErrUnsupported)
	}
	h, err := key.hash(h)
	if err != nil {
		return nil, err
	}
	err = key.usableAt(created)
	if err != nil {
		return nil, err
	}
	secs, err := seconds(created)
	if err != nil {
		return nil, fmt.Errorf("signature time: %w", err)
	}
	hashed := appendSubpacket(nil, subCreated, binary.BigEndian.AppendUint32(nil, secs)...)
	hashed = appendSubpacket(hashed, subIssuerFpr, append([]byte{4}, key.Fingerprint[:]...)...)
	hashed = append(hashed, extra...)
	head := []byte{4, byte(typ), key.algo, hashIDs[h]} // section 5.2.3
	head = binary.BigEndian.AppendUint16(head, uint16(len(hashed)))
	return &Signature{key: key, hash: h, head: append(head, hashed...), h: h.New()}, nil
}

// Write hashes more of the message. It fails once the digest was taken.
func (s *Signature) Write(p []byte) (int, error) {
	if s.digest != nil {
		return 0, errors.New("write to a signature whose digest was taken")
	}
	return s.h.Write(p)
}

// HashFunc is the hash of the digest.
func (s *Signature) HashFunc() crypto.Hash { return s.hash }

// Trailer returns what is hashed after the message (section 5.2.4). A signer that hashes by itself is sent the
// message and then this.
func (s *Signature) Trailer() []byte {
	t := append([]byte{}, s.head...)
	t = append(t, 4, 0xff)
	return binary.BigEndian.AppendUint32(t, uint32(len(s.head)))
}

// Digest ends the message and returns what is to be signed. It may be called again.
func (s *Signature) Digest() ([]byte, error) {
	if s.digest == nil {
		before, err := s.clone(s.h)
		if err != nil {
			return nil, err
		}
		s.before = before
		s.h.Write(s.Trailer())
		s.digest = s.h.Sum(nil)
	}
	return bytes.Clone(s.digest), nil
}

// clone copies a hash's state; every hash of crypto/sha256 and crypto/sha512 can.
func (s *Signature) clone(h hash.Hash) (hash.Hash, error) {
	c, ok := h.(hash.Cloner)
	if !ok {
		return nil, fmt.Errorf("%w: %v cannot be cloned", ErrUnsupported, s.hash)
	}
	return c.Clone()
}

// SignerOpts is what a crypto.Signer is passed with the digest; see the package comment.
func (s *Signature) SignerOpts() crypto.SignerOpts {
	if s.key.algo == algoEdDSA22 {
		return signerOpts{digest: s.hash}
	}
	return signerOpts{scheme: s.hash, digest: s.hash}
}

type signerOpts struct {
	scheme crypto.Hash // what the signature scheme is told
	digest crypto.Hash // what made the digest
}

func (o signerOpts) HashFunc() crypto.Hash   { return o.scheme }
func (o signerOpts) DigestHash() crypto.Hash { return o.digest }

// Finish has signer sign the digest and returns the signature packet, verified.
func (s *Signature) Finish(signer crypto.Signer) ([]byte, error) {
	body, err := s.finish(signer)
	if err != nil {
		return nil, err
	}
	return appendPacket(nil, tagSignature, body), nil
}

func (s *Signature) finish(signer crypto.Signer) ([]byte, error) {
	err := s.key.holds(signer)
	if err != nil {
		return nil, err
	}
	digest, err := s.Digest()
	if err != nil {
		return nil, err
	}
	raw, err := signer.Sign(rand.Reader, digest, s.SignerOpts())
	if err != nil {
		return nil, fmt.Errorf("signing with key %s: %w", s.key.Fingerprint, err)
	}
	return s.assemble(raw)
}

// Assemble makes the signature packet from what a crypto.Signer returned for the Digest. It fails with
// ErrSignerOutput if that is not a signature by the key over the message.
func (s *Signature) Assemble(raw []byte) ([]byte, error) {
	body, err := s.assemble(raw)
	if err != nil {
		return nil, err
	}
	return appendPacket(nil, tagSignature, body), nil
}

// assemble makes the verified packet's body, which is also how a signature is embedded in another.
func (s *Signature) assemble(raw []byte) ([]byte, error) {
	digest, err := s.Digest()
	if err != nil {
		return nil, err
	}
	fields, err := s.fields(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: key %s: %v", ErrSignerOutput, s.key.Fingerprint, err)
	}
	// Old parsers find the issuer in subpacket 16 only (rpm prints key ID 00000000 without it). It may be
	// unhashed: it is a hint, and the fingerprint in the hashed area decides.
	unhashed := appendSubpacket(nil, subIssuer, s.key.Fingerprint[12:]...)
	body := append([]byte{}, s.head...)
	body = binary.BigEndian.AppendUint16(body, uint16(len(unhashed)))
	body = append(body, unhashed...)
	body = append(body, digest[:2]...)
	body = append(body, fields...)
	err = s.check(appendPacket(nil, tagSignature, body))
	if err != nil {
		return nil, fmt.Errorf("%w: key %s: %v", ErrSignerOutput, s.key.Fingerprint, err)
	}
	return body, nil
}

// check has go-crypto parse the packet, hash its own reading of the trailer, and verify; of RSA signatures the last step
// is rsaverify's, which takes a third of the time.
func (s *Signature) check(pkt []byte) error {
	p, err := packet.Read(bytes.NewReader(pkt))
	if err != nil {
		return err
	}
	sig, ok := p.(*packet.Signature)
	if !ok {
		return fmt.Errorf("made a %T", p)
	}
	h, err := s.clone(s.before) // VerifySignature writes to it, and Assemble may be tried again
	if err != nil {
		return err
	}
	k, ok := s.key.Public.(*rsa.PublicKey)
	if !ok || sig.RSASignature == nil {
		return s.key.parsed.VerifySignature(h, sig)
	}
	_, err = h.Write(sig.HashSuffix)
	if err != nil {
		return err
	}
	digest, raw := h.Sum(nil), sig.RSASignature.Bytes()
	if !bytes.Equal(digest[:2], sig.HashTag[:]) || len(raw) > k.Size() {
		return rsa.ErrVerification
	}
	// As an MPI it has lost its zeros.
	return rsaverify.PKCS1v15(k, sig.Hash, digest, append(make([]byte, k.Size()-len(raw)), raw...))
}

// fields turns a crypto.Signer's answer into the MPIs of section 5.2.3.1 and following.
func (s *Signature) fields(raw []byte) ([]byte, error) {
	switch s.key.algo {
	case algoRSA:
		if size := s.key.Public.(*rsa.PublicKey).Size(); len(raw) != size {
			return nil, fmt.Errorf("the RSA signature has %d bytes, not %d", len(raw), size)
		}
		return appendMPI(nil, raw), nil
	case algoECDSA:
		var sig struct{ R, S *big.Int }
		if len(raw) > maxDER {
			return nil, fmt.Errorf("the ECDSA signature has %d bytes", len(raw))
		}
		rest, err := asn1.Unmarshal(raw, &sig)
		if err != nil || len(rest) != 0 || sig.R.Sign() <= 0 || sig.S.Sign() <= 0 {
			return nil, fmt.Errorf("the ECDSA signature of %d bytes is not ASN.1 DER", len(raw))
		}
		return appendMPI(appendMPI(nil, sig.R.Bytes()), sig.S.Bytes()), nil
	case algoEdDSA22:
		if len(raw) != 64 {
			return nil, fmt.Errorf("the Ed25519 signature has %d bytes, not 64", len(raw))
		}
		return appendMPI(appendMPI(nil, raw[:32]), raw[32:]), nil
	default:
		return nil, fmt.Errorf("public-key algorithm %d", s.key.algo)
	}
}
