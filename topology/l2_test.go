// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// segment is a right file of 13 lines with one L2 network; a test goes on at line 14, in its table.
const segment = `version = 1
[underlay]
locator-block = "5f00:1ace::/32"
[node.edge-1]
underlay = "fd00:a::1"
locator = "5f00:1ace:1::/48"
[node.edge-2]
underlay = "fd00:a::2"
locator = "5f00:1ace:2::/48"
[network.storage]
type = "l2"
id = 200
subnets = ["10.50.0.0/24", "fd50::/64"]
`

// six is segment without IPv4.
var six = changeOf(segment, 13, `subnets = ["fd50::/64"]`)

// l2router is a router of storage; its locator has the number 9.
const l2router = "[node.gw]\nkind='router'\nnetwork='storage'\nunderlay='fd00:a::9'\nlocator='5f00:1ace:9::/48'\n"

func endpoint(name, text string) string { return "[endpoint." + name + "]\n" + text + "\n" }

// on1 is an endpoint of storage on edge-1.
func on1(name, text string) string {
	return endpoint(name, "network = 'storage'\nnode = 'edge-1'\n"+text)
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func storage(t testing.TB, text string) *Network {
	t.Helper()
	n, ok := mustParse(t, text).Network("storage")
	if !ok {
		t.Fatal("no network storage")
	}
	return n
}

func TestSegment(t *testing.T) {
	got := storage(t, segment)
	want := &Network{
		Name: "storage", Type: L2, ID: 200, Subnets: []netip.Prefix{prefix("10.50.0.0/24"), prefix("fd50::/64")},
		BlockBits4: 28, BlockBits6: 112, Flood: true, FloodRate: 1000, Line: 10,
	}
	opts := cmp.Options{cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.IgnoreUnexported(Network{})}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("by default (-want +got):\n%s", diff)
	}
	got = storage(t, segment+"gateway = ['fd50::1', '10.50.0.254']\ndhcp = true\nflood-rate = 1000000\npool-size = { v4 = 32, v6 = 128 }\n")
	want.BlockBits4, want.BlockBits6, want.FloodRate, want.DHCP = 32, 128, 1000000, true
	want.Gateway4, want.Gateway6 = addr("10.50.0.254"), addr("fd50::1")
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("as given (-want +got):\n%s", diff)
	}
	if got = storage(t, segment+"flood = false\n"); got.Flood || got.FloodRate != 0 {
		t.Errorf("without flood: %t, %d/s", got.Flood, got.FloodRate)
	}
	if gso := mustParse(t, changeOf(segment, 2, "[underlay]\nl2-gso = 'segment'")).Underlay.L2GSO; gso != Segment {
		t.Errorf("l2-gso is %s", gso)
	}
}

func TestPools(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       map[string]Block
	}{
		{"counted", segment, map[string]Block{
			"edge-1": {prefix("10.50.0.16/28"), prefix("fd50::1:0/112")}, "edge-2": {prefix("10.50.0.32/28"), prefix("fd50::2:0/112")}}},
		{"of a length", segment + "pool-size = { v4 = 26 }\n", map[string]Block{
			"edge-1": {prefix("10.50.0.64/26"), prefix("fd50::1:0/112")}, "edge-2": {prefix("10.50.0.128/26"), prefix("fd50::2:0/112")}}},
		{"by name only", segment + "pools = { edge-2 = ['10.50.0.128/25'] }\n", map[string]Block{
			"edge-1": {}, "edge-2": {V4: prefix("10.50.0.128/25")}}},
		{"by name, the others counted", segment + "pools = { edge-2 = ['10.50.0.128/25'] }\npool-size.v4 = 28\n", map[string]Block{
			"edge-1": {prefix("10.50.0.16/28"), prefix("fd50::1:0/112")}, "edge-2": {prefix("10.50.0.128/25"), prefix("fd50::2:0/112")}}},
		{"none", segment + "pools = {}\n", map[string]Block{"edge-1": {}, "edge-2": {}}},
		{"single addresses", segment + "pools = { edge-1 = ['10.50.0.7/32', 'fd50::7/128'] }\n", map[string]Block{
			"edge-1": {prefix("10.50.0.7/32"), prefix("fd50::7/128")}, "edge-2": {}}},
		{"a router has none", segment + l2router, map[string]Block{"gw": {}, "edge-1": {prefix("10.50.0.16/28"), prefix("fd50::1:0/112")}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			top := mustParse(t, c.text)
			roundTrip(t, top)
			n, _ := top.Network("storage")
			for node, want := range c.want {
				if got := n.Block(node); got != want {
					t.Errorf("pool of %s: %v, want %v", node, got, want)
				}
			}
		})
	}
}

