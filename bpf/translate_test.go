// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
)

// exchange is a translated flow between a container and somebody: each sees it as its own.
type exchange struct {
	n        *node
	s        speech
	in, out  netip.AddrPort // the container's end, and what it is outside
	far      netip.AddrPort // the other end
	dev      int            // the container's
	opened   bool           // by the container
	enter    func(p ip) input
	came     bpf.LaceReason // what packets are counted as that come to the container
	away     bpf.LaceReason // … and go away from it
	losesHop bool           // coming in
}

// fromContainer is a packet of the flow as the container sends it, or as it arrives.
func (x exchange) fromContainer(inside bool) ip {
	own := x.out
	if inside {
		own = x.in
	}
	return x.s.build(own, x.far, !x.opened)
}

// fromFar is a packet of the other end as the container gets it, or as it was sent.
func (x exchange) fromFar(inside bool) ip {
	own := x.out
	if inside {
		own = x.in
	}
	return x.s.build(x.far, own, x.opened)
}

// kinds are types and codes of errors.
func (x exchange) kinds() [][2]uint8 {
	if x.in.Addr().Is6() {
		return [][2]uint8{{1, 0}, {1, 4}, {2, 0}, {3, 0}, {4, 1}}
	}
	return [][2]uint8{{3, 0}, {3, 3}, {3, 4}, {11, 0}, {12, 0}}
}

// quoteForms are how much of a packet an error quotes, and with which headers. Two calls give the same forms.
func quoteForms(p ip) (out [][]byte) {
	whole, header := afterHop(p), len(p.bytes())-len(p.body)
	out = append(out, whole, whole[:header+8], afterHop(cut(p, 9, 0, 8)))
	if p.src.Is4() {
		p.options = make([]byte, 40)
		return append(out, afterHop(p)[:60+8])
	}
	p.body, p.proto = extension(p.proto, [7]byte{0, 1, 4}, p.body), extDest
	return append(out, afterHop(p), afterHop(p)[:40+8+8])
}

// complaintOf is an error from somebody to somebody, with a quote that lies at an offset.
func complaintOf(from, to netip.Addr, kind [2]uint8, quote []byte) ip {
	return icmp(from, to, kind[0], kind[1], append([]byte{0, 0, 5, 0}, quote...))
}

// sameError compares an error that went on with the one that its receiver should get. Checksums of quoted transport headers are of nobody's
// concern: they are those of the packet on the other side.
func sameError(t testing.TB, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		wantFrame(t, got, want)
		return
	}
	goodChecksums(t, got)
	a, b := append([]byte{}, got...), append([]byte{}, want...)
	blind(a)
	blind(b)
	wantFrame(t, a, b)
}

// blind clears the checksum of an ICMP error and that of the transport header that it quotes; one of the quoted IP header has to be right.
func blind(frame []byte) {
	icmpAt := 14 + 40
	if frame[14]>>4 == 4 {
		icmpAt = 14 + int(frame[14]&15)*4
	}
	frame[icmpAt+2], frame[icmpAt+3] = 0, 0
	quote := frame[icmpAt+8:]
	offset, next := 40, quote[6]
	if quote[0]>>4 == 4 {
		offset, next = int(quote[0]&15)*4, quote[9]
	} else {
		for next == extDest || next == extFragment || next == extHop {
			next, offset = quote[offset], offset+8
		}
	}
	at := map[byte]int{protoTCP: 16, protoUDP: 6, protoICMP: 2, protoICMP6: 2}[next]
	if len(quote) >= offset+at+2 {
		binary.BigEndian.PutUint16(quote[offset+at:], 0)
	}
}

