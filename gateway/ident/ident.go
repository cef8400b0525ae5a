// Package ident says who is asking. A [Principal] comes from a verified TLS
// connection or from a Unix peer whose uid the kernel vouches for, and from
// nowhere else; nothing that a client says in a message becomes one.
package ident

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Principal is an authenticated caller. The zero value is nobody, and every
// rule refuses it. It is a value, safe to copy and share.
type Principal struct {
	name     string
	via      string
	notAfter time.Time // zero: does not expire
}

// Name is what rules match: a SPIFFE URI, or the name in a client certificate
// or in the configuration of a local socket.
func (p Principal) Name() string { return p.name }

// Via tells how the caller proved it, for the audit log: "mtls:" with the
// SHA-256 of the certificate, or "unix:" with the peer's uid.
func (p Principal) Via() string { return p.via }

// Check returns an error that wraps [sigerr.Unauthenticated] for nobody, and
// for a caller whose certificate has expired since it connected: a stream can
// outlive the certificate that opened it.
func (p Principal) Check(now time.Time) error {
	if p.name == "" {
		return fmt.Errorf("%w: no identity", sigerr.Unauthenticated)
	}
	if !p.notAfter.IsZero() && now.After(p.notAfter) {
		return fmt.Errorf("%w: the client certificate of %q expired at %s; issue a new one and connect again",
			sigerr.Unauthenticated, p.name, p.notAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// nameRE keeps a plain name from looking like a SPIFFE URI or like a glob.
var nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}$`)

// CheckName refuses what cannot be the plain (not SPIFFE) name of a principal.
func CheckName(name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("%w: principal name %q: use a letter or digit, then up to 127 letters, digits, '.', '_', '@' or '-'", sigerr.Invalid, name)
	}
	return nil
}

// FromTLS takes the principal from a connection whose client certificate
// crypto/tls has verified: its one SPIFFE id (a URI SAN, SPIFFE X.509-SVID
// section 2), or else its subject's common name.
func FromTLS(cs tls.ConnectionState) (Principal, error) {
	if len(cs.VerifiedChains) == 0 || len(cs.VerifiedChains[0]) == 0 {
		return Principal{}, fmt.Errorf("%w: no verified client certificate", sigerr.Unauthenticated)
	}
	leaf := cs.VerifiedChains[0][0]
	if leaf.IsCA {
		return Principal{}, fmt.Errorf("%w: a CA's certificate is no client's", sigerr.Unauthenticated)
	}
	sum := sha256.Sum256(leaf.Raw)
	p := Principal{via: "mtls:" + hex.EncodeToString(sum[:]), notAfter: leaf.NotAfter}
	switch len(leaf.URIs) {
	case 0:
		if err := CheckName(leaf.Subject.CommonName); err != nil {
			return Principal{}, fmt.Errorf("%w: client certificate without a SPIFFE id: %w", sigerr.Unauthenticated, err)
		}
		p.name = leaf.Subject.CommonName
	case 1:
		id := leaf.URIs[0].String()
		if !isSPIFFE(id) {
			return Principal{}, fmt.Errorf("%w: client certificate has the URI %q, which is no SPIFFE id", sigerr.Unauthenticated, id)
		}
		p.name = id
	default:
		return Principal{}, fmt.Errorf("%w: client certificate has %d URIs; a SPIFFE id stands alone", sigerr.Unauthenticated, len(leaf.URIs))
	}
	return p, nil
}

// spiffeRE is SPIFFE-ID section 2: a trust domain, then segments, none empty;
// no user, port, query, fragment or percent-encoding. So one caller has one
// spelling, and none that a glob of a rule could read otherwise.
var spiffeRE = regexp.MustCompile(`^spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)*$`)

func isSPIFFE(id string) bool {
	return len(id) <= 2048 && spiffeRE.MatchString(id) &&
		!strings.Contains(id+"/", "/./") && !strings.Contains(id+"/", "/../")
}

// FromPeer is the principal that a local socket acts as for a peer that the
// kernel says has this uid (SO_PEERCRED) and that the socket's list allows.
// name is from the gateway's configuration.
func FromPeer(uid uint32, name string) (Principal, error) {
	if err := CheckName(name); err != nil {
		return Principal{}, err
	}
	return Principal{name: name, via: fmt.Sprintf("unix:%d", uid)}, nil
}
