// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// change applies the fixture's plan with a change.
func (n *node) change(edit func(p *plan.Plan)) {
	n.t.Helper()
	p := n.buildOutside()
	edit(p)
	n.sync(p)
}

// without takes the peerings from one network to another away.
func without(from, to topology.NetworkID) func(p *plan.Plan) {
	return func(p *plan.Plan) {
		p.Peerings = slices.DeleteFunc(p.Peerings, func(g plan.Peering) bool { return g.From == from && g.To == to })
	}
}

// fresh is the node with the fixture's plan and no flows.
func (n *node) fresh(t testing.TB) *node {
	c := n.on(t)
	c.dropFlows()
	c.forget()
	c.sync(c.buildOutside())
	return c
}

// established is a masqueraded flow that was answered, as the container, the server and the outside see it.
func (n *node) established(s speech, w world) (from, to, seen netip.AddrPort) {
	n.t.Helper()
	from, to = at(w.a, 40000), at(w.server, 80)
	seen = n.masqueraded(s, podA, from, to, w.own, wan)
	n.wantIn(n.run(n.atOuter(s.reply(to, seen))), ingress, podA, afterHop(s.reply(to, from)))
	return from, to, seen
}

// TestMasqueradeKeepsItsPort: another topology that lets a flow go on leaves it its port, whichever side speaks first, and whatever ports
// new flows have; other lines are told of.
func TestMasqueradeKeepsItsPort(t *testing.T) {
	decidedByNoKernel(t)
	n := newOutside(t)
	eachSpeech(t, n, ordinary, func(t *testing.T, n *node, w world, s speech) {
		for _, serverFirst := range []bool{false, true} {
			n := n.fresh(t)
			from, to, seen := n.established(s, w)
			n.change(func(p *plan.Plan) {
				p.Masquerade = topology.Masquerade{First: 50000, Last: 51000}
				for i := range p.Peerings {
					p.Peerings[i].Line += 1000
				}
			})
			for round := range 4 {
				if (round%2 == 0) == serverFirst {
					n.wantIn(n.run(n.atOuter(s.reply(to, seen))), ingress, podA, afterHop(s.reply(to, from)))
					continue
				}
				if again := n.masqueraded(s, podA, from, to, w.own, wan); again != seen {
					t.Errorf("the flow has %s now, and had %s", again, seen)
				}
			}
			for key, flow := range n.flows() {
				if flow.Line != outLine+1000 || flow.Packets != 3 {
					t.Errorf("%s: line %d, %d packets", keyText(key), flow.Line, flow.Packets)
				}
			}
		}
	})
}

// TestMasqueradeEnds: without the peering no packet of the flow goes on, whichever side speaks first; when it comes back a connection stays
// ended, and others begin anew.
func TestMasqueradeEnds(t *testing.T) {
	decidedByNoKernel(t)
	n := newOutside(t)
	eachSpeech(t, n, ordinary, func(t *testing.T, n *node, w world, s speech) {
		for _, serverFirst := range []bool{false, true} {
			n := n.fresh(t)
			from, to, seen := n.established(s, w)
			n.change(without(backend, internet))
			there, back := atPort(podA, s.ask(from, to)), n.atOuter(s.reply(to, seen))
			if s.name == "TCP" { // the middle of it: a SYN may always begin anew
				there = atPort(podA, segment(from.Addr(), to.Addr(), from.Port(), to.Port(), "A", 1001, 5001, 5))
			}
			if serverFirst {
				wantCounted(t, n.run(back), shot, bpf.LaceReasonREASON_NO_PEERING)
			} else {
				wantCounted(t, n.run(there), redirect, bpf.LaceReasonREASON_NO_ROUTE)
			}
			if s.name == "TCP" {
				wantCounted(t, n.run(there), shot, bpf.LaceReasonREASON_NO_FLOW)
				wantCounted(t, n.run(back), shot, bpf.LaceReasonREASON_NO_FLOW)
				n.sync(n.buildOutside())
				wantCounted(t, n.run(there), shot, bpf.LaceReasonREASON_NO_FLOW)
				wantCounted(t, n.run(back), shot, bpf.LaceReasonREASON_NO_FLOW)
				wantCounted(t, n.run(atPort(podA, s.ask(from, to))), redirect, egressed)
				continue
			}
			wantCounted(t, n.run(there), redirect, bpf.LaceReasonREASON_NO_ROUTE)
			wantCounted(t, n.run(back), pass) // nothing of a container is known of it
			if flows := n.flows(); len(flows) != 0 {
				t.Errorf("%d entries are left", len(flows))
			}
		}
	})
}

