package metrics_test

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/metrics"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

func get(t testing.TB, m *metrics.Metrics, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	return w.Code, w.Body.String()
}

// series are the lines of a scrape that begin with signwarden_, by name and labels.
func series(t testing.TB, m *metrics.Metrics) map[string]string {
	t.Helper()
	code, body := get(t, m, "/metrics")
	if code != http.StatusOK {
		t.Fatalf("%d: %s", code, body)
	}
	all := map[string]string{}
	for s := bufio.NewScanner(strings.NewReader(body)); s.Scan(); {
		if name, value, ok := strings.Cut(s.Text(), " "); ok && strings.HasPrefix(name, "signwarden_") {
			all[name] = value
		}
	}
	return all
}

// Each kind of error has a word of its own, and what has none is internal.
func TestEveryOutcome(t *testing.T) {
	m := metrics.New()
	before := series(t, m)
	for _, k := range sigerr.Kinds() {
		m.Ended(fmt.Errorf("wrapped: %w", k), time.Millisecond)
	}
	m.Ended(nil, time.Millisecond)
	m.Ended(errors.New("of no kind"), time.Millisecond)
	after := series(t, m)
	n := 0
	for name, value := range after {
		if strings.HasPrefix(name, "signwarden_requests_total{") {
			n++
			if value != "1" {
				t.Errorf("%s is %s, want 1", name, value)
			}
		}
	}
	if want := len(sigerr.Kinds()) + 2; n != want {
		t.Errorf("%d outcomes, want %d", n, want)
	}
	if len(before) != len(after) {
		t.Errorf("%d series became %d", len(before), len(after))
	}
}

