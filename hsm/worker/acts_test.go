package worker_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// list is what the token holds, a line for each object, in order.
func list(t testing.TB, tok interface {
	List(context.Context) ([]hsm.Object, error)
}) []string {
	t.Helper()
	objects, err := tok.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	lines := []string{}
	for _, o := range objects {
		lines = append(lines, fmt.Sprintf("%v %s %s %s %s", o.Kind, o.Label, o.ID, o.Algorithm, o.Subject))
	}
	slices.Sort(lines)
	return lines
}

// A key that was imported signs in workers that were there before.
func TestImport(t *testing.T) {
	c := countingToken(t)
	tok := open(t, c)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec := newKey(t)
	want := []string{}
	for name, k := range map[string]crypto.Signer{"rsa2048": rsaKey, "p256": ec, "ed25519": ed} {
		pub, err := tok.Import(t.Context(), "label of "+name, []byte(name), k)
		if diff := cmp.Diff(pub, k.Public()); err != nil || diff != "" {
			t.Fatalf("%s: %v %s", name, err, diff)
		}
		sig, err := tok.Sign(t.Context(), "", 1, []byte(name), digest(1), crypto.SHA256)
		if err == nil {
			err = check(k.Public(), digest(1), sig, crypto.SHA256)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		want = append(want, fmt.Sprintf("private key label of %s %[1]s %[1]s ", name), fmt.Sprintf("public key label of %s %[1]s %[1]s ", name))
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "ec"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, ec.Public(), ec)
	if err != nil {
		t.Fatal(err)
	}
	if err := tok.ImportCertificate(t.Context(), []byte("p256"), der); err != nil {
		t.Error(err)
	}
	if err := tok.ImportCertificate(t.Context(), []byte("ed25519"), der); err == nil || !strings.Contains(err.Error(), "another key") {
		t.Errorf("certificate of another key: %v", err)
	}
	if _, err := tok.Import(t.Context(), "l", []byte("p256"), newKey(t)); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("id in use: %v", err)
	}
	want = append(want, "certificate label of p256 p256 p256 CN=ec")
	slices.Sort(want)
	if diff := cmp.Diff(list(t, tok), want); diff != "" {
		t.Error(diff)
	}
	// Six acts wrote, or would have; and reading does not want such a session.
	if n := counted(t, c, "C_OpenSession rw"); n != 6 {
		t.Errorf("%d sessions that write, want 6", n)
	}
}

