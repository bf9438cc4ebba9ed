// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Endpoints are those of an L2 network, sorted by name.
func (n *Network) Endpoints() []Endpoint { return n.endpoints }

// declares says whether an endpoint has an address of the family.
func (n *Network) declares(f Family) bool {
	return slices.ContainsFunc(n.endpoints, func(e Endpoint) bool { return e.Addr(f).IsValid() })
}

// Addr is the endpoint's address of a family, invalid where it has none.
func (e Endpoint) Addr(f Family) netip.Addr { return f.choose(e.V4, e.V6) }

func (e Endpoint) addrs() []netip.Addr {
	return slices.DeleteFunc([]netip.Addr{e.V4, e.V6}, func(a netip.Addr) bool { return !a.IsValid() })
}

func endpointKey(name string, key ...string) string { return tableKey("endpoint", name, key) }

// declarer makes endpoints of the [endpoint.NAME] tables.
type declarer struct {
	complaints
	macs  map[macPlace]Endpoint
	addrs map[addrPlace]Endpoint
}

type (
	macPlace struct {
		network string
		mac     MAC
	}
	addrPlace struct {
		network string
		addr    netip.Addr
	}
)

func (b *builder) endpoints(raw map[string]rawEndpoint) {
	if b.limit("endpoint", len(raw), MaxEndpoints, "endpoints"); len(raw) > MaxEndpoints {
		return
	}
	d := declarer{complaints: complaints{builder: b, of: "endpoint"}, macs: map[macPlace]Endpoint{}, addrs: map[addrPlace]Endpoint{}}
	for _, name := range sortedKeys(raw) {
		d.endpoint(name, raw[name])
	}
	d.distinct()
	d.tellRest()
	for _, e := range b.topology.Endpoints {
		b.byNetwork[e.Network].declare(e)
	}
}

func (n *Network) declare(e Endpoint) {
	n.endpoints = append(n.endpoints, e)
	n.hosting[e.Node] = true
	for _, a := range e.addrs() {
		n.byAddr[a] = e
	}
}

// endpoint takes over one that has a network and a node; else there is nothing more to say of it.
func (d *declarer) endpoint(name string, raw rawEndpoint) {
	if !isHostName(name) {
		d.complain(endpointKey(name), fmt.Sprintf("a name has letters, digits, hyphens and dots, at most %d", MaxNodeName), "%s is no name of an endpoint", shortQuote(name))
	}
	n := d.network(name, raw.Network)
	if n == nil || !d.node(name, raw.Node, n) {
		return
	}
	e := Endpoint{Name: name, Network: n.Name, Node: raw.Node, Line: d.lines.Of(endpointKey(name))}
	if d.addresses(&e, raw.Address, n) && d.mac(&e, raw.MAC, n) {
		d.topology.Endpoints = append(d.topology.Endpoints, e)
	}
}

// network is the L2 network of an endpoint, or nil.
func (d *declarer) network(endpoint, name string) *Network {
	key := endpointKey(endpoint, "network")
	n, known := d.byNetwork[name]
	switch {
	case !known && d.lines.Has(key):
		d.unknownName(key, "network", name, maps.Keys(d.byNetwork))
	case known && n.Type == External:
		d.complain(key, "name an L2 network", "%s is an external network", name)
	case known && n.Type == L3:
		d.complain(key, "name an L2 network: in an L3 network every address belongs to a node's block", "%s is an L3 network", name)
	case known && n.Type == L2:
		return n
	}
	return nil
}

func (d *declarer) node(endpoint, name string, n *Network) bool {
	key := endpointKey(endpoint, "node")
	node, known := d.byName[name]
	switch {
	case !known && d.lines.Has(key):
		d.unknownName(key, "node", name, maps.Keys(d.byName))
	case known && node.Kind == KindRouter && node.Network != n.Name:
		d.complain(key, "name a host, or a router of "+n.Name, "%s is a router of network %s", name, shortQuote(node.Network))
	case known:
		return true
	}
	return false
}

// addresses takes over those of an endpoint, and says whether all are right.
func (d *declarer) addresses(e *Endpoint, raw []hostAddr, n *Network) bool {
	ok := true
	for i, a := range raw {
		ok = a.IsValid() && d.address(e, indexKey(endpointKey(e.Name, "address"), i), a.Addr, n) && ok
	}
	return ok
}

