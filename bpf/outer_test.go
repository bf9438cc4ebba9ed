// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lace-net/lace/bpf"
	lacemaps "github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

var outsideMAC = [...]plan.MAC{wan: {2, 0, 0, 0, 0xef, 2 * wan}, wan2: {2, 0, 0, 0, 0xef, 2 * wan2}, hostSide: {2, 0, 0, 0, 0xef, 2 * hostSide},
	hostPeer: {2, 0, 0, 0, 0xef, 2*hostSide + 1}, loopDev: {}}

// outerRow is a packet at a program of what is not of the overlay.
func outerRow(name, program string, dev int, p ip) row {
	from := hopOf(dev)
	switch dev {
	case hostPeer:
		from = outsideMAC[hostSide]
	case loopDev:
		from = plan.MAC{}
	}
	return row{name: name, opts: options{outside: true}, program: program, dev: dev, frame: ethIP(outsideMAC[dev], from, p.bytes())}
}

// forFamilies are rows of both, whose names say which.
func forFamilies(f func(w world) []row) (rows []row) {
	for suffix, v6 := range map[string]bool{"": false, ", IPv6": true} {
		for _, r := range f(worlds[v6]) {
			r.name += suffix
			rows = append(rows, r)
		}
	}
	return rows
}

func outerRows() []row {
	rows := append(forFamilies(hostsOwnRows), foreignFrameRows()...)
	if !testing.Short() {
		rows = append(rows, forFamilies(hostsOwnElsewhere)...)
	}
	rows = append(rows, forFamilies(closedOuterRows)...)
	rows = append(rows, forFamilies(enteredRows)...)
	rows = append(rows, forFamilies(exitRows)...)
	rows = append(rows, forFamilies(outerSizeRows)...)
	return append(rows, failedOutRows()...)
}

func TestOuter(t *testing.T) { runRows(t, outerRows()) }

// hostsOwnRows are the host's own packets: they pass as they are, at an interface, at an uplink, and at lo.
func hostsOwnRows(w world) []row {
	ask, answer := uint8(8), uint8(0)
	if w.own.Is6() {
		ask, answer = 128, 129
	}
	id := []byte{0, 7, 0, 1}
	own := udp(w.own, w.client, 33000, 53, 30)
	big := udp(w.client, w.own, 53, 33000, 64)
	published := cut(udp(w.client, w.own, 1000, 8080, 64), 9, 24, 48)
	var rows []row
	for name, p := range map[string]ip{
		"TCP to a service":                             segment(w.client, w.own, 1000, 22, "S", 1, 0, 0),
		"TCP to a port of another protocol":            segment(w.client, w.own, 1000, 5353, "S", 1, 0, 0),
		"UDP to a port of another protocol":            udp(w.client, w.own, 1000, 8080, 3),
		"to a port of another address":                 segment(w.client, w.own2, 1000, 8443, "S", 1, 0, 0),
		"to a port of the range":                       udp(w.client, w.own, 53, 20000, 30),
		"an answer to the host":                        segment(w.server, w.own, 443, 33000, "SA", 1, 1, 0),
		"a reset to a published port":                  segment(w.client, w.own, 1000, 22, "R", 1, 0, 0),
		"echo":                                         icmp(w.client, w.own, ask, 0, id),
		"echo reply":                                   icmp(w.client, w.own, answer, 0, id),
		"error about what the host sent":               complaint(w.client, w.own, 3, own.bytes()),
		"error about nothing":                          complaint(w.client, w.own, 3, nil),
		"first fragment":                               cut(big, 9, 0, 24),
		"later fragment":                               cut(big, 10, 24, 48),
		"later fragment of nothing known":              published,
		"another protocol":                             {src: w.client, dst: w.own, proto: 47, body: make([]byte, 30)},
		"a protocol without a body":                    {src: w.client, dst: w.own, proto: 253},
		"through the host":                             udp(w.client, w.server, 1, 2, 30),
		"to a container that outsiders cannot address": udp(w.client, netip.MustParseAddr("10.99.0.1"), 1, 2, 30),
		"from an address in no external network":       udp(w.stranger, w.own, 1, 2, 30),
		"last hop":                                     hops(udp(w.client, w.own, 1, 2, 30), 1),
	} {
		if p.src.Is4() != p.dst.Is4() {
			continue
		}
		rows = append(rows, outerRow("pass "+name, "outer", wan, p))
	}
	rows = append(rows, outerRow("pass at lo to a port, from an address that is not the host's", "loopback", loopDev, segment(w.neighbour, w.own, 1000, 8080, "S", 1, 0, 0)))
	for i := range rows {
		rows[i].verdict = pass
	}
	return rows
}