func TestDerivedMAC(t *testing.T) {
	dual, alone := storage(t, segment), storage(t, six)
	for _, c := range []struct {
		name   string
		n      *Network
		v4, v6 string
		want   string
		of     string // the address that the MAC stands for; "" for none
	}{
		{"IPv4", dual, "10.50.0.17", "", "02:4c:0a:32:00:11", "10.50.0.17"},
		{"both", dual, "10.50.0.255", "fd50::1:7", "02:4c:0a:32:00:ff", "10.50.0.255"},
		{"IPv6 where there is IPv4", dual, "", "fd50::1:7", "00:00:00:00:00:00", ""},
		{"IPv6", alone, "", "fd50::1:7", "02:4c:00:01:00:07", "fd50::1:7"},
		{"IPv6 at the end", alone, "", "fd50::ffff:ffff", "02:4c:ff:ff:ff:ff", "fd50::ffff:ffff"},
		{"IPv6 outside of the base", alone, "", "fd50::1:0:0", "00:00:00:00:00:00", ""},
		{"nothing", alone, "", "", "00:00:00:00:00:00", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			v4, _ := netip.ParseAddr(c.v4)
			v6, _ := netip.ParseAddr(c.v6)
			mac := c.n.DerivedMAC(v4, v6)
			if mac.String() != c.want || mac.Derived() != (c.of != "") {
				t.Errorf("MAC %s, want %s", mac, c.want)
			}
			a, ok := c.n.AddressOf(mac)
			if ok != (c.of != "") || ok && a != addr(c.of) {
				t.Errorf("%s stands for %s (%t), want %q", mac, a, ok, c.of)
			}
		})
	}
	if a, ok := dual.AddressOf(MAC{0x52, 0x54, 0, 0, 0, 1}); ok {
		t.Errorf("another MAC stands for %s", a)
	}
	if a, ok := storage(t, six+"pools = {}\n").AddressOf(MAC{0x02, 0x4c, 0, 0, 0, 1}); ok {
		t.Errorf("without a base a MAC stands for %s", a)
	}
	backend, _ := mustParse(t, base).Network("backend")
	if a, ok := backend.AddressOf(MAC{0x02, 0x4c, 10, 40, 1, 7}); ok {
		t.Errorf("in an L3 network a MAC stands for %s", a)
	}
}

