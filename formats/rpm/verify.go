package rpm

import (
	"bytes"
	"crypto"
	"encoding/base64"
	"fmt"
	"io"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// A Signature is one that a package carries, and what it says of itself: nothing of that is verified.
type Signature struct {
	Tag     int
	Payload bool   // over header and payload, not the header alone
	Packet  []byte // OpenPGP

	Key       openpgp.Fingerprint // zero where it has only a KeyID
	KeyID     uint64
	Created   time.Time
	Hash      crypto.Hash
	Algorithm int   // OpenPGP's number
	Err       error // why the packet cannot be read, and the five above are zero
}

// Signatures lists the signatures over the package in the order of their tags.
func (p *Package) Signatures() ([]Signature, error) {
	var list []Signature
	for _, tag := range []uint32{tagDSA, tagRSA, tagOpenPGP, tagPGP, tagGPG} {
		packets, err := p.packets(tag)
		if err != nil {
			return nil, err
		}
		for _, pkt := range packets {
			s := Signature{Tag: int(tag), Payload: tag == tagPGP || tag == tagGPG, Packet: pkt}
			s.describe()
			list = append(list, s)
		}
	}
	return list, nil
}

func (p *Package) packets(tag uint32) ([][]byte, error) {
	if tag != tagOpenPGP {
		b, err := p.sig.typed(tag, typeBin)
		if err != nil || b == nil {
			return nil, err
		}
		return [][]byte{bytes.Clone(b)}, nil
	}
	texts, err := p.sig.texts(tag, maxSignatures)
	if err != nil {
		return nil, err
	}
	var list [][]byte
	for _, s := range texts {
		pkt, err := base64.StdEncoding.DecodeString(string(s))
		if err != nil {
			return nil, fmt.Errorf("%w: tag %d: %v", ErrMalformed, tag, err)
		}
		list = append(list, pkt)
	}
	return list, nil
}

func (s *Signature) describe() {
	if len(s.Packet) > openpgp.MaxSignature {
		s.Err = fmt.Errorf("%w: signature of %d bytes", ErrMalformed, len(s.Packet))
		return
	}
	r := bytes.NewReader(s.Packet)
	read, err := packet.Read(r)
	if err != nil {
		s.Err = fmt.Errorf("%w: %v", ErrMalformed, err)
		return
	}
	if r.Len() > 0 { // rpm takes the first packet, and other software another
		s.Err = fmt.Errorf("%w: %d bytes after the signature", ErrMalformed, r.Len())
		return
	}
	sig, ok := read.(*packet.Signature)
	if !ok {
		s.Err = fmt.Errorf("%w: a %T instead of a signature", ErrMalformed, read)
		return
	}
	if len(sig.IssuerFingerprint) == len(s.Key) {
		copy(s.Key[:], sig.IssuerFingerprint)
		s.KeyID = s.Key.KeyID()
	}
	if sig.IssuerKeyId != nil {
		s.KeyID = *sig.IssuerKeyId
	}
	s.Created, s.Hash, s.Algorithm = sig.CreationTime.UTC(), sig.Hash, int(sig.PubKeyAlgo)
}

// A Verified is a signature that the certificate made.
type Verified struct {
	Signature
	Info openpgp.SignatureInfo
}

// Verify checks the package against its digests, and its signatures with the certificate. It looks at the signatures that
// rpm looks at: where there is tag 278, one in that list must be good, and 267 and 268 count for nothing; else each of
// those must be good that are there. One over the payload must be good too if there is one.
//
// Without payload the payload stays unread, and signatures over it unverified; that fails for a package whose header does
// not cover its payload. It fails with ErrNotSigned if there is no signature to look at, with openpgp.ErrBadSignature if one
// is not good, with ErrDigest, or with ErrMalformed.
func (p *Package) Verify(cert *openpgp.Certificate, payload bool) ([]Verified, error) {
	sigs, err := p.Signatures()
	if err != nil {
		return nil, err
	}
	err = p.CheckDigests(payload)
	if err != nil {
		return nil, err
	}
	var list, legacy, whole []Signature
	for _, s := range sigs {
		switch {
		case s.Tag == tagOpenPGP:
			list = append(list, s)
		case s.Payload:
			whole = append(whole, s)
		default:
			legacy = append(legacy, s)
		}
	}
	if !payload {
		whole = nil
	}
	needed := whole
	if p.Header.coversPayload() {
		needed = append(append(needed, list...), legacy...)
	}
	if len(needed) == 0 {
		return nil, fmt.Errorf("%w, or not so that it can be verified without its payload", ErrNotSigned)
	}
	var good []Verified
	if len(list) > 0 {
		good, err = p.oneOf(cert, list)
	} else {
		good, err = p.each(cert, legacy)
	}
	if err != nil {
		return nil, err
	}
	more, err := p.each(cert, whole)
	if err != nil {
		return nil, err
	}
	return append(good, more...), nil
}

// each verifies signatures all of which must be good.
func (p *Package) each(cert *openpgp.Certificate, sigs []Signature) ([]Verified, error) {
	var good []Verified
	for _, s := range sigs {
		v, err := p.verify(cert, s)
		if err != nil {
			return nil, err
		}
		good = append(good, v)
	}
	return good, nil
}

// oneOf verifies signatures of several signers: the certificate is of one.
func (p *Package) oneOf(cert *openpgp.Certificate, sigs []Signature) ([]Verified, error) {
	var good []Verified
	var first error
	for _, s := range sigs {
		v, err := p.verify(cert, s)
		switch {
		case err == nil:
			good = append(good, v)
		case first == nil:
			first = err
		}
	}
	if len(good) == 0 {
		return nil, first
	}
	return good, nil
}

func (p *Package) verify(cert *openpgp.Certificate, s Signature) (Verified, error) {
	if s.Err != nil {
		return Verified{}, fmt.Errorf("signature in tag %d: %w", s.Tag, s.Err)
	}
	var message io.Reader = bytes.NewReader(p.Header.h.raw)
	if s.Payload {
		message = io.NewSectionReader(p.r, p.header, p.size-p.header)
	}
	info, err := openpgp.VerifyDetached(cert, message, bytes.NewReader(s.Packet))
	if err != nil {
		return Verified{}, fmt.Errorf("signature in tag %d: %w", s.Tag, err)
	}
	if info.Type != openpgp.SigBinary {
		return Verified{}, fmt.Errorf("signature in tag %d: %w: type 0x%02x", s.Tag, openpgp.ErrBadSignature, byte(info.Type))
	}
	return Verified{s, info}, nil
}
