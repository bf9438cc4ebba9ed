// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// peered are the ways from network 100 to network 400.
func peered(p *pair, protocol uint8) map[string]talk {
	out := map[string]talk{}
	for name, c := range talks {
		if c.a.network() != c.b.network() {
			c.pair, c.protocol, c.aport, c.bport = p, protocol, 40000, 80
			out[name] = c
		}
	}
	return out
}

// eachPeered runs f in all of them.
func eachPeered(t *testing.T, p *pair, protocol uint8, f func(t *testing.T, c talk)) {
	t.Helper()
	for name, c := range peered(p, protocol) {
		t.Run(name, func(t *testing.T) {
			c.pair = p.on(t)
			c.apply(nil)
			c.forgetAll()
			f(t, c)
		})
	}
}

// TestPeering: flows may be opened one way, answers need no peering, and the line that lets them pass is told.
func TestPeering(t *testing.T) {
	eachPeered(t, newPair(t), protoUDP, func(t *testing.T, c talk) {
		there, back := c.udp()
		c.wantRefused(c.b, back, "no_route")
		c.wantTold(c.b.number, "refused no_route 400>0 line 0")
		c.wantPassed(c.a, there)
		c.wantOpened()
		c.wantPassed(c.b, back)
		c.wantState(bpf.LaceFlowStateFLOW_ESTABLISHED)
		other := udp(c.b.addr(c.v6), c.a.addr(c.v6), c.bport+1, c.aport, 3) // not an answer
		c.wantRefused(c.b, other, "no_route")
		c.wantEntries(2)
		for _, number := range c.at() {
			if line := c.nodes[number].flow(c.back()).Line; line != peeringLine {
				t.Errorf("node %d: answers are let pass by line %d", number, line)
			}
		}
	})
}

// wantOpened wants a peered flow told of.
func (c talk) wantOpened() {
	c.t.Helper()
	if len(c.at()) == 1 {
		c.wantTold(c.a.number, fmt.Sprintf("passed local 100>400 line %d", peeringLine))
		return
	}
	c.wantTold(c.a.number, fmt.Sprintf("passed encapsulated 100>400 line %d", peeringLine))
	c.wantTold(c.b.number, fmt.Sprintf("passed decapsulated 100>400 line %d", peeringLine))
}

// TestPeeringOnTheWire: the SID names the receiver's network, the outer source the sender's, both ways.
func TestPeeringOnTheWire(t *testing.T) {
	eachPeered(t, newPair(t), protoUDP, func(t *testing.T, c talk) {
		if len(c.at()) == 1 {
			return
		}
		there, back := c.udp()
		for _, way := range []struct {
			from, to host
			packet   ip
		}{{c.a, c.b, there}, {c.b, c.a, back}, {c.a, c.b, there}, {c.b, c.a, back}} {
			j := c.wantPassed(way.from, way.packet)
			src, dst := netip.AddrFrom16([16]byte(j.sent.out[22:38])), netip.AddrFrom16([16]byte(j.sent.out[38:54]))
			if want := locatorOf(way.from.number, 48).Source(way.from.network(), 0); src != want {
				t.Errorf("outer source %s, want %s", src, want)
			}
			if want := locatorOf(way.to.number, 48).SID(topology.EndDT46, way.to.network()).Addr; dst != want {
				t.Errorf("SID %s, want %s", dst, want)
			}
		}
	})
}

// TestNoPeering: what a receiver refuses, whatever another node sends it.
func TestNoPeering(t *testing.T) {
	p := newPair(t)
	toWeb, toDB := udp(db2.addr(false), web1.addr(false), 1, 2, 3), udp(web2.addr(false), db1.addr(false), 1, 2, 3)
	outside := udp(web2.addr(false), netip.MustParseAddr("10.61.1.10"), 1, 2, 3)
	for name, row := range map[string]struct {
		packet ip
		want   string
	}{
		"against the peering":              {outerOf(toWeb, db, 2, backend, 0), "no_peering"},
		"along it":                         {outerOf(toDB, backend, 2, db, 0), "decapsulated"},
		"from a network without one":       {outerOf(toDB, overlap, 2, db, 0), "no_peering"},
		"from a network that is not known": {outerOf(toDB, elsewhere, 2, db, 0), "no_peering"},
		"to an address outside of it":      {outerOf(outside, backend, 2, db, 0), "no_peering"},
		"SID of another network":           {outerOf(toDB, backend, 2, overlap, 0), "no_peering"},
		"SID of the sender's network":      {outerOf(toDB, backend, 2, backend, 0), "no_endpoint"},
		"from the router":                  {func() ip { o := outerOf(toDB, 0, 3, db, 0); o.src = locatorOf(3, 48).Addr(); return o }(), "decapsulated"},
		"the router claims another":        {outerOf(toDB, db, 3, db, 0), "no_peering"},
		"claims the container here":        {outerOf(udp(db1.addr(false), web1.addr(false), 1, 2, 3), db, 2, backend, 0), "spoofed_address"},
	} {
		t.Run(name, func(t *testing.T) {
			n := p.on(t).nodes[1]
			wantUplink(t, n, row.packet, row.want)
			if refused := row.want != "decapsulated"; refused != (len(n.flows()) == 0) {
				t.Errorf("%s, and %d entries", row.want, len(n.flows()))
			}
		})
	}
	t.Run("at the sender", func(t *testing.T) {
		c := p.on(t)
		for from, dst := range map[host]string{x1: "10.60.2.10", x2: "10.60.2.10", web1: "10.61.0.1", near1: "10.60.9.9", db1: "10.40.1.10"} {
			if j := c.send(from, udp(from.addr(false), netip.MustParseAddr(dst), 1, 2, 3), 0); j.words != "no_route" {
				t.Errorf("from network %d to %s: %s, want no_route", from.network(), dst, j.words)
			}
		}
	})
}

