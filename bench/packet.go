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
	protocolUDP      = 17
	protocolIPv6     = 41
	protocolEthernet = 143

	etherIPv4  = 0x0800
	etherIPv6  = 0x86dd
	etherOther = 0x88b5 // local experimental EtherType 1, IEEE 802

	hopLimit = 64
)

// udp is an IP packet with a UDP datagram of packetSize bytes. Its checksums are left 0: no program reads
// them, and a changed field moves them from whatever they are.
func udp(src, dst netip.Addr) []byte {
	datagram := make([]byte, 8+packetSize)
	binary.BigEndian.PutUint16(datagram, 40000)
	binary.BigEndian.PutUint16(datagram[2:], trafficPort)
	binary.BigEndian.PutUint16(datagram[4:], uint16(len(datagram)))
	if src.Is6() {
		return ipv6(src, dst, protocolUDP, datagram)
	}
	header := make([]byte, 20)
	header[0] = 0x45
	binary.BigEndian.PutUint16(header[2:], uint16(len(header)+len(datagram)))
	header[8], header[9] = hopLimit, protocolUDP
	copy(header[12:], src.AsSlice())
	copy(header[16:], dst.AsSlice())
	return append(header, datagram...)
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
