package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/gateway/client"
)

// p11Record is the file in our configuration directory that says what setup --p11 made.
const p11Record = "p11-setup.json"

// p11Setup is one run of agent setup --p11. A file is noted with its sum before it is made:
// one that is there and has no sum of ours is somebody else's.
type p11Setup struct {
	a    *app
	dir  string // of our configuration
	done struct {
		Files map[string][]string `json:"files"` // path to the SHA-256 of what was written there
		Dirs  []string            `json:"dirs,omitempty"`
	}
}

// p11File is a file that setup --p11 makes.
type p11File struct {
	path, text, what string
}

func (a *app) openP11Setup() (*p11Setup, error) {
	conf, err := os.UserConfigDir()
	if err != nil {
		return nil, exit.Hint(err, "set HOME")
	}
	s := &p11Setup{a: a, dir: filepath.Join(conf, "signwarden")}
	if err := readRecord(filepath.Join(s.dir, p11Record), &s.done); err != nil {
		return nil, err
	}
	if s.done.Files == nil { // as a record may say
		s.done.Files = map[string][]string{}
	}
	return s, nil
}

func (s *p11Setup) say(format string, args ...any) { s.a.say("signwarden: "+format, args...) }

// moduleFile is where p11-kit looks for the modules of a user; as root it looks at the
// system's alone (seen with 0.24.1).
func moduleFile() (string, error) {
	if os.Getuid() == 0 {
		return "/etc/pkcs11/modules/signwarden.module", nil
	}
	conf, err := os.UserConfigDir()
	return filepath.Join(conf, "pkcs11", "modules", "signwarden.module"), err
}

// files are those to be made on this host; what is not installed is told, and has none.
func (s *p11Setup) files() ([]p11File, error) {
	path, err := moduleFile()
	if err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	profile, err := s.a.profilePath()
	if err == nil {
		profile, err = filepath.Abs(profile)
	}
	if err != nil {
		return nil, err
	}
	if strings.ContainsAny(program+profile, " \t\n\"'\\") {
		return nil, exit.Hint(fmt.Errorf("p11-kit cannot be told to run %q with the profile %q", program, profile), "put them at paths without blanks and quotes")
	}
	out := []p11File{{path, "# Made by signwarden agent setup --p11, which takes it back with --remove.\nremote: |" + program + " p11 --stdio --profile " + profile + "\n", "p11-kit's module file"}}
	module := p11Module()
	if module == "" {
		s.say("p11-kit-client.so is not installed, so OpenSSL gets no configuration: %s", installModule)
		return out, nil
	}
	// What is on top of our own files is not what they go on top of.
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "OPENSSL_CONF="+s.dir+"/") })
	engine, provider, err := opensslConfs(module, env)
	if err != nil {
		return nil, err
	}
	for _, f := range []struct{ name, what, missing, text string }{
		{"openssl-engine.cnf", "OpenSSL with libp11's engine", "libengine-pkcs11-openssl, or Fedora's openssl-pkcs11", string(engine)},
		{"openssl-provider.cnf", "OpenSSL with pkcs11-provider", "pkcs11-provider", string(provider)},
	} {
		if f.text == "" {
			s.say("note: no %s: it is not installed (%s), or the configuration cannot be added to", f.name, f.missing)
			continue
		}
		out = append(out, p11File{filepath.Join(s.dir, f.name), f.text, f.what})
	}
	return out, nil
}

func (s *p11Setup) run(ctx context.Context, c *client.Client) error {
	all, err := c.Keys(ctx) // first: without a gateway nothing is begun
	if err != nil {
		return err
	}
	files, err := s.files()
	if err != nil {
		return err
	}
	for _, f := range files {
		if _, err := s.ours(f.path); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := s.make(f); err != nil {
			return err
		}
	}
	s.tell(files)
	for _, k := range all {
		if !k.MaySign || needP11(k) != "" {
			continue
		}
		s.say("key %s: 'pkcs11:token=signwarden;object=%s;type=private'; each tool's command line: signwarden key show %s --howto", k.Name, k.Name, k.Name)
	}
	return nil
}

func (s *p11Setup) tell(files []p11File) {
	s.say("programs of p11-kit find the token now: p11tool --list-all pkcs11:token=signwarden")
	for _, f := range files[1:] {
		s.say("%s: export OPENSSL_CONF=%s, while `signwarden agent --p11-socket auto` runs", f.what, f.path)
	}
}

