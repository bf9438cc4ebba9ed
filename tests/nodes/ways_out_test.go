// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// second is another way out of a node: a provider of its own with a server behind it, which has the addresses of the other one too, and
// knows nothing of the node's other addresses.
type second struct {
	*namespace
	link string // of the node
}

// Addresses of the second way out: the node's, the provider's.
var (
	secondOwn  = []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:113::1")}
	secondPeer = []netip.Addr{netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("2001:db8:113::2")}
)

// newSecond joins a node to a second provider; both families have the addresses of the server there.
func newSecond(t *testing.T, n *node, link string) *second {
	t.Helper()
	s := &second{newNamespace(t, "second"), link}
	joinNamespaces(t, n.namespace, link, s.namespace, "eth0")
	for v := range 2 {
		bits := []int{24, 64}[v]
		n.give(t, link, netip.PrefixFrom(secondOwn[v], bits).String())
		s.give(t, "eth0", netip.PrefixFrom(secondPeer[v], bits).String())
		s.give(t, "lo", netip.PrefixFrom(serverAddresses[v], serverAddresses[v].BitLen()).String())
	}
	return s
}

// table adds default routes by the second way to a table of the node.
func (s *second) table(t *testing.T, n *node, table int) {
	t.Helper()
	for v, all := range []string{"0.0.0.0/0", "::/0"} {
		n.route(t, all, secondPeer[v].String(), s.link, func(r *netlink.Route) { r.Table = table })
	}
}

// rule adds a rule of both families.
func (n *node) rule(t *testing.T, priority int, change func(r *netlink.Rule, family int)) {
	t.Helper()
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		r := netlink.NewRule()
		r.Family, r.Priority = family, priority
		change(r, family)
		must(t, n.RuleAdd(r))
	}
}

