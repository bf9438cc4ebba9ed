// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"encoding/binary"
	"math"
	"net/netip"
	"strings"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// event is what a node should tell about a frame that came in at an interface; the rest is the caller's.
func (n *node) event(reason bpf.LaceReason, verdict bpf.LaceVerdict, stage bpf.LaceStage, in input) bpf.LaceEvent {
	n.t.Helper()
	e := bpf.LaceEvent{Reason: uint32(reason), Verdict: uint8(verdict), Stage: uint8(stage), Ifindex: uint32(n.bed.index[in.dev]),
		Len: uint32(len(in.frame)), Generation: n.generation(), Ethernet: 1}
	e.HeadLen = uint16(copy(e.Head[:], in.frame))
	return e
}

// wantEvents compares events with those that should have been told: all fields but the time, and the size that
// only an explanation shows.
func wantEvents(t testing.TB, got []bpf.LaceEvent, want ...bpf.LaceEvent) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d events, want %d: %q", len(got), len(want), told(got))
		return
	}
	for i, e := range got {
		if e.Time == 0 {
			t.Error("an event without a time")
		}
		e.Time, e.Mtu = 0, 0
		clear(e.Head[e.HeadLen:]) // what lay in the ring before
		if e != want[i] {
			t.Errorf("told\n%+v, want\n%+v", e, want[i])
		}
	}
}

// line is the line of the topology that lets a conversation pass.
func (c talk) line() uint32 {
	switch {
	case c.a.network() != c.b.network():
		return peeringLine
	case c.a.network() == overlap:
		return overlapLine
	}
	return backendLine
}

// opened are the events of the nodes about the first packet of a conversation.
func (c talk) opened(j journey, p ip) map[int][]bpf.LaceEvent {
	c.t.Helper()
	passed, deliver := bpf.LaceVerdictVERDICT_PASSED, bpf.LaceStageSTAGE_DELIVER
	fill := func(e bpf.LaceEvent) bpf.LaceEvent {
		e.Network, e.To, e.Line = uint32(c.a.network()), uint32(c.b.network()), c.line()
		return e
	}
	near, far := c.nodes[c.a.number], c.nodes[c.b.number]
	sent := input{dev: c.a.dev, frame: toGateway(c.a.number, c.a.dev, p)}
	if len(c.at()) == 1 {
		e := fill(near.event(bpf.LaceReasonREASON_LOCAL, passed, deliver, sent))
		e.Output = uint32(near.bed.index[c.b.dev])
		return map[int][]bpf.LaceEvent{c.a.number: {e}}
	}
	out := fill(near.event(bpf.LaceReasonREASON_ENCAPSULATED, passed, deliver, sent))
	out.Peer, out.Sid.U8 = uint32(c.b.number), far.locator().SID(topology.EndDT46, c.b.network()).As16()
	out.Way = uint8(maps.WayNode)
	in := fill(far.event(bpf.LaceReasonREASON_DECAPSULATED, passed, deliver, input{dev: uplink, frame: atUplink(far, j.sent.out)}))
	in.Peer, in.Sid, in.Output = uint32(c.a.number), out.Sid, uint32(far.bed.index[c.b.dev])
	return map[int][]bpf.LaceEvent{c.a.number: {out}, c.b.number: {in}}
}

// TestNewFlowIsToldOnce: the first packet of a flow gives one event on each node, with all that is known; no later one does,
// nor one that has the flow decided again.
func TestNewFlowIsToldOnce(t *testing.T) {
	p := newPair(t)
	for name, left := range map[string]bpf.LaceContext{"UDP": {}, "TCP": {}, "echo": {}, "UDP after a packet that set all": scribbled(t)} {
		protocol, _, _ := strings.Cut(name, " ")
		t.Run(name, func(t *testing.T) {
			eachTalk(t, p, 0, func(t *testing.T, c talk) {
				for _, n := range c.nodes {
					n.preset = left
				}
				there, back := c.opening(protocol)
				want := c.opened(c.wantPassed(c.a, there), there)
				for _, number := range c.at() {
					wantEvents(t, c.events(number), want[number]...)
				}
				c.wantPassed(c.a, there)
				c.wantPassed(c.b, back)
				for _, number := range c.at() {
					must(t, c.nodes[number].maps.DecideAgain())
				}
				c.wantPassed(c.b, back)
				c.wantPassed(c.a, there)
				for _, number := range c.at() {
					wantEvents(t, c.events(number))
				}
			})
		})
	}
}

