// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// The fixture with an outside: what a pair has, and three external networks. The host's own routes lead there, which are real ones
// of the test's namespace; its addresses are in premises, but for those of the second interface, which are in none.
//
//	internet  198.51.100.0/24  2001:db8:100::/48  100, 200 and 400 are masqueraded to it
//	partner   203.0.113.0/24, 198.51.100.200  2001:db8:203::/48  100 leaves to it as it is, and it may open flows to 100;
//	          200 leaves to it by node 2
//	premises  192.0.2.0/24  2001:db8:2::/48  100, 200 and 400 may open flows to it, and it to 400
//
// Network 100 has host = true. Ports of the host: 8080/tcp and 5353/udp are those of the container of 400, at any address,
// 8443/tcp of its first addresses is podB's, and 7000/tcp and /udp are podA's.
const (
	internet = topology.NetworkID(0xe00001)
	partner  = topology.NetworkID(0xe00002)
	premises = topology.NetworkID(0xe00003)

	internetLine, partnerLine, premisesLine          = 101, 102, 103 // of the networks
	outLine, plainLine, homeLine, inLine, inHomeLine = 111, 112, 113, 114, 115
	carriedLine, hostLine                            = 116, 117
)

// world is the fixture's outside in one family.
type world struct {
	own, own2        netip.Addr // the host's addresses, by interface
	server, server2  netip.Addr // in internet
	client           netip.Addr // in partner
	longer           netip.Addr // in partner, within a prefix of internet
	stranger         netip.Addr // in none
	neighbour        netip.Addr // in premises, not the host
	other            netip.Addr // in internet, by the second interface
	unresolved       netip.Addr // in internet, by a next hop whose MAC address is not known
	narrow           netip.Addr // in internet, behind a route whose MTU is narrowMTU, and locked: else the kernel forwards without it
	refused, blind   netip.Addr // in partner: no route; by an interface that nothing is seen of
	a, b, x, db, far netip.Addr // containers, the last one's on node 2
}

const narrowMTU = 1400

var worlds = map[bool]world{false: {
	own: ipOf("192.0.2.1"), own2: ipOf("192.0.3.1"), server: ipOf("198.51.100.10"), server2: ipOf("198.51.100.11"), client: ipOf("203.0.113.5"),
	longer: ipOf("198.51.100.200"), stranger: ipOf("198.18.0.1"), neighbour: ipOf("192.0.2.77"), other: ipOf("198.51.100.130"), unresolved: ipOf("198.51.100.7"),
	narrow: ipOf("198.51.100.70"), refused: ipOf("203.0.113.70"), blind: ipOf("203.0.113.130"),
	a: v4Of(1, podA), b: v4Of(1, podB), x: v4Of(1, podX), db: dbSubnet4(1, 10), far: v4Of(2, podA),
}, true: {
	own: ipOf("2001:db8:2::1"), own2: ipOf("2001:db8:3::1"), server: ipOf("2001:db8:100::10"), server2: ipOf("2001:db8:100::11"), client: ipOf("2001:db8:203::5"),
	longer: ipOf("2001:db8:100::c8"), stranger: ipOf("2001:db8:ffff::1"), neighbour: ipOf("2001:db8:2::77"), other: ipOf("2001:db8:100:130::1"), unresolved: ipOf("2001:db8:100:7::1"),
	narrow: ipOf("2001:db8:100:70::1"), refused: ipOf("2001:db8:203:70::1"), blind: ipOf("2001:db8:203:130::1"),
	a: v6Of(1, podA), b: v6Of(1, podB), x: v6Of(1, podX), db: dbSubnet6(1, 10), far: v6Of(2, podA),
}}

func ipOf(s string) netip.Addr { return netip.MustParseAddr(s) }

// eachFamily runs f in both.
func eachFamily(t *testing.T, f func(t *testing.T, w world)) {
	t.Helper()
	for name, v6 := range map[string]bool{"IPv4": false, "IPv6": true} {
		t.Run(name, func(t *testing.T) { f(t, worlds[v6]) })
	}
}

// MAC addresses out there.
var (
	wanHop  = plan.MAC{2, 0, 0, 0, 2, 1}
	wan2Hop = plan.MAC{2, 0, 0, 0, 2, 2}
)

