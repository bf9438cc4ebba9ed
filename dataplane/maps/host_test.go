// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
)

func TestSyncHost(t *testing.T) {
	m := newMaps(t)
	for _, h := range []Host{
		{Stack: 7, Peer: 8, Loopback: 1, MAC: plan.MAC{2, 3}, V4: netip.MustParseAddr("192.0.2.1"), V6: netip.MustParseAddr("fd00::1")},
		{Loopback: 1},
	} {
		for range 2 {
			must(t, m.SyncHost(h))
		}
		row, _, err := m.host.Get(0)
		must(t, err)
		if row.Stack != h.Stack || row.Peer != h.Peer || row.Loopback != 1 || row.Mac.U8 != h.MAC || row.V4 != be32(h.V4) || row.V6.U8 != addr(h.V6).U8 {
			t.Errorf("the host %+v is written as %+v", h, row)
		}
	}
}

// TestSyncAddresses: what is gone is told once, also to an agent that did not write it.
func TestSyncAddresses(t *testing.T) {
	m := newMaps(t)
	one, two, three := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("192.0.2.3")
	for i, step := range []struct {
		have map[netip.Addr]int
		gone []netip.Addr
	}{
		{map[netip.Addr]int{one: 2, two: 2}, nil},
		{map[netip.Addr]int{one: 3, two: 2}, nil}, // moves to another interface
		{map[netip.Addr]int{three: 3}, []netip.Addr{one, two}},
		{map[netip.Addr]int{three: 3}, nil},
		{nil, []netip.Addr{three}},
	} {
		gone, err := m.SyncAddresses(step.have)
		must(t, err)
		slices.SortFunc(step.gone, netip.Addr.Compare)
		if !slices.Equal(gone, step.gone) {
			t.Errorf("step %d: %v are gone, want %v", i, gone, step.gone)
		}
		rows, err := m.addresses.All()
		must(t, err)
		have := map[netip.Addr]int{}
		for a, index := range rows {
			have[unmapped(a.U8)] = int(index)
		}
		if !maps.Equal(have, step.have) {
			t.Errorf("step %d: the programs know %v, want %v", i, have, step.have)
		}
	}
}

func TestSyncEgresses(t *testing.T) {
	m := newMaps(t)
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::2")
	both := bpf.LaceEgress{Flags: 3, V4: be32(v4)}
	both.V6.U8 = v6.As16()
	for _, step := range []struct {
		have []Egress
		want map[uint32]bpf.LaceEgress
	}{
		{[]Egress{{Index: 2, V4: v4, V6: v6}, {Index: 3, Raw: true}}, map[uint32]bpf.LaceEgress{2: both, 3: {Flags: 4}}},
		{[]Egress{{Index: 2, V4: v4}}, map[uint32]bpf.LaceEgress{2: {Flags: 1, V4: be32(v4)}}},
		{nil, map[uint32]bpf.LaceEgress{}},
	} {
		must(t, m.SyncEgresses(step.have))
		rows, err := m.egresses.All()
		must(t, err)
		if !maps.Equal(rows, step.want) {
			t.Errorf("%+v is written as %+v, want %+v", step.have, rows, step.want)
		}
	}
}

// TestOutsideRows: what a plan says of the outside, as the programs read it.
func TestOutsideRows(t *testing.T) {
	m := newMaps(t)
	p := testPlan(0)
	p.Networks[0].Host = true
	p.Externals = []plan.External{{ID: 0xe00001, Line: 40, Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("::/0")}}}
	sid := netip.MustParseAddr("5f00:1ace:2:14:e0:100::")
	out := plan.Peering{From: 100, To: 0xe00001, Prefix: netip.MustParsePrefix("192.0.2.0/24"), Line: 50, External: true, Masquerade: true, Peer: 1}
	out.SID.Addr = sid
	p.Peerings = append(p.Peerings, out)
	m.sync(t, p) // slot 1

	network, _, err := m.Networks.Get(Scope(100, 1))
	must(t, err)
	internet, ok, err := m.Networks.Get(Scope(0xe00001, 1))
	must(t, err)
	if network.Flags != 1+8 || !ok || internet.Flags != 16 || internet.Line != 40 || internet.Traffic == 0 || internet.Traffic == network.Traffic {
		t.Errorf("the networks are %+v and %+v", network, internet)
	}
	for prefix, length := range map[string]uint32{"::ffff:192.0.2.0": 32 + 96 + 24, "::": 32} {
		k := bpf.LaceExternalKey{Prefixlen: length, Slot: inFamily(1, netip.PrefixFrom(netip.MustParseAddr(prefix).Unmap(), 0))}
		k.Addr.U8 = netip.MustParseAddr(prefix).As16()
		if row, ok, err := m.Externals.Get(k); err != nil || !ok || row.Network != 0xe00001 || row.Line != 40 {
			t.Errorf("prefix %s is %+v, %v, %v", prefix, row, ok, err)
		}
	}
	k := bpf.LacePeeringKey{Prefixlen: 32 + 128, Scope: Scope(100, 1) | 1<<familyBit}
	k.Addr.U8 = netip.MustParseAddr("::ffff:192.0.2.9").As16()
	if row, ok, err := m.Peerings.Get(k); err != nil || !ok || row.Flags != 3 || row.Peer != 1 || row.Sid.U8 != sid.As16() || row.Line != 50 {
		t.Errorf("the peering is %+v, %v, %v", row, ok, err)
	}
	for _, step := range []struct{ first, last, wantFirst, wantLast uint16 }{{0, 0, 4096, 32767}, {2000, 3000, 2000, 3000}} {
		p.Masquerade.First, p.Masquerade.Last = step.first, step.last
		g := m.sync(t, p).Generation
		config, err := m.readConfig(SlotOf(g))
		must(t, err)
		if config.Outside != 1 || config.FirstPort != step.wantFirst || config.LastPort != step.wantLast {
			t.Errorf("the configuration is %+v", config)
		}
	}
}
