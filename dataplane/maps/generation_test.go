// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

func testPlan(ports int) *plan.Plan {
	p := &plan.Plan{
		Locator:      topology.Locator{Prefix: netip.MustParsePrefix("5f00:1ace:1::/48")},
		LocatorBlock: netip.MustParsePrefix("5f00:1ace::/32"),
		Networks:     []plan.Network{{Name: "backend", ID: 100, BlockBits4: plan.Lengths{28, 24}, BlockBits6: plan.Lengths{64}, Line: 12}},
		Foreign:      []plan.Foreign{{Name: "db", ID: 300, BlockBits4: plan.Lengths{26}, Line: 20}},
		Peerings:     []plan.Peering{{From: 100, To: 300, Prefix: netip.MustParsePrefix("10.60.0.0/16"), Line: 30}},
		Conntrack:    topology.Conntrack{Max: 1000, UDP: time.Minute},
		Peers:        []plan.Peer{{Index: 1, Locator: topology.Locator{Prefix: netip.MustParsePrefix("5f00:1ace:2::/48")}}},
		Blocks: []plan.Block{
			{Network: 100, Prefix: netip.MustParsePrefix("10.40.1.0/24"), Local: true},
			{Network: 100, Prefix: netip.MustParsePrefix("fd40:0:2::/64"), Peer: 1, SID: topology.SID{Addr: netip.MustParseAddr("5f00:1ace:2:14:0:6400::")}},
		},
	}
	for i := range ports {
		p.Ports = append(p.Ports, plan.Port{HostIf: fmt.Sprint(i), Gateway4: netip.MustParseAddr("10.40.1.1"), Attachment: plan.Attachment{
			NetworkID: 100, V4: netip.AddrFrom4([4]byte{10, 40, 1, byte(2 + i)}), V6: netip.MustParseAddr(fmt.Sprintf("fd40:0:1::%x", 2+i)), MAC: plan.MAC{2, byte(i)}}})
	}
	return p
}

// configOf is how many rows testPlan has beside its ports.
const configOf = 2 + 1 + 1 + 2

func devicesOf(p *plan.Plan) map[string]Device {
	out := map[string]Device{}
	for i, port := range p.Ports {
		out[port.HostIf] = Device{Index: uint32(100 + i), MTU: 1460}
	}
	return out
}

// sync is one run of Sync with all that a plan needs.
func (m *Maps) sync(t testing.TB, p *plan.Plan) Synced {
	t.Helper()
	done, err := m.Sync(p, false, devicesOf(p), nil)
	must(t, err)
	return done
}

// held has the numbers of rows in both slots.
func (m *Maps) held(t testing.TB) (out [2]int) {
	t.Helper()
	slots, err := m.read()
	must(t, err)
	for i, s := range slots {
		out[i] = s.count()
	}
	return out
}

func wantHeld(t testing.TB, m *Maps, want [2]int) {
	t.Helper()
	if have := m.held(t); have != want {
		t.Errorf("the slots hold %d rows, want %d", have, want)
	}
}

func TestSyncOfPlan(t *testing.T) {
	m := newMaps(t)
	sync := func(p *plan.Plan, want Synced) {
		t.Helper()
		if done := m.sync(t, p); done != want {
			t.Errorf("Sync did %+v, want %+v", done, want)
		}
	}
	p := testPlan(2)
	sync(p, Synced{Changes{Put: configOf + 4 + 2}, 3, true}) // the first one is written to slot 1
	sync(p, Synced{Changes{}, 3, false})
	port, ok, err := m.Ports.Get(bpf.LacePortKey{Ifindex: 101, Slot: 1})
	if err != nil || !ok || port.Network != 100 || port.Traffic != 1 || port.Mtu != 1460 {
		t.Errorf("the port's row is %+v, %v, %v", port, ok, err)
	}
	sync(testPlan(1), Synced{Changes{Deleted: 3}, 3, false}) // containers come and go in place
	must(t, m.DeletePort(p.Ports[0], 100))
	must(t, m.DeletePort(p.Ports[0], 100))
	must(t, m.PutPort(p.Ports[0], Device{Index: 100, MTU: 1460}))
	sync(testPlan(1), Synced{Changes{}, 3, false})
	wantHeld(t, m, [2]int{0, configOf + 3})

	sync(&plan.Plan{}, Synced{Changes{}, 4, true}) // the rows that were there go with their slot
	wantHeld(t, m, [2]int{})
	if err := m.PutPort(p.Ports[0], Device{Index: 100}); err == nil || !strings.Contains(err.Error(), "network 100 is not in their tables") {
		t.Errorf("a port of a network that left: %v", err)
	}
	sync(testPlan(2), Synced{Changes{Put: configOf + 4 + 2}, 7, true})
	wantHeld(t, m, [2]int{0, configOf + 6})
}

