// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// racks are two nodes behind a router each of their own: no peer is on-link.
type racks struct {
	*fabric
	router *namespace
	nodes  [2]*node
}

// newRacks joins n1 and n2 by a router, which is fd00:a:N::fe for node N.
func newRacks(t *testing.T, via bool) *racks {
	needRoot(t)
	text := "version = 1\n[underlay]\nlocator-block = \"5f00:1ace::/32\"\n"
	for i := 1; i <= 2; i++ {
		text += fmt.Sprintf("[node.n%d]\nunderlay = \"fd00:a:%[1]d::1\"\nlocator = \"5f00:1ace:%[1]d::/48\"\nuplinks = [\"up0\"]\n", i)
		if via {
			text += fmt.Sprintf("via = \"fd00:a:%d::fe\"\n", i)
		}
	}
	r := &racks{fabric: &fabric{t: t, topology: text + twoNetworks}, router: newNamespace(t, "router")}
	r.router.sysctl(t, "ipv6/conf/all/forwarding", "1")
	for i := range r.nodes {
		n := r.newNode(fmt.Sprintf("n%d", i+1))
		r.nodes[i] = n
		joinNamespaces(t, n.namespace, uplink, r.router, n.host)
		n.give(t, uplink, fmt.Sprintf("fd00:a:%d::1/64", i+1))
		r.router.give(t, n.host, fmt.Sprintf("fd00:a:%d::fe/64", i+1))
		r.router.route(t, fmt.Sprintf("5f00:1ace:%d::/48", i+1), fmt.Sprintf("fd00:a:%d::1", i+1), n.host)
		if !via {
			n.route(t, "::/0", fmt.Sprintf("fd00:a:%d::fe", i+1), uplink)
		}
	}
	r.startAll(r.nodes[:]...)
	return r
}

// TestRoutedUnderlay has a router between the nodes: named by via, or known to the kernel only.
func TestRoutedUnderlay(t *testing.T) {
	for _, via := range []bool{true, false} {
		t.Run(fmt.Sprintf("via-%t", via), func(t *testing.T) {
			r := newRacks(t, via)
			a, b := r.nodes[0].run(t, "a", "backend"), r.nodes[1].run(t, "b", "backend")
			checkPings(t, a, b)
			wire := r.router.capture(t, "n2")
			for at := range 2 {
				a.transfer(t, b.listenTCP(t, b.addresses()[at], digest), transferSize())
			}
			checkNothingBare(t, wire)
			o, _ := parseOuter(wire.await(t, "an outer packet", func(f []byte) bool { return isFrom(f, "5f00:1ace:1::/48") }))
			if o.hops != 63 {
				t.Errorf("behind the router the outer hop limit is %d, want 63", o.hops)
			}
		})
	}
}

// TestTwoUplinks has a second switch between the nodes, and moves the traffic to it.
func TestTwoUplinks(t *testing.T) {
	takesLong(t)
	b := newBed(t, bedOptions{nodes: 2, perNode: "uplinks = [\"up0\", \"up1\"]", prepare: func(b *bed) {
		joinNamespaces(t, b.nodes[0].namespace, "up1", b.nodes[1].namespace, "up1")
		for i, n := range b.nodes {
			n.give(t, "up1", fmt.Sprintf("fd00:b::%d/64", i+1))
		}
	}})
	x, y := b.nodes[0].run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend")
	checkPings(t, x, y)
	second := b.nodes[1].capture(t, "up1")
	outer := func(f []byte) bool { return isFrom(f, "5f00:1ace:1::/48") }
	if second.count(outer) > 0 {
		t.Error("traffic over the second uplink, while the underlay's addresses are on the first")
	}
	for i, n := range b.nodes {
		n.route(t, fmt.Sprintf("fd00:a::%d/128", 2-i), fmt.Sprintf("fd00:b::%d", 2-i), "up1")
	}
	until(t, "the traffic goes over the second uplink", func() bool {
		return x.ping(y.port.V4, 56, onePing) == nil && second.count(outer) > 0
	})
	checkPings(t, x, y)
	x.transfer(t, y.listenTCP(t, y.port.V6, digest), transferSize())
}

// TestUplinkComesBack takes a node's uplink away and gives it another one of the same name.
func TestUplinkComesBack(t *testing.T) {
	takesLong(t)
	t.Parallel()
	for name, keys := range map[string]string{"named": "uplinks = [\"up0\"]", "found": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t, bedOptions{nodes: 2, perNode: keys})
			n := b.nodes[0]
			x, y, local := n.run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend"), n.run(t, "local", "backend")
			checkPings(t, x, y)
			must(t, n.LinkDel(n.link(t, uplink)))
			until(t, "there is no way to the peer", func() bool {
				x.ping(y.port.V4, 56, onePing/10)
				return n.counter("no_nexthop") > 0
			})
			checkPings(t, x, local)
			late := n.run(t, "late", "backend") // attached without an uplink
			if late.port.MTU != x.port.MTU {
				t.Errorf("without an uplink the MTU became %d, was %d", late.port.MTU, x.port.MTU)
			}
			b.plug(n.namespace, uplink, n.host)
			n.give(t, uplink, "fd00:a::1/64")
			checkPings(t, x, y, late)
			if got := len(n.pins()) - len(b.nodes[1].pins()); n.status().Features.TCX && got != 2 {
				t.Errorf("%d more pins than the other node, which has two containers less:\n%v", got, n.pins())
			}
		})
	}
}