func TestBase6(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"with IPv4", segment, "invalid Prefix"},
		{"counted", six, "fd50::/96"},
		{"given", six + "pools = { edge-1 = ['fd50::7:0:0/112'], edge-2 = ['fd50::7:1:0/112'] }\n", "fd50::7:0:0/96"},
		{"of a small subnet", changeOf(segment, 13, "subnets = ['fd50::7:8:0/112']\npools = {}"), "fd50::7:0:0/96"},
		{"no pools", six + "pools = {}\n", "invalid Prefix"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := storage(t, c.text).Base6().String(); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

func TestOwnerAndReserved(t *testing.T) {
	n := storage(t, segment+"gateway = ['10.50.0.17']\npool-size.v4 = 28\npools.edge-2 = ['10.50.0.128/26']\n"+
		on1("vm", "mac = '52:54:00:00:00:01'\naddress = ['10.50.0.200', 'fd50::ffff:1']")+l2router+
		endpoint("nas", "network = 'storage'\nnode = 'gw'\naddress = ['10.50.0.33']"))
	for _, c := range []struct{ addr, owner, reserved string }{
		{"10.50.0.0", "", "the network address of 10.50.0.0/24"},
		{"10.50.0.1", "", ""},
		{"10.50.0.16", "edge-1", ""},
		{"10.50.0.17", "edge-1", "the gateway"},
		{"10.50.0.31", "edge-1", ""},
		{"10.50.0.33", "gw", "the address of endpoint nas"},
		{"10.50.0.34", "", ""}, // would be of edge-2, which has another pool
		{"10.50.0.128", "edge-2", ""},
		{"10.50.0.191", "edge-2", ""},
		{"10.50.0.192", "", ""},
		{"10.50.0.200", "edge-1", "the address of endpoint vm"},
		{"10.50.0.255", "", "the broadcast address of 10.50.0.0/24"},
		{"10.51.0.0", "", ""},
		{"fd50::", "", "the anycast address of the routers of fd50::/64"},
		{"fd50::1:7", "edge-1", ""},
		{"fd50::ffff:1", "edge-1", "the address of endpoint vm"},
		{"fd50::ffff:ffff:ffff:ffff", "", ""},
		{"fd50::9:7", "", ""}, // would be of gw, which is a router
		{"fd51::1", "", ""},
	} {
		owner, owned := n.Owner(addr(c.addr))
		if owner != c.owner || owned != (c.owner != "") {
			t.Errorf("%s is of %q (%t), want %q", c.addr, owner, owned, c.owner)
		}
		why, is := n.Reserved(addr(c.addr))
		if why != c.reserved || is != (c.reserved != "") {
			t.Errorf("%s is reserved as %q (%t), want %q", c.addr, why, is, c.reserved)
		}
	}
	if why, is := n.Reserved(netip.Addr{}); is {
		t.Errorf("no address is %s", why)
	}
}

// The owner of an address is the node whose block it is in, in L3 networks too.
func TestOwnerOfBlocks(t *testing.T) {
	top := mustParse(t, base+"blocks.edge-2 = ['10.40.200.0/22']\n"+strings.ReplaceAll(l2router, "storage", "backend"))
	backend, _ := top.Network("backend")
	for a, want := range map[string]string{
		"10.40.1.1": "edge-1", "10.40.2.1": "", "10.40.203.255": "edge-2", "10.40.9.1": "gw", "10.41.1.1": "", "fd40:0:0:2::9": "edge-2", "fd40:0:0:3::": "",
	} {
		if got, ok := backend.Owner(addr(a)); got != want || ok != (want != "") {
			t.Errorf("%s is of %q (%t), want %q", a, got, ok, want)
		}
	}
	if why, is := backend.Reserved(addr("10.40.0.0")); is {
		t.Errorf("an L3 network reserves %s", why)
	}
}

func TestOn(t *testing.T) {
	n := storage(t, segment+"pools = { edge-1 = ['10.50.0.16/28'] }\n"+nodes(2)+l2router+
		endpoint("vm", "network = 'storage'\nnode = 'n0'\nmac = '52:54:00:00:00:01'"))
	for node, want := range map[string]bool{"edge-1": true, "edge-2": false, "n0": true, "n1": false, "gw": true, "nobody": false} {
		if got := n.On(node); got != want {
			t.Errorf("on %s: %t, want %t", node, got, want)
		}
	}
}

func TestL2Router(t *testing.T) {
	for _, c := range []struct{ name, sid, l2, v4 string }{
		{"by default", "", "5f00:1ace:9:17:0:c800::", "invalid IP"},
		{"given", "sid.l2 = '5f00:1ace:9::2'\n", "5f00:1ace:9::2", "invalid IP"},
		{"takes packets too", "sid.v4 = '5f00:1ace:9::4'\n", "5f00:1ace:9:17:0:c800::", "5f00:1ace:9::4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			top := mustParse(t, segment+l2router+c.sid)
			roundTrip(t, top)
			gw, _ := top.Node("gw")
			if gw.SIDL2.String() != c.l2 || gw.SID4.String() != c.v4 || gw.SID6.IsValid() {
				t.Errorf("SIDs %s, %s, %s", gw.SID4, gw.SID6, gw.SIDL2)
			}
		})
	}
}

const vmAt = "mac = '52:54:00:00:00:01'\n"

