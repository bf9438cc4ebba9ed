// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

const extGRE = 47

// shimmed is a frame behind a GRE header.
func shimmed(frame []byte) []byte { return append([]byte{0, 0, 0x65, 0x58}, frame...) }

// sent is a frame of storage from node 2 to node 1; the SID is End.DT2U.
func sent(frame []byte) ip {
	return ip{src: locatorOf(2, 48).Source(storage, 0), dst: frameSID(1, storage), proto: extL2, body: frame, label: 7}
}

// sentByRouter is one of the foreign router's.
func sentByRouter(frame []byte) ip {
	p := sent(frame)
	p.src = locatorOf(router, 48).Addr().Next()
	return p
}

// outerForms are the ways in which a frame may come in.
var outerForms = map[string]func(p ip) ip{
	"143":            func(p ip) ip { return p },
	"GRE":            func(p ip) ip { p.proto, p.body = extGRE, shimmed(p.body); return p },
	"143 behind SRH": func(p ip) ip { return withSegment(p, func([]byte) {}) },
	"GRE behind SRH": func(p ip) ip {
		p.proto, p.body = extGRE, shimmed(p.body)
		return withSegment(p, func([]byte) {})
	},
}

func segmentUplinkRows() []row {
	var rows []row
	for _, table := range [][]row{takenFrameRows(), strangeFrameRows(), spoofedFrameRows(), lostFrameRows(), segmentRoutedRows(), segmentECNRows()} {
		rows = append(rows, table...)
	}
	return as(rows, "uplink", uplink)
}

// takenFrameRows are delivered as they were sent.
func takenFrameRows() []row {
	var rows []row
	taken := bpf.LaceReasonREASON_DECAPSULATED
	for form, outer := range outerForms {
		for how, changeProto := range map[string]bool{"": false, ", change_proto": true} {
			o := options{changeProto: changeProto}
			for to, dev := range map[string]int{"a container": podA, "a machine": machine} {
				all := frames(partyAt(2, podA), partyAt(1, dev))
				if dev == podA {
					addTiny(all, partyAt(2, podA), partyAt(1, podA))
				}
				for name, frame := range all {
					rows = append(rows, row{name: form + how + ", " + name + " to " + to, opts: o, frame: fromUnderlay(outer(sent(frame))), verdict: redirect, reason: taken,
						check: func(t testing.TB, n *node, r result, in []byte) {
							arrived(dev, frame)(t, n, r, in)
							wantFlowsOf(t, n, r, frame, vlan{})
						}})
				}
			}
		}
	}
	frame := partyAt(2, podA).frame(partyAt(1, podA), udp(other4, s4, 1, 2, 9))
	forMany := sent(frame)
	forMany.dst = groupSID(1, storage)
	segment := sent(frame)
	segment.src = locatorOf(2, 48).Source(storage, 0x1234567)
	foreign := ethIP(sMAC, foreignMAC, udp(foreign4, s4, 1, 2, 9).bytes())
	unlisted := ethIP(sMAC, unknownMAC, udp(netip.MustParseAddr("10.50.0.99"), s4, 1, 2, 9).bytes())
	old := ethIP(stationMAC(1, podE), stationMAC(2, podE), udp(oldFar6, old6, 1, 2, 9).bytes())
	toOld := sent(old)
	toOld.src, toOld.dst = locatorOf(2, 48).Source(legacy, 0), frameSID(1, legacy)
	twinned := sent(frame)
	twinned.src, twinned.dst = locatorOf(2, 48).Source(twin, 0), frameSID(1, twin)
	for name, c := range map[string]struct {
		p     ip
		dev   int
		frame []byte
		id    topology.NetworkID
	}{
		"End.DT2M, for one":                      {forMany, podA, frame, storage},
		"with a policy segment":                  {segment, podA, frame, storage},
		"with a hop limit of 1":                  {hops(sent(frame), 1), podA, frame, storage},
		"a router's":                             {sentByRouter(foreign), podA, foreign, storage},
		"a router's, who says so":                {func() ip { p := sentByRouter(foreign); p.src = locatorOf(router, 48).Source(storage, 0); return p }(), podA, foreign, storage},
		"of an unlisted MAC":                     {sent(unlisted), podA, unlisted, storage},
		"IPv6 only":                              {toOld, podE, old, legacy},
		"of the network with the same addresses": {twinned, podX, frame, twin},
	} {
		rows = append(rows, row{name: "taken " + name, frame: fromUnderlay(c.p), verdict: redirect, reason: taken, network: int(c.id), check: arrived(c.dev, c.frame)})
	}
	return rows
}

