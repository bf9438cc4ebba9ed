// SPDX-License-Identifier: Apache-2.0

// Testsum runs a command that prints go test -json, shows it in few lines, and keeps the count over several runs.
//
//	testsum [-tally FILE] [-allow FILE] [-package NAME] -- COMMAND [ARG...]
//	testsum -total -tally FILE
//
// It prints a line per package, with the tests that took longest where it took a minute, all output of what
// failed, and every skip with its reason. With -package, COMMAND is a test binary run with -test.v=test2json, whose
// output is shown under that name; if it then ends with status 77, it could not run here, which counts as one skip.
// With -allow, a skip that no line of that file expects fails the run. With -total it prints "N passed, N failed,
// N skipped" of all runs so far.
//
// Exit status: 0 when all went well, 1 when a test or the command failed or a skip was not expected, 2 for a
// wrong use.
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
)

// cannotRun is the status by which a command says that what it needs is missing here.
const cannotRun = 77

func main() {
	tally := flag.String("tally", "", "add the counts to `file`")
	allow := flag.String("allow", "", "fail on skips that `file` does not expect")
	name := flag.String("package", "", "COMMAND is a test binary of the package `name`")
	total := flag.Bool("total", false, "print the counts in the tally file and exit")
	flag.Parse()
	if *total == (flag.NArg() > 0) || *total && *tally == "" {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*tally, *allow, *name, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
		os.Exit(1)
	}
}

func run(tally, allow, name string, command []string) error {
	if len(command) == 0 {
		return printTotal(os.Stdout, tally)
	}
	allowed, err := readAllowed(allow)
	if err != nil {
		return err
	}
	// An interrupt ends the command, which shares our process group; what it said until then is still told.
	signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	r := newReport(os.Stdout, allowed)
	failure := execute(r, name, command)
	r.finish()
	return errors.Join(failure, r.verdict(), r.counts.addTo(tally))
}

// execute runs the command and feeds the report. Its error is the command's, unless the report tells it better.
func execute(r *report, name string, command []string) error {
	cmd := exec.Command(command[0], command[1:]...)
	var tail lastLine
	cmd.Stderr = io.MultiWriter(os.Stderr, &tail)
	output, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", command[0], err)
	}
	readErr := feed(r, name, output)
	err = cmd.Wait()
	if name != "" && exitStatus(err) == cannotRun {
		r.skipPackage(name, tail.String())
		return readErr
	}
	if err != nil && r.failed() {
		err = nil
	}
	if err != nil {
		r.failRun(cmp.Or(name, strings.Join(command, " ")), err)
	}
	return readErr
}

// feed reads the command's output to its end, through test2json where it is that of a test binary.
func feed(r *report, name string, output io.Reader) error {
	if name == "" {
		return r.read(output)
	}
	convert := exec.Command("go", "tool", "test2json", "-t", "-p", name)
	convert.Stdin, convert.Stderr = output, os.Stderr
	events, err := convert.StdoutPipe()
	if err != nil {
		return err
	}
	if err := convert.Start(); err != nil {
		return fmt.Errorf("start go tool test2json: %w", err)
	}
	return errors.Join(r.read(events), convert.Wait())
}

func exitStatus(err error) int {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

// A lastLine keeps the last line that was written to it.
type lastLine struct{ text []byte }

// maxLine bounds what a lastLine keeps.
const maxLine = 4096

func (l *lastLine) Write(p []byte) (int, error) {
	l.text = append(l.text, p...)
	l.text = l.text[max(0, len(l.text)-maxLine):]
	return len(p), nil
}

func (l *lastLine) String() string {
	lines := strings.Split(strings.TrimSpace(string(l.text)), "\n")
	return lines[len(lines)-1]
}
