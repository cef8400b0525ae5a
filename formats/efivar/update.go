package efivar

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"slices"
	"time"
	"unicode/utf16"

	"github.com/signwarden/signwarden/formats/cms"
)

// Options are the choices of one update.
type Options struct {
	Certificate *x509.Certificate   // of the signer; it is put into the signature
	Chain       []*x509.Certificate // put in too: what firmware needs between Certificate and the one in PK or KEK
	Hash        crypto.Hash         // zero: cms.DefaultHash. EDK2 before 2023 knows SHA-256 only

	// Time is when the update was made, to the second. Firmware refuses an update that replaces a variable and is
	// not later than the last one. Needed but for Appending, where no time is compared.
	Time time.Time

	Attributes uint32 // of the variable; zero: Replacing
}

// An Update is a parsed .auth file.
type Update struct {
	Time      time.Time // zero: none
	Signature []byte    // SignedData
	Data      []byte    // the new contents of the variable

	stamp [timeSize]byte
}

// Sizes of EFI_TIME (section 8.3) and WIN_CERTIFICATE_UEFI_GUID (section 32.2.4).
const (
	timeSize   = 16
	certHeader = 24
	revision2  = 0x0200
	typeGUID   = 0x0ef1 // WIN_CERT_TYPE_EFI_GUID
)

// typePKCS7 is EFI_CERT_TYPE_PKCS7_GUID (section 32.2.4).
var typePKCS7 = mustGUID("4aafd29d-68df-49ee-8aa9-347d375665a7")

// Sign makes an update of a variable. data are its new contents: signature lists as Marshal makes them, or none, which
// deletes the variable, or with Appending changes nothing.
func Sign(signer crypto.Signer, v Variable, data []byte, o Options) ([]byte, error) {
	err := cms.Holds(signer, o.Certificate)
	if err != nil {
		return nil, err
	}
	attributes := o.Attributes
	if attributes == 0 {
		attributes = Replacing
	}
	stamp, err := appendTime(nil, o.Time, attributes)
	if err != nil {
		return nil, err
	}
	err = checkData(v, data)
	if err != nil {
		return nil, err
	}
	signed, err := signedBytes(v, attributes, stamp, data)
	if err != nil {
		return nil, err
	}
	h := o.Hash
	if h == 0 {
		h, err = cms.DefaultHash(o.Certificate.PublicKey)
		if err != nil {
			return nil, err
		}
	}
	if !cms.Signs(h) {
		return nil, fmt.Errorf("%w: hash %v", cms.ErrUnsupported, h)
	}
	sig, err := cms.Sign(signer, sum(h, signed), cms.Options{ // section 8.2.2
		Certificate:  o.Certificate,
		Hash:         h,
		HashNULL:     true,
		Certificates: append([]*x509.Certificate{o.Certificate}, o.Chain...),
		Bare:         true,
	})
	if err != nil {
		return nil, err
	}
	// EDK2 takes a SignedData whose length has two octets, and looks for the hash behind it at offset 13.
	if len(sig) < 4 || sig[1] != 0x82 {
		return nil, fmt.Errorf("%w: signature of %d bytes, not 260 to 65539", ErrMalformed, len(sig))
	}
	b := binary.LittleEndian.AppendUint32(stamp, uint32(certHeader+len(sig)))
	b = binary.LittleEndian.AppendUint16(b, revision2)
	b = binary.LittleEndian.AppendUint16(b, typeGUID)
	b = append(b, typePKCS7[:]...)
	return slices.Concat(b, sig, data), nil
}

// checkData refuses contents that firmware would not take for the variable.
func checkData(v Variable, data []byte) error {
	lists, err := ParseLists(data)
	if err != nil {
		return err
	}
	if v == PK && len(lists) > 0 && (len(lists) != 1 || lists[0].Type != TypeX509 || len(lists[0].Entries) != 1) { // section 32.3.1: one key
		return fmt.Errorf("%w: PK is one certificate, or none", ErrMalformed)
	}
	return nil
}

// signedBytes are what the signature covers (section 8.2.2): the name without its zero at the end, the vendor, the
// attributes, the time, the contents.
func signedBytes(v Variable, attributes uint32, stamp, data []byte) ([]byte, error) {
	err := checkAttributes(attributes)
	if err != nil {
		return nil, err
	}
	if v.Name == "" || len(v.Name) > 512 {
		return nil, fmt.Errorf("%w: variable name %q", ErrMalformed, v.Name)
	}
	var b []byte
	for _, c := range utf16.Encode([]rune(v.Name)) {
		b = binary.LittleEndian.AppendUint16(b, c)
	}
	b = append(b, v.Vendor[:]...)
	b = binary.LittleEndian.AppendUint32(b, attributes)
	return slices.Concat(b, stamp, data), nil
}

