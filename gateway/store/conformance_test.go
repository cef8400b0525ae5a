package store_test

import (
	"cmp"
	"context"
	"crypto/ed25519"
	crand "crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/signwarden/signwarden/gateway/gatewaytest"
	"github.com/signwarden/signwarden/gateway/keys"
	"github.com/signwarden/signwarden/gateway/store"
)

// testStore is what every store.Store must do. open makes an empty one and
// closes it with the test.
func testStore(t *testing.T, open func(t *testing.T) store.Store) {
	for name, test := range map[string]func(*testing.T, store.Store){
		"empty":              testEmpty,
		"keys":               testKeys,
		"key exists":         testKeyExists,
		"state":              testState,
		"x509":               testX509,
		"openpgp":            testOpenPGP,
		"pending":            testPending,
		"policy":             testPolicy,
		"audit rows":         testAuditRows,
		"audit paging":       testAuditPaging,
		"answers":            testAnswers,
		"big batches":        testBigBatches,
		"bytes":              testBytes,
		"failed commit":      testFailedCommit,
		"concurrent commits": testConcurrentCommits,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, open(t))
		})
	}
}

func testAnswers(t *testing.T, s store.Store) {
	if got, err := s.Answers(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("of an empty store: %v, %v", got, err)
	}
	e := entries("x", 1000)
	commit(t, s, store.Change{Audit: e[:2]})
	commit(t, s, store.Change{Audit: e[2:4], Answers: [][]byte{nil, []byte("three")}})
	commit(t, s, store.Change{Policy: []byte("p"), Audit: e[4:5]})
	want := []store.Answer{{Row: 3, Entry: e[3], Answer: []byte("three")}}
	many := make([][]byte, 995)
	for i := range many {
		if i%3 != 0 {
			many[i] = fmt.Appendf(nil, "answer %d", i)
			want = append(want, store.Answer{Row: int64(5 + i), Entry: e[5+i], Answer: many[i]})
		}
	}
	commit(t, s, store.Change{Audit: e[5:], Answers: many})
	got, err := s.Answers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("answers (-want +got):\n%s", diff)
	}
}

// testDatabase is what a store.Store must do as well that is used for more than tests.
func testDatabase(t *testing.T, open func(t *testing.T) store.Store) {
	for name, test := range map[string]func(*testing.T, store.Store){
		"one key per token object": testOneKeyPerObject,
		"state of no key":          testStateOfNoKey,
		"canceled":                 testCanceled,
		"canceled under way":       testCanceledUnderWay,
		"limits":                   testLimits,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, open(t))
		})
	}
}

func TestSQLite(t *testing.T) {
	open := func(t *testing.T) store.Store { return openSQLite(t, t.TempDir()+"/store.db") }
	testStore(t, open)
	testDatabase(t, open)
}

func TestMemory(t *testing.T) {
	testStore(t, func(*testing.T) store.Store { return &gatewaytest.Store{} })
}

// plainKey is a key without a certificate.
func plainKey(name string) keys.Key {
	return keys.Key{
		Name: name, Algorithm: keys.P256, State: keys.Enabled, Token: "t", ID: []byte("id of " + name),
		Public: []byte{0x30, 0, 0xff, 0}, Created: time.Unix(1_800_000_000, 0).UTC(),
	}
}

