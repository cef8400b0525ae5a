//go:build linux

package rpm_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/formats/rpm"
)

// crashing is set in a child process of this test binary that signs a package and kills itself on the way. Its value is
// the number of a step and what to do of it: nothing, half, or all.
const crashing = "RPM_TEST_CRASH"

func TestMain(m *testing.M) {
	if os.Getenv(crashing) == "" {
		os.Exit(m.Run())
	}
	err := crash(os.Getenv(crashing), os.Args[1], os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// crash signs the package at path with the key in dir, in place; with "journal" by a Journal; "recover" is the recovery of one.
func crash(spec, dir, path string) error {
	what, spec, _ := strings.Cut(spec, " ")
	at, how, _ := strings.Cut(spec, " ")
	n, err := strconv.Atoi(at)
	if err != nil {
		return err
	}
	steps := 0
	disk := rpm.NewHookedDisk(func(s rpm.Step) error {
		steps++
		if steps != n {
			return s.Do()
		}
		switch how {
		case "half":
			s.Half()
		case "after":
			s.Do()
		}
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	})
	if what == "recover" {
		_, err = disk.Recover(path, rpm.FileOptions{})
		return err
	}
	der, err := os.ReadFile(filepath.Join(dir, "key"))
	if err != nil {
		return err
	}
	secret, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return err
	}
	signer := secret.(crypto.Signer)
	key, err := openpgp.NewKey(signer.Public(), created)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	p, err := rpm.ReadPackage(f, info.Size())
	if err != nil {
		return err
	}
	s, err := rpm.Prepare(p, key, rpm.Options{Time: created.Add(time.Hour)})
	if err != nil {
		return err
	}
	u, err := s.Sign(signer, nil)
	if err != nil {
		return err
	}
	if what != "journal" {
		return disk.ApplyInPlace(path, u, rpm.FileOptions{})
	}
	j := disk.Journal()
	return errors.Join(j.ApplyInPlace(path, u, rpm.FileOptions{}), j.Close())
}

// A process that is killed at any step, or in the midst of one, leaves with Recover the old or the new package, and no
// file besides; also if Recover is killed in its turn.
func TestKilledAtEveryStep(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := ed()
	der, err := x509.MarshalPKCS8PrivateKey(s.signer)
	if err != nil {
		t.Fatal(err)
	}
	keys := filepath.Dir(file(t, "key", der))
	o := rpm.Options{Time: created.Add(time.Hour)}
	for name, what := range map[string]struct {
		sign  string
		plain []byte
	}{
		"in place": {"sign", sign(t, demo(t), rsa2048(), rpm.Options{})},
		"journal":  {"journal", sign(t, demo(t), rsa2048(), rpm.Options{})},
		"grows":    {"sign", stripReserve(t, demo(t))},
	} {
		old, signed := what.plain, sign(t, what.plain, s, o)
		path := filepath.Join(t.TempDir(), "x.rpm")
		child := func(spec string) bool {
			cmd := exec.CommandContext(t.Context(), self, keys, path)
			cmd.Env = append(os.Environ(), crashing+"="+spec)
			out, err := cmd.CombinedOutput()
			exit, ok := errors.AsType[*exec.ExitError](err)
			if err != nil && (!ok || !exit.Sys().(syscall.WaitStatus).Signaled()) {
				t.Fatalf("%s %s: %v\n%s", name, spec, err, out)
			}
			return err != nil
		}
		var killed, restored, completed int
		for _, how := range []string{"before", "half", "after"} {
			for step := 1; ; step++ {
				spec := fmt.Sprintf("%s at %d %s", name, step, how)
				err = os.WriteFile(path, old, 0o600)
				if err != nil {
					t.Fatal(err)
				}
				if !child(fmt.Sprintf("%s %d %s", what.sign, step, how)) {
					break
				}
				killed++
				// Recover is killed too: at a step that goes round.
				child(fmt.Sprintf("recover %d %s", killed%4+1, how))
				got, err := rpm.Recover(path, rpm.FileOptions{})
				if err != nil {
					t.Errorf("%s: Recover: %v", spec, err)
				}
				switch b := read(t, path); {
				case bytes.Equal(b, old):
					restored++
				case bytes.Equal(b, signed):
					completed++
				default:
					t.Errorf("%s: neither the old nor the new package (%v)", spec, got)
				}
				left, err := os.ReadDir(filepath.Dir(path))
				if err != nil || len(left) != 1 {
					t.Errorf("%s: %v left: %v", spec, err, left)
				}
			}
		}
		if killed < 15 || restored < 6 || completed < 3 {
			t.Errorf("%s: killed %d times, %d old and %d new packages", name, killed, restored, completed)
		}
	}
}

// A step that fails, with and without effect, leaves the old or the new package, if need be with Recover.
func TestFailedAtEveryStep(t *testing.T) {
	s := ed()
	old := sign(t, demo(t), rsa2048(), rpm.Options{})
	signing, err := rpm.Prepare(open(t, old), s.key, rpm.Options{})
	if err != nil {
		t.Fatal(err)
	}
	u, err := signing.Sign(s.signer, nil)
	if err != nil {
		t.Fatal(err)
	}
	signed := apply(t, u, old)
	broken := errors.New("broken disk")
	for _, how := range []string{"before", "half", "after"} {
		for i := range 4 {
			lasting, inJournal := i%2 == 1, i/2 == 1
			for step := 1; ; step++ {
				path := file(t, "x.rpm", old)
				n, failed := 0, false
				disk := rpm.NewHookedDisk(func(s rpm.Step) error {
					n++
					if n < step || n > step && !lasting {
						return s.Do()
					}
					failed = true
					switch how {
					case "half":
						s.Half()
					case "after":
						s.Do()
					}
					return broken
				})
				var err error
				if inJournal {
					j := disk.Journal()
					err = j.ApplyInPlace(path, u, rpm.FileOptions{})
					err = errors.Join(err, j.Close())
				} else {
					err = disk.ApplyInPlace(path, u, rpm.FileOptions{})
				}
				if !failed {
					break
				}
				where := fmt.Sprintf("step %d %s, lasting %t, journal %t", step, how, lasting, inJournal)
				// Without a journal the record goes into a file of its own.
				if !errors.Is(err, broken) && (!inJournal || err != nil || step > 2 || !bytes.Equal(read(t, path), signed)) {
					t.Errorf("%s: got %v", where, err)
				}
				whole := func() bool {
					b := read(t, path)
					return bytes.Equal(b, old) || bytes.Equal(b, signed)
				}
				if !whole() && !errors.Is(err, rpm.ErrUnfinished) {
					t.Errorf("%s: the package is damaged, and the error does not say so: %v", where, err)
				}
				_, err = rpm.Recover(path, rpm.FileOptions{})
				if err != nil || !whole() {
					t.Errorf("%s: not recovered: %v", where, err)
				}
				left, err := os.ReadDir(filepath.Dir(path))
				if err != nil || slices.ContainsFunc(left, func(e os.DirEntry) bool { return e.Name() != "x.rpm" }) {
					t.Errorf("%s: %v left: %v", where, err, left)
				}
			}
		}
	}
}

// What a power cut leaves depends on what was on the disk by then: the record, whole and under its name, before the package
// is touched, and the package before the record goes.
func TestOrder(t *testing.T) {
	old := sign(t, demo(t), rsa2048(), rpm.Options{})
	copied := []string{
		"create .x.rpm.signwarden-new", "write .x.rpm.signwarden-new", "copy .x.rpm.signwarden-new",
		"sync .x.rpm.signwarden-new", "rename x.rpm", "syncDir .",
	}
	tests := []struct {
		name    string
		old     []byte
		journal bool
		want    []string
	}{
		{"in place", old, false, []string{
			"create .x.rpm.signwarden-undo", "write .x.rpm.signwarden-undo", "sync .x.rpm.signwarden-undo", "syncDir .",
			"write x.rpm", "syncData x.rpm", "remove .x.rpm.signwarden-undo", "syncDir .",
		}},
		{"journal", old, true, []string{
			"create .signwarden-undo", "syncDir .", "writeSync .signwarden-undo",
			"write x.rpm", "syncData x.rpm", "write .signwarden-undo", "remove .signwarden-undo", "syncDir .",
		}},
		{"rewritten", stripReserve(t, old), false, copied},
		{"rewritten beside a journal", stripReserve(t, old), true, copied},
	}
	for _, tt := range tests {
		u := update(t, tt.old, rsa4096())
		path := file(t, "x.rpm", tt.old)
		var got []string
		disk := rpm.NewHookedDisk(func(s rpm.Step) error {
			rel, err := filepath.Rel(filepath.Dir(path), s.Path)
			if err != nil {
				return err
			}
			got = append(got, s.Name+" "+rel)
			return s.Do()
		})
		var err error
		if tt.journal {
			j := disk.Journal()
			err = errors.Join(j.ApplyInPlace(path, u, rpm.FileOptions{}), j.Close())
		} else {
			err = disk.ApplyInPlace(path, u, rpm.FileOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
		if !bytes.Equal(read(t, path), apply(t, u, tt.old)) {
			t.Errorf("%s: the file is not the new package", tt.name)
		}
	}
}

// A package that another user owns, and we may write to, stays his.
func TestOfAnother(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("not root: no file of another user tried")
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := ed()
	der, err := x509.MarshalPKCS8PrivateKey(s.signer)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "rpm") // t.TempDir's parents are closed to others
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	bin, path := filepath.Join(dir, "test"), filepath.Join(dir, "x.rpm")
	old := demo(t)
	err = errors.Join(os.WriteFile(filepath.Join(dir, "key"), der, 0o644), os.WriteFile(path, old, 0o600),
		os.WriteFile(bin, read(t, self), 0o755), os.Chmod(dir, 0o777), os.Chmod(path, 0o666))
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), bin, dir, path)
	cmd.Env = append(os.Environ(), crashing+"=journal 0 before") // at no step
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1234, Gid: 1234}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	after, err := os.Stat(path)
	if err != nil || !os.SameFile(before, after) || after.Mode() != before.Mode() {
		t.Errorf("the file is another: %v, %v", after, err)
	}
	if !bytes.Equal(read(t, path), sign(t, old, s, rpm.Options{Time: created.Add(time.Hour)})) {
		t.Error("it is not the signed package")
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 3 {
		t.Errorf("left: %v, %v", left, err)
	}
}
