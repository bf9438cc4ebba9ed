// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
)

// answered wants the ICMP error about the packet that went in, every byte of it.
func answered(dev int, kind, code uint8, mtu uint32) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, n *node, r result, in []byte) {
		t.Helper()
		wantFrame(t, r.out, errorAbout(n, dev, in[14:], kind, code, mtu))
		goodChecksums(t, r.out)
	}
}

// errorAbout is the ICMP error of the gateway about a packet.
func errorAbout(n *node, dev int, packet []byte, kind, code uint8, mtu uint32) []byte {
	from := gateway4(n.opts.number)
	if packet[0]>>4 == 6 {
		from = gateway6(n.opts.number)
	}
	return errorFrom(from, macOf(n.opts.number, dev), plan.GatewayMAC, packet, kind, code, mtu)
}

// errorFrom is the ICMP error of an address about a packet: RFC 792, RFC 1812, RFC 4443.
func errorFrom(from netip.Addr, to, mac plan.MAC, packet []byte, kind, code uint8, mtu uint32) []byte {
	rest := binary.BigEndian.AppendUint32(nil, mtu)
	if from.Is4() {
		packet = packet[:binary.BigEndian.Uint16(packet[2:])] // without padding
		p := icmp(from, netip.AddrFrom4([4]byte(packet[12:])), kind, code, append(rest, packet[:min(len(packet), 548)]...))
		p.class, p.frag = 0xc0, 0x4000
		b := p.bytes()
		binary.BigEndian.PutUint16(b[4:], 0) // no identification: it is not fragmented
		binary.BigEndian.PutUint16(b[10:], 0)
		binary.BigEndian.PutUint16(b[10:], ^sum(b[:20], 0))
		return ethIP(to, mac, b)
	}
	packet = packet[:40+int(binary.BigEndian.Uint16(packet[4:]))]
	p := icmp(from, netip.AddrFrom16([16]byte(packet[8:])), kind, code, append(rest, packet[:min(len(packet), 1232)]...))
	return ethIP(to, mac, p.bytes())
}

