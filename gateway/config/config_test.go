package config_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/gateway/config"
)

const good = `listen: 127.0.0.1:7443
tls: {certificate: tls/server.crt, key: tls/server.key, client_ca: /etc/ca.crt}
token:
  module: /usr/lib/softhsm/libsofthsm2.so
  label: signwarden
  pin_file: pin
  pin_record: state/pin.json
  profile: softhsm
  keep_alive: 20s
  environment: {SOFTHSM2_CONF: ./softhsm2.conf, OTHER: value}
  workers: 2
  sessions: 8
  call_timeout: 4s
  recycle_after: 12h
store: {sqlite: db.sqlite}
agents:
  - {gpg_socket: S.gpg-agent, principal: builder, uids: [0, 1000]}
  - {gpg_socket: /run/s, principal: job, gids: [100], keys: ["nightly-*"], lifetime: 8h, signatures: 500, trusted_roots: [root.pem]}
  - {p11_socket: p11, principal: builder, uids: [0], p11_tokens: [{label: boot, keys: ["sb-*"]}]}
limits: {sign_timeout: 10s, in_flight: 7}
metrics: {listen: unix:run/metrics}
`

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), config.FileName)
	if err := os.WriteFile(path, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(filepath.Dir(path), name) }
	want := config.Config{
		Listen: "127.0.0.1:7443",
		TLS:    config.TLS{Certificate: at("tls/server.crt"), Key: at("tls/server.key"), ClientCA: "/etc/ca.crt"},
		Token: config.Token{
			Module: "/usr/lib/softhsm/libsofthsm2.so", Label: "signwarden", PINFile: at("pin"), PINRecord: at("state/pin.json"),
			Profile: "softhsm", KeepAlive: config.Duration(20 * time.Second),
			Environment: map[string]string{"SOFTHSM2_CONF": at("softhsm2.conf"), "OTHER": "value"},
			Workers:     2, Sessions: 8, CallTimeout: config.Duration(4 * time.Second), RecycleAfter: config.Duration(12 * time.Hour),
		},
		Store:   config.Store{SQLite: at("db.sqlite")},
		Metrics: config.Metrics{Listen: "unix:" + at("run/metrics")},
		Agents: []config.Agent{
			{Socket: config.Socket{GPGSocket: at("S.gpg-agent")}, Principal: "builder", UIDs: []uint32{0, 1000}},
			{Socket: config.Socket{
				GPGSocket: "/run/s", Keys: []string{"nightly-*"}, Lifetime: config.Duration(8 * time.Hour), Signatures: 500,
				TrustedRoots: []string{at("root.pem")},
			}, Principal: "job", GIDs: []uint32{100}},
			{
				Socket:    config.Socket{P11Socket: at("p11"), P11Tokens: []config.P11Token{{Label: "boot", Keys: []string{"sb-*"}}}},
				Principal: "builder", UIDs: []uint32{0},
			},
		},
		Limits: config.Limits{SignTimeout: config.Duration(10 * time.Second), InFlight: 7},
	}
	if diff := cmp.Diff(got, want); diff != "" {
		t.Errorf("got (-) want (+):\n%s", diff)
	}
}

