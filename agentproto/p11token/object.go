package p11token

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Classes of objects, and types of keys.
const (
	ckoCertificate = 1
	ckoPublicKey   = 2
	ckoPrivateKey  = 3

	ckkRSA       = 0x00
	ckkEC        = 0x03
	ckkECEdwards = 0x40
)

// key is the public half of a key, as attributes show it. It is immutable.
type key struct {
	name    string
	public  crypto.PublicKey
	keyType uint64
	id      []byte // CKA_ID
	spki    []byte
	params  []byte // CKA_EC_PARAMS; nil for RSA
	point   []byte // CKA_EC_POINT
}

// curves are those whose keys are shown, with the DER of their names (RFC 5480
// section 2.1.1.1).
var curves = map[elliptic.Curve]asn1.ObjectIdentifier{
	elliptic.P256(): {1, 2, 840, 10045, 3, 1, 7},
	elliptic.P384(): {1, 3, 132, 0, 34},
	elliptic.P521(): {1, 3, 132, 0, 35},
}

// edwardsParams is the PrintableString "edwards25519" (PKCS#11 v3.0, section 2.3.10).
var edwardsParams = append([]byte{0x13, 12}, "edwards25519"...)

// newKey is nil for a key of a kind that is not shown.
func newKey(name string, pub crypto.PublicKey) (*key, error) {
	k := &key{name: name, public: pub}
	var err error
	switch p := pub.(type) {
	case *rsa.PublicKey:
		k.keyType = ckkRSA
	case *ecdsa.PublicKey:
		oid, ok := curves[p.Curve]
		if !ok {
			return nil, nil
		}
		k.keyType = ckkEC
		var point []byte
		point, err = p.Bytes()
		if err == nil {
			k.params, err = asn1.Marshal(oid)
		}
		if err == nil {
			k.point, err = asn1.Marshal(point)
		}
	case ed25519.PublicKey:
		k.keyType, k.params = ckkECEdwards, edwardsParams
		k.point, err = asn1.Marshal([]byte(p))
	default:
		return nil, nil
	}
	if err == nil {
		k.spki, err = x509.MarshalPKIXPublicKey(pub)
	}
	if err != nil {
		return nil, fmt.Errorf("public key of %q: %w", name, err)
	}
	k.id = keyID(k.spki)
	return k, nil
}

// keyID is what a private key, its public key and its certificate have in common: it
// stays while the key does, and can be computed from a certificate.
func keyID(spki []byte) []byte {
	sum := sha256.Sum256(spki)
	return sum[:20]
}

// object is what a handle stands for. It is immutable.
type object struct {
	handle uint64
	slot   uint64
	class  uint64
	label  string
	id     []byte
	key    *key              // nil in an issuer's certificate
	cert   *x509.Certificate // of a certificate; of a key, its own, if it has one
}

// entry is what a slot shows of one key, kept as long as key and chain stay the
// same, so that handles do too.
type entry struct {
	public crypto.PublicKey
	chain  [][]byte
	key    *key
	own    []*object // the two keys, and the certificate
	issuer []*x509.Certificate
}

func (e *entry) same(pub crypto.PublicKey, chain [][]byte) bool {
	p, ok := pub.(interface{ Equal(crypto.PublicKey) bool })
	return ok && p.Equal(e.public) && slices.EqualFunc(chain, e.chain, bytes.Equal)
}

// inSlot names a key, or a certificate by its digest, in a slot.
type inSlot struct {
	slot uint64
	what string
}

// view is what a client has been shown: all slots' objects. It is immutable but for being built.
type view struct {
	objects  []*object // by slot, then by name
	byHandle map[uint64]*object
	entries  map[inSlot]*entry
	issuers  map[inSlot]*object // certificates of no key of the slot's
	last     uint64             // handle
}

// shows reports whether a slot has an object.
func (v *view) shows(slot uint64) bool {
	return slices.ContainsFunc(v.objects, func(o *object) bool { return o.slot == slot })
}

// look returns what the client sees now. It asks Keys if the last look was too long ago, and
// returns the last one beside the error if Keys does not tell.
func (c *conn) look(ctx context.Context) (*view, error) {
	c.looking.Lock()
	defer c.looking.Unlock()
	c.mu.Lock()
	old, seen := c.view, c.seen
	c.mu.Unlock()
	if !seen.IsZero() && time.Since(seen) < refresh {
		return old, nil
	}
	pubs, err := c.keys.PublicKeys(ctx)
	if err != nil {
		return old, fmt.Errorf("listing keys: %w", err)
	}
	chains, err := c.keys.Chains(ctx)
	if err != nil {
		return old, fmt.Errorf("listing certificates: %w", err)
	}
	v := c.build(old, pubs, chains)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.view, c.seen = v, time.Now()
	return v, nil
}

