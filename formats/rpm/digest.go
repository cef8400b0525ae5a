package rpm

import (
	"bytes"
	"crypto"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
)

// copyBuffer is what the payload is read through.
const copyBuffer = 256 << 10

// maxMD5 is how long a payload may be, in bytes, for its MD5 to be looked at beside a better digest. All that is found by
// it is damage of its own 16 bytes.
const maxMD5 = 16 << 20

// payloadHashes are the algorithms of PAYLOADDIGESTALGO, by OpenPGP's numbers, that this package takes: those that a
// signature over the header may rest on.
var payloadHashes = map[uint64]func() hash.Hash{
	8:  sha256.New,
	9:  sha512.New384,
	10: sha512.New,
	12: newSHA3,
}

func newSHA3() hash.Hash { return sha3.New256() }

// hasher is a digest in the making, and what it should come to.
type hasher struct {
	name  string
	h     hash.Hash
	want  [][]byte // one of them
	whole bool     // over header and payload, not the payload alone
}

func (d hasher) check() error {
	got := d.h.Sum(nil)
	for _, w := range d.want {
		if bytes.Equal(got, w) {
			return nil
		}
	}
	return fmt.Errorf("%w: %s is %x, should be %x", ErrDigest, d.name, got, d.want[0])
}

// CheckDigests checks the package against the sizes and digests that it carries. With payload the payload is read, once;
// without, only its length is checked. It fails with ErrDigest if one is wrong, and with ErrNoDigest if there is none.
//
// MD5 and SHA-1 prove nothing, but rpm refuses a package whose SHA-1 or MD5 is wrong, so one is not to be signed. MD5,
// which is over header and payload and slower than all others, is looked at up to maxMD5, and beyond for want of better.
func (p *Package) CheckDigests(payload bool) error { return p.check(payload, nil) }

// check is CheckDigests. also is written the header and the payload besides.
func (p *Package) check(payload bool, also io.Writer) error {
	err := p.checkSizes()
	if err != nil {
		return err
	}
	header, err := p.headerDigests()
	if err != nil {
		return err
	}
	for _, d := range header {
		d.h.Write(p.Header.h.raw)
		err = d.check()
		if err != nil {
			return err
		}
	}
	if !payload {
		if len(header) == 0 {
			return fmt.Errorf("%w of its header, and its payload is not to be read", ErrNoDigest)
		}
		return nil
	}
	stream, err := p.payloadDigests()
	if err != nil {
		return err
	}
	if len(stream) == 0 || len(header) == 0 && !stream[0].whole {
		return fmt.Errorf("%w of header and payload", ErrNoDigest)
	}
	return p.stream(stream, also)
}

// stream reads the payload once for all digests.
func (p *Package) stream(digests []hasher, also io.Writer) error {
	var to []io.Writer
	for _, d := range digests {
		if d.whole {
			d.h.Write(p.Header.h.raw)
		}
		to = append(to, d.h)
	}
	if also != nil {
		_, err := also.Write(p.Header.h.raw)
		if err != nil {
			return err
		}
		to = append(to, also)
	}
	body := io.NewSectionReader(p.r, p.body, p.size-p.body)
	// Only the reader's Read is shown to io.CopyBuffer: else it would take the section's own way, with another buffer.
	_, err := io.CopyBuffer(io.MultiWriter(to...), struct{ io.Reader }{body}, make([]byte, min(copyBuffer, max(body.Size(), 1))))
	if err != nil {
		return fmt.Errorf("reading the payload: %w", err)
	}
	for _, d := range digests {
		err = d.check()
		if err != nil {
			return err
		}
	}
	return nil
}

// checkSizes checks the length of header and payload: it tells a truncated package without reading it.
func (p *Package) checkSizes() error {
	sizes := []struct {
		h    *rawHeader
		tag  uint32
		typ  dataType
		want int64
	}{
		{p.sig, tagSize, typeInt32, p.size - p.header},
		{p.sig, tagLongSize, typeInt64, p.size - p.header},
	}
	for _, s := range sizes {
		got, ok, err := s.h.number(s.tag, s.typ)
		if err != nil {
			return err
		}
		if ok && got != uint64(s.want) {
			return fmt.Errorf("%w: header and payload have %d bytes, should have %d", ErrDigest, s.want, got)
		}
	}
	return nil
}

