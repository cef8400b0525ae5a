package pe

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// An Image is a PE file that was recognised. It refers to the file, which must not change. It is safe for concurrent
// use if the file is.
type Image struct {
	file io.ReaderAt
	size int64

	checksum  int64 // offset of the CheckSum field
	directory int64 // offset of the certificate table's directory entry
	end       int64 // of what is signed: the certificate table or, without, the file
	entries   []entry
}

// An entry is one WIN_CERTIFICATE (PE, "The Attribute Certificate Table").
type entry struct {
	raw []byte // with its header, without padding behind it
	der []byte // of a signature; nil: of another type
}

// What an entry of ours has in its header.
const (
	entryHeader   = 8
	revision2     = 0x0200 // WIN_CERT_REVISION_2_0
	typePKCS7     = 2      // WIN_CERT_TYPE_PKCS_SIGNED_DATA
	entryAligned  = 8
	certDirectory = 4 // index of the certificate table in the data directories
)

// Parse reads the headers of an image and its certificate table.
func Parse(file io.ReaderAt, size int64) (*Image, error) {
	if size < 0 || size > maxSize {
		return nil, fmt.Errorf("%w: %d bytes, over %d", ErrMalformed, size, int64(maxSize))
	}
	m := &Image{file: file, size: size, end: size}
	var dos [64]byte
	err := m.readAt(dos[:], 0)
	if err != nil {
		return nil, err
	}
	if string(dos[:2]) != "MZ" {
		return nil, fmt.Errorf("%w: no MZ", ErrMalformed)
	}
	at := peOffset(dos)
	var coff [24]byte // signature and COFF file header
	err = m.readAt(coff[:], at)
	if err != nil {
		return nil, err
	}
	if string(coff[:4]) != "PE\x00\x00" {
		return nil, fmt.Errorf("%w: no PE signature at %d", ErrMalformed, at)
	}
	if machine := binary.LittleEndian.Uint16(coff[4:]); !slices.Contains(machines, machine) {
		return nil, fmt.Errorf("%w: machine %#x is none that EFI has", ErrMalformed, machine)
	}
	sections := int64(binary.LittleEndian.Uint16(coff[6:]))
	optSize := int64(binary.LittleEndian.Uint16(coff[20:]))
	if sections == 0 || sections > maxSections {
		return nil, fmt.Errorf("%w: %d sections, not 1 to %d", ErrMalformed, sections, maxSections)
	}
	headers := make([]byte, optSize+sections*sectionHeader)
	err = m.readAt(headers, at+int64(len(coff)))
	if err != nil {
		return nil, err
	}
	err = m.parseHeaders(headers, at+int64(len(coff)), optSize)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// machines are those of EFI images (UEFI, section 2.1.1; PE, "Machine Types"): i386, x86-64, ia64, Arm (Thumb too), AArch64,
// RISC-V, LoongArch, and EFI byte code. sbverify reads no other.
var machines = []uint16{0x14c, 0x8664, 0x200, 0x1c0, 0x1c2, 0x1c4, 0xaa64, 0x5032, 0x5064, 0x5128, 0x6232, 0x6264, 0xebc}

// peOffset is where the MS-DOS stub says that the PE signature is.
func peOffset(dos [64]byte) int64 { return int64(binary.LittleEndian.Uint32(dos[60:])) }

// readAt reads all of p or fails with ErrMalformed, if the file is too short, or with the file's error.
func (m *Image) readAt(p []byte, off int64) error {
	if off > m.size || int64(len(p)) > m.size-off {
		return fmt.Errorf("%w: truncated: %d bytes wanted at %d of %d", ErrMalformed, len(p), off, m.size)
	}
	n, err := m.file.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: truncated: the file ends before %d", ErrMalformed, m.size)
	}
	return fmt.Errorf("reading the image: %w", err)
}

