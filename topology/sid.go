// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
)

// Hash names a topology: nodes that print the same hash run the same file.
type Hash [32]byte

// String returns the first twelve hexadecimal digits, enough to compare by eye.
func (h Hash) String() string { return hex.EncodeToString(h[:6]) }

// NetworkID is the number of a network on the wire: 24 bits, never 0.
type NetworkID uint32

// MaxNetworkID is the largest number that fits the 24 bits of a SID.
const MaxNetworkID NetworkID = 1<<24 - 1

// Numbers that no network of a file can have: the last sixteen. Two of them stand for what is in none.
const (
	HostsID       NetworkID = MaxNetworkID     // hosts themselves, this one or another node
	OutsideID     NetworkID = MaxNetworkID - 1 // what comes in at an interface of the host, before its address is classified
	FirstReserved NetworkID = MaxNetworkID - 15
)

// Function is the 16-bit function part of a SID. The values are the IANA endpoint
// behaviour numbers (RFC 8986, section 10.2).
type Function uint16

const (
	EndDT46 Function = 20 // decapsulate, look up the inner IPv4 or IPv6 packet in a table
	EndDT2U Function = 23 // decapsulate, look up the destination of the inner Ethernet frame
	EndDT2M Function = 24 // decapsulate, flood the inner Ethernet frame

	// SourceFunction marks an outer source address. It is no endpoint behaviour, so a packet
	// sent to such an address is refused.
	SourceFunction Function = 0x5ce
)

// Encapsulation is the form of the outer header.
type Encapsulation uint8

const (
	Reduced Encapsulation = iota // H.Encaps.Red with one segment: a bare IPv6 header
	SRH                          // H.Encaps: with a segment routing header of one segment
)

// Overhead is the number of bytes in front of the inner packet.
func (e Encapsulation) Overhead() int {
	if e == SRH {
		return 64
	}
	return 40
}

func (e Encapsulation) String() string {
	if e == SRH {
		return "srh"
	}
	return "reduced"
}

// Locator is the prefix that the fabric routes to a node: any length up to /64.
type Locator struct{ netip.Prefix }

// SID composes locator : function (16 bits) : network (24 bits) : 0.
func (l Locator) SID(f Function, id NetworkID) SID {
	return SID{l.compose(f, id)}
}

// Source composes the outer source address locator : 0x5ce : network (24 bits) : segment. The
// segment takes what is left of the 128 bits, 40 of them behind a /48.
func (l Locator) Source(id NetworkID, segment uint64) netip.Addr {
	a := l.compose(SourceFunction, id).As16()
	lo := binary.BigEndian.Uint64(a[8:])
	binary.BigEndian.PutUint64(a[8:], lo|segment&l.segmentMask())
	return netip.AddrFrom16(a)
}

// SegmentBits is the number of bits that an outer source has for the policy segment.
func (l Locator) SegmentBits() int { return 128 - l.Bits() - 40 }

func (l Locator) segmentMask() uint64 {
	if l.SegmentBits() >= 64 {
		return ^uint64(0)
	}
	return 1<<l.SegmentBits() - 1
}

// compose puts function and network, 40 bits together, straight behind the prefix.
func (l Locator) compose(f Function, id NetworkID) netip.Addr {
	a := l.Masked().Addr().As16()
	hi, lo := binary.BigEndian.Uint64(a[:8]), binary.BigEndian.Uint64(a[8:])
	v := uint64(f)<<24 | uint64(id&MaxNetworkID)
	shift := 128 - l.Bits() - 40 // ≥ 24, as a locator is at most a /64
	lo |= v << shift
	if shift < 64 {
		hi |= v >> (64 - shift)
	} else {
		hi, lo = hi|v<<(shift-64), 0
	}
	binary.BigEndian.PutUint64(a[:8], hi)
	binary.BigEndian.PutUint64(a[8:], lo)
	return netip.AddrFrom16(a)
}

// SID is an SRv6 segment identifier of one of our nodes.
type SID struct{ netip.Addr }

// ParseSID takes an address apart by the layout of its locator. It fails for an address outside
// the locator and for one with a non-zero tail.
func (l Locator) ParseSID(a netip.Addr) (Function, NetworkID, error) {
	if !l.Contains(a) {
		return 0, 0, fmt.Errorf("%s is not in locator %s", a, l)
	}
	b := a.As16()
	hi, lo := binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
	shift := 128 - l.Bits() - 40
	var v uint64
	if shift >= 64 {
		v = hi >> (shift - 64)
	} else {
		v = hi<<(64-shift) | lo>>shift
	}
	if (l.SID(Function(v>>24), NetworkID(v)&MaxNetworkID)).Addr != a {
		return 0, 0, fmt.Errorf("%s has a non-zero tail behind its function and network", a)
	}
	return Function(v >> 24), NetworkID(v) & MaxNetworkID, nil
}
