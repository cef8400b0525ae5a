//go:build linux

package rpm_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/formats/rpm"
)

// journalPath is that of the journal beside a package.
func journalPath(path string) string { return filepath.Join(filepath.Dir(path), ".signwarden-undo") }

// many writes n copies of a package into a directory.
func many(t testing.TB, b []byte, n int) (paths []string) {
	t.Helper()
	dir := t.TempDir()
	for i := range n {
		path := filepath.Join(dir, fmt.Sprintf("p%d.rpm", i))
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths
}

// Hundreds of packages at a time, in one file of undo records that is gone afterwards; another journal of the same
// directory, and whoever has none, do not get in its way.
func TestJournal(t *testing.T) {
	old := demo(t)
	u := update(t, old, rsa2048())
	signed := apply(t, u, old)
	paths := many(t, old, 300)
	made := map[string]int{}
	var mu sync.Mutex
	disk := rpm.NewHookedDisk(func(s rpm.Step) error {
		if s.Name == "create" {
			mu.Lock()
			defer mu.Unlock()
			made[filepath.Base(s.Path)]++
		}
		return s.Do()
	})
	j, other := disk.Journal(), disk.Journal()
	if err := j.ApplyInPlace(paths[0], u, rpm.FileOptions{}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	errs := make([]error, len(paths))
	for i, path := range paths[1:] {
		wg.Go(func() {
			by := j
			switch i {
			case 0:
				by = other
			case 1:
				errs[i] = disk.ApplyInPlace(path, u, rpm.FileOptions{})
				return
			}
			_, err := by.Recover(path, rpm.FileOptions{})
			errs[i] = errors.Join(err, by.ApplyInPlace(path, u, rpm.FileOptions{}))
		})
	}
	wg.Wait()
	for i, path := range paths {
		if errs[i] != nil || !bytes.Equal(read(t, path), signed) {
			t.Errorf("%s is not signed: %v", path, errs[i])
		}
	}
	if err := errors.Join(other.Close(), j.Close()); err != nil {
		t.Error(err)
	}
	// The other one has tried once.
	if made[".signwarden-undo"] > 3 || made[".p1.rpm.signwarden-undo"] != 1 || made[".p2.rpm.signwarden-undo"] != 1 || len(made) != 3 {
		t.Errorf("files made: %v", made)
	}
	if left, err := os.ReadDir(filepath.Dir(paths[0])); err != nil || len(left) != len(paths) {
		t.Errorf("%d files are left, want %d: %v", len(left), len(paths), err)
	}
}

// tornJournal leaves what a process does that is killed while it overwrites a package, whose signature header is then half
// the old and half the new one.
func tornJournal(t testing.TB, paths []string, old []byte, u *rpm.Update) (journal []byte) {
	t.Helper()
	killed := errors.New("killed")
	touched := map[string]bool{}
	disk := rpm.NewHookedDisk(func(s rpm.Step) error {
		if s.Name != "write" {
			return s.Do()
		}
		if !touched[s.Path] {
			touched[s.Path] = true
			return errors.Join(killed, s.Half())
		}
		return killed
	})
	j := disk.Journal()
	for _, path := range paths {
		wantError(t, j.ApplyInPlace(path, u, rpm.FileOptions{}), rpm.ErrUnfinished)
	}
	if err := j.Close(); err != nil { // it keeps what is needed
		t.Fatal(err)
	}
	journal, err := os.ReadFile(journalPath(paths[0]))
	if err != nil {
		t.Fatal(err)
	}
	return journal
}

// Recover of one package puts in order all that were being overwritten; one that it may not touch keeps the records.
func TestJournalRecovered(t *testing.T) {
	old := demo(t)
	u := update(t, old, rsa2048())
	paths := many(t, old, 5)
	tornJournal(t, paths, old, u)
	for _, path := range paths {
		if bytes.Equal(read(t, path), old) {
			t.Fatalf("%s is not torn", path)
		}
		wantError(t, rpm.ApplyInPlace(path, u, rpm.FileOptions{}), rpm.ErrUnfinished)
	}
	// Signed meanwhile, as it was to be and with another key, gone, and with a package of the same name in its place.
	signed, other := apply(t, u, old), apply(t, update(t, old, ed()), old)
	replaced := bytes.Replace(bytes.Clone(old), []byte("Test Vendor"), []byte("Best Vendor"), 1)
	if err := errors.Join(os.WriteFile(paths[1], signed, 0o600), os.Remove(paths[2]), os.WriteFile(paths[3], replaced, 0o600),
		os.WriteFile(paths[4], other, 0o600)); err != nil {
		t.Fatal(err)
	}
	got, err := rpm.Recover(paths[1], rpm.FileOptions{})
	if err != nil || got != rpm.Completed {
		t.Errorf("Recover of the signed one: %v, %v", got, err)
	}
	for i, want := range [][]byte{old, signed, nil, replaced, other} {
		if want != nil && !bytes.Equal(read(t, paths[i]), want) {
			t.Errorf("%s is not what it should be", paths[i])
		}
	}
	if _, err := os.Lstat(journalPath(paths[0])); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the journal stays: %v", err)
	}
}

// One that cannot be put in order now keeps its record, and keeps nobody else from signing.
func TestJournalLocked(t *testing.T) {
	old := demo(t)
	u := update(t, old, rsa2048())
	paths := many(t, old, 3)
	tornJournal(t, paths[:2], old, u)
	held, err := os.Open(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := unix.Flock(int(held.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	_, err = rpm.Recover(paths[0], rpm.FileOptions{})
	wantError(t, err, rpm.ErrLocked)
	if got, err := rpm.Recover(paths[1], rpm.FileOptions{}); got != rpm.Restored || err != nil || !bytes.Equal(read(t, paths[1]), old) {
		t.Errorf("the other one: %v, %v", got, err)
	}
	j := rpm.NewJournal()
	for _, path := range paths[1:] {
		if err := j.ApplyInPlace(path, u, rpm.FileOptions{}); err != nil || !bytes.Equal(read(t, path), apply(t, u, old)) {
			t.Errorf("%s: %v", path, err)
		}
	}
	held.Close()
	wantError(t, j.ApplyInPlace(paths[0], u, rpm.FileOptions{}), rpm.ErrUnfinished)
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	if got, err := rpm.Recover(paths[0], rpm.FileOptions{}); got != rpm.Restored || err != nil || !bytes.Equal(read(t, paths[0]), old) {
		t.Errorf("the first one: %v, %v", got, err)
	}
	if _, err := os.Lstat(journalPath(paths[0])); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the journal stays: %v", err)
	}
}

// A record has a slot up to the room of one, and a journal so many of them.
func TestJournalBounds(t *testing.T) {
	j := rpm.NewJournal()
	defer j.Close()
	path := many(t, demo(t), 1)[0]
	room := rpm.SlotRoom - len(filepath.Base(path))
	if !rpm.HasSlot(j, path, room) || rpm.HasSlot(j, path, room+1) {
		t.Errorf("a record of %d bytes has no slot, or one more has", room)
	}
	for i := 1; i < rpm.MaxSlots; i++ {
		if !rpm.HasSlot(j, path, 1) {
			t.Fatalf("no slot number %d", i+1)
		}
	}
	if rpm.HasSlot(j, path, 1) {
		t.Errorf("over %d slots", rpm.MaxSlots)
	}
}

// Records that are not ours, and files that are none.
func TestForeignJournal(t *testing.T) {
	old := demo(t)
	u := update(t, old, rsa2048())
	paths := many(t, old, 1)
	journal := tornJournal(t, paths, old, u)
	torn := read(t, paths[0])
	put := func(b []byte) {
		t.Helper()
		if err := errors.Join(os.WriteFile(paths[0], torn, 0o600), os.WriteFile(journalPath(paths[0]), b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	damaged := bytes.Clone(journal)
	damaged[100] ^= 1
	done := bytes.Clone(journal)
	done[0] = 0
	for name, b := range map[string][]byte{"empty": {}, "damaged": damaged, "done": done, "truncated": journal[:200], "text": []byte("notes of mine\n")} {
		put(b)
		if got, err := rpm.Recover(paths[0], rpm.FileOptions{}); got != rpm.Clean || err != nil || !bytes.Equal(read(t, paths[0]), torn) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	target := file(t, "target", journal)
	if err := os.Symlink(target, journalPath(paths[0])); err != nil {
		t.Fatal(err)
	}
	if got, err := rpm.Recover(paths[0], rpm.FileOptions{}); got != rpm.Clean || err != nil || !bytes.Equal(read(t, paths[0]), torn) {
		t.Errorf("a symbolic link was followed: %v", err)
	}
	if err := os.Remove(journalPath(paths[0])); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 {
		t.Log("not root: no record of another user tried")
		return
	}
	put(journal)
	if err := os.Chown(journalPath(paths[0]), 1234, 1234); err != nil {
		t.Fatal(err)
	}
	if got, err := rpm.Recover(paths[0], rpm.FileOptions{}); got != rpm.Clean || err != nil || !bytes.Equal(read(t, paths[0]), torn) {
		t.Errorf("another user's record was followed: %v, %v", got, err)
	}
	// Nor does it keep anybody from signing there.
	free := filepath.Join(filepath.Dir(paths[0]), "free.rpm")
	if err := os.WriteFile(free, old, 0o600); err != nil {
		t.Fatal(err)
	}
	j := rpm.NewJournal()
	if err := errors.Join(j.ApplyInPlace(free, u, rpm.FileOptions{}), j.Close()); err != nil || !bytes.Equal(read(t, free), apply(t, u, old)) {
		t.Errorf("beside another user's journal: %v", err)
	}
}

// While one recovers a journal, who signs a package of it waits: what is signed then is not taken back.
func TestJournalRecoveredMeanwhile(t *testing.T) {
	old := demo(t)
	u := update(t, old, rsa2048())
	second := update(t, old, ed())
	for _, shared := range []bool{true, false} {
		paths := many(t, old, 8)
		tornJournal(t, paths, old, u)
		disk := rpm.NewHookedDisk(func(s rpm.Step) error {
			if s.Name == "sync" {
				runtime.Gosched() // the others are to come in between
			}
			return s.Do()
		})
		one := disk.Journal()
		var wg sync.WaitGroup
		errs := make([]error, len(paths))
		for i, path := range paths {
			j := one
			if !shared {
				j = disk.Journal()
			}
			wg.Go(func() {
				_, err := j.Recover(path, rpm.FileOptions{})
				for errors.Is(err, rpm.ErrLocked) || errors.Is(err, rpm.ErrChanged) {
					_, err = j.Recover(path, rpm.FileOptions{})
				}
				if err == nil {
					err = j.ApplyInPlace(path, second, rpm.FileOptions{})
				}
				errs[i] = err
			})
		}
		wg.Wait()
		_ = one.Close()
		want := apply(t, second, old)
		for i, path := range paths {
			if got := read(t, path); errs[i] == nil && !bytes.Equal(got, want) {
				t.Errorf("shared %t: %s was signed, and is not", shared, path)
			} else if errs[i] != nil && shared {
				t.Errorf("shared: %s: %v", path, errs[i])
			} else if errs[i] != nil && !bytes.Equal(got, old) {
				t.Errorf("%s failed with %v, and is not the old one", path, errs[i])
			}
		}
	}
}

func FuzzParseSlot(f *testing.F) {
	old := demo(f)
	paths := many(f, old, 1)
	real := tornJournal(f, paths, old, update(f, old, rsa2048()))
	if name, ok := rpm.ParseSlot(real); !ok || name != "p0.rpm" {
		f.Fatalf("a real record: %q, %t", name, ok)
	}
	f.Add(real)
	f.Fuzz(func(t *testing.T, b []byte) {
		sum := sha256.Sum256(b)
		for _, b := range [][]byte{b, append(bytes.Clone(b), sum[:]...)} {
			if name, ok := rpm.ParseSlot(b); ok && name != filepath.Base(name) {
				t.Errorf("a record of %q", name)
			}
		}
	})
}
