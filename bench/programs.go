// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// emptyProgram is what the others are compared with.
const emptyProgram = "empty"

// actRedirect is TC_ACT_REDIRECT: what a program answers when it took its packet the whole way.
const actRedirect = 7

// trial is a program with a packet that it forwards, by way of all its tail calls.
type trial struct {
	name    string
	program *ebpf.Program
	packet  []byte
	ifindex int // where it comes in; 0: the loopback
}

// programs runs all programs in turn, one packet a call, as a program must not meet the packet that it has
// already changed. The result is the median of the kernel's own timing, in ns.
func (n *node) programs(o order) (report, error) {
	trials, err := n.trials(o)
	if err != nil {
		return report{}, err
	}
	defer trials[0].program.Close()
	ns := map[string][]float64{}
	for range o.Runs {
		for _, t := range trials {
			took, err := t.run()
			if err != nil {
				return report{}, err
			}
			ns[t.name] = append(ns[t.name], took)
		}
	}
	r := report{Programs: map[string]float64{}}
	for name, samples := range ns {
		r.Programs[name] = spreadOf(samples).Median
	}
	return r, nil
}

// trials are the empty program and the entry programs, with packets between the order's container and a far one.
func (n *node) trials(o order) ([]trial, error) {
	port, ok := n.d.Attached(o.Container)
	if !ok {
		return nil, fmt.Errorf("container %s is not attached", o.Container)
	}
	far, err := netip.ParseAddr(o.Far)
	if err != nil {
		return nil, err
	}
	far6, err := netip.ParseAddr(o.Far6)
	if err != nil {
		return nil, err
	}
	sid, source, err := n.outer()
	if err != nil {
		return nil, err
	}
	empty, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, actRedirect), asm.Return()}})
	if err != nil {
		return nil, fmt.Errorf("load an empty program: %w", err)
	}
	loaded := n.d.Hooks().Collection().Programs
	pod, uplink := loaded[string(hook.PodL3)], loaded[string(hook.Uplink)]
	out4, out6 := udp(port.V4, far), udp(port.V6, far6)
	in4, in6 := udp(far, port.V4), udp(far6, port.V6)
	toGateway := func(p []byte) []byte { return ethernet(plan.GatewayMAC, port.MAC, p) }
	toUplink := func(p []byte) []byte { return ethernet(plan.MAC{}, plan.MAC{}, encapsulate(source, sid, p)) }
	return []trial{
		{emptyProgram, empty, toGateway(out4), port.Ifindex},
		{"pod_l3", pod, toGateway(out4), port.Ifindex},
		{"pod_l3-v6", pod, toGateway(out6), port.Ifindex},
		{"uplink", uplink, toUplink(in4), 0},
		{"uplink-v6", uplink, toUplink(in6), 0},
	}, nil
}

// outer says where packets for this node go and what a peer of it has as source.
func (n *node) outer() (sid, source netip.Addr, err error) {
	network, ok := n.topo.Network(nodeNetwork)
	if !ok {
		return sid, source, fmt.Errorf("the topology has no network %s", nodeNetwork)
	}
	for _, other := range n.topo.Nodes {
		if other.Name == n.name {
			sid = other.Locator.SID(topology.EndDT46, network.ID).Addr
		} else {
			source = other.Locator.Source(network.ID, 0)
		}
	}
	return sid, source, nil
}

// testRun is the part of union bpf_attr that BPF_PROG_TEST_RUN takes.
type testRun struct {
	progFD, retval, dataSizeIn, dataSizeOut uint32
	dataIn, dataOut                         uint64
	repeat, duration, ctxSizeIn, ctxSizeOut uint32
	ctxIn, ctxOut                           uint64
	flags, cpu, batchSize, _                uint32
}

// run gives the program its packet once. The library's Benchmark has no way to say on which interface.
func (t trial) run() (ns float64, err error) {
	var skb [192]byte                                          // struct __sk_buff
	binary.NativeEndian.PutUint32(skb[40:], uint32(t.ifindex)) // its field ifindex
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&t.packet[0])
	pin.Pin(&skb[0])
	attr := testRun{
		progFD: uint32(t.program.FD()), repeat: 1,
		dataSizeIn: uint32(len(t.packet)), dataIn: uint64(uintptr(unsafe.Pointer(&t.packet[0]))),
		ctxSizeIn: uint32(len(skb)), ctxIn: uint64(uintptr(unsafe.Pointer(&skb[0]))),
	}
	_, _, errno := unix.RawSyscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return 0, fmt.Errorf("run program %s: %w", t.name, errno)
	}
	if attr.retval != actRedirect {
		return 0, fmt.Errorf("program %s answered %d, not %d: it did not take its packet the whole way", t.name, attr.retval, actRedirect)
	}
	return float64(attr.duration), nil
}
