// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/topology"
)

// talk is a conversation of two containers: a opens it.
type talk struct {
	*pair
	a, b         host
	v6           bool
	protocol     uint8
	aport, bport uint16 // of ICMP: identifier, type of the query
}

// talks are the ways that two containers of a pair have between them.
var talks = map[string]talk{
	"across nodes":              {a: web1, b: web2},
	"across nodes, IPv6":        {a: web1, b: web2, v6: true},
	"on one node":               {a: web1, b: near1},
	"on one node, IPv6":         {a: web1, b: near1, v6: true},
	"by a peering":              {a: web1, b: db2},
	"by a peering, IPv6":        {a: web2, b: db1, v6: true},
	"by a peering, on one node": {a: web2, b: db2},
	"in another network":        {a: x2, b: x1},
}

// eachTalk runs f in all ways; flows and events of the earlier ones are gone.
func eachTalk(t *testing.T, p *pair, protocol uint8, f func(t *testing.T, c talk)) {
	t.Helper()
	for name, c := range talks {
		t.Run(name, func(t *testing.T) {
			c.pair, c.protocol, c.aport, c.bport = p.on(t), protocol, 40000, 80
			f(t, c)
		})
	}
}

func (c talk) there() bpf.LaceFlowKey {
	return flowKey(c.a.network(), c.a.addr(c.v6), c.b.addr(c.v6), c.protocol, c.aport, c.bport)
}

func (c talk) back() bpf.LaceFlowKey {
	if c.protocol == protoICMP || c.protocol == protoICMP6 {
		return flowKey(c.b.network(), c.b.addr(c.v6), c.a.addr(c.v6), c.protocol, c.aport, answerType[c.bport])
	}
	return flowKey(c.b.network(), c.b.addr(c.v6), c.a.addr(c.v6), c.protocol, c.bport, c.aport)
}

var answerType = map[uint16]uint16{8: 0, 13: 14, 128: 129}

// at are the nodes that know of the flow.
func (c talk) at() []int {
	if c.a.number == c.b.number {
		return []int{c.a.number}
	}
	return []int{c.a.number, c.b.number}
}

// wantState wants both entries, on all nodes, in a state.
func (c talk) wantState(want bpf.LaceFlowState) {
	c.t.Helper()
	for _, number := range c.at() {
		for name, k := range map[string]bpf.LaceFlowKey{"the way there": c.there(), "the way back": c.back()} {
			if got := bpf.LaceFlowState(c.nodes[number].flow(k).State); got != want {
				c.t.Errorf("node %d, %s: state %s, want %s", number, name, maps.FlowStateName(got), maps.FlowStateName(want))
			}
		}
	}
}

// wantEntries wants as many entries on all nodes that know of the flow.
func (c talk) wantEntries(want int) {
	c.t.Helper()
	for _, number := range c.at() {
		if flows := c.nodes[number].flows(); len(flows) != want {
			var keys []string
			for k := range flows {
				keys = append(keys, keyText(k))
			}
			c.t.Errorf("node %d has %d entries, want %d: %q", number, len(flows), want, keys)
		}
	}
}

// passes are what a packet is counted as that gets where it should.
func (c talk) passes() string {
	if len(c.at()) == 1 {
		return "local"
	}
	return "encapsulated decapsulated"
}

// wantPassed sends a packet and wants it to arrive.
func (c talk) wantPassed(from host, p ip) journey {
	c.t.Helper()
	j := c.send(from, p, 0)
	if j.words != c.passes() {
		c.t.Errorf("%s, want %s", j.words, c.passes())
	}
	return j
}

// udp is a packet of each direction.
func (c talk) udp() (there, back ip) {
	return udp(c.a.addr(c.v6), c.b.addr(c.v6), c.aport, c.bport, 20), udp(c.b.addr(c.v6), c.a.addr(c.v6), c.bport, c.aport, 30)
}

// backdate lets the flow be idle for so many ticks, in both directions on all nodes.
func (c talk) backdate(by uint32) {
	c.t.Helper()
	for _, number := range c.at() {
		for _, k := range []bpf.LaceFlowKey{c.there(), c.back()} {
			c.nodes[number].edit(k, func(f *bpf.LaceFlow) { f.Seen -= by; f.Since -= by })
		}
	}
}

// wantSeen wants an entry seen just now or as backdated; the clock may have gone on a little.
func (c talk) wantSeen(k bpf.LaceFlowKey, fresh bool) {
	c.t.Helper()
	for _, number := range c.at() {
		age := ticks(c.t) - c.nodes[number].flow(k).Seen
		if (age < aged/2) != fresh {
			c.t.Errorf("node %d, %s: idle for %d ticks, want seen just now: %v", number, keyText(k), age, fresh)
		}
	}
}

const aged = 1000 // ticks: far more than a test takes

