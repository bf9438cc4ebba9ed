// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
)

// speech is a kind of packet that two ends exchange, built anew for whatever addresses and ports: what a translated one should
// look like is what its translated ends would have sent. Queries of ICMP have their identifier as the port of the end that asks.
type speech struct {
	name     string
	protocol func(v6 bool) uint8
	build    func(from, to netip.AddrPort, answer bool) ip
	only4    bool
}

func always(protocol uint8) func(bool) uint8 { return func(bool) uint8 { return protocol } }

func icmpOf(v6 bool) uint8 {
	if v6 {
		return protoICMP6
	}
	return protoICMP
}

// speeches are all kinds of packets that are translated.
var speeches = slices.Concat([]speech{
	{"TCP", always(protoTCP), speakTCP, false}, {"UDP", always(protoUDP), speakUDP(20), false}, {"UDP of odd length", always(protoUDP), speakUDP(21), false},
	{"empty UDP", always(protoUDP), speakUDP(0), false}, {"UDP without checksum", always(protoUDP), unsummed, false},
	{"echo", icmpOf, speakQuery(8, 0, 128, 129), false}, {"timestamp", always(protoICMP), speakQuery(13, 14, 0, 0), true},
}, behindHeaders(speech{"TCP", always(protoTCP), speakTCP, false}), behindHeaders(speech{"UDP", always(protoUDP), speakUDP(33), false}),
	behindHeaders(speech{"echo", icmpOf, speakQuery(8, 0, 128, 129), false}))

// ordinary are one of each protocol.
var ordinary = []speech{speeches[0], speeches[1], speeches[5]}

// mostSpeeches are all kinds, or with -short one of each protocol: TestMasquerade has the others there.
func mostSpeeches() []speech {
	if testing.Short() {
		return ordinary
	}
	return speeches
}

func speakTCP(from, to netip.AddrPort, answer bool) ip {
	if answer {
		return segment(from.Addr(), to.Addr(), from.Port(), to.Port(), "SA", 5000, 1001, 0)
	}
	return segment(from.Addr(), to.Addr(), from.Port(), to.Port(), "S", 1000, 0, 0)
}

func speakUDP(size int) func(from, to netip.AddrPort, answer bool) ip {
	return func(from, to netip.AddrPort, _ bool) ip {
		return summed(udp(from.Addr(), to.Addr(), from.Port(), to.Port(), size))
	}
}

// summed writes a UDP checksum of 0 as it stands on the wire, RFC 768.
func summed(p ip) ip {
	if p.body[6] == 0 && p.body[7] == 0 {
		p.body[6], p.body[7] = 255, 255
	}
	return p
}

func unsummed(from, to netip.AddrPort, _ bool) ip {
	p := udp(from.Addr(), to.Addr(), from.Port(), to.Port(), 40)
	p.body[6], p.body[7] = 0, 0
	return p
}

func speakQuery(ask4, answer4, ask6, answer6 uint8) func(from, to netip.AddrPort, answer bool) ip {
	return func(from, to netip.AddrPort, answer bool) ip {
		kind, id := ask4, from.Port()
		if from.Addr().Is6() {
			kind = ask6
		}
		if answer {
			kind, id = answer4, to.Port()
		}
		if answer && from.Addr().Is6() {
			kind = answer6
		}
		return icmp(from.Addr(), to.Addr(), kind, 0, append(binary.BigEndian.AppendUint16(nil, id), 0, 1, 5, 6, 7, 8, 9, 10, 11))
	}
}

// behindHeaders are packets with options, or with extension headers.
func behindHeaders(s speech) []speech {
	wrap := func(headers func(p ip) ip) func(from, to netip.AddrPort, answer bool) ip {
		return func(from, to netip.AddrPort, answer bool) ip { return headers(s.build(from, to, answer)) }
	}
	some := func(p ip) ip {
		if p.src.Is4() {
			p.options = []byte{1, 1, 1, 1, 148, 4, 0, 0}
			return p
		}
		p.body, p.proto = extension(p.proto, [7]byte{0, 1, 4}, p.body), extDest
		return p
	}
	most := func(p ip) ip {
		if p.src.Is4() {
			p.options = make([]byte, 40)
			return p
		}
		p.body, p.proto = extension(p.proto, [7]byte{0, 1, 4}, p.body), extDest
		p.body, p.proto = extension(p.proto, [7]byte{0, 1, 4}, p.body), extHop
		return p
	}
	return []speech{{s.name + " behind a header", s.protocol, wrap(some), false}, {s.name + " behind most headers", s.protocol, wrap(most), false}}
}

// ask and reply are packets of a flow, in its direction and against it.
func (s speech) ask(from, to netip.AddrPort) ip   { return s.build(from, to, false) }
func (s speech) reply(from, to netip.AddrPort) ip { return s.build(from, to, true) }

// query is the protocol's type of what asks, as a flow has it in place of a port; 0: it has ports.
func (s speech) query(v6 bool) bool { return s.protocol(v6) == icmpOf(v6) }

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// portIn is the source port of a packet, or the identifier of its ICMP query, as it went out.
func portIn(s speech, frame []byte) uint16 {
	packet := frame[14:]
	offset := 40
	if packet[0]>>4 == 4 {
		offset = int(packet[0]&15) * 4
	} else {
		for next := packet[6]; next == extHop || next == extDest; {
			next, offset = packet[offset], offset+8
		}
	}
	if s.query(packet[0]>>4 == 6) {
		offset += 4
	}
	return binary.BigEndian.Uint16(packet[offset:])
}