// addTiny adds payloads about as long as what the kernel wants to be left of a packet.
func addTiny(all map[string][]byte, from, to party) {
	for _, size := range []int{0, 1, 2, 4, 19, 20, 21, 36, 39, 40, 41, 60} {
		all[fmt.Sprintf("experimental, %d bytes", size)] = eth(to.mac, from.mac, 0x88b5, bytes.Repeat([]byte{0xa5}, size))
		all[fmt.Sprintf("tagged, %d bytes", size)] = tagged(eth(to.mac, from.mac, typeV4, bytes.Repeat([]byte{0xa5}, size)), vlan{typeVLAN, 5})
		all[fmt.Sprintf("IPv4, %d bytes in it", size)] = from.frame(to, ip{src: from.v4, dst: to.v4, proto: 253, body: make([]byte, size)})
		all[fmt.Sprintf("IPv6, %d bytes in it", size)] = from.frame(to, ip{src: from.v6, dst: to.v6, proto: 253, body: make([]byte, size)})
	}
}

// strangeFrameRows are refused for the outer packet, or for what does not fit into the frame.
func strangeFrameRows() []row {
	frame := partyAt(2, podA).frame(partyAt(1, podA), udp(other4, s4, 1, 2, 9))
	many := ethIP(broadcastMAC, otherMAC, udp(other4, all4, 1, 2, 9).bytes())
	with := func(edit func(p *ip)) []byte {
		p := sent(frame)
		edit(&p)
		return fromUnderlay(p)
	}
	ends := func(src, dst netip.Addr) []byte { return with(func(p *ip) { p.src, p.dst = src, dst }) }
	gre := func(header ...byte) []byte {
		return with(func(p *ip) { p.proto, p.body = extGRE, append(header, p.body...) })
	}
	source := func(number int, id topology.NetworkID) netip.Addr { return locatorOf(number, 48).Source(id, 0) }
	tail := frameSID(1, storage).As16()
	tail[15] = 1
	short := ethIP(sMAC, otherMAC, udp(other4, s4, 1, 2, 9).bytes())
	short[14] = 0x44
	long := ethIP(sMAC, otherMAC, udp(other6, s6, 1, 2, 9).bytes())
	long[19]++
	frameOf := func(frame []byte) []byte { return with(func(p *ip) { p.body = frame }) }
	var rows []row
	for reason, packets := range map[bpf.LaceReason]map[string][]byte{
		bpf.LaceReasonREASON_WRONG_PAYLOAD: {
			"frame to End.DT46":               with(func(p *ip) { p.dst = sidOf(storage) }),
			"frame to an L3 network":          ends(source(2, backend), frameSID(1, backend)),
			"frame for many to an L3 network": with(func(p *ip) { p.src, p.dst, p.body = source(2, backend), groupSID(1, backend), many }),
			"IPv4 to End.DT2U":                with(func(p *ip) { p.proto, p.body = protoIPIP, plainV4(nil) }),
			"IPv6 to End.DT2M":                with(func(p *ip) { p.dst, p.proto, p.body = groupSID(1, storage), protoV6, in6.bytes() }),
			"GRE with a key":                  gre(0x20, 0, 0x65, 0x58, 0, 0, 0, 1),
			"GRE with a checksum":             gre(0x80, 0, 0x65, 0x58, 0, 0, 0, 0),
			"GRE of another version":          gre(0, 1, 0x65, 0x58),
			"GRE with IPv4":                   gre(0, 0, 8, 0),
			"GRE, nothing":                    with(func(p *ip) { p.proto, p.body = extGRE, nil }),
			"GRE cut short":                   with(func(p *ip) { p.proto, p.body = extGRE, []byte{0, 0, 0x65} }),
		},
		bpf.LaceReasonREASON_NO_PEERING: {
			"frame of another network":         ends(source(2, twin), frameSID(1, storage)),
			"frame to another network":         ends(source(2, storage), frameSID(1, twin)),
			"frame of an L3 network":           ends(source(2, backend), frameSID(1, storage)),
			"router's frame to another":        ends(locatorOf(router, 48).Addr().Next(), frameSID(1, twin)),
			"router's frame, who is not of it": ends(source(router, twin), frameSID(1, twin)),
		},
		bpf.LaceReasonREASON_UNKNOWN_NETWORK: {"frame of a network that is not here": ends(source(2, elsewhere), frameSID(1, elsewhere))},
		bpf.LaceReasonREASON_UNKNOWN_SOURCE:  {"frame of no node": ends(source(9, storage), frameSID(1, storage)), "frame of this node": ends(source(1, storage), frameSID(1, storage))},
		bpf.LaceReasonREASON_SID_TAIL:        {"frame": ends(source(2, storage), netip.AddrFrom16(tail))},
		bpf.LaceReasonREASON_UNKNOWN_FUNCTION: {
			"frame to End.DX2": ends(source(2, storage), locatorOf(1, 48).SID(21, storage).Addr),
		},
		bpf.LaceReasonREASON_SEGMENTS_LEFT: {"frame": fromUnderlay(withSegment(sent(frame), func(h []byte) { h[3] = 1 }))},
		bpf.LaceReasonREASON_MALFORMED: {
			"no frame": frameOf(nil), "13 bytes of a frame": frameOf(frame[:13]), "IPv4 header below 20 bytes": frameOf(short), "IPv6 longer than the frame": frameOf(long),
			"IPv4 cut short":               frameOf(frame[:33]),
			"only a priority":              frameOf(tagged(frame, vlan{typeVLAN, 7 << 13})),
			"only a provider's priority":   frameOf(tagged(frame, vlan{typeQinQ, 0})),
			"only a priority, cut short":   frameOf(frame[:12:12])[:0],
			"IPv4-mapped destination":      frameOf(ethIP(sMAC, otherMAC, udp(other6, netip.AddrFrom16(s4.As16()), 1, 2, 3).bytes())),
			"a transport header cut short": frameOf(ethIP(sMAC, otherMAC, ip{src: other4, dst: s4, proto: protoTCP, body: make([]byte, 19)}.bytes())),
		},
	} {
		for name, packet := range packets {
			r := row{name: maps.ReasonName(reason) + ": " + name, frame: packet, verdict: shot, reason: reason}
			if len(packet) == 0 {
				continue
			}
			r.network = frameNetwork(packet, reason)
			rows = append(rows, r)
		}
	}
	return rows
}

