// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// Flow is what the head of a packet says of it. Fields that its protocol does not have are zero.
type Flow struct {
	SrcMAC   string     `json:"src_mac,omitempty"` // of the innermost Ethernet header
	DstMAC   string     `json:"dst_mac,omitempty"`
	VLAN     uint16     `json:"vlan,omitempty"` // the outermost tag's number; one that the kernel has taken off is not in the bytes
	Protocol string     `json:"protocol"`       // "tcp", "udp", "icmp", "icmp6", "arp", a number; of what is no IP "ethertype 0x88b5" or "llc 0x42"
	Src      netip.Addr `json:"src"`
	Dst      netip.Addr `json:"dst"`
	SrcPort  uint16     `json:"src_port,omitempty"`
	DstPort  uint16     `json:"dst_port,omitempty"`
	ICMP     string     `json:"icmp,omitempty"`     // type and code in words
	ICMPID   uint16     `json:"icmp_id,omitempty"`  // of a query and its answer
	ARP      string     `json:"arp,omitempty"`      // "who-has", "is-at", or "op" and the number
	Target   netip.Addr `json:"target,omitzero"`    // of neighbour discovery: the address that it is about
	Fragment *Fragment  `json:"fragment,omitempty"` // where the packet is one of several
	Quoted   *Flow      `json:"quoted,omitempty"`   // what an ICMP error is about
	Outer    *Outer     `json:"outer,omitempty"`
}

// Outer is the SRv6 header around a flow.
type Outer struct {
	Src netip.Addr `json:"src"`
	SID netip.Addr `json:"sid"`
}

// Fragment is a packet's place in the one that was cut. Only the first has the ports.
type Fragment struct {
	ID     uint32 `json:"id"`
	Offset int    `json:"offset"` // bytes
	More   bool   `json:"more"`   // it is not the last
}

// ParseFlow reads the first bytes of a packet, from its Ethernet header on or, of an uplink that
// has none, from its IPv6 header on. It says as much as the bytes tell.
func ParseFlow(head []byte, ethernet bool) Flow {
	var f Flow
	if ethernet {
		f.read(head, layers.LayerTypeEthernet)
	} else {
		f.read(head, layers.LayerTypeIPv6)
	}
	return f
}

// framed is the next header of an Ethernet frame (RFC 8986, section 10.1), which gopacket does not know.
const framed layers.IPProtocol = unix.IPPROTO_ETHERNET

func (f *Flow) read(head []byte, first gopacket.LayerType) {
	var protocol layers.IPProtocol
	packet := gopacket.NewPacket(head, first, gopacket.DecodeOptions{NoCopy: true})
	for _, l := range packet.Layers() {
		if protocol == framed && f.isOuter() {
			f.read(l.LayerContents(), layers.LayerTypeEthernet)
			return
		}
		switch l := l.(type) {
		case *layers.GRE:
			if !f.isOuter() {
				return // a container's own tunnel
			}
		case *layers.Ethernet:
			f.frame(l)
		case *layers.IPv4:
			protocol = l.Protocol
			f.enter(l.SrcIP, l.DstIP, protocol)
			f.fragment(uint32(l.Id), l.FragOffset, l.Flags&layers.IPv4MoreFragments != 0)
		case *layers.IPv6:
			protocol = l.NextHeader
			f.enter(l.SrcIP, l.DstIP, protocol)
		case *layers.IPv6HopByHop:
			protocol = l.NextHeader
		case *layers.IPv6Destination:
			protocol = l.NextHeader
		case *layers.IPv6Routing:
			protocol = l.NextHeader
		case *layers.IPv6Fragment:
			protocol = l.NextHeader
			f.Protocol = protocolName(protocol)
			f.fragment(l.Identification, l.FragmentOffset, l.MoreFragments)
		case *gopacket.Fragment:
			f.firstFragment(*l, protocol)
		default:
			f.add(l)
		}
	}
}

// fragment notes where the packet is cut; an IPv6 packet may have a fragment header and be whole.
func (f *Flow) fragment(id uint32, offset uint16, more bool) {
	if offset != 0 || more {
		f.Fragment = &Fragment{ID: id, Offset: int(offset) * 8, More: more}
	}
}

// firstFragment goes on behind the header where the transport header follows, which gopacket does not.
func (f *Flow) firstFragment(rest []byte, protocol layers.IPProtocol) {
	if f.Fragment == nil || f.Fragment.Offset == 0 {
		f.read(rest, protocol.LayerType())
	}
}

func (f *Flow) add(l gopacket.Layer) {
	switch l := l.(type) {
	case *layers.Dot1Q:
		f.VLAN = cmp.Or(f.VLAN, l.VLANIdentifier)
		f.Protocol = etherTypeName(l.Type)
	case *layers.LLC:
		f.Protocol = fmt.Sprintf("llc 0x%02x", l.DSAP)
	case *layers.ARP:
		f.Protocol, f.ARP = "arp", operationName(l.Operation)
		f.Src, _ = netip.AddrFromSlice(l.SourceProtAddress)
		f.Dst, _ = netip.AddrFromSlice(l.DstProtAddress)
	case *layers.TCP:
		f.Protocol, f.SrcPort, f.DstPort = "tcp", uint16(l.SrcPort), uint16(l.DstPort)
	case *layers.UDP:
		f.Protocol, f.SrcPort, f.DstPort = "udp", uint16(l.SrcPort), uint16(l.DstPort)
	case *layers.ICMPv4:
		f.Protocol, f.ICMP = "icmp", l.TypeCode.String()
		f.icmp4(l)
	case *layers.ICMPv6:
		f.Protocol, f.ICMP = "icmp6", l.TypeCode.String()
		f.icmp6(l)
	case *layers.ICMPv6NeighborSolicitation:
		f.Target, _ = netip.AddrFromSlice(l.TargetAddress)
	case *layers.ICMPv6NeighborAdvertisement:
		f.Target, _ = netip.AddrFromSlice(l.TargetAddress)
	}
}

