// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// The fixture: two nodes with the networks 100 and 200, whose subnets are the same, and a foreign
// router that belongs to network 100. Every node has two containers in network 100 and one in 200 that has the
// addresses of the first.
//
//	node 1  10.40.1.10, .11   fd40:0:1::a, ::b   and in network 200 again 10.40.1.10, fd40:0:1::a
//	node 2  10.40.2.10, .11   fd40:0:2::a, ::b   …
const (
	backend   = topology.NetworkID(100)
	overlap   = topology.NetworkID(200)
	elsewhere = topology.NetworkID(300) // a network that no node has
	router    = 3                       // number of the foreign router
	networks  = 7                       // that a node of the fixture has at most
)

// Places of the interfaces. Both nodes use the same ones: no packet is really sent.
const (
	podA = iota // network 100
	podB        // network 100
	podX        // network 200, the addresses of podA
	uplink
	stranger // in no table
	podD     // network 400, on the nodes of a pair; 100 where they have L2 networks
	podE     // L2 networks: network 700
	machine  // L2 networks: a device of the host that a virtual machine is behind, network 500
	cutter   // L2 networks: the near end of the segmenter
	simple   // the number of those above, which are all alike
)

// Places of the interfaces of a bed with an outside.
const (
	wan      = simple + iota // what most leaves by
	wan2                     // another interface that leads out
	hostSide                 // lc-host
	hostPeer                 // lc-host-peer
	loopDev                  // lo
	devices
)

const (
	podMTU  = 1460
	linkMTU = 1500
)

// timeouts are the defaults of a topology.
var timeouts = topology.Conntrack{
	Max: 1024, TCPOpening: 4 * time.Minute, TCPEstablished: 124 * time.Minute, TCPClosing: 4 * time.Minute, TCPClosed: 4 * time.Minute,
	UDPNew: 2 * time.Minute, UDP: 5 * time.Minute, ICMP: time.Minute, Other: 10 * time.Minute,
}

// options say how a node is set up.
type options struct {
	number      int
	locatorBits int // 48
	srh, vrf    bool
	l2          bool // the networks of l2_node_test.go
	cut         bool // l2-gso = "segment"
	outside     bool // the networks of outside_node_test.go
	changeProto bool // decapsulate without the flags of 6.3
	bits4       plan.Lengths
	bits6       plan.Lengths
	blocks      []plan.Block
}

// node is the data plane of one node, run packet by packet.
type node struct {
	t    testing.TB
	opts options
	coll *ebpf.Collection
	maps *maps.Maps
	bed  *bed
	plan *plan.Plan

	preset bpf.LaceContext // what the stages find of an earlier one
}

// bed is a namespace with the interfaces of the fixture.
type bed struct {
	index [devices]int
	mac   [devices]plan.MAC // of the interfaces themselves
	work  chan func()       // done one after the other on a thread in the namespace
}

func newBed(t testing.TB) *bed {
	t.Helper()
	b := newSpace(t)
	must(t, b.in(b.makeDevices))
	return b
}

// newSpace is a bed without interfaces.
func newSpace(t testing.TB) *bed {
	t.Helper()
	needRoot(t)
	b := &bed{work: make(chan func())}
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		for f := range b.work {
			f()
		}
	}()
	t.Cleanup(func() { close(b.work) })
	must(t, b.in(func() error { return unix.Unshare(unix.CLONE_NEWNET) }))
	return b
}

func (b *bed) makeDevices() error {
	for i := range simple {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = fmt.Sprintf("lacebpf%d", i)
		b.mac[i] = plan.MAC{2, 0, 0, 0, 0xee, byte(i)}
		attrs.HardwareAddr = b.mac[i][:]
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: attrs.Name + "p"}); err != nil {
			return fmt.Errorf("make interface %s: %w", attrs.Name, err)
		}
		l, err := netlink.LinkByName(attrs.Name)
		if err != nil {
			return err
		}
		b.index[i] = l.Attrs().Index
	}
	return nil
}

func (b *bed) in(f func() error) error {
	done := make(chan error)
	b.work <- func() { done <- f() }
	return <-done
}

