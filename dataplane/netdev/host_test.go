// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// withHost has hosts talk with the subnets of testPlan's network.
func withHost(p *plan.Plan) *plan.Plan {
	p.HostRoutes = prefixes("10.40.0.0/16", "fd40::/32")
	return p
}

// withExternal gives the plan a network outside.
func withExternal(p *plan.Plan) *plan.Plan {
	p.Externals = []plan.External{{Name: "internet", ID: 0xe00001, Prefixes: prefixes("0.0.0.0/0", "::/0")}}
	return p
}

const (
	nodeV4 = "192.0.2.1"
	nodeV6 = "fd00:a::1"
)

// hostNode is a node with an uplink that has an address of each family, and an IPv4 default route.
func hostNode(t *testing.T) (*Handle, *conn, netlink.Link) {
	t.Helper()
	h, c, u0, _ := underlay(t)
	addAddress(t, c, u0, nodeV4+"/24")
	addRoute(t, c, "0.0.0.0/0", "192.0.2.254", u0)
	return h, c, u0
}

func sysctlIs(t *testing.T, c *conn, want map[string]int32) {
	t.Helper()
	for path, value := range want {
		have, ok, err := c.readSysctl(path)
		if err != nil || !ok || have != value {
			t.Errorf("%s is %d (%v, %v), want %d", path, have, ok, err, value)
		}
	}
}

// The pair comes with the first network that hosts may talk with, or the first outside, and goes with the last.
func TestHostPairLivesWithWhatNeedsIt(t *testing.T) {
	for name, needing := range map[string]*plan.Plan{"host routes": withHost(testPlan()), "external network": withExternal(testPlan())} {
		t.Run(name, func(t *testing.T) {
			h, c, _ := hostNode(t)
			o := Options{MTU: uplinkMTU}
			steps := []struct {
				name  string
				do    func() error
				there bool
			}{
				{"plan without it", func() error { return errorOf(h.Apply(testPlan(), o)) }, false},
				{"prepared", func() error { return errorOf(h.Prepare(needing, o)) }, true},
				{"applied", func() error { return errorOf(h.Apply(needing, o)) }, true},
				{"kept", func() error { return errorOf(h.Prepare(testPlan(), o)) }, true},
				{"dropped", func() error { return errorOf(h.Apply(testPlan(), o)) }, false},
				{"applied again", func() error { return errorOf(h.Apply(needing, o)) }, true},
				{"uninstalled", h.Remove, false},
			}
			for _, s := range steps {
				must(t, s.do())
				if !s.there {
					wantNoHostPair(t, h, c)
					continue
				}
				wantHostPair(t, h, c)
				changes, err := h.Prepare(needing, o)
				noChanges(t, changes, err)
			}
		})
	}
}

func wantNoHostPair(t *testing.T, h *Handle, c *conn) {
	t.Helper()
	s := outlook(t, h, testPlan()).HostSide()
	if s.Stack != 0 || s.Peer != 0 || s.MAC != (plan.MAC{}) || s.Loopback != 1 {
		t.Errorf("HostSide() = %+v", s)
	}
	noLink(t, c, plan.HostSide)
	noLink(t, c, plan.HostPeer)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		ours, err := c.ownRoutes(family, anyDevice)
		must(t, err)
		for _, r := range ours {
			if r.Type == unix.RTN_UNICAST {
				t.Errorf("route %v is left", r)
			}
		}
	}
}

