package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/gateway/config"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/hsm/worker"
)

// Neither package can import the other.
func TestMaxWeight(t *testing.T) {
	if worker.MaxWeight != policy.MaxWeight {
		t.Errorf("a worker takes weights up to %d, and a policy gives up to %d", worker.MaxWeight, policy.MaxWeight)
	}
}

// A profile that is not there is told before anything is opened, for each token.
func TestUnknownProfile(t *testing.T) {
	const head = "listen: 127.0.0.1:0\ntls: {certificate: a, key: b, client_ca: c}\nstore: {sqlite: db}\n"
	for _, tt := range []struct{ text, want string }{
		{"token: {module: /m, label: l, pin_file: p, profile: softhsm}\n", ""},
		{"token: {module: /m, label: l, pin_file: p}\n", ""},
		{"token: {module: /m, label: l, pin_file: p, profile: sfothsm}\n", `token.profile: no token profile "sfothsm"; there are default, softhsm`},
		{"tokens:\n  - {name: a, primary: true, module: /m, label: l, pin_file: p}\n  - {name: b, module: /m, label: k, pin_file: p, profile: x}\n", `tokens: profile of b: no token profile "x"`},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, config.FileName), []byte(head+tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := (&dirFlags{dir: dir}).load()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.text, err, tt.want)
		}
	}
}

func TestSplit(t *testing.T) {
	for _, k := range []struct{ workers, sessions, cpus, n, each int }{
		{0, 0, 4, 4, 1},
		{0, 2, 4, 2, 1},
		{0, 8, 4, 4, 2},
		{3, 0, 4, 3, 1},
		{2, 8, 4, 2, 4},
		{2, 5, 4, 2, 2}, // never more than 5 in all
		{1, 1, 4, 1, 1},
	} {
		if n, each := split(k.workers, k.sessions, k.cpus); n != k.n || each != k.each {
			t.Errorf("%d workers, %d sessions, %d CPUs: got %d of %d, want %d of %d", k.workers, k.sessions, k.cpus, n, each, k.n, k.each)
		}
	}
}
