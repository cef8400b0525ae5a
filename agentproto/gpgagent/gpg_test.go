package gpgagent_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	pgpecdsa "github.com/ProtonMail/go-crypto/openpgp/ecdsa"
	"github.com/ProtonMail/go-crypto/openpgp/eddsa"
	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/gpgagent"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// pgpKey is an OpenPGP key whose secret part only this process has.
type pgpKey struct {
	entity *openpgp.Entity
	signer crypto.Signer
}

// newPGPKeys makes one key of each kind, created in the past, since gpg distrusts keys from the future.
var newPGPKeys = sync.OnceValues(func() (map[string]pgpKey, error) {
	kinds := map[string]packet.Config{
		"rsa":  {Algorithm: packet.PubKeyAlgoRSA, RSABits: 2048},
		"p256": {Algorithm: packet.PubKeyAlgoECDSA, Curve: packet.CurveNistP256},
		"p384": {Algorithm: packet.PubKeyAlgoECDSA, Curve: packet.CurveNistP384},
		"ed":   {Algorithm: packet.PubKeyAlgoEdDSA, Curve: packet.Curve25519},
	}
	created := time.Now().Add(-48 * time.Hour)
	keys := make(map[string]pgpKey)
	for name, cfg := range kinds {
		cfg.Time = func() time.Time { return created }
		cfg.DefaultHash = crypto.SHA512
		e, err := openpgp.NewEntity(name, "", name+"@example.org", &cfg)
		if err != nil {
			return nil, err
		}
		e.Subkeys = nil
		s, err := signerOf(e.PrivateKey)
		if err != nil {
			return nil, err
		}
		keys[name] = pgpKey{e, s}
	}
	return keys, nil
})

func signerOf(pk *packet.PrivateKey) (crypto.Signer, error) {
	switch k := pk.PrivateKey.(type) {
	case *rsa.PrivateKey:
		return k, nil
	case *eddsa.PrivateKey:
		return ed25519.NewKeyFromSeed(k.MarshalByteSecret()), nil
	case *pgpecdsa.PrivateKey:
		curve, d := elliptic.P256(), k.MarshalIntegerSecret()
		if k.D.BitLen() > 256 {
			curve = elliptic.P384()
		}
		return ecdsa.ParseRawPrivateKey(curve, d)
	}
	return nil, fmt.Errorf("no signer in a %T", pk.PrivateKey)
}

// gpgHome is a GNUPGHOME with public keys, whose agent is ours.
type gpgHome struct {
	dir  string
	keys *softKeys
	pgp  map[string]pgpKey
}

// newGPGHome starts an agent where gpg looks for one. The secret keys are in this process only.
func newGPGHome(t *testing.T, change func(*gpgagent.Config)) *gpgHome {
	t.Helper()
	for _, tool := range []string{"gpg", "gpgconf", "git"} {
		_, err := exec.LookPath(tool)
		if err != nil {
			t.Fatalf("this test needs the real peer: %v", err)
		}
	}
	pgp, err := newPGPKeys()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "sw") // short, as a socket's path must be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &gpgHome{dir: dir, keys: &softKeys{signers: make(map[string]crypto.Signer)}, pgp: pgp}
	var ring bytes.Buffer
	for name, k := range pgp {
		h.keys.signers[name] = k.signer
		err = k.entity.Serialize(&ring)
		if err != nil {
			t.Fatal(err)
		}
	}
	h.write(t, "gpg.conf", "no-autostart\ntrust-model always\nquiet\n")
	h.write(t, "keys.pgp", ring.String())

	sock := strings.TrimSpace(h.must(t, "gpgconf", "--list-dirs", "agent-socket"))
	cfg := gpgagent.Config{Keys: keysFor(h.keys), Logger: testLogger(t)}
	if change != nil {
		change(&cfg)
	}
	serveAt(t, sock, cfg)
	h.must(t, "gpg", "--batch", "--import", h.path("keys.pgp"))
	return h
}

