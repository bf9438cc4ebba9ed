// SPDX-License-Identifier: Apache-2.0

// Package topology holds what the operator says: one static TOML file, the same on every
// node, that names the nodes, their SRv6 locators and the networks. It is pure: nothing
// here touches a kernel, and the same file always gives the same Topology and Hash.
package topology

import (
	"net/netip"
	"time"
)

// Topology is a valid topology file. All slices are sorted by name.
type Topology struct {
	Underlay   Underlay
	Nodes      []*Node
	Networks   []*Network
	Endpoints  []Endpoint // sorted by name
	Peerings   []Peering  // sorted by From and To, each pair once
	Masquerade Masquerade
	Conntrack  Conntrack
	Hash       Hash // of the canonical form: comments, order and spelling of the file do not matter
}

// Peering lets the containers of one network open flows to those of another. Answers come back by the flow
// itself; without a peering in the other direction nothing can be opened there. The file's selectors are resolved here: one
// Peering a pair of networks.
type Peering struct {
	From, To   string // names of networks
	Masquerade bool   // To is external and sees an address of the host in place of the container's
	Egress     string // To is external: name of the node that packets leave by; "": each node's own
	Line       int    // of the [[peering]] that says so, the first where several do
}

// Masquerade bounds how containers are masqueraded.
type Masquerade struct {
	First, Last uint16 // ports, and identifiers of ICMP queries, that stand for containers
}

// Conntrack bounds what a node remembers of flows.
type Conntrack struct {
	Max            int           // flows, both directions of one counted once
	TCPOpening     time.Duration // idle time of a TCP connection that is not established yet
	TCPEstablished time.Duration // … that is
	TCPClosing     time.Duration // … that one side has closed
	TCPClosed      time.Duration // … that is closed or reset
	UDPNew         time.Duration // … of a UDP flow that was not answered yet
	UDP            time.Duration // … that was
	ICMP           time.Duration // … of an ICMP query
	Other          time.Duration // … of any other protocol
}

// Underlay is the routed IPv6 fabric between the nodes.
type Underlay struct {
	LocatorBlock  netip.Prefix // every locator lies inside
	Encapsulation Encapsulation
	L2GSO         L2GSO
}

// L2GSO says how a frame that is still to be segmented goes to another node. To a router it is always segmented first.
type L2GSO uint8

const (
	Shim    L2GSO = iota // whole, behind a GRE header of 4 bytes (next header 47)
	Segment              // segmented first: next header 143 for everything
)

// NodeKind says what runs on a node.
type NodeKind uint8

const (
	KindHost   NodeKind = iota // runs the Lace agent
	KindRouter                 // a foreign SRv6 router: decapsulates and encapsulates for one network
)

// Node is one host or router of the fabric.
type Node struct {
	Name     string
	Kind     NodeKind
	Underlay netip.Addr // IPv6 address in the underlay
	Locator  Locator
	Number   uint64            // the locator's bits below the block; node n owns the n-th block of a network
	Uplinks  []string          // interface names; empty: the interfaces with a default route
	Via      netip.Addr        // router this node uses for peers that are not on-link; invalid: the kernel's own route
	Labels   map[string]string // free words about the node
	Network  string            // KindRouter only: the network its packets belong to
	SID4     netip.Addr        // KindRouter only: SID that takes IPv4 packets
	SID6     netip.Addr        // KindRouter only: SID that takes IPv6 packets
	SIDL2    netip.Addr        // KindRouter only: SID that takes frames, where its network is an L2 one
	Line     int               // where the file names it
}

// NetworkType is the service a network gives.
type NetworkType uint8

const (
	L3       NetworkType = iota + 1 // routed: IP packets, one block of addresses per node
	L2                              // one Ethernet segment: frames, flat subnets, one pool of addresses per node
	External                        // prefixes outside of the overlay: no container is in it
)

