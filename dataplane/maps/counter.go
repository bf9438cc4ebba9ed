// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
)

// Counter is how often a reason was given.
type Counter struct {
	Reason  Reason
	Packets uint64
	Bytes   uint64 // frames as the program saw them, Ethernet header included
}

// NetworkCounter is how often a reason was given to packets of one network: that of the container on this node.
type NetworkCounter struct {
	Network uint32 // its id; 0: not known, or in the topology no more
	Counter
}

// trafficReasons is TRAFFIC_REASONS of bpf/lib/maps.h: the places that a network has in map traffic.
const trafficReasons = 16

// slotBit is where a scope has the slot: SCOPE of bpf/lib/types.h.
const slotBit = 31

// Counters reads all reasons that were given at least once on this node, in the order of the enum.
func (m *Maps) Counters() ([]Counter, error) {
	sum := tally[Reason]{}
	err := errors.Join(
		eachCounter("traffic", m.traffic, func(i uint32, c bpf.LaceCounter) { sum.add(Reason(i%trafficReasons), c) }),
		eachCounter("counters", m.counters, func(i uint32, c bpf.LaceCounter) { sum.add(Reason(i), c) }),
	)
	if err != nil {
		return nil, err
	}
	var out []Counter
	for r, c := range sum {
		out = append(out, Counter{r, c.Packets, c.Bytes})
	}
	slices.SortFunc(out, func(a, b Counter) int { return cmp.Compare(a.Reason, b.Reason) })
	return out, nil
}

// NetworkCounters reads the same by network, sorted by network and reason. Where the table of refusals was full,
// a network's sum is below the node's.
func (m *Maps) NetworkCounters() ([]NetworkCounter, error) {
	sum := tally[bpf.LaceRefusalKey]{}
	if err := m.addTraffic(sum); err != nil {
		return nil, err
	}
	refusals := Table[bpf.LaceRefusalKey, bpf.LaceCounter]{"refusals", m.refusals}
	rows, err := refusals.All()
	if err != nil {
		return nil, err
	}
	for k, c := range rows {
		sum.add(k, c)
	}
	var out []NetworkCounter
	for k, c := range sum {
		out = append(out, NetworkCounter{k.Network, Counter{Reason(k.Reason), c.Packets, c.Bytes}})
	}
	slices.SortFunc(out, func(a, b NetworkCounter) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), cmp.Compare(a.Reason, b.Reason))
	})
	return out, nil
}

// addTraffic adds what went on. Its rows are by number; the networks of the active generation tell whose that is.
func (m *Maps) addTraffic(sum tally[bpf.LaceRefusalKey]) error {
	ids, err := m.trafficNumbers()
	if err != nil {
		return err
	}
	return eachCounter("traffic", m.traffic, func(i uint32, c bpf.LaceCounter) {
		sum.add(bpf.LaceRefusalKey{Network: ids[i/trafficReasons], Reason: i % trafficReasons}, c)
	})
}

// trafficNumbers has the networks of the active slot by the number of their counters.
func (m *Maps) trafficNumbers() (map[uint32]uint32, error) {
	now, err := m.active()
	if err != nil {
		return nil, err
	}
	rows, err := m.Networks.All()
	if err != nil {
		return nil, err
	}
	ids := map[uint32]uint32{}
	for scope, row := range rows {
		if slotOfScope(scope) == now && row.Traffic != 0 {
			ids[row.Traffic] = uint32(Network(scope))
		}
	}
	return ids, nil
}

// tally sums up counters, and has no rows of what never happened.
type tally[K comparable] map[K]bpf.LaceCounter

func (t tally[K]) add(k K, c bpf.LaceCounter) {
	if c.Packets == 0 {
		return
	}
	sum := t[k]
	t[k] = bpf.LaceCounter{Packets: sum.Packets + c.Packets, Bytes: sum.Bytes + c.Bytes}
}

// eachCounter calls f with every row of a per-CPU array, summed up over the CPUs.
func eachCounter(name string, m *ebpf.Map, f func(i uint32, c bpf.LaceCounter)) error {
	for i := range m.MaxEntries() {
		var perCPU []bpf.LaceCounter
		if err := m.Lookup(i, &perCPU); err != nil {
			return fmt.Errorf("read row %d of map %s: %w", i, name, err)
		}
		var sum bpf.LaceCounter
		for _, c := range perCPU {
			sum.Packets += c.Packets
			sum.Bytes += c.Bytes
		}
		f(i, sum)
	}
	return nil
}
