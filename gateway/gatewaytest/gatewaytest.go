// Package gatewaytest makes a gateway for tests: keys in memory, a store in
// memory, both with faults to order, and a superuser.
package gatewaytest

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

// Policy is what New applies: root may do everything.
const Policy = `
rules:
  - {name: root, principals: [root], keys: ["*"], may: [sign, read, admin], formats: ["*"], blind: true}
`

// Fixture is a gateway and its parts.
type Fixture struct {
	*gateway.Gateway
	Token *Token
	Store *Store
	Root  ident.Principal // may do everything, under Policy
}

// New makes a gateway under policy (empty: Policy). It is closed with the test.
func New(t testing.TB, policy string, change ...func(*gateway.Config)) *Fixture {
	t.Helper()
	if policy == "" {
		policy = Policy
	}
	f := &Fixture{Token: NewToken(), Store: &Store{State: store.State{Policy: []byte(policy)}}, Root: Principal(t, "root")}
	c := gateway.Config{
		Store: f.Store, Token: f.Token, TokenLabel: "memory", Certify: Certify, Amend: Amend, Inspect: Inspect, Read: Read,
		Logger: slog.New(slog.DiscardHandler),
	}
	for _, ch := range change {
		ch(&c)
	}
	g, err := gateway.New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	f.Gateway = g
	return f
}

// Principal is a caller of that name.
func Principal(t testing.TB, name string) ident.Principal {
	t.Helper()
	p, err := ident.FromPeer(0, name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Key creates a key as root.
func (f *Fixture) Key(t testing.TB, name string, a keys.Algorithm) keys.Key {
	t.Helper()
	k, err := f.CreateKey(t.Context(), f.Root, "test", gateway.KeySpec{Name: name, Algorithm: a})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Put brings a new Ed25519 key into the token, as somebody else would, and returns its
// public half.
func (f *Fixture) Put(t testing.TB, id string) crypto.PublicKey {
	t.Helper()
	pub, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	f.Token.Put([]byte(id), k)
	return pub
}

// Request is a well-formed request for a SHA-256 digest of text.
func Request(key, text string) gateway.Request {
	sum := sha256.Sum256([]byte(text))
	return gateway.Request{Key: key, Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp", FrontEnd: "test"}
}

// Certify stands for a maker of OpenPGP certificates: it has the primary key
// certify the user id and the subkey, in a form of its own.
func Certify(userID string, _, _ time.Time, primary, subkey crypto.Signer) ([]byte, error) {
	sum := sha256.Sum256([]byte(userID))
	out := []byte("certificate of " + userID)
	for _, s := range []crypto.Signer{primary, subkey} {
		if s == nil {
			continue
		}
		sig, err := s.Sign(rand.Reader, sum[:], crypto.SHA256)
		if err != nil {
			return nil, err
		}
		out = append(out, sig...)
	}
	return out, nil
}

// Amend stands for a maker of amended certificates: what it is asked is written
// behind the certificate, and signed by all signers that it gets.
func Amend(m gateway.Amendment) ([]byte, error) {
	sum := sha256.Sum256(m.Certificate)
	out := fmt.Appendf(bytes.Clone(m.Certificate), "; renew %v, user id %q, revoke %v, expires %v", m.Renew, m.UserID, m.Revoke, m.Expires)
	for _, s := range append([]crypto.Signer{m.Primary, m.NewSubkey, m.Retire}, m.Subkeys...) {
		if s == nil {
			continue
		}
		sig, err := s.Sign(rand.Reader, sum[:], crypto.SHA256)
		if err != nil {
			return nil, err
		}
		out = append(out, sig...)
	}
	return out, nil
}

// Certificate is one that Inspect reads: of these keys, the second nil where the first
// is the primary key itself.
func Certificate(t testing.TB, userID string, signing, primary crypto.PublicKey) []byte {
	t.Helper()
	out := "certificate of " + userID
	for _, k := range []crypto.PublicKey{signing, primary} {
		der, err := x509.MarshalPKIXPublicKey(k)
		if k != nil && err != nil {
			t.Fatal(err)
		}
		out += fmt.Sprintf("\n%x", der)
	}
	return []byte(out)
}

// Created is when the keys of every Certificate were.
var Created = time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC)

// Inspect stands for a reader of certificates.
func Inspect(cert []byte, signing crypto.PublicKey, _ time.Time) (gateway.Inspected, error) {
	lines := strings.Split(strings.TrimPrefix(string(cert), "certificate of "), "\n")
	der, err := x509.MarshalPKIXPublicKey(signing)
	if err != nil || len(lines) != 3 || lines[1] != hex.EncodeToString(der) {
		return gateway.Inspected{}, fmt.Errorf("%w: no certificate of this key", sigerr.Invalid)
	}
	in := gateway.Inspected{Certificate: cert, UserID: lines[0], Created: Created}
	if lines[2] != "" {
		if der, err = hex.DecodeString(lines[2]); err == nil {
			in.Primary, err = x509.ParsePKIXPublicKey(der)
		}
	}
	return in, err
}

// Read stands for a reader of messages. Those of rpm are the parts of a package's
// name, each on a line, in the order of policy.Package; those of ssh-sig "SSHSIG " and a
// namespace; and those of ssh-auth "login " and a user.
func Read(format string, _ crypto.Hash, message []byte) (*policy.Content, error) {
	name, isSig := strings.CutPrefix(string(message), "SSHSIG ")
	user, isLogin := strings.CutPrefix(string(message), "login ")
	parts := strings.Split(string(message), "\n")
	switch {
	case format == policy.SSHSig && isSig:
		return &policy.Content{Namespace: name}, nil
	case format == policy.SSHAuth && isLogin:
		return &policy.Content{User: user}, nil
	case format != "rpm" || len(parts) != 6:
		return nil, fmt.Errorf("%d lines, not 6, of %s", len(parts), format)
	}
	return &policy.Content{Package: &policy.Package{
		Name: parts[0], Epoch: parts[1], Version: parts[2], Release: parts[3], Arch: parts[4], Vendor: parts[5],
	}}, nil
}

// Token keeps keys in memory. It is safe for concurrent use.
type Token struct {
	mu    sync.Mutex
	pairs map[string]crypto.Signer
	signs int
	doubt []string
	last  struct {
		by     string
		weight int
	}

	// Before, where set, runs before each signature; an error is returned
	// instead of one. After may change what is returned.
	Before func(ctx context.Context, id []byte) error
	After  func(sig []byte) []byte
	// OnGenerate, where set, runs before a pair is made; it may name another
	// algorithm to use instead.
	OnGenerate func(algorithm string) string
	// DeleteError is returned by Delete where set.
	DeleteError error
}

// NewToken makes an empty token.
func NewToken() *Token { return &Token{pairs: map[string]crypto.Signer{}} }

// Doubt notes the id.
func (k *Token) Doubt(id []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.doubt = append(k.doubt, string(id))
}

// Doubted are the ids that Doubt was called with, in order.
func (k *Token) Doubted() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.doubt)
}

// Signs is how often Sign was called.
func (k *Token) Signs() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.signs
}

