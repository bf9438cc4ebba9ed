// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// span is two nodes of the fixture of L2 networks, whose frames reach each other.
type span struct {
	t     testing.TB
	nodes map[int]*node
	moved map[host]int // containers whose interface is another than the fixture's
}

func newSpan(t testing.TB) *span {
	t.Helper()
	b := newBed(t)
	return &span{t: t, moved: map[host]int{}, nodes: map[int]*node{1: newNode(t, b, options{number: 1, l2: true}), 2: newNode(t, b, options{number: 2, l2: true})}}
}

// on is the span within a subtest, without flows of earlier ones.
func (s *span) on(t testing.TB) *span {
	t.Helper()
	c := &span{t: t, moved: map[host]int{}, nodes: map[int]*node{}}
	for number, n := range s.nodes {
		c.nodes[number] = n.on(t)
		c.nodes[number].dropFlows()
		c.nodes[number].forget()
	}
	return c
}

// at is the interface of a port.
func (s *span) at(h host) int {
	if dev, ok := s.moved[h]; ok {
		return dev
	}
	return h.dev
}

// carry takes a frame from a port to where it goes, and says what was counted on the way. What is delivered is compared with it.
func (s *span) carry(from host, frame []byte) (string, result) {
	s.t.Helper()
	n := s.nodes[from.number]
	r := n.run(input{program: "pod_l2", dev: s.at(from), frame: frame})
	counted := words(r.counted)
	if slices.Equal(counted, []string{"encapsulated"}) {
		number := numberIn(r.out[14+24:])
		if s.nodes[number] == nil {
			return "encapsulated elsewhere", r
		}
		n = s.nodes[number]
		r = n.run(input{program: "uplink", dev: uplink, frame: atUplink(n, r.out)})
		counted = append(counted, words(r.counted)...)
	}
	if r.verdict == redirect && r.ctx.Bridged == 1 {
		wantFrame(s.t, r.out, frame)
	}
	return strings.Join(counted, " "), r
}

// chat is a conversation of two ports by bridging.
type chat struct {
	*span
	a, b     host
	v6       bool
	protocol uint8
}

var chats = map[string]chat{
	"across nodes": {a: web1, b: web2}, "across nodes, IPv6": {a: web1, b: web2, v6: true}, "on one node": {a: web1, b: near1}, "on one node, IPv6": {a: near2, b: web2, v6: true},
	"from a machine": {a: host{1, machine}, b: web2}, "to a machine": {a: web2, b: host{1, machine}, v6: true}, "between machines": {a: host{2, machine}, b: host{1, machine}},
	"to a machine here": {a: web1, b: host{1, machine}}, "in another network": {a: x2, b: x1},
}

func eachChat(t *testing.T, s *span, protocol uint8, f func(t *testing.T, c chat)) {
	t.Helper()
	for name, c := range chats {
		t.Run(name, func(t *testing.T) {
			c.span, c.protocol = s.on(t), protocol
			f(t, c)
		})
	}
}

func (c chat) addr(h host) netip.Addr {
	v4, v6 := place(h.number, h.dev)
	if c.v6 {
		return v6
	}
	return v4
}

func (c chat) network() topology.NetworkID { return segmentOf(c.a.dev) }

func (c chat) there() bpf.LaceFlowKey {
	return flowKey(c.network(), c.addr(c.a), c.addr(c.b), c.protocol, 40000, 80)
}

func (c chat) back() bpf.LaceFlowKey {
	return flowKey(c.network(), c.addr(c.b), c.addr(c.a), c.protocol, 80, 40000)
}

func (c chat) numbers() []int { return talk{a: c.a, b: c.b}.at() }

// passes is what is counted of a frame that arrives.
func (c chat) passes() string {
	if len(c.numbers()) == 1 {
		return "local"
	}
	return "encapsulated decapsulated"
}

