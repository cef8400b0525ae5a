package softhsm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// 100 packages in one rpmsign, with the signatures of rpm 4 and with those of rpm 3
// too; rpmkeys says OK of each.
func TestAgentRPMSign(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "rsa4096")
	db := g.rpmdb(t, "rel")
	for _, tt := range []struct {
		args []string
		sigs int // a package
	}{
		{[]string{"--addsign"}, 1},
		{[]string{"--addsign", "--rpmv3"}, 2},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			files := hundredRPMs(t)
			before := g.audit(t, 1)[0].Row
			g.must(t, "signwarden", append(append([]string{"exec", "--", "rpmsign", "--define", "_gpg_name rel@example.org"}, tt.args...), files...)...)
			if n := signedRPMs(t, db, files); n != len(files) {
				t.Errorf("rpmkeys -K: %d of %d packages are signed", n, len(files))
			}
			if got, want := g.audit(t, 1)[0].Row-before, int64(len(files)*tt.sigs); got != want {
				t.Errorf("%d audit rows, want %d: one for each signature", got, want)
			}
			// The old signature is over header and payload.
			tags := mustEnv(t, os.Environ(), "rpm", append([]string{"-qp", "--nosignature", "--qf", "%{RSAHEADER:pgpsig}|%{SIGPGP:pgpsig}\n"}, files...)...)
			if n := strings.Count(tags, "RSA/"); n != len(files)*tt.sigs {
				t.Errorf("%d signatures in the packages, want %d:\n%s", n, len(files)*tt.sigs, tags)
			}
		})
	}
}

// debSource makes a source package that builds a package of one file.
func debSource(t testing.TB, maintainer string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "hello-1.0")
	if err := os.MkdirAll(dir+"/debian/source", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"changelog":     "hello (1.0) unstable; urgency=low\n\n  * First.\n\n -- " + maintainer + "  Mon, 05 Apr 2027 10:00:00 +0000\n",
		"control":       "Source: hello\nMaintainer: " + maintainer + "\nSection: misc\nPriority: optional\nStandards-Version: 4.6.2\nRules-Requires-Root: no\n\nPackage: hello\nArchitecture: all\nDescription: a file\n It is there to be signed.\n",
		"source/format": "3.0 (native)\n",
		"rules": `#!/usr/bin/make -f
clean build build-indep build-arch:
binary: binary-indep
binary-arch:
binary-indep:
	mkdir -p debian/tmp/DEBIAN debian/tmp/usr/share/hello
	echo hello >debian/tmp/usr/share/hello/hello
	dpkg-gencontrol
	dpkg-deb --root-owner-group --build debian/tmp ..
`,
	} {
		writeFile(t, filepath.Join(dir, "debian", name), text)
	}
	if err := os.Chmod(dir+"/debian/rules", 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// debsign signs what was built unsigned, and dpkg-buildpackage what it builds;
// dscverify takes both, with the exported certificate.
func TestAgentDebian(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "rsa4096")
	source := debSource(t, "rel <rel@example.org>")
	top := filepath.Dir(source)
	keyring := filepath.Join(top, "rel.gpg")
	mustEnv(t, g.verifier(t, "rel"), "gpg", "--batch", "--output", keyring, "--export", "rel@example.org")
	verified := func(how string) {
		t.Helper()
		for _, name := range []string{"hello_1.0.dsc", "hello_1.0_" + arch(t) + ".changes"} {
			r := runEnv(t, os.Environ(), "dscverify", "--no-default-keyrings", "--keyring", keyring, filepath.Join(top, name))
			if r.code != 0 || !strings.Contains(r.stdout+r.stderr, "Good signature found") {
				t.Errorf("dscverify of %s, signed by %s: exit code %d:\n%s%s", name, how, r.code, r.stdout, r.stderr)
			}
		}
	}
	inSource := func(command string) {
		t.Helper()
		g.must(t, "signwarden", "exec", "--", "sh", "-ec", "cd "+source+"; "+command)
	}
	inSource("dpkg-buildpackage -d -us -uc")
	changes := filepath.Join(top, "hello_1.0_"+arch(t)+".changes")
	if r := runEnv(t, os.Environ(), "dscverify", "--no-default-keyrings", "--keyring", keyring, changes); r.code == 0 {
		t.Fatal("dscverify takes what is not signed: this test could not fail")
	}
	inSource("debsign -k rel@example.org " + changes)
	verified("debsign")
	inSource("dpkg-buildpackage -d -krel@example.org")
	verified("dpkg-buildpackage")
}

