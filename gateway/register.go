package gateway

import (
	"context"
	"fmt"
	"time"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/ident"
	"github.com/signwarden/signwarden/gateway/policy"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// A right is what the rules say of an act that registers a key.
type right func(r *policy.Rules, p ident.Principal, now time.Time) policy.Decision

// ofName is an admin rule for a name.
func ofName(name string) right {
	return func(r *policy.Rules, p ident.Principal, now time.Time) policy.Decision {
		return r.Allow(policy.Query{Principal: p.Name(), Key: name, Action: policy.Admin, Now: now})
	}
}

// ofAll is one for every key.
func ofAll(r *policy.Rules, p ident.Principal, now time.Time) policy.Decision {
	return r.MayAdministerAll(p.Name(), now)
}

// beginKey opens an act that registers a key, of which check tells whether it can be
// done at all. The name is the caller's then, until unreserve; where it errs it is not.
func (g *Gateway) beginKey(ctx context.Context, p ident.Principal, action, name, frontEnd string, may right, check func(now time.Time) error) (act, error) {
	a, err := g.begin(ctx, p, action, name, frontEnd)
	if err != nil {
		return a, err
	}
	if err := check(a.e.Time); err != nil {
		return a, g.fail(a, audit.Denied, err)
	}
	d := may(a.s.rules, p, a.e.Time)
	if !d.Allowed {
		return a, g.fail(a, audit.Denied, fmt.Errorf("%w: %s", sigerr.Denied, d.Reason))
	}
	a.e.Rule = d.Rule
	if err := g.reserve(name); err != nil {
		return a, g.fail(a, audit.Denied, err)
	}
	return a, nil
}

// still asks again whether p may, under admin: the rules may have changed while the
// token worked.
func (g *Gateway) still(p ident.Principal, may right) error {
	d := may(g.snap.Load().rules, p, g.c.Now())
	if !d.Allowed {
		return fmt.Errorf("%w: %s", sigerr.Denied, d.Reason)
	}
	return nil
}

// reserve keeps two acts from generating under one name at a time.
func (g *Gateway) reserve(name string) error {
	g.admin.Lock()
	defer g.admin.Unlock()
	if g.creating[name] || g.snap.Load().keys.Get(name) != nil {
		return fmt.Errorf("%w: a key %q exists; choose another name", sigerr.Conflict, name)
	}
	g.creating[name] = true
	return nil
}

func (g *Gateway) unreserve(name string) {
	g.admin.Lock()
	defer g.admin.Unlock()
	delete(g.creating, name)
}
