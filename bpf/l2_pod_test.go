// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

func segmentPodRows() []row {
	var rows []row
	for _, table := range [][]row{segmentGuardRows(), segmentLocalRows(), segmentRemoteRows(), placeRows(), segmentGatewayRows(), segmentSizeRows(), segmentGSORows(), segmentLostRows()} {
		rows = append(rows, table...)
	}
	return as(rows, "pod_l2", podA)
}

var (
	zero4, all4     = netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255")
	ownLL, nearLL   = eui64(sMAC), eui64(nearMAC)
	otherLL         = eui64(otherMAC)
	routerMulticast = netip.MustParseAddr("ff02::2")
)

// segmentGuardRows are what a container may not send, and what only looks so.
func segmentGuardRows() []row {
	drop := func(name string, frame []byte, reason bpf.LaceReason) row {
		return row{name: name, frame: frame, verdict: shot, reason: reason}
	}
	spoofed, malformed := bpf.LaceReasonREASON_SPOOFED_ADDRESS, bpf.LaceReasonREASON_MALFORMED
	behind := func(p ip, kind uint8, rest [7]byte) ip {
		p.body, p.proto = extension(p.proto, rest, p.body), kind
		return p
	}
	options, server := [7]byte{0, 1, 4}, udp(s4, near4, 67, 68, 240)
	advert := icmp(ownLL, allNodes, 134, 0, make([]byte, 12))
	solicit := nd(s6, near6, 135, 0, near6.AsSlice())
	version := udp(s4, near4, 1, 2, 0).bytes()
	version[0] = 0x65
	long4, long6 := udp(s4, near4, 1, 2, 0).bytes(), udp(s6, near6, 1, 2, 0).bytes()
	long4[3]++
	long6[5]++
	rows := []row{
		drop("foreign MAC", ethIP(otherMAC, nearMAC, udp(s4, near4, 1, 2, 0).bytes()), bpf.LaceReasonREASON_SPOOFED_MAC),
		drop("foreign MAC of what is no IP", eth(otherMAC, nearMAC, 0x88b5, make([]byte, 46)), bpf.LaceReasonREASON_SPOOFED_MAC),
		drop("the gateway's MAC", ethIP(otherMAC, plan.GatewayMAC, udp(s4, near4, 1, 2, 0).bytes()), bpf.LaceReasonREASON_SPOOFED_MAC),
		drop("foreign IPv4 address", bridged(nearMAC, udp(near4, s4, 1, 2, 0)), spoofed),
		drop("IPv4 address of another network", bridged(nearMAC, udp(web4, near4, 1, 2, 0)), spoofed),
		drop("foreign IPv4 address to many", bridged(broadcastMAC, udp(near4, all4, 1, 2, 0)), spoofed),
		drop("foreign IPv6 address", bridged(nearMAC, udp(near6, s6, 1, 2, 0)), spoofed),
		drop("foreign IPv6 address to many", bridged(allNodesMAC, udp(near6, allNodes, 1, 2, 0)), spoofed),
		drop("another's link-local address", bridged(nearMAC, udp(nearLL, ownLL, 1, 2, 0)), spoofed),
		drop("a link-local address of no MAC", bridged(nearMAC, udp(netip.MustParseAddr("fe80::1"), nearLL, 1, 2, 0)), spoofed),
		drop("a link-local address behind other bits", bridged(nearMAC, udp(netip.MustParseAddr("fe80:0:0:1:4c:aff:fe32:1a"), nearLL, 1, 2, 0)), spoofed),
		drop("no IPv6 address", bridged(nearMAC, udp(unspecified, near6, 1, 2, 0)), spoofed),
		drop("no IPv4 address", bridged(nearMAC, udp(zero4, near4, 68, 67, 0)), spoofed),
		drop("DHCP client without an address", bridged(broadcastMAC, udp(zero4, all4, 68, 67, 240)), spoofed),
		{name: "DHCP: no IPv4 address to one", dev: podX, program: "pod_l2", frame: bridged(otherMAC, udp(zero4, other4, 68, 67, 0)), verdict: shot, reason: spoofed},
		{name: "DHCP: client without an address", dev: podX, program: "pod_l2", frame: bridged(broadcastMAC, udp(zero4, all4, 68, 67, 240)), verdict: shot, reason: bpf.LaceReasonREASON_FLOOD_OFF},
		{name: "DHCP: server", dev: podX, program: "pod_l2", frame: bridged(otherMAC, udp(s4, other4, 67, 68, 240)), verdict: redirect, reason: bpf.LaceReasonREASON_ENCAPSULATED,
			check: carried(frameSID(2, twin), 0)},
		{name: "DHCP: server, IPv6", dev: podX, program: "pod_l2", frame: bridged(otherMAC, udp(s6, other6, 547, 546, 8)), verdict: redirect, reason: bpf.LaceReasonREASON_ENCAPSULATED,
			check: carried(frameSID(2, twin), 0)},
		drop("DHCP server", bridged(nearMAC, server), bpf.LaceReasonREASON_DHCP_SERVER),
		drop("DHCP server to many", bridged(broadcastMAC, udp(s4, all4, 67, 68, 240)), bpf.LaceReasonREASON_DHCP_SERVER),
		drop("DHCPv6 server", bridged(nearMAC, udp(ownLL, nearLL, 547, 546, 8)), bpf.LaceReasonREASON_DHCP_SERVER),
		drop("DHCPv6 server behind an extension", bridged(nearMAC, behind(udp(s6, near6, 547, 546, 8), extDest, options)), bpf.LaceReasonREASON_DHCP_SERVER),
		drop("router advertisement", bridged(allNodesMAC, advert), bpf.LaceReasonREASON_ROUTER_ADVERTISEMENT),
		drop("router advertisement to one", bridged(nearMAC, icmp(ownLL, nearLL, 134, 0, make([]byte, 12))), bpf.LaceReasonREASON_ROUTER_ADVERTISEMENT),
		drop("router advertisement behind an extension", bridged(allNodesMAC, behind(advert, extHop, options)), bpf.LaceReasonREASON_ROUTER_ADVERTISEMENT),
		drop("router advertisement in a first fragment", bridged(allNodesMAC, behind(advert, extFragment, [7]byte{0, 0, 1})), bpf.LaceReasonREASON_ROUTER_ADVERTISEMENT),
		{name: "DHCP: router advertisement", dev: podX, program: "pod_l2", frame: bridged(allNodesMAC, advert), verdict: shot, reason: bpf.LaceReasonREASON_ROUTER_ADVERTISEMENT},
		drop("solicitation behind an extension", bridged(nearMAC, behind(solicit, extDest, options)), malformed),
		drop("solicitation in a first fragment", bridged(nearMAC, behind(solicit, extFragment, [7]byte{0, 0, 1})), malformed),
		drop("advertisement behind an extension", bridged(allNodesMAC, behind(nd(s6, allNodes, 136, 0x20, s6.AsSlice()), extHop, options)), malformed),
		drop("routing header", bridged(nearMAC, ip{src: s6, dst: near6, proto: extRouting, body: segmentHeader(protoUDP, near6, make([]byte, 8))}), bpf.LaceReasonREASON_SRV6FROM_CONTAINER),
		drop("to a SID", bridged(nearMAC, ip{src: s6, dst: frameSID(2, storage), proto: protoIPIP, body: plainV4(nil)}), bpf.LaceReasonREASON_SRV6FROM_CONTAINER),
		drop("IPv4-mapped destination", bridged(nearMAC, udp(s6, netip.AddrFrom16(near4.As16()), 1, 2, 0)), malformed),
		drop("IPv4 of version 6", eth(nearMAC, sMAC, typeV4, version), malformed),
		drop("IPv4 longer than the frame", ethIP(nearMAC, sMAC, long4), malformed),
		drop("IPv6 longer than the frame", ethIP(nearMAC, sMAC, long6), malformed),
		drop("endless extension headers", bridged(nearMAC, endless(s6, near6)), malformed),
		{name: "unknown port", dev: stranger, program: "pod_l2", frame: bridged(nearMAC, udp(s4, near4, 1, 2, 0)), verdict: shot, reason: bpf.LaceReasonREASON_NO_PORT, network: nobody},
		drop("an answer to nothing", bridged(nearMAC, icmp(s4, near4, 0, 0, make([]byte, 4))), bpf.LaceReasonREASON_NO_FLOW),
		drop("an error about nothing", bridged(nearMAC, complaint(s4, near4, 3, udp(near4, s4, 1, 2, 3).bytes())), bpf.LaceReasonREASON_NO_FLOW),
		drop("a later fragment of nothing", bridged(nearMAC, cut(udp(s4, near4, 1, 2, 64), 77, 8, 40)), bpf.LaceReasonREASON_FRAGMENT_UNKNOWN),
		{name: "only a priority, twice", frame: tagged(bridged(nearMAC, udp(s4, near4, 1, 2, 3)), vlan{typeVLAN, 0}), tag: vlan{typeVLAN, 7 << 13}, verdict: shot, reason: malformed, check: unchecked},
		{name: "only a priority, foreign address", frame: bridged(nearMAC, udp(near4, s4, 1, 2, 0)), tag: vlan{typeVLAN, 7 << 13}, verdict: shot, reason: spoofed},
		{name: "only a priority, of a provider, foreign address", frame: bridged(nearMAC, udp(near4, s4, 1, 2, 0)), tag: vlan{typeQinQ, 0}, verdict: shot, reason: spoofed},
		{name: "only a priority, DHCP server", frame: bridged(nearMAC, server), tag: vlan{typeVLAN, 0}, verdict: shot, reason: bpf.LaceReasonREASON_DHCP_SERVER},
		{name: "tagged, foreign MAC", frame: ethIP(nearMAC, otherMAC, udp(s4, near4, 1, 2, 0).bytes()), tag: vlan{typeVLAN, 5}, verdict: shot, reason: bpf.LaceReasonREASON_SPOOFED_MAC},
	}
	return rows
}

