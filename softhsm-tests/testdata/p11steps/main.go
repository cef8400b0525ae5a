// Command p11steps makes PKCS#11 calls one by one, for the tests of softhsm-tests: between two of them a test can do
// what it likes to the gateway.
//
// Usage: p11steps MODULE TOKEN KEY-LABEL
//
// It opens a session, finds the private key and prints "ready". Then, for each line that it reads, it calls C_SignInit
// ("init", by CKM_SHA256_RSA_PKCS), C_Sign ("sign") or C_FindObjectsInit and the two calls after it ("find"), and prints
// "ok", with the number of objects found, or the name of the CK_RV. It ends without C_Finalize at the end of its input.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"

	"github.com/miekg/pkcs11"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "p11steps:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: p11steps MODULE TOKEN KEY-LABEL")
	}
	p := pkcs11.New(args[0])
	if p == nil {
		return fmt.Errorf("cannot load %s", args[0])
	}
	if err := p.Initialize(); err != nil {
		return err
	}
	slot, err := slotOf(p, args[1])
	if err != nil {
		return err
	}
	s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return err
	}
	found, err := find(p, s, args[2])
	if err != nil || len(found) != 1 {
		return fmt.Errorf("%d keys called %q: %w", len(found), args[2], err)
	}
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		answer := "ok"
		var err error
		switch in.Text() {
		case "init":
			err = p.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_SHA256_RSA_PKCS, nil)}, found[0])
		case "sign":
			_, err = p.Sign(s, []byte("text"))
		case "find":
			var now []pkcs11.ObjectHandle
			now, err = find(p, s, args[2])
			answer = fmt.Sprint("ok ", len(now))
		default:
			err = fmt.Errorf("what is %q?", in.Text())
		}
		if err != nil {
			answer = err.Error()
		}
		fmt.Println(answer)
	}
	return nil
}

func slotOf(p *pkcs11.Ctx, token string) (uint, error) {
	slots, err := p.GetSlotList(true)
	if err != nil {
		return 0, err
	}
	for _, slot := range slots {
		info, err := p.GetTokenInfo(slot)
		if err == nil && info.Label == token {
			return slot, nil
		}
	}
	return 0, fmt.Errorf("%d slots, and none with the token %q", len(slots), token)
}

func find(p *pkcs11.Ctx, s pkcs11.SessionHandle, label string) ([]pkcs11.ObjectHandle, error) {
	err := p.FindObjectsInit(s, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
	})
	if err != nil {
		return nil, err
	}
	found, _, err := p.FindObjects(s, 2)
	return found, errors.Join(err, p.FindObjectsFinal(s))
}
