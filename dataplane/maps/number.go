// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/topology"
)

// numbers is how many networks map traffic has counters for, from 1 on.
func (m *Maps) numbers() uint32 { return m.traffic.MaxEntries()/trafficReasons - 1 }

// number gives each network the number of its counters: the one that it has, or a free one.
func (w *wanted) number(have map[uint32]bpf.LaceNetwork, numbers uint32) error {
	taken := map[uint32]bool{}
	for _, row := range have {
		taken[row.Traffic] = true
	}
	w.numbers = map[topology.NetworkID]uint32{}
	var unnumbered []topology.NetworkID
	for _, id := range w.networks() {
		if n := numberOf(have, id); n != 0 {
			w.numbers[id] = n
			continue
		}
		unnumbered = append(unnumbered, id)
	}
	next := uint32(1)
	for _, id := range unnumbered {
		for taken[next] {
			next++
		}
		if next > numbers {
			return fmt.Errorf("number the counters of network %d: there are counters for %d networks, and this node is to know of %d and has %d: peer fewer, or remove some first",
				id, numbers, len(w.networks()), len(have))
		}
		w.numbers[id], taken[next] = next, true
		w.fresh = append(w.fresh, next)
	}
	return nil
}

// networks are all that get a row, by id.
func (w *wanted) networks() []topology.NetworkID {
	var ids []topology.NetworkID
	for _, n := range w.plan.Networks {
		ids = append(ids, n.ID)
	}
	for _, n := range w.plan.Foreign {
		ids = append(ids, n.ID)
	}
	for _, n := range w.plan.Externals {
		ids = append(ids, n.ID)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

func numberOf(have map[uint32]bpf.LaceNetwork, id topology.NetworkID) uint32 {
	for _, s := range []Slot{0, 1} {
		if row, ok := have[Scope(id, s)]; ok {
			return row.Traffic
		}
	}
	return 0
}

// zeroTraffic begins a network's counters anew: the network that had the number before is gone.
func (m *Maps) zeroTraffic(number uint32) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count the processors: %w", err)
	}
	for i := range uint32(trafficReasons) {
		if err := m.traffic.Put(number*trafficReasons+i, make([]bpf.LaceCounter, cpus)); err != nil {
			return fmt.Errorf("write row %d of map traffic: %w", number*trafficReasons+i, err)
		}
	}
	return nil
}
