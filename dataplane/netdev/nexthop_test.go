// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

func nexthops(t *testing.T, h *Handle, p *plan.Plan) []Nexthop {
	t.Helper()
	hops, err := h.Nexthops(p)
	must(t, err)
	return hops
}

func TestNexthopsLearnTheGateway(t *testing.T) {
	t.Parallel()
	h, c, u0, far := underlay(t)
	p := withPeer(withPeer(noNetworks(), "fd00:a::2"), "fd00:a::2")
	p.Peers[1].Index = 7
	until(t, "the neighbour is resolved without any traffic", func() bool { return nexthops(t, h, p)[0].Known })
	for i, n := range nexthops(t, h, p) {
		want := Nexthop{
			Peer: p.Peers[i].Index, Ifindex: u0.Attrs().Index, Gateway: netip.MustParseAddr("fd00:a::2"),
			DstMAC: macOf(mustLink(t, far, "f0")), SrcMAC: macOf(u0), Known: true, MTU: 1500,
		}
		if n != want {
			t.Errorf("next hop is %+v\nwant %+v", n, want)
		}
	}
	key := neighbourKey{u0.Attrs().Index, netip.MustParseAddr("fd00:a::2")}
	table, err := c.neighbours()
	must(t, err)
	if !table[key].kept {
		t.Errorf("the entry is not kept by the kernel: %+v", table[key])
	}
	nexthops(t, h, noNetworks())
	table, err = c.neighbours()
	must(t, err)
	if table[key].ours {
		t.Error("a former gateway is still kept")
	}
}

func TestNexthopMTUOfTheRoute(t *testing.T) {
	h, c, u0, _ := underlay(t)
	r := &netlink.Route{Dst: ipNet(netip.MustParsePrefix("fd00:b::/64")), LinkIndex: u0.Attrs().Index, Gw: net.ParseIP("fd00:a::2"), MTU: 1400}
	must(t, c.RouteAdd(r))
	if n := nexthops(t, h, withPeer(noNetworks(), "fd00:b::2"))[0]; n.MTU != 1400 {
		t.Errorf("next hop is %+v", n)
	}
}

func TestUnknownNeighbour(t *testing.T) {
	h, _, _, _ := underlay(t)
	if n := nexthops(t, h, withPeer(noNetworks(), "fd00:a::99"))[0]; n.Known || n.DstMAC != (plan.MAC{}) || n.Problem == "" || n.Ifindex == 0 {
		t.Errorf("next hop is %+v", n)
	}
}

// watch runs Watch and counts its calls.
func watch(t *testing.T, h *Handle) *atomic.Int32 {
	t.Helper()
	calls := new(atomic.Int32)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Watch(ctx, func() { calls.Add(1) }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Watch: %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("Watch does not end")
		}
	})
	return calls
}

// settled waits until Watch has said all it has to say.
func settled(t *testing.T, calls *atomic.Int32) int32 {
	t.Helper()
	last, since := calls.Load(), time.Now()
	until(t, "Watch is quiet", func() bool {
		if n := calls.Load(); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > 3*watchQuiet+watchLimit/2
	})
	return last
}

func TestWatch(t *testing.T) {
	t.Parallel()
	h, c, u0, far := underlay(t)
	calls := watch(t, h)
	events := []struct {
		name string
		do   func()
	}{
		{"link down", func() { must(t, c.LinkSetDown(u0)) }},
		{"link up", func() { must(t, c.LinkSetUp(u0)) }},
		{"address", func() { addAddress(t, c, u0, "fd00:d::1/64") }},
		{"route", func() { addRoute(t, c, "fd00:e::/64", "fd00:d::2", u0) }},
		{"IPv4 route", func() { addRoute(t, c, "198.51.100.0/24", "", u0) }},
		{"IPv4 address", func() { addAddress(t, c, u0, "203.0.113.1/32") }},
		{"IPv4 rule", func() { addRule(t, c, netlink.FAMILY_V4, 700, "") }},
		{"IPv6 rule", func() { addRule(t, c, netlink.FAMILY_V6, 700, "") }},
		{"new link", func() { veth(t, c, "u1", far, "f1") }},
		{"link gone", func() { must(t, c.LinkDel(mustLink(t, c, "u1"))) }},
	}
	until(t, "Watch listens", func() bool { return calls.Load() > 0 })
	for _, e := range events {
		before := settled(t, calls)
		e.do()
		until(t, "a call for "+e.name, func() bool { return calls.Load() > before })
	}
}

