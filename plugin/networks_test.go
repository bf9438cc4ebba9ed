// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/lace-net/lace/plugin/wire"
)

// twoNetworks asks for both, and for an address in the second.
var twoNetworks = labelMap{LabelNetwork: "backend,storage", "lace.net.storage.ip": "10.50.0.18"}

func netnsPath(pid int) string { return fmt.Sprintf("/proc/%d/ns/net", pid) }

func TestBothNetworksAreWired(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	b.add("c1", twoNetworks, 0)
	a := b.create("c1", pid)
	if a.Error != "" || a.Result == nil || len(a.Result.Interfaces) != 2 {
		t.Fatalf("%+v", a)
	}
	for n, want := range []string{"backend eth0 10.40.1.2/24", "storage eth1 10.50.0.18/24"} {
		i := a.Result.Interfaces[n]
		if got := fmt.Sprint(i.Network, " ", i.Name, " ", i.IPs[0]); got != want {
			t.Errorf("interface %d: %s, want %s", n, got, want)
		}
	}
	if got := b.records.byKey["default/c1"].labels[RecordAddress]; got != "backend=10.40.1.2;storage=10.50.0.18" {
		t.Errorf("record %q", got)
	}
	if b.create("c1", pid); b.records.remembers != 1 {
		t.Errorf("an unchanged record was written %d times", b.records.remembers)
	}
	b.plane.refuse = func(Request) error { return errors.New("the block is full") }
	if a := b.create("c1", pid); !strings.Contains(a.Error, `asks for network "backend,storage": the block is full`) {
		t.Errorf("%+v", a)
	}
}

func TestAddressesOfBothNetworksAreAskedForAgain(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	record := labelMap{RecordAddress: "backend=10.40.1.7;storage=10.50.0.19"}
	b.add("c1", merged(labelMap{LabelNetwork: "backend,storage"}, record), 0)
	if b.create("c1", pid); !b.plane.called("attach default/c1 [10.40.1.7] [10.50.0.19]") {
		t.Errorf("calls %v", b.plane.calls)
	}
	left := netip.MustParseAddr("10.50.0.19")
	b.plane.refuse = func(r Request) error {
		if slices.Contains(r.Interfaces[1].IPs, left) {
			return errors.New("is in no pool of this node")
		}
		return nil
	}
	b.add("c2", merged(labelMap{LabelNetwork: "backend,storage"}, record), 0)
	if a := b.create("c2", pid); a.Error != "" || a.Result.Interfaces[0].IPs[0].String() != "10.40.1.7/24" {
		t.Errorf("%+v: one network's loss cost another network's address; calls %v", a, b.plane.calls)
	}
}

func TestSynchroniseWithSeveralNetworks(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	b.add("half", twoNetworks, pid)
	b.plane.wired["default/half"] = Request{Interfaces: []Interface{{Network: "backend", IfName: "eth0"}}}
	b.add("whole", twoNetworks, pid)
	b.plane.wired["default/whole"] = Request{Interfaces: []Interface{{Network: "storage", IfName: "eth1"}, {Network: "backend", IfName: "eth0"}}}
	b.add("stopped", merged(twoNetworks, labelMap{RecordAddress: "backend=10.40.1.7;storage=10.50.0.18"}), 0)
	b.add("never-ran", twoNetworks, 0)
	b.records.podByID["p1"] = wire.Pod{ID: "p1", Name: "p", Labels: twoNetworks, Netns: netnsPath(pid)}
	b.plane.wired["k8s.io/p1"] = Request{Interfaces: []Interface{{Network: "backend", IfName: "eth0"}}}
	if err := b.synchronise(t.Context()); err != nil {
		t.Fatal(err)
	}
	for call, made := range map[string]bool{"attach default/half": true, "attach default/whole": false, "attach k8s.io/p1": true,
		"reserve default/stopped [10.40.1.7]": true, "reserve default/stopped [10.50.0.18]": true,
		"reserve default/never-ran [10.50.0.18]": true, "reserve default/never-ran []": false} {
		if b.plane.called(call) != made {
			t.Errorf("%s: %v, want %v; calls %v", call, !made, made, b.plane.calls)
		}
	}
}

func TestSecondInterfaceOfAnotherNetwork(t *testing.T) {
	b := newAgentBed()
	pid := process(t)
	b.add("c1", twoNetworks, 0)
	if out, err := exec.Command("nsenter", "--net="+netnsPath(pid), "ip", "link", "add", "eth1", "type", "veth", "peer", "name", "v").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if a := b.create("c1", pid); !strings.Contains(a.Error, "has an interface eth1 of another network") {
		t.Errorf("%+v", a)
	}
	b.plane.wired["default/c1"] = Request{Interfaces: []Interface{{Network: "storage", IfName: "eth1"}}}
	if a := b.create("c1", pid); a.Error != "" {
		t.Errorf("Lace's own interface: %+v", a)
	}
}

func (b agentBed) cni(stage, ifName string) wire.Answer {
	return b.handle(context.Background(), wire.Message{Stage: stage, Namespace: wire.CRINamespace,
		CNI: &wire.CNI{ContainerID: "p1", IfName: ifName, Netns: "/proc/self/ns/net"}})
}

func TestCNIAndTheNamesOfInterfaces(t *testing.T) {
	for _, tt := range []struct {
		name   string
		labels labelMap
		ifName string
		want   string // of the error; empty: none
	}{
		{"the first", twoNetworks, "eth0", ""},
		{"none is said", twoNetworks, "", ""},
		{"none that there is", twoNetworks, "net1", `CNI asks for interface "net1"; Lace makes eth0 for the first network, "backend", unless lace.net.backend.ifname names another`},
		{"the first is renamed", labelMap{LabelNetwork: "backend", "lace.net.backend.ifname": "net1"}, "net1", ""},
		{"the first is renamed and CRI finds none", labelMap{LabelNetwork: "backend", "lace.net.backend.ifname": "net1"}, "eth0", `"eth0"; Lace makes net1`},
		{"they change places", labelMap{LabelNetwork: "a,b", "lace.net.a.ifname": "eth1", "lace.net.b.ifname": "eth0"}, "eth0", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newAgentBed()
			b.records.podByID["p1"] = wire.Pod{ID: "p1", Name: "p", Labels: tt.labels}
			a := b.cni(wire.CNIAdd, tt.ifName)
			if (a.Error == "") != (tt.want == "") || !strings.Contains(a.Error, tt.want) || b.plane.called("attach") != (tt.want == "") {
				t.Errorf("%+v; calls %v", a, b.plane.calls)
			}
		})
	}
}

func TestCNICheckLooksAtEachInterface(t *testing.T) {
	b := newAgentBed()
	b.records.podByID["p1"] = wire.Pod{ID: "p1", Name: "p", Labels: twoNetworks}
	if a := b.cni(wire.CNIAdd, "eth0"); a.Error != "" || len(a.Result.Interfaces) != 2 {
		t.Fatalf("%+v", a)
	}
	if a := b.cni(wire.CNICheck, "eth0"); a.Error != "" {
		t.Errorf("%+v", a)
	}
	r := b.plane.wired["k8s.io/p1"]
	r.Interfaces = r.Interfaces[:1]
	b.plane.wired["k8s.io/p1"] = r
	if a := b.cni(wire.CNICheck, "eth0"); !strings.Contains(a.Error, `asks for network "backend,storage" and is not wired`) {
		t.Errorf("%+v", a)
	}
}
