package hsm_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/hsm"
)

func TestGenerateRefuses(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	generate(t, p, "k", "p256")
	f.arm(nil)
	for _, c := range []struct {
		name, label, id, algorithm string
		exists                     bool
	}{
		{"id taken", "new", "k", "p256", true},
		{"label taken", "label of k", "new", "p256", true},
		{"no label", "", "new", "p256", false},
		{"no id", "new", "", "p256", false},
		{"algorithm", "new", "new", "rsa1024", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := p.Generate(t.Context(), c.label, []byte(c.id), c.algorithm)
			e, _ := errors.AsType[*hsm.Error](err)
			if errors.Is(err, hsm.ErrExists) != c.exists || (e != nil && e.Refused()) == c.exists {
				t.Errorf("got %v, want ErrExists %v", err, c.exists)
			}
		})
	}
	if n := f.count("C_GenerateKeyPair"); n != 0 {
		t.Errorf("%d pairs were made", n)
	}
}

// What a Generate that fails has made is gone again.
func TestGenerateUndoes(t *testing.T) {
	attribute := func(a uint) string { return fmt.Sprintf("C_GetAttributeValue %#x", a) }
	for _, c := range []struct {
		name, call string
		rv         uint
		n          int
		ok         bool // the pair is made all the same, at another attempt
	}{
		{"extractable", attribute(pkcs11.CKA_EXTRACTABLE), 1, 1, false},
		{"not sensitive", attribute(pkcs11.CKA_SENSITIVE), 1, 1, false},
		{"not local", attribute(pkcs11.CKA_LOCAL), 1, 1, false},
		{"decrypts", attribute(pkcs11.CKA_DECRYPT), 1, 1, false},
		{"failed", "C_GenerateKeyPair", pkcs11.CKR_DEVICE_ERROR, 1, false},
		{"failed but persisted", "after C_GenerateKeyPair", pkcs11.CKR_DEVICE_ERROR, 1, false},
		{"busy", "C_GenerateKeyPair", pkcs11.CKR_FUNCTION_FAILED, 2, true},
		{"busy but persisted", "after C_GenerateKeyPair", pkcs11.CKR_FUNCTION_FAILED, 2, true},
		{"session lost but persisted", "after C_GenerateKeyPair", pkcs11.CKR_SESSION_HANDLE_INVALID, 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, f := openFaulty(t, newToken(t))
			f.arm(times(c.n, c.call, c.rv))
			_, err := p.Generate(t.Context(), "l", []byte("k"), "p256")
			if (err == nil) != c.ok {
				t.Errorf("got %v, want ok = %v", err, c.ok)
			}
			f.arm(nil)
			_, err = p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256)
			if errors.Is(err, hsm.ErrNotFound) == c.ok {
				t.Errorf("signing afterwards: %v", err)
			}
			if c.ok {
				return
			}
			if _, err := p.Generate(t.Context(), "l", []byte("k"), "p256"); err != nil {
				t.Errorf("once more: %v", err)
			}
		})
	}
}

// Where undoing fails too, the error says what may be left, and Delete
// removes it.
func TestGenerateLeaves(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	f.arm(func(call string) error {
		switch call {
		case "after C_GenerateKeyPair", "C_DestroyObject":
			return pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)
		}
		return nil
	})
	_, err := p.Generate(t.Context(), "l", []byte("k"), "p256")
	if e, ok := errors.AsType[*hsm.Error](err); !ok || !e.Gone() || !strings.Contains(err.Error(), "may be left") {
		t.Errorf("got %v", err)
	}
	f.arm(nil)
	if err := p.Delete(t.Context(), []byte("k")); err != nil {
		t.Error(err)
	}
	if err := p.Delete(t.Context(), []byte("k")); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("second Delete: got %v, want ErrNotFound", err)
	}
}

