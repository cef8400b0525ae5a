package hsm_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"log"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"
	"go.uber.org/goleak"

	"github.com/signwarden/signwarden/hsm"
)

const (
	softhsm = "/usr/lib/softhsm/libsofthsm2.so"
	userPIN = "4711-user"
	soPIN   = "0815-officer"
)

// env names one configuration for the whole test binary: a process loads a
// module once. Each test that wants a clean token makes one in it.
var env map[string]string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		// A required peer that is missing fails the run.
		for _, f := range []string{softhsm, "/usr/bin/pkcs11-tool"} {
			if _, err := os.Stat(f); err != nil {
				log.Printf("install softhsm2 and opensc: %v", err)
				return 1
			}
		}
		dir, err := os.MkdirTemp("", "hsm-test-")
		if err != nil {
			log.Print(err)
			return 1
		}
		defer os.RemoveAll(dir)
		conf := filepath.Join(dir, "softhsm2.conf")
		text := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", dir)
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			log.Print(err)
			return 1
		}
		env = map[string]string{"SOFTHSM2_CONF": conf}
		code := m.Run()
		if err := goleak.Find(); err != nil {
			log.Print(err)
			return 1
		}
		return code
	}())
}

// newToken initialises a token that only this test uses.
func newToken(t testing.TB) hsm.Config {
	t.Helper()
	label := rand.Text()[:12]
	err := hsm.InitToken(softhsm, env, label, hsm.NewPIN(soPIN), hsm.NewPIN(userPIN))
	if err != nil {
		t.Fatal(err)
	}
	return hsm.Config{Module: softhsm, Env: env, TokenLabel: label, PIN: hsm.NewPIN(userPIN), Sessions: 2}
}

func openPool(t testing.TB, c hsm.Config) *hsm.Pool {
	t.Helper()
	p, err := hsm.Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return p
}

// openFaulty opens a pool with a fault injector before the module.
func openFaulty(t testing.TB, c hsm.Config) (*hsm.Pool, *faulty) {
	t.Helper()
	f := &faulty{counts: map[string]int{}}
	p, err := hsm.OpenWith(t.Context(), c, func(a hsm.API) hsm.API { f.API = a; return f })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return p, f
}

func generate(t testing.TB, p *hsm.Pool, id, algorithm string) crypto.PublicKey {
	t.Helper()
	pub, err := p.Generate(context.Background(), "label of "+id, []byte(id), algorithm)
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// check verifies a signature as the pool gives it.
func check(pub crypto.PublicKey, digest, sig []byte, opts crypto.SignerOpts) error {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if o, ok := opts.(*rsa.PSSOptions); ok {
			return rsa.VerifyPSS(k, o.Hash, digest, sig, o)
		}
		return rsa.VerifyPKCS1v15(k, opts.HashFunc(), digest, sig)
	case *ecdsa.PublicKey:
		n := len(sig) / 2
		if len(sig) != 2*((k.Params().BitSize+7)/8) {
			return fmt.Errorf("signature of %d bytes", len(sig))
		}
		if !ecdsa.Verify(k, digest, new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])) {
			return fmt.Errorf("ECDSA signature does not verify")
		}
		return nil
	case ed25519.PublicKey:
		if !ed25519.Verify(k, digest, sig) {
			return fmt.Errorf("Ed25519 signature does not verify")
		}
		return nil
	}
	return fmt.Errorf("public key of type %T", pub)
}

// faulty counts calls into the module and answers some with a CK_RV of the
// test's choice.
type faulty struct {
	hsm.API
	mu      sync.Mutex
	counts  map[string]int
	signed  int                     // bytes of the last message given to C_Sign
	inject  func(call string) error // nil injects nothing; runs before the module, with mu not held
	token   func(*pkcs11.TokenInfo) // changes what the token says of itself
	endless bool                    // a search finds ever more
}

func (f *faulty) hit(call string) error {
	f.mu.Lock()
	f.counts[call]++
	inject := f.inject
	f.mu.Unlock()
	if inject == nil {
		return nil
	}
	return inject(call)
}