func wantHostPair(t *testing.T, h *Handle, c *conn) {
	t.Helper()
	s := outlook(t, h, testPlan()).HostSide()
	if want := netip.MustParseAddr(nodeV4); s.V4 != want || s.V6 != netip.MustParseAddr(nodeV6) || s.Loopback != 1 {
		t.Errorf("HostSide() = %+v", s)
	}
	for name, index := range map[string]int{plan.HostSide: s.Stack, plan.HostPeer: s.Peer} {
		l := mustLink(t, c, name)
		a := l.Attrs()
		if a.Index != index || a.Alias != "lace host" || a.MTU != podMTU || a.Flags&net.FlagUp == 0 || a.RawFlags&unix.IFF_NOARP == 0 || a.MasterIndex != 0 {
			t.Errorf("%s is %+v", name, a)
		}
		if addresses := interfaceAddresses(t, c, name, netlink.FAMILY_ALL); len(addresses) > 0 {
			t.Errorf("%s has addresses %v", name, addresses)
		}
		d, err := c.detail(index)
		must(t, err)
		if mode, _ := d.inet6.number(inet6AddrGenMode); mode != addrGenNone {
			t.Errorf("addrgenmode of %s is %d", name, mode)
		}
	}
	if mac := macOf(mustLink(t, c, plan.HostSide)); s.MAC != mac || mac != hostSideMAC {
		t.Errorf("the MAC address is %s, HostSide says %s", mac, s.MAC)
	}
	sysctlIs(t, c, map[string]int32{
		"ipv4/conf/lc-host/forwarding": 1, "ipv6/conf/lc-host/forwarding": 1, "ipv6/conf/lc-host/accept_ra": 0, "ipv6/conf/lc-host/disable_ipv6": 0,
		"ipv6/conf/lc-host-peer/disable_ipv6": 1,
	})
}

func TestHostRoutes(t *testing.T) {
	h, c, _ := hostNode(t)
	for _, other := range []string{"203.0.113.9/32", "fd40:ffff::9/128"} { // that the kernel would choose by itself
		addAddress(t, c, mustLink(t, c, "lo"), other)
	}
	p := withHost(testPlan())
	must(t, errorOf(h.Apply(p, Options{MTU: uplinkMTU})))
	wantSource(t, c, "10.40.2.3", nodeV4)
	wantSource(t, c, "fd40:0:2::3", nodeV6)
	p.HostRoutes = p.HostRoutes[1:]
	must(t, errorOf(h.Apply(p, Options{MTU: uplinkMTU})))
	if rs, err := c.RouteGet(netip.MustParseAddr("10.40.2.3").AsSlice()); err == nil && rs[0].LinkIndex == mustLink(t, c, plan.HostSide).Attrs().Index {
		t.Errorf("the route that the plan dropped is there: %v", rs)
	}
	wantSource(t, c, "fd40:0:2::3", nodeV6)
}

// wantSource asks the kernel as whom, and by lc-host, the host talks with an address.
func wantSource(t *testing.T, c *conn, to, source string) {
	t.Helper()
	rs, err := c.RouteGet(netip.MustParseAddr(to).AsSlice())
	must(t, err)
	if r := fromNetlink(rs[0]); r.dev != mustLink(t, c, plan.HostSide).Attrs().Index || r.src.String() != source {
		t.Errorf("the host goes to %s by interface %d as %s, want lc-host and %s", to, r.dev, r.src, source)
	}
}

// hostRoute finds our route to a subnet.
func hostRoute(t *testing.T, c *conn, dst string) (route, bool) {
	t.Helper()
	p := netip.MustParsePrefix(dst)
	family := netlink.FAMILY_V4
	if p.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	ours, err := c.ownRoutes(family, anyDevice)
	must(t, err)
	for _, n := range ours {
		if r := fromNetlink(n); r.dst == p {
			return r, true
		}
	}
	return route{}, false
}

