package hsm_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/hsm"
)

func newEC(t testing.TB, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newRSA(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// certificate is a self-signed one.
func certificate(t testing.TB, k crypto.Signer, name string) []byte {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(0x1234), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// list is what the token holds, a line for each object, in order.
func list(t testing.TB, p *hsm.Pool) []string {
	t.Helper()
	objects, err := p.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, o := range objects {
		line := fmt.Sprintf("%v %s %s %s", o.Kind, o.Label, o.ID, o.Algorithm)
		if o.Kind == hsm.PrivateKey {
			line += fmt.Sprintf(" sensitive %d extractable %d never %d local %d", o.Sensitive, o.Extractable, o.NeverExtractable, o.Local)
		}
		if o.Kind == hsm.Certificate {
			line += " " + o.Subject + " " + o.Serial
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return lines
}

func TestImport(t *testing.T) {
	p := openPool(t, newToken(t))
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ctx, slot := p.LoadedCtx()
	for algorithm, k := range map[string]struct {
		key     crypto.Signer
		secrets []uint
	}{
		"rsa2048": {newRSA(t, 2048), []uint{pkcs11.CKA_PRIVATE_EXPONENT, pkcs11.CKA_PRIME_1, pkcs11.CKA_PRIME_2, pkcs11.CKA_EXPONENT_1, pkcs11.CKA_COEFFICIENT}},
		"p256":    {newEC(t, elliptic.P256()), []uint{pkcs11.CKA_VALUE}},
		"p384":    {newEC(t, elliptic.P384()), []uint{pkcs11.CKA_VALUE}},
		"ed25519": {ed, []uint{pkcs11.CKA_VALUE}},
	} {
		t.Run(algorithm, func(t *testing.T) {
			id := []byte(algorithm)
			pub, err := p.Import(t.Context(), "l of "+algorithm, id, k.key)
			if err != nil {
				t.Fatal(err)
			}
			again, err := p.PublicKey(t.Context(), id)
			if diff := cmp.Diff(pub, k.key.Public()) + cmp.Diff(again, pub); diff != "" || err != nil {
				t.Errorf("public key: %v\n%s", err, diff)
			}
			sig, err := p.Sign(t.Context(), id, d256, crypto.SHA256)
			if err == nil {
				err = check(k.key.Public(), d256, sig, crypto.SHA256)
			}
			if err != nil {
				t.Errorf("signing: %v", err)
			}
			der := certificate(t, k.key, "of "+algorithm)
			if err := p.ImportCertificate(t.Context(), id, der); err != nil {
				t.Fatal(err)
			}
			want := []string{
				fmt.Sprintf("certificate l of %s %[1]s %[1]s CN=of %[1]s 1234", algorithm),
				fmt.Sprintf("private key l of %s %[1]s %[1]s sensitive 2 extractable 1 never 1 local 1", algorithm),
				fmt.Sprintf("public key l of %s %[1]s %[1]s", algorithm),
			}
			if diff := cmp.Diff(list(t, p), want); diff != "" {
				t.Error(diff)
			}
			sh, err := ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
			if err != nil {
				t.Fatal(err)
			}
			defer ctx.CloseSession(sh)
			h := rawFind(t, ctx, sh, algorithm)
			for _, a := range k.secrets {
				v, err := ctx.GetAttributeValue(sh, h, []*pkcs11.Attribute{pkcs11.NewAttribute(a, nil)})
				if !errors.Is(err, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_SENSITIVE)) {
					t.Errorf("attribute %#x: got %v, %v; want CKR_ATTRIBUTE_SENSITIVE", a, v, err)
				}
			}
			if err := p.Delete(t.Context(), id); err != nil {
				t.Error(err)
			}
			if left := list(t, p); len(left) > 0 {
				t.Errorf("after Delete: %q", left)
			}
		})
	}
}

// What is refused changes nothing.
func TestImportRefuses(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	ctx := t.Context()
	good, other := newEC(t, elliptic.P256()), newEC(t, elliptic.P256())
	generate(t, p, "k", "p256")
	if _, err := p.Import(ctx, "certified", []byte("c"), good); err != nil {
		t.Fatal(err)
	}
	if err := p.ImportCertificate(ctx, []byte("c"), certificate(t, good, "first")); err != nil {
		t.Fatal(err)
	}
	mixed := *good
	mixed.PublicKey = other.PublicKey
	small := newRSA(t, 1024)
	before := list(t, p)
	f.arm(nil)
	imp := func(label, id string, k crypto.PrivateKey) error {
		_, err := p.Import(ctx, label, []byte(id), k)
		return err
	}
	for _, c := range []struct {
		name string
		err  error
		want string
		is   error // nil: refused as it stands
	}{
		{"id taken", imp("new", "k", good), "6b", hsm.ErrExists},
		{"label taken", imp("label of k", "new", good), "label of k", hsm.ErrExists},
		{"no label", imp("", "new", good), "label and an id", nil},
		{"no id", imp("new", "", good), "label and an id", nil},
		{"small RSA", imp("new", "new", small), "1024 bits", nil},
		{"P-521", imp("new", "new", newEC(t, elliptic.P521())), "P-256 or P-384", nil},
		{"halves of two keys", imp("new", "new", &mixed), "belong together", nil},
		{"a public key", imp("new", "new", good.Public()), "*ecdsa.PublicKey", nil},
		{"nothing", imp("new", "new", nil), "nil", nil},
		{"certificate of another key", p.ImportCertificate(ctx, []byte("k"), certificate(t, other, "other")), "another key", nil},
		{"second certificate", p.ImportCertificate(ctx, []byte("c"), certificate(t, good, "second")), "63", hsm.ErrExists},
		{"certificate of no key", p.ImportCertificate(ctx, []byte("x"), certificate(t, good, "x")), "78", hsm.ErrNotFound},
		{"no certificate", p.ImportCertificate(ctx, []byte("k"), []byte("x")), "x509", nil},
		{"huge certificate", p.ImportCertificate(ctx, []byte("k"), make([]byte, hsm.MaxCertificate+1)), "at most", nil},
	} {
		e, _ := errors.AsType[*hsm.Error](c.err)
		if c.err == nil || !strings.Contains(c.err.Error(), c.want) || c.is != nil && !errors.Is(c.err, c.is) || c.is == nil && (e == nil || !e.Refused()) {
			t.Errorf("%s: got %v, want %q, %v", c.name, c.err, c.want, c.is)
		}
	}
	if err := p.ImportCertificate(ctx, []byte("k"), make([]byte, hsm.MaxCertificate)); err == nil || strings.Contains(err.Error(), "at most") {
		t.Errorf("a certificate of as many bytes as there may be: %v", err)
	}
	if diff := cmp.Diff(list(t, p), before); diff != "" {
		t.Errorf("the token has changed:\n%s", diff)
	}
	for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY, pkcs11.CKO_CERTIFICATE} {
		if n := f.count(fmt.Sprintf("C_CreateObject %d", class)); n > 0 {
			t.Errorf("%d objects of class %d were made", n, class)
		}
	}
}

// What an Import that fails has made is gone again.
func TestImportUndoes(t *testing.T) {
	attribute := func(a uint) string { return fmt.Sprintf("C_GetAttributeValue %#x", a) }
	const private, public, cert = "C_CreateObject 3", "C_CreateObject 2", "C_CreateObject 1"
	key := newEC(t, elliptic.P256())
	der := certificate(t, key, "k")
	for _, c := range []struct {
		name, call string
		rv         uint
		n          int
		ok         bool // it is there all the same, at another attempt
		says       string
	}{
		{"extractable", attribute(pkcs11.CKA_EXTRACTABLE), 1, 1, false, "CKA_EXTRACTABLE"},
		{"not sensitive", attribute(pkcs11.CKA_SENSITIVE), 1, 1, false, "CKA_SENSITIVE"},
		{"decrypts", attribute(pkcs11.CKA_DECRYPT), 1, 1, false, "CKA_DECRYPT"},
		{"not in the clear", private, pkcs11.CKR_TEMPLATE_INCONSISTENT, 1, false, "in the clear"},
		{"attributes refused", private, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, 1, false, "vendor's own tool"},
		{"type of key refused", public, pkcs11.CKR_TEMPLATE_INCONSISTENT, 1, false, "CKR_TEMPLATE_INCONSISTENT"},
		{"private failed", private, pkcs11.CKR_DEVICE_ERROR, 1, false, "CKR_DEVICE_ERROR"},
		{"private failed but persisted", "after " + private, pkcs11.CKR_DEVICE_ERROR, 1, false, "CKR_DEVICE_ERROR"},
		{"public failed but persisted", "after " + public, pkcs11.CKR_DEVICE_ERROR, 1, false, "CKR_DEVICE_ERROR"},
		{"does not sign", "C_SignInit", pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, 1, false, "NOT_PERMITTED"},
		{"fails to sign", "C_Sign", pkcs11.CKR_DEVICE_ERROR, 1, false, "CKR_DEVICE_ERROR"},
		{"busy but persisted", "after " + private, pkcs11.CKR_FUNCTION_FAILED, 2, true, ""},
		{"session lost but persisted", "after " + private, pkcs11.CKR_SESSION_HANDLE_INVALID, 1, true, ""},
		{"certificate refused", cert, pkcs11.CKR_TEMPLATE_INCONSISTENT, 1, false, "CKR_TEMPLATE_INCONSISTENT"},
		{"certificate failed but persisted", "after " + cert, pkcs11.CKR_DEVICE_ERROR, 1, false, "CKR_DEVICE_ERROR"},
		{"certificate busy but persisted", "after " + cert, pkcs11.CKR_FUNCTION_FAILED, 2, true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, f := openFaulty(t, newToken(t))
			certifies := strings.HasSuffix(c.call, cert)
			act := func() error {
				if certifies {
					return p.ImportCertificate(t.Context(), []byte("k"), der)
				}
				_, err := p.Import(t.Context(), "l", []byte("k"), key)
				return err
			}
			if certifies {
				if _, err := p.Import(t.Context(), "l", []byte("k"), key); err != nil {
					t.Fatal(err)
				}
			}
			before := list(t, p)
			f.arm(times(c.n, c.call, c.rv))
			err := act()
			if (err == nil) != c.ok || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want ok = %v, %q", err, c.ok, c.says)
			}
			f.arm(nil)
			if now := list(t, p); c.ok == (len(now) == len(before)) {
				t.Errorf("afterwards: %q", now)
			}
			if !c.ok {
				if err := act(); err != nil {
					t.Errorf("once more: %v", err)
				}
			}
		})
	}
}

// Where undoing fails too, the error says what may be left, and Delete removes it.
func TestImportLeaves(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	f.arm(func(call string) error {
		switch call {
		case "after C_CreateObject 3", "C_DestroyObject":
			return pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)
		}
		return nil
	})
	_, err := p.Import(t.Context(), "l", []byte("k"), newEC(t, elliptic.P256()))
	if e, ok := errors.AsType[*hsm.Error](err); !ok || !e.Gone() || !strings.Contains(err.Error(), "may be left") {
		t.Errorf("got %v", err)
	}
	f.arm(nil)
	if err := p.Delete(t.Context(), []byte("k")); err != nil {
		t.Error(err)
	}
	if left := list(t, p); len(left) > 0 {
		t.Errorf("after Delete: %q", left)
	}
}

