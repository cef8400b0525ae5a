package pe

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"fmt"
	"io"

	"github.com/signwarden/signwarden/formats/cms"
)

// A Signature is one entry of the certificate table, as Verify found it.
type Signature struct {
	DER     []byte       // the CMS message
	Hash    crypto.Hash  // of the image; zero: it cannot be read
	Signers []cms.Signer // if the signature is good
	Err     error        // if it is not: cms.ErrBadSignature, or what cannot be read about it
}

// Verify checks the signatures of an image, each as cms.SignedData.Verify does, and returns all of them, good or not.
// The error is nil if at least one is good, as firmware has it. Else it is ErrNotSigned, or that of the last one.
func (m *Image) Verify(trusted []*x509.Certificate) ([]Signature, error) {
	var all []Signature
	var last error = ErrNotSigned
	good := false
	for _, der := range m.Signatures() {
		s := Signature{DER: der}
		s.Hash, s.Signers, s.Err = m.verify(der, trusted)
		all = append(all, s)
		if s.Err == nil {
			good = true
		} else {
			last = s.Err
		}
	}
	if good {
		return all, nil
	}
	return all, last
}

func (m *Image) verify(der []byte, trusted []*x509.Certificate) (crypto.Hash, []cms.Signer, error) {
	s, err := cms.Parse(der)
	if err != nil {
		return 0, nil, err
	}
	if !s.ContentType.Equal(oidIndirectData) {
		return 0, nil, fmt.Errorf("%w: a signature of content of type %s", ErrMalformed, s.ContentType)
	}
	h, want, err := parseIndirectData(s.Content)
	if err != nil {
		return 0, nil, err
	}
	if !cms.Signs(h) {
		return h, nil, fmt.Errorf("%w: image hash %v, which is not accepted", cms.ErrBadSignature, h)
	}
	who, err := s.Verify(s.ContentDigest, trusted) // before a long image is read in vain
	if err != nil {
		return h, nil, err
	}
	got, err := m.Digest(h)
	if err != nil {
		return h, nil, err
	}
	if !bytes.Equal(got, want) {
		return h, nil, fmt.Errorf("%w: the image is not what was signed", cms.ErrBadSignature)
	}
	return h, who, nil
}

// Recognize reports whether a file starts as a PE image.
func Recognize(file io.ReaderAt, size int64) bool {
	m := &Image{file: file, size: size}
	var dos [64]byte
	var sig [4]byte
	return m.readAt(dos[:], 0) == nil && string(dos[:2]) == "MZ" &&
		m.readAt(sig[:], peOffset(dos)) == nil && string(sig[:]) == "PE\x00\x00"
}
