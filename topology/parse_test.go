// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// base is a right file of 14 lines; the tests add to it or change it.
const base = `version = 1
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
subnets = ["10.40.0.0/16", "fd40::/48"]
`

// change replaces one line of base, counted from 1, by others.
func change(line int, by string) string { return changeOf(base, line, by) }

func changeOf(text string, line int, by string) string {
	lines := strings.Split(text, "\n")
	lines[line-1] = by
	return strings.Join(lines, "\n")
}

func mustParse(t testing.TB, text string) *Topology {
	t.Helper()
	top, err := Parse("t.toml", []byte(text))
	if err != nil {
		t.Fatalf("parse:\n%v\n%s", err, text)
	}
	return top
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestParse(t *testing.T) {
	got := mustParse(t, base+`
blocks = { edge-2 = ["10.40.200.0/22"] }
block-size.v6 = 56
[node.gw]
kind = "router"
underlay = "fd00:a::9"
locator = "5f00:1ace:9::/48"
network = "backend"
sid.v4 = "5f00:1ace:9::4"
labels = { zone = "a b" }
`)
	backend, _ := got.Network("backend")
	gw, _ := got.Node("gw")
	want := &Node{
		Name: "gw", Kind: KindRouter, Underlay: netip.MustParseAddr("fd00:a::9"), Locator: Locator{prefix("5f00:1ace:9::/48")},
		Number: 9, Labels: map[string]string{"zone": "a b"}, Network: "backend",
		SID4: netip.MustParseAddr("5f00:1ace:9::4"), SID6: netip.MustParseAddr("5f00:1ace:9:14:0:6400::"), Line: 17,
	}
	if diff := cmp.Diff(want, gw, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("node gw (-want +got):\n%s", diff)
	}
	blocks := map[string]Block{
		"edge-1": {prefix("10.40.1.0/24"), prefix("fd40:0:0:100::/56")},
		"edge-2": {prefix("10.40.200.0/22"), prefix("fd40:0:0:200::/56")},
		"gw":     {prefix("10.40.9.0/24"), prefix("fd40:0:0:900::/56")},
		"none":   {},
	}
	for name, want := range blocks {
		if got := backend.Block(name); got != want {
			t.Errorf("block of %s: %v, want %v", name, got, want)
		}
	}
	if g := backend.Block("edge-2").Gateway4(); g != netip.MustParseAddr("10.40.200.1") {
		t.Errorf("gateway %s", g)
	}
	if g := backend.Block("none").Gateway6(); g.IsValid() {
		t.Errorf("gateway %s of no block", g)
	}
}

// A router owns blocks of its own network only.
func TestRouterBlocks(t *testing.T) {
	top := mustParse(t, base+"[network.other]\ntype='l3'\nid=7\nsubnets=['10.40.0.0/16']\n[node.gw]\nkind='router'\nunderlay='fd00:a::9'\nlocator='5f00:1ace:9::/48'\nnetwork='other'\n")
	backend, _ := top.Network("backend")
	other, _ := top.Network("other")
	if b := backend.Block("gw"); b != (Block{}) {
		t.Errorf("block %v in a network that is not the router's", b)
	}
	if b := other.Block("gw"); b.V4 != prefix("10.40.9.0/24") || b.V6.IsValid() {
		t.Errorf("block %v", b)
	}
}

// Blocks are counted through the subnets of a family in the order of the file.
func TestBlocksThroughSubnets(t *testing.T) {
	text := change(13, `subnets = ["10.9.0.0/23", "fd41::/63", "10.8.0.0/24", "fd40::/48"]`)
	for i := range 4 {
		text += fmt.Sprintf("[node.n%d]\nunderlay='fd00:b::%d'\nlocator='5f00:1ace:%x::/48'\n", i, i, []int{0, 3, 4, 5}[i])
	}
	text = strings.Replace(text, "[node.n0]", "block-size = {v4 = 25}\n[node.n0]", 1)
	backend, _ := mustParse(t, text).Network("backend")
	for name, want := range map[string]Block{
		"n0":     {prefix("10.9.0.0/25"), prefix("fd41::/64")},
		"edge-1": {prefix("10.9.0.128/25"), prefix("fd41:0:0:1::/64")},
		"edge-2": {prefix("10.9.1.0/25"), prefix("fd40::/64")},
		"n1":     {prefix("10.9.1.128/25"), prefix("fd40:0:0:1::/64")},
		"n2":     {prefix("10.8.0.0/25"), prefix("fd40:0:0:2::/64")},
		"n3":     {prefix("10.8.0.128/25"), prefix("fd40:0:0:3::/64")},
	} {
		if got := backend.Block(name); got != want {
			t.Errorf("block of %s: %v, want %v", name, got, want)
		}
	}
}

// errorCases are right but for one thing each; want is the whole text of all errors.
var errorCases = []errorCase{
	// syntax
	{"syntax", change(3, `locator-block = 5f00::`), `t.toml:3: underlay.locator-block: expected`},
	{"unclosed string", change(5, `underlay = "fd00`), `t.toml:5: node.edge-1.underlay: strings cannot contain newlines`},
	{"key twice", change(6, "underlay = 'fd00::1'"), `t.toml:6: Key 'node.edge-1.underlay' has already been defined.`},
	{"NUL", "version = 1 \x00", `t.toml:1: version: `},
	{"UTF-16", "\xff\xfev\x00e\x00", `t.toml:1: `},
	{"not UTF-8", "version = '\xff'", `t.toml:1: version: invalid UTF-8`},
	{"lone CR", "version = 1\rversion = 2", `t.toml:1: version: `},
	{"deep", "a = " + strings.Repeat("[", 100), `t.toml:1: nested more than 16 deep; is it the right file?`},
	{"deep key", "a" + strings.Repeat(".a", 100), `t.toml:1: nested more than 16 deep; is it the right file?`},
	{"long key", strings.Repeat("a", 300) + " = 1", `t.toml:1: key longer than 256 bytes; is it the right file?`},

	// what has to be there
	{"empty", "", "t.toml: node: is missing; add a table [node.NAME] for each node\nt.toml: underlay: is missing; add [underlay] with a locator-block\nt.toml: version: is missing; add version = 1"},
	{"version", change(1, "version = 2"), `t.toml:1: version: version 2 is not known; write version = 1`},
	{"version as string", change(1, "version = '1'"), `t.toml:1: version: is the string "1"; write version = 1`},
	{"no locator", change(6, ""), `t.toml:4: node.edge-1.locator: is missing; add an IPv6 prefix in the locator block, as 5f00:1ace:1::/48`},
	{"no subnets", change(13, ""), `t.toml:10: network.backend.subnets: is missing; add a list of prefixes, as ["10.40.0.0/16", "fd40::/48"]`},
	{"empty subnets", change(13, "subnets = []"), `t.toml:13: network.backend.subnets: no subnet; add one, as 10.40.0.0/16`},
	{"no nodes", "version = 1\nnode = {}\nunderlay.locator-block = '5f00::/16'", `t.toml:2: node: no node; add a table [node.NAME] for each node`},

	// unknown keys and later features
	{"unknown key", base + "subnet = []", `t.toml:14: network.backend.subnet: unknown key; did you mean "subnets"?`},
	{"unknown table", base + "[[policy]]", `t.toml:14: policy: unknown key; known here: conntrack, endpoint, masquerade, network, node, peering, underlay, version`},
	{"service", base + "[service.web]", `t.toml:14: service: unknown key; known here: conntrack, endpoint, masquerade, network, node, peering, underlay, version`},
	{"later type", change(11, `type = "l4"`), `t.toml:11: network.backend.type: "l4" is no type of network that this version has; write type = "l3", type = "l2" or type = "external"`},

	// wrong types
	{"table for string", change(5, "underlay = {}"), `t.toml:5: node.edge-1.underlay: is a table; write the node's IPv6 address in the underlay, as fd00:a::1`},
	{"string for list", change(13, `subnets = "10.40.0.0/16"`), `t.toml:13: network.backend.subnets: is the string "10.40.0.0/16"; write a list of prefixes, as ["10.40.0.0/16", "fd40::/48"]`},
	{"float for id", change(12, "id = 1.5"), `t.toml:12: network.backend.id: is a float; write a number from 1 to 16777199 that no other network has`},
	{"string for table", "node = 'x'\n" + base[:strings.Index(base, "[node")], `t.toml:1: node: is the string "x"; write a table [node.NAME] for each node`},
	{"date in list", change(13, "subnets = [1979-05-27]"), `t.toml:13: network.backend.subnets[0]: is a date or time; write a list`},
	{"label", change(5, "underlay = 'fd00:a::1'\nlabels = { a = 1, b = true }"), "t.toml:6: node.edge-1.labels.a: is the integer 1; write a table of strings, as { zone = \"a\" }\nt.toml:6: node.edge-1.labels.b: is the boolean true; write a table of strings, as { zone = \"a\" }"},

	// underlay
	{"block IPv4", change(3, `locator-block = "10.0.0.0/8"`), `t.toml:3: underlay.locator-block: "10.0.0.0/8" is an IPv4 prefix; write an IPv6 prefix that all locators lie in, as 5f00:1ace::/32`},
	{"block host bits", change(3, `locator-block = "5f00:1ace::1/32"`), `t.toml:3: underlay.locator-block: "5f00:1ace::1/32" has host bits; write 5f00:1ace::/32`},
	{"block too long", change(3, `locator-block = "5f00:1ace::/65"`), `t.toml:3: underlay.locator-block: 5f00:1ace::/65 is a /65; a locator block has 8 to 64 bits; write an IPv6 prefix that all locators lie in, as 5f00:1ace::/32`},
	{"block multicast", change(3, `locator-block = "ff00::/16"`), `t.toml:3: underlay.locator-block: ff00::/16 overlaps the multicast range ff00::/8`},
	{"block no length", change(3, `locator-block = "5f00::"`), `t.toml:3: underlay.locator-block: "5f00::" is no IP prefix: it has no length`},
	{"encapsulation", change(3, "locator-block = \"5f00:1ace::/32\"\nencapsulation = \"vxlan\""), `t.toml:4: underlay.encapsulation: "vxlan" is no encapsulation; write "reduced" or "srh"`},

	// nodes
	{"node name", change(4, "[node.edge_1]"), `t.toml:4: node.edge_1: "edge_1" is no host name; a name has letters, digits, hyphens and dots, at most 63`},
	{"long node name", change(4, "[node."+strings.Repeat("a", 64)+"]"), `is no host name`},
	{"underlay IPv4", change(5, `underlay = "10.0.0.1"`), `t.toml:5: node.edge-1.underlay: "10.0.0.1" is an IPv4 address; write the node's IPv6 address in the underlay, as fd00:a::1`},
	{"underlay mapped", change(5, `underlay = "::ffff:10.0.0.1"`), `t.toml:5: node.edge-1.underlay: "::ffff:10.0.0.1" is an IPv4 address`},
	{"underlay zone", change(5, `underlay = "fe80::1%eth0"`), `t.toml:5: node.edge-1.underlay: "fe80::1%eth0" has a zone, which means something else on each node`},
	{"underlay link-local", change(5, `underlay = "fe80::1"`), `t.toml:5: node.edge-1.underlay: fe80::1 is in the link-local range fe80::/10`},
	{"underlay NUL", change(5, `underlay = "fd00::1\u0000"`), `t.toml:5: node.edge-1.underlay: "fd00::1\x00" is no IP address`},
	{"underlay no address", change(5, `underlay = "edge-1"`), `t.toml:5: node.edge-1.underlay: "edge-1" is no IP address`},
	{"underlay in block", change(5, `underlay = "5f00:1ace:1::1"`), `t.toml:5: node.edge-1.underlay: 5f00:1ace:1::1 is in the locator block 5f00:1ace::/32; choose an address outside the block: what is in it is a SID`},
	{"underlay twice", change(8, `underlay = "fd00:a::1"`), `t.toml:8: node.edge-2.underlay: is that of edge-1 (line 5) too; choose another`},
	{"locator twice", change(9, `locator = "5f00:1ace:1::/48"`), `t.toml:9: node.edge-2.locator: is that of edge-1 (line 6) too; choose another`},
	{"locator length", change(9, `locator = "5f00:1ace:200::/40"`), `t.toml:9: node.edge-2.locator: is a /40, that of edge-1 (line 6) a /48; write a /48 here too`},
	{"locator outside", change(9, `locator = "5f00:1acf:2::/48"`), `t.toml:9: node.edge-2.locator: 5f00:1acf:2::/48 is not in the locator block 5f00:1ace::/32 of line 3; choose a prefix in the block, or make the block wider`},
	{"locator wider", change(9, `locator = "5f00::/16"`), `t.toml:9: node.edge-2.locator: 5f00::/16 is not in the locator block 5f00:1ace::/32 of line 3`},
	{"locator too long", change(9, `locator = "5f00:1ace:2::/65"`), `t.toml:9: node.edge-2.locator: 5f00:1ace:2::/65 is a /65; a locator has 16 to 64 bits`},
	{"locator host bits", change(9, `locator = "5f00:1ace:2::1/48"`), `t.toml:9: node.edge-2.locator: "5f00:1ace:2::1/48" has host bits; write 5f00:1ace:2::/48`},
	{"uplink name", change(9, base9+"uplinks = [\n'eth0',\n'a/b']"), `t.toml:12: node.edge-2.uplinks[1]: "a/b" is no interface name; write 1 to 15 bytes without spaces and slashes, as eth0`},
	{"uplink twice", change(9, base9+"uplinks = ['eth0', 'eth0']"), `t.toml:10: node.edge-2.uplinks[1]: eth0 is named twice; name each uplink once`},
	{"uplinks many", change(9, base9+"uplinks = ["+numbered("'e%d',", 17)+"]"), `t.toml:10: node.edge-2.uplinks: 17 uplinks; at most 16 are possible`},
	{"via itself", change(9, base9+"via = 'fd00:a::2'"), `t.toml:10: node.edge-2.via: fd00:a::2 is the node itself; name the router, or leave it out`},
	{"label text", change(9, base9+"labels = { \"a\\nb\" = 'x' }"), `is no label; write printable ASCII, at most 63 bytes each`},
	{"kind", change(9, base9+"kind = 'switch'"), `t.toml:10: node.edge-2.kind: "switch" is no kind of node; write "host" or "router"`},
	{"host with sid", change(9, base9+"sid.v4 = '5f00:1ace:2::4'"), `t.toml:10: node.edge-2.sid: only a router has one; leave it out, or write kind = "router"`},
	{"host with network", change(9, base9+"network = 'backend'"), `t.toml:10: node.edge-2.network: only a router has one; leave it out, or write kind = "router"`},
	{"router without network", change(9, base9+"kind = 'router'"), `t.toml:7: node.edge-2.network: no network is named; there are backend`},
	{"router of unknown", change(9, base9+"kind = 'router'\nnetwork = 'backed'"), `t.toml:11: node.edge-2.network: no network has the name "backed"; did you mean "backend"?`},
	{"router with uplinks", change(9, base9+"kind = 'router'\nnetwork = 'backend'\nuplinks = ['eth0']"), `t.toml:12: node.edge-2.uplinks: only a host has one; leave it out: Lace does not run on a router`},
	{"router sid outside", change(9, base9+"kind = 'router'\nnetwork = 'backend'\nsid = { v4 = '5f00:1ace:1::4' }"), `t.toml:12: node.edge-2.sid.v4: 5f00:1ace:1::4 is not in the locator 5f00:1ace:2::/48 of edge-2; choose an address in it`},

	// networks
	{"network name", change(10, "[network.Back]"), `t.toml:10: network.Back: "Back" is no network name; a name has lower-case letters, digits and hyphens, at most 32`},
	{"id 0", change(12, "id = 0"), `t.toml:12: network.backend.id: 0 is not in the range of 24 bits without 0; choose a number from 1 to 16777199`},
	{"id too big", change(12, "id = 16777216"), `t.toml:12: network.backend.id: 16777216 is not in the range`},
	{"id negative", change(12, "id = -1"), `t.toml:12: network.backend.id: -1 is not in the range`},
	{"id twice", base + "[network.b]\ntype='l3'\nid=100\nsubnets=['10.0.0.0/16']", `t.toml:16: network.b.id: 100 is the id of backend (line 12) too; choose another`},
	{"subnet host bits", change(13, "subnets = [\n  '10.40.0.0/16',\n  'fd40::1/48' ]"), `t.toml:15: network.backend.subnets[1]: "fd40::1/48" has host bits; write fd40::/48`},
	{"subnet mapped", change(13, "subnets = ['::ffff:10.0.0.0/104']"), `is an IPv4 prefix in IPv6 clothes; write the IPv4 prefix itself`},
	{"subnet multicast", change(13, "subnets = ['224.1.0.0/16']"), `t.toml:13: network.backend.subnets[0]: 224.1.0.0/16 overlaps the multicast range 224.0.0.0/4; write a range that containers may use`},
	{"subnet everything", change(13, "subnets = ['0.0.0.0/0']"), `0.0.0.0/0 overlaps the unspecified range 0.0.0.0/8`},
	{"subnet loopback", change(13, "subnets = ['127.0.0.0/16']"), `overlaps the loopback range`},
	{"subnet link-local", change(13, "subnets = ['fe80::/48']"), `overlaps the link-local range`},
	{"subnet in block", change(13, "subnets = ['5f00:1ace::/48']"), `t.toml:13: network.backend.subnets[0]: 5f00:1ace::/48 overlaps the locator block 5f00:1ace::/32; choose a range outside the block: what is in it is a SID`},
	{"subnets overlap", change(13, "subnets = [ '10.40.0.0/16',\n'10.40.128.0/20']"), `t.toml:14: network.backend.subnets[1]: 10.40.128.0/20 overlaps 10.40.0.0/16 (line 13); make them apart, or leave one out`},
	{"subnet smaller than block", change(13, "subnets = ['10.40.0.0/25']"), `t.toml:13: network.backend.subnets[0]: 10.40.0.0/25 is smaller than a block of /24; widen it, or raise block-size.v4`},
	{"block-size", base + "block-size = { v4 = 31, v6 = 40 }", "t.toml:14: network.backend.block-size.v4: /31 is no length for an IPv4 block; choose a length from 16 to 30\nt.toml:14: network.backend.block-size.v6: /40 is no length for an IPv6 block; choose a length from 48 to 126"},
	{"block-size huge", base + "block-size.v4 = 9223372036854775807", `is no length for an IPv4 block`},
	{"too many nodes", change(13, "subnets = ['10.40.0.0/23']"), `t.toml:13: network.backend.subnets: too many nodes for the subnet: edge-2 (line 7) has number 2, and there are 2 IPv4 blocks of /24, numbered from 0; widen the subnets, raise block-size.v4, or give the node one in blocks.edge-2`},
	{"too many IPv6", change(13, "subnets = ['fd40::/64']"), `t.toml:13: network.backend.subnets: too many nodes for the subnet: edge-1 (line 4) has number 1, and there are 1 IPv6 blocks of /64, numbered from 0 (and 1 more nodes have none); widen`},
	{"number high", change(9, `locator = "5f00:1ace:ffff::/48"`), `edge-2 (line 7) has number 65535, and there are 256 IPv4 blocks of /24`},

	// given blocks
	{"block of nobody", base + "blocks = { edge-3 = ['10.40.7.0/24'] }", `t.toml:14: network.backend.blocks.edge-3: no node has the name "edge-3"; did you mean "edge-1"?`},
	{"block outside", base + "blocks.edge-1 = ['10.41.7.0/24']", `t.toml:14: network.backend.blocks.edge-1[0]: 10.41.7.0/24 is not in a subnet of backend; choose a prefix in one of them`},
	{"block wider than subnet", base + "blocks.edge-1 = ['10.0.0.0/8']", `t.toml:14: network.backend.blocks.edge-1[0]: 10.0.0.0/8 is not in a subnet of backend`},
	{"block too long", base + "blocks.edge-1 = ['10.40.7.0/31']", `t.toml:14: network.backend.blocks.edge-1[0]: /31 is no length for an IPv4 block; choose a length from 16 to 30`},
	{"block twice", base + "blocks.edge-1 = ['10.40.7.0/24', '10.40.8.0/24']", `t.toml:14: network.backend.blocks.edge-1[1]: edge-1 has a second IPv4 block; the first is 10.40.7.0/24; leave one out`},
	{"block overlaps counted", base + "blocks.edge-1 = ['10.40.2.128/25']", `t.toml:14: network.backend.blocks.edge-1: 10.40.2.128/25 overlaps 10.40.2.0/24, which edge-2 (line 7) owns by its number 2; choose one whose number no node has`},
	{"wide block overlaps counted", base + "blocks.edge-1 = ['10.40.0.0/20']", `10.40.0.0/20 overlaps 10.40.2.0/24, which edge-2 (line 7) owns by its number 2`},
	{"IPv6 block overlaps counted", base + "blocks.edge-1 = ['fd40:0:0:2::/80']", `fd40:0:0:2::/80 overlaps fd40:0:0:2::/64, which edge-2 (line 7) owns by its number 2`},
	{"blocks overlap", base + "blocks.edge-1 = ['10.40.16.0/20']\nblocks.edge-2 = ['10.40.17.0/24']", `t.toml:15: network.backend.blocks.edge-2: 10.40.17.0/24 overlaps 10.40.16.0/20 of edge-1 (line 14); make them apart`},
	{"block of a router elsewhere", base + "blocks.gw = ['10.40.7.0/24']\n[network.b]\ntype='l3'\nid=7\nsubnets=['10.0.0.0/16']\n[node.gw]\nkind='router'\nunderlay='fd00:a::9'\nlocator='5f00:1ace:9::/48'\nnetwork='b'", `t.toml:14: network.backend.blocks.gw: gw is a router of network "b"; leave it out`},
	{"lengths", base + "blocks.n0=['10.40.100.0/25']\nblocks.n1=['10.40.101.0/26']\nblocks.n2=['10.40.102.0/27']\nblocks.n3=['10.40.103.0/28']\n" + nodes(4), `t.toml:14: network.backend.blocks: IPv4 blocks of 5 different lengths; a network has at most 4; make some of them the same`},

	// bounds
	{"nodes", change(13, "subnets = ['10.0.0.0/8']") + nodes(MaxNodes-1), `t.toml:4: node: 4097 nodes; at most 4096 are possible; leave some out, or split the topology`},
	{"networks", base + networks(MaxNetworks), `network: 1025 networks; at most 1024 are possible; leave some out, or split the topology`},
	{"blocks", change(13, "subnets = ['10.0.0.0/8']\nblock-size.v4 = 30") + nodes(2000) + networks(600) + strings.Replace(l2Net, "]\n", "]\npools = {}\n", 1) + endpoint("vm", "network='other'\nnode='edge-1'\naddress=['10.51.0.7']"), `network: 1203203 blocks (networks × nodes × families, and addresses of endpoints); at most 1048576 are possible`},
	{"too long", "#" + strings.Repeat(" ", MaxFile), `t.toml: longer than 1 MiB; is it the right file?`},
}

const base9 = "locator = \"5f00:1ace:2::/48\"\n"

func numbered(format string, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

func nodes(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "[node.n%d]\nunderlay='fd00:b::%x'\nlocator='5f00:1ace:%x::/48'\n", i, i, i+16)
	}
	return b.String()
}

