// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// Peerings that have everything for the outside leave by the first node.
const (
	byTheFirst = `
[[peering]]
from = "app"
to = "internet"
masquerade = true
egress = "n1"
`
	routedByTheFirst = `
[[peering]]
from = "app"
to = "internet"
egress = "n1"
`
)

// TestEgressNode carries packets for the outside to the node that the peering names, and the answers back.
func TestEgressNode(t *testing.T) {
	for _, form := range forms {
		t.Run(form.name, func(t *testing.T) {
			if form.srh {
				takesLong(t)
			}
			t.Parallel()
			i := newInternet(t, bedOptions{nodes: 2, srh: form.srh, networks: appNetwork + byTheFirst})
			c, near := i.nodes[1].run(t, "c", "app"), i.nodes[0].run(t, "near", "app")
			settle(t, c, near)
			wire, between := i.router.capture(t, "eth0"), i.wire.capture(t, "n2")
			for v, server := range serverAddresses {
				t.Run(family(server), func(t *testing.T) {
					checkOutwards(t, i, c, v)
					i.server.sees(t, c.namespace, server, outside(1)[v])
					i.server.sees(t, near.namespace, server, outside(1)[v])
					checkCarriedOut(t, between, c.addresses()[v], server)
					checkErrorsOutside(t, i, c, v)
				})
			}
			for _, f := range between.all() { // nothing leaves by the node of the container
				p, ok := parseIP(f[min(len(f), 14):])
				if ok && (p.src == serverAddresses[0] || p.dst == serverAddresses[0] || p.src == serverAddresses[1] || p.dst == serverAddresses[1]) {
					t.Fatalf("a bare packet passes the node of the container: %x", f)
				}
			}
			checkNoContainers(t, wire)
		})
	}
}

// checkCarriedOut holds that packets between a container and the server are in outer headers that name app and the external network.
func checkCarriedOut(t *testing.T, wire *capture, c, server netip.Addr) {
	t.Helper()
	for _, way := range []struct{ src, dst netip.Addr }{{c, server}, {server, c}} {
		f := wire.await(t, "a carried packet", func(f []byte) bool {
			o, ok := parseOuter(f)
			p, inner := parseIP(o.inner)
			return ok && inner && p.src == way.src && p.dst == way.dst
		})
		o, _ := parseOuter(f)
		src, dst := o.src.As16(), o.dst.As16()
		app, internet := [3]byte{0, 0, 100}, [3]byte{0xe0}
		from, to := [3]byte(src[8:11]), [3]byte(dst[8:11])
		if way.src == c && (from != app || to[0]&0xf0 != internet[0]) || way.src == server && (to != app || from[0]&0xf0 != internet[0]) {
			t.Errorf("%s to %s is carried from %s to %s", way.src, way.dst, o.src, o.dst)
		}
	}
}

// checkErrorsOutside has the server say that a port is closed, and routers that hops run out.
func checkErrorsOutside(t *testing.T, i *internet, c *container, at int) {
	t.Helper()
	server := serverAddresses[at]
	u := c.dialUDP(t, netip.AddrPortFrom(server, 9))
	until(t, "the server's refusal comes back", func() bool {
		_, err := ask(u, []byte("anybody?"), onePing)
		return errors.Is(err, unix.ECONNREFUSED)
	})
	if _, err := c.dialTCP(t, netip.AddrPortFrom(server, 9), nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connect to a closed port: %v", err)
	}
}

// TestEgressNodeRouted has containers leave by the first node under their own addresses: the fabric takes the answers there.
func TestEgressNodeRouted(t *testing.T) {
	takesLong(t)
	t.Parallel()
	i := newInternet(t, bedOptions{nodes: 2, networks: appNetwork + routedByTheFirst})
	i.routeToContainers(t, 1, 1)
	c := i.nodes[1].run(t, "c", "app")
	settle(t, c)
	for v, server := range serverAddresses {
		checkOutwards(t, i, c, v)
		i.server.sees(t, c.namespace, server, c.addresses()[v])
		checkErrorsOutside(t, i, c, v)
	}
}

// routeToContainers has the router send what is for containers of the first and second node to these nodes.
func (i *internet) routeToContainers(t *testing.T, first, second int) {
	t.Helper()
	for at, by := range []int{first, second} {
		i.router.route(t, []string{"10.40.1.0/24", "10.40.2.0/24"}[at], outside(by)[0].String(), "eth0")
		i.router.route(t, []string{"fd40:0:0:1::/64", "fd40:0:0:2::/64"}[at], outside(by)[1].String(), "eth0")
	}
}