// Last is for whom Sign was last called, and with which weight.
func (k *Token) Last() (by string, weight int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.last.by, k.last.weight
}

// Pairs is how many pairs it holds.
func (k *Token) Pairs() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.pairs)
}

// Generate implements gateway.Token.
func (k *Token) Generate(_ context.Context, _ string, id []byte, algorithm string) (crypto.PublicKey, error) {
	if k.OnGenerate != nil {
		algorithm = cmp.Or(k.OnGenerate(algorithm), algorithm)
	}
	var s crypto.Signer
	var err error
	switch keys.Algorithm(algorithm) {
	case keys.RSA2048:
		s, err = rsa.GenerateKey(rand.Reader, 2048)
	case keys.RSA3072:
		s, err = rsa.GenerateKey(rand.Reader, 3072)
	case keys.RSA4096:
		s, err = rsa.GenerateKey(rand.Reader, 4096)
	case keys.P256:
		s, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case keys.P384:
		s, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case keys.Ed25519:
		_, s, err = ed25519.GenerateKey(rand.Reader)
	default:
		err = fmt.Errorf("algorithm %q", algorithm)
	}
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pairs[string(id)] = s
	return s.Public(), nil
}

// Signer is a pair itself, for what a test signs beside the gateway.
func (k *Token) Signer(id []byte) crypto.Signer {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.pairs[string(id)]
}

// Put brings a pair in, as somebody else would.
func (k *Token) Put(id []byte, s crypto.Signer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pairs[string(id)] = s
}

type noPair struct{}

func (noPair) Error() string  { return "no such pair" }
func (noPair) NotFound() bool { return true }

// PublicKey implements gateway.Token.
func (k *Token) PublicKey(_ context.Context, id []byte) (crypto.PublicKey, error) {
	if s := k.Signer(id); s != nil {
		return s.Public(), nil
	}
	return nil, noPair{}
}

// Delete implements gateway.Token.
func (k *Token) Delete(_ context.Context, id []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.DeleteError != nil {
		return k.DeleteError
	}
	delete(k.pairs, string(id))
	return nil
}

