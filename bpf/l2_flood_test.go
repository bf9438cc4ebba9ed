// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
)

// audience is a bed whose interfaces are up, with somebody who listens at the far end of each: copies are really sent.
type audience struct {
	*bed
	ears map[int]int // sockets
}

func newAudience(t testing.TB, devs ...int) *audience {
	t.Helper()
	a := &audience{bed: newSpace(t), ears: map[int]int{}}
	must(t, a.in(func() error { // before the interfaces, which else would speak of themselves
		return os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0o644)
	}))
	must(t, a.in(a.makeDevices))
	for _, dev := range devs {
		name := fmt.Sprintf("lacebpf%d", dev)
		far := up(t, a.bed, name+"p")
		up(t, a.bed, name)
		a.ears[dev] = packetSocket(t, a.bed, far)
	}
	return a
}

func up(t testing.TB, b *bed, name string) (l netlink.Link) {
	t.Helper()
	must(t, b.in(func() (err error) {
		if l, err = netlink.LinkByName(name); err != nil {
			return err
		}
		if err := netlink.LinkSetMTU(l, 9000); err != nil {
			return err
		}
		return netlink.LinkSetUp(l)
	}))
	return l
}

// sentBy says how many frames each interface has sent. A veth counts while it sends, so that nothing has to be waited for.
func (a *audience) sentBy(t testing.TB) map[int]uint64 {
	t.Helper()
	out := map[int]uint64{}
	must(t, a.in(func() error {
		for dev := range a.ears {
			l, err := netlink.LinkByIndex(a.index[dev])
			if err != nil {
				return err
			}
			out[dev] = l.Attrs().Statistics.TxPackets
		}
		return nil
	}))
	return out
}

// hear runs a packet and says what each interface has sent of it.
func (a *audience) hear(t testing.TB, n *node, in input) (result, map[int][][]byte) {
	t.Helper()
	before := a.sentBy(t)
	r := n.run(in)
	heard := map[int][][]byte{}
	for dev, sent := range a.sentBy(t) {
		for range sent - before[dev] {
			heard[dev] = append(heard[dev], receive(t, a.ears[dev]))
		}
	}
	return r, heard
}

// receive waits for a frame.
func receive(t testing.TB, socket int) []byte {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		if frame, err := readFrame(socket); err == nil {
			return frame
		}
	}
	t.Fatal("a frame was sent and does not come")
	return nil
}

// wantHeard compares what was sent by each interface.
func wantHeard(t testing.TB, got, want map[int][][]byte) {
	t.Helper()
	for _, dev := range slices.Sorted(maps.Keys(got)) {
		if len(got[dev]) != len(want[dev]) {
			t.Errorf("interface %d has sent %d frames, want %d", dev, len(got[dev]), len(want[dev]))
		}
	}
	for _, dev := range slices.Sorted(maps.Keys(want)) {
		for i, frame := range want[dev] {
			if i >= len(got[dev]) {
				t.Errorf("interface %d has not sent %s", dev, spaced(frame))
				continue
			}
			wantFrame(t, got[dev][i], frame)
		}
	}
}

// forMany are frames for many of storage's first container.
func forMany() map[string][]byte {
	group := func(mac plan.MAC, p ip) []byte { return bridged(mac, p) }
	padded := append(group(broadcastMAC, udp(s4, all4, 1, 2, 3)), 0, 0, 0, 0, 0)
	return map[string][]byte{
		"IPv4 broadcast": group(broadcastMAC, udp(s4, all4, 1, 2, 30)), "IPv4 broadcast of the subnet": group(broadcastMAC, udp(s4, netip.MustParseAddr("10.50.0.255"), 1, 2, 30)),
		"IPv4 multicast": group(groupMAC, udp(s4, netip.MustParseAddr("224.0.0.251"), 5353, 5353, 30)), "IPv4 padded": padded,
		"VRRP":           group(plan.MAC{1, 0, 0x5e, 0, 0, 18}, ip{src: s4, dst: netip.MustParseAddr("224.0.0.18"), hops: 255, proto: 112, body: make([]byte, 20)}),
		"IPv4 to one":    group(broadcastMAC, udp(s4, near4, 1, 2, 30)),
		"IPv4 fragment":  group(broadcastMAC, cut(udp(s4, all4, 1, 2, 64), 77, 8, 40)),
		"IPv6 multicast": group(plan.MAC{0x33, 0x33, 0, 0, 0, 0xfb}, udp(ownLL, netip.MustParseAddr("ff02::fb"), 5353, 5353, 30)),
		"MLD":            group(plan.MAC{0x33, 0x33, 0, 0, 0, 22}, icmp(unspecified, netip.MustParseAddr("ff02::16"), 143, 0, make([]byte, 24))),
		"STP":            eth(plan.MAC{1, 0x80, 0xc2, 0, 0, 0}, sMAC, 38, append([]byte{0x42, 0x42, 3}, make([]byte, 35)...)),
		"experimental":   eth(broadcastMAC, sMAC, 0x88b5, []byte{1, 2, 3}), "nothing": eth(broadcastMAC, sMAC, 0x88b5, nil),
		"full, no IP":        eth(groupMAC, sMAC, 0x88b5, make([]byte, frameMTU-24)),
		"announcement":       asks(sMAC, 1, s4, s4),
		"advertisement":      tells(allNodesMAC, sMAC, s6, allNodes, s6, 0x20),
		"a tag in the frame": tagged(group(broadcastMAC, udp(s4, all4, 1, 2, 30)), vlan{typeVLAN, 5}),
	}
}