// needOutside gives the bed the host's side, interfaces that lead out, and the host's routes; once.
func (b *bed) needOutside(t testing.TB) {
	t.Helper()
	if b.index[wan] != 0 {
		return
	}
	b.index[loopDev] = 1
	b.join(t, hostSide, hostPeer, "lc-host", "lc-host-peer")
	b.join(t, wan, devices, "lacewan", "lacewanp")
	b.join(t, wan2, devices, "lacewan2", "lacewan2p")
	raise(t, b, "lo")
	raise(t, b, fmt.Sprintf("lacebpf%d", stranger))
	raise(t, b, fmt.Sprintf("lacebpf%dp", stranger))
	must(t, b.in(func() error {
		return errors.Join(forwards("ipv4"), forwards("ipv6"), b.address("lacewan", "192.0.2.1/24", "2001:db8:2::1/64"), b.address("lacewan2", "192.0.3.1/24", "2001:db8:3::1/64"))
	}))
	must(t, b.in(b.routes))
}

// join makes a veth pair of the namespace itself; devices: the place of no interface.
func (b *bed) join(t testing.TB, near, far int, name, farName string) {
	t.Helper()
	for dev, at := range map[int]int{near: 0, far: 1} {
		if dev < devices {
			b.mac[dev] = plan.MAC{2, 0, 0, 0, 0xef, byte(2*near + at)}
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = name, b.mac[near][:]
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: farName}
	if far < devices {
		pair.PeerHardwareAddr = b.mac[far][:]
	}
	must(t, b.in(func() error { return netlink.LinkAdd(pair) }))
	b.index[near] = raise(t, b, name).Attrs().Index
	if l := raise(t, b, farName); far < devices {
		b.index[far] = l.Attrs().Index
	}
}

// forwards lets lc-host forward, which bpf_fib_lookup wants of the interface that it is told.
func forwards(family string) error {
	return os.WriteFile("/proc/sys/net/"+family+"/conf/lc-host/forwarding", []byte("1"), 0o644)
}

func (b *bed) address(name string, prefixes ...string) error {
	l, err := netlink.LinkByName(name)
	for _, prefix := range prefixes {
		if err != nil {
			return err
		}
		p := netip.MustParsePrefix(prefix)
		err = netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD})
	}
	return err
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// elsewhereTable is where podB's packets, those to port 853 and IPv4 ones of a class find their route: by the second interface.
const (
	elsewhereTable = 100
	elsewhereClass = 0x10
)

func (b *bed) routes() error {
	byWan, byWan2 := b.index[wan], b.index[wan2]
	for _, r := range []struct {
		to, via string
		dev     int
		mtu     int
		table   int
	}{
		{to: "10.40.0.0/16", dev: b.index[hostSide]}, {to: "fd40::/32", dev: b.index[hostSide]},
		{to: "0.0.0.0/0", via: "192.0.2.254", dev: byWan}, {to: "::/0", via: "2001:db8:2::fe", dev: byWan},
		{to: "198.51.100.7/32", via: "192.0.2.253", dev: byWan}, {to: "2001:db8:100:7::/64", via: "2001:db8:2::fd", dev: byWan},
		{to: "198.51.100.64/27", via: "192.0.2.254", dev: byWan, mtu: narrowMTU}, {to: "2001:db8:100:70::/64", via: "2001:db8:2::fe", dev: byWan, mtu: narrowMTU},
		{to: "198.51.100.128/27", via: "192.0.3.254", dev: byWan2}, {to: "2001:db8:100:130::/64", via: "2001:db8:3::fe", dev: byWan2},
		{to: "203.0.113.128/27", dev: b.index[stranger]}, {to: "2001:db8:203:130::/64", dev: b.index[stranger]},
		{to: "0.0.0.0/0", via: "192.0.3.254", dev: byWan2, table: elsewhereTable}, {to: "::/0", via: "2001:db8:3::fe", dev: byWan2, table: elsewhereTable},
	} {
		route := &netlink.Route{Dst: ipNet(netip.MustParsePrefix(r.to)), LinkIndex: r.dev, MTU: r.mtu, MTULock: r.mtu != 0, Table: r.table, Gw: net.ParseIP(r.via)}
		if err := netlink.RouteAdd(route); err != nil {
			return fmt.Errorf("route to %s: %w", r.to, err)
		}
	}
	for _, to := range []string{"203.0.113.64/27", "2001:db8:203:70::/64"} {
		if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(netip.MustParsePrefix(to)), Type: unix.RTN_UNREACHABLE}); err != nil {
			return fmt.Errorf("no route to %s: %w", to, err)
		}
	}
	return errors.Join(b.neighbours(), elsewhereRules())
}

