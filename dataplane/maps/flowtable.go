// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
)

// tick is the unit of a flow's times: 2^30 ns, 1.07 s.
const tick = time.Duration(1 << 30)

// Ticks is a duration as the programs count it: rounded up, at least 1.
func Ticks(d time.Duration) uint32 {
	n := d / tick
	if d%tick > 0 {
		n++
	}
	return uint32(min(max(n, 1), math.MaxUint32))
}

// directions are the rows that a flow has.
const directions = 2

// minFlows is the table that a data plane begins with, in flows.
const minFlows = 1024

// Resized says what SyncFlows did.
type Resized struct {
	Resized bool
	Kept    int // rows that were copied, each direction of a flow counted
	LeftOut int // rows for which the new table had no room
}

// OpenFlows opens the table of flows as it is now; SyncFlows replaces it. The caller closes it.
func (m *Maps) OpenFlows() (*ebpf.Map, error) {
	var table *ebpf.Map
	err := m.flows.Lookup(uint32(0), &table)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, fmt.Errorf("open the table of flows: the data plane has none yet: start the agent: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("open the table of flows: %w", err)
	}
	return table, nil
}

// InitFlows makes a small table of flows where there is none, so that programs may run before SyncFlows.
func (m *Maps) InitFlows() error {
	table, err := m.OpenFlows()
	if err == nil {
		return table.Close()
	}
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	if table, err = newFlows(minFlows); err != nil {
		return err
	}
	defer table.Close() // the outer map keeps it
	return m.putFlows(table)
}

// newFlows makes a table for so many flows, preallocated: a packet never waits for memory. It comes from the object, types
// and all: kernels before 6.3 take an inner map with types for another one than the same without.
func newFlows(flows int) (*ebpf.Map, error) {
	object, err := bpf.LoadLace()
	if err != nil {
		return nil, fmt.Errorf("read the built-in eBPF object: %w", err)
	}
	spec := object.Maps["flows"].InnerMap.Copy()
	spec.Name, spec.MaxEntries = "flows_table", uint32(flows*directions)
	table, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("make a table for %d flows, which takes about %d MB: %w (choose a smaller max in [conntrack])",
			flows, flows*directions*bytesPerRow>>20, err)
	}
	return table, nil
}

// bytesPerRow is about what the kernel takes for a row.
const bytesPerRow = 256

func (m *Maps) putFlows(table *ebpf.Map) error {
	if err := m.flows.Put(uint32(0), table); err != nil {
		return fmt.Errorf("put a table of flows into map flows: %w", err)
	}
	return nil
}

// SyncFlows gives the table of flows room for so many. A table of another size is replaced by a new one while packets pass:
// the rows are copied, the new table becomes the one in use, and what came meanwhile is copied after it. Where there
// are more rows than fit, the flows that were seen last stay.
func (m *Maps) SyncFlows(flows int) (Resized, error) {
	m.resizing.Lock()
	defer m.resizing.Unlock()
	old, err := m.OpenFlows()
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return m.firstFlows(flows)
	}
	if err != nil {
		return Resized{}, err
	}
	defer old.Close()
	if old.MaxEntries() == uint32(flows*directions) {
		return Resized{}, nil
	}
	table, err := newFlows(flows)
	if err != nil {
		return Resized{}, err
	}
	defer table.Close()
	move := &mover{from: old, to: table}
	if err := move.all(m.putFlows); err != nil {
		return Resized{}, fmt.Errorf("move the flows to a table for %d of them: %w", flows, err)
	}
	return Resized{Resized: true, Kept: move.kept, LeftOut: move.leftOut}, nil
}

func (m *Maps) firstFlows(flows int) (Resized, error) {
	table, err := newFlows(flows)
	if err != nil {
		return Resized{}, err
	}
	defer table.Close()
	return Resized{Resized: true}, m.putFlows(table)
}

// mover brings the rows of one table of flows to another.
type mover struct {
	from, to      *ebpf.Map
	kept, leftOut int
}

// all copies the rows, has the new table put in place, and copies what came until then. The kernel returns from the replacement
// when no program uses the old table any more.
func (v *mover) all(replace func(*ebpf.Map) error) error {
	began, err := flowTick()
	if err != nil {
		return err
	}
	if err := v.copyAll(); err != nil {
		return err
	}
	if err := replace(v.to); err != nil {
		return err
	}
	return v.copyLate(began - 1) // a packet may have read the clock just before
}

// copyAll copies the rows, those that were seen last first where not all fit.
func (v *mover) copyAll() error {
	if v.to.MaxEntries() >= v.from.MaxEntries() {
		return v.copyBatches()
	}
	seen, total, err := v.histogram()
	if err != nil {
		return err
	}
	if total <= int(v.to.MaxEntries()) {
		return v.copyBatches()
	}
	return v.copyNewest(seen)
}

