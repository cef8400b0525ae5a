package faultp11_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/softhsm-tests/faultp11"
)

const softhsm = "/usr/lib/softhsm/libsofthsm2.so"

// A step sets rules, opens n sessions one after the other, and looks at what came.
type step struct {
	rules []string
	want  []uint // of each C_OpenSession
}

// The module does what its rules say, and counts.
func TestRules(t *testing.T) {
	so, err := faultp11.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "directories.tokendir = %s\n", dir), 0o600); err != nil {
		t.Fatal(err)
	}
	m := faultp11.New(t, softhsm)
	maps.Copy(m.Env, map[string]string{"SOFTHSM2_CONF": conf})
	for k, v := range m.Env {
		t.Setenv(k, v)
	}
	if err := hsm.InitToken(so, m.Env, "t", hsm.NewPIN("so-pin-1"), hsm.NewPIN("user-pin")); err != nil {
		t.Fatal(err)
	}
	ctx := pkcs11.New(so)
	if err := ctx.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer ctx.Finalize()
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []step{
		{nil, []uint{0, 0}},
		{[]string{"C_OpenSession nth=2 rv=0x30"}, []uint{0, 0x30, 0}},
		{[]string{"C_OpenSession from=2 rv=5"}, []uint{0, 5, 5}},
		{[]string{"# a comment", "C_OpenSession every=2 times=1 rv=5"}, []uint{0, 5, 0, 0}},
		{[]string{"C_OpenSession always rv=0xB1"}, []uint{0xb1, 0xb1}},
		{[]string{"C_OpenSession p=1 rv=0x30", "seed 7"}, []uint{0x30}},
		{[]string{"C_OpenSession p=0 rv=0x30"}, []uint{0, 0}},
		{[]string{"C_OpenSession delay=1"}, []uint{0}},
		{[]string{"sessions 2"}, []uint{0, 0, 0xb1}},
		{[]string{"sessions_total 1"}, []uint{0, 0xb1}},
	} {
		m.Set(t, s.rules...)
		before := m.Calls("C_OpenSession")
		for i, want := range s.want {
			_, err := ctx.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
			rv, _ := errors.AsType[pkcs11.Error](err)
			if uint(rv) != want {
				t.Errorf("%q, call %d: CK_RV 0x%x, want 0x%x", s.rules, i, uint(rv), want)
			}
		}
		if n := m.Calls("C_OpenSession") - before; n != len(s.want) {
			t.Errorf("%q: %d calls counted, want %d", s.rules, n, len(s.want))
		}
		if err := ctx.CloseAllSessions(slots[0]); err != nil || m.Sessions() != 0 {
			t.Errorf("%q: %d sessions left, %v", s.rules, m.Sessions(), err)
		}
	}
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}
	m.Set(t, "C_GetInfo after=0x30", "hide 0x1041", "reported 4")
	if _, err := ctx.GetInfo(); err == nil || m.Injected(0) != 1 {
		t.Errorf("after: %v, injected %d times", err, m.Injected(0))
	}
	if _, err := ctx.GetMechanismInfo(slots[0], mechanism); !errors.Is(err, pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID)) {
		t.Errorf("hidden mechanism: %v", err)
	}
	if i, err := ctx.GetTokenInfo(slots[0]); err != nil || i.MaxSessionCount != 4 {
		t.Errorf("reported %d sessions, %v", i.MaxSessionCount, err)
	}
}
