// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// segmentMTU is what an L2 network leaves of uplinkMTU.
const segmentMTU = 1442

// segmentPlan is testPlan with an L2 network beside its routed one.
func segmentPlan() *plan.Plan {
	p := testPlan()
	p.Networks = append(p.Networks, plan.Network{
		Name: "storage", ID: 200, Type: topology.L2, VRF: "lacev200", Table: 0x4c0000c8, Bridge: "laceb200", Overhead: 58,
	})
	return p
}

// segmentPort is the second interface of testPort's container, in the L2 network. Its MAC address follows from 10.50.0.17.
func segmentPort(netnsPath string) PortSpec {
	a := sampleAttachment
	a.Network, a.NetworkID, a.IfName, a.Gateway = "storage", 200, "eth1", false
	a.V4, a.V6 = netip.MustParseAddr("10.50.0.17"), netip.MustParseAddr("fd50::11")
	a.MAC = plan.MAC{2, 0x4c, 10, 50, 0, 17}
	return PortSpec{
		Port: plan.Port{
			Attachment: a, HostIf: a.HostIf(), Bridge: "laceb200", VRF: "lacev200", Type: topology.L2, Overhead: 58,
			Prefixes: prefixes("10.50.0.17/24", "fd50::11/64"),
		},
		Netns: netnsPath, MTU: segmentMTU,
	}
}

// withGateway makes a port of an L2 network the way out of its container.
func withGateway(s PortSpec) PortSpec {
	s.Gateway, s.Routes = true, prefixes("0.0.0.0/0", "::/0")
	s.Gateway4, s.Gateway6 = netip.MustParseAddr("10.50.0.1"), netip.MustParseAddr("fd50::1")
	return s
}

// segment is a host with segmentPlan applied, and an empty container.
func segment(t *testing.T, vrf bool) (h *Handle, c *conn, container string) {
	t.Helper()
	h, c = host(t)
	_, err := h.Apply(segmentPlan(), Options{VRF: vrf, MTU: uplinkMTU})
	must(t, err)
	return h, c, newNetns(t)
}

// wantRoute asks a namespace how it reaches an address: by which device and through which gateway, "" for none.
func wantRoute(t *testing.T, c *conn, to, dev, gw string) {
	t.Helper()
	rs, err := c.RouteGet(netip.MustParseAddr(to).AsSlice())
	if err != nil {
		t.Errorf("route to %s: %v", to, err)
		return
	}
	got := fromNetlink(rs[0])
	want, _ := netip.ParseAddr(gw)
	if got.dev != mustLink(t, c, dev).Attrs().Index || got.gw != want {
		t.Errorf("route to %s is %v, want by %s via %q", to, got, dev, gw)
	}
}

func noRouteTo(t *testing.T, c *conn, to string) {
	t.Helper()
	if rs, err := c.RouteGet(netip.MustParseAddr(to).AsSlice()); err == nil {
		t.Errorf("%s should not be reachable, it is by %v", to, rs)
	}
}

// Each network takes its own overhead off the uplink's MTU.
func TestBridgesHaveTheMTUOfTheirNetwork(t *testing.T) {
	h, c, _ := segment(t, false)
	for name, want := range map[string]int{"laceb100": podMTU, "lacer100": podMTU, "laceb200": segmentMTU, "lacer200": segmentMTU} {
		if have := mustLink(t, c, name).Attrs().MTU; have != want {
			t.Errorf("MTU of %s is %d, want %d", name, have, want)
		}
	}
	changes, err := h.Apply(segmentPlan(), Options{MTU: uplinkMTU})
	noChanges(t, changes, err)
}

func TestSegmentPort(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, c, container := segment(t, vrf)
		s := withGateway(segmentPort(container))
		wire(t, h, s)
		if a := mustLink(t, c, s.HostIf).Attrs(); a.MasterIndex != mustLink(t, c, "laceb200").Attrs().Index || a.MTU != segmentMTU {
			t.Errorf("host end is %+v", a)
		}
		inside := dialTest(t, container)
		wantSegmentAddresses(t, inside)
		for to, gw := range map[string]string{
			"10.50.0.99": "", "fd50::99": "", "10.50.0.1": "", "192.0.2.1": "10.50.0.1", "2001:db8::1": "fd50::1",
		} {
			wantRoute(t, inside, to, "eth1", gw)
		}
		l, err := h.CreatePort(s)
		noChanges(t, l.Changes, err)
		l, err = h.ConfigurePort(s)
		noChanges(t, l.Changes, err)
	})
}

