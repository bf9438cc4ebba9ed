// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
)

// asks is an ARP frame for many.
func asks(from plan.MAC, op uint16, sender, target netip.Addr) []byte {
	return eth(broadcastMAC, from, typeARP, arp(op, from, sender, plan.MAC{}, target))
}

// solicits is a solicitation for many, with the sender's MAC address where it has an address.
func solicits(from plan.MAC, src, target netip.Addr) []byte {
	rest := target.AsSlice()
	if !src.IsUnspecified() {
		rest = append(rest, option(1, from)...)
	}
	return ethIP(solicitedGroupMC, from, nd(src, solicitedGroup, 135, 0, rest).bytes())
}

// tells is an advertisement.
func tells(to, from plan.MAC, src, dst, target netip.Addr, flags uint8) []byte {
	return ethIP(to, from, nd(src, dst, 136, flags, append(target.AsSlice(), option(2, from)...)).bytes())
}

// exactly wants a frame.
func exactly(frame []byte) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, _ *node, r result, _ []byte) {
		t.Helper()
		wantFrame(t, r.out, frame)
	}
}

func segmentNeighbourRows() []row {
	rows := append(askRows(), announceRows()...)
	rows = append(rows, unansweredRows()...)
	return as(rows, "pod_l2", podA)
}