// TestFlood: a frame for many goes, as it is, to all other ports here, and once to each node that has the network.
func TestFlood(t *testing.T) {
	a := newAudience(t, podA, podB, podX, podE, machine, uplink)
	for form, o := range map[string]options{"": {}, "SRH ": {srh: true}} {
		o.number, o.l2 = 1, true
		n := newNode(t, a.bed, o)
		for name, frame := range forMany() {
			for tag, of := range tags {
				t.Run(form+tag+name, func(t *testing.T) {
					n := n.on(t)
					r, heard := a.hear(t, n, input{program: "pod_l2", dev: podA, frame: frame, tag: of})
					wantCounted(t, r, shot, bpf.LaceReasonREASON_REPLICATED)
					want := frame
					if of != (vlan{}) {
						want = tagged(frame, of)
					}
					remote := func(sid netip.Addr, i int) []byte {
						if i >= len(heard[uplink]) {
							return nil
						}
						return n.behind(sid, storage, 0, want, heard[uplink][i])
					}
					wantHeard(t, heard, map[int][][]byte{podB: {want}, machine: {want}, uplink: {remote(groupSID(2, storage), 0), remote(routerSID, 1)}})
				})
			}
		}
	}
}

// TestFloodFromAfar: what comes from a node goes to all ports here, and to no node.
func TestFloodFromAfar(t *testing.T) {
	decidedByNoKernel(t)
	a := newAudience(t, podA, podB, podX, podE, machine, uplink)
	for how, changeProto := range map[string]bool{"flags": false, "change_proto": true} {
		n := newNode(t, a.bed, options{number: 1, l2: true, changeProto: changeProto})
		for form, outer := range outerForms {
			for name, frame := range forMany() {
				if name == "announcement" || name == "advertisement" {
					continue // TestSegmentNode shows what nodes say of their neighbours
				}
				t.Run(how+" "+form+" "+name, func(t *testing.T) {
					frame = bytes.Clone(frame)
					copy(frame[6:], unknownMAC[:])
					for sid, p := range map[string]ip{"DT2M": sent(frame), "DT2U": sent(frame)} {
						if sid == "DT2M" {
							p.dst = groupSID(1, storage)
						}
						r, heard := a.hear(t, n.on(t), input{program: "uplink", dev: uplink, frame: fromUnderlay(outer(p))})
						wantCounted(t, r, shot, bpf.LaceReasonREASON_REPLICATED)
						wantHeard(t, heard, map[int][][]byte{podA: {frame}, podB: {frame}, machine: {frame}})
					}
				})
			}
		}
	}
}

