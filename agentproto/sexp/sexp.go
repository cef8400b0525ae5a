// Package sexp reads and writes canonical S-expressions, the form in which
// libgcrypt passes keys and signatures: (7:sig-val(3:rsa(1:s3:...))).
//
// The parser takes only what the writer would have written: no blanks, display
// hints, leading zeros in a length, or data after the end. So one expression has one encoding.
package sexp

import (
	"errors"
	"fmt"
	"strconv"
)

const (
	// MaxLen is the longest expression that Parse takes: several times an RSA-16384 key.
	MaxLen = 16 << 10
	// MaxDepth is how deep its lists may be nested; libgcrypt's keys need 3.
	MaxDepth = 16
)

// Expr is an atom or a list of expressions. A list has a List that is not nil.
type Expr struct {
	Atom []byte
	List []Expr
}

// Atom makes an atom of bytes or text.
func Atom[T ~[]byte | ~string](b T) Expr { return Expr{Atom: []byte(b)} }

// List makes a list of its arguments.
func List(items ...Expr) Expr {
	if items == nil {
		items = []Expr{}
	}
	return Expr{List: items}
}

// IsList says whether e is a list.
func (e Expr) IsList() bool { return e.List != nil }

// Append appends e's canonical form to dst.
func (e Expr) Append(dst []byte) []byte {
	if !e.IsList() {
		dst = strconv.AppendInt(dst, int64(len(e.Atom)), 10)
		dst = append(dst, ':')
		return append(dst, e.Atom...)
	}
	dst = append(dst, '(')
	for _, item := range e.List {
		dst = item.Append(dst)
	}
	return append(dst, ')')
}

// Bytes is e's canonical form.
func (e Expr) Bytes() []byte { return e.Append(nil) }

// Parse reads one list. Its atoms share memory with b. Append of the result
// gives b again.
func Parse(b []byte) (Expr, error) {
	if len(b) > MaxLen {
		return Expr{}, fmt.Errorf("sexp: %d bytes are more than the %d allowed", len(b), MaxLen)
	}
	if len(b) == 0 || b[0] != '(' {
		return Expr{}, errors.New("sexp: not a list")
	}
	p := parser{in: b}
	e := p.expr(0)
	if p.err == nil && p.pos != len(b) {
		p.fail("data after the end")
	}
	if p.err != nil {
		return Expr{}, p.err
	}
	return e, nil
}

// parser keeps its first error; after one, every read gives zero values.
type parser struct {
	in  []byte
	pos int
	err error
}

func (p *parser) fail(what string) {
	if p.err == nil {
		p.err = fmt.Errorf("sexp: %s at byte %d", what, p.pos)
	}
}

// next is the byte at pos, or 0 at the end; 0 begins nothing valid.
func (p *parser) next() byte {
	if p.pos >= len(p.in) {
		return 0
	}
	return p.in[p.pos]
}

func (p *parser) expr(depth int) Expr {
	if p.next() != '(' {
		return Expr{Atom: p.atom()}
	}
	if depth == MaxDepth {
		p.fail("lists nested too deep")
		return Expr{}
	}
	p.pos++
	items := []Expr{}
	for p.err == nil && p.next() != ')' {
		items = append(items, p.expr(depth+1))
	}
	p.pos++
	return Expr{List: items}
}

func (p *parser) atom() []byte {
	n, start := 0, p.pos
	for c := p.next(); c >= '0' && c <= '9'; c = p.next() {
		n = n*10 + int(c-'0')
		p.pos++
		if n > len(p.in) { // so it cannot overflow
			p.fail("length beyond the end")
			return nil
		}
	}
	switch {
	case p.pos == start:
		p.fail("neither a list nor a length")
		return nil
	case p.in[start] == '0' && p.pos > start+1:
		p.fail("leading zero in a length")
		return nil
	case p.next() != ':':
		p.fail("length without a colon")
		return nil
	case n > len(p.in)-p.pos-1:
		p.fail("length beyond the end")
		return nil
	}
	p.pos++
	a := p.in[p.pos : p.pos+n : p.pos+n]
	p.pos += n
	return a
}
