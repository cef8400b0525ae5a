package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// journal notes which files are done, one JSON line each, so that a run that was
// killed can be taken up again. A line counts only while the output is as it was
// noted: by its size and time of change. A nil journal notes nothing.
type journal struct {
	mu   sync.Mutex // guards f: lines are written whole
	f    *os.File
	done map[string]journalLine // by absolute path; read-only after open
}

type journalLine struct {
	File   string    `json:"file"`
	Output string    `json:"output"`
	Size   int64     `json:"size"`
	Time   time.Time `json:"time"`
}

// openJournal reads a journal, or makes one; "" is none. What a killed run has
// written of its last line is passed over.
func openJournal(path string) (*journal, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("journal %s is in use by another run", path)
	}
	j := &journal{f: f, done: map[string]journalLine{}}
	s := bufio.NewScanner(f)
	s.Buffer(nil, 2*maxPath)
	torn := false
	for s.Scan() {
		var l journalLine
		if err := json.Unmarshal(s.Bytes(), &l); err != nil || l.File == "" {
			torn = true
			continue
		}
		j.done[l.File] = l
	}
	if err := s.Err(); err != nil {
		f.Close()
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	if torn {
		// So that the next line does not join what is left of the torn one.
		if _, err := f.WriteString("\n"); err != nil {
			return nil, errors.Join(fmt.Errorf("journal %s: %w", path, err), f.Close())
		}
	}
	return j, nil
}

// has reports whether a file is done and what was made of it is still there.
func (j *journal) has(file string) bool {
	if j == nil {
		return false
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return false
	}
	l, ok := j.done[abs]
	if !ok {
		return false
	}
	info, err := os.Stat(l.Output)
	return err == nil && info.Size() == l.Size && info.ModTime().Equal(l.Time)
}

// add notes that a file is done.
func (j *journal) add(file, output string) error {
	if j == nil {
		return nil
	}
	l := journalLine{}
	var err error
	if l.File, err = filepath.Abs(file); err != nil {
		return fmt.Errorf("signed, and not noted in the journal: %w", err)
	}
	if l.Output, err = filepath.Abs(output); err != nil {
		return fmt.Errorf("signed, and not noted in the journal: %w", err)
	}
	info, err := os.Stat(l.Output)
	if err != nil {
		return fmt.Errorf("signed, and not noted in the journal: %w", err)
	}
	l.Size, l.Time = info.Size(), info.ModTime()
	b, err := json.Marshal(l)
	if err != nil {
		return fmt.Errorf("signed, and not noted in the journal: %w", err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, err := j.f.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("signed, and not noted in the journal: %w", err)
	}
	return nil
}

// close ends the journal. Not synced: a line that a power cut takes away costs
// one more signature, and nothing else.
func (j *journal) close() {
	if j != nil {
		j.f.Close()
	}
}
