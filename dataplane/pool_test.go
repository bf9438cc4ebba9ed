// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/lace-net/lace/topology"
)

func block(prefixes ...string) topology.Block {
	var b topology.Block
	for _, s := range prefixes {
		p := netip.MustParsePrefix(s)
		if p.Addr().Is4() {
			b.V4 = p
		} else {
			b.V6 = p
		}
	}
	return b
}

func ips(all ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range all {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func mustLease(t *testing.T, p *pool, container, name string, want []netip.Addr, sticky bool) *lease {
	t.Helper()
	l, _, err := p.lease(claim{container: container, name: name, want: want, sticky: sticky})
	if err != nil {
		t.Fatalf("lease for %s: %v", container, err)
	}
	checkPool(t, p)
	return l
}

// checkPool holds what must be true of a pool at any time.
func checkPool(t *testing.T, p *pool) {
	t.Helper()
	held := 0
	for l := range p.leases {
		for _, a := range addrs(l.v4, l.v6) {
			held++
			if p.taken[a] != l {
				t.Errorf("%s holds %s, which the table gives to %v", l, a, p.taken[a])
			}
		}
	}
	if held != len(p.taken) {
		t.Errorf("%d addresses are held, %d are in the table", held, len(p.taken))
	}
}

func TestLeaseByNameIsTheSameInEveryPool(t *testing.T) {
	b := block("10.40.1.0/24", "fd40:0:0:1::/64")
	first := mustLease(t, newPool("backend", "n1", b), "default/1", "web", nil, false)
	again := mustLease(t, newPool("backend", "n1", b), "default/2", "web", nil, false)
	if first.v4 != again.v4 || first.v6 != again.v6 {
		t.Errorf("name web got %s %s, then %s %s", first.v4, first.v6, again.v4, again.v6)
	}
	if offset(b.V4, first.v4) != offset(b.V6, first.v6) {
		t.Errorf("%s and %s are not at the same place of their blocks", first.v4, first.v6)
	}
}

func TestLeaseOfAContainerStays(t *testing.T) {
	p := newPool("backend", "n1", block("10.40.1.0/24", "fd40::/64"))
	l := mustLease(t, p, "default/1", "web", nil, false)
	if again := mustLease(t, p, "default/1", "web", nil, false); again != l {
		t.Errorf("%v became %v", l, again)
	}
	if again := mustLease(t, p, "default/1", "web", ips(l.v4.String()), false); again != l {
		t.Errorf("asking for its own address made %v of %v", again, l)
	}
	moved := mustLease(t, p, "default/1", "web", ips("10.40.1.77"), false)
	if moved.v4 != ips("10.40.1.77")[0] || moved.v6 != l.v6 || len(p.leases) != 1 {
		t.Errorf("moved to %s %s, with %d leases; want 10.40.1.77, %s and 1", moved.v4, moved.v6, len(p.leases), l.v6)
	}
}

func TestUndo(t *testing.T) {
	p := newPool("backend", "n1", block("10.40.1.0/24"))
	_, undo, err := p.lease(claim{container: "default/1"})
	if err != nil {
		t.Fatal(err)
	}
	undo()
	if len(p.leases) != 0 {
		t.Errorf("%d leases are left of a first one", len(p.leases))
	}
	l := mustLease(t, p, "default/1", "web", ips("10.40.1.9"), true)
	_, undo, err = p.lease(claim{container: "default/1", want: ips("10.40.1.10")})
	if err != nil {
		t.Fatal(err)
	}
	undo()
	if got := p.holds("default/1", ""); got != l || !got.sticky || got.name != "web" {
		t.Errorf("undo left %+v, want %+v", got, l)
	}
	checkPool(t, p)
	_, undo, _ = p.lease(claim{container: "default/1", name: "other"})
	undo()
	if l.name != "web" || !l.sticky {
		t.Errorf("undo left the name %q", l.name)
	}
}

func TestKeptNames(t *testing.T) {
	p := newPool("backend", "n1", block("10.40.1.0/24"))
	for i := range 5 {
		l := mustLease(t, p, fmt.Sprint("default/", i), fmt.Sprint("name", i), nil, true)
		l.container = "" // removed
	}
	for i := range 5 {
		name := fmt.Sprint("name", i)
		if l := p.holds("", name); l == nil || l.name != name {
			t.Errorf("the lease of %s is %v", name, l)
		}
	}
	if l := p.holds("", ""); l != nil {
		t.Errorf("no name holds %v", l)
	}
	if l := p.holds("default/9", "other"); l != nil {
		t.Errorf("a new container holds %v", l)
	}
	want := p.holds("", "name3")
	if l := mustLease(t, p, "default/9", "name3", nil, true); l != want {
		t.Errorf("name3 got %v, want %v", l, want)
	}
}

func TestRefusedWishes(t *testing.T) {
	p := newPool("backend", "n1", block("10.40.1.0/29", "fd40::/64"))
	mustLease(t, p, "default/1", "web", ips("10.40.1.5"), false)
	tests := []struct {
		want []netip.Addr
		says string
	}{
		{ips("10.40.1.0"), "network, gateway or broadcast"},
		{ips("10.40.1.1"), "network, gateway or broadcast"},
		{ips("10.40.1.7"), "network, gateway or broadcast"},
		{ips("fd40::"), "network, gateway or broadcast"},
		{ips("fd40::1"), "network, gateway or broadcast"},
		{ips("10.40.2.5"), "outside 10.40.1.0/29"},
		{ips("fd41::5"), "outside fd40::/64"},
		{ips("fd40::5%eth0"), "outside fd40::/64"},
		{ips("::ffff:10.40.1.4"), "outside"},
		{ips("10.40.1.5"), "taken by container web (default/1)"},
		{ips("10.40.1.3", "10.40.1.4"), "at most one of a family"},
		{[]netip.Addr{{}}, "outside"},
	}
	for _, tt := range tests {
		_, _, err := p.lease(claim{container: "default/2", want: tt.want})
		if err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%v: %v; want an error with %q", tt.want, err, tt.says)
		}
		if checkPool(t, p); len(p.leases) != 1 {
			t.Errorf("%v left %d leases", tt.want, len(p.leases))
		}
	}
	v4 := newPool("backend", "n1", block("10.40.1.0/29"))
	if _, _, err := v4.lease(claim{container: "default/1", want: ips("fd40::5")}); err == nil || !strings.Contains(err.Error(), "no block of that family") {
		t.Errorf("an IPv6 address in an IPv4 network: %v", err)
	}
}

func TestFullBlock(t *testing.T) {
	for _, tt := range []struct {
		block topology.Block
		takes int
	}{
		{block("10.40.1.0/29"), 5},
		{block("10.40.1.0/30"), 1},
		{block("10.40.1.0/31"), 0},
		{block("10.40.1.4/32"), 0},
		{block("fd40::/126"), 2},
		{block("10.40.1.0/29", "fd40::/64"), 5},
		{block("10.40.1.0/24", "fd40::/126"), 2},
	} {
		p := newPool("backend", "n1", tt.block)
		for i := range tt.takes {
			mustLease(t, p, fmt.Sprint("default/", i), "", nil, false)
		}
		_, _, err := p.lease(claim{container: "default/more"})
		if err == nil || !strings.Contains(err.Error(), "is full") {
			t.Errorf("%s takes more than %d: %v", blockText(tt.block), tt.takes, err)
		}
	}
}

func TestFullBlockSaysWhoHoldsIt(t *testing.T) {
	p := newPool("backend", "n1", block("10.40.1.0/29"))
	mustLease(t, p, "default/1", "a", nil, false).running = true
	mustLease(t, p, "default/2", "b", nil, false).running = true
	mustLease(t, p, "default/3", "c", nil, false)
	mustLease(t, p, "default/4", "d", nil, true).container = ""
	l := mustLease(t, p, "default/5", "e", nil, false)
	_, _, err := p.lease(claim{container: "default/6"})
	if err == nil || !strings.Contains(err.Error(), "2 running and 2 stopped containers and 1 sticky names") {
		t.Errorf("full: %v", err)
	}
	p.drop(l)
	if got := mustLease(t, p, "default/6", "", nil, false); got.v4 != l.v4 {
		t.Errorf("got %s; only %s was free", got.v4, l.v4)
	}
}

func TestNthAndOffset(t *testing.T) {
	for _, s := range []string{"10.40.1.0/24", "fd40::/64", "fd40::ff:0/112"} {
		b := netip.MustParsePrefix(s)
		for _, at := range []uint64{0, 1, 2, 200} {
			if a := nth(b, at); !b.Contains(a) || offset(b, a) != at {
				t.Errorf("place %d of %s is %s, which is place %d", at, b, a, offset(b, a))
			}
		}
	}
	if nth(netip.Prefix{}, 3).IsValid() {
		t.Error("no block has a third address")
	}
}

// TestInherit: leases outlive a change of the block, there and back.
func TestInherit(t *testing.T) {
	first := newPool("net", "one", block("10.40.1.0/24"))
	running := mustLease(t, first, "default/running", "", ips("10.40.1.9"), false)
	kept := mustLease(t, first, "default/old", "db", ips("10.40.1.20"), true)
	mustLease(t, first, "default/db", "db", ips("10.40.1.21"), false) // another one of that name
	kept.container = ""                                               // it is removed; the name keeps it
	moves := mustLease(t, first, "default/moves", "", nil, false)

	moved := newPool("net", "one", block("10.41.1.0/24"))
	moved.inherit(first)
	checkPool(t, moved)
	if len(moved.leases) != 0 || len(moved.away) != 4 {
		t.Fatalf("%d leases and %d away in another block, want 0 and 4", len(moved.leases), len(moved.away))
	}
	elsewhere := mustLease(t, moved, "default/moves", "", nil, false)

	back := newPool("net", "one", block("10.40.1.0/24"))
	back.inherit(moved)
	checkPool(t, back)
	if len(back.leases) != 4 || len(back.away) != 1 {
		t.Errorf("%d leases and %d away when the block is back, want 4 and 1", len(back.leases), len(back.away))
	}
	if back.holds("default/running", "") != running || back.taken[kept.v4] != kept || back.taken[moves.v4] != moves || back.taken[elsewhere.v4] != nil {
		t.Errorf("the leases are others: %v", back.taken)
	}
	again := newPool("net", "one", block("10.40.1.0/24"))
	again.inherit(back)
	if len(again.leases) != 4 || len(again.away) != 0 {
		t.Errorf("%d leases and %d away, want 4 and none: what a container had in the other block is void", len(again.leases), len(again.away))
	}
	for _, a := range []string{"10.40.1.9", "10.40.1.20", "10.40.1.21"} {
		if _, _, err := back.lease(claim{container: "default/new", want: ips(a)}); err == nil {
			t.Errorf("%s was given away", a)
		}
	}
	for l := range back.all() {
		back.drop(l)
	}
	if !back.empty() || len(back.taken) != 0 {
		t.Errorf("after all were given up there are %d leases, %d away", len(back.leases), len(back.away))
	}
}
