package worker

import (
	"slices"
	"time"
)

// A call into a module cannot be cancelled, and who waits for one that hangs has a
// deadline. So a worker that is late is not waited for: what it has is asked of
// others, and its successor starts. It may still answer; whose answer comes first
// counts. It is killed after CallTimeout only, for a token may take its time.
//
// Late is what is much later than the slowest answer of the last while: no
// configuration would fit both a token in memory, of a millisecond, and one at the
// other end of a network.
const (
	lateFactor = 4
	minLate    = 400 * time.Millisecond
	// slowFade is the time in which what was slow is forgotten, by half.
	slowFade = 10 * time.Second
	// maxMoves bounds how often a call is asked of one more worker.
	maxMoves = 2
	// hurryFor is how long after its last answer a token is trusted to answer.
	hurryFor = 5 * time.Second
	// watchEvery is how often the watchdog looks.
	watchEvery = 50 * time.Millisecond
)

// late is how long a worker may take for one answer before it stalls; mu is held.
func (t *Token) late() time.Duration {
	return min(max(lateFactor*t.slowest, minLate), t.c.CallTimeout)
}

// advance notes that p has answered; mu is held.
func (t *Token) advance(p *process, now time.Time, answered bool) {
	if answered {
		t.slowest = max(t.slowest, now.Sub(p.progress))
		t.lastly = now
	}
	p.progress, p.stalled = now, false
}

// hurried says whether p is to have a successor because it stalls: the token answers
// others, or did a moment ago. Where it answers nobody a new process is no help, and
// each costs the token a login. So one more for each worker is all that start at once:
// beyond those, while others that stalled are still there, one starts in maxPause, and
// after one that did not come up there is that pause too. mu is held.
func (t *Token) hurried(p *process) bool {
	if !p.stalled || p.draining || time.Since(t.lastly) >= hurryFor || time.Since(t.hurryFailed) < maxPause {
		return false
	}
	more := 0
	for _, q := range t.live {
		if q != p && q.why == CauseStalled {
			more++
		}
	}
	return more < t.c.Workers || time.Since(t.hurriedAt) >= maxPause
}

// startTimes tell how long the start of a child may take. One that hangs keeps all
// others from starting.
type startTimes struct {
	slowest time.Duration
	cut     int // starts that took too long, since one that did not
}

const (
	startFactor = 8
	minStart    = 600 * time.Millisecond
	// shortStart is up to where the bound doubles: a token that answers again is found
	// when the start that hangs since before has met its bound.
	shortStart = 2 * time.Second
)

// patient says whether the next start has all of StartTimeout after so many that were
// cut: a token may take far longer than it used to. The 8th has, the 16th, the 32nd,
// and each 64th: the longer a token hangs, the rarer does its return meet one of those.
func patient(cut int) bool {
	return cut >= 8 && cut&(cut-1) == 0 || cut > 0 && cut%64 == 0
}

// startBound is how long a child may take now.
func (t *Token) startBound() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.begins.slowest == 0 || patient(t.begins.cut) {
		return t.c.StartTimeout
	}
	usual := max(startFactor*t.begins.slowest, minStart)
	return min(max(usual, min(usual<<min(t.begins.cut, 2), shortStart)), t.c.StartTimeout)
}

// started notes how long a child took, or that it did not come up in its time.
func (t *Token) started(took time.Duration, late bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if late {
		t.begins.cut++
		return
	}
	t.begins.cut = 0
	t.begins.slowest = max(took, t.begins.slowest-t.begins.slowest/8)
}

// watch is the watchdog, until stop is closed.
func (t *Token) watch(stop <-chan struct{}) {
	every := max(min(t.c.CallTimeout/8, watchEvery), time.Millisecond)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-stop:
			return
		}
		var few [4]*process
		for _, q := range t.look(every, few[:0]) {
			q.flush()
		}
	}
}

// look looks after each worker once, and returns those to flush.
func (t *Token) look(every time.Duration, fed []*process) []*process {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.slowest -= time.Duration(float64(t.slowest) * 0.7 * float64(every) / float64(slowFade)) // 0.7: ln 2
	moved := false
	for _, p := range t.live {
		idle := time.Since(p.progress)
		switch {
		case len(p.inFlight) == 0:
			if t.c.KeepAlive > 0 && idle > t.c.KeepAlive && !p.draining {
				p.give(&call{kind: kindPing})
				fed = append(fed, p)
			}
		case idle > t.c.CallTimeout:
			p.hung = true
			p.kill()
		case idle > t.late() && !p.stalled:
			p.stalled = true
			t.move(p)
			p.notify()
			moved = true
		case t.hurried(p): // which it was not when it began to stall
			p.notify()
		}
	}
	if moved {
		fed = t.feed(fed)
	}
	return fed
}

// move puts what a worker has in front of what waits, and leaves ghosts; mu is held.
func (t *Token) move(p *process) {
	for i, c := range slices.Backward(p.inFlight) { // so that the first is in front in the end
		if c.done == nil || len(c.ghosts) >= maxMoves || t.closed {
			continue
		}
		ghost := &call{kind: c.kind, number: c.number, suspect: c.suspect, urgent: c.urgent, twin: c, cost: c.cost, price: c.price}
		p.inFlight[i] = ghost
		c.ghosts = append(c.ghosts, ghost)
		c.suspect = true
		c.shun = p
		t.waiting.pushFront(c)
	}
}

// reunite takes a ghost's twin from wherever it is, for its answer is here; mu is held.
func (t *Token) reunite(ghost *call) *call {
	c := ghost.twin
	t.takeBack(c)
	return c
}

// layGhosts is called when a call is answered, or nobody waits for it; mu is held.
func (c *call) layGhosts() {
	for _, g := range c.ghosts {
		g.twin = nil
	}
	c.ghosts = c.ghosts[:0]
}
