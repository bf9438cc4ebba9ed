// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// origin is where a flow comes from: a container here, or an address of another node.
type origin struct {
	Addr      netip.Addr `json:"address"`
	Network   string     `json:"network"`
	Container string     `json:"container,omitempty"`
	Name      string     `json:"name,omitempty"`
	Interface string     `json:"interface,omitempty"`
	Node      string     `json:"node,omitempty"` // the other node

	id   topology.NetworkID
	port *netdev.Port // nil: on another node
	peer *plan.Peer
}

func (o *origin) describe() string {
	if o.port != nil {
		return fmt.Sprintf("%s, network %s, %s, interface %s", title(o.port.Attachment), o.Network, o.Addr, o.Interface)
	}
	return fmt.Sprintf("%s, network %s, on node %s", o.Addr, o.Network, o.Node)
}

// title is what a container is called.
func title(a plan.Attachment) string {
	if a.Name == "" {
		return a.Container
	}
	return fmt.Sprintf("%s (%s)", a.Name, a.Container)
}

// findOrigin finds the one place that words of the command line mean.
func (x *explainer) findOrigin(from, network string, to target) (*origin, error) {
	found := x.containers(from, to)
	addr, err := netip.ParseAddr(from)
	isAddr := err == nil
	if isAddr {
		if addr.Is4() != to.addr.Is4() {
			return nil, fmt.Errorf("%s and %s are of different families", addr, to.addr)
		}
		found = append(found, x.remote(addr)...)
	}
	if network != "" {
		found = slices.DeleteFunc(found, func(o *origin) bool { return o.Network != network })
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return nil, fmt.Errorf("%s could be one of several; name the network with --network:%s", from, listOrigins(found))
	case isAddr:
		return nil, fmt.Errorf("%s is no container here and no other node's: %s", addr, x.whatIs(addr))
	}
	return nil, x.noContainer(from, network, to)
}

func listOrigins(found []*origin) string {
	var b strings.Builder
	for _, o := range found {
		b.WriteString("\n  " + o.describe())
	}
	return b.String()
}

// containers are those of this node that have the name, the id or the address, and an address of the target's family.
func (x *explainer) containers(from string, to target) (found []*origin) {
	for i := range x.ports {
		p := &x.ports[i]
		a := p.Attachment
		addr := a.V6
		if to.addr.Is4() {
			addr = a.V4
		}
		_, id, _ := strings.Cut(a.Container, "/")
		if addr.IsValid() && slices.Contains([]string{a.Name, a.Container, id, addr.String()}, from) {
			found = append(found, &origin{Addr: addr, Network: a.Network, Container: a.Container, Name: a.Name, Interface: p.HostIf,
				id: a.NetworkID, port: p})
		}
	}
	return found
}

// remote are the places of an address in the blocks of other nodes; networks may overlap.
func (x *explainer) remote(addr netip.Addr) (found []*origin) {
	for _, b := range x.plan.Blocks {
		peer := x.peerOf(b.Peer)
		if b.Local || peer == nil || !b.Prefix.Contains(addr) {
			continue
		}
		found = append(found, &origin{Addr: addr, Network: x.network(uint32(b.Network)), Node: peer.Name, id: b.Network, peer: peer})
	}
	return found
}

// noContainer says why a word that is no address means nothing.
func (x *explainer) noContainer(from, network string, to target) error {
	var names []string
	for _, p := range x.ports {
		a := p.Attachment
		if from == a.Name || from == a.Container {
			if network != "" && network != a.Network {
				return fmt.Errorf("container %s is in network %s, not in %s", from, a.Network, network)
			}
			return fmt.Errorf("container %s has no address of the family of %s in network %s", from, to.addr, a.Network)
		}
		names = append(names, cmp.Or(a.Name, a.Container))
	}
	hint := ""
	if near := topology.Nearest(from, names); near != "" {
		hint = fmt.Sprintf("; did you mean %s?", near)
	}
	return fmt.Errorf("%.80q is no address, and no container of this node has that name or id%s (`lace status` lists them)", from, hint)
}

// whatIs says what an address is that no flow can come from.
func (x *explainer) whatIs(addr netip.Addr) string {
	for _, n := range x.plan.Networks {
		for _, g := range n.Gateways {
			if g.Addr() == addr {
				return "it is the gateway of network " + n.Name
			}
		}
	}
	for _, b := range x.plan.Blocks {
		if b.Local && b.Prefix.Contains(addr) {
			return fmt.Sprintf("it is in this node's block %s of network %s, and no container has it", b.Prefix, x.network(uint32(b.Network)))
		}
	}
	switch {
	case addr == x.plan.Underlay:
		return "it is this node's own address in the underlay"
	case x.plan.LocatorBlock.Contains(addr):
		return "it is in the locator block: a SID or an outer source"
	}
	for _, p := range x.plan.Peers {
		if p.Underlay == addr {
			return "it is the address of node " + p.Name + " in the underlay"
		}
	}
	return "it is in no block of a network that this node has or is peered with"
}

// entrance is where and how a packet comes in.
type entrance struct {
	program hook.Program
	ifindex int
	frame   []byte
}

// enter makes up the first packet of the flow as it would come in on this node.
func (x *explainer) enter(o *origin, to target) (entrance, error) {
	packet, err := firstPacket(o.Addr, to)
	if err != nil {
		return entrance{}, err
	}
	if o.port != nil {
		return entrance{hook.PodL3, o.port.Index, inEthernet(plan.GatewayMAC, o.port.Attachment.MAC, packet)}, nil
	}
	receiver, err := x.receiver(o, to)
	if err != nil {
		return entrance{}, err
	}
	sid := x.plan.Locator.SID(topology.EndDT46, receiver)
	outer, err := inSRv6(o.peer.Locator.Source(o.id, 0), sid.Addr, x.plan.Encapsulation == topology.SRH, packet)
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

// receiver is the network that the other node would name in the SID: the sender's own or a peered one, else any that
// has the address here.
func (x *explainer) receiver(o *origin, to target) (topology.NetworkID, error) {
	var here []topology.NetworkID
	for _, b := range x.plan.Blocks {
		if b.Local && b.Prefix.Contains(to.addr) {
			here = append(here, b.Network)
		}
	}
	if len(here) == 0 {
		return 0, fmt.Errorf("a flow from %s, which is on node %s, to %s does not come to this node: no block of it has that address; ask on %[2]s", o.Addr, o.Node, to.addr)
	}
	if slices.Contains(here, o.id) {
		return o.id, nil
	}
	for _, p := range x.plan.Peerings {
		if p.From == o.id && p.Prefix.Contains(to.addr) && slices.Contains(here, p.To) {
			return p.To, nil
		}
	}
	return here[0], nil
}

func (x *explainer) uplink() (netdev.Uplink, error) {
	uplinks, err := x.dev.Uplinks(x.plan)
	if err != nil {
		return netdev.Uplink{}, err
	}
	for _, u := range uplinks {
		if !u.Missing {
			return u, nil
		}
	}
	return netdev.Uplink{}, fmt.Errorf("node %s has no uplink now, so nothing comes in from other nodes: `lace status` says more", x.plan.Node)
}
