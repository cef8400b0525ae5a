package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/client"
	"github.com/signwarden/signwarden/gateway/config"
	"github.com/signwarden/signwarden/gateway/keys"
)

// What a finding says of how things are.
const (
	fine    = "ok"
	note    = "note" // as it may be: a thing that is not used, or will matter one day
	trouble = "fail"
)

// finding is what one check has found.
type finding struct {
	Check  string `json:"check"`
	Result string `json:"result"` // fine, note or trouble
	What   string `json:"what"`
	Next   string `json:"next,omitempty"` // what to do; not with fine

	err error // the reason, where there is one: its kind decides the exit code
}

func ok(format string, args ...any) []finding {
	return []finding{{Result: fine, What: fmt.Sprintf(format, args...)}}
}

func noted(next, format string, args ...any) []finding {
	return []finding{{Result: note, What: fmt.Sprintf(format, args...), Next: next}}
}

func bad(next, format string, args ...any) []finding {
	return []finding{{Result: trouble, What: fmt.Sprintf(format, args...), Next: next}}
}

// patient is what the checks examine. What an earlier one has not found is zero, and
// those that need it say nothing: the first cause is told, not its consequences.
type patient struct {
	a      *app
	key    string // the one asked about; empty: all
	conf   client.Config
	loaded bool // conf is there
	client *client.Client
	all    []client.Key
	listed bool // all is there
}

// checks in the order in which each needs the ones before.
var checks = []struct {
	name string
	run  func(context.Context, *patient) []finding
}{
	{"profile", checkProfile},
	{"certificate", checkCertificate},
	{"gateway", checkGateway},
	{"keys", checkKeys},
	{"PKCS#11 module", checkModule},
	{"PKCS#11 socket", checkP11Socket},
	{"OpenSSL", checkOpenSSL},
	{"GNUPGHOME", checkGnuPG},
	{"gpg-agent", checkGPGAgent},
	{"SSH_AUTH_SOCK", checkSSH},
}

