package hsm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"slices"

	"github.com/miekg/pkcs11"
)

// A hash is one that a signature may name.
type hash struct {
	info []byte // DigestInfo up to the digest (RFC 8017, 9.2, note 1)
	mech uint   // for CK_RSA_PKCS_PSS_PARAMS
	mgf  uint
}

var hashes = map[crypto.Hash]hash{
	crypto.SHA1:   {[]byte{0x30, 0x21, 0x30, 9, 6, 5, 0x2b, 0x0e, 3, 2, 0x1a, 5, 0, 4, 20}, pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1},
	crypto.SHA224: {sha2Info(4, 28), pkcs11.CKM_SHA224, pkcs11.CKG_MGF1_SHA224},
	crypto.SHA256: {sha2Info(1, 32), pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256},
	crypto.SHA384: {sha2Info(2, 48), pkcs11.CKM_SHA384, pkcs11.CKG_MGF1_SHA384},
	crypto.SHA512: {sha2Info(3, 64), pkcs11.CKM_SHA512, pkcs11.CKG_MGF1_SHA512},
}

// sha2Info is the DigestInfo of 2.16.840.1.101.3.4.2.arc with a digest of size bytes.
func sha2Info(arc, size byte) []byte {
	return []byte{0x30, 17 + size, 0x30, 13, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, arc, 5, 0, 4, size}
}

// A request is a signature asked for, checked as far as it can be without
// knowing the key.
type request struct {
	digest []byte
	hash   crypto.Hash
	pss    bool
	salt   int  // as in rsa.PSSOptions
	ed     bool // *ed25519.Options were given
}

// Sign signs digest with the private key whose CKA_ID is id.
//
//   - RSA: PSS where opts is *rsa.PSSOptions, else PKCS#1 v1.5. opts names the
//     hash and digest has its length; raw RSA is refused. The signature is as
//     long as the modulus.
//   - ECDSA: r||s, each as wide as the order. A digest longer than the order
//     is cut to its bytes. opts may name no hash; if it names one, digest has its length.
//   - Ed25519: pure; digest is the message. Ed25519ph and ctx are refused, for
//     SoftHSM 2.6.1 takes their parameters and ignores them.
//
// When ctx ends first, the error is ctx's, and the token may have signed.
func (p *Pool) Sign(ctx context.Context, id, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	r, err := newRequest(digest, opts)
	if err != nil {
		return nil, err
	}
	id = bytes.Clone(id) // the call may outlive the caller
	var sig []byte
	err = p.do(ctx, "sign", func(_ *job, w *worker) error {
		k, err := w.key(id)
		if err != nil {
			return err
		}
		sig, err = w.sign(k, r)
		return err
	})
	if err != nil {
		return nil, err
	}
	return sig, nil
}

func (w *worker) sign(k key, r request) ([]byte, error) {
	p := w.p
	mech, data, err := r.mechanism(k)
	if err != nil {
		return nil, err
	}
	if err := p.api.SignInit(w.sh, []*pkcs11.Mechanism{mech}, k.handle); err != nil {
		return nil, p.profile.fail("C_SignInit", err)
	}
	raw, err := p.api.Sign(w.sh, data)
	if err != nil {
		w.drop() // whatever the class: the operation may still be active in it
		return nil, p.profile.fail("C_Sign", err)
	}
	return k.normalise(raw)
}

func newRequest(digest []byte, opts crypto.SignerOpts) (request, error) {
	if opts == nil {
		return request{}, refuse("sign", "no signer options")
	}
	r := request{digest: bytes.Clone(digest), hash: opts.HashFunc()}
	switch o := opts.(type) {
	case *rsa.PSSOptions:
		r.pss, r.salt = true, o.SaltLength
	case *ed25519.Options:
		if r.ed = true; o.Hash != 0 || o.Context != "" {
			return request{}, refuse("sign", "Ed25519ph and Ed25519ctx are not offered")
		}
	}
	if len(digest) == 0 {
		return request{}, refuse("sign", "empty digest")
	}
	if r.hash != 0 {
		if _, ok := hashes[r.hash]; !ok {
			return request{}, refuse("sign", "hash %v is not offered", r.hash)
		}
		if r.hash.Size() != len(digest) {
			return request{}, refuse("sign", "digest of %d bytes is not one of %v", len(digest), r.hash)
		}
	}
	return r, nil
}

// Bounds of an ECDSA digest whose hash is not named: SHA-1's and SHA-512's.
const minDigest, maxDigest = 20, 64

// mechanism returns what to say and what to give to the token for this key.
func (r request) mechanism(k key) (*pkcs11.Mechanism, []byte, error) {
	switch {
	case r.pss && k.typ != pkcs11.CKK_RSA, r.ed && k.typ != ckkECEdwards:
		return nil, nil, refuse("sign", "the signer options are for another type of key")
	case k.typ == pkcs11.CKK_EC:
		if len(r.digest) < minDigest || len(r.digest) > maxDigest {
			return nil, nil, refuse("sign", "digest of %d bytes: ECDSA takes %d to %d", len(r.digest), minDigest, maxDigest)
		}
		return pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil), r.digest[:min(len(r.digest), k.size)], nil
	case k.typ == ckkECEdwards:
		return pkcs11.NewMechanism(ckmEdDSA, nil), r.digest, nil
	case r.hash == 0:
		return nil, nil, refuse("sign", "raw RSA is not offered: name the hash of the digest")
	}
	h := hashes[r.hash]
	if !r.pss {
		return pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil), slices.Concat(h.info, r.digest), nil
	}
	salt, most := r.salt, k.size-2-r.hash.Size() // RFC 8017, 9.1.1; our moduli have whole bytes
	switch salt {
	case rsa.PSSSaltLengthAuto:
		salt = most
	case rsa.PSSSaltLengthEqualsHash:
		salt = r.hash.Size()
	}
	if salt < 0 || salt > most {
		return nil, nil, refuse("sign", "PSS salt of %d bytes with %v: this key has room for %d", salt, r.hash, most)
	}
	return pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_PSS, pkcs11.NewPSSParams(h.mech, h.mgf, uint(salt))), r.digest, nil
}

// normalise gives a signature its one form: some tokens drop leading zeros of
// an RSA signature. Whether it verifies is for the caller to see.
func (k key) normalise(sig []byte) ([]byte, error) {
	want := k.size // RSA
	if k.typ != pkcs11.CKK_RSA {
		want = 2 * k.size
	}
	switch {
	case len(sig) == want:
		return sig, nil
	case k.typ == pkcs11.CKK_RSA && len(sig) > 0 && len(sig) < want:
		return append(make([]byte, want-len(sig), want), sig...), nil
	}
	return nil, malformed("signature of %d bytes; this key makes %d", len(sig), want)
}
