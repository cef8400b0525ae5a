package p11token

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/signwarden/signwarden/agentproto/p11rpc"
)

// conn is the state of one connection, which is one client process: PKCS#11's
// application.
type conn struct {
	srv     *Server
	keys    Keys
	program string // of the peer, for the log and the audit note
	log     *slog.Logger

	// mu guards what follows. It is held for map operations only, never while Keys
	// is asked, so that no call waits for another session's signature.
	mu          sync.Mutex
	initialized bool
	loggedIn    bool
	sessions    map[uint64]*session
	lastSession uint64 // numbers are not used again
	view        *view  // what a search has seen; immutable
	seen        time.Time

	// looking is held while Keys is asked for its list.
	looking sync.Mutex
}

// session is a PKCS#11 session. Its calls run one after another (package p11rpc
// sees to that), so nothing in it is locked.
type session struct {
	slot  *slot
	flags uint64

	searching bool
	found     []uint64 // handles that the search has not given out

	op *operation // a signature that was begun; nil: none
}

// call does one call.
type call func(c *conn, ctx context.Context, args []p11rpc.Value) ([]p11rpc.Value, error)

// callTable is every call that is served. The others are answered
// CKR_FUNCTION_NOT_SUPPORTED; C_WaitForSlotEvent is one of them since it may never block.
var callTable = map[p11rpc.CallID]call{
	p11rpc.Initialize:        (*conn).initialize,
	p11rpc.Finalize:          (*conn).finalize,
	p11rpc.GetInfo:           (*conn).getInfo,
	p11rpc.GetSlotList:       (*conn).getSlotList,
	p11rpc.GetSlotInfo:       (*conn).getSlotInfo,
	p11rpc.GetTokenInfo:      (*conn).getTokenInfo,
	p11rpc.GetMechanismList:  (*conn).getMechanismList,
	p11rpc.GetMechanismInfo:  (*conn).getMechanismInfo,
	p11rpc.OpenSession:       (*conn).openSession,
	p11rpc.CloseSession:      (*conn).closeSession,
	p11rpc.CloseAllSessions:  (*conn).closeAllSessions,
	p11rpc.GetSessionInfo:    inSession((*conn).getSessionInfo),
	p11rpc.Login:             inSession((*conn).login),
	p11rpc.Logout:            inSession((*conn).logout),
	p11rpc.GetAttributeValue: inSession((*conn).getAttributeValue),
	p11rpc.FindObjectsInit:   inSession((*conn).findObjectsInit),
	p11rpc.FindObjects:       inSession((*conn).findObjects),
	p11rpc.FindObjectsFinal:  inSession((*conn).findObjectsFinal),
	p11rpc.SignInit:          inSession((*conn).signInit),
	p11rpc.Sign:              inSession((*conn).sign),
	p11rpc.SignUpdate:        inSession((*conn).signUpdate),
	p11rpc.SignFinal:         inSession((*conn).signFinal),
	p11rpc.SeedRandom:        inSession((*conn).seedRandom),
	p11rpc.GenerateRandom:    inSession((*conn).generateRandom),
}

// quick says which calls are answered from memory alone. The others hash, or ask Keys.
func quick(id p11rpc.CallID) bool {
	switch id {
	case p11rpc.GetSessionInfo, p11rpc.GetAttributeValue, p11rpc.FindObjects, p11rpc.FindObjectsFinal, p11rpc.SignInit:
		return true
	}
	return false
}

// calls binds the table to this connection. An error becomes its CK_RV here, and its text
// goes to the log.
func (c *conn) calls() map[p11rpc.CallID]p11rpc.Handler {
	bound := make(map[p11rpc.CallID]p11rpc.Handler, len(callTable))
	for id, do := range callTable {
		bound[id] = func(ctx context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
			var results []p11rpc.Value
			err := c.checkInitialized(id)
			if err == nil {
				results, err = do(c, ctx, args)
			}
			if err == nil {
				return results, nil
			}
			rv := outcomeOf(err)
			c.logError(id, err, rv)
			return nil, rv
		}
	}
	return bound
}

// logError logs what an operator wants to know of: what was refused to sign, and what
// failed. That an object or a slot is not here is ordinary talk.
func (c *conn) logError(id p11rpc.CallID, err error, rv p11rpc.RV) {
	attrs := []any{"call", id.String(), "err", err, "rv", fmt.Sprintf("0x%x", uint64(rv))}
	f, ok := errors.AsType[*failure](err)
	if ok {
		attrs = append(attrs, "request", f.request, "key", f.key, "mechanism", f.mechanism)
	}
	_, bare := err.(p11rpc.RV)
	if bare {
		c.log.Debug("call refused", attrs...)
		return
	}
	c.warn("call refused", attrs...)
}

func (c *conn) checkInitialized(id p11rpc.CallID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.initialized && id != p11rpc.Initialize {
		return ckrCryptokiNotInitialized
	}
	return nil
}

func (c *conn) warn(words string, attrs ...any) {
	c.srv.warnings.Log(context.Background(), c.log, slog.LevelWarn, words, attrs...)
}