func networks(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "[network.n%d]\ntype='l3'\nid=%d\nsubnets=['10.0.0.0/8']\nblock-size.v4=30\n", i, i+1000)
	}
	return b.String()
}

type errorCase struct{ name, text, want string }

func TestErrors(t *testing.T) { checkErrors(t, errorCases) }

func checkErrors(t *testing.T, cases []errorCase) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			start := time.Now()
			_, err := Parse("t.toml", []byte(c.text))
			var errs Errors
			if !errors.As(err, &errs) {
				t.Fatalf("got %v, want Errors", err)
			}
			if !strings.Contains(err.Error(), c.want) || len(errs) != strings.Count(c.want, "\n")+1 {
				t.Errorf("got:\n%v\nwant:\n%s", err, c.want)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
}

// All errors come at once, by line.
func TestErrorsTogether(t *testing.T) {
	text := strings.NewReplacer(`"fd00:a::1"`, `"::1"`, "id = 100", "id = 0", `"10.40.0.0/16"`, `"10.40.0.0/99"`, "locator-block", "locatorblock").Replace(base)
	_, err := Parse("t.toml", []byte(text))
	var errs Errors
	errors.As(err, &errs)
	var lines []int
	for _, e := range errs {
		lines = append(lines, e.Line)
	}
	if diff := cmp.Diff([]int{2, 3, 5, 12, 13}, lines); diff != "" {
		t.Errorf("(-want +got):\n%s\n%v", diff, err)
	}
}

