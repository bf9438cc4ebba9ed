// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// webNetwork is a routed network.
const webNetwork = `
[network.web]
type = "l3"
id = 101
subnets = ["10.41.0.0/16", "fd41::/48"]
`

// peered are two networks, of which web may open flows to db and not the other way round.
const peered = webNetwork + `
[network.db]
type = "l3"
id = 102
subnets = ["10.42.0.0/16", "fd42::/48"]
[[peering]]
from = "web"
to = "db"
`

// shop is a bed of two nodes with a container of web on the first, and one of db on each.
type shop struct {
	*bed
	web, near, far *container
}

func newShop(t *testing.T, more string) *shop {
	t.Helper()
	b := newBed(t, bedOptions{nodes: 2, networks: peered, more: more})
	s := &shop{b, b.nodes[0].run(t, "web", "web"), b.nodes[0].run(t, "near", "db"), b.nodes[1].run(t, "far", "db")}
	settle(t, s.web, s.near, s.far)
	return s
}

// settle waits until containers take packets: a kernel puts a new IPv6 address into its routes a little later.
func settle(t *testing.T, all ...*container) {
	t.Helper()
	for _, c := range all {
		checkGateway(t, c)
	}
}

// each runs a test for the container of db on the same node and for that on the other one, in both families.
func (s *shop) each(t *testing.T, test func(t *testing.T, db *container, at int)) {
	for name, db := range map[string]*container{"near": s.near, "far": s.far} {
		for at, a := range db.addresses() {
			t.Run(title(name, family(a)), func(t *testing.T) { test(t, db, at) })
		}
	}
}

// TestPeering is what both sides of a peering with a direction see of each other.
func TestPeering(t *testing.T) {
	s := newShop(t, "")
	t.Run("opens", func(t *testing.T) {
		s.each(t, func(t *testing.T, db *container, at int) { checkOpens(t, s.web, db, at) })
	})
	t.Run("refuses", func(t *testing.T) {
		s.each(t, func(t *testing.T, db *container, at int) { checkRefuses(t, db, s.web, at) })
	})
	t.Run("too big", func(t *testing.T) {
		s.each(t, func(t *testing.T, db *container, at int) { checkTooBig(t, db, s.web, at, 1460) })
	})
}

// checkOpens has every kind of flow opened from one side, and data in both directions over it.
func checkOpens(t *testing.T, from, to *container, at int) {
	a := to.addresses()[at]
	from.reaches(t, a)
	checkSizes(t, from, to, at)
	from.transfer(t, to.listenTCP(t, a, digest), transferSize())
	from.echoes(t, to.listenTCP(t, a, func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) }))
}

// echoes sends by TCP and compares what comes back meanwhile.
func (n *namespace) echoes(t *testing.T, to netip.AddrPort) {
	t.Helper()
	c, err := n.dialTCP(t, to, nil)
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(patience)))
	content := pattern(11, transferSize())
	wrote := make(chan error, 1)
	go func() {
		_, err := c.Write(content)
		wrote <- errors.Join(err, c.CloseWrite())
	}()
	got, err := io.ReadAll(c)
	must(t, errors.Join(err, <-wrote))
	if !bytes.Equal(got, content) {
		t.Errorf("%d bytes came back as %d others", len(content), len(got))
	}
}

// prohibited is what a socket reports of a destination that is administratively prohibited: 3/13 and 1/1.
func prohibited(a netip.Addr) error {
	if a.Is4() {
		return unix.EHOSTUNREACH
	}
	return unix.EACCES
}

// checkRefuses holds that one side cannot open anything, and that its sockets say so at once.
func checkRefuses(t *testing.T, from, to *container, at int) {
	a := to.addresses()[at]
	seen := to.capture(t, "eth0")
	marker := fmt.Appendf(nil, "%s wants to %s", from.name, a)
	want := prohibited(a)
	before := from.node.counter("no_route")

	c := from.dialUDP(t, netip.AddrPortFrom(a, 9))
	if _, err := ask(c, marker, patience); !errors.Is(err, want) {
		t.Errorf("a datagram: %v, want %v", err, want)
	}
	if _, err := from.dialTCP(t, to.listenTCP(t, a, digest), nil); !errors.Is(err, want) {
		t.Errorf("connect: %v, want %v", err, want)
	}
	if err := from.ping(a, 56, onePing/10); err == nil {
		t.Error("a ping came back")
	}
	if got := from.node.counter("no_route") - before; got < 3 {
		t.Errorf("%d packets had no_route, want 3", got)
	}
	to.gets(t, from.echoUDP(t, from.addresses()[at], ""), []byte("the other way")) // and what was refused would have come before that
	seen.await(t, "what may", containing([]byte("the other way")))
	if n := seen.count(containing(marker)); n > 0 {
		t.Errorf("%d packets came through", n)
	}
	if n := seen.count(isBareSYN); n > 0 {
		t.Errorf("%d SYNs came through", n)
	}
}

// isBareSYN matches frames with the first segment of a connection.
func isBareSYN(frame []byte) bool {
	if len(frame) < 14 {
		return false
	}
	p, ok := parseIP(frame[14:])
	return ok && p.proto == protoTCP && len(p.payload) >= 20 && p.payload[13]&0x12 == 0x02
}

