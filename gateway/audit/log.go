package audit

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Record is an entry in its canonical form, and what is kept beside it for a while
// and is no part of the log: nil is nothing.
type Record struct{ Entry, Answer []byte }

// Sink stores records in order as the next rows of the log, all or none, and
// returns the number of the first when they are durable. It is never called by two
// goroutines at once. After an error the caller does not know whether they were stored
// (a commit can fail after it took effect); the sink itself finds out by
// reading the last row before it numbers the next, so that there is never a gap.
type Sink func(ctx context.Context, records []Record) (first int64, err error)

// maxBatch bounds the entries of one commit, commitTimeout how long one may take,
// and maxLinger how long one may wait for entries that are announced.
const (
	maxBatch      = 1024
	commitTimeout = 5 * time.Second
	maxLinger     = 50 * time.Millisecond
)

var errPanic = errors.New("the store panicked")

// ErrClosed is returned by Append after Close.
var ErrClosed = errors.New("audit log is closed")

// Log commits entries in groups, so that a durable record costs each request its
// share of one fsync. It is safe for concurrent use.
//
// A group is what came while the commit before ran, and, where many entries are
// announced ([Log.Expect]), what comes of them in the next moment: it is committed
// when it has a quarter of all that are under way, or when one of its entries has waited
// an eighth of the time that it took to come. A caller's entries are committed without
// those of others when they are a quarter of what that one has under way.
// So an entry that comes alone is committed at once, by the goroutine that appends it,
// one of hundreds pays for little of a commit and waits little longer, and who asks for
// one signature at a time neither waits for the hundreds of another nor breaks up their
// groups.
type Log struct {
	sink Sink

	// mu guards the rest. It is held for a few instructions, never during a commit.
	mu         sync.Mutex
	waiting    []*pending // the next group, and those after it
	spare      []*pending // the memory of the last one
	coming     int        // entries that are announced
	callers    map[string]*caller
	ripe       int  // callers that have a quarter of their entries in waiting
	committing bool // somebody is in commit
	closed     bool
	linger     *time.Timer   // calls flush; running while waiting has a group that is not full
	due        time.Time     // when that is, the earliest of the group's
	idle       chan struct{} // closed when closed, and all is committed
}

// caller is what one has under way; one that has nothing is not kept.
type caller struct {
	name            string
	coming, waiting int
	ripe            bool
	late            bool // an entry has waited long enough; of use to take only
}

type pending struct {
	record Record
	by     *caller
	due    time.Time // when it has waited long enough for others
	row    int64
	err    error
	ready  chan struct{}
}

// New starts a log over sink. Close it.
func New(sink Sink) *Log {
	l := &Log{sink: sink, idle: make(chan struct{}), callers: map[string]*caller{}}
	l.linger = time.AfterFunc(time.Hour, l.flush)
	l.linger.Stop()
	return l
}

// Append records e and returns its row once it is durable. There is no context:
// a caller that hangs up cannot cancel a record. After an error it is unknown
// whether the entry was stored; the caller must release nothing. What that
// leaves at worst is a record of a signature that nobody got.
func (l *Log) Append(e Entry) (row int64, err error) {
	return l.append(&pending{record: Record{e.Canonical(), nil}}, e.Principal, nil)
}

// Expected is an entry that will come.
type Expected struct {
	l      *Log
	caller string
	since  time.Time
	gone   bool // it has come, or will not; guarded by l.mu
}

// Expect announces an entry of a caller: others may wait for it. Call Append or
// Cancel of what it returns.
func (l *Log) Expect(caller string) *Expected {
	x := &Expected{l: l, caller: caller, since: time.Now()}
	l.mu.Lock()
	l.coming++
	l.of(caller).coming++
	l.mu.Unlock()
	return x
}

// of is called with mu held; and so is tidy, when what one has may have become less.
func (l *Log) of(name string) *caller {
	c := l.callers[name]
	if c == nil {
		c = &caller{name: name}
		l.callers[name] = c
	}
	return c
}

func (l *Log) tidy(c *caller) {
	l.ripen(c)
	if c.coming == 0 && c.waiting == 0 {
		delete(l.callers, c.name)
	}
}

// Append is [Log.Append] of the entry that was announced, and keeps an answer beside
// its row. It is called once.
func (x *Expected) Append(e Entry, answer []byte) (row int64, err error) {
	return x.l.append(&pending{record: Record{e.Canonical(), answer}}, x.caller, x)
}

// Cancel says that the entry does not come; after Append it does nothing.
func (x *Expected) Cancel() {
	x.l.mu.Lock()
	x.leave()
	if group := x.l.next(); group != nil {
		go x.l.run(group)
	}
	x.l.mu.Unlock()
}

