// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"errors"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
)

func TestTicks(t *testing.T) {
	for d, want := range map[time.Duration]uint32{
		0: 1, 1: 1, time.Second: 1, 1 << 30: 1, 1<<30 + 1: 2, time.Minute: 56, 7440 * time.Second: 6930, 1<<63 - 1: 1<<32 - 1, -time.Second: 1,
	} {
		if got := Ticks(d); got != want {
			t.Errorf("%v are %d ticks, want %d", d, got, want)
		}
	}
}

// TestFlowTableIsThatOfC: the agent's table takes the place of the one in the object.
func TestFlowTableIsThatOfC(t *testing.T) {
	spec, err := bpf.LoadLace()
	must(t, err)
	inner := spec.Maps["flows"].InnerMap
	if inner == nil || inner.Type != ebpf.Hash || inner.Flags != 0 || uintptr(inner.KeySize) != reflect.TypeFor[bpf.LaceFlowKey]().Size() ||
		uintptr(inner.ValueSize) != reflect.TypeFor[bpf.LaceFlow]().Size() {
		t.Errorf("the inner map of flows is %+v", inner)
	}
}

// flowRows are both directions of a UDP flow with a number.
func flowRows(number, seen uint32) (keys [2]bpf.LaceFlowKey, values [2]bpf.LaceFlow) {
	k := bpf.LaceFlowKey{Network: 100, Sport: 1000, Dport: 2000, Protocol: 17}
	k.Src.U8[0] = 1
	binary.BigEndian.PutUint32(k.Dst.U8[4:], number)
	v := bpf.LaceFlow{Packets: uint64(number) + 1, Since: 1, Seen: seen, Network: 200, State: uint8(bpf.LaceFlowStateFLOW_ESTABLISHED)}
	answer := v
	answer.Network, answer.Flags = 100, uint16(bpf.LaceFlowFlagsFLOW_REPLY)
	return [2]bpf.LaceFlowKey{k, partner(k, 200)}, [2]bpf.LaceFlow{v, answer}
}

func addFlow(t testing.TB, table *ebpf.Map, number, seen uint32) {
	t.Helper()
	keys, values := flowRows(number, seen)
	for i := range keys {
		must(t, table.Put(keys[i], values[i]))
	}
}

// hasFlow counts the directions of a flow that are there and as they were.
func hasFlow(t testing.TB, table *ebpf.Map, number, seen uint32) (n int) {
	t.Helper()
	keys, values := flowRows(number, seen)
	for i := range keys {
		var v bpf.LaceFlow
		if err := table.Lookup(keys[i], &v); err == nil && v == values[i] {
			n++
		}
	}
	return n
}

func openFlows(t testing.TB, m *Maps) *ebpf.Map {
	t.Helper()
	table, err := m.OpenFlows()
	must(t, err)
	t.Cleanup(func() { table.Close() })
	return table
}

func resize(t testing.TB, m *Maps, flows int, want Resized) *ebpf.Map {
	t.Helper()
	done, err := m.SyncFlows(flows)
	must(t, err)
	if done != want {
		t.Errorf("SyncFlows(%d) did %+v, want %+v", flows, done, want)
	}
	table := openFlows(t, m)
	if table.MaxEntries() != uint32(2*flows) {
		t.Errorf("the table has %d rows, want %d", table.MaxEntries(), 2*flows)
	}
	return table
}

