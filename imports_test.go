// Package signwarden_test keeps the shape of the module: which package may know
// of which. The shape is what lets a reader believe that gateway.Gateway.Sign is
// the only road to a token, and that parsers of foreign files reach no network.
//
// Run it with -count=1 where it has to be sure: the test cache does not see that
// the files of other packages change.
package signwarden_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/signwarden/signwarden"

// rule says what some packages never depend on. Packages of this module are
// written "./folder"; "/..." behind one takes in everything below; thirdParty is
// every package of another module.
type rule struct {
	name  string
	who   []string // the packages it binds
	but   []string // and of those not these
	never []string // what they do not depend on
	may   []string // what they may, though never has it
	// direct: only their own imports count, not what those import in turn.
	direct bool
	// past: what these import in turn does not count.
	past []string
}

const (
	thirdParty = "(third party)"
	cgo        = "C"
	grpc       = "google.golang.org/grpc/..."
)

var rules = []rule{
	{
		name: "the core knows no wire, no token and no format",
		who: []string{
			"./gateway", "./gateway/keys", "./gateway/policy", "./gateway/audit", "./gateway/store",
			"./gateway/ident", "./gateway/config", "./gateway/sigerr",
		},
		never: []string{grpc, "./gateway/gatewaypb", "./hsm/...", "./formats/...", "./agentproto/..."},
	},
	{
		name:  "nothing of the gateway knows a token, a format or an agent protocol",
		who:   []string{"./gateway/..."},
		never: []string{"./hsm/...", "./formats/...", "./agentproto/...", "./cmd/..."},
	},
	{
		name:  "audit knows no policy and no wire",
		who:   []string{"./gateway/audit"},
		never: []string{"./gateway/policy", "./gateway", grpc},
	},
	{
		name:  "hsm knows nothing of ours",
		who:   []string{"./hsm/..."},
		never: []string{"./..."},
		may:   []string{"./hsm/..."},
	},
	{
		name:  "what supervises workers knows hsm, the standard library and system calls",
		who:   []string{"./hsm/worker"},
		never: []string{thirdParty},
		may:   []string{"golang.org/x/sys/unix"},
		past:  []string{"./hsm"},
	},
	{
		name:  "what chooses between tokens knows them, and the standard library",
		who:   []string{"./hsm/fleet"},
		never: []string{thirdParty},
		past:  []string{"./hsm/worker", "./hsm"},
	},
	{
		name:  "formats know nothing of ours but formats, and how RSA is verified",
		who:   []string{"./formats/..."},
		never: []string{"./..."},
		may:   []string{"./formats/...", "./internal/rsaverify"},
	},
	{
		name:  "how RSA is verified stands on the standard library",
		who:   []string{"./internal/rsaverify"},
		never: []string{"./...", thirdParty, "net/..."},
	},
	{
		name:  "formats reach no network",
		who:   []string{"./formats/..."},
		never: []string{"net/..."},
		past:  []string{"crypto/x509"}, // imports net for the type of an address in a certificate
	},
	{
		name:  "agent protocols know of ours only the errors",
		who:   []string{"./agentproto/..."},
		but:   []string{"./agentproto/sshagent"},
		never: []string{"./..."},
		may:   []string{"./agentproto/...", "./gateway/sigerr"},
	},
	{
		name:  "ssh-agent reads what it is to have signed as the gateway does",
		who:   []string{"./agentproto/sshagent"},
		never: []string{"./..."},
		may:   []string{"./agentproto", "./agentproto/lease", "./gateway/sigerr", "./formats/sshsig"},
	},
	{
		name:   "the wire form of the API stays with its server and its client",
		who:    []string{"./..."},
		but:    []string{"./gateway/gatewaypb", "./gateway/grpcapi", "./gateway/client"},
		never:  []string{"./gateway/gatewaypb"},
		direct: true,
	},
	{
		name:  "what is for tests is in no program",
		who:   []string{"./..."},
		never: []string{"./formats/hostiletest", "./gateway/gatewaytest"},
	},
	{
		name:  "sigerr is a leaf",
		who:   []string{"./gateway/sigerr"},
		never: []string{"./...", thirdParty},
	},
	{
		name:  "what reads private keys knows nothing of ours, and reaches no network",
		who:   []string{"./internal/keyfile"},
		never: []string{"./...", "net/..."},
		past:  []string{"crypto/x509", "golang.org/x/crypto/ssh"}, // which import net for what is not used here
	},
	{
		name:  "only what imports into a token reads private keys from files",
		who:   []string{"./..."},
		but:   []string{"./cmd/signwardend"},
		never: []string{"./internal/keyfile"},
	},
	{
		name:  "the client runs on any Linux, and loads no module",
		who:   []string{"./cmd/signwarden"},
		never: []string{cgo, "./hsm/...", "github.com/miekg/pkcs11"},
	},
}

// graph has for each package what it imports.
type graph map[string][]string

// matches reports whether pkg is what pattern says.
func matches(pattern, pkg string) bool {
	if pattern == thirdParty {
		first, _, _ := strings.Cut(pkg, "/")
		return first != "." && strings.Contains(first, ".")
	}
	if below, ok := strings.CutSuffix(pattern, "/..."); ok {
		return pkg == below || strings.HasPrefix(pkg, below+"/")
	}
	return pkg == pattern
}

func anyMatches(patterns []string, pkg string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, pkg) })
}

// check returns a line for each package of g that breaks r: how it comes to
// what it never depends on.
func (r rule) check(g graph) []string {
	var broken []string
	for _, pkg := range slices.Sorted(maps.Keys(g)) {
		if anyMatches(r.who, pkg) && !anyMatches(r.but, pkg) {
			if way := r.search(g, []string{pkg}, map[string]bool{pkg: true}); way != nil {
				broken = append(broken, strings.Join(way, " -> "))
			}
		}
	}
	return broken
}

