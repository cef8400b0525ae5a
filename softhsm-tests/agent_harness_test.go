package softhsm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/agentproto/assuan"
)

// output is what a process has written so far.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// process is a program in the background. It ends with the test.
type process struct {
	cmd  *exec.Cmd
	log  *output
	done chan struct{} // closed when it has ended
}

// background starts a program, whose input does not end before the program does.
func background(t testing.TB, env []string, name string, args ...string) *process {
	t.Helper()
	if strings.HasPrefix(name, "signwarden") {
		name = filepath.Join(bin, name)
	}
	p := &process{cmd: exec.Command(name, args...), log: &output{}, done: make(chan struct{})}
	p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = env, p.log, p.log
	if _, err := p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = p.cmd.Wait(); close(p.done) }()
	t.Cleanup(func() {
		p.stop(unix.SIGTERM)
		if strings.Contains(p.log.String(), "panic") {
			t.Errorf("%s has panicked", name)
		}
		if t.Failed() {
			t.Logf("log of %s:\n%s", name, p.log)
		}
	})
	return p
}

// stop ends it with sig and returns its exit code.
func (p *process) stop(sig os.Signal) int {
	_ = p.cmd.Process.Signal(sig)
	<-p.done
	return p.cmd.ProcessState.ExitCode()
}

// await waits until the process has written text, and fails if it ends before.
func (p *process) await(t testing.TB, text string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%q in the log", text), func() bool {
		if strings.Contains(p.log.String(), text) {
			return true
		}
		select {
		case <-p.done:
			t.Fatalf("it has ended with %d before it wrote %q:\n%s", p.cmd.ProcessState.ExitCode(), text, p.log)
		default:
		}
		return false
	})
}

// agentAt serves a socket at path with signwarden agent, until the test ends.
func (g *gateway) agentAt(t testing.TB, path string, args ...string) *process {
	t.Helper()
	p := background(t, g.env, "signwarden", append([]string{"agent", "--gpg-socket", path}, args...)...)
	p.await(t, "gpg-agent socket "+path)
	return p
}

// home is a GNUPGHOME with the certificates of keys, whose agent is at socket.
func (g *gateway) home(t testing.TB, names ...string) (env []string, socket string) {
	t.Helper()
	env = g.verifier(t, names...)
	return env, strings.TrimSpace(mustEnv(t, env, "gpgconf", "--list-dirs", "agent-socket"))
}

// gpgTry runs gpg and returns how it ended, with its status lines in stdout.
func gpgTry(t testing.TB, env []string, args ...string) result {
	t.Helper()
	return runEnv(t, env, "gpg", append([]string{"--batch", "--yes", "--status-fd", "1"}, args...)...)
}

// failure asserts that gpg could not sign, and the number that its status line tells.
func (r result) failure(t testing.TB, number int, words string) {
	t.Helper()
	if r.code != 2 || !strings.Contains(r.stdout, fmt.Sprintf("[GNUPG:] FAILURE sign %d\n", number)) || !strings.Contains(r.stderr, words) {
		t.Errorf("exit code %d, want 2 with FAILURE sign %d and %q:\n%s%s", r.code, number, words, r.stdout, r.stderr)
	}
}

// dialAgent connects to an agent's socket as gpg does.
func dialAgent(t testing.TB, socket string) *assuan.Client {
	t.Helper()
	c, err := assuan.Dial(context.Background(), socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// keygrips are those that an agent lists, in hex.
func keygrips(t testing.TB, c *assuan.Client) []string {
	t.Helper()
	r, err := c.Transact("KEYINFO --list")
	if err != nil {
		t.Fatal(err)
	}
	var grips []string
	for _, s := range r.Status {
		grips = append(grips, strings.Fields(s)[1])
	}
	return grips
}

// transact sends commands that must succeed; the last one's number is returned if not.
func transact(t testing.TB, c *assuan.Client, commands ...string) (assuan.Reply, uint32) {
	t.Helper()
	var last assuan.Reply
	for i, command := range commands {
		r, err := c.Transact(command)
		e, isErr := errors.AsType[*assuan.Error](err)
		if isErr && i == len(commands)-1 {
			return r, e.Code
		}
		if err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		last = r
	}
	return last, 0
}

// command is a command with the clients' environment, and a home that anybody can read.
func (g *gateway) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env, cmd.Dir = append(append([]string(nil), g.env...), "GNUPGHOME=/nonexistent", "HOME=/"), "/"
	return cmd
}
