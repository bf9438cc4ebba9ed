// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// ranged is an outside node that masquerades with so many ports from first on, and has room for flows.
func ranged(t *testing.T, first, last uint16, flows int, edit func(p *plan.Plan)) *node {
	t.Helper()
	n := newOutside(t)
	p := n.buildOutside()
	p.Masquerade = topology.Masquerade{First: first, Last: last}
	if edit != nil {
		edit(p)
	}
	n.sync(p)
	_, err := n.maps.SyncFlows(flows)
	must(t, err)
	return n
}

// quickly runs a program on packets, without looking at anything but the verdict and what comes out.
func (n *node) quickly(program string, dev int, frame []byte) (verdict uint32, out []byte) {
	n.t.Helper()
	opts := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, 1024), Context: skContext(n.bed.index[dev], 0)}
	must(n.t, n.bed.in(func() (err error) {
		verdict, err = n.coll.Programs[program].Run(opts)
		return err
	}))
	return verdict, opts.DataOut
}

// TestManyFlows: 20,000 flows of three containers in three networks to one port of one server, all with one source address, each with a port
// of its own, that of the answers too.
func TestManyFlows(t *testing.T) {
	decidedByNoKernel(t)
	const flows = 20000
	for _, s := range ordinary {
		t.Run(s.name, func(t *testing.T) {
			n := ranged(t, firstPort, lastPort, flows+1000, nil)
			w := worlds[false]
			to, seen := at(w.server, 443), map[uint16]netip.AddrPort{}
			devs := []int{podA, podX, podD}
			for i := range flows {
				dev := devs[i%3]
				from := at(w.pod(dev), uint16(1024+i/3))
				verdict, out := n.quickly("pod_l3", dev, toGateway(1, dev, s.ask(from, to)))
				if verdict != redirect || netip.AddrFrom4([4]byte(out[26:])) != w.own {
					t.Fatalf("flow %d: verdict %d", i, int32(verdict))
				}
				port := portIn(s, out)
				if other, taken := seen[port]; taken || port < firstPort || port > lastPort {
					t.Fatalf("flow %d of %s has port %d, as %s", i, from, port, other)
				}
				seen[port] = from
			}
			if got := len(n.flows()); got != 2*flows {
				t.Errorf("%d entries, want %d", got, 2*flows)
			}
			n.sample(s, to, seen)
		})
	}
}

// sample lets some of the answers come in: each finds its own container.
func (n *node) sample(s speech, to netip.AddrPort, seen map[uint16]netip.AddrPort) {
	n.t.Helper()
	left := 300
	for port, from := range seen {
		if left--; left == 0 {
			return
		}
		r := n.run(n.atOuter(s.reply(to, at(worlds[false].own, port))))
		wantCounted(n.t, r, redirect, ingress)
		wantFrame(n.t, r.out[14:], afterHop(s.reply(to, from)))
	}
}

// exhaust sends new flows to one server until ports run out, and returns the ports that were had.
func (n *node) exhaust(s speech, w world, to netip.AddrPort) map[uint16]netip.AddrPort {
	n.t.Helper()
	seen := map[uint16]netip.AddrPort{}
	for i := range uint16(2000) {
		from := at(w.a, 1000+i)
		r := n.run(atPort(podA, s.ask(from, to)))
		if len(r.counted) == 1 && r.counted[0] == bpf.LaceReasonREASON_PORTS_EXHAUSTED {
			if r.verdict != redirect {
				n.t.Errorf("the container is not told: verdict %d", int32(r.verdict))
			}
			toldContainer(podA, 13, 0)(n.t, n, r, toGateway(1, podA, s.ask(from, to)))
			return seen
		}
		wantCounted(n.t, r, redirect, egressed)
		seen[portIn(s, r.out)] = from
		if n.forget(); len(seen) != int(i)+1 {
			n.t.Fatalf("flow %d has the port of another one", i)
		}
	}
	n.t.Fatal("the ports do not run out")
	return nil
}

