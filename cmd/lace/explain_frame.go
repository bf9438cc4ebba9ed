// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/gopacket/gopacket/layers"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/dataplane/trace"
	"github.com/lace-net/lace/topology"
)

// entrance is where and how a packet comes in.
type entrance struct {
	program hook.Program
	ifindex int
	frame   []byte
}

// enter makes up the first packet of the flow, or the frame, as it would come in on this node.
func (x *explainer) enter(o *origin, to target) (entrance, error) {
	switch {
	case o.port != nil:
		return x.leave(o, to)
	case o.peer != nil:
		return x.arrive(o, to)
	case !to.flows():
		return entrance{}, fmt.Errorf("nothing but IP packets comes into the overlay from %s", o.Addr)
	case o.host:
		return x.fromHost(o, to)
	}
	return x.fromOutside(o, to)
}

// isSegment says whether a network of this node is an L2 network.
func (x *explainer) isSegment(id topology.NetworkID) bool {
	return slices.ContainsFunc(x.plan.Networks, func(n plan.Network) bool { return n.ID == id && n.Type == topology.L2 })
}

// leave has a container of this node send.
func (x *explainer) leave(o *origin, to target) (entrance, error) {
	program := hook.PodL3
	if x.isSegment(o.id) {
		program = hook.PodL2
	}
	dst, err := x.neighbour(o, to)
	if err != nil {
		return entrance{}, err
	}
	frame, err := firstFrame(dst, o.port.Attachment.MAC, o.Addr, to)
	return entrance{program, o.port.Index, frame}, err
}

// neighbour is the MAC address to which a container here sends what is for the target.
func (x *explainer) neighbour(o *origin, to target) (plan.MAC, error) {
	port := x.planned(o.port)
	mac, fixed := fixedMAC(to)
	switch {
	case fixed:
		return mac, nil
	case port == nil || port.Type != topology.L2:
		return plan.GatewayMAC, nil
	}
	for _, subnet := range port.Prefixes {
		if subnet.Masked().Contains(to.addr) {
			return x.onSegment(o, port, subnet, to.addr)
		}
	}
	gateway := port.Gateway6
	if to.addr.Is4() {
		gateway = port.Gateway4
	}
	if !gateway.IsValid() {
		return mac, fmt.Errorf("nothing leads from network %s to %s: it is outside of the network's subnets, and no gateway is declared; what it can reach is in %v", o.Network, to.addr, port.Prefixes)
	}
	return plan.GatewayMAC, nil
}

// fixedMAC is the MAC address of a target that says it.
func fixedMAC(to target) (plan.MAC, bool) {
	switch to.proto {
	case frameTarget:
		return to.mac, true
	case "arp":
		return broadcast, true
	case "nd":
		return groupMAC(solicited(to.addr))
	}
	return groupMAC(to.addr)
}

// onSegment is the MAC address of an address in the subnet of a port.
func (x *explainer) onSegment(o *origin, port *plan.Port, subnet netip.Prefix, a netip.Addr) (plan.MAC, error) {
	switch {
	case a == port.Gateway4 || a == port.Gateway6:
		return plan.GatewayMAC, nil
	case a.Is4() && subnet.Bits() < 31 && !subnet.Masked().Contains(a.Next()):
		return broadcast, nil
	}
	return x.station(o.id, o.Network, a)
}

// station is the MAC address that an address of an L2 network has: that of a port here, that of a declared endpoint, or the one that
// every node derives from it.
func (x *explainer) station(id topology.NetworkID, network string, a netip.Addr) (plan.MAC, error) {
	for _, p := range x.ports {
		if p.Attachment.NetworkID == id && (p.Attachment.V4 == a || p.Attachment.V6 == a) {
			return p.Attachment.MAC, nil
		}
	}
	if x.topo == nil {
		return plan.MAC{}, fmt.Errorf("the MAC address of %s is not known while %s is not the file that the agent has read: apply one of them, or ask for a MAC address", a, x.file)
	}
	n, ok := x.topo.Network(network)
	if !ok {
		return plan.MAC{}, fmt.Errorf("the MAC address of %s is not known: %s has no network %s", a, x.file, network)
	}
	for _, e := range n.Endpoints() {
		if e.V4 == a || e.V6 == a {
			return e.MAC, nil
		}
	}
	if mac := n.DerivedMAC(a, a); mac != (plan.MAC{}) && (a.Is4() || !n.Subnet(topology.V4).IsValid()) {
		return mac, nil
	}
	twin, ok := twin(n, a)
	if !ok {
		return plan.MAC{}, fmt.Errorf("the MAC address of %s is not known: it follows from the IPv4 address of whoever has it; ask for that one, or for a MAC address", a)
	}
	x.notes = append(x.notes, fmt.Sprintf("%s is taken to be at the MAC address of %s, which its node gives out with it; a container there says what is true (%s/nd)", a, twin, a))
	return n.DerivedMAC(twin, a), nil
}

// twin is the IPv4 address at the same place of its node's pool, where a container that chooses neither has both.
func twin(n *topology.Network, a netip.Addr) (netip.Addr, bool) {
	node, ok := n.Owner(a)
	block := n.Block(node)
	if !ok || !a.Is6() || !block.V4.IsValid() || !block.V6.IsValid() {
		return netip.Addr{}, false
	}
	at, first := a.As16(), block.V6.Masked().Addr().As16()
	place := binary.BigEndian.Uint64(at[8:]) - binary.BigEndian.Uint64(first[8:])
	if [8]byte(at[:8]) != [8]byte(first[:8]) || place >= 1<<(32-block.V4.Bits()) {
		return netip.Addr{}, false
	}
	four := block.V4.Masked().Addr().As4()
	binary.BigEndian.PutUint32(four[:], binary.BigEndian.Uint32(four[:])+uint32(place))
	return netip.AddrFrom4(four), true
}