// TestPolicyRouting has hosts whose traffic goes by rules and tables of their own, as VPNs write them: containers' goes the same way, and
// in the name of that way.
func TestPolicyRouting(t *testing.T) {
	takesLong(t)
	const table = 51820
	for name, configure := range map[string]func(t *testing.T, n *node, s *second){
		"table for all": func(t *testing.T, n *node, s *second) {
			s.table(t, n, table)
			n.rule(t, 100, func(r *netlink.Rule, _ int) { r.Table = table })
			n.rule(t, 99, func(r *netlink.Rule, family int) { // but the underlay
				r.Table, r.Dst = unix.RT_TABLE_MAIN, ipNet(netip.MustParsePrefix([]string{"192.0.2.0/24", "fd00:a::/64"}[family/netlink.FAMILY_V6]))
			})
		},
		"wg-quick": func(t *testing.T, n *node, s *second) { // all but marked packets by the tunnel; main says only what is more precise
			s.table(t, n, table)
			n.rule(t, 200, func(r *netlink.Rule, _ int) { r.Table, r.Mark, r.Invert = table, 51820, true })
			n.rule(t, 199, func(r *netlink.Rule, _ int) { r.Table, r.SuppressPrefixlen = unix.RT_TABLE_MAIN, 0 })
		},
		"by sender": func(t *testing.T, n *node, s *second) {
			s.table(t, n, table)
			n.rule(t, 100, func(r *netlink.Rule, family int) {
				r.Table, r.Src = table, ipNet(netip.MustParsePrefix([]string{"10.40.0.0/16", "fd40::/48"}[family/netlink.FAMILY_V6]))
			})
		},
		"halves of everything": func(t *testing.T, n *node, s *second) { // as OpenVPN's redirect-gateway def1
			for v, halves := range [][]string{{"0.0.0.0/1", "128.0.0.0/1"}, {"::/1", "8000::/1"}} {
				for _, half := range halves {
					n.route(t, half, secondPeer[v].String(), s.link)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var s *second
			i := newInternet(t, bedOptions{nodes: 2, networks: appNetwork + masqueraded, prepare: func(b *bed) {
				s = newSecond(t, b.nodes[0], "tun9")
				configure(t, b.nodes[0], s)
			}})
			c, far := i.nodes[0].run(t, "c", "app"), i.nodes[1].run(t, "far", "app")
			settle(t, c, far)
			first := i.router.capture(t, "lan0")
			for v, server := range serverAddresses {
				c.reaches(t, server)
				s.sees(t, c.namespace, server, secondOwn[v])
				c.transfer(t, s.listenTCP(t, server, digest), transferSize())
				i.server.sees(t, far.namespace, server, outside(2)[v]) // the other node has no VPN
				if n := first.count(sentBy(secondOwn[v])) + first.count(sentBy(outside(1)[v])); n > 0 {
					t.Errorf("%d packets took the other way", n)
				}
			}
			checkPings(t, c, far)
			checkPreciseRoutes(t, i, c, s)
		})
	}
}

// checkPreciseRoutes holds that what the main table says of some addresses goes there, by VPNs that leave it so, and that nothing of Lace's
// is left of the host's rules.
func checkPreciseRoutes(t *testing.T, i *internet, c *container, s *second) {
	t.Helper()
	n := i.nodes[0]
	if suppresses(t, n, 0) == 0 {
		return
	}
	near := []netip.Addr{netip.MustParseAddr("198.51.100.99"), netip.MustParseAddr("2001:db8:51::99")}
	for v, a := range near {
		i.server.give(t, "lo", netip.PrefixFrom(a, a.BitLen()).String())
		i.router.route(t, netip.PrefixFrom(a, a.BitLen()).String(), serverAddresses[v].String(), "lan0")
		n.route(t, netip.PrefixFrom(a, a.BitLen()).String(), routerAddresses[v].String(), uplink)
		server := i.server.tellUDP(t, netip.AddrPortFrom(a, 0))
		until(t, "what the main table says goes there", func() bool {
			got, err := ask(c.dialUDP(t, server), []byte("who am I?"), onePing)
			return err == nil && netip.MustParseAddrPort(string(got)).Addr() == outside(1)[v]
		})
	}
	n.agent.kill()
	n.uninstall()
	if k := suppresses(t, n, 0x4c); k > 0 {
		t.Errorf("%d rules of Lace's are left", k)
	}
}

// suppresses counts the IPv6 rules with suppress_prefixlength, or those of a protocol.
func suppresses(t *testing.T, n *node, protocol uint8) (count int) {
	t.Helper()
	rules, err := n.RuleList(netlink.FAMILY_V6)
	must(t, err)
	for _, r := range rules {
		if protocol == 0 && r.SuppressPrefixlen >= 0 || protocol != 0 && r.Protocol == protocol && r.Priority != 1000 {
			count++
		}
	}
	return count
}

// TestWayOutChanges brings a VPN up and down while containers use the outside.
func TestWayOutChanges(t *testing.T) {
	takesLong(t)
	t.Parallel()
	i := newInternet(t, bedOptions{nodes: 1, networks: appNetwork + masqueraded})
	n := i.nodes[0]
	c := n.run(t, "c", "app")
	settle(t, c)
	s := newSecond(t, n, "tun9")
	const table = 100
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table = netlink.FAMILY_V4, 100, table
	s.table(t, n, table)
	server := serverAddresses[0]
	one, two := i.server.tellUDP(t, netip.AddrPortFrom(server, 4000)), s.tellUDP(t, netip.AddrPortFrom(server, 4000))
	for range 2 {
		if got := c.seenUDP(t, one).Addr(); got != outside(1)[0] {
			t.Errorf("without the VPN a container is %s", got)
		}
		must(t, n.RuleAdd(r))
		until(t, "new flows go by the VPN", func() bool {
			got, err := ask(c.dialUDP(t, two), []byte("who am I?"), onePing)
			return err == nil && netip.MustParseAddrPort(string(got)).Addr() == secondOwn[0]
		})
		must(t, n.RuleDel(r))
		until(t, "new flows go as before", func() bool {
			got, err := ask(c.dialUDP(t, one), []byte("who am I?"), onePing)
			return err == nil && netip.MustParseAddrPort(string(got)).Addr() == outside(1)[0]
		})
	}
}

// TestMultihomed has two providers, of which each answers only what it was asked by: ports are published at the addresses of both.
func TestMultihomed(t *testing.T) {
	takesLong(t)
	t.Parallel()
	var s *second
	i := newInternet(t, bedOptions{nodes: 1, networks: appNetwork + masqueraded + entered, prepare: func(b *bed) {
		n := b.nodes[0]
		s = newSecond(t, n, "wan1")
		s.table(t, n, 100)
		n.rule(t, 100, func(r *netlink.Rule, family int) {
			a := secondOwn[family/netlink.FAMILY_V6]
			r.Table, r.Src = 100, ipNet(netip.PrefixFrom(a, a.BitLen()))
		})
		for v, far := range []string{"198.18.0.0/24", "2001:db8:18::/64"} {
			n.route(t, far, secondPeer[v].String(), "wan1")
		}
		s.give(t, "lo", "198.18.0.1/32", "2001:db8:18::1/128")
	}})
	c := i.nodes[0].run(t, "c", "app", publish("8080:80/tcp", "8080:80/udp"))
	settle(t, c)
	for v, a := range c.addresses() {
		c.tellTCP(t, netip.AddrPortFrom(a, 80))
		c.tellUDP(t, netip.AddrPortFrom(a, 80))
		far := []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("2001:db8:18::1")}[v]
		i.server.sees(t, c.namespace, serverAddresses[v], outside(1)[v])
		s.sees(t, c.namespace, far, secondOwn[v])
		f := &shopFront{i, c}
		f.sold(t, i.server, outside(1)[v], serverAddresses[v])
		wire := i.router.capture(t, "eth0")
		for _, from := range []netip.Addr{far, serverAddresses[v]} { // the latter is at both providers
			f.soldFrom(t, s.namespace, from, secondOwn[v])
		}
		if n := wire.count(sentBy(secondOwn[v])); n > 0 {
			t.Errorf("%d answers leave by the other provider", n)
		}
	}
}