// errorRows are packets that are refused with an answer, and those that never get one.
func errorRows() []row {
	hop, big, noRoute, noEndpoint := bpf.LaceReasonREASON_HOP_LIMIT, bpf.LaceReasonREASON_TOO_BIG, bpf.LaceReasonREASON_NO_ROUTE, bpf.LaceReasonREASON_NO_ENDPOINT
	nowhere4, nowhere6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	empty4, empty6 := netip.MustParseAddr("10.40.1.99"), netip.MustParseAddr("fd40:0:1::99")
	optioned := hops(udp(a4, far4, 1, 2, 50), 1)
	optioned.options = make([]byte, 40)
	odd4, odd6 := hops(udp(a4, far4, 1, 2, 51), 1), hops(udp(a6, far6, 1, 2, 51), 1)
	tight := func(n *node) { n.nexthops(nexthop{known: true, mtu: 1400}) }
	answer := func(name string, p ip, reason bpf.LaceReason, kind, code uint8, mtu uint32) row {
		return row{name: name, frame: fromA(p), verdict: redirect, reason: reason, check: answered(podA, kind, code, mtu)}
	}
	with := func(r row, prepare func(*node), srh bool) row { r.prepare, r.opts.srh = prepare, srh; return r }
	rows := []row{
		answer("TTL 1", odd4, hop, 11, 0, 0),
		answer("TTL 1 with options", optioned, hop, 11, 0, 0),
		answer("hop limit 1", odd6, hop, 3, 0, 0),
		answer("hop limit 1, bare", hops(ip{src: a6, dst: far6, proto: extNone}, 1), hop, 3, 0, 0),
		answer("TTL 1, bare", hops(ip{src: a4, dst: far4, proto: 253}, 1), hop, 11, 0, 0),
		answer("TTL 1, quote is cut", hops(udp(a4, far4, 1, 2, 1200), 1), hop, 11, 0, 0),
		answer("hop limit 1, quote is cut", hops(udp(a6, far6, 1, 2, 1400), 1), hop, 3, 0, 0),
		answer("too big, IPv4", udp(a4, far4, 1, 2, podMTU-27), big, 3, 4, podMTU),
		answer("too big, IPv6", udp(a6, far6, 1, 2, podMTU-47), big, 2, 0, podMTU),
		answer("too big for a neighbour", udp(a6, b6, 1, 2, podMTU-47), big, 2, 0, podMTU),
		with(answer("too big with SRH", udp(a4, far4, 1, 2, podMTU-27-24), big, 3, 4, podMTU-24), nil, true),
		with(answer("too big for a small uplink", udp(a6, far6, 1, 2, 1400-40-47), big, 2, 0, 1360), tight, false),
		answer("no route, IPv4", udp(a4, nowhere4, 1, 2, 9), noRoute, 3, 13, 0),
		answer("no route, IPv6", udp(a6, nowhere6, 1, 2, 9), noRoute, 1, 1, 0),
		answer("no route to a link-local address", udp(a6, linkLocal, 1, 2, 9), noRoute, 1, 1, 0),
		answer("no container, IPv4", udp(a4, empty4, 1, 2, 9), noEndpoint, 3, 1, 0),
		answer("no container, IPv6", udp(a6, empty6, 1, 2, 9), noEndpoint, 1, 3, 0),
		answer("about an echo request", icmp(a4, nowhere4, 8, 0, make([]byte, 4)), noRoute, 3, 13, 0),
		answer("about an echo request, IPv6", icmp(a6, nowhere6, 128, 0, make([]byte, 4)), noRoute, 1, 1, 0),
	}
	stale := func(n *node) { n.preset = bpf.LaceContext{IcmpMtu: 1234, IcmpType: 9, IcmpCode: 9} }
	rows = append(rows, with(answer("after a packet that was too big", odd4, hop, 11, 0, 0), stale, false),
		with(answer("after a packet that was too big, IPv6", odd6, hop, 3, 0, 0), stale, false))
	for name, p := range quietPackets() {
		rows = append(rows, row{name: "no answer " + name, frame: fromA(hops(p, 1)), verdict: shot, reason: hop})
	}
	for name, p := range map[string]ip{"IPv4": udp(a4, netip.MustParseAddr("239.1.2.3"), 1, 2, 9), "IPv6": udp(a6, netip.MustParseAddr("ff0e::1"), 1, 2, 9)} {
		rows = append(rows, row{name: "no answer to a new flow to multicast, " + name, frame: fromA(p), verdict: shot, reason: noRoute})
	}
	return append(append(rows, quietFlowRows()...), gsoRows()...)
}

// quietPackets never get an answer: RFC 1122 3.2.2, RFC 4443 2.4 (e).
func quietPackets() map[string]ip {
	later4 := udp(a4, far4, 1, 2, 9)
	later4.frag = 5
	fragment := func(rest [7]byte, body ip) ip {
		return ip{src: a6, dst: far6, proto: extFragment, body: extension(body.proto, rest, body.body)}
	}
	behind := icmp(a6, far6, 1, 0, make([]byte, 12))
	behind.body, behind.proto = extension(protoICMP6, [7]byte{0, 1, 4}, behind.body), extDest
	return map[string]ip{
		"to IPv4 multicast":               udp(a4, netip.MustParseAddr("239.1.2.3"), 1, 2, 9),
		"to IPv6 multicast":               udp(a6, netip.MustParseAddr("ff0e::1"), 1, 2, 9),
		"to a later fragment":             later4,
		"to a later fragment, IPv6":       fragment([7]byte{0, 0, 8}, udp(a6, far6, 1, 2, 9)),
		"to an error":                     icmp(a4, far4, 3, 1, make([]byte, 12)),
		"to a redirect":                   icmp(a4, far4, 5, 1, make([]byte, 12)),
		"to an error, IPv6":               icmp(a6, far6, 1, 0, make([]byte, 12)),
		"to a redirect, IPv6":             icmp(a6, far6, 137, 0, make([]byte, 12)),
		"to an error behind an extension": behind,
		"to an error in a first fragment": fragment([7]byte{0, 0, 1}, icmp(a6, far6, 1, 0, make([]byte, 12))),
	}
}

