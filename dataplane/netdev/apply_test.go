// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

func TestApplyTwiceChangesNothing(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, _ := host(t)
		changes, err := h.Apply(testPlan(), Options{VRF: vrf, MTU: uplinkMTU})
		must(t, err)
		if len(changes) == 0 {
			t.Fatal("the first Apply did nothing")
		}
		changes, err = h.Apply(testPlan(), Options{VRF: vrf, MTU: uplinkMTU})
		noChanges(t, changes, err)
	})
}

func TestBridge(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, c := host(t)
		_, err := h.Apply(testPlan(), Options{VRF: vrf, MTU: uplinkMTU})
		must(t, err)
		b := mustLink(t, c, "laceb100")
		a := b.Attrs()
		if a.Alias != "lace network=backend" || macOf(b) != plan.GatewayMAC || a.MTU != podMTU || a.Flags&net.FlagUp == 0 || a.Group != group {
			t.Errorf("bridge is %+v", a)
		}
		d, err := c.detail(a.Index)
		must(t, err)
		if diff := differing(d.info, bridgeSettings); len(diff) > 0 {
			t.Errorf("bridge settings differ: %v", diff)
		}
		if v, ok := d.info.number(nl.IFLA_BR_STP_STATE); !ok || v != 0 {
			t.Errorf("STP state %d, %v", v, ok)
		}
		if v, _ := d.inet6.number(inet6AddrGenMode); v != addrGenNone {
			t.Errorf("addrgenmode is %d", v)
		}
		if v, ok := d.inet6Setting(confAcceptRA); !ok || v != 0 {
			t.Errorf("accept_ra is %d", v)
		}
		wantDisabled, want := int32(1), []netip.Prefix(nil)
		if vrf {
			wantDisabled, want = 0, testPlan().Networks[0].Gateways
		}
		if v, _ := d.inet6Setting(confDisableIPv6); v != wantDisabled {
			t.Errorf("disable_ipv6 is %d, want %d", v, wantDisabled)
		}
		have, err := (&device{c, h.recorder(), b, d}).addressList()
		must(t, err)
		if diff := cmp.Diff(want, have, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
			t.Errorf("addresses: %s", diff)
		}
	})
}

func TestVRFTableEndsTheLookup(t *testing.T) {
	h, c := host(t)
	skipWithoutVRF(t, h)
	_, err := h.Apply(testPlan(), Options{VRF: true, MTU: uplinkMTU})
	must(t, err)
	v := mustLink(t, c, "lacev100").(*netlink.Vrf)
	if v.Table != 0x4c000064 || v.Attrs().Flags&net.FlagUp == 0 || v.Attrs().Alias != "lace network=backend" {
		t.Errorf("VRF is %+v", v)
	}
	if m := mustLink(t, c, "laceb100").Attrs().MasterIndex; m != v.Attrs().Index {
		t.Errorf("the bridge's master is %d, not the VRF %d", m, v.Attrs().Index)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := c.ownRoutes(family, anyDevice)
		must(t, err)
		if !slices.ContainsFunc(rs, func(r netlink.Route) bool { return r.Table == 0x4c000064 && r.Type == unix.RTN_UNREACHABLE }) {
			t.Errorf("family %d has no unreachable default in the VRF's table: %v", family, rs)
		}
	}
	for _, to := range []string{"192.0.2.1", "2001:db8::1"} {
		rs, err := c.RouteGetWithOptions(netip.MustParseAddr(to).AsSlice(), &netlink.RouteGetOptions{VrfName: "lacev100"})
		if err == nil {
			t.Errorf("%s is reachable in the VRF: %v", to, rs)
		}
	}
}

// The host's tables must not learn of the overlay's addresses where there is no VRF.
func TestWithoutVRFNothingReachesTheHostsTables(t *testing.T) {
	h, c := host(t)
	_, err := h.Apply(testPlan(), Options{MTU: uplinkMTU})
	must(t, err)
	container := newNetns(t)
	wire(t, h, testPort(container))
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := c.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		must(t, err)
		for _, r := range rs {
			if r.LinkIndex != 1 { // lo holds the own locator's unreachable route and its own
				t.Errorf("a route of the network is in the host's tables: %v", r)
			}
		}
	}
}