func arch(t testing.TB) string {
	t.Helper()
	return strings.TrimSpace(mustEnv(t, os.Environ(), "dpkg", "--print-architecture"))
}

// An apt repository of one package whose Release file gpg signs: apt takes it, and
// refuses it when it was changed, or signed by another key.
func TestAgentApt(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "rsa4096")
	g.key(t, "other", "ed25519")
	source := debSource(t, "rel <rel@example.org>")
	g.must(t, "sh", "-ec", "cd "+source+"; dpkg-buildpackage -d -b -us -uc")
	repo := filepath.Join(shortDir(t), "repo")
	if err := os.Mkdir(repo, 0o755); err != nil {
		t.Fatal(err)
	}
	publish := func(key string, forms ...string) {
		t.Helper()
		g.must(t, "sh", "-ec", fmt.Sprintf(`cd %s; rm -f InRelease Release*; cp %s/*.deb .
apt-ftparchive packages . >Packages; apt-ftparchive -o APT::FTPArchive::Release::Suite=stable release . >../Release; mv ../Release .`, repo, filepath.Dir(source)))
		for _, form := range forms {
			g.must(t, "signwarden", "exec", "--", "sh", "-ec", "cd "+repo+"; gpg --batch -u "+key+"@example.org "+form+" Release")
		}
	}
	root := shortDir(t)
	cert := filepath.Join(root, "rel.asc")
	writeFile(t, cert, g.must(t, "signwarden", "key", "export", "rel"))
	writeFile(t, filepath.Join(root, "sources.list"), fmt.Sprintf("deb [signed-by=%s] file:%s ./\n", cert, repo))
	update := func() result {
		t.Helper()
		mustEnv(t, os.Environ(), "sh", "-ec", "cd "+root+"; rm -rf state cache; mkdir -p state/lists/partial cache/archives/partial")
		return runEnv(t, append(os.Environ(), "LC_ALL=C"), "apt-get", "-o", "Dir::Etc::sourcelist="+root+"/sources.list", "-o", "Dir::Etc::sourceparts=-",
			"-o", "Dir::State="+root+"/state", "-o", "Dir::State::status=/dev/null", "-o", "Dir::Cache="+root+"/cache",
			"-o", "APT::Sandbox::User=root", "-o", "APT::Update::Error-Mode=any", "update")
	}
	for name, forms := range map[string][]string{
		"InRelease":   {"--clearsign --output InRelease"},
		"Release.gpg": {"--armor --detach-sign --output Release.gpg"},
	} {
		t.Run(name, func(t *testing.T) {
			publish("rel", forms...)
			if r := update(); r.code != 0 {
				t.Errorf("apt-get update: exit code %d:\n%s%s", r.code, r.stdout, r.stderr)
			}
			publish("other", forms...)
			if r := update(); r.code == 0 || !strings.Contains(r.stdout+r.stderr, "NO_PUBKEY") {
				t.Errorf("apt takes another's signature: exit code %d:\n%s%s", r.code, r.stdout, r.stderr)
			}
		})
	}
	publish("rel", "--clearsign --output InRelease")
	mustEnv(t, os.Environ(), "sed", "-i", "s/^Suite: stable/Suite: stabel/", repo+"/InRelease")
	if r := update(); r.code == 0 || !strings.Contains(r.stdout+r.stderr, "BADSIG") {
		t.Errorf("apt takes a file that was changed: exit code %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
}

// An rpm repository whose repomd.xml gpg signs, as dnf and zypper want it.
func TestAgentRepomd(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "rsa4096")
	dir := filepath.Dir(buildRPMs(t, 2)[0])
	mustEnv(t, os.Environ(), "createrepo_c", "--quiet", dir)
	repomd := filepath.Join(dir, "repodata", "repomd.xml")
	g.must(t, "signwarden", "exec", "--", "gpg", "--batch", "-u", "rel@example.org", "--armor", "--detach-sign", repomd)
	mustEnv(t, g.verifier(t, "rel"), "gpg", "--batch", "--verify", repomd+".asc", repomd)
	cert := filepath.Join(t.TempDir(), "rel.asc")
	writeFile(t, cert, g.must(t, "signwarden", "key", "export", "rel"))
	sqVerify(t, cert, repomd+".asc", repomd)
}

