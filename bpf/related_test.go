// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"maps"
	"slices"
	"testing"

	"github.com/lace-net/lace/bpf"
)

// opening is a packet of a conversation and its answer.
func (c *talk) opening(protocol string) (there, back ip) {
	a, b := c.a.addr(c.v6), c.b.addr(c.v6)
	switch protocol {
	case "UDP":
		c.protocol = protoUDP
		return c.udp()
	case "TCP":
		c.protocol = protoTCP
		return segment(a, b, c.aport, c.bport, "S", 1000, 0, 0), segment(b, a, c.bport, c.aport, "SA", 5000, 1001, 0)
	}
	ask, answer := uint8(8), uint8(0)
	c.protocol, c.aport, c.bport = protoICMP, 0x0102, 8
	if c.v6 {
		ask, answer = 128, 129
		c.protocol, c.bport = protoICMP6, 128
	}
	message := []byte{1, 2, 0, 1, 5, 6, 7, 8, 9, 10}
	return icmp(a, b, ask, 0, message), icmp(b, a, answer, 0, message)
}

// quotes are the forms in which a packet may be quoted: RFC 792, RFC 4443 2.4 (c).
func quotes(p ip) map[string][]byte {
	whole, header := afterHop(p), len(p.bytes())-len(p.body)
	out := map[string][]byte{"whole": whole, "8 bytes": whole[:header+8], "first fragment": afterHop(cut(p, 9, 0, 8))}
	first := cut(p, 9, 0, 8)
	if p.src.Is4() {
		p.options = []byte{1, 1, 1, 1, 148, 4, 0, 0}
		out["options"] = afterHop(p)
		p.options = make([]byte, 40)
		out["most options, 8 bytes"] = afterHop(p)[:60+8]
		return out
	}
	p.body, p.proto = extension(p.proto, [7]byte{0, 1, 4}, p.body), extDest
	out["extension"] = afterHop(p)
	p.body, p.proto = extension(p.proto, [7]byte{0, 1, 4}, p.body), extHop
	out["two extensions, 8 bytes"] = afterHop(p)[:40+16+8]
	first.body, first.proto = extension(first.proto, [7]byte{0, 1, 4}, first.body), extHop
	out["first fragment behind an extension"] = afterHop(first)
	return out
}

// errorsAbout are ICMP errors about a packet, from its receiver to its sender, of all kinds and forms.
func errorsAbout(p ip) map[string]ip {
	kinds := map[string][2]uint8{"unreachable": {3, 3}, "too big": {3, 4}, "time exceeded": {11, 0}, "parameter problem": {12, 0}}
	if p.src.Is6() {
		kinds = map[string][2]uint8{"unreachable": {1, 4}, "too big": {2, 0}, "time exceeded": {3, 0}, "parameter problem": {4, 1}}
	}
	out := map[string]ip{}
	for form, quote := range quotes(p) {
		for name, kind := range kinds {
			out[name+", "+form] = icmp(p.dst, p.src, kind[0], kind[1], append([]byte{0, 0, 5, 0}, quote...))
		}
	}
	behind := out["unreachable, whole"]
	if p.src.Is4() {
		behind.options = []byte{1, 1, 1, 1, 148, 4, 0, 0}
	} else {
		behind.body, behind.proto = extension(behind.proto, [7]byte{0, 1, 4}, behind.body), extHop
	}
	out["behind an extension"] = behind
	return out
}

// TestRelated: an ICMP error travels along the flow whose packet it quotes, in either direction, byte for byte, and leaves
// the flow as it was: RFC 5508 REQ-4 and REQ-7, RFC 792, RFC 4443 2.4.
func TestRelated(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for _, protocol := range []string{"UDP", "TCP", "echo"} {
		t.Run(protocol, func(t *testing.T) {
			eachTalk(t, p, 0, func(t *testing.T, c talk) {
				there, back := c.opening(protocol)
				c.wantPassed(c.a, there)
				c.wantRelated("new, about the first packet", c.b, there)
				c.wantPassed(c.b, back)
				c.wantRelated("answered, about the first packet", c.b, there)
				c.wantRelated("answered, about the answer", c.a, back)
			})
		})
	}
}

