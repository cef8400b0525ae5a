package sshagent_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/hex"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh/agent"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/sshagent"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// signCall is a SignMessage that reached the keys.
type signCall struct {
	Key, Format string
	Hash        crypto.Hash
	Message     []byte
	Note        string
}

// softKeys is a Keys of Go private keys that records what it is asked.
type softKeys struct {
	mu      sync.Mutex
	signers map[string]crypto.Signer
	public  map[string]crypto.PublicKey // besides those; signatures with them are zeros
	calls   []signCall
	list    error                           // the answer of PublicKeys, if set
	before  func(ctx context.Context) error // called in SignMessage first, if set
	mangle  func([]byte) []byte             // what the token makes of a signature, if set
}

func (k *softKeys) PublicKeys(context.Context) (map[string]crypto.PublicKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	pubs := make(map[string]crypto.PublicKey)
	for name, s := range k.signers {
		pubs[name] = s.Public()
	}
	for name, pub := range k.public {
		pubs[name] = pub
	}
	return pubs, k.list
}

func (k *softKeys) SignMessage(ctx context.Context, key, format string, hash crypto.Hash, message []byte, note string) ([]byte, error) {
	k.mu.Lock()
	k.calls = append(k.calls, signCall{key, format, hash, bytes.Clone(message), note})
	before, mangle, signer, pub := k.before, k.mangle, k.signers[key], k.public[key]
	k.mu.Unlock()
	if before != nil {
		if err := before(ctx); err != nil {
			return nil, err
		}
	}
	sig, err := make([]byte, size(pub)), error(nil)
	if signer != nil {
		sig, err = softSign(signer, hash, message)
	}
	if err == nil && mangle != nil {
		sig = mangle(sig)
	}
	return sig, err
}

// size is the length of a signature.
func size(pub crypto.PublicKey) int {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		return k.Size()
	case *ecdsa.PublicKey:
		return 2 * ((k.Curve.Params().N.BitLen() + 7) / 8)
	}
	return ed25519.SignatureSize
}

// softSign signs as a Keys is to.
func softSign(s crypto.Signer, hash crypto.Hash, message []byte) ([]byte, error) {
	if _, ok := s.(ed25519.PrivateKey); ok {
		return s.Sign(rand.Reader, message, crypto.Hash(0))
	}
	h := hash.New()
	h.Write(message)
	sig, err := s.Sign(rand.Reader, h.Sum(nil), hash)
	if _, ok := s.(*ecdsa.PrivateKey); !ok || err != nil {
		return sig, err
	}
	var v struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(sig, &v); err != nil {
		return nil, err
	}
	raw := make([]byte, size(s.Public()))
	v.R.FillBytes(raw[:len(raw)/2])
	v.S.FillBytes(raw[len(raw)/2:])
	return raw, nil
}

// takeCalls returns the calls since the last time.
func (k *softKeys) takeCalls() []signCall {
	k.mu.Lock()
	defer k.mu.Unlock()
	calls := k.calls
	k.calls = nil
	return calls
}

// set changes the keys while they are in use.
func (k *softKeys) set(change func(*softKeys)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change(k)
}

// newSigners makes a key of each kind, once.
var newSigners = sync.OnceValue(func() map[string]crypto.Signer {
	out := map[string]crypto.Signer{}
	add := func(name string, s crypto.Signer, err error) {
		if err != nil {
			panic(err)
		}
		out[name] = s
	}
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	add("rsa", r, err)
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	add("p256", p256, err)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	add("p384", p384, err)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	add("ed25519", ed, err)
	return out
})

// newKeys is a Keys with a key of each kind.
func newKeys() *softKeys { return &softKeys{signers: newSigners()} }

// logText is a log to look into.
type logText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logText) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// connect serves one connection, until the test ends.
func connect(t testing.TB, cfg sshagent.Config) (net.Conn, *logText) {
	t.Helper()
	log := &logText{}
	cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
	srv, err := sshagent.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { srv.ServeConn(context.Background(), far, agentproto.Peer{}) })
	t.Cleanup(func() { near.Close(); wg.Wait() })
	return near, log
}

// serve is connect for a client.
func serve(t testing.TB, cfg sshagent.Config) (agent.ExtendedAgent, *logText) {
	c, log := connect(t, cfg)
	return agent.NewClient(c), log
}

func keysOf(k sshagent.Keys) func(agentproto.Peer) (sshagent.Keys, error) {
	return func(agentproto.Peer) (sshagent.Keys, error) { return k, nil }
}

// exchange is a request and a reply of a capture.
type exchange struct{ request, reply []byte }

// captured reads the captures, by name.
func captured(t testing.TB) map[string][]exchange {
	t.Helper()
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) != 20 {
		t.Fatalf("%d captures, %v; want 20", len(files), err)
	}
	out := map[string][]exchange{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(filepath.Base(file), ".txt")
		var x exchange
		for line := range strings.Lines(string(text)) {
			kind, digits, _ := strings.Cut(strings.TrimSpace(line), " ")
			b, err := hex.DecodeString(digits)
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			if kind == "REQ" {
				x.request = b
				continue
			}
			x.reply = b
			out[name] = append(out[name], x)
		}
	}
	return out
}
