package softhsm_test

import (
	"context"
	"crypto/sha512"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hundredRPMs are copies of 100 small packages, which are built once for all tests.
func hundredRPMs(t testing.TB) []string {
	t.Helper()
	builtOnce.Do(func() {
		dir := filepath.Join(bin, "rpms")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		mustEnv(t, os.Environ(), "cp", append(buildRPMs(t, 100), dir)...)
		built, _ = filepath.Glob(dir + "/*.rpm")
	})
	if len(built) != 100 {
		t.Fatalf("%d packages were built", len(built))
	}
	dir := t.TempDir()
	mustEnv(t, os.Environ(), "cp", append(slices.Clone(built), dir)...)
	files, err := filepath.Glob(dir + "/*.rpm")
	if err != nil || len(files) != len(built) {
		t.Fatalf("%d packages, %v", len(files), err)
	}
	return files
}

var (
	builtOnce sync.Once
	built     []string
)

// signedRPMs counts those that rpm finds signed.
func signedRPMs(t testing.TB, db string, files []string) int {
	t.Helper()
	r := runEnv(t, os.Environ(), "rpmkeys", append([]string{"--dbpath", db, "-K"}, files...)...)
	return strings.Count(r.stdout, "digests signatures OK")
}

// rpmsign is a run of rpmsign in an environment, with the gpg that is there.
func rpmsign(env []string, files ...string) *exec.Cmd {
	cmd := exec.Command("rpmsign", append([]string{"--define", "__gpg /usr/bin/gpg", "--define", "_gpg_name rel@example.org", "--resign"}, files...)...)
	cmd.Env = env
	return cmd
}

// 64 gpg and 8 rpmsign at once, while other clients are killed or hang up in the
// middle of their PKSIGN: not one failure, and every signature verifies.
func TestAgentLoad(t *testing.T) {
	const gpgs, rpmsigns, each = 64, 8, 2
	g := newGateway(t)
	g.key(t, "rel", "rsa2048")
	env, socket := g.home(t, "rel")
	g.agentAt(t, socket)
	db := g.rpmdb(t, "rel")
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	writeFile(t, file, "text")
	end := time.Now().Add(loadFor)
	again := func(i int) bool { return i < each || time.Now().Before(end) }

	var clients, nuisances sync.WaitGroup
	var signed atomic.Int64
	for i := range gpgs {
		clients.Go(func() {
			for n := 0; again(n); n++ {
				out, err := gpgCommand(env, "-o", filepath.Join(dir, fmt.Sprintf("%d-%d.sig", i, n%each)), file).CombinedOutput()
				if err != nil {
					t.Errorf("gpg %d: %v: %s", i, err, out)
					return
				}
				signed.Add(1)
			}
		})
	}
	packages := hundredRPMs(t)
	for i := range rpmsigns {
		own := packages[i*len(packages)/rpmsigns:][:3]
		clients.Go(func() {
			for n := 0; again(n); n++ {
				if out, err := rpmsign(env, own...).CombinedOutput(); err != nil {
					t.Errorf("rpmsign %d: %v: %s", i, err, out)
					return
				}
				signed.Add(int64(len(own)))
			}
			if n := signedRPMs(t, db, own); n != len(own) {
				t.Errorf("rpmsign %d: %d of %d packages are signed", i, n, len(own))
			}
		})
	}
	stop := make(chan struct{})
	grip := keygrips(t, dialAgent(t, socket))[0]
	var begun, killed atomic.Int64
	for i := range 4 {
		nuisances.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if i%2 == 0 {
					begun.Add(int64(hangUpWhileSigning(t, socket, grip)))
				} else {
					killed.Add(int64(killWhileSigning(t, env, dir, file)))
				}
			}
		})
	}
	clients.Wait()
	close(stop)
	nuisances.Wait()

	verify := g.verifier(t, "rel")
	for i := range gpgs {
		for n := range each {
			sig := filepath.Join(dir, fmt.Sprintf("%d-%d.sig", i, n))
			if r := runEnv(t, verify, "gpg", "--batch", "--verify", sig, file); r.code != 0 {
				t.Errorf("%s: %s", sig, r.stderr)
			}
		}
	}
	t.Logf("%d signatures; %d clients hung up and %d were killed in the middle", signed.Load(), begun.Load(), killed.Load())
	if begun.Load() == 0 || killed.Load() == 0 {
		t.Error("no client hung up, or none was killed: the test did not test that")
	}
}

func gpgCommand(env []string, args ...string) *exec.Cmd {
	cmd := exec.Command("gpg", append([]string{"--batch", "--yes", "-u", "rel@example.org", "--detach-sign"}, args...)...)
	cmd.Env = env
	return cmd
}

// hangUpWhileSigning asks for signatures on several connections and waits for none,
// and then for one that it waits for: so it asks for no more than others do.
func hangUpWhileSigning(t *testing.T, socket, grip string) int {
	const conns = 4
	for i := range conns + 1 {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Error(err)
			return i
		}
		fmt.Fprintf(c, "SIGKEY %s\nSETHASH 10 %X\nPKSIGN\nBYE\n", grip, sha512.Sum512([]byte("x")))
		if i == conns {
			reply, err := io.ReadAll(c)
			if err != nil || !strings.Contains(string(reply), "sig-val") {
				t.Errorf("who waits is answered %q, %v", reply, err)
			}
		}
		c.Close()
	}
	return conns
}

