package assuan_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/signwarden/signwarden/agentproto/assuan"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is one served end of a pipe. Its client end is buffered by nothing: what
// is written is read at once.
type server struct {
	net.Conn
	done chan struct{}
	err  error     // of Serve, once done is closed
	end  time.Time // of Serve, likewise
}

func serve(ctx context.Context, cfg assuan.Config) *server {
	near, far := net.Pipe()
	s := &server{Conn: near, done: make(chan struct{})}
	cfg.Greeting = "hello"
	go func() {
		defer close(s.done)
		defer far.Close()
		s.err = assuan.Serve(ctx, far, cfg)
		s.end = time.Now()
	}()
	return s
}

// exchange writes in while it reads all that the server says until it hangs up.
func (s *server) exchange(t *testing.T, in string) string {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { io.WriteString(s, in) }) // fails when the server hangs up first
	out, err := io.ReadAll(s)
	s.Close()
	wg.Wait()
	<-s.done
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func echo(_ context.Context, c *assuan.Conn, args []byte) error { return c.Data(args) }

func bye(_ context.Context, c *assuan.Conn, _ []byte) error {
	c.SetOK("closing\nconnection")
	c.Hangup()
	return nil
}

func ask(_ context.Context, c *assuan.Conn, _ []byte) error {
	data, err := c.Inquire("SECRET", "please", 16)
	if err != nil {
		return err
	}
	return c.Data(data)
}

var commands = map[string]assuan.Handler{
	"ECHO":  echo,
	"BYE":   bye,
	"ASK":   ask,
	"OK":    func(context.Context, *assuan.Conn, []byte) error { return nil },
	"PANIC": func(context.Context, *assuan.Conn, []byte) error { panic("now") },
	"FAIL":  func(context.Context, *assuan.Conn, []byte) error { return errors.New("rule 7\nOK") },
	"DENY": func(_ context.Context, c *assuan.Conn, _ []byte) error {
		c.SetOK("not this")
		return fmt.Errorf("wrapped: %w", &assuan.Error{Code: 67109115, Text: "Forbidden"})
	},
	"TELL": func(_ context.Context, c *assuan.Conn, _ []byte) error {
		return errors.Join(c.Status("PROGRESS", "1", "2\n3"), c.Comment("a\nb"))
	},
}

func TestConversations(t *testing.T) {
	const syntax = "ERR 67109140 IPC syntax error <GPG Agent> - leading white-space\n"
	const unknown = "ERR 67109139 Unknown IPC command <GPG Agent>\n"
	const tooLong = "ERR 67109127 Line passed to IPC too long <GPG Agent>\n"
	longest := "ECHO " + strings.Repeat("x", assuan.MaxRequest-5)
	longestReply := "D " + strings.Repeat("x", 996) + "\nOK\n"
	tests := []struct{ name, in, want string }{
		{"in order", "ECHO a\nOK\nECHO b\nBYE\nECHO late\n", "D a\nOK\nOK\nD b\nOK\nOK closing connection\n"},
		{"case", "echo a\nbYe\n", "D a\nOK\nOK closing connection\n"},
		{"CRLF", "ECHO a\r\nBYE\r\n", "D a\nOK\nOK closing connection\n"},
		{"blanks around arguments", "ECHO \t a b \nBYE\n", "D a b\nOK\nOK closing connection\n"},
		{"comments and empty lines", "\n#x\n# ECHO\n\r\nOK\nBYE\n", "OK\nOK closing connection\n"},
		{"leading blank", " OK\n\tOK\n \nBYE\n", syntax + syntax + syntax + "OK closing connection\n"},
		{"unknown", "NOPE x\nBYE\n", unknown + "OK closing connection\n"},
		{"error that is wrapped", "DENY\nBYE\n", "ERR 67109115 Forbidden\nOK closing connection\n"},
		{"error of no number", "FAIL\nOK\nBYE\n", "ERR 67108865 General error <GPG Agent>\nOK\nOK closing connection\n"},
		{"panic", "PANIC\nOK\n", "ERR 67108865 General error <GPG Agent>\n"},
		{"status and comment", "TELL\nBYE\n", "S PROGRESS 1 2 3\n# a b\nOK\nOK closing connection\n"},
		{"longest request", longest + "\nBYE\n", longestReply + "OK closing connection\n"},
		{"longest request with CR", longest + "\r\nBYE\n", longestReply + "OK closing connection\n"},
		{"one byte too long", longest + "x\nOK\n", tooLong},
		{"one byte too long with CR", longest + "x\r\nOK\n", tooLong},
		{"endless line", strings.Repeat("x", 1<<16), tooLong},
		{"inquiry", "ASK\nD a%0\nBYE\n", "INQUIRE SECRET please\nERR 67109140 IPC syntax error <GPG Agent> - bad escape\n"},
		{"inquiry answered", "ASK\nD a%0a\nD b\n#x\n\nEND\nBYE\n", "INQUIRE SECRET please\nD a%0Ab\nOK\nOK closing connection\n"},
		{"inquiry canceled", "ASK\nD a\nCAN\nBYE\n", "INQUIRE SECRET please\nERR 67109141 IPC call has been cancelled <GPG Agent>\nOK closing connection\n"},
		{"inquiry canceled by a script", "ASK\nCANCEL\nBYE\n", "INQUIRE SECRET please\nERR 67109141 IPC call has been cancelled <GPG Agent>\nOK closing connection\n"},
		{"inquiry answered with a command", "ASK\nOK\nBYE\n", "INQUIRE SECRET please\nERR 67109138 Unexpected IPC command <GPG Agent>\nOK closing connection\n"},
		{"inquiry at its limit", "ASK\nD 0123456789abcdef\nEND\nBYE\n", "INQUIRE SECRET please\nD 0123456789abcdef\nOK\nOK closing connection\n"},
		{"inquiry over its limit", "ASK\nD 0123456789abcdef\nD x\nEND\nBYE\n", "INQUIRE SECRET please\nERR 67109137 Too much data for IPC layer <GPG Agent>\nOK closing connection\n"},
		{"inquiry without end", "ASK\n" + strings.Repeat("D x\n", 1<<16), "INQUIRE SECRET please\nERR 67109137 Too much data for IPC layer <GPG Agent>\n"},
		{"inquiry of empty lines without end", "ASK\n" + strings.Repeat("D \n", 1<<16), "INQUIRE SECRET please\nERR 67109137 Too much data for IPC layer <GPG Agent>\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t.Context(), assuan.Config{Commands: commands})
			got := s.exchange(t, tt.in)
			if got != "OK hello\n"+tt.want {
				t.Errorf("got %q, want %q", got, "OK hello\n"+tt.want)
			}
		})
	}
}

