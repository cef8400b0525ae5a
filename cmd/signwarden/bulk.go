package main

import (
	"bufio"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/signwarden/signwarden/cmd/internal/exit"
	"github.com/signwarden/signwarden/cmd/internal/sched"
)

// The bounds of a bulk run.
const (
	defaultWindow = 64      // files under way: being read, or waiting for their signature
	maxWindow     = 512     // what one stream of the gateway takes
	maxFiles      = 4 << 20 // files of one run
	maxPath       = 16 << 10
	bulkGC        = 400 // GOGC
)

// bulk signs many files over one stream. Each is read, waits for its signature,
// and is written, by one of as many goroutines as the window has files; of those only
// so many as there are jobs read or write at a time, and the others wait for the gateway.
type bulk struct {
	a         *app
	recursive bool
	files0    string
	jobs      int
	window    int
	resume    string

	busy chan struct{} // a place for each job
	asks chan struct{} // a place for each request of files that have several

	mu       sync.Mutex // guards what follows, and output; held to write a line
	bar      *progressbar.ProgressBar
	enc      *json.Encoder // -o jsonl
	journal  *journal
	failed   int
	firstErr error
}

// outcome is what became of one file; its JSON form is a line of -o jsonl.
type outcome struct {
	File   string `json:"file"`
	Status string `json:"status"` // signed, skipped or failed
	Output string `json:"output,omitempty"`
	Error  string `json:"error,omitempty"`
	Code   int    `json:"code,omitempty"` // the exit code that this error has alone
}

func (b *bulk) flags(c *cobra.Command) {
	c.Flags().BoolVarP(&b.recursive, "recursive", "r", false, "take the files of directories, and of those in them")
	c.Flags().StringVar(&b.files0, "files0-from", "", "take file names, each ended by a NUL, from this file; - is standard input")
	c.Flags().IntVar(&b.jobs, "jobs", min(4*runtime.NumCPU(), maxWindow), "files read or written at a time")
	c.Flags().IntVar(&b.window, "window", defaultWindow, "files under way, those that wait for the gateway too")
	c.Flags().StringVar(&b.resume, "resume", "", "journal: note there what is done, and skip what it says is done")
}

// list returns the files that the command line names, in order, each once. keep
// says which files of a directory are meant.
func (b *bulk) list(args []string, keep func(path string) bool) ([]string, error) {
	if b.jobs < 1 || b.jobs > maxWindow || b.window < 1 || b.window > maxWindow {
		return nil, exit.UsageError("--jobs and --window are 1 to %d", maxWindow)
	}
	if b.files0 != "" {
		more, err := b.readList()
		if err != nil {
			return nil, err
		}
		args = append(args, more...)
	}
	var out []string
	seen := map[string]bool{}
	add := func(path string) error {
		if !seen[path] {
			seen[path] = true
			out = append(out, path)
		}
		if len(out) > maxFiles {
			return exit.UsageError("over %d files in one run", maxFiles)
		}
		return nil
	}
	for _, arg := range args {
		if err := b.expand(arg, keep, add); err != nil {
			return nil, err
		}
	}
	if len(out) == 0 {
		return nil, exit.UsageError("no files: name some, or a directory with -r, or --files0-from")
	}
	return out, nil
}

// expand adds what one argument names: a file, a glob that the shell left
// alone, or with -r a directory's files.
func (b *bulk) expand(arg string, keep func(string) bool, add func(string) error) error {
	info, err := os.Stat(arg)
	if errors.Is(err, os.ErrNotExist) && strings.ContainsAny(arg, "*?[") {
		matches, gerr := filepath.Glob(arg)
		if gerr == nil && len(matches) > 0 {
			for _, m := range matches {
				if err := b.expand(m, keep, add); err != nil {
					return err
				}
			}
			return nil
		}
	}
	if err != nil || !info.IsDir() {
		return add(arg) // what cannot be opened is told with the file
	}
	if !b.recursive {
		return exit.Hint(exit.UsageError("%s is a directory", arg), "its files are taken with -r")
	}
	return filepath.WalkDir(arg, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Type().IsRegular() && keep(path) {
			return add(path)
		}
		return nil
	})
}

