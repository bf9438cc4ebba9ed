// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// narrowMTU is that of a link in the middle of the way.
const narrowMTU = 1400

var (
	routerAddresses = []netip.Addr{netip.MustParseAddr("192.0.2.254"), netip.MustParseAddr("fd00:a::fe")}      // towards the nodes
	serverSide      = []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:51::1")} // towards the server
)

// narrow puts a second router before the server, behind a link that carries less than the others.
func (i *internet) narrow(t *testing.T) {
	t.Helper()
	must(t, i.router.LinkDel(i.router.link(t, "lan0")))
	far := newNamespace(t, "far")
	for _, s := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		far.sysctl(t, s, "1")
	}
	far.tellAll(t)
	joinNamespaces(t, i.router, "mid0", far, "mid0")
	for at, n := range []*namespace{i.router, far} {
		must(t, n.LinkSetMTU(n.link(t, "mid0"), narrowMTU))
		n.give(t, "mid0", fmt.Sprintf("203.0.113.%d/24", at+1), fmt.Sprintf("2001:db8:113::%d/64", at+1))
	}
	i.router.route(t, "198.51.100.0/24", "203.0.113.2", "mid0")
	i.router.route(t, "2001:db8:51::/64", "2001:db8:113::2", "mid0")
	far.route(t, "0.0.0.0/0", "203.0.113.1", "mid0")
	far.route(t, "::/0", "2001:db8:113::1", "mid0")
	joinNamespaces(t, far, "lan0", i.server, "eth0")
	far.give(t, "lan0", "198.51.100.1/24", "2001:db8:51::1/64")
	i.server.give(t, "eth0", "198.51.100.2/24", "2001:db8:51::2/64")
	i.server.route(t, "0.0.0.0/0", "198.51.100.1", "eth0")
	i.server.route(t, "::/0", "2001:db8:51::1", "eth0")
}

// learned is the MTU that a kernel has learned of the way to an address; 0: none.
func (n *namespace) learned(t testing.TB, to netip.Addr) int {
	t.Helper()
	routes, err := n.RouteGet(to.AsSlice())
	must(t, err)
	return routes[0].MTU
}

// checkLearns has a side send more than the way carries, by TCP and in datagrams that are not to be fragmented: it learns what fits.
func checkLearns(t *testing.T, from, to *namespace, at netip.Addr, mtu int) {
	t.Helper()
	from.transfer(t, to.listenTCP(t, at, digest), transferSize()/4)
	learns(t, from, to.listenUDP(t, netip.AddrPortFrom(at, 0)), netip.Addr{}, mtu)
}