// locatorOf is the locator of a node, under the block 5f00:1ace::/32 (/16 for short locators).
func locatorOf(number, bits int) topology.Locator {
	b := netip.MustParseAddr("5f00:1ace::").As16()
	if bits > 32 {
		shifted := uint64(number) << (64 - bits)
		binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(b[:8])|shifted)
	} else {
		binary.BigEndian.PutUint32(b[:4], 0x5f000000|uint32(number)<<(32-bits))
	}
	return topology.Locator{Prefix: netip.PrefixFrom(netip.AddrFrom16(b), bits)}
}

func blockOf(bits int) netip.Prefix {
	if bits > 32 {
		return netip.MustParsePrefix("5f00:1ace::/32")
	}
	return netip.MustParsePrefix("5f00::/16")
}

// Addresses of a container: dev is podA, podB or podX.
func v4Of(number, dev int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 40, byte(number), byte(10 + dev%podX)})
}

func v6Of(number, dev int) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("fd40:0:%x::%x", number, 10+dev%podX))
}

func gateway4(number int) netip.Addr { return netip.AddrFrom4([4]byte{10, 40, byte(number), 1}) }
func gateway6(number int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("fd40:0:%x::1", number)) }

func macOf(number, dev int) plan.MAC { return plan.MAC{2, 0x4c, 0, 0, byte(number), byte(dev)} }

func networkOf(dev int) topology.NetworkID {
	if dev == podX {
		return overlap
	}
	return backend
}

// MAC addresses of the underlay.
var nexthopDst, nexthopSrc = plan.MAC{2, 0, 0, 0, 1, 1}, plan.MAC{2, 0, 0, 0, 1, 2}

func newNode(t testing.TB, b *bed, o options) *node {
	t.Helper()
	if o.locatorBits == 0 {
		o.locatorBits = 48
	}
	n := &node{t: t, opts: o, bed: b}
	n.load()
	n.plan = n.build()
	if o.l2 {
		n.plan = n.buildSegments()
	}
	if o.outside {
		n.plan = n.buildOutside()
		n.syncHost()
	}
	must(t, n.maps.InitFlows())
	n.sync(n.plan)
	must(t, n.maps.Beat())
	return n
}

var stages = map[bpf.LaceStage]string{
	bpf.LaceStageSTAGE_ROUTE:     "stage_route",
	bpf.LaceStageSTAGE_DELIVER:   "stage_deliver",
	bpf.LaceStageSTAGE_GATEWAY:   "stage_gateway",
	bpf.LaceStageSTAGE_ERROR:     "stage_error",
	bpf.LaceStageSTAGE_BRIDGE:    "stage_bridge",
	bpf.LaceStageSTAGE_NEIGHBOUR: "stage_neighbour",
	bpf.LaceStageSTAGE_FLOOD:     "stage_flood",
	bpf.LaceStageSTAGE_FRAME:     "stage_frame",

	bpf.LaceStageSTAGE_OUTER:      "outer",
	bpf.LaceStageSTAGE_OUTER_RAW:  "outer_raw",
	bpf.LaceStageSTAGE_ENTER:      "stage_enter",
	bpf.LaceStageSTAGE_EXIT:       "stage_exit",
	bpf.LaceStageSTAGE_MASQUERADE: "stage_masquerade",
	bpf.LaceStageSTAGE_EGRESS:     "stage_egress",
	bpf.LaceStageSTAGE_RELATED:    "stage_related",
}

func (n *node) load() {
	n.t.Helper()
	byFlags := uint8(1)
	if n.opts.changeProto || !decapByFlags(n.t) {
		byFlags = 0
	}
	n.coll = takeSpare(n.t, byFlags)
	n.fillStages()
	var err error
	n.maps, err = maps.New(n.coll.Maps)
	must(n.t, err)
}

func (n *node) fillStages() {
	n.t.Helper()
	for i, name := range stages {
		must(n.t, n.coll.Maps["stages"].Put(uint32(i), n.coll.Programs[name]))
	}
}

func (n *node) locator() topology.Locator { return locatorOf(n.opts.number, n.opts.locatorBits) }

