package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/formats/rpm"
	"github.com/signwarden/signwarden/formats/sshsig"
	"github.com/signwarden/signwarden/gateway"
	"github.com/signwarden/signwarden/gateway/config"
	"github.com/signwarden/signwarden/gateway/metrics"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
	"github.com/signwarden/signwarden/gateway/store"
	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/fleet"
	"github.com/signwarden/signwarden/hsm/pinrecord"
	"github.com/signwarden/signwarden/hsm/worker"
)

// load reads the configuration that the flags name.
func (d *dirFlags) load() (config.Config, error) {
	path := d.config
	if path == "" {
		path = filepath.Join(d.dir, config.FileName)
	}
	c, err := config.Load(path)
	if errors.Is(err, os.ErrNotExist) {
		return c, exit.Hint(err, "make one with: signwardend init --dir %s --dev", filepath.Dir(path))
	}
	if err == nil {
		err = checkProfiles(c)
	}
	return c, err
}

// checkProfiles is for what config, which knows no tokens, cannot check: before
// anything is opened, and for a token that is not there either.
func checkProfiles(c config.Config) error {
	for _, t := range c.AllTokens() {
		at := "token.profile"
		if len(c.Tokens) > 0 {
			at = fmt.Sprintf("tokens: profile of %s", t.Name)
		}
		if _, err := hsm.ProfileNamed(t.Token.Profile); t.Token.Profile != "" && err != nil {
			return fmt.Errorf("configuration: %s: %w", at, err)
		}
	}
	return nil
}

// only is the configuration with t as its only token.
func only(c config.Config, t config.NamedToken) config.Config {
	if len(c.Tokens) > 0 && t.Token.PINRecord == "" {
		// Of its own, where another one has this module and label.
		t.Token.PINRecord = filepath.Join(filepath.Dir(c.Store.SQLite), pinrecord.Name(t.Token.Module+" "+t.Name, t.Token.Label))
	}
	c.Token, c.Tokens = t.Token, nil
	return c
}

// pinRecord is the file that remembers whether the token has refused the PIN.
func pinRecord(c config.Config) string {
	if c.Token.PINRecord != "" {
		return c.Token.PINRecord
	}
	return filepath.Join(filepath.Dir(c.Store.SQLite), pinrecord.Name(c.Token.Module, c.Token.Label))
}

func readPIN(c config.Token) (hsm.PIN, error) {
	pin, err := hsm.ReadPIN(c.PINFile)
	if err != nil {
		return pin, fmt.Errorf("token.pin_file: %w", err)
	}
	return pin, nil
}

// openToken opens the token that the configuration names in this process: for
// commands that look at it and end. A PIN that the token has refused to another
// process is not tried.
func openToken(ctx context.Context, c config.Config, log *slog.Logger) (*hsm.Pool, error) {
	pin, err := readPIN(c.Token)
	if err != nil {
		return nil, err
	}
	record := pinrecord.New(pinRecord(c), c.Token.Module, c.Token.Label)
	done := func(error) {}
	pool, err := hsm.Open(ctx, hsm.Config{
		Module: c.Token.Module, Env: c.Token.Environment, TokenLabel: c.Token.Label, Profile: c.Token.Profile, Sessions: c.Token.Sessions, Logger: log,
		Ask: func(i hsm.Info) (hsm.PIN, error) {
			ended, err := record.Try(i, pin)
			if err == nil {
				done = ended
			}
			return pin, err
		},
	})
	done(err)
	return pool, err
}

// startWorkers opens the token that the configuration names in processes of its
// own: for what serves.
func startWorkers(ctx context.Context, conf config.Config, o worker.Observer, log *slog.Logger) (*worker.Token, error) {
	c := conf.Token
	pin, err := readPIN(c)
	if err != nil {
		return nil, err
	}
	workers, each := split(c.Workers, c.Sessions, runtime.NumCPU())
	return worker.Open(ctx, worker.Config{
		Module: c.Module, Env: c.Environment, TokenLabel: c.Label, Profile: c.Profile, PIN: pin, Logger: log,
		ReadPIN: func() (hsm.PIN, error) { return readPIN(c) },
		Tries:   pinrecord.New(pinRecord(conf), c.Module, c.Label),
		Workers: workers, Sessions: each, Queue: c.Queue,
		KeepAlive: time.Duration(c.KeepAlive), CallTimeout: time.Duration(c.CallTimeout), StartTimeout: time.Duration(c.StartTimeout),
		RecycleAge: time.Duration(c.RecycleAfter), RecycleOps: int64(c.RecycleSignatures),
		Observer: o,
	})
}

