package softhsm_test

import (
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// Each way in which the server cannot start: an exit code, words that name the
// culprit and say what to do.
func TestServeErrors(t *testing.T) {
	made := initGateway(t, shortDir(t)+"/gw")
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, dir string)
		want  []string
	}{
		{"no directory", func(t *testing.T, dir string) { os.RemoveAll(dir) }, []string{"signwardend.yaml", "signwardend init"}},
		{"unknown field", func(t *testing.T, dir string) { edit(t, dir, "listen:", "lisen:") }, []string{"signwardend.yaml", `unknown field "lisen"`}},
		{"missing certificate", func(t *testing.T, dir string) { os.Remove(dir + "/tls/server.crt") }, []string{"tls/server.crt", "does not serve without TLS"}},
		{"unreadable key", func(t *testing.T, dir string) { writeFile(t, dir+"/tls/server.key", "junk") }, []string{"tls/server.key"}},
		{"missing CA", func(t *testing.T, dir string) { os.Remove(dir + "/tls/ca.crt") }, []string{"tls/ca.crt"}},
		{"missing module", func(t *testing.T, dir string) { edit(t, dir, "libsofthsm2.so", "libnone.so") }, []string{"libnone.so", "install"}},
		{"no module", func(t *testing.T, dir string) { edit(t, dir, "module: ", "module: /etc/hostname #") }, []string{"/etc/hostname"}},
		{"another machine", func(t *testing.T, dir string) {
			b := readFile(t, softhsmModule(t))
			b[18], b[19] = 0xf3, 0 // e_machine: RISC-V
			writeFile(t, dir+"/other.so", string(b))
			edit(t, dir, "module: ", "module: "+dir+"/other.so #")
		}, []string{"other.so", "another machine", "EM_RISCV"}},
		{"not initialised", func(t *testing.T, dir string) {
			mustEnv(t, os.Environ(), "sh", "-c", "rm -r "+dir+"/token/tokens/*")
		}, []string{"signwarden-dev", "no initialised token"}},
		{"token directory", func(t *testing.T, dir string) { os.RemoveAll(dir + "/token/tokens") }, []string{"directories.tokendir", "token/tokens"}},
		{"SoftHSM's configuration", func(t *testing.T, dir string) { os.Remove(dir + "/token/softhsm2.conf") }, []string{"softhsm2.conf", "SOFTHSM2_CONF", "no such file"}},
		{"profile", func(t *testing.T, dir string) { edit(t, dir, "token:\n", "token:\n  profile: nosuch\n") }, []string{"nosuch", "softhsm, cloudhsm"}},
		{"token label", func(t *testing.T, dir string) { edit(t, dir, "signwarden-dev", "nothere") }, []string{"nothere", "signwarden-dev"}},
		{"open PIN file", func(t *testing.T, dir string) { os.Chmod(dir+"/token/user.pin", 0o644) }, []string{"user.pin", "chmod"}},
		{"no PIN file", func(t *testing.T, dir string) { os.Remove(dir + "/token/user.pin") }, []string{"user.pin"}},
		{"corrupt store", func(t *testing.T, dir string) { writeFile(t, dir+"/signwarden.db", strings.Repeat("junk", 4096)) }, []string{"signwarden.db"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := copyGateway(t, made.dir)
			tt.spoil(t, dir)
			r := made.try(t, "signwardend", "serve", "--dir", dir)
			if r.code == 0 {
				t.Fatal("it serves")
			}
			for _, w := range tt.want {
				if !strings.Contains(r.stderr, w) {
					t.Errorf("does not say %q", w)
				}
			}
			if c := made.try(t, "signwardend", "check", "--dir", dir); c.code == 0 || (tt.name != "no directory" && tt.name != "unknown field" && !strings.Contains(c.stdout, "FAIL")) {
				t.Errorf("check: exit code %d\n%s", c.code, c.stdout)
			}
			if t.Failed() {
				t.Logf("exit code %d: %s%s", r.code, r.stdout, r.stderr)
			}
		})
	}
	if r := made.try(t, "signwardend", "check", "--dir", made.dir); r.code != 0 || strings.Contains(r.stdout, "FAIL") {
		t.Errorf("check of a good one: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if r := made.try(t, "signwardend", "init", "--dir", made.dir, "--dev"); r.code == 0 || !strings.Contains(r.stderr, "nothing was changed") {
		t.Errorf("init over an existing one: exit code %d: %s", r.code, r.stderr)
	}
}

