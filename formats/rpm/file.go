//go:build linux

package rpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

var (
	// ErrLink says that a file is a symbolic link, or has other names, and FileOptions does not allow that.
	ErrLink = errors.New("file is a link")

	// ErrLocked says that another signer works on the file.
	ErrLocked = errors.New("file is being signed by another process")

	// ErrChanged says that a file is not the one that the Update was made of. It was left alone.
	ErrChanged = errors.New("file has changed since it was read")

	// ErrUnfinished says that an undo record lies beside the package. Recover puts it in order.
	ErrUnfinished = errors.New("an earlier signing did not finish")
)

// FileOptions are what may be done to a file. The zero value is good.
type FileOptions struct {
	// FollowLinks changes the file that a symbolic link leads to.
	FollowLinks bool

	// HardLinks changes a file that has other names. In place all of them change; Rewrite leaves the others as
	// they were.
	HardLinks bool
}

// disk is what changes a disk, so that tests can stop at each step.
type disk struct {
	create  func(path string, flag int) (*os.File, error)
	write   func(f *os.File, b []byte, off int64) error
	copy    func(to *os.File, from io.Reader) (int64, error)
	sync    func(f *os.File) error
	rename  func(from, to string) error
	remove  func(path string) error
	syncDir func(path string) error

	syncData  func(f *os.File) error                      // sync, but for what is only about the file
	writeSync func(f *os.File, b []byte, off int64) error // write and syncData, of these bytes
}

var realDisk = disk{
	create: func(path string, flag int) (*os.File, error) {
		return os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|flag, 0o600)
	},
	write: func(f *os.File, b []byte, off int64) error {
		_, err := f.WriteAt(b, off)
		return err
	},
	// Between files this is copy_file_range, which shares blocks where the file system can.
	copy:    func(to *os.File, from io.Reader) (int64, error) { return to.ReadFrom(from) },
	sync:    func(f *os.File) error { return f.Sync() },
	rename:  os.Rename,
	remove:  os.Remove,
	syncDir: new(dirSyncs).sync,

	syncData:  func(f *os.File) error { return unix.Fdatasync(int(f.Fd())) },
	writeSync: writeSync,
}

func writeSync(f *os.File, b []byte, off int64) error {
	n, err := unix.Pwritev2(int(f.Fd()), [][]byte{b}, off, unix.RWF_DSYNC)
	if err == nil && n == len(b) {
		return nil
	}
	// Cut off by a signal, or a file system that does not know how.
	_, err = f.WriteAt(b, off)
	if err != nil {
		return err
	}
	return unix.Fdatasync(int(f.Fd()))
}

// dirSyncs has directories on the disk. Who comes while a directory is being synced shares the next sync of it with all
// others who do: signers of many packages of one directory would wait for each other's, one after the other.
type dirSyncs struct {
	mu sync.Mutex // guards of and its next; held for a look-up
	of map[string]*dirQueue
}

type dirQueue struct {
	turn sync.Mutex // held while the directory is being synced
	next *dirSync   // nil: nobody waits
}

type dirSync struct {
	done chan struct{} // closed when err is set
	err  error
}

