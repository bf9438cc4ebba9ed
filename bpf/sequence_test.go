// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/topology"
)

// runner runs sequences of packets at node 1 of a pair and knows what may come of them. One of the two slots has the peering.
type runner struct {
	t      testing.TB
	n      *node
	open   uint32                   // slot with the peering
	active uint32                   // generation
	passed map[bpf.LaceFlowKey]bool // directions in which a packet has passed since the table was emptied
}

func newRunner(t testing.TB) *runner {
	t.Helper()
	p := newPair(t)
	n := p.nodes[1]
	g, err := n.maps.Generation()
	must(t, err)
	r := &runner{t: t, n: n, open: g & 1, active: g}
	r.copyToOtherSlot()
	return r
}

// copyToOtherSlot makes the slot that is not in use hold the same as the active one, without the peering.
func (r *runner) copyToOtherSlot() {
	r.t.Helper()
	const slotBit = 1 << 31
	m := r.n.maps
	for k, v := range all(r.t, m.Ports.All) {
		k.Slot ^= 1
		must(r.t, m.Ports.Put(k, v))
	}
	for k, v := range all(r.t, m.Endpoints.All) {
		k.Scope ^= slotBit
		must(r.t, m.Endpoints.Put(k, v))
	}
	for k, v := range all(r.t, m.Networks.All) {
		must(r.t, m.Networks.Put(k^slotBit, v))
	}
	for k, v := range all(r.t, m.Blocks.All) {
		k.Scope ^= slotBit
		must(r.t, m.Blocks.Put(k, v))
	}
	for k, v := range all(r.t, m.Peers.All) {
		k.Slot ^= 1
		must(r.t, m.Peers.Put(k, v))
	}
	var config bpf.LaceConfig
	must(r.t, r.n.coll.Maps["node_config"].Lookup(r.open, &config))
	must(r.t, r.n.coll.Maps["node_config"].Put(r.open^1, config))
	places := r.n.coll.Maps["nexthops"].MaxEntries() / 2
	for peer := uint32(0); peer <= router; peer++ {
		var hop bpf.LaceNexthop
		must(r.t, r.n.coll.Maps["nexthops"].Lookup(r.open*places+peer, &hop))
		must(r.t, r.n.coll.Maps["nexthops"].Put((r.open^1)*places+peer, hop))
	}
}

func all[K comparable, V any](t testing.TB, read func() (map[K]V, error)) map[K]V {
	t.Helper()
	rows, err := read()
	must(t, err)
	return rows
}

// commandLen is how many bytes of a script make a packet, or a change of the generation.
const commandLen = 10

// runScript runs a sequence, beginning without flows.
func (r *runner) runScript(t testing.TB, script []byte) {
	t.Helper()
	r.t, r.n = t, r.n.on(t)
	r.n.dropFlows()
	r.passed = map[bpf.LaceFlowKey]bool{}
	for i := 0; len(script) >= commandLen && i < 300 && !t.Failed(); i++ {
		r.command([commandLen]byte(script))
		script = script[commandLen:]
	}
	r.checkFlows()
}

func (r *runner) command(c [commandLen]byte) {
	r.t.Helper()
	switch op := c[0] % 16; {
	case op == 14:
		r.setGeneration((r.active + 2) ^ 1)
	case op == 15:
		r.setGeneration(r.active + 2)
	case op%2 == 0:
		from := []host{web1, near1, x1, db1}[c[1]%4]
		r.feed(input{program: "pod_l3", dev: from.dev, frame: mutated(toGateway(1, from.dev, commandPacket(c, from)), c)}, uint32(from.network()))
	default:
		from := []host{web2, near2, x2, db2, web1, db1, {9, podA}, {9, podD}}[c[1]%8]
		o := overlay(commandPacket(c, from))
		o.src, o.dst = outerSource(c[3]), locatorOf(1, 48).SID(topology.EndDT46, commandNetwork(c[3]>>2)).Addr
		frame := mutated(fromUnderlay(o), c)
		r.feed(input{program: "uplink", dev: uplink, frame: frame}, senderNetwork(frame))
	}
}

func (r *runner) setGeneration(g uint32) {
	r.t.Helper()
	must(r.t, r.n.coll.Maps["generation"].Put(uint32(0), g))
	r.active = g
}

func commandNetwork(b byte) topology.NetworkID {
	return []topology.NetworkID{backend, overlap, elsewhere, db}[b%4]
}

// outerSource is one of node 2, of the router, or of a node that is none.
func outerSource(b byte) netip.Addr {
	number := []int{2, 2, 2, router, router, 9, 1, 2}[b>>4%8]
	if number == router && b>>7 == 0 {
		return locatorOf(router, 48).Addr()
	}
	return locatorOf(number, 48).Source(commandNetwork(b), 0)
}

