// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestReplication sends frames for many: all others of the segment get them once, and nobody else.
func TestReplication(t *testing.T) {
	takesLong(t)
	for _, form := range forms {
		t.Run(form.name, func(t *testing.T) {
			s := newSegBed(t, bedOptions{srh: form.srh})
			var strangers []*capture
			for _, n := range s.nodes {
				strangers = append(strangers, n.run(t, "stranger", "twin").capture(t, "eth0"))
			}
			for name, frame := range framesForMany(s.a) {
				checkReachesAll(t, s, s.a, name, frame, func(f []byte) bool { return bytes.Equal(f, frame) })
				for _, c := range strangers {
					if c.count(func(f []byte) bool { return bytes.Equal(f, frame) }) > 0 {
						t.Errorf("%s came to %s of another network", name, c.name)
					}
				}
			}
			t.Run("places", func(t *testing.T) { checkPlaces(t, s) })
		})
	}
}

// framesForMany are frames of a container with group addresses of all kinds.
func framesForMany(c *container) map[string][]byte {
	mac, v4, v6 := [6]byte(c.port.MAC), c.port.V4, c.port.V6
	packet := func(to string, size int) []byte {
		dst := netip.MustParseAddr(to)
		return ip(c.like(dst), dst, protoUDP, 1, udp(netip.AddrPortFrom(c.like(dst), 5), netip.AddrPortFrom(dst, 5), pattern(uint64(size), size)))
	}
	own := linkLocal(mac)
	mdns := netip.MustParseAddr("ff02::fb")
	return map[string][]byte{
		"limited broadcast":       ethernet(broadcast, mac, typeIPv4, packet("255.255.255.255", 1)),
		"subnet's broadcast":      ethernet(broadcast, mac, typeIPv4, packet("10.60.0.255", 100)),
		"largest broadcast":       ethernet(broadcast, mac, typeIPv4, packet("10.60.0.255", c.port.MTU-28)),
		"IPv4 multicast":          ethernet([6]byte{1, 0, 0x5e, 0, 0, 0x12}, mac, typeIPv4, ipv4(v4, netip.MustParseAddr("224.0.0.18"), 112, 255, pattern(1, 20))),
		"IPv6 multicast":          ethernet([6]byte{0x33, 0x33, 0, 0, 0, 0x12}, mac, typeIPv6, ipv6(v6, netip.MustParseAddr("ff02::12"), 112, 255, pattern(1, 24))),
		"from link-local":         ethernet([6]byte{0x33, 0x33, 0, 0, 0, 0xfb}, mac, typeIPv6, ipv6(own, mdns, protoUDP, 255, udp(netip.AddrPortFrom(own, 5353), netip.AddrPortFrom(mdns, 5353), pattern(2, 30)))),
		"spanning tree":           ethernet([6]byte{1, 0x80, 0xc2, 0, 0, 0}, mac, 38, pattern(3, 38)),
		"LLDP":                    ethernet([6]byte{1, 0x80, 0xc2, 0, 0, 0xe}, mac, 0x88cc, pattern(4, 46)),
		"tiny":                    ethernet(broadcast, mac, typeFree, []byte{9}),
		"tagged broadcast":        ethernet(broadcast, mac, typeVLAN, tag(7, typeIPv4, packet("192.168.7.255", 50)[:60])),
		"tagged ARP":              ethernet(broadcast, mac, typeVLAN, tag(7, typeARP, arp(arpRequest, mac, netip.MustParseAddr("192.168.7.1"), [6]byte{}, netip.MustParseAddr("192.168.7.2")))),
		"largest of another kind": ethernet(broadcast, mac, typeFree, pattern(5, c.port.MTU)),
	}
}

// checkPlaces has containers come and go: those that stay get one copy, whatever place they have.
func checkPlaces(t *testing.T, s *segBed) {
	n := s.nodes[1]
	var come []*container
	for i := range 5 {
		come = append(come, n.run(t, fmt.Sprint("c", i), "seg"))
	}
	for _, i := range []int{0, 2, 3} {
		come[i].order(t, "release")
	}
	late := n.run(t, "late", "seg")
	stay := []*container{come[1], come[4], late, s.far, s.local, s.third}
	var seen []*capture
	for _, c := range stay {
		seen = append(seen, c.capture(t, "eth0"))
	}
	frame := ethernet(broadcast, s.a.port.MAC, typeFree, []byte("who is still there?"))
	s.a.raw(t).send(t, frame)
	isIt := func(f []byte) bool { return bytes.Equal(f, frame) }
	for _, c := range seen {
		c.await(t, "a broadcast", isIt)
	}
	time.Sleep(30 * time.Millisecond)
	for _, c := range seen {
		if got := c.count(isIt); got != 1 {
			t.Errorf("%d copies at %s", got, c.name)
		}
	}
	for _, c := range append(come, late) {
		c.order(t, "release")
	}
}

