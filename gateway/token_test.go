package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// tokenFault is a token's error, as package hsm has them.
type tokenFault struct {
	name                    string
	refused, gone, operator bool
}

func (f tokenFault) Error() string  { return "slot 7, serial 4711: " + f.name }
func (f tokenFault) Name() string   { return f.name }
func (f tokenFault) Refused() bool  { return f.refused }
func (f tokenFault) Gone() bool     { return f.gone }
func (f tokenFault) Operator() bool { return f.operator }

// A caller learns what the token's failure means for it, and nothing of the token; the
// record has all.
func TestTokenFailureIsTold(t *testing.T) {
	f := gatewaytest.New(t, twoTeams)
	f.Key(t, "b-key", keys.P256)
	bob := gatewaytest.Principal(t, "bob")
	for _, tt := range []struct {
		err  error
		kind error
		want string
	}{
		{tokenFault{name: "CKR_MECHANISM_INVALID", refused: true}, sigerr.Unsupported, "refuses this request as it stands (CKR_MECHANISM_INVALID)"},
		{tokenFault{name: "CKR_DEVICE_REMOVED", gone: true}, sigerr.TokenFailed, "does not work (CKR_DEVICE_REMOVED)"},
		{tokenFault{name: "CKR_PIN_LOCKED", operator: true}, sigerr.TokenFailed, "waits for its operator (CKR_PIN_LOCKED)"},
		{tokenFault{name: "CK_RV 0x80000001"}, sigerr.TokenFailed, "CK_RV 0x80000001"},
		{tokenFault{name: "the module /usr/lib/x.so hung"}, sigerr.TokenFailed, ""},
		{errors.New("slot 7, serial 4711 is down"), sigerr.TokenFailed, ""},
	} {
		f.Token.Before = func(context.Context, []byte) error { return fmt.Errorf("signing: %w", tt.err) }
		_, err := f.Sign(t.Context(), bob, gatewaytest.Request("b-key", tt.want))
		if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: told %v, want %v: %q", tt.err, err, tt.kind, tt.want)
			continue
		}
		if strings.Contains(err.Error(), "4711") || strings.Contains(err.Error(), "/usr") {
			t.Errorf("%v: told %v", tt.err, err)
		}
		if e := f.Store.Last(t); e.Outcome != audit.Failed || !strings.Contains(e.Reason, tt.err.Error()) {
			t.Errorf("%v: recorded %+v", tt.err, e)
		}
	}
}
