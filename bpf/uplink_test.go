// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

var uplinkMAC = plan.MAC{2, 0, 0, 0, 0xee, uplink} // as makeDevices gives it

// fromUnderlay is a frame as node 1's uplink gets it.
func fromUnderlay(p ip) []byte { return ethIP(uplinkMAC, nexthopSrc, p.bytes()) }

// overlay is a packet of network 100 from node 2 to node 1 around an inner one.
func overlay(inner ip) ip {
	next := uint8(protoV6)
	if inner.src.Is4() {
		next = protoIPIP
	}
	return ip{src: locatorOf(2, 48).Source(backend, 0), dst: sidOf(backend), proto: next, body: inner.bytes(), label: 7}
}

func sidOf(id topology.NetworkID) netip.Addr { return locatorOf(1, 48).SID(topology.EndDT46, id).Addr }

// withSegment is the packet with a segment routing header, changed by edit.
func withSegment(p ip, edit func(header []byte)) ip {
	p.body = segmentHeader(p.proto, p.dst, p.body)
	p.proto = extRouting
	edit(p.body)
	return p
}

// in4, in6 are packets from node 2 to podA.
var in4, in6 = udp(far4, a4, 1, 2, 30), udp(far6, a6, 1, 2, 30)

func uplinkRows() []row {
	rows := passRows()
	rows = append(rows, takenRows()...)
	rows = append(rows, sidRows()...)
	rows = append(rows, innerRows()...)
	for i := range rows {
		rows[i].program, rows[i].dev = "uplink", uplink
	}
	return rows
}

// passRows are not for the locator: the stack gets them as they are.
func passRows() []row {
	otherHost := fromUnderlay(overlay(in4))
	copy(otherHost, nexthopDst[:])
	group := fromUnderlay(overlay(in4))
	copy(group, allNodesMAC[:])
	tagged := fromUnderlay(overlay(in4))
	tagged = append(tagged[:12:12], append([]byte{0x81, 0, 0, 5}, tagged[12:]...)...)
	elsewhere := overlay(in4)
	elsewhere.dst = netip.MustParseAddr("5f00:1ace:2:14::")
	rows := []row{}
	for name, frame := range map[string][]byte{
		"IPv4":            ethIP(uplinkMAC, nexthopSrc, in4.bytes()),
		"ARP":             eth(uplinkMAC, nexthopSrc, typeARP, arp(1, nexthopSrc, far4, plan.MAC{}, a4)),
		"IPv6 elsewhere":  fromUnderlay(in6),
		"another locator": fromUnderlay(elsewhere),
		"overheard":       otherHost,
		"multicast frame": group,
		"VLAN tag":        tagged,
	} {
		rows = append(rows, row{name: "pass " + name, frame: frame, verdict: pass})
	}
	noLocator := func(n *node) {
		p := *n.plan
		p.Locator = topology.Locator{Prefix: netip.MustParsePrefix("::/0")}
		n.sync(&p)
	}
	return append(rows, row{name: "pass without a locator", prepare: noLocator, frame: fromUnderlay(overlay(in4)), verdict: pass})
}

// takenRows are delivered: what else than TestLife shows.
func takenRows() []row {
	foreign := overlay(in4)
	foreign.src = netip.MustParseAddr("5f00:1ace:3:1:2:3:4:5") // the router's, any address of its locator
	zero := func([]byte) {}
	rows := []row{}
	for name, p := range map[string]ip{
		"from a router":              foreign,
		"from a router, with SRH":    withSegment(foreign, zero),
		"with SRH":                   withSegment(overlay(in6), zero),
		"with flags and tag in SRH":  withSegment(overlay(in6), func(h []byte) { h[5], h[6], h[7] = 0xff, 1, 2 }),
		"with a policy segment":      func() ip { p := overlay(in6); p.src = locatorOf(2, 48).Source(backend, 0x1234567); return p }(),
		"with a hop limit of 1":      hops(overlay(in4), 1),
		"with a class and congested": func() ip { p := overlay(classed(in4, 2)); p.class = 0xb8; return p }(),
	} {
		for _, changeProto := range []bool{false, true} {
			rows = append(rows, row{name: fmt.Sprintf("taken %s, change_proto=%v", name, changeProto), opts: options{changeProto: changeProto},
				frame: fromUnderlay(p), verdict: redirect, reason: bpf.LaceReasonREASON_DECAPSULATED,
				check: func(t testing.TB, n *node, r result, _ []byte) {
					inner := p.body
					if p.proto == extRouting {
						inner = inner[24:]
					}
					wantDelivered(t, n, r, podA, inner)
				}})
		}
	}
	return rows
}

