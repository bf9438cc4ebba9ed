// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"slices"
)

// derivedIDs is the first of the 2^20 numbers that external networks without an id have.
const derivedIDs NetworkID = 0xe00000

// derivedID is the number of an external network that the file gives none: of the name always the same, so that no SID depends on
// the order of the file. It holds the first 20 bits of SHA-256.
func derivedID(name string) NetworkID {
	sum := sha256.Sum256([]byte(name))
	return derivedIDs | NetworkID(binary.BigEndian.Uint32(sum[:])>>12)
}

// outerPrefix is a prefix of either family that is outside of the overlay. It may be everything there is.
type outerPrefix struct{ netip.Prefix }

func (o *outerPrefix) UnmarshalText(text []byte) error {
	p, err := parsePrefix(string(text))
	if err != nil {
		return err
	}
	for _, r := range reservedRanges {
		if !r.routed && within(p, r.prefix) {
			return bad("leave it out: no packet goes there", "%s is in %s %s", p, r.what, r.prefix)
		}
	}
	o.Prefix = p
	return nil
}

// outer is a prefix of an external network and where the file has it.
type outer struct {
	netip.Prefix
	network *Network
	key     string
}

// external takes over the prefixes of an external network.
func (b *builder) external(n *Network, raw []outerPrefix) {
	key := networkKey(n.Name, "prefixes")
	if !b.lines.Has(networkKey(n.Name, "subnets")) { // who wrote subnets is told so
		b.need(n, "Prefixes")
	}
	if raw != nil && len(raw) == 0 {
		b.fail(key, "add one, as 0.0.0.0/0", "no prefix")
	}
	for i, p := range raw {
		if p.IsValid() {
			b.outerPrefix(outer{p.Prefix, n, indexKey(key, i)})
		}
	}
}

func (b *builder) outerPrefix(o outer) {
	block := b.topology.Underlay.LocatorBlock
	if block.IsValid() && within(o.Prefix, block) {
		b.fail(o.key, "leave it out: what is in it is a SID", "%s is in the locator block %s", o.Prefix, block)
		return
	}
	o.network.Prefixes = append(o.network.Prefixes, o.Prefix)
	b.outer = append(b.outer, o)
}

// allPrefixes checks what only shows when all external networks are known: which one of two an address is in has to be clear.
func (b *builder) allPrefixes() {
	b.limit("network", len(b.outer), MaxPrefixes, "prefixes of external networks")
	slices.SortStableFunc(b.outer, func(x, y outer) int { return cmp.Compare(b.lines.Of(x.key), b.lines.Of(y.key)) })
	seen := map[netip.Prefix]outer{}
	for _, o := range b.outer {
		if other, twice := seen[o.Prefix]; twice {
			b.fail(o.key, "leave one out", "%s is a prefix of %s (%s) already", o.Prefix, other.network.Name, b.at(other.key))
			continue
		}
		seen[o.Prefix] = o
	}
	for _, n := range b.topology.Networks {
		slices.SortFunc(n.Prefixes, comparePrefix)
	}
}

func comparePrefix(x, y netip.Prefix) int {
	return cmp.Or(x.Addr().Compare(y.Addr()), cmp.Compare(x.Bits(), y.Bits()))
}

// hostRoutes refuses subnets that hosts reach by their own routes and that hold an address of the underlay: hosts would look for their
// peers among the containers.
func (b *builder) hostRoutes() {
	keys, lengths := map[netip.Prefix]string{}, map[int]bool{}
	for _, n := range b.topology.Networks {
		for i, s := range n.Subnets {
			if n.Host && s.IsValid() {
				keys[s], lengths[s.Bits()] = indexKey(networkKey(n.Name, "subnets"), i), true
			}
		}
	}
	for _, node := range b.topology.Nodes {
		for bits := range lengths {
			p, err := node.Underlay.Prefix(bits)
			key, reached := keys[p]
			if err != nil || !reached {
				continue
			}
			delete(keys, p) // one node a subnet says enough
			b.fail(key, "choose another range, or leave host out", "%s holds the underlay address %s of %s (%s), and hosts would look for it among the containers",
				p, node.Underlay, node.Name, b.at(nodeKey(node.Name, "underlay")))
		}
	}
}
