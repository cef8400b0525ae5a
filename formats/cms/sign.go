package cms

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Options are the switches of one message. The zero value but for Certificate is the kernel's form: detached, without
// attributes, without certificates.
type Options struct {
	Certificate *x509.Certificate // of the signer; needed
	Hash        crypto.Hash       // zero: DefaultHash of the certificate's key
	PSS         bool              // RSASSA-PSS instead of PKCS #1 v1.5
	HashNULL    bool              // the digest algorithm has NULL parameters, not none

	// SubjectKeyID names the signer by the certificate's subject key identifier, not by issuer and serial number.
	SubjectKeyID bool

	// Attributes signs the content type and the digest as attributes, and SigningTime if it is not zero. More are
	// finished Attribute values. Both need Attributes.
	Attributes  bool
	SigningTime time.Time
	More        [][]byte

	// Certificates are put into the message: usually Certificate and what a verifier needs to reach its root.
	Certificates []*x509.Certificate

	// Bare leaves the ContentInfo around the SignedData out, as EFI variables want it.
	Bare bool

	// ContentType is of the content; nil: id-data.
	ContentType asn1.ObjectIdentifier

	// Content is put into the message; nil: detached. ContentDER says that it is one DER element, put in as it is,
	// as PKCS #7 (RFC 2315, section 7) allowed and Authenticode does. Its digest is then over the element without tag
	// and length (RFC 2315, section 9.3), and the version is that of PKCS #7.
	Content    []byte
	ContentDER bool
}

// A Message is one message in the making: have Digest signed, then Assemble. It is not changed after Prepare, and is
// safe for concurrent use.
type Message struct {
	o      Options
	typ    asn1.ObjectIdentifier
	scheme scheme
	attrs  []byte // DER of the SET, as it is hashed; nil: none
	digest []byte // to be signed
}

// Prepare starts a message. digest is the hash of the content; with Options.Content it may be nil, and is checked if
// it is not.
func Prepare(digest []byte, o Options) (*Message, error) {
	if o.Certificate == nil {
		return nil, fmt.Errorf("%w: no certificate", ErrUnsupported)
	}
	h, err := checkHash(o.Certificate.PublicKey, o.Hash)
	if err != nil {
		return nil, err
	}
	_, isRSA := o.Certificate.PublicKey.(*rsa.PublicKey)
	if o.PSS && !isRSA {
		return nil, fmt.Errorf("%w: PSS with %s", ErrUnsupported, keyName(o.Certificate.PublicKey))
	}
	if o.SubjectKeyID && len(o.Certificate.SubjectKeyId) == 0 {
		return nil, fmt.Errorf("%w: the certificate has no subject key identifier", ErrUnsupported)
	}
	if !o.Attributes && (!o.SigningTime.IsZero() || len(o.More) > 0) {
		return nil, fmt.Errorf("%w: attributes in a message without", ErrUnsupported)
	}
	if len(o.Certificates) > maxCertificates {
		return nil, fmt.Errorf("%w: %d certificates, over %d", ErrUnsupported, len(o.Certificates), maxCertificates)
	}
	o.Content = bytes.Clone(o.Content)
	digest, err = contentDigest(digest, h, o)
	if err != nil {
		return nil, err
	}
	m := &Message{o: o, typ: o.ContentType, scheme: scheme{hash: h, pss: o.PSS, salt: h.Size()}, digest: digest}
	if m.typ == nil {
		m.typ = oidData
	}
	// Section 5.3: attributes must be there if the content is not id-data. PKCS #7 has the same rule.
	if !o.Attributes && !m.typ.Equal(oidData) {
		return nil, fmt.Errorf("%w: content of type %s needs signed attributes", ErrUnsupported, m.typ)
	}
	if o.Attributes {
		m.attrs, err = m.attributes(digest)
		if err != nil {
			return nil, err
		}
		m.digest = sum(h, m.attrs) // section 5.4: of the SET OF, not of the [0] that is written
	}
	return m, nil
}