// TestSegmentSettings changes what a segment does with frames for many, and who may ask for addresses.
func TestSegmentSettings(t *testing.T) {
	takesLong(t)
	s := newSegBed(t, bedOptions{})
	t.Run("flood=false", func(t *testing.T) { s.set(t, "flood = false"); checkNoReplication(t, s) })
	t.Run("flood-rate", func(t *testing.T) { s.set(t, fmt.Sprintf("flood-rate = %d", fewFrames)); checkFloodRate(t, s) })
	t.Run("dhcp=true", func(t *testing.T) { s.set(t, "dhcp = true"); checkDHCPBetween(t, s, true) })
	t.Run("storm", func(t *testing.T) { checkStorm(t, s) })
	t.Run("dhcp=false", func(t *testing.T) { s.set(t, ""); checkDHCPBetween(t, s, false) })
}

// set applies a topology in which network seg has these keys too.
func (s *segBed) set(t *testing.T, keys string) {
	t.Helper()
	for _, n := range s.nodes {
		n.apply(strings.Replace(s.topology, "id = 500", "id = 500\n"+keys, 1))
	}
}

// checkNoReplication has a segment without frames for many: neighbours are found all the same.
func checkNoReplication(t *testing.T, s *segBed) {
	for _, c := range s.all() {
		c.flushNeighbours(t, "eth0")
	}
	checkPings(t, s.all()...)
	var places []*capture
	for _, c := range s.all()[1:] {
		places = append(places, c.capture(t, "eth0"))
	}
	wire := s.wire.capture(t, "n1")
	before := s.a.node.counter("flood_off")
	frames := framesForMany(s.a)
	out := s.a.raw(t)
	for _, f := range frames {
		out.send(t, f)
	}
	until(t, "they are refused", func() bool { return s.a.node.counter("flood_off") >= before+uint64(len(frames)) })
	out.to(t, s.far.port.MAC, typeFree, []byte("this may"))
	places[1].await(t, "what is for one", containing([]byte("this may")))
	for name, frame := range frames {
		for _, c := range places {
			if c.count(func(f []byte) bool { return bytes.Equal(f, frame) }) > 0 {
				t.Errorf("%s came to %s", name, c.name)
			}
		}
	}
	if n := wire.count(carrying(func(c carried) bool {
		return c.frame[0]&1 == 1 && !isKind(c.frame, typeARP) && !isKind(c.frame, typeIPv6)
	})); n > 0 {
		t.Errorf("%d frames for many crossed the wire", n)
	}
	inject := ethernet(s.nodes[0].mac(t, uplink), [6]byte{2, 0, 0, 0, 0, 9}, typeIPv6,
		ipv6(segSID(2, "5ce"), segSID(1, allMembers), protoFrame, 60, ethernet(broadcast, s.far.port.MAC, typeFree, []byte("of a node"))))
	before = s.a.node.counter("flood_off")
	s.wire.sender(t, "n1").send(t, inject)
	until(t, "a node's is refused", func() bool { return s.a.node.counter("flood_off") > before })
}

// fewFrames for many are replicated a second.
const fewFrames = 100

// checkFloodRate sends more for many than that.
func checkFloodRate(t *testing.T, s *segBed) {
	const rate, frames = fewFrames, 1500
	places := []*capture{s.local.capture(t, "eth0"), s.far.capture(t, "eth0"), s.third.capture(t, "eth0")}
	out := s.a.raw(t)
	isIt := func(f []byte) bool { return isKind(f, typeFree) && [6]byte(f[6:]) == s.a.port.MAC }
	begin := time.Now()
	before := s.a.node.counter("flood_limited")
	for i := range frames {
		out.to(t, broadcast, typeFree, binary.BigEndian.AppendUint32(nil, uint32(i)))
	}
	most := rate/4 + 32 + 1 + int(time.Since(begin)*rate/time.Second)
	until(t, "the others are refused", func() bool { return s.a.node.counter("flood_limited")+uint64(places[0].count(isIt)) == before+frames })
	passed := frames - int(s.a.node.counter("flood_limited")-before)
	for _, c := range places {
		until(t, "what may passes "+c.name, func() bool { return c.count(isIt) >= passed })
		if got := c.count(isIt); got != passed || got < rate/4+32 || got > most {
			t.Errorf("%d of %d frames came to %s, %d were not refused; %d to %d may", got, frames, c.name, passed, rate/4+32, most)
		}
	}
	// Another container has a budget of its own.
	other := s.local.raw(t)
	other.to(t, broadcast, typeFree, []byte("mine"))
	places[1].await(t, "another container's", containing([]byte("mine")))
	t.Logf("%d of %d frames passed in %s", passed, frames, time.Since(begin))
}

// questionsFor asks one after the other for a while, each until it is answered, and says how many were, and how many had to be
// asked again.
func questionsFor(t *testing.T, from *container, to netip.AddrPort, d time.Duration) (answered, lost int) {
	t.Helper()
	c := from.dialUDP(t, to)
	for end := time.Now().Add(d); time.Now().Before(end); {
		if _, err := ask(c, []byte("question"), patience/20); err != nil {
			lost++
			continue
		}
		answered++
	}
	return answered, lost
}

