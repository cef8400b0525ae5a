package hsm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Kind is the class of an object.
type Kind byte

// The kinds that List tells of.
const (
	PrivateKey Kind = iota + 1
	PublicKey
	SecretKey
	Certificate
)

func (k Kind) String() string {
	return map[Kind]string{PrivateKey: "private key", PublicKey: "public key", SecretKey: "secret key", Certificate: "certificate"}[k]
}

// Said is what a token says of a property, where it says anything.
type Said byte

const (
	NotSaid Said = iota
	No
	Yes
)

// An Object is what a token tells of one of its keys or certificates. Its strings are
// as the token has them: they may hold anything.
type Object struct {
	Kind  Kind
	Label string
	ID    []byte // CKA_ID
	// Algorithm is that of a key, or of the key that a certificate is for: rsa with
	// the bits, p256, p384, ed25519, or what the token calls it; empty: not told.
	Algorithm string

	// Of private and secret keys.
	Sensitive, Extractable, NeverExtractable, Local Said

	// Of certificates.
	Subject string
	Serial  string // hexadecimal
}

// Bounds of List: objects of a token, bytes of a label, id, subject and serial
// number that it tells, and handles that the token is asked for at a time.
const (
	MaxObjects = 10_000
	MaxTold    = 1 << 10
	findAtOnce = 64
)

// List tells of every public, private and secret key and certificate in the token.
// It reads no value of a private or secret key. A token with more than MaxObjects is
// an error.
func (p *Pool) List(ctx context.Context) ([]Object, error) {
	var all []Object
	err := p.do(ctx, "list", func(j *job, w *worker) error {
		var found []Object
		for _, c := range listed {
			hs, err := w.findAll(c.class, MaxObjects-len(found))
			if err != nil {
				return err
			}
			for _, h := range hs {
				if j.outcome.Load() == abandoned {
					return context.Canceled // nobody's
				}
				o, err := w.describe(c.kind, h)
				if err != nil {
					return err
				}
				found = append(found, o)
			}
		}
		// A token shows nothing private to who is not logged in, and does not say so.
		in, err := p.loggedIn(w.sh)
		if err == nil && !in {
			err = &Error{Op: "C_FindObjects", Code: pkcs11.CKR_USER_NOT_LOGGED_IN, Class: ClassLogin}
		}
		if err == nil && j.keep() {
			all = found
		}
		return err
	})
	return all, err
}

var listed = []struct {
	kind  Kind
	class uint
}{
	{PrivateKey, pkcs11.CKO_PRIVATE_KEY},
	{PublicKey, pkcs11.CKO_PUBLIC_KEY},
	{SecretKey, pkcs11.CKO_SECRET_KEY},
	{Certificate, pkcs11.CKO_CERTIFICATE},
}

// findAll finds the objects of a class, no more than most.
func (w *worker) findAll(class uint, most int) ([]pkcs11.ObjectHandle, error) {
	if err := w.p.api.FindObjectsInit(w.sh, []*pkcs11.Attribute{set(pkcs11.CKA_CLASS, class)}); err != nil {
		return nil, w.p.profile.fail("C_FindObjectsInit", err)
	}
	var all []pkcs11.ObjectHandle
	for {
		hs, _, err := w.p.api.FindObjects(w.sh, findAtOnce)
		all = append(all, hs...)
		if err == nil && len(hs) > 0 && len(all) <= most {
			continue
		}
		ferr := w.p.api.FindObjectsFinal(w.sh)
		switch {
		case err != nil:
			return nil, w.p.profile.fail("C_FindObjects", err)
		case len(all) > most:
			return nil, refuse("list", "the token holds more than %d objects", MaxObjects)
		}
		return all, w.p.profile.fail("C_FindObjectsFinal", ferr)
	}
}

// told reads an attribute that a token need not have, nor tell.
func (w *worker) told(h pkcs11.ObjectHandle, a uint) ([]byte, error) {
	v, err := w.attribute(h, a)
	if e, ok := errors.AsType[*Error](err); ok && e.Class == ClassRefused {
		return nil, nil
	}
	return v, err
}

