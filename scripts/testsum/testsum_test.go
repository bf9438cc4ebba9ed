// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	for name, c := range map[string]struct {
		events  string
		allowed allowList
		want    counts
		says    []string
		silent  []string
		verdict string
	}{
		"passes": {
			events: `{"Action":"start","Package":"p"}
				{"Action":"run","Package":"p","Test":"TestA"}
				{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: chatter\n"}
				{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0.1}
				{"Action":"pass","Package":"p","Elapsed":0.2}`,
			want: counts{Passed: 1}, says: []string{"ok   p: 1 passed, 0 failed, 0 skipped (0.2 s)"}, silent: []string{"chatter"},
		},
		"a failure shows its output": {
			events: `{"Action":"run","Package":"p","Test":"TestA"}
				{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: broken\n"}
				{"Action":"fail","Package":"p","Test":"TestA","Elapsed":0.1}
				{"Action":"fail","Package":"p","Elapsed":0.2}`,
			want: counts{Failed: 1}, says: []string{"FAIL p TestA (0.10 s)", "a_test.go:1: broken", "FAIL p: "}, verdict: "1 failed",
		},
		"a skip shows its reason": {
			events: `{"Action":"run","Package":"p","Test":"TestA"}
				{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
				{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: first log\n"}
				{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:2: no VRF here\n"}
				{"Action":"output","Package":"p","Test":"TestA","Output":"--- SKIP: TestA (0.00s)\n"}
				{"Action":"skip","Package":"p","Test":"TestA"}
				{"Action":"pass","Package":"p"}`,
			want: counts{Skipped: 1}, says: []string{"SKIP p TestA: no VRF here\n"}, silent: []string{"first log"},
		},
		"skips for one reason": {
			events: skip("TestA", "no VRF here") + skip("TestB", "no tun here") + skip("TestC", "no VRF here") + `{"Action":"pass","Package":"p"}`,
			want:   counts{Skipped: 3}, says: []string{"SKIP p TestA, TestC: no VRF here\nSKIP p TestB: no tun here\nok "},
		},
		"what took a minute": {
			events: `{"Action":"pass","Package":"p","Test":"TestA/sub","Elapsed":59}
				{"Action":"pass","Package":"p","Test":"TestA","Elapsed":1}
				{"Action":"pass","Package":"p","Test":"TestB","Elapsed":58.7}
				{"Action":"pass","Package":"p","Elapsed":60}`,
			want: counts{Passed: 3}, says: []string{"0 skipped (60.0 s; slowest: TestB 59, TestA 1)"},
		},
		"an expected skip": {
			events:  skipped("no VRF here"),
			allowed: allowList{regexp.MustCompile("no VRF")},
			want:    counts{Skipped: 1},
		},
		"a skip that is not expected": {
			events:  skipped("too tired"),
			allowed: allowList{regexp.MustCompile("no VRF")},
			want:    counts{Skipped: 1}, says: []string{"not on the list"}, verdict: "nobody expects",
		},
		"a package that does not build": {
			events: `{"ImportPath":"p [p.test]","Action":"build-output","Output":"p/a.go:1:1: syntax error\n"}
				{"ImportPath":"p [p.test]","Action":"build-fail"}
				{"Action":"output","Package":"p","Output":"FAIL\tp [build failed]\n"}
				{"Action":"fail","Package":"p","Elapsed":0,"FailedBuild":"p [p.test]"}`,
			want: counts{Failed: 1}, says: []string{"syntax error", "FAIL p"}, verdict: "1 failed",
		},
		"a package that ends amid a test": {
			events: `{"Action":"run","Package":"p","Test":"TestA"}
				{"Action":"output","Package":"p","Test":"TestA","Output":"killed\n"}
				{"Action":"fail","Package":"p"}`,
			want: counts{Failed: 1}, says: []string{"FAIL p TestA did not end", "killed"}, verdict: "1 failed",
		},
		"a stream that ends amid a package": {
			events: `{"Action":"run","Package":"p","Test":"TestA"}
				{"Action":"output","Package":"p","Test":"TestA","Output":"working\n"}`,
			want: counts{Failed: 1}, says: []string{"FAIL p TestA did not end"}, verdict: "1 failed",
		},
		"a package without tests": {
			events: `{"Action":"output","Package":"p","Output":"?   \tp\t[no test files]\n"}
				{"Action":"skip","Package":"p"}`,
			silent: []string{"p"},
		},
		"a line that is no event": {events: "hello {}", says: []string{"hello {}\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			r := newReport(&out, c.allowed)
			if err := r.read(strings.NewReader(strings.ReplaceAll(c.events, "\t", ""))); err != nil {
				t.Fatal(err)
			}
			r.finish()
			if r.counts != c.want {
				t.Errorf("counts %v, want %v", r.counts, c.want)
			}
			check(t, out.String(), c.says, c.silent)
			checkError(t, r.verdict(), c.verdict)
		})
	}
}

