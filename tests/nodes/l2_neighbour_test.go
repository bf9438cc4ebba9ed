// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"net/netip"
	"os/exec"
	"testing"
	"time"
)

var (
	free4 = netip.MustParseAddr("10.60.0.45")    // in the pool of n2, nobody's
	free6 = netip.MustParseAddr("fd60::2:dead")  // …
	none4 = netip.MustParseAddr("10.60.0.250")   // in no pool
	none6 = netip.MustParseAddr("fd60::99:dead") // …
	zero4 = netip.IPv4Unspecified()
)

// TestNeighbours has containers find each other: a question crosses the underlay once, if at all, and its answer once.
func TestNeighbours(t *testing.T) {
	takesLong(t)
	for _, form := range forms {
		t.Run(form.name, func(t *testing.T) {
			s := newSegBed(t, bedOptions{srh: form.srh})
			t.Run("once", func(t *testing.T) { checkAskedOnce(t, s) })
			t.Run("unknown", func(t *testing.T) { checkUnknownNeighbours(t, s) })
			t.Run("probes", func(t *testing.T) { checkProbes(t, s) })
			t.Run("announcements", func(t *testing.T) { checkAnnouncements(t, s) })
			t.Run("duplicates", func(t *testing.T) { checkDuplicateDetection(t, s) })
		})
	}
}

// checkAskedOnce counts questions and answers on the wire while two containers that do not know each other talk.
func checkAskedOnce(t *testing.T, s *segBed) {
	type question struct{ from, to *container }
	for at := range 2 {
		for _, q := range []question{{s.a, s.far}, {s.far, s.a}} {
			q.from.flushNeighbours(t, "eth0")
			q.to.flushNeighbours(t, "eth0")
			places := []*capture{s.wire.capture(t, "n1"), s.wire.capture(t, "n3"), q.to.capture(t, "eth0")}
			for range 3 {
				q.from.reaches(t, q.to.addresses()[at])
			}
			asked, answered := carriedARP(arpRequest, q.to.port.V4), carriedARP(arpReply, q.to.port.V4)
			inside := func(f []byte) bool { return isARP(f, arpRequest, q.to.port.V4) }
			if at == 1 {
				asked, answered = carriedND(ndSolicitation, q.to.port.V6), carriedND(ndAdvertisement, q.to.port.V6)
				inside = func(f []byte) bool { return isND(f, ndSolicitation, q.to.port.V6) }
			}
			places[0].await(t, "the answer", answered)
			time.Sleep(20 * time.Millisecond)
			if there, back := places[0].count(asked), places[0].count(answered); there != 1 || back != 1 {
				t.Errorf("%s, %s to %s: the question crossed %d times, the answer %d times", family(q.to.addresses()[at]), q.from.name, q.to.name, there, back)
			}
			if n := places[1].count(asked) + places[1].count(answered); n > 0 {
				t.Errorf("%d of them came to a third node", n)
			}
			if n := places[2].count(inside); n > 0 {
				t.Errorf("%s was asked itself %d times; its node knows", q.to.name, n)
			}
			o, _ := parseCarried(places[0].await(t, "the question", asked))
			if o.dst != segSID(1+nodeOf(s, q.to), allMembers) || o.next != protoFrame {
				t.Errorf("the question goes to %s, next header %d", o.dst, o.next)
			}
		}
		s.a.flushNeighbours(t, "eth0")
		wire := s.wire.capture(t, "n1")
		s.a.reaches(t, s.local.addresses()[at])
		time.Sleep(20 * time.Millisecond)
		if n := wire.count(carrying(func(c carried) bool {
			return isKind(c.frame, typeARP) || isND(c.frame, ndSolicitation, s.local.port.V6)
		})); n > 0 {
			t.Errorf("%d questions about a container here left the node", n)
		}
	}
}

func nodeOf(s *segBed, c *container) int {
	for i, n := range s.nodes {
		if n == c.node {
			return i
		}
	}
	return -1
}