// A caller that leaves while the key is brought in leaves none behind.
func TestImportAbandoned(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	key := newEC(t, elliptic.P256())
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan struct{})
	f.arm(func(call string) error {
		if call == "after C_CreateObject 3" {
			cancel()
			<-left
		}
		return nil
	})
	if _, err := p.Import(ctx, "l", []byte("k"), key); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want Canceled", err)
	}
	close(left)
	f.arm(nil)
	// Delete waits for its turn, which the import still has.
	if err := p.Delete(t.Context(), []byte("k")); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("a key was left: %v", err)
	}
	if left := list(t, p); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// The list has what others have put into the token, whatever it is.
func TestList(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	if all := list(t, p); len(all) > 0 {
		t.Errorf("an empty token has %q", all)
	}
	generate(t, p, "mine", "p256")
	ctx, slot := p.LoadedCtx()
	sh, err := ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	defer ctx.CloseSession(sh)
	set := pkcs11.NewAttribute
	const many = 70 // more than are found at once
	for i := range many {
		_, err := ctx.CreateObject(sh, []*pkcs11.Attribute{
			set(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), set(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), set(pkcs11.CKA_TOKEN, true),
			set(pkcs11.CKA_VALUE, make([]byte, 16)), set(pkcs11.CKA_LABEL, fmt.Sprintf("aes %d", i)), set(pkcs11.CKA_EXTRACTABLE, true), set(pkcs11.CKA_SENSITIVE, false),
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	_, _, err = ctx.GenerateKeyPair(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
		[]*pkcs11.Attribute{set(pkcs11.CKA_EC_PARAMS, []byte{6, 5, 0x2b, 0x81, 4, 0, 0x23}), set(pkcs11.CKA_TOKEN, true)},
		[]*pkcs11.Attribute{set(pkcs11.CKA_TOKEN, true), set(pkcs11.CKA_EXTRACTABLE, true), set(pkcs11.CKA_LABEL, "\x1b[31mred\n")})
	if err != nil {
		t.Fatal(err)
	}
	f.arm(nil)
	all, err := p.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	count := map[hsm.Kind]int{}
	for _, o := range all {
		count[o.Kind]++
		switch {
		case o.Kind == hsm.SecretKey:
			if o.Algorithm != "aes" || o.Sensitive != hsm.No || o.Extractable != hsm.Yes {
				t.Errorf("%+v", o)
			}
		case o.Kind == hsm.PrivateKey && o.Label != "label of mine":
			if o.Label != "\x1b[31mred\n" || o.Algorithm != "curve 06052b81040023" || o.Extractable != hsm.Yes || o.Local != hsm.Yes {
				t.Errorf("%+v", o)
			}
		}
	}
	if diff := cmp.Diff(count, map[hsm.Kind]int{hsm.PrivateKey: 2, hsm.PublicKey: 2, hsm.SecretKey: many}); diff != "" {
		t.Error(diff)
	}
	for _, a := range []uint{pkcs11.CKA_VALUE, pkcs11.CKA_PRIVATE_EXPONENT, pkcs11.CKA_PRIME_1} {
		if n := f.count(fmt.Sprintf("C_GetAttributeValue %#x", a)); n > 0 {
			t.Errorf("attribute %#x was read %d times", a, n)
		}
	}
	if n := f.count("read-write session"); n > 0 {
		t.Errorf("%d read-write sessions to list", n)
	}
	if err := p.Delete(t.Context(), []byte("mine")); err != nil || f.count("read-write session") != 1 {
		t.Errorf("Delete: %v, %d read-write sessions", err, f.count("read-write session"))
	}
}

// A list has a bound, and one that was cut off is none.
func TestListFails(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	generate(t, p, "k", "p256")
	f.endless = true
	f.arm(nil)
	if all, err := p.List(t.Context()); err == nil || all != nil || !strings.Contains(err.Error(), "more than 10000") || f.count("C_FindObjects") > hsm.MaxObjects {
		t.Errorf("an endless token: %d objects, %v, after %d calls", len(all), err, f.count("C_FindObjects"))
	}
	f.endless = false
	for _, c := range []struct {
		call string
		rv   uint
		n    int
		ok   bool
	}{
		{"C_FindObjects", pkcs11.CKR_DEVICE_ERROR, 1, false},
		{"C_FindObjects", pkcs11.CKR_FUNCTION_FAILED, 2, true},
		{"C_FindObjects", pkcs11.CKR_SESSION_HANDLE_INVALID, 1, true},
	} {
		f.arm(times(c.n, c.call, c.rv))
		all, err := p.List(t.Context())
		if (err == nil) != c.ok || c.ok != (len(all) == 2) {
			t.Errorf("%s %d times %#x: %d objects, %v", c.call, c.n, c.rv, len(all), err)
		}
	}
}
