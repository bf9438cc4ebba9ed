// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"cmp"
	"encoding/binary"
	"math"
	"math/bits"
	"net/netip"
	"slices"
)

// Family is a version of IP.
type Family uint8

const (
	V4 Family = 4
	V6 Family = 6
)

func (f Family) String() string {
	if f == V6 {
		return "IPv6"
	}
	return "IPv4"
}

// key is how the file names a family.
func (f Family) key() string {
	if f == V6 {
		return "v6"
	}
	return "v4"
}

func familyOf(p netip.Prefix) Family { return familyOfAddr(p.Addr()) }

func familyOfAddr(a netip.Addr) Family {
	if a.Is4() {
		return V4
	}
	return V6
}

func (f Family) bits() int {
	if f == V6 {
		return 128
	}
	return 32
}

// choose is the one of two that belongs to the family.
func (f Family) choose(v4, v6 netip.Addr) netip.Addr {
	if f == V6 {
		return v6
	}
	return v4
}

func (f Family) of(b Block) netip.Prefix {
	if f == V6 {
		return b.V6
	}
	return b.V4
}

// words are the block's or the pool's.
func (n *Network) words() *words {
	if n.Type == L2 {
		return &poolWords
	}
	return &blockWords
}

// blockBits is the length of a counted block.
func (n *Network) blockBits(f Family) int {
	if f == V6 {
		return n.BlockBits6
	}
	return n.BlockBits4
}

// counted is the block with the given number, counted from 0 through the subnets of the family in
// the order of the file. It fails where the subnets are used up.
func (n *Network) counted(f Family, number uint64) (netip.Prefix, bool) {
	length := n.blockBits(f)
	for _, s := range n.subnets(f) {
		have := blocksIn(s, length)
		if number < have {
			return blockAt(s, length, number), true
		}
		number -= have
	}
	return netip.Prefix{}, false
}

// capacity is how many blocks the subnets of the family hold; math.MaxUint64 stands for more.
func (n *Network) capacity(f Family) uint64 {
	sum := uint64(0)
	for _, s := range n.subnets(f) {
		sum = addSaturated(sum, blocksIn(s, n.blockBits(f)))
	}
	return sum
}

func (n *Network) subnets(f Family) []netip.Prefix {
	var of []netip.Prefix
	for _, s := range n.Subnets {
		if s.IsValid() && familyOf(s) == f {
			of = append(of, s)
		}
	}
	return of
}

// numbers is the range of block numbers, both ends included, that a prefix touches. It fails
// where the prefix is in no subnet.
func (n *Network) numbers(p netip.Prefix) (first, last uint64, ok bool) {
	f := familyOf(p)
	length := n.blockBits(f)
	for _, s := range n.subnets(f) {
		if !within(p, s) {
			first = addSaturated(first, blocksIn(s, length))
			continue
		}
		first = addSaturated(first, offset(s, p.Addr(), length))
		if p.Bits() >= length {
			return first, first, true
		}
		return first, addSaturated(first, blocksIn(p, length)-1), true
	}
	return 0, 0, false
}

// blockOwner is the node whose block an address is in.
func (n *Network) blockOwner(a netip.Addr) (node string, ok bool) {
	f := familyOfAddr(a)
	for name, given := range n.given {
		if f.of(given).Contains(a) {
			return name, true
		}
	}
	number, _, inside := n.numbers(netip.PrefixFrom(a, a.BitLen()))
	at, known := slices.BinarySearchFunc(n.byNumber, number, byNumber)
	if !inside || !known || n.blockBits(f) == 0 {
		return "", false
	}
	owner := n.byNumber[at]
	if !owner.owns(n) || f.of(n.given[owner.Name]).IsValid() {
		return "", false
	}
	return owner.Name, true
}

func byNumber(n *Node, number uint64) int { return cmp.Compare(n.Number, number) }

// within says whether inner lies in outer as a whole.
func within(inner, outer netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}

// blocksIn counts the blocks of a length in a prefix; math.MaxUint64 stands for more.
func blocksIn(p netip.Prefix, length int) uint64 {
	switch free := length - p.Bits(); {
	case free < 0:
		return 0
	case free > 63:
		return math.MaxUint64
	default:
		return 1 << free
	}
}

// blockAt is the block with the given number in one subnet, which has to have it.
func blockAt(subnet netip.Prefix, length int, number uint64) netip.Prefix {
	if subnet.Addr().Is4() {
		a := subnet.Addr().As4()
		v := binary.BigEndian.Uint32(a[:]) | uint32(number)<<(32-length)
		binary.BigEndian.PutUint32(a[:], v)
		return netip.PrefixFrom(netip.AddrFrom4(a), length)
	}
	hi, lo := halves(subnet.Addr())
	shift := 128 - length
	if shift >= 64 {
		hi |= number << (shift - 64)
	} else {
		hi |= number >> (64 - shift)
		lo |= number << shift
	}
	return netip.PrefixFrom(join(hi, lo), length)
}

// offset is the number of the block of a length that holds a, counted from the start of subnet.
// For IPv6 it saturates.
func offset(subnet netip.Prefix, a netip.Addr, length int) uint64 {
	if a.Is4() {
		base, b := subnet.Addr().As4(), a.As4()
		return uint64(binary.BigEndian.Uint32(b[:])-binary.BigEndian.Uint32(base[:])) >> (32 - length)
	}
	baseHi, baseLo := halves(subnet.Addr())
	hi, lo := halves(a)
	lo, borrow := bits.Sub64(lo, baseLo, 0)
	hi, _ = bits.Sub64(hi, baseHi, borrow)
	shift := 128 - length
	if shift >= 64 {
		return hi >> (shift - 64)
	}
	if hi>>shift != 0 {
		return math.MaxUint64
	}
	return hi<<(64-shift) | lo>>shift
}

func halves(a netip.Addr) (hi, lo uint64) {
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}

func join(hi, lo uint64) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], hi)
	binary.BigEndian.PutUint64(b[8:], lo)
	return netip.AddrFrom16(b)
}

func addSaturated(a, b uint64) uint64 {
	sum, carry := bits.Add64(a, b, 0)
	if carry != 0 {
		return math.MaxUint64
	}
	return sum
}
