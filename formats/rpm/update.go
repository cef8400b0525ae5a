package rpm

import (
	"crypto/sha256"
	"fmt"
	"io"
)

// An Update is a new signature header for the package it was made of. It is never changed.
type Update struct {
	Offset int64  // of the signature header
	Old    []byte // the signature header as it was read, with its padding
	New    []byte // what takes its place

	size   int64 // of the package
	body   int64 // where its payload begins
	prefix [sha256.Size]byte
	around [sha256.Size]byte // as undo.sumAround
	lead   [leadSize]byte
}

// InPlace says that New is as long as Old, so that nothing else in the file moves.
func (u *Update) InPlace() bool { return len(u.Old) == len(u.New) }

// Rest is where, in the old package, main header and payload begin. They follow New as they are.
func (u *Update) Rest() int64 { return u.Offset + int64(len(u.Old)) }

// Size is the length of the new package.
func (u *Update) Size() int64 { return u.size - int64(len(u.Old)) + int64(len(u.New)) }

// Prefix is the new package up to the main header.
func (u *Update) Prefix() []byte { return append(u.lead[:], u.New...) }

// Copy writes the new package to w. old is the package that the Update was made of.
func (u *Update) Copy(w io.Writer, old io.ReaderAt) error {
	_, err := w.Write(u.Prefix())
	if err != nil {
		return fmt.Errorf("writing the package: %w", err)
	}
	rest := io.NewSectionReader(old, u.Rest(), u.size-u.Rest())
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{rest}, make([]byte, copyBuffer))
	if err != nil {
		return fmt.Errorf("copying header and payload: %w", err)
	}
	if n != u.size-u.Rest() {
		return fmt.Errorf("copying header and payload: %w", io.ErrUnexpectedEOF)
	}
	return nil
}

// sumOf all that stands before the payload tells whether a file is still the one that was read.
func sumOf(parts ...[]byte) [sha256.Size]byte {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// update makes the Update that puts list into the signature header.
func (p *Package) update(list []datum) (*Update, error) {
	block, err := layOut(p.sig, list, p.Header.Format == 6)
	if err != nil {
		return nil, err
	}
	return &Update{
		Offset: leadSize,
		Old:    p.block,
		New:    block,
		size:   p.size,
		body:   p.body,
		prefix: sumOf(p.lead[:], p.block, p.Header.h.raw),
		around: sumOf(p.lead[:], p.Header.h.raw),
		lead:   p.lead,
	}, nil
}

// signatureTags are the tags of OpenPGP signatures, all of which go when one is made: what is left of another would be
// stale at best, and at worst what a verifier looks at.
var signatureTags = []uint32{tagDSA, tagRSA, tagOpenPGP, tagPGP, tagGPG, tagPGP5}

// DeleteSignatures makes the Update that removes every signature over the package, and with files those over its files
// too. The package's digests are not looked at.
func DeleteSignatures(p *Package, files bool) (*Update, error) {
	drop := signatureTags
	if files {
		drop = append([]uint32{tagFileSigs, tagFileSigLength}, signatureTags...)
	}
	return p.update(p.sig.keep(drop))
}
