package kmod

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// A Compression is how a module is packed.
type Compression string

// The compressions that the kernel's modules_install makes (scripts/Makefile.modinst).
const (
	Plain Compression = ""
	XZ    Compression = "xz"
	Zstd  Compression = "zstd"
	Gzip  Compression = "gzip"
)

// compressions are told apart by their first bytes, never by the name of a file.
var compressions = []struct {
	magic string
	c     Compression
}{
	{"\xfd7zXZ\x00", XZ},
	{"\x28\xb5\x2f\xfd", Zstd},
	{"\x1f\x8b\x08", Gzip},
	{"\x7fELF", Plain},
}

// A module is a file that was recognised. It is read as often as needed.
type module struct {
	file io.ReaderAt
	size int64
	comp Compression
	room int64 // what it unpacks to at most
}

func newModule(file io.ReaderAt, size int64) (module, error) {
	var head [6]byte
	n, err := io.ReadFull(io.NewSectionReader(file, 0, size), head[:])
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return module{}, fmt.Errorf("reading the module: %w", err)
	}
	if size > MaxModule {
		return module{}, fmt.Errorf("%w: %d bytes, over %d", ErrMalformed, size, MaxModule)
	}
	for _, c := range compressions {
		if bytes.HasPrefix(head[:n], []byte(c.magic)) {
			return module{file, size, c.c, min(MaxModule, max(ratioFrom, size*maxRatio))}, nil
		}
	}
	return module{}, fmt.Errorf("%w: neither ELF nor xz, zstd or gzip", ErrMalformed)
}

// read calls use with a reader of the module, unpacked and bounded. Errors of unpacking come back as ErrMalformed,
// those of the file as they are.
func (m module) read(use func(io.Reader) error) error {
	file := &fileReader{r: io.NewSectionReader(m.file, 0, m.size)}
	err := m.unpack(bufio.NewReaderSize(file, 64<<10), use)
	if err != nil && file.err != nil {
		return fmt.Errorf("reading the module: %w", file.err)
	}
	return err
}

func (m module) unpack(in *bufio.Reader, use func(io.Reader) error) error {
	switch m.comp {
	case XZ:
		return use(&boundedReader{r: newXZReader(in, m.room), packed: m.size})
	case Zstd:
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxDictionary), zstd.WithDecoderMaxMemory(MaxModule))
		if err != nil {
			return fmt.Errorf("%w: zstd: %v", ErrMalformed, err)
		}
		defer z.Close()
		return use(&boundedReader{r: z, packed: m.size})
	case Gzip:
		z, err := gzip.NewReader(in)
		if err != nil {
			return fmt.Errorf("%w: gzip: %v", ErrMalformed, err)
		}
		return use(&boundedReader{r: z, packed: m.size})
	default:
		return use(in)
	}
}

// fileReader remembers an error of the file, so that it is not taken for one of the compression.
type fileReader struct {
	r   io.Reader
	err error
}

func (f *fileReader) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil && err != io.EOF {
		f.err = err
	}
	return n, err
}

// boundedReader stops unpacking at the limits, and makes errors of it ErrMalformed.
type boundedReader struct {
	r      io.Reader
	packed int64
	n      int64
}

func (b *boundedReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.n += int64(n)
	if b.n > MaxModule || b.n > ratioFrom && b.n/maxRatio > b.packed {
		return 0, fmt.Errorf("%w: unpacks from %d to over %d bytes", ErrMalformed, b.packed, b.n-1)
	}
	if err != nil && err != io.EOF && !errors.Is(err, ErrMalformed) {
		err = fmt.Errorf("%w: unpacking: %v", ErrMalformed, err)
	}
	return n, err
}

// pack returns a writer that packs as modules_install would have, as near as the libraries can: the kernel itself
// unpacks (MODULE_DECOMPRESS), and its xz knows CRC32 as only check and wants a small dictionary
// (Documentation/staging/xz.rst). size is what will be written, or a little less.
func (c Compression) pack(w io.Writer, size int64) (io.WriteCloser, error) {
	// What a small module needs to look back; the libraries take a multiple of it in memory.
	reach := max(lzma.MinDictCap, 1<<bits.Len64(uint64(size)))
	switch c {
	case XZ: // xz --check=crc32 --lzma2=dict=1MiB
		return xz.WriterConfig{CheckSum: xz.CRC32, DictCap: min(1<<20, reach)}.NewWriter(w)
	case Zstd: // zstd: level 3, whose window is 2 MiB
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault),
			zstd.WithWindowSize(min(2<<20, reach)))
	case Gzip: // gzip -n
		return gzip.NewWriterLevel(w, gzip.DefaultCompression)
	default:
		return nopCloser{w}, nil
	}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
