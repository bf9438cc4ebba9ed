// SPDX-License-Identifier: Apache-2.0

// Package lab brings labs up by the lace program and looks at what is there, and at what is left.
package lab

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const patience = 30 * time.Second

// lace is the program under test, built once; lace-runc lies beside it.
var lace string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "lace-lab-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	lace = filepath.Join(dir, "lace")
	build := exec.Command("go", "build", "-o", dir, "github.com/lace-net/lace/cmd/lace", "github.com/lace-net/lace/cmd/lace-runc")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build lace and lace-runc: %v\n%s", err, output)
		return 1
	}
	return m.Run()
}

func needLab(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a lab makes network and mount namespaces: run as root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("the underlay is made by the ip tool: install the package iproute2")
	}
}

// labName is one that nobody else has on this machine, now.
func labName(suffix string) string { return fmt.Sprintf("t%d%s", os.Getpid(), suffix) }

const head = `version = 1
[underlay]
locator-block = "5f00:1ace::/32"
[network.backend]
type = "l3"
id = 100
subnets = ["10.40.0.0/16"]
block-size = { v4 = 24 }
`

const oneLink = head + `
[node.edge-1]
underlay = "fd00:a::1"
locator = "5f00:1ace:1::/48"
[node.edge-2]
underlay = "fd00:a::2"
locator = "5f00:1ace:2::/48"
[node.edge-3]
underlay = "fd00:a::3"
locator = "5f00:1ace:3::/48"
uplinks = ["up0", "up1"]
`

const racks = head + `
[node.edge-1]
underlay = "fd00:a:1::1"
locator = "5f00:1ace:1::/48"
via = "fd00:a:1::fe"
[node.edge-2]
underlay = "fd00:a:2::1"
locator = "5f00:1ace:2::/48"
[node.edge-3]
underlay = "fd00:a:2::2"
locator = "5f00:1ace:3::/48"
via = "fd00:a:2::fe"
`

func topologyFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "topology.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// run runs lace and returns what it printed, on both streams.
func runLace(args ...string) (string, error) {
	output, err := exec.Command(lace, args...).CombinedOutput()
	return strings.TrimSpace(string(output)), err
}

func mustRun(t *testing.T, args ...string) string {
	t.Helper()
	output, err := runLace(args...)
	if err != nil {
		t.Fatalf("lace %s: %v\n%s", strings.Join(args, " "), err, output)
	}
	return output
}

// up brings a bare lab up and sees to it that it goes.
func up(t *testing.T, name, text string, flags ...string) {
	t.Helper()
	t.Cleanup(func() {
		if output, err := runLace("lab", "down", "--name", name); err != nil {
			t.Errorf("clean up: %v\n%s", err, output)
		}
	})
	args := append([]string{"lab", "up", topologyFile(t, text), "--name", name, "--no-containerd", "--no-agent"}, flags...)
	mustRun(t, args...)
}

// in runs a shell line in a node.
func in(t *testing.T, name, node, line string) string {
	t.Helper()
	return mustRun(t, "lab", "exec", "--name", name, node, "--", "sh", "-c", line)
}

// wantNothing looks for all that a lab can leave.
func wantNothing(t *testing.T, name string) {
	t.Helper()
	for what, left := range map[string][]string{
		"network namespaces": glob("/run/netns/lace-" + name + "*"),
		"files":              glob("/run/lace-lab/" + name),
		"cgroups":            cgroupsOf(name),
		"mounts":             linesWith(t, "/proc/self/mountinfo", "lace-"+name, "lace-lab/"+name),
		"processes":          processesOf(name),
	} {
		if len(left) > 0 {
			t.Errorf("%s left behind: %q", what, left)
		}
	}
}

func glob(pattern string) []string {
	found, _ := filepath.Glob(pattern)
	return found
}

func cgroupsOf(name string) []string {
	var found []string
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasSuffix(path, "/lace-lab/"+name) {
			found = append(found, path)
		}
		return nil
	})
	return found
}

func linesWith(t *testing.T, path string, words ...string) []string {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var found []string
	for lines := bufio.NewScanner(file); lines.Scan(); {
		for _, word := range words {
			if strings.Contains(lines.Text(), word) {
				found = append(found, lines.Text())
			}
		}
	}
	return found
}

// processesOf finds the first processes of nodes by their command lines. Others cannot outlive them.
func processesOf(name string) []string {
	var found []string
	for _, path := range glob("/proc/[0-9]*/cmdline") {
		line, _ := os.ReadFile(path)
		words := strings.Split(string(line), "\x00")
		if len(words) > 4 && words[2] == "__node" && words[3] == name {
			found = append(found, path)
		}
	}
	return found
}

