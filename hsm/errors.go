package hsm

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

var (
	// ErrNotFound: the token holds no key with this id.
	ErrNotFound error = notFoundError{}
	// ErrExists: the id or the label is taken by another object of the token.
	ErrExists error = existsError{}
	// ErrClosed: the pool was closed.
	ErrClosed = errors.New("token pool is closed")
)

// The types of ErrNotFound and ErrExists: callers that cannot import this package
// tell them by their methods.
type notFoundError struct{}

func (notFoundError) Error() string  { return "no such key in the token" }
func (notFoundError) NotFound() bool { return true }

type existsError struct{}

func (existsError) Error() string { return "id or label is taken in the token" }
func (existsError) Exists() bool  { return true }

// A Class groups CK_RV codes by what is done about them.
type Class byte

const (
	ClassRefused  Class = 'A' // the request is wrong in itself: never retried
	ClassStuck    Class = 'B' // an operation is stuck: drop the session, once more
	ClassSession  Class = 'C' // session or handles lost: drop it, new epoch, find the key again, once more
	ClassLogin    Class = 'D' // login lost: one C_Login, then as ClassSession
	ClassBusy     Class = 'E' // busy or out of sessions: back off, at most three times more
	ClassGone     Class = 'F' // the token or its module is gone: not retried here; another token may serve
	ClassOperator Class = 'G' // the PIN: never tried again, an operator must act
	ClassCrashed  Class = 'H' // the module crashed or hangs: no CK_RV says so; for the supervisor of the process
)

func (c Class) String() string { return string(rune(c)) }

// A rule is what is done about the codes of one class.
type rule struct {
	retries int    // how often the operation is tried again
	backoff bool   // wait before trying again
	drop    bool   // the session is closed
	epoch   bool   // every session and every handle of before is void
	login   bool   // C_Login is called again, by one goroutine
	advice  string // what is to be done next, for a person
}

var rules = map[Class]rule{
	ClassRefused:  {advice: "the request is refused as it stands; sending it again will not help"},
	ClassStuck:    {retries: 1, drop: true, advice: "the session was replaced and it happened again; restart the worker"},
	ClassSession:  {retries: 1, drop: true, epoch: true, advice: "the session was replaced and it happened again; check that the token is up"},
	ClassLogin:    {retries: 1, drop: true, epoch: true, login: true, advice: "the login was renewed and it happened again; check that nothing else logs this token out"},
	ClassBusy:     {retries: 3, backoff: true, advice: "the token is busy; send the request again later, or use fewer sessions"},
	ClassGone:     {drop: true, epoch: true, advice: "the token does not work; check the device and its connection, then restart the worker"},
	ClassOperator: {drop: true, advice: "an operator must see to the token's user PIN; it is not tried again before that"},
	ClassCrashed:  {advice: "the worker is to be killed and replaced"},
}