// segment is a TCP segment: flags as letters S, A, F, R, P.
func segment(src, dst netip.Addr, sport, dport uint16, flags string, seq, ack uint32, size int) ip {
	p := tcp(src, dst, size)
	binary.BigEndian.PutUint16(p.body, sport)
	binary.BigEndian.PutUint16(p.body[2:], dport)
	binary.BigEndian.PutUint32(p.body[4:], seq)
	binary.BigEndian.PutUint32(p.body[8:], ack)
	p.body[13] = 0
	for _, letter := range flags {
		p.body[13] |= map[rune]byte{'F': 1, 'S': 2, 'R': 4, 'P': 8, 'A': 16}[letter]
	}
	p.body[16], p.body[17] = 0, 0
	binary.BigEndian.PutUint16(p.body[16:], ^sum(p.body, pseudo(src, dst, protoTCP, len(p.body))))
	return p
}

// tcpSegment is what side a or b of the conversation sends.
func (c talk) tcpSegment(side, flags string, seq, ack uint32, size int) (host, ip) {
	if side == "a" {
		return c.a, segment(c.a.addr(c.v6), c.b.addr(c.v6), c.aport, c.bport, flags, seq, ack, size)
	}
	return c.b, segment(c.b.addr(c.v6), c.a.addr(c.v6), c.bport, c.aport, flags, seq, ack, size)
}

// step takes one line of a TCP conversation: side, flags, sequence number, acknowledgement, bytes of data and the state
// of the flow after it: "a S 1000 0 0 new".
func (c talk) step(line string) {
	c.t.Helper()
	var side, flags, state string
	var seq, ack uint32
	var size int
	if _, err := fmt.Sscan(line, &side, &flags, &seq, &ack, &size, &state); err != nil {
		c.t.Fatalf("line %q: %v", line, err)
	}
	from, p := c.tcpSegment(side, flags, seq, ack, size)
	if j := c.send(from, p, 0); j.words != c.passes() {
		c.t.Errorf("%q: %s, want %s", line, j.words, c.passes())
	}
	want := slices.Index(maps.FlowStates(), state)
	if want < 0 {
		c.t.Fatalf("line %q: no state %q", line, state)
	}
	c.wantState(bpf.LaceFlowState(want))
	if c.t.Failed() {
		c.t.Fatalf("after %q", line)
	}
}

// handshake is the beginning of most conversations: a's next number is 1001, b's 5001.
var handshake = []string{"a S 1000 0 0 new", "b SA 5000 1001 0 answered", "a A 1001 5001 0 established"}

func opened(lines ...string) []string { return append(slices.Clone(handshake), lines...) }

