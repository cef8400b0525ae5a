package kmod

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"fmt"
	"hash"
	"io"

	"github.com/signwarden/signwarden/formats/cms"
)

// Options are the choices of one signature.
type Options struct {
	Certificate  *x509.Certificate // of the signer; its issuer and serial number must be those in the kernel's keyring
	Hash         crypto.Hash       // zero: cms.DefaultHash. The kernel must have it built in
	SubjectKeyID bool              // name the signer by its key identifier: sign-file -k
	Replace      bool              // replace a signature; else a signed module is refused with ErrSigned
}

// Sign writes the signed module to w, packed as it was. size is the module's. Nothing is written on failure but with
// ErrChanged and errors of w.
func Sign(w io.Writer, file io.ReaderAt, size int64, signer crypto.Signer, o Options) error {
	err := cms.Holds(signer, o.Certificate) // before a long module is read in vain
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
	m, err := newModule(file, size)
	if err != nil {
		return err
	}
	found, err := m.scan(h.New(), allLayers)
	if err != nil {
		return err
	}
	if found.signature != nil && !o.Replace {
		return ErrSigned
	}
	// scripts/sign-file: no attributes, no certificates, detached, digest algorithm without parameters.
	sig, err := cms.Sign(signer, found.digest, cms.Options{
		Certificate:  o.Certificate,
		Hash:         h,
		SubjectKeyID: o.SubjectKeyID,
	})
	if err != nil {
		return err
	}
	if len(sig) > maxSignature {
		return fmt.Errorf("%w: signature of %d bytes", ErrMalformed, len(sig))
	}
	return m.rewrite(w, found, h.New(), appendTrailer(nil, sig))
}

// contents is what scan found in a module.
type contents struct {
	size      int64  // of the module without signatures
	digest    []byte // of those bytes; nil if no hash was passed
	signature []byte // CMS; nil: not signed
}

// scan reads a module to its end, unpacked, and checks that it is one. h, which may be nil, hashes what is under that
// many layers of signatures: the end is held back until it is known not to be one.
func (m module) scan(h hash.Hash, layers int) (contents, error) {
	if h == nil {
		h = discardHash{}
	}
	var c contents
	err := m.read(func(r io.Reader) error {
		var head []byte
		buf := make([]byte, 0, tailSize+64<<10)
		for {
			n, err := io.ReadFull(r, buf[len(buf):cap(buf)])
			end := err == io.EOF || err == io.ErrUnexpectedEOF
			if err != nil && !end {
				return err
			}
			buf = buf[:len(buf)+n]
			if head == nil {
				head = bytes.Clone(buf[:min(len(buf), elfHeader)])
				_, err = identELF(head) // before the rest is unpacked
				if err != nil {
					return err
				}
			}
			if end {
				break
			}
			done := len(buf) - tailSize
			h.Write(buf[:done])
			c.size += int64(done)
			buf = buf[:copy(buf, buf[done:])]
		}
		keep, sig, err := cutTrailers(buf, layers)
		if err != nil {
			return err
		}
		h.Write(buf[:keep])
		c.size += int64(keep)
		c.signature = bytes.Clone(sig)
		return checkELF(head, c.size)
	})
	if err != nil {
		return contents{}, err
	}
	c.digest = h.Sum(nil)
	return c, nil
}

// rewrite writes the module without its signatures and with trailer, packed as it was, and checks with h that it is
// the module that was signed.
func (m module) rewrite(w io.Writer, c contents, h hash.Hash, trailer []byte) error {
	m.room = min(m.room, c.size+int64(tailSize)) // it is known now
	out, err := m.comp.pack(w, c.size)
	if err != nil {
		return fmt.Errorf("packing the module: %w", err)
	}
	err = m.read(func(r io.Reader) error {
		n, err := io.Copy(io.MultiWriter(h, out), io.LimitReader(r, c.size))
		if err == nil && n < c.size {
			return ErrChanged
		}
		return err
	})
	if err == nil && !bytes.Equal(h.Sum(nil), c.digest) {
		err = ErrChanged
	}
	if err == nil {
		_, err = out.Write(trailer)
	}
	if err != nil {
		return fmt.Errorf("writing the module: %w", err)
	}
	err = out.Close()
	if err != nil {
		return fmt.Errorf("writing the module: %w", err)
	}
	return nil
}

// discardHash is for scans that ask for no digest.
type discardHash struct{}

func (discardHash) Write(p []byte) (int, error) { return len(p), nil }
func (discardHash) Sum([]byte) []byte           { return nil }
func (discardHash) Reset()                      {}
func (discardHash) Size() int                   { return 0 }
func (discardHash) BlockSize() int              { return 1 }
