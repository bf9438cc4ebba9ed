// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane"
)

// alsoIn asks for another network, as the container's next interface.
func alsoIn(network string) func(*wish) {
	return func(w *wish) { w.More = append(w.More, dataplane.Interface{Network: network}) }
}

// withoutGateway leaves the default route to another network.
func withoutGateway(w *wish) { w.Gateway = false }

// in is the container as its interface in another network shows it, 0 being the first of those.
func (c *container) in(at int) *container {
	other := *c
	other.port = c.more[at]
	return &other
}

// TestTwoNetworks has containers in a routed network and a segment at once.
func TestTwoNetworks(t *testing.T) {
	takesLong(t)
	m := newMixedBed(t, false)
	n := m.nodes[0]
	held := n.holdings()
	both := n.run(t, "both", "web", alsoIn("seg"))
	far := m.nodes[1].run(t, "both", "seg", withoutGateway, func(w *wish) {
		w.More = []dataplane.Interface{{Network: "web", Gateway: true}}
	})
	settle(t, both, both.in(0), far, far.in(0))
	t.Run("pings", func(t *testing.T) {
		checkPings(t, both, m.web[0], m.web[1], far.in(0))
		checkPings(t, both.in(0), m.seg[0], m.seg[1], far)
	})
	t.Run("interfaces", func(t *testing.T) {
		if both.port.IfName != "eth0" || both.in(0).port.IfName != "eth1" || both.port.MTU != 1460 || both.in(0).port.MTU != 1442 {
			t.Errorf("the interfaces are %+v and %+v", both.port, both.in(0).port)
		}
		checkDefaultRoute(t, both, "eth0", both.port.Gateway4, both.port.Gateway6)
		checkDefaultRoute(t, far, "eth1", far.in(0).port.Gateway4, far.in(0).port.Gateway6)
	})
	t.Run("transfers", func(t *testing.T) {
		for at := range 2 {
			checkTransfers(t, both.in(0), far, at)
			checkTransfers(t, both, far.in(0), at)
		}
	})
	t.Run("restart", func(t *testing.T) {
		before := n.holdings()
		s := startStream(t, both.in(0), far, 0)
		n.stop()
		n.start()
		s.check(t)
		if after := n.holdings(); !slices.Equal(before, after) {
			t.Errorf("before:\n%q\nafter:\n%q", before, after)
		}
	})
	t.Run("one less", func(t *testing.T) {
		both.attach(t, "web")
		checkPings(t, both, m.web[1])
		if _, err := both.LinkByName("eth1"); err == nil {
			t.Error("the container has not lost eth1")
		}
	})
	both.order(t, "release")
	if got := n.holdings(); !slices.Equal(got, held) {
		t.Errorf("before:\n%q\nafter:\n%q", held, got)
	}
}

// checkDefaultRoute holds that a container has one way out, by that interface.
func checkDefaultRoute(t *testing.T, c *container, link string, gateways ...netip.Addr) {
	t.Helper()
	var have []netip.Addr
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := c.RouteListFiltered(family, &netlink.Route{Dst: nil}, netlink.RT_FILTER_DST)
		must(t, err)
		for _, r := range routes {
			if r.LinkIndex != c.link(t, link).Attrs().Index {
				t.Errorf("a default route of %s by interface %d", c.name, r.LinkIndex)
			}
			via, _ := netip.AddrFromSlice(r.Gw)
			have = append(have, via.Unmap())
		}
	}
	if !slices.Equal(have, gateways) {
		t.Errorf("%s has default routes by %s, want %s", c.name, have, gateways)
	}
}

// TestSegmentAgents stops, kills and replaces agents and programs under traffic in a segment, which must not notice.
func TestSegmentAgents(t *testing.T) {
	takesLong(t)
	s := newSegBed(t, bedOptions{})
	before := s.nodes[0].holdings()
	floods := []*flood{startFlood(t, s.a, s.far.port.V4), startFlood(t, s.a, s.local.port.V6), startFlood(t, s.a, s.third.port.V6)}
	streams := []*stream{startStream(t, s.a, s.far, 0), startStream(t, s.far, s.local, 1)}
	for range 2 {
		for _, n := range s.nodes[:2] {
			n.stop()
			n.start()
			n.agent.kill()
			n.start()
		}
	}
	for _, f := range floods {
		f.check(t)
	}
	for _, st := range streams {
		st.check(t)
	}
	if after := s.nodes[0].holdings(); !slices.Equal(before, after) {
		t.Errorf("before:\n%q\nafter:\n%q", before, after)
	}
}

