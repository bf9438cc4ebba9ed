// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// Outlook is how the host saw the outside at one time, as far as a plan asks: its links, its addresses, and the ways out that are not
// Lace's. A router has very many routes: they are read once for all that is asked.
type Outlook struct {
	plan      *plan.Plan
	node      netip.Addr           // the node's own IPv4 address; invalid: it has none
	stack     netlink.Link         // lc-host; nil: it is not there
	peer      netlink.Link         // lc-host-peer; nil with stack
	links     map[int]netlink.Link // by index
	addresses []localAddress       // sorted by link; those of one link oldest first
	ways      map[int]bool         // links that a unicast route leaves by, of any table
	defaults  []defaultRoute       // the main table's first, then by table and metric
}

// localAddress is an address of the host.
type localAddress struct {
	netip.Prefix
	index int // of its link
	scope int
	flags int // IFA_F_*
}

type defaultRoute struct {
	route
	links []int
}

// Outlook reads what the host is now.
func (h *Handle) Outlook(p *plan.Plan) (*Outlook, error) {
	links, err := h.host.links()
	if err != nil {
		return nil, err
	}
	o := &Outlook{plan: p, links: make(map[int]netlink.Link, len(links))}
	if o.stack, o.peer, err = h.host.pair(plan.HostSide, plan.HostPeer); err != nil {
		return nil, err
	}
	for l := range maps.Values(links) {
		o.links[l.Attrs().Index] = l
	}
	if o.addresses, err = h.host.localAddresses(); err != nil {
		return nil, err
	}
	if err := h.host.waysOut(o); err != nil {
		return nil, fmt.Errorf("list the routes: %w", err)
	}
	uplinks, err := h.Uplinks(p)
	if err != nil {
		return nil, err
	}
	o.node = o.nodeV4(uplinks)
	return o, nil
}

// localAddresses lists the addresses of all links. The kernel has an IPv4 link's oldest first, and an IPv6 link's newest.
func (c *conn) localAddresses() ([]localAddress, error) {
	var all []localAddress
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rows, err := list(func() ([]netlink.Addr, error) { return c.AddrList(nil, family) })
		if err != nil {
			return nil, fmt.Errorf("list addresses: %w", err)
		}
		if family == netlink.FAMILY_V6 {
			slices.Reverse(rows)
		}
		for _, a := range rows {
			if p, ok := prefix(a.IPNet); ok {
				all = append(all, localAddress{p, a.LinkIndex, a.Scope, a.Flags})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b localAddress) int { return cmp.Compare(a.index, b.index) })
	return all, nil
}

// waysOut reads the routes of all tables, of which a router has very many: it keeps no more than it needs.
func (c *conn) waysOut(o *Outlook) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		_, err := list(func() ([]struct{}, error) {
			return nil, c.RouteListFilteredIter(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE, o.way)
		})
		if err != nil {
			return err
		}
	}
	slices.SortStableFunc(o.defaults, func(a, b defaultRoute) int {
		return cmp.Or(cmp.Compare(tableOrder(a), tableOrder(b)), cmp.Compare(a.metric, b.metric))
	})
	return nil
}

func tableOrder(r defaultRoute) int {
	if r.table == unix.RT_TABLE_MAIN {
		return 0
	}
	return r.table
}

// way takes one route in; of the same one twice, where the table is read again, the second changes nothing. What leads to link-local
// addresses, which every link with IPv6 has, leads nowhere outside.
func (o *Outlook) way(r netlink.Route) bool {
	dst, ok := prefix(r.Dst)
	if !ok || r.Type != unix.RTN_UNICAST || r.Protocol == protocol || dst.Addr().IsMulticast() || dst.Addr().Is6() && dst.Addr().IsLinkLocalUnicast() {
		return true
	}
	if o.ways == nil {
		o.ways = map[int]bool{}
	}
	for _, index := range paths(r) {
		o.ways[index] = true
	}
	if dst.Bits() == 0 {
		o.defaults = append(o.defaults, defaultRoute{fromNetlink(r), paths(r)})
	}
	return true
}

