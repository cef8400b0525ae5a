package rpm_test

import (
	"crypto/sha256"
	"crypto/sha3"
	"crypto/sha512"
	"testing"

	"github.com/signwarden/signwarden/formats/rpm"
)

// The digests that rpmbuild 4.18 does not make, each right and wrong.
func TestDigests(t *testing.T) {
	payload := []byte("payload")
	two, five, three := sha256.Sum256(payload), sha512.Sum512(payload), sha3.Sum256(payload)
	list := func(n uint32, digests ...string) tag {
		e := tag{n, 8, len(digests), nil}
		for _, d := range digests {
			e.data = append(append(e.data, d...), 0)
		}
		return e
	}
	wrong := sha256Hex([]byte("another payload"))
	main := func(extra ...tag) []byte {
		return header(63, append([]tag{str(1000, "x"), str(1001, "1"), str(1002, "1"), str(1044, "x-1-1.src.rpm")}, extra...)...)
	}
	headerSHA3 := func(b []byte) string {
		sum := sha3.Sum256(b)
		return hexOf(sum[:])
	}
	good := main(list(5092, hexOf(two[:])), num(5093, 8))
	tests := []struct {
		name string
		main []byte
		sig  []tag // nil: SHA-256 of main
		want error
	}{
		{"SHA-256", good, nil, nil},
		{"SHA-512", main(list(5092, hexOf(five[:])), num(5093, 10)), nil, nil},
		{"SHA3-256", main(list(5092, hexOf(three[:])), num(5093, 12)), nil, nil},
		{"unpacked", main(list(5092, wrong), num(5093, 8), list(5097, hexOf(two[:]))), nil, nil},
		{"neither", main(list(5092, wrong), num(5093, 8), list(5097, wrong)), nil, rpm.ErrDigest},
		{"several, all right", main(list(5092, hexOf(two[:])), num(5093, 8), str(5121, hexOf(five[:])), str(5123, hexOf(three[:]))), nil, nil},
		{"several, one wrong", main(list(5092, hexOf(two[:])), num(5093, 8), str(5121, hexOf(five[:])), str(5123, wrong)), nil, rpm.ErrDigest},
		{"no algorithm", main(list(5092, hexOf(two[:]))), nil, rpm.ErrUnsupported},
		{"MD5", main(list(5092, hexOf(two[:16])), num(5093, 1)), nil, rpm.ErrUnsupported},
		{"short", main(list(5092, hexOf(two[:31])), num(5093, 8)), nil, rpm.ErrMalformed},
		{"two in the list", main(list(5092, hexOf(two[:]), wrong), num(5093, 8)), nil, rpm.ErrMalformed},
		{"string instead of list", main(str(5092, hexOf(two[:])), num(5093, 8)), nil, rpm.ErrMalformed},
		{"header SHA3-256 too", good, []tag{str(273, sha256Hex(good)), str(279, headerSHA3(good))}, nil},
		{"header SHA3-256 wrong", good, []tag{str(273, sha256Hex(good)), str(279, wrong)}, rpm.ErrDigest},
		{"header SHA-256 wrong", good, []tag{str(273, wrong), str(279, headerSHA3(good))}, rpm.ErrDigest},
		{"size wrong", good, []tag{str(273, sha256Hex(good)), num(1000, uint32(len(good)))}, rpm.ErrDigest},
		{"size of many", good, []tag{str(273, sha256Hex(good)), {1000, 4, 2, make([]byte, 8)}}, rpm.ErrMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.sig == nil {
				tt.sig = []tag{str(273, sha256Hex(tt.main))}
			}
			err := open(t, pack(header(62, tt.sig...), tt.main, payload)).CheckDigests(true)
			wantError(t, err, tt.want)
		})
	}
}

// What is wrong with headers, one thing at a time.
func TestHeadersRefused(t *testing.T) {
	nevra := []tag{str(1000, "x"), str(1001, "1"), str(1002, "1")}
	with := func(extra ...tag) []byte { return header(63, append(nevra[:3:3], extra...)...) }
	patched := func(at int, v byte) []byte {
		b := with(num(1003, 1))
		b[at] = v
		return b
	}
	const entry = 16 + 16 // the first after the region's
	good := with(num(1003, 1))
	tests := []struct {
		name string
		b    []byte
		want error
	}{
		{"good", good, nil},
		{"version 4 by itself", with(num(5114, 4)), nil},
		{"no name", header(63, nevra[1:]...), rpm.ErrMalformed},
		{"empty version", header(63, nevra[0], str(1001, ""), nevra[2]), rpm.ErrMalformed},
		{"name of another type", header(63, tag{1000, 9, 1, []byte("x\x00")}, nevra[1], nevra[2]), rpm.ErrMalformed},
		{"format 5", with(num(5114, 5)), rpm.ErrUnsupported},
		{"format 6 without region", header(0, append(nevra[:3:3], num(5114, 6))...), rpm.ErrUnsupported},
		{"two epochs", with(num(1003, 1), num(1003, 2)), rpm.ErrMalformed},
		{"region inside", with(tag{62, 7, 16, make([]byte, 16)}), rpm.ErrMalformed},
		{"empty data", with(tag{1011, 7, 0, nil}), rpm.ErrMalformed},
		{"type 0", with(tag{1011, 0, 1, []byte{0}}), rpm.ErrMalformed},
		{"type 10", with(tag{1011, 10, 1, []byte{0}}), rpm.ErrMalformed},
		{"two in a string", with(tag{1011, 6, 2, []byte("a\x00b\x00")}), rpm.ErrMalformed},
		{"magic", patched(3, 2), rpm.ErrMalformed},
		{"offset negative", patched(entry+8, 0x80), rpm.ErrMalformed},
		{"offset over other data", patched(entry+16+11, 0), rpm.ErrMalformed},
		{"not aligned", patched(entry+3*16+11, 7), rpm.ErrMalformed},
		{"count", patched(entry+3*16+13, 1), rpm.ErrMalformed},
		{"region's offset", patched(16+11, 0), rpm.ErrMalformed},
		{"region's type", patched(16+7, 6), rpm.ErrMalformed},
		{"region's length", patched(len(good)-5, 0xe0), rpm.ErrMalformed},
		{"region's trailer", patched(len(good)-13, 62), rpm.ErrMalformed},
		{"truncated", good[:len(good)-1], rpm.ErrMalformed},
		{"no bytes", nil, rpm.ErrMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := rpm.ParseHeader(tt.b)
			wantError(t, err, tt.want)
		})
	}
	lead := func(at int, v byte) []byte {
		b := demo(t)[:200:200]
		b = append([]byte{}, b...)
		b[at] = v
		return b
	}
	for at, want := range map[int]error{0: rpm.ErrMalformed, 4: rpm.ErrUnsupported, 79: rpm.ErrUnsupported} {
		_, _, err := trySign(lead(at, 1), ed(), rpm.Options{})
		wantError(t, err, want)
	}
}