// codes is the default profile. Where vendors differ (AWS CloudHSM means
// "throttled" by CKR_DEVICE_ERROR) the safer reading stands here. A code that
// is not here, and every vendor code (0x80000000 and above), is ClassGone: of
// a token that answers what we do not know we cannot say that it works.
var codes = map[uint]struct {
	name  string
	class Class
}{
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED:     {"CKR_FUNCTION_NOT_SUPPORTED", ClassRefused},
	pkcs11.CKR_ARGUMENTS_BAD:              {"CKR_ARGUMENTS_BAD", ClassRefused},
	pkcs11.CKR_ATTRIBUTE_READ_ONLY:        {"CKR_ATTRIBUTE_READ_ONLY", ClassRefused},
	pkcs11.CKR_ATTRIBUTE_SENSITIVE:        {"CKR_ATTRIBUTE_SENSITIVE", ClassRefused},
	pkcs11.CKR_ATTRIBUTE_TYPE_INVALID:     {"CKR_ATTRIBUTE_TYPE_INVALID", ClassRefused},
	pkcs11.CKR_ATTRIBUTE_VALUE_INVALID:    {"CKR_ATTRIBUTE_VALUE_INVALID", ClassRefused},
	ckrActionProhibited:                   {"CKR_ACTION_PROHIBITED", ClassRefused},
	pkcs11.CKR_DATA_INVALID:               {"CKR_DATA_INVALID", ClassRefused},
	pkcs11.CKR_DATA_LEN_RANGE:             {"CKR_DATA_LEN_RANGE", ClassRefused},
	pkcs11.CKR_KEY_SIZE_RANGE:             {"CKR_KEY_SIZE_RANGE", ClassRefused},
	pkcs11.CKR_KEY_TYPE_INCONSISTENT:      {"CKR_KEY_TYPE_INCONSISTENT", ClassRefused},
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED: {"CKR_KEY_FUNCTION_NOT_PERMITTED", ClassRefused},
	pkcs11.CKR_KEY_UNEXTRACTABLE:          {"CKR_KEY_UNEXTRACTABLE", ClassRefused},
	pkcs11.CKR_MECHANISM_INVALID:          {"CKR_MECHANISM_INVALID", ClassRefused},
	pkcs11.CKR_MECHANISM_PARAM_INVALID:    {"CKR_MECHANISM_PARAM_INVALID", ClassRefused},
	pkcs11.CKR_TEMPLATE_INCOMPLETE:        {"CKR_TEMPLATE_INCOMPLETE", ClassRefused},
	pkcs11.CKR_TEMPLATE_INCONSISTENT:      {"CKR_TEMPLATE_INCONSISTENT", ClassRefused},
	pkcs11.CKR_DOMAIN_PARAMS_INVALID:      {"CKR_DOMAIN_PARAMS_INVALID", ClassRefused},
	ckrCurveNotSupported:                  {"CKR_CURVE_NOT_SUPPORTED", ClassRefused},
	pkcs11.CKR_SESSION_READ_ONLY:          {"CKR_SESSION_READ_ONLY", ClassRefused},
	pkcs11.CKR_SESSION_EXISTS:             {"CKR_SESSION_EXISTS", ClassRefused},
	pkcs11.CKR_TOKEN_WRITE_PROTECTED:      {"CKR_TOKEN_WRITE_PROTECTED", ClassRefused},
	pkcs11.CKR_FUNCTION_REJECTED:          {"CKR_FUNCTION_REJECTED", ClassRefused},
	ckrKeyExhausted:                       {"CKR_KEY_EXHAUSTED", ClassRefused},

	pkcs11.CKR_OPERATION_ACTIVE:          {"CKR_OPERATION_ACTIVE", ClassStuck},
	pkcs11.CKR_OPERATION_NOT_INITIALIZED: {"CKR_OPERATION_NOT_INITIALIZED", ClassStuck},
	pkcs11.CKR_BUFFER_TOO_SMALL:          {"CKR_BUFFER_TOO_SMALL", ClassStuck},

	pkcs11.CKR_SESSION_HANDLE_INVALID: {"CKR_SESSION_HANDLE_INVALID", ClassSession},
	pkcs11.CKR_SESSION_CLOSED:         {"CKR_SESSION_CLOSED", ClassSession},
	pkcs11.CKR_OBJECT_HANDLE_INVALID:  {"CKR_OBJECT_HANDLE_INVALID", ClassSession},
	pkcs11.CKR_KEY_HANDLE_INVALID:     {"CKR_KEY_HANDLE_INVALID", ClassSession},

	pkcs11.CKR_USER_NOT_LOGGED_IN: {"CKR_USER_NOT_LOGGED_IN", ClassLogin},

	pkcs11.CKR_SESSION_COUNT:   {"CKR_SESSION_COUNT", ClassBusy},
	pkcs11.CKR_FUNCTION_FAILED: {"CKR_FUNCTION_FAILED", ClassBusy},
	pkcs11.CKR_DEVICE_MEMORY:   {"CKR_DEVICE_MEMORY", ClassBusy},
	pkcs11.CKR_HOST_MEMORY:     {"CKR_HOST_MEMORY", ClassBusy},
	ckrTokenResourceExceeded:   {"CKR_TOKEN_RESOURCE_EXCEEDED", ClassBusy},

	pkcs11.CKR_CANCEL:                         {"CKR_CANCEL", ClassGone},
	pkcs11.CKR_SLOT_ID_INVALID:                {"CKR_SLOT_ID_INVALID", ClassGone},
	pkcs11.CKR_GENERAL_ERROR:                  {"CKR_GENERAL_ERROR", ClassGone},
	pkcs11.CKR_NEED_TO_CREATE_THREADS:         {"CKR_NEED_TO_CREATE_THREADS", ClassGone},
	pkcs11.CKR_CANT_LOCK:                      {"CKR_CANT_LOCK", ClassGone},
	pkcs11.CKR_DEVICE_ERROR:                   {"CKR_DEVICE_ERROR", ClassGone},
	pkcs11.CKR_DEVICE_REMOVED:                 {"CKR_DEVICE_REMOVED", ClassGone},
	pkcs11.CKR_FUNCTION_CANCELED:              {"CKR_FUNCTION_CANCELED", ClassGone},
	pkcs11.CKR_TOKEN_NOT_PRESENT:              {"CKR_TOKEN_NOT_PRESENT", ClassGone},
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED:           {"CKR_TOKEN_NOT_RECOGNIZED", ClassGone},
	pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN: {"CKR_USER_ANOTHER_ALREADY_LOGGED_IN", ClassGone},
	pkcs11.CKR_USER_TOO_MANY_TYPES:            {"CKR_USER_TOO_MANY_TYPES", ClassGone},
	pkcs11.CKR_SESSION_READ_WRITE_SO_EXISTS:   {"CKR_SESSION_READ_WRITE_SO_EXISTS", ClassGone},
	pkcs11.CKR_SESSION_PARALLEL_NOT_SUPPORTED: {"CKR_SESSION_PARALLEL_NOT_SUPPORTED", ClassGone},
	pkcs11.CKR_RANDOM_NO_RNG:                  {"CKR_RANDOM_NO_RNG", ClassGone},
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED:       {"CKR_CRYPTOKI_NOT_INITIALIZED", ClassGone},
	pkcs11.CKR_MUTEX_BAD:                      {"CKR_MUTEX_BAD", ClassGone},
	pkcs11.CKR_MUTEX_NOT_LOCKED:               {"CKR_MUTEX_NOT_LOCKED", ClassGone},

	pkcs11.CKR_PIN_INCORRECT:            {"CKR_PIN_INCORRECT", ClassOperator},
	pkcs11.CKR_PIN_INVALID:              {"CKR_PIN_INVALID", ClassOperator},
	pkcs11.CKR_PIN_LEN_RANGE:            {"CKR_PIN_LEN_RANGE", ClassOperator},
	pkcs11.CKR_PIN_EXPIRED:              {"CKR_PIN_EXPIRED", ClassOperator},
	pkcs11.CKR_PIN_LOCKED:               {"CKR_PIN_LOCKED", ClassOperator},
	pkcs11.CKR_USER_PIN_NOT_INITIALIZED: {"CKR_USER_PIN_NOT_INITIALIZED", ClassOperator},
}

