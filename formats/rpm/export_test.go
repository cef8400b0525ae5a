//go:build linux

package rpm

import (
	"io"
	"os"
)

// A Step is one change of the disk: do makes it, half makes half of it where that can be.
type Step struct {
	Name     string
	Path     string
	Do, Half func() error
}

// A HookedDisk runs every change of the disk through its hook.
type HookedDisk struct{ d disk }

// NewHookedDisk returns the real disk behind a hook.
func NewHookedDisk(hook func(Step) error) HookedDisk {
	r := realDisk
	step := func(name, path string, do func() error) error {
		return hook(Step{name, path, do, func() error { return nil }})
	}
	writing := func(name string, write func(*os.File, []byte, int64) error) func(*os.File, []byte, int64) error {
		return func(f *os.File, b []byte, off int64) error {
			return hook(Step{
				name, f.Name(),
				func() error { return write(f, b, off) },
				func() error { return write(f, b[:len(b)/2], off) },
			})
		}
	}
	return HookedDisk{disk{
		create: func(path string, flag int) (f *os.File, err error) {
			e := step("create", path, func() error { f, err = r.create(path, flag); return err })
			if e != nil && f != nil {
				f.Close()
			}
			return f, e
		},
		write: writing("write", r.write),
		copy: func(to *os.File, from io.Reader) (n int64, err error) {
			e := hook(Step{
				"copy", to.Name(),
				func() error { n, err = r.copy(to, from); return err },
				func() error { n, err = r.copy(to, io.LimitReader(from, 100)); return err },
			})
			return n, e
		},
		sync:      func(f *os.File) error { return step("sync", f.Name(), func() error { return r.sync(f) }) },
		rename:    func(from, to string) error { return step("rename", to, func() error { return r.rename(from, to) }) },
		remove:    func(path string) error { return step("remove", path, func() error { return r.remove(path) }) },
		syncDir:   func(path string) error { return step("syncDir", path, func() error { return r.syncDir(path) }) },
		syncData:  func(f *os.File) error { return step("syncData", f.Name(), func() error { return r.syncData(f) }) },
		writeSync: writing("writeSync", r.writeSync),
	}}
}

func (h HookedDisk) ApplyInPlace(path string, u *Update, o FileOptions) error {
	return h.d.applyInPlace(path, u, o, nil)
}

// Journal is a Journal of that disk.
func (h HookedDisk) Journal() *Journal { return &Journal{d: h.d} }

func (h HookedDisk) Recover(path string, o FileOptions) (Recovery, error) {
	return h.d.recover(path, o, nil)
}

// ParseUndo reads an undo record and writes it again.
func ParseUndo(b []byte) ([]byte, error) {
	r, err := parseUndo(b)
	if err != nil {
		return nil, err
	}
	return r.marshal(), nil
}

// ParseSlot reads a slot of a journal.
func ParseSlot(b []byte) (name string, ok bool) {
	s, ok := parseSlot(b)
	return s.name, ok
}

// The bounds of a journal.
const (
	SlotRoom = slotSize - slotFixed
	MaxSlots = maxSlots
)

// HasSlot takes a slot for a record of so many bytes, and says whether there is one.
func HasSlot(j *Journal, path string, size int) bool { return j.slot(path, size) != nil }