// A caller that leaves while the pair is made leaves none behind.
func TestGenerateAbandoned(t *testing.T) {
	p, f := openFaulty(t, newToken(t))
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan struct{})
	f.arm(func(call string) error {
		if call == "after C_GenerateKeyPair" {
			cancel()
			<-left
		}
		return nil
	})
	if _, err := p.Generate(ctx, "l", []byte("k"), "p256"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want Canceled", err)
	}
	close(left)
	f.arm(nil)
	// Generate waits for its turn, which the first one still has.
	if _, err := p.Generate(t.Context(), "l", []byte("k"), "p256"); err != nil {
		t.Errorf("once more: %v", err)
	}
}

func TestGenerateSerialised(t *testing.T) {
	c := newToken(t)
	c.Sessions = 4
	p, f := openFaulty(t, c)
	var mu sync.Mutex
	running := 0
	f.arm(func(call string) error {
		mu.Lock()
		defer mu.Unlock()
		switch call {
		case "C_GenerateKeyPair":
			if running++; running > 1 {
				t.Error("two pairs are made at once")
			}
		case "after C_GenerateKeyPair":
			running--
		}
		return nil
	})
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() { generate(t, p, fmt.Sprint(i), "p256") })
	}
	wg.Wait()
	wg.Go(func() {
		if err := p.Delete(t.Context(), []byte("3")); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	if _, err := p.Sign(t.Context(), []byte("3"), d256, crypto.SHA256); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("after Delete: got %v, want ErrNotFound", err)
	}
}

// The private value cannot be read, and the key does nothing but sign.
func TestNotExtractable(t *testing.T) {
	p := openPool(t, newToken(t))
	ctx, slot := p.LoadedCtx()
	sh, err := ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	defer ctx.CloseSession(sh)
	for algorithm, secrets := range map[string][]uint{
		"rsa2048": {pkcs11.CKA_PRIVATE_EXPONENT, pkcs11.CKA_PRIME_1, pkcs11.CKA_PRIME_2, pkcs11.CKA_EXPONENT_1, pkcs11.CKA_COEFFICIENT},
		"p256":    {pkcs11.CKA_VALUE},
		"p384":    {pkcs11.CKA_VALUE},
		"ed25519": {pkcs11.CKA_VALUE},
	} {
		generate(t, p, algorithm, algorithm)
		h := rawFind(t, ctx, sh, algorithm)
		for _, a := range secrets {
			v, err := ctx.GetAttributeValue(sh, h, []*pkcs11.Attribute{pkcs11.NewAttribute(a, nil)})
			if !errors.Is(err, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_SENSITIVE)) {
				t.Errorf("%s: attribute %#x: got %v, %v; want CKR_ATTRIBUTE_SENSITIVE", algorithm, a, v, err)
			}
		}
		for _, a := range []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false)} {
			if err := ctx.SetAttributeValue(sh, h, []*pkcs11.Attribute{a}); err == nil {
				t.Errorf("%s: attribute %#x could be set", algorithm, a.Type)
			}
		}
		if err := ctx.DecryptInit(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil)}, h); err == nil {
			t.Errorf("%s: the key decrypts", algorithm)
		}
	}
}