// soldFrom is sold for a client with an address of its choice.
func (s *shopFront) soldFrom(t *testing.T, to *namespace, from, at netip.Addr) {
	t.Helper()
	c := to.dialOwn(t, netip.AddrPortFrom(at, publishedPort), netip.AddrPortFrom(from, 0))
	if got := askWho(t, c).Addr(); got != from {
		t.Errorf("a connection of %s comes from %s", from, got)
	}
}

// TestRawWayOut has the default route lead into a device without Ethernet headers.
func TestRawWayOut(t *testing.T) {
	takesLong(t)
	t.Parallel()
	needRoot(t)
	pop := newNamespace(t, "pop")
	i := newInternet(t, bedOptions{nodes: 1, networks: appNetwork + masqueraded + entered, prepare: func(b *bed) {
		n := b.nodes[0]
		one, two := newTunnelDevice(t, n, "tun1", unix.IFF_TUN), newTunnelDevice(t, &node{namespace: pop}, "tun1", unix.IFF_TUN)
		go pump(one, two)
		go pump(two, one)
		for v := range 2 {
			bits := []int{24, 64}[v]
			n.give(t, "tun1", netip.PrefixFrom(secondOwn[v], bits).String())
			pop.give(t, "tun1", netip.PrefixFrom(secondPeer[v], bits).String())
			pop.give(t, "lo", netip.PrefixFrom([]netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("2001:db8:18::1")}[v], []int{32, 128}[v]).String())
			n.route(t, []string{"198.18.0.0/24", "2001:db8:18::/64"}[v], "", "tun1")
		}
	}})
	c := i.nodes[0].run(t, "c", "app", publish(publishedPorts...))
	settle(t, c)
	s := &shopFront{i, c}
	s.serve(t)
	for v, far := range []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("2001:db8:18::1")} {
		c.reaches(t, far)
		pop.sees(t, c.namespace, far, secondOwn[v])
		c.transfer(t, pop.listenTCP(t, far, digest), transferSize()/4)
		c.downloads(t, pop.serveHTTP(t, far, transferSize()/4), transferSize()/4)
		s.sells(t, pop, secondOwn[v], secondPeer[v])
		u := c.dialUDP(t, netip.AddrPortFrom(far, 9))
		until(t, "a refusal comes back", func() bool {
			_, err := ask(u, []byte("anybody?"), onePing)
			return errors.Is(err, unix.ECONNREFUSED)
		})
		checkExpiresOutside(t, pop, secondOwn[v])
	}
}

// checkExpiresOutside has a packet for a published port come without a hop left to a node that it enters by a device without Ethernet headers.
func checkExpiresOutside(t *testing.T, pop *namespace, own netip.Addr) {
	t.Helper()
	errs := pop.capture(t, "tun1")
	u := pop.dialUDP(t, netip.AddrPortFrom(own, publishedPort))
	setOption(t, u, own, unix.IP_TTL, unix.IPV6_UNICAST_HOPS, 1)
	until(t, "the node says that no hop was left", func() bool {
		ask(u, []byte("who am I?"), onePing/10)
		return errs.count(func(f []byte) bool { // without an Ethernet header
			e, ok := parseICMPError(f)
			return ok && e.from == own && e.about.dst == own && (e.kind == 11 || e.kind == 3)
		}) > 0
	})
}

