// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// row is a packet at an entry program of node 1, and what should become of it.
type row struct {
	name    string
	opts    options // of node 1
	prepare func(n *node)
	before  []input // packets that go on, of the same node and earlier
	program string  // pod_l3
	dev     int     // podA
	frame   []byte
	gso     uint32
	tag     vlan
	verdict uint32
	reason  bpf.LaceReason                                   // NONE: nothing is counted
	also    []bpf.LaceReason                                 // counted beside it
	network int                                              // that it is counted for; 0: the container's, or network 100 at the uplink
	check   func(t testing.TB, n *node, r result, in []byte) // of the packet out
}

// nobody is the network of a packet of which none is known.
const nobody = -1

// form is what rows choose of a node.
type form struct{ srh, vrf, changeProto, l2, cut, outside bool }

func runRows(t *testing.T, rows []row) { runRowsAfter(t, bpf.LaceContext{}, rows) }

// runRowsAfter runs rows with what an earlier packet has left to the stages.
func runRowsAfter(t *testing.T, left bpf.LaceContext, rows []row) {
	b := newBed(t)
	shared := map[form]*node{} // of rows that leave a node as it was
	for _, r := range rows {
		r.opts.number = 1
		if r.opts.outside {
			b.needOutside(t)
		}
		key := form{r.opts.srh, r.opts.vrf, r.opts.changeProto, r.opts.l2, r.opts.cut, r.opts.outside}
		if r.prepare == nil && shared[key] == nil {
			shared[key] = newNode(t, b, r.opts)
			shared[key].preset = left
		}
		t.Run(r.name, func(t *testing.T) {
			if r.prepare != nil {
				n := newNode(t, b, r.opts)
				r.prepare(n)
				r.run(t, n)
				return
			}
			r.run(t, shared[key].on(t))
			shared[key].forget()
			shared[key].dropFlows()
			shared[key].dropFragments()
			empty(t, shared[key].coll.Maps["learned"])
		})
	}
}

func (r row) run(t testing.TB, n *node) {
	t.Helper()
	if r.program == "" {
		r.program = "pod_l3"
	}
	for i, in := range r.before {
		if before := n.run(in); before.verdict != redirect || before.counted[0] > lastPassing {
			t.Fatalf("packet %d before: verdict %d, %v", i, int32(before.verdict), words(before.counted))
		}
	}
	before := n.tally()
	got := n.run(input{program: r.program, dev: r.dev, frame: r.frame, gso: r.gso, tag: r.tag})
	want := r.also
	if r.reason != bpf.LaceReasonREASON_NONE {
		want = append([]bpf.LaceReason{r.reason}, want...)
	}
	wantCounted(t, got, r.verdict, want...)
	wantTally(t, n.tally().since(before), r.counts(want))
	switch {
	case r.check != nil:
		r.check(t, n, got, r.frame)
	case r.verdict != redirect:
		wantFrame(t, got.out, r.frame) // what is dropped or passed stays as it was
	}
}

// counts is what the row adds to the counters of the networks.
func (r row) counts(reasons []bpf.LaceReason) tally {
	network := uint32(backend)
	switch {
	case r.network == nobody:
		network = 0
	case r.network != 0:
		network = uint32(r.network)
	case r.opts.l2:
		network = uint32(segmentOf(r.dev))
	case r.opts.outside:
		network = uint32(host{1, r.dev}.network())
	case r.program == "pod_l3":
		network = uint32(networkOf(r.dev))
	}
	out := tally{}
	for _, reason := range reasons {
		out[bpf.LaceRefusalKey{Network: network, Reason: uint32(reason)}]++
	}
	return out
}

