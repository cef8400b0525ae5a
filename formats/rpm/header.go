package rpm

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Limits. rpm 4.18 takes 65535 entries and 256 MiB in a main header. The largest in a distribution have some 20 MiB.
const (
	MaxHeader     = 32 << 20 // bytes of a main header
	maxEntries    = 65535
	maxSigHeader  = 12 << 20 // bytes of a signature header; rpm takes 64 MiB, for file signatures
	maxMemory     = 40 << 20 // of both, as memoryOf counts them
	maxSigEntries = 32       // as rpm
	maxFiles      = 512 << 10
	maxSignatures = 16 // in tag 278: each is hashed for
)

const (
	introSize = 16 // magic, number of entries, number of data bytes
	entrySize = 16
	padding   = 8 // the signature header ends at a multiple
)

// memoryOf is how much memory the headers of a package take while it is signed, in bytes: the two as they are, the undo
// record of the signature header, and what takes its place.
func memoryOf(main, sig, update int64) int64 { return main + 2*sig + update }

var headerMagic = []byte{0x8e, 0xad, 0xe8, 0x01, 0, 0, 0, 0}

// entry is one of the index. Its data is within the header: parseHeader has seen to it.
type entry struct {
	tag   uint32
	typ   dataType
	off   int // of the data in the data section
	count int
	size  int // of the data
}

// headerKind is what signature header and main header differ in.
type headerKind struct {
	name       string
	region     uint32 // the tag of the first entry
	maxSize    int64
	maxEntries uint32
}

var (
	signatureKind = headerKind{"signature header", tagSigRegion, maxSigHeader, maxSigEntries}
	mainKind      = headerKind{"header", tagImmutable, MaxHeader, maxEntries}
)

// rawHeader is a header that was read and found sound.
type rawHeader struct {
	raw     []byte // from the magic on, without padding
	data    []byte
	entries []entry // without the region's
	region  bool    // false: as rpm 3 wrote them, without an immutable region
}

// headerSize returns the length of the header that begins with intro, before any of it is allocated.
func headerSize(kind headerKind, intro []byte) (int64, error) {
	if len(intro) < introSize || !bytes.Equal(intro[:8], headerMagic) {
		return 0, fmt.Errorf("%w: no magic of a %s", ErrMalformed, kind.name)
	}
	il := binary.BigEndian.Uint32(intro[8:])
	dl := binary.BigEndian.Uint32(intro[12:])
	if il == 0 || il > kind.maxEntries {
		return 0, fmt.Errorf("%w: %s of %d entries, not 1 to %d", ErrMalformed, kind.name, il, kind.maxEntries)
	}
	size := introSize + entrySize*int64(il) + int64(dl)
	if size > kind.maxSize {
		return 0, fmt.Errorf("%w: %s of %d bytes, over %d", ErrMalformed, kind.name, size, kind.maxSize)
	}
	return size, nil
}

// parseHeader checks raw, of the length that headerSize said, as strictly as rpm's hdrblobInit does: each entry of a known
// type, aligned, within the data, after the one before. Besides it refuses a tag that is there twice, because readers
// differ in which of the two they take.
func parseHeader(kind headerKind, raw []byte) (*rawHeader, error) {
	il := int(binary.BigEndian.Uint32(raw[8:]))
	h := &rawHeader{raw: raw, data: raw[introSize+entrySize*il:]}
	index := raw[introSize : introSize+entrySize*il]
	if binary.BigEndian.Uint32(index) == kind.region {
		err := h.checkRegion(kind, index)
		if err != nil {
			return nil, err
		}
		h.region = true
		index = index[entrySize:]
	}
	h.entries = make([]entry, 0, len(index)/entrySize)
	end := 0
	seen := make(map[uint32]bool, len(index)/entrySize)
	for ; len(index) > 0; index = index[entrySize:] {
		e, err := h.parseEntry(index[:entrySize], end)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %v", ErrMalformed, kind.name, err)
		}
		if seen[e.tag] {
			return nil, fmt.Errorf("%w: %s: tag %d twice", ErrMalformed, kind.name, e.tag)
		}
		seen[e.tag] = true
		end = e.off + e.size
		h.entries = append(h.entries, e)
	}
	if h.region && end > len(h.data)-entrySize {
		return nil, fmt.Errorf("%w: %s: data reaches into the region's trailer", ErrMalformed, kind.name)
	}
	return h, nil
}

