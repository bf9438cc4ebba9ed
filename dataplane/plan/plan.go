// SPDX-License-Identifier: Apache-2.0

// Package plan is the pure heart of the data plane: (topology, node, attachments) → Plan, in a
// deterministic order. A Plan says what one node's kernel should hold, in names and addresses;
// interface indexes, MAC addresses of the underlay and MTUs are the kernel's own and are filled in by the appliers.
package plan

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"

	"github.com/lace-net/lace/topology"
)

// MAC is an Ethernet address, comparable so that it can be part of a map key.
type MAC [6]byte

// GatewayMAC answers for the gateway of every L3 network on every node, so that a container's
// neighbour entry stays right wherever it runs. Locally administered; its tail spells "lace".
var GatewayMAC = MAC{0x06, 0x00, 0x6c, 0x61, 0x63, 0x65}

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// Attachment is one interface of one container, with the addresses it was given.
type Attachment struct {
	Container string // containerd namespace + "/" + container id: "default/4f1c…"
	Name      string // what people call it; may be empty
	Network   string // name in the topology
	NetworkID topology.NetworkID
	IfName    string     // inside the container, "eth0"
	V4, V6    netip.Addr // invalid where the network has no such family
	MAC       MAC
	Sticky    bool // the addresses stay reserved for the name when the container is removed
}

// HostIf is the name of the host end of the attachment's veth: "lace" and eleven hexadecimal
// digits of SHA-256 over container and interface, so that attaching twice meets itself.
func (a Attachment) HostIf() string {
	sum := sha256.Sum256([]byte(a.Container + "\x00" + a.IfName))
	return "lace" + hex.EncodeToString(sum[:6])[:11]
}

// Plan is what a node should hold. Everything is sorted: networks by id, peers by index, routes
// and blocks by prefix, ports by host interface.
type Plan struct {
	Node          string
	Hash          topology.Hash
	LocatorBlock  netip.Prefix
	Locator       topology.Locator
	Underlay      netip.Addr // this node's own underlay address
	Via           netip.Addr // router for peers that are not on-link; invalid: the kernel's route
	Encapsulation topology.Encapsulation
	Uplinks       []string // named ones; empty: the interfaces with a default route
	Networks      []Network
	Peers         []Peer
	Blocks        []Block
	Ports         []Port
}

// Network is a network's place on this node.
type Network struct {
	Name       string
	ID         topology.NetworkID
	VRF        string         // "lacev<id>"
	Table      uint32         // 0x4c000000 + id
	Bridge     string         // "laceb<id>"
	Gateways   []netip.Prefix // first address of this node's blocks, with the block's length
	SID        topology.SID   // where other nodes send this network's packets
	BlockBits4 []uint8        // distinct lengths of the network's IPv4 blocks, longest first
	BlockBits6 []uint8        // … and of its IPv6 blocks
}

// Peer is another node or router. Index is its place in the nexthop map.
type Peer struct {
	Index    uint32
	Name     string
	Kind     topology.NodeKind
	Locator  topology.Locator
	Underlay netip.Addr
	Network  topology.NetworkID // the one network of a router; 0: told by the outer source
}

// Block says who owns a block of addresses.
type Block struct {
	Network topology.NetworkID
	Prefix  netip.Prefix
	Local   bool         // this node's own: look among the endpoints
	Peer    uint32       // index of the owner, where not local
	SID     topology.SID // where to send it, where not local
}

// Port is an attachment with all that the data plane knows of its network.
type Port struct {
	Attachment
	HostIf   string
	Bridge   string
	VRF      string
	Gateway4 netip.Addr
	Gateway6 netip.Addr
	Source   netip.Addr // outer source of its packets
}