// Short names for what the rows are full of.
var (
	a4, b4, far4, gw4 = v4Of(1, podA), v4Of(1, podB), v4Of(2, podA), gateway4(1)
	a6, b6, far6, gw6 = v6Of(1, podA), v6Of(1, podB), v6Of(2, podA), gateway6(1)
	macA, macB        = macOf(1, podA), macOf(1, podB)
	linkLocal         = netip.MustParseAddr("fe80::4c:ff:fe00:1")
	solicitedNode     = netip.MustParseAddr("ff02::1:ff00:1")
	allNodes          = netip.MustParseAddr("ff02::1")
	unspecified       = netip.IPv6Unspecified()
	broadcastMAC      = plan.MAC{255, 255, 255, 255, 255, 255}
	solicitedMAC      = plan.MAC{0x33, 0x33, 0xff, 0, 0, 1}
	allNodesMAC       = plan.MAC{0x33, 0x33, 0, 0, 0, 1}
)

func fromA(p ip) []byte { return toGateway(1, podA, p) }

func podRows() []row {
	rows := localRows()
	rows = append(rows, guardRows()...)
	rows = append(rows, srv6Rows()...)
	return append(rows, failRows()...)
}

func localRows() []row {
	delivered := func(dev int, p ip) func(testing.TB, *node, result, []byte) {
		return func(t testing.TB, n *node, r result, _ []byte) { wantDelivered(t, n, r, dev, afterHop(p)) }
	}
	rows := []row{}
	for name, p := range map[string]ip{
		"v4": udp(a4, b4, 1, 2, 33), "v6": udp(a6, b6, 1, 2, 33), "v4 TCP": tcp(a4, b4, 100), "v6 full": udp(a6, b6, 1, 2, podMTU-48),
	} {
		rows = append(rows, row{name: "local " + name, frame: fromA(p), verdict: redirect, reason: bpf.LaceReasonREASON_LOCAL, check: delivered(podB, p)})
	}
	self := udp(a4, a4, 1, 2, 3)
	padded := udp(a4, b4, 1, 2, 3)
	return append(rows,
		row{name: "to itself", frame: fromA(self), verdict: redirect, reason: bpf.LaceReasonREASON_LOCAL, check: delivered(podA, self)},
		// In network 200 the address is podX's.
		row{name: "overlap to itself", dev: podX, frame: toGateway(1, podX, self), verdict: redirect, reason: bpf.LaceReasonREASON_LOCAL, check: delivered(podX, self)},
		row{name: "overlap has no second container", dev: podX, frame: toGateway(1, podX, udp(a4, b4, 1, 2, 3)), verdict: redirect,
			reason: bpf.LaceReasonREASON_NO_ENDPOINT, check: answered(podX, 3, 1, 0)},
		row{name: "padded frame", frame: append(fromA(padded), 0, 0, 0, 0, 0), verdict: redirect, reason: bpf.LaceReasonREASON_LOCAL,
			check: func(t testing.TB, n *node, r result, _ []byte) {
				wantDelivered(t, n, r, podB, append(afterHop(padded), 0, 0, 0, 0, 0))
			}},
		row{name: "GSO local", frame: fromA(tcp(a4, b4, 2000)), gso: podMTU - 40, verdict: redirect, reason: bpf.LaceReasonREASON_LOCAL,
			check: delivered(podB, tcp(a4, b4, 2000))},
	)
}