func TestWatchTellsOfTheGatewaysMAC(t *testing.T) {
	t.Parallel()
	h, c, u0, _ := underlay(t)
	p := withPeer(noNetworks(), "fd00:a::2")
	until(t, "the neighbour is resolved", func() bool { return nexthops(t, h, p)[0].Known })
	calls := watch(t, h)
	until(t, "Watch listens", func() bool { return calls.Load() > 0 })
	before := settled(t, calls)
	neigh := &netlink.Neigh{LinkIndex: u0.Attrs().Index, Family: unix.AF_INET6, IP: net.ParseIP("fd00:a::2"), State: netlink.NUD_STALE, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 7}}
	must(t, c.NeighSet(neigh))
	until(t, "a call for the new MAC", func() bool { return calls.Load() > before })
	nexthops(t, h, p)
	before = settled(t, calls)
	neigh.State = netlink.NUD_REACHABLE // the same MAC
	must(t, c.NeighSet(neigh))
	neigh.IP = net.ParseIP("fd00:a::77") // nobody's gateway
	must(t, c.NeighSet(neigh))
	if after := settled(t, calls); after != before {
		t.Errorf("%d calls for a neighbour that is no gateway, and a state without another MAC", after-before)
	}
}

// A hundred containers must not make the agent resolve its next hops a hundred times.
func TestWatchLeavesOurOwnObjectsOut(t *testing.T) {
	t.Parallel()
	h, _, _, _ := underlay(t)
	p := withPeer(testPlan(), "fd00:a::2")
	calls := watch(t, h)
	until(t, "Watch listens", func() bool { return calls.Load() > 0 })
	must(t, errorOf(h.Apply(p, Options{MTU: uplinkMTU})))
	before := settled(t, calls)
	s := testPort(newNetns(t))
	wire(t, h, s)
	must(t, h.DeletePort(s.HostIf))
	p.Peers = nil
	must(t, errorOf(h.Apply(p, Options{MTU: uplinkMTU})))
	if after := settled(t, calls); after != before {
		t.Errorf("%d calls for our own links and routes", after-before)
	}
}

func errorOf[T any](_ T, err error) error { return err }

// When more happens than the socket holds, Watch calls once more rather than miss it.
func TestWatchSurvivesAnOverrun(t *testing.T) {
	h, c, u0, _ := underlay(t)
	s, err := h.subscribe()
	must(t, err)
	must(t, s.SetReceiveBufferSize(2048, true))
	for i := range 200 {
		addRoute(t, c, netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 1, 0, byte(i)}), 32).String(), "", u0)
	}
	ctx, cancel := context.WithCancel(context.Background())
	dirty := make(chan struct{}, 1)
	done := make(chan error, 1)
	go func() { done <- h.listen(ctx, s, dirty) }()
	defer cancel()
	notice := func(what string) {
		select {
		case <-dirty:
		case err := <-done:
			t.Fatalf("%s: the subscription broke: %v", what, err)
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: no notice", what)
		}
	}
	notice("overrun")
	addRoute(t, c, "fd02::/32", "", u0)
	notice("after it")
}

func TestWatchSubscribesAgain(t *testing.T) {
	h, c, u0, _ := underlay(t)
	s, err := h.subscribe()
	must(t, err)
	s = h.resubscribe(context.Background(), s)
	defer s.Close()
	dirty := make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go h.listen(ctx, s, dirty)
	addRoute(t, c, "fd02::/32", "", u0)
	select {
	case <-dirty:
	case <-time.After(30 * time.Second):
		t.Error("no notice after subscribing again")
	}
}