// tcpLives are TCP conversations, RFC 5382 and RFC 9293. Each is one flow, but where it says otherwise.
var tcpLives = []struct {
	name  string
	lines []string
	flows int // 0: 1
}{
	{name: "whole", lines: opened("a PA 1001 5001 100 established", "b A 5001 1101 0 established", "b PA 5001 1101 1000 established",
		"a FA 1101 6001 0 closing", "b A 6001 1102 0 closing", "b FA 6001 1102 0 closed", "a A 1102 6002 0 closed")},
	{name: "closed by the other side", lines: opened("b FA 5001 1001 0 closing", "a A 1001 5002 0 closing", "a PA 1001 5002 10 closing",
		"a FA 1011 5002 0 closed", "b A 5002 1012 0 closed")},
	{name: "both close at once", lines: opened("a FA 1001 5001 0 closing", "b FA 5001 1001 0 closed", "a A 1002 5002 0 closed", "b A 5002 1002 0 closed")},
	{name: "FIN sent again", lines: opened("a FA 1001 5001 0 closing", "a FA 1001 5001 0 closing", "b FA 5001 1002 0 closed", "b FA 5001 1002 0 closed", "a A 1002 5002 0 closed")},
	{name: "FIN with data", lines: opened("a FPA 1001 5001 50 closing", "b FA 5001 1052 0 closed")},
	{name: "FIN before the handshake ends", lines: []string{"a S 1000 0 0 new", "b SA 5000 1001 0 answered", "a FA 1001 5001 0 closing", "b FA 5001 1002 0 closed"}},
	{name: "FIN without a connection", lines: []string{"a S 1000 0 0 new", "a F 1001 0 0 new", "b FA 5000 1001 0 new", "b SA 5000 1001 0 answered"}},
	{name: "reset by the due number", lines: opened("a PA 1001 5001 100 established", "a R 1101 0 0 closed")},
	{name: "reset by the last acknowledgement", lines: opened("a PA 1001 5001 100 established", "b A 5001 1051 0 established", "a R 1051 0 0 closed")},
	{name: "reset by the other side", lines: opened("b PA 5001 1001 100 established", "b RA 5101 1001 0 closed")},
	{name: "reset by the other side, by the last acknowledgement", lines: opened("b PA 5001 1001 100 established", "a A 1001 5050 0 established", "b R 5050 0 0 closed")},
	{name: "reset with a wrong number", lines: opened("a R 1002 0 0 established", "b R 5000 0 0 established", "b R 4000000000 0 0 established", "a PA 1001 5001 5 established", "a R 1006 0 0 closed")},
	{name: "wrong reset moves no number", lines: opened("a R 3000 0 0 established", "a R 3000 0 0 established", "b R 9000 0 0 established", "b R 9000 0 0 established")},
	{name: "reset against a SYN", lines: []string{"a S 1000 0 0 new", "b RA 0 1001 0 closed"}},
	{name: "reset against a SYN with data", lines: []string{"a S 1000 0 100 new", "b RA 0 1101 0 closed"}},
	{name: "reset against another SYN", lines: []string{"a S 1000 0 0 new", "b RA 0 1000 0 new", "b RA 0 1002 0 new", "b R 1001 0 0 new", "b R 0 0 0 new", "b SA 5000 1001 0 answered"}},
	{name: "reset against the second SYN", lines: []string{"a S 3000 0 0 new", "a S 1000 0 0 new", "b RA 0 1001 0 closed"}},
	{name: "reset of a SYN by its sender", lines: []string{"a S 1000 0 0 new", "a R 0 0 0 new", "a R 1001 0 0 closed"}},
	{name: "reset of a half-open connection", lines: []string{"a S 1000 0 0 new", "b SA 5000 1001 0 answered", "a R 1001 0 0 closed"}},
	{name: "reset while closing", lines: opened("a FA 1001 5001 0 closing", "b R 5001 0 0 closed", "a A 1002 5001 0 closed")},
	{name: "late FIN after a reset", lines: opened("a R 1001 0 0 closed", "b FA 5001 1001 0 closed", "a S 9000 0 0 new"), flows: 2},
	{name: "data after a reset", lines: opened("a R 1001 0 0 closed", "b PA 5001 1001 10 closed")},
	{name: "both open at once", lines: []string{"a S 1000 0 0 new", "b S 5000 0 0 answered", "a SA 1000 5001 0 established", "b SA 5000 1001 0 established", "a A 1001 5001 0 established"}},
	{name: "both open at once, a SYN is lost", lines: []string{"a S 1000 0 0 new", "b S 5000 0 0 answered", "b S 5000 0 0 answered", "a SA 1000 5001 0 established", "b SA 5000 1001 0 established"}},
	{name: "SYN sent again", lines: []string{"a S 1000 0 0 new", "a S 1000 0 0 new", "b SA 5000 1001 0 answered", "a S 1000 0 0 answered", "b SA 5000 1001 0 answered", "a A 1001 5001 0 established"}},
	{name: "SYN sent again, established", lines: opened("a S 1000 0 0 established", "b A 5001 1001 0 established", "a PA 1001 5001 7 established", "a R 1008 0 0 closed")},
	{name: "SYN+ACK sent again", lines: opened("b SA 5000 1001 0 established", "a A 1001 5001 0 established")},
	{name: "the last of the handshake is data", lines: []string{"a S 1000 0 0 new", "b SA 5000 1001 0 answered", "a PA 1001 5001 9 established"}},
	{name: "challenge", lines: []string{"a S 1000 0 0 new", "b A 7000 3000 0 new", "a R 3000 0 0 new", "a S 1000 0 0 new", "b SA 5000 1001 0 answered"}},
	{name: "sent again and late", lines: opened("a PA 1001 5001 100 established", "a PA 1101 5001 100 established", "a PA 1001 5001 100 established", "a R 1201 0 0 closed")},
	{name: "keep-alive", lines: opened("a PA 1001 5001 100 established", "a A 1100 5001 0 established", "b A 5001 1101 0 established", "a R 1101 0 0 closed")},
	{name: "numbers wrap", lines: []string{"a S 4294967290 0 0 new", "b SA 4294967295 4294967291 0 answered", "a A 4294967291 0 0 established",
		"a PA 4294967291 0 100 established", "b A 0 95 0 established", "a R 95 0 0 closed"}},
	{name: "picked up in the middle", lines: []string{"a PA 1001 5001 10 new", "b A 5001 1011 0 established", "a FA 1011 5001 0 closing", "b FA 5001 1012 0 closed"}},
	{name: "picked up at its end", lines: []string{"a FA 1001 5001 0 new", "b FA 5001 1002 0 closing"}},
	{name: "picked up, reset", lines: []string{"a PA 1001 5001 10 new", "b R 5001 1011 0 new", "b RA 5001 1011 0 closed"}},
	{name: "port used again", lines: opened("a R 1001 0 0 closed", "a S 77000 0 0 new", "b SA 88000 77001 0 answered", "a A 77001 88001 0 established", "b RA 88001 77001 0 closed"), flows: 2},
	{name: "port used again, both closed", lines: opened("a FA 1001 5001 0 closing", "b FA 5001 1002 0 closed", "a S 500 0 0 new", "b SA 100 501 0 answered"), flows: 2},
}

// TestTCP holds the state of a flow on both nodes after each packet, in all the ways that two containers have.
func TestTCP(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	eachTalk(t, p, protoTCP, func(t *testing.T, c talk) {
		for _, life := range tcpLives {
			t.Run(life.name, func(t *testing.T) {
				c.pair = p.on(t)
				for _, line := range life.lines {
					c.step(line)
				}
				c.wantEntries(2)
				c.wantFlows(max(life.flows, 1))
			})
		}
	})
}

