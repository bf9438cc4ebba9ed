// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// A pair is two nodes whose packets reach each other. Beside what the fixture has, each has a container in network 400, whose
// subnets are its own, and network 100 may open flows to it, but not the other way round.
//
//	node 1  10.60.1.10  fd60:0:1::a
//	node 2  10.60.2.10  fd60:0:2::a
const db = topology.NetworkID(400)

// Lines of the topology.
const (
	backendLine = 10
	overlapLine = 20
	dbLine      = 40
	peeringLine = 90
)

// host is a container of a pair.
type host struct{ number, dev int }

var (
	web1, near1, x1, db1 = host{1, podA}, host{1, podB}, host{1, podX}, host{1, podD}
	web2, near2, x2, db2 = host{2, podA}, host{2, podB}, host{2, podX}, host{2, podD}
)

func (h host) network() topology.NetworkID {
	if h.dev == podD {
		return db
	}
	return networkOf(h.dev)
}

func (h host) addr(v6 bool) netip.Addr {
	switch {
	case h.dev != podD && v6:
		return v6Of(h.number, h.dev)
	case h.dev != podD:
		return v4Of(h.number, h.dev)
	case v6:
		return dbSubnet6(h.number, 10)
	}
	return dbSubnet4(h.number, 10)
}

func dbSubnet4(number, last int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 60, byte(number), byte(last)})
}

func dbSubnet6(number, last int) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("fd60:0:%x::%x", number, last))
}

type pair struct {
	t     testing.TB
	nodes map[int]*node
	rings map[int]*ringbuf.Reader
	moved map[host]int // containers whose interface is another than the fixture's
}

func newPair(t testing.TB) *pair {
	t.Helper()
	p := &pair{t: t, nodes: map[int]*node{}, rings: map[int]*ringbuf.Reader{}}
	b := newBed(t)
	for number := 1; number <= 2; number++ {
		p.nodes[number] = newNode(t, b, options{number: number})
		ring, err := ringbuf.NewReader(p.nodes[number].coll.Maps["events"])
		must(t, err)
		t.Cleanup(func() { ring.Close() })
		p.rings[number] = ring
	}
	p.apply(nil)
	return p
}

// on is the pair within a subtest, without flows and events of earlier ones.
func (p *pair) on(t testing.TB) *pair {
	t.Helper()
	c := &pair{t: t, nodes: map[int]*node{}, rings: p.rings}
	for number, n := range p.nodes {
		c.nodes[number] = n.on(t)
		c.nodes[number].dropFlows()
		c.nodes[number].forget()
		c.events(number)
	}
	return c
}

// apply writes the plan of a pair, changed by edit, on both nodes.
func (p *pair) apply(edit func(p *plan.Plan)) {
	p.t.Helper()
	p.applyOn(1, edit)
	p.applyOn(2, edit)
}

func (p *pair) applyOn(number int, edit func(p *plan.Plan)) {
	p.t.Helper()
	n := p.nodes[number]
	next := n.pairPlan()
	if edit != nil {
		edit(next)
	}
	_, err := n.maps.Sync(next, n.opts.vrf, n.pairDevices(), n.ways(nexthop{known: true}))
	must(p.t, err)
	must(p.t, n.maps.Beat())
}

// pairPlan is the fixture's plan with network 400 and a peering.
func (n *node) pairPlan() *plan.Plan {
	p := n.build()
	for i, line := range []int{backendLine, overlapLine} {
		p.Networks[i].Line = line
	}
	p.Networks = append(p.Networks, plan.Network{ID: db, BlockBits4: plan.Lengths{24}, BlockBits6: plan.Lengths{64}, Line: dbLine})
	for number := 1; number <= 2; number++ {
		p.Blocks = append(p.Blocks, n.block(db, number, netip.PrefixFrom(dbSubnet4(number, 0), 24)), n.block(db, number, netip.PrefixFrom(dbSubnet6(number, 0), 64)))
	}
	p.Peerings = peeringTo(db, "10.60.0.0/16", "fd60::/32")
	number := n.opts.number
	p.Ports = append(p.Ports, plan.Port{
		Attachment: plan.Attachment{NetworkID: db, V4: dbSubnet4(number, 10), V6: dbSubnet6(number, 10), MAC: macOf(number, podD)},
		HostIf:     fmt.Sprint(podD), Gateway4: dbSubnet4(number, 1), Gateway6: dbSubnet6(number, 1), Source: n.locator().Source(db, 0),
	})
	return p
}

// peeringTo lets network 100 open flows to prefixes of another one.
func peeringTo(id topology.NetworkID, prefixes ...string) (out []plan.Peering) {
	for _, prefix := range prefixes {
		out = append(out, plan.Peering{From: backend, To: id, Prefix: netip.MustParsePrefix(prefix), Line: peeringLine})
	}
	return out
}

func noPeering(p *plan.Plan) { p.Peerings = nil }

func (n *node) pairDevices() map[string]maps.Device {
	out := n.devices()
	out[fmt.Sprint(podD)] = maps.Device{Index: uint32(n.bed.index[podD]), MTU: podMTU}
	return out
}

// journey is what became of a packet on its way from one container to another.
type journey struct {
	sent, taken result
	at          int    // node that it came to last
	words       string // what was counted on the way: "encapsulated decapsulated"
}

// send lets a container send a packet. What comes off the node goes to the uplink of the node that its SID names.
func (p *pair) send(from host, packet ip, gso uint32) journey {
	p.t.Helper()
	n := p.nodes[from.number]
	j := journey{at: from.number}
	j.sent = n.run(input{program: "pod_l3", dev: from.dev, frame: toGateway(from.number, from.dev, packet), gso: gso})
	j.words = strings.Join(words(j.sent.counted), " ")
	switch j.words {
	case "encapsulated":
		return p.carry(j, packet, gso)
	case "local":
		p.checkArrival(j.at, j.sent, packet)
	}
	return j
}