// askRows are questions of a container, and the answers.
func askRows() []row {
	answered, gateway, away := bpf.LaceReasonREASON_NEIGHBOUR_ANSWERED, bpf.LaceReasonREASON_GATEWAY_ANSWERED, bpf.LaceReasonREASON_ENCAPSULATED
	answer := func(name string, frame []byte, reason bpf.LaceReason, want []byte) row {
		return row{name: name, frame: frame, verdict: redirect, reason: reason, check: exactly(want)}
	}
	asked := func(name string, frame []byte, sid netip.Addr) row {
		return row{name: name, frame: frame, verdict: redirect, reason: away, check: carried(sid, 0)}
	}
	has := func(mac plan.MAC, addr netip.Addr) []byte {
		return eth(sMAC, mac, typeARP, arp(2, mac, addr, sMAC, s4))
	}
	is := func(mac plan.MAC, addr netip.Addr) []byte { return tells(sMAC, mac, addr, s6, addr, 0x60) }
	to := func(p ip) []byte { return ethIP(solicitedGroupMC, sMAC, p.bytes()) }
	padding := make([]byte, 18)
	rows := []row{
		answer("ARP", asks(sMAC, 1, s4, near4), answered, has(nearMAC, near4)),
		answer("ARP, padded", append(asks(sMAC, 1, s4, near4), padding...), answered, append(has(nearMAC, near4), padding...)),
		answer("ARP to the neighbour alone", eth(nearMAC, sMAC, typeARP, arp(1, sMAC, s4, plan.MAC{}, near4)), answered, has(nearMAC, near4)),
		answer("ARP for a machine", asks(sMAC, 1, s4, vm4), answered, has(vmMAC, vm4)),
		answer("ARP probe", asks(sMAC, 1, zero4, near4), answered, eth(sMAC, nearMAC, typeARP, arp(2, nearMAC, near4, sMAC, zero4))),
		answer("ARP for the gateway", asks(sMAC, 1, s4, lgw4), gateway, has(plan.GatewayMAC, lgw4)),
		answer("ARP probe for the gateway", asks(sMAC, 1, zero4, lgw4), gateway, eth(sMAC, plan.GatewayMAC, typeARP, arp(2, plan.GatewayMAC, lgw4, sMAC, zero4))),
		asked("ARP for another node's", asks(sMAC, 1, s4, other4), groupSID(2, storage)),
		asked("ARP probe for another node's", asks(sMAC, 1, zero4, other4), groupSID(2, storage)),
		asked("ARP for another node's machine", asks(sMAC, 1, s4, away4), groupSID(2, storage)),
		answer("ARP for a router's", asks(sMAC, 1, s4, foreign4), answered, has(foreignMAC, foreign4)),
		asked("ARP for an absent one of another node", asks(sMAC, 1, s4, netip.MustParseAddr("10.50.0.47")), groupSID(2, storage)),
		answer("ND", solicits(sMAC, s6, near6), answered, is(nearMAC, near6)),
		answer("ND for a machine", solicits(sMAC, s6, vm6), answered, is(vmMAC, vm6)),
		answer("ND from link-local", solicits(sMAC, ownLL, near6), answered, tells(sMAC, nearMAC, near6, ownLL, near6, 0x60)),
		answer("ND for link-local", solicits(sMAC, ownLL, nearLL), answered, tells(sMAC, nearMAC, nearLL, ownLL, nearLL, 0x60)),
		answer("ND for a machine's link-local", solicits(sMAC, ownLL, eui64(vmMAC)), answered, tells(sMAC, vmMAC, eui64(vmMAC), ownLL, eui64(vmMAC), 0x60)),
		answer("ND to the neighbour alone, without option", bridged(nearMAC, nd(s6, near6, 135, 0, near6.AsSlice())), answered, is(nearMAC, near6)),
		answer("ND with a nonce", to(nd(s6, solicitedGroup, 135, 0, append(append(near6.AsSlice(), option(1, sMAC)...), 14, 1, 1, 2, 3, 4, 5, 6))), answered, is(nearMAC, near6)),
		answer("DAD for a neighbour's", solicits(sMAC, unspecified, near6), answered, tells(allNodesMAC, nearMAC, near6, allNodes, near6, 0x20)),
		answer("DAD for a neighbour's link-local", solicits(sMAC, unspecified, nearLL), answered, tells(allNodesMAC, nearMAC, nearLL, allNodes, nearLL, 0x20)),
		answer("ND for the gateway", solicits(sMAC, s6, lgw6), gateway, tells(sMAC, plan.GatewayMAC, lgw6, s6, lgw6, 0xe0)),
		answer("DAD for the gateway", solicits(sMAC, unspecified, lgw6), gateway, tells(allNodesMAC, plan.GatewayMAC, lgw6, allNodes, lgw6, 0xa0)),
		asked("ND for another node's", solicits(sMAC, s6, other6), groupSID(2, storage)),
		asked("DAD for another node's", solicits(sMAC, unspecified, other6), groupSID(2, storage)),
		asked("ND for another node's link-local", solicits(sMAC, ownLL, otherLL), frameSID(2, storage)),
		asked("ND for a machine's link-local at another node", solicits(sMAC, ownLL, eui64(awayMAC)), frameSID(2, storage)),
		answer("ND for a router's", solicits(sMAC, s6, foreign6), answered, is(foreignMAC, foreign6)),
		answer("ND for a router's link-local", solicits(sMAC, ownLL, eui64(foreignMAC)), answered, tells(sMAC, foreignMAC, eui64(foreignMAC), ownLL, eui64(foreignMAC), 0x60)),
		{name: "ND where there is no IPv4", program: "pod_l2", dev: podE, frame: solicits(stationMAC(1, podE), old6, oldFar6), verdict: redirect, reason: away, check: carried(groupSID(2, legacy), 0)},
	}
	learned := asked("ND for a learned MAC's link-local", solicits(sMAC, ownLL, eui64(unknownMAC)), frameSID(2, storage))
	learned.prepare = sight(unknownMAC, 2)
	return append(rows, learned)
}

