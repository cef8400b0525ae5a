//go:build chaos || soak

package softhsm_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/signwarden/signwarden/hsm/worker"
)

// workers are the processes of the gateway that sign.
func (f *faultGateway) workers(t testing.TB) []int {
	t.Helper()
	var pids []int
	for _, line := range strings.Fields(runEnv(t, os.Environ(), "pgrep", "-P", fmt.Sprint(f.cmd.Process.Pid), "-f", worker.Command).stdout) {
		var pid int
		if _, err := fmt.Sscan(line, &pid); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
