// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/topology"
)

// Collection says what a run of the collector removes from the table of flows: what is idle for longer than its state allows.
type Collection struct {
	Pressure bool               // closed flows and unanswered ones go early
	All      bool               // whatever the age: all that the rest takes
	Network  topology.NetworkID // only flows from or to it; 0: any
	Addr     netip.Addr         // only flows from or to it; invalid: any
}

// Collected is what a run of the collector found. Each direction of a flow counts.
type Collected struct {
	Room    int   // rows that the table has
	Entries int   // that stay
	Removed int   // that went
	States  []int // that stay, by bpf.LaceFlowState
	Took    time.Duration
}

// Collect runs the collector in the kernel, where a million rows take no more than a fifth of a second and packets go on
// meanwhile. It waits for a table that is being replaced, so that no row comes back. Without an agent nothing is collected: a
// table that gets full then refuses new flows, and those that it holds live on.
func (m *Maps) Collect(collector *ebpf.Program, c Collection) (Collected, error) {
	m.resizing.RLock()
	defer m.resizing.RUnlock()
	if collector == nil {
		return Collected{}, errors.New("collect idle flows: the program collect is not loaded")
	}
	table, err := m.OpenFlows()
	if err != nil {
		return Collected{}, err
	}
	defer table.Close()
	in, err := c.row()
	if err != nil {
		return Collected{}, err
	}
	began := time.Now()
	out := bpf.LaceCollection{}
	rc, err := collector.Run(&ebpf.RunOptions{Context: in, ContextOut: &out})
	if err != nil {
		return Collected{}, fmt.Errorf("run program collect: %w", err)
	}
	if rc != 0 {
		return Collected{}, fmt.Errorf("run program collect: it returned %d", int32(rc))
	}
	done := Collected{Room: int(table.MaxEntries()), Entries: int(out.Entries), Removed: int(out.Collected), Took: time.Since(began)}
	for _, n := range out.States {
		done.States = append(done.States, int(n))
	}
	return done, nil
}

func (c Collection) row() (bpf.LaceCollection, error) {
	now, err := flowTick()
	row := bpf.LaceCollection{Now: now, Network: uint32(c.Network)}
	row.Addr.U8 = addr(c.Addr).U8
	if c.Pressure {
		row.Pressure = 1
	}
	if c.All {
		row.All = 1
	}
	return row, err
}
