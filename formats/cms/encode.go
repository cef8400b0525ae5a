package cms

import (
	"bytes"
	"encoding/asn1"
	"fmt"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// attributes returns the DER of the signed attributes as a SET OF (section 5.3).
func (m *Message) attributes(digest []byte) ([]byte, error) {
	all := slices.Clone(m.o.More)
	add := func(oid asn1.ObjectIdentifier, value func(*cryptobyte.Builder)) error {
		a, err := Attribute(oid, value)
		all = append(all, a)
		return err
	}
	err := add(oidContentType, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(m.typ) })
	if err != nil {
		return nil, err
	}
	err = add(oidMessageDigest, func(b *cryptobyte.Builder) { b.AddASN1OctetString(digest) })
	if err != nil {
		return nil, err
	}
	if t := m.o.SigningTime.UTC(); !t.IsZero() {
		if t.Year() < 1950 || t.Year() > 9999 {
			return nil, fmt.Errorf("%w: signing time %s", ErrMalformed, t)
		}
		err = add(oidSigningTime, func(b *cryptobyte.Builder) { addTime(b, t) })
		if err != nil {
			return nil, err
		}
	}
	set, err := setOf(cbasn1.SET, all)
	if err != nil {
		return nil, fmt.Errorf("encoding the attributes: %w", err)
	}
	// What the caller brought along must not be one of the above again, or no attribute at all.
	in := cryptobyte.String(set)
	var body cryptobyte.String
	if !in.ReadASN1(&body, cbasn1.SET) || !in.Empty() {
		return nil, fmt.Errorf("%w: attributes", ErrMalformed)
	}
	err = new(SignerInfo).parseAttributes(body)
	if err != nil {
		return nil, err
	}
	return set, nil
}

// Attribute returns the DER of an attribute with one value, for Options.More.
func Attribute(oid asn1.ObjectIdentifier, value func(*cryptobyte.Builder)) ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oid)
		b.AddASN1(cbasn1.SET, value)
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("%w: attribute %s: %v", ErrMalformed, oid, err)
	}
	return der, nil
}

// addTime adds a Time; section 11.3 says which dates are a UTCTime.
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t.Year() < 2050 {
		b.AddASN1UTCTime(t)
		return
	}
	b.AddASN1GeneralizedTime(t)
}

// setOf returns a SET OF under any tag, its elements in the order of DER (X.690, section 11.6).
func setOf(tag cbasn1.Tag, elements [][]byte) ([]byte, error) {
	sorted := slices.Clone(elements)
	slices.SortFunc(sorted, bytes.Compare)
	var b cryptobyte.Builder
	b.AddASN1(tag, func(b *cryptobyte.Builder) {
		for _, e := range sorted {
			b.AddBytes(e)
		}
	})
	return b.Bytes()
}

// encode writes the message: ContentInfo (section 3), SignedData (5.1), SignerInfo (5.3).
func (m *Message) encode(sig []byte) ([]byte, error) {
	var certs []byte
	if len(m.o.Certificates) > 0 {
		var all [][]byte
		for _, c := range m.o.Certificates {
			all = append(all, c.Raw)
		}
		var err error
		certs, err = setOf(context(0), all)
		if err != nil {
			return nil, fmt.Errorf("encoding the certificates: %w", err)
		}
	}
	signedData := func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1Int64(m.version())
			b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) { addDigestAlgorithm(b, m.scheme.hash, m.o.HashNULL) })
			b.AddASN1(cbasn1.SEQUENCE, m.addContent)
			b.AddBytes(certs)
			b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) {
				b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { m.addSignerInfo(b, sig) })
			})
		})
	}
	var b cryptobyte.Builder
	if m.o.Bare {
		signedData(&b)
	} else {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(oidSignedData)
			b.AddASN1(context(0), signedData)
		})
	}
	der, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encoding the message: %w", err)
	}
	return der, nil
}

// version is the CMSVersion of the SignedData (section 5.1).
func (m *Message) version() int64 {
	if m.o.SubjectKeyID || !m.typ.Equal(oidData) && !m.o.ContentDER {
		return 3
	}
	return 1
}

func (m *Message) addContent(b *cryptobyte.Builder) {
	b.AddASN1ObjectIdentifier(m.typ)
	if m.o.Content == nil {
		return
	}
	b.AddASN1(context(0), func(b *cryptobyte.Builder) {
		if m.o.ContentDER {
			b.AddBytes(m.o.Content)
			return
		}
		b.AddASN1OctetString(m.o.Content)
	})
}

func (m *Message) addSignerInfo(b *cryptobyte.Builder, sig []byte) {
	cert := m.o.Certificate
	if m.o.SubjectKeyID {
		b.AddASN1Int64(3)
		b.AddASN1(cbasn1.Tag(0).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(cert.SubjectKeyId) })
	} else {
		b.AddASN1Int64(1)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddBytes(cert.RawIssuer)
			b.AddASN1BigInt(cert.SerialNumber)
		})
	}
	addDigestAlgorithm(b, m.scheme.hash, m.o.HashNULL)
	if m.attrs != nil {
		tagged := bytes.Clone(m.attrs)
		tagged[0] = byte(context(0)) // IMPLICIT: the same element under another tag
		b.AddBytes(tagged)
	}
	addSignatureAlgorithm(b, cert.PublicKey, m.scheme)
	b.AddASN1OctetString(sig)
}
