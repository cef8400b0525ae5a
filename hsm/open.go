package hsm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"
)

// Config says which token to open and how.
type Config struct {
	Module     string            // path of the PKCS#11 module
	Env        map[string]string // set in this process before the module is loaded, e.g. SOFTHSM2_CONF
	TokenLabel string            // CKA label of the token; must be unique in the module
	PIN        PIN               // the user PIN; not looked at where Ask is set
	Sessions   int               // bound on sessions used for signing; 0 is defaultSessions
	Profile    string            // one of Profiles; empty: by the module's file name and the token's maker
	Writes     bool              // sessions are read-write: for a pool that makes, imports or destroys, and does little else
	Logger     *slog.Logger      // nil logs nothing

	// Ask, where it is set, gives the PIN: Open calls it once, when it has found
	// the token and would log in. Where it errs no PIN is tried, and Open fails
	// with that error. Such a pool forgets the PIN when it is logged in, and does
	// not log in again: when the login is lost, operations fail with ClassLogin,
	// for a supervisor who counts the tries of all its pools to act on.
	Ask func(Info) (PIN, error)
}

// defaultSessions is one for each CPU: one alone idles while its result is handed
// over, and more than CPUs bring nothing with a software token (figures at
// BenchmarkSessions). A network HSM, whose callers wait for the wire, wants a
// number from its manual in Config.
func defaultSessions() int { return runtime.NumCPU() }

// Info is what a module and its token say of themselves.
type Info struct {
	Module          string // CK_INFO libraryDescription
	ModuleVersion   string // CK_INFO libraryVersion
	CryptokiVersion string // the PKCS#11 version the module speaks
	Manufacturer    string // of the token
	Profile         string // in force; ProfileNamed has it
	TokenLabel      string
	TokenModel      string
	TokenSerial     string
	WrongPIN        bool        // at Open: a wrong PIN was entered since somebody last logged in, by the token's word
	CountsPINs      bool        // the token is known to keep WrongPIN
	Sessions        int         // the bound in force
	Mechanisms      []Mechanism // those this package uses, offered or not
}

// Mechanism is one of the mechanisms this package uses.
type Mechanism struct {
	Name             string
	Offered          bool // by this token
	MinBits, MaxBits uint // of a key, as the token states them
}

var mechanisms = []struct {
	name string
	code uint
}{
	{"CKM_RSA_PKCS_KEY_PAIR_GEN", pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN},
	{"CKM_RSA_PKCS", pkcs11.CKM_RSA_PKCS},
	{"CKM_RSA_PKCS_PSS", pkcs11.CKM_RSA_PKCS_PSS},
	{"CKM_EC_KEY_PAIR_GEN", pkcs11.CKM_EC_KEY_PAIR_GEN},
	{"CKM_ECDSA", pkcs11.CKM_ECDSA},
	{"CKM_EC_EDWARDS_KEY_PAIR_GEN", ckmECEdwardsKeyPairGen},
	{"CKM_EDDSA", ckmEdDSA},
}

// Open loads the module, finds the token by its label and logs in. The PIN is
// tried once, and not at all where the token says that it is locked or that
// one more wrong try would lock it. Where this process is logged in to the
// token already, the PIN is not looked at.
//
// Open leaves at the end of ctx between two calls into the module, not in the
// middle of one.
func Open(ctx context.Context, c Config) (*Pool, error) {
	return open(ctx, c, func(a api) api { return a })
}

