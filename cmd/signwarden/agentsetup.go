package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/client"
)

// setupRecord is the file in a GNUPGHOME that says what setup did there.
const setupRecord = "signwarden-setup.json"

// noAutostart keeps gpg and gpgsm from starting an agent of their own, which would
// take the socket's path over and hold no key.
const noAutostart = "no-autostart"

// agentUnits are GnuPG's user units. A socket of theirs at gpg's path would start the
// real agent; the others need it.
var agentUnits = []string{
	"gpg-agent.socket", "gpg-agent-extra.socket", "gpg-agent-browser.socket", "gpg-agent-ssh.socket", "gpg-agent.service",
}

// setupDone is what setup has done to a GNUPGHOME, and --remove takes back. Each act
// is noted before it is done: what was cut off is taken back too.
type setupDone struct {
	Lines   []confLine        `json:"lines,omitempty"`
	OpenPGP []string          `json:"openpgp,omitempty"`    // fingerprints that were not there
	Trust   map[string]string `json:"ownertrust,omitempty"` // of those that were: what it was before
	X509    []string          `json:"x509,omitempty"`       // SHA-1 fingerprints that were not there
	Masked  []string          `json:"masked,omitempty"`
	Stopped []string          `json:"stopped,omitempty"` // of those masked: they were active
}

type confLine struct {
	File  string `json:"file"`
	Added string `json:"added"`          // to its end
	Made  bool   `json:"made,omitempty"` // the file was not there
}

// setup is one run of agent setup.
type setup struct {
	a    *app
	home gnupgHome
	done setupDone
}