// short is told, cut to what List tells.
func (w *worker) short(h pkcs11.ObjectHandle, a uint) ([]byte, error) {
	v, err := w.told(h, a)
	return v[:min(len(v), MaxTold)], err
}

func (w *worker) describe(kind Kind, h pkcs11.ObjectHandle) (Object, error) {
	o := Object{Kind: kind}
	label, err := w.short(h, pkcs11.CKA_LABEL)
	if err != nil {
		return o, err
	}
	o.Label = string(label)
	if o.ID, err = w.short(h, pkcs11.CKA_ID); err != nil {
		return o, err
	}
	if kind == Certificate {
		err := w.describeCertificate(h, &o)
		return o, err
	}
	if o.Algorithm, err = w.algorithm(kind, h); err != nil || kind == PublicKey {
		return o, err
	}
	for _, a := range []struct {
		typ uint
		to  *Said
	}{
		{pkcs11.CKA_SENSITIVE, &o.Sensitive}, {pkcs11.CKA_EXTRACTABLE, &o.Extractable},
		{pkcs11.CKA_NEVER_EXTRACTABLE, &o.NeverExtractable}, {pkcs11.CKA_LOCAL, &o.Local},
	} {
		v, err := w.told(h, a.typ)
		if err != nil {
			return o, err
		}
		switch {
		case len(v) != 1:
		case v[0] == 0:
			*a.to = No
		default:
			*a.to = Yes
		}
	}
	return o, nil
}

// algorithm reads what is public of a key, also of its private half.
func (w *worker) algorithm(kind Kind, h pkcs11.ObjectHandle) (string, error) {
	typ, err := w.number(h, pkcs11.CKA_KEY_TYPE)
	if err != nil {
		if e, ok := errors.AsType[*Error](err); ok && e.Class == ClassRefused {
			return "", nil
		}
		return "", err
	}
	switch {
	case kind == SecretKey && typ == pkcs11.CKK_AES:
		return "aes", nil
	case kind == SecretKey:
	case typ == pkcs11.CKK_RSA:
		n, err := w.told(h, pkcs11.CKA_MODULUS)
		n = bytes.TrimLeft(n, "\x00")
		if err != nil || len(n) == 0 {
			return "rsa", err
		}
		bits := 8 * len(n)
		for b := n[0]; b < 0x80; b <<= 1 {
			bits--
		}
		return fmt.Sprintf("rsa%d", bits), nil
	case typ == pkcs11.CKK_EC || typ == ckkECEdwards:
		params, err := w.told(h, pkcs11.CKA_EC_PARAMS)
		if err != nil {
			return "", err
		}
		if c, err := curveOf(typ, params); err == nil {
			return c.algorithm, nil
		}
		return fmt.Sprintf("curve %x", params[:min(len(params), 32)]), nil
	}
	return fmt.Sprintf("CKK 0x%X", typ), nil
}

// describeCertificate reads a certificate; one that is no X.509, or that Go does not
// take, has no subject.
func (w *worker) describeCertificate(h pkcs11.ObjectHandle, o *Object) error {
	der, err := w.told(h, pkcs11.CKA_VALUE)
	if err != nil || len(der) > MaxCertificate {
		return err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil
	}
	o.Subject, o.Serial = c.Subject.String(), fmt.Sprintf("%x", c.SerialNumber)
	o.Subject, o.Serial = o.Subject[:min(len(o.Subject), MaxTold)], o.Serial[:min(len(o.Serial), MaxTold)]
	o.Algorithm = Algorithm(c.PublicKey)
	switch k := c.PublicKey.(type) {
	case *rsa.PublicKey:
		o.Algorithm = fmt.Sprintf("rsa%d", k.N.BitLen())
	case *ecdsa.PublicKey:
		if o.Algorithm == "" {
			o.Algorithm = k.Params().Name
		}
	}
	return nil
}