// What is odd but right.
func TestAccepted(t *testing.T) {
	for name, text := range map[string]string{
		"BOM":                    "\ufeff" + base,
		"CRLF":                   strings.ReplaceAll(base, "\n", "\r\n"),
		"no newline at the end":  strings.TrimSpace(base),
		"number 0":               change(6, `locator = "5f00:1ace::/48"`),
		"no network":             base[:strings.Index(base, "[network")],
		"dotted host name":       change(4, `[node."edge-1.example.org"]`),
		"multi-line strings":     change(5, "underlay = '''\nfd00:a::1'''\nlabels.x = \"\"\"a\"b\"\"\""),
		"inline, with comments":  change(13, "subnets = [ # first\n '10.40.0.0/16', # [x]\n]"),
		"overlap of networks":    base + "[network.b]\ntype='l3'\nid=1\nsubnets=['10.40.0.0/16']\n",
		"given block unaligned":  base + "blocks.edge-1 = ['10.40.1.64/26']\n",
		"given block of a route": base + "blocks.edge-1 = ['10.40.2.0/24']\nblocks.edge-2 = ['10.40.1.0/24']\n",
		"room by a given block":  change(13, "subnets = ['10.40.0.0/23']\nblocks.edge-2 = ['10.40.0.0/24']"),
		"huge IPv6 subnet":       change(13, "subnets = ['fd00::/8']\nblock-size.v6 = 126"),
	} {
		t.Run(name, func(t *testing.T) {
			roundTrip(t, mustParse(t, text))
		})
	}
}

