//go:build linux

package rpm_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/formats/rpm"
)

// attributes are what must not change.
type attributes struct {
	mode     fs.FileMode
	uid, gid uint32
	xattr    string
}

func attributesOf(t testing.TB, path string) attributes {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	b := make([]byte, 100)
	n, err := unix.Getxattr(path, "user.signwarden.test", b)
	if err != nil {
		t.Fatal(err)
	}
	return attributes{info.Mode(), st.Uid, st.Gid, string(b[:n])}
}

func TestAttributesKept(t *testing.T) {
	plain := demo(t)
	for name, old := range map[string][]byte{"in place": plain, "grows": stripReserve(t, plain)} {
		t.Run(name, func(t *testing.T) {
			u := update(t, old, rsa2048())
			if u.InPlace() != (name == "in place") {
				t.Fatalf("InPlace is %t", u.InPlace())
			}
			path := file(t, "x.rpm", old)
			err := errors.Join(os.Chmod(path, 0o640), unix.Setxattr(path, "user.signwarden.test", []byte("kept"), 0))
			if err == nil && os.Geteuid() == 0 {
				err = os.Chown(path, 1234, 5678)
			}
			if err != nil {
				t.Fatal(err)
			}
			want := attributesOf(t, path)
			output := filepath.Join(t.TempDir(), "out.rpm")
			err = rpm.Rewrite(path, output, u, rpm.FileOptions{})
			if err != nil {
				t.Fatalf("Rewrite: %v", err)
			}
			if !bytes.Equal(read(t, path), old) {
				t.Error("Rewrite to another file changed the package")
			}
			err = rpm.ApplyInPlace(path, u, rpm.FileOptions{})
			if err != nil {
				t.Fatalf("ApplyInPlace: %v", err)
			}
			for _, p := range []string{path, output} {
				if !bytes.Equal(read(t, p), apply(t, u, old)) {
					t.Errorf("%s is not the new package", filepath.Base(p))
				}
				if got := attributesOf(t, p); got != want {
					t.Errorf("%s: got %+v, want %+v", filepath.Base(p), got, want)
				}
				names, err := os.ReadDir(filepath.Dir(p))
				if err != nil || len(names) != 1 {
					t.Errorf("%v in the folder: %v", names, err)
				}
			}
		})
	}
}

// The package in its own place by another spelling, and by Rewrite though it could be in place.
func TestRewriteOnto(t *testing.T) {
	old := demo(t)
	u := update(t, old, rsa2048())
	path := file(t, "x.rpm", old)
	hard := filepath.Join(filepath.Dir(path), "hard.rpm")
	err := os.Link(path, hard)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, rpm.Rewrite(path, filepath.Dir(path)+"/./x.rpm", u, rpm.FileOptions{}), rpm.ErrLink)
	err = os.Remove(hard)
	if err != nil {
		t.Fatal(err)
	}
	err = rpm.Rewrite(path, filepath.Dir(path)+"/./x.rpm", u, rpm.FileOptions{})
	if err != nil || !bytes.Equal(read(t, path), apply(t, u, old)) {
		t.Errorf("Rewrite: %v", err)
	}
}

