// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"iter"
	"math/big"
	"net/netip"

	"github.com/lace-net/lace/topology"
)

// lease is who holds which addresses of a network.
type lease struct {
	container string // "" once the container is removed and the lease is kept for the name
	name      string
	sticky    bool
	running   bool
	declared  bool // the topology gives these addresses to an endpoint, outside the pools
	v4, v6    netip.Addr
}

// pool hands out the addresses of one network's block on this node. The first choice follows from the
// container's name (its id where it has none), so that a name gets the same addresses again when they are free.
type pool struct {
	network  string
	node     string
	word     string // what people call the block
	block    topology.Block
	front    uint64                                 // places in front of a block's first address that containers have
	back     uint64                                 // … behind the last one of an IPv4 block
	size     uint64                                 // places between them, in the smaller family
	reserved func(netip.Addr) (why string, is bool) // of those, what containers do not have
	taken    map[netip.Addr]*lease
	leases   map[*lease]struct{}
	away     map[*lease]struct{} // outside the block that the topology gives now: they wait for one that has them again
}

// maxPool bounds the search in a large block.
const maxPool = 1 << 20

// poolOf is what a node has of a network. In an L2 network containers have all addresses to which the topology gives no other use.
func poolOf(n *topology.Network, node string) *pool {
	p := newPool(n.Name, node, n.Block(node))
	if n.Type == topology.L2 {
		p.word, p.front, p.back, p.reserved = "pool", 0, 0, n.Reserved
		p.measure()
	}
	return p
}

// newPool is one of a routed network: each block has a network address, a gateway and, of IPv4, a broadcast address.
func newPool(network, node string, block topology.Block) *pool {
	p := &pool{network: network, node: node, word: "block", block: block, front: 2, back: 1, reserved: func(netip.Addr) (string, bool) { return "", false },
		taken: map[netip.Addr]*lease{}, leases: map[*lease]struct{}{}, away: map[*lease]struct{}{}}
	p.measure()
	return p
}

func (p *pool) measure() {
	p.size = maxPool
	for _, b := range []netip.Prefix{p.block.V4, p.block.V6} {
		if b.IsValid() {
			p.size = min(p.size, p.usable(b))
		}
	}
}

// inherit takes over the leases of the pool that the network had under another topology: those that do not fit stay away.
func (p *pool) inherit(old *pool) {
	if old == nil {
		return
	}
	for l := range old.all() {
		switch {
		case l.declared: // the device that has it says so itself
		case p.knows(l): // by the addresses that it got meanwhile
		case p.fits(l):
			p.keep(l)
		default:
			p.away[l] = struct{}{}
		}
	}
}

// knows says whether the container of a lease, or the name that it is kept for, has one here already.
func (p *pool) knows(l *lease) bool {
	for have := range p.leases {
		if have.container == l.container && (l.container != "" || have.name == l.name) {
			return true
		}
	}
	return false
}

// fits says whether all addresses of a lease can be had in this block.
func (p *pool) fits(l *lease) bool {
	place := &lease{}
	for _, a := range addrs(l.v4, l.v6) {
		if p.wish(place, l, a) != nil {
			return false
		}
	}
	return true
}

// all are the leases in the block, and then those that are away.
func (p *pool) all() iter.Seq[*lease] {
	return func(yield func(*lease) bool) {
		for _, some := range []map[*lease]struct{}{p.leases, p.away} {
			for l := range some {
				if !yield(l) {
					return
				}
			}
		}
	}
}

func (p *pool) empty() bool { return len(p.leases)+len(p.away) == 0 }

// usable counts the places of a block that containers can have.
func (p *pool) usable(block netip.Prefix) uint64 {
	if host(block) > 32 {
		return maxPool
	}
	n, kept := uint64(1)<<host(block), p.front
	if block.Addr().Is4() {
		kept += p.back
	}
	return n - min(n, kept)
}

// host is how many bits of an address count within a block.
func host(block netip.Prefix) int { return block.Addr().BitLen() - block.Bits() }

