// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"
)

// An event is a line of go test -json; see go doc test2json.
type event struct {
	Action     string
	Package    string
	ImportPath string // in place of Package while building
	Test       string
	Elapsed    float64 // seconds
	Output     string
}

// A testID names a test; one without a name is its package.
type testID struct{ pkg, test string }

func (id testID) String() string { return strings.TrimSuffix(id.pkg+" "+id.test, " ") }

// A report turns events into lines for people, and counts.
type report struct {
	out     io.Writer
	allowed allowList
	counts  counts
	refused int // skips that nobody expects

	output  map[testID][]string // of what has not ended
	running map[testID]bool     // tests that began and did not end
	perPkg  map[string]*tests
	spoken  time.Time // when the last line was printed
}

// tests are those of a package so far.
type tests struct {
	counts
	skips []skips
	took  []took
}

// skips are expected ones for one reason.
type skips struct {
	why  string
	what []string
}

// took is how long a test did, with its subtests.
type took struct {
	test    string
	seconds float64
}

// A package that takes longer than slow tells which tests are to be blamed for it, so many of them.
const (
	slow    = 60 * time.Second
	slowest = 5
)

// quiet is how long a report says nothing before it names the tests that are running.
const quiet = 30 * time.Second

func newReport(out io.Writer, allowed allowList) *report {
	return &report{
		out: out, allowed: allowed, spoken: time.Now(),
		output: map[testID][]string{}, running: map[testID]bool{}, perPkg: map[string]*tests{},
	}
}

// read reports the events in r until its end.
func (r *report) read(in io.Reader) error {
	lines, failure := scan(in)
	beat := time.NewTicker(time.Second)
	defer beat.Stop()
	for {
		select {
		case line, more := <-lines:
			if !more {
				return <-failure
			}
			r.line(line)
		case <-beat.C:
			r.beat()
		}
	}
}

func scan(in io.Reader) (<-chan string, <-chan error) {
	lines, failure := make(chan string), make(chan error, 1)
	go func() {
		defer close(lines)
		reader := bufio.NewReader(in)
		for {
			line, err := reader.ReadString('\n')
			if line != "" {
				lines <- strings.TrimSuffix(line, "\n")
			}
			if err != nil {
				failure <- ignoreEOF(err)
				return
			}
		}
	}()
	return lines, failure
}

func ignoreEOF(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

// line reports one line; what is no event is passed on as it is.
func (r *report) line(line string) {
	var e event
	if !strings.HasPrefix(line, "{") || json.Unmarshal([]byte(line), &e) != nil || e.Action == "" {
		r.print("%s", line)
		return
	}
	r.event(e)
}

func (r *report) event(e event) {
	id := testID{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		r.print("    %s", strings.TrimSuffix(e.Output, "\n"))
	case "run":
		r.running[id] = true
	case "output":
		r.output[id] = append(r.output[id], e.Output)
	case "pass", "fail", "skip":
		r.end(id, e)
	}
}

func (r *report) end(id testID, e event) {
	if id.test == "" {
		r.endPackage(id, e)
		return
	}
	if !strings.Contains(id.test, "/") {
		r.of(id.pkg).took = append(r.of(id.pkg).took, took{id.test, e.Elapsed})
	}
	switch e.Action {
	case "pass":
		r.of(id.pkg).Passed++
	case "fail":
		r.fail(id, fmt.Sprintf(" (%.2f s)", e.Elapsed))
	case "skip":
		r.skip(id, reason(r.output[id]))
	}
	r.forget(id)
}

func (r *report) of(pkg string) *tests {
	if r.perPkg[pkg] == nil {
		r.perPkg[pkg] = &tests{}
	}
	return r.perPkg[pkg]
}

func (r *report) forget(id testID) {
	delete(r.output, id)
	delete(r.running, id)
}

func (r *report) fail(id testID, note string) {
	r.of(id.pkg).Failed++
	r.print("FAIL %s%s", id, note)
	for _, text := range r.output[id] {
		r.print("    %s", strings.TrimSuffix(text, "\n"))
	}
}

// skip tells one that is not expected at once, others with their package.
func (r *report) skip(id testID, why string) {
	t := r.of(id.pkg)
	t.Skipped++
	if !r.allowed.expects(fmt.Sprintf("%s: %s", id, why)) {
		r.refused++
		r.print("SKIP %s: %s", id, why)
		r.print("    this skip is not on the list of those that are expected")
		return
	}
	i := slices.IndexFunc(t.skips, func(s skips) bool { return s.why == why })
	if i < 0 {
		i = len(t.skips)
		t.skips = append(t.skips, skips{why: why})
	}
	t.skips[i].what = append(t.skips[i].what, id.test)
}

func (r *report) tellSkips(pkg string) {
	for _, s := range r.of(pkg).skips {
		r.print("SKIP %s: %s", testID{pkg, strings.Join(s.what, ", ")}, s.why)
	}
}

// skipPackage counts a package none of whose tests could run.
func (r *report) skipPackage(pkg, why string) {
	id := testID{pkg: pkg}
	r.forget(id)
	r.perPkg[pkg] = &tests{}
	r.skip(id, why)
	r.tellSkips(pkg)
	r.close(pkg)
}

// endPackage closes a package. One that failed with no failed test (it did not build, it panicked, TestMain
// failed) counts as one failure.
func (r *report) endPackage(id testID, e event) {
	if e.Action == "fail" {
		r.failUnended(id.pkg)
		if r.of(id.pkg).Failed == 0 {
			r.fail(id, "")
		}
	}
	r.forget(id)
	c := r.perPkg[id.pkg]
	if c == nil {
		return // it has no tests
	}
	word := "ok  "
	if c.Failed > 0 {
		word = "FAIL"
	}
	r.tellSkips(id.pkg)
	r.print("%s %s: %s (%.1f s%s)", word, id.pkg, c.counts, e.Elapsed, c.slowest(e.Elapsed))
	r.close(id.pkg)
}

// slowest names the tests that took longest, of a package that took that many seconds.
func (t *tests) slowest(seconds float64) string {
	if seconds < slow.Seconds() {
		return ""
	}
	slices.SortStableFunc(t.took, func(a, b took) int { return cmp.Compare(b.seconds, a.seconds) })
	names := make([]string, 0, slowest)
	for _, one := range t.took[:min(slowest, len(t.took))] {
		names = append(names, fmt.Sprintf("%s %.0f", one.test, one.seconds))
	}
	return "; slowest: " + strings.Join(names, ", ")
}

// failUnended fails the tests that were running when their package ended.
func (r *report) failUnended(pkg string) {
	for _, id := range r.runningTests() {
		if id.pkg == pkg {
			r.fail(id, " did not end")
			r.forget(id)
		}
	}
}

func (r *report) runningTests() []testID {
	ids := make([]testID, 0, len(r.running))
	for id := range r.running {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b testID) int { return strings.Compare(a.String(), b.String()) })
	return ids
}

