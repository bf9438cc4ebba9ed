// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// decideAgain is what a detach does: the same slot, another generation.
func (p *pair) decideAgain() {
	p.t.Helper()
	for _, n := range p.nodes {
		must(p.t, n.maps.DecideAgain())
	}
}

// TestDecidedAgain: a flow that is still allowed keeps what is known of it, whichever side speaks first under the new
// generation, and nothing is told of it.
func TestDecidedAgain(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for name, lines := range map[string][]string{
		"new": {"a S 1000 0 0 new"}, "answered": {"a S 1000 0 0 new", "b SA 5000 1001 0 answered"}, "established": opened("a PA 1001 5001 10 established"),
		"closing": opened("b FA 5001 1001 0 closing"), "closed": opened("a R 1001 0 0 closed"), "picked up": {"a PA 1001 5001 1 new", "b A 5001 1002 0 established"},
	} {
		for _, side := range []string{"a", "b"} {
			t.Run(name+", "+side, func(t *testing.T) {
				eachTalk(t, p, protoTCP, func(t *testing.T, c talk) {
					for _, line := range lines {
						c.step(line)
					}
					c.keepsAll(side)
				})
			})
		}
	}
}

// keepsAll has the flow decided again at a packet that changes no state.
func (c talk) keepsAll(side string) {
	c.t.Helper()
	c.backdate(aged)
	before := map[int]map[bpf.LaceFlowKey]bpf.LaceFlow{}
	for _, number := range c.at() {
		before[number] = c.nodes[number].flows()
		c.events(number)
	}
	c.decideAgain()
	for _, side := range []string{side, "a", "b"} {
		from, packet := c.tcpSegment(side, "R", 12345, 0, 0) // a reset that nobody would believe
		c.wantPassed(from, packet)
	}
	for _, number := range c.at() {
		c.wantTold(number)
		g, err := c.nodes[number].maps.Generation()
		must(c.t, err)
		after := c.nodes[number].flows()
		if len(after) != 2 {
			c.t.Errorf("node %d has %d entries", number, len(after))
		}
		for k, was := range before[number] {
			is := after[k]
			if is.Generation != g || is.Packets == was.Packets || is.Bytes == was.Bytes {
				c.t.Errorf("node %d, %s: generation %d, %d packets", number, keyText(k), is.Generation, is.Packets)
			}
			if is.Ifindex == 0 { // to another node: the size is the nexthop's
				was.Mtu = is.Mtu
			}
			was.Packets, was.Bytes, was.Seen, was.Generation, was.Source = is.Packets, is.Bytes, is.Seen, is.Generation, is.Source
			if is != was {
				c.t.Errorf("node %d, %s:\n got %+v\nwant %+v", number, keyText(k), is, was)
			}
		}
		total := uint64(0)
		for k, f := range after {
			total += f.Packets - before[number][k].Packets
		}
		if total != 3 {
			c.t.Errorf("node %d has counted %d packets more, want 3", number, total)
		}
	}
}

// establish lets packets go both ways.
func (c talk) establish() (there, back ip) {
	c.t.Helper()
	there, back = c.udp()
	c.wantPassed(c.a, there)
	c.wantPassed(c.b, back)
	for _, number := range c.at() {
		c.events(number)
	}
	return there, back
}

// wantRefused sends a packet and wants it to get so far.
func (c talk) wantRefused(from host, p ip, want string) {
	c.t.Helper()
	if j := c.send(from, p, 0); j.words != want {
		c.t.Errorf("from %s: %s, want %s", p.src, j.words, want)
	}
}

// TestPeeringRemoved: the next packet of the flow ends it, in either direction.
func TestPeeringRemoved(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for name, ways := range map[string]talk{"across nodes": {a: web1, b: db2}, "on one node": {a: web1, b: db1}, "IPv6": {a: web2, b: db1, v6: true}} {
		for _, fromB := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, answer=%v", name, fromB), func(t *testing.T) {
				c := ways
				c.pair, c.protocol, c.aport, c.bport = p.on(t), protoUDP, 40000, 80
				c.apply(nil)
				there, back := c.establish()
				c.apply(noPeering)
				if fromB {
					c.wantRefused(c.b, back, "no_peering")
					c.wantTold(c.b.number, "ended no_peering 400>100 line 0")
					c.wantGone(c.b.number)
				}
				c.wantRefused(c.a, there, "no_route")
				if c.a.number != c.b.number || !fromB {
					c.wantTold(c.a.number, "ended no_route 100>400 line 0")
				}
				c.wantGone(c.a.number)
				c.forgetAll()
				c.apply(nil)
				c.wantPassed(c.a, there)
				c.wantPassed(c.b, back)
			})
		}
	}
}

