package softhsm_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// p11Site is a gateway with keys of each kind and their certificates, whose files tools
// find in dir: NAME.pem, ca.pem, msg.
type p11Site struct {
	*gateway
	dir string
}

// The keys: kmod is of RSA, with a self-signed certificate; ec is of P-256, with one of
// a CA; ed is of Ed25519, which no tool must stumble over.
func newP11Site(t *testing.T) *p11Site {
	t.Helper()
	s := &p11Site{newGateway(t), shortDir(t)}
	for name, algorithm := range map[string]string{"kmod": "rsa2048", "ec": "p256", "ed": "ed25519"} {
		s.gateway.must(t, "signwarden", "key", "create", name, "--algorithm", algorithm)
	}
	s.gateway.must(t, "signwarden", "key", "cert", "kmod", "--self-signed", "--subject", "CN=kmod", "--usage", "kmod")
	s.write(t, "kmod.pem", s.gateway.must(t, "signwarden", "key", "export", "kmod", "--format", "x509"))
	s.write(t, "ec.csr", s.gateway.must(t, "signwarden", "key", "csr", "ec", "--subject", "CN=ec"))
	s.host(t, "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", s.at("ca.key"), "-out", s.at("ca.pem"), "-subj", "/CN=Test CA", "-days", "2")
	s.write(t, "ext", "extendedKeyUsage = codeSigning\nkeyUsage = digitalSignature\n")
	s.host(t, "openssl", "x509", "-req", "-in", s.at("ec.csr"), "-CA", s.at("ca.pem"), "-CAkey", s.at("ca.key"), "-CAcreateserial", "-days", "1", "-extfile", s.at("ext"), "-out", s.at("ec.pem"))
	s.write(t, "chain.pem", s.host(t, "openssl", "x509", "-in", s.at("ec.pem"))+s.host(t, "openssl", "x509", "-in", s.at("ca.pem")))
	s.gateway.must(t, "signwarden", "key", "cert", "ec", "--import", s.at("chain.pem"))
	s.write(t, "msg", "to be signed\n")
	return s
}

func (s *p11Site) at(name string) string { return filepath.Join(s.dir, name) }

func (s *p11Site) write(t *testing.T, name, text string) string {
	t.Helper()
	writeFile(t, s.at(name), text)
	return s.at(name)
}

// host runs what needs no key of ours: a verifier above all.
func (s *p11Site) host(t *testing.T, name string, args ...string) string {
	t.Helper()
	return mustEnv(t, os.Environ(), name, args...)
}

// exec runs an unmodified tool under `signwarden exec`, without a terminal.
func (s *p11Site) exec(t *testing.T, name string, args ...string) string {
	t.Helper()
	return s.gateway.must(t, "signwarden", append([]string{"exec", "--", name}, args...)...)
}

// signed asserts what was signed since row: so many signatures, each by a request of the
// PKCS#11 socket, with the key.
func (s *p11Site) signed(t *testing.T, since int, key string, want int) {
	t.Helper()
	n := 0
	for _, e := range s.audit(t, 1000)[since:] {
		if e.Entry["action"] != "sign" {
			continue
		}
		n++
		if e.Entry["outcome"] != "signed" || e.Entry["format"] != "pkcs11" || e.Entry["key"] != key || !strings.Contains(e.Entry["claim_note"], "program /") {
			t.Errorf("audit entry %v", e.Entry)
		}
	}
	if n != want {
		t.Errorf("%d signatures by %s are recorded, want %d", n, key, want)
	}
}

func (s *p11Site) rows(t *testing.T) int { t.Helper(); return len(s.audit(t, 1000)) }

// p11Module is the distribution's own p11-kit-client.so.
func p11Module(t testing.TB) string {
	t.Helper()
	for _, pattern := range []string{"/usr/lib/*/pkcs11/p11-kit-client.so", "/usr/lib64/pkcs11/p11-kit-client.so"} {
		found, err := filepath.Glob(pattern)
		if err == nil && len(found) > 0 {
			return found[0]
		}
	}
	t.Fatal("p11-kit-client.so is not installed: run softhsm-tests/install-deps.sh")
	return ""
}

func efiImage(t *testing.T) string {
	t.Helper()
	images, err := filepath.Glob("/usr/lib/systemd/boot/efi/systemd-boot*.efi")
	if err != nil || len(images) == 0 {
		t.Fatalf("no EFI image of systemd-boot is installed (%v): run softhsm-tests/install-deps.sh", err)
	}
	return images[0]
}

func p11URI(key string) string { return "pkcs11:token=signwarden;object=" + key + ";type=private" }

