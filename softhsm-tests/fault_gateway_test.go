package softhsm_test

import (
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/signwarden/signwarden/gateway/sigerr"
)

// last is the outcome and the detail of the last record.
func (f *faultGateway) last(t testing.TB) string {
	t.Helper()
	e := f.audit(t, 1)[0].Entry
	return e["outcome"] + ": " + e["reason"] + " " + e["detail"]
}

// What a client is told of a fault of the token, and what the audit log has of it; and
// that the same gateway signs when the fault is mended.
func TestFaultsThroughGateway(t *testing.T) {
	f := newFaultGateway(t, "  call_timeout: 1s\n")
	for _, k := range []struct {
		name  string
		rules []string
		want  error  // nil: it is signed
		log   string // what the record says
	}{
		{"stuck once", []string{"C_SignInit nth=1 rv=0x90"}, nil, ""},
		{"session lost once", []string{"C_SignInit nth=1 rv=0xB3"}, nil, ""},
		{"busy once", []string{"C_SignInit nth=1 rv=0x31"}, nil, ""},
		{"gone once", []string{"C_SignInit nth=1 rv=0x5"}, nil, ""},
		{"crash", []string{"C_Sign nth=1 segv"}, nil, ""},
		{"hang", []string{"C_Sign nth=1 hang"}, nil, ""},
		{"refused", []string{"C_SignInit rv=0x68"}, sigerr.Unsupported, "CKR_KEY_FUNCTION_NOT_PERMITTED"},
		{"busy", []string{"C_SignInit rv=0x31"}, sigerr.Overloaded, "CKR_DEVICE_MEMORY"},
		{"gone", []string{"C_SignInit rv=0x32"}, sigerr.TokenFailed, "CKR_DEVICE_REMOVED: the token was removed; put it back"},
		{"crashes", []string{"C_Sign segv"}, sigerr.TokenFailed, "two workers in turn crashed"},
		{"wrong signature", []string{"C_Sign corrupt"}, sigerr.TokenFailed, "the token's signature does not verify"},
		{"mechanism not offered", []string{"hide 0x1041"}, sigerr.Unsupported, "CKR_MECHANISM_INVALID: the token does not offer this mechanism"},
	} {
		t.Run(k.name, func(t *testing.T) {
			f.Set(t, k.rules...)
			err := f.sign(t, faultDeadline)
			if !errors.Is(err, k.want) {
				t.Fatalf("got %v, want %v", err, k.want)
			}
			for _, inside := range []string{"/", "slot", "put it back", "worker"} { // the CK_RV it is told
				if k.want != nil && strings.Contains(err.Error(), inside) {
					t.Errorf("the client is told of the token's inside (%q): %v", inside, err)
				}
			}
			if last := f.last(t); k.want != nil && !(strings.HasPrefix(last, "failed: ") && strings.Contains(last, k.log)) {
				t.Errorf("recorded %q, want %q", last, k.log)
			}
			f.Set(t)
			waitFor(t, "it signs again", func() bool { return f.sign(t, faultDeadline) == nil })
		})
	}
}

// A token that is initialised anew under load, then given another key under the id of
// the first: no signature leaves that is not the registered key's, the records say why,
// and when the operator has put the token back the same gateway signs.
func TestTokenReinitialised(t *testing.T) {
	f := newFaultGateway(t, "")
	tokens := f.dir + "/token/tokens"
	copyAll(t, tokens, tokens+".backup")
	pin := func(name string) string { return strings.TrimSpace(string(readFile(t, f.dir+"/token/"+name+".pin"))) }
	env := append(os.Environ(), "SOFTHSM2_CONF="+f.dir+"/token/softhsm2.conf")
	var stop atomic.Bool
	var l *tally
	done := make(chan struct{})
	go func() {
		defer close(done)
		l = signUntil(8, func() error { return f.sign(t, faultDeadline) }, func(int64) bool { return stop.Load() })
	}()
	waitFor(t, "the load runs", func() bool { return f.Calls("C_Sign") > 1000 })
	mustEnv(t, env, "softhsm2-util", "--init-token", "--token", "signwarden-dev", "--label", "signwarden-dev", "--so-pin", pin("so"), "--pin", pin("user"))
	waitFor(t, "requests fail", func() bool { return f.sign(t, faultDeadline) != nil })
	if last := f.last(t); !strings.Contains(last, "no such key in the token") {
		t.Errorf("without the key: recorded %q", last)
	}
	show := f.must(t, "signwarden", "key", "show", "rel", "-o", "json")
	_, after, _ := strings.Cut(show, `"token_id": "`)
	f.pkcs11(t, "--keypairgen", "--key-type", "EC:prime256v1", "--id", after[:32], "--label", "rel")
	waitFor(t, "another key is met", func() bool {
		return f.sign(t, faultDeadline) != nil && strings.Contains(f.last(t), "the token's signature does not verify")
	})
	copyAll(t, tokens+".backup", tokens)
	waitFor(t, "it signs again", func() bool { return f.sign(t, faultDeadline) == nil })
	stop.Store(true)
	<-done
	t.Log(l)
	if l.kinds["wrong"] > 0 || len(l.kinds) != 1 || l.kinds[sigerr.TokenFailed.Error()] == 0 {
		t.Errorf("errors %v, want the token's only", l.kinds)
	}
}