// TestEndedConnection: a TCP connection that was ended is not taken up in the middle by the side that may open flows to the
// other; a SYN of that side opens a new one, also over the old one's ports.
func TestEndedConnection(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	both := func(p *plan.Plan) {
		p.Peerings = append(p.Peerings, plan.Peering{From: db, To: backend, Prefix: netip.MustParsePrefix("10.40.0.0/16"), Line: 91},
			plan.Peering{From: db, To: backend, Prefix: netip.MustParsePrefix("fd40::/32"), Line: 91})
	}
	for name, ways := range map[string]talk{"across nodes": {a: db2, b: web1}, "on one node": {a: db1, b: web1}, "IPv6": {a: db1, b: web2, v6: true}} {
		t.Run(name, func(t *testing.T) {
			c := ways
			c.pair, c.protocol, c.aport, c.bport = p.on(t), protoTCP, 40000, 80
			c.apply(both)
			db, dbSyn := c.tcpSegment("a", "S", 1000, 0, 0)
			web, answer := c.tcpSegment("b", "SA", 9000, 1001, 0)
			_, ack := c.tcpSegment("a", "A", 1001, 9001, 0)
			_, data := c.tcpSegment("b", "A", 9001, 1001, 100)
			_, again := c.tcpSegment("b", "S", 20000, 0, 0)
			_, agreed := c.tcpSegment("a", "SA", 30000, 20001, 0)
			c.wantPassed(db, dbSyn)
			c.wantPassed(web, answer)
			c.wantPassed(db, ack)
			c.forgetAll()
			c.apply(nil) // web may still open flows to db
			c.wantRefused(web, data, "no_peering")
			c.wantTold(web.number, "ended no_peering 100>400 line 0")
			for range 2 {
				c.wantRefused(web, data, "no_flow")
				c.wantTold(web.number, "refused no_flow 100>0 line 0")
			}
			c.apply(both) // an end stays one
			c.wantRefused(web, data, "no_flow")
			c.apply(nil)
			c.forgetAll()
			c.wantPassed(web, again)
			c.wantPassed(db, agreed)
		})
	}
}

func (p *pair) forgetAll() {
	p.t.Helper()
	for number, n := range p.nodes {
		n.forget()
		p.events(number)
	}
}

// wantGone wants no entry on a node.
func (c talk) wantGone(number int) {
	c.t.Helper()
	if n := len(c.nodes[number].flows()); n != 0 {
		c.t.Errorf("node %d still has %d entries", number, n)
	}
}

// TestPeeringRemovedAtTheReceiver: the nodes get a new topology one after the other.
func TestPeeringRemovedAtTheReceiver(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	c := talk{pair: p.on(t), a: web1, b: db2, protocol: protoUDP, aport: 40000, bport: 80}
	there, back := c.establish()
	c.applyOn(2, noPeering)
	c.wantRefused(c.a, there, "encapsulated no_peering")
	c.wantTold(2, "ended no_peering 100>400 line 0")
	c.wantGone(2)
	c.wantRefused(c.b, back, "no_route")
	c.wantTold(1)
	c.applyOn(2, nil)
	c.wantPassed(c.a, there)
	c.wantPassed(c.b, back)
	c.applyOn(1, noPeering)
	c.wantRefused(c.b, back, "encapsulated no_peering")
	c.wantTold(1, "ended no_peering 400>100 line 0")
	c.wantGone(1)
	c.wantRefused(c.b, back, "encapsulated no_peering")
	c.wantTold(1, "refused no_peering 400>100 line 0")
}

// TestPeeringAdded: what was refused is let pass at once.
func TestPeeringAdded(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	eachTalk(t, p, protoUDP, func(t *testing.T, c talk) {
		if c.a.network() == c.b.network() {
			return
		}
		c.a, c.b = c.b, c.a
		c.apply(nil)
		there, back := c.udp()
		c.wantRefused(c.a, there, "no_route")
		c.apply(func(p *plan.Plan) {
			p.Peerings = append(p.Peerings, plan.Peering{From: db, To: backend, Prefix: netip.MustParsePrefix("10.40.0.0/16"), Line: 91},
				plan.Peering{From: db, To: backend, Prefix: netip.MustParsePrefix("fd40::/32"), Line: 91})
		})
		c.wantPassed(c.a, there)
		c.wantPassed(c.b, back)
		c.wantState(bpf.LaceFlowStateFLOW_ESTABLISHED)
		if line := c.nodes[c.b.number].flow(c.there()).Line; line != 91 {
			t.Errorf("let pass by line %d", line)
		}
	})
}

