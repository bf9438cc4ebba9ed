// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Link is a port as it stands after a call. A device that was given by name has no other end that Lace knows.
type Link struct {
	Name      string // host end
	Index     int
	MAC       plan.MAC // of the host end
	PeerIndex int      // of the container's end, in its namespace
	PeerMAC   plan.MAC
	MTU       int
	Changes   []Change // what the call did: empty when all was as it should be
}

// Port is a port that was found.
type Port struct {
	Attachment plan.Attachment
	HostIf     string
	Index      int
	PeerIndex  int
	Bridge     int // index of its bridge; 0: none, the network is not there any more
	Up         bool
	MTU        int
	MAC        plan.MAC // of the host end
}

// CreatePort makes the veth pair, the container's end straight in the container's namespace, and
// puts the host end on the bridge. Both ends are down until ConfigurePort, so that programs and map entries can come
// first. A port that is as it should be is not touched; one whose container's end is in another namespace, after a
// restart of the container, is made anew. When it fails, nothing that it made is left.
func (h *Handle) CreatePort(s PortSpec) (Link, error) {
	return h.onPort(&s, "create", (*port).create)
}

// ConfigurePort gives a port that CreatePort made its addresses and routes and sets both ends up.
// When it fails, the port stays for DeletePort to remove.
func (h *Handle) ConfigurePort(s PortSpec) (Link, error) {
	return h.onPort(&s, "configure", (*port).configure)
}

// port is one run of CreatePort or ConfigurePort.
type port struct {
	*Handle
	rec    *recorder
	s      *PortSpec
	inside *conn // to the container's namespace
}

func (h *Handle) onPort(s *PortSpec, what string, step func(*port) (Link, error)) (Link, error) {
	l, err := h.stepOnPort(s, step)
	if err != nil {
		return l, fmt.Errorf("%s the interface of container %s in network %s: %w", what, s.Container, s.Network, err)
	}
	return l, nil
}

func (h *Handle) stepOnPort(s *PortSpec, step func(*port) (Link, error)) (Link, error) {
	if err := s.check(); err != nil {
		return Link{}, err
	}
	inside, err := h.enter(s.Netns)
	if err != nil {
		return Link{}, err
	}
	defer inside.close()
	h.mu.Lock()
	defer h.mu.Unlock()
	return step(&port{h, h.recorder(), s, inside})
}

// enter connects to a container's namespace.
func (h *Handle) enter(path string) (*conn, error) {
	ns, err := openNetns(path)
	if err != nil {
		return nil, err
	}
	if ns.Equal(h.host.ns) {
		ns.Close()
		return nil, fmt.Errorf("network namespace %s is the host's own: a container on the host's network cannot join another", path)
	}
	c, err := dial(ns)
	if err != nil {
		ns.Close()
	}
	return c, err
}

func (p *port) create() (Link, error) {
	bridge, err := p.bridge(p.s.Bridge)
	if err != nil {
		return Link{}, err
	}
	host, err := p.present()
	if err != nil {
		return Link{}, err
	}
	made := host == nil
	if made {
		if host, err = p.make(); err != nil {
			return Link{}, err
		}
	}
	if err := p.hostEnd(host, bridge); err != nil {
		if made {
			err = errors.Join(err, p.host.removeLink(host))
		}
		return Link{}, err
	}
	return p.result()
}

// bridge is a network's bridge, which Apply has made.
func (h *Handle) bridge(name string) (netlink.Link, error) {
	l, err := h.host.link(name)
	if err != nil {
		return nil, err
	}
	if l == nil {
		return nil, fmt.Errorf("bridge %s is missing: apply the plan first", name)
	}
	if !owned(l) {
		return nil, foreign(l)
	}
	return l, nil
}

// present finds the host end as it is now, nil where there is none. One that belongs to another
// namespace than the container's is removed, and one that a crash left half made.
func (p *port) present() (netlink.Link, error) {
	l, err := p.host.link(p.s.HostIf)
	if l == nil || err != nil {
		return nil, err
	}
	if err := p.mine(l); err != nil {
		return nil, err
	}
	if !halfMade(l) {
		peer, err := p.peer(l)
		if err != nil || peer != nil {
			return l, err
		}
	}
	return nil, p.rec.do("veth "+p.s.HostIf, "remove, it is not in the container's namespace", func() error { return p.host.removeLink(l) })
}