// TestPeerChangesMAC gives a peer's uplink another Ethernet address, as a replaced machine has.
func TestPeerChangesMAC(t *testing.T) {
	takesLong(t)
	t.Parallel()
	b := newBed(t, bedOptions{nodes: 2})
	x, y := b.nodes[0].run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend")
	checkPings(t, x, y)
	up := b.nodes[1].link(t, uplink)
	must(t, b.nodes[1].LinkSetHardwareAddr(up, []byte{2, 0, 0, 0, 0, 0x77}))
	checkPings(t, x, y)
}

// TestUplinkChangesMTU lowers the wire's MTU: containers learn of it when they send too much.
func TestUplinkChangesMTU(t *testing.T) {
	takesLong(t)
	t.Parallel()
	b := newBed(t, bedOptions{nodes: 2})
	x, y := b.nodes[0].run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend")
	checkPings(t, x, y)
	for _, n := range b.nodes {
		must(t, n.LinkSetMTU(n.link(t, uplink), 1400))
	}
	until(t, "new containers get the new MTU", func() bool {
		c := b.nodes[0].run(t, "new", "backend")
		defer c.remove()
		c.order(t, "release")
		return c.port.MTU == 1360
	})
	for at := range 2 {
		x.transfer(t, y.listenTCP(t, y.addresses()[at], digest), transferSize())
		y.transfer(t, x.listenTCP(t, x.addresses()[at], digest), transferSize())
	}
	if b.nodes[0].counter("too_big") == 0 {
		t.Error("nobody was told that 1460 bytes are too many")
	}
	for _, n := range b.nodes {
		must(t, n.LinkSetMTU(n.link(t, uplink), 1500))
	}
	until(t, "new containers get the old MTU again", func() bool {
		c := b.nodes[0].run(t, "new", "backend")
		defer c.remove()
		c.order(t, "release")
		return c.port.MTU == 1460
	})
}

// TestRawUplink joins two nodes by tun devices, whose packets have no Ethernet header: what one
// node's kernel writes is handed to the other's.
func TestRawUplink(t *testing.T) {
	needRoot(t)
	b := newBed(t, bedOptions{nodes: 2, perNode: "uplinks = [\"tun0\"]", prepare: func(b *bed) {
		one, two := newTun(t, b.nodes[0], "fd00:a::1"), newTun(t, b.nodes[1], "fd00:a::2")
		go pump(one, two)
		go pump(two, one)
	}})
	x, y := b.nodes[0].run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend")
	checkPings(t, x, y)
	for at := range 2 {
		x.transfer(t, y.listenTCP(t, y.addresses()[at], digest), transferSize()/4)
	}
}

// newTun makes tun0, the only way to the underlay: the switch's addresses go.
func newTun(t *testing.T, n *node, address string) *os.File {
	t.Helper()
	must(t, n.LinkDel(n.link(t, uplink)))
	tun := newTunnelDevice(t, n, "tun0", unix.IFF_TUN)
	n.give(t, "tun0", address+"/64")
	return tun
}

// newTunnelDevice makes a tun or a tap in the node, up. It goes with the test.
func newTunnelDevice(t *testing.T, n *node, name string, mode uint16) *os.File {
	t.Helper()
	// A device file of its own: where nothing has used the module yet, /dev has none.
	file := filepath.Join(t.TempDir(), "tun")
	must(t, unix.Mknod(file, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 200))))
	fd := -1
	must(t, n.do(func() (err error) {
		if fd, err = unix.Open(file, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			return fmt.Errorf("open the tun device: %w", err)
		}
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		ifr.SetUint16(mode | unix.IFF_NO_PI)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}))
	tun := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { tun.Close() })
	must(t, n.LinkSetUp(n.link(t, name)))
	return tun
}

// pump carries packets from one device to the other until one of them is closed.
func pump(from, to *os.File) {
	b := make([]byte, 1<<16)
	for {
		n, err := from.Read(b)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err == nil { // one that is down, or full, loses the packet as a wire does
			to.Write(b[:n])
		}
	}
}

// TestForeignRouteToALocator leaves somebody else's route to a peer's locator as it is.
func TestForeignRouteToALocator(t *testing.T) {
	takesLong(t)
	b := newBed(t, bedOptions{nodes: 2, prepare: func(b *bed) {
		b.nodes[0].route(t, "5f00:1ace:2::/48", "fd00:a::99", uplink)
	}})
	routes, err := b.nodes[0].RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Dst: ipNet(netip.MustParsePrefix("5f00:1ace:2::/48"))}, netlink.RT_FILTER_DST)
	must(t, err)
	if len(routes) != 1 || routes[0].Gw.String() != "fd00:a::99" {
		t.Errorf("the routes to the peer's locator are %v", routes)
	}
	until(t, "the agent says so", func() bool { return strings.Contains(b.nodes[0].log.String(), "5f00:1ace:2::/48") })
	x, y := b.nodes[0].run(t, "x", "backend"), b.nodes[1].run(t, "y", "backend")
	checkPings(t, x, y) // the programs do not need the route
}
