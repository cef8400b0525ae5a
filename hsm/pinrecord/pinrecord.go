// Package pinrecord remembers in a file that a token has refused a PIN, so that
// a program which is started again does not try it again: a few wrong PINs lock
// a token, and a service manager starts a program twenty times a minute.
//
// The file holds no PIN. It holds a salted scrypt hash of the one that was
// refused, and only of that: when a token takes a PIN the file is emptied, so
// that nothing in it can be held against the PIN that is right. A hash is all
// there is, too, while a PIN that this process has not seen accepted is being
// tried. Where the process ends meanwhile, or the token's answer does not tell
// whether it was the PIN, it remains, and says that nobody knows what became of
// the try: the PIN is tried again only where the token is known to
// tell of wrong ones, and tells of none.
//
// An operator who has mended the token and not the PIN says so by [Forget].
package pinrecord

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/scrypt"
	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/hsm"
)

// maxFile bounds a record that is read, in bytes.
const maxFile = 16 << 10

const (
	scryptR, scryptP   = 8, 1
	saltSize, hashSize = 16, 32
)

// scryptN is the cost of a hash: 32 MiB, and a tenth of a second on a small machine.
// Tests lower it.
var scryptN = 1 << 15

// Name is the file name of the record of a token.
func Name(module, label string) string {
	sum := sha256.Sum256([]byte(module + "\x00" + label))
	return fmt.Sprintf("pin-record-%x.json", sum[:6])
}

// maxCutOff is how many tries without an end may be followed by another one of the same PIN,
// of a token that does not tell of wrong ones.
const maxCutOff = 1

// What is known of a try.
const (
	stateTrying  = "trying"  // it was about to be made, and has had no end
	stateRefused = "refused" // the token refused the PIN
)

// entry is what a file holds; an empty file holds none.
type entry struct {
	Module string    `json:"module"`
	Label  string    `json:"label"`
	Serial string    `json:"serial"`
	State  string    `json:"state"`
	At     time.Time `json:"at"`
	Error  string    `json:"error,omitempty"`
	Salt   []byte    `json:"salt"`
	Hash   []byte    `json:"scrypt"`
}

// Record is the record of one token. It is safe for concurrent use, by several
// processes too.
type Record struct {
	path, module, label string

	mu       sync.Mutex // guards what follows; held while a PIN is hashed
	pin      hsm.PIN    // the one that was hashed last
	salt     []byte
	hash     []byte
	accepted hsm.PIN // what this process has seen accepted
	cutOff   int     // how many of the last tries of accepted had no end
	unsaved  error   // a refusal of pin that could not be written
}

// New is the record of the token with this label in the file at path, whose
// directory exists.
func New(path, module, label string) *Record {
	return &Record{path: path, module: module, label: label}
}

// Forget empties the record at path: an operator says that the PIN may be tried
// again. It returns what the record said; nothing where it said nothing.
func Forget(path string) (said string, err error) {
	f, err := open(path, os.O_RDWR)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	e, err := read(f)
	if err != nil {
		return "a damaged record", write(f, nil)
	}
	if e == nil {
		return "", nil
	}
	return e.said(), write(f, nil)
}

func (e *entry) said() string {
	at := e.At.Format(time.RFC3339)
	if e.State == stateTrying && e.Error != "" {
		return fmt.Sprintf("the PIN was tried at %s, and the token's answer does not tell whether it was wrong (%s)", at, e.Error)
	}
	if e.State == stateTrying {
		return fmt.Sprintf("the PIN was tried at %s, and the program ended, or was killed, before the token answered", at)
	}
	return fmt.Sprintf("the token refused the PIN at %s (%s)", at, e.Error)
}