// hostsOwnElsewhere are the same at an uplink and, from the host to itself, at lo.
func hostsOwnElsewhere(w world) (rows []row) {
	for _, r := range hostsOwnRows(w) {
		if r.program != "outer" {
			continue
		}
		name, up := strings.TrimPrefix(r.name, "pass "), r
		up.name, up.program = "pass at the uplink "+name, "uplink"
		rows = append(rows, up)
		if self, ok := toItself(w, r.frame); ok {
			r.name, r.program, r.dev, r.frame = "pass at lo "+name, "loopback", loopDev, self
			rows = append(rows, r)
		}
	}
	return rows
}

// toItself is a frame of the partner's client as the host would send it to itself. False: it is of another, or not to the host. Checksums are of no
// concern.
func toItself(w world, frame []byte) ([]byte, bool) {
	frame = slices.Clone(frame)
	from, to, length := 14+12, 14+16, 4
	if w.own.Is6() {
		from, to, length = 14+8, 14+24, 16
	}
	if !slices.Equal(frame[from:from+length], w.client.AsSlice()) || !slices.Equal(frame[to:to+length], w.own.AsSlice()) {
		return nil, false
	}
	copy(frame, make([]byte, 12))
	copy(frame[from:], w.own.AsSlice())
	return frame, true
}

// foreignFrameRows are frames that are no packet for this host, and packets that are none; they pass.
func foreignFrameRows() []row {
	w := worlds[false]
	open := segment(w.neighbour, w.own, 1000, 8080, "S", 1, 0, 0)
	overheard, group, broadcast := outerRow("", "outer", wan, open).frame, outerRow("", "outer", wan, open).frame, outerRow("", "outer", wan, open).frame
	copy(overheard, nexthopDst[:])
	copy(group, allNodesMAC[:])
	copy(broadcast, broadcastMAC[:])
	tag := slices.Insert(slices.Clone(outerRow("", "outer", wan, open).frame), 12, 0x81, 0, 0, 5)
	short, long, version, header := open.bytes(), open.bytes(), open.bytes(), open.bytes()
	binary.BigEndian.PutUint16(short[2:], 19)
	binary.BigEndian.PutUint16(long[2:], uint16(len(long)+1))
	version[0], header[0] = 0x65, 0x44
	rows := []row{{name: "pass a tagged frame", tag: vlan{typeVLAN, 5}, frame: outerRow("", "outer", wan, open).frame}}
	for name, frame := range map[string][]byte{
		"overheard": overheard, "to a group": group, "broadcast": broadcast, "a tag in the packet": tag, "LLDP": eth(outsideMAC[wan], wanHop, 0x88cc, make([]byte, 50)),
		"ARP":                     eth(outsideMAC[wan], wanHop, typeARP, arp(1, wanHop, w.neighbour, plan.MAC{}, w.own)),
		"solicitation":            ethIP(solicitedMAC, wanHop, nd(worlds[true].neighbour, solicitedNode, 135, 0, worlds[true].own.AsSlice()).bytes()),
		"unicast ND":              ethIP(outsideMAC[wan], wanHop, nd(worlds[true].neighbour, worlds[true].own, 135, 0, worlds[true].own.AsSlice()).bytes()),
		"shorter than its header": ethIP(outsideMAC[wan], wanHop, short), "longer than the frame": ethIP(outsideMAC[wan], wanHop, long),
		"of another version": eth(outsideMAC[wan], wanHop, typeV4, version), "a header too short": eth(outsideMAC[wan], wanHop, typeV4, header),
		"mapped addresses": ethIP(outsideMAC[wan], wanHop, segment(netip.AddrFrom16(w.neighbour.As16()), netip.AddrFrom16(w.own.As16()), 1, 8080, "S", 1, 0, 0).bytes()),
		"TCP cut short":    ethIP(outsideMAC[wan], wanHop, ip{src: w.neighbour, dst: w.own, proto: protoTCP, body: []byte{0, 1, 0x1f, 0x90, 0, 0, 0, 0}}.bytes()),
	} {
		rows = append(rows, row{name: "pass " + name, frame: frame})
	}
	for i := range rows {
		rows[i].opts.outside, rows[i].program, rows[i].dev, rows[i].verdict = true, "outer", wan, pass
	}
	noOutside := func(n *node) {
		p := *n.plan
		p.Externals = nil
		n.sync(&p)
	}
	without := outerRow("pass without external networks", "outer", wan, open)
	without.prepare, without.verdict = noOutside, pass
	return append(rows, without)
}

