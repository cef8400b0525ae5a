package agentproto_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/agentproto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type handler = func(ctx context.Context, c net.Conn, p agentproto.Peer)

// logBuffer is a log that tests can wait for.
type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func newLog() (*logBuffer, *slog.Logger) {
	b := &logBuffer{more: make(chan struct{}, 1000)}
	return b, slog.New(slog.NewTextHandler(b, nil))
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.more <- struct{}{}
	return b.text.Write(p)
}

// await waits until the log has text.
func (b *logBuffer) await(t *testing.T, text string) {
	t.Helper()
	for {
		b.mu.Lock()
		found := strings.Contains(b.text.String(), text)
		b.mu.Unlock()
		if found {
			return
		}
		select {
		case <-b.more:
		case <-t.Context().Done():
			t.Fatalf("never logged: %q", text)
		}
	}
}

// shortDir is a directory whose name leaves room for a socket's.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// start serves cfg; stop ends it and waits.
func start(t *testing.T, cfg agentproto.Config, h handler) (stop func()) {
	t.Helper()
	l, err := agentproto.Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		err := l.Serve(ctx, h)
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// echo sends back what it reads until the peer hangs up.
func echo(_ context.Context, c net.Conn, _ agentproto.Peer) { io.Copy(c, c) }

// ping asserts that c is served.
func ping(t *testing.T, c net.Conn) {
	t.Helper()
	b := []byte("x")
	_, err := c.Write(b)
	if err == nil {
		_, err = io.ReadFull(c, b)
	}
	if err != nil {
		t.Errorf("not served: %v", err)
	}
}

// awaitCut asserts that the other side hangs up.
func awaitCut(t *testing.T, c net.Conn) {
	t.Helper()
	_, err := c.Read(make([]byte, 1))
	if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("not cut: %v", err)
	}
}

func TestPeer(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	peers := make(chan agentproto.Peer, 1)
	start(t, agentproto.Config{Path: path}, func(_ context.Context, _ net.Conn, p agentproto.Peer) { peers <- p })
	dial(t, path)
	got := <-peers
	want := agentproto.Peer{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()), PID: int32(os.Getpid())}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	exe, err := os.Executable()
	if err != nil || got.Executable() != exe {
		t.Errorf("got %q, want %q", got.Executable(), exe)
	}
	if none := (agentproto.Peer{}).Executable(); none != "" {
		t.Errorf("a peer without a pid runs %q", none)
	}
}

func TestModes(t *testing.T) {
	other := uint32(os.Geteuid()) + 1
	tests := []struct {
		name      string
		uids      []uint32
		sock, dir fs.FileMode
	}{
		{"our own uid", nil, 0o600, 0o700},
		{"our own uid, named", []uint32{uint32(os.Geteuid())}, 0o600, 0o700},
		{"another uid", []uint32{other}, 0o666, 0o711},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(shortDir(t), "a", "b")
			path := filepath.Join(dir, "s")
			l, err := agentproto.Listen(agentproto.Config{Path: path, UIDs: tt.uids})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			for file, want := range map[string]fs.FileMode{path: tt.sock, dir: tt.dir} {
				fi, err := os.Lstat(file)
				if err != nil || fi.Mode().Perm() != want {
					t.Errorf("%s: mode %v, %v, want %v", file, fi.Mode().Perm(), err, want)
				}
			}
		})
	}
}

// TestModeFromTheStart asserts what the code relies on: the mode that is set
// on an unbound socket is the mode of the file that bind(2) makes.
func TestModeFromTheStart(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	err = errors.Join(unix.Fchmod(fd, 0o600), unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}

func TestListenRefuses(t *testing.T) {
	tests := []struct {
		name string
		path func(t *testing.T, dir string) string
		want string
	}{
		{"relative", func(*testing.T, string) string { return "s" }, "not absolute"},
		{"long", func(_ *testing.T, dir string) string {
			return filepath.Join(dir, strings.Repeat("x", 107-len(dir)))
		}, "at most 107"},
		{"a file", func(t *testing.T, dir string) string {
			path := filepath.Join(dir, "s")
			err := os.WriteFile(path, []byte("mine"), 0o600)
			if err != nil {
				t.Fatal(err)
			}
			return path
		}, "not a socket"},
		{"a link", func(t *testing.T, dir string) string {
			path := filepath.Join(dir, "s")
			err := os.Symlink("/nowhere", path)
			if err != nil {
				t.Fatal(err)
			}
			return path
		}, "not a socket"},
		{"directory that others can write", func(t *testing.T, dir string) string {
			err := os.Chmod(dir, 0o770)
			if err != nil {
				t.Fatal(err)
			}
			return filepath.Join(dir, "s")
		}, "writable by group or others"},
		{"live socket", func(t *testing.T, dir string) string {
			path := filepath.Join(dir, "s")
			start(t, agentproto.Config{Path: path}, echo)
			return path
		}, "another agent is listening"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := tt.path(t, shortDir(t))
			before, _ := os.Lstat(path)
			l, err := agentproto.Listen(agentproto.Config{Path: path})
			if err == nil {
				l.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("err is %v, want %q", err, tt.want)
			}
			after, _ := os.Lstat(path)
			if before != nil && !os.SameFile(before, after) {
				t.Error("what was there is gone")
			}
		})
	}
}

