// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// toGateway is a frame that a container of a node sends on its way.
func toGateway(number, dev int, p ip) []byte {
	return ethIP(plan.GatewayMAC, macOf(number, dev), p.bytes())
}

// encapsulated is the frame that should leave node from; the flow label is taken from got.
func encapsulated(t testing.TB, from, to *node, id topology.NetworkID, p ip, got []byte) []byte {
	t.Helper()
	inner := afterHop(p)
	sid := to.locator().SID(topology.EndDT46, id)
	next := uint8(protoV6)
	if p.src.Is4() {
		next = protoIPIP
	}
	o := ip{src: from.locator().Source(id, 0), dst: sid.Addr, class: p.class, proto: next, body: inner}
	if from.opts.srh {
		o.proto, o.body = extRouting, segmentHeader(next, sid.Addr, inner)
	}
	if len(got) > 18 {
		o.label = binary.BigEndian.Uint32(got[14:]) & 0xfffff
	}
	if o.label == 0 {
		t.Error("the flow label is 0")
	}
	return ethIP(nexthopDst, nexthopSrc, o.bytes())
}

// atUplink is a frame as the receiver's uplink gets it: with that interface's MAC address.
func atUplink(n *node, frame []byte) []byte {
	out := append([]byte{}, frame...)
	copy(out, n.bed.mac[uplink][:])
	return out
}

func wantCounted(t testing.TB, r result, verdict uint32, reasons ...bpf.LaceReason) {
	t.Helper()
	if r.verdict != verdict || !sameReasons(r.counted, reasons) {
		t.Errorf("verdict %d, counted %v; want %d, %v", int32(r.verdict), words(r.counted), int32(verdict), words(reasons))
	}
}