// quietFlowRows are packets of known flows that are refused further on, again without an answer: an error about a packet of
// the flow, and a later fragment, both larger than the way takes.
func quietFlowRows() []row {
	var rows []row
	for version, c := range map[string]struct{ in, out ip }{"IPv4": {in4, udp(a4, far4, 2, 1, 1000)}, "IPv6": {in6, udp(a6, far6, 2, 1, 1000)}} {
		opened := []input{{program: "uplink", dev: uplink, frame: fromUnderlay(overlay(c.in))}}
		about := complaint(c.in.dst, c.in.src, 3, c.in.bytes())
		about.body = append(about.body, make([]byte, podMTU)...)
		first, later := cut(c.out, 7, 0, 800), cut(c.out, 7, 800, 1008)
		later.body = append(later.body, make([]byte, podMTU)...)
		sent := []input{{program: "pod_l3", dev: podA, frame: fromA(first)}}
		rows = append(rows,
			row{name: "no answer to an error that is too big, " + version, before: opened, frame: fromA(about), verdict: shot, reason: bpf.LaceReasonREASON_TOO_BIG},
			row{name: "no answer to a later fragment that is too big, " + version, before: sent, frame: fromA(later), verdict: shot, reason: bpf.LaceReasonREASON_TOO_BIG})
	}
	return rows
}

// gsoRows: of a packet that is yet to be segmented, the segments have to fit.
func gsoRows() []row {
	big := bpf.LaceReasonREASON_TOO_BIG
	extended := tcp(a6, far6, 3000)
	extended.body, extended.proto = extension(protoTCP, [7]byte{0, 1, 4}, extended.body), extDest
	return []row{
		{name: "GSO too big", frame: fromA(tcp(a4, far4, 3000)), gso: podMTU - 39, verdict: redirect, reason: big, check: answered(podA, 3, 4, podMTU)},
		{name: "GSO too big, IPv6", frame: fromA(tcp(a6, far6, 3000)), gso: podMTU - 59, verdict: redirect, reason: big, check: answered(podA, 2, 0, podMTU)},
		{name: "GSO too big behind an extension", frame: fromA(extended), gso: podMTU - 67, verdict: redirect, reason: big, check: answered(podA, 2, 0, podMTU)},
		{name: "GSO fits behind an extension", frame: fromA(extended), gso: podMTU - 68, verdict: shot, reason: bpf.LaceReasonREASON_ENCAP_FAILED, check: unchecked},
		{name: "GSO too big, UDP", frame: fromA(udp(a4, far4, 1, 2, 3000)), gso: podMTU - 27, verdict: redirect, reason: big, check: answered(podA, 3, 4, podMTU)},
		{name: "GSO out of hops and small", frame: fromA(hops(udp(a4, far4, 1, 2, 200), 1)), gso: 100, verdict: redirect, reason: bpf.LaceReasonREASON_HOP_LIMIT, check: answered(podA, 11, 0, 0)},
	}
}

