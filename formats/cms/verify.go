package cms

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// A Signer is who signed, as Verify found it.
type Signer struct {
	// Certificate is the signer's. Nobody has looked at its validity in time, its key usage or a revocation: the
	// kernel and EFI firmware do not either, and who does has SigningTime, which is only the signer's word.
	Certificate *x509.Certificate
	Hash        crypto.Hash
	PSS         bool
	SigningTime time.Time // zero: none

	// Attributes says that the signature is over attributes. Without, it is over the content itself, and a message
	// with attributes can be turned into one without, whose content is the DER of those attributes: who signs and
	// verifies any content has to insist on one of the two.
	Attributes bool
}

// Verify checks the signatures of a message, and returns who signed. digest returns the hash of the content, detached
// or not, for each hash that it is asked for.
//
// trusted are certificates of signers, or of those who issued the certificates of signers that the message brings
// along. At least one signature must be by one of them, and each that is must be good; signatures of strangers are
// passed over. Else the error is ErrBadSignature, or that of digest.
func (s *SignedData) Verify(digest func(crypto.Hash) ([]byte, error), trusted []*x509.Certificate) ([]Signer, error) {
	var good []Signer
	for i := range s.Signers {
		info := &s.Signers[i]
		cert := s.signerOf(info, trusted)
		if cert == nil {
			continue
		}
		if !Signs(info.Hash) {
			return nil, fmt.Errorf("%w: by %q with %v, which is not accepted", ErrBadSignature, cert.Subject, info.Hash)
		}
		d, err := digest(info.Hash)
		if err != nil {
			return nil, err
		}
		err = s.check(info, cert, d)
		if err != nil {
			return nil, fmt.Errorf("%w: by %q: %v", ErrBadSignature, cert.Subject, err)
		}
		good = append(good, Signer{cert, info.Hash, info.PSS, info.SigningTime, info.Attributes})
	}
	if len(good) == 0 {
		return nil, fmt.Errorf("%w: none of %d signatures is by a certificate given", ErrBadSignature, len(s.Signers))
	}
	return good, nil
}

// check checks one signature over a content of that digest (section 5.6).
func (s *SignedData) check(info *SignerInfo, cert *x509.Certificate, digest []byte) error {
	_, err := hashesOf(cert.PublicKey) // bounds the work
	if err != nil {
		return err
	}
	if len(digest) != info.Hash.Size() {
		return fmt.Errorf("a digest of %d bytes is not of %v", len(digest), info.Hash)
	}
	if info.attrs == nil {
		if !s.ContentType.Equal(oidData) {
			return fmt.Errorf("content of type %s without signed attributes", s.ContentType) // section 5.3
		}
		return info.scheme.verify(cert.PublicKey, digest, info.signature)
	}
	if !info.contentType.Equal(s.ContentType) {
		return fmt.Errorf("the content is of type %s, the signed type is %s", s.ContentType, info.contentType)
	}
	if !bytes.Equal(info.messageDigest, digest) {
		return errors.New("the content is not what was signed")
	}
	return info.scheme.verify(cert.PublicKey, sum(info.Hash, info.attrs), info.signature)
}

// Names reports whether the SignerInfo means cert.
func (i *SignerInfo) Names(cert *x509.Certificate) bool {
	if i.Serial == nil {
		return bytes.Equal(i.SubjectKeyID, cert.SubjectKeyId)
	}
	return bytes.Equal(i.Issuer, cert.RawIssuer) && i.Serial.Cmp(cert.SerialNumber) == 0
}

// signerOf returns the certificate of a signer if it is trusted, or one of the message that leads to a trusted one.
func (s *SignedData) signerOf(info *SignerInfo, trusted []*x509.Certificate) *x509.Certificate {
	for _, c := range trusted {
		if info.Names(c) {
			return c
		}
	}
	for _, c := range s.Certificates {
		if info.Names(c) && s.leadsTo(c, trusted, make([]bool, len(s.Certificates))) {
			return c
		}
	}
	return nil
}

// leadsTo reports whether cert was issued by a trusted certificate, directly or through certificates of the message.
// Each of those is visited once, so that a hostile message costs no more than the square of maxCertificates checks.
func (s *SignedData) leadsTo(cert *x509.Certificate, trusted []*x509.Certificate, seen []bool) bool {
	for _, issuer := range trusted {
		if issued(issuer, cert) {
			return true
		}
	}
	for i, issuer := range s.Certificates {
		if !seen[i] && issued(issuer, cert) {
			seen[i] = true
			if s.leadsTo(issuer, trusted, seen) {
				return true
			}
		}
	}
	return false
}

func issued(issuer, cert *x509.Certificate) bool {
	_, err := hashesOf(issuer.PublicKey)
	return err == nil && bytes.Equal(issuer.RawSubject, cert.RawIssuer) && cert.CheckSignatureFrom(issuer) == nil
}
