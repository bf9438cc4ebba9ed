// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"slices"
)

func networkKey(name string, key ...string) string { return tableKey("network", name, key) }

func validID(id int64) bool { return id >= 1 && id < int64(FirstReserved) }

func (b *builder) network(name string, raw rawNetwork) {
	n := &Network{
		Name: name, Type: raw.Type, Labels: raw.Labels, Host: raw.Host, Line: b.lines.Of(networkKey(name)),
		nodes: b.byName, byNumber: b.byNumber, given: map[string]Block{}, byAddr: map[netip.Addr]Endpoint{}, hosting: map[string]bool{},
	}
	if !isNetworkName(name) {
		b.fail(networkKey(name), fmt.Sprintf("a name has lower-case letters, digits and hyphens, at most %d", MaxNetworkName), "%s is no network name", shortQuote(name))
	}
	b.id(n, raw.ID)
	b.labels(networkKey(name, "labels"), n.Labels)
	b.topology.Networks = append(b.topology.Networks, n)
	b.byNetwork[name] = n
	b.otherKeys(n)
	if n.Type == External {
		b.external(n, raw.Prefixes)
		return
	}
	b.needs(n)
	b.blocks(n, raw)
	if n.Type == L2 {
		b.segment(n, raw)
	}
}

func (b *builder) id(n *Network, given *int64) {
	switch {
	case given != nil && validID(*given):
		n.ID = NetworkID(*given)
	case given != nil:
		b.fail(networkKey(n.Name, "id"), fmt.Sprintf("choose a number from 1 to %d", FirstReserved-1), "%d is %s", *given, invalidID(*given))
	case n.Type == External && !b.lines.Has(networkKey(n.Name, "id")):
		n.ID = derivedID(n.Name)
	}
}

func invalidID(id int64) string {
	if id >= int64(FirstReserved) && id <= int64(MaxNetworkID) {
		return "one of the last sixteen numbers, which stand for hosts and for what is outside"
	}
	return "not in the range of 24 bits without 0"
}

// needs reports what every network of containers has to have. Who wrote prefixes means them to be its subnets, or the network to be external.
func (b *builder) needs(n *Network) {
	outer := b.lines.Has(networkKey(n.Name, "prefixes"))
	if n.Type != 0 || !outer {
		b.need(n, "ID")
	}
	if !outer {
		b.need(n, "Subnets")
	}
}

// need reports a key that is missing, as the tags of its field say.
func (b *builder) need(n *Network, field string) {
	f, _ := reflect.TypeFor[rawNetwork]().FieldByName(field)
	if key := networkKey(n.Name, f.Tag.Get("toml")); !b.lines.Has(key) {
		b.fail(key, "add "+f.Tag.Get("want"), "is missing")
	}
}

// blocks takes over the subnets and who owns which part of them.
func (b *builder) blocks(n *Network, raw rawNetwork) {
	given, size := raw.Blocks, raw.BlockSize
	if n.Type == L2 {
		given, size = raw.Pools, rawBlockSize(raw.PoolSize)
	}
	owners := b.blockOwners(n, given)
	counted := b.subnetsOf(n, raw) && b.blockSizes(n, size, given != nil) && b.givenBlocks(n, given) && owners
	if !counted || n.Type == 0 { // without a type it is not known how to count
		return
	}
	before := len(b.errs)
	if b.countBlocks(n); n.Type == L2 && len(b.errs) == before {
		b.base(n)
	}
}

// allBlocks bounds the blocks of all networks together: each is an entry of a map on every node.
func (b *builder) allBlocks() {
	sum := 0
	for _, n := range b.topology.Networks {
		for _, f := range []Family{V4, V6} {
			switch {
			case n.blockBits(f) != 0:
				sum += len(b.topology.Nodes)
			case len(n.subnets(f)) != 0:
				sum += len(n.given)
			}
		}
	}
	for _, e := range b.topology.Endpoints {
		sum += len(e.addrs())
	}
	b.limit("network", sum, MaxBlocks, "blocks (networks × nodes × families, and addresses of endpoints)")
}

func (b *builder) distinctIDs() {
	networks := slices.SortedStableFunc(slices.Values(b.topology.Networks), func(x, y *Network) int { return cmp.Compare(x.Line, y.Line) })
	seen := map[NetworkID]*Network{}
	for _, n := range networks {
		if other := seen[n.ID]; n.ID != 0 && other != nil {
			key, which, fix := networkKey(n.Name, "id"), "", "choose another"
			if !b.lines.Has(key) {
				which, fix = ", which follows from the name,", "write an id"
			}
			b.fail(key, fix, "%d%s is the id of %s (%s) too", n.ID, which, other.Name, b.at(networkKey(other.Name, "id")))
		}
		seen[n.ID] = n
	}
}

