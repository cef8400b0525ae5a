package main

import (
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// The manual page has every command.
func TestMan(t *testing.T) {
	page, err := os.ReadFile("../../docs/man/signwardend.8")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	var look func(c *cobra.Command)
	look = func(c *cobra.Command) {
		if c.Runnable() {
			found++
			name := strings.TrimPrefix(c.CommandPath(), "signwardend ")
			if !strings.Contains(string(page), "\n.Cm "+name+"\n") || !strings.Contains(string(page), "\n.It Cm "+name) {
				t.Errorf("%s is not in the synopsis and the description", name)
			}
		}
		for _, sub := range c.Commands() {
			look(sub)
		}
	}
	for _, c := range rootCommand().Commands() {
		look(c)
	}
	if found < 5 {
		t.Errorf("%d commands were found", found)
	}
}
