package softhsm_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// agentKeys are the types of key that OpenPGP tools sign with.
var agentKeys = []string{"rsa2048", "rsa4096", "p256", "p384", "ed25519"}

// agentTest is a gpg with an agent, and one that only verifies.
type agentTest struct {
	g           *gateway
	env, verify []string
	dir, file   string
}

// cert is the file of a key's certificate.
func (a *agentTest) cert(t testing.TB, name string) string {
	path := filepath.Join(a.dir, name+".cert")
	if _, err := os.Stat(path); err != nil {
		writeFile(t, path, a.g.must(t, "signwarden", "key", "export", name))
	}
	return path
}

// Every type of key with every hash, in every form that gpg writes, through
// signwarden agent; gpg and sq verify each.
func TestAgentGPG(t *testing.T) {
	g := newGateway(t)
	for _, a := range agentKeys {
		g.key(t, a, a)
	}
	env, socket := g.home(t, agentKeys...)
	g.agentAt(t, socket)
	a := &agentTest{g: g, env: env, verify: g.verifier(t, agentKeys...), dir: t.TempDir()}
	a.file = filepath.Join(a.dir, "file")
	writeFile(t, a.file, "to be signed\n- with a dash\n")
	a.hashes(t)
	a.forms(t)
	t.Run("list", func(t *testing.T) {
		list := mustEnv(t, env, "gpg", "--batch", "-K", "--with-keygrip")
		for _, grip := range keygrips(t, dialAgent(t, socket)) {
			if !strings.Contains(list, "Keygrip = "+grip) {
				t.Errorf("keygrip %s is not listed:\n%s", grip, list)
			}
		}
		// The primary keys are elsewhere, and the subkeys are here.
		if n, m := strings.Count(list, "sec#"), strings.Count(list, "\nssb "); n != len(agentKeys) || m != len(agentKeys) {
			t.Errorf("%d primary keys and %d subkeys, want %d of each:\n%s", n, m, len(agentKeys), list)
		}
	})
}

// hashes has each key sign with each hash.
func (a *agentTest) hashes(t *testing.T) {
	for _, key := range agentKeys {
		for _, hash := range []string{"SHA256", "SHA384", "SHA512"} {
			t.Run(key+"/"+hash, func(t *testing.T) {
				sig := filepath.Join(a.dir, key+hash+".sig")
				r := gpgTry(t, a.env, "-u", key+"@example.org", "--digest-algo", hash, "-o", sig, "--detach-sign", a.file)
				if key == "p384" && hash == "SHA256" {
					r.failure(t, 67109003, "Invalid length") // as the real agent
					return
				}
				if r.code != 0 {
					t.Fatalf("exit code %d:\n%s%s", r.code, r.stdout, r.stderr)
				}
				id := map[string]string{"SHA256": " 8 ", "SHA384": " 9 ", "SHA512": " 10 "}[hash]
				if !strings.Contains(r.stdout, id) {
					t.Errorf("another hash was used:\n%s", r.stdout)
				}
				mustEnv(t, a.verify, "gpg", "--batch", "--verify", sig, a.file)
				sqVerify(t, a.cert(t, key), sig, a.file)
			})
		}
	}
}

// forms has gpg write each form of signature.
func (a *agentTest) forms(t *testing.T) {
	for _, tt := range []struct {
		name     string
		args     []string
		sigs     int
		detached bool
	}{
		{"armor", []string{"-u", "rsa4096@example.org", "--armor", "--detach-sign"}, 1, true},
		{"clearsign", []string{"-u", "p256@example.org", "--clearsign"}, 1, false},
		{"inline", []string{"-u", "ed25519@example.org", "--sign"}, 1, false},
		{"two keys", []string{"-u", "ed25519@example.org", "-u", "rsa2048@example.org", "--sign"}, 2, false},
		{"default key", []string{"--sign"}, 1, false},
		{"exact subkey", []string{"-u", signingSubkey(t, a.env, "p384@example.org") + "!", "--digest-algo", "SHA384", "--detach-sign"}, 1, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out := filepath.Join(a.dir, "out")
			r := gpgTry(t, a.env, append(append([]string{"-o", out}, tt.args...), a.file)...)
			if r.code != 0 || strings.Count(r.stdout, "SIG_CREATED") != tt.sigs {
				t.Fatalf("exit code %d, want %d signatures:\n%s%s", r.code, tt.sigs, r.stdout, r.stderr)
			}
			args := []string{"--batch", "--status-fd", "1", "--verify", out}
			if tt.detached {
				args = append(args, a.file)
			}
			if good := strings.Count(mustEnv(t, a.verify, "gpg", args...), "GOODSIG"); good != tt.sigs {
				t.Errorf("gpg finds %d good signatures, want %d", good, tt.sigs)
			}
			for _, key := range agentKeys {
				if slices.Contains(tt.args, key+"@example.org") && tt.sigs == 1 {
					sqVerifyForm(t, a.cert(t, key), out, a.file, tt.detached)
				}
			}
		})
	}
}