// readList reads names that are each ended by a NUL.
func (b *bulk) readList() ([]string, error) {
	f := b.a.in
	if b.files0 != "-" {
		var err error
		if f, err = os.Open(b.files0); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	s := bufio.NewScanner(f)
	s.Buffer(nil, maxPath)
	s.Split(func(data []byte, atEOF bool) (int, []byte, error) {
		if i := slices.Index(data, 0); i >= 0 {
			return i + 1, data[:i], nil
		}
		if atEOF && len(data) > 0 {
			return len(data), data, nil
		}
		return 0, nil, nil
	})
	var out []string
	for s.Scan() {
		if s.Text() != "" {
			out = append(out, s.Text())
		}
		if len(out) > maxFiles {
			break
		}
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("reading names from %s: %w", b.files0, err)
	}
	return out, nil
}

// run signs the files. SIGINT or SIGTERM starts no more, and lets what is under
// way finish; a second one, or the first where there is one file, gives up on it;
// a third ends the program. An error with one file does not stop the others.
func (b *bulk) run(ctx context.Context, files []string, sign func(ctx context.Context, file string) (output string, err error)) error {
	var err error
	b.journal, err = openJournal(b.resume)
	if err != nil {
		return err
	}
	defer b.journal.close()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, unix.SIGTERM)
	defer signal.Stop(signals)
	// The command's own context ends with the first signal.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()

	b.begin(len(files))
	var wg sync.WaitGroup
	next := make(chan string)
	for range min(b.window, len(files)) {
		wg.Go(func() {
			for file := range next {
				b.one(ctx, file, sign)
			}
		})
	}
	interrupted, done := false, 0
	for _, file := range files {
		select {
		case <-signals:
			interrupted = true
		case next <- file:
			done++
			continue
		}
		break
	}
	close(next)
	finished := make(chan struct{})
	go func() { wg.Wait(); close(finished) }()
	for waiting := true; waiting; {
		select {
		case <-finished:
			waiting = false
		case <-signals:
			if interrupted || len(files) == 1 {
				cancel()
				signal.Stop(signals)
			}
			interrupted = true
		}
	}
	return b.end(len(files), done, interrupted)
}

// one signs one file and tells of it.
func (b *bulk) one(ctx context.Context, file string, sign func(context.Context, string) (string, error)) {
	b.busy <- struct{}{}
	defer func() { <-b.busy }()
	if b.journal.has(file) {
		b.tell(outcome{File: file, Status: "skipped"}, nil)
		return
	}
	output, err := sign(ctx, file)
	if err == nil {
		err = b.journal.add(file, output)
	}
	if err != nil {
		b.tell(outcome{File: file, Status: "failed", Error: err.Error(), Code: exit.Code(err)}, err)
		return
	}
	b.tell(outcome{File: file, Status: "signed", Output: output}, nil)
}

// untilDone is a reader of a file that gives up with ctx: reading has no other
// end where the file has none, or where nobody writes to it.
type untilDone struct {
	ctx context.Context
	f   *os.File
}

func (u untilDone) Read(b []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, errInterrupted
	}
	if info, err := u.f.Stat(); err == nil && info.Mode().IsRegular() {
		return u.f.Read(b)
	}
	// A read of a pipe or terminal cannot be called off: it is left behind, with a
	// buffer of its own, and the program ends under it.
	type read struct {
		n   int
		err error
	}
	own, done := make([]byte, len(b)), make(chan read, 1)
	go func() {
		n, err := u.f.Read(own)
		done <- read{n, err}
	}()
	select {
	case r := <-done:
		return copy(b, own[:r.n]), r.err
	case <-u.ctx.Done():
		return 0, errInterrupted
	}
}

func (u untilDone) ReadAt(b []byte, off int64) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, errInterrupted
	}
	return u.f.ReadAt(b, off)
}

var errInterrupted = errors.New("interrupted")