// TestConfigurationTakesTwoSlots: each thing that a topology says makes a generation, and only those.
func TestConfigurationTakesTwoSlots(t *testing.T) {
	m := newMaps(t)
	g := m.sync(t, testPlan(1)).Generation
	for name, change := range map[string]func(*plan.Plan){
		"line of a network":     func(p *plan.Plan) { p.Networks[0].Line++ },
		"lengths of blocks":     func(p *plan.Plan) { p.Foreign[0].BlockBits4 = plan.Lengths{27} },
		"owner of a block":      func(p *plan.Plan) { p.Blocks[1].Peer = 2 },
		"no peering":            func(p *plan.Plan) { p.Peerings = nil },
		"line of a peering":     func(p *plan.Plan) { p.Peerings[0].Line++ },
		"number of a peer":      func(p *plan.Plan) { p.Peers[0].Index = 2 },
		"a peering masquerades": func(p *plan.Plan) { p.Peerings[0].External, p.Peerings[0].Masquerade = true, true },
		"node to leave by":      func(p *plan.Plan) { p.Peerings[0].Peer = 1 },
		"hosts reach a network": func(p *plan.Plan) { p.Networks[0].Host = true },
		"an external network": func(p *plan.Plan) {
			p.Externals = []plan.External{{ID: 0xe00001, Prefixes: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}}
		},
		"ports to masquerade with": func(p *plan.Plan) { p.Masquerade = topology.Masquerade{First: 2000, Last: 3000} },
		"time-out":                 func(p *plan.Plan) { p.Conntrack.UDP = time.Hour },
		"encapsulation":            func(p *plan.Plan) { p.Encapsulation = topology.SRH },
		"a network has left":       func(p *plan.Plan) { p.Foreign = nil },
		"a network is foreign": func(p *plan.Plan) {
			p.Networks, p.Ports, p.Foreign = nil, nil, append(p.Foreign, plan.Foreign{ID: 100})
		},
	} {
		p := testPlan(1)
		change(p)
		for _, p := range []*plan.Plan{p, testPlan(1)} {
			done := m.sync(t, p)
			if !done.Switched || done.Generation != (g+2)^1 {
				t.Errorf("%s: %+v after generation %d", name, done, g)
			}
			g = done.Generation
			if again := m.sync(t, p); again.Switched || again.Changes != (Changes{}) {
				t.Errorf("%s, once more: %+v", name, again)
			}
		}
	}
	p := testPlan(1)
	p.Conntrack.Max, p.Node, p.Hash = 5, "other", topology.Hash{1} // nothing that the programs see
	if done := m.sync(t, p); done.Switched {
		t.Errorf("what is no row made a generation: %+v", done)
	}
}