// closedOuterRows are for containers, and may not come to them: nobody outside is told, the host's own processes are.
func closedOuterRows(w world) []row {
	spoofed, noPeering, noExternal := bpf.LaceReasonREASON_SPOOFED_ADDRESS, bpf.LaceReasonREASON_NO_PEERING, bpf.LaceReasonREASON_NO_EXTERNAL
	noEndpoint := bpf.LaceReasonREASON_NO_ENDPOINT
	outside := int(topology.OutsideID)
	empty := map[bool]netip.Addr{false: ipOf("10.40.1.99"), true: ipOf("fd40:0:1::99")}[w.own.Is6()]
	drop := func(name string, p ip, reason bpf.LaceReason, network int) row {
		r := outerRow("closed "+name, "outer", wan, p)
		r.verdict, r.reason, r.network = shot, reason, network
		return r
	}
	syn := func(from, to netip.Addr, port uint16) ip { return segment(from, to, 1000, port, "S", 1, 0, 0) }
	rows := []row{
		drop("from the host's address to a container", syn(w.own, w.a, 80), spoofed, outside),
		drop("from the host's address to a port", syn(w.own, w.own, 8080), spoofed, outside),
		drop("from the host's other address to a port", syn(w.own2, w.own, 8080), spoofed, outside),
		drop("from a container's address", syn(w.b, w.a, 80), spoofed, outside),
		drop("from a container's address to a port", syn(w.a, w.own, 8080), spoofed, outside),
		drop("from another node's container", syn(w.far, w.a, 80), spoofed, outside),
		drop("from no external network", syn(w.stranger, w.a, 80), noExternal, outside),
		drop("from no external network to a port", syn(w.stranger, w.own, 8080), noExternal, outside),
		drop("without a peering", syn(w.server, w.a, 80), noPeering, int(internet)),
		drop("without a peering to a port", syn(w.server, w.own, 8080), noPeering, int(internet)),
		drop("of another external network to a port", syn(w.client, w.own, 8080), noPeering, int(partner)),
		drop("by the longer prefix to a port", syn(w.longer, w.own, 8080), noPeering, int(partner)),
		drop("to nobody", syn(w.client, empty, 80), noEndpoint, int(partner)),
		drop("UDP without a peering to a port", udp(w.client, w.own, 1000, 5353, 9), noPeering, int(partner)),
		drop("out of hops without a peering", hops(syn(w.server, w.a, 80), 1), noPeering, int(internet)),
		drop("out of hops from no external network", hops(syn(w.stranger, w.own, 8080), 1), noExternal, outside),
	}
	return append(rows, closedHostRows(w)...)
}

