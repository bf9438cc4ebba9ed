// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// outsideEntries are the programs that a packet may meet first on a node with an outside.
var outsideEntries = []struct {
	program string
	dev     int
}{{"outer", wan}, {"host", hostPeer}, {"loopback", loopDev}, {"pod_l3", podA}, {"pod_l3", podX}, {"uplink", uplink}, {"outer", wan2}, {"outer_raw", stranger}, {"pod_l3", podD}, {"uplink", wan}}

// outsideSeeds are frames for each of them, and flows that they may belong to.
func outsideSeeds(n *node) (out []input) {
	for _, w := range worlds {
		for _, s := range speeches {
			client, near, own := at(w.client, 40000), at(w.neighbour, 40000), at(w.own, 40000)
			out = append(out, n.atOuter(s.ask(client, at(w.a, 80))), n.atOuter(s.ask(near, at(w.own, 8080))), n.atHost(s.ask(own, at(w.a, 80))),
				n.atLoopback(s.ask(own, at(w.own, 8080))), atPort(podA, s.ask(at(w.a, 40000), at(w.server, 80))), atPort(podA, s.ask(at(w.a, 1), client)),
				atPort(podX, s.ask(at(w.x, 1), at(w.own, 8080))), atPort(podA, s.ask(at(w.a, 1), at(w.own, 22))), atPort(podA, s.reply(at(w.a, 80), own)), atPort(podD, s.reply(at(w.db, 80), near)), atPort(podX, s.ask(at(w.x, 1), client)))
			carried := s.ask(at(w.far, 1), at(w.server, 80))
			in := s.ask(at(w.client, 1), at(w.a, 80))
			out = append(out, input{program: "uplink", dev: uplink, frame: fromUnderlay(outerOf(carried, backend, 2, internet, 0))},
				input{program: "uplink", dev: uplink, frame: fromUnderlay(outerOf(in, partner, 2, backend, 0))})
			for _, quoted := range quoteForms(s.ask(client, at(w.a, 80)))[:1] {
				out = append(out, atPort(podA, complaintOf(w.a, w.client, [2]uint8{3, 1}, quoted)), n.atOuter(complaintOf(w.client, w.own, [2]uint8{3, 4}, quoted)))
			}
		}
	}
	return out
}

// FuzzOutside throws arbitrary packets at the programs of a node with an outside, after others. Whatever comes: what is the host's own
// is left as it is, no packet reaches a container that nobody lets in, and nothing leaves without a peering.
func FuzzOutside(f *testing.F) {
	decidedByNoKernel(f)
	n := newOutside(f)
	for i, in := range outsideSeeds(n) {
		entry := slices.IndexFunc(outsideEntries, func(e struct {
			program string
			dev     int
		}) bool {
			return e.program == in.program && e.dev == in.dev
		})
		f.Add(uint8(entry), i%7 == 0, uint16(0), in.frame)
	}
	f.Fuzz(func(t *testing.T, choice uint8, clean bool, gso uint16, frame []byte) {
		if len(frame) > 4096 {
			return
		}
		n := n.on(t)
		if clean {
			n.dropFlows()
		}
		entry := outsideEntries[int(choice)%len(outsideEntries)]
		judgeOutside(t, n, input{program: entry.program, dev: entry.dev, frame: frame, gso: uint32(gso)})
	})
}