// commandPacket is what a host sends.
func commandPacket(c [commandLen]byte, from host) ip {
	v6 := c[4]&0x80 != 0
	to := []host{web1, near1, x1, db1, web2, near2, x2, db2}[c[2]%8]
	src, dst := from.addr(v6), to.addr(v6)
	sport, dport := 1000+uint16(c[5]%2), 1000+uint16(c[5]>>1%2)
	switch c[4] % 8 {
	case 0, 1, 2:
		flags := []string{"S", "SA", "A", "PA", "FA", "R", "RA", "F"}[c[6]%8]
		return segment(src, dst, sport, dport, flags, uint32(c[7]%4), uint32(c[7]>>2%4), int(c[6]>>4))
	case 3:
		kind := []uint8{8, 0, 13, 14}[c[6]%4]
		if v6 {
			kind = []uint8{128, 129}[c[6]%2]
		}
		return query(src, dst, kind, sport)
	case 4:
		return unreachable(udp(dst, src, dport, sport, 3))
	case 5:
		return unreachable(segment(dst, src, dport, sport, "A", 1, 1, 0))
	case 6:
		return ip{src: src, dst: dst, proto: 47, body: []byte{1, 2, 3, 4}}
	}
	return udp(src, dst, sport, dport, 3)
}

// mutated changes a byte of one packet in eight.
func mutated(frame []byte, c [commandLen]byte) []byte {
	if c[8]&7 != 7 {
		return frame
	}
	frame[(12+int(c[8]>>3)*4+int(c[9]>>6))%len(frame)] ^= 1 << (c[9] % 8)
	return frame
}

// senderNetwork is the network that an outer source names; 0: none.
func senderNetwork(frame []byte) uint32 {
	if len(frame) < 54 {
		return 0
	}
	src := frame[22:38]
	if binary.BigEndian.Uint16(src[6:]) == 0x5ce {
		return binary.BigEndian.Uint32(src[8:]) >> 8
	}
	if numberIn(src) == router {
		return uint32(backend)
	}
	return 0
}

// feed runs a packet and holds what must always be so. from: the network that it comes from.
func (r *runner) feed(in input, from uint32) {
	r.t.Helper()
	r.n.forget()
	got, err := r.n.try(in)
	if err != nil {
		return // the kernel takes no such packet
	}
	if got.verdict != redirect || len(got.counted) != 1 {
		return
	}
	reason := got.counted[0]
	if reason != bpf.LaceReasonREASON_ENCAPSULATED && reason != bpf.LaceReasonREASON_DECAPSULATED && reason != bpf.LaceReasonREASON_LOCAL {
		return
	}
	to := r.destination(got, reason, from)
	k := got.ctx.Key
	if k.Network != from {
		r.t.Errorf("a packet of network %d was taken for one of network %d", from, k.Network)
	}
	if local := r.addresses(from); reason == bpf.LaceReasonREASON_DECAPSULATED && slices.Contains(local, netip.AddrFrom16(k.Src.U8).Unmap()) {
		r.t.Errorf("the underlay speaks for a container here: %s", keyText(k))
	}
	if from != to && !r.mayCross(k, to) {
		r.t.Errorf("from network %d to network %d, generation %d: %s", from, to, r.active, keyText(k))
	}
	if got.ctx.Kind != 3 { // an ICMP error says nothing of the direction that it goes
		r.passed[k] = true
	}
}

// destination is the network that a packet went to.
func (r *runner) destination(got result, reason bpf.LaceReason, from uint32) uint32 {
	r.t.Helper()
	if reason == bpf.LaceReasonREASON_ENCAPSULATED {
		if source := networkIn(r.n, got.out[22:38]); source != int(from) {
			r.t.Errorf("from network %d with the outer source of network %d", from, source)
		}
		return uint32(networkIn(r.n, got.out[38:54]))
	}
	port, found, err := r.n.maps.Ports.Get(bpf.LacePortKey{Ifindex: got.ctx.Ifindex, Slot: r.active & 1})
	if err != nil || !found {
		r.t.Errorf("delivered to interface %d, which no container has (%v)", got.ctx.Ifindex, err)
	}
	if reason == bpf.LaceReasonREASON_DECAPSULATED && networkIn(r.n, got.ctx.Sid.U8[:]) != int(port.Network) {
		r.t.Errorf("a SID of network %d brought a packet to network %d", networkIn(r.n, got.ctx.Sid.U8[:]), port.Network)
	}
	return port.Network
}

// addresses are those of the containers of a network here.
func (r *runner) addresses(network uint32) (out []netip.Addr) {
	for _, h := range []host{web1, near1, x1, db1} {
		if uint32(h.network()) == network {
			out = append(out, h.addr(false), h.addr(true))
		}
	}
	return out
}

// mayCross: along the peering, or against it where the flow has been opened along it before.
func (r *runner) mayCross(k bpf.LaceFlowKey, to uint32) bool {
	if r.active&1 != r.open {
		return false
	}
	if k.Network == uint32(backend) && to == uint32(db) {
		return true
	}
	return k.Network == uint32(db) && to == uint32(backend) && r.passed[turned(k, to)]
}

