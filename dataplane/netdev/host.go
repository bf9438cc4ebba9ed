// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/lace-net/lace/dataplane/plan"
)

// The MAC addresses of the pair are on no wire, so that they are the same on every node. They are fixed, as udev gives a link
// whose address the kernel chose another one a moment after it was made.
var (
	hostSideMAC = plan.MAC{0x02, 0x4c, 0, 0, 0, 2}
	hostPeerMAC = plan.MAC{0x02, 0x4c, 0, 0, 0, 3}
)

// HostSide is where the host's own stack meets the overlay, and who the host is there.
type HostSide struct {
	Stack    int      // index of lc-host, by which the host's stack gets packets of containers; 0: the plan needs none
	Peer     int      // index of lc-host-peer, where packets of the host come in; 0 with Stack
	Loopback int      // index of lo
	MAC      plan.MAC // of lc-host; zero with Stack
	V4       netip.Addr
	V6       netip.Addr
}

// HostSide is the pair between the host and the overlay, and the node's own addresses: V6 is the underlay address, V4 the source of
// the default route, else an address of an uplink, else of any interface that is not Lace's; invalid where there is none.
func (o *Outlook) HostSide() HostSide {
	s := HostSide{V4: o.node, V6: o.plan.Underlay}
	for index, l := range o.links {
		if loopback(l) {
			s.Loopback = index
		}
	}
	if o.stack != nil {
		s.Stack, s.Peer, s.MAC = o.stack.Attrs().Index, o.peer.Attrs().Index, macOf(o.stack)
	}
	return s
}

func needsHostPair(p *plan.Plan) bool { return len(p.HostRoutes) > 0 || len(p.Externals) > 0 }

// hostPair makes lc-host and lc-host-peer. Neither has an address, nor asks for anybody's: packets come and go by programs at the peer.
func (a *applier) hostPair(p *plan.Plan) error {
	alias := a.hostSideAlias()
	side, peer, err := a.pair(plan.HostSide, plan.HostPeer)
	if err != nil {
		return err
	}
	mtu := a.mtu(p.Encapsulation.Overhead())
	err = each(
		func() error { return side.hostEnd(alias, hostSideMAC, mtu) },
		func() error { return peer.hostEnd(hostAlias, hostPeerMAC, mtu) },
		peer.noIPv6, // it would only have a route for multicast
		side.meetsTheStack,
		peer.up,
		side.up,
	)
	if err == nil {
		a.stack = side.Link
		a.Handle.stack.Store(int64(side.Attrs().Index))
	}
	return err
}

// hostSideAlias keeps what lc-host's alias says of lo, also where lc-host is made anew.
func (a *applier) hostSideAlias() string {
	l := a.links[plan.HostSide]
	if l != nil && owned(l) && strings.HasPrefix(l.Attrs().Alias, hostAlias+" ") {
		return l.Attrs().Alias
	}
	return a.Handle.loopback.alias()
}

func (d *device) hostEnd(alias string, mac plan.MAC, mtu int) error {
	return each(
		func() error { return d.alias(alias) },
		func() error { return d.mtu(mtu) },
		func() error { return d.mac(mac) },
		d.noLinkLocal,
		d.noRouterAdvertisements,
		d.noARP,
	)
}

// meetsTheStack lets the programs ask for the host's route of a packet that came in by lc-host: bpf_fib_lookup refuses an interface that
// does not forward. It is a setting of this interface alone; whether the host forwards is not changed.
func (d *device) meetsTheStack() error {
	return each(
		func() error { return d.inet6(confDisableIPv6, "disable_ipv6", 0) },
		func() error { return d.inet4("forwarding", 1) },
		func() error { return d.inet6(confForwarding, "forwarding", 1) },
	)
}

// hostRoutes lead the host to the networks that it may talk with, out of lc-host, as the node itself. A route of somebody else's for
// a subnet is left as it is and is an error.
func (a *applier) hostRoutes(p *plan.Plan) ([]route, error) {
	if a.stack == nil || len(p.HostRoutes) == 0 {
		return nil, nil
	}
	o, err := a.Outlook(p)
	if err != nil {
		return nil, err
	}
	v6 := o.nodeV6()
	rs := make([]route, 0, len(p.HostRoutes))
	for _, dst := range p.HostRoutes {
		r := onLink(dst, a.stack.Attrs().Index)
		if r.src = o.node; dst.Addr().Is6() {
			r.src = v6
		}
		rs = append(rs, r)
	}
	main, err := a.mainRoutesOfAll()
	if err != nil {
		return nil, err
	}
	return withoutForeign(rs, main, "subnet", p.HostRoutes)
}

func (a *applier) mainRoutesOfAll() (all []netlink.Route, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		main, err := a.host.mainRoutes(family)
		if err != nil {
			return nil, fmt.Errorf("list the routes: %w", err)
		}
		all = append(all, main...)
	}
	return all, nil
}

// leaveHost gives lo back where the plan needs no lc-host any more, whose alias says what lo was like.
func (a *applier) leaveHost(p *plan.Plan) error {
	if needsHostPair(p) {
		return nil
	}
	return a.giveBackLoopback(a.recorder, a.links[plan.HostSide])
}
