package openpgp_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signwarden/signwarden/formats/openpgp"
)

// rpmSigner is set in a child process of this test binary, which rpmsign runs in gpg's stead. Its value is a folder with
// cert and key; the argument is the file for the signature. What is to be signed comes on standard input.
const rpmSigner = "OPENPGP_TEST_RPM_SIGNER"

func TestMain(m *testing.M) {
	dir := os.Getenv(rpmSigner)
	if dir == "" {
		os.Exit(m.Run())
	}
	err := signForRPM(dir, os.Stdin, os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func signForRPM(dir string, plain io.Reader, sigPath string) error {
	message, err := io.ReadAll(plain)
	if err != nil {
		return err
	}
	cert, err := os.ReadFile(filepath.Join(dir, "cert"))
	if err != nil {
		return err
	}
	der, err := os.ReadFile(filepath.Join(dir, "key"))
	if err != nil {
		return err
	}
	secret, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return err
	}
	c, err := openpgp.ParseCertificate(cert)
	if err != nil {
		return err
	}
	signer := secret.(crypto.Signer)
	key, err := c.SigningKey(signer.Public())
	if err != nil {
		return err
	}
	zero := map[string]int{"R": 0, "S": 32}
	at, short := zero[os.Getenv("ZERO_OCTET")]
	for i := range 20000 {
		counting := &countingSigner{Signer: signer}
		var sig bytes.Buffer
		o := openpgp.SignOptions{Time: created.Add(time.Duration(i) * time.Second)}
		err = openpgp.DetachSign(&sig, bytes.NewReader(message), key, counting, o)
		if err != nil {
			return err
		}
		if !short || counting.raw[0][at] == 0 {
			return os.WriteFile(sigPath, sig.Bytes(), 0o600)
		}
	}
	return fmt.Errorf("no such signature")
}

// buildRPM builds an empty package.
func buildRPM(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	spec := filepath.Join(dir, "x.spec")
	text := "Name: x\nVersion: 1\nRelease: 1\nSummary: x\nLicense: x\nBuildArch: noarch\n%description\nx\n%files\n"
	err := os.WriteFile(spec, []byte(text), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	out, errOut, err := run(t, nil, nil, "rpmbuild", "--define", "_topdir "+dir, "-bb", spec)
	if err != nil {
		t.Fatalf("rpmbuild: %v\n%s%s", err, out, errOut)
	}
	return filepath.Join(dir, "RPMS", "noarch", "x-1-1.noarch.rpm")
}

// rpmsign puts our signatures into a package, and rpmkeys verifies it. Ed25519 numbers with a leading zero octet are of
// interest: libgcrypt takes only 32 octets, and an MPI has lost the zero.
func TestRPMVerifies(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	plain := buildRPM(t)
	tests := []struct {
		k      keyKind
		single bool
		zero   string
	}{
		{rsa2048, true, ""}, {rsa2048, false, ""},
		{ed, true, ""}, {ed, false, ""}, {ed, false, "R"}, {ed, false, "S"},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s/single=%t/zero=%s", tt.k.name, tt.single, tt.zero), func(t *testing.T) {
			s := newSubject(t, tt.k, tt.single)
			dir := t.TempDir()
			der, err := x509.MarshalPKCS8PrivateKey(s.signer)
			if err != nil {
				t.Fatal(err)
			}
			pkg := filepath.Join(dir, "x.rpm")
			for name, data := range map[string][]byte{"cert": s.cert, "key": der, "x.rpm": read(t, plain)} {
				err = os.WriteFile(filepath.Join(dir, name), data, 0o600)
				if err != nil {
					t.Fatal(err)
				}
			}
			out, errOut, err := run(t, nil, []string{rpmSigner + "=" + dir, "ZERO_OCTET=" + tt.zero}, "rpmsign",
				"--define", "_gpg_name x",
				"--define", "__gpg_sign_cmd "+self+" signer %{__signature_filename}",
				"--addsign", pkg)
			if err != nil {
				t.Fatalf("rpmsign: %v\n%s%s", err, out, errOut)
			}
			db, out, err := rpmImport(t, s)
			if err != nil {
				t.Fatalf("rpmkeys --import: %v\n%s", err, out)
			}
			out, errOut, err = run(t, nil, nil, "rpmkeys", "--dbpath", db, "-Kv", pkg)
			id := strings.ToLower(s.key.Fingerprint.String()[32:]) // rpm 4.18 prints the low 32 bits
			if err != nil || !strings.Contains(out, "key ID "+id+": OK") {
				t.Errorf("rpmkeys -Kv: %v\n%s%s", err, out, errOut)
			}
		})
	}
}

// rpmImport imports the certificate into a fresh database.
func rpmImport(t *testing.T, s subject) (db, out string, err error) {
	t.Helper()
	var armored bytes.Buffer
	err = s.parsed(t).Armor(&armored)
	if err != nil {
		t.Fatal(err)
	}
	db = t.TempDir()
	out, errOut, err := run(t, nil, nil, "rpmkeys", "--dbpath", db, "--import", file(t, "cert.asc", armored.Bytes()))
	return db, out + errOut, err
}
