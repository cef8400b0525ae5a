package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/cmd/internal/sockets"
	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/config"
	"github.com/signwarden/signwarden/gateway/grpcapi"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/store"
	"github.com/signwarden/signwarden/hsm"
)

func checkCommand() *cobra.Command {
	var d dirFlags
	c := &cobra.Command{
		Use:   "check",
		Short: "Examine configuration, certificates, store, module, token and keys",
		Long: `check examines everything that serve needs and tells each result. It works
beside a gateway that serves, and changes nothing but the PIN record: it makes
one beside the store where there is none. The PIN is tried once, and not at all
where the token has refused it before: correct the PIN file then, or say
signwardend token retry-pin.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return check(cmd.Context(), &d, os.Stdout) },
	}
	d.add(c)
	return c
}

// report prints results and counts the bad ones.
type report struct {
	out io.Writer
	bad int
}

func (r *report) result(what string, err error, good string, args ...any) bool {
	if err != nil {
		r.bad++
		fmt.Fprintf(r.out, "FAIL  %-14s %v\n", what, err)
		return false
	}
	fmt.Fprintf(r.out, "ok    %-14s %s\n", what, fmt.Sprintf(good, args...))
	return true
}

func check(ctx context.Context, d *dirFlags, out io.Writer) error {
	r := &report{out: out}
	conf, err := d.load()
	if !r.result("configuration", err, "listen %s, %d agent sockets", conf.Listen, len(conf.Agents)) {
		return exit.Hint(errors.New("the configuration cannot be read"), "nothing else was examined")
	}
	for _, a := range conf.Agents {
		_, roots, err := sockets.Bounds(a.Socket)
		if err == nil {
			_, err = sockets.Tokens(a.Socket)
		}
		r.result("agent socket", err, "%s for %s, %d trusted roots", a.Path(), a.Principal, len(roots))
	}
	r.certificates(conf.TLS)
	state, stored := r.store(ctx, conf.Store)
	found := map[string]int{}
	for _, t := range conf.AllTokens() {
		r.token(ctx, only(conf, t), len(conf.Tokens) > 1, state, stored, found)
	}
	if stored && len(conf.Tokens) > 1 {
		r.located(state.Keys, found)
	}
	if r.bad > 0 {
		return fmt.Errorf("%d of the checks failed", r.bad)
	}
	return nil
}

func (r *report) certificates(c config.TLS) {
	t, err := grpcapi.LoadTLS(tlsFiles(c))
	if !r.result("tls files", err, "%s, %s, %s", c.Certificate, c.Key, c.ClientCA) {
		return
	}
	leaf := t.Certificates[0].Leaf
	r.result("certificate", validNow(leaf), "for %v %v until %s", leaf.DNSNames, leaf.IPAddresses, leaf.NotAfter.Format(time.DateOnly))
}

func validNow(c *x509.Certificate) error {
	now := time.Now()
	switch {
	case now.Before(c.NotBefore):
		return fmt.Errorf("not valid before %s: is the clock right?", c.NotBefore.Format(time.RFC3339))
	case now.After(c.NotAfter):
		return fmt.Errorf("expired at %s: issue a new one", c.NotAfter.Format(time.RFC3339))
	}
	return nil
}

// store reads the store, where there is one.
func (r *report) store(ctx context.Context, c config.Store) (store.State, bool) {
	s, err := store.ReadSQLite(ctx, c.SQLite)
	if err != nil {
		r.result("store", err, "")
		return store.State{}, false
	}
	defer s.Close()
	state, err := s.Load(ctx)
	if !r.result("store", err, "%s, %d keys", c.SQLite, len(state.Keys)) {
		return state, false
	}
	rules, err := policy.Parse(state.Policy)
	if err == nil && rules.Len() == 0 {
		err = errors.New("there are no rules: nobody may do anything, administrators neither")
	}
	n := 0
	if rules != nil {
		n = rules.Len()
	}
	r.result("policy", err, "%d rules", n)
	rows, err := readAudit(ctx, s)
	r.result("audit log", err, "%d rows without a gap", rows)
	if len(state.Pending) > 0 {
		fmt.Fprintf(r.out, "note  %-14s %q was being made and is not registered: it is under way, or the next start destroys it\n", "key", state.Pending[0].KeyName)
	}
	return state, true
}

// readAudit reads the whole log: every row is there, and in canonical form.
func readAudit(ctx context.Context, s store.Store) (rows int64, err error) {
	const page = 10_000
	for {
		_, entries, err := s.Audit(ctx, rows, page)
		if err != nil {
			return rows, err
		}
		for i, e := range entries {
			if _, err := audit.Parse(e); err != nil {
				return rows, fmt.Errorf("row %d: %w", rows+int64(i), err)
			}
		}
		rows += int64(len(entries))
		if len(entries) < page {
			return rows, nil
		}
	}
}

// token examines one token; several: that it is one of several. It counts in found
// the keys that the token has, by name.
func (r *report) token(ctx context.Context, conf config.Config, several bool, state store.State, stored bool, found map[string]int) {
	c := conf.Token
	pool, err := openToken(ctx, conf, slog.New(slog.DiscardHandler))
	if !r.result("token", err, "%q by %s", c.Label, c.Module) {
		return
	}
	defer pool.Close()
	info := pool.Info()
	r.result("module", nil, "%s %s, Cryptoki %s, token %s %s, %d sessions",
		info.Module, info.ModuleVersion, info.CryptokiVersion, info.TokenModel, info.TokenSerial, info.Sessions)
	r.profile(info)
	var here []keys.Key
	if stored {
		here = r.keys(ctx, pool, several, state.Keys)
	}
	for _, k := range here {
		found[k.Name]++
	}
	r.mechanisms(info, here)
}

// located sees that each key is in one of several tokens.
func (r *report) located(all []keys.Key, found map[string]int) {
	for _, k := range all {
		if found[k.Name] == 0 {
			r.result("key "+k.Name, errors.New("in none of the tokens that could be opened: nothing is signed with it; copy its token's backup into one, or add the token that has it"), "")
		}
	}
}

func (r *report) note(what, format string, args ...any) {
	fmt.Fprintf(r.out, "note  %-14s %s\n", what, fmt.Sprintf(format, args...))
}

// profile says how the token is taken, why, and what is known of its module.
func (r *report) profile(info hsm.Info) {
	p, err := hsm.ProfileNamed(info.Profile)
	if !r.result("profile", err, "%s, of the token %q by %s", info.Profile, info.TokenLabel, info.Manufacturer) {
		return
	}
	for _, d := range p.Deviations {
		r.note("profile", "%s is of class %v: %s [%s]", hsm.CodeName(d.Code), d.Class, d.Reason, d.Source)
	}
	for _, n := range append(p.Why, p.Hints...) {
		r.note("profile", "%s [%s]", n.Text, n.Source)
	}
	for _, f := range p.FaultsOf(info.ModuleVersion) {
		r.note("module", "this version %s has a known fault, mended in %s: %s [%s]", info.ModuleVersion, f.Fixed, f.Text, f.Source)
	}
}

// needs are the key types that want a mechanism, to sign or to be made.
var needs = map[string]struct {
	what  string
	signs []keys.Algorithm
}{
	"CKM_RSA_PKCS_KEY_PAIR_GEN":   {"RSA keys cannot be made", nil},
	"CKM_RSA_PKCS":                {"RSA keys cannot sign", []keys.Algorithm{keys.RSA2048, keys.RSA3072, keys.RSA4096}},
	"CKM_RSA_PKCS_PSS":            {"RSA keys cannot sign with PSS", nil},
	"CKM_EC_KEY_PAIR_GEN":         {"P-256 and P-384 keys cannot be made", nil},
	"CKM_ECDSA":                   {"P-256 and P-384 keys cannot sign", []keys.Algorithm{keys.P256, keys.P384}},
	"CKM_EC_EDWARDS_KEY_PAIR_GEN": {"Ed25519 keys cannot be made", nil},
	"CKM_EDDSA":                   {"Ed25519 keys cannot sign", []keys.Algorithm{keys.Ed25519}},
}

// mechanisms tells which the token lacks: where one of its registered keys wants
// it, that is a failure.
func (r *report) mechanisms(info hsm.Info, here []keys.Key) {
	for _, m := range info.Mechanisms {
		if m.Offered {
			continue
		}
		n := needs[m.Name]
		for _, k := range here {
			if slices.Contains(n.signs, k.Algorithm) {
				r.result("mechanism", fmt.Errorf("the token does not offer %s: %s, and the key %q is one; is this the right token, and the right version of its module?", m.Name, n.what, k.Name), "")
			}
		}
		r.note("mechanism", "the token does not offer %s: %s", m.Name, n.what)
	}
}

// keys sees that each registered key is in the token and still the same, and
// returns those that are.
func (r *report) keys(ctx context.Context, pool *hsm.Pool, several bool, all []keys.Key) (here []keys.Key) {
	for _, k := range all {
		pub, err := pool.PublicKey(ctx, k.ID)
		if several && errors.Is(err, hsm.ErrNotFound) {
			fmt.Fprintf(r.out, "note  %-14s not in this token\n", "key "+k.Name)
			continue
		}
		var der []byte
		if err == nil {
			der, err = x509.MarshalPKIXPublicKey(pub)
		}
		if err == nil && string(der) != string(k.Public) {
			err = errors.New("the token holds another public key under this id; nothing is signed with it")
		}
		if r.result("key "+k.Name, err, "%s, %s", k.Algorithm, k.State) {
			here = append(here, k)
		}
	}
	return here
}
