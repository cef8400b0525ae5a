package p11token

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"hash"

	"github.com/signwarden/signwarden/agentproto/p11rpc"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// operation is a signature that was begun with C_SignInit.
type operation struct {
	mech  *mechanism
	key   *key
	pss   *rsa.PSSOptions // nil: the mechanism is not PSS
	hash  hash.Hash       // of the data so far; nil: they are a digest
	parts bool            // C_SignUpdate was called: only C_SignFinal may follow
}

// failure is an error of a signature with what is logged of it.
type failure struct {
	request, key, mechanism string
	err                     error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// size is the length of the signature.
func (op *operation) size() int {
	switch k := op.key.public.(type) {
	case *rsa.PublicKey:
		return k.Size()
	case *ecdsa.PublicKey:
		return 2 * ((k.Curve.Params().N.BitLen() + 7) / 8)
	}
	return ed25519.SignatureSize
}

// signInit begins a signature; with a NULL mechanism it ends one (PKCS#11 v3.0).
// Whether the key may be used is decided when it is.
func (c *conn) signInit(_ context.Context, s *session, args []p11rpc.Value) ([]p11rpc.Value, error) {
	if args[0].Mechanism.Null {
		s.op = nil
		return nil, nil
	}
	if s.op != nil {
		return nil, ckrOperationActive
	}
	mech := mechanismOf(args[0].Mechanism.Type)
	if mech == nil || mech.ed25519() != s.slot.ed25519 {
		return nil, refuse(ckrMechanismInvalid, "mechanism 0x%x is not offered", args[0].Mechanism.Type)
	}
	o := c.seenObject(s, args[1].Num)
	switch {
	case o == nil || o.class == ckoCertificate:
		return nil, ckrKeyHandleInvalid
	case o.class != ckoPrivateKey:
		return nil, ckrKeyFunctionNotPermitted
	case o.key.keyType != mech.keyType:
		return nil, ckrKeyTypeInconsistent
	}
	pss, err := mech.parameters(o.key, args[0].Mechanism)
	if err != nil {
		return nil, err
	}
	s.op = &operation{mech: mech, key: o.key, pss: pss}
	if mech.hash != 0 {
		s.op.hash = mech.hash.New()
	}
	return nil, nil
}

// sign makes a signature over data in one part.
func (c *conn) sign(ctx context.Context, s *session, args []p11rpc.Value) ([]p11rpc.Value, error) {
	op := s.op
	if op == nil || op.parts {
		return nil, ckrOperationNotInitialized
	}
	if !roomFor(op.size(), args[1].Num) {
		return []p11rpc.Value{p11rpc.Length(op.size())}, nil // and the operation stays
	}
	s.op = nil
	if args[0].Short {
		return nil, ckrArgumentsBad
	}
	return c.finish(ctx, op, args[0].Bytes)
}

// signUpdate takes a part of the data, for a mechanism that hashes.
func (c *conn) signUpdate(_ context.Context, s *session, args []p11rpc.Value) ([]p11rpc.Value, error) {
	if s.op == nil || s.op.hash == nil {
		return nil, ckrOperationNotInitialized
	}
	if args[0].Short {
		s.op = nil
		return nil, ckrArgumentsBad
	}
	s.op.parts = true
	s.op.hash.Write(args[0].Bytes)
	return nil, nil
}

func (c *conn) signFinal(ctx context.Context, s *session, args []p11rpc.Value) ([]p11rpc.Value, error) {
	op := s.op
	if op == nil || op.hash == nil {
		return nil, ckrOperationNotInitialized
	}
	if !roomFor(op.size(), args[0].Num) {
		return []p11rpc.Value{p11rpc.Length(op.size())}, nil
	}
	s.op = nil
	return c.finish(ctx, op, nil)
}

// roomFor reports whether the client has room for a signature. Where it has not, it is
// told the length, and finds out whether it had asked for that or has too little room.
func roomFor(size int, room uint64) bool {
	return room != p11rpc.NullRoom && room >= uint64(size)
}

// finish has the signature made: one request to Keys.
func (c *conn) finish(ctx context.Context, op *operation, data []byte) ([]p11rpc.Value, error) {
	f := &failure{request: rand.Text(), key: op.key.name, mechanism: op.mech.name}
	hash, digest, err := op.digest(data)
	if err == nil {
		var sig []byte
		sig, err = c.request(ctx, op, f.request, hash, digest)
		if err == nil {
			c.log.Debug("signed", "request", f.request, "key", f.key, "mechanism", f.mechanism, "hash", hash.String())
			return []p11rpc.Value{p11rpc.B(sig)}, nil
		}
	}
	f.err = fmt.Errorf("signing with %q: %w", op.key.name, err)
	return nil, f
}

// digest hashes the rest of the data, or finds the digest in them.
func (op *operation) digest(data []byte) (crypto.Hash, []byte, error) {
	if op.hash != nil {
		op.hash.Write(data)
		return op.mech.hash, op.hash.Sum(nil), nil
	}
	hash, digest, err := op.mech.digest(data)
	if err == nil && op.pss != nil && op.pss.Hash != hash {
		return 0, nil, refuse(ckrDataLenRange, "the %d bytes to be signed are no digest of %v, which the mechanism names", len(data), op.pss.Hash)
	}
	return hash, digest, err
}

// request asks Keys if the lease leaves a signature; what fails costs it none. It checks the
// form of what Keys gives: a signature of another length would have the client read past
// or short of it.
func (c *conn) request(ctx context.Context, op *operation, id string, hash crypto.Hash, digest []byte) (sig []byte, err error) {
	giveBack, err := c.srv.cfg.Lease.Take()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			giveBack()
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, c.srv.cfg.SignTimeout)
	defer cancel()
	var opts crypto.SignerOpts = hash
	if op.pss != nil {
		opts = op.pss
	}
	note := fmt.Sprintf("request %s, mechanism %s, program %s", id, op.mech.name, c.program)
	sig, err = c.keys.SignWith(ctx, op.key.name, opts, bytes.Clone(digest), note)
	if err != nil {
		if sigerr.Kind(err) == nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = fmt.Errorf("%w: %w", sigerr.Timeout, err) // whatever a broken-off call said
		}
		return nil, err
	}
	if len(sig) != op.size() {
		return nil, fmt.Errorf("%w: signature of %d bytes for a %T", sigerr.TokenFailed, len(sig), op.key.public)
	}
	return sig, nil
}
