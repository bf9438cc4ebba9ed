// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf/ringbuf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/topology"
)

// listen is what the programs of the node tell from now on.
func (n *node) listen() *pair {
	n.t.Helper()
	ring, err := ringbuf.NewReader(n.coll.Maps["events"])
	must(n.t, err)
	n.t.Cleanup(func() { ring.Close() })
	p := &pair{t: n.t, nodes: map[int]*node{1: n}, rings: map[int]*ringbuf.Reader{1: ring}}
	p.events(1)
	return p
}

// rewritten are the fields of an event about a packet that becomes another.
func rewritten(e *bpf.LaceEvent, src, dst netip.AddrPort) {
	e.Translated = 1
	e.Rewrite.Src.U8, e.Rewrite.Dst.U8 = src.Addr().As16(), dst.Addr().As16()
	e.Rewrite.Sport, e.Rewrite.Dport = onWire(src.Port()), onWire(dst.Port())
}

// TestOutsideIsTold: a new flow between the overlay, the host and the outside gives one event, with the networks that people know, the line that lets
// it pass, which way it goes and what it becomes; answers and later packets give none.
func TestOutsideIsTold(t *testing.T) {
	n := newOutside(t)
	eachFamily(t, func(t *testing.T, w world) {
		n := n.on(t)
		n.dropFlows()
		p, s := n.listen(), ordinary[1]
		passed, deliver := bpf.LaceVerdictVERDICT_PASSED, bpf.LaceStageSTAGE_DELIVER
		told := func(in input, reason bpf.LaceReason, from, to topology.NetworkID, line uint32, way maps.Way, outer uint8) bpf.LaceEvent {
			e := n.event(reason, passed, deliver, in)
			e.Network, e.To, e.Line, e.Way, e.Outer = uint32(from), uint32(to), line, uint8(way), outer
			return e
		}
		in := atPort(podA, s.ask(at(w.a, 40000), at(w.server, 53)))
		seen := at(w.own, portIn(s, n.run(in).out))
		want := told(in, egressed, backend, internet, outLine, maps.WayOut, 0)
		rewritten(&want, seen, at(w.server, 53))
		wantEvents(t, p.events(1), want)
		n.run(in)
		n.run(n.atOuter(s.reply(at(w.server, 53), seen)))
		must(t, n.maps.DecideAgain())
		n.run(n.atOuter(s.reply(at(w.server, 53), seen)))
		n.run(in)
		wantEvents(t, p.events(1))

		in = n.atOuter(s.ask(at(w.neighbour, 40000), at(w.own, 5353)))
		n.run(in)
		want = told(in, ingress, premises, db, inHomeLine, maps.WayContainer, 1)
		want.Output = uint32(n.bed.index[podD])
		rewritten(&want, at(w.neighbour, 40000), at(w.db, 53))
		wantEvents(t, p.events(1), want)

		in = n.atHost(s.ask(at(w.own, 40000), at(w.a, 53)))
		n.run(in)
		want = told(in, fromHost, topology.HostsID, backend, hostLine, maps.WayContainer, 2)
		want.Output = uint32(n.bed.index[podA])
		wantEvents(t, p.events(1), want)

		in = atPort(podA, s.ask(at(w.a, 40000), at(w.own, 53)))
		n.run(in)
		wantEvents(t, p.events(1), told(in, toHost, backend, topology.HostsID, homeLine, maps.WayHost, 0))

		in = n.atOuter(s.ask(at(w.server, 1), at(w.own, 5353)))
		n.run(in)
		refused := n.event(bpf.LaceReasonREASON_NO_PEERING, bpf.LaceVerdictVERDICT_REFUSED, bpf.LaceStageSTAGE_ENTER, in)
		got := p.events(1)
		if len(got) != 1 || got[0].Reason != refused.Reason || got[0].Verdict != refused.Verdict || got[0].Network != uint32(internet) || got[0].To != uint32(db) || got[0].Stage != refused.Stage {
			t.Errorf("told %+v", got)
		}
	})
}

// TestMasqueradeSizes: of packets that are still to be segmented, the segments have to fit the way out, and all of it is translated; a known flow
// learns that its packets do not fit, whether the way was just looked up or not.
func TestMasqueradeSizes(t *testing.T) {
	n := newOutside(t)
	eachFamily(t, func(t *testing.T, w world) {
		n := n.on(t)
		n.dropFlows()
		n.forget()
		headers := len(tcp(w.a, w.server, 0).bytes())
		big := func(from, to netip.AddrPort) ip {
			return segment(from.Addr(), to.Addr(), from.Port(), to.Port(), "PA", 1001, 5001, 3500)
		}
		from, to := at(w.a, 40000), at(w.server, 80)
		send := func(gso int) result {
			in := atPort(podA, big(from, to))
			in.gso = uint32(gso)
			return n.run(in)
		}
		tooBig := func(r result) {
			t.Helper()
			wantCounted(t, r, redirect, bpf.LaceReasonREASON_TOO_BIG)
			toldContainer(podA, 4, linkMTU)(t, n, r, toGateway(1, podA, big(from, to)))
		}
		tooBig(send(linkMTU - headers + 1))
		if flows := n.flows(); len(flows) != 0 {
			t.Errorf("%d entries of a packet that did not go on", len(flows))
		}
		r := send(linkMTU - headers)
		wantCounted(t, r, redirect, egressed)
		seen := at(w.own, portIn(ordinary[0], r.out))
		n.wantOut(r, wan, big(seen, to))
		tooBig(send(linkMTU - headers + 1))
		n.age()
		tooBig(send(linkMTU - headers + 1))
		tooBig(send(0))
		in := n.atOuter(big(to, seen))
		in.gso = 1400
		n.wantIn(n.run(in), ingress, podA, afterHop(big(to, from)))
	})
}
