package hsm

import "github.com/miekg/pkcs11"

// api is what this package calls of a PKCS#11 module. *pkcs11.Ctx is the only
// implementation in the product; tests put a counter and injected CK_RV codes
// in front of the real module. A session handle is used by one goroutine at a
// time; everything else is safe for concurrent use (CKF_OS_LOCKING_OK).
type api interface {
	GetInfo() (pkcs11.Info, error)
	GetSlotList(tokenPresent bool) ([]uint, error)
	GetTokenInfo(slot uint) (pkcs11.TokenInfo, error)
	GetMechanismInfo(slot uint, m []*pkcs11.Mechanism) (pkcs11.MechanismInfo, error)

	OpenSession(slot uint, flags uint) (pkcs11.SessionHandle, error)
	CloseSession(sh pkcs11.SessionHandle) error
	GetSessionInfo(sh pkcs11.SessionHandle) (pkcs11.SessionInfo, error)
	Login(sh pkcs11.SessionHandle, user uint, pin string) error

	FindObjectsInit(sh pkcs11.SessionHandle, t []*pkcs11.Attribute) error
	FindObjects(sh pkcs11.SessionHandle, max int) ([]pkcs11.ObjectHandle, bool, error)
	FindObjectsFinal(sh pkcs11.SessionHandle) error
	GetAttributeValue(sh pkcs11.SessionHandle, o pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error)

	SignInit(sh pkcs11.SessionHandle, m []*pkcs11.Mechanism, o pkcs11.ObjectHandle) error
	Sign(sh pkcs11.SessionHandle, message []byte) ([]byte, error)
	GenerateRandom(sh pkcs11.SessionHandle, n int) ([]byte, error)

	GenerateKeyPair(sh pkcs11.SessionHandle, m []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error)
	CreateObject(sh pkcs11.SessionHandle, t []*pkcs11.Attribute) (pkcs11.ObjectHandle, error)
	DestroyObject(sh pkcs11.SessionHandle, o pkcs11.ObjectHandle) error

	InitToken(slot uint, pin string, label string) error
	InitPIN(sh pkcs11.SessionHandle, pin string) error
}

// PKCS#11 3.0 values that miekg/pkcs11 v1.1.2, which speaks 2.40, lacks.
const (
	ckmEdDSA               = 0x1057 // CKM_EDDSA
	ckmECEdwardsKeyPairGen = 0x1055 // CKM_EC_EDWARDS_KEY_PAIR_GEN
	ckkECEdwards           = 0x40   // CKK_EC_EDWARDS
)

// Session states in which the user is logged in; miekg/pkcs11 has no names
// for them (PKCS#11 2.40, 3.2, CK_STATE).
const (
	cksROUser = 1 // CKS_RO_USER_FUNCTIONS
	cksRWUser = 3 // CKS_RW_USER_FUNCTIONS
)