func (n *node) build() *plan.Plan {
	p := &plan.Plan{Locator: n.locator(), LocatorBlock: blockOf(n.opts.locatorBits), Conntrack: timeouts}
	if n.opts.srh {
		p.Encapsulation = topology.SRH
	}
	bits4, bits6 := plan.Lengths{24}, plan.Lengths{64}
	if n.opts.bits4 != nil {
		bits4, bits6 = n.opts.bits4, n.opts.bits6
	}
	for _, id := range []topology.NetworkID{backend, overlap} {
		p.Networks = append(p.Networks, plan.Network{ID: id, BlockBits4: bits4, BlockBits6: bits6})
		for number := 1; number <= 2; number++ {
			p.Blocks = append(p.Blocks, n.block(id, number, netip.PrefixFrom(v4Of(number, 0), 24)),
				n.block(id, number, netip.PrefixFrom(v6Of(number, 0), 64)))
		}
	}
	p.Blocks = append(p.Blocks, n.opts.blocks...)
	for number := 1; number <= router; number++ {
		peer := plan.Peer{Index: uint32(number), Locator: locatorOf(number, n.opts.locatorBits)}
		if number == router {
			peer.Network = backend
		}
		if number != n.opts.number {
			p.Peers = append(p.Peers, peer)
		}
	}
	for dev := podA; dev <= podX; dev++ {
		p.Ports = append(p.Ports, n.port(dev))
	}
	return p
}

func (n *node) block(id topology.NetworkID, number int, prefix netip.Prefix) plan.Block {
	return plan.Block{Network: id, Prefix: prefix.Masked(), Local: number == n.opts.number, Peer: uint32(number),
		SID: locatorOf(number, n.opts.locatorBits).SID(topology.EndDT46, id)}
}

func (n *node) port(dev int) plan.Port {
	number, id := n.opts.number, networkOf(dev)
	return plan.Port{
		Attachment: plan.Attachment{NetworkID: id, V4: v4Of(number, dev), V6: v6Of(number, dev), MAC: macOf(number, dev)},
		HostIf:     fmt.Sprint(dev), Gateway4: gateway4(number), Gateway6: gateway6(number), Source: n.locator().Source(id, 0),
	}
}

func (n *node) devices() map[string]maps.Device {
	out := map[string]maps.Device{}
	for dev := podA; dev <= podX; dev++ {
		out[fmt.Sprint(dev)] = maps.Device{Index: uint32(n.bed.index[dev]), MTU: podMTU}
	}
	return out
}

// nexthop is how all peers are reached.
type nexthop struct {
	known, raw, none bool
	mtu              uint16
}

func (n *node) nexthops(h nexthop) {
	n.t.Helper()
	must(n.t, n.maps.SyncNexthops(n.ways(h)))
}

// sync makes the tables hold a plan.
func (n *node) sync(p *plan.Plan) maps.Synced {
	n.t.Helper()
	devices := n.devices()
	if n.opts.l2 {
		devices = n.segmentDevices()
	}
	if n.opts.outside {
		devices = n.pairDevices()
	}
	done, err := n.maps.Sync(p, n.opts.vrf, devices, n.ways(nexthop{known: true}))
	must(n.t, err)
	return done
}

func (n *node) ways(h nexthop) []maps.Nexthop {
	if h.mtu == 0 {
		h.mtu = linkMTU
	}
	var rows []maps.Nexthop
	for number := uint32(1); number <= router && !h.none; number++ {
		rows = append(rows, maps.Nexthop{Peer: number, Ifindex: uint32(n.bed.index[uplink]), MTU: h.mtu,
			Known: h.known, Raw: h.raw, Dst: nexthopDst, Src: nexthopSrc})
	}
	return rows
}

// Verdicts, as the programs return them.
const (
	pass     = 0xffffffff // TC_ACT_UNSPEC
	ok       = 0
	shot     = 2
	redirect = 7
)

// lastPassing is the last reason of a packet that goes on.
const lastPassing = bpf.LaceReasonREASON_FROM_HOST

// result is what became of a packet.
type result struct {
	verdict uint32
	out     []byte
	counted []bpf.LaceReason // in the order of the enum, once for each packet
	mark    uint32
	ctx     bpf.LaceContext
}

// input is a packet and where it comes in.
type input struct {
	program string
	dev     int
	frame   []byte
	gso     uint32
	tag     vlan
	mark    uint32
}

// skMark is where struct __sk_buff has the mark.
const skMark = 8

