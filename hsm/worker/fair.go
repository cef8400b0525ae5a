package worker

import (
	"container/heap"
	"time"
)

// A flow is the requests of one caller, of which the queue is fair to each.
type flow struct {
	name   string
	weight int // of its last request

	first, last *call // those that wait, first come first served
	waiting     int
	work        time.Duration // what those will take, by estimate
	inside      int           // that wait or are with a worker

	// Of virtual time, which passes by as much for each second of a token's
	// work as a flow of weight 1 is to get of it.
	start  time.Duration // when the first that waits may begin
	finish time.Duration // when the last that began has used up its share

	turn uint64 // among those that may begin at the same moment
	at   int    // in queue.ready
}

// A queue holds calls that no worker has room for. Flows take turns in
// proportion to their weights, by the time that their calls take: start-time
// fair queueing (Goyal, Vin, Cheng 1996), in which a flow that had nothing
// waiting is next when the one that is being served has had its turn. Within a
// flow the first is served first. Each operation takes O(log flows). The zero
// value is not ready for use.
type queue struct {
	flows map[string]*flow // that have calls inside, or have used more than their share
	ready []*flow          // a heap: those that have calls waiting
	now   time.Duration    // virtual: the start of the last that began
	turns uint64

	again    call // a ring: those to be done again, before all others
	waiting  int  // calls, in all
	work     time.Duration
	weights  int // of ready
	active   int // flows that have calls inside
	maxFlows int // to keep before those are looked for that have nothing to remember
}

// minFlows is how many flows are kept without looking which can be forgotten.
const minFlows = 256

func newQueue() *queue {
	q := &queue{flows: map[string]*flow{}, maxFlows: minFlows}
	q.again.prev, q.again.next = &q.again, &q.again
	return q
}

// enter counts a call in, as one of a flow; leave counts it out again, when it
// neither waits any more nor is with a worker.
func (q *queue) enter(c *call, name string, weight int) {
	f := q.flows[name]
	if f == nil {
		f = &flow{name: name, at: -1}
		q.forget()
		q.flows[name] = f
	}
	if f.at >= 0 {
		q.weights += weight - f.weight
	}
	f.weight = weight
	c.flow, c.weight = f, weight
	f.inside++
	if f.inside == 1 {
		q.active++
	}
}

func (q *queue) leave(c *call) {
	f := c.flow
	f.inside--
	if f.inside == 0 {
		q.active--
		if f.finish <= q.now {
			delete(q.flows, f.name)
		}
	}
}

// forget makes room for a new flow: those with nothing inside that have had no
// more than their share by now need not be remembered.
func (q *queue) forget() {
	if len(q.flows) < q.maxFlows {
		return
	}
	for name, f := range q.flows {
		if f.inside == 0 && f.finish <= q.now {
			delete(q.flows, name)
		}
	}
	q.maxFlows = max(minFlows, 2*len(q.flows))
}

// push has a call wait for its turn.
func (q *queue) push(c *call) {
	f := c.flow
	c.queued, c.prev, c.next = true, f.last, nil
	if f.last == nil {
		f.first = c
	} else {
		f.last.next = c
	}
	f.last = c
	f.waiting++
	f.work += c.cost
	q.waiting++
	q.work += c.cost
	if f.at < 0 {
		f.start = max(q.now, f.finish)
		q.turns++
		f.turn = q.turns
		q.weights += f.weight
		heap.Push((*byStart)(q), f)
	}
}

// appendAll appends every call that waits.
func (q *queue) appendAll(to []*call) []*call {
	for c := q.again.next; c != &q.again; c = c.next {
		to = append(to, c)
	}
	for _, f := range q.ready {
		for c := f.first; c != nil; c = c.next {
			to = append(to, c)
		}
	}
	return to
}

// pushFront is for a call that had its turn, and is to be done again.
func (q *queue) pushFront(c *call) {
	c.queued, c.again = true, true
	c.prev, c.next = &q.again, q.again.next
	c.prev.next, c.next.prev = c, c
	q.waiting++
	q.work += c.cost
}

// peek is the call whose turn it is; nil: none waits.
func (q *queue) peek() *call {
	if q.again.next != &q.again {
		return q.again.next
	}
	if len(q.ready) == 0 {
		return nil
	}
	return q.ready[0].first
}

// pop takes that call out, to be given to a worker.
func (q *queue) pop() *call {
	c := q.peek()
	if c.again {
		q.remove(c)
		return c
	}
	f := c.flow
	q.now = f.start
	f.finish = f.start + c.share()
	q.unlink(c)
	if f.first == nil {
		q.unready(f)
		return c
	}
	f.start = f.finish
	q.turns++
	f.turn = q.turns
	heap.Fix((*byStart)(q), f.at)
	return c
}

// begin is pop of a call that did not wait, where none does, or it is urgent.
func (q *queue) begin(c *call) {
	f := c.flow
	q.now = max(q.now, f.finish)
	f.finish = q.now + c.share()
}

// urgent says whether a call is to go before those that workers have already: of a flow
// that has had no more than its share, and has no other waiting, while others are there.
func (q *queue) urgent(c *call) bool {
	f := c.flow
	if q.active < 2 || c.kind != kindSign || c.suspect || c.again {
		return false
	}
	if c.queued {
		return f.waiting == 1 && f.start <= q.now
	}
	return f.waiting == 0 && f.finish <= q.now
}

// share is how much virtual time a call takes of its flow.
func (c *call) share() time.Duration { return c.cost / time.Duration(c.weight) }

// remove takes a call out that nobody waits for any more.
func (q *queue) remove(c *call) {
	if !c.again {
		q.unlink(c)
		if c.flow.first == nil {
			q.unready(c.flow)
		}
		return
	}
	c.prev.next, c.next.prev = c.next, c.prev
	c.queued, c.again, c.prev, c.next = false, false, nil, nil
	q.waiting--
	q.work -= c.cost
}

func (q *queue) unlink(c *call) {
	f := c.flow
	if c.prev == nil {
		f.first = c.next
	} else {
		c.prev.next = c.next
	}
	if c.next == nil {
		f.last = c.prev
	} else {
		c.next.prev = c.prev
	}
	c.queued, c.prev, c.next = false, nil, nil
	f.waiting--
	f.work -= c.cost
	q.waiting--
	q.work -= c.cost
}

func (q *queue) unready(f *flow) {
	heap.Remove((*byStart)(q), f.at)
	q.weights -= f.weight
}

// byStart is queue.ready as a heap.
type byStart queue

func (h *byStart) Len() int { return len(h.ready) }

func (h *byStart) Less(i, j int) bool {
	a, b := h.ready[i], h.ready[j]
	return a.start < b.start || a.start == b.start && a.turn < b.turn
}

func (h *byStart) Swap(i, j int) {
	h.ready[i], h.ready[j] = h.ready[j], h.ready[i]
	h.ready[i].at, h.ready[j].at = i, j
}

func (h *byStart) Push(x any) {
	f := x.(*flow)
	f.at = len(h.ready)
	h.ready = append(h.ready, f)
}

func (h *byStart) Pop() any {
	n := len(h.ready) - 1
	f := h.ready[n]
	h.ready[n] = nil
	h.ready = h.ready[:n]
	f.at = -1
	return f
}
