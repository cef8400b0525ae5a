package worker

import (
	"cmp"
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/signwarden/signwarden/hsm"
)

// What a child is for.
const (
	modeSign  byte = iota + 1 // read-only: sign, public key, ping
	modeList                  // read-only: one list of what the token holds
	modeWrite                 // one act that writes: generate, import, delete
)

// hello is the first frame to a child.
type hello struct {
	mode     byte
	sessions uint16
	module   string
	label    string
	profile  string
	env      []variable // sorted by name
}

type variable struct{ name, value string }

func newHello(mode byte, c Config) hello {
	h := hello{mode: mode, sessions: uint16(min(c.Sessions, maxString)), module: c.Module, label: c.TokenLabel, profile: c.Profile}
	for _, name := range slices.Sorted(maps.Keys(c.Env)) {
		h.env = append(h.env, variable{name, c.Env[name]})
	}
	return h
}

func (h hello) append(dst []byte) []byte {
	dst = append(dst, h.mode)
	dst = binary.BigEndian.AppendUint16(dst, h.sessions)
	for _, s := range []string{h.module, h.label, h.profile} {
		dst = appendString(dst, s)
	}
	for _, v := range h.env {
		dst = appendString(appendString(dst, v.name), v.value)
	}
	return dst
}

func parseHello(b []byte) (hello, error) {
	d := decoder{b: b}
	h := hello{mode: d.byte(), sessions: d.uint16(), module: d.string(), label: d.string(), profile: d.string()}
	for !d.bad && len(d.b) > 0 {
		v := variable{d.string(), d.string()}
		if n := len(h.env); n > 0 && cmp.Compare(h.env[n-1].name, v.name) >= 0 {
			d.bad = true
		}
		h.env = append(h.env, v)
	}
	if h.mode < modeSign || h.mode > modeWrite || h.sessions == 0 {
		d.bad = true
	}
	if err := d.end("hello"); err != nil {
		return hello{}, err
	}
	return h, nil
}

func appendInfo(dst []byte, i hsm.Info) []byte {
	for _, s := range []string{i.Module, i.ModuleVersion, i.CryptokiVersion, i.Manufacturer, i.Profile, i.TokenLabel, i.TokenModel, i.TokenSerial} {
		dst = appendString(dst, s)
	}
	dst = appendBool(appendBool(dst, i.WrongPIN), i.CountsPINs)
	dst = binary.BigEndian.AppendUint16(dst, uint16(min(max(i.Sessions, 0), maxString)))
	for _, m := range i.Mechanisms {
		dst = appendBool(appendString(dst, m.Name), m.Offered)
		dst = binary.BigEndian.AppendUint64(dst, uint64(m.MinBits))
		dst = binary.BigEndian.AppendUint64(dst, uint64(m.MaxBits))
	}
	return dst
}

func parseInfo(b []byte) (hsm.Info, error) {
	d := decoder{b: b}
	var i hsm.Info
	for _, s := range []*string{&i.Module, &i.ModuleVersion, &i.CryptokiVersion, &i.Manufacturer, &i.Profile, &i.TokenLabel, &i.TokenModel, &i.TokenSerial} {
		*s = d.string()
	}
	i.WrongPIN, i.CountsPINs = d.bool(), d.bool()
	i.Sessions = int(d.uint16())
	for !d.bad && len(d.b) > 0 {
		i.Mechanisms = append(i.Mechanisms, hsm.Mechanism{
			Name: d.string(), Offered: d.bool(), MinBits: uint(d.uint64()), MaxBits: uint(d.uint64()),
		})
	}
	if err := d.end("info"); err != nil {
		return hsm.Info{}, err
	}
	return i, nil
}

// The kinds of crypto.SignerOpts that package hsm tells apart.
const (
	optsNone    byte = iota // nil, which hsm refuses
	optsHash                // whatever has a HashFunc
	optsPSS                 // *rsa.PSSOptions
	optsEd25519             // *ed25519.Options
)

