package fsverity

import (
	"crypto"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	"math/bits"
	"slices"
)

// Parameters say how the tree over a file is built. The zero value is that of fsverity-utils.
type Parameters struct {
	Hash      crypto.Hash // SHA-256 or SHA-512; zero: SHA-256
	BlockSize int         // in bytes, a power of two from 1,024 to 65,536; zero: DefaultBlockSize
	Salt      []byte      // at most MaxSalt bytes
}

// algorithms are the hashes of fs-verity by their numbers (include/uapi/linux/fsverity.h).
var algorithms = map[crypto.Hash]byte{crypto.SHA256: 1, crypto.SHA512: 2}

// Check fails with ErrParameters if these are none of fs-verity's.
func (p Parameters) Check() error {
	_, err := p.check()
	return err
}

// check fills the defaults in.
func (p Parameters) check() (Parameters, error) {
	if p.Hash == 0 {
		p.Hash = crypto.SHA256
	}
	if p.BlockSize == 0 {
		p.BlockSize = DefaultBlockSize
	}
	if algorithms[p.Hash] == 0 {
		return p, fmt.Errorf("%w: hash %v; there are SHA-256 and SHA-512", ErrParameters, p.Hash)
	}
	if p.BlockSize < minBlockSize || p.BlockSize > maxBlockSize || bits.OnesCount(uint(p.BlockSize)) != 1 {
		return p, fmt.Errorf("%w: block size %d; it is a power of two from %d to %d", ErrParameters, p.BlockSize, minBlockSize, maxBlockSize)
	}
	if len(p.Salt) > MaxSalt {
		return p, fmt.Errorf("%w: salt of %d bytes, over %d", ErrParameters, len(p.Salt), MaxSalt)
	}
	p.Salt = slices.Clone(p.Salt)
	return p, nil
}

// Digest reads a file to its end and returns its fs-verity digest: the hash of its descriptor ("fs-verity descriptor").
// It fails with ErrParameters before it reads.
func Digest(file io.Reader, p Parameters) ([]byte, error) {
	p, err := p.check()
	if err != nil {
		return nil, err
	}
	t := newTree(p)
	_, err = io.CopyBuffer(onlyWriter{t}, onlyReader{file}, make([]byte, 256<<10))
	if err != nil {
		return nil, fmt.Errorf("reading the file: %w", err)
	}
	h := p.Hash.New()
	h.Write(p.descriptor(t.size, t.root()))
	return h.Sum(nil), nil
}

// onlyReader and onlyWriter keep io.CopyBuffer to its buffer.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

// descriptor is a struct fsverity_descriptor without signature ("fs-verity descriptor").
func (p Parameters) descriptor(size uint64, root []byte) []byte {
	b := make([]byte, 256)
	b[0] = 1 // version
	b[1] = algorithms[p.Hash]
	b[2] = byte(bits.TrailingZeros(uint(p.BlockSize)))
	b[3] = byte(len(p.Salt))
	binary.LittleEndian.PutUint64(b[8:], size)
	copy(b[16:80], root)
	copy(b[80:112], p.Salt)
	return b
}

// tree is a Merkle tree in the making ("Merkle tree"). Of each level it holds the last block: a block goes up as a hash
// when another byte of its level comes.
type tree struct {
	p      Parameters
	h      hash.Hash
	salt   []byte   // padded with zeros to the hash's input block
	levels [][]byte // the data, then hashes of blocks below; of the last block what there is
	size   uint64   // of the data
}

func newTree(p Parameters) *tree {
	t := &tree{p: p, h: p.Hash.New()}
	if len(p.Salt) > 0 {
		t.salt = make([]byte, t.h.BlockSize())
		copy(t.salt, p.Salt)
	}
	return t
}

// Write adds data. It does not fail.
func (t *tree) Write(b []byte) (int, error) {
	t.size += uint64(len(b))
	t.add(0, b)
	return len(b), nil
}

func (t *tree) add(level int, b []byte) {
	for len(b) > 0 {
		if level == len(t.levels) {
			t.levels = append(t.levels, make([]byte, 0, t.p.BlockSize))
		}
		if len(t.levels[level]) == t.p.BlockSize {
			t.up(level)
		}
		block := t.levels[level]
		n := min(len(b), t.p.BlockSize-len(block))
		t.levels[level], b = append(block, b[:n]...), b[n:]
	}
}

// up puts the hash of a level's last block, filled with zeros, into the next level, and begins another block.
func (t *tree) up(level int) {
	block := t.levels[level]
	t.levels[level] = block[:0]
	t.add(level+1, t.sum(block))
}

func (t *tree) sum(block []byte) []byte {
	filled := block[:t.p.BlockSize]
	clear(filled[len(block):])
	t.h.Reset()
	t.h.Write(t.salt)
	t.h.Write(filled)
	return t.h.Sum(nil)
}

// root ends the tree: the hash of the one block of its highest level, all zeros if there is no data.
func (t *tree) root() []byte {
	if t.size == 0 {
		return make([]byte, t.p.Hash.Size())
	}
	level := 0
	for level < len(t.levels)-1 {
		t.up(level) // which may add a level
		level++
	}
	return t.sum(t.levels[level])
}