// frameNetwork is the network that a refused packet is counted for: that of its outer source, if a node says it.
func frameNetwork(packet []byte, reason bpf.LaceReason) int {
	if reason == bpf.LaceReasonREASON_UNKNOWN_SOURCE || reason == bpf.LaceReasonREASON_SEGMENTS_LEFT {
		return nobody
	}
	src := packet[14+8 : 14+24]
	if binary.BigEndian.Uint16(src[6:]) != uint16(topology.SourceFunction) {
		return int(storage)
	}
	return int(src[8])<<16 | int(src[9])<<8 | int(src[10])
}

// spoofedFrameRows claim to be of others than those whom the sender has.
func spoofedFrameRows() []row {
	absent4 := netip.MustParseAddr("10.50.0.30")
	p4, p6 := udp(other4, s4, 1, 2, 9), udp(other6, s6, 1, 2, 9)
	of := func(src plan.MAC, p ip) ip { return sent(ethIP(sMAC, src, p.bytes())) }
	odd := func(src plan.MAC) ip { return sent(eth(sMAC, src, 0x88b5, make([]byte, 46))) }
	from := func(src netip.Addr) ip {
		dst := s4
		if src.Is6() {
			dst = s6
		}
		return of(otherMAC, udp(src, dst, 1, 2, 9))
	}
	byRouter := func(src plan.MAC, p ip) ip { return sentByRouter(ethIP(sMAC, src, p.bytes())) }
	var rows []row
	for reason, packets := range map[bpf.LaceReason]map[string]ip{
		bpf.LaceReasonREASON_SPOOFED_MAC: {
			"a container's here": of(nearMAC, p4), "the receiver's": of(sMAC, p6), "a machine's here": of(vmMAC, p4), "an absent container's here": of(derived(absent4), p4),
			"the gateway's": of(plan.GatewayMAC, p4), "a group's": of(groupMAC, p4), "the broadcast address": of(broadcastMAC, p6), "a router's": of(foreignMAC, p4),
			"no IP, a container's here": odd(nearMAC), "no IP, the gateway's": odd(plan.GatewayMAC), "no IP, a group's": odd(groupMAC), "no IP, a router's": odd(foreignMAC),
			"derived of a router's endpoint": of(derived(foreign4), p4),
			"another node's by a router":     byRouter(otherMAC, udp(foreign4, s4, 1, 2, 9)), "a machine's of another node by a router": byRouter(awayMAC, udp(foreign4, s4, 1, 2, 9)),
		},
		bpf.LaceReasonREASON_SPOOFED_ADDRESS: {
			"a container's here": from(near4), "a container's here, IPv6": from(near6), "the receiver's": from(s4), "a machine's here": from(vm4), "an absent container's here": from(absent4),
			"a router's": from(foreign4), "a router's, IPv6": from(foreign6), "another node's by a router": byRouter(foreignMAC, p4), "another node's by a router, IPv6": byRouter(foreignMAC, p6),
		},
	} {
		for name, p := range packets {
			rows = append(rows, row{name: maps.ReasonName(reason) + ": " + name, frame: fromUnderlay(p), verdict: shot, reason: reason})
		}
	}
	return rows
}

