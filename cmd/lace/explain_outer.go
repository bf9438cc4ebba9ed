// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// hostWord stands for this host as the sender.
const hostWord = "host"

// lookAround finds out what this host is.
func (x *explainer) lookAround() (err error) {
	x.host, err = x.dev.Outlook(x.plan)
	return err
}

// thisHost sends from one of its addresses; an invalid one: from that which it takes for the target.
func (x *explainer) thisHost(addr netip.Addr, q question) (*origin, error) {
	if q.via != "" {
		return nil, fmt.Errorf("what this host sends does not come by node %s: leave --via out, or name an address of that node", q.via)
	}
	if !addr.IsValid() {
		var err error
		if addr, err = x.hostAddress(q.to); err != nil {
			return nil, err
		}
	}
	o := &origin{Addr: addr, Network: hostsName, id: topology.HostsID, host: true, outer: true}
	return o, o.isIn(q.network)
}

// hostAddress is what this host sends from: an address of its own it asks from that one.
func (x *explainer) hostAddress(to target) (netip.Addr, error) {
	if x.isOwnAddress(to.addr) {
		return to.addr, nil
	}
	side := x.host.HostSide()
	addr := side.V6
	if to.addr.Is4() {
		addr = side.V4
	}
	if !addr.IsValid() {
		return addr, fmt.Errorf("this host has no address of the family of %s", to.addr)
	}
	return addr, nil
}

// isOwnAddress says whether an address is this host's, or a loopback one.
func (x *explainer) isOwnAddress(a netip.Addr) bool {
	_, own := x.host.Addresses()[a]
	return own || a.IsLoopback()
}

// isOpen says whether anything but containers of nodes may meet the overlay here.
func (x *explainer) isOpen() bool { return len(x.plan.Externals) > 0 || len(x.plan.HostRoutes) > 0 }

// outside is the origin of an address that no container has: this host's, another node's host's, or one outside of the overlay.
func (x *explainer) outside(addr netip.Addr, q question) (*origin, error) {
	if x.isOwnAddress(addr) && x.isOpen() {
		return x.thisHost(addr, q)
	}
	if p := x.peerAt(addr); p != nil && len(x.plan.HostRoutes) > 0 {
		return &origin{Addr: addr, Network: hostsName, Node: p.Name, id: topology.HostsID, peer: p, outer: true}, nil
	}
	if why := x.whatIs(addr); why != "" {
		return nil, fmt.Errorf("%s is no container here and no other node's: %s", addr, why)
	}
	if len(x.plan.Externals) == 0 {
		return nil, fmt.Errorf("%s is no container here and no other node's: it is in no block of a network that this node has or is peered with, and the topology has no external network", addr)
	}
	o := x.classify(addr)
	return o, o.isIn(q.network)
}

// classify finds the external network of an address.
func (x *explainer) classify(addr netip.Addr) *origin {
	if e := externalOf(x.plan.Externals, addr); e != nil {
		return &origin{Addr: addr, Network: e.Name, id: e.ID, outer: true}
	}
	return &origin{Addr: addr, Network: outsideName, id: topology.OutsideID, outer: true}
}

// carried is the origin of an address whose flow another node brings here.
func (x *explainer) carried(addr netip.Addr, q question) (*origin, error) {
	p := x.peerNamed(q.via)
	if p == nil || p.Kind != topology.KindHost {
		return nil, fmt.Errorf("--via %s: the topology has no other host node of that name", q.via)
	}
	o := x.classify(addr)
	if q.network == hostsName || p.Underlay == addr && q.network == "" {
		o = &origin{Addr: addr, Network: hostsName, id: topology.HostsID, outer: true}
	}
	if o.id == topology.OutsideID {
		return nil, fmt.Errorf("%s is in no external network, so node %s brings no flow of it", addr, p.Name)
	}
	o.peer, o.Node = p, p.Name
	return o, o.isIn(q.network)
}

func (x *explainer) peerAt(addr netip.Addr) *plan.Peer {
	i := slices.IndexFunc(x.plan.Peers, func(p plan.Peer) bool { return p.Kind == topology.KindHost && p.Underlay == addr })
	if i < 0 {
		return nil
	}
	return &x.plan.Peers[i]
}

// isIn refuses an origin that is not in the network that was named.
func (o *origin) isIn(network string) error {
	if network != "" && network != o.Network {
		return fmt.Errorf("%s is in network %s, not in %s", o.Addr, o.Network, network)
	}
	return nil
}

func (o *origin) describeOuter() string {
	s := fmt.Sprintf("%s, external network %s", o.Addr, o.Network)
	switch {
	case o.host:
		s = fmt.Sprintf("this host, %s", o.Addr)
	case o.id == topology.HostsID:
		return fmt.Sprintf("%s, the host of node %s", o.Addr, o.Node)
	case o.id == topology.OutsideID:
		s = fmt.Sprintf("%s, in no external network", o.Addr)
	}
	if o.Node != "" {
		return s + ", by node " + o.Node
	}
	if o.Interface != "" {
		s += ", interface " + o.Interface
	}
	return s
}

