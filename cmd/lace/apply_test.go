// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lace-net/lace/cmd/lace/control"
	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// oneNetwork is a topology; more networks may follow it.
const oneNetwork = `version = 1
[underlay]
locator-block = "5f00:1ace::/32"
[node.edge-1]
underlay = "fd00:a::1"
locator = "5f00:1ace:1::/48"
[node.edge-2]
underlay = "fd00:a::2"
locator = "5f00:1ace:2::/48"
[network.backend]
type = "l3"
id = 100
subnets = ["10.40.0.0/16"]
`

const anotherNetwork = `[network.storage]
type = "l3"
id = 300
subnets = ["10.60.0.0/16"]
`

// fakePlane holds what it was last given, and touches no kernel.
type fakePlane struct {
	devices    // none: nobody asks for them
	mu         sync.Mutex
	held       *plan.Plan
	generation uint32
	refuse     error
	applied    int
}

func (p *fakePlane) Plan() *plan.Plan {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held
}

func (p *fakePlane) Apply(_ context.Context, t *topology.Topology) (dataplane.Applied, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applied++
	if p.refuse != nil {
		return dataplane.Applied{}, p.refuse
	}
	next, err := plan.Build(t, "edge-1", nil)
	if err != nil {
		return dataplane.Applied{}, err
	}
	changed := next.Hash != p.held.Hash
	if p.held = next; changed {
		p.generation++
	}
	return dataplane.Applied{Generation: p.generation, Changed: changed, Took: 12 * time.Millisecond}, nil
}

func (p *fakePlane) holds(network string) bool {
	for _, n := range p.Plan().Networks {
		if n.Name == network {
			return true
		}
	}
	return false
}

// agentHost is a host with settings, a topology and an agent around a fake data plane.
type agentHost struct {
	t        *testing.T
	dir      string
	topology string
	plane    *fakePlane
	reloader *reloader
	log      bytes.Buffer
}

func newAgentHost(t *testing.T) *agentHost {
	t.Helper()
	h := &agentHost{t: t, dir: t.TempDir()}
	h.topology = h.write("topology.toml", oneNetwork)
	h.write("lace.toml", fmt.Sprintf("node = \"edge-1\"\ntopology = %q\nhook-socket = %q\n", h.topology, h.path("lace.sock")))
	parsed, err := topology.Parse("topology.toml", []byte(oneNetwork))
	if err != nil {
		t.Fatal(err)
	}
	held, err := plan.Build(parsed, "edge-1", nil)
	if err != nil {
		t.Fatal(err)
	}
	h.plane = &fakePlane{held: held, generation: 6}
	h.reloader = &reloader{file: h.topology, plane: h.plane, log: slog.New(slog.NewTextHandler(&h.log, nil))}
	return h
}

func (h *agentHost) path(name string) string { return filepath.Join(h.dir, name) }

func (h *agentHost) write(name, text string) string {
	h.t.Helper()
	if err := os.WriteFile(h.path(name), []byte(text), 0o640); err != nil {
		h.t.Fatal(err)
	}
	return h.path(name)
}

func (h *agentHost) read(name string) string {
	h.t.Helper()
	b, err := os.ReadFile(h.path(name))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

// serve lets the agent listen.
func (h *agentHost) serve() *agentHost {
	h.t.Helper()
	s, err := control.Listen(h.path("control.sock"), h.reloader.answer, slog.New(slog.DiscardHandler))
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	h.t.Cleanup(func() { cancel(); <-done })
	return h
}

func (h *agentHost) apply(args ...string) (string, error) {
	var out bytes.Buffer
	err := runApply(h.t.Context(), &env{stdout: &out}, append([]string{"--config", h.path("lace.toml")}, args...))
	return out.String(), err
}

func TestApplyInstallsAFile(t *testing.T) {
	h := newAgentHost(t).serve()
	text := oneNetwork + anotherNetwork
	out, err := h.apply(h.write("new.toml", text))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, "+ network storage: ") || !strings.HasSuffix(out, "\ngeneration 7 is active, took 12ms\n") {
		t.Errorf("printed\n%s", out)
	}
	if h.read("topology.toml") != text || !h.plane.holds("storage") {
		t.Error("the file is not in its place, or not applied")
	}
	if st, _ := os.Stat(h.topology); st.Mode().Perm() != 0o640 {
		t.Errorf("the file has mode %o now", st.Mode().Perm())
	}
	h.leftNothing()
	if out, err = h.apply(h.path("new.toml")); err != nil || out != "nothing changes\n" {
		t.Errorf("the second time: %q, %v", out, err)
	}
}

