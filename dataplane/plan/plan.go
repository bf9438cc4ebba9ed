// SPDX-License-Identifier: Apache-2.0

// Package plan is the pure heart of the data plane: (topology, node, attachments) → Plan, in a
// deterministic order. A Plan says what one node's kernel should hold, in names and addresses;
// interface indexes, MAC addresses of the underlay and MTUs are the kernel's own and are filled in by the appliers.
package plan

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"

	"github.com/lace-net/lace/topology"
)

// MAC is an Ethernet address.
type MAC = topology.MAC

// GatewayMAC is the gateway's, of every network on every node.
var GatewayMAC = topology.GatewayMAC

// Attachment is one interface of one container, with the addresses it was given.
type Attachment struct {
	Container string             `json:"container"` // containerd namespace + "/" + container id: "default/4f1c…"
	Name      string             `json:"name"`      // what people call it; may be empty
	Network   string             `json:"network"`   // name in the topology
	NetworkID topology.NetworkID `json:"networkId"`
	IfName    string             `json:"ifName"`      // inside the container, "eth0"
	V4        netip.Addr         `json:"v4,omitzero"` // invalid where the network has no IPv4
	V6        netip.Addr         `json:"v6,omitzero"` // … and no IPv6
	MAC       MAC                `json:"mac"`
	Sticky    bool               `json:"sticky"`           // the addresses stay reserved for the name when the container is removed
	Gateway   bool               `json:"gateway"`          // the container's default route leads into this network
	Device    string             `json:"device,omitempty"` // a device of the host (a tap, a veth of others) that was given by name, in place of a veth made here
}

// Publish says that a port of this node is a container's.
type Publish struct {
	Address  netip.Addr `json:"address,omitzero"` // of this node; invalid: every one, of the families that the container has
	Protocol uint8      `json:"protocol"`         // 6: TCP, 17: UDP
	Port     uint16     `json:"port"`             // of the node
	To       uint16     `json:"to"`               // that the container listens at
}

// String is the form of the label: "8080:80/tcp", "192.0.2.1:8080:80/tcp", "[2001:db8::1]:53:53/udp".
func (p Publish) String() string {
	ports := fmt.Sprintf("%d:%d/%s", p.Port, p.To, transport(p.Protocol))
	if !p.Address.IsValid() {
		return ports
	}
	if p.Address.Is6() {
		return "[" + p.Address.String() + "]:" + ports
	}
	return p.Address.String() + ":" + ports
}

func transport(protocol uint8) string {
	switch protocol {
	case 6:
		return "tcp"
	case 17:
		return "udp"
	}
	return fmt.Sprint(protocol)
}

// The veth pair by which the host's own stack meets the overlay: routes lead out of HostSide, programs sit at HostPeer.
const (
	HostSide = "lc-host"
	HostPeer = "lc-host-peer"
)

// HostIf is the name of the host end of the attachment's veth: "lace" and eleven hexadecimal
// digits of SHA-256 over container and interface, so that attaching twice meets itself. It is that of the device where one was given.
func (a Attachment) HostIf() string {
	if a.Device != "" {
		return a.Device
	}
	sum := sha256.Sum256([]byte(a.Container + "\x00" + a.IfName))
	return "lace" + hex.EncodeToString(sum[:6])[:11]
}

// Lengths are the lengths of prefixes, in bits.
type Lengths []uint8

// MarshalJSON writes numbers, where a []byte would be base64.
func (l Lengths) MarshalJSON() ([]byte, error) {
	numbers := make([]int, len(l))
	for i, v := range l {
		numbers[i] = int(v)
	}
	return json.Marshal(numbers)
}

// UnmarshalJSON reads what MarshalJSON writes.
func (l *Lengths) UnmarshalJSON(text []byte) error {
	var numbers []uint16 // a []uint8 would be read as base64
	if err := json.Unmarshal(text, &numbers); err != nil {
		return err
	}
	read := make(Lengths, len(numbers))
	for i, v := range numbers {
		if v > 128 {
			return fmt.Errorf("%d is no length of a prefix; write 0 to 128", v)
		}
		read[i] = uint8(v)
	}
	*l = read
	return nil
}

