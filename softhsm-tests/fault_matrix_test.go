package softhsm_test

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

// A faultRow is a fault, and what becomes of a request that meets it.
type faultRow struct {
	fault  string
	rules  []string
	change func(*worker.Config) // the token is the row's own; nil: it is shared
	before func(t testing.TB, f *faultToken)
	// sign is what is asked; nil: one signature. after is what is asked when the fault is
	// mended.
	sign    func(t testing.TB, f *faultToken) error
	mend    func(t testing.TB, f *faultToken)
	outcome string // answered, or refused with a class
	text    string // of the error
	tries   int    // C_SignInit; -1: it is not determined
}

const answered = "answered"

// own is the change of a row whose token is its own and as usual.
func own(*worker.Config) {}

// once are the rows of a code that a function answers once.
func once(function string) (rows []faultRow) {
	for _, c := range faultCodes {
		r := faultRow{fault: fmt.Sprintf("%s: %s, once", function, c.name), rules: []string{fmt.Sprintf("%s nth=1 rv=%#x", function, c.code)}, outcome: answered, tries: 2}
		switch c.class {
		case "A":
			r.outcome, r.text, r.tries = "refused, class A", c.name, 1
		case "D", "G":
			r.change = own // its worker is replaced
		}
		rows = append(rows, r)
	}
	return rows
}

// always are those of a code that a function answers each time: one of each class.
func always(function string) []faultRow {
	row := func(code, class string, tries int) faultRow {
		return faultRow{fault: fmt.Sprintf("%s: %s, each time", function, code), rules: []string{function + " rv=" + faultNumber(code)},
			change: own, outcome: "refused, class " + class, text: code, tries: tries}
	}
	return []faultRow{
		row("CKR_OPERATION_ACTIVE", "B", 6),
		row("CKR_SESSION_HANDLE_INVALID", "C", 6),
		row("CKR_DEVICE_MEMORY", "E", 4),
		row("CKR_GENERAL_ERROR", "F", 3),
		row("CKR_DEVICE_REMOVED", "F", 3),
		row("CK_RV 0x80000001", "F", 3),
	}
}

func faultNumber(name string) string {
	for _, c := range faultCodes {
		if c.name == name {
			return fmt.Sprintf("%#x", c.code)
		}
	}
	panic(name)
}

// elsewhere are codes at other calls than those of a signature, met when a session is
// lost or a worker starts.
func elsewhere() (rows []faultRow) {
	lose := "C_SignInit nth=1 rv=0xB3"
	for _, k := range []struct{ function, code, outcome string }{
		{"C_OpenSession", "CKR_SESSION_COUNT", answered},
		{"C_OpenSession", "CKR_FUNCTION_FAILED", answered},
		{"C_OpenSession", "CKR_GENERAL_ERROR", answered},
		{"C_OpenSession", "CKR_TOKEN_NOT_PRESENT", answered},
		{"C_GetSessionInfo", "CKR_SESSION_HANDLE_INVALID", answered},
		{"C_GetSessionInfo", "CKR_DEVICE_ERROR", answered},
		{"C_FindObjectsInit", "CKR_OPERATION_ACTIVE", answered},
		{"C_FindObjectsInit", "CKR_HOST_MEMORY", answered},
		{"C_FindObjects", "CKR_DEVICE_ERROR", answered},
		{"C_FindObjectsFinal", "CKR_DEVICE_ERROR", answered},
		{"C_GetAttributeValue", "CKR_DEVICE_ERROR", answered},
		{"C_GetAttributeValue", "CKR_OBJECT_HANDLE_INVALID", answered},
	} {
		rows = append(rows, faultRow{fault: fmt.Sprintf("session lost, then %s: %s, once", k.function, k.code),
			rules: []string{lose, fmt.Sprintf("%s nth=1 rv=%s", k.function, faultNumber(k.code))}, outcome: k.outcome, tries: -1, change: own})
	}
	for _, k := range []struct{ function, action string }{
		{"C_Initialize", "rv=0x5"}, {"C_Initialize", "segv"}, {"C_Initialize", "hang"}, {"C_GetSlotList", "rv=0x30"}, {"C_GetTokenInfo", "rv=0x30"},
		{"C_OpenSession", "rv=0xB1"}, {"C_OpenSession", "abort"}, {"C_Login", "rv=0x30"}, {"C_Login", "rv=0x6"}, {"C_Login", "segv"}, {"C_Login", "hang"},
	} {
		rows = append(rows, faultRow{fault: fmt.Sprintf("the only worker is killed; its successor meets %s: %s, once", k.function, k.action),
			rules: []string{k.function + " nth=1 " + k.action}, outcome: answered, tries: -1,
			change: func(c *worker.Config) { c.Workers = 1 },
			before: func(t testing.TB, f *faultToken) { f.kill(t, 0, syscall.SIGKILL) }})
	}
	return rows
}