// wantRelated lets the receiver of a packet complain about it.
func (c talk) wantRelated(when string, from host, about ip) {
	c.t.Helper()
	c.backdate(aged)
	before := c.known()
	for number := range before {
		c.events(number) // of the packets that opened the flow
	}
	for name, complaint := range errorsAbout(about) {
		if j := c.send(from, complaint, 0); j.words != c.passes() {
			c.t.Errorf("%s: %s: %s, want %s", when, name, j.words, c.passes())
		}
	}
	for number, flows := range c.known() {
		if !maps.Equal(flows, before[number]) {
			c.t.Errorf("%s: node %d: errors about a flow changed it:\n%+v\nbefore:\n%+v", when, number, flows, before[number])
		}
		c.wantTold(number)
	}
}

// known are the flows of all nodes that know of the conversation, but for the outer source that was last found good: an
// error may be the first that shows it.
func (c talk) known() map[int]map[bpf.LaceFlowKey]bpf.LaceFlow {
	c.t.Helper()
	out := map[int]map[bpf.LaceFlowKey]bpf.LaceFlow{}
	for _, number := range c.at() {
		out[number] = c.nodes[number].flows()
		for key, flow := range out[number] {
			flow.Source.U8 = [16]byte{}
			out[number][key] = flow
		}
	}
	return out
}

// TestRelatedDecidedAgain: an error about a flow of an older generation is decided by the new one, and leaves the flow's
// own decision to its own next packet; where the flow is not allowed any more it ends, without an answer to the error.
func TestRelatedDecidedAgain(t *testing.T) {
	decidedByNoKernel(t)
	p := newPair(t)
	for name, c := range map[string]talk{"one node": {a: web2, b: db2}, "two nodes": {a: web1, b: db2}, "two nodes, IPv6": {a: web2, b: db1, v6: true}} {
		t.Run(name, func(t *testing.T) {
			p := p.on(t)
			p.apply(nil)
			c.pair, c.aport, c.bport = p, 40000, 80
			there, back := c.opening("UDP")
			c.wantPassed(c.a, there)
			c.wantPassed(c.b, back)
			c.events(1)
			c.events(2)
			for _, number := range c.at() {
				must(t, c.nodes[number].maps.DecideAgain())
			}
			c.wantRelated("of an older generation", c.b, there)
			c.wantRelated("of an older generation", c.a, back)

			p.apply(noPeering)
			frame := toGateway(c.a.number, c.a.dev, complaint(there.src, there.dst, 3, back.bytes()))
			r := c.nodes[c.a.number].run(input{program: "pod_l3", dev: c.a.dev, frame: frame})
			wantCounted(t, r, shot, bpf.LaceReasonREASON_NO_ROUTE)
			wantFrame(t, r.out, frame)
			if flows := c.nodes[c.a.number].flows(); len(flows) != 0 {
				t.Errorf("%d entries of a flow that is not allowed are left", len(flows))
			}
			if told := c.events(c.a.number); len(told) != 1 || told[0].Verdict != uint8(bpf.LaceVerdictVERDICT_ENDED) {
				t.Errorf("told %+v, want that the flow has ended", told)
			}
		})
	}
}

// unrelatedRows are errors that quote something of a flow that is known, but not as its receiver would.
func unrelatedRows() []row {
	rows := unrelatedAtUplink()
	return append(rows, unrelatedAtContainer()...)
}

