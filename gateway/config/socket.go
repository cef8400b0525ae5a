package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/signwarden/signwarden/gateway/ident"
)

// AgentFileName is the name of a client's file of agent sockets, beside its profile.
const AgentFileName = "agent.yaml"

// maxSocketPath is what a Unix socket's address holds (unix(7)).
const maxSocketPath = 107

// Agent is a socket for local users of the gateway's host.
type Agent struct {
	Socket `yaml:",inline"`
	// Principal is who its users act as.
	Principal string `yaml:"principal"`
	// UIDs and GIDs may connect; at least one. A gid is that of the process, not
	// one of the user's further groups.
	UIDs []uint32 `yaml:"uids,omitempty"`
	GIDs []uint32 `yaml:"gids,omitempty"`
}

// Socket is a socket, and the bounds of what may be signed through it.
type Socket struct {
	// GPGSocket is the path of a gpg-agent socket, P11Socket that of a PKCS#11 socket,
	// as p11-kit's client speaks to, or SSHSocket that of an ssh-agent socket: one of them. In a
	// client's file it can also be a Word.
	GPGSocket string `yaml:"gpg_socket,omitempty"`
	P11Socket string `yaml:"p11_socket,omitempty"`
	SSHSocket string `yaml:"ssh_socket,omitempty"`
	// P11Tokens are the tokens of a PKCS#11 socket; none: one of all keys.
	P11Tokens []P11Token `yaml:"p11_tokens,omitempty"`
	// Keys are names or globs; a key that none matches does not exist on the
	// socket. None: all keys of the principal.
	Keys []string `yaml:"keys,omitempty"`
	// Lifetime is for how long the socket signs from when it came up; 0: no bound.
	Lifetime Duration `yaml:"lifetime,omitempty"`
	// Signatures is how many it gives from then on; 0: no bound.
	Signatures int `yaml:"signatures,omitempty"`
	// TrustedRoots are PEM files with X.509 roots that gpgsm is to trust.
	TrustedRoots []string `yaml:"trusted_roots,omitempty"`
}

// P11Token is a PKCS#11 token of some keys.
type P11Token struct {
	Label string   `yaml:"label"`
	Keys  []string `yaml:"keys"` // names or globs
}

// The protocols that are spoken on sockets.
const (
	ProtocolGPG = "gpg"
	ProtocolP11 = "p11"
	ProtocolSSH = "ssh"
)

// Protocol is what is spoken on the socket.
func (s *Socket) Protocol() string {
	switch {
	case s.P11Socket != "":
		return ProtocolP11
	case s.SSHSocket != "":
		return ProtocolSSH
	}
	return ProtocolGPG
}

// Path is that of the socket, or a Word.
func (s *Socket) Path() string {
	_, at := s.field()
	return *at
}

// field is the one that names the socket.
func (s *Socket) field() (name string, at *string) {
	switch s.Protocol() {
	case ProtocolP11:
		return "p11_socket", &s.P11Socket
	case ProtocolSSH:
		return "ssh_socket", &s.SSHSocket
	}
	return "gpg_socket", &s.GPGSocket
}

// Words that stand for a path in a client's file: where gpg looks for its agent, or p11-kit
// for its server, or our own place for SSH, which has none; for the agent's socket that is forwarded; and a descriptor that systemd
// passes by name.
const (
	WordAuto  = "auto"
	WordExtra = "extra"
	WordFD    = "fd:" // and the name
)

// IsWord says whether s is a Word and no path.
func IsWord(s string) bool {
	return s == WordAuto || s == WordExtra || strings.HasPrefix(s, WordFD)
}

// AgentFile is a client's file of agent sockets.
type AgentFile struct {
	Sockets []Socket `yaml:"sockets"`
}

// LoadAgent reads and checks a client's file of agent sockets. Paths in it are relative
// to its directory.
func LoadAgent(file string) (AgentFile, error) {
	abs, b, err := readFile(file)
	if err != nil {
		return AgentFile{}, fmt.Errorf("agent sockets: %w", err)
	}
	a, err := parseAgent(b, filepath.Dir(abs))
	if err != nil {
		return AgentFile{}, fmt.Errorf("agent sockets: %s: %w", abs, err)
	}
	return a, nil
}