// endless has more extension headers than the programs follow.
func endless(src, dst netip.Addr) ip {
	p := ip{src: src, dst: dst, proto: extHop, body: []byte{extDest, 0}}
	for range 8 {
		p.body = append(p.body, 1, 4, 0, 0, 0, 0, extDest, 0)
	}
	return p
}

const typeQinQ = 0x88a8

// tagged is a frame with a tag in it.
func tagged(frame []byte, tag vlan) []byte {
	out := binary.BigEndian.AppendUint16(bytes.Clone(frame[:12]), tag.proto)
	return append(binary.BigEndian.AppendUint16(out, tag.tci), frame[12:]...)
}

// party is one end of what is bridged.
type party struct {
	mac    plan.MAC
	v4, v6 netip.Addr
}

// partyAt is storage's port of a node.
func partyAt(number, dev int) party {
	v4, v6 := place(number, dev)
	return party{stationMAC(number, dev), v4, v6}
}

// frame is one with an IP packet.
func (p party) frame(to party, packet ip) []byte { return ethIP(to.mac, p.mac, packet.bytes()) }

// frames are those that are carried as they are.
func frames(from, to party) map[string][]byte {
	s4, s6, d4, d6 := from.v4, from.v6, to.v4, to.v6
	bridged := func(p ip) []byte { return from.frame(to, p) }
	of := func(kind uint16, size int) []byte {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(i*11 + 3)
		}
		return eth(to.mac, from.mac, kind, b)
	}
	first := udp(s4, d4, 1000, 2000, 64)
	first.frag = 0x2000
	hop := udp(s6, d6, 1000, 2000, 3)
	hop.body, hop.proto = extension(protoUDP, [7]byte{0, 1, 4}, hop.body), extHop
	optioned := udp(s4, d4, 1000, 2000, 3)
	optioned.options = make([]byte, 40)
	return map[string][]byte{
		"IPv4":                         bridged(udp(s4, d4, 1000, 2000, 33)),
		"IPv4 bare":                    bridged(ip{src: s4, dst: d4, proto: 253}),
		"IPv4 TCP":                     bridged(tcp(s4, d4, 101)),
		"IPv4 echo":                    bridged(icmp(s4, d4, 8, 0, []byte{1, 2, 3, 4})),
		"IPv4 options":                 bridged(optioned),
		"IPv4 first fragment":          bridged(first),
		"IPv4 last hop":                bridged(hops(udp(s4, d4, 1000, 2000, 5), 1)),
		"IPv4 full":                    bridged(udp(s4, d4, 1000, 2000, frameMTU-24-28)),
		"IPv4 padded":                  append(bridged(udp(s4, d4, 1000, 2000, 3)), 0, 0, 0, 0, 0, 0, 0),
		"IPv4 to an address elsewhere": bridged(udp(s4, netip.MustParseAddr("192.0.2.1"), 1000, 2000, 3)),
		"IPv4 to a group by one":       bridged(udp(s4, netip.MustParseAddr("239.1.2.3"), 1000, 2000, 3)),
		"IPv6":                         bridged(udp(s6, d6, 1000, 2000, 33)),
		"IPv6 bare":                    bridged(ip{src: s6, dst: d6, proto: extNone}),
		"IPv6 TCP":                     bridged(tcp(s6, d6, 101)),
		"IPv6 echo":                    bridged(icmp(s6, d6, 128, 0, []byte{1, 2, 3, 4})),
		"IPv6 behind an extension":     bridged(hop),
		"IPv6 last hop":                bridged(hops(udp(s6, d6, 1000, 2000, 5), 1)),
		"IPv6 full":                    bridged(udp(s6, d6, 1000, 2000, frameMTU-24-48)),
		"IPv6 padded":                  append(bridged(udp(s6, d6, 1000, 2000, 3)), 1, 2, 3),
		"IPv6 link-local":              bridged(udp(eui64(from.mac), eui64(to.mac), 1000, 2000, 3)),
		"experimental":                 of(0x88b5, 46),
		"experimental, short":          of(0x88b5, 1),
		"experimental, nothing":        of(0x88b5, 0),
		"experimental, full":           of(0x88b5, frameMTU-24),
		"LLC, a length":                of(38, 38),
		"LLDP":                         of(0x88cc, 50),
		"MPLS":                         of(0x8847, 60),
		"PPPoE":                        of(0x8864, 60),
		"jumbo LLC":                    of(0x8870, 60),
		"type of all ones":             of(0xffff, 46),
		"RARP":                         of(0x8035, 28),
		"tag in the frame":             tagged(bridged(udp(s4, d4, 1000, 2000, 33)), vlan{typeVLAN, 5}),
	}
}

