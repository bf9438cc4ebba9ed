// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const seg6Segment = `
[node.gw]
kind = "router"
underlay = "fd00:a::9"
locator = "5f00:1ace:9::/48"
network = "seg"
sid = { l2 = "5f00:1ace:9::2" }
[endpoint.lan]
network = "seg"
node = "gw"
mac = "52:54:00:00:00:c8"
address = ["10.60.0.200", "fd60::ffff:1"]
`

// TestKernelSeg6Segment has the kernel's own SRv6 as the far end of a segment, in both directions and both forms.
func TestKernelSeg6Segment(t *testing.T) {
	for _, form := range forms {
		t.Run(form.name, func(t *testing.T) {
			var r *seg6
			b := newBed(t, bedOptions{nodes: 2, srh: form.srh, networks: segments, more: seg6Segment, prepare: func(b *bed) { r = newSeg6Segment(t, b) }})
			c, other := b.nodes[0].run(t, "c", "seg"), b.nodes[1].run(t, "other", "seg")
			r.standFor(t, c)
			for mode, name := range map[int]string{l2encapMode: "l2encap", l2encapRedMode: "l2encap.red"} {
				t.Run(name, func(t *testing.T) { checkSeg6Segment(t, b, r, c, mode) })
			}
			t.Run("neighbours", func(t *testing.T) { checkSeg6Neighbours(t, r, c, other) })
		})
	}
}

// newSeg6Segment makes the router with End.DX2, and the host behind it in the segment.
func newSeg6Segment(t *testing.T, b *bed) *seg6 {
	r := newSeg6Router(t, b)
	r.v4, r.v6 = netip.MustParseAddr("10.60.0.200"), netip.MustParseAddr("fd60::ffff:1")
	must(t, r.host.LinkSetHardwareAddr(r.host.link(t, "eth0"), net.HardwareAddr{0x52, 0x54, 0, 0, 0, 0xc8}))
	r.host.give(t, "eth0", "10.60.0.200/24", "fd60::ffff:1/64")
	// Next header 143 cannot be segmented by the kernel.
	r.host.switchOff(t, "eth0", "tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-generic-segmentation", "tx-checksum-ip-generic")
	dx2 := netlink.SEG6LocalEncap{Action: endDX2, Oif: r.link(t, "lan0").Attrs().Index}
	dx2.Flags[nl.SEG6_LOCAL_OIF] = true
	r.take(t, "5f00:1ace:9::2", dx2)
	return r
}

// standFor has the router take frames for a container: what it encapsulates has to be sent to it. The container asks for its neighbours: the node
// answers for what is at a router.
func (r *seg6) standFor(t *testing.T, c *container) {
	t.Helper()
	must(t, r.LinkSetHardwareAddr(r.link(t, "lan0"), c.port.MAC[:]))
	for _, a := range c.addresses() {
		must(t, r.host.NeighSet(&netlink.Neigh{LinkIndex: r.host.link(t, "eth0").Attrs().Index, State: unix.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: c.port.MAC[:]}))
	}
}

// checkSeg6Segment has both sides open connections, and looks at what the router gets.
func checkSeg6Segment(t *testing.T, b *bed, r *seg6, c *container, mode int) {
	for _, a := range c.addresses() {
		r.encapsulateTo(t, mode, segSID(1, oneStation).String(), netip.PrefixFrom(a, a.BitLen()).String())
	}
	wire := b.wire.capture(t, "gw")
	for at, host := range []netip.Addr{r.v4, r.v6} {
		c.reaches(t, host)
		r.host.reaches(t, c.addresses()[at])
		c.transfer(t, r.host.listenTCP(t, host, digest), transferSize()/8)
		r.host.transfer(t, c.listenTCP(t, c.addresses()[at], digest), transferSize()/8)
	}
	if n := wire.count(carrying(func(c carried) bool { return c.shim })); n > 0 {
		t.Errorf("%d frames behind a shim came to a router", n)
	}
	srhs := wire.count(carrying(func(c carried) bool { return c.src == netip.MustParseAddr("5f00:1ace:9::1") && c.srh != nil }))
	if (srhs > 0) != (mode == l2encapMode) {
		t.Errorf("the kernel sent %d routing headers", srhs)
	}
}

// checkSeg6Neighbours has both sides ask who has what. The kernel's SRv6 carries IP only: what else the host sends, and what it
// sends to groups, is encapsulated here.
func checkSeg6Neighbours(t *testing.T, r *seg6, c, other *container) {
	stop, done := make(chan struct{}), make(chan struct{})
	in, out := r.packetSocket(t, "lan0", unix.ETH_P_ALL), r.sender(t, uplink)
	n1 := c.node.mac(t, uplink)
	own := r.mac(t, uplink)
	go func() {
		defer close(done)
		defer unix.Close(in)
		buffer := make([]byte, 2048)
		for {
			select {
			case <-stop:
				return
			default:
			}
			n, from, err := unix.Recvfrom(in, buffer, 0)
			if l, ok := from.(*unix.SockaddrLinklayer); err != nil || !ok || l.Pkttype == unix.PACKET_OUTGOING || n < 14 {
				continue
			}
			f := buffer[:n]
			if f[0]&1 == 0 && !isKind(f, typeARP) {
				continue // the kernel's
			}
			function := oneStation
			if f[0]&1 == 1 {
				function = allMembers
			}
			packet := ipv6(netip.MustParseAddr("5f00:1ace:9::1"), segSID(1, function), protoFrame, 64, f)
			unix.Write(out.fd, ethernet(n1, own, typeIPv6, packet))
		}
	}()
	defer func() { close(stop); <-done }()
	r.host.flushNeighbours(t, "eth0")
	c.flushNeighbours(t, "eth0")
	for at, host := range []netip.Addr{r.v4, r.v6} {
		c.reaches(t, host)
		r.host.reaches(t, c.addresses()[at])
		c.flushNeighbours(t, "eth0")
		r.host.flushNeighbours(t, "eth0")
		r.host.reaches(t, c.addresses()[at])
	}
	checkSeg6Groups(t, r, c, other)
}

// checkSeg6Groups sends to all from behind the router, and to those behind it.
func checkSeg6Groups(t *testing.T, r *seg6, c, other *container) {
	atC, atOther, atHost := c.capture(t, "eth0"), other.capture(t, "eth0"), r.host.capture(t, "eth0")
	mac := [6]byte(r.host.mac(t, "eth0"))
	r.host.sender(t, "eth0").send(t, ethernet(broadcast, mac, typeFree, []byte("from behind the router")))
	atC.await(t, "a router's broadcast", containing([]byte("from behind the router")))
	c.raw(t).to(t, broadcast, typeFree, []byte("to all of you"))
	atHost.await(t, "a container's broadcast", containing([]byte("to all of you")))
	atOther.await(t, "a container's broadcast", containing([]byte("to all of you")))
	time.Sleep(30 * time.Millisecond)
	one := func(f []byte) bool { return bytes.Contains(f, []byte("to all of you")) }
	if a, b := atHost.count(one), atOther.count(one); a != 1 || b != 1 {
		t.Errorf("%d copies behind the router, %d at another node", a, b)
	}
	if atOther.count(containing([]byte("from behind"))) > 0 {
		t.Error("a node passed a router's broadcast on to another node")
	}
}

// flushNeighbours forgets all neighbours of an interface, permanent ones too.
func (n *namespace) flushNeighbours(t testing.TB, link string) {
	t.Helper()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		all, err := n.NeighList(n.link(t, link).Attrs().Index, family)
		must(t, err)
		for _, known := range all {
			if known.State&unix.NUD_NOARP == 0 {
				must(t, n.NeighDel(&known))
			}
		}
	}
}
