package worker_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"fmt"
	"log"
	"log/slog"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

const (
	softhsm = "/usr/lib/softhsm/libsofthsm2.so"
	userPIN = "4711-user"
	soPIN   = "0815-officer"
)

var (
	env      map[string]string // of the module
	counting string            // the module that counts
)

// TestMain is also the program that workers re-exec.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case worker.Command:
			os.Exit(worker.Main())
		case parentCommand:
			os.Exit(parent())
		case rawCommand:
			os.Exit(rawSigner())
		}
	}
	os.Exit(func() int {
		// A required peer that is missing fails the run.
		if _, err := os.Stat(softhsm); err != nil {
			log.Printf("install softhsm2: %v", err)
			return 1
		}
		dir, err := os.MkdirTemp("", "worker-test-")
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
		if counting, err = buildCounting(dir); err != nil {
			log.Print(err)
			return 1
		}
		code := m.Run()
		if err := goleak.Find(); err != nil {
			log.Print(err)
			return 1
		}
		return code
	}())
}

func buildCounting(dir string) (string, error) {
	headers, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		return "", fmt.Errorf("headers of PKCS#11: %w", err)
	}
	so := filepath.Join(dir, "counting.so")
	out, err := exec.Command("cc", "-Wall", "-Werror", "-shared", "-fPIC", "-I", strings.TrimSpace(string(headers)),
		"-o", so, "testdata/counting.c", "-ldl").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("cc: %w\n%s", err, out)
	}
	return so, nil
}

// newToken initialises a token that only this test uses.
func newToken(t testing.TB) worker.Config {
	t.Helper()
	label := rand.Text()[:12]
	if err := hsm.InitToken(softhsm, env, label, hsm.NewPIN(soPIN), hsm.NewPIN(userPIN)); err != nil {
		t.Fatal(err)
	}
	return worker.Config{
		Module: softhsm, Env: env, TokenLabel: label, PIN: hsm.NewPIN(userPIN), Workers: 2,
		Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// open opens a token and waits until all its workers serve.
func open(t testing.TB, c worker.Config) *worker.Token {
	t.Helper()
	tok, err := worker.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tok.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	until(t, "all workers serve", func() bool { return len(tok.Workers()) == c.Workers })
	return tok
}

func generate(t testing.TB, tok *worker.Token, id, algorithm string) crypto.PublicKey {
	t.Helper()
	pub, err := tok.Generate(context.Background(), "label of "+id, []byte(id), algorithm)
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// until waits for a state that comes by itself, or for the end of the test.
func until(t testing.TB, what string, done func() bool) {
	t.Helper()
	for !done() {
		select {
		case <-t.Context().Done():
			t.Fatalf("waiting until %s: %v", what, t.Context().Err())
		case <-wakeUp():
		}
	}
}

// digest is one that no other number has.
func digest(n int64) []byte {
	d := sha256.Sum256(fmt.Append(nil, n))
	return d[:]
}

// check verifies a signature as the token gives it.
func check(pub crypto.PublicKey, digest, sig []byte, opts crypto.SignerOpts) error {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if o, ok := opts.(*rsa.PSSOptions); ok {
			return rsa.VerifyPSS(k, o.Hash, digest, sig, o)
		}
		return rsa.VerifyPKCS1v15(k, opts.HashFunc(), digest, sig)
	case *ecdsa.PublicKey:
		n := len(sig) / 2
		if len(sig) != 2*((k.Params().BitSize+7)/8) || !ecdsa.Verify(k, digest, new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])) {
			return fmt.Errorf("ECDSA signature of %d bytes does not verify", len(sig))
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
