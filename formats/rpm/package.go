package rpm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

const leadSize = 96

var leadMagic = []byte{0xed, 0xab, 0xee, 0xdb}

// A NEVRA names a package.
type NEVRA struct {
	Name     string
	Epoch    uint32
	HasEpoch bool // no epoch counts as zero, and is printed differently
	Version  string
	Release  string
	Arch     string // "src" or "nosrc" for a source package
}

// String returns name-[epoch:]version-release.arch. The parts come from outside: escape them.
func (n NEVRA) String() string {
	epoch := ""
	if n.HasEpoch {
		epoch = fmt.Sprintf("%d:", n.Epoch)
	}
	return fmt.Sprintf("%s-%s%s-%s.%s", n.Name, epoch, n.Version, n.Release, n.Arch)
}

// A Header is a package's main header: what is known of a package by the bytes that a signature covers. It is never
// changed and is safe for concurrent use.
type Header struct {
	NEVRA  NEVRA
	Vendor string // empty: none
	Source bool
	Format int // of the package: 3 (header without an immutable region), 4 or 6

	h *rawHeader
}

// ParseHeader reads the main header that b begins with, of at most MaxHeader bytes, and returns what follows it. Whoever
// is sent the bytes that a header signature covers reads them so: rest is what OpenPGP hashes besides.
func ParseHeader(b []byte) (h *Header, rest []byte, err error) {
	size, err := headerSize(mainKind, b)
	if err != nil {
		return nil, nil, err
	}
	if size > int64(len(b)) {
		return nil, nil, fmt.Errorf("%w: header of %d bytes in %d", ErrMalformed, size, len(b))
	}
	h, err = newHeader(b[:size:size])
	if err != nil {
		return nil, nil, err
	}
	return h, b[size:], nil
}

func newHeader(raw []byte) (*Header, error) {
	parsed, err := parseHeader(mainKind, raw)
	if err != nil {
		return nil, err
	}
	h := &Header{h: parsed}
	for _, f := range []struct {
		tag  uint32
		to   *string
		must bool
	}{
		{tagName, &h.NEVRA.Name, true},
		{tagVersion, &h.NEVRA.Version, true},
		{tagRelease, &h.NEVRA.Release, true},
		{tagArch, &h.NEVRA.Arch, false}, // gpg-pubkey packages have none
		{tagVendor, &h.Vendor, false},
	} {
		*f.to, err = parsed.text(f.tag)
		if err != nil {
			return nil, err
		}
		if f.must && *f.to == "" {
			return nil, fmt.Errorf("%w: header without tag %d", ErrMalformed, f.tag)
		}
	}
	epoch, ok, err := parsed.number(tagEpoch, typeInt32)
	if err != nil {
		return nil, err
	}
	h.NEVRA.Epoch, h.NEVRA.HasEpoch = uint32(epoch), ok
	// As rpm's headerIsSource: the lead says it too, but nothing covers the lead.
	h.Source = !parsed.has(tagSourceRPM)
	if h.Source {
		h.NEVRA.Arch = "src"
		if parsed.has(tagNoSource) || parsed.has(tagNoPatch) {
			h.NEVRA.Arch = "nosrc"
		}
	}
	h.Format, err = formatOf(parsed)
	if err != nil {
		return nil, err
	}
	return h, nil
}

// formatOf is the version of the package format: RPMFORMAT since version 6 (format_v6.md), before that by the region
// (format_v4.md, "Differences to V3").
func formatOf(h *rawHeader) (int, error) {
	n, ok, err := h.number(tagFormat, typeInt32)
	if err != nil {
		return 0, err
	}
	switch {
	case ok && (n != 4 && n != 6 || !h.region):
		return 0, fmt.Errorf("%w: package format %d", ErrUnsupported, n)
	case ok:
		return int(n), nil
	case h.region:
		return 4, nil
	}
	return 3, nil
}

// Bytes are the header as it is in the package, from its magic on. They must not be changed.
func (h *Header) Bytes() []byte { return h.h.raw }

// A Package is a package that was read but for its payload. It is never changed; it is safe for concurrent use if the
// io.ReaderAt is.
type Package struct {
	Header *Header

	r      io.ReaderAt
	size   int64
	lead   [leadSize]byte
	sig    *rawHeader
	block  []byte // the signature header with its padding, as it is in the file
	header int64  // offset of the main header
	body   int64  // offset of the payload
}

// Recognize reports whether a file begins as a package. That is all that can be said without reading it.
func Recognize(r io.ReaderAt) bool {
	magic := make([]byte, len(leadMagic))
	_, err := r.ReadAt(magic, 0)
	return err == nil && bytes.Equal(magic, leadMagic)
}

// Memory tells how much memory the signing of a package takes for its headers, in bytes, without reading them. Who signs
// many at a time asks before ReadPackage, for together they can take more than there is.
func Memory(r io.ReaderAt, size int64) (int64, error) { return (&Package{r: r, size: size}).memory() }

