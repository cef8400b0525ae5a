package client

import (
	"context"
	"crypto"
	"crypto/x509/pkix"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/keys"
)

// KeySpec says what key to create.
type KeySpec struct {
	Name      string
	Algorithm keys.Algorithm
	UserID    string      // of an OpenPGP certificate; empty: none
	Layout    keys.Layout // of the certificate; empty: keys.Subkey
	Expires   time.Time   // of the certificate; zero: never
}

// CreateKey generates a key in the gateway's token.
func (c *Client) CreateKey(ctx context.Context, k KeySpec) (Key, error) {
	r, err := c.keys.CreateKey(ctx, &pb.CreateKeyRequest{
		Name: k.Name, Algorithm: string(k.Algorithm), OpenpgpUserId: k.UserID, OpenpgpLayout: string(k.Layout),
		OpenpgpExpires: timestamp(k.Expires),
	})
	if err != nil {
		return Key{}, c.wireError(err)
	}
	return toKey(r.GetKey())
}

// Adoption says which key of the gateway's token to register.
type Adoption struct {
	Name      string
	TokenID   []byte // CKA_ID
	OpenPGP   []byte // a certificate in which it may sign, armored or not; nil: none
	PrimaryID []byte // CKA_ID of the certificate's primary key, where that is another one in the token
}

// AdoptKey registers a key that is in the gateway's token and was not made by CreateKey.
func (c *Client) AdoptKey(ctx context.Context, a Adoption) (Key, error) {
	r, err := c.keys.AdoptKey(ctx, &pb.AdoptKeyRequest{
		Name: a.Name, TokenId: a.TokenID, OpenpgpCertificate: a.OpenPGP, OpenpgpPrimaryId: a.PrimaryID,
	})
	if err != nil {
		return Key{}, c.wireError(err)
	}
	return toKey(r.GetKey())
}

// Key tells of one key that we may see. A gateway that cannot be reached is asked
// again, for a second or two.
func (c *Client) Key(ctx context.Context, name string) (Key, error) {
	var r *pb.GetKeyResponse
	err := c.persist(ctx, keyAttempts, func() (err error) {
		r, err = c.keys.GetKey(ctx, &pb.GetKeyRequest{Name: name})
		return c.wireError(err)
	})
	if err != nil {
		return Key{}, err
	}
	return toKey(r.GetKey())
}

// Keys tells of every key that we may see, by name.
func (c *Client) Keys(ctx context.Context) ([]Key, error) {
	var out []Key
	for after := ""; ; {
		r, err := c.keys.ListKeys(ctx, &pb.ListKeysRequest{After: after})
		if err != nil {
			return nil, c.wireError(err)
		}
		for _, k := range r.GetKeys() {
			key, err := toKey(k)
			if err != nil {
				return nil, err
			}
			out = append(out, key)
		}
		if r.GetNextAfter() == "" || r.GetNextAfter() <= after {
			return out, nil
		}
		after = r.GetNextAfter()
	}
}

// SetKeyState enables or disables a key.
func (c *Client) SetKeyState(ctx context.Context, name string, to keys.State) (Key, error) {
	r, err := c.keys.SetKeyState(ctx, &pb.SetKeyStateRequest{Name: name, State: string(to)})
	if err != nil {
		return Key{}, c.wireError(err)
	}
	return toKey(r.GetKey())
}

// RenewOpenPGP has a certificate expire at another time; zero: never.
func (c *Client) RenewOpenPGP(ctx context.Context, name string, expires time.Time) (Key, error) {
	return c.amend(ctx, &pb.AmendOpenPGPRequest{Name: name, Change: &pb.AmendOpenPGPRequest_Renew{Renew: &pb.Renewal{Expires: timestamp(expires)}}})
}

// AddUserID adds a user id to a certificate.
func (c *Client) AddUserID(ctx context.Context, name, id string) (Key, error) {
	return c.amend(ctx, &pb.AmendOpenPGPRequest{Name: name, Change: &pb.AmendOpenPGPRequest_AddUserId{AddUserId: id}})
}

// RevokeOpenPGP ends a certificate, for good, and disables its keys. reason is
// unspecified, superseded, compromised or retired; text is for people.
func (c *Client) RevokeOpenPGP(ctx context.Context, name, reason, text string) (Key, error) {
	return c.amend(ctx, &pb.AmendOpenPGPRequest{Name: name, Change: &pb.AmendOpenPGPRequest_Revoke{Revoke: &pb.Revocation{Reason: reason, Text: text}}})
}

// ReplaceOpenPGP takes a certificate, armored or not, that was changed where its primary
// key is, in place of the same one as it was.
func (c *Client) ReplaceOpenPGP(ctx context.Context, name string, certificate []byte) (Key, error) {
	return c.amend(ctx, &pb.AmendOpenPGPRequest{Name: name, Change: &pb.AmendOpenPGPRequest_Replace{Replace: certificate}})
}

func (c *Client) amend(ctx context.Context, r *pb.AmendOpenPGPRequest) (Key, error) {
	out, err := c.keys.AmendOpenPGP(ctx, r)
	if err != nil {
		return Key{}, c.wireError(err)
	}
	return toKey(out.GetKey())
}

// Rotation says what new signing subkey to make in a key's certificate.
type Rotation struct {
	To        string         // name of the new key
	Algorithm keys.Algorithm // empty: that of the old one
	Expires   time.Time      // of the new subkey; zero: with the certificate
	Retire    time.Time      // when the old subkey expires; zero: as it was
}

