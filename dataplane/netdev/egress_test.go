// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// addRule looks packets that come in by an interface, "" for all, up in table 700.
func addRule(t *testing.T, c *conn, family, priority int, iif string) {
	t.Helper()
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.IifName = family, priority, 700, iif
	must(t, c.RuleAdd(r))
}

// routeIn adds a route of any table.
func routeIn(t *testing.T, c *conn, r route) {
	t.Helper()
	n := r.netlink()
	n.Protocol, n.Flags = unix.RTPROT_STATIC, 0
	must(t, c.RouteAdd(n))
}

func defaultBy(l netlink.Link, gw, src string) route {
	r := route{table: unix.RT_TABLE_MAIN, kind: unix.RTN_UNICAST, dev: l.Attrs().Index, gw: netip.MustParseAddr(gw)}
	r.dst = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if r.gw.Is6() {
		r.dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	if src != "" {
		r.src = netip.MustParseAddr(src)
	}
	return r
}

func outlook(t *testing.T, h *Handle, p *plan.Plan) *Outlook {
	t.Helper()
	o, err := h.Outlook(p)
	must(t, err)
	return o
}

// wantEgresses compares interfaces by name with the addresses that they masquerade as; "" is none.
func wantEgresses(t *testing.T, h *Handle, want map[string][2]string) {
	t.Helper()
	all := outlook(t, h, withExternal(testPlan())).Egresses()
	have, last := map[string][2]string{}, 0
	for _, e := range all {
		text := func(a netip.Addr) string {
			if !a.IsValid() {
				return ""
			}
			return a.String()
		}
		have[e.Name] = [2]string{text(e.V4), text(e.V6)}
		if e.Index <= last || e.Raw {
			t.Errorf("after interface %d comes %+v", last, e)
		}
		last = e.Index
	}
	if diff := cmp.Diff(want, have, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("egresses: %s", diff)
	}
}

// second gives the node another interface, without addresses.
func second(t *testing.T, c *conn, name string) netlink.Link {
	t.Helper()
	l, _ := veth(t, c, name, dialTest(t, newNetns(t)), "far")
	return l
}

func TestEgresses(t *testing.T) {
	h, c, u0 := hostNode(t)
	if e := outlook(t, h, testPlan()).Egresses(); len(e) > 0 {
		t.Errorf("without external networks: %v", e)
	}
	must(t, errorOf(h.Apply(withHost(withExternal(testPlan())), Options{MTU: uplinkMTU})))
	u1, idle := second(t, c, "u1"), second(t, c, "idle")
	wantEgresses(t, h, map[string][2]string{"u0": {nodeV4, nodeV6}})

	policy := defaultBy(u1, "198.51.100.254", "")
	policy.dst, policy.gw, policy.scope, policy.table = netip.MustParsePrefix("203.0.113.0/24"), netip.Addr{}, netlink.SCOPE_LINK, 700
	routeIn(t, c, policy)
	wantEgresses(t, h, map[string][2]string{"u0": {nodeV4, nodeV6}, "u1": {nodeV4, nodeV6}}) // the node's own: it has none

	addAddress(t, c, u1, "198.51.100.1/24")
	addAddress(t, c, u1, "2001:db8:1::1/64")
	addAddress(t, c, idle, "169.254.1.1/32")
	until(t, "the address is there", func() bool { return local(c, "2001:db8:1::1") })
	both := map[string][2]string{"u0": {nodeV4, nodeV6}, "u1": {"198.51.100.1", "2001:db8:1::1"}}
	wantEgresses(t, h, both)

	must(t, c.RouteAdd(&netlink.Route{Dst: ipNet(netip.MustParsePrefix("203.0.114.0/24")), MultiPath: []*netlink.NexthopInfo{
		{LinkIndex: u0.Attrs().Index, Gw: netip.MustParseAddr("192.0.2.254").AsSlice()},
		{LinkIndex: u1.Attrs().Index, Gw: netip.MustParseAddr("198.51.100.254").AsSlice()},
	}}))
	addRoute(t, c, "203.0.115.0/24", "", mustLink(t, c, plan.HostSide)) // somebody else's
	wantEgresses(t, h, both)
	must(t, c.LinkSetDown(u1)) // the route with two paths stays
	wantEgresses(t, h, map[string][2]string{"u0": {nodeV4, nodeV6}})
	must(t, c.LinkDel(u0))
	wantEgresses(t, h, nil)
}

// Packets leave as the host's own would.
func TestEgressSource(t *testing.T) {
	takesLong(t)
	for name, tt := range map[string]struct {
		addresses []string
		routes    [][2]string // gateway, source
		v4, v6    string
	}{
		"the oldest":              {addresses: []string{"192.0.2.1/24", "192.0.2.9/24", "198.51.100.1/24", "2001:db8::1/64", "2001:db8::9/64"}, v4: "192.0.2.1", v6: "2001:db8::1"},
		"the gateway's subnet":    {addresses: []string{"192.0.2.1/24", "198.51.100.1/24"}, routes: [][2]string{{"198.51.100.254", ""}}, v4: "198.51.100.1"},
		"the route's choice":      {addresses: []string{"192.0.2.1/24", "192.0.2.9/24", "2001:db8::1/64", "2001:db8:1::1/64"}, routes: [][2]string{{"192.0.2.254", "192.0.2.9"}, {"2001:db8:1::ff", "2001:db8::1"}}, v4: "192.0.2.9", v6: "2001:db8::1"},
		"not a unique local one":  {addresses: []string{"fd00:b::1/64", "2001:db8::1/64"}, v6: "2001:db8::1"},
		"a unique local one":      {addresses: []string{"fd00:b::1/64"}, v6: "fd00:b::1"},
		"not a link's own":        {addresses: []string{"169.254.3.3/16", "192.0.2.1/24"}, v4: "192.0.2.1"},
		"nothing but a link's":    {addresses: []string{"169.254.3.3/16"}},
		"of a point to point one": {addresses: []string{"192.0.2.1/32"}, v4: "192.0.2.1"},
	} {
		t.Run(name, func(t *testing.T) {
			h, c := host(t)
			u0 := second(t, c, "u0")
			for _, a := range tt.addresses {
				addAddress(t, c, u0, a)
			}
			routeIn(t, c, route{dst: netip.MustParsePrefix("203.0.113.0/24"), table: 700, kind: unix.RTN_UNICAST, dev: u0.Attrs().Index, scope: netlink.SCOPE_LINK})
			for _, r := range tt.routes {
				routeIn(t, c, defaultBy(u0, r[0], r[1]))
			}
			wantEgresses(t, h, map[string][2]string{"u0": {tt.v4, tt.v6}})
		})
	}
}

// An address that is going, that changes every day or that is not sure yet, is no choice while there is a better one.
func TestEgressSourceIsUsable(t *testing.T) {
	h, c := host(t)
	u0 := second(t, c, "u0")
	add := func(p string, flags, preferred int) {
		t.Helper()
		a := address(netip.MustParsePrefix(p))
		a.Flags, a.PreferedLft, a.ValidLft = flags, preferred, 3600
		must(t, c.AddrAdd(u0, a))
	}
	add("2001:db8::1/64", unix.IFA_F_NODAD, 0) // deprecated
	wantEgresses(t, h, map[string][2]string{"u0": {"", "2001:db8::1"}})
	add("2001:db8::2/64", unix.IFA_F_NODAD, 3600)
	wantEgresses(t, h, map[string][2]string{"u0": {"", "2001:db8::2"}})
	must(t, c.AddrDel(u0, address(netip.MustParsePrefix("2001:db8::1/64"))))
	must(t, c.AddrDel(u0, address(netip.MustParsePrefix("2001:db8::2/64"))))
	must(t, c.sysctl("ipv6/conf/u0/accept_dad", "1"))
	must(t, c.sysctl("ipv6/conf/u0/dad_transmits", "100"))
	add("2001:db8::3/64", 0, 3600) // tentative for a hundred seconds
	routeIn(t, c, route{dst: netip.MustParsePrefix("2001:db8:9::/48"), table: unix.RT_TABLE_MAIN, kind: unix.RTN_UNICAST, dev: u0.Attrs().Index, metric: defaultMetric6})
	wantEgresses(t, h, map[string][2]string{"u0": {"", ""}})
	wantAddresses(t, h, nil)
}

// An interface of a VRF of the host's has the VRF's addresses, and they are not the node's.
func TestEgressInAVRFOfTheHost(t *testing.T) {
	h, c, _ := hostNode(t)
	skipWithoutVRF(t, h)
	must(t, c.LinkAdd(&netlink.Vrf{LinkAttrs: attrs("blue"), Table: 700}))
	blue := mustLink(t, c, "blue")
	must(t, c.LinkSetUp(blue))
	u1 := second(t, c, "u1")
	must(t, c.LinkSetMaster(u1, blue))
	addAddress(t, c, blue, "198.51.100.7/32")
	routeIn(t, c, route{dst: netip.MustParsePrefix("203.0.113.0/24"), table: 700, kind: unix.RTN_UNICAST, dev: u1.Attrs().Index, scope: netlink.SCOPE_LINK})
	wantEgresses(t, h, map[string][2]string{"u0": {nodeV4, nodeV6}, "u1": {"198.51.100.7", nodeV6}})
	must(t, errorOf(h.Apply(withHost(testPlan()), Options{VRF: true, MTU: uplinkMTU})))
	wantSource(t, c, "10.40.2.3", nodeV4)
}

func TestAddresses(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, c, u0 := hostNode(t)
		lo := mustLink(t, c, "lo")
		addAddress(t, c, lo, "198.51.100.1/32")
		addAddress(t, c, lo, "127.0.1.1/32")
		addAddress(t, c, u0, "169.254.1.1/32")
		addAddress(t, c, u0, "198.51.100.1/24") // the same on two interfaces
		must(t, errorOf(h.Apply(withHost(testPlan()), Options{VRF: vrf, MTU: uplinkMTU})))
		addAddress(t, c, mustLink(t, c, plan.HostPeer), "198.51.100.99/32")
		wantAddresses(t, h, map[string]int{nodeV4: u0.Attrs().Index, nodeV6: u0.Attrs().Index, "198.51.100.1": 1})
	})
}

