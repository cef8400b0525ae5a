//go:build linux

package rpm

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// accessList is the attribute of an access control list.
const accessList = "system.posix_acl_access"

// staleAttributes are about a file's bytes, which are others now.
var staleAttributes = []string{"security.ima", "security.evm"}

// keepAttributes gives out the owner, mode and extended attributes of f. Only with must it fails if it may not.
func keepAttributes(out, f *os.File, must bool) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	err = allowed(out.Chown(int(st.Uid), int(st.Gid)), must)
	if err != nil {
		return fmt.Errorf("keeping the owner: %w", err)
	}
	err = out.Chmod(info.Mode()) // after the owner: a change of that takes setuid bits away
	if err != nil {
		return fmt.Errorf("keeping the mode: %w", err)
	}
	names, err := listAttributes(f)
	if err != nil {
		return fmt.Errorf("reading extended attributes: %w", err)
	}
	// What a directory gives to new files, and this one did not have, would open it to others.
	if !slices.Contains(names, accessList) {
		err = unix.Fremovexattr(int(out.Fd()), accessList)
		if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("removing the inherited access list: %w", err)
		}
		err = out.Chmod(info.Mode()) // of which it was a part
		if err != nil {
			return fmt.Errorf("keeping the mode: %w", err)
		}
	}
	for _, name := range names {
		if slices.Contains(staleAttributes, name) {
			continue
		}
		err = allowed(copyAttribute(out, f, name), must)
		if err != nil {
			return fmt.Errorf("keeping extended attribute %q: %w", name, err)
		}
	}
	return nil
}

// allowed forgives a lack of privilege, or of a feature of the file system, unless must.
func allowed(err error, must bool) error {
	if !must && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOTSUP)) {
		return nil
	}
	return err
}

// maxAttribute is the most that Linux has in one attribute, and in the list of their names (XATTR_SIZE_MAX).
const maxAttribute = 64 << 10

func listAttributes(f *os.File) ([]string, error) {
	b := make([]byte, maxAttribute)
	n, err := unix.Flistxattr(int(f.Fd()), b)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return strings.FieldsFunc(string(b[:n]), func(r rune) bool { return r == 0 }), nil
}

func copyAttribute(out, f *os.File, name string) error {
	b := make([]byte, maxAttribute)
	n, err := unix.Fgetxattr(int(f.Fd()), name, b)
	if err != nil {
		return err
	}
	// It may be there already: a label that the system gives to new files.
	have := make([]byte, maxAttribute)
	m, err := unix.Fgetxattr(int(out.Fd()), name, have)
	if err == nil && string(have[:m]) == string(b[:n]) {
		return nil
	}
	return unix.Fsetxattr(int(out.Fd()), name, b[:n], 0)
}
