// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
)

// target is the far end of the flow that is asked about, or of a frame.
type target struct {
	addr  netip.Addr
	port  uint16   // 0 for all but tcp and udp
	proto string   // "tcp", "udp", "icmp", which is ICMPv6 for an IPv6 address; "arp" or "nd": the question who has the address; "frame"
	mac   plan.MAC // of a frame, which is no IP
}

// The word of a target that is a MAC address, and the EtherType of the frame that is made up: one for experiments (IEEE 802, 9.2.2).
const (
	frameTarget  = "frame"
	experimental = 0x88b5
)

const targetForms = "write ADDRESS:PORT/tcp, ADDRESS:PORT/udp, ADDRESS/icmp, ADDRESS/arp (nd for IPv6), IPv6 with a port in brackets, or a MAC address"

// parseTarget reads "10.40.2.7:80/tcp", "[fd40::7]:53/udp", "10.40.2.7/icmp", "fd40::7/icmp", "10.50.0.7/arp", "fd50::7/nd",
// "02:4c:0a:32:00:07".
func parseTarget(s string) (t target, err error) {
	if t.mac.UnmarshalText([]byte(s)) == nil {
		t.proto = frameTarget
		return t, nil
	}
	where, proto, ok := strings.Cut(s, "/")
	if !ok {
		return t, fmt.Errorf("%.80q names no protocol: %s", s, targetForms)
	}
	t.proto = proto
	switch proto {
	case "icmp", "arp", "nd":
		if t.addr, err = netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(where, "["), "]")); err != nil {
			return t, fmt.Errorf("%.80q is no address: %s", where, targetForms)
		}
	case "tcp", "udp":
		both, err := netip.ParseAddrPort(where)
		if err != nil || both.Port() == 0 {
			return t, fmt.Errorf("%.80q is no address with a port: %s", where, targetForms)
		}
		t.addr, t.port = both.Addr(), both.Port()
	default:
		return t, fmt.Errorf("protocol %.20q is not known: %s", proto, targetForms)
	}
	return t, t.checkAddr()
}

func (t target) checkAddr() error {
	switch {
	case t.addr.Zone() != "" || t.addr.Is4In6():
		return fmt.Errorf("%s is no address of a container: %s", t.addr, targetForms)
	case t.proto == "arp" && t.addr.Is6():
		return fmt.Errorf("ARP asks for IPv4 addresses: write %s/nd", t.addr)
	case t.proto == "nd" && t.addr.Is4():
		return fmt.Errorf("neighbour discovery asks for IPv6 addresses: write %s/arp", t.addr)
	}
	return nil
}

func (t target) String() string {
	switch t.proto {
	case frameTarget:
		return t.mac.String()
	case "tcp", "udp":
		return netip.AddrPortFrom(t.addr, t.port).String() + "/" + t.proto
	}
	return t.addr.String() + "/" + t.proto
}

// asks says whether it is a question who has the address.
func (t target) asks() bool { return t.proto == "arp" || t.proto == "nd" }

// flows says whether it is a flow, of which there may be an open one.
func (t target) flows() bool { return t.proto != frameTarget && !t.asks() }

// of is the address from which a container sends to the target; ok is false where it has none of that family.
func (t target) of(a plan.Attachment) (addr netip.Addr, ok bool) {
	switch {
	case t.addr.Is4():
		return a.V4, a.V4.IsValid()
	case t.addr.Is6():
		return a.V6, a.V6.IsValid()
	case a.V4.IsValid():
		return a.V4, true
	}
	return a.V6, true
}

// protocol is the IP protocol number.
func (t target) protocol() layers.IPProtocol {
	switch {
	case t.proto == "tcp":
		return layers.IPProtocolTCP
	case t.proto == "udp":
		return layers.IPProtocolUDP
	case t.addr.Is4():
		return layers.IPProtocolICMPv4
	}
	return layers.IPProtocolICMPv6
}

