// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// underlay is a host (fd00:a::1) with one uplink u0 to a neighbour (fd00:a::2 and, as a router, fd00:a::fe).
func underlay(t *testing.T) (h *Handle, c *conn, u0 netlink.Link, far *conn) {
	t.Helper()
	h, c = host(t)
	far = dialTest(t, newNetns(t))
	u0, f0 := veth(t, c, "u0", far, "f0")
	addAddress(t, c, u0, "fd00:a::1/64")
	addAddress(t, far, f0, "fd00:a::2/64")
	addAddress(t, far, f0, "fd00:a::fe/64")
	until(t, "both ends have their addresses", func() bool { return local(c, "fd00:a::1") && local(far, "fd00:a::fe") })
	return h, c, mustLink(t, c, "u0"), far
}

// local reports an address that is in use: the kernel takes a moment after the link is up.
func local(c *conn, addr string) bool {
	rs, err := c.RouteGet(netip.MustParseAddr(addr).AsSlice())
	return err == nil && rs[0].Type == unix.RTN_LOCAL
}

func noNetworks() *plan.Plan {
	p := testPlan()
	p.Networks = nil
	return p
}

// locatorRoute finds our route to a locator in the main table.
func locatorRoute(t *testing.T, c *conn, dst string) (route, bool) {
	t.Helper()
	rs, err := c.ownRoutes(netlink.FAMILY_V6, anyDevice)
	must(t, err)
	for _, n := range rs {
		if r := fromNetlink(n); r.dst == netip.MustParsePrefix(dst) && r.table == unix.RT_TABLE_MAIN {
			return r, true
		}
	}
	return route{}, false
}

func TestLocatorRoutes(t *testing.T) {
	for name, tt := range map[string]struct {
		peer, via string
		routes    [][2]string // the host's own: destination, gateway
		want      string      // gateway of the locator route; empty: none
	}{
		"on-link":                  {peer: "fd00:a::2", want: "fd00:a::2"},
		"on-link in spite of via":  {peer: "fd00:a::2", via: "fd00:a::fe", want: "fd00:a::2"},
		"via":                      {peer: "fd00:b::2", via: "fd00:a::fe", want: "fd00:a::fe"},
		"via before the kernel's":  {peer: "fd00:b::2", via: "fd00:a::fe", routes: [][2]string{{"::/0", "fd00:a::2"}}, want: "fd00:a::fe"},
		"the kernel's":             {peer: "fd00:b::2", routes: [][2]string{{"::/0", "fd00:a::fe"}}, want: "fd00:a::fe"},
		"longest of the kernel's":  {peer: "fd00:b::2", routes: [][2]string{{"::/0", "fd00:a::fe"}, {"fd00:b::/64", "fd00:a::2"}}, want: "fd00:a::2"},
		"no route":                 {peer: "fd00:b::2"},
		"via beyond a router":      {peer: "fd00:b::2", via: "fd00:c::1", routes: [][2]string{{"::/0", "fd00:a::fe"}}},
		"own address":              {peer: "fd00:a::1"},
		"underlay in the locators": {peer: "5f00:1ace:2::1", routes: [][2]string{{"::/0", "fd00:a::fe"}}, want: "fd00:a::fe"},
		"underlay on-link in them": {peer: "5f00:1ace:2::1", routes: [][2]string{{"5f00:1ace:2::/64", ""}}, want: "5f00:1ace:2::1"},
	} {
		t.Run(name, func(t *testing.T) {
			h, c, u0, _ := underlay(t)
			for _, r := range tt.routes {
				addRoute(t, c, r[0], r[1], u0)
			}
			p := withPeer(noNetworks(), tt.peer)
			if tt.via != "" {
				p.Via = netip.MustParseAddr(tt.via)
			}
			_, err := h.Apply(p, Options{})
			must(t, err)
			r, ok := locatorRoute(t, c, "5f00:1ace:2::/48")
			if ok != (tt.want != "") || ok && (r.gw.String() != tt.want || r.dev != u0.Attrs().Index) {
				t.Errorf("route is %v (%v), want via %q", r, ok, tt.want)
			}
			changes, err := h.Apply(p, Options{})
			noChanges(t, changes, err)
			hops, err := h.Nexthops(p)
			must(t, err)
			if tt.want == "" && (hops[0].Ifindex != 0 || hops[0].Problem == "" || hops[0].Known) {
				t.Errorf("next hop is %+v, want a problem", hops[0])
			}
			if tt.want != "" && (hops[0].Gateway.String() != tt.want || hops[0].Ifindex != u0.Attrs().Index) {
				t.Errorf("next hop is %+v", hops[0])
			}
		})
	}
}