// holds finds the lease of a container, or one that is kept for its name.
func (p *pool) holds(container, name string) *lease {
	var kept *lease
	for l := range p.leases {
		switch l.container {
		case "":
			if name != "" && l.name == name {
				kept = l
			}
		case container:
			return l
		}
	}
	return kept
}

// lease gives a claim the addresses that it asks for, those that the container or its name holds, or free ones.
// undo makes it as it was before.
func (p *pool) lease(c claim) (l *lease, undo func(), err error) {
	have := p.holds(c.container, c.name)
	l = &lease{container: c.container, name: c.name, sticky: c.sticky}
	if err := p.fill(l, have, c); err != nil {
		return nil, nil, err
	}
	if have != nil && have.v4 == l.v4 && have.v6 == l.v6 {
		was := *have
		have.container, have.name, have.sticky, have.declared = l.container, l.name, l.sticky, l.declared
		return have, func() { *have = was }, nil
	}
	p.drop(have)
	p.keep(l)
	return l, func() { p.drop(l); p.keep(have) }, nil
}

// fill finds the addresses of a lease.
func (p *pool) fill(l, have *lease, c claim) error {
	if e := c.endpoint; e != nil && (e.V4.IsValid() || e.V6.IsValid()) {
		return p.declare(l, have, e)
	}
	if c.endpoint == nil && p.block == (topology.Block{}) {
		return fmt.Errorf("node %s has no %s of it", p.node, p.word)
	}
	for _, a := range c.want {
		if err := p.wish(l, have, a); err != nil {
			return err
		}
	}
	p.prefer(l, have)
	return p.choose(l, have)
}

// declare gives l the addresses that the topology declares for an endpoint.
func (p *pool) declare(l, have *lease, e *topology.Endpoint) error {
	for _, a := range addrs(e.V4, e.V6) {
		if holder := p.taken[a]; holder != nil && holder != have {
			return fmt.Errorf("address %s of endpoint %s is taken by %s", a, e.Name, holder)
		}
	}
	l.v4, l.v6, l.declared = e.V4, e.V6, true
	return nil
}

// prefer takes over what was held before, in the families that nothing was asked for.
func (p *pool) prefer(l, have *lease) {
	if have == nil || have.declared {
		return
	}
	if !l.v4.IsValid() {
		l.v4 = have.v4
	}
	if !l.v6.IsValid() {
		l.v6 = have.v6
	}
}

// sticks says whether a name's addresses are to be kept.
func (p *pool) sticks(name string) bool {
	for l := range p.leases {
		if l.sticky && l.name == name {
			return true
		}
	}
	return false
}

// wish gives l one address that was asked for.
func (p *pool) wish(l, have *lease, a netip.Addr) error {
	block, place := p.block.V4, &l.v4
	if a.Is6() {
		block, place = p.block.V6, &l.v6
	}
	if place.IsValid() {
		return fmt.Errorf("addresses %s and %s: at most one of a family can be asked for", *place, a)
	}
	if !block.IsValid() {
		return fmt.Errorf("address %s: network %s has no %s of that family on node %s", a, p.network, p.word, p.node)
	}
	if why, is := p.reserved(a); is {
		return fmt.Errorf("address %s of network %s is %s: ask for another one, or none", a, p.network, why)
	}
	if !block.Contains(a) {
		return fmt.Errorf("address %s is outside %s, the %s of network %s on node %s", a, block, p.word, p.network, p.node)
	}
	if at := offset(block, a); at < p.front || at-p.front >= p.usable(block) && host(block) <= 32 {
		return fmt.Errorf("address %s is the network, gateway or broadcast address of block %s; containers have those from %s on", a, block, nth(block, p.front))
	}
	if holder := p.taken[a]; holder != nil && holder != have {
		return fmt.Errorf("address %s is taken by %s", a, holder)
	}
	*place = a
	return nil
}

