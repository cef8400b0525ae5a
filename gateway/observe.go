package gateway

import (
	"context"
	"fmt"
	"time"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// A Stage is a part of a signature's way through the gateway that is timed.
type Stage byte

const (
	StageToken  Stage = iota // at the token, waiting for it included
	StageVerify              // of what the token returned
	StageAudit               // until the record is durable
	Stages      = iota
)

func (s Stage) String() string { return [Stages]string{"token", "verify", "audit"}[s] }

// Observer is told what becomes of requests, and what it took. Its methods are
// called on the way of each signature, by many goroutines: they return at once.
type Observer interface {
	// Stage tells how long a stage took, whatever its outcome.
	Stage(s Stage, took time.Duration)
	// Ended tells that Sign has returned, with which error.
	Ended(err error, took time.Duration)
	// Committed tells of one commit of audit entries.
	Committed(entries int, took time.Duration, err error)
}

// stage tells the observer how long a stage took that began at since, and
// returns when it ended. Where nobody observes, no clock is read.
func (g *Gateway) stage(s Stage, since time.Time) time.Time {
	if g.c.Observer == nil {
		return since
	}
	now := time.Now()
	g.c.Observer.Stage(s, now.Sub(since))
	return now
}

func (g *Gateway) clock() time.Time {
	if g.c.Observer == nil {
		return time.Time{}
	}
	return time.Now()
}

// observed is sink, told of to the observer, and remembered by Ready.
func (g *Gateway) observed(sink audit.Sink) audit.Sink {
	return func(ctx context.Context, records []audit.Record) (int64, error) {
		began := time.Now()
		row, err := sink(ctx, records)
		g.failing.Store(err != nil)
		if g.c.Observer != nil {
			g.c.Observer.Committed(len(records), time.Since(began), err)
		}
		return row, err
	}
}

// InFlight is how many requests are between admission and answer.
func (g *Gateway) InFlight() int {
	g.gate.mu.Lock()
	defer g.gate.mu.Unlock()
	return g.gate.all
}

// Ready returns nil where the store has taken what was recorded last. Where it
// has not, Ready records that it takes records again, or returns why it does
// not: so a gateway to which nobody sends requests, since it is not ready, finds
// out when it is. What keeps one ready is not asked: that costs no commit.
func (g *Gateway) Ready(ctx context.Context) error {
	if g.failing.Load() {
		_, err := g.audit.Append(audit.Entry{
			Time: g.c.Now(), Action: "store.recover", Outcome: audit.Done, Principal: "signwardend", FrontEnd: "health",
			Detail: "the store failed, and records again",
		})
		if err != nil {
			return fmt.Errorf("%w: its store fails: %w", sigerr.Unavailable, err)
		}
	}
	_, err := g.current(ctx)
	return err
}