// leftNothing looks for what a replacement might leave.
func (h *agentHost) leftNothing() {
	h.t.Helper()
	if left, _ := filepath.Glob(h.path(".*")); len(left) > 0 {
		h.t.Errorf("left behind: %v", left)
	}
}

func TestApplyReadsTheAgentsOwnFile(t *testing.T) {
	h := newAgentHost(t).serve()
	h.write("topology.toml", oneNetwork+anotherNetwork)
	if out, err := h.apply(); err != nil || !strings.Contains(out, "generation 7 is active") {
		t.Errorf("%q, %v", out, err)
	}
	h.write("topology.toml", oneNetwork)
	if out, err := h.apply(h.topology); err != nil || !strings.Contains(out, "- network storage: ") || h.plane.holds("storage") {
		t.Errorf("named by its path: %q, %v", out, err)
	}
}

func TestApplyKeepsALink(t *testing.T) {
	h := newAgentHost(t).serve()
	if err := os.Rename(h.topology, h.path("real.toml")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real.toml", h.topology); err != nil {
		t.Fatal(err)
	}
	if _, err := h.apply(h.write("new.toml", oneNetwork+anotherNetwork)); err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(h.topology); err != nil || to != "real.toml" || h.read("real.toml") != oneNetwork+anotherNetwork {
		t.Errorf("the link leads to %q, %v", to, err)
	}
}

func TestDryRunChangesNothing(t *testing.T) {
	h := newAgentHost(t).serve()
	out, err := h.apply("--dry-run", h.write("new.toml", oneNetwork+anotherNetwork))
	if err != nil || !strings.Contains(out, "+ network storage: ") || strings.Contains(out, "generation") {
		t.Errorf("%q, %v", out, err)
	}
	if out, err := h.apply("--dry-run"); err != nil || out != "nothing would change\n" {
		t.Errorf("%q, %v", out, err)
	}
	if h.read("topology.toml") != oneNetwork || h.plane.applied != 0 {
		t.Error("it was applied all the same")
	}
}

func TestBadFilesNeverReplaceGoodOnes(t *testing.T) {
	h := newAgentHost(t).serve()
	bad := strings.Replace(oneNetwork, "id = 100", "id = 0", 1)
	wants := func(err error, file string) {
		t.Helper()
		var wrong topology.Errors
		if !errors.As(err, &wrong) || !strings.Contains(wrong.Error(), file+":12: network.backend.id: ") {
			t.Errorf("got %v", err)
		}
	}
	_, err := h.apply(h.write("new.toml", bad))
	wants(err, h.path("new.toml"))
	if h.read("topology.toml") != oneNetwork {
		t.Error("the bad file is in the place of the good one")
	}
	h.write("topology.toml", bad) // by hand, past lace apply
	_, err = h.apply()
	wants(err, h.topology)
	answer, err := control.Ask(t.Context(), h.path("control.sock"), control.Request{Do: control.Apply})
	if err != nil {
		t.Fatal(err)
	}
	wants(answer.Refusal(), h.topology)
	if h.plane.applied != 0 || !h.plane.holds("backend") || !strings.Contains(h.log.String(), "the one before goes on") {
		t.Errorf("the agent applied it %d times and says\n%s", h.plane.applied, h.log.String())
	}
}

func TestWhatTheAgentRefusesIsPutBack(t *testing.T) {
	h := newAgentHost(t).serve()
	h.plane.refuse = errors.New("there is no room")
	_, err := h.apply(h.write("new.toml", oneNetwork+anotherNetwork))
	if err == nil || !strings.Contains(err.Error(), "there is no room") {
		t.Errorf("got %v", err)
	}
	if h.plane.applied != 1 || h.read("topology.toml") != oneNetwork {
		t.Errorf("asked %d times; the file holds\n%s", h.plane.applied, h.read("topology.toml"))
	}
	h.leftNothing()
}

