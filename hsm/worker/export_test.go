package worker

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/signwarden/signwarden/hsm"
)

// SetReplacePause changes how old a worker is before it is replaced.
func SetReplacePause(t *testing.T, d time.Duration) {
	was := replacePause
	replacePause = d
	t.Cleanup(func() { replacePause = was })
}

// ForgetDoubts has the next doubt be as the first.
func ForgetDoubts(tok *Token) { Locked(tok, func() { tok.doubts = doubts{} }) }

// Doubts says of times, in order, whether workers that are in doubt at each are replaced.
func Doubts() func(time.Time) bool {
	d := &doubts{}
	return d.due
}

// Locked calls f while nobody looks at what workers do.
func Locked(tok *Token, f func()) {
	tok.mu.Lock()
	defer tok.mu.Unlock()
	f()
}

// NeverLate has workers be waited for, where they are late: as those of a token that was
// as slow before.
func NeverLate(tok *Token) { Locked(tok, func() { tok.slowest = time.Hour }) }

// Cheap has each key that was signed with cost 100 µs, as on a machine that does nothing else.
func Cheap(tok *Token) {
	Locked(tok, func() {
		for _, p := range tok.prices {
			p.d = 100 * time.Microsecond
		}
	})
}

// Flushed says whether workers can read all that they were given.
func Flushed(tok *Token) (flushed bool) {
	Locked(tok, func() {
		flushed = !slices.ContainsFunc(tok.live, func(p *process) bool { return p.flushing || len(p.out) > 0 })
	})
	return flushed
}

// The race detector has a process that ends wait for a second, and tests end hundreds of
// children one after the other.
func init() {
	os.Setenv("GORACE", os.Getenv("GORACE")+" atexit_sleep_ms=0")
	passed = append(passed, "GORACE")
}

const KindDone = kindDone

var Frame = func(kind byte, number uint32, body []byte) []byte { return appendFrame(nil, kind, number, body) }

func Hello(c Config) []byte   { return appendFrame(nil, kindHello, 0, newHello(modeSign, c).append(nil)) }
func Ask(i hsm.Info) []byte   { return appendFrame(nil, kindAsk, 0, appendInfo(nil, i)) }
func Ready(i hsm.Info) []byte { return appendFrame(nil, kindReady, 0, appendInfo(nil, i)) }
func Failed(err error) []byte { return appendFrame(nil, kindFailed, 3, appendFailure(nil, err)) }
func Sign(id, digest []byte, o crypto.SignerOpts) []byte {
	return appendFrame(nil, kindSign, 1, appendSign(nil, id, digest, o))
}
func Generate(label string, id []byte, algorithm string) []byte {
	return appendFrame(nil, kindGenerate, 1, generation{label, id, algorithm}.append(nil))
}

// Order is the order, by their numbers, in which a child does what it has in its buffer:
// s is a sign request, u an urgent one, x one that is suspect.
func Order(kinds string) []uint32 {
	p := &pipe{}
	for i, k := range kinds {
		kind := map[rune]byte{'s': kindSign, 'u': kindUrgent, 'x': kindSuspect}[k]
		p.buf = appendFrame(p.buf, kind, uint32(i), bytes.Repeat([]byte{byte(i)}, 20+i%7))
	}
	p.to = len(p.buf)
	var order []uint32
	for {
		at, f, n, err := p.choose()
		if n == 0 || err != nil || !bytes.Equal(f.body, bytes.Repeat([]byte{byte(f.number)}, 20+int(f.number)%7)) {
			return order
		}
		p.remove(at, n)
		p.compact()
		order = append(order, f.number)
	}
}

func Import(label string, id, der []byte) []byte {
	return appendFrame(nil, kindImport, 1, appendImport(label, id, der))
}
func List(objects ...hsm.Object) []byte {
	return appendFrame(nil, kindPart, 1, appendObjects(objects, func([]byte) { panic("too many") }))
}

// Administrative are the requests that a child which signs does not know.
var Administrative = map[string]byte{
	"generate": kindGenerate, "delete": kindDelete, "list": kindList, "import": kindImport, "certificate": kindCertificate,
}

// AskSigner sends a request to a child that signs.
func AskSigner(ctx context.Context, t *Token, kind byte, body []byte) error {
	c := newCall(kind)
	c.body = append(c.body, body...)
	_, err := t.do(ctx, "test", c, "", 1, nil)
	return err
}

// Placed is the order in which the parent takes a child to do what Order has, when it has
// begun the first.
func Placed(kinds string) []uint32 {
	p := &process{t: &Token{c: Config{Sessions: 1}}}
	for i, k := range kinds {
		p.number = uint32(i) - 1
		p.give(&call{kind: kindSign, suspect: k == 'x', urgent: k == 'u'})
	}
	var order []uint32
	for _, c := range p.inFlight {
		order = append(order, c.number)
	}
	return order
}

// Reencode parses the first frame of b with its body, and encodes it again.
func Reencode(b []byte) (again []byte, n int, err error) {
	f, n, err := parseFrame(b)
	if err != nil || n == 0 {
		return nil, n, err
	}
	body := f.body
	switch f.kind {
	case kindHello:
		h, err := parseHello(f.body)
		if err != nil {
			return nil, 0, err
		}
		body = h.append(nil)
	case kindReady, kindAsk:
		i, err := parseInfo(f.body)
		if err != nil {
			return nil, 0, err
		}
		body = appendInfo(nil, i)
	case kindSign:
		id, digest, opts, err := parseSign(f.body)
		if err != nil {
			return nil, 0, err
		}
		body = appendSign(nil, id, digest, opts)
	case kindGenerate:
		g, err := parseGeneration(f.body)
		if err != nil {
			return nil, 0, err
		}
		body = g.append(nil)
	case kindImport:
		label, id, key, err := parseImport(f.body)
		if err != nil {
			return nil, 0, err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, 0, err
		}
		body = appendImport(label, id, der)
	case kindCertificate:
		id, der, err := parseCertificate(f.body)
		if err != nil {
			return nil, 0, err
		}
		body = append(appendString(nil, id), der...)
	case kindPart:
		objects, err := parseObjects(f.body)
		if err != nil {
			return nil, 0, err
		}
		body = appendObjects(objects, func([]byte) { panic("too many") })
	case kindFailed:
		e, err := parseFailure(f.body)
		if err != nil {
			return nil, 0, err
		}
		body = appendFailure(nil, e)
	}
	return bytes.Clone(appendFrame(nil, f.kind, f.number, body)), n, nil
}
