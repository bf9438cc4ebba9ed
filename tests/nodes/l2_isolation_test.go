// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/lace-net/lace/dataplane/plan"
)

// TestSegmentIsolation has two segments with the same addresses and MAC addresses on two nodes.
func TestSegmentIsolation(t *testing.T) {
	takesLong(t)
	b := newBed(t, bedOptions{nodes: 3, networks: segments})
	near := withIPs("10.60.0.20", "fd60::1:20")
	far := withIPs("10.60.0.40", "fd60::2:20")
	one := []*container{b.nodes[0].run(t, "one", "seg", near), b.nodes[1].run(t, "one", "seg", far)}
	two := []*container{b.nodes[0].run(t, "two", "twin", near), b.nodes[1].run(t, "two", "twin", far)}
	only := b.nodes[0].run(t, "only", "seg", withIPs("10.60.0.21", "fd60::1:21"))
	third := b.nodes[2].run(t, "third", "seg")
	checkPings(t, append(one, only, third)...)
	checkPings(t, two...)
	t.Run("same addresses", func(t *testing.T) { checkSameWords(t, one, two, "seg", "twin") })
	t.Run("other network", func(t *testing.T) { checkOtherSegment(t, two, only) })
	t.Run("spoofing", func(t *testing.T) { checkSegmentSpoofing(t, b, one, only) })
	t.Run("foreign nodes", func(t *testing.T) { checkForeignFrames(t, b, one[0], one[1], third) })
}

// checkOtherSegment asks for an address that only the first network has, and sends frames to its MAC address, from both nodes.
func checkOtherSegment(t *testing.T, two []*container, only *container) {
	seen := only.capture(t, "eth0")
	for i, c := range two {
		out := c.raw(t)
		marker := fmt.Appendf(nil, "from the other network %d", i)
		counted := only.node
		before := counted.counter("unknown_mac")
		out.to(t, only.port.MAC, typeFree, marker)
		until(t, "the frame is refused", func() bool { return counted.counter("unknown_mac") > before })
		asked := counted.counter("neighbour_unknown")
		out.to(t, broadcast, typeARP, arp(arpRequest, out.mac, c.port.V4, [6]byte{}, only.port.V4))
		out.send(t, solicitation(out.mac, c.port.V6, only.port.V6))
		until(t, "the questions are refused", func() bool { return counted.counter("neighbour_unknown") >= asked+2 })
		if seen.count(containing(marker)) > 0 {
			t.Errorf("a frame of the other network came from %s", c.name)
		}
	}
}

// checkSegmentSpoofing sends what a container of a segment may not send, and looks whether any of it arrives anywhere.
func checkSegmentSpoofing(t *testing.T, b *bed, one []*container, only *container) {
	from, far := one[0], one[1]
	marker := []byte("this must not arrive")
	places := []*capture{far.capture(t, "eth0"), only.capture(t, "eth0"), b.wire.capture(t, "n1"), b.nodes[0].capture(t, "laceb500"), b.nodes[0].capture(t, "laceb501")}
	out := from.sender(t, "eth0")
	for _, a := range segmentAttacks(from, far, only, marker) {
		before := from.node.counter(a.reason)
		out.send(t, a.frame)
		until(t, a.name+" is counted as "+a.reason, func() bool { return from.node.counter(a.reason) > before })
	}
	good := []byte("this may")
	for _, to := range []*container{far, only} {
		d := udp(netip.AddrPortFrom(from.port.V4, 5), netip.AddrPortFrom(to.port.V4, 5), good)
		out.send(t, ethernet(to.port.MAC, from.port.MAC, typeIPv4, ipv4(from.port.V4, to.port.V4, protoUDP, 64, d)))
	}
	for i, c := range places {
		if i < 3 {
			c.await(t, "a packet that may", containing(good))
		}
		if found := c.count(containing(marker)); found > 0 {
			t.Errorf("%d forbidden frames passed %s", found, c.name)
		}
	}
}

