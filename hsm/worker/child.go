package worker

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/hsm"
)

// pipeFD is the child's end of the pipe.
const pipeFD = 3

// prSetDumpable is PR_SET_DUMPABLE, which package syscall lacks.
const prSetDumpable = 4

// Main is a worker, from its start to its end; it returns the exit code. End
// the process with os.Exit: modules such as SoftHSM 2.6 crash in their
// destructors when it ends the long way.
func Main() int {
	var st syscall.Stat_t
	if err := syscall.Fstat(pipeFD, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFSOCK {
		fmt.Fprintln(os.Stderr, "signwardend: hsm-worker is started by signwardend, and has nothing to do here")
		return 2
	}
	// Service managers signal all processes of a service, and terminals a
	// group. Our parent says when we are to end.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	syscall.CloseOnExec(pipeFD)
	// The PIN is in our memory: no core files, and nobody who is not root attaches.
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prSetDumpable, 0, 0); errno != 0 {
		fmt.Fprintf(os.Stderr, "PR_SET_DUMPABLE: %v\n", errno)
		return 1
	}
	// Signing makes garbage of a few hundred bytes, and the heap is tiny.
	debug.SetGCPercent(800)

	p := &pipe{buf: make([]byte, maxFrame)}
	f, _, ok := p.next(nil)
	h, err := parseHello(f.body)
	if !ok || f.kind != kindHello || err != nil {
		fmt.Fprintf(os.Stderr, "no greeting: %v\n", err)
		return 1
	}
	pool, err := h.open(p)
	if err != nil {
		p.send(kindFailed, 0, appendFailure(nil, err), false)
		return 1
	}
	p.send(kindReady, 0, appendInfo(nil, pool.Info()), false)
	if h.mode == modeSign {
		signAll(p, pool, int(h.sessions))
	} else {
		act(p, pool)
	}
	if err := pool.Close(); err != nil {
		fmt.Fprintf(os.Stderr, "closing the token: %v\n", err)
		return 1
	}
	return 0
}

var errNoPIN = errors.New("the parent gave no PIN")

// open loads the module, asks for the PIN, and logs in.
func (h hello) open(p *pipe) (*hsm.Pool, error) {
	c := hsm.Config{
		Module: h.module, Env: map[string]string{}, TokenLabel: h.label, Profile: h.profile, Sessions: int(h.sessions), Writes: h.mode == modeWrite,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Ask: func(i hsm.Info) (hsm.PIN, error) {
			p.send(kindAsk, 0, appendInfo(nil, i), false)
			f, _, ok := p.next(nil)
			if !ok || f.kind != kindPIN {
				return hsm.PIN{}, errNoPIN
			}
			return hsm.NewPIN(string(f.body)), nil
		},
	}
	for _, v := range h.env {
		c.Env[v.name] = v.value
	}
	return hsm.Open(context.Background(), c)
}

// signAll answers until the parent hangs up: each session has a thread, which
// reads a request, signs, and writes the answer, all by itself. A request that
// is handed over costs a switch between threads, 20 to 60 µs.
func signAll(p *pipe, pool *hsm.Pool, sessions int) {
	bound := syscall.NsecToTimeval(patience.Nanoseconds())
	p.alike = pool.Alike
	p.alone = sessions == 1 && syscall.SetsockoptTimeval(pipeFD, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &bound) == nil
	var others sync.WaitGroup
	for range sessions - 1 {
		others.Go(func() { signOn(p, pool) })
	}
	signOn(p, pool)
	others.Wait()
}

// holding is how long an answer may wait for others to be written with it, where
// more requests are queued here: each write wakes the parent, which takes a CPU from
// a child that works. Who has requests queued waits for longer than that anyway.
const holding = 4 * time.Millisecond

// A child that always has work holds its CPU until the kernel next looks, 4 ms on many
// machines, while the parent, which does not interrupt it, waits to see to whoever has
// one request at a time. So while there are such, a child offers its CPU after each turn.
const (
	turn    = time.Millisecond
	sharing = time.Second // after the last urgent request
)

// signOn answers on this thread. Where no other does, answers are held back.
func signOn(p *pipe, pool *hsm.Pool) {
	runtime.LockOSThread()
	ctx := context.Background() // never ends, by which the pool works on this thread; the parent kills what hangs
	var own, reply []byte
	var yielded time.Time
	for {
		f, next, ok := p.next(own)
		if !ok {
			return
		}
		own = f.body
		if f.kind == kindUrgent {
			p.flush() // what is held was to go with an answer that comes soon, which this may not be
		} else if p.shared() && time.Since(yielded) > turn {
			syscall.RawSyscall(syscall.SYS_SCHED_YIELD, 0, 0, 0)
			yielded = time.Now()
		}
		kind := kindDone
		var err error
		reply, err = answer(ctx, pool, f, reply[:0])
		if err != nil {
			kind, reply = kindFailed, appendFailure(reply[:0], err)
		}
		p.send(kind, f.number, reply, p.alone && next)
	}
}