// renumber gives a node another place among the nexthops of the others.
func (p *pair) renumber(at, peer int, index uint32) {
	p.t.Helper()
	n := p.nodes[at]
	next := n.pairPlan()
	for i := range next.Peers {
		if next.Peers[i].Index == uint32(peer) {
			next.Peers[i].Index = index
		}
	}
	for i := range next.Blocks {
		if next.Blocks[i].Peer == uint32(peer) && !next.Blocks[i].Local {
			next.Blocks[i].Peer = index
		}
	}
	hop := maps.Nexthop{Peer: index, Ifindex: uint32(n.bed.index[uplink]), MTU: linkMTU, Known: true, Dst: nexthopDst, Src: nexthopSrc}
	_, err := n.maps.Sync(next, false, n.pairDevices(), []maps.Nexthop{hop})
	must(p.t, err)
}

// TestNodesRenumbered: with another list of nodes a flow goes on to the right one, whichever side speaks first.
func TestNodesRenumbered(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for _, first := range []string{"a", "b"} {
		eachTalk(t, p, protoUDP, func(t *testing.T, c talk) {
			if c.a.number == c.b.number {
				return
			}
			c.apply(nil)
			there, back := c.establish()
			c.renumber(1, 2, 7)
			c.renumber(2, 1, 9)
			if first == "b" {
				c.wantPassed(c.b, back)
			}
			for range 2 {
				for from, packet := range map[host]ip{c.a: there, c.b: back} {
					want := map[int]uint32{1: 7, 2: 9}[from.number]
					if j := c.wantPassed(from, packet); j.sent.ctx.Peer != want {
						t.Errorf("from node %d to peer %d, want %d", from.number, j.sent.ctx.Peer, want)
					}
				}
			}
		})
	}
}

// moveBlock gives a block of network 100 to the router.
func moveBlock(prefix string) func(p *plan.Plan) {
	return func(p *plan.Plan) {
		for i, b := range p.Blocks {
			if b.Network == backend && b.Prefix == netip.MustParsePrefix(prefix) {
				p.Blocks[i].Peer, p.Blocks[i].SID = router, locatorOf(router, 48).SID(topology.EndDT46, backend)
			}
		}
	}
}

// TestBlockMoved: where a flow was opened to goes where the blocks say now; an answer of before changes nothing of that.
func TestBlockMoved(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("late answer=%v", late), func(t *testing.T) {
			c := talk{pair: p.on(t), a: web1, b: web2, protocol: protoUDP, aport: 40000, bport: 80}
			c.apply(nil)
			there, back := c.establish()
			c.applyOn(1, moveBlock("10.40.2.0/24"))
			if late {
				c.wantPassed(c.b, back)
			}
			for range 2 {
				if j := c.send(c.a, there, 0); j.words != "encapsulated elsewhere" || j.sent.ctx.Peer != router || numberIn(j.sent.out[38:]) != router {
					t.Errorf("%s, to peer %d", j.words, j.sent.ctx.Peer)
				}
			}
		})
	}
}

// TestAnsweredByAnotherNode: an answer may come by another way than the flow goes; the flow keeps its own when it is decided again.
func TestAnsweredByAnotherNode(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	c := talk{pair: p.on(t), a: web1, b: web2, protocol: protoUDP, aport: 40000, bport: 80}
	there, back := c.establish()
	must(t, c.nodes[1].maps.DecideAgain())
	wantUplink(t, c.nodes[1], outerOf(back, backend, router, backend, 0), "decapsulated")
	if j := c.wantPassed(c.a, there); j.at != 2 {
		t.Errorf("the flow goes to node %d now", j.at)
	}
}

