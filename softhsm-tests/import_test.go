package softhsm_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/softhsm-tests/faultp11"
)

// emptyTokens is a gateway with two tokens, "a" and "b", that are empty; b is reached
// by a module that fails as it is told.
func emptyTokens(t *testing.T) (*gateway, *faultp11.Module) {
	t.Helper()
	g := initGateway(t, shortDir(t)+"/gw")
	m := faultp11.New(t, softhsmModule(t))
	var list strings.Builder
	for i, name := range []string{"a", "b"} {
		copyToken(t, g.dir, name)
		module := softhsmModule(t)
		if i == 1 {
			module = faulty
		}
		fmt.Fprintf(&list, "  - name: %s\n    primary: %v\n    module: %s\n    label: signwarden-dev\n    pin_file: token/user.pin\n    workers: 1\n    environment:\n      SOFTHSM2_CONF: ./%s/softhsm2.conf\n", name, i == 0, module, name)
	}
	for k, v := range m.Env {
		fmt.Fprintf(&list, "      %s: %s\n", k, v)
	}
	path := g.dir + "/signwardend.yaml"
	writeFile(t, path, withTokens(t, string(readFile(t, path)), list.String()))
	return g, m
}

// held is what the tokens hold, a line for each object: token, kind, algorithm, id,
// label, key and remarks, without blanks for the table.
func (g *gateway) held(t *testing.T, flags ...string) []string {
	t.Helper()
	out := g.must(t, "signwardend", append([]string{"token", "list", "--dir", g.dir}, flags...)...)
	lines := strings.Split(strings.TrimSpace(out), "\n")[1:]
	for i, l := range lines {
		lines[i] = regexp.MustCompile(` {2,}`).ReplaceAllString(strings.TrimSpace(l), "|")
	}
	return lines
}

// imports runs token import, which must succeed, and returns the id.
func (g *gateway) imports(t *testing.T, args ...string) string {
	t.Helper()
	out := g.must(t, "signwardend", append([]string{"token", "import", "--dir", g.dir}, args...)...)
	m := regexp.MustCompile(`id ([0-9a-f]+),`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no id in %q", out)
	}
	return m[1]
}

// opensslKey makes a private key and a self-signed certificate of it.
func opensslKey(t *testing.T, dir, name string, kind ...string) (key, certificate string) {
	t.Helper()
	key, certificate = filepath.Join(dir, name+".key"), filepath.Join(dir, name+".crt")
	mustEnv(t, os.Environ(), "openssl", append([]string{"genpkey", "-out", key, "-algorithm"}, kind...)...)
	mustEnv(t, os.Environ(), "openssl", "req", "-x509", "-new", "-key", key, "-subj", "/CN="+name, "-days", "30", "-out", certificate)
	return key, certificate
}