// l2Errors are right but for one thing each; want is the whole text of all errors.
var l2Errors = []errorCase{
	{"l2-gso", changeOf(segment, 2, "[underlay]\nl2-gso = 'cut'"), `t.toml:3: underlay.l2-gso: "cut" is no way to send frames that are still to be segmented; write "shim" or "segment"`},

	// keys of the other type
	{"block-size", segment + "block-size.v4 = 26", `t.toml:14: network.storage.block-size: an L2 network has none; write pool-size`},
	{"blocks", segment + "blocks = { edge-1 = ['10.50.0.16/28'] }", `t.toml:14: network.storage.blocks: an L2 network has none; write pools`},
	{"L3 with pools", base + "pool-size.v4 = 24\npools = {}", "t.toml:14: network.backend.pool-size: an L3 network has none; write block-size\nt.toml:15: network.backend.pools: an L3 network has none; write blocks"},
	{"L3 with gateway", base + "gateway = ['10.40.0.1']", `t.toml:14: network.backend.gateway: an L3 network has none; leave it out: the first address of each node's block is its gateway`},
	{"L3 with the rest", base + "dhcp = false\nflood = true\nflood-rate = 7", "t.toml:14: network.backend.dhcp: an L3 network has none; leave it out\nt.toml:15: network.backend.flood: an L3 network has none; leave it out\nt.toml:16: network.backend.flood-rate: an L3 network has none; leave it out"},
	{"no type", changeOf(segment, 11, "") + "pools = {}", `t.toml:10: network.storage.type: is missing; add type = "l3", type = "l2" or type = "external"`},

	// subnets
	{"second subnet", changeOf(segment, 13, "subnets = ['10.50.0.0/24',\n'10.51.0.0/24']"), `t.toml:14: network.storage.subnets[1]: 10.51.0.0/24 is a second IPv4 subnet; the first is 10.50.0.0/24; leave one out: an L2 network is one segment`},
	{"second IPv6 subnet", changeOf(segment, 13, "subnets = ['fd50::/64', 'fd51::/64']"), `network.storage.subnets[1]: fd51::/64 is a second IPv6 subnet; the first is fd50::/64`},
	{"subnet too small", changeOf(segment, 13, "subnets = ['10.50.0.0/31']"), `t.toml:13: network.storage.subnets[0]: /31 is no length for an IPv4 subnet of an L2 network; choose a length from 8 to 30`},
	{"IPv6 subnet too small", changeOf(segment, 13, "subnets = ['fd50::/127']"), `/127 is no length for an IPv6 subnet of an L2 network; choose a length from 0 to 126`},
	{"subnet twice", changeOf(segment, 13, "subnets = ['10.50.0.0/24', '10.50.0.0/24']"), `t.toml:13: network.storage.subnets[1]: 10.50.0.0/24 overlaps 10.50.0.0/24 (line 13); make them apart, or leave one out`},
	{"subnet smaller than pool", changeOf(segment, 13, "subnets = ['10.50.0.0/29']"), `t.toml:13: network.storage.subnets[0]: 10.50.0.0/29 is smaller than a pool of /28; widen it, or raise pool-size.v4`},

	// pools
	{"pool-size", segment + "pool-size = { v4 = 33, v6 = 129 }", "t.toml:14: network.storage.pool-size.v4: /33 is no length for an IPv4 pool; choose a length from 16 to 32\nt.toml:14: network.storage.pool-size.v6: /129 is no length for an IPv6 pool; choose a length from 48 to 128"},
	{"too many nodes", segment + "pool-size.v4 = 25", `t.toml:13: network.storage.subnets: too many nodes for the subnet: edge-2 (line 7) has number 2, and there are 2 IPv4 pools of /25, numbered from 0; widen the subnets, raise pool-size.v4, or give the node one in pools.edge-2`},
	{"pool of nobody", segment + "pools = { edge-3 = ['10.50.0.16/28'] }", `t.toml:14: network.storage.pools.edge-3: no node has the name "edge-3"; did you mean "edge-1"?`},
	{"pool of a router", segment + "pools = { gw = ['10.50.0.16/28'] }\n" + l2router, `t.toml:14: network.storage.pools.gw: gw is a router, which has no pool; leave it out, and declare what is behind it as [endpoint.NAME]`},
	{"pool outside", segment + "pools.edge-1 = ['10.51.0.16/28']", `t.toml:14: network.storage.pools.edge-1[0]: 10.51.0.16/28 is not in a subnet of storage; choose a prefix in one of them`},
	{"pool twice", segment + "pools.edge-1 = ['10.50.0.16/28', '10.50.0.32/28']", `t.toml:14: network.storage.pools.edge-1[1]: edge-1 has a second IPv4 pool; the first is 10.50.0.16/28; leave one out`},
	{"pools overlap", segment + "pools.edge-1 = ['10.50.0.0/25']\npools.edge-2 = ['10.50.0.16/28']", `t.toml:15: network.storage.pools.edge-2: 10.50.0.16/28 overlaps 10.50.0.0/25 of edge-1 (line 14); make them apart`},
	{"pool overlaps counted", segment + "pool-size.v4 = 28\npools.edge-1 = ['10.50.0.32/29']", `t.toml:15: network.storage.pools.edge-1: 10.50.0.32/29 overlaps 10.50.0.32/28, which edge-2 (line 7) owns by its number 2; choose one whose number no node has`},
	{"lengths with endpoints", segment + "pool-size.v4 = 28\npools.n0=['10.50.0.224/29']\npools.n1=['10.50.0.232/30']\npools.n2=['10.50.0.236/31']\n" + strings.Replace(nodes(3), "5f00:1ace:10", "5f00:1ace:3", 1) + on1("vm", "address = ['10.50.0.240']"),
		`t.toml:15: network.storage.pools: IPv4 pools of 5 different lengths with the /32 of endpoints; a network has at most 4; make some of them the same`},

	// one /96 without IPv4
	{"wide pool", six + "pool-size.v6 = 80", `t.toml:14: network.storage.pool-size.v6: pool fd50::1:0:0:0/80 of edge-1 is too wide for a network without IPv4: its MACs hold the last 32 bits of an address; choose lengths from 96 to 128, or give the network IPv4 too`},
	{"two bases", six + "pools = { edge-1 = ['fd50::1:0/112'],\nedge-2 = ['fd50::1:0:0/112'] }", `t.toml:15: network.storage.pools.edge-2: pool fd50::1:0:0/112 of edge-2 and fd50::1:0/112 of edge-1 are not in one /96: without IPv4 a MAC holds the last 32 bits of an address; give it one in fd50::/96, or give the network IPv4 too`},

	// gateway, DHCP, flood
	{"gateway outside", segment + "gateway = ['10.51.0.1']", `t.toml:14: network.storage.gateway[0]: 10.51.0.1 is not in the subnet 10.50.0.0/24 of storage; choose one in it`},
	{"gateway of no family", six + "gateway = ['10.50.0.1']", `t.toml:14: network.storage.gateway[0]: 10.50.0.1 is none of storage, which has no IPv4 subnet; leave it out, or give the network such a subnet`},
	{"gateway is the network", segment + "gateway = ['10.50.0.0']", `t.toml:14: network.storage.gateway[0]: 10.50.0.0 is the network address of 10.50.0.0/24; choose another`},
	{"gateway is the broadcast", segment + "gateway = ['10.50.0.255']", `t.toml:14: network.storage.gateway[0]: 10.50.0.255 is the broadcast address of 10.50.0.0/24; choose another`},
	{"gateway is anycast", segment + "gateway = ['fd50::']", `t.toml:14: network.storage.gateway[0]: fd50:: is the anycast address of the routers of fd50::/64; choose another`},
	{"second gateway", segment + "gateway = ['10.50.0.1', '10.50.0.2']", `t.toml:14: network.storage.gateway[1]: 10.50.0.2 is a second IPv4 gateway; the first is 10.50.0.1; leave one out`},
	{"gateway text", segment + "gateway = ['10.50.0.1/24']", `t.toml:14: network.storage.gateway[0]: "10.50.0.1/24" is no IP address; write a list of addresses, as ["10.50.0.1", "fd50::1"]`},
	{"gateway mapped", segment + "gateway = ['::ffff:10.50.0.1']", `t.toml:14: network.storage.gateway[0]: "::ffff:10.50.0.1" is an IPv4 address in IPv6 clothes; write 10.50.0.1`},
	{"dhcp without flood", segment + "dhcp = true\nflood = false", `t.toml:14: network.storage.dhcp: needs flood: who asks for an address asks all; leave one of the two out`},
	{"flood-rate without flood", segment + "flood = false\nflood-rate = 100", `t.toml:15: network.storage.flood-rate: nothing is replicated with flood = false; leave one of the two out`},
	{"flood-rate 0", segment + "flood-rate = 0", `t.toml:14: network.storage.flood-rate: 0 frames a second are out of range; choose a number from 1 to 1000000`},
	{"flood-rate high", segment + "flood-rate = 1000001", `1000001 frames a second are out of range`},
	{"flood text", segment + "flood = 'yes'", `t.toml:14: network.storage.flood: is the string "yes"; write true or false`},
	{"flooded nodes", changeOf(segment, 13, "subnets = ['10.50.0.0/16']") + nodes(254) + l2router, `t.toml:10: network.storage.flood: 257 nodes have storage; at most 256 get copies; write flood = false, or name the nodes that have it in pools`},

	// routers
	{"router of L3 with sid.l2", base + "[node.gw]\nkind='router'\nnetwork='backend'\nunderlay='fd00:a::9'\nlocator='5f00:1ace:9::/48'\nsid.l2='5f00:1ace:9::2'", `t.toml:19: node.gw.sid.l2: its network backend is an L3 network, which has no frames; leave it out`},
	{"router sid.l2 outside", segment + l2router + "sid.l2 = '5f00:1ace:8::2'", `t.toml:19: node.gw.sid.l2: 5f00:1ace:8::2 is not in the locator 5f00:1ace:9::/48 of gw; choose an address in it`},

	// endpoints
	{"endpoint name", segment + endpoint("a_b", "network='storage'\nnode='edge-1'\n"+vmAt), `t.toml:14: endpoint.a_b: "a_b" is no name of an endpoint; a name has letters, digits, hyphens and dots, at most 63`},
	{"endpoint without all", segment + endpoint("vm", ""), "t.toml:14: endpoint.vm.network: is missing; add the name of an L2 network\nt.toml:14: endpoint.vm.node: is missing; add the name of the node that it is attached to"},
	{"endpoint of unknown network", segment + endpoint("vm", "network='storag'\nnode='edge-1'\n"+vmAt), `t.toml:15: endpoint.vm.network: no network has the name "storag"; did you mean "storage"?`},
	{"endpoint of L3", base + endpoint("vm", "network='backend'\nnode='edge-1'\n"+vmAt), `t.toml:15: endpoint.vm.network: backend is an L3 network; name an L2 network: in an L3 network every address belongs to a node's block`},
	{"endpoint on unknown node", segment + endpoint("vm", "network='storage'\nnode='edge-11'\n"+vmAt), `t.toml:16: endpoint.vm.node: no node has the name "edge-11"; did you mean "edge-1"?`},
	{"endpoint on another's router", segment + strings.Replace(l2router, "'storage'", "'other'", 1) + "[network.other]\ntype='l3'\nid=7\nsubnets=['10.40.0.0/16']\n" + endpoint("vm", "network='storage'\nnode='gw'\n"+vmAt), `t.toml:25: endpoint.vm.node: gw is a router of network "other"; name a host, or a router of storage`},
	{"endpoint in a pool", segment + on1("vm", "address = ['10.50.0.40']"), `t.toml:17: endpoint.vm.address[0]: 10.50.0.40 is in pool 10.50.0.32/28 of edge-2, and endpoints live outside the pools; choose one outside of all pools, or name the pools in network.storage.pools`},
	{"endpoint in an IPv6 pool", segment + on1("vm", vmAt+"address = ['fd50::1:7']"), `t.toml:18: endpoint.vm.address[0]: fd50::1:7 is in pool fd50::1:0/112 of edge-1, and`},
	{"endpoint outside", segment + on1("vm", "address = ['10.51.0.1']"), `t.toml:17: endpoint.vm.address[0]: 10.51.0.1 is not in the subnet 10.50.0.0/24 of storage; choose one in it`},
	{"endpoint of no family", six + on1("vm", vmAt+"address = ['10.51.0.1']"), `10.51.0.1 is none of storage, which has no IPv4 subnet; leave it out, or`},
	{"endpoint at the gateway", segment + "gateway = ['10.50.0.1']\n" + on1("vm", "address = ['10.50.0.1']"), `t.toml:18: endpoint.vm.address[0]: 10.50.0.1 is the gateway; choose another`},
	{"endpoint at the broadcast", segment + on1("vm", "address = ['10.50.0.255']"), `10.50.0.255 is the broadcast address of 10.50.0.0/24; choose another`},
	{"endpoint with two", segment + on1("vm", "address = ['10.50.0.200', '10.50.0.201']"), `t.toml:17: endpoint.vm.address[1]: 10.50.0.201 is a second IPv4 address; the first is 10.50.0.200; leave one out`},
	{"address twice", segment + on1("a", "address = ['10.50.0.200']") + on1("b", "address = ['10.50.0.200']"), `t.toml:21: endpoint.b.address: 10.50.0.200 is that of a (line 14) too; choose another`},
	{"address twice, the later one", segment + on1("b", "address = ['10.50.0.200']") + on1("a", vmAt+"address = ['10.50.0.200']"), `t.toml:22: endpoint.a.address: 10.50.0.200 is that of b (line 14) too; choose another`},
	{"MAC twice", segment + on1("a", vmAt) + on1("b", vmAt), `t.toml:22: endpoint.b.mac: 52:54:00:00:00:01 is that of a (line 14) too; choose another`},
	{"no MAC", segment + on1("vm", ""), `t.toml:14: endpoint.vm.mac: is missing: no MAC follows from an endpoint without an IPv4 address; add an Ethernet address, as 52:54:00:00:00:01`},
	{"no MAC of IPv6", segment + on1("vm", "address = ['fd50::ffff:1']"), `endpoint.vm.mac: is missing: no MAC follows from an endpoint without an IPv4 address; add`},
	{"no MAC without addresses", six + on1("vm", ""), `t.toml:14: endpoint.vm.mac: is missing: no MAC follows from an endpoint without an address; add`},
	{"no MAC outside the base", six + on1("vm", "address = ['fd50::1:0:0']"), `no MAC follows from fd50::1:0:0, which is not in fd50::/96 as the pools are; add`},
	{"no MAC without pools", six + "pools = {}\n" + on1("vm", "address = ['fd50::7']"), `no MAC follows from fd50::7, as the network has no pools; add`},
	{"MAC text", segment + on1("vm", "mac = '52:54'"), `t.toml:17: endpoint.vm.mac: "52:54" is no Ethernet address: write 6 bytes in hexadecimal with colons between; write an Ethernet address, as 52:54:00:00:00:01`},
	{"MAC of a group", segment + on1("vm", "mac = '01:00:5e:00:00:01'"), `t.toml:17: endpoint.vm.mac: 01:00:5e:00:00:01 is a group's; choose one whose first byte is even`},
	{"MAC of nobody", segment + on1("vm", "mac = '00:00:00:00:00:00'"), `t.toml:17: endpoint.vm.mac: 00:00:00:00:00:00 is nobody's; choose another`},
	{"MAC of the gateway", segment + on1("vm", "mac = '06:00:6c:61:63:65'"), `t.toml:17: endpoint.vm.mac: 06:00:6c:61:63:65 is the gateway's in every network; choose another`},
	{"MAC of an address", segment + on1("vm", "mac = '02:4c:0a:32:00:11'\naddress = ['10.50.0.200']"), `t.toml:17: endpoint.vm.mac: 02:4c:0a:32:00:11 stands for the address 10.50.0.17, which this is not; leave it out, or choose one that does not start with 02:4c`},
	{"MAC of no address", six + "pools = {}\n" + on1("vm", "mac = '02:4c:0a:32:00:11'"), `02:4c:0a:32:00:11 is of the form that holds an address; leave it out, or`},
	{"endpoints", segment + numbered("[endpoint.e%d]\nnetwork='storage'\nnode='edge-1'\n", MaxEndpoints+1), `t.toml:14: endpoint: 16385 endpoints; at most 16384 are possible; leave some out, or split the topology`},

	// peerings
	{"peered without gateway", segment + webNet + peering("'web'", "'storage'"), `t.toml:10: network.storage.gateway: is peered with web (line 18) and has no IPv4 gateway that leads there; add one, as "10.50.0.1", or leave the peering out`},
	{"peering from it", segment + webNet + peering("'storage'", "'web'"), `network.storage.gateway: is peered with web (line 18) and has no IPv4 gateway`},
	{"one family of two", segment + "gateway = ['10.50.0.1']\n" + strings.Replace(webNet, "'10.41.0.0/16'", "'10.41.0.0/16', 'fd41::/48'", 1) + peering("'web'", "'storage'"),
		`t.toml:14: network.storage.gateway: is peered with web (line 19) and has no IPv6 gateway that leads there; add one, as "fd50::1", or leave the peering out`},
	{"two L2 networks", segment + "gateway = ['10.50.0.1']\n" + l2Net + peering("'storage'", "'other'"), `t.toml:15: network.other.gateway: is peered with storage (line 19) and has no IPv4 gateway that leads there; add one, as "10.51.0.1"`},
	{"overlap", segment + "gateway = ['10.50.0.1']\n" + strings.Replace(webNet, "10.41", "10.50", 1) + peering("'web'", "'storage'"), `t.toml:18: network.web.subnets[0]: 10.50.0.0/16 overlaps 10.50.0.0/24 of storage (line 13), with which it is peered (line 19); make them apart, or leave the peering out`},
}