func commit(t testing.TB, s store.Store, c store.Change) int64 {
	t.Helper()
	first, err := s.Commit(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	return first
}

func load(t testing.TB, s store.Store) store.State {
	t.Helper()
	st, err := s.Load(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(st.Keys, func(a, b keys.Key) int { return cmp.Compare(a.Name, b.Name) })
	return st
}

// wantState compares what is stored with the keys and the policy given.
func wantState(t testing.TB, s store.Store, policy string, want ...keys.Key) {
	t.Helper()
	st := load(t, s)
	if diff := gocmp.Diff(want, st.Keys); diff != "" && len(want)+len(st.Keys) > 0 {
		t.Errorf("keys (-want +got):\n%s", diff)
	}
	if string(st.Policy) != policy {
		t.Errorf("policy %q, want %q", st.Policy, policy)
	}
}

// rows reads the whole log, page by page.
func rows(t testing.TB, s store.Store) []string {
	t.Helper()
	var out []string
	for {
		first, page, err := s.Audit(context.Background(), int64(len(out)), 1000)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			return out
		}
		if first != int64(len(out)) {
			t.Fatalf("the page from row %d begins at %d", len(out), first)
		}
		for _, e := range page {
			out = append(out, string(e))
		}
	}
}

func entries(prefix string, n int) [][]byte {
	var out [][]byte
	for i := range n {
		out = append(out, fmt.Appendf(nil, "%s-%d", prefix, i))
	}
	return out
}

func testEmpty(t *testing.T, s store.Store) {
	st := load(t, s)
	if len(st.Keys) != 0 || st.Policy != nil {
		t.Errorf("Load = %+v, want nothing and a nil policy", st)
	}
	for _, from := range []int64{-1, 0, 5} {
		if _, page, err := s.Audit(t.Context(), from, 10); err != nil || len(page) != 0 {
			t.Errorf("Audit from %d = %d entries, %v", from, len(page), err)
		}
	}
	commit(t, s, store.Change{}) // nothing at all
	wantState(t, s, "")
}

func testKeys(t *testing.T, s store.Store) {
	certified := plainKey("certified")
	certified.OpenPGP = &keys.OpenPGP{
		UserID: "Räleigh <a@b>", Layout: keys.Subkey, Expires: time.Unix(1_900_000_000, 0).UTC(), Certificate: []byte{0x99, 0, 1},
		PrimaryID: []byte{0, 1}, PrimaryPublic: []byte{2, 0},
	}
	single := plainKey("single")
	single.State, single.Algorithm = keys.Disabled, keys.RSA4096
	single.OpenPGP = &keys.OpenPGP{UserID: "x", Layout: keys.Single, Certificate: []byte{1}} // does not expire, has no primary
	old := plainKey("old")
	old.Created = time.Unix(0, 0).UTC()
	plain := plainKey("plain")
	for _, k := range []keys.Key{single, certified, plain, old} {
		commit(t, s, store.Change{CreateKey: &k, Audit: entries(k.Name, 1)})
	}
	wantState(t, s, "", certified, old, plain, single)
}

func testKeyExists(t *testing.T, s store.Store) {
	first, second := plainKey("a"), plainKey("a")
	second.ID, second.Algorithm = []byte("another"), keys.Ed25519
	commit(t, s, store.Change{CreateKey: &first})
	if _, err := s.Commit(t.Context(), store.Change{CreateKey: &second}); !errors.Is(err, store.ErrExists) {
		t.Errorf("Commit = %v, want ErrExists", err)
	}
	upper := plainKey("A")
	commit(t, s, store.Change{CreateKey: &upper}) // another name
	wantState(t, s, "", upper, first)
}

func testState(t *testing.T, s store.Store) {
	a, b := plainKey("a"), plainKey("b")
	commit(t, s, store.Change{CreateKey: &a})
	commit(t, s, store.Change{CreateKey: &b})
	for _, to := range []keys.State{keys.Disabled, keys.Disabled, keys.Enabled, keys.Disabled} {
		commit(t, s, store.Change{SetState: &store.SetState{Name: "a", State: to}})
		a.State = to
		wantState(t, s, "", a, b)
	}
}

func testPending(t *testing.T, s store.Store) {
	pending := func() []store.Pending {
		t.Helper()
		st, err := s.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st.Pending
	}
	one, two := store.Pending{KeyName: "k", ID: []byte{1}}, store.Pending{KeyName: "k", ID: []byte{2}}
	commit(t, s, store.Change{Begin: []store.Pending{one, two}})
	if diff := gocmp.Diff(pending(), []store.Pending{one, two}); diff != "" {
		t.Errorf("got (-) want (+):\n%s", diff)
	}
	commit(t, s, store.Change{Forget: [][]byte{{1}, {3}}})
	if diff := gocmp.Diff(pending(), []store.Pending{two}); diff != "" {
		t.Errorf("got (-) want (+):\n%s", diff)
	}
}

func testX509(t *testing.T, s store.Store) {
	a, b := plainKey("a"), plainKey("b")
	commit(t, s, store.Change{CreateKey: &a})
	commit(t, s, store.Change{CreateKey: &b})
	for _, chain := range [][][]byte{{certificate(t, "leaf"), certificate(t, "issuer")}, {certificate(t, "other")}} {
		commit(t, s, store.Change{SetX509: &store.SetX509{Name: "a", Chain: chain}})
		a.X509 = chain
		wantState(t, s, "", a, b)
	}
}

func testOpenPGP(t *testing.T, s store.Store) {
	a, b, c := plainKey("a"), plainKey("b"), plainKey("c")
	a.OpenPGP = &keys.OpenPGP{UserID: "x", Layout: keys.Single, Certificate: []byte{1}}
	for _, k := range []*keys.Key{&a, &b} {
		commit(t, s, store.Change{CreateKey: k})
	}
	until := time.Unix(4e9, 0).UTC()
	pgp := keys.OpenPGP{UserID: "x", Layout: keys.Subkey, Certificate: []byte{1, 2}, Expires: until, PrimaryID: a.ID, PrimaryPublic: a.Public}
	c.OpenPGP = &pgp
	// A key and the certificate that it is in, in one commit.
	commit(t, s, store.Change{CreateKey: &c, SetOpenPGP: []store.SetOpenPGP{{Name: "a", Certificate: []byte{1, 2}, Expires: until}}})
	a.OpenPGP = &keys.OpenPGP{UserID: "x", Layout: keys.Single, Certificate: []byte{1, 2}, Expires: until}
	wantState(t, s, "", a, b, c)
	commit(t, s, store.Change{SetOpenPGP: []store.SetOpenPGP{
		{Name: "a", Certificate: []byte{3}, Disable: true}, {Name: "c", Certificate: []byte{3}, Disable: true},
	}})
	a.OpenPGP, a.State = &keys.OpenPGP{UserID: "x", Layout: keys.Single, Certificate: []byte{3}}, keys.Disabled
	last := pgp
	last.Certificate, last.Expires = []byte{3}, time.Time{}
	c.OpenPGP, c.State = &last, keys.Disabled
	wantState(t, s, "", a, b, c)
}

// certificate is some DER certificate.
func certificate(t *testing.T, cn string) []byte {
	t.Helper()
	pub, priv, err := ed25519.GenerateKey(crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}}
	der, err := x509.CreateCertificate(crand.Reader, tmpl, tmpl, pub, priv)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func testPolicy(t *testing.T, s store.Store) {
	for _, p := range []string{"rules: []", "second\x00", "rules: []", strings.Repeat("x", 512<<10)} {
		commit(t, s, store.Change{Policy: []byte(p)})
		commit(t, s, store.Change{Audit: entries("x", 1)}) // a nil policy is no change
		wantState(t, s, p)
	}
}

func testAuditRows(t *testing.T, s store.Store) {
	var want []string
	for i, n := range []int{1, 3, 1, 0, 128, 129, 2} {
		c := store.Change{Audit: entries(fmt.Sprint(i), n)}
		k := plainKey(fmt.Sprint("k", i))
		switch i % 4 {
		case 0:
			c.CreateKey = &k
		case 1:
			c.SetState = &store.SetState{Name: "k0", State: keys.Disabled}
		case 2:
			c.Policy = []byte(k.Name)
		}
		if first := commit(t, s, c); n > 0 && first != int64(len(want)) {
			t.Errorf("commit %d: first row %d, want %d", i, first, len(want))
		}
		for _, e := range c.Audit {
			want = append(want, string(e))
		}
	}
	if diff := gocmp.Diff(want, rows(t, s)); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

func testAuditPaging(t *testing.T, s store.Store) {
	commit(t, s, store.Change{Audit: entries("e", 10)})
	tests := []struct {
		from  int64
		limit int
		first int64
		n     int
	}{
		{0, 3, 0, 3}, {3, 3, 3, 3}, {8, 5, 8, 2}, {9, 1, 9, 1}, {0, 100, 0, 10}, {0, 0, 0, 0},
		{10, 5, -1, 0}, {1 << 40, 5, -1, 0}, // the row of a first that is not there says nothing
		{-1, 3, 7, 3}, {-5, 3, 7, 3}, {-1, 10, 0, 10}, {-1, 100, 0, 10}, {-1, 0, -1, 0},
	}
	for _, tt := range tests {
		first, page, err := s.Audit(t.Context(), tt.from, tt.limit)
		if err != nil || len(page) != tt.n || tt.first >= 0 && first != tt.first {
			t.Errorf("Audit(%d, %d) = row %d, %d entries, %v; want row %d, %d", tt.from, tt.limit, first, len(page), err, tt.first, tt.n)
			continue
		}
		for i, e := range page {
			if want := fmt.Sprintf("e-%d", int(first)+i); string(e) != want {
				t.Errorf("Audit(%d, %d): entry %d is %s, want %s", tt.from, tt.limit, i, e, want)
			}
		}
	}
}

func testBigBatches(t *testing.T, s store.Store) {
	const n = 5000
	if first := commit(t, s, store.Change{Audit: entries("big", n)}); first != 0 {
		t.Errorf("first row %d, want 0", first)
	}
	big := strings.Repeat("x", 1<<20)
	if first := commit(t, s, store.Change{Audit: [][]byte{[]byte(big)}}); first != n {
		t.Errorf("then first row %d, want %d", first, n)
	}
	all := rows(t, s)
	if len(all) != n+1 {
		t.Fatalf("%d rows, want %d", len(all), n+1)
	}
	for i := range n {
		if want := fmt.Sprintf("big-%d", i); all[i] != want {
			t.Fatalf("row %d is %s, want %s", i, all[i], want)
		}
	}
	if all[n] != big {
		t.Errorf("a row of 1 MiB comes back with %d bytes", len(all[n]))
	}
}

// What goes in comes out, byte for byte: an entry is a leaf of a hash tree.
func testBytes(t *testing.T, s store.Store) {
	want := []string{"\x00", "a\x00b", "\xff\xfe", "é", "'; DROP TABLE audit; --", "?", " a ", "\r\n"}
	var c store.Change
	for _, e := range want {
		c.Audit = append(c.Audit, []byte(e))
	}
	commit(t, s, c)
	if diff := gocmp.Diff(want, rows(t, s)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A commit that fails leaves nothing of itself, and the numbers go on.
func testFailedCommit(t *testing.T, s store.Store) {
	a := plainKey("a")
	commit(t, s, store.Change{CreateKey: &a, Policy: []byte("p"), Audit: entries("good", 2)})
	again := plainKey("a")
	_, err := s.Commit(t.Context(), store.Change{
		CreateKey: &again, SetState: &store.SetState{Name: "a", State: keys.Disabled}, Policy: []byte("q"), Audit: entries("bad", 300),
	})
	if !errors.Is(err, store.ErrExists) {
		t.Errorf("Commit = %v, want ErrExists", err)
	}
	wantState(t, s, "p", a)
	if first := commit(t, s, store.Change{Audit: entries("next", 1)}); first != 2 {
		t.Errorf("the next commit begins at row %d, want 2", first)
	}
	if diff := gocmp.Diff([]string{"good-0", "good-1", "next-0"}, rows(t, s)); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

// Writers and readers together: every commit's rows are where it says, in one
// piece, and a reader never sees a part of one or a gap.
func testConcurrentCommits(t *testing.T, s store.Store) {
	const writers, each = 8, 12
	size := func(w, i int) int { return 1 + (w*7+i*5)%9 }
	var mu sync.Mutex // guards firsts
	firsts := map[int64]string{}
	done := make(chan struct{})
	var readers, writing sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if _, err := s.Load(context.Background()); err != nil {
					t.Errorf("Load: %v", err)
				}
				first, page, err := s.Audit(context.Background(), -1, 50)
				if err != nil {
					t.Errorf("Audit: %v", err)
				}
				for i, e := range page {
					var w, n, j int
					if _, err := fmt.Sscanf(string(e), "%d.%d-%d", &w, &n, &j); err != nil {
						t.Errorf("row %d is %q", first+int64(i), e)
					} else if left := size(w, n) - j; i == len(page)-1 && left != 1 && i < 49 {
						t.Errorf("the last row %d is %q: %d entries of its commit are not seen", first+int64(i), e, left-1)
					}
				}
			}
		})
	}
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				c := store.Change{Audit: entries(fmt.Sprintf("%d.%d", w, i), size(w, i))}
				if i == 0 {
					k := plainKey(fmt.Sprint("k", w))
					c.CreateKey = &k
				}
				if i%3 == 1 {
					c.Policy = []byte(fmt.Sprint(w, i))
				}
				first, err := s.Commit(context.Background(), c)
				if err != nil {
					t.Errorf("Commit: %v", err)
					return
				}
				mu.Lock()
				firsts[first] = fmt.Sprintf("%d.%d", w, i)
				mu.Unlock()
			}
		})
	}
	writing.Wait()
	close(done)
	readers.Wait()
	all := rows(t, s)
	for at := 0; at < len(all); {
		prefix, ok := firsts[int64(at)]
		if !ok {
			t.Fatalf("row %d, %q, begins no commit that returned", at, all[at])
		}
		var w, i int
		if _, err := fmt.Sscanf(prefix, "%d.%d", &w, &i); err != nil {
			t.Fatal(err)
		}
		for j := range size(w, i) {
			if want := fmt.Sprintf("%s-%d", prefix, j); at >= len(all) || all[at] != want {
				t.Fatalf("row %d is not %s", at, want)
			}
			at++
		}
		delete(firsts, int64(at-size(w, i)))
	}
	if len(firsts) != 0 {
		t.Errorf("%d commits returned and are not in the log", len(firsts))
	}
	if n := len(load(t, s).Keys); n != writers {
		t.Errorf("%d keys, want %d", n, writers)
	}
}

