// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
)

// defaultFloodRate is in frames a second.
const defaultFloodRate = 1000

// Lengths of the subnets of an L2 network: room for a network, a broadcast and two host addresses.
const (
	minFlat4 = 8
	maxFlat4 = 30
	maxFlat6 = 126
)

// derivedMAC is what a MAC starts with that holds an address: locally administered, and the letter L.
var derivedMAC = [2]byte{0x02, 0x4c}

// Derived says whether m has the form of those that hold an address.
func (m MAC) Derived() bool { return [2]byte(m[:2]) == derivedMAC }

// DerivedMAC is the MAC of what has these addresses in an L2 network and no other MAC: 02:4c and the IPv4 address, in a
// network without IPv4 02:4c and the last 32 bits of the IPv6 address. It is the zero MAC where the address that it would hold is
// not there, or, of IPv6, not in Base6.
func (n *Network) DerivedMAC(v4, v6 netip.Addr) MAC {
	from := v4
	if len(n.subnets(V4)) == 0 {
		from = v6
		if !n.base6.IsValid() || !n.base6.Contains(v6) {
			return MAC{}
		}
	}
	if !from.IsValid() {
		return MAC{}
	}
	mac, bytes := MAC(append(derivedMAC[:], 0, 0, 0, 0)), from.AsSlice()
	copy(mac[2:], bytes[len(bytes)-4:])
	return mac
}

// AddressOf is the address that a MAC of the derived form stands for in an L2 network, whether or not somebody owns that. It fails
// for other MACs, and where the network's MACs hold no addresses: without IPv4 and without Base6.
func (n *Network) AddressOf(m MAC) (netip.Addr, bool) {
	switch {
	case n.Type != L2 || !m.Derived():
		return netip.Addr{}, false
	case len(n.subnets(V4)) > 0:
		return netip.AddrFrom4([4]byte(m[2:])), true
	case !n.base6.IsValid():
		return netip.Addr{}, false
	}
	hi, lo := halves(n.base6.Addr())
	return join(hi, lo|uint64(binary.BigEndian.Uint32(m[2:]))), true
}

// Base6 is the /96 that all pools of an L2 network without IPv4 lie in, invalid for other networks.
func (n *Network) Base6() netip.Prefix { return n.base6 }

// Gateway is the declared one of an L2 network, invalid where there is none.
func (n *Network) Gateway(f Family) netip.Addr { return f.choose(n.Gateway4, n.Gateway6) }

// Subnet is the one of a family that an L2 network has, invalid where it has none.
func (n *Network) Subnet(f Family) netip.Prefix {
	for _, s := range n.subnets(f) {
		return s
	}
	return netip.Prefix{}
}

// Owner is the node that an address of the network belongs to: of a block or pool, or of an endpoint.
func (n *Network) Owner(a netip.Addr) (node string, ok bool) {
	if e, declared := n.byAddr[a]; declared {
		return e.Node, true
	}
	return n.blockOwner(a)
}

// Reserved says why a container of an L2 network cannot have an address, though it may lie in a pool.
func (n *Network) Reserved(a netip.Addr) (why string, is bool) {
	if n.Type != L2 || !a.IsValid() {
		return "", false
	}
	f := familyOfAddr(a)
	subnet := n.Subnet(f)
	if e, declared := n.byAddr[a]; declared {
		return "the address of endpoint " + e.Name, true
	}
	switch {
	case a == n.Gateway(f):
		return "the gateway", true
	case !subnet.IsValid() || !subnet.Contains(a):
		return "", false
	case a == subnet.Addr() && f == V6:
		return "the anycast address of the routers of " + subnet.String(), true // RFC 4291, section 2.6.1
	case a == subnet.Addr():
		return "the network address of " + subnet.String(), true
	case f == V4 && !subnet.Contains(a.Next()):
		return "the broadcast address of " + subnet.String(), true
	}
	return "", false
}