// untilSigned asks again as long as no worker has started.
func (f *faultToken) untilSigned(t testing.TB) error {
	err := errors.New("not asked")
	waitFor(t, "it signs", func() bool { err = f.sign(t, faultDeadline); return err == nil })
	return err
}

// several has some callers sign at once, so that each worker has something to do.
func several(t testing.TB, f *faultToken) error {
	var wg sync.WaitGroup
	errs := make([]error, 16)
	for i := range errs {
		wg.Go(func() { errs[i] = f.sign(t, faultDeadline) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// crashes are those of a process.
func crashes() []faultRow {
	quick := func(c *worker.Config) { c.CallTimeout = time.Second }
	rows := []faultRow{
		{fault: "C_Sign: segv, each time", rules: []string{"C_Sign segv"}, change: quick, outcome: "refused, class H", text: "two workers", tries: 2},
		{fault: "C_Sign: hang, each time", rules: []string{"C_Sign hang"}, change: quick, outcome: "refused, class H", text: "two workers", tries: -1},
		{fault: "C_Sign: 300 ms late, once", rules: []string{"C_Sign nth=1 delay=300"}, change: own, outcome: answered, tries: 1},
		{fault: "C_Sign: 1 s late, once", rules: []string{"C_Sign nth=1 delay=1000"}, change: own, outcome: answered, tries: 2},
		{fault: "C_Sign: 1 s late, each time", rules: []string{"C_Sign every=2 delay=1000"}, change: own, outcome: answered, tries: -1},
	}
	for _, function := range []string{"C_SignInit", "C_Sign"} {
		for _, action := range []string{"segv", "abort", "hang"} {
			rows = append(rows, faultRow{fault: function + ": " + action + ", once", rules: []string{function + " nth=1 " + action}, change: own, outcome: answered, tries: 2})
		}
	}
	for _, k := range []struct {
		name string
		sig  syscall.Signal
	}{{"SIGKILL", syscall.SIGKILL}, {"SIGSEGV", syscall.SIGSEGV}, {"SIGABRT", syscall.SIGABRT}, {"SIGSTOP", syscall.SIGSTOP}} {
		rows = append(rows,
			faultRow{fault: "one of two workers: " + k.name, change: own, outcome: answered, tries: -1, sign: several,
				before: func(t testing.TB, f *faultToken) { f.kill(t, 0, k.sig) }},
			faultRow{fault: "all workers: " + k.name, change: own, outcome: answered, tries: -1, sign: several,
				before: func(t testing.TB, f *faultToken) {
					for _, w := range f.tok.Workers() {
						if err := syscall.Kill(w.PID, k.sig); err != nil {
							t.Fatal(err)
						}
					}
				}})
	}
	return rows
}

// matrix is all of it; more rows are in fault_token_test.go.
func matrix() (rows []faultRow) {
	rows = append(rows, once("C_Sign")...)
	rows = append(rows, always("C_SignInit")...)
	rows = append(rows, elsewhere()...)
	rows = append(rows, crashes()...)
	return append(rows, tokenRows()...)
}

// meet has a request meet the fault of a row, and returns what became of it.
func (r faultRow) meet(t testing.TB, f *faultToken) (outcome string, tries int, took time.Duration) {
	t.Helper()
	if r.before != nil {
		r.before(t, f)
	}
	f.Set(t, r.rules...)
	tried := f.Calls("C_SignInit")
	began := time.Now()
	var err error
	if r.sign != nil {
		err = r.sign(t, f)
	} else {
		err = f.sign(t, 20*time.Second)
	}
	took, tries = time.Since(began), f.Calls("C_SignInit")-tried
	outcome = answered
	if err != nil {
		outcome = "refused"
		if e, ok := errors.AsType[*hsm.Error](err); ok {
			outcome += ", class " + e.Class.String()
		}
		if !strings.Contains(err.Error(), r.text) || r.text == "" {
			t.Errorf("%s: got %v, want %q", r.fault, err, r.text)
		}
	}
	for i, rule := range r.rules {
		if strings.HasPrefix(rule, "C_") && f.Injected(i) == 0 {
			t.Errorf("%s: %q did not happen", r.fault, rule)
		}
	}
	if r.mend != nil {
		began = time.Now()
		r.mend(t, f)
		if err := f.untilSigned(t); err != nil {
			t.Errorf("%s: mended: %v", r.fault, err)
		}
		took = time.Since(began)
	} else if r.change == nil {
		f.settle(t)
	} else {
		f.Set(t)
	}
	return outcome, tries, took
}

const faultDoc = "../docs/fault-matrix.md"

// TestFaultMatrix has each fault happen to a token behind workers, and compares what
// becomes of a request with docs/fault-matrix.md. SIGNWARDEN_UPDATE=1 writes that.
func TestFaultMatrix(t *testing.T) {
	var doc strings.Builder
	doc.WriteString(faultHead)
	shared := newFaultToken(t, nil)
	for _, r := range matrix() {
		f := shared
		if r.change != nil {
			f = newFaultToken(t, r.change)
		} else {
			f.settle(t)
		}
		outcome, tries, took := r.meet(t, f)
		if outcome != r.outcome || r.tries >= 0 && tries != r.tries {
			t.Errorf("%s: %s after %d tries, want %s after %d", r.fault, outcome, tries, r.outcome, r.tries)
		}
		n := fmt.Sprint(r.tries)
		if r.tries < 0 {
			n = "any"
		}
		if r.text != "" {
			r.outcome += ": “" + r.text + "”"
		}
		if r.mend != nil {
			r.outcome += "; answered when mended"
		}
		fmt.Fprintf(&doc, "| %s | %s | %s | %s |\n", r.fault, r.outcome, n, roundly(took))
		if f != shared {
			if err := f.tok.Close(); err != nil {
				t.Errorf("%s: Close: %v", r.fault, err)
			}
		}
	}
	if os.Getenv("SIGNWARDEN_UPDATE") != "" {
		writeFile(t, faultDoc, doc.String())
		return
	}
	b, err := os.ReadFile(faultDoc)
	if err != nil {
		t.Fatal(err)
	}
	measured := regexp.MustCompile(`(?m)[^|]*\|$`)
	if got, want := measured.ReplaceAllString(doc.String(), ""), measured.ReplaceAllString(string(b), ""); got != want {
		t.Errorf("%s does not say what happens: make fault-matrix writes it anew\n%s", faultDoc, got)
	}
}

// roundly is a duration as it is worth telling: figures of one run.
func roundly(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return d.Round(100 * time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}

const faultHead = `# The fault matrix

What becomes of a request to sign that meets a fault of the token, its module, or a worker. Written by
` + "`make fault-matrix`" + ` from what happens to a SoftHSM2 token behind two workers (one, where a row says so); ` + "`make test`" + ` has each
fault happen again and compares all but the last column, which has the figures of one run on a machine of two CPUs.

Tries are calls of C_SignInit for the request. The last column is the time until the request was answered or refused, or,
where a fault is mended, from then until the first signature. Classes are those of package hsm: A the request is refused as it
stands, B an operation is stuck, C sessions or handles are lost, D the login is lost, E busy, F the token does not work, G an
operator must act, H workers crashed or hung. ` + "`softhsm-tests/faultp11`" + ` injects the codes.

| fault | outcome | tries | measured |
|---|---|---|---|
`

// signDigest signs a digest of its own under another id.
func (f *faultToken) signAs(t testing.TB, id []byte, within time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	d := sha256.Sum256(id)
	return f.tok.Sign(ctx, "", 1, id, d[:], crypto.SHA256)
}