// Network is one isolated overlay network, or an external one.
type Network struct {
	Name       string
	Type       NetworkType
	ID         NetworkID         // External: derived from the name where the file gives none
	Subnets    []netip.Prefix    // in the order of the file: blocks are counted through them
	BlockBits4 int               // length of a counted IPv4 block (L2: pool); 0 where there is none
	BlockBits6 int               // … and of an IPv6 block
	Gateway4   netip.Addr        // L2 only: the way out of the network, the same on all nodes; invalid: there is none
	Gateway6   netip.Addr        // … for IPv6
	DHCP       bool              // L2 only: containers may ask for addresses, and give them
	Flood      bool              // L2 only: broadcast and multicast are replicated
	FloodRate  int               // L2 only: such frames of one container that are replicated, a second
	Host       bool              // hosts reach its containers by their addresses, and those may answer
	Prefixes   []netip.Prefix    // External only, sorted: its addresses, as far as no longer prefix of another external network has them
	Labels     map[string]string // free words, for the selectors of peerings
	Line       int

	nodes     map[string]*Node        // all of the topology, by name
	byNumber  []*Node                 // … by number
	given     map[string]Block        // blocks that the file gives, by node name
	base6     netip.Prefix            // see Base6
	endpoints []Endpoint              // of this network, sorted by name
	byAddr    map[netip.Addr]Endpoint // … by address
	hosting   map[string]bool         // nodes that have one of them
}

// Endpoint is an address or MAC of an L2 network that lives outside the pools: a virtual machine, an appliance.
type Endpoint struct {
	Name    string
	Network string
	Node    string // where it is attached: a host, or a router of the network
	MAC     MAC
	V4, V6  netip.Addr // invalid where it has none
	Line    int
}

// Block is a node's own part of a network: at most one prefix a family, an invalid prefix where
// the network has no subnet of that family.
type Block struct {
	V4, V6 netip.Prefix
}

// Block returns the part of n that node owns. It is the zero Block where the node has none: a
// router owns blocks of its own network only, and none where that is an L2 network.
func (n *Network) Block(node string) Block {
	owner, ok := n.nodes[node]
	if !ok || !owner.owns(n) {
		return Block{}
	}
	block := n.given[node]
	if !block.V4.IsValid() {
		block.V4, _ = n.counted(V4, owner.Number)
	}
	if !block.V6.IsValid() {
		block.V6, _ = n.counted(V6, owner.Number)
	}
	return block
}

// owns says whether the node can have a block of the network.
func (n *Node) owns(network *Network) bool {
	return n.Kind == KindHost || network.Type != L2 && n.Network == network.Name
}

// On says whether a node has the network: a block of it, an endpoint, or, of a router, the network as its own.
func (n *Network) On(node string) bool {
	of, ok := n.nodes[node]
	return ok && (of.Kind == KindRouter && of.Network == n.Name || n.hosting[node] || n.Block(node) != Block{})
}

// Gateway4 is the first host address of the IPv4 block, invalid where there is none.
func (b Block) Gateway4() netip.Addr { return gateway(b.V4) }

// Gateway6 is the first host address of the IPv6 block, invalid where there is none.
func (b Block) Gateway6() netip.Addr { return gateway(b.V6) }

func gateway(p netip.Prefix) netip.Addr {
	if !p.IsValid() {
		return netip.Addr{}
	}
	return p.Addr().Next()
}

// Node finds a node by name.
func (t *Topology) Node(name string) (*Node, bool) {
	for _, n := range t.Nodes {
		if n.Name == name {
			return n, true
		}
	}
	return nil, false
}

// Network finds a network by name.
func (t *Topology) Network(name string) (*Network, bool) {
	for _, n := range t.Networks {
		if n.Name == name {
			return n, true
		}
	}
	return nil, false
}

// SIDFor is the SID of a router that takes packets of a family, invalid for a host.
func (n *Node) SIDFor(f Family) netip.Addr {
	return f.choose(n.SID4, n.SID6)
}