// gatewayRows are what is sent to the gateway, without and with a VRF whose stack answers.
func gatewayRows() []row {
	vrf := options{vrf: true}
	closed, unknown, passed := bpf.LaceReasonREASON_GATEWAY_CLOSED, bpf.LaceReasonREASON_NEIGHBOUR_UNKNOWN, bpf.LaceReasonREASON_GATEWAY_PASSED
	request := eth(broadcastMAC, macA, typeARP, arp(1, macA, a4, plan.MAC{}, gw4))
	probe := eth(broadcastMAC, macA, typeARP, arp(1, macA, netip.IPv4Unspecified(), plan.MAC{}, gw4))
	solicit := eth(solicitedMAC, macA, typeV6, nd(a6, solicitedNode, 135, 0, append(gw6.AsSlice(), option(1, macA)...)).bytes())
	echo4, echo6 := icmp(a4, gw4, 8, 0, []byte{1, 2, 3, 4, 5}), icmp(a6, gw6, 128, 0, []byte{1, 2, 3, 4, 5})
	reply4, reply6 := icmp(a4, gw4, 0, 0, make([]byte, 4)), icmp(a6, gw6, 129, 0, make([]byte, 4))
	advert := fromA(nd(a6, gw6, 136, 0x60, append(a6.AsSlice(), option(2, macA)...)))
	rows := []row{
		{name: "ARP", frame: request, check: arpAnswer(a4)},
		{name: "ARP probe", frame: probe, check: arpAnswer(netip.IPv4Unspecified())},
		{name: "ND", frame: solicit, check: ndAnswer(a6, macA)},
		{name: "ND from link-local", frame: eth(solicitedMAC, macA, typeV6, nd(linkLocal, solicitedNode, 135, 0, append(gw6.AsSlice(), option(1, macA)...)).bytes()), check: ndAnswer(linkLocal, macA)},
		{name: "ND unicast without option", frame: fromA(nd(a6, gw6, 135, 0, gw6.AsSlice())), check: ndAnswer(a6, macA)},
		{name: "ND with nonce", frame: fromA(nd(a6, gw6, 135, 0, append(append(gw6.AsSlice(), option(1, macA)...), 14, 1, 1, 2, 3, 4, 5, 6))), check: ndAnswer(a6, macA)},
		{name: "DAD for the gateway's address", frame: eth(solicitedMAC, macA, typeV6, nd(unspecified, solicitedNode, 135, 0, gw6.AsSlice()).bytes()), check: ndAnswer(unspecified, macA)},
		{name: "echo", frame: fromA(echo4), check: echoAnswer(echo4)},
		{name: "echo, IPv6", frame: fromA(echo6), check: echoAnswer(echo6)},
		{name: "echo, last hop", frame: fromA(hops(echo4, 1)), check: echoAnswer(hops(echo4, 1))},
	}
	for i := range rows {
		rows[i].verdict, rows[i].reason = redirect, bpf.LaceReasonREASON_GATEWAY_ANSWERED
	}
	rows = append(rows, fragmentEchoRows()...)
	for name, frame := range map[string][]byte{"ARP": request, "ARP reply": fromAARP(2), "ND": solicit, "advertisement": advert, "echo": fromA(echo4), "echo, IPv6": fromA(echo6),
		"echo reply": fromA(reply4), "echo reply, IPv6": fromA(reply6)} {
		rows = append(rows, row{name: "VRF " + name, opts: vrf, frame: frame, verdict: ok, reason: passed})
	}
	for name, frame := range map[string][]byte{
		"TCP": fromA(tcp(a4, gw4, 0)), "TCP, IPv6": fromA(tcp(a6, gw6, 0)), "UDP": fromA(udp(a4, gw4, 1, 53, 3)), "UDP, IPv6": fromA(udp(a6, gw6, 1, 53, 3)),
		"redirect": fromA(icmp(a4, gw4, 5, 1, make([]byte, 12))), "redirect, IPv6": fromA(icmp(a6, gw6, 137, 0, make([]byte, 36))),
		"too big": fromA(icmp(a6, gw6, 2, 0, make([]byte, 52))), "timestamp": fromA(icmp(a4, gw4, 13, 0, make([]byte, 16))),
		"echo of another code": fromA(icmp(a4, gw4, 8, 1, make([]byte, 4))), "no ICMP header": fromA(ip{src: a4, dst: gw4, proto: protoICMP}),
		"no ICMP header, IPv6": fromA(ip{src: a6, dst: gw6, proto: protoICMP6}),
	} {
		rows = append(rows, row{name: "closed " + name, frame: frame, verdict: shot, reason: closed},
			row{name: "VRF closed " + name, opts: vrf, frame: frame, verdict: shot, reason: closed})
	}
	return append(rows,
		row{name: "closed echo reply", frame: fromA(reply4), verdict: shot, reason: closed},
		row{name: "ARP for another", frame: eth(broadcastMAC, macA, typeARP, arp(1, macA, a4, plan.MAC{}, b4)), verdict: shot, reason: unknown},
		row{name: "ARP announcement", frame: eth(broadcastMAC, macA, typeARP, arp(1, macA, a4, plan.MAC{}, a4)), verdict: shot, reason: unknown},
		row{name: "ARP reply", frame: fromAARP(2), verdict: shot, reason: unknown},
		row{name: "ND for another", frame: eth(solicitedMAC, macA, typeV6, nd(a6, solicitedNode, 135, 0, b6.AsSlice()).bytes()), verdict: shot, reason: unknown},
		row{name: "DAD for its own address", frame: eth(solicitedMAC, macA, typeV6, nd(unspecified, solicitedNode, 135, 0, a6.AsSlice()).bytes()), verdict: shot, reason: unknown},
		row{name: "advertisement", frame: advert, verdict: shot, reason: unknown},
		row{name: "ND from afar", frame: fromA(hops(nd(a6, gw6, 135, 0, gw6.AsSlice()), 254)), verdict: shot, reason: bpf.LaceReasonREASON_MALFORMED},
		row{name: "ND cut short", frame: fromA(nd(a6, gw6, 135, 0, gw6.AsSlice()[:15])), verdict: shot, reason: bpf.LaceReasonREASON_MALFORMED},
		row{name: "ARP of another hardware", frame: otherARP(1, 6), verdict: shot, reason: bpf.LaceReasonREASON_MALFORMED},
		row{name: "ARP of another protocol", frame: otherARP(2, 9), verdict: shot, reason: bpf.LaceReasonREASON_MALFORMED},
		row{name: "ARP of another length", frame: otherARP(5, 16), verdict: shot, reason: bpf.LaceReasonREASON_MALFORMED},
	)
}