func segmentAttacks(from, far, only *container, marker []byte) []attack {
	mac, to := [6]byte(from.port.MAC), [6]byte(far.port.MAC)
	v4, v6, to4, to6 := from.port.V4, from.port.V6, far.port.V4, far.port.V6
	frame := func(dst, src [6]byte, src4, dst4 netip.Addr, sport, dport uint16) []byte {
		d := udp(netip.AddrPortFrom(src4, sport), netip.AddrPortFrom(dst4, dport), marker)
		return ethernet(dst, src, etherType(src4), ip(src4, dst4, protoUDP, 64, d))
	}
	all := netip.MustParseAddr("ff02::1")
	own, others := linkLocal(mac), linkLocal(only.port.MAC)
	group6 := [6]byte{0x33, 0x33, 0, 0, 0, 1}
	sid := segSID(2, oneStation)
	inside := ethernet(to, mac, typeFree, marker)
	router := join([]byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, marker)
	nd := func(src, dst, target netip.Addr, kind, hops byte) []byte {
		message := join([]byte{kind, 0, 0, 0, 0x20, 0, 0, 0}, target.AsSlice(), []byte{2, 1}, mac[:], marker)
		return ethernet(group6, mac, typeIPv6, ipv6(src, dst, protoICMPv6, hops, icmpv6(src, dst, message)))
	}
	return []attack{
		{"another MAC", "spoofed_mac", frame(to, [6]byte{2, 9, 9, 9, 9, 9}, v4, to4, 5, 5)},
		{"a neighbour's MAC", "spoofed_mac", frame(to, only.port.MAC, v4, to4, 5, 5)},
		{"the gateway's MAC", "spoofed_mac", frame(to, plan.GatewayMAC, v4, to4, 5, 5)},
		{"a group's MAC", "spoofed_mac", frame(to, broadcast, v4, to4, 5, 5)},
		{"another MAC to all", "spoofed_mac", ethernet(broadcast, only.port.MAC, typeFree, marker)},
		{"another MAC in a VLAN", "spoofed_mac", ethernet(to, only.port.MAC, typeVLAN, tag(7, typeFree, marker))},
		{"another IPv4 address", "spoofed_address", frame(to, mac, only.port.V4, to4, 5, 5)},
		{"another IPv4 address to all", "spoofed_address", frame(broadcast, mac, only.port.V4, netip.MustParseAddr("10.60.0.255"), 5, 5)},
		{"no IPv4 address", "spoofed_address", frame(to, mac, zero4, to4, 5, 5)},
		{"another IPv6 address", "spoofed_address", frame(to, mac, only.port.V6, to6, 5, 5)},
		{"another IPv6 address to all", "spoofed_address", frame(group6, mac, only.port.V6, all, 5, 5)},
		{"another link-local address", "spoofed_address", frame(to, mac, others, linkLocal(to), 5, 5)},
		{"ARP answer for another", "spoofed_address", ethernet(to, mac, typeARP, join(arp(arpReply, mac, only.port.V4, to, to4), marker))},
		{"ARP announcement of another", "spoofed_address", ethernet(broadcast, mac, typeARP, join(arp(arpRequest, mac, only.port.V4, [6]byte{}, only.port.V4), marker))},
		{"ARP question as another", "spoofed_address", ethernet(broadcast, mac, typeARP, join(arp(arpRequest, mac, only.port.V4, [6]byte{}, to4), marker))},
		{"ARP with another MAC", "spoofed_mac", ethernet(broadcast, mac, typeARP, join(arp(arpRequest, only.port.MAC, v4, [6]byte{}, to4), marker))},
		{"ARP of another kind", "malformed", ethernet(broadcast, mac, typeARP, join([]byte{0, 6}, arp(arpRequest, mac, v4, [6]byte{}, to4)[2:], marker))},
		{"ND advertisement of another", "spoofed_address", nd(v6, all, only.port.V6, ndAdvertisement, 255)},
		{"ND advertisement of another's link-local address", "spoofed_address", nd(own, all, others, ndAdvertisement, 255)},
		{"ND advertisement as another", "spoofed_address", nd(only.port.V6, all, only.port.V6, ndAdvertisement, 255)},
		{"ND question as another", "spoofed_address", nd(only.port.V6, all, to6, ndSolicitation, 255)},
		{"ND from afar", "malformed", nd(v6, all, v6, ndAdvertisement, 254)},
		{"router advertisement", "router_advertisement", ethernet(group6, mac, typeIPv6, ipv6(own, all, protoICMPv6, 255, icmpv6(own, all, router)))},
		{"DHCP server", "dhcp_server", frame(to, mac, v4, to4, 67, 68)},
		{"DHCPv6 server", "dhcp_server", frame(to, mac, own, linkLocal(to), 547, 546)},
		{"to the gateway, where there is none", "unknown_mac", frame(plan.GatewayMAC, mac, v4, netip.MustParseAddr("192.0.2.1"), 5, 5)},
		{"SRv6 from its own address", "srv6_from_container", ethernet(to, mac, typeIPv6, ipv6(v6, sid, protoFrame, 64, inside))},
		{"SRv6 with a routing header", "srv6_from_container", ethernet(to, mac, typeIPv6, ipv6(v6, to6, protoSRH, 64, srh(protoFrame, 0, to6, inside)))},
	}
}