// Two names for one object of a token would make disabling one of them a lie.
func testOneKeyPerObject(t *testing.T, s store.Store) {
	a, b := plainKey("a"), plainKey("b")
	b.ID = a.ID
	commit(t, s, store.Change{CreateKey: &a, Policy: []byte("p"), Audit: entries("good", 1)})
	_, err := s.Commit(t.Context(), store.Change{
		CreateKey: &b, SetState: &store.SetState{Name: "a", State: keys.Disabled}, Policy: []byte("q"), Audit: entries("bad", 200),
	})
	if err == nil {
		t.Error("a second key with the same token and id is stored")
	}
	wantState(t, s, "p", a)
	b.Token = "another"
	if first := commit(t, s, store.Change{CreateKey: &b, Audit: entries("next", 1)}); first != 1 {
		t.Errorf("the next commit begins at row %d, want 1", first)
	}
	wantState(t, s, "p", a, b)
}

// The record of a change that took no effect must not be stored.
func testStateOfNoKey(t *testing.T, s store.Store) {
	_, err := s.Commit(t.Context(), store.Change{SetState: &store.SetState{Name: "nobody", State: keys.Disabled}, Audit: entries("x", 1)})
	if err == nil || !strings.Contains(err.Error(), `"nobody"`) {
		t.Errorf("Commit = %v, want an error that names the key", err)
	}
	if n := len(rows(t, s)); n != 0 {
		t.Errorf("%d rows, want none", n)
	}
}