func TestOwnLocatorIsUnreachable(t *testing.T) {
	h, c, u0, _ := underlay(t)
	addRoute(t, c, "::/0", "fd00:a::fe", u0)
	_, err := h.Apply(noNetworks(), Options{})
	must(t, err)
	if r, ok := locatorRoute(t, c, "5f00:1ace:1::/48"); !ok || r.kind != unix.RTN_UNREACHABLE {
		t.Errorf("route is %v, %v", r, ok)
	}
	if rs, err := c.RouteGet(netip.MustParseAddr("5f00:1ace:1::1").AsSlice()); err == nil {
		t.Errorf("the own locator leads to %v", rs)
	}
}

func TestLocatorRouteFollowsTheUnderlay(t *testing.T) {
	h, c, u0, _ := underlay(t)
	addRoute(t, c, "::/0", "fd00:a::fe", u0)
	p := withPeer(noNetworks(), "fd00:b::2")
	_, err := h.Apply(p, Options{})
	must(t, err)
	addRoute(t, c, "fd00:b::/64", "fd00:a::2", u0)
	_, err = h.Apply(p, Options{})
	must(t, err)
	if r, ok := locatorRoute(t, c, "5f00:1ace:2::/48"); !ok || r.gw.String() != "fd00:a::2" {
		t.Errorf("route is %v, %v", r, ok)
	}
	must(t, c.LinkSetDown(u0))
	_, err = h.Apply(p, Options{})
	must(t, err)
	if r, ok := locatorRoute(t, c, "5f00:1ace:2::/48"); ok {
		t.Errorf("there is a route over an uplink that is down: %v", r)
	}
}

// A locator route that covers the peer's underlay address must not answer the question it was made from.
func TestOwnRoutesDoNotShadowTheUnderlay(t *testing.T) {
	h, c, u0, _ := underlay(t)
	addRoute(t, c, "::/0", "fd00:a::fe", u0)
	p := withPeer(noNetworks(), "5f00:1ace:2::1")
	must(t, errorOf(h.Apply(p, Options{})))
	addRoute(t, c, "5f00:1ace::/32", "fd00:a::2", u0)
	must(t, errorOf(h.Apply(p, Options{})))
	if r, ok := locatorRoute(t, c, "5f00:1ace:2::/48"); !ok || r.gw.String() != "fd00:a::2" {
		t.Errorf("route is %v, %v", r, ok)
	}
	must(t, c.LinkSetDown(u0))
	must(t, c.LinkSetUp(u0))
	until(t, "the link is up again", func() bool { return mustLink(t, c, "u0").Attrs().OperState == netlink.OperUp })
	must(t, errorOf(h.Apply(p, Options{})))
	if r, ok := locatorRoute(t, c, "5f00:1ace:2::/48"); ok {
		t.Errorf("the uplink's routes are gone, this one is not: %v", r)
	}
}

