// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"net/netip"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// eachSpeech runs f for each kind of packet in both families, on one node without flows.
func eachSpeech(t *testing.T, n *node, kinds []speech, f func(t *testing.T, n *node, w world, s speech)) {
	t.Helper()
	for _, s := range kinds {
		t.Run(s.name, func(t *testing.T) {
			for name, v6 := range map[string]bool{"IPv4": false, "IPv6": true} {
				if v6 && s.only4 {
					continue
				}
				t.Run(name, func(t *testing.T) {
					n := n.on(t)
					n.dropFlows()
					n.forget()
					f(t, n, worlds[v6], s)
				})
			}
		})
	}
}

// wantOut wants a packet out of an interface, one hop later, with the MAC addresses of its way.
func (n *node) wantOut(r result, dev int, p ip) {
	n.t.Helper()
	wantCounted(n.t, r, redirect, bpf.LaceReasonREASON_EGRESS)
	if r.ctx.Out != uint32(n.bed.index[dev]) {
		n.t.Errorf("leaves by interface %d, want %d", r.ctx.Out, n.bed.index[dev])
	}
	wantFrame(n.t, r.out, ethIP(hopOf(dev), n.bed.mac[dev], afterHop(p)))
}

// wantIn wants a packet of the outside or the host at a container.
func (n *node) wantIn(r result, reason bpf.LaceReason, dev int, packet []byte) {
	n.t.Helper()
	wantCounted(n.t, r, redirect, reason)
	wantDelivered(n.t, n, r, dev, packet)
}

const (
	egressed = bpf.LaceReasonREASON_EGRESS
	ingress  = bpf.LaceReasonREASON_INGRESS
	toHost   = bpf.LaceReasonREASON_TO_HOST
	fromHost = bpf.LaceReasonREASON_FROM_HOST
)

// defaultRange are the ports of a topology that says nothing of them.
const firstPort, lastPort = 10000, 32767

// masqueraded sends a packet of a container out, wants it whole, and returns who it seems to come from there.
func (n *node) masqueraded(s speech, dev int, from, to netip.AddrPort, own netip.Addr, by int) netip.AddrPort {
	n.t.Helper()
	r := n.run(atPort(dev, s.ask(from, to)))
	if r.verdict != redirect || len(r.out) < 42 {
		n.t.Fatalf("%s: verdict %d, %v", s.name, int32(r.verdict), words(r.counted))
	}
	seen := at(own, portIn(s, r.out))
	if seen.Port() < firstPort || seen.Port() > lastPort {
		n.t.Errorf("masqueraded with port %d", seen.Port())
	}
	n.wantOut(r, by, s.ask(seen, to))
	return seen
}

// TestMasquerade: what a container sends out has the host's address and a port of the range, and is else what the host itself would
// have sent; the answer is what the container expects. All bytes, all checksums.
func TestMasquerade(t *testing.T) {
	eachSpeech(t, newOutside(t), speeches, func(t *testing.T, n *node, w world, s speech) {
		from, to := at(w.a, 40000), at(w.server, 80)
		before := n.tally()
		seen := n.masqueraded(s, podA, from, to, w.own, wan)
		if again := n.masqueraded(s, podA, from, to, w.own, wan); again != seen {
			t.Errorf("masqueraded as %s first, then as %s", seen, again)
		}
		for range 2 {
			p := s.reply(to, seen)
			n.wantIn(n.run(n.atOuter(p)), ingress, podA, afterHop(s.reply(to, from)))
		}
		n.masqueraded(s, podA, from, to, w.own, wan)
		wantTally(t, n.tally().since(before), tally{{Network: uint32(backend), Reason: uint32(egressed)}: 3, {Network: uint32(backend), Reason: uint32(ingress)}: 2})
		n.wantMasqueraded(s, from, to, seen)
	})
}

