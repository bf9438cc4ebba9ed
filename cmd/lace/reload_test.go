// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"log/slog"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/cmd/lace/control"
	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

func parsed(t testing.TB, file string) *topology.Topology {
	t.Helper()
	top, err := topology.Load(file)
	must(t, err)
	return top
}

// start starts the agent itself in the node's namespace; it ends with the test.
func (n *edge) start() *exec.Cmd {
	n.t.Helper()
	var log bytes.Buffer
	cmd := exec.Command("/proc/self/exe", "agent", "--config", n.path("lace.toml"), "--containerd", n.path("no.sock"), "--nri-socket", n.path("no.sock"))
	cmd.Args[0] = "lace" // see TestMain
	cmd.Stderr = &log
	n.in(cmd.Start)
	n.t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			n.t.Errorf("the agent ends with %v", err)
		}
		if n.t.Failed() {
			n.t.Logf("the agent said\n%s", log.String())
		}
	})
	n.until("the agent answers", func() bool {
		_, err := control.Ask(n.t.Context(), n.path("control.sock"), control.Request{Do: control.Plan})
		return err == nil
	})
	return cmd
}

func (n *edge) until(what string, ok func() bool) {
	n.t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	n.t.Fatalf("waited in vain: %s", what)
}

// has says whether an interface is there.
func (n *edge) has(link string) (there bool) {
	n.t.Helper()
	n.in(func() error {
		_, err := netlink.LinkByName(link)
		there = err == nil
		return nil
	})
	return there
}

func (n *edge) apply(args ...string) (string, error) {
	var out bytes.Buffer
	err := runApply(context.Background(), &env{stdout: &out}, append([]string{"--config", n.path("lace.toml")}, args...))
	return out.String(), err
}

// spaced works in the node's namespace, where a real agent is as a whole.
type spaced struct{ *edge }

func (s spaced) there(f func()) {
	done := make(chan struct{})
	s.work <- func() { f(); close(done) }
	<-done
}

func (s spaced) Plan() *plan.Plan { return s.plane.Plan() }

func (s spaced) Apply(ctx context.Context, t *topology.Topology) (applied dataplane.Applied, err error) {
	s.there(func() { applied, err = s.plane.Apply(ctx, t) })
	return applied, err
}

func (s spaced) AttachDevice(ctx context.Context, r dataplane.DeviceRequest) (p dataplane.Port, err error) {
	s.there(func() { p, err = s.plane.AttachDevice(ctx, r) })
	return p, err
}

func (s spaced) DetachDevice(ctx context.Context, device string) (err error) {
	s.there(func() { err = s.plane.DetachDevice(ctx, device) })
	return err
}

// serve lets the node's data plane be asked as that of an agent.
func (n *edge) serve() *edge {
	n.t.Helper()
	r := &reloader{file: n.path("topology.toml"), plane: spaced{n}, log: slog.New(slog.NewTextHandler(n.t.Output(), nil))}
	s, err := control.Listen(n.path("control.sock"), r.answer, r.log)
	must(n.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	n.t.Cleanup(func() { cancel(); must(n.t, <-done) })
	return n
}

// What is applied decides: the programs say so.
func TestApplyTakesAPeeredNetworkAndGivesItBack(t *testing.T) {
	n := peered(t).serve()
	ask := "--from web-1 --to 10.50.1.10:5432/tcp"
	verdict := func(want string) {
		t.Helper()
		if x := n.explained(ask); x.Verdict+" "+x.Reason != want || len(x.Notes) > 0 {
			t.Errorf("got %s %s, %q; want %s", x.Verdict, x.Reason, x.Notes, want)
		}
	}
	verdict("passed local")
	db, peering := strings.Index(peeredNetworks, "[network.db]"), strings.Index(peeredNetworks, "[network.staging]")
	n.write("less.toml", peeredNetworks[:db]+peeredNetworks[peering:strings.Index(peeredNetworks, "[[peering]]")])
	out, err := n.apply("--dry-run", n.path("less.toml"))
	if err != nil || !strings.Contains(out, "- network db: ") || !strings.Contains(out, "- peering web > db ") {
		t.Errorf("%v\n%s", err, out)
	}
	verdict("passed local")
	if out, err := n.apply(n.path("less.toml")); err != nil || !strings.Contains(out, " is active, took ") {
		t.Errorf("%v\n%s", err, out)
	}
	verdict("refused no_route")
	if x := n.explained("--from db-1 --to 10.50.1.11/icmp"); x.Verdict != "refused" {
		t.Errorf("a container without a network: %+v", x)
	}
	n.write("more.toml", peeredNetworks)
	if out, err := n.apply(n.path("more.toml")); err != nil || !strings.Contains(out, "+ peering web > db ") {
		t.Errorf("%v\n%s", err, out)
	}
	verdict("passed local")
}

// A network comes and goes under an agent that runs, by command and by signal.
func TestAgentReloads(t *testing.T) {
	n := newEdge(t, peeredNetworks)
	more := peeredNetworks + strings.Replace(anotherNetwork, "id = 300", "id = 400", 1)
	agent := n.start()
	n.write("more.toml", more)
	out, err := n.apply(n.path("more.toml"))
	if err != nil || !strings.Contains(out, "+ network storage") || !strings.Contains(out, " is active, took ") {
		t.Fatalf("%v\n%s", err, out)
	}
	if !n.has("laceb400") {
		t.Error("the new network has no bridge")
	}
	if out, err := n.apply(); err != nil || out != "nothing changes\n" {
		t.Errorf("the second time: %q, %v", out, err)
	}
	n.write("topology.toml", "version = 2\n")
	must(t, agent.Process.Signal(syscall.SIGHUP))
	if _, err := n.apply(); err == nil || !strings.Contains(err.Error(), "topology.toml:1: version: ") {
		t.Errorf("a bad file: %v", err)
	}
	if !n.has("laceb400") {
		t.Error("a bad file took the network away")
	}
	n.write("topology.toml", peeredNetworks)
	must(t, agent.Process.Signal(syscall.SIGHUP))
	n.until("the network is gone", func() bool { return !n.has("laceb400") })
	n.until("the agent says so", func() bool {
		a, err := control.Ask(t.Context(), n.path("control.sock"), control.Request{Do: control.Plan})
		return err == nil && a.Plan.Hash == parsed(t, n.path("topology.toml")).Hash
	})
}
