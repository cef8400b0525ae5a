package worker_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/signwarden/signwarden/hsm"
	"github.com/signwarden/signwarden/hsm/worker"
)

const parentCommand = "test-parent"

// parent is a program that opens the token it reads about, says which workers
// it has, and waits.
func parent() int {
	var c struct {
		Label string
		Env   map[string]string
	}
	if err := json.NewDecoder(os.Stdin).Decode(&c); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	tok, err := worker.Open(context.Background(), worker.Config{Module: softhsm, Env: c.Env, TokenLabel: c.Label, PIN: hsm.NewPIN(userPIN), Workers: 1})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(tok.Workers()[0].PID)
	select {}
}

// Children end with the parent that is killed, the hung ones too.
func TestParentKilled(t *testing.T) {
	c := newToken(t)
	for _, hung := range []bool{false, true} {
		cmd := exec.Command("/proc/self/exe", parentCommand)
		in, err := json.Marshal(map[string]any{"Label": c.TokenLabel, "Env": c.Env})
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdin, cmd.Stderr = strings.NewReader(string(in)), os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var child int
		line, err := bufio.NewReader(out).ReadString('\n')
		if _, serr := fmt.Sscan(line, &child); err != nil || serr != nil {
			t.Fatalf("%v, %v", err, serr)
		}
		// Signals to a whole service or terminal are the parent's business.
		for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
			if err := syscall.Kill(child, s); err != nil {
				t.Errorf("%v: %v", s, err)
			}
		}
		if hung {
			if err := syscall.Kill(child, syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
		}
		if err := syscall.Kill(child, 0); err != nil {
			t.Errorf("the worker is gone before its parent: %v", err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		until(t, "the worker is gone", func() bool {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", child))
			// In a container nobody may reap it.
			return errors.Is(err, os.ErrNotExist) || strings.Contains(string(b), ") Z ")
		})
	}
}

// Main is no command for people.
func TestMainByHand(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", worker.Command)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), "started by signwardend") {
		t.Errorf("%v: %s", err, out)
	}
}