func TestSyncFlows(t *testing.T) {
	m := newMaps(t)
	table := resize(t, m, 3000, Resized{Resized: true}) // in place of the object's own
	for i := range uint32(1000) {
		addFlow(t, table, i, i)
	}
	resize(t, m, 3000, Resized{})
	resize(t, m, 5000, Resized{Resized: true, Kept: 2000})
	table = resize(t, m, 1000, Resized{Resized: true, Kept: 2000})
	for i := range uint32(1000) {
		if hasFlow(t, table, i, i) != 2 {
			t.Fatalf("flow %d is not as it was", i)
		}
	}
	table = resize(t, m, 600, Resized{Resized: true, Kept: 1200, LeftOut: 800})
	for i := range uint32(1000) {
		if want := 2 * btoi(i >= 400); hasFlow(t, table, i, i) != want {
			t.Fatalf("flow %d, seen at tick %d: %d rows, want %d: those that were quiet longest go", i, i, hasFlow(t, table, i, i), want)
		}
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestShrinkWithinATick: flows go as a whole where all were seen at the same time, or one direction long before.
func TestShrinkWithinATick(t *testing.T) {
	m := newMaps(t)
	table := resize(t, m, 2000, Resized{Resized: true})
	for i := range uint32(1000) {
		keys, values := flowRows(i, 7)
		if i%3 == 0 {
			masquerade(&keys, &values)
		}
		values[1].Seen = 7 - i%2
		must(t, table.Put(keys[0], values[0]))
		must(t, table.Put(keys[1], values[1]))
	}
	table = resize(t, m, 300, Resized{Resized: true, Kept: 600, LeftOut: 1400})
	rows := map[bpf.LaceFlowKey]bpf.LaceFlow{}
	must(t, eachRow(table, func(k bpf.LaceFlowKey, f bpf.LaceFlow) error {
		rows[k] = f
		return nil
	}))
	for k, f := range rows {
		if _, ok := rows[answerKey(k, f)]; !ok {
			t.Fatalf("half of a flow was left: %+v", k)
		}
	}
	if len(rows) != 600 {
		t.Errorf("%d rows, want 600", len(rows))
	}
}

// masquerade makes a flow one that leaves the overlay as somebody else.
func masquerade(keys *[2]bpf.LaceFlowKey, values *[2]bpf.LaceFlow) {
	const outside = 0xfffffe
	translated := uint16(bpf.LaceFlowFlagsFLOW_TRANSLATED)
	setRewrite(&values[1], partner(keys[0], 0))
	become := keys[0]
	become.Src.U8[15], become.Sport = 0xfe, keys[0].Sport^0xffff
	setRewrite(&values[0], become)
	values[0].Network, values[0].Flags, values[1].Flags = outside, values[0].Flags|translated, values[1].Flags|translated
	keys[1] = partner(become, outside)
}

// TestResizeMeanwhile changes the size while flows are made and get on: what is there when a move begins is there after it.
func TestResizeMeanwhile(t *testing.T) {
	takesLong(t)
	m := newMaps(t)
	must(t, m.InitFlows())
	resize(t, m, 20000, Resized{Resized: true})
	stop := make(chan struct{})
	var made uint32
	var seen [9000]uint32 // by flow
	var writing sync.WaitGroup
	writing.Go(func() { // as programs do: into the table that is in use now
		for ; ; made++ {
			select {
			case <-stop:
				return
			default:
			}
			if made >= 9000 {
				continue
			}
			table, err := m.OpenFlows()
			if err != nil {
				t.Error(err)
				return
			}
			if seen[made], err = flowTick(); err != nil {
				t.Error(err)
			}
			addFlow(t, table, made, seen[made])
			table.Close()
		}
	})
	for i := range 20 {
		_, err := m.SyncFlows(10000 + 1000*(i%2))
		must(t, err)
	}
	close(stop)
	writing.Wait()
	table, lost := openFlows(t, m), 0
	for i := range min(made, 9000) {
		if hasFlow(t, table, i, seen[i]) != 2 {
			lost++
		}
	}
	// At each change one flow may be written to a table after it was left: the kernel waits for programs only.
	t.Logf("%d flows made, %d lost", min(made, 9000), lost)
	if lost > 20 {
		t.Errorf("%d of %d flows were lost", lost, min(made, 9000))
	}
}

// TestCatchUp: of a row that is in both tables the state that got on counts.
func TestCatchUp(t *testing.T) {
	needRoot(t)
	from, err := newFlows(10)
	must(t, err)
	defer from.Close()
	to, err := newFlows(10)
	must(t, err)
	defer to.Close()
	keys, values := flowRows(1, 100)
	k, row := keys[0], values[0]
	for name, test := range map[string]struct{ old, new, want func(*bpf.LaceFlow) }{
		"got on in the old table": {func(f *bpf.LaceFlow) { f.State = 2 }, func(f *bpf.LaceFlow) { f.State = 0 }, func(f *bpf.LaceFlow) { f.State = 2 }},
		"got on in the new table": {func(f *bpf.LaceFlow) { f.State = 0 }, func(f *bpf.LaceFlow) { f.State = 2 }, func(f *bpf.LaceFlow) { f.State = 2 }},
		"another flow since":      {func(f *bpf.LaceFlow) { f.State = 4 }, func(f *bpf.LaceFlow) { f.State, f.Since = 0, 9 }, func(f *bpf.LaceFlow) { f.State, f.Since = 0, 9 }},
	} {
		old, new, want := row, row, row
		test.old(&old)
		test.new(&new)
		test.want(&want)
		must(t, from.Put(k, old))
		must(t, to.Put(k, new))
		must(t, (&mover{from: from, to: to}).copyLate(100))
		var have bpf.LaceFlow
		must(t, to.Lookup(k, &have))
		if have != want {
			t.Errorf("%s: %+v, want %+v", name, have, want)
		}
	}
}

func TestFlowsOfNoDataPlane(t *testing.T) {
	m := newMapsWith(t, func(spec *ebpf.CollectionSpec) { spec.Maps["flows"].Contents = nil })
	if _, err := m.OpenFlows(); err == nil || !errors.Is(err, ebpf.ErrKeyNotExist) || !strings.Contains(err.Error(), "start the agent") {
		t.Errorf("OpenFlows: %v", err)
	}
	must(t, m.InitFlows())
	first := openFlows(t, m)
	addFlow(t, first, 1, 1)
	must(t, m.InitFlows())
	if hasFlow(t, openFlows(t, m), 1, 1) != 2 {
		t.Error("InitFlows replaced a table")
	}
	if _, err := m.Collect(nil, Collection{}); err == nil || !strings.Contains(err.Error(), "collect is not loaded") {
		t.Errorf("Collect without a program: %v", err)
	}
}

// TestLargeTable moves a million rows. It says how long that takes.
func TestLargeTable(t *testing.T) {
	flows := uint32(500000)
	if testing.Short() {
		flows = 20000
	}
	m := newMaps(t)
	table := resize(t, m, int(flows), Resized{Resized: true})
	keys, values := make([]bpf.LaceFlowKey, 0, batch), make([]bpf.LaceFlow, 0, batch)
	for i := range flows {
		k, v := flowRows(i, 1)
		keys, values = append(keys, k[:]...), append(values, v[:]...)
		if len(keys) == batch || i == flows-1 {
			_, err := table.BatchUpdate(keys, values, nil)
			must(t, err)
			keys, values = keys[:0], values[:0]
		}
	}
	began := time.Now()
	resize(t, m, int(flows)+1000, Resized{Resized: true, Kept: int(2 * flows)})
	t.Logf("%d rows moved in %v", 2*flows, time.Since(began))
}