// unrelatedOpened are the flows that unrelatedRows speak of: podA has two of either version, one opened by itself.
func unrelatedOpened() []input {
	var out []input
	for _, p := range []ip{udp(a4, far4, 1, 2, 30), udp(a6, far6, 1, 2, 30)} {
		out = append(out, input{program: "pod_l3", dev: podA, frame: fromA(p)})
	}
	for _, p := range []ip{udp(far4, a4, 3, 4, 30), udp(far6, a6, 3, 4, 30)} {
		out = append(out, input{program: "uplink", dev: uplink, frame: fromUnderlay(overlay(p))})
	}
	return out
}

// stays wants what was refused unchanged, and the flows as they were.
func stays(t testing.TB, n *node, r result, in []byte) {
	t.Helper()
	wantFrame(t, r.out, in)
	for key, flow := range n.flows() {
		if flow.State != uint8(bpf.LaceFlowStateFLOW_NEW) || flow.Packets > 1 {
			t.Errorf("a refused error changed the flow %s: %+v", keyText(key), flow)
		}
	}
}

// wrongQuotes are quotes, of a packet from podA or one like it, that no error to podA may have.
func wrongQuotes(v6 bool) map[string][]byte {
	src, dst, beside, protocol := a4, far4, b4, uint8(protoICMP)
	if v6 {
		src, dst, beside, protocol = a6, far6, b6, protoICMP6
	}
	right := udp(src, dst, 1, 2, 30)
	header := len(right.bytes()) - len(right.body)
	other := map[bool]ip{false: udp(a6, far6, 1, 2, 30), true: udp(a4, far4, 1, 2, 30)}[v6]
	later, last := asLater(right, true), asLater(right, false)
	return map[string][]byte{
		"another sender":         udp(beside, dst, 1, 2, 30).bytes(),
		"the other direction":    udp(dst, src, 2, 1, 30).bytes(),
		"another receiver":       udp(src, beside, 1, 2, 30).bytes(),
		"another source port":    udp(src, dst, 7, 2, 30).bytes(),
		"another port":           udp(src, dst, 1, 7, 30).bytes(),
		"swapped ports":          udp(src, dst, 2, 1, 30).bytes(),
		"another protocol":       ip{src: src, dst: dst, proto: protoTCP, body: right.body}.bytes(),
		"a protocol of no ports": ip{src: src, dst: dst, proto: 253, body: right.body}.bytes(),
		"an error":               complaint(src, dst, 3, right.bytes()).bytes(),
		"a redirect":             icmp(src, dst, 5, 0, right.bytes()).bytes(),
		"ICMP cut short":         ip{src: src, dst: dst, proto: protocol, body: []byte{8, 0}}.bytes(),
		"a later fragment":       later.bytes(),
		"the last fragment":      last.bytes(),
		"half of the ports":      right.bytes()[:header+2],
		"no ports":               right.bytes()[:header],
		"half of the header":     right.bytes()[:header/2],
		"nothing":                nil,
		"the other version":      other.bytes(),
	}
}

// asLater is a later fragment whose own bytes look like the start of the packet.
func asLater(p ip, more bool) ip {
	body := p.body
	p.body = slices.Concat(make([]byte, 8), body, make([]byte, 8))
	if more {
		return cut(p, 9, 8, 8+len(body)&^7)
	}
	return cut(p, 9, 8, len(p.body))
}

func unrelatedAtUplink() []row {
	var rows []row
	add := func(name string, p ip) {
		rows = append(rows, row{name: "unrelated from the underlay: " + name, frame: fromUnderlay(overlay(p)), reason: bpf.LaceReasonREASON_NO_FLOW})
	}
	for name, quote := range wrongQuotes(false) {
		add(name, complaint(far4, a4, 3, quote))
	}
	for name, quote := range wrongQuotes(true) {
		add(name+", IPv6", complaint(far6, a6, 3, quote))
	}
	add("to a container that did not send it", complaint(far4, b4, 3, udp(a4, far4, 1, 2, 30).bytes()))
	add("to a container that did not send it, IPv6", complaint(far6, b6, 3, udp(a6, far6, 1, 2, 30).bytes()))
	other := overlay(complaint(far4, a4, 3, udp(a4, far4, 1, 2, 30).bytes()))
	other.src, other.dst = locatorOf(2, 48).Source(overlap, 0), sidOf(overlap)
	rows = append(rows, row{name: "unrelated from the underlay: another network", frame: fromUnderlay(other), reason: bpf.LaceReasonREASON_NO_FLOW, network: int(overlap)})
	for i := range rows {
		rows[i].program, rows[i].dev, rows[i].verdict, rows[i].before, rows[i].check = "uplink", uplink, shot, unrelatedOpened(), stays
	}
	return rows
}