// TestFloodMembers: copies follow who is there; places stay empty where a port has gone.
func TestFloodMembers(t *testing.T) {
	decidedByNoKernel(t)
	a := newAudience(t, podA, podB, podX, podE, machine, uplink, cutter)
	n := newNode(t, a.bed, options{number: 1, l2: true})
	frame := bridged(broadcastMAC, udp(s4, all4, 1, 2, 30))
	in := input{program: "pod_l2", dev: podA, frame: frame}
	wantCopies := func(what string, in input, reasons []bpf.LaceReason, want map[int]int) {
		t.Helper()
		r, heard := a.hear(t, n, in)
		if !sameReasons(r.counted, reasons) || r.verdict != shot {
			t.Errorf("%s: verdict %d, %v", what, int32(r.verdict), words(r.counted))
		}
		got := map[int]int{}
		for dev, frames := range heard {
			got[dev] = len(frames)
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: interfaces have sent %v frames, want %v", what, got, want)
		}
	}
	replicated := []bpf.LaceReason{bpf.LaceReasonREASON_REPLICATED}
	wantCopies("all", in, replicated, map[int]int{podB: 1, machine: 1, uplink: 2})
	wantCopies("of another port", input{program: "pod_l2", dev: podB, frame: ethIP(broadcastMAC, nearMAC, udp(near4, all4, 1, 2, 30).bytes())}, replicated, map[int]int{podA: 1, machine: 1, uplink: 2})
	wantCopies("IPv6 only", input{program: "pod_l2", dev: podE, frame: ethIP(allNodesMAC, stationMAC(1, podE), udp(old6, allNodes, 1, 2, 30).bytes())}, replicated, map[int]int{uplink: 1})
	must(t, n.maps.DeletePort(n.segmentPort(podB), uint32(a.index[podB])))
	wantCopies("a port has gone", in, replicated, map[int]int{machine: 1, uplink: 2})
	must(t, n.maps.PutPort(n.segmentPort(podB), n.segmentDevices()[fmt.Sprint(podB)]))
	wantCopies("a port is back", in, replicated, map[int]int{podB: 1, machine: 1, uplink: 2})

	n.nexthops(nexthop{known: true, mtu: 100})
	wantCopies("too big for the nodes", in, append(replicated, bpf.LaceReasonREASON_TOO_BIG, bpf.LaceReasonREASON_TOO_BIG), map[int]int{podB: 1, machine: 1})
	n.nexthops(nexthop{none: true})
	wantCopies("no way to the nodes", in, append(replicated, bpf.LaceReasonREASON_NO_NEXTHOP, bpf.LaceReasonREASON_NO_NEXTHOP), map[int]int{podB: 1, machine: 1})
	n.nexthops(nexthop{})
	wantCopies("no MAC addresses of the nodes", in, replicated, map[int]int{podB: 1, machine: 1, cutter: 2})
	n.nexthops(nexthop{raw: true})
	wantCopies("an uplink without Ethernet", in, replicated, map[int]int{podB: 1, machine: 1, uplink: 2})
	odd := in
	odd.frame = eth(broadcastMAC, sMAC, 0x88b5, make([]byte, 46))
	wantCopies("an uplink without Ethernet, no IP", odd, replicated, map[int]int{podB: 1, machine: 1, cutter: 2})

	p := *n.plan
	p.Members = nil
	n.sync(&p)
	wantCopies("no nodes", in, replicated, map[int]int{podB: 1, machine: 1})
	p.Networks = slices.Clone(p.Networks)
	p.Networks[1].Flood = false
	n.sync(&p)
	wantCopies("off", in, []bpf.LaceReason{bpf.LaceReasonREASON_FLOOD_OFF}, map[int]int{})
	afar := sent(ethIP(broadcastMAC, otherMAC, udp(other4, all4, 1, 2, 30).bytes()))
	wantCopies("off, from a node", input{program: "uplink", dev: uplink, frame: fromUnderlay(afar)}, []bpf.LaceReason{bpf.LaceReasonREASON_FLOOD_OFF}, map[int]int{})
}

// allowance sets how many frames for many may still come from a port, or from a router.
func (n *node) allowance(kind bpf.LaceBudgetKind, of uint32, tokens int64, stamp uint64) {
	n.t.Helper()
	must(n.t, n.coll.Maps["budgets"].Put(bpf.LaceBudgetKey{Kind: uint32(kind), Of: of}, bpf.LaceBudget{Tokens: tokens, Stamp: stamp}))
}

