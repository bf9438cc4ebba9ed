// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"cmp"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/lace-net/lace/dataplane/plan"
)

// Egress is an interface by which packets may leave for the outside.
type Egress struct {
	Name  string
	Index int
	Raw   bool       // its packets have no Ethernet header
	V4    netip.Addr // as which packets are masqueraded that leave by it; invalid: there is none
	V6    netip.Addr
}

// Egresses finds the interfaces to the outside where the plan has external networks: those that are up and that a route of any table
// leaves by, but lo and Lace's own, by index. What they masquerade as is the source that a default route by them prefers, else an
// address of theirs, else the node's (see HostSide).
func (h *Handle) Egresses(p *plan.Plan) ([]Egress, error) {
	if len(p.Externals) == 0 {
		return nil, nil
	}
	o, err := h.outlook()
	if err != nil {
		return nil, err
	}
	nodeV4, err := h.nodeV4(p, o)
	if err != nil {
		return nil, err
	}
	nodeV6 := o.nodeV6(p)
	var egresses []Egress
	for _, index := range slices.Sorted(maps.Keys(o.ways)) {
		l := o.links[index]
		if l == nil || loopback(l) || lace(l) || l.Attrs().Flags&net.FlagUp == 0 {
			continue
		}
		egresses = append(egresses, Egress{
			Name: l.Attrs().Name, Index: index, Raw: raw(l),
			V4: cmp.Or(o.source(index, netip.Addr.Is4), nodeV4),
			V6: cmp.Or(o.source(index, netip.Addr.Is6), nodeV6),
		})
	}
	return egresses, nil
}

// Addresses are the addresses of this host, with the index of their interface, but those that only it itself or one link can use
// (loopback, link-local, multicast), those that it is still asking about, and those of Lace's own interfaces.
func (h *Handle) Addresses() (map[netip.Addr]int, error) {
	links, err := h.host.links()
	if err != nil {
		return nil, err
	}
	own := map[int]bool{}
	for l := range maps.Values(links) {
		own[l.Attrs().Index] = owned(l)
	}
	all, err := h.host.localAddresses()
	if err != nil {
		return nil, err
	}
	addresses := map[netip.Addr]int{}
	for _, a := range all {
		_, twice := addresses[a.Addr()]
		if twice || own[a.index] || !a.ready() || !a.Addr().IsGlobalUnicast() {
			continue
		}
		addresses[a.Addr()] = a.index
	}
	return addresses, nil
}
