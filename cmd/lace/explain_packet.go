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

// target is the far end of the flow that is asked about.
type target struct {
	addr  netip.Addr
	port  uint16 // 0 for icmp
	proto string // "tcp", "udp" or "icmp", which is ICMPv6 for an IPv6 address
}

// parseTarget reads "10.40.2.7:80/tcp", "[fd40::7]:53/udp", "10.40.2.7/icmp", "fd40::7/icmp".
func parseTarget(s string) (t target, err error) {
	const forms = "write ADDRESS:PORT/tcp, ADDRESS:PORT/udp or ADDRESS/icmp, IPv6 in brackets"
	where, proto, ok := strings.Cut(s, "/")
	if !ok {
		return t, fmt.Errorf("%.80q names no protocol: %s", s, forms)
	}
	t.proto = proto
	switch proto {
	case "icmp":
		if t.addr, err = netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(where, "["), "]")); err != nil {
			return t, fmt.Errorf("%.80q is no address: %s", where, forms)
		}
	case "tcp", "udp":
		both, err := netip.ParseAddrPort(where)
		if err != nil || both.Port() == 0 {
			return t, fmt.Errorf("%.80q is no address with a port: %s", where, forms)
		}
		t.addr, t.port = both.Addr(), both.Port()
	default:
		return t, fmt.Errorf("protocol %.20q is not known: %s", proto, forms)
	}
	if t.addr.Zone() != "" || t.addr.Is4In6() {
		return t, fmt.Errorf("%s is no address of a container: %s", t.addr, forms)
	}
	return t, nil
}

func (t target) String() string {
	if t.proto != "icmp" {
		return netip.AddrPortFrom(t.addr, t.port).String() + "/" + t.proto
	}
	return t.addr.String() + "/icmp"
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

// inEthernet puts an IP packet into a frame.
func inEthernet(dst, src plan.MAC, packet []byte) []byte {
	kind := uint16(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		kind = unix.ETH_P_IPV6
	}
	b := append(net.HardwareAddr(dst[:]), src[:]...)
	return append(binary.BigEndian.AppendUint16(b, kind), packet...)
}

// inSRv6 puts an IP packet behind the outer header of another node: H.Encaps.Red, or with a routing header of one
// segment H.Encaps (RFC 8986, section 5).
func inSRv6(src, sid netip.Addr, srh bool, packet []byte) ([]byte, error) {
	inner := layers.IPProtocolIPv4
	if packet[0]>>4 == 6 {
		inner = layers.IPProtocolIPv6
	}
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
