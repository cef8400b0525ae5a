//go:build chaos

package softhsm_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/formats/rpm"
)

// chaosRun is a bulk run over packages that is killed on its way, many times over,
// and taken up again with its journal.
type chaosRun struct {
	g       *gateway
	db      string
	dir     string
	files   []string
	plain   [][]byte // the files before they were signed
	journal string
	args    []string
	said    bytes.Buffer // by the last run that was started, on stderr
}

func newChaosRun(t *testing.T, n int) *chaosRun {
	g := newGateway(t)
	g.key(t, "rel", "rsa2048")
	c := &chaosRun{g: g, db: g.rpmdb(t, "rel"), journal: filepath.Join(t.TempDir(), "journal")}
	c.files = buildRPMs(t, n)
	c.dir = filepath.Dir(c.files[0])
	for _, f := range c.files {
		c.plain = append(c.plain, readFile(t, f))
	}
	c.args = []string{"sign", "rpm", "--key", "rel", "--resume", c.journal, "-r", c.dir}
	return c
}

// fresh makes the packages unsigned again.
func (c *chaosRun) fresh(t *testing.T) {
	t.Helper()
	_ = os.Remove(c.journal)
	for i, f := range c.files {
		if err := os.WriteFile(f, c.plain[i], 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func (c *chaosRun) start(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(filepath.Join(bin, "signwarden"), c.args...)
	cmd.Env = c.g.env
	c.said.Reset()
	cmd.Stderr = &c.said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// finish takes the run up until it is done, and checks what it leaves: every
// package signed and valid, nothing else, and its signature in the audit log.
func (c *chaosRun) finish(t *testing.T) {
	t.Helper()
	r := result{code: -1}
	for range 5 { // a gateway that has just been killed is not back at once
		if r = c.g.try(t, "signwarden", c.args...); r.code == 0 {
			break
		}
	}
	if r.code != 0 {
		t.Fatalf("taken up again: exit code %d: %s", r.code, r.stderr)
	}
	allOK(t, c.db, c.files)
	left, err := filepath.Glob(filepath.Join(c.dir, ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %q, %v", left, err)
	}
	signatures, requests := c.recorded(t)
	for _, f := range c.files {
		// More than one record: the same package, killed before it was written and
		// signed again in the same second, has the same signature.
		if signatures[signatureSum(t, f)] < 1 {
			t.Errorf("the signature of %s is not in the audit log", filepath.Base(f))
		}
	}
	for id, n := range requests {
		if n != 1 {
			t.Errorf("request %s has %d records", id, n)
		}
	}
}

// recorded counts the records of each signature and of each request.
func (c *chaosRun) recorded(t *testing.T) (signatures, requests map[string]int) {
	t.Helper()
	cl := c.g.client(t, "admin")
	defer cl.Close()
	signatures, requests = map[string]int{}, map[string]int{}
	for from := int64(0); ; {
		first, entries, err := cl.AuditEntries(t.Context(), from, 1000)
		if err != nil || first != from {
			t.Fatalf("rows from %d, want %d: %v", first, from, err)
		}
		for _, b := range entries {
			var e map[string]string
			if err := json.Unmarshal(b, &e); err != nil {
				t.Fatal(err)
			}
			if e["action"] == "sign" {
				signatures[e["signature"]]++
				requests[e["request"]]++
			}
		}
		if len(entries) == 0 {
			return signatures, requests
		}
		from += int64(len(entries))
	}
}

// signatureSum is the SHA-256, in hexadecimal, of the RSA signature in a package,
// as the audit log names it.
func signatureSum(t *testing.T, path string) string {
	t.Helper()
	b := readFile(t, path)
	p, err := rpm.ReadPackage(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	sigs, err := p.Signatures()
	if err != nil || len(sigs) != 1 {
		t.Fatalf("%s: %d signatures, %v", path, len(sigs), err)
	}
	pkt, err := packet.Read(bytes.NewReader(sigs[0].Packet))
	if err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, 256)
	mpi := pkt.(*packet.Signature).RSASignature.Bytes()
	copy(raw[len(raw)-len(mpi):], mpi)
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}

// kill -9 of the client at random moments, 50 times.
func TestChaosClientKilled(t *testing.T) {
	c := newChaosRun(t, 100)
	began := time.Now()
	c.g.must(t, "signwarden", c.args...)
	whole := time.Since(began)
	c.finish(t)
	killed := 0
	for killed < 50 {
		c.fresh(t)
		for range 5 { // more than once in one run, too
			cmd := c.start(t)
			kill := time.AfterFunc(time.Duration(rand.Int64N(int64(whole))), func() { _ = cmd.Process.Kill() })
			_ = cmd.Wait()
			kill.Stop()
			if cmd.ProcessState.ExitCode() == 0 {
				break
			}
			killed++
		}
		c.finish(t)
	}
	t.Logf("killed %d times; an undisturbed run takes %v", killed, whole.Round(time.Millisecond))
}

// kill -9 of the gateway at random moments of bulk runs, 20 times.
func TestChaosGatewayKilled(t *testing.T) {
	c := newChaosRun(t, 400)
	began := time.Now()
	c.g.must(t, "signwarden", c.args...)
	whole := time.Since(began)
	killed := 0
	for killed < 20 {
		c.fresh(t)
		cmd := c.start(t)
		ended := make(chan struct{})
		go func() { _ = cmd.Wait(); close(ended) }()
		for range 3 {
			select {
			case <-ended:
			case <-time.After(time.Duration(rand.Int64N(int64(whole)))):
			}
			c.g.stop(unix.SIGKILL)
			c.g.serve(t)
			killed++
		}
		<-ended
		if code := cmd.ProcessState.ExitCode(); code != 0 && code != 6 {
			t.Errorf("the run ended with exit code %d, want 0 or 6: %s", code, &c.said)
		}
		c.finish(t)
	}
	t.Logf("killed %d times; an undisturbed run takes %v", killed, whole.Round(time.Millisecond))
}