// roundTrip holds that the canonical text says what the topology does, and is its own.
func roundTrip(t *testing.T, top *Topology) {
	t.Helper()
	text := top.Canonical()
	again := mustParse(t, text)
	if again.Canonical() != text || again.Hash != top.Hash {
		t.Errorf("the canonical text is not its own:\n%s\n%s", text, again.Canonical())
	}
	opts := cmp.Options{
		cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.EquateEmpty(), cmp.AllowUnexported(Network{}),
		cmpopts.IgnoreFields(Node{}, "Line"), cmpopts.IgnoreFields(Network{}, "Line"),
		cmpopts.IgnoreFields(Peering{}, "Line"), cmpopts.IgnoreFields(Endpoint{}, "Line"),
	}
	if diff := cmp.Diff(top, again, opts); diff != "" {
		t.Errorf("(-file +canonical):\n%s", diff)
	}
}

func TestHash(t *testing.T) {
	h := mustParse(t, base).Hash
	same := []string{"# a word\n" + base, strings.ReplaceAll(base, " = ", "="), change(13, `subnets = ["10.40.0.0/16", "fd40:0::/48"]`+"\nblock-size = { v4 = 24 }")}
	for _, text := range same {
		if got := mustParse(t, text).Hash; got != h {
			t.Errorf("hash %s, want %s, of\n%s", got, h, text)
		}
	}
	other := []string{change(12, "id = 101"), change(5, "underlay = 'fd00:a::3'"), base + "block-size.v4 = 25\n", base + "labels.a = 'b'\n", base + "[conntrack]\nudp = '6m'\n", change(3, "locator-block = '5f00:1ace::/32'\nencapsulation = 'srh'"), change(13, `subnets = ["fd40::/48", "10.40.0.0/17"]`)}
	for _, text := range other {
		if got := mustParse(t, text).Hash; got == h {
			t.Errorf("the same hash for\n%s", text)
		}
	}
}

