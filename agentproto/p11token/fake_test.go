package p11token_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/p11rpc"
	"github.com/signwarden/signwarden/agentproto/p11token"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// signCall is a SignWith that reached the keys.
type signCall struct {
	Key    string
	Hash   crypto.Hash
	Salt   int // of PSS; -1: another scheme
	Digest []byte
	Note   string
}

// softKeys is a Keys of Go private keys that records what it is asked.
type softKeys struct {
	mu      sync.Mutex
	signers map[string]crypto.Signer
	chains  map[string][][]byte
	calls   []signCall
	lists   int                             // calls of PublicKeys
	list    error                           // the answer of PublicKeys, if set
	before  func(ctx context.Context) error // called in SignWith first, if set
	mangle  func([]byte) []byte             // what the token makes of a signature, if set
}

func newSoftKeys(names ...string) *softKeys {
	k := &softKeys{signers: map[string]crypto.Signer{}, chains: map[string][][]byte{}}
	for _, name := range names {
		k.signers[name] = newSigners()[name]
		k.chains[name] = newChains()[name]
	}
	return k
}

func (k *softKeys) PublicKeys(context.Context) (map[string]crypto.PublicKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.lists++
	pubs := make(map[string]crypto.PublicKey)
	for name, s := range k.signers {
		pubs[name] = s.Public()
	}
	return pubs, k.list
}

func (k *softKeys) Chains(context.Context) (map[string][][]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return maps.Clone(k.chains), nil
}

func (k *softKeys) SignWith(ctx context.Context, key string, opts crypto.SignerOpts, digest []byte, note string) ([]byte, error) {
	call := signCall{key, opts.HashFunc(), -1, bytes.Clone(digest), note}
	pss, ok := opts.(*rsa.PSSOptions)
	if ok {
		call.Salt = pss.SaltLength
	}
	k.mu.Lock()
	k.calls = append(k.calls, call)
	before, mangle, signer := k.before, k.mangle, k.signers[key]
	k.mu.Unlock()
	if before != nil {
		err := before(ctx)
		if err != nil {
			return nil, err
		}
	}
	sig, err := softSign(signer, opts, digest)
	if err == nil && mangle != nil {
		sig = mangle(sig)
	}
	return sig, err
}

// set changes the keys while they are in use.
func (k *softKeys) set(change func(*softKeys)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change(k)
}

// takeCalls returns the calls since the last time.
func (k *softKeys) takeCalls() []signCall {
	k.mu.Lock()
	defer k.mu.Unlock()
	calls := k.calls
	k.calls = nil
	return calls
}

func softSign(s crypto.Signer, opts crypto.SignerOpts, digest []byte) ([]byte, error) {
	switch k := s.(type) {
	case *rsa.PrivateKey:
		return k.Sign(rand.Reader, digest, opts)
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

// ecdsaDER makes of r||s what the standard library verifies.
func ecdsaDER(t testing.TB, raw []byte) []byte {
	t.Helper()
	n := len(raw) / 2
	der, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:n]), new(big.Int).SetBytes(raw[n:])})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// newSigners makes a key of each kind, and ca, which issues certificates.
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
		"rsa3": must(rsa.GenerateKey(rand.Reader, 3072)),
		"p256": must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)),
		"p384": must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)),
		"p521": must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)),
		"ed":   must(ed, err),
		"ca":   must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)),
	}
})

// newChains has for rsa, rsa3, p256 and ed a certificate of their own and an issuer's, the same in
// all; for p384 a self-signed one; and for the others none.
var newChains = sync.OnceValue(func() map[string][][]byte {
	caDER, ca := issue("Test CA", true, newSigners()["ca"].Public(), nil)
	chains := map[string][][]byte{}
	for _, name := range []string{"rsa", "rsa3", "p256", "ed"} {
		der, _ := issue(name, false, newSigners()[name].Public(), ca)
		chains[name] = [][]byte{der, caDER}
	}
	self := newSigners()["p384"]
	der, err := x509.CreateCertificate(rand.Reader, template("p384", false), template("p384", false), self.Public(), self)
	if err != nil {
		panic(err)
	}
	chains["p384"] = [][]byte{der}
	return chains
})

func template(cn string, isCA bool) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err)
	}
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: cn},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning, x509.ExtKeyUsageEmailProtection},
		BasicConstraintsValid: true, IsCA: isCA,
	}
	if isCA {
		c.KeyUsage, c.ExtKeyUsage = x509.KeyUsageCertSign, nil
	}
	return c
}