// TestHostVRF has a way out be in a VRF of the host's own, for addresses that its main table has routes to by that interface.
func TestHostVRF(t *testing.T) {
	t.Parallel()
	needRoot(t)
	var s *second
	i := newInternet(t, bedOptions{nodes: 1, networks: appNetwork + masqueraded + entered, prepare: func(b *bed) {
		n := b.nodes[0]
		err := n.LinkAdd(&netlink.Vrf{LinkAttrs: attrs("blue"), Table: 77})
		if errors.Is(err, unix.EOPNOTSUPP) {
			t.Skip("this kernel has no VRF (CONFIG_NET_VRF), which this is about: run this test binary in a VM with scripts/run-in-vm")
		}
		must(t, err)
		must(t, n.LinkSetUp(n.link(t, "blue")))
		s = newSecond(t, n, "wan1")
		must(t, n.LinkSetMaster(n.link(t, "wan1"), n.link(t, "blue")))
		n.give(t, "wan1", "2001:db8:113::1/64") // which the kernel takes away then
		s.table(t, n, 77)
		for v, far := range []string{"198.18.0.0/24", "2001:db8:18::/64"} {
			n.route(t, far, secondPeer[v].String(), "wan1", func(r *netlink.Route) { r.Flags = int(netlink.FLAG_ONLINK) })
		}
		s.give(t, "lo", "198.18.0.1/32", "2001:db8:18::1/128")
	}})
	c := i.nodes[0].run(t, "c", "app", publish(publishedPorts...))
	settle(t, c)
	f := &shopFront{i, c}
	f.serve(t)
	for v, far := range []string{"198.18.0.1", "2001:db8:18::1"} {
		s.sees(t, c.namespace, netip.MustParseAddr(far), secondOwn[v])
		i.server.sees(t, c.namespace, serverAddresses[v], outside(1)[v])
		f.soldFrom(t, s.namespace, netip.MustParseAddr(far), secondOwn[v])
	}
}

// TestUplinkAddressChanges gives a node another address: new flows have it, and so has what a socket sends on over a flow that had the old one.
func TestUplinkAddressChanges(t *testing.T) {
	takesLong(t)
	t.Parallel()
	i := newInternet(t, bedOptions{nodes: 1, networks: appNetwork + masqueraded + entered})
	n := i.nodes[0]
	c := n.run(t, "c", "app", publish("8080:80/udp"))
	settle(t, c)
	c.tellUDP(t, netip.AddrPortFrom(c.port.V4, 80))
	server := serverAddresses[0]
	udp, tcp := i.server.tellUDP(t, netip.AddrPortFrom(server, 0)), i.server.tellTCP(t, netip.AddrPortFrom(server, 0))
	known := c.dialUDP(t, udp)
	for k, address := range []string{"192.0.2.1", "192.0.2.101", "192.0.2.1"} {
		if k > 0 {
			was := []string{"", "192.0.2.1/24", "192.0.2.101/24"}[k]
			n.give(t, uplink, address+"/24")
			n.takeAway(t, uplink, netip.MustParsePrefix(was)) // with it go the addresses that came later, and the routes
			n.giveAgain(t, uplink, address+"/24")
			must(t, n.RouteReplace(&netlink.Route{Dst: ipNet(netip.MustParsePrefix("0.0.0.0/0")), LinkIndex: n.link(t, uplink).Attrs().Index, Gw: routerAddresses[0].AsSlice()}))
		}
		want := netip.MustParseAddr(address)
		until(t, fmt.Sprintf("the socket's datagrams come from %s", want), func() bool {
			got, err := ask(known, []byte("who am I?"), onePing)
			return err == nil && netip.MustParseAddrPort(string(got)).Addr() == want
		})
		if got := c.seenUDP(t, udp).Addr(); got != want {
			t.Errorf("a new datagram comes from %s, want %s", got, want)
		}
		if got := c.seenTCP(t, tcp).Addr(); got != want {
			t.Errorf("a new connection comes from %s, want %s", got, want)
		}
		if got := i.server.seenUDP(t, netip.AddrPortFrom(want, publishedPort)).Addr(); got != server {
			t.Errorf("at the published port of %s the sender is %s", want, got)
		}
	}
}

// giveAgain puts an address on an interface that may have it.
func (n *namespace) giveAgain(t *testing.T, link, prefix string) {
	t.Helper()
	if err := n.AddrReplace(n.link(t, link), &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(prefix))}); err != nil {
		t.Fatalf("give %s of %s address %s: %v", link, n.name, prefix, err)
	}
}
