package p11token_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/agentproto/p11rpc"
	"github.com/signwarden/signwarden/agentproto/p11token"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// pss is a CK_RSA_PKCS_PSS_PARAMS as clients up to 0.25.5 send it.
func pss(hash, mgf, salt uint64) []byte {
	b := binary.BigEndian.AppendUint64(nil, hash)
	b = binary.BigEndian.AppendUint64(b, mgf)
	return binary.BigEndian.AppendUint64(b, salt)
}

func sum(h crypto.Hash, data []byte) []byte {
	d := h.New()
	d.Write(data)
	return d.Sum(nil)
}

// infos are what goes before a digest in a DigestInfo, as crypto/rsa has them too.
var infos = map[crypto.Hash]string{
	crypto.SHA256: "3031300d060960864801650304020105000420",
	crypto.SHA384: "3041300d060960864801650304020205000430",
	crypto.SHA512: "3051300d060960864801650304020305000440",
}

func digestInfo(t testing.TB, h crypto.Hash, digest []byte) []byte {
	return append(unhex(t, infos[h]), digest...)
}

// verify checks a signature as a verifier that knows only the message would.
func verify(t *testing.T, pub crypto.PublicKey, h crypto.Hash, salt int, digest, sig []byte) {
	t.Helper()
	var err error
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if salt < 0 {
			err = rsa.VerifyPKCS1v15(k, h, digest, sig)
		} else {
			err = rsa.VerifyPSS(k, h, digest, sig, &rsa.PSSOptions{SaltLength: salt})
		}
	case *ecdsa.PublicKey:
		if !ecdsa.VerifyASN1(k, digest, ecdsaDER(t, sig)) {
			err = errors.New("ECDSA signature does not verify")
		}
	case ed25519.PublicKey:
		if !ed25519.Verify(k, digest, sig) {
			err = errors.New("Ed25519 signature does not verify")
		}
	}
	if err != nil {
		t.Error(err)
	}
}