// TestMasqueradeSwitched: a flow that is masqueraded from now on, or is no more, is another one.
func TestMasqueradeSwitched(t *testing.T) {
	decidedByNoKernel(t)
	n := newOutside(t)
	switched := func(to topology.NetworkID) func(p *plan.Plan) {
		return func(p *plan.Plan) {
			for i := range p.Peerings {
				if p.Peerings[i].From == backend && p.Peerings[i].To == to {
					p.Peerings[i].Masquerade = !p.Peerings[i].Masquerade
				}
			}
		}
	}
	eachSpeech(t, n, ordinary, func(t *testing.T, n *node, w world, s speech) {
		n = n.fresh(t)
		from, to, seen := n.established(s, w)
		n.change(switched(internet))
		n.wantOut(n.run(atPort(podA, s.ask(from, to))), wan, s.ask(from, to))
		wantCounted(t, n.run(n.atOuter(s.reply(to, seen))), pass)
		if flows := n.flows(); len(flows) != 2 {
			t.Errorf("%d entries", len(flows))
		}
		n = n.fresh(t)
		client := at(w.client, 80)
		n.wantOut(n.run(atPort(podA, s.ask(from, client))), wan, s.ask(from, client))
		n.change(switched(partner))
		seen = n.masqueraded(s, podA, from, client, w.own, wan)
		n.wantIn(n.run(n.atOuter(s.reply(client, seen))), ingress, podA, afterHop(s.reply(client, from)))
		if flows := n.flows(); len(flows) != 2 {
			t.Errorf("%d entries", len(flows))
		}
	})
}

// TestPublicationMoves: the port is another container's now; who asked goes on with that one, and the first one is not heard any more.
func TestPublicationMoves(t *testing.T) {
	decidedByNoKernel(t)
	n := newOutside(t)
	eachSpeech(t, n, ordinary[:2], func(t *testing.T, n *node, w world, s speech) {
		n = n.fresh(t)
		from, to, first, second := at(w.client, 40000), at(w.own, 7000), at(w.a, 7000), at(w.b, 7000)
		n.wantIn(n.run(n.atOuter(s.ask(from, to))), ingress, podA, afterHop(s.ask(from, first)))
		wantCounted(t, n.run(atPort(podA, s.reply(first, from))), redirect, egressed)
		n.change(func(p *plan.Plan) {
			for i := range p.Ports {
				switch p.Ports[i].HostIf {
				case fmt.Sprint(podA):
					p.Ports[i].Publish = nil
				case fmt.Sprint(podB):
					p.Ports[i].Publish = []plan.Publish{{Protocol: protoTCP, Port: 7000, To: 7000}, {Protocol: protoUDP, Port: 7000, To: 7000}}
				}
			}
		})
		must(t, n.maps.DecideAgain()) // containers come and go in place
		n.wantIn(n.run(n.atOuter(s.ask(from, to))), ingress, podB, afterHop(s.ask(from, second)))
		wantCounted(t, n.run(atPort(podA, s.reply(first, from))), shot, bpf.LaceReasonREASON_NO_FLOW)
		r := n.run(atPort(podB, s.reply(second, from)))
		wantCounted(t, r, redirect, egressed)
		wantFrame(t, r.out[12:], ethIP(plan.MAC{}, plan.MAC{}, afterHop(s.reply(to, from)))[12:])
	})
}

// TestPublicationGone: a port that is nobody's any more is the host's, also for a flow of before.
func TestPublicationGone(t *testing.T) {
	decidedByNoKernel(t)
	n := newOutside(t)
	eachSpeech(t, n, ordinary[:2], func(t *testing.T, n *node, w world, s speech) {
		n = n.fresh(t)
		from, to, inside := at(w.client, 40000), at(w.own, 7000), at(w.a, 7000)
		n.wantIn(n.run(n.atOuter(s.ask(from, to))), ingress, podA, afterHop(s.ask(from, inside)))
		wantCounted(t, n.run(atPort(podA, s.reply(inside, from))), redirect, egressed)
		n.change(func(p *plan.Plan) {
			for i := range p.Ports {
				p.Ports[i].Publish = nil
			}
		})
		must(t, n.maps.DecideAgain())
		wantCounted(t, n.run(n.atOuter(s.ask(from, to))), shot, bpf.LaceReasonREASON_NO_ROUTE)
		in := n.atOuter(s.ask(at(w.client, 40001), to))
		r := n.run(in)
		wantCounted(t, r, pass)
		wantFrame(t, r.out, in.frame)
	})
}