// guardRows are what a container may not send.
func guardRows() []row {
	version := udp(a4, far4, 1, 2, 0).bytes()
	version[0] = 0x65
	shortHeader := udp(a4, far4, 1, 2, 0).bytes()
	shortHeader[0] = 0x44
	long4, long6, short4 := udp(a4, far4, 1, 2, 0).bytes(), udp(a6, far6, 1, 2, 0).bytes(), udp(a4, far4, 1, 2, 0).bytes()
	binary.BigEndian.PutUint16(long4[2:], 29)
	binary.BigEndian.PutUint16(long6[4:], 9)
	binary.BigEndian.PutUint16(short4[2:], 19)
	options := udp(a4, far4, 67, 68, 0)
	options.options = make([]byte, 40)
	behind := udp(a6, far6, 547, 546, 8)
	behind.body, behind.proto = extension(protoUDP, [7]byte{0, 1, 4}, behind.body), extDest
	advert := icmp(linkLocal, allNodes, 134, 0, make([]byte, 12))
	advertBehind := icmp(a6, far6, 134, 0, make([]byte, 12))
	advertBehind.body, advertBehind.proto = extension(protoICMP6, [7]byte{0, 1, 4}, advertBehind.body), extHop
	firstAdvert := icmp(a6, far6, 134, 0, make([]byte, 12))
	firstAdvert.body, firstAdvert.proto = extension(protoICMP6, [7]byte{0, 0, 1}, firstAdvert.body), extFragment
	endless := ip{src: a6, dst: far6, proto: extHop, body: []byte{extDest, 0}}
	for range 8 {
		endless.body = append(endless.body, 1, 4, 0, 0, 0, 0, extDest, 0)
	}
	cut := ip{src: a6, dst: far6, proto: extDest, body: []byte{extDest, 7, 1, 4, 0, 0, 0, 0}}
	mapped := udp(a6, netip.AddrFrom16(b4.As16()), 1, 2, 0)
	drop := func(name string, frame []byte, reason bpf.LaceReason) row {
		return row{name: name, frame: frame, verdict: shot, reason: reason}
	}
	return []row{
		{name: "unknown port", dev: stranger, frame: fromA(udp(a4, b4, 1, 2, 0)), verdict: shot, reason: bpf.LaceReasonREASON_NO_PORT, network: nobody},
		drop("IPv4 of version 6", eth(plan.GatewayMAC, macA, typeV4, version), bpf.LaceReasonREASON_MALFORMED),
		drop("IPv6 of version 4", eth(plan.GatewayMAC, macA, typeV6, append(udp(a4, far4, 1, 2, 0).bytes(), make([]byte, 20)...)), bpf.LaceReasonREASON_MALFORMED),
		drop("IPv4 header below 20 bytes", ethIP(plan.GatewayMAC, macA, shortHeader), bpf.LaceReasonREASON_MALFORMED),
		drop("IPv4 longer than the frame", ethIP(plan.GatewayMAC, macA, long4), bpf.LaceReasonREASON_MALFORMED),
		drop("IPv4 shorter than its header", ethIP(plan.GatewayMAC, macA, short4), bpf.LaceReasonREASON_MALFORMED),
		drop("IPv6 longer than the frame", ethIP(plan.GatewayMAC, macA, long6), bpf.LaceReasonREASON_MALFORMED),
		drop("endless extension headers", fromA(endless), bpf.LaceReasonREASON_MALFORMED),
		drop("extension header cut short", fromA(cut), bpf.LaceReasonREASON_MALFORMED),
		drop("IPv4-mapped destination", fromA(mapped), bpf.LaceReasonREASON_MALFORMED),
		drop("LLDP", eth(plan.GatewayMAC, macA, 0x88cc, make([]byte, 50)), bpf.LaceReasonREASON_NOT_IP),
		drop("VLAN tag in the packet", eth(plan.GatewayMAC, macA, typeVLAN, append([]byte{0, 5, 8, 0}, plainV4(nil)...)), bpf.LaceReasonREASON_NOT_IP),
		drop("foreign MAC", ethIP(plan.GatewayMAC, macB, udp(a4, b4, 1, 2, 0).bytes()), bpf.LaceReasonREASON_SPOOFED_MAC),
		drop("foreign IPv4 address", fromA(udp(b4, far4, 1, 2, 0)), bpf.LaceReasonREASON_SPOOFED_ADDRESS),
		drop("foreign IPv6 address", fromA(udp(b6, far6, 1, 2, 0)), bpf.LaceReasonREASON_SPOOFED_ADDRESS),
		drop("link-local source, unicast", fromA(udp(linkLocal, far6, 1, 2, 0)), bpf.LaceReasonREASON_SPOOFED_ADDRESS),
		drop("DHCP client without an address", eth(broadcastMAC, macA, typeV4, udp(netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255"), 68, 67, 240).bytes()), bpf.LaceReasonREASON_SPOOFED_ADDRESS),
		{name: "IPv6 in a port without it", prepare: onlyV4, frame: fromA(udp(a6, far6, 1, 2, 0)), verdict: shot, reason: bpf.LaceReasonREASON_SPOOFED_ADDRESS},
		drop("foreign ARP sender MAC", eth(broadcastMAC, macA, typeARP, arp(1, macB, a4, plan.MAC{}, gw4)), bpf.LaceReasonREASON_SPOOFED_MAC),
		drop("foreign ARP sender", eth(broadcastMAC, macA, typeARP, arp(1, macA, b4, plan.MAC{}, gw4)), bpf.LaceReasonREASON_SPOOFED_ADDRESS),
		drop("foreign ND source", eth(solicitedMAC, macA, typeV6, nd(b6, solicitedNode, 135, 0, gw6.AsSlice()).bytes()), bpf.LaceReasonREASON_SPOOFED_ADDRESS),
		drop("advertisement of another's address", fromA(nd(a6, gw6, 136, 0x60, b6.AsSlice())), bpf.LaceReasonREASON_SPOOFED_ADDRESS),
		drop("past the gateway", ethIP(macB, macA, udp(a4, b4, 1, 2, 0).bytes()), bpf.LaceReasonREASON_NOT_FOR_GATEWAY),
		drop("past the gateway, IPv6", ethIP(macB, macA, udp(a6, b6, 1, 2, 0).bytes()), bpf.LaceReasonREASON_NOT_FOR_GATEWAY),
		drop("IPv4 multicast", ethIP(plan.MAC{1, 0, 0x5e, 0, 0, 1}, macA, udp(a4, netip.MustParseAddr("224.0.0.1"), 1, 2, 0).bytes()), bpf.LaceReasonREASON_MULTICAST),
		drop("IPv4 broadcast", ethIP(broadcastMAC, macA, udp(a4, b4, 1, 2, 0).bytes()), bpf.LaceReasonREASON_MULTICAST),
		drop("MLD from the unspecified address", ethIP(allNodesMAC, macA, icmp(unspecified, allNodes, 143, 0, make([]byte, 4)).bytes()), bpf.LaceReasonREASON_MULTICAST),
		drop("router solicitation", ethIP(allNodesMAC, macA, icmp(linkLocal, netip.MustParseAddr("ff02::2"), 133, 0, make([]byte, 4)).bytes()), bpf.LaceReasonREASON_MULTICAST),
		drop("router advertisement", ethIP(allNodesMAC, macA, advert.bytes()), bpf.LaceReasonREASON_ROUTER_ADVERTISEMENT),
		drop("router advertisement behind an extension", fromA(advertBehind), bpf.LaceReasonREASON_ROUTER_ADVERTISEMENT),
		drop("router advertisement in a first fragment", fromA(firstAdvert), bpf.LaceReasonREASON_ROUTER_ADVERTISEMENT),
		drop("DHCP server", fromA(udp(a4, far4, 67, 68, 240)), bpf.LaceReasonREASON_DHCP_SERVER),
		drop("DHCP server behind options", fromA(options), bpf.LaceReasonREASON_DHCP_SERVER),
		drop("DHCPv6 server", fromA(udp(a6, far6, 547, 546, 8)), bpf.LaceReasonREASON_DHCP_SERVER),
		drop("DHCPv6 server behind an extension", fromA(behind), bpf.LaceReasonREASON_DHCP_SERVER),
	}
}

// onlyV4 takes podA's IPv6 address away.
func onlyV4(n *node) {
	p := n.port(podA)
	p.V6, p.Gateway6 = netip.Addr{}, netip.Addr{}
	must(n.t, n.maps.PutPort(p, maps.Device{Index: uint32(n.bed.index[podA]), MTU: podMTU}))
}

func srv6Rows() []row {
	sid := locatorOf(2, 48).SID(topology.EndDT46, backend)
	routing := ip{src: a6, dst: far6, proto: extRouting, body: segmentHeader(protoUDP, far6, make([]byte, 8))}
	hidden := ip{src: a6, dst: far6, proto: extDest, body: extension(extRouting, [7]byte{0, 1, 4}, routing.body)}
	twice := ip{src: a6, dst: far6, proto: extHop, body: extension(extDest, [7]byte{0, 1, 4}, hidden.body)}
	fragment := ip{src: a6, dst: far6, proto: extFragment, body: extension(extRouting, [7]byte{0, 0, 1}, routing.body)}
	auth := ip{src: a6, dst: far6, proto: extAuth, body: append([]byte{extRouting, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, routing.body...)}
	rows := []row{}
	for name, p := range map[string]ip{
		"to a SID":              {src: a6, dst: sid.Addr, proto: protoIPIP, body: plainV4(nil)},
		"to the locator block":  udp(a6, netip.MustParseAddr("5f00:1ace:ffff::1"), 1, 2, 0),
		"routing header":        routing,
		"behind an extension":   hidden,
		"behind two extensions": twice,
		"in a first fragment":   fragment,
		"behind authentication": auth,
	} {
		rows = append(rows, row{name: "SRv6 " + name, frame: fromA(p), verdict: shot, reason: bpf.LaceReasonREASON_SRV6FROM_CONTAINER})
	}
	return rows
}

// failRows are what fails on the way out, and what an incomplete data plane does.
func failRows() []row {
	rows := []row{
		{name: "no way to the peer", prepare: func(n *node) { n.nexthops(nexthop{none: true}) },
			frame: fromA(udp(a4, far4, 1, 2, 0)), verdict: shot, reason: bpf.LaceReasonREASON_NO_NEXTHOP},
		// BPF_PROG_TEST_RUN gives a size and no type of segmentation, and the kernel refuses to grow that.
		{name: "no room", frame: fromA(tcp(a4, far4, 1600)), gso: 1000, verdict: shot, reason: bpf.LaceReasonREASON_ENCAP_FAILED, check: unchecked},
		{name: "error cannot be built", program: "stage_error", frame: fromA(udp(a4, far4, 1, 2, 0)), verdict: shot, reason: bpf.LaceReasonREASON_ICMP_FAILED,
			network: nobody, prepare: func(n *node) { n.preset = bpf.LaceContext{V4: 1, L3Len: 2000, Generation: n.generation()} }},
		{name: "error for an unknown port", program: "stage_error", dev: stranger, frame: fromA(udp(a4, far4, 1, 2, 0)), verdict: shot, reason: bpf.LaceReasonREASON_NO_PORT, network: nobody},
		{name: "gateway for an unknown port", program: "stage_gateway", dev: stranger, frame: fromA(udp(a4, far4, 1, 2, 0)), verdict: shot, reason: bpf.LaceReasonREASON_NO_PORT, network: nobody},
	}
	frames := map[string][]byte{
		"route": fromA(udp(a4, far4, 1, 2, 0)), "route v6": fromA(udp(a6, far6, 1, 2, 0)),
		"gateway": fromA(icmp(a4, gw4, 8, 0, make([]byte, 4))), "gateway ARP": eth(broadcastMAC, macA, typeARP, arp(1, macA, a4, plan.MAC{}, gw4)),
	}
	for name, frame := range frames {
		rows = append(rows, row{name: "no stage: " + name, prepare: emptyStages, frame: frame, verdict: shot, reason: bpf.LaceReasonREASON_STAGE_MISSING})
	}
	return append(rows, row{name: "no stage: error", prepare: emptyStages, frame: fromA(hops(udp(a4, far4, 1, 2, 0), 1)), verdict: shot,
		reason: bpf.LaceReasonREASON_HOP_LIMIT, also: []bpf.LaceReason{bpf.LaceReasonREASON_STAGE_MISSING}})
}

func emptyStages(n *node) {
	n.t.Helper()
	for i := range stages {
		must(n.t, n.coll.Maps["stages"].Delete(uint32(i)))
	}
}

func unchecked(testing.TB, *node, result, []byte) {}

func hops(p ip, h uint8) ip { p.hops = h; return p }

func TestPod(t *testing.T) { runRows(t, podRows()) }
