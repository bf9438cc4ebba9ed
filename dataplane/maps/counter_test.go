// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
)

// count writes what one CPU, and another where there is one, has counted.
func count(t *testing.T, m *ebpf.Map, row uint32, packets, bytes uint64) {
	t.Helper()
	cpus, err := ebpf.PossibleCPU()
	must(t, err)
	values := make([]bpf.LaceCounter, cpus)
	values[0] = bpf.LaceCounter{Packets: packets, Bytes: bytes}
	if cpus > 1 {
		values[0].Packets, values[cpus-1] = packets-1, bpf.LaceCounter{Packets: 1}
	}
	must(t, m.Put(row, values))
}

// TestCounters: a node's sums, and what of them is known of each network of the active generation.
func TestCounters(t *testing.T) {
	m := newMaps(t)
	must(t, m.generation.Put(uint32(0), uint32(7))) // slot 1
	must(t, m.Networks.Put(Scope(100, 1), bpf.LaceNetwork{Traffic: 3}))
	must(t, m.Networks.Put(Scope(200, 1), bpf.LaceNetwork{Traffic: 1024}))
	must(t, m.Networks.Put(Scope(300, 0), bpf.LaceNetwork{Traffic: 5})) // of the generation before
	must(t, m.Networks.Put(Scope(400, 1), bpf.LaceNetwork{}))           // has no number
	const encapsulated, local = uint32(bpf.LaceReasonREASON_ENCAPSULATED), uint32(bpf.LaceReasonREASON_LOCAL)
	count(t, m.traffic, 3*trafficReasons+encapsulated, 10, 1000)
	count(t, m.traffic, 3*trafficReasons+local, 5, 500)
	count(t, m.traffic, 1024*trafficReasons+encapsulated, 2, 200)
	count(t, m.traffic, 5*trafficReasons+encapsulated, 7, 700)
	count(t, m.traffic, 0*trafficReasons+local, 9, 900)
	count(t, m.counters, uint32(bpf.LaceReasonREASON_NO_ROUTE), 4, 400)
	count(t, m.counters, 120, 6, 600) // of a newer agent's programs
	must(t, m.refusals.Put(bpf.LaceRefusalKey{Network: 100, Reason: uint32(bpf.LaceReasonREASON_NO_ROUTE)}, bpf.LaceCounter{Packets: 3, Bytes: 300}))
	must(t, m.refusals.Put(bpf.LaceRefusalKey{Reason: uint32(bpf.LaceReasonREASON_UNKNOWN_SOURCE)}, bpf.LaceCounter{Packets: 1, Bytes: 100}))

	node, err := m.Counters()
	must(t, err)
	if want := []Counter{
		{bpf.LaceReasonREASON_ENCAPSULATED, 19, 1900}, {bpf.LaceReasonREASON_LOCAL, 14, 1400}, {bpf.LaceReasonREASON_NO_ROUTE, 4, 400}, {120, 6, 600},
	}; !slices.Equal(node, want) {
		t.Errorf("the node's counters are %v, want %v", node, want)
	}
	networks, err := m.NetworkCounters()
	must(t, err)
	if want := []NetworkCounter{
		{0, Counter{bpf.LaceReasonREASON_ENCAPSULATED, 7, 700}},
		{0, Counter{bpf.LaceReasonREASON_LOCAL, 9, 900}},
		{0, Counter{bpf.LaceReasonREASON_UNKNOWN_SOURCE, 1, 100}},
		{100, Counter{bpf.LaceReasonREASON_ENCAPSULATED, 10, 1000}},
		{100, Counter{bpf.LaceReasonREASON_LOCAL, 5, 500}},
		{100, Counter{bpf.LaceReasonREASON_NO_ROUTE, 3, 300}},
		{200, Counter{bpf.LaceReasonREASON_ENCAPSULATED, 2, 200}},
	}; !slices.Equal(networks, want) {
		t.Errorf("the networks' counters are\n%v, want\n%v", networks, want)
	}
	m.traffic.Close()
	if _, err := m.Counters(); err == nil || !strings.Contains(err.Error(), "read row 0 of map traffic") {
		t.Errorf("of a closed table: %v", err)
	}
}
