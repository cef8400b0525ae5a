package rpm_test

import (
	"bytes"
	"crypto/rsa"
	"math/big"
	"slices"
	"testing"

	"github.com/signwarden/signwarden/formats/rpm"
)

// filesPackage is a package of files with digests: the main header has these tags besides.
func filesPackage(tags ...tag) []byte {
	all := append([]tag{str(1000, "files"), str(1001, "1"), str(1002, "1"), str(1022, "noarch"), str(1044, "files-1-1.src.rpm")}, tags...)
	all = append(all, tag{5092, 8, 1, append([]byte(sha256Hex(nil)), 0)}, num(5093, 8))
	slices.SortFunc(all, func(a, b tag) int { return int(a.tag) - int(b.tag) })
	main := header(63, all...)
	return pack(header(62, str(273, sha256Hex(main)), tag{1008, 7, 2000, make([]byte, 2000)}), main, nil)
}

// texts is an array of the same string, n times.
func texts(id uint32, n int, s string) tag {
	return tag{id, 8, n, bytes.Repeat(append([]byte(s), 0), n)}
}

// What has no place for file signatures, or lists of files that do not fit together, is refused before any is made.
func TestFileSignaturesRefused(t *testing.T) {
	key := rsa4096().signer.Public().(*rsa.PublicKey)
	sum := sha256Hex([]byte("x"))
	for _, tt := range []struct {
		name string
		tags []tag
		want error
	}{
		{"good", []tag{texts(1035, 3, sum), texts(1117, 3, "f"), num(5011, 8)}, nil},
		{"MD5", []tag{texts(1035, 3, sum[:32]), texts(1117, 3, "f"), num(5011, 1)}, rpm.ErrUnsupported},
		{"no algorithm", []tag{texts(1035, 3, sum), texts(1117, 3, "f")}, rpm.ErrUnsupported},
		{"names are missing", []tag{texts(1035, 3, sum), texts(1117, 2, "f"), num(5011, 8)}, rpm.ErrMalformed},
		{"a short digest", []tag{texts(1035, 3, sum[:62]), texts(1117, 3, "f"), num(5011, 8)}, rpm.ErrMalformed},
		{"no digits", []tag{texts(1035, 3, sum[:63]+"g"), texts(1117, 3, "f"), num(5011, 8)}, rpm.ErrMalformed},
		{"more than a signature header takes", []tag{texts(1035, 20000, sum), texts(1117, 20000, "f"), num(5011, 8)}, rpm.ErrUnsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := filesPackage(tt.tags...)
			// The package itself is good.
			_, asked, err := trySign(b, rsa4096(), rpm.Options{})
			if err != nil || asked != 1 {
				t.Fatalf("without file signatures: %v, asked %d times", err, asked)
			}
			u, asked, err := trySign(b, rsa4096(), rpm.Options{Files: key})
			if tt.want == nil {
				if err != nil || asked != 2 {
					t.Fatalf("got %v, asked %d times", err, asked)
				}
				sigs, err := open(t, apply(t, u, b)).FileSignatures()
				if err != nil || len(sigs) != 3 || len(sigs[2]) != 9+key.Size() {
					t.Errorf("%d file signatures, %v", len(sigs), err)
				}
				return
			}
			wantError(t, err, tt.want)
			if asked != 0 || u != nil {
				t.Errorf("the signer was asked %d times", asked)
			}
		})
	}
	weak := &rsa.PublicKey{N: new(big.Int).Rsh(key.N, 3000), E: key.E}
	_, asked, err := trySign(filesPackage(texts(1035, 1, sum), texts(1117, 1, "f"), num(5011, 8)), ed(), rpm.Options{Files: weak})
	wantError(t, err, rpm.ErrUnsupported)
	if asked != 0 {
		t.Errorf("the signer was asked %d times", asked)
	}
}
