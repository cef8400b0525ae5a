package hsm

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

// What dlerror says is kept for each thread, and between two calls from Go the
// goroutine may change its thread. The caller frees *why.
static void *load(const char *path, char **why) {
	void *h = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
	const char *text = h == NULL ? dlerror() : NULL;
	*why = text == NULL ? NULL : strdup(text);
	return h;
}

static unsigned long function_list(void *f) {
	void *list = NULL;
	unsigned long rv = ((unsigned long (*)(void **))f)(&list);
	return rv != 0 ? rv : list == NULL ? 5 : 0; // CKR_GENERAL_ERROR
}
*/
import "C"

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unsafe"
)

// loadable refuses a file that the dynamic linker would, with words that say
// what it is. path is no symbolic link.
func loadable(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("PKCS#11 module: %w", err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("PKCS#11 module %q is no file (%v): name the .so itself", path, st.Mode().Type())
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("PKCS#11 module %q cannot be read by uid %d: correct its mode, or that of a directory above it", path, os.Geteuid())
	}
	if err != nil {
		return fmt.Errorf("PKCS#11 module: %w", err)
	}
	defer f.Close()
	magic := make([]byte, len(elf.ELFMAG))
	if _, err := io.ReadFull(f, magic); err != nil || string(magic) != elf.ELFMAG {
		return fmt.Errorf("PKCS#11 module %q is no shared library: correct the path (a linker script, an archive or a text will not do)", path)
	}
	theirs, err := elf.NewFile(f)
	if err != nil {
		return fmt.Errorf("PKCS#11 module %q is damaged: %w: install it again", path, err)
	}
	ours, err := elf.Open("/proc/self/exe")
	if err != nil {
		return nil // the linker will tell
	}
	defer ours.Close()
	if theirs.Class != ours.Class || theirs.Machine != ours.Machine || theirs.Data != ours.Data {
		return fmt.Errorf("PKCS#11 module %q is built for another machine (%v, %v) than this program (%v, %v): install the vendor's package for this architecture",
			path, theirs.Machine, theirs.Class, ours.Machine, ours.Class)
	}
	if theirs.Type != elf.ET_DYN {
		return fmt.Errorf("PKCS#11 module %q is no shared library (%v): correct the path", path, theirs.Type)
	}
	return nil
}

// probe loads a library and asks it for its functions, and says what is wrong
// with it: the binding does not tell, and does not look whether it got a list.
// The library stays loaded, as module.release has it.
func probe(path string) error {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	var why *C.char
	h := C.load(name, &why)
	defer C.free(unsafe.Pointer(why))
	if h == nil {
		text := strings.TrimPrefix(C.GoString(why), path+": ")
		if lib, _, ok := strings.Cut(text, ": cannot open shared object file"); ok {
			return fmt.Errorf("PKCS#11 module %q depends on a library that is missing, %s: install its package, or name its directory in LD_LIBRARY_PATH (for a gateway in token.environment)", path, lib)
		}
		return fmt.Errorf("PKCS#11 module %q cannot be loaded: %s", path, text)
	}
	symbol := C.CString("C_GetFunctionList")
	defer C.free(unsafe.Pointer(symbol))
	f := C.dlsym(h, symbol)
	if f == nil {
		return fmt.Errorf("%q is a library, but not a PKCS#11 module (it has no C_GetFunctionList): correct the path", path)
	}
	if rv := C.function_list(f); rv != 0 {
		return fmt.Errorf("PKCS#11 module %q gives no list of its functions (C_GetFunctionList: %s): install it again", path, CodeName(uint(rv)))
	}
	return nil
}

// softhsmConf are the places where SoftHSM looks for its configuration.
func softhsmConf() string {
	if c := os.Getenv("SOFTHSM2_CONF"); c != "" {
		return c
	}
	if home := os.Getenv("HOME"); home != "" {
		c := filepath.Join(home, ".config", "softhsm2", "softhsm2.conf")
		if _, err := os.Stat(c); err == nil {
			return c
		}
	}
	return "/etc/softhsm/softhsm2.conf"
}

// softhsmTrouble says what is wrong with SoftHSM's configuration, which it does
// not: "" where the module is another one, or nothing is wrong.
func softhsmTrouble(module string) string {
	if !strings.Contains(filepath.Base(module), "softhsm") && os.Getenv("SOFTHSM2_CONF") == "" {
		return ""
	}
	conf := softhsmConf()
	f, err := os.Open(conf)
	if err != nil {
		return fmt.Sprintf("SoftHSM's configuration cannot be read: %v: set SOFTHSM2_CONF (for a gateway in token.environment), or correct the mode", err)
	}
	defer f.Close()
	dir := ""
	for s := bufio.NewScanner(io.LimitReader(f, 64<<10)); s.Scan(); {
		if name, value, ok := strings.Cut(s.Text(), "="); ok && strings.TrimSpace(name) == "directories.tokendir" {
			dir = strings.TrimSpace(value)
		}
	}
	if dir == "" {
		return fmt.Sprintf("SoftHSM's configuration %s names no directories.tokendir", conf)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Sprintf("SoftHSM's token directory (directories.tokendir in %s) cannot be read: %v: correct the path, or the directory's owner and mode", conf, err)
	}
	for _, e := range entries {
		if _, err := os.ReadDir(filepath.Join(dir, e.Name())); e.IsDir() && err != nil {
			return fmt.Sprintf("a token of SoftHSM cannot be read: %v: correct its owner and mode (each user of the token needs to read and write it)", err)
		}
	}
	return ""
}