// segment takes over what only an L2 network has.
func (b *builder) segment(n *Network, raw rawNetwork) {
	b.gateways(n, raw.Gateway)
	b.gatewaysForHosts(n)
	n.DHCP, n.Flood = raw.DHCP, raw.Flood == nil || *raw.Flood
	b.floodRate(n, raw.FloodRate)
	if n.DHCP && !n.Flood {
		b.fail(networkKey(n.Name, "dhcp"), "leave one of the two out", "needs flood: who asks for an address asks all")
	}
}

func (b *builder) floodRate(n *Network, given *int64) {
	key := networkKey(n.Name, "flood-rate")
	if !n.Flood {
		if b.lines.Has(key) {
			b.fail(key, "leave one of the two out", "nothing is replicated with flood = false")
		}
		return
	}
	n.FloodRate = defaultFloodRate
	if given == nil {
		return
	}
	if *given < 1 || *given > MaxFloodRate {
		b.fail(key, fmt.Sprintf("choose a number from 1 to %d", MaxFloodRate), "%d frames a second are out of range", *given)
		return
	}
	n.FloodRate = int(*given)
}

// otherKeys refuses keys that only networks of another type have.
func (b *builder) otherKeys(n *Network) {
	other := map[NetworkType]map[string]string{
		L2: {"block-size": "write pool-size", "blocks": "write pools", "prefixes": "write subnets"},
		L3: {"pool-size": "write block-size", "pools": "write blocks", "prefixes": "write subnets",
			"gateway": "leave it out: the first address of each node's block is its gateway", "dhcp": "leave it out", "flood": "leave it out", "flood-rate": "leave it out"},
		External: {"subnets": "write prefixes", "block-size": "leave it out", "blocks": "leave it out", "pool-size": "leave it out", "pools": "leave it out",
			"gateway": "leave it out: the hosts' own routes lead there", "dhcp": "leave it out", "flood": "leave it out", "flood-rate": "leave it out",
			"host": "leave it out: peerings say who reaches the hosts' own addresses"},
	}[n.Type]
	for _, name := range sortedKeys(other) {
		if key := networkKey(n.Name, name); b.lines.Has(key) {
			b.fail(key, other[name], "an %s network has none", n.Type.word())
		}
	}
}

// flat checks the last subnet of an L2 network, which has one of a family.
func (b *builder) flat(n *Network, key string) bool {
	if n.Type != L2 {
		return true
	}
	last := n.Subnets[len(n.Subnets)-1]
	f := familyOf(last)
	least, most := minFlat4, maxFlat4
	if f == V6 {
		least, most = 0, maxFlat6
	}
	switch first := n.Subnet(f); {
	case first != last:
		b.fail(key, "leave one out: an L2 network is one segment", "%s is a second %s subnet; the first is %s", last, f, first)
	case last.Bits() < least || last.Bits() > most:
		b.fail(key, fmt.Sprintf("choose a length from %d to %d", least, most), "/%d is no length for an %s subnet of an L2 network", last.Bits(), f)
	default:
		return true
	}
	return false
}

// gateways takes over the declared gateways.
func (b *builder) gateways(n *Network, raw []hostAddr) {
	for i, a := range raw {
		if a.IsValid() {
			b.gateway(n, indexKey(networkKey(n.Name, "gateway"), i), a.Addr)
		}
	}
}

// gatewaysForHosts refuses a network that hosts reach where its containers have no way to answer.
func (b *builder) gatewaysForHosts(n *Network) {
	for _, f := range []Family{V4, V6} {
		if subnet := n.Subnet(f); n.Host && subnet.IsValid() && !n.Gateway(f).IsValid() {
			b.fail(networkKey(n.Name, "host"), fmt.Sprintf("add %q to gateway, or leave host out", subnet.Addr().Next()),
				"there is no %s gateway by which containers could answer hosts", f)
		}
	}
}

