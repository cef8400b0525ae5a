package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
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

// installModule says where p11Module comes from.
const installModule = "apt-get install p11-kit-modules, or dnf install p11-kit-server"

var (
	opensslDirs = regexp.MustCompile(`(OPENSSLDIR|ENGINESDIR|MODULESDIR): "([^"]*)"`)
	sectionLine = regexp.MustCompile(`^\s*\[\s*([^]\s]+)\s*\]`)
	valueLine   = regexp.MustCompile(`^\s*(openssl_conf|engines|providers)\s*=\s*([^\s#;]+)`)
)

// engineConf is an OpenSSL configuration with libp11's engine, on top of the one in use.
// It is nil where OpenSSL or the engine is not installed, or the configuration cannot
// be added to.
func engineConf(module string, env []string) ([]byte, error) {
	engine, _, err := opensslConfs(module, env)
	return engine, err
}

// opensslConfs are configurations with libp11's engine, and with pkcs11-provider, on top of
// the one in use. One is nil where it is not installed, or the configuration cannot be
// added to.
func opensslConfs(module string, env []string) (engine, provider []byte, err error) {
	dirs := opensslDirectories(env)
	if dirs == nil {
		return nil, nil, nil
	}
	base := filepath.Join(dirs["OPENSSLDIR"], "openssl.cnf")
	for _, v := range env {
		if path, ok := strings.CutPrefix(v, "OPENSSL_CONF="); ok {
			base = path
		}
	}
	if base, err = filepath.Abs(base); err != nil {
		return nil, nil, err
	}
	text, err := os.ReadFile(base)
	if err != nil {
		text, base = nil, "" // OpenSSL goes without, too
	}
	if _, err := os.Stat(filepath.Join(dirs["ENGINESDIR"], "pkcs11.so")); err == nil {
		engine = addEngine(text, base, module)
	}
	so := filepath.Join(dirs["MODULESDIR"], "pkcs11.so")
	if _, err := os.Stat(so); err == nil {
		provider = addProvider(text, base, module, so)
	}
	return engine, provider, nil
}

// addEngine writes a configuration that includes the one at base, whose text is given, and
// has the engine besides.
func addEngine(text []byte, base, module string) []byte {
	b, section := addTo(text, base, "engines", module)
	if b == nil {
		return nil
	}
	// init = 0: the module is loaded when a key of it is named, and not before.
	fmt.Fprintf(b, "[%s]\npkcs11 = signwarden_pkcs11\n[signwarden_pkcs11]\nengine_id = pkcs11\nMODULE_PATH = %s\ninit = 0\n", section, module)
	return b.Bytes()
}

// addProvider does so with the provider at so. The default provider is not there by itself
// any more where another one is.
func addProvider(text []byte, base, module, so string) []byte {
	b, section := addTo(text, base, "providers", module+so)
	if b == nil {
		return nil
	}
	fmt.Fprintf(b, "[%s]\ndefault = signwarden_default\npkcs11 = signwarden_provider\n[signwarden_default]\nactivate = 1\n", section)
	fmt.Fprintf(b, "[signwarden_provider]\nmodule = %s\npkcs11-module-path = %s\nactivate = 1\n", so, module)
	return b.Bytes()
}

// addTo begins a configuration that includes the one at base, and names the section in it
// that what is to be engines or providers. It is nil where that cannot be.
func addTo(text []byte, base, what, paths string) (*bytes.Buffer, string) {
	initial, section := readConf(text, what)
	if strings.ContainsAny(initial+section+paths+base, "$\"'\\\n") {
		return nil, "" // what OpenSSL would make of these is not for us to guess
	}
	b := &bytes.Buffer{}
	fmt.Fprintln(b, "# Made by signwarden.")
	if base != "" {
		fmt.Fprintf(b, ".include %s\n", base)
	}
	if initial == "" {
		initial = "signwarden_init"
		fmt.Fprintf(b, "[default]\nopenssl_conf = %s\n", initial)
	}
	if section == "" {
		section = "signwarden_" + what
		fmt.Fprintf(b, "[%s]\n%s = %s\n", initial, what, section)
	}
	return b, section
}

// readConf finds the section that initialises OpenSSL, and that of its engines or
// providers. Files that the configuration includes are not looked into.
func readConf(text []byte, what string) (initial, named string) {
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
		case m[1] == what:
			bySection[section] = m[2]
		}
	}
	return initial, bySection[initial]
}
