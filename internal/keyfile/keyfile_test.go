package keyfile_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"github.com/signwarden/signwarden/internal/keyfile"
)

// run runs a tool, which has to be there.
func run(t testing.TB, env []string, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	var out, says bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &says
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, says.Bytes())
	}
	return out.Bytes()
}

// spki is a public key as openssl writes it.
func spki(t testing.TB, k crypto.PrivateKey) string {
	t.Helper()
	s, ok := k.(crypto.Signer)
	if !ok {
		t.Fatalf("a key of type %T", k)
	}
	der, err := x509.MarshalPKIXPublicKey(s.Public())
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func passphrase(s string) func() ([]byte, error) {
	return func() ([]byte, error) { return []byte(s), nil }
}

// What openssl and ssh-keygen write is read, and is the key that they say it is.
func TestPEM(t *testing.T) {
	dir := t.TempDir()
	for _, k := range []struct {
		name   string
		make   []string
		legacy []string // the same in its older form
	}{
		{"rsa", []string{"genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"}, []string{"rsa", "-traditional"}},
		{"p256", []string{"genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"}, []string{"ec"}},
		{"p384", []string{"genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"}, []string{"ec"}},
		{"ed25519", []string{"genpkey", "-algorithm", "ED25519"}, nil},
	} {
		path := filepath.Join(dir, k.name)
		run(t, nil, "openssl", append(k.make, "-out", path)...)
		want := string(run(t, nil, "openssl", "pkey", "-in", path, "-pubout"))
		pkcs8, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		forms := map[string][]byte{
			"PKCS #8":                 pkcs8,
			"with a certificate":      append([]byte("Bag Attributes\n-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), pkcs8...),
			"with what openssl shows": run(t, nil, "openssl", "pkey", "-in", path, "-text"),
		}
		if k.legacy != nil {
			forms["older form"] = run(t, nil, "openssl", append(k.legacy, "-in", path)...)
		}
		if k.name == "p256" {
			forms["with EC PARAMETERS"] = append(run(t, nil, "openssl", "ecparam", "-name", "prime256v1"), forms["older form"]...)
		}
		for form, text := range forms {
			key, err := keyfile.Parse(text, keyfile.Options{})
			if err != nil {
				t.Errorf("%s, %s: %v", k.name, form, err)
			} else if got := spki(t, key); got != want {
				t.Errorf("%s, %s: another key\n%s", k.name, form, got)
			}
		}
	}
	for _, k := range []struct{ typ, pass string }{{"ed25519", ""}, {"ed25519", "secret words"}, {"rsa", "secret words"}, {"ecdsa", ""}} {
		path := filepath.Join(dir, "ssh-"+k.typ+k.pass)
		run(t, nil, "ssh-keygen", "-q", "-t", k.typ, "-N", k.pass, "-f", path)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		key, err := keyfile.Parse(text, keyfile.Options{Passphrase: passphrase(k.pass)})
		if err != nil {
			t.Errorf("OpenSSH %s: %v", k.typ, err)
		} else if k.typ != "ed25519" { // which ssh-keygen cannot export
			if want := string(run(t, nil, "ssh-keygen", "-e", "-m", "PKCS8", "-f", path+".pub")); spki(t, key) != want {
				t.Errorf("OpenSSH %s: another key", k.typ)
			}
		}
		if k.pass == "" {
			continue
		}
		for _, o := range []keyfile.Options{{}, {Passphrase: passphrase("wrong")}} {
			if key, err := keyfile.Parse(text, o); key != nil || !errors.Is(err, keyfile.ErrPassphrase) || strings.Contains(err.Error(), "wrong") {
				t.Errorf("OpenSSH %s, wrong passphrase: %v", k.typ, err)
			}
		}
	}
}

// gpg has a home of its own, whose agent ends with the test.
func gpg(t testing.TB) func(args ...string) []byte {
	t.Helper()
	home, err := os.MkdirTemp("", "gpg") // short: the agent's socket is in it
	if err != nil {
		t.Fatal(err)
	}
	// Passphrases that are tried cost as little as may be.
	if err := os.WriteFile(filepath.Join(home, "gpg-agent.conf"), []byte("s2k-count 65536\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"GNUPGHOME=" + home}
	t.Cleanup(func() {
		run(t, env, "gpgconf", "--kill", "all")
		os.RemoveAll(home)
	})
	return func(args ...string) []byte {
		return run(t, env, "gpg", append([]string{"--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", "secret words"}, args...)...)
	}
}

// fingerprints are those of a certificate, the primary's first.
func fingerprints(t testing.TB, gpg func(...string) []byte) []string {
	t.Helper()
	var all []string
	for line := range strings.Lines(string(gpg("--with-colons", "--list-secret-keys"))) {
		if f := strings.Split(line, ":"); f[0] == "fpr" {
			all = append(all, f[9])
		}
	}
	return all
}

// What gpg exports is read: each kind of key, armored and not, and of several keys
// the one that can sign, or that is named.
func TestOpenPGP(t *testing.T) {
	for algorithm, add := range map[string]string{
		"rsa2048": "rsa2048", "ed25519": "ed25519", "nistp256": "nistp256/ecdsa", "nistp384": "nistp384/ecdsa",
	} {
		t.Run(algorithm, func(t *testing.T) {
			gpg := gpg(t)
			gpg("--quick-gen-key", "A <a@example.org>", algorithm, "cert", "never")
			primary := fingerprints(t, gpg)[0]
			gpg("--quick-add-key", primary, add, "sign", "never")
			if algorithm == "rsa2048" {
				gpg("--quick-add-key", primary, algorithm, "encrypt", "never")
			}
			all := fingerprints(t, gpg)
			for _, form := range [][]string{{}, {"--armor"}} {
				text := gpg(append(form, "--export-secret-keys")...)
				byFingerprint := map[string]string{}
				for _, fpr := range all {
					key, err := keyfile.Parse(text, keyfile.Options{Passphrase: passphrase("secret words"), OpenPGP: fpr})
					if err != nil {
						t.Fatalf("%s: %v", fpr, err)
					}
					byFingerprint[fpr] = spki(t, key)
				}
				key, err := keyfile.Parse(text, keyfile.Options{Passphrase: passphrase("secret words")})
				if err != nil || spki(t, key) != byFingerprint[all[1]] || byFingerprint[all[0]] == byFingerprint[all[1]] {
					t.Errorf("%v: of the keys it is not the signing subkey: %v", form, err)
				}
				for _, o := range []keyfile.Options{{}, {Passphrase: passphrase("wrong")}} {
					if _, err := keyfile.Parse(text, o); !errors.Is(err, keyfile.ErrPassphrase) {
						t.Errorf("wrong passphrase: %v", err)
					}
				}
				for name, want := range map[string]error{"0123456789ABCDEF0123": keyfile.ErrWhich, all[0][36:]: keyfile.ErrWhich} {
					if _, err := keyfile.Parse(text, keyfile.Options{OpenPGP: name}); !errors.Is(err, want) {
						t.Errorf("%q: got %v", name, err)
					}
				}
			}
			// The secret part of the primary is elsewhere.
			text := gpg("--export-secret-subkeys")
			if _, err := keyfile.Parse(text, keyfile.Options{Passphrase: passphrase("secret words")}); err != nil {
				t.Errorf("primary off line: %v", err)
			}
			if _, err := keyfile.Parse(text, keyfile.Options{OpenPGP: primary}); !errors.Is(err, keyfile.ErrUnsupported) {
				t.Errorf("primary off line, and named: %v", err)
			}
			if _, err := keyfile.Parse(gpg("--armor", "--export"), keyfile.Options{}); !errors.Is(err, keyfile.ErrMalformed) {
				t.Errorf("a certificate: %v", err)
			}
		})
	}
}

// Of two keys that can sign one has to be named, and the error tells which there are.
func TestOpenPGPWhich(t *testing.T) {
	gpg := gpg(t)
	gpg("--quick-gen-key", "A <a@example.org>", "ed25519", "sign", "never")
	primary := fingerprints(t, gpg)[0]
	gpg("--quick-add-key", primary, "ed25519", "sign", "never")
	_, err := keyfile.Parse(gpg("--export-secret-keys"), keyfile.Options{Passphrase: passphrase("secret words")})
	if !errors.Is(err, keyfile.ErrWhich) {
		t.Fatalf("got %v", err)
	}
	for _, fpr := range fingerprints(t, gpg) {
		if !strings.Contains(err.Error(), fpr) {
			t.Errorf("%q does not have %s", err, fpr)
		}
	}
}

// As long, with as many packets and keys, as there may be; and one more.
func TestBounds(t *testing.T) {
	parse := func(parts ...[]byte) string {
		_, err := keyfile.Parse(bytes.Join(parts, nil), keyfile.Options{Passphrase: passphrase("")})
		if err == nil {
			t.Fatal("it has no key that is meant, and is read")
		}
		return err.Error()
	}
	const more = "more packets or keys"
	if err := parse(make([]byte, keyfile.MaxSize)); strings.Contains(err, "bytes") {
		t.Errorf("the longest file: %v", err)
	}
	if err := parse(make([]byte, keyfile.MaxSize+1)); !strings.Contains(err, "bytes") {
		t.Errorf("a longer one: %v", err)
	}
	gpg := gpg(t)
	gpg("--passphrase", "", "--quick-gen-key", "A <a@example.org>", "ed25519", "sign", "never")
	file := gpg("--export-secret-keys")
	first, err := packet.NewOpaqueReader(bytes.NewReader(file)).Next()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := first.Serialize(&b); err != nil {
		t.Fatal(err)
	}
	key, uid := b.Bytes(), []byte("\xcd\x01A")
	if err := parse(bytes.Repeat(key, 64), uid); strings.Contains(err, more) {
		t.Errorf("64 keys and what follows: %v", err)
	}
	if err := parse(bytes.Repeat(key, 65)); !strings.Contains(err, more) {
		t.Errorf("65 keys: %v", err)
	}
	if err := parse(bytes.Repeat(uid, 4096)); strings.Contains(err, more) {
		t.Errorf("4096 packets: %v", err)
	}
	if err := parse(bytes.Repeat(uid, 4097)); !strings.Contains(err, more) {
		t.Errorf("4097 packets: %v", err)
	}
}

func refused(t testing.TB) map[string][]byte {
	dir := t.TempDir()
	path := filepath.Join(dir, "k")
	run(t, nil, "openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	damaged := slices.Clone(text)
	copy(damaged[60:], "AAAAAAAAAAAA")
	return map[string][]byte{
		"nothing":           nil,
		"text":              []byte("hello"),
		"cut off":           text[:len(text)/2],
		"damaged":           damaged,
		"two keys":          append(slices.Clone(text), text...),
		"a public key":      run(t, nil, "openssl", "pkey", "-in", path, "-pubout"),
		"encrypted PKCS #8": run(t, nil, "openssl", "pkcs8", "-topk8", "-in", path, "-passout", "pass:secret"),
		"encrypted older":   run(t, nil, "openssl", "ec", "-aes128", "-in", path, "-passout", "pass:secret"),
		"X25519":            run(t, nil, "openssl", "genpkey", "-algorithm", "X25519"),
		"binary":            {0x95, 0x01, 0x02},
		"too long":          make([]byte, keyfile.MaxSize+1),
	}
}

func TestRefused(t *testing.T) {
	for name, text := range refused(t) {
		key, err := keyfile.Parse(text, keyfile.Options{Passphrase: passphrase("secret")})
		if _, signs := key.(crypto.Signer); err == nil && signs || err != nil && key != nil {
			t.Errorf("%s: %T, %v", name, key, err)
		}
		if strings.HasPrefix(name, "encrypted") && (!errors.Is(err, keyfile.ErrUnsupported) || !strings.Contains(err.Error(), "openssl pkey")) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Whatever is read is a key whose halves belong together, and nothing crashes.
func FuzzParse(f *testing.F) {
	seeds := 0
	for _, text := range refused(f) {
		f.Add(text[:min(len(text), 4096)], "")
		seeds++
	}
	gpg := gpg(f)
	gpg("--passphrase", "", "--quick-gen-key", "A <a@example.org>", "ed25519", "sign", "never")
	gpg("--passphrase", "", "--quick-gen-key", "B <b@example.org>", "nistp256", "sign", "never")
	for _, fpr := range fingerprints(f, gpg) {
		f.Add(gpg("--export-secret-keys", fpr), "")
		f.Add(gpg("--armor", "--export-secret-keys", fpr), fpr)
		seeds += 2
	}
	if seeds < 12 {
		f.Fatalf("%d seeds", seeds)
	}
	f.Fuzz(func(t *testing.T, b []byte, fpr string) {
		key, err := keyfile.Parse(b, keyfile.Options{Passphrase: passphrase(""), OpenPGP: fpr})
		if err != nil && key != nil {
			t.Fatalf("%T beside %v", key, err)
		}
		if err == nil && fmt.Sprintf("%T", key) == "<nil>" {
			t.Fatal("no key, and no error")
		}
	})
}
