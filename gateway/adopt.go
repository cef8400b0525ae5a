package gateway

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
)

// Bounds of an adoption: of a CKA_ID, and of a certificate, in bytes.
const (
	MaxTokenID = 64
	MaxOpenPGP = 128 << 10
)

var errLongOpenPGP = fmt.Errorf("%w: the OpenPGP certificate has more than %d bytes; gpg --export-options export-minimal leaves out what others certified", sigerr.Invalid, MaxOpenPGP)

// Adoption says which key of the token to register, and how.
type Adoption struct {
	Name string
	ID   []byte // CKA_ID
	// OpenPGP is a certificate in which the key signs, armored or not; nil: none.
	OpenPGP []byte
	// PrimaryID is the CKA_ID of the certificate's primary key, where the key is a
	// subkey and its primary is in the token too; empty where it is kept off line.
	PrimaryID []byte
}

func (a *Adoption) check(canInspect bool) error {
	if err := keys.CheckName(a.Name); err != nil {
		return err
	}
	switch {
	case len(a.ID) == 0 || len(a.ID) > MaxTokenID || len(a.PrimaryID) > MaxTokenID:
		return fmt.Errorf("%w: a token's id has 1 to %d bytes", sigerr.Invalid, MaxTokenID)
	case len(a.OpenPGP) == 0 && len(a.PrimaryID) > 0:
		return fmt.Errorf("%w: a primary key is of an OpenPGP certificate; give that too", sigerr.Invalid)
	case len(a.OpenPGP) > MaxOpenPGP:
		return errLongOpenPGP
	case len(a.OpenPGP) > 0 && !canInspect:
		return fmt.Errorf("%w: this gateway takes no OpenPGP certificates", sigerr.Invalid)
	case bytes.Equal(a.ID, a.PrimaryID):
		return fmt.Errorf("%w: where the key is the certificate's primary key itself, leave the primary's id out", sigerr.Invalid)
	}
	return nil
}

// AdoptKey registers a key that is in the token and that the gateway did not make. Needs
// an admin rule for every key: of what else is in the token no rule says whose it is. A key of which the gateway knows already, by its id or its
// public key, is refused. Nothing in the token changes, whatever comes of it.
//
// Before it is registered the key has made one signature, which verifies with the public
// key that the token shows; that one is pinned from then on, as with CreateKey.
func (g *Gateway) AdoptKey(ctx context.Context, p ident.Principal, frontEnd string, ad Adoption) (keys.Key, error) {
	a, err := g.beginKey(ctx, p, "key.adopt", ad.Name, frontEnd, ofAll, func(time.Time) error { return ad.check(g.c.Inspect != nil) })
	if err != nil {
		return keys.Key{}, err
	}
	defer g.unreserve(ad.Name)
	a.e.Detail = fmt.Sprintf("token %q, id %x", g.c.TokenLabel, ad.ID)
	k, err := g.examine(ctx, ad)
	if err != nil {
		return keys.Key{}, g.unadopted(a, ad, err)
	}
	a.e.KeyFingerprint = k.Fingerprint()
	a.e.Detail += fmt.Sprintf(", algorithm %s", k.Algorithm)
	if o := k.OpenPGP; o != nil {
		a.e.Detail = clip(a.e.Detail + fmt.Sprintf(", user id %q, layout %s", o.UserID, o.Layout))
		if o.OffLine() {
			a.e.Detail += ", primary key off line"
		}
	}
	if k.OpenPGP != nil {
		// An amendment under way has counted the keys of its certificate. One that came
		// between would miss what it does to them: a revocation.
		g.amending.Lock()
		defer g.amending.Unlock()
	}
	g.admin.Lock()
	defer g.admin.Unlock()
	if err := g.still(p, ofAll); err != nil {
		return keys.Key{}, g.fail(a, audit.Denied, err)
	}
	// Not before: another one may have adopted it meanwhile, and nobody can any more.
	if err := g.unclaimed(ctx, g.snap.Load(), &k); err != nil {
		return keys.Key{}, g.unadopted(a, ad, err)
	}
	err = g.commit(ctx, a, store.Change{CreateKey: &k}, func(s *snapshot) bool {
		now := s.keys.Get(k.Name)
		return now != nil && bytes.Equal(now.ID, k.ID)
	})
	if err != nil {
		return keys.Key{}, err
	}
	return k, nil
}