// segmentFloodRows are what of it shows in counters alone.
func segmentFloodRows() []row {
	limited, off := bpf.LaceReasonREASON_FLOOD_LIMITED, bpf.LaceReasonREASON_FLOOD_OFF
	spent := func(n *node) {
		for _, dev := range []int{podA, podX} {
			n.allowance(bpf.LaceBudgetKindBUDGET_FLOOD, uint32(n.bed.index[dev]), longSpent, now(n.t))
		}
		n.allowance(bpf.LaceBudgetKindBUDGET_FLOOD_IN, router, longSpent, now(n.t))
		n.allowance(bpf.LaceBudgetKindBUDGET_FLOOD_IN, 2, longSpent, now(n.t))
	}
	many := bridged(broadcastMAC, udp(s4, all4, 1, 2, 30))
	var rows []row
	for name, frame := range forMany() {
		rows = append(rows, row{name: "off: " + name, dev: podX, program: "pod_l2", frame: frame, verdict: shot, reason: off})
	}
	rows = append(rows,
		row{name: "too many", prepare: spent, frame: many, verdict: shot, reason: limited},
		row{name: "too many, no IP", prepare: spent, frame: eth(groupMAC, sMAC, 0x88b5, make([]byte, 46)), verdict: shot, reason: limited},
		row{name: "too many, announcement", prepare: spent, frame: asks(sMAC, 1, s4, s4), verdict: shot, reason: limited},
		row{name: "too many, GSO", prepare: spent, frame: bridged(broadcastMAC, udp(s4, all4, 1, 2, 3000)), gso: 1000, verdict: shot, reason: limited},
		row{name: "too many questions", prepare: spent, frame: asks(sMAC, 1, s4, other4), verdict: shot, reason: limited},
		row{name: "too many questions, ND", prepare: spent, frame: solicits(sMAC, s6, other6), verdict: shot, reason: limited},
		row{name: "questions answered here are not rationed", prepare: spent, frame: asks(sMAC, 1, s4, near4), verdict: redirect, reason: bpf.LaceReasonREASON_NEIGHBOUR_ANSWERED, check: unchecked},
		row{name: "frames for one are not rationed", prepare: spent, frame: bridged(otherMAC, udp(s4, other4, 1, 2, 3)), verdict: redirect, reason: bpf.LaceReasonREASON_ENCAPSULATED, check: carried(frameSID(2, storage), 0)},
		row{name: "others pay for themselves", prepare: spent, dev: podB, program: "pod_l2", frame: ethIP(broadcastMAC, nearMAC, udp(near4, all4, 1, 2, 30).bytes()), verdict: shot,
			reason: bpf.LaceReasonREASON_REPLICATED, check: unchecked},
		row{name: "a node has rationed its own", prepare: spent, dev: uplink, program: "uplink", frame: fromUnderlay(sent(ethIP(broadcastMAC, otherMAC, udp(other4, all4, 1, 2, 30).bytes()))), verdict: shot,
			reason: bpf.LaceReasonREASON_REPLICATED, check: unchecked},
		row{name: "a router is rationed here", prepare: spent, dev: uplink, program: "uplink", frame: fromUnderlay(sentByRouter(ethIP(broadcastMAC, foreignMAC, udp(foreign4, all4, 1, 2, 30).bytes()))), verdict: shot,
			reason: limited, check: unchecked},
		row{name: "of another MAC", frame: ethIP(broadcastMAC, nearMAC, udp(s4, all4, 1, 2, 30).bytes()), verdict: shot, reason: bpf.LaceReasonREASON_SPOOFED_MAC})
	for name, mac := range map[string]plan.MAC{"a container's here": nearMAC, "the gateway's": plan.GatewayMAC, "a group's": groupMAC, "a router's": foreignMAC} {
		rows = append(rows, row{name: "for many, " + name, dev: uplink, program: "uplink", frame: fromUnderlay(sent(ethIP(broadcastMAC, mac, udp(other4, all4, 1, 2, 30).bytes()))), verdict: shot,
			reason: bpf.LaceReasonREASON_SPOOFED_MAC})
	}
	return as(rows, "pod_l2", podA)
}

func TestSegmentFlood(t *testing.T) { runRows(t, segmentFloodRows()) }

