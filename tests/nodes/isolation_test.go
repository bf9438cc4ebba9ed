// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane/plan"
)

// TestIsolation has two networks with the same addresses on two nodes.
func TestIsolation(t *testing.T) {
	takesLong(t)
	b := newBed(t, bedOptions{nodes: 2})
	near := withIPs("10.40.1.10", "fd40:0:0:1::10")
	far := withIPs("10.40.2.10", "fd40:0:0:2::10")
	one := []*container{b.nodes[0].run(t, "one", "backend", near), b.nodes[1].run(t, "one", "backend", far)}
	two := []*container{b.nodes[0].run(t, "two", "other", near), b.nodes[1].run(t, "two", "other", far)}
	only := b.nodes[0].run(t, "only", "backend", withIPs("10.40.1.11", "fd40:0:0:1::11"))
	checkPings(t, one...)
	checkPings(t, two...)
	t.Run("same addresses", func(t *testing.T) { checkSameWords(t, one, two, "backend", "other") })
	t.Run("other network", func(t *testing.T) { checkOtherNetwork(t, two, only) })
	t.Run("host", func(t *testing.T) { checkHostIsClosed(t, one[0], b) })
	t.Run("spoofing", func(t *testing.T) { checkSpoofing(t, b, one, only) })
	t.Run("foreign SRv6", func(t *testing.T) { checkForeignSRv6(t, b, one[0]) })
}

// checkSameWords asks the same address from both networks: each answers with its word.
func checkSameWords(t *testing.T, one, two []*container, word1, word2 string) {
	for at := range 2 {
		to := one[1].addresses()[at]
		first, second := one[1].listenUDP(t, netip.AddrPortFrom(to, 7777)), two[1].listenUDP(t, netip.AddrPortFrom(to, 7777))
		go answerWith(first.ReadFromUDPAddrPort, first.WriteToUDPAddrPort, word1)
		go answerWith(second.ReadFromUDPAddrPort, second.WriteToUDPAddrPort, word2)
		for range 5 {
			if got := one[0].gets(t, netip.AddrPortFrom(to, 7777), []byte("who?")); string(got) != word1 {
				t.Errorf("from %s %s is %q", one[0].network, to, got)
			}
			if got := two[0].gets(t, netip.AddrPortFrom(to, 7777), []byte("who?")); string(got) != word2 {
				t.Errorf("from %s %s is %q", two[0].network, to, got)
			}
		}
	}
}

func answerWith(read func([]byte) (int, netip.AddrPort, error), write func([]byte, netip.AddrPort) (int, error), word string) {
	b := make([]byte, 2048)
	for {
		_, from, err := read(b)
		if err != nil {
			return
		}
		write([]byte(word), from)
	}
}

// checkOtherNetwork asks for an address that only the first network has, from both nodes.
func checkOtherNetwork(t *testing.T, two []*container, only *container) {
	seen := only.capture(t, "eth0")
	for at := range 2 {
		to := only.addresses()[at]
		marker := []byte("from the other network " + family(to))
		for _, c := range two {
			before := only.node.counter("no_endpoint")
			u := c.dialUDP(t, netip.AddrPortFrom(to, 9))
			until(t, "the packet is refused", func() bool {
				u.Write(marker)
				return only.node.counter("no_endpoint") > before
			})
		}
		if seen.count(containing(marker)) > 0 {
			t.Errorf("a packet of the other network came to %s", to)
		}
	}
}

// checkHostIsClosed sends to every address that the host has, with a listener behind each.
func checkHostIsClosed(t *testing.T, c *container, b *bed) {
	n := b.nodes[0]
	n.give(t, "lo", "192.0.2.1/32", "2001:db8::1/128")
	must(t, n.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("br9")}))
	must(t, n.LinkSetUp(n.link(t, "br9")))
	n.give(t, "br9", "198.51.100.1/24", "2001:db8:2::1/64")
	const number = 7070
	heard4 := n.listenUDP(t, netip.AddrPortFrom(netip.IPv4Unspecified(), number))
	heard6 := n.listenUDP(t, netip.AddrPortFrom(netip.IPv6Unspecified(), number))
	targets := []string{"192.0.2.1", "198.51.100.1", "127.0.0.1", "10.40.1.1", "fd00:a::1", "2001:db8::1", "2001:db8:2::1", "fd40:0:0:1::1", "5f00:1ace:1::1", "::1"}
	refused := func() uint64 {
		k := n.status().Counters
		return k["no_route"] + k["gateway_closed"] + k["srv6_from_container"] + k["malformed"]
	}
	raw := c.sender(t, "eth0")
	for _, s := range targets {
		to := netip.MustParseAddr(s)
		before := refused()
		from := netip.AddrPortFrom(c.like(to), number)
		until(t, "the datagram to "+s+" is refused", func() bool {
			d := udp(from, netip.AddrPortFrom(to, number), []byte("let me in"))
			raw.send(t, ethernet(plan.GatewayMAC, c.mac(t, "eth0"), etherType(to), ip(from.Addr(), to, protoUDP, 64, d)))
			return refused() > before
		})
	}
	for _, s := range []string{"192.0.2.1", "2001:db8::1"} { // the listeners do hear
		u := n.dialUDP(t, netip.AddrPortFrom(netip.MustParseAddr(s), number))
		if _, err := u.Write([]byte("the host itself")); err != nil {
			t.Fatal(err)
		}
	}
	buffer := make([]byte, 64)
	for _, heard := range []interface {
		SetReadDeadline(time.Time) error
		Read([]byte) (int, error)
	}{heard4, heard6} {
		must(t, heard.SetReadDeadline(time.Now().Add(patience)))
		size, err := heard.Read(buffer)
		if err != nil || string(buffer[:size]) != "the host itself" {
			t.Errorf("the host heard %q, %v", buffer[:size], err)
		}
	}
}

