package cms

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// What Parse takes at most. MaxSize is in bytes: a message with a chain of RSA-4096 certificates has some 6 KiB.
const (
	MaxSize         = 1 << 20
	maxCertificates = 32
	maxSigners      = 16
	maxAttributes   = 64
)

// A SignedData is a parsed message. It is not changed after Parse, and is safe for concurrent use.
type SignedData struct {
	Version     int
	ContentType asn1.ObjectIdentifier
	Content     []byte // the DER element of the content; nil: detached
	Signers     []SignerInfo

	// Certificates are those of the message that crypto/x509 reads, in their order. Others are passed over: they
	// sign nothing here.
	Certificates []*x509.Certificate
}

// A SignerInfo is one signature of a message, which Verify has not seen yet: it is what the message says.
type SignerInfo struct {
	Issuer       []byte   // DER of the name; nil: named by SubjectKeyID
	Serial       *big.Int // nil: named by SubjectKeyID
	SubjectKeyID []byte
	Hash         crypto.Hash // SHA-1 is shown, but verifies nothing
	PSS          bool
	Attributes   bool      // whether there are signed attributes
	SigningTime  time.Time // a signed claim; zero: none

	scheme        scheme
	attrs         []byte // DER of the SET, as it is hashed; nil: none
	contentType   asn1.ObjectIdentifier
	messageDigest []byte
	signature     []byte
}

// Parse reads a message, with ContentInfo or bare, and nothing after it. It fails with ErrMalformed, or with
// ErrUnsupported where a signature's algorithm is not known.
func Parse(der []byte) (*SignedData, error) {
	if len(der) > MaxSize {
		return nil, fmt.Errorf("%w: CMS of %d bytes, over %d", ErrMalformed, len(der), MaxSize)
	}
	in := cryptobyte.String(bytes.Clone(der)) // the result refers to it
	var body cryptobyte.String
	if !in.ReadASN1(&body, cbasn1.SEQUENCE) || !in.Empty() {
		return nil, fmt.Errorf("%w: not one DER sequence", ErrMalformed)
	}
	if body.PeekASN1Tag(cbasn1.OBJECT_IDENTIFIER) { // ContentInfo, section 3
		var oid asn1.ObjectIdentifier
		var inner, sd cryptobyte.String
		if !body.ReadASN1ObjectIdentifier(&oid) || !oid.Equal(oidSignedData) {
			return nil, fmt.Errorf("%w: not SignedData", ErrMalformed)
		}
		if !body.ReadASN1(&inner, context(0)) || !body.Empty() || !inner.ReadASN1(&sd, cbasn1.SEQUENCE) || !inner.Empty() {
			return nil, fmt.Errorf("%w: ContentInfo", ErrMalformed)
		}
		body = sd
	}
	return parseSignedData(body)
}

// parseSignedData reads the fields of section 5.1.
func parseSignedData(in cryptobyte.String) (*SignedData, error) {
	var s SignedData
	var digests, content cryptobyte.String
	if !in.ReadASN1Integer(&s.Version) || s.Version < 1 || s.Version > 5 ||
		!in.ReadASN1(&digests, cbasn1.SET) || !in.ReadASN1(&content, cbasn1.SEQUENCE) {
		return nil, fmt.Errorf("%w: SignedData", ErrMalformed)
	}
	var inner cryptobyte.String
	var there bool
	if !content.ReadASN1ObjectIdentifier(&s.ContentType) ||
		!content.ReadOptionalASN1(&inner, &there, context(0)) || !content.Empty() {
		return nil, fmt.Errorf("%w: encapsulated content", ErrMalformed)
	}
	if there {
		s.Content = inner
		var element cryptobyte.String
		var tag cbasn1.Tag
		if !inner.ReadAnyASN1Element(&element, &tag) || !inner.Empty() {
			return nil, fmt.Errorf("%w: the content is not one DER element", ErrMalformed)
		}
	}
	var certs, crls, infos cryptobyte.String
	if !in.ReadOptionalASN1(&certs, &there, context(0)) || !in.ReadOptionalASN1(&crls, nil, context(1)) ||
		!in.ReadASN1(&infos, cbasn1.SET) || !in.Empty() {
		return nil, fmt.Errorf("%w: SignedData", ErrMalformed)
	}
	err := s.parseCertificates(certs)
	if err != nil {
		return nil, err
	}
	for !infos.Empty() {
		if len(s.Signers) == maxSigners {
			return nil, fmt.Errorf("%w: over %d signers", ErrMalformed, maxSigners)
		}
		info, err := parseSignerInfo(&infos)
		if err != nil {
			return nil, err
		}
		s.Signers = append(s.Signers, info)
	}
	return &s, nil
}