// Unmodified tools sign through the PKCS#11 socket that exec brings up, and the other
// project's verifier accepts it. No tool is given a PIN, and each signature is one request.
func TestP11Tools(t *testing.T) {
	s := newP11Site(t)
	module := p11Module(t)
	for _, tt := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"openssl dgst", s.opensslDgst},
		{"openssl cms", s.opensslCMS},
		{"openssl req", s.opensslReq},
		{"pkcs11-tool", func(t *testing.T) { s.pkcs11Tool(t, module) }},
		{"p11tool and certtool", func(t *testing.T) { s.gnutls(t, module) }},
		{"sbsign", s.sbsign},
		{"sbvarsign", s.sbvarsign},
		{"osslsigncode", func(t *testing.T) { s.osslsigncode(t, module) }},
		{"pesign", func(t *testing.T) { s.pesign(t, module) }},
		{"evmctl", s.evmctl},
		{"jarsigner", func(t *testing.T) { s.jarsigner(t, module) }},
		{"crypto11", func(t *testing.T) { s.crypto11(t, module) }},
	} {
		t.Run(tt.name, tt.run)
	}
	if got := s.stderr.String(); strings.Contains(got, "panic") {
		t.Error(got)
	}
}

func (s *p11Site) opensslDgst(t *testing.T) {
	for key, opts := range map[string][]string{"kmod": {"-sigopt", "rsa_padding_mode:pss"}, "ec": nil} {
		s.host(t, "openssl", "x509", "-in", s.at(key+".pem"), "-noout", "-pubkey", "-out", s.at("pub"))
		for _, o := range [][]string{nil, opts} {
			rows := s.rows(t)
			s.exec(t, "openssl", append(append([]string{"dgst", "-sha256", "-engine", "pkcs11", "-keyform", "engine", "-sign", p11URI(key), "-out", s.at("sig")}, o...), s.at("msg"))...)
			s.signed(t, rows, key, 1)
			out := s.host(t, "openssl", append(append([]string{"dgst", "-sha256", "-verify", s.at("pub"), "-signature", s.at("sig")}, o...), s.at("msg"))...)
			if !strings.Contains(out, "Verified OK") {
				t.Errorf("%s %q: %s", key, o, out)
			}
		}
	}
}

func (s *p11Site) opensslCMS(t *testing.T) {
	for key, ca := range map[string]string{"kmod": "kmod.pem", "ec": "ca.pem"} {
		rows := s.rows(t)
		s.exec(t, "openssl", "cms", "-sign", "-binary", "-in", s.at("msg"), "-signer", s.at(key+".pem"), "-inkey", p11URI(key),
			"-engine", "pkcs11", "-keyform", "engine", "-outform", "der", "-out", s.at("p7"))
		s.signed(t, rows, key, 1)
		verify := []string{"cms", "-verify", "-binary", "-inform", "der", "-in", s.at("p7"), "-CAfile", s.at(ca), "-purpose", "any", "-out", "/dev/null", "-content"}
		s.host(t, "openssl", append(verify, s.at("msg"))...)
		if r := runEnv(t, os.Environ(), "openssl", append(verify, s.at("ext"))...); r.code == 0 {
			t.Error("openssl accepts it over another file: this test could not fail")
		}
	}
}

func (s *p11Site) opensslReq(t *testing.T) {
	rows := s.rows(t)
	s.exec(t, "openssl", "req", "-new", "-x509", "-engine", "pkcs11", "-keyform", "engine", "-key", p11URI("kmod"), "-subj", "/CN=made by req", "-days", "2", "-out", s.at("req.pem"))
	s.signed(t, rows, "kmod", 1)
	s.host(t, "openssl", "verify", "-CAfile", s.at("req.pem"), "-check_ss_sig", s.at("req.pem"))
}

func (s *p11Site) pkcs11Tool(t *testing.T, module string) {
	rows := s.rows(t)
	list := s.exec(t, "pkcs11-tool", "--module", module, "--token-label", "signwarden", "-O")
	for _, words := range []string{"label:      kmod", "label:      ec", "label:      Test CA"} {
		if !strings.Contains(list, words) {
			t.Errorf("no %q in\n%s", words, list)
		}
	}
	if strings.Contains(list, "label:      ed") {
		t.Errorf("an Ed25519 key is among the others:\n%s", list)
	}
	s.signed(t, rows, "kmod", 0)
	id := strings.TrimSpace(s.host(t, "sh", "-c", "openssl x509 -in "+s.at("kmod.pem")+" -noout -pubkey | openssl pkey -pubin -outform der | sha256sum | cut -c1-40"))
	for _, login := range [][]string{nil, {"--login", "--pin", "0000"}} {
		rows := s.rows(t)
		s.exec(t, "pkcs11-tool", append([]string{"--module", module, "--token-label", "signwarden", "--sign", "-m", "SHA256-RSA-PKCS", "--id", id, "-i", s.at("msg"), "-o", s.at("sig")}, login...)...)
		s.signed(t, rows, "kmod", 1)
		s.host(t, "openssl", "x509", "-in", s.at("kmod.pem"), "-noout", "-pubkey", "-out", s.at("pub"))
		s.host(t, "openssl", "dgst", "-sha256", "-verify", s.at("pub"), "-signature", s.at("sig"), s.at("msg"))
	}
}