var errKind = errors.New("a worker that signs does nothing else")

// answer does one request that a signing worker knows: none of them writes.
func answer(ctx context.Context, pool *hsm.Pool, f frame, dst []byte) ([]byte, error) {
	switch f.kind {
	case kindSign, kindSuspect, kindUrgent:
		id, digest, opts, err := parseSign(f.body)
		if err != nil {
			return nil, err
		}
		sig, err := pool.Sign(ctx, id, digest, opts)
		return append(dst, sig...), err
	case kindPublic:
		pub, err := pool.PublicKey(ctx, f.body)
		if err != nil {
			return nil, err
		}
		return x509.MarshalPKIXPublicKey(pub)
	case kindPing:
		return dst, pool.Ping(ctx)
	}
	return nil, errKind
}

// act does the one request of an administrative worker. That the parent hangs
// up meanwhile means that nobody waits for it any more.
func act(p *pipe, pool *hsm.Pool) {
	f, _, ok := p.next(nil)
	if !ok {
		return
	}
	clear(p.buf[:p.from]) // it may have been a private key
	defer clear(f.body)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { // ends with the process
		p.next(nil)
		cancel()
	}()
	kind := kindDone
	b, err := write(ctx, pool, f, func(part []byte) { p.send(kindPart, f.number, part, false) })
	if err != nil {
		kind, b = kindFailed, appendFailure(nil, err)
	}
	p.send(kind, f.number, b, false)
}

// write does one act. Of an answer that may be long it gives the first parts to part.
func write(ctx context.Context, pool *hsm.Pool, f frame, part func([]byte)) ([]byte, error) {
	switch f.kind {
	case kindList:
		objects, err := pool.List(ctx)
		if err != nil {
			return nil, err
		}
		return appendObjects(objects, part), nil
	case kindGenerate:
		g, err := parseGeneration(f.body)
		if err != nil {
			return nil, err
		}
		pub, err := pool.Generate(ctx, g.label, g.id, g.algorithm)
		if err != nil {
			return nil, err
		}
		return x509.MarshalPKIXPublicKey(pub)
	case kindImport:
		label, id, key, err := parseImport(f.body)
		if err != nil {
			return nil, err
		}
		pub, err := pool.Import(ctx, label, id, key)
		if err != nil {
			return nil, err
		}
		return x509.MarshalPKIXPublicKey(pub)
	case kindCertificate:
		id, der, err := parseCertificate(f.body)
		if err != nil {
			return nil, err
		}
		return nil, pool.ImportCertificate(ctx, id, der)
	case kindDelete:
		return nil, pool.Delete(ctx, f.body)
	}
	return nil, errors.New("an administrative worker does nothing else")
}

// pipe is the child's end. Its calls block their thread: there is nothing else
// for it to do.
type pipe struct {
	reading sync.Mutex // guards the next six; held while one frame is waited for
	buf     []byte
	from    int // where what has not been taken begins
	to      int // and ends
	looked  int // up to where there is no frame that goes before others
	ran     int // frames that went before others, in a row
	ended   bool
	alone   bool                   // one thread uses the pipe; set before another could
	alike   func(a, b []byte) bool // two keys take as long; likewise

	urgent atomic.Int64 // when the last urgent request came, in Unix nanoseconds

	writing sync.Mutex // guards the next two; held while answers are written
	out     []byte
	oldest  time.Time // when the first of out came
}

// next waits for a frame; its body is copied to own. more: two further ones are
// here already, and the first will take as long. Two, so that the parent can send
// others while the last is worked on: a child that first empties its buffer stands
// still for the time of a round trip. ok is false when the parent
// has hung up.
func (p *pipe) next(own []byte) (f frame, more, ok bool) {
	p.reading.Lock()
	defer p.reading.Unlock()
	p.glance()
	for !p.ended {
		at, f, n, err := p.choose()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			break
		}
		if n > 0 {
			f.body = append(own[:0], f.body...)
			p.remove(at, n)
			return f, p.follows(f), true
		}
		p.compact()
		read, errno := p.read(p.buf[p.to:])
		if errno == syscall.EINTR || errno == syscall.EAGAIN {
			continue
		}
		if errno != 0 || read == 0 {
			break
		}
		p.to += read
	}
	p.ended = true
	return frame{}, false, false
}

// glance reads what has come while the last request was worked on: something may be
// urgent. It does not wait; that the parent has hung up is found when all is done.
func (p *pipe) glance() {
	if p.from == p.to || p.ended {
		return // next waits anyway
	}
	if p.to == len(p.buf) {
		p.compact()
	}
	if p.to == len(p.buf) {
		return
	}
	buf, size := uintptr(unsafe.Pointer(&p.buf[p.to])), uintptr(len(p.buf)-p.to)
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, pipeFD, buf, size, syscall.MSG_DONTWAIT, 0, 0)
	if errno == 0 {
		p.to += int(n)
	}
}