// TestRepliesAreFlushed asserts that a reply does not wait for the rest of a line that has begun.
func TestRepliesAreFlushed(t *testing.T) {
	s := serve(t.Context(), assuan.Config{Commands: commands})
	buf := make([]byte, len("OK hello\n"))
	_, err := io.ReadFull(s, buf)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.WriteString(s, "ECHO a\nECH")
	if err != nil {
		t.Fatal(err)
	}
	buf = make([]byte, len("D a\nOK\n"))
	_, err = io.ReadFull(s, buf)
	if err != nil || string(buf) != "D a\nOK\n" {
		t.Fatalf("got %q, %v", buf, err)
	}
	got := s.exchange(t, "O b\nBYE\n")
	if got != "D b\nOK\nOK closing connection\n" {
		t.Errorf("got %q", got)
	}
}

func TestDeadlines(t *testing.T) {
	cfg := assuan.Config{Commands: commands}
	tests := []struct {
		name  string
		in    string // written one byte a second
		after time.Duration
		reads bool
	}{
		{"idle", "", assuan.DefaultIdleTimeout, true},
		{"idle after a command", "OK\n", 2*time.Second + assuan.DefaultIdleTimeout, true},
		{"slow within a line", "ECHO aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", assuan.DefaultLineTimeout, true},
		{"half a line", "E", assuan.DefaultLineTimeout, true},
		{"does not read", "", assuan.DefaultWriteTimeout, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				s := serve(t.Context(), cfg)
				var wg sync.WaitGroup
				if tt.reads {
					wg.Go(func() { io.Copy(io.Discard, s) })
				}
				for i := range len(tt.in) {
					_, err := s.Write([]byte(tt.in[i : i+1]))
					if err != nil {
						break
					}
					time.Sleep(time.Second)
				}
				<-s.done
				if !errors.Is(s.err, os.ErrDeadlineExceeded) || s.end.Sub(start) != tt.after {
					t.Errorf("ended after %v with %v, want %v", s.end.Sub(start), s.err, tt.after)
				}
				s.Close()
				wg.Wait()
			})
		})
	}
}

// TestShutdown asserts that the end of ctx ends a waiting connection, and lets a running command answer.
func TestShutdown(t *testing.T) {
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("busy=%v", busy), func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			begun := make(chan struct{})
			s := serve(ctx, assuan.Config{Commands: map[string]assuan.Handler{
				"WAIT": func(ctx context.Context, c *assuan.Conn, _ []byte) error {
					close(begun)
					<-ctx.Done()
					return c.Data([]byte("done"))
				},
			}})
			in, want := "", "OK hello\n"
			if busy {
				in, want = "WAIT\n", "OK hello\nD done\nOK\n"
				go func() { <-begun; cancel() }()
			} else {
				cancel()
			}
			got := s.exchange(t, in)
			if got != want && (busy || got != "") { // it may end before the greeting is sent
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

func TestClient(t *testing.T) {
	s := serve(t.Context(), assuan.Config{Commands: commands})
	defer func() { s.Close(); <-s.done }()
	c, err := assuan.NewClient(s)
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.Transact("ECHO a%b")
	if err != nil || string(r.Data) != "a%b" {
		t.Errorf("got %q, %v", r.Data, err)
	}
	_, err = c.Transact("DENY")
	e, ok := errors.AsType[*assuan.Error](err)
	if !ok || *e != (assuan.Error{Code: 67109115, Text: "Forbidden"}) {
		t.Errorf("got %v", err)
	}
	_, err = c.Transact("ASK")
	e, ok = errors.AsType[*assuan.Error](err)
	if !ok || e.Code != 67109141 {
		t.Errorf("got %v", err)
	}
	c.Inquire = func(keyword, args string) ([]byte, error) { return []byte(keyword + " " + args + "\r"), nil }
	r, err = c.Transact("ASK")
	if err != nil || !bytes.Equal(r.Data, []byte("SECRET please\r")) {
		t.Errorf("got %q, %v", r.Data, err)
	}
	for _, command := range []string{"ECHO a\nECHO b", strings.Repeat("x", assuan.MaxRequest+1)} {
		_, err = c.Transact(command)
		if err == nil {
			t.Errorf("%.20q was sent", command)
		}
	}
}