// TestBlockComesHere: the block of a flow's other end is this node's now, and so is a container with its address.
func TestBlockComesHere(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	c := talk{pair: p.on(t), a: web1, b: web2, protocol: protoTCP, aport: 40000, bport: 80}
	for _, line := range handshake {
		c.step(line)
	}
	c.applyOn(1, func(p *plan.Plan) {
		for i := range p.Blocks {
			p.Blocks[i].Local = p.Blocks[i].Local || p.Blocks[i].Network == backend
		}
		for i := range p.Ports {
			if p.Ports[i].HostIf == fmt.Sprint(podB) {
				p.Ports[i].V4, p.Ports[i].V6 = web2.addr(false), web2.addr(true)
			}
		}
	})
	c.events(1)
	_, packet := c.tcpSegment("a", "PA", 1001, 5001, 10)
	r := c.nodes[1].run(input{program: "pod_l3", dev: podA, frame: fromA(packet)})
	wantCounted(t, r, redirect, bpf.LaceReasonREASON_LOCAL)
	if r.ctx.Ifindex != uint32(c.nodes[1].bed.index[podB]) {
		t.Errorf("delivered to interface %d", r.ctx.Ifindex)
	}
	c.wantTold(1, fmt.Sprintf("passed local 100>100 line %d", backendLine))
	if f := c.nodes[1].flow(c.there()); f.Packets != 1 || f.Flags != uint16(bpf.LaceFlowFlagsFLOW_PICKED) || f.State != uint8(bpf.LaceFlowStateFLOW_NEW) {
		t.Errorf("the new flow is %+v", f)
	}
}

// withoutNetwork takes a network out of the topology, while its containers are still there.
func withoutNetwork(id topology.NetworkID) func(p *plan.Plan) {
	return func(p *plan.Plan) {
		p.Networks = slices.DeleteFunc(p.Networks, func(n plan.Network) bool { return n.ID == id })
		p.Blocks = slices.DeleteFunc(p.Blocks, func(b plan.Block) bool { return b.Network == id })
		p.Peerings = slices.DeleteFunc(p.Peerings, func(v plan.Peering) bool { return v.From == id || v.To == id })
	}
}

// TestNetworkGone: flows from and to it end, in either direction; those of others go on.
func TestNetworkGone(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for name, row := range map[string]struct {
		a, b        host
		gone        topology.NetworkID
		first       string // a's next packet
		second      string // b's
		told, told2 string
	}{
		"across nodes":          {web1, web2, backend, "no_network", "no_network", "ended no_network 100>100 line 0", "ended no_network 100>100 line 0"},
		"on one node":           {web1, near1, backend, "no_network", "no_network", "ended no_network 100>100 line 0", "refused no_network 100>0 line 0"},
		"the receiver's":        {web1, db2, db, "no_route", "no_network", "ended no_route 100>400 line 0", "ended no_network 400>100 line 0"},
		"the sender's":          {web1, db2, backend, "no_network", "no_peering", "ended no_network 100>400 line 0", "ended no_peering 400>100 line 0"},
		"the receiver's, local": {web1, db1, db, "no_route", "no_network", "ended no_route 100>400 line 0", "refused no_network 400>0 line 0"},
	} {
		t.Run(name, func(t *testing.T) {
			c := talk{pair: p.on(t), a: row.a, b: row.b, protocol: protoUDP, aport: 40000, bport: 80}
			c.apply(nil)
			there, back := c.establish()
			c.apply(withoutNetwork(row.gone))
			c.wantRefused(c.a, there, row.first)
			c.wantTold(c.a.number, row.told)
			c.wantRefused(c.b, back, row.second)
			c.wantTold(c.b.number, row.told2)
			for _, number := range c.at() {
				c.wantGone(number)
			}
		})
	}
	t.Run("from the underlay", func(t *testing.T) {
		c := talk{pair: p.on(t), a: web1, b: web2, protocol: protoUDP, aport: 40000, bport: 80}
		c.apply(nil)
		there, back := c.establish()
		c.applyOn(2, withoutNetwork(backend))
		c.wantRefused(c.a, there, "encapsulated unknown_network")
		c.wantTold(2, "ended unknown_network 100>100 line 0")
		c.wantGone(2)
		c.applyOn(2, nil)
		c.applyOn(1, withoutNetwork(backend))
		c.wantPassed(x1, udp(x1.addr(false), x2.addr(false), 1, 2, 3))
		c.wantRefused(c.b, back, "encapsulated unknown_network")
	})
}

