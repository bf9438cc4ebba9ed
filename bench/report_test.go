// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReplaceTable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "performance.md")
	write(t, file, "before\n"+tableBegin+"old\n"+tableEnd+"after\n")
	for range 2 { // what was replaced once can be replaced again
		if err := replaceTable(file, "new\n"); err != nil {
			t.Fatal(err)
		}
		if got, want := read(t, file), "before\n"+tableBegin+"new\n"+tableEnd+"after\n"; got != want {
			t.Errorf("file is\n%s\nwant\n%s", got, want)
		}
	}
}

func TestReplaceTableKeepsAFileWithoutMarks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "other.md")
	write(t, file, "before\n"+tableBegin+"never ends\n")
	if err := replaceTable(file, "new\n"); err == nil || !strings.Contains(err.Error(), "it lacks the lines") {
		t.Errorf("error %v, want one about the lines", err)
	}
	if got := read(t, file); strings.Contains(got, "new") {
		t.Errorf("file became\n%s", got)
	}
}

// TestDocumentHasMarks makes sure that scripts/bench --doc has a place for its table.
func TestDocumentHasMarks(t *testing.T) {
	doc := read(t, "../docs/performance.md")
	_, rest, begins := strings.Cut(doc, tableBegin)
	if !begins || !strings.Contains(rest, tableEnd) {
		t.Errorf("docs/performance.md lacks the lines %q and %q", tableBegin, tableEnd)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
