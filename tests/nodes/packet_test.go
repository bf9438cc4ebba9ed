// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"encoding/binary"
	"net/netip"
)

// Packets made by hand, each function one header around what comes after it.

const (
	typeIPv4 = 0x0800
	typeARP  = 0x0806
	typeVLAN = 0x8100
	typeIPv6 = 0x86dd

	protoICMP   = 1
	protoIPv4   = 4
	protoTCP    = 6
	protoUDP    = 17
	protoIPv6   = 41
	protoSRH    = 43
	protoICMPv6 = 58
)

func join(parts ...[]byte) []byte {
	var out []byte
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func be16(v int) []byte { return binary.BigEndian.AppendUint16(nil, uint16(v)) }

func ethernet(dst, src [6]byte, kind int, payload []byte) []byte {
	return join(dst[:], src[:], be16(kind), payload)
}

// checksum is the Internet checksum, RFC 1071.
func checksum(parts ...[]byte) uint16 {
	b := join(parts...)
	if len(b)%2 == 1 {
		b = append(b, 0)
	}
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

func ipv4(src, dst netip.Addr, proto byte, ttl byte, payload []byte) []byte {
	h := join([]byte{0x45, 0}, be16(20+len(payload)), []byte{0, 1, 0, 0, ttl, proto, 0, 0}, src.AsSlice(), dst.AsSlice())
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, payload...)
}

func ipv6(src, dst netip.Addr, next byte, hops byte, payload []byte) []byte {
	return join([]byte{0x60, 0, 0, 0}, be16(len(payload)), []byte{next, hops}, src.AsSlice(), dst.AsSlice(), payload)
}

// ip is ipv4 or ipv6, after the addresses.
func ip(src, dst netip.Addr, proto byte, ttl byte, payload []byte) []byte {
	if src.Is4() {
		return ipv4(src, dst, proto, ttl, payload)
	}
	return ipv6(src, dst, proto, ttl, payload)
}

// etherType is that of an address's family.
func etherType(a netip.Addr) int {
	if a.Is4() {
		return typeIPv4
	}
	return typeIPv6
}

// pseudo is the pseudo header of UDP and ICMPv6.
func pseudo(src, dst netip.Addr, proto byte, size int) []byte {
	if src.Is4() {
		return join(src.AsSlice(), dst.AsSlice(), []byte{0, proto}, be16(size))
	}
	return join(src.AsSlice(), dst.AsSlice(), []byte{0, 0}, be16(size), []byte{0, 0, 0, proto})
}

func udp(src, dst netip.AddrPort, payload []byte) []byte {
	d := join(be16(int(src.Port())), be16(int(dst.Port())), be16(8+len(payload)), []byte{0, 0}, payload)
	sum := checksum(pseudo(src.Addr(), dst.Addr(), protoUDP, len(d)), d)
	if sum == 0 {
		sum = 0xffff // 0 says that there is none, which IPv6 does not take
	}
	binary.BigEndian.PutUint16(d[6:], sum)
	return d
}

// tcp is a segment from sequence number 1 on, with a header of 20 bytes.
func tcp(src, dst netip.AddrPort, flags byte, payload []byte) []byte {
	s := join(be16(int(src.Port())), be16(int(dst.Port())), []byte{0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0}, payload)
	binary.BigEndian.PutUint16(s[16:], checksum(pseudo(src.Addr(), dst.Addr(), protoTCP, len(s)), s))
	return s
}

// icmpv6 completes a message, type and code and zeros for the checksum in front, by its checksum.
func icmpv6(src, dst netip.Addr, message []byte) []byte {
	binary.BigEndian.PutUint16(message[2:], checksum(pseudo(src, dst, protoICMPv6, len(message)), message))
	return message
}

// srh is a segment routing header with one segment.
func srh(next byte, segmentsLeft byte, segment netip.Addr, payload []byte) []byte {
	return join([]byte{next, 2, 4, segmentsLeft, 0, 0, 0, 0}, segment.AsSlice(), payload)
}

func arp(operation int, senderMAC [6]byte, sender netip.Addr, targetMAC [6]byte, target netip.Addr) []byte {
	return join(be16(1), be16(typeIPv4), []byte{6, 4}, be16(operation), senderMAC[:], sender.AsSlice(), targetMAC[:], target.AsSlice())
}

// outer is what of a frame on the underlay is Lace's: an IPv6 header and perhaps a routing header.
type outer struct {
	class    byte
	label    uint32
	length   int
	next     byte // behind the routing header
	hops     byte
	src, dst netip.Addr
	srh      []byte // 24 bytes, or nil
	inner    []byte
}

// parseOuter reads a frame with an IPv6 packet; false for others.
func parseOuter(frame []byte) (o outer, ok bool) {
	if len(frame) < 54 || binary.BigEndian.Uint16(frame[12:]) != typeIPv6 {
		return o, false
	}
	h := frame[14:]
	word := binary.BigEndian.Uint32(h)
	o = outer{class: byte(word >> 20), label: word & 0xfffff, length: int(binary.BigEndian.Uint16(h[4:])), next: h[6], hops: h[7], inner: h[40:]}
	o.src, o.dst = netip.AddrFrom16([16]byte(h[8:])), netip.AddrFrom16([16]byte(h[24:]))
	if o.next == protoSRH && len(o.inner) >= 24 {
		o.srh, o.next, o.inner = o.inner[:24], o.inner[0], o.inner[24:]
	}
	return o, true
}

// inner is the part of an IP packet that the tests look at.
type inner struct {
	src, dst netip.Addr
	proto    byte
	hops     byte
	class    byte
	payload  []byte
}

func parseIP(b []byte) (p inner, ok bool) {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && len(b) >= int(b[0]&15)*4:
		return inner{netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[9], b[8], b[1], b[int(b[0]&15)*4:]}, true
	case len(b) >= 40 && b[0]>>4 == 6:
		return inner{netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), b[6], b[7], b[0]<<4 | b[1]>>4, b[40:]}, true
	}
	return p, false
}

// icmpError is an ICMP error as its receiver sees it.
type icmpError struct {
	from       netip.Addr
	kind, code byte
	mtu        int
	about      inner
}

func parseICMPError(b []byte) (e icmpError, ok bool) {
	p, ok := parseIP(b)
	if !ok || len(p.payload) < 8 {
		return e, false
	}
	m := p.payload
	e = icmpError{from: p.src, kind: m[0], code: m[1]}
	switch {
	case p.proto == protoICMP && (e.kind == 3 || e.kind == 11) && checksum(m) == 0:
		e.mtu = int(binary.BigEndian.Uint16(m[6:]))
	case p.proto == protoICMPv6 && e.kind >= 1 && e.kind <= 4 && checksum(pseudo(p.src, p.dst, protoICMPv6, len(m)), m) == 0:
		e.mtu = int(binary.BigEndian.Uint32(m[4:]))
	default:
		return e, false
	}
	e.about, ok = parseIP(m[8:])
	return e, ok
}