// RotateOpenPGP makes a new key as another signing subkey of a key's certificate.
func (c *Client) RotateOpenPGP(ctx context.Context, name string, r Rotation) (Key, error) {
	out, err := c.keys.RotateOpenPGP(ctx, &pb.RotateOpenPGPRequest{
		Name: name, To: r.To, Algorithm: string(r.Algorithm), Expires: timestamp(r.Expires), Retire: timestamp(r.Retire),
	})
	if err != nil {
		return Key{}, c.wireError(err)
	}
	return toKey(out.GetKey())
}

// timestamp is the wire form of a time; nil: zero.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// X509Spec says what self-signed certificate to make.
type X509Spec struct {
	Subject pkix.Name
	Usage   string    // codesign, kmod or efi
	Expires time.Time // zero: never
}

func toName(n pkix.Name) *pb.Name {
	return &pb.Name{
		CommonName: n.CommonName, Organizations: n.Organization, OrganizationalUnits: n.OrganizationalUnit,
		Countries: n.Country, Provinces: n.Province, Localities: n.Locality,
	}
}

// CertifyKey has the gateway make a self-signed certificate for a key.
func (c *Client) CertifyKey(ctx context.Context, name string, x X509Spec) (Key, error) {
	r, err := c.keys.CertifyKey(ctx, &pb.CertifyKeyRequest{
		Name: name, Subject: toName(x.Subject), Usage: x.Usage, Expires: timestamp(x.Expires),
	})
	if err != nil {
		return Key{}, c.wireError(err)
	}
	return toKey(r.GetKey())
}

// ImportChain stores the certificates that others have issued for a key, DER,
// its own first.
func (c *Client) ImportChain(ctx context.Context, name string, chain [][]byte) (Key, error) {
	r, err := c.keys.ImportChain(ctx, &pb.ImportChainRequest{Name: name, Chain: chain})
	if err != nil {
		return Key{}, c.wireError(err)
	}
	return toKey(r.GetKey())
}

// CreateSigningRequest has the gateway make a PKCS #10 request for a key, DER.
func (c *Client) CreateSigningRequest(ctx context.Context, name string, subject pkix.Name) ([]byte, error) {
	r, err := c.keys.CreateSigningRequest(ctx, &pb.CreateSigningRequestRequest{Name: name, Subject: toName(subject)})
	return r.GetRequest(), c.wireError(err)
}

// ApplyPolicy replaces the gateway's rules and returns their number.
func (c *Client) ApplyPolicy(ctx context.Context, source []byte) (int, error) {
	r, err := c.policy.ApplyPolicy(ctx, &pb.ApplyPolicyRequest{Source: string(source)})
	return int(r.GetRules()), c.wireError(err)
}

// Policy returns the policy file in force.
func (c *Client) Policy(ctx context.Context) ([]byte, error) {
	r, err := c.policy.GetPolicy(ctx, &pb.GetPolicyRequest{})
	return []byte(r.GetSource()), c.wireError(err)
}

// PolicyQuery is a question to the rules.
type PolicyQuery struct {
	Principal string // empty: we
	Key       string
	Action    string // sign, read or admin; empty: sign
	Format    string // for sign
	Hash      crypto.Hash
	// What a message would be of; all empty: a bare digest.
	Package   *Package // of format rpm
	Namespace string   // of format ssh-sig
	User      string   // of format ssh-auth
}

// Package is what the gateway reads of an RPM package's header.
type Package struct {
	Name, Epoch, Version, Release, Arch string // Epoch is empty where it has none
	Vendor                              string
}

// PolicyDecision is what the rules say to a PolicyQuery.
type PolicyDecision struct {
	Allowed bool     `json:"allowed"`
	Rule    string   `json:"rule,omitempty"`   // that allows it
	Reason  string   `json:"reason,omitempty"` // why not
	Rules   []string `json:"rules,omitempty"`  // what each says, for an administrator
}

// TestPolicy asks what would be decided.
func (c *Client) TestPolicy(ctx context.Context, q PolicyQuery) (PolicyDecision, error) {
	req := &pb.TestPolicyRequest{
		Principal: q.Principal, Key: q.Key, Action: q.Action, Format: q.Format, Hash: pb.HashAlgorithmOf(q.Hash),
		Namespace: q.Namespace, User: q.User,
	}
	if p := q.Package; p != nil {
		req.Package = &pb.Package{
			Name: p.Name, Epoch: p.Epoch, Version: p.Version, Release: p.Release, Arch: p.Arch, Vendor: p.Vendor,
		}
	}
	r, err := c.policy.TestPolicy(ctx, req)
	return PolicyDecision{r.GetAllowed(), r.GetRule(), r.GetReason(), r.GetRules()}, c.wireError(err)
}

// AuditEntries returns up to limit (1 to 1,000) rows of the audit log from row
// from on, or the last ones where from is negative, as canonical JSON, and the
// number of the first. They are fewer where they would not fit a message.
func (c *Client) AuditEntries(ctx context.Context, from int64, limit int) (first int64, entries [][]byte, err error) {
	r, err := c.audit.ListEntries(ctx, &pb.ListEntriesRequest{FromRow: from, Limit: int32(limit)})
	return r.GetFirstRow(), r.GetEntries(), c.wireError(err)
}