// parseHeaders reads the optional header and the section table, which are at off.
func (m *Image) parseHeaders(headers []byte, off, optSize int64) error {
	opt := headers[:optSize]
	directories := 0 // their offset, after the fields of either form (PE, "Optional Header")
	if len(opt) >= 2 {
		directories = map[uint16]int{0x10b: 96, 0x20b: 112}[binary.LittleEndian.Uint16(opt)]
	}
	if directories == 0 || len(opt) < directories+8*(certDirectory+1) ||
		binary.LittleEndian.Uint32(opt[directories-4:]) <= certDirectory {
		return fmt.Errorf("%w: optional header of %d bytes without a certificate table entry", ErrMalformed, len(opt))
	}
	m.checksum = off + 64
	m.directory = off + int64(directories) + 8*certDirectory
	le := binary.LittleEndian
	tableAt := int64(le.Uint32(opt[m.directory-off:]))
	tableSize := int64(le.Uint32(opt[m.directory-off+4:]))
	sizeOfHeaders := int64(le.Uint32(opt[60:]))
	if sizeOfHeaders < off+int64(len(headers)) || sizeOfHeaders > m.size {
		return fmt.Errorf("%w: headers of %d bytes", ErrMalformed, sizeOfHeaders)
	}
	last, err := checkSections(headers[optSize:], sizeOfHeaders)
	if err != nil {
		return err
	}
	if tableAt == 0 && tableSize == 0 {
		if last > m.size {
			return fmt.Errorf("%w: truncated: sections end at %d of %d", ErrMalformed, last, m.size)
		}
		return nil
	}
	// Authenticode, "Calculating the PE Image Hash", hashes what is behind the table; EDK2 hashes as many bytes before
	// its end as there are behind. Only with the table at the end is there one answer.
	if tableAt < last || tableAt+tableSize != m.size || tableAt%entryAligned != 0 || tableSize > maxTable {
		return fmt.Errorf("%w: certificate table of %d bytes at %d, not between %d and the end of the file, %d",
			ErrMalformed, tableSize, tableAt, last, m.size)
	}
	m.end = tableAt
	table := make([]byte, tableSize)
	err = m.readAt(table, tableAt)
	if err != nil {
		return err
	}
	m.entries, err = parseTable(table)
	return err
}

const sectionHeader = 40

// checkSections returns where the last section ends. Authenticode and EDK2 hash the headers and then the sections by
// their offset; a gap is hashed by some tools and not by others (rhboot/shim#84, systemd#21956), so that there must be
// none.
func checkSections(table []byte, end int64) (int64, error) {
	type section struct{ at, size int64 }
	var all []section
	for h := range slices.Chunk(table, sectionHeader) {
		s := section{int64(binary.LittleEndian.Uint32(h[20:])), int64(binary.LittleEndian.Uint32(h[16:]))}
		if s.size != 0 { // one of zeros only, in memory
			all = append(all, s)
		}
	}
	slices.SortFunc(all, func(a, b section) int { return cmp.Compare(a.at, b.at) })
	for _, s := range all {
		if s.at > end {
			return 0, fmt.Errorf("%w: gap from %#x to the section at %#x", ErrLayout, end, s.at)
		}
		if s.at < end {
			return 0, fmt.Errorf("%w: the section at %#x overlaps what ends at %#x", ErrLayout, s.at, end)
		}
		end += s.size
	}
	return end, nil
}

// parseTable reads the entries of a certificate table. Debian's images have lengths that are not rounded up.
func parseTable(table []byte) ([]entry, error) {
	var all []entry
	for len(table) > 0 {
		if len(table) < entryHeader {
			return nil, fmt.Errorf("%w: %d bytes behind the last certificate", ErrMalformed, len(table))
		}
		n := int64(binary.LittleEndian.Uint32(table))
		if n <= entryHeader || n > int64(len(table)) || len(all) == maxSignatures {
			return nil, fmt.Errorf("%w: certificate %d of %d bytes in a table of %d", ErrMalformed, len(all)+1, n, len(table))
		}
		e := entry{raw: table[:n]}
		if binary.LittleEndian.Uint16(table[4:]) == revision2 && binary.LittleEndian.Uint16(table[6:]) == typePKCS7 {
			e.der = trimDER(table[entryHeader:n])
		}
		all = append(all, e)
		table = table[min(align(n), int64(len(table))):]
	}
	return all, nil
}

// trimDER cuts the padding behind a DER element, if that is all there is: in most images the length takes it in.
func trimDER(b []byte) []byte {
	n := derLength(b)
	if n < 0 || n > len(b) || len(b)-n >= entryAligned || len(bytes.Trim(b[n:], "\x00")) > 0 {
		return b
	}
	return b[:n]
}

// derLength is the length of the DER element that b starts with, or -1.
func derLength(b []byte) int {
	if len(b) < 2 || b[0] != 0x30 {
		return -1
	}
	if b[1] < 0x80 {
		return 2 + int(b[1])
	}
	k := int(b[1] & 0x7f)
	if k == 0 || k > 3 || len(b) < 2+k {
		return -1
	}
	n := 0
	for _, c := range b[2 : 2+k] {
		n = n<<8 | int(c)
	}
	return 2 + k + n
}

func align(n int64) int64 { return (n + entryAligned - 1) &^ (entryAligned - 1) }

// Signatures returns the CMS messages of the certificate table, in their order. None is verified.
func (m *Image) Signatures() [][]byte {
	var all [][]byte
	for _, e := range m.entries {
		if e.der != nil {
			all = append(all, bytes.Clone(e.der))
		}
	}
	return all
}
