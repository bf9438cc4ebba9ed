// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strconv"
	"time"

	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// names gives the numbers of the programs the names that people use: containers as the veths' aliases have them, nodes
// and networks as the topology file of the settings does. It is best effort. What has no name keeps its number, as does
// everything that the file names where the agent works with another one.
type names struct {
	dev       *netdev.Handle
	node      string // this one
	file      string // of the topology
	locator   topology.Locator
	networks  map[uint32]string
	externals []plan.External
	peers     []plan.Peer
	endpoints map[stationKey]string      // of other nodes
	ports     map[uint32]plan.Attachment // by the index of their host end
	places    map[place]plan.Attachment
	links     map[uint32]string
	looked    time.Time
}

// stationKey is a MAC address in an L2 network.
type stationKey struct {
	network topology.NetworkID
	mac     plan.MAC
}

// place is where a container is in the overlay.
type place struct {
	network uint32
	addr    netip.Addr
}

func newNames(e *env, s conf.Settings) (*names, error) {
	node, err := nodeName(e, s.Node)
	if err != nil {
		return nil, err
	}
	dev, err := netdev.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	n := &names{dev: dev, node: node, file: s.Topology}
	if err := n.look(); err != nil {
		dev.Close()
		return nil, err
	}
	return n, nil
}

func (n *names) close() { n.dev.Close() }

// lookEvery bounds how often a number that nobody knows makes us look.
const lookEvery = time.Second

// lookFor looks again where something is not known, once in a while.
func (n *names) lookFor(known bool) {
	if !known && n.dev != nil && time.Since(n.looked) > lookEvery {
		_ = n.look() // the number is told all the same
	}
}

func (n *names) look() error {
	n.looked = time.Now()
	ports, err := n.dev.Ports()
	if err != nil {
		return err
	}
	links, err := n.dev.LinkNames()
	if err != nil {
		return err
	}
	n.links = links
	n.readTopology()
	n.addPorts(ports)
	return nil
}

// readTopology goes on without what a broken file would tell.
func (n *names) readTopology() {
	n.networks, n.endpoints = outerNames(), map[stationKey]string{}
	t, err := topology.Load(n.file)
	if err != nil {
		return
	}
	n.networks = networkNames(t)
	p, err := plan.Build(t, n.node, nil)
	if err != nil {
		return
	}
	n.peers, n.locator, n.externals = p.Peers, p.Locator, p.Externals
	for _, s := range p.Stations {
		n.endpoints[stationKey{s.Network, s.MAC}] = s.Name
	}
}

// networkNames are those of a topology by id.
func networkNames(t *topology.Topology) map[uint32]string {
	names := outerNames()
	for _, n := range t.Networks {
		names[uint32(n.ID)] = n.Name
	}
	return names
}

func (n *names) addPorts(ports []netdev.Port) {
	n.ports, n.places = map[uint32]plan.Attachment{}, map[place]plan.Attachment{}
	for _, p := range ports {
		a := p.Attachment
		n.ports[uint32(p.Index)] = a
		for _, addr := range []netip.Addr{a.V4, a.V6} {
			if addr.IsValid() {
				n.places[place{uint32(a.NetworkID), addr}] = a
			}
		}
		if n.networks[uint32(a.NetworkID)] == "" {
			n.networks[uint32(a.NetworkID)] = a.Network
		}
	}
}

// network is a network's name, its number where it has none, and nothing where that is not known either.
func (n *names) network(id uint32) string {
	name := n.networks[id]
	if name == "" && id != 0 {
		return strconv.FormatUint(uint64(id), 10)
	}
	return name
}

// peer is the name of another node. at lies in its locator, where that is known: then the name is right even if the
// file has been changed since the agent numbered the nodes.
func (n *names) peer(index uint32, at netip.Addr) string {
	if index == 0 {
		return ""
	}
	if name := n.nodeAt(at); name != "" {
		return name
	}
	for _, p := range n.peers {
		if p.Index == index {
			return p.Name
		}
	}
	return fmt.Sprintf("node#%d", index)
}

// nodeAt is the name of the other node whose locator has an address; "" where there is none.
func (n *names) nodeAt(at netip.Addr) string {
	for _, p := range n.peers {
		if at.IsValid() && p.Locator.IsValid() && p.Locator.Contains(at) {
			return p.Name
		}
	}
	return ""
}

// isOwn says whether a SID is one of this node's.
func (n *names) isOwn(sid netip.Addr) bool { return n.locator.IsValid() && n.locator.Contains(sid) }

// link is the name of an interface, or its number.
func (n *names) link(index uint32) string {
	if name := n.links[index]; name != "" {
		return name
	}
	return fmt.Sprintf("#%d", index)
}

// rule is a line of a topology file as an editor takes it: "topology.toml:12".
func rule(file string, line uint32) string { return fmt.Sprintf("%s:%d", filepath.Base(file), line) }

// party is one end of a flow: a container of this node, another node, a host, or what is outside of the overlay.
type party struct {
	Container string // containerd namespace and id, where it is of this node
	Name      string
	Network   string
	Node      string // another one: that it is at, or that carries its packets
	Outer     bool   // it is no container: Network says what it is
}

// String is "web (backend)", as far as it is known; "" where nothing is. What is no container is "host", "internet", or that of another
// node: "host of edge-2", "internet by edge-2".
func (p party) String() string {
	if p.Outer {
		return p.outer()
	}
	who := p.Name
	if who == "" {
		who = shortID(p.Container)
	}
	if who == "" {
		who = p.Node
	}
	switch {
	case p.Network == "":
		return who
	case who == "":
		return "(" + p.Network + ")"
	}
	return who + " (" + p.Network + ")"
}

func (p party) outer() string {
	who, at := p.Network, " by "
	if who == hostsName {
		who, at = "host", " of "
	}
	if p.Node == "" {
		return who
	}
	return who + at + p.Node
}

// is says whether somebody means this container.
func (p party) is(container string) bool {
	return container != "" && (container == p.Name || container == p.Container)
}

// shortID cuts the id of a container as its clients do: "default/4f1c…" to twelve digits.
func shortID(container string) string {
	const digits = 12
	dir, id := filepath.Split(container)
	if len(id) > digits {
		id = id[:digits]
	}
	return dir + id
}

// of is the end that a container of this node is.
func (n *names) of(a plan.Attachment, network uint32) party {
	if network == 0 {
		network = uint32(a.NetworkID)
	}
	return party{Container: a.Container, Name: a.Name, Network: n.network(network), Outer: n.isOuter(network)}
}

// between says who sends and who is sent to, in a packet from a network to another one: each is the container of that
// interface, or the one that has the address.
func (n *names) between(from, to uint32, in, out uint32, src, dst netip.Addr) (sender, receiver party) {
	from, to = n.classified(from, src), n.classified(to, dst)
	a, ok := n.ports[in]
	if !ok {
		a = n.places[place{from, src}]
	}
	b, ok := n.ports[out]
	if !ok {
		b = n.places[place{to, dst}]
	}
	return n.of(a, from), n.of(b, to)
}
