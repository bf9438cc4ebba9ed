// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/topology"
)

// collect runs the collector as if it were some tick.
func (n *node) collect(in bpf.LaceCollection) (out bpf.LaceCollection) {
	n.t.Helper()
	rc, err := n.coll.Programs["collect"].Run(&ebpf.RunOptions{Context: in, ContextOut: &out})
	must(n.t, err)
	if rc != 0 {
		n.t.Fatalf("collect returned %d", int32(rc))
	}
	return out
}

// flowPair are the entries of a flow, of a network, protocol and state, seen at two ticks.
type flowPair struct {
	network, to topology.NetworkID
	src, dst    netip.Addr
	protocol    uint8
	port        uint16
	state       bpf.LaceFlowState
	seen, back  uint32
}

// keys are those of both directions.
func (f flowPair) keys() (there, back bpf.LaceFlowKey) {
	switch f.protocol {
	case protoICMP, protoICMP6:
		kind := map[uint8]uint16{protoICMP: 8, protoICMP6: 128}[f.protocol]
		return flowKey(f.network, f.src, f.dst, f.protocol, f.port, kind), flowKey(f.to, f.dst, f.src, f.protocol, f.port, answerType[kind])
	}
	return flowKey(f.network, f.src, f.dst, f.protocol, f.port, 80), flowKey(f.to, f.dst, f.src, f.protocol, 80, f.port)
}

func (f flowPair) rows() map[bpf.LaceFlowKey]bpf.LaceFlow {
	there, back := f.keys()
	return map[bpf.LaceFlowKey]bpf.LaceFlow{
		there: {Network: uint32(f.to), Seen: f.seen, State: uint8(f.state)},
		back:  {Network: uint32(f.network), Seen: f.back, State: uint8(f.state), Flags: uint16(bpf.LaceFlowFlagsFLOW_REPLY)},
	}
}

func (n *node) put(rows map[bpf.LaceFlowKey]bpf.LaceFlow) {
	n.t.Helper()
	table := n.table()
	defer table.Close()
	for k, v := range rows {
		must(n.t, table.Put(k, v))
	}
}

// someFlow is a flow of network 100, idle since tick seen.
func someFlow(protocol uint8, state bpf.LaceFlowState, seen uint32) flowPair {
	f := flowPair{network: backend, to: backend, src: a4, dst: far4, protocol: protocol, port: 4000, state: state, seen: seen, back: seen}
	if protocol == protoICMP6 {
		f.src, f.dst = a6, far6
	}
	return f
}

const (
	stateNew         = bpf.LaceFlowStateFLOW_NEW
	stateAnswered    = bpf.LaceFlowStateFLOW_ANSWERED
	stateEstablished = bpf.LaceFlowStateFLOW_ESTABLISHED
	stateClosing     = bpf.LaceFlowStateFLOW_CLOSING
	stateClosed      = bpf.LaceFlowStateFLOW_CLOSED
)

// limits are how long flows may be idle. pressed: while the table is nearly full.
var limits = []struct {
	protocol uint8
	state    bpf.LaceFlowState
	limit    time.Duration
	pressed  uint32 // ticks; 0: no less
}{
	{protoTCP, stateNew, timeouts.TCPOpening, 16}, {protoTCP, stateAnswered, timeouts.TCPOpening, 16}, {protoTCP, stateEstablished, timeouts.TCPEstablished, 0},
	{protoTCP, stateClosing, timeouts.TCPClosing, 0}, {protoTCP, stateClosed, timeouts.TCPClosed, 2},
	{protoUDP, stateNew, timeouts.UDPNew, 16}, {protoUDP, stateEstablished, timeouts.UDP, 0},
	{protoICMP, stateNew, timeouts.ICMP, 16}, {protoICMP, stateEstablished, timeouts.ICMP, 0}, {protoICMP6, stateNew, timeouts.ICMP, 16},
	{protoICMP6, stateEstablished, timeouts.ICMP, 0}, {47, stateNew, timeouts.Other, 16}, {47, stateEstablished, timeouts.Other, 0},
	{132, stateEstablished, timeouts.Other, 0},
}