// sync returns when a sync of the directory that began after the call has ended.
func (s *dirSyncs) sync(path string) error {
	s.mu.Lock()
	if s.of == nil {
		s.of = map[string]*dirQueue{}
	}
	q := s.of[path]
	if q == nil {
		q = &dirQueue{}
		s.of[path] = q
	}
	mine, first := q.next, q.next == nil
	if first {
		mine = &dirSync{done: make(chan struct{})}
		q.next = mine
	}
	s.mu.Unlock()
	if first {
		q.turn.Lock()
		s.mu.Lock()
		q.next = nil // who comes from now on may be too late for this one
		s.mu.Unlock()
		mine.err = syncDir(path)
		s.mu.Lock()
		if q.next == nil { // nobody has come meanwhile
			delete(s.of, path)
		}
		s.mu.Unlock()
		q.turn.Unlock()
		close(mine.done)
	}
	<-mine.done
	return mine.err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// ApplyInPlace puts the signature header of the package at path in the old one's place: mode, owner, extended attributes
// and other names of the file stay. A package whose Update has another length is copied and renamed, as Rewrite does. Any
// other is overwritten:
//
//  1. The file must be, up to its payload, the one that was read; else ErrChanged.
//  2. What is overwritten is first written to an undo record beside the package, and on the disk before the package is
//     touched. If the process is killed or power fails, Recover makes of the two the old or the new package.
//  3. A lock keeps other signers out, for as long as this takes.
//
// An error leaves the old package, unless it says that Recover is needed.
//
// For many packages there is a Journal.
func ApplyInPlace(path string, u *Update, o FileOptions) error {
	return realDisk.applyInPlace(path, u, o, nil)
}

// applyInPlace has undo records in j, where j is not nil and takes them.
func (d disk) applyInPlace(path string, u *Update, o FileOptions, j *Journal) error {
	if !u.InPlace() {
		return d.rewrite(path, path, u, o, j)
	}
	path, f, err := lockPackage(path, os.O_RDWR, o)
	if err != nil {
		return err
	}
	defer f.Close() // and the lock goes
	err = finished(path, j)
	if err == nil {
		err = u.unchanged(f)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if bytes.Equal(u.Old, u.New) {
		return nil
	}
	err = d.overwrite(f, u, d.keeper(path, len(u.Old), j))
	if err != nil {
		return fmt.Errorf("signing %s in place: %w", path, err)
	}
	return nil
}

// keeper is where the undo record of the package at path goes.
func (d disk) keeper(path string, old int, j *Journal) keeper {
	if j != nil {
		s := j.slot(path, undoFixed+2*old+sha256.Size)
		if s != nil {
			return s
		}
	}
	return &undoFile{d, beside(path, "undo"), false}
}

// Rewrite writes the new package to a temporary file beside dst and renames it to dst, so that dst is at any time the old
// file, or none, or the new one. path and dst may be the same. The new file has the mode of the old; its owner
// and extended attributes too, or Rewrite fails, if it takes the old one's place, and as far as permitted if not.
func Rewrite(path, dst string, u *Update, o FileOptions) error {
	return realDisk.rewrite(path, dst, u, o, nil)
}

func (d disk) rewrite(path, dst string, u *Update, o FileOptions, j *Journal) error {
	replaces := path == dst || sameFile(path, dst)
	if !replaces {
		o.HardLinks = true // it is only read
	}
	path, f, err := lockPackage(path, os.O_RDONLY, o)
	if err != nil {
		return err
	}
	defer f.Close()
	if replaces {
		dst = path // what a link led to
	}
	err = finished(path, j)
	if err == nil {
		err = u.unchanged(f)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return d.replace(f, dst, u, replaces)
}

// replace writes the new package of f, which is locked and unchanged, to dst. asOld is whether it must be like f, whose
// place it takes.
func (d disk) replace(f *os.File, dst string, u *Update, asOld bool) error {
	temp := beside(dst, "new")
	// A file of ours, not one that somebody has put there. What a killed signer has left has nobody's lock, and goes.
	out, err := d.create(temp, os.O_EXCL)
	if errors.Is(err, os.ErrExist) {
		err = d.removeTemp(dst)
		if err == nil {
			out, err = d.create(temp, os.O_EXCL)
		}
	}
	if errors.Is(err, os.ErrExist) {
		err = ErrLocked
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", dst, err)
	}
	defer out.Close()
	err = lock(out, temp)
	if err != nil {
		return fmt.Errorf("writing %s: %w", dst, err)
	}
	err = d.fill(out, f, u)
	if err == nil {
		err = keepAttributes(out, f, asOld)
	}
	if err == nil {
		err = d.sync(out)
	}
	if err == nil {
		err = d.rename(temp, dst)
	}
	if err != nil {
		d.remove(temp) // best effort: it is in nobody's way
		return fmt.Errorf("writing %s: %w", dst, err)
	}
	err = d.syncDir(filepath.Dir(dst))
	if err != nil {
		return fmt.Errorf("%s is written, but may be gone after a power cut: %w", dst, err)
	}
	return nil
}

// fill writes the new package to out.
func (d disk) fill(out, f *os.File, u *Update) error {
	err := out.Truncate(0)
	if err != nil {
		return err
	}
	if u.InPlace() && unix.IoctlFileClone(int(out.Fd()), int(f.Fd())) == nil {
		return d.write(out, u.New, u.Offset)
	}
	err = d.write(out, u.Prefix(), 0)
	if err != nil {
		return err
	}
	_, err = out.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	_, err = f.Seek(u.Rest(), io.SeekStart)
	if err != nil {
		return err
	}
	n, err := d.copy(out, io.LimitReader(f, u.size-u.Rest()))
	if err == nil && n != u.size-u.Rest() {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// unchanged checks that the file is the one that u was made of, as far as can be told without reading the payload.
func (u *Update) unchanged(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != u.size {
		return fmt.Errorf("%w: it has %d bytes, had %d", ErrChanged, info.Size(), u.size)
	}
	h := sha256.New()
	_, err = io.Copy(h, io.NewSectionReader(f, 0, u.body))
	if err != nil {
		return err
	}
	if [sha256.Size]byte(h.Sum(nil)) != u.prefix {
		return ErrChanged
	}
	return nil
}

// lockPackage opens and locks a package, and returns the path of the file itself.
func lockPackage(path string, flag int, o FileOptions) (string, *os.File, error) {
	if o.FollowLinks {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return "", nil, err
		}
		path = real
	}
	// Without O_NONBLOCK the opening of a pipe would wait for its other end.
	f, err := os.OpenFile(path, flag|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return "", nil, fmt.Errorf("%w: %s is a symbolic link", ErrLink, path)
	}
	if err != nil {
		return "", nil, err
	}
	err = lock(f, path)
	if err == nil {
		err = plain(f, o)
	}
	if err != nil {
		f.Close()
		return "", nil, fmt.Errorf("%s: %w", path, err)
	}
	return path, f, nil
}

// finished checks that no undo record lies beside the locked package, in a file or in the journal of a process that was
// killed. j's own is none.
func finished(path string, j *Journal) error {
	_, err := os.Lstat(beside(path, "undo"))
	if err == nil {
		return ErrUnfinished
	}
	if !errors.Is(err, os.ErrNotExist) || j.has(filepath.Dir(path)) {
		return unlessMissing(err)
	}
	f, info, err := openJournal(filepath.Dir(path), ownerOf(path))
	if err != nil || f == nil {
		return err
	}
	defer f.Close()
	return eachSlot(f, info.Size(), func(s slotRecord, _ int64) error {
		if s.name == filepath.Base(path) {
			return ErrUnfinished
		}
		return nil
	})
}

func unlessMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// plain checks that a file is a regular one, with one name unless more are allowed.
func plain(f *os.File, o FileOptions) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: not a regular file", ErrUnsupported)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Nlink > 1 && !o.HardLinks {
		return fmt.Errorf("%w: it has %d names", ErrLink, st.Nlink)
	}
	return nil
}

// lock takes the lock, which ends with f, and checks that path still leads to f: another signer may have renamed a new
// file to it.
func lock(f *os.File, path string) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrLocked
	}
	if err != nil {
		return fmt.Errorf("locking: %w", err)
	}
	mine, err := f.Stat()
	if err != nil {
		return err
	}
	now, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !os.SameFile(mine, now) {
		return ErrChanged
	}
	return nil
}

func sameFile(a, b string) bool {
	x, err := os.Lstat(a)
	if err != nil {
		return false
	}
	y, err := os.Lstat(b)
	return err == nil && os.SameFile(x, y)
}

// beside is the path of a file of ours for the package at path. A name that would be too long gives way to its hash.
func beside(path, kind string) string {
	dir, base := filepath.Split(path)
	name := "." + base + ".signwarden-" + kind
	if len(name) > unix.NAME_MAX {
		sum := sha256.Sum256([]byte(base))
		name = "." + hex.EncodeToString(sum[:]) + ".signwarden-" + kind
	}
	return filepath.Join(dir, name)
}
