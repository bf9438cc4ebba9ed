// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"net/netip"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// gatewayPair is node 1, whose network 200 leaves by node 2, and that node. Their host's side is one and the same: only programs are
// run.
type gatewayPair struct{ one, two *node }

func newGatewayPair(t *testing.T) gatewayPair {
	t.Helper()
	b := newBed(t)
	b.needOutside(t)
	return gatewayPair{newNode(t, b, options{number: 1, outside: true}), newNode(t, b, options{number: 2, outside: true})}
}

// on is the pair within a subtest, without flows.
func (g gatewayPair) on(t *testing.T) gatewayPair {
	g.one, g.two = g.one.on(t), g.two.on(t)
	for _, n := range []*node{g.one, g.two} {
		n.dropFlows()
		n.dropFragments()
		n.forget()
	}
	return g
}

// over takes what a node encapsulated to the other one. The outer header has to name both networks; left is the packet inside.
func (g gatewayPair) over(from, to *node, r result, source, network topology.NetworkID) result {
	from.t.Helper()
	wantCounted(from.t, r, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
	if len(r.out) < 54 {
		from.t.Fatalf("sent %s", spaced(r.out))
	}
	src, dst := netip.AddrFrom16([16]byte(r.out[22:38])), netip.AddrFrom16([16]byte(r.out[38:54]))
	if want := from.locator().Source(source, 0); src != want {
		from.t.Errorf("outer source %s, want %s", src, want)
	}
	if want := to.locator().SID(topology.EndDT46, network).Addr; dst != want {
		from.t.Errorf("SID %s, want %s", dst, want)
	}
	return to.run(input{program: "uplink", dev: uplink, frame: atUplink(to, r.out)})
}

// out sends a packet of network 200 on node 1, and wants it out of node 2, masqueraded as its first address.
func (g gatewayPair) out(w world, s speech, from, to netip.AddrPort) (seen netip.AddrPort) {
	g.one.t.Helper()
	r := g.over(g.one, g.two, g.one.run(atPort(podX, s.ask(from, to))), overlap, partner)
	if r.verdict != redirect || len(r.out) < 42 {
		g.one.t.Fatalf("at the gateway: verdict %d, %v", int32(r.verdict), words(r.counted))
	}
	seen = at(w.own, portIn(s, r.out))
	g.two.wantOut(r, wan, s.ask(seen, to)) // one hop on all its way
	return seen
}

// back lets a packet come in at node 2, and wants it at the container of node 1.
func (g gatewayPair) back(w world, p ip, want []byte) {
	g.one.t.Helper()
	r := g.over(g.two, g.one, g.two.run(g.two.atOuter(p)), partner, overlap)
	g.one.wantIn(r, bpf.LaceReasonREASON_DECAPSULATED, podX, want)
}

// TestCarried: what leaves by another node is masqueraded there, and its answers come back over the overlay.
func TestCarried(t *testing.T) {
	g := newGatewayPair(t)
	eachSpeech(t, g.one, mostSpeeches(), func(t *testing.T, _ *node, w world, s speech) {
		g := g.on(t)
		from, to := at(w.x, 40000), at(w.client, 80)
		g.two.preset = bpf.LaceContext{Tos: elsewhereClass} // of another packet
		seen := g.out(w, s, from, to)
		for range 2 {
			g.back(w, s.reply(to, seen), afterHop(s.reply(to, from)))
			if again := g.out(w, s, from, to); again != seen {
				t.Errorf("masqueraded as %s, before as %s", again, seen)
			}
		}
		for _, n := range []*node{g.one, g.two} {
			must(t, n.maps.DecideAgain())
		}
		g.back(w, s.reply(to, seen), afterHop(s.reply(to, from)))
		if again := g.out(w, s, from, to); again != seen {
			t.Errorf("decided again as %s, before as %s", again, seen)
		}
		g.back(w, s.reply(to, seen), afterHop(s.reply(to, from)))
		for _, n := range []*node{g.one, g.two} {
			if flows := n.flows(); len(flows) != 2 {
				t.Errorf("node %d has %d entries, want 2", n.opts.number, len(flows))
			}
		}
	})
}

// carriedError wants an error of the gateway node about a carried packet, at the container of node 1.
func (g gatewayPair) carriedError(w world, r result, about []byte, mtu uint32, code uint8) {
	g.one.t.Helper()
	if len(r.counted) != 1 {
		g.one.t.Errorf("at the gateway: %v", words(r.counted))
	}
	r.counted = []bpf.LaceReason{bpf.LaceReasonREASON_ENCAPSULATED} // an error is not counted as sent
	if r.verdict != redirect {
		g.one.t.Errorf("the gateway's verdict is %d", int32(r.verdict))
		return
	}
	kind := uint8(3)
	if w.own.Is6() {
		kind, code = 1, 1
		if mtu != 0 {
			kind, code = 2, 0
		}
	}
	g.one.wantIn(g.over(g.two, g.one, r, partner, overlap), bpf.LaceReasonREASON_DECAPSULATED, podX,
		errorFrom(w.own, plan.MAC{}, plan.MAC{}, about, kind, code, mtu)[14:])
}

// TestCarriedErrors: what the gateway node cannot send out is told to the container over the overlay, of a new flow and of a known one.
func TestCarriedErrors(t *testing.T) {
	g := newGatewayPair(t)
	eachFamily(t, func(t *testing.T, w world) {
		big := udp(w.x, w.client, 1000, 53, 1300)
		small := udp(w.x, w.client, 1000, 53, 10)
		send := func(g gatewayPair, p ip) (result, []byte) {
			r := g.one.run(atPort(podX, p))
			return g.over(g.one, g.two, r, overlap, partner), afterHop(p)
		}
		t.Run("too big, new", func(t *testing.T) {
			g := g.on(t)
			g.narrowWan(1280)
			r, about := send(g, big)
			wantCounted(t, r, redirect, bpf.LaceReasonREASON_TOO_BIG)
			g.carriedError(w, r, about, 1280, 4)
		})
		t.Run("too big, known", func(t *testing.T) {
			g := g.on(t)
			g.narrowWan(1280)
			r, _ := send(g, small)
			wantCounted(t, r, redirect, egressed)
			g.two.preset = scribbled(t) // nothing of an earlier packet may be used
			for range 2 {
				r, about := send(g, big)
				wantCounted(t, r, redirect, bpf.LaceReasonREASON_TOO_BIG)
				g.carriedError(w, r, about, 1280, 4)
				g.two.age() // … also where the routes have to be asked again
			}
		})
		t.Run("no route", func(t *testing.T) {
			g := g.on(t)
			p := udp(w.x, w.refused, 1000, 53, 10)
			r, about := send(g, p)
			wantCounted(t, r, redirect, bpf.LaceReasonREASON_NO_EGRESS)
			g.carriedError(w, r, about, 0, 13)
		})
		t.Run("another protocol", func(t *testing.T) {
			g := g.on(t)
			r, about := send(g, ip{src: w.x, dst: w.client, proto: 47, body: make([]byte, 20)})
			wantCounted(t, r, redirect, bpf.LaceReasonREASON_NOT_TRANSLATABLE)
			g.carriedError(w, r, about, 0, 13)
		})
	})
}

// narrowWan gives the first interface another MTU until the test ends.
func (g gatewayPair) narrowWan(mtu int) {
	g.one.t.Helper()
	set := func(mtu int) error { return g.one.bed.in(func() error { return setMTU(g.one.bed.index[wan], mtu) }) }
	must(g.one.t, set(mtu))
	g.one.t.(*testing.T).Cleanup(func() { must(g.one.t, set(linkMTU)) })
}

// TestGatewayRefuses: a gateway node lets nothing out that the topology does not say of it, and takes nothing in that it knows better.
func TestGatewayRefuses(t *testing.T) {
	g := newGatewayPair(t)
	eachFamily(t, func(t *testing.T, w world) {
		for name, c := range map[string]struct {
			from, to topology.NetworkID
			p        ip
			want     bpf.LaceReason
		}{
			"of a network without that peering":                  {db, partner, udp(dbFar(w), w.client, 1, 2, 3), bpf.LaceReasonREASON_NO_PEERING},
			"of a network that is not known":                     {elsewhere, partner, udp(w.far, w.client, 1, 2, 3), bpf.LaceReasonREASON_NO_PEERING},
			"to an address of another external":                  {backend, internet, udp(w.far, w.client, 1, 2, 3), bpf.LaceReasonREASON_NO_PEERING},
			"to no external network":                             {backend, internet, udp(w.far, w.stranger, 1, 2, 3), bpf.LaceReasonREASON_NO_PEERING},
			"where that leaves by this node":                     {overlap, partner, udp(farTwin(w), w.client, 1, 2, 3), bpf.LaceReasonREASON_NO_PEERING},
			"with a container's address here":                    {backend, internet, udp(w.a, w.server, 1, 2, 3), bpf.LaceReasonREASON_SPOOFED_ADDRESS},
			"of an external network's address that is not in it": {partner, backend, udp(w.server, w.a, 1, 2, 3), bpf.LaceReasonREASON_NO_EXTERNAL},
			"of no external network's address":                   {partner, backend, udp(w.stranger, w.a, 1, 2, 3), bpf.LaceReasonREASON_NO_EXTERNAL},
			"of an external network that may not":                {internet, backend, udp(w.server, w.a, 1, 2, 3), bpf.LaceReasonREASON_NO_PEERING},
			"of an external network that may":                    {partner, backend, udp(w.client, w.a, 1, 2, 3), bpf.LaceReasonREASON_DECAPSULATED},
			"of a host":                                          {topology.HostsID, backend, udp(w.neighbour, w.a, 1, 2, 3), bpf.LaceReasonREASON_DECAPSULATED},
			"of a host to a network without host":                {topology.HostsID, db, udp(w.neighbour, w.db, 1, 2, 3), bpf.LaceReasonREASON_NO_PEERING},
			"to this host":                                       {backend, topology.HostsID, udp(w.far, w.own, 1, 2, 3), bpf.LaceReasonREASON_NO_PEERING},
			"to this host's port":                                {backend, topology.HostsID, udp(w.far, w.own, 1, 5353, 3), bpf.LaceReasonREASON_NO_PEERING},
			"for an external network as a network":               {partner, partner, udp(w.client, w.server, 1, 2, 3), bpf.LaceReasonREASON_NO_PEERING},
		} {
			t.Run(name, func(t *testing.T) {
				n := g.on(t).one
				r := n.run(input{program: "uplink", dev: uplink, frame: fromUnderlay(outerOf(c.p, c.from, 2, c.to, 0))})
				verdict := uint32(shot)
				if c.want == bpf.LaceReasonREASON_DECAPSULATED {
					verdict = redirect
				}
				wantCounted(t, r, verdict, c.want)
			})
		}
	})
}

func dbFar(w world) netip.Addr {
	if w.own.Is6() {
		return dbSubnet6(2, 10)
	}
	return dbSubnet4(2, 10)
}

// farTwin is the address of network 200's container on node 2.
func farTwin(w world) netip.Addr { return w.far }

// TestCarriedIn: who is outside reaches a container of another node by this one, if he may, and the answers leave by this one too.
func TestCarriedIn(t *testing.T) {
	g := newGatewayPair(t)
	eachSpeech(t, g.one, ordinary, func(t *testing.T, _ *node, w world, s speech) {
		g := g.on(t)
		from, to := at(w.client, 40000), at(w.far, 80)
		for round := range 4 {
			if round == 2 {
				must(t, g.one.maps.DecideAgain())
				must(t, g.two.maps.DecideAgain())
			}
			r := g.over(g.one, g.two, g.one.run(g.one.atOuter(s.ask(from, to))), partner, backend)
			g.two.wantIn(r, bpf.LaceReasonREASON_DECAPSULATED, podA, afterHop(s.ask(from, to)))
			r = g.over(g.two, g.one, g.two.run(input{program: "pod_l3", dev: podA, frame: toGateway(2, podA, s.reply(to, from))}), backend, partner)
			g.one.wantOut(r, wan, s.reply(to, from))
		}
	})
}

// TestCarriedHost: a host reaches a container of another node, and is answered.
func TestCarriedHost(t *testing.T) {
	g := newGatewayPair(t)
	eachSpeech(t, g.one, ordinary, func(t *testing.T, _ *node, w world, s speech) {
		g := g.on(t)
		from, to := at(w.own, 40000), at(w.far, 80)
		for round := range 4 {
			if round == 2 {
				must(t, g.one.maps.DecideAgain())
				must(t, g.two.maps.DecideAgain())
			}
			r := g.over(g.one, g.two, g.one.run(g.one.atHost(s.ask(from, to))), topology.HostsID, backend)
			g.two.wantIn(r, bpf.LaceReasonREASON_DECAPSULATED, podA, s.ask(from, to).bytes())
			r = g.over(g.two, g.one, g.two.run(input{program: "pod_l3", dev: podA, frame: toGateway(2, podA, s.reply(to, from))}), backend, topology.HostsID)
			wantCounted(t, r, redirect, toHost)
			wantFrame(t, r.out, ethIP(g.one.bed.mac[hostSide], plan.GatewayMAC, afterHop(s.reply(to, from))))
		}
	})
}

// TestCarriedToTheGateway: the node that packets leave by is asked itself, by its own address: its host, or the container that has the
// port. Its answers are those of the external network that the address is in.
func TestCarriedToTheGateway(t *testing.T) {
	g := newGatewayPair(t)
	g.byGateway(t)
	eachSpeech(t, g.one, ordinary[:2], func(t *testing.T, _ *node, w world, s speech) {
		from := at(w.far, 40000)
		asks := func(g gatewayPair, to netip.AddrPort) result {
			return g.over(g.two, g.one, g.two.run(input{program: "pod_l3", dev: podA, frame: toGateway(2, podA, s.ask(from, to))}), backend, premises)
		}
		answered := func(g gatewayPair, r result, to netip.AddrPort) {
			t.Helper()
			g.two.wantIn(g.over(g.one, g.two, r, premises, backend), bpf.LaceReasonREASON_DECAPSULATED, podA, afterHop(s.reply(to, from)))
		}
		t.Run("the host", func(t *testing.T) {
			g, to := g.on(t), at(w.own, 22)
			for round := range 6 {
				if round == 3 {
					must(t, g.one.maps.DecideAgain())
					must(t, g.two.maps.DecideAgain())
				}
				r := asks(g, to)
				wantCounted(t, r, redirect, toHost)
				wantFrame(t, r.out, ethIP(g.one.bed.mac[hostSide], plan.GatewayMAC, afterHop(s.ask(from, to))))
				r = g.one.run(g.one.atHost(s.reply(to, from)))
				g.two.wantIn(g.over(g.one, g.two, r, premises, backend), bpf.LaceReasonREASON_DECAPSULATED, podA, s.reply(to, from).bytes())
			}
		})
		t.Run("a port", func(t *testing.T) {
			g, to, inside := g.on(t), at(w.own, 8080), at(w.db, 80)
			if s.name == "UDP" {
				to, inside = at(w.own, 5353), at(w.db, 53)
			}
			for round := range 6 {
				if round == 3 {
					must(t, g.one.maps.DecideAgain())
					must(t, g.two.maps.DecideAgain())
				}
				r := asks(g, to)
				wantCounted(t, r, redirect, bpf.LaceReasonREASON_DECAPSULATED)
				wantDelivered(t, g.one, r, podD, afterHop(s.ask(from, inside)))
				answered(g, g.one.run(atPort(podD, s.reply(inside, from))), to)
			}
		})
	})
}

// byGateway lets network 100 of node 2 reach premises by node 1, which has the address itself: node 2 has none.
func (g gatewayPair) byGateway(t *testing.T) {
	t.Helper()
	p := g.two.buildOutside()
	for i := range p.Peerings {
		if p.Peerings[i].To == premises && p.Peerings[i].From == backend {
			p.Peerings[i].Peer, p.Peerings[i].SID = 1, locatorOf(1, 48).SID(topology.EndDT46, premises)
		}
	}
	g.two.sync(p)
	_, err := g.two.maps.SyncAddresses(nil)
	must(t, err)
}
