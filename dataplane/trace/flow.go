// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"fmt"
	"net/netip"
	"strconv"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// Flow is what the head of a packet says of it. Fields that its protocol does not have are zero.
type Flow struct {
	SrcMAC   string     `json:"src_mac,omitempty"`
	Protocol string     `json:"protocol"` // "tcp", "udp", "icmp", "icmp6", "arp", or a number
	Src      netip.Addr `json:"src"`
	Dst      netip.Addr `json:"dst"`
	SrcPort  uint16     `json:"src_port,omitempty"`
	DstPort  uint16     `json:"dst_port,omitempty"`
	ICMP     string     `json:"icmp,omitempty"` // type and code in words
	Outer    *Outer     `json:"outer,omitempty"`
}

// Outer is the SRv6 header around a flow.
type Outer struct {
	Src netip.Addr `json:"src"`
	SID netip.Addr `json:"sid"`
}

// ParseFlow reads the first bytes of a packet, from its Ethernet header on or, of an uplink that
// has none, from its IPv6 header on. It says as much as the bytes tell.
func ParseFlow(head []byte, ethernet bool) Flow {
	first := layers.LayerTypeEthernet
	if !ethernet {
		first = layers.LayerTypeIPv6
	}
	packet := gopacket.NewPacket(head, first, gopacket.DecodeOptions{NoCopy: true})
	var f Flow
	for _, l := range packet.Layers() {
		f.add(l)
	}
	return f
}

func (f *Flow) add(l gopacket.Layer) {
	switch l := l.(type) {
	case *layers.Ethernet:
		f.SrcMAC = l.SrcMAC.String()
		f.Protocol = fmt.Sprintf("ethertype 0x%04x", uint16(l.EthernetType))
	case *layers.ARP:
		f.Protocol = "arp"
		f.Src, _ = netip.AddrFromSlice(l.SourceProtAddress)
		f.Dst, _ = netip.AddrFromSlice(l.DstProtAddress)
	case *layers.IPv4:
		f.enter(l.SrcIP, l.DstIP, l.Protocol)
	case *layers.IPv6:
		f.enter(l.SrcIP, l.DstIP, l.NextHeader)
	case *layers.TCP:
		f.Protocol, f.SrcPort, f.DstPort = "tcp", uint16(l.SrcPort), uint16(l.DstPort)
	case *layers.UDP:
		f.Protocol, f.SrcPort, f.DstPort = "udp", uint16(l.SrcPort), uint16(l.DstPort)
	case *layers.ICMPv4:
		f.Protocol, f.ICMP = "icmp", l.TypeCode.String()
	case *layers.ICMPv6:
		f.Protocol, f.ICMP = "icmp6", l.TypeCode.String()
	}
}

// enter goes one IP header further in; what was there before is the outer one.
func (f *Flow) enter(src, dst []byte, protocol layers.IPProtocol) {
	if f.Src.Is6() && f.Outer == nil {
		f.Outer = &Outer{Src: f.Src, SID: f.Dst}
	}
	f.Src, _ = netip.AddrFromSlice(src)
	f.Dst, _ = netip.AddrFromSlice(dst)
	f.Protocol = strconv.Itoa(int(protocol))
}

// String is "10.40.1.5:4242 > 10.40.2.7:80 tcp", with the outer header behind it where there is one.
func (f Flow) String() string {
	s := f.Protocol
	switch {
	case f.SrcPort != 0 || f.DstPort != 0:
		s = fmt.Sprintf("%s > %s %s", netip.AddrPortFrom(f.Src, f.SrcPort), netip.AddrPortFrom(f.Dst, f.DstPort), f.Protocol)
	case f.Src.IsValid():
		s = fmt.Sprintf("%s > %s %s", f.Src, f.Dst, f.Protocol)
	case f.SrcMAC != "":
		s = fmt.Sprintf("from %s %s", f.SrcMAC, f.Protocol)
	}
	if f.ICMP != "" {
		s += " " + f.ICMP
	}
	if f.Outer != nil {
		s += fmt.Sprintf(" in %s > %s", f.Outer.Src, f.Outer.SID)
	}
	return s
}
