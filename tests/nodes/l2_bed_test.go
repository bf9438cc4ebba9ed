// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// segments are two L2 networks with the same subnets. Node N has the pools 10.60.0.(16N)/28 and fd60::N:0/112.
const segments = `
[network.seg]
type = "l2"
id = 500
subnets = ["10.60.0.0/24", "fd60::/64"]
[network.twin]
type = "l2"
id = 501
subnets = ["10.60.0.0/24", "fd60::/64"]
`

// The wire's words for network 500.
const (
	protoGRE   = 47
	protoFrame = 143

	oneStation = "17" // End.DT2U
	allMembers = "18" // End.DT2M
)

var broadcast = [6]byte{255, 255, 255, 255, 255, 255}

// segSID is an address of network 500 at node N, by its function.
func segSID(node int, function string) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("5f00:1ace:%d:%s:1:f400::", node, function))
}

// carried is a frame on the underlay with the one that is in it.
type carried struct {
	outer
	shim  bool
	frame []byte
}

// parseCarried reads a frame with a frame in it; false for others.
func parseCarried(frame []byte) (c carried, ok bool) {
	c.outer, ok = parseOuter(frame)
	if !ok || c.next != protoFrame && c.next != protoGRE {
		return c, false
	}
	c.shim, c.frame = c.next == protoGRE, c.inner
	if c.shim {
		if len(c.inner) < 4 || !bytes.Equal(c.inner[:4], []byte{0, 0, 0x65, 0x58}) {
			return c, false
		}
		c.frame = c.inner[4:]
	}
	return c, len(c.frame) >= 14
}

// carrying matches frames on the underlay by the frame in them.
func carrying(match func(carried) bool) func([]byte) bool {
	return func(f []byte) bool {
		c, ok := parseCarried(f)
		return ok && match(c)
	}
}

// isKind tells a frame's EtherType.
func isKind(frame []byte, kind int) bool {
	return len(frame) >= 14 && int(binary.BigEndian.Uint16(frame[12:])) == kind
}

// carriedARP matches ARP on the underlay, by operation and by whom it asks for, or says something of.
func carriedARP(operation int, target netip.Addr) func([]byte) bool {
	return carrying(func(c carried) bool { return isARP(c.frame, operation, target) })
}

func isARP(f []byte, operation int, target netip.Addr) bool {
	if !isKind(f, typeARP) || len(f) < 42 || int(binary.BigEndian.Uint16(f[20:])) != operation {
		return false
	}
	about := f[38:42]
	if operation == arpReply {
		about = f[28:32]
	}
	return bytes.Equal(about, target.AsSlice())
}

const (
	arpRequest, arpReply = 1, 2

	ndSolicitation, ndAdvertisement = 135, 136
)

// carriedND matches neighbour discovery on the underlay, by type and target.
func carriedND(kind byte, target netip.Addr) func([]byte) bool {
	return carrying(func(c carried) bool { return isND(c.frame, kind, target) })
}

func isND(f []byte, kind byte, target netip.Addr) bool {
	if !isKind(f, typeIPv6) {
		return false
	}
	p, ok := parseIP(f[14:])
	return ok && p.proto == protoICMPv6 && len(p.payload) >= 24 && p.payload[0] == kind && bytes.Equal(p.payload[8:24], target.AsSlice())
}

// solicitation asks who has target, from src; unspecified: whether anybody has it already.
func solicitation(mac [6]byte, src, target netip.Addr) []byte {
	t := target.As16()
	group := netip.AddrFrom16([16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: t[13], 14: t[14], 15: t[15]})
	message := join([]byte{ndSolicitation, 0, 0, 0, 0, 0, 0, 0}, t[:])
	if !src.IsUnspecified() {
		message = join(message, []byte{1, 1}, mac[:])
	}
	return ethernet([6]byte{0x33, 0x33, 0xff, t[13], t[14], t[15]}, mac, typeIPv6, ipv6(src, group, protoICMPv6, 255, icmpv6(src, group, message)))
}

// announcement is an unsolicited advertisement to all nodes.
func announcement(mac [6]byte, src, target netip.Addr) []byte {
	all := netip.MustParseAddr("ff02::1")
	message := join([]byte{ndAdvertisement, 0, 0, 0, 0x20, 0, 0, 0}, target.AsSlice(), []byte{2, 1}, mac[:])
	return ethernet([6]byte{0x33, 0x33, 0, 0, 0, 1}, mac, typeIPv6, ipv6(src, all, protoICMPv6, 255, icmpv6(src, all, message)))
}

