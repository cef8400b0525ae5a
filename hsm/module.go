package hsm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/miekg/pkcs11"
)

// A module is a loaded PKCS#11 library. C_Initialize and C_Finalize count for
// the whole process, however many pools use the library, so that the loaded
// libraries are this package's one piece of global state.
type module struct {
	path string
	ctx  *pkcs11.Ctx
	refs int  // users; guarded by modules.mu
	ours bool // we called C_Initialize, so that we may call C_Finalize

	// admin is held (a value in it) while keys or tokens are made or
	// destroyed: SoftHSM 2.6.1 answers parallel C_GenerateKeyPair with a random
	// CKR_GENERAL_ERROR (its issue 573). A channel, so that a waiter can leave.
	admin chan struct{}
}

var modules = struct {
	mu     sync.Mutex // guards loaded and the counts; held while a module is loaded or let go
	loaded map[string]*module
}{loaded: map[string]*module{}}

// acquire loads the module at path, or counts one more user of it. Each
// acquire wants one release.
//
// Of a module that some other code of this process has initialised
// (CKR_CRYPTOKI_ALREADY_INITIALIZED) we are guests: we never finalise it.
func acquire(path string, env map[string]string) (*module, error) {
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("PKCS#11 module %q does not exist: correct the path, or install the module (for SoftHSM the package softhsm2)", path)
	}
	if err != nil {
		return nil, fmt.Errorf("PKCS#11 module: %w", err)
	}
	modules.mu.Lock()
	defer modules.mu.Unlock()
	m := modules.loaded[real]
	if m == nil {
		m = &module{path: path, admin: make(chan struct{}, 1)}
	}
	if err := m.setEnv(env); err != nil {
		return nil, err
	}
	if m.ctx == nil {
		if err := loadable(real); err != nil {
			return nil, err
		}
		if err := probe(real); err != nil {
			return nil, err
		}
		if m.ctx = pkcs11.New(real); m.ctx == nil {
			return nil, fmt.Errorf("PKCS#11 module %q cannot be loaded", path)
		}
		modules.loaded[real] = m
	}
	if m.refs == 0 {
		if err := m.initialise(); err != nil {
			return nil, err
		}
	}
	m.refs++
	return m, nil
}

// setEnv is called with modules.mu held. A module reads its environment once,
// at C_Initialize, so one in use cannot be given another.
func (m *module) setEnv(env map[string]string) error {
	for k, v := range env {
		if m.refs > 0 && os.Getenv(k) != v {
			return fmt.Errorf("PKCS#11 module %q is in use in this process with %s=%q: it cannot also be used with %q", m.path, k, os.Getenv(k), v)
		}
		if err := os.Setenv(k, v); err != nil { // with cgo, C's environment too
			return fmt.Errorf("setting %s for the PKCS#11 module: %w", k, err)
		}
	}
	return nil
}

func (m *module) initialise() error {
	err := m.ctx.Initialize() // with CKF_OS_LOCKING_OK
	m.ours = err == nil
	if err == nil || errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		return nil
	}
	err = fail("C_Initialize", err)
	if why := softhsmTrouble(m.path); why != "" {
		return fmt.Errorf("PKCS#11 module %q does not start: %s (%w)", m.path, why, err)
	}
	return fmt.Errorf("PKCS#11 module %q does not start: %w", m.path, err)
}

// release undoes one acquire. The caller has no call running and no session
// open. The last one finalises the module: never under load, which crashes
// several modules. The library stays mapped, for SoftHSM's static destructors
// crash with OpenSSL 3 (its issues 635 and 729) at dlclose as they do at exit;
// a Go process does not run them when it exits.
func (m *module) release() error {
	modules.mu.Lock()
	defer modules.mu.Unlock()
	if m.refs--; m.refs > 0 || !m.ours {
		return nil
	}
	return fail("C_Finalize", m.ctx.Finalize())
}
