// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// What the netlink library has no names for, linux/seg6_iptunnel.h and linux/seg6_local.h.
const (
	encapMode      = nl.SEG6_IPTUN_MODE_ENCAP
	l2encapMode    = 2
	encapRedMode   = 3
	l2encapRedMode = 4
	endDX2         = 4
	endDT46        = 16
)

// seg6 is a router whose SRv6 is the kernel's own, with a host behind it.
type seg6 struct {
	*namespace
	host   *namespace
	v4, v6 netip.Addr // of the host
	table  int        // of the side where the host is
}

const seg6Node = `
[node.gw]
kind = "router"
underlay = "fd00:a::9"
locator = "5f00:1ace:9::/48"
network = "backend"
`

// decapsulations are the ways in which the router takes packets, and what the topology says of them.
var decapsulations = []struct {
	name, topology string
	build          func(*seg6, *testing.T)
}{
	{"DX", "sid = { v4 = \"5f00:1ace:9::4\", v6 = \"5f00:1ace:9::6\" }\n", (*seg6).takeByDX},
	{"DT46", "", (*seg6).takeByDT46},
}

// TestKernelSeg6 has the kernel's own SRv6 as the far end, in both directions and both forms.
func TestKernelSeg6(t *testing.T) {
	for _, form := range forms {
		for _, take := range decapsulations {
			t.Run(title(form.name, take.name), func(t *testing.T) {
				var r *seg6
				b := newBed(t, bedOptions{nodes: 1, srh: form.srh, more: seg6Node + take.topology, prepare: func(b *bed) {
					r = newSeg6(t, b)
					take.build(r, t)
				}})
				c := b.nodes[0].run(t, "c", "backend")
				for _, mode := range []int{encapMode, encapRedMode} {
					t.Run([]string{"", "encap", "", "encap.red"}[mode], func(t *testing.T) { checkSeg6(t, r, c, mode) })
				}
			})
		}
	}
}

// checkSeg6 lets the kernel encapsulate in a mode, and has both sides open connections.
func checkSeg6(t *testing.T, r *seg6, c *container, mode int) {
	r.encapsulate(t, mode, "10.40.1.0/24", "fd40:0:0:1::/64")
	before := c.node.status().Counters
	for at, host := range []netip.Addr{r.v4, r.v6} {
		c.reaches(t, host)
		r.host.reaches(t, c.addresses()[at])
		c.transfer(t, r.host.listenTCP(t, host, digest), transferSize()/2)
		r.host.transfer(t, c.listenTCP(t, c.addresses()[at], digest), transferSize()/2)
	}
	after := c.node.status().Counters
	for _, reason := range []string{"encapsulated", "decapsulated"} {
		if after[reason] <= before[reason] {
			t.Errorf("no packet was %s", reason)
		}
	}
}

// newSeg6 makes the router, and a host behind it in another subnet.
func newSeg6(t *testing.T, b *bed) *seg6 {
	r := newSeg6Router(t, b)
	r.v4, r.v6 = netip.MustParseAddr("10.40.9.10"), netip.MustParseAddr("fd40:0:0:9::10")
	r.give(t, "lan0", "10.40.9.1/24", "fd40:0:0:9::1/64")
	r.host.give(t, "eth0", "10.40.9.10/24", "fd40:0:0:9::10/64")
	r.host.route(t, "0.0.0.0/0", "10.40.9.1", "eth0")
	r.host.route(t, "::/0", "fd40:0:0:9::1", "eth0")
	return r
}

