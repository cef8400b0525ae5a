package openpgp_test

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"strings"
	"time"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// The keys may be in a token: all that is asked of them is crypto.Signer.
func Example() {
	primary := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, ed25519.SeedSize))
	subkey := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, ed25519.SeedSize))
	created := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC) // to be kept with the keys

	b, err := openpgp.NewCertificate(openpgp.CertificateSpec{
		UserID: "Vendor <sign@example.org>", Created: created, Primary: primary, Subkey: subkey,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	cert, err := openpgp.ParseCertificate(b)
	if err != nil {
		fmt.Println(err)
		return
	}
	key, err := cert.SigningKey(subkey.Public())
	if err != nil {
		fmt.Println(err)
		return
	}
	var sig bytes.Buffer
	err = openpgp.DetachSign(&sig, strings.NewReader("a package"), key, subkey, openpgp.SignOptions{Armor: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	info, err := openpgp.VerifyDetached(cert, strings.NewReader("a package"), &sig)
	fmt.Println(cert.UserIDs()[0], info.Signer == key.Fingerprint, err)
	fmt.Println(cert.Fingerprint())
	// Output:
	// Vendor <sign@example.org> true <nil>
	// 9B13B86614CB2695928D01B5060F0E85E96AD1FF
}
