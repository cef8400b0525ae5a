// Package config reads signwardend.yaml: strict YAML into a checked [Config].
// An unknown field is an error; errors name the field, and the line where the
// YAML itself is wrong. Nothing here opens a module, a store or a socket.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"
)

// FileName is the configuration's name in a gateway's directory.
const FileName = "signwardend.yaml"

// maxFile bounds a configuration file, in bytes.
const maxFile = 1 << 20

// maxSessions bounds token.workers and token.sessions: more are a slip of the pen.
const maxSessions = 1024

// Config is signwardend.yaml. Paths in the file are relative to its directory;
// Load makes them absolute.
type Config struct {
	// Listen is the address of the gRPC listener, host:port.
	Listen string `yaml:"listen"`
	TLS    TLS    `yaml:"tls"`
	// Token is the only one, or Tokens are several.
	Token  Token        `yaml:"token,omitempty"`
	Tokens []NamedToken `yaml:"tokens,omitempty"`
	Store  Store        `yaml:"store"`
	// Agents are sockets for users of this host.
	Agents []Agent `yaml:"agents,omitempty"`
	Limits Limits  `yaml:"limits,omitempty"`
	// Metrics is the listener of /metrics, /healthz and /readyz.
	Metrics Metrics `yaml:"metrics,omitempty"`
}

// Metrics is an HTTP listener that asks nobody who he is. There is none where
// Listen is empty.
type Metrics struct {
	// Listen is a loopback address, like 127.0.0.1:7444, or unix:PATH.
	Listen string `yaml:"listen,omitempty"`
	// Remote allows another address than loopback: everybody who reaches it reads
	// how much is signed and refused, and in what state the token is.
	Remote bool `yaml:"remote,omitempty"`
}

// Network splits Listen into what net.Listen takes.
func (m Metrics) Network() (network, address string) {
	if path, ok := strings.CutPrefix(m.Listen, "unix:"); ok {
		return "unix", path
	}
	return "tcp", m.Listen
}

func (m Metrics) check() error {
	network, address := m.Network()
	if m.Listen == "" || network == "unix" && address != "" {
		return nil
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("metrics.listen: %q is neither host:port nor unix:PATH", m.Listen)
	}
	if ip := net.ParseIP(host); !m.Remote && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("metrics.listen: %q is no loopback address, and nobody is asked who he is there; use 127.0.0.1 or unix:PATH, or say metrics.remote: true", m.Listen)
	}
	return nil
}

// TLS names PEM files. There is no way to serve without them.
type TLS struct {
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
	// ClientCA holds the certificates that issue client certificates.
	ClientCA string `yaml:"client_ca"`
}

// NamedToken is one of several.
type NamedToken struct {
	// Name is for the log, metrics and people.
	Name string `yaml:"name"`
	// Primary is that of the token in which keys are made; one has it.
	Primary bool  `yaml:"primary,omitempty"`
	Token   Token `yaml:",inline"`
}

// Token is a PKCS#11 token.
type Token struct {
	Module string `yaml:"module"`
	Label  string `yaml:"label"`
	// PINFile holds the user PIN on one line, and is readable by its owner only.
	PINFile string `yaml:"pin_file"`
	// PINRecord is where it is noted that the token has refused the PIN; empty: a
	// file beside the store. It is made if missing.
	PINRecord string `yaml:"pin_record,omitempty"`
	// Profile is how this vendor's tokens differ; empty: known by the module and the
	// token. `signwardend check` says which one is in force.
	Profile string `yaml:"profile,omitempty"`
	// KeepAlive is how long a worker may be idle before it uses the token, so that
	// the token does not drop its session; 0: as the profile has it.
	KeepAlive Duration `yaml:"keep_alive,omitempty"`
	// Environment is set before the module is loaded. A value that begins with
	// "./" is a path relative to the configuration.
	Environment map[string]string `yaml:"environment,omitempty"`
	// Workers is how many processes sign; 0: one per CPU, and no more than Sessions.
	Workers int `yaml:"workers,omitempty"`
	// Sessions bounds concurrent signatures, of all workers; 0: one for each. No
	// less than Workers, among whom they are divided evenly.
	Sessions int `yaml:"sessions,omitempty"`
	// Queue bounds the requests that wait for a worker; 0: the default.
	Queue int `yaml:"queue,omitempty"`
	// CallTimeout is after how long without an answer a worker is taken for hung,
	// StartTimeout how long one has to log in.
	CallTimeout  Duration `yaml:"call_timeout,omitempty"`
	StartTimeout Duration `yaml:"start_timeout,omitempty"`
	// RecycleAfter is the age at which a worker is replaced, and
	// RecycleSignatures after how many signatures one is.
	RecycleAfter      Duration `yaml:"recycle_after,omitempty"`
	RecycleSignatures int      `yaml:"recycle_signatures,omitempty"`
}

