package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signwarden/signwarden/cmd/internal/exit"
)

const (
	firstPassed = 3  // SD_LISTEN_FDS_START
	maxPassed   = 64 // more than anybody has socket units for one service
)

// passedFiles are the descriptors that systemd passes to this process, by name:
// sd_listen_fds(3). Their variables are taken out of the environment, so that no child takes
// them for its own.
func passedFiles() (map[string]*os.File, error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(v)
	}
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, exit.Hint(exit.UsageError("--systemd: systemd passes no socket to this process (LISTEN_PID)"),
			"start it by its socket unit: systemctl --user start signwarden-agent.socket")
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 1 || n > maxPassed {
		return nil, exit.UsageError("--systemd: LISTEN_FDS is %q; 1 to %d sockets can be passed", count, maxPassed)
	}
	list := strings.Split(names, ":")
	if names == "" { // no FileDescriptorName anywhere, and an old systemd
		list = make([]string, n)
	}
	if len(list) != n {
		return nil, exit.UsageError("--systemd: LISTEN_FDNAMES has %d names for %d sockets", len(list), n)
	}
	files := map[string]*os.File{}
	for i, name := range list {
		fd := firstPassed + i
		unix.CloseOnExec(fd)
		if name == "" || name == "unknown" {
			name = "gpg"
		}
		if files[name] != nil {
			return nil, exit.UsageError("--systemd: two sockets are named %q: set FileDescriptorName in their units, like gpg and gpg-extra", name)
		}
		files[name] = os.NewFile(uintptr(fd), fmt.Sprintf("%s of systemd", name))
	}
	return files, nil
}