// signingSubkey is the fingerprint of a certificate's subkey.
func signingSubkey(t testing.TB, env []string, uid string) string {
	t.Helper()
	sub := false
	for line := range strings.Lines(mustEnv(t, env, "gpg", "--batch", "--with-colons", "--list-keys", uid)) {
		f := strings.Split(line, ":")
		sub = sub || f[0] == "sub"
		if sub && f[0] == "fpr" {
			return f[9]
		}
	}
	t.Fatalf("%s has no subkey", uid)
	return ""
}

// sqVerifyForm verifies a detached signature, or a message that holds its own.
func sqVerifyForm(t testing.TB, cert, sig, file string, detached bool) {
	t.Helper()
	if detached {
		sqVerify(t, cert, sig, file)
		return
	}
	option := "--signer-file"
	if strings.Contains(mustEnv(t, os.Environ(), "sq", "verify", "--help"), "--signer-cert") {
		option = "--signer-cert"
	}
	mustEnv(t, os.Environ(), "sq", "verify", option, cert, sig)
}

// Each reason for which there is no signature has a number of its own, in gpg's
// status line; the agent's log has the reason, and the request of the audit log.
func TestAgentRefusals(t *testing.T) {
	g := newGateway(t)
	for _, name := range []string{"rel", "off", "rpms"} {
		g.key(t, name, "ed25519")
	}
	g.must(t, "signwardend", "client", "create", "ci", "--dir", g.dir)
	g.policy(t, `  - {name: ci, principals: [ci], keys: [rel, "off"], may: [sign], formats: [openpgp], blind: true, hashes: [sha512], rate: 1/h}
  - {name: ci-rpms, principals: [ci], keys: [rpms], may: [sign], formats: [rpm], blind: true}
`)
	g.must(t, "signwarden", "key", "disable", "off")
	env, socket := g.home(t, "rel", "off", "rpms")
	ci := g.as("ci")
	agent := ci.agentAt(t, socket)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	writeFile(t, file, "text")
	sign := func(key string, args ...string) result {
		t.Helper()
		return gpgTry(t, env, append(args, "-u", key+"@example.org", "-o", filepath.Join(dir, "sig"), "--detach-sign", file)...)
	}
	logged := func(text string) {
		t.Helper()
		e := g.audit(t, 1)[0].Entry
		if e["request"] == "" || e["outcome"] == "signed" {
			t.Errorf("audit entry %v", e)
		}
		agent.await(t, "request "+e["request"]+": ")
		agent.await(t, text)
	}
	sign("rpms").failure(t, 67109115, "Forbidden")
	logged("denied by policy")
	sign("off", "--digest-algo", "SHA512").failure(t, 67109116, "Key disabled")
	logged("key is disabled")
	sign("rel", "--digest-algo", "SHA256").failure(t, 67109115, "Forbidden")
	sign("rel", "--digest-algo", "SHA1", "--allow-weak-digest-algos").failure(t, 67108948, "Unsupported algorithm")
	if r := sign("rel", "--digest-algo", "SHA512"); r.code != 0 {
		t.Errorf("exit code %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
	sign("rel", "--digest-algo", "SHA512").failure(t, 67109047, "Limit reached")
	logged("too many requests")

	// A key that is not ci's is one that does not exist.
	g.key(t, "hidden", "ed25519")
	hidden, hiddenSocket := g.home(t, "hidden")
	ci.agentAt(t, hiddenSocket)
	r := gpgTry(t, hidden, "-u", "hidden@example.org", "-o", filepath.Join(dir, "sig"), "--detach-sign", file)
	r.failure(t, 17, "No secret key") // gpg's own number: it asks for no signature

	// The gateway goes away, and comes back.
	g.stop(unix.SIGTERM)
	sign("off", "--digest-algo", "SHA512").failure(t, 67109040, "Not operational")
	agent.await(t, "nothing listens there")
	g.serve(t)
	waitFor(t, "the agent has found the gateway again", func() bool {
		return strings.Contains(sign("off", "--digest-algo", "SHA512").stdout, "FAILURE sign 67109116\n")
	})
}
