// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"net/http/httptest"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lace-net/lace/topology"
)

// outside is a topology with an external network beside these nodes.
func outside(nodes ...*topology.Node) *topology.Topology {
	return &topology.Topology{Nodes: nodes, Networks: []*topology.Network{{Name: "world", Type: topology.External}}}
}

func TestCheckInternet(t *testing.T) {
	edge1 := host("edge-1", "fd00:a::1", "5f00:1ace:1::/48")
	overlapping := outside(edge1)
	overlapping.Networks = append(overlapping.Networks, &topology.Network{Name: "web", Subnets: []netip.Prefix{netip.MustParsePrefix("198.51.0.0/16")}})
	var many []*topology.Node
	for i := range maxNodesOutside + 1 {
		many = append(many, host(fmt.Sprint("edge-", i), "fd00:a::1", "5f00:1ace:1::/48"))
	}
	namesake := host("internet", "fd00:a::1", "5f00:1ace:1::/48")
	for _, tt := range []struct {
		name string
		topo *topology.Topology
		want string // part of the error
	}{
		{"one node", outside(edge1), ""},
		{"as many as there are addresses", outside(many[1:]...), ""},
		{"one more", outside(many...), "has addresses on the internet for 253"},
		{"a namesake", outside(namesake), `node "internet": the lab needs that name`},
		{"a namesake, and nothing outside", &topology.Topology{Nodes: []*topology.Node{namesake}}, ""},
		{"overlap", overlapping, `network "web" has subnet 198.51.0.0/16, but the lab's nodes and its internet have 198.51.100.0/24`},
	} {
		t.Run(tt.name, func(t *testing.T) { wantError(t, checkInternet(tt.topo), tt.want) })
	}
}

const routerToInternet = `link add name inet mtu 1500 type veth peer name eth0 mtu 1500 netns lace-lab-internet
link set inet addrgenmode none
link set inet up
address add fe80::1/64 dev inet nodad
address add 198.51.100.254/24 dev inet
address add 2001:db8:100::fe/64 dev inet nodad
route add 203.0.113.1/32 via 198.51.100.1
route add 2001:db8:200::1/128 via 2001:db8:100::1
`

func TestJoinInternet(t *testing.T) {
	edge1 := withUplinks(host("edge-1", "fd00:a::1", "5f00:1ace:1::/48"), "up0", "up1")
	edge2 := host("edge-2", "fd00:b::2", "5f00:1ace:2::/48")
	for _, tt := range []struct {
		name                 string
		routed               bool
		router, node1, node2 string
	}{
		{name: "one link",
			router: "address add fe80::1/64 dev sw0 nodad\naddress add 192.0.2.254/24 dev sw0\nroute add fd00:a::/64 dev sw0\n",
			node1:  "address add 192.0.2.1/24 dev up0\nroute add default via 192.0.2.254 dev up0\nroute add default via fe80::1 dev up0\n",
			node2:  "address add 192.0.2.2/24 dev eth0\nroute add default via 192.0.2.254 dev eth0\nroute add default via fe80::1 dev eth0\n"},
		{name: "routed", routed: true,
			router: "address add 192.0.2.254/32 dev p0\nroute add 192.0.2.1/32 dev p0\naddress add 192.0.2.254/32 dev p2\nroute add 192.0.2.2/32 dev p2\n",
			node1:  "address add 192.0.2.1/32 dev up0\nroute add default via 192.0.2.254 dev up0 onlink\n",
			node2:  "address add 192.0.2.2/32 dev eth0\nroute add default via 192.0.2.254 dev eth0 onlink\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			router := joinInternet("lab", []*topology.Node{edge1, edge2}, tt.routed, 1500)
			if diff := cmp.Diff(routerToInternet+tt.router, router.lines.String()); diff != "" || router.netns != "lace-lab.fabric" {
				t.Errorf("router in %s (-want +got):\n%s", router.netns, diff)
			}
			for i, want := range []string{tt.node1, tt.node2} {
				n := []*topology.Node{edge1, edge2}[i]
				if diff := cmp.Diff(want, outsideOfNode("lab", n, outsideV4(i), tt.routed).lines.String()); diff != "" {
					t.Errorf("%s (-want +got):\n%s", n.Name, diff)
				}
			}
		})
	}
}

func TestTellClient(t *testing.T) {
	r := httptest.NewRequest("GET", "/", nil)
	r.RemoteAddr = "[2001:db8::7]:4711"
	w := httptest.NewRecorder()
	tellClient(w, r)
	if got := w.Body.String(); got != "[2001:db8::7]:4711\n" {
		t.Errorf("it says %q", got)
	}
}
