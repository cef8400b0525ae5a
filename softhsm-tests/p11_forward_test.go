package softhsm_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// sbsign and openssl cms on a build host sign through a PKCS#11 socket that sshd forwards; when
// the connection is down they fail and write nothing, and they work again when it is back.
func TestP11Forwarded(t *testing.T) {
	s := newP11Site(t)
	host := newSSHHost(t)
	local, remote := filepath.Join(shortDir(t), "p11"), filepath.Join(host.dir, "p11")
	agent := background(t, s.env, "signwarden", "agent", "--p11-socket", local, "--keys", "kmod", "--signatures", "4")
	agent.await(t, "PKCS#11 socket "+local)
	session := host.forward(t, remote, local)

	// The build host is this one, and knows the socket alone: no profile, no configuration.
	env := append(os.Environ(), "P11_KIT_SERVER_ADDRESS=unix:path="+remote, "PKCS11_MODULE_PATH="+p11Module(t), "SIGNWARDEN_PROFILE=/nonexistent")
	sbsign := func(key string) result {
		t.Helper()
		return runEnv(t, env, "sbsign", "--engine", "pkcs11", "--key", p11URI(key), "--cert", s.at(key+".pem"), "--output", s.at("far.efi"), efiImage(t))
	}
	cms := func(key string) result {
		t.Helper()
		return runEnv(t, env, "openssl", "cms", "-sign", "-binary", "-in", s.at("msg"), "-signer", s.at(key+".pem"), "-inkey", p11URI(key),
			"-engine", "pkcs11", "-keyform", "engine", "-outform", "der", "-out", s.at("far.p7"))
	}
	both := func() {
		t.Helper()
		rows := s.rows(t)
		for name, r := range map[string]result{"sbsign": sbsign("kmod"), "openssl cms": cms("kmod")} {
			if r.code != 0 {
				t.Fatalf("%s: exit code %d: %s\n%s", name, r.code, r.stderr, agent.log)
			}
		}
		s.signed(t, rows, "kmod", 2)
		s.host(t, "sbverify", "--cert", s.at("kmod.pem"), s.at("far.efi"))
		s.host(t, "openssl", "cms", "-verify", "-binary", "-inform", "der", "-in", s.at("far.p7"), "-content", s.at("msg"),
			"-CAfile", s.at("kmod.pem"), "-purpose", "any", "-out", s.at("verified"))
		for _, name := range []string{"far.efi", "far.p7"} {
			if err := os.Remove(s.at(name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	refused := func(what string, all ...result) {
		t.Helper()
		for _, r := range all {
			if r.code == 0 {
				t.Errorf("%s: it signs", what)
			}
		}
		// openssl makes its output file before it signs; nothing must be in it.
		for _, name := range []string{"far.efi", "far.p7"} {
			if info, err := os.Stat(s.at(name)); err == nil && info.Size() > 0 {
				t.Errorf("%s: %s has %d bytes", what, name, info.Size())
			}
		}
	}

	both()
	refused("a key that the socket does not show", sbsign("ec"), cms("ec"))
	session.stop(unix.SIGKILL)
	waitFor(t, "nobody listens", func() bool {
		c, err := net.Dial("unix", remote)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	refused("without a connection", sbsign("kmod"), cms("kmod"))
	session = host.forward(t, remote, local)
	both()
	refused("beyond the bound", sbsign("kmod"), cms("kmod"))
	agent.await(t, "the signatures of this socket are spent")
	session.stop(unix.SIGTERM)
	if !strings.Contains(agent.log.String(), "peer.exe=/usr/bin/ssh") {
		t.Errorf("the log does not tell the peer:\n%s", agent.log)
	}
}
