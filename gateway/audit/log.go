package audit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Record is an entry in its canonical form, and what is kept beside it for a while
// and is no part of the log: nil is nothing.
type Record struct{ Entry, Answer []byte }

// Sink stores records in order as the next rows of the log, all or none, and
// returns the number of the first when they are durable. It is called from one
// goroutine. After an error the caller does not know whether they were stored
// (a commit can fail after it took effect); the sink itself finds out by
// reading the last row before it numbers the next, so that there is never a gap.
type Sink func(ctx context.Context, records []Record) (first int64, err error)

// maxBatch bounds the entries of one commit, and commitTimeout how long one may take.
const (
	maxBatch      = 1024
	commitTimeout = 5 * time.Second
)

// ErrClosed is returned by Append after Close.
var ErrClosed = errors.New("audit log is closed")

// Log commits entries in groups: all that wait while one commit runs go into
// the next, so a durable record costs each request its share of one fsync.
// It is safe for concurrent use.
type Log struct {
	sink Sink

	// mu guards closed and is held in Append only for the time of handing over: a
	// moment, or up to one commit where the queue is full. It makes a send on a
	// closed channel impossible. run never takes it, so the queue always drains.
	mu     sync.RWMutex
	closed bool
	queue  chan *pending
	done   chan struct{}
}

type pending struct {
	record Record
	row    int64
	err    error
	ready  chan struct{}
}

// New starts a log over sink. Close it.
func New(sink Sink) *Log {
	l := &Log{sink: sink, queue: make(chan *pending, maxBatch), done: make(chan struct{})}
	go l.run()
	return l
}

// Append records e and returns its row once it is durable. There is no context:
// a caller that hangs up cannot cancel a record. After an error it is unknown
// whether the entry was stored; the caller must release nothing. What that
// leaves at worst is a record of a signature that nobody got.
func (l *Log) Append(e Entry) (row int64, err error) { return l.AppendAnswer(e, nil) }

// AppendAnswer is Append, and keeps an answer beside the row.
func (l *Log) AppendAnswer(e Entry, answer []byte) (row int64, err error) {
	p := &pending{record: Record{e.Canonical(), answer}, ready: make(chan struct{})}
	l.mu.RLock()
	if l.closed {
		l.mu.RUnlock()
		return 0, ErrClosed
	}
	l.queue <- p
	l.mu.RUnlock()
	<-p.ready
	return p.row, p.err
}

// Close waits for every entry that Append has taken to be committed.
func (l *Log) Close() {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.queue)
	}
	l.mu.Unlock()
	<-l.done
}

func (l *Log) run() {
	defer close(l.done)
	batch := make([]*pending, 0, maxBatch)
	records := make([]Record, 0, maxBatch)
	for first := range l.queue {
		batch, records = append(batch[:0], first), append(records[:0], first.record)
	gather:
		for len(batch) < maxBatch {
			select {
			case p, ok := <-l.queue:
				if !ok {
					break gather
				}
				batch, records = append(batch, p), append(records, p.record)
			default:
				break gather
			}
		}
		l.commit(batch, records)
	}
}

func (l *Log) commit(batch []*pending, records []Record) {
	ctx, cancel := context.WithTimeout(context.Background(), commitTimeout)
	defer cancel()
	row, err := l.sink(ctx, records)
	if err != nil {
		err = fmt.Errorf("recording %d audit entries: %w", len(batch), err)
	}
	for i, p := range batch {
		if err == nil { // a row beside an error would be believed one day
			p.row = row + int64(i)
		}
		p.err = err
		close(p.ready)
	}
}
