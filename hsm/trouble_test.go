package hsm_test

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/hsm"
)

// library builds a shared library of one C file.
func library(t *testing.T, path, source string, args ...string) {
	t.Helper()
	c := path + ".c"
	if err := os.WriteFile(c, []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cc", append([]string{"-shared", "-fPIC", "-o", path, c}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("cc: %v\n%s", err, out)
	}
}

// header is the head of an ELF file, and nothing more.
func header(class byte, kind, machine uint16) []byte {
	b := make([]byte, 64)
	copy(b, "\x7fELF")
	b[4], b[5], b[6] = class, 1, 1 // little-endian, version
	binary.LittleEndian.PutUint16(b[16:], kind)
	binary.LittleEndian.PutUint16(b[18:], machine)
	binary.LittleEndian.PutUint32(b[20:], 1)
	binary.LittleEndian.PutUint16(b[52:], 64) // e_ehsize
	if class == 1 {
		binary.LittleEndian.PutUint16(b[40:], 52)
	}
	return b
}

// Each file that is no module of ours, and what is said of it.
func TestModuleTrouble(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, b []byte) string {
		if err := os.WriteFile(at(name), b, 0o700); err != nil {
			t.Fatal(err)
		}
		return at(name)
	}
	const dyn, exe = 3, 2
	const sparc, i386, x86 = 43, 3, 62
	library(t, at("libdep.so"), "int dep(void) { return 1; }")
	library(t, at("lacks.so"), "int dep(void); int C_GetFunctionList(void *p) { return dep(); }", "-L"+dir, "-ldep")
	if err := os.Remove(at("libdep.so")); err != nil {
		t.Fatal(err)
	}
	library(t, at("nothing.so"), "int f(void) { return 0; }")
	library(t, at("undefined.so"), "int nowhere(void); int (*p)(void) = nowhere;")
	library(t, at("refuses.so"), "unsigned long C_GetFunctionList(void **p) { *p = 0; return 5; }")
	real, err := os.ReadFile(softhsm)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, path string
		want       []string
	}{
		{"a directory", dir, []string{"is no file"}},
		{"empty", write("empty.so", nil), []string{"no shared library"}},
		{"another machine", write("sparc.so", header(2, dyn, sparc)), []string{"another machine", "EM_SPARCV9", "architecture"}},
		{"32 bits", write("i386.so", header(1, dyn, i386)), []string{"another machine", "EM_386", "ELFCLASS32"}},
		{"a program", write("exe", header(2, exe, x86)), []string{"no shared library"}},
		{"cut off", write("cut.so", real[:5000]), []string{"cut.so"}},
		{"lacks a library", at("lacks.so"), []string{"missing", "libdep.so", "LD_LIBRARY_PATH"}},
		{"undefined symbol", at("undefined.so"), []string{"nowhere"}},
		{"no module", at("nothing.so"), []string{"C_GetFunctionList", "not a PKCS#11 module"}},
		{"a module that refuses", at("refuses.so"), []string{"C_GetFunctionList"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := hsm.Open(t.Context(), hsm.Config{Module: tt.path, TokenLabel: "t", PIN: hsm.NewPIN("1")})
			if err == nil {
				p.Close()
				t.Fatal("opened")
			}
			for _, w := range append(tt.want, tt.path) {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("got %q, want it to tell %q", err, w)
				}
			}
		})
	}
}
