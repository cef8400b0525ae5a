package softhsm_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Rules that decide on what the gateway reads of a package, with real packages.
func TestContentRules(t *testing.T) {
	g := newGateway(t)
	g.key(t, "release", "rsa2048")
	g.must(t, "signwardend", "client", "create", "builder", "--dir", g.dir)
	files := distributionRPMs(t)
	var names []string
	for _, f := range files {
		names = append(names, strings.TrimSpace(mustEnv(t, os.Environ(), "rpm", "-qp", "--nosignature", "--qf", "%{NAME}", f)))
	}
	const ours = "payload-test" // one for each compressor
	if n := strings.Count(strings.Join(names, " "), ours); n == 0 || n == len(names) {
		t.Fatalf("packages %v: want some named %s, and others", names, ours)
	}
	g.policy(t, `  - name: ours
    principals: [builder]
    keys: [release]
    may: [sign]
    formats: [rpm]
    content: rpm
    packages: {names: [payload-*, no-such], arches: [x86_64, noarch], epochs: ["0"]}
`)
	b := g.as("builder")
	db := g.rpmdb(t, "release")
	before := map[string][]byte{}
	for _, f := range files {
		before[f] = readFile(t, f)
	}
	rows := len(g.audit(t, 1000))
	r := b.try(t, "signwarden", append([]string{"sign", "rpm", "--key", "release"}, files...)...)
	if r.code != 6 {
		t.Errorf("exit code %d, want 6\n%s", r.code, r.stderr)
	}
	entries := g.audit(t, 1000)[rows:]
	// One package has no digest of its payload: a signature over that is asked for
	// as well, and is a bare digest.
	if len(entries) != len(files)+1 {
		t.Errorf("%d rows in the audit log, want %d", len(entries), len(files)+1)
	}
	seen := map[string]bool{}
	for _, e := range entries {
		if e.Entry["nevra"] == "" {
			if e.Entry["outcome"] != "denied" || !strings.HasPrefix(e.Entry["claim_nevra"], "simple-") {
				t.Errorf("audit entry %v", e.Entry)
			}
			continue
		}
		seen[e.Entry["nevra"]] = true
		if want := strings.HasPrefix(e.Entry["nevra"], ours+"-"); (e.Entry["outcome"] == "signed") != want || e.Entry["nevra"] != e.Entry["claim_nevra"] {
			t.Errorf("audit entry %v", e.Entry)
		}
	}
	if len(seen) < 5 {
		t.Errorf("the log names the packages %v", seen)
	}
	for i, f := range files {
		if names[i] == ours {
			allOK(t, db, []string{f})
		} else if !bytes.Equal(readFile(t, f), before[f]) {
			t.Errorf("%s was denied, and has changed", filepath.Base(f))
		}
		want := 4
		if names[i] == ours {
			want = 0
		}
		if r := b.try(t, "signwarden", "policy", "test", "--key", "release", "--rpm", f); r.code != want {
			t.Errorf("policy test of %s: exit code %d, want %d: %s", f, r.code, want, r.stdout)
		}
	}
	if strings.Count(r.stderr, "\n") < len(files) || !strings.Contains(r.stderr, "is not for this package") {
		t.Errorf("what is told does not name the package's part:\n%s", r.stderr)
	}

	// A digest shows nothing: neither rpmsign, which has only that, nor a signature
	// over the payload is for this rule.
	for name, args := range map[string][]string{
		"rpmsign": {"exec", "--", "rpmsign", "--define", "_gpg_name release@example.org", "--resign", files[0]},
		"gpg":     {"exec", "--", "gpg", "--detach-sign", "-o", t.TempDir() + "/sig", "-u", "release@example.org", files[0]},
		"rpmv3":   {"sign", "rpm", "--key", "release", "--rpmv3", files[0]},
		"openpgp": {"sign", "openpgp", "--key", "release", files[0]},
	} {
		if r := b.try(t, "signwarden", args...); r.code == 0 {
			t.Errorf("%s signs blind: %s", name, r.stdout)
		}
		if e := g.audit(t, 1)[0].Entry; e["outcome"] != "denied" {
			t.Errorf("%s: audit entry %v", name, e)
		}
	}
}