// tags are those that the kernel takes off, and how the frame begins behind them.
var tags = map[string]vlan{"": {}, "VLAN ": {typeVLAN, 5}, "VLAN with priority ": {typeVLAN, 7<<13 | 4094}, "provider VLAN ": {typeQinQ, 100}}

func segmentLocalRows() []row {
	var rows []row
	for to, dev := range map[string]int{"a neighbour": podB, "a machine": machine, "itself": podA} {
		for name, frame := range frames(partyAt(1, podA), partyAt(1, dev)) {
			for tag, of := range tags {
				if to != "a neighbour" && tag != "" {
					continue
				}
				rows = append(rows, row{name: tag + name + " to " + to, frame: frame, tag: of, verdict: redirect, reason: bpf.LaceReasonREASON_LOCAL,
					check: func(t testing.TB, n *node, r result, in []byte) {
						arrived(dev, frame)(t, n, r, in)
						wantFlowsOf(t, n, r, in, of)
					}})
			}
		}
	}
	old := ethIP(stationMAC(1, podE), stationMAC(1, podE), udp(old6, old6, 1, 2, 3).bytes())
	return append(rows,
		row{name: "priority, which goes", frame: bridged(nearMAC, udp(s4, near4, 1, 2, 3)), tag: vlan{typeVLAN, 5 << 13}, verdict: redirect, reason: bpf.LaceReasonREASON_LOCAL,
			check: arrived(podB, bridged(nearMAC, udp(s4, near4, 1, 2, 3)))},
		row{name: "priority, and a tag behind it", frame: tagged(bridged(nearMAC, udp(near4, s4, 1, 2, 3)), vlan{typeVLAN, 9}), tag: vlan{typeVLAN, 5 << 13}, verdict: redirect,
			reason: bpf.LaceReasonREASON_LOCAL, check: arrived(podB, bridged(nearMAC, udp(near4, s4, 1, 2, 3)))},
		row{name: "IPv6 only", dev: podE, program: "pod_l2", frame: old, verdict: redirect, reason: bpf.LaceReasonREASON_LOCAL, check: arrived(podE, old)},
		row{name: "GSO, whole", frame: bridged(nearMAC, tcp(s4, near4, 3000)), gso: frameMTU - 40, verdict: redirect, reason: bpf.LaceReasonREASON_LOCAL,
			check: arrived(podB, bridged(nearMAC, tcp(s4, near4, 3000)))})
}

