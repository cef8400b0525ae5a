package kmod

import (
	"crypto"
	"crypto/x509"
	"io"

	"github.com/signwarden/signwarden/formats/cms"
)

// Info is what a module is and carries. Nothing of it is verified.
type Info struct {
	Compression Compression
	Size        int64  // bytes of the module, unpacked and without signature
	Signature   []byte // the CMS message; nil: not signed
}

// Inspect reads a module to its end and says what it found.
func Inspect(file io.ReaderAt, size int64) (Info, error) {
	m, err := newModule(file, size)
	if err != nil {
		return Info{}, err
	}
	c, err := m.scan(nil, allLayers)
	if err != nil {
		return Info{}, err
	}
	return Info{m.comp, c.size, c.signature}, nil
}

// CompressionOf tells from its first bytes how a module is packed. It fails with ErrMalformed if they are not a module's.
func CompressionOf(file io.ReaderAt, size int64) (Compression, error) {
	m, err := newModule(file, size)
	return m.comp, err
}

// Recognize reports whether a file starts as a relocatable ELF file, packed or not. That is all that can be said
// without reading it to the end: a compiler's .o files look the same.
func Recognize(file io.ReaderAt, size int64) bool {
	m, err := newModule(file, size)
	if err != nil {
		return false
	}
	return m.read(func(r io.Reader) error {
		var head [elfHeader]byte
		_, err := io.ReadFull(r, head[:])
		if err != nil {
			return err
		}
		_, err = identELF(head[:])
		return err
	}) == nil
}

// Verify checks the signature of a module as cms.SignedData.Verify does, and returns who signed. It fails with
// ErrNotSigned, with ErrMalformed or cms.ErrMalformed, or with cms.ErrBadSignature. Of several signatures on top of
// each other it checks the last, over all that is before it, as the kernel does.
func Verify(file io.ReaderAt, size int64, trusted []*x509.Certificate) ([]cms.Signer, error) {
	m, err := newModule(file, size)
	if err != nil {
		return nil, err
	}
	c, err := m.scan(nil, 1)
	if err != nil {
		return nil, err
	}
	if c.signature == nil {
		return nil, ErrNotSigned
	}
	s, err := cms.Parse(c.signature)
	if err != nil {
		return nil, err
	}
	if s.Content != nil {
		return nil, cms.ErrMalformed // the kernel wants it detached: verify_pkcs7_message_sig
	}
	sums := map[crypto.Hash][]byte{}
	return s.Verify(func(h crypto.Hash) ([]byte, error) {
		if sums[h] == nil {
			again, err := m.scan(h.New(), 1)
			if err != nil {
				return nil, err
			}
			sums[h] = again.digest
		}
		return sums[h], nil
	}, trusted)
}
