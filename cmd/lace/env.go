// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
)

// env holds every effect of a command that is not a system call of its own trade, so that a
// command is a function of (env, args).
type env struct {
	stdin    io.Reader
	stdout   io.Writer
	stderr   io.Writer
	getenv   func(string) string
	hostname func() (string, error)
}

// hostEnv is the real one.
func hostEnv() *env {
	return &env{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv, hostname: os.Hostname}
}

// usageError is a command line that makes no sense. Without a problem it is a request for help.
type usageError struct {
	problem string
	flags   *flag.FlagSet
}

func (u *usageError) Error() string { return u.problem }

// usagef refuses a command line, with the reason.
func usagef(fs *flag.FlagSet, format string, args ...any) error {
	return &usageError{problem: fmt.Sprintf(format, args...), flags: fs}
}

// newFlags starts the flags of one command. The flag package's own printing is off: report does it.
func newFlags(name string) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	return fs
}

// parseFlags reads args and refuses more than max arguments behind the flags; max < 0 takes any.
func parseFlags(fs *flag.FlagSet, args []string, max int) error {
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return &usageError{flags: fs}
		}
		return usagef(fs, "%v", err)
	}
	if max >= 0 && fs.NArg() > max {
		return usagef(fs, "unexpected argument %q", fs.Arg(max))
	}
	return nil
}