func poll(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

func TestNodesOnOneLink(t *testing.T) {
	needLab(t)
	name := labName("a")
	up(t, name, oneLink, "--mtu", "1600")
	for _, node := range []string{"edge-1", "edge-2", "edge-3"} {
		if got := in(t, name, node, "hostname"); got != node {
			t.Errorf("host name %q of %s", got, node)
		}
		if got := in(t, name, node, "cat /etc/lace/topology.toml"); got != strings.TrimSpace(oneLink) {
			t.Errorf("the topology of %s is %q", node, got)
		}
		for _, peer := range []string{"fd00:a::1", "fd00:a::2", "fd00:a::3"} {
			in(t, name, node, "ping -6 -c 1 -W 5 -M do -s 1552 "+peer) // 1600 with the headers
		}
	}
	links := in(t, name, "edge-3", "ls /sys/class/net")
	if strings.Join(strings.Fields(links), " ") != "lo up0 up1" {
		t.Errorf("edge-3 has %q in its sysfs", links)
	}
	if got := in(t, name, "edge-1", "stat -f -c %T /sys/fs/bpf /run"); strings.Join(strings.Fields(got), " ") != "bpf_fs tmpfs" {
		t.Errorf("file systems: %q", got)
	}
	mustRun(t, "lab", "down", "--name", name)
	wantNothing(t, name)
}

func TestNodesAreApart(t *testing.T) {
	needLab(t)
	name := labName("b")
	up(t, name, oneLink)
	in(t, name, "edge-1", "mkdir /sys/fs/bpf/mine && touch /run/mine /etc/lace/mine")
	if got := in(t, name, "edge-2", "ls /sys/fs/bpf /run /etc/lace"); strings.Contains(got, "mine") {
		t.Errorf("edge-2 sees what edge-1 made: %q", got)
	}
	for _, path := range []string{"/sys/fs/bpf/mine", "/run/mine", "/etc/lace/mine"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is on the machine itself", path)
		}
	}
	if got := in(t, name, "edge-1", "cat /proc/1/cmdline | tr '\\0' ' '"); !strings.Contains(got, "__node "+name+" edge-1") {
		t.Errorf("process 1 of the node is %q", got)
	}
}

func TestRoutedUnderlay(t *testing.T) {
	needLab(t)
	if output, err := runLace("lab", "up", topologyFile(t, racks), "--name", labName("c"), "--no-containerd", "--no-agent"); err == nil || !strings.Contains(output, "--routed") {
		t.Errorf("nodes without a common link came up on one: %v\n%s", err, output)
	}
	name := labName("c")
	up(t, name, racks, "--routed")
	for _, node := range []string{"edge-1", "edge-2", "edge-3"} {
		for _, peer := range []string{"fd00:a:1::1", "fd00:a:2::1", "fd00:a:2::2"} {
			in(t, name, node, "ping -6 -c 1 -W 5 "+peer)
		}
	}
	// A hop limit of 1 ends at the router: nobody is on the link, not even in the same /64.
	if got, err := runLace("lab", "exec", "--name", name, "edge-2", "--", "ping", "-6", "-c", "1", "-W", "5", "-t", "1", "fd00:a:2::2"); err == nil {
		t.Errorf("edge-3 is reached without a hop: %s", got)
	}
	if got := in(t, name, "edge-1", "ip -6 route show default"); !strings.Contains(got, "via fd00:a:1::fe dev eth0") {
		t.Errorf("default route of edge-1: %q", got)
	}
	if got := in(t, name, "edge-2", "ip -6 route show default"); !strings.Contains(got, "via fe80::1 dev eth0") {
		t.Errorf("default route of edge-2: %q", got)
	}
	// The router knows the way to every locator.
	in(t, name, "edge-3", "ip -6 address add 5f00:1ace:3::1/128 dev lo")
	in(t, name, "edge-1", "ping -6 -c 1 -W 5 5f00:1ace:3::1")
	mustRun(t, "lab", "down", "--name", name)
	wantNothing(t, name)
}