func (a *app) agentSetupCommand() *cobra.Command {
	var remove, force, p11 bool
	c := &cobra.Command{
		Use:   "setup",
		Short: "Make a GNUPGHOME ready for the agent, or take that back",
		Long: `setup makes the GNUPGHOME (or ~/.gnupg) ready for signwarden agent, and says what it
did:

  no-autostart in gpg.conf and gpgsm.conf: gpg starts no agent of its own
  the certificates of the keys that you may sign with, OpenPGP ones with ownertrust
  gpg-agent's systemd user units are masked, where the GNUPGHOME is the one they serve

With --p11 it makes nothing of GnuPG's ready, but PKCS#11:

  p11-kit's module file, ~/.config/pkcs11/modules/signwarden.module (for root, that of the
  system): programs of p11-kit run signwarden p11 --stdio and see the token
  ~/.config/signwarden/openssl-engine.cnf and openssl-provider.cnf: the OpenSSL
  configuration in use and, besides, libp11's engine or pkcs11-provider

A file that it has not made, or that has been changed since, is never written over.

Run it again when there are new keys. --remove takes back what it did, and nothing
else: what was there before stays.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if p11 {
				return a.setupP11(cmd.Context(), remove)
			}
			s, err := a.openSetup()
			if err != nil {
				return err
			}
			if remove {
				return s.remove()
			}
			return a.with(func(c *client.Client) error { return s.run(cmd.Context(), c, force) })
		},
	}
	c.Flags().BoolVar(&remove, "remove", false, "take back what setup did")
	c.Flags().BoolVar(&p11, "p11", false, "set PKCS#11 up, and not GnuPG")
	c.Flags().BoolVar(&force, "force", false, "even where the GNUPGHOME has secret keys of its own")
	c.MarkFlagsMutuallyExclusive("p11", "force")
	return c
}

func (a *app) setupP11(ctx context.Context, remove bool) error {
	s, err := a.openP11Setup()
	if err != nil {
		return err
	}
	if remove {
		return s.remove()
	}
	return a.with(func(c *client.Client) error { return s.run(ctx, c) })
}

// openSetup reads what earlier runs have done.
func (a *app) openSetup() (*setup, error) {
	dir := os.Getenv("GNUPGHOME")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, exit.Hint(err, "name it in GNUPGHOME")
		}
		dir = filepath.Join(home, ".gnupg")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	s := &setup{a: a, home: gnupgHome{dir: dir, env: os.Environ()}}
	return s, readRecord(s.path(setupRecord), &s.done)
}

// readRecord reads what an earlier setup noted; where there was none, into stays as it is.
func readRecord(path string, into any) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		return fmt.Errorf("reading what an earlier setup did: %s: %w", path, err)
	}
	return nil
}

func (s *setup) path(name string) string { return filepath.Join(s.home.dir, name) }

// note writes down what is about to be done.
func (s *setup) note() error {
	b, err := json.MarshalIndent(s.done, "", "  ")
	if err != nil {
		return err
	}
	tmp := s.path("." + setupRecord)
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("noting what setup does: %w", err)
	}
	return os.Rename(tmp, s.path(setupRecord))
}

func (s *setup) say(format string, args ...any) { s.a.say("signwarden: "+format, args...) }

func (s *setup) run(ctx context.Context, c *client.Client, force bool) error {
	certs, err := c.Keys(ctx) // first: without a gateway nothing is begun
	if err != nil {
		return err
	}
	own, err := filepath.Glob(s.path("private-keys-v1.d/*.key"))
	if err != nil {
		return err
	}
	if len(own) > 0 && !force {
		return exit.Hint(fmt.Errorf("%s has %d secret keys of its own, which gpg would not reach any more", s.home.dir, len(own)),
			"use another GNUPGHOME, or --force")
	}
	if err := os.MkdirAll(s.home.dir, 0o700); err != nil {
		return err
	}
	for _, name := range []string{"gpg.conf", "gpgsm.conf"} {
		if err := s.addLine(name); err != nil {
			return err
		}
	}
	if err := s.importOpenPGP(certs); err != nil {
		return err
	}
	if err := s.importX509(certs); err != nil {
		return err
	}
	if err := s.maskUnits(); err != nil {
		return err
	}
	if conf, err := os.ReadFile(s.path("common.conf")); err == nil && bytes.Contains(conf, []byte("use-keyboxd")) {
		s.say("note: %s keeps gpg from starting keyboxd too, which common.conf wants; start it with gpgconf --launch keyboxd", noAutostart)
	}
	// One that runs would keep the socket. Ours answers this with success, and stays.
	if err := s.home.run(nil, "gpgconf", "--kill", "gpg-agent"); err != nil {
		return err
	}
	s.say("ready; start the agent: signwarden agent --gpg-socket auto, or systemctl --user enable --now signwarden-agent.socket")
	return nil
}

// addLine adds no-autostart to a configuration file that lacks it.
func (s *setup) addLine(name string) error {
	file := s.path(name)
	text, err := os.ReadFile(file)
	made := errors.Is(err, fs.ErrNotExist)
	if err != nil && !made {
		return err
	}
	if hasLine(text) {
		return nil
	}
	line := noAutostart + "\n"
	if len(text) > 0 && text[len(text)-1] != '\n' {
		line = "\n" + line
	}
	if !slices.ContainsFunc(s.done.Lines, func(l confLine) bool { return l.File == name }) {
		s.done.Lines = append(s.done.Lines, confLine{name, line, made})
	}
	if err := s.note(); err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	s.say("%s: added %s", file, noAutostart)
	return nil
}

func hasLine(text []byte) bool {
	for line := range bytes.Lines(text) {
		if strings.TrimSpace(string(line)) == noAutostart {
			return true
		}
	}
	return false
}

// maskUnits masks GnuPG's user units, if this GNUPGHOME's socket is theirs.
func (s *setup) maskUnits() error {
	socket, err := gpgSocket("auto", s.home.env)
	if err != nil {
		return err
	}
	if socket != fmt.Sprintf("/run/user/%d/gnupg/S.gpg-agent", os.Getuid()) {
		return nil
	}
	for _, unit := range agentUnits {
		state := s.systemctl("is-enabled", unit)
		if state == "" || strings.HasPrefix(state, "masked") {
			continue // no systemd, no such unit, or masked by somebody else
		}
		s.done.Masked = append(s.done.Masked, unit)
		active := s.systemctl("is-active", unit) == "active"
		if active {
			s.done.Stopped = append(s.done.Stopped, unit)
		}
		if err := s.note(); err != nil {
			return err
		}
		if err := s.home.run(nil, "systemctl", "--user", "mask", unit); err != nil {
			return err
		}
		s.say("masked %s", unit)
		if active {
			if err := s.home.run(nil, "systemctl", "--user", "stop", unit); err != nil {
				return err
			}
			s.say("stopped %s", unit)
		}
	}
	return nil
}

// systemctl is what it answers to a question about a unit; empty where it cannot tell.
func (s *setup) systemctl(question, unit string) string {
	cmd := exec.Command("systemctl", "--user", question, unit)
	cmd.Env = s.home.env
	out, _ := cmd.Output() // a state such as "inactive" comes with an exit code
	return strings.TrimSpace(string(out))
}

// remove takes back what is noted, the last first. What is gone already is no error.
func (s *setup) remove() error {
	if _, err := os.Stat(s.path(setupRecord)); errors.Is(err, fs.ErrNotExist) {
		s.say("%s: setup has done nothing here, or it has been taken back", s.home.dir)
		return nil
	}
	for _, unit := range s.done.Masked {
		if err := s.home.run(nil, "systemctl", "--user", "unmask", unit); err != nil {
			return err
		}
		s.say("unmasked %s", unit)
	}
	for _, unit := range s.done.Stopped {
		if err := s.home.run(nil, "systemctl", "--user", "start", unit); err != nil {
			return err
		}
		s.say("started %s", unit)
	}
	if err := s.removeX509(); err != nil {
		return err
	}
	if err := s.removeOpenPGP(); err != nil {
		return err
	}
	for _, l := range s.done.Lines {
		if err := s.removeLine(l); err != nil {
			return err
		}
	}
	return os.Remove(s.path(setupRecord))
}

// removeLine takes off what was added, or where somebody has added more since, the
// last no-autostart; and a file that was made and holds nothing else.
func (s *setup) removeLine(l confLine) error {
	file := s.path(l.File)
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	rest, last := strings.CutSuffix(string(text), l.Added)
	if !last {
		lines := strings.SplitAfter(rest, "\n")
		for i, line := range slices.Backward(lines) {
			if strings.TrimSpace(line) == noAutostart {
				lines = slices.Delete(lines, i, i+1)
				break
			}
		}
		rest = strings.Join(lines, "")
	}
	s.say("%s: took %s out", file, noAutostart)
	if l.Made && rest == "" {
		return os.Remove(file)
	}
	return os.WriteFile(file, []byte(rest), 0o600)
}
