package rpm_test

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// spec is what rpmbuild builds. The long file makes some compressors write more than one block.
const spec = `Name: demo
Epoch: 3
Version: 1.2
Release: 4
Summary: x
License: x
Vendor: Test Vendor
%description
x
%prep
%build
%install
mkdir -p %{buildroot}/opt/demo/dir
echo one >%{buildroot}/opt/demo/one
echo one >%{buildroot}/opt/demo/same
seq 1 100000 >%{buildroot}/opt/demo/long
ln -s one %{buildroot}/opt/demo/link
ln %{buildroot}/opt/demo/one %{buildroot}/opt/demo/hard
%files
/opt/demo
`

// compressors are rpmbuild's.
var compressors = []string{"w.ufdio", "w9.gzdio", "w9.bzdio", "w6.xzdio", "w6.lzdio", "w3.zstdio"}

// built are packages of rpmbuild, made once for all tests.
var built = sync.OnceValues(func() (map[string][]byte, error) {
	dir, err := os.MkdirTemp("", "rpmtest")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "demo.spec")
	err = os.WriteFile(path, []byte(spec), 0o600)
	if err != nil {
		return nil, err
	}
	all := map[string][]byte{}
	for i, c := range compressors {
		args := []string{"-bb"}
		if i == 0 {
			args = []string{"-ba"} // the source package too
		}
		out, err := rpmbuild(dir, path, append(args, "--define", "_binary_payload "+c)...)
		if err != nil {
			return nil, fmt.Errorf("rpmbuild: %w\n%s", err, out)
		}
		for _, pattern := range []string{"RPMS/*/*.rpm", "SRPMS/*.rpm"} {
			found, err := filepath.Glob(filepath.Join(dir, pattern))
			if err != nil {
				return nil, err
			}
			for _, p := range found {
				name := c
				if strings.HasSuffix(p, ".src.rpm") {
					name = "source"
				}
				all[name], err = os.ReadFile(p)
				if err != nil {
					return nil, err
				}
				os.Remove(p)
			}
		}
	}
	return all, nil
})

// testData are modules in whose test data are packages: one of rpm 4.4 without a payload digest and one that nfpm made in
// the first; in the second ten of CentOS 2 to 7, signed, the oldest by rpm 4.0.
var testData = map[string]int{
	"github.com/sassoftware/go-rpmutils@v0.4.0": 11,
	"github.com/cavaliergopher/rpm@v1.3.0":      10,
}

// corpus are real packages by name: rpmbuild's with every compressor and a source package, and those of testData; and
// some made up.
func corpus(t testing.TB) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	b, err := built()
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(all, b)
	want := len(compressors) + 1
	for module, n := range testData {
		want += n
		for _, pattern := range []string{"testdata/*.rpm", "testdata/nfpm/*.rpm"} {
			found, err := filepath.Glob(filepath.Join(moduleDir(t, module), pattern))
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range found {
				all[filepath.Base(p)] = read(t, p)
			}
		}
	}
	if len(all) != want {
		t.Fatalf("the corpus has %d packages, not %d: %q", len(all), want, slices.Sorted(maps.Keys(all)))
	}
	all["no-reserve"] = stripReserve(t, all["w9.gzdio"])
	all["rpm3"] = rpm3()
	return all
}

// demo is one package of the corpus.
func demo(t testing.TB) []byte {
	t.Helper()
	b, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return b["w9.gzdio"]
}

// tag is an entry of a header that a test writes.
type tag struct {
	tag, typ uint32
	count    int
	data     []byte
}

func str(n uint32, s string) tag { return tag{n, 6, 1, append([]byte(s), 0)} }

func num(n uint32, v uint32) tag { return tag{n, 4, 1, binary.BigEndian.AppendUint32(nil, v)} }