// learns has datagrams that are not to be fragmented be too big, until the sender's kernel knows that. at: whom they are sent to, if that
// is not the server itself.
func learns(t *testing.T, from *namespace, server *net.UDPConn, at netip.Addr, mtu int) {
	t.Helper()
	to := server.LocalAddr().(*net.UDPAddr).AddrPort()
	if at.IsValid() {
		to = netip.AddrPortFrom(at, publishedPort)
	}
	u := from.dialUDP(t, to)
	headers := 28
	if to.Addr().Is6() {
		headers = 48
	}
	setOption(t, u, to.Addr(), unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	until(t, "the sender is told that its datagrams are too big", func() bool {
		_, err := u.Write(make([]byte, mtu-headers+1))
		return errors.Is(err, unix.EMSGSIZE)
	})
	if got := from.learned(t, to.Addr()); got != mtu {
		t.Errorf("%s has learned that %d bytes fit on the way to %s, want %d", from.name, got, to.Addr(), mtu)
	}
	until(t, "what fits arrives", func() bool {
		if _, err := u.Write(make([]byte, mtu-headers)); err != nil {
			return false
		}
		server.SetReadDeadline(time.Now().Add(onePing))
		for {
			size, err := server.Read(make([]byte, 65536))
			if err != nil || size == mtu-headers {
				return err == nil
			}
		}
	})
}

// ways are what peerings make of flows to the outside: as whom the nodes speak, and the node that they leave by.
var ways = map[string]struct {
	tables string
	own    bool // addresses of the containers are seen outside
	by     int  // node that flows of the second one leave by
}{
	"masqueraded":           {masqueraded, false, 2},
	"routed":                {routed, true, 2},
	"masqueraded by a node": {byTheFirst, false, 1},
	"routed by a node":      {routedByTheFirst, true, 1},
}

// TestPathMTU has a link of 1400 bytes in the middle of the way to the outside: nothing is lost in a black hole, in either direction.
func TestPathMTU(t *testing.T) {
	takesLong(t)
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			i := newInternet(t, bedOptions{nodes: 2, networks: appNetwork + way.tables})
			i.narrow(t)
			if way.own {
				i.routeToContainers(t, 1, way.by)
			}
			c := i.nodes[1].run(t, "c", "app")
			settle(t, c)
			for v, server := range serverAddresses {
				t.Run(family(server), func(t *testing.T) {
					checkLearns(t, c.namespace, i.server, server, narrowMTU)
					c.downloads(t, i.server.serveHTTP(t, server, transferSize()), transferSize())
					echo := i.server.echoUDP(t, server, "")
					for _, size := range []int{1300, 1400, 9000, 60000} {
						payload := pattern(uint64(size), size)
						if got := c.gets(t, echo, payload); !bytes.Equal(got, payload) {
							t.Errorf("%d bytes came back as %d others", size, len(got))
						}
					}
					checkTraceroute(t, c, server, c.gateway(server), routerAddresses[v], []netip.Addr{netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("2001:db8:113::2")}[v])
					checkPingTrace(t, c, server, c.gateway(server), routerAddresses[v], []netip.Addr{netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("2001:db8:113::2")}[v])
				})
			}
		})
	}
}

// checkPingTrace is a traceroute with pings, whose errors quote the identifier that the container's socket has.
func checkPingTrace(t *testing.T, from *container, to netip.Addr, hops ...netip.Addr) {
	t.Helper()
	errs := from.capture(t, "eth0")
	p, err := from.newPinger(to)
	must(t, err)
	defer p.Close()
	for at, hop := range hops {
		setOption(t, p.PacketConn.(*net.IPConn), to, unix.IP_TTL, unix.IPV6_UNICAST_HOPS, at+1)
		until(t, fmt.Sprintf("hop %d of a ping to %s is %s", at+1, to, hop), func() bool {
			must(t, p.send(uint16(at), 56))
			return slices.ContainsFunc(errs.all(), func(f []byte) bool {
				if len(f) < 34 {
					return false
				}
				e, ok := parseICMPError(f[14:])
				return ok && e.from == hop && e.about.dst == to && e.about.src == from.like(to) && len(e.about.payload) >= 8 &&
					binary.BigEndian.Uint16(e.about.payload[4:]) == p.id
			})
		})
	}
}

// TestPathMTUInwards has the narrow link between who is outside and containers that he reaches by their addresses, and by published ports.
func TestPathMTUInwards(t *testing.T) {
	takesLong(t)
	i := newInternet(t, bedOptions{nodes: 2, networks: appNetwork + entered})
	i.narrow(t)
	i.routeToContainers(t, 2, 1) // each by the other node
	c := i.nodes[0].run(t, "c", "app", publish("8080:80/udp", "8081:81/tcp", "8082:82/tcp"))
	settle(t, c)
	for v, a := range c.addresses() {
		t.Run(title("address", family(a)), func(t *testing.T) {
			checkLearns(t, i.server, c.namespace, a, narrowMTU)
			i.server.echoes(t, c.listenTCP(t, a, func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) }))
			checkTracerouteFrom(t, i.server, a, serverSide[v], []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:113::1")}[v], outside(2)[v], a)
		})
		t.Run(title("port", family(a)), func(t *testing.T) {
			own := outside(1)[v]
			c.serveTCP(t, netip.AddrPortFrom(a, 81), digest)
			c.serveTCP(t, netip.AddrPortFrom(a, 82), func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) })
			i.server.transfer(t, netip.AddrPortFrom(own, transferPort), transferSize()/4)
			i.server.echoes(t, netip.AddrPortFrom(own, echoPort))
			u := c.listenUDP(t, netip.AddrPortFrom(a, 80))
			learns(t, i.server, u, own, narrowMTU)
			checkAnswersLearn(t, i.server, u, own, a)
			u.Close()
			until(t, "that nobody listens is told", func() bool {
				_, err := ask(i.server.dialUDP(t, netip.AddrPortFrom(own, publishedPort)), []byte("anybody?"), onePing)
				return errors.Is(err, unix.ECONNREFUSED)
			})
		})
	}
}