// wantFlowsOf wants both entries of the flow of an IP packet, and none of anything else.
func wantFlowsOf(t testing.TB, n *node, r result, in []byte, tag vlan) {
	t.Helper()
	kind := binary.BigEndian.Uint16(in[12:])
	flows := n.flows()
	if opaque := tag != (vlan{}) || kind != typeV4 && kind != typeV6; opaque {
		if len(flows) != 0 || r.ctx.Opaque != 1 {
			t.Errorf("what belongs to no flow has %d entries (opaque %d)", len(flows), r.ctx.Opaque)
		}
		return
	}
	if len(flows) == 0 {
		t.Error("there is no flow")
	}
	for k, f := range flows {
		if f.Flags&uint16(bpf.LaceFlowFlagsFLOW_BRIDGED) == 0 || f.Line != storageLine || k.Network != uint32(storage) || f.Network != uint32(storage) {
			t.Errorf("entry %s: %+v", keyText(k), f)
		}
	}
}

func segmentRemoteRows() []row {
	var rows []row
	for form, srh := range map[string]bool{"": false, "SRH ": true} {
		for name, frame := range frames(partyAt(1, podA), partyAt(2, podA)) {
			for tag, of := range tags {
				rows = append(rows, row{name: form + tag + name + " to another node", opts: options{srh: srh}, frame: frame, tag: of, verdict: redirect, reason: bpf.LaceReasonREASON_ENCAPSULATED,
					check: func(t testing.TB, n *node, r result, in []byte) {
						wantFlowsOf(t, n, r, in, of)
						if of != (vlan{}) {
							in = tagged(in, of)
						}
						carried(frameSID(2, storage), 0)(t, n, r, in)
					}})
			}
		}
	}
	for name, p := range map[string]ip{"IPv4": udp(s4, other4, 1, 2, 9), "IPv6": udp(s6, other6, 1, 2, 9)} {
		frame := bridged(otherMAC, classed(p, 0xb8|2))
		rows = append(rows,
			row{name: "class, " + name, frame: frame, verdict: redirect, reason: bpf.LaceReasonREASON_ENCAPSULATED, check: carried(frameSID(2, storage), 0xba)},
			row{name: "class behind a tag, " + name, frame: frame, tag: vlan{typeVLAN, 5}, verdict: redirect, reason: bpf.LaceReasonREASON_ENCAPSULATED,
				check: func(t testing.TB, n *node, r result, in []byte) {
					carried(frameSID(2, storage), 0xba)(t, n, r, tagged(in, vlan{typeVLAN, 5}))
				}},
			row{name: "priority, which goes, " + name, frame: frame, tag: vlan{typeVLAN, 5 << 13}, verdict: redirect, reason: bpf.LaceReasonREASON_ENCAPSULATED, check: carried(frameSID(2, storage), 0xba)})
	}
	return rows
}