// frame begins an Ethernet frame. Behind an IPv6 header it is one that was encapsulated.
func (f *Flow) frame(l *layers.Ethernet) {
	if f.isOuter() {
		f.Outer = &Outer{Src: f.Src, SID: f.Dst}
		f.Src, f.Dst = netip.Addr{}, netip.Addr{}
	}
	f.SrcMAC, f.DstMAC = l.SrcMAC.String(), l.DstMAC.String()
	f.Protocol = etherTypeName(l.EthernetType)
}

func etherTypeName(t layers.EthernetType) string { return fmt.Sprintf("ethertype 0x%04x", uint16(t)) }

// operationName is what tcpdump calls an operation of ARP.
func operationName(op uint16) string {
	switch op {
	case layers.ARPRequest:
		return "who-has"
	case layers.ARPReply:
		return "is-at"
	}
	return fmt.Sprintf("op %d", op)
}

// icmp4 reads what follows the type: an identifier (RFC 792, 950), or the packet that the error is about.
func (f *Flow) icmp4(l *layers.ICMPv4) {
	switch l.TypeCode.Type() {
	case layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4TypeSourceQuench, layers.ICMPv4TypeRedirect,
		layers.ICMPv4TypeTimeExceeded, layers.ICMPv4TypeParameterProblem:
		f.quote(l.Payload, layers.LayerTypeIPv4)
	default:
		f.ICMPID = l.Id
	}
}

// icmp6 does the same: RFC 4443, where errors have types below 128 and four bytes before the quote.
func (f *Flow) icmp6(l *layers.ICMPv6) {
	kind := l.TypeCode.Type()
	switch {
	case len(l.Payload) < 4:
	case kind < layers.ICMPv6TypeEchoRequest:
		f.quote(l.Payload[4:], layers.LayerTypeIPv6)
	case kind == layers.ICMPv6TypeEchoRequest, kind == layers.ICMPv6TypeEchoReply:
		f.ICMPID = binary.BigEndian.Uint16(l.Payload)
	}
}

func (f *Flow) quote(b []byte, first gopacket.LayerType) {
	var quoted Flow
	if quoted.read(b, first); quoted.Src.IsValid() {
		f.Quoted = &quoted
	}
}

// enter goes one IP header further in; what was there before is the outer one.
func (f *Flow) enter(src, dst []byte, protocol layers.IPProtocol) {
	from, ok := netip.AddrFromSlice(src)
	if !ok {
		return // cut off
	}
	if f.isOuter() {
		f.Outer = &Outer{Src: f.Src, SID: f.Dst}
	}
	f.Src, f.Protocol = from, protocolName(protocol)
	f.Dst, _ = netip.AddrFromSlice(dst)
}

// isOuter says whether what was read up to now is the header of a packet that is around another one.
func (f *Flow) isOuter() bool { return f.Src.Is6() && f.Outer == nil }

// protocolName is a word also where the transport header is cut off or in another fragment.
func protocolName(p layers.IPProtocol) string {
	switch p {
	case layers.IPProtocolTCP:
		return "tcp"
	case layers.IPProtocolUDP:
		return "udp"
	case layers.IPProtocolICMPv4:
		return "icmp"
	case layers.IPProtocolICMPv6:
		return "icmp6"
	}
	return strconv.Itoa(int(p))
}

// String is "10.40.1.5:4242 > 10.40.2.7:80 tcp", with what else is known behind it, the outer header last. What has no addresses
// is told by its MAC addresses.
func (f Flow) String() string {
	s := f.ends() + f.detail()
	if f.Fragment != nil {
		s += fmt.Sprintf(" fragment %d of %d", f.Fragment.Offset, f.Fragment.ID)
	}
	if f.Quoted != nil {
		s += " about " + f.Quoted.String()
	}
	if f.Outer != nil {
		s += fmt.Sprintf(" in %s > %s", f.Outer.Src, f.Outer.SID)
	}
	return s
}

// detail is what the protocol's own header says.
func (f Flow) detail() (s string) {
	for _, word := range []string{f.ICMP, f.ARP} {
		if word != "" {
			s += " " + word
		}
	}
	if f.ICMPID != 0 {
		s += fmt.Sprintf(" id %d", f.ICMPID)
	}
	if f.Target.IsValid() {
		s += " of " + f.Target.String()
	}
	if f.VLAN != 0 {
		s += fmt.Sprintf(" vlan %d", f.VLAN)
	}
	return s
}

func (f Flow) ends() string {
	switch {
	case f.SrcPort != 0 || f.DstPort != 0:
		return fmt.Sprintf("%s > %s %s", netip.AddrPortFrom(f.Src, f.SrcPort), netip.AddrPortFrom(f.Dst, f.DstPort), f.Protocol)
	case f.Src.IsValid():
		return fmt.Sprintf("%s > %s %s", f.Src, f.Dst, f.Protocol)
	case f.SrcMAC != "":
		return fmt.Sprintf("%s > %s %s", f.SrcMAC, f.DstMAC, f.Protocol)
	}
	return f.Protocol
}
