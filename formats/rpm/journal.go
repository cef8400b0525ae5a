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
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// journalName is that of a Journal's file in a directory.
const journalName = ".signwarden-undo"

// slotSize is the room of one undo record in a Journal's file, in bytes. It has the old and the new signature header, which
// with two signatures of RSA-4096 and the reserve are some 6 KiB each. A larger record has a file of its own.
const slotSize = 64 << 10

// maxSlots bounds a Journal's file. Who comes when all are taken has a file of its own.
const maxSlots = 1024

// A Journal signs many packages in place. It is ApplyInPlace and Recover for them, with the same promises; but the undo
// records of all packages of a directory that are being overwritten are in one file there, .signwarden-undo, which stays
// until Close. To make a file and to remove it costs the disk ten times what it costs to overwrite a package, so that
// this is what signing thousands takes. It is safe for concurrent use.
//
// A process that is killed leaves the file. Recover of any package of that directory then puts all in order that were being
// overwritten. Where there can be no such file, or another process has one, each record is in a file of its own.
type Journal struct {
	d disk

	recovering sync.Mutex // held by Recover: of the packages of one journal all wait until it is settled

	mu   sync.Mutex // guards dirs and what is in them; held while a file is made, and else for a few instructions
	dirs map[string]*journalFile
}

// journalFile is the file of one directory. It is locked while this process has it.
type journalFile struct {
	f     *os.File // nil: there can be none
	free  []int64  // offsets of slots
	slots int64
	stuck bool // a record in it is still needed
}

// NewJournal returns a Journal without files. Close it.
func NewJournal() *Journal { return &Journal{d: realDisk} }

// ApplyInPlace is the function of that name.
func (j *Journal) ApplyInPlace(path string, u *Update, o FileOptions) error {
	return j.d.applyInPlace(path, u, o, j)
}

// Recover is the function of that name.
func (j *Journal) Recover(path string, o FileOptions) (Recovery, error) {
	j.recovering.Lock()
	defer j.recovering.Unlock()
	return j.d.recover(path, o, j)
}

// Close removes the files. None of them is needed any more, unless an error of ApplyInPlace has said so.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var errs []error
	for dir, jf := range j.dirs {
		if jf.f == nil {
			continue
		}
		if !jf.stuck {
			err := j.d.discard(jf.f.Name())
			if err != nil {
				errs = append(errs, fmt.Errorf("removing the undo records of %s: %w", dir, err))
			}
		}
		jf.f.Close() // and the lock goes
	}
	j.dirs = nil
	return errors.Join(errs...)
}