// checkAnswersLearn has a container answer with more than fits to who asked at a published port.
func checkAnswersLearn(t *testing.T, from *namespace, server *net.UDPConn, own, a netip.Addr) {
	t.Helper()
	client := from.dialUDP(t, netip.AddrPortFrom(own, publishedPort))
	setOption(t, server, a, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	_, err := client.Write([]byte("tell me much"))
	must(t, err)
	must(t, server.SetReadDeadline(time.Now().Add(onePing)))
	b := make([]byte, 65536)
	size, to, err := server.ReadFromUDPAddrPort(b)
	for err == nil && string(b[:size]) != "tell me much" {
		size, to, err = server.ReadFromUDPAddrPort(b)
	}
	must(t, err)
	until(t, "the container is told that its answers are too big", func() bool {
		_, err := server.WriteToUDPAddrPort(make([]byte, narrowMTU-27), to)
		return errors.Is(err, unix.EMSGSIZE)
	})
}

// checkTracerouteFrom is a traceroute from outside.
func checkTracerouteFrom(t *testing.T, from *namespace, to netip.Addr, hops ...netip.Addr) {
	t.Helper()
	checkTracerouteFromLink(t, from, "eth0", to, hops...)
}

// checkTracerouteFromLink is checkTracerouteFrom by an interface.
func checkTracerouteFromLink(t *testing.T, from *namespace, link string, to netip.Addr, hops ...netip.Addr) {
	t.Helper()
	errs := from.capture(t, link)
	for at, hop := range hops {
		u := from.dialUDP(t, netip.AddrPortFrom(to, tracePort+uint16(at)))
		setOption(t, u, to, unix.IP_TTL, unix.IPV6_UNICAST_HOPS, at+1)
		var e icmpError
		until(t, fmt.Sprintf("an error about hop %d to %s", at+1, to), func() (ok bool) {
			ask(u, []byte("trace"), onePing)
			e, ok = errs.errorAbout(netip.AddrPortFrom(to, tracePort+uint16(at)))
			return ok
		})
		if e.from != hop {
			t.Errorf("hop %d to %s is %s, want %s", at+1, to, e.from, hop)
		}
	}
}

// TestNarrowWayOut has the node's own interface to the outside take less than its uplink: the node says so itself.
func TestNarrowWayOut(t *testing.T) {
	takesLong(t)
	needRoot(t)
	wide := newNamespace(t, "wide")
	i := newInternet(t, bedOptions{nodes: 2, networks: appNetwork + byTheFirst, prepare: func(b *bed) {
		n := b.nodes[0]
		joinNamespaces(t, n.namespace, "wan0", wide, "wan0")
		must(t, n.LinkSetMTU(n.link(t, "wan0"), narrowMTU))
		n.give(t, "wan0", "203.0.113.1/24", "2001:db8:113::1/64")
		wide.give(t, "wan0", "203.0.113.2/24", "2001:db8:113::2/64")
		wide.give(t, "lo", "198.18.0.1/32", "2001:db8:18::1/128")
		n.route(t, "198.18.0.0/24", "203.0.113.2", "wan0")
		n.route(t, "2001:db8:18::/64", "2001:db8:113::2", "wan0")
	}})
	for at, n := range i.nodes {
		c := n.run(t, fmt.Sprint("c", at), "app")
		settle(t, c)
		for _, a := range []string{"198.18.0.1", "2001:db8:18::1"} {
			checkLearns(t, c.namespace, wide, netip.MustParseAddr(a), narrowMTU)
		}
	}
	if i.nodes[0].counter("too_big") == 0 {
		t.Error("the node has told nobody that packets are too big")
	}
}