// skContext is struct __sk_buff as BPF_PROG_TEST_RUN takes it.
func skContext(ifindex int, gso uint32) []byte {
	c := make([]byte, 192)
	binary.NativeEndian.PutUint32(c[40:], uint32(ifindex))
	binary.NativeEndian.PutUint32(c[176:], gso)
	return c
}

func (n *node) run(in input) result {
	n.t.Helper()
	r, err := n.try(in)
	must(n.t, err)
	return r
}

// try is run, where the kernel may refuse the packet: newer ones take none that is shorter than its IP header.
func (n *node) try(in input) (result, error) {
	n.t.Helper()
	before := n.counters()
	n.clearContexts()
	r := result{out: make([]byte, len(in.frame)+512)}
	left := make([]byte, len(skContext(0, 0)))
	opts := &ebpf.RunOptions{Data: in.frame, DataOut: r.out, Context: skContext(n.bed.index[in.dev], in.gso), ContextOut: left}
	binary.NativeEndian.PutUint32(opts.Context.([]byte)[skMark:], in.mark)
	program := n.coll.Programs[in.program]
	if in.tag != (vlan{}) {
		program = n.tagger(in.program, in.tag)
	}
	err := n.bed.in(func() (err error) {
		r.verdict, err = program.Run(opts)
		return err
	})
	if err != nil {
		return r, err
	}
	r.out, r.mark = opts.DataOut, binary.NativeEndian.Uint32(left[skMark:])
	for i, after := range n.counters() {
		for range after - before[i] {
			r.counted = append(r.counted, bpf.LaceReason(i))
		}
	}
	r.ctx = n.context()
	return r, nil
}

// counters reads the tables themselves, in one go each: it is done around each packet.
func (n *node) counters() (out [bpf.LaceReasonREASON_MAX]uint64) {
	n.t.Helper()
	copy(out[:], n.packets("counters", len(out)))
	for i, packets := range n.packets("traffic", (networks+1)*trafficReasons) {
		if reason := bpf.LaceReason(i % trafficReasons); reason != bpf.LaceReasonREASON_NONE {
			out[reason] += packets
		}
	}
	return out
}

// packets are those of the first rows of a table of counters.
func (n *node) packets(table string, rows int) []uint64 {
	n.t.Helper()
	cpus := ebpf.MustPossibleCPU()
	var cursor ebpf.MapBatchCursor
	keys, perCPU := make([]uint32, rows), make([]bpf.LaceCounter, rows*cpus)
	got, err := n.coll.Maps[table].BatchLookup(&cursor, keys, perCPU, nil)
	if err != nil || got != rows {
		n.t.Fatalf("read %d rows of %s: got %d: %v", rows, table, got, err)
	}
	out := make([]uint64, rows)
	for i, c := range perCPU {
		out[keys[i/cpus]] += c.Packets
	}
	return out
}

func (n *node) clearContexts() {
	n.t.Helper()
	all := make([]bpf.LaceContext, ebpf.MustPossibleCPU())
	for i := range all {
		all[i] = n.preset
	}
	must(n.t, n.coll.Maps["contexts"].Put(uint32(0), all))
}

// context is what the stages handed on, on the processor that ran them.
func (n *node) context() bpf.LaceContext {
	n.t.Helper()
	var all []bpf.LaceContext
	must(n.t, n.coll.Maps["contexts"].Lookup(uint32(0), &all))
	for _, c := range all {
		if c != n.preset {
			return c
		}
	}
	return bpf.LaceContext{}
}

// forget gives everybody back what is rationed.
func (n *node) forget() {
	n.t.Helper()
	empty(n.t, n.coll.Maps["budgets"])
}

func words(reasons []bpf.LaceReason) (out []string) {
	for _, r := range reasons {
		out = append(out, maps.ReasonName(r))
	}
	return out
}

func sameReasons(a, b []bpf.LaceReason) bool {
	a, b = slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	return slices.Equal(a, b)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to load eBPF programs: run the tests as root")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// setMAC gives an interface of the bed another address.
func (b *bed) setMAC(dev int, mac plan.MAC) error {
	return b.in(func() error {
		l, err := netlink.LinkByIndex(b.index[dev])
		if err != nil {
			return err
		}
		return netlink.LinkSetHardwareAddr(l, mac[:])
	})
}