// newSeg6Router makes the router fd00:a::9, locator 5f00:1ace:9::/48, and a host at its lan0.
func newSeg6Router(t *testing.T, b *bed) *seg6 {
	r := &seg6{namespace: newNamespace(t, "gw"), host: newNamespace(t, "lan"), table: unix.RT_TABLE_MAIN}
	for _, path := range []string{"ipv6/conf/all/forwarding", "ipv6/conf/all/seg6_enabled", "ipv6/conf/default/seg6_enabled", "ipv4/ip_forward"} {
		r.sysctl(t, path, "1")
	}
	for _, path := range []string{"ipv4/conf/all/rp_filter", "ipv4/conf/default/rp_filter"} {
		r.sysctl(t, path, "0")
	}
	b.plug(r.namespace, uplink, "gw")
	r.give(t, uplink, "fd00:a::9/64", "5f00:1ace:9::1/128") // the kernel takes the outer source from these
	joinNamespaces(t, r.namespace, "lan0", r.host, "eth0")
	must(t, r.host.LinkSetMTU(r.host.link(t, "eth0"), 1400))
	r.route(t, "5f00:1ace:1::/48", "fd00:a::1", uplink)
	return r
}

// encapsulate sends packets for the prefixes to n1's SID of network 100.
func (r *seg6) encapsulate(t *testing.T, mode int, prefixes ...string) {
	t.Helper()
	r.encapsulateTo(t, mode, "5f00:1ace:1:14:0:6400::", prefixes...)
}

func (r *seg6) encapsulateTo(t *testing.T, mode int, sid string, prefixes ...string) {
	t.Helper()
	for _, p := range prefixes {
		must(t, r.RouteReplace(&netlink.Route{
			Dst: ipNet(netip.MustParsePrefix(p)), LinkIndex: r.link(t, uplink).Attrs().Index, Table: r.table,
			Encap: &netlink.SEG6Encap{Mode: mode, Segments: []net.IP{net.ParseIP(sid)}},
		}))
	}
}

// take adds a SID of the router.
func (r *seg6) take(t *testing.T, sid string, e netlink.SEG6LocalEncap) {
	t.Helper()
	e.Flags[nl.SEG6_LOCAL_ACTION] = true
	r.route(t, sid+"/128", "", uplink, func(route *netlink.Route) { route.Encap = &e })
}

func (r *seg6) takeByDX(t *testing.T) {
	dx4 := netlink.SEG6LocalEncap{Action: nl.SEG6_LOCAL_ACTION_END_DX4, InAddr: r.v4.AsSlice()}
	dx4.Flags[nl.SEG6_LOCAL_NH4] = true
	dx6 := netlink.SEG6LocalEncap{Action: nl.SEG6_LOCAL_ACTION_END_DX6, In6Addr: r.v6.AsSlice()}
	dx6.Flags[nl.SEG6_LOCAL_NH6] = true
	r.take(t, "5f00:1ace:9::4", dx4)
	r.take(t, "5f00:1ace:9::6", dx6)
}

// takeByDT46 puts the host into a VRF, which End.DT46 needs.
func (r *seg6) takeByDT46(t *testing.T) {
	r.table = 100
	err := r.LinkAdd(&netlink.Vrf{LinkAttrs: attrs("vrf0"), Table: uint32(r.table)})
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("this kernel has no VRF (CONFIG_NET_VRF), which End.DT46 needs: run this test binary in a VM with scripts/run-in-vm")
	}
	must(t, err)
	must(t, r.LinkSetUp(r.link(t, "vrf0")))
	r.sysctl(t, "vrf/strict_mode", "1")
	must(t, r.LinkSetMaster(r.link(t, "lan0"), r.link(t, "vrf0")))
	r.give(t, "lan0", "fd40:0:0:9::1/64") // which changing the master took away
	inTable := func(route *netlink.Route) { route.Table = r.table }
	r.route(t, "5f00:1ace:1::/48", "fd00:a::1", uplink, inTable) // the SID is looked up there too
	dt46 := netlink.SEG6LocalEncap{Action: endDT46, VrfTable: r.table}
	dt46.Flags[nl.SEG6_LOCAL_VRFTABLE] = true
	r.take(t, "5f00:1ace:9:14:0:6400::", dt46)
}
