// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
)

// entries are the programs that a packet may meet first, and where.
var entries = []struct {
	program string
	dev     int
}{{"pod_l3", podA}, {"pod_l3", podX}, {"uplink", uplink}, {"uplink_raw", stranger}, {"pod_l3", stranger},
	{"pod_l2", podA}, {"pod_l2", podX}, {"pod_l2", podE}, {"segmented", cutter}, {"uplink", uplink}}

// FuzzPrograms throws arbitrary packets at the entry programs of a node that has two networks with the
// same subnets. Whatever comes: the verdict is one of ours, every packet that does not pass is counted, and none goes into
// another network than it came from.
func FuzzPrograms(f *testing.F) {
	for i, frame := range seeds() {
		f.Add(uint8(i), uint16(0), frame)
	}
	for i, frame := range segmentSeeds() {
		for _, entry := range []int{5, 6, 7, 8} {
			f.Add(uint8(4*len(entries)+entry), uint16(0), frame)
		}
		f.Add(uint8((4+i%2)*len(entries)+9), uint16(0), fromUnderlay(sent(frame)))
	}
	f.Add(uint8(0), uint16(1400), fromA(tcp(a4, far4, 3000)))
	f.Add(uint8(2), uint16(1000), fromUnderlay(overlay(tcp(far4, a4, 3000))))
	b := newBed(f)
	nodes := []*node{
		newNode(f, b, options{number: 1}), newNode(f, b, options{number: 1, vrf: true, srh: true, changeProto: true}),
		newNode(f, b, options{number: 1, locatorBits: 45}), newNode(f, b, options{number: 1, locatorBits: 64}),
		newNode(f, b, options{number: 1, l2: true}), newNode(f, b, options{number: 1, l2: true, srh: true, changeProto: true, cut: true}),
	}
	f.Fuzz(func(t *testing.T, choice uint8, gso uint16, frame []byte) {
		if len(frame) > 8192 {
			return
		}
		entry := entries[int(choice)%len(entries)]
		n := nodes[int(choice)/len(entries)%len(nodes)].on(t)
		in := input{program: entry.program, dev: entry.dev, frame: frame, gso: uint32(gso)}
		if entry.program == "segmented" {
			in.mark = uint32(n.bed.index[podA])
		}
		judge(t, n, in)
	})
}

// judge runs a packet and holds what must always be so.
func judge(t *testing.T, n *node, in input) {
	t.Helper()
	n.forget()
	r, err := n.try(in)
	if err != nil {
		return // the kernel takes no such packet, or no such size of segments
	}
	checkVerdict(t, r, in)
	checkNetwork(t, n, r, networkFrom(n, in.program, in.dev, in.frame))
}

// TestMutations runs every packet of the tables with a few bytes changed or taken from another packet: most get
// further into the programs than arbitrary ones. The numbers are random and the same in each run.
func TestMutations(t *testing.T) {
	decidedByNoKernel(t)
	n := newNode(t, newBed(t), options{number: 1})
	var all []row
	for _, rows := range [][]row{podRows(), uplinkRows(), errorRows(), gatewayRows(), ecnRows()} {
		all = append(all, rows...)
	}
	slices.SortFunc(all, func(a, b row) int { return strings.Compare(a.name, b.name) }) // maps made them
	random := rand.New(rand.NewPCG(1, 2))
	rounds := 4000
	if testing.Short() {
		rounds = 400
	}
	for round := range rounds {
		r, other := all[random.IntN(len(all))], all[random.IntN(len(all))]
		in := input{program: "pod_l3", dev: r.dev, frame: mutate(random, r.frame, other.frame)}
		if r.program == "uplink" {
			in.program = r.program
		}
		if random.IntN(20) == 0 {
			in.gso = uint32(random.IntN(2000))
		}
		if judge(t, n, in); t.Failed() {
			t.Fatalf("round %d: %q at program %s, segments of %d: % x", round, r.name, in.program, in.gso, in.frame)
		}
	}
}

// TestSegmentMutations does the same with the frames of L2 networks.
func TestSegmentMutations(t *testing.T) {
	decidedByNoKernel(t)
	n := newNode(t, newBed(t), options{number: 1, l2: true})
	all := slices.Concat(segmentTables()...)
	slices.SortStableFunc(all, func(a, b row) int { return strings.Compare(a.name, b.name) }) // maps made them
	random := rand.New(rand.NewPCG(3, 4))
	for round := range 4000 {
		r, other := all[random.IntN(len(all))], all[random.IntN(len(all))]
		if len(r.frame) < 20 || len(other.frame) < 20 {
			continue
		}
		in := input{program: r.program, dev: r.dev, frame: mutate(random, r.frame, other.frame)}
		if random.IntN(20) == 0 {
			in.gso = uint32(random.IntN(2000))
		}
		if judge(t, n, in); t.Failed() {
			t.Fatalf("round %d: %q at program %s, segments of %d: % x", round, r.name, in.program, in.gso, in.frame)
		}
	}
}

func mutate(random *rand.Rand, frame, other []byte) []byte {
	out := slices.Clone(frame)
	for range 1 + random.IntN(4) {
		at := 12 + random.IntN(min(len(out), 140)-12)
		switch random.IntN(4) {
		case 0:
			out[at] ^= 1 << random.IntN(8)
		case 1:
			out[at] = byte(random.IntN(256))
		case 2:
			out = out[:max(at, 54)%(len(out)+1)]
			if len(out) < 20 {
				out = slices.Clone(frame)
			}
		case 3: // the same place of another packet
			copy(out[at:], other[min(at, len(other)):min(at+16, len(other))])
		}
	}
	return out
}

