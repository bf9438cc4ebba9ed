// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make eBPF maps: run the tests as root")
	}
}

// newTable is a real map with room for a few rows.
func newTable(t *testing.T, room uint32) Table[uint32, uint64] {
	t.Helper()
	needRoot(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "test", Type: ebpf.Hash, KeySize: 4, ValueSize: 8, MaxEntries: room})
	must(t, err)
	t.Cleanup(func() { m.Close() })
	return Table[uint32, uint64]{"test", m}
}

func wantRows(t *testing.T, table Table[uint32, uint64], want map[uint32]uint64) {
	t.Helper()
	have, err := table.All()
	must(t, err)
	if !maps.Equal(have, want) {
		t.Errorf("the table holds %v, want %v", have, want)
	}
}

func TestSync(t *testing.T) {
	table := newTable(t, 8)
	for _, step := range []struct {
		want map[uint32]uint64
		done Changes
	}{
		{map[uint32]uint64{1: 10, 2: 20}, Changes{Put: 2}},
		{map[uint32]uint64{1: 10, 2: 20}, Changes{}},
		{map[uint32]uint64{1: 11, 2: 20, 3: 30}, Changes{Put: 2}},
		{map[uint32]uint64{3: 30, 4: 40}, Changes{Put: 1, Deleted: 2}},
		{nil, Changes{Deleted: 2}},
		{nil, Changes{}},
	} {
		done, err := table.Sync(step.want)
		must(t, err)
		if done != step.done {
			t.Errorf("Sync(%v) did %+v, want %+v", step.want, done, step.done)
		}
		wantRows(t, table, step.want)
	}
}

func TestSyncOfFullTable(t *testing.T) {
	table := newTable(t, 2)
	want := map[uint32]uint64{3: 30, 4: 40}
	_, err := table.Sync(map[uint32]uint64{1: 10, 2: 20})
	must(t, err)
	done, err := table.Sync(want) // fits when the others are gone
	must(t, err)
	if (done != Changes{Put: 2, Deleted: 2}) {
		t.Errorf("Sync did %+v", done)
	}
	wantRows(t, table, want)

	done, err = table.Sync(map[uint32]uint64{3: 30, 4: 40, 5: 50, 6: 60})
	if err == nil || !strings.Contains(err.Error(), "2 of 2 rows: write a row of map test: it holds 2 rows and is full") {
		t.Errorf("too many rows: %v", err)
	}
	if (done != Changes{}) {
		t.Errorf("a full table changed: %+v", done)
	}
	wantRows(t, table, want) // what was there stays
}

func TestRows(t *testing.T) {
	table := newTable(t, 2)
	must(t, table.Put(1, 10))
	must(t, table.Put(1, 11))
	if v, ok, err := table.Get(1); v != 11 || !ok || err != nil {
		t.Errorf("Get: %d, %v, %v", v, ok, err)
	}
	must(t, table.Delete(1))
	must(t, table.Delete(1))
	if _, ok, err := table.Get(1); ok || err != nil {
		t.Errorf("Get after Delete: %v, %v", ok, err)
	}
	must(t, table.Put(2, 0))
	must(t, table.Put(3, 0))
	if err := table.Put(4, 0); err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("Put into a full table: %v", err)
	}
}

// newMaps are the tables of the real object, without programs.
func newMaps(t *testing.T) *Maps {
	t.Helper()
	needRoot(t)
	spec, err := bpf.LoadLace()
	must(t, err)
	spec.Programs = nil
	coll, err := ebpf.NewCollection(spec)
	must(t, err)
	t.Cleanup(coll.Close)
	m, err := New(coll.Maps)
	must(t, err)
	return m
}