// A full file is read in reasonable time, however it is filled.
func TestLargeFiles(t *testing.T) {
	for name, text := range map[string]string{
		"full":          base + nodes(2000) + networks(200),
		"tables":        strings.Repeat("[a]\n", MaxFile/4),
		"keys":          numbered("k%d=1\n", 80000),
		"array":         "a = [" + strings.Repeat("1,", MaxFile/2-10) + "]",
		"array tables":  strings.Repeat("[[a]]\n", MaxFile/6),
		"quotes":        strings.Repeat(`"`, MaxFile),
		"equals":        strings.Repeat("=", MaxFile),
		"unclosed":      strings.Repeat("[", MaxFile),
		"inline":        "a = " + strings.Repeat("{a=", MaxFile/4),
		"long paths":    "[" + strings.Repeat("a", 250) + "]\n" + numbered("k%d=1\n", 80000),
		"errors":        base + "labels = { " + numbered("k%d=1,", 80000) + "}",
		"peerings":      nets + strings.Repeat("[[peering]]\nfrom={env='prod'}\nto='db'\n", 25000),
		"wrong peers":   nets + networks(1000) + strings.Repeat("[[peering]]\nfrom='abc'\nto='def'\n", 25000),
		"meshes":        strings.Replace(meshed(250), "[[peering]]", strings.Repeat(peering("{ mesh = 'all' }", "{ mesh = 'all' }"), 10000)+"[[peering]]", 1),
		"unknown words": base + strings.Replace(networks(1000), "subnets", "subnet", -1),
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			Parse("t.toml", []byte(text)) // right or wrong, it ends
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
}
