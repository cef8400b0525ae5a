package worker_test

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"testing"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

// seeds are frames of each kind, as both ends write them.
func seeds() [][]byte {
	refused := &hsm.Error{Op: "sign", Code: 0x70, Class: hsm.ClassRefused, Detail: "a detail"}
	s := [][]byte{
		worker.Hello(worker.Config{Module: "/m.so", TokenLabel: "l", Profile: "softhsm", Sessions: 3, Env: map[string]string{"A": "1", "B": ""}}),
		worker.Ask(hsm.Info{TokenSerial: "s", WrongPIN: true}),
		worker.Ready(hsm.Info{Module: "m", TokenLabel: "l", Sessions: 2, Mechanisms: []hsm.Mechanism{{Name: "CKM_ECDSA", Offered: true, MinBits: 112, MaxBits: 521}}}),
		worker.Generate("label", []byte("id"), "p256"),
		worker.Frame(worker.KindDone, 7, []byte("signature")),
		worker.Frame(worker.Administrative["certificate"], 1, []byte("\x00\x02idDER")),
		worker.Import("l", []byte("id"), pkcs8(ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)))),
		worker.List(), worker.List(
			hsm.Object{Kind: hsm.PrivateKey, Label: "l", ID: []byte("id"), Algorithm: "rsa4096", Sensitive: hsm.Yes, Extractable: hsm.No},
			hsm.Object{Kind: hsm.Certificate, Subject: "CN=x", Serial: "12"}),
	}
	for _, o := range []crypto.SignerOpts{nil, crypto.SHA256, &rsa.PSSOptions{Hash: crypto.SHA512, SaltLength: rsa.PSSSaltLengthEqualsHash}, &ed25519.Options{Context: "c"}} {
		s = append(s, worker.Sign([]byte("id"), digest(1), o))
	}
	for _, err := range []error{refused, fmt.Errorf("opening: %w", refused), hsm.ErrNotFound, hsm.ErrExists, hsm.ErrClosed, bytes.ErrTooLarge} {
		s = append(s, worker.Failed(err))
	}
	return s
}

func pkcs8(k crypto.PrivateKey) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		panic(err)
	}
	return der
}

// Whatever is accepted is encoded in one way only, and every seed is accepted.
func FuzzFrames(f *testing.F) {
	for _, s := range seeds() {
		if again, n, err := worker.Reencode(s); err != nil || n != len(s) || !bytes.Equal(again, s) {
			f.Fatalf("seed %x: %d bytes of it, %v, and it comes back as %x", s, n, err, again)
		}
		f.Add(s)
		f.Add(s[:len(s)-1])
	}
	f.Add(bytes.Join(seeds(), nil))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		for {
			again, n, err := worker.Reencode(b)
			if err != nil || n == 0 {
				if again != nil {
					t.Fatalf("%x beside an error or nothing", again)
				}
				return
			}
			if !bytes.Equal(again, b[:n]) {
				t.Fatalf("%x comes back as %x", b[:n], again)
			}
			b = b[n:]
		}
	})
}

// A length is refused before anything is allocated, and so is one that is short.
func TestFrameLengths(t *testing.T) {
	for _, b := range [][]byte{{0xff, 0xff, 0xff, 0xff}, {0, 1, 0, 6}, {0, 0, 0, 0}, {0, 0, 0, 4}} {
		if _, n, err := worker.Reencode(b); err == nil || n != 0 {
			t.Errorf("%x: %d, %v", b, n, err)
		}
	}
}