// serveAt listens at path until the test ends.
func serveAt(t *testing.T, path string, cfg gpgagent.Config) {
	t.Helper()
	srv, err := gpgagent.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := agentproto.Listen(agentproto.Config{Path: path, Logger: cfg.Logger})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		err := l.Serve(ctx, srv.ServeConn)
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

func (h *gpgHome) path(name string) string { return filepath.Join(h.dir, name) }

func (h *gpgHome) write(t *testing.T, name, content string) string {
	t.Helper()
	err := os.WriteFile(h.path(name), []byte(content), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return h.path(name)
}

func (h *gpgHome) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = h.dir
	cmd.Env = append(os.Environ(), "GNUPGHOME="+h.dir, "HOME="+h.dir, "LC_ALL=C", "GIT_CONFIG_NOSYSTEM=1")
	return cmd
}

// run returns the exit code and all output.
func (h *gpgHome) run(t *testing.T, name string, args ...string) (int, string) {
	t.Helper()
	out, err := h.command(t.Context(), name, args...).CombinedOutput()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if err != nil && !ok {
		t.Fatalf("%s %q: %v", name, args, err)
	}
	if ok {
		return exit.ExitCode(), string(out)
	}
	return 0, string(out)
}

func (h *gpgHome) must(t *testing.T, name string, args ...string) string {
	t.Helper()
	code, out := h.run(t, name, args...)
	if code != 0 {
		t.Fatalf("%s %q: exit status %d\n%s", name, args, code, out)
	}
	return out
}

var keyNames = []string{"rsa", "p256", "p384", "ed"}

func TestGPGSigns(t *testing.T) {
	h := newGPGHome(t, nil)
	msg := h.write(t, "msg", "to be signed\n")
	for _, key := range keyNames {
		for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
			if key == "p384" && hash == crypto.SHA256 {
				continue // shorter than the curve: see TestGPGRefusals
			}
			t.Run(key+"/"+hash.String(), func(t *testing.T) {
				h.keys.takeCalls()
				sig := h.path(key + hash.String() + ".sig")
				out := h.must(t, "gpg", "--batch", "-u", key+"@example.org", "--digest-algo", strings.ReplaceAll(hash.String(), "-", ""),
					"-o", sig, "--detach-sign", msg)
				if out != "" {
					t.Errorf("gpg is not silent: %q", out)
				}
				out = h.must(t, "gpg", "--batch", "--status-fd", "1", "--verify", sig, msg)
				if !strings.Contains(out, "[GNUPG:] VALIDSIG") {
					t.Errorf("no valid signature: %s", out)
				}
				calls := h.keys.takeCalls()
				if len(calls) != 1 || calls[0].Key != key || calls[0].Hash != hash {
					t.Errorf("calls are %+v", calls)
				}
				if len(calls) == 1 && !strings.Contains(calls[0].Note, `"`+key+" <"+key+`@example.org>"`) {
					t.Errorf("note is %q", calls[0].Note)
				}
			})
		}
	}
}

func TestGPGOtherForms(t *testing.T) {
	h := newGPGHome(t, nil)
	msg := h.write(t, "msg", "to be signed\n")
	tests := []struct {
		name string
		args []string
		want int // signatures
	}{
		{"clearsign", []string{"-u", "rsa", "--clearsign"}, 1},
		{"sign", []string{"-u", "p256", "--sign"}, 1},
		{"two keys", []string{"-u", "ed", "-u", "rsa", "--sign"}, 2},
		{"default key", []string{"--sign"}, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h.keys.takeCalls()
			out := h.path("out")
			args := append([]string{"--batch", "--yes", "-o", out}, tt.args...)
			h.must(t, "gpg", append(args, msg)...)
			status := h.must(t, "gpg", "--batch", "--yes", "--status-fd", "1", "-o", h.path("plain"), "--decrypt", out)
			got := strings.Count(status, "[GNUPG:] VALIDSIG")
			if got != tt.want {
				t.Errorf("%d valid signatures, want %d: %s", got, tt.want, status)
			}
			if calls := h.keys.takeCalls(); len(calls) != tt.want {
				t.Errorf("%d calls, want %d", len(calls), tt.want)
			}
		})
	}
}

func TestGPGListsSecretKeys(t *testing.T) {
	h := newGPGHome(t, nil)
	out := h.must(t, "gpg", "--batch", "-K", "--with-keygrip")
	for _, name := range keyNames {
		grip := gripOf(t, h.pgp[name].signer.Public())
		if !strings.Contains(out, "Keygrip = "+grip) {
			t.Errorf("%s: keygrip %s is not in:\n%s", name, grip, out)
		}
	}
	if got := strings.Count(out, "sec  "); got != len(keyNames) {
		t.Errorf("%d secret keys, want %d:\n%s", got, len(keyNames), out)
	}
	h.keys.mu.Lock()
	delete(h.keys.signers, "p384")
	h.keys.mu.Unlock()
	out = h.must(t, "gpg", "--batch", "-K")
	if strings.Contains(out, "p384") {
		t.Errorf("a key that is no longer shown is listed:\n%s", out)
	}
}