// Plan is what a node should hold. Everything is sorted: networks by id, peers by index, blocks by
// network (own ones and foreign ones by id) and prefix, stations and members by network and peer, ports by host interface.
type Plan struct {
	Node          string                 `json:"node"`
	Hash          topology.Hash          `json:"topology"`
	LocatorBlock  netip.Prefix           `json:"locatorBlock"`
	Locator       topology.Locator       `json:"locator"`
	Underlay      netip.Addr             `json:"underlay"`     // this node's own underlay address
	Via           netip.Addr             `json:"via,omitzero"` // router for peers that are not on-link; invalid: the kernel's route
	Encapsulation topology.Encapsulation `json:"encapsulation"`
	L2GSO         topology.L2GSO         `json:"l2Gso"`
	Uplinks       []string               `json:"uplinks,omitempty"` // named ones; empty: the interfaces with a default route
	Networks      []Network              `json:"networks,omitempty"`
	Peers         []Peer                 `json:"peers,omitempty"`
	Foreign       []Foreign              `json:"foreign,omitempty"`
	Externals     []External             `json:"externals,omitempty"`
	HostRoutes    []netip.Prefix         `json:"hostRoutes,omitempty"` // what the host reaches by HostSide: subnets of networks with host = true
	Blocks        []Block                `json:"blocks,omitempty"`
	Peerings      []Peering              `json:"peerings,omitempty"`
	Stations      []Station              `json:"stations,omitempty"`
	Members       []Member               `json:"members,omitempty"`
	Masquerade    topology.Masquerade    `json:"masquerade"`
	Conntrack     topology.Conntrack     `json:"conntrack"`
	Ports         []Port                 `json:"ports,omitempty"`
}

// Network is a network's place on this node.
type Network struct {
	Name       string               `json:"name"`
	ID         topology.NetworkID   `json:"id"`
	Type       topology.NetworkType `json:"type"`
	VRF        string               `json:"vrf"`                  // "lacev<id>"
	Table      uint32               `json:"table"`                // 0x4c000000 + id
	Bridge     string               `json:"bridge"`               // "laceb<id>"
	Gateways   []netip.Prefix       `json:"gateways"`             // L3: first address of this node's blocks, with the block's length
	SID        topology.SID         `json:"sid,omitzero"`         // where other nodes send this network's packets
	SID2U      topology.SID         `json:"sid2u,omitzero"`       // L2: … and its frames
	SID2M      topology.SID         `json:"sid2m,omitzero"`       // L2: … and its frames for many
	Overhead   int                  `json:"overhead"`             // bytes that an IP packet of a container grows by on the underlay
	Flood      bool                 `json:"flood,omitempty"`      // L2: frames for many are replicated
	FloodRate  int                  `json:"floodRate,omitempty"`  // L2: … so many of one container a second
	Base6      netip.Prefix         `json:"base6,omitzero"`       // L2 without IPv4: a /96 that all pools lie in; a MAC holds the last 32 bits of an address
	BlockBits4 Lengths              `json:"blockBits4,omitempty"` // distinct lengths of the network's IPv4 blocks, longest first
	BlockBits6 Lengths              `json:"blockBits6,omitempty"` // … and of its IPv6 blocks
	Host       bool                 `json:"host,omitempty"`       // hosts may open flows to it
	Line       int                  `json:"line"`                 // of the topology
}

// External is a network outside of the overlay. Sorted by id; its prefixes as in the topology.
type External struct {
	Name     string             `json:"name"`
	ID       topology.NetworkID `json:"id"`
	Prefixes []netip.Prefix     `json:"prefixes"`
	Line     int                `json:"line"`
}

// Foreign is a network in which this node has no block, but which one of its own networks is peered with, in either direction.
type Foreign struct {
	Name       string             `json:"name"`
	ID         topology.NetworkID `json:"id"`
	BlockBits4 Lengths            `json:"blockBits4,omitempty"` // as in Network
	BlockBits6 Lengths            `json:"blockBits6,omitempty"`
	Line       int                `json:"line"`
}

