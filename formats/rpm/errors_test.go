package rpm_test

import (
	"bytes"
	"crypto"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"slices"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/formats/openpgp"
	"github.com/signwarden/signwarden/formats/rpm"
)

func itoa(n int) string { return strconv.Itoa(n) }

func wantError(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}

// headerOffset is where the main header begins.
func headerOffset(b []byte) int {
	n, dl := int(binary.BigEndian.Uint32(b[104:])), int(binary.BigEndian.Uint32(b[108:]))
	return (112 + 16*n + dl + 7) / 8 * 8
}

// withSig replaces entries of the signature header.
func withSig(t testing.TB, b []byte, change func([]tag) []tag) []byte {
	t.Helper()
	return withSigOf(t, b, 62, change)
}

func withSigOf(t testing.TB, b []byte, region uint32, change func([]tag) []tag) []byte {
	t.Helper()
	tags, rest := sigTags(t, b)
	return pack(header(region, change(tags)...), rest, nil)
}

// trySign signs with a signer that counts, and returns how often it was asked.
func trySign(b []byte, s subject, o rpm.Options) (*rpm.Update, int, error) {
	counting := &countingSigner{Signer: s.signer}
	p, err := rpm.ReadPackage(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, 0, err
	}
	signing, err := rpm.Prepare(p, s.key, o)
	if err != nil {
		return nil, counting.asked, err
	}
	u, err := signing.Sign(counting, counting)
	return u, counting.asked, err
}

// A package that is not what its digests say is never given to the signer.
func TestRefusedBeforeSigning(t *testing.T) {
	good := demo(t)
	at := headerOffset(good)
	flip := func(b []byte, i int) []byte {
		b = bytes.Clone(b)
		b[i] ^= 1
		return b
	}
	drop := func(tags ...uint32) func([]tag) []tag {
		return func(all []tag) []tag {
			return slices.DeleteFunc(all, func(e tag) bool { return slices.Contains(tags, e.tag) })
		}
	}
	set := func(e tag) func([]tag) []tag {
		return func(all []tag) []tag {
			for i := range all {
				if all[i].tag == e.tag {
					all[i] = e
				}
			}
			return all
		}
	}
	old := corpus(t)["simple-1.0.1-1.i386.rpm"] // MD5 for its payload, and SHA-1
	rpm3 := rpm3()                              // MD5 alone
	unread := rpm.Options{NoPayloadCheck: true}
	tests := []struct {
		name string
		b    []byte
		o    rpm.Options
		want error
	}{
		{"header", flip(good, bytes.Index(good, []byte("Test Vendor"))), rpm.Options{}, rpm.ErrDigest},
		{"header, payload unread", flip(good, bytes.Index(good, []byte("Test Vendor"))), unread, rpm.ErrDigest},
		{"payload begins", flip(good, len(good)-500), rpm.Options{}, rpm.ErrDigest},
		{"payload ends", flip(good, len(good)-1), rpm.Options{}, rpm.ErrDigest},
		{"truncated", good[:len(good)-1], rpm.Options{}, rpm.ErrDigest},
		{"truncated, payload unread", good[:len(good)-1], unread, rpm.ErrDigest},
		{"longer", append(slices.Clip(good), 0), unread, rpm.ErrDigest},
		{"header of the lead only", good[:96], rpm.Options{}, rpm.ErrMalformed},
		{"within the header", good[:at+100], rpm.Options{}, rpm.ErrMalformed},
		{"SHA-256 not hexadecimal", withSig(t, good, set(str(273, "x"))), rpm.Options{}, rpm.ErrMalformed},
		{"SHA-256 of another type", withSig(t, good, set(num(273, 1))), rpm.Options{}, rpm.ErrMalformed},
		{"SHA-1 where it counts", flip(withSig(t, good, drop(273)), 0+headerOffset(withSig(t, good, drop(273)))+16*70),
			unread, rpm.ErrDigest},
		{"SHA-1 beside SHA-256", withSig(t, good, set(str(269, hexOf(make([]byte, 20))))), unread, rpm.ErrDigest},
		{"SHA-1 of another length", withSig(t, good, set(str(269, hexOf(make([]byte, 16))))), unread, rpm.ErrMalformed},
		{"MD5 beside SHA-256", withSig(t, good, set(tag{1004, 7, 16, make([]byte, 16)})), rpm.Options{}, rpm.ErrDigest},
		{"no header digest, payload unread", withSig(t, good, drop(269, 273)), unread, rpm.ErrNoDigest},
		{"no header digest", withSig(t, good, drop(269, 273)), rpm.Options{}, rpm.ErrNoDigest},
		{"old payload", flip(old, len(old)-1), rpm.Options{}, rpm.ErrDigest},
		{"old payload though unread", flip(old, len(old)-1), unread, rpm.ErrDigest},
		{"old without MD5", withSig(t, old, drop(1004)), rpm.Options{}, rpm.ErrNoDigest},
		{"rpm 3", flip(rpm3, len(rpm3)-1), rpm.Options{}, rpm.ErrDigest},
		{"tag twice", withSig(t, good, func(all []tag) []tag {
			return append(slices.Clip(all), all[len(all)-1])
		}), rpm.Options{}, rpm.ErrMalformed},
		{"key not yet created", good, rpm.Options{Time: created.AddDate(-1, 0, 0)}, openpgp.ErrKeyUnusable},
		{"hash", good, rpm.Options{Hash: crypto.SHA1}, openpgp.ErrUnsupported},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u, asked, err := trySign(tt.b, ed(), tt.o)
			wantError(t, err, tt.want)
			if asked != 0 || u != nil {
				t.Errorf("the signer was asked %d times, Update %v", asked, u)
			}
		})
	}
	// A SHA-1 on a header of rpm 3 is one that rpmsign has added, of the header it would write today.
	_, asked, err := trySign(withSigOf(t, rpm3, 0, func(all []tag) []tag {
		return append([]tag{str(269, "0000000000000000000000000000000000000000")}, all...)
	}), ed(), rpm.Options{})
	if err != nil || asked != 1 {
		t.Errorf("rpm 3 with SHA-1: %v, the signer was asked %d times", err, asked)
	}
	_, asked, err = trySign(flip(good, len(good)-1), ed(), unread)
	if err != nil || asked != 1 {
		t.Errorf("payload unread: %v, the signer was asked %d times", err, asked)
	}
}