func fromAARP(op uint16) []byte {
	return eth(plan.GatewayMAC, macA, typeARP, arp(op, macA, a4, plan.GatewayMAC, gw4))
}

// otherARP is a request with one byte of its fixed part changed.
func otherARP(at int, value byte) []byte {
	b := arp(1, macA, a4, plan.MAC{}, gw4)
	b[at] = value
	return eth(broadcastMAC, macA, typeARP, b)
}

// fragmentEchoRows: the fragments of a large ping, each turned round by itself.
func fragmentEchoRows() []row {
	var rows []row
	payload := []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}
	first4 := icmp(a4, gw4, 8, 0, payload)
	first4.frag = 0x2000
	later4 := ip{src: a4, dst: gw4, proto: protoICMP, frag: 3, body: []byte{8, 0, 1, 2, 3, 4, 5, 6}}
	whole6 := icmp(a6, gw6, 128, 0, payload)
	first6 := ip{src: a6, dst: gw6, proto: extFragment, body: extension(protoICMP6, [7]byte{0, 0, 1, 0, 0, 0, 9}, whole6.body)}
	later6 := ip{src: a6, dst: gw6, proto: extFragment, body: extension(protoICMP6, [7]byte{0, 0, 24, 0, 0, 0, 9}, []byte{128, 0, 1, 2})}
	wantFirst6 := first6
	wantFirst6.src, wantFirst6.dst = gw6, a6
	wantFirst6.body = extension(protoICMP6, [7]byte{0, 0, 1, 0, 0, 0, 9}, icmp(gw6, a6, 129, 0, payload).body)
	turned := func(p ip) ip { p.src, p.dst = p.dst, p.src; return p }
	wantFirst4 := turned(icmp(a4, gw4, 0, 0, payload))
	wantFirst4.frag = 0x2000
	for name, c := range map[string]struct{ in, want ip }{
		"first, IPv4": {first4, wantFirst4}, "later, IPv4": {later4, turned(later4)},
		"first, IPv6": {first6, wantFirst6}, "later, IPv6": {later6, turned(later6)},
	} {
		rows = append(rows, row{name: "echo fragment, " + name, frame: fromA(c.in), verdict: redirect, reason: bpf.LaceReasonREASON_GATEWAY_ANSWERED,
			check: func(t testing.TB, _ *node, r result, _ []byte) {
				wantFrame(t, r.out, ethIP(macA, plan.GatewayMAC, c.want.bytes()))
			}})
	}
	return rows
}

