package gpgagent_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/signwarden/signwarden/agentproto"
	"github.com/signwarden/signwarden/agentproto/gpgagent"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

func TestGPGInParallel(t *testing.T) {
	const n = 40
	h := newGPGHome(t, nil)
	msg := h.write(t, "msg", "to be signed\n")
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			key := keyNames[i%len(keyNames)]
			sig := h.path(fmt.Sprintf("%d.sig", i))
			code, out := h.run(t, "gpg", "--batch", "-u", key, "--digest-algo", "SHA512", "-o", sig, "--detach-sign", msg)
			if code != 0 {
				t.Errorf("signature %d by %s: exit status %d: %s", i, key, code, out)
			}
		})
	}
	wg.Wait()
	for i := range n {
		out := h.must(t, "gpg", "--batch", "--status-fd", "1", "--verify", h.path(fmt.Sprintf("%d.sig", i)), msg)
		if !strings.Contains(out, "[GNUPG:] VALIDSIG") {
			t.Errorf("signature %d: %s", i, out)
		}
	}
	if calls := h.keys.takeCalls(); len(calls) != n {
		t.Errorf("%d calls, want %d", len(calls), n)
	}
}

// TestGPGKilledWhileSigning kills a client that waits for its signature. Others
// are not disturbed, then or later.
func TestGPGKilledWhileSigning(t *testing.T) {
	h := newGPGHome(t, nil)
	msg := h.write(t, "msg", "to be signed\n")
	begun, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	h.keys.setSign(func(ctx context.Context) error {
		first := false
		once.Do(func() { first = true; close(begun) })
		if !first {
			return nil
		}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	victim := h.command(t.Context(), "gpg", "--batch", "-u", "rsa", "-o", h.path("victim.sig"), "--detach-sign", msg)
	err := victim.Start()
	if err != nil {
		t.Fatal(err)
	}
	<-begun
	sign := func(name string) {
		h.must(t, "gpg", "--batch", "-u", "rsa", "-o", h.path(name), "--detach-sign", msg)
		h.must(t, "gpg", "--batch", "--verify", h.path(name), msg)
	}
	sign("beside.sig")
	victim.Process.Kill()
	victim.Wait() // its error is the kill
	sign("after.sig")
	close(release)
	sign("later.sig")
}

func TestGitSignsTag(t *testing.T) {
	h := newGPGHome(t, nil)
	git := func(args ...string) string {
		t.Helper()
		return h.must(t, "git", append([]string{"-C", h.path("repo"), "-c", "user.name=ed", "-c", "user.email=ed@example.org", "-c", "user.signingkey=ed@example.org"}, args...)...)
	}
	h.must(t, "git", "init", "-q", h.path("repo"))
	git("commit", "-q", "-S", "--allow-empty", "-m", "one")
	git("tag", "-s", "-m", "release", "v1")
	for _, args := range [][]string{{"verify-commit", "--raw", "HEAD"}, {"verify-tag", "--raw", "v1"}} {
		out := git(args...)
		if !strings.Contains(out, "[GNUPG:] VALIDSIG") {
			t.Errorf("git %q: %s", args, out)
		}
	}
	if calls := h.keys.takeCalls(); len(calls) != 2 {
		t.Errorf("%d calls, want 2", len(calls))
	}
}

// TestGPGAsksBeforeItsInputEnds is why a connection may be idle for hours: gpg has
// looked up its key before it reads the data.
func TestGPGAsksBeforeItsInputEnds(t *testing.T) {
	asked := make(chan struct{})
	var once sync.Once
	h := newGPGHome(t, func(c *gpgagent.Config) {
		keys := c.Keys
		c.Keys = func(p agentproto.Peer) (gpgagent.Keys, error) {
			k, err := keys(p)
			return askedKeys{k, func() { once.Do(func() { close(asked) }) }}, err
		}
	})
	cmd := h.command(t.Context(), "gpg", "--batch", "-u", "ed", "-o", h.path("sig"), "--detach-sign")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	err = cmd.Start()
	if err != nil {
		t.Fatal(err)
	}
	<-asked
	if calls := h.keys.takeCalls(); len(calls) != 0 {
		t.Errorf("signed before the data: %+v", calls)
	}
	_, err = io.WriteString(in, "to be signed\n")
	err = errors.Join(err, in.Close(), cmd.Wait())
	if err != nil {
		t.Fatal(err)
	}
	h.must(t, "gpg", "--batch", "--verify", h.path("sig"), h.write(t, "msg", "to be signed\n"))
}

// askedKeys tells when the keys were listed.
type askedKeys struct {
	gpgagent.Keys
	asked func()
}

func (k askedKeys) PublicKeys(ctx context.Context) (map[string]crypto.PublicKey, error) {
	defer k.asked()
	return k.Keys.PublicKeys(ctx)
}

// TestGPGRefusedAtTheDoor asserts that a peer without a principal gets no key, and a reason.
func TestGPGRefusedAtTheDoor(t *testing.T) {
	var refuse sync.Map
	h := newGPGHome(t, func(c *gpgagent.Config) {
		keys := c.Keys
		c.Keys = func(p agentproto.Peer) (gpgagent.Keys, error) {
			if p.UID != uint32(os.Geteuid()) || p.PID <= 0 {
				t.Errorf("peer is %+v", p)
			}
			_, no := refuse.Load("all")
			if no {
				return nil, fmt.Errorf("no such user: %w", sigerr.Unauthenticated)
			}
			return keys(p)
		}
	})
	refuse.Store("all", true)
	code, out := h.run(t, "gpg", "--batch", "-u", "ed", "-o", h.path("sig"), "--detach-sign", h.write(t, "msg", "x"))
	if code != 2 || !strings.Contains(out, "Not authenticated") {
		t.Errorf("exit status %d: %s", code, out)
	}
}
