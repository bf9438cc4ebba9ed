// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/lace-net/lace/dataplane/plan"
)

// Ethertypes and protocols.
const (
	typeV4, typeV6, typeARP, typeVLAN = 0x0800, 0x86dd, 0x0806, 0x8100

	protoICMP, protoIPIP, protoTCP, protoUDP, protoV6, protoICMP6     = 1, 4, 6, 17, 41, 58
	extHop, extRouting, extFragment, extAuth, extDest, extNone, extL2 = 0, 43, 44, 51, 60, 59, 143
)

// ip is an IP packet; the addresses say of which version.
type ip struct {
	src, dst netip.Addr
	hops     uint8 // 0: 64
	class    uint8
	label    uint32
	proto    uint8  // of body, and so of the first extension header
	options  []byte // IPv4, whole words
	id       uint16 // IPv4; 0: 0x1234
	frag     uint16 // IPv4: flags and offset as on the wire
	body     []byte
}

func (p ip) bytes() []byte {
	if p.hops == 0 {
		p.hops = 64
	}
	if p.src.Is4() {
		return p.v4()
	}
	b := binary.BigEndian.AppendUint32(nil, 6<<28|uint32(p.class)<<20|p.label)
	b = binary.BigEndian.AppendUint16(b, uint16(len(p.body)))
	b = append(b, p.proto, p.hops)
	b = append(append(b, p.src.AsSlice()...), p.dst.AsSlice()...)
	return append(b, p.body...)
}

func (p ip) v4() []byte {
	header := 20 + len(p.options)
	b := []byte{0x40 | byte(header/4), p.class}
	b = binary.BigEndian.AppendUint16(b, uint16(header+len(p.body)))
	b = binary.BigEndian.AppendUint16(b, cmp.Or(p.id, 0x1234))
	b = binary.BigEndian.AppendUint16(b, p.frag)
	b = append(b, p.hops, p.proto, 0, 0)
	b = append(append(b, p.src.AsSlice()...), p.dst.AsSlice()...)
	b = append(b, p.options...)
	binary.BigEndian.PutUint16(b[10:], ^sum(b, 0))
	return append(b, p.body...)
}

// sum is the Internet checksum before it is inverted.
func sum(b []byte, start uint32) uint16 {
	s := start
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// pseudo is the sum over what a transport checksum covers of the IP header.
func pseudo(src, dst netip.Addr, proto uint8, length int) uint32 {
	return uint32(sum(append(src.AsSlice(), dst.AsSlice()...), uint32(proto)+uint32(length)))
}

func udp(src, dst netip.Addr, from, to uint16, size int) ip {
	b := make([]byte, 8+size)
	binary.BigEndian.PutUint16(b, from)
	binary.BigEndian.PutUint16(b[2:], to)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	for i := range size {
		b[8+i] = byte(i * 7)
	}
	binary.BigEndian.PutUint16(b[6:], ^sum(b, pseudo(src, dst, protoUDP, len(b))))
	return ip{src: src, dst: dst, proto: protoUDP, body: b}
}

func tcp(src, dst netip.Addr, size int) ip {
	b := make([]byte, 20+size)
	binary.BigEndian.PutUint16(b, 40000)
	binary.BigEndian.PutUint16(b[2:], 80)
	b[12], b[13] = 5<<4, 0x18
	binary.BigEndian.PutUint16(b[16:], ^sum(b, pseudo(src, dst, protoTCP, len(b))))
	return ip{src: src, dst: dst, proto: protoTCP, body: b}
}

// icmp is an ICMP message of the version that src has, with a right checksum.
func icmp(src, dst netip.Addr, kind, code uint8, rest []byte) ip {
	b := append([]byte{kind, code, 0, 0}, rest...)
	start, proto := uint32(0), uint8(protoICMP)
	if src.Is6() {
		proto = protoICMP6
		start = pseudo(src, dst, proto, len(b))
	}
	binary.BigEndian.PutUint16(b[2:], ^sum(b, start))
	return ip{src: src, dst: dst, proto: proto, body: b}
}

// nd is a neighbour discovery message; rest follows the reserved word.
func nd(src, dst netip.Addr, kind uint8, flags uint8, rest []byte) ip {
	p := icmp(src, dst, kind, 0, append([]byte{flags, 0, 0, 0}, rest...))
	p.hops = 255
	return p
}

// option is a link-layer address option.
func option(kind uint8, mac plan.MAC) []byte { return append([]byte{kind, 1}, mac[:]...) }

func arp(op uint16, senderMAC plan.MAC, sender netip.Addr, targetMAC plan.MAC, target netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4}
	b = binary.BigEndian.AppendUint16(b, op)
	b = append(append(b, senderMAC[:]...), sender.AsSlice()...)
	return append(append(b, targetMAC[:]...), target.AsSlice()...)
}

func eth(dst, src plan.MAC, kind uint16, payload []byte) []byte {
	b := append(append([]byte{}, dst[:]...), src[:]...)
	return append(binary.BigEndian.AppendUint16(b, kind), payload...)
}