// TestOutsideMutations runs the packets of the tables with a few bytes changed, one after the other, so that flows are known and are
// decided again. The numbers are random and the same in each run.
func TestOutsideMutations(t *testing.T) {
	decidedByNoKernel(t)
	n := newOutside(t)
	all := outsideSeeds(n)
	for _, r := range outerRows() {
		if r.prepare == nil && len(r.frame) >= 20 && len(r.frame) < 1000 && r.tag == (vlan{}) {
			all = append(all, input{program: orPod(r.program), dev: r.dev, frame: r.frame})
		}
	}
	slices.SortStableFunc(all, func(a, b input) int {
		return strings.Compare(a.program+string(a.frame), b.program+string(b.frame)) // maps made them
	})
	random, before := rand.New(rand.NewPCG(5, 6)), n.counters()
	for round := range 6000 {
		in, other := all[random.IntN(len(all))], all[random.IntN(len(all))]
		if random.IntN(3) > 0 {
			in.frame = mutate(random, in.frame, other.frame)
		}
		switch random.IntN(200) {
		case 0:
			n.dropFlows()
		case 1:
			must(t, n.maps.DecideAgain())
		case 2:
			n.age()
		}
		if random.IntN(20) == 0 {
			in.gso = uint32(random.IntN(2000))
		}
		if judgeOutside(t, n, in); t.Failed() {
			t.Fatalf("round %d: program %s, interface %d, segments of %d: % x", round, in.program, in.dev, in.gso, in.frame)
		}
	}
	for i, packets := range n.counters() { // what the rounds are to hold has to come about in them
		if reason := bpf.LaceReason(i); reason >= bpf.LaceReasonREASON_EGRESS && reason <= lastPassing && packets-before[i] < 50 {
			t.Errorf("only %d packets were counted as %s", packets-before[i], words([]bpf.LaceReason{reason}))
		}
	}
}

func orPod(program string) string {
	if program == "" {
		return "pod_l3"
	}
	return program
}

// judgeOutside runs a packet and holds what must always be so.
func judgeOutside(t *testing.T, n *node, in input) {
	t.Helper()
	n.forget()
	r, err := n.try(in)
	if err != nil {
		return // the kernel takes no such packet, or no such size of segments
	}
	checkVerdict(t, r, in)
	if r.verdict != redirect {
		return
	}
	for _, reason := range r.counted {
		switch reason {
		case bpf.LaceReasonREASON_EGRESS:
			n.wantLet(r)
		case bpf.LaceReasonREASON_INGRESS, bpf.LaceReasonREASON_FROM_HOST:
			n.wantLetIn(r, in)
		}
	}
}

// wantLet wants a packet that leaves to be one that a peering lets out, or an answer to one that was let in.
func (n *node) wantLet(r result) {
	n.t.Helper()
	to, from := unmappedOf(r.ctx.Key.Dst.U8), topology.NetworkID(r.ctx.Key.Network)
	external := n.externalOf(to)
	if n.peered(from, external) || n.peered(external, from) {
		return
	}
	n.t.Errorf("a packet of network %d left for %s, which is in network %#x: %s", from, to, external, spaced(r.out))
}

// wantLetIn wants a packet that came to a container from outside or the host to be one of those who may.
func (n *node) wantLetIn(r result, in input) {
	n.t.Helper()
	from, to := unmappedOf(r.ctx.Key.Src.U8), topology.NetworkID(r.ctx.Network)
	host := from.IsLoopback() || from == worlds[false].own || from == worlds[true].own || from == worlds[false].own2 || from == worlds[true].own2
	if host && in.program == "outer" {
		n.t.Errorf("a packet from the host's own address %s came in from outside", from)
	}
	if host && n.peered(topology.HostsID, to) {
		return
	}
	if from.IsLoopback() {
		from = worlds[from.Is6()].own
	}
	external := n.externalOf(from)
	if external == 0 || !(n.peered(external, to) || n.peered(to, external)) {
		n.t.Errorf("a packet from %s, which is in network %#x, came to network %d", from, external, to)
	}
	if r.ctx.Ifindex == 0 || slices.Equal(r.out[:6], make([]byte, 6)) {
		n.t.Errorf("a packet came to interface %d: %s", r.ctx.Ifindex, spaced(r.out))
	}
}

func unmappedOf(b [16]byte) netip.Addr { return netip.AddrFrom16(b).Unmap() }

// externalOf is the external network with the longest prefix for an address; 0: none.
func (n *node) externalOf(a netip.Addr) (id topology.NetworkID) {
	bits := -1
	for _, e := range n.plan.Externals {
		for _, p := range e.Prefixes {
			if p.Contains(a) && p.Bits() > bits {
				id, bits = e.ID, p.Bits()
			}
		}
	}
	return id
}

func (n *node) peered(from, to topology.NetworkID) bool {
	return slices.ContainsFunc(n.plan.Peerings, func(g plan.Peering) bool { return g.From == from && g.To == to })
}