// split says how many workers there are, and sessions of each: no more sessions
// than token.sessions allows, where it says a number.
func split(workers, sessions, cpus int) (n, each int) {
	switch {
	case workers == 0 && sessions == 0:
		return cpus, 1
	case workers == 0:
		n = min(cpus, sessions)
	default:
		n = workers
	}
	return n, max(sessions/n, 1)
}

// lockStore makes sure that one process at a time decides on a store: another
// one would not see what an administrator changes here.
func lockStore(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the store: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, exit.Hint(fmt.Errorf("the store %s is in use by another signwardend", path), "stop that one first")
	}
	return func() { f.Close() }, nil
}

// certify makes OpenPGP certificates for the gateway, which knows no formats.
func certify(userID string, created, expires time.Time, primary, subkey crypto.Signer) ([]byte, error) {
	return openpgp.NewCertificate(openpgp.CertificateSpec{
		UserID: userID, Created: created, Expires: expires, Primary: primary, Subkey: subkey,
	})
}

// tooSoon is for an amendment in the second of the one before.
type tooSoon struct{}

func (tooSoon) Error() string { return "the certificate was changed in this second" }
func (tooSoon) TooSoon() bool { return true }

// revocationReasons are gateway.RevocationReasons.
var revocationReasons = map[string]openpgp.Reason{
	"unspecified": openpgp.NoReason, "superseded": openpgp.Superseded,
	"compromised": openpgp.Compromised, "retired": openpgp.Retired,
}

// amend changes OpenPGP certificates for the gateway.
func amend(m gateway.Amendment) ([]byte, error) {
	cert, err := openpgp.ParseCertificate(m.Certificate)
	if err != nil {
		return nil, err
	}
	if !m.At.After(cert.LastSigned()) {
		return nil, tooSoon{}
	}
	a := openpgp.Amendment{Certificate: cert, Primary: m.Primary, At: m.At}
	var out []byte
	switch {
	case m.Renew != nil:
		out, err = a.Renew(*m.Renew, m.Subkeys...)
	case m.UserID != "":
		out, err = a.AddUserID(m.UserID)
	case m.Revoke != nil:
		out, err = a.Revoke(revocationReasons[m.Revoke.Reason], m.Revoke.Text)
	case m.NewSubkey != nil:
		out, err = a.AddSubkey(m.NewSubkey, m.Expires)
	case m.Retire != nil:
		out, err = a.ExpireSubkey(m.Retire, m.Expires)
	}
	// What the certificate or the change is not fit for, and no token's failure.
	if errors.Is(err, openpgp.ErrMalformed) || errors.Is(err, openpgp.ErrKeyUnusable) || errors.Is(err, openpgp.ErrUnsupported) {
		err = fmt.Errorf("%w: %w", sigerr.Invalid, err)
	}
	return out, err
}

// inspect reads OpenPGP certificates for the gateway, which knows no formats.
func inspect(certificate []byte, signing crypto.PublicKey, at time.Time) (gateway.Inspected, error) {
	cert, err := openpgp.ParseCertificate(certificate)
	if err != nil {
		return gateway.Inspected{}, fmt.Errorf("%w: %w", sigerr.Invalid, err)
	}
	r, err := cert.RoleOf(signing, at)
	if err != nil {
		return gateway.Inspected{}, fmt.Errorf("%w: OpenPGP certificate: %w", sigerr.Invalid, err)
	}
	return gateway.Inspected{
		Certificate: cert.Bytes(), UserID: r.UserID, Primary: r.Primary, Created: r.Key.Created, Expires: r.Key.Expires,
	}, nil
}

// read reads what a message is for the gateway, which knows no formats.
func read(format string, hash crypto.Hash, message []byte) (*policy.Content, error) {
	switch format {
	case "rpm":
		return readRPM(hash, message)
	case policy.SSHSig:
		b, err := sshsig.ParseBlob(message)
		if err != nil {
			return nil, err
		}
		return &policy.Content{Namespace: b.Namespace}, nil
	case policy.SSHAuth:
		l, err := sshsig.ParseLogin(message)
		if err == nil && l.Hash() != hash {
			err = fmt.Errorf("a login with %s is hashed with %v, not %v", l.Algorithm, l.Hash(), hash)
		}
		if err != nil {
			return nil, err
		}
		return &policy.Content{User: l.User}, nil
	}
	return nil, fmt.Errorf("no reader of format %q", format)
}