// travel sends a packet from a container of one node to one of the other, and checks every byte on its way.
func travel(t testing.TB, from, to *node, dev int, p ip) {
	t.Helper()
	r := from.run(input{program: "pod_l3", dev: dev, frame: toGateway(from.opts.number, dev, p)})
	wantCounted(t, r, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
	if r.ctx.Peer != uint32(to.opts.number) || r.ctx.Network != uint32(networkOf(dev)) {
		t.Errorf("goes to peer %d in network %d", r.ctx.Peer, r.ctx.Network)
	}
	wantFrame(t, r.out, encapsulated(t, from, to, networkOf(dev), p, r.out))

	again := from.run(input{program: "pod_l3", dev: dev, frame: toGateway(from.opts.number, dev, p)})
	wantFrame(t, again.out, r.out) // the flow label is the flow's

	r = to.run(input{program: "uplink", dev: uplink, frame: atUplink(to, r.out)})
	wantCounted(t, r, redirect, bpf.LaceReasonREASON_DECAPSULATED)
	wantDelivered(t, to, r, dev, afterHop(p))
}

// travelBehind lets the first fragment go before a later one.
func travelBehind(t testing.TB, from, to *node, dev int, p ip) {
	t.Helper()
	if first, later := firstOf(p); later {
		travel(t, from, to, dev, first)
	}
	travel(t, from, to, dev, p)
}

// wantDelivered wants a packet at a container of the node.
func wantDelivered(t testing.TB, n *node, r result, dev int, packet []byte) {
	t.Helper()
	if r.ctx.Ifindex != uint32(n.bed.index[dev]) {
		t.Errorf("delivered to interface %d, want %d", r.ctx.Ifindex, n.bed.index[dev])
	}
	wantFrame(t, r.out, ethIP(macOf(n.opts.number, dev), plan.GatewayMAC, packet))
}

// TestLife is a packet's life: out of a container, over the underlay, into a container; in all forms, sizes and
// lengths of locators.
func TestLife(t *testing.T) {
	b := newBed(t)
	for _, srh := range []bool{false, true} {
		for _, changeProto := range []bool{false, true} {
			t.Run(fmt.Sprintf("srh=%v,change_proto=%v", srh, changeProto), func(t *testing.T) {
				one := newNode(t, b, options{number: 1, srh: srh})
				two := newNode(t, b, options{number: 2, srh: srh, changeProto: changeProto})
				for name, p := range lives(podA, srh) {
					t.Run(name, func(t *testing.T) { travelBehind(t, one.on(t), two.on(t), podA, p) })
				}
				for name, p := range lives(podX, srh) {
					t.Run("overlap "+name, func(t *testing.T) { travelBehind(t, one.on(t), two.on(t), podX, p) })
				}
			})
		}
	}
}

// on is the node within a subtest.
func (n *node) on(t testing.TB) *node {
	c := *n
	c.t = t
	return &c
}

// lives are the packets that travel, from a container of node 1 to its twin on node 2.
func lives(dev int, srh bool) map[string]ip {
	src4, dst4, src6, dst6 := v4Of(1, dev), v4Of(2, dev), v6Of(1, dev), v6Of(2, dev)
	room := linkMTU - 40
	if srh {
		room -= 24
	}
	class := func(p ip, class uint8) ip { p.class = class; return p }
	hops := func(p ip, hops uint8) ip { p.hops = hops; return p }
	options := udp(src4, dst4, 1000, 2000, 3)
	options.options = []byte{1, 1, 1, 1, 148, 4, 0, 0} // no operation, router alert
	most := udp(src4, dst4, 1000, 2000, 3)
	most.options = make([]byte, 40)
	first := udp(src4, dst4, 1000, 2000, 64)
	first.frag = 0x2000
	later := ip{src: src4, dst: dst4, proto: protoUDP, frag: 0x2000 | 9, body: []byte{0, 67, 0, 68, 1, 2, 3, 4}}
	dont := udp(src4, dst4, 1000, 2000, 3)
	dont.frag = 0x4000
	hopByHop := udp(src6, dst6, 1000, 2000, 3)
	hopByHop.body, hopByHop.proto = extension(protoUDP, [7]byte{0, 1, 4}, hopByHop.body), extHop
	fragment6 := ip{src: src6, dst: dst6, proto: extFragment,
		body: extension(protoUDP, [7]byte{0, 0, 9 << 3, 0, 0, 0, 7}, []byte{0, 67, 0, 68})}
	return map[string]ip{
		"v4 bare header":     {src: src4, dst: dst4, proto: 253},
		"v4 empty UDP":       udp(src4, dst4, 1000, 2000, 0),
		"v4 odd length":      udp(src4, dst4, 1000, 2000, 101),
		"v4 TCP":             tcp(src4, dst4, 10),
		"v4 ICMP":            icmp(src4, dst4, 8, 0, []byte{1, 2, 3, 4}),
		"v4 fills the MTU":   udp(src4, dst4, 1000, 2000, room-28),
		"v4 options":         options,
		"v4 all options":     most,
		"v4 first fragment":  first,
		"v4 later fragment":  later,
		"v4 do not fragment": dont,
		"v4 class":           class(udp(src4, dst4, 1000, 2000, 5), 0xb8|2),
		"v4 congested":       class(udp(src4, dst4, 1000, 2000, 5), 3),
		"v4 last hop":        hops(udp(src4, dst4, 1000, 2000, 5), 2),
		"v4 most hops":       hops(udp(src4, dst4, 1000, 2000, 5), 255),
		"v6 bare header":     {src: src6, dst: dst6, proto: extNone},
		"v6 empty UDP":       udp(src6, dst6, 1000, 2000, 0),
		"v6 odd length":      udp(src6, dst6, 1000, 2000, 101),
		"v6 TCP":             tcp(src6, dst6, 10),
		"v6 ICMP":            icmp(src6, dst6, 128, 0, []byte{1, 2, 3, 4}),
		"v6 fills the MTU":   udp(src6, dst6, 1000, 2000, room-48),
		"v6 hop by hop":      hopByHop,
		"v6 later fragment":  fragment6,
		"v6 class":           class(udp(src6, dst6, 1000, 2000, 5), 0xb8|1),
		"v6 congested":       class(udp(src6, dst6, 1000, 2000, 5), 3),
		"v6 last hop":        hops(udp(src6, dst6, 1000, 2000, 5), 2),
	}
}

// TestLocators sends over locators of many lengths.
func TestLocators(t *testing.T) {
	decidedByNoKernel(t)
	b := newBed(t)
	for _, bits := range []int{32, 33, 40, 45, 47, 48, 49, 56, 61, 63, 64} {
		t.Run(fmt.Sprint("/", bits), func(t *testing.T) {
			one := newNode(t, b, options{number: 1, locatorBits: bits})
			two := newNode(t, b, options{number: 2, locatorBits: bits})
			travel(t, one, two, podA, udp(v4Of(1, podA), v4Of(2, podA), 1, 2, 9))
			travel(t, one, two, podX, udp(v6Of(1, podX), v6Of(2, podX), 1, 2, 9))
			travel(t, two, one, podB, tcp(v6Of(2, podB), v6Of(1, podB), 9))
		})
	}
}

// TestFlowLabel: each flow has one, and two flows rarely the same.
func TestFlowLabel(t *testing.T) {
	one := newNode(t, newBed(t), options{number: 1})
	seen := map[uint32]bool{}
	for port := range uint16(64) {
		p := udp(v4Of(1, podA), v4Of(2, podA), 1000+port, 2000, 0)
		r := one.run(input{program: "pod_l3", dev: podA, frame: toGateway(1, podA, p)})
		seen[binary.BigEndian.Uint32(r.out[14:])&0xfffff] = true
	}
	if seen[0] || len(seen) < 32 {
		t.Errorf("64 flows have %d flow labels, 0 among them: %v", len(seen), seen[0])
	}
}

// TestBlocks: the longest block that holds the destination says where it is.
func TestBlocks(t *testing.T) {
	b := newBed(t)
	far := func(prefix string, peer uint32) plan.Block {
		return plan.Block{Network: backend, Prefix: netip.MustParsePrefix(prefix), Peer: peer,
			SID: locatorOf(int(peer), 48).SID(topology.EndDT46, backend)}
	}
	n := newNode(t, b, options{number: 1, bits4: plan.Lengths{32, 28, 24, 16}, bits6: plan.Lengths{128, 65, 64, 48},
		blocks: []plan.Block{
			far("10.40.2.77/32", 1), far("10.40.2.64/28", 3), far("10.40.0.0/16", 3),
			far("fd40:0:2::77/128", 1), far("fd40:0:2:0:8000::/65", 3), far("fd40::/48", 3),
		}})
	for dst, peer := range map[string]uint32{
		"10.40.2.77": 1, "10.40.2.78": 3, "10.40.2.80": 2, "10.40.9.9": 3,
		"fd40:0:2::77": 1, "fd40:0:2:0:8000::1": 3, "fd40:0:2::78": 2, "fd40:0:0:9::1": 3,
	} {
		addr := netip.MustParseAddr(dst)
		src := v4Of(1, podA)
		if addr.Is6() {
			src = v6Of(1, podA)
		}
		r := n.run(input{program: "pod_l3", dev: podA, frame: toGateway(1, podA, udp(src, addr, 1, 2, 0))})
		wantCounted(t, r, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
		if r.ctx.Peer != peer {
			t.Errorf("%s goes to peer %d, want %d", dst, r.ctx.Peer, peer)
		}
	}
}

// TestHeartbeat: without the agent's word the kernel's neighbour table is asked, which leaves the MAC
// addresses of the frame to the kernel.
func TestHeartbeat(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	p := udp(v4Of(1, podA), v4Of(2, podA), 1, 2, 0)
	in := input{program: "pod_l3", dev: podA, frame: toGateway(1, podA, p)}
	ours := func(r result) bool { return plan.MAC(r.out[:6]) == nexthopDst && plan.MAC(r.out[6:12]) == nexthopSrc }

	if r := n.run(in); r.verdict != redirect || !ours(r) {
		t.Errorf("with a heartbeat: verdict %d, % x", r.verdict, r.out[:12])
	}
	must(t, n.coll.Maps["heartbeat"].Put(uint32(0), now(t)-heartbeatLimit-1e9))
	if r := n.run(in); r.verdict != redirect || ours(r) {
		t.Errorf("with an old heartbeat: verdict %d, % x", r.verdict, r.out[:12])
	}
	must(t, n.maps.Beat())
	n.nexthops(nexthop{known: false})
	if r := n.run(in); r.verdict != redirect || ours(r) {
		t.Errorf("with an unknown MAC address: verdict %d, % x", r.verdict, r.out[:12])
	}
	n.nexthops(nexthop{raw: true})
	if r := n.run(in); r.verdict != redirect || ours(r) {
		t.Errorf("over an uplink without Ethernet: verdict %d, % x", r.verdict, r.out[:12])
	}
}

const heartbeatLimit = 120e9 // ns, HEARTBEAT_LIMIT_NS

// now is the clock of the heartbeat. Soon after boot it is less than the limit, and the difference wraps as in C.
func now(t testing.TB) uint64 {
	t.Helper()
	var ts unix.Timespec
	must(t, unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &ts))
	return uint64(ts.Nano())
}
