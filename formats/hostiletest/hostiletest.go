// Package hostiletest holds a format's readers against damaged files: ten thousand of them, of which none may make a
// reader panic or take more memory than a program of ours has for all it does. Only tests import it.
package hostiletest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

const (
	Mutations = 10_000   // of all seeds together
	Ceiling   = 64 << 20 // bytes of memory of the process, the test and its seeds in it
)

// Files are the files of a format and what is done with them.
type Files struct {
	Seeds [][]byte

	// Mutate damages a copy of a seed where the format hurts; nil: Damage does it everywhere. Where it is there it
	// makes every second file.
	Mutate func(r *rand.Rand, seed []byte) []byte

	// Try does with a file what a program would, and fails the test if something is amiss. It returns the error that
	// the file met with, nil if it was taken.
	Try func(t testing.TB, seed, damaged []byte) error
}

// Run tries Mutations files, the same in each run but for what is random in the seeds. files is called, and they are
// tried, in a process of its own, the test run once more, of which the kernel says how much memory it had at most. The
// race detector's memory says nothing of the program's: with it there are fewer files, and no such process.
//
// Some files must be taken and many refused, or the mutations are not what they should be.
func Run(t *testing.T, files func(t *testing.T) Files) {
	t.Helper()
	if race {
		try(t, files(t), Mutations/10)
		return
	}
	if report := os.Getenv(childVariable); report != "" {
		try(t, files(t), Mutations)
		err := os.WriteFile(report, []byte(peak(t)), 0o600)
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	report := t.TempDir() + "/peak"
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), self, "-test.run=^"+regexp.QuoteMeta(t.Name())+"$", "-test.count=1", "-test.v")
	child.Env = append(os.Environ(), childVariable+"="+report)
	out, err := child.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(report)
	if err != nil {
		t.Fatalf("the process told nothing: %v\n%s", err, out)
	}
	kib, err := strconv.Atoi(string(b))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "were refused") {
			t.Logf("%s; %d KiB of memory at most", strings.TrimSpace(line), kib)
		}
	}
	if kib<<10 >= Ceiling {
		t.Errorf("%d KiB of memory at most, want under %d", kib, Ceiling>>10)
	}
}

// childVariable is set in the process that tries the files, to where it tells of its memory.
const childVariable = "SIGNWARDEN_HOSTILE_REPORT"

// peak is the most memory that this process had, in KiB (proc(5), VmHWM). getrusage would count what the parent had.
func peak(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "VmHWM:" && f[2] == "kB" {
			return f[1]
		}
	}
	t.Fatal("/proc/self/status has no VmHWM")
	return ""
}

func try(t *testing.T, f Files, n int) {
	t.Helper()
	if len(f.Seeds) == 0 {
		t.Fatal("no seeds")
	}
	r := rand.New(rand.NewPCG(1, 2))
	refused := 0
	for i := range n {
		seed := f.Seeds[i%len(f.Seeds)]
		damage := Damage
		if f.Mutate != nil && r.IntN(2) == 0 {
			damage = f.Mutate
		}
		b := damage(r, seed)
		if one(t, f, i, seed, b) {
			refused++
		}
		if t.Failed() {
			t.Fatalf("file %d, seed %d; the file: %s", i, i%len(f.Seeds), keep(b))
		}
	}
	t.Logf("of %d files %d were refused", n, refused)
	if refused < n/4 || refused == n {
		t.Errorf("of %d files %d were refused: the mutations do not do what they should", n, refused)
	}
}

// one tries a file, and says which it was if that panics.
func one(t *testing.T, f Files, i int, seed, b []byte) (refused bool) {
	t.Helper()
	defer func() {
		if p := recover(); p != nil {
			fmt.Fprintf(os.Stderr, "file %d of seed %d, which is %s:\n", i, i%len(f.Seeds), keep(b))
			panic(p)
		}
	}()
	err := f.Try(t, seed, b)
	Clear(t, err)
	return err != nil
}

// Clear fails the test unless an error is what a person can be told: one line, and not a page. nil is clear.
func Clear(t testing.TB, err error) {
	t.Helper()
	if err == nil {
		return
	}
	text := err.Error()
	if bad := strings.IndexFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }); bad >= 0 || !utf8.ValidString(text) || len(text) > 500 {
		t.Errorf("it is told of in other words than one clear line: %q", text)
	}
}

// keep leaves a file behind for whoever looks into the failure.
func keep(b []byte) string {
	f, err := os.CreateTemp("", "hostile")
	if err != nil {
		return err.Error()
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close(), errors.New(f.Name())).Error()
}

// edges are numbers that lengths and counts go wrong at.
var edges = []uint32{0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff}

// Damage returns a copy of seed with some of it changed, cut, moved or doubled.
func Damage(r *rand.Rand, seed []byte) []byte {
	b := bytes.Clone(seed)
	for range 1 + r.IntN(3) {
		if len(b) < 8 {
			return append(b, byte(r.Uint32()))
		}
		at := r.IntN(len(b) - 4)
		if r.IntN(3) == 0 {
			at = r.IntN(min(len(b)-4, 512)) // where headers are
		}
		n := min(1+r.IntN(64), len(b)-at)
		switch r.IntN(9) {
		case 0, 1:
			b[at] ^= 1 << r.IntN(8)
		case 2:
			b[at] = byte(r.Uint32())
		case 3:
			binary.BigEndian.PutUint32(b[at:], edges[r.IntN(len(edges))])
		case 4:
			binary.LittleEndian.PutUint32(b[at:], edges[r.IntN(len(edges))])
		case 5:
			binary.LittleEndian.PutUint16(b[at:], uint16(edges[r.IntN(len(edges))]))
		case 6:
			b = b[:at] // cut short
		case 7:
			b = slices.Delete(b, at, at+n)
		case 8:
			b = slices.Insert(b, at, bytes.Clone(b[at:at+n])...)
		}
	}
	return b
}
