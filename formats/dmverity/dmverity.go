// Package dmverity signs the root hashes of dm-verity devices with keys that it never sees.
//
// dm-verity checks a block device against a Merkle tree, which the one hash at its root stands for; veritysetup
// computes that. Sign makes the CMS message over it that the kernel checks when the device is set up (the table's
// root_hash_sig_key_desc), and that systemd takes as NAME.roothash.p7s or in a partition of verity signatures. The
// content is the hash as the device's table has it: hexadecimal digits, no line end.
//
// It promises that nothing is returned before the signature was checked with the certificate, and that the signer is
// asked about root hashes only. It reads no device, opens no file and no connection, and imports of Signwarden only
// formats/cms, whose package comment says what a signer is asked.
package dmverity

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/signwarden/signwarden/formats/cms"
)

// ErrMalformed says that input is no root hash.
var ErrMalformed = errors.New("not a root hash")

// MaxFile bounds a file with a root hash, in bytes: those of SHA-512, and a line end of either kind.
const MaxFile = 128 + 2

// ParseRootHash reads the root hash of SHA-256, SHA-384 or SHA-512, as veritysetup --root-hash-file writes it; one line
// end may follow. Digits in upper case are refused: the kernel compares bytes, and all tools write them in lower case.
func ParseRootHash(b []byte) (string, error) {
	if n := len(b); n > MaxFile {
		return "", fmt.Errorf("%w: %d bytes", ErrMalformed, n)
	}
	b = bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	switch len(b) {
	case 2 * 32, 2 * 48, 2 * 64:
	default:
		return "", fmt.Errorf("%w: %d bytes, not 64, 96 or 128 digits", ErrMalformed, len(b))
	}
	for _, c := range b {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return "", fmt.Errorf("%w: %q is not a hexadecimal digit in lower case", ErrMalformed, c)
		}
	}
	return string(b), nil
}

// Sign makes the CMS message over a root hash, in DER, as
//
//	openssl smime -sign -nocerts -noattr -binary -outform der
//
// does. A hash of zero is the key's default, as cms.DefaultHash says.
func Sign(rootHash string, signer crypto.Signer, cert *x509.Certificate, h crypto.Hash) ([]byte, error) {
	err := cms.Holds(signer, cert)
	if err != nil {
		return nil, err
	}
	content, err := ParseRootHash([]byte(rootHash))
	if err != nil {
		return nil, err
	}
	if h == 0 {
		h, err = cms.DefaultHash(cert.PublicKey)
		if err != nil {
			return nil, err
		}
	}
	if !cms.Signs(h) {
		return nil, fmt.Errorf("%w: hash %v", cms.ErrUnsupported, h)
	}
	return cms.Sign(signer, sum(h, content), cms.Options{Certificate: cert, Hash: h, HashNULL: true})
}

// Verify checks the signature of a root hash as cms.SignedData.Verify does, and returns who signed.
func Verify(rootHash string, signature []byte, trusted []*x509.Certificate) ([]cms.Signer, error) {
	content, err := ParseRootHash([]byte(rootHash))
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
	return s.Verify(func(h crypto.Hash) ([]byte, error) { return sum(h, content), nil }, trusted)
}

func sum(h crypto.Hash, text string) []byte {
	w := h.New()
	w.Write([]byte(text))
	return w.Sum(nil)
}