// Every mechanism, in one part and in several: what reaches the keys, and that the
// signature verifies. Asking for its length, or with too little room, reaches nobody.
func TestMechanisms(t *testing.T) {
	message := []byte("a message of some length")
	for _, tt := range []struct {
		name   string
		ckm    uint64
		param  []byte
		key    string
		hash   crypto.Hash
		salt   int
		hashes bool // the mechanism does
		info   bool
	}{
		{"RSA_PKCS SHA-256", 0x1, nil, "rsa", crypto.SHA256, -1, false, true},
		{"RSA_PKCS SHA-384", 0x1, nil, "rsa", crypto.SHA384, -1, false, true},
		{"RSA_PKCS SHA-512, 3072 bits", 0x1, nil, "rsa3", crypto.SHA512, -1, false, true},
		{"RSA_PKCS, old form", 0x1, []byte{255, 255, 255, 255}, "rsa", crypto.SHA256, -1, false, true},
		{"SHA256_RSA_PKCS", 0x40, nil, "rsa", crypto.SHA256, -1, true, false},
		{"SHA384_RSA_PKCS", 0x41, nil, "rsa", crypto.SHA384, -1, true, false},
		{"SHA512_RSA_PKCS", 0x42, nil, "rsa", crypto.SHA512, -1, true, false},
		{"PSS SHA-256", 0xd, pss(0x250, 2, 32), "rsa", crypto.SHA256, 32, false, false},
		{"PSS SHA-256, new form", 0xd, append([]byte{1}, pss(0x250, 2, 32)...), "rsa", crypto.SHA256, 32, false, false},
		{"PSS SHA-384, a short salt", 0xd, pss(0x260, 3, 1), "rsa", crypto.SHA384, 1, false, false},
		{"PSS SHA-256, the longest salt", 0xd, pss(0x250, 2, 222), "rsa", crypto.SHA256, 222, false, false},
		{"PSS SHA-512, the longest salt", 0xd, pss(0x270, 4, 190), "rsa", crypto.SHA512, 190, false, false},
		{"SHA256_RSA_PKCS_PSS", 0x43, pss(0x250, 2, 32), "rsa", crypto.SHA256, 32, true, false},
		{"SHA384_RSA_PKCS_PSS", 0x44, pss(0x260, 3, 48), "rsa3", crypto.SHA384, 48, true, false},
		{"SHA512_RSA_PKCS_PSS", 0x45, pss(0x270, 4, 64), "rsa", crypto.SHA512, 64, true, false},
		{"ECDSA SHA-256", 0x1041, nil, "p256", crypto.SHA256, -1, false, false},
		{"ECDSA SHA-512 with P-256", 0x1041, nil, "p256", crypto.SHA512, -1, false, false},
		{"ECDSA SHA-384", 0x1041, nil, "p384", crypto.SHA384, -1, false, false},
		{"ECDSA_SHA256", 0x1044, nil, "p256", crypto.SHA256, -1, true, false},
		{"ECDSA_SHA384", 0x1045, nil, "p384", crypto.SHA384, -1, true, false},
		{"ECDSA_SHA512", 0x1046, nil, "p521", crypto.SHA512, -1, true, false},
		{"EDDSA", 0x1057, nil, "ed", crypto.SHA512, -1, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keys := newSoftKeys("rsa", "rsa3", "p256", "p384", "p521", "ed")
			c := open(t, keys)
			s := uint64(1)
			if tt.key == "ed" {
				s = c.session(t, 2)
			}
			pub := keys.signers[tt.key].Public()
			h := c.handle(t, s, private, tt.key)
			digest := sum(tt.hash, message)
			data := digest
			switch {
			case tt.hashes:
				data = message
			case tt.info:
				data = digestInfo(t, tt.hash, digest)
			}
			size := map[string]uint64{"rsa": 256, "rsa3": 384, "p256": 64, "p384": 96, "p521": 132, "ed": 64}[tt.key]
			begin := func() { c.must(t, p11rpc.SignInit, u(s), mech(tt.ckm, tt.param...), u(h)) }
			check := func(got []p11rpc.Value) {
				t.Helper()
				if got[0].Short || uint64(len(got[0].Bytes)) != size {
					t.Fatalf("%d bytes of signature, want %d", len(got[0].Bytes), size)
				}
				verify(t, pub, tt.hash, tt.salt, digest, got[0].Bytes)
				calls := keys.takeCalls()
				if len(calls) != 1 {
					t.Fatalf("%d requests, want 1", len(calls))
				}
				if !strings.HasPrefix(calls[0].Note, "request ") {
					t.Errorf("note %q", calls[0].Note)
				}
				calls[0].Note = ""
				if diff := cmp.Diff(signCall{Key: tt.key, Hash: tt.hash, Salt: tt.salt, Digest: digest}, calls[0]); diff != "" {
					t.Error(diff)
				}
			}
			short := func(got []p11rpc.Value) {
				t.Helper()
				if !got[0].Short || got[0].Num != size {
					t.Errorf("%+v, want the length %d", got[0], size)
				}
			}

			begin()
			for _, r := range []uint64{0, size - 1, p11rpc.NullRoom} {
				short(c.must(t, p11rpc.Sign, u(s), p11rpc.B(data), room(r)))
			}
			check(c.must(t, p11rpc.Sign, u(s), p11rpc.B(data), room(size)))
			c.refused(t, 0x91, p11rpc.Sign, u(s), p11rpc.B(data), room(size)) // it is over

			begin()
			if !tt.hashes {
				c.refused(t, 0x91, p11rpc.SignUpdate, u(s), p11rpc.B(data))
				c.refused(t, 0x91, p11rpc.SignFinal, u(s), room(size))
				return
			}
			for part := range slices.Chunk(message, 5) {
				c.must(t, p11rpc.SignUpdate, u(s), p11rpc.B(part))
			}
			c.refused(t, 0x91, p11rpc.Sign, u(s), p11rpc.B(nil), room(size))
			short(c.must(t, p11rpc.SignFinal, u(s), room(size-1)))
			check(c.must(t, p11rpc.SignFinal, u(s), room(size+100)))
			c.refused(t, 0x91, p11rpc.SignFinal, u(s), room(size))
			if calls := keys.takeCalls(); len(calls) != 0 {
				t.Errorf("more requests: %v", calls)
			}
		})
	}
}