// placeRows are about who has a MAC address.
func placeRows() []row {
	p := udp(s4, other4, 1, 2, 9)
	encapsulated := bpf.LaceReasonREASON_ENCAPSULATED
	to := func(name string, dst plan.MAC, sid netip.Addr, prepare func(n *node)) row {
		return row{name: name, prepare: prepare, frame: bridged(dst, p), verdict: redirect, reason: encapsulated, check: carried(sid, 0)}
	}
	nobodys := func(name string, dst plan.MAC, prepare func(n *node)) row {
		return row{name: name, prepare: prepare, frame: bridged(dst, p), verdict: shot, reason: bpf.LaceReasonREASON_UNKNOWN_MAC}
	}
	atRouter := bpf.LaceStation{Peer: router}
	atRouter.Sid.U8 = routerSID.As16()
	atNobody := bpf.LaceStation{Peer: 9}
	atNobody.Sid.U8 = frameSID(9, storage).As16()
	far := ethIP(stationMAC(2, podE), stationMAC(1, podE), udp(old6, oldFar6, 1, 2, 3).bytes())
	odd := ethIP(otherMAC, stationMAC(1, podE), udp(old6, oldFar6, 1, 2, 3).bytes())
	return []row{
		to("declared at another node", awayMAC, frameSID(2, storage), nil),
		to("declared at a router", foreignMAC, routerSID, nil),
		to("derived, of another node's endpoint", derived(away4), frameSID(2, storage), nil),
		to("derived, of a router's endpoint", derived(foreign4), routerSID, nil),
		to("derived, but declared elsewhere", otherMAC, routerSID, func(n *node) { stationRow(n, otherMAC, atRouter) }),
		to("derived, but learned elsewhere", otherMAC, frameSID(2, storage), sight(otherMAC, router)),
		to("declared, but learned elsewhere", awayMAC, frameSID(2, storage), sight(awayMAC, router)),
		to("learned", unknownMAC, frameSID(2, storage), sight(unknownMAC, 2)),
		to("learned at a router", unknownMAC, routerSID, sight(unknownMAC, router)),
		to("derived of no pool, learned", derived(netip.MustParseAddr("10.50.0.99")), frameSID(2, storage), sight(derived(netip.MustParseAddr("10.50.0.99")), 2)),
		nobodys("unknown", unknownMAC, nil),
		nobodys("zero", plan.MAC{}, nil),
		nobodys("derived of no pool", derived(netip.MustParseAddr("10.50.0.99")), nil),
		nobodys("derived of another network", derived(web4), nil),
		nobodys("derived of an absent container here", derived(netip.MustParseAddr("10.50.0.30")), nil),
		nobodys("derived of an absent container here, learned", derived(netip.MustParseAddr("10.50.0.30")), sight(derived(netip.MustParseAddr("10.50.0.30")), 2)),
		nobodys("learned at a node that is gone", unknownMAC, sight(unknownMAC, 9)),
		nobodys("declared at a node that is gone", unknownMAC, func(n *node) { stationRow(n, unknownMAC, atNobody) }),
		{name: "unknown, tagged", frame: bridged(unknownMAC, p), tag: vlan{typeVLAN, 5}, verdict: shot, reason: bpf.LaceReasonREASON_UNKNOWN_MAC},
		{name: "unknown, no IP", frame: eth(unknownMAC, sMAC, 0x88b5, make([]byte, 46)), verdict: shot, reason: bpf.LaceReasonREASON_UNKNOWN_MAC},
		{name: "gateway's where there is none", dev: podX, program: "pod_l2", frame: bridged(plan.GatewayMAC, p), verdict: shot, reason: bpf.LaceReasonREASON_UNKNOWN_MAC},
		{name: "gateway's, no IP", frame: eth(plan.GatewayMAC, sMAC, 0x88b5, make([]byte, 46)), verdict: shot, reason: bpf.LaceReasonREASON_UNKNOWN_MAC},
		{name: "of a network with the same addresses", dev: podX, program: "pod_l2", frame: bridged(otherMAC, p), verdict: redirect, reason: encapsulated, check: carried(frameSID(2, twin), 0)},
		{name: "derived from IPv6", dev: podE, program: "pod_l2", frame: far, verdict: redirect, reason: encapsulated, check: carried(frameSID(2, legacy), 0)},
		{name: "derived from IPv4 where there is none", dev: podE, program: "pod_l2", frame: odd, verdict: shot, reason: bpf.LaceReasonREASON_UNKNOWN_MAC},
	}
}

// routedTo wants a packet, one hop later, at a container from the gateway.
func routedTo(dev int, p ip) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, n *node, r result, _ []byte) {
		t.Helper()
		if r.ctx.Ifindex != uint32(n.bed.index[dev]) || r.ctx.Bridged != 0 {
			t.Errorf("delivered to interface %d (bridged %d), want %d", r.ctx.Ifindex, r.ctx.Bridged, n.bed.index[dev])
		}
		wantFrame(t, r.out, ethIP(stationMAC(1, dev), plan.GatewayMAC, afterHop(p)))
	}
}

// routedAway wants a packet, one hop later, on its way to node 2.
func routedAway(to topology.NetworkID, p ip) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, n *node, r result, _ []byte) {
		t.Helper()
		next := uint8(protoV6)
		if p.src.Is4() {
			next = protoIPIP
		}
		o := ip{src: n.locator().Source(storage, 0), dst: locatorOf(2, 48).SID(topology.EndDT46, to).Addr, proto: next, body: afterHop(p),
			label: binary.BigEndian.Uint32(r.out[14:]) & 0xfffff}
		wantFrame(t, r.out, ethIP(nexthopDst, nexthopSrc, o.bytes()))
	}
}

