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

	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// emptyProgram is what the others are compared with.
const emptyProgram = "empty"

// What programs answer.
const (
	actUnspec   = -1 // TC_ACT_UNSPEC: it is none of Lace's
	actShot     = 2  // TC_ACT_SHOT: the packet ends here, as one does whose copies went on
	actRedirect = 7  // TC_ACT_REDIRECT: the program took it the whole way
)

// The packets that the entry programs of a kind of bed are timed with.
const (
	routedTrials     = "routed"
	frameTrials      = "frame"
	masqueradeTrials = "masquerade"
	publishTrials    = "publish"
)

var trialsOf = map[string]func(*node, ends) ([]trial, error){
	routedTrials:     (*node).routedTrials,
	frameTrials:      (*node).frameTrials,
	masqueradeTrials: (*node).masqueradeTrials,
	publishTrials:    (*node).publishTrials,
}

// trial is a program with a packet that it takes the whole way, through all its tail calls.
type trial struct {
	name    string
	program *ebpf.Program
	packet  []byte
	ifindex int    // where it comes in; 0: the loopback
	answer  int    // of the program
	vary    func() // changes the packet before each run; nil: it is always the same
}

// inTurn runs each of the trials once, and all of them again, one packet a call, as a program must not meet the packet that it has
// already changed. The result is the median of the kernel's own timing, in ns.
func inTurn(runs int, trials ...trial) (report, error) {
	ns := map[string][]float64{}
	for range runs {
		for _, t := range trials {
			if t.vary != nil {
				t.vary()
			}
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

// programs times the empty program and the entry programs, with packets between the order's container and a far one.
func (n *node) programs(o order) (report, error) {
	e, err := n.ends(o)
	if err != nil {
		return report{}, err
	}
	empty, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, actRedirect), asm.Return()}})
	if err != nil {
		return report{}, fmt.Errorf("load an empty program: %w", err)
	}
	defer empty.Close()
	trials, err := trialsOf[o.Trials](n, e)
	if err != nil {
		return report{}, err
	}
	nothing := trials[0]
	nothing.name, nothing.program = emptyProgram, empty
	return inTurn(o.Runs, append(trials, nothing)...)
}

// ends are the two containers between which packets go.
type ends struct {
	port      dataplane.Port // here
	far, far6 netip.Addr
	network   *topology.Network
	here      *topology.Node
	there     *topology.Node
}

func (n *node) ends(o order) (e ends, err error) {
	if e.port, err = n.port(o.Container); err != nil {
		return e, err
	}
	if e.far, err = netip.ParseAddr(o.Far); err != nil {
		return e, err
	}
	if e.far6, err = netip.ParseAddr(o.Far6); err != nil {
		return e, err
	}
	e.network, _ = n.topo.Network(e.port.Network)
	for _, node := range n.topo.Nodes {
		if node.Name == n.name {
			e.here = node
		} else {
			e.there = node
		}
	}
	return e, nil
}

// outer puts a payload behind the header with which the other node sends it to a function here.
func (e ends) outer(f topology.Function, next byte, payload []byte) []byte {
	source, sid := e.there.Locator.Source(e.network.ID, 0), e.here.Locator.SID(f, e.network.ID).Addr
	return ethernet(plan.MAC{}, plan.MAC{}, ipv6(source, sid, next, payload))
}

func (n *node) entry(p hook.Program) *ebpf.Program {
	return n.d.Hooks().Collection().Programs[string(p)]
}

func (n *node) routedTrials(e ends) ([]trial, error) {
	pod, uplink := n.entry(hook.PodL3), n.entry(hook.Uplink)
	toGateway := func(p []byte) []byte { return ethernet(plan.GatewayMAC, e.port.MAC, p) }
	in4 := e.outer(topology.EndDT46, protocolIPv4, udp(e.far, e.port.V4))
	in6 := e.outer(topology.EndDT46, protocolIPv6, udp(e.far6, e.port.V6))
	trials := []trial{
		{name: "pod_l3", program: pod, packet: toGateway(udp(e.port.V4, e.far)), ifindex: e.port.Ifindex, answer: actRedirect},
		{name: "pod_l3-v6", program: pod, packet: toGateway(udp(e.port.V6, e.far6)), ifindex: e.port.Ifindex, answer: actRedirect},
		{name: "uplink", program: uplink, packet: in4, answer: actRedirect},
		{name: "uplink-v6", program: uplink, packet: in6, answer: actRedirect},
	}
	host, err := n.hostTrials(hook.Uplink)
	return append(trials, host...), err
}

func (n *node) frameTrials(e ends) ([]trial, error) {
	pod, uplink, far := n.entry(hook.PodL2), n.entry(hook.Uplink), e.network.DerivedMAC(e.far, e.far6)
	out := func(p []byte) []byte { return ethernet(far, e.port.MAC, p) }
	in := e.outer(topology.EndDT2U, protocolEthernet, ethernet(e.port.MAC, far, udp(e.far, e.port.V4)))
	return []trial{
		{name: "pod_l2", program: pod, packet: out(udp(e.port.V4, e.far)), ifindex: e.port.Ifindex, answer: actRedirect},
		{name: "pod_l2-v6", program: pod, packet: out(udp(e.port.V6, e.far6)), ifindex: e.port.Ifindex, answer: actRedirect},
		{name: "uplink-l2", program: uplink, packet: in, answer: actRedirect},
	}, nil
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
	ns, _, err = t.pass(nil)
	return ns, err
}

// become runs the program once and is what became of the packet.
func (t trial) become() ([]byte, error) {
	out := make([]byte, len(t.packet)+outerRoom)
	_, n, err := t.pass(out)
	return out[:n], err
}

// outerRoom is how much longer a packet may have become.
const outerRoom = 128

// pass runs the program once, and puts what became of the packet in out, where there is room for something.
func (t trial) pass(out []byte) (ns float64, size int, err error) {
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
	if len(out) > 0 {
		pin.Pin(&out[0])
		attr.dataSizeOut, attr.dataOut = uint32(len(out)), uint64(uintptr(unsafe.Pointer(&out[0])))
	}
	_, _, errno := unix.RawSyscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return 0, 0, fmt.Errorf("run program %s: %w", t.name, errno)
	}
	if answer := int(int32(attr.retval)); answer != t.answer {
		return 0, 0, fmt.Errorf("program %s answered %d, not %d: it did not take its packet the whole way", t.name, answer, t.answer)
	}
	return float64(attr.duration), int(attr.dataSizeOut), nil
}
