// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// segmentPlan has two L2 networks, one of which replicates, and so many ports in each.
func segmentPlan(ports int) *plan.Plan {
	p := testPlan(0)
	p.Networks = append(p.Networks,
		plan.Network{ID: 500, Type: topology.L2, Flood: true, FloodRate: 700},
		plan.Network{ID: 600, Type: topology.L2, Base6: netip.MustParsePrefix("fd50:0:0:1::/96")})
	p.Stations = []plan.Station{{Network: 500, MAC: plan.MAC{0x52, 0x54, 0, 0, 0, 1}, Peer: 1, SID: topology.SID{Addr: netip.MustParseAddr("5f00:1ace:2:17:1:f400::")}}}
	p.Members = []plan.Member{{Network: 500, Peer: 1, SID: topology.SID{Addr: netip.MustParseAddr("5f00:1ace:2:18:1:f400::")}}, {Network: 500, Peer: 7}}
	for _, id := range []topology.NetworkID{500, 600} {
		for i := range ports {
			p.Ports = append(p.Ports, segmentPort(id, byte(i)))
		}
	}
	return p
}

func segmentPort(id topology.NetworkID, i byte) plan.Port {
	return plan.Port{HostIf: fmt.Sprintf("%d-%d", id, i), Type: topology.L2, Attachment: plan.Attachment{
		NetworkID: id, V4: netip.AddrFrom4([4]byte{10, 50, byte(id / 100), 16 + i}), MAC: plan.MAC{2, 0x4c, 10, 50, byte(id / 100), 16 + i}}}
}

// places has the interfaces at the places of a network that replicates, in order; 0: the place is empty.
func (m *Maps) placesIn(t testing.TB, id topology.NetworkID, s Slot) []uint32 {
	t.Helper()
	g, have, ok, err := m.locals(Scope(id, s))
	must(t, err)
	if !ok {
		return nil
	}
	places := make([]uint32, g.Locals)
	for k, v := range have {
		places[k.Place] = v.Ifindex
	}
	return places
}

func (m *Maps) wantPlaces(t testing.TB, when string, want ...uint32) {
	t.Helper()
	g, err := m.Generation()
	must(t, err)
	if have := m.placesIn(t, 500, SlotOf(g)); !slices.Equal(have, want) {
		t.Errorf("%s: the places are %d, want %d", when, have, want)
	}
}

// TestRowsOfSegments: what an L2 network has beside addresses.
func TestRowsOfSegments(t *testing.T) {
	m := newMaps(t)
	p := segmentPlan(1)
	p.L2GSO = topology.Segment
	p.Ports[0].Device, p.Ports[0].DHCP = "tap0", true
	p.Peers[0].SIDL2 = topology.SID{Addr: netip.MustParseAddr("5f00:1ace:2::99")}
	devices := map[string]Device{"500-0": {Index: 100, MTU: 1500}, "600-0": {Index: 101, MTU: 1442}, Segmenter: {Index: 9}}
	_, err := m.Sync(p, false, devices, nil)
	must(t, err)

	loud, ok, err := m.Networks.Get(Scope(500, 1))
	if want := uint32(bpf.LaceNetworkFlagsNETWORK_LOCAL | bpf.LaceNetworkFlagsNETWORK_L2 | bpf.LaceNetworkFlagsNETWORK_FLOOD); err != nil || !ok || loud.Flags != want || loud.FloodRate != 700 || loud.Base6.U8 != [16]uint8{} {
		t.Errorf("the network that replicates: %+v, %v, %v", loud, ok, err)
	}
	quiet, ok, err := m.Networks.Get(Scope(600, 1))
	if want := uint32(bpf.LaceNetworkFlagsNETWORK_LOCAL | bpf.LaceNetworkFlagsNETWORK_L2); err != nil || !ok || quiet.Flags != want || quiet.FloodRate != 0 || netip.AddrFrom16(quiet.Base6.U8) != netip.MustParseAddr("fd50:0:0:1::") {
		t.Errorf("the one that does not: %+v, %v, %v", quiet, ok, err)
	}
	var config bpf.LaceConfig
	must(t, m.config.Lookup(uint32(1), &config))
	if config.L2Gso != uint8(bpf.LaceL2GsoL2GSO_SEGMENT) || config.Segmenter != 9 {
		t.Errorf("the node's row is %+v", config)
	}
	locator, _ := firstHalf(p.Peers[0].Locator.Prefix)
	peer, _, err := m.Peers.Get(bpf.LacePeerKey{Locator: locator, Slot: 1})
	if err != nil || netip.AddrFrom16(peer.SidL2.U8) != p.Peers[0].SIDL2.Addr {
		t.Errorf("the peer's row is %+v, %v", peer, err)
	}

	direct := uint32(bpf.LaceEndpointFlagsENDPOINT_DIRECT)
	here, ok, err := m.FDB.Get(fdbKey(500, 1, p.Ports[0].MAC))
	if err != nil || !ok || here.Ifindex != 100 || here.Mtu != 1500 || here.Flags != direct || here.Peer != 0 {
		t.Errorf("the station of a device is %+v, %v, %v", here, ok, err)
	}
	away, ok, err := m.FDB.Get(fdbKey(500, 1, p.Stations[0].MAC))
	if err != nil || !ok || away.Ifindex != 0 || away.Peer != 1 || netip.AddrFrom16(away.Sid.U8) != p.Stations[0].SID.Addr {
		t.Errorf("the station at another node is %+v, %v, %v", away, ok, err)
	}
	for k, e := range endpointRows(p.Ports[0], devices["500-0"], 1) {
		if have, _, err := m.Endpoints.Get(k); err != nil || have != e || e.Flags != direct {
			t.Errorf("the endpoint of a device is %+v, %v, want %+v", have, err, e)
		}
	}
	port, _, err := m.Ports.Get(bpf.LacePortKey{Ifindex: 100, Slot: 1})
	if want := uint32(bpf.LacePortFlagsPORT_HAS_V4 | bpf.LacePortFlagsPORT_DHCP | bpf.LacePortFlagsPORT_DIRECT); err != nil || port.Flags != want {
		t.Errorf("the flags of a device's port are %#x, want %#x (%v)", port.Flags, want, err)
	}
	if other, _, _ := m.Ports.Get(bpf.LacePortKey{Ifindex: 101, Slot: 1}); other.Flags != uint32(bpf.LacePortFlagsPORT_HAS_V4) {
		t.Errorf("the flags of a container's port are %#x", other.Flags)
	}

	groups, err := m.Groups.All()
	must(t, err)
	if want := map[uint32]bpf.LaceGroup{Scope(500, 1): {Locals: 1, Remotes: 2}}; !maps.Equal(groups, want) {
		t.Errorf("the groups are %+v, want %+v", groups, want)
	}
	member, ok, err := m.Members.Get(bpf.LaceMemberKey{Scope: Scope(500, 1), Place: memberRemote})
	if err != nil || !ok || member.Ifindex != 0 || member.Peer != 1 || netip.AddrFrom16(member.Sid.U8) != p.Members[0].SID.Addr {
		t.Errorf("the first node that gets copies is %+v, %v, %v", member, ok, err)
	}
	types, err := m.PortTypes()
	if want := map[int]topology.NetworkType{100: topology.L2, 101: topology.L2}; err != nil || !maps.Equal(types, want) {
		t.Errorf("the types are %v, %v", types, err)
	}
}