func wantAddresses(t *testing.T, h *Handle, want map[string]int) {
	t.Helper()
	have := outlook(t, h, testPlan()).Addresses()
	text := map[string]int{}
	for a, index := range have {
		text[a.String()] = index
	}
	if diff := cmp.Diff(want, text, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("addresses: %s", diff)
	}
}

// The node's own IPv4 address: the default route's, an uplink's, any.
func TestNodeAddress(t *testing.T) {
	takesLong(t)
	h, c := host(t)
	u0, u1 := second(t, c, "u0"), second(t, c, "u1")
	p := testPlan()
	p.Uplinks = []string{"u1"}
	want := func(v4 string) {
		t.Helper()
		s := outlook(t, h, p).HostSide()
		if s.V4 != parseOrNone(v4) || s.V6 != p.Underlay || s.Loopback != 1 {
			t.Errorf("HostSide() = %+v, want %s", s, v4)
		}
	}
	want("")
	lo := mustLink(t, c, "lo")
	addAddress(t, c, lo, "203.0.113.1/32")
	want("203.0.113.1")
	addAddress(t, c, u0, "192.0.2.1/24")
	want("203.0.113.1")
	addAddress(t, c, u1, "198.51.100.1/24")
	want("198.51.100.1")
	routeIn(t, c, defaultBy(u0, "192.0.2.254", ""))
	want("192.0.2.1")
	must(t, c.RouteReplace(defaultBy(u0, "192.0.2.254", "203.0.113.1").netlink()))
	want("198.51.100.1") // one with our protocol is none of theirs
	must(t, c.RouteDel(defaultBy(u0, "192.0.2.254", "203.0.113.1").netlink()))
	routeIn(t, c, defaultBy(u0, "192.0.2.254", "203.0.113.1"))
	want("203.0.113.1")
}

func parseOrNone(s string) (a netip.Addr) {
	if s != "" {
		a = netip.MustParseAddr(s)
	}
	return a
}