// wantMasqueraded wants the two entries of a flow.
func (n *node) wantMasqueraded(s speech, from, to, seen netip.AddrPort) {
	n.t.Helper()
	flows := n.flows()
	if len(flows) != 2 {
		n.t.Errorf("%d entries, want 2", len(flows))
	}
	for key, flow := range flows {
		reply := flow.Flags&uint16(bpf.LaceFlowFlagsFLOW_REPLY) != 0
		rewrite := maps.RewriteOf(bpf.LaceAddr(flow.To.Src), bpf.LaceAddr(flow.To.Dst), flow.To.Sport, flow.To.Dport)
		switch {
		case flow.Flags&uint16(bpf.LaceFlowFlagsFLOW_TRANSLATED) == 0 || flow.Line != outLine:
			n.t.Errorf("%s: flags %#x, line %d", keyText(key), flow.Flags, flow.Line)
		case reply && (key.Network != uint32(topology.OutsideID) || flow.Way != uint8(maps.WayContainer) || flow.Packets != 2):
			n.t.Errorf("the way back %s: way %d, %d packets", keyText(key), flow.Way, flow.Packets)
		case !reply && (key.Network != uint32(backend) || flow.Way != uint8(maps.WayOut) || flow.Packets != 3):
			n.t.Errorf("the way out %s: way %d, %d packets", keyText(key), flow.Way, flow.Packets)
		case !reply && (rewrite.Src != seen || rewrite.Dst.Addr() != to.Addr()):
			n.t.Errorf("the way out %s becomes %v, want from %s", keyText(key), rewrite, seen)
		case reply && rewrite.Dst.Addr() != from.Addr():
			n.t.Errorf("the way back %s becomes %v, want to %s", keyText(key), rewrite, from)
		}
	}
}

// TestPlainEgress: without masquerade a packet leaves as it is, whatever its protocol, and so comes what is sent back.
func TestPlainEgress(t *testing.T) {
	n := newOutside(t)
	eachSpeech(t, n, mostSpeeches(), func(t *testing.T, n *node, w world, s speech) {
		from, to := at(w.a, 40000), at(w.client, 80)
		for range 2 {
			n.wantOut(n.run(atPort(podA, s.ask(from, to))), wan, s.ask(from, to))
			n.wantIn(n.run(n.atOuter(s.reply(to, from))), ingress, podA, afterHop(s.reply(to, from)))
		}
	})
	eachFamily(t, func(t *testing.T, w world) {
		n := n.on(t)
		for _, proto := range []uint8{47, 50, 132, 253} {
			there, back := ip{src: w.a, dst: w.client, proto: proto, body: make([]byte, 30)}, ip{src: w.client, dst: w.a, proto: proto, body: make([]byte, 20)}
			n.wantOut(n.run(atPort(podA, there)), wan, there)
			n.wantIn(n.run(n.atOuter(back)), ingress, podA, afterHop(back))
		}
	})
}

// TestWayOut: the host's own tables and rules say by which interface, with which address and to whom a packet leaves.
func TestWayOut(t *testing.T) {
	eachSpeech(t, newOutside(t), ordinary, func(t *testing.T, n *node, w world, s speech) {
		n.masqueraded(s, podA, at(w.a, 1000), at(w.server, 80), w.own, wan)
		n.masqueraded(s, podA, at(w.a, 1000), at(w.other, 80), w.own2, wan2)  // by a longer prefix
		n.masqueraded(s, podB, at(w.b, 1000), at(w.server, 80), w.own2, wan2) // by a rule about the source
		if s.name == "TCP" {
			n.masqueraded(s, podA, at(w.a, 1000), at(w.server, 853), w.own2, wan2) // by a rule about protocol and port
		}
		if w.own.Is4() {
			urgent := classed(s.ask(at(w.a, 1000), at(w.client, 81)), elsewhereClass) // by a rule about the class
			n.wantOut(n.run(atPort(podA, urgent)), wan2, urgent)
		}
		// The longest of the prefixes of all external networks says that this one is the partner.
		n.wantOut(n.run(atPort(podA, s.ask(at(w.a, 1000), at(w.longer, 80)))), wan, s.ask(at(w.a, 1000), at(w.longer, 80)))
		r := n.run(atPort(podA, s.ask(at(w.a, 1000), at(w.unresolved, 80)))) // the kernel looks for the next hop
		wantCounted(t, r, redirect, egressed)
		seen := at(w.own, portIn(s, r.out))
		wantFrame(t, r.out[12:], ethIP(plan.MAC{}, plan.MAC{}, afterHop(s.ask(seen, at(w.unresolved, 80))))[12:])
	})
}