// segmentGatewayRows are what is sent to the gateway's MAC address.
func segmentGatewayRows() []row {
	var rows []row
	local, away, answer := bpf.LaceReasonREASON_LOCAL, bpf.LaceReasonREASON_ENCAPSULATED, bpf.LaceReasonREASON_GATEWAY_ANSWERED
	for version, c := range map[string]struct{ own, web, webFar, near, other, gw, nowhere netip.Addr }{
		"IPv4": {s4, web4, v4Of(2, podA), near4, other4, lgw4, netip.MustParseAddr("192.0.2.1")},
		"IPv6": {s6, web6, v6Of(2, podA), near6, other6, lgw6, netip.MustParseAddr("2001:db8::1")},
	} {
		echo, reply := uint8(8), uint8(0)
		prohibited, code, expired := uint8(3), uint8(13), uint8(11)
		if c.own.Is6() {
			echo, reply, prohibited, code, expired = 128, 129, 1, 1, 3
		}
		ping := icmp(c.own, c.gw, echo, 0, []byte{1, 2, 3, 4, 5})
		pong := icmp(c.gw, c.own, reply, 0, []byte{1, 2, 3, 4, 5})
		pings := func(t testing.TB, _ *node, r result, _ []byte) {
			wantFrame(t, r.out, ethIP(sMAC, plan.GatewayMAC, pong.bytes()))
		}
		nowhere, dying := udp(c.own, c.nowhere, 1, 2, 3), hops(udp(c.own, c.web, 1, 2, 3), 1)
		for name, r := range map[string]row{
			"to an L3 network":                     {frame: bridged(plan.GatewayMAC, udp(c.own, c.web, 1, 2, 3)), reason: local, check: routedTo(podD, udp(c.own, c.web, 1, 2, 3))},
			"to an L3 network at another node":     {frame: bridged(plan.GatewayMAC, udp(c.own, c.webFar, 1, 2, 3)), reason: away, check: routedAway(backend, udp(c.own, c.webFar, 1, 2, 3))},
			"to a neighbour by the gateway":        {frame: bridged(plan.GatewayMAC, udp(c.own, c.near, 1, 2, 3)), reason: local, check: routedTo(podB, udp(c.own, c.near, 1, 2, 3))},
			"to another node by the gateway":       {frame: bridged(plan.GatewayMAC, udp(c.own, c.other, 1, 2, 3)), reason: away, check: routedAway(storage, udp(c.own, c.other, 1, 2, 3))},
			"priority, to an L3 network":           {frame: bridged(plan.GatewayMAC, udp(c.own, c.web, 1, 2, 3)), tag: vlan{typeVLAN, 5 << 13}, reason: local, check: routedTo(podD, udp(c.own, c.web, 1, 2, 3))},
			"echo to the gateway":                  {frame: bridged(plan.GatewayMAC, ping), reason: answer, check: pings},
			"echo to the gateway, though VRFs are": {opts: options{vrf: true}, frame: bridged(plan.GatewayMAC, ping), reason: answer, check: pings},
			"no route": {frame: bridged(plan.GatewayMAC, nowhere), reason: bpf.LaceReasonREASON_NO_ROUTE, check: func(t testing.TB, _ *node, r result, _ []byte) {
				wantFrame(t, r.out, errorFrom(c.gw, sMAC, plan.GatewayMAC, nowhere.bytes(), prohibited, code, 0))
			}},
			"out of hops": {frame: bridged(plan.GatewayMAC, dying), reason: bpf.LaceReasonREASON_HOP_LIMIT, check: func(t testing.TB, _ *node, r result, _ []byte) {
				wantFrame(t, r.out, errorFrom(c.gw, sMAC, plan.GatewayMAC, dying.bytes(), expired, 0, 0))
			}},
		} {
			r.name, r.verdict = name+", "+version, redirect
			rows = append(rows, r)
		}
		rows = append(rows,
			row{name: "to the gateway, which takes nothing else, " + version, frame: bridged(plan.GatewayMAC, udp(c.own, c.gw, 1, 53, 3)), verdict: shot, reason: bpf.LaceReasonREASON_GATEWAY_CLOSED},
			row{name: "to the gateway's address at another MAC, " + version, frame: bridged(nearMAC, udp(c.own, c.gw, 1, 53, 3)), verdict: redirect, reason: local, check: arrived(podB, bridged(nearMAC, udp(c.own, c.gw, 1, 53, 3)))})
	}
	return append(rows, row{name: "link-local by the gateway", frame: bridged(plan.GatewayMAC, udp(ownLL, web6, 1, 2, 3)), verdict: shot, reason: bpf.LaceReasonREASON_SPOOFED_ADDRESS})
}

// complained wants the ICMP error about a frame that was to be bridged: from whom it was for.
func complained(dst plan.MAC, from netip.Addr, kind, code uint8, mtu uint32) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, _ *node, r result, in []byte) {
		t.Helper()
		wantFrame(t, r.out, errorFrom(from, sMAC, dst, in[14:], kind, code, mtu))
		goodChecksums(t, r.out)
	}
}

