package rpm

// Tags of the signature header (format_v4.md, format_v6.md, and rpm's include/rpm/rpmtag.h where those err: the table of
// format_v4.md has SHA256 as 272).
const (
	tagSigRegion     = 62
	tagDSA           = 267 // signature over the header by any algorithm but RSA
	tagRSA           = 268 // signature over the header by RSA
	tagSHA1          = 269
	tagLongSize      = 270
	tagSHA256        = 273
	tagFileSigs      = 274 // IMA signatures, one hexadecimal string a file
	tagFileSigLength = 275
	tagOpenPGP       = 278 // list of signatures in base64; where it is, rpm 6 ignores 267 and 268
	tagSHA3          = 279
	tagReservedV6    = 999
	tagSize          = 1000
	tagPGP           = 1002 // signature over header and payload by RSA
	tagMD5           = 1004
	tagGPG           = 1005 // signature over header and payload by any other algorithm
	tagPGP5          = 1006 // of PGP 5, which nothing reads
	tagReserved      = 1008
)

// Tags of the main header (tags.md).
const (
	tagHeaderImage     = 61 // a region tag of rpm before 4.0.2
	tagImmutable       = 63
	tagName            = 1000
	tagVersion         = 1001
	tagRelease         = 1002
	tagEpoch           = 1003
	tagVendor          = 1011
	tagArch            = 1022
	tagFileDigests     = 1035
	tagSourceRPM       = 1044 // what source a binary package is of; source packages have none
	tagNoSource        = 1051
	tagNoPatch         = 1052
	tagBaseNames       = 1117
	tagFileDigestAlgo  = 5011
	tagPayloadDigest   = 5092
	tagPayloadAlgo     = 5093
	tagPayloadAlt      = 5097 // of the payload before compression
	tagPayloadSize     = 5112
	tagPayloadSizeAlt  = 5113
	tagFormat          = 5114
	tagPayloadSHA512   = 5121
	tagPayloadSHA512A  = 5122
	tagPayloadSHA3     = 5123
	tagPayloadSHA3Alt  = 5124
	firstOrdinaryTag   = 100 // HEADERI18NTABLE; regions have smaller numbers
	fileDigestAlgoSHA2 = 8   // OpenPGP's number of SHA-256
)

// A dataType is the type of an index entry's data (format_header.md, "Index").
type dataType uint32

const (
	typeChar        dataType = 1
	typeInt8        dataType = 2
	typeInt16       dataType = 3
	typeInt32       dataType = 4
	typeInt64       dataType = 5
	typeString      dataType = 6
	typeBin         dataType = 7
	typeStringArray dataType = 8
	typeI18N        dataType = 9
)

// width is the size of one value, which is its alignment too; zero for strings and for types that do not exist.
func (t dataType) width() int64 {
	switch t {
	case typeChar, typeInt8, typeBin:
		return 1
	case typeInt16:
		return 2
	case typeInt32:
		return 4
	case typeInt64:
		return 8
	}
	return 0
}

// isString says whether values end with a NUL.
func (t dataType) isString() bool { return t == typeString || t == typeStringArray || t == typeI18N }