// lostFrameRows are for nobody here.
func lostFrameRows() []row {
	p := udp(other4, s4, 1, 2, 9)
	var rows []row
	for name, dst := range map[string]plan.MAC{
		"unknown": unknownMAC, "of an absent container here": derived(netip.MustParseAddr("10.50.0.30")), "of the sender": otherMAC, "of a machine of the sender": awayMAC,
		"of a router": foreignMAC, "of the gateway": plan.GatewayMAC, "zero": {},
	} {
		for how, o := range map[string]func(frame []byte) ip{"": sent, ", by a router": sentByRouter} {
			src, packet := otherMAC, p
			if how != "" {
				src, packet = foreignMAC, udp(foreign4, s4, 1, 2, 9)
			}
			rows = append(rows, row{name: "MAC " + name + how, frame: fromUnderlay(o(ethIP(dst, src, packet.bytes()))), verdict: shot, reason: bpf.LaceReasonREASON_UNKNOWN_MAC},
				row{name: "MAC " + name + how + ", no IP", frame: fromUnderlay(o(eth(dst, src, 0x88b5, make([]byte, 46)))), verdict: shot, reason: bpf.LaceReasonREASON_UNKNOWN_MAC})
		}
	}
	learned := row{name: "MAC learned at another node: no transit", prepare: sight(unknownMAC, router), frame: fromUnderlay(sent(ethIP(unknownMAC, otherMAC, p.bytes()))), verdict: shot,
		reason: bpf.LaceReasonREASON_UNKNOWN_MAC}
	for name, q := range map[string]ip{
		"answer to nothing": icmp(other4, s4, 0, 0, make([]byte, 4)), "error about nothing": complaint(other6, s6, 3, udp(s6, other6, 1, 2, 3).bytes()),
	} {
		rows = append(rows, row{name: name, frame: fromUnderlay(sent(partyAt(2, podA).frame(partyAt(1, podA), q))), verdict: shot, reason: bpf.LaceReasonREASON_NO_FLOW})
	}
	return append(rows, learned, row{name: "no stage: frame", prepare: emptyStages, frame: fromUnderlay(sent(ethIP(sMAC, otherMAC, p.bytes()))), verdict: shot, reason: bpf.LaceReasonREASON_STAGE_MISSING})
}

