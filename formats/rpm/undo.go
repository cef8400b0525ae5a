//go:build linux

package rpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// undoMagic begins an undo record.
const undoMagic = "signwarden rpm undo 1\n"

// An undo record is what it takes to decide what became of an overwriting, and to take it back.
type undo struct {
	offset int64 // of the signature header
	body   int64 // of the payload
	size   int64 // of the package
	around [sha256.Size]byte
	new    [sha256.Size]byte // of what was to be written
	old    []byte
}

// marshal writes the record, with its own checksum at the end: of a record that is not whole the package was not touched.
func (r undo) marshal() []byte {
	b := append(make([]byte, 0, undoFixed+len(r.old)+sha256.Size), undoMagic...)
	for _, n := range []int64{r.offset, r.body, r.size} {
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	b = append(b, r.around[:]...)
	b = append(b, r.new[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(r.old)))
	b = append(b, r.old...)
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

const undoFixed = len(undoMagic) + 3*8 + 2*sha256.Size + 4

// parseUndo reads a record.
func parseUndo(b []byte) (undo, error) {
	n := len(b) - sha256.Size
	if n < undoFixed || string(b[:len(undoMagic)]) != undoMagic {
		return undo{}, fmt.Errorf("%w: undo record of %d bytes", ErrMalformed, len(b))
	}
	if sum := sha256.Sum256(b[:n]); !bytes.Equal(sum[:], b[n:]) {
		return undo{}, fmt.Errorf("%w: checksum of an undo record", ErrMalformed)
	}
	f := b[len(undoMagic):n]
	var r undo
	for _, to := range []*int64{&r.offset, &r.body, &r.size} {
		*to = int64(binary.BigEndian.Uint64(f))
		f = f[8:]
	}
	f = f[copy(r.around[:], f):]
	f = f[copy(r.new[:], f):]
	size := binary.BigEndian.Uint32(f)
	r.old = f[4:]
	end := r.offset + int64(size)
	if int64(size) != int64(len(r.old)) || r.offset != leadSize || r.body < end || r.size < r.body {
		return undo{}, fmt.Errorf("%w: undo record", ErrMalformed)
	}
	return r, nil
}

// sumAround is over what stands before the payload but for the signature header: it tells the package that a record is of
// from another that has come in its place.
func (r undo) sumAround(f *os.File) ([sha256.Size]byte, error) {
	h := sha256.New()
	end := r.offset + int64(len(r.old))
	for _, part := range [][2]int64{{0, r.offset}, {end, r.body}} {
		n, err := io.Copy(h, io.NewSectionReader(f, part[0], part[1]-part[0]))
		if err == nil && n != part[1]-part[0] {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return [sha256.Size]byte{}, err
		}
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// A discarder throws an undo record away, which is not needed any more.
type discarder interface{ discard() error }

// A keeper is the place of an undo record: a file beside the package, or a slot of a Journal.
type keeper interface {
	discarder
	write(r undo, new []byte) error // it is on the disk when this returns
	leave()                         // it stays, for Recover
}

// overwrite writes u.New into f, which is locked and unchanged.
func (d disk) overwrite(f *os.File, u *Update, record keeper) error {
	r := undo{offset: u.Offset, body: u.body, size: u.size, around: u.around, new: sha256.Sum256(u.New), old: u.Old}
	err := record.write(r, u.New)
	if err != nil {
		return errors.Join(fmt.Errorf("writing the undo record: %w", err), record.discard())
	}
	err = d.write(f, u.New, u.Offset)
	if err == nil {
		err = d.syncData(f)
	}
	if err != nil {
		undone := d.restore(f, record, r)
		if undone != nil {
			record.leave()
			return fmt.Errorf("%w: the package may be damaged until Recover puts it in order: %w (and %w)",
				ErrUnfinished, err, undone)
		}
		return err
	}
	err = record.discard()
	if err != nil {
		record.leave()
		return fmt.Errorf("the package is signed, but its undo record is still there until Recover: %w", err)
	}
	return nil
}

// undoFile is an undo record that is a file beside the package.
type undoFile struct {
	d    disk
	path string
	made bool
}

func (u *undoFile) write(r undo, _ []byte) error {
	f, err := u.d.create(u.path, os.O_EXCL)
	if err != nil {
		return err
	}
	defer f.Close()
	u.made = true
	err = u.d.write(f, r.marshal(), 0)
	if err == nil {
		err = u.d.sync(f)
	}
	if err == nil {
		err = u.d.syncDir(filepath.Dir(u.path))
	}
	return err
}

func (u *undoFile) leave() {}

func (u *undoFile) discard() error {
	if !u.made {
		return nil // it is another's
	}
	return u.d.discard(u.path)
}

// restore writes the old signature header back.
func (d disk) restore(f *os.File, record discarder, r undo) error {
	err := d.write(f, r.old, r.offset)
	if err != nil {
		return err
	}
	err = d.sync(f)
	if err != nil {
		return err
	}
	return record.discard()
}

func (d disk) discard(record string) error {
	err := d.remove(record)
	if err != nil {
		return err
	}
	return d.syncDir(filepath.Dir(record))
}

// A Recovery says what Recover found.
type Recovery int

const (
	Clean     Recovery = iota // nothing to do
	Completed                 // the new package was there
	Restored                  // the old package was there, or is again
)

// Recover puts in order what a killed signer has left at path: an undo record, a temporary file. It is for every package
// before it is read to be signed; where there is nothing to do it costs a few system calls. An ErrUnfinished says that the
// package is damaged and the undo record of no use.
func Recover(path string, o FileOptions) (Recovery, error) {
	return realDisk.recover(path, o, nil)
}

// recover leaves the journal alone that is j's own.
func (d disk) recover(path string, o FileOptions, j *Journal) (Recovery, error) {
	if o.FollowLinks {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return Clean, err
		}
		path = real
	}
	err := d.removeTemp(path)
	if err != nil {
		return Clean, err
	}
	found := Clean
	if dir := filepath.Dir(path); !j.has(dir) {
		found, err = d.recoverJournal(dir, filepath.Base(path), ownerOf(path))
		if err != nil {
			return Clean, err
		}
	}
	record := beside(path, "undo")
	_, err = os.Lstat(record)
	if errors.Is(err, os.ErrNotExist) {
		return found, nil // without asking for a lock, or to write
	}
	if err != nil {
		return Clean, err
	}
	path, f, err := lockPackage(path, os.O_RDWR, o)
	if err != nil {
		return Clean, err
	}
	defer f.Close()
	b, err := readUndo(record, f)
	if errors.Is(err, os.ErrNotExist) {
		return Clean, nil // whoever held the lock has finished
	}
	if err != nil {
		return Clean, fmt.Errorf("reading the undo record of %s: %w", path, err)
	}
	r, err := parseUndo(b)
	if err != nil {
		return d.recoverWithout(f, path, record, err)
	}
	how, err := d.settle(f, &undoFile{d, record, true}, r, nil)
	if err != nil {
		return Clean, fmt.Errorf("recovering %s: %w", path, err)
	}
	return how, nil
}

// settle decides by the checksums. A signature header that is neither the old nor the new one is torn; where torn is not
// nil it says whether it is, or was written later, and stays.
func (d disk) settle(f *os.File, record discarder, r undo, torn func(now []byte) bool) (Recovery, error) {
	info, err := f.Stat()
	if err != nil {
		return Clean, err
	}
	if info.Size() != r.size {
		return Clean, record.discard() // of a package that is no longer there
	}
	around, err := r.sumAround(f)
	if err != nil {
		return Clean, err
	}
	if around != r.around {
		return Clean, record.discard()
	}
	now := make([]byte, len(r.old))
	_, err = f.ReadAt(now, r.offset)
	if err != nil {
		return Clean, err
	}
	switch {
	case sha256.Sum256(now) == r.new:
		err = d.sync(f) // read from the cache, it may not be on the disk
		if err != nil {
			return Clean, err
		}
		return Completed, record.discard()
	case bytes.Equal(now, r.old):
		err = d.sync(f)
		if err != nil {
			return Clean, err
		}
		return Restored, record.discard()
	case torn != nil && !torn(now):
		return Clean, record.discard()
	}
	return Restored, d.restore(f, record, r)
}

// recoverWithout deals with a record that is not whole: by the order of writing, the package was not touched then.
func (d disk) recoverWithout(f *os.File, path, record string, why error) (Recovery, error) {
	info, err := f.Stat()
	if err != nil {
		return Clean, err
	}
	p, err := ReadPackage(f, info.Size())
	if err == nil {
		err = p.CheckDigests(false)
	}
	if err != nil && !errors.Is(err, ErrNoDigest) {
		return Clean, fmt.Errorf("%w: %s is damaged (%w), and so is its undo record %s (%w)",
			ErrUnfinished, path, err, record, why)
	}
	return Restored, d.discard(record)
}

// readUndo reads the record of a package. It must be the package owner's or the caller's: in a folder that others may write
// to, one of theirs would have us write what they like.
func readUndo(path string, pkg *os.File) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	of, err := pkg.Stat()
	if err != nil {
		return nil, err
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	if !info.Mode().IsRegular() || int(owner) != os.Geteuid() && owner != of.Sys().(*syscall.Stat_t).Uid {
		return nil, fmt.Errorf("%w: %s is not ours", ErrUnsupported, path)
	}
	const limit = maxSigHeader + padding + int64(undoFixed) + sha256.Size
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%w: undo record over %d bytes", ErrMalformed, limit)
	}
	return b, nil
}

// removeTemp removes the temporary file of a killed Rewrite. One that is locked is being written.
func (d disk) removeTemp(path string) error {
	temp := beside(path, "new")
	f, err := os.OpenFile(temp, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	err = lock(f, temp)
	if errors.Is(err, ErrChanged) || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return d.remove(temp)
}

// ownerOf is the owner of the package at path, or the caller where that cannot be told.
func ownerOf(path string) uint32 {
	info, err := os.Lstat(path)
	if err != nil {
		return uint32(os.Geteuid())
	}
	return info.Sys().(*syscall.Stat_t).Uid
}