const (
	webNet = "[network.web]\ntype = 'l3'\nid = 101\nsubnets = ['10.41.0.0/16']\n"
	l2Net  = "[network.other]\ntype = 'l2'\nid = 102\nsubnets = ['10.51.0.0/24']\n"
)

func TestL2Errors(t *testing.T) { checkErrors(t, l2Errors) }

// At most 100 errors of endpoints are shown, however many there are.
func TestEndpointErrorsAreBounded(t *testing.T) {
	_, err := Parse("t.toml", []byte(segment+numbered("[endpoint.e%d]\nnetwork='storage'\nnode='edge-1'\n", 150)))
	if got := strings.Count(err.Error(), "is missing"); got != maxComplaints || !strings.Contains(err.Error(), "t.toml:14: endpoint: 50 more errors are not shown; mend these first") {
		t.Errorf("%d errors:\n%v", got, err)
	}
}

// What is odd but right.
func TestL2Accepted(t *testing.T) {
	for name, text := range map[string]string{
		"gateway in a pool":           segment + "gateway = ['10.50.0.17', 'fd50::1:1']\n",
		"pool with the broadcast":     segment + "pools = { edge-1 = ['10.50.0.128/25'] }\n",
		"empty pool":                  segment + "pools.edge-1 = []\n",
		"endpoint by address":         segment + on1("vm", "address = ['10.50.0.200']"),
		"endpoint by its own MAC":     segment + on1("vm", "mac = '02:4C:0a:32:00:c8'\naddress = ['10.50.0.200', 'fd50::ffff:1']"),
		"endpoint without address":    segment + on1("vm", vmAt),
		"endpoint of IPv6":            six + on1("vm", "address = ['fd50::ffff:1']"),
		"endpoint at a router":        segment + l2router + endpoint("vm", "network='storage'\nnode='gw'\naddress=['10.50.0.200']"),
		"MAC in two networks":         segment + l2Net + on1("a", vmAt) + endpoint("b", "network='other'\nnode='edge-1'\n"+vmAt),
		"address in two networks":     segment + strings.Replace(l2Net, "10.51", "10.50", 1) + on1("a", "address = ['10.50.0.200']") + endpoint("b", "network='other'\nnode='edge-1'\naddress = ['10.50.0.200']"),
		"endpoint named as a network": segment + on1("storage", vmAt),
		"dotted name":                 segment + on1(`"vm.example.org"`, vmAt),
		"256 nodes":                   changeOf(segment, 13, "subnets = ['10.50.0.0/16']") + nodes(254),
		"more without flood":          changeOf(segment, 13, "subnets = ['10.50.0.0/16']\nflood = false") + nodes(300),
		"more where few have it":      segment + "pools = { edge-1 = ['10.50.0.16/28'] }\n" + nodes(300),
		"peered by its gateway":       segment + "gateway = ['10.50.0.1']\n" + webNet + peering("'web'", "'storage'"),
		"no family in common":         six + webNet + peering("'web'", "'storage'"),
		"labels":                      segment + "labels = { tier = 'data' }\n",
		"4 lengths with endpoints":    segment + "pool-size.v4 = 28\npools.n0=['10.50.0.224/29']\npools.n1=['10.50.0.232/30']\n" + nodes(2) + on1("vm", "address = ['10.50.0.240']"),
		"only 4 where none is v4":     segment + "pool-size.v4 = 28\npools.n0=['10.50.0.224/29']\npools.n1=['10.50.0.232/30']\npools.n2=['10.50.0.236/31']\n" + strings.Replace(nodes(3), "5f00:1ace:10", "5f00:1ace:3", 1) + on1("vm", vmAt),
	} {
		t.Run(name, func(t *testing.T) { roundTrip(t, mustParse(t, text)) })
	}
}

