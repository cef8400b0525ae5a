package hsm

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/miekg/pkcs11"
)

// A Profile is how the tokens of a vendor differ from what errors.go says of all
// of them. What stands here has a source; where we know of none, nothing does.
type Profile struct {
	Name string
	// Files are parts of the names of its modules, Makers beginnings of a token's
	// manufacturerID. One that fits chooses the profile.
	Files, Makers []string

	Deviations []Deviation
	// KeepAlive is how long a session may be idle before it is used, so that the
	// token does not drop it. The use is one that reaches the device. 0: no need.
	KeepAlive time.Duration
	// ReadWrite: the token has no read-only sessions. The processes that sign know
	// no request that writes all the same.
	ReadWrite bool
	// CountsPINs: CKF_USER_PIN_COUNT_LOW is kept, by which a try that was cut off
	// can be told from one that never was.
	CountsPINs bool
	// Why says where KeepAlive, ReadWrite and CountsPINs come from.
	Why    []Note
	Hints  []Note // for who configures it
	Faults []Fault
}

// A Deviation is another class of a code.
type Deviation struct {
	Code   uint
	Calls  []string // of which functions; empty: of all
	Class  Class
	Reason string
	Source string
}

// A Note is a sentence and its source.
type Note struct{ Text, Source string }

// A Fault is one of the versions of a module before Fixed.
type Fault struct {
	Note
	Fixed string // CK_INFO libraryVersion
}

const (
	awsThrottling = "AWS CloudHSM User Guide, Troubleshooting, HSM throttling"
	awsKnown      = "AWS CloudHSM User Guide, Known issues for the PKCS #11 library: Read Only Session is not supported in SDK 5"
	yubiSessions  = "YubiHSM 2 documentation, Concepts, Session"
	yubiIssue541  = "Yubico/yubihsm-shell issue 541"
	yubiCodes     = "Yubico/yubihsm-shell, pkcs11 module: CK_RV of YHR codes"
	usersReports  = "reports of users; the vendor's guide does not say so"
	softhsmNews   = "SoftHSM 2.7.0, NEWS"
)

// ckrEncryptedDataInvalid is of C_Decrypt, and we do not decrypt.
const ckrEncryptedDataInvalid = pkcs11.CKR_ENCRYPTED_DATA_INVALID

// DefaultProfile is the name of that of a token which no other fits.
const DefaultProfile = "default"