// PKCS#11 3.x codes that miekg/pkcs11 v1.1.2 lacks.
const (
	ckrActionProhibited      = 0x1B
	ckrCurveNotSupported     = 0x140
	ckrTokenResourceExceeded = 0x201
	ckrKeyExhausted          = 0x203
)

// advice tells more than its class can, for the codes an operator meets.
var advice = map[uint]string{
	pkcs11.CKR_PIN_INCORRECT:                  "PIN incorrect: it was tried once and will not be tried again; correct the PIN file",
	pkcs11.CKR_PIN_INVALID:                    "the token does not accept such a PIN; correct the PIN file",
	pkcs11.CKR_PIN_LEN_RANGE:                  "the PIN is too short or too long for this token; correct the PIN file",
	pkcs11.CKR_PIN_EXPIRED:                    "the user PIN has expired; set a new one in the token and in the PIN file",
	pkcs11.CKR_PIN_LOCKED:                     "the user PIN is locked after too many wrong ones; unlock it with the SO PIN, and correct the PIN file",
	pkcs11.CKR_USER_PIN_NOT_INITIALIZED:       "the token has no user PIN yet; set one with the SO PIN (pkcs11-tool --init-pin)",
	pkcs11.CKR_MECHANISM_INVALID:              "the token does not offer this mechanism; use another key type or scheme",
	pkcs11.CKR_SESSION_COUNT:                  "the token has no session left; use fewer sessions, or close other programs that use it",
	pkcs11.CKR_TOKEN_WRITE_PROTECTED:          "the token is write protected; lift the protection to make or delete keys",
	pkcs11.CKR_DEVICE_REMOVED:                 "the token was removed; put it back and restart the worker",
	pkcs11.CKR_TOKEN_NOT_PRESENT:              "the token is not in its slot; put it back and restart the worker",
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED:       "the module was finalised under us; restart the worker",
	pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN: "the token's security officer is logged in from this process; close that session and restart the worker",
}

