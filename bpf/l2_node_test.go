// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// The fixture of L2 networks: two nodes, and a foreign router that is in network 500. Node n owns the n-th pool of each
// network, and MAC addresses are derived from addresses but for those of the machines.
//
//	500 storage  two containers and a machine on each node; a gateway, replicated, peered with the L3 network 100 both ways
//	             10.50.0.26, .27   fd50::1:a, ::1:b   machine 10.50.0.201, fd50::c9   node 2: 10.50.0.42, …
//	             the router has 10.50.0.203, fd50::cb
//	600 twin     one container, with the addresses of the first of storage; no gateway, not replicated, DHCP
//	700 legacy   one container, IPv6 only; no gateway, replicated
//	             fd70::1:a
//	100          one container, 10.40.1.10, fd40:0:1::a
const (
	storage = topology.NetworkID(500)
	twin    = topology.NetworkID(600)
	legacy  = topology.NetworkID(700)

	storageLine, twinLine, legacyLine = 50, 60, 70
)

// frameMTU is the largest IP packet of a frame that another node takes over linkMTU.
const frameMTU = linkMTU - 40 - 18

// routerSID is where the router takes frames.
var routerSID = netip.MustParseAddr("5f00:1ace:3:e000::1")

// segmentOf is the network that a port is in; that of the uplink's packets is storage.
func segmentOf(dev int) topology.NetworkID {
	switch dev {
	case podX:
		return twin
	case podD:
		return backend
	case podE:
		return legacy
	}
	return storage
}

// place is a port of a network, or the router.
func place(number, dev int) (v4, v6 netip.Addr) {
	switch dev {
	case podD:
		return v4Of(number, podA), v6Of(number, podA)
	case podE:
		return netip.Addr{}, netip.MustParseAddr(fmt.Sprintf("fd70::%x:a", number))
	case machine:
		return netip.AddrFrom4([4]byte{10, 50, 0, byte(200 + number)}), netip.MustParseAddr(fmt.Sprintf("fd50::%x", 200+number))
	}
	last := 10 + dev%podX
	return netip.AddrFrom4([4]byte{10, 50, 0, byte(16*number + last)}), netip.MustParseAddr(fmt.Sprintf("fd50::%x:%x", number, last))
}

// stationMAC is the MAC address of a port; node 3 is the router.
func stationMAC(number, dev int) plan.MAC {
	v4, v6 := place(number, dev)
	switch dev {
	case machine:
		return plan.MAC{0x52, 0x54, 0, 0, 0, byte(number)}
	case podD:
		return macOf(number, podA)
	case podE:
		b := v6.As16()
		return plan.MAC{2, 0x4c, b[12], b[13], b[14], b[15]}
	}
	return derived(v4)
}

func derived(v4 netip.Addr) plan.MAC {
	b := v4.As4()
	return plan.MAC{2, 0x4c, b[0], b[1], b[2], b[3]}
}

