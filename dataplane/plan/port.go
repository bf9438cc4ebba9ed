// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"net/netip"

	"github.com/lace-net/lace/topology"
)

// NewPort plans one attachment of a node by itself, as Build does for all of them: a container that
// comes must not wait for the whole plan.
func NewPort(t *topology.Topology, node string, a Attachment) (Port, error) {
	self, ok := t.Node(node)
	if !ok {
		return Port{}, fmt.Errorf("the topology has no node %q; %s", node, nodesOf(t, node))
	}
	n, err := networkOf(t, a)
	if err != nil {
		return Port{}, err
	}
	return port(t, a, n, self), nil
}

func port(t *topology.Topology, a Attachment, n *topology.Network, self *topology.Node) Port {
	a.NetworkID = n.ID
	p := Port{
		Attachment: a, HostIf: a.HostIf(), Type: n.Type,
		Bridge: fmt.Sprintf("laceb%d", n.ID), VRF: fmt.Sprintf("lacev%d", n.ID),
		Source: self.Locator.Source(n.ID, 0), Overhead: overhead(t.Underlay.Encapsulation, n), DHCP: n.DHCP,
	}
	if n.Type == topology.L2 {
		p.onSegment(n)
	} else {
		p.onBlock(n, n.Block(self.Name))
	}
	return p
}

// onBlock gives the port its place in an L3 network: the address alone, and all else by the gateway.
func (p *Port) onBlock(n *topology.Network, block topology.Block) {
	p.Gateway4, p.Gateway6 = block.Gateway4(), block.Gateway6()
	for _, a := range p.addresses() {
		p.Prefixes = append(p.Prefixes, alone(a))
		if p.Gateway {
			p.Routes = append(p.Routes, everything(a))
		}
	}
	if p.Gateway {
		return
	}
	for _, s := range n.Subnets {
		if p.has(s) {
			p.Routes = append(p.Routes, s)
		}
	}
}

// onSegment gives the port its place in an L2 network: the subnet is on the link, and what is outside of it by the gateway,
// where one is declared.
func (p *Port) onSegment(n *topology.Network) {
	p.Gateway4, p.Gateway6 = n.Gateway4, n.Gateway6
	for _, f := range families {
		a := p.V4
		if f == topology.V6 {
			a = p.V6
		}
		if !a.IsValid() {
			continue
		}
		p.Prefixes = append(p.Prefixes, netip.PrefixFrom(a, n.Subnet(f).Bits()))
		if p.Gateway && n.Gateway(f).IsValid() {
			p.Routes = append(p.Routes, everything(a))
		}
	}
}

// has says whether the port has an address of the family of a prefix.
func (p *Port) has(s netip.Prefix) bool {
	if s.Addr().Is4() {
		return p.V4.IsValid()
	}
	return p.V6.IsValid()
}

// everything is the default route of an address's family.
func everything(a netip.Addr) netip.Prefix {
	if a.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}