// What is refused before a worker starts.
func TestImportRefuses(t *testing.T) {
	c := countingToken(t)
	a := worker.Administer(c)
	defer a.Close()
	good := newKey(t)
	mixed := *good
	mixed.PublicKey = newKey(t).PublicKey
	for name, k := range map[string]crypto.PrivateKey{
		"nothing": nil, "a public key": good.Public(), "halves of two keys": &mixed,
	} {
		_, err := a.Import(t.Context(), "l", []byte("k"), k)
		if e, ok := errors.AsType[*hsm.Error](err); !ok || !e.Refused() {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := a.Import(t.Context(), strings.Repeat("l", 1<<16), []byte("k"), good); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("long label: %v", err)
	}
	if n := counted(t, c, "C_Login"); n != 0 {
		t.Errorf("%d workers logged in", n)
	}
}

// A child that signs does nothing else, whatever it is asked.
func TestSignersOnlySign(t *testing.T) {
	c := countingToken(t)
	tok := open(t, c)
	der, err := x509.MarshalPKCS8PrivateKey(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, kind := range worker.Administrative {
		body := []byte("k")
		if name == "import" {
			body = worker.Import("l", []byte("k"), der)[9:]
		}
		if err := worker.AskSigner(t.Context(), tok, kind, body); err == nil || !strings.Contains(err.Error(), "nothing else") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if n := counted(t, c, "C_OpenSession rw") + counted(t, c, "C_CreateObject"); n != 0 {
		t.Errorf("%d sessions that write, and objects made", n)
	}
	if len(tok.Workers()) != c.Workers {
		t.Error("a worker ended over it")
	}
}

// A token for who administers it starts a worker for each act, and none signs.
func TestAdminister(t *testing.T) {
	c := countingToken(t)
	a := worker.Administer(c)
	if diff := cmp.Diff(list(t, a), []string{}); diff != "" {
		t.Error(diff)
	}
	if _, err := a.Import(t.Context(), "l", []byte("k"), newKey(t)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(list(t, a), []string{"private key l k p256 ", "public key l k p256 "}); diff != "" {
		t.Error(diff)
	}
	if err := a.Delete(t.Context(), []byte("k")); err != nil {
		t.Error(err)
	}
	if n := counted(t, c, "C_Login"); n != 4 {
		t.Errorf("%d logins for 4 acts", n)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if _, err := a.List(t.Context()); !errors.Is(err, hsm.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// A PIN that is refused is tried once for all acts.
func TestAdministerWrongPIN(t *testing.T) {
	c := countingToken(t)
	c.PIN = hsm.NewPIN("0000-wrong")
	a := worker.Administer(c)
	defer a.Close()
	for range 3 {
		_, err := a.List(t.Context())
		if e, ok := errors.AsType[*hsm.Error](err); !ok || !e.Operator() {
			t.Errorf("got %v", err)
		}
	}
	if n := counted(t, c, "C_Login"); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

// A list is longer than a frame.
func TestListInParts(t *testing.T) {
	c := newToken(t)
	a := worker.Administer(c)
	defer a.Close()
	p, err := hsm.Open(t.Context(), hsm.Config{Module: c.Module, Env: c.Env, TokenLabel: c.TokenLabel, PIN: c.PIN})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	const n = 40 // two objects each, of more than a KiB
	for i := range n {
		if _, err := p.Import(t.Context(), fmt.Sprint(i, strings.Repeat("l", hsm.MaxTold-8)), fmt.Append(nil, i), newKey(t)); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(list(t, a)); got != 2*n {
		t.Errorf("%d objects, want %d", got, 2*n)
	}
}

// The worker dies when it has half of a key in the token: who asked is told what may
// be left, and Delete removes it.
func TestImportWorkerKilled(t *testing.T) {
	c := countingToken(t)
	a := worker.Administer(c)
	defer a.Close()
	order(t, c, "CreateObject", "crash")
	_, err := a.Import(t.Context(), "l", []byte("k"), newKey(t))
	if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != hsm.ClassCrashed || !strings.Contains(err.Error(), "id 6b may be left") {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff(list(t, a), []string{"public key l k p256 "}); diff != "" {
		t.Error(diff)
	}
	if err := a.Delete(t.Context(), []byte("k")); err != nil {
		t.Error(err)
	}
	if left := list(t, a); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// Who leaves while a key is brought in leaves nothing behind, and Close waits for that.
func TestImportCancelled(t *testing.T) {
	c := countingToken(t)
	a := worker.Administer(c)
	order(t, c, "CreateObject", "wait")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := a.Import(ctx, "l", []byte("k"), newKey(t)); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	taken(t, c, "CreateObject")
	cancel()
	wg.Wait()
	if err := os.WriteFile(filepath.Join(c.Env["COUNT_DIR"], "CreateObject.go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	a = worker.Administer(c)
	defer a.Close()
	if left := list(t, a); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// A private key is in no log, argument list, environment or file of the worker.
func TestImportIsNowhere(t *testing.T) {
	c := countingToken(t)
	log := filepath.Join(t.TempDir(), "log")
	f, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c.Logger = slog.New(slog.NewTextHandler(f, &slog.HandlerOptions{Level: slog.LevelDebug}))
	a := worker.Administer(c)
	defer a.Close()
	key := newKey(t)
	order(t, c, "CreateObject", "wait")
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := a.Import(t.Context(), "l", []byte("k"), key); err != nil {
			t.Error(err)
		}
	})
	taken(t, c, "CreateObject")
	pid := childOf(t, os.Getpid())
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil || len(b) == 0 {
			t.Fatalf("%s: %d bytes, %v", name, len(b), err)
		}
		if strings.Contains(string(b), string(scalar)) {
			t.Errorf("%s has the key", name)
		}
	}
	st, err := os.Stat(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil || st.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("memory: %v", err)
	}
	if err := os.WriteFile(filepath.Join(c.Env["COUNT_DIR"], "CreateObject.go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(log)
	if err != nil || !strings.Contains(string(b), "administrative worker ended") {
		t.Fatalf("log: %v %s", err, b)
	}
	for _, form := range []string{string(scalar), fmt.Sprintf("%x", scalar), new(big.Int).SetBytes(scalar).String()} {
		if strings.Contains(string(b), form) {
			t.Error("the log has the key")
		}
	}
}

// childOf is the worker that a process has.
func childOf(t *testing.T, pid int) (child int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range tasks {
		b, _ := os.ReadFile(f) // a thread may end
		for s := range strings.FieldsSeq(string(b)) {
			fmt.Sscan(s, &child)
		}
	}
	if child == 0 {
		t.Fatal("there is no worker")
	}
	return child
}
