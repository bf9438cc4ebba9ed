// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// threeNodes has a network of both families, one of the same IPv4 addresses, one of IPv6 alone and one whose
// blocks have five addresses.
const threeNodes = `version = 1
[underlay]
locator-block = "5f00:1ace::/32"
[node.edge-1]
underlay = "fd00:a::1"
locator = "5f00:1ace:1::/48"
[node.edge-2]
underlay = "fd00:a::2"
locator = "5f00:1ace:2::/48"
[node.edge-3]
underlay = "fd00:a::3"
locator = "5f00:1ace:3::/48"
[network.backend]
type = "l3"
id = 100
subnets = ["10.40.0.0/16", "fd40::/48"]
[network.staging]
type = "l3"
id = 200
subnets = ["10.40.0.0/16"]
[network.six]
type = "l3"
id = 300
subnets = ["fd60::/48"]
[network.tiny]
type = "l3"
id = 400
subnets = ["10.60.0.0/24"]
block-size = { v4 = 29 }
`

// shipped is the text of a topology in conf/lab.
func shipped(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("../../conf/lab", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// bed is a lab that lives as long as the test that brought it up.
type bed struct {
	t        *testing.T
	name     string
	topology string // path of its file
}

var beds atomic.Int32

// up brings a lab up, with its agents unless flags say otherwise.
func up(t *testing.T, topology string, flags ...string) *bed {
	t.Helper()
	need(t)
	b := &bed{t: t, name: fmt.Sprintf("%s%d%s", labPrefix, os.Getpid(), strconv.FormatInt(int64(beds.Add(1)), 36))} // 16 letters at most
	b.topology = b.file("topology.toml", topology)
	t.Cleanup(func() {
		if t.Failed() {
			b.showLogs()
		}
		if said := b.lace("lab", "down", "--name", b.name); said.status != 0 {
			t.Errorf("take the lab down: %s", said.err)
		}
		b.leftNothing()
	})
	if said := b.lace(append([]string{"lab", "up", b.topology, "--name", b.name}, flags...)...); said.status != 0 {
		t.Fatalf("bring the lab up: %s", said.err)
	}
	return b
}

// leftNothing looks for what a lab is on the machine; tests/lab looks deeper.
func (b *bed) leftNothing() {
	for _, pattern := range []string{"/run/netns/lace-" + b.name + "[-.]*", "/run/lace-lab/" + b.name} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			b.t.Errorf("the lab left behind %q", left)
		}
	}
}

// sub runs a part of the test on the same lab.
func (b *bed) sub(name string, f func(b *bed)) {
	b.t.Helper()
	b.t.Run(name, func(t *testing.T) { f(b.with(t)) })
}

// with is the same lab seen from another test.
func (b *bed) with(t *testing.T) *bed {
	c := *b
	c.t = t
	return &c
}

// file writes a file that the nodes see under the same path.
func (b *bed) file(name, text string) string {
	b.t.Helper()
	path := filepath.Join(b.t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
	return path
}

func (b *bed) showLogs() {
	for _, node := range []string{"edge-1", "edge-2", "edge-3"} {
		said := b.lace("lab", "logs", "--name", b.name, node, "agent")
		lines := strings.Split(strings.TrimSpace(said.out), "\n")
		b.t.Logf("the end of the agent's log on %s:\n%s", node, strings.Join(lines[max(0, len(lines)-20):], "\n"))
	}
}

// said is how a command ended.
type said struct {
	out, err string // what it wrote to its two streams
	status   int
}

// lace runs the program under test on this machine.
func (b *bed) lace(args ...string) said {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	s, err := result(command(ctx, args...))
	if err != nil {
		b.t.Fatalf("lace %s: %v\n%s%s", strings.Join(args, " "), err, s.out, s.err)
	}
	return s
}

// command is one of the program under test. The end of ctx lets it end what it started.
func command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, lace, args...)
	cmd.Env = append(os.Environ(), "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func result(cmd *exec.Cmd) (said, error) {
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err := cmd.Run()
	s := said{out: strings.TrimSpace(out.String()), err: strings.TrimSpace(stderr.String())}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		s.status = exit.ExitCode()
		err = nil
		if s.status < 0 {
			err = exit
		}
	}
	return s, err
}

// node is one host of the lab.
type node struct {
	*bed
	host string
}

func (b *bed) node(host string) *node { return &node{b, host} }

// try runs a command on the node.
func (n *node) try(args ...string) said {
	n.t.Helper()
	return n.lace(n.exec(args...)...)
}

func (n *node) exec(args ...string) []string {
	return append([]string{"lab", "exec", "--name", n.name, n.host, "--"}, args...)
}

// must runs a command on the node, which has to succeed, and returns what it prints.
func (n *node) must(args ...string) string {
	n.t.Helper()
	s := n.try(args...)
	if s.status != 0 {
		n.t.Fatalf("%s# %s: status %d\n%s\n%s", n.host, strings.Join(args, " "), s.status, s.out, s.err)
	}
	return s.out
}

// sh runs a line of shell on the node, which has to succeed.
func (n *node) sh(format string, args ...any) string {
	n.t.Helper()
	return n.must("sh", "-c", fmt.Sprintf(format, args...))
}

// eventually polls until check gives no error, and fails the test after patience.
func (b *bed) eventually(what string, check func() error) {
	b.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("%s: not within %v: %v", what, patience, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// agentLog is all that the node's agents have said.
func (n *node) agentLog() string {
	n.t.Helper()
	return n.lace("lab", "logs", "--name", n.name, n.host, "agent").out
}

const synchronised = `msg="synchronised with containerd"`

// killAgent ends the agent without a word.
func (n *node) killAgent() {
	n.t.Helper()
	if s := n.lace("lab", "kill", "--name", n.name, n.host, "agent"); s.status != 0 {
		n.t.Fatalf("kill the agent: %s", s.err)
	}
}

// start starts what does not run on the node, and returns when the agent knows what containerd knows.
func (n *node) start() {
	n.t.Helper()
	before := strings.Count(n.agentLog(), synchronised)
	if s := n.lace("lab", "start", "--name", n.name, n.host); s.status != 0 {
		n.t.Fatalf("start the node's programs: %s", s.err)
	}
	n.eventually("the agent synchronises", func() error {
		if strings.Count(n.agentLog(), synchronised) == before {
			return errors.New("its log does not say so")
		}
		return nil
	})
}

func contains(t *testing.T, text, want string) {
	t.Helper()
	if !strings.Contains(text, want) {
		t.Errorf("want %q in:\n%s", want, text)
	}
}

func absent(t *testing.T, text, not string) {
	t.Helper()
	if strings.Contains(text, not) {
		t.Errorf("want no %q in:\n%s", not, text)
	}
}
