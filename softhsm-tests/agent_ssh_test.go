package softhsm_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// sshHost is an sshd on loopback that plays a build host, and a client's way to it.
type sshHost struct {
	dir, config string
}

// newSSHHost starts sshd, with the one setting that forwarding sockets needs.
func newSSHHost(t testing.TB) *sshHost {
	t.Helper()
	h := &sshHost{dir: shortDir(t)}
	for _, key := range []string{"host", "user"} {
		mustEnv(t, os.Environ(), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(h.dir, key))
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // of sshd's privilege separation
		t.Fatalf("this test wants root: %v", err)
	}
	address := freeAddress(t)
	host, port, _ := strings.Cut(address, ":")
	writeFile(t, filepath.Join(h.dir, "sshd_config"), fmt.Sprintf(`ListenAddress %s
Port %s
HostKey %s/host
AuthorizedKeysFile %s/user.pub %s/authorized
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
PidFile none
StreamLocalBindUnlink yes
`, host, port, h.dir, h.dir, h.dir))
	h.config = filepath.Join(h.dir, "ssh_config")
	writeFile(t, h.config, fmt.Sprintf(`Host build
  HostName %s
  Port %s
  User root
  IdentityFile %s/user
  IdentitiesOnly yes
  UserKnownHostsFile %s/known_hosts
  StrictHostKeyChecking accept-new
  BatchMode yes
  ExitOnForwardFailure yes
`, host, port, h.dir, h.dir))
	background(t, os.Environ(), "/usr/sbin/sshd", "-D", "-e", "-f", filepath.Join(h.dir, "sshd_config"))
	waitFor(t, "sshd listens", func() bool {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return h
}

// forward brings a session up that forwards remote to local, until it is stopped.
func (h *sshHost) forward(t testing.TB, remote, local string) *process {
	t.Helper()
	p := background(t, os.Environ(), "ssh", "-F", h.config, "-R", remote+":"+local, "build", "echo up; exec cat")
	p.await(t, "up")
	return p
}

// gpg on a build host signs through a socket that sshd forwards: it works, says so
// when the connection is down, works again when it is forwarded anew to the same path;
// and two jobs with a path each do not meet.
func TestAgentForwarded(t *testing.T) {
	g := newGateway(t)
	g.key(t, "rel", "ed25519")
	g.key(t, "nightly", "rsa2048")
	host := newSSHHost(t)
	local := shortDir(t)
	relSocket, nightlySocket := filepath.Join(local, "rel"), filepath.Join(local, "nightly")
	g.agentAt(t, relSocket, "--keys", "rel")
	nightly := g.agentAt(t, nightlySocket, "--keys", "nightly", "--signatures", "3")

	file := filepath.Join(host.dir, "file")
	writeFile(t, file, "text")
	sig := filepath.Join(host.dir, "sig")
	// The build host is this one: gpg there needs no shell through ssh, only the socket.
	sign := func(home []string, key string) result {
		t.Helper()
		return gpgTry(t, home, "-u", key+"@example.org", "-o", sig, "--detach-sign", file)
	}
	verify := g.verifier(t, "rel", "nightly")
	mustSign := func(home []string, key string) {
		t.Helper()
		if r := sign(home, key); r.code != 0 {
			t.Fatalf("with %s: exit code %d:\n%s%s", key, r.code, r.stdout, r.stderr)
		}
		mustEnv(t, verify, "gpg", "--batch", "--verify", sig, file)
	}

	one, oneSocket := g.home(t, "rel", "nightly")
	session := host.forward(t, oneSocket, relSocket)
	mustSign(one, "rel")
	sign(one, "nightly").failure(t, 17, "No secret key") // of the other socket

	// The connection drops. The socket's file stays, and nobody listens.
	session.stop(unix.SIGKILL)
	waitFor(t, "gpg is told", func() bool { return strings.Contains(sign(one, "rel").stderr, "No agent running") })
	if _, err := os.Lstat(oneSocket); err != nil {
		t.Fatalf("sshd has removed the socket's file, so this does not test what it says: %v", err)
	}
	again := host.forward(t, oneSocket, relSocket)
	mustSign(one, "rel")

	// A second job, at the same time, with a path and keys of its own.
	two, twoSocket := g.home(t, "rel", "nightly")
	other := host.forward(t, twoSocket, nightlySocket)
	mustSign(two, "nightly")
	mustSign(one, "rel")
	sign(two, "rel").failure(t, 17, "No secret key")
	again.stop(unix.SIGTERM)
	mustSign(two, "nightly") // the end of one is not the other's
	mustSign(two, "nightly")
	sign(two, "nightly").failure(t, 67108897, "Resources exhausted")
	nightly.await(t, "the signatures of this socket are spent")
	other.stop(unix.SIGTERM)

	// The job of docs/OPERATING.md, command for command: a path that does not depend on
	// /run/user, and a file at gpg's own that leads there.
	jobSocket := filepath.Join(local, "17", "S")
	job := g.agentAt(t, jobSocket, "--keys", "nightly", "--lifetime", "1h", "--signatures", "1")
	script := `set -eu
ssh() { command ssh -F "$config" "$@"; }
run=` + filepath.Dir(jobSocket) + ` job=17
far=$(ssh build "umask 077; cd ` + host.dir + `; mkdir -p jobs/$job; cd jobs/$job; echo no-autostart >gpg.conf; pwd")
signwarden key export nightly | ssh build "GNUPGHOME=$far gpg --batch --quiet --import"
ssh -R "$far/S:$run/S" build "
    export GNUPGHOME=$far
    gpgconf --create-socketdir 2>/dev/null
    printf '%%Assuan%%\\nsocket=$far/S\\n' >\"\$(gpgconf --list-dirs agent-socket)\"
    gpg --batch --yes -u nightly@example.org -o ` + sig + ` --detach-sign ` + file + `"
`
	if r := runEnv(t, append(g.env, "config="+host.config), "sh", "-c", script); r.code != 0 {
		t.Fatalf("the job of the manual: exit code %d:\n%s%s\n%s", r.code, r.stdout, r.stderr, job.log)
	}
	mustEnv(t, verify, "gpg", "--batch", "--verify", sig, file)

	// What the agent sees of a forwarded client is ssh.
	if !strings.Contains(nightly.log.String(), "peer.exe=/usr/bin/ssh") {
		t.Errorf("the log does not tell the peer:\n%s", nightly.log)
	}
}