func (b *bed) neighbours() error {
	var errs []error
	for _, n := range []struct {
		dev  int
		addr string
		mac  plan.MAC
	}{{wan, "192.0.2.254", wanHop}, {wan, "2001:db8:2::fe", wanHop}, {wan2, "192.0.3.254", wan2Hop}, {wan2, "2001:db8:3::fe", wan2Hop}} {
		errs = append(errs, netlink.NeighAdd(&netlink.Neigh{LinkIndex: b.index[n.dev], IP: net.ParseIP(n.addr), HardwareAddr: n.mac[:], State: netlink.NUD_PERMANENT}))
	}
	return errors.Join(errs...)
}

func elsewhereRules() error {
	var errs []error
	for _, w := range worlds {
		family := unix.AF_INET
		if w.own.Is6() {
			family = unix.AF_INET6
		}
		bySource, byPort := netlink.NewRule(), netlink.NewRule()
		bySource.Family, bySource.Src, bySource.Table = family, ipNet(netip.PrefixFrom(w.b, w.b.BitLen())), elsewhereTable
		byPort.Family, byPort.Dport, byPort.IPProto, byPort.Table = family, netlink.NewRulePortRange(853, 853), unix.IPPROTO_TCP, elsewhereTable
		errs = append(errs, netlink.RuleAdd(bySource), netlink.RuleAdd(byPort))
		if byClass := netlink.NewRule(); family == unix.AF_INET {
			byClass.Family, byClass.Tos, byClass.Table = family, elsewhereClass, elsewhereTable
			errs = append(errs, netlink.RuleAdd(byClass))
		}
	}
	return errors.Join(errs...)
}

// newOutside is node 1 with an outside, and its bed.
func newOutside(t testing.TB) *node {
	t.Helper()
	b := newBed(t)
	b.needOutside(t)
	return newNode(t, b, options{number: 1, outside: true})
}

// syncHost writes what the host is.
func (n *node) syncHost() {
	n.t.Helper()
	at := n.bed.index
	four, six := worlds[false], worlds[true]
	must(n.t, n.maps.SyncHost(maps.Host{Stack: uint32(at[hostSide]), Peer: uint32(at[hostPeer]), Loopback: uint32(at[loopDev]), MAC: n.bed.mac[hostSide], V4: four.own, V6: six.own}))
	_, err := n.maps.SyncAddresses(map[netip.Addr]int{four.own: at[wan], six.own: at[wan], four.own2: at[wan2], six.own2: at[wan2]})
	must(n.t, err)
	must(n.t, n.maps.SyncEgresses([]maps.Egress{{Index: uint32(at[wan]), V4: four.own, V6: six.own}, {Index: uint32(at[wan2]), V4: four.own2, V6: six.own2}}))
}

