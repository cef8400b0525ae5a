// Command p11load signs with a PKCS#11 module from several threads at a time, for the tests of p11token.
//
// Usage: p11load MODULE LABEL THREADS COUNT
//
// Each thread has a session of its own and makes COUNT signatures by CKM_ECDSA with the P-256 private key of that
// label. They are verified with the public key of that label. It prints how many seconds the signing took, and ends
// without C_Finalize, as most tools do.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/miekg/pkcs11"
)

func main() {
	seconds, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "p11load:", err)
		os.Exit(1)
	}
	fmt.Printf("%.6f\n", seconds)
}

func run(args []string) (float64, error) {
	if len(args) != 4 {
		return 0, errors.New("usage: p11load MODULE LABEL THREADS COUNT")
	}
	threads, err := strconv.Atoi(args[2])
	if err != nil {
		return 0, err
	}
	count, err := strconv.Atoi(args[3])
	if err != nil {
		return 0, err
	}
	p := pkcs11.New(args[0])
	if p == nil {
		return 0, fmt.Errorf("cannot load %s", args[0])
	}
	err = p.Initialize()
	if err != nil {
		return 0, err
	}
	slots, err := p.GetSlotList(true)
	if err != nil || len(slots) == 0 {
		return 0, fmt.Errorf("%d slots: %w", len(slots), err)
	}
	w := &work{p: p, slot: slots[0], label: args[1], count: count}
	err = w.find()
	if err != nil {
		return 0, err
	}
	return w.sign(threads)
}

type work struct {
	p       *pkcs11.Ctx
	slot    uint
	label   string
	count   int
	private pkcs11.ObjectHandle
	public  *ecdsa.PublicKey
}

func (w *work) find() error {
	s, err := w.p.OpenSession(w.slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return err
	}
	defer w.p.CloseSession(s)
	w.private, err = w.object(s, pkcs11.CKO_PRIVATE_KEY)
	if err != nil {
		return err
	}
	pub, err := w.object(s, pkcs11.CKO_PUBLIC_KEY)
	if err != nil {
		return err
	}
	got, err := w.p.GetAttributeValue(s, pub, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil)})
	if err != nil {
		return err
	}
	var point []byte
	_, err = asn1.Unmarshal(got[0].Value, &point)
	if err != nil {
		return err
	}
	w.public, err = ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	return err
}

func (w *work) object(s pkcs11.SessionHandle, class uint) (pkcs11.ObjectHandle, error) {
	err := w.p.FindObjectsInit(s, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, w.label),
	})
	if err != nil {
		return 0, err
	}
	found, _, err := w.p.FindObjects(s, 2)
	if err != nil || len(found) != 1 {
		return 0, fmt.Errorf("%d objects of class %d: %w", len(found), class, err)
	}
	return found[0], w.p.FindObjectsFinal(s)
}

func (w *work) sign(threads int) (float64, error) {
	errs := make(chan error, threads)
	var wg sync.WaitGroup
	start := time.Now()
	for n := range threads {
		wg.Go(func() { errs <- w.thread(n) })
	}
	wg.Wait()
	took := time.Since(start).Seconds()
	for range threads {
		err := <-errs
		if err != nil {
			return 0, err
		}
	}
	return took, nil
}

func (w *work) thread(n int) error {
	s, err := w.p.OpenSession(w.slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return err
	}
	for i := range w.count {
		digest := sha256.Sum256(fmt.Appendf(nil, "%d %d", n, i))
		err := w.p.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, w.private)
		if err != nil {
			return err
		}
		sig, err := w.p.Sign(s, digest[:])
		if err != nil {
			return err
		}
		r, t := new(big.Int).SetBytes(sig[:len(sig)/2]), new(big.Int).SetBytes(sig[len(sig)/2:])
		if !ecdsa.Verify(w.public, digest[:], r, t) {
			return fmt.Errorf("signature %d of thread %d does not verify", i, n)
		}
	}
	return nil
}
