//go:build linux

package rpm_test

import (
	"crypto"
	"crypto/rand"
	"fmt"
	"log"
	"os"

	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/formats/rpm"
)

// The digests of a package are signed elsewhere, and its signature header is overwritten in place.
func ExamplePrepare() {
	var (
		path   string        // of a package
		key    openpgp.Key   // of Certificate.SigningKey
		remote crypto.Signer // or anything that answers requests
	)
	signInPlace := func() error {
		_, err := rpm.Recover(path, rpm.FileOptions{})
		if err != nil {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		p, err := rpm.ReadPackage(f, info.Size())
		if err != nil {
			return err
		}
		signing, err := rpm.Prepare(p, key, rpm.Options{})
		if err != nil {
			return err
		}
		var sigs [][]byte
		for _, r := range signing.Requests() {
			sig, err := remote.Sign(rand.Reader, r.Digest, r.Opts)
			if err != nil {
				return err
			}
			sigs = append(sigs, sig)
		}
		u, err := signing.Finish(sigs)
		if err != nil {
			return err
		}
		fmt.Println("signed", p.Header.NEVRA)
		return rpm.ApplyInPlace(path, u, rpm.FileOptions{})
	}
	err := signInPlace()
	if err != nil {
		log.Fatal(err)
	}
}