// wantSegmentAddresses looks for the addresses with the length of the subnet, and the link-local one that the MAC address gives: the
// kernel takes a moment to say of that one that it need not be tried for duplicates.
func wantSegmentAddresses(t *testing.T, inside *conn) {
	t.Helper()
	var all []netlink.Addr
	until(t, "no address waits for the detection of duplicates", func() bool {
		all = interfaceAddresses(t, inside, "eth1", netlink.FAMILY_ALL)
		return !slices.ContainsFunc(all, func(a netlink.Addr) bool { return a.Flags&unix.IFA_F_TENTATIVE != 0 })
	})
	d, err := inside.detail(mustLink(t, inside, "eth1").Attrs().Index)
	must(t, err)
	if v, ok := d.inet6Setting(confAcceptDAD); !ok || v != 0 {
		t.Errorf("accept_dad is %d", v)
	}
	var have []string
	for _, a := range all {
		p, _ := prefix(a.IPNet)
		have = append(have, p.String())
		if p.Addr().Is4() && a.Broadcast.String() != "10.50.0.255" {
			t.Errorf("broadcast address is %s", a.Broadcast)
		}
	}
	slices.Sort(have)
	if want := []string{"10.50.0.17/24", "fd50::11/64", "fe80::4c:aff:fe32:11/64"}; !slices.Equal(have, want) {
		t.Errorf("addresses in the container: %v, want %v", have, want)
	}
}

func interfaceAddresses(t *testing.T, c *conn, name string, family int) []netlink.Addr {
	t.Helper()
	all, err := list(func() ([]netlink.Addr, error) { return c.AddrList(mustLink(t, c, name), family) })
	must(t, err)
	return all
}

// A container may come with IPv6, and with link-local addresses, switched off.
func TestSegmentPortSwitchesIPv6On(t *testing.T) {
	h, _, container := segment(t, false)
	inside := dialTest(t, container)
	must(t, inside.sysctl("ipv6/conf/default/disable_ipv6", "1"))
	must(t, inside.sysctl("ipv6/conf/default/addr_gen_mode", "1"))
	wire(t, h, segmentPort(container))
	wantSegmentAddresses(t, inside)
}

// An interface that was given no link-local address while it was up gets one all the same.
func TestSegmentPortGetsItsLinkLocalAddressBack(t *testing.T) {
	h, _, container := segment(t, false)
	s := segmentPort(container)
	wire(t, h, s)
	inside := dialTest(t, container)
	must(t, inside.sysctl("ipv6/conf/eth1/addr_gen_mode", "1"))
	must(t, inside.AddrDel(mustLink(t, inside, "eth1"), address(netip.MustParsePrefix("fe80::4c:aff:fe32:11/64"))))
	_, err := h.ConfigurePort(s)
	must(t, err)
	wantSegmentAddresses(t, inside)
}

func TestSegmentPortWithoutIPv6(t *testing.T) {
	h, _, container := segment(t, false)
	s := segmentPort(container)
	s.V6, s.Prefixes = netip.Addr{}, s.Prefixes[:1]
	wire(t, h, s)
	inside := dialTest(t, container)
	if all := interfaceAddresses(t, inside, "eth1", netlink.FAMILY_V6); len(all) > 0 {
		t.Errorf("IPv6 addresses: %v", all)
	}
}

// Without a gateway there is a way to the segment, and none out of it.
func TestSegmentPortWithoutGateway(t *testing.T) {
	h, _, container := segment(t, false)
	wire(t, h, segmentPort(container))
	inside := dialTest(t, container)
	wantRoute(t, inside, "10.50.0.99", "eth1", "")
	noRouteTo(t, inside, "192.0.2.1")
	noRouteTo(t, inside, "2001:db8::1")
}

// The subnet of a network can be widened while containers run.
func TestSegmentPortFollowsTheSubnet(t *testing.T) {
	h, _, container := segment(t, false)
	s := withGateway(segmentPort(container))
	wire(t, h, s)
	s.Prefixes = prefixes("10.50.0.17/23", "fd50::11/56")
	_, err := h.ConfigurePort(s)
	must(t, err)
	inside := dialTest(t, container)
	wantRoute(t, inside, "10.50.1.99", "eth1", "")
	wantRoute(t, inside, "fd50:0:0:1::1", "eth1", "")
	wantRoute(t, inside, "192.0.2.1", "eth1", "10.50.0.1")
	l, err := h.ConfigurePort(s)
	noChanges(t, l.Changes, err)
}

