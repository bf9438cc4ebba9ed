// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"slices"
	"testing"

	"github.com/lace-net/lace/bpf"
)

// fragments are what the programs remember of first fragments.
func (n *node) fragments() map[bpf.LaceFragmentKey]bpf.LaceFragment {
	n.t.Helper()
	out := map[bpf.LaceFragmentKey]bpf.LaceFragment{}
	var key bpf.LaceFragmentKey
	var first bpf.LaceFragment
	rows := n.coll.Maps["fragments"].Iterate()
	for rows.Next(&key, &first) {
		out[key] = first
	}
	must(n.t, rows.Err())
	return out
}

func (n *node) dropFragments() {
	n.t.Helper()
	for key := range n.fragments() {
		must(n.t, n.coll.Maps["fragments"].Delete(key))
	}
}

// pieces are the fragments of a packet, each with size bytes of its body.
func pieces(p ip, id uint32, size int) (out []ip) {
	for from := 0; from < len(p.body); from += size {
		out = append(out, cut(p, id, from, min(from+size, len(p.body))))
	}
	return out
}

// large is a datagram from one side of a conversation; what its later fragments hold looks like other ports.
func (c talk) large(from, to host, sport, dport uint16) ip {
	p := udp(from.addr(c.v6), to.addr(c.v6), sport, dport, 120)
	for at := 8; at < len(p.body); at += 8 {
		copy(p.body[at:], []byte{0, 67, 0, 68, 0, 53, 0, 53})
	}
	return p
}

// TestFragments: the first fragment tells the later ones their flow, in whatever order these come, however often, and both
// ways; all are delivered as they are and counted for the flow.
func TestFragments(t *testing.T) {
	eachTalk(t, newPair(t), protoUDP, func(t *testing.T, c talk) {
		for _, n := range c.nodes {
			n.t = t
			n.dropFragments()
		}
		there := pieces(c.large(c.a, c.b, c.aport, c.bport), 0x1001, 32)
		for _, i := range []int{0, 2, 1, 3, 1} {
			c.wantPassed(c.a, there[i])
		}
		c.wantFragments(c.there(), slices.Concat(there, there[1:2]))
		c.wantState(bpf.LaceFlowStateFLOW_NEW)
		back := pieces(c.large(c.b, c.a, c.bport, c.aport), 0x1001, 64)
		for _, p := range back {
			c.wantPassed(c.b, p)
		}
		c.wantFragments(c.back(), back)
		c.wantState(bpf.LaceFlowStateFLOW_ESTABLISHED)
		c.wantEntries(2)
		c.wantFlows(1)
	})
}

// wantFragments wants the flow to have counted these packets.
func (c talk) wantFragments(k bpf.LaceFlowKey, packets []ip) {
	c.t.Helper()
	want := [2]uint64{}
	for _, p := range packets {
		want[0]++
		want[1] += uint64(len(p.bytes()))
	}
	for _, number := range c.at() {
		if f := c.nodes[number].flow(k); [2]uint64{f.Packets, f.Bytes} != want {
			c.t.Errorf("node %d, %s: %d packets, %d bytes, want %v", number, keyText(k), f.Packets, f.Bytes, want)
		}
	}
}

// TestFragmentsOfTCP: the first fragment moves a connection as a whole segment does; later ones do not, whatever flags
// the packet before has left.
func TestFragmentsOfTCP(t *testing.T) {
	eachTalk(t, newPair(t), protoTCP, func(t *testing.T, c talk) {
		for _, line := range handshake {
			c.step(line)
		}
		_, data := c.tcpSegment("a", "A", 1001, 5001, 64)
		for _, n := range c.nodes {
			n.preset = bpf.LaceContext{Tcp: 1} // FIN
		}
		for _, part := range pieces(data, 0x2001, 40) {
			c.wantPassed(c.a, part)
		}
		c.wantState(bpf.LaceFlowStateFLOW_ESTABLISHED)
		_, data = c.tcpSegment("a", "FA", 1065, 5001, 64)
		parts := pieces(data, 0x2002, 40)
		c.wantPassed(c.a, parts[0])
		c.wantState(bpf.LaceFlowStateFLOW_CLOSING)
		c.wantPassed(c.a, parts[1])
		c.wantPassed(c.a, parts[2])
		c.wantState(bpf.LaceFlowStateFLOW_CLOSING)
	})
}