// closedHostRows: the host's processes may not reach what they are not let.
func closedHostRows(w world) []row {
	told := func(r row, reason bpf.LaceReason, network int) row {
		r.verdict, r.reason, r.network = redirect, reason, network
		r.check = func(t testing.TB, _ *node, r result, in []byte) {
			t.Helper()
			kind, code := uint8(3), uint8(13)
			if w.own.Is6() {
				kind, code = 1, 1
			}
			to, from := outsideMAC[hostSide], plan.GatewayMAC
			if r.ctx.Outside.Side == 3 {
				to, from = plan.MAC{}, plan.MAC{}
			}
			wantFrame(t, r.out, errorFrom(destination(in), to, from, in[14:], kind, code, 0))
			goodChecksums(t, r.out)
		}
		return r
	}
	syn := func(from, to netip.Addr, port uint16) ip { return segment(from, to, 1000, port, "S", 1, 0, 0) }
	many := outerRow("closed to the host: what it tells everybody by each of its interfaces", "host", hostPeer, udp(w.own, manyOf(w), 1, 5353, 9))
	many.verdict, many.reason, many.network = shot, bpf.LaceReasonREASON_MULTICAST, int(topology.HostsID)
	closed := outerRow("closed to the host: a network without host", "host", hostPeer, syn(w.own, w.db, 80))
	noRoute := outerRow("closed to the host: no container's address", "host", hostPeer, syn(w.own, w.server, 80))
	lo := outerRow("closed to the host: by an address in no external network", "loopback", loopDev, syn(w.own2, w.own2, 8080))
	through := outerRow("closed to who comes through the host", "host", hostPeer, syn(w.server, w.a, 80))
	link := outerRow("closed to the host: from an address in no external network", "host", hostPeer, syn(w.stranger, w.a, 80))
	return []row{
		many,
		told(closed, bpf.LaceReasonREASON_NO_ROUTE, int(topology.HostsID)), told(noRoute, bpf.LaceReasonREASON_NO_ROUTE, int(topology.HostsID)),
		told(lo, bpf.LaceReasonREASON_NO_PEERING, int(topology.HostsID)), told(through, bpf.LaceReasonREASON_NO_PEERING, int(internet)),
		told(link, bpf.LaceReasonREASON_NO_EXTERNAL, int(topology.OutsideID)),
	}
}

// manyOf is a multicast address.
func manyOf(w world) netip.Addr {
	if w.own.Is6() {
		return ipOf("ff02::fb")
	}
	return ipOf("224.0.0.251")
}

func destination(frame []byte) netip.Addr {
	if frame[14]>>4 == 4 {
		return netip.AddrFrom4([4]byte(frame[30:]))
	}
	return netip.AddrFrom16([16]byte(frame[38:]))
}