// arm starts to inject and counts from zero.
func (f *faulty) arm(inject func(call string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.inject, f.counts = inject, map[string]int{}
}

func (f *faulty) count(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts[call]
}

// times injects rv into the first n of these calls.
func times(n int, call string, rv uint) func(string) error {
	var mu sync.Mutex
	return func(c string) error {
		mu.Lock()
		defer mu.Unlock()
		if c != call || n == 0 {
			return nil
		}
		n--
		return pkcs11.Error(rv)
	}
}

func (f *faulty) GetTokenInfo(slot uint) (pkcs11.TokenInfo, error) {
	t, err := f.API.GetTokenInfo(slot)
	if f.token != nil {
		f.token(&t)
	}
	return t, err
}

func (f *faulty) OpenSession(slot, flags uint) (pkcs11.SessionHandle, error) {
	if flags&pkcs11.CKF_RW_SESSION != 0 {
		f.hit("read-write session")
	}
	if err := f.hit("C_OpenSession"); err != nil {
		return 0, err
	}
	return f.API.OpenSession(slot, flags)
}

func (f *faulty) CloseSession(sh pkcs11.SessionHandle) error {
	f.hit("C_CloseSession")
	return f.API.CloseSession(sh)
}

func (f *faulty) Login(sh pkcs11.SessionHandle, user uint, pin string) error {
	if err := f.hit("C_Login"); err != nil {
		return err
	}
	return f.API.Login(sh, user, pin)
}

func (f *faulty) FindObjectsInit(sh pkcs11.SessionHandle, t []*pkcs11.Attribute) error {
	if err := f.hit("C_FindObjectsInit"); err != nil {
		return err
	}
	return f.API.FindObjectsInit(sh, t)
}

func (f *faulty) FindObjects(sh pkcs11.SessionHandle, max int) ([]pkcs11.ObjectHandle, bool, error) {
	if err := f.hit("C_FindObjects"); err != nil {
		return nil, false, err
	}
	if f.endless {
		return make([]pkcs11.ObjectHandle, max), false, nil
	}
	return f.API.FindObjects(sh, max)
}

func (f *faulty) SignInit(sh pkcs11.SessionHandle, m []*pkcs11.Mechanism, o pkcs11.ObjectHandle) error {
	if err := f.hit("C_SignInit"); err != nil {
		return err
	}
	return f.API.SignInit(sh, m, o)
}

func (f *faulty) Sign(sh pkcs11.SessionHandle, message []byte) ([]byte, error) {
	if err := f.hit("C_Sign"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.signed = len(message)
	f.mu.Unlock()
	return f.API.Sign(sh, message)
}

func (f *faulty) GenerateRandom(sh pkcs11.SessionHandle, n int) ([]byte, error) {
	if err := f.hit("C_GenerateRandom"); err != nil {
		return nil, err
	}
	return f.API.GenerateRandom(sh, n)
}

func (f *faulty) GetAttributeValue(sh pkcs11.SessionHandle, o pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	as, err := f.API.GetAttributeValue(sh, o, a)
	if err == nil && f.hit(fmt.Sprintf("C_GetAttributeValue %#x", a[0].Type)) != nil {
		as[0].Value = []byte{1 - as[0].Value[0]} // a boolean that lies
	}
	return as, err
}

func (f *faulty) GenerateKeyPair(sh pkcs11.SessionHandle, m []*pkcs11.Mechanism, pub, priv []*pkcs11.Attribute) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
	if err := f.hit("C_GenerateKeyPair"); err != nil {
		return 0, 0, err
	}
	a, b, err := f.API.GenerateKeyPair(sh, m, pub, priv)
	if late := f.hit("after C_GenerateKeyPair"); late != nil {
		return 0, 0, late // failed, but persisted
	}
	return a, b, err
}

func (f *faulty) CreateObject(sh pkcs11.SessionHandle, t []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	call := fmt.Sprintf("C_CreateObject %d", t[0].Value[0]) // CKA_CLASS
	if err := f.hit(call); err != nil {
		return 0, err
	}
	h, err := f.API.CreateObject(sh, t)
	if late := f.hit("after " + call); late != nil {
		return 0, late // failed, but persisted
	}
	return h, err
}

func (f *faulty) DestroyObject(sh pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
	if err := f.hit("C_DestroyObject"); err != nil {
		return err
	}
	return f.API.DestroyObject(sh, o)
}