func (p *Package) memory() (int64, error) {
	sig, err := p.headerSize(signatureKind, leadSize)
	if err != nil {
		return 0, err
	}
	main, err := p.headerSize(mainKind, leadSize+padded(sig))
	if err != nil {
		return 0, err
	}
	n := memoryOf(main, sig, sig)
	if n > maxMemory {
		return 0, fmt.Errorf("%w: headers of %d and %d bytes, too large together", ErrMalformed, sig, main)
	}
	return n, nil
}

// ReadPackage reads a package of size bytes. It takes no more memory than the two headers have, which are capped and
// within size, and does not read the payload.
func ReadPackage(r io.ReaderAt, size int64) (*Package, error) {
	p := &Package{r: r, size: size}
	err := p.readAt(p.lead[:], 0)
	if err != nil {
		return nil, fmt.Errorf("reading the lead: %w", err)
	}
	err = checkLead(p.lead[:])
	if err != nil {
		return nil, err
	}
	_, err = p.memory()
	if err != nil {
		return nil, err
	}
	sig, err := p.readHeader(signatureKind, leadSize)
	if err != nil {
		return nil, err
	}
	p.header = leadSize + padded(int64(len(sig)))
	p.block = append(sig, make([]byte, p.header-leadSize-int64(len(sig)))...)
	err = p.readAt(p.block[len(sig):], leadSize+int64(len(sig)))
	if err != nil {
		return nil, fmt.Errorf("reading the padding: %w", err)
	}
	p.sig, err = parseHeader(signatureKind, p.block[:len(sig)])
	if err != nil {
		return nil, err
	}
	raw, err := p.readHeader(mainKind, p.header)
	if err != nil {
		return nil, err
	}
	p.Header, err = newHeader(raw)
	if err != nil {
		return nil, err
	}
	p.body = p.header + int64(len(raw))
	if p.Header.Format == 6 {
		return p, p.checkV6()
	}
	return p, nil
}

// checkLead looks at what rpm looks at (format_lead.md): the magic, the version, and that there is a signature header.
func checkLead(lead []byte) error {
	major, sigType := lead[4], binary.BigEndian.Uint16(lead[78:])
	switch {
	case !bytes.Equal(lead[:4], leadMagic):
		return fmt.Errorf("%w: no magic of a package", ErrMalformed)
	case major != 3 && major != 4:
		return fmt.Errorf("%w: package format %d", ErrUnsupported, major)
	case sigType != 5:
		return fmt.Errorf("%w: signature of type %d", ErrUnsupported, sigType)
	}
	return nil
}

// checkV6 refuses what format_v6.md calls illegal: rpm 6 would refuse what we make of it.
func (p *Package) checkV6() error {
	last := uint32(0)
	for _, e := range p.sig.entries {
		if e.tag <= last || e.tag > tagReservedV6 {
			return fmt.Errorf("%w: tag %d after %d in the signature header of a version 6 package",
				ErrMalformed, e.tag, last)
		}
		last = e.tag
	}
	return nil
}

// headerSize is the length of the header at off, which is within the file.
func (p *Package) headerSize(kind headerKind, off int64) (int64, error) {
	var intro [introSize]byte
	err := p.readAt(intro[:], off)
	if err != nil {
		return 0, fmt.Errorf("reading the %s: %w", kind.name, err)
	}
	size, err := headerSize(kind, intro[:])
	if err != nil {
		return 0, err
	}
	if size > p.size-off {
		return 0, fmt.Errorf("%w: %s of %d bytes at %d in a file of %d", ErrMalformed, kind.name, size, off, p.size)
	}
	return size, nil
}

// readHeader reads the header at off: nothing is allocated before its length is known to be within the file.
func (p *Package) readHeader(kind headerKind, off int64) ([]byte, error) {
	size, err := p.headerSize(kind, off)
	if err != nil {
		return nil, err
	}
	raw := make([]byte, size, padded(size))
	err = p.readAt(raw, off)
	if err != nil {
		return nil, fmt.Errorf("reading the %s: %w", kind.name, err)
	}
	// A file that is written to may have changed in between.
	again, err := headerSize(kind, raw[:introSize])
	if err != nil || again != size {
		return nil, fmt.Errorf("%w: the %s changes while it is read", ErrMalformed, kind.name)
	}
	return raw, nil
}

func (p *Package) readAt(b []byte, off int64) error {
	if off > p.size-int64(len(b)) {
		return fmt.Errorf("%w: it ends at %d", ErrMalformed, p.size)
	}
	n, err := p.r.ReadAt(b, off)
	if n == len(b) {
		return nil // io.ReaderAt may say io.EOF with the last bytes
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// padded rounds up to where the main header begins (format_v4.md, "Signature").
func padded(n int64) int64 { return (n + padding - 1) / padding * padding }

// Size is the length of the package in bytes, as ReadPackage was told.
func (p *Package) Size() int64 { return p.size }