func TestRowsOfPlan(t *testing.T) {
	m := newMaps(t)
	p := testPlan(0)
	p.Peers = append(p.Peers, plan.Peer{Index: 2, Kind: topology.KindRouter, Network: 100, Locator: topology.Locator{Prefix: netip.MustParsePrefix("5f00:1ace:3::/48")}})
	p.Blocks = append(p.Blocks, plan.Block{Network: 100, Prefix: netip.MustParsePrefix("10.40.3.0/24"), Peer: 2, SID: topology.SID{Addr: netip.MustParseAddr("5f00:1ace:3::4")}})
	m.sync(t, p)
	own, ok, err := m.Networks.Get(Scope(100, 1))
	if err != nil || !ok || own.Bits4 != [4]uint8{96 + 28, 96 + 24} || own.Bits6 != [4]uint8{64} || own.Flags != 1 || own.Line != 12 {
		t.Errorf("the own network's row is %+v, %v, %v", own, ok, err)
	}
	foreign, ok, err := m.Networks.Get(Scope(300, 1))
	if err != nil || !ok || foreign.Flags != 0 || foreign.Bits4 != [4]uint8{96 + 26} || foreign.Traffic == own.Traffic {
		t.Errorf("the foreign network's row is %+v, %v, %v", foreign, ok, err)
	}
	key := bpf.LacePeeringKey{Prefixlen: 32 + 128, Scope: Scope(100, 1) | 1<<familyBit}
	key.Addr.U8 = netip.MustParseAddr("::ffff:10.60.7.8").As16()
	if row, ok, err := m.Peerings.Get(key); err != nil || !ok || row.Network != 300 || row.Line != 30 {
		t.Errorf("the peering's row is %+v, %v, %v", row, ok, err)
	}
	key.Scope = Scope(100, 0) | 1<<familyBit
	if row, ok, _ := m.Peerings.Get(key); ok {
		t.Errorf("the other slot has a peering: %+v", row)
	}
	locator, _ := firstHalf(p.Peers[1].Locator.Prefix)
	router, ok, err := m.Peers.Get(bpf.LacePeerKey{Locator: locator, Slot: 1})
	if err != nil || !ok || router.Network != 100 || netip.AddrFrom16(router.Sid4.U8) != p.Blocks[2].SID.Addr || router.Sid6.U8 != [16]uint8{} {
		t.Errorf("the router's row is %+v, %v, %v", router, ok, err)
	}
	var config bpf.LaceConfig
	must(t, m.config.Lookup(uint32(1), &config))
	if config.Timeouts.Udp != 56 || config.Timeouts.Other != 1 { // 60 s and 0 s
		t.Errorf("the time-outs are %+v", config.Timeouts)
	}
}

// TestPortWithoutInterface: what has no interface yet is left out, not guessed.
func TestPortWithoutInterface(t *testing.T) {
	m := newMaps(t)
	_, err := m.Sync(testPlan(2), false, devicesOf(testPlan(1)), nil)
	must(t, err)
	ports, err := m.Ports.All()
	must(t, err)
	endpoints, err := m.Endpoints.All()
	must(t, err)
	if len(ports) != 1 || len(endpoints) != 2 {
		t.Errorf("%d ports and %d endpoints, want 1 and 2", len(ports), len(endpoints))
	}
}

func TestDecideAgain(t *testing.T) {
	m := newMaps(t)
	before := m.sync(t, testPlan(1)).Generation
	must(t, m.DecideAgain())
	g, err := m.Generation()
	must(t, err)
	if g != before+2 {
		t.Errorf("generation %d after %d, want the next one in the same slot", g, before)
	}
	if done := m.sync(t, testPlan(1)); done.Switched || done.Generation != g {
		t.Errorf("Sync after it did %+v", done)
	}
}

// TestFullTable: a generation that does not fit harms nothing, and leaves nothing.
func TestFullTable(t *testing.T) {
	for table, change := range map[string]func(*plan.Plan){
		"blocks": func(p *plan.Plan) {
			for i := range 9 {
				p.Blocks = append(p.Blocks, plan.Block{Network: 100, Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 40, byte(10 + i), 0}), 24), Peer: 1})
			}
		},
		"peerings": func(p *plan.Plan) {
			for i := range 9 {
				p.Peerings = append(p.Peerings, plan.Peering{From: 100, To: 300, Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 61, byte(i), 0}), 24)})
			}
		},
		"ports": func(p *plan.Plan) {
			p.Networks[0].Line++
			p.Ports = testPlan(9).Ports
		},
		"fdb": func(p *plan.Plan) {
			for i := range 9 {
				p.Stations = append(p.Stations, plan.Station{Network: 100, MAC: plan.MAC{2, 1, byte(i)}, Peer: 1})
			}
		},
		"externals": func(p *plan.Plan) {
			p.Externals = []plan.External{{ID: 0xe00001}}
			for i := range 9 {
				p.Externals[0].Prefixes = append(p.Externals[0].Prefixes, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, byte(i), 0}), 24))
			}
		},
		"published": func(p *plan.Plan) {
			p.Networks[0].Line++
			for i := range 9 {
				p.Ports[0].Publish = append(p.Ports[0].Publish, plan.Publish{Protocol: 6, Port: uint16(8000 + i), To: 80})
			}
		},
		"members": func(p *plan.Plan) {
			for i := range 9 {
				p.Members = append(p.Members, plan.Member{Network: 100, Peer: uint32(1 + i)})
			}
		},
	} {
		t.Run(table, func(t *testing.T) {
			m := newMapsWith(t, func(spec *ebpf.CollectionSpec) { spec.Maps[table].MaxEntries = 8 })
			was := m.sync(t, testPlan(1)).Generation
			before, err := m.read()
			must(t, err)
			p := testPlan(1)
			change(p)
			done, err := m.Sync(p, false, devicesOf(p), nil)
			if err == nil || !strings.Contains(err.Error(), "the active one, which stays") || !strings.Contains(err.Error(), "map "+table+": it holds 8 rows and is full") {
				t.Errorf("the error is %v", err)
			}
			if done.Switched || done.Generation != was {
				t.Errorf("Sync did %+v after generation %d", done, was)
			}
			after, err := m.read()
			must(t, err)
			s := SlotOf(was)
			if !after[s].sameConfig(before[s]) || !maps.Equal(after[s].ports, before[s].ports) || !maps.Equal(after[s].endpoints, before[s].endpoints) {
				t.Errorf("the active slot was %+v, and is %+v", before[s], after[s])
			}
			if !after[1-s].empty() {
				t.Errorf("the other slot still holds %+v", after[1-s])
			}
			if again := m.sync(t, testPlan(1)); again.Switched || again.Changes != (Changes{}) {
				t.Errorf("Sync of what is active did %+v", again)
			}
		})
	}
}

