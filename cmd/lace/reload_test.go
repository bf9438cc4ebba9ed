// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/cmd/lace/control"
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