// issue makes a certificate signed by the key ca. parent nil: self-signed.
func issue(cn string, isCA bool, pub crypto.PublicKey, parent *x509.Certificate) ([]byte, *x509.Certificate) {
	t := template(cn, isCA)
	if parent == nil {
		parent = t
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, newSigners()["ca"])
	if err != nil {
		panic(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return der, c
}

// keysFor makes a Config.Keys that gives everyone k.
func keysFor(k p11token.Keys) func(agentproto.Peer) (p11token.Keys, error) {
	return func(agentproto.Peer) (p11token.Keys, error) { return k, nil }
}

// testLogger writes to the test's log.
func testLogger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// client is a PKCS#11 application at the other end of the wire.
type client struct {
	*p11rpc.Client
	nc net.Conn
}

// connect serves cfg on one end of a pipe until the test ends. The client is not initialized.
func connect(t testing.TB, cfg p11token.Config) *client {
	t.Helper()
	srv, err := p11token.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { srv.ServeConn(t.Context(), far, agentproto.Peer{UID: 7, GID: 7}) })
	t.Cleanup(func() { near.Close(); wg.Wait() })
	c, err := p11rpc.NewClient(near, 2)
	if err != nil {
		t.Fatal(err)
	}
	return &client{c, near}
}

var (
	initArgs = []p11rpc.Value{
		p11rpc.B([]byte("PRIVATE-GNOME-KEYRING-PKCS11-PROTOCOL-V-1")), {Kind: p11rpc.Byte}, p11rpc.B([]byte{0}),
	}
	u = p11rpc.U
)

func room(n uint64) p11rpc.Value { return p11rpc.Value{Kind: p11rpc.ByteRoom, Num: n} }

func ulongs(n uint64) p11rpc.Value { return p11rpc.Value{Kind: p11rpc.UlongRoom, Num: n} }

func mech(ckm uint64, param ...byte) p11rpc.Value {
	return p11rpc.Value{Kind: p11rpc.Mech, Mechanism: p11rpc.Mechanism{Type: ckm, Param: param}}
}

// open connects, initializes and opens session 1 on slot 1.
func open(t testing.TB, keys p11token.Keys) *client {
	t.Helper()
	c := connect(t, p11token.Config{Keys: keysFor(keys), Logger: testLogger(t)})
	c.must(t, p11rpc.Initialize, initArgs...)
	c.session(t, 1)
	return c
}

// session opens one and returns its number.
func (c *client) session(t testing.TB, slot uint64) uint64 {
	t.Helper()
	return c.must(t, p11rpc.OpenSession, u(slot), u(4))[0].Num
}

// must calls what must succeed.
func (c *client) must(t testing.TB, id p11rpc.CallID, args ...p11rpc.Value) []p11rpc.Value {
	t.Helper()
	got, err := c.Call(id, args...)
	if err != nil {
		t.Fatalf("%v: %v", id, err)
	}
	return got
}

// refused calls what must be answered with a CK_RV.
func (c *client) refused(t testing.TB, want p11rpc.RV, id p11rpc.CallID, args ...p11rpc.Value) {
	t.Helper()
	_, err := c.Call(id, args...)
	rv, ok := errors.AsType[p11rpc.RV](err)
	if !ok || rv != want {
		t.Errorf("%v: %v, want 0x%x", id, err, uint64(want))
	}
}

// find searches for the objects of a template in a session.
func (c *client) find(t testing.TB, session uint64, template ...p11rpc.Attribute) []uint64 {
	t.Helper()
	c.must(t, p11rpc.FindObjectsInit, u(session), p11rpc.Value{Kind: p11rpc.Attributes, Attributes: template})
	var all []uint64
	for {
		got := c.must(t, p11rpc.FindObjects, u(session), ulongs(3))[0].List
		if len(got) == 0 {
			c.must(t, p11rpc.FindObjectsFinal, u(session))
			return all
		}
		all = append(all, got...)
	}
}

func class(n uint64) p11rpc.Attribute { return p11rpc.Attribute{Len: 8, Num: n} }

func label(name string) p11rpc.Attribute {
	return p11rpc.Attribute{Type: 3, Len: uint32(len(name)), Bytes: []byte(name)}
}

const (
	private     = 3
	public      = 2
	certificate = 1
)

// handle is the one object of a class and label.
func (c *client) handle(t testing.TB, session, of uint64, name string) uint64 {
	t.Helper()
	got := c.find(t, session, class(of), label(name))
	if len(got) != 1 {
		t.Fatalf("%d objects of class %d are called %q", len(got), of, name)
	}
	return got[0]
}

// attribute reads one attribute with room to spare.
func (c *client) attribute(t testing.TB, session, handle, typ uint64) (p11rpc.Attribute, p11rpc.RV) {
	t.Helper()
	got := c.must(t, p11rpc.GetAttributeValue, u(session), u(handle),
		p11rpc.Value{Kind: p11rpc.Wanted, Wanted: []p11rpc.WantedAttribute{{Type: typ, Room: 1 << 16}}})
	return got[0].Attributes[0], p11rpc.RV(got[1].Num)
}