// unadopted records why a key was not registered, and returns the caller's error.
func (g *Gateway) unadopted(a act, ad Adoption, err error) error {
	if missing(err) {
		err = fmt.Errorf("%w: no token that works has both halves of a key with the id %x; `signwardend token list` shows what there is", sigerr.Invalid, ad.ID)
	}
	if k := sigerr.Kind(err); k == sigerr.Invalid || k == sigerr.Conflict || k == sigerr.Denied || k == sigerr.Unavailable {
		return g.fail(a, audit.Denied, err)
	}
	g.log.Error("adopting a key", "key", ad.Name, "error", err)
	_, err = g.refuse(a.e, audit.Failed, tokenError(err), err.Error())
	return err
}

// examine reads the key from the token, has it sign, and reads its certificate.
func (g *Gateway) examine(ctx context.Context, ad Adoption) (keys.Key, error) {
	ctx, cancel := context.WithTimeout(ctx, g.c.SignTimeout)
	defer cancel()
	// Not to have a key sign that is somebody's already; asked again when it is registered.
	if err := g.unused(ctx, ad.ID, ad.PrimaryID); err != nil {
		return keys.Key{}, err
	}
	signer, err := g.trySign(ctx, ad.ID)
	if err != nil {
		return keys.Key{}, err
	}
	k := keys.Key{
		Name: ad.Name, Algorithm: signer.algorithm, State: keys.Enabled, Token: g.c.TokenLabel, ID: bytes.Clone(ad.ID),
		Created: g.c.Now().UTC().Truncate(time.Second),
	}
	if k.Public, err = x509.MarshalPKIXPublicKey(signer.public); err != nil || len(ad.OpenPGP) == 0 {
		return k, err
	}
	in, err := g.c.Inspect(ad.OpenPGP, signer.public, g.c.Now())
	if err != nil {
		return k, err
	}
	if err := checkUserID(in.UserID); err != nil {
		return k, err
	}
	k.Created = in.Created
	k.OpenPGP = &keys.OpenPGP{UserID: in.UserID, Layout: keys.Single, Expires: in.Expires, Certificate: in.Certificate}
	if in.Primary == nil {
		if len(ad.PrimaryID) > 0 {
			return k, fmt.Errorf("%w: the key is the primary key of this certificate itself; leave the primary's id out", sigerr.Invalid)
		}
		return k, nil
	}
	k.OpenPGP.Layout = keys.Subkey
	if k.OpenPGP.PrimaryPublic, err = x509.MarshalPKIXPublicKey(in.Primary); err != nil || len(ad.PrimaryID) == 0 {
		return k, err
	}
	primary, err := g.trySign(ctx, ad.PrimaryID)
	if missing(err) {
		return k, fmt.Errorf("%w: no token that works has both halves of a key with the primary's id %x", sigerr.Invalid, ad.PrimaryID)
	}
	if err != nil {
		return k, err
	}
	if same, ok := in.Primary.(interface{ Equal(crypto.PublicKey) bool }); !ok || !same.Equal(primary.public) {
		return k, fmt.Errorf("%w: the key with the id %x is not the primary key of this certificate", sigerr.Invalid, ad.PrimaryID)
	}
	k.OpenPGP.PrimaryID = bytes.Clone(ad.PrimaryID)
	return k, nil
}

// trySign reads a public key from the token, and has the private one sign: the signature
// verifies, or it is an error.
func (g *Gateway) trySign(ctx context.Context, id []byte) (*tokenSigner, error) {
	pub, err := g.c.Token.PublicKey(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("reading the public key with id %x: %w", id, err)
	}
	algorithm := keys.AlgorithmOf(pub)
	if algorithm == "" {
		return nil, fmt.Errorf("%w: the key with the id %x is none of %v", sigerr.Invalid, id, keys.Algorithms)
	}
	t := &tokenSigner{ctx: ctx, token: g.c.Token, id: id, algorithm: algorithm, public: pub}
	digest := make([]byte, sha256.Size)
	rand.Read(digest)
	_, err = t.Sign(nil, digest, crypto.SHA256)
	return t, err
}