// TestKilledAgent leaves off at each step of a generation's write. What was active stays, the next agent puts all in order.
func TestKilledAgent(t *testing.T) {
	takesLong(t)
	changed := func() *plan.Plan {
		p := testPlan(2)
		p.Peerings[0].Line++
		return p
	}
	write := func(m *Maps, p *plan.Plan, tables int) {
		w := wanted{plan: p, devices: devicesOf(p), nexthops: []Nexthop{{Peer: 1, Ifindex: 9}}}
		must(t, w.number(nil, m.numbers()))
		r := w.rows(0)
		for i, left := range []func(){
			func() { r.peers = nil }, func() { r.networks = nil }, func() { r.blocks = nil },
			func() { r.peerings = nil }, func() { r.endpoints = nil }, func() { r.ports = nil },
		} {
			if i >= tables {
				left()
			}
		}
		must(t, m.config.Put(uint32(0), r.config))
		must(t, m.writeNexthops(0, w.nexthops))
		_, err := m.change(&rows{}, r)
		must(t, err)
	}
	steps := map[string]func(*Maps){"before the switch": func(m *Maps) { write(m, changed(), 6) }}
	for n := range 6 {
		steps[fmt.Sprintf("%d tables written", n)] = func(m *Maps) { write(m, changed(), n) }
	}
	steps["another plan was meant"] = func(m *Maps) { write(m, &plan.Plan{Networks: []plan.Network{{ID: 7}}}, 6) }
	for name, step := range steps {
		for next, p := range map[string]*plan.Plan{"the old plan": testPlan(2), "the new plan": changed()} {
			t.Run(name+", then "+next, func(t *testing.T) {
				m := newMaps(t)
				was := m.sync(t, testPlan(2)) // in slot 1
				step(m)
				if g, err := m.Generation(); err != nil || g != was.Generation {
					t.Fatalf("generation %d is active, want %d: %v", g, was.Generation, err)
				}
				if have := m.held(t); have[1] != configOf+6 {
					t.Errorf("the active slot holds %d rows", have[1])
				}
				done := m.sync(t, p)
				if done.Switched != (next == "the new plan") {
					t.Errorf("the next agent did %+v", done)
				}
				want := [2]int{}
				want[SlotOf(done.Generation)] = configOf + 6
				wantHeld(t, m, want)
				if again := m.sync(t, p); again.Switched || again.Changes != (Changes{}) {
					t.Errorf("and then %+v", again)
				}
			})
		}
	}
	t.Run("after the switch", func(t *testing.T) {
		m := newMaps(t)
		was := m.sync(t, testPlan(2))
		write(m, changed(), 6)
		must(t, m.setGeneration((was.Generation+2)^1))
		if done := m.sync(t, changed()); done.Switched {
			t.Errorf("the next agent did %+v", done)
		}
		wantHeld(t, m, [2]int{configOf + 6, 0})
	})
}

