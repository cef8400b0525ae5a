package softhsm_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// copies makes n packages out of one, in a directory of their own.
func copies(t testing.TB, n int) (dir string, files []string) {
	t.Helper()
	b, err := os.ReadFile(buildRPMs(t, 1)[0])
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	for i := range n {
		f := filepath.Join(dir, fmt.Sprintf("p%d.rpm", i))
		if err := os.WriteFile(f, b, 0o640); err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	return dir, files
}

// allOK fails the test unless rpmkeys finds every package signed.
func allOK(t testing.TB, db string, files []string) {
	t.Helper()
	out := mustEnv(t, os.Environ(), "rpmkeys", append([]string{"--dbpath", db, "-K"}, files...)...)
	if got := strings.Count(out, "digests signatures OK"); got != len(files) {
		t.Errorf("rpmkeys finds %d of %d packages signed", got, len(files))
	}
}

// Our own signatures of packages, by rpm's verifier: in place, of real packages
// with every compressor, and signed again by rpmsign and again by us.
func TestSignRPM(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rsa", "rsa4096")
	g.key(t, "ed", "ed25519")
	dbRSA, dbEd := g.rpmdb(t, "rsa"), g.rpmdb(t, "ed")
	files := append(buildRPMs(t, 2), distributionRPMs(t)...)
	g.must(t, "signwarden", append([]string{"sign", "rpm", "--key", "rsa"}, files...)...)
	allOK(t, dbRSA, files)
	e := g.audit(t, 1)[0].Entry
	if e["format"] != "rpm" || !strings.HasSuffix(e["claim_file"], ".rpm") || e["claim_nevra"] == "" {
		t.Errorf("audit entry %v", e)
	}
	g.must(t, "signwarden", append([]string{"sign", "rpm", "--key", "ed"}, files...)...)
	allOK(t, dbEd, files)
	g.must(t, "signwarden", append([]string{"verify", "rpm", "--key", "ed"}, files...)...)
	if r := g.try(t, "signwarden", "verify", "rpm", "--key", "rsa", files[0]); r.code != 3 {
		t.Errorf("verified with another key: exit code %d, want 3: %s", r.code, r.stderr)
	}
	if out := runEnv(t, os.Environ(), "rpmkeys", "--dbpath", dbRSA, "-K", files[0]); out.code == 0 {
		t.Errorf("the old signature stays: %s", out.stdout)
	}
	g.must(t, "signwarden", append([]string{"exec", "--", "rpmsign", "--define", "_gpg_name rsa@example.org", "--resign"}, files...)...)
	allOK(t, dbRSA, files)
	g.must(t, "signwarden", append([]string{"sign", "rpm", "--key", "ed", "--rpmv3"}, files...)...)
	allOK(t, dbEd, files)
	mustEnv(t, os.Environ(), "rpmsign", append([]string{"--delsign"}, files...)...)
	if out := mustEnv(t, os.Environ(), "rpmkeys", "--dbpath", dbEd, "-K", files[0]); strings.Contains(out, "signatures") {
		t.Errorf("after rpmsign --delsign: %s", out)
	}
}

// What a run is told to sign, and what it tells.
func TestBulkRun(t *testing.T) {
	g := newGateway(t)
	g.key(t, "ed", "ed25519")
	dir, files := copies(t, 20)
	db := g.rpmdb(t, "ed")
	writeFile(t, filepath.Join(dir, "README"), "not a package")

	t.Run("directory", func(t *testing.T) {
		g.must(t, "signwarden", "sign", "rpm", "--key", "ed", "-r", dir)
		allOK(t, db, files)
	})
	t.Run("mode is kept", func(t *testing.T) {
		if info, err := os.Stat(files[0]); err != nil || info.Mode().Perm() != 0o640 {
			t.Errorf("mode %v, %v; want 0640", info.Mode(), err)
		}
	})
	t.Run("list on stdin, JSON lines, some broken", func(t *testing.T) {
		broken := filepath.Join(dir, "broken.rpm")
		b, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)-1] ^= 1 // the payload is not what its digest says
		if err := os.WriteFile(broken, b, 0o644); err != nil {
			t.Fatal(err)
		}
		signed := len(g.audit(t, 1000))
		cmd := exec.Command(filepath.Join(bin, "signwarden"), "sign", "rpm", "--key", "ed", "-o", "jsonl", "--files0-from", "-")
		cmd.Env = g.env
		cmd.Stdin = strings.NewReader(strings.Join(append(append([]string(nil), files...), broken, dir+"/none.rpm"), "\x00"))
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != 6 {
			t.Errorf("exit code %d, want 6\n%s", code, stderr.String())
		}
		status := map[string]int{}
		for line := range strings.Lines(stdout.String()) {
			var o struct{ File, Status, Error string }
			if err := json.Unmarshal([]byte(line), &o); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			status[o.Status]++
			if o.File == broken && !strings.Contains(o.Error, "digest") {
				t.Errorf("the broken package: %q", o.Error)
			}
		}
		if status["signed"] != len(files) || status["failed"] != 2 {
			t.Errorf("got %v, want %d signed and 2 failed", status, len(files))
		}
		if got := len(g.audit(t, 1000)) - signed; got != len(files) {
			t.Errorf("%d audit rows, want %d: a broken package is not sent", got, len(files))
		}
		if now, err := os.ReadFile(broken); err != nil || !bytes.Equal(now, b) {
			t.Errorf("the broken package was changed (%v)", err)
		}
	})
	t.Run("output directory", func(t *testing.T) {
		out := t.TempDir()
		before, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		g.must(t, "signwarden", append([]string{"sign", "rpm", "--key", "ed", "--output-dir", out}, files...)...)
		var there []string
		for _, f := range files {
			there = append(there, filepath.Join(out, filepath.Base(f)))
		}
		allOK(t, db, there)
		if after, err := os.ReadFile(files[0]); err != nil || !bytes.Equal(after, before) {
			t.Errorf("the original was changed (%v)", err)
		}
		if r := g.try(t, "signwarden", "sign", "rpm", "--key", "ed", "--output-dir", out, files[0]); r.code != 1 || !strings.Contains(r.stderr, "--force") {
			t.Errorf("over an existing file: exit code %d: %s", r.code, r.stderr)
		}
	})
	t.Run("links", func(t *testing.T) {
		link, hard := filepath.Join(dir, "link.rpm"), filepath.Join(dir, "hard.rpm")
		if err := os.Symlink(files[1], link); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(files[2], hard); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{link, hard} {
			if r := g.try(t, "signwarden", "sign", "rpm", "--key", "ed", f); r.code != 1 || !strings.Contains(r.stderr, "--follow-symlinks or --hard-links") {
				t.Errorf("%s: exit code %d: %s", f, r.code, r.stderr)
			}
		}
	})
	t.Run("usage", func(t *testing.T) {
		for _, args := range [][]string{{}, {dir}, {"--window", "0", files[0]}, {"--output", "x", files[0], files[1]}} {
			if r := g.try(t, "signwarden", append([]string{"sign", "rpm", "--key", "ed"}, args...)...); r.code != 2 {
				t.Errorf("%q: exit code %d, want 2: %s", args, r.code, r.stderr)
			}
		}
	})
}