func (d *declarer) address(e *Endpoint, key string, a netip.Addr, n *Network) bool {
	f := familyOfAddr(a)
	why, reserved := n.Reserved(a)
	owner, pooled := n.blockOwner(a)
	problem, fix, outside := n.outside(a)
	switch {
	case e.Addr(f).IsValid():
		d.complain(key, "leave one out", "%s is a second %s address; the first is %s", a, f, e.Addr(f))
	case outside:
		d.complain(key, fix, "%s", problem)
	case reserved:
		d.complain(key, "choose another", "%s is %s", a, why)
	case pooled:
		d.complain(key, "choose one outside of all pools, or name the pools in "+networkKey(n.Name, "pools"),
			"%s is in pool %s of %s, and endpoints live outside the pools", a, f.of(n.Block(owner)), owner)
	case f == V6:
		e.V6 = a
		return true
	default:
		e.V4 = a
		return true
	}
	return false
}

// mac takes over the MAC of an endpoint or derives it from its address, and says whether it is right.
func (d *declarer) mac(e *Endpoint, given *MAC, n *Network) bool {
	key, derived := endpointKey(e.Name, "mac"), n.DerivedMAC(e.V4, e.V6)
	switch {
	case given != nil:
		e.MAC = *given
		return d.macGiven(e, key, derived, n)
	case d.lines.Has(key): // and did not parse
		return false
	case derived == (MAC{}):
		d.complain(key, "add an Ethernet address, as 52:54:00:00:00:01", "is missing: no MAC follows from %s", n.derivesFrom(e))
		return false
	}
	e.MAC = derived
	return true
}

// derivesFrom is why an endpoint has no MAC of its own.
func (n *Network) derivesFrom(e *Endpoint) string {
	switch {
	case len(n.subnets(V4)) > 0:
		return "an endpoint without an IPv4 address"
	case !e.V6.IsValid():
		return "an endpoint without an address"
	case !n.base6.IsValid():
		return e.V6.String() + ", as the network has no pools"
	}
	return fmt.Sprintf("%s, which is not in %s as the pools are", e.V6, n.base6)
}

func (d *declarer) macGiven(e *Endpoint, key string, derived MAC, n *Network) bool {
	switch {
	case e.MAC == MAC{}:
		d.complain(key, "choose another", "%s is nobody's", e.MAC)
	case e.MAC[0]&1 != 0:
		d.complain(key, "choose one whose first byte is even", "%s is a group's", e.MAC)
	case e.MAC == GatewayMAC:
		d.complain(key, "choose another", "%s is the gateway's in every network", e.MAC)
	case e.MAC.Derived() && e.MAC != derived:
		d.complain(key, "leave it out, or choose one that does not start with 02:4c", "%s %s", e.MAC, n.standsFor(e.MAC))
	default:
		return true
	}
	return false
}

// standsFor says why a MAC of the derived form can be nobody else's.
func (n *Network) standsFor(m MAC) string {
	a, ok := n.AddressOf(m)
	if !ok {
		return "is of the form that holds an address"
	}
	return fmt.Sprintf("stands for the address %s, which this is not", a)
}

// distinct refuses MACs and addresses that one network has twice; of two that clash the later one is at fault.
func (d *declarer) distinct() {
	inOrder := slices.SortedStableFunc(slices.Values(d.topology.Endpoints), func(x, y Endpoint) int { return cmp.Compare(x.Line, y.Line) })
	for _, e := range inOrder {
		if d.sameAddress(e) {
			continue // a derived MAC would be the same too
		}
		at := macPlace{e.Network, e.MAC}
		if other, taken := d.macs[at]; taken {
			d.twice(endpointKey(e.Name, "mac"), e.MAC, other)
		}
		d.macs[at] = e
	}
}

func (d *declarer) sameAddress(e Endpoint) bool {
	same := false
	for _, a := range e.addrs() {
		at := addrPlace{e.Network, a}
		if other, taken := d.addrs[at]; taken {
			d.twice(endpointKey(e.Name, "address"), a, other)
			same = true
		}
		d.addrs[at] = e
	}
	return same
}

func (d *declarer) twice(key string, what fmt.Stringer, other Endpoint) {
	d.complain(key, "choose another", "%s is that of %s (%s) too", what, other.Name, d.at(endpointKey(other.Name)))
}

func (e Endpoint) canonical(w *strings.Builder) {
	fmt.Fprintf(w, "\n[%s]\nnetwork = %q\nnode = %q\nmac = %q\n", endpointKey(e.Name), e.Network, e.Node, e.MAC)
	if addrs := e.addrs(); len(addrs) > 0 {
		fmt.Fprintf(w, "address = %s\n", quoted(addrs))
	}
}