func (r *report) close(pkg string) {
	r.counts.add(r.perPkg[pkg].counts)
	delete(r.perPkg, pkg)
}

// failRun counts a command that failed although no test of it did.
func (r *report) failRun(command string, err error) {
	r.counts.Failed++
	r.print("FAIL %s: %v", command, err)
}

// finish closes the packages whose end was never told, because the command died: they failed.
func (r *report) finish() {
	for id := range r.output {
		r.of(id.pkg)
	}
	open := make([]string, 0, len(r.perPkg))
	for pkg := range r.perPkg {
		open = append(open, pkg)
	}
	slices.Sort(open)
	for _, pkg := range open {
		r.endPackage(testID{pkg: pkg}, event{Action: "fail"})
	}
}

func (r *report) failed() bool {
	failed := r.counts.Failed
	for _, c := range r.perPkg {
		failed += c.Failed
	}
	return failed > 0
}

func (r *report) verdict() error {
	switch {
	case r.counts.Failed > 0:
		return fmt.Errorf("%d failed", r.counts.Failed)
	case r.refused > 0:
		return fmt.Errorf("%d skips that nobody expects; make them run, or add them with the reason to the list", r.refused)
	}
	return nil
}

func (r *report) print(format string, args ...any) {
	fmt.Fprintf(r.out, format+"\n", args...)
	r.spoken = time.Now()
}

// beat names what is running when nothing was printed for a while.
func (r *report) beat() {
	if time.Since(r.spoken) < quiet {
		return
	}
	names := []string{}
	for _, id := range r.runningTests() {
		names = append(names, id.String())
	}
	if len(names) == 0 {
		names = []string{"building, or waiting for the first test"}
	}
	r.print("... %s", strings.Join(names, ", "))
}

// position is what t.Skip puts before the reason.
var position = regexp.MustCompile(`^\s+[\w.-]+\.go:\d+: `)

// reason finds in the output of a skipped test what it said last.
func reason(output []string) string {
	text := []string{}
	for _, line := range output {
		line = strings.TrimRight(line, "\n")
		if isFrame(line) {
			continue
		}
		if position.MatchString(line) {
			text, line = text[:0], position.ReplaceAllString(line, "")
		}
		text = append(text, strings.TrimSpace(line))
	}
	if len(text) == 0 {
		return "no reason given"
	}
	return strings.Join(text, " ")
}

// isFrame tells the lines that the testing package itself prints.
func isFrame(line string) bool {
	line = strings.TrimSpace(strings.Trim(line, "\x16"))
	return line == "" || strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- ")
}