// storm sends one frame as fast as it can, until it is stopped, and says how many.
type storm struct {
	stop chan struct{}
	done sync.WaitGroup
	sent int
}

func startStorm(t *testing.T, from *container, frame []byte) *storm {
	out := from.raw(t)
	s := &storm{stop: make(chan struct{})}
	s.done.Go(func() {
		for {
			select {
			case <-s.stop:
				return
			default:
			}
			if _, err := unix.Write(out.fd, frame); err == nil {
				s.sent++
			}
		}
	})
	return s
}

func (s *storm) end() int {
	close(s.stop)
	s.done.Wait()
	return s.sent
}

// checkStorm has a container send frames for all as fast as it can: two others go on as they do while it sends as many that go
// nowhere, which costs the machine the same. Others that use the machine disturb that: the best of three times counts.
func checkStorm(t *testing.T, s *segBed) {
	before := s.a.node.counter("flood_limited")
	best, sent := 0.0, 0
	for range 3 {
		ratio, frames := measureStorm(t, s)
		if best, sent = max(best, ratio), sent+frames; best >= 0.5 {
			break
		}
	}
	if best < 0.5 {
		t.Errorf("under the storm %.2f of the questions are answered", best)
	}
	if limited := int(s.a.node.counter("flood_limited") - before); limited < sent/2 {
		t.Errorf("of %d frames only %d were refused", sent, limited)
	}
}

// measureStorm compares, in short turns, how many questions are answered under a storm and beside one that nobody hears. sent:
// the frames of the first.
func measureStorm(t *testing.T, s *segBed) (ratio float64, sent int) {
	const turn, turns = 100 * time.Millisecond, 15
	server := s.far.echoUDP(t, s.far.port.V4, "")
	frames := map[string][]byte{
		"alone":               nil,
		"beside one unheard":  ethernet([6]byte{0x52, 0x54, 0, 0, 0, 1}, s.a.port.MAC, typeFree, make([]byte, 46)),
		"under a broadcasted": ethernet(broadcast, s.a.port.MAC, typeFree, make([]byte, 46)),
	}
	questionsFor(t, s.local, server, turn)
	answers, stormed := map[string]int{}, map[string]int{}
	for range turns {
		for name, frame := range frames {
			var blow *storm
			if frame != nil {
				blow = startStorm(t, s.a, frame)
			}
			answered, lost := questionsFor(t, s.local, server, turn)
			if answers[name] += answered; blow != nil {
				stormed[name] += blow.end()
			}
			if lost > 0 {
				t.Errorf("%s storm %d questions were lost", name, lost)
			}
		}
	}
	ratio = float64(answers["under a broadcasted"]) / float64(answers["beside one unheard"])
	t.Logf("in %s each: answers %v, frames %v; answers under the storm ÷ beside one that nobody hears: %.2f", turn*turns, answers, stormed, ratio)
	return ratio, stormed["under a broadcasted"]
}

// checkDHCPBetween has a container ask for addresses and another one give them.
func checkDHCPBetween(t *testing.T, s *segBed, may bool) {
	client, server := s.a, s.far
	all := netip.MustParseAddr("255.255.255.255")
	question := ethernet(broadcast, client.port.MAC, typeIPv4, ipv4(zero4, all, protoUDP, 64,
		udp(netip.AddrPortFrom(zero4, 68), netip.AddrPortFrom(all, 67), []byte("give me an address"))))
	offer := func(dst [6]byte, to netip.Addr) []byte {
		return ethernet(dst, server.port.MAC, typeIPv4, ipv4(server.port.V4, to, protoUDP, 64,
			udp(netip.AddrPortFrom(server.port.V4, 67), netip.AddrPortFrom(to, 68), []byte("take this"))))
	}
	from, to := linkLocal(server.port.MAC), linkLocal(client.port.MAC)
	six := ethernet(client.port.MAC, server.port.MAC, typeIPv6, ipv6(from, to, protoUDP, 64,
		udp(netip.AddrPortFrom(from, 547), netip.AddrPortFrom(to, 546), []byte("take this too"))))
	checkDHCP(t, client, server, may, "spoofed_address", question)
	checkDHCP(t, server, client, may, "dhcp_server", offer(broadcast, all))
	checkDHCP(t, server, client, may, "dhcp_server", offer(client.port.MAC, client.port.V4))
	checkDHCP(t, server, client, may, "dhcp_server", six)
}

// checkDHCP sends a frame that comes only where the network has DHCP.
func checkDHCP(t *testing.T, from, to *container, may bool, reason string, frame []byte) {
	t.Helper()
	seen := to.capture(t, "eth0")
	isIt := func(f []byte) bool { return bytes.Equal(f, frame) }
	before := from.node.counter(reason)
	from.raw(t).send(t, frame)
	if may {
		seen.await(t, "DHCP", isIt)
		return
	}
	until(t, "DHCP is refused as "+reason, func() bool { return from.node.counter(reason) > before })
	if seen.count(isIt) > 0 {
		t.Error("DHCP came through")
	}
}
