// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"maps"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/tests/slow"
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
func newMaps(t testing.TB) *Maps { return newMapsWith(t, func(*ebpf.CollectionSpec) {}) }

// newMapsWith are tables that a test changes before they are made.
func newMapsWith(t testing.TB, change func(*ebpf.CollectionSpec)) *Maps {
	t.Helper()
	needRoot(t)
	spec, err := bpf.LoadLace()
	must(t, err)
	spec.Programs = nil
	change(spec)
	coll, err := ebpf.NewCollection(spec)
	must(t, err)
	t.Cleanup(coll.Close)
	m, err := New(coll.Maps)
	must(t, err)
	return m
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

// emulated says that this is the VM, whose processors are 20 to 45 times slower.
func emulated() bool { return os.Getenv("LACE_VM") != "" }

var takesLong = slow.TakesLong