// Store is where keys, policy and the audit log are kept.
type Store struct {
	SQLite string `yaml:"sqlite"`
}

// Limits are bounds; zero: the default.
type Limits struct {
	// InFlight bounds requests under way, InFlightPerPrincipal those of one
	// principal, InFlightPerStream those of one gRPC stream.
	InFlight             int `yaml:"in_flight,omitempty"`
	InFlightPerPrincipal int `yaml:"in_flight_per_principal,omitempty"`
	InFlightPerStream    int `yaml:"in_flight_per_stream,omitempty"`
	// SignTimeout bounds one request's time at the token, like 30s.
	SignTimeout Duration `yaml:"sign_timeout,omitempty"`
	// DrainTimeout bounds a graceful stop.
	DrainTimeout Duration `yaml:"drain_timeout,omitempty"`
}

// Duration is a time.Duration written like 30s or 2m.
type Duration time.Duration

// UnmarshalYAML implements goccy's BytesUnmarshaler.
func (d *Duration) UnmarshalYAML(b []byte) error {
	v, err := time.ParseDuration(string(bytes.Trim(bytes.TrimSpace(b), `"'`)))
	if err != nil || v < 0 {
		return fmt.Errorf("%s is no duration like 30s or 2m", b)
	}
	*d = Duration(v)
	return nil
}

// MarshalYAML implements goccy's BytesMarshaler.
func (d Duration) MarshalYAML() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Load reads and checks a configuration file.
func Load(path string) (Config, error) {
	abs, b, err := readFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	c, err := Parse(b, filepath.Dir(abs))
	if err != nil {
		return Config{}, fmt.Errorf("configuration %s: %w", abs, err)
	}
	return c, nil
}

// readFile reads at most maxFile bytes.
func readFile(path string) (abs string, b []byte, err error) {
	abs, err = filepath.Abs(path)
	if err != nil {
		return "", nil, err
	}
	f, err := os.Open(abs)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	b, err = io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return "", nil, err
	}
	if len(b) > maxFile {
		return "", nil, fmt.Errorf("%s has over %d bytes", abs, maxFile)
	}
	return abs, b, nil
}

// Parse reads and checks a configuration whose relative paths are relative to dir.
func Parse(b []byte, dir string) (Config, error) {
	var c Config
	if err := strict(b, &c, &Config{}); err != nil {
		return c, err
	}
	c.absolute(dir)
	return c, c.check()
}

// absolute resolves every path against dir.
func (c *Config) absolute(dir string) {
	paths := []*string{&c.TLS.Certificate, &c.TLS.Key, &c.TLS.ClientCA, &c.Store.SQLite}
	makeAbsolute(dir, paths)
	c.Token.absolute(dir)
	for i := range c.Tokens {
		c.Tokens[i].Token.absolute(dir)
	}
	if network, path := c.Metrics.Network(); network == "unix" && path != "" && !filepath.IsAbs(path) {
		c.Metrics.Listen = "unix:" + filepath.Join(dir, path)
	}
	for i := range c.Agents {
		c.Agents[i].absolute(dir)
	}
}

func (t *Token) absolute(dir string) {
	makeAbsolute(dir, []*string{&t.PINFile, &t.PINRecord})
	for name, v := range t.Environment {
		if len(v) > 2 && v[:2] == "./" {
			t.Environment[name] = filepath.Join(dir, v)
		}
	}
}

func makeAbsolute(dir string, paths []*string) {
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
}

