// Package metrics counts for Prometheus what a gateway and its tokens do, and
// serves that, and whether the gateway lives and is ready, over HTTP.
//
// No label names a key, a principal or anything else that a client can make
// more of: labels are stages, outcomes, causes, and the tokens of the
// configuration. The package decides nothing and knows no PKCS#11: what tells
// it of tokens has its methods by chance.
package metrics

import (
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// buckets are those of all times, in seconds: from a hash to a timeout.
var buckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

// words are the outcomes of requests, by the kind of their error.
var words = map[error]string{
	sigerr.NotFound: "not_found", sigerr.Denied: "denied", sigerr.Disabled: "disabled", sigerr.Invalid: "invalid",
	sigerr.Conflict: "conflict", sigerr.Overloaded: "overloaded", sigerr.Timeout: "timeout", sigerr.Canceled: "canceled",
	sigerr.Unsupported: "unsupported", sigerr.TokenFailed: "token_failed", sigerr.Unavailable: "unavailable", sigerr.Unauthenticated: "unauthenticated",
}

const (
	signed   = "signed"
	internal = "internal" // an error of no kind
)

// Metrics is safe for concurrent use. It is a gateway.Observer.
type Metrics struct {
	registry *prometheus.Registry
	ready    atomic.Pointer[string] // what is not; nil: nobody has said

	stages  [gateway.Stages]prometheus.Observer
	ended   map[error]outcome // not written after New
	signed  outcome
	other   outcome
	commits *prometheus.CounterVec
	group   prometheus.Histogram
	commit  prometheus.Histogram
	perStage,
	perToken *prometheus.HistogramVec
	ends *prometheus.CounterVec
}

var _ gateway.Observer = (*Metrics)(nil)

// outcome is what is kept of requests that ended in one way.
type outcome struct {
	n    prometheus.Counter
	took prometheus.Observer
}

// New makes metrics that are all zero.
func New() *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), ended: map[error]outcome{}}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	histogram := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
		m.registry.MustRegister(h)
		return h
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		m.registry.MustRegister(c)
		return c
	}
	m.perStage = histogram("signwarden_stage_seconds", "Time of signatures in a stage of the gateway: token (waiting for it included), verify, audit.", buckets, "stage")
	for s := range gateway.Stages {
		m.stages[s] = m.perStage.WithLabelValues(gateway.Stage(s).String())
	}
	requests := counter("signwarden_requests_total", "Requests to sign, by how they ended.", "outcome")
	total := histogram("signwarden_request_seconds", "Time of requests to sign, from admission to answer, by how they ended: signed, or refused.", buckets, "outcome")
	refused := total.WithLabelValues("refused")
	m.signed = outcome{requests.WithLabelValues(signed), total.WithLabelValues(signed)}
	m.other = outcome{requests.WithLabelValues(internal), refused}
	for kind, word := range words {
		m.ended[kind] = outcome{requests.WithLabelValues(word), refused}
	}
	m.commits = counter("signwarden_store_commits_total", "Commits of audit entries.", "outcome")
	m.commits.WithLabelValues("done")
	m.commits.WithLabelValues("failed")
	m.commit = histogram("signwarden_store_commit_seconds", "Time of a commit of audit entries.", buckets).WithLabelValues().(prometheus.Histogram)
	m.group = histogram("signwarden_store_commit_entries", "Audit entries in a commit.", []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024}).WithLabelValues().(prometheus.Histogram)
	m.perToken = histogram("signwarden_token_seconds", "Time of signatures at a token: queue (until a worker has room), work (with the worker).", buckets, "token", "part")
	m.ends = counter("signwarden_worker_ends_total", "Workers that ended, or could not be started, by cause.", "token", "cause")
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "signwarden_ready", Help: "1: signatures can be had."}, func() float64 {
		if p := m.ready.Load(); p != nil && *p == "" {
			return 1
		}
		return 0
	}))
	return m
}

// Stage implements gateway.Observer.
func (m *Metrics) Stage(s gateway.Stage, took time.Duration) { m.stages[s].Observe(took.Seconds()) }

// Ended implements gateway.Observer.
func (m *Metrics) Ended(err error, took time.Duration) {
	o := m.signed
	if err != nil {
		var ok bool
		if o, ok = m.ended[sigerr.Kind(err)]; !ok {
			o = m.other
		}
	}
	o.n.Inc()
	o.took.Observe(took.Seconds())
}

// Committed implements gateway.Observer.
func (m *Metrics) Committed(entries int, took time.Duration, err error) {
	if err != nil {
		m.commits.WithLabelValues("failed").Inc()
		return
	}
	m.commits.WithLabelValues("done").Inc()
	m.group.Observe(float64(entries))
	m.commit.Observe(took.Seconds())
}

// Gateway has the requests under way of a gateway told.
func (m *Metrics) Gateway(inFlight func() int) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(
		prometheus.GaugeOpts{Name: "signwarden_requests_in_flight", Help: "Requests between admission and answer."},
		func() float64 { return float64(inFlight()) }))
}

// Token is what is counted of one token.
type Token struct {
	queue, work prometheus.Observer
	ends        *prometheus.CounterVec
}

// Token counts for the token with this label. causes are those of Ended.
func (m *Metrics) Token(label string, causes ...string) *Token {
	t := &Token{
		queue: m.perToken.WithLabelValues(label, "queue"), work: m.perToken.WithLabelValues(label, "work"),
		ends: m.ends.MustCurryWith(prometheus.Labels{"token": label}),
	}
	for _, c := range causes {
		t.ends.WithLabelValues(c)
	}
	return t
}

// Answered tells of one signature: how long it waited, and how long a worker had it.
func (t *Token) Answered(queued, worked time.Duration) {
	t.queue.Observe(queued.Seconds())
	t.work.Observe(worked.Seconds())
}

// Ended tells why a worker ended.
func (t *Token) Ended(cause string) { t.ends.WithLabelValues(cause).Inc() }

// SetReady says whether signatures can be had: lacks names the part for which
// they cannot, in a word or two; empty: they can. Everybody reads it, so that it
// is nothing that came from a token, a file or a store.
func (m *Metrics) SetReady(lacks string) { m.ready.Store(&lacks) }

// Handler serves /metrics, /healthz (this process lives) and /readyz (signatures
// can be had; else 503, and which part keeps them).
func (m *Metrics) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		switch lacks := m.ready.Load(); {
		case lacks == nil:
			answer(w, http.StatusServiceUnavailable, "starting")
		case *lacks != "":
			answer(w, http.StatusServiceUnavailable, *lacks)
		default:
			answer(w, http.StatusOK, "ok")
		}
	})
	return mux
}

func answer(w http.ResponseWriter, code int, text string) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	w.Write([]byte(text + "\n"))
}
