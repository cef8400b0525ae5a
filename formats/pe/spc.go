package pe

import (
	"crypto"
	"encoding/asn1"
	"fmt"
	"unicode/utf16"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/signwarden/signwarden/formats/cms"
)

// Object identifiers of Authenticode.
var (
	oidIndirectData = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}  // SPC_INDIRECT_DATA_OBJID
	oidPEImageData  = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 15} // SPC_PE_IMAGE_DATAOBJ
)

// spcIndirectData is what a signature is over (Authenticode, "SpcIndirectDataContent"): the digest of the image, and
// of the image's data a file name that nobody uses.
func spcIndirectData(h crypto.Hash, digest []byte) ([]byte, error) {
	var b cryptobyte.Builder
	context := func(n uint8) cbasn1.Tag { return cbasn1.Tag(n).ContextSpecific().Constructed() }
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { // SpcAttributeTypeAndOptionalValue
			b.AddASN1ObjectIdentifier(oidPEImageData)
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { // SpcPeImageData
				b.AddASN1(cbasn1.BIT_STRING, func(b *cryptobyte.Builder) { b.AddUint8(0) })
				b.AddASN1(context(0), func(b *cryptobyte.Builder) { // file
					b.AddASN1(context(2), func(b *cryptobyte.Builder) { // SpcLink of a file
						b.AddASN1(cbasn1.Tag(0).ContextSpecific(), func(b *cryptobyte.Builder) { // SpcString, a BMPString
							for _, c := range utf16.Encode([]rune("<<<Obsolete>>>")) {
								b.AddUint16(c)
							}
						})
					})
				})
			})
		})
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { // DigestInfo
			b.AddBytes(cms.DigestAlgorithm(h))
			b.AddASN1OctetString(digest)
		})
	})
	return b.Bytes()
}

// parseIndirectData returns the digest of the image in a signature's content, and its hash.
func parseIndirectData(content []byte) (crypto.Hash, []byte, error) {
	in := cryptobyte.String(content)
	var body, data, info, alg, digest cryptobyte.String
	if !in.ReadASN1(&body, cbasn1.SEQUENCE) || !in.Empty() ||
		!body.ReadASN1(&data, cbasn1.SEQUENCE) || !body.ReadASN1(&info, cbasn1.SEQUENCE) || !body.Empty() ||
		!info.ReadASN1Element(&alg, cbasn1.SEQUENCE) || !info.ReadASN1(&digest, cbasn1.OCTET_STRING) || !info.Empty() {
		return 0, nil, fmt.Errorf("%w: content of a signature", ErrMalformed)
	}
	var oid asn1.ObjectIdentifier
	if !data.ReadASN1ObjectIdentifier(&oid) || !oid.Equal(oidPEImageData) {
		return 0, nil, fmt.Errorf("%w: a signature of something else than a PE image", ErrMalformed)
	}
	h, err := cms.ParseDigestAlgorithm(alg)
	if err != nil {
		return 0, nil, err
	}
	if len(digest) != h.Size() {
		return 0, nil, fmt.Errorf("%w: a digest of %d bytes is not of %v", ErrMalformed, len(digest), h)
	}
	return h, digest, nil
}
