package kmod

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"slices"

	"github.com/ulikunitz/xz/lzma"
)

// maxDictionary bounds the memory of unpacking. modules_install uses 1 MiB with xz; xz -6 and zstd -19 have 8 MiB.
const maxDictionary = 8 << 20

// maxBlocks bounds what is remembered of an xz file for its index.
const maxBlocks = 4096

// xzReader unpacks one .xz stream with one LZMA2 filter. It is here because xz.Reader allocates whatever dictionary a
// block header claims, up to 4 GiB. Section numbers are those of The .xz File Format 1.2.
type xzReader struct {
	in      countingReader
	room    int64 // what the file can unpack to
	flags   [2]byte
	started bool
	err     error

	block   *lzma.Reader2 // nil between blocks
	sum     hash.Hash     // nil: no check
	start   int64         // of the block in the file
	written int64         // unpacked of the block
	want    [2]int64      // compressed and uncompressed size in the block header; -1: not there
	data    int64         // where the block's compressed data starts
	records [][2]uint64   // for the index

	total        int64 // unpacked of the blocks before
	dictionaries int64 // sum of their sizes, and of the block's
}

func newXZReader(r *bufio.Reader, room int64) *xzReader {
	return &xzReader{in: countingReader{r: r}, room: room}
}

// countingReader counts what is read, and is an io.ByteReader: package lzma reads no further than it must.
type countingReader struct {
	r *bufio.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func (c *countingReader) ReadByte() (byte, error) {
	b, err := c.r.ReadByte()
	if err == nil {
		c.n++
	}
	return b, err
}

func (x *xzReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for x.err == nil {
		if x.block == nil {
			x.err = x.next()
			continue
		}
		n, err := x.block.Read(p)
		x.written += int64(n)
		if x.sum != nil {
			x.sum.Write(p[:n])
		}
		if err == io.EOF {
			x.err = x.endBlock()
		} else {
			x.err = err
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, x.err
}

func (x *xzReader) take(n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := io.ReadFull(&x.in, b)
	if err != nil {
		return nil, fmt.Errorf("xz: %w", io.ErrUnexpectedEOF)
	}
	return b, nil
}

// next reads the stream header if it is due, then a block header (section 3.1) or the index.
func (x *xzReader) next() error {
	if !x.started {
		err := x.header()
		if err != nil {
			return err
		}
		x.started = true
	}
	x.start = x.in.n
	size, err := x.take(1)
	if err != nil {
		return err
	}
	if size[0] == 0 {
		return x.index()
	}
	if len(x.records) == maxBlocks {
		return fmt.Errorf("xz: over %d blocks", maxBlocks)
	}
	rest, err := x.take(int(size[0])*4 + 3)
	if err != nil {
		return err
	}
	return x.blockHeader(append(size, rest...))
}

// header reads the stream header (section 2.1.1).
func (x *xzReader) header() error {
	b, err := x.take(12)
	if err != nil {
		return err
	}
	if string(b[:6]) != "\xfd7zXZ\x00" || binary.LittleEndian.Uint32(b[8:]) != crc32.ChecksumIEEE(b[6:8]) {
		return errors.New("xz: stream header")
	}
	x.flags = [2]byte(b[6:8])
	switch x.flags { // section 2.1.1.2
	case [2]byte{0, 0}:
	case [2]byte{0, 1}:
		x.sum = crc32.NewIEEE()
	case [2]byte{0, 4}:
		x.sum = crc64.New(crc64.MakeTable(crc64.ECMA))
	case [2]byte{0, 10}:
		x.sum = sha256.New()
	default:
		return fmt.Errorf("xz: stream flags %x", x.flags)
	}
	return nil
}

func (x *xzReader) blockHeader(b []byte) error {
	body, crc := b[:len(b)-4], b[len(b)-4:]
	if binary.LittleEndian.Uint32(crc) != crc32.ChecksumIEEE(body) {
		return errors.New("xz: block header")
	}
	flags, r := body[1], bytes.NewReader(body[2:])
	if flags&0x3f != 0 { // section 3.1.2: one filter, nothing reserved
		return fmt.Errorf("xz: block flags %x: more than LZMA2", flags)
	}
	for i := range x.want {
		x.want[i] = -1
		if flags&(0x40<<i) == 0 {
			continue
		}
		n, err := binary.ReadUvarint(r)
		if err != nil || n > MaxModule {
			return errors.New("xz: sizes in a block header")
		}
		x.want[i] = int64(n)
	}
	var filter [3]byte // LZMA2, one byte of properties: the dictionary (section 5.3.1)
	_, err := io.ReadFull(r, filter[:])
	if err != nil || filter[0] != 0x21 || filter[1] != 1 || filter[2] > 40 {
		return errors.New("xz: filter other than LZMA2")
	}
	for range r.Len() {
		pad, _ := r.ReadByte()
		if pad != 0 {
			return errors.New("xz: padding of a block header")
		}
	}
	dict := int64(2|filter[2]&1) << (filter[2]/2 + 11)
	x.data, x.total, x.written = x.in.n, x.total+x.written, 0
	if x.sum != nil {
		x.sum.Reset()
	}
	return x.startBlock(dict)
}

// startBlock allocates a dictionary: what the header says, but no more than there can be to look back at.
func (x *xzReader) startBlock(dict int64) error {
	dict = min(dict, x.room)
	if x.want[1] >= 0 {
		dict = min(dict, x.want[1])
	}
	dict = max(dict, lzma.MinDictCap)
	if dict > maxDictionary {
		return fmt.Errorf("xz: dictionary of %d bytes, over %d", dict, maxDictionary)
	}
	// Small blocks with large dictionaries cost the time of clearing them.
	x.dictionaries += dict
	if x.dictionaries > x.total+maxDictionary+maxBlocks*lzma.MinDictCap {
		return errors.New("xz: blocks that are smaller than their dictionaries")
	}
	var err error
	x.block, err = lzma.Reader2Config{DictCap: int(dict)}.NewReader2(&x.in)
	return err
}

// endBlock checks what a block header said, and reads padding and check (sections 3.3 and 3.4).
func (x *xzReader) endBlock() error {
	if !x.block.EOS() {
		return fmt.Errorf("xz: %w", io.ErrUnexpectedEOF)
	}
	x.block = nil
	packed := x.in.n - x.data
	if x.want[0] >= 0 && x.want[0] != packed || x.want[1] >= 0 && x.want[1] != x.written {
		return errors.New("xz: block of another size than its header says")
	}
	pad, err := x.take(int(-packed & 3))
	if err != nil {
		return err
	}
	var want []byte
	if x.sum != nil {
		want = x.sum.Sum(nil)
		if x.flags[1] != 10 {
			slices.Reverse(want) // CRCs are little-endian
		}
	}
	check, err := x.take(len(want))
	if err != nil {
		return err
	}
	if !bytes.Equal(check, want) || !bytes.Equal(pad, make([]byte, len(pad))) {
		return errors.New("xz: block check")
	}
	x.records = append(x.records, [2]uint64{uint64(x.in.n - x.start - int64(len(pad))), uint64(x.written)})
	return nil
}

// index checks the index (section 4) and the stream footer (section 2.1.2), and that nothing follows.
func (x *xzReader) index() error {
	want := binary.AppendUvarint([]byte{0}, uint64(len(x.records)))
	for _, r := range x.records {
		want = binary.AppendUvarint(binary.AppendUvarint(want, r[0]), r[1])
	}
	for len(want)%4 != 0 {
		want = append(want, 0)
	}
	want = binary.LittleEndian.AppendUint32(want, crc32.ChecksumIEEE(want))
	tail := binary.LittleEndian.AppendUint32(nil, uint32(len(want)/4-1)) // backward size
	tail = append(tail, x.flags[:]...)
	want = binary.LittleEndian.AppendUint32(want, crc32.ChecksumIEEE(tail))
	want = append(append(want, tail...), "YZ"...)
	got, err := x.take(len(want) - 1)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want[1:]) {
		return errors.New("xz: index or footer")
	}
	_, err = x.in.ReadByte()
	if err != io.EOF {
		return errors.New("xz: data after the stream")
	}
	return io.EOF
}
