// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

// udp4 is Ethernet, IPv4, UDP: 10.40.1.5:4242 to 10.40.2.7:53.
func udp4() []byte {
	b := make([]byte, 14+20+8+4)
	copy(b[6:], []byte{2, 0x4c, 10, 40, 1, 5})
	b[12] = 0x08
	ip := b[14:]
	ip[0] = 0x45
	binary.BigEndian.PutUint16(ip[2:], 32)
	ip[8], ip[9] = 64, 17
	copy(ip[12:], []byte{10, 40, 1, 5, 10, 40, 2, 7})
	binary.BigEndian.PutUint16(ip[20:], 4242)
	binary.BigEndian.PutUint16(ip[22:], 53)
	binary.BigEndian.PutUint16(ip[24:], 12)
	return b
}

// inSRv6 puts the packet behind an Ethernet header into an IPv6 header with next header 4.
func inSRv6(b []byte) []byte {
	inner := b[14:]
	out := make([]byte, 14+40, 14+40+len(inner))
	binary.BigEndian.PutUint16(out[12:], 0x86dd)
	out[14] = 0x60
	binary.BigEndian.PutUint16(out[18:], uint16(len(inner)))
	out[20], out[21] = 4, 64
	src, dst := netip.MustParseAddr("5f00:1ace:1:5ce:0:6400::").As16(), netip.MustParseAddr("5f00:1ace:2:14:0:6400::").As16()
	copy(out[22:], src[:])
	copy(out[38:], dst[:])
	return append(out, inner...)
}

// icmpError4 is a router's word that the flow of udp4 meets no network.
func icmpError4() []byte {
	quoted := udp4()[14:]
	b := append(append([]byte{}, udp4()[:14+20]...), 3, 0, 0, 0, 0, 0, 0, 0)
	copy(b[14+12:], []byte{10, 40, 1, 1, 10, 40, 1, 5})
	b[14+9] = 1
	binary.BigEndian.PutUint16(b[14+2:], uint16(28+len(quoted)))
	return append(b, quoted...)
}

// ip6 is Ethernet and IPv6 from a to b, with the payload behind it.
func ip6(a, b string, next byte, payload []byte) []byte {
	out := make([]byte, 14+40, 14+40+len(payload))
	binary.BigEndian.PutUint16(out[12:], 0x86dd)
	out[14] = 0x60
	binary.BigEndian.PutUint16(out[18:], uint16(len(payload)))
	out[20], out[21] = next, 64
	src, dst := netip.MustParseAddr(a).As16(), netip.MustParseAddr(b).As16()
	copy(out[22:], src[:])
	copy(out[38:], dst[:])
	return append(out, payload...)
}

func icmp6(b []byte) []byte { return ip6("fd40:1::1", "fd40:1::5", 58, b) }

// icmpError6 says that a packet was too big.
func icmpError6() []byte {
	quoted := ip6("fd40:1::5", "fd40:2::7", 17, udp4()[14+20:])[14:]
	return icmp6(append([]byte{2, 0, 0, 0, 0, 0, 5, 180}, quoted...))
}

// fragment4 is udp4 as a fragment of packet 7, at offset times eight bytes.
func fragment4(offset uint16, more bool) []byte {
	b := udp4()
	b[14+5] = 7
	binary.BigEndian.PutUint16(b[14+6:], offset)
	if more {
		b[14+6] |= 0x20
	}
	return b
}

func fragment6(offset uint16, more bool) []byte {
	header := []byte{17, 0, 0, 0, 0, 0, 0, 7}
	binary.BigEndian.PutUint16(header[2:], offset<<3)
	if more {
		header[3] |= 1
	}
	return ip6("fd40:1::5", "fd40:2::7", 44, append(header, udp4()[14+20:]...))
}

func TestParseFlow(t *testing.T) {
	arp := make([]byte, 42)
	arp[12], arp[13], arp[15], arp[16], arp[18], arp[19], arp[21] = 8, 6, 1, 8, 6, 4, 1
	copy(arp[28:], []byte{10, 40, 1, 5})
	copy(arp[38:], []byte{10, 40, 1, 9})
	icmp := udp4()
	icmp[23], icmp[34], icmp[35] = 1, 8, 0
	first, later := fragment4(0, true), fragment4(185, false)
	other, noTCP := udp4(), udp4()[:14+20]
	other[23], noTCP[23] = 132, 6
	tests := []struct {
		name     string
		head     []byte
		ethernet bool
		want     string
	}{
		{"UDP", udp4(), true, "10.40.1.5:4242 > 10.40.2.7:53 udp"},
		{"ICMP", icmp, true, "10.40.1.5 > 10.40.2.7 icmp EchoRequest id 12"},
		{"in SRv6", inSRv6(udp4()), true, "10.40.1.5:4242 > 10.40.2.7:53 udp in 5f00:1ace:1:5ce:0:6400:: > 5f00:1ace:2:14:0:6400::"},
		{"in SRv6, no Ethernet", inSRv6(udp4())[14:], false, "10.40.1.5:4242 > 10.40.2.7:53 udp in 5f00:1ace:1:5ce:0:6400:: > 5f00:1ace:2:14:0:6400::"},
		{"ARP", arp, true, "10.40.1.5 > 10.40.1.9 arp"},
		{"error about a flow", icmpError4(), true, "10.40.1.1 > 10.40.1.5 icmp DestinationUnreachable(Net) about 10.40.1.5:4242 > 10.40.2.7:53 udp"},
		{"IPv6 error about a flow", icmpError6(), true, "fd40:1::1 > fd40:1::5 icmp6 PacketTooBig about [fd40:1::5]:4242 > [fd40:2::7]:53 udp"},
		{"error that quotes too little", icmpError4()[:14+20+8+12], true, "10.40.1.1 > 10.40.1.5 icmp DestinationUnreachable(Net)"},
		{"IPv6 error cut off", icmp6([]byte{2, 0, 0, 0}), true, "fd40:1::1 > fd40:1::5 icmp6 PacketTooBig"},
		{"IPv6 echo", icmp6([]byte{128, 0, 0, 0, 0, 77, 0, 1}), true, "fd40:1::1 > fd40:1::5 icmp6 EchoRequest id 77"},
		{"first fragment", first, true, "10.40.1.5:4242 > 10.40.2.7:53 udp fragment 0 of 7"},
		{"later fragment", later, true, "10.40.1.5 > 10.40.2.7 udp fragment 1480 of 7"},
		{"first IPv6 fragment", fragment6(0, true), true, "[fd40:1::5]:4242 > [fd40:2::7]:53 udp fragment 0 of 7"},
		{"later IPv6 fragment", fragment6(185, false), true, "fd40:1::5 > fd40:2::7 udp fragment 1480 of 7"},
		{"IPv6 fragment that is whole", fragment6(0, false), true, "[fd40:1::5]:4242 > [fd40:2::7]:53 udp"},
		{"fragment in SRv6", inSRv6(later), true, "10.40.1.5 > 10.40.2.7 udp fragment 1480 of 7 in 5f00:1ace:1:5ce:0:6400:: > 5f00:1ace:2:14:0:6400::"},
		{"another protocol", other, true, "10.40.1.5 > 10.40.2.7 132"},
		{"TCP header cut off", noTCP, true, "10.40.1.5 > 10.40.2.7 tcp"},
		{"cut behind Ethernet", udp4()[:14], true, "from 02:4c:0a:28:01:05 ethertype 0x0800"},
		{"cut in Ethernet", udp4()[:9], true, ""},
		{"nothing", nil, true, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := ParseFlow(tt.head, tt.ethernet).String(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