// reattach puts another container in the place of one: the same addresses, another interface.
func (p *pair) reattach(h host, dev int) {
	p.t.Helper()
	n := p.nodes[h.number]
	p.moved = map[host]int{h: dev}
	next := n.pairPlan()
	devices := n.pairDevices()
	for _, port := range next.Ports {
		if port.HostIf != fmt.Sprint(h.dev) {
			continue
		}
		must(p.t, n.maps.DeletePort(port, devices[port.HostIf].Index))
		must(p.t, n.maps.DecideAgain())
		must(p.t, n.maps.PutPort(port, maps.Device{Index: uint32(n.bed.index[dev]), MTU: podMTU}))
	}
	p.t.Cleanup(func() {
		must(p.t, n.maps.Ports.Delete(bpf.LacePortKey{Ifindex: uint32(n.bed.index[dev]), Slot: p.slot(h.number)}))
	})
}

func (p *pair) slot(number int) uint32 {
	p.t.Helper()
	g, err := p.nodes[number].maps.Generation()
	must(p.t, err)
	return g & 1
}

// sendAs lets a container send by an interface that is not the fixture's.
func (p *pair) sendAs(from host, dev int, packet ip) string {
	p.t.Helper()
	r := p.nodes[from.number].run(input{program: "pod_l3", dev: dev, frame: toGateway(from.number, from.dev, packet)})
	return strings.Join(words(r.counted), " ")
}

// TestAddressTakenOver: a container that has the address of one that is gone has nothing of its flows.
func TestAddressTakenOver(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for name, ways := range map[string]talk{"across nodes": {a: web1, b: db2}, "on one node": {a: web1, b: db1}} {
		for _, protocol := range []uint8{protoUDP, protoTCP} {
			t.Run(fmt.Sprintf("the answering one, %s, protocol %d", name, protocol), func(t *testing.T) {
				c := ways
				c.pair, c.protocol, c.aport, c.bport = p.on(t), protocol, 40000, 80
				there, back := c.exchange()
				c.reattach(c.b, stranger)
				if got := c.sendAs(c.b, stranger, back); got != "no_flow" {
					t.Errorf("the new container answers for the old one: %s", got)
				}
				c.wantGone(c.b.number)
				j := c.send(c.a, there, 0)
				if j.words != c.passes() {
					t.Errorf("to the new container: %s", j.words)
				}
				if got := c.sendAs(c.b, stranger, back); !strings.HasPrefix(c.passes(), got) {
					t.Errorf("the new container answers for itself: %s", got)
				}
			})
			t.Run(fmt.Sprintf("the opening one, %s, protocol %d", name, protocol), func(t *testing.T) {
				c := ways
				c.pair, c.protocol, c.aport, c.bport = p.on(t), protocol, 40000, 80
				there, back := c.exchange()
				c.reattach(c.a, stranger)
				want := map[int]string{1: "no_flow", 2: "encapsulated no_flow"}[len(c.at())]
				c.wantRefused(c.b, back, want)
				c.wantGone(c.a.number)
				if got := c.sendAs(c.a, stranger, there); !strings.HasPrefix(c.passes(), got) {
					t.Errorf("the new container opens a flow: %s", got)
				}
			})
			t.Run(fmt.Sprintf("the opening one speaks first, %s, protocol %d", name, protocol), func(t *testing.T) {
				c := ways
				c.pair, c.protocol, c.aport, c.bport = p.on(t), protocol, 40000, 80
				there, _ := c.exchange()
				c.reattach(c.a, stranger)
				c.events(c.a.number)
				if got := c.sendAs(c.a, stranger, there); !strings.HasPrefix(c.passes(), got) {
					t.Errorf("the new container opens a flow: %s", got)
				}
				if f := c.nodes[c.a.number].flow(c.there()); f.Packets != 1 || f.State != uint8(bpf.LaceFlowStateFLOW_NEW) {
					t.Errorf("the new container's flow has %d packets, state %d", f.Packets, f.State)
				}
				if told := c.events(c.a.number); len(told) != 1 || told[0].Verdict != uint8(bpf.LaceVerdictVERDICT_PASSED) {
					t.Errorf("told %+v, want one new flow", told)
				}
			})
		}
	}
}

// exchange lets packets go both ways, TCP ones too, and returns the next of each side.
func (c talk) exchange() (there, back ip) {
	c.t.Helper()
	c.apply(nil) // the fixture's containers again
	if c.protocol == protoUDP {
		return c.establish()
	}
	for _, line := range handshake {
		c.step(line)
	}
	_, there = c.tcpSegment("a", "PA", 1001, 5001, 10)
	_, back = c.tcpSegment("b", "PA", 5001, 1001, 10)
	return there, back
}

// sweep is what two nodes should do, which get the peering and lose it independently.
type sweep struct {
	open  [3]bool // by number of the node
	known [3]bool // it has the flow
}