// What must not be signed does not reach the keys.
func TestRefusedData(t *testing.T) {
	d256, d512 := make([]byte, 32), make([]byte, 64)
	info := func(text string, digest []byte) []byte { return append(unhex(t, text), digest...) }
	for _, tt := range []struct {
		name string
		ckm  uint64
		key  string
		data []byte
		want p11rpc.RV
	}{
		{"a bare digest", 0x1, "rsa", d256, 0x20},
		{"nothing", 0x1, "rsa", nil, 0x20},
		{"a padded block", 0x1, "rsa", append([]byte{0, 1}, bytes.Repeat([]byte{255}, 254)...), 0x20},
		{"what TLS 1.0 signs", 0x1, "rsa", make([]byte, 36), 0x20},
		{"SHA-1", 0x1, "rsa", info("3021300906052b0e03021a05000414", make([]byte, 20)), 0x20},
		{"MD5", 0x1, "rsa", info("3020300c06082a864886f70d020505000410", make([]byte, 16)), 0x20},
		{"SHA-224", 0x1, "rsa", info("302d300d06096086480165030402040500041c", make([]byte, 28)), 0x20},
		{"SHA-512/256", 0x1, "rsa", info("3031300d060960864801650304020605000420", d256), 0x20},
		{"no parameters", 0x1, "rsa", info("302f300b0609608648016503040201"+"0420", d256), 0x20},
		{"another length of length", 0x1, "rsa", info("308131300d060960864801650304020105000420", d256), 0x20},
		{"the wrong digest's length", 0x1, "rsa", info(infos[crypto.SHA256], make([]byte, 31)), 0x20},
		{"a byte that follows", 0x1, "rsa", info(infos[crypto.SHA256], make([]byte, 33)), 0x20},
		{"a SHA-512 digest as SHA-256", 0x1, "rsa", info(infos[crypto.SHA256], d512), 0x20},
		{"PSS of no digest", 0xd, "rsa", make([]byte, 31), 0x21},
		{"PSS of another digest", 0xd, "rsa", d512, 0x21},
		{"ECDSA of a SHA-1 digest", 0x1041, "p256", make([]byte, 20), 0x21},
		{"ECDSA of a message", 0x1041, "p256", []byte("hello"), 0x21},
		{"ECDSA of nothing", 0x1041, "p256", nil, 0x21},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keys := newSoftKeys("rsa", "p256")
			c := open(t, keys)
			var param []byte
			if tt.ckm == 0xd {
				param = pss(0x250, 2, 32)
			}
			h := c.handle(t, 1, private, tt.key)
			c.must(t, p11rpc.SignInit, u(1), mech(tt.ckm, param...), u(h))
			c.refused(t, tt.want, p11rpc.Sign, u(1), p11rpc.B(tt.data), room(512))
			if calls := keys.takeCalls(); len(calls) != 0 {
				t.Errorf("the keys were asked: %+v", calls)
			}
			// The operation is over, as after every error of C_Sign.
			c.must(t, p11rpc.SignInit, u(1), mech(tt.ckm, param...), u(h))
		})
	}
}

func TestRefusedInit(t *testing.T) {
	keys := newSoftKeys("rsa", "p256", "ed")
	c := open(t, keys)
	ed := c.session(t, 2)
	edKey := c.handle(t, ed, private, "ed")
	h := func(of uint64, name string) uint64 { return c.handle(t, 1, of, name) }
	for _, tt := range []struct {
		name string
		mech p11rpc.Value
		key  uint64
		want p11rpc.RV
	}{
		{"raw RSA", mech(0x3), h(private, "rsa"), 0x70},
		{"SHA-1", mech(0x6), h(private, "rsa"), 0x70},
		{"SHA-224", mech(0x46), h(private, "rsa"), 0x70},
		{"ECDSA with SHA-1", mech(0x1042), h(private, "p256"), 0x70},
		{"EdDSA in this token", mech(0x1057), h(private, "rsa"), 0x70},
		{"ECDSA with an RSA key", mech(0x1041), h(private, "rsa"), 0x63},
		{"RSA with an EC key", mech(0x1), h(private, "p256"), 0x63},
		{"PSS with an EC key", mech(0xd, pss(0x250, 2, 32)...), h(private, "p256"), 0x63},
		{"a public key", mech(0x1), h(public, "rsa"), 0x68},
		{"a certificate", mech(0x1), h(certificate, "rsa"), 0x60},
		{"no object", mech(0x1), 999, 0x60},
		{"no handle", mech(0x1), 0, 0x60},
		{"the other token's key", mech(0x1041), edKey, 0x60},
		{"a parameter for one that takes none", mech(0x1, pss(0x250, 2, 32)...), h(private, "rsa"), 0x71},
		{"junk for a parameter", mech(0x1, 1, 2, 3), h(private, "rsa"), 0x71},
		{"PSS without", mech(0xd), h(private, "rsa"), 0x71},
		{"PSS with SHA-1", mech(0xd, pss(0x220, 1, 20)...), h(private, "rsa"), 0x71},
		{"PSS with another mask", mech(0xd, pss(0x250, 1, 32)...), h(private, "rsa"), 0x71},
		{"PSS with another hash than its name", mech(0x43, pss(0x260, 3, 48)...), h(private, "rsa"), 0x71},
		{"PSS with no salt", mech(0xd, pss(0x250, 2, 0)...), h(private, "rsa"), 0x71},
		{"PSS with too long a salt", mech(0xd, pss(0x250, 2, 223)...), h(private, "rsa"), 0x71},
		{"PSS with a salt of 2^64-1", mech(0xd, pss(0x250, 2, 1<<64-1)...), h(private, "rsa"), 0x71},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c.refused(t, tt.want, p11rpc.SignInit, u(1), tt.mech, u(tt.key))
			c.refused(t, 0x91, p11rpc.Sign, u(1), p11rpc.B(nil), room(512))
		})
	}
	if calls := keys.takeCalls(); len(calls) != 0 {
		t.Errorf("the keys were asked: %+v", calls)
	}
}