// announceRows are what a container says of its own address: to one, or to all.
func announceRows() []row {
	replicated, local, away := bpf.LaceReasonREASON_REPLICATED, bpf.LaceReasonREASON_LOCAL, bpf.LaceReasonREASON_ENCAPSULATED
	var rows []row
	for name, frame := range map[string][]byte{
		"ARP announcement": asks(sMAC, 1, s4, s4), "ARP probe for its own": asks(sMAC, 1, zero4, s4), "ARP answer for many": asks(sMAC, 2, s4, s4),
		"DAD for its own": solicits(sMAC, unspecified, s6), "DAD for its own link-local": solicits(sMAC, unspecified, ownLL),
		"unsolicited advertisement":                 tells(allNodesMAC, sMAC, s6, allNodes, s6, 0x20),
		"unsolicited advertisement from link-local": tells(allNodesMAC, sMAC, ownLL, allNodes, s6, 0x20),
		"unsolicited advertisement of link-local":   tells(allNodesMAC, sMAC, ownLL, allNodes, ownLL, 0x20),
		"router solicitation":                       ethIP(plan.MAC{0x33, 0x33, 0, 0, 0, 2}, sMAC, icmp(ownLL, routerMulticast, 133, 0, make([]byte, 4)).bytes()),
		"router solicitation from nobody":           ethIP(plan.MAC{0x33, 0x33, 0, 0, 0, 2}, sMAC, icmp(unspecified, routerMulticast, 133, 0, make([]byte, 4)).bytes()),
	} {
		rows = append(rows, row{name: name, frame: frame, verdict: shot, reason: replicated, check: unchecked},
			row{name: "not replicated: " + name, program: "pod_l2", dev: podX, frame: frame, verdict: shot, reason: bpf.LaceReasonREASON_FLOOD_OFF})
	}
	answer4 := func(dst plan.MAC, target netip.Addr) []byte {
		return eth(dst, sMAC, typeARP, arp(2, sMAC, s4, dst, target))
	}
	return append(rows,
		row{name: "tagged ARP", tag: vlan{typeVLAN, 5}, frame: asks(sMAC, 1, s4, near4), verdict: shot, reason: replicated, check: unchecked},
		row{name: "ARP answer to a neighbour", frame: answer4(nearMAC, near4), verdict: redirect, reason: local, check: arrived(podB, answer4(nearMAC, near4))},
		row{name: "ARP answer to another node", frame: answer4(otherMAC, other4), verdict: redirect, reason: away, check: carried(frameSID(2, storage), 0)},
		row{name: "advertisement to a neighbour", frame: tells(nearMAC, sMAC, s6, near6, s6, 0x60), verdict: redirect, reason: local, check: arrived(podB, tells(nearMAC, sMAC, s6, near6, s6, 0x60))},
		row{name: "advertisement to another node", frame: tells(otherMAC, sMAC, ownLL, other6, s6, 0x60), verdict: redirect, reason: away, check: carried(frameSID(2, storage), 0)},
		row{name: "advertisement to nobody", frame: tells(unknownMAC, sMAC, s6, near6, s6, 0x60), verdict: shot, reason: bpf.LaceReasonREASON_UNKNOWN_MAC})
}