// refusal is a packet that node 1 of a pair refuses, and what it tells of it.
type refusal struct {
	in     input
	reason bpf.LaceReason
	stage  bpf.LaceStage
	told   bpf.LaceEvent // networks, line, peer, output, SID and way
}

func refusals() map[string]refusal {
	entry, route, deliver := bpf.LaceStageSTAGE_ENTRY, bpf.LaceStageSTAGE_ROUTE, bpf.LaceStageSTAGE_DELIVER
	own := bpf.LaceEvent{Network: uint32(backend)}
	inside := bpf.LaceEvent{Network: uint32(backend), To: uint32(backend), Line: backendLine}
	away := inside
	away.Peer, away.Sid.U8, away.Way = 2, locatorOf(2, 48).SID(topology.EndDT46, backend).As16(), uint8(maps.WayNode)
	from := func(network, to topology.NetworkID, line uint32) bpf.LaceEvent {
		e := bpf.LaceEvent{Network: uint32(network), To: uint32(to), Line: line, Peer: 2}
		e.Sid.U8 = sidOf(to).As16()
		return e
	}
	over := func(from, to topology.NetworkID, inner ip) input {
		p := overlay(inner)
		p.src, p.dst = locatorOf(2, 48).Source(from, 0), sidOf(to)
		return input{program: "uplink", dev: uplink, frame: fromUnderlay(p)}
	}
	foreigner := overlay(in4)
	foreigner.src = netip.MustParseAddr("5f00:1ace:9:5ce:0:6400::")
	unknown := bpf.LaceEvent{}
	unknown.Sid.U8 = sidOf(backend).As16()
	tail := overlay(in4)
	tail.dst = netip.MustParseAddr("5f00:1ace:1:14:0:6400::1")
	behind := bpf.LaceEvent{Network: uint32(backend), Peer: 2}
	behind.Sid.U8 = tail.dst.As16()
	empty4, nowhere := netip.MustParseAddr("10.40.1.99"), netip.MustParseAddr("192.0.2.1")
	toMulticast := ethIP(plan.MAC{1, 0, 0x5e, 0, 0, 1}, macA, udp(a4, netip.MustParseAddr("224.0.0.1"), 1, 2, 0).bytes())
	return map[string]refusal{
		"spoofed":           {atPod(udp(b4, far4, 1, 2, 9)), bpf.LaceReasonREASON_SPOOFED_ADDRESS, entry, own},
		"not IP":            {input{program: "pod_l3", dev: podA, frame: eth(plan.GatewayMAC, macA, 0x88cc, make([]byte, 50))}, bpf.LaceReasonREASON_NOT_IP, entry, own},
		"multicast":         {input{program: "pod_l3", dev: podA, frame: toMulticast}, bpf.LaceReasonREASON_MULTICAST, entry, own},
		"out of hops":       {atPod(hops(udp(a4, far4, 1, 2, 9), 1)), bpf.LaceReasonREASON_HOP_LIMIT, entry, own},
		"no flow":           {atPod(complaint(a4, far4, 3, in4.bytes())), bpf.LaceReasonREASON_NO_FLOW, entry, own},
		"fragment unknown":  {atPod(cut(udp(a4, far4, 1, 2, 64), 77, 8, 40)), bpf.LaceReasonREASON_FRAGMENT_UNKNOWN, entry, own},
		"fragment tiny":     {atPod(cut(tcp(a4, far4, 64), 77, 8, 40)), bpf.LaceReasonREASON_FRAGMENT_TINY, entry, own},
		"no port":           {input{program: "pod_l3", dev: stranger, frame: fromA(udp(a4, b4, 1, 2, 0))}, bpf.LaceReasonREASON_NO_PORT, entry, bpf.LaceEvent{}},
		"no route":          {atPod(udp(a4, nowhere, 1, 2, 9)), bpf.LaceReasonREASON_NO_ROUTE, route, own},
		"no endpoint":       {atPod(udp(a4, empty4, 1, 2, 9)), bpf.LaceReasonREASON_NO_ENDPOINT, route, inside},
		"too big":           {atPod(udp(a4, far4, 1, 2, podMTU)), bpf.LaceReasonREASON_TOO_BIG, deliver, away},
		"gateway closed":    {atPod(udp(a4, gw4, 1, 53, 9)), bpf.LaceReasonREASON_GATEWAY_CLOSED, bpf.LaceStageSTAGE_GATEWAY, own},
		"unknown source":    {input{program: "uplink", dev: uplink, frame: fromUnderlay(foreigner)}, bpf.LaceReasonREASON_UNKNOWN_SOURCE, entry, unknown},
		"SID tail":          {input{program: "uplink", dev: uplink, frame: fromUnderlay(tail)}, bpf.LaceReasonREASON_SID_TAIL, entry, behind},
		"underlay no flow":  {over(backend, backend, complaint(far4, a4, 3, udp(a4, far4, 1, 2, 30).bytes())), bpf.LaceReasonREASON_NO_FLOW, entry, from(backend, backend, 0)},
		"underlay fragment": {over(backend, backend, cut(udp(far4, a4, 1, 2, 64), 77, 8, 40)), bpf.LaceReasonREASON_FRAGMENT_UNKNOWN, entry, from(backend, backend, 0)},
		"no peering":        {over(db, backend, udp(dbSubnet4(2, 10), a4, 1, 2, 9)), bpf.LaceReasonREASON_NO_PEERING, route, from(db, backend, 0)},
		"foreign overlap":   {over(backend, overlap, in4), bpf.LaceReasonREASON_NO_PEERING, route, from(backend, overlap, 0)},
		"underlay empty":    {over(backend, backend, udp(far4, empty4, 1, 2, 9)), bpf.LaceReasonREASON_NO_ENDPOINT, route, from(backend, backend, backendLine)},
		"underlay network":  {over(elsewhere, elsewhere, in4), bpf.LaceReasonREASON_UNKNOWN_NETWORK, route, from(elsewhere, elsewhere, 0)},
	}
}