// A signer that fails or lies makes no Update; and the Signing may be finished later.
func TestBadSigner(t *testing.T) {
	broken := errors.New("token is gone")
	for _, s := range []subject{rsa2048(), ed(), p256()} {
		signing, err := rpm.Prepare(open(t, demo(t)), s.key, rpm.Options{})
		if err != nil {
			t.Fatal(err)
		}
		u, err := signing.Sign(&countingSigner{Signer: s.signer, fail: broken}, nil)
		wantError(t, err, broken)
		if u != nil {
			t.Error("an Update of a signer that failed")
		}
		u, err = signing.Sign(&countingSigner{Signer: s.signer, lie: true}, nil)
		wantError(t, err, openpgp.ErrSignerOutput)
		if u != nil {
			t.Error("an Update of a signer that lied")
		}
		foreign := &countingSigner{Signer: other().signer}
		_, err = signing.Sign(foreign, nil)
		if err == nil || foreign.asked != 0 {
			t.Errorf("another key: %v, asked %d times", err, foreign.asked)
		}
		_, err = signing.Finish(nil)
		if err == nil {
			t.Error("Finish without signatures")
		}
		u, err = signing.Sign(s.signer, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, err = open(t, apply(t, u, demo(t))).Verify(s.cert, true)
		if err != nil {
			t.Errorf("Verify: %v", err)
		}
	}
}

// A signer may be sent the bytes instead of the digest, and read in them what it signs.
func TestMessage(t *testing.T) {
	signing, err := rpm.Prepare(open(t, demo(t)), rsa2048().key, rpm.Options{Payload: true})
	if err != nil {
		t.Fatal(err)
	}
	r := signing.Requests()
	if len(r) != 2 || r[1].Message() != nil {
		t.Fatalf("%d requests, the second with a message of %d bytes", len(r), len(r[1].Message()))
	}
	h := r[0].Opts.HashFunc().New()
	h.Write(r[0].Message())
	if !bytes.Equal(h.Sum(nil), r[0].Digest) {
		t.Error("the digest is not that of the message")
	}
	got, rest, err := rpm.ParseHeader(r[0].Message())
	if err != nil {
		t.Fatal(err)
	}
	if len(rest) < 6 || len(rest) > 64 || rest[0] != 4 {
		t.Errorf("%d bytes after the header", len(rest))
	}
	want := rpm.NEVRA{Name: "demo", Epoch: 3, HasEpoch: true, Version: "1.2", Release: "4", Arch: "x86_64"}
	if diff := cmp.Diff(want, got.NEVRA); diff != "" {
		t.Error(diff)
	}
	if got.NEVRA.String() != "demo-3:1.2-4.x86_64" || got.Vendor != "Test Vendor" || got.Source || got.Format != 4 {
		t.Errorf("%s by %q, source %t, format %d", got.NEVRA, got.Vendor, got.Source, got.Format)
	}
}

func TestHeaders(t *testing.T) {
	all := corpus(t)
	tests := []struct {
		name   string
		want   string
		source bool
		format int
	}{
		{"source", "demo-3:1.2-4.src", true, 4},
		{"rpm3", "old-1-1.noarch", false, 3},
		{"zero-epoch-0.1-1.x86_64.rpm", "zero-epoch-0:0.1-1.x86_64", false, 4},
		{"empty-0.1-1.x86_64.rpm", "empty-0:0.1-1.x86_64", false, 4},
		{"simple-1.0.1-1.i386.rpm", "simple-1.0.1-1.i386", false, 4},
	}
	for _, tt := range tests {
		h := open(t, all[tt.name]).Header
		if h.NEVRA.String() != tt.want || h.Source != tt.source || h.Format != tt.format {
			t.Errorf("%s: got %s, source %t, format %d", tt.name, h.NEVRA, h.Source, h.Format)
		}
	}
}

func TestVerify(t *testing.T) {
	good := sign(t, demo(t), ed(), rpm.Options{})
	_, err := open(t, good).Verify(other().cert, true)
	wantError(t, err, openpgp.ErrBadSignature)
	_, err = open(t, demo(t)).Verify(ed().cert, true)
	wantError(t, err, rpm.ErrNotSigned)

	// A signature over text is not one over the header, though text and header may be alike.
	textSig, err := openpgp.NewSignature(ed().key, openpgp.SigText, openpgp.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	textSig.Write(bytes.ReplaceAll(open(t, good).Header.Bytes(), []byte("\n"), []byte("\r\n")))
	pkt, err := textSig.Finish(ed().signer)
	if err != nil {
		t.Fatal(err)
	}
	_, err = openpgp.VerifyDetached(ed().cert, bytes.NewReader(open(t, good).Header.Bytes()), bytes.NewReader(pkt))
	if err != nil {
		t.Fatalf("the signature over text: %v", err)
	}
	text := withSig(t, good, func(tags []tag) []tag {
		i := slices.IndexFunc(tags, func(e tag) bool { return e.tag == 267 })
		tags[i] = tag{267, 7, len(pkt), pkt}
		return tags
	})
	_, err = open(t, text).Verify(ed().cert, true)
	wantError(t, err, openpgp.ErrBadSignature)

	// Two signatures in one tag are one too many: rpm looks at the first.
	double := withSig(t, good, func(tags []tag) []tag {
		foreign, _ := sigTags(t, sign(t, demo(t), other(), rpm.Options{}))
		i := slices.IndexFunc(tags, func(e tag) bool { return e.tag == 267 })
		data := append(slices.Clip(foreign[i].data), tags[i].data...)
		tags[i] = tag{267, 7, len(data), data}
		return tags
	})
	_, err = open(t, double).Verify(ed().cert, true)
	wantError(t, err, rpm.ErrMalformed)

	// The list of tag 278 decides where there is one: that in 267 is good, and counts for nothing.
	list := func(b []byte) tag {
		tags, _ := sigTags(t, b)
		i := slices.IndexFunc(tags, func(e tag) bool { return e.tag == 278 })
		return tags[i]
	}
	foreign := list(sign(t, demo(t), other(), rpm.Options{OpenPGP: true}))
	with := func(extra tag) []byte {
		return withSig(t, good, func(tags []tag) []tag {
			i := slices.IndexFunc(tags, func(e tag) bool { return e.tag > 278 })
			return slices.Insert(tags, i, extra)
		})
	}
	_, err = open(t, with(foreign)).Verify(ed().cert, true)
	wantError(t, err, openpgp.ErrBadSignature)
	mine := list(sign(t, demo(t), ed(), rpm.Options{OpenPGP: true}))
	both := tag{278, 8, 2, append(slices.Clip(foreign.data), mine.data...)}
	got, err := open(t, with(both)).Verify(ed().cert, true)
	if err != nil || len(got) != 1 || got[0].Tag != 278 || got[0].Info.Primary != ed().cert.Fingerprint() {
		t.Errorf("one of two signers: %v, %+v", err, got)
	}
	// And signing takes all of them away.
	again := sign(t, with(both), rsa2048(), rpm.Options{})
	sigs, err := open(t, again).Signatures()
	if err != nil || len(sigs) != 1 || sigs[0].Tag != 268 || sigs[0].Key != rsa2048().key.Fingerprint {
		t.Errorf("signed again: %v, %+v", err, sigs)
	}

	// Without a digest of the payload, a signature over the header is not one over the package.
	old := sign(t, corpus(t)["simple-1.0.1-1.i386.rpm"], ed(), rpm.Options{})
	_, err = open(t, old).Verify(ed().cert, false)
	wantError(t, err, rpm.ErrNotSigned)
	bare := withSig(t, old, func(tags []tag) []tag {
		return slices.DeleteFunc(tags, func(e tag) bool { return e.tag == 1005 })
	})
	_, err = open(t, bare).Verify(ed().cert, true)
	wantError(t, err, rpm.ErrNotSigned)
	tampered := bytes.Clone(good)
	tampered[len(tampered)-1] ^= 1
	_, err = open(t, tampered).Verify(ed().cert, true)
	wantError(t, err, rpm.ErrDigest)
}

// A version 6 package: no tag over 999, the signature in tag 278.
func TestVersion6(t *testing.T) {
	payload := []byte("payload")
	sum := sha512.Sum512(payload)
	main := header(63, str(1000, "six"), str(1001, "1"), str(1002, "1"), str(1022, "noarch"), str(1044, "six-1-1.src.rpm"),
		num(5114, 6), str(5121, hexOf(sum[:])))
	plain := pack(header(62, str(273, sha256Hex(main)), tag{999, 7, 2000, make([]byte, 2000)}), main, payload)
	b := sign(t, plain, rsa2048(), rpm.Options{})
	tags, _ := sigTags(t, b)
	var got []uint32
	for _, e := range tags {
		got = append(got, e.tag)
	}
	if diff := cmp.Diff([]uint32{273, 278, 999}, got); diff != "" {
		t.Error(diff)
	}
	if len(b) != len(plain) {
		t.Errorf("the package has %d bytes, had %d", len(b), len(plain))
	}
	_, err := open(t, b).Verify(rsa2048().cert, true)
	if err != nil {
		t.Errorf("Verify: %v", err)
	}
	if !bytes.Equal(remove(t, b, false), plain) {
		t.Error("deleted, the package is not what it was")
	}
	b = sign(t, b, rsa2048(), rpm.Options{Legacy: true})
	if tags, _ := sigTags(t, b); !hasTag(tags, 268) || !hasTag(tags, 278) {
		t.Error("no legacy signature")
	}
	_, _, err = trySign(plain, rsa2048(), rpm.Options{Payload: true})
	wantError(t, err, rpm.ErrUnsupported)
	_, _, err = trySign(pack(header(62, str(273, sha256Hex(main)), num(1000, uint32(len(main)+len(payload)))), main, payload),
		rsa2048(), rpm.Options{})
	wantError(t, err, rpm.ErrMalformed)
}