// subnetsOf takes over the subnets, and says whether they are right.
func (b *builder) subnetsOf(n *Network, raw rawNetwork) bool {
	key := networkKey(n.Name, "subnets")
	if raw.Subnets != nil && len(raw.Subnets) == 0 {
		b.fail(key, "add one, as 10.40.0.0/16", "no subnet")
	}
	b.limit(key, len(raw.Subnets), maxSubnets, "subnets")
	ok := len(raw.Subnets) > 0 && len(raw.Subnets) <= maxSubnets
	for i, s := range raw.Subnets {
		n.Subnets = append(n.Subnets, s.Prefix)
		ok = s.IsValid() && b.subnet(indexKey(key, i), key, n.Subnets) && b.flat(n, indexKey(key, i)) && ok
	}
	return ok
}

// subnet checks the last of the subnets against those before it.
func (b *builder) subnet(key, list string, subnets []netip.Prefix) bool {
	last := len(subnets) - 1
	p := subnets[last]
	if block := b.topology.Underlay.LocatorBlock; block.IsValid() && p.Overlaps(block) {
		b.fail(key, "choose a range outside the block: what is in it is a SID", "%s overlaps the locator block %s", p, block)
		return false
	}
	for i, other := range subnets[:last] {
		if other.IsValid() && p.Overlaps(other) {
			b.fail(key, "make them apart, or leave one out", "%s overlaps %s (%s)", p, other, b.at(indexKey(list, i)))
			return false
		}
	}
	return true
}

// blockSizes is false where a length is wrong. With pools by name and no pool-size only the named nodes have one.
func (b *builder) blockSizes(n *Network, raw rawBlockSize, byName bool) bool {
	if n.Type == L2 && byName && !b.lines.Has(networkKey(n.Name, n.words().size)) {
		return true
	}
	var ok4, ok6 bool
	n.BlockBits4, ok4 = b.blockSize(n, V4, raw.V4)
	n.BlockBits6, ok6 = b.blockSize(n, V6, raw.V6)
	return ok4 && ok6
}

// blockSize is the length of the counted blocks of a family, 0 where it has no subnet.
func (b *builder) blockSize(n *Network, f Family, given *int64) (int, bool) {
	words := n.words()
	key, length := networkKey(n.Name, words.size, f.key()), words.bounds(f).usual
	if given != nil {
		if !b.blockLength(n, key, f, *given) {
			return 0, false
		}
		length = int(*given)
	}
	subnets := n.subnets(f)
	if len(subnets) == 0 {
		return 0, true
	}
	ok := true
	for i, s := range n.Subnets {
		if familyOf(s) == f && s.Bits() > length {
			b.fail(indexKey(networkKey(n.Name, "subnets"), i), fmt.Sprintf("widen it, or raise %s.%s", words.size, f.key()),
				"%s is smaller than a %s of /%d", s, words.one, length)
			ok = false
		}
	}
	return length, ok
}

func (b *builder) blockLength(n *Network, key string, f Family, length int64) bool {
	within := n.words().bounds(f)
	if length >= int64(within.least) && length <= int64(within.most) {
		return true
	}
	b.fail(key, fmt.Sprintf("choose a length from %d to %d", within.least, within.most), "/%d is no length for an %s %s", length, f, n.words().one)
	return false
}

// blockOwners says whether those whom the file gives blocks can have them.
func (b *builder) blockOwners(n *Network, raw map[string][]subnet) bool {
	ok := true
	key := networkKey(n.Name, n.words().given)
	for _, name := range sortedKeys(raw) {
		owner, known := b.byName[name]
		switch {
		case !known:
			b.fail(joinKey(key, name), among(name, sortedKeys(b.byName), "node"), "%s", unknown("node", name))
			ok = false
		case n.Type == L2 && owner.Kind == KindRouter:
			b.fail(joinKey(key, name), "leave it out, and declare what is behind it as [endpoint.NAME]", "%s is a router, which has no pool", name)
			ok = false
		case !owner.owns(n):
			b.fail(joinKey(key, name), "leave it out", "%s is a router of network %s", name, shortQuote(owner.Network))
			ok = false
		}
	}
	return ok
}

// givenBlocks takes over the blocks that the file gives, and says whether they are right.
func (b *builder) givenBlocks(n *Network, raw map[string][]subnet) bool {
	ok := true
	key := networkKey(n.Name, n.words().given)
	for _, name := range sortedKeys(raw) {
		for i, p := range raw[name] {
			ok = p.IsValid() && b.givenBlock(n, name, indexKey(joinKey(key, name), i), p.Prefix) && ok
		}
	}
	return ok
}