// checkUnknownNeighbours asks for addresses that nobody has: one in another node's pool crosses to that node, one in none does
// not; nobody answers.
func checkUnknownNeighbours(t *testing.T, s *segBed) {
	out := s.a.raw(t)
	seen, wire := s.a.capture(t, "eth0"), s.wire.capture(t, "n1")
	n1, n2 := s.nodes[0], s.nodes[1]
	for _, tt := range []struct {
		target  netip.Addr
		counted *node
		crosses int
	}{{free4, n2, 1}, {none4, n1, 0}, {free6, n2, 1}, {none6, n1, 0}} {
		before := tt.counted.counter("neighbour_unknown")
		asked := carriedND(ndSolicitation, tt.target)
		if tt.target.Is4() {
			asked = carriedARP(arpRequest, tt.target)
			out.to(t, broadcast, typeARP, arp(arpRequest, out.mac, s.a.port.V4, [6]byte{}, tt.target))
		} else {
			out.send(t, solicitation(out.mac, s.a.port.V6, tt.target))
		}
		until(t, "nobody is known to have "+tt.target.String(), func() bool { return tt.counted.counter("neighbour_unknown") > before })
		time.Sleep(20 * time.Millisecond)
		if got := wire.count(asked); got != tt.crosses {
			t.Errorf("the question for %s crossed %d times, want %d", tt.target, got, tt.crosses)
		}
		answered := func(f []byte) bool { return isARP(f, arpReply, tt.target) || isND(f, ndAdvertisement, tt.target) }
		if tt.target.Is4() {
			answered = func(f []byte) bool { return isARP(f, arpReply, tt.target) }
		}
		if seen.count(answered) > 0 {
			t.Errorf("%s was answered for", tt.target)
		}
	}
}

// checkProbes asks, as who is about to take an address does (RFC 5227, RFC 4862), whether anybody has it.
func checkProbes(t *testing.T, s *segBed) {
	out := s.a.raw(t)
	for _, to := range []*container{s.far, s.local} {
		seen := s.a.capture(t, "eth0")
		out.to(t, broadcast, typeARP, arp(arpRequest, out.mac, zero4, [6]byte{}, to.port.V4))
		got := seen.await(t, "the answer to a probe", func(f []byte) bool { return isARP(f, arpReply, to.port.V4) })
		if [6]byte(got[:6]) != out.mac || [6]byte(got[22:28]) != to.port.MAC {
			t.Errorf("a probe is answered with %x", got)
		}
		out.send(t, solicitation(out.mac, netip.IPv6Unspecified(), to.port.V6))
		got = seen.await(t, "the answer to duplicate address detection", func(f []byte) bool { return isND(f, ndAdvertisement, to.port.V6) })
		p, _ := parseIP(got[14:])
		if p.dst != netip.MustParseAddr("ff02::1") || p.hops != 255 || p.payload[4]&0x40 != 0 || [6]byte(p.payload[26:]) != to.port.MAC {
			t.Errorf("duplicate address detection is answered with %x", got)
		}
		if checksum(pseudo(p.src, p.dst, protoICMPv6, len(p.payload)), p.payload) != 0 {
			t.Errorf("a wrong checksum: %x", got)
		}
	}
}

// checkAnnouncements has a container say what it has: all others hear of it once, over the underlay too.
func checkAnnouncements(t *testing.T, s *segBed) {
	out := s.a.raw(t)
	own := linkLocal(out.mac)
	for _, tt := range []struct {
		name  string
		frame []byte
		match func([]byte) bool
	}{
		{"gratuitous request", ethernet(broadcast, out.mac, typeARP, arp(arpRequest, out.mac, s.a.port.V4, [6]byte{}, s.a.port.V4)),
			func(f []byte) bool { return isARP(f, arpRequest, s.a.port.V4) }},
		{"gratuitous answer", ethernet(broadcast, out.mac, typeARP, arp(arpReply, out.mac, s.a.port.V4, broadcast, s.a.port.V4)),
			func(f []byte) bool { return isARP(f, arpReply, s.a.port.V4) }},
		{"own probe", ethernet(broadcast, out.mac, typeARP, arp(arpRequest, out.mac, zero4, [6]byte{}, s.a.port.V4)),
			func(f []byte) bool { return isARP(f, arpRequest, s.a.port.V4) && [4]byte(f[28:]) == [4]byte{} }},
		{"advertisement", announcement(out.mac, s.a.port.V6, s.a.port.V6),
			func(f []byte) bool { return isND(f, ndAdvertisement, s.a.port.V6) }},
		{"advertisement of a link-local address", announcement(out.mac, own, own), func(f []byte) bool { return isND(f, ndAdvertisement, own) }},
		{"own duplicate detection", solicitation(out.mac, netip.IPv6Unspecified(), s.a.port.V6), func(f []byte) bool { return isND(f, ndSolicitation, s.a.port.V6) }},
	} {
		checkReachesAll(t, s, s.a, tt.name, tt.frame, tt.match)
	}
}