// TestExhausted: where all ports are in use for a server, a new flow there is refused by name, and others are not; a connection that has
// been closed for a while makes place, one that has just been does not.
func TestExhausted(t *testing.T) {
	decidedByNoKernel(t)
	const first, size = 20000, 256
	eachSpeech(t, ranged(t, first, first+size-1, 2000, nil), ordinary, func(t *testing.T, n *node, w world, s speech) {
		to := at(w.server, 80)
		seen := n.exhaust(s, w, to)
		// Tries are bounded, and so some ports may be left.
		if len(seen) < size/2 {
			t.Errorf("refused after %d of %d ports", len(seen), size)
		}
		entries := len(n.flows())
		wantCounted(t, n.run(atPort(podA, s.ask(at(w.a, 900), at(w.server2, 80)))), redirect, egressed)
		if got := len(n.flows()); got != entries+2 || entries != 2*len(seen) {
			t.Errorf("%d entries and then %d, of %d flows", entries, got, len(seen))
		}
		if s.name != "TCP" {
			return
		}
		for range size { // what the bound has left
			n.run(atPort(podA, s.ask(at(w.a, 901), to)))
			n.forget()
		}
		n.wantPlace(s, w, to, seen)
	})
}

func (n *node) wantPlace(s speech, w world, to netip.AddrPort, seen map[uint16]netip.AddrPort) {
	n.t.Helper()
	n.closeAll(0)
	r := n.run(atPort(podA, s.ask(at(w.a, 700), to)))
	if len(r.counted) != 1 || (r.counted[0] != bpf.LaceReasonREASON_PORTS_EXHAUSTED && r.counted[0] != egressed) {
		n.t.Errorf("closed just now: %v", words(r.counted))
	}
	n.closeAll(10)
	entries := len(n.flows())
	r = n.run(atPort(podA, s.ask(at(w.a, 701), to)))
	wantCounted(n.t, r, redirect, egressed)
	port := portIn(s, r.out)
	if got := len(n.flows()); got != entries {
		n.t.Errorf("%d entries, before %d: what was closed is still there", got, entries)
	}
	answer := n.run(n.atOuter(s.reply(to, at(w.own, port))))
	n.wantIn(answer, ingress, podA, afterHop(s.reply(to, at(w.a, 701))))
	if from, was := seen[port]; was {
		wantCounted(n.t, n.run(atPort(podA, segment(from.Addr(), to.Addr(), from.Port(), to.Port(), "A", 1001, 5001, 9))), redirect, egressed)
	}
}

// closeAll makes all flows closed ones that were last seen so many ticks ago.
func (n *node) closeAll(ago uint32) {
	n.t.Helper()
	seen := ticks(n.t) - ago
	for key := range n.flows() {
		n.edit(key, func(f *bpf.LaceFlow) { f.State, f.Seen = uint8(bpf.LaceFlowStateFLOW_CLOSED), seen })
	}
}

// TestHostsPorts: no port is used that a process of the host listens at, or has connected to the same server, and none that is published.
func TestHostsPorts(t *testing.T) {
	const first, size = 20000, 256
	published := func(p *plan.Plan) {
		for i := range p.Ports {
			if p.Ports[i].HostIf != fmt.Sprint(podB) {
				continue
			}
			for port := uint16(first + 3); port < first+size; port += 4 {
				p.Ports[i].Publish = append(p.Ports[i].Publish, plan.Publish{Protocol: protoTCP, Port: port, To: 1}, plan.Publish{Protocol: protoUDP, Port: port, To: 1})
			}
		}
	}
	n := ranged(t, first, first+size-1, 4000, published)
	eachSpeech(t, n, ordinary[:2], func(t *testing.T, n *node, w world, s speech) {
		to := at(w.server, 80)
		for port := uint16(first); port < first+size; port += 4 {
			n.bed.listen(t, s.protocol(false), at(unspecifiedOf(w), port))
			n.bed.connect(t, s.protocol(false), at(w.own, port+1), to)
		}
		seen := n.exhaust(s, w, to)
		if len(seen) < size/8 {
			t.Errorf("only %d ports were found", len(seen))
		}
		for port := range seen {
			if port%4 != 2 {
				t.Errorf("port %d is the host's, and was used", port)
			}
		}
		// Whoever is asked elsewhere may have the ports of those who are connected here.
		other := n.exhaust(s, w, at(w.server2, 80))
		connected := 0
		for port := range other {
			if port%4 == 1 {
				connected++
			}
		}
		if connected == 0 {
			t.Error("a port that is connected to one server was not used for another one")
		}
	})
}

