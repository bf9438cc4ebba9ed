// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/lace-net/lace/dataplane/plan"
)

const (
	protocolIPv4     = 4
	protocolTCP      = 6
	protocolUDP      = 17
	protocolIPv6     = 41
	protocolEthernet = 143

	etherIPv4  = 0x0800
	etherIPv6  = 0x86dd
	etherOther = 0x88b5 // local experimental EtherType 1, IEEE 802

	hopLimit = 64
)

// udp is a datagram of the flow that most packets belong to.
func udp(src, dst netip.Addr) []byte {
	return datagram(netip.AddrPortFrom(src, 40000), netip.AddrPortFrom(dst, trafficPort))
}

// datagram is an IP packet with a UDP datagram of packetSize bytes. Its checksums are left 0: no program reads
// them, and a changed field moves them from whatever they are.
func datagram(src, dst netip.AddrPort) []byte {
	payload := make([]byte, 8+packetSize)
	putPorts(payload, src, dst)
	binary.BigEndian.PutUint16(payload[4:], uint16(len(payload)))
	return ip(src.Addr(), dst.Addr(), protocolUDP, payload)
}

// segment is an IP packet with a TCP segment without data. Its checksums are left 0, as those of a datagram are.
func segment(src, dst netip.AddrPort, flags byte) []byte {
	payload := make([]byte, 20)
	putPorts(payload, src, dst)
	payload[12], payload[13] = 5<<4, flags
	return ip(src.Addr(), dst.Addr(), protocolTCP, payload)
}

// Flags of a TCP segment.
const (
	flagFIN = 0x01
	flagSYN = 0x02
	flagACK = 0x10
)

func putPorts(transport []byte, src, dst netip.AddrPort) {
	binary.BigEndian.PutUint16(transport, src.Port())
	binary.BigEndian.PutUint16(transport[2:], dst.Port())
}

// flowOf reads protocol and ends from a frame with an IP packet without options. Too short a frame is of none.
func flowOf(frame []byte) (protocol byte, src, dst netip.AddrPort) {
	start, length, next := 14+12, 4, 14+9 // of the addresses, and where the protocol is
	if len(frame) > 14 && frame[14]>>4 == 6 {
		start, length, next = 14+8, 16, 14+6
	}
	ports := start + 2*length
	if len(frame) < ports+4 {
		return 0, src, dst
	}
	end := func(addr, port int) netip.AddrPort {
		a, _ := netip.AddrFromSlice(frame[addr : addr+length])
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(frame[port:]))
	}
	return frame[next], end(start, ports), end(start+length, ports+2)
}

// turned is the datagram that answers the one in a frame.
func turned(frame []byte) []byte {
	_, src, dst := flowOf(frame)
	return datagram(dst, src)
}

// ip is a packet of the family that the addresses have.
func ip(src, dst netip.Addr, protocol byte, payload []byte) []byte {
	if src.Is6() {
		return ipv6(src, dst, protocol, payload)
	}
	header := make([]byte, 20)
	header[0] = 0x45
	binary.BigEndian.PutUint16(header[2:], uint16(len(header)+len(payload)))
	header[8], header[9] = hopLimit, protocol
	copy(header[12:], src.AsSlice())
	copy(header[16:], dst.AsSlice())
	return append(header, payload...)
}

func ipv6(src, dst netip.Addr, next byte, payload []byte) []byte {
	header := make([]byte, 40)
	header[0] = 0x60
	binary.BigEndian.PutUint16(header[4:], uint16(len(payload)))
	header[6], header[7] = next, hopLimit
	copy(header[8:], src.AsSlice())
	copy(header[24:], dst.AsSlice())
	return append(header, payload...)
}

// ethernet is a frame with an IP packet.
func ethernet(dst, src plan.MAC, packet []byte) []byte {
	if packet[0]>>4 == 6 {
		return frame(dst, src, etherIPv6, packet)
	}
	return frame(dst, src, etherIPv4, packet)
}

func frame(dst, src plan.MAC, kind uint16, payload []byte) []byte {
	return slices.Concat(dst[:], src[:], binary.BigEndian.AppendUint16(nil, kind), payload)
}
