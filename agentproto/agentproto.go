// Package agentproto listens on the local sockets that unmodified tools expect
// an agent behind, and says who calls: the peer's uid, gid and pid as the
// kernel knows them.
//
// It knows no protocol. The subpackages speak them on the connections that
// [Listener.Serve] hands out; any front-end of the project may use it. Linux only.
//
// What it keeps:
//
//  1. The socket never has, for any instant, a mode wider than was asked for.
//  2. No byte of a peer whose uid is not allowed is read.
//  3. A live agent's socket is not taken over, and a file that is not a socket is not removed.
//  4. Connections are bounded, in all and for each uid.
package agentproto

import (
	"log/slog"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Peer is the process that connected, as it was at the time of connect(2)
// (SO_PEERCRED). A connection that comes through an SSH forward shows the local
// ssh client, whoever sits behind it.
type Peer struct {
	UID uint32
	GID uint32
	PID int32 // may be dead, and its number reused: good for logs only
}

// Executable is the path of the peer's program, or "" where it cannot be read.
// It is for logs: the process may have exited or called execve since it connected,
// so nothing may be decided on it.
func (p Peer) Executable() string {
	if p.PID <= 0 { // a peer outside our pid namespace has pid 0
		return ""
	}
	exe, err := os.Readlink("/proc/" + strconv.Itoa(int(p.PID)) + "/exe")
	if err != nil {
		return ""
	}
	return exe
}

// LogValue makes a Peer one group of attributes.
func (p Peer) LogValue() slog.Value {
	return slog.GroupValue(
		slog.Uint64("uid", uint64(p.UID)),
		slog.Uint64("gid", uint64(p.GID)),
		slog.Int("pid", int(p.PID)),
		slog.String("exe", p.Executable()),
	)
}

// peerOf asks the kernel who is at the other end.
func peerOf(c *net.UnixConn) (Peer, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var cred *unix.Ucred
	var serr error
	err = rc.Control(func(fd uintptr) {
		cred, serr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err != nil {
		return Peer{}, err
	}
	if serr != nil {
		return Peer{}, serr
	}
	return Peer{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}, nil
}