// attack is a frame that a container may not send.
type attack struct {
	name   string
	reason string
	frame  []byte
}

// checkSpoofing sends what a container may not send, and looks whether any of it arrives anywhere.
func checkSpoofing(t *testing.T, b *bed, one []*container, only *container) {
	from, far := one[0], one[1]
	marker := []byte("this must not arrive")
	places := []*capture{far.capture(t, "eth0"), only.capture(t, "eth0"), b.wire.capture(t, "n1"), b.nodes[0].capture(t, "laceb100"), b.nodes[0].capture(t, "laceb200")}
	out := from.sender(t, "eth0")
	for _, a := range attacks(t, from, far, only, marker) {
		before := from.node.counter(a.reason)
		out.send(t, a.frame)
		until(t, a.name+" is counted as "+a.reason, func() bool { return from.node.counter(a.reason) > before })
	}
	good := []byte("this may")
	for _, to := range []*container{far, only} {
		d := udp(netip.AddrPortFrom(from.port.V4, 5), netip.AddrPortFrom(to.port.V4, 5), good)
		out.send(t, ethernet(plan.GatewayMAC, from.mac(t, "eth0"), typeIPv4, ipv4(from.port.V4, to.port.V4, protoUDP, 64, d)))
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

func attacks(t *testing.T, from, far, only *container, marker []byte) []attack {
	mac, gateway := from.mac(t, "eth0"), [6]byte(plan.GatewayMAC)
	v4, v6 := from.port.V4, from.port.V6
	to4, to6 := far.port.V4, far.port.V6
	u := func(src, dst netip.Addr, sport, dport uint16) []byte {
		return udp(netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport), marker)
	}
	frame := func(src [6]byte, src4, dst4 netip.Addr, sport, dport uint16) []byte {
		return ethernet(gateway, src, etherType(src4), ip(src4, dst4, protoUDP, 64, u(src4, dst4, sport, dport)))
	}
	allNodes := netip.MustParseAddr("ff02::1")
	linkLocal := netip.MustParseAddr("fe80::1")
	sid := netip.MustParseAddr("5f00:1ace:2:14:0:6400::")
	locator := netip.MustParseAddr("5f00:1ace:1:5ce:0:6400::")
	v4InSID := ipv4(v4, to4, protoUDP, 64, u(v4, to4, 5, 5))
	advertisement := join([]byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, marker)
	neighbour := join([]byte{136, 0, 0, 0, 0x20, 0, 0, 0}, only.port.V6.AsSlice(), []byte{2, 1}, mac[:], marker)
	onlyMAC := only.mac(t, "eth0")
	return []attack{
		{"another MAC", "spoofed_mac", frame([6]byte{2, 9, 9, 9, 9, 9}, v4, to4, 5, 5)},
		{"another IPv4 address", "spoofed_address", frame(mac, only.port.V4, to4, 5, 5)},
		{"another IPv6 address", "spoofed_address", frame(mac, only.port.V6, to6, 5, 5)},
		{"ARP for another address", "spoofed_address", ethernet(gateway, mac, typeARP, join(arp(2, mac, only.port.V4, onlyMAC, from.port.Gateway4), marker))},
		{"ARP with another MAC", "spoofed_mac", ethernet(gateway, mac, typeARP, join(arp(1, onlyMAC, v4, [6]byte{}, from.port.Gateway4), marker))},
		{"ARP for a neighbour", "neighbour_unknown", ethernet([6]byte{255, 255, 255, 255, 255, 255}, mac, typeARP, join(arp(1, mac, v4, [6]byte{}, only.port.V4), marker))},
		{"ND for another address", "spoofed_address", ethernet(gateway, mac, typeIPv6, ipv6(v6, from.port.Gateway6, protoICMPv6, 255, icmpv6(v6, from.port.Gateway6, neighbour)))},
		{"router advertisement", "router_advertisement", ethernet([6]byte{0x33, 0x33, 0, 0, 0, 1}, mac, typeIPv6, ipv6(linkLocal, allNodes, protoICMPv6, 255, icmpv6(linkLocal, allNodes, advertisement)))},
		{"DHCP server", "dhcp_server", frame(mac, v4, to4, 67, 68)},
		{"DHCPv6 server", "dhcp_server", frame(mac, v6, to6, 547, 546)},
		{"frame to a container's MAC", "not_for_gateway", ethernet(onlyMAC, mac, typeIPv4, ipv4(v4, only.port.V4, protoUDP, 64, u(v4, only.port.V4, 5, 5)))},
		{"broadcast", "multicast", ethernet([6]byte{255, 255, 255, 255, 255, 255}, mac, typeIPv4, ipv4(v4, netip.MustParseAddr("255.255.255.255"), protoUDP, 64, u(v4, to4, 5, 5)))},
		{"VLAN tag", "not_ip", ethernet(gateway, mac, typeVLAN, join(be16(7), be16(typeIPv4), v4InSID))},
		{"EtherType", "not_ip", ethernet(gateway, mac, 0x88b5, marker)},
		{"SRv6 from its own address", "srv6_from_container", ethernet(gateway, mac, typeIPv6, ipv6(v6, sid, protoIPv4, 64, v4InSID))},
		{"SRv6 with a routing header", "srv6_from_container", ethernet(gateway, mac, typeIPv6, ipv6(v6, to6, protoSRH, 64, srh(protoIPv4, 0, to6, v4InSID)))},
		{"SRv6 from a node's locator", "srv6_from_container", ethernet(gateway, mac, typeIPv6, ipv6(locator, sid, protoIPv4, 64, v4InSID))},
	}
}

// checkForeignSRv6 sends SRv6 to a node from the underlay, right and wrong.
func checkForeignSRv6(t *testing.T, b *bed, to *container) {
	n := b.nodes[0]
	out := b.wire.sender(t, "n1")
	inside := to.capture(t, "eth0")
	host := n.capture(t, "laceb100")
	src, dst := netip.MustParseAddr("10.40.2.10"), to.port.V4
	packet := func(marker string) []byte {
		return ipv4(src, dst, protoUDP, 60, udp(netip.AddrPortFrom(src, 5), netip.AddrPortFrom(dst, 5), []byte(marker)))
	}
	peer, sid := "5f00:1ace:2:5ce:0:6400::", "5f00:1ace:1:14:0:6400::"
	send := func(source, sid string, next byte, payload []byte) {
		out.send(t, ethernet(n.mac(t, uplink), [6]byte{2, 0, 0, 0, 0, 9}, typeIPv6, ipv6(netip.MustParseAddr(source), netip.MustParseAddr(sid), next, 60, payload)))
	}
	bad := packet("this must not arrive")
	segment := netip.MustParseAddr(sid)
	nobody := udp(netip.AddrPortFrom(src, 5), netip.MustParseAddrPort("10.40.1.99:5"), nil)
	for _, tt := range []struct {
		reason, source, sid string
		next                byte
		payload             []byte
	}{
		{"unknown_source", "2001:db8::9", sid, protoIPv4, bad},
		{"unknown_source", "fd00:a::2", sid, protoIPv4, bad},
		{"unknown_source", "5f00:1ace:7:5ce:0:6400::", sid, protoIPv4, bad},
		{"unknown_source", "5f00:1ace:2:14:0:6400::", sid, protoIPv4, bad},
		{"unknown_function", peer, "5f00:1ace:1:99:0:6400::", protoIPv4, bad},
		{"unknown_network", "5f00:1ace:2:5ce:0:6500::", "5f00:1ace:1:14:0:6500::", protoIPv4, bad},
		{"no_peering", "5f00:1ace:2:5ce:0:c800::", sid, protoIPv4, bad},
		{"sid_tail", peer, "5f00:1ace:1:14:0:6400::1", protoIPv4, bad},
		{"wrong_payload", peer, sid, protoUDP, bad},
		{"malformed", peer, sid, protoIPv6, bad},
		{"malformed", peer, sid, protoIPv4, bad[:19]},
		{"segments_left", peer, sid, protoSRH, srh(protoIPv4, 1, segment, bad)},
		{"malformed", peer, sid, protoIPv4, ipv4(src, dst, protoUDP, 60, nil)},
		{"no_endpoint", peer, sid, protoIPv4, ipv4(src, netip.MustParseAddr("10.40.1.99"), protoUDP, 60, nobody)},
	} {
		before := n.counter(tt.reason)
		send(tt.source, tt.sid, tt.next, tt.payload)
		until(t, fmt.Sprintf("%s → %s is counted as %s", tt.source, tt.sid, tt.reason), func() bool { return n.counter(tt.reason) > before })
	}
	send(peer, sid, protoIPv4, packet("reduced may"))
	send(peer, sid, protoSRH, srh(protoIPv4, 0, segment, packet("srh may")))
	inside.await(t, "a packet of a peer", containing([]byte("reduced may")))
	inside.await(t, "a packet of a peer with a routing header", containing([]byte("srh may")))
	if inside.count(containing([]byte("must not")))+host.count(containing([]byte("must not"))) > 0 {
		t.Error("foreign SRv6 came through")
	}
}