// TestGPGRefusals asserts the numbers that users' scripts see, and that nothing reached a key.
func TestGPGRefusals(t *testing.T) {
	h := newGPGHome(t, func(c *gpgagent.Config) { c.SignTimeout = 50 * time.Millisecond })
	msg := h.write(t, "msg", "to be signed\n")
	await := func(ctx context.Context) error { <-ctx.Done(); return errors.New("call was broken off") }
	fail := func(err error) func(context.Context) error {
		return func(context.Context) error { return fmt.Errorf("slot 3, rule 7: %w", err) }
	}
	tests := []struct {
		name   string
		key    string
		digest string
		sign   func(context.Context) error
		want   string
		calls  int
	}{
		{"sha1", "rsa", "SHA1", nil, "67108948", 0},
		{"ripemd160", "rsa", "RIPEMD160", nil, "67108948", 0},
		{"sha224", "ed", "SHA224", nil, "67108948", 0},
		{"digest shorter than the curve", "p384", "SHA256", nil, "67109003", 0},
		{"not found", "rsa", "SHA256", fail(sigerr.NotFound), "67108881", 1},
		{"denied", "rsa", "SHA256", fail(sigerr.Denied), "67109115", 1},
		{"disabled", "p256", "SHA256", fail(sigerr.Disabled), "67109116", 1},
		{"overloaded", "rsa", "SHA256", fail(sigerr.Overloaded), "67109047", 1},
		{"timeout", "rsa", "SHA256", fail(sigerr.Timeout), "67108926", 1},
		{"no answer", "rsa", "SHA256", await, "67108926", 1},
		{"canceled", "rsa", "SHA256", fail(sigerr.Canceled), "67108963", 1},
		{"token failed", "rsa", "SHA256", fail(sigerr.TokenFailed), "67108993", 1},
		{"unavailable", "ed", "SHA256", fail(sigerr.Unavailable), "67109040", 1},
		{"no kind", "rsa", "SHA256", fail(io.ErrNoProgress), "67108865", 1},
		{"panic", "rsa", "SHA256", func(context.Context) error { panic("at the worst time") }, "67108865", 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h.keys.takeCalls()
			h.keys.setSign(tt.sign)
			code, out := h.run(t, "gpg", "--batch", "--status-fd", "1", "--allow-weak-digest-algos", "-u", tt.key,
				"--digest-algo", tt.digest, "-o", h.path("sig"), "--detach-sign", msg)
			if code != 2 || !strings.Contains(out, "[GNUPG:] FAILURE sign "+tt.want+"\n") {
				t.Errorf("exit status %d, want FAILURE sign %s: %s", code, tt.want, out)
			}
			if strings.Contains(out, "rule 7") {
				t.Errorf("the reason reached the client: %s", out)
			}
			if calls := h.keys.takeCalls(); len(calls) != tt.calls {
				t.Errorf("%d calls, want %d", len(calls), tt.calls)
			}
			_, err := os.Stat(h.path("sig"))
			if err == nil {
				t.Error("a signature was written")
			}
		})
	}
}

func TestGPGManagementIsForbidden(t *testing.T) {
	h := newGPGHome(t, nil)
	fpr := fmt.Sprintf("%X", h.pgp["rsa"].entity.PrimaryKey.Fingerprint)
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"export", []string{"--export-secret-keys", fpr}, "error getting the KEK: Forbidden"},
		{"export subkeys", []string{"--export-secret-subkeys", fpr}, "error getting the KEK: Forbidden"},
		{"delete", []string{"--yes", "--delete-secret-keys", fpr}, "Forbidden"},
		{"generate", []string{"--passphrase", "", "--quick-generate-key", "new@example.org", "ed25519"}, "Forbidden"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			code, out := h.run(t, "gpg", append([]string{"--batch"}, tt.args...)...)
			if code == 0 || !strings.Contains(out, tt.want) {
				t.Errorf("exit status %d, want %q in: %s", code, tt.want, out)
			}
		})
	}
	h.must(t, "gpgconf", "--kill", "gpg-agent")
	h.must(t, "gpg", "--batch", "-u", fpr, "-o", h.path("sig"), "--detach-sign", h.write(t, "msg", "x"))
}
