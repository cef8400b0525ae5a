package worker

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/signwarden/signwarden/hsm"
)

// A process is one child, and our end of its pipe.
type process struct {
	t      *Token
	cmd    *exec.Cmd
	log    *slog.Logger
	conn   *os.File
	raw    syscall.RawConn // of conn
	stderr *os.File
	said   sync.WaitGroup // the goroutine that logs stderr
	info   hsm.Info
	born   time.Time
	retire chan struct{} // capacity 1: it is to be replaced
	dead   chan struct{} // closed when it is gone and reaped

	// Token.mu guards these.
	inFlight []*call       // in the order in which it does them
	load     time.Duration // what those will take, by estimate
	number   uint32        // of the last one
	progress time.Time
	answered int64
	hung     bool          // killed for it
	stalled  bool          // it is late with an answer
	lent     chan struct{} // an administrative worker gets its sessions, until this is closed; nil: none
	why      Cause         // of its end, where it is to end
	draining bool          // it gets no more
	drained  chan struct{} // closed when it is draining and has answered all
	out      []byte        // frames that nobody is writing
	spare    []byte        // the other of the two buffers
	flushing bool          // somebody writes, and will write out too

	// Who flushes has these.
	writing []byte
	wrote   int
	failed  error
	write   func(fd uintptr) bool
}

// passed are the variables of our environment that a child gets: enough for a
// module to find its user's files, and nothing that could be a secret. What a
// module needs besides is in the configuration.
var passed = []string{"PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR"}

