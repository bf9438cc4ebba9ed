// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

const (
	// vrfDefaultMetric is the one that the kernel's documentation of VRFs gives the route which keeps
	// a look-up from going on to the next table.
	vrfDefaultMetric = 4278198272
	defaultMetric6   = 1024 // what the kernel gives an IPv6 route without one
)

// route is a route of ours, comparable with what the kernel holds.
type route struct {
	dst    netip.Prefix
	table  int
	kind   int // unix.RTN_UNICAST, unix.RTN_UNREACHABLE
	dev    int // of a unicast route
	gw     netip.Addr
	src    netip.Addr    // that the host has for packets of its own
	scope  netlink.Scope // IPv4
	metric int
}

func (r route) String() string {
	switch {
	case r.kind == unix.RTN_UNREACHABLE:
		return fmt.Sprintf("unreachable %s table %d", r.dst, r.table)
	case r.gw.IsValid():
		return fmt.Sprintf("%s via %s dev %d table %d", r.dst, r.gw, r.dev, r.table)
	case r.src.IsValid():
		return fmt.Sprintf("%s dev %d src %s table %d", r.dst, r.dev, r.src, r.table)
	}
	return fmt.Sprintf("%s dev %d table %d", r.dst, r.dev, r.table)
}

// same says whether two routes stand in each other's place.
func (r route) same(o route) bool {
	return r.dst == o.dst && r.table == o.table && r.metric == o.metric
}

func (r route) netlink() *netlink.Route {
	n := &netlink.Route{
		Dst: ipNet(r.dst), Table: r.table, Type: r.kind, LinkIndex: r.dev,
		Scope: r.scope, Priority: r.metric, Protocol: protocol,
	}
	if r.gw.IsValid() {
		n.Gw = r.gw.AsSlice()
		n.Flags = int(netlink.FLAG_ONLINK) // a route of ours to the gateway must not be asked whether it is there
	}
	if r.src.IsValid() {
		n.Src = r.src.AsSlice()
	}
	return n
}

// fromNetlink reads a route of the kernel. A multipath route becomes its first path that
// works; asked for one destination, the kernel puts the path that it would choose first.
func fromNetlink(n netlink.Route) route {
	r := route{table: n.Table, kind: n.Type, dev: n.LinkIndex, scope: n.Scope, metric: n.Priority}
	r.dst, _ = prefix(n.Dst)
	gw := n.Gw
	if path := livePath(n.MultiPath); path != nil {
		r.dev, gw = path.LinkIndex, path.Gw
	}
	if a, ok := netip.AddrFromSlice(gw); ok {
		r.gw = a.Unmap()
	}
	if a, ok := netip.AddrFromSlice(n.Src); ok {
		r.src = a.Unmap()
	}
	if r.kind != unix.RTN_UNICAST {
		r.dev = 0 // the kernel shows lo
	}
	return r
}

// livePath is the first path whose link has a carrier, else the first of all, nil of none.
func livePath(paths []*netlink.NexthopInfo) *netlink.NexthopInfo {
	for _, p := range paths {
		if p.Flags&(unix.RTNH_F_DEAD|unix.RTNH_F_LINKDOWN) == 0 {
			return p
		}
	}
	if len(paths) > 0 {
		return paths[0]
	}
	return nil
}

// anyDevice stands for all devices where a function takes the index of one.
const anyDevice = 0

// ownRoutes lists the routes with our protocol in all tables of one family, of one device or of any.
func (c *conn) ownRoutes(family, dev int) ([]netlink.Route, error) {
	all, err := list(func() ([]netlink.Route, error) {
		return c.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Protocol: protocol},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return nil, fmt.Errorf("list the routes of protocol %d: %w", protocol, err)
	}
	return slices.DeleteFunc(all, func(r netlink.Route) bool { return dev != anyDevice && fromNetlink(r).dev != dev }), nil
}

