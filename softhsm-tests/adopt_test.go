package softhsm_test

import (
	"crypto"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/gateway/client"
)

// gpgHome is a home of gpg with secret keys of its own, as a distribution has it.
func gpgHome(t *testing.T) (env []string, gpg func(args ...string) string) {
	t.Helper()
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir+"/gpg-agent.conf", "s2k-count 65536\n")
	env = append(os.Environ(), "GNUPGHOME="+dir)
	t.Cleanup(func() {
		end := exec.Command("gpgconf", "--kill", "all") // the test's context has ended
		end.Env = env
		if out, err := end.CombinedOutput(); err != nil {
			t.Errorf("gpgconf: %v %s", err, out)
		}
	})
	return env, func(args ...string) string {
		t.Helper()
		return mustEnv(t, env, "gpg", append([]string{"--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", "secret words"}, args...)...)
	}
}

// fingerprintsOf are those of a certificate, the primary key's first.
func fingerprintsOf(gpg func(...string) string, uid string) []string {
	var all []string
	for line := range strings.Lines(gpg("--with-colons", "--list-keys", uid)) {
		if f := strings.Split(line, ":"); f[0] == "fpr" {
			all = append(all, f[9])
		}
	}
	return all
}

// Keys that were made elsewhere are brought into two tokens, registered, and sign; who
// verifies has the certificates of before.
func TestAdopt(t *testing.T) {
	t.Parallel()
	g, _ := emptyTokens(t)
	g.serve(t)
	home, gpg := gpgHome(t)
	dir := t.TempDir()
	pass := filepath.Join(dir, "passphrase")
	if err := os.WriteFile(pass, []byte("secret words\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	writeFile(t, file, "to be signed")
	ids := map[string]string{}

	t.Run("openssl", func(t *testing.T) {
		key, _ := opensslKey(t, dir, "one", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
		ids["one"] = g.imports(t, "--key", key, "--label", "one")
		if r := g.try(t, "signwarden", "key", "show", "one"); r.code == 0 {
			t.Error("it is registered before it was adopted")
		}
		if r := g.try(t, "signwarden", "key", "adopt", "one", "--id", "00"); r.code != 2 || !strings.Contains(r.stderr, "token list") {
			t.Errorf("no such key: %d %s", r.code, r.stderr)
		}
		g.must(t, "signwarden", "key", "adopt", "one", "--id", ids["one"])
		if e := g.audit(t, 1)[0].Entry; e["action"] != "key.adopt" || e["outcome"] != "done" || e["key"] != "one" || !strings.Contains(e["detail"], ids["one"]) {
			t.Errorf("audit entry %v", e)
		}
		if r := g.try(t, "signwarden", "key", "adopt", "again", "--id", ids["one"]); r.code != 1 || !strings.Contains(r.stderr, "registered already") {
			t.Errorf("twice: %d %s", r.code, r.stderr)
		}
		sum := sha256.Sum256(readFile(t, file))
		sig, err := g.client(t, "admin").Sign(t.Context(), client.Request{Key: "one", Digest: sum[:], Hash: crypto.SHA256, Format: "cms"})
		if err != nil {
			t.Fatal(err)
		}
		pub := filepath.Join(dir, "one.pub")
		mustEnv(t, os.Environ(), "openssl", "pkey", "-in", key, "-pubout", "-out", pub)
		writeFile(t, file+".one", string(sig.Bytes))
		mustEnv(t, os.Environ(), "openssl", "dgst", "-sha256", "-verify", pub, "-signature", file+".one", file)
	})

	// bring imports a key of gpg's and returns its id.
	bring := func(t *testing.T, label, fpr string) string {
		t.Helper()
		secret := filepath.Join(dir, label)
		writeFile(t, secret, gpg("--export-secret-keys", fpr+"!"))
		args := []string{"--key", secret, "--label", label, "--openpgp-key", fpr, "--passphrase-file", pass}
		if label != "old" {
			args = append(args, "--token", "b") // where keys are not made
		}
		return g.imports(t, args...)
	}
	// signs has a key sign, and gpg verify with the certificate of before.
	signs := func(t *testing.T, name, fpr string) {
		t.Helper()
		sig := filepath.Join(dir, name+".sig")
		g.must(t, "signwarden", "sign", "openpgp", "--key", name, "--force", "--output", sig, file)
		if out := mustEnv(t, home, "gpg", "--batch", "--status-fd", "1", "--verify", sig, file); !strings.Contains(out, "VALIDSIG "+fpr) {
			t.Errorf("gpg: %s", out)
		}
	}
	certificate := func(t *testing.T, uid string) string {
		t.Helper()
		path := filepath.Join(dir, uid+".asc")
		writeFile(t, path, gpg("--armor", "--export", uid))
		return path
	}

	t.Run("gpg, one key", func(t *testing.T) {
		gpg("--quick-gen-key", "Old <old@example.org>", "rsa2048", "sign", "never")
		fpr := fingerprintsOf(gpg, "old@example.org")[0]
		ids["old"] = bring(t, "old", fpr)
		cert := certificate(t, "old@example.org")
		out := g.must(t, "signwarden", "key", "adopt", "old", "--id", ids["old"], "--openpgp", cert)
		if !strings.Contains(out, fpr) || !strings.Contains(out, "single") || !strings.Contains(out, "old@example.org") {
			t.Errorf("adopted: %s", out)
		}
		signs(t, "old", fpr)
		packages := buildRPMs(t, 1)
		g.must(t, "signwarden", "sign", "rpm", "--key", "old", packages[0])
		db := t.TempDir()
		mustEnv(t, os.Environ(), "rpmkeys", "--dbpath", db, "--import", cert)
		if out := mustEnv(t, os.Environ(), "rpmkeys", "--dbpath", db, "-Kv", packages[0]); !strings.Contains(out, "Signature") || strings.Contains(out, "NOT OK") {
			t.Errorf("rpmkeys: %s", out)
		}
		// The gateway goes on with the certificate: gpg takes what it has renewed.
		g.must(t, "signwarden", "key", "openpgp", "renew", "old", "--expires", "2090-01-01")
		writeFile(t, cert, g.must(t, "signwarden", "key", "export", "old"))
		gpg("--import", cert)
		if got := gpg("--with-colons", "--list-keys", fpr); !strings.Contains(got, ":3786912000:") {
			t.Errorf("renewed:\n%s", got)
		}
		signs(t, "old", fpr)
	})

	t.Run("gpg, primary key and subkey", func(t *testing.T) {
		gpg("--quick-gen-key", "Team <team@example.org>", "ed25519", "cert", "never")
		primary := fingerprintsOf(gpg, "team@example.org")[0]
		gpg("--quick-add-key", primary, "ed25519", "sign", "never")
		subkey := fingerprintsOf(gpg, "team@example.org")[1]
		ids["team"], ids["team-primary"] = bring(t, "team", subkey), bring(t, "team-primary", primary)
		cert := certificate(t, "team@example.org")
		// 1 is of the key old, which signs already and is nobody's primary key.
		for wrong, code := range map[string]int{ids["team"]: 2, ids["old"]: 1, "00": 2} {
			if r := g.try(t, "signwarden", "key", "adopt", "team", "--id", ids["team"], "--openpgp", cert, "--primary-id", wrong); r.code != code {
				t.Errorf("primary %s: %d %s", wrong, r.code, r.stderr)
			}
		}
		if r := g.try(t, "signwarden", "key", "adopt", "team", "--id", ids["team-primary"], "--openpgp", cert); r.code != 2 || !strings.Contains(r.stderr, "sign") {
			t.Errorf("a primary key that only certifies: %d %s", r.code, r.stderr)
		}
		g.must(t, "signwarden", "key", "adopt", "team", "--id", ids["team"], "--openpgp", cert, "--primary-id", ids["team-primary"])
		signs(t, "team", subkey)
		g.must(t, "signwarden", "key", "openpgp", "rotate", "team", "--to", "team2")
		writeFile(t, cert, g.must(t, "signwarden", "key", "export", "team2"))
		gpg("--import", cert)
		all := fingerprintsOf(gpg, "team@example.org")
		if len(all) != 3 || all[0] != primary || all[1] != subkey {
			t.Fatalf("rotated: %q", all)
		}
		signs(t, "team2", all[2])
	})

	t.Run("gpg, primary key off line", func(t *testing.T) {
		gpg("--quick-gen-key", "Off <off@example.org>", "ed25519", "cert", "never")
		gpg("--quick-add-key", fingerprintsOf(gpg, "off@example.org")[0], "nistp256/ecdsa", "sign", "never")
		subkey := fingerprintsOf(gpg, "off@example.org")[1]
		ids["off"] = bring(t, "off", subkey)
		g.must(t, "signwarden", "key", "adopt", "off", "--id", ids["off"], "--openpgp", certificate(t, "off@example.org"))
		signs(t, "off", subkey)
		for _, args := range [][]string{{"renew", "off", "--expires", "1y"}, {"rotate", "off", "--to", "off2"}, {"revoke", "off", "--reason", "retired"}, {"add-uid", "off", "--uid", "X <x@example.org>"}} {
			if r := g.try(t, "signwarden", append([]string{"key", "openpgp"}, args...)...); r.code != 2 || !strings.Contains(r.stderr, "in no token") {
				t.Errorf("%q: %d %s", args, r.code, r.stderr)
			}
		}
		signs(t, "off", subkey)
		// It is changed where its primary key is.
		gpg("--quick-set-expire", fingerprintsOf(gpg, "off@example.org")[0], "2090-01-01")
		if out := g.must(t, "signwarden", "key", "openpgp", "replace", "off", certificate(t, "off@example.org")); !strings.Contains(out, "2090-01-01") {
			t.Errorf("replaced: %s", out)
		}
		if r := g.try(t, "signwarden", "key", "openpgp", "replace", "off", certificate(t, "team@example.org")); r.code != 2 {
			t.Errorf("another certificate: %d %s", r.code, r.stderr)
		}
		signs(t, "off", subkey)
	})

	for _, name := range []string{"one", "team-primary"} {
		if r := g.try(t, "signwardend", "token", "delete", "--dir", g.dir, "--id", ids[name], "--yes"); r.code == 0 {
			t.Errorf("%s was destroyed", name)
		}
	}
	g.stop(unix.SIGTERM)
	out := g.must(t, "signwardend", "check", "--dir", g.dir)
	for name, want := range map[string]int{"one": 2, "old": 2, "team": 1, "team2": 1, "off": 1} {
		if n := strings.Count(out, fmt.Sprintf("ok    %-14s ", "key "+name)); n != want {
			t.Errorf("%s is in %d tokens, want %d\n%s", name, n, want, out)
		}
	}
	g.serve(t)
	g.must(t, "signwarden", "sign", "openpgp", "--key", "off", "--force", "--output", file+".sig", file)
}