// wantRelated lets both ends, and a router on either way, complain about packets of the flow.
func (x exchange) wantRelated(router netip.Addr) {
	x.n.t.Helper()
	before := x.n.flows()
	for _, kind := range x.kinds() {
		outside, inside := quoteForms(x.fromContainer(false)), quoteForms(x.fromContainer(true))
		for i := range outside {
			for _, from := range []netip.Addr{x.far.Addr(), router} {
				r := x.n.run(x.enter(complaintOf(from, x.out.Addr(), kind, outside[i])))
				wantCounted(x.n.t, r, redirect, x.came)
				if r.verdict == redirect {
					sameError(x.n.t, r.out, ethIP(macOf(1, x.dev), plan.GatewayMAC, x.hop(x.losesHop, complaintOf(from, x.in.Addr(), kind, inside[i]))))
				}
			}
		}
		outside, inside = quoteForms(x.fromFar(false)), quoteForms(x.fromFar(true))
		for i := range outside {
			r := x.n.run(atPort(x.dev, complaintOf(x.in.Addr(), x.far.Addr(), kind, inside[i])))
			wantCounted(x.n.t, r, redirect, x.away)
			if r.verdict == redirect {
				sameError(x.n.t, r.out, append(r.out[:14:14], x.hop(true, complaintOf(x.out.Addr(), x.far.Addr(), kind, outside[i]))...))
			}
			x.n.forget()
		}
	}
	after := x.n.flows()
	for key, flow := range after {
		was := before[key]
		if flow.Packets != was.Packets || flow.State != was.State || flow.Seen != was.Seen {
			x.n.t.Errorf("errors about %s changed it from %d packets, state %d to %d, %d", keyText(key), was.Packets, was.State, flow.Packets, flow.State)
		}
	}
	if len(after) != len(before) {
		x.n.t.Errorf("%d entries, before %d", len(after), len(before))
	}
}

func (x exchange) hop(lost bool, p ip) []byte {
	if lost {
		return afterHop(p)
	}
	return p.bytes()
}

// TestRelatedMasqueraded: errors about a masqueraded flow are translated in both headers, in both directions, of all kinds and forms, and with
// all checksums; before an answer and after, known and decided again.
func TestRelatedMasqueraded(t *testing.T) {
	eachSpeech(t, newOutside(t), ordinary, func(t *testing.T, n *node, w world, s speech) {
		from, to := at(w.a, 40000), at(w.server, 80)
		if s.name == "UDP" {
			s.build = speakUDP(64) // long enough for the forms
		}
		seen := n.masqueraded(s, podA, from, to, w.own, wan)
		x := exchange{n: n, s: s, in: from, out: seen, far: to, dev: podA, opened: true, enter: n.atOuter, came: ingress, away: egressed, losesHop: true}
		x.wantRelated(w.stranger)
		if testing.Short() {
			return
		}
		n.run(n.atOuter(s.reply(to, seen)))
		x.wantRelated(w.stranger)
		must(t, n.maps.DecideAgain())
		x.wantRelated(w.stranger)
		n.masqueraded(s, podA, from, to, w.own, wan)
		n.age()
		x.wantRelated(w.stranger)
	})
}

// TestRelatedPublished does the same with a flow to a port, from outside and from the host itself.
func TestRelatedPublished(t *testing.T) {
	decidedByNoKernel(t)
	eachSpeech(t, newOutside(t), ordinary[:2], func(t *testing.T, n *node, w world, s speech) {
		port, inside := at(w.own, 8080), at(w.db, 80)
		if s.name == "UDP" {
			port, inside = at(w.own, 5353), at(w.db, 53)
			s.build = speakUDP(64)
		}
		from := at(w.neighbour, 40000)
		wantCounted(t, n.run(n.atOuter(s.ask(from, port))), redirect, ingress)
		x := exchange{n: n, s: s, in: inside, out: port, far: from, dev: podD, enter: n.atOuter, came: ingress, away: egressed, losesHop: true}
		x.wantRelated(w.stranger)
		must(t, n.maps.DecideAgain())
		x.wantRelated(w.stranger)
		n.dropFlows()
		from = at(w.own, 40000)
		wantCounted(t, n.run(n.atLoopback(s.ask(from, port))), redirect, fromHost)
		x = exchange{n: n, s: s, in: inside, out: port, far: from, dev: podD, enter: n.atLoopback, came: fromHost, away: toHost}
		x.wantRelated(w.stranger)
	})
}

// TestUnrelatedOutside: an error that quotes nothing of a known flow is the host's own.
func TestUnrelatedOutside(t *testing.T) {
	eachSpeech(t, newOutside(t), ordinary, func(t *testing.T, n *node, w world, s speech) {
		from, to := at(w.a, 40000), at(w.server, 80)
		seen := n.masqueraded(s, podA, from, to, w.own, wan)
		for name, quoted := range map[string]ip{
			"another port": s.ask(at(seen.Addr(), seen.Port()^1), to), "another server": s.ask(seen, at(w.server2, 80)), "the other direction": s.ask(to, seen),
			"the container's own": s.ask(from, to), "of another sender": s.ask(at(w.own2, seen.Port()), to),
		} {
			in := n.atOuter(complaintOf(w.server, w.own, [2]uint8{3, 1}, quoted.bytes()))
			r := n.run(in)
			if wantCounted(t, r, pass); t.Failed() {
				t.Fatal(name)
			}
			wantFrame(t, r.out, in.frame)
		}
	})
}