// wantFlows wants as many events about new flows on each node, and none about anything else.
func (c talk) wantFlows(want int) {
	c.t.Helper()
	for _, number := range c.at() {
		events := told(c.events(number))
		for _, e := range events {
			if !strings.HasPrefix(e, "passed ") {
				c.t.Errorf("node %d told %q", number, e)
			}
		}
		if len(events) != want {
			c.t.Errorf("node %d told of %d flows, want %d: %q", number, len(events), want, events)
		}
	}
}

// TestTCPFlags: only what was first seen in the middle is picked up; each direction knows of its own FIN.
func TestTCPFlags(t *testing.T) {
	const reply, underlay, picked, fin = uint16(bpf.LaceFlowFlagsFLOW_REPLY), uint16(bpf.LaceFlowFlagsFLOW_UNDERLAY), uint16(bpf.LaceFlowFlagsFLOW_PICKED), uint16(bpf.LaceFlowFlagsFLOW_FIN)
	p := newPair(t)
	for name, c := range map[string]struct {
		lines       []string
		there, back uint16
	}{
		"opened":    {lines: opened(), back: reply},
		"picked up": {lines: []string{"a PA 1001 5001 10 new", "b A 5001 1011 0 established"}, there: picked, back: picked | reply},
		"half shut": {lines: opened("b FA 5001 1001 0 closing"), back: reply | fin},
	} {
		t.Run(name, func(t *testing.T) {
			k := talk{pair: p.on(t), a: web1, b: web2, protocol: protoTCP, aport: 40000, bport: 80}
			for _, line := range c.lines {
				k.step(line)
			}
			for number, want := range map[int][2]uint16{1: {c.there, c.back | underlay}, 2: {c.there | underlay, c.back}} {
				if got := [2]uint16{k.nodes[number].flow(k.there()).Flags, k.nodes[number].flow(k.back()).Flags}; got != want {
					t.Errorf("node %d: flags %v, want %v", number, got, want)
				}
			}
		})
	}
}

// TestTCPUnreplied: a SYN that is sent again and again to nobody does not keep its flow, on any node, nor does anything else
// before there is an answer; what follows one does.
func TestTCPUnreplied(t *testing.T) {
	decidedByNoKernel(t)
	eachTalk(t, newPair(t), protoTCP, func(t *testing.T, c talk) {
		c.step("a S 1000 0 0 new")
		c.backdate(aged)
		for range 5 {
			c.step("a S 1000 0 0 new")
		}
		c.step("b RA 0 99 0 new")
		c.wantSeen(c.there(), false)
		c.wantSeen(c.back(), false)
		c.step("b SA 5000 1001 0 answered")
		c.step("a A 1001 5001 0 established")
		c.wantSeen(c.there(), true)
		c.backdate(aged)
		c.step("b A 5001 1001 0 established")
		c.wantSeen(c.back(), true)
	})
}

// TestReopenFromTheOtherSide: a SYN of the side that was opened to is a new flow of that side, and has to be allowed as such.
func TestReopenFromTheOtherSide(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	eachTalk(t, p, protoTCP, func(t *testing.T, c talk) {
		for _, line := range handshake {
			c.step(line)
		}
		from, syn := c.tcpSegment("b", "S", 9000, 0, 0)
		if c.a.network() == c.b.network() {
			c.wantPassed(from, syn)
			c.wantState(bpf.LaceFlowStateFLOW_NEW)
			c.wantEntries(2)
			c.wantFlows(2)
			for _, number := range c.at() {
				if c.nodes[number].flow(c.back()).Flags&uint16(bpf.LaceFlowFlagsFLOW_REPLY) != 0 {
					t.Errorf("node %d: the new flow is one of answers", number)
				}
			}
			return
		}
		if j := c.send(from, syn, 0); j.words != "no_route gateway_answered" && j.words != "no_route" {
			t.Errorf("%s, want no_route", j.words)
		}
		c.step("a PA 1001 5001 10 established")
		c.step("b A 5001 1011 0 established")
		c.wantEntries(2)
	})
}

// TestGSO: a packet that is many on the wire moves the number by all of its data. BPF_PROG_TEST_RUN makes GSO packets without a
// type, which can be delivered here and neither encapsulated nor decapsulated: that is shown on the wire.
func TestGSO(t *testing.T) {
	eachTalk(t, newPair(t), protoTCP, func(t *testing.T, c talk) {
		for _, line := range handshake {
			c.step(line)
		}
		from, p := c.tcpSegment("a", "PA", 1001, 5001, 3000)
		j := c.send(from, p, 1200)
		if len(c.at()) == 1 && j.words != "local" {
			t.Errorf("%s, want local", j.words)
		}
		if len(c.at()) == 2 {
			o := outerOf(p, c.a.network(), c.a.number, c.b.network(), 0)
			o.dst, o.proto = locatorOf(c.b.number, 48).SID(topology.EndDT46, c.b.network()).Addr, map[bool]uint8{false: protoIPIP, true: protoV6}[c.v6]
			n := c.nodes[c.b.number]
			n.run(input{program: "uplink", dev: uplink, frame: ethIP(n.bed.mac[uplink], nexthopSrc, o.bytes()), gso: 1200})
		}
		for _, number := range c.at() {
			f := c.nodes[number].flow(c.there())
			if header := uint64(len(p.bytes()) - 3000); f.Seq != 4001 || f.Packets != 3 || f.Bytes != 3000+3*header {
				t.Errorf("node %d: number %d, %d packets, %d bytes", number, f.Seq, f.Packets, f.Bytes)
			}
		}
		c.step("a R 1002 0 0 established")
		c.step("a R 4001 0 0 closed")
	})
}