// checkReachesAll sends a frame and holds that all other containers get it once, as it is, and that it crosses once to each node.
func checkReachesAll(t *testing.T, s *segBed, from *container, name string, frame []byte, match func([]byte) bool) {
	t.Helper()
	seen := map[*container]*capture{}
	for _, c := range s.all() {
		seen[c] = c.capture(t, "eth0")
	}
	wires := []*capture{s.wire.capture(t, "n1"), s.wire.capture(t, "n2"), s.wire.capture(t, "n3")}
	from.raw(t).send(t, frame)
	for _, c := range s.all() {
		if got := seen[c].await(t, name, match); string(got) != string(frame) {
			t.Errorf("%s came to %s as %x", name, c.name, got)
		}
	}
	carried := func(f []byte) bool {
		c, ok := parseCarried(f)
		return ok && match(c.frame)
	}
	for i, w := range wires {
		w.await(t, name+", encapsulated", carried)
		if i == nodeOf(s, from) {
			until(t, name+" passes for both nodes", func() bool { return w.count(carried) >= 2 })
		}
	}
	time.Sleep(30 * time.Millisecond)
	for _, c := range s.all() { // the sender's own is what it sent
		if got := seen[c].count(match); got != 1 {
			t.Errorf("%s: %s saw it %d times", name, c.name, got)
		}
	}
	own := nodeOf(s, from)
	for i, w := range wires {
		want := 1
		if i == own {
			want = 2
		}
		got := 0
		for _, f := range w.all() {
			if c, ok := parseCarried(f); ok && match(c.frame) {
				got++
				if i != own && c.dst != segSID(i+1, allMembers) || c.next != protoFrame || c.src != segSID(own+1, "5ce") {
					t.Errorf("%s: on the wire %s → %s, next header %d", name, c.src, c.dst, c.next)
				}
			}
		}
		if got != want {
			t.Errorf("%s crossed %d times at %s, want %d", name, got, w.name, want)
		}
	}
}

// checkDuplicateDetection has real clients look for duplicates: arping -D, and the kernel.
func checkDuplicateDetection(t *testing.T, s *segBed) {
	if _, err := exec.LookPath("arping"); err == nil {
		for to, taken := range map[netip.Addr]bool{s.far.port.V4: true, s.local.port.V4: true, free4: false} {
			if err := s.a.exec("arping", "-D", "-c", "2", "-w", "1", "-I", "eth0", to.String()); (err != nil) != taken {
				t.Errorf("arping -D %s: %v, taken: %t", to, err, taken)
			}
		}
	}
	s.a.sysctl(t, "ipv6/conf/all/accept_dad", "1")
	s.a.sysctl(t, "ipv6/conf/eth0/accept_dad", "1")
	for a, taken := range map[netip.Addr]bool{s.far.port.V6: true, s.local.port.V6: true, netip.MustParseAddr("fd60::1:77"): false} {
		s.a.giveWithDAD(t, "eth0", netip.PrefixFrom(a, 64))
		until(t, "the kernel has looked for duplicates of "+a.String(), func() bool { return s.a.dadState(t, "eth0", a) != "tentative" })
		if got := s.a.dadState(t, "eth0", a); (got == "failed") != taken {
			t.Errorf("duplicate detection of %s: %s, taken: %t", a, got, taken)
		}
		s.a.takeAway(t, "eth0", netip.PrefixFrom(a, 64))
	}
}

// exec runs a program in the namespace.
func (n *namespace) exec(name string, args ...string) error {
	return n.do(func() error {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			return errors.Join(err, errors.New(string(out)))
		}
		return nil
	})
}