func (c *Config) check() error {
	for _, f := range []struct{ name, value string }{
		{"listen", c.Listen},
		{"tls.certificate", c.TLS.Certificate}, {"tls.key", c.TLS.Key}, {"tls.client_ca", c.TLS.ClientCA},
		{"store.sqlite", c.Store.SQLite},
	} {
		if f.value == "" {
			return fmt.Errorf("%s is missing", f.name)
		}
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("listen: %q is not host:port", c.Listen)
	}
	if err := c.checkTokens(); err != nil {
		return err
	}
	for _, f := range []struct {
		name  string
		value int
	}{
		{"limits.in_flight", c.Limits.InFlight},
		{"limits.in_flight_per_principal", c.Limits.InFlightPerPrincipal},
		{"limits.in_flight_per_stream", c.Limits.InFlightPerStream},
	} {
		if f.value < 0 {
			return fmt.Errorf("%s: %d is negative", f.name, f.value)
		}
	}
	if err := c.Metrics.check(); err != nil {
		return err
	}
	sockets := map[string]bool{}
	for i, a := range c.Agents {
		if err := a.check(sockets); err != nil {
			return fmt.Errorf("agents[%d].%w", i, err)
		}
	}
	if network, address := c.Metrics.Network(); network == "unix" && sockets[filepath.Clean(address)] {
		return fmt.Errorf("metrics.listen: %s is the socket of an entry of agents; give it a path of its own", address)
	}
	return nil
}

// AllTokens are the configured tokens, the primary one first; a token that is the
// only one has its label for a name.
func (c *Config) AllTokens() []NamedToken {
	if len(c.Tokens) == 0 {
		return []NamedToken{{Name: c.Token.Label, Primary: true, Token: c.Token}}
	}
	all := slices.Clone(c.Tokens)
	slices.SortStableFunc(all, func(a, b NamedToken) int {
		switch {
		case a.Primary == b.Primary:
			return 0
		case a.Primary:
			return -1
		}
		return 1
	})
	return all
}

// maxTokens bounds tokens.
const maxTokens = 16

var tokenNameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$`)

func (c *Config) checkTokens() error {
	if len(c.Tokens) == 0 {
		return c.Token.check("token")
	}
	if !reflect.ValueOf(c.Token).IsZero() {
		return errors.New("tokens: there is a token too; move it into the list")
	}
	if len(c.Tokens) > maxTokens {
		return fmt.Errorf("tokens: %d are more than %d", len(c.Tokens), maxTokens)
	}
	names, places, records := map[string]bool{}, map[string]bool{}, map[string]bool{}
	primary := 0
	for i, t := range c.Tokens {
		at := fmt.Sprintf("tokens[%d]", i)
		if !tokenNameRE.MatchString(t.Name) || names[t.Name] {
			return fmt.Errorf("%s.name: %q is taken, or not a letter or digit and then up to 31 letters, digits, '.', '_' or '-'", at, t.Name)
		}
		names[t.Name] = true
		if err := t.Token.check(at); err != nil {
			return err
		}
		place := fmt.Sprintf("%q %q %q", t.Token.Module, t.Token.Label, t.Token.Environment)
		if places[place] {
			return fmt.Errorf("%s: an earlier entry has this module, label and environment", at)
		}
		places[place] = true
		if r := t.Token.PINRecord; r != "" {
			// What one token accepts would empty what is known of the other.
			if records[filepath.Clean(r)] {
				return fmt.Errorf("%s.pin_record: %s is taken by an earlier entry; each token wants a file of its own", at, r)
			}
			records[filepath.Clean(r)] = true
		}
		if t.Primary {
			primary++
		}
	}
	if primary != 1 {
		return fmt.Errorf("tokens: %d are primary; keys are made in one: give it primary: true", primary)
	}
	return nil
}

// check says what is wrong with a token that stands at a place of the file.
func (t *Token) check(at string) error {
	for _, f := range []struct{ name, value string }{{"module", t.Module}, {"label", t.Label}, {"pin_file", t.PINFile}} {
		if f.value == "" {
			return fmt.Errorf("%s.%s is missing", at, f.name)
		}
	}
	if !filepath.IsAbs(t.Module) {
		return fmt.Errorf("%s.module: %q is not an absolute path", at, t.Module)
	}
	for _, f := range []struct {
		name  string
		value int
	}{{"workers", t.Workers}, {"sessions", t.Sessions}, {"queue", t.Queue}, {"recycle_signatures", t.RecycleSignatures}} {
		if f.value < 0 {
			return fmt.Errorf("%s.%s: %d is negative", at, f.name, f.value)
		}
	}
	if w, s := t.Workers, t.Sessions; s > 0 && w > s {
		return fmt.Errorf("%s.workers: %d are more than the %d %[1]s.sessions, of which each has one at least", at, w, s)
	}
	for _, n := range []int{t.Workers, t.Sessions} {
		if n > maxSessions {
			return fmt.Errorf("%s: %d workers or sessions are more than %d", at, n, maxSessions)
		}
	}
	return nil
}