func TestOperationState(t *testing.T) {
	keys := newSoftKeys("rsa")
	c := open(t, keys)
	h := c.handle(t, 1, private, "rsa")
	other := c.session(t, 1)
	c.must(t, p11rpc.SignInit, u(1), mech(0x40), u(h))
	c.refused(t, 0x90, p11rpc.SignInit, u(1), mech(0x40), u(h))
	c.refused(t, 0x91, p11rpc.Sign, u(other), p11rpc.B(nil), room(512)) // it is of session 1
	null := p11rpc.Value{Kind: p11rpc.Mech, Mechanism: p11rpc.Mechanism{Type: 1<<32 - 1, Null: true}}
	c.must(t, p11rpc.SignInit, u(1), null, u(0))
	c.refused(t, 0x91, p11rpc.Sign, u(1), p11rpc.B(nil), room(512))
	// Data that are only a length.
	c.must(t, p11rpc.SignInit, u(1), mech(0x40), u(h))
	c.refused(t, 0x07, p11rpc.SignUpdate, u(1), p11rpc.Length(4))
	c.must(t, p11rpc.SignInit, u(1), mech(0x40), u(h))
	c.refused(t, 0x07, p11rpc.Sign, u(1), p11rpc.Length(4), room(512))
	// A search does not disturb a signature, nor an attribute that is read.
	c.must(t, p11rpc.SignInit, u(1), mech(0x40), u(h))
	c.attribute(t, 1, c.handle(t, 1, private, "rsa"), 0x202)
	c.must(t, p11rpc.Sign, u(1), p11rpc.B([]byte("x")), room(512))
}

// Every kind of error has a CK_RV, and the log has the id that the keys were told.
func TestErrors(t *testing.T) {
	want := map[error]p11rpc.RV{
		sigerr.NotFound: 0x60, sigerr.Denied: 0x200, sigerr.Disabled: 0x68, sigerr.Invalid: 0x20, sigerr.Conflict: 0x6,
		sigerr.Overloaded: 0x31, sigerr.Timeout: 0x6, sigerr.Canceled: 0x50, sigerr.Unsupported: 0x70, sigerr.TokenFailed: 0x30,
		sigerr.Unavailable: 0x32, sigerr.Unauthenticated: 0x200,
		errors.New("anything else"): 0x5, context.DeadlineExceeded: 0x6, context.Canceled: 0x50,
	}
	for _, kind := range sigerr.Kinds() {
		if want[kind] == 0 {
			t.Errorf("no outcome for %v", kind)
		}
	}
	for kind, rv := range want {
		t.Run(kind.Error(), func(t *testing.T) {
			var log bytes.Buffer
			keys := newSoftKeys("rsa")
			keys.before = func(context.Context) error { return fmt.Errorf("%w: inner words", kind) }
			c := connect(t, p11token.Config{Keys: keysFor(keys), Logger: slog.New(slog.NewTextHandler(&log, nil))})
			c.must(t, p11rpc.Initialize, initArgs...)
			c.session(t, 1)
			c.must(t, p11rpc.SignInit, u(1), mech(0x40), u(c.handle(t, 1, private, "rsa")))
			c.refused(t, rv, p11rpc.Sign, u(1), p11rpc.B([]byte("x")), room(512))
			calls := keys.takeCalls()
			if len(calls) != 1 {
				t.Fatalf("%d requests", len(calls))
			}
			id, _, _ := strings.Cut(strings.TrimPrefix(calls[0].Note, "request "), ",")
			for _, words := range []string{"request=" + id, "inner words", "key=rsa", "mechanism=SHA256-RSA-PKCS", "C_Sign"} {
				if len(id) < 20 || !strings.Contains(log.String(), words) {
					t.Errorf("the log lacks %q: %s", words, log.String())
				}
			}
			// The session is good for the next signature.
			keys.set(func(k *softKeys) { k.before = nil })
			c.must(t, p11rpc.SignInit, u(1), mech(0x40), u(c.handle(t, 1, private, "rsa")))
			c.must(t, p11rpc.Sign, u(1), p11rpc.B([]byte("x")), room(512))
		})
	}
}

