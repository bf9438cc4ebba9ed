// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lace-net/lace/topology"
)

func host(name, underlay, locator string) *topology.Node {
	return &topology.Node{
		Name: name, Underlay: netip.MustParseAddr(underlay),
		Locator: topology.Locator{Prefix: netip.MustParsePrefix(locator)},
	}
}

func via(n *topology.Node, router string) *topology.Node {
	n.Via = netip.MustParseAddr(router)
	return n
}

func withUplinks(n *topology.Node, names ...string) *topology.Node {
	n.Uplinks = names
	return n
}

func TestCheckFabric(t *testing.T) {
	edge1 := host("edge-1", "fd00:a::1", "5f00:1ace:1::/48")
	for _, tt := range []struct {
		name   string
		nodes  []*topology.Node
		routed bool
		want   string // part of the error
	}{
		{"one link", []*topology.Node{edge1, host("edge-2", "fd00:a::2", "5f00:1ace:2::/48")}, false, ""},
		{"no host", nil, true, "no node of kind"},
		{"two links", []*topology.Node{edge1, host("edge-2", "fd00:b::2", "5f00:1ace:2::/48")}, false, "no common /64"},
		{"two links, routed", []*topology.Node{edge1, host("edge-2", "fd00:b::2", "5f00:1ace:2::/48")}, true, ""},
		{"via on one link", []*topology.Node{via(host("edge-1", "fd00:a::1", "5f00:1ace:1::/48"), "fd00:a::fe")}, false, "use --routed"},
	} {
		t.Run(tt.name, func(t *testing.T) { wantError(t, checkFabric(tt.nodes, tt.routed), tt.want) })
	}
}

func wantError(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("unexpected error: %v", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("error %v, want one with %q", err, want)
	}
}

const oneLinkFabric = `link set lo up
link add name sw0 mtu 1500 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link set sw0 addrgenmode none
link set sw0 up
link add name sw1 mtu 1500 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link set sw1 addrgenmode none
link set sw1 up
link add name p0 mtu 1500 type veth peer name eth0 mtu 1500 netns lace-lab-edge-1
link set p0 addrgenmode none
link set p0 master sw0 up
link add name p1 mtu 1500 type veth peer name up0 mtu 1500 netns lace-lab-edge-2
link set p1 addrgenmode none
link set p1 master sw0 up
link add name p2 mtu 1500 type veth peer name up1 mtu 1500 netns lace-lab-edge-2
link set p2 addrgenmode none
link set p2 master sw1 up
`

const routedFabric = `link set lo up
link add name p0 mtu 9000 type veth peer name eth0 mtu 9000 netns lace-lab-edge-1
link set p0 addrgenmode none
link set p0 up
address add fe80::1/64 dev p0 nodad
address add fd00:a::fe/128 dev p0 nodad
route add fd00:a::1/128 dev p0
route add 5f00:1ace:1::/48 via fd00:a::1 dev p0
link add name p1 mtu 9000 type veth peer name up0 mtu 9000 netns lace-lab-edge-2
link set p1 addrgenmode none
link set p1 up
address add fe80::1/64 dev p1 nodad
route add fd00:a::2/128 dev p1
route add 5f00:1ace:2::/48 via fd00:a::2 dev p1
link add name p2 mtu 9000 type veth peer name up1 mtu 9000 netns lace-lab-edge-2
link set p2 addrgenmode none
link set p2 up
`

func TestFabricBatch(t *testing.T) {
	edge1 := host("edge-1", "fd00:a::1", "5f00:1ace:1::/48")
	edge2 := withUplinks(host("edge-2", "fd00:a::2", "5f00:1ace:2::/48"), "up0", "up1")
	got := fabricBatch("lab", []*topology.Node{edge1, edge2}, false, 1500)
	if diff := cmp.Diff(oneLinkFabric, got.lines.String()); diff != "" {
		t.Errorf("one link (-want +got):\n%s", diff)
	}
	got = fabricBatch("lab", []*topology.Node{via(edge1, "fd00:a::fe"), edge2}, true, 9000)
	if diff := cmp.Diff(routedFabric, got.lines.String()); diff != "" {
		t.Errorf("routed (-want +got):\n%s", diff)
	}
	if got.netns != "lace-lab.fabric" {
		t.Errorf("in namespace %q", got.netns)
	}
}

func TestNodeBatch(t *testing.T) {
	edge := func() *topology.Node { return host("edge-1", "fd00:a::1", "5f00:1ace:1::/48") }
	for _, tt := range []struct {
		name   string
		node   *topology.Node
		routed bool
		want   string
	}{
		{"one link", edge(), false, "address add fd00:a::1/64 dev eth0 nodad\n"},
		{"router by its link-local address", edge(), true,
			"address add fd00:a::1/128 dev eth0 nodad\nroute add default via fe80::1 dev eth0\n"},
		{"router by name", via(edge(), "fd00:a::fe"), true,
			"address add fd00:a::1/128 dev eth0 nodad\nroute add fd00:a::fe/128 dev eth0\nroute add default via fd00:a::fe dev eth0\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := "link set lo up\nlink set eth0 up\n" + tt.want
			if diff := cmp.Diff(want, nodeBatch("lab", tt.node, tt.routed).lines.String()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
