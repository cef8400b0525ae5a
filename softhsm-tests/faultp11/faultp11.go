// Package faultp11 builds and steers a PKCS#11 module that forwards to a real one,
// counts its calls, and fails as rules say. It is for tests, of this module and of
// what a gateway is configured with. README.md has the syntax of the rules.
package faultp11

import (
	_ "embed"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

//go:embed module/faultp11.c
var source []byte

// Build compiles the module into dir, with the machine's C compiler and the PKCS#11
// headers of the Go module github.com/miekg/pkcs11, and returns its path. Once for a
// test run is enough: each [New] has rules and counts of its own.
func Build(dir string) (string, error) {
	headers, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		return "", fmt.Errorf("headers of PKCS#11: %w", err)
	}
	c, so := filepath.Join(dir, "faultp11.c"), filepath.Join(dir, "faultp11.so")
	if err := os.WriteFile(c, source, 0o644); err != nil {
		return "", err
	}
	out, err := exec.Command("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
		"-I", strings.TrimSpace(string(headers)), "-o", so, c, "-ldl", "-lpthread").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("gcc: %w\n%s", err, out)
	}
	return so, nil
}

// The layout of the file of counts, as in the C source.
const (
	functions = 128
	nameSize  = 32
	counted   = 4096
	callsAt   = functions * nameSize
	matchedAt = callsAt + functions*8
	injectAt  = matchedAt + counted*8
	openAt    = injectAt + counted*8
	processes = 256
	size      = openAt + processes*16
)

// A Module is the rules and counts of one test. Its methods are for one goroutine at a
// time, but for those that count.
type Module struct {
	// Env is what the module wants in its environment: worker.Config.Env, or
	// token.environment of signwardend.yaml. Add what the real module wants.
	Env map[string]string

	rules string
	mem   []byte
	next  int   // the id of the next rule
	ids   []int // of the rules in force
}

// New prepares rules, none as yet, and counts in a new directory. real is the module
// that does the work.
func New(t testing.TB, real string) *Module {
	t.Helper()
	dir := t.TempDir()
	m := &Module{rules: filepath.Join(dir, "rules")}
	m.Env = map[string]string{"FAULTP11_MODULE": real, "FAULTP11_RULES": m.rules, "FAULTP11_COUNTS": filepath.Join(dir, "counts")}
	f, err := os.Create(m.Env["FAULTP11_COUNTS"])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if m.mem, err = unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(m.mem); err != nil {
			t.Error(err)
		}
	})
	m.Set(t)
	return m
}

// Set puts these rules in force, a line each, in place of those before: from the next
// call into the module, in each process. Their counts begin at 0. No rules: all is well.
func (m *Module) Set(t testing.TB, lines ...string) {
	t.Helper()
	var text strings.Builder
	m.ids = m.ids[:0]
	for _, line := range lines {
		if strings.HasPrefix(line, "C_") {
			id := m.next % counted
			m.next++
			m.word(matchedAt, id).Store(0)
			m.word(injectAt, id).Store(0)
			line = fmt.Sprintf("%s id=%d", line, id)
			m.ids = append(m.ids, id)
		}
		text.WriteString(line + "\n")
	}
	if err := os.WriteFile(m.rules+".new", []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(m.rules+".new", m.rules); err != nil {
		t.Fatal(err)
	}
}

// Injected is how often the ith of the rules in force that begin with a function has
// been carried out, in all processes.
func (m *Module) Injected(i int) int { return int(m.word(injectAt, m.ids[i]).Load()) }

// Calls is how often a function was called, in all processes since New.
func (m *Module) Calls(function string) int {
	for i := range functions {
		name, _, _ := strings.Cut(string(m.mem[i*nameSize:(i+1)*nameSize]), "\x00")
		if name == function {
			return int(m.word(callsAt, i).Load())
		}
	}
	return 0 // no process has loaded the module
}

// Sessions is how many sessions the processes that have loaded the module hold now, by
// what they last said: one that was killed is counted until another one opens a session.
func (m *Module) Sessions() int {
	n := 0
	for i := range processes {
		n += int(binary.NativeEndian.Uint64(m.mem[openAt+16*i+8:]))
	}
	return n
}

func (m *Module) word(at, i int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&m.mem[at+8*i])) // the file is mapped at a page, so it is aligned
}