func (b *builder) gateway(n *Network, key string, a netip.Addr) {
	f := familyOfAddr(a)
	why, reserved := n.Reserved(a)
	problem, fix, outside := n.outside(a)
	switch {
	case len(n.Subnets) == 0: // that is the error
	case n.Gateway(f).IsValid():
		b.fail(key, "leave one out", "%s is a second %s gateway; the first is %s", a, f, n.Gateway(f))
	case outside:
		b.fail(key, fix, "%s", problem)
	case reserved:
		b.fail(key, "choose another", "%s is %s", a, why)
	case f == V6:
		n.Gateway6 = a
	default:
		n.Gateway4 = a
	}
}

// outside says what is wrong with an address that is not in the subnet which an L2 network has of its family.
func (n *Network) outside(a netip.Addr) (problem, fix string, is bool) {
	f := familyOfAddr(a)
	switch subnet := n.Subnet(f); {
	case !subnet.IsValid():
		return fmt.Sprintf("%s is none of %s, which has no %s subnet", a, n.Name, f), "leave it out, or give the network such a subnet", true
	case !subnet.Contains(a):
		return fmt.Sprintf("%s is not in the subnet %s of %s", a, subnet, n.Name), "choose one in it", true
	}
	return "", "", false
}

// segments checks what only shows when all is known of the L2 networks.
func (b *builder) segments() {
	for _, n := range b.topology.Networks {
		for _, f := range []Family{V4, V6} {
			b.lengths(n, f)
		}
		if n.Type == L2 {
			b.flooded(n)
		}
	}
}

// flooded bounds the nodes that get a copy of each frame for many.
func (b *builder) flooded(n *Network) {
	if !n.Flood {
		return
	}
	count := 0
	for _, node := range b.topology.Nodes {
		if n.On(node.Name) {
			count++
		}
	}
	if count > MaxFloodNodes {
		b.fail(networkKey(n.Name, "flood"), "write flood = false, or name the nodes that have it in pools",
			"%d nodes have %s; at most %d get copies", count, n.Name, MaxFloodNodes)
	}
}

// base finds the /96 of a network without IPv4.
func (b *builder) base(n *Network) {
	if len(n.subnets(V4)) > 0 {
		return
	}
	var first string // the node whose pool it is of
	for _, node := range b.topology.Nodes {
		pool := n.Block(node.Name).V6
		if !pool.IsValid() {
			continue
		}
		base := netip.PrefixFrom(pool.Addr(), base6Bits).Masked()
		switch {
		case pool.Bits() < base6Bits:
			b.fail(networkKey(n.Name, "pool-size", "v6"), "choose lengths from 96 to 128, or give the network IPv4 too",
				"pool %s of %s is too wide for a network without IPv4: its MACs hold the last 32 bits of an address", pool, node.Name)
			return
		case first == "":
			first, n.base6 = node.Name, base
		case base != n.base6:
			b.fail(networkKey(n.Name, "pools", node.Name), fmt.Sprintf("give it one in %s, or give the network IPv4 too", n.base6),
				"pool %s of %s and %s of %s are not in one /96: without IPv4 a MAC holds the last 32 bits of an address", pool, node.Name, n.Block(first).V6, first)
			return
		}
	}
	if subnet := n.Subnet(V6); first == "" && subnet.Bits() >= base6Bits {
		n.base6 = netip.PrefixFrom(subnet.Addr(), base6Bits).Masked()
	}
}

// base6Bits leave the 32 bits that a MAC holds behind its first two bytes.
const base6Bits = 96

func (n *Network) canonicalSegment(w *strings.Builder) {
	if n.BlockBits4 == 0 && n.BlockBits6 == 0 && len(n.given) == 0 {
		fmt.Fprintf(w, "pools = {}\n")
	}
	var gateways []netip.Addr
	for _, f := range []Family{V4, V6} {
		if a := n.Gateway(f); a.IsValid() {
			gateways = append(gateways, a)
		}
	}
	if len(gateways) > 0 {
		fmt.Fprintf(w, "gateway = %s\n", quoted(gateways))
	}
	fmt.Fprintf(w, "dhcp = %t\nflood = %t\n", n.DHCP, n.Flood)
	if n.Flood {
		fmt.Fprintf(w, "flood-rate = %d\n", n.FloodRate)
	}
}