// unansweredRows are questions about nobody, and what is not honest.
func unansweredRows() []row {
	unknown, malformed, address, mac := bpf.LaceReasonREASON_NEIGHBOUR_UNKNOWN, bpf.LaceReasonREASON_MALFORMED, bpf.LaceReasonREASON_SPOOFED_ADDRESS, bpf.LaceReasonREASON_SPOOFED_MAC
	changed := func(at int, value byte) []byte { f := asks(sMAC, 1, s4, near4); f[14+at] = value; return f }
	code := nd(s6, solicitedGroup, 135, 0, near6.AsSlice())
	code.body[1] = 1
	oldMAC := stationMAC(1, podE)
	rows := []row{}
	for reason, frames := range map[bpf.LaceReason]map[string][]byte{
		unknown: {
			"ARP for an absent one here": asks(sMAC, 1, s4, netip.MustParseAddr("10.50.0.30")), "ARP for an address of no pool": asks(sMAC, 1, s4, netip.MustParseAddr("10.50.0.99")),
			"ARP for another network": asks(sMAC, 1, s4, web4), "ARP for 0": asks(sMAC, 1, s4, zero4),
			"ND for an absent one here": solicits(sMAC, s6, netip.MustParseAddr("fd50::1:99")), "ND for an address of no pool": solicits(sMAC, s6, netip.MustParseAddr("fd50::9:9")),
			"ND for link-local of nobody": solicits(sMAC, ownLL, eui64(unknownMAC)), "ND for link-local of no MAC": solicits(sMAC, ownLL, netip.MustParseAddr("fe80::1")),
			"ND for link-local of an absent one here": solicits(sMAC, ownLL, eui64(derived(netip.MustParseAddr("10.50.0.30")))),
			"ND for the unspecified address":          solicits(sMAC, s6, unspecified), "ND for a group": solicits(sMAC, s6, allNodes),
			"ND for an IPv4-mapped address": solicits(sMAC, s6, netip.AddrFrom16(netip.MustParseAddr("10.50.0.30").As16())),
		},
		mac: {
			"ARP of another's MAC": eth(broadcastMAC, sMAC, typeARP, arp(1, nearMAC, s4, plan.MAC{}, near4)), "ARP answer of another's MAC": eth(otherMAC, sMAC, typeARP, arp(2, nearMAC, s4, otherMAC, other4)),
		},
		address: {
			"ARP of another's address": asks(sMAC, 1, near4, other4), "ARP announcement of another's address": asks(sMAC, 1, near4, near4), "ARP answer of another's address": asks(sMAC, 2, other4, other4),
			"ARP of the gateway's address": asks(sMAC, 2, lgw4, lgw4), "ND from another's address": solicits(sMAC, near6, other6), "ND from another's link-local": solicits(sMAC, nearLL, other6),
			"advertisement of another's address":    tells(allNodesMAC, sMAC, s6, allNodes, near6, 0x20),
			"advertisement of another's link-local": tells(allNodesMAC, sMAC, ownLL, allNodes, nearLL, 0x20),
			"advertisement of the gateway":          tells(allNodesMAC, sMAC, ownLL, allNodes, lgw6, 0xa0),
			"advertisement from the gateway":        tells(allNodesMAC, sMAC, lgw6, allNodes, lgw6, 0xa0),
		},
		malformed: {
			"ARP of another hardware": changed(1, 6), "ARP of another protocol": changed(2, 9), "ARP of another hardware length": changed(4, 8), "ARP of another protocol length": changed(5, 16),
			"ARP cut short": asks(sMAC, 1, s4, near4)[:41], "ND from afar": ethIP(solicitedGroupMC, sMAC, hops(nd(s6, solicitedGroup, 135, 0, near6.AsSlice()), 254).bytes()),
			"ND with a code": ethIP(solicitedGroupMC, sMAC, code.bytes()), "ND cut short": bridged(nearMAC, nd(s6, near6, 135, 0, near6.AsSlice()[:15])),
			"advertisement from afar": bridged(nearMAC, hops(nd(s6, near6, 136, 0x60, append(s6.AsSlice(), option(2, sMAC)...)), 64)),
		},
	} {
		for name, frame := range frames {
			rows = append(rows, row{name: maps.ReasonName(reason) + ": " + name, frame: frame, verdict: shot, reason: reason})
		}
	}
	return append(rows,
		row{name: "ARP where there is no IPv4", program: "pod_l2", dev: podE, frame: asks(oldMAC, 1, s4, near4), verdict: shot, reason: address},
		row{name: "ARP probe where there is no IPv4", program: "pod_l2", dev: podE, frame: asks(oldMAC, 1, zero4, near4), verdict: shot, reason: unknown},
		row{name: "ARP for the gateway's address where there is none", program: "pod_l2", dev: podX, frame: asks(sMAC, 1, s4, lgw4), verdict: shot, reason: unknown},
		row{name: "ND for the gateway's address where there is none", program: "pod_l2", dev: podX, frame: solicits(sMAC, s6, lgw6), verdict: shot, reason: unknown},
		row{name: "no way to the node that is asked", prepare: func(n *node) { n.nexthops(nexthop{none: true}) }, frame: asks(sMAC, 1, s4, other4), verdict: shot, reason: bpf.LaceReasonREASON_NO_NEXTHOP})
}

func TestSegmentNeighbour(t *testing.T) {
	decidedByNoKernel(t)
	runRows(t, segmentNeighbourRows())
}