func edit(t testing.TB, dir, old, new string) {
	t.Helper()
	path := dir + "/signwardend.yaml"
	b, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(b), old) {
		t.Fatalf("%s has no %q (%v)", path, old, err)
	}
	writeFile(t, path, strings.Replace(string(b), old, new, 1))
}

// copyGateway copies a gateway's directory, whose token names its own path.
func copyGateway(t testing.TB, dir string) string {
	t.Helper()
	to := shortDir(t) + "/gw"
	mustEnv(t, os.Environ(), "cp", "-a", dir, to)
	conf := to + "/token/softhsm2.conf"
	b, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, conf, strings.ReplaceAll(string(b), dir, to))
	return to
}

// A wrong PIN is tried once, and the token is not locked: with the right one the
// gateway serves, after many starts with the wrong one between which an operator
// would have acted.
func TestWrongPIN(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	pin := g.dir + "/token/user.pin"
	right, err := os.ReadFile(pin)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(pin, []byte("wrong-pin\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := g.try(t, "signwardend", "serve", "--dir", g.dir)
	if r.code == 0 || !strings.Contains(r.stderr, "PIN") || !strings.Contains(r.stderr, "once") || strings.Contains(r.stderr, "wrong-pin") {
		t.Errorf("exit code %d: %s; want words about the PIN, without it", r.code, r.stderr)
	}
	if err := os.WriteFile(pin, right, 0o600); err != nil {
		t.Fatal(err)
	}
	g.serve(t)
	g.key(t, "rel", "ed25519")
}

// kill -9 during load, several times: every signature that a client received is
// in the audit log after the restart, and nothing needs repair.
func TestKilled(t *testing.T) {
	g := newGateway(t)
	g.must(t, "signwarden", "key", "create", "rel", "--algorithm", "ed25519")
	received := map[string]bool{} // SHA-256 of signatures, in hexadecimal
	for round := range 5 {
		c := g.client(t, "admin")
		var mu sync.Mutex
		var wg sync.WaitGroup
		enough := make(chan struct{})
		got := 0
		for worker := range 32 {
			wg.Go(func() {
				for i := 0; ; i++ {
					sum := sha256.Sum256(fmt.Appendf(nil, "%d %d %d", round, worker, i))
					sig, err := c.Sign(t.Context(), client.Request{Key: "rel", Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp"})
					if err != nil {
						return
					}
					h := sha256.Sum256(sig.Bytes)
					mu.Lock()
					received[hex.EncodeToString(h[:])] = true
					if got++; got == 200+150*round {
						close(enough)
					}
					mu.Unlock()
				}
			})
		}
		<-enough
		g.stop(unix.SIGKILL)
		c.Close()
		wg.Wait()
		g.serve(t)
	}
	if r := g.try(t, "signwardend", "check", "--dir", g.dir); r.code != 0 {
		t.Errorf("check beside the restarted gateway: %s", r.stdout)
	}
	recorded := map[string]bool{}
	c := g.client(t, "admin")
	for from := int64(0); ; {
		first, entries, err := c.AuditEntries(t.Context(), from, 1000)
		if err != nil || first != from {
			t.Fatalf("rows from %d, want %d: %v", first, from, err)
		}
		for _, e := range entries {
			if _, after, ok := strings.Cut(string(e), `"signature":"`); ok {
				recorded[after[:64]] = true
			}
		}
		if len(entries) == 0 {
			break
		}
		from += int64(len(entries))
	}
	missing := 0
	for s := range received {
		if !recorded[s] {
			missing++
		}
	}
	t.Logf("%d signatures received over 5 kills, %d recorded", len(received), len(recorded))
	if missing > 0 || len(received) < 1000 {
		t.Errorf("%d of %d received signatures are not in the audit log", missing, len(received))
	}
}

// A full disk: nothing is released, and when there is room again the same
// process goes on.
func TestFullDisk(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	disk := shortDir(t)
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatalf("mounting a tmpfs (this test wants root): %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	mustEnv(t, os.Environ(), "sh", "-c", fmt.Sprintf("cp %s/signwarden.db* %s/", g.dir, disk))
	edit(t, g.dir, "sqlite: signwarden.db", "sqlite: "+disk+"/signwarden.db")
	g.serve(t)
	g.must(t, "signwarden", "key", "create", "rel", "--algorithm", "ed25519")
	c := g.client(t, "admin")
	sign := func(i int) error {
		sum := sha256.Sum256(fmt.Appendf(nil, "%d", i))
		_, err := c.Sign(t.Context(), client.Request{Key: "rel", Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp",
			Claim: client.Claim{Note: strings.Repeat("x", 1000)}})
		return err
	}
	released := 0
	var err error
	for ; released < 20000; released++ {
		if err = sign(released); err != nil {
			break
		}
	}
	if !errors.Is(err, sigerr.Unavailable) || !strings.Contains(err.Error(), "releases nothing") {
		t.Fatalf("after %d signatures on a disk of 1 MiB: %v; want Unavailable", released, err)
	}
	if err := unix.Mount("tmpfs", disk, "tmpfs", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it signs again", func() bool { return sign(1_000_000) == nil })
	rows := 0
	for from := int64(0); ; {
		first, entries, err := c.AuditEntries(t.Context(), from, 1000)
		if err != nil || first != from {
			t.Fatalf("rows from %d, want %d: %v", first, from, err)
		}
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			if strings.Contains(string(e), `"outcome":"signed"`) {
				rows++
			}
		}
		from += int64(len(entries))
	}
	t.Logf("%d signatures released before the disk was full", released)
	if rows < released+1 {
		t.Errorf("%d signatures in the audit log, %d were released", rows, released+1)
	}
}

// SIGTERM under load drains: what is in flight is answered, and clients go on
// with the next process without an error.
func TestRestartUnderLoad(t *testing.T) {
	g := newGateway(t)
	g.must(t, "signwarden", "key", "create", "rel", "--algorithm", "p256")
	c := g.client(t, "admin")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				sum := sha256.Sum256(fmt.Appendf(nil, "%d %d", worker, i))
				if _, err := c.Sign(t.Context(), client.Request{Key: "rel", Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp"}); err != nil {
					t.Errorf("worker %d: %v", worker, err)
					return
				}
			}
		})
	}
	for range 2 {
		g.stop(unix.SIGTERM)
		if code := g.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("after SIGTERM: exit code %d\n%s", code, g.stderr)
		}
		g.serve(t)
	}
	close(stop)
	wg.Wait()
}

// Sockets that the gateway itself serves: for the users listed, by the kernel's
// word; brought up and taken down by SIGHUP while a stream is open.
func TestLocalAgents(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	g.key(t, "other", "ed25519")
	g.policy(t, `  - {name: local, principals: [local-builds], keys: [rel], may: [sign], formats: [openpgp], blind: true}
`)
	home := shortDir(t)
	socket := filepath.Join(home, "run", "S.gpg-agent")
	yaml, err := os.ReadFile(g.dir + "/signwardend.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c := g.client(t, "admin")
	sum := sha256.Sum256([]byte("x"))
	sign := func() {
		t.Helper()
		if _, err := c.Sign(t.Context(), client.Request{Key: "rel", Digest: sum[:], Hash: crypto.SHA256, Format: "openpgp"}); err != nil {
			t.Errorf("on the open stream: %v", err)
		}
	}
	sign()
	reload := func(agents string, up bool) {
		t.Helper()
		writeFile(t, g.dir+"/signwardend.yaml", string(yaml)+agents)
		if err := g.cmd.Process.Signal(unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
		waitFor(t, fmt.Sprintf("the socket is there: %v", up), func() bool { _, err := os.Stat(socket); return (err == nil) == up })
		sign()
	}
	reload(fmt.Sprintf("agents:\n  - {gpg_socket: %s, principal: local-builds, uids: [%d]}\n", socket, nobody), true)

	// A user without privileges signs through it, in a home of its own.
	user := filepath.Join(home, "user")
	if err := os.Mkdir(user, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, user+"/gpg.conf", "no-autostart\n")
	// libassuan follows such a file to the real socket.
	writeFile(t, user+"/S.gpg-agent", "%Assuan%\nsocket="+socket+"\n")
	writeFile(t, user+"/rel.asc", g.must(t, "signwarden", "key", "export", "rel")+g.must(t, "signwarden", "key", "export", "other"))
	writeFile(t, user+"/file", "text")
	mustEnv(t, os.Environ(), "chown", "-R", fmt.Sprint(nobody), user)
	if err := os.Chmod(home, 0o755); err != nil {
		t.Fatal(err)
	}
	as := func(uid uint32, args ...string) (string, error) {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env, cmd.Dir = append(os.Environ(), "GNUPGHOME="+user, "HOME="+user), "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, args := range [][]string{
		{"gpg", "--batch", "--import", user + "/rel.asc"},
		{"gpg", "--batch", "-u", "rel@example.org", "--detach-sign", user + "/file"},
		{"gpg", "--batch", "--verify", user + "/file.sig", user + "/file"},
	} {
		if out, err := as(nobody, args...); err != nil {
			t.Fatalf("%q as nobody: %v\n%s", args, err, out)
		}
	}
	e := g.audit(t, 1)[0].Entry
	if e["principal"] != "local-builds" || e["via"] != fmt.Sprintf("unix:%d", nobody) || e["front_end"] != "gpg-agent" || e["outcome"] != "signed" {
		t.Errorf("audit entry %v", e)
	}
	// The key of somebody else is not there, and another user is cut off.
	if out, err := as(nobody, "gpg", "--batch", "--yes", "-u", "other@example.org", "--detach-sign", user+"/file"); err == nil || !strings.Contains(out, "No secret key") {
		t.Errorf("with another's key: %v\n%s", err, out)
	}
	if out, err := as(12345, "gpg-connect-agent", "--no-autostart", "-S", socket, "HAVEKEY --list", "/bye"); err == nil && strings.Contains(out, "OK") {
		t.Errorf("uid 12345 is answered:\n%s", out)
	}
	reload("", false)
}

// The token is an ordinary one: pkcs11-tool finds our keys by label and id and
// signs with them.
func TestTokenSeenByOthers(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "rsa2048")
	show := g.must(t, "signwarden", "key", "show", "rel", "-o", "json")
	_, after, _ := strings.Cut(show, `"token_id": "`)
	id := after[:32]
	list := g.pkcs11(t, "--list-objects", "--type", "privkey")
	for _, want := range []string{"label:      rel\n", "label:      rel/certify\n", id, "sensitive, always sensitive, never extractable, local", "Usage:      sign\n"} {
		if !strings.Contains(list, want) {
			t.Errorf("pkcs11-tool does not list %q:\n%s", want, list)
		}
	}
	dir := t.TempDir()
	writeFile(t, dir+"/data", "to be signed")
	g.pkcs11(t, "--sign", "--mechanism", "SHA256-RSA-PKCS", "--id", id, "--input-file", dir+"/data", "--output-file", dir+"/sig")
	writeFile(t, dir+"/pub.pem", g.must(t, "signwarden", "key", "export", "rel", "--format", "spki"))
	if out := mustEnv(t, os.Environ(), "openssl", "dgst", "-sha256", "-verify", dir+"/pub.pem", "-signature", dir+"/sig", dir+"/data"); !strings.Contains(out, "Verified OK") {
		t.Errorf("openssl: %s", out)
	}
}

// ping --wait waits for a gateway that starts later.
func TestPingWaits(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	if r := g.try(t, "signwarden", "ping"); r.code != 5 || !strings.Contains(r.stderr, "hint: ") {
		t.Errorf("with no gateway: exit code %d: %s", r.code, r.stderr)
	}
	done := make(chan result, 1)
	go func() { done <- g.try(t, "signwarden", "ping", "--wait", "60s") }()
	select {
	case r := <-done:
		t.Fatalf("it did not wait: %+v", r)
	case <-time.After(300 * time.Millisecond):
	}
	g.start(t)
	if r := <-done; r.code != 0 {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
}