func (r rule) search(g graph, way []string, seen map[string]bool) []string {
	for _, dep := range g[way[len(way)-1]] {
		if seen[dep] {
			continue
		}
		seen[dep] = true
		next := append(slices.Clone(way), dep)
		if anyMatches(r.never, dep) && !anyMatches(r.may, dep) {
			return next
		}
		if r.direct || anyMatches(r.past, dep) {
			continue
		}
		if found := r.search(g, next, seen); found != nil {
			return found
		}
	}
	return nil
}

func TestImports(t *testing.T) {
	g := readGraph(t)
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			for _, way := range r.check(g) {
				t.Error(way)
			}
		})
	}
}

// A folder that is renamed would leave a rule that binds nobody.
func TestRulesNameWhatIsThere(t *testing.T) {
	g := readGraph(t)
	there := map[string]bool{}
	for pkg, deps := range g {
		there[pkg] = true
		for _, d := range deps {
			there[d] = true
		}
	}
	for _, r := range rules {
		for _, p := range slices.Concat(r.who, r.but, r.never, r.may, r.past) {
			found := false
			for pkg := range there {
				found = found || matches(p, pkg)
			}
			if !found {
				t.Errorf("%s: there is no %s", r.name, p)
			}
		}
	}
}

// Every word of every rule can fail: for each package that it binds and each
// that it forbids, a made-up module that breaks just that.
func TestRulesCanFail(t *testing.T) {
	for _, r := range rules {
		tried := 0
		for _, w := range r.who {
			who := example(w)
			if anyMatches(r.but, who) {
				t.Errorf("%s: the example %s is let off", r.name, who)
			}
			for _, n := range r.never {
				bad := example(n)
				if anyMatches(r.may, bad) {
					t.Errorf("%s: the example %s is allowed", r.name, bad)
				}
				tried++
				if got := r.check(graph{who: {"fmt", bad}, "fmt": nil}); len(got) != 1 {
					t.Errorf("%s: %s imports %s, and it says %q", r.name, who, bad, got)
				}
				through := r.check(graph{who: {"fmt", "example"}, "example": {"strings", bad}})
				if want := 1; r.direct && len(through) != 0 || !r.direct && len(through) != want {
					t.Errorf("%s: %s depends on %s, and it says %q", r.name, who, bad, through)
				}
				for _, b := range r.but {
					if got := r.check(graph{b: {bad}}); len(got) != 0 {
						t.Errorf("%s: %s may import %s, and it says %q", r.name, b, bad, got)
					}
				}
				for _, p := range r.past {
					if got := r.check(graph{who: {p}, p: {bad}}); len(got) != 0 {
						t.Errorf("%s: %s may come to %s past %s, and it says %q", r.name, who, bad, p, got)
					}
				}
			}
			for _, m := range r.may {
				if got := r.check(graph{who: {example(m)}}); len(got) != 0 {
					t.Errorf("%s: %s may import %s, and it says %q", r.name, who, m, got)
				}
			}
		}
		if tried == 0 {
			t.Errorf("%s: forbids nothing", r.name)
		}
	}
}

// example is a package that pattern matches.
func example(pattern string) string {
	if pattern == thirdParty {
		return "example.org/x"
	}
	if below, ok := strings.CutSuffix(pattern, "/..."); ok {
		return below + "/example/x"
	}
	return pattern
}

// readGraph reads the imports of this module from every file that is no test,
// whatever its build tags, and those of other packages from the go command.
func readGraph(t *testing.T) graph {
	t.Helper()
	g := graph{}
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e", "-deps", "-json=ImportPath,Standard,Imports,CgoFiles", "./...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1") // only then does it tell of cgo
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath        string
			Standard          bool
			Imports, CgoFiles []string
		}
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		if p.Standard { // cgo there is optional, and is left out with CGO_ENABLED=0
			p.Imports = slices.DeleteFunc(p.Imports, func(s string) bool { return s == cgo })
		} else if len(p.CgoFiles) > 0 {
			p.Imports = append(p.Imports, cgo)
		}
		if name := local(p.ImportPath); !strings.HasPrefix(name, "./") && name != "." {
			g[name] = p.Imports
		}
	}
	if err := fs.WalkDir(os.DirFS("."), ".", g.addFile); err != nil {
		t.Fatal(err)
	}
	if len(g["fmt"]) == 0 || len(g["./gateway"]) == 0 {
		t.Fatalf("read only %d packages", len(g))
	}
	return g
}

// addFile adds the imports of one file of ours; it is a fs.WalkDirFunc.
func (g graph) addFile(name string, d fs.DirEntry, err error) error {
	base := path.Base(name)
	switch {
	case err != nil:
		return err
	case d.IsDir() && name != "." && (base == "testdata" || base == "vendor" || base[0] == '.' || base[0] == '_'):
		return fs.SkipDir
	case d.IsDir() || !strings.HasSuffix(base, ".go") || strings.HasSuffix(base, "_test.go"):
		return nil
	}
	f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
	if err != nil {
		return err
	}
	pkg := "./" + path.Dir(name)
	g[pkg] = slices.Clip(g[pkg])
	for _, spec := range f.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		g[pkg] = append(g[pkg], local(imported))
	}
	return nil
}

// local writes a package of this module as the rules do.
func local(pkg string) string {
	if rest, ok := strings.CutPrefix(pkg, module); ok && (rest == "" || rest[0] == '/') {
		return "." + rest
	}
	return pkg
}