var errTaken = fmt.Errorf("%w: the key is registered already, or being made", sigerr.Conflict)

// unused refuses ids that are registered, or being made: the key's own as anything, and
// its primary's as that of a key which signs.
func (g *Gateway) unused(ctx context.Context, id, primary []byte) error {
	st, err := g.c.Store.Load(ctx)
	if err != nil {
		return g.unrecorded(err)
	}
	for _, pair := range st.Pending {
		if bytes.Equal(pair.ID, id) || bytes.Equal(pair.ID, primary) {
			return errTaken
		}
	}
	for _, other := range st.Keys {
		if bytes.Equal(other.ID, id) || bytes.Equal(other.ID, primary) || other.OpenPGP != nil && bytes.Equal(other.OpenPGP.PrimaryID, id) {
			return errTaken
		}
	}
	return nil
}

// unclaimed refuses a key that is registered, or being made, under any name, and a
// certificate that others have too, unless it is the same.
// admin is held.
func (g *Gateway) unclaimed(ctx context.Context, s *snapshot, k *keys.Key) error {
	var primaryID, primary []byte
	if k.OpenPGP != nil {
		primaryID, primary = k.OpenPGP.PrimaryID, primaryOf(&keys.Registered{Key: *k})
	}
	if err := g.unused(ctx, k.ID, primaryID); err != nil {
		return err
	}
	for _, name := range s.keys.Names() {
		other := s.keys.Get(name)
		o := other.OpenPGP
		if bytes.Equal(other.Public, k.Public) || o != nil && bytes.Equal(o.PrimaryPublic, k.Public) {
			return errTaken
		}
		if o == nil || primary == nil || !bytes.Equal(primaryOf(other), primary) {
			continue
		}
		if !bytes.Equal(o.Certificate, k.OpenPGP.Certificate) || !bytes.Equal(o.PrimaryID, primaryID) {
			return fmt.Errorf("%w: the certificate is that of %s too, as another version or with its primary key elsewhere; give the one that `signwarden key export` prints, and the same primary", sigerr.Conflict, name)
		}
	}
	return nil
}

// certifies says whether the gateway can change the certificate of a key.
func certifies(k *keys.Registered) error {
	if !k.OpenPGP.OffLine() {
		return nil
	}
	return fmt.Errorf("%w: the primary key of the certificate of %s is in no token, and the gateway cannot certify with it: change the certificate where the primary key is, then `signwarden key openpgp replace`; `signwarden key disable` stops the key here", sigerr.Invalid, k.Name)
}

// replacement reads a certificate that was changed where its primary key is, for each key
// in it. One that is enabled may sign in it still.
func (g *Gateway) replacement(s *snapshot, k *keys.Registered, cert []byte) ([]store.SetOpenPGP, error) {
	switch {
	case g.c.Inspect == nil:
		return nil, fmt.Errorf("%w: this gateway takes no OpenPGP certificates", sigerr.Invalid)
	case !k.OpenPGP.OffLine():
		return nil, fmt.Errorf("%w: the primary key of the certificate of %s is in the token: have the gateway change it, with renew, add-uid, rotate or revoke", sigerr.Invalid, k.Name)
	}
	now := g.c.Now()
	in, err := g.c.Inspect(cert, k.PublicKey, now)
	if err != nil {
		return nil, err
	}
	primary, err := x509.MarshalPKIXPublicKey(in.Primary)
	if err != nil || !bytes.Equal(primary, k.OpenPGP.PrimaryPublic) {
		return nil, fmt.Errorf("%w: it is a certificate of another primary key", sigerr.Invalid)
	}
	var set []store.SetOpenPGP
	for _, other := range s.together(k) {
		o := store.SetOpenPGP{Name: other.Name, Certificate: in.Certificate, Expires: other.OpenPGP.Expires}
		its, err := g.c.Inspect(cert, other.PublicKey, now)
		if err != nil && other.State == keys.Enabled {
			return nil, fmt.Errorf("key %s, of the same certificate: %w", other.Name, err)
		}
		if err == nil {
			o.Expires = its.Expires
		}
		set = append(set, o)
	}
	return set, nil
}
