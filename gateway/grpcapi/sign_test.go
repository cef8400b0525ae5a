package grpcapi_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/signwarden/signwarden/gateway/audit"
	"github.com/signwarden/signwarden/gateway/client"
	pb "github.com/signwarden/signwarden/gateway/gatewaypb"
	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// digestOpts is how OpenPGP asks an Ed25519 key for a signature over a digest.
type digestOpts struct{ crypto.Hash }

func (digestOpts) HashFunc() crypto.Hash     { return 0 }
func (d digestOpts) DigestHash() crypto.Hash { return d.Hash }

func TestAlgorithms(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	conn := s.raw(t, "root")
	unary, stream, cl := pb.NewSigningServiceClient(conn), openStream(t, conn), s.client(t, "root")
	for _, a := range keys.Algorithms {
		t.Run(string(a), func(t *testing.T) {
			k := s.Key(t, "k-"+string(a), a)
			schemes := []keys.Scheme{""}
			if usual, err := keys.SchemeFor(a, ""); err == nil && usual == keys.PKCS1v15 {
				schemes = append(schemes, keys.PSS)
			}
			for _, scheme := range schemes {
				it := item(k.Name, "unary-"+string(a)+string(scheme))
				it.Scheme = pb.SignatureSchemeOf(scheme)
				before := s.Token.Signs()
				r, err := unary.Sign(t.Context(), &pb.SignRequest{Item: it})
				if err != nil {
					t.Fatal(err)
				}
				checkResult(t, s, k, it, r.GetSignature())

				it = item(k.Name, "stream-"+string(a)+string(scheme))
				it.Scheme = pb.SignatureSchemeOf(scheme)
				sum := sha512.Sum512([]byte("text"))
				it.Digest, it.Hash = sum[:], pb.HashAlgorithm_HASH_ALGORITHM_SHA512
				checkResult(t, s, k, it, stream.one(it).GetSignature())

				req := clientRequest(k.Name, "client-"+string(a)+string(scheme))
				req.Scheme = scheme
				sig, err := cl.Sign(t.Context(), req)
				if err != nil {
					t.Fatal(err)
				}
				checkSignature(t, s, k, req.ID, req.Hash, req.Digest, sig)
				if got := s.Token.Signs() - before; got != 3 {
					t.Errorf("the token signed %d times, want 3", got)
				}
			}
			checkSigner(t, s, cl, k)
		})
	}
}

// checkSigner holds a client.Signer to the contract of crypto.Signer.
func checkSigner(t *testing.T, s *service, cl *client.Client, k keys.Key) {
	t.Helper()
	key, err := cl.Key(t.Context(), k.Name)
	if err != nil {
		t.Fatal(err)
	}
	sg := cl.Signer(t.Context(), key, "cms", client.Claim{File: "file"})
	sum := sha256.Sum256([]byte("signer"))
	digest := sum[:]
	refused := func(name string, digest []byte, opts crypto.SignerOpts) {
		t.Helper()
		before := s.Token.Signs()
		if sig, err := sg.Sign(rand.Reader, digest, opts); !errors.Is(err, sigerr.Invalid) || sig != nil {
			t.Errorf("%s: got %x, %v; want Invalid", name, sig, err)
		}
		if s.Token.Signs() != before {
			t.Errorf("%s reached the token", name)
		}
	}
	refused("no hash", digest, crypto.Hash(0))
	refused("SHA-1", digest[:20], crypto.SHA1)
	refused("another hash's length", digest[:31], digestOpts{crypto.SHA256})

	switch pub := sg.Public().(type) {
	case *rsa.PublicKey:
		sig, err := sg.Sign(rand.Reader, digest, crypto.SHA256)
		if err == nil {
			err = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest, sig)
		}
		if err != nil {
			t.Errorf("PKCS #1 v1.5: %v", err)
		}
		for _, salt := range []int{rsa.PSSSaltLengthEqualsHash, 32} {
			opts := &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: salt}
			sig, err = sg.Sign(rand.Reader, digest, opts)
			if err == nil {
				err = rsa.VerifyPSS(pub, crypto.SHA256, digest, sig, &rsa.PSSOptions{SaltLength: 32})
			}
			if err != nil {
				t.Errorf("PSS with salt length %d: %v", salt, err)
			}
		}
		most := pub.Size() - 32 - 2
		for _, salt := range []int{1, 20, most} {
			before := s.Token.Signs()
			sig, err = sg.Sign(rand.Reader, digest, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: salt})
			if err == nil {
				err = rsa.VerifyPSS(pub, crypto.SHA256, digest, sig, &rsa.PSSOptions{SaltLength: salt})
			}
			if err != nil || s.Token.Signs() != before+1 {
				t.Errorf("PSS with salt length %d: %v", salt, err)
			}
			if e := s.Store.Last(t); e.Detail != fmt.Sprintf("salt of %d bytes", salt) || e.Scheme != "rsa-pss" {
				t.Errorf("audit entry %+v", e)
			}
		}
		refused("a salt for which there is no room", digest, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: most + 1})
		refused("a negative salt length", digest, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: -2})
		refused("an automatic salt length", digest, &rsa.PSSOptions{Hash: crypto.SHA256})
		certify(t, sg)
	case *ecdsa.PublicKey:
		sig, err := sg.Sign(rand.Reader, digest, crypto.SHA256)
		if err != nil || !ecdsa.VerifyASN1(pub, digest, sig) {
			t.Errorf("ECDSA: signature %x, %v", sig, err)
		}
		refused("PSS", digest, &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: 32})
		certify(t, sg)
	case ed25519.PublicKey:
		sig, err := sg.Sign(rand.Reader, digest, digestOpts{crypto.SHA256})
		if err != nil || !ed25519.Verify(pub, digest, sig) {
			t.Errorf("Ed25519: signature %x, %v", sig, err)
		}
		long := sha512.Sum512([]byte("signer"))
		refused("Ed25519ph", long[:], crypto.SHA512)
	}
	if e := lastSigned(t, s); e.Format != "cms" || e.ClaimFile != "file" || e.Key != k.Name {
		t.Errorf("audit entry %+v, want the signer's format, claim and key", e)
	}
}

func lastSigned(t *testing.T, s *service) audit.Entry {
	t.Helper()
	var last audit.Entry
	for _, e := range s.Store.Entries(t) {
		if e.Outcome == audit.Signed {
			last = e
		}
	}
	return last
}

// certify has crypto/x509 use the signer.
func certify(t *testing.T, sg crypto.Signer) {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: serial(t), Subject: pkix.Name{CommonName: "self"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, sg.Public(), sg)
	if err != nil {
		t.Fatalf("x509.CreateCertificate: %v", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature); err != nil {
		t.Errorf("the certificate's signature: %v", err)
	}
}

// A Signer gives nothing away that does not verify.
func TestSignerVerifies(t *testing.T) {
	t.Parallel()
	s := serve(t, gatewaytest.New(t, ""))
	s.Key(t, "a", keys.P256)
	s.Key(t, "b", keys.P256)
	cl := s.client(t, "root")
	a, err := cl.Key(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	a.Name = "b"
	sum := sha256.Sum256(nil)
	sig, err := cl.Signer(t.Context(), a, "cms", client.Claim{}).Sign(rand.Reader, sum[:], crypto.SHA256)
	if !errors.Is(err, sigerr.TokenFailed) || sig != nil {
		t.Errorf("got %x, %v; want a token failure", sig, err)
	}
}