// leave is called with mu held.
func (x *Expected) leave() {
	if x.gone {
		return
	}
	x.gone = true
	x.l.coming--
	c := x.l.of(x.caller)
	c.coming--
	x.l.tidy(c)
}

// ripen is called with mu held, when a caller has more or less waiting, or to come.
func (l *Log) ripen(c *caller) {
	ripe := c.waiting > 0 && 3*c.waiting >= c.coming
	if ripe && !c.ripe {
		l.ripe++
	}
	if !ripe && c.ripe {
		l.ripe--
	}
	c.ripe = ripe
}

func (l *Log) append(p *pending, by string, x *Expected) (row int64, err error) {
	l.mu.Lock()
	if l.closed {
		if x != nil {
			x.leave()
		}
		l.mu.Unlock()
		return 0, ErrClosed
	}
	p.due, p.ready, p.by = time.Now(), make(chan struct{}), l.of(by)
	p.by.waiting++
	l.waiting = append(l.waiting, p)
	if x != nil {
		p.due = p.due.Add(min(p.due.Sub(x.since)/8, maxLinger))
		x.leave()
	}
	l.ripen(p.by)
	group := l.next()
	// The earliest counts: an entry that came fast does not wait for as long as one
	// can that was slow to come.
	if group == nil && !l.committing && (len(l.waiting) == 1 || p.due.Before(l.due)) {
		l.due = p.due
		l.linger.Reset(time.Until(l.due))
	}
	l.mu.Unlock()
	if group != nil {
		l.run(group) // p is in it, or in one after
	}
	<-p.ready
	return p.row, p.err
}

// next takes the next group where one is full and nobody commits. Who gets one
// commits it, and calls done. Called with mu held.
func (l *Log) next() []*pending {
	n := len(l.waiting)
	switch {
	case l.committing || n == 0:
		return nil
	case 3*n >= l.coming || n >= maxBatch || l.closed:
		return l.take(false)
	case l.ripe > 0:
		return l.take(true)
	}
	return nil
}

// take takes the next group, full or not: of all callers, or of those that are ripe or
// have an entry that has waited long enough: where one ripe caller follows the other the
// rest would wait for them. Called with mu held, while nobody commits.
func (l *Log) take(ripe bool) []*pending {
	l.linger.Stop()
	l.committing = true
	group, rest := l.spare[:0], l.waiting[:0]
	l.spare = nil
	if ripe {
		now := time.Now()
		for _, p := range l.waiting {
			p.by.late = p.by.late || !now.Before(p.due)
		}
	}
	for _, p := range l.waiting {
		if len(group) < maxBatch && (p.by.ripe || p.by.late || !ripe) {
			group = append(group, p)
		} else {
			rest = append(rest, p)
		}
	}
	clear(l.waiting[len(rest):])
	l.waiting = rest
	for _, p := range group {
		p.by.waiting--
		p.by.late = false
		l.tidy(p.by)
	}
	return group
}

// done ends the commit of a group. What has become full meanwhile is committed by a
// goroutine of its own: the caller has its answer.
func (l *Log) done(group []*pending) {
	clear(group)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spare, l.committing = group[:0], false
	if group := l.next(); group != nil {
		go l.run(group)
		return
	}
	if len(l.waiting) > 0 {
		l.due = slices.MinFunc(l.waiting, func(a, b *pending) int { return a.due.Compare(b.due) }).due
		l.linger.Reset(time.Until(l.due))
	}
	if l.closed {
		close(l.idle)
	}
}

func (l *Log) run(group []*pending) {
	defer l.done(group) // were the sink to panic, the others must still be answered
	l.commit(group)
}

// flush commits what has lingered.
func (l *Log) flush() {
	l.mu.Lock()
	if l.committing || len(l.waiting) == 0 {
		l.mu.Unlock()
		return
	}
	group := l.take(false)
	l.mu.Unlock()
	l.run(group)
}

// Close waits for every entry that Append has taken to be committed.
func (l *Log) Close() {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		if group := l.next(); group != nil {
			go l.run(group)
		} else if !l.committing {
			close(l.idle)
		}
	}
	l.mu.Unlock()
	<-l.idle
}

func (l *Log) commit(group []*pending) {
	records := make([]Record, len(group))
	for i, p := range group {
		records[i] = p.record
	}
	ctx, cancel := context.WithTimeout(context.Background(), commitTimeout)
	defer cancel()
	row, err := int64(0), errPanic
	defer func() {
		for i, p := range group {
			if err == nil { // a row beside an error would be believed one day
				p.row = row + int64(i)
			} else {
				p.err = fmt.Errorf("recording %d audit entries: %w", len(group), err)
			}
			close(p.ready)
		}
	}()
	row, err = l.sink(ctx, records)
}