// linkLocal is the address that a kernel makes of a MAC address.
func linkLocal(mac [6]byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}

// wireLikeANIC has the node's kernel segment and checksum what it sends, as a card without offloads wants it.
func (n *node) wireLikeANIC(t testing.TB) {
	t.Helper()
	n.switchOff(t, uplink, "tx-checksum-ip-generic", "tx-scatter-gather", "tx-scatter-gather-fraglist", "tx-gso-partial",
		"tx-generic-segmentation", "tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-tcp-ecn-segmentation",
		"tx-tcp-mangleid-segmentation", "tx-udp-segmentation", "tx-gre-segmentation", "tx-gre-csum-segmentation",
		"tx-ipxip4-segmentation", "tx-ipxip6-segmentation")
}

// switchOff switches features of an interface off, those that the kernel knows.
func (n *namespace) switchOff(t testing.TB, link string, features ...string) {
	t.Helper()
	must(t, n.do(func() error {
		e, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer e.Close()
		known, err := e.FeatureNames(link)
		if err != nil {
			return err
		}
		off := map[string]bool{}
		for _, f := range features {
			if _, ok := known[f]; ok {
				off[f] = false
			}
		}
		return e.Change(link, off)
	}))
}

// segBed is three nodes with containers of network seg: a and local on the first, far and third on the others.
type segBed struct {
	*bed
	a, local, far, third *container
}

func newSegBed(t *testing.T, o bedOptions) *segBed {
	t.Helper()
	if o.nodes = 3; o.networks == "" {
		o.networks = segments
	}
	b := newBed(t, o)
	s := &segBed{b, b.nodes[0].run(t, "a", "seg"), b.nodes[0].run(t, "local", "seg"), b.nodes[1].run(t, "far", "seg"), b.nodes[2].run(t, "third", "seg")}
	s.awaitAddresses(t)
	return s
}

func (s *segBed) all() []*container { return []*container{s.a, s.local, s.far, s.third} }

// awaitAddresses waits until kernels use the containers' addresses: they look for duplicates of IPv6 ones first, and put them
// into their routes a little later.
func (s *segBed) awaitAddresses(t *testing.T) {
	t.Helper()
	for _, c := range s.all() {
		c.reaches(t, c.port.V4)
		c.reaches(t, c.port.V6)
	}
}

// raw sends frames of a container's own making, with its MAC address.
type raw struct {
	*sender
	mac [6]byte
}

func (c *container) raw(t testing.TB) *raw {
	t.Helper()
	return &raw{c.sender(t, "eth0"), c.mac(t, "eth0")}
}

// to sends a frame to a MAC address.
func (r *raw) to(t testing.TB, dst [6]byte, kind int, payload []byte) {
	t.Helper()
	r.send(t, ethernet(dst, r.mac, kind, payload))
}

// overhead of a frame's IP packet on the underlay, by form.
func segOverhead(srhForm bool) int {
	if srhForm {
		return 64 + 18
	}
	return 40 + 18
}

// dialBroadcast opens a socket that may send to all of a network; it closes with the test.
func (n *namespace) dialBroadcast(t testing.TB, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1) })
		return err
	}}
	var c net.Conn
	must(t, n.do(func() (err error) {
		c, err = d.Dial("udp4", to.String())
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

// giveWithDAD puts an address on an interface, which the kernel looks for duplicates of.
func (n *namespace) giveWithDAD(t testing.TB, link string, p netip.Prefix) {
	t.Helper()
	must(t, n.AddrAdd(n.link(t, link), &netlink.Addr{IPNet: ipNet(p)}))
}

func (n *namespace) takeAway(t testing.TB, link string, p netip.Prefix) {
	t.Helper()
	must(t, n.AddrDel(n.link(t, link), &netlink.Addr{IPNet: ipNet(p)}))
}

// dadState says how far the detection of duplicates of an address is: tentative, failed or done.
func (n *namespace) dadState(t testing.TB, link string, a netip.Addr) string {
	t.Helper()
	all, err := n.AddrList(n.link(t, link), netlink.FAMILY_V6)
	must(t, err)
	for _, have := range all {
		if got, _ := netip.AddrFromSlice(have.IP); got != a {
			continue
		}
		switch {
		case have.Flags&unix.IFA_F_DADFAILED != 0:
			return "failed"
		case have.Flags&unix.IFA_F_TENTATIVE != 0:
			return "tentative"
		}
		return "done"
	}
	return "gone"
}