// strangerFragmentRows are rows in which one fragment came before and another one does not belong to it.
func strangerFragmentRows() []row {
	unknown, tiny := bpf.LaceReasonREASON_FRAGMENT_UNKNOWN, bpf.LaceReasonREASON_FRAGMENT_TINY
	var rows []row
	for version, c := range map[string]struct{ out, in, beside, from ip }{
		"":       {udp(a4, far4, 1, 2, 64), udp(far4, a4, 3, 4, 64), udp(a4, b4, 1, 2, 64), udp(v4Of(2, podB), a4, 3, 4, 64)},
		", IPv6": {udp(a6, far6, 1, 2, 64), udp(far6, a6, 3, 4, 64), udp(a6, b6, 1, 2, 64), udp(v6Of(2, podB), a6, 3, 4, 64)},
	} {
		sent := []input{{program: "pod_l3", dev: podA, frame: fromA(cut(c.out, 9, 0, 24))}}
		came := []input{{program: "uplink", dev: uplink, frame: fromUnderlay(overlay(cut(c.in, 9, 0, 24)))}}
		out := func(name string, reason bpf.LaceReason, p ip) {
			rows = append(rows, row{name: name + version, before: sent, frame: fromA(p), verdict: shot, reason: reason})
		}
		in := func(name string, reason bpf.LaceReason, p ip) {
			rows = append(rows, row{name: name + " from the underlay" + version, before: came, program: "uplink", dev: uplink, frame: fromUnderlay(overlay(p)), verdict: shot, reason: reason})
		}
		out("of another packet", unknown, cut(c.out, 10, 24, 48))
		in("of another packet", unknown, cut(c.in, 10, 24, 48))
		out("to another receiver", unknown, cut(c.beside, 9, 24, 48))
		in("of another sender", unknown, cut(c.from, 9, 24, 48))
		rows = append(rows, row{name: "of the twin in another network" + version, dev: podX, frame: toGateway(1, podX, cut(c.out, 9, 24, 48)), verdict: shot, reason: unknown,
			before: append(slices.Clone(sent), input{program: "pod_l3", dev: podX, frame: toGateway(1, podX, c.out)})})
		rows = append(rows, row{name: "of the other direction" + version, before: sent, program: "uplink", dev: uplink,
			frame: fromUnderlay(overlay(cut(udp(c.in.src, c.in.dst, 2, 1, 64), 9, 24, 48))), verdict: shot, reason: unknown})
		inTwin := func(inner ip) ip {
			p := overlay(inner)
			p.src, p.dst = locatorOf(2, 48).Source(overlap, 0), sidOf(overlap)
			return p
		}
		rows = append(rows, row{name: "of the twin in another network from the underlay" + version, program: "uplink", dev: uplink,
			before: append(slices.Clone(came), input{program: "uplink", dev: uplink, frame: fromUnderlay(inTwin(c.in))}),
			frame:  fromUnderlay(inTwin(cut(c.in, 9, 24, 48))), verdict: shot, reason: unknown, network: int(overlap)})
		segment := tcp(c.out.src, c.out.dst, 64)
		rows = append(rows, row{name: "over the flags of a known first" + version, verdict: shot, reason: tiny, frame: fromA(cut(segment, 9, 8, 40)),
			before: []input{{program: "pod_l3", dev: podA, frame: fromA(cut(segment, 9, 0, 40))}}})
	}
	return append(rows, otherHeaderRows()...)
}

// otherHeaderRows: of IPv6 fragments only the first one says what they are (RFC 8200 4.5); of IPv4 all do.
func otherHeaderRows() []row {
	segment6, datagram6 := tcp(a6, far6, 64), udp(a6, far6, 1, 2, 64)
	of := func(p ip, next uint8) ip { p.body[0] = next; return p }
	first := func(p ip) []input { return []input{{program: "pod_l3", dev: podA, frame: fromA(p)}} }
	behind := datagram6
	behind.body, behind.proto = extension(protoUDP, [7]byte{0, 1, 4}, datagram6.body), extDest
	other4 := cut(udp(a4, far4, 1, 2, 64), 9, 24, 48)
	other4.proto = 253
	encapsulated := bpf.LaceReasonREASON_ENCAPSULATED
	return []row{
		{name: "of another protocol, IPv4", before: first(cut(udp(a4, far4, 1, 2, 64), 9, 0, 24)), frame: fromA(other4), verdict: shot, reason: bpf.LaceReasonREASON_FRAGMENT_UNKNOWN},
		{name: "with another next header, IPv6", before: first(cut(datagram6, 9, 0, 24)), frame: fromA(of(cut(datagram6, 9, 24, 48), 253)), verdict: redirect, reason: encapsulated, check: oneFlow},
		{name: "behind an extension in the fragments, IPv6", before: first(cut(behind, 9, 0, 24)), frame: fromA(cut(behind, 9, 24, 48)), verdict: redirect, reason: encapsulated, check: oneFlow},
		{name: "with another next header over the flags, IPv6", before: first(cut(segment6, 9, 0, 40)), frame: fromA(of(cut(segment6, 9, 16, 40), protoUDP)), verdict: shot, reason: bpf.LaceReasonREASON_FRAGMENT_TINY},
	}
}