// The host is the address that it has: when that goes, another one takes its place at the next Apply.
func TestHostRoutesFollowTheAddresses(t *testing.T) {
	h, c, u0 := hostNode(t)
	p, o := withHost(testPlan()), Options{MTU: uplinkMTU}
	must(t, errorOf(h.Apply(p, o)))
	addAddress(t, c, u0, "198.51.100.1/24")
	changes, err := h.Apply(p, o)
	noChanges(t, changes, err) // the older one is still there

	must(t, c.AddrDel(u0, address(netip.MustParsePrefix(nodeV4+"/24"))))
	must(t, c.AddrDel(u0, address(netip.MustParsePrefix(nodeV6+"/64"))))
	must(t, errorOf(h.Apply(p, o)))
	wantSource(t, c, "10.40.2.3", "198.51.100.1")
	if r, ok := hostRoute(t, c, "fd40::/32"); !ok || r.src.IsValid() {
		t.Errorf("without the underlay address the route is %v (%v)", r, ok)
	}
	changes, err = h.Apply(p, o)
	noChanges(t, changes, err)

	addAddress(t, c, u0, nodeV6+"/64")
	must(t, errorOf(h.Apply(p, o)))
	wantSource(t, c, "fd40:0:2::3", nodeV6)
	changes, err = h.Apply(p, o)
	noChanges(t, changes, err)
}

// A subnet of the overlay that the host is in itself, or has a route to, is not taken from it.
func TestHostRouteTakesNobodysPlace(t *testing.T) {
	for name, metric := range map[string]int{"same metric": 0, "a worse metric": 700} {
		t.Run(name, func(t *testing.T) {
			h, c, u0 := hostNode(t)
			theirs := &netlink.Route{Dst: ipNet(netip.MustParsePrefix("10.40.0.0/16")), LinkIndex: u0.Attrs().Index, Priority: metric, Scope: netlink.SCOPE_LINK}
			must(t, c.RouteAdd(theirs))
			_, err := h.Apply(withHost(testPlan()), Options{MTU: uplinkMTU})
			wantError(t, err, "subnet 10.40.0.0/16", "not Lace's", "ip -4 route del 10.40.0.0/16")
			if rs, err := c.RouteGet(netip.MustParseAddr("10.40.2.3").AsSlice()); err != nil || rs[0].LinkIndex != u0.Attrs().Index {
				t.Errorf("the host's way to its own subnet: %v, %v", rs, err)
			}
			wantSource(t, c, "fd40:0:2::3", nodeV6) // the others are made all the same
			must(t, h.Remove())
			if rs, err := c.RouteGet(netip.MustParseAddr("10.40.2.3").AsSlice()); err != nil || rs[0].LinkIndex != u0.Attrs().Index {
				t.Errorf("after the removal: %v, %v", rs, err)
			}
		})
	}
}

func TestNodeWithoutIPv4HasRoutesWithoutSource(t *testing.T) {
	h, c, _, _ := underlay(t)
	must(t, errorOf(h.Apply(withHost(testPlan()), Options{MTU: uplinkMTU})))
	s := outlook(t, h, testPlan()).HostSide()
	if r, ok := hostRoute(t, c, "10.40.0.0/16"); !ok || r.src.IsValid() || s.V4.IsValid() {
		t.Errorf("the route is %v (%v), HostSide() %+v", r, ok, s)
	}
}

func TestForeignHostPairIsNotTouched(t *testing.T) {
	takesLong(t)
	for _, name := range []string{plan.HostSide, plan.HostPeer} {
		t.Run(name, func(t *testing.T) {
			h, c, _ := hostNode(t)
			must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: attrs(name), PeerName: "x0"}))
			before := mustLink(t, c, name).Attrs()
			_, err := h.Apply(withHost(testPlan()), Options{MTU: uplinkMTU})
			wantError(t, err, name, "not Lace's", "ip link del "+name)
			must(t, h.Localhost(true))
			must(t, h.Localhost(false))
			if s := outlook(t, h, testPlan()).HostSide(); s.Stack != 0 || s.Peer != 0 {
				t.Errorf("HostSide() = %+v", s)
			}
			mustLink(t, c, "laceb100") // the others are made all the same
			must(t, h.Remove())
			after := mustLink(t, c, name).Attrs()
			if after.Index != before.Index || after.Alias != "" || after.Flags != before.Flags || after.HardwareAddr.String() != before.HardwareAddr.String() {
				t.Errorf("the foreign %s became %+v", name, after)
			}
		})
	}
}