// refusal is what a PIN is met with that is not to be tried.
func (r *Record) refusal(said string) error {
	return &hsm.Error{Op: "PIN of token " + r.label, Class: hsm.ClassOperator, Detail: fmt.Sprintf(
		"not tried: %s, and a few wrong ones lock a token; correct the PIN file, or, where it is the token that was mended "+
			"(unlocked, or given this PIN), say so: signwardend token retry-pin (which empties %s)", said, r.path)}
}

// Try is worker.Tries.Try. An error that is not of class G says that the record
// cannot be read or written, or that another process is trying a PIN.
func (r *Record) Try(i hsm.Info, pin hsm.PIN) (done func(error), err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f, err := open(r.path, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	e, err := read(f)
	if err != nil {
		return nil, err
	}
	known := same(r.accepted, pin)
	if e != nil && (e.Serial == i.TokenSerial || e.Serial == "" || i.TokenSerial == "") && r.matches(e, pin) {
		// Of a try without an end the token may know what came of it.
		if e.State != stateTrying || i.WrongPIN || !known && !i.CountsPINs {
			return nil, r.refusal(e.said())
		}
	}
	if r.unsaved != nil && same(r.pin, pin) {
		return nil, r.unsaved
	}
	next := entry{Module: r.module, Label: r.label, Serial: i.TokenSerial, State: stateTrying, At: time.Now().UTC().Truncate(time.Second)}
	switch {
	case known && r.cutOff > 0 && i.WrongPIN:
		return nil, r.refuse(f, next, pin, "a try was cut off, and the token says that a wrong PIN was entered since")
	case known && r.cutOff > maxCutOff && !i.CountsPINs:
		return nil, r.refuse(f, next, pin, fmt.Sprintf("%d tries in turn were cut off, and the token does not tell of wrong ones", r.cutOff))
	}
	if !known { // one that is right is in no file, not for a moment, but for the first time
		if err := r.derive(pin); err != nil {
			return nil, err
		}
		next.Salt, next.Hash = r.salt, r.hash
		if err := write(f, &next); err != nil {
			return nil, fmt.Errorf("PIN record: no PIN is tried unless it can be noted: %w", err)
		}
	}
	return func(err error) { r.end(f, next, pin, err) }, nil
}

// end notes what became of a try, and lets the file go.
func (r *Record) end(f *os.File, e entry, pin hsm.PIN, err error) {
	defer f.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	refused, ok := errors.AsType[*hsm.Error](err)
	switch {
	case err == nil:
		r.accepted, r.cutOff, r.unsaved = pin, 0, nil
		_ = write(f, nil) // at worst it says that a try had no end, and the next one clears it
	case ok && refused.Class == hsm.ClassOperator:
		_ = r.refuse(f, e, pin, refused.Op+": "+refused.Name())
	case ok && refused.Unclear() && !same(r.accepted, pin): // it may have been the PIN
		e.Error = refused.Op + ": " + refused.Name()
		_ = write(f, &e) // at worst it says less
	case ok && refused.Class != hsm.ClassCrashed && !refused.Unclear():
		if !same(r.accepted, pin) {
			_ = write(f, nil) // the token has answered, and not of the PIN
		}
	default:
		if same(r.accepted, pin) {
			r.cutOff++
		}
	}
}

// refuse notes that pin was refused, in memory where it cannot be written, and
// returns what it is met with.
func (r *Record) refuse(f *os.File, e entry, pin hsm.PIN, why string) error {
	r.accepted, r.cutOff = hsm.PIN{}, 0
	e.State, e.Error = stateRefused, why
	err := r.derive(pin)
	if err == nil {
		e.Salt, e.Hash = r.salt, r.hash
		err = write(f, &e)
	}
	if err != nil {
		r.unsaved = r.refusal(fmt.Sprintf("%s, which could not be noted (%v)", e.said(), err))
		return r.unsaved
	}
	return r.refusal(e.said())
}

// Refuses is worker.Tries.Refuses.
func (r *Record) Refuses(pin hsm.PIN) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.unsaved != nil && same(r.pin, pin) {
		return r.unsaved
	}
	f, err := os.OpenFile(r.path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return r.refusal(err.Error())
	}
	defer f.Close()
	e, err := read(f)
	if err != nil {
		return r.refusal(err.Error())
	}
	if e != nil && r.matches(e, pin) {
		return r.refusal(e.said())
	}
	return nil
}