// TestRoutedOutside has containers' own addresses leave, and the fabric route the answers back.
func TestRoutedOutside(t *testing.T) {
	takesLong(t)
	t.Parallel()
	i := newInternet(t, bedOptions{nodes: 2, networks: appNetwork + routed})
	i.routeToContainers(t, 1, 2)
	for _, n := range i.nodes {
		c := n.run(t, "c", "app")
		settle(t, c)
		for v, server := range serverAddresses {
			checkOutwards(t, i, c, v)
			i.server.sees(t, c.namespace, server, c.addresses()[v])
			checkErrorsOutside(t, i, c, v)
			checkShut(t, i.server, c, v)
		}
	}
}

// checkShut holds that somebody outside opens nothing to a container, and is told nothing.
func checkShut(t *testing.T, from *namespace, c *container, at int) {
	t.Helper()
	seen := c.capture(t, "eth0")
	marker := []byte("from outside by " + from.name)
	a := c.addresses()[at]
	if _, err := ask(from.dialUDP(t, netip.AddrPortFrom(a, 9)), marker, onePing); err == nil || errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a datagram to %s: %v", a, err)
	}
	if _, err := from.dialTCP(t, c.listenTCP(t, a, digest), soon); err == nil || errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a connection to %s: %v", a, err)
	}
	if from.ping(a, 56, onePing/10) == nil {
		t.Errorf("%s answers a ping", a)
	}
	if n := seen.count(containing(marker)) + seen.count(isBareSYN); n > 0 {
		t.Errorf("%d packets came to the container", n)
	}
}

// TestEntered has somebody outside open flows to containers by their addresses, at the node that has them and by way of the other one.
func TestEntered(t *testing.T) {
	for name, by := range map[string]int{"own node": 1, "other node": 2} {
		t.Run(name, func(t *testing.T) {
			if by == 1 {
				takesLong(t)
			}
			t.Parallel()
			i := newInternet(t, bedOptions{nodes: 2, networks: appNetwork + entered})
			i.routeToContainers(t, by, 3-by)
			c := i.nodes[0].run(t, "c", "app")
			settle(t, c)
			for v, server := range serverAddresses {
				a := c.addresses()[v]
				t.Run(family(server), func(t *testing.T) {
					checkUse(t, i.server, c.namespace, a, server)
					until(t, "a closed port is told", func() bool {
						_, err := ask(i.server.dialUDP(t, netip.AddrPortFrom(a, 9)), []byte("anybody?"), onePing)
						return errors.Is(err, unix.ECONNREFUSED)
					})
					if _, err := c.dialTCP(t, i.server.listenTCP(t, server, digest), nil); !errors.Is(err, prohibited(server)) {
						t.Errorf("the container connects to the outside: %v, want %v", err, prohibited(server))
					}
				})
			}
		})
	}
}

// TestUnclassified has addresses in no external network, which have no identity, beside one that a longer prefix gives another.
func TestUnclassified(t *testing.T) {
	takesLong(t)
	t.Parallel()
	i := newInternet(t, bedOptions{nodes: 1, networks: `
[network.app]
type = "l3"
id = 100
subnets = ["10.40.0.0/16", "fd40::/48"]
[network.partners]
type = "external"
prefixes = ["198.51.100.0/24", "2001:db8:51::/64"]
[network.rival]
type = "external"
prefixes = ["198.51.100.77/32", "2001:db8:51::77/128"]
[[peering]]
from = "partners"
to = "app"
[[peering]]
from = "app"
to = "partners"
`})
	i.routeToContainers(t, 1, 1)
	foreign := newNamespace(t, "foreign")
	joinNamespaces(t, i.router, "lan1", foreign, "eth0")
	i.router.give(t, "lan1", "203.0.113.1/24", "2001:db8:113::1/64")
	foreign.give(t, "eth0", "203.0.113.2/24", "2001:db8:113::2/64")
	foreign.route(t, "0.0.0.0/0", "203.0.113.1", "eth0")
	foreign.route(t, "::/0", "2001:db8:113::1", "eth0")
	n := i.nodes[0]
	c := n.run(t, "c", "app")
	settle(t, c)
	for v, server := range serverAddresses {
		c.reaches(t, server)
		i.server.reaches(t, c.addresses()[v])
		before := n.counter("no_external")
		checkShut(t, foreign, c, v)
		if n.counter("no_external") < before+3 {
			t.Errorf("%d packets of nobody's were counted", n.counter("no_external")-before)
		}
		for _, a := range []netip.Addr{[]netip.Addr{netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("2001:db8:113::2")}[v],
			[]netip.Addr{netip.MustParseAddr("198.51.100.77"), netip.MustParseAddr("2001:db8:51::77")}[v]} {
			if _, err := ask(c.dialUDP(t, netip.AddrPortFrom(a, 9)), []byte("hello"), patience); !errors.Is(err, prohibited(a)) {
				t.Errorf("a datagram to %s: %v, want %v", a, err, prohibited(a))
			}
		}
	}
}