// turned is the key of the other direction.
func turned(k bpf.LaceFlowKey, to uint32) bpf.LaceFlowKey {
	out := bpf.LaceFlowKey{Network: to, Src: k.Dst, Dst: k.Src, Sport: k.Dport, Dport: k.Sport, Protocol: k.Protocol}
	if k.Protocol == protoICMP || k.Protocol == protoICMP6 {
		kind := onWire(k.Dport)
		for query, answer := range answerType {
			if kind == query || kind == answer && k.Protocol == protoICMP6 == (query == 128) {
				kind ^= query ^ answer
				break
			}
		}
		out.Sport, out.Dport = k.Sport, onWire(kind)
	}
	return out
}

// checkFlows: there is no entry but of packets that have passed, and none is established that was not answered.
func (r *runner) checkFlows() {
	r.t.Helper()
	for k, f := range r.n.flows() {
		back := turned(k, f.Network)
		if !r.passed[k] && !r.passed[back] {
			r.t.Errorf("nothing has passed of %s", keyText(k))
		}
		if k.Protocol != protoTCP && f.State != 0 && !(r.passed[k] && r.passed[back]) {
			r.t.Errorf("state %d, but packets have not passed both ways: %s", f.State, keyText(k))
		}
		crosses := k.Network != f.Network
		along := k.Network == uint32(backend) && f.Network == uint32(db)
		if reply := f.Flags&uint16(bpf.LaceFlowFlagsFLOW_REPLY) != 0; crosses && along == reply {
			r.t.Errorf("opened against the peering: %s", keyText(k))
		}
	}
}

// opening is a script that opens a peered flow from a container here and has it answered.
func opening() []byte {
	there := [commandLen]byte{0, 0, 7, 0, 7}
	back := [commandLen]byte{1, 3, 0, 3, 7}
	return slices.Concat(there[:], back[:], []byte{14, 0, 0, 0, 0, 0, 0, 0, 0, 0}, there[:], back[:], []byte{14, 0, 0, 0, 0, 0, 0, 0, 0, 0}, back[:], there[:], back[:])
}

// FuzzSequences feeds sequences of packets to the entry programs of a node that has two networks with the same subnets and a
// third that one of them is peered with, while flows last and generations change: no packet goes from a network to another but
// by the peering that is active, or as an answer of what went by it.
func FuzzSequences(f *testing.F) {
	f.Add(opening())
	random := rand.New(rand.NewPCG(7, 8))
	for range 8 {
		f.Add(randomScript(random, 50))
	}
	r := newRunner(f)
	f.Fuzz(func(t *testing.T, script []byte) { r.runScript(t, script) })
}

// TestSequences is a short run of the same, the same each time, and shows that it gets to what it is about.
func TestSequences(t *testing.T) {
	decidedByNoKernel(t)
	r := newRunner(t)
	random := rand.New(rand.NewPCG(5, 6))
	rounds := 30
	if testing.Short() {
		rounds = 3
	}
	crossed := 0
	for round := range rounds {
		script := randomScript(random, 200)
		t.Run(fmt.Sprint("round ", round), func(t *testing.T) { r.runScript(t, script) })
		for k := range r.passed {
			if k.Network == uint32(db) && r.passed[turned(k, uint32(backend))] {
				crossed++
			}
		}
	}
	r.t, r.n = t, r.n.on(t)
	if crossed < rounds {
		t.Errorf("only %d peered flows were answered: the scripts get nowhere", crossed)
	}
	t.Logf("%d peered flows were answered", crossed)
}

// randomScript has sensible outer headers more often than not, and answers.
func randomScript(random *rand.Rand, commands int) []byte {
	script := make([]byte, 0, commands*commandLen)
	var last [commandLen]byte
	for range commands {
		var c [commandLen]byte
		for i := range c {
			c[i] = byte(random.Uint32())
		}
		switch random.IntN(4) {
		case 0:
			c = answerTo(last)
		case 1, 2:
			c = sensible(c)
		}
		if c[0]%16 >= 14 && random.IntN(3) > 0 {
			c[0] = byte(random.IntN(14))
		}
		if c[0]%16 < 14 {
			last = c
		}
		script = append(script, c[:]...)
	}
	return script
}

// networkChoice is what chooses a host's network in an outer header: see commandNetwork.
var networkChoice = [4]byte{0, 0, 1, 3}

// sensible has a packet from the underlay named as its hosts are.
func sensible(c [commandLen]byte) [commandLen]byte {
	c[1], c[2] = c[1]%4, c[2]%8
	if c[0]%2 == 1 {
		c[2] %= 4
	}
	c[3] = networkChoice[c[1]] | networkChoice[c[2]%4]<<2
	c[8] = 0
	return c
}

// answerTo is the other direction of a packet: one message of ICMP on, SYN+ACK for SYN.
func answerTo(c [commandLen]byte) [commandLen]byte {
	from, to := c[1]%4, c[2]%8
	c[5] = c[5]&1<<1 | c[5]>>1&1
	c[6] ^= 1
	c[2] = from
	if c[0]%2 == 1 { // it came from the other node
		c[2] += 4
	}
	c[0], c[1] = to/4, to%4
	return sensible(c)
}