// matches says whether a flow goes to the target. A query of ICMP has its type as destination port.
func (t target) matches(f maps.Flow) bool {
	port := t.port
	if t.proto == "icmp" {
		port = layers.ICMPv4TypeEchoRequest
		if t.addr.Is6() {
			port = layers.ICMPv6TypeEchoRequest
		}
	}
	return f.Dst == netip.AddrPortFrom(t.addr, port) && f.Protocol == uint8(t.protocol())
}

// fromPort is the source port, or the identifier of an echo request, of the packets that are made up.
const fromPort = 49152

// firstPacket is the IP packet with which a flow begins: a SYN, an empty datagram, an echo request.
func firstPacket(src netip.Addr, to target) ([]byte, error) {
	var network gopacket.NetworkLayer
	var parts []gopacket.SerializableLayer
	if to.addr.Is4() {
		ip := &layers.IPv4{Version: 4, TTL: 64, Flags: layers.IPv4DontFragment, Protocol: to.protocol(), SrcIP: src.AsSlice(), DstIP: to.addr.AsSlice()}
		network, parts = ip, append(parts, ip)
	} else {
		ip := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: to.protocol(), SrcIP: src.AsSlice(), DstIP: to.addr.AsSlice()}
		network, parts = ip, append(parts, ip)
	}
	upper, err := upperLayers(network, to)
	if err != nil {
		return nil, err
	}
	b := gopacket.NewSerializeBuffer()
	err = gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, append(parts, upper...)...)
	if err != nil {
		return nil, fmt.Errorf("make up a packet from %s to %s: %w", src, to, err)
	}
	return b.Bytes(), nil
}

func upperLayers(network gopacket.NetworkLayer, to target) ([]gopacket.SerializableLayer, error) {
	switch to.protocol() {
	case layers.IPProtocolTCP:
		l := &layers.TCP{SrcPort: fromPort, DstPort: layers.TCPPort(to.port), SYN: true, Window: 64240}
		return []gopacket.SerializableLayer{l}, l.SetNetworkLayerForChecksum(network)
	case layers.IPProtocolUDP:
		l := &layers.UDP{SrcPort: fromPort, DstPort: layers.UDPPort(to.port)}
		return []gopacket.SerializableLayer{l}, l.SetNetworkLayerForChecksum(network)
	case layers.IPProtocolICMPv4:
		return []gopacket.SerializableLayer{&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeEchoRequest, 0), Id: fromPort, Seq: 1}}, nil
	}
	l := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeEchoRequest, 0)}
	return []gopacket.SerializableLayer{l, &layers.ICMPv6Echo{Identifier: fromPort, SeqNumber: 1}}, l.SetNetworkLayerForChecksum(network)
}

// firstFrame is what goes to a MAC address: that packet, a question, or a frame that is no IP.
func firstFrame(dst, src plan.MAC, from netip.Addr, to target) ([]byte, error) {
	switch to.proto {
	case "arp":
		return ethernet(dst, src, unix.ETH_P_ARP, whoHas(src, from, to.addr)), nil
	case "nd":
		packet, err := solicitation(src, from, to.addr)
		return ethernet(dst, src, unix.ETH_P_IPV6, packet), err
	case frameTarget:
		return ethernet(dst, src, experimental, make([]byte, leastPayload)), nil
	}
	packet, err := firstPacket(from, to)
	if err != nil {
		return nil, err
	}
	return inEthernet(dst, src, packet), nil
}

const leastPayload = 46 // bytes, of an Ethernet frame

// whoHas is an ARP request (RFC 826).
func whoHas(mac plan.MAC, from, about netip.Addr) []byte {
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, layers.ARPRequest}, mac[:]...)
	b = append(b, from.AsSlice()...)
	return append(append(b, make([]byte, len(mac))...), about.AsSlice()...)
}