// seeds are packets of the tables, one of each kind, for the programs in turn.
func seeds() [][]byte {
	ping := icmp(a4, gw4, 8, 0, []byte{1, 2, 3, 4})
	return [][]byte{
		fromA(udp(a4, far4, 1, 2, 30)), toGateway(1, podX, udp(a4, b4, 1, 2, 3)), fromUnderlay(overlay(in4)), overlay(in4).bytes(), fromA(ping),
		fromA(hops(udp(a6, far6, 1, 2, 40), 1)), toGateway(1, podX, nd(a6, gw6, 135, 0, gw6.AsSlice())),
		fromUnderlay(withSegment(overlay(in6), func([]byte) {})), overlay(in6).bytes(), fromA(udp(a6, b6, 1, 2, 3)),
		eth(broadcastMAC, macA, typeARP, arp(1, macA, a4, plan.MAC{}, gw4)),
	}
}

// segmentSeeds are frames of L2 networks.
func segmentSeeds() [][]byte {
	many := ethIP(broadcastMAC, sMAC, udp(s4, all4, 68, 67, 30).bytes())
	return [][]byte{
		bridged(otherMAC, udp(s4, other4, 1, 2, 30)), bridged(nearMAC, tcp(s6, near6, 30)), bridged(plan.GatewayMAC, udp(s4, web4, 1, 2, 3)), many, tagged(many, vlan{typeVLAN, 5}),
		eth(otherMAC, sMAC, 0x88b5, make([]byte, 46)), asks(sMAC, 1, s4, near4), asks(sMAC, 1, s4, other4), asks(sMAC, 2, s4, s4), solicits(sMAC, s6, near6), solicits(sMAC, unspecified, s6),
		tells(allNodesMAC, sMAC, s6, allNodes, s6, 0x20), ethIP(stationMAC(2, podE), stationMAC(1, podE), udp(old6, oldFar6, 1, 2, 3).bytes()),
		partyAt(2, podA).frame(partyAt(1, podA), udp(other4, s4, 1, 2, 9)), asks(otherMAC, 1, other4, s4), solicits(otherMAC, other6, s6), ethIP(broadcastMAC, otherMAC, udp(other4, all4, 1, 2, 9).bytes()),
		shimmed(partyAt(2, podA).frame(partyAt(1, podA), udp(other4, s4, 1, 2, 9))),
	}
}

func checkVerdict(t *testing.T, r result, in input) {
	t.Helper()
	if !slices.Contains([]uint32{pass, ok, shot, redirect}, r.verdict) {
		t.Errorf("verdict %d", int32(r.verdict))
	}
	if cut := r.verdict == redirect && r.mark != 0 && in.gso != 0; !cut && (r.verdict == pass) != (len(r.counted) == 0) {
		t.Errorf("verdict %d, counted %v", int32(r.verdict), words(r.counted))
	}
	if r.verdict == pass && !slices.Equal(r.out, in.frame) {
		t.Errorf("a packet that passes was changed: % x", r.out)
	}
	if r.verdict == ok && !slices.Equal(r.counted, []bpf.LaceReason{bpf.LaceReasonREASON_GATEWAY_PASSED}) {
		t.Errorf("handed to the stack, counted %v", words(r.counted))
	}
}

// networkFrom is the network that a packet belongs to: the sending container's, or the one of its SID.
func networkFrom(n *node, program string, dev int, frame []byte) uint32 {
	l2 := map[string]int{"uplink": 14, "uplink_raw": 0}
	at, underlay := l2[program]
	switch {
	case program == "segmented":
		return uint32(storage)
	case !underlay && n.opts.l2:
		return uint32(segmentOf(dev))
	case !underlay:
		return uint32(networkOf(dev))
	case len(frame) < at+40:
		return 0
	}
	return uint32(networkIn(n, frame[at+24:]))
}

// checkNetwork looks at where a packet goes: an interface of its network, or a SID of it.
func checkNetwork(t *testing.T, n *node, r result, network uint32) {
	t.Helper()
	if r.verdict != redirect {
		return
	}
	for _, reason := range r.counted {
		switch reason {
		case bpf.LaceReasonREASON_DECAPSULATED, bpf.LaceReasonREASON_LOCAL:
			if port, found, err := n.maps.Ports.Get(bpf.LacePortKey{Ifindex: r.ctx.Ifindex, Slot: r.ctx.Generation & 1}); err != nil || !found || !n.mayReach(network, port.Network) {
				t.Errorf("from network %d to interface %d, which is of network %d (%v)", network, r.ctx.Ifindex, port.Network, err)
			}
		case bpf.LaceReasonREASON_ENCAPSULATED:
			checkSID(t, n, network, r)
		}
	}
}

// mayReach: from one network to the other, by the peerings of L2 networks.
func (n *node) mayReach(from, to uint32) bool {
	peered := []uint32{uint32(storage), uint32(backend)}
	return from == to || n.opts.l2 && slices.Contains(peered, from) && slices.Contains(peered, to)
}

func checkSID(t *testing.T, n *node, network uint32, r result) {
	t.Helper()
	src, dst := r.out[14+8:14+24], r.out[14+24:14+40]
	if n.opts.l2 && network == uint32(storage) && netip.AddrFrom16([16]byte(dst)) == routerSID {
		return
	}
	if uint32(networkIn(n, src)) != network || !n.mayReach(network, uint32(networkIn(n, dst))) || !n.mayReach(network, r.ctx.Network) {
		t.Errorf("from network %d: outer source % x, SID % x", network, src, dst)
	}
}

// networkIn reads the 24 bits behind locator and function.
func networkIn(n *node, addr []byte) (network int) {
	at := n.opts.locatorBits + 16
	for i := at; i < at+24; i++ {
		network = network<<1 | int(addr[i/8]>>(7-i%8)&1)
	}
	return network
}
