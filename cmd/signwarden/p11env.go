package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// p11Names are the variables by which tools find a PKCS#11 token; see p11Environment.
var p11Names = []string{"P11_KIT_SERVER_ADDRESS", "PKCS11_MODULE_PATH", "PKCS11_PROVIDER_MODULE"}

// p11Environment adds to env what has unmodified tools find the token on a socket.
// Files that they need go to dir.
//
//   - P11_KIT_SERVER_ADDRESS is the socket, for p11-kit-client.so, which is the module.
//   - PKCS11_MODULE_PATH is that module, for OpenSSL's engine of libp11, and so
//     for sbsign, evmctl and the kernel's sign-file, and for whoever wants to name it.
//   - PKCS11_PROVIDER_MODULE is it too, for OpenSSL's pkcs11-provider.
//   - OPENSSL_CONF is the configuration that would be used anyway, and the engine.
//
// What is not installed is left out: then the tools say so.
func p11Environment(dir, socket string, env []string) ([]string, error) {
	env = slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains(p11Names, name)
	})
	env = append(env, "P11_KIT_SERVER_ADDRESS=unix:path="+escapeP11(socket))
	module := p11Module()
	if module == "" {
		return env, nil
	}
	env = append(env, "PKCS11_MODULE_PATH="+module, "PKCS11_PROVIDER_MODULE="+module)
	conf, err := engineConf(module, env)
	if err != nil || conf == nil {
		return env, err
	}
	path := filepath.Join(dir, "openssl.cnf")
	if err := os.WriteFile(path, conf, 0o600); err != nil {
		return nil, err
	}
	env = slices.DeleteFunc(env, func(v string) bool { return strings.HasPrefix(v, "OPENSSL_CONF=") })
	return append(env, "OPENSSL_CONF="+path), nil
}

// escapeP11 percent-encodes what p11-kit decodes in an address.
func escapeP11(path string) string {
	var b strings.Builder
	for _, c := range []byte(path) {
		if c == '/' || c == '.' || c == '_' || c == '-' || c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02x", c)
		}
	}
	return b.String()
}

// triplets name the directories of Debian's libraries.
var triplets = map[string]string{
	"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu", "ppc64le": "powerpc64le-linux-gnu",
	"s390x": "s390x-linux-gnu", "riscv64": "riscv64-linux-gnu", "386": "i386-linux-gnu", "arm": "arm-linux-gnueabihf",
}

// p11Module is where the distribution has p11-kit-client.so; "": nowhere.
func p11Module() string {
	for _, lib := range []string{"/usr/lib/" + triplets[runtime.GOARCH], "/usr/lib64", "/usr/lib", "/usr/local/lib"} {
		path := filepath.Join(lib, "pkcs11", "p11-kit-client.so")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}

var (
	opensslDirs = regexp.MustCompile(`(OPENSSLDIR|ENGINESDIR): "([^"]*)"`)
	sectionLine = regexp.MustCompile(`^\s*\[\s*([^]\s]+)\s*\]`)
	valueLine   = regexp.MustCompile(`^\s*(openssl_conf|engines)\s*=\s*([^\s#;]+)`)
)

// engineConf is an OpenSSL configuration with libp11's engine, on top of the one in use.
// It is nil where OpenSSL or the engine is not installed, or the configuration cannot
// be added to.
func engineConf(module string, env []string) ([]byte, error) {
	cmd := exec.Command("openssl", "version", "-d", "-e")
	cmd.Env = env
	out, err := cmd.Output()
	if err != nil {
		return nil, nil // there is no OpenSSL to configure
	}
	dirs := map[string]string{}
	for _, m := range opensslDirs.FindAllStringSubmatch(string(out), -1) {
		dirs[m[1]] = m[2]
	}
	if _, err := os.Stat(filepath.Join(dirs["ENGINESDIR"], "pkcs11.so")); err != nil {
		return nil, nil
	}
	base := filepath.Join(dirs["OPENSSLDIR"], "openssl.cnf")
	for _, v := range env {
		if path, ok := strings.CutPrefix(v, "OPENSSL_CONF="); ok {
			base = path
		}
	}
	base, err = filepath.Abs(base)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(base)
	if err != nil {
		text, base = nil, "" // OpenSSL goes without, too
	}
	return addEngine(text, base, module), nil
}

// addEngine writes a configuration that includes the one at base, whose text is given, and
// has the engine besides.
func addEngine(text []byte, base, module string) []byte {
	initial, engines := readConf(text)
	if strings.ContainsAny(initial+engines+module+base, "$\"'\\\n") {
		return nil // what OpenSSL would make of these is not for us to guess
	}
	var b bytes.Buffer
	fmt.Fprintln(&b, "# Made by signwarden for one command.")
	if base != "" {
		fmt.Fprintf(&b, ".include %s\n", base)
	}
	if initial == "" {
		initial = "signwarden_init"
		fmt.Fprintf(&b, "[default]\nopenssl_conf = %s\n", initial)
	}
	if engines == "" {
		engines = "signwarden_engines"
		fmt.Fprintf(&b, "[%s]\nengines = %s\n", initial, engines)
	}
	// init = 0: the module is loaded when a key of it is named, and not before.
	fmt.Fprintf(&b, "[%s]\npkcs11 = signwarden_pkcs11\n[signwarden_pkcs11]\nengine_id = pkcs11\nMODULE_PATH = %s\ninit = 0\n", engines, module)
	return b.Bytes()
}

// readConf finds the section that initialises OpenSSL, and that of its engines. Files that
// the configuration includes are not looked into.
func readConf(text []byte) (initial, engines string) {
	bySection := map[string]string{}
	section := "default"
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		if m := sectionLine.FindStringSubmatch(s.Text()); m != nil {
			section = m[1]
			continue
		}
		m := valueLine.FindStringSubmatch(s.Text())
		switch {
		case m == nil:
		case m[1] == "openssl_conf" && section == "default":
			initial = m[2]
		case m[1] == "engines":
			bySection[section] = m[2]
		}
	}
	return initial, bySection[initial]
}