// TestCollectIdle: a flow goes at the very tick that its state and protocol allow, not before; also where ticks wrap.
func TestCollectIdle(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	for _, row := range limits {
		for _, pressure := range []uint32{0, 1} {
			limit := maps.Ticks(row.limit)
			if pressure == 1 && row.pressed != 0 {
				limit = row.pressed
			}
			for _, now := range []uint32{1 << 20, 3, limit + 2} {
				t.Run(fmt.Sprintf("protocol %d, %s, pressure %d, tick %d", row.protocol, maps.FlowStateName(row.state), pressure, now), func(t *testing.T) {
					n := n.on(t)
					for idle, gone := range map[uint32]bool{limit - 1: false, limit: true, limit + 1: true, 0: false, ^uint32(0): false} {
						n.dropFlows()
						n.put(someFlow(row.protocol, row.state, now-idle).rows())
						out := n.collect(bpf.LaceCollection{Now: now, Pressure: pressure})
						wantCollected(t, n, out, map[bool]uint32{true: 2}[gone], map[bpf.LaceFlowState]uint32{row.state: map[bool]uint32{false: 2}[gone]})
					}
				})
			}
		}
	}
}

// wantCollected compares the collector's counts, and the table with them.
func wantCollected(t testing.TB, n *node, got bpf.LaceCollection, collected uint32, states map[bpf.LaceFlowState]uint32) {
	t.Helper()
	var entries uint32
	var want [5]uint32
	for state, count := range states {
		want[state] = count
		entries += count
	}
	if got.Collected != collected || got.States != want || got.Entries != entries {
		t.Errorf("collected %d, %d stay, by state %v; want %d, %d, %v", got.Collected, got.Entries, got.States, collected, entries, want)
	}
	if rows := len(n.flows()); rows != int(entries) {
		t.Errorf("the table has %d entries, want %d", rows, entries)
	}
}

// TestCollectPairs: as long as one direction is in use both stay; one without the other is judged alone.
func TestCollectPairs(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	const now, old = 1 << 20, 1
	for name, row := range map[string]struct {
		seen, back   uint32
		alone        bool
		stay, remove uint32
	}{
		"both in use":     {now, now, false, 2, 0},
		"one way":         {now, old, false, 2, 0},
		"the other way":   {old, now, false, 2, 0},
		"none":            {old, old, false, 0, 2},
		"alone, in use":   {now, 0, true, 1, 0},
		"alone, not used": {old, 0, true, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			n := n.on(t)
			n.dropFlows()
			f := someFlow(protoUDP, stateEstablished, row.seen)
			f.back = row.back
			rows := f.rows()
			if _, back := f.keys(); row.alone {
				delete(rows, back)
			}
			n.put(rows)
			wantCollected(t, n, n.collect(bpf.LaceCollection{Now: now}), row.remove, map[bpf.LaceFlowState]uint32{stateEstablished: row.stay})
		})
	}
}

// TestCollectShortTimeouts: pressure never makes a flow stay longer than the topology says.
func TestCollectShortTimeouts(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	p := *n.plan
	p.Conntrack.TCPClosed, p.Conntrack.UDPNew = time.Second, 3*time.Second
	n.sync(&p)
	const now = 1 << 20
	n.put(someFlow(protoTCP, stateClosed, now-1).rows())
	n.put(someFlow(protoUDP, stateNew, now-3).rows())
	n.put(someFlow(protoICMP, stateNew, now-3).rows())
	wantCollected(t, n, n.collect(bpf.LaceCollection{Now: now, Pressure: 1}), 4, map[bpf.LaceFlowState]uint32{stateNew: 2})
}

