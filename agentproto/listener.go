package agentproto

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// DefaultMaxConns bounds the connections of one listener.
	DefaultMaxConns = 1024
	// DefaultMaxConnsPerUID bounds those of one uid. A build that signs in
	// parallel holds one for each gpg; sq opens several.
	DefaultMaxConnsPerUID = 512
	// DefaultIdleTimeout bounds how long one read or write may wait. It is long
	// on purpose: gpg connects, looks up its key, and only then hashes its input,
	// which can be a pipe that is fed for hours.
	DefaultIdleTimeout = 12 * time.Hour
	// DefaultGrace is how long handlers may go on with what they are doing after a shutdown.
	DefaultGrace = 10 * time.Second
)

// Accept is tried again after a failure such as EMFILE, with these pauses.
const (
	minAcceptPause = 5 * time.Millisecond
	maxAcceptPause = time.Second
)

// Config says where a Listener listens, and to whom. The zero value of every
// field but Path is a default.
type Config struct {
	// Path of the socket: absolute, at most 107 bytes. Its directory is created
	// if missing, and must be ours or root's, and writable by its owner only.
	Path string

	// UIDs and GIDs that may connect: a peer whose uid is among the one, or whose
	// effective gid when it connected is among the other. A user's further groups
	// are not known. Both empty means our own effective uid. If anybody but that
	// may connect the socket's mode is 0666, and 0600 otherwise: in either case
	// what the kernel reports decides.
	UIDs, GIDs []uint32

	MaxConns       int           // 0: DefaultMaxConns
	MaxConnsPerUID int           // 0: DefaultMaxConnsPerUID
	IdleTimeout    time.Duration // 0: DefaultIdleTimeout
	Grace          time.Duration // 0: DefaultGrace

	// Logger of connections that are refused and handlers that panic; nil discards.
	Logger *slog.Logger
}

// Listener is a listening agent socket. It is safe for concurrent use.
type Listener struct {
	cfg   Config
	sock  *socket
	log   *slog.Logger
	lines *rate.Limiter // of refused connections in the log

	// mu guards the fields below. It is held for map operations and for setting
	// a connection's deadline, never while waiting; so a slow peer blocks nobody.
	mu     sync.Mutex
	conns  map[*conn]Peer
	perUID map[uint32]int
}

// Listen creates the socket. A stale socket at the path is replaced; a live one,
// or another kind of file, is an error.
func Listen(cfg Config) (*Listener, error) {
	cfg = cfg.withDefaults()
	self := uint32(os.Geteuid())
	shared := len(cfg.GIDs) > 0 || slices.ContainsFunc(cfg.UIDs, func(uid uint32) bool { return uid != self })
	sock, err := bindSocket(cfg.Path, shared)
	if err != nil {
		return nil, err
	}
	return newListener(cfg, sock), nil
}

// Inherit serves a socket that another program, such as systemd, has bound and
// listens on, and that outlives this one: its file is left alone, with its mode. The kernel's
// word on the peer decides here too. Config.Path is not used. f is closed.
func Inherit(cfg Config, f *os.File) (*Listener, error) {
	cfg = cfg.withDefaults()
	sock, err := inheritSocket(f)
	if err != nil {
		return nil, err
	}
	cfg.Path = sock.path
	return newListener(cfg, sock), nil
}

func (cfg Config) withDefaults() Config {
	cfg.UIDs, cfg.GIDs = slices.Clone(cfg.UIDs), slices.Clone(cfg.GIDs)
	if len(cfg.UIDs) == 0 && len(cfg.GIDs) == 0 {
		cfg.UIDs = []uint32{uint32(os.Geteuid())}
	}
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = DefaultMaxConns
	}
	if cfg.MaxConnsPerUID <= 0 {
		cfg.MaxConnsPerUID = DefaultMaxConnsPerUID
	}
	if cfg.IdleTimeout <= 0 {
		cfg.IdleTimeout = DefaultIdleTimeout
	}
	if cfg.Grace <= 0 {
		cfg.Grace = DefaultGrace
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return cfg
}

