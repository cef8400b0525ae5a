package hsm

import (
	"testing"

	"context"

	"github.com/miekg/pkcs11"
)

// API is the seam to the module, for tests.
type API = api

const (
	CKMEdDSA = ckmEdDSA
)

// OpenWith is Open with something between the pool and the module.
func OpenWith(ctx context.Context, c Config, wrap func(API) API) (*Pool, error) {
	return open(ctx, c, wrap)
}

// LoadedCtx gives the module itself, for raw calls. The module is one that a
// pool has loaded.
func (p *Pool) LoadedCtx() (*pkcs11.Ctx, uint) { return p.mod.ctx, p.slot }

// Codes is the table of CK_RV codes and their classes.
func Codes() map[uint]Class {
	m := map[uint]Class{}
	for code, c := range codes {
		m[code] = c.class
	}
	return m
}

// For table tests of what needs no token.
var (
	ParseRSA   = parseRSA
	MaxPINFile = maxPIN
)

func ParsePoint(algorithm string, point []byte) (any, error) {
	for _, c := range curves {
		if c.algorithm == algorithm {
			return parsePoint(c, point)
		}
	}
	panic("no such curve")
}

// NormaliseRSA gives a signature of an RSA key the length of its modulus.
func NormaliseRSA(size int, sig []byte) ([]byte, error) {
	return key{typ: pkcs11.CKK_RSA, size: size}.normalise(sig)
}

// ClassifyBy is the class of a code by a profile.
func ClassifyBy(t testing.TB, profile, call string, code uint) Class {
	p, err := ProfileNamed(profile)
	if err != nil {
		t.Fatal(err)
	}
	return p.classify(call, code)
}

func ProfileOf(module, maker string) string { return profileOf(module, maker).Name }