// TestRefusalsAreTold: each refused packet gives one event that says what is known of it, and nothing that is
// known of the packet before.
func TestRefusalsAreTold(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for when, left := range p.leftovers() {
		t.Run(when, func(t *testing.T) {
			for name, r := range refusals() {
				p := p.on(t)
				n := p.nodes[1]
				n.preset = left
				n.dropFragments()
				got := n.run(r.in)
				if len(got.counted) != 1 || got.counted[0] != r.reason {
					t.Errorf("%s: counted %v", name, words(got.counted))
				}
				want := n.event(r.reason, bpf.LaceVerdictVERDICT_REFUSED, r.stage, r.in)
				want.Network, want.To, want.Line, want.Peer, want.Output, want.Sid, want.Way = r.told.Network, r.told.To, r.told.Line, r.told.Peer, r.told.Output, r.told.Sid, r.told.Way
				if wantEvents(t, p.events(1), want); t.Failed() {
					t.Fatalf("of the packet: %s", name)
				}
			}
		})
	}
}

// leftovers are contexts as packets leave them that went on or were refused, and one of which every byte is set.
func (p *pair) leftovers() map[string]bpf.LaceContext {
	p.t.Helper()
	n := p.nodes[1]
	out := map[string]bpf.LaceContext{"nothing before": {}, "all bytes set": scribbled(p.t)}
	for name, in := range map[string]input{
		"after a packet to another node":     atPod(udp(a6, far6, 1, 2, 9)),
		"after a packet to a neighbour":      atPod(tcp(a4, b4, 9)),
		"after a packet by a peering":        atPod(udp(a4, dbSubnet4(2, 10), 1, 2, 9)),
		"after a packet from another node":   atOverlay(udp(far4, a4, 5, 6, 9)),
		"after an answer of the gateway":     atPod(icmp(a6, gw6, 128, 0, []byte{1, 2, 3, 4})),
		"after a packet without a container": atOverlay(udp(far6, netip.MustParseAddr("fd40:0:1::99"), 1, 2, 9)),
		"after a packet that was too big":    atPod(udp(a4, far4, 1, 2, podMTU)),
	} {
		out[name] = n.run(in).ctx
	}
	return out
}

// scribbled is a context of which every byte is set, but for the padding of the key, which no program writes.
func scribbled(t testing.TB) (left bpf.LaceContext) {
	t.Helper()
	_, err := binary.Decode(bytes.Repeat([]byte{math.MaxUint8}, binary.Size(left)), binary.NativeEndian, &left)
	must(t, err)
	left.Key.Pad = [3]uint8{}
	return left
}

// TestNothingIsLeft: whatever the packet before has left, all rows that begin at an entry program end as they do alone.
func TestNothingIsLeft(t *testing.T) {
	decidedByNoKernel(t)
	var rows []row
	for _, table := range append(segmentTables(), podRows(), uplinkRows(), errorRows(), gatewayRows(), ecnRows(), unknownRows(), unrelatedRows(), strangerFragmentRows(), outerRows()) {
		for _, r := range table {
			if r.prepare == nil && !strings.HasPrefix(r.program, "stage_") {
				rows = append(rows, r)
			}
		}
	}
	runRowsAfter(t, scribbled(t), rows)
}