// checkForeignFrames sends frames in SRv6 to n1 from the underlay, right and wrong: from n2, where far is.
func checkForeignFrames(t *testing.T, b *bed, to, far, third *container) {
	n := b.nodes[0]
	out := b.wire.sender(t, "n1")
	inside, host := to.capture(t, "eth0"), n.capture(t, "laceb500")
	peer, sid, many := segSID(2, "5ce"), segSID(1, oneStation), segSID(1, allMembers)
	marker := "this must not arrive"
	packet := func(from netip.Addr, text string) []byte {
		return ipv4(from, to.port.V4, protoUDP, 60, udp(netip.AddrPortFrom(from, 5), netip.AddrPortFrom(to.port.V4, 5), []byte(text)))
	}
	frame := func(dst, src [6]byte, from netip.Addr, text string) []byte {
		return ethernet(dst, src, typeIPv4, packet(from, text))
	}
	bad := frame(to.port.MAC, far.port.MAC, far.port.V4, marker)
	gre := func(head uint32, f []byte) []byte { return join(be16(int(head>>16)), be16(int(head&0xffff)), f) }
	free := func(dst, src [6]byte) []byte { return ethernet(dst, src, typeFree, []byte(marker)) }
	unknown := [6]byte{0x52, 0x54, 0, 1, 2, 3}
	twinPeer := netip.MustParseAddr("5f00:1ace:2:5ce:1:f500::")
	// The packets are of a flow that is known, bridged.
	checkFlowOf(t, far, to)
	send := func(src, dst netip.Addr, next byte, payload []byte) {
		out.send(t, ethernet(n.mac(t, uplink), [6]byte{2, 0, 0, 0, 0, 9}, typeIPv6, ipv6(src, dst, next, 60, payload)))
	}
	for _, tt := range []struct {
		name, reason string
		src, dst     netip.Addr
		next         byte
		payload      []byte
	}{
		{"from nobody", "unknown_source", netip.MustParseAddr("2001:db8::9"), sid, protoFrame, bad},
		{"from no node", "unknown_source", segSID(7, "5ce"), sid, protoFrame, bad},
		{"of another segment", "no_peering", twinPeer, sid, protoFrame, bad},
		{"to a network that is none", "unknown_network", netip.MustParseAddr("5f00:1ace:2:5ce:1:f600::"), netip.MustParseAddr("5f00:1ace:1:17:1:f600::"), protoFrame, bad},
		{"behind a tail", "sid_tail", peer, sid.Next(), protoFrame, bad},
		{"a packet", "wrong_payload", peer, sid, protoIPv4, packet(far.port.V4, marker)},
		{"a frame where packets go", "wrong_payload", peer, segSID(1, "14"), protoFrame, bad},
		{"GRE with a checksum", "wrong_payload", peer, sid, protoGRE, gre(0x80006558, bad)},
		{"GRE with IP", "wrong_payload", peer, sid, protoGRE, gre(0x0800, bad)},
		{"segments left", "segments_left", peer, sid, protoSRH, srh(protoFrame, 1, sid, bad)},
		{"short", "malformed", peer, sid, protoFrame, bad[:13]},
		{"short IP", "malformed", peer, sid, protoFrame, bad[:30]},
		{"MAC of a container here", "spoofed_mac", peer, sid, protoFrame, free(to.port.MAC, to.port.MAC)},
		{"MAC of this node's pool", "spoofed_mac", peer, sid, protoFrame, free(to.port.MAC, [6]byte{2, 0x4c, 10, 60, 0, 30})},
		{"MAC of a third node", "spoofed_mac", peer, sid, protoFrame, free(to.port.MAC, third.port.MAC)},
		{"MAC of a third node to all", "spoofed_mac", peer, many, protoFrame, free(broadcast, third.port.MAC)},
		{"the gateway's MAC", "spoofed_mac", peer, sid, protoFrame, free(to.port.MAC, plan.GatewayMAC)},
		{"a group's MAC", "spoofed_mac", peer, sid, protoFrame, free(to.port.MAC, broadcast)},
		{"address of a container here", "spoofed_address", peer, sid, protoFrame, frame(to.port.MAC, far.port.MAC, to.port.V4, marker)},
		{"address of a third node", "spoofed_address", peer, sid, protoFrame, frame(to.port.MAC, far.port.MAC, third.port.V4, marker)},
		{"ARP of a third node", "spoofed_address", peer, many, protoFrame, ethernet(broadcast, far.port.MAC, typeARP, join(arp(arpRequest, far.port.MAC, third.port.V4, [6]byte{}, third.port.V4), []byte(marker)))},
		{"ARP with another MAC", "spoofed_mac", peer, many, protoFrame, ethernet(broadcast, far.port.MAC, typeARP, join(arp(arpRequest, third.port.MAC, far.port.V4, [6]byte{}, far.port.V4), []byte(marker)))},
		{"ND of a third node", "spoofed_address", peer, many, protoFrame, announcement(far.port.MAC, third.port.V6, third.port.V6)},
		{"to nobody", "unknown_mac", peer, sid, protoFrame, free(unknown, far.port.MAC)},
		{"to another node", "unknown_mac", peer, sid, protoFrame, free(third.port.MAC, far.port.MAC)},
	} {
		before := n.counter(tt.reason)
		send(tt.src, tt.dst, tt.next, tt.payload)
		until(t, tt.name+" is counted as "+tt.reason, func() bool { return n.counter(tt.reason) > before })
	}
	send(peer, sid, protoFrame, frame(to.port.MAC, far.port.MAC, far.port.V4, "reduced may"))
	send(peer, sid, protoSRH, srh(protoFrame, 0, sid, frame(to.port.MAC, far.port.MAC, far.port.V4, "srh may")))
	send(peer, sid, protoGRE, gre(0x6558, frame(to.port.MAC, far.port.MAC, far.port.V4, "shim may")))
	send(peer, many, protoFrame, ethernet(broadcast, far.port.MAC, typeFree, []byte("broadcast may")))
	for _, what := range []string{"reduced may", "srh may", "shim may", "broadcast may"} {
		inside.await(t, what, containing([]byte(what)))
	}
	if inside.count(containing([]byte(marker)))+host.count(containing([]byte(marker))) > 0 {
		t.Error("foreign frames came through")
	}
}

