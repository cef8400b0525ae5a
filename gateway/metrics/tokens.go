package metrics

import "github.com/prometheus/client_golang/prometheus"

// TokenStats is the state of a configured token at a moment, open or not.
type TokenStats struct {
	Name                                 string
	Workers, InFlight, Waiting, Sessions int
	Up                                   bool // requests can be answered
	// Several is what is known of one of several; nil of the only one.
	Several *SeveralStats
}

// SeveralStats is the state of one of several tokens.
type SeveralStats struct {
	Breaker string // one of Breakers
	Opens   int    // how often it was found not to work
	Keys    int    // registered keys that it has
	Other   int    // ids of registered keys under which it has another key
}

// Breakers are the states of a token's circuit breaker.
var Breakers = []string{"closed", "half-open", "open"}

// tokens tells the state of all tokens, which it asks for once a scrape.
type tokens struct{ stats func() []TokenStats }

// Tokens has the state of tokens told, asked for at each scrape. stats returns all
// that are configured, always the same;
// it may be called by several goroutines.
func (m *Metrics) Tokens(stats func() []TokenStats) { m.registry.MustRegister(tokens{stats}) }

func tokenDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, append([]string{"token"}, labels...), nil)
}

var (
	tokenGauges = []struct {
		desc *prometheus.Desc
		of   func(TokenStats) int
	}{
		{tokenDesc("signwarden_token_up", "1: the token signs."), func(s TokenStats) int { return oneIf(s.Up) }},
		{tokenDesc("signwarden_token_workers", "Worker processes that take requests."), func(s TokenStats) int { return s.Workers }},
		{tokenDesc("signwarden_token_in_flight", "Requests that workers have."), func(s TokenStats) int { return s.InFlight }},
		{tokenDesc("signwarden_token_waiting", "Requests that wait for a worker with room."), func(s TokenStats) int { return s.Waiting }},
		{tokenDesc("signwarden_token_sessions", "The bound on signatures at the token at a time."), func(s TokenStats) int { return s.Sessions }},
	}
	breakerDesc = tokenDesc("signwarden_token_breaker", "1 for the state of the circuit breaker of one of several tokens: closed (it gets requests), half-open (it is probed), open.", "state")
	opensDesc   = tokenDesc("signwarden_token_breaker_opens_total", "How often one of several tokens was found not to work.")
	keysDesc    = tokenDesc("signwarden_token_keys", "Registered keys that are known to be in one of several tokens.")
	otherDesc   = tokenDesc("signwarden_token_other_keys", "Ids of registered keys under which one of several tokens has another key: an alarm.")
)

func oneIf(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Describe implements prometheus.Collector.
func (tokens) Describe(to chan<- *prometheus.Desc) {
	for _, g := range tokenGauges {
		to <- g.desc
	}
	for _, d := range []*prometheus.Desc{breakerDesc, opensDesc, keysDesc, otherDesc} {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (t tokens) Collect(to chan<- prometheus.Metric) {
	tell := func(d *prometheus.Desc, kind prometheus.ValueType, v int, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, kind, float64(v), labels...)
	}
	for _, s := range t.stats() {
		for _, g := range tokenGauges {
			tell(g.desc, prometheus.GaugeValue, g.of(s), s.Name)
		}
		if s.Several == nil {
			continue
		}
		for _, b := range Breakers {
			tell(breakerDesc, prometheus.GaugeValue, oneIf(b == s.Several.Breaker), s.Name, b)
		}
		tell(opensDesc, prometheus.CounterValue, s.Several.Opens, s.Name)
		tell(keysDesc, prometheus.GaugeValue, s.Several.Keys, s.Name)
		tell(otherDesc, prometheus.GaugeValue, s.Several.Other, s.Name)
	}
}
