// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
)

// portOf is what a port of the fixture stands for: the node's, and the container's.
func portOf(s speech, port8080, to uint16) (uint16, uint16) {
	if s.name == "UDP" && port8080 == 8080 {
		return 5353, 53
	}
	return port8080, to
}

// TestHairpin: a container reaches what is published at the node's address, its own too, and is answered from there. Who may reach the
// target is seen there as himself, who may reach the address only is seen as the node.
func TestHairpin(t *testing.T) {
	n := newOutside(t)
	for name, c := range map[string]struct {
		from, to   int
		port, inTo uint16
		masquerade bool
	}{
		"by the peering with the container":  {podA, podD, 8080, 80, false},
		"of its own network":                 {podB, podA, 7000, 7000, false},
		"by the peering with the address":    {podX, podD, 8080, 80, true},
		"itself":                             {podA, podA, 7000, 7000, true},
		"itself, which could not be reached": {podD, podD, 8080, 80, true},
	} {
		t.Run(name, func(t *testing.T) {
			eachSpeech(t, n, ordinary[:2], func(t *testing.T, n *node, w world, s speech) {
				port, inTo := portOf(s, c.port, c.inTo)
				from, at, inside := at(w.pod(c.from), 40000), at(w.own, port), at(w.pod(c.to), inTo)
				seen := from
				for round := range 6 {
					if round == 3 {
						must(t, n.maps.DecideAgain())
					}
					r := n.run(atPort(c.from, s.ask(from, at)))
					wantCounted(t, r, redirect, bpf.LaceReasonREASON_LOCAL)
					if c.masquerade && round == 0 {
						seen = n.chosen(s, r, w)
					}
					wantDelivered(t, n, r, c.to, afterHop(s.ask(seen, inside)))
					r = n.run(atPort(c.to, s.reply(inside, seen)))
					wantCounted(t, r, redirect, bpf.LaceReasonREASON_LOCAL)
					wantDelivered(t, n, r, c.from, afterHop(s.reply(at, from)))
				}
				if got := len(n.flows()); got != 2 {
					t.Errorf("%d entries, want 2", got)
				}
			})
		})
	}
}

// chosen is who a packet comes from that was masqueraded: the node, with a port of the range.
func (n *node) chosen(s speech, r result, w world) netip.AddrPort {
	n.t.Helper()
	seen := at(w.own, portIn(s, r.out))
	if seen.Port() < firstPort || seen.Port() > lastPort {
		n.t.Errorf("masqueraded with port %d", seen.Port())
	}
	return seen
}

// pod is a container's address.
func (w world) pod(dev int) netip.Addr {
	return map[int]netip.Addr{podA: w.a, podB: w.b, podX: w.x, podD: w.db}[dev]
}

// TestHairpinTooBig: a packet that does not fit takes no port.
func TestHairpinTooBig(t *testing.T) {
	n := newOutside(t)
	eachFamily(t, func(t *testing.T, w world) {
		n := n.on(t)
		must(t, n.maps.PutPort(n.portOf(podD), maps.Device{Index: uint32(n.bed.index[podD]), MTU: 1280}))
		p := udp(w.x, w.own, 40000, 5353, 1300)
		wantCounted(t, n.run(atPort(podX, p)), redirect, bpf.LaceReasonREASON_TOO_BIG)
		if flows := n.flows(); len(flows) != 0 {
			t.Errorf("%d entries of a packet that did not go on", len(flows))
		}
	})
}

// portOf is a container of the plan.
func (n *node) portOf(dev int) plan.Port {
	for _, p := range n.plan.Ports {
		if p.HostIf == fmt.Sprint(dev) {
			return p
		}
	}
	n.t.Fatalf("no container is behind interface %d", dev)
	return plan.Port{}
}

// wantToHost wants a packet at lc-host, for the host's stack.
func (n *node) wantToHost(r result, packet []byte) {
	n.t.Helper()
	wantCounted(n.t, r, redirect, toHost)
	wantFrame(n.t, r.out, ethIP(n.bed.mac[hostSide], plan.GatewayMAC, packet))
}

// TestToHost: a container opens flows to its own node where the network has host and a peering covers the address, and is answered.
func TestToHost(t *testing.T) {
	eachSpeech(t, newOutside(t), mostSpeeches(), func(t *testing.T, n *node, w world, s speech) {
		from, to := at(w.a, 40000), at(w.own, 22)
		for round := range 6 {
			if round == 3 {
				must(t, n.maps.DecideAgain())
			}
			n.wantToHost(n.run(atPort(podA, s.ask(from, to))), afterHop(s.ask(from, to)))
			n.wantIn(n.run(n.atHost(s.reply(to, from))), fromHost, podA, s.reply(to, from).bytes())
		}
	})
}

// TestFromHost: the host reaches containers of a network with host, by their addresses, and is answered.
func TestFromHost(t *testing.T) {
	eachSpeech(t, newOutside(t), mostSpeeches(), func(t *testing.T, n *node, w world, s speech) {
		from, to := at(w.own, 40000), at(w.a, 80)
		for round := range 6 {
			if round == 3 {
				must(t, n.maps.DecideAgain())
			}
			n.wantIn(n.run(n.atHost(s.ask(from, to))), fromHost, podA, s.ask(from, to).bytes())
			n.wantToHost(n.run(atPort(podA, s.reply(to, from))), afterHop(s.reply(to, from)))
		}
	})
}

