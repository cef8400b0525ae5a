package client

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

var (
	// errMoveOn says that a stream takes no more requests and that this one was
	// not sent on it.
	errMoveOn = errors.New("the stream takes no more requests")

	errClosed = fmt.Errorf("%w: the client has been closed", sigerr.Canceled)
)

func contextError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%w: no answer from the gateway", sigerr.Timeout)
	}
	return sigerr.Canceled
}

// transportErrors says in a person's words what gRPC and crypto/tls tell of a
// connection that failed. gRPC hands on only their text, so a row is found by a
// part of it (grpc v1.85, Go 1.26); the text from there on is told too.
var transportErrors = []struct {
	part  string
	kind  error
	words string
}{
	// What the gateway says to our certificate: RFC 8446 section 6.2.
	{"tls: expired certificate", sigerr.Unauthenticated, "the gateway refuses this client's certificate: it has expired or is not valid yet; issue a new one"},
	{"tls: unknown certificate authority", sigerr.Unauthenticated, "the gateway refuses this client's certificate: the gateway's client CA did not issue it"},
	{"tls: certificate required", sigerr.Unauthenticated, "the gateway wants a client certificate and got none"},
	{"tls: bad certificate", sigerr.Unauthenticated, "the gateway refuses this client's certificate: it may not be made for client authentication"},
	{"tls: unsupported certificate", sigerr.Unauthenticated, "the gateway refuses this client's certificate: it may not be made for client authentication"},

	// What we say to the gateway's.
	{"x509: certificate signed by unknown authority", sigerr.Unauthenticated, "the gateway's certificate is not trusted: the CA in the client profile did not issue it"},
	{"x509: certificate has expired or is not yet valid", sigerr.Unauthenticated, "the gateway's certificate is not trusted: it has expired or is not valid yet"},
	{"x509: certificate is valid for", sigerr.Unauthenticated, "the gateway's certificate is not trusted: it is for another name; see server_name in the client profile"},
	{"x509: certificate is not valid for any names", sigerr.Unauthenticated, "the gateway's certificate is not trusted: it is for another name; see server_name in the client profile"},
	{"x509: cannot validate certificate for", sigerr.Unauthenticated, "the gateway's certificate is not trusted: it is for another name; see server_name in the client profile"},
	{"x509: ", sigerr.Unauthenticated, "the gateway's certificate is not trusted"},

	{"tls: protocol version not supported", sigerr.Unavailable, "what listens there does not speak TLS 1.3"},
	{"tls: first record does not look like a TLS handshake", sigerr.Unavailable, "what listens there does not speak TLS"},
	{"connection refused", sigerr.Unavailable, "nothing listens there; is the gateway running, and the address right?"},
	{"no such host", sigerr.Unavailable, "the host's name is not known; is the address right?"},
	{"produced zero addresses", sigerr.Unavailable, "the host's name is not known; is the address right?"},

	// What never went out, or not in.
	{"message larger than max", sigerr.Invalid, "the message is too large"},
	{"error while marshaling", sigerr.Invalid, "the request cannot be sent"},
}

// wireError turns a gRPC error into one of ours. A gateway that cannot be
// reached comes out as Unavailable; one whose certificate we do not accept, or
// that does not accept ours, as Unauthenticated, which is not tried again.
func (c *Client) wireError(err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	told := pb.FromStatus(st)
	kind := sigerr.Kind(told)
	if kind != nil && strings.Contains(st.Message(), kind.Error()) {
		return told // the gateway's own words: they name their kind
	}
	for _, row := range transportErrors {
		if at := strings.Index(st.Message(), row.part); at >= 0 {
			return fmt.Errorf("%w: %s: %s (%s)", row.kind, c.address, row.words, strings.TrimRight(st.Message()[at:], "\""))
		}
	}
	switch {
	case kind == nil:
		return told
	case st.Code() == codes.Internal:
		// Not the token's failure, whose code it is: HTTP/2 broke.
		kind = sigerr.Unavailable
	case st.Code() == codes.Unimplemented:
		// Nor the token's.
		return fmt.Errorf("%s: %s: the gateway does not know this call; is it older than this client?", c.address, st.Message())
	}
	return fmt.Errorf("%w: %s: %s", kind, c.address, st.Message())
}