// answeredNode wants the answer on its way to the node that asked: the outer header turned round, the rest as it came.
func answeredNode(question ip, back netip.Addr, frame []byte) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, n *node, r result, _ []byte) {
		t.Helper()
		answer := question
		answer.src, answer.dst, answer.hops = n.locator().Source(storage, 0), back, 64
		head := []byte{}
		if answer.proto == extRouting {
			head = segmentHeader(question.body[0], back, nil)
		}
		if answer.proto == extGRE || answer.proto == extRouting && question.body[0] == extGRE {
			frame = shimmed(frame)
		}
		answer.body = append(head, frame...)
		wantFrame(t, r.out, ethIP(nexthopDst, nexthopSrc, answer.bytes()))
	}
}

func segmentNodeRows() []row {
	var rows []row
	asking := func(frame []byte) ip {
		p := sent(frame)
		p.dst, p.class, p.hops = groupSID(1, storage), 0x88, 9
		return p
	}
	type exchange struct{ question, answer []byte }
	solicit := func(p ip) []byte { return ethIP(solicitedGroupMC, otherMAC, p.bytes()) }
	has := func(mac plan.MAC, addr netip.Addr) []byte {
		return eth(otherMAC, mac, typeARP, arp(2, mac, addr, otherMAC, other4))
	}
	is := func(mac plan.MAC, addr netip.Addr) []byte { return tells(otherMAC, mac, addr, other6, addr, 0x60) }
	for name, x := range map[string]exchange{
		"ARP":                  {asks(otherMAC, 1, other4, s4), has(sMAC, s4)},
		"ARP for a machine":    {asks(otherMAC, 1, other4, vm4), has(vmMAC, vm4)},
		"ARP probe":            {asks(otherMAC, 1, zero4, s4), eth(otherMAC, sMAC, typeARP, arp(2, sMAC, s4, otherMAC, zero4))},
		"ARP to one":           {eth(sMAC, otherMAC, typeARP, arp(1, otherMAC, other4, plan.MAC{}, s4)), has(sMAC, s4)},
		"ARP, padded":          {append(asks(otherMAC, 1, other4, s4), make([]byte, 18)...), append(has(sMAC, s4), make([]byte, 18)...)},
		"ND":                   {solicits(otherMAC, other6, s6), is(sMAC, s6)},
		"ND without option":    {solicit(nd(other6, solicitedGroup, 135, 0, s6.AsSlice())), is(sMAC, s6)},
		"ND with a nonce":      {solicit(nd(other6, solicitedGroup, 135, 0, append(append(s6.AsSlice(), option(1, otherMAC)...), 14, 1, 1, 2, 3, 4, 5, 6))), is(sMAC, s6)},
		"ND for link-local":    {solicits(otherMAC, otherLL, ownLL), tells(otherMAC, sMAC, ownLL, otherLL, ownLL, 0x60)},
		"DAD":                  {solicits(otherMAC, unspecified, s6), tells(otherMAC, sMAC, s6, allNodes, s6, 0x20)},
		"DAD for a link-local": {solicits(otherMAC, unspecified, ownLL), tells(otherMAC, sMAC, ownLL, allNodes, ownLL, 0x20)},
	} {
		for form, outer := range outerForms {
			p := outer(asking(x.question))
			rows = append(rows, row{name: form + ": " + name, frame: fromUnderlay(p), verdict: redirect, reason: bpf.LaceReasonREASON_NEIGHBOUR_ANSWERED, check: answeredNode(p, frameSID(2, storage), x.answer)})
		}
	}
	byRouter := sentByRouter(asks(foreignMAC, 1, foreign4, s4))
	rows = append(rows,
		row{name: "ARP by a router", frame: fromUnderlay(byRouter), verdict: redirect, reason: bpf.LaceReasonREASON_NEIGHBOUR_ANSWERED,
			check: answeredNode(byRouter, routerSID, eth(foreignMAC, sMAC, typeARP, arp(2, sMAC, s4, foreignMAC, foreign4)))},
		row{name: "no way back", prepare: func(n *node) { n.nexthops(nexthop{none: true}) }, frame: fromUnderlay(asking(asks(otherMAC, 1, other4, s4))), verdict: shot, reason: bpf.LaceReasonREASON_NO_NEXTHOP,
			check: unchecked},
		row{name: "no stage: neighbour", prepare: emptyStages, frame: fromUnderlay(asking(asks(otherMAC, 1, other4, s4))), verdict: shot, reason: bpf.LaceReasonREASON_STAGE_MISSING})
	rows = append(rows, nodeAnnounceRows(asking)...)
	return as(append(rows, nodeRefusedRows(asking)...), "uplink", uplink)
}