func segmentSizeRows() []row {
	big := bpf.LaceReasonREASON_TOO_BIG
	large := func(mac plan.MAC, size int) []byte { return eth(mac, sMAC, 0x88b5, make([]byte, size)) }
	tight := func(n *node) { n.nexthops(nexthop{known: true, mtu: 1400}) }
	rows := []row{
		{name: "too big, no IP", frame: large(otherMAC, frameMTU+1), verdict: shot, reason: big},
		{name: "fills the frame, no IP", frame: large(otherMAC, frameMTU), verdict: redirect, reason: bpf.LaceReasonREASON_ENCAPSULATED, check: carried(frameSID(2, storage), 0)},
		{name: "too big for a neighbour, no IP", frame: large(nearMAC, frameMTU+1), verdict: shot, reason: big},
		{name: "too big, tagged, no IP", frame: large(otherMAC, frameMTU+1), tag: vlan{typeVLAN, 5}, verdict: shot, reason: big},
		{name: "too big, a tag in it", frame: tagged(bridged(otherMAC, udp(s4, other4, 1, 2, frameMTU-28)), vlan{typeVLAN, 5}), verdict: shot, reason: big},
		{name: "too big by padding", frame: append(bridged(otherMAC, udp(s4, other4, 1, 2, frameMTU-28)), 0), verdict: redirect, reason: big, check: complained(otherMAC, other4, 3, 4, frameMTU)},
	}
	for version, c := range map[string]struct {
		own, near, other netip.Addr
		header           int
		kind, code       uint8
	}{"IPv4": {s4, near4, other4, 28, 3, 4}, "IPv6": {s6, near6, other6, 48, 2, 0}} {
		sized := func(mac plan.MAC, dst netip.Addr, size int) []byte {
			return bridged(mac, udp(c.own, dst, 1, 2, size-c.header))
		}
		for name, r := range map[string]row{
			"too big":                          {frame: sized(otherMAC, c.other, frameMTU+1), check: complained(otherMAC, c.other, c.kind, c.code, frameMTU)},
			"too big with SRH":                 {opts: options{srh: true}, frame: sized(otherMAC, c.other, frameMTU-23), check: complained(otherMAC, c.other, c.kind, c.code, frameMTU-24)},
			"too big for a small uplink":       {prepare: tight, frame: sized(otherMAC, c.other, 1400-57), check: complained(otherMAC, c.other, c.kind, c.code, 1400-58)},
			"too big for a neighbour":          {frame: sized(nearMAC, c.near, frameMTU+1), check: complained(nearMAC, c.near, c.kind, c.code, frameMTU)},
			"too big for a neighbour, tagged":  {tag: vlan{typeVLAN, 5}, frame: sized(nearMAC, c.near, frameMTU+1), check: complained(nearMAC, c.near, c.kind, c.code, frameMTU)},
			"too big, tagged":                  {tag: vlan{typeVLAN, 5}, frame: sized(otherMAC, c.other, frameMTU+1), check: complained(otherMAC, c.other, c.kind, c.code, frameMTU-4)},
			"too big by the gateway":           {frame: sized(plan.GatewayMAC, c.other, linkMTU-39), check: complained(plan.GatewayMAC, map[bool]netip.Addr{true: lgw6, false: lgw4}[c.own.Is6()], c.kind, c.code, linkMTU-40)},
			"segments too big":                 {gso: uint32(frameMTU - c.header - 11), frame: bridged(otherMAC, tcp(c.own, c.other, 3000)), check: complained(otherMAC, c.other, c.kind, c.code, frameMTU)},
			"segments too big for a neighbour": {gso: uint32(frameMTU - c.header - 11), frame: bridged(nearMAC, tcp(c.own, c.near, 3000)), check: complained(nearMAC, c.near, c.kind, c.code, frameMTU)},
			"segments too big, tagged": {gso: uint32(frameMTU - c.header - 12 - 3), tag: vlan{typeVLAN, 5}, frame: bridged(otherMAC, tcp(c.own, c.other, 3000)),
				check: complained(otherMAC, c.other, c.kind, c.code, frameMTU-4)},
		} {
			r.name, r.verdict, r.reason = name+", "+version, redirect, big
			rows = append(rows, r)
		}
	}
	return rows
}

// throughCutter wants a frame on its way to the segmenter, unchanged, with the port that it came in by.
func throughCutter(t testing.TB, n *node, r result, in []byte) {
	t.Helper()
	if r.mark != uint32(n.bed.index[podA]) {
		t.Errorf("mark %#x, want that of port %d", r.mark, n.bed.index[podA])
	}
	wantFrame(t, r.out, in)
}