// gpgsm signs with X.509 keys: self-signed ones as they are, and one that a CA has
// issued with the CA's certificate as a trusted root. gpgsm and openssl verify.
func TestAgentGPGSM(t *testing.T) {
	g := newGateway(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	writeFile(t, file, "text")
	for name, algorithm := range map[string]string{"sm-rsa": "rsa2048", "sm-p256": "p256"} {
		g.must(t, "signwarden", "key", "create", name, "--algorithm", algorithm)
		g.must(t, "signwarden", "key", "cert", name, "--self-signed", "--subject", "CN="+name+",O=Example")
	}
	ca := filepath.Join(dir, "ca")
	g.must(t, "signwarden", "key", "create", "sm-ca", "--algorithm", "rsa2048")
	issueCertificate(t, g, ca, "sm-ca")

	sign := func(t *testing.T, name string, args ...string) (string, result) {
		t.Helper()
		sig := filepath.Join(dir, name+".p7s")
		script := "gpgsm --batch --yes --status-fd 2 -u " + name + " --include-certs -1 --output " + sig + " --detach-sign " + file +
			" && gpgsm --batch --verify " + sig + " " + file
		return sig, g.try(t, "signwarden", append(append([]string{"exec"}, args...), "--", "sh", "-c", script)...)
	}
	for _, name := range []string{"sm-rsa", "sm-p256", "sm-ca"} {
		t.Run(name, func(t *testing.T) {
			cert := filepath.Join(dir, name+".pem")
			writeFile(t, cert, g.must(t, "signwarden", "key", "export", name, "--format", "x509"))
			var args []string
			if name == "sm-ca" {
				if _, r := sign(t, name); r.code == 0 {
					t.Errorf("gpgsm signs under a root that nobody said is trusted:\n%s", r.stderr)
				}
				cert, args = ca+".pem", []string{"--trusted-root", ca + ".pem"}
			}
			sig, r := sign(t, name, args...)
			if r.code != 0 || !strings.Contains(r.stderr, "SIG_CREATED") || !strings.Contains(r.stderr, "Good signature") {
				t.Fatalf("exit code %d:\n%s", r.code, r.stderr)
			}
			mustEnv(t, os.Environ(), "openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", sig, "-content", file,
				"-CAfile", cert, "-purpose", "any", "-out", "/dev/null")
		})
	}
}

// issueCertificate makes a CA and has it issue a key's certificate, with its chain.
func issueCertificate(t testing.TB, g *gateway, ca, name string) {
	t.Helper()
	writeFile(t, ca+".csr", g.must(t, "signwarden", "key", "csr", name, "--subject", "CN="+name+",O=Example"))
	writeFile(t, ca+".ext", "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n")
	mustEnv(t, os.Environ(), "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=CA of "+name,
		"-addext", "keyUsage=critical,keyCertSign,cRLSign", "-keyout", ca+".key", "-out", ca+".pem")
	mustEnv(t, os.Environ(), "openssl", "x509", "-req", "-in", ca+".csr", "-CA", ca+".pem", "-CAkey", ca+".key", "-CAcreateserial",
		"-days", "20", "-extfile", ca+".ext", "-out", ca+".crt")
	mustEnv(t, os.Environ(), "sh", "-c", "cat "+ca+".crt "+ca+".pem >"+ca+".chain")
	g.must(t, "signwarden", "key", "cert", name, "--import", ca+".chain")
}
