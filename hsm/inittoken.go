package hsm

import (
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"
)

// maxLabel is the width of CK_TOKEN_INFO.label.
const maxLabel = 32

// InitToken initialises a token in the first slot without one and sets its
// user PIN. For development tokens of SoftHSM, which always shows one such
// slot; an HSM's own tools do this for an HSM. A label that is taken is
// refused: [Open] finds a token by it.
func InitToken(path string, env map[string]string, label string, soPIN, userPIN PIN) (err error) {
	if label == "" || len(label) > maxLabel || strings.TrimSpace(label) != label {
		return fmt.Errorf("token label %q: 1 to %d bytes, with no space at its ends", label, maxLabel)
	}
	if soPIN.Reveal() == "" || userPIN.Reveal() == "" {
		return fmt.Errorf("initialising token %q: %w", label, errNoPIN)
	}
	m, err := acquire(path, env)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.release()) }()
	m.admin <- struct{}{}
	defer func() { <-m.admin }()

	slot, err := freeSlot(m.ctx, label)
	if err != nil {
		return fmt.Errorf("initialising token %q: %w", label, err)
	}
	if err := m.ctx.InitToken(slot, soPIN.Reveal(), label); err != nil {
		return fmt.Errorf("initialising token %q: %w", label, fail("C_InitToken", err))
	}
	if err := initPIN(m.ctx, slot, soPIN, userPIN); err != nil {
		return fmt.Errorf("token %q is initialised but has no user PIN: set it with the SO PIN (pkcs11-tool --init-pin), or remove the token: %w", label, err)
	}
	return nil
}

func freeSlot(a api, label string) (uint, error) {
	slots, err := a.GetSlotList(true)
	if err != nil {
		return 0, fail("C_GetSlotList", err)
	}
	free, found := uint(0), false
	for _, slot := range slots {
		t, err := a.GetTokenInfo(slot)
		if err != nil {
			continue
		}
		if t.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 {
			if strings.TrimRight(t.Label, "\x00 ") == label {
				return 0, fmt.Errorf("label: %w", ErrExists)
			}
		} else if !found {
			free, found = slot, true
		}
	}
	if !found {
		return 0, errors.New("the module has no slot with an uninitialised token")
	}
	return free, nil
}

func initPIN(a api, slot uint, soPIN, userPIN PIN) error {
	sh, err := a.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fail("C_OpenSession", err)
	}
	// The SO's login ends with this session, the only one on the new token.
	defer a.CloseSession(sh)
	if err := a.Login(sh, pkcs11.CKU_SO, soPIN.Reveal()); err != nil {
		return fail("C_Login", err)
	}
	return fail("C_InitPIN", a.InitPIN(sh, userPIN.Reveal()))
}
