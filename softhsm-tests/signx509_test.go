package softhsm_test

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/formats/efivar"
)

// Kernel modules signed in place: what is appended is what the kernel wants, and
// openssl verifies it over the module as it was.
func TestSignKMod(t *testing.T) {
	g := newGateway(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writeFile(t, at("m.c"), "int init_module(void) { return 0; }\n")
	mustEnv(t, os.Environ(), "gcc", "-c", "-o", at("m.ko"), at("m.c"))
	module, err := os.ReadFile(at("m.ko"))
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"rsa4096", "p256"} {
		g.must(t, "signwarden", "key", "create", a, "--algorithm", a)
		g.must(t, "signwarden", "key", "cert", a, "--self-signed", "--subject", "CN="+a, "--usage", "kmod")
		writeFile(t, at("cert.pem"), g.must(t, "signwarden", "key", "export", a, "--format", "x509"))
		g.must(t, "signwarden", "sign", "kmod", "--key", a, at("m.ko")) // over that of the key before
		signed, err := os.ReadFile(at("m.ko"))
		if err != nil {
			t.Fatal(err)
		}
		const magic = "~Module signature appended~\n"
		if !bytes.HasPrefix(signed, module) || !bytes.HasSuffix(signed, []byte(magic)) {
			t.Fatalf("%s: %d bytes of a module of %d do not end with the magic", a, len(signed), len(module))
		}
		end := len(signed) - len(magic) - 12
		size := int(binary.BigEndian.Uint32(signed[end+8:]))
		if end-size != len(module) {
			t.Fatalf("%s: a signature of %d bytes does not follow the module of %d", a, size, len(module))
		}
		writeFile(t, at("sig"), string(signed[end-size:end]))
		writeFile(t, at("content"), string(module))
		mustEnv(t, os.Environ(), "openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", at("sig"), "-content", at("content"),
			"-certfile", at("cert.pem"), "-CAfile", at("cert.pem"), "-nointern", "-purpose", "any", "-out", "/dev/null")
		g.must(t, "signwarden", "verify", "kmod", "--cert", at("cert.pem"), at("m.ko"))
		if e := g.audit(t, 1)[0].Entry; e["format"] != "kmod" || e["claim_file"] != "m.ko" || e["key"] != a {
			t.Errorf("audit entry %v", e)
		}
	}
	rows := len(g.audit(t, 1000))
	if r := g.try(t, "signwarden", "sign", "kmod", "--key", "p256", "--refuse-signed", at("m.ko")); r.code != 1 || !strings.Contains(r.stderr, "already signed") {
		t.Errorf("a signed module: exit code %d: %s", r.code, r.stderr)
	}
	if r := g.try(t, "signwarden", "sign", "kmod", "--key", "p256", at("m.c")); r.code != 1 {
		t.Errorf("no module: exit code %d: %s", r.code, r.stderr)
	}
	g.must(t, "signwarden", "key", "create", "bare", "--algorithm", "p256")
	if r := g.try(t, "signwarden", "sign", "kmod", "--key", "bare", at("m.ko")); r.code != 2 || !strings.Contains(r.stderr, "key cert bare") {
		t.Errorf("a key without a certificate: exit code %d: %s", r.code, r.stderr)
	}
	if now := len(g.audit(t, 1000)); now != rows+1 { // the new key
		t.Errorf("%d audit rows were added, want 1", now-rows)
	}
}