func classed(p ip, class uint8) ip { p.class = class; return p }

// sidRows are refused for the outer packet.
func sidRows() []row {
	outer := func(edit func(p *ip)) []byte {
		p := overlay(in4)
		edit(&p)
		return fromUnderlay(p)
	}
	segment := func(edit func(h []byte)) []byte { return fromUnderlay(withSegment(overlay(in4), edit)) }
	src := func(s string) []byte { return outer(func(p *ip) { p.src = netip.MustParseAddr(s) }) }
	dst := func(s string) []byte { return outer(func(p *ip) { p.dst = netip.MustParseAddr(s) }) }
	next := func(proto uint8) []byte { return outer(func(p *ip) { p.proto = proto }) }
	rows := []row{}
	for reason, frames := range map[bpf.LaceReason]map[string][]byte{
		bpf.LaceReasonREASON_UNKNOWN_SOURCE: {
			"no node of the topology":   src("5f00:1ace:9:5ce:0:6400::"),
			"outside of the block":      src("2001:db8::1"),
			"this node itself":          src("5f00:1ace:1:5ce:0:6400::"),
			"a node without the marker": src("5f00:1ace:2:14:0:6400::"),
			"the unspecified address":   src("::"),
		},
		bpf.LaceReasonREASON_UNKNOWN_FUNCTION: {
			"End.DT4":               dst("5f00:1ace:1:13:0:6400::"),
			"End.DX2":               dst("5f00:1ace:1:15:0:6400::"),
			"the source marker":     dst("5f00:1ace:1:5ce:0:6400::"),
			"the locator itself":    dst("5f00:1ace:1::"),
			"TCP to the locator":    outer(func(p *ip) { p.dst, p.proto = netip.MustParseAddr("5f00:1ace:1::1"), protoTCP }),
			"in another byte order": dst("5f00:1ace:1:1400:0:6400::"),
		},
		bpf.LaceReasonREASON_SID_TAIL: {
			"first bit": dst("5f00:1ace:1:14:0:6480::"),
			"last bit":  dst("5f00:1ace:1:14:0:6400::1"),
			"middle":    dst("5f00:1ace:1:14:0:6400:100::"),
		},
		bpf.LaceReasonREASON_NO_PEERING: {
			"another network":            src("5f00:1ace:2:5ce:0:c800::"),
			"SID of another network":     outer(func(p *ip) { p.dst = sidOf(overlap) }),
			"router of another network":  outer(func(p *ip) { p.src, p.dst = netip.MustParseAddr("5f00:1ace:3::1"), sidOf(overlap) }),
			"router says it is a member": outer(func(p *ip) { p.src, p.dst = locatorOf(router, 48).Source(overlap, 0), sidOf(overlap) }),
			"network 0":                  src("5f00:1ace:2:5ce::"),
		},
		bpf.LaceReasonREASON_UNKNOWN_NETWORK: {
			"not on this node": outer(func(p *ip) { p.src, p.dst = locatorOf(2, 48).Source(elsewhere, 0), sidOf(elsewhere) }),
			"number 0":         outer(func(p *ip) { p.src, p.dst = locatorOf(2, 48).Source(0, 0), sidOf(0) }),
			"largest number": outer(func(p *ip) {
				p.src, p.dst = locatorOf(2, 48).Source(topology.FirstReserved, 0), sidOf(topology.FirstReserved)
			}),
		},
		bpf.LaceReasonREASON_WRONG_PAYLOAD: {
			"IPv4 to End.DT2U": dst("5f00:1ace:1:17:0:6400::"), "IPv4 to End.DT2M": dst("5f00:1ace:1:18:0:6400::"),
			"Ethernet": next(extL2), "UDP": next(protoUDP), "GRE": next(47), "nothing": next(extNone),
			"a fragment":        outer(func(p *ip) { p.body, p.proto = extension(protoIPIP, [7]byte{}, p.body), extFragment }),
			"a hop-by-hop":      outer(func(p *ip) { p.body, p.proto = extension(protoIPIP, [7]byte{0, 1, 4}, p.body), extHop }),
			"two routing heads": outer(func(p *ip) { *p = withSegment(withSegment(*p, func([]byte) {}), func([]byte) {}) }),
			"Ethernet in SRH":   segment(func(h []byte) { h[0] = extL2 }),
		},
		bpf.LaceReasonREASON_SEGMENTS_LEFT: {
			"one": segment(func(h []byte) { h[3] = 1 }), "most": segment(func(h []byte) { h[3] = 255 }),
		},
		bpf.LaceReasonREASON_ROUTING_HEADER: {
			"source route (type 0)": segment(func(h []byte) { h[2] = 0 }),
			"without a segment":     segment(func(h []byte) { h[1] = 0 }),
			"two segments":          segment(func(h []byte) { h[1] = 4 }),
			"longest":               segment(func(h []byte) { h[1] = 255 }),
		},
		bpf.LaceReasonREASON_UNDERLAY_ICMP: {
			"echo to a SID":         fromUnderlay(icmp(locatorOf(2, 48).Source(backend, 0), sidOf(backend), 128, 0, make([]byte, 4))),
			"too big from a router": fromUnderlay(icmp(netip.MustParseAddr("fd00::1"), sidOf(backend), 2, 0, make([]byte, 60))),
		},
	} {
		for name, frame := range frames {
			rows = append(rows, row{name: maps.ReasonName(reason) + ": " + name, frame: frame, verdict: shot, reason: reason, network: claimed(reason, name)})
		}
	}
	return rows
}