// contentDigest returns the digest of the content, from the caller or from the content that is put in.
func contentDigest(digest []byte, h crypto.Hash, o Options) ([]byte, error) {
	if o.Content == nil {
		if o.ContentDER {
			return nil, fmt.Errorf("%w: ContentDER without content", ErrUnsupported)
		}
		if len(digest) != h.Size() {
			return nil, fmt.Errorf("%w: a digest of %d bytes is not of %v", ErrMalformed, len(digest), h)
		}
		return bytes.Clone(digest), nil
	}
	content := o.Content
	if o.ContentDER {
		var tag cbasn1.Tag
		var body cryptobyte.String
		in := cryptobyte.String(o.Content)
		if !in.ReadAnyASN1(&body, &tag) || !in.Empty() {
			return nil, fmt.Errorf("%w: the content is not one DER element", ErrMalformed)
		}
		content = body
	}
	own := sum(h, content)
	if digest != nil && !bytes.Equal(digest, own) {
		return nil, fmt.Errorf("%w: the digest is not of the content", ErrMalformed)
	}
	return own, nil
}

func sum(h crypto.Hash, b []byte) []byte {
	w := h.New()
	w.Write(b)
	return w.Sum(nil)
}

// Digest is what is to be signed, made by the hash that SignerOpts names.
func (m *Message) Digest() []byte { return bytes.Clone(m.digest) }

// SignerOpts is what a crypto.Signer is passed with the digest; see the package comment.
func (m *Message) SignerOpts() crypto.SignerOpts {
	if m.scheme.pss {
		return &rsa.PSSOptions{SaltLength: m.scheme.salt, Hash: m.scheme.hash}
	}
	return signerOpts{m.scheme.hash}
}

type signerOpts struct{ crypto.Hash }

func (o signerOpts) DigestHash() crypto.Hash { return o.Hash }

// Sign makes the message: Prepare, the signer, Assemble.
func Sign(signer crypto.Signer, digest []byte, o Options) ([]byte, error) {
	err := Holds(signer, o.Certificate)
	if err != nil {
		return nil, err
	}
	m, err := Prepare(digest, o)
	if err != nil {
		return nil, err
	}
	raw, err := signer.Sign(rand.Reader, m.Digest(), m.SignerOpts())
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	return m.Assemble(raw)
}

// Holds says with ErrWrongKey that signer's key is not the certificate's. Whoever reads a long file before Sign asks
// this first.
func Holds(signer crypto.Signer, cert *x509.Certificate) error {
	if cert == nil {
		return fmt.Errorf("%w: no certificate", ErrUnsupported)
	}
	pub, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok {
		return fmt.Errorf("%w: key of type %T", ErrUnsupported, cert.PublicKey)
	}
	if signer == nil || !pub.Equal(signer.Public()) {
		return fmt.Errorf("%w: certificate %q", ErrWrongKey, cert.Subject)
	}
	return nil
}

// Assemble makes the message from what a crypto.Signer returned for the Digest. It fails with ErrSignerOutput if that
// is not a signature by the certificate's key.
func (m *Message) Assemble(raw []byte) ([]byte, error) {
	pub := m.o.Certificate.PublicKey
	sig := raw
	if k, ok := pub.(*rsa.PublicKey); ok && len(raw) < k.Size() {
		// RFC 8017, section 8.2.1: as long as the modulus. Some tokens and cloud services cut leading zeros; the
		// kernel rejects one signature in 256 of theirs (Debian bug 1012741).
		sig = append(make([]byte, k.Size()-len(raw)), raw...)
	}
	err := m.scheme.verify(pub, m.digest, sig)
	if err != nil {
		return nil, fmt.Errorf("%w: certificate %q: %v", ErrSignerOutput, m.o.Certificate.Subject, err)
	}
	return m.encode(sig)
}