// Two interfaces of one container are configured again and again, in any order, and leave each other's routes alone.
func TestTwoNetworksInOneContainer(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, _, container := segment(t, vrf)
		routed, flat := testPort(container), segmentPort(container)
		wire(t, h, routed)
		wire(t, h, flat)
		inside := dialTest(t, container)
		for range 2 {
			wantRoute(t, inside, "192.0.2.1", "eth0", "10.40.1.1")
			wantRoute(t, inside, "2001:db8::1", "eth0", "fd40:0:1::1")
			wantRoute(t, inside, "10.50.0.99", "eth1", "")
			wantRoute(t, inside, "fd50::99", "eth1", "")
			for _, s := range []PortSpec{flat, routed} {
				l, err := h.ConfigurePort(s)
				noChanges(t, l.Changes, err)
			}
		}
		ports, err := h.Ports()
		must(t, err)
		gateways := map[string]bool{}
		for _, p := range ports {
			gateways[p.Attachment.IfName] = p.Attachment.Gateway
		}
		if len(ports) != 2 || !gateways["eth0"] || gateways["eth1"] {
			t.Errorf("ports are %+v", ports)
		}
		must(t, h.DeletePort(flat.HostIf))
		wantRoute(t, inside, "192.0.2.1", "eth0", "10.40.1.1")
	})
}

// A routed network that is not the way out leads to its own subnets only.
func TestRoutedNetworkBesideTheWayOut(t *testing.T) {
	h, _, container := segment(t, false)
	flat, routed := withGateway(segmentPort(container)), testPort(container)
	routed.Gateway, routed.Routes = false, prefixes("10.40.0.0/16", "fd40::/48")
	wire(t, h, routed)
	wire(t, h, flat)
	inside := dialTest(t, container)
	wantRoute(t, inside, "10.40.9.9", "eth0", "10.40.1.1")
	wantRoute(t, inside, "fd40::9:9", "eth0", "fd40:0:1::1")
	wantRoute(t, inside, "192.0.2.1", "eth1", "10.50.0.1")
	l, err := h.ConfigurePort(routed)
	noChanges(t, l.Changes, err)
}

// The way out moves to another interface when the plan says so.
func TestTheWayOutMoves(t *testing.T) {
	h, _, container := segment(t, false)
	routed, flat := testPort(container), segmentPort(container)
	wire(t, h, routed)
	wire(t, h, flat)
	routed.Gateway, routed.Routes = false, prefixes("10.40.0.0/16", "fd40::/48")
	flat = withGateway(flat)
	wire(t, h, routed)
	wire(t, h, flat)
	inside := dialTest(t, container)
	wantRoute(t, inside, "10.40.9.9", "eth0", "10.40.1.1")
	wantRoute(t, inside, "192.0.2.1", "eth1", "10.50.0.1")
	ports, err := h.Ports()
	must(t, err)
	for _, p := range ports {
		if want := p.Attachment.IfName == "eth1"; p.Attachment.Gateway != want {
			t.Errorf("the alias of %s says gateway %v", p.Attachment.IfName, p.Attachment.Gateway)
		}
	}
}

func TestTwoWaysOutAreRefused(t *testing.T) {
	h, _, container := segment(t, false)
	wire(t, h, testPort(container))
	s := withGateway(segmentPort(container))
	_, err := h.CreatePort(s)
	must(t, err)
	_, err = h.ConfigurePort(s)
	wantError(t, err, "default/4f1c", "0.0.0.0/0", "must not overlap", "default route")
	if strings.Contains(err.Error(), "not Lace's") {
		t.Errorf("the error blames others: %v", err)
	}
	wantRoute(t, dialTest(t, container), "192.0.2.1", "eth0", "10.40.1.1")
}

func TestBadGatewayOfASegment(t *testing.T) {
	h, _, container := segment(t, false)
	s := withGateway(segmentPort(container))
	s.Gateway4 = s.Gateway6
	_, err := h.CreatePort(s)
	wantError(t, err, "do not belong together")
}