func TestForeignLocatorRouteIsNotTouched(t *testing.T) {
	h, c, u0, _ := underlay(t)
	addRoute(t, c, "5f00:1ace:2::/48", "fd00:a::fe", u0)
	p := withPeer(withPeer(noNetworks(), "fd00:a::2"), "fd00:a::fe")
	_, err := h.Apply(p, Options{})
	wantError(t, err, "5f00:1ace:2::/48", "not Lace's", "ip -6 route del")
	if r, ok := locatorRoute(t, c, "5f00:1ace:2::/48"); ok {
		t.Errorf("a second route was added: %v", r)
	}
	if _, ok := locatorRoute(t, c, "5f00:1ace:3::/48"); !ok {
		t.Error("the other peer has no route")
	}
	rs, err := c.RouteGet(netip.MustParseAddr("5f00:1ace:2::1").AsSlice())
	must(t, err)
	if gw := fromNetlink(rs[0]).gw.String(); gw != "fd00:a::fe" {
		t.Errorf("the foreign route became one via %s", gw)
	}
}

func TestRoutesOfFormerPeersGo(t *testing.T) {
	h, c, _, _ := underlay(t)
	_, err := h.Apply(withPeer(noNetworks(), "fd00:a::2"), Options{})
	must(t, err)
	_, err = h.Apply(noNetworks(), Options{})
	must(t, err)
	if r, ok := locatorRoute(t, c, "5f00:1ace:2::/48"); ok {
		t.Errorf("route is left: %v", r)
	}
}

func TestMultipathRouteTakesAPathThatWorks(t *testing.T) {
	h, c, u0, far := underlay(t)
	u1, f1 := veth(t, c, "u1", far, "f1")
	addAddress(t, c, u1, "fd00:c::1/64")
	until(t, "u1 has its address", func() bool { return local(c, "fd00:c::1") })
	must(t, c.RouteAdd(&netlink.Route{Dst: ipNet(netip.MustParsePrefix("fd00:b::/64")), MultiPath: []*netlink.NexthopInfo{
		{LinkIndex: u1.Attrs().Index, Gw: netip.MustParseAddr("fd00:c::fe").AsSlice()},
		{LinkIndex: u0.Attrs().Index, Gw: netip.MustParseAddr("fd00:a::fe").AsSlice()},
	}}))
	p := withPeer(noNetworks(), "fd00:b::2")
	gateway := func() string { return nexthops(t, h, p)[0].Gateway.String() }
	other, down := map[string]string{"fd00:a::fe": "fd00:c::fe", "fd00:c::fe": "fd00:a::fe"}, map[string]netlink.Link{"fd00:a::fe": mustLink(t, far, "f0"), "fd00:c::fe": f1}
	first := gateway() // whichever the kernel's hash chose
	must(t, far.LinkSetDown(down[first]))
	until(t, "the next hop moves to the path with a carrier", func() bool { return gateway() == other[first] })
	must(t, far.LinkSetUp(down[first]))
	must(t, far.LinkSetDown(down[other[first]]))
	until(t, "and back", func() bool { return gateway() == first })
}

// rawDevice makes an interface without Ethernet headers, as WireGuard's are, and sets it up.
func rawDevice(t *testing.T, c *conn) netlink.Link {
	t.Helper()
	err := c.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs("wg0")})
	if unsupported(err) {
		err = inNetns(c.ns, func() error {
			return netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs("wg0"), Mode: netlink.TUNTAP_MODE_TUN})
		})
	}
	if err != nil {
		t.Skipf("this kernel has neither WireGuard nor tun (%v): run this test binary in a VM with scripts/run-in-vm", err)
	}
	l := mustLink(t, c, "wg0")
	must(t, c.LinkSetUp(l))
	return l
}