// ContentDigest returns the hash of the content in the message: of its element without tag and length, which is right
// for the OCTET STRING of CMS (section 5.4) and for whatever PKCS #7 has there (RFC 2315, section 9.3). It is what
// Verify asks for if the message is not detached.
func (s *SignedData) ContentDigest(h crypto.Hash) ([]byte, error) {
	in := cryptobyte.String(s.Content)
	var body cryptobyte.String
	var tag cbasn1.Tag
	if !in.ReadAnyASN1(&body, &tag) || !in.Empty() {
		return nil, fmt.Errorf("%w: no content in the message", ErrMalformed)
	}
	return sum(h, body), nil
}

func (s *SignedData) parseCertificates(in cryptobyte.String) error {
	for n := 0; !in.Empty(); n++ {
		if n == maxCertificates {
			return fmt.Errorf("%w: over %d certificates", ErrMalformed, maxCertificates)
		}
		var der cryptobyte.String
		var tag cbasn1.Tag
		if !in.ReadAnyASN1Element(&der, &tag) {
			return fmt.Errorf("%w: certificates", ErrMalformed)
		}
		c, err := x509.ParseCertificate(der)
		if err == nil {
			s.Certificates = append(s.Certificates, c)
		}
	}
	return nil
}

// parseSignerInfo reads the fields of section 5.3.
func parseSignerInfo(in *cryptobyte.String) (SignerInfo, error) {
	var s SignerInfo
	var body, digestAlg, sigAlg, attrs, signature cryptobyte.String
	var version int
	if !in.ReadASN1(&body, cbasn1.SEQUENCE) || !body.ReadASN1Integer(&version) {
		return s, fmt.Errorf("%w: SignerInfo", ErrMalformed)
	}
	err := s.parseIdentifier(&body, version)
	if err != nil {
		return s, err
	}
	if !body.ReadASN1(&digestAlg, cbasn1.SEQUENCE) || !body.ReadOptionalASN1(&attrs, &s.Attributes, context(0)) ||
		!body.ReadASN1(&sigAlg, cbasn1.SEQUENCE) || !body.ReadASN1(&signature, cbasn1.OCTET_STRING) ||
		!body.SkipOptionalASN1(context(1)) || !body.Empty() { // [1] are unsigned attributes: time stamps, nested signatures
		return s, fmt.Errorf("%w: SignerInfo", ErrMalformed)
	}
	s.signature = signature
	s.Hash, err = parseDigestAlgorithm(digestAlg)
	if err != nil {
		return s, err
	}
	s.scheme, err = parseSignatureAlgorithm(sigAlg, s.Hash)
	if err != nil {
		return s, err
	}
	s.PSS = s.scheme.pss
	if s.Attributes {
		s.attrs, err = setOfRaw(attrs)
		if err != nil {
			return s, err
		}
		return s, s.parseAttributes(attrs)
	}
	return s, nil
}

// parseIdentifier reads the SignerIdentifier, whose form the version tells (section 5.3).
func (s *SignerInfo) parseIdentifier(in *cryptobyte.String, version int) error {
	var id cryptobyte.String
	switch {
	case version == 3 && in.ReadASN1(&id, cbasn1.Tag(0).ContextSpecific()) && len(id) > 0:
		s.SubjectKeyID = id
		return nil
	case version == 1 && in.ReadASN1(&id, cbasn1.SEQUENCE):
		var issuer cryptobyte.String
		s.Serial = new(big.Int)
		if id.ReadASN1Element(&issuer, cbasn1.SEQUENCE) && id.ReadASN1Integer(s.Serial) && id.Empty() {
			s.Issuer = issuer
			return nil
		}
	}
	return fmt.Errorf("%w: signer identifier of a SignerInfo of version %d", ErrMalformed, version)
}

// parseAttributes reads what Verify needs of the signed attributes (section 11).
func (s *SignerInfo) parseAttributes(in cryptobyte.String) error {
	for n := 0; !in.Empty(); n++ {
		var attr, values cryptobyte.String
		var oid asn1.ObjectIdentifier
		if n == maxAttributes || !in.ReadASN1(&attr, cbasn1.SEQUENCE) || !attr.ReadASN1ObjectIdentifier(&oid) ||
			!attr.ReadASN1(&values, cbasn1.SET) || !attr.Empty() {
			return fmt.Errorf("%w: signed attributes", ErrMalformed)
		}
		ok, again := true, false
		switch {
		case oid.Equal(oidContentType):
			again = s.contentType != nil
			ok = values.ReadASN1ObjectIdentifier(&s.contentType) && values.Empty()
		case oid.Equal(oidMessageDigest):
			again = s.messageDigest != nil
			var d cryptobyte.String
			ok = values.ReadASN1(&d, cbasn1.OCTET_STRING) && values.Empty() && len(d) > 0
			s.messageDigest = d
		case oid.Equal(oidSigningTime):
			again = !s.SigningTime.IsZero()
			if values.PeekASN1Tag(cbasn1.UTCTime) {
				ok = values.ReadASN1UTCTime(&s.SigningTime)
			} else {
				ok = values.ReadASN1GeneralizedTime(&s.SigningTime)
			}
			ok = ok && values.Empty()
		}
		if !ok || again { // section 5.3: no attribute twice
			return fmt.Errorf("%w: signed attribute %s", ErrMalformed, oid)
		}
	}
	// Section 11.1 and 11.2: both must be there. Without the second the attributes would say nothing of the content.
	if s.contentType == nil || s.messageDigest == nil {
		return fmt.Errorf("%w: signed attributes without content type or digest", ErrMalformed)
	}
	return nil
}