// segmentRoutedRows are IP packets that are routed into an L2 network, and out of it.
func segmentRoutedRows() []row {
	var rows []row
	for version, c := range map[string]struct{ own, web, webFar, other netip.Addr }{"IPv4": {s4, web4, v4Of(2, podA), other4}, "IPv6": {s6, web6, v6Of(2, podA), other6}} {
		over := func(from, to topology.NetworkID, p ip) []byte {
			o := overlay(p)
			o.src, o.dst = locatorOf(2, 48).Source(from, 0), sidOf(to)
			return fromUnderlay(o)
		}
		routed := func(name string, from, to topology.NetworkID, p ip, dev int) row {
			return row{name: name + ", " + version, frame: over(from, to, p), verdict: redirect, reason: bpf.LaceReasonREASON_DECAPSULATED, network: int(to),
				check: func(t testing.TB, n *node, r result, _ []byte) {
					if r.ctx.Ifindex != uint32(n.bed.index[dev]) {
						t.Errorf("delivered to interface %d, want %d", r.ctx.Ifindex, n.bed.index[dev])
					}
					wantFrame(t, r.out, ethIP(stationMAC(1, dev), plan.GatewayMAC, p.bytes()))
				}}
		}
		rows = append(rows,
			routed("routed into an L2 network", backend, storage, udp(c.webFar, c.own, 1, 2, 9), podA),
			routed("routed into an L2 network, to a machine", backend, storage, udp(c.webFar, map[bool]netip.Addr{false: vm4, true: vm6}[c.own.Is6()], 1, 2, 9), machine),
			routed("routed out of an L2 network", storage, backend, udp(c.other, c.web, 1, 2, 9), podD),
			routed("routed inside an L2 network", storage, storage, udp(c.other, c.own, 1, 2, 9), podA),
			row{name: "routed into an L2 network without a peering, " + version, frame: over(backend, twin, udp(c.webFar, c.own, 1, 2, 9)), verdict: shot, reason: bpf.LaceReasonREASON_NO_PEERING, network: int(backend)})
	}
	return rows
}

// segmentECNRows are RFC 6040 for frames; what is no IP cannot tell that it was congested, and is no worse for it.
func segmentECNRows() []row {
	var rows []row
	const dscp = 0x28 << 2
	for inner := range uint8(4) {
		for outer := range uint8(4) {
			for name, p := range map[string]ip{"IPv4": udp(other4, s4, 1, 2, 9), "IPv6": udp(other6, s6, 1, 2, 9)} {
				for form, wrap := range outerForms {
					o := wrap(sent(partyAt(2, podA).frame(partyAt(1, podA), classed(p, dscp|inner))))
					o.class = 0x2e<<2 | outer
					r := row{name: fmt.Sprintf("ECN %s %s inner %d outer %d", form, name, inner, outer), frame: fromUnderlay(o)}
					if want := combined[inner][outer]; want == 255 {
						r.verdict, r.reason = shot, bpf.LaceReasonREASON_ECN_CONGESTION
					} else {
						r.verdict, r.reason, r.check = redirect, bpf.LaceReasonREASON_DECAPSULATED, arrived(podA, partyAt(2, podA).frame(partyAt(1, podA), classed(p, dscp|want)))
					}
					rows = append(rows, r)
				}
			}
		}
	}
	odd := eth(sMAC, otherMAC, 0x88b5, make([]byte, 46))
	return append(rows, row{name: "ECN no IP", frame: fromUnderlay(classed(sent(odd), 3)), verdict: redirect, reason: bpf.LaceReasonREASON_DECAPSULATED, check: arrived(podA, odd)})
}