// Whatever a node has to do otherwise is in the hash.
func TestL2Hash(t *testing.T) {
	vm := on1("vm", "address = ['10.50.0.200']")
	same := []string{
		segment + vm, changeOf(segment, 2, "[underlay]\nl2-gso = 'shim'") + vm, segment + "dhcp = false\nflood = true\nflood-rate = 1000\npool-size = { v4 = 28 }\n" + vm,
		segment + on1("vm", "mac = '02:4c:0a:32:00:c8'\naddress = ['10.50.0.200']"),
	}
	want := mustParse(t, segment+vm).Hash
	for _, text := range same {
		if got := mustParse(t, text).Hash; got != want {
			t.Errorf("hash %s, want %s, of\n%s", got, want, text)
		}
	}
	seen := []Hash{want}
	for _, text := range []string{
		segment, changeOf(segment, 2, "[underlay]\nl2-gso = 'segment'") + vm, segment + "dhcp = true\n" + vm, segment + "flood = false\n" + vm,
		segment + "flood-rate = 999\n" + vm, segment + "pool-size.v4 = 29\n" + vm, segment + "pool-size.v6 = 111\n" + vm,
		segment + "pools.edge-1 = ['10.50.0.16/28']\n" + vm, segment + "pools = {}\n" + vm, segment + "gateway = ['10.50.0.1']\n" + vm, segment + "gateway = ['fd50::1']\n" + vm,
		segment + on1("nas", "address = ['10.50.0.200']"), segment + on1("vm", "address = ['10.50.0.201']"), segment + on1("vm", vmAt+"address = ['10.50.0.200']"),
		segment + on1("vm", "address = ['10.50.0.200', 'fd50::ffff:1']"), segment + strings.Replace(vm, "edge-1", "edge-2", 1), segment + l2router + vm,
		segment + l2router + "sid.l2 = '5f00:1ace:9::2'\n" + vm, segment + l2router + "sid.v4 = '5f00:1ace:9::2'\n" + vm,
		segment + "gateway = ['10.50.0.1']\nlabels.a = 'b'\n" + vm,
	} {
		h := mustParse(t, text).Hash
		if slices.Contains(seen, h) {
			t.Errorf("a hash that was there already for\n%s", text)
		}
		seen = append(seen, h)
	}
}

// A full file is read in reasonable time, also where every endpoint is looked for among many pools.
func TestLargeSegments(t *testing.T) {
	var pools, endpoints strings.Builder
	for i := range 3000 {
		fmt.Fprintf(&pools, "n%d=['10.%d.%d.0/28'],", i, 100+i/256, i%256)
	}
	for i := range 9000 {
		fmt.Fprintf(&endpoints, "[endpoint.e%d]\nnetwork='storage'\nnode='n%d'\naddress=['10.200.%d.%d']\n", i, i%3000, i/250, 1+i%250)
	}
	start := time.Now()
	top := mustParse(t, changeOf(segment, 13, "subnets = ['10.0.0.0/8']\nflood = false\npools = { "+pools.String()+"}")+nodes(3000)+endpoints.String())
	if took := time.Since(start); took > 10*time.Second || len(top.Endpoints) != 9000 {
		t.Errorf("%d endpoints took %s", len(top.Endpoints), took)
	}
}