// ethIP puts an IP packet into a frame.
func ethIP(dst, src plan.MAC, packet []byte) []byte {
	kind := uint16(typeV4)
	if packet[0]>>4 == 6 {
		kind = typeV6
	}
	return eth(dst, src, kind, packet)
}

// extension is an extension header of 8 bytes in front of body.
func extension(next uint8, rest [7]byte, body []byte) []byte {
	return append(append([]byte{next}, rest[:]...), body...)
}

// segmentHeader is a segment routing header with one segment.
func segmentHeader(next uint8, segment netip.Addr, inner []byte) []byte {
	b := []byte{next, 2, 4, 0, 0, 0, 0, 0}
	return append(append(b, segment.AsSlice()...), inner...)
}

// afterHop is a packet with one hop less, built anew.
func afterHop(p ip) []byte {
	if p.hops == 0 {
		p.hops = 64
	}
	p.hops--
	return p.bytes()
}

// plainV4 is a small IPv4 packet without meaning.
func plainV4(testing.TB) []byte {
	return udp(v4Of(1, podA), v4Of(2, podA), 1000, 2000, 0).bytes()
}

// outer is a frame with an outer header without meaning.
func outer(_ testing.TB, next uint8, inner []byte) []byte {
	p := ip{src: netip.MustParseAddr("5f00::1"), dst: netip.MustParseAddr("5f00::2"), proto: next, body: inner}
	return ethIP(plan.MAC{}, plan.MAC{}, p.bytes())
}

// wantFrame compares byte by byte.
func wantFrame(t testing.TB, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	at := 0
	for at < len(got) && at < len(want) && got[at] == want[at] {
		at++
	}
	t.Errorf("packet out differs at byte %d\n got %d: %s\nwant %d: %s", at, len(got), spaced(got), len(want), spaced(want))
}

func spaced(b []byte) string {
	if len(b) > 200 {
		return fmt.Sprintf("% x …", b[:200])
	}
	return fmt.Sprintf("% x", b)
}

// goodChecksums computes every checksum of a frame that is not fragmented, quotes in ICMP errors left out.
func goodChecksums(t testing.TB, frame []byte) {
	t.Helper()
	packet := frame[14:]
	proto, body := packet[9], packet
	var src, dst netip.Addr
	switch packet[0] >> 4 {
	case 4:
		header := int(packet[0]&15) * 4
		if sum(packet[:header], 0) != 0xffff {
			t.Errorf("IPv4 header checksum is wrong: % x", packet[:header])
		}
		body = packet[header:binary.BigEndian.Uint16(packet[2:])]
		src, dst = netip.AddrFrom4([4]byte(packet[12:])), netip.AddrFrom4([4]byte(packet[16:]))
	case 6:
		proto = packet[6]
		body = packet[40 : 40+int(binary.BigEndian.Uint16(packet[4:]))]
		src, dst = netip.AddrFrom16([16]byte(packet[8:])), netip.AddrFrom16([16]byte(packet[24:]))
	}
	start := pseudo(src, dst, proto, len(body))
	if proto == protoICMP {
		start = 0
	}
	if sum(body, start) != 0xffff {
		t.Errorf("checksum of protocol %d is wrong: %s", proto, spaced(body))
	}
}

// complaint is an ICMP error about a packet, or the start of one. kind: 3, 11 or 12, in IPv6 what is nearest to that.
func complaint(src, dst netip.Addr, kind uint8, quote []byte) ip {
	if src.Is6() {
		kind = map[uint8]uint8{3: 1, 11: 3, 12: 4}[kind]
	}
	return icmp(src, dst, kind, 0, append(make([]byte, 4), quote...))
}

// cut is a fragment of a packet: the bytes of its body from from to to.
func cut(p ip, id uint32, from, to int) ip {
	more := to < len(p.body)
	if p.src.Is4() {
		p.id, p.frag = uint16(id), p.frag&0x4000|uint16(from/8)
		if more {
			p.frag |= 0x2000
		}
		p.body = p.body[from:to]
		return p
	}
	rest := [7]byte{0, byte(from >> 8), byte(from)}
	if more {
		rest[2] |= 1
	}
	binary.BigEndian.PutUint32(rest[3:], id)
	p.body, p.proto = extension(p.proto, rest, p.body[from:to]), extFragment
	return p
}

// firstOf is a first fragment for a later one; false: the packet is none.
func firstOf(p ip) (first ip, later bool) {
	ports := udp(p.src, p.dst, 1000, 2000, 8)
	switch {
	case p.src.Is4() && p.frag&0x1fff != 0:
		return cut(ports, uint32(cmp.Or(p.id, 0x1234)), 0, 8), true
	case p.src.Is6() && p.proto == extFragment && p.body[2]|p.body[3]&^7 != 0:
		return cut(ports, binary.BigEndian.Uint32(p.body[4:]), 0, 8), true
	}
	return ip{}, false
}
