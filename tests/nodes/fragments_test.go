// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/lace-net/lace/dataplane/plan"
)

// TestFragments has datagrams in pieces, over a peering, on one node and between two.
func TestFragments(t *testing.T) {
	takesLong(t)
	s := newShop(t, "")
	s.each(t, func(t *testing.T, db *container, at int) {
		t.Run("whole", func(t *testing.T) { checkSizes(t, s.web, db, at) })
		t.Run("alone", func(t *testing.T) { checkLoneFragment(t, s.web, db, at) })
		t.Run("tiny", func(t *testing.T) { checkTinyFragment(t, s.web, db, at) })
	})
	for at := range 2 {
		t.Run(title("underlay", family(s.far.addresses()[at])), func(t *testing.T) { checkLoneFragmentOfNode(t, s, at) })
	}
}

const nextFragment = 44

var fragmentIDs atomic.Uint32

// piece is one fragment: the bytes of a payload from offset on, and whether more come.
func piece(src, dst netip.Addr, proto byte, id uint32, offset int, more bool, part []byte) []byte {
	word := offset // in units of 8, in the upper 13 bits: bytes as they are
	if src.Is4() {
		word /= 8
		if more {
			word |= 0x2000
		}
		p := ipv4(src, dst, proto, 64, part)
		binary.BigEndian.PutUint16(p[4:], uint16(id))
		binary.BigEndian.PutUint16(p[6:], uint16(word))
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
		return p
	}
	if more {
		word |= 1
	}
	return ipv6(src, dst, nextFragment, 64, join([]byte{proto, 0}, be16(word), binary.BigEndian.AppendUint32(nil, id), part))
}

// checkLoneFragment sends a later fragment before the first, which nobody may believe, and then both in order.
func checkLoneFragment(t *testing.T, from, to *container, at int) {
	a, b := from.addresses()[at], to.addresses()[at]
	seen := to.capture(t, "eth0")
	out := from.sender(t, "eth0")
	send := func(p []byte) { out.send(t, ethernet(plan.GatewayMAC, from.mac(t, "eth0"), etherType(a), p)) }
	whole := udp(netip.AddrPortFrom(a, 5), netip.AddrPortFrom(b, 5), join([]byte("the first piece.tail"), pattern(1, 20)))
	cut := 24
	early := fragmentIDs.Add(1)
	before := from.node.counter("fragment_unknown")
	until(t, "a later fragment alone is refused", func() bool {
		send(piece(a, b, protoUDP, early, cut, false, join([]byte("must not arrive"), whole[cut:])))
		return from.node.counter("fragment_unknown") > before
	})
	later := fragmentIDs.Add(1)
	send(piece(a, b, protoUDP, later, 0, true, whole[:cut]))
	send(piece(a, b, protoUDP, later, cut, false, whole[cut:]))
	seen.await(t, "a first fragment", containing([]byte("the first piece.")))
	seen.await(t, "the one behind it", containing([]byte("tail")))
	if n := seen.count(containing([]byte("must not arrive"))); n > 0 {
		t.Errorf("%d lone fragments came through", n)
	}
}

// checkTinyFragment cuts TCP headers, so that the flags come in the second piece: RFC 1858.
func checkTinyFragment(t *testing.T, from, to *container, at int) {
	a, b := from.addresses()[at], to.addresses()[at]
	out := from.sender(t, "eth0")
	send := func(p []byte) { out.send(t, ethernet(plan.GatewayMAC, from.mac(t, "eth0"), etherType(a), p)) }
	segment := tcp(netip.AddrPortFrom(a, 7), netip.AddrPortFrom(b, 7), 2, nil)
	for name, parts := range map[string][][]byte{
		"cut in the header": {piece(a, b, protoTCP, fragmentIDs.Add(1), 0, true, segment[:8])},
		"laid over the flags": {
			piece(a, b, protoTCP, fragmentIDs.Load(), 0, true, join(segment, pattern(1, 4))),
			piece(a, b, protoTCP, fragmentIDs.Load(), 8, false, segment[8:]),
		},
	} {
		before := from.node.counter("fragment_tiny")
		until(t, "a fragment "+name+" is refused", func() bool {
			for _, p := range parts {
				send(p)
			}
			return from.node.counter("fragment_tiny") > before
		})
	}
}

// checkLoneFragmentOfNode has another node send a later fragment without the first.
func checkLoneFragmentOfNode(t *testing.T, s *shop, at int) {
	a, b := s.web.addresses()[at], s.far.addresses()[at]
	n := s.nodes[1]
	out := s.wire.sender(t, "n2")
	p := piece(a, b, protoUDP, fragmentIDs.Add(1), 24, false, []byte("must not arrive"))
	next := byte(protoIPv4)
	if a.Is6() {
		next = protoIPv6
	}
	source, sid := netip.MustParseAddr("5f00:1ace:1:5ce:0:6500::"), netip.MustParseAddr("5f00:1ace:2:14:0:6600::")
	before := n.counter("fragment_unknown")
	until(t, "a node's later fragment alone is refused", func() bool {
		out.send(t, ethernet(n.mac(t, uplink), [6]byte{2, 0, 0, 0, 0, 9}, typeIPv6, ipv6(source, sid, next, 60, p)))
		return n.counter("fragment_unknown") > before
	})
}