// TestCounts: packets and bytes of each direction, IP header included.
func TestCounts(t *testing.T) {
	eachTalk(t, newPair(t), protoUDP, func(t *testing.T, c talk) {
		there, back := c.udp()
		for range 3 {
			c.wantPassed(c.a, there)
		}
		c.wantPassed(c.b, back)
		for _, number := range c.at() {
			for k, want := range map[bpf.LaceFlowKey][2]uint64{
				c.there(): {3, uint64(3 * len(there.bytes()))}, c.back(): {1, uint64(len(back.bytes()))},
			} {
				if f := c.nodes[number].flow(k); [2]uint64{f.Packets, f.Bytes} != want {
					t.Errorf("node %d, %s: %d packets, %d bytes, want %v", number, keyText(k), f.Packets, f.Bytes, want)
				}
			}
		}
	})
}

// TestUDP: a flow is established by its answer; what is sent the way it was opened keeps it (RFC 4787 REQ-6).
func TestUDP(t *testing.T) {
	eachTalk(t, newPair(t), protoUDP, func(t *testing.T, c talk) {
		there, back := c.udp()
		c.wantPassed(c.a, there)
		c.wantState(bpf.LaceFlowStateFLOW_NEW)
		c.backdate(aged)
		c.wantPassed(c.a, there)
		c.wantSeen(c.there(), true)
		c.wantSeen(c.back(), false)
		c.wantState(bpf.LaceFlowStateFLOW_NEW)
		c.wantPassed(c.b, back)
		c.wantState(bpf.LaceFlowStateFLOW_ESTABLISHED)
		c.wantSeen(c.back(), true)
		c.backdate(aged)
		c.wantPassed(c.a, there)
		c.wantSeen(c.there(), true)
		c.wantEntries(2)
		c.wantFlows(1)
	})
}

// TestReverseClash: both sides send first, and each meets the flow that the other one has begun.
func TestReverseClash(t *testing.T) {
	p := newPair(t)
	for _, protocol := range []uint8{protoUDP, protoTCP} {
		t.Run(fmt.Sprint("protocol ", protocol), func(t *testing.T) {
			c := talk{pair: p.on(t), a: web1, b: web2, protocol: protocol, aport: 4000, bport: 4001}
			there, back := c.udp()
			if protocol == protoTCP {
				_, there = c.tcpSegment("a", "S", 1000, 0, 0)
				_, back = c.tcpSegment("b", "S", 5000, 0, 0)
			}
			first := c.leave(c.a, there)
			second := c.leave(c.b, back)
			for j, packet := range map[*journey]ip{&first: there, &second: back} {
				if *j = c.carry(*j, packet, 0); j.words != "encapsulated decapsulated" {
					t.Errorf("%s to %s: %s", packet.src, packet.dst, j.words)
				}
			}
			want := bpf.LaceFlowStateFLOW_ESTABLISHED
			if protocol == protoTCP {
				want = bpf.LaceFlowStateFLOW_ANSWERED
			}
			c.wantState(want)
			c.wantEntries(2)
			c.wantFlows(1)
			if protocol == protoTCP {
				from, p := c.tcpSegment("a", "SA", 1000, 5001, 0)
				c.send(from, p, 0)
				c.step("b SA 5000 1001 0 established")
			}
		})
	}
}

// leave lets a container send a packet that stays on the wire.
func (p *pair) leave(from host, packet ip) journey {
	p.t.Helper()
	j := journey{at: from.number}
	j.sent = p.nodes[from.number].run(input{program: "pod_l3", dev: from.dev, frame: toGateway(from.number, from.dev, packet)})
	if j.words = strings.Join(words(j.sent.counted), " "); j.words != "encapsulated" {
		p.t.Errorf("%s, want encapsulated", j.words)
	}
	return j
}

// query is a message with an identifier.
func query(src, dst netip.Addr, kind uint8, id uint16) ip {
	return icmp(src, dst, kind, 0, append(binary.BigEndian.AppendUint16(nil, id), 0, 1, 1, 2, 3, 4))
}