// buildOutside is the plan of the fixture.
func (n *node) buildOutside() *plan.Plan {
	p := n.pairPlan()
	p.Networks[0].Host = true
	p.Externals = []plan.External{
		{Name: "internet", ID: internet, Prefixes: prefixes("198.51.100.0/24", "2001:db8:100::/48"), Line: internetLine},
		{Name: "partner", ID: partner, Prefixes: prefixes("203.0.113.0/24", "198.51.100.200/32", "2001:db8:203::/48", "2001:db8:100::c8/128"), Line: partnerLine},
		{Name: "premises", ID: premises, Prefixes: prefixes("192.0.2.0/24", "2001:db8:2::/48"), Line: premisesLine},
	}
	backends, dbs := prefixes("10.40.0.0/16", "fd40::/32"), prefixes("10.60.0.0/16", "fd60::/32")
	lets := func(g plan.Peering, to []netip.Prefix) {
		for _, g.Prefix = range to {
			p.Peerings = append(p.Peerings, g)
		}
	}
	lets(plan.Peering{From: topology.HostsID, To: backend, Line: hostLine}, backends)
	lets(plan.Peering{From: topology.OutsideID, To: backend, Line: inLine}, backends)
	lets(plan.Peering{From: topology.OutsideID, To: db, Line: inHomeLine}, dbs)
	lets(plan.Peering{From: partner, To: backend, Line: inLine}, backends)
	lets(plan.Peering{From: premises, To: db, Line: inHomeLine}, dbs)
	for _, from := range []topology.NetworkID{backend, overlap, db} {
		lets(plan.Peering{From: from, To: internet, External: true, Masquerade: true, Line: outLine}, p.Externals[0].Prefixes)
		lets(plan.Peering{From: from, To: premises, External: true, Masquerade: true, Line: homeLine}, p.Externals[2].Prefixes)
	}
	lets(plan.Peering{From: backend, To: partner, External: true, Line: plainLine}, p.Externals[1].Prefixes)
	gateway := plan.Peering{From: overlap, To: partner, External: true, Masquerade: true, Line: carriedLine}
	if n.opts.number == 1 {
		gateway.Peer, gateway.SID = 2, locatorOf(2, n.opts.locatorBits).SID(topology.EndDT46, partner)
	}
	lets(gateway, p.Externals[1].Prefixes)
	n.publish(p)
	return p
}

func prefixes(all ...string) (out []netip.Prefix) {
	for _, s := range all {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func (n *node) publish(p *plan.Plan) {
	if n.opts.number != 1 {
		return
	}
	for i, port := range p.Ports {
		switch port.HostIf {
		case fmt.Sprint(podA):
			p.Ports[i].Publish = []plan.Publish{{Protocol: protoTCP, Port: 7000, To: 7000}, {Protocol: protoUDP, Port: 7000, To: 7000}}
		case fmt.Sprint(podB):
			for _, w := range worlds {
				p.Ports[i].Publish = append(p.Ports[i].Publish, plan.Publish{Address: w.own, Protocol: protoTCP, Port: 8443, To: 443})
			}
		case fmt.Sprint(podD):
			p.Ports[i].Publish = []plan.Publish{{Protocol: protoTCP, Port: 8080, To: 80}, {Protocol: protoUDP, Port: 5353, To: 53}}
		}
	}
}

// fromOutside is a frame as an interface that leads out gets it.
func (b *bed) fromOutside(dev int, p ip) []byte { return ethIP(b.mac[dev], hopOf(dev), p.bytes()) }

// hopOf is the next hop of an interface that leads out.
func hopOf(dev int) plan.MAC {
	if dev == wan2 {
		return wan2Hop
	}
	return wanHop
}

// atOuter is a packet from outside at the first interface.
func (n *node) atOuter(p ip) input {
	return input{program: "outer", dev: wan, frame: n.bed.fromOutside(wan, p)}
}

// atHost is a packet that the host's stack sends to a container.
func (n *node) atHost(p ip) input {
	return input{program: "host", dev: hostPeer, frame: ethIP(n.bed.mac[hostPeer], n.bed.mac[hostSide], p.bytes())}
}

// atLoopback is a packet that the host sends to itself.
func (n *node) atLoopback(p ip) input {
	return input{program: "loopback", dev: loopDev, frame: ethIP(plan.MAC{}, plan.MAC{}, p.bytes())}
}

// atPort is a packet of a container of node 1.
func atPort(dev int, p ip) input {
	return input{program: "pod_l3", dev: dev, frame: toGateway(1, dev, p)}
}

func setMTU(index, mtu int) error {
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return err
	}
	return netlink.LinkSetMTU(l, mtu)
}

// age makes the ways out of all flows as old as those that have to be looked up again.
func (n *node) age() {
	n.t.Helper()
	for key := range n.flows() {
		n.edit(key, func(f *bpf.LaceFlow) { f.Looked -= 5 })
	}
}

// routeTo leads to an address by the second interface.
func routeTo(a netip.Addr, index int, w world) *netlink.Route {
	via := "192.0.3.254"
	if w.own.Is6() {
		via = "2001:db8:3::fe"
	}
	return &netlink.Route{Dst: ipNet(netip.PrefixFrom(a, a.BitLen())), LinkIndex: index, Gw: net.ParseIP(via)}
}