// a sends: what is counted.
func (s *sweep) opener() string {
	if s.known[1] = s.open[1]; !s.open[1] {
		return "no_route"
	}
	if s.known[2] = s.open[2]; !s.open[2] {
		return "encapsulated no_peering"
	}
	return "encapsulated decapsulated"
}

// b answers.
func (s *sweep) answerer() string {
	switch {
	case !s.known[2]:
		return "no_route"
	case !s.open[2]:
		s.known[2] = false
		return "no_peering"
	case !s.known[1] || !s.open[1]:
		s.known[1] = false
		return "encapsulated no_peering"
	}
	return "encapsulated decapsulated"
}

// TestSweep switches generations between the packets of a flow, on both nodes independently: each packet is judged by what is
// active there at that time, and by nothing of before.
func TestSweep(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	c := talk{pair: p.on(t), a: web1, b: db2, protocol: protoUDP, aport: 40000, bport: 80}
	there, back := c.udp()
	s := sweep{open: [3]bool{1: true, 2: true}}
	random := rand.New(rand.NewPCG(3, 4))
	for round := range 200 {
		switch number := 1 + random.IntN(2); random.IntN(4) {
		case 0:
			s.open[number] = true
			c.applyOn(number, nil)
		case 1:
			s.open[number] = false
			c.applyOn(number, noPeering)
		case 2:
			must(t, c.nodes[number].maps.DecideAgain())
		}
		from, packet, want := c.a, there, ""
		if random.IntN(2) == 0 {
			want = s.opener()
		} else {
			from, packet = c.b, back
			want = s.answerer()
		}
		c.forgetAll()
		if j := c.send(from, packet, 0); j.words != want {
			t.Fatalf("round %d, %+v: from %s: %s, want %s", round, s, packet.src, j.words, want)
		}
	}
}

// TestSwitchUnderPackets: two topologies that have nothing in common for an address: it is in network 400 on node 2, or in network
// 100 at the router. While one replaces the other, again and again, a packet goes one way or the other, never a mix of both.
func TestSwitchUnderPackets(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	n := p.nodes[1]
	there := udp(web1.addr(false), db2.addr(false), 1, 2, 3)
	other := func(p *plan.Plan) {
		p.Peerings = nil
		moved := slices.DeleteFunc(slices.Clone(p.Blocks), func(b plan.Block) bool { return b.Network != db || !b.Prefix.Addr().Is4() || b.Local })
		for _, b := range moved {
			b.Network, b.Peer, b.SID = backend, router, locatorOf(router, 48).SID(topology.EndDT46, backend)
			p.Blocks = append(p.Blocks, b)
		}
	}
	stop, failed, ways := make(chan struct{}), make(chan error, 1), map[string]int{}
	go func() { failed <- n.follow(stop, there, ways) }()
	for range 40 {
		p.applyOn(1, other)
		p.applyOn(1, nil)
	}
	close(stop)
	must(t, <-failed)
	want := []string{fmt.Sprint(locatorOf(2, 48).SID(topology.EndDT46, db).Addr), fmt.Sprint(locatorOf(router, 48).SID(topology.EndDT46, backend).Addr)}
	for way, times := range ways {
		t.Logf("%s: %d packets", way, times)
		if !slices.Contains(want, way) {
			t.Errorf("%d packets: %s", times, way)
		}
	}
	if len(ways) != 2 {
		t.Errorf("%d ways were seen, want both", len(ways))
	}
}

// follow sends packets of flows that are known and of new ones, and counts by their SID where they go.
func (n *node) follow(stop chan struct{}, packet ip, ways map[string]int) error {
	for i := uint16(0); ; i++ {
		select {
		case <-stop:
			return nil
		default:
		}
		packet = udp(packet.src, packet.dst, i%500, 2, 3)
		out := make([]byte, 512)
		opts := &ebpf.RunOptions{Data: fromA(packet), DataOut: out, Context: skContext(n.bed.index[podA], 0)}
		err := n.bed.in(func() error {
			verdict, err := n.coll.Programs["pod_l3"].Run(opts)
			if err != nil {
				return err
			}
			way := fmt.Sprintf("verdict %d", verdict)
			if verdict == redirect && opts.DataOut[20] == protoIPIP {
				way = netip.AddrFrom16([16]byte(opts.DataOut[38:54])).String()
			}
			ways[way]++
			return nil
		})
		if err != nil {
			return err
		}
	}
}
