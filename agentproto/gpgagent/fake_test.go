package gpgagent_test

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
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"sync"
	"testing"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/assuan"
	"github.com/signwarden/signwarden/agentproto/gpgagent"
	"github.com/signwarden/signwarden/gateway/sigerr"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// signCall is a Sign that reached the keys.
type signCall struct {
	Key    string
	Hash   crypto.Hash
	Digest []byte
	Note   string
}

// softKeys is a Keys of Go private keys that records what it is asked.
type softKeys struct {
	signers map[string]crypto.Signer

	mu     sync.Mutex
	calls  []signCall
	list   error                           // the answer of PublicKeys, if set
	sign   func(ctx context.Context) error // called in Sign first, if set
	mangle func([]byte) []byte             // what the token makes of a signature, if set
}

func (k *softKeys) PublicKeys(context.Context) (map[string]crypto.PublicKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	pubs := make(map[string]crypto.PublicKey)
	for name, s := range k.signers {
		pubs[name] = s.Public()
	}
	return pubs, k.list
}

func (k *softKeys) Sign(ctx context.Context, key string, hash crypto.Hash, digest []byte, note string) ([]byte, error) {
	k.mu.Lock()
	k.calls = append(k.calls, signCall{key, hash, bytes.Clone(digest), note})
	before, mangle := k.sign, k.mangle
	k.mu.Unlock()
	if before != nil {
		err := before(ctx)
		if err != nil {
			return nil, err
		}
	}
	sig, err := softSign(k.signers[key], hash, digest)
	if err == nil && mangle != nil {
		sig = mangle(sig)
	}
	return sig, err
}

func (k *softKeys) setSign(f func(ctx context.Context) error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sign = f
}

// takeCalls returns the calls since the last time.
func (k *softKeys) takeCalls() []signCall {
	k.mu.Lock()
	defer k.mu.Unlock()
	calls := k.calls
	k.calls = nil
	return calls
}

func softSign(s crypto.Signer, hash crypto.Hash, digest []byte) ([]byte, error) {
	switch k := s.(type) {
	case *rsa.PrivateKey:
		return rsa.SignPKCS1v15(nil, k, hash, digest)
	case ed25519.PrivateKey:
		return ed25519.Sign(k, digest), nil
	case *ecdsa.PrivateKey:
		der, err := ecdsa.SignASN1(rand.Reader, k, digest)
		if err != nil {
			return nil, err
		}
		var v struct{ R, S *big.Int }
		_, err = asn1.Unmarshal(der, &v)
		if err != nil {
			return nil, err
		}
		w := (k.Curve.Params().BitSize + 7) / 8
		return append(v.R.FillBytes(make([]byte, w)), v.S.FillBytes(make([]byte, w))...), nil
	}
	return nil, fmt.Errorf("%w: no signer", sigerr.NotFound)
}

// newSigners makes a key of each kind that gpg knows.
var newSigners = sync.OnceValue(func() map[string]crypto.Signer {
	must := func(s crypto.Signer, err error) crypto.Signer {
		if err != nil {
			panic(err)
		}
		return s
	}
	_, ed, err := ed25519.GenerateKey(nil)
	return map[string]crypto.Signer{
		"rsa":  must(rsa.GenerateKey(rand.Reader, 2048)),
		"p256": must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)),
		"p384": must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)),
		"p521": must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)),
		"ed":   must(ed, err),
	}
})

func gripOf(t *testing.T, pub crypto.PublicKey) string {
	t.Helper()
	g, err := gpgagent.Keygrip(pub)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%X", g)
}

// testLogger writes to the test's log.
func testLogger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// connect serves cfg on one end of a pipe until the test ends, and greets on the other.
func connect(t *testing.T, cfg gpgagent.Config) *assuan.Client {
	t.Helper()
	srv, err := gpgagent.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { srv.ServeConn(t.Context(), far, agentproto.Peer{UID: 7, GID: 7}) })
	t.Cleanup(func() { near.Close(); wg.Wait() })
	c, err := assuan.NewClient(near)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// keysFor makes a Config.Keys that gives everyone k.
func keysFor(k gpgagent.Keys) func(agentproto.Peer) (gpgagent.Keys, error) {
	return func(agentproto.Peer) (gpgagent.Keys, error) { return k, nil }
}