// has says whether the journal of the directory is this one.
func (j *Journal) has(dir string) bool {
	if j == nil {
		return false
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	jf := j.dirs[dir]
	return jf != nil && jf.f != nil
}

// slot returns a place for the record of the package at path, or nil where there is none to be had.
func (j *Journal) slot(path string, size int) *slot {
	dir, name := filepath.Dir(path), filepath.Base(path)
	if size+slotFixed+len(name) > slotSize {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	jf := j.dirs[dir]
	if jf == nil {
		jf = &journalFile{f: j.open(dir)}
		if j.dirs == nil {
			j.dirs = map[string]*journalFile{}
		}
		j.dirs[dir] = jf
	}
	if jf.f == nil {
		return nil
	}
	if n := len(jf.free); n > 0 {
		at := jf.free[n-1]
		jf.free = jf.free[:n-1]
		return &slot{j, jf, at, name}
	}
	if jf.slots == maxSlots {
		return nil
	}
	jf.slots++
	return &slot{j, jf, (jf.slots - 1) * slotSize, name}
}

// open makes the file of a directory, or returns nil: what is wrong is told by whoever then makes a file of his own.
func (j *Journal) open(dir string) *os.File {
	path := filepath.Join(dir, journalName)
	f, err := j.d.create(path, os.O_EXCL)
	if errors.Is(err, os.ErrExist) {
		// Of another process, which is killed, or at work.
		_, err = j.d.recoverJournal(dir, "", uint32(os.Geteuid()))
		if err == nil {
			f, err = j.d.create(path, os.O_EXCL)
		}
	}
	if err != nil {
		return nil
	}
	err = lock(f, path)
	if err != nil { // another has found it empty, and has perhaps made his own
		f.Close()
		return nil
	}
	err = j.d.syncDir(dir)
	if err != nil {
		j.d.remove(path) // best effort: it is empty
		f.Close()
		return nil
	}
	return f
}

// A slot is the place of one undo record. In the file it begins with a byte that is 1 while the record is needed.
type slot struct {
	j    *Journal
	file *journalFile
	at   int64
	name string // of the package
}

// slotFixed is what is in a slot besides the record and the name: the state, the length of what follows, the length of the
// name, and a checksum.
const slotFixed = 1 + 4 + 2 + sha256.Size

func (s *slot) write(r undo, new []byte) error {
	record := r.marshal()
	b := make([]byte, 0, slotFixed+len(s.name)+len(record)+len(new))
	b = append(b, 1)
	b = binary.BigEndian.AppendUint32(b, uint32(2+len(s.name)+len(record)+len(new)))
	b = binary.BigEndian.AppendUint16(b, uint16(len(s.name)))
	b = append(b, s.name...)
	b = append(b, new...)
	b = append(b, record...)
	sum := sha256.Sum256(b)
	return s.j.d.writeSync(s.file.f, append(b, sum[:]...), s.at)
}

// discard marks the record as one that is not needed. That needs not be on the disk: of a package that was written whole
// Recover finds that it is, or that somebody has written another since.
func (s *slot) discard() error {
	err := s.j.d.write(s.file.f, []byte{0}, s.at)
	if err != nil {
		return err
	}
	s.j.mu.Lock()
	defer s.j.mu.Unlock()
	s.file.free = append(s.file.free, s.at)
	return nil
}

// leave has the record stay for Recover.
func (s *slot) leave() {
	s.j.mu.Lock()
	defer s.j.mu.Unlock()
	s.file.stuck = true
}

// slotRecord is what is in a slot.
type slotRecord struct {
	name string // of the package
	undo undo
	new  []byte // what was to be written; as long as undo.old
}

// parseSlot reads what is in a slot; ok is false where no record is needed: there is none, or it was never whole, and so
// its package was not touched.
func parseSlot(b []byte) (s slotRecord, ok bool) {
	if len(b) < slotFixed || b[0] != 1 {
		return slotRecord{}, false
	}
	n := int64(binary.BigEndian.Uint32(b[1:]))
	if n < 2 || n > int64(len(b)-5-sha256.Size) {
		return slotRecord{}, false
	}
	end := 5 + n
	if sum := sha256.Sum256(b[:end]); !bytes.Equal(sum[:], b[end:end+sha256.Size]) {
		return slotRecord{}, false
	}
	length := int(binary.BigEndian.Uint16(b[5:]))
	b = b[7:end]
	if length > len(b) {
		return slotRecord{}, false
	}
	s.name, b = string(b[:length]), b[length:]
	if s.name == "" || s.name == "." || s.name == ".." || strings.ContainsAny(s.name, "/\x00") {
		return slotRecord{}, false
	}
	// Old and new are of one length, and the rest of a record has its own.
	length = (len(b) - undoFixed - sha256.Size) / 2
	if length < 0 {
		return slotRecord{}, false
	}
	s.new = bytes.Clone(b[:length])
	var err error
	s.undo, err = parseUndo(bytes.Clone(b[length:]))
	return s, err == nil && len(s.undo.old) == length
}

// torn says whether a signature header is what a write of new over old leaves that was cut off: each byte of one of them.
// Anything else was written later.
func (s slotRecord) torn(now []byte) bool {
	for i, b := range now {
		if b != s.undo.old[i] && b != s.new[i] {
			return false
		}
	}
	return true
}

// openJournal opens and locks the journal of a directory that a killed process has left; nil: there is none to be
// recovered. One that is not the caller's nor owner's, of whom a package is, is none: whoever may write to the directory
// could have us write what he likes. One that is locked is of a process that is alive; where that recovers it, openJournal
// waits until it has.
func openJournal(dir string, owner uint32) (*os.File, os.FileInfo, error) {
	path := filepath.Join(dir, journalName)
	info, err := os.Lstat(path)
	if err != nil {
		return nil, nil, unlessMissing(err)
	}
	uid := info.Sys().(*syscall.Stat_t).Uid
	if !info.Mode().IsRegular() || int(uid) != os.Geteuid() && uid != owner {
		return nil, nil, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrPermission) {
		return nil, nil, fmt.Errorf("%w, or goes on: %w; whoever began it can put it in order", ErrUnfinished, err)
	}
	if err != nil {
		return nil, nil, unlessMissing(err)
	}
	err = lock(f, path)
	if errors.Is(err, ErrLocked) {
		var now os.FileInfo
		now, err = f.Stat()
		if err == nil && now.Mode()&recovering != 0 {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
			if err == nil {
				err = lock(f, path)
			}
		} else if err == nil {
			err = ErrChanged // it is at work
		}
	}
	if err == nil {
		info, err = f.Stat()
	}
	if err == nil && (!info.Mode().IsRegular() || info.Sys().(*syscall.Stat_t).Uid != uid) {
		err = ErrChanged
	}
	if err == nil {
		return f, info, nil
	}
	f.Close()
	if errors.Is(err, ErrChanged) {
		err = nil
	}
	return nil, nil, unlessMissing(err)
}

// recovering is in the mode of a journal that is being recovered.
const recovering = 0o100

// recoverJournal puts in order what a killed process was overwriting in a directory, and says what it found of the package
// with that name. What it cannot put in order stays, and the journal with it; that is an error only if it is of that
// package, or name is empty.
func (d disk) recoverJournal(dir, name string, owner uint32) (Recovery, error) {
	f, info, err := openJournal(dir, owner)
	if err != nil || f == nil {
		return Clean, err
	}
	defer f.Close()
	path := f.Name()
	err = f.Chmod(0o600 | recovering)
	if err != nil {
		return Clean, fmt.Errorf("recovering %s: %w", path, err)
	}
	found, left := Clean, false
	err = eachSlot(f, info.Size(), func(s slotRecord, at int64) error {
		how, err := d.recoverSlot(filepath.Join(dir, s.name), s, info.Sys().(*syscall.Stat_t).Uid, markOf{d, f, at})
		switch {
		case err != nil && (s.name == name || name == ""):
			return fmt.Errorf("recovering %s: %w", filepath.Join(dir, s.name), err)
		case err != nil:
			left = true
		case s.name == name:
			found = how
		}
		return nil
	})
	if err != nil {
		return Clean, err
	}
	if left {
		return found, nil // the next one tries again
	}
	return found, d.discard(path)
}

// eachSlot calls do for each record of a journal that is needed, until it returns an error.
func eachSlot(f *os.File, size int64, do func(s slotRecord, at int64) error) error {
	b := make([]byte, slotSize)
	for at := int64(0); at < min(size, maxSlots*slotSize); at += slotSize {
		n, err := f.ReadAt(b, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("reading %s: %w", f.Name(), err)
		}
		s, ok := parseSlot(b[:n])
		if !ok {
			continue
		}
		err = do(s, at)
		if err != nil {
			return err
		}
	}
	return nil
}

// markOf is the place of a record in a journal that is being recovered.
type markOf struct {
	d  disk
	f  *os.File
	at int64
}

func (m markOf) discard() error { return m.d.write(m.f, []byte{0}, m.at) }

// recoverSlot settles one package. The journal must be its owner's or the caller's: see readUndo.
func (d disk) recoverSlot(path string, s slotRecord, owner uint32, record discarder) (Recovery, error) {
	// Whoever overwrote it was allowed to.
	_, f, err := lockPackage(path, os.O_RDWR, FileOptions{HardLinks: true})
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, ErrLink) || errors.Is(err, ErrUnsupported) {
		return Clean, record.discard() // of a package that is no longer there
	}
	if err != nil {
		return Clean, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Clean, err
	}
	if int(owner) != os.Geteuid() && owner != info.Sys().(*syscall.Stat_t).Uid {
		return Clean, fmt.Errorf("%w: its undo record is of another user", ErrUnsupported)
	}
	return d.settle(f, record, s.undo, s.torn)
}