// eui64 is the link-local address that a MAC address makes.
func eui64(m plan.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// Short names for what the rows are full of: n1 is node 1.
var (
	s4, s6           = place(1, podA)
	near4, near6     = place(1, podB)
	vm4, vm6         = place(1, machine)
	other4, other6   = place(2, podA)
	away4, _         = place(2, machine)
	foreign4         = netip.MustParseAddr("10.50.0.203")
	foreign6         = netip.MustParseAddr("fd50::cb")
	lgw4, lgw6       = netip.MustParseAddr("10.50.0.1"), netip.MustParseAddr("fd50::1")
	web4, web6       = place(1, podD)
	old6, oldFar6    = place1(podE, 1), place1(podE, 2)
	sMAC, nearMAC    = stationMAC(1, podA), stationMAC(1, podB)
	otherMAC         = stationMAC(2, podA)
	vmMAC, awayMAC   = stationMAC(1, machine), stationMAC(2, machine)
	foreignMAC       = stationMAC(router, machine)
	groupMAC         = plan.MAC{1, 0, 0x5e, 0, 0, 0xfb}
	unknownMAC       = plan.MAC{0x0e, 1, 2, 3, 4, 5}
	solicitedGroup   = netip.MustParseAddr("ff02::1:ff00:a")
	solicitedGroupMC = plan.MAC{0x33, 0x33, 0xff, 0, 0, 0xa}
)

func place1(dev, number int) netip.Addr { _, v6 := place(number, dev); return v6 }

func frameSID(number int, id topology.NetworkID) netip.Addr {
	return locatorOf(number, 48).SID(topology.EndDT2U, id).Addr
}

func groupSID(number int, id topology.NetworkID) netip.Addr {
	return locatorOf(number, 48).SID(topology.EndDT2M, id).Addr
}

// buildSegments is the plan of a node of this fixture.
func (n *node) buildSegments() *plan.Plan {
	p := &plan.Plan{Locator: n.locator(), LocatorBlock: blockOf(n.opts.locatorBits), Conntrack: timeouts, Networks: []plan.Network{
		{ID: backend, BlockBits4: plan.Lengths{24}, BlockBits6: plan.Lengths{64}, Line: backendLine},
		{ID: storage, Type: topology.L2, BlockBits4: plan.Lengths{32, 28}, BlockBits6: plan.Lengths{128, 112}, Flood: true, FloodRate: 1000, Line: storageLine},
		{ID: twin, Type: topology.L2, BlockBits4: plan.Lengths{28}, BlockBits6: plan.Lengths{112}, Line: twinLine},
		{ID: legacy, Type: topology.L2, BlockBits6: plan.Lengths{112}, Flood: true, FloodRate: 1000, Base6: netip.MustParsePrefix("fd70::/96"), Line: legacyLine},
	}}
	if n.opts.srh {
		p.Encapsulation = topology.SRH
	}
	if n.opts.cut {
		p.L2GSO = topology.Segment
	}
	for number := 1; number <= 2; number++ {
		p.Blocks = append(p.Blocks, n.segmentBlocks(number)...)
		if number != n.opts.number {
			p.Peers = append(p.Peers, plan.Peer{Index: uint32(number), Locator: locatorOf(number, n.opts.locatorBits)})
			p.Stations = append(p.Stations, plan.Station{Network: storage, MAC: stationMAC(number, machine), Peer: uint32(number), SID: topology.SID{Addr: frameSID(number, storage)}})
			p.Members = append(p.Members, plan.Member{Network: storage, Peer: uint32(number), SID: topology.SID{Addr: groupSID(number, storage)}},
				plan.Member{Network: legacy, Peer: uint32(number), SID: topology.SID{Addr: groupSID(number, legacy)}})
		}
	}
	sid := topology.SID{Addr: routerSID}
	for _, prefix := range []netip.Prefix{netip.PrefixFrom(foreign4, 32), netip.PrefixFrom(foreign6, 128)} {
		p.Blocks = append(p.Blocks, plan.Block{Network: storage, Prefix: prefix, Peer: router, SID: sid, Frames: true})
	}
	p.Peers = append(p.Peers, plan.Peer{Index: router, Kind: topology.KindRouter, Locator: locatorOf(router, n.opts.locatorBits), Network: storage, SIDL2: sid})
	p.Stations = append(p.Stations, plan.Station{Network: storage, MAC: foreignMAC, Peer: router, SID: sid, Answers: []netip.Addr{foreign4, foreign6}})
	p.Members = append(p.Members, plan.Member{Network: storage, Peer: router, SID: sid})
	p.Peerings = []plan.Peering{
		{From: backend, To: storage, Prefix: netip.MustParsePrefix("10.50.0.0/24"), Line: 91}, {From: backend, To: storage, Prefix: netip.MustParsePrefix("fd50::/64"), Line: 91},
		{From: storage, To: backend, Prefix: netip.MustParsePrefix("10.40.0.0/16"), Line: 92}, {From: storage, To: backend, Prefix: netip.MustParsePrefix("fd40::/32"), Line: 92},
	}
	for _, dev := range segmentPorts {
		p.Ports = append(p.Ports, n.segmentPort(dev))
	}
	return p
}

var segmentPorts = []int{podA, podB, podX, podD, podE, machine}

func (n *node) segmentBlocks(number int) (out []plan.Block) {
	pool4, pool6 := place(number, podA)
	one4, one6 := place(number, machine)
	for _, id := range []topology.NetworkID{storage, twin} {
		out = append(out, n.block(id, number, netip.PrefixFrom(pool4, 28)), n.block(id, number, netip.PrefixFrom(pool6, 112)))
	}
	return append(out, n.block(storage, number, netip.PrefixFrom(one4, 32)), n.block(storage, number, netip.PrefixFrom(one6, 128)),
		n.block(legacy, number, netip.PrefixFrom(place1(podE, number), 112)),
		n.block(backend, number, netip.PrefixFrom(v4Of(number, 0), 24)), n.block(backend, number, netip.PrefixFrom(v6Of(number, 0), 64)))
}

func (n *node) segmentPort(dev int) plan.Port {
	number, id := n.opts.number, segmentOf(dev)
	v4, v6 := place(number, dev)
	p := plan.Port{Attachment: plan.Attachment{NetworkID: id, V4: v4, V6: v6, MAC: stationMAC(number, dev)}, HostIf: fmt.Sprint(dev),
		Type: topology.L2, Source: n.locator().Source(id, 0)}
	switch dev {
	case podX:
		p.DHCP = true
	case podE:
	case podD:
		p.Type, p.Gateway4, p.Gateway6 = topology.L3, gateway4(number), gateway6(number)
	default:
		p.Gateway4, p.Gateway6 = lgw4, lgw6
	}
	if dev == machine {
		p.Device = fmt.Sprint(dev)
	}
	return p
}

func (n *node) segmentDevices() map[string]maps.Device {
	out := map[string]maps.Device{maps.Segmenter: {Index: uint32(n.bed.index[cutter])}}
	for _, dev := range segmentPorts {
		out[fmt.Sprint(dev)] = maps.Device{Index: uint32(n.bed.index[dev]), MTU: frameMTU}
	}
	return out
}

// behind is the frame behind an outer header that should leave a node; the flow label is taken from got.
func (n *node) behind(sid netip.Addr, id topology.NetworkID, class uint8, frame, got []byte) []byte {
	n.t.Helper()
	o := ip{src: n.locator().Source(id, 0), dst: sid, class: class, proto: extL2, body: frame}
	if n.opts.srh {
		o = withSegment(o, func([]byte) {})
	}
	if len(got) > 18 {
		o.label = binary.BigEndian.Uint32(got[14:]) & 0xfffff
	}
	if o.label == 0 {
		n.t.Error("the flow label is 0")
	}
	return ethIP(nexthopDst, nexthopSrc, o.bytes())
}

// carried wants the frame that went in at another node, every byte of it.
func carried(sid netip.Addr, class uint8) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, n *node, r result, in []byte) {
		t.Helper()
		id := topology.NetworkID(networkIn(n, sid.AsSlice()))
		if sid == routerSID {
			id = storage
		}
		wantFrame(t, r.out, n.behind(sid, id, class, in, r.out))
	}
}