// setOfRaw puts the tag of a SET OF back, under which the attributes are hashed (section 5.4), in the order they have.
func setOfRaw(body []byte) ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) { b.AddBytes(body) })
	return b.Bytes()
}

func parseDigestAlgorithm(in cryptobyte.String) (crypto.Hash, error) {
	var oid asn1.ObjectIdentifier
	if !in.ReadASN1ObjectIdentifier(&oid) || !emptyOrNULL(in) {
		return 0, fmt.Errorf("%w: digest algorithm", ErrMalformed)
	}
	h := oidHash(oid)
	if h == 0 {
		return 0, fmt.Errorf("%w: digest algorithm %s", ErrUnsupported, oid)
	}
	return h, nil
}

// parseSignatureAlgorithm reads a SignatureAlgorithmIdentifier, which must not name another hash than h.
func parseSignatureAlgorithm(in cryptobyte.String, h crypto.Hash) (scheme, error) {
	var oid asn1.ObjectIdentifier
	if !in.ReadASN1ObjectIdentifier(&oid) {
		return scheme{}, fmt.Errorf("%w: signature algorithm", ErrMalformed)
	}
	if oid.Equal(oidPSS) {
		return parsePSS(in, h)
	}
	if oid.Equal(oidECPublicKey) {
		return scheme{hash: h}, nil // some write the key's algorithm with its curve instead
	}
	if !emptyOrNULL(in) {
		return scheme{}, fmt.Errorf("%w: signature algorithm", ErrMalformed)
	}
	if oid.Equal(oidRSA) {
		return scheme{hash: h}, nil
	}
	for _, a := range algorithms {
		if a.rsa.Equal(oid) || a.ecdsa.Equal(oid) {
			if a.hash != h {
				return scheme{}, fmt.Errorf("%w: the signature's hash is %v, the digest's %v", ErrMalformed, a.hash, h)
			}
			return scheme{hash: h}, nil
		}
	}
	return scheme{}, fmt.Errorf("%w: signature algorithm %s", ErrUnsupported, oid)
}

// parsePSS reads RSASSA-PSS-params (RFC 4055, section 3.1). Defaults mean SHA-1, so that the first three must be there.
func parsePSS(in cryptobyte.String, h crypto.Hash) (scheme, error) {
	var params, hashAlg, mgf, mgfParams, salt cryptobyte.String
	var inner [3]cryptobyte.String
	var oid asn1.ObjectIdentifier
	s := scheme{hash: h, pss: true}
	if !in.ReadASN1(&params, cbasn1.SEQUENCE) || !in.Empty() ||
		!params.ReadASN1(&inner[0], context(0)) || !params.ReadASN1(&inner[1], context(1)) ||
		!params.ReadASN1(&inner[2], context(2)) || !params.SkipOptionalASN1(context(3)) || !params.Empty() ||
		!inner[0].ReadASN1(&hashAlg, cbasn1.SEQUENCE) || !inner[0].Empty() ||
		!inner[1].ReadASN1(&mgf, cbasn1.SEQUENCE) || !inner[1].Empty() ||
		!mgf.ReadASN1ObjectIdentifier(&oid) || !mgf.ReadASN1(&mgfParams, cbasn1.SEQUENCE) || !mgf.Empty() {
		return s, fmt.Errorf("%w: PSS parameters", ErrMalformed)
	}
	salt = inner[2]
	if !salt.ReadASN1Integer(&s.salt) || !salt.Empty() || s.salt < 1 || s.salt > maxRSABits/8 {
		return s, fmt.Errorf("%w: PSS salt length", ErrMalformed)
	}
	if !oid.Equal(oidMGF1) {
		return s, fmt.Errorf("%w: mask generation function %s", ErrUnsupported, oid)
	}
	for _, alg := range []cryptobyte.String{hashAlg, mgfParams} {
		got, err := parseDigestAlgorithm(alg)
		if err != nil {
			return s, err
		}
		if got != h {
			return s, fmt.Errorf("%w: PSS with %v, the digest's hash is %v", ErrUnsupported, got, h)
		}
	}
	return s, nil
}

func emptyOrNULL(in cryptobyte.String) bool {
	if in.Empty() {
		return true
	}
	var null cryptobyte.String
	return in.ReadASN1(&null, cbasn1.NULL) && null.Empty() && in.Empty()
}