func TestApplyCorrectsDrift(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, c := host(t)
		_, err := h.Apply(testPlan(), Options{VRF: vrf, MTU: uplinkMTU})
		must(t, err)
		b := mustLink(t, c, "laceb100")
		must(t, c.LinkSetMTU(b, 1300))
		must(t, c.LinkSetDown(b))
		must(t, c.LinkSetHardwareAddr(b, net.HardwareAddr{2, 0, 0, 0, 0, 1}))
		addAddress(t, c, b, "192.0.2.1/24")
		must(t, c.LinkSetAlias(b, "lace network=old"))
		_, err = h.Apply(testPlan(), Options{VRF: vrf, MTU: uplinkMTU})
		must(t, err)
		a := mustLink(t, c, "laceb100").Attrs()
		if a.MTU != podMTU || a.Flags&net.FlagUp == 0 || a.HardwareAddr.String() != plan.GatewayMAC.String() || a.Alias != "lace network=backend" {
			t.Errorf("bridge is %+v", a)
		}
		changes, err := h.Apply(testPlan(), Options{VRF: vrf, MTU: uplinkMTU})
		noChanges(t, changes, err)
	})
}

func TestApplyRemovesWhatThePlanDropped(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, c := host(t)
		o := Options{VRF: vrf, MTU: uplinkMTU}
		_, err := h.Apply(testPlan(), o)
		must(t, err)
		p := testPlan()
		p.Networks = nil
		_, err = h.Apply(p, o)
		must(t, err)
		for _, name := range []string{"laceb100", "lacev100", "lacer100"} {
			noLink(t, c, name)
		}
		changes, err := h.Apply(p, o)
		noChanges(t, changes, err)
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rs, err := c.ownRoutes(family, anyDevice)
			must(t, err)
			if slices.ContainsFunc(rs, func(r netlink.Route) bool { return r.Table == 0x4c000064 }) {
				t.Errorf("routes are left in the VRF's table: %v", rs)
			}
		}
	})
}

// Many links go by one request, and what does not belong to Lace stays, whatever its group.
func TestApplyRemovesManyAtOnce(t *testing.T) {
	for name, foreign := range map[string]uint32{"alone": 0, "group taken by another's": leaving} {
		t.Run(name, func(t *testing.T) {
			h, c := host(t)
			veth(t, c, "other0", c, "other1")
			other := mustLink(t, c, "other0")
			must(t, c.LinkSetGroup(other, int(foreign)))
			p := testPlan()
			for id := range 5 {
				n := p.Networks[0]
				n.ID, n.Bridge, n.VRF, n.Gateways = 901+topology.NetworkID(id), fmt.Sprintf("laceb%d", 901+id), fmt.Sprintf("lacev%d", 901+id), nil
				n.Table += uint32(1 + id)
				p.Networks = append(p.Networks, n)
			}
			_, err := h.Apply(p, Options{MTU: uplinkMTU})
			must(t, err)
			changes, err := h.Apply(testPlan(), Options{MTU: uplinkMTU})
			must(t, err)
			removed := 0
			for _, change := range changes {
				if change.What == "remove" {
					removed++
				}
			}
			if removed != 10 {
				t.Errorf("%d links were removed, want 5 bridges and 5 headroom ports: %v", removed, changes)
			}
			noLink(t, c, "laceb903")
			mustLink(t, c, "laceb100")
			mustLink(t, c, "other0")
		})
	}
}

func TestChangeOfForm(t *testing.T) {
	h, c := host(t)
	skipWithoutVRF(t, h)
	for _, vrf := range []bool{true, false, true} {
		_, err := h.Apply(testPlan(), Options{VRF: vrf, MTU: uplinkMTU})
		must(t, err)
		if in := mustLink(t, c, "laceb100").Attrs().MasterIndex != 0; in != vrf {
			t.Errorf("bridge in a VRF: %v, want %v", in, vrf)
		}
		changes, err := h.Apply(testPlan(), Options{VRF: vrf, MTU: uplinkMTU})
		noChanges(t, changes, err)
	}
}