// appendSign appends the body of a request to sign: the kind of the options,
// the hash, the length of a PSS salt or 0, the context of Ed25519 or nothing,
// the id, and the digest as the rest.
func appendSign(dst, id, digest []byte, opts crypto.SignerOpts) []byte {
	kind, salt, context, hash := optsHash, 0, "", crypto.Hash(0)
	switch o := opts.(type) {
	case nil:
		kind = optsNone
	case *rsa.PSSOptions:
		kind, salt = optsPSS, o.SaltLength
	case *ed25519.Options:
		kind, context = optsEd25519, o.Context
	}
	if opts != nil {
		hash = opts.HashFunc()
	}
	dst = append(dst, kind)
	dst = binary.BigEndian.AppendUint16(dst, uint16(min(hash, maxString)))
	dst = binary.BigEndian.AppendUint64(dst, uint64(int64(salt)))
	dst = appendString(appendString(dst, context), id)
	return append(dst, digest...)
}

func parseSign(b []byte) (id, digest []byte, opts crypto.SignerOpts, err error) {
	d := decoder{b: b}
	kind, hash, salt, context := d.byte(), crypto.Hash(d.uint16()), int(int64(d.uint64())), d.bytes()
	id, digest = d.bytes(), d.rest()
	switch kind {
	case optsNone:
		d.bad = d.bad || hash != 0
	case optsHash:
		opts = hash
	case optsPSS:
		opts = &rsa.PSSOptions{Hash: hash, SaltLength: salt}
	case optsEd25519:
		opts = &ed25519.Options{Hash: hash, Context: string(context)}
	default:
		d.bad = true
	}
	if kind != optsPSS && salt != 0 || kind != optsEd25519 && len(context) > 0 {
		d.bad = true
	}
	if err := d.end("sign"); err != nil {
		return nil, nil, nil, err
	}
	return id, digest, opts, nil
}

// generation is a request to make a pair.
type generation struct {
	label     string
	id        []byte
	algorithm string
}

func (g generation) append(dst []byte) []byte {
	return appendString(appendString(appendString(dst, g.label), g.id), g.algorithm)
}

func parseGeneration(b []byte) (generation, error) {
	d := decoder{b: b}
	g := generation{label: d.string(), id: d.bytes(), algorithm: d.string()}
	if err := d.end("generate"); err != nil {
		return generation{}, err
	}
	return g, nil
}

// A public key goes as its SubjectPublicKeyInfo.
func parsePublic(b []byte) (crypto.PublicKey, error) {
	pub, err := x509.ParsePKIXPublicKey(b)
	if err != nil {
		return nil, fmt.Errorf("worker's public key: %w", err)
	}
	return pub, nil
}

// What an error is, beside its text.
const (
	failPlain    byte = iota // nothing that callers tell apart
	failHSM                  // *hsm.Error
	failNotFound             // hsm.ErrNotFound
	failExists               // hsm.ErrExists
	failClosed               // hsm.ErrClosed
	maxFail      = failClosed
)

var failures = map[byte]error{failNotFound: hsm.ErrNotFound, failExists: hsm.ErrExists, failClosed: hsm.ErrClosed}

// failure is an error that came through the pipe: its text as it was, and what
// of it callers tell apart.
type failure struct {
	text  string
	cause error // *hsm.Error, one of failures, or nil
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.cause }

// maxText cuts the text of an error; that of ours has a few lines.
const maxText = 4 << 10

func appendFailure(dst []byte, err error) []byte {
	kind, e := failPlain, hsm.Error{}
	if he, ok := errors.AsType[*hsm.Error](err); ok {
		kind, e = failHSM, *he
	}
	for k, sentinel := range failures {
		if kind == failPlain && errors.Is(err, sentinel) {
			kind = k
		}
	}
	text := err.Error()
	dst = append(dst, kind)
	dst = appendString(dst, text[:min(len(text), maxText)])
	if kind != failHSM {
		return dst
	}
	dst = append(dst, byte(e.Class))
	dst = binary.BigEndian.AppendUint64(dst, uint64(e.Code))
	return appendString(appendString(dst, e.Op), e.Detail[:min(len(e.Detail), maxText)])
}

func parseFailure(b []byte) (*failure, error) {
	d := decoder{b: b}
	kind := d.byte()
	f := &failure{text: d.string(), cause: failures[kind]}
	if kind == failHSM {
		e := &hsm.Error{Class: hsm.Class(d.byte()), Code: uint(d.uint64()), Op: d.string(), Detail: d.string()}
		d.bad = d.bad || e.Class < hsm.ClassRefused || e.Class > hsm.ClassCrashed || len(e.Detail) > maxText
		f.cause = e
	}
	if kind > maxFail || len(f.text) > maxText {
		d.bad = true
	}
	if err := d.end("error"); err != nil {
		return nil, err
	}
	return f, nil
}
