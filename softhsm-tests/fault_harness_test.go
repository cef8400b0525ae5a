package softhsm_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
	"github.com/signwarden/signwarden/softhsm-tests/faultp11"
)

// PINs of the tokens of faultToken.
const faultPIN, faultSO = "4711-user", "0815-officer"

// faultToken is a token of SoftHSM of its own, behind the module that fails as it is
// told and behind workers, with one P-256 key.
type faultToken struct {
	*faultp11.Module
	c   worker.Config
	tok *worker.Token
	pub crypto.PublicKey
}

var faultKey = []byte("fault")

func newFaultToken(t testing.TB, change func(*worker.Config)) *faultToken {
	t.Helper()
	dir := t.TempDir()
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.Mkdir(filepath.Join(dir, "tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, conf, fmt.Sprintf("directories.tokendir = %s/tokens\nobjectstore.backend = file\nlog.level = ERROR\n", dir))
	f := &faultToken{Module: faultp11.New(t, softhsmModule(t))}
	f.Env["SOFTHSM2_CONF"] = conf
	// By a program of its own: SoftHSM reads its configuration once in a process.
	mustEnv(t, append(os.Environ(), "SOFTHSM2_CONF="+conf), "softhsm2-util", "--init-token", "--free", "--label", "fault", "--so-pin", faultSO, "--pin", faultPIN)
	f.c = worker.Config{
		Module: faulty, Env: f.Env, TokenLabel: "fault", PIN: hsm.NewPIN(faultPIN), Workers: 2,
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if change != nil {
		change(&f.c)
	}
	f.open(t)
	pub, err := f.tok.Generate(t.Context(), "fault", faultKey, "p256")
	if err != nil {
		t.Fatal(err)
	}
	f.pub = pub
	f.settle(t)
	return f
}

func (f *faultToken) open(t testing.TB) {
	t.Helper()
	tok, err := worker.Open(t.Context(), f.c)
	if err != nil {
		t.Fatal(err)
	}
	f.tok = tok
	t.Cleanup(func() {
		f.Set(t)
		if err := tok.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}

// settle waits until all is well: each worker serves, and has found the key.
func (f *faultToken) settle(t testing.TB) {
	t.Helper()
	f.Set(t)
	waitFor(t, "all workers serve", func() bool {
		ws := f.tok.Workers()
		for _, w := range ws {
			if w.InFlight > 0 || w.Ending {
				return false
			}
		}
		return len(ws) == f.c.Workers
	})
	waitFor(t, "each has signed", func() bool {
		var wg sync.WaitGroup
		for range 8 * f.c.Workers {
			wg.Go(func() {
				if err := f.sign(t, faultDeadline); err != nil {
					t.Errorf("while nothing fails: %v", err)
				}
			})
		}
		wg.Wait()
		for _, w := range f.tok.Workers() {
			if w.Answered == 0 {
				return false
			}
		}
		return true
	})
}

// faultDeadline is what a caller gives a request.
const faultDeadline = 5 * time.Second

// sign signs something new and verifies it.
func (f *faultToken) sign(t testing.TB, within time.Duration) error {
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	d := sha256.Sum256([]byte(rand.Text()))
	sig, err := f.tok.Sign(ctx, "", 1, faultKey, d[:], crypto.SHA256)
	if err != nil {
		return err
	}
	return verifyRaw(f.pub, d[:], sig)
}

// verifyRaw verifies r||s.
func verifyRaw(pub crypto.PublicKey, digest, sig []byte) error {
	k, ok := pub.(*ecdsa.PublicKey)
	if !ok || len(sig) != 64 || !ecdsa.Verify(k, digest, new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
		return fmt.Errorf("WRONG: a signature of %d bytes does not verify", len(sig))
	}
	return nil
}

// kill sends a signal to one of the workers, and returns when it is a worker no more,
// unless the signal is one that stops it.
func (f *faultToken) kill(t testing.TB, i int, sig syscall.Signal) {
	t.Helper()
	pid := f.tok.Workers()[i].PID
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
	if sig != syscall.SIGSTOP {
		waitFor(t, "it is gone", func() bool { return syscall.Kill(pid, 0) != nil })
	}
}

// faultGateway is a gateway whose token is behind the module that fails as it is told.
type faultGateway struct {
	*gateway
	*faultp11.Module
	client *client.Client
	pub    crypto.PublicKey
}

// newFaultGateway serves one with a P-256 key "rel". token is added to the token's part of
// the configuration, more to its end.
func newFaultGateway(t testing.TB, token string, more ...string) *faultGateway {
	t.Helper()
	f := &faultGateway{gateway: initGateway(t, shortDir(t)+"/gw"), Module: faultp11.New(t, softhsmModule(t))}
	edit(t, f.dir, "module: "+softhsmModule(t), "module: "+faulty)
	env := ""
	for k, v := range maps.All(f.Env) {
		env += fmt.Sprintf("    %s: %s\n", k, v)
	}
	edit(t, f.dir, "  environment:\n", token+"  environment:\n"+env)
	conf := f.dir + "/signwardend.yaml"
	writeFile(t, conf, string(readFile(t, conf))+strings.Join(more, ""))
	f.serve(t)
	f.must(t, "signwarden", "key", "create", "rel", "--algorithm", "p256")
	f.client = f.gateway.client(t, "admin")
	k, err := f.client.Key(t.Context(), "rel")
	if err != nil {
		t.Fatal(err)
	}
	f.pub = k.PublicKey
	return f
}

// sign signs something new through the stream of the client, and verifies it.
func (f *faultGateway) sign(t testing.TB, within time.Duration) error {
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	d := sha256.Sum256([]byte(rand.Text()))
	sig, err := f.client.Sign(ctx, client.Request{Key: "rel", Digest: d[:], Hash: crypto.SHA256, Format: "openpgp"})
	if err != nil {
		return err
	}
	return verifyAny(f.pub, d[:], sig.Bytes)
}

// verifyAny verifies an ECDSA signature in either of its forms.
func verifyAny(pub crypto.PublicKey, digest, sig []byte) error {
	var rs struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(sig, &rs); err == nil && len(rest) == 0 {
		sig = append(rs.R.FillBytes(make([]byte, 32)), rs.S.FillBytes(make([]byte, 32))...)
	}
	return verifyRaw(pub, digest, sig)
}

// recorded counts, in the audit log, the records of signatures that were released by
// request, and those of requests that failed by their outcome and detail.
func (f *faultGateway) recorded(t testing.TB) (signed map[string]int, failed map[string]int) {
	t.Helper()
	signed, failed = map[string]int{}, map[string]int{}
	for from := int64(0); ; {
		first, entries, err := f.client.AuditEntries(t.Context(), from, 1000)
		if err != nil || first != from {
			t.Fatalf("rows from %d, want %d: %v", first, from, err)
		}
		for _, b := range entries {
			var e map[string]string
			if err := json.Unmarshal(b, &e); err != nil {
				t.Fatal(err)
			}
			switch {
			case e["action"] != "sign":
			case e["outcome"] == "signed":
				signed[e["request"]]++
			default:
				failed[e["outcome"]+": "+e["reason"]+e["detail"]]++
			}
		}
		if len(entries) == 0 {
			return signed, failed
		}
		from += int64(len(entries))
	}
}