// However many keys and principals there are, and whatever becomes of their
// requests, there are as many series as at the start.
func TestCardinality(t *testing.T) {
	m := metrics.New()
	tok := m.Token("release", "crash")
	m.Tokens(func() []metrics.TokenStats {
		return []metrics.TokenStats{{Name: "release", Workers: 2, Waiting: 7, Up: true}}
	})
	f := gatewaytest.New(t, "", func(c *gateway.Config) { c.Observer = m })
	m.Gateway(f.InFlight)
	before := series(t, m)
	for i := range 50 {
		name := fmt.Sprintf("key-%d", i)
		f.Key(t, name, keys.Ed25519)
		for _, p := range []string{"root", fmt.Sprintf("user-%d", i)} {
			_, err := f.Sign(t.Context(), gatewaytest.Principal(t, p), gatewaytest.Request(name, "text"))
			if (err == nil) != (p == "root") {
				t.Fatalf("%s: %v", p, err)
			}
		}
		tok.Answered(time.Millisecond, time.Second)
	}
	tok.Ended("crash")
	after := series(t, m)
	for name := range after {
		if _, ok := before[name]; !ok {
			t.Errorf("%s came up", name)
		}
	}
	for name, want := range map[string]string{
		`signwarden_requests_total{outcome="signed"}`:                           "50",
		`signwarden_requests_total{outcome="not_found"}`:                        "50",
		`signwarden_stage_seconds_count{stage="token"}`:                         "50",
		`signwarden_stage_seconds_count{stage="verify"}`:                        "50",
		`signwarden_stage_seconds_count{stage="audit"}`:                         "50",
		`signwarden_request_seconds_count{outcome="signed"}`:                    "50",
		`signwarden_token_seconds_count{part="queue",token="release"}`:          "50",
		`signwarden_token_seconds_bucket{part="work",token="release",le="0.5"}`: "0",
		`signwarden_worker_ends_total{cause="crash",token="release"}`:           "1",
		`signwarden_token_workers{token="release"}`:                             "2",
		`signwarden_token_waiting{token="release"}`:                             "7",
		`signwarden_token_up{token="release"}`:                                  "1",
		`signwarden_requests_in_flight`:                                         "0",
		`signwarden_store_commits_total{outcome="failed"}`:                      "0",
	} {
		if got := after[name]; got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
}

// Each of several tokens has its series, open or not.
func TestSeveralTokens(t *testing.T) {
	m := metrics.New()
	m.Tokens(func() []metrics.TokenStats {
		return []metrics.TokenStats{
			{Name: "a", Up: true, Several: &metrics.SeveralStats{Breaker: "closed", Keys: 9, Other: 2}},
			{Name: "b", Several: &metrics.SeveralStats{Breaker: "open", Opens: 3}},
		}
	})
	got := series(t, m)
	for name, want := range map[string]string{
		`signwarden_token_up{token="a"}`:                        "1",
		`signwarden_token_up{token="b"}`:                        "0",
		`signwarden_token_breaker{state="closed",token="a"}`:    "1",
		`signwarden_token_breaker{state="open",token="a"}`:      "0",
		`signwarden_token_breaker{state="closed",token="b"}`:    "0",
		`signwarden_token_breaker{state="half-open",token="b"}`: "0",
		`signwarden_token_breaker{state="open",token="b"}`:      "1",
		`signwarden_token_breaker_opens_total{token="b"}`:       "3",
		`signwarden_token_keys{token="a"}`:                      "9",
		`signwarden_token_other_keys{token="a"}`:                "2",
		`signwarden_token_other_keys{token="b"}`:                "0",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
}

func TestHandler(t *testing.T) {
	m := metrics.New()
	for _, tt := range []struct {
		set         func()
		ready       int
		text, gauge string
	}{
		{func() {}, 503, "starting", "0"},
		{func() { m.SetReady("") }, 200, "ok", "1"},
		{func() { m.SetReady("pin") }, 503, "pin", "0"},
		{func() { m.SetReady("") }, 200, "ok", "1"},
	} {
		tt.set()
		if code, text := get(t, m, "/readyz"); code != tt.ready || !strings.Contains(text, tt.text) {
			t.Errorf("/readyz: %d %q, want %d %q", code, text, tt.ready, tt.text)
		}
		if code, text := get(t, m, "/healthz"); code != 200 {
			t.Errorf("/healthz: %d %q", code, text)
		}
		if got := series(t, m)["signwarden_ready"]; got != tt.gauge {
			t.Errorf("signwarden_ready is %s, want %s", got, tt.gauge)
		}
	}
	for _, r := range []*http.Request{httptest.NewRequest("POST", "/metrics", nil), httptest.NewRequest("GET", "/debug/pprof/", nil)} {
		w := httptest.NewRecorder()
		if m.Handler().ServeHTTP(w, r); w.Code < 400 {
			t.Errorf("%s %s: %d", r.Method, r.URL, w.Code)
		}
	}
}

func TestConcurrent(t *testing.T) {
	m := metrics.New()
	tok := m.Token("t", "crash")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				observe(m, tok)
			}
		})
	}
	for range 20 {
		series(t, m)
	}
	wg.Wait()
	if got := series(t, m)[`signwarden_requests_total{outcome="signed"}`]; got != "8000" {
		t.Errorf("%s requests, want 8000", got)
	}
}

// observe is what one signature tells.
func observe(m *metrics.Metrics, tok *metrics.Token) {
	for s := range gateway.Stages {
		m.Stage(gateway.Stage(s), 300*time.Microsecond)
	}
	tok.Answered(10*time.Microsecond, 200*time.Microsecond)
	m.Ended(nil, 700*time.Microsecond)
}

// BenchmarkObserve is what metrics cost a signature, but for reading the clock.
func BenchmarkObserve(b *testing.B) {
	m := metrics.New()
	tok := m.Token("t", "crash")
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			observe(m, tok)
		}
	})
}

// BenchmarkClock is that: a signature reads it seven times more than without metrics.
func BenchmarkClock(b *testing.B) {
	began := time.Now()
	for b.Loop() {
		for range 7 {
			if time.Since(began) < 0 {
				b.Fatal("the clock went back")
			}
		}
	}
}

// BenchmarkScrape is one read of all metrics.
func BenchmarkScrape(b *testing.B) {
	m := metrics.New()
	observe(m, m.Token("t", "crash"))
	for b.Loop() {
		if code, _ := get(b, m, "/metrics"); code != 200 {
			b.Fatal(code)
		}
	}
}