// headerDigests are those over the main header alone.
func (p *Package) headerDigests() ([]hasher, error) {
	if !p.Header.h.region {
		return nil, nil // they are over the region: one that a later rpmsign has added is of other bytes
	}
	var list []hasher
	for _, d := range []struct {
		name string
		tag  uint32
		new  func() hash.Hash
	}{
		{"SHA3-256 of the header", tagSHA3, newSHA3},
		{"SHA-256 of the header", tagSHA256, sha256.New},
		{"SHA-1 of the header", tagSHA1, sha1.New},
	} {
		text, err := p.sig.text(d.tag)
		if err != nil {
			return nil, err
		}
		if !p.sig.has(d.tag) {
			continue
		}
		h := d.new()
		want, err := hexDigest(d.name, text, h.Size())
		if err != nil {
			return nil, err
		}
		list = append(list, hasher{name: d.name, h: h, want: [][]byte{want}})
	}
	return list, nil
}

// payloadDigests are those over the payload, from the main header, and MD5 over header and payload, from the signature
// header, where it is alone or cheap.
func (p *Package) payloadDigests() ([]hasher, error) {
	h := p.Header.h
	var list []hasher
	algo, _, err := h.number(tagPayloadAlgo, typeInt32)
	if err != nil {
		return nil, err
	}
	for _, d := range []struct {
		name     string
		tag, alt uint32
		typ      dataType
		new      func() hash.Hash
	}{
		{"digest of the payload", tagPayloadDigest, tagPayloadAlt, typeStringArray, payloadHashes[algo]},
		{"SHA-512 of the payload", tagPayloadSHA512, tagPayloadSHA512A, typeString, sha512.New},
		{"SHA3-256 of the payload", tagPayloadSHA3, tagPayloadSHA3Alt, typeString, newSHA3},
	} {
		if !h.has(d.tag) {
			continue
		}
		if d.new == nil {
			return nil, fmt.Errorf("%w: payload digest of algorithm %d", ErrUnsupported, algo)
		}
		sum := hasher{name: d.name, h: d.new()}
		// The second is of the payload before compression. A package whose payload was unpacked matches that one, and rpm
		// takes either (format_v6.md, "Header").
		for _, tag := range []uint32{d.tag, d.alt} {
			if !h.has(tag) {
				continue
			}
			want, err := headerDigest(h, tag, d.typ, sum.h.Size())
			if err != nil {
				return nil, err
			}
			sum.want = append(sum.want, want)
		}
		list = append(list, sum)
	}
	sum, err := p.sig.typed(tagMD5, typeBin)
	if err != nil {
		return nil, err
	}
	if sum != nil && (len(list) == 0 || p.size-p.body <= maxMD5) {
		list = append(list, hasher{name: "MD5 of header and payload", h: md5.New(), want: [][]byte{sum}, whole: true})
	}
	return list, nil
}

// headerDigest reads a digest in hexadecimal digits. rpm 4 puts it into a list, of one.
func headerDigest(h *rawHeader, tag uint32, typ dataType, size int) ([]byte, error) {
	name := fmt.Sprintf("tag %d", tag)
	if typ == typeString {
		s, err := h.text(tag)
		if err != nil {
			return nil, err
		}
		return hexDigest(name, s, size)
	}
	list, err := h.texts(tag, 1)
	if err != nil {
		return nil, err
	}
	return hexDigest(name, string(list[0]), size)
}

func hexDigest(name, s string, size int) ([]byte, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != size {
		return nil, fmt.Errorf("%w: %s %q is not %d bytes in hexadecimal", ErrMalformed, name, s, size)
	}
	return b, nil
}

// coversPayload says whether the main header has a digest of the payload, so that a signature over the header is one over
// all of the package.
func (h *Header) coversPayload() bool {
	return h.h.region && (h.h.has(tagPayloadDigest) || h.h.has(tagPayloadSHA512) || h.h.has(tagPayloadSHA3))
}

// hashOpts tell a crypto.Signer about a digest as formats/openpgp does.
type hashOpts crypto.Hash

func (o hashOpts) HashFunc() crypto.Hash   { return crypto.Hash(o) }
func (o hashOpts) DigestHash() crypto.Hash { return crypto.Hash(o) }