func TestForeignBridgeIsNotTouched(t *testing.T) {
	h, c := host(t)
	must(t, c.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("laceb100")}))
	before := mustLink(t, c, "laceb100").Attrs()
	p := testPlan()
	p.Networks = append(p.Networks, plan.Network{Name: "other", ID: 101, VRF: "lacev101", Table: 0x4c000065, Bridge: "laceb101"})
	_, err := h.Apply(p, Options{MTU: uplinkMTU})
	wantError(t, err, "laceb100", "not Lace's", "ip link del laceb100")
	var fe *ForeignError
	if !errors.As(err, &fe) {
		t.Errorf("error is %T", err)
	}
	after := mustLink(t, c, "laceb100").Attrs()
	if after.Index != before.Index || after.MTU != before.MTU || after.Alias != "" || after.Flags != before.Flags {
		t.Errorf("the foreign bridge became %+v", after)
	}
	mustLink(t, c, "laceb101") // the others are made all the same
	must(t, h.Remove())
	mustLink(t, c, "laceb100")
}

func TestHalfMadeLinkIsOurs(t *testing.T) {
	h, c := host(t)
	at := attrs("laceb100")
	at.Group = group
	must(t, c.LinkAdd(&netlink.Bridge{LinkAttrs: at}))
	at.Name = "laceb7"
	must(t, c.LinkAdd(&netlink.Bridge{LinkAttrs: at}))
	at.Name = "lace0123456789a"
	must(t, c.LinkAdd(&netlink.Veth{LinkAttrs: at, PeerName: "x0"}))
	_, err := h.Apply(testPlan(), Options{MTU: uplinkMTU})
	must(t, err)
	if alias := mustLink(t, c, "laceb100").Attrs().Alias; alias != "lace network=backend" {
		t.Errorf("alias is %q", alias)
	}
	noLink(t, c, "laceb7")
	noLink(t, c, "lace0123456789a")
}

func TestProbeVRFLeavesNothing(t *testing.T) {
	h, c := host(t)
	before, err := c.links()
	must(t, err)
	_, err = h.ProbeVRF()
	must(t, err)
	after, err := c.links()
	must(t, err)
	if len(before) != len(after) {
		t.Errorf("links before: %d, after: %d", len(before), len(after))
	}
}

// The kernel adds its rule only once in the life of a namespace: where it was removed, Apply adds one of ours.
func TestVRFRuleIsRestored(t *testing.T) {
	h, c := host(t)
	skipWithoutVRF(t, h)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := c.vrfRules(family)
		must(t, err)
		if len(rules) != 1 || rules[0].ours {
			t.Fatalf("the kernel's rules are %+v", rules)
		}
		r := nl.NewRtAttr(fraL3mdev, []byte{1})
		msg := &nl.RtMsg{RtMsg: unix.RtMsg{Family: uint8(family), Type: frActToTable}}
		_, err = c.request(unix.RTM_DELRULE, unix.NLM_F_ACK, msg, r).Execute(unix.NETLINK_ROUTE, 0)
		must(t, err)
	}
	_, err := h.Apply(testPlan(), Options{VRF: true, MTU: uplinkMTU})
	must(t, err)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := c.vrfRules(family)
		must(t, err)
		if len(rules) != 1 || !rules[0].ours {
			t.Errorf("rules are %+v", rules)
		}
	}
	must(t, h.Remove())
	rules, err := c.vrfRules(unix.AF_INET)
	if err != nil || len(rules) > 0 {
		t.Errorf("our rule is left: %+v, %v", rules, err)
	}
}

// The container's end must leave the room that the encapsulation needs: 40 bytes, 64 with a routing header.
func TestHeadroomReachesTheContainer(t *testing.T) {
	h, c, container := network(t, false)
	if l, err := c.link("lacer100"); l == nil || err != nil {
		t.Skipf("this kernel has no VXLAN (CONFIG_VXLAN): %v", err)
	}
	if mustLink(t, c, "lacer100").Attrs().RawFlags&unix.IFF_UP != 0 {
		t.Error("the headroom device is up")
	}
	wire(t, h, testPort(container))
	inside := dialTest(t, container)
	room, ok := headroom(t, inside, mustLink(t, inside, "eth0").Attrs().Index)
	if !ok {
		t.Skip("this kernel does not show a link's headroom (IFLA_HEADROOM, Linux 6.18)")
	}
	if room < 64 {
		t.Errorf("the container's end leaves %d bytes", room)
	}
}

// headroom reads IFLA_HEADROOM.
func headroom(t *testing.T, c *conn, index int) (uint64, bool) {
	t.Helper()
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	rows, err := c.request(unix.RTM_GETLINK, 0, msg).Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	must(t, err)
	at, err := parseAttributes(rows[0][unix.SizeofIfInfomsg:])
	must(t, err)
	return at.number(68)
}