// checkRegion checks that the immutable region is all of the header (format_header.md, "Immutable regions"): what is
// outside is in no digest and under no signature of rpm's.
func (h *rawHeader) checkRegion(kind headerKind, index []byte) error {
	first := rawEntry(index)
	trailerAt := int64(len(h.data)) - entrySize
	if trailerAt < 0 || first != [4]uint32{kind.region, uint32(typeBin), uint32(trailerAt), entrySize} {
		return fmt.Errorf("%w: %s: the region does not end with the data", ErrMalformed, kind.name)
	}
	got := rawEntry(h.data[trailerAt:])
	want := [4]uint32{kind.region, uint32(typeBin), uint32(-int32(len(index))), entrySize}
	if kind.region == tagSigRegion && got[0] == tagHeaderImage {
		got[0] = tagSigRegion // so wrote rpm before 4.0.2, and rpm still takes it
	}
	if got != want {
		return fmt.Errorf("%w: %s: the region's trailer is %v, not %v", ErrMalformed, kind.name, got, want)
	}
	return nil
}

func rawEntry(b []byte) [4]uint32 {
	return [4]uint32{
		binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:]),
		binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:]),
	}
}

// parseEntry reads an entry whose data must begin at or after end.
func (h *rawHeader) parseEntry(b []byte, end int) (entry, error) {
	f := rawEntry(b)
	e := entry{tag: f[0], typ: dataType(f[1])}
	limit := int64(len(h.data))
	off, count := int64(int32(f[2])), int64(f[3])
	bad := func(why string) (entry, error) {
		return entry{}, fmt.Errorf("tag %d of type %d, %d values at %d: %s", f[0], f[1], f[3], int32(f[2]), why)
	}
	width := e.typ.width()
	switch {
	case e.tag < firstOrdinaryTag || e.tag > 1<<31-1:
		return bad("no such tag")
	case width == 0 && !e.typ.isString():
		return bad("no such type")
	case off < int64(end) || off >= limit:
		return bad("outside the data, or over other data")
	case width > 1 && off%width != 0:
		return bad("not aligned")
	case count == 0 || count > limit || e.typ == typeString && count != 1:
		return bad("wrong number")
	}
	size := width * count // at most 8 times the data: no overflow
	if e.typ.isString() {
		size = stringsSize(h.data[off:], count)
	}
	if size <= 0 || size > limit-off {
		return bad("outside the data")
	}
	e.off, e.count, e.size = int(off), int(count), int(size)
	return e, nil
}

// stringsSize is the length of count strings with their NULs, or -1 if b has fewer.
func stringsSize(b []byte, count int64) int64 {
	size := int64(0)
	for ; count > 0; count-- {
		n := bytes.IndexByte(b[size:], 0)
		if n < 0 {
			return -1
		}
		size += int64(n) + 1
	}
	return size
}

// find returns the entry of the tag. A header has at most some hundred entries that matter; order is not relied on.
func (h *rawHeader) find(tag uint32) (entry, bool) {
	for _, e := range h.entries {
		if e.tag == tag {
			return e, true
		}
	}
	return entry{}, false
}

func (h *rawHeader) has(tag uint32) bool {
	_, ok := h.find(tag)
	return ok
}

func (h *rawHeader) bytesOf(e entry) []byte { return h.data[e.off : e.off+e.size] }

// typed returns the data of a tag, nil if it is not there. Another type than the one that rpm writes is refused: software
// that reads the tag would not agree on what it says.
func (h *rawHeader) typed(tag uint32, typ dataType) ([]byte, error) {
	e, ok := h.find(tag)
	if !ok {
		return nil, nil
	}
	if e.typ != typ {
		return nil, fmt.Errorf("%w: tag %d is of type %d, not %d", ErrMalformed, tag, e.typ, typ)
	}
	return h.bytesOf(e), nil
}

// text is the string of a tag, empty if it is not there.
func (h *rawHeader) text(tag uint32) (string, error) {
	b, err := h.typed(tag, typeString)
	if err != nil || b == nil {
		return "", err
	}
	return string(b[:len(b)-1]), nil
}

// texts are the strings of a tag, parts of the header; nil if it is not there. A header of NULs would be millions: more than
// limit are refused.
func (h *rawHeader) texts(tag uint32, limit int) ([][]byte, error) {
	b, err := h.typed(tag, typeStringArray)
	if err != nil || b == nil {
		return nil, err
	}
	e, _ := h.find(tag)
	if e.count > limit {
		return nil, fmt.Errorf("%w: tag %d has %d strings, over %d", ErrMalformed, tag, e.count, limit)
	}
	list := make([][]byte, 0, e.count)
	for len(b) > 0 {
		s, rest, _ := bytes.Cut(b, []byte{0})
		list = append(list, s)
		b = rest
	}
	return list, nil
}

// number is the one integer of a tag.
func (h *rawHeader) number(tag uint32, typ dataType) (n uint64, ok bool, err error) {
	b, err := h.typed(tag, typ)
	if err != nil || b == nil {
		return 0, false, err
	}
	if int64(len(b)) != typ.width() {
		return 0, false, fmt.Errorf("%w: tag %d has %d bytes, not %d", ErrMalformed, tag, len(b), typ.width())
	}
	if typ == typeInt64 {
		return binary.BigEndian.Uint64(b), true, nil
	}
	return uint64(binary.BigEndian.Uint32(b)), true, nil
}