// claimed is the network that a row of sidRows is counted for: what a node says of itself, and no one else.
func claimed(reason bpf.LaceReason, name string) int {
	switch reason {
	case bpf.LaceReasonREASON_UNKNOWN_SOURCE, bpf.LaceReasonREASON_SEGMENTS_LEFT, bpf.LaceReasonREASON_ROUTING_HEADER, bpf.LaceReasonREASON_UNDERLAY_ICMP:
		return nobody
	}
	return map[string]int{
		"another network": int(overlap), "router says it is a member": int(overlap), "network 0": nobody,
		"not on this node": int(elsewhere), "number 0": nobody, "largest number": int(topology.FirstReserved),
	}[name]
}

// innerRows are refused for the packet inside.
func innerRows() []row {
	inner := func(next uint8, edit func(b []byte) []byte) []byte {
		p := overlay(in4)
		if next == protoV6 {
			p = overlay(in6)
		}
		p.body = edit(p.body)
		return fromUnderlay(p)
	}
	set := func(at int, v byte) func(b []byte) []byte { return func(b []byte) []byte { b[at] = v; return b } }
	mapped := udp(far6, netip.AddrFrom16(a4.As16()), 1, 2, 3)
	rows := []row{}
	for name, frame := range map[string][]byte{
		"IPv6 in next header 4":      inner(protoIPIP, func([]byte) []byte { return in6.bytes() }),
		"IPv4 in next header 41":     inner(protoV6, func([]byte) []byte { return append(in4.bytes(), make([]byte, 20)...) }),
		"header below 20 bytes":      inner(protoIPIP, set(0, 0x44)),
		"IPv4 longer than the frame": inner(protoIPIP, set(2, 1)),
		"IPv4 shorter than itself":   inner(protoIPIP, set(3, 19)),
		"IPv6 longer than the frame": inner(protoV6, set(4, 1)),
		"nothing":                    inner(protoIPIP, func([]byte) []byte { return nil }),
		"nothing, IPv6":              inner(protoV6, func([]byte) []byte { return nil }),
		"IPv4-mapped destination":    fromUnderlay(overlay(mapped)),
	} {
		rows = append(rows, row{name: "inner " + name, frame: frame, verdict: shot, reason: bpf.LaceReasonREASON_MALFORMED})
	}
	for name, p := range map[string]ip{
		"IPv4": udp(far4, netip.MustParseAddr("10.40.1.99"), 1, 2, 3), "IPv6": udp(far6, netip.MustParseAddr("fd40:0:1::99"), 1, 2, 3),
		"gateway": udp(far4, gw4, 1, 2, 3), "multicast": udp(far6, allNodes, 1, 2, 3), "another node's": udp(far4, far4, 1, 2, 3),
	} {
		rows = append(rows, row{name: "no endpoint " + name, frame: fromUnderlay(overlay(p)), verdict: shot, reason: bpf.LaceReasonREASON_NO_ENDPOINT})
	}
	gone := func(n *node) { emptyStages(n) }
	return append(rows,
		row{name: "cannot be decapsulated", frame: fromUnderlay(overlay(tcp(far4, a4, 3000))), gso: 1000, verdict: shot,
			reason: bpf.LaceReasonREASON_DECAP_FAILED, check: unchecked},
		row{name: "no stage: deliver", prepare: gone, frame: fromUnderlay(overlay(in4)), verdict: shot,
			reason: bpf.LaceReasonREASON_STAGE_MISSING, check: unchecked})
}