// TestFloodRate: a quarter of a second's frames at once, and then as many as the topology says.
func TestFloodRate(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1, l2: true})
	in := input{program: "pod_l2", dev: podA, frame: bridged(broadcastMAC, udp(s4, all4, 1, 2, 30))}
	key := bpf.LaceBudgetKey{Kind: uint32(bpf.LaceBudgetKindBUDGET_FLOOD), Of: uint32(n.bed.index[podA])}
	left := func() int64 {
		t.Helper()
		var b bpf.LaceBudget
		must(t, n.coll.Maps["budgets"].Lookup(key, &b))
		return b.Tokens
	}
	const burst = 1000/4 + 32
	n.run(in)
	if got := left(); got != burst-1 {
		t.Errorf("after the first frame %d are left, want %d", got, burst-1)
	}
	n.allowance(bpf.LaceBudgetKindBUDGET_FLOOD, key.Of, 1<<40, now(t)-1e9)
	n.run(in)
	if got := left(); got != burst-1 {
		t.Errorf("after a long silence %d are left, want %d", got, burst-1)
	}
	n.allowance(bpf.LaceBudgetKindBUDGET_FLOOD, key.Of, -20, now(t))
	for end := time.Now().Add(30 * time.Second); !slices.Equal(n.run(in).counted, []bpf.LaceReason{bpf.LaceReasonREASON_REPLICATED}); {
		if time.Now().After(end) {
			t.Fatal("the budget is never filled again")
		}
	}
}

// TestSegmented: what comes out of the segmenter goes on: a piece of what came in by a port to where that goes, and what has its
// outer header already out of the uplink.
func TestSegmented(t *testing.T) {
	a := newAudience(t, podA, podB, machine, uplink)
	n := newNode(t, a.bed, options{number: 1, l2: true})
	from := func(dev int, frame []byte) result {
		t.Helper()
		return n.run(input{program: "segmented", dev: cutter, frame: frame, mark: uint32(a.index[dev])})
	}
	away, local := bridged(otherMAC, tcp(s4, other4, 100)), bridged(nearMAC, tcp(s6, near6, 100))
	r := from(podA, away)
	wantCounted(t, r, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
	carried(frameSID(2, storage), 0)(t, n, r, away)
	if r.mark != 0 || len(n.flows()) != 0 {
		t.Errorf("mark %#x, %d flow entries", r.mark, len(n.flows()))
	}
	r = from(podA, local)
	wantCounted(t, r, redirect, bpf.LaceReasonREASON_LOCAL)
	arrived(podB, local)(t, n, r, nil)
	r = n.run(input{program: "segmented", dev: cutter, frame: away, mark: uint32(a.index[podA]), tag: vlan{typeVLAN, 5}})
	wantCounted(t, r, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
	carried(frameSID(2, storage), 0)(t, n, r, tagged(away, vlan{typeVLAN, 5}))
	r = from(podX, away) // the port says the network
	wantCounted(t, r, redirect, bpf.LaceReasonREASON_ENCAPSULATED)
	carried(frameSID(2, twin), 0)(t, n, r, away)
	wantCounted(t, from(podA, bridged(unknownMAC, tcp(s4, other4, 100))), shot, bpf.LaceReasonREASON_UNKNOWN_MAC)
	wantCounted(t, from(stranger, away), shot, bpf.LaceReasonREASON_NO_PORT)
	wantCounted(t, n.run(input{program: "segmented", dev: cutter, frame: away}), shot, bpf.LaceReasonREASON_NO_PORT)

	many := bridged(broadcastMAC, udp(s4, all4, 1, 2, 30))
	r, heard := a.hear(t, n, input{program: "segmented", dev: cutter, frame: many, mark: uint32(a.index[podA])})
	wantCounted(t, r, shot, bpf.LaceReasonREASON_REPLICATED)
	if len(heard[podB]) != 1 || len(heard[machine]) != 1 || len(heard[uplink]) != 2 || len(heard[podA]) != 0 {
		t.Errorf("copies of a piece for many: %d, %d, %d, %d", len(heard[podA]), len(heard[podB]), len(heard[machine]), len(heard[uplink]))
	}

	whole := ethIP(plan.MAC{}, plan.MAC{}, sent(away).bytes())
	out := func(mark uint32) result {
		t.Helper()
		return n.run(input{program: "segmented", dev: cutter, frame: whole, mark: mark})
	}
	place := 1<<31 | n.generation()&1*4097
	r = out(place + 2)
	wantCounted(t, r, redirect)
	wantFrame(t, r.out, ethIP(nexthopDst, nexthopSrc, sent(away).bytes()))
	for _, mark := range []uint32{place, place + 77, 1<<31 | 2*4097, 1<<32 - 1} {
		wantCounted(t, out(mark), shot, bpf.LaceReasonREASON_NO_NEXTHOP)
	}
}
