// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/maps"
)

// unknownRows are refused for what is known of flows, at the container and at the uplink.
func unknownRows() []row {
	rows := flowlessRows()
	rows = append(rows, fragmentRows()...)
	rows = append(rows, fullRows()...)
	return append(rows, networklessRows()...)
}

func TestUnknown(t *testing.T) {
	decidedByNoKernel(t)
	runRows(t, unknownRows())
}

// bothWays is a packet that podA sends to node 2, and one that comes from there: at both they are refused alike.
func bothWays(name string, reason bpf.LaceReason, out, in ip) []row {
	return []row{
		{name: name + ", from the container", frame: fromA(out), verdict: shot, reason: reason},
		{name: name + ", from the underlay", program: "uplink", dev: uplink, frame: fromUnderlay(overlay(in)), verdict: shot, reason: reason},
	}
}

// flowlessRows are answers and errors that belong to nothing that is known.
func flowlessRows() []row {
	noFlow := bpf.LaceReasonREASON_NO_FLOW
	id := []byte{0, 7, 0, 1}
	rows := bothWays("echo reply", noFlow, icmp(a4, far4, 0, 0, id), icmp(far4, a4, 0, 0, id))
	rows = append(rows, bothWays("timestamp reply", noFlow, icmp(a4, far4, 14, 0, make([]byte, 16)), icmp(far4, a4, 14, 0, make([]byte, 16)))...)
	rows = append(rows, bothWays("echo reply, IPv6", noFlow, icmp(a6, far6, 129, 0, id), icmp(far6, a6, 129, 0, id))...)
	// Source quench, redirect, router advertisement and solicitation, information, address mask; no type of its own.
	for _, kind := range []uint8{1, 4, 5, 6, 9, 10, 15, 16, 17, 18, 30, 42, 255} {
		rest := append(make([]byte, 4), in4.bytes()...)
		rows = append(rows, bothWays(fmt.Sprint("ICMP type ", kind), noFlow, icmp(a4, far4, kind, 0, rest), icmp(far4, a4, kind, 0, rest))...)
	}
	// Errors without a meaning, MLD, router solicitation, redirect, node information.
	for _, kind := range []uint8{0, 5, 100, 127, 130, 131, 132, 133, 137, 139, 140, 143, 200, 255} {
		rest := append(make([]byte, 36), in6.bytes()...)
		rows = append(rows, bothWays(fmt.Sprint("ICMPv6 type ", kind), noFlow, icmp(a6, far6, kind, 0, rest), icmp(far6, a6, kind, 0, rest))...)
	}
	for _, kind := range []uint8{3, 11, 12} {
		rows = append(rows, bothWays(fmt.Sprint("error of type ", kind), noFlow, complaint(a4, far4, kind, in4.bytes()), complaint(far4, a4, kind, udp(a4, far4, 1, 2, 30).bytes()))...)
	}
	for _, kind := range []uint8{1, 2, 3, 4} {
		quote := func(p ip) []byte { return append(make([]byte, 4), p.bytes()...) }
		rows = append(rows, bothWays(fmt.Sprint("error of type ", kind, ", IPv6"), noFlow, icmp(a6, far6, kind, 0, quote(in6)), icmp(far6, a6, kind, 0, quote(udp(a6, far6, 1, 2, 30))))...)
	}
	return rows
}

// fragmentRows are fragments that nothing is known of, or that are too small to be judged.
func fragmentRows() []row {
	tiny, unknown := bpf.LaceReasonREASON_FRAGMENT_TINY, bpf.LaceReasonREASON_FRAGMENT_UNKNOWN
	var rows []row
	for version, c := range map[string]struct{ out, in ip }{"": {ip{src: a4, dst: far4}, ip{src: far4, dst: a4}}, ", IPv6": {ip{src: a6, dst: far6}, ip{src: far6, dst: a6}}} {
		add := func(name string, reason bpf.LaceReason, packet func(of ip) ip, from, to int) {
			rows = append(rows, bothWays(name+version, reason, cut(packet(c.out), 9, from, to), cut(packet(c.in), 9, from, to))...)
		}
		datagram := func(of ip) ip { return udp(of.src, of.dst, 1, 2, 64) }
		connection := func(of ip) ip { return tcp(of.src, of.dst, 64) }
		ping := func(of ip) ip {
			if of.src.Is4() {
				return icmp(of.src, of.dst, 8, 0, make([]byte, 64))
			}
			return icmp(of.src, of.dst, 128, 0, make([]byte, 64))
		}
		options := func(of ip) ip { p := connection(of); p.body[12] = 10 << 4; return p }
		other := func(of ip) ip { of.proto, of.body = 253, make([]byte, 64); return of }
		add("later fragment of UDP", unknown, datagram, 8, 40)
		add("last fragment of UDP", unknown, datagram, 40, 72)
		add("later fragment of TCP", unknown, connection, 24, 40)
		add("later fragment of ICMP", unknown, ping, 8, 40)
		add("later fragment of another protocol", unknown, other, 8, 40)
		add("first fragment without UDP ports", tiny, datagram, 0, 0)
		add("first fragment with half of the UDP ports", tiny, datagram, 0, 2)
		add("first fragment with 8 bytes of TCP", tiny, connection, 0, 8)
		add("first fragment with 16 bytes of TCP", tiny, connection, 0, 16)
		add("first fragment with half of the TCP options", tiny, options, 0, 32)
		add("first fragment without ICMP header", tiny, ping, 0, 0)
		add("first fragment with half of the ICMP header", tiny, ping, 0, 4)
		add("TCP fragment over the sequence number", tiny, connection, 8, 40)
		add("TCP fragment over the flags", tiny, connection, 16, 40)
	}
	return append(rows, paddedRows()...)
}