// TestNumbersOfNetworks: a network keeps the number of its counters, and a new one begins at zero.
func TestNumbersOfNetworks(t *testing.T) {
	m := newMaps(t)
	plans := func(ids ...topology.NetworkID) *plan.Plan {
		p := testPlan(0)
		p.Networks, p.Foreign = nil, nil
		for _, id := range ids {
			p.Networks = append(p.Networks, plan.Network{ID: id})
		}
		return p
	}
	numbers := func() map[topology.NetworkID]uint32 {
		t.Helper()
		g, err := m.Generation()
		must(t, err)
		slots, err := m.read()
		must(t, err)
		out := map[topology.NetworkID]uint32{}
		for scope, row := range slots[SlotOf(g)].networks {
			out[Network(scope)] = row.Traffic
		}
		return out
	}
	for _, step := range []struct {
		ids  []topology.NetworkID
		want map[topology.NetworkID]uint32
	}{
		{[]topology.NetworkID{10, 20, 30}, map[topology.NetworkID]uint32{10: 1, 20: 2, 30: 3}},
		{[]topology.NetworkID{5, 10, 30}, map[topology.NetworkID]uint32{5: 4, 10: 1, 30: 3}}, // that of 20 is not free until it is gone
		{[]topology.NetworkID{5, 10, 15, 30}, map[topology.NetworkID]uint32{5: 4, 10: 1, 15: 2, 30: 3}},
		{[]topology.NetworkID{20}, map[topology.NetworkID]uint32{20: 5}},
	} {
		m.sync(t, plans(step.ids...))
		if have := numbers(); !maps.Equal(have, step.want) {
			t.Errorf("networks %v have the numbers %v, want %v", step.ids, have, step.want)
		}
		must(t, m.traffic.Put(uint32(2*trafficReasons+1), onEachCPU(t, 7)))
		if len(step.ids) == 4 {
			continue
		}
		m.sync(t, plans(step.ids...)) // changes nothing
		if have := m.traffics(t, 2*trafficReasons+1); have == 0 {
			t.Error("the counters of a network that stays are gone")
		}
	}
	m.sync(t, plans(1))     // number 1
	m.sync(t, plans(1, 20)) // number 2
	if have := m.traffics(t, 2*trafficReasons+1); have != 0 {
		t.Errorf("a new network begins with %d packets", have)
	}

	ids := make([]topology.NetworkID, 1025)
	for i := range ids {
		ids[i] = topology.NetworkID(1000 + i)
	}
	m = newMaps(t)
	_, err := m.Sync(plans(ids...), false, nil, nil)
	if err == nil || !strings.Contains(err.Error(), "counters for 1024 networks") {
		t.Errorf("1025 networks: %v", err)
	}
	m.sync(t, plans(ids[:1024]...))
}

func onEachCPU(t testing.TB, packets uint64) []bpf.LaceCounter {
	t.Helper()
	cpus, err := ebpf.PossibleCPU()
	must(t, err)
	rows := make([]bpf.LaceCounter, cpus)
	rows[0].Packets = packets
	return rows
}

func (m *Maps) traffics(t testing.TB, i uint32) (sum uint64) {
	t.Helper()
	var rows []bpf.LaceCounter
	must(t, m.traffic.Lookup(i, &rows))
	for _, r := range rows {
		sum += r.Packets
	}
	return sum
}

