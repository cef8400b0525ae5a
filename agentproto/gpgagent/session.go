package gpgagent

import (
	"context"
	"crypto"
	"encoding/hex"
	"errors"
	"log/slog"

	"github.com/signwarden/signwarden/agentproto/assuan"
)

// session is the state of one connection. Its commands run one after another.
type session struct {
	srv  *Server
	keys Keys
	log  *slog.Logger

	request // what the next PKSIGN signs; RESET forgets it
}

// request is what a client sets up with several commands before a PKSIGN.
type request struct {
	grip    keygrip
	hasGrip bool
	hash    crypto.Hash // 0: none
	digest  []byte
	note    string
}

// commands binds the table to this session. An error becomes its reply here, and
// its text goes to the log.
func (s *session) commands() map[string]assuan.Handler {
	bound := make(map[string]assuan.Handler, len(commandTable))
	for name, cmd := range commandTable {
		bound[name] = func(ctx context.Context, c *assuan.Conn, args []byte) error {
			err := cmd(s, ctx, c, args)
			if err == nil {
				return nil
			}
			reply := replyTo(err)
			s.logError(name, err, reply)
			return reply
		}
	}
	return bound
}

// logError logs what an operator wants to know of: what was refused, and what
// failed. That a key is not here or an option unknown is ordinary talk.
func (s *session) logError(name string, err error, reply *assuan.Error) {
	level := slog.LevelWarn
	e, ok := errors.AsType[*assuan.Error](err)
	if ok && e != errForbidden && name != "PKSIGN" && name != "SETHASH" {
		level = slog.LevelDebug
	}
	attrs := []any{"command", name, "err", err, "reply", reply.Text}
	if s.hasGrip {
		attrs = append(attrs, "keygrip", s.grip.String(), "hash", s.hash.String())
	}
	s.srv.warnings.Log(context.Background(), s.log, level, "command refused", attrs...)
}

func (s *session) reset(context.Context, *assuan.Conn, []byte) error {
	s.request = request{}
	return nil
}

// setKey takes any keygrip, as the real agent does: whether it may be used is
// decided at PKSIGN, when it counts.
func (s *session) setKey(_ context.Context, _ *assuan.Conn, args []byte) error {
	options, rest := splitOptions(args)
	if len(options) > 0 { // --another, of GnuPG 2.5, for composite keys
		return errNotSupported
	}
	if len(rest) != 1 {
		return parameterError("invalid length of keygrip")
	}
	grip, err := parseKeygrip(rest[0])
	if err != nil {
		return err
	}
	s.grip, s.hasGrip = grip, true
	return nil
}

func (s *session) setKeyDesc(_ context.Context, _ *assuan.Conn, args []byte) error {
	s.note = decodeNote(args)
	return nil
}

// setHash takes "8 HEX" and "--hash=sha256 HEX". A digest of the wrong length is
// refused here; the real agent does so only at PKSIGN.
func (s *session) setHash(_ context.Context, _ *assuan.Conn, args []byte) error {
	s.hash, s.digest = 0, nil // a failed SETHASH must not leave an earlier digest to be signed
	options, rest := splitOptions(args)
	var id, name string
	for _, option := range options {
		value, isHash := cutPrefix(option, "--hash=")
		if !isHash { // --inquire and --pss, of GnuPG 2.4: the data itself, or RSA-PSS
			return errNotSupported
		}
		name = value
	}
	if name == "" && len(rest) > 0 {
		id, rest = rest[0], rest[1:]
	}
	hash, ok := hashOf(id, name)
	if !ok {
		return errAlgorithm
	}
	if len(rest) != 1 {
		return parameterError("invalid hexstring")
	}
	digest, err := hex.DecodeString(rest[0])
	if err != nil {
		return parameterError("invalid hexstring")
	}
	if len(digest) != hash.Size() {
		return parameterError("unsupported length of hash")
	}
	s.hash, s.digest = hash, digest
	return nil
}

func parseKeygrip(text string) (keygrip, error) {
	var grip keygrip
	b, err := hex.DecodeString(text)
	_, notHex := errors.AsType[hex.InvalidByteError](err)
	if notHex {
		return grip, parameterError("invalid hexstring")
	}
	if err != nil || len(b) != len(grip) {
		return grip, parameterError("invalid length of keygrip")
	}
	return keygrip(b), nil
}
