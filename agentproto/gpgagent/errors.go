package gpgagent

import (
	"context"
	"errors"

	"github.com/signwarden/signwarden/agentproto/assuan"
	"github.com/signwarden/signwarden/agentproto/lease"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// The sources of libgpg-error values. Clients show a text for the code alone.
const (
	sourceAgent = 4 << 24
	sourceSCD   = 6 << 24
)

// Replies, by the codes of libgpg-error's err-codes.h and with its texts.
var (
	errGeneral        = agentError(1, "General error")
	errNoSecretKey    = agentError(17, "No secret key")
	errNotFound       = agentError(27, "Not found")
	errExhausted      = agentError(33, "Resources exhausted")
	errNotSupported   = agentError(60, "Not supported")
	errTimeout        = agentError(62, "Timeout")
	errConflict       = agentError(70, "Conflicting use")
	errTruncated      = agentError(74, "Result truncated")
	errAlgorithm      = agentError(84, "Unsupported algorithm")
	errNotTrusted     = agentError(98, "Not trusted")
	errCanceled       = agentError(99, "Operation cancelled")
	errNoSCDaemon     = agentError(119, "No SmartCard daemon")
	errHardware       = agentError(129, "Hardware problem")
	errLength         = agentError(139, "Invalid length")
	errNotOperational = agentError(176, "Not operational")
	errLimit          = agentError(183, "Limit reached")
	errTicketExpired  = agentError(237, "Ticket expired")
	errForbidden      = agentError(251, "Forbidden")
	errDisabled       = agentError(252, "Key disabled")
	errFalse          = agentError(256, "False")
	errParameter      = agentError(280, "IPC parameter error")
	errNotAuth        = agentError(314, "Not authenticated")
	errNoFile         = agentError(32768+81, "No such file or directory") // GPG_ERR_ENOENT

	errNoDevice = &assuan.Error{Code: sourceSCD | 32768 + 80, Text: "No such device <SCD>"} // GPG_ERR_ENODEV
)

func agentError(code uint32, text string) *assuan.Error {
	return &assuan.Error{Code: sourceAgent | code, Text: text + " <GPG Agent>"}
}

// parameterError tells the client's author what is wrong with an argument; never what we know of a key.
func parameterError(detail string) *assuan.Error {
	return &assuan.Error{Code: errParameter.Code, Text: errParameter.Text + " - " + detail}
}

// replies is the wire form of every kind of error. gpg shows the code's text, so
// codes that a user can act on are told apart.
var replies = map[error]*assuan.Error{
	sigerr.NotFound:        errNoSecretKey,
	sigerr.Denied:          errForbidden,
	sigerr.Disabled:        errDisabled,
	sigerr.Invalid:         errParameter,
	sigerr.Conflict:        errConflict,
	sigerr.Overloaded:      errLimit,
	sigerr.Timeout:         errTimeout,
	sigerr.Canceled:        errCanceled,
	sigerr.Unsupported:     errNotSupported,
	sigerr.TokenFailed:     errHardware,
	sigerr.Unavailable:     errNotOperational,
	sigerr.Unauthenticated: errNotAuth,
}

// replyTo is the only way from an error to the wire. An error of no kind is
// General error.
func replyTo(err error) *assuan.Error {
	e, ok := errors.AsType[*assuan.Error](err)
	if ok {
		return e
	}
	e, ok = replies[sigerr.Kind(err)]
	switch {
	// Of their kinds, but not what an administrator or a second try can mend.
	case errors.Is(err, lease.ErrExpired):
		return errTicketExpired
	case errors.Is(err, lease.ErrSpent):
		return errExhausted
	case ok:
		return e
	case errors.Is(err, context.DeadlineExceeded):
		return errTimeout
	case errors.Is(err, context.Canceled):
		return errCanceled
	}
	return errGeneral
}
