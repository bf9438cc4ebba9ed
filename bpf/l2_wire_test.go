// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// TestSegmentWire sends real frames both ways, over Ethernet and over tunnels without it, and each comes out as it went in.
func TestSegmentWire(t *testing.T) {
	one, two := partyAt(1, podA), partyAt(2, podA)
	allWires(t, true, func(t *testing.T, w *wire) {
		there, back := frames(one, two), frames(two, one)
		for _, name := range []string{
			"IPv4", "IPv4 bare", "IPv4 TCP", "IPv4 padded", "IPv4 full", "IPv6", "IPv6 bare", "IPv6 full", "experimental", "experimental, short", "experimental, full", "LLC, a length", "MPLS", "PPPoE",
		} {
			for tag, of := range tags {
				out, in := there[name], back[name]
				if of != (vlan{}) {
					if len(out) > frameMTU || len(out) == 15 { // too long, or too short for the kernel to take the tag off
						continue
					}
					out, in = tagged(out, of), tagged(in, of)
				}
				t.Run(tag+name, func(t *testing.T) {
					w.one.t, w.two.t = t, t
					w.one.send(out)
					w.two.receives(out)
					w.two.send(in)
					w.one.receives(in)
				})
			}
		}
		w.one.t, w.two.t = t, t
	})
}

// TestSegmentNeighbourWire: questions are answered by the other node, and what is for many comes to it, in all forms.
func TestSegmentNeighbourWire(t *testing.T) {
	decidedByNoKernel(t)
	allWires(t, true, func(t *testing.T, w *wire) {
		for _, x := range []struct{ question, answer []byte }{
			{asks(sMAC, 1, s4, other4), eth(sMAC, otherMAC, typeARP, arp(2, otherMAC, other4, sMAC, s4))},
			{asks(sMAC, 1, s4, lgw4), eth(sMAC, plan.GatewayMAC, typeARP, arp(2, plan.GatewayMAC, lgw4, sMAC, s4))},
			{solicits(sMAC, s6, other6), tells(sMAC, otherMAC, other6, s6, other6, 0x60)},
			{solicits(sMAC, unspecified, other6), tells(sMAC, otherMAC, other6, allNodes, other6, 0x20)},
			{solicits(sMAC, ownLL, otherLL), tells(sMAC, otherMAC, otherLL, ownLL, otherLL, 0x60)},
			{ethIP(solicitedGroupMC, sMAC, nd(s6, solicitedGroup, 135, 0, append(append(other6.AsSlice(), option(1, sMAC)...), 14, 1, 1, 2, 3, 4, 5, 6)).bytes()), tells(sMAC, otherMAC, other6, s6, other6, 0x60)},
		} {
			w.one.send(x.question)
			w.one.receives(x.answer)
		}
		for _, frame := range [][]byte{
			asks(sMAC, 1, s4, s4), solicits(sMAC, unspecified, s6), bridged(broadcastMAC, udp(s4, all4, 1, 2, 30)), bridged(allNodesMAC, udp(ownLL, allNodes, 1, 2, 30)),
			eth(groupMAC, sMAC, 0x88b5, []byte{1, 2, 3}), tagged(bridged(broadcastMAC, udp(s4, all4, 1, 2, 30)), vlan{typeVLAN, 5}),
		} {
			w.one.send(frame)
			w.two.receives(frame)
		}
	})
}

// TestSegmentsOnTheWire: a frame that is still to be segmented goes whole, behind a GRE header, and is whole at the other end.
func TestSegmentsOnTheWire(t *testing.T) {
	for name, o := range map[string]options{"reduced": {l2: true}, "srh": {l2: true, srh: true}, "change_proto": {l2: true, changeProto: true}, "srh change_proto": {l2: true, srh: true, changeProto: true}} {
		t.Run(name, func(t *testing.T) {
			w := newWire(t, o, false)
			seen := packetSocket(t, w.two.bed, w.two.uplink)
			must(t, unix.SetsockoptInt(w.one.socket, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
			for version, p := range map[string]ip{"IPv4": tcp(s4, other4, 4000), "IPv6": tcp(s6, other6, 4000)} {
				frame := bridged(otherMAC, p)
				header, kind := uint16(54), byte(1)
				if version == "IPv6" {
					header, kind = 74, 4
				}
				info := segmented(header, 1000)
				info[1] = kind
				binary.NativeEndian.PutUint16(info[6:], header-20)
				w.one.send(append(info, frame...))
				w.two.receives(frame)
				out := receive(t, seen)
				for !bytes.Contains(out, frame[40:]) {
					out = receive(t, seen)
				}
				next, at := out[14+6], 14+40
				if o.srh {
					next, at = out[at], at+24
				}
				if next != extGRE || !bytes.Equal(out[at:], shimmed(frame)) {
					t.Errorf("%s: on the wire, next header %d: %s", version, next, spaced(out[at:]))
				}
			}
		})
	}
}