// Sign implements gateway.Token.
func (k *Token) Sign(ctx context.Context, by string, weight int, id, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	k.mu.Lock()
	k.signs++
	k.last.by, k.last.weight = by, weight
	pair, before, after := k.pairs[string(id)], k.Before, k.After
	k.mu.Unlock()
	if pair == nil {
		return nil, errors.New("no such pair")
	}
	if before != nil {
		if err := before(ctx, id); err != nil {
			return nil, err
		}
	}
	sig, err := pair.Sign(rand.Reader, digest, opts)
	if err != nil {
		return nil, err
	}
	if pub, ok := pair.Public().(*ecdsa.PublicKey); ok {
		if sig, err = raw(pub, sig); err != nil {
			return nil, err
		}
	}
	if after != nil {
		sig = after(sig)
	}
	return sig, nil
}

// raw is the inverse of keys.ECDSAToASN1: what a PKCS#11 token returns.
func raw(pub *ecdsa.PublicKey, der []byte) ([]byte, error) {
	var v struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &v); err != nil {
		return nil, err
	}
	n := (pub.Curve.Params().N.BitLen() + 7) / 8
	out := make([]byte, 2*n)
	v.R.FillBytes(out[:n])
	v.S.FillBytes(out[n:])
	return out, nil
}

// Store keeps state in memory. It is safe for concurrent use.
type Store struct {
	mu    sync.Mutex
	State store.State
	rows  [][]byte
	kept  []store.Answer

	// Fail, where set, is asked before each commit: before is returned without
	// storing anything, after is returned with everything stored.
	Fail func(c store.Change) (before, after error)
	// LoadError is returned by Load where set.
	LoadError error
}

var _ store.Store = (*Store)(nil)

// SetFail changes Fail while the store is in use.
func (s *Store) SetFail(f func(store.Change) (before, after error), load error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Fail, s.LoadError = f, load
}

// Load implements store.Store.
func (s *Store) Load(context.Context) (store.State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.State
	st.Keys = append([]keys.Key(nil), st.Keys...)
	return st, s.LoadError
}

// Commit implements store.Store.
func (s *Store) Commit(_ context.Context, c store.Change) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var after error
	if s.Fail != nil {
		var before error
		if before, after = s.Fail(c); before != nil {
			return 0, before
		}
	}
	if c.CreateKey != nil {
		for _, k := range s.State.Keys {
			if k.Name == c.CreateKey.Name {
				return 0, store.ErrExists
			}
		}
		s.State.Keys = append(s.State.Keys, *c.CreateKey)
	}
	if c.SetState != nil {
		for i := range s.State.Keys {
			if s.State.Keys[i].Name == c.SetState.Name {
				s.State.Keys[i].State = c.SetState.State
			}
		}
	}
	s.State.Pending = append(slices.DeleteFunc(slices.Clone(s.State.Pending), func(p store.Pending) bool {
		return slices.ContainsFunc(c.Forget, func(id []byte) bool { return bytes.Equal(id, p.ID) })
	}), c.Begin...)
	if c.SetX509 != nil {
		for i := range s.State.Keys {
			if s.State.Keys[i].Name == c.SetX509.Name {
				s.State.Keys[i].X509 = c.SetX509.Chain
			}
		}
	}
	for _, o := range c.SetOpenPGP {
		for i := range s.State.Keys {
			k := &s.State.Keys[i]
			if k.Name != o.Name {
				continue
			}
			pgp := *k.OpenPGP
			pgp.Certificate, pgp.Expires = o.Certificate, o.Expires
			k.OpenPGP = &pgp
			if o.Disable {
				k.State = keys.Disabled
			}
		}
	}
	if c.Policy != nil {
		s.State.Policy = c.Policy
	}
	first := int64(len(s.rows))
	s.rows = append(s.rows, c.Audit...)
	for i, a := range c.Answers {
		if a != nil {
			s.kept = append(s.kept, store.Answer{Row: first + int64(i), Entry: c.Audit[i], Answer: a})
		}
	}
	return first, after
}

// Answers implements store.Store; none is ever thrown away.
func (s *Store) Answers(context.Context) ([]store.Answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.kept), s.LoadError
}

// Audit implements store.Store.
func (s *Store) Audit(_ context.Context, from int64, limit int) (int64, [][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := int64(len(s.rows))
	if from < 0 {
		from = max(0, n-int64(limit))
	}
	from = min(from, n)
	return from, s.rows[from:min(n, from+int64(limit))], nil
}

// Close implements store.Store.
func (s *Store) Close() error { return nil }

// Entries returns every audit entry, and fails the test where one is not canonical.
func (s *Store) Entries(t testing.TB) []audit.Entry {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []audit.Entry
	for _, row := range s.rows {
		e, err := audit.Parse(row)
		if err != nil {
			t.Fatalf("audit row %s: %v", row, err)
		}
		out = append(out, e)
	}
	return out
}

// Last returns the last audit entry.
func (s *Store) Last(t testing.TB) audit.Entry {
	t.Helper()
	all := s.Entries(t)
	if len(all) == 0 {
		t.Fatal("the audit log is empty")
	}
	return all[len(all)-1]
}
