// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
)

// What a packet costs in a program, by the clock of BPF_PROG_TEST_RUN. Each run is one packet: the kernel would repeat the program
// on what came out of it. The figures are ns of the median run, and its ratio to a program that does nothing, which
// runs in turn with it: the one that can be compared between machines.
//
//	go test -run '^$' -bench . ./bpf/

// trial is a packet at a program.
type trial struct {
	n       *node
	program string
	dev     int
	frame   []byte
	verdict uint32
}

// testRun is what the kernel takes and gives in union bpf_attr for BPF_PROG_TEST_RUN, as far as it is used.
type testRun struct {
	fd, verdict, sizeIn, sizeOut uint32
	in, out                      uint64
	repeat, nanoseconds          uint32
	ctxSizeIn, ctxSizeOut        uint32
	ctxIn, ctxOut                uint64
	flags, cpu, batch, pad       uint32
}

// run runs the program once and says how many nanoseconds it took.
func (r trial) run(b *testing.B) float64 {
	b.Helper()
	skb := skContext(r.n.bed.index[r.dev], 0)
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&r.frame[0])
	pin.Pin(&skb[0])
	attr := testRun{
		fd: uint32(r.n.coll.Programs[r.program].FD()), repeat: 1, sizeIn: uint32(len(r.frame)), in: uint64(uintptr(unsafe.Pointer(&r.frame[0]))),
		ctxSizeIn: uint32(len(skb)), ctxIn: uint64(uintptr(unsafe.Pointer(&skb[0]))),
	}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 || attr.verdict != r.verdict {
		b.Fatalf("program %s: verdict %d, want %d (errno %v)", r.program, int32(attr.verdict), int32(r.verdict), errno)
	}
	return float64(attr.nanoseconds)
}

// measure runs a trial b.N times, each time after next, in turn with an empty program.
func measure(b *testing.B, r trial, next func(i int)) {
	b.Helper()
	empty := trial{n: r.n, program: "probe_empty", dev: r.dev, frame: slices.Clone(r.frame), verdict: ok}
	took, none := make([]float64, 0, b.N), make([]float64, 0, b.N)
	must(b, r.n.bed.in(func() error { // the interfaces are those of that thread's namespace
		b.ResetTimer()
		for i := range b.N {
			next(i)
			took, none = append(took, r.run(b)), append(none, empty.run(b))
		}
		return nil
	}))
	ns, base := median(took), median(none)
	b.ReportMetric(0, "ns/op") // that of the system call says nothing
	b.ReportMetric(ns, "ns/packet")
	b.ReportMetric(ns/base, "x-empty")
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

func keepFrame(int) {}

// BenchmarkEstablished: the short path of the entry programs.
func BenchmarkEstablished(b *testing.B) {
	p := newPair(b)
	n := p.nodes[1]
	_, err := n.maps.SyncFlows(4096)
	must(b, err)
	for name, v6 := range map[string]bool{"v4": false, "v6": true} {
		remote := talk{pair: p, a: web1, b: web2, v6: v6, protocol: protoTCP, aport: 40000, bport: 80}
		local := remote
		local.b = near1
		for _, line := range handshake {
			remote.step(line)
			local.step(line)
		}
		_, out := remote.tcpSegment("a", "A", 1001, 5001, 10)
		_, in := remote.tcpSegment("b", "A", 5001, 1001, 10)
		_, beside := local.tcpSegment("a", "A", 1001, 5001, 10)
		for where, r := range map[string]trial{
			"pod_l3 to another node": {n, "pod_l3", podA, fromA(out), redirect},
			"pod_l3 on the node":     {n, "pod_l3", podA, fromA(beside), redirect},
			"uplink":                 {n, "uplink", uplink, fromUnderlay(outerOf(in, backend, 2, backend, 0)), redirect},
		} {
			b.Run(where+", "+name, func(b *testing.B) { measure(b, r, keepFrame) })
		}
	}
}

// BenchmarkNewFlow: all stages and both entries; the ports of each packet are others.
func BenchmarkNewFlow(b *testing.B) {
	n := newPair(b).nodes[1]
	_, err := n.maps.SyncFlows(200000)
	must(b, err)
	b.Cleanup(n.dropFlows)
	for name, row := range map[string]struct {
		r     trial
		ports int // offset
	}{
		"pod_l3 to another node":    {trial{n, "pod_l3", podA, fromA(udp(web1.addr(false), web2.addr(false), 1, 2, 10)), redirect}, 34},
		"pod_l3 on the node":        {trial{n, "pod_l3", podA, fromA(udp(web1.addr(false), near1.addr(false), 1, 2, 10)), redirect}, 34},
		"pod_l3 by a peering":       {trial{n, "pod_l3", podA, fromA(udp(web1.addr(false), db2.addr(false), 1, 2, 10)), redirect}, 34},
		"uplink":                    {trial{n, "uplink", uplink, fromUnderlay(overlay(udp(web2.addr(false), web1.addr(false), 1, 2, 10))), redirect}, 74},
		"pod_l3, refused: no route": {trial{n, "pod_l3", podA, fromA(udp(web1.addr(false), netip.MustParseAddr("192.0.2.1"), 1, 2, 10)), redirect}, 34},
	} {
		b.Run(name, func(b *testing.B) {
			n.t = b
			measure(b, row.r, func(i int) {
				if i%100000 == 0 {
					n.dropFlows()
				}
				if i%40 == 0 {
					n.forget() // the answers to the sender are rationed
				}
				binary.BigEndian.PutUint32(row.r.frame[row.ports:], uint32(i))
			})
		})
	}
}

// BenchmarkLookUp: the short path among a thousand entries and among a million, the flows drawn at random.
func BenchmarkLookUp(b *testing.B) {
	n := newPair(b).nodes[1]
	_, err := n.maps.SyncFlows(500000)
	must(b, err)
	g, err := n.maps.Generation()
	must(b, err)
	flow := bpf.LaceFlow{Network: uint32(backend), Generation: g, State: uint8(stateEstablished), Peer: 2, Line: backendLine, Mtu: podMTU}
	flow.Sid.U8 = locatorOf(2, 48).SID(20, backend).As16()
	frame := fromA(udp(web1.addr(false), web2.addr(false), 1, 2, 10))
	for _, entries := range []int{1000, 1000000} {
		b.Run(fmt.Sprint(entries, " entries"), func(b *testing.B) {
			n.t = b
			n.fillWith(entries, flow)
			random := rand.New(rand.NewPCG(1, 2))
			measure(b, trial{n, "pod_l3", podA, frame, redirect}, func(int) {
				binary.BigEndian.PutUint32(frame[34:], uint32(random.IntN(entries)))
			})
		})
	}
}

// fillWith makes the table hold so many flows from podA to its twin, by their ports.
func (n *node) fillWith(entries int, flow bpf.LaceFlow) {
	n.t.Helper()
	keys, values := make([]bpf.LaceFlowKey, entries), make([]bpf.LaceFlow, entries)
	for i := range keys {
		keys[i], values[i] = flowKey(backend, web1.addr(false), web2.addr(false), protoUDP, uint16(i>>16), uint16(i)), flow
	}
	table := n.table()
	defer table.Close()
	_, err := table.BatchUpdate(keys, values, nil)
	must(n.t, err)
}
