package softhsm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/agentproto/assuan"
)

// signOnce asks for one signature with the only key that an agent shows.
func signOnce(t testing.TB, c *assuan.Client) uint32 {
	t.Helper()
	grips := keygrips(t, c)
	if len(grips) != 1 {
		t.Fatalf("the socket shows %d keys, want 1", len(grips))
	}
	_, code := transact(t, c, "RESET", "SIGKEY "+grips[0], "SETHASH 8 "+strings.Repeat("00", 32), "PKSIGN")
	return code
}

// The sockets of one signwarden agent have each its own keys, time and number of
// signatures; where one is at its end the others go on, and it says which it is.
func TestAgentSockets(t *testing.T) {
	g := newGateway(t)
	for _, name := range []string{"rel", "nightly-1", "nightly-2"} {
		g.key(t, name, "ed25519")
	}
	dir := shortDir(t)
	writeFile(t, dir+"/agent.yaml", `sockets:
  - {gpg_socket: all}
  - {gpg_socket: rel, keys: [rel], signatures: 2}
  - {gpg_socket: over, keys: ["*-1"], lifetime: 1ns}
  - {gpg_socket: time, keys: ["nightly-2"], lifetime: 1h}
`)
	agent := background(t, g.env, "signwarden", "agent", "--config", dir+"/agent.yaml")
	for _, line := range []string{"socket " + dir + "/all\n", "rel, keys rel, 2 signatures\n", "over, keys *-1, until 2", "time, keys nightly-2, until 2"} {
		agent.await(t, line)
	}
	if n := len(keygrips(t, dialAgent(t, dir+"/all"))); n != 3 {
		t.Errorf("the socket without a list shows %d keys, want 3", n)
	}
	rel := dialAgent(t, dir+"/rel")
	for i, want := range []uint32{0, 0, 67108897} {
		if code := signOnce(t, rel); code != want {
			t.Errorf("signature %d: error %d, want %d", i+1, code, want)
		}
	}
	if code := signOnce(t, dialAgent(t, dir+"/rel")); code != 67108897 {
		t.Errorf("on another connection: error %d, want 67108897", code)
	}
	if code := signOnce(t, dialAgent(t, dir+"/over")); code != 67109101 {
		t.Errorf("past its time: error %d, want 67109101", code)
	}
	if code := signOnce(t, dialAgent(t, dir+"/time")); code != 0 {
		t.Errorf("within its time: error %d", code)
	}
	agent.await(t, "the signatures of this socket are spent")
	agent.await(t, "the time of this socket is over")
	if n := len(signedRows(g.audit(t, 100))); n != 3 {
		t.Errorf("the audit log has %d signatures, want 3", n)
	}
}

func signedRows(all []entry) (signed []entry) {
	for _, e := range all {
		if e.Entry["outcome"] == "signed" {
			signed = append(signed, e)
		}
	}
	return signed
}

// The gateway's own sockets have the same bounds, by uid or by gid; a reload that
// leaves an entry as it is does not renew them, and one that changes it does.
func TestLocalAgentBounds(t *testing.T) {
	g := initGateway(t, shortDir(t)+"/gw")
	dir := shortDir(t)
	mustEnv(t, os.Environ(), "chmod", "755", dir)
	yaml, err := os.ReadFile(g.dir + "/signwardend.yaml")
	if err != nil {
		t.Fatal(err)
	}
	configure := func(signatures int, more string) {
		t.Helper()
		writeFile(t, g.dir+"/signwardend.yaml", fmt.Sprintf(`%sagents:
  - {gpg_socket: %[2]s/job/s, principal: job, gids: [%[3]d], uids: [0], keys: [rel], signatures: %[4]d}
  - {gpg_socket: %[2]s/over/s, principal: job, uids: [0], keys: [rel], lifetime: 1ns, trusted_roots: [tls/ca.crt]}
%[5]s`, yaml, dir, nobody, signatures, more))
	}
	configure(2, "")
	g.serve(t)
	for _, name := range []string{"rel", "other"} {
		g.key(t, name, "ed25519")
	}
	g.policy(t, `  - {name: job, principals: [job], keys: ["*"], may: [sign], formats: [openpgp], blind: true}
`)
	sign := func() uint32 { t.Helper(); return signOnce(t, dialAgent(t, dir+"/job/s")) }
	if code := sign(); code != 0 {
		t.Errorf("error %d", code)
	}
	if code := signOnce(t, dialAgent(t, dir+"/over/s")); code != 67109101 {
		t.Errorf("past its time: error %d, want 67109101", code)
	}
	// One socket tells gpgsm to trust a root, and the other does not.
	fpr := strings.TrimSpace(mustEnv(t, os.Environ(), "openssl", "x509", "-in", g.dir+"/tls/ca.crt", "-noout", "-fingerprint", "-sha1"))
	_, fpr, _ = strings.Cut(fpr, "=")
	for path, want := range map[string]uint32{dir + "/over/s": 0, dir + "/job/s": 67108962} {
		if _, code := transact(t, dialAgent(t, path), "ISTRUSTED "+strings.ReplaceAll(fpr, ":", "")); code != want {
			t.Errorf("%s: ISTRUSTED: error %d, want %d", path, code, want)
		}
	}
	if out := g.must(t, "signwardend", "check", "--dir", g.dir); !strings.Contains(out, dir+"/over/s for job, 1 trusted roots") {
		t.Errorf("check does not tell of the socket:\n%s", out)
	}

	// The entry stays as it is; so does what it has spent.
	reload := func(signatures int) {
		t.Helper()
		mark := fmt.Sprintf("%s/%d/s", dir, signatures+len(g.audit(t, 1000)))
		configure(signatures, "  - {gpg_socket: "+mark+", principal: job, uids: [0]}\n")
		if err := g.cmd.Process.Signal(unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the reload", func() bool { _, err := os.Stat(mark); return err == nil })
	}
	reload(2)
	if code := sign(); code != 0 {
		t.Errorf("the second of two: error %d", code)
	}
	if code := sign(); code != 67108897 {
		t.Errorf("the third of two: error %d, want 67108897", code)
	}
	reload(5)
	if code := sign(); code != 0 {
		t.Errorf("of a new budget: error %d", code)
	}

	// The group may connect, and a user outside it may not.
	as := func(uid, gid uint32) string {
		t.Helper()
		cmd := g.command("gpg-connect-agent", "--no-autostart", "-S", dir+"/job/s", "HAVEKEY --list", "/bye")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	if out := as(12345, nobody); !strings.Contains(out, "OK") {
		t.Errorf("a member of the group is not answered: %s", out)
	}
	if out := as(12345, 12345); strings.Contains(out, "OK") {
		t.Errorf("a stranger is answered: %s", out)
	}
	if !strings.Contains(g.stderr.String(), filepath.Join(dir, "job/s")) {
		t.Error("the log does not name the socket")
	}
}