func testCanceled(t *testing.T, s store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	k := plainKey("a")
	if _, err := s.Commit(ctx, store.Change{CreateKey: &k, Audit: entries("x", 3)}); !errors.Is(err, context.Canceled) {
		t.Errorf("Commit = %v, want Canceled", err)
	}
	if _, err := s.Load(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Load = %v, want Canceled", err)
	}
	if _, _, err := s.Audit(ctx, 0, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("Audit = %v, want Canceled", err)
	}
	wantState(t, s, "")
	if first := commit(t, s, store.Change{Audit: entries("y", 1)}); first != 0 {
		t.Errorf("the next commit begins at row %d, want 0", first)
	}
}

// Contexts that end at any moment of a commit: it is there whole or not at all,
// one that returned nil is there, and the store goes on.
func testCanceledUnderWay(t *testing.T, s store.Store) {
	const n = 150 // more than one statement
	failed := 0
	returned := map[string]int64{}
	for i := range 40 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(100<<rand.IntN(10))*time.Microsecond)
		prefix := fmt.Sprint(i)
		first, err := s.Commit(ctx, store.Change{Policy: []byte(prefix), Audit: entries(prefix, n)})
		cancel()
		if err == nil {
			returned[prefix] = first
		} else {
			failed++
		}
	}
	first := commit(t, s, store.Change{Audit: entries("last", n)})
	returned["last"] = first
	t.Logf("%d of 40 commits failed", failed)
	all := rows(t, s)
	if len(all)%n != 0 || int64(len(all)) != first+n {
		t.Fatalf("%d rows; the last commit begins at %d", len(all), first)
	}
	for at := 0; at < len(all); at += n {
		prefix, _, _ := strings.Cut(all[at], "-")
		for j := range n {
			if want := fmt.Sprintf("%s-%d", prefix, j); all[at+j] != want {
				t.Fatalf("row %d is %s, want %s", at+j, all[at+j], want)
			}
		}
		if row, ok := returned[prefix]; ok && row != int64(at) {
			t.Errorf("commit %s said row %d and is at %d", prefix, row, at)
		}
		delete(returned, prefix)
	}
	if len(returned) != 0 {
		t.Errorf("commits that returned nil are not there: %v", returned)
	}
}

func testLimits(t *testing.T, s store.Store) {
	commit(t, s, store.Change{Audit: entries("e", 10)})
	for _, from := range []int64{0, -1} {
		if _, page, err := s.Audit(t.Context(), from, -1); err != nil || len(page) != 0 {
			t.Errorf("Audit(%d, -1) = %d entries, %v; want none", from, len(page), err)
		}
	}
}