// solicitation is a neighbour solicitation with the asker's link-layer address (RFC 4861, section 4.3).
func solicitation(mac plan.MAC, from, about netip.Addr) ([]byte, error) {
	ip := &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6, SrcIP: from.AsSlice(), DstIP: solicited(about).AsSlice()}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeNeighborSolicitation, 0)}
	ask := &layers.ICMPv6NeighborSolicitation{TargetAddress: about.AsSlice(), Options: layers.ICMPv6Options{{Type: layers.ICMPv6OptSourceAddress, Data: mac[:]}}}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		return nil, err
	}
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, icmp, ask); err != nil {
		return nil, fmt.Errorf("make up a question for %s: %w", about, err)
	}
	return b.Bytes(), nil
}

// solicited is the group that whoever has an address listens to (RFC 4291, section 2.7.1).
func solicited(a netip.Addr) netip.Addr {
	group, b := netip.MustParseAddr("ff02::1:ff00:0").As16(), a.As16()
	copy(group[13:], b[13:])
	return netip.AddrFrom16(group)
}

// broadcast is the MAC address of all.
var broadcast = plan.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// groupMAC is the MAC address of a multicast group (RFC 1112, section 6.4; RFC 2464, section 7), or of all; ok is false where the address
// is that of one.
func groupMAC(a netip.Addr) (mac plan.MAC, ok bool) {
	b := a.AsSlice()
	switch {
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return broadcast, true
	case !a.IsMulticast():
		return mac, false
	case a.Is4():
		return plan.MAC{0x01, 0, 0x5e, b[1] & 0x7f, b[2], b[3]}, true
	}
	return plan.MAC{0x33, 0x33, b[12], b[13], b[14], b[15]}, true
}

// isGroup says whether a MAC address is that of many.
func isGroup(m plan.MAC) bool { return m[0]&1 != 0 }

// inEthernet puts an IP packet into a frame.
func inEthernet(dst, src plan.MAC, packet []byte) []byte {
	if packet[0]>>4 == 6 {
		return ethernet(dst, src, unix.ETH_P_IPV6, packet)
	}
	return ethernet(dst, src, unix.ETH_P_IP, packet)
}

func ethernet(dst, src plan.MAC, etherType uint16, payload []byte) []byte {
	b := append(net.HardwareAddr(dst[:]), src[:]...)
	return append(binary.BigEndian.AppendUint16(b, etherType), payload...)
}

// framed is the next header of a frame in SRv6 (RFC 8986, section 10.1).
const framed layers.IPProtocol = unix.IPPROTO_ETHERNET

// innerOf is that of an IP packet.
func innerOf(packet []byte) layers.IPProtocol {
	if packet[0]>>4 == 6 {
		return layers.IPProtocolIPv6
	}
	return layers.IPProtocolIPv4
}

// inSRv6 puts an IP packet or a frame behind the outer header of another node: H.Encaps.Red, or with a routing header of one
// segment H.Encaps (RFC 8986, section 5).
func inSRv6(src, sid netip.Addr, srh bool, inner layers.IPProtocol, packet []byte) ([]byte, error) {
	outer := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: inner, SrcIP: src.AsSlice(), DstIP: sid.AsSlice()}
	if srh {
		header := append([]byte{byte(inner), 2, 4, 0, 0, 0, 0, 0}, sid.AsSlice()...) // RFC 8754, section 2
		outer.NextHeader, packet = layers.IPProtocolIPv6Routing, append(header, packet...)
	}
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true}, outer, gopacket.Payload(packet)); err != nil {
		return nil, fmt.Errorf("make up the outer header of a packet to %s: %w", sid, err)
	}
	return b.Bytes(), nil
}

// sourceOf is the source of a frame's IPv6 header, where it has one.
func sourceOf(frame []byte) netip.Addr {
	const ip, src = 14, 14 + 8
	if len(frame) < ip+40 || binary.BigEndian.Uint16(frame[12:]) != unix.ETH_P_IPV6 {
		return netip.Addr{}
	}
	return netip.AddrFrom16([16]byte(frame[src:]))
}
