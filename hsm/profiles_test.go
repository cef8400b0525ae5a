package hsm_test

import (
	"crypto"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/signwarden/signwarden/hsm"
)

// deviations is the table as it is meant to be: one row for each code that a
// profile reads otherwise, and what the code is of another call.
var deviations = []struct {
	profile, call string
	code          uint
	want          hsm.Class
}{
	{"cloudhsm", "C_Sign", pkcs11.CKR_FUNCTION_FAILED, hsm.ClassBusy},
	{"cloudhsm", "C_SignInit", pkcs11.CKR_OPERATION_ACTIVE, hsm.ClassBusy},
	{"cloudhsm", "C_GetAttributeValue", pkcs11.CKR_DEVICE_ERROR, hsm.ClassBusy},
	{"cloudhsm", "C_Sign", pkcs11.CKR_DEVICE_ERROR, hsm.ClassGone},
	{"cloudhsm", "C_OpenSession", pkcs11.CKR_ARGUMENTS_BAD, hsm.ClassBusy},
	{"cloudhsm", "C_Sign", pkcs11.CKR_ARGUMENTS_BAD, hsm.ClassRefused},
	{"yubihsm", "C_Sign", pkcs11.CKR_SESSION_CLOSED, hsm.ClassLogin},
	{"yubihsm", "C_Sign", pkcs11.CKR_ENCRYPTED_DATA_INVALID, hsm.ClassLogin},
}

// Every code of every profile: as the table says, or else as the default one.
func TestProfiles(t *testing.T) {
	rows := map[string]bool{}
	for _, d := range deviations {
		rows[fmt.Sprint(d.profile, d.call, d.code)] = true
		if got := hsm.ClassifyBy(t, d.profile, d.call, d.code); got != d.want {
			t.Errorf("%s: %s: %s is of class %v, want %v", d.profile, d.call, hsm.CodeName(d.code), got, d.want)
		}
	}
	for _, name := range hsm.Profiles() {
		p, err := hsm.ProfileNamed(name)
		if err != nil {
			t.Fatal(err)
		}
		for code, class := range hsm.Codes() {
			for _, call := range []string{"C_Sign", "C_SignInit", "C_OpenSession", "C_GetAttributeValue", "C_Login"} {
				if got := hsm.ClassifyBy(t, name, call, code); got != class && !rows[fmt.Sprint(name, call, code)] &&
					!(name == "cloudhsm" && (code == pkcs11.CKR_OPERATION_ACTIVE || code == pkcs11.CKR_FUNCTION_FAILED)) &&
					!(name == "yubihsm" && code == pkcs11.CKR_SESSION_CLOSED) {
					t.Errorf("%s: %s: %s is of class %v, and the table of this test does not say so", name, call, hsm.CodeName(code), got)
				}
			}
		}
		// Nothing without a source.
		for _, d := range p.Deviations {
			if d.Reason == "" || d.Source == "" {
				t.Errorf("%s: %s has no reason or no source", name, hsm.CodeName(d.Code))
			}
		}
		notes := append(p.Why, p.Hints...)
		for _, f := range p.Faults {
			notes = append(notes, f.Note)
		}
		for _, n := range notes {
			if n.Text == "" || n.Source == "" {
				t.Errorf("%s: %q has no source", name, n.Text)
			}
		}
		if (p.KeepAlive > 0 || p.ReadWrite || p.CountsPINs) && len(p.Why) == 0 {
			t.Errorf("%s: it does not say why", name)
		}
		if (name == hsm.DefaultProfile) != (len(p.Files)+len(p.Makers) == 0) {
			t.Errorf("%s: chosen by %q, %q", name, p.Files, p.Makers)
		}
	}
	if _, err := hsm.ProfileNamed("nosuch"); err == nil || !strings.Contains(err.Error(), "yubihsm") {
		t.Errorf("got %v, want an error that names those there are", err)
	}
}

func TestProfileChosen(t *testing.T) {
	for _, tt := range []struct{ module, maker, want string }{
		{"/usr/lib/softhsm/libsofthsm2.so", "SoftHSM project", "softhsm"},
		{"/tmp/libother.so", "SoftHSM project", "softhsm"},
		{"/opt/cloudhsm/lib/libcloudhsm_pkcs11.so", "", "cloudhsm"},
		{"/usr/safenet/lunaclient/lib/libCryptoki2_64.so", "SafeNet", "luna"},
		{"/usr/lib/x86_64-linux-gnu/pkcs11/yubihsm_pkcs11.so", "Yubico (www.yubico.com)", "yubihsm"},
		{"/usr/lib/libykcs11.so", "Yubico (www.yubico.com)", "default"},
		{"/opt/nfast/toolkits/pkcs11/libcknfast.so", "nCipher Corp. Ltd", "nshield"},
		{"/opt/cloudhsm-notes/libx.so", "somebody", "default"},
	} {
		if got := hsm.ProfileOf(tt.module, tt.maker); got != tt.want {
			t.Errorf("%s by %q: %s, want %s", tt.module, tt.maker, got, tt.want)
		}
	}
}

func TestFaultsOf(t *testing.T) {
	p, err := hsm.ProfileNamed("softhsm")
	if err != nil {
		t.Fatal(err)
	}
	for version, want := range map[string]bool{"2.6": true, "2.5": true, "2.7": false, "2.10": false, "3.0": false, "junk": false} {
		if got := len(p.FaultsOf(version)) > 0; got != want {
			t.Errorf("%s has faults: %v", version, got)
		}
	}
}

// A profile changes what is done, and not only what is said.
func TestProfileInForce(t *testing.T) {
	c := newToken(t)
	c.Sessions, c.Profile = 1, "cloudhsm"
	p, f := openFaulty(t, c)
	if got := p.Info().Profile; got != "cloudhsm" {
		t.Errorf("profile %q", got)
	}
	generate(t, p, "k", "p256")
	f.arm(times(2, "C_SignInit", pkcs11.CKR_OPERATION_ACTIVE)) // class B would give up
	if _, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256); err != nil || f.count("C_SignInit") != 3 {
		t.Errorf("%v after %d tries", err, f.count("C_SignInit"))
	}
	c.Profile = "nosuch"
	if _, err := hsm.Open(t.Context(), c); err == nil {
		t.Error("opened with a profile that is not there")
	}
	c.Profile = "yubihsm"
	p, f = openFaulty(t, c)
	f.arm(nil)
	if err := p.Ping(t.Context()); err != nil || f.count("C_GenerateRandom") != 1 {
		t.Errorf("%v; the device was asked %d times, want once", err, f.count("C_GenerateRandom"))
	}
	f.arm(times(1, "C_GenerateRandom", pkcs11.CKR_SESSION_CLOSED))
	if err := p.Ping(t.Context()); err != nil || f.count("C_Login") != 1 {
		t.Errorf("%v; %d logins, want one", err, f.count("C_Login"))
	}
	c.Profile = ""
	p, f = openFaulty(t, c)
	f.arm(times(-1, "C_SignInit", pkcs11.CKR_OPERATION_ACTIVE))
	_, err := p.Sign(t.Context(), []byte("k"), d256, crypto.SHA256)
	if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != hsm.ClassStuck || p.Info().Profile != "softhsm" {
		t.Errorf("with profile %q: %v", p.Info().Profile, err)
	}
}