// checkFlowOf has a flow of datagrams from port 5 to port 5 in both directions.
func checkFlowOf(t *testing.T, from, to *container) {
	t.Helper()
	for _, ends := range [][2]*container{{from, to}, {to, from}} {
		seen := ends[1].capture(t, "eth0")
		src, dst := netip.AddrPortFrom(ends[0].port.V4, 5), netip.AddrPortFrom(ends[1].port.V4, 5)
		ends[0].raw(t).to(t, ends[1].port.MAC, typeIPv4, ipv4(src.Addr(), dst.Addr(), protoUDP, 64, udp(src, dst, []byte("a known flow"))))
		seen.await(t, "a datagram", containing([]byte("a known flow")))
	}
}

// TestLearnedMAC has a container with a MAC address of its own, which no address stands for: another node learns where it is from
// its frames, and that it has moved.
func TestLearnedMAC(t *testing.T) {
	takesLong(t)
	s := newSegBed(t, bedOptions{})
	mac := plan.MAC{0x52, 0x54, 0, 0xaa, 0xbb, 1}
	withMAC := func(w *wish) { w.MAC = mac }
	out := s.a.raw(t)
	before := s.a.node.counter("unknown_mac")
	out.to(t, mac, typeFree, []byte("nobody is known yet"))
	until(t, "it is refused", func() bool { return s.a.node.counter("unknown_mac") > before })

	guest := s.nodes[1].run(t, "guest", "seg", withMAC)
	checkPings(t, s.a, guest) // an answer to ARP is a frame of its
	checkFrameTo(t, s, guest, 2)
	s.local.transfer(t, guest.listenTCP(t, guest.port.V4, digest), transferSize()/8)
	guest.order(t, "release")
	guest.remove()

	guest = s.nodes[2].run(t, "guest", "seg", withMAC)
	guest.raw(t).to(t, broadcast, typeARP, arp(arpRequest, mac, guest.port.V4, [6]byte{}, guest.port.V4))
	checkFrameTo(t, s, guest, 3)
	checkPings(t, s.a, guest)
	guest.order(t, "release")
	guest.remove()

	guest = s.nodes[0].run(t, "guest", "seg", withMAC) // here: the node knows
	wire := s.wire.capture(t, "n1")
	seen := guest.capture(t, "eth0")
	out.to(t, mac, typeFree, []byte("here it is"))
	seen.await(t, "a frame", containing([]byte("here it is")))
	if wire.count(containing([]byte("here it is"))) > 0 {
		t.Error("a frame for a container here left the node")
	}
	checkPings(t, s.far, guest)
	refused(t, s.nodes[1], s.nodes[1].newContainer(t, "thief"), "seg", "10.60.0.20", func(w *wish) { w.MAC = plan.MAC{2, 0x4c, 10, 60, 0, 20} })
}

// checkFrameTo holds that frames for a container go to a node, polling, as the node has to hear of it first.
func checkFrameTo(t *testing.T, s *segBed, to *container, node int) {
	t.Helper()
	seen, wire := to.capture(t, "eth0"), s.wire.capture(t, "n1")
	out := s.a.raw(t)
	marker := fmt.Appendf(nil, "to node %d", node)
	until(t, fmt.Sprintf("frames go to n%d", node), func() bool {
		out.to(t, to.port.MAC, typeFree, marker)
		time.Sleep(5 * time.Millisecond)
		return seen.count(containing(marker)) > 0
	})
	last := wire.all()
	for i := len(last) - 1; i >= 0; i-- {
		if c, ok := parseCarried(last[i]); ok && bytes.Contains(c.frame, marker) {
			if c.dst != segSID(node, oneStation) {
				t.Errorf("the last frame went to %s", c.dst)
			}
			return
		}
	}
}
