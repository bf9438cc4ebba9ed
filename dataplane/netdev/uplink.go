// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// Uplink is an interface to the underlay.
type Uplink struct {
	Name    string
	Missing bool // named in the topology and not there now; the rest is zero
	Index   int
	MTU     int
	MAC     plan.MAC // zero on a raw one
	Raw     bool     // its packets have no Ethernet header: WireGuard, tun, ppp
}

// Uplinks finds the interfaces to the underlay: those that the node names, else those with a
// default route of either family, else the one that holds the node's underlay address. Named ones come in the
// topology's order, others by index. None at all is no error.
func (h *Handle) Uplinks(p *plan.Plan) ([]Uplink, error) {
	links, err := h.host.links()
	if err != nil {
		return nil, err
	}
	if len(p.Uplinks) > 0 {
		return namedUplinks(links, p.Uplinks), nil
	}
	indexes, err := h.defaultRouteLinks()
	if err == nil && len(indexes) == 0 {
		indexes, err = h.holders(p.Underlay)
	}
	if err != nil {
		return nil, fmt.Errorf("find the uplinks: %w", err)
	}
	return foundUplinks(links, indexes), nil
}

func namedUplinks(links map[string]netlink.Link, names []string) []Uplink {
	ups := make([]Uplink, 0, len(names))
	for _, name := range names {
		l, ok := links[name]
		if !ok {
			ups = append(ups, Uplink{Name: name, Missing: true})
			continue
		}
		ups = append(ups, uplink(l))
	}
	return ups
}

func foundUplinks(links map[string]netlink.Link, indexes []int) []Uplink {
	var ups []Uplink
	for _, l := range links {
		if slices.Contains(indexes, l.Attrs().Index) && !loopback(l) {
			ups = append(ups, uplink(l))
		}
	}
	slices.SortFunc(ups, func(a, b Uplink) int { return cmp.Compare(a.Index, b.Index) })
	return ups
}

func uplink(l netlink.Link) Uplink {
	a := l.Attrs()
	return Uplink{Name: a.Name, Index: a.Index, MTU: a.MTU, MAC: macOf(l), Raw: raw(l)}
}

// defaultRouteLinks are the interfaces that a default route of somebody else's leaves by.
func (h *Handle) defaultRouteLinks() ([]int, error) {
	var indexes []int
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		main, err := h.host.mainRoutes(family)
		if err != nil {
			return nil, fmt.Errorf("list the routes: %w", err)
		}
		for _, r := range main {
			if dst, ok := prefix(r.Dst); ok && dst.Bits() == 0 && r.Type == unix.RTN_UNICAST && r.Protocol != protocol {
				indexes = append(indexes, paths(r)...)
			}
		}
	}
	return indexes, nil
}

func paths(r netlink.Route) []int {
	indexes := []int{r.LinkIndex}
	for _, p := range r.MultiPath {
		indexes = append(indexes, p.LinkIndex)
	}
	return indexes
}

// holders are the interfaces that have an address.
func (h *Handle) holders(addr netip.Addr) ([]int, error) {
	all, err := list(func() ([]netlink.Addr, error) { return h.host.AddrList(nil, netlink.FAMILY_V6) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var indexes []int
	for _, a := range all {
		if p, ok := prefix(a.IPNet); ok && p.Addr() == addr {
			indexes = append(indexes, a.LinkIndex)
		}
	}
	return indexes, nil
}