// A key that is disabled, or taken away, between C_SignInit and C_Sign.
func TestDisabledMeanwhile(t *testing.T) {
	for kind, rv := range map[error]p11rpc.RV{sigerr.Disabled: 0x68, sigerr.NotFound: 0x60, sigerr.Denied: 0x200} {
		keys := newSoftKeys("rsa")
		c := open(t, keys)
		c.must(t, p11rpc.SignInit, u(1), mech(0x40), u(c.handle(t, 1, private, "rsa")))
		c.must(t, p11rpc.SignUpdate, u(1), p11rpc.B([]byte("x")))
		keys.set(func(k *softKeys) {
			k.before = func(context.Context) error { return kind }
			delete(k.signers, "rsa")
		})
		c.refused(t, rv, p11rpc.SignFinal, u(1), room(512))
	}
}

// A signature of another length than the key's is a failure, and not passed on.
func TestWrongLength(t *testing.T) {
	for name, mangle := range map[string]func([]byte) []byte{
		"shorter": func(b []byte) []byte { return b[1:] },
		"longer":  func(b []byte) []byte { return append(b, 0) },
		"none":    func([]byte) []byte { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			keys := newSoftKeys("p256")
			keys.mangle = mangle
			c := open(t, keys)
			c.must(t, p11rpc.SignInit, u(1), mech(0x1041), u(c.handle(t, 1, private, "p256")))
			c.refused(t, 0x30, p11rpc.Sign, u(1), p11rpc.B(make([]byte, 32)), room(512))
		})
	}
}

func TestSignTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := newSoftKeys("p256")
		keys.before = func(ctx context.Context) error { <-ctx.Done(); return errors.New("broken off") }
		c := open(t, keys)
		c.must(t, p11rpc.SignInit, u(1), mech(0x1041), u(c.handle(t, 1, private, "p256")))
		start := time.Now()
		c.refused(t, 0x6, p11rpc.Sign, u(1), p11rpc.B(make([]byte, 32)), room(512))
		if took := time.Since(start); took != p11token.DefaultSignTimeout {
			t.Errorf("it took %v", took)
		}
	})
}

// Signatures of several sessions are made side by side, whatever came first; the rest
// of the client's calls wait for none of them.
func TestSideBySide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 8
		keys := newSoftKeys("p256")
		var begun sync.WaitGroup
		begun.Add(n)
		keys.before = func(context.Context) error { begun.Done(); begun.Wait(); return nil } // all, or none
		c := open(t, keys)
		h := c.handle(t, 1, private, "p256")
		var sessions []uint64
		for range n {
			s := c.session(t, 1)
			sessions = append(sessions, s)
			c.must(t, p11rpc.SignInit, u(s), mech(0x1041), u(h))
		}
		last := sessions[n-1]
		go func() {
			for _, s := range sessions[:n-1] {
				c.Send(p11rpc.Sign, u(s), p11rpc.B(make([]byte, 32)), room(512))
			}
			c.Send(p11rpc.GetSessionInfo, u(1))
		}()
		_, got, err := c.Receive() // while seven signatures wait for the eighth
		if err != nil || len(got) != 4 {
			t.Fatalf("%v, %v", got, err)
		}
		go c.Send(p11rpc.Sign, u(last), p11rpc.B(make([]byte, 32)), room(512))
		for range n {
			_, got, err := c.Receive()
			if err != nil || len(got[0].Bytes) != 64 {
				t.Errorf("%v, %v", got, err)
			}
		}
	})
}

// A client that goes away in the middle leaves nothing: the server's goroutines end
// (TestMain looks for them), and what was asked of the keys is finished.
func TestGone(t *testing.T) {
	begun, release := make(chan struct{}), make(chan struct{})
	keys := newSoftKeys("p256")
	keys.before = func(context.Context) error { close(begun); <-release; return nil }
	c := open(t, keys)
	c.must(t, p11rpc.SignInit, u(1), mech(0x1041), u(c.handle(t, 1, private, "p256")))
	_, err := c.Send(p11rpc.Sign, u(1), p11rpc.B(make([]byte, 32)), room(512))
	if err != nil {
		t.Fatal(err)
	}
	<-begun
	c.Close()
	close(release)
}
