package softhsm_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Certificates that the gateway renews, extends, rotates and revokes, read by gpg,
// Sequoia and rpm, and what the keys in them sign.
func TestCertificates(t *testing.T) {
	for _, algorithm := range []string{"rsa2048", "ed25519", "p384"} {
		for _, layout := range []string{"subkey", "single"} {
			t.Run(algorithm+" "+layout, func(t *testing.T) {
				t.Parallel()
				certificates(t, algorithm, layout)
			})
		}
	}
}

func certificates(t *testing.T, algorithm, layout string) {
	g := newGateway(t)
	g.key(t, "old", algorithm, "--layout", layout, "--expires", "1y")
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, "to be signed")
	early := file + ".early"
	g.must(t, "signwarden", "sign", "openpgp", "--key", "old", "--output", early, file)
	home := g.verifier(t, "old")
	// lint has the certificate read by everybody, and both signatures verified.
	lint := func(sigs ...string) (colons string) {
		t.Helper()
		cert := filepath.Join(t.TempDir(), "cert.asc")
		writeFile(t, cert, g.must(t, "signwarden", "key", "export", "old"))
		mustEnv(t, home, "gpg", "--batch", "--quiet", "--import", cert)
		packets := mustEnv(t, home, "gpg", "--batch", "--list-packets", "--verbose", cert)
		if strings.Contains(packets, "critical") || strings.Contains(packets, "digest algo 2,") || strings.Count(packets, "digest algo") == 0 {
			t.Errorf("gpg --list-packets:\n%s", packets)
		}
		if out := mustEnv(t, home, "sq", "inspect", "--certifications", cert); strings.Contains(out, "nvalid") {
			t.Errorf("sq inspect:\n%s", out)
		}
		if algorithm != "p384" { // rpm 4.18 knows no ECDSA
			mustEnv(t, os.Environ(), "rpmkeys", "--dbpath", t.TempDir(), "--import", cert)
		}
		for _, sig := range sigs {
			mustEnv(t, home, "gpg", "--batch", "--verify", sig, file)
			mustEnv(t, home, "sq", "verify", "--signer-cert", cert, "--detached", sig, file)
		}
		return mustEnv(t, home, "gpg", "--batch", "--with-colons", "--list-keys")
	}
	lint(early)

	g.must(t, "signwarden", "key", "openpgp", "renew", "old", "--expires", "2090-01-01")
	if got := lint(early); strings.Count(got, ":3786912000:") < 1 {
		t.Errorf("after renewal:\n%s", got)
	}
	g.must(t, "signwarden", "key", "openpgp", "add-uid", "old", "--uid", "Team <team@example.org>")
	if got := lint(early); strings.Count(got, "\nuid:") != 2 {
		t.Errorf("after a new user id:\n%s", got)
	}

	rotate := []string{"key", "openpgp", "rotate", "old", "--to", "new", "--expires", "5y"}
	if layout == "subkey" {
		rotate = append(rotate, "--overlap", "30d")
	} else if r := g.try(t, "signwarden", append(rotate, "--overlap", "30d")...); r.code != 2 || !strings.Contains(r.stderr, "primary of its certificate") {
		t.Errorf("a single key cannot be retired: exit code %d: %s", r.code, r.stderr)
	}
	g.must(t, "signwarden", rotate...)
	late, latest := file+".late", file+".latest"
	g.must(t, "signwarden", "sign", "openpgp", "--key", "new", "--output", late, file)
	g.must(t, "signwarden", "sign", "openpgp", "--key", "old", "--output", latest, file)
	want := map[string]int{"subkey": 2, "single": 1}[layout]
	if got := lint(early, late, latest); strings.Count(got, "\nsub:") != want {
		t.Errorf("after rotation:\n%s", got)
	}
	// Both names lead to the same certificate, and gpg signs with the newer key.
	if g.must(t, "signwarden", "key", "export", "old") != g.must(t, "signwarden", "key", "export", "new") {
		t.Error("the two keys have different certificates")
	}
	byGPG := file + ".gpg"
	g.must(t, "signwarden", "exec", "--", "gpg", "--batch", "--detach-sign", "-u", "team@example.org", "-o", byGPG, file)
	if e := g.audit(t, 1)[0].Entry; e["key"] != "new" {
		t.Errorf("gpg signed with %s, want new", e["key"])
	}
	lint(byGPG)

	// What is wrong changes nothing, and says so.
	before := g.must(t, "signwarden", "key", "export", "old")
	for name, args := range map[string][]string{
		"a user id twice":      {"add-uid", "old", "--uid", "Team <team@example.org>"},
		"a past expiry":        {"renew", "old", "--expires", "2020-01-01"},
		"a reason":             {"revoke", "old", "--reason", "bored"},
		"a name that is taken": {"rotate", "old", "--to", "new"},
		"a key without one":    {"renew", "plain", "--expires", "1y"},
	} {
		if name == "a key without one" {
			g.must(t, "signwarden", "key", "create", "plain", "--algorithm", "p256")
		}
		if r := g.try(t, "signwarden", append([]string{"key", "openpgp"}, args...)...); r.code != 2 && r.code != 1 || r.stderr == "" {
			t.Errorf("%s: exit code %d: %s", name, r.code, r.stderr)
		}
		if e := g.audit(t, 1)[0].Entry; e["outcome"] != "denied" || e["action"] != "key.openpgp" {
			t.Errorf("%s: audit entry %v", name, e)
		}
	}
	if now := g.must(t, "signwarden", "key", "export", "old"); now != before {
		t.Error("the certificate was changed")
	}

	g.must(t, "signwarden", "key", "disable", "old") // a key that is disabled can be revoked
	g.must(t, "signwarden", "key", "openpgp", "revoke", "old", "--reason", "compromised", "--text", "the build host")
	if e := g.audit(t, 1)[0].Entry; e["outcome"] != "done" || !strings.Contains(e["detail"], "compromised") {
		t.Errorf("audit entry %v", e)
	}
	cert := filepath.Join(t.TempDir(), "cert.asc")
	writeFile(t, cert, g.must(t, "signwarden", "key", "export", "new"))
	mustEnv(t, home, "gpg", "--batch", "--quiet", "--import", cert)
	if got := mustEnv(t, home, "gpg", "--batch", "--with-colons", "--list-keys"); !strings.Contains(got, "pub:r:") {
		t.Errorf("gpg, after the revocation:\n%s", got)
	}
	if got := mustEnv(t, home, "sq", "inspect", cert); !strings.Contains(got, "Revoked") {
		t.Errorf("sq, after the revocation:\n%s", got)
	}
	for _, name := range []string{"old", "new"} {
		if r := g.try(t, "signwarden", "sign", "openpgp", "--key", name, "--output", "-", file); r.code == 0 {
			t.Errorf("%s signs though it is revoked", name)
		}
		if got := g.must(t, "signwarden", "key", "show", name); !strings.Contains(got, "disabled") {
			t.Errorf("%s is not disabled:\n%s", name, got)
		}
	}
}