// flowNetwork is the sender's network in the table of flows: what came in here from outside is classified anew each time it is asked about.
func (o *origin) flowNetwork() uint32 {
	if o.outer && !o.host && o.peer == nil {
		return uint32(topology.OutsideID)
	}
	return uint32(o.id)
}

// reachesOverlay says whether the host's own packets to the target meet a program: routes lead them out of lc-host, and those to itself go by lo.
func (x *explainer) reachesOverlay(o *origin, to target) bool {
	return x.isOwnAddress(to.addr) || slices.ContainsFunc(x.plan.HostRoutes, func(p netip.Prefix) bool { return p.Contains(to.addr) })
}

// fromHost has this host send: by lc-host to containers, by lo to itself.
func (x *explainer) fromHost(o *origin, to target) (entrance, error) {
	side := x.host.HostSide()
	packet, err := firstPacket(o.Addr, to)
	if err != nil {
		return entrance{}, err
	}
	if x.isOwnAddress(to.addr) {
		o.Interface = x.link(uint32(side.Loopback))
		return entrance{hook.Loopback, side.Loopback, inEthernet(plan.MAC{}, plan.MAC{}, packet)}, nil
	}
	if side.Peer == 0 {
		return entrance{}, errors.New("lc-host is not there, by which this host meets the overlay: the agent makes it when it starts")
	}
	o.Interface = plan.HostSide
	mac, err := macOf(side.Peer)
	return entrance{hook.Host, side.Peer, inEthernet(mac, side.MAC, packet)}, err
}

// fromOutside has a packet come in where the host has the address that is asked, else where its own routes lead to the sender.
func (x *explainer) fromOutside(o *origin, to target) (entrance, error) {
	egress, err := x.egressFor(o.Addr, to.addr)
	if err != nil {
		return entrance{}, err
	}
	o.Interface = egress.Name
	packet, err := firstPacket(o.Addr, to)
	if err != nil {
		return entrance{}, err
	}
	program, err := x.programAt(egress)
	if err != nil {
		return entrance{}, err
	}
	mac, err := macOf(egress.Index)
	return entrance{program, egress.Index, inEthernet(mac, plan.MAC{}, packet)}, err
}

func (x *explainer) egressFor(src, dst netip.Addr) (netdev.Egress, error) {
	all := x.host.Egresses()
	if len(all) == 0 {
		return netdev.Egress{}, fmt.Errorf("node %s has no interface that leads outside of the overlay, so nothing comes in: no route leaves by one that is up", x.plan.Node)
	}
	holders := x.host.Addresses()
	for _, near := range []netip.Addr{dst, nearAddress(src)} {
		for _, e := range all {
			if index, own := holders[near]; own && index == e.Index {
				return e, nil
			}
		}
	}
	return all[0], nil
}

// nearAddress is the one from which the host itself would send to an address; invalid: it has no way. Nothing is sent.
func nearAddress(far netip.Addr) netip.Addr {
	const discard = 9
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(far, discard)))
	if err != nil {
		return netip.Addr{}
	}
	defer conn.Close()
	near, _ := netip.ParseAddrPort(conn.LocalAddr().String())
	return near.Addr()
}

// programAt is the one that sits at an interface. One without Ethernet header decides as the others do; the kernel cannot run a packet without one.
func (x *explainer) programAt(e netdev.Egress) (hook.Program, error) {
	uplinks, err := x.dev.Uplinks(x.plan)
	if slices.ContainsFunc(uplinks, func(u netdev.Uplink) bool { return u.Index == e.Index }) {
		return hook.Uplink, err
	}
	return hook.Outer, err
}

// macOf is the MAC address of an interface; zero where it has none.
func macOf(index int) (mac plan.MAC, err error) {
	i, err := net.InterfaceByIndex(index)
	if err != nil {
		return mac, fmt.Errorf("read the MAC address of interface %d: %w", index, err)
	}
	copy(mac[:], i.HardwareAddr)
	return mac, nil
}

// leavesHere says by which external network a flow of another node leaves the overlay at this one. ok: the target is in one that the
// sender's network may open flows to.
func (x *explainer) leavesHere(o *origin, to target) (out topology.NetworkID, ok bool, err error) {
	best := -1
	for _, p := range x.plan.Peerings {
		if p.From != o.id || !p.External || p.Prefix.Bits() <= best || !p.Prefix.Contains(to.addr) {
			continue
		}
		best, out, ok, err = p.Prefix.Bits(), p.To, true, nil
		if p.Peer != 0 {
			err = fmt.Errorf("a flow from %s to %s does not leave the overlay here but at node %s, as line %d of the topology says; ask there", o.Addr, to.addr, cmp.Or(x.peer(p.Peer), "?"), p.Line)
		}
	}
	return out, ok, err
}
