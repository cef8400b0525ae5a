//go:build linux

package rpm_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/signwarden/signwarden/formats/rpm"
)

// undoRecord is the record that lies beside a package while it is overwritten.
func undoRecord(t testing.TB) []byte {
	t.Helper()
	path := file(t, "x.rpm", demo(t))
	var record []byte
	disk := rpm.NewHookedDisk(func(s rpm.Step) error {
		if s.Name == "remove" {
			var err error
			record, err = os.ReadFile(filepath.Join(filepath.Dir(path), ".x.rpm.signwarden-undo"))
			if err != nil {
				return err
			}
		}
		return s.Do()
	})
	err := disk.ApplyInPlace(path, update(t, demo(t), rsa2048()), rpm.FileOptions{})
	if err != nil || len(record) == 0 {
		t.Fatalf("a record of %d bytes, %v", len(record), err)
	}
	return record
}

func FuzzParseUndo(f *testing.F) {
	real := undoRecord(f)
	b, err := rpm.ParseUndo(real)
	if err != nil || !bytes.Equal(b, real) {
		f.Fatalf("a real record: %v", err)
	}
	f.Add(real[:len(real)-sha256.Size])
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := rpm.ParseUndo(b)
		if err != nil && !errors.Is(err, rpm.ErrMalformed) {
			t.Errorf("got %v", err)
		}
		sum := sha256.Sum256(b)
		whole := append(bytes.Clone(b), sum[:]...) // or nothing behind the checksum is ever reached
		again, err := rpm.ParseUndo(whole)
		if err != nil {
			if !errors.Is(err, rpm.ErrMalformed) || again != nil {
				t.Errorf("got %v", err)
			}
			return
		}
		if !bytes.Equal(again, whole) {
			t.Error("a record came back as another")
		}
	})
}
