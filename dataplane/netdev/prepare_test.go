// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane/plan"
)

// TestPrepareKeeps: what packets go by stays until Apply: the bridge of a network that leaves, its gateways and routes.
func TestPrepareKeeps(t *testing.T) {
	forms(t, func(t *testing.T, vrf bool) {
		h, c := host(t)
		o := Options{VRF: vrf, MTU: uplinkMTU}
		before := testPlan()
		before.Networks = append(before.Networks, plan.Network{Name: "gone", ID: 200, VRF: "lacev200", Table: 0x4c0000c8, Bridge: "laceb200"})
		_, err := h.Apply(before, o)
		must(t, err)

		after := testPlan()
		after.Locator = locator("5f00:1ace:9::/48")
		after.Networks[0].Gateways = []netip.Prefix{netip.MustParsePrefix("10.40.9.1/24")}
		after.Networks = append(after.Networks, plan.Network{Name: "new", ID: 300, VRF: "lacev300", Table: 0x4c00012c, Bridge: "laceb300"})
		_, err = h.Prepare(after, o)
		must(t, err)
		mustLink(t, c, "laceb200")
		mustLink(t, c, "laceb300")
		wantRoutes(t, c, "5f00:1ace:1::/48", "5f00:1ace:9::/48")
		if vrf {
			wantGateways(t, c, "10.40.1.1/24", "10.40.9.1/24", "fd40:0:1::1/64")
		}
		changes, err := h.Prepare(after, o)
		noChanges(t, changes, err)

		_, err = h.Apply(after, o)
		must(t, err)
		if _, err := c.LinkByName("laceb200"); err == nil {
			t.Error("Apply left the bridge of a network that is gone")
		}
		wantRoutes(t, c, "5f00:1ace:9::/48")
		if vrf {
			wantGateways(t, c, "10.40.9.1/24")
		}
		changes, err = h.Apply(after, o)
		noChanges(t, changes, err)
	})
}

// wantRoutes compares the destinations of our routes in the main table.
func wantRoutes(t *testing.T, c *conn, want ...string) {
	t.Helper()
	all, err := c.mainRoutes(netlink.FAMILY_V6)
	must(t, err)
	var have []string
	for _, r := range all {
		if dst, ok := prefix(r.Dst); ok && r.Protocol == protocol {
			have = append(have, dst.String())
		}
	}
	slices.Sort(have)
	if !slices.Equal(have, want) {
		t.Errorf("routes to %v, want %v", have, want)
	}
}

func wantGateways(t *testing.T, c *conn, want ...string) {
	t.Helper()
	d, err := c.read(&recorder{}, mustLink(t, c, "laceb100"))
	must(t, err)
	all, err := d.addressList()
	must(t, err)
	var have []string
	for _, p := range all {
		have = append(have, p.String())
	}
	slices.Sort(have)
	if !slices.Equal(have, want) {
		t.Errorf("gateways %v, want %v", have, want)
	}
}

// TestPortComesBack: a port whose bridge was removed with its network joins the new one.
func TestPortComesBack(t *testing.T) {
	h, c := host(t)
	o := Options{MTU: uplinkMTU}
	p := testPlan()
	_, err := h.Apply(p, o)
	must(t, err)
	spec := testPort(newNetns(t))
	_, err = h.CreatePort(spec)
	must(t, err)
	p.Ports = []plan.Port{spec.Port}
	_, err = h.Apply(&plan.Plan{Locator: p.Locator}, o)
	must(t, err)
	if l := mustLink(t, c, spec.HostIf); l.Attrs().MasterIndex != 0 {
		t.Fatalf("the port is still in interface %d", l.Attrs().MasterIndex)
	}
	changes, err := h.Apply(p, o)
	must(t, err)
	if l := mustLink(t, c, spec.HostIf); l.Attrs().MasterIndex != mustLink(t, c, "laceb100").Attrs().Index {
		t.Errorf("the port is in interface %d after %v", l.Attrs().MasterIndex, changes)
	}
	if !slices.ContainsFunc(changes, func(c Change) bool { return strings.Contains(c.What, "isolation 1") }) {
		t.Errorf("the port is not isolated: %v", changes)
	}
	changes, err = h.Apply(p, o)
	noChanges(t, changes, err)
}