// enteredRows come to a container.
func enteredRows(w world) []row {
	var rows []row
	add := func(name, program string, dev int, p ip, reason bpf.LaceReason, to int, want ip) {
		r := outerRow("in "+name, program, dev, p)
		r.verdict, r.reason, r.network = redirect, reason, int(host{1, to}.network())
		r.check = func(t testing.TB, n *node, r result, _ []byte) {
			if program == "host" || program == "loopback" {
				wantDelivered(t, n, r, to, want.bytes())
				return
			}
			wantDelivered(t, n, r, to, afterHop(want))
		}
		rows = append(rows, r)
	}
	for _, s := range ordinary {
		from := at(w.client, 40000)
		add(s.name+" to an address", "outer", wan, s.ask(from, at(w.a, 80)), ingress, podA, s.ask(from, at(w.a, 80)))
		add(s.name+" to an address by the second interface", "outer", wan2, s.ask(from, at(w.b, 80)), ingress, podB, s.ask(from, at(w.b, 80)))
		add(s.name+" by the uplink", "uplink", wan, s.ask(from, at(w.a, 80)), ingress, podA, s.ask(from, at(w.a, 80)))
		own := at(w.own, 40000)
		add(s.name+" of the host", "host", hostPeer, s.ask(own, at(w.a, 80)), fromHost, podA, s.ask(own, at(w.a, 80)))
		add(s.name+" through the host", "host", hostPeer, s.ask(from, at(w.a, 80)), fromHost, podA, s.ask(from, at(w.a, 80)))
		if s.name == "echo" {
			continue
		}
		port, to, at80 := uint16(8080), podD, at(w.db, 80)
		if s.name == "UDP" {
			port, at80 = 5353, at(w.db, 53)
		}
		near := at(w.neighbour, 40000)
		add(s.name+" to a port", "outer", wan, s.ask(near, at(w.own, port)), ingress, to, s.ask(near, at80))
		add(s.name+" to a port of the second interface", "outer", wan2, s.ask(near, at(w.own2, port)), ingress, to, s.ask(near, at80))
		add(s.name+" of the host to a port", "loopback", loopDev, s.ask(own, at(w.own, port)), fromHost, to, s.ask(own, at80))
		add(s.name+" of the host to a port of its own network", "loopback", loopDev, s.ask(own, at(w.own, 7000)), fromHost, podA, s.ask(own, at(w.a, 7000)))
		add(s.name+" to a port by the partner", "outer", wan, s.ask(from, at(w.own, 7000)), ingress, podA, s.ask(from, at(w.a, 7000)))
	}
	add("to a port of one address", "outer", wan, speakTCP(at(w.client, 9), at(w.own, 8443), false), ingress, podB, speakTCP(at(w.client, 9), at(w.b, 443), false))
	return rows
}

// exitRows are what a container may not, or cannot, send out.
func exitRows(w world) []row {
	noRoute, noEgress, closed := bpf.LaceReasonREASON_NO_ROUTE, bpf.LaceReasonREASON_NO_EGRESS, bpf.LaceReasonREASON_HOST_CLOSED
	told := func(name string, dev int, p ip, reason bpf.LaceReason) row {
		return row{name: "out " + name, opts: options{outside: true}, dev: dev, frame: toGateway(1, dev, p), verdict: redirect, reason: reason,
			check: toldContainer(dev, 13, 0)}
	}
	with := func(r row, prepare func(n *node)) row { r.prepare = prepare; return r }
	syn := func(from, to netip.Addr, port uint16) ip { return segment(from, to, 1000, port, "S", 1, 0, 0) }
	odd := ip{src: w.a, dst: w.server, proto: 47, body: make([]byte, 20)}
	noAddress := func(n *node) {
		must(n.t, n.maps.SyncEgresses([]lacemaps.Egress{{Index: uint32(n.bed.index[wan])}}))
	}
	noHost := func(n *node) { must(n.t, n.maps.SyncHost(lacemaps.Host{})) }
	rows := []row{
		told("to no external network", podA, syn(w.a, w.stranger, 80), noRoute),
		told("to the host's address in no external network", podA, syn(w.a, w.own2, 22), noRoute),
		told("to a port at an address in no external network", podX, syn(w.x, w.own2, 8080), noRoute),
		told("to a port that its network may not reach", podX, syn(w.x, w.own, 7000), bpf.LaceReasonREASON_NO_PEERING),
		told("to the host without host", podD, syn(w.db, w.own, 22), closed),
		told("to the host without host, overlapping", podX, syn(w.x, w.own, 22), closed),
		told("where the host has no route", podA, syn(w.a, w.refused, 80), noEgress),
		told("by an interface that nothing is seen of", podA, syn(w.a, w.blind, 80), noEgress),
		told("to the peered network's own prefix", podD, syn(w.db, w.client, 80), noRoute),
		told("masquerade of another protocol", podA, odd, bpf.LaceReasonREASON_NOT_TRANSLATABLE),
		with(told("without an address of the host", podA, syn(w.a, w.server, 80), bpf.LaceReasonREASON_NO_HOST_ADDRESS), noAddress),
		with(told("without lc-host", podA, syn(w.a, w.server, 80), noEgress), noHost),
	}
	for i := range rows {
		if rows[i].name == "out to a port that its network may not reach" || rows[i].dev != podA {
			rows[i].network = int(host{1, rows[i].dev}.network())
		}
	}
	return rows
}