// TestSegmentChanges applies topologies in which the segment is another one, or is not at all.
func TestSegmentChanges(t *testing.T) {
	takesLong(t)
	b := newBed(t, bedOptions{nodes: 2, networks: segments + webNetwork})
	n := b.nodes[0]
	a, far := n.run(t, "a", "seg"), b.nodes[1].run(t, "far", "seg")
	web, web2 := n.run(t, "web", "web"), b.nodes[1].run(t, "web", "web")
	checkPings(t, a, far)
	settle(t, web, web2)
	text := b.topology
	without := strings.Replace(text, strings.TrimPrefix(segments, "\n"), "", 1)
	applyAll := func(text string) {
		for _, n := range b.nodes {
			n.apply(text)
		}
	}
	st := startStream(t, web, web2, 0)
	t.Run("other settings", func(t *testing.T) {
		calm := startFlood(t, a, far.port.V4)
		for _, change := range []string{"id = 500\nflood = false", "id = 500\nflood-rate = 50", "id = 500\ndhcp = true", "id = 500\ngateway = [\"10.60.0.1\"]", "id = 500"} {
			applyAll(strings.Replace(text, "id = 500", change, 1))
		}
		calm.check(t)
	})
	t.Run("flood", func(t *testing.T) {
		seen := far.capture(t, "eth0")
		out := a.raw(t)
		applyAll(strings.Replace(text, "id = 500", "id = 500\nflood = false", 1))
		before := n.counter("flood_off")
		out.to(t, broadcast, typeFree, []byte("while it is off"))
		until(t, "a broadcast is refused", func() bool { return n.counter("flood_off") > before })
		applyAll(text)
		out.to(t, broadcast, typeFree, []byte("while it is on"))
		seen.await(t, "a broadcast", containing([]byte("while it is on")))
		if seen.count(containing([]byte("while it is off"))) > 0 {
			t.Error("a broadcast came through")
		}
	})
	t.Run("away", func(t *testing.T) {
		applyAll(without)
		if err := a.ping(far.port.V4, 56, onePing); err == nil {
			t.Error("a segment that is no more carries traffic")
		}
		until(t, "the segmenter is gone", func() bool { _, err := n.LinkByName("laces0"); return err != nil })
		checkPings(t, web, web2)
		applyAll(text)
		checkPings(t, a, far)
		far.transfer(t, a.listenTCP(t, a.port.V4, digest), transferSize()/4)
	})
	t.Run("away over a restart", func(t *testing.T) {
		b.topology = without
		for _, n := range b.nodes {
			n.stop()
			n.start()
		}
		if err := a.ping(far.port.V4, 56, onePing); err == nil {
			t.Error("a segment that is no more carries traffic")
		}
		b.topology = text
		for _, n := range b.nodes {
			n.stop()
			n.start()
		}
		checkPings(t, a, far)
	})
	st.check(t)
}

// TestSegmentUninstall takes everything of Lace off a node with segments and a device: it is as it was, to the last route.
func TestSegmentUninstall(t *testing.T) {
	takesLong(t)
	var before []string
	b := newBed(t, bedOptions{nodes: 1, networks: segments, more: machineEndpoint, prepare: func(b *bed) {
		n := b.nodes[0]
		n.newMachine(t, "vm0")
		before = n.settledDump(t)
	}})
	n := b.nodes[0]
	n.run(t, "a", "seg")
	n.attachDevice(t, "machine", "vm0")
	n.stop()
	n.uninstall()
	var after []string
	until(t, "the last interfaces are gone", func() bool {
		after = n.settledDump(t)
		return !slices.ContainsFunc(after, func(s string) bool { return strings.Contains(s, "lace") })
	})
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("Lace left or took (-before +after):\n%s", diff)
	}
	if _, err := os.Stat(n.bpffs); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", n.bpffs, err)
	}
}

// TestSegmentOverRawUplink joins two nodes by tun devices: packets without an Ethernet header, of which the kernel has to see that
// they are IPv6, whatever frame is in them.
func TestSegmentOverRawUplink(t *testing.T) {
	takesLong(t)
	needRoot(t)
	for _, form := range forms {
		t.Run(form.name, func(t *testing.T) {
			b := newBed(t, bedOptions{nodes: 2, srh: form.srh, networks: segments, perNode: "uplinks = [\"tun0\"]", prepare: func(b *bed) {
				one, two := newTun(t, b.nodes[0], "fd00:a::1"), newTun(t, b.nodes[1], "fd00:a::2")
				go pump(one, two)
				go pump(two, one)
			}})
			checkSegmentPair(t, b.nodes[0].run(t, "x", "seg"), b.nodes[1].run(t, "y", "seg"))
		})
	}
}

// checkSegmentPair has two containers of two nodes exchange everything.
func checkSegmentPair(t *testing.T, x, y *container) {
	checkPings(t, x, y)
	checkLinkLocal(t, x, y)
	for at := range 2 {
		checkSizes(t, x, y, at)
		x.transfer(t, y.listenTCP(t, y.addresses()[at], digest), transferSize()/4)
		y.transfer(t, x.listenTCP(t, x.addresses()[at], digest), transferSize()/4)
	}
	seen, out := y.capture(t, "eth0"), x.raw(t)
	for name, frame := range framesForMany(x) {
		out.send(t, frame)
		seen.await(t, name, func(f []byte) bool { return string(f) == string(frame) })
	}
	for name, make := range frameKindsOf(x, y) {
		kind, payload := make(77)
		frame := ethernet(y.port.MAC, out.mac, kind, payload)
		out.send(t, frame)
		seen.await(t, name, func(f []byte) bool { return string(f) == string(frame) })
	}
	for _, probe := range [][]byte{
		ethernet(broadcast, out.mac, typeARP, arp(arpRequest, out.mac, zero4, [6]byte{}, y.port.V4)),
		solicitation(out.mac, netip.IPv6Unspecified(), y.port.V6),
	} {
		answers := x.capture(t, "eth0")
		out.send(t, probe)
		answers.await(t, "the answer to a probe", func(f []byte) bool {
			return isARP(f, arpReply, y.port.V4) || isND(f, ndAdvertisement, y.port.V6)
		})
	}
}
