// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/tests/slow"
)

// spares are loaded programs that no test has now, by how they decapsulate. The verifier would take most of the time of
// these tests where processors are emulated; a new node gets them as if they had just been loaded.
var spares = map[uint8][]*ebpf.Collection{}

func takeSpare(t testing.TB, byFlags uint8) *ebpf.Collection {
	t.Helper()
	var coll *ebpf.Collection
	if last := len(spares[byFlags]) - 1; last >= 0 {
		coll, spares[byFlags] = spares[byFlags][last], spares[byFlags][:last]
		wipe(t, coll)
	} else {
		spec := loadSpec(t)
		must(t, spec.Variables["decap_by_flags"].Set(byFlags))
		coll = load(t, spec)
	}
	t.Cleanup(func() { spares[byFlags] = append(spares[byFlags], coll) })
	return coll
}

// rowsWiped are those of the large arrays that a node of the fixture may have used: of peers, and of networks.
const rowsWiped = 16

// wipe makes tables what they were when they were loaded.
func wipe(t testing.TB, coll *ebpf.Collection) {
	t.Helper()
	for _, m := range coll.Maps {
		switch m.Type() {
		case ebpf.Hash, ebpf.LRUHash, ebpf.LPMTrie:
			empty(t, m)
		}
	}
	table, err := ebpf.NewMap(loadSpec(t).Maps["flows"].InnerMap)
	must(t, err)
	must(t, coll.Maps["flows"].Put(uint32(0), table))
	must(t, table.Close()) // the outer map keeps it
	must(t, coll.Maps["generation"].Put(uint32(0), uint32(0)))
	must(t, coll.Maps["heartbeat"].Put(uint32(0), uint64(0)))
	must(t, coll.Maps["this_host"].Put(uint32(0), bpf.LaceHost{}))
	for slot := range uint32(2) {
		must(t, coll.Maps["node_config"].Put(slot, bpf.LaceConfig{}))
		for i := range uint32(rowsWiped) {
			must(t, coll.Maps["nexthops"].Put(slot*coll.Maps["nexthops"].MaxEntries()/2+i, bpf.LaceNexthop{}))
		}
	}
	cpus := ebpf.MustPossibleCPU()
	for i := range uint32(bpf.LaceReasonREASON_MAX) {
		must(t, coll.Maps["counters"].Put(i, make([]bpf.LaceCounter, cpus)))
	}
	for i := range uint32(rowsWiped * trafficReasons) {
		must(t, coll.Maps["traffic"].Put(i, make([]bpf.LaceCounter, cpus)))
	}
	must(t, coll.Maps["contexts"].Put(uint32(0), make([]bpf.LaceContext, cpus)))
	must(t, coll.Maps["event_budgets"].Put(uint32(0), make([]bpf.LaceEventBudget, cpus)))
	forgetEvents(t, coll.Maps["events"])
}

func empty(t testing.TB, m *ebpf.Map) {
	t.Helper()
	for {
		key, err := m.NextKeyBytes(nil)
		must(t, err)
		if key == nil {
			return
		}
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Fatal(err)
		}
	}
}

func forgetEvents(t testing.TB, m *ebpf.Map) {
	t.Helper()
	r, err := ringbuf.NewReader(m)
	must(t, err)
	defer r.Close()
	r.SetDeadline(time.Unix(0, 1)) // what is there, without waiting
	for {
		if _, err := r.Read(); errors.Is(err, os.ErrDeadlineExceeded) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// decidedByNoKernel is for long tables about what the programs make of packets: the kernel has no part in that once the verifier
// has let them in.
var decidedByNoKernel = slow.TakesLong