// paddedRows: what a frame has behind the packet is not taken for its ports.
func paddedRows() []row {
	tiny := fromA(cut(udp(a4, far4, 1, 2, 64), 9, 0, 0))
	short := udp(a4, far4, 1, 2, 64)
	short.body = short.body[:2]
	return []row{
		{name: "padding behind a first fragment", frame: append(tiny, 0, 1, 0, 2, 0, 8, 0, 0), verdict: shot, reason: bpf.LaceReasonREASON_FRAGMENT_TINY},
		{name: "padding behind half of the ports", frame: append(fromA(short), 0, 2, 0, 8, 0, 0), verdict: shot, reason: bpf.LaceReasonREASON_MALFORMED},
	}
}

// full gives a node a table for that many entries; a flow takes two.
func full(entries uint32) func(n *node) {
	return func(n *node) {
		n.t.Helper()
		spec := loadSpec(n.t).Maps["flows"].InnerMap.Copy() // with its types: kernels before 6.3 take none without
		spec.MaxEntries = entries
		table, err := ebpf.NewMap(spec)
		must(n.t, err)
		defer table.Close() // the outer map keeps it
		must(n.t, n.coll.Maps["flows"].Put(uint32(0), table))
	}
}

// fullRows: a full table takes no new flow, whichever way it comes, and keeps those that it has.
func fullRows() []row {
	full2, reason := full(2), bpf.LaceReasonREASON_CONNTRACK_FULL
	out, in := udp(a4, far4, 1, 2, 3), udp(far4, a4, 5, 6, 3)
	known := []input{{program: "pod_l3", dev: podA, frame: fromA(out)}}
	keeps := func(entries int) func(testing.TB, *node, result, []byte) {
		return func(t testing.TB, n *node, r result, in []byte) {
			t.Helper()
			wantFrame(t, r.out, in)
			if got := len(n.flows()); got != entries {
				t.Errorf("the table has %d entries, want %d", got, entries)
			}
		}
	}
	rows := []row{
		{name: "full, to another node", frame: fromA(udp(a4, far4, 9, 2, 3))},
		{name: "full, IPv6", frame: fromA(udp(a6, far6, 1, 2, 3))},
		{name: "full, to a neighbour", frame: fromA(udp(a4, b4, 1, 2, 3))},
		{name: "full, the network with the same addresses", dev: podX, frame: toGateway(1, podX, out)},
		{name: "full, from the underlay", program: "uplink", dev: uplink, frame: fromUnderlay(overlay(in))},
	}
	for i := range rows {
		rows[i].prepare, rows[i].before, rows[i].verdict, rows[i].reason, rows[i].check = full2, known, shot, reason, keeps(2)
	}
	return append(rows,
		row{name: "room for one direction only", prepare: full(1), frame: fromA(out), verdict: shot, reason: reason, check: keeps(0)},
		row{name: "full, of the known flow", prepare: full2, before: known, frame: fromA(out), verdict: redirect, reason: bpf.LaceReasonREASON_ENCAPSULATED, check: unchecked},
		row{name: "full, answer of the known flow", prepare: full2, before: known, program: "uplink", dev: uplink, frame: fromUnderlay(overlay(udp(far4, a4, 2, 1, 3))),
			verdict: redirect, reason: bpf.LaceReasonREASON_DECAPSULATED, check: unchecked},
	)
}

// TestFullDecidesAgain: what a full table has is decided again in its place, and what made room takes it.
func TestFullDecidesAgain(t *testing.T) {
	n := newNode(t, newBed(t), options{number: 1})
	full(2)(n)
	known := input{program: "pod_l3", dev: podA, frame: fromA(udp(a4, far4, 1, 2, 3))}
	other := input{program: "pod_l3", dev: podA, frame: fromA(udp(a4, far4, 9, 2, 3))}
	wantCounted(t, n.run(known), redirect, bpf.LaceReasonREASON_ENCAPSULATED)
	must(t, n.maps.DecideAgain())
	wantCounted(t, n.run(known), redirect, bpf.LaceReasonREASON_ENCAPSULATED)
	wantCounted(t, n.run(other), shot, bpf.LaceReasonREASON_CONNTRACK_FULL)
	for key, flow := range n.flows() {
		if flow.Generation != n.generation() {
			t.Errorf("the entry %s is of generation %d, want %d", keyText(key), flow.Generation, n.generation())
		}
	}
	n.dropFlows()
	wantCounted(t, n.run(other), redirect, bpf.LaceReasonREASON_ENCAPSULATED)
}

// networklessRows: the network is gone from the topology, the container is still there.
func networklessRows() []row {
	gone := func(n *node) { must(n.t, n.maps.Networks.Delete(maps.Scope(backend, maps.SlotOf(n.generation())))) }
	local := udp(a4, b4, 1, 2, 3)
	return []row{
		{name: "network is gone, from the container", prepare: gone, frame: fromA(local), verdict: shot, reason: bpf.LaceReasonREASON_NO_NETWORK},
		{name: "network is gone, IPv6", prepare: gone, frame: fromA(udp(a6, far6, 1, 2, 3)), verdict: shot, reason: bpf.LaceReasonREASON_NO_NETWORK},
		{name: "network is gone, from the underlay", prepare: gone, program: "uplink", dev: uplink, frame: fromUnderlay(overlay(in4)), verdict: shot, reason: bpf.LaceReasonREASON_UNKNOWN_NETWORK},
		{name: "network is gone, the other one is not", prepare: gone, dev: podX, frame: toGateway(1, podX, udp(a4, a4, 1, 2, 3)), verdict: redirect,
			reason: bpf.LaceReasonREASON_LOCAL, check: unchecked},
	}
}