// oneFlow wants two packets of one flow.
func oneFlow(t testing.TB, n *node, _ result, _ []byte) {
	t.Helper()
	flows := n.flows()
	if len(flows) != 2 {
		t.Errorf("%d entries, want those of one flow", len(flows))
	}
	for key, flow := range flows {
		if key.Protocol != protoUDP || (flow.Flags&uint16(bpf.LaceFlowFlagsFLOW_REPLY) == 0 && flow.Packets != 2) {
			t.Errorf("%s has %d packets", keyText(key), flow.Packets)
		}
	}
}

func TestStrangerFragments(t *testing.T) { runRows(t, strangerFragmentRows()) }

// TestFragmentTimeout: a first fragment is remembered for as long as a receiver waits for the rest.
func TestFragmentTimeout(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	for name, c := range map[string]struct{ first, later input }{
		"container":      {atPod(cut(udp(a4, far4, 1, 2, 64), 9, 0, 24)), atPod(cut(udp(a4, far4, 1, 2, 64), 9, 24, 48))},
		"container IPv6": {atPod(cut(udp(a6, far6, 1, 2, 64), 9, 0, 24)), atPod(cut(udp(a6, far6, 1, 2, 64), 9, 24, 48))},
		"underlay":       {atOverlay(cut(udp(far4, a4, 3, 4, 64), 9, 0, 24)), atOverlay(cut(udp(far4, a4, 3, 4, 64), 9, 24, 48))},
		"underlay IPv6":  {atOverlay(cut(udp(far6, a6, 3, 4, 64), 9, 0, 24)), atOverlay(cut(udp(far6, a6, 3, 4, 64), 9, 24, 48))},
	} {
		t.Run(name, func(t *testing.T) {
			n := n.on(t)
			n.dropFragments()
			n.run(c.first)
			n.ageFragments(20)
			if r := n.run(c.later); r.verdict != redirect {
				t.Errorf("after 20 ticks: verdict %d, %v", int32(r.verdict), words(r.counted))
			}
			n.ageFragments(11)
			wantCounted(t, n.run(c.later), shot, bpf.LaceReasonREASON_FRAGMENT_UNKNOWN)
			n.run(c.first)
			if r := n.run(c.later); r.verdict != redirect {
				t.Errorf("after a new first one: verdict %d, %v", int32(r.verdict), words(r.counted))
			}
		})
	}
}

func atPod(p ip) input { return input{program: "pod_l3", dev: podA, frame: fromA(p)} }

func atOverlay(p ip) input {
	return input{program: "uplink", dev: uplink, frame: fromUnderlay(overlay(p))}
}

// ageFragments makes what is remembered older by so many ticks.
func (n *node) ageFragments(by uint32) {
	n.t.Helper()
	for key, first := range n.fragments() {
		first.Seen -= by
		must(n.t, n.coll.Maps["fragments"].Put(key, first))
	}
}

// TestAtomicFragments: an IPv6 packet with a fragment header that is all of itself is whole (RFC 6946): nothing is
// remembered of it, and it goes where the flow goes.
func TestAtomicFragments(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	for name, enter := range map[string]func(p ip) input{"container": atPod, "underlay": atOverlay} {
		t.Run(name, func(t *testing.T) {
			n := n.on(t)
			n.dropFlows()
			n.dropFragments()
			p := udp(a6, far6, 1, 2, 30)
			if name == "underlay" {
				p = udp(far6, a6, 1, 2, 30)
			}
			for range 2 {
				r := n.run(enter(cut(p, 9, 0, len(p.body))))
				if r.verdict != redirect || r.counted[0] > bpf.LaceReasonREASON_LOCAL {
					t.Fatalf("verdict %d, %v", int32(r.verdict), words(r.counted))
				}
			}
			if k := flowKey(backend, p.src, p.dst, protoUDP, 1, 2); n.flow(k).Packets != 2 {
				t.Errorf("%s has %d packets, want 2", keyText(k), n.flow(k).Packets)
			}
			if left := len(n.fragments()); left != 0 {
				t.Errorf("%d first fragments are remembered", left)
			}
			wantCounted(t, n.run(enter(cut(p, 9, 8, 38))), shot, bpf.LaceReasonREASON_FRAGMENT_UNKNOWN)
		})
	}
}

// TestFragmentsBounded: more first fragments than there is room for make the oldest forgotten, and refuse none.
func TestFragmentsBounded(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	room := int(n.coll.Maps["fragments"].MaxEntries())
	keys := make([]bpf.LaceFragmentKey, 2*room)
	for i := range keys {
		keys[i].Network, keys[i].Id = uint32(elsewhere), uint32(i)
		must(t, n.coll.Maps["fragments"].Put(keys[i], bpf.LaceFragment{}))
	}
	p := udp(a4, far4, 1, 2, 64)
	for _, part := range pieces(p, 9, 24) {
		wantCounted(t, n.run(atPod(part)), redirect, bpf.LaceReasonREASON_ENCAPSULATED)
	}
}