func same(a, b hsm.PIN) bool {
	return a.Reveal() != "" && subtle.ConstantTimeCompare([]byte(a.Reveal()), []byte(b.Reveal())) == 1
}

// matches hashes pin, where it was not hashed with this salt before.
func (r *Record) matches(e *entry, pin hsm.PIN) bool {
	if !same(r.pin, pin) || string(r.salt) != string(e.Salt) {
		h, err := scrypt.Key([]byte(pin.Reveal()), e.Salt, scryptN, scryptR, scryptP, hashSize)
		if err != nil {
			return true // what cannot be told apart is not tried
		}
		r.pin, r.salt, r.hash, r.unsaved = pin, e.Salt, h, nil
	}
	return subtle.ConstantTimeCompare(r.hash, e.Hash) == 1
}

// derive hashes pin with a salt of its own, where it was not hashed before.
func (r *Record) derive(pin hsm.PIN) error {
	if same(r.pin, pin) {
		return nil
	}
	salt := make([]byte, saltSize)
	rand.Read(salt)
	h, err := scrypt.Key([]byte(pin.Reveal()), salt, scryptN, scryptR, scryptP, hashSize)
	if err != nil {
		return fmt.Errorf("hashing the PIN: %w", err)
	}
	r.pin, r.salt, r.hash, r.unsaved = pin, salt, h, nil
	return nil
}

// open opens a record and locks it: one process at a time tries a PIN.
func open(path string, flag int) (*os.File, error) {
	f, err := os.OpenFile(path, flag|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("PIN record: %w", err)
	}
	if !lock(f) {
		f.Close()
		return nil, fmt.Errorf("PIN record %s: another process is logging in to this token; try again when it is done", path)
	}
	// Root, who runs a check, leaves nothing that the gateway's user cannot change.
	if dir, err := os.Stat(filepath.Dir(path)); err == nil && os.Geteuid() == 0 {
		if st, ok := dir.Sys().(*syscall.Stat_t); ok {
			_ = f.Chown(int(st.Uid), int(st.Gid))
		}
	}
	return f, nil
}

// lockTimeout is how long another process may take to log in.
const lockTimeout = 10 * time.Second

func lock(f *os.File) bool {
	late := time.After(lockTimeout)
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		select {
		case <-again.C:
		case <-late:
			return false
		}
	}
	return true
}

func read(f *os.File) (*entry, error) {
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, fmt.Errorf("PIN record: %w", err)
	}
	if len(b) == 0 {
		return nil, nil
	}
	var e entry
	if err := json.Unmarshal(b, &e); err != nil || len(e.Salt) != saltSize || len(e.Hash) != hashSize ||
		e.State != stateTrying && e.State != stateRefused {
		return nil, fmt.Errorf("PIN record %s is damaged, so no PIN is tried; see that the PIN file is right and say: signwardend token retry-pin", f.Name())
	}
	return &e, nil
}

// write replaces what f holds, durably; nil empties it.
func write(f *os.File, e *entry) error {
	var b []byte
	if e != nil {
		var err error
		if b, err = json.MarshalIndent(e, "", "  "); err != nil {
			return err
		}
		b = append(b, '\n')
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	fresh := st.Size() == 0 // and its name may be new to the directory
	if fresh && e == nil {
		return nil
	}
	// In this order a power failure leaves what is damaged, by which no PIN is
	// tried, and not what is empty.
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	if err := f.Truncate(int64(len(b))); err != nil {
		return err
	}
	if err := f.Sync(); err != nil || !fresh {
		return err
	}
	dir, err := os.Open(filepath.Dir(f.Name()))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
