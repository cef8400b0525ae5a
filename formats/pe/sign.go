package pe

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"github.com/signwarden/signwarden/formats/cms"
)

// Options are the choices of one signature.
type Options struct {
	Certificate *x509.Certificate   // of the signer; it is put into the signature
	Chain       []*x509.Certificate // put in too: what firmware needs between Certificate and the one it trusts
	Hash        crypto.Hash         // zero: cms.DefaultHash. All firmware knows SHA-256
	SigningTime time.Time           // zero: not said
	Replace     bool                // take all other signatures off
}

// Sign writes the signed image to w. Nothing is written on failure but with ErrChanged and errors of w.
func (m *Image) Sign(w io.Writer, signer crypto.Signer, o Options) error {
	err := cms.Holds(signer, o.Certificate) // before a long image is read in vain
	if err != nil {
		return err
	}
	h := o.Hash
	if h == 0 {
		h, err = cms.DefaultHash(o.Certificate.PublicKey)
		if err != nil {
			return err
		}
	}
	if !cms.Signs(h) {
		return fmt.Errorf("%w: hash %v", cms.ErrUnsupported, h)
	}
	kept := m.kept(o)
	if len(kept) >= maxSignatures {
		return fmt.Errorf("%w: it has %d signatures", ErrMalformed, len(kept))
	}
	s, err := m.sum(h)
	if err != nil {
		return err
	}
	content, err := spcIndirectData(h, s.hash.Sum(nil))
	if err != nil {
		return fmt.Errorf("encoding the content: %w", err)
	}
	// Authenticode, "Authenticode-Specific Structures": PKCS #7 SignedData whose content is no OCTET STRING.
	der, err := cms.Sign(signer, nil, cms.Options{
		Certificate:  o.Certificate,
		Hash:         h,
		HashNULL:     true,
		Attributes:   true,
		SigningTime:  o.SigningTime,
		Certificates: append([]*x509.Certificate{o.Certificate}, o.Chain...),
		ContentType:  oidIndirectData,
		Content:      content,
		ContentDER:   true,
	})
	if err != nil {
		return err
	}
	var table []byte
	for _, e := range kept {
		table = pad(append(table, e.raw...))
	}
	return m.write(w, s, h, appendEntry(table, der))
}

// kept returns the entries of the certificate table that stay.
func (m *Image) kept(o Options) []entry {
	var all []entry
	for _, e := range m.entries {
		if !o.Replace && !signedBy(e.der, o.Certificate) {
			all = append(all, e)
		}
	}
	return all
}

// signedBy reports whether a signature names cert as its only signer.
func signedBy(der []byte, cert *x509.Certificate) bool {
	if der == nil {
		return false
	}
	s, err := cms.Parse(der)
	return err == nil && len(s.Signers) == 1 && s.Signers[0].Names(cert)
}

// appendEntry adds a signature to a certificate table. Its length takes the padding in, as osslsigncode wants it.
func appendEntry(table, der []byte) []byte {
	table = binary.LittleEndian.AppendUint32(table, uint32(align(int64(entryHeader+len(der)))))
	table = binary.LittleEndian.AppendUint16(table, revision2)
	table = binary.LittleEndian.AppendUint16(table, typePKCS7)
	return pad(append(table, der...))
}

func pad(b []byte) []byte { return append(b, make([]byte, align(int64(len(b)))-int64(len(b)))...) }

// Remove writes the image without signatures to w. Padding that a signature brought along stays: where the image
// ended before cannot be known, and it is part of the digest.
func (m *Image) Remove(w io.Writer) error {
	if m.entries == nil {
		return ErrNotSigned
	}
	s, err := m.sum(crypto.SHA256)
	if err != nil {
		return err
	}
	return m.write(w, s, crypto.SHA256, nil)
}

// write writes the image with a certificate table, which may be empty. before is what the image summed to, by h: the
// checksum in front is made of it, and what is written must sum to the same.
func (m *Image) write(w io.Writer, before *sum, h crypto.Hash, table []byte) error {
	if len(table) > maxTable {
		return fmt.Errorf("%w: certificate table of %d bytes, over %d", ErrMalformed, len(table), maxTable)
	}
	at := align(m.end)
	var directory [8]byte
	if len(table) > 0 {
		binary.LittleEndian.PutUint32(directory[:], uint32(at))
		binary.LittleEndian.PutUint32(directory[4:], uint32(len(table)))
	}
	words := before.words
	words.at = m.directory
	words.Write(directory[:])
	words.at = at
	words.Write(table)
	var checksum [4]byte
	binary.LittleEndian.PutUint32(checksum[:], words.checksum(at+int64(len(table))))
	again := &sum{hash: h.New()}
	err := m.copy(w, again, checksum, directory)
	if err != nil {
		return fmt.Errorf("writing the image: %w", err)
	}
	if !bytes.Equal(again.hash.Sum(nil), before.hash.Sum(nil)) {
		return ErrChanged
	}
	_, err = w.Write(table)
	if err != nil {
		return fmt.Errorf("writing the image: %w", err)
	}
	return nil
}