func TestExecPassesThrough(t *testing.T) {
	needLab(t)
	name := labName("d")
	up(t, name, oneLink)
	for _, tt := range []struct {
		line   string
		status int
	}{{"exit 0", 0}, {"exit 42", 42}, {"kill -TERM $$", 143}} {
		_, err := runLace("lab", "exec", "--name", name, "edge-1", "--", "sh", "-c", tt.line)
		if got := statusOf(err); got != tt.status {
			t.Errorf("%s: status %d, want %d", tt.line, got, tt.status)
		}
	}
	if output, err := runLace("lab", "exec", "--name", name, "edge-1", "--", "no-such-program"); statusOf(err) != 127 {
		t.Errorf("an unknown program: %v, %s", err, output)
	}
	if output, err := runLace("lab", "exec", "--name", name, "edge-9", "--", "true"); statusOf(err) != 1 || !strings.Contains(output, "edge-1, edge-2, edge-3") {
		t.Errorf("an unknown node: %v, %s", err, output)
	}
	cmd := exec.Command(lace, "lab", "exec", "--name", name, "edge-1", "--", "sh", "-c", "cat; echo to stderr >&2")
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader("through"), &stdout, &stderr
	if err := cmd.Run(); err != nil || stdout.String() != "through" || stderr.String() != "to stderr\n" {
		t.Errorf("got %q, %q, %v", stdout.String(), stderr.String(), err)
	}
}

func statusOf(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

// However the command outside ends, nothing of it goes on inside.
func TestExecEndsWithItsCaller(t *testing.T) {
	needLab(t)
	name := labName("e")
	up(t, name, oneLink)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		cmd := exec.Command(lace, "lab", "exec", "--name", name, "edge-1", "--", "sleep", "7654")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		sleeps := func() bool {
			output, err := runLace("lab", "exec", "--name", name, "edge-1", "--", "sh", "-c", "cat /proc/[0-9]*/comm")
			return err == nil && strings.Contains(output, "sleep")
		}
		poll(t, "the command runs", sleeps)
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		poll(t, "the command has ended after "+sig.String(), func() bool { return !sleeps() })
	}
}

func TestTwoLabsAtOnce(t *testing.T) {
	needLab(t)
	one, two := labName("f"), labName("g")
	up(t, one, oneLink)
	up(t, two, oneLink)
	in(t, one, "edge-1", "ip -6 address add fd00:a::77/64 dev eth0 nodad")
	if _, err := runLace("lab", "exec", "--name", two, "edge-2", "--", "ping", "-6", "-c", "1", "-W", "1", "fd00:a::77"); err == nil {
		t.Error("one lab reaches the other")
	}
	mustRun(t, "lab", "down", "--name", one)
	wantNothing(t, one)
	in(t, two, "edge-1", "ping -6 -c 1 -W 5 fd00:a::2")
	mustRun(t, "lab", "down", "--name", two)
	wantNothing(t, two)
}

