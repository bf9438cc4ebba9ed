// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/lace-net/lace/topology"
)

// peerings plans those that concern the node, and what hosts may open flows to.
func (p *Plan) peerings(t *topology.Topology, near map[string]distance, owners *owners) {
	networks, open := map[string]*topology.Network{}, map[*topology.Network]int{}
	for _, n := range t.Networks {
		if networks[n.Name] = n; n.Host {
			p.lets(Peering{From: topology.HostsID, To: n.ID, Line: n.Line}, n.Subnets)
		}
	}
	for _, peering := range t.Peerings {
		from, to := networks[peering.From], networks[peering.To]
		p.peering(peering, from, to, near, owners)
		if line := open[to]; from.Type == topology.External && (line == 0 || peering.Line < line) {
			open[to] = peering.Line
		}
	}
	for n, line := range open {
		p.lets(Peering{From: topology.OutsideID, To: n.ID, Line: line}, n.Subnets)
	}
	slices.SortFunc(p.Peerings, func(a, b Peering) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To), comparePrefix(a.Prefix, b.Prefix))
	})
}

// peering plans one that has an end here: that of the sender says what may be opened, that of the receiver what may come in. What is
// outside of the overlay comes in at any node, and leaves by the sender's or by the one that carries it for others.
func (p *Plan) peering(peering topology.Peering, from, to *topology.Network, near map[string]distance, owners *owners) {
	row := Peering{From: from.ID, To: to.ID, Line: peering.Line}
	switch {
	case to.Type == topology.External:
		if near[from.Name] == here || peering.Egress == p.Node {
			p.lets(owners.outward(row, peering), to.Prefixes)
		}
	case from.Type == topology.External, near[from.Name] == here, near[to.Name] == here:
		p.lets(row, to.Subnets)
	}
}

// outward is a row that leads out of the overlay, by another node where the peering names one.
func (o *owners) outward(row Peering, peering topology.Peering) Peering {
	row.External, row.Masquerade = true, peering.Masquerade
	if by := o.named[peering.Egress]; by.index != 0 {
		row.Peer, row.SID = by.index, by.Locator.SID(topology.EndDT46, row.To)
	}
	return row
}

// lets adds a row for each prefix of the network that it leads to.
func (p *Plan) lets(row Peering, prefixes []netip.Prefix) {
	for _, row.Prefix = range prefixes {
		p.Peerings = append(p.Peerings, row)
	}
}

// hosts plans what leads this host to containers.
func (p *Plan) hosts(t *topology.Topology) {
	for _, n := range t.Networks {
		if n.Host {
			p.HostRoutes = append(p.HostRoutes, n.Subnets...)
		}
	}
	slices.SortFunc(p.HostRoutes, comparePrefix)
}
