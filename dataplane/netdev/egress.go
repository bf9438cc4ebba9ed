// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"cmp"
	"maps"
	"net"
	"net/netip"
	"slices"
)

// Egress is an interface by which packets may leave for the outside.
type Egress struct {
	Name  string
	Index int
	Raw   bool       // its packets have no Ethernet header
	V4    netip.Addr // as which packets are masqueraded that leave by it; invalid: there is none
	V6    netip.Addr
}

// Egresses are the interfaces to the outside where the plan has external networks: those that are up and that a route of any table
// leaves by, but lo and Lace's own, by index. What they masquerade as is the source that a default route by them prefers, else an
// address of theirs, else the node's (see HostSide).
func (o *Outlook) Egresses() []Egress {
	if len(o.plan.Externals) == 0 {
		return nil
	}
	nodeV6 := o.nodeV6()
	var egresses []Egress
	for _, index := range slices.Sorted(maps.Keys(o.ways)) {
		l := o.links[index]
		if l == nil || loopback(l) || lace(l) || l.Attrs().Flags&net.FlagUp == 0 {
			continue
		}
		egresses = append(egresses, Egress{
			Name: l.Attrs().Name, Index: index, Raw: raw(l),
			V4: cmp.Or(o.source(index, netip.Addr.Is4), o.node),
			V6: cmp.Or(o.source(index, netip.Addr.Is6), nodeV6),
		})
	}
	return egresses
}

// Addresses are the addresses of this host, with the index of their interface, but those that only it itself or one link can use
// (loopback, link-local, multicast), those that it is still asking about, and those of Lace's own interfaces.
func (o *Outlook) Addresses() map[netip.Addr]int {
	addresses := map[netip.Addr]int{}
	for _, a := range o.addresses {
		_, twice := addresses[a.Addr()]
		l := o.links[a.index]
		if twice || l != nil && owned(l) || !a.ready() || !a.Addr().IsGlobalUnicast() {
			continue
		}
		addresses[a.Addr()] = a.index
	}
	return addresses
}
