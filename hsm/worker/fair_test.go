package worker

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// waits has a call of a flow wait in q.
func waits(q *queue, name string, weight int, cost time.Duration) *call {
	c := &call{done: make(chan struct{}, 1), cost: cost}
	q.enter(c, name, weight)
	q.push(c)
	return c
}

// served takes n calls out and returns the names of their flows.
func served(q *queue, n int) string {
	var b strings.Builder
	for range n {
		c := q.pop()
		b.WriteString(c.flow.name)
		q.leave(c)
	}
	return b.String()
}

func TestFairOrder(t *testing.T) {
	const ms = time.Millisecond
	for _, tt := range []struct {
		name string
		do   func(q *queue) string
		want string
	}{
		{"first come first served within a flow", func(q *queue) string {
			first := waits(q, "a", 1, ms)
			waits(q, "a", 1, ms)
			return fmt.Sprintln(q.peek() == first) + served(q, 2)
		}, "true\naa"},
		{"turns", func(q *queue) string {
			for range 4 {
				waits(q, "a", 1, ms)
			}
			for range 4 {
				waits(q, "b", 1, ms)
			}
			return served(q, 8)
		}, "abababab"},
		{"by weight", func(q *queue) string {
			for range 6 {
				waits(q, "a", 1, ms)
				waits(q, "b", 2, ms)
			}
			return served(q, 8)
		}, "abbabbab"},
		{"by time, not number", func(q *queue) string {
			for range 4 {
				waits(q, "a", 1, 4*ms)
			}
			for range 8 {
				waits(q, "b", 1, ms)
			}
			return served(q, 10)
		}, "abbbbabbbb"},
		{"who comes late is next, and gets nothing for having been away", func(q *queue) string {
			for range 100 {
				waits(q, "a", 1, ms)
			}
			s := served(q, 50)
			for range 3 {
				waits(q, "b", 1, ms)
			}
			return s[:1] + served(q, 7)
		}, "abababaa"},
		{"one at a time against a flood", func(q *queue) string {
			for range 20 {
				waits(q, "a", 1, ms)
			}
			s := served(q, 3)
			for range 3 {
				waits(q, "b", 1, ms)
				s += served(q, 2)
			}
			return s
		}, "aaabababa"},
		{"what is done again goes first, in its order", func(q *queue) string {
			waits(q, "a", 1, ms)
			b, c := waits(q, "b", 1, ms), waits(q, "c", 1, ms)
			q.remove(b)
			q.remove(c)
			q.pushFront(c)
			q.pushFront(b)
			return served(q, 3)
		}, "bca"},
		{"whose caller has left", func(q *queue) string {
			a, b := waits(q, "a", 1, ms), waits(q, "b", 1, ms)
			waits(q, "a", 1, ms)
			for _, c := range []*call{a, b} {
				q.remove(c)
				q.leave(c)
			}
			return fmt.Sprintln(q.waiting, q.weights, q.active) + served(q, 1)
		}, "1 1 1\na"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.do(newQueue()); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

// Whatever happens, the sums are right, and what has left is forgotten.
func TestFairSums(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	q := newQueue()
	var in, again []*call
	for i := range 200_000 {
		switch n := r.IntN(10); {
		case n < 4:
			in = append(in, waits(q, fmt.Sprint(r.IntN(3000)), 1+r.IntN(100), time.Duration(1+r.IntN(1000))*time.Microsecond))
		case n < 7 && q.waiting > 0:
			c := q.pop()
			if r.IntN(10) == 0 {
				q.pushFront(c)
				again = append(again, c)
				continue
			}
			q.leave(c)
		case len(in) > 0:
			k := r.IntN(len(in))
			if c := in[k]; c.queued {
				q.remove(c)
				q.leave(c)
			}
			in = append(in[:k], in[k+1:]...)
		}
		if i%1000 != 0 {
			continue
		}
		waiting, work, weights, active := 0, time.Duration(0), 0, 0
		for _, f := range q.flows {
			n := 0
			for c := f.first; c != nil; c = c.next {
				n++
				work += c.cost
			}
			waiting += n
			if n > 0 {
				weights += f.weight
			}
			if f.inside > 0 {
				active++
			}
			if n != f.waiting || n > 0 != (f.at >= 0) {
				t.Fatalf("flow %s has %d waiting, and says %d; at %d", f.name, n, f.waiting, f.at)
			}
		}
		for c := q.again.next; c != &q.again; c = c.next {
			waiting++
			work += c.cost
		}
		if waiting != q.waiting || work != q.work || weights != q.weights || active != q.active {
			t.Fatalf("%d waiting, work %v, weights %d, active %d; the queue says %d, %v, %d, %d",
				waiting, work, weights, active, q.waiting, q.work, q.weights, q.active)
		}
	}
	for q.waiting > 0 {
		q.leave(q.pop())
	}
	if len(again) == 0 || q.work != 0 || q.weights != 0 || q.active != 0 || len(q.flows) > q.maxFlows {
		t.Errorf("empty: work %v, weights %d, active %d, %d flows of %d", q.work, q.weights, q.active, len(q.flows), q.maxFlows)
	}
}

// Among flows that always have something waiting, time is shared by weight.
func TestFairShares(t *testing.T) {
	q := newQueue()
	flows := []struct {
		name   string
		weight int
		cost   time.Duration
	}{{"a", 1, 5 * time.Millisecond}, {"b", 2, 100 * time.Microsecond}, {"c", 5, time.Millisecond}}
	got := map[string]time.Duration{}
	for _, f := range flows {
		waits(q, f.name, f.weight, f.cost)
		waits(q, f.name, f.weight, f.cost)
	}
	for range 100_000 {
		c := q.pop()
		got[c.flow.name] += c.cost
		waits(q, c.flow.name, c.weight, c.cost)
		q.leave(c)
	}
	for _, f := range flows[1:] {
		ratio := float64(got[f.name]) / float64(got["a"])
		if want := float64(f.weight); ratio < 0.99*want || ratio > 1.01*want {
			t.Errorf("%s with weight %d got %.3f times what a got", f.name, f.weight, ratio)
		}
	}
}

// What cannot be done before its deadline, at the token's present pace and with
// the share that its caller has, is refused.
func TestDeadline(t *testing.T) {
	const hour = time.Hour
	for _, tt := range []struct {
		name   string
		weight int
		mine   int // hours of work that wait
		others int // the same, of another flow of weight 1
		within int // hours
		wait   int // hours that are missing; 0: it is taken
	}{
		{"next", 1, 0, 8, 2, 0}, // one hour is with the two workers
		{"too late", 1, 0, 8, 1, 1},
		{"behind its own", 1, 4, 0, 3, 1},
		{"behind its own, in turns", 1, 4, 8, 5, 1},
		{"which is in time", 1, 4, 8, 6, 0},
		{"others have little", 1, 4, 2, 5, 0},
		{"heavy", 4, 4, 8, 5, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tok := &Token{c: Config{Sessions: 1, Queue: 100}, waiting: newQueue()}
			tok.live = []*process{{t: tok, load: 1 * hour}, {t: tok, load: 1 * hour}}
			for range tt.mine {
				waits(tok.waiting, "me", tt.weight, hour)
			}
			for range tt.others {
				waits(tok.waiting, "other", 1, hour)
			}
			c := &call{cost: hour}
			tok.waiting.enter(c, "me", tt.weight)
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(tt.within)*hour+time.Minute)
			defer cancel()
			err := tok.place(ctx, c)
			if o, ok := err.(*overload); ok != (tt.wait > 0) || ok && o.after.Round(hour) != time.Duration(tt.wait)*hour {
				t.Errorf("got %v, want %d hours too late", err, tt.wait)
			}
			if err := tok.place(t.Context(), c); err != nil {
				t.Errorf("without a deadline: %v", err)
			}
		})
	}
}

// The bound of the queue: of what is free a flow may have as much again as it has, by its weight.
func TestQueueBound(t *testing.T) {
	for weight, most := range map[int]int{1: 50, 4: 80} {
		tok := &Token{c: Config{Sessions: 1, Queue: 100}, waiting: newQueue()}
		for n := 0; ; n++ {
			c := &call{cost: time.Millisecond}
			tok.waiting.enter(c, "me", weight)
			err := tok.place(t.Context(), c)
			if (err != nil) != (n == most) {
				t.Fatalf("weight %d, %d wait: %v", weight, n, err)
			}
			if err != nil {
				break
			}
			tok.waiting.push(c)
		}
		other := &call{cost: time.Millisecond}
		tok.waiting.enter(other, "other", 1)
		if err := tok.place(t.Context(), other); err != nil {
			t.Errorf("another, where %d wait: %v", most, err)
		}
	}
}

// A price is what a few answers say, and then what most say: a new key's is that of
// the others.
func TestPrice(t *testing.T) {
	tok := &Token{c: Config{CallTimeout: 16 * time.Second}, prices: map[string]*price{}}
	p := tok.price([]byte("a"))
	at := &process{inFlight: []*call{{price: p}}}
	if p.d != firstPrice || tok.pace(at) != time.Second {
		t.Errorf("before any answer: %v, pace %v", p.d, tok.pace(at))
	}
	for _, tt := range []struct{ took, want time.Duration }{
		{200 * time.Millisecond, 200 * time.Millisecond}, {400 * time.Millisecond, 300 * time.Millisecond},
		{300 * time.Millisecond, 300 * time.Millisecond}, {300 * time.Millisecond, 300 * time.Millisecond},
		{time.Hour, 412500 * time.Microsecond}, // as if four times as long, and that an eighth
	} {
		p.learn(tt.took)
		tok.usual.learn(tt.took)
		if p.d != tt.want {
			t.Errorf("after one that took %v: %v, want %v", tt.took, p.d, tt.want)
		}
	}
	if q := tok.price([]byte("b")); q.d != p.d || tok.pace(at) != p.d || tok.price([]byte("a")) != p {
		t.Errorf("another key's is %v, want %v; pace %v", q.d, p.d, tok.pace(at))
	}
	for i := range maxPrices {
		tok.price(fmt.Append(nil, i))
	}
	if n := len(tok.prices); n > maxPrices {
		t.Errorf("%d prices are kept", n)
	}
}

func BenchmarkQueue(b *testing.B) {
	for _, flows := range []int{1, 10, 1000} {
		b.Run(fmt.Sprint(flows), func(b *testing.B) {
			q := newQueue()
			names := make([]string, flows)
			for i := range names {
				names[i] = fmt.Sprint("principal-", i)
				waits(q, names[i], 1, time.Millisecond)
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				c := q.pop()
				q.leave(c)
				q.enter(c, names[i%flows], 1)
				q.push(c)
			}
		})
	}
}