func readRPM(hash crypto.Hash, message []byte) (*policy.Content, error) {
	h, _, err := rpm.ReadMessage(message, hash)
	if err != nil {
		return nil, err
	}
	n := h.NEVRA
	p := &policy.Package{Name: n.Name, Version: n.Version, Release: n.Release, Arch: n.Arch, Vendor: h.Vendor}
	if n.HasEpoch {
		p.Epoch = strconv.FormatUint(uint64(n.Epoch), 10)
	}
	return &policy.Content{Package: p}, nil
}

// parts is an assembled gateway.
type parts struct {
	gateway *gateway.Gateway
	token   token
	store   *store.SQLite
	metrics *metrics.Metrics // nil where nobody is to read them
	unlock  func()
}

// token is one token or several.
type token interface {
	gateway.Token
	Ping(ctx context.Context) error
	Stats() worker.Stats
	ReadPIN() error
	Close() error
}

// openTokens opens the tokens that the configuration names. pin is what the gateway
// tells of registered keys; nil where there is one token.
func openTokens(ctx context.Context, conf config.Config, m *metrics.Metrics, log *slog.Logger) (_ token, pin func([]byte, crypto.PublicKey), err error) {
	all := conf.AllTokens()
	if len(all) == 1 {
		t, err := startWorkers(ctx, only(conf, all[0]), observeToken(m, all[0].Name), log)
		if err != nil {
			return nil, nil, err
		}
		if m != nil {
			m.Tokens(func() []metrics.TokenStats { return []metrics.TokenStats{tokenStats(all[0].Name, t.Stats())} })
		}
		return t, nil, nil
	}
	c := fleet.Config{Logger: log}
	for _, t := range all {
		conf, o := only(conf, t), observeToken(m, t.Name)
		var refused hsm.PIN // Open and Mended are not called at the same time
		record := pinrecord.New(pinRecord(conf), conf.Token.Module, conf.Token.Label)
		c.Members = append(c.Members, fleet.Member{
			Name: t.Name,
			Open: func(ctx context.Context) (fleet.Token, error) {
				refused, _ = readPIN(conf.Token)
				w, err := startWorkers(ctx, conf, o, log.With("token", t.Name))
				if err != nil {
					return nil, err
				}
				return w, nil
			},
			Mended: func() bool {
				pin, err := readPIN(conf.Token)
				return err == nil && (pin.Reveal() != refused.Reveal() ||
					record.Refuses(pin) == nil)
			},
		})
	}
	f, err := fleet.Open(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	if m != nil {
		m.Tokens(func() []metrics.TokenStats { return fleetStats(f.Status()) })
	}
	return f, f.Pin, nil
}

// assemble opens what the configuration names. Close the result.
func assemble(ctx context.Context, c config.Config, log *slog.Logger) (_ *parts, err error) {
	p := &parts{}
	if c.Metrics.Listen != "" {
		p.metrics = metrics.New()
	}
	defer func() {
		if err != nil {
			p.close(log)
		}
	}()
	p.unlock, err = lockStore(c.Store.SQLite)
	if err != nil {
		return nil, err
	}
	p.store, err = store.OpenSQLite(ctx, c.Store.SQLite)
	if err != nil {
		return nil, err
	}
	var pin func([]byte, crypto.PublicKey)
	p.token, pin, err = openTokens(ctx, c, p.metrics, log)
	if err != nil {
		return nil, err
	}
	var observer gateway.Observer
	if p.metrics != nil {
		observer = p.metrics
	}
	p.gateway, err = gateway.New(ctx, gateway.Config{
		Store: p.store, Token: p.token, TokenLabel: c.AllTokens()[0].Token.Label, Pin: pin, Certify: certify, Amend: amend, Inspect: inspect, Read: read, Logger: log, Observer: observer,
		MaxInFlight: c.Limits.InFlight, MaxPerPrincipal: c.Limits.InFlightPerPrincipal,
		SignTimeout: time.Duration(c.Limits.SignTimeout),
	})
	if err != nil {
		return nil, err
	}
	if p.metrics != nil {
		p.metrics.Gateway(p.gateway.InFlight)
	}
	return p, nil
}

// close closes what is open, in the order in which the parts use each other.
func (p *parts) close(log *slog.Logger) {
	if p.gateway != nil {
		p.gateway.Close()
	}
	if p.token != nil {
		if err := p.token.Close(); err != nil {
			log.Warn("closing the token", "error", err)
		}
	}
	if p.store != nil {
		if err := p.store.Close(); err != nil {
			log.Warn("closing the store", "error", err)
		}
	}
	if p.unlock != nil {
		p.unlock()
	}
}
