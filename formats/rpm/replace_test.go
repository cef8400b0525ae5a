//go:build linux

package rpm_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/formats/rpm"
)

// What somebody has put where the temporary file goes is neither written to nor
// becomes the package: it goes.
func TestPlantedTemporaryFile(t *testing.T) {
	old := stripReserve(t, demo(t)) // it grows, and so is copied
	u := update(t, old, rsa2048())
	path, victim := file(t, "x.rpm", old), file(t, "victim", []byte("precious"))
	temp := filepath.Join(filepath.Dir(path), ".x.rpm.signwarden-new")
	if err := os.Link(victim, temp); err != nil {
		t.Fatal(err)
	}
	if err := rpm.ApplyInPlace(path, u, rpm.FileOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, victim); string(got) != "precious" {
		t.Errorf("the file behind the link now holds %d bytes", len(got))
	}
	before, err := os.Stat(victim)
	after, err2 := os.Stat(path)
	if err != nil || err2 != nil || os.SameFile(before, after) || !bytes.Equal(read(t, path), apply(t, u, old)) {
		t.Errorf("the package is not the signed one in a file of its own: %v, %v", err, err2)
	}
	if _, err := os.Lstat(temp); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the temporary file stays: %v", err)
	}
}

// A directory whose access list is inherited by new files opens no package to others
// that had none.
func TestInheritedAccessList(t *testing.T) {
	old := stripReserve(t, demo(t)) // it grows, and so is copied
	u := update(t, old, rsa2048())
	path := file(t, "x.rpm", old)
	if err := os.Chmod(path, 0o664); err != nil {
		t.Fatal(err)
	}
	// user::rwx, user:1234:rw-, group::r-x, mask::rwx, other::r-x; see acl(5).
	list := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, 1<<32 - 1}, {2, 6, 1234}, {4, 5, 1<<32 - 1}, {16, 7, 1<<32 - 1}, {32, 5, 1<<32 - 1}} {
		list = binary.LittleEndian.AppendUint16(list, e.tag)
		list = binary.LittleEndian.AppendUint16(list, e.perm)
		list = binary.LittleEndian.AppendUint32(list, e.id)
	}
	if err := unix.Setxattr(filepath.Dir(path), "system.posix_acl_default", list, 0); err != nil {
		t.Fatalf("this test wants a file system with access lists: %v", err)
	}
	if err := rpm.ApplyInPlace(path, u, rpm.FileOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Getxattr(path, "system.posix_acl_access", nil); !errors.Is(err, unix.ENODATA) {
		t.Errorf("the package has an access list now: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o664 {
		t.Errorf("mode %v, %v; want 0664", info.Mode(), err)
	}
	if !bytes.Equal(read(t, path), apply(t, u, old)) {
		t.Error("it is not the signed package")
	}
}
