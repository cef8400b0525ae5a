package hsm_test

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/hsm"
)

func TestOpenSaysWhatToDo(t *testing.T) {
	c := newToken(t)
	dir := t.TempDir()
	text := filepath.Join(dir, "text.so")
	if err := os.WriteFile(text, []byte("no module"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, k := range []struct {
		name   string
		change func(*hsm.Config)
		token  func(*pkcs11.TokenInfo)
		want   []string
	}{
		{"missing module", func(c *hsm.Config) { c.Module = dir + "/gone.so" }, nil, []string{dir + "/gone.so", "softhsm2"}},
		{"not a library", func(c *hsm.Config) { c.Module = text }, nil, []string{text, "no shared library"}},
		{"a library, but no module", func(c *hsm.Config) { c.Module = "/lib/x86_64-linux-gnu/libc.so.6" }, nil, []string{"not a PKCS#11 module"}},
		{"wrong label", func(c *hsm.Config) { c.TokenLabel = "nothing" }, nil, []string{`"nothing"`, fmt.Sprintf("%q", c.TokenLabel)}},
		{"no PIN", func(c *hsm.Config) { c.PIN = hsm.PIN{} }, nil, []string{"no PIN"}},
		{"wrong PIN", func(c *hsm.Config) { c.PIN = hsm.NewPIN("0000") }, nil, []string{"CKR_PIN_INCORRECT", "tried once", "PIN file"}},
		{"locked", nil, func(i *pkcs11.TokenInfo) { i.Flags |= pkcs11.CKF_USER_PIN_LOCKED }, []string{"CKR_PIN_LOCKED", "SO PIN"}},
		{"final try", nil, func(i *pkcs11.TokenInfo) { i.Flags |= pkcs11.CKF_USER_PIN_FINAL_TRY }, []string{"locks the token", "pkcs11-tool --login"}},
		{"no user PIN", nil, func(i *pkcs11.TokenInfo) { i.Flags &^= pkcs11.CKF_USER_PIN_INITIALIZED }, []string{"CKR_USER_PIN_NOT_INITIALIZED", "--init-pin"}},
		{"twice", nil, func(i *pkcs11.TokenInfo) { i.Label, i.Flags = c.TokenLabel, i.Flags|pkcs11.CKF_TOKEN_INITIALIZED }, []string{"tokens have this label"}},
		{"none", nil, func(i *pkcs11.TokenInfo) { i.Flags = 0 }, []string{"no initialised token", env["SOFTHSM2_CONF"]}},
	} {
		t.Run(k.name, func(t *testing.T) {
			c := c
			if k.change != nil {
				k.change(&c)
			}
			f := &faulty{counts: map[string]int{}, token: k.token}
			p, err := hsm.OpenWith(t.Context(), c, func(a hsm.API) hsm.API { f.API = a; return f })
			if err == nil {
				p.Close()
				t.Fatal("opened")
			}
			for _, w := range k.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("got %q, want it to tell %q", err, w)
				}
			}
			if most := map[bool]int{true: 1}[k.name == "wrong PIN"]; f.count("C_Login") != most {
				t.Errorf("%d logins, want %d", f.count("C_Login"), most)
			}
		})
	}
	p := openPool(t, c) // and the right PIN still works: nothing is locked
	ctx, slot := p.LoadedCtx()
	i, err := ctx.GetTokenInfo(slot)
	if err != nil || i.Flags&(pkcs11.CKF_USER_PIN_LOCKED|pkcs11.CKF_USER_PIN_FINAL_TRY) != 0 {
		t.Errorf("token flags %#x, %v: the PIN is nearly locked", i.Flags, err)
	}
}

func TestOpenEndedContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := hsm.Open(ctx, newToken(t)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want Canceled", err)
	}
}

// Two pools of one token share the module and the login; the first to close
// takes nothing from the other.
func TestTwoPools(t *testing.T) {
	c := newToken(t)
	a, b := openPool(t, c), openPool(t, c)
	generate(t, a, "k", "p256")
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := b.Sign(t.Context(), []byte("k"), d256, crypto.SHA256); err != nil {
		t.Error(err)
	}
	other := c
	other.Env = map[string]string{"SOFTHSM2_CONF": "/elsewhere"}
	if _, err := hsm.Open(t.Context(), other); err == nil || !strings.Contains(err.Error(), "/elsewhere") {
		t.Errorf("another environment for a module in use: got %v", err)
	}
}

// A module that other code of the process initialised is not finalised by us.
func TestGuest(t *testing.T) {
	c := newToken(t)
	ctx := pkcs11.New(softhsm)
	if err := ctx.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer ctx.Finalize()
	p, err := hsm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := ctx.GetInfo(); err != nil {
		t.Errorf("after Close: %v", err)
	}
}

