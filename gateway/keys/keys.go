// Package keys says what a key is: its name, its algorithm, its public half,
// where its private half lives, and the states it can be in. It holds no
// secret and does no I/O.
package keys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"time"

	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Algorithm is the type and size of a key pair.
type Algorithm string

// The algorithms that can be generated.
const (
	RSA2048 Algorithm = "rsa2048"
	RSA3072 Algorithm = "rsa3072"
	RSA4096 Algorithm = "rsa4096"
	P256    Algorithm = "p256"
	P384    Algorithm = "p384"
	Ed25519 Algorithm = "ed25519"
)

// Algorithms lists them in the order in which help texts show them.
var Algorithms = []Algorithm{RSA2048, RSA3072, RSA4096, P256, P384, Ed25519}

// ParseAlgorithm accepts the names above and nothing else.
func ParseAlgorithm(s string) (Algorithm, error) {
	if slices.Contains(Algorithms, Algorithm(s)) {
		return Algorithm(s), nil
	}
	return "", fmt.Errorf("%w: algorithm %q is not one of %v", sigerr.Invalid, s, Algorithms)
}

// AlgorithmOf tells which algorithm a public key is of, or "" for none of ours.
func AlgorithmOf(pub crypto.PublicKey) Algorithm {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		switch k.N.BitLen() {
		case 2048:
			return RSA2048
		case 3072:
			return RSA3072
		case 4096:
			return RSA4096
		}
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return P256
		case elliptic.P384():
			return P384
		}
	case ed25519.PublicKey:
		return Ed25519
	}
	return ""
}

// State is where a key is in its life.
type State string

// The states. NIST SP 800-57 part 1 calls them active and suspended.
const (
	Enabled  State = "enabled"
	Disabled State = "disabled"
)

// transitions says which states can follow which. What is not here is refused.
var transitions = map[State][]State{
	Enabled:  {Disabled},
	Disabled: {Enabled},
}

// CanBecome reports whether a key in state s may be put in state to.
func (s State) CanBecome(to State) bool { return slices.Contains(transitions[s], to) }

// ParseState accepts the states above and nothing else.
func ParseState(s string) (State, error) {
	if _, ok := transitions[State(s)]; ok {
		return State(s), nil
	}
	return "", fmt.Errorf("%w: key state %q is neither %q nor %q", sigerr.Invalid, s, Enabled, Disabled)
}

// Layout is the shape of an OpenPGP certificate.
type Layout string

// The layouts. With Subkey the key signs as a subkey and a certify-only primary
// key of its own, never offered to any front-end, stands above it: a
// certification asked for as a digest cannot be told from a file signature, so
// the key that digests reach must not be able to certify. Single is for
// verifiers that know no subkeys.
const (
	Subkey Layout = "subkey"
	Single Layout = "single"
)

// OpenPGP is the OpenPGP side of a key.
type OpenPGP struct {
	UserID      string
	Layout      Layout
	Expires     time.Time // zero: never
	Certificate []byte    // transferable public key, binary

	// The certify-only primary key; empty with Single. One that is kept off line has no
	// PrimaryID: the certificate is then changed where it is.
	PrimaryID     []byte // CKA_ID
	PrimaryPublic []byte // SubjectPublicKeyInfo
}

// OffLine says whether the primary key is in no token.
func (o *OpenPGP) OffLine() bool { return len(o.PrimaryPublic) > 0 && len(o.PrimaryID) == 0 }

// Key is what is stored of a key. It is a value: nothing in it is changed in place.
type Key struct {
	Name      string
	Algorithm Algorithm
	State     State
	Token     string    // label of the token
	ID        []byte    // CKA_ID there
	Public    []byte    // SubjectPublicKeyInfo, pinned when the key was made
	Created   time.Time // whole seconds: part of the OpenPGP fingerprint
	OpenPGP   *OpenPGP  // nil: no certificate was asked for
	X509      [][]byte  // DER certificates: the key's own, then its issuers'; nil: none
}

var nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// CheckName refuses names that are not a letter or digit followed by up to 63
// letters, digits, '.', '_' or '-': they appear in PKCS#11 labels, file names
// and logs.
func CheckName(name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("%w: key name %q: use a letter or digit, then up to 63 letters, digits, '.', '_' or '-'", sigerr.Invalid, name)
	}
	return nil
}

// Fingerprint is the SHA-256 of the SubjectPublicKeyInfo, in hexadecimal.
func (k Key) Fingerprint() string {
	sum := sha256.Sum256(k.Public)
	return hex.EncodeToString(sum[:])
}

// Registered is a key with its public half parsed. It is immutable.
type Registered struct {
	Key
	PublicKey crypto.PublicKey
}

// Registry is an immutable set of keys by name.
type Registry struct {
	byName map[string]*Registered
	names  []string
}

// NewRegistry parses the public key of each. A key whose algorithm and public
// half disagree, and a name that is there twice, is an error: the store was edited.
func NewRegistry(all []Key) (*Registry, error) {
	r := &Registry{byName: make(map[string]*Registered, len(all))}
	for _, k := range all {
		pub, err := x509.ParsePKIXPublicKey(k.Public)
		if err != nil {
			return nil, fmt.Errorf("public key of %q: %w", k.Name, err)
		}
		if got := AlgorithmOf(pub); got == "" || got != k.Algorithm {
			return nil, fmt.Errorf("key %q is stored as %q with a public key of %q", k.Name, k.Algorithm, got)
		}
		if r.byName[k.Name] != nil {
			return nil, fmt.Errorf("key %q is stored twice", k.Name)
		}
		r.byName[k.Name] = &Registered{Key: k, PublicKey: pub}
		r.names = append(r.names, k.Name)
	}
	slices.Sort(r.names)
	return r, nil
}

// Get returns the key of that name, or nil.
func (r *Registry) Get(name string) *Registered { return r.byName[name] }

// Names returns every name, sorted. The caller must not change it.
func (r *Registry) Names() []string { return r.names }