// open lets tests stand between the pool and the module.
func open(ctx context.Context, c Config, wrap func(api) api) (*Pool, error) {
	if c.Ask == nil && c.PIN.Reveal() == "" {
		return nil, fmt.Errorf("opening token %q: %w", c.TokenLabel, errNoPIN)
	}
	if _, err := ProfileNamed(c.Profile); c.Profile != "" && err != nil {
		return nil, err
	}
	m, err := acquire(c.Module, c.Env)
	if err != nil {
		return nil, err
	}
	p := &Pool{
		api: wrap(m.ctx), mod: m, pin: c.PIN, ask: c.Ask, writes: c.Writes, log: c.Logger,
		keys: map[string]key{},
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	t, err := p.findToken(c.TokenLabel)
	if err == nil {
		err = usable(t)
	}
	if err == nil {
		if p.profile, err = ProfileNamed(c.Profile); err != nil {
			p.profile = profileOf(c.Module, t.ManufacturerID)
		}
		err = p.describe(t)
	}
	if err != nil {
		m.release()
		return nil, fmt.Errorf("opening token %q: %w", c.TokenLabel, err)
	}
	p.start(c.Sessions, t)
	err = p.do(ctx, "login", func(*job, *worker) error { return nil }) // a worker that is ready is logged in
	if err != nil {
		p.Close()
		return nil, fmt.Errorf("opening token %q: %w", c.TokenLabel, err)
	}
	return p, nil
}

// findToken sets p.slot to the slot of the only token with this label.
func (p *Pool) findToken(label string) (pkcs11.TokenInfo, error) {
	slots, err := p.api.GetSlotList(true)
	if err != nil {
		return pkcs11.TokenInfo{}, fail("C_GetSlotList", err)
	}
	var found []pkcs11.TokenInfo
	var labels []string
	blank := 0 // SoftHSM always shows one slot with an uninitialised token
	for _, slot := range slots {
		t, err := p.api.GetTokenInfo(slot)
		if err == nil && t.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			blank++
		}
		if err != nil || t.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		t.Label = strings.TrimRight(t.Label, "\x00 ") // padded with spaces; some pad with zeros
		labels = append(labels, fmt.Sprintf("%q", t.Label))
		if t.Label == label {
			found, p.slot = append(found, t), slot
		}
	}
	slices.Sort(labels)
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return pkcs11.TokenInfo{}, fmt.Errorf("%d tokens have this label (serials %s and %s): give one of them another", len(found), found[0].SerialNumber, found[1].SerialNumber)
	}
	why := softhsmTrouble(p.mod.path)
	switch {
	case why != "":
		return pkcs11.TokenInfo{}, fmt.Errorf("no such token: %s", why)
	case len(labels) > 0:
		return pkcs11.TokenInfo{}, fmt.Errorf("no such token; the module has %s: correct token.label", strings.Join(labels, ", "))
	case blank > 0:
		return pkcs11.TokenInfo{}, fmt.Errorf("the module shows no initialised token, and %d that is not: initialise it, or check the module's configuration (SoftHSM: SOFTHSM2_CONF=%q)", blank, os.Getenv("SOFTHSM2_CONF"))
	}
	return pkcs11.TokenInfo{}, errors.New("the module shows no token at all: check the device, its connection, and the module's configuration")
}

// usable refuses before C_Login what C_Login would make worse.
func usable(t pkcs11.TokenInfo) error {
	switch {
	case t.Flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0:
		return &Error{Op: "C_GetTokenInfo", Code: pkcs11.CKR_USER_PIN_NOT_INITIALIZED, Class: ClassOperator}
	case t.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return &Error{Op: "C_GetTokenInfo", Code: pkcs11.CKR_PIN_LOCKED, Class: ClassOperator}
	case t.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return &Error{Op: "C_GetTokenInfo", Class: ClassOperator,
			Detail: "one more wrong PIN locks the token, so none was tried; log in once by hand with the right one (pkcs11-tool --login --test), which resets the count"}
	}
	return nil
}

func (p *Pool) describe(t pkcs11.TokenInfo) error {
	i, err := p.api.GetInfo()
	if err != nil {
		return fail("C_GetInfo", err)
	}
	version := func(v pkcs11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }
	p.info = Info{
		Module: i.LibraryDescription, ModuleVersion: version(i.LibraryVersion), CryptokiVersion: version(i.CryptokiVersion),
		Manufacturer: t.ManufacturerID, TokenLabel: t.Label, TokenModel: t.Model, TokenSerial: t.SerialNumber,
		WrongPIN: t.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0, CountsPINs: p.profile.CountsPINs, Profile: p.profile.Name,
	}
	for _, m := range mechanisms {
		// An error is how a token says that it lacks the mechanism.
		mi, err := p.api.GetMechanismInfo(p.slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(m.code, nil)})
		p.info.Mechanisms = append(p.info.Mechanisms, Mechanism{m.name, err == nil, mi.MinKeySize, mi.MaxKeySize})
	}
	return nil
}

// Info returns what the module and the token said of themselves at Open.
func (p *Pool) Info() Info {
	i := p.info
	i.Mechanisms = slices.Clone(i.Mechanisms)
	return i
}

// start makes the workers: as many as asked for, less than the token has
// sessions, so that one remains to hold the login.
func (p *Pool) start(n int, t pkcs11.TokenInfo) {
	if n <= 0 {
		n = defaultSessions()
	}
	p.spare = true
	if most := t.MaxSessionCount; most != 0 && most != pkcs11.CK_UNAVAILABLE_INFORMATION { // 0 is CK_EFFECTIVELY_INFINITE
		p.spare = most > 1
		n = int(min(uint(n), max(most-1, 1)))
	}
	p.info.Sessions = n
	p.epoch.Store(1) // 0 is that of no session
	for range n {
		w := &worker{p: p, jobs: make(chan *job, 1)}
		p.workers, p.idle = append(p.workers, w), append(p.idle, w)
		p.running.Go(w.loop)
	}
}
