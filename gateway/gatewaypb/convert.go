// Package gatewaypb is the generated form of the protocol signwarden.v1, and
// the tables between it and our own types. Only package grpcapi and package
// client import it.
package gatewaypb

import (
	"crypto"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// The bounds of the protocol.
const (
	// MaxMessage is the size of the largest message, in bytes.
	MaxMessage = 1 << 20
	// MaxContent is the size of the largest message to be signed, and MaxPart
	// that of the part of one that an item carries.
	MaxContent = 16 << 20
	MaxPart    = 384 << 10
	// MaxItems is how many items or results a message of a stream carries.
	MaxItems = 256
	// RetryDelay is what a refusal for overload suggests to wait, where the
	// error itself does not know better (RetryAfter() time.Duration).
	RetryDelay = 50 * time.Millisecond
)

// errorCodes maps each kind of error to the code that stands for it, and back.
var errorCodes = []struct {
	kind error
	code codes.Code
}{
	{sigerr.NotFound, codes.NotFound},
	{sigerr.Denied, codes.PermissionDenied},
	{sigerr.Disabled, codes.FailedPrecondition},
	{sigerr.Invalid, codes.InvalidArgument},
	{sigerr.Conflict, codes.AlreadyExists},
	{sigerr.Overloaded, codes.ResourceExhausted},
	{sigerr.Timeout, codes.DeadlineExceeded},
	{sigerr.Canceled, codes.Canceled},
	{sigerr.Unsupported, codes.Unimplemented},
	{sigerr.TokenFailed, codes.Internal},
	{sigerr.Unavailable, codes.Unavailable},
	{sigerr.Unauthenticated, codes.Unauthenticated},
}

// ToStatus returns what the wire says of err, and whether its kind is known. An
// error of no known kind becomes Unknown, and its text stays with the caller of
// ToStatus to log.
func ToStatus(err error) (s *status.Status, known bool) {
	kind := sigerr.Kind(err)
	for _, row := range errorCodes {
		if row.kind != kind {
			continue
		}
		s := status.New(row.code, err.Error())
		if row.kind == sigerr.Overloaded {
			// An error here means the detail could not be marshalled: go without.
			delay := RetryDelay
			if r, ok := errors.AsType[retryable](err); ok {
				delay = r.RetryAfter()
			}
			if d, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(delay)}); err == nil {
				s = d
			}
		}
		return s, true
	}
	return status.New(codes.Unknown, "internal error; the gateway's log tells more"), false
}

// retryable is an error that knows when to try again.
type retryable interface {
	error
	RetryAfter() time.Duration
}

// remote is an error as the gateway told it: its words, its kind for errors.Is,
// and when to try again, where it said so.
type remote struct {
	kind  error
	text  string
	after time.Duration
}

func (r *remote) Error() string             { return r.text }
func (r *remote) Unwrap() error             { return r.kind }
func (r *remote) RetryAfter() time.Duration { return r.after }

// FromStatus is the inverse of ToStatus. A code that no row has becomes an
// error of no kind.
func FromStatus(s *status.Status) error {
	for _, row := range errorCodes {
		if row.code == s.Code() {
			r := &remote{kind: row.kind, text: s.Message()}
			for _, d := range s.Details() {
				if info, ok := d.(*errdetails.RetryInfo); ok {
					r.after = info.GetRetryDelay().AsDuration()
				}
			}
			return r
		}
	}
	return fmt.Errorf("the gateway answered %s: %s", s.Code(), s.Message())
}

var hashes = map[HashAlgorithm]crypto.Hash{
	HashAlgorithm_HASH_ALGORITHM_SHA256: crypto.SHA256,
	HashAlgorithm_HASH_ALGORITHM_SHA384: crypto.SHA384,
	HashAlgorithm_HASH_ALGORITHM_SHA512: crypto.SHA512,
	HashAlgorithm_HASH_ALGORITHM_SHA1:   crypto.SHA1,
}

// Hash returns the hash, or 0, which the gateway refuses.
func (h HashAlgorithm) Hash() crypto.Hash { return hashes[h] }

// HashAlgorithmOf is the inverse of Hash.
func HashAlgorithmOf(h crypto.Hash) HashAlgorithm {
	for e, hh := range hashes {
		if hh == h {
			return e
		}
	}
	return HashAlgorithm_HASH_ALGORITHM_UNSPECIFIED
}

var schemes = map[SignatureScheme]keys.Scheme{
	SignatureScheme_SIGNATURE_SCHEME_UNSPECIFIED:   "",
	SignatureScheme_SIGNATURE_SCHEME_RSA_PKCS1V15:  keys.PKCS1v15,
	SignatureScheme_SIGNATURE_SCHEME_RSA_PSS:       keys.PSS,
	SignatureScheme_SIGNATURE_SCHEME_ECDSA:         keys.ECDSA,
	SignatureScheme_SIGNATURE_SCHEME_EDDSA:         keys.EdDSA,
	SignatureScheme_SIGNATURE_SCHEME_EDDSA_MESSAGE: keys.EdDSAMessage,
}

// Scheme returns the scheme: empty where unspecified, and for a number that
// this version does not know, one that no key can sign with.
func (s SignatureScheme) Scheme() keys.Scheme {
	if scheme, ok := schemes[s]; ok {
		return scheme
	}
	return keys.Scheme(s.String())
}

// SignatureSchemeOf is the inverse of Scheme.
func SignatureSchemeOf(s keys.Scheme) SignatureScheme {
	for e, scheme := range schemes {
		if scheme == s {
			return e
		}
	}
	return SignatureScheme_SIGNATURE_SCHEME_UNSPECIFIED
}