// TestQueries: echo and timestamp are flows by their identifier. An answer to none is refused, and a query of the other side
// with the same identifier is a flow of its own.
func TestQueries(t *testing.T) {
	p := newPair(t)
	for _, kind := range []uint8{8, 13, 128} {
		protocol := uint8(protoICMP)
		if kind == 128 {
			protocol = protoICMP6
		}
		eachTalk(t, p, protocol, func(t *testing.T, c talk) {
			if c.v6 != (kind == 128) {
				return
			}
			c.aport, c.bport = 777, uint16(kind)
			a, b, answer := c.a.addr(c.v6), c.b.addr(c.v6), uint8(answerType[c.bport])
			if j := c.send(c.b, query(b, a, answer, 777), 0); j.words != "no_flow" {
				t.Errorf("an answer to nothing: %s", j.words)
			}
			c.wantEntries(0)
			c.wantPassed(c.a, query(a, b, kind, 777))
			c.wantState(bpf.LaceFlowStateFLOW_NEW)
			if j := c.send(c.b, query(b, a, answer, 778), 0); j.words != "no_flow" {
				t.Errorf("an answer with another identifier: %s", j.words)
			}
			c.wantPassed(c.b, query(b, a, answer, 777))
			c.wantState(bpf.LaceFlowStateFLOW_ESTABLISHED)
			c.wantEntries(2)
			c.otherQuery(query(b, a, kind, 777))
		})
	}
}

// otherQuery sends b's own query with the identifier that a has used.
func (c talk) otherQuery(q ip) {
	c.t.Helper()
	if c.a.network() != c.b.network() {
		if j := c.send(c.b, q, 0); !strings.HasPrefix(j.words, "no_route") {
			c.t.Errorf("a query against the peering: %s", j.words)
		}
		return
	}
	c.wantPassed(c.b, q)
	c.wantEntries(4)
	c.wantState(bpf.LaceFlowStateFLOW_ESTABLISHED)
	other := c
	other.a, other.b = c.b, c.a
	other.wantState(bpf.LaceFlowStateFLOW_NEW)
}

// TestOtherProtocols: what has ports is tracked by them, the rest by addresses.
func TestOtherProtocols(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for _, protocol := range []uint8{47, 50, 132, 136, 253} {
		eachTalk(t, p, protocol, func(t *testing.T, c talk) {
			if protocol != 132 && protocol != 136 {
				c.aport, c.bport = 0, 0
			}
			body := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, 40000), 80)
			answer := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, 80), 40000)
			c.wantPassed(c.a, ip{src: c.a.addr(c.v6), dst: c.b.addr(c.v6), proto: protocol, body: append(body, 1, 2, 3, 4, 5, 6, 7, 8)})
			c.wantState(bpf.LaceFlowStateFLOW_NEW)
			c.wantPassed(c.b, ip{src: c.b.addr(c.v6), dst: c.a.addr(c.v6), proto: protocol, body: append(answer, 1, 2, 3, 4, 5, 6, 7, 8)})
			c.wantState(bpf.LaceFlowStateFLOW_ESTABLISHED)
			c.wantEntries(2)
			c.wantFlows(1)
		})
	}
}

// TestZones: networks with the same addresses and ports never share a flow.
func TestZones(t *testing.T) {
	p := newPair(t)
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("IPv6=%v", v6), func(t *testing.T) {
			first := talk{pair: p.on(t), a: web1, b: web2, v6: v6, protocol: protoTCP, aport: 40000, bport: 80}
			second := first
			second.a, second.b = x1, x2
			for _, line := range handshake {
				first.step(line)
			}
			first.wantEntries(2)
			second.step("a S 7000 0 0 new")
			first.wantEntries(4)
			first.wantState(bpf.LaceFlowStateFLOW_ESTABLISHED)
			second.step("b RA 0 7001 0 closed")
			first.wantState(bpf.LaceFlowStateFLOW_ESTABLISHED)
			first.step("a R 1001 0 0 closed")
			second.step("a S 7000 0 0 new")
			first.wantState(bpf.LaceFlowStateFLOW_CLOSED)
		})
	}
}

// outerOf is an answer of the established flow of networks 100, at node 1's uplink, with another outer header.
func outerOf(inner ip, from topology.NetworkID, number int, to topology.NetworkID, segment uint64) ip {
	o := overlay(inner)
	o.src, o.dst = locatorOf(number, 48).Source(from, segment), locatorOf(1, 48).SID(topology.EndDT46, to).Addr
	return o
}