// TestLoopback: the host reaches a published port by its own addresses as itself, and by the loopback addresses as its own one; the
// answers come to it as from what it asked.
func TestLoopback(t *testing.T) {
	eachSpeech(t, newOutside(t), ordinary[:2], func(t *testing.T, n *node, w world, s speech) {
		localhost := netip.MustParseAddr("127.0.0.1")
		if w.own.Is6() {
			localhost = netip.IPv6Loopback()
		}
		port, inTo := portOf(s, 8080, 80)
		for _, c := range [][2]netip.Addr{{w.own, w.own}, {localhost, localhost}, {localhost, w.own}, {w.own, localhost}} {
			n.dropFlows()
			from, to, inside := at(c[0], 40000), at(c[1], port), at(w.db, inTo)
			seen := from
			for round := range 6 {
				if round == 3 {
					must(t, n.maps.DecideAgain())
				}
				r := n.run(n.atLoopback(s.ask(from, to)))
				if c[0] == localhost && round == 0 {
					seen = n.chosen(s, r, w)
				}
				n.wantIn(r, fromHost, podD, s.ask(seen, inside).bytes())
				r = n.run(atPort(podD, s.reply(inside, seen)))
				wantCounted(t, r, redirect, toHost)
				wantFrame(t, r.out, ethIP(plan.MAC{}, plan.MAC{}, afterHop(s.reply(to, from))))
			}
		}
	})
}

// TestPublished: who is outside reaches a container by a port of the node, as himself, and is answered from there; by any address and
// interface, and on the way that the routes of the host say.
func TestPublished(t *testing.T) {
	eachSpeech(t, newOutside(t), publishedSpeeches(), func(t *testing.T, n *node, w world, s speech) {
		port, inTo := portOf(s, 8080, 80)
		if s.protocol(false) == protoUDP {
			port, inTo = 5353, 53
		}
		for dev, own := range map[int]netip.Addr{wan: w.own, wan2: w.own2} {
			n.dropFlows()
			from, to, inside := at(w.neighbour, 40000), at(own, port), at(w.db, inTo)
			for round := range 6 {
				if round == 3 {
					must(t, n.maps.DecideAgain())
				}
				p := input{program: "outer", dev: dev, frame: n.bed.fromOutside(dev, s.ask(from, to))}
				n.wantIn(n.run(p), ingress, podD, afterHop(s.ask(from, inside)))
				r := n.run(atPort(podD, s.reply(inside, from)))
				wantCounted(t, r, redirect, egressed)
				if r.ctx.Out != uint32(n.bed.index[wan]) {
					t.Errorf("answers by interface %d", r.ctx.Out)
				}
				wantFrame(t, r.out[12:], ethIP(plan.MAC{}, plan.MAC{}, afterHop(s.reply(to, from)))[12:])
			}
		}
	})
}

func publishedSpeeches() (out []speech) {
	for _, s := range mostSpeeches() {
		if !s.query(false) {
			out = append(out, s)
		}
	}
	return out
}

// TestTranslatedFragments: the first fragment tells the later ones whose they are; all are translated, and the checksum is that of the whole.
func TestTranslatedFragments(t *testing.T) {
	n := newOutside(t)
	eachFamily(t, func(t *testing.T, w world) {
		n := n.on(t)
		n.dropFlows()
		datagram := func(from, to netip.AddrPort) ip {
			return summed(udp(from.Addr(), to.Addr(), from.Port(), to.Port(), 120))
		}
		from, to := at(w.a, 40000), at(w.server, 53)
		var seen netip.AddrPort
		for i, piece := range pieces(datagram(from, to), 0x1001, 32) {
			r := n.run(atPort(podA, piece))
			if i == 0 {
				first := r.out[14:]
				offset := 20
				if w.own.Is6() {
					offset = 48
				}
				seen = at(w.own, uint16(first[offset])<<8|uint16(first[offset+1]))
			}
			n.wantOut(r, wan, pieces(datagram(seen, to), 0x1001, 32)[i])
		}
		for i, piece := range pieces(datagram(to, seen), 0x2001, 64) {
			n.wantIn(n.run(n.atOuter(piece)), ingress, podA, afterHop(pieces(datagram(to, from), 0x2001, 64)[i]))
		}
		client, port, inside := at(w.neighbour, 40000), at(w.own, 5353), at(w.db, 53)
		for i, piece := range pieces(datagram(client, port), 0x3001, 64) {
			n.wantIn(n.run(n.atOuter(piece)), ingress, podD, afterHop(pieces(datagram(client, inside), 0x3001, 64)[i]))
		}
		for i, piece := range pieces(datagram(inside, client), 0x4001, 64) {
			r := n.run(atPort(podD, piece))
			wantCounted(t, r, redirect, egressed)
			wantFrame(t, r.out[12:], ethIP(plan.MAC{}, plan.MAC{}, afterHop(pieces(datagram(port, client), 0x4001, 64)[i]))[12:])
		}
	})
}