func TestApplyRefusesATopologyWithoutThisNode(t *testing.T) {
	h := newAgentHost(t).serve()
	_, err := h.apply(h.write("new.toml", strings.ReplaceAll(oneNetwork, "node.edge-1", "node.edge-9")))
	if err == nil || !strings.Contains(err.Error(), `the topology has no node "edge-1"`) || h.read("topology.toml") != oneNetwork {
		t.Errorf("got %v", err)
	}
}

// Who looked at one file does not want another one.
func TestAgentTakesOnlyTheTopologyInMind(t *testing.T) {
	h := newAgentHost(t)
	a := h.reloader.answer(t.Context(), control.Request{Do: control.Apply, Topology: "0123456789ab"})
	if err := a.Refusal(); err == nil || !strings.Contains(err.Error(), "somebody changed it meanwhile") || h.plane.applied != 0 {
		t.Errorf("got %v", err)
	}
}

func TestApplyWithoutAgent(t *testing.T) {
	h := newAgentHost(t)
	for _, args := range [][]string{nil, {h.topology}} {
		if _, err := h.apply(args...); !errors.Is(err, control.ErrNoAgent) {
			t.Errorf("%v: %v", args, err)
		}
	}
	if out, err := h.apply("--dry-run"); err != nil || !strings.Contains(out, h.topology+": ok, topology ") || !strings.Contains(out, "no agent runs") {
		t.Errorf("%q, %v", out, err)
	}
	h.write("lace.toml", "hook-socket = \"/nowhere/lace.sock\"\n")
	if _, err := h.apply(); !errors.Is(err, control.ErrNoAgent) {
		t.Errorf("without the directory: %v", err)
	}
}

func TestOneApplyAtATime(t *testing.T) {
	h := newAgentHost(t).serve()
	lock, err := lockApply(h.path("control.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.apply(); err == nil || !strings.Contains(err.Error(), "another lace apply holds") {
		t.Errorf("got %v", err)
	}
	if _, err := h.apply("--dry-run"); err != nil {
		t.Errorf("a look has to wait: %v", err)
	}
	lock.Close()
	if _, err := h.apply(); err != nil {
		t.Error(err)
	}
}

// systemd is a notification socket; every message that comes in is handed on.
func systemd(t *testing.T) <-chan string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	told := make(chan string, 16)
	go func() {
		b := make([]byte, 1024)
		for {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			told <- string(b[:n])
		}
	}()
	return told
}

func TestSignalReloads(t *testing.T) {
	h := newAgentHost(t)
	told := systemd(t)
	hears := func(want string) {
		t.Helper()
		select {
		case got := <-told:
			if !strings.HasPrefix(got, want) {
				t.Errorf("systemd is told %q, want %q", got, want)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("systemd is not told %q", want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	signals, done := make(chan os.Signal, 1), make(chan struct{})
	go func() { h.reloader.follow(ctx, signals); close(done) }()

	h.write("topology.toml", oneNetwork+anotherNetwork)
	signals <- os.Interrupt
	hears("RELOADING=1\nMONOTONIC_USEC=")
	hears("READY=1")
	if !h.plane.holds("storage") {
		t.Error("the new network is not there")
	}
	h.write("topology.toml", "version = 2\n")
	signals <- os.Interrupt
	hears("RELOADING=1\n")
	hears("READY=1")
	cancel()
	<-done
	if !h.plane.holds("storage") || !strings.Contains(h.log.String(), "the one before goes on") || h.plane.generation != 7 {
		t.Errorf("the agent says\n%s", h.log.String())
	}
}

func TestAllPartsEndWithTheFirst(t *testing.T) {
	failed := errors.New("failed")
	wait := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	err := runAll(t.Context(), slog.New(slog.DiscardHandler), wait, func(context.Context) error { return failed }, wait)
	if !errors.Is(err, failed) || errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