// Detached CMS signatures, by openssl.
func TestSignCMS(t *testing.T) {
	g := newGateway(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writeFile(t, at("disk.img"), strings.Repeat("image", 10_000))
	for _, a := range []string{"rsa2048", "p384"} {
		g.must(t, "signwarden", "key", "create", a, "--algorithm", a)
		g.must(t, "signwarden", "key", "cert", a, "--self-signed", "--subject", "CN="+a)
		writeFile(t, at("cert.pem"), g.must(t, "signwarden", "key", "export", a, "--format", "x509"))
		for _, form := range []string{"DER", "PEM"} {
			args := []string{"sign", "cms", "--key", a, "--force", at("disk.img")}
			if form == "PEM" {
				args = append(args, "--pem")
			}
			g.must(t, "signwarden", args...)
			verify := []string{"cms", "-verify", "-binary", "-inform", form, "-in", at("disk.img.p7s"), "-CAfile", at("cert.pem"), "-purpose", "any", "-out", "/dev/null", "-content"}
			mustEnv(t, os.Environ(), "openssl", append(verify, at("disk.img"))...)
			if r := runEnv(t, os.Environ(), "openssl", append(verify, at("cert.pem"))...); r.code == 0 {
				t.Error("openssl accepts it over another file: this test could not fail")
			}
			g.must(t, "signwarden", "verify", "cms", "--key", a, at("disk.img"))
			if r := g.try(t, "signwarden", "verify", "cms", "--key", a, "--signature", at("disk.img.p7s"), at("cert.pem")); r.code != 3 {
				t.Errorf("over another file: exit code %d, want 3: %s", r.code, r.stderr)
			}
		}
	}
}

// EFI images signed in place, by sbverify.
func TestSignEFI(t *testing.T) {
	images, err := filepath.Glob("/usr/lib/systemd/boot/efi/systemd-boot*.efi")
	if err != nil || len(images) == 0 {
		t.Fatalf("no EFI image of systemd-boot is installed (%v): run softhsm-tests/install-deps.sh", err)
	}
	g := newGateway(t)
	g.must(t, "signwarden", "key", "create", "boot", "--algorithm", "rsa2048")
	g.must(t, "signwarden", "key", "cert", "boot", "--self-signed", "--subject", "CN=boot", "--usage", "efi")
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "cert.pem"), g.must(t, "signwarden", "key", "export", "boot", "--format", "x509"))
	for _, image := range images {
		to := filepath.Join(dir, filepath.Base(image))
		mustEnv(t, os.Environ(), "cp", image, to)
		if err := os.Chmod(to, 0o640); err != nil {
			t.Fatal(err)
		}
		g.must(t, "signwarden", "sign", "efi", "--key", "boot", to)
		mustEnv(t, os.Environ(), "sbverify", "--cert", filepath.Join(dir, "cert.pem"), to)
		g.must(t, "signwarden", "verify", "efi", "--key", "boot", to)
		if r := g.try(t, "signwarden", "verify", "efi", "--key", "boot", image); r.code != 3 {
			t.Errorf("the unsigned image: exit code %d, want 3: %s", r.code, r.stderr)
		}
		if info, err := os.Stat(to); err != nil || info.Mode().Perm() != 0o640 {
			t.Errorf("mode %v, %v; want 0640", info.Mode(), err)
		}
		if e := g.audit(t, 1)[0].Entry; e["format"] != "authenticode" {
			t.Errorf("audit entry %v", e)
		}
	}
}