func TestSyncNexthops(t *testing.T) {
	m := newMaps(t)
	m.sync(t, testPlan(0)) // slot 1
	row := func(s Slot, i uint32) (v bpf.LaceNexthop) {
		t.Helper()
		v, _, err := m.nexthops.Get(uint32(s)*m.places() + i)
		must(t, err)
		return v
	}
	must(t, m.SyncNexthops([]Nexthop{{Peer: 1, Ifindex: 7, MTU: 1500, Known: true, Dst: plan.MAC{1}, Src: plan.MAC{2}}, {Peer: 4096, Ifindex: 8, MTU: 1420, Raw: true}}))
	if v := row(1, 1); v.Ifindex != 7 || v.Flags != uint16(bpf.LaceNexthopFlagsNEXTHOP_MAC) || v.Dst.U8 != [6]byte{1} || v.Mtu != 1500 {
		t.Errorf("the first row is %+v", v)
	}
	if v := row(1, 4096); v.Ifindex != 8 || v.Flags != uint16(bpf.LaceNexthopFlagsNEXTHOP_RAW) {
		t.Errorf("the last row is %+v", v)
	}
	if v := row(0, 1); v != (bpf.LaceNexthop{}) {
		t.Errorf("the other slot has %+v", v)
	}
	must(t, m.SyncNexthops([]Nexthop{{Peer: 1, Ifindex: 7, MTU: 1500, Dst: plan.MAC{1}}}))
	if v := row(1, 1); v.Flags != 0 || v.Dst.U8 != [6]byte{} {
		t.Errorf("MAC addresses that are not known are written: %+v", v)
	}
	if v := row(1, 4096); v != (bpf.LaceNexthop{}) {
		t.Errorf("a peer without a way keeps %+v", v)
	}
	for _, peer := range []uint32{0, 4097} {
		if err := m.SyncNexthops([]Nexthop{{Peer: peer, Ifindex: 7}}); err == nil || !strings.Contains(err.Error(), "places for peers 1 to 4096") {
			t.Errorf("peer %d: %v", peer, err)
		}
	}
	p := testPlan(0)
	p.Peerings = nil
	_, err := m.Sync(p, false, nil, []Nexthop{{Peer: 1, Ifindex: 9}}) // slot 0
	must(t, err)
	if row(0, 1).Ifindex != 9 || row(1, 1).Ifindex != 7 {
		t.Errorf("a new generation has %+v, the old one %+v", row(0, 1), row(1, 1))
	}
}

// largePlan has 64 networks on 100 nodes, each peered with all others.
func largePlan() *plan.Plan {
	const networks, nodes = 64, 100
	p := testPlan(0)
	p.Networks, p.Foreign, p.Peerings, p.Peers, p.Blocks = nil, nil, nil, nil, nil
	locator := func(n int) topology.Locator {
		b := netip.MustParseAddr("5f00:1ace::").As16()
		binary.BigEndian.PutUint16(b[4:], uint16(n))
		return topology.Locator{Prefix: netip.PrefixFrom(netip.AddrFrom16(b), 48)}
	}
	for n := 2; n <= nodes; n++ {
		p.Peers = append(p.Peers, plan.Peer{Index: uint32(n), Locator: locator(n)})
	}
	for i := range networks {
		id := topology.NetworkID(1 + i)
		p.Networks = append(p.Networks, plan.Network{ID: id, BlockBits4: plan.Lengths{24}, BlockBits6: plan.Lengths{64}})
		for n := 1; n <= nodes; n++ {
			v6 := netip.MustParseAddr(fmt.Sprintf("fd40:%x:%x::", i, n))
			for _, block := range []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), byte(n), 0}), 24), netip.PrefixFrom(v6, 64)} {
				p.Blocks = append(p.Blocks, plan.Block{Network: id, Prefix: block, Local: n == 1, Peer: uint32(n), SID: locator(n).SID(topology.EndDT46, id)})
			}
		}
		for j := range networks {
			for _, subnet := range []string{fmt.Sprintf("10.%d.0.0/16", j), fmt.Sprintf("fd40:%x::/32", j)} {
				p.Peerings = append(p.Peerings, plan.Peering{From: id, To: topology.NetworkID(1 + j), Prefix: netip.MustParsePrefix(subnet), Line: j})
			}
		}
	}
	return p
}

// TestLargeTopology: 64 networks, 64 peerings each and 100 nodes become active in below a second, and change nothing then.
func TestLargeTopology(t *testing.T) {
	m := newMaps(t)
	p := largePlan()
	bound := time.Second
	if emulated() {
		bound = time.Minute
	}
	for _, step := range []struct {
		what     string
		change   func()
		switched bool
	}{
		{"first", func() {}, true},
		{"again", func() {}, false},
		{"another line", func() { p.Peerings[0].Line++ }, true},
		{"again", func() {}, false},
	} {
		step.change()
		began := time.Now()
		done := m.sync(t, p)
		took := time.Since(began)
		t.Logf("%s: %d blocks, %d peerings: %d rows written, in %v", step.what, len(p.Blocks), len(p.Peerings), done.Put, took)
		if done.Switched != step.switched || !step.switched && done.Changes != (Changes{}) {
			t.Errorf("%s: Sync did %+v", step.what, done)
		}
		if took > bound {
			t.Errorf("%s: it took %v, want below %v", step.what, took, bound)
		}
	}
}