// frame is one of a side.
func (c chat) frame(side, flags string, seq, ack uint32, size int) (host, []byte) {
	from, to, sport, dport := c.a, c.b, uint16(40000), uint16(80)
	if side == "b" {
		from, to, sport, dport = c.b, c.a, dport, sport
	}
	p := udp(c.addr(from), c.addr(to), sport, dport, size)
	if c.protocol == protoTCP {
		p = segment(c.addr(from), c.addr(to), sport, dport, flags, seq, ack, size)
	}
	return from, ethIP(stationMAC(to.number, to.dev), stationMAC(from.number, from.dev), p.bytes())
}

func (c chat) wantPassed(side string) {
	c.t.Helper()
	from, frame := c.frame(side, "PA", 1001, 5001, 10)
	if got, _ := c.carry(from, frame); got != c.passes() {
		c.t.Errorf("%s: %s, want %s", side, got, c.passes())
	}
}

// step is a line of a TCP conversation, as talk's.
func (c chat) step(line string) {
	c.t.Helper()
	var side, flags, state string
	var seq, ack uint32
	var size int
	_, err := fmt.Sscan(line, &side, &flags, &seq, &ack, &size, &state)
	must(c.t, err)
	from, frame := c.frame(side, flags, seq, ack, size)
	if got, _ := c.carry(from, frame); got != c.passes() {
		c.t.Errorf("%q: %s, want %s", line, got, c.passes())
	}
	for _, number := range c.numbers() {
		for _, k := range []bpf.LaceFlowKey{c.there(), c.back()} {
			if got := maps.FlowStateName(bpf.LaceFlowState(c.nodes[number].flow(k).State)); got != state {
				c.t.Fatalf("%q: node %d, %s: %s, want %s", line, number, keyText(k), got, state)
			}
		}
	}
}

// wantEntries wants both directions on each node, with all that is known.
func (c chat) wantEntries(there, back uint64) {
	c.t.Helper()
	for _, number := range c.numbers() {
		n := c.nodes[number]
		if entries := len(n.flows()); entries != 2 {
			c.t.Errorf("node %d has %d entries", number, entries)
		}
		c.wantEntry(n, c.there(), c.a, c.b, there, 0)
		c.wantEntry(n, c.back(), c.b, c.a, back, uint16(bpf.LaceFlowFlagsFLOW_REPLY))
	}
}

func (c chat) wantEntry(n *node, k bpf.LaceFlowKey, from, to host, packets uint64, flags uint16) {
	c.t.Helper()
	f := n.flow(k)
	want := bpf.LaceFlow{Flags: flags | uint16(bpf.LaceFlowFlagsFLOW_BRIDGED), Network: uint32(c.network()), Line: map[topology.NetworkID]uint32{storage: storageLine, twin: twinLine}[c.network()]}
	want.Mac.U8 = stationMAC(to.number, to.dev)
	if to.number == n.opts.number {
		want.Ifindex, want.Mtu = uint32(n.bed.index[c.at(to)]), frameMTU
		if to.dev == machine {
			want.Flags |= uint16(bpf.LaceFlowFlagsFLOW_DIRECT)
		}
	}
	if from.number != n.opts.number {
		want.Flags |= uint16(bpf.LaceFlowFlagsFLOW_UNDERLAY)
	}
	if from.number != to.number {
		want.Sid.U8 = frameSID(to.number, c.network()).As16()
	}
	flags = f.Flags &^ uint16(bpf.LaceFlowFlagsFLOW_PICKED|bpf.LaceFlowFlagsFLOW_FIN)
	if flags != want.Flags || f.Network != want.Network || f.Line != want.Line || f.Mac != want.Mac || f.Ifindex != want.Ifindex || want.Mtu != 0 && f.Mtu != want.Mtu || f.Sid != want.Sid {
		c.t.Errorf("node %d, %s:\n got %+v\nwant %+v", n.opts.number, keyText(k), f, want)
	}
	if f.Packets != packets {
		c.t.Errorf("node %d, %s: %d packets, want %d", n.opts.number, keyText(k), f.Packets, packets)
	}
}