// TestIngressEnds: what outsiders and hosts may no more ends, both ways; what a container opened to the host too.
func TestIngressEnds(t *testing.T) {
	decidedByNoKernel(t)
	n := newOutside(t)
	eachSpeech(t, n, ordinary[1:2], func(t *testing.T, n *node, w world, s speech) {
		client, own, inside := at(w.client, 40000), at(w.own, 40000), at(w.a, 80)
		n = n.fresh(t)
		n.wantIn(n.run(n.atOuter(s.ask(client, inside))), ingress, podA, afterHop(s.ask(client, inside)))
		n.change(without(partner, backend))
		wantCounted(t, n.run(atPort(podA, s.reply(inside, client))), redirect, bpf.LaceReasonREASON_NO_PEERING)
		wantCounted(t, n.run(n.atOuter(s.ask(client, inside))), shot, bpf.LaceReasonREASON_NO_PEERING)

		n = n.fresh(t)
		n.wantIn(n.run(n.atHost(s.ask(own, inside))), fromHost, podA, s.ask(own, inside).bytes())
		n.change(without(topology.HostsID, backend))
		wantCounted(t, n.run(atPort(podA, s.reply(inside, own))), redirect, bpf.LaceReasonREASON_NO_PEERING)
		wantCounted(t, n.run(n.atHost(s.ask(own, inside))), redirect, bpf.LaceReasonREASON_NO_ROUTE)

		n = n.fresh(t)
		from, to := at(w.a, 40000), at(w.own, 53)
		n.wantToHost(n.run(atPort(podA, s.ask(from, to))), afterHop(s.ask(from, to)))
		n.change(without(backend, premises))
		wantCounted(t, n.run(n.atHost(s.reply(to, from))), redirect, bpf.LaceReasonREASON_NO_PEERING)
		wantCounted(t, n.run(atPort(podA, s.ask(from, to))), redirect, bpf.LaceReasonREASON_NO_ROUTE)
		if flows := n.flows(); len(flows) != 0 {
			t.Errorf("%d entries are left", len(flows))
		}
	})
}

// TestReclassified: an address that is in another external network now is judged by that.
func TestReclassified(t *testing.T) {
	decidedByNoKernel(t)
	n := newOutside(t)
	eachSpeech(t, n, ordinary[1:2], func(t *testing.T, n *node, w world, s speech) {
		n = n.fresh(t)
		client, inside := at(w.client, 40000), at(w.a, 80)
		n.wantIn(n.run(n.atOuter(s.ask(client, inside))), ingress, podA, afterHop(s.ask(client, inside)))
		n.change(func(p *plan.Plan) {
			p.Externals[0].Prefixes = append(p.Externals[0].Prefixes, netip.PrefixFrom(w.client, w.client.BitLen()))
		})
		wantCounted(t, n.run(atPort(podA, s.reply(inside, client))), redirect, bpf.LaceReasonREASON_NO_PEERING)
		wantCounted(t, n.run(n.atOuter(s.ask(client, inside))), shot, bpf.LaceReasonREASON_NO_PEERING)
	})
}

// TestRoutesChange: a known flow takes another way out when the host's routes say so, within a tick, and keeps the address that it has.
func TestRoutesChange(t *testing.T) {
	n := newOutside(t)
	eachSpeech(t, n, ordinary, func(t *testing.T, n *node, w world, s speech) {
		n = n.fresh(t)
		from, to, seen := n.established(s, w)
		route := routeTo(to.Addr(), n.bed.index[wan2], w)
		must(t, n.bed.in(func() error { return netlink.RouteAdd(route) }))
		t.Cleanup(func() { must(t, n.bed.in(func() error { return netlink.RouteDel(route) })) })
		n.age()
		for range 2 {
			n.wantOut(n.run(atPort(podA, s.ask(from, to))), wan2, s.ask(seen, to))
		}
		back := input{program: "outer", dev: wan2, frame: n.bed.fromOutside(wan2, s.reply(to, seen))}
		n.wantIn(n.run(back), ingress, podA, afterHop(s.reply(to, from)))
	})
}

// TestAddressGone: flows by an address that the host has no more are collected, and new ones have the other.
func TestAddressGone(t *testing.T) {
	decidedByNoKernel(t)
	n := newOutside(t)
	eachSpeech(t, n, ordinary, func(t *testing.T, n *node, w world, s speech) {
		n = n.fresh(t)
		from, to, seen := n.established(s, w)
		n.masqueraded(s, podB, at(w.b, 1), to, w.own2, wan2)
		must(t, n.maps.SyncEgresses([]maps.Egress{{Index: uint32(n.bed.index[wan]), V4: worlds[false].own2, V6: worlds[true].own2}, {Index: uint32(n.bed.index[wan2]), V4: worlds[false].own2, V6: worlds[true].own2}}))
		t.Cleanup(n.syncHost)
		if again := n.masqueraded(s, podA, from, to, w.own, wan); again != seen {
			t.Errorf("the flow has %s now, and had %s", again, seen)
		}
		done, err := n.maps.Collect(n.coll.Programs["collect"], maps.Collection{All: true, Addr: w.own})
		must(t, err)
		if flows := n.flows(); done.Entries != 2 || len(flows) != 2 {
			t.Errorf("%d entries stay, and %d are there, want those of the other flow: 2", done.Entries, len(flows))
		}
		n.masqueraded(s, podA, from, to, w.own2, wan)
	})
}
