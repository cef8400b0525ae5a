package agentproto

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is what sockaddr_un.sun_path holds besides its NUL (unix(7)).
const maxPath = 107

const (
	// probeTimeout bounds the connect that tells a live socket from a stale one.
	probeTimeout = time.Second
	// lockTimeout bounds the wait for another process that sets up a socket in the same directory.
	lockTimeout = 5 * time.Second
)

// socket is a bound, listening socket and the identity of its file.
type socket struct {
	*net.UnixListener
	path      string
	inherited bool // another program's: its file stays
	dev, ino  uint64
}

// bindSocket puts a listening socket at path. shared says that other uids may
// connect: the mode is then 0666 and a new directory 0711, else 0600 and 0700.
func bindSocket(path string, shared bool) (*socket, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("socket path %q is not absolute", path)
	}
	path = filepath.Clean(path)
	if len(path) > maxPath {
		return nil, fmt.Errorf("socket path %q has %d bytes, and the kernel takes at most %d: use a directory with a shorter name, such as one under /run", path, len(path), maxPath)
	}
	dir := filepath.Dir(path)
	err := makeDir(dir, shared)
	if err != nil {
		return nil, err
	}
	// The lock closes the gap between finding a stale socket and binding: without
	// it, of two that start at once the second removes the first's live socket.
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	err = clearStale(path)
	if err != nil {
		return nil, err
	}
	return bind(path, shared)
}

// inheritSocket takes over a descriptor that must be a listening Unix stream
// socket: anything else would be read from or written to as if it were one.
func inheritSocket(f *os.File) (*socket, error) {
	defer f.Close() // FileListener works on a duplicate
	for _, want := range []struct{ option, value int }{
		{unix.SO_DOMAIN, unix.AF_UNIX}, {unix.SO_TYPE, unix.SOCK_STREAM}, {unix.SO_ACCEPTCONN, 1},
	} {
		got, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, want.option)
		if err != nil {
			return nil, fmt.Errorf("descriptor %d (%s) is no socket: %w", f.Fd(), f.Name(), err)
		}
		if got != want.value {
			return nil, fmt.Errorf("descriptor %d (%s) is not a listening Unix stream socket: use ListenStream with a path", f.Fd(), f.Name())
		}
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d (%s): %w", f.Fd(), f.Name(), err)
	}
	ul := ln.(*net.UnixListener)
	ul.SetUnlinkOnClose(false)
	return &socket{UnixListener: ul, path: ul.Addr().String(), inherited: true}, nil
}

// makeDir makes dir if it is missing and refuses one where others could put
// their own socket at our path.
func makeDir(dir string, shared bool) error {
	mode := fs.FileMode(0o700)
	if shared {
		mode = 0o711 // others must be able to reach the socket, not to list
	}
	err := os.MkdirAll(dir, mode)
	if err != nil {
		return fmt.Errorf("making the socket directory: %w", err)
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("checking the socket directory: %w", err)
	}
	if fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("socket directory %q is writable by group or others (mode %04o): use a directory of its own, or chmod go-w it", dir, fi.Mode().Perm())
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("socket directory %q belongs to uid %d, not to us (uid %d)", dir, st.Uid, os.Geteuid())
	}
	return nil
}

// lockDir takes the advisory lock on dir that agents hold while they create or
// remove a socket in it.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("opening the socket directory: %w", err)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(lockTimeout)
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil // closing releases the lock
		}
		busy := errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, unix.EINTR)
		if !busy || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("locking the socket directory %q: %w", dir, err)
		}
		<-tick.C
	}
}

// clearStale removes a socket that nobody listens on. Anything else at path is an error.
func clearStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("checking the socket path: %w", err)
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%q exists and is not a socket: move it away", path)
	}
	c, err := net.DialTimeout("unix", path, probeTimeout)
	if err == nil {
		c.Close()
		return fmt.Errorf("another agent is listening at %q: stop it first, or use another path", path)
	}
	// Only a refused connect proves that nobody listens: a full backlog, for one,
	// gives EAGAIN.
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("cannot tell whether another agent is listening at %q: %w", path, err)
	}
	err = os.Remove(path)
	if err != nil {
		return fmt.Errorf("removing the stale socket: %w", err)
	}
	return nil
}

// bind makes the socket with its mode already in place.
func bind(path string, shared bool) (*socket, error) {
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		// Linux gives the file that bind(2) makes the mode of the socket's own
		// inode, less the umask: so the file is never wider than 0600, and the
		// process-wide umask is left alone.
		var serr error
		err := rc.Control(func(fd uintptr) { serr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, serr)
	}}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listening at %q: %w", path, err)
	}
	ul := ln.(*net.UnixListener)
	ul.SetUnlinkOnClose(false) // Close below removes the file, if it is still ours
	s := &socket{UnixListener: ul, path: path}
	var st unix.Stat_t
	err = unix.Lstat(path, &st)
	if err != nil {
		ul.Close()
		return nil, fmt.Errorf("checking the new socket %q: %w", path, err)
	}
	s.dev, s.ino = uint64(st.Dev), st.Ino
	mode := fs.FileMode(0o600) // again, as an odd umask may have taken bits from it
	if shared {
		mode = 0o666 // the peer check decides; widening needs no care for races
	}
	err = os.Chmod(path, mode)
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("setting the mode of %q: %w", path, err)
	}
	return s, nil
}

// Close removes the file, if it is still the one that was bound, and stops
// listening. While the socket is open its inode is in use, so an equal inode
// number means our file: hence first remove, then close.
func (s *socket) Close() error {
	if !s.inherited {
		s.remove()
	}
	return s.UnixListener.Close()
}

func (s *socket) remove() {
	unlock, err := lockDir(filepath.Dir(s.path))
	if err != nil {
		return // the file stays; the next agent finds it stale and replaces it
	}
	defer unlock()
	var st unix.Stat_t
	err = unix.Lstat(s.path, &st)
	if err == nil && uint64(st.Dev) == s.dev && st.Ino == s.ino {
		os.Remove(s.path)
	}
}
