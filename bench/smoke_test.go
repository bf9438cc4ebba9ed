// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSmoke builds all beds and measures everything shortly. It says nothing about speed, only that
// every bed carries every kind of traffic, in both families, and that the report is whole. What does not
// depend on the family is measured once.
func TestSmoke(t *testing.T) {
	needRoot(t)
	bench, lace := build(t, "./bench"), build(t, "./cmd/lace")
	for family, metrics := range map[string][]string{"4": metricNames(), "6": trafficNames()} {
		t.Run("IPv"+family, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "rows.json")
			raw := filepath.Join(t.TempDir(), "raw.json")
			cmd := exec.Command(bench, "--smoke", "--family", family, "--metrics", strings.Join(metrics, ","),
				"--out", out, "--raw", raw, "--lace", lace)
			said, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("bench: %v\n%s", err, said)
			}
			checkRows(t, out, expectedRows(metrics))
			checkSamples(t, raw)
			nothingLeft(t)
		})
	}
}

// checkRows looks for every row once, with a figure that can be true.
func checkRows(t *testing.T, path string, want []string) {
	t.Helper()
	var rows []row
	readJSON(t, path, &rows)
	var got []string
	for _, r := range rows {
		got = append(got, r.Bed+" "+r.Metric+" "+r.Against)
		if !(r.Median > 0 || r.Median == 0 && r.Unit == unitRefused) || !(r.Q1 <= r.Median && r.Median <= r.Q3) || r.Rounds < 1 {
			t.Errorf("row %+v cannot be true", r)
		}
	}
	slices.Sort(got)
	if slices.Sort(want); !slices.Equal(got, want) {
		t.Errorf("rows are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func expectedRows(metrics []string) []string {
	var want []string
	for _, pair := range []string{
		"routed %s bare", "seg6 %s routed", "seg6 %s bare", "vxlan %s seg6", "vxlan %s routed", "vxlan %s bare",
		"lace-l3 %s vxlan", "lace-l3 %s seg6", "lace-l3 %s routed", "lace-l3 %s bare",
		"lace-l3-srh %s vxlan", "lace-l3-srh %s seg6", "lace-l3-srh %s routed", "lace-l3-srh %s bare",
		"lace-l2 %s vxlan", "lace-l2 %s seg6", "lace-l2 %s routed", "lace-l2 %s bare", "lace-l2 %s lace-l3",
		"lace-masq %s nft-masq", "lace-publish %s nft-dnat",
	} {
		for _, metric := range []string{"tcp", "rr", "udp", "crr"} { // spelt out: the names are promised
			want = append(want, fmt.Sprintf(pair, metric))
		}
	}
	for _, against := range []string{"vxlan", "seg6", "routed", "bare", "lace-l2"} {
		want = append(want, "lace-l2-segment tcp "+against)
	}
	if !slices.Contains(metrics, metricAttach) {
		return want
	}
	for _, program := range []string{"pod_l2", "pod_l2-v6", "uplink-l2"} {
		want = append(want, "lace-l2 ns/"+program+" empty")
	}
	for _, frame := range []string{"fdb", "fdb-drawn", "fdb-flow"} {
		want = append(want, "lace-l2 "+frame+"/10 ", "lace-l2 "+frame+"/10000 ", "lace-l2 "+frame+"/10000 ÷ 10 ")
	}
	want = append(want, "lace-l2 flood/node ", "lace-l2 flood/port ")
	for bed, programs := range map[string][]string{
		"lace-l3":      {"pod_l3", "pod_l3-v6", "uplink", "uplink-v6", "uplink-host"},
		"lace-masq":    {"pod_l3-masquerade", "pod_l3-masquerade-v6", "uplink-masquerade", "uplink-masquerade-v6", "uplink-host", "outer-host"},
		"lace-publish": {"pod_l3-publish", "pod_l3-publish-v6", "uplink-publish", "uplink-publish-v6"},
	} {
		for _, program := range programs {
			want = append(want, bed+" ns/"+program+" empty")
		}
	}
	want = append(want, "lace-masq masquerade/at-once ", "lace-masq masquerade/opened ", "lace-masq masquerade/refused ")
	for _, n := range []string{"1", "10", "100"} {
		want = append(want, "lace-l3 attach/"+n+" ", "lace-l3 attach-p99/"+n+" ")
	}
	for _, row := range []string{"flows/1000 ", "flows/10000 ", "flows/10000 ÷ 1000 ", "collect/10000 ", "apply/large ", "apply/again ", "apply/back "} {
		want = append(want, "lace-l3 "+row)
	}
	return append(want, "lace-l3 rss/100 ")
}

func checkSamples(t *testing.T, path string) {
	t.Helper()
	var rec record
	readJSON(t, path, &rec)
	for _, m := range trafficNames() {
		for _, b := range bedNames() {
			want := 2
			if b == "lace-l2-segment" && m != "tcp" {
				want = 0
			}
			if n := len(rec.Samples[m][b]); n != want {
				t.Errorf("%d samples of %s on %s, want %d", n, m, b, want)
			}
		}
	}
}

// TestInterrupt ends a bench in the middle and looks for what it leaves.
func TestInterrupt(t *testing.T) {
	needRoot(t)
	cmd := exec.Command(build(t, "./bench"), "--beds", "bare,lace-l3", "--metrics", "rr", "--out", filepath.Join(t.TempDir(), "rows.json"))
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(2*time.Minute, func() { cmd.Process.Kill() })
	defer kill.Stop()
	said := new(bytes.Buffer)
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		fmt.Fprintln(said, lines.Text())
		if strings.Contains(lines.Text(), "round 1 of") {
			if err := cmd.Process.Signal(unix.SIGINT); err != nil {
				t.Error(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("an interrupted bench ended with %v, want exit status 1:\n%s", err, said)
	}
	nothingLeft(t)
}

// nothingLeft looks for namespaces, directories and processes of a bench.
func nothingLeft(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{filepath.Join(netnsDir, netnsPrefix+"*"), filepath.Join(os.TempDir(), netnsPrefix+"*")} {
		left, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		if len(left) > 0 {
			t.Errorf("left behind: %s", strings.Join(left, " "))
		}
	}
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range lines {
		b, _ := os.ReadFile(f) // a process may end meanwhile
		if words := strings.Split(string(b), "\x00"); slices.Contains(words, "--topology") && strings.Contains(string(b), netnsPrefix) {
			t.Errorf("left running: %s", strings.Join(words, " "))
		}
	}
}

func TestRefusesBadFlags(t *testing.T) {
	for args, want := range map[string]string{
		"--beds bare,magic":         `unknown bed "magic"; there are bare, `,
		"--beds bare,bare":          `bed "bare" is given twice`,
		"--metrics speed":           `unknown metric "speed"; there are tcp, `,
		"--wire wet":                `unknown wire "wet"; there are nic, none, sw, tso`,
		"--family 5":                "--family 5 is no IP version",
		"--rounds 0":                "--rounds 0 is out of range",
		"--sample 1ms":              "--sample 1ms is out of range",
		"--metrics attach --lace /": "--lace / is no program",
		"--metrics ns --beds bare":  "ns is measured on lace-l3, lace-l2, lace-masq, lace-publish; add one to --beds",
		"--metrics rr now":          `unexpected argument "now"`,
		"--metrics rr --cpu x":      `invalid value "x" for flag -cpu`,
	} {
		_, err := parseOptions(strings.Fields(args), new(bytes.Buffer))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("bench %s: %v, want %q", args, err, want)
		}
		if err != nil && exitCode(err) != 2 {
			t.Errorf("bench %s: exit status %d, want 2", args, exitCode(err))
		}
	}
}

// build compiles a command of the module into a directory of the test.
func build(t *testing.T, pkg string) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", bin, pkg)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, out)
	}
	return bin
}

func readJSON(t *testing.T, path string, v any) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces: run the tests as root")
	}
}
