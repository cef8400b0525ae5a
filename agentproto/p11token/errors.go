package p11token

import (
	"context"
	"errors"
	"fmt"

	"github.com/signwarden/signwarden/agentproto/lease"
	"github.com/signwarden/signwarden/agentproto/p11rpc"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// CK_RV values, by PKCS#11 v2.40 (pkcs11t.h).
const (
	ckrSlotIDInvalid              p11rpc.RV = 0x003
	ckrGeneralError               p11rpc.RV = 0x005
	ckrFunctionFailed             p11rpc.RV = 0x006
	ckrArgumentsBad               p11rpc.RV = 0x007
	ckrAttributeSensitive         p11rpc.RV = 0x011
	ckrAttributeTypeInvalid       p11rpc.RV = 0x012
	ckrDataInvalid                p11rpc.RV = 0x020
	ckrDataLenRange               p11rpc.RV = 0x021
	ckrDeviceError                p11rpc.RV = 0x030
	ckrDeviceMemory               p11rpc.RV = 0x031
	ckrDeviceRemoved              p11rpc.RV = 0x032
	ckrFunctionCanceled           p11rpc.RV = 0x050
	ckrKeyHandleInvalid           p11rpc.RV = 0x060
	ckrKeyTypeInconsistent        p11rpc.RV = 0x063
	ckrKeyFunctionNotPermitted    p11rpc.RV = 0x068
	ckrMechanismInvalid           p11rpc.RV = 0x070
	ckrMechanismParamInvalid      p11rpc.RV = 0x071
	ckrObjectHandleInvalid        p11rpc.RV = 0x082
	ckrOperationActive            p11rpc.RV = 0x090
	ckrOperationNotInitialized    p11rpc.RV = 0x091
	ckrSessionCount               p11rpc.RV = 0x0b1
	ckrSessionHandleInvalid       p11rpc.RV = 0x0b3
	ckrSessionParallelUnsupported p11rpc.RV = 0x0b4
	ckrUserAlreadyLoggedIn        p11rpc.RV = 0x100
	ckrUserNotLoggedIn            p11rpc.RV = 0x101
	ckrUserTypeInvalid            p11rpc.RV = 0x103
	ckrRandomSeedNotSupported     p11rpc.RV = 0x120
	ckrBufferTooSmall             p11rpc.RV = 0x150
	ckrCryptokiNotInitialized     p11rpc.RV = 0x190
	ckrCryptokiAlreadyInitialized p11rpc.RV = 0x191
	ckrFunctionRejected           p11rpc.RV = 0x200
)

// outcomes is the CK_RV of every kind of error. Tools show little more than its
// name, so those that a user can act on are told apart. None is CKR_USER_NOT_LOGGED_IN
// or of a PIN: a tool would ask for one.
var outcomes = map[error]p11rpc.RV{
	sigerr.NotFound:        ckrKeyHandleInvalid,
	sigerr.Denied:          ckrFunctionRejected,
	sigerr.Disabled:        ckrKeyFunctionNotPermitted,
	sigerr.Invalid:         ckrDataInvalid,
	sigerr.Conflict:        ckrFunctionFailed,
	sigerr.Overloaded:      ckrDeviceMemory, // what clients take for busy, and know by name
	sigerr.Timeout:         ckrFunctionFailed,
	sigerr.Canceled:        ckrFunctionCanceled,
	sigerr.Unsupported:     ckrMechanismInvalid,
	sigerr.TokenFailed:     ckrDeviceError,
	sigerr.Unavailable:     ckrDeviceRemoved,
	sigerr.Unauthenticated: ckrFunctionRejected,
}

// outcomeOf is the only way from an error to the wire. An error of no kind is
// CKR_GENERAL_ERROR.
func outcomeOf(err error) p11rpc.RV {
	rv, ok := errors.AsType[p11rpc.RV](err)
	if ok {
		return rv
	}
	rv, ok = outcomes[sigerr.Kind(err)]
	switch {
	case errors.Is(err, lease.ErrSpent): // of its kind, but a second try does not help
		return ckrFunctionRejected
	case ok:
		return rv
	case errors.Is(err, context.DeadlineExceeded):
		return ckrFunctionFailed
	case errors.Is(err, context.Canceled):
		return ckrFunctionCanceled
	}
	return ckrGeneralError
}

// refusal is an outcome with words for our log.
type refusal struct {
	rv    p11rpc.RV
	words string
}

func (r refusal) Error() string { return r.words }
func (r refusal) Unwrap() error { return r.rv }

func refuse(rv p11rpc.RV, format string, args ...any) error {
	return refusal{rv, fmt.Sprintf(format, args...)}
}