// The namespaces of a lab end with it, though another lab was made while its names were mounted.
func TestNoLabHoldsAnothersNamespaces(t *testing.T) {
	needLab(t)
	one, two := labName("h"), labName("i")
	up(t, one, oneLink)
	fabric := inode(t, "/run/netns/lace-"+one+".fabric")
	up(t, two, oneLink)
	for _, node := range []string{"edge-1", "edge-2", "edge-3"} {
		if held := in(t, two, node, "cat /proc/self/mountinfo"); strings.Contains(held, fmt.Sprintf("net:[%d]", fabric)) {
			t.Errorf("%s of the second lab holds the first one's underlay:\n%s", node, held)
		}
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var stat syscall.Stat_t
	if err := syscall.Stat(path, &stat); err != nil {
		t.Fatal(err)
	}
	return stat.Ino
}

func TestUpTwiceIsRefused(t *testing.T) {
	needLab(t)
	name := labName("j")
	up(t, name, oneLink)
	output, err := runLace("lab", "up", topologyFile(t, oneLink), "--name", name, "--no-containerd", "--no-agent")
	if err == nil || !strings.Contains(output, "already up") || !strings.Contains(output, "lace lab down --name "+name) {
		t.Errorf("got %v: %s", err, output)
	}
	in(t, name, "edge-1", "ping -6 -c 1 -W 5 fd00:a::2") // and the first is unharmed
	if output := mustRun(t, "lab", "status", "--name", name); strings.Count(output, " up ") != 3 {
		t.Errorf("status: %s", output)
	}
	mustRun(t, "lab", "down", "--name", name)
	if output := mustRun(t, "lab", "down", "--name", name); !strings.Contains(output, "not there") {
		t.Errorf("down twice: %s", output)
	}
}

func TestFailingUpTakesAllDown(t *testing.T) {
	needLab(t)
	name := labName("k")
	// Two uplinks of one name: the second cannot be made.
	text := strings.Replace(oneLink, `["up0", "up1"]`, `["up0", "lo"]`, 1)
	output, err := runLace("lab", "up", topologyFile(t, text), "--name", name, "--no-containerd", "--no-agent")
	if err == nil {
		mustRun(t, "lab", "down", "--name", name)
		t.Fatalf("it came up: %s", output)
	}
	if !strings.Contains(output, "peer name lo") {
		t.Errorf("the error does not say which step failed: %s", output)
	}
	wantNothing(t, name)
}

// A program that ends at once is named, with its own words, and the lab goes.
func TestFailingProgramIsReported(t *testing.T) {
	needLab(t)
	name := labName("l")
	tools := t.TempDir()
	script := "#!/bin/sh\necho cannot find my disk\nexit 3\n"
	if err := os.WriteFile(filepath.Join(tools, "containerd"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	output, err := runLace("lab", "up", topologyFile(t, oneLink), "--name", name, "--tools", tools, "--no-agent")
	if err == nil || !strings.Contains(output, "status 3") || !strings.Contains(output, "cannot find my disk") {
		t.Errorf("got %v: %s", err, output)
	}
	wantNothing(t, name)
}

// killedAt starts `lace lab up` and kills it as soon as something is there.
func killedAt(t *testing.T, name string, there func() bool) {
	t.Helper()
	cmd := exec.Command(lace, "lab", "up", topologyFile(t, oneLink), "--name", name, "--no-containerd", "--no-agent")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { runLace("lab", "down", "--name", name) })
	poll(t, "the lab has begun", there)
	if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
	cmd.Wait()
}

func TestDownAfterACrash(t *testing.T) {
	needLab(t)
	exists := func(pattern string) func() bool { return func() bool { return len(glob(pattern)) > 0 } }
	for i, stage := range []string{"/run/lace-lab/%s", "/run/lace-lab/%s/nodes/*/init.json", "/run/netns/lace-%s.fabric", "/run/netns/lace-%s-edge-3"} {
		name := labName(fmt.Sprintf("m%d", i))
		killedAt(t, name, exists(fmt.Sprintf(stage, name)))
		mustRun(t, "lab", "down", "--name", name)
		poll(t, "nodes that were not recorded end by themselves", func() bool { return len(processesOf(name)) == 0 })
		wantNothing(t, name)
		up(t, name, oneLink) // and it can be made again
	}
}

// After a reboot there are files without processes; the pids in them may be anybody's.
func TestDownAfterAReboot(t *testing.T) {
	needLab(t)
	name := labName("n")
	bystander := exec.Command("sleep", "300")
	if err := bystander.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { bystander.Process.Kill(); bystander.Wait() })
	nodeDir := filepath.Join("/run/lace-lab", name, "nodes", "edge-1")
	if err := os.MkdirAll(nodeDir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { runLace("lab", "down", "--name", name) })
	stale, err := json.Marshal(map[string]any{"PID": bystander.Process.Pid, "Start": 1, "Boot": "before"})
	if err != nil {
		t.Fatal(err)
	}
	for path, data := range map[string][]byte{
		filepath.Join(nodeDir, "init.json"):                  stale,
		filepath.Join("/run/lace-lab", name, "lab.json"):     []byte("{ torn"),
		filepath.Join("/run/netns", "lace-"+name+"-edge-1"):  nil,
		filepath.Join("/run/netns", "lace-"+name+".fabric"):  nil,
		filepath.Join("/run/lace-lab", name, "lab.json.new"): nil,
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mustRun(t, "lab", "down", "--name", name)
	wantNothing(t, name)
	if err := bystander.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the process that has got the pid since was ended: %v", err)
	}
}

// What runs in a node, however deep and detached, ends with the lab.
func TestDownEndsWhatRunsInside(t *testing.T) {
	needLab(t)
	name := labName("o")
	up(t, name, oneLink)
	in(t, name, "edge-1", "setsid sleep 8765 </dev/null >/dev/null 2>&1 & setsid unshare -n -m sleep 8765 </dev/null >/dev/null 2>&1 &")
	running := func() int {
		count := 0
		for _, path := range glob("/proc/[0-9]*/cmdline") {
			if line, _ := os.ReadFile(path); string(line) == "sleep\x008765\x00" {
				count++
			}
		}
		return count
	}
	poll(t, "both run", func() bool { return running() == 2 })
	mustRun(t, "lab", "down", "--name", name)
	if left := running(); left != 0 {
		t.Errorf("%d processes of the lab are left", left)
	}
	wantNothing(t, name)
}

func TestStateIsPrivate(t *testing.T) {
	needLab(t)
	name := labName("p")
	up(t, name, oneLink)
	stat, err := os.Stat("/run/lace-lab/" + name)
	if err != nil || stat.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", stat.Mode(), err)
	}
	mustRun(t, "lab", "logs", "--name", name, "edge-1", "node")
	if output, err := runLace("lab", "logs", "--name", name, "edge-1"); err == nil || !strings.Contains(output, "does not run") {
		t.Errorf("the log of an agent that was never there: %v, %s", err, output)
	}
}