// carry takes a packet over the underlay.
func (p *pair) carry(j journey, packet ip, gso uint32) journey {
	p.t.Helper()
	n := p.nodes[numberIn(j.sent.out[14+24:])]
	if n == nil {
		j.words += " elsewhere"
		return j
	}
	j.at = n.opts.number
	j.taken = n.run(input{program: "uplink", dev: uplink, frame: atUplink(n, j.sent.out), gso: gso})
	j.words += " " + strings.Join(words(j.taken.counted), " ")
	if j.taken.verdict == redirect {
		p.checkArrival(j.at, j.taken, packet)
	}
	return j
}

// numberIn is the number of the node whose locator an address has.
func numberIn(addr []byte) int { return int(binary.BigEndian.Uint16(addr[4:])) }

// checkArrival wants the packet, every byte of it, at the container that has its destination.
func (p *pair) checkArrival(number int, r result, packet ip) {
	p.t.Helper()
	n := p.nodes[number]
	for dev, index := range n.bed.index {
		if r.ctx.Ifindex != uint32(index) {
			continue
		}
		h, ok := p.hostAt(number, dev)
		if !ok || h.addr(packet.dst.Is6()) != packet.dst {
			p.t.Errorf("a packet for %s came to interface %d of node %d", packet.dst, dev, number)
		}
		wantFrame(p.t, r.out, ethIP(macOf(number, h.dev), plan.GatewayMAC, afterHop(packet)))
		return
	}
	p.t.Errorf("a packet for %s came to interface index %d of node %d, which is none", packet.dst, r.ctx.Ifindex, number)
}

// hostAt is the container behind an interface.
func (p *pair) hostAt(number, dev int) (host, bool) {
	for h, at := range p.moved {
		if h.number == number && at == dev {
			return h, true
		}
	}
	return host{number, dev}, dev != uplink && dev != stranger
}

// events are what the programs of a node have told since it was last asked.
func (p *pair) events(number int) (out []bpf.LaceEvent) {
	p.t.Helper()
	ring := p.rings[number]
	ring.SetDeadline(time.Unix(0, 1)) // what is there, without waiting
	for {
		record, err := ring.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return out
		}
		must(p.t, err)
		var e bpf.LaceEvent
		_, err = binary.Decode(record.RawSample, binary.NativeEndian, &e)
		must(p.t, err)
		out = append(out, e)
	}
}

// told are events in short: verdict, reason, networks and line.
func told(events []bpf.LaceEvent) (out []string) {
	names := []string{"step", "passed", "refused", "ended"}
	for _, e := range events {
		out = append(out, fmt.Sprintf("%s %s %d>%d line %d", names[e.Verdict], maps.ReasonName(bpf.LaceReason(e.Reason)), e.Network, e.To, e.Line))
	}
	return out
}

// wantTold compares what a node told since it was last asked.
func (p *pair) wantTold(number int, want ...string) {
	p.t.Helper()
	if got := told(p.events(number)); !slices.Equal(got, want) {
		p.t.Errorf("node %d told %q, want %q", number, got, want)
	}
}

// flowKey is the key of a flow's direction; ports are 0 where the protocol has none.
func flowKey(id topology.NetworkID, src, dst netip.Addr, protocol uint8, sport, dport uint16) bpf.LaceFlowKey {
	k := bpf.LaceFlowKey{Network: uint32(id), Protocol: protocol, Sport: onWire(sport), Dport: onWire(dport)}
	k.Src.U8, k.Dst.U8 = src.As16(), dst.As16()
	return k
}

// onWire is a number in network order, as a program reads it.
func onWire(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}

// table is the table of flows. The caller closes it.
func (n *node) table() *ebpf.Map {
	n.t.Helper()
	table, err := n.maps.OpenFlows()
	must(n.t, err)
	return table
}

// flows are all entries.
func (n *node) flows() map[bpf.LaceFlowKey]bpf.LaceFlow {
	n.t.Helper()
	out := map[bpf.LaceFlowKey]bpf.LaceFlow{}
	var k bpf.LaceFlowKey
	var v bpf.LaceFlow
	table := n.table()
	defer table.Close()
	rows := table.Iterate()
	for rows.Next(&k, &v) {
		out[k] = v
	}
	must(n.t, rows.Err())
	return out
}

func (n *node) dropFlows() {
	n.t.Helper()
	table := n.table()
	defer table.Close()
	for k := range n.flows() {
		must(n.t, table.Delete(k))
	}
}

// flow is an entry that has to be there.
func (n *node) flow(k bpf.LaceFlowKey) bpf.LaceFlow {
	n.t.Helper()
	table := n.table()
	defer table.Close()
	var v bpf.LaceFlow
	if err := table.Lookup(k, &v); err != nil {
		n.t.Fatalf("node %d has no entry %s: %v", n.opts.number, keyText(k), err)
	}
	return v
}

func keyText(k bpf.LaceFlowKey) string {
	return fmt.Sprintf("network %d, %s:%d to %s:%d, protocol %d", k.Network, netip.AddrFrom16(k.Src.U8).Unmap(), onWire(k.Sport),
		netip.AddrFrom16(k.Dst.U8).Unmap(), onWire(k.Dport), k.Protocol)
}

// edit changes an entry.
func (n *node) edit(k bpf.LaceFlowKey, change func(*bpf.LaceFlow)) {
	n.t.Helper()
	v := n.flow(k)
	change(&v)
	table := n.table()
	defer table.Close()
	must(n.t, table.Put(k, v))
}

// ticks is the time as flows have it.
func ticks(t testing.TB) uint32 { return uint32(now(t) >> 30) }
