package fsverity

import (
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/signwarden/signwarden/formats/cms"
)

// Sign computes the digest of a file and returns the CMS message over it, in DER, as `fsverity sign` writes it and
// `fsverity enable --signature` reads it. Its hash is that of the tree, or a longer one that the key asks for.
func Sign(file io.Reader, signer crypto.Signer, cert *x509.Certificate, p Parameters) ([]byte, error) {
	err := cms.Holds(signer, cert)
	if err != nil {
		return nil, err
	}
	p, err = p.check()
	if err != nil {
		return nil, err
	}
	h, err := cms.DefaultHash(cert.PublicKey)
	if err != nil { // found out before the file is read
		return nil, err
	}
	if h.Size() < p.Hash.Size() {
		h = p.Hash
	}
	digest, err := Digest(file, p)
	if err != nil {
		return nil, err
	}
	return cms.Sign(signer, sum(h, p.signed(digest)), cms.Options{Certificate: cert, Hash: h, HashNULL: true})
}

// signed is what the signature covers: a struct fsverity_formatted_digest ("Built-in signature verification").
func (p Parameters) signed(digest []byte) []byte {
	b := append([]byte(nil), "FSVerity"...)
	b = binary.LittleEndian.AppendUint16(b, uint16(algorithms[p.Hash]))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(digest)))
	return append(b, digest...)
}

func sum(h crypto.Hash, b []byte) []byte {
	w := h.New()
	w.Write(b)
	return w.Sum(nil)
}

// Verify checks a signature of a file as cms.SignedData.Verify does, and returns who signed. The parameters must be
// those that it was signed with.
func Verify(file io.Reader, signature []byte, trusted []*x509.Certificate, p Parameters) ([]cms.Signer, error) {
	p, err := p.check()
	if err != nil {
		return nil, err
	}
	s, err := cms.Parse(signature)
	if err != nil {
		return nil, err
	}
	if s.Content != nil {
		return nil, fmt.Errorf("%w: the signature has content of its own", cms.ErrMalformed)
	}
	digest, err := Digest(file, p)
	if err != nil {
		return nil, err
	}
	return s.Verify(func(h crypto.Hash) ([]byte, error) { return sum(h, p.signed(digest)), nil }, trusted)
}