// appendTime adds an EFI_TIME. Section 8.2.2: all but the date and the time of day, in UTC, is zero. So is all of it
// where no time is compared and none given, as sign-efi-sig-list has it.
func appendTime(b []byte, t time.Time, attributes uint32) ([]byte, error) {
	if t.IsZero() && attributes&AppendWrite != 0 {
		return append(b, make([]byte, timeSize)...), nil
	}
	t = t.UTC()
	if t.Year() < 1900 || t.Year() > 9999 { // section 8.3
		return nil, fmt.Errorf("%w: time %s", ErrMalformed, t.Format(time.RFC3339))
	}
	b = binary.LittleEndian.AppendUint16(b, uint16(t.Year()))
	b = append(b, byte(t.Month()), byte(t.Day()), byte(t.Hour()), byte(t.Minute()), byte(t.Second()))
	return append(b, make([]byte, 9)...), nil
}

// parseTime reads an EFI_TIME in the form that appendTime writes. sbvarsign 0.9.4 and its kind count months from zero,
// which is another month than meant, and in January none: that is no reason to refuse it, as EDK2 does not.
func parseTime(b []byte) (time.Time, error) {
	for _, c := range b[7:timeSize] {
		if c != 0 {
			return time.Time{}, fmt.Errorf("%w: time % x has more than a date and a time of day", ErrMalformed, b)
		}
	}
	if [7]byte(b) == [7]byte{} {
		return time.Time{}, nil
	}
	return time.Date(int(binary.LittleEndian.Uint16(b)), time.Month(b[2]), int(b[3]), int(b[4]), int(b[5]), int(b[6]), 0, time.UTC), nil
}

// MaxUpdate bounds what Parse takes, in bytes.
const MaxUpdate = timeSize + certHeader + cms.MaxSize + maxData

// Parse reads an update. Whether its contents are signature lists only Update.Lists says.
func Parse(b []byte) (*Update, error) {
	if len(b) > MaxUpdate || len(b) < timeSize+certHeader {
		return nil, fmt.Errorf("%w: update of %d bytes", ErrMalformed, len(b))
	}
	t, err := parseTime(b[:timeSize])
	if err != nil {
		return nil, err
	}
	cert := b[timeSize:]
	n := uint64(binary.LittleEndian.Uint32(cert))
	if n <= certHeader || n > uint64(len(cert)) || binary.LittleEndian.Uint16(cert[4:]) != revision2 ||
		binary.LittleEndian.Uint16(cert[6:]) != typeGUID || GUID(cert[8:24]) != typePKCS7 {
		return nil, fmt.Errorf("%w: authentication descriptor of %d bytes in %d", ErrMalformed, n, len(cert))
	}
	if uint64(len(cert))-n > maxData {
		return nil, fmt.Errorf("%w: contents of %d bytes, over %d", ErrMalformed, uint64(len(cert))-n, maxData)
	}
	return &Update{
		Time:      t,
		Signature: bytes.Clone(cert[certHeader:n]),
		Data:      bytes.Clone(cert[n:]),
		stamp:     [timeSize]byte(b),
	}, nil
}

// Lists returns the signature lists that are the new contents; none deletes the variable.
func (u *Update) Lists() ([]List, error) { return ParseLists(u.Data) }

// Verify checks that the update is of that variable with those attributes, of which the file says nothing, and signed
// by one of the trusted certificates, as cms.SignedData.Verify says. The contents of a variable of Secure Boot must be
// signature lists; what others hold is their vendor's to say.
func (u *Update) Verify(v Variable, attributes uint32, trusted []*x509.Certificate) ([]cms.Signer, error) {
	if v.Vendor == securityDatabase || v == PK || v == KEK {
		err := checkData(v, u.Data)
		if err != nil {
			return nil, err
		}
	}
	signed, err := signedBytes(v, attributes, u.stamp[:], u.Data)
	if err != nil {
		return nil, err
	}
	s, err := cms.Parse(u.Signature)
	if err != nil {
		return nil, err
	}
	if s.Content != nil {
		return nil, fmt.Errorf("%w: the signature has contents of its own", ErrMalformed)
	}
	return s.Verify(func(h crypto.Hash) ([]byte, error) { return sum(h, signed), nil }, trusted)
}

func sum(h crypto.Hash, b []byte) []byte {
	w := h.New()
	w.Write(b)
	return w.Sum(nil)
}