func parseAgent(b []byte, dir string) (AgentFile, error) {
	var a AgentFile
	if err := strict(b, &a, &AgentFile{}); err != nil {
		return a, err
	}
	if len(a.Sockets) == 0 {
		return a, errors.New("sockets is missing: it names no socket")
	}
	seen := map[string]bool{}
	for i := range a.Sockets {
		s := &a.Sockets[i]
		s.absolute(dir)
		if err := s.Check(); err != nil {
			return a, fmt.Errorf("sockets[%d].%w", i, err)
		}
		if name, at := s.field(); seen[s.key()] {
			return a, fmt.Errorf("sockets[%d].%s: %s is taken by an earlier entry", i, name, *at)
		}
		seen[s.key()] = true
	}
	return a, nil
}

// key tells sockets apart: a word means another path in each protocol.
func (s *Socket) key() string {
	if IsWord(s.Path()) {
		return s.Protocol() + " " + s.Path()
	}
	return s.Path()
}

// strict decodes one YAML document without unknown fields; empty is another of v's type.
func strict(b []byte, v, empty any) error {
	dec := yaml.NewDecoder(bytes.NewReader(b), yaml.Strict())
	if err := dec.Decode(v); err != nil {
		if errors.Is(err, io.EOF) {
			return errors.New("it is empty")
		}
		return errors.New(yaml.FormatError(err, false, true))
	}
	if err := dec.Decode(empty); !errors.Is(err, io.EOF) {
		return errors.New("a second YAML document follows the first")
	}
	return nil
}

func (s *Socket) absolute(dir string) {
	paths := []*string{}
	if _, at := s.field(); !IsWord(*at) {
		paths = append(paths, at)
	}
	for i := range s.TrustedRoots {
		paths = append(paths, &s.TrustedRoots[i])
	}
	makeAbsolute(dir, paths)
}

// Check says what is wrong with s.
func (s *Socket) Check() error {
	name, at := s.field()
	switch {
	case *at == "":
		return errors.New("gpg_socket is missing, and so are p11_socket and ssh_socket")
	case s.GPGSocket != "" && name != "gpg_socket":
		return fmt.Errorf("%s: the entry has a gpg_socket; give each socket an entry of its own", name)
	case s.P11Socket != "" && s.SSHSocket != "":
		return errors.New("ssh_socket: the entry has a p11_socket; give each socket an entry of its own")
	case len(*at) > maxSocketPath:
		return fmt.Errorf("%s: %s has %d bytes, and a socket's path at most %d: use a shorter directory", name, *at, len(*at), maxSocketPath)
	case s.P11Socket == WordExtra:
		return errors.New("p11_socket: extra is a socket of gpg's; PKCS#11 has none")
	case s.SSHSocket == WordExtra:
		return errors.New("ssh_socket: extra is a socket of gpg's; SSH has none")
	case s.GPGSocket == "" && len(s.TrustedRoots) > 0:
		return errors.New("trusted_roots: gpgsm asks for them at a gpg_socket")
	case s.P11Socket == "" && len(s.P11Tokens) > 0:
		return errors.New("p11_tokens: there is no p11_socket for them")
	}
	for _, glob := range s.Keys {
		if _, err := path.Match(glob, ""); err != nil || glob == "" {
			return fmt.Errorf("keys: %q is no name or glob of a key", glob)
		}
	}
	if s.Signatures < 0 {
		return fmt.Errorf("signatures: %d is negative", s.Signatures)
	}
	if s.Lifetime < 0 {
		return errors.New("lifetime is negative")
	}
	return nil
}

func (a *Agent) check(seen map[string]bool) error {
	if err := a.Check(); err != nil {
		return err
	}
	name, at := a.field()
	if IsWord(*at) {
		return fmt.Errorf("%s: %s is no path; only a client's file of sockets has such words", name, *at)
	}
	if seen[filepath.Clean(*at)] {
		return fmt.Errorf("%s: %s is taken by an earlier entry", name, *at)
	}
	seen[filepath.Clean(*at)] = true
	if err := ident.CheckName(a.Principal); err != nil {
		return fmt.Errorf("principal: %w", err)
	}
	if len(a.UIDs) == 0 && len(a.GIDs) == 0 {
		return errors.New("uids is missing: say which users may connect, by uids or gids")
	}
	return nil
}