// TestCollectAll: whatever the age, what the filter takes.
func TestCollectAll(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	addr := func(a netip.Addr) (c bpf.LaceCollection) { c.Addr.U8 = a.As16(); return c }
	both := addr(db2.addr(false))
	both.Network = uint32(overlap)
	for name, row := range map[string]struct {
		filter    bpf.LaceCollection
		collected uint32
	}{
		"all":                             {bpf.LaceCollection{}, 10},
		"a network, from and to it":       {bpf.LaceCollection{Network: uint32(db)}, 4},
		"a network alone":                 {bpf.LaceCollection{Network: uint32(overlap)}, 2},
		"a network that has none":         {bpf.LaceCollection{Network: uint32(elsewhere)}, 0},
		"an address":                      {addr(a4), 6},
		"an address, the other side's":    {addr(db2.addr(false)), 2},
		"an IPv6 address":                 {addr(a6), 2},
		"an address that has none":        {addr(gw4), 0},
		"a network and an address, apart": {both, 0},
	} {
		t.Run(name, func(t *testing.T) {
			n := n.on(t)
			n.dropFlows()
			for _, f := range []flowPair{
				{backend, backend, a4, far4, protoTCP, 1, stateEstablished, 9, 9}, {backend, db, a4, db2.addr(false), protoTCP, 1, stateClosing, 9, 9},
				{overlap, overlap, a4, far4, protoTCP, 1, stateNew, 9, 9}, {db, db, db1.addr(false), dbSubnet4(2, 99), protoUDP, 1, stateNew, 9, 9},
				{backend, backend, a6, far6, protoICMP6, 1, stateEstablished, 9, 9},
			} {
				n.put(f.rows())
			}
			row.filter.Now, row.filter.All = 9, 1
			out := n.collect(row.filter)
			if out.Collected != row.collected || out.Entries != 10-row.collected || len(n.flows()) != int(out.Entries) {
				t.Errorf("collected %d, %d stay, %d are there; want %d collected", out.Collected, out.Entries, len(n.flows()), row.collected)
			}
		})
	}
}

// TestCollectTime collects from large tables. The bound is far above what is measured, so that a busy machine does not fail.
func TestCollectTime(t *testing.T) {
	decidedByNoKernel(t) // a million flows
	n := newNode(t, newBed(t), options{number: 1})
	for _, entries := range []int{1000, 1000000} {
		n.fill(entries, 1<<20)
		for _, row := range []struct {
			name string
			in   bpf.LaceCollection
			gone int
		}{
			{"nothing is idle", bpf.LaceCollection{Now: 1 << 20}, 0},
			{"half is idle", bpf.LaceCollection{Now: 1<<20 + maps.Ticks(timeouts.UDP)}, entries / 2},
			{"all are deleted", bpf.LaceCollection{Now: 1 << 20, All: 1}, entries / 2},
		} {
			began := time.Now()
			out := n.collect(row.in)
			took := time.Since(began)
			t.Logf("%7d entries, %-15s %v", entries, row.name+":", took)
			if int(out.Collected) != row.gone || took > 2*time.Second {
				t.Errorf("%d entries, %s: %d collected in %v, want %d in less than 2 s", entries, row.name, out.Collected, took, row.gone)
			}
		}
	}
}

// fill makes the table as large as it has to be and fills it: one half are flows of UDP, the other of TCP, all established.
func (n *node) fill(entries int, seen uint32) {
	n.t.Helper()
	_, err := n.maps.SyncFlows(max(entries/2, 1024))
	must(n.t, err)
	keys, values := make([]bpf.LaceFlowKey, 0, entries), make([]bpf.LaceFlow, 0, entries)
	for i := 0; len(keys) < entries; i++ {
		f := someFlow([]uint8{protoUDP, protoTCP}[i%2], stateEstablished, seen)
		f.src, f.port = netip.AddrFrom4([4]byte{10, 41, byte(i >> 16), byte(i >> 8)}), uint16(i)
		for k, v := range f.rows() {
			keys, values = append(keys, k), append(values, v)
		}
	}
	table := n.table()
	defer table.Close()
	_, err = table.BatchUpdate(keys, values, nil)
	must(n.t, err)
}
