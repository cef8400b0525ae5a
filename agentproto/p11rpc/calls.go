package p11rpc

import "fmt"

// CallID is the number that a function of PKCS#11 has on the wire.
type CallID uint32

// The calls that somebody names. The rest are in the table only.
const (
	errorCall CallID = 0 // of a response that is an error

	Initialize        CallID = 1
	Finalize          CallID = 2
	GetInfo           CallID = 3
	GetSlotList       CallID = 4
	GetSlotInfo       CallID = 5
	GetTokenInfo      CallID = 6
	GetMechanismList  CallID = 7
	GetMechanismInfo  CallID = 8
	InitToken         CallID = 9
	OpenSession       CallID = 10
	CloseSession      CallID = 11
	CloseAllSessions  CallID = 12
	GetSessionInfo    CallID = 13
	Login             CallID = 18
	Logout            CallID = 19
	GetAttributeValue CallID = 24
	FindObjectsInit   CallID = 26
	FindObjects       CallID = 27
	FindObjectsFinal  CallID = 28
	SignInit          CallID = 42
	Sign              CallID = 43
	SignUpdate        CallID = 44
	SignFinal         CallID = 45
	SeedRandom        CallID = 63
	GenerateRandom    CallID = 64
	WaitForSlotEvent  CallID = 65
	InitToken2        CallID = 88
)

// call is what the wire says of a function: its name, and the signatures of its
// arguments and its results, a letter or two for each value (see Kind).
type call struct {
	name, request, response string
}