// An Error is what a token, or a check before it, answered. Callers that
// cannot import this package tell the kinds apart by an interface of one of
// its four methods.
type Error struct {
	Op     string // what we were doing: "sign", "C_Login"
	Code   uint   // the CK_RV; 0 where we refused before the token did
	Class  Class
	Detail string // what the code does not tell; may be empty
}

func (e *Error) Error() string {
	s := e.Op + ": "
	if e.Code != 0 {
		s += CodeName(e.Code)
		if e.Detail != "" {
			s += ": " + e.Detail
		}
		if a := advice[e.Code]; a != "" {
			return s + ": " + a
		}
		return s + ": " + rules[e.Class].advice
	}
	return s + e.Detail
}

// Name is the code's, or what stands for it where there is none.
func (e *Error) Name() string {
	if e.Code == 0 {
		return e.Detail
	}
	return CodeName(e.Code)
}

// Refused says that the request is wrong in itself.
func (e *Error) Refused() bool { return e.Class == ClassRefused }

// Busy says that the same request may succeed later.
func (e *Error) Busy() bool { return e.Class == ClassBusy }

// NoSession says that the token has no session left for this.
func (e *Error) NoSession() bool { return e.Code == pkcs11.CKR_SESSION_COUNT }

// Gone says that the token does not work; another one may serve.
func (e *Error) Gone() bool { return e.Class == ClassGone }

// Unclear says that it is a login's, and does not say whether the PIN was wrong.
func (e *Error) Unclear() bool {
	return e.Op == callLogin && e.Code == pkcs11.CKR_FUNCTION_FAILED
}

// Operator says that nothing will work before a person has seen to the PIN.
func (e *Error) Operator() bool { return e.Class == ClassOperator }

func classify(code uint) Class {
	if c, ok := codes[code]; ok {
		return c.class
	}
	return ClassGone
}

// CodeName is the name of a CK_RV in the standard, or its number.
func CodeName(code uint) string {
	if c, ok := codes[code]; ok {
		return c.name
	}
	return fmt.Sprintf("CK_RV 0x%X", code)
}

// fail turns the error of a module call into an *Error; nil stays nil.
func fail(op string, err error) error {
	if err == nil {
		return nil
	}
	rv, ok := errors.AsType[pkcs11.Error](err)
	if !ok {
		return fmt.Errorf("%s: %w", op, err)
	}
	return &Error{Op: op, Code: uint(rv), Class: classify(uint(rv))}
}

// refuse is the error of a request that we do not pass to the token.
func refuse(op, format string, a ...any) error {
	return &Error{Op: op, Class: ClassRefused, Detail: fmt.Sprintf(format, a...)}
}
