// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"net/netip"
	"strings"
	"testing"
)

// both is a guest as it is seen on each of its two interfaces.
type both struct{ web, storage *guest }

// sides looks at a guest of two networks on the interfaces that it should have.
func sides(g *guest, web, storage string) both {
	g.t.Helper()
	w, s := *g, *g
	b := both{w.lookAt(web), s.lookAt(storage)}
	if !netip.MustParsePrefix("10.41.0.0/16").Contains(b.web.v4) || !netip.MustParsePrefix("fd41::/48").Contains(b.web.v6) {
		g.t.Errorf("%s of %v is not in network web: %v", web, g, b.web)
	}
	if !segments[0].Contains(b.storage.v4) || !segments[1].Contains(b.storage.v6) {
		g.t.Errorf("%s of %v is not in network storage: %v", storage, g, b.storage)
	}
	contains(g.t, g.in("cat /sys/class/net/%s/mtu", web), "1460")
	contains(g.t, g.in("cat /sys/class/net/%s/mtu", storage), "1442")
	return b
}

// kept fails unless both sides have the addresses that they had before.
func (b both) kept(before both) {
	b.web.kept(before.web)
	b.storage.kept(before.storage)
}

// TestSeveralNetworks starts containers by all clients in a routed network and a segment.
func TestSeveralNetworks(t *testing.T) {
	s := upSegment(t)
	web := s.node("edge-3").ctr("web", "lace.network=web")
	const two = "lace.network=web,storage"
	s.in("by nerdctl", func(s *segment) {
		n := s.node("edge-1")
		g := n.nerdctl("both", two)
		b := sides(g, "eth0", "eth1")
		sees(g, "ip route", "default via 10.41.1.1 dev eth0 onlink", "10.41.1.1 dev eth0 scope link", "10.50.0.0/24 dev eth1 scope link src "+b.storage.v4.String())
		g.ping(web, s.one, s.two, s.three)
		s.three.ping(b.storage)
		web.ping(b.web)
		transfer(b.web, web)
		n.must("nerdctl", "stop", "-t", "1", "both")
		n.eventuallyHolds(2, 4)
		n.killAgent()
		n.start()
		n.must("nerdctl", "start", "both")
		sides(g, "eth0", "eth1").kept(b)
		g.ping(web, s.three)
		g.remove()
	})
	s.in("the segment has the default route", func(s *segment) {
		g := s.node("edge-2").ctr("gateway", "lace.network=web,storage", "lace.net.storage.gateway=true", "lace.net.storage.ip=10.50.0.40", "lace.net.storage.ifname=data0")
		b := sides(g, "eth0", "data0")
		if b.storage.v4.String() != "10.50.0.40" {
			s.t.Errorf("got %v", b.storage)
		}
		sees(g, "ip route", "default via 10.50.0.1 dev data0 onlink", "10.41.0.0/16 via 10.41.2.1 dev eth0 onlink", "10.41.2.1 dev eth0 scope link",
			"10.50.0.0/24 dev data0 scope link src 10.50.0.40")
		g.ping(web, s.three)
		g.remove()
	})
	s.in("by CRI", func(s *segment) {
		n := s.node("edge-1")
		g := n.cri(pod{name: "both", labels: map[string]string{"lace.network": "storage,web"}})
		b := sides(g, "eth1", "eth0")
		if ip := n.podIP(g.id); ip != b.storage.v4.String() {
			s.t.Errorf("CRI reports %s of %v", ip, b.storage)
		}
		g.ping(web, s.near, s.three)
		contains(s.t, n.must("lace", "status"), "storage  eth0")
		g.remove()
	})
	s.in("refusals", func(s *segment) {
		n := s.node("edge-1")
		for _, tt := range []struct{ pairs, want string }{
			{two + " lace.net.web.gateway=true lace.net.storage.gateway=true", `lace: gateway is true for the networks "web", "storage"; the default route leads into one of them only`},
			{two + " lace.ip=10.41.1.9 lace.net.web.ip=10.41.1.9", "lace: lace.ip and lace.net.web.ip are both set and mean the same; leave one of them away"},
			{two + " lace.net.storage.ifname=eth0", `lace: networks "web" and "storage" both have the interface "eth0"; give one of them another name with lace.net.storage.ifname`},
			{two + " lace.net.storage.ip=" + s.one.v4.String(), `lace: container asks for network "web,storage": network storage: address ` + s.one.v4.String() + " is taken by container one"},
		} {
			n.refused(tt.want, nerdctlRun(labels(strings.Fields(tt.pairs)...), "--rm", image, "true")...)
		}
		n.eventuallyHolds(2, 4) // of the one network that was ready before the other refused, too
	})
}