func (c *conn) mainRoutes(family int) ([]netlink.Route, error) {
	return list(func() ([]netlink.Route, error) {
		return c.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
}

// routes makes the routes of ours exactly those of the plan, or at least those.
func (a *applier) routes(p *plan.Plan) error {
	locators, err := a.locatorRoutes(p)
	hosts, hostErr := a.hostRoutes(p)
	around, ours, ruleErr := a.detours(p)
	copies, copyErr := a.detourRoutes(around)
	errs := []error{err, hostErr, ruleErr, copyErr}
	want := slices.Concat(locators, hosts, vrfDefaults(p, a.o.VRF), copies)
	sync := a.host.syncRoutes
	if a.keep {
		sync = a.host.setRoutes
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		errs = append(errs, sync(a.recorder, family, anyDevice, want))
	}
	if ruleErr == nil && (!a.keep || len(around) > 0) {
		errs = append(errs, a.syncDetours(around, ours))
	}
	return errors.Join(errs...)
}

// vrfDefaults end each VRF's table: what it does not hold is in no other table either.
func vrfDefaults(p *plan.Plan, inVRF bool) []route {
	if !inVRF {
		return nil
	}
	var rs []route
	for i := range p.Networks {
		for _, all := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			rs = append(rs, route{
				dst: netip.PrefixFrom(all, 0), table: int(p.Networks[i].Table),
				kind: unix.RTN_UNREACHABLE, metric: vrfDefaultMetric,
			})
		}
	}
	return rs
}

// locatorRoutes lead each peer's locator to its next hop, and what the programs leave of the own
// locator nowhere. A peer without a next hop gets none: Nexthops says why. A route of somebody else's for a
// locator is left as it is and is an error.
func (a *applier) locatorRoutes(p *plan.Plan) ([]route, error) {
	main, err := a.host.mainRoutes(netlink.FAMILY_V6)
	if err != nil {
		return nil, fmt.Errorf("list the IPv6 routes: %w", err)
	}
	locators := []netip.Prefix{p.Locator.Masked()}
	rs := []route{{dst: p.Locator.Masked(), table: unix.RT_TABLE_MAIN, kind: unix.RTN_UNREACHABLE, metric: defaultMetric6}}
	var errs []error
	for i := range p.Peers {
		dst := p.Peers[i].Locator.Masked()
		locators = append(locators, dst)
		hop, err := a.resolve(p, &p.Peers[i])
		var none *noRouteError
		if errors.As(err, &none) {
			a.Handle.log.Debug("no locator route", "peer", p.Peers[i].Name, "why", none)
			continue
		}
		errs = append(errs, err)
		if err == nil {
			rs = append(rs, route{dst: dst, table: unix.RT_TABLE_MAIN, kind: unix.RTN_UNICAST, dev: hop.dev.Attrs().Index, gw: hop.gateway, metric: defaultMetric6})
		}
	}
	rs, foreignErr := withoutForeign(rs, main, "locator", locators)
	return rs, errors.Join(append(errs, foreignErr)...)
}

// withoutForeign drops the routes to those prefixes, each a what, that somebody else has routed already.
func withoutForeign(rs []route, main []netlink.Route, what string, prefixes []netip.Prefix) ([]route, error) {
	var errs []error
	for _, m := range main {
		dst, _ := prefix(m.Dst)
		if m.Protocol == protocol || !slices.Contains(prefixes, dst) {
			continue
		}
		errs = append(errs, &ForeignError{
			Object: fmt.Sprintf("route to %s %s", what, dst),
			Why:    fmt.Sprintf("one of protocol %s (%s)", m.Protocol, fromNetlink(m)),
			Fix:    fmt.Sprintf("remove it (ip -%s route del %s) or take it out of what announces it", family(dst), dst),
		})
		rs = slices.DeleteFunc(rs, func(r route) bool { return r.dst == dst && r.table == unix.RT_TABLE_MAIN })
	}
	return rs, errors.Join(errs...)
}

// family is the option of ip that names a prefix's.
func family(p netip.Prefix) string {
	if p.Addr().Is4() {
		return "4"
	}
	return "6"
}

// syncRoutes makes the routes with our protocol, of one family and device, exactly those wanted.
func (c *conn) syncRoutes(rec *recorder, family, dev int, want []route) error {
	return errors.Join(c.dropRoutes(rec, family, dev, want), c.setRoutes(rec, family, dev, want))
}

// dropRoutes removes the routes with our protocol that are not wanted.
func (c *conn) dropRoutes(rec *recorder, family, dev int, want []route) error {
	have, err := c.ownRoutes(family, dev)
	if err != nil {
		return err
	}
	var errs []error
	for i := range have {
		h := fromNetlink(have[i])
		if slices.ContainsFunc(want, h.same) {
			continue
		}
		errs = append(errs, rec.do("route "+h.String(), "remove", func() error { return c.removeRoute(&have[i]) }))
	}
	return errors.Join(errs...)
}

// setRoutes makes the wanted routes of a family, and removes none.
func (c *conn) setRoutes(rec *recorder, family, dev int, want []route) error {
	have, err := c.ownRoutes(family, dev)
	if err != nil {
		return err
	}
	var errs []error
	for _, w := range want {
		if w.dst.Addr().Is4() != (family == netlink.FAMILY_V4) || slices.ContainsFunc(have, func(n netlink.Route) bool { return fromNetlink(n) == w }) {
			continue
		}
		set := c.addRoute
		if slices.ContainsFunc(have, func(n netlink.Route) bool { return fromNetlink(n).same(w) }) {
			set = func(r route) error { return c.RouteReplace(r.netlink()) }
		}
		errs = append(errs, rec.do("route "+w.String(), "set", func() error { return set(w) }))
	}
	return errors.Join(errs...)
}

// addRoute adds a route beside which the device has none of ours; it takes nobody else's place.
func (c *conn) addRoute(r route) error {
	err := c.RouteAdd(r.netlink())
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	family := netlink.FAMILY_V6
	if r.dst.Addr().Is4() {
		family = netlink.FAMILY_V4
	}
	ours, err := c.ownRoutes(family, anyDevice)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(ours, func(n netlink.Route) bool { return fromNetlink(n).same(r) }) {
		return errors.New("another interface of Lace's leads there already: the networks of one container must not overlap, and one of them alone can have the default route")
	}
	return &ForeignError{
		Object: fmt.Sprintf("route to %s in table %d", r.dst, r.table),
		Why:    fmt.Sprintf("of another protocol than Lace's %d", protocol),
		Fix:    "remove it, or take away the network that brought it",
	}
}

func (c *conn) removeRoute(r *netlink.Route) error {
	err := c.RouteDel(r)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// hop is how this node reaches a peer: the gateway is invalid on a device without an Ethernet
// header, where there is nobody to choose.
type hop struct {
	dev     netlink.Link
	gateway netip.Addr
	mtu     int // of the route, 0 where it has none
}

// noRouteError says why a peer cannot be reached now. It passes when routes or links change.
type noRouteError struct{ why string }

func (e *noRouteError) Error() string { return e.why }

func noRoute(format string, args ...any) error { return &noRouteError{fmt.Sprintf(format, args...)} }

// resolve finds the next hop to a peer: its underlay address where that is on-link, else the
// node's via, else the gateway of the kernel's own route.
func (h *Handle) resolve(p *plan.Plan, peer *plan.Peer) (hop, error) {
	r, err := h.routeTo(peer.Underlay)
	if err == nil && !r.gw.IsValid() {
		return h.hop(r, peer.Underlay)
	}
	if !p.Via.IsValid() {
		if err != nil {
			return hop{}, err
		}
		return h.hop(r, r.gw)
	}
	via, err := h.routeTo(p.Via)
	if err != nil {
		return hop{}, err
	}
	if via.gw.IsValid() {
		return hop{}, noRoute("via %s is not on-link here: the kernel reaches it through %s; name a router on a link of this node", p.Via, via.gw)
	}
	return h.hop(via, p.Via)
}

func (h *Handle) hop(r kernelRoute, gateway netip.Addr) (hop, error) {
	dev, err := h.host.LinkByIndex(r.dev)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return hop{}, noRoute("the interface of the route to %s (index %d) is gone", r.dst, r.dev)
	}
	if err != nil {
		return hop{}, fmt.Errorf("read the interface of the route to %s: %w", r.dst, err)
	}
	if raw(dev) {
		gateway = netip.Addr{}
	}
	return hop{dev, gateway, r.mtu}, nil
}

// kernelRoute is a route that is not ours.
type kernelRoute struct {
	route
	mtu int
}

// routeTo asks the kernel for its route to addr. A locator route of ours that covers the address
// is no answer: it was made from this very question.
func (h *Handle) routeTo(addr netip.Addr) (kernelRoute, error) {
	if !addr.IsValid() {
		return kernelRoute{}, noRoute("it has no underlay address, and this node no via")
	}
	rs, err := h.host.RouteGetWithOptions(addr.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if unreachable(err) || err == nil && len(rs) == 0 {
		return kernelRoute{}, noRoute("no route to %s (%v): bring the uplink up, or add a route", addr, err)
	}
	if err != nil {
		return kernelRoute{}, fmt.Errorf("ask the kernel for the route to %s: %w", addr, err)
	}
	if rs[0].Protocol == protocol {
		return h.routeBeside(addr)
	}
	return usable(addr, rs[0])
}

func usable(addr netip.Addr, n netlink.Route) (kernelRoute, error) {
	r := kernelRoute{fromNetlink(n), n.MTU}
	switch r.kind {
	case unix.RTN_UNICAST:
		return r, nil
	case unix.RTN_LOCAL:
		return r, noRoute("%s is an address of this host: run with the right --node, or correct the topology", addr)
	}
	return r, noRoute("the route to %s discards packets (type %d): remove it", addr, r.kind)
}

func unreachable(err error) bool {
	return slices.ContainsFunc([]error{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL, unix.ENODEV, unix.ESRCH},
		func(e error) bool { return errors.Is(err, e) })
}

// routeBeside finds the longest match of the main table among the routes that are not ours.
func (h *Handle) routeBeside(addr netip.Addr) (kernelRoute, error) {
	main, err := h.host.mainRoutes(netlink.FAMILY_V6)
	if err != nil {
		return kernelRoute{}, fmt.Errorf("list the IPv6 routes: %w", err)
	}
	var best *netlink.Route
	for i := range main {
		dst, ok := prefix(main[i].Dst)
		if main[i].Protocol == protocol || !ok || !dst.Contains(addr) {
			continue
		}
		if best == nil || longer(&main[i], best) {
			best = &main[i]
		}
	}
	if best == nil {
		return kernelRoute{}, noRoute("no route to %s but Lace's own: bring the uplink up, or add a route", addr)
	}
	return usable(addr, *best)
}

func longer(a, b *netlink.Route) bool {
	x, _ := a.Dst.Mask.Size()
	y, _ := b.Dst.Mask.Size()
	return x > y || x == y && a.Priority < b.Priority
}

// raw reports a device whose packets have no Ethernet header: WireGuard, tun, ppp.
func raw(l netlink.Link) bool { return l.Attrs().EncapType != "ether" && !loopback(l) }

func loopback(l netlink.Link) bool { return l.Attrs().Flags&net.FlagLoopback != 0 }
