package agentproto

import (
	"context"
	"log/slog"
	"sync/atomic"

	"golang.org/x/time/rate"
)

// Refusals in the log of one agent: so many at once, and then so many a second.
const (
	logBurst = 100
	logRate  = 10
)

// Warnings bounds what an agent logs of refusals: a peer that is refused over and over
// must not fill the log. It is safe for concurrent use.
type Warnings struct {
	lines *rate.Limiter
	left  atomic.Int64 // lines that were left out since the last one
}

// NewWarnings returns the bound of one agent.
func NewWarnings() *Warnings { return &Warnings{lines: rate.NewLimiter(logRate, logBurst)} }

// Log logs within the rate, and then says how many lines were left out before. What is for
// debugging has no rate.
func (w *Warnings) Log(ctx context.Context, log *slog.Logger, level slog.Level, words string, attrs ...any) {
	if level > slog.LevelDebug && !w.lines.Allow() {
		w.left.Add(1)
		return
	}
	if n := w.left.Swap(0); n > 0 {
		attrs = append(attrs, "left_out_before", n)
	}
	log.Log(ctx, level, words, attrs...)
}