// TestPortTypes tells L3 from L2, in the active generation only.
func TestPortTypes(t *testing.T) {
	m := newMaps(t)
	m.sync(t, testPlan(2))
	types, err := m.PortTypes()
	if want := map[int]topology.NetworkType{100: topology.L3, 101: topology.L3}; err != nil || !maps.Equal(types, want) {
		t.Errorf("the types are %v, %v", types, err)
	}
	must(t, m.Ports.Put(bpf.LacePortKey{Ifindex: 102}, bpf.LacePort{Network: 100})) // of the slot that is not in use
	if again, err := m.PortTypes(); err != nil || !maps.Equal(types, again) {
		t.Errorf("with a port of another generation they are %v, %v", again, err)
	}
}

// TestPlacesStay: a port keeps its place while it lives, and one that comes takes the lowest that is free.
func TestPlacesStay(t *testing.T) {
	m := newMaps(t)
	p := segmentPlan(4)
	g := m.sync(t, p).Generation
	m.wantPlaces(t, "first", 100, 101, 102, 103)
	must(t, m.DeletePort(p.Ports[1], 101))
	m.wantPlaces(t, "one has left", 100, 0, 102, 103)
	must(t, m.DeletePort(p.Ports[1], 101))
	must(t, m.DeletePort(p.Ports[3], 103))
	m.wantPlaces(t, "the last has left", 100, 0, 102)
	late := segmentPort(500, 9)
	for range 2 {
		must(t, m.PutPort(late, Device{Index: 90, MTU: 1442}))
		m.wantPlaces(t, "another has come", 100, 90, 102)
	}
	must(t, m.PutPort(p.Ports[1], Device{Index: 101, MTU: 1442}))
	m.wantPlaces(t, "and one more", 100, 90, 102, 101)

	devices := map[string]Device{"500-0": {Index: 100}, "500-1": {Index: 101}, "500-2": {Index: 102}, "500-3": {Index: 103}, "500-9": {Index: 90}}
	p.Ports = append(p.Ports, late)
	done, err := m.Sync(p, false, devices, nil)
	must(t, err)
	if done.Switched || done.Generation != g {
		t.Errorf("ports that come and go made a generation: %+v", done)
	}
	m.wantPlaces(t, "all are written", 100, 90, 102, 101, 103)
	p.Networks[0].Line++
	done, err = m.Sync(p, false, devices, nil)
	must(t, err)
	if !done.Switched {
		t.Errorf("another line made no generation: %+v", done)
	}
	m.wantPlaces(t, "in the next generation", 100, 90, 102, 101, 103)
	if again, err := m.Sync(p, false, devices, nil); err != nil || again.Changes != (Changes{}) {
		t.Errorf("the same once more: %+v, %v", again, err)
	}
	for i, port := range []plan.Port{p.Ports[0], p.Ports[2], late, p.Ports[1], p.Ports[3]} {
		must(t, m.DeletePort(port, []uint32{100, 102, 90, 101, 103}[i]))
	}
	m.wantPlaces(t, "all have left")
	if groups, err := m.Groups.All(); err != nil || len(groups) != 1 || groups[Scope(500, SlotOf(done.Generation))].Remotes != 2 {
		t.Errorf("the groups are %+v, %v: other nodes still get copies", groups, err)
	}
}