// nodeAnnounceRows are what another node's container says of its own address.
func nodeAnnounceRows(asking func([]byte) ip) []row {
	var rows []row
	for name, frame := range map[string][]byte{
		"ARP announcement": asks(otherMAC, 1, other4, other4), "ARP probe for its own": asks(otherMAC, 1, zero4, other4), "ARP answer for many": asks(otherMAC, 2, other4, other4),
		"unsolicited advertisement":       tells(allNodesMAC, otherMAC, other6, allNodes, other6, 0x20),
		"advertisement of its link-local": tells(allNodesMAC, otherMAC, otherLL, allNodes, otherLL, 0x20),
		"DAD for its own":                 solicits(otherMAC, unspecified, other6),
		"DAD for its own link-local":      solicits(otherMAC, unspecified, otherLL),
		"announcement of an unlisted MAC": asks(unknownMAC, 2, netip.MustParseAddr("10.50.0.99"), netip.MustParseAddr("10.50.0.99")),
	} {
		rows = append(rows, row{name: "told: " + name, frame: fromUnderlay(asking(frame)), verdict: shot, reason: bpf.LaceReasonREASON_REPLICATED, check: unchecked})
	}
	reply, advert := eth(sMAC, otherMAC, typeARP, arp(2, otherMAC, other4, sMAC, s4)), tells(sMAC, otherMAC, otherLL, s6, other6, 0x60)
	return append(rows,
		row{name: "told: ARP answer to one", frame: fromUnderlay(sent(reply)), verdict: redirect, reason: bpf.LaceReasonREASON_DECAPSULATED, check: arrived(podA, reply)},
		row{name: "told: advertisement to one", frame: fromUnderlay(sent(advert)), verdict: redirect, reason: bpf.LaceReasonREASON_DECAPSULATED, check: arrived(podA, advert)},
		row{name: "told: to an absent one", frame: fromUnderlay(sent(eth(derived(netip.MustParseAddr("10.50.0.30")), otherMAC, typeARP, arp(2, otherMAC, other4, sMAC, s4)))), verdict: shot,
			reason: bpf.LaceReasonREASON_UNKNOWN_MAC})
}

