// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lace-net/lace/topology"
)

// onSegments are attachments at edge-1: a container of storage, one of web and six, and the tap of a virtual machine.
var onSegments = []Attachment{
	{Container: "default/s1", Name: "s1", Network: "storage", IfName: "eth0", V4: netip.MustParseAddr("10.50.0.18"), V6: netip.MustParseAddr("fd50::1:2"), MAC: MAC{2, 0x4c, 10, 50, 0, 18}, Gateway: true},
	{Container: "default/w1", Network: "web", IfName: "eth0", V4: netip.MustParseAddr("10.41.1.2"), V6: netip.MustParseAddr("fd41:0:0:1::2"), MAC: MAC{2, 0, 0, 0, 0, 1}, Gateway: true},
	{Container: "default/w1", Network: "six", IfName: "eth1", V6: netip.MustParseAddr("fd51::1:2"), MAC: MAC{2, 0x4c, 0, 1, 0, 2}},
	{Container: "device/tap0", Name: "vm", Network: "storage", Device: "tap0", V4: netip.MustParseAddr("10.50.0.200"), V6: netip.MustParseAddr("fd50::ffff:1"), MAC: MAC{0x52, 0x54, 0, 0, 0, 1}},
}

func segments(t *testing.T, node string, changes ...string) *Plan {
	t.Helper()
	text := strings.NewReplacer(changes...).Replace(load(t, "segments").Canonical())
	top, err := topology.Parse("changed.toml", []byte(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	p, err := Build(top, node, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// What a port stands as on its interface, and what leads to its gateway.
func TestPortPlace(t *testing.T) {
	top := load(t, "segments")
	v4, v6 := netip.MustParseAddr("10.50.0.18"), netip.MustParseAddr("fd50::1:2")
	web4, web6 := netip.MustParseAddr("10.41.1.2"), netip.MustParseAddr("fd41:0:0:1::2")
	for _, c := range []struct {
		name, network string
		v4, v6        netip.Addr
		gateway       bool
		want          string // prefixes, routes, gateways, overhead, DHCP
	}{
		{"L3, default route", "web", web4, web6, true, "10.41.1.2/32 fd41:0:0:1::2/128; 0.0.0.0/0 ::/0; 10.41.1.1 fd41:0:0:1::1; 40 false"},
		{"L3, another has it", "web", web4, web6, false, "10.41.1.2/32 fd41:0:0:1::2/128; 10.41.0.0/16 fd41::/48; 10.41.1.1 fd41:0:0:1::1; 40 false"},
		{"L3, IPv4 only", "web", web4, netip.Addr{}, true, "10.41.1.2/32; 0.0.0.0/0; 10.41.1.1 fd41:0:0:1::1; 40 false"},
		{"L3, IPv6 only, another has it", "web", netip.Addr{}, web6, false, "fd41:0:0:1::2/128; fd41::/48; 10.41.1.1 fd41:0:0:1::1; 40 false"},
		{"L2, a gateway of one family", "storage", v4, v6, true, "10.50.0.18/24 fd50::1:2/64; 0.0.0.0/0; 10.50.0.1 invalid IP; 58 true"},
		{"L2, another has it", "storage", v4, v6, false, "10.50.0.18/24 fd50::1:2/64; ; 10.50.0.1 invalid IP; 58 true"},
		{"L2, no gateway", "six", netip.Addr{}, netip.MustParseAddr("fd51::1:2"), true, "fd51::1:2/64; ; invalid IP invalid IP; 58 false"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := NewPort(top, "edge-1", Attachment{Container: "c", Network: c.network, IfName: "eth0", V4: c.v4, V6: c.v6, Gateway: c.gateway})
			if err != nil {
				t.Fatal(err)
			}
			got := fmt.Sprintf("%s; %s; %s %s; %d %t", join(p.Prefixes), join(p.Routes), p.Gateway4, p.Gateway6, p.Overhead, p.DHCP)
			if got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// NewPort plans as Build does.
func TestNewPortIsThatOfBuild(t *testing.T) {
	top := load(t, "segments")
	p, err := Build(top, "edge-1", onSegments)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range onSegments {
		port, err := NewPort(top, "edge-1", a)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(p.Ports, func(x Port) bool { return fmt.Sprint(x) == fmt.Sprint(port) }) {
			t.Errorf("port %+v is not in the plan", port)
		}
	}
}

func TestOverhead(t *testing.T) {
	for _, c := range []struct {
		change []string
		want   map[string]int
	}{
		{nil, map[string]int{"web": 40, "db": 40, "storage": 58, "six": 58}},
		{[]string{`"reduced"`, `"srh"`}, map[string]int{"web": 64, "db": 64, "storage": 82, "six": 82}},
	} {
		got := map[string]int{}
		for _, n := range segments(t, "edge-1", c.change...).Networks {
			got[n.Name] = n.Overhead
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%v (-want +got):\n%s", c.change, diff)
		}
	}
}

// What an address of an endpoint is behind: a block of its own, where packets can get there.
func TestEndpointBlocks(t *testing.T) {
	p := segments(t, "edge-1")
	got := map[string]string{}
	for _, b := range p.Blocks {
		if b.Prefix.IsSingleIP() {
			got[b.Prefix.String()] = blockValue(b)
		}
	}
	want := map[string]string{
		"10.50.0.200/32":   "local",
		"fd50::ffff:1/128": "local",
		"10.50.0.201/32":   "peer 1, SID 5f00:1ace:2:14:0:c800::",
		"10.50.0.202/32":   "peer 3, SID 5f00:1ace:9::4",
		"fd50::ffff:3/128": "peer 3, frames only, SID 5f00:1ace:9::2", // the router takes no IPv6 packets
		"fd51::ffff:7/128": "peer 1, SID 5f00:1ace:2:14:1:2c00::",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, n := range p.Networks {
		if n.Name == "storage" && (!slices.Equal(n.BlockBits4, Lengths{32, 28}) || !slices.Equal(n.BlockBits6, Lengths{128, 112})) {
			t.Errorf("lengths of storage: %v and %v", n.BlockBits4, n.BlockBits6)
		}
	}
}

// A node has a network by its pool or by an endpoint, and only then.
func TestWhereSegmentsAre(t *testing.T) {
	for node, want := range map[string]string{"edge-1": "web db storage six", "edge-2": "web db storage six", "edge-3": "web db storage quiet"} {
		var got []string
		for _, n := range segments(t, node).Networks {
			got = append(got, n.Name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s has %v, want %s", node, got, want)
		}
	}
}

// Every node sends frames to where their taker expects them, and copies to all that have the network, itself left out.
func TestNodesAgreeOnFrames(t *testing.T) {
	plans := map[string]*Plan{}
	for _, name := range []string{"edge-1", "edge-2", "edge-3"} {
		plans[name] = segments(t, name)
	}
	for name, p := range plans {
		for _, s := range p.Stations {
			peer := p.Peers[s.Peer-1]
			if !peer.takesFrames(plans[peer.Name], s.Network, s.SID, func(n Network) topology.SID { return n.SID2U }) {
				t.Errorf("%s sends frames for %s to %s at %s, which does not take them", name, s.Name, peer.Name, s.SID)
			}
		}
		members := map[topology.NetworkID]int{}
		for _, m := range p.Members {
			members[m.Network]++
			peer := p.Peers[m.Peer-1]
			if !peer.takesFrames(plans[peer.Name], m.Network, m.SID, func(n Network) topology.SID { return n.SID2M }) {
				t.Errorf("%s sends copies to %s at %s, which does not take them", name, peer.Name, m.SID)
			}
		}
		if members[200] != 3 || members[300] != 0 || members[400] != 0 {
			t.Errorf("%s: members %v", name, members)
		}
	}
}

func (p Peer) takesFrames(plan *Plan, id topology.NetworkID, sid topology.SID, of func(Network) topology.SID) bool {
	if p.Kind == topology.KindRouter {
		return p.Network == id && p.SIDL2 == sid
	}
	return slices.ContainsFunc(plan.Networks, func(n Network) bool { return n.ID == id && of(n) == sid })
}

// What changes of an L2 network is said, and nothing else.
func TestDiffSegments(t *testing.T) {
	for _, c := range []struct {
		name, node string
		changes    []string
		want       string
	}{
		{"nothing", "edge-1", nil, ""},
		{"l2-gso", "edge-1", []string{`"segment"`, `"shim"`}, "~ node: l2-gso shim, was segment"},
		{"flood-rate", "edge-1", []string{"flood-rate = 1000\ngateway", "", "dhcp = true\nflood = true\nflood-rate = 1000", "dhcp = true\nflood-rate = 50"}, "~ network storage: flood 50/s, was 1000/s"},
		{"flood", "edge-3", []string{"dhcp = true\nflood = true\nflood-rate = 1000", "flood = false"}, `
~ network storage: flood none, was 1000/s
- member storage edge-1: SID 5f00:1ace:1:18:0:c800::
- member storage edge-2: SID 5f00:1ace:2:18:0:c800::
- member storage gw: SID 5f00:1ace:9::2`},
		{"an endpoint moves", "edge-3", []string{"node = \"edge-1\"\nmac = \"52:54:00:00:00:01\"", "node = 'edge-2'\nmac = '52:54:00:00:00:01'"}, `
~ block storage 10.50.0.200/32: on edge-2, was on edge-1; SID 5f00:1ace:2:14:0:c800::, was 5f00:1ace:1:14:0:c800::
~ block storage fd50::ffff:1/128: on edge-2, was on edge-1; SID 5f00:1ace:2:14:0:c800::, was 5f00:1ace:1:14:0:c800::
~ station storage vm: on edge-2, was edge-1; SID 5f00:1ace:2:17:0:c800::, was 5f00:1ace:1:17:0:c800::`},
		{"another MAC", "edge-1", []string{"52:54:00:00:00:03", "52:54:00:00:00:33"}, "~ station storage appliance: mac 52:54:00:00:00:33, was 52:54:00:00:00:03"},
		{"where a router takes frames", "edge-1", []string{"5f00:1ace:9::2", "5f00:1ace:9::22"}, `
~ peer gw: SID of frames 5f00:1ace:9::22, was 5f00:1ace:9::2
~ block storage fd50::ffff:3/128: SID 5f00:1ace:9::22, was 5f00:1ace:9::2
~ station storage appliance: SID 5f00:1ace:9::22, was 5f00:1ace:9::2
~ member storage gw: SID 5f00:1ace:9::22, was 5f00:1ace:9::2`},
		{"a base", "edge-1", []string{"fd51::1:0/112", "fd51::7:1:0/112", "fd51::2:0/112", "fd51::7:2:0/112", "fd51::ffff:7", "fd51::7:ffff:7", "02:4c:ff:ff:00:07", "02:4c:ff:ff:00:07"}, `
~ network six: base fd51::7:0:0/96, was fd51::/96
- block six fd51::1:0/112: here
- block six fd51::2:0/112: on edge-2, SID 5f00:1ace:2:14:1:2c00::
- block six fd51::ffff:7/128: on edge-2, SID 5f00:1ace:2:14:1:2c00::
+ block six fd51::7:1:0/112: here
+ block six fd51::7:2:0/112: on edge-2, SID 5f00:1ace:2:14:1:2c00::
+ block six fd51::7:ffff:7/128: on edge-2, SID 5f00:1ace:2:14:1:2c00::`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var lines []string
			for _, change := range Diff(segments(t, c.node), segments(t, c.node, c.changes...)) {
				lines = append(lines, change.String())
			}
			if diff := cmp.Diff(strings.TrimPrefix(c.want, "\n"), strings.Join(lines, "\n")); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