func (b *builder) givenBlock(n *Network, node, key string, p netip.Prefix) bool {
	f := familyOf(p)
	block := n.given[node]
	switch _, _, inside := n.numbers(p); {
	case !inside:
		b.fail(key, "choose a prefix in one of them", "%s is not in a subnet of %s", p, n.Name)
	case !b.blockLength(n, key, f, int64(p.Bits())):
	case f.of(block).IsValid():
		b.fail(key, "leave one out", "%s has a second %s %s; the first is %s", node, f, n.words().one, f.of(block))
	default:
		if f == V6 {
			block.V6 = p
		} else {
			block.V4 = p
		}
		n.given[node] = block
		return true
	}
	return false
}

// countBlocks checks what only shows when every node has its block.
func (b *builder) countBlocks(n *Network) {
	for _, f := range []Family{V4, V6} {
		if len(n.subnets(f)) == 0 || len(b.byNumber) == 0 {
			continue
		}
		counted := b.counting(n, f)
		b.room(n, f, counted)
		b.apart(n, f, counted)
	}
}

// counting lists the nodes that own a counted block, by number.
func (b *builder) counting(n *Network, f Family) []*Node {
	if n.blockBits(f) == 0 {
		return nil
	}
	var nodes []*Node
	for _, node := range b.byNumber {
		if node.owns(n) && !f.of(n.given[node.Name]).IsValid() {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

// room refuses a network whose subnets have no block for some node.
func (b *builder) room(n *Network, f Family, counted []*Node) {
	capacity := n.capacity(f)
	fit, _ := slices.BinarySearchFunc(counted, capacity, byNumber)
	if fit == len(counted) || capacity == math.MaxUint64 {
		return
	}
	more := ""
	if rest := len(counted) - fit - 1; rest > 0 {
		more = fmt.Sprintf(" (and %d more nodes have none)", rest)
	}
	first, words := counted[fit], n.words()
	b.fail(networkKey(n.Name, "subnets"),
		fmt.Sprintf("widen the subnets, raise %s.%s, or give the node one in %s", words.size, f.key(), joinKey(words.given, first.Name)),
		"too many nodes for the subnet: %s (%s) has number %d, and there are %d %s %ss of /%d, numbered from 0%s",
		first.Name, b.at(nodeKey(first.Name)), first.Number, capacity, f, words.one, n.blockBits(f), more)
}

// owned is a given block and where the file gives it.
type owned struct {
	prefix netip.Prefix
	node   string
	key    string
}

func (b *builder) givenOf(n *Network, f Family) []owned {
	var blocks []owned
	for _, name := range sortedKeys(n.given) {
		if p := f.of(n.given[name]); p.IsValid() {
			blocks = append(blocks, owned{p, name, joinKey(networkKey(n.Name, n.words().given), name)})
		}
	}
	slices.SortStableFunc(blocks, func(x, y owned) int {
		return cmp.Or(x.prefix.Addr().Compare(y.prefix.Addr()), cmp.Compare(x.prefix.Bits(), y.prefix.Bits()))
	})
	return blocks
}

// apart refuses given blocks that overlap a counted one or each other. Sorted, a block overlaps
// an earlier one only where it overlaps the one that reaches furthest, as prefixes nest.
func (b *builder) apart(n *Network, f Family, counted []*Node) {
	var widest owned
	for _, g := range b.givenOf(n, f) {
		if widest.prefix.IsValid() && widest.prefix.Overlaps(g.prefix) {
			b.fail(g.key, "make them apart", "%s overlaps %s of %s (%s)", g.prefix, widest.prefix, widest.node, b.at(widest.key))
		} else {
			widest = g
		}
		first, last, _ := n.numbers(g.prefix)
		at, _ := slices.BinarySearchFunc(counted, first, byNumber)
		if at == len(counted) || counted[at].Number > last {
			continue
		}
		other := counted[at]
		p, _ := n.counted(f, other.Number)
		b.fail(g.key, "choose one whose number no node has", "%s overlaps %s, which %s (%s) owns by its number %d",
			g.prefix, p, other.Name, b.at(nodeKey(other.Name)), other.Number)
	}
}

// lengths bounds the distinct lengths of blocks: the data plane looks each of them up in turn. An endpoint's address is one of its own.
func (b *builder) lengths(n *Network, f Family) {
	distinct := map[int]bool{}
	if len(b.counting(n, f)) > 0 {
		distinct[n.blockBits(f)] = true
	}
	for _, g := range b.givenOf(n, f) {
		distinct[g.prefix.Bits()] = true
	}
	with := ""
	if n.declares(f) {
		distinct[f.bits()], with = true, fmt.Sprintf(" with the /%d of endpoints", f.bits())
	}
	if len(distinct) > MaxBlockLens {
		words := n.words()
		b.fail(networkKey(n.Name, words.given), "make some of them the same",
			"%s %ss of %d different lengths%s; a network has at most %d", f, words.one, len(distinct), with, MaxBlockLens)
	}
}
