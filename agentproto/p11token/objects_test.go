package p11token_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/agentproto/p11rpc"
	"github.com/signwarden/signwarden/agentproto/p11token"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// attributesOf reads what an object has, among all types up to 0x300.
func (c *client) attributesOf(t *testing.T, h uint64) map[uint64]string {
	t.Helper()
	out := map[uint64]string{}
	for typ := range uint64(0x300) {
		a, rv := c.attribute(t, 1, h, typ)
		switch {
		case rv == 0 && p11rpc.ClassOf(typ) == p11rpc.ClassBytes:
			out[typ] = hex.EncodeToString(a.Bytes)
		case rv == 0:
			out[typ] = fmt.Sprintf("%d/%d", a.Num, a.Len)
		case rv == 0x11:
			out[typ] = "secret"
		case rv != 0x12 || !a.Missing:
			t.Errorf("attribute 0x%x: %+v, 0x%x", typ, a, uint64(rv))
		}
	}
	return out
}

// Each attribute of each kind of object, and no other.
func TestAttributes(t *testing.T) {
	const yes, no = "1/1", "0/1"
	keys := newSoftKeys("rsa", "p256", "p521")
	c := open(t, keys)
	spki := func(name string) []byte {
		der, err := x509.MarshalPKIXPublicKey(keys.signers[name].Public())
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	id := func(der []byte) string { sum := sha256.Sum256(der); return hex.EncodeToString(sum[:20]) }
	leaf, err := x509.ParseCertificate(keys.chains["rsa"][0])
	if err != nil {
		t.Fatal(err)
	}
	common := func(class int, label, id string) map[uint64]string {
		return map[uint64]string{
			0x0: fmt.Sprintf("%d/8", class), 0x1: yes, 0x2: no, 0x3: hex.EncodeToString([]byte(label)), 0x102: id,
			0x170: no, 0x171: no, 0x172: "00",
		}
	}
	private := func(more map[uint64]string) map[uint64]string {
		for typ, v := range map[uint64]string{
			0x11: "secret", 0x103: yes, 0x105: no, 0x107: no, 0x108: yes, 0x109: no, 0x10c: no, 0x162: no, 0x164: yes, 0x165: yes,
			0x202: no, 0x210: no, 0x123: "secret", 0x124: "secret", 0x125: "secret", 0x126: "secret", 0x127: "secret", 0x128: "secret",
		} {
			more[typ] = v
		}
		return more
	}
	n := modulusOf(t, "rsa")
	for _, tt := range []struct {
		name  string
		class uint64
		key   string
		want  map[uint64]string
	}{
		{"RSA private key", 3, "rsa", private(map[uint64]string{
			0x100: "0/8", 0x101: hex.EncodeToString(leaf.RawSubject), 0x120: n, 0x122: "010001", 0x129: hex.EncodeToString(spki("rsa")),
		})},
		{"RSA public key", 2, "rsa", map[uint64]string{
			0x86: no, 0x100: "0/8", 0x101: hex.EncodeToString(leaf.RawSubject), 0x104: no, 0x106: no, 0x10a: yes, 0x10b: no, 0x10c: no,
			0x120: n, 0x121: "2048/8", 0x122: "010001", 0x129: hex.EncodeToString(spki("rsa")),
		}},
		{"EC private key without a certificate", 3, "p521", private(map[uint64]string{
			0x100: "3/8", 0x180: "06052b81040023", 0x129: hex.EncodeToString(spki("p521")),
		})},
		{"EC public key without a certificate", 2, "p521", map[uint64]string{
			0x86: no, 0x100: "3/8", 0x104: no, 0x106: no, 0x10a: yes, 0x10b: no, 0x10c: no,
			0x180: "06052b81040023", 0x181: "048185" + pointOf(t, "p521"), 0x129: hex.EncodeToString(spki("p521")),
		}},
		{"certificate", 1, "rsa", map[uint64]string{
			0x11: hex.EncodeToString(leaf.Raw), 0x80: "0/8", 0x81: hex.EncodeToString(leaf.RawIssuer), 0x86: no, 0x87: "1/8",
			0x101: hex.EncodeToString(leaf.RawSubject), 0x129: hex.EncodeToString(spki("rsa")),
			0x110: hex.EncodeToString([]byte(leaf.NotBefore.Format("20060102"))), 0x111: hex.EncodeToString([]byte(leaf.NotAfter.Format("20060102"))),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := common(int(tt.class), tt.key, id(spki(tt.key)))
			maps.Copy(want, tt.want)
			got := c.attributesOf(t, c.handle(t, 1, tt.class, tt.key))
			if tt.class == certificate {
				serial, check := got[0x82], got[0x90]
				if !strings.HasPrefix(serial, "02") || !strings.HasSuffix(serial, leaf.SerialNumber.Text(16)) || len(check) != 6 {
					t.Errorf("serial number %s, check value %s", serial, check)
				}
				delete(got, 0x82)
				delete(got, 0x90)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func modulusOf(t *testing.T, name string) string {
	t.Helper()
	pub, ok := newSigners()[name].Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok {
		t.Fatal(name)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	// The modulus is what is left of the SubjectPublicKeyInfo between its head and the exponent.
	return hex.EncodeToString(der[33 : len(der)-5])
}

func pointOf(t *testing.T, name string) string {
	t.Helper()
	b, err := newSigners()[name].Public().(*ecdsa.PublicKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}

// Several attributes at once: each in its place, one outcome for all, and the room minded.
func TestGetAttributeValue(t *testing.T) {
	c := open(t, newSoftKeys("rsa"))
	h := c.handle(t, 1, private, "rsa")
	ask := func(wanted ...p11rpc.WantedAttribute) ([]p11rpc.Attribute, uint64) {
		got := c.must(t, p11rpc.GetAttributeValue, u(1), u(h), p11rpc.Value{Kind: p11rpc.Wanted, Wanted: wanted})
		return got[0].Attributes, got[1].Num
	}
	for _, tt := range []struct {
		name    string
		wanted  p11rpc.WantedAttribute
		missing bool
		rv      uint64
	}{
		{"length only", p11rpc.WantedAttribute{Type: 0x120}, false, 0},
		{"just room", p11rpc.WantedAttribute{Type: 0x120, Room: 256}, false, 0},
		{"too little", p11rpc.WantedAttribute{Type: 0x120, Room: 255}, true, 0x150},
		{"a pointer to nothing", p11rpc.WantedAttribute{Type: 0x120, Room: p11rpc.NullRoom}, true, 0x150},
		{"a number, 64 bits", p11rpc.WantedAttribute{Type: 0x100, Room: 8}, false, 0},
		{"a number, 32 bits", p11rpc.WantedAttribute{Type: 0x100, Room: 4}, false, 0},
		{"a number, 16 bits", p11rpc.WantedAttribute{Type: 0x100, Room: 2}, true, 0x150},
		{"a secret", p11rpc.WantedAttribute{Type: 0x123, Room: 512}, true, 0x11},
		{"unknown", p11rpc.WantedAttribute{Type: 0x80000001, Room: 512}, true, 0x12},
		{"a template", p11rpc.WantedAttribute{Type: 0x40000212, Room: 24, Nested: []p11rpc.WantedAttribute{{Type: 1, Room: 1}}}, true, 0x12},
	} {
		got, rv := ask(p11rpc.WantedAttribute{Type: 3, Room: 100}, tt.wanted, p11rpc.WantedAttribute{Type: 0x108, Room: 1})
		if len(got) != 3 || string(got[0].Bytes) != "rsa" || got[1].Type != tt.wanted.Type || got[1].Missing != tt.missing || got[2].Num != 1 || rv != tt.rv {
			t.Errorf("%s: %+v, 0x%x", tt.name, got, rv)
		}
	}
	got, rv := ask()
	if len(got) != 0 || rv != 0 {
		t.Errorf("of nothing: %v, %d", got, rv)
	}
	c.refused(t, 0x82, p11rpc.GetAttributeValue, u(1), u(999), p11rpc.Value{Kind: p11rpc.Wanted})
}

func TestSearch(t *testing.T) {
	c := open(t, newSoftKeys("rsa", "p256", "p521"))
	flag := func(typ, n uint64) p11rpc.Attribute { return p11rpc.Attribute{Type: typ, Len: 1, Num: n} }
	for _, tt := range []struct {
		name     string
		template []p11rpc.Attribute
		want     int
	}{
		{"everything", nil, 9}, // three pairs, two certificates, their issuer's
		{"private keys", []p11rpc.Attribute{class(private)}, 3},
		{"public keys", []p11rpc.Attribute{class(public)}, 3},
		{"certificates", []p11rpc.Attribute{class(certificate)}, 3},
		{"32 bits", []p11rpc.Attribute{{Len: 4, Num: certificate}}, 3},
		{"a class of no length", []p11rpc.Attribute{{Len: 0, Num: certificate}}, 0},
		{"secret keys", []p11rpc.Attribute{class(4)}, 0},
		{"NSS's trust", []p11rpc.Attribute{class(0xce534353)}, 0},
		{"by label", []p11rpc.Attribute{label("rsa")}, 3},
		{"by part of a label", []p11rpc.Attribute{label("rs")}, 0},
		{"EC keys that sign", []p11rpc.Attribute{class(private), {Type: 0x100, Len: 8, Num: 3}, flag(0x108, 1)}, 2},
		{"EC keys that do not", []p11rpc.Attribute{class(private), {Type: 0x100, Len: 8, Num: 3}, flag(0x108, 0)}, 0},
		{"true by another number", []p11rpc.Attribute{class(private), flag(0x108, 255)}, 3},
		{"of the token", []p11rpc.Attribute{flag(1, 1), class(private)}, 3},
		{"of a session", []p11rpc.Attribute{flag(1, 0)}, 0},
		{"private ones", []p11rpc.Attribute{flag(2, 1)}, 0},
		{"by a secret", []p11rpc.Attribute{{Type: 0x123, Len: 1, Bytes: []byte{1}}}, 0},
		{"by a missing value", []p11rpc.Attribute{{Type: 3, Missing: true}}, 0},
		{"by mechanisms", []p11rpc.Attribute{{Type: 0x40000600}}, 0},
	} {
		if got := c.find(t, 1, tt.template...); len(got) != tt.want {
			t.Errorf("%s: %d objects, want %d", tt.name, len(got), tt.want)
		}
	}
	empty := p11rpc.Value{Kind: p11rpc.Attributes}
	c.refused(t, 0x91, p11rpc.FindObjects, u(1), ulongs(1))
	c.refused(t, 0x91, p11rpc.FindObjectsFinal, u(1))
	c.must(t, p11rpc.FindObjectsInit, u(1), empty)
	c.refused(t, 0x90, p11rpc.FindObjectsInit, u(1), empty)
	if got := c.must(t, p11rpc.FindObjects, u(1), ulongs(1<<32-1))[0].List; len(got) != 9 {
		t.Errorf("%d objects with room for all", len(got))
	}
	c.must(t, p11rpc.FindObjectsFinal, u(1))
}

// The chain of a key is there: its own certificate, and its issuer's once for all keys.
func TestChains(t *testing.T) {
	keys := newSoftKeys("rsa", "p256", "p384", "p521")
	keys.chains["p521"] = [][]byte{newChains()["rsa"][0], []byte("junk")} // of another key
	c := open(t, keys)
	var labels []string
	for _, h := range c.find(t, 1, class(certificate)) {
		a, _ := c.attribute(t, 1, h, 3)
		category, _ := c.attribute(t, 1, h, 0x87)
		labels = append(labels, fmt.Sprintf("%s %d", a.Bytes, category.Num))
	}
	if want := []string{"p256 1", "p384 1", "rsa 1", "Test CA 2"}; !slices.Equal(labels, want) {
		t.Errorf("certificates %q, want %q", labels, want)
	}
	leaf, _ := c.attribute(t, 1, c.handle(t, 1, certificate, "rsa"), 0x81)
	found := c.find(t, 1, class(certificate), p11rpc.Attribute{Type: 0x101, Len: uint32(len(leaf.Bytes)), Bytes: leaf.Bytes})
	if len(found) != 1 {
		t.Fatalf("%d certificates of the issuer's name", len(found))
	}
	ca, _ := c.attribute(t, 1, found[0], 0x11)
	if !bytes.Equal(ca.Bytes, newChains()["rsa"][1]) {
		t.Error("the issuer's certificate is another one")
	}
	// The CA's key is one of ours: its certificate is its own, not an issuer's.
	keys = newSoftKeys("rsa", "ca")
	keys.chains["ca"] = newChains()["rsa"][1:]
	c = open(t, keys)
	if got := c.find(t, 1, class(certificate)); len(got) != 2 {
		t.Errorf("%d certificates, want 2", len(got))
	}
}

// Handles stay while keys do, and are not used again; the list is asked for once a second.
func TestListChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := newSoftKeys("rsa", "p256")
		c := open(t, keys)
		rsa, p256 := c.handle(t, 1, private, "rsa"), c.handle(t, 1, private, "p256")
		if keys.lists != 1 {
			t.Errorf("two searches asked for %d lists", keys.lists)
		}
		keys.set(func(k *softKeys) {
			delete(k.signers, "rsa")
			k.signers["p384"] = newSigners()["p384"]
		})
		time.Sleep(2 * time.Second)
		if got := c.handle(t, 1, private, "p256"); got != p256 {
			t.Errorf("handle %d, was %d", got, p256)
		}
		p384 := c.handle(t, 1, private, "p384")
		if p384 <= max(rsa, p256) {
			t.Errorf("handle %d is used again", p384)
		}
		c.refused(t, 0x82, p11rpc.GetAttributeValue, u(1), u(rsa), p11rpc.Value{Kind: p11rpc.Wanted})
		c.refused(t, 0x60, p11rpc.SignInit, u(1), mech(1), u(rsa))
		keys.set(func(k *softKeys) { k.signers["p384"] = newSigners()["ca"] }) // another key of that name
		time.Sleep(2 * time.Second)
		if got := c.handle(t, 1, private, "p384"); got == p384 {
			t.Error("another key has the handle of the old")
		}
	})
}

// Where the keys cannot be listed, a search says so; what was seen stays readable.
func TestListFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := newSoftKeys("rsa")
		c := open(t, keys)
		h := c.handle(t, 1, private, "rsa")
		keys.set(func(k *softKeys) { k.list = sigerr.Unavailable })
		time.Sleep(2 * time.Second)
		c.refused(t, 0x32, p11rpc.FindObjectsInit, u(1), p11rpc.Value{Kind: p11rpc.Attributes})
		if got := c.slots(t); len(got) != 1 {
			t.Errorf("slots %v", got)
		}
		c.attribute(t, 1, h, 3)
		keys.set(func(k *softKeys) { k.list = nil })
		if got := c.handle(t, 1, private, "rsa"); got != h {
			t.Errorf("handle %d, was %d", got, h)
		}
	})
}

// More keys than a token shows: the first by name are there, and nothing breaks.
func TestManyKeys(t *testing.T) {
	keys := newSoftKeys()
	for i := range p11token.MaxKeys + 10 {
		keys.signers[fmt.Sprintf("key-%05d", i)] = newSigners()["p256"]
	}
	c := open(t, keys)
	c.must(t, p11rpc.FindObjectsInit, u(1), p11rpc.Value{Kind: p11rpc.Attributes, Attributes: []p11rpc.Attribute{class(private)}})
	got := c.must(t, p11rpc.FindObjects, u(1), ulongs(1<<20))[0].List
	c.must(t, p11rpc.FindObjectsFinal, u(1))
	if len(got) != p11token.MaxKeys {
		t.Errorf("%d keys", len(got))
	}
	if got := c.find(t, 1, class(private), label("key-04095")); len(got) != 1 {
		t.Errorf("the last one is there %d times", len(got))
	}
}

// Keys of a kind that no tool knows are not shown.
func TestUnknownKinds(t *testing.T) {
	keys := newSoftKeys("rsa")
	p224, err := ecdsa.GenerateKey(elliptic.P224(), nil)
	if err != nil {
		t.Fatal(err)
	}
	keys.signers["p224"] = p224
	c := open(t, keys)
	if got := c.names(t, 1); !slices.Equal(got, []string{"rsa"}) {
		t.Errorf("%q", got)
	}
}
