package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/signwarden/signwarden/agentproto/gpgagent"
	"github.com/signwarden/signwarden/gateway/config"
	"github.com/signwarden/signwarden/gateway/sigerr"
)

// agentVersion is what our own gpg-agent sockets say they are, and no gpg-agent does.
const agentVersion = gpgagent.DefaultVersion

// errDenied has a finding end doctor with the code of what is denied.
var errDenied = fmt.Errorf("doctor: %w", sigerr.Denied)

// moduleVariables name the module that OpenSSL loads.
var moduleVariables = []string{"PKCS11_MODULE_PATH", "PKCS11_PROVIDER_MODULE"}

// missing is what is said of a package of PKCS#11's: it is wrong where something here uses a
// token, and else as it may be.
func missing(next, what string) []finding {
	used := os.Getenv("P11_KIT_SERVER_ADDRESS") != ""
	for _, name := range moduleVariables {
		used = used || os.Getenv(name) != ""
	}
	if socket, err := p11Socket(config.WordAuto); err == nil && !used {
		_, err = os.Lstat(socket)
		used = err == nil
	}
	if used {
		return bad(next, "%s", what)
	}
	return noted(next, "%s", what)
}

// checkModule looks for what tools load, and at the variables that name it.
func checkModule(_ context.Context, _ *patient) []finding {
	module := p11Module()
	if module == "" {
		return missing(installModule, "p11-kit-client.so is not installed: PKCS#11 tools have no way to the token")
	}
	for _, name := range moduleVariables {
		path := os.Getenv(name)
		if path == "" {
			continue
		}
		if _, err := os.Stat(path); err != nil {
			return bad(fmt.Sprintf("export %s=%s", name, module), "%s: %v", name, err)
		}
		if base := filepath.Base(path); base != "p11-kit-client.so" && base != "p11-kit-proxy.so" {
			return bad(fmt.Sprintf("export %s=%s", name, module), "%s is %s: another token than ours", name, path)
		}
	}
	return ok("%s", module)
}

// p11Address is where p11-kit's client looks, and whether a variable says so.
func p11Address() (path string, named bool, err error) {
	address := os.Getenv("P11_KIT_SERVER_ADDRESS")
	if address == "" {
		path, err = p11Socket(config.WordAuto)
		return path, false, err
	}
	rest, isUnix := strings.CutPrefix(address, "unix:path=")
	if !isUnix {
		return "", true, fmt.Errorf("P11_KIT_SERVER_ADDRESS=%s is not unix:path=/PATH", address)
	}
	path, err = url.PathUnescape(rest)
	if err == nil && !filepath.IsAbs(path) {
		err = fmt.Errorf("P11_KIT_SERVER_ADDRESS: %q is not an absolute path, which p11-kit wants", path)
	}
	return path, true, err
}

const serveP11Hint = "signwarden agent --p11-socket auto serves it; signwarden exec -- COMMAND brings one up for a command"

// checkP11Socket asks at the socket as p11-kit's client does. That shows no token where
// nobody answers, and no error.
func checkP11Socket(_ context.Context, _ *patient) []finding {
	path, named, err := p11Address()
	if err != nil && named {
		return bad("P11_KIT_SERVER_ADDRESS=unix:path=/PATH of a socket of signwarden agent", "%v", err)
	}
	if err != nil {
		return noted(serveP11Hint, "%v", err)
	}
	if _, serr := os.Lstat(path); serr != nil && !named {
		return noted(serveP11Hint, "nothing serves %s: tools that load p11-kit-client.so see no token", path)
	}
	c, err := net.DialTimeout("unix", path, 2*time.Second)
	if err != nil {
		return bad(serveP11Hint, "nobody serves it, so tools see no token and no error: %v", err)
	}
	defer c.Close()
	answer := make([]byte, 1)
	err = c.SetDeadline(time.Now().Add(5 * time.Second))
	if err == nil {
		_, err = c.Write([]byte{0}) // the lowest version of the protocol
	}
	if err == nil {
		_, err = io.ReadFull(c, answer)
	}
	if err != nil {
		return bad("if it is forwarded: is the other end served, and are its bounds not spent? "+serveP11Hint, "%s does not speak p11-kit's protocol: %v", path, err)
	}
	return ok("%s answers", path)
}

var modulePath = regexp.MustCompile(`(?m)^\s*(MODULE_PATH|pkcs11-module-path|dynamic_path|module)\s*=\s*(\S+)`)

// checkOpenSSL sees by what OpenSSL gets at a token: libp11's engine, or pkcs11-provider.
func checkOpenSSL(ctx context.Context, _ *patient) []finding {
	dirs := opensslDirectories(os.Environ())
	if dirs == nil {
		return noted("apt-get install openssl, or dnf install openssl", "openssl is not installed, or its configuration stops it")
	}
	if out := opensslConf(); out != nil {
		return out
	}
	_, noEngine := os.Stat(filepath.Join(dirs["ENGINESDIR"], "pkcs11.so"))
	_, noProvider := os.Stat(filepath.Join(dirs["MODULESDIR"], "pkcs11.so"))
	if noEngine != nil && noProvider != nil {
		return missing("apt-get install libengine-pkcs11-openssl or pkcs11-provider; dnf install openssl-pkcs11 or pkcs11-provider",
			"neither libp11's engine nor pkcs11-provider is installed: openssl, sbsign, evmctl and sign-file cannot use a token")
	}
	if noEngine != nil {
		return append(ok("pkcs11-provider"), noted("apt-get install libengine-pkcs11-openssl, or dnf install openssl-pkcs11", "libp11's engine is not installed: sbsign, evmctl and openssl -engine pkcs11 need it")...)
	}
	if out, err := ask(ctx, "openssl", "engine", "pkcs11"); err != nil {
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return bad("look at OPENSSL_CONF and OPENSSL_ENGINES; `signwarden agent setup --p11` writes a configuration that works", "OpenSSL does not load the engine: %s", line)
	}
	if noProvider != nil {
		return append(ok("libp11's engine"), noted("Debian 13 and Fedora have it: apt-get install pkcs11-provider", "pkcs11-provider is not installed: the sign-file of kernels since 6.1.129 or so, and systemd-sbsign, need it")...)
	}
	return ok("libp11's engine and pkcs11-provider")
}

// opensslConf looks at the configuration that OPENSSL_CONF names, where it does.
func opensslConf() []finding {
	path := os.Getenv("OPENSSL_CONF")
	if path == "" {
		return nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return bad("unset OPENSSL_CONF, or name one of `signwarden agent setup --p11`", "OPENSSL_CONF: %v", err)
	}
	for _, m := range modulePath.FindAllStringSubmatch(string(text), -1) {
		if !filepath.IsAbs(m[2]) {
			continue // in a directory of OpenSSL's
		}
		if _, err := os.Stat(m[2]); err != nil {
			return bad(installModule+"; then `signwarden agent setup --p11`", "%s names a module that is not there: %v", path, err)
		}
	}
	return nil
}