// segmentGSORows are what is yet to be segmented. BPF_PROG_TEST_RUN gives a size and no type of segmentation, and the kernel refuses
// to grow that: how it goes behind a GRE header is shown by TestSegmentsOnTheWire.
func segmentGSORows() []row {
	toOther, toRouter := bridged(otherMAC, tcp(s4, other4, 3000)), bridged(foreignMAC, tcp(s6, foreign6, 3000))
	odd := eth(otherMAC, sMAC, 0x88b5, make([]byte, 1400))
	none := func(n *node) {
		without := *n.bed
		without.index[cutter] = 0
		n.bed = &without
		n.sync(n.plan)
	}
	return []row{
		{name: "segment: GSO", opts: options{cut: true}, frame: toOther, gso: 1000, verdict: redirect, check: throughCutter},
		{name: "segment: GSO to a router", opts: options{cut: true}, frame: toRouter, gso: 1000, verdict: redirect, check: throughCutter},
		{name: "segment: GSO of a known flow", opts: options{cut: true}, before: []input{{program: "pod_l2", dev: podA, frame: bridged(otherMAC, tcp(s4, other4, 9))}}, frame: toOther, gso: 1000,
			verdict: redirect, check: throughCutter},
		{name: "segment: GSO, tagged", opts: options{cut: true}, frame: toOther, tag: vlan{typeVLAN, 5}, gso: 1000, verdict: redirect, check: throughCutter},
		{name: "shim: GSO to a router", frame: toRouter, gso: 1000, verdict: redirect, check: throughCutter},
		{name: "shim: GSO to a router, known flow", before: []input{{program: "pod_l2", dev: podA, frame: bridged(foreignMAC, tcp(s6, foreign6, 9))}}, frame: toRouter, gso: 1000, verdict: redirect,
			check: throughCutter},
		{name: "shim: GSO without a type", frame: toOther, gso: 1000, verdict: shot, reason: bpf.LaceReasonREASON_ENCAP_FAILED, check: unchecked},
		{name: "GSO of no IP", frame: odd, gso: 1000, verdict: shot, reason: bpf.LaceReasonREASON_GSO_FRAME},
		{name: "GSO for many", frame: bridged(broadcastMAC, udp(s4, all4, 1, 2, 3000)), gso: 1000, verdict: redirect, check: throughCutter},
		{name: "no segmenter: GSO to a router", prepare: none, frame: toRouter, gso: 1000, verdict: shot, reason: bpf.LaceReasonREASON_GSO_FRAME},
		{name: "no segmenter: GSO for many", prepare: none, frame: bridged(broadcastMAC, udp(s4, all4, 1, 2, 3000)), gso: 1000, verdict: shot, reason: bpf.LaceReasonREASON_GSO_FRAME},
	}
}

// segmentLostRows are what fails on the way out, and what an incomplete data plane does.
func segmentLostRows() []row {
	frame := bridged(otherMAC, udp(s4, other4, 1, 2, 9))
	odd := eth(otherMAC, sMAC, 0x88b5, make([]byte, 46))
	stale := func(n *node) { n.nexthops(nexthop{}) }
	raw := func(n *node) { n.nexthops(nexthop{raw: true}) }
	blind := func(h nexthop) func(n *node) {
		return func(n *node) {
			segmentGSORows()[9].prepare(n)
			n.nexthops(h)
		}
	}
	// What is no IP goes through the segmenter, already behind its outer header.
	looked := func(t testing.TB, n *node, r result, in []byte) {
		t.Helper()
		if want := uint32(1<<31 | n.generation()&1*4097 + 2); r.mark != want {
			t.Errorf("mark %#x, want %#x", r.mark, want)
		}
		wantFrame(t, r.out[14:], n.behind(frameSID(2, storage), storage, 0, in, r.out)[14:])
	}
	away := bpf.LaceReasonREASON_ENCAPSULATED
	rows := []row{
		{name: "no way to the peer", prepare: func(n *node) { n.nexthops(nexthop{none: true}) }, frame: frame, verdict: shot, reason: bpf.LaceReasonREASON_NO_NEXTHOP},
		{name: "no IP, unknown nexthop", prepare: stale, frame: odd, verdict: redirect, reason: away, check: looked},
		{name: "no IP, uplink without Ethernet", prepare: raw, frame: odd, verdict: redirect, reason: away, check: looked},
		{name: "no IP, unknown nexthop, no segmenter", prepare: blind(nexthop{}), frame: odd, verdict: shot, reason: away, also: []bpf.LaceReason{bpf.LaceReasonREASON_NO_NEXTHOP}, check: unchecked},
		{name: "stale network", prepare: func(n *node) { n.delete(storage) }, frame: frame, verdict: shot, reason: bpf.LaceReasonREASON_NO_NETWORK},
		{name: "stale network, for many", prepare: func(n *node) { n.delete(storage) }, frame: bridged(broadcastMAC, udp(s4, all4, 1, 2, 9)), verdict: shot, reason: bpf.LaceReasonREASON_NO_NETWORK},
		{name: "stale network, ARP", prepare: func(n *node) { n.delete(storage) }, frame: eth(broadcastMAC, sMAC, typeARP, arp(1, sMAC, s4, plan.MAC{}, near4)), verdict: shot, reason: bpf.LaceReasonREASON_NO_NETWORK},
	}
	for name, f := range map[string][]byte{"bridge": frame, "neighbour": eth(broadcastMAC, sMAC, typeARP, arp(1, sMAC, s4, plan.MAC{}, near4)), "flood": bridged(broadcastMAC, udp(s4, all4, 1, 2, 9))} {
		rows = append(rows, row{name: "no stage: " + name, prepare: emptyStages, frame: f, verdict: shot, reason: bpf.LaceReasonREASON_STAGE_MISSING})
	}
	return rows
}

// delete takes a network out of the tables while its containers are still there.
func (n *node) delete(id topology.NetworkID) {
	n.t.Helper()
	must(n.t, n.maps.Networks.Delete(uint32(id)|n.generation()&1<<31))
}

// TestSegmentPod has, in the emulated machines, TestSegmentWire and TestFlood in its place: the kernel encapsulates there.
func TestSegmentPod(t *testing.T) {
	decidedByNoKernel(t)
	runRows(t, segmentPodRows())
}