func (l *lease) String() string {
	switch {
	case l.container == "":
		return fmt.Sprintf("the sticky reservation of %q", l.name)
	case l.name != "":
		return fmt.Sprintf("container %s (%s)", l.name, l.container)
	}
	return "container " + l.container
}

// choose fills what no wish has filled: the same place in both families where that is free.
func (p *pool) choose(l, have *lease) error {
	need4 := p.block.V4.IsValid() && !l.v4.IsValid()
	need6 := p.block.V6.IsValid() && !l.v6.IsValid()
	switch {
	case !need4 && !need6:
		return nil
	case p.size == 0:
		return p.full()
	}
	start := p.start(l)
	for i := range p.size {
		at := p.front + (start+i)%p.size
		a4, a6 := nth(p.block.V4, at), nth(p.block.V6, at)
		if need4 && !p.free(a4, have) || need6 && !p.free(a6, have) {
			continue
		}
		if need4 {
			l.v4 = a4
		}
		if need6 {
			l.v6 = a6
		}
		return nil
	}
	return p.full()
}

// start is where the search begins: beside an address that was asked for, else where the name leads.
func (p *pool) start(l *lease) uint64 {
	if l.v4.IsValid() {
		return (offset(p.block.V4, l.v4) - p.front) % p.size
	}
	if l.v6.IsValid() {
		return (offset(p.block.V6, l.v6) - p.front) % p.size
	}
	key := l.name
	if key == "" {
		key = l.container
	}
	h := fnv.New64a()
	h.Write([]byte(key))
	return h.Sum64() % p.size
}

func (p *pool) free(a netip.Addr, have *lease) bool {
	if _, is := p.reserved(a); is {
		return false
	}
	holder := p.taken[a]
	return holder == nil || holder == have
}

func (p *pool) full() error {
	var running, stopped, sticky int
	for l := range p.leases {
		switch {
		case l.declared:
		case l.container == "":
			sticky++
		case l.running:
			running++
		default:
			stopped++
		}
	}
	return fmt.Errorf("the %s of node %s (%s) is full: its %d addresses are held by %d running and %d stopped containers and %d sticky names; remove some, or give the network larger %[1]ss",
		p.word, p.node, blockText(p.block), running+stopped+sticky, running, stopped, sticky)
}

func blockText(b topology.Block) string {
	switch {
	case !b.V6.IsValid():
		return b.V4.String()
	case !b.V4.IsValid():
		return b.V6.String()
	}
	return b.V4.String() + ", " + b.V6.String()
}

func (p *pool) keep(l *lease) {
	if l == nil {
		return
	}
	p.leases[l] = struct{}{}
	for _, a := range []netip.Addr{l.v4, l.v6} {
		if a.IsValid() {
			p.taken[a] = l
		}
	}
}

func (p *pool) drop(l *lease) {
	if l == nil {
		return
	}
	delete(p.leases, l)
	delete(p.away, l)
	for _, a := range []netip.Addr{l.v4, l.v6} {
		if p.taken[a] == l {
			delete(p.taken, a)
		}
	}
}

// nth is the address so many places behind the start of a block; invalid for no block.
func nth(block netip.Prefix, at uint64) netip.Addr {
	if !block.IsValid() {
		return netip.Addr{}
	}
	if block.Addr().Is4() {
		b := block.Masked().Addr().As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(at))
		return netip.AddrFrom4(b)
	}
	b := block.Masked().Addr().As16()
	sum := new(big.Int).Add(new(big.Int).SetBytes(b[:]), new(big.Int).SetUint64(at))
	sum.FillBytes(b[:])
	return netip.AddrFrom16(b)
}

// offset is the place of an address in its block, at most 2^63.
func offset(block netip.Prefix, a netip.Addr) uint64 {
	first, b := block.Masked().Addr().As16(), a.As16()
	diff := new(big.Int).Sub(new(big.Int).SetBytes(b[:]), new(big.Int).SetBytes(first[:]))
	if !diff.IsUint64() {
		return 1 << 63
	}
	return min(diff.Uint64(), 1<<63)
}