// ready tells an address that the host has from one that it is still asking about, or that it was refused.
func (a localAddress) ready() bool { return a.flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 }

// outside reports an address that others may send to.
func (a localAddress) outside() bool {
	return a.ready() && a.scope == unix.RT_SCOPE_UNIVERSE && a.Addr().IsGlobalUnicast()
}

// rank says how good an address is as the source of packets to the outside, by a gateway. Deprecated, temporary and secondary ones are a last
// resort; IPv4 goes as the kernel does by the gateway's subnet, and a unique local IPv6 address (RFC 4193) is not answered from everywhere.
func (a localAddress) rank(gateway netip.Addr) (rank int) {
	if a.flags&(unix.IFA_F_DEPRECATED|unix.IFA_F_SECONDARY) == 0 {
		rank += 4
	}
	if gateway.IsValid() && a.Contains(gateway) {
		rank += 2
	}
	if a.Addr().Is4() || !a.Addr().IsPrivate() {
		rank++
	}
	return rank
}

// source is the address of a link as which packets leave by it: what a default route by it prefers, else the best of its own, else of
// the VRF that it is in. Invalid: it has none.
func (o *Outlook) source(index int, is func(netip.Addr) bool) netip.Addr {
	var gateway netip.Addr
	for _, r := range o.defaults {
		if !is(r.dst.Addr()) || !slices.Contains(r.links, index) {
			continue
		}
		if r.src.IsValid() {
			return r.src
		}
		gateway = cmp.Or(gateway, r.gw)
	}
	if a := o.best(index, gateway, is); a.IsValid() {
		return a
	}
	if vrf := o.vrfOf(index); vrf != 0 {
		return o.best(vrf, gateway, is)
	}
	return netip.Addr{}
}

func (o *Outlook) best(index int, gateway netip.Addr, is func(netip.Addr) bool) (best netip.Addr) {
	rank := -1
	for _, a := range o.addresses {
		if a.index == index && is(a.Addr()) && a.outside() && a.rank(gateway) > rank {
			best, rank = a.Addr(), a.rank(gateway)
		}
	}
	return best
}

// vrfOf is the index of the VRF that a link is in, 0 of none.
func (o *Outlook) vrfOf(index int) int {
	l := o.links[index]
	if l == nil {
		return 0
	}
	master := o.links[l.Attrs().MasterIndex]
	if master == nil || master.Type() != "vrf" {
		return 0
	}
	return master.Attrs().Index
}

// lace reports a link that is Lace's own, or that was lent to it.
func lace(l netlink.Link) bool {
	_, lent := adopted(l)
	return lent || owned(l)
}

// nodeV4 is the node's own IPv4 address: of the host's own tables, which those of its VRFs are not.
func (o *Outlook) nodeV4(uplinks []Uplink) netip.Addr {
	var candidates []int
	for _, r := range o.defaults {
		if r.table == unix.RT_TABLE_MAIN && r.dst.Addr().Is4() {
			candidates = append(candidates, r.links...)
		}
	}
	for _, u := range uplinks {
		candidates = append(candidates, u.Index)
	}
	for _, index := range append(candidates, slices.Sorted(maps.Keys(o.links))...) {
		l := o.links[index]
		if l == nil || lace(l) || o.vrfOf(index) != 0 || l.Type() == "vrf" {
			continue
		}
		if a := o.source(index, netip.Addr.Is4); a.IsValid() {
			return a
		}
	}
	return netip.Addr{}
}

// nodeV6 is the underlay address where the host's own tables have it now.
func (o *Outlook) nodeV6() netip.Addr {
	for _, a := range o.addresses {
		if a.Addr() == o.plan.Underlay && a.ready() && o.vrfOf(a.index) == 0 {
			return o.plan.Underlay
		}
	}
	return netip.Addr{}
}
