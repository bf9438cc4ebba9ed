// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"net/netip"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// scopeBits is the part of a trie's key that comes before the address: scope or slot.
const scopeBits = 32

// inFamily adds the family of a prefix to a trie's scope or slot: ::/0 is not to match IPv4. IN_FAMILY of bpf/lib/types.h.
func inFamily(scope uint32, prefix netip.Prefix) uint32 {
	if prefix.Addr().Is4() {
		return scope | 1<<familyBit
	}
	return scope
}

const familyBit = 30

func peeringRows(p *plan.Plan, s Slot) map[bpf.LacePeeringKey]bpf.LacePeering {
	rows := make(map[bpf.LacePeeringKey]bpf.LacePeering, len(p.Peerings))
	for _, g := range p.Peerings {
		k := bpf.LacePeeringKey{Prefixlen: scopeBits + mappedBits(g.Prefix), Scope: inFamily(Scope(g.From, s), g.Prefix)}
		k.Addr.U8 = addr(g.Prefix.Masked().Addr()).U8
		rows[k] = peeringRow(g)
	}
	return rows
}

func peeringRow(g plan.Peering) bpf.LacePeering {
	row := bpf.LacePeering{Network: uint32(g.To), Line: uint32(g.Line), Peer: g.Peer}
	row.Sid.U8 = addr(g.SID.Addr).U8
	if g.External {
		row.Flags |= uint32(bpf.LacePeeringFlagsPEERING_EXTERNAL)
	}
	if g.Masquerade {
		row.Flags |= uint32(bpf.LacePeeringFlagsPEERING_MASQUERADE)
	}
	return row
}

// externalRows say which external network an address is in.
func externalRows(p *plan.Plan, s Slot) map[bpf.LaceExternalKey]bpf.LaceExternal {
	rows := map[bpf.LaceExternalKey]bpf.LaceExternal{}
	for _, n := range p.Externals {
		for _, prefix := range n.Prefixes {
			k := bpf.LaceExternalKey{Prefixlen: scopeBits + mappedBits(prefix), Slot: inFamily(uint32(s), prefix)}
			k.Addr.U8 = addr(prefix.Masked().Addr()).U8
			rows[k] = bpf.LaceExternal{Network: uint32(n.ID), Line: uint32(n.Line)}
		}
	}
	return rows
}

// masqueradePorts are the default ones where a plan says nothing.
func masqueradePorts(m topology.Masquerade) (first, last uint16) {
	if m == (topology.Masquerade{}) {
		m = topology.DefaultMasquerade()
	}
	return m.First, m.Last
}