func TestInfo(t *testing.T) {
	c := newToken(t)
	i := openPool(t, c).Info()
	if i.TokenLabel != c.TokenLabel || i.TokenSerial == "" || i.ModuleVersion != "2.6" || i.Sessions != c.Sessions {
		t.Errorf("got %+v", i)
	}
	for _, m := range i.Mechanisms {
		if !m.Offered {
			t.Errorf("SoftHSM offers %s, Info says not", m.Name)
		}
	}
}

// The sessions the token grants bound the pool, less one to hold the login.
func TestSessionBound(t *testing.T) {
	for _, k := range []struct {
		grants uint
		want   int
	}{{0, 5}, {pkcs11.CK_UNAVAILABLE_INFORMATION, 5}, {100, 5}, {5, 4}, {2, 1}, {1, 1}} {
		c := newToken(t)
		c.Sessions = 5
		f := &faulty{counts: map[string]int{}, token: func(i *pkcs11.TokenInfo) { i.MaxSessionCount = k.grants }}
		p, err := hsm.OpenWith(t.Context(), c, func(a hsm.API) hsm.API { f.API = a; return f })
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Info().Sessions; got != k.want {
			t.Errorf("token grants %d: pool has %d, want %d", k.grants, got, k.want)
		}
		generate(t, p, "k", "p256")
		if opens := f.count("C_OpenSession"); k.grants == 1 && opens-f.count("C_CloseSession") > 1 {
			t.Errorf("%d sessions opened at a time, of 1", opens-f.count("C_CloseSession"))
		}
		p.Close()
	}
}

func TestInitTokenRefuses(t *testing.T) {
	c := newToken(t)
	pin := hsm.NewPIN(userPIN)
	for name, err := range map[string]error{
		"taken":       hsm.InitToken(softhsm, env, c.TokenLabel, pin, pin),
		"empty label": hsm.InitToken(softhsm, env, "", pin, pin),
		"long label":  hsm.InitToken(softhsm, env, strings.Repeat("x", 33), pin, pin),
		"no PIN":      hsm.InitToken(softhsm, env, "x", pin, hsm.PIN{}),
		"no module":   hsm.InitToken("/gone.so", env, "x", pin, pin),
	} {
		if err == nil || (name == "taken") != errors.Is(err, hsm.ErrExists) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestPINHides(t *testing.T) {
	const secret = "correct horse"
	pin := hsm.NewPIN(secret)
	type inner struct{ pin hsm.PIN }
	j, err := json.Marshal(struct{ P hsm.PIN }{pin})
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "pin", pin, "config", hsm.Config{PIN: pin}, "inner", inner{pin})
	for _, s := range []string{
		string(j), log.String(), pin.String(),
		fmt.Sprint(pin), fmt.Sprintf("%v %+v %#v %s %q %x %d", pin, pin, pin, pin, pin, pin, pin),
		fmt.Sprintf("%v %+v %#v", inner{pin}, &inner{pin}, inner{pin}), fmt.Sprintf("%+v %#v", hsm.Config{PIN: pin}, &pin),
	} {
		if strings.Contains(s, secret) || strings.Contains(s, fmt.Sprintf("%x", secret)) {
			t.Errorf("%q shows the PIN", s)
		}
	}
	if pin.Reveal() != secret || (hsm.PIN{}).Reveal() != "" {
		t.Error("Reveal does not give it either")
	}
}

func TestReadPIN(t *testing.T) {
	for _, k := range []struct {
		name, text string
		mode       os.FileMode
		want       string // "" is an error
	}{
		{"newline", "q1w2\n", 0o400, "q1w2"},
		{"CRLF", "q1w2\r\n", 0o600, "q1w2"},
		{"bare", "12 34", 0o600, "12 34"},
		{"longest", strings.Repeat("x", hsm.MaxPINFile) + "\r\n", 0o600, strings.Repeat("x", hsm.MaxPINFile)},
		{"too long", strings.Repeat("x", hsm.MaxPINFile+1), 0o600, ""},
		{"two lines", "q1w2\ne3r4\n", 0o600, ""},
		{"two newlines", "q1w2\n\n", 0o600, ""},
		{"empty", "", 0o600, ""},
		{"only a newline", "\n", 0o600, ""},
		{"group", "q1w2", 0o640, ""},
		{"others", "q1w2", 0o604, ""},
	} {
		t.Run(k.name, func(t *testing.T) {
			f := filepath.Join(t.TempDir(), "pin")
			if err := os.WriteFile(f, []byte(k.text), k.mode); err != nil {
				t.Fatal(err)
			}
			pin, err := hsm.ReadPIN(f)
			if pin.Reveal() != k.want || (err == nil) != (k.want != "") {
				t.Errorf("got %q, %v; want %q", pin.Reveal(), err, k.want)
			}
			if err != nil && strings.Contains(err.Error(), "q1w2") {
				t.Errorf("%q shows the PIN", err)
			}
		})
	}
}