func nodeRefusedRows(asking func([]byte) ip) []row {
	var rows []row
	for reason, frames := range map[bpf.LaceReason]map[string][]byte{
		bpf.LaceReasonREASON_NEIGHBOUR_UNKNOWN: {
			"ARP for an absent one here": asks(otherMAC, 1, other4, netip.MustParseAddr("10.50.0.30")), "ARP for a router's": asks(otherMAC, 1, other4, foreign4),
			"ARP for an address of no pool": asks(otherMAC, 1, other4, netip.MustParseAddr("10.50.0.99")), "ARP for the gateway": asks(otherMAC, 1, other4, lgw4),
			"ND for an absent one here": solicits(otherMAC, other6, netip.MustParseAddr("fd50::1:99")), "ND for a router's": solicits(otherMAC, other6, foreign6), "ND for the gateway": solicits(otherMAC, other6, lgw6),
			"ND for link-local of nobody": solicits(otherMAC, otherLL, eui64(unknownMAC)), "ND for link-local of a router": solicits(otherMAC, otherLL, eui64(foreignMAC)),
		},
		bpf.LaceReasonREASON_SPOOFED_MAC: {
			"ARP of another's MAC": eth(broadcastMAC, otherMAC, typeARP, arp(1, awayMAC, other4, plan.MAC{}, s4)), "ARP of a container's here": asks(nearMAC, 1, other4, s4),
			"ARP of the gateway's MAC": asks(plan.GatewayMAC, 2, lgw4, lgw4), "advertisement of a container's here": tells(allNodesMAC, nearMAC, other6, allNodes, other6, 0x20),
		},
		bpf.LaceReasonREASON_SPOOFED_ADDRESS: {
			"ARP of a container's here": asks(otherMAC, 1, near4, s4), "ARP announcement of a container's here": asks(otherMAC, 2, s4, s4), "ARP of a router's": asks(otherMAC, 2, foreign4, foreign4),
			"ND of a container's here": solicits(otherMAC, near6, s6), "advertisement of a container's here": tells(allNodesMAC, otherMAC, other6, allNodes, s6, 0x20),
			"advertisement from a container's here": tells(allNodesMAC, otherMAC, s6, allNodes, other6, 0x20),
			"advertisement of a router's":           tells(allNodesMAC, otherMAC, otherLL, allNodes, foreign6, 0x20),
		},
		bpf.LaceReasonREASON_MALFORMED: {
			"ND from afar":            ethIP(solicitedGroupMC, otherMAC, hops(nd(other6, solicitedGroup, 135, 0, s6.AsSlice()), 254).bytes()),
			"ARP of another hardware": func() []byte { f := asks(otherMAC, 1, other4, s4); f[15] = 6; return f }(),
			"ARP cut short":           asks(otherMAC, 1, other4, s4)[:41], "ND cut short": ethIP(sMAC, otherMAC, nd(other6, s6, 135, 0, s6.AsSlice()[:15]).bytes()),
		},
	} {
		for name, frame := range frames {
			rows = append(rows, row{name: maps.ReasonName(reason) + ": " + name, frame: fromUnderlay(asking(frame)), verdict: shot, reason: reason})
		}
	}
	return rows
}

func TestSegmentNode(t *testing.T) {
	decidedByNoKernel(t)
	runRows(t, segmentNodeRows())
}

// TestQuestionCrossesOnce: a container asks, its node asks the one that has the address, and that answers; every byte, every form.
func TestQuestionCrossesOnce(t *testing.T) {
	decidedByNoKernel(t)
	b := newBed(t)
	for name, srh := range map[string]bool{"reduced": false, "srh": true} {
		one, two := newNode(t, b, options{number: 1, l2: true, srh: srh}), newNode(t, b, options{number: 2, l2: true, srh: srh, changeProto: srh})
		for question, c := range map[string]struct{ asked, answer []byte }{
			"ARP": {asks(sMAC, 1, s4, other4), eth(sMAC, otherMAC, typeARP, arp(2, otherMAC, other4, sMAC, s4))}, "ND": {solicits(sMAC, s6, other6), tells(sMAC, otherMAC, other6, s6, other6, 0x60)},
			"ND for link-local": {solicits(sMAC, ownLL, otherLL), tells(sMAC, otherMAC, otherLL, ownLL, otherLL, 0x60)},
			"ARP for a machine": {asks(sMAC, 1, s4, away4), eth(sMAC, awayMAC, typeARP, arp(2, awayMAC, away4, sMAC, s4))},
		} {
			t.Run(name+" "+question, func(t *testing.T) {
				one, two := one.on(t), two.on(t)
				out := one.run(input{program: "pod_l2", dev: podA, frame: c.asked})
				wantCounted(t, out, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
				back := two.run(input{program: "uplink", dev: uplink, frame: atUplink(two, out.out)})
				wantCounted(t, back, redirect, bpf.LaceReasonREASON_NEIGHBOUR_ANSWERED)
				in := one.run(input{program: "uplink", dev: uplink, frame: atUplink(one, slices.Clone(back.out))})
				wantCounted(t, in, redirect, bpf.LaceReasonREASON_DECAPSULATED)
				arrived(podA, c.answer)(t, one, in, nil)
				if len(one.flows())+len(two.flows()) != 0 {
					t.Error("a question has made flows")
				}
			})
		}
	}
}
