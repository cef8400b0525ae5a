package hsm

import (
	"bytes"
	"context"
	"crypto"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/miekg/pkcs11"
)

// rsaBits are the RSA algorithms of Generate; the others are in curves.
var rsaBits = map[string]int{"rsa2048": 2048, "rsa3072": 3072, "rsa4096": 4096}

// Generate makes a key pair in the token: rsa2048, rsa3072, rsa4096, p256,
// p384 or ed25519. The private half is sensitive, not extractable, and can
// sign and nothing else; both halves carry the label and the id. An id or a
// label that any object of the token has is refused with ErrExists.
//
// What the token made is read back, and destroyed if it can be extracted. One
// pair at a time is made in a process. When ctx ends first, the pair is
// destroyed; where that fails, or the process dies meanwhile, a pair with this
// id may remain, for Delete.
func (p *Pool) Generate(ctx context.Context, label string, id []byte, algorithm string) (crypto.PublicKey, error) {
	id = bytes.Clone(id) // the call may outlive the caller
	switch {
	case label == "" || len(id) == 0:
		return nil, refuse("generate", "a key wants a label and an id")
	case rsaBits[algorithm] == 0 && !slices.ContainsFunc(curves, func(c curve) bool { return c.algorithm == algorithm }):
		return nil, refuse("generate", "algorithm %q is not one of rsa2048, rsa3072, rsa4096, p256, p384, ed25519", algorithm)
	}
	return p.create(ctx, "generate", id, creation{
		vacant:  func(w *worker) error { return w.vacant(label, id) },
		make:    func(w *worker) (crypto.PublicKey, error) { return w.generate(label, id, algorithm) },
		classes: pairClasses,
	})
}

// A creation is an act that makes objects which all have one id.
type creation struct {
	vacant  func(*worker) error                     // refuses where there is something in the way
	make    func(*worker) (crypto.PublicKey, error) // and reads back what it has made
	classes []uint                                  // what it makes, in the order in which it is undone
}

// create does an act that makes something, and destroys what it has made where it
// fails, or where nobody waits for it any more.
func (p *Pool) create(ctx context.Context, op string, id []byte, c creation) (crypto.PublicKey, error) {
	var pub crypto.PublicKey
	var dirty atomic.Bool // something may be in the token that was not there before
	err := p.administer(ctx, op, func(j *job, w *worker) error {
		if dirty.Load() { // of an attempt before this one
			if err := w.undo(id, c.classes); err != nil {
				return err
			}
			dirty.Store(false)
		}
		if err := c.vacant(w); err != nil {
			return err
		}
		dirty.Store(true)
		made, err := c.make(w)
		if err == nil && j.keep() {
			pub = made
			dirty.Store(false)
			return nil
		}
		if w.undo(id, c.classes) == nil {
			dirty.Store(false)
		}
		return err // nobody's, where all is good and the caller left
	})
	if err != nil && dirty.Load() {
		return nil, fmt.Errorf("%w; an object with id %x may be left in the token; `signwardend token delete` destroys it", err, id)
	}
	if err != nil {
		return nil, err
	}
	return pub, nil
}

// Delete destroys both halves of a key, and the certificates with its id. It is
// how to undo a Generate whose key could not be registered.
func (p *Pool) Delete(ctx context.Context, id []byte) error {
	id = bytes.Clone(id) // the call may outlive the caller
	return p.administer(ctx, "delete", func(_ *job, w *worker) error {
		n, err := w.destroy(id, allClasses)
		if err == nil && n == 0 {
			return fmt.Errorf("key %x: %w", id, ErrNotFound)
		}
		return err
	})
}

// administer runs what writes to the token: one at a time in the process, in
// a read-write session that is closed again. The caller waits for its turn, so
// that no worker does; but the turn ends with the call, which may outlive the
// caller.
func (p *Pool) administer(ctx context.Context, op string, run func(*job, *worker) error) error {
	select {
	case p.mod.admin <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", op, ctx.Err())
	}
	t := &turn{admin: p.mod.admin}
	t.in.Store(1)
	defer t.leave()
	return p.do(ctx, op, func(j *job, w *worker) error {
		if !t.enter() {
			return context.Canceled // nobody's: the caller left before we began
		}
		defer t.leave()
		return w.writable(func() error { return run(j, w) })
	})
}

// A turn is given back by the last to leave it.
type turn struct {
	in    atomic.Int32
	admin chan struct{}
}

func (t *turn) enter() bool {
	for {
		n := t.in.Load()
		if n == 0 {
			return false
		}
		if t.in.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (t *turn) leave() {
	if t.in.Add(-1) == 0 {
		<-t.admin
	}
}

// vacant looks for any object, not only keys: a certificate under the same id
// would be taken for the new key's.
func (w *worker) vacant(label string, id []byte) error {
	for _, a := range []struct {
		what string
		attr *pkcs11.Attribute
	}{
		{fmt.Sprintf("id %x", id), pkcs11.NewAttribute(pkcs11.CKA_ID, id)},
		{fmt.Sprintf("label %q", label), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)},
	} {
		hs, err := w.find(a.attr)
		if err != nil {
			return err
		}
		if len(hs) > 0 {
			return fmt.Errorf("%s: %w", a.what, ErrExists)
		}
	}
	return nil
}

func (w *worker) generate(label string, id []byte, algorithm string) (crypto.PublicKey, error) {
	mech, public, private := templates(label, id, algorithm)
	pub, priv, err := w.p.api.GenerateKeyPair(w.sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(mech, nil)}, public, private)
	if err != nil {
		return nil, w.p.profile.fail("C_GenerateKeyPair", err)
	}
	if err := w.inspect("generate", priv, slices.Concat(promised, born)...); err != nil {
		return nil, err
	}
	return w.publicKey(pub)
}