func TestRawUplink(t *testing.T) {
	h, c := host(t)
	wg := rawDevice(t, c)
	addAddress(t, c, wg, "fd00:a::1/64")
	p := withPeer(noNetworks(), "fd00:a::2")
	_, err := h.Apply(p, Options{})
	must(t, err)
	r, ok := locatorRoute(t, c, "5f00:1ace:2::/48")
	if !ok || r.gw.IsValid() || r.dev != wg.Attrs().Index {
		t.Errorf("route is %v, %v", r, ok)
	}
	changes, err := h.Apply(p, Options{})
	noChanges(t, changes, err)
	hops, err := h.Nexthops(p)
	must(t, err)
	want := []Nexthop{{Ifindex: wg.Attrs().Index, Raw: true, Known: true, MTU: wg.Attrs().MTU}}
	if diff := cmp.Diff(want, hops, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	ups, err := h.Uplinks(p)
	must(t, err)
	if len(ups) != 1 || !ups[0].Raw || ups[0].Name != "wg0" {
		t.Errorf("uplinks are %+v", ups)
	}
}

func TestUplinks(t *testing.T) {
	names := func(ups []Uplink) (all []string) {
		for _, u := range ups {
			all = append(all, u.Name)
		}
		return all
	}
	h, c, u0, far := underlay(t)
	u1, _ := veth(t, c, "u1", far, "f1")
	u2, _ := veth(t, c, "u2", far, "f2")
	addAddress(t, c, u1, "192.0.2.1/24")
	addAddress(t, c, u2, "fd00:c::1/64")
	check := func(what string, p *plan.Plan, want ...string) []Uplink {
		t.Helper()
		ups, err := h.Uplinks(p)
		must(t, err)
		if !slices.Equal(names(ups), want) {
			t.Errorf("%s: uplinks are %+v, want %v", what, ups, want)
		}
		return ups
	}
	p := noNetworks()
	ups := check("the underlay address", p, "u0")
	if u := ups[0]; u.Index != u0.Attrs().Index || u.MAC != macOf(u0) || u.MTU != 1500 || u.Raw || u.Missing {
		t.Errorf("uplink is %+v", u)
	}
	addRoute(t, c, "0.0.0.0/0", "192.0.2.254", u1)
	check("an IPv4 default route", p, "u1")
	addRoute(t, c, "::/0", "fd00:c::fe", u2)
	check("default routes", p, "u1", "u2")
	p.Uplinks = []string{"u2", "eth9", "u0"}
	if ups := check("named", p, "u2", "eth9", "u0"); !ups[1].Missing || ups[0].Missing {
		t.Errorf("uplinks are %+v", ups)
	}
	p.Uplinks, p.Underlay = nil, netip.MustParseAddr("fd00:f::1")
	must(t, c.LinkDel(u1))
	must(t, c.LinkDel(u2))
	check("nothing", p)
}

func TestRemoveLeavesTheHostAsItWas(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, c, u0, _ := underlay(t)
		addRoute(t, c, "::/0", "fd00:a::fe", u0)
		_, err := h.ProbeVRF() // its rule 1000 stays, as Remove says
		must(t, err)
		before := snapshot(t, c)
		p := withPeer(testPlan(), "fd00:a::2")
		_, err = h.Apply(p, Options{VRF: vrf, MTU: uplinkMTU})
		must(t, err)
		_, err = h.Nexthops(p)
		must(t, err)
		wire(t, h, testPort(newNetns(t)))
		if cmp.Equal(before, snapshot(t, c)) {
			t.Fatal("the snapshot does not see what Lace does")
		}
		must(t, h.Remove())
		if diff := cmp.Diff(before, snapshot(t, c)); diff != "" {
			t.Error(diff)
		}
		must(t, h.Remove())
	})
}

// snapshot is what a host's networking is: interfaces, routes in all tables, rules, kept neighbours.
func snapshot(t *testing.T, c *conn) []string {
	t.Helper()
	var all []string
	links, err := c.links()
	must(t, err)
	for name, l := range links {
		all = append(all, l.Type()+" "+name+" "+l.Attrs().Alias)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := list(func() ([]netlink.Route, error) {
			return c.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		must(t, err)
		for _, r := range rs {
			all = append(all, r.String())
		}
		rules, err := list(func() ([]netlink.Rule, error) { return c.RuleList(family) })
		must(t, err)
		for _, r := range rules {
			all = append(all, r.String())
		}
	}
	table, err := c.neighbours()
	must(t, err)
	for k, n := range table {
		if n.ours {
			all = append(all, "kept "+k.addr.String())
		}
	}
	slices.Sort(all)
	return all
}