func testPlan(ports int) *plan.Plan {
	p := &plan.Plan{
		Locator:      topology.Locator{Prefix: netip.MustParsePrefix("5f00:1ace:1::/48")},
		LocatorBlock: netip.MustParsePrefix("5f00:1ace::/32"),
		Networks:     []plan.Network{{Name: "backend", ID: 100, BlockBits4: plan.Lengths{28, 24}, BlockBits6: plan.Lengths{64}}},
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

func devicesOf(p *plan.Plan) map[string]Device {
	out := map[string]Device{}
	for i, port := range p.Ports {
		out[port.HostIf] = Device{Index: uint32(100 + i), MTU: 1460}
	}
	return out
}

func TestSyncOfPlan(t *testing.T) {
	m := newMaps(t)
	p := testPlan(2)
	sync := func(p *plan.Plan, want Changes) {
		t.Helper()
		done, err := m.Sync(p, devicesOf(p))
		must(t, err)
		if done != want {
			t.Errorf("Sync did %+v, want %+v", done, want)
		}
	}
	sync(p, Changes{Put: 1 + 1 + 2 + 4 + 2})
	sync(p, Changes{})
	port, ok, err := m.Ports.Get(101)
	if err != nil || !ok || port.Bits4 != [4]uint8{96 + 28, 96 + 24} || port.Bits6 != [4]uint8{64} || port.Mtu != 1460 {
		t.Errorf("the port's row is %+v, %v, %v", port, ok, err)
	}
	sync(testPlan(1), Changes{Deleted: 3})
	must(t, m.DeletePort(p.Ports[0], 100))
	must(t, m.DeletePort(p.Ports[0], 100))
	must(t, m.PutPort(p.Ports[0], &p.Networks[0], Device{Index: 100, MTU: 1460}))
	sync(testPlan(1), Changes{})
	sync(&plan.Plan{}, Changes{Deleted: 1 + 1 + 2 + 2 + 1})
}

// TestPortWithoutInterface: what has no interface yet is left out, not guessed.
func TestPortWithoutInterface(t *testing.T) {
	m := newMaps(t)
	_, err := m.Sync(testPlan(2), devicesOf(testPlan(1)))
	must(t, err)
	ports, err := m.Ports.All()
	must(t, err)
	endpoints, err := m.Endpoints.All()
	must(t, err)
	if len(ports) != 1 || len(endpoints) != 2 {
		t.Errorf("%d ports and %d endpoints, want 1 and 2", len(ports), len(endpoints))
	}
}

func TestSyncNexthops(t *testing.T) {
	m := newMaps(t)
	row := func(i uint32) (v bpf.LaceNexthop) {
		t.Helper()
		must(t, m.nexthops.Lookup(i, &v))
		return v
	}
	must(t, m.SyncNexthops([]Nexthop{{Peer: 1, Ifindex: 7, MTU: 1500, Known: true, Dst: plan.MAC{1}, Src: plan.MAC{2}}, {Peer: 4096, Ifindex: 8, MTU: 1420, Raw: true}}))
	if v := row(1); v.Ifindex != 7 || v.Flags != uint16(bpf.LaceNexthopFlagsNEXTHOP_MAC) || v.Dst.U8 != [6]byte{1} || v.Mtu != 1500 {
		t.Errorf("the first row is %+v", v)
	}
	if v := row(4096); v.Ifindex != 8 || v.Flags != uint16(bpf.LaceNexthopFlagsNEXTHOP_RAW) {
		t.Errorf("the last row is %+v", v)
	}
	must(t, m.SyncNexthops([]Nexthop{{Peer: 1, Ifindex: 7, MTU: 1500, Dst: plan.MAC{1}}}))
	if v := row(1); v.Flags != 0 || v.Dst.U8 != [6]byte{} {
		t.Errorf("MAC addresses that are not known are written: %+v", v)
	}
	if v := row(4096); v != (bpf.LaceNexthop{}) {
		t.Errorf("a peer without a way keeps %+v", v)
	}
	for _, peer := range []uint32{0, 4097} {
		if err := m.SyncNexthops([]Nexthop{{Peer: peer, Ifindex: 7}}); err == nil || !strings.Contains(err.Error(), "places for peers 1 to 4096") {
			t.Errorf("peer %d: %v", peer, err)
		}
	}
}

func TestNewWithoutMap(t *testing.T) {
	if _, err := New(nil); err == nil || !strings.Contains(err.Error(), "is the data plane loaded") {
		t.Errorf("New(nil): %v", err)
	}
}

func TestFirstHalf(t *testing.T) {
	for prefix, want := range map[string][2]string{
		"5f00:1ace:1::/48":       {"\x5f\x00\x1a\xce\x00\x01\x00\x00", "\xff\xff\xff\xff\xff\xff\x00\x00"},
		"5f00:1ace:8::/45":       {"\x5f\x00\x1a\xce\x00\x08\x00\x00", "\xff\xff\xff\xff\xff\xf8\x00\x00"},
		"5f00:1ace:1:2::/64":     {"\x5f\x00\x1a\xce\x00\x01\x00\x02", "\xff\xff\xff\xff\xff\xff\xff\xff"},
		"5f00:1ace:1:2:3::/80":   {"\x5f\x00\x1a\xce\x00\x01\x00\x02", "\xff\xff\xff\xff\xff\xff\xff\xff"},
		"::/0":                   {"\x00\x00\x00\x00\x00\x00\x00\x00", "\x00\x00\x00\x00\x00\x00\x00\x00"},
		"5f00:1ace:1:ffff::1/48": {"\x5f\x00\x1a\xce\x00\x01\x00\x00", "\xff\xff\xff\xff\xff\xff\x00\x00"},
	} {
		value, mask := firstHalf(netip.MustParsePrefix(prefix))
		if wire(value) != want[0] || wire(mask) != want[1] {
			t.Errorf("%s: % x & % x", prefix, wire(value), wire(mask))
		}
	}
}

func wire(v uint64) string {
	b := make([]byte, 8)
	for i := range b { // as it lies in memory on a little-endian machine, which the object is for
		b[i] = byte(v >> (8 * i))
	}
	return string(b)
}

func TestReservations(t *testing.T) {
	needRoot(t)
	r := &Reservations{Table[reservationKey, reservationRow]{"reservations", newReservationMap(t)}}
	one := Reservation{Network: 100, Name: "db", V4: netip.MustParseAddr("10.40.1.2"), V6: netip.MustParseAddr("fd40::2")}
	must(t, r.Put(one))
	must(t, r.Put(Reservation{Network: 200, Name: "db"}))
	one.V4 = netip.MustParseAddr("10.40.1.3")
	must(t, r.Put(one))
	all, err := r.All()
	must(t, err)
	if len(all) != 2 {
		t.Fatalf("%d reservations, want 2: %+v", len(all), all)
	}
	for _, have := range all {
		if have.Network == 100 && have != one || have.Network == 200 && (have.V4.IsValid() || have.V6.IsValid()) {
			t.Errorf("read %+v", have)
		}
	}
}

func newReservationMap(t *testing.T) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "reservations", Type: ebpf.Hash, KeySize: 68, ValueSize: 32, MaxEntries: 4})
	must(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}
