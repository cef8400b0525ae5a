package softhsm_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// finding is what doctor prints of one, as JSON.
type finding struct{ Check, Result, What, Next string }

// doctor runs signwarden doctor and returns its exit code and findings.
func doctor(t *testing.T, env []string, args ...string) (int, []finding) {
	t.Helper()
	r := runEnv(t, env, "signwarden", append([]string{"doctor", "-o", "json"}, args...)...)
	var all []finding
	if err := json.Unmarshal([]byte(r.stdout), &all); err != nil {
		t.Fatalf("exit code %d: %v\n%s%s", r.code, err, r.stdout, r.stderr)
	}
	return r.code, all
}

// certify writes a certificate by the gateway's CA, valid from and to so long from now, and its key.
func certify(t *testing.T, ca, file string, usage x509.ExtKeyUsage, from, to time.Duration) {
	t.Helper()
	issuer, err := tls.LoadX509KeyPair(ca+"/ca.crt", ca+"/ca.key")
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "admin"}, NotBefore: time.Now().Add(from), NotAfter: time.Now().Add(to),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
	}, issuer.Leaf, key.Public(), issuer.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{file + ".crt": {Type: "CERTIFICATE", Bytes: der}, file + ".key": {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// serveTLS answers handshakes with a certificate, and no more than that.
func serveTLS(t *testing.T, file string) (address string) {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(file+".crt", file+".key")
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.(*tls.Conn).Handshake() // the client refuses: that is the test
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

// Each thing is broken for real, and doctor says which it is and what to do.
func TestDoctor(t *testing.T) {
	s := newP11Site(t)
	s.gateway.must(t, "signwardend", "client", "create", "nobody", "--dir", s.gateway.dir)
	s.gateway.must(t, "signwardend", "client", "create", "reader", "--dir", s.gateway.dir)
	s.policy(t, "  - {name: reader, principals: [reader], keys: [kmod], may: [read]}\n")
	s.gateway.must(t, "signwardend", "client", "create", "short", "--dir", s.gateway.dir, "--valid", "48h")
	dir := shortDir(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	module := p11Module(t)

	// As it is to be: a home that setup has made ready, and an agent.
	home := shortDir(t)
	env := append(append([]string(nil), s.env...), "GNUPGHOME="+home, "XDG_RUNTIME_DIR="+dir, "SSH_AUTH_SOCK=")
	mustEnv(t, env, "signwarden", "agent", "setup")
	agent := background(t, env, "signwarden", "agent", "--gpg-socket", "auto", "--p11-socket", "auto", "--ssh-socket", at("ssh"))
	agent.await(t, "PKCS#11 socket ")
	agent.await(t, "ssh-agent socket ")
	with := func(vars ...string) []string { return append(append([]string(nil), env...), vars...) }

	hung := shortDir(t) // a forward whose other end is gone: it is listened at, and nothing is said
	silent, err := net.Listen("unix", strings.TrimSpace(mustEnv(t, with("GNUPGHOME="+hung), "gpgconf", "--list-dirs", "agent-socket")))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	l, err := net.Listen("unix", at("mute")) // hangs up on whoever comes
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-served })
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: at("stale"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	writeFile(t, at("cnf"), "openssl_conf = i\n[i]\nengines = e\n[e]\npkcs11 = p\n[p]\nengine_id = pkcs11\nMODULE_PATH = /nonexistent/p11-kit-client.so\n")
	writeFile(t, at("provider.cnf"), "openssl_conf = i\n[i]\nproviders = p\n[p]\npkcs11 = q\n[q]\nmodule = /nonexistent/pkcs11.so\npkcs11-module-path = "+module+"\n")
	foreign := background(t, os.Environ(), "ssh-agent", "-D", "-a", at("foreign"))
	foreign.await(t, "SSH_AUTH_SOCK=")
	if err := os.MkdirAll(at("noengines"), 0o755); err != nil {
		t.Fatal(err)
	}
	real := shortDir(t)
	writeFile(t, real+"/gpg.conf", "no-autostart\n")
	mustEnv(t, append(os.Environ(), "GNUPGHOME="+real), "sh", "-c", "gpg-agent --daemon >"+real+"/log 2>&1") // it would keep our pipe
	t.Cleanup(func() {
		kill := exec.Command("gpgconf", "--kill", "gpg-agent")
		kill.Env = append(os.Environ(), "GNUPGHOME="+real)
		if err := kill.Run(); err != nil {
			t.Error(err)
		}
	})
	profile := func(address string) string {
		path := filepath.Join(filepath.Dir(s.profile("admin")), strings.ReplaceAll(address, ":", "-")+".yaml")
		text := string(readFile(t, s.profile("admin")))
		writeFile(t, path, strings.ReplaceAll(text, s.address, address))
		return path
	}
	away := profile(freeAddress(t))

	dated := func(name string, from, to time.Duration) string {
		mustEnv(t, os.Environ(), "cp", "-r", filepath.Dir(s.profile("admin")), at(name))
		certify(t, s.gateway.dir+"/tls", at(name)+"/client", x509.ExtKeyUsageClientAuth, from, to)
		return at(name) + "/client.yaml"
	}
	certify(t, s.gateway.dir+"/tls", at("server"), x509.ExtKeyUsageServerAuth, time.Hour, 2*time.Hour)
	ahead := profile(serveTLS(t, at("server")))

	for _, tt := range []struct {
		name         string
		env          []string
		args         []string
		code         int
		check, what  string
		next, result string
	}{
		{"all is well", env, nil, 0, "PKCS#11 socket", "answers", "", "ok"},
		{"a key that is fine", env, []string{"kmod"}, 0, "keys", "sbsign", "", "ok"},
		{"no profile", with("SIGNWARDEN_PROFILE=" + at("none.yaml")), nil, 1, "profile", "no such file", "client create", "fail"},
		{"gateway away", with("SIGNWARDEN_PROFILE=" + away), nil, 5, "gateway", "does not serve us", "is it running", "fail"},
		{"nothing permitted", with("SIGNWARDEN_PROFILE=" + s.profile("nobody")), nil, 4, "keys", "you may sign with none", "policy apply", "fail"},
		{"a key that is not permitted", with("SIGNWARDEN_PROFILE=" + s.profile("nobody")), []string{"kmod"}, 4, "keys", "key kmod", "policy apply", "fail"},
		{"a key that is not there", env, []string{"none"}, 4, "keys", "key none", "key list", "fail"},
		{"nothing but reading permitted", with("SIGNWARDEN_PROFILE=" + s.profile("reader")), []string{"kmod"}, 4, "keys", "no tool can use kmod", "--howto", "fail"},
		{"a type that PKCS#11 tools do not take", env, []string{"ed"}, 0, "keys", "sign-file cannot use ed: p11-kit does not pass Ed25519", "--howto", "note"},
		{"a type that some tools do not take", env, []string{"ec"}, 0, "keys", "sbsign cannot use ec: the tool, or who verifies it, takes RSA", "--howto", "note"},
		{"certificate that ends soon", with("SIGNWARDEN_PROFILE=" + s.profile("short")), nil, 4, "certificate", "expires at", "client create", "note"},
		{"clock behind", with("SIGNWARDEN_PROFILE=" + dated("early", time.Hour, 2*time.Hour)), nil, 1, "certificate", "the clock is wrong", "timedatectl", "fail"},
		{"clock ahead", with("SIGNWARDEN_PROFILE=" + dated("late", -2*time.Hour, -time.Hour)), nil, 1, "certificate", "has expired", "client create", "fail"},
		{"the gateway's clock ahead", with("SIGNWARDEN_PROFILE=" + ahead), nil, -1, "gateway", "expired or is not yet valid", "compare the clocks", "fail"},
		{"an agent that hangs", with("GNUPGHOME=" + hung), nil, 1, "gpg-agent", "nobody answers", "--gpg-socket auto", "fail"},
		{"stale socket", with("P11_KIT_SERVER_ADDRESS=unix:path=" + at("stale")), nil, 1, "PKCS#11 socket", "no token and no error", "--p11-socket auto", "fail"},
		{"no socket", with("P11_KIT_SERVER_ADDRESS=unix:path=" + at("none")), nil, 1, "PKCS#11 socket", "no token and no error", "--p11-socket auto", "fail"},
		{"no socket at the default", with("XDG_RUNTIME_DIR=" + home), nil, 0, "PKCS#11 socket", "nothing serves", "--p11-socket auto", "note"},
		{"mute socket", with("P11_KIT_SERVER_ADDRESS=unix:path=" + at("mute")), nil, 1, "PKCS#11 socket", "does not speak p11-kit's protocol", "forwarded", "fail"},
		{"relative address", with("P11_KIT_SERVER_ADDRESS=unix:path=p11"), nil, 1, "PKCS#11 socket", "not an absolute path", "unix:path=/PATH", "fail"},
		{"another module", with("PKCS11_MODULE_PATH=" + softhsmModule(t)), nil, 1, "PKCS#11 module", "another token than ours", "export PKCS11_MODULE_PATH=" + module, "fail"},
		{"module that is not there", with("PKCS11_PROVIDER_MODULE=" + at("none.so")), nil, 1, "PKCS#11 module", "no such file", "export PKCS11_PROVIDER_MODULE=" + module, "fail"},
		{"configuration that is not there", with("OPENSSL_CONF=" + at("none.cnf")), nil, 1, "OpenSSL", "OPENSSL_CONF: ", "unset OPENSSL_CONF", "fail"},
		{"module of the engine that is not there", with("OPENSSL_CONF=" + at("cnf")), nil, 1, "OpenSSL", "names a module that is not there", "p11-kit-modules", "fail"},
		{"module of the provider that is not there", with("OPENSSL_CONF=" + at("provider.cnf")), nil, 1, "OpenSSL", "names a module that is not there", "p11-kit-modules", "fail"},
		{"no engine, and nothing that wants one", with("XDG_RUNTIME_DIR="+home, "OPENSSL_ENGINES="+at("noengines"), "OPENSSL_MODULES="+at("noengines")), nil, 0, "OpenSSL", "neither", "libengine-pkcs11-openssl", "note"},
		{"no engine", with("OPENSSL_ENGINES="+at("noengines"), "OPENSSL_MODULES="+at("noengines")), nil, 1, "OpenSSL", "neither", "libengine-pkcs11-openssl", "fail"},
		{"GNUPGHOME not set up", with("GNUPGHOME=" + dir), nil, 0, "GNUPGHOME", "lacks no-autostart", "agent setup", "note"},
		{"a real gpg-agent", with("GNUPGHOME=" + real), nil, 1, "gpg-agent", "a real gpg-agent", "gpgconf --kill gpg-agent", "fail"},
		{"another ssh-agent", with("SSH_AUTH_SOCK=" + at("foreign")), nil, 0, "SSH_AUTH_SOCK", "has 0 keys, and none of ours", "--ssh-socket", "note"},
		{"our ssh-agent", with("SSH_AUTH_SOCK=" + at("ssh")), nil, 0, "SSH_AUTH_SOCK", "of them ours", "", "ok"},
		{"an ssh-agent that hangs up", with("SSH_AUTH_SOCK=" + at("mute")), nil, 1, "SSH_AUTH_SOCK", "does not answer as an ssh-agent", "forwarded", "fail"},
		{"ssh-agent that has gone", with("SSH_AUTH_SOCK=" + at("stale")), nil, 1, "SSH_AUTH_SOCK", "nobody serves it", "unset SSH_AUTH_SOCK", "fail"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, all := doctor(t, tt.env, tt.args...)
			if code != tt.code && (tt.code != -1 || code == 0) {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			for _, f := range all {
				if f.Result != "ok" && f.Next == "" {
					t.Errorf("it does not say what to do: %+v", f)
				}
				if f.Check == tt.check && f.Result == tt.result && strings.Contains(f.What, tt.what) && strings.Contains(f.Next, tt.next) {
					return
				}
			}
			t.Errorf("no finding of %s with %q and %q in\n%+v", tt.check, tt.what, tt.next, all)
		})
	}

	// As a person reads it; and nothing was signed by all that.
	r := runEnv(t, env, "signwarden", "doctor")
	if r.code != 0 || !strings.Contains(r.stdout, "ok    gateway") || !strings.Contains(r.stdout, "ok    gpg-agent") {
		t.Errorf("exit code %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
	for _, e := range s.audit(t, 1000) {
		if e.Entry["action"] == "sign" {
			t.Errorf("audit entry %v", e)
		}
	}
	// Under exec all is well, with a home and a socket of its own.
	if r := runEnv(t, s.env, "signwarden", "exec", "--", filepath.Join(bin, "signwarden"), "doctor", "kmod"); r.code != 0 {
		t.Errorf("under exec: exit code %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
	agent.stop(unix.SIGTERM)
	// A socket that nobody serves any more is gone, and the next start is not in its way.
	if code, all := doctor(t, with("P11_KIT_SERVER_ADDRESS=unix:path="+at("p11-kit/pkcs11"))); code != 1 {
		t.Errorf("without the agent: exit code %d: %+v", code, all)
	}
}