// ours tells whether a file is there; one that we have not made is an error.
func (s *p11Setup) ours(path string) (bool, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !slices.Contains(s.done.Files[path], sumOf(text)) {
		return true, exit.Hint(fmt.Errorf("%s is not as setup made it, or was there before; it stays as it is, and nothing was done", path), "move it away, or edit it yourself: see `signwarden p11 --help`")
	}
	return true, nil
}

func sumOf(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// make writes one file, whole or not at all, where none of somebody else's is.
func (s *p11Setup) make(f p11File) (err error) {
	there, err := s.ours(f.path)
	if err != nil {
		return err
	}
	if now, err := os.ReadFile(f.path); err == nil && string(now) == f.text {
		return nil
	}
	if sum := sumOf([]byte(f.text)); !slices.Contains(s.done.Files[f.path], sum) {
		s.done.Files[f.path] = append(s.done.Files[f.path], sum)
	}
	if err := s.mkdir(filepath.Dir(f.path)); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(f.path), ".signwarden-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeIfThere(tmp.Name())) }()
	_, err = tmp.WriteString(f.text)
	if err := errors.Join(err, tmp.Chmod(0o644), tmp.Close()); err != nil {
		return err
	}
	if there {
		err = os.Rename(tmp.Name(), f.path)
	} else {
		err = os.Link(tmp.Name(), f.path) // unlike a rename, never over a file that came meanwhile
	}
	if err == nil {
		s.say("%s: made, %s", f.path, f.what)
	}
	return err
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mkdir makes a directory and what is missing above it, and notes that and what is about to
// be made.
func (s *p11Setup) mkdir(dir string) error {
	for _, d := range []string{s.dir, dir} {
		var missing []string
		for ; d != "/"; d = filepath.Dir(d) {
			if _, err := os.Lstat(d); !errors.Is(err, fs.ErrNotExist) {
				break
			}
			missing = append(missing, d)
		}
		s.done.Dirs = append(s.done.Dirs, missing...) // the innermost first
		for _, d := range slices.Backward(missing) {
			if err := os.Mkdir(d, 0o755); err != nil {
				return err
			}
		}
	}
	b, err := json.MarshalIndent(s.done, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(s.dir, "."+p11Record)
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("noting what setup does: %w", err)
	}
	return os.Rename(tmp, filepath.Join(s.dir, p11Record))
}

// remove takes back what was made and is as it was made.
func (s *p11Setup) remove() error {
	if len(s.done.Files) == 0 {
		s.say("setup --p11 has made nothing here, or it has been taken back")
		return nil
	}
	files, err := s.files()
	if err != nil {
		return err
	}
	for path := range s.done.Files {
		// The record is only words: another user may have written it, where HOME is his.
		if !slices.ContainsFunc(files, func(f p11File) bool { return f.path == path }) {
			s.say("%s: setup makes no such file; it stays", path)
			continue
		}
		there, err := s.ours(path)
		switch {
		case !there && err == nil:
		case err != nil:
			s.say("%s: it has been changed, and stays", path)
		default:
			if err := os.Remove(path); err != nil {
				return err
			}
			s.say("%s: removed", path)
		}
	}
	if err := os.Remove(filepath.Join(s.dir, p11Record)); err != nil {
		return err
	}
	slices.SortFunc(s.done.Dirs, func(x, y string) int { return len(y) - len(x) })
	for _, dir := range s.done.Dirs {
		_ = os.Remove(dir) // where something else is in it by now, it stays
	}
	return nil
}

// opensslDirectories asks OpenSSL where it looks for things.
func opensslDirectories(env []string) map[string]string {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "openssl", "version", "-d", "-e", "-m")
	cmd.Env = env
	out, err := cmd.Output()
	if err != nil {
		return nil // there is no OpenSSL to configure
	}
	dirs := map[string]string{}
	for _, m := range opensslDirs.FindAllStringSubmatch(string(out), -1) {
		dirs[m[1]] = m[2]
	}
	// What these say goes before what OpenSSL was built with, and it does not tell.
	for _, v := range env {
		switch name, dir, _ := strings.Cut(v, "="); name {
		case "OPENSSL_ENGINES":
			dirs["ENGINESDIR"] = dir
		case "OPENSSL_MODULES":
			dirs["MODULESDIR"] = dir
		}
	}
	return dirs
}