// arrived wants a frame, unchanged, at a port.
func arrived(dev int, frame []byte) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, n *node, r result, _ []byte) {
		t.Helper()
		if r.ctx.Ifindex != uint32(n.bed.index[dev]) || (r.ctx.Direct == 1) != (dev == machine) {
			t.Errorf("delivered to interface %d (direct %d), want %d", r.ctx.Ifindex, r.ctx.Direct, n.bed.index[dev])
		}
		wantFrame(t, r.out, frame)
	}
}

// segmentTables are the tables of L2 networks.
func segmentTables() [][]row {
	return [][]row{segmentPodRows(), segmentUplinkRows(), segmentNeighbourRows(), segmentNodeRows(), segmentFloodRows()}
}

// as makes rows those of a program at a port of this fixture.
func as(rows []row, program string, dev int) []row {
	for i := range rows {
		rows[i].opts.l2 = true
		if rows[i].program == "" {
			rows[i].program = program
			if rows[i].dev == 0 {
				rows[i].dev = dev
			}
		}
	}
	return rows
}

// bridged is a frame of storage's first container.
func bridged(dst plan.MAC, p ip) []byte { return ethIP(dst, sMAC, p.bytes()) }

func stationRow(n *node, mac plan.MAC, v bpf.LaceStation) {
	n.t.Helper()
	k := bpf.LaceFdbKey{Scope: maps.Scope(storage, maps.SlotOf(n.generation()))}
	k.Mac.U8 = mac
	must(n.t, n.maps.FDB.Put(k, v))
}

// learned is the table of MAC addresses that only frames have told of.
func (n *node) sighting(id topology.NetworkID, mac plan.MAC) (v bpf.LaceSighting, ok bool) {
	n.t.Helper()
	k := bpf.LaceSightingKey{Network: uint32(id)}
	k.Mac.U8 = mac
	return v, n.coll.Maps["learned"].Lookup(k, &v) == nil
}

// sight writes down that a MAC address of storage was seen at a node.
func sight(mac plan.MAC, number int) func(n *node) {
	return func(n *node) {
		n.t.Helper()
		k := bpf.LaceSightingKey{Network: uint32(storage)}
		k.Mac.U8 = mac
		half := locatorOf(number, n.opts.locatorBits).Addr().As16()
		v := bpf.LaceSighting{Locator: binary.NativeEndian.Uint64(half[:8]), Seen: ticks(n.t)}
		must(n.t, n.coll.Maps["learned"].Put(k, v))
	}
}