// OpenSC, in its own process, finds the keys by id, signs, and cannot read them.
func TestOpenSC(t *testing.T) {
	c := newToken(t)
	p := openPool(t, c)
	dir := t.TempDir()
	tool := func(args ...string) (string, error) {
		args = append([]string{"--module", softhsm, "--token-label", c.TokenLabel, "--login", "--pin", userPIN}, args...)
		cmd := exec.CommandContext(t.Context(), "pkcs11-tool", args...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	in := filepath.Join(dir, "in")
	if err := os.WriteFile(in, d256, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, k := range []struct{ algorithm, mechanism string }{{"p256", "ECDSA"}, {"ed25519", "EDDSA"}, {"rsa2048", "RSA-PKCS"}} {
		t.Run(k.algorithm, func(t *testing.T) {
			pub := generate(t, p, k.algorithm, k.algorithm)
			id := fmt.Sprintf("%x", k.algorithm)
			list, err := tool("--list-objects")
			if err != nil || !strings.Contains(list, "label of "+k.algorithm) || strings.Count(list, id) != 2 {
				t.Errorf("list: %v\n%s", err, list)
			}
			if !strings.Contains(list, "sensitive, always sensitive, never extractable, local") {
				t.Errorf("the private key's access is not as it should be:\n%s", list)
			}
			text := in
			if k.algorithm == "rsa2048" { // its CKM_RSA_PKCS wants the DigestInfo from us
				text = filepath.Join(dir, "info")
				info := append([]byte("\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"), d256...)
				if err := os.WriteFile(text, info, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			out := filepath.Join(dir, k.algorithm+".sig")
			if s, err := tool("--sign", "--mechanism", k.mechanism, "--id", id, "-i", text, "-o", out); err != nil {
				t.Fatalf("sign: %v\n%s", err, s)
			}
			sig, err := os.ReadFile(out)
			if err == nil {
				err = check(pub, d256, sig, crypto.SHA256)
			}
			if err != nil {
				t.Error(err)
			}
			// OpenSC 0.23 says that it cannot read private keys, and exits 0: what
			// counts is that no file was made. TestNotExtractable asks the token.
			key := filepath.Join(dir, k.algorithm+".key")
			s, err := tool("--read-object", "--type", "privkey", "--id", id, "-o", key)
			if b, rerr := os.ReadFile(key); rerr == nil && len(b) > 0 {
				t.Errorf("the private key is in a file: %v\n%s", err, s)
			}
		})
	}
}

// TestCrypto11 runs this binary again: crypto11 finalises the module for the
// whole process.
func TestCrypto11(t *testing.T) {
	c := newToken(t)
	p := openPool(t, c)
	generate(t, p, "ec", "p256")
	generate(t, p, "rsa", "rsa2048")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestCrypto11Child$", "-test.v")
	cmd.Env = append(os.Environ(), "HSM_CRYPTO11_TOKEN="+c.TokenLabel, "SOFTHSM2_CONF="+env["SOFTHSM2_CONF"])
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "signed with 4 signers") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestCrypto11Child is the other process of TestCrypto11; by itself it has
// nothing to do.
func TestCrypto11Child(t *testing.T) {
	label := os.Getenv("HSM_CRYPTO11_TOKEN")
	if label == "" {
		return
	}
	ctx, err := crypto11.Configure(&crypto11.Config{Path: softhsm, TokenLabel: label, Pin: userPIN, MaxSessions: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer ctx.Close()
	signed := 0
	for _, id := range []string{"ec", "rsa"} {
		byID, err := ctx.FindKeyPair([]byte(id), nil)
		if err != nil || byID == nil {
			t.Fatalf("%s by id: %v, %v", id, byID, err)
		}
		byLabel, err := ctx.FindKeyPair(nil, []byte("label of "+id))
		if err != nil || byLabel == nil {
			t.Fatalf("%s by label: %v, %v", id, byLabel, err)
		}
		for _, s := range []crypto11.Signer{byID, byLabel} {
			sig, err := s.Sign(nil, d256, crypto.SHA256)
			if pub, ok := s.Public().(*ecdsa.PublicKey); err == nil && ok {
				if !ecdsa.VerifyASN1(pub, d256, sig) {
					err = errors.New("does not verify")
				}
			} else if err == nil {
				err = check(s.Public(), d256, sig, crypto.SHA256)
			}
			if err != nil {
				t.Fatalf("%s: %v", id, err)
			}
			signed++
			for _, a := range []crypto11.AttributeType{crypto11.CkaValue, crypto11.CkaPrivateExponent} {
				if v, err := ctx.GetAttribute(s, a); err == nil && v != nil && len(v.Value) > 0 {
					t.Errorf("%s: attribute %v can be read", id, a)
				}
			}
		}
	}
	t.Logf("signed with %d signers", signed)
}
