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
	signatures := []uint32{267, 268, 278, 1002, 1005, 1006}
	b := demo(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			size := len(b)
			b = sign(t, b, tt.s, tt.o)
			rpmkeysOK(t, db, b)
			if len(b) != size {
				t.Errorf("the package has %d bytes, had %d", len(b), size)
			}
			tags, _ := sigTags(t, b)
			var got []uint32
			for _, e := range tags {
				if slices.Contains(signatures, e.tag) {
					got = append(got, e.tag)
				}
			}
			if !slices.Equal(got, tt.tags) {
				t.Errorf("got tags %v, want %v", got, tt.tags)
			}
		})
	}
}