// TestPeeringIsOfTwo has a third network that no peering names.
func TestPeeringIsOfTwo(t *testing.T) {
	takesLong(t)
	s := newShop(t, `
[network.backend]
type = "l3"
id = 100
subnets = ["10.40.0.0/16", "fd40::/48"]
`)
	third := s.nodes[0].run(t, "third", "backend")
	settle(t, third)
	for at := range 2 {
		for _, to := range []*container{s.web, s.near, s.far} {
			for _, pair := range [][2]*container{{third, to}, {to, third}} {
				a := pair[1].addresses()[at]
				if _, err := ask(pair[0].dialUDP(t, netip.AddrPortFrom(a, 9)), []byte("hello"), patience); !errors.Is(err, prohibited(a)) {
					t.Errorf("%s to %s: %v", pair[0].name, pair[1].name, err)
				}
			}
		}
	}
}

// TestAnswersGoBack has flows from a router whose packets come from addresses in another node's block: the answers go to
// the router, and what the container opens itself goes to the node whose block it is.
func TestAnswersGoBack(t *testing.T) {
	takesLong(t)
	var r *seg6
	b := newBed(t, bedOptions{nodes: 2, more: seg6Node + decapsulations[0].topology, prepare: func(b *bed) {
		r = newSeg6(t, b)
		r.takeByDX(t)
	}})
	twins := []string{"10.40.2.77", "fd40:0:0:2::77"}
	c, y := b.nodes[0].run(t, "c", "backend"), b.nodes[1].run(t, "y", "backend", withIPs(twins...))
	r.encapsulate(t, encapRedMode, "10.40.1.0/24", "fd40:0:0:1::/64")
	seen := y.capture(t, "eth0")
	for at, s := range twins {
		twin := netip.MustParseAddr(s)
		r.host.give(t, "eth0", netip.PrefixFrom(twin, twin.BitLen()).String())
		r.route(t, netip.PrefixFrom(twin, twin.BitLen()).String(), []netip.Addr{r.v4, r.v6}[at].String(), "lan0")
		t.Run(family(twin), func(t *testing.T) { checkAnswersGoBack(t, r, c, y, twin, seen) })
	}
}

func checkAnswersGoBack(t *testing.T, r *seg6, c, y *container, twin netip.Addr, seen *capture) {
	server := c.echoUDP(t, c.like(twin), "answer to ")
	from := &net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(twin, 0)), Timeout: patience}
	u := r.host.dialFrom(t, from, "udp", server).(*net.UDPConn)
	until(t, "the host behind the router gets its answer", func() bool {
		got, err := ask(u, []byte("the router"), onePing)
		return err == nil && string(got) == "answer to the router"
	})
	from.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(twin, 0))
	tcp := r.host.dialFrom(t, from, "tcp", c.listenTCP(t, c.like(twin), func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) }))
	must(t, tcp.SetDeadline(time.Now().Add(patience)))
	if _, err := tcp.Write([]byte("over TCP")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(tcp, make([]byte, len("over TCP"))); err != nil {
		t.Error(err)
	}
	if got := c.gets(t, y.echoUDP(t, twin, "y says "), []byte("hello")); string(got) != "y says hello" {
		t.Errorf("the container's own flow was answered %q", got)
	}
	seen.await(t, "the container's own flow", containing([]byte("hello")))
	if n := seen.count(containing([]byte("the router"))) + seen.count(containing([]byte("over TCP"))); n > 0 {
		t.Errorf("%d answers went to the node whose block it is", n)
	}
}

// dialFrom connects in the namespace; the socket closes with the test.
func (n *namespace) dialFrom(t *testing.T, d *net.Dialer, network string, to netip.AddrPort) net.Conn {
	t.Helper()
	d.Control = func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) })
		return err
	}
	var c net.Conn
	must(t, n.do(func() (err error) {
		c, err = d.Dial(network, to.String())
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c
}

// TestAddressIsReused gives the address of a container that is gone to another one: what is still sent to the first, over flows
// that only that one had opened, does not come to the second.
func TestAddressIsReused(t *testing.T) {
	takesLong(t)
	s := newShop(t, "")
	s.each(t, func(t *testing.T, db *container, at int) { checkReuse(t, s, db, at) })
}

func checkReuse(t *testing.T, s *shop, db *container, at int) {
	n := s.nodes[0]
	old := n.run(t, "old", "web")
	settle(t, old)
	server := db.listenUDP(t, netip.AddrPortFrom(db.addresses()[at], 0))
	c := old.dialUDP(t, netip.MustParseAddrPort(server.LocalAddr().String()))
	push := func(text string) {
		server.WriteToUDPAddrPort([]byte(text), netip.MustParseAddrPort(c.LocalAddr().String()))
	}
	_, err := c.Write([]byte("send me news"))
	must(t, err)
	must(t, server.SetReadDeadline(time.Now().Add(patience)))
	_, _, err = server.ReadFromUDPAddrPort(make([]byte, 100))
	must(t, err)
	push("news for the first")
	must(t, c.SetReadDeadline(time.Now().Add(patience)))
	if _, err := c.Read(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	old.order(t, "release")
	old.remove()
	next := n.run(t, "next", "web", withIPs(old.port.V4.String(), old.port.V6.String()))
	seen := next.capture(t, "eth0")
	refusals := func() (sum uint64) {
		for _, reason := range []string{"no_peering", "no_route", "no_endpoint", "no_flow"} {
			sum += n.counter(reason)
		}
		return sum
	}
	before := refusals()
	until(t, "what is for the first is refused", func() bool {
		push("this must not arrive")
		return refusals() >= before+3
	})
	next.gets(t, db.echoUDP(t, db.addresses()[at], ""), []byte("of its own"))
	seen.await(t, "the answer to its own flow", containing([]byte("of its own")))
	if got := seen.count(containing([]byte("must not arrive"))); got > 0 {
		t.Errorf("%d packets for the container before came to the one that has its address now", got)
	}
	next.order(t, "release")
	next.remove()
}