// calls are those of version 2. Versions 0 and 1 know fewer, and none of another
// signature.
var calls = map[CallID]call{
	errorCall:         {"ERROR", "", "u"},
	Initialize:        {"C_Initialize", "ayyay", ""},
	Finalize:          {"C_Finalize", "", ""},
	GetInfo:           {"C_GetInfo", "", "vsusv"},
	GetSlotList:       {"C_GetSlotList", "yfu", "au"},
	GetSlotInfo:       {"C_GetSlotInfo", "u", "ssuvv"},
	GetTokenInfo:      {"C_GetTokenInfo", "u", "ssssuuuuuuuuuuuvvs"},
	GetMechanismList:  {"C_GetMechanismList", "ufu", "au"},
	GetMechanismInfo:  {"C_GetMechanismInfo", "uu", "uuu"},
	InitToken:         {"C_InitToken", "uayz", ""},
	OpenSession:       {"C_OpenSession", "uu", "u"},
	CloseSession:      {"C_CloseSession", "u", ""},
	CloseAllSessions:  {"C_CloseAllSessions", "u", ""},
	GetSessionInfo:    {"C_GetSessionInfo", "u", "uuuu"},
	14:                {"C_InitPIN", "uay", ""},
	15:                {"C_SetPIN", "uayay", ""},
	16:                {"C_GetOperationState", "ufy", "ay"},
	17:                {"C_SetOperationState", "uayuu", ""},
	Login:             {"C_Login", "uuay", ""},
	Logout:            {"C_Logout", "u", ""},
	20:                {"C_CreateObject", "uaA", "u"},
	21:                {"C_CopyObject", "uuaA", "u"},
	22:                {"C_DestroyObject", "uu", ""},
	23:                {"C_GetObjectSize", "uu", "u"},
	GetAttributeValue: {"C_GetAttributeValue", "uufA", "aAu"},
	25:                {"C_SetAttributeValue", "uuaA", ""},
	FindObjectsInit:   {"C_FindObjectsInit", "uaA", ""},
	FindObjects:       {"C_FindObjects", "ufu", "au"},
	FindObjectsFinal:  {"C_FindObjectsFinal", "u", ""},
	29:                {"C_EncryptInit", "uMu", ""},
	30:                {"C_Encrypt", "uayfy", "ay"},
	31:                {"C_EncryptUpdate", "uayfy", "ay"},
	32:                {"C_EncryptFinal", "ufy", "ay"},
	33:                {"C_DecryptInit", "uMu", ""},
	34:                {"C_Decrypt", "uayfy", "ay"},
	35:                {"C_DecryptUpdate", "uayfy", "ay"},
	36:                {"C_DecryptFinal", "ufy", "ay"},
	37:                {"C_DigestInit", "uM", ""},
	38:                {"C_Digest", "uayfy", "ay"},
	39:                {"C_DigestUpdate", "uay", ""},
	40:                {"C_DigestKey", "uu", ""},
	41:                {"C_DigestFinal", "ufy", "ay"},
	SignInit:          {"C_SignInit", "uMu", ""},
	Sign:              {"C_Sign", "uayfy", "ay"},
	SignUpdate:        {"C_SignUpdate", "uay", ""},
	SignFinal:         {"C_SignFinal", "ufy", "ay"},
	46:                {"C_SignRecoverInit", "uMu", ""},
	47:                {"C_SignRecover", "uayfy", "ay"},
	48:                {"C_VerifyInit", "uMu", ""},
	49:                {"C_Verify", "uayay", ""},
	50:                {"C_VerifyUpdate", "uay", ""},
	51:                {"C_VerifyFinal", "uay", ""},
	52:                {"C_VerifyRecoverInit", "uMu", ""},
	53:                {"C_VerifyRecover", "uayfy", "ay"},
	54:                {"C_DigestEncryptUpdate", "uayfy", "ay"},
	55:                {"C_DecryptDigestUpdate", "uayfy", "ay"},
	56:                {"C_SignEncryptUpdate", "uayfy", "ay"},
	57:                {"C_DecryptVerifyUpdate", "uayfy", "ay"},
	58:                {"C_GenerateKey", "uMaA", "u"},
	59:                {"C_GenerateKeyPair", "uMaAaA", "uu"},
	60:                {"C_WrapKey", "uMuufy", "ay"},
	61:                {"C_UnwrapKey", "uMuayaA", "u"},
	62:                {"C_DeriveKey", "uMuaA", "u"},
	SeedRandom:        {"C_SeedRandom", "uay", ""},
	GenerateRandom:    {"C_GenerateRandom", "ufy", "ay"},
	WaitForSlotEvent:  {"C_WaitForSlotEvent", "u", "u"},
	66:                {"C_LoginUser", "uuayay", ""},
	67:                {"C_SessionCancel", "uu", ""},
	68:                {"C_MessageEncryptInit", "uMu", ""},
	69:                {"C_EncryptMessage", "uayayayfy", "ay"},
	70:                {"C_EncryptMessageBegin", "uayay", ""},
	71:                {"C_EncryptMessageNext", "uayayfyu", "ay"},
	72:                {"C_MessageEncryptFinal", "u", ""},
	73:                {"C_MessageDecryptInit", "uMu", ""},
	74:                {"C_DecryptMessage", "uayayayfy", "ay"},
	75:                {"C_DecryptMessageBegin", "uayay", ""},
	76:                {"C_DecryptMessageNext", "uayayfyu", "ay"},
	77:                {"C_MessageDecryptFinal", "u", ""},
	78:                {"C_MessageSignInit", "uMu", ""},
	79:                {"C_SignMessage", "uayayfy", "ay"},
	80:                {"C_SignMessageBegin", "uay", ""},
	81:                {"C_SignMessageNext", "uayayyfy", "ay"},
	82:                {"C_MessageSignFinal", "u", ""},
	83:                {"C_MessageVerifyInit", "uMu", ""},
	84:                {"C_VerifyMessage", "uayayay", ""},
	85:                {"C_VerifyMessageBegin", "uay", ""},
	86:                {"C_VerifyMessageNext", "uayayay", ""},
	87:                {"C_MessageVerifyFinal", "u", ""},
	InitToken2:        {"C_InitToken2", "uays", ""},
	89:                {"C_DeriveKey2", "uMuaA", "uPu"},
}

// String is the name of the call in PKCS#11.
func (id CallID) String() string {
	c, ok := calls[id]
	if !ok {
		return fmt.Sprintf("call %d", uint32(id))
	}
	return c.name
}

// ofNoSession are the calls whose first argument is a number, and no session's.
var ofNoSession = map[CallID]bool{
	GetSlotInfo: true, GetTokenInfo: true, GetMechanismList: true, GetMechanismInfo: true, InitToken: true,
	OpenSession: true, CloseAllSessions: true, WaitForSlotEvent: true, InitToken2: true,
}

// sessionOf is the session that a request belongs to; 0, which is none, for a
// call of no session.
func sessionOf(id CallID, args []Value) uint64 {
	if ofNoSession[id] || len(args) == 0 || args[0].Kind != Ulong {
		return 0
	}
	return args[0].Num
}
