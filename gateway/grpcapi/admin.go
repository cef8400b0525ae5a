package grpcapi

import (
	"context"
	"crypto/x509/pkix"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signwarden/signwarden/gateway"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/policy"
)

// admin implements the key, policy and audit services.
type admin struct {
	pb.UnimplementedKeyServiceServer
	pb.UnimplementedPolicyServiceServer
	pb.UnimplementedAuditServiceServer
	s *Server
}

func toKey(k keys.Key, v gateway.Visible) *pb.Key {
	out := &pb.Key{
		Name: k.Name, Algorithm: string(k.Algorithm), State: string(k.State), Created: timestamppb.New(k.Created),
		PublicKey: k.Public, Token: k.Token, TokenId: k.ID, MaySign: v.MaySign, MessageFormats: v.Reads, X509Chain: k.X509,
	}
	if o := k.OpenPGP; o != nil {
		out.Openpgp = &pb.OpenPGPCertificate{UserId: o.UserID, Layout: string(o.Layout), Certificate: o.Certificate}
		if !o.Expires.IsZero() {
			out.Openpgp.Expires = timestamppb.New(o.Expires)
		}
	}
	return out
}

func fromTimestamp(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// visible answers with the key as the caller sees it now.
func (a *admin) visible(ctx context.Context, name string) (*pb.Key, error) {
	v, err := a.s.c.Gateway.Key(ctx, principal(ctx), name)
	if err != nil {
		return nil, err
	}
	return toKey(v.Key, v), nil
}

// done answers with a key that an act has changed. Whether the caller may sign
// with it is asked again; that it may no longer see it does not undo the act.
func (a *admin) done(ctx context.Context, k keys.Key) *pb.Key {
	v, err := a.s.c.Gateway.Key(ctx, principal(ctx), k.Name)
	if err != nil {
		v = gateway.Visible{}
	}
	return toKey(k, v)
}

func (a *admin) CreateKey(ctx context.Context, r *pb.CreateKeyRequest) (*pb.CreateKeyResponse, error) {
	k, err := a.s.c.Gateway.CreateKey(ctx, principal(ctx), frontEnd, gateway.KeySpec{
		Name: r.GetName(), Algorithm: keys.Algorithm(r.GetAlgorithm()), UserID: r.GetOpenpgpUserId(),
		Layout: keys.Layout(r.GetOpenpgpLayout()), Expires: fromTimestamp(r.GetOpenpgpExpires()),
	})
	if err != nil {
		return nil, err
	}
	return &pb.CreateKeyResponse{Key: a.done(ctx, k)}, nil
}

// AdoptKey implements the call.
func (a *admin) AdoptKey(ctx context.Context, r *pb.AdoptKeyRequest) (*pb.AdoptKeyResponse, error) {
	k, err := a.s.c.Gateway.AdoptKey(ctx, principal(ctx), frontEnd, gateway.Adoption{
		Name: r.GetName(), ID: r.GetTokenId(), OpenPGP: r.GetOpenpgpCertificate(), PrimaryID: r.GetOpenpgpPrimaryId(),
	})
	if err != nil {
		return nil, err
	}
	return &pb.AdoptKeyResponse{Key: a.done(ctx, k)}, nil
}

// AmendOpenPGP implements the call.
func (a *admin) AmendOpenPGP(ctx context.Context, r *pb.AmendOpenPGPRequest) (*pb.AmendOpenPGPResponse, error) {
	c := gateway.OpenPGPChange{AddUserID: r.GetAddUserId(), Replace: r.GetReplace()}
	if n := r.GetRenew(); n != nil {
		expires := fromTimestamp(n.GetExpires())
		c.Renew = &expires
	}
	if v := r.GetRevoke(); v != nil {
		c.Revoke = &gateway.Revocation{Reason: v.GetReason(), Text: v.GetText()}
	}
	k, err := a.s.c.Gateway.AmendOpenPGP(ctx, principal(ctx), frontEnd, r.GetName(), c)
	if err != nil {
		return nil, err
	}
	return &pb.AmendOpenPGPResponse{Key: a.done(ctx, k)}, nil
}

// RotateOpenPGP implements the call.
func (a *admin) RotateOpenPGP(ctx context.Context, r *pb.RotateOpenPGPRequest) (*pb.RotateOpenPGPResponse, error) {
	k, err := a.s.c.Gateway.RotateOpenPGP(ctx, principal(ctx), frontEnd, r.GetName(), gateway.Rotation{
		To: r.GetTo(), Algorithm: keys.Algorithm(r.GetAlgorithm()),
		Expires: fromTimestamp(r.GetExpires()), Retire: fromTimestamp(r.GetRetire()),
	})
	if err != nil {
		return nil, err
	}
	return &pb.RotateOpenPGPResponse{Key: a.done(ctx, k)}, nil
}

func (a *admin) GetKey(ctx context.Context, r *pb.GetKeyRequest) (*pb.GetKeyResponse, error) {
	out, err := a.visible(ctx, r.GetName())
	return &pb.GetKeyResponse{Key: out}, err
}

// keysPerPage and pb.MaxMessage keep a page, at some 4 KiB for a key of RSA-4096, under gRPC's
// usual bound of 4 MiB for a client.
const keysPerPage = 500

func (a *admin) ListKeys(ctx context.Context, r *pb.ListKeysRequest) (*pb.ListKeysResponse, error) {
	all, err := a.s.c.Gateway.Keys(ctx, principal(ctx))
	if err != nil {
		return nil, err
	}
	out, size := &pb.ListKeysResponse{}, 0
	for _, v := range all {
		if v.Name <= r.GetAfter() {
			continue
		}
		if len(out.Keys) == keysPerPage || size > pb.MaxMessage {
			out.NextAfter = out.Keys[len(out.Keys)-1].Name
			break
		}
		k := toKey(v.Key, v)
		size += proto.Size(k)
		out.Keys = append(out.Keys, k)
	}
	return out, nil
}

func (a *admin) SetKeyState(ctx context.Context, r *pb.SetKeyStateRequest) (*pb.SetKeyStateResponse, error) {
	k, err := a.s.c.Gateway.SetKeyState(ctx, principal(ctx), frontEnd, r.GetName(), keys.State(r.GetState()))
	if err != nil {
		return nil, err
	}
	return &pb.SetKeyStateResponse{Key: a.done(ctx, k)}, nil
}

func fromName(n *pb.Name) pkix.Name {
	return pkix.Name{
		CommonName: n.GetCommonName(), Organization: n.GetOrganizations(), OrganizationalUnit: n.GetOrganizationalUnits(),
		Country: n.GetCountries(), Province: n.GetProvinces(), Locality: n.GetLocalities(),
	}
}

func (a *admin) CertifyKey(ctx context.Context, r *pb.CertifyKeyRequest) (*pb.CertifyKeyResponse, error) {
	k, err := a.s.c.Gateway.CertifyKey(ctx, principal(ctx), frontEnd, r.GetName(), gateway.X509Spec{
		Subject: fromName(r.GetSubject()), Usage: gateway.Usage(r.GetUsage()), Expires: fromTimestamp(r.GetExpires()),
	})
	if err != nil {
		return nil, err
	}
	return &pb.CertifyKeyResponse{Key: a.done(ctx, k)}, nil
}

func (a *admin) ImportChain(ctx context.Context, r *pb.ImportChainRequest) (*pb.ImportChainResponse, error) {
	k, err := a.s.c.Gateway.ImportChain(ctx, principal(ctx), frontEnd, r.GetName(), r.GetChain())
	if err != nil {
		return nil, err
	}
	return &pb.ImportChainResponse{Key: a.done(ctx, k)}, nil
}

func (a *admin) CreateSigningRequest(ctx context.Context, r *pb.CreateSigningRequestRequest) (*pb.CreateSigningRequestResponse, error) {
	der, err := a.s.c.Gateway.CSR(ctx, principal(ctx), frontEnd, r.GetName(), fromName(r.GetSubject()))
	return &pb.CreateSigningRequestResponse{Request: der}, err
}

func (a *admin) ApplyPolicy(ctx context.Context, r *pb.ApplyPolicyRequest) (*pb.ApplyPolicyResponse, error) {
	n, err := a.s.c.Gateway.ApplyPolicy(ctx, principal(ctx), frontEnd, []byte(r.GetSource()))
	return &pb.ApplyPolicyResponse{Rules: int32(n)}, err
}

func (a *admin) GetPolicy(ctx context.Context, _ *pb.GetPolicyRequest) (*pb.GetPolicyResponse, error) {
	src, err := a.s.c.Gateway.Policy(ctx, principal(ctx), frontEnd)
	return &pb.GetPolicyResponse{Source: string(src)}, err
}

func (a *admin) TestPolicy(ctx context.Context, r *pb.TestPolicyRequest) (*pb.TestPolicyResponse, error) {
	p := principal(ctx)
	q := policy.Query{
		Principal: r.GetPrincipal(), Key: r.GetKey(), Action: policy.Action(r.GetAction()),
		Format: r.GetFormat(), Blind: true, Hash: keys.HashName(r.GetHash().Hash()),
	}
	content := policy.Content{Namespace: r.GetNamespace(), User: r.GetUser()}
	if pkg := r.GetPackage(); pkg != nil {
		content.Package = &policy.Package{
			Name: pkg.GetName(), Epoch: pkg.GetEpoch(), Version: pkg.GetVersion(),
			Release: pkg.GetRelease(), Arch: pkg.GetArch(), Vendor: pkg.GetVendor(),
		}
	}
	if content != (policy.Content{}) {
		q.Blind, q.Content = false, &content
	}
	if q.Principal == "" {
		q.Principal = p.Name()
	}
	if q.Action == "" {
		q.Action = policy.Sign
	}
	if r.GetHash() == pb.HashAlgorithm_HASH_ALGORITHM_UNSPECIFIED {
		q.Hash = "sha256"
	}
	d, each, err := a.s.c.Gateway.TestPolicy(ctx, p, frontEnd, q)
	if err != nil {
		return nil, err
	}
	return &pb.TestPolicyResponse{Allowed: d.Allowed, Rule: d.Rule, Reason: d.Reason, Rules: each}, nil
}

func (a *admin) ListEntries(ctx context.Context, r *pb.ListEntriesRequest) (*pb.ListEntriesResponse, error) {
	limit := int(r.GetLimit())
	if limit == 0 {
		limit = 100
	}
	first, entries, err := a.s.c.Gateway.AuditEntries(ctx, principal(ctx), frontEnd, r.GetFromRow(), limit)
	if err != nil {
		return nil, err
	}
	first, entries = fit(first, entries, r.GetFromRow() < 0)
	return &pb.ListEntriesResponse{FirstRow: first, Entries: entries}, nil
}

// fit cuts a run of rows to one message, at its end or, where the last are
// wanted, at its beginning, but for one row, which always stays. Rows hold
// clients' words, so a page could be long enough for a client to refuse.
func fit(first int64, entries [][]byte, last bool) (int64, [][]byte) {
	size := 0
	if last {
		for n := len(entries) - 1; n >= 0; n-- {
			if size += len(entries[n]); size > pb.MaxMessage && n < len(entries)-1 {
				return first + int64(n) + 1, entries[n+1:]
			}
		}
		return first, entries
	}
	for n, e := range entries {
		if size += len(e); size > pb.MaxMessage && n > 0 {
			return first, entries[:n]
		}
	}
	return first, entries
}
