package pe

import (
	"crypto"
	"encoding/binary"
	"fmt"
	"hash"
	"io"

	"github.com/signwarden/signwarden/formats/cms"
)

// Digest returns the hash of the image that a signature holds (Authenticode, "Calculating the PE Image Hash"). A file
// whose length is not a multiple of 8 is hashed with the zeros that a signature would put behind it.
func (m *Image) Digest(h crypto.Hash) ([]byte, error) {
	if !cms.Signs(h) {
		return nil, fmt.Errorf("%w: hash %v", cms.ErrUnsupported, h)
	}
	s, err := m.sum(h)
	if err != nil {
		return nil, err
	}
	return s.hash.Sum(nil), nil
}

// sum reads the image and returns what it sums to.
func (m *Image) sum(h crypto.Hash) (*sum, error) {
	s := &sum{hash: h.New()}
	return s, m.copy(io.Discard, s, [4]byte{}, [8]byte{})
}

// sum takes what is signed: its hash, and its part of the PE checksum.
type sum struct {
	hash hash.Hash
	words
}

func (s *sum) Write(p []byte) (int, error) {
	s.words.Write(p)
	return s.hash.Write(p)
}

// copy writes the image to w with other bytes for the checksum and the directory entry, up to the certificate table
// and padded for it. s sees all but those two.
func (m *Image) copy(w io.Writer, s *sum, checksum [4]byte, directory [8]byte) error {
	both := io.MultiWriter(s, w)
	part := func(from, to int64) error {
		s.at = from
		n, err := io.Copy(both, io.NewSectionReader(m.file, from, to-from))
		if err == nil && n != to-from {
			return fmt.Errorf("%w: truncated: the file ends before %d", ErrMalformed, to)
		}
		return err
	}
	err := part(0, m.checksum)
	if err != nil {
		return err
	}
	_, err = w.Write(checksum[:])
	if err != nil {
		return err
	}
	err = part(m.checksum+4, m.directory)
	if err != nil {
		return err
	}
	_, err = w.Write(directory[:])
	if err != nil {
		return err
	}
	err = part(m.directory+8, m.end)
	if err != nil {
		return err
	}
	_, err = both.Write(make([]byte, align(m.end)-m.end))
	return err
}

// words sums little-endian words of 16 bits, which is the PE checksum as imagehlp's CheckSumMappedFile makes it. Parts
// may be added in any order, each at its offset.
type words struct {
	at  int64
	sum uint64
}

func (w *words) Write(p []byte) (int, error) {
	n := len(p)
	if w.at%2 == 1 && n > 0 {
		w.sum += uint64(p[0]) << 8
		p = p[1:]
	}
	for ; len(p) >= 2; p = p[2:] {
		w.sum += uint64(binary.LittleEndian.Uint16(p))
	}
	if len(p) == 1 {
		w.sum += uint64(p[0])
	}
	w.at += int64(n)
	return n, nil
}

// checksum is that of a file of size bytes whose words were summed: folded to 16 bits, plus the size.
func (w *words) checksum(size int64) uint32 {
	sum := w.sum
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return uint32(sum) + uint32(size)
}
