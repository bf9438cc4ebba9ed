// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"fmt"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// bitsOf is n bits of an address from bit first on, counted from the left, read independently of
// the code under test.
func bitsOf(a netip.Addr, first, n int) *big.Int {
	b := a.As16()
	v := new(big.Int).SetBytes(b[:])
	v.Rsh(v, uint(128-first-n))
	return v.And(v, new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), uint(n)), big.NewInt(1)))
}

func randomLocator(r *rand.Rand, bits int) Locator {
	p := netip.PrefixFrom(join(r.Uint64(), r.Uint64()), bits).Masked()
	return Locator{p}
}

func TestSIDLayout(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for bits := MinLocatorBits; bits <= MaxLocatorBits; bits++ {
		for range 200 {
			l := randomLocator(r, bits)
			f, id := Function(r.Uint32()), NetworkID(r.Uint32())&MaxNetworkID
			sid := l.SID(f, id)
			if !l.Contains(sid.Addr) || bitsOf(sid.Addr, bits, 16).Uint64() != uint64(f) || bitsOf(sid.Addr, bits+16, 24).Uint64() != uint64(id) || bitsOf(sid.Addr, bits+40, 88-bits).Sign() != 0 {
				t.Fatalf("SID of %s, function %#x, network %#x: %s", l, f, id, sid)
			}
			if gotF, gotID, err := l.ParseSID(sid.Addr); err != nil || gotF != f || gotID != id {
				t.Fatalf("ParseSID(%s) of %s: %#x, %#x, %v; want %#x, %#x", sid, l, gotF, gotID, err, f, id)
			}
			checkTail(t, r, l, sid)
			checkSource(t, r, l, id)
		}
	}
}

// checkTail sets one bit behind the network, and one in the locator.
func checkTail(t *testing.T, r *rand.Rand, l Locator, sid SID) {
	t.Helper()
	for _, bit := range []int{l.Bits() + 40 + r.IntN(88-l.Bits()), r.IntN(l.Bits())} {
		b := sid.As16()
		b[bit/8] ^= 0x80 >> (bit % 8)
		if _, _, err := l.ParseSID(netip.AddrFrom16(b)); err == nil {
			t.Fatalf("ParseSID took %s of %s with bit %d turned", netip.AddrFrom16(b), l, bit)
		}
	}
}

func checkSource(t *testing.T, r *rand.Rand, l Locator, id NetworkID) {
	t.Helper()
	segment := r.Uint64()
	a := l.Source(id, segment)
	want := segment & l.segmentMask()
	if f := bitsOf(a, l.Bits(), 16).Uint64(); !l.Contains(a) || f != uint64(SourceFunction) || bitsOf(a, l.Bits()+16, 24).Uint64() != uint64(id) {
		t.Fatalf("source of %s, network %#x: %s", l, id, a)
	}
	if got := bitsOf(a, l.Bits()+40, l.SegmentBits()); got.Cmp(new(big.Int).SetUint64(want)) != 0 {
		t.Fatalf("segment of %s: %#x, want %#x", a, got, want)
	}
}

func TestSIDText(t *testing.T) {
	l := Locator{netip.MustParsePrefix("5f00:1ace:1::/48")}
	for want, got := range map[string]netip.Addr{
		"5f00:1ace:1:14:0:6400::":      l.SID(EndDT46, 100).Addr,
		"5f00:1ace:1:14:ffff:ff00::":   l.SID(EndDT46, MaxNetworkID).Addr,
		"5f00:1ace:1:5ce:0:6400:0:2a":  l.Source(100, 42),
		"5f00:1ace:1:5ce:0:64ff::":     l.Source(100, 0xff<<32),
		"5f00:1ace:1:1:14:0:6400:0":    Locator{netip.MustParsePrefix("5f00:1ace:1:1::/64")}.SID(EndDT46, 100).Addr,
		"5f00:14:0:6400::":             Locator{netip.MustParsePrefix("5f00::/16")}.SID(EndDT46, 100).Addr,
		"5f00:1ace:1:5ce:0:64ff:ff:ff": l.Source(100, 0xff_00ff_00ff|1<<40),
	} {
		if got != netip.MustParseAddr(want) {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestParseSIDRefuses(t *testing.T) {
	l := Locator{netip.MustParsePrefix("5f00:1ace:1::/48")}
	for _, a := range []string{"5f00:1ace:2:14:0:6400::", "10.0.0.1", "5f00:1ace:1:14:0:6400::%eth0", "5f00:1ace:1:14:0:6400::1"} {
		if _, _, err := l.ParseSID(netip.MustParseAddr(a)); err == nil {
			t.Errorf("took %s", a)
		}
	}
}

// The n-th block and the number of a block are each other's inverse.
func TestBlockArithmetic(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 5000 {
		width, addr := 32, netip.AddrFrom4([4]byte{10, byte(r.Uint32()), byte(r.Uint32()), 0})
		if r.IntN(2) == 0 {
			width, addr = 128, join(0xfd<<56|r.Uint64()>>8, r.Uint64())
		}
		length := 8 + r.IntN(width-8)
		s := netip.PrefixFrom(addr, 8+r.IntN(length-7)).Masked()
		have := blocksIn(s, length)
		number := r.Uint64() % have
		p := blockAt(s, length, number)
		if !within(p, s) || p != p.Masked() || offset(s, p.Addr(), length) != number {
			t.Fatalf("block %d of /%d in %s: %s, number %d", number, length, s, p, offset(s, p.Addr(), length))
		}
	}
}

func TestNearest(t *testing.T) {
	known := []string{"locator", "underlay", "uplinks", "via", "id"}
	for word, want := range map[string]string{
		"locater": "locator", "Locator": "locator", "lcoator": "locator", "uplink": "uplinks", "vai": "via", "di": "id",
		"quite-else": "", "": "", "x": "",
	} {
		if got := Nearest(word, known); got != want {
			t.Errorf("Nearest(%q) = %q, want %q", word, got, want)
		}
	}
}

func ExampleError() {
	_, err := Parse("topology.toml", []byte("version = 1\nundelay.locator-block = '5f00::/16'"))
	fmt.Println(err)
	// Output:
	// topology.toml: node: is missing; add a table [node.NAME] for each node
	// topology.toml: underlay: is missing; add [underlay] with a locator-block
	// topology.toml:2: undelay: unknown key; did you mean "underlay"?
}