func unspecifiedOf(w world) netip.Addr {
	if w.own.Is6() {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// socket is one of the bed's namespace, closed when the test ends.
func (b *bed) socket(t testing.TB, protocol uint8, own netip.AddrPort) (fd int) {
	t.Helper()
	kind := unix.SOCK_DGRAM
	if protocol == protoTCP {
		kind = unix.SOCK_STREAM
	}
	must(t, b.in(func() (err error) {
		family := unix.AF_INET
		if own.Addr().Is6() {
			family = unix.AF_INET6
		}
		if fd, err = unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if own.Addr().Is6() {
			err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
		}
		return errors.Join(err, unix.Bind(fd, sockaddr(own)))
	}))
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func (b *bed) listen(t testing.TB, protocol uint8, own netip.AddrPort) {
	t.Helper()
	if fd := b.socket(t, protocol, own); protocol == protoTCP {
		must(t, unix.Listen(fd, 1))
	}
}

// connect makes a connection that nobody answers.
func (b *bed) connect(t testing.TB, protocol uint8, own, to netip.AddrPort) {
	t.Helper()
	if err := unix.Connect(b.socket(t, protocol, own), sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		t.Fatal(err)
	}
}

// TestRawWithoutNeighbour: the MTU of a way without Ethernet is not the size of its first packet.
func TestRawWithoutNeighbour(t *testing.T) {
	n := newOutside(t)
	at := n.bed.index[wan]
	eachFamily(t, func(t *testing.T, w world) {
		n := n.on(t)
		must(t, n.maps.SyncEgresses([]maps.Egress{{Index: uint32(at), Raw: true, V4: worlds[false].own, V6: worlds[true].own}}))
		for _, size := range []int{10, 700, 1400} {
			wantCounted(t, n.run(atPort(podA, udp(w.a, w.unresolved, 1, 2, size))), redirect, egressed)
		}
		p := udp(w.a, w.unresolved, 1, 2, linkMTU)
		r := n.run(atPort(podA, p))
		wantCounted(t, r, redirect, bpf.LaceReasonREASON_TOO_BIG)
		toldContainer(podA, 4, linkMTU)(t, n, r, fromA(p))
	})
}

// TestPortUsedAgain: a connection over a closed one, between the same ends, has the port of that one, so that the server may know it by its
// numbers; both entries are the new one's, and none is left of the old.
func TestPortUsedAgain(t *testing.T) {
	decidedByNoKernel(t)
	eachSpeech(t, newOutside(t), ordinary[:1], func(t *testing.T, n *node, w world, s speech) {
		from, to, seen := n.established(s, w)
		for round := range 5 {
			n.closeAll(uint32(round * 3))
			if again := n.masqueraded(s, podA, from, to, w.own, wan); again != seen {
				t.Errorf("round %d: the port is %d, and was %d", round, again.Port(), seen.Port())
			}
			n.wantIn(n.run(n.atOuter(s.reply(to, seen))), ingress, podA, afterHop(s.reply(to, from)))
			if flows := n.flows(); len(flows) != 2 {
				t.Errorf("round %d: %d entries", round, len(flows))
			}
			for key, flow := range n.flows() {
				if flow.Packets != 1 && flow.Packets != 0 || flow.State != uint8(bpf.LaceFlowStateFLOW_ANSWERED) {
					t.Errorf("round %d: %s has %d packets, state %d", round, keyText(key), flow.Packets, flow.State)
				}
			}
		}
	})
}