func (s *p11Site) gnutls(t *testing.T, module string) {
	list := s.exec(t, "p11tool", "--provider", module, "--list-all", "pkcs11:token=signwarden")
	if n := strings.Count(list, "Type: Private key"); n != 2 {
		t.Errorf("%d private keys:\n%s", n, list)
	}
	rows := s.rows(t)
	s.exec(t, "certtool", "--provider", module, "--p7-detached-sign", "--load-certificate", s.at("ec.pem"), "--load-privkey", p11URI("ec"), "--hash", "SHA256", "--infile", s.at("msg"), "--outfile", s.at("p7"))
	s.signed(t, rows, "ec", 1)
	s.host(t, "openssl", "cms", "-verify", "-binary", "-inform", "pem", "-in", s.at("p7"), "-content", s.at("msg"), "-CAfile", s.at("ca.pem"), "-purpose", "any", "-out", "/dev/null")

	// A certificate issued with a key of ours as the CA's.
	s.exec(t, "openssl", "req", "-new", "-x509", "-engine", "pkcs11", "-keyform", "engine", "-key", p11URI("kmod"), "-subj", "/CN=kmod CA", "-days", "2", "-out", s.at("kmodca.pem"))
	s.write(t, "template", "cn = leaf\nserial = 7\nexpiration_days = 2\nsigning_key\n")
	s.host(t, "openssl", "req", "-newkey", "rsa:2048", "-nodes", "-keyout", s.at("leaf.key"), "-out", s.at("leaf.csr"), "-subj", "/CN=leaf")
	rows = s.rows(t)
	s.exec(t, "certtool", "--provider", module, "--generate-certificate", "--load-request", s.at("leaf.csr"), "--load-ca-certificate", s.at("kmodca.pem"),
		"--load-ca-privkey", p11URI("kmod"), "--template", s.at("template"), "--outfile", s.at("leaf.pem"))
	s.signed(t, rows, "kmod", 1)
	s.host(t, "openssl", "verify", "-CAfile", s.at("kmodca.pem"), s.at("leaf.pem"))
}

func (s *p11Site) sbsign(t *testing.T) {
	rows := s.rows(t)
	s.exec(t, "sbsign", "--engine", "pkcs11", "--key", p11URI("kmod"), "--cert", s.at("kmod.pem"), "--output", s.at("sb.efi"), efiImage(t))
	s.signed(t, rows, "kmod", 1)
	s.host(t, "sbverify", "--cert", s.at("kmod.pem"), s.at("sb.efi"))
	if r := runEnv(t, os.Environ(), "sbverify", "--cert", s.at("kmod.pem"), efiImage(t)); r.code == 0 {
		t.Error("sbverify accepts the unsigned image: this test could not fail")
	}
}

func (s *p11Site) sbvarsign(t *testing.T) {
	s.host(t, "cert-to-efi-sig-list", "-g", "8be4df61-93ca-11d2-aa0d-00e098032b8c", s.at("kmod.pem"), s.at("db.esl"))
	rows := s.rows(t)
	s.exec(t, "sbvarsign", "--engine", "pkcs11", "--key", p11URI("kmod"), "--cert", s.at("kmod.pem"), "--attr", "NON_VOLATILE,BOOTSERVICE_ACCESS,RUNTIME_ACCESS", "--output", s.at("db.esl.auth"), "db", s.at("db.esl"))
	s.signed(t, rows, "kmod", 1)
	s.gateway.must(t, "signwarden", "verify", "efivar", "--cert", s.at("kmod.pem"), "--variable", "db", s.at("db.esl.auth"))
}