// What a crash left half made, or somebody took apart, is made anew.
func TestHostPairIsMadeAnew(t *testing.T) {
	takesLong(t)
	for name, spoil := range map[string]func(*testing.T, *conn){
		"no alias": func(t *testing.T, c *conn) {
			at := attrs(plan.HostSide)
			at.Group = group
			must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: at, PeerName: plan.HostPeer}))
		},
		"side renamed": func(t *testing.T, c *conn) {
			must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: attrs("x0"), PeerName: plan.HostPeer}))
			must(t, c.LinkSetAlias(mustLink(t, c, plan.HostPeer), hostAlias))
		},
		"peer renamed": func(t *testing.T, c *conn) {
			must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: attrs(plan.HostSide), PeerName: "x0"}))
			must(t, c.LinkSetAlias(mustLink(t, c, plan.HostSide), hostAlias))
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, c, _ := hostNode(t)
			spoil(t, c)
			must(t, errorOf(h.Apply(withHost(testPlan()), Options{MTU: uplinkMTU})))
			wantHostPair(t, h, c)
			changes, err := h.Apply(withHost(testPlan()), Options{MTU: uplinkMTU})
			noChanges(t, changes, err)
		})
	}
}

func TestHostPairIsKeptAsItShouldBe(t *testing.T) {
	h, c, _ := hostNode(t)
	p := withHost(testPlan())
	must(t, errorOf(h.Apply(p, Options{MTU: uplinkMTU})))
	side, peer := mustLink(t, c, plan.HostSide), mustLink(t, c, plan.HostPeer)
	must(t, c.LinkSetARPOn(side))
	must(t, c.LinkSetMTU(peer, 1400))
	must(t, c.LinkSetHardwareAddr(side, net.HardwareAddr{2, 0, 0, 0, 0, 1}))
	must(t, c.sysctl("ipv4/conf/lc-host/forwarding", "0"))
	must(t, c.sysctl("ipv6/conf/lc-host/forwarding", "0"))
	must(t, c.LinkSetDown(side))
	must(t, errorOf(h.Apply(p, Options{MTU: uplinkMTU})))
	wantHostPair(t, h, c)
	wantSource(t, c, "10.40.2.3", nodeV4)
	wantSource(t, c, "fd40:0:2::3", nodeV6)
	must(t, errorOf(h.Apply(p, Options{MTU: 9000})))
	if mtu := mustLink(t, c, plan.HostSide).Attrs().MTU; mtu != 9000-40 {
		t.Errorf("the MTU is %d at an uplink's 9000", mtu)
	}
	changes, err := h.Apply(p, Options{MTU: 9000})
	noChanges(t, changes, err)
}

// A host that has IPv6 switched off for new interfaces gets it for this one.
func TestHostPairHasIPv6OfItsOwn(t *testing.T) {
	h, c, _ := hostNode(t)
	must(t, c.sysctl("ipv6/conf/default/disable_ipv6", "1"))
	must(t, errorOf(h.Apply(withHost(testPlan()), Options{MTU: uplinkMTU})))
	wantHostPair(t, h, c)
	wantSource(t, c, "fd40:0:2::3", nodeV6)
}

// Where packets are too small for IPv6, the kernel takes it from the pair; IPv4 goes on.
func TestHostPairWithoutIPv6(t *testing.T) {
	h, c, _ := hostNode(t)
	p, small := withHost(testPlan()), Options{MTU: 1300}
	p.HostRoutes = p.HostRoutes[:1]
	for range 2 {
		must(t, errorOf(h.Apply(p, small)))
		wantSource(t, c, "10.40.2.3", nodeV4)
		changes, err := h.Apply(p, small)
		noChanges(t, changes, err)
		must(t, h.Remove())
	}
	must(t, errorOf(h.Apply(p, small)))
	must(t, errorOf(h.Apply(withHost(testPlan()), Options{MTU: uplinkMTU})))
	sysctlIs(t, c, map[string]int32{"ipv6/conf/lc-host/forwarding": 1})
	wantSource(t, c, "fd40:0:2::3", nodeV6)
}
