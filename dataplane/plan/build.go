// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/lace-net/lace/topology"
)

// tableBase is the routing table of network 0, which is none: a range that nobody else is known to use.
const tableBase = 0x4c000000

// Build says what the node should hold with these attachments. It fails for a node that the
// topology does not name or where Lace does not run, and for an attachment to a network that is
// not there.
func Build(t *topology.Topology, node string, attachments []Attachment) (*Plan, error) {
	self, ok := t.Node(node)
	if !ok {
		return nil, fmt.Errorf("the topology has no node %q; %s", node, nodesOf(t, node))
	}
	if self.Kind != topology.KindHost {
		return nil, fmt.Errorf("node %q is a router: Lace does not run there; name a host", node)
	}
	p := &Plan{
		Node: self.Name, Hash: t.Hash, LocatorBlock: t.Underlay.LocatorBlock, Locator: self.Locator,
		Underlay: self.Underlay, Via: self.Via, Encapsulation: t.Underlay.Encapsulation, L2GSO: t.Underlay.L2GSO,
		Uplinks: self.Uplinks, Masquerade: t.Masquerade, Conntrack: t.Conntrack,
	}
	owners, near := p.peers(t, self), neighbourhood(t, self)
	p.peerings(t, near, owners)
	p.hosts(t)
	networks := slices.SortedFunc(slices.Values(t.Networks), func(a, b *topology.Network) int { return cmp.Compare(a.ID, b.ID) })
	for _, n := range networks {
		p.network(n, self, near[n.Name], owners)
	}
	if err := p.ports(t, self, attachments); err != nil {
		return nil, err
	}
	return p, nil
}

// nodesOf helps somebody who named a node that is not there.
func nodesOf(t *topology.Topology, meant string) string {
	var names []string
	for _, n := range t.Nodes {
		if n.Kind == topology.KindHost {
			names = append(names, n.Name)
		}
	}
	if near := topology.Nearest(meant, names); near != "" {
		return fmt.Sprintf("did you mean %q? It has %s", near, strings.Join(names, ", "))
	}
	return "it has " + strings.Join(names, ", ")
}

// owner is a node with its place in the plan: index 0 is this node.
type owner struct {
	*topology.Node
	index uint32
}

// owners are all nodes, this one first and the others by index.
type owners struct {
	all   []owner
	named map[string]owner
}

func (o *owners) add(n owner) {
	o.all = append(o.all, n)
	o.named[n.Name] = n
}

// peers numbers the other nodes by their order, and returns all nodes as owners of blocks.
func (p *Plan) peers(t *topology.Topology, self *topology.Node) *owners {
	nodes := slices.SortedFunc(slices.Values(t.Nodes), func(a, b *topology.Node) int { return cmp.Compare(a.Number, b.Number) })
	owners := &owners{named: map[string]owner{}}
	owners.add(owner{Node: self})
	for _, n := range nodes {
		if n == self {
			continue
		}
		peer := Peer{Index: uint32(len(p.Peers) + 1), Name: n.Name, Kind: n.Kind, Locator: n.Locator, Underlay: n.Underlay}
		if network, ok := t.Network(n.Network); ok {
			peer.Network, peer.SIDL2 = network.ID, topology.SID{Addr: n.SIDL2}
		}
		p.Peers = append(p.Peers, peer)
		owners.add(owner{n, peer.Index})
	}
	return owners
}

// distance says how far a network is from a node.
type distance uint8

const (
	apart   distance = iota // no concern of the node
	foreign                 // not here, but packets are sent there: by a network that is here, by this host, or from outside
	here                    // the node has a block of it, or an endpoint
	outside                 // it is external
)

// neighbourhood is the distance of each network, by name.
func neighbourhood(t *topology.Topology, self *topology.Node) map[string]distance {
	near := map[string]distance{}
	for _, n := range t.Networks {
		near[n.Name] = distanceOf(n, self)
	}
	for _, p := range t.Peerings {
		from, to := near[p.From], near[p.To]
		switch {
		case from == apart && (to == here || to == outside && p.Egress == self.Name):
			near[p.From] = foreign
		case to == apart && (from == here || from == outside):
			near[p.To] = foreign
		}
	}
	return near
}

// distanceOf is that of a network without regard to its peerings.
func distanceOf(n *topology.Network, self *topology.Node) distance {
	switch {
	case n.Type == topology.External:
		return outside
	case n.On(self.Name):
		return here
	case n.Host:
		return foreign
	}
	return apart
}