func (s *p11Site) osslsigncode(t *testing.T, module string) {
	rows := s.rows(t)
	s.exec(t, "osslsigncode", "sign", "-pkcs11module", module, "-pkcs11cert", "pkcs11:token=signwarden;object=kmod;type=cert", "-key", p11URI("kmod"),
		"-h", "sha256", "-in", efiImage(t), "-out", s.at("ossl.efi"))
	s.signed(t, rows, "kmod", 1)
	s.host(t, "sbverify", "--cert", s.at("kmod.pem"), s.at("ossl.efi"))
	s.host(t, "osslsigncode", "verify", "-CAfile", s.at("kmod.pem"), "-in", s.at("ossl.efi"))
}

func (s *p11Site) pesign(t *testing.T, module string) {
	db := "sql:" + s.at("nss")
	if err := os.MkdirAll(s.at("nss"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.host(t, "certutil", "-N", "-d", db, "--empty-password")
	s.exec(t, "modutil", "-force", "-dbdir", db, "-add", "signwarden", "-libfile", module)
	rows := s.rows(t)
	s.exec(t, "pesign", "-n", db, "-t", "signwarden", "-c", "kmod", "-i", efiImage(t), "-o", s.at("pe.efi"), "-s")
	s.signed(t, rows, "kmod", 2) // of the signed attributes, and of the image's digest
	s.host(t, "sbverify", "--cert", s.at("kmod.pem"), s.at("pe.efi"))
}

func (s *p11Site) evmctl(t *testing.T) {
	// evmctl 1.4 signs with the certificate's key identifier, and verifies with the SHA-1
	// of the key, which openssl's certificates have for that, and those of the gateway not.
	s.exec(t, "openssl", "req", "-new", "-x509", "-engine", "pkcs11", "-keyform", "engine", "-key", p11URI("kmod"), "-subj", "/CN=ima", "-days", "2", "-out", s.at("ima.pem"))
	s.host(t, "openssl", "x509", "-in", s.at("ima.pem"), "-outform", "der", "-out", s.at("ima.der"))
	rows := s.rows(t)
	s.exec(t, "evmctl", "ima_sign", "--engine", "pkcs11", "--key", p11URI("kmod"), "--hashalgo", "sha256", "--sigfile", "--keyid-from-cert", s.at("ima.pem"), s.at("msg"))
	s.signed(t, rows, "kmod", 1)
	r := runEnv(t, os.Environ(), "evmctl", "ima_verify", "--key", s.at("ima.der"), "--sigfile", s.at("msg"))
	if out := r.stdout + r.stderr; r.code != 0 || !strings.Contains(out, "verification is OK") {
		t.Errorf("evmctl: exit code %d: %s", r.code, out)
	}
}

func (s *p11Site) jarsigner(t *testing.T, module string) {
	s.host(t, "jar", "--create", "--file", s.at("in.jar"), "-C", s.dir, "msg")
	s.write(t, "jar.cfg", "name = signwarden\nlibrary = "+module+"\nslot = 1\n")
	rows := s.rows(t)
	s.exec(t, "jarsigner", "-keystore", "NONE", "-storetype", "PKCS11", "-providerClass", "sun.security.pkcs11.SunPKCS11", "-providerArg", s.at("jar.cfg"),
		"-storepass", "NONE", "-signedjar", s.at("out.jar"), s.at("in.jar"), "kmod")
	s.signed(t, rows, "kmod", 1)
	out := s.host(t, "jarsigner", "-verify", s.at("out.jar"))
	if !strings.Contains(out, "jar verified") {
		t.Errorf("jarsigner -verify: %s", out)
	}
	if out := s.host(t, "jarsigner", "-verify", s.at("in.jar")); strings.Contains(out, "jar verified") {
		t.Errorf("the unsigned one too: %s", out)
	}
}

func (s *p11Site) crypto11(t *testing.T, module string) {
	build := exec.Command("go", "build", "-o", s.at("crypto11"), "./testdata/crypto11")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building crypto11: %v\n%s", err, out)
	}
	rows := s.rows(t)
	s.exec(t, s.at("crypto11"), module, "signwarden", "kmod", "ec", "Test CA")
	n := map[string]int{}
	for _, e := range s.audit(t, 1000)[rows:] {
		n[e.Entry["outcome"]+" "+e.Entry["key"]+" "+e.Entry["scheme"]+" "+e.Entry["detail"]]++
	}
	want := map[string]int{
		"signed kmod rsa-pkcs1v15 ": 1, "signed kmod rsa-pss ": 1, "signed kmod rsa-pss salt of 20 bytes": 1,
		"signed kmod rsa-pss salt of 222 bytes": 1, "signed ec ecdsa ": 1,
	}
	for what, count := range want {
		if n[what] != count {
			t.Errorf("%q is recorded %d times, want %d; all: %v", what, n[what], count, n)
		}
	}
}