// A client that is killed at any moment, and interrupted, is taken up again with
// its journal: then every package is signed and none was lost.
func TestBulkResume(t *testing.T) {
	g := newGateway(t)
	g.key(t, "ed", "ed25519")
	dir, files := copies(t, 300)
	db, journal := g.rpmdb(t, "ed"), filepath.Join(t.TempDir(), "journal")
	args := []string{"sign", "rpm", "--key", "ed", "--resume", journal, "-r", dir}
	noted := func() int {
		b, _ := os.ReadFile(journal) // none: nothing is noted yet
		return bytes.Count(b, []byte("\n"))
	}
	for _, sig := range []os.Signal{unix.SIGKILL, unix.SIGINT, unix.SIGKILL, unix.SIGTERM, unix.SIGKILL} {
		before := noted()
		if before >= len(files) {
			break // the last one was too late for its signal
		}
		cmd := exec.Command(filepath.Join(bin, "signwarden"), args...)
		cmd.Env = g.env
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "some more are signed", func() bool { return noted() >= min(before+20, len(files)) })
		_ = cmd.Process.Signal(sig)
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); sig != unix.SIGKILL && code != 6 && code != 0 {
			t.Errorf("after %v: exit code %d, want 6", sig, code)
		}
	}
	r := g.try(t, "signwarden", args...)
	if r.code != 0 || !strings.Contains(r.stderr, "skipped") {
		t.Fatalf("taken up again: exit code %d: %s", r.code, r.stderr)
	}
	allOK(t, db, files)
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %q, %v", left, err)
	}
	rows := len(g.audit(t, 1000))
	g.must(t, "signwarden", args...)
	if now := len(g.audit(t, 1000)); now != rows {
		t.Errorf("a run with nothing to do asked for %d signatures", now-rows)
	}
}