// TestPortOfSegmentInPlace: a port that comes and goes has a station, and a place only where the network replicates.
func TestPortOfSegmentInPlace(t *testing.T) {
	m := newMaps(t)
	empty := segmentPlan(0)
	m.sync(t, empty)
	before := m.held(t)
	for _, p := range []plan.Port{segmentPort(500, 1), segmentPort(600, 1)} {
		must(t, m.PutPort(p, Device{Index: 50, MTU: 1442}))
		if row, ok, err := m.FDB.Get(fdbKey(p.NetworkID, 1, p.MAC)); err != nil || !ok || row.Ifindex != 50 || row.Mtu != 1442 {
			t.Errorf("network %d: the station is %+v, %v, %v", p.NetworkID, row, ok, err)
		}
		if have := m.placesIn(t, p.NetworkID, 1); slices.Contains(have, 50) != (p.NetworkID == 500) {
			t.Errorf("network %d: the places are %d", p.NetworkID, have)
		}
		must(t, m.DeletePort(p, 50))
		wantHeld(t, m, before)
	}
	if done := m.sync(t, empty); done.Switched || done.Changes != (Changes{}) {
		t.Errorf("Sync found something to do: %+v", done)
	}
}

// TestSegmentsMakeGenerations: each thing that a topology says of L2 networks makes one.
func TestSegmentsMakeGenerations(t *testing.T) {
	m := newMaps(t)
	m.sync(t, segmentPlan(1))
	for name, change := range map[string]func(*plan.Plan){
		"no flood":            func(p *plan.Plan) { p.Networks[1].Flood, p.Members = false, nil },
		"flood rate":          func(p *plan.Plan) { p.Networks[1].FloodRate++ },
		"type":                func(p *plan.Plan) { p.Networks[1].Type, p.Members, p.Stations, p.Ports = topology.L3, nil, nil, nil },
		"base of IPv6":        func(p *plan.Plan) { p.Networks[2].Base6 = netip.MustParsePrefix("fd51::/96") },
		"owner of a station":  func(p *plan.Plan) { p.Stations[0].Peer = 2 },
		"no station":          func(p *plan.Plan) { p.Stations = nil },
		"node gets no copies": func(p *plan.Plan) { p.Members = p.Members[:1] },
		"SID for many":        func(p *plan.Plan) { p.Members[0].SID = p.Stations[0].SID },
		"strict mode":         func(p *plan.Plan) { p.L2GSO = topology.Segment },
		"SID of a router":     func(p *plan.Plan) { p.Peers[0].SIDL2 = p.Stations[0].SID },
	} {
		p := segmentPlan(1)
		change(p)
		for _, p := range []*plan.Plan{p, segmentPlan(1)} {
			if done := m.sync(t, p); !done.Switched {
				t.Errorf("%s: %+v", name, done)
			}
			if again := m.sync(t, p); again.Switched || again.Changes != (Changes{}) {
				t.Errorf("%s, once more: %+v", name, again)
			}
		}
	}
}

func TestEachLearned(t *testing.T) {
	m := newMaps(t)
	now, err := flowTick()
	must(t, err)
	want := Sighting{Network: 500, MAC: plan.MAC{0x52, 0x54, 0, 0, 0, 7}, Locator: netip.MustParseAddr("5f00:1ace:2::"), Age: 3 << 30}
	locator := want.Locator.As16()
	k := bpf.LaceSightingKey{Network: 500}
	k.Mac.U8 = want.MAC
	must(t, m.learned.Put(k, bpf.LaceSighting{Locator: binary.NativeEndian.Uint64(locator[:8]), Seen: now - 3}))
	var have []Sighting
	must(t, m.EachLearned(func(s Sighting) error { have = append(have, s); return nil }))
	if len(have) != 1 || have[0].Age < want.Age || have[0].Age > want.Age+10*time.Second {
		t.Fatalf("learned: %+v", have)
	}
	have[0].Age = want.Age
	if have[0] != want {
		t.Errorf("learned %+v, want %+v", have[0], want)
	}
	stop := errors.New("stop")
	if err := m.EachLearned(func(Sighting) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("a reader that stops: %v", err)
	}
	m.learned.Close()
	if err := m.EachLearned(func(Sighting) error { return nil }); err == nil {
		t.Error("a closed table was read")
	}
}
