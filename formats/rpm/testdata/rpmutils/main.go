// Command rpmutils has go-rpmutils verify packages and read their payloads, for the tests of formats/rpm. It is a module
// of its own, so that its dependencies are none of Signwarden's.
//
// Usage: rpmutils CERTIFICATE PACKAGE...
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/sassoftware/go-rpmutils"
)

func main() {
	cert, err := os.Open(os.Args[1])
	if err != nil {
		fail(os.Args[1], err)
	}
	keys, err := openpgp.ReadArmoredKeyRing(cert)
	if err != nil {
		fail(os.Args[1], err)
	}
	for _, path := range os.Args[2:] {
		err = check(path, keys)
		if err != nil {
			fail(path, err)
		}
	}
}

func check(path string, keys openpgp.EntityList) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, sigs, err := rpmutils.Verify(f, keys)
	if err != nil {
		return err
	}
	if len(sigs) == 0 {
		return fmt.Errorf("no signatures")
	}
	_, err = f.Seek(0, io.SeekStart)
	if err != nil {
		return err
	}
	pkg, err := rpmutils.ReadRpm(f)
	if err != nil {
		return err
	}
	nevra, err := pkg.Header.GetNEVRA()
	if err != nil {
		return err
	}
	payload, err := pkg.PayloadReaderExtended()
	if err != nil {
		return err
	}
	files := 0
	for ; ; files++ {
		_, err = payload.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	fmt.Printf("%s: %d signatures, %s, %d files\n", path, len(sigs), nevra, files)
	return nil
}

func fail(path string, err error) {
	fmt.Fprintf(os.Stderr, "%s: %v\n", path, err)
	os.Exit(1)
}