// Each error tells where in the file it is.
func TestParseErrors(t *testing.T) {
	for _, tt := range []struct{ name, old, new, want string }{
		{"unknown field", "listen:", "listne:", `unknown field "listne"`},
		{"line", "label: signwarden", "lable: signwarden", "[5:"},
		{"token and tokens", "store:", "tokens: [{name: a, module: /m, label: l, pin_file: p}]\nstore:", "there is a token too"},
		{"missing", "  pin_file: pin\n", "", "token.pin_file is missing"},
		{"listen", "127.0.0.1:7443", "localhost", `listen: "localhost" is not host:port`},
		{"module", "/usr/lib/softhsm/", "", "token.module"},
		{"duration", "10s", "10", "no duration"},
		{"negative", "in_flight: 7", "in_flight: -7", "limits.in_flight"},
		{"negative workers", "workers: 2", "workers: -2", "token.workers"},
		{"negative queue", "workers: 2", "workers: 2\n  queue: -1", "token.queue: -1 is negative"},
		{"workers without a session", "workers: 2", "workers: 9", "token.workers: 9 are more than the 8 token.sessions"},
		{"too many sessions", "sessions: 8", "sessions: 80000", "more than 1024"},
		{"no uids", "uids: [0, 1000]", "uids: []", "agents[0].uids is missing"},
		{"principal", "principal: builder", "principal: '*'", "agents[0].principal"},
		{"socket's unknown field", "signatures: 500", "signature: 500", `unknown field "signature"`},
		{"long socket", "/run/s", "/run/" + strings.Repeat("x", 103), "agents[1].gpg_socket: /run/" + strings.Repeat("x", 103) + " has 108 bytes"},
		{"word", "/run/s", "auto", "agents[1].gpg_socket: auto is no path"},
		{"glob", "nightly-*", "nightly-[", `agents[1].keys: "nightly-["`},
		{"negative signatures", "signatures: 500", "signatures: -1", "agents[1].signatures"},
		{"negative lifetime", "lifetime: 8h", "lifetime: -8h", "no duration"},
		{"neither uids nor gids", "gids: [100], ", "", "agents[1].uids is missing"},
		{"twice", "agents:\n", "agents:\n  - {gpg_socket: S.gpg-agent, principal: x, uids: [0]}\n", "agents[1].gpg_socket"},
		{"twice, another protocol", "p11_socket: p11", "p11_socket: S.gpg-agent", "agents[2].p11_socket"},
		{"no socket", "p11_socket: p11, ", "", "agents[2].gpg_socket is missing, and so are p11_socket and ssh_socket"},
		{"ssh and gpg sockets", "p11_socket: p11, ", "gpg_socket: g, ssh_socket: s, ", "agents[2].ssh_socket: the entry has a gpg_socket"},
		{"ssh and p11 sockets", "p11_socket: p11, ", "p11_socket: p11, ssh_socket: s, ", "agents[2].ssh_socket: the entry has a p11_socket"},
		{"two sockets", "p11_socket: p11", "p11_socket: p11, gpg_socket: gpg", "agents[2].p11_socket: the entry has a gpg_socket"},
		{"tokens of no socket", "p11_socket: p11", "gpg_socket: gpg", "agents[2].p11_tokens"},
		{"gpgsm's roots", "p11_socket: p11", "p11_socket: p11, trusted_roots: [a]", "agents[2].trusted_roots"},
		{"word for another protocol", "p11_socket: p11", "p11_socket: auto", "agents[2].p11_socket: auto is no path"},
		{"duplicate", "store:", "listen: 1.2.3.4:1\nstore:", "listen"},
		{"metrics at an agent's socket", "unix:run/metrics", "unix:S.gpg-agent", "metrics.listen: /d/S.gpg-agent is the socket of an entry of agents"},
		{"metrics at an agent's socket by another path", "unix:run/metrics", "unix:/run/../run/s", "metrics.listen: /run/../run/s is the socket"},
		{"twice by another path", "p11_socket: p11", "p11_socket: /d/../d/S.gpg-agent", "agents[2].p11_socket: /d/../d/S.gpg-agent is taken"},
		{"second document", "limits:", "---\nlimits:", "second YAML document"},
		{"empty", good, "", "empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text := strings.Replace(good, tt.old, tt.new, 1)
			if text == good {
				t.Fatal("the test changes nothing")
			}
			_, err := config.Parse([]byte(text), "/d")
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
	if _, err := config.Load("/nonexistent/x.yaml"); err == nil || !strings.Contains(err.Error(), "/nonexistent/x.yaml") {
		t.Errorf("missing file: got %v", err)
	}
}

func TestLoadAgent(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, config.AgentFileName)
	load := func(text string) (config.AgentFile, error) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return config.LoadAgent(file)
	}
	got, err := load(`sockets:
  - {gpg_socket: auto}
  - {gpg_socket: extra, keys: [release], lifetime: 1h, signatures: 10, trusted_roots: [root.pem]}
  - {gpg_socket: "fd:gpg-job"}
  - {gpg_socket: job/S.gpg-agent}
  - {p11_socket: auto, signatures: 3}
`)
	want := config.AgentFile{Sockets: []config.Socket{
		{GPGSocket: "auto"},
		{GPGSocket: "extra", Keys: []string{"release"}, Lifetime: config.Duration(time.Hour), Signatures: 10, TrustedRoots: []string{filepath.Join(dir, "root.pem")}},
		{GPGSocket: "fd:gpg-job"},
		{GPGSocket: filepath.Join(dir, "job/S.gpg-agent")},
		{P11Socket: "auto", Signatures: 3},
	}}
	if diff := cmp.Diff(got, want); diff != "" || err != nil {
		t.Errorf("%v; got (-) want (+):\n%s", err, diff)
	}
	for name, tt := range map[string]struct{ text, want string }{
		"empty":         {"", "it is empty"},
		"p11 twice":     {"sockets:\n  - {p11_socket: auto}\n  - {p11_socket: auto}\n", "sockets[1].p11_socket: auto is taken"},
		"p11 extra":     {"sockets:\n  - {p11_socket: extra}\n", "sockets[0].p11_socket: extra is a socket of gpg's"},
		"no socket":     {"sockets: []\n", "sockets is missing"},
		"no path":       {"sockets:\n  - {keys: [a]}\n", "sockets[0].gpg_socket is missing"},
		"twice":         {"sockets:\n  - {gpg_socket: auto}\n  - {gpg_socket: auto}\n", "sockets[1].gpg_socket: auto is taken"},
		"principal":     {"sockets:\n  - {gpg_socket: auto, principal: x}\n", `unknown field "principal"`},
		"glob":          {"sockets:\n  - {gpg_socket: auto, keys: ['']}\n", "sockets[0].keys"},
		"two documents": {"sockets:\n  - {gpg_socket: auto}\n---\na: 1\n", "second YAML document"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := load(tt.text); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), file) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
	if _, err := config.LoadAgent(filepath.Join(dir, "none")); !os.IsNotExist(errors.Unwrap(err)) {
		t.Errorf("missing file: got %v", err)
	}
}