func TestLongestPath(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, strings.Repeat("x", 106-len(dir)))
	start(t, agentproto.Config{Path: path}, echo)
	ping(t, dial(t, path))
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	old, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	old.(*net.UnixListener).SetUnlinkOnClose(false)
	old.Close()
	stop := start(t, agentproto.Config{Path: path}, echo)
	ping(t, dial(t, path))
	stop()
	_, err = os.Lstat(path)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

// TestOneOfManyWins starts many at one path at once, over a stale socket.
func TestOneOfManyWins(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	old, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	old.(*net.UnixListener).SetUnlinkOnClose(false)
	old.Close()
	var mu sync.Mutex
	var won []*agentproto.Listener
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			l, err := agentproto.Listen(agentproto.Config{Path: path})
			if err == nil {
				mu.Lock()
				won = append(won, l)
				mu.Unlock()
			} else if !strings.Contains(err.Error(), "another agent") {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("%d listeners at one path", len(won))
	}
	for _, l := range won {
		l.Close()
	}
}

func TestCloseLeavesAnothersSocket(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	stop := start(t, agentproto.Config{Path: path}, echo)
	err := os.Remove(path)
	if err != nil {
		t.Fatal(err)
	}
	start(t, agentproto.Config{Path: path}, echo)
	stop()
	ping(t, dial(t, path))
}

func TestWrongUID(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	log, logger := newLog()
	start(t, agentproto.Config{Path: path, UIDs: []uint32{uint32(os.Geteuid()) + 1}, Logger: logger}, func(context.Context, net.Conn, agentproto.Peer) {
		t.Error("served")
	})
	awaitCut(t, dial(t, path))
	log.await(t, fmt.Sprintf("uid not allowed\" socket=%s peer.uid=%d", path, os.Geteuid()))
}

func TestTooManyConnections(t *testing.T) {
	for name, cfg := range map[string]agentproto.Config{"all": {MaxConns: 2}, "uid": {MaxConnsPerUID: 2}} {
		t.Run(name, func(t *testing.T) {
			log, logger := newLog()
			cfg.Path, cfg.Logger = filepath.Join(shortDir(t), "s"), logger
			released := make(chan struct{}, 10)
			start(t, cfg, func(ctx context.Context, c net.Conn, p agentproto.Peer) {
				echo(ctx, c, p)
				released <- struct{}{}
			})
			a, b := dial(t, cfg.Path), dial(t, cfg.Path)
			ping(t, a)
			ping(t, b)
			awaitCut(t, dial(t, cfg.Path))
			log.await(t, "too many")
			a.Close()
			<-released
			// The slot is free a moment after its handler has returned.
			for {
				c := dial(t, cfg.Path)
				c.Write([]byte("x"))
				_, err := c.Read(make([]byte, 1))
				if err == nil {
					break
				}
			}
			ping(t, b)
		})
	}
}

func TestPanicIsContained(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	log, logger := newLog()
	var once sync.Once
	start(t, agentproto.Config{Path: path, Logger: logger}, func(ctx context.Context, c net.Conn, p agentproto.Peer) {
		once.Do(func() { panic("at the worst time") })
		echo(ctx, c, p)
	})
	awaitCut(t, dial(t, path))
	log.await(t, "at the worst time")
	ping(t, dial(t, path))
}

func TestIdleTimeout(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	errs := make(chan error, 2)
	start(t, agentproto.Config{Path: path, IdleTimeout: 20 * time.Millisecond}, func(_ context.Context, c net.Conn, _ agentproto.Peer) {
		c.SetDeadline(time.Now().Add(time.Hour)) // a protocol cannot lengthen it
		_, err := c.Read(make([]byte, 1))
		errs <- err
		for err = nil; err == nil; _, err = c.Write(make([]byte, 1<<16)) {
		}
		errs <- err
	})
	dial(t, path)
	for range 2 {
		err := <-errs
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("err is %v", err)
		}
	}
}

// TestShutdown has an idle connection, one that finishes its request in time, and
// one that does not.
func TestShutdown(t *testing.T) {
	tests := []struct {
		name  string
		grace time.Duration
		work  func(ctx context.Context, stopped <-chan struct{})
		want  string
	}{
		{"idle", time.Hour, nil, ""},
		{"finishes", time.Hour, func(_ context.Context, stopped <-chan struct{}) { <-stopped }, "done"},
		{"does not", 10 * time.Millisecond, func(ctx context.Context, _ <-chan struct{}) { <-ctx.Done() }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "s")
			begun, stopped := make(chan struct{}), make(chan struct{})
			stop := start(t, agentproto.Config{Path: path, Grace: tt.grace}, func(ctx context.Context, c net.Conn, _ agentproto.Peer) {
				close(begun)
				if tt.work != nil {
					tt.work(ctx, stopped)
					io.WriteString(c, "done")
				}
				c.SetReadDeadline(time.Now().Add(time.Hour)) // as for a next request
				_, err := c.Read(make([]byte, 1))
				if tt.name != "does not" && !errors.Is(err, io.EOF) {
					t.Errorf("the read after the end: %v", err)
				}
			})
			c := dial(t, path)
			<-begun
			var wg sync.WaitGroup
			wg.Go(stop)
			if tt.name == "finishes" {
				// The socket's file goes before its handlers are told.
				for {
					_, err := os.Lstat(path)
					if err != nil {
						break
					}
				}
				close(stopped)
			}
			got, err := io.ReadAll(c)
			wg.Wait()
			if string(got) != tt.want || err != nil && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}
