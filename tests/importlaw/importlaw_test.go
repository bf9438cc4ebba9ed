// SPDX-License-Identifier: Apache-2.0

// Package importlaw holds the law of who may import whom.
package importlaw

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/lace-net/lace/"

// may says which rooms of the house a room imports itself; a room not named here may not be
// entered by the others. Rooms below a listed one, plugin/wire, have its law.
var may = map[string][]string{
	"topology":         {},
	"conf":             {"topology"},
	"bpf":              {},
	"dataplane/plan":   {"topology"},
	"dataplane/netdev": {"dataplane/plan", "topology"},
	"dataplane/maps":   {"dataplane/plan", "topology", "bpf"},
	"dataplane/hook":   {"dataplane/maps", "dataplane/plan", "topology", "bpf"}, // a program is loaded with its maps
	"dataplane/trace":  {"dataplane/plan", "topology", "bpf"},
	"dataplane": {
		"dataplane/netdev", "dataplane/maps", "dataplane/hook", "dataplane/trace",
		"dataplane/plan", "topology", "bpf",
	},
	"plugin":        {"topology", "dataplane/plan"},
	"cmd/lace-runc": {"plugin/wire"},
}

// only says which rooms import a foreign package.
var only = map[string][]string{
	"github.com/BurntSushi/toml":         {"topology"},
	"github.com/vishvananda/netlink":     {"dataplane/netdev"},
	"github.com/containerd/nri":          {"plugin", "cmd/lace"},
	"github.com/containerd/containerd":   {"plugin", "cmd/lace"},
	"github.com/cilium/ebpf":             {"bpf", "dataplane"},
	"github.com/mdlayher/sdnotify":       {"cmd/lace"},
	"github.com/opencontainers/runtime-": {"plugin", "cmd/lace"},
}

// pure are the rooms below which nothing touches a kernel.
var pure = []string{"topology", "dataplane/plan", "conf"}

type pkg struct {
	ImportPath string
	GoFiles    []string
	CgoFiles   []string
	Imports    []string
	Deps       []string
}

func (p pkg) room() string { return strings.TrimPrefix(p.ImportPath, module) }

func TestImportLaw(t *testing.T) {
	packages := list(t)
	for _, p := range packages {
		for _, problem := range check(p) {
			t.Error(problem)
		}
	}
	for _, room := range []string{"topology", "dataplane/plan", "cmd/lace"} {
		if !slices.ContainsFunc(packages, func(p pkg) bool { return p.room() == room }) {
			t.Errorf("no package %s: the law is not held where it matters", room)
		}
	}
}

// list has the product's packages, those of tests and benches left out.
func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,GoFiles,CgoFiles,Imports,Deps", "./...")
	cmd.Dir = "../.."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var packages []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		if product(p) {
			packages = append(packages, p)
		}
	}
}

// product leaves out what no user's host runs.
func product(p pkg) bool {
	first, _, _ := strings.Cut(p.room(), "/")
	return !slices.Contains([]string{"tests", "bench", "scripts"}, first) && len(p.GoFiles)+len(p.CgoFiles) > 0
}

func check(p pkg) []string {
	var problems []string
	for _, i := range p.Imports {
		if room, ok := strings.CutPrefix(i, module); ok && !allowed(p.room(), room) {
			problems = append(problems, p.room()+" imports "+room+": the import law forbids it")
		}
		if owners := owners(i); owners != nil && !slices.ContainsFunc(owners, func(o string) bool { return under(p.room(), o) }) {
			problems = append(problems, p.room()+" imports "+i+": only "+strings.Join(owners, ", ")+" may")
		}
	}
	if slices.Contains(pure, p.room()) {
		problems = append(problems, impure(p)...)
	}
	if p.room() == "cmd/lace-runc" {
		problems = append(problems, foreign(p)...)
	}
	return problems
}

// allowed says whether one room may import another. cmd/lace wires everything together.
func allowed(from, to string) bool {
	law := lawOf(from)
	return under(from, "cmd/lace") || law != "" && (lawOf(to) == law || slices.Contains(may[law], to))
}

// lawOf is the closest room at or above this one that has a law of its own.
func lawOf(room string) string {
	best := ""
	for r := range may {
		if under(room, r) && len(r) > len(best) {
			best = r
		}
	}
	return best
}

func under(room, above string) bool { return room == above || strings.HasPrefix(room, above+"/") }

// owners is nil for a package that everybody may import.
func owners(path string) []string {
	for prefix, rooms := range only {
		if strings.HasPrefix(path, prefix) {
			return rooms
		}
	}
	return nil
}

// impure lists what a pure room depends on, however indirectly, that could touch a kernel.
func impure(p pkg) []string {
	var problems []string
	for _, d := range p.Deps {
		if slices.Contains([]string{"net", "os/exec", "runtime/cgo"}, d) || strings.HasPrefix(d, "golang.org/x/sys") ||
			strings.HasPrefix(d, "github.com/cilium/") || strings.HasPrefix(d, "github.com/vishvananda/") {
			problems = append(problems, p.room()+" depends on "+d+": it is to be pure")
		}
	}
	return problems
}

// foreign lists what a program that has to start in milliseconds depends on beyond the standard library.
func foreign(p pkg) []string {
	var problems []string
	for _, d := range p.Deps {
		first, _, _ := strings.Cut(d, "/")
		if strings.Contains(first, ".") && !strings.HasPrefix(d, module) {
			problems = append(problems, p.room()+" depends on "+d+": it has the standard library only")
		}
	}
	return problems
}

// The law itself, seen to catch what it is for.
func TestLawCatches(t *testing.T) {
	for _, c := range []struct {
		pkg  pkg
		want string
	}{
		{pkg{ImportPath: module + "plugin", Imports: []string{module + "dataplane"}}, "plugin imports dataplane: the import law forbids it"},
		{pkg{ImportPath: module + "plugin/wire", Imports: []string{module + "dataplane/netdev"}}, "plugin/wire imports dataplane/netdev"},
		{pkg{ImportPath: module + "dataplane", Imports: []string{module + "plugin"}}, "dataplane imports plugin"},
		{pkg{ImportPath: module + "dataplane/netdev", Imports: []string{module + "dataplane/maps"}}, "dataplane/netdev imports dataplane/maps"},
		{pkg{ImportPath: module + "topology", Imports: []string{module + "dataplane/plan"}}, "topology imports dataplane/plan"},
		{pkg{ImportPath: module + "stranger", Imports: []string{module + "topology"}}, "stranger imports topology"},
		{pkg{ImportPath: module + "dataplane/maps", Imports: []string{"github.com/vishvananda/netlink"}}, "only dataplane/netdev may"},
		{pkg{ImportPath: module + "conf", Imports: []string{"github.com/BurntSushi/toml"}}, "only topology may"},
		{pkg{ImportPath: module + "dataplane/plan", Deps: []string{"golang.org/x/sys/unix"}}, "dataplane/plan depends on golang.org/x/sys/unix"},
		{pkg{ImportPath: module + "cmd/lace-runc", Deps: []string{"golang.org/x/sys/unix"}}, "it has the standard library only"},
	} {
		if got := strings.Join(check(c.pkg), "\n"); !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.pkg.room(), got, c.want)
		}
	}
}
