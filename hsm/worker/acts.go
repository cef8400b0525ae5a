package worker

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/signwarden/signwarden/hsm"
)

// Generate is [hsm.Pool.Generate], done by a worker of its own. When ctx ends
// first, that worker destroys what it makes. Where it dies a pair with this id
// may remain, for Delete.
func (t *Token) Generate(ctx context.Context, label string, id []byte, algorithm string) (crypto.PublicKey, error) {
	b, err := t.act(ctx, "generate", kindGenerate, generation{label, id, algorithm}.append(nil))
	if err != nil {
		return nil, left(err, id)
	}
	return parsePublic(b)
}

// left adds what may be in the token to the error of an act whose worker died.
func left(err error, id []byte) error {
	if e, ok := errors.AsType[*hsm.Error](err); ok && e.Class == hsm.ClassCrashed {
		return fmt.Errorf("%w; an object with id %x may be left in the token; `signwardend token delete` destroys it", err, id)
	}
	return err
}

// Import is [hsm.Pool.Import], done by a worker of its own, which gets the key by its
// socket pair and ends. When ctx ends first, that worker destroys what it has made.
// Where it dies a key with this id may remain, for Delete.
func (t *Token) Import(ctx context.Context, label string, id []byte, private crypto.PrivateKey) (crypto.PublicKey, error) {
	if err := hsm.Importable(private); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	defer clear(der)
	b, err := t.act(ctx, "import", kindImport, appendImport(label, id, der))
	if err != nil {
		return nil, left(err, id)
	}
	return parsePublic(b)
}

// ImportCertificate is [hsm.Pool.ImportCertificate], done by a worker of its own.
func (t *Token) ImportCertificate(ctx context.Context, id, der []byte) error {
	_, err := t.act(ctx, "import certificate", kindCertificate, append(appendString(nil, id), der...))
	return left(err, id)
}

// List is [hsm.Pool.List], done by a worker of its own.
func (t *Token) List(ctx context.Context) ([]hsm.Object, error) {
	b, err := t.act(ctx, "list", kindList, nil)
	if err != nil {
		return nil, err
	}
	return parseObjects(b)
}

// Delete is [hsm.Pool.Delete], done by a worker of its own.
func (t *Token) Delete(ctx context.Context, id []byte) error {
	_, err := t.act(ctx, "delete", kindDelete, bytes.Clone(id))
	return err
}

// Admin is a token for who administers it: each act is done by a worker that starts
// for it, and there are no others. Safe for concurrent use; one act is done at a time.
type Admin struct{ t *Token }

// Administer returns a token that nothing has been asked of yet. Of c it is Module, Env,
// TokenLabel, Profile, PIN, Tries, StartTimeout and Logger that count.
func Administer(c Config) *Admin {
	c.ReadPIN = nil // who administers acts once, and looks himself
	return &Admin{newToken(context.Background(), c)}
}

// Import is [Token.Import].
func (a *Admin) Import(ctx context.Context, label string, id []byte, private crypto.PrivateKey) (crypto.PublicKey, error) {
	return a.t.Import(ctx, label, id, private)
}

// ImportCertificate is [Token.ImportCertificate].
func (a *Admin) ImportCertificate(ctx context.Context, id, der []byte) error {
	return a.t.ImportCertificate(ctx, id, der)
}

// List is [Token.List].
func (a *Admin) List(ctx context.Context) ([]hsm.Object, error) { return a.t.List(ctx) }

// Delete is [Token.Delete].
func (a *Admin) Delete(ctx context.Context, id []byte) error { return a.t.Delete(ctx, id) }

// Close waits for the act that is being done, or undone, and its worker's end.
func (a *Admin) Close() error { return a.t.Close() }

// appendImport makes the body of a request to import: label, id, and PKCS #8 as the rest.
func appendImport(label string, id, der []byte) []byte {
	// All at once: what append outgrows would keep a copy of the key.
	body := make([]byte, 0, 2+len(label)+2+len(id)+len(der))
	return append(appendString(appendString(body, label), id), der...)
}

func parseImport(b []byte) (label string, id []byte, private crypto.PrivateKey, err error) {
	d := decoder{b: b}
	label, id = d.string(), d.bytes()
	der := d.rest()
	if err := d.end("import"); err != nil {
		return "", nil, nil, err
	}
	private, err = x509.ParsePKCS8PrivateKey(der)
	var again []byte
	if err == nil {
		again, err = x509.MarshalPKCS8PrivateKey(private)
		defer clear(again)
	}
	if err != nil || !bytes.Equal(again, der) {
		return "", nil, nil, fmt.Errorf("%w: import", errFrame) // and no more: another text might tell of the key
	}
	return label, id, private, nil
}

func parseCertificate(b []byte) (id, der []byte, err error) {
	d := decoder{b: b}
	id, der = d.bytes(), d.rest()
	return id, der, d.end("certificate")
}

// appendObjects encodes a list, whose first parts it gives to part. Each is of whole
// objects.
func appendObjects(objects []hsm.Object, part func([]byte)) []byte {
	var b []byte
	for _, o := range objects {
		n := len(b)
		b = appendObject(b, o)
		if len(b) > maxBody {
			part(b[:n])
			b = append(b[:0], b[n:]...)
		}
	}
	return b
}

func appendObject(dst []byte, o hsm.Object) []byte {
	dst = append(dst, byte(o.Kind))
	dst = appendString(appendString(appendString(dst, o.Label), o.ID), o.Algorithm)
	dst = append(dst, byte(o.Sensitive), byte(o.Extractable), byte(o.NeverExtractable), byte(o.Local))
	return appendString(appendString(dst, o.Subject), o.Serial)
}

func parseObjects(b []byte) ([]hsm.Object, error) {
	d := decoder{b: b}
	var all []hsm.Object
	said := func() hsm.Said {
		v := hsm.Said(d.byte())
		d.bad = d.bad || v > hsm.Yes
		return v
	}
	for !d.bad && len(d.b) > 0 {
		o := hsm.Object{Kind: hsm.Kind(d.byte()), Label: d.string(), ID: bytes.Clone(d.bytes()), Algorithm: d.string()}
		o.Sensitive, o.Extractable, o.NeverExtractable, o.Local = said(), said(), said(), said()
		o.Subject, o.Serial = d.string(), d.string()
		d.bad = d.bad || o.Kind < hsm.PrivateKey || o.Kind > hsm.Certificate || len(all) == hsm.MaxObjects
		all = append(all, o)
	}
	if err := d.end("list"); err != nil {
		return nil, err
	}
	return all, nil
}