func newListener(cfg Config, sock *socket) *Listener {
	return &Listener{
		cfg:    cfg,
		sock:   sock,
		log:    cfg.Logger.With("socket", cfg.Path),
		lines:  rate.NewLimiter(rate.Every(time.Second), 10), // who may not connect must not fill the log
		conns:  make(map[*conn]Peer),
		perUID: make(map[uint32]int),
	}
}

// Path is where the socket is.
func (l *Listener) Path() string { return l.cfg.Path }

// Close stops listening and removes the socket file if it is still ours. Serve
// does it too; Close is for a Listener that is never served.
func (l *Listener) Close() error { return l.sock.Close() }

// Serve accepts connections and calls handle for each allowed one, in its own
// goroutine. It closes the connection when handle returns, or panics.
//
// When ctx ends, Serve stops listening, and every read on a connection reports
// io.EOF from then on: a handler that waits for its peer ends, and one that works on
// a request can finish and answer it. The ctx of a handler is not ctx: it
// ends Config.Grace later, together with the connections. Serve returns when all handlers have, so
// they must return once their ctx has ended. The error is nil if ctx ended.
func (l *Listener) Serve(ctx context.Context, handle func(ctx context.Context, c net.Conn, p Peer)) error {
	hctx, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	actx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { <-actx.Done(); l.sock.Close() })

	err := l.accept(ctx, func(c *conn, p Peer) {
		wg.Go(func() {
			defer l.release(c)
			defer l.recoverHandler(p)
			handle(hctx, c, p)
		})
	})
	stop()
	l.drain()

	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	grace := time.NewTimer(l.cfg.Grace)
	defer grace.Stop()
	select {
	case <-done:
	case <-grace.C:
		l.cut() // first, so that a handler that ends for cut answers nothing
		cut()
		<-done
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// accept runs until the listening socket is closed.
func (l *Listener) accept(ctx context.Context, serve func(*conn, Peer)) error {
	pause := minAcceptPause
	for {
		c, err := l.sock.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil {
			l.log.Error("accepting a connection", "err", err, "retry_in", pause)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(pause):
			}
			pause = min(2*pause, maxAcceptPause)
			continue
		}
		pause = minAcceptPause
		ac, p, ok := l.admit(c)
		if ok {
			serve(ac, p)
		}
	}
}

// refused tells the log of a connection that was refused, within a rate.
func (l *Listener) refused(why string, attrs ...any) {
	if l.lines.Allow() {
		l.log.Warn("connection refused: "+why, attrs...)
	}
}

// admit counts c in, or closes it. Nothing is read from it before.
func (l *Listener) admit(c *net.UnixConn) (*conn, Peer, bool) {
	p, err := peerOf(c)
	if err != nil {
		l.refused("no peer credentials", "err", err)
		c.Close()
		return nil, Peer{}, false
	}
	if !slices.Contains(l.cfg.UIDs, p.UID) && !slices.Contains(l.cfg.GIDs, p.GID) {
		l.refused("uid not allowed", "peer", p)
		c.Close()
		return nil, Peer{}, false
	}
	l.mu.Lock()
	all, own := len(l.conns), l.perUID[p.UID]
	full := all >= l.cfg.MaxConns || own >= l.cfg.MaxConnsPerUID
	ac := &conn{Conn: c, idle: l.cfg.IdleTimeout}
	if !full {
		l.conns[ac] = p
		l.perUID[p.UID]++
	}
	l.mu.Unlock()
	if full {
		l.refused("too many", "peer", p, "conns", all, "conns_of_uid", own)
		c.Close()
		return nil, Peer{}, false
	}
	return ac, p, true
}

func (l *Listener) release(c *conn) {
	c.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	uid := l.conns[c].UID
	delete(l.conns, c)
	l.perUID[uid]--
	if l.perUID[uid] == 0 {
		delete(l.perUID, uid)
	}
}

func (l *Listener) recoverHandler(p Peer) {
	r := recover()
	if r != nil {
		l.log.Error("connection handler panicked", "peer", p, "panic", r, "stack", string(debug.Stack()))
	}
}

// drain ends every wait for a peer, now and later.
func (l *Listener) drain() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		c.drain()
	}
}

func (l *Listener) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c, p := range l.conns {
		l.log.Warn("connection cut: still busy after the shutdown's grace", "peer", p)
		c.Close()
	}
}