func (a *app) doctorCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "doctor [KEY]",
		Short: "Find out why tools do not sign: profile, gateway, keys, sockets, modules",
		Long: `doctor examines what tools do not tell. To those of PKCS#11 a socket that nobody serves
looks like an empty token, and so does a key that you may not use, or one of a type that
p11-kit does not pass on; gpg says "No secret key" of all that. It tells each finding, and
what to do next. With a KEY it says too which tools cannot use that one, and why.

It changes nothing and signs nothing. Exit code 0: all is well, notes aside. Else that of
the first thing that is wrong: 4 for what is denied, 5 for a gateway that is not there, and
else 1.`,
		Example: `  signwarden doctor
  signwarden exec -- signwarden doctor kmod     # as tools under exec see it
  signwarden doctor -o json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, argv []string) error {
			p := &patient{a: a}
			if len(argv) > 0 {
				p.key = argv[0]
			}
			return a.doctor(cmd.Context(), p)
		},
	}
	return c
}

func (a *app) doctor(ctx context.Context, p *patient) error {
	var all []finding
	code := exit.OK
	for _, c := range checks {
		for _, f := range c.run(ctx, p) {
			f.Check, f.What, f.Next = c.name, exit.Line(f.What), exit.Line(f.Next)
			all = append(all, f)
			if f.Result == trouble && code == exit.OK {
				code = exit.Failed
				if f.err != nil {
					code = exit.Code(f.err)
				}
			}
		}
	}
	if p.client != nil {
		defer p.client.Close()
	}
	err := a.print(all, func(io.Writer) {
		for _, f := range all {
			fmt.Fprintf(a.out, "%-5s %-15s %s\n", f.Result, f.Check, f.What)
			if f.Next != "" {
				fmt.Fprintf(a.out, "%-5s %-15s -> %s\n", "", "", f.Next)
			}
		}
	})
	if err == nil && code != exit.OK {
		return silent(code)
	}
	return err
}

func checkProfile(_ context.Context, p *patient) []finding {
	path, err := p.a.profilePath()
	if err == nil {
		p.conf, err = client.LoadProfile(path)
	}
	if err != nil {
		return bad("name it with --profile or SIGNWARDEN_PROFILE; `signwardend client create NAME` makes one", "%v", err)
	}
	p.conf.Logger, p.loaded = p.a.log, true
	return ok("%s, for %s", path, p.conf.String())
}

// soon is when the end of a certificate is told of.
const soon = 30 * 24 * time.Hour

func checkCertificate(_ context.Context, p *patient) []finding {
	if !p.loaded {
		return nil
	}
	ours, err := p.conf.TLS.GetClientCertificate(&tls.CertificateRequestInfo{})
	if err != nil || ours.Leaf == nil {
		return bad("`signwardend client create NAME`, on the gateway, makes a new profile", "our certificate cannot be read: %v", err)
	}
	cert, now := ours.Leaf, time.Now()
	const renew = "have a new one made: signwardend client create NAME, on the gateway"
	switch {
	case now.Before(cert.NotBefore):
		return bad("set the clock of this host: timedatectl", "our certificate begins at %s, and here it is %s: the clock is wrong", cert.NotBefore.Format(time.RFC3339), now.Format(time.RFC3339))
	case now.After(cert.NotAfter):
		return bad(renew, "our certificate has expired at %s, and here it is %s", cert.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
	case cert.NotAfter.Sub(now) < soon:
		return noted(renew, "our certificate expires at %s", cert.NotAfter.Format(time.RFC3339))
	}
	return ok("%s, until %s", cert.Subject.CommonName, cert.NotAfter.Format(time.DateOnly))
}

func checkGateway(ctx context.Context, p *patient) []finding {
	if !p.loaded {
		return nil
	}
	c, err := client.Dial(p.conf)
	if err == nil {
		p.client = c
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		err = c.Ping(ctx)
		if err == nil {
			p.all, err = c.Keys(ctx)
		}
	}
	if err != nil {
		next := "is it running, and may this host reach it? its log says why it refuses; `signwardend check` examines it"
		if strings.Contains(err.Error(), "expired or is not yet valid") {
			next = "compare the clocks of this host and of the gateway; if they are right, renew the gateway's certificate"
		}
		f := bad(next, "%s does not serve us: %v", p.conf.String(), err)
		f[0].err = err
		return f
	}
	p.listed = true
	return ok("%s serves", p.conf.String())
}

func checkKeys(ctx context.Context, p *patient) []finding {
	if !p.listed {
		return nil
	}
	if p.key != "" {
		return checkKey(ctx, p)
	}
	n := 0
	for _, k := range p.all {
		if k.MaySign && k.State == keys.Enabled {
			n++
		}
	}
	if n == 0 {
		f := bad("an administrator grants it with `signwarden policy apply`, and sees why not with `signwarden policy test`", "you may sign with none of the %d keys that you see: to tools the token is empty, and gpg has no secret key", len(p.all))
		f[0].err = errDenied
		return f
	}
	return ok("you may sign with %d of %d; signwarden doctor KEY looks at one", n, len(p.all))
}

// checkKey tells what one key lets which tool do.
func checkKey(ctx context.Context, p *patient) []finding {
	k, err := p.client.Key(ctx, p.key)
	if err != nil {
		f := bad("`signwarden key list` shows those that you see; an administrator grants more with `signwarden policy apply`", "key %s: %v", p.key, err)
		f[0].err = err
		return f
	}
	how, err := howtoOf(ctx, p.client, k)
	if err != nil {
		return bad("`signwarden key show` shows the key", "key %s: %v", p.key, err)
	}
	var out []finding
	var can []string
	for _, t := range how.Tools {
		if t.WhyNot == "" {
			can = append(can, t.Tool)
		} else {
			out = append(out, noted("see `signwarden key show "+p.key+" --howto`", "%s cannot use %s: %s", t.Tool, p.key, t.WhyNot)...)
		}
	}
	if len(can) > 0 {
		return append(ok("%s, %s: for %s", p.key, k.Algorithm, strings.Join(can, ", ")), out...)
	}
	f := bad("see `signwarden key show "+p.key+" --howto`", "no tool can use %s", p.key)
	f[0].err = errDenied
	return append(f, out...)
}

// gpgHome is where gpg looks, in our environment.
func gpgHome() string {
	if dir := os.Getenv("GNUPGHOME"); dir != "" {
		return dir
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return filepath.Join(home, ".gnupg")
}

const setupHint = "signwarden agent setup makes it ready; signwarden exec -- COMMAND needs none of that"

func checkGnuPG(_ context.Context, _ *patient) []finding {
	if _, err := exec.LookPath("gpg"); err != nil {
		return noted("apt-get install gnupg, or dnf install gnupg2", "gpg is not installed")
	}
	dir := gpgHome()
	text, err := os.ReadFile(filepath.Join(dir, "gpg.conf"))
	switch {
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return bad("may this user read it?", "%v", err)
	case !hasLine(text):
		return noted(setupHint, "%s lacks %s in gpg.conf: gpg starts an agent of its own, which has none of our keys", dir, noAutostart)
	}
	return ok("%s is set up", dir)
}

// askTimeout is how long another program may take to answer: what it asks may be the very
// thing that hangs.
const askTimeout = 5 * time.Second

// ask runs a program, with all that it prints as the answer.
func ask(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	return cmd.CombinedOutput()
}

func checkGPGAgent(ctx context.Context, _ *patient) []finding {
	socket, err := gpgSocket(config.WordAuto, os.Environ())
	if err != nil {
		return nil // there is no GnuPG, which is told already
	}
	if _, err := os.Lstat(socket); err != nil {
		return noted("signwarden agent --gpg-socket auto", "nothing serves %s", socket)
	}
	out, err := ask(ctx, "gpg-connect-agent", "--no-autostart", "GETINFO version", "/bye")
	version, _, _ := strings.Cut(strings.TrimPrefix(string(out), "D "), "\n")
	switch {
	case err != nil || !strings.HasPrefix(string(out), "D "):
		return bad("signwarden agent --gpg-socket auto", "%s is there, and nobody answers", socket)
	case version != agentVersion:
		return bad("gpgconf --kill gpg-agent; then "+setupHint, "a real gpg-agent %s serves %s, and has none of our keys", version, socket)
	}
	return ok("signwarden serves %s", socket)
}

const serveSSHHint = "signwarden agent --ssh-socket PATH serves one that has them; set SSH_AUTH_SOCK to its path where it is to sign"

// checkSSH asks an ssh-agent for its keys, and looks for ours among them.
func checkSSH(_ context.Context, p *patient) []finding {
	path := os.Getenv("SSH_AUTH_SOCK")
	if path == "" {
		return noted("set SSH_AUTH_SOCK where ssh-keygen or git are to sign by ssh keys", "not set: no ssh-agent is asked")
	}
	c, err := net.DialTimeout("unix", path, 2*time.Second)
	if err != nil {
		return bad("start the agent, or unset SSH_AUTH_SOCK", "nobody serves it: %v", err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(askTimeout)) // without, List tells what is wrong
	has, err := agent.NewClient(c).List()
	if err != nil {
		return bad("if it is forwarded: is the other end served? else start the agent again, or unset SSH_AUTH_SOCK", "%s does not answer as an ssh-agent: %v", path, err)
	}
	ours := 0
	for _, k := range p.all {
		pub, err := ssh.NewPublicKey(k.PublicKey)
		if err == nil && slices.ContainsFunc(has, func(h *agent.Key) bool { return bytes.Equal(h.Blob, pub.Marshal()) }) {
			ours++
		}
	}
	if p.listed && ours == 0 {
		return noted(serveSSHHint, "the agent at %s has %d keys, and none of ours", path, len(has))
	}
	return ok("%s has %d keys, %d of them ours", path, len(has), ours)
}