// inSession is a call whose first argument is a session.
func inSession(do func(*conn, context.Context, *session, []p11rpc.Value) ([]p11rpc.Value, error)) call {
	return func(c *conn, ctx context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
		c.mu.Lock()
		s := c.sessions[args[0].Num]
		c.mu.Unlock()
		if s == nil {
			return nil, ckrSessionHandleInvalid
		}
		return do(c, ctx, s, args[1:])
	}
}

// handshake is what every client says in C_Initialize.
const handshake = "PRIVATE-GNOME-KEYRING-PKCS11-PROTOCOL-V-1"

func (c *conn) initialize(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	if string(args[0].Bytes) != handshake {
		return nil, refuse(ckrArgumentsBad, "the client's handshake is %.64q", args[0].Bytes)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.initialized {
		return nil, ckrCryptokiAlreadyInitialized
	}
	c.initialized = true
	c.sessions = make(map[uint64]*session)
	return nil, nil
}

func (c *conn) finalize(context.Context, []p11rpc.Value) ([]p11rpc.Value, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.initialized, c.loggedIn, c.sessions = false, false, nil
	return nil, nil
}

// Flags of C_OpenSession.
const (
	ckfRWSession     = 2
	ckfSerialSession = 4
)

// openSession takes read-write sessions too, though nothing can be written in one:
// crypto11 opens no others.
func (c *conn) openSession(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	s, err := c.slot(args[0].Num)
	if err != nil {
		return nil, err
	}
	if args[1].Num&ckfSerialSession == 0 {
		return nil, ckrSessionParallelUnsupported
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.sessions) >= MaxSessions {
		return nil, refuse(ckrSessionCount, "the client has %d sessions open", len(c.sessions))
	}
	if c.sessions == nil { // C_Finalize came in between
		return nil, ckrCryptokiNotInitialized
	}
	c.lastSession++
	c.sessions[c.lastSession] = &session{slot: s, flags: args[1].Num & (ckfRWSession | ckfSerialSession)}
	return []p11rpc.Value{p11rpc.U(c.lastSession)}, nil
}

func (c *conn) closeSession(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sessions[args[0].Num] == nil {
		return nil, ckrSessionHandleInvalid
	}
	delete(c.sessions, args[0].Num)
	c.loggedIn = c.loggedIn && len(c.sessions) > 0
	return nil, nil
}

func (c *conn) closeAllSessions(_ context.Context, args []p11rpc.Value) ([]p11rpc.Value, error) {
	slot, err := c.slot(args[0].Num)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, s := range c.sessions {
		if s.slot == slot {
			delete(c.sessions, id)
		}
	}
	c.loggedIn = c.loggedIn && len(c.sessions) > 0
	return nil, nil
}

// sessionsOf counts the open sessions of a slot.
func (c *conn) sessionsOf(slot *slot) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := uint64(0)
	for _, s := range c.sessions {
		if s.slot == slot {
			n++
		}
	}
	return n
}

// States of a session (CKS_RO_PUBLIC_SESSION and on).
const (
	ckuUser            = 1
	ckuContextSpecific = 2

	cksLoggedIn  = 1
	cksReadWrite = 2
)

func (c *conn) getSessionInfo(_ context.Context, s *session, _ []p11rpc.Value) ([]p11rpc.Value, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	state := uint64(0)
	if c.loggedIn {
		state |= cksLoggedIn
	}
	if s.flags&ckfRWSession != 0 {
		state |= cksReadWrite
	}
	return []p11rpc.Value{p11rpc.U(s.slot.id), p11rpc.U(state), p11rpc.U(s.flags), p11rpc.U(0)}, nil
}

// login takes any PIN, and forgets it: who the peer is, its socket has told. Many
// tools log in though the token says that there is no need.
func (c *conn) login(_ context.Context, _ *session, args []p11rpc.Value) ([]p11rpc.Value, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case args[0].Num == ckuContextSpecific:
		return nil, nil
	case args[0].Num != ckuUser: // there is no security officer
		return nil, ckrUserTypeInvalid
	case c.loggedIn:
		return nil, ckrUserAlreadyLoggedIn
	}
	c.loggedIn = true
	return nil, nil
}

func (c *conn) logout(context.Context, *session, []p11rpc.Value) ([]p11rpc.Value, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.loggedIn {
		return nil, ckrUserNotLoggedIn
	}
	c.loggedIn = false
	return nil, nil
}

func (c *conn) seedRandom(context.Context, *session, []p11rpc.Value) ([]p11rpc.Value, error) {
	return nil, ckrRandomSeedNotSupported
}

func (c *conn) generateRandom(_ context.Context, _ *session, args []p11rpc.Value) ([]p11rpc.Value, error) {
	n := args[0].Num
	if n == p11rpc.NullRoom {
		n = 0
	}
	if n > MaxRandom {
		return nil, refuse(ckrArgumentsBad, "%d random bytes asked for; at most %d are given at a time", n, MaxRandom)
	}
	b := make([]byte, n)
	rand.Read(b)
	return []p11rpc.Value{p11rpc.B(b)}, nil
}
