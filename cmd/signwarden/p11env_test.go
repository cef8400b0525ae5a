package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The engine is added to whatever configuration there is, and OpenSSL reads the result:
// it knows the engine, and what the base said besides.
func TestAddEngine(t *testing.T) {
	const extra = "\n[req]\ndistinguished_name = dn\n[dn]\n[legacy]\nactivate = 1\n[provs]\nlegacy = legacy\n"
	for _, tt := range []struct {
		name, base string
		want       []string // lines of the result
		not        string
	}{
		{"no base", "", []string{"openssl_conf = signwarden_init", "[signwarden_init]", "engines = signwarden_engines"}, ".include"},
		{"nothing said", extra, []string{"openssl_conf = signwarden_init"}, ""},
		{"a section of its own", "openssl_conf = own # here\n[own]\nproviders = provs\n" + extra, []string{"[own]", "engines = signwarden_engines"}, "openssl_conf ="},
		{"after a section", "[req]\ndistinguished_name = dn\n[default]\nopenssl_conf = own\n[own]\nproviders = provs\n" + extra, []string{"[own]"}, "openssl_conf ="},
		{"in another section", extra + "[elsewhere]\nopenssl_conf = own\n", []string{"openssl_conf = signwarden_init"}, ""},
		{"engines of its own", "openssl_conf = own\n[own]\nengines = mine\n[mine]\n" + extra, []string{"[mine]", "pkcs11 = signwarden_pkcs11"}, "signwarden_engines"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			base := ""
			if tt.base != "" {
				base = filepath.Join(dir, "base.cnf")
				write(t, base, tt.base)
			}
			got := string(addEngine([]byte(tt.base), base, "/nowhere/p11-kit-client.so"))
			for _, line := range append(tt.want, "engine_id = pkcs11", "MODULE_PATH = /nowhere/p11-kit-client.so", "init = 0") {
				if !strings.Contains(got, line+"\n") {
					t.Errorf("no line %q in\n%s", line, got)
				}
			}
			if tt.not != "" && strings.Contains(got, tt.not) {
				t.Errorf("%q in\n%s", tt.not, got)
			}
			write(t, filepath.Join(dir, "cnf"), got)
			out := openssl(t, filepath.Join(dir, "cnf"), "engine")
			if !strings.Contains(out, "(pkcs11)") {
				t.Errorf("OpenSSL has no engine pkcs11 by\n%s\nbut:\n%s", got, out)
			}
			if strings.Contains(tt.base, "providers") {
				if out := openssl(t, filepath.Join(dir, "cnf"), "list", "-providers"); !strings.Contains(out, "legacy") {
					t.Errorf("what the base said of providers is lost:\n%s\n%s", got, out)
				}
			}
		})
	}
	for _, base := range []string{"openssl_conf = $own\n", "openssl_conf = \"own\"\n", "openssl_conf = own\n[own]\nengines = ${mine}\n"} {
		if got := addEngine([]byte(base), "/base", "/module"); got != nil {
			t.Errorf("of %q was made:\n%s", base, got)
		}
	}
}

func openssl(t *testing.T, conf string, args ...string) string {
	t.Helper()
	cmd := exec.Command("openssl", args...)
	cmd.Env = append(os.Environ(), "OPENSSL_CONF="+conf)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %q: %v\n%s", args, err, out)
	}
	return string(out)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestEscapeP11(t *testing.T) {
	for in, want := range map[string]string{
		"/run/user/1000/p11-kit/pkcs11": "/run/user/1000/p11-kit/pkcs11",
		"/tmp/a b%;=ü":                  "/tmp/a%20b%25%3b%3d%c3%bc",
	} {
		if got := escapeP11(in); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}

func TestParseTokens(t *testing.T) {
	groups, err := parseTokens([]string{"boot=sb-*,shim", "kernel=kmod"})
	if err != nil || len(groups) != 2 || groups[0].Label != "boot" || strings.Join(groups[0].Keys, " ") != "sb-* shim" || groups[1].Keys[0] != "kmod" {
		t.Errorf("%+v, %v", groups, err)
	}
	for _, bad := range [][]string{{"boot"}, {"=x"}, {"a=x", "ab=y"}, {"a=["}, {"a="}} {
		if groups, err := parseTokens(bad); err == nil {
			t.Errorf("%q: %+v", bad, groups)
		}
	}
}