// TestBridgedFlow: a flow that is bridged is known on both nodes in both directions, and ends as a routed one does.
func TestBridgedFlow(t *testing.T) {
	decidedByNoKernel(t)
	s := newSpan(t)
	t.Run("UDP", func(t *testing.T) {
		eachChat(t, s, protoUDP, func(t *testing.T, c chat) {
			for range 3 {
				c.wantPassed("a")
			}
			c.wantEntries(3, 0)
			for range 2 {
				c.wantPassed("b")
			}
			c.wantEntries(3, 2)
			for _, number := range c.numbers() {
				if got := c.nodes[number].flow(c.there()).State; got != uint8(bpf.LaceFlowStateFLOW_ESTABLISHED) {
					t.Errorf("node %d: state %d", number, got)
				}
			}
		})
	})
	for _, life := range [][]string{
		opened("a PA 1001 5001 100 established", "b A 5001 1101 0 established", "a FA 1101 5001 0 closing", "b FA 5001 1102 0 closed", "a A 1102 5002 0 closed"), opened("b R 5001 0 0 closed"),
		{"a S 1000 0 0 new", "b RA 0 1001 0 closed"}, {"a PA 1001 5001 1 new", "b A 5001 1002 0 established"},
	} {
		t.Run("TCP "+life[len(life)-1], func(t *testing.T) {
			eachChat(t, s, protoTCP, func(t *testing.T, c chat) {
				for _, line := range life {
					c.step(line)
				}
			})
		})
	}
}

// TestBridgedDecidedAgain: by either side, after a container has gone and after another topology has come.
func TestBridgedDecidedAgain(t *testing.T) {
	decidedByNoKernel(t)
	s := newSpan(t)
	again := map[string]func(n *node){
		"a container has gone": func(n *node) { must(t, n.maps.DecideAgain()) },
		"another topology": func(n *node) {
			p := *n.plan
			p.Conntrack.UDP += time.Duration(n.generation()) * time.Minute
			if !n.sync(&p).Switched {
				t.Error("no other generation")
			}
		},
	}
	for name, change := range again {
		for _, first := range []string{"a", "b"} {
			t.Run(name+", "+first, func(t *testing.T) {
				eachChat(t, s, protoUDP, func(t *testing.T, c chat) {
					c.wantPassed("a")
					c.wantPassed("b")
					for _, number := range c.numbers() {
						change(c.nodes[number])
					}
					packets := map[string]uint64{"a": 1, "b": 1}
					for _, side := range []string{first, "a", "b"} {
						c.wantPassed(side)
						packets[side]++
					}
					c.wantEntries(packets["a"], packets["b"])
				})
			})
		}
	}
}

// TestOtherDestination: a flow whose frames go to another MAC address is decided again, and a routed one is not the bridged one's.
func TestOtherDestination(t *testing.T) {
	s := newSpan(t)
	p := udp(s4, other4, 40000, 80, 10)
	key := flowKey(storage, s4, other4, protoUDP, 40000, 80)
	for _, ways := range [][]struct {
		dst  plan.MAC
		want string
	}{
		{{otherMAC, "encapsulated decapsulated"}, {nearMAC, "local"}, {otherMAC, "encapsulated decapsulated"}, {vmMAC, "local"}, {foreignMAC, "encapsulated elsewhere"}, {nearMAC, "local"}},
		{{plan.GatewayMAC, "encapsulated decapsulated"}, {otherMAC, "encapsulated decapsulated"}, {plan.GatewayMAC, "encapsulated decapsulated"}, {nearMAC, "local"}, {plan.GatewayMAC, "encapsulated decapsulated"}},
		{{nearMAC, "local"}, {unknownMAC, "unknown_mac"}, {nearMAC, "local"}},
	} {
		t.Run(ways[0].dst.String(), func(t *testing.T) {
			s := s.on(t)
			for i, way := range ways {
				got, r := s.carry(web1, bridged(way.dst, p))
				if got != way.want {
					t.Fatalf("frame %d, to %s: %s, want %s", i, way.dst, got, way.want)
				}
				if r.verdict != redirect {
					if entries := len(s.nodes[1].flows()); entries != 0 {
						t.Errorf("an ended flow has %d entries", entries)
					}
					continue
				}
				f := s.nodes[1].flow(key)
				if isBridged := f.Flags&uint16(bpf.LaceFlowFlagsFLOW_BRIDGED) != 0; isBridged == (way.dst == plan.GatewayMAC) {
					t.Errorf("frame %d, to %s: flags %#x", i, way.dst, f.Flags)
				}
				if way.dst == plan.GatewayMAC {
					wantFrame(t, r.out, ethIP(otherMAC, plan.GatewayMAC, afterHop(p)))
				}
				if isRouter := f.Flags&uint16(bpf.LaceFlowFlagsFLOW_ROUTER) != 0; isRouter != (way.dst == foreignMAC) {
					t.Errorf("frame %d, to %s: flags %#x", i, way.dst, f.Flags)
				}
			}
		})
	}
}

