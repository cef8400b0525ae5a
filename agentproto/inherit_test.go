package agentproto_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/agentproto"
)

// file is the descriptor of a listener, as a parent process hands it down.
func file(t *testing.T, l interface{ File() (*os.File, error) }) *os.File {
	t.Helper()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// A socket of another program's is served, and stays with it: its file, and its backlog.
func TestInherit(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	parent := ln.(*net.UnixListener)
	for range 2 { // a service that is started again gets the same socket
		c := dial(t, path) // before anybody serves
		l, err := agentproto.Inherit(agentproto.Config{}, file(t, parent))
		if err != nil {
			t.Fatal(err)
		}
		if l.Path() != path {
			t.Errorf("path %q, want %q", l.Path(), path)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := l.Serve(ctx, echo); err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
		ping(t, c)
		cancel()
		wg.Wait()
		if _, err := os.Lstat(path); err != nil {
			t.Fatalf("the socket's file is gone: %v", err)
		}
	}
}

func TestInheritRefusesPeers(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	log, logger := newLog()
	l, err := agentproto.Inherit(agentproto.Config{UIDs: []uint32{uint32(os.Geteuid()) + 1}, Logger: logger}, file(t, ln.(*net.UnixListener)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.Serve(ctx, func(context.Context, net.Conn, agentproto.Peer) { t.Error("served") }) })
	awaitCut(t, dial(t, path))
	log.await(t, "uid not allowed\" socket="+path)
	cancel()
	wg.Wait()
}

func TestInheritRefuses(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	datagram, err := net.ListenPacket("unixgram", filepath.Join(shortDir(t), "d"))
	if err != nil {
		t.Fatal(err)
	}
	defer datagram.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]*os.File{
		"TCP":           file(t, tcp.(*net.TCPListener)),
		"datagram":      file(t, datagram.(*net.UnixConn)),
		"not listening": os.NewFile(uintptr(fd), "fresh"),
		"no socket":     plain,
	} {
		t.Run(name, func(t *testing.T) {
			l, err := agentproto.Inherit(agentproto.Config{}, f)
			if err == nil {
				l.Close()
			}
			if err == nil || !strings.Contains(err.Error(), "descriptor") {
				t.Errorf("err is %v", err)
			}
		})
	}
}

// The group decides where the uid does not, and only the group that is listed.
func TestGID(t *testing.T) {
	other, own := uint32(os.Geteuid())+1, uint32(os.Getegid())
	for name, tt := range map[string]struct {
		cfg  agentproto.Config
		want bool
	}{
		"ours, beside another uid": {agentproto.Config{UIDs: []uint32{other}, GIDs: []uint32{own}}, true},
		"ours alone":               {agentproto.Config{GIDs: []uint32{own + 1, own}}, true},
		"another":                  {agentproto.Config{GIDs: []uint32{own + 1}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := tt.cfg
			cfg.Path = filepath.Join(shortDir(t), "sub", "s")
			log, logger := newLog()
			cfg.Logger = logger
			start(t, cfg, echo)
			c := dial(t, cfg.Path)
			if tt.want {
				ping(t, c)
			} else {
				awaitCut(t, c)
				log.await(t, fmt.Sprintf("peer.gid=%d", own))
			}
			fi, err := os.Lstat(cfg.Path)
			if err != nil || fi.Mode().Perm() != 0o666 {
				t.Errorf("mode %v, %v: a group's members could not connect", fi.Mode(), err)
			}
		})
	}
}