func TestLinks(t *testing.T) {
	for name, old := range map[string][]byte{"in place": demo(t), "grows": stripReserve(t, demo(t))} {
		t.Run(name, func(t *testing.T) {
			u := update(t, old, rsa2048())
			path := file(t, "x.rpm", old)
			dir := filepath.Dir(path)
			symlink, hard := filepath.Join(dir, "symlink.rpm"), filepath.Join(dir, "hard.rpm")
			err := os.Symlink("x.rpm", symlink)
			if err != nil {
				t.Fatal(err)
			}
			wantError(t, rpm.ApplyInPlace(symlink, u, rpm.FileOptions{}), rpm.ErrLink)
			err = os.Link(path, hard)
			if err != nil {
				t.Fatal(err)
			}
			wantError(t, rpm.ApplyInPlace(path, u, rpm.FileOptions{}), rpm.ErrLink)
			wantError(t, rpm.ApplyInPlace(symlink, u, rpm.FileOptions{FollowLinks: true}), rpm.ErrLink)
			if !bytes.Equal(read(t, path), old) {
				t.Error("a link was refused and the package changed")
			}
			err = rpm.ApplyInPlace(symlink, u, rpm.FileOptions{FollowLinks: true, HardLinks: true})
			if err != nil || !bytes.Equal(read(t, path), apply(t, u, old)) {
				t.Errorf("allowed: %v", err)
			}
			if got := bytes.Equal(read(t, hard), read(t, path)); got != u.InPlace() {
				t.Errorf("the other name changed: %t", got)
			}
			info, err := os.Lstat(symlink)
			if err != nil || info.Mode().Type() != fs.ModeSymlink {
				t.Errorf("the symbolic link is gone: %v", err)
			}
		})
	}
}

func TestFilesRefused(t *testing.T) {
	old := demo(t)
	u := update(t, old, rsa2048())
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	err := unix.Mkfifo(pipe, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, rpm.ApplyInPlace(pipe, u, rpm.FileOptions{}), rpm.ErrUnsupported)
	wantError(t, rpm.ApplyInPlace(filepath.Join(dir, "none"), u, rpm.FileOptions{}), fs.ErrNotExist)

	for name, b := range map[string][]byte{
		"longer":         append(bytes.Clone(old), 0),
		"signed already": sign(t, old, ed(), rpm.Options{}),
		"other header":   bytes.Replace(bytes.Clone(old), []byte("Test Vendor"), []byte("Best Vendor"), 1),
	} {
		path := file(t, "x.rpm", b)
		wantError(t, rpm.ApplyInPlace(path, u, rpm.FileOptions{}), rpm.ErrChanged)
		wantError(t, rpm.Rewrite(path, filepath.Join(dir, "out"), u, rpm.FileOptions{}), rpm.ErrChanged)
		if !bytes.Equal(read(t, path), b) {
			t.Errorf("%s: changed", name)
		}
	}

	path := file(t, "x.rpm", old)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, rpm.ApplyInPlace(path, u, rpm.FileOptions{}), rpm.ErrLocked)
	err = unix.Flock(int(f.Fd()), unix.LOCK_UN)
	if err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(filepath.Dir(path), ".x.rpm.signwarden-undo")
	err = os.WriteFile(record, []byte("signwarden rpm undo 1\ncut sho"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, rpm.ApplyInPlace(path, u, rpm.FileOptions{}), rpm.ErrUnfinished)
	if !bytes.Equal(read(t, path), old) {
		t.Error("changed")
	}
	got, err := rpm.Recover(path, rpm.FileOptions{})
	if err != nil || got != rpm.Restored || !bytes.Equal(read(t, path), old) {
		t.Errorf("Recover with half a record: %v, %v", got, err)
	}
	got, err = rpm.Recover(path, rpm.FileOptions{})
	if err != nil || got != rpm.Clean {
		t.Errorf("Recover with nothing to do: %v, %v", got, err)
	}
}

// Of several signers that have read the same package one signs it, and the others find it locked or changed.
func TestManySigners(t *testing.T) {
	for name, old := range map[string][]byte{"in place": demo(t), "grows": stripReserve(t, demo(t))} {
		for range 10 {
			path := file(t, "x.rpm", old)
			var errs [8]error
			var wg sync.WaitGroup
			for i := range errs {
				s := []subject{ed(), rsa2048()}[i%2]
				u := update(t, old, s)
				wg.Go(func() { errs[i] = rpm.ApplyInPlace(path, u, rpm.FileOptions{}) })
			}
			wg.Wait()
			done := 0
			for _, err := range errs {
				switch {
				case err == nil:
					done++
				case !errors.Is(err, rpm.ErrLocked) && !errors.Is(err, rpm.ErrChanged):
					t.Errorf("%s: %v", name, err)
				}
			}
			sigs, err := open(t, read(t, path)).Signatures()
			if done != 1 || err != nil || len(sigs) != 1 {
				t.Errorf("%s: %d have signed, %d signatures: %v", name, done, len(sigs), err)
			}
		}
	}
}