// TestForeignPackets: nothing but what the flow's own network sends rides on it, whatever the tuple says, and nothing that
// is refused changes it.
func TestForeignPackets(t *testing.T) {
	p := newPair(t)
	c := talk{pair: p.on(t), a: web1, b: web2, protocol: protoUDP, aport: 1000, bport: 2000}
	there, back := c.udp()
	c.wantPassed(c.a, there)
	c.wantPassed(c.b, back)
	n := c.nodes[1]
	before := n.flow(c.back())
	wrongPayload := outerOf(back, backend, 2, backend, 0)
	wrongPayload.proto = extL2
	own := outerOf(there, backend, 2, backend, 0) // what the container here sends, claimed by another node
	turned := udp(there.src, c.b.addr(false), 1000, 2000, 3)
	tail := outerOf(back, backend, 2, backend, 0)
	tail.dst = netip.MustParseAddr("5f00:1ace:1:14:0:6400::1")
	function := outerOf(back, backend, 2, backend, 0)
	function.dst = locatorOf(1, 48).SID(21, backend).Addr
	frames := outerOf(back, backend, 2, backend, 0)
	frames.dst = locatorOf(1, 48).SID(topology.EndDT2U, backend).Addr
	for name, row := range map[string]struct {
		packet ip
		want   string
	}{
		"outer source of another network":       {outerOf(back, overlap, 2, backend, 0), "no_peering"},
		"SID of another network":                {outerOf(back, backend, 2, overlap, 0), "no_peering"},
		"SID of a network that is not here":     {outerOf(back, backend, 2, elsewhere, 0), "unknown_network"},
		"outer source that is no node":          {outerOf(back, backend, 9, backend, 0), "unknown_source"},
		"outer source without a network":        {func() ip { o := outerOf(back, backend, 2, backend, 0); o.src = locatorOf(2, 48).Addr(); return o }(), "unknown_source"},
		"SID with a tail":                       {tail, "sid_tail"},
		"SID of another function":               {function, "unknown_function"},
		"SID of frames":                         {frames, "wrong_payload"},
		"wrong payload":                         {wrongPayload, "wrong_payload"},
		"claims the container here":             {own, "spoofed_address"},
		"claims the container here, other flow": {outerOf(turned, backend, 2, backend, 0), "spoofed_address"},
	} {
		t.Run(name, func(t *testing.T) {
			r := n.on(t).run(input{program: "uplink", dev: uplink, frame: fromUnderlay(row.packet)})
			if got := strings.Join(words(r.counted), " "); got != row.want || r.verdict != shot {
				t.Errorf("verdict %d, %s, want %s", int32(r.verdict), got, row.want)
			}
		})
	}
	if after := n.flow(c.back()); after != before {
		t.Errorf("the flow has changed:\n got %+v\nwant %+v", after, before)
	}
	c.wantEntries(2)
}

// TestWrongPayload6: the payload has to fit the SID on an established flow too, where the inner version alone would do.
func TestWrongPayload6(t *testing.T) {
	p := newPair(t)
	c := talk{pair: p.on(t), a: web1, b: web2, v6: true, protocol: protoUDP, aport: 1000, bport: 2000}
	there, back := c.udp()
	c.wantPassed(c.a, there)
	c.wantPassed(c.b, back)
	for _, next := range []uint8{protoIPIP, 17, extNone, extL2, 47, protoICMP6} {
		for _, srh := range []bool{false, true} {
			o := outerOf(back, backend, 2, backend, 0)
			o.proto = next
			if srh {
				o = withSegment(o, func([]byte) {})
			}
			r := c.nodes[1].run(input{program: "uplink", dev: uplink, frame: fromUnderlay(o)})
			if got := strings.Join(words(r.counted), " "); r.verdict != shot {
				t.Errorf("next header %d, SRH %v: verdict %d, %s", next, srh, int32(r.verdict), got)
			}
		}
	}
}

// TestContainerOnUnderlayEntry: a container that has an address which was another node's does not ride on what that node was let in by.
func TestContainerOnUnderlayEntry(t *testing.T) {
	p := newPair(t)
	c := talk{pair: p.on(t), a: web2, b: web1, protocol: protoUDP, aport: 1000, bport: 2000}
	there, _ := c.udp()
	c.wantPassed(c.a, there)
	n := c.nodes[1]
	// The tuple of the entry, now from a container of node 1: nothing has told the programs to decide again.
	k := c.there()
	f := n.flow(k)
	if f.Flags&uint16(bpf.LaceFlowFlagsFLOW_UNDERLAY) == 0 {
		t.Fatal("the entry is not one of the underlay")
	}
	mine := flowKey(backend, web1.addr(false), web2.addr(false), protoUDP, 3000, 4000)
	table := n.table()
	defer table.Close()
	f.Line = 4711
	must(t, table.Put(mine, f))
	r := n.run(input{program: "pod_l3", dev: podA, frame: fromA(udp(web1.addr(false), web2.addr(false), 3000, 4000, 1))})
	if got := n.flow(mine); got.Line != backendLine || got.Flags != 0 || r.verdict != redirect {
		t.Errorf("verdict %d, the entry that was the underlay's is %+v", int32(r.verdict), got)
	}
	// And the other way round: an entry of a container, a packet of the underlay.
	n.edit(k, func(f *bpf.LaceFlow) { f.Flags &^= uint16(bpf.LaceFlowFlagsFLOW_UNDERLAY); f.Line = 4711 })
	r = n.run(input{program: "uplink", dev: uplink, frame: fromUnderlay(overlay(there))})
	if got := n.flow(k); got.Line != backendLine || got.Flags != uint16(bpf.LaceFlowFlagsFLOW_UNDERLAY) || r.verdict != redirect {
		t.Errorf("verdict %d, the entry that was the container's is %+v", int32(r.verdict), got)
	}
}