// Peering is a prefix of another network that a network may open flows to: one for each subnet or prefix of the other. Sorted by
// From, To and Prefix. From is topology.HostsID for what hosts may open flows to (Line is then the network's), and topology.OutsideID
// for what any external network may open flows to, whichever: which one is asked again when the sender is known.
type Peering struct {
	From       topology.NetworkID `json:"from"`
	To         topology.NetworkID `json:"to"`
	Prefix     netip.Prefix       `json:"prefix"`
	External   bool               `json:"external,omitempty"`   // To is outside of the overlay
	Masquerade bool               `json:"masquerade,omitempty"` // … and sees the host's address
	Peer       uint32             `json:"peer,omitzero"`        // External: index of the node that packets leave by; 0: this one
	SID        topology.SID       `json:"sid,omitzero"`         // … and where it takes them: End.DT46 of To
	Line       int                `json:"line"`                 // of the topology
}

// Peer is another node or router. Index is its place in the nexthop map.
type Peer struct {
	Index    uint32             `json:"index"`
	Name     string             `json:"name"`
	Kind     topology.NodeKind  `json:"kind"`
	Locator  topology.Locator   `json:"locator"`
	Underlay netip.Addr         `json:"underlay"`
	Network  topology.NetworkID `json:"network,omitzero"` // the one network of a router; 0: told by the outer source
	SIDL2    topology.SID       `json:"sidL2,omitzero"`   // where a router of an L2 network takes frames
}

// Station is a MAC address at another node that the topology declares. Those of pools follow from their addresses and are not here.
type Station struct {
	Network topology.NetworkID `json:"network"`
	Name    string             `json:"name"` // of the endpoint
	MAC     MAC                `json:"mac"`
	Peer    uint32             `json:"peer"`
	SID     topology.SID       `json:"sid"` // where frames for it are sent: End.DT2U
	Line    int                `json:"line"`
	Answers []netip.Addr       `json:"answers,omitempty"` // its addresses where it is at a router: that answers no question for them, so each node does
}

// Member is another node that has an L2 network which replicates: it gets a copy of each frame for many.
type Member struct {
	Network topology.NetworkID `json:"network"`
	Peer    uint32             `json:"peer"`
	SID     topology.SID       `json:"sid"` // End.DT2M; what takes frames at a router
}

// Block says who owns a block of addresses.
type Block struct {
	Network topology.NetworkID `json:"network"`
	Prefix  netip.Prefix       `json:"prefix"`
	Local   bool               `json:"local"`            // this node's own: look among the endpoints
	Peer    uint32             `json:"peer,omitzero"`    // index of the owner, where not local
	SID     topology.SID       `json:"sid,omitzero"`     // where to send it, where not local
	Frames  bool               `json:"frames,omitempty"` // a router's that takes frames only: nothing is routed to it
}

// Port is an attachment with all that the data plane knows of its network.
type Port struct {
	Attachment
	HostIf   string               `json:"hostIf"`
	Bridge   string               `json:"bridge"`
	VRF      string               `json:"vrf"`
	Type     topology.NetworkType `json:"type"`
	Gateway4 netip.Addr           `json:"gateway4,omitzero"`
	Gateway6 netip.Addr           `json:"gateway6,omitzero"`
	Source   netip.Addr           `json:"source"`            // outer source of its packets
	Overhead int                  `json:"overhead"`          // as in Network
	DHCP     bool                 `json:"dhcp,omitempty"`    // it may ask for addresses, and give them
	Publish  []Publish            `json:"publish,omitempty"` // ports of this node that are the container's: no part of an attachment, so Build leaves it to who wires
	Prefixes []netip.Prefix       `json:"prefixes"`          // its addresses as they stand on the interface: alone (L3), or with the length of the subnet (L2)
	Routes   []netip.Prefix       `json:"routes,omitempty"`  // what leads to the gateway: everything, or only the network itself where another one has the default route
}