// mine refuses an interface with the port's name that is not the port.
func (p *port) mine(l netlink.Link) error {
	if !owned(l) {
		return foreign(l)
	}
	if halfMade(l) {
		return nil
	}
	lb, err := decodeAlias(l.Attrs().Alias)
	if err != nil {
		return fmt.Errorf("interface %s: %w", l.Attrs().Name, err)
	}
	return lb.belongs(p.s.Attachment)
}

// belongs refuses an interface that another attachment has.
func (lb *label) belongs(a plan.Attachment) error {
	if lb.Container != a.Container || lb.IfName != a.IfName || lb.Device != a.Device {
		return fmt.Errorf("interface %s belongs to container %s (%s)", a.HostIf(), lb.Container, lb.IfName)
	}
	return nil
}

// peer finds the container's end of a host end, nil where it is not in the container's namespace
// or no longer under its name.
func (p *port) peer(host netlink.Link) (netlink.Link, error) {
	id, err := p.host.GetNetNsIdByFd(int(p.inside.ns))
	if err != nil {
		return nil, fmt.Errorf("ask for the id of network namespace %s: %w", p.s.Netns, err)
	}
	if id < 0 || host.Attrs().NetNsID != id {
		return nil, nil
	}
	l, err := p.inside.link(p.s.IfName)
	if l == nil || err != nil {
		return nil, err
	}
	if l.Type() != "veth" || l.Attrs().Index != host.Attrs().ParentIndex || l.Attrs().ParentIndex != host.Attrs().Index {
		return nil, nil
	}
	return l, nil
}

// make makes the pair, marked with our group, and the alias straight after.
func (p *port) make() (netlink.Link, error) {
	taken, err := p.inside.link(p.s.IfName)
	if err != nil {
		return nil, err
	}
	if taken != nil {
		return nil, &ForeignError{
			Object: fmt.Sprintf("interface %s in the container", p.s.IfName),
			Why:    "a " + taken.Type() + " of another network",
			Fix:    "start the container without one (nerdctl run --net none), or ask for another name",
		}
	}
	at := attrs(p.s.HostIf)
	at.MTU, at.Group = p.s.MTU, group
	veth := &netlink.Veth{
		LinkAttrs: at, PeerName: p.s.IfName, PeerHardwareAddr: p.s.MAC[:],
		PeerNamespace: netlink.NsFd(p.inside.ns),
	}
	if err := p.rec.do("veth "+p.s.HostIf, "create", func() error { return p.host.LinkAdd(veth) }); err != nil {
		return nil, err
	}
	return p.host.LinkByName(p.s.HostIf)
}

// hostEnd makes the host end right, its mark first.
func (p *port) hostEnd(l netlink.Link, bridge netlink.Link) error {
	alias, err := encodeAlias(label{Attachment: p.s.Attachment})
	if err != nil {
		return err
	}
	d, err := p.host.read(p.rec, l)
	if err != nil {
		return err
	}
	if err := each(
		func() error { return d.alias(alias) },
		d.noIPv6,
		d.noLinkLocal,
		func() error { return d.mtu(p.s.MTU) },
	); err != nil {
		return err
	}
	return d.join(bridge, p.s.MAC)
}

// join puts a port into its bridge, which is told who is there and learns nothing.
func (d *device) join(bridge netlink.Link, mac plan.MAC) error {
	err := d.master(bridge)
	if err != nil {
		return err
	}
	if d.detail, err = d.conn.detail(d.Attrs().Index); err != nil { // now as a port of the bridge
		return fmt.Errorf("read interface %s: %w", d.Attrs().Name, err)
	}
	return each(d.portSettings, func() error { return d.forwardMAC(mac) })
}

// ends reads both ends again.
func (p *port) ends() (host, peer netlink.Link, err error) {
	if host, err = p.host.link(p.s.HostIf); err != nil {
		return nil, nil, err
	}
	if host == nil {
		return nil, nil, fmt.Errorf("interface %s is gone: the container ended, or it was never created", p.s.HostIf)
	}
	if err = p.mine(host); err != nil {
		return nil, nil, err
	}
	if peer, err = p.peer(host); err != nil {
		return nil, nil, err
	}
	if peer == nil {
		return nil, nil, fmt.Errorf("the other end of %s is not %s in %s: create the port again", p.s.HostIf, p.s.IfName, p.s.Netns)
	}
	return host, peer, nil
}

func (p *port) result() (Link, error) {
	host, peer, err := p.ends()
	if err != nil {
		return Link{}, err
	}
	return Link{
		Name: p.s.HostIf, Index: host.Attrs().Index, MAC: macOf(host), MTU: host.Attrs().MTU,
		PeerIndex: peer.Attrs().Index, PeerMAC: macOf(peer), Changes: p.rec.changes,
	}, nil
}