// toldContainer wants the gateway's "prohibited" of node 1, for containers of all networks.
func toldContainer(dev int, code4 uint8, mtu uint32) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, n *node, r result, in []byte) {
		t.Helper()
		h := host{1, dev}
		kind, code, from := uint8(3), code4, gateway4(1)
		if h.network() == db {
			from = dbSubnet4(1, 1)
		}
		if in[14]>>4 == 6 {
			kind, code, from = 1, 1, gateway6(1)
			if mtu != 0 {
				kind, code = 2, 0
			}
			if h.network() == db {
				from = dbSubnet6(1, 1)
			}
		}
		wantFrame(t, r.out, errorFrom(from, macOf(1, dev), plan.GatewayMAC, in[14:], kind, code, mtu))
		goodChecksums(t, r.out)
	}
}

// outerSizeRows are too large for their way, or out of hops.
func outerSizeRows(w world) []row {
	tooBig, hop := bpf.LaceReasonREASON_TOO_BIG, bpf.LaceReasonREASON_HOP_LIMIT
	over := map[bool]int{false: 27, true: 47}[w.own.Is6()] // one byte more than headers
	toOutside := func(r row, reason bpf.LaceReason, network int, from netip.Addr, kind, code uint8, mtu uint32) row {
		r.verdict, r.reason, r.network = redirect, reason, network
		r.check = func(t testing.TB, _ *node, r result, in []byte) {
			t.Helper()
			to, mac := plan.MAC(in[6:12]), plan.MAC(in[:6])
			if r.ctx.Outside.Side == 2 {
				mac = plan.GatewayMAC
			}
			wantFrame(t, r.out, errorFrom(from, to, mac, in[14:], kind, code, mtu))
			goodChecksums(t, r.out)
		}
		return r
	}
	big, expired := [2]uint8{3, 4}, [2]uint8{11, 0}
	if w.own.Is6() {
		big, expired = [2]uint8{2, 0}, [2]uint8{3, 0}
	}
	rows := []row{
		toOutside(outerRow("too big from outside to another node", "outer", wan, udp(w.client, w.far, 1, 2, podMTU-over)), tooBig, int(partner), w.own, big[0], big[1], podMTU),
		toOutside(outerRow("too big from the host to another node", "host", hostPeer, udp(w.own, w.far, 1, 2, podMTU-over)), tooBig, int(topology.HostsID), w.far, big[0], big[1], podMTU),
		toOutside(outerRow("out of hops from outside", "outer", wan, hops(udp(w.client, w.a, 1, 2, 9), 1)), hop, int(partner), w.own, expired[0], expired[1], 0),
		toOutside(outerRow("out of hops to a port", "outer", wan2, hops(udp(w.neighbour, w.own2, 1, 5353, 9), 1)), hop, int(premises), w.own2, expired[0], expired[1], 0),
	}
	// The container's own end of a veth takes more than it may send.
	for name, r := range map[string]row{
		"from outside": outerRow("", "outer", wan, udp(w.client, w.a, 1, 2, linkMTU-over)), "from the host": outerRow("", "host", hostPeer, udp(w.own, w.a, 1, 2, linkMTU-over)),
	} {
		r.name, r.verdict, r.reason, r.network, r.check = "larger than a container may send, "+name, redirect, ingress, int(backend), unchecked
		if r.program == "host" {
			r.reason = fromHost
		}
		rows = append(rows, r)
	}
	last := outerRow("last hop of the host's", "host", hostPeer, hops(udp(w.own, w.a, 1, 2, 9), 1))
	last.verdict, last.reason, last.check = redirect, fromHost, func(t testing.TB, n *node, r result, _ []byte) {
		wantDelivered(t, n, r, podA, hops(udp(w.own, w.a, 1, 2, 9), 1).bytes())
	}
	last.network = int(backend)
	rows = append(rows, last)
	for name, to := range map[string]netip.Addr{"out": w.server, "out as it is": w.client} {
		p := udp(w.a, to, 1, 2, linkMTU-over)
		rows = append(rows, row{name: "too big " + name, opts: options{outside: true}, frame: fromA(p), verdict: redirect, reason: tooBig, check: toldContainer(podA, 4, linkMTU)})
	}
	p := udp(w.a, w.narrow, 1, 2, narrowMTU-over)
	fits := udp(w.a, w.narrow, 1, 2, narrowMTU-over-1)
	return append(rows, row{name: "too big for the route", opts: options{outside: true}, frame: fromA(p), verdict: redirect, reason: tooBig, check: toldContainer(podA, 4, narrowMTU)},
		row{name: "fits the route", opts: options{outside: true}, frame: fromA(fits), verdict: redirect, reason: egressed, check: unchecked})
}