// TestOwnNetworkFirst: a peering whose prefix holds addresses of the sender's own network takes none of them away, and the
// longest prefix decides among peerings.
func TestOwnNetworkFirst(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	c := talk{pair: p.on(t), a: web1, b: web2, protocol: protoUDP, aport: 40000, bport: 80}
	c.apply(func(p *plan.Plan) {
		p.Peerings = append(peeringTo(db, "10.0.0.0/8"), peeringTo(elsewhere, "10.60.2.0/24")...)
	})
	there, back := c.udp()
	c.wantPassed(c.a, there)
	c.wantPassed(c.b, back)
	if f := c.nodes[1].flow(c.there()); f.Network != uint32(backend) || f.Line != backendLine {
		t.Errorf("to network %d by line %d", f.Network, f.Line)
	}
	c.wantRefused(web1, udp(web1.addr(false), db2.addr(false), 1, 2, 3), "no_route") // network 300 has no blocks
	c.wantPassed(web2, udp(web2.addr(false), db1.addr(false), 1, 2, 3))
}

// TestForeignNetwork: a node that has no block of the peered network knows enough of it.
func TestForeignNetwork(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for name, gone := range map[string]struct {
		id     topology.NetworkID
		number int
	}{"the sender's node has none of the receiver's": {db, 1}, "the receiver's node has none of the sender's": {backend, 2}} {
		t.Run(name, func(t *testing.T) {
			c := talk{pair: p.on(t), a: web1, b: db2, protocol: protoUDP, aport: 40000, bport: 80}
			c.apply(nil)
			c.applyOn(gone.number, func(p *plan.Plan) { makeForeign(p, gone.id, gone.number) })
			there, back := c.udp()
			c.wantRefused(c.b, back, "no_route")
			c.forgetAll()
			c.wantPassed(c.a, there)
			c.wantPassed(c.b, back)
			c.wantOpened()
			c.decideAgain()
			c.wantPassed(c.b, back)
			c.wantPassed(c.a, there)
		})
	}
}

// makeForeign takes the node's own part of a network away.
func makeForeign(p *plan.Plan, id topology.NetworkID, number int) {
	p.Networks = slices.DeleteFunc(p.Networks, func(n plan.Network) bool { return n.ID == id })
	p.Foreign = append(p.Foreign, plan.Foreign{ID: id, BlockBits4: plan.Lengths{24}, BlockBits6: plan.Lengths{64}, Line: dbLine})
	p.Blocks = slices.DeleteFunc(p.Blocks, func(b plan.Block) bool { return b.Network == id && b.Local })
	p.Ports = slices.DeleteFunc(p.Ports, func(v plan.Port) bool { return v.NetworkID == id })
}

// unreachable is the error that a host sends about a packet for a port that nobody listens at.
func unreachable(about ip) ip {
	kind, code := uint8(3), uint8(3)
	if about.src.Is6() {
		kind, code = 1, 4
	}
	return icmp(about.dst, about.src, kind, code, append([]byte{0, 0, 0, 0}, afterHop(about)...))
}

// TestPeeringErrors: ICMP errors travel against the peering as answers do, and with their flow only.
func TestPeeringErrors(t *testing.T) {
	decidedByNoKernel(t)
	eachPeered(t, newPair(t), protoUDP, func(t *testing.T, c talk) {
		there, _ := c.udp()
		c.wantRefused(c.b, unreachable(there), "no_flow")
		c.wantPassed(c.a, there)
		c.backdate(aged)
		c.wantPassed(c.b, unreachable(there))
		c.wantState(bpf.LaceFlowStateFLOW_NEW)
		c.wantSeen(c.back(), false)
		other := udp(there.src, there.dst, c.aport+1, c.bport, 3)
		c.wantRefused(c.b, unreachable(other), "no_flow")
		c.wantEntries(2)
		c.decideAgain()
		c.wantPassed(c.b, unreachable(there))
		c.apply(noPeering)
		c.forgetAll()
		c.wantRefused(c.b, unreachable(there), "no_peering")
		c.wantTold(c.b.number, "ended no_peering 400>100 line 0")
		c.wantGone(c.b.number)
	})
}

// TestPeeringCounters: what goes on is counted for the network of the container here, what is refused for the sender's.
func TestPeeringCounters(t *testing.T) {
	p := newPair(t)
	c := talk{pair: p.on(t), a: web1, b: db2, protocol: protoUDP, aport: 40000, bport: 80}
	there, back := c.establish()
	c.wantPassed(c.a, there)
	c.wantRefused(c.b, udp(back.src, back.dst, 1, 2, 3), "no_route")
	for number, want := range map[int][]string{
		1: {"100 decapsulated 1", "100 encapsulated 2"}, 2: {"400 decapsulated 2", "400 encapsulated 1", "400 no_route 1"},
	} {
		counters, err := c.nodes[number].maps.NetworkCounters()
		must(t, err)
		var got []string
		for _, counter := range counters {
			if counter.Packets > 0 {
				got = append(got, fmt.Sprint(counter.Network, " ", maps.ReasonName(counter.Reason), " ", counter.Packets))
			}
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("node %d has counted %q, want %q", number, got, want)
		}
	}
}