// header writes a header. region is the tag of its immutable region, 0 for none.
func header(region uint32, tags ...tag) []byte {
	var index, data []byte
	entry := func(b []byte, f ...uint32) []byte {
		for _, v := range f {
			b = binary.BigEndian.AppendUint32(b, v)
		}
		return b
	}
	for _, t := range tags {
		for w := map[uint32]int{3: 2, 4: 4, 5: 8}[t.typ]; w > 0 && len(data)%w != 0; {
			data = append(data, 0)
		}
		index = entry(index, t.tag, t.typ, uint32(len(data)), uint32(t.count))
		data = append(data, t.data...)
	}
	n := len(tags)
	if region != 0 {
		n++
		index = append(entry(nil, region, 7, uint32(len(data)), 16), index...)
		data = entry(data, region, 7, uint32(-16*n), 16)
	}
	h := entry([]byte{0x8e, 0xad, 0xe8, 1, 0, 0, 0, 0}, uint32(n), uint32(len(data)))
	return append(append(h, index...), data...)
}

// pack puts a package together.
func pack(sig, main, payload []byte) []byte {
	b := make([]byte, 96)
	copy(b, "\xed\xab\xee\xdb\x03\x00")
	copy(b[10:75], "demo-1-1")
	b[77], b[79] = 1, 5
	b = append(b, sig...)
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return append(append(b, main...), payload...)
}

// rpm3 is a package as rpm 3 wrote them (format_v3.md): no regions, and size and MD5 for all digests.
func rpm3() []byte {
	main := header(0, str(1000, "old"), str(1001, "1"), str(1002, "1"), num(1009, 0), str(1021, "linux"),
		str(1022, "noarch"), str(1044, "old-1-1.src.rpm"), str(1124, "cpio"), str(1125, "gzip"), str(1126, "9"))
	payload := []byte("not really an archive")
	sum := md5.Sum(append(slices.Clip(main), payload...))
	sig := header(0, num(1000, uint32(len(main)+len(payload))), tag{1004, 7, 16, sum[:]})
	return pack(sig, main, payload)
}

// stripReserve takes the reserved space out of a package.
func stripReserve(t testing.TB, b []byte) []byte {
	t.Helper()
	tags, rest := sigTags(t, b)
	tags = slices.DeleteFunc(tags, func(e tag) bool { return e.tag == 1008 })
	return pack(header(62, tags...), rest, nil)
}

// sigTags takes the signature header of a package apart, and returns what follows it.
func sigTags(t testing.TB, b []byte) ([]tag, []byte) {
	t.Helper()
	n, dl := int(binary.BigEndian.Uint32(b[104:])), int(binary.BigEndian.Uint32(b[108:]))
	index, data := b[112:112+16*n], b[112+16*n:112+16*n+dl]
	var tags []tag
	for i := range n {
		e := index[16*i:]
		f := tag{binary.BigEndian.Uint32(e), binary.BigEndian.Uint32(e[4:]), int(binary.BigEndian.Uint32(e[12:])), nil}
		off := int(binary.BigEndian.Uint32(e[8:]))
		if f.tag == 62 {
			continue
		}
		end := dl
		if binary.BigEndian.Uint32(index) == 62 {
			end -= 16 // before the region's trailer
		}
		if i+1 < n {
			end = int(binary.BigEndian.Uint32(index[16*(i+1)+8:]))
		}
		f.data = data[off:end]
		switch f.typ { // without the padding of the next
		case 4:
			f.data = f.data[:4*f.count]
		case 5:
			f.data = f.data[:8*f.count]
		case 7:
			f.data = f.data[:f.count]
		case 6, 8:
			end := 0
			for range f.count {
				end += bytes.IndexByte(f.data[end:], 0) + 1
			}
			f.data = f.data[:end]
		}
		tags = append(tags, f)
	}
	return tags, b[(112+16*n+dl+7)/8*8:]
}

// rpmbuild builds below dir. It is apart from run because packages are built once, for no test in particular.
func rpmbuild(dir, spec string, args ...string) (string, error) {
	args = append([]string{"--define", "_topdir " + dir, "--target", "x86_64"}, append(args, spec)...)
	out, err := exec.Command("rpmbuild", args...).CombinedOutput()
	return string(out), err
}

func hexOf(b []byte) string { return hex.EncodeToString(b) }

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hexOf(sum[:])
}