func unrelatedAtContainer() []row {
	var rows []row
	add := func(name string, dev int, p ip) {
		rows = append(rows, row{name: "unrelated from a container: " + name, dev: dev, frame: toGateway(1, dev, p), verdict: shot,
			reason: bpf.LaceReasonREASON_NO_FLOW, before: unrelatedOpened(), check: stays})
	}
	for name, c := range map[string]struct{ from, beside, to ip }{
		"": {from: ip{src: a4}, beside: ip{src: b4}, to: ip{src: far4}}, ", IPv6": {from: ip{src: a6}, beside: ip{src: b6}, to: ip{src: far6}},
	} {
		own, neighbour, far := c.from.src, c.beside.src, c.to.src
		add("about what it sent itself"+name, podA, complaint(own, far, 3, udp(own, far, 1, 2, 30).bytes()))
		add("about another port"+name, podA, complaint(own, far, 3, udp(far, own, 3, 5, 30).bytes()))
		add("to another than the sender"+name, podA, complaint(own, neighbour, 3, udp(far, own, 3, 4, 30).bytes()))
		add("about another container's packet"+name, podB, complaint(neighbour, far, 3, udp(far, own, 3, 4, 30).bytes()))
		add("to a container about what it sent elsewhere"+name, podB, complaint(neighbour, own, 3, udp(own, far, 1, 2, 30).bytes()))
		add("about the flow of its twin in another network"+name, podX, complaint(own, far, 3, udp(far, own, 3, 4, 30).bytes()))
		add("about a later fragment"+name, podA, complaint(own, far, 3, asLater(udp(far, own, 3, 4, 30), true).bytes()))
	}
	return rows
}

func TestUnrelated(t *testing.T) {
	decidedByNoKernel(t)
	runRows(t, unrelatedRows())
}

// TestRelatedFromTheWay: an error from the underlay may be of a router between, which was not sent the packet.
func TestRelatedFromTheWay(t *testing.T) {
	rows := []row{}
	for name, c := range map[string]struct{ from, p ip }{
		"IPv4": {ip{src: v4Of(2, podB)}, udp(a4, far4, 1, 2, 30)}, "IPv6": {ip{src: v6Of(2, podB)}, udp(a6, far6, 1, 2, 30)},
	} {
		about := complaint(c.from.src, c.p.src, 11, c.p.bytes())
		rows = append(rows, row{name: name, program: "uplink", dev: uplink, frame: fromUnderlay(overlay(about)), before: unrelatedOpened(),
			verdict: redirect, reason: bpf.LaceReasonREASON_DECAPSULATED,
			check: func(t testing.TB, n *node, r result, _ []byte) { wantDelivered(t, n, r, podA, about.bytes()) }})
	}
	runRows(t, rows)
}

// TestQuotesDiffer makes sure that the forms of quotes are what their names say.
func TestQuotesDiffer(t *testing.T) {
	for _, p := range []ip{udp(a4, far4, 1, 2, 30), udp(a6, far6, 1, 2, 30)} {
		all := slices.Collect(maps.Values(quotes(p)))
		for i, quote := range all {
			if slices.ContainsFunc(all[i+1:], func(other []byte) bool { return bytes.Equal(quote, other) }) {
				t.Errorf("two forms of a quote are the same: % x", quote)
			}
		}
	}
}