// Nobody is asked who he is there, so it is for this host only, unless somebody says otherwise.
func TestMetricsListen(t *testing.T) {
	for _, tt := range []struct {
		metrics string
		network string // empty: refused
	}{
		{"{listen: 127.0.0.1:7444}", "tcp"}, {"{listen: 127.8.8.8:7444}", "tcp"}, {"{listen: '[::1]:7444'}", "tcp"}, {"{listen: localhost:7444}", "tcp"},
		{"{listen: unix:/run/m}", "unix"},
		{"{listen: 0.0.0.0:7444, remote: true}", "tcp"}, {"{listen: ':7444', remote: true}", "tcp"},
		{"{listen: 0.0.0.0:7444}", ""}, {"{listen: ':7444'}", ""}, {"{listen: 10.0.0.5:7444}", ""}, {"{listen: localhost.example.org:7444}", ""},
		{"{listen: '[::]:7444'}", ""}, {"{listen: 7444}", ""}, {"{listen: 'unix:'}", ""}, {"{listen: 'unix:', remote: true}", ""}, {"{listen: nonsense, remote: true}", ""},
	} {
		c, err := config.Parse([]byte(strings.Replace(good, "{listen: unix:run/metrics}", tt.metrics, 1)), "/d")
		if tt.network == "" {
			if err == nil || !strings.Contains(err.Error(), "metrics.listen") {
				t.Errorf("%s: got %v, want an error about metrics.listen", tt.metrics, err)
			}
			continue
		}
		if network, _ := c.Metrics.Network(); err != nil || network != tt.network {
			t.Errorf("%s: %s, %v", tt.metrics, network, err)
		}
	}
}

// The number of tokens, at its bound.
func TestTokensBound(t *testing.T) {
	for n, good := range map[int]bool{16: true, 17: false} {
		text := "listen: 127.0.0.1:7443\ntls: {certificate: a, key: b, client_ca: c}\nstore: {sqlite: db}\ntokens:\n"
		for i := range n {
			text += fmt.Sprintf("  - {name: t%d, primary: %v, module: /m.so, label: l%d, pin_file: pin}\n", i, i == 0, i)
		}
		_, err := config.Parse([]byte(text), "/d")
		if (err == nil) != good || err != nil && !strings.Contains(err.Error(), "17 are more than 16") {
			t.Errorf("%d tokens: %v", n, err)
		}
	}
}

const several = `listen: 127.0.0.1:7443
tls: {certificate: a, key: b, client_ca: c}
store: {sqlite: db}
tokens:
  - {name: a, module: /m.so, label: l, pin_file: pin, environment: {X: ./a}, workers: 1}
  - {name: b, primary: true, module: /m.so, label: l, pin_file: pin, environment: {X: ./b}}
`

func TestTokens(t *testing.T) {
	c, err := config.Parse([]byte(several), "/d")
	if err != nil {
		t.Fatal(err)
	}
	all := c.AllTokens()
	if len(all) != 2 || all[0].Name != "b" || all[1].Name != "a" || all[1].Token.PINFile != "/d/pin" || all[1].Token.Environment["X"] != "/d/a" || all[1].Token.Workers != 1 {
		t.Errorf("got %+v, want the primary one first", all)
	}
	if c, err := config.Parse([]byte(good), "/d"); err != nil || len(c.AllTokens()) != 1 || c.AllTokens()[0].Name != "signwarden" {
		t.Errorf("one token: %v, %+v", err, c.AllTokens())
	}
	for _, tt := range []struct{ name, old, new, want string }{
		{"no name", "name: a, ", "", "tokens[0].name"},
		{"name twice", "name: a", "name: b", "tokens[1].name"},
		{"bad name", "name: a", "name: ../a", "tokens[0].name"},
		{"no primary", "primary: true, ", "", "0 are primary"},
		{"two primary", "name: a", "primary: true, name: a", "2 are primary"},
		{"no label", "label: l, ", "", "tokens[0].label is missing"},
		{"module", "module: /m.so", "module: m.so", "tokens[0].module"},
		{"workers", "workers: 1", "workers: -1", "tokens[0].workers: -1"},
		{"the same twice", "X: ./b", "X: ./a", "tokens[1]: an earlier entry has this"},
		{"unknown field", "workers: 1", "worker: 1", `unknown field "worker"`},
		{"none", several[strings.Index(several, "tokens:"):], "", "token.module is missing"},
		{"one record of two tokens", "workers: 1}\n  - {", "workers: 1, pin_record: r}\n  - {pin_record: /d/x/../r, ", "tokens[1].pin_record: /d/x/../r is taken"},
	} {
		if _, err := config.Parse([]byte(strings.Replace(several, tt.old, tt.new, 1)), "/d"); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want an error with %q", tt.name, err, tt.want)
		}
	}
}
