// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// origin is where a flow comes from: a container here, an address of another node, this host, or an address outside of the overlay.
type origin struct {
	Addr      netip.Addr `json:"address,omitzero"`
	Network   string     `json:"network"` // "hosts" of a host, "outside" of an address in no external network
	Container string     `json:"container,omitempty"`
	Name      string     `json:"name,omitempty"`
	Interface string     `json:"interface,omitempty"`
	Node      string     `json:"node,omitempty"` // the other node

	id    topology.NetworkID
	port  *netdev.Port // nil: no container here
	peer  *plan.Peer   // nil: it comes in here
	host  bool         // it is this host
	outer bool         // it is no container's: a host's, or from outside of the overlay
}

func (o *origin) describe() string {
	if o.outer {
		return o.describeOuter()
	}
	if o.port != nil && !o.Addr.IsValid() {
		return fmt.Sprintf("%s, network %s, interface %s", title(o.port.Attachment), o.Network, o.Interface)
	}
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
func (x *explainer) findOrigin(q question) (*origin, error) {
	from, network, to := q.from, q.network, q.to
	if from == hostWord {
		if err := x.lookAround(); err != nil {
			return nil, err
		}
		return x.thisHost(netip.Addr{}, q)
	}
	found := x.containers(from, to)
	addr, err := netip.ParseAddr(from)
	isAddr := err == nil
	if isAddr {
		if to.addr.IsValid() && addr.Is4() != to.addr.Is4() {
			return nil, fmt.Errorf("%s and %s are of different families", addr, to.addr)
		}
		found = append(found, x.remote(addr)...)
	}
	if network != "" {
		found = slices.DeleteFunc(found, func(o *origin) bool { return o.Network != network })
	}
	found = x.wayOut(found, to)
	switch {
	case q.via != "" && isAddr:
		return x.carried(addr, q)
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return nil, fmt.Errorf("%s could be one of several; name the network with --network:%s", from, listOrigins(found))
	case isAddr:
		if err := x.lookAround(); err != nil {
			return nil, err
		}
		return x.outside(addr, q)
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

// wayOut leaves of several interfaces of one container the one that its own routes lead to the target by: the longest match. A frame, and
// what is for many, goes into an L2 network.
func (x *explainer) wayOut(found []*origin, to target) []*origin {
	if len(found) < 2 || slices.ContainsFunc(found, func(o *origin) bool { return o.port == nil || o.Container != found[0].Container }) {
		return found
	}
	best, longest := []*origin{}, 0
	for _, o := range found {
		bits := x.match(o.port, to)
		if bits > longest {
			best, longest = nil, bits
		}
		if bits == longest && bits > 0 {
			best = append(best, o)
		}
	}
	if len(best) == 0 {
		return found
	}
	return best
}

// match is by how many bits, and one, the routes of an interface lead to the target; 0: not at all.
func (x *explainer) match(p *netdev.Port, to target) (longest int) {
	port := x.planned(p)
	if port == nil {
		return 0
	}
	if _, many := groupMAC(to.addr); many || to.proto == frameTarget {
		return int(port.Type) // L2 above L3
	}
	for _, prefix := range slices.Concat(port.Prefixes, port.Routes) {
		if prefix.Masked().Contains(to.addr) {
			longest = max(longest, prefix.Bits()+1)
		}
	}
	return longest
}

// planned is the plan's word for an interface; nil where its network has gone.
func (x *explainer) planned(p *netdev.Port) *plan.Port {
	for i := range x.plan.Ports {
		if x.plan.Ports[i].HostIf == p.HostIf {
			return &x.plan.Ports[i]
		}
	}
	return nil
}

// containers are those of this node that have the name, the id or the address, and an address of the target's family.
func (x *explainer) containers(from string, to target) (found []*origin) {
	for i := range x.ports {
		p := &x.ports[i]
		a := p.Attachment
		addr, ok := to.of(a)
		_, id, _ := strings.Cut(a.Container, "/")
		if ok && slices.Contains([]string{a.Name, a.Container, id, addr.String()}, from) {
			found = append(found, &origin{Addr: addr, Network: a.Network, Container: a.Container, Name: a.Name, Interface: p.HostIf,
				id: a.NetworkID, port: p})
		}
	}
	return found
}

// remote are the places of an address in the blocks of other nodes; networks may overlap.
func (x *explainer) remote(addr netip.Addr) (found []*origin) {
	for _, b := range x.plan.Blocks {
		peer := peerOf(x.plan, b.Peer)
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

// whatIs says what an address is that no flow of a container can come from; "" where it is nothing that is known.
func (x *explainer) whatIs(addr netip.Addr) string {
	for _, n := range x.plan.Networks {
		for _, g := range n.Gateways {
			if g.Addr() == addr {
				return "it is the gateway of network " + n.Name
			}
		}
	}
	if x.topo != nil {
		for _, n := range x.topo.Networks {
			if why, is := n.Reserved(addr); is {
				return fmt.Sprintf("it is %s, in network %s", why, n.Name)
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
	return ""
}

// receiver is the network that the other node would name in the SID: the sender's own or a peered one, else any that
// has the address here.
func (x *explainer) receiver(o *origin, to target) (topology.NetworkID, error) {
	if _, many := groupMAC(to.addr); many || to.proto == frameTarget {
		return o.id, nil
	}
	var here []topology.NetworkID
	for _, b := range x.plan.Blocks {
		if b.Local && b.Prefix.Contains(to.addr) {
			here = append(here, b.Network)
		}
	}
	if out, ok, err := x.leavesHere(o, to); len(here) == 0 && ok {
		return out, err
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