// environment is a child's. Config.Env goes through the pipe, but what the
// dynamic linker reads has to be there at the start.
func environment(c Config) []string {
	env := []string{}
	for _, name := range passed {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	for name, v := range c.Env {
		if strings.HasPrefix(name, "LD_") {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// spawn starts a child. It has said nothing yet.
func (t *Token) spawn() (*process, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("starting a worker: socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "worker's pipe") // stays blocking
	defer theirs.Close()
	if err := syscall.SetNonblock(fds[0], true); err != nil {
		syscall.Close(fds[0])
		return nil, fmt.Errorf("starting a worker: %w", err)
	}
	p := &process{
		t: t, conn: os.NewFile(uintptr(fds[0]), "pipe to worker"),
		retire: make(chan struct{}, 1), dead: make(chan struct{}), drained: make(chan struct{}),
	}
	p.write = p.writeOnce
	if p.raw, err = p.conn.SyscallConn(); err != nil {
		p.conn.Close()
		return nil, fmt.Errorf("starting a worker: %w", err)
	}
	var say *os.File
	if p.stderr, say, err = os.Pipe(); err != nil {
		p.conn.Close()
		return nil, fmt.Errorf("starting a worker: %w", err)
	}
	defer say.Close()
	p.cmd = &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{os.Args[0], Command}, Env: environment(t.c), Dir: "/",
		Stdout: say, Stderr: say, ExtraFiles: []*os.File{theirs},
		// A group of its own: the Ctrl-C of a terminal is for us, who drain.
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL},
	}
	t.threads.run(func() { err = p.cmd.Start() })
	if err != nil {
		p.conn.Close()
		p.stderr.Close()
		return nil, fmt.Errorf("starting a worker: %w", err)
	}
	p.born = time.Now()
	p.log = t.log.With("worker", p.pid())
	p.said.Go(func() { logLines(p.log, p.stderr) })
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// kill makes the child end; its reader sees to what follows.
func (p *process) kill() { p.cmd.Process.Kill() }

// hangUp tells the child that nothing more comes; it ends when it has answered.
func (p *process) hangUp() {
	p.raw.Control(func(fd uintptr) { syscall.Shutdown(int(fd), syscall.SHUT_WR) })
}

// bury waits for a child that has been killed, or ends by itself, and for its
// last words. Only one goroutine of a process calls it, once: until it does,
// the pid is the child's.
func (p *process) bury() {
	// The group too: a module may have started processes of its own.
	syscall.Kill(-p.pid(), syscall.SIGKILL)
	p.kill() // where it has died before it had its group
	p.cmd.Wait()
	p.conn.Close()
	p.stderr.SetReadDeadline(time.Now().Add(time.Second)) // whoever has inherited it
	p.said.Wait()
	p.stderr.Close()
	close(p.dead)
}

// give hands the child a request. Flush it then. Called with Token.mu held.
func (p *process) give(c *call) {
	p.number++
	c.number = p.number
	if len(p.inFlight) == 0 {
		p.progress = time.Now()
	}
	if p.t.c.Observer != nil {
		c.given = time.Now()
	}
	p.inFlight = slices.Insert(p.inFlight, p.place(c), c)
	p.load += c.cost
	kind := c.kind
	switch {
	case kind == kindSign && c.suspect:
		kind = kindSuspect
	case c.urgent:
		kind = kindUrgent
	}
	p.out = appendFrame(p.out, kind, c.number, c.body)
}

// place is where among those that the child has it will do c; it has begun the first.
// Called with Token.mu held.
func (p *process) place(c *call) int {
	at := len(p.inFlight)
	for c.urgent && at > p.t.c.Sessions && !p.inFlight[at-1].urgent && !p.inFlight[at-1].suspect {
		at--
	}
	return at
}

// urgent is how many of those that it has are. Called with Token.mu held.
func (p *process) urgent() (n int) {
	for _, c := range p.inFlight {
		if c.urgent {
			n++
		}
	}
	return n
}

// disown forgets the caller of a request that the child has; false where it
// does not have it. Called with Token.mu held.
func (p *process) disown(c *call) bool {
	i := slices.Index(p.inFlight, c)
	if i < 0 {
		return false
	}
	p.inFlight[i] = &call{kind: c.kind, number: c.number, suspect: c.suspect, urgent: c.urgent, cost: c.cost, price: c.price} // done is nil
	return true
}

// flush writes what waits to be written, unless somebody else does. It never
// waits for the child: its callers have deadlines.
func (p *process) flush() {
	if !p.swap(true) {
		return
	}
	for {
		if err := p.raw.Write(p.write); err != nil {
			p.failed = err // the pipe is closed: the reader has seen to all
		}
		if p.failed == nil && p.wrote < len(p.writing) {
			p.t.running.Go(p.flushSlowly)
			return
		}
		if !p.swap(false) {
			return
		}
	}
}

// writeOnce is called with the descriptor, which does not block.
func (p *process) writeOnce(fd uintptr) bool {
	n, err := syscall.Write(int(fd), p.writing[p.wrote:])
	p.wrote += max(n, 0)
	if err != nil && !errors.Is(err, syscall.EAGAIN) && !errors.Is(err, syscall.EINTR) {
		p.failed = err
	}
	return true
}

// flushSlowly is for a child that does not read: it waits.
func (p *process) flushSlowly() {
	for more := true; more; more = p.swap(false) {
		if _, err := p.conn.Write(p.writing[p.wrote:]); err != nil {
			p.failed = err
		}
	}
}

// swap takes what is to be written; false where that is nothing, or somebody
// else writes. begin: the caller does not write yet.
func (p *process) swap(begin bool) bool {
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	if begin && p.flushing {
		return false
	}
	if !begin {
		p.spare = p.writing[:0]
	}
	p.flushing = len(p.out) > 0
	if !p.flushing {
		return false
	}
	p.writing, p.out, p.wrote, p.failed = p.out, p.spare[:0], 0, nil
	p.spare = nil
	return true
}

// serve reads answers until the child is gone.
func (p *process) serve() {
	buf := make([]byte, maxFrame)
	fill := 0
	var err error
	for err == nil {
		var n int
		n, err = p.conn.Read(buf[fill:])
		fill += n
		if n > 0 {
			used, bad := p.t.take(p, buf[:fill])
			fill = copy(buf, buf[used:fill])
			if bad != nil {
				err = bad
			}
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	p.t.lose(p, err)
}

// take looks at the answers in b, tells the callers, and gives the child what
// waits. It returns how much of b it has read.
func (t *Token) take(p *process, b []byte) (used int, err error) {
	var last *call // of a list of those to tell, by prev
	now := time.Now()
	var worth time.Duration // of what is answered, by its prices
	var some [16]lesson
	lessons := some[:0]
	t.mu.Lock()
	busy := len(p.inFlight)
	for {
		f, n, ferr := parseFrame(b[used:])
		if n == 0 || ferr != nil {
			err = ferr
			break
		}
		used += n
		i := slices.IndexFunc(p.inFlight, func(c *call) bool { return c.number == f.number })
		if i < 0 {
			err = fmt.Errorf("%w: an answer to no request", errFrame)
			break
		}
		c := p.inFlight[i]
		p.inFlight = slices.Delete(p.inFlight, i, i+1)
		p.load -= c.cost
		p.answered++
		worth += c.cost
		if f.kind == kindDone && c.price != nil && c.kind == kindSign {
			lessons = append(lessons, lesson{c.price, c.cost})
		}
		c, err = t.settle(p, c, f)
		if err != nil {
			break
		}
		if c != nil && t.c.Observer != nil && c.kind == kindSign {
			t.c.Observer.Answered(c.given.Sub(c.at), now.Sub(c.given))
		}
		if c != nil {
			t.waiting.leave(c)
			c.prev, last = last, c
		}
	}
	t.learned(p, lessons, worth, now, busy)
	t.advance(p, now, used > 0)
	if n := t.c.RecycleOps; n > 0 && p.answered >= n && !p.draining {
		p.replace(CauseRecycled)
	}
	var few [4]*process
	fed := t.feed(few[:0])
	p.checkDrained()
	t.mu.Unlock()
	// The children first: they have work then while callers wake.
	for _, q := range fed {
		q.flush()
	}
	for c := last; c != nil; {
		before := c.prev
		c.prev, c.flow, c.price = nil, nil, nil
		c.done <- struct{}{} // whose caller may use c for something else then
		c = before
	}
	return used, err
}

// settle puts an answer into its call, and returns that for its caller to be told;
// nil where there is nobody to tell, or the call is done again. mu is held.
func (t *Token) settle(p *process, c *call, f frame) (tell *call, err error) {
	switch f.kind {
	case kindDone:
		if c.twin != nil {
			c = t.reunite(c)
		}
		c.answer, c.err = bytes.Clone(f.body), nil
	case kindFailed:
		fail, err := parseFailure(f.body)
		if err != nil {
			t.again(p, c)
			return nil, err
		}
		c.answer, c.err = nil, fail
		if c.kind == kindSign && fail.cause == hsm.ErrNotFound {
			t.doubt()
		}
		if e, ok := fail.cause.(*hsm.Error); ok && t.blame(p, c, e) {
			return nil, nil
		}
	default:
		t.again(p, c)
		return nil, fmt.Errorf("%w: an answer of kind %d", errFrame, f.kind)
	}
	if c.done == nil {
		return nil, nil
	}
	c.shun = nil
	c.layGhosts()
	return c, nil
}

// maxGone is how many more workers are asked where one says that the token, or each
// session of it, does not work: a device that fails one call of a hundred fails two in a row of one request in
// ten thousand.
const maxGone = 2

// blame does what the class of an error asks of the worker that gave it. It
// returns true where the request is done again, by another one. mu is held.
func (t *Token) blame(p *process, c *call, e *hsm.Error) bool {
	switch e.Class {
	case hsm.ClassLogin:
		// A child does not log in again: its successor does, when it is its turn,
		// or N children would each try a PIN that is no longer right.
		p.draining = true
		p.replace(CauseLogin)
		if c.done == nil || t.closed || c.outs > t.c.Workers {
			return false
		}
		c.outs++
		c.shun = p
		t.waiting.pushFront(c)
		return true
	case hsm.ClassOperator:
		// It does nothing more. Whether the PIN is still right its successor learns,
		// by one try for all.
		p.draining = true
		p.replace(CauseLogin)
	case hsm.ClassGone, hsm.ClassStuck, hsm.ClassSession:
		// It takes a new process for most modules to see a token again. And where a new
		// session did not help, one may.
		p.replace(CauseToken)
		if c.done == nil || t.closed || c.gone == maxGone {
			return false
		}
		c.gone++
		c.shun = p
		t.waiting.pushFront(c)
		return true
	default:
		return false
	}
	if c.done == nil || c.tries > 0 || t.closed {
		return false
	}
	t.again(p, c)
	return true
}

// again puts a call that p failed in front of those that wait; mu is held.
func (t *Token) again(p *process, c *call) {
	if c.done == nil {
		return
	}
	c.tries++
	c.shun = p
	t.waiting.pushFront(c)
}

// ended says whether the child has closed its end of the pipe, which its reader will
// find. It does not wait.
func (p *process) ended() (ended bool) {
	p.raw.Control(func(fd uintptr) {
		var b [1]byte
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		ended = n == 0 && err == nil || err == syscall.ECONNRESET // it had not read all
	})
	return ended
}

// lose is called when a child is gone, or talks nonsense. What it had is given
// to others.
func (t *Token) lose(p *process, cause error) {
	t.mu.Lock()
	t.live = slices.DeleteFunc(t.live, func(q *process) bool { return q == p })
	for _, q := range t.live {
		if q.ended() { // at the same time, and nothing that is given to it now is to blame
			q.stalled = true
		}
	}
	lost := p.inFlight
	p.inFlight = nil
	var failed []*call
	for i, c := range slices.Backward(lost) { // so that the first is in front in the end
		// The first was being worked on, and the others had only been sent; unless it was
		// done and its answer held, which no answer is before one that is suspect.
		culprit := i < t.c.Sessions && (c.suspect || len(lost) == 1)
		ghost := c.done == nil
		if ghost {
			if c = c.twin; c == nil {
				continue
			}
		}
		if culprit {
			c.tries++
			c.shun = p
		}
		c.suspect = true
		switch {
		case c.tries > 1 || t.closed:
			if ghost {
				t.takeBack(c)
			}
			c.layGhosts()
			t.waiting.leave(c)
			failed = append(failed, c)
		case !ghost:
			t.waiting.pushFront(c)
		}
	}
	hung, draining, why := p.hung, p.draining, p.why
	if t.closed {
		why = CauseClosed
	}
	fed := t.feed(nil)
	if err := t.unable(); err != nil {
		t.failWaiting(err)
	}
	t.mu.Unlock()
	for _, q := range fed {
		q.flush()
	}
	for _, c := range failed {
		if c.tries > 1 {
			c.finish(nil, ErrCrashed)
		} else {
			c.finish(nil, hsm.ErrClosed)
		}
	}
	p.bury()
	switch {
	case hung:
		t.ended(CauseHung)
		p.log.Error("worker hung and was killed", slog.Int("requests", len(lost)))
	case draining && cause == nil && p.cmd.ProcessState.Success():
		t.ended(why)
		p.log.Info("worker ended", slog.Int64("answered", p.answered))
	default:
		t.ended(CauseCrashed)
		p.log.Error("worker died", slog.String("state", p.cmd.ProcessState.String()), slog.Int("requests", len(lost)), slog.Any("error", cause))
	}
}

// replace has the child's keeper start a successor, and notes why; Token.mu is
// held.
func (p *process) replace(why Cause) {
	p.why = why
	p.notify()
}

// notify wakes the child's keeper.
func (p *process) notify() {
	select {
	case p.retire <- struct{}{}:
	default: // it knows
	}
}

// checkDrained is called with Token.mu held.
func (p *process) checkDrained() {
	if !p.draining || len(p.inFlight) > 0 {
		return
	}
	select {
	case <-p.drained:
	default:
		close(p.drained)
	}
}