func skipped(why string) string { return skip("TestA", why) + `{"Action":"pass","Package":"p"}` }

func skip(test, why string) string {
	return `{"Action":"output","Package":"p","Test":"` + test + `","Output":"    a_test.go:2: ` + why + `\n"}
		{"Action":"skip","Package":"p","Test":"` + test + `"}
`
}

func check(t *testing.T, out string, says, silent []string) {
	t.Helper()
	for _, s := range says {
		if !strings.Contains(out, s) {
			t.Errorf("says %q, want %q in it", out, s)
		}
	}
	for _, s := range silent {
		if strings.Contains(out, s) {
			t.Errorf("says %q, want no %q in it", out, s)
		}
	}
}

func checkError(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("error %v, want %q", err, want)
	}
}

// TestExecute runs real commands: their status counts where their output says too little.
func TestExecute(t *testing.T) {
	passed := `printf '=== RUN   TestA\n--- PASS: TestA (0.00s)\nPASS\n'`
	for name, c := range map[string]struct {
		pkg, script string
		want        counts
		says        []string
	}{
		"test binary":             {"p", passed, counts{Passed: 1}, []string{"ok   p"}},
		"passes, then dies":       {"p", passed + "; exit 3", counts{Passed: 1, Failed: 1}, []string{"exit status 3"}},
		"cannot run":              {"p", "echo 'SKIP: no qemu' >&2; exit 77", counts{Skipped: 1}, []string{"SKIP p: SKIP: no qemu"}},
		"nothing, and dies":       {"p", "exit 125", counts{Failed: 1}, []string{"FAIL p"}},
		"go test, bad flag":       {"", "echo 'flag provided but not defined'; exit 2", counts{Failed: 1}, []string{"exit status 2"}},
		"77 is a failure without": {"", "exit 77", counts{Failed: 1}, []string{"exit status 77"}},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			r := newReport(&out, nil)
			if err := execute(r, c.pkg, []string{"sh", "-c", c.script}); err != nil {
				t.Fatal(err)
			}
			r.finish()
			if r.counts != c.want {
				t.Errorf("counts %v, want %v", r.counts, c.want)
			}
			check(t, out.String(), c.says, nil)
		})
	}
}

func TestCountsAddUpInAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tally")
	for _, c := range []counts{{Passed: 1}, {Passed: 2, Failed: 3}, {Skipped: 4}} {
		if err := c.addTo(file); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if err := printTotal(&out, file); err != nil {
		t.Fatal(err)
	}
	if want := "3 passed, 3 failed, 4 skipped\n"; out.String() != want {
		t.Errorf("total %q, want %q", out.String(), want)
	}
}

func TestReadAllowed(t *testing.T) {
	for name, c := range map[string]struct {
		content string
		want    int
		err     string
	}{
		"comments and empty lines": {"# why\n\n", 0, ""},
		"patterns":                 {"no VRF -- the VM has it\nq.*r -- another\n", 2, ""},
		"no why":                   {"\nno VRF\n", 0, ":2: \"no VRF\" says no why"},
		"bad pattern":              {"( -- why\n", 0, "missing closing )"},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "allowed")
			if err := os.WriteFile(file, []byte(c.content), 0o600); err != nil {
				t.Fatal(err)
			}
			list, err := readAllowed(file)
			checkError(t, err, c.err)
			if err == nil && (len(list) != c.want || list == nil) {
				t.Errorf("%d patterns (%v), want %d", len(list), list, c.want)
			}
		})
	}
}

// The list in the tree is one that readAllowed takes.
func TestTheListOfThisTree(t *testing.T) {
	if _, err := readAllowed("../allowed-skips"); err != nil {
		t.Error(err)
	}
}
