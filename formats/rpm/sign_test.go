package rpm_test

import (
	"bytes"
	"maps"
	"slices"
	"testing"

	"github.com/signwarden/signwarden/formats/rpm"
)

// Every package of the corpus, signed, signed again by keys of other algorithms, and with the signatures deleted.
func TestRPMVerifies(t *testing.T) {
	subjects := []subject{rsa4096(), ed(), rsa2048()}
	db := rpmDB(t, subjects...)
	all := corpus(t)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		t.Run(name, func(t *testing.T) {
			plain := all[name]
			b := plain
			for _, s := range subjects {
				b = sign(t, b, s, rpm.Options{})
				rpmkeysOK(t, db, b)
				got, err := open(t, b).Verify(s.cert, true)
				if err != nil || len(got) == 0 {
					t.Errorf("Verify by %s: %v, %d signatures", s.name, err, len(got))
				}
			}
			b = remove(t, b, false)
			rpmkeysUnsigned(t, db, b)
			if tags, _ := sigTags(t, plain); hasTag(tags, 1008) && !bytes.Equal(b, plain) {
				t.Error("the package is not what it was before it was signed")
			}
		})
	}
}

func hasTag(tags []tag, n uint32) bool {
	return slices.ContainsFunc(tags, func(e tag) bool { return e.tag == n })
}

// What rpmkeys must find in a package that was signed with options.
func TestOptions(t *testing.T) {
	db := rpmDB(t, rsa2048(), ed())
	tests := []struct {
		name string
		s    subject
		o    rpm.Options
		tags []uint32
	}{
		{"rsa", rsa2048(), rpm.Options{}, []uint32{268}},
		{"rsa payload", rsa2048(), rpm.Options{Payload: true}, []uint32{268, 1002}},
		{"rsa openpgp", rsa2048(), rpm.Options{OpenPGP: true}, []uint32{268, 278}},
		{"rsa unread", rsa2048(), rpm.Options{NoPayloadCheck: true}, []uint32{268}},
		{"ed", ed(), rpm.Options{}, []uint32{267}},
		{"ed all", ed(), rpm.Options{Payload: true, OpenPGP: true}, []uint32{267, 278, 1005}},
		{"ed again", ed(), rpm.Options{}, []uint32{267}},
	}
	b := demo(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			size := len(b)
			b = sign(t, b, tt.s, tt.o)
			rpmkeysOK(t, db, b)
			if len(b) != size {
				t.Errorf("the package has %d bytes, had %d", len(b), size)
			}
			if got := signaturesOf(t, b); !slices.Equal(got, tt.tags) {
				t.Errorf("got tags %v, want %v", got, tt.tags)
			}
		})
	}
}

// Packages whose header has no digest of the payload get a signature over it, and those of rpm 3 no other.
func TestPayloadSigned(t *testing.T) {
	all := corpus(t)
	for name, want := range map[string][]uint32{
		"simple-1.0.1-1.i386.rpm":         {267, 1005},
		"centos-release-4-0.1.x86_64.rpm": {267, 1005},
		"rpm3":                            {1005},
	} {
		for _, o := range []rpm.Options{{}, {NoPayloadCheck: true}, {Payload: true}} {
			if got := signaturesOf(t, sign(t, all[name], ed(), o)); !slices.Equal(got, want) {
				t.Errorf("%s, %+v: got tags %v, want %v", name, o, got, want)
			}
		}
	}
}

// signaturesOf are the tags of a package's signatures.
func signaturesOf(t testing.TB, b []byte) []uint32 {
	t.Helper()
	tags, _ := sigTags(t, b)
	var got []uint32
	for _, e := range tags {
		if slices.Contains([]uint32{267, 268, 278, 1002, 1005, 1006}, e.tag) {
			got = append(got, e.tag)
		}
	}
	return got
}

// The signature header keeps its length wherever it can: with reserved space, within the padding, or with space that a longer
// signature has left.
func TestLengthKept(t *testing.T) {
	db := rpmDB(t, ed())
	signed := stripReserve(t, sign(t, demo(t), ed(), rpm.Options{}))
	pad := func(n int) int { return (n + 7) / 8 * 8 }
	exact := headerOffset(signed) - 96
	seen := map[bool]int{}
	for longer := range 40 {
		b := withSig(t, signed, func(tags []tag) []tag {
			for i, e := range tags {
				if e.tag == 267 {
					tags[i] = tag{267, 7, e.count + longer, append(bytes.Clone(e.data), make([]byte, longer)...)}
				}
			}
			return tags
		})
		room := headerOffset(b) - 96
		u := update(t, b, ed())
		want := room == pad(exact) || room-exact > 24
		if want && !u.InPlace() {
			t.Errorf("%d bytes of room, %d needed: %d written", room, exact, len(u.New))
		}
		if !u.InPlace() && len(u.New) < room+4000 {
			t.Errorf("%d bytes of room, %d needed: no reserved space in %d bytes", room, exact, len(u.New))
		}
		seen[u.InPlace()]++
		if longer%13 == 0 {
			rpmkeysOK(t, db, apply(t, u, b))
		}
	}
	if seen[true] == 0 || seen[false] == 0 {
		t.Errorf("in place or not: %v", seen)
	}
}