// TestAnswerGoesBack: to the node that sent, whatever the blocks say of the source.
func TestAnswerGoesBack(t *testing.T) {
	p := newPair(t)
	for name, claimed := range map[string]netip.Addr{
		"in the block of another node": v4Of(1, 77), "in no block": netip.MustParseAddr("192.0.2.1"), "in no block, IPv6": netip.MustParseAddr("2001:db8::1"),
	} {
		t.Run(name, func(t *testing.T) {
			n := p.on(t).nodes[2]
			local := web2.addr(claimed.Is6())
			o := overlay(udp(claimed, local, 1, 2, 9)) // from the router, number 3
			o.src, o.dst = locatorOf(3, 48).Addr(), locatorOf(2, 48).SID(topology.EndDT46, backend).Addr
			r := n.run(input{program: "uplink", dev: uplink, frame: fromUnderlay(o)})
			wantCounted(t, r, redirect, bpf.LaceReasonREASON_DECAPSULATED)
			r = n.run(input{program: "pod_l3", dev: podA, frame: toGateway(2, podA, udp(local, claimed, 2, 1, 9))})
			wantCounted(t, r, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
			if r.ctx.Peer != 3 || numberIn(r.out[14+24:]) != 3 {
				t.Errorf("the answer goes to peer %d, SID % x", r.ctx.Peer, r.out[14+24:14+40])
			}
			// Again after the flow has been decided again, by a packet of either side.
			must(t, n.maps.DecideAgain())
			r = n.run(input{program: "pod_l3", dev: podA, frame: toGateway(2, podA, udp(local, claimed, 2, 1, 9))})
			if r.ctx.Peer != 3 || numberIn(r.out[14+24:]) != 3 {
				t.Errorf("decided again, the answer goes to peer %d: %v", r.ctx.Peer, words(r.counted))
			}
		})
	}
}

// TestFirstAnswer: the source of an answer is not known before it comes. It has to be one that may answer, and is remembered.
func TestFirstAnswer(t *testing.T) {
	p := newPair(t)
	c := talk{pair: p.on(t), a: web1, b: web2, protocol: protoUDP, aport: 1000, bport: 2000}
	there, back := c.udp()
	c.wantPassed(c.a, there)
	n := c.nodes[1]
	if f := n.flow(c.back()); f.Source.U8 != [16]byte{} {
		t.Errorf("before the answer its source is % x", f.Source.U8)
	}
	wantUplink(t, n, outerOf(back, overlap, 2, backend, 7), "no_peering")
	for _, segment := range []uint64{7, 8} { // the sender's labels have changed in between
		o := outerOf(back, backend, 2, backend, segment)
		wantUplink(t, n, o, "decapsulated")
		if f := n.flow(c.back()); netip.AddrFrom16(f.Source.U8) != o.src {
			t.Errorf("after the answer its source is %s, want %s", netip.AddrFrom16(f.Source.U8), o.src)
		}
	}
	if f := n.flow(c.there()); f.State != uint8(bpf.LaceFlowStateFLOW_ESTABLISHED) || len(n.flows()) != 2 {
		t.Errorf("after the answer there are %d entries, state %d", len(n.flows()), f.State)
	}
}

// wantUplink wants a packet at node 1's uplink counted so.
func wantUplink(t testing.TB, n *node, p ip, want string) {
	t.Helper()
	r := n.run(input{program: "uplink", dev: uplink, frame: fromUnderlay(p)})
	if got := strings.Join(words(r.counted), " "); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestFull: a full table refuses new flows and leaves nothing of them; those that it holds go on, and are decided again.
func TestFull(t *testing.T) {
	p := newPair(t)
	eachTalk(t, p, protoUDP, func(t *testing.T, c talk) {
		there, back := c.establish()
		for _, room := range []uint32{0, 1} {
			for _, number := range c.at() {
				c.nodes[number].fillUp(room)
			}
			c.decideAgain()
			c.wantPassed(c.a, there)
			c.decideAgain()
			c.wantPassed(c.b, back)
			entries := len(c.nodes[c.a.number].flows())
			c.wantRefused(c.a, udp(there.src, there.dst, 1, 2, 3), "conntrack_full")
			if after := len(c.nodes[c.a.number].flows()); after != entries {
				t.Errorf("with room for %d: %d entries, %d before", room, after, entries)
			}
		}
		if len(c.at()) == 2 {
			c.nodes[c.a.number].dropFlows()
			c.wantRefused(c.a, udp(there.src, there.dst, 1, 2, 3), "encapsulated conntrack_full")
		}
	})
}

// fillUp leaves room for so many entries.
func (n *node) fillUp(room uint32) {
	n.t.Helper()
	table := n.table()
	defer table.Close()
	filler := func(i uint32) bpf.LaceFlowKey { return flowKey(elsewhere, a4, far4, protoUDP, uint16(i), 1) }
	for i := uint32(len(n.flows())); i < table.MaxEntries(); i++ {
		must(n.t, table.Put(filler(i), bpf.LaceFlow{}))
	}
	for i := range room {
		must(n.t, table.Delete(filler(table.MaxEntries()-1-i)))
	}
}