// shared says whether somebody who has one request at a time was here a moment ago.
func (p *pipe) shared() bool {
	return time.Now().UnixNano()-p.urgent.Load() < int64(sharing)
}

// maxRan is how many urgent requests are done in a row while others wait: those are not
// forgotten.
const maxRan = 8

// choose finds the frame whose turn it is, and where it begins; n is its length, 0 where
// none is here.
func (p *pipe) choose() (at int, f frame, n int, err error) {
	first, n, err := parseFrame(p.buf[p.from:p.to])
	if n == 0 || err != nil || p.ran == maxRan {
		p.ran = 0
		return p.from, first, n, err
	}
	for {
		f, m, err := parseFrame(p.buf[p.looked:p.to])
		if m == 0 || err != nil || f.kind == kindSuspect {
			break // an error is met when it is its turn
		}
		if f.kind == kindUrgent {
			p.ran++
			p.urgent.Store(time.Now().UnixNano())
			return p.looked, f, m, nil
		}
		p.looked += m
	}
	p.ran = 0
	return p.from, first, n, nil
}

// remove takes a frame out.
func (p *pipe) remove(at, n int) {
	if at == p.looked {
		p.looked += n
	}
	copy(p.buf[p.from+n:], p.buf[p.from:at])
	p.from += n
}

// compact makes room behind what is here.
func (p *pipe) compact() {
	if p.from == 0 {
		return
	}
	p.to = copy(p.buf, p.buf[p.from:p.to])
	p.looked -= p.from
	p.from = 0
}

// follows is more, for next.
func (p *pipe) follows(f frame) bool {
	g, m, err := parseFrame(p.buf[p.from:p.to])
	if err != nil || m == 0 || !p.likely(f, g) {
		return false
	}
	_, m, err = parseFrame(p.buf[p.from+m : p.to])
	return err == nil && m > 0
}

// patience is how long a child waits for its next request without telling the runtime.
const patience = 5 * time.Millisecond

// read reads what is there, or waits; EAGAIN is that it waited in vain. Where this is the
// only thread that has anything to do the runtime is not told of short waits: it would let
// its monitor sleep, and wake it for each request, to look on 50 times a millisecond. Nor of
// long ones is it to be kept in the dark: it would try to stop us, for a collection of
// garbage, and go on trying.
func (p *pipe) read(b []byte) (int, syscall.Errno) {
	buf, size := uintptr(unsafe.Pointer(&b[0])), uintptr(len(b))
	if p.alone {
		n, _, errno := syscall.RawSyscall(syscall.SYS_READ, pipeFD, buf, size)
		if errno != syscall.EAGAIN {
			return int(n), errno
		}
		wait := [1]unix.PollFd{{Fd: pipeFD, Events: unix.POLLIN}}
		if _, err := unix.Poll(wait[:], -1); err != nil && err != syscall.EINTR {
			return 0, syscall.EIO
		}
	}
	n, _, errno := syscall.Syscall(syscall.SYS_READ, pipeFD, buf, size)
	return int(n), errno
}

// likely says whether g will take as long as f: it is for the same key, or for
// another one of its type and size.
func (p *pipe) likely(f, g frame) bool {
	if f.kind != kindSign || g.kind != kindSign {
		return false
	}
	a, _, _, err := parseSign(f.body)
	if err != nil {
		return false
	}
	b, _, _, err := parseSign(g.body)
	return err == nil && (string(a) == string(b) || p.alike != nil && p.alike(a, b))
}

// send answers a request; hold: another answer comes soon, with which it can be
// written.
func (p *pipe) send(kind byte, number uint32, body []byte, hold bool) {
	p.writing.Lock()
	defer p.writing.Unlock()
	if len(body) > maxBody { // none is
		kind, body = kindFailed, appendFailure(nil, io.ErrShortBuffer)
	}
	if hold {
		if len(p.out) == 0 {
			p.oldest = time.Now()
		} else if time.Since(p.oldest) > holding {
			hold = false
		}
	}
	p.out = appendFrame(p.out, kind, number, body)
	if !hold {
		p.writeOut()
	}
}

// flush writes the answers that are held.
func (p *pipe) flush() {
	p.writing.Lock()
	defer p.writing.Unlock()
	p.writeOut()
}

// writeOut is called with writing held.
func (p *pipe) writeOut() {
	for b := p.out; len(b) > 0; {
		n, err := syscall.Write(pipeFD, b)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			break // the parent is gone, as reading will tell
		}
		b = b[n:]
	}
	p.out = p.out[:0]
}