// waiting is a signer whose caller gives its job's place away while the gateway
// works.
type waiting struct {
	crypto.Signer
	b *bulk
}

func (w waiting) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	<-w.b.busy
	defer func() { w.b.busy <- struct{}{} }()
	return w.Signer.Sign(rand, digest, opts)
}

// memory takes from a budget, for a caller that has a job's place and gives that
// away meanwhile: who has the memory may be waiting for the place.
func (b *bulk) memory(from *budget, n int64) (release func()) {
	<-b.busy
	defer func() { b.busy <- struct{}{} }()
	return from.take(n)
}

// each calls ask for 0 to n-1, many at a time, and waits for all. It is for a
// caller that has a job's place, and gives that away meanwhile. After an error no
// more are begun; the first one is returned.
func (b *bulk) each(n int, ask func(i int) error) error {
	<-b.busy
	defer func() { b.busy <- struct{}{} }()
	var wg sync.WaitGroup
	failed := make(chan error, 1)
	for i := range n {
		b.asks <- struct{}{}
		if len(failed) > 0 {
			<-b.asks
			break
		}
		wg.Go(func() {
			defer func() { <-b.asks }()
			if err := ask(i); err != nil {
				select {
				case failed <- err:
				default: // another was first
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

// begin sets output up: JSON lines, a bar on a terminal, else a line a file.
func (b *bulk) begin(n int) {
	if n > 1 {
		_ = sched.Batch() // without, it is as right, and slower
	}
	// Little is kept and much is thrown away: headers, buffers, messages.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(bulkGC)
	}
	b.busy, b.asks = make(chan struct{}, b.jobs), make(chan struct{}, maxWindow)
	if b.a.format == "jsonl" {
		b.enc = json.NewEncoder(b.a.out)
		b.enc.SetEscapeHTML(false)
	}
	if f, ok := b.a.err.(*os.File); ok && n > 1 && term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "" && os.Getenv("CI") == "" {
		b.bar = progressbar.NewOptions(n, progressbar.OptionSetWriter(f), progressbar.OptionSetDescription("signing"),
			progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionSetItsString("files"),
			progressbar.OptionSetPredictTime(true), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
	}
}

func (b *bulk) tell(o outcome, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		b.failed++
		if b.firstErr == nil {
			b.firstErr = err
		}
	}
	if b.enc != nil {
		_ = b.enc.Encode(o) // where standard output is gone there is nobody to tell
	}
	if b.bar != nil {
		if err != nil {
			_ = b.bar.Clear()
			exit.Print(b.a.err, "signwarden", exit.OneLine(fmt.Errorf("%s: %w", o.File, err)))
		}
		_ = b.bar.Add(1)
		return
	}
	switch {
	case err != nil:
		exit.Print(b.a.err, "signwarden", exit.OneLine(fmt.Errorf("%s: %w", o.File, err)))
	case b.enc == nil && o.Output != "" && o.Output != o.File:
		b.a.say("%s %s: %s", o.Status, exit.Line(o.File), exit.Line(o.Output))
	case b.enc == nil:
		b.a.say("%s %s", o.Status, exit.Line(o.File))
	}
}

// end sums the run up.
func (b *bulk) end(all, begun int, interrupted bool) error {
	if b.bar != nil {
		_ = b.bar.Finish()
	}
	switch {
	case interrupted && begun < all:
		return exit.Hint(exit.WithCode(fmt.Errorf("interrupted: %d of %d files were not begun, %d failed", all-begun, all, b.failed), exit.SomeOfSeveral),
			"with --resume JOURNAL a later run goes on where this one ended")
	case b.failed == 0:
		return nil
	case all == 1:
		return silent(exit.Code(b.firstErr)) // it has been told
	case b.failed == all:
		return exit.WithCode(fmt.Errorf("none of %d files was signed", all), exit.Code(b.firstErr))
	}
	return exit.WithCode(fmt.Errorf("%d of %d files were not signed", b.failed, all), exit.SomeOfSeveral)
}