// A key from a file comes into every token under one id, with its certificate; others
// see it there, and it cannot be taken out again. What is registered stays.
func TestTokenImport(t *testing.T) {
	t.Parallel()
	g, _ := emptyTokens(t)
	dir := t.TempDir()
	key, certificate := opensslKey(t, dir, "kmod", "EC", "-pkeyopt", "ec_paramgen_curve:P-384")
	g.serve(t) // the tokens are in use meanwhile
	id := g.imports(t, "--key", key, "--label", "kmod", "--certificate", certificate)
	var want []string
	for _, name := range []string{"a", "b"} {
		want = append(want,
			name+"|private key|p384|"+id+"|kmod|-|from outside",
			name+"|public key|p384|"+id+"|kmod|-",
			name+"|certificate|p384|"+id+"|kmod|-|CN=kmod")
	}
	got := g.held(t)
	for i, l := range got {
		got[i] = regexp.MustCompile(`, serial [0-9a-f]+$`).ReplaceAllString(l, "")
	}
	if !slices.Equal(got, want) {
		t.Errorf("the tokens hold\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	pin := strings.TrimSpace(string(readFile(t, g.dir+"/token/user.pin")))
	for _, name := range []string{"a", "b"} {
		list := mustEnv(t, append(os.Environ(), "SOFTHSM2_CONF="+g.dir+"/"+name+"/softhsm2.conf"), "pkcs11-tool",
			"--module", softhsmModule(t), "--login", "--pin", pin, "--list-objects")
		if strings.Count(list, id) != 3 || !strings.Contains(list, "Access:     sensitive\n") || strings.Contains(list, "Usage:      decrypt") {
			t.Errorf("pkcs11-tool sees in %s:\n%s", name, list)
		}
	}
	// Only what is said with --yes is destroyed, and only where it is meant.
	if r := g.try(t, "signwardend", "token", "delete", "--dir", g.dir, "--id", id); r.code != 2 || !strings.Contains(r.stderr, "--yes") || strings.Count(r.stdout, id) != 6 {
		t.Errorf("without --yes: %d %s%s", r.code, r.stdout, r.stderr)
	}
	g.must(t, "signwardend", "token", "delete", "--dir", g.dir, "--id", id, "--token", "b", "--yes")
	if got := g.held(t); len(got) != 3 || !strings.HasPrefix(got[0], "a|") {
		t.Errorf("after delete in b: %q", got)
	}
	// And what was in one is brought into the other again.
	if again := g.imports(t, "--key", key, "--label", "kmod", "--id", id, "--token", "b"); again != id || len(g.held(t, "--token", "b")) != 2 {
		t.Errorf("into b again: %s, %q", again, g.held(t))
	}
	// Without the store nobody knows whether it is registered; list shows what there is.
	held := g.held(t)
	if err := os.Rename(g.dir+"/signwarden.db", g.dir+"/elsewhere"); err != nil {
		t.Fatal(err)
	}
	for _, yes := range []string{"--yes", "--yes=false"} {
		if r := g.try(t, "signwardend", "token", "delete", "--dir", g.dir, "--id", id, yes); r.code != 1 || !strings.Contains(r.stderr, "registered") || !strings.Contains(r.stderr, "store") {
			t.Errorf("delete %s without a store: %d %s", yes, r.code, r.stderr)
		}
	}
	if now := g.held(t); len(now) != 5 || len(held) != 5 {
		t.Errorf("without a store: %q, were %q", now, held)
	}
	if err := os.Rename(g.dir+"/elsewhere", g.dir+"/signwarden.db"); err != nil {
		t.Fatal(err)
	}
	g.must(t, "signwardend", "token", "delete", "--dir", g.dir, "--id", id, "--yes")
	if got := g.held(t); len(got) != 0 {
		t.Errorf("after delete: %q", got)
	}
	if r := g.try(t, "signwardend", "token", "delete", "--dir", g.dir, "--id", id, "--yes"); r.code == 0 {
		t.Error("what is not there was deleted")
	}
	// What somebody else has put there, and can take out again, is told of loudly.
	mustEnv(t, append(os.Environ(), "SOFTHSM2_CONF="+g.dir+"/a/softhsm2.conf"), "pkcs11-tool", "--module", softhsmModule(t),
		"--login", "--pin", pin, "--keypairgen", "--key-type", "EC:prime256v1", "--id", "99", "--label", "theirs", "--extractable")
	r := g.try(t, "signwardend", "token", "list", "--dir", g.dir)
	if r.code != 0 || !strings.Contains(r.stderr, "1 private or secret keys can be taken out") || !strings.Contains(r.stdout, "EXTRACTABLE") {
		t.Errorf("an extractable key: %d %s%s", r.code, r.stdout, r.stderr)
	}
	g.must(t, "signwardend", "token", "delete", "--dir", g.dir, "--id", "99", "--yes")

	g.must(t, "signwarden", "key", "create", "rel", "--algorithm", "p256")
	before := g.held(t)
	registered := strings.Split(before[0], "|")
	if len(before) != 2 || registered[5] != "rel" || registered[6] != "made here" {
		t.Fatalf("a key that was made: %q", before)
	}
	if r := g.try(t, "signwardend", "token", "delete", "--dir", g.dir, "--id", registered[3], "--yes"); r.code == 0 || !strings.Contains(r.stderr, "key rel") {
		t.Errorf("a registered key: %d %s", r.code, r.stderr)
	}
	if got := g.held(t); !slices.Equal(got, before) {
		t.Errorf("after that: %q", got)
	}
}

// What is refused changes no token.
func TestTokenImportRefused(t *testing.T) {
	t.Parallel()
	g, _ := emptyTokens(t)
	dir := t.TempDir()
	key, _ := opensslKey(t, dir, "one", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
	other, foreign := opensslKey(t, dir, "two", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
	id := g.imports(t, "--key", key, "--label", "one", "--token", "b")
	before := g.held(t)
	bad, small := filepath.Join(dir, "bad"), filepath.Join(dir, "small")
	writeFile(t, bad, strings.Replace(string(readFile(t, key)), "\nM", "\nN", 1))
	mustEnv(t, os.Environ(), "openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024", "-out", small)
	open := filepath.Join(dir, "open")
	writeFile(t, open, string(readFile(t, other)))
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"bad PEM", []string{"--key", bad, "--label", "l"}, 2, "no private key"},
		{"no file", []string{"--key", bad + "x", "--label", "l"}, 1, "no such file"},
		{"a certificate as key", []string{"--key", foreign, "--label", "l"}, 2, "no private key"},
		{"small RSA", []string{"--key", small, "--label", "l"}, 2, "1024 bits"},
		{"wrong certificate", []string{"--key", key, "--label", "l", "--certificate", foreign}, 2, "for another key"},
		{"id in use in the second", []string{"--key", other, "--label", "l", "--id", id}, 1, "token b"},
		{"label in use in the second", []string{"--key", other, "--label", "one"}, 1, "token list"},
		{"id", []string{"--key", other, "--label", "l", "--id", "xyz"}, 2, "hexadecimal"},
		{"token", []string{"--key", other, "--label", "l", "--token", "c"}, 2, "the tokens are a, b"},
		{"others may read it", []string{"--key", open, "--label", "one"}, 1, "mode 0644"},
	} {
		r := g.try(t, "signwardend", append([]string{"token", "import", "--dir", g.dir}, c.args...)...)
		if r.code != c.code || !strings.Contains(r.stderr, c.want) {
			t.Errorf("%s: code %d, %q; want %d, %q", c.name, r.code, r.stderr, c.code, c.want)
		}
	}
	// An encrypted key says how it can be read, and is then.
	locked := filepath.Join(dir, "locked")
	mustEnv(t, os.Environ(), "openssl", "pkcs8", "-topk8", "-in", other, "-out", locked, "-passout", "pass:secret")
	if r := g.try(t, "signwardend", "token", "import", "--dir", g.dir, "--key", locked, "--label", "l"); r.code != 2 || !strings.Contains(r.stderr, "openssl pkey") {
		t.Errorf("encrypted: %d %s", r.code, r.stderr)
	}
	if got := g.held(t); !slices.Equal(got, before) {
		t.Errorf("the tokens have changed: %q", got)
	}
	out := g.must(t, "sh", "-c", "openssl pkey -passin pass:secret -in "+locked+" | signwardend token import --dir "+g.dir+" --key - --label two")
	if strings.Count(out, "imported rsa2048") != 2 {
		t.Errorf("from standard input: %s", out)
	}
}

// Whoever interrupts an import leaves nothing behind, nor in the token that had the key
// already. Where a worker dies in the second, the first is as it was, and the error
// tells what may be left, which delete removes.
func TestTokenImportInterrupted(t *testing.T) {
	t.Parallel()
	g, m := emptyTokens(t)
	key, _ := opensslKey(t, t.TempDir(), "one", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
	args := []string{"token", "import", "--dir", g.dir, "--key", key, "--label", "one", "--id", "0a"}
	for name, signals := range map[string][]unix.Signal{
		"Ctrl-C": {unix.SIGINT}, "Ctrl-C twice": {unix.SIGINT, unix.SIGINT}, "its terminal goes": {unix.SIGHUP},
	} {
		m.Set(t, "C_CreateObject delay=300", "C_DestroyObject delay=300")
		calls := m.Calls("C_CreateObject")
		cmd := exec.Command(filepath.Join(bin, "signwardend"), args...)
		var says bytes.Buffer
		cmd.Stderr = &says
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the second token gets the key", func() bool { return m.Calls("C_CreateObject") == calls+2 })
		for i, s := range signals {
			destroyed := m.Calls("C_DestroyObject")
			if err := cmd.Process.Signal(s); err != nil {
				t.Fatal(err)
			}
			if i < len(signals)-1 {
				waitFor(t, "it is undone", func() bool { return m.Calls("C_DestroyObject") > destroyed })
			}
		}
		if err := cmd.Wait(); err == nil || !strings.Contains(says.String(), "canceled") {
			t.Errorf("%s: %v %s", name, err, says.String())
		}
		m.Set(t)
		if got := g.held(t); len(got) != 0 {
			t.Errorf("%s: left: %q", name, got)
		}
	}

	m.Set(t, "C_SignInit segv")
	r := g.try(t, "signwardend", args...)
	if r.code == 0 || !strings.Contains(r.stderr, "token b") || !strings.Contains(r.stderr, "may be left") || !strings.Contains(r.stderr, "token delete") {
		t.Errorf("worker killed: %d %s", r.code, r.stderr)
	}
	m.Set(t)
	if got := g.held(t); len(got) != 2 || !strings.HasPrefix(got[0], "b|private key|p256|0a|one|-|") {
		t.Errorf("after the worker's end: %q", got)
	}
	g.must(t, "signwardend", "token", "delete", "--dir", g.dir, "--id", "0a", "--yes")
	if got := g.held(t); len(got) != 0 {
		t.Errorf("after delete: %q", got)
	}
	g.must(t, "signwardend", args...)
}
