package softhsm_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// sections are what howto prints: what is to be done first, under "", and each tool's lines.
func sections(text string) map[string][]string {
	out, tool := map[string][]string{}, ""
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		name, isTool := strings.CutPrefix(line, "# ")
		isTool = isTool && !strings.HasPrefix(name, " ")
		switch {
		case isTool:
			tool = name
			out[tool] = nil
		case line != "":
			out[tool] = append(out[tool], line)
		}
	}
	return out
}

// The command lines that key show --howto prints are run as they are, and the other side's
// verifier accepts what they make.
func TestHowto(t *testing.T) {
	s := newP11Site(t)
	s.gateway.must(t, "signwarden", "key", "create", "rel", "--algorithm", "rsa2048", "--openpgp-uid", "rel <rel@example.org>")
	s.gateway.must(t, "signwarden", "key", "cert", "rel", "--self-signed", "--subject", "CN=rel", "--usage", "kmod")
	signFile := signFileByEngine(t, s.dir)
	env := append(append([]string(nil), s.env...), "PATH="+bin+":"+filepath.Dir(signFile)+":"+os.Getenv("PATH"))
	how := sections(mustEnv(t, env, "signwarden", "key", "show", "rel", "--howto"))

	run := func(t *testing.T, lines []string) {
		t.Helper()
		if len(lines) == 0 {
			t.Fatal("there is no command")
		}
		cmd := exec.CommandContext(t.Context(), "sh", "-ec", strings.Join(lines, "\n"))
		cmd.Dir, cmd.Env = s.dir, env
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(lines, "\n"), err, out)
		}
	}
	s.write(t, "file", "to be signed\n")
	s.host(t, "cp", efiImage(t), s.at("image.efi"))
	s.host(t, "cp", generatedModules(t, s.dir, 1)[0], s.at("module.ko"))
	s.host(t, "cp", buildRPMs(t, 1)[0], s.at("package.rpm"))
	s.host(t, "jar", "--create", "--file", s.at("file.jar"), "-C", s.dir, "file")
	run(t, how[""])
	cert := s.at("rel.pem")
	gnupg := s.verifier(t, "rel")
	cms := func(file string, form string) func(*testing.T) {
		return func(t *testing.T) {
			s.host(t, "openssl", "cms", "-verify", "-binary", "-inform", form, "-in", s.at(file), "-content", s.at("file"), "-CAfile", cert, "-purpose", "any", "-out", s.at("verified"))
		}
	}
	sbverify := func(t *testing.T) { s.host(t, "sbverify", "--cert", cert, s.at("signed.efi")) }
	for tool, verify := range map[string]func(*testing.T){
		"gpg": func(t *testing.T) {
			mustEnv(t, gnupg, "gpg", "--batch", "--verify", s.at("file.sig"), s.at("file"))
		},
		"rpmsign": func(t *testing.T) {
			db := t.TempDir()
			s.write(t, "rel.asc", s.gateway.must(t, "signwarden", "key", "export", "rel"))
			s.host(t, "rpmkeys", "--dbpath", db, "--import", s.at("rel.asc"))
			if out := s.host(t, "rpmkeys", "--dbpath", db, "-K", s.at("package.rpm")); !strings.Contains(out, "signatures OK") {
				t.Error(out)
			}
		},
		"ssh-keygen": func(t *testing.T) {
			s.write(t, "allowed", s.gateway.must(t, "signwarden", "key", "export", "rel", "--format", "ssh", "--signer", "rel@example.org"))
			s.host(t, "sh", "-c", fmt.Sprintf("ssh-keygen -Y verify -f %s -I rel@example.org -n file -s %s <%s", s.at("allowed"), s.at("file.sig"), s.at("file")))
		},
		"gpgsm":               cms("file.p7s", "DER"),
		"openssl cms, engine": cms("file.p7", "DER"),
		"certtool":            cms("file.p7", "PEM"),
		"openssl dgst, engine": func(t *testing.T) {
			s.host(t, "openssl", "x509", "-in", cert, "-noout", "-pubkey", "-out", s.at("pub"))
			s.host(t, "openssl", "dgst", "-sha256", "-verify", s.at("pub"), "-signature", s.at("file.sig"), s.at("file"))
		},
		"sign-file": func(t *testing.T) {
			s.gateway.must(t, "signwarden", "verify", "kmod", "--cert", cert, s.at("module.ko"))
		},
		"sbsign":       sbverify,
		"pesign":       sbverify,
		"osslsigncode": sbverify,
		"evmctl": func(t *testing.T) {
			// security.ima in a file: version 2, the hash, the key's id and a length go before. evmctl
			// itself looks for another id than the kernel does.
			sig := readFile(t, s.at("file.sig"))
			if len(sig) < 9 {
				t.Fatalf("a signature of %d bytes", len(sig))
			}
			s.write(t, "raw", string(sig[9:]))
			s.host(t, "openssl", "x509", "-in", cert, "-noout", "-pubkey", "-out", s.at("pub"))
			s.host(t, "openssl", "dgst", "-sha256", "-verify", s.at("pub"), "-signature", s.at("raw"), s.at("file"))
		},
		"jarsigner": func(t *testing.T) {
			if out := s.host(t, "jarsigner", "-verify", s.at("signed.jar")); !strings.Contains(out, "jar verified") {
				t.Error(out)
			}
		},
	} {
		t.Run(tool, func(t *testing.T) {
			for _, name := range []string{"file.sig", "file.p7", "file.p7s", "signed.efi"} {
				_ = os.Remove(s.at(name)) // of the tool before
			}
			run(t, how[tool])
			verify(t)
		})
	}

	// What a key cannot do has no command line, and a reason.
	for _, tt := range []struct{ key, tool, why string }{
		{"ec", "sbsign", "RSA keys only"},
		{"ec", "gpg", "no OpenPGP certificate"},
		{"ec", "rpmsign", "ECDSA"},
		{"ed", "openssl dgst, engine", "Ed25519"},
	} {
		lines := sections(s.gateway.must(t, "signwarden", "key", "show", tt.key, "--howto"))[tt.tool]
		if len(lines) != 1 || !strings.HasPrefix(lines[0], "#   no: ") || !strings.Contains(lines[0], tt.why) {
			t.Errorf("%s with %s: %q, want a reason with %q", tt.tool, tt.key, lines, tt.why)
		}
	}
	// A certificate that a CA has issued wants its root.
	if lines := sections(s.gateway.must(t, "signwarden", "key", "show", "ec", "--howto"))["gpgsm"]; len(lines) != 1 || !strings.Contains(lines[0], "exec --trusted-root ROOT.pem -- gpgsm") {
		t.Errorf("gpgsm with a CA's certificate: %q", lines)
	}
	s.gateway.must(t, "signwarden", "key", "disable", "rel")
	if lines := sections(s.gateway.must(t, "signwarden", "key", "show", "rel", "--howto"))["sbsign"]; len(lines) != 1 || !strings.Contains(lines[0], "key enable rel") {
		t.Errorf("a disabled key: %q", lines)
	}
	s.gateway.must(t, "signwarden", "key", "enable", "rel")

	// Nor has what the rules do not let the principal do.
	s.gateway.must(t, "signwardend", "client", "create", "modules", "--dir", s.gateway.dir)
	s.policy(t, "  - {name: modules, principals: [modules], keys: [rel], may: [read]}\n  - {name: modules-gpg, principals: [modules], keys: [rel], may: [sign], formats: [openpgp], blind: true}\n")
	how = sections(s.as("modules").must(t, "signwarden", "key", "show", "rel", "--howto"))
	if lines := how["gpg"]; len(lines) != 1 || !strings.HasPrefix(lines[0], "signwarden exec -- gpg") {
		t.Errorf("gpg, which is allowed: %q", lines)
	}
	if lines := how["ssh-keygen"]; len(lines) != 1 || !strings.Contains(lines[0], "formats: [ssh-sig] and namespaces: [file]") {
		t.Errorf("ssh-keygen, which is not allowed: %q", lines)
	}
	if lines := how["sbsign"]; len(lines) != 1 || !strings.Contains(lines[0], "formats: [pkcs11] and blind: true") {
		t.Errorf("sbsign, which is not allowed: %q", lines)
	}
}
