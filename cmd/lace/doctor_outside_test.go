// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// examined are the findings about the outside, one a line.
func (n *edge) examined() (out string) {
	n.t.Helper()
	n.in(func() error {
		s, err := agentSettings("doctor", []string{"--config", n.path("lace.toml")})
		if err != nil {
			return err
		}
		for _, f := range outsideFindings(&env{}, s) {
			out += choose(f.ok, "ok", "MISSING") + " " + f.what + ": " + f.text + "\n"
		}
		return nil
	})
	return out
}

// set writes a sysctl of the node's namespace.
func (n *edge) set(path, value string) {
	n.t.Helper()
	n.in(func() error { return os.WriteFile("/proc/sys/net/"+path, []byte(value), 0) })
}

func TestDoctorExaminesTheOutside(t *testing.T) {
	n := opened(t)
	expect := func(when string, want ...string) {
		t.Helper()
		out := n.examined()
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: want %q in\n%s", when, w, out)
			}
		}
	}
	n.set("ipv4/ip_local_port_range", "32768 60999")
	expect("all is well", "ok host and outside: lc-host is there", "ok ways out: up0 (as 192.0.2.1, fd00:a::1), out0 (as 192.0.2.1, fd00:a::1)\n",
		"ok masquerade ports: 4096-32767, outside of the host's own 32768-60999\n", "ok rp_filter: all ",
		"ok sysctls: net.ipv4.conf.lc-host.forwarding=1 net.ipv6.conf.lc-host.forwarding=1 net.ipv6.conf.lc-host.accept_ra=0 net.ipv4.conf.lo.accept_local=1 net.ipv4.conf.lo.route_localnet=1; `lace uninstall` undoes them")
	if out := n.examined(); strings.Contains(out, "MISSING") {
		t.Errorf("something is missing in\n%s", out)
	}
	n.set("ipv4/ip_local_port_range", "20000 60999")
	expect("the ports overlap", "MISSING masquerade ports: 4096-32767 overlaps the ports 20000-60999", "net.ipv4.ip_local_reserved_ports=4096-32767")
	n.set("ipv4/ip_local_reserved_ports", "4096-32767")
	expect("they are reserved", "ok masquerade ports: 4096-32767, which the host's own sockets leave free\n")
	n.set("ipv4/conf/lo/route_localnet", "0")
	n.set("ipv4/conf/lc-host/forwarding", "0")
	expect("a setting was set back", "MISSING sysctls: somebody has set back what the agent needs: sysctl -w net.ipv4.conf.lc-host.forwarding=1 net.ipv4.conf.lo.route_localnet=1\n")
	n.in(func() error {
		addr, err := netlink.ParseAddr("192.0.2.1/24")
		if err != nil {
			return err
		}
		out, err := netlink.LinkByName("out0")
		if err != nil {
			return err
		}
		return netlink.AddrDel(out, addr)
	})
	expect("the address is gone", "MISSING masquerade: this host has no IPv4 address that could stand for containers (no_host_address)")
	n.in(func() error {
		l, err := netlink.LinkByName("lc-host")
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
	expect("the pair is gone, and no agent runs", "ok host and outside: the agent makes lc-host when it starts\n")
}

func TestDoctorOfAClosedOverlay(t *testing.T) {
	n := newEdge(t, peeredNetworks)
	if got, want := n.examined(), "ok host and outside: no external network, and no network with host = true, on node edge-1\n"; got != want {
		t.Errorf("got %s", got)
	}
	n.write("topology.toml", "version = 2")
	if got, want := n.examined(), "ok host and outside: not known without a topology\n"; got != want {
		t.Errorf("got %s", got)
	}
}

func TestReservedPortsCover(t *testing.T) {
	for _, tt := range []struct {
		list        string
		first, last uint16
		covers      bool
	}{
		{"", 1, 2, false}, {"1-2", 1, 2, true}, {"5", 5, 5, true}, {"5", 5, 6, false}, {"1,3-9,11", 4, 9, true}, {"1-3,4-9", 2, 5, false}, {"1-9", 8, 7, false}, {"x", 1, 1, false},
	} {
		if got := covers(tt.list, tt.first, tt.last); got != tt.covers {
			t.Errorf("%q covers %d-%d: %v", tt.list, tt.first, tt.last, got)
		}
	}
}

// TestMasqueradeIsLookedForOnlyWhereItIsHere: what leaves by another node needs no address here.
func TestMasqueradeIsLookedForOnlyWhereItIsHere(t *testing.T) {
	topo, err := topology.Parse("topology.toml", []byte(strings.ReplaceAll(openNetworks, `to = "internet"
masquerade = true
[[`, `to = "internet"
masquerade = true
egress = "edge-2"
[[`)))
	must(t, err)
	for node, want := range map[string]bool{"edge-1": false, "edge-2": true} {
		p, err := plan.Build(topo, node, nil)
		must(t, err)
		if got := (&surroundings{plan: p}).masquerades(netip.Addr.Is4); got != want {
			t.Errorf("on %s: %v", node, got)
		}
	}
}