// killWhileSigning kills a gpg that has its input and no signature yet.
func killWhileSigning(t *testing.T, env []string, dir, file string) int {
	fifo := filepath.Join(dir, "fifo"+fmt.Sprint(time.Now().UnixNano()))
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Error(err)
		return 0
	}
	defer os.Remove(fifo)
	cmd := gpgCommand(env, "--status-file", fifo, "-o", "-", file)
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return 0
	}
	status, err := os.Open(fifo) // gpg waits for this
	if err != nil {
		t.Error(err)
		return 0
	}
	defer status.Close()
	b, n := make([]byte, 256), 0
	for !strings.Contains(string(b[:n]), "BEGIN_SIGNING") && n < len(b) {
		m, err := status.Read(b[n:])
		if err != nil {
			break
		}
		n += m
	}
	_ = cmd.Process.Kill()
	if cmd.Wait() == nil {
		return 0 // it was faster
	}
	return 1
}

// The gateway is restarted while rpmsign signs 100 packages through signwarden
// agent: the agent finds it again by itself. At most the package in flight fails, with
// words that say so; here the agent waits long enough, so none does.
func TestAgentGatewayRestarted(t *testing.T) {
	for name, sig := range map[string]os.Signal{"drained": unix.SIGTERM, "killed": unix.SIGKILL} {
		t.Run(name, func(t *testing.T) {
			g := newGateway(t)
			g.key(t, "rel", "rsa2048")
			env, socket := g.home(t, "rel")
			g.agentAt(t, socket)
			files := hundredRPMs(t)
			cmd := rpmsign(env, files...)
			out := &output{}
			cmd.Stdout, cmd.Stderr = out, out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			begun := func() int { return strings.Count(out.String(), ".rpm:\n") }
			waitFor(t, "20 packages", func() bool { return begun() >= 20 })
			g.stop(sig)
			g.serve(t)
			err := cmd.Wait()
			failed := len(files) - signedRPMs(t, g.rpmdb(t, "rel"), files)
			if failed > 1 || (err != nil) != (failed > 0) || failed > 0 && !strings.Contains(out.String(), "Not operational") {
				t.Errorf("%d packages failed, %v:\n%s", failed, err, out)
			}
		})
	}
}

// Without a gateway for long, each package in turn is told why, and none is harmed.
func TestAgentGatewayAway(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	env, socket := g.home(t, "rel")
	g.agentAt(t, socket)
	waitFor(t, "the keys", func() bool { return len(keygrips(t, dialAgent(t, socket))) == 1 })
	files := hundredRPMs(t)[:2]
	before, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	g.stop(unix.SIGTERM)
	out, err := rpmsign(env, files...).CombinedOutput()
	if err == nil || strings.Count(string(out), "error: gpg exec failed") != len(files) || !strings.Contains(string(out), "gpg: signing failed: Not operational") {
		t.Errorf("%v: %s", err, out)
	}
	after, err := os.ReadFile(files[0])
	if err != nil || string(after) != string(before) {
		t.Errorf("the package has changed (%v)", err)
	}
	g.serve(t)
	waitFor(t, "rpmsign signs again", func() bool { return rpmsign(env, files...).Run() == nil })
}

// 500 clients that send a byte a second each leave a busy client's latency within
// twice what it is without them. Rounds alternate, so that what else the machine
// does meets both sides; the best round of each is compared.
func TestAgentSlowClients(t *testing.T) {
	const slow, rounds, signatures = 500, 4, 250
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	_, socket := g.home(t, "rel")
	g.agentAt(t, socket)
	c := dialAgent(t, socket)
	waitFor(t, "the keys", func() bool { return len(keygrips(t, c)) == 1 })
	transact(t, c, "SIGKEY "+keygrips(t, c)[0])
	p99 := func() time.Duration {
		t.Helper()
		took := make([]time.Duration, signatures)
		for i := range took {
			start := time.Now()
			if _, code := transact(t, c, fmt.Sprintf("SETHASH 10 %X", sha512.Sum512([]byte{byte(i)})), "PKSIGN"); code != 0 {
				t.Fatalf("PKSIGN: error %d", code)
			}
			took[i] = time.Since(start)
		}
		slices.Sort(took)
		return took[signatures*99/100]
	}
	best, bestBeside := time.Hour, time.Hour
	for range rounds {
		best = min(best, p99())
		stop := trickle(t, socket, slow)
		bestBeside = min(bestBeside, p99())
		stop()
	}
	t.Logf("p99 of %d signatures: %v alone, %v beside %d slow clients", signatures, best, bestBeside, slow)
	if bestBeside > 2*best {
		t.Errorf("p99 is %v beside slow clients, and %v without", bestBeside, best)
	}
}

// trickle keeps n connections on which a byte a second comes, from before it returns
// until stop has returned.
func trickle(t *testing.T, socket string, n int) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg, up sync.WaitGroup
	up.Add(n)
	for range n {
		wg.Go(func() {
			ready := sync.OnceFunc(up.Done)
			defer ready()
			for ctx.Err() == nil {
				c, err := net.Dial("unix", socket)
				if err != nil {
					t.Error(err)
					return
				}
				greeting := make([]byte, 64)
				if _, err := c.Read(greeting); err != nil {
					t.Errorf("a slow client is not greeted: %v", err)
				}
				ready()
				tick := time.NewTicker(time.Second)
				for err = nil; err == nil && ctx.Err() == nil; {
					_, err = c.Write([]byte("x")) // until the agent cuts it, after 10 s
					select {
					case <-tick.C:
					case <-ctx.Done():
					}
				}
				tick.Stop()
				c.Close()
			}
		})
	}
	up.Wait()
	return func() { cancel(); wg.Wait() }
}