func arpAnswer(to netip.Addr) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, _ *node, r result, _ []byte) {
		t.Helper()
		wantFrame(t, r.out, eth(macA, plan.GatewayMAC, typeARP, arp(2, plan.GatewayMAC, gw4, macA, to)))
	}
}

// ndAnswer: to whom has no address yet, all are told, and it is not called solicited (RFC 4861 7.2.4).
func ndAnswer(to netip.Addr, mac plan.MAC) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, _ *node, r result, _ []byte) {
		t.Helper()
		flags := uint8(0xe0)
		if to.IsUnspecified() {
			to, mac, flags = allNodes, allNodesMAC, 0xa0
		}
		wantFrame(t, r.out, ethIP(mac, plan.GatewayMAC, nd(gw6, to, 136, flags, append(gw6.AsSlice(), option(2, plan.GatewayMAC)...)).bytes()))
		goodChecksums(t, r.out)
	}
}

func echoAnswer(request ip) func(testing.TB, *node, result, []byte) {
	return func(t testing.TB, _ *node, r result, _ []byte) {
		t.Helper()
		kind := uint8(0)
		if request.src.Is6() {
			kind = 129
		}
		want := icmp(request.dst, request.src, kind, 0, request.body[4:])
		want.hops = request.hops
		wantFrame(t, r.out, ethIP(macA, plan.GatewayMAC, want.bytes()))
		goodChecksums(t, r.out)
	}
}

func TestErrors(t *testing.T) { runRows(t, errorRows()) }

func TestGateway(t *testing.T) { runRows(t, gatewayRows()) }

// budget sets what a container may still be told.
func (n *node) budget(dev int, tokens int64, stamp uint64) {
	n.t.Helper()
	must(n.t, n.coll.Maps["budgets"].Put(bpf.LaceBudgetKey{Of: uint32(n.bed.index[dev])}, bpf.LaceBudget{Tokens: tokens, Stamp: stamp}))
}

const longSpent = -1 << 40 // tokens that no test waits for

// TestBudget: a container that gets too many errors is told no more, until it has waited; others are not concerned.
func TestBudget(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	in := input{program: "pod_l3", dev: podA, frame: fromA(hops(udp(a4, far4, 1, 2, 9), 1))}
	other := input{program: "pod_l3", dev: podB, frame: toGateway(1, podB, hops(udp(b4, far4, 1, 2, 9), 1))}

	n.budget(podA, longSpent, now(t))
	if r := n.run(in); r.verdict != shot {
		t.Errorf("a container without budget is answered: %v", words(r.counted))
	}
	if r := n.run(other); r.verdict != redirect {
		t.Errorf("another container pays too: verdict %d, %v", r.verdict, words(r.counted))
	}
	n.budget(podA, -10, now(t))
	for end := time.Now().Add(30 * time.Second); n.run(in).verdict != redirect; {
		if time.Now().After(end) {
			t.Fatal("the budget is never filled again")
		}
	}
	n.budget(podA, 1<<40, now(t)-1e9)
	n.run(in)
	if left := n.budgetOf(podA); left != 49 {
		t.Errorf("%d answers are left of at most 50 after one", left)
	}
}

func (n *node) budgetOf(dev int) int64 {
	n.t.Helper()
	var b bpf.LaceBudget
	must(n.t, n.coll.Maps["budgets"].Lookup(bpf.LaceBudgetKey{Of: uint32(n.bed.index[dev])}, &b))
	return b.Tokens
}

// limitedRows stand for TestBudget in the list of reasons.
func limitedRows() []row {
	empty := func(n *node) { n.budget(podA, longSpent, now(n.t)) }
	return []row{{name: "too many errors", prepare: empty, frame: fromA(hops(udp(a4, far4, 1, 2, 9), 1)), verdict: shot,
		reason: bpf.LaceReasonREASON_HOP_LIMIT, also: []bpf.LaceReason{bpf.LaceReasonREASON_ICMP_LIMITED}}}
}

func TestLimited(t *testing.T) { runRows(t, limitedRows()) }