// Updates of EFI variables, of a list that efitools made. (formats/efivar compares
// its updates with those of efitools byte for byte.)
func TestSignEFIVar(t *testing.T) {
	g := newGateway(t)
	g.must(t, "signwarden", "key", "create", "kek", "--algorithm", "rsa2048")
	g.must(t, "signwarden", "key", "cert", "kek", "--self-signed", "--subject", "CN=kek", "--usage", "efi")
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writeFile(t, at("cert.pem"), g.must(t, "signwarden", "key", "export", "kek", "--format", "x509"))
	mustEnv(t, os.Environ(), "cert-to-efi-sig-list", "-g", "8be4df61-93ca-11d2-aa0d-00e098032b8c", at("cert.pem"), at("db.esl"))
	esl, err := os.ReadFile(at("db.esl"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(g.must(t, "signwarden", "key", "export", "kek", "--format", "x509")))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	db, _ := efivar.Lookup("db")
	for _, tt := range []struct {
		args       []string
		attributes uint32
	}{{nil, efivar.Replacing}, {[]string{"--append"}, efivar.Appending}} {
		g.must(t, "signwarden", append([]string{"sign", "efivar", "--key", "kek", "--variable", "db", "--force", at("db.esl")}, tt.args...)...)
		auth, err := os.ReadFile(at("db.esl.auth"))
		if err != nil || !bytes.HasSuffix(auth, esl) {
			t.Fatalf("the update does not end with the lists (%v)", err)
		}
		u, err := efivar.Parse(auth)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := u.Verify(db, tt.attributes, []*x509.Certificate{cert}); err != nil {
			t.Errorf("%q: %v", tt.args, err)
		}
		if _, err := u.Verify(db, tt.attributes^efivar.AppendWrite, []*x509.Certificate{cert}); err == nil {
			t.Errorf("%q: it verifies with other attributes", tt.args)
		}
	}
	writeFile(t, at("bad.esl"), "no list")
	rows := len(g.audit(t, 1000))
	for _, args := range [][]string{{"--variable", "db", at("bad.esl")}, {"--variable", "Boot0001", at("db.esl")}} {
		if r := g.try(t, "signwarden", append([]string{"sign", "efivar", "--key", "kek", "--force"}, args...)...); r.code == 0 {
			t.Errorf("%q is signed", args)
		}
	}
	if now := len(g.audit(t, 1000)); now != rows {
		t.Errorf("%d requests were sent for nothing", now-rows)
	}
}

// Updates of EFI variables by us, sbvarsign and sign-efi-sig-list, verified by us:
// of the variable, vendor and attributes that they were made for, and no other.
func TestVerifyEFIVar(t *testing.T) {
	g := newGateway(t)
	g.must(t, "signwarden", "key", "create", "kek", "--algorithm", "rsa2048")
	g.must(t, "signwarden", "key", "cert", "kek", "--self-signed", "--subject", "CN=kek", "--usage", "efi")
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writeFile(t, at("ours.pem"), g.must(t, "signwarden", "key", "export", "kek", "--format", "x509"))
	mustEnv(t, os.Environ(), "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", at("theirs.key"), "-out", at("theirs.pem"), "-subj", "/CN=theirs", "-days", "2")
	mustEnv(t, os.Environ(), "cert-to-efi-sig-list", at("ours.pem"), at("db.esl"))
	const guid, other = "11111111-2222-3333-4444-123456789abc", "11111111-2222-3333-4444-123456789abd"

	g.must(t, "signwarden", "sign", "efivar", "--key", "kek", "--variable", "db", "--output", at("ours.auth"), at("db.esl"))
	g.must(t, "signwarden", "sign", "efivar", "--key", "kek", "--variable", "dbx", "--append", "--output", at("ours-append.auth"), at("db.esl"))
	mustEnv(t, os.Environ(), "sign-efi-sig-list", "-k", at("theirs.key"), "-c", at("theirs.pem"), "KEK", at("db.esl"), at("efitools.auth"))
	mustEnv(t, os.Environ(), "sign-efi-sig-list", "-a", "-k", at("theirs.key"), "-c", at("theirs.pem"), "db", at("db.esl"), at("efitools-append.auth"))
	mustEnv(t, os.Environ(), "sbvarsign", "--key", at("theirs.key"), "--cert", at("theirs.pem"), "--attr", "NON_VOLATILE,BOOTSERVICE_ACCESS,RUNTIME_ACCESS", "--output", at("sbvarsign.auth"), "db", at("db.esl"))
	mustEnv(t, os.Environ(), "sbvarsign", "--key", at("theirs.key"), "--cert", at("theirs.pem"), "--output", at("sbvarsign-append.auth"), "--guid", guid, "Setting", at("db.esl"))

	for _, tt := range []struct {
		file string
		cert []string
		good []string   // of these flags
		bad  [][]string // of none of these
	}{
		{"ours.auth", []string{"--key", "kek"}, []string{"--variable", "db"},
			[][]string{{"--variable", "db", "--append"}, {"--variable", "dbx"}, {"--variable", "db", "--vendor", guid}}},
		{"ours-append.auth", []string{"--cert", at("ours.pem")}, []string{"--variable", "dbx", "--append"},
			[][]string{{"--variable", "dbx"}, {"--variable", "db", "--append"}}},
		{"efitools.auth", []string{"--cert", at("theirs.pem")}, []string{"--variable", "KEK"},
			[][]string{{"--variable", "KEK", "--append"}, {"--variable", "PK"}}},
		{"efitools-append.auth", []string{"--cert", at("theirs.pem")}, []string{"--variable", "db", "--append"},
			[][]string{{"--variable", "db"}}},
		{"sbvarsign.auth", []string{"--cert", at("theirs.pem")}, []string{"--variable", "db", "--vendor", "D719B2CB-3D3A-4596-A3BC-DAD00E67656F"},
			[][]string{{"--variable", "db", "--append"}, {"--variable", "dbx"}}},
		{"sbvarsign-append.auth", []string{"--cert", at("theirs.pem")}, []string{"--variable", "Setting", "--vendor", guid, "--append"},
			[][]string{{"--variable", "Setting", "--vendor", other, "--append"}, {"--variable", "setting", "--vendor", guid, "--append"}}},
	} {
		verify := func(cert, flags []string, files ...string) result {
			t.Helper()
			return g.try(t, "signwarden", append(append(append([]string{"verify", "efivar"}, cert...), flags...), files...)...)
		}
		name := at(tt.file)
		if r := verify(tt.cert, tt.good, name); r.code != 0 || !strings.Contains(r.stdout, name+": good signature by CN=") {
			t.Errorf("%s: exit code %d: %s%s", tt.file, r.code, r.stdout, r.stderr)
		}
		for _, flags := range tt.bad {
			if r := verify(tt.cert, flags, name); r.code != 3 || r.stdout != "" || !strings.Contains(r.stderr, name+": ") {
				t.Errorf("%s %q: exit code %d, want 3: %s%s", tt.file, flags, r.code, r.stdout, r.stderr)
			}
		}
		stranger := []string{"--cert", at("theirs.pem")}
		if !strings.HasPrefix(tt.file, "ours") {
			stranger = []string{"--key", "kek"}
		}
		if r := verify(stranger, tt.good, name); r.code != 3 {
			t.Errorf("%s by a stranger: exit code %d, want 3: %s", tt.file, r.code, r.stderr)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		flipped := bytes.Clone(b)
		flipped[len(b)-1] ^= 1
		writeFile(t, at("flipped.auth"), string(flipped))
		writeFile(t, at("cut.auth"), string(b[:len(b)-1]))
		writeFile(t, at("empty.auth"), "")
		broken := []string{at("flipped.auth"), at("cut.auth"), at("empty.auth"), at("db.esl")}
		r := verify(tt.cert, tt.good, append([]string{name}, broken...)...)
		if r.code != 3 || strings.Count(r.stdout, "\n") != 1 {
			t.Errorf("%s and broken ones: exit code %d, want 3: %s%s", tt.file, r.code, r.stdout, r.stderr)
		}
		for _, f := range broken {
			if n := strings.Count(r.stderr, "signwarden: "+f+": "); n != 1 {
				t.Errorf("%s is told of %d times:\n%s", f, n, r.stderr)
			}
		}
	}
	for _, flags := range [][]string{{"--variable", "Boot0001"}, {"--variable", "db", "--vendor", "db"}, {}} {
		if r := g.try(t, "signwarden", append([]string{"verify", "efivar", "--key", "kek", at("ours.auth")}, flags...)...); r.code != 2 {
			t.Errorf("%q: exit code %d, want 2: %s", flags, r.code, r.stderr)
		}
	}
}

// verify --key means that key, and nobody whose certificate its issuer has signed
// too; verify --cert with the issuer's certificate means all of them.
func TestVerifyKeyMeansKey(t *testing.T) {
	g := newGateway(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	openssl := func(args ...string) { t.Helper(); mustEnv(t, os.Environ(), "openssl", args...) }
	g.must(t, "signwarden", "key", "create", "leaf", "--algorithm", "p256")
	writeFile(t, at("leaf.csr"), g.must(t, "signwarden", "key", "csr", "leaf", "--subject", "CN=leaf"))
	openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", at("ca.key"), "-out", at("ca.pem"), "-subj", "/CN=CA", "-days", "2")
	openssl("req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", at("sibling.key"), "-out", at("sibling.csr"), "-subj", "/CN=sibling")
	for _, name := range []string{"leaf", "sibling"} {
		openssl("x509", "-req", "-in", at(name+".csr"), "-CA", at("ca.pem"), "-CAkey", at("ca.key"), "-CAcreateserial", "-days", "1", "-out", at(name+".pem"))
	}
	chain := mustEnv(t, os.Environ(), "cat", at("leaf.pem"), at("ca.pem"))
	writeFile(t, at("chain.pem"), chain)
	g.must(t, "signwarden", "key", "cert", "leaf", "--import", at("chain.pem"))
	writeFile(t, at("ours"), "text")
	writeFile(t, at("siblings"), "text")
	g.must(t, "signwarden", "sign", "cms", "--key", "leaf", at("ours"))
	openssl("cms", "-sign", "-binary", "-outform", "DER", "-in", at("siblings"), "-signer", at("sibling.pem"), "-inkey", at("sibling.key"), "-out", at("siblings.p7s"))
	for _, tt := range []struct {
		by, file string
		code     int
	}{
		{"--key=leaf", "ours", 0}, {"--key=leaf", "siblings", 3},
		{"--cert=" + at("ca.pem"), "ours", 0}, {"--cert=" + at("ca.pem"), "siblings", 0},
	} {
		if r := g.try(t, "signwarden", "verify", "cms", tt.by, at(tt.file)); r.code != tt.code {
			t.Errorf("%s %s: exit code %d, want %d: %s%s", tt.by, tt.file, r.code, tt.code, r.stdout, r.stderr)
		}
	}
}

// A directory of all kinds: each file is signed as what it holds, whatever its
// name, and the rest is left alone.
func TestSignAuto(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "rsa2048")
	g.must(t, "signwarden", "key", "cert", "rel", "--self-signed", "--subject", "CN=rel")
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	mustEnv(t, os.Environ(), "cp", buildRPMs(t, 1)[0], at("package.bin"))
	mustEnv(t, os.Environ(), "sh", "-c", "cp $(ls /usr/lib/systemd/boot/efi/systemd-boot*.efi | head -n 1) "+at("boot.img"))
	writeFile(t, at("m.c"), "int init_module(void) { return 0; }\n")
	mustEnv(t, os.Environ(), "gcc", "-c", "-o", at("m.ko"), at("m.c"))
	mustEnv(t, os.Environ(), "cp", at("m.ko"), at("m.o")) // an object file, and no module
	writeFile(t, at("fake.rpm"), "not a package")
	before := map[string][]byte{}
	for _, name := range []string{"m.c", "m.o", "fake.rpm"} {
		b, err := os.ReadFile(at(name))
		if err != nil {
			t.Fatal(err)
		}
		before[name] = b
	}
	rows := len(g.audit(t, 1000))
	g.must(t, "signwarden", "sign", "auto", "--key", "rel", "-r", dir)
	g.must(t, "signwarden", "verify", "rpm", "--key", "rel", at("package.bin"))
	g.must(t, "signwarden", "verify", "efi", "--key", "rel", at("boot.img"))
	g.must(t, "signwarden", "verify", "kmod", "--key", "rel", at("m.ko"))
	formats := map[string]int{}
	for _, e := range g.audit(t, 1000)[rows:] {
		formats[e.Entry["format"]]++
	}
	if formats["rpm"] != 1 || formats["authenticode"] != 1 || formats["kmod"] != 1 || len(formats) != 3 {
		t.Errorf("asked for %v, want one rpm, authenticode and kmod", formats)
	}
	for name, b := range before {
		if now, err := os.ReadFile(at(name)); err != nil || !bytes.Equal(now, b) {
			t.Errorf("%s was changed (%v)", name, err)
		}
	}
	if r := g.try(t, "signwarden", "sign", "auto", "--key", "rel", at("fake.rpm")); r.code != 1 || !strings.Contains(r.stderr, "sign openpgp") {
		t.Errorf("a file of no kind: exit code %d: %s", r.code, r.stderr)
	}
}
