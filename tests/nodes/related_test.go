// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// TestRelatedErrors holds that ICMP errors go the way of the answers of the flow that they are about, and no other.
func TestRelatedErrors(t *testing.T) {
	takesLong(t)
	s := newShop(t, "")
	s.each(t, func(t *testing.T, db *container, at int) {
		t.Run("port", func(t *testing.T) { checkClosedPort(t, s.web, db, at) })
		t.Run("traceroute", func(t *testing.T) { checkTraceroute(t, s.web, db.addresses()[at], s.web.gateway(db.addresses()[at])) })
		t.Run("unrelated", func(t *testing.T) { checkUnrelated(t, s.web, db, at) })
	})
	same := s.nodes[0].run(t, "same", "db")
	for at := range 2 { // within a network
		checkClosedPort(t, same, s.near, at)
		checkClosedPort(t, same, s.far, at)
		checkClosedPort(t, s.far, same, at)
	}
}

// checkClosedPort sends to a port that nobody listens at: the other container's kernel says so, and the socket learns of it.
func checkClosedPort(t *testing.T, from, to *container, at int) {
	t.Helper()
	c := from.dialUDP(t, netip.AddrPortFrom(to.addresses()[at], 9))
	until(t, "the connection is refused", func() bool { // kernels send such errors at a bounded rate
		_, err := ask(c, []byte("anybody?"), onePing)
		return errors.Is(err, unix.ECONNREFUSED)
	})
}

const tracePort = 33434

// checkTraceroute sends with more hops each time, and compares who reports that they ran out, or that nobody listens.
func checkTraceroute(t *testing.T, from *container, to netip.Addr, before ...netip.Addr) {
	t.Helper()
	var hops []netip.Addr
	errs := from.capture(t, "eth0")
	for ttl := 1; ttl <= 8 && !slices.Contains(hops, to); ttl++ {
		at := netip.AddrPortFrom(to, tracePort+uint16(ttl))
		c := from.dialUDP(t, at)
		setOption(t, c, to, unix.IP_TTL, unix.IPV6_UNICAST_HOPS, ttl)
		var e icmpError
		until(t, fmt.Sprintf("an error about hop %d to %s", ttl, to), func() (ok bool) {
			ask(c, []byte("trace"), onePing)
			e, ok = errs.errorAbout(at)
			return ok
		})
		hops = append(hops, e.from)
	}
	if want := append(before, to); !slices.Equal(hops, want) {
		t.Errorf("the route to %s is %s, want %s", to, hops, want)
	}
}

// errorAbout is an ICMP error that quotes a datagram for that end.
func (c *capture) errorAbout(to netip.AddrPort) (e icmpError, ok bool) {
	for _, f := range c.all() {
		if len(f) < 34 {
			continue
		}
		e, ok = parseICMPError(f[14:])
		if ok && e.about.dst == to.Addr() && len(e.about.payload) >= 4 && binary.BigEndian.Uint16(e.about.payload[2:]) == to.Port() {
			return e, true
		}
	}
	return e, false
}

// TestTracerouteOverRouter has a hop of the way behind a router with the kernel's own SRv6: its error is not from where
// the quoted packet was for.
func TestTracerouteOverRouter(t *testing.T) {
	takesLong(t)
	var r *seg6
	b := newBed(t, bedOptions{nodes: 1, more: seg6Node + decapsulations[0].topology, prepare: func(b *bed) {
		r = newSeg6(t, b)
		r.takeByDX(t)
	}})
	c := b.nodes[0].run(t, "c", "backend")
	r.encapsulate(t, encapRedMode, "10.40.1.0/24", "fd40:0:0:1::/64")
	for at, host := range []netip.Addr{r.v4, r.v6} {
		t.Run(family(host), func(t *testing.T) {
			c.reaches(t, host)
			checkTraceroute(t, c, host, c.gateway(host), netip.MustParseAddr([]string{"10.40.9.1", "fd00:a::9"}[at])) // as the router's kernel chooses
		})
	}
}

// checkUnrelated forges errors at the side that may open nothing: about a packet that never was, and about one that
// was for somebody else.
func checkUnrelated(t *testing.T, web, db *container, at int) {
	a, b := web.addresses()[at], db.addresses()[at]
	seen := web.capture(t, "eth0")
	raw := db.sender(t, "eth0")
	c := web.dialUDP(t, netip.AddrPortFrom(web.gateway(a), 9))
	known := netip.MustParseAddrPort(c.LocalAddr().String())
	for name, quoted := range map[string][2]netip.AddrPort{
		"of no flow":         {netip.AddrPortFrom(a, 1), netip.AddrPortFrom(b, 2)},
		"of another's":       {known, netip.AddrPortFrom(web.gateway(a), 9)},
		"to itself":          {netip.AddrPortFrom(b, 1), netip.AddrPortFrom(a, 2)},
		"of another network": {netip.AddrPortFrom(a, 1), netip.AddrPortFrom(netip.MustParseAddr([]string{"10.40.1.2", "fd40::2"}[at]), 2)},
	} {
		before := db.node.counter("no_flow")
		marker := []byte("forged error " + name)
		m := unreachable(b, a, ip(quoted[0].Addr(), quoted[1].Addr(), protoUDP, 60, udp(quoted[0], quoted[1], marker)))
		until(t, "an error "+name+" is refused", func() bool {
			raw.send(t, ethernet(plan.GatewayMAC, db.mac(t, "eth0"), etherType(a), m))
			return db.node.counter("no_flow") > before
		})
	}
	web.gets(t, db.echoUDP(t, b, ""), []byte("the last"))
	seen.await(t, "an answer", containing([]byte("the last")))
	if n := seen.count(containing([]byte("forged error"))); n > 0 {
		t.Errorf("%d forged errors came through", n)
	}
}

// unreachable is the whole packet that says that nobody listens at a port.
func unreachable(from, to netip.Addr, quoted []byte) []byte {
	if from.Is4() {
		m := join([]byte{3, 3, 0, 0, 0, 0, 0, 0}, quoted)
		binary.BigEndian.PutUint16(m[2:], checksum(m))
		return ipv4(from, to, protoICMP, 64, m)
	}
	return ipv6(from, to, protoICMPv6, 64, icmpv6(from, to, join([]byte{1, 4, 0, 0, 0, 0, 0, 0}, quoted)))
}