// failedOutRows are what only a broken data plane shows.
func failedOutRows() []row {
	w := worlds[false]
	open := speakTCP(at(w.neighbour, 9), at(w.own, 8080), false)
	clash := outerRow("clash of the host's flow to a container with one by its port", "loopback", loopDev, speakTCP(at(w.own, 40000), at(w.own, 7000), false))
	clash.before = []input{{program: "host", dev: hostPeer, frame: ethIP(outsideMAC[hostPeer], outsideMAC[hostSide], speakTCP(at(w.own, 40000), at(w.a, 7000), false).bytes())}}
	clash.verdict, clash.reason, clash.network = shot, bpf.LaceReasonREASON_FLOW_CLASH, int(topology.HostsID)
	missing := outerRow("no stage: enter", "outer", wan, open)
	missing.prepare, missing.verdict, missing.reason, missing.network = emptyStages, shot, bpf.LaceReasonREASON_STAGE_MISSING, int(topology.OutsideID)
	full := row{name: "no port is left", prepare: withoutPorts, frame: fromA(udp(w.a, w.server, 900, 80, 9)), verdict: redirect, reason: bpf.LaceReasonREASON_PORTS_EXHAUSTED, check: toldContainer(podA, 13, 0)}
	toHostRow := row{name: "to the host", frame: fromA(udp(w.a, w.own, 900, 53, 9)), verdict: redirect, reason: toHost, check: unchecked}
	noChecksum := ip{src: w.a, dst: w.server, proto: protoUDP, body: []byte{0, 1, 0, 2, 0, 6}}
	short := row{name: "no place for a checksum", frame: fromA(noChecksum), verdict: shot, reason: bpf.LaceReasonREASON_TRANSLATION_FAILED, check: unchecked}
	rows := []row{clash, missing, full, toHostRow, short}
	for i := range rows {
		rows[i].opts.outside = true
	}
	return rows
}

// withoutPorts leaves no port of a small range for flows to the first server's port 80.
func withoutPorts(n *node) {
	n.t.Helper()
	p := n.buildOutside()
	p.Masquerade = topology.Masquerade{First: 20000, Last: 20255}
	n.sync(p)
	w := worlds[false]
	n.exhaust(ordinary[1], w, at(w.server, 80))
	for i := range uint16(100) { // tries are bounded: some may still be left
		n.run(atPort(podA, udp(w.a, w.server, 5000+i, 80, 9)))
		n.forget()
	}
}