// TestReplaced: what came for a container that has gone does not reach the one that has its addresses now as an answer.
func TestReplaced(t *testing.T) {
	decidedByNoKernel(t)
	for name, ways := range map[string]chat{"across nodes": {a: web1, b: web2}, "IPv6": {a: web1, b: web2, v6: true}, "on one node": {a: web1, b: near1}} {
		t.Run(name, func(t *testing.T) {
			c := ways
			c.span, c.protocol = newSpan(t), protoUDP
			c.wantPassed("a")
			c.wantPassed("b")
			c.replace(c.a)
			from, frame := c.frame("b", "", 0, 0, 10)
			got, _ := c.carry(from, frame)
			want := "no_flow"
			if len(c.numbers()) == 2 {
				want = "encapsulated no_flow"
			}
			if got != want {
				t.Errorf("an answer to the one before: %s, want %s", got, want)
			}
			if entries := len(c.nodes[1].flows()); entries != 0 {
				t.Errorf("node 1 has %d entries", entries)
			}
			c.wantPassed("a") // a flow of its own
			c.wantPassed("b")
			c.wantEntry(c.nodes[1], c.back(), c.b, c.a, 1, uint16(bpf.LaceFlowFlagsFLOW_REPLY))
		})
	}
	t.Run("opened from outside", func(t *testing.T) {
		c := chat{span: newSpan(t), a: web2, b: web1, protocol: protoUDP}
		c.wantPassed("a")
		c.wantPassed("b")
		c.replace(c.b)
		c.wantPassed("a")
		if got := c.nodes[1].flow(c.there()); got.Packets != 1 || got.Ifindex != uint32(c.nodes[1].bed.index[stranger]) {
			t.Errorf("the entry to the new container: %+v", got)
		}
	})
}

// replace gives a container's addresses to another interface.
func (s *span) replace(h host) {
	s.t.Helper()
	n := s.nodes[h.number]
	p := n.segmentPort(h.dev)
	must(s.t, n.maps.DeletePort(p, uint32(n.bed.index[h.dev])))
	s.moved[h] = stranger
	must(s.t, n.maps.PutPort(p, maps.Device{Index: uint32(n.bed.index[stranger]), MTU: frameMTU}))
	must(s.t, n.maps.DecideAgain())
}

// TestVanished: a flow to what is not there any more ends at its next packet.
func TestVanished(t *testing.T) {
	s := newSpan(t)
	c := chat{span: s, a: web1, b: near1, protocol: protoTCP}
	for _, line := range handshake {
		c.step(line)
	}
	n := c.nodes[1]
	must(t, n.maps.DeletePort(n.segmentPort(podB), uint32(n.bed.index[podB])))
	must(t, n.maps.DecideAgain())
	from, frame := c.frame("a", "PA", 1001, 5001, 10)
	if got, r := c.carry(from, frame); got != "unknown_mac" || len(n.flows()) != 0 || r.ctx.Ended != 1 {
		t.Errorf("%s, %d entries, ended %d", got, len(n.flows()), r.ctx.Ended)
	}
}

