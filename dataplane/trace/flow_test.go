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

// frame is one of an EtherType, or length, between two containers of an L2 network.
func frame(etherType uint16, payload ...byte) []byte {
	b := []byte{2, 0x4c, 10, 50, 0, 34, 2, 0x4c, 10, 50, 0, 18}
	return append(binary.BigEndian.AppendUint16(b, etherType), payload...)
}

// arp asks who has 10.40.1.9, or, as operation 2, says so.
func arp(operation byte) []byte {
	b := frame(0x0806, 0, 1, 8, 0, 6, 4, 0, operation)
	b = append(b, make([]byte, 20)...)
	copy(b[28:], []byte{10, 40, 1, 5})
	copy(b[38:], []byte{10, 40, 1, 9})
	return b
}

// solicitation asks who has fd50::22.
func solicitation() []byte {
	target := netip.MustParseAddr("fd50::22").As16()
	return ip6("fd50::12", "ff02::1:ff00:22", 58, append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, target[:]...))
}

// frameInSRv6 puts a whole frame behind an outer header: next header 143, or 47 with a GRE header, and a routing header before it.
func frameInSRv6(b []byte, shim, srh bool) []byte {
	next, between := byte(143), []byte{}
	if shim {
		next, between = 47, []byte{0, 0, 0x65, 0x58}
	}
	if srh {
		sid := netip.MustParseAddr("5f00:1ace:2:17:0:c800::").As16()
		between = append(append([]byte{next, 2, 4, 0, 0, 0, 0, 0}, sid[:]...), between...)
		next = 43
	}
	return ip6("5f00:1ace:1:5ce:0:c800::", "5f00:1ace:2:17:0:c800::", next, append(between, b...))
}

func TestParseFlow(t *testing.T) {
	icmp := udp4()
	icmp[23], icmp[34], icmp[35] = 1, 8, 0
	first, later := fragment4(0, true), fragment4(185, false)
	other, noTCP := udp4(), udp4()[:14+20]
	other[23], noTCP[23] = 132, 6
	other143 := append(udp4()[:14+20], udp4()...)
	other143[23] = 143
	binary.BigEndian.PutUint16(other143[14+2:], uint16(len(other143)-14))
	outer := " in 5f00:1ace:1:5ce:0:c800:: > 5f00:1ace:2:17:0:c800::"
	srhIP := frameInSRv6(udp4()[14:], false, true)
	srhIP[14+40] = 4
	ownTunnel := append(udp4()[:14+20], append([]byte{0, 0, 0x65, 0x58}, udp4()...)...)
	ownTunnel[14+9] = 47
	binary.BigEndian.PutUint16(ownTunnel[14+2:], uint16(len(ownTunnel)-14))
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
		{"ARP", arp(1), true, "10.40.1.5 > 10.40.1.9 arp who-has"},
		{"ARP answer", arp(2), true, "10.40.1.5 > 10.40.1.9 arp is-at"},
		{"reverse ARP", arp(3), true, "10.40.1.5 > 10.40.1.9 arp op 3"},
		{"neighbour discovery", solicitation(), true, "fd50::12 > ff02::1:ff00:22 icmp6 NeighborSolicitation of fd50::22"},
		{"frame that is no IP", frame(0x88b5, 1, 2, 3), true, "02:4c:0a:32:00:12 > 02:4c:0a:32:00:22 ethertype 0x88b5"},
		{"LLC", frame(7, 0x42, 0x42, 3, 0, 0, 0, 0), true, "02:4c:0a:32:00:12 > 02:4c:0a:32:00:22 llc 0x42"},
		{"VLAN", frame(0x8100, append([]byte{0, 7}, udp4()[12:]...)...), true, "10.40.1.5:4242 > 10.40.2.7:53 udp vlan 7"},
		{"two VLANs, no IP", frame(0x88a8, 0, 9, 0x81, 0, 0, 7, 0x88, 0xb5, 1), true, "02:4c:0a:32:00:12 > 02:4c:0a:32:00:22 ethertype 0x88b5 vlan 9"},
		{"ARP in SRv6", frameInSRv6(arp(1), false, false), true, "10.40.1.5 > 10.40.1.9 arp who-has" + outer},
		{"IP frame in SRv6, no Ethernet", frameInSRv6(udp4(), false, false)[14:], false, "10.40.1.5:4242 > 10.40.2.7:53 udp" + outer},
		{"IP frame behind a shim", frameInSRv6(udp4(), true, false), true, "10.40.1.5:4242 > 10.40.2.7:53 udp" + outer},
		{"IP frame behind a routing header", frameInSRv6(udp4(), false, true), true, "10.40.1.5:4242 > 10.40.2.7:53 udp" + outer},
		{"IP frame behind a routing header and a shim", frameInSRv6(udp4(), true, true), true, "10.40.1.5:4242 > 10.40.2.7:53 udp" + outer},
		{"IP behind a routing header", srhIP, true, "10.40.1.5:4242 > 10.40.2.7:53 udp" + outer},
		{"IPv6 frame in SRv6", frameInSRv6(solicitation(), false, false), true, "fd50::12 > ff02::1:ff00:22 icmp6 NeighborSolicitation of fd50::22" + outer},
		{"tagged frame in SRv6", frameInSRv6(frame(0x8100, 0, 7, 0x88, 0xb5), false, false), true, "02:4c:0a:32:00:12 > 02:4c:0a:32:00:22 ethertype 0x88b5 vlan 7" + outer},
		{"frame in SRv6, cut off", frameInSRv6(udp4()[:9], false, false), true, "5f00:1ace:1:5ce:0:c800:: > 5f00:1ace:2:17:0:c800:: 143"},
		{"SRv6 of a frame, cut behind it", frameInSRv6(nil, false, false), true, "5f00:1ace:1:5ce:0:c800:: > 5f00:1ace:2:17:0:c800:: 143"},
		{"a container's own tunnel", ownTunnel, true, "10.40.1.5 > 10.40.2.7 47"},
		{"next header of a frame in IPv4", other143, true, "10.40.1.5 > 10.40.2.7 143"},
		{"a container's own tunnel in SRv6", frameInSRv6(ownTunnel, false, false), true, "10.40.1.5 > 10.40.2.7 47" + outer},
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
		{"cut behind Ethernet", udp4()[:14], true, "02:4c:0a:28:01:05 > 00:00:00:00:00:00 ethertype 0x0800"},
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