// set is an attribute of a template.
func set(typ uint, v any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, v) }

// halves are the attributes that both halves of every key have, however it comes
// into the token: the private one cannot leave it, and signs and does nothing else.
func halves(label string, id []byte) (public, private []*pkcs11.Attribute) {
	public = []*pkcs11.Attribute{
		set(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), set(pkcs11.CKA_TOKEN, true), set(pkcs11.CKA_PRIVATE, false),
		set(pkcs11.CKA_LABEL, label), set(pkcs11.CKA_ID, id),
		set(pkcs11.CKA_VERIFY, true), set(pkcs11.CKA_ENCRYPT, false), set(pkcs11.CKA_WRAP, false), set(pkcs11.CKA_VERIFY_RECOVER, false),
	}
	private = []*pkcs11.Attribute{
		set(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), set(pkcs11.CKA_TOKEN, true), set(pkcs11.CKA_PRIVATE, true),
		set(pkcs11.CKA_SENSITIVE, true), set(pkcs11.CKA_EXTRACTABLE, false),
		set(pkcs11.CKA_LABEL, label), set(pkcs11.CKA_ID, id),
		set(pkcs11.CKA_SIGN, true), set(pkcs11.CKA_DECRYPT, false), set(pkcs11.CKA_UNWRAP, false), set(pkcs11.CKA_DERIVE, false), set(pkcs11.CKA_SIGN_RECOVER, false),
	}
	return public, private
}

func templates(label string, id []byte, algorithm string) (mech uint, public, private []*pkcs11.Attribute) {
	public, private = halves(label, id)
	if bits := rsaBits[algorithm]; bits != 0 {
		public = append(public, set(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), set(pkcs11.CKA_MODULUS_BITS, bits), set(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}))
		private = append(private, set(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA))
		return pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, public, private
	}
	c := curves[slices.IndexFunc(curves, func(c curve) bool { return c.algorithm == algorithm })]
	public = append(public, set(pkcs11.CKA_KEY_TYPE, c.typ), set(pkcs11.CKA_EC_PARAMS, c.params[0]))
	private = append(private, set(pkcs11.CKA_KEY_TYPE, c.typ))
	if c.typ == ckkECEdwards {
		return ckmECEdwardsKeyPairGen, public, private
	}
	return pkcs11.CKM_EC_KEY_PAIR_GEN, public, private
}

// A promise is what a private key is to be, by what the token says of it.
type promise struct {
	name string
	typ  uint
	want bool
}

// promised holds for every key, and born for one that was made in the token.
var (
	promised = []promise{
		{"CKA_EXTRACTABLE", pkcs11.CKA_EXTRACTABLE, false},
		{"CKA_SENSITIVE", pkcs11.CKA_SENSITIVE, true},
		{"CKA_PRIVATE", pkcs11.CKA_PRIVATE, true},
		{"CKA_TOKEN", pkcs11.CKA_TOKEN, true},
		{"CKA_SIGN", pkcs11.CKA_SIGN, true},
		{"CKA_DECRYPT", pkcs11.CKA_DECRYPT, false},
		{"CKA_UNWRAP", pkcs11.CKA_UNWRAP, false},
		{"CKA_DERIVE", pkcs11.CKA_DERIVE, false},
		{"CKA_SIGN_RECOVER", pkcs11.CKA_SIGN_RECOVER, false},
	}
	born = []promise{
		{"CKA_NEVER_EXTRACTABLE", pkcs11.CKA_NEVER_EXTRACTABLE, true},
		{"CKA_ALWAYS_SENSITIVE", pkcs11.CKA_ALWAYS_SENSITIVE, true},
		{"CKA_LOCAL", pkcs11.CKA_LOCAL, true},
	}
)

// inspect reads back what matters of a private key: a token may have taken the
// template and done otherwise.
func (w *worker) inspect(op string, priv pkcs11.ObjectHandle, promises ...promise) error {
	for _, a := range promises {
		v, err := w.attribute(priv, a.typ)
		if err != nil {
			return err
		}
		if len(v) != 1 || (v[0] != 0) != a.want {
			return refuse(op, "the token made a key with %s = %x, against what was asked; it was not kept", a.name, v)
		}
	}
	return nil
}

// What Delete destroys, and what undoes the making of a pair. The private half is
// first: what is left where the rest fails is then harmless.
var (
	pairClasses = []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY}
	allClasses  = append(pairClasses[:2:2], pkcs11.CKO_CERTIFICATE)
)

// undo destroys what an act has made: on a new session where that of the act fails,
// since the act may have lost it.
func (w *worker) undo(id []byte, classes []uint) error {
	if w.open {
		if _, err := w.destroy(id, classes); err == nil {
			return nil
		}
	}
	return w.inNewSession(func() error {
		_, err := w.destroy(id, classes)
		return err
	})
}

// destroy removes the objects of these classes with this id.
func (w *worker) destroy(id []byte, classes []uint) (int, error) {
	w.p.forget(id)
	n := 0
	for _, class := range classes {
		hs, err := w.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_ID, id))
		if err != nil {
			return n, err
		}
		for _, h := range hs {
			if err := w.p.api.DestroyObject(w.sh, h); err != nil {
				return n, w.p.profile.fail("C_DestroyObject", err)
			}
			n++
		}
	}
	return n, nil
}