// network plans a network that is here, or that packets are sent to from here; the others do not concern this node.
func (p *Plan) network(n *topology.Network, self *topology.Node, at distance, owners *owners) {
	switch at {
	case apart:
		return
	case outside:
		p.Externals = append(p.Externals, External{Name: n.Name, ID: n.ID, Prefixes: n.Prefixes, Line: n.Line})
		return
	}
	first := len(p.Blocks)
	for _, o := range owners.all {
		p.blocks(n, o)
	}
	p.declared(n, owners)
	blocks := p.Blocks[first:]
	slices.SortFunc(blocks, func(a, b Block) int { return comparePrefix(a.Prefix, b.Prefix) })
	bits4, bits6 := lengths(blocks, true), lengths(blocks, false)
	if at == foreign {
		p.Foreign = append(p.Foreign, Foreign{Name: n.Name, ID: n.ID, BlockBits4: bits4, BlockBits6: bits6, Line: n.Line})
		return
	}
	network := Network{
		Name: n.Name, ID: n.ID, Type: n.Type, Table: tableBase + uint32(n.ID),
		VRF: fmt.Sprintf("lacev%d", n.ID), Bridge: fmt.Sprintf("laceb%d", n.ID),
		Gateways: gateways(n.Block(self.Name)), SID: self.Locator.SID(topology.EndDT46, n.ID),
		Overhead: overhead(p.Encapsulation, n), BlockBits4: bits4, BlockBits6: bits6, Host: n.Host, Line: n.Line,
	}
	p.segment(&network, n, owners)
	p.Networks = append(p.Networks, network)
}

// gateways are the first addresses of a block, with its lengths.
func gateways(b topology.Block) []netip.Prefix {
	var g []netip.Prefix
	if a := b.Gateway4(); a.IsValid() {
		g = append(g, netip.PrefixFrom(a, b.V4.Bits()))
	}
	if a := b.Gateway6(); a.IsValid() {
		g = append(g, netip.PrefixFrom(a, b.V6.Bits()))
	}
	return g
}

// blocks adds those of an owner, of each family that it has one of.
func (p *Plan) blocks(n *topology.Network, o owner) {
	owned := n.Block(o.Name)
	p.block(n, o, topology.V4, owned.V4)
	p.block(n, o, topology.V6, owned.V6)
}

func (p *Plan) block(n *topology.Network, o owner, f topology.Family, prefix netip.Prefix) {
	if !prefix.IsValid() {
		return
	}
	b := Block{Network: n.ID, Prefix: prefix, Local: o.index == 0, Peer: o.index}
	switch {
	case b.Local:
	case o.Kind == topology.KindRouter && !o.SIDFor(f).IsValid():
		b.SID, b.Frames = topology.SID{Addr: o.SIDL2}, true
	case o.Kind == topology.KindRouter:
		b.SID = topology.SID{Addr: o.SIDFor(f)}
	default:
		b.SID = o.Locator.SID(topology.EndDT46, n.ID)
	}
	p.Blocks = append(p.Blocks, b)
}

func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// lengths are the distinct lengths of the blocks of a family, longest first: the order in which
// they are looked up.
func lengths(blocks []Block, v4 bool) Lengths {
	var found Lengths
	for _, b := range blocks {
		length := uint8(b.Prefix.Bits())
		if b.Prefix.Addr().Is4() == v4 && !slices.Contains(found, length) {
			found = append(found, length)
		}
	}
	slices.SortFunc(found, func(a, b uint8) int { return cmp.Compare(b, a) })
	return found
}

func (p *Plan) ports(t *topology.Topology, self *topology.Node, attachments []Attachment) error {
	for _, a := range attachments {
		n, err := networkOf(t, a)
		if err != nil {
			return err
		}
		p.Ports = append(p.Ports, port(t, a, n, self))
	}
	slices.SortFunc(p.Ports, func(a, b Port) int { return cmp.Compare(a.HostIf, b.HostIf) })
	return nil
}

// networkOf is the network that an attachment is in.
func networkOf(t *topology.Topology, a Attachment) (*topology.Network, error) {
	n, ok := t.Network(a.Network)
	switch {
	case !ok:
		return nil, fmt.Errorf("container %s: the topology has no network %q; %s", a.Container, a.Network, networksOf(t, a.Network))
	case n.Type == topology.External:
		return nil, fmt.Errorf("container %s: network %s is external, and no container is in it; name one of the overlay, and peer it with %s", a.Container, n.Name, n.Name)
	}
	return n, nil
}

// networksOf helps somebody who named a network that is not there.
func networksOf(t *topology.Topology, meant string) string {
	var names []string
	for _, n := range t.Networks {
		if n.Type != topology.External {
			names = append(names, n.Name)
		}
	}
	if near := topology.Nearest(meant, names); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	return "it has " + cmp.Or(strings.Join(names, ", "), "none")
}
