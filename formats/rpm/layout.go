package rpm

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
)

// freshReserve is the space left for later signatures in a signature header that has to grow: as much as rpmbuild leaves,
// enough for two of RSA-4096.
const freshReserve = 4128

// datum is an entry of a signature header in the making.
type datum struct {
	tag   uint32
	typ   dataType
	count int
	data  []byte
}

// keep returns the entries of the signature header whose tag is not among drop, nor the reserved space.
func (h *rawHeader) keep(drop []uint32) []datum {
	var list []datum
	for _, e := range h.entries {
		if e.tag != tagReserved && e.tag != tagReservedV6 && !slices.Contains(drop, e.tag) {
			list = append(list, datum{e.tag, e.typ, e.count, h.bytesOf(e)})
		}
	}
	return list
}

// layOut writes the signature header that is to stand where old does. It has old's length, for only then the file can
// be changed in place: the reserved space gives way or takes up the rest, as in rpm's rpmsign. Where that cannot be, it
// is longer and has fresh reserved space.
func layOut(old *rawHeader, list []datum, v6 bool) ([]byte, error) {
	reserve := uint32(tagReserved)
	if v6 {
		reserve = tagReservedV6
	}
	slices.SortFunc(list, func(a, b datum) int { return cmp.Compare(a.tag, b.tag) })
	bare := marshaledSize(list)
	exact, room := len(old.raw), int(padded(int64(len(old.raw))))
	// The length that rpm compares is without padding. Where reserved space was there before, a signature made and
	// deleted again leaves the very bytes.
	sizes := []int{exact, room}
	fill := 0
	if bare != exact {
		for _, size := range sizes {
			if k := size - bare - entrySize; k > 0 {
				fill = k
				break
			}
		}
		if fill == 0 && int(padded(int64(bare))) != room {
			fill = freshReserve
		}
	}
	raw := marshal(list, reserve, fill)
	size, err := headerSize(signatureKind, raw)
	if err == nil && size != int64(len(raw)) {
		err = fmt.Errorf("%d bytes, not %d", len(raw), size)
	}
	if err == nil {
		_, err = parseHeader(signatureKind, raw)
	}
	if err != nil {
		return nil, fmt.Errorf("laying out the signature header: %w", err)
	}
	return append(raw, make([]byte, padded(int64(len(raw)))-int64(len(raw)))...), nil
}

// marshaledSize is the length of what marshal writes without reserved space.
func marshaledSize(list []datum) int {
	data := 0
	for _, d := range list {
		if w := int(d.typ.width()); w > 1 {
			data += (w - data%w) % w
		}
		data += len(d.data)
	}
	return introSize + entrySize*(len(list)+2) + data
}

// marshal writes a signature header with a region (format_header.md). list is sorted by tag; reserved space of that many
// zeros comes last, so that its length moves nothing else.
func marshal(list []datum, reserveTag uint32, reserve int) []byte {
	if reserve > 0 {
		list = append(slices.Clip(list), datum{reserveTag, typeBin, reserve, make([]byte, reserve)})
	}
	index := make([]byte, 0, entrySize*(len(list)+1))
	// The data is written where it stays: it can have megabytes.
	size := int64(marshaledSize(list))
	raw := make([]byte, introSize+entrySize*(len(list)+1), padded(size))
	data := raw[len(raw):]
	for _, d := range list {
		for w := int(d.typ.width()); w > 1 && len(data)%w != 0; {
			data = append(data, 0)
		}
		index = appendEntry(index, d.tag, d.typ, int32(len(data)), d.count)
		data = append(data, d.data...)
	}
	region := appendEntry(nil, tagSigRegion, typeBin, int32(len(data)), entrySize)
	data = appendEntry(data, tagSigRegion, typeBin, int32(-entrySize*(len(list)+1)), entrySize)

	head := append(raw[:0], headerMagic...)
	head = binary.BigEndian.AppendUint32(head, uint32(len(list)+1))
	head = binary.BigEndian.AppendUint32(head, uint32(len(data)))
	head = append(head, region...)
	head = append(head, index...)
	return head[:len(head)+len(data)]
}

func appendEntry(b []byte, tag uint32, typ dataType, off int32, count int) []byte {
	b = binary.BigEndian.AppendUint32(b, tag)
	b = binary.BigEndian.AppendUint32(b, uint32(typ))
	b = binary.BigEndian.AppendUint32(b, uint32(off))
	return binary.BigEndian.AppendUint32(b, uint32(count))
}