// arrive has another node send, by an uplink.
func (x *explainer) arrive(o *origin, to target) (entrance, error) {
	receiver, err := x.receiver(o, to)
	if err != nil {
		return entrance{}, err
	}
	e := envelope{sid: x.plan.Locator.SID(topology.EndDT46, receiver)}
	if x.isSegment(o.id) && receiver == o.id {
		err = x.frameIn(&e, o, to)
	} else {
		err = x.packetIn(&e, o, to)
	}
	if err != nil {
		return entrance{}, err
	}
	outer, err := inSRv6(o.peer.Locator.Source(o.id, 0), e.sid.Addr, x.plan.Encapsulation == topology.SRH, e.inner, e.content)
	if err != nil {
		return entrance{}, err
	}
	up, err := x.uplink()
	if err != nil {
		return entrance{}, err
	}
	// A raw uplink has no Ethernet header; the kernel cannot run a packet without one, and the decision is the same.
	return entrance{hook.Uplink, up.Index, inEthernet(up.MAC, plan.MAC{}, outer)}, nil
}

// envelope is what another node sends, and to which SID.
type envelope struct {
	sid     topology.SID
	inner   layers.IPProtocol
	content []byte
}

// packetIn fills in a routed packet.
func (x *explainer) packetIn(e *envelope, o *origin, to target) (err error) {
	if !to.flows() {
		return fmt.Errorf("nothing but IP packets comes from node %s in network %s: it is routed, or not here", o.Node, o.Network)
	}
	if e.content, err = firstPacket(o.Addr, to); err == nil {
		e.inner = innerOf(e.content)
	}
	return err
}

// frameIn fills in a frame: what is for many, and a question, goes to End.DT2M, everything else to End.DT2U.
func (x *explainer) frameIn(e *envelope, o *origin, to target) error {
	src, err := x.station(o.id, o.Network, o.Addr)
	if err != nil {
		return err
	}
	dst, fixed := fixedMAC(to)
	if !fixed {
		if dst, err = x.station(o.id, o.Network, to.addr); err != nil {
			return err
		}
	}
	function := topology.EndDT2U
	if isGroup(dst) {
		function = topology.EndDT2M
	}
	e.sid, e.inner = x.plan.Locator.SID(function, o.id), framed
	e.content, err = firstFrame(dst, src, o.Addr, to)
	return err
}

// copies are who get one of a frame that is replicated.
type copies struct {
	Ports []string `json:"ports"` // containers and devices here
	Nodes []string `json:"nodes"` // the others
}

// copiesOf reads the places of the frame's network: all but its own port, and the nodes where it comes from a port.
func (x *explainer) copiesOf(ev trace.Event, fromHere bool) (*copies, error) {
	m, done, err := hook.OpenMaps(x.bpffs)
	if err != nil {
		return nil, err
	}
	defer done()
	members, err := m.Members.All()
	if err != nil {
		return nil, err
	}
	c := &copies{Ports: []string{}, Nodes: []string{}}
	scope := maps.Scope(topology.NetworkID(ev.Network), maps.SlotOf(ev.Generation))
	for k, row := range members {
		switch {
		case k.Scope != scope:
		case row.Ifindex == 0 && fromHere:
			c.Nodes = append(c.Nodes, x.peer(row.Peer))
		case row.Ifindex != 0 && row.Ifindex != ev.Ifindex:
			c.Ports = append(c.Ports, x.holder(row.Ifindex))
		}
	}
	slices.Sort(c.Ports)
	slices.Sort(c.Nodes)
	return c, nil
}

// portAt is the container or device behind an interface here; nil where there is none.
func (x *explainer) portAt(index uint32) *netdev.Port {
	for i := range x.ports {
		if uint32(x.ports[i].Index) == index {
			return &x.ports[i]
		}
	}
	return nil
}

// holder names it.
func (x *explainer) holder(index uint32) string {
	if p := x.portAt(index); p != nil {
		return title(p.Attachment)
	}
	return x.link(index)
}

func (c *copies) String() string {
	return fmt.Sprintf("copies to %s and %s", listed(c.Ports, "port"), listed(c.Nodes, "node"))
}

const listMost = 8 // names in a line

// listed is "2 nodes (edge-2, edge-3)"; of many the first.
func listed(names []string, what string) string {
	s := count(len(names), what)
	if len(names) == 0 {
		return s
	}
	shown := names[:min(len(names), listMost)]
	if len(names) > listMost {
		shown = append(slices.Clone(shown), "…")
	}
	return s + " (" + strings.Join(shown, ", ") + ")"
}

// answered is what an answer to a question says; the programs have written it in the question's place.
func answered(reason bpf.LaceReason, to target, frame []byte) string {
	if !to.asks() || reason != bpf.LaceReasonREASON_NEIGHBOUR_ANSWERED && reason != bpf.LaceReasonREASON_GATEWAY_ANSWERED {
		return ""
	}
	return fmt.Sprintf("%s is at %s", to.addr, trace.ParseFlow(frame, true).SrcMAC)
}
