// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/lace-net/lace/topology"
)

// frameOverhead is what a frame has before its packet, and a shim before it: 14 bytes and 4.
const frameOverhead = 18

// overhead is by how much an IP packet of the network grows on the underlay.
func overhead(e topology.Encapsulation, n *topology.Network) int {
	if n.Type == topology.L2 {
		return e.Overhead() + frameOverhead
	}
	return e.Overhead()
}

// segment plans what a network that is here has more where it is an L2 one.
func (p *Plan) segment(network *Network, n *topology.Network, owners *owners) {
	if n.Type != topology.L2 {
		return
	}
	network.Gateways = nil // the gateway has no place: each node answers for it
	network.SID2U, network.SID2M = p.Locator.SID(topology.EndDT2U, n.ID), p.Locator.SID(topology.EndDT2M, n.ID)
	network.Flood, network.FloodRate, network.Base6 = n.Flood, n.FloodRate, n.Base6()
	p.stations(n, owners)
	p.members(n, owners)
}

// frameSID is where a node takes frames of a network.
func (o owner) frameSID(f topology.Function, id topology.NetworkID) topology.SID {
	if o.Kind == topology.KindRouter {
		return topology.SID{Addr: o.SIDL2}
	}
	return o.Locator.SID(f, id)
}

// answers are the addresses of an endpoint that its owner does not answer for.
func (o owner) answers(e topology.Endpoint) []netip.Addr {
	if o.Kind != topology.KindRouter {
		return nil
	}
	return valid(e.V4, e.V6)
}

func (p *Plan) stations(n *topology.Network, owners *owners) {
	first := len(p.Stations)
	for _, e := range n.Endpoints() {
		o := owners.named[e.Node]
		if o.index == 0 {
			continue
		}
		p.Stations = append(p.Stations, Station{
			Network: n.ID, Name: e.Name, MAC: e.MAC, Peer: o.index, SID: o.frameSID(topology.EndDT2U, n.ID), Line: e.Line, Answers: o.answers(e),
		})
	}
	slices.SortFunc(p.Stations[first:], func(a, b Station) int { return cmp.Or(cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.Name, b.Name)) })
}

// members are in the order of the peers.
func (p *Plan) members(n *topology.Network, owners *owners) {
	if !n.Flood {
		return
	}
	for _, o := range owners.all {
		if o.index != 0 && n.On(o.Name) {
			p.Members = append(p.Members, Member{Network: n.ID, Peer: o.index, SID: o.frameSID(topology.EndDT2M, n.ID)})
		}
	}
}

// declared adds the addresses of endpoints, each a block of its own.
func (p *Plan) declared(n *topology.Network, owners *owners) {
	for _, e := range n.Endpoints() {
		for _, f := range families {
			if a := e.Addr(f); a.IsValid() {
				p.block(n, owners.named[e.Node], f, alone(a))
			}
		}
	}
}

var families = []topology.Family{topology.V4, topology.V6}

// alone is the prefix of one address.
func alone(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