// Records that must not be followed: of a package that another has replaced, or someone else's.
func TestForeignUndo(t *testing.T) {
	old := demo(t)
	u := update(t, old, rsa2048())
	path := file(t, "x.rpm", old)
	record := filepath.Join(filepath.Dir(path), ".x.rpm.signwarden-undo")
	var kept []byte
	disk := rpm.NewHookedDisk(func(s rpm.Step) error {
		if s.Name == "remove" {
			var err error
			kept, err = os.ReadFile(record)
			if err != nil {
				return err
			}
		}
		return s.Do()
	})
	err := disk.ApplyInPlace(path, u, rpm.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	put := func(pkg, undo []byte) {
		t.Helper()
		err := errors.Join(os.WriteFile(path, pkg, 0o600), os.WriteFile(record, undo, 0o600))
		if err != nil {
			t.Fatal(err)
		}
	}
	signed := apply(t, u, old)
	torn := bytes.Clone(old)
	copy(torn[:300], signed[:300])
	replaced := bytes.Replace(bytes.Clone(old), []byte("Test Vendor"), []byte("Best Vendor"), 1)
	damaged := bytes.Clone(kept)
	damaged[len(damaged)/2] ^= 1
	tests := []struct {
		name       string
		pkg, undo  []byte
		want       rpm.Recovery
		err        error
		after      []byte
		recordGone bool
	}{
		{"torn", torn, kept, rpm.Restored, nil, old, true},
		{"new", signed, kept, rpm.Completed, nil, signed, true},
		{"old", old, kept, rpm.Restored, nil, old, true},
		{"replaced", replaced, kept, rpm.Clean, nil, replaced, true},
		{"longer", append(bytes.Clone(torn), 0), kept, rpm.Clean, nil, append(bytes.Clone(torn), 0), true},
		{"damaged record", signed, damaged, rpm.Restored, nil, signed, true},
		{"damaged record and package", append([]byte("x"), torn...), damaged, rpm.Clean, rpm.ErrUnfinished,
			append([]byte("x"), torn...), false},
	}
	for _, tt := range tests {
		put(tt.pkg, tt.undo)
		got, err := rpm.Recover(path, rpm.FileOptions{})
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%s: got %v and error %v, want %v and %v", tt.name, got, err, tt.want, tt.err)
		}
		if !bytes.Equal(read(t, path), tt.after) {
			t.Errorf("%s: not the package it should be", tt.name)
		}
		_, err = os.Lstat(record)
		if gone := errors.Is(err, fs.ErrNotExist); gone != tt.recordGone {
			t.Errorf("%s: the record is gone: %t", tt.name, gone)
		}
	}
	if os.Geteuid() != 0 {
		t.Log("not root: no record of another user tried")
		return
	}
	put(torn, kept)
	err = os.Chown(record, 1234, 1234)
	if err != nil {
		t.Fatal(err)
	}
	_, err = rpm.Recover(path, rpm.FileOptions{})
	wantError(t, err, rpm.ErrUnsupported)
	if !bytes.Equal(read(t, path), torn) {
		t.Error("another user's record was followed")
	}
}

// A package whose name leaves no room for the record's.
func TestLongName(t *testing.T) {
	old := demo(t)
	u := update(t, old, rsa2048())
	path := file(t, strings.Repeat("x", 251)+".rpm", old)
	err := rpm.ApplyInPlace(path, u, rpm.FileOptions{})
	if err != nil || !bytes.Equal(read(t, path), apply(t, u, old)) {
		t.Errorf("ApplyInPlace: %v", err)
	}
}
