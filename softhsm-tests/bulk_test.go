package softhsm_test

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// 5,000 digests over one stream, each signature verified by the client and each
// in the audit log once.
func TestBulk(t *testing.T) {
	g := newGateway(t)
	for _, a := range []string{"p256", "ed25519"} {
		g.must(t, "signwarden", "key", "create", a, "--algorithm", a)
		var r struct {
			Signatures int
			Errors     int
			Verified   bool
			PerSecond  float64 `json:"signatures_per_second"`
		}
		out := g.must(t, "signwarden", "bench", "sign", "--key", a, "--count", "5000", "--concurrency", "256", "--verify", "-o", "json")
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatal(err)
		}
		if r.Signatures != 5000 || r.Errors != 0 || !r.Verified {
			t.Errorf("%s: %+v; want 5000 verified signatures", a, r)
		}
		t.Logf("%s: %.0f signatures/s", a, r.PerSecond)
		last := g.audit(t, 1)[0]
		rows := 0
		c := g.client(t, "admin")
		for from := int64(0); from <= last.Row; {
			first, entries, err := c.AuditEntries(t.Context(), from, 1000)
			if err != nil || first != from {
				t.Fatalf("rows from %d, want %d: %v", first, from, err)
			}
			for _, e := range entries {
				if strings.Contains(string(e), `"key":"`+a+`"`) && strings.Contains(string(e), `"outcome":"signed"`) {
					rows++
				}
			}
			from += int64(len(entries))
		}
		if rows != 5001 { // and the one that bench opens the stream with
			t.Errorf("%s: %d signatures in the audit log, want 5001", a, rows)
		}
	}
}

// A detached signature over 4 GiB: the client stays under 64 MiB and moves under
// 10 KiB, TLS handshake included.
func TestConstantMemory(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "rsa4096")
	proxy := newProxy(t, g.address)
	profile := filepath.Join(g.dir, "clients", "admin", "proxied.yaml")
	text, err := os.ReadFile(g.profile("admin"))
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, profile, strings.Replace(string(text), g.address, proxy.address, 1))
	file := filepath.Join(t.TempDir(), "huge")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(4 << 30); err != nil {
		t.Fatal(err)
	}
	f.Close()

	cmd := exec.Command(filepath.Join(bin, "signwarden"), "--profile", profile, "sign", "openpgp", "--key", "rel", file)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	rss := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss // KiB
	proxy.stop()
	moved := proxy.bytes.Load()
	t.Logf("4 GiB: client's memory %d KiB, moved %d bytes", rss, moved)
	if rss >= 64<<10 {
		t.Errorf("the client took %d KiB, want under %d", rss, 64<<10)
	}
	if moved >= 10<<10 || moved == 0 {
		t.Errorf("%d bytes were moved, want under %d", moved, 10<<10)
	}
	mustEnv(t, g.verifier(t, "rel"), "gpg", "--batch", "--verify", file+".sig", file)
}

// A text of 96 MiB is clear-signed, from a file and through a pipe, and verified:
// the client stays under 64 MiB.
func TestClearSignMemory(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	mustEnv(t, os.Environ(), "sh", "-c", "yes -- '- a line of the text, which is escaped' | head -c 100663296 >"+text)
	under := func(what string, r result, kib int) {
		t.Helper()
		t.Logf("%s: %d KiB", what, kib)
		if r.code != 0 || kib >= 64<<10 {
			t.Errorf("%s: exit code %d, %d KiB, want under %d: %s", what, r.code, kib, 64<<10, r.stderr)
		}
	}
	r, kib := g.measured(t, "sign", "openpgp", "--key", "rel", "--clearsign", "--output", dir+"/file.asc", text)
	under("a file", r, kib)
	r, kib = g.measured(t, "verify", "openpgp", "--key", "rel", dir+"/file.asc")
	under("verified", r, kib)
	// The pipe has a name, so that the client can be measured.
	pipe := filepath.Join(t.TempDir(), "pipe")
	mustEnv(t, os.Environ(), "mkfifo", pipe)
	feed := exec.Command("cp", text, pipe)
	if err := feed.Start(); err != nil {
		t.Fatal(err)
	}
	r, kib = g.measured(t, "sign", "openpgp", "--key", "rel", "--clearsign", "--output", dir+"/pipe.asc", pipe)
	under("a pipe", r, kib)
	if err := feed.Wait(); err != nil {
		t.Error(err)
	}
	env := g.verifier(t, "rel")
	for _, name := range []string{"/file.asc", "/pipe.asc"} {
		mustEnv(t, env, "gpg", "--batch", "--verify", dir+name)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("left over: %v, %v", entries, err)
	}
}

// proxy forwards TCP and counts.
type proxy struct {
	address string
	bytes   atomic.Int64 // both ways, of connections that have ended
	stop    func()       // ends all, and waits
}

func newProxy(t testing.TB, to string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{address: l.Addr().String()}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	p.stop = func() { cancel(); l.Close(); wg.Wait() }
	t.Cleanup(p.stop)
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			context.AfterFunc(ctx, func() { in.Close(); out.Close() })
			for _, way := range [][2]net.Conn{{in, out}, {out, in}} {
				wg.Go(func() {
					n, _ := io.Copy(way[1], way[0])
					p.bytes.Add(n)
					way[1].Close()
				})
			}
		}
	})
	return p
}