// seenObject is an object that the client has been shown.
func (c *conn) seenObject(s *session, handle uint64) *object {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.view.byHandle[handle]
	if o == nil || o.slot != s.slot.id {
		return nil
	}
	return o
}

// build makes a view, with what has not changed taken from the old one.
func (c *conn) build(old *view, pubs map[string]crypto.PublicKey, chains map[string][][]byte) *view {
	v := &view{
		byHandle: make(map[uint64]*object), entries: make(map[inSlot]*entry), issuers: make(map[inSlot]*object), last: old.last,
	}
	names := slices.Sorted(maps.Keys(pubs))
	for i := range c.srv.slots {
		s := &c.srv.slots[i]
		var entries []*entry
		for _, name := range names {
			_, isEd25519 := pubs[name].(ed25519.PublicKey)
			if isEd25519 != s.ed25519 || !s.has(name) || !c.srv.cfg.Lease.Shows(name) {
				continue
			}
			if len(entries) == MaxKeys {
				c.warn("keys are not shown: there are too many; make groups", "token", s.label, "shown", MaxKeys)
				break
			}
			e := c.entry(old, v, s, name, pubs[name], chains[name])
			if e == nil {
				continue
			}
			v.entries[inSlot{s.id, name}] = e
			entries = append(entries, e)
			v.add(e.own...)
		}
		v.addIssuers(old, s, entries)
	}
	return v
}

func (v *view) add(objects ...*object) {
	for _, o := range objects {
		v.objects = append(v.objects, o)
		v.byHandle[o.handle] = o
	}
}

// newObject gives an object its handle. Handles are not used again.
func (v *view) newObject(o object) *object {
	v.last++
	o.handle = v.last
	return &o
}

// entry makes the objects of one key, or takes them from the old view. It is nil for a
// key of a kind that is not shown.
func (c *conn) entry(old, v *view, s *slot, name string, pub crypto.PublicKey, chain [][]byte) *entry {
	e := old.entries[inSlot{s.id, name}]
	if e != nil && e.same(pub, chain) {
		return e
	}
	k, err := newKey(name, pub)
	if k == nil {
		if err != nil {
			c.warn("a key is not shown", "key", name, "err", err)
		}
		return nil
	}
	e = &entry{public: pub, chain: chain, key: k}
	var own *x509.Certificate
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			c.warn("a certificate is not shown", "key", name, "number", i, "err", err)
			continue
		}
		switch {
		case i > 0:
			e.issuer = append(e.issuer, cert)
		case bytes.Equal(cert.RawSubjectPublicKeyInfo, k.spki):
			own = cert
		default: // tools would verify with one key what another signed
			c.warn("a certificate is not shown: it is of another key", "key", name)
		}
	}
	for _, class := range []uint64{ckoPrivateKey, ckoPublicKey} {
		e.own = append(e.own, v.newObject(object{slot: s.id, class: class, label: name, id: k.id, key: k, cert: own}))
	}
	if own != nil {
		e.own = append(e.own, v.newObject(object{slot: s.id, class: ckoCertificate, label: name, id: k.id, key: k, cert: own}))
	}
	return e
}

// addIssuers adds the other certificates of the chains, each once, unless it is that of a
// key of the slot.
func (v *view) addIssuers(old *view, s *slot, entries []*entry) {
	there := make(map[string]bool)
	for _, e := range entries {
		for _, o := range e.own {
			if o.class == ckoCertificate {
				there[string(o.cert.Raw)] = true
			}
		}
	}
	for _, e := range entries {
		for _, cert := range e.issuer {
			if there[string(cert.Raw)] {
				continue
			}
			there[string(cert.Raw)] = true
			at := inSlot{s.id, string(cert.Raw)}
			o := old.issuers[at]
			if o == nil {
				label := cert.Subject.CommonName
				if label == "" {
					label = cert.Subject.String()
				}
				o = v.newObject(object{slot: s.id, class: ckoCertificate, label: label, id: keyID(cert.RawSubjectPublicKeyInfo), cert: cert})
			}
			v.issuers[at] = o
			v.add(o)
		}
	}
}
