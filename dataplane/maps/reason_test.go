// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"

	"github.com/lace-net/lace/bpf"
)

// enumOf reads an enum out of the object's BTF: what the C source says.
func enumOf(t *testing.T, name string) []btf.EnumValue {
	t.Helper()
	spec, err := bpf.LoadLace()
	must(t, err)
	found, err := spec.Types.AnyTypeByName(name)
	must(t, err)
	enum, ok := found.(*btf.Enum)
	if !ok {
		t.Fatalf("%s is no enum: %v", name, found)
	}
	return enum.Values
}

// TestReasonsAreThoseOfC holds the table of words against the C enum, in order.
func TestReasonsAreThoseOfC(t *testing.T) {
	values := enumOf(t, "reason")
	last := values[len(values)-1]
	if last.Name != "REASON_MAX" || int(last.Value) != len(reasons) {
		t.Errorf("the enum ends with %s = %d, the table has %d words", last.Name, last.Value, len(reasons))
	}
	for i, v := range values[:len(values)-1] {
		if int(v.Value) != i {
			t.Errorf("%s is %d, want %d: numbers are appended, without gaps", v.Name, v.Value, i)
		}
		if want := strings.ToLower(strings.TrimPrefix(v.Name, "REASON_")); ReasonName(Reason(v.Value)) != want {
			t.Errorf("%s is called %q, want %q", v.Name, ReasonName(Reason(v.Value)), want)
		}
		if ReasonHelp(Reason(v.Value)) == "" {
			t.Errorf("%s has no help", v.Name)
		}
	}
}

// TestNumbersStay: agents of other versions read the counters.
func TestNumbersStay(t *testing.T) {
	for r, want := range map[Reason]string{0: "none", 1: "encapsulated", 7: "replicated", 11: "from_host", 12: "hop_limit", 17: "malformed", 28: "unknown_source", 44: "stage_missing", 50: "unknown_mac", 61: "translation_failed"} {
		if got := ReasonName(r); got != want {
			t.Errorf("reason %d is %q, was %q", r, got, want)
		}
	}
	if got := ReasonName(120); got != "reason_120" || ReasonHelp(120) == "" {
		t.Errorf("a reason of a newer version: %q, %q", got, ReasonHelp(120))
	}
	if IsRefusal(bpf.LaceReasonREASON_FROM_HOST) || !IsRefusal(bpf.LaceReasonREASON_HOP_LIMIT) {
		t.Error("the line between what goes on and what is refused has moved")
	}
}

var reasonRow = regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)` \\| ([^|]+) \\| ([^|]+) \\|$")

// TestReasonsAreDocumented parses the reference: each reason once, in order, with a meaning and a remedy.
func TestReasonsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/reasons.md")
	if os.IsNotExist(err) && os.Getenv("LACE_VM") != "" {
		t.Skip("the VM has this test binary only: the document is checked by go test on the host")
	}
	must(t, err)
	rows := reasonRow.FindAllStringSubmatch(string(text), -1)
	if len(rows) != len(reasons) {
		t.Errorf("docs/reasons.md has %d reasons, there are %d", len(rows), len(reasons))
	}
	for i, row := range rows {
		if want := ReasonName(Reason(i)); row[1] != want {
			t.Fatalf("reason %d of docs/reasons.md is %q, want %q", i, row[1], want)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