func TestUplink(t *testing.T) { runRows(t, uplinkRows()) }

// combined is RFC 6040, figure 4: what becomes of the inner field (first index) under an outer one; 255: dropped.
// Fields are Not-ECT 0, ECT(1) 1, ECT(0) 2, CE 3.
var combined = [4][4]uint8{
	0: {0, 0, 0, 255},
	1: {1, 1, 1, 3},
	2: {2, 1, 2, 3},
	3: {3, 3, 3, 3},
}

func ecnRows() []row {
	var rows []row
	for inner := range uint8(4) {
		for outer := range uint8(4) {
			for name, p := range map[string]ip{"IPv4": in4, "IPv6": in6} {
				const dscp = 0x28 << 2
				p.class = dscp | inner
				o := overlay(p)
				o.class = 0x2e<<2 | outer
				r := row{name: fmt.Sprintf("%s inner %d outer %d", name, inner, outer), program: "uplink", dev: uplink, frame: fromUnderlay(o)}
				if want := combined[inner][outer]; want == 255 {
					r.verdict, r.reason = shot, bpf.LaceReasonREASON_ECN_CONGESTION
				} else {
					p.class = dscp | want // the inner DSCP stays
					r.verdict, r.reason = redirect, bpf.LaceReasonREASON_DECAPSULATED
					r.check = func(t testing.TB, n *node, r result, _ []byte) {
						wantDelivered(t, n, r, podA, p.bytes())
						goodChecksums(t, r.out)
					}
				}
				rows = append(rows, r)
			}
		}
	}
	return rows
}

func TestECN(t *testing.T) { runRows(t, ecnRows()) }

// TestTruncated cuts packets at every length: none goes on that is not whole, and each is counted.
func TestTruncated(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	options4 := udp(a4, far4, 1, 2, 4)
	options4.options = make([]byte, 12)
	extended := udp(a6, far6, 1, 2, 4)
	extended.body, extended.proto = extension(protoUDP, [7]byte{0, 1, 4}, extended.body), extDest
	same := func([]byte) {}
	for name, in := range map[string]input{
		"pod IPv4":        {program: "pod_l3", dev: podA, frame: fromA(options4)},
		"pod IPv6":        {program: "pod_l3", dev: podA, frame: fromA(extended)},
		"pod ARP":         {program: "pod_l3", dev: podA, frame: eth(broadcastMAC, macA, typeARP, arp(1, macA, a4, plan.MAC{}, gw4))},
		"pod ND":          {program: "pod_l3", dev: podA, frame: eth(solicitedMAC, macA, typeV6, nd(a6, solicitedNode, 135, 0, gw6.AsSlice()).bytes())},
		"uplink IPv4":     {program: "uplink", dev: uplink, frame: fromUnderlay(overlay(in4))},
		"uplink IPv6":     {program: "uplink", dev: uplink, frame: fromUnderlay(overlay(in6))},
		"uplink SRH IPv4": {program: "uplink", dev: uplink, frame: fromUnderlay(withSegment(overlay(in4), same))},
		"uplink SRH IPv6": {program: "uplink", dev: uplink, frame: fromUnderlay(withSegment(overlay(in6), same))},
	} {
		t.Run(name, func(t *testing.T) {
			n := n.on(t)
			if r := n.run(in); r.verdict != redirect {
				t.Fatalf("the whole packet: verdict %d, %v", int32(r.verdict), words(r.counted))
			}
			for length := 15; length < len(in.frame); length++ {
				cut := in
				cut.frame = slices.Clone(in.frame[:length])
				wantRefused(t, n, cut)
			}
		})
	}
}