// configure gives the container's end its addresses while it is down, and sets it up last.
func (p *port) configure() (Link, error) {
	host, peer, err := p.ends()
	if err != nil {
		return Link{}, err
	}
	out, err := p.host.read(p.rec, host)
	if err != nil {
		return Link{}, err
	}
	in, err := p.inside.read(p.rec, peer)
	if err != nil {
		return Link{}, err
	}
	if err := each(
		p.loopbackUp,
		func() error { return in.mtu(p.s.MTU) },
		func() error { return in.mac(p.s.MAC) },
		func() error { return p.containerIPv6(in) },
		func() error { return in.addresses(p.s.Prefixes) },
		out.up,
		in.up,
		func() error { return p.containerRoutes(peer.Attrs().Index) },
	); err != nil {
		return Link{}, err
	}
	return p.result()
}

func (p *port) loopbackUp() error {
	lo, err := p.inside.link("lo")
	if lo == nil || err != nil {
		return err
	}
	d, err := p.inside.read(p.rec, lo)
	if err != nil {
		return err
	}
	return d.up()
}

// containerIPv6 leaves the container no address but its own, and no router but the gateway. On an Ethernet segment neighbours
// talk by link-local addresses, so that it has one there.
func (p *port) containerIPv6(in *device) error {
	switch {
	case !p.s.V6.IsValid():
		return each(in.noRouterAdvertisements, in.noLinkLocal)
	case p.s.Type == topology.L2:
		return each(in.withIPv6, in.noRouterAdvertisements, in.noDuplicateDetection, in.linkLocal)
	}
	return each(in.withIPv6, in.noRouterAdvertisements, in.noLinkLocal)
}

// containerRoutes lead what the plan says to the gateway, and leave the container's other interfaces alone.
func (p *port) containerRoutes(dev int) error {
	want := p.s.routes(dev)
	return each(
		func() error { return p.inside.syncRoutes(p.rec, netlink.FAMILY_V4, dev, want) },
		func() error { return p.inside.syncRoutes(p.rec, netlink.FAMILY_V6, dev, want) },
	)
}

// isPort reports the host end of a port: a veth that we made, or a device that was given by name.
func isPort(l netlink.Link) bool {
	_, given := adopted(l)
	return given || roleOf(l.Attrs().Name) == rolePort && owned(l)
}

// Ports finds our ports, sorted by host interface: those we made, and devices that were given by name. One whose alias this agent cannot read is
// logged and left out: it is not ours to change.
func (h *Handle) Ports() ([]Port, error) {
	links, err := h.host.links()
	if err != nil {
		return nil, err
	}
	var ports []Port
	for name, l := range links {
		if !strings.HasPrefix(l.Attrs().Alias, portAlias) || roleOf(name) == rolePort && !owned(l) {
			continue
		}
		lb, err := decodeAlias(l.Attrs().Alias)
		if err == nil && lb.HostIf() != name {
			err = fmt.Errorf("the alias belongs to interface %s", lb.HostIf())
		}
		if err != nil {
			h.log.Warn("an interface with a port's alias is left alone", "interface", name, "err", err)
			continue
		}
		ports = append(ports, found(lb.Attachment, l.Attrs()))
	}
	slices.SortFunc(ports, func(a, b Port) int { return cmp.Compare(a.HostIf, b.HostIf) })
	return ports, nil
}

func found(a plan.Attachment, l *netlink.LinkAttrs) Port {
	p := Port{
		Attachment: a, HostIf: l.Name, Index: l.Index, PeerIndex: l.ParentIndex,
		Bridge: l.MasterIndex, Up: l.RawFlags&unix.IFF_UP != 0, MTU: l.MTU,
	}
	copy(p.MAC[:], l.HardwareAddr)
	return p
}

// DeletePort removes a port that CreatePort made, and with its host end the container's. One that is gone is fine.
func (h *Handle) DeletePort(hostIf string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if roleOf(hostIf) != rolePort {
		return fmt.Errorf("delete port %q: that is no name of a port", hostIf)
	}
	l, err := h.host.link(hostIf)
	if l == nil || err != nil {
		return err
	}
	if !owned(l) {
		return foreign(l)
	}
	if err := h.host.removeLink(l); err != nil {
		return fmt.Errorf("delete port %s: %w", hostIf, err)
	}
	h.log.Debug("changed", "object", "veth "+hostIf, "what", "remove")
	return nil
}