// profiles has the default one first.
var profiles = []Profile{
	{Name: DefaultProfile},
	{
		Name: "softhsm", Files: []string{"softhsm"}, Makers: []string{"SoftHSM"},
		CountsPINs: true,
		Why:        []Note{{"a wrong PIN sets CKF_USER_PIN_COUNT_LOW, a login clears it, and other processes see it", "seen with SoftHSM 2.6.1 (TestLoginHangs)"}},
		Hints: []Note{
			{"its locks are global to a process: a second session in one brings nothing, a second worker does", "measured, docs/PERFORMANCE.md"},
		},
		Faults: []Fault{
			{Note{"a search can miss an object while another one is made", softhsmNews + ", #576"}, "2.7"},
			{Note{"files are not written out before they are unlocked", softhsmNews + ", #578"}, "2.7"},
			{Note{"memory grows; workers are recycled", softhsmNews + ", #643"}, "2.7"},
			{Note{"a token that another process changed is not read again", softhsmNews + ", #681"}, "2.7"},
		},
	},
	{
		Name: "cloudhsm", Files: []string{"cloudhsm"},
		Deviations: []Deviation{
			{Code: pkcs11.CKR_FUNCTION_FAILED, Class: ClassBusy, Reason: "busy, or throttled", Source: awsThrottling + ", Client SDK 5"},
			{Code: pkcs11.CKR_OPERATION_ACTIVE, Class: ClassBusy, Reason: "busy, with Client SDK 3", Source: awsThrottling + ", Client SDK 3"},
			{Code: pkcs11.CKR_DEVICE_ERROR, Calls: []string{"C_GetAttributeValue"}, Class: ClassBusy, Reason: "throttled reading of attributes", Source: usersReports},
			{Code: pkcs11.CKR_ARGUMENTS_BAD, Calls: []string{"C_OpenSession"}, Class: ClassBusy, Reason: "sessions opened in too rapid succession", Source: usersReports},
		},
		ReadWrite: true,
		Why:       []Note{{"SDK 5 opens no read-only sessions", awsKnown}},
		Hints: []Note{
			{"the module tries throttled operations three times itself (--default-retry-mode), with pauses: token.call_timeout above them", "AWS CloudHSM User Guide, Retry commands for PKCS #11 library"},
			{"a key must be on two HSMs before it is used, unless key availability checks are off", "AWS CloudHSM User Guide, PKCS #11 library for Client SDK 5"},
		},
	},
	{
		Name: "luna", Files: []string{"libCryptoki2", "libcklog2"},
		Hints: []Note{
			{"the client takes an appliance for off-line after ReceiveTimeout, by default 20 s: token.call_timeout above it, or workers are killed while it fails over", "Thales Luna Network HSM 7, Timeouts, Network Receive Timeout"},
		},
	},
	{
		Name: "yubihsm", Files: []string{"yubihsm_pkcs11"},
		Deviations: []Deviation{
			{Code: pkcs11.CKR_SESSION_CLOSED, Class: ClassLogin, Reason: "the device has dropped the session of the login; another PKCS#11 session uses the same, and only a new login helps", Source: yubiCodes + "; " + yubiIssue541},
			{Code: ckrEncryptedDataInvalid, Class: ClassLogin, Reason: "the message authentication of a dropped session fails", Source: yubiCodes + "; Yubico/yubihsm-shell issue 262"},
		},
		KeepAlive: 10 * time.Second,
		Why: []Note{
			{"the device drops a session after 30 s without a command", yubiSessions},
			{"C_GetSessionInfo is no command to the device; C_GenerateRandom is", yubiIssue541},
		},
		Hints: []Note{{"the device has 16 sessions, of which each process that is logged in takes one: token.workers of at most 8 leaves room for their successors, for the making of keys and for others", yubiSessions + "; " + yubiIssue541}},
	},
	{
		Name: "nshield", Files: []string{"libcknfast"},
		Hints: []Note{
			{"softcards and load sharing want CKNFAST_LOADSHARING in token.environment: workers do not inherit the environment", "Entrust nShield Security World, PKCS #11, load-sharing mode"},
			{"with load sharing the library adapts to modules that come and go; without, a worker that met a lost module is replaced", "Entrust nShield Security World, PKCS #11, load-sharing mode"},
			{"when the last card of the set is removed the library closes all sessions", "Entrust nShield Security World, PKCS #11, load-sharing mode"},
		},
	},
}

// Profiles are the names that Config.Profile takes.
func Profiles() []string {
	var names []string
	for _, p := range profiles {
		names = append(names, p.Name)
	}
	return names
}

// ProfileNamed returns the profile of a name, which Info.Profile is.
func ProfileNamed(name string) (Profile, error) {
	i := slices.IndexFunc(profiles, func(p Profile) bool { return p.Name == name })
	if i < 0 {
		return Profile{}, fmt.Errorf("no token profile %q; there are %s", name, strings.Join(Profiles(), ", "))
	}
	return profiles[i], nil
}

// profileOf finds the profile of a token by the module's file and its own maker.
func profileOf(module, maker string) Profile {
	base := filepath.Base(module)
	for _, p := range profiles {
		if slices.ContainsFunc(p.Files, func(f string) bool { return strings.Contains(base, f) }) ||
			slices.ContainsFunc(p.Makers, func(m string) bool { return strings.HasPrefix(maker, m) }) {
			return p
		}
	}
	return profiles[0]
}

// classify is classify with the profile's deviations.
func (p *Profile) classify(call string, code uint) Class {
	for _, d := range p.Deviations {
		if d.Code == code && (len(d.Calls) == 0 || slices.Contains(d.Calls, call)) {
			return d.Class
		}
	}
	return classify(code)
}

// fail is fail with the profile's deviations.
func (p *Profile) fail(call string, err error) error {
	err = fail(call, err)
	if e, ok := err.(*Error); ok {
		e.Class = p.classify(call, e.Code)
	}
	return err
}

// FaultsOf are those of a version of the module.
func (p *Profile) FaultsOf(version string) []Fault {
	return slices.DeleteFunc(slices.Clone(p.Faults), func(f Fault) bool { return !older(version, f.Fixed) })
}

// older compares versions of CK_INFO, like 2.6.
func older(a, b string) bool {
	var x, y [2]int
	_, aerr := fmt.Sscanf(a, "%d.%d", &x[0], &x[1])
	_, berr := fmt.Sscanf(b, "%d.%d", &y[0], &y[1])
	return aerr == nil && berr == nil && slices.Compare(x[:], y[:]) < 0
}