func wantRefused(t testing.TB, n *node, in input) {
	t.Helper()
	r, err := n.try(in)
	switch {
	case errors.Is(err, unix.EINVAL) && len(in.frame) < 54: // not by BPF_PROG_TEST_RUN, but TestTunnel sends such
	case err != nil:
		t.Errorf("cut to %d bytes: %v", len(in.frame), err)
	case in.program == "uplink" && len(in.frame) < 54 && r.verdict == pass && len(r.counted) == 0: // no outer header
	case r.verdict == shot && sameReasons(r.counted, []bpf.LaceReason{bpf.LaceReasonREASON_MALFORMED}):
	default:
		t.Errorf("cut to %d bytes: verdict %d, %v", len(in.frame), int32(r.verdict), words(r.counted))
	}
}

// TestOverlap: with the same inner packet, the outer one alone says which network's container gets it.
func TestOverlap(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	for id, dev := range map[topology.NetworkID]int{backend: podA, overlap: podX} {
		for name, inner := range map[string]ip{"IPv4": in4, "IPv6": in6} {
			p := overlay(inner)
			p.src, p.dst = locatorOf(2, 48).Source(id, 0), sidOf(id)
			r := n.run(input{program: "uplink", dev: uplink, frame: fromUnderlay(p)})
			wantCounted(t, r, redirect, bpf.LaceReasonREASON_DECAPSULATED)
			if r.ctx.Ifindex != uint32(n.bed.index[dev]) {
				t.Errorf("network %d, %s: delivered to interface %d, want %d", id, name, r.ctx.Ifindex, n.bed.index[dev])
			}
		}
	}
}

// TestRawUplink: without an Ethernet header the same packets are refused. What is delivered is shown
// by TestTunnel, as BPF_PROG_TEST_RUN takes the first 14 bytes for an Ethernet header whatever comes in.
// For the kernel to see IPv6 there, the source's third word is 0x86dd; for it to be for this host, the interface gets as
// MAC address what the packet begins with.
func TestRawUplink(t *testing.T) {
	b := newBed(t)
	n := newNode(t, b, options{number: 1})
	p := overlay(in4)
	p.label = 0
	for name, c := range map[string]struct {
		edit   func(p *ip)
		reason bpf.LaceReason
	}{
		"unknown source":   {func(p *ip) {}, bpf.LaceReasonREASON_UNKNOWN_SOURCE},
		"underlay ICMP":    {func(p *ip) { p.proto = protoICMP6 }, bpf.LaceReasonREASON_UNDERLAY_ICMP},
		"segments left":    {func(p *ip) { *p = withSegment(*p, func(h []byte) { h[3] = 1 }) }, bpf.LaceReasonREASON_SEGMENTS_LEFT},
		"routing header":   {func(p *ip) { *p = withSegment(*p, func(h []byte) { h[2] = 0 }) }, bpf.LaceReasonREASON_ROUTING_HEADER},
		"cut short in SRH": {func(p *ip) { *p = withSegment(*p, func([]byte) {}); p.body = p.body[:20] }, bpf.LaceReasonREASON_MALFORMED},
	} {
		q := p
		q.src = netip.MustParseAddr("5f00:1ace:86dd:5ce:0:6400::")
		c.edit(&q)
		frame := q.bytes()
		must(t, b.setMAC(stranger, plan.MAC(frame[:6])))
		r := n.run(input{program: "uplink_raw", dev: stranger, frame: frame})
		t.Run(name, func(t *testing.T) { wantCounted(t, r, shot, c.reason) })
	}
}
