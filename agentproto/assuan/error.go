package assuan

import "fmt"

// Error is the ERR reply of a command: a libgpg-error value, which is
// source<<24 | code, and the text that follows it. Clients show a text of their
// own for the code; Text is for people who read a trace.
type Error struct {
	Code uint32
	Text string
}

func (e *Error) Error() string { return fmt.Sprintf("assuan: error %d: %s", e.Code, e.Text) }

// line never has the code 0: a client that reads "ERR 0", or no number, takes the
// command for a success without data, and GnuPG 2.2.40 then aborts on an assertion.
func (e *Error) line() string {
	code := e.Code
	if code == 0 {
		code = errGeneral.Code
	}
	return fmt.Sprintf("ERR %d %s", code, e.Text)
}

// source is GPG_ERR_SOURCE_GPGAGENT, the only one that a server here speaks for.
const source = 4 << 24

// The replies that the command loop itself gives.
var (
	errGeneral      = &Error{source | 1, "General error <GPG Agent>"}
	errLineTooLong  = &Error{source | 263, "Line passed to IPC too long <GPG Agent>"}
	errUnknown      = &Error{source | 275, "Unknown IPC command <GPG Agent>"}
	errLeadingBlank = &Error{source | 276, "IPC syntax error <GPG Agent> - leading white-space"}
	errCanceled     = &Error{source | 277, "IPC call has been cancelled <GPG Agent>"}
)

// The replies to an inquiry that went wrong.
var (
	errTooMuchData = &Error{source | 273, "Too much data for IPC layer <GPG Agent>"}
	errBadEscape   = &Error{source | 276, "IPC syntax error <GPG Agent> - bad escape"}
	errUnexpected  = &Error{source | 274, "Unexpected IPC command <GPG Agent>"}
)