// copyBatches copies without a look at the rows. What came since they were counted may be too much: it is left out.
func (v *mover) copyBatches() error {
	keys, values := make([]bpf.LaceFlowKey, 0, batch), make([]bpf.LaceFlow, 0, batch)
	flush := func() error {
		n, err := v.to.BatchUpdate(keys, values, nil)
		if err != nil && !isFull(err) {
			return fmt.Errorf("write rows of the new table: %w", err)
		}
		v.kept, v.leftOut = v.kept+n, v.leftOut+len(keys)-n
		keys, values = keys[:0], values[:0]
		return nil
	}
	err := eachRow(v.from, func(k bpf.LaceFlowKey, f bpf.LaceFlow) error {
		keys, values = append(keys, k), append(values, f)
		if len(keys) < batch {
			return nil
		}
		return flush()
	})
	if err != nil || len(keys) == 0 {
		return err
	}
	return flush()
}

// histogram counts the rows by the tick when they were last seen.
func (v *mover) histogram() (seen map[uint32]int, total int, err error) {
	seen = map[uint32]int{}
	err = eachRow(v.from, func(_ bpf.LaceFlowKey, f bpf.LaceFlow) error {
		seen[f.Seen]++
		total++
		return nil
	})
	if err != nil {
		return nil, 0, fmt.Errorf("read the flows: %w", err)
	}
	return seen, total, nil
}

// copyNewest copies what fits, in two runs: the rows seen after the tick that fills the table, and then those of that tick. A
// row brings its other direction with it, so that no flow is cut in half.
func (v *mover) copyNewest(seen map[uint32]int) error {
	last := v.lastTick(seen)
	for _, takes := range []func(uint32) bool{
		func(t uint32) bool { return int32(t-last) > 0 },
		func(t uint32) bool { return t == last },
	} {
		err := eachRow(v.from, func(k bpf.LaceFlowKey, f bpf.LaceFlow) error {
			if !takes(f.Seen) {
				return nil
			}
			return v.copyPair(k, f)
		})
		if err != nil {
			return err
		}
	}
	total := 0
	for _, n := range seen {
		total += n
	}
	v.leftOut = max(total-v.kept, 0)
	return nil
}

// lastTick is the newest tick with which the table is full.
func (v *mover) lastTick(seen map[uint32]int) uint32 {
	ticks := slices.SortedFunc(maps.Keys(seen), func(a, b uint32) int { return int(int32(b - a)) })
	room := int(v.to.MaxEntries())
	for _, t := range ticks {
		if room -= seen[t]; room <= 0 {
			return t
		}
	}
	return ticks[len(ticks)-1]
}

// copyPair copies both directions of a flow, where there is room for two rows.
func (v *mover) copyPair(k bpf.LaceFlowKey, f bpf.LaceFlow) error {
	if v.kept+directions > int(v.to.MaxEntries()) {
		return nil
	}
	if err := v.insert(k, f); err != nil {
		return err
	}
	back := answerKey(k, f)
	var other bpf.LaceFlow
	err := v.from.Lookup(back, &other)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read a row of the flows: %w", err)
	}
	return v.insert(back, other)
}

// insert writes a row that is not there yet. A table that is full takes none: as a new flow it would be refused, too.
func (v *mover) insert(k bpf.LaceFlowKey, f bpf.LaceFlow) error {
	switch err := v.to.Update(k, f, ebpf.UpdateNoExist); {
	case err == nil:
		v.kept++
	case errors.Is(err, ebpf.ErrKeyExist), isFull(err):
	default:
		return fmt.Errorf("write a row of the new table: %w", err)
	}
	return nil
}

// copyLate brings the rows up to date that packets changed while they were copied. Those are known by their time.
func (v *mover) copyLate(since uint32) error {
	return eachRow(v.from, func(k bpf.LaceFlowKey, f bpf.LaceFlow) error {
		if int32(f.Seen-since) < 0 {
			return nil
		}
		return v.catchUp(k, f)
	})
}

// catchUp copies a row that came after the first copy, or whose flow got on in its states since. What the new table
// has learned of a flow by itself stays otherwise: the packets between are not counted.
func (v *mover) catchUp(k bpf.LaceFlowKey, f bpf.LaceFlow) error {
	var have bpf.LaceFlow
	err := v.to.Lookup(k, &have)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return v.insert(k, f)
	}
	if err != nil {
		return fmt.Errorf("read a row of the new table: %w", err)
	}
	if have.Since != f.Since || have.State >= f.State {
		return nil
	}
	if err := v.to.Update(k, f, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("write a row of the new table: %w", err)
	}
	return nil
}