func TestSegmentUplink(t *testing.T) {
	decidedByNoKernel(t)
	runRows(t, segmentUplinkRows())
}

// TestSegmentTruncated cuts frames off the underlay at every length: none goes on that is not whole.
func TestSegmentTruncated(t *testing.T) {
	decidedByNoKernel(t)
	n := newNode(t, newBed(t), options{number: 1, l2: true})
	for name, frame := range map[string][]byte{
		"IPv4": partyAt(2, podA).frame(partyAt(1, podA), udp(other4, s4, 1, 2, 4)), "IPv6": partyAt(2, podA).frame(partyAt(1, podA), udp(other6, s6, 1, 2, 4)),
		"ARP": eth(broadcastMAC, otherMAC, typeARP, arp(1, otherMAC, other4, plan.MAC{}, s4)),
		"ND":  ethIP(sMAC, otherMAC, nd(other6, solicitedGroup, 135, 0, s6.AsSlice()).bytes()),
	} {
		for form, outer := range outerForms {
			t.Run(name+" "+form, func(t *testing.T) {
				n := n.on(t)
				in := input{program: "uplink", dev: uplink, frame: fromUnderlay(outer(sent(frame)))}
				if r := n.run(in); r.verdict != redirect {
					t.Fatalf("the whole packet: verdict %d, %v", int32(r.verdict), words(r.counted))
				}
				for length := 15; length < len(in.frame); length++ {
					n.dropFlows()
					short := in
					short.frame = slices.Clone(in.frame[:length])
					r, err := n.try(short)
					switch {
					case err != nil && length < 54:
					case err != nil:
						t.Errorf("cut to %d bytes: %v", length, err)
					case length < 54 && r.verdict == pass:
					case r.verdict != shot || len(r.counted) != 1 || r.counted[0] != bpf.LaceReasonREASON_MALFORMED && r.counted[0] != bpf.LaceReasonREASON_WRONG_PAYLOAD:
						t.Errorf("cut to %d bytes: verdict %d, %v", length, int32(r.verdict), words(r.counted))
					}
				}
			})
		}
	}
}

// TestLearned: a MAC address that only frames tell of is known where its last frame came from; none that is known otherwise is.
func TestLearned(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1, l2: true})
	from := func(outer func([]byte) ip, src plan.MAC) {
		t.Helper()
		n.run(input{program: "uplink", dev: uplink, frame: fromUnderlay(outer(eth(sMAC, src, 0x88b5, make([]byte, 46))))})
	}
	wantAt := func(mac plan.MAC, number int) {
		t.Helper()
		v, ok := n.sighting(storage, mac)
		half := locatorOf(number, 48).Addr().As16()
		if !ok || v.Locator != binary.NativeEndian.Uint64(half[:8]) || ticks(t)-v.Seen > 1 {
			t.Errorf("%s is learned: %v, %+v, want node %d", mac, ok, v, number)
		}
	}
	from(sent, unknownMAC)
	wantAt(unknownMAC, 2)
	from(sentByRouter, unknownMAC)
	wantAt(unknownMAC, router)
	from(sent, unknownMAC)
	wantAt(unknownMAC, 2)
	r := n.run(input{program: "pod_l2", dev: podA, frame: eth(unknownMAC, sMAC, 0x88b5, make([]byte, 46))})
	wantCounted(t, r, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
	if r.ctx.Peer != 2 {
		t.Errorf("a frame to what was learned goes to peer %d", r.ctx.Peer)
	}
	for _, mac := range []plan.MAC{otherMAC, awayMAC, nearMAC, plan.GatewayMAC, groupMAC, derived(netip.MustParseAddr("10.50.0.30"))} {
		from(sent, mac)
		if v, ok := n.sighting(storage, mac); ok {
			t.Errorf("%s, which is known, was learned: %+v", mac, v)
		}
	}
	if _, ok := n.sighting(twin, unknownMAC); ok {
		t.Error("another network has learned too")
	}
}