// TestBridgedFull: a full table refuses new flows, and nothing that belongs to none.
func TestBridgedFull(t *testing.T) {
	s := newSpan(t)
	s.nodes[1].fillUp(1)
	p := udp(s4, other4, 40000, 80, 10)
	entries := len(s.nodes[1].flows())
	if got, _ := s.carry(web1, bridged(otherMAC, p)); got != "conntrack_full" || len(s.nodes[1].flows()) != entries {
		t.Errorf("%s, %d entries, %d before", got, len(s.nodes[1].flows()), entries)
	}
	if got, _ := s.carry(web1, eth(otherMAC, sMAC, 0x88b5, make([]byte, 46))); got != "encapsulated decapsulated" {
		t.Errorf("no IP: %s", got)
	}
	if got, _ := s.carry(web2, ethIP(sMAC, otherMAC, udp(other4, s4, 1, 2, 3).bytes())); got != "encapsulated conntrack_full" {
		t.Errorf("from the other node: %s", got)
	}
}

// TestBridgedFragments: later fragments go where the first one went; of a first that was not seen they are refused.
func TestBridgedFragments(t *testing.T) {
	s := newSpan(t)
	for name, p := range map[string]ip{"IPv4": udp(s4, other4, 40000, 80, 100), "IPv6": udp(s6, other6, 40000, 80, 100)} {
		t.Run(name, func(t *testing.T) {
			s := s.on(t)
			all := pieces(p, 4711, 40)
			if got, _ := s.carry(web1, bridged(otherMAC, all[1])); got != "fragment_unknown" {
				t.Errorf("a later fragment alone: %s", got)
			}
			for i, piece := range all {
				if got, _ := s.carry(web1, bridged(otherMAC, piece)); got != "encapsulated decapsulated" {
					t.Errorf("fragment %d: %s", i, got)
				}
			}
			if entries := len(s.nodes[1].flows()); entries != 2 {
				t.Errorf("%d entries", entries)
			}
		})
	}
}

// TestRoutedBetween: an L3 network and an L2 network that are peered reach each other by the gateway, both ways, across nodes.
func TestRoutedBetween(t *testing.T) {
	s := newSpan(t)
	for name, c := range map[string]struct{ own, far, web, webFar netip.Addr }{"IPv4": {s4, other4, web4, v4Of(2, podA)}, "IPv6": {s6, other6, web6, v6Of(2, podA)}} {
		t.Run(name, func(t *testing.T) {
			s := s.on(t)
			out, back := udp(c.own, c.webFar, 40000, 80, 10), udp(c.webFar, c.own, 80, 40000, 10)
			got, r := s.carry(web1, bridged(plan.GatewayMAC, out))
			if got != "encapsulated decapsulated" {
				t.Fatalf("out of the L2 network: %s", got)
			}
			wantFrame(t, r.out, ethIP(stationMAC(2, podD), plan.GatewayMAC, afterHop(out)))
			two, one := s.nodes[2], s.nodes[1]
			for range 2 {
				r = two.run(input{program: "pod_l3", dev: podD, frame: ethIP(plan.GatewayMAC, stationMAC(2, podD), back.bytes())})
				wantCounted(t, r, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
				r = one.run(input{program: "uplink", dev: uplink, frame: atUplink(one, r.out)})
				wantCounted(t, r, redirect, bpf.LaceReasonREASON_DECAPSULATED)
				wantFrame(t, r.out, ethIP(sMAC, plan.GatewayMAC, afterHop(back)))
				must(t, one.maps.DecideAgain())
				must(t, two.maps.DecideAgain())
			}
			// The flow that the L3 network opens.
			in := udp(c.webFar, c.own, 1, 2, 10)
			r = two.run(input{program: "pod_l3", dev: podD, frame: ethIP(plan.GatewayMAC, stationMAC(2, podD), in.bytes())})
			wantCounted(t, r, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
			r = one.run(input{program: "uplink", dev: uplink, frame: atUplink(one, r.out)})
			wantCounted(t, r, redirect, bpf.LaceReasonREASON_DECAPSULATED)
			wantFrame(t, r.out, ethIP(sMAC, plan.GatewayMAC, afterHop(in)))
			if got, _ := s.carry(web1, bridged(plan.GatewayMAC, udp(c.own, c.webFar, 2, 1, 10))); got != "encapsulated decapsulated" {
				t.Errorf("the answer: %s", got)
			}
		})
	}
}
