// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// maxPublished bounds the ports of this node that one container has.
const maxPublished = 256

// checkPublished refuses ports of this node that a container cannot have: those of another container or of a process of the host, and
// those that lead nowhere.
func (d *Dataplane) checkPublished(orders []order) error {
	var own []maps.Publication
	total := 0
	for _, o := range orders {
		if total += len(o.Publish); total > maxPublished {
			return fmt.Errorf("more than %d ports are to be published for one container: publish fewer", maxPublished)
		}
		if err := reachable(o.Port); err != nil {
			return err
		}
		all := maps.PublicationsOf(o.Port)
		for _, p := range all {
			if err := d.isFree(p, o.Container, own); err != nil {
				return fmt.Errorf("publish port %s: %w", p, err)
			}
			own = append(own, p)
		}
	}
	d.warnPublished(orders)
	return nil
}

// reachable says why a port of this node cannot lead to a container.
func reachable(p plan.Port) error {
	for _, v := range p.Publish {
		if err := publishable(p, v); err != nil {
			return fmt.Errorf("publish port %d of network %s: %w", v.Port, p.Network, err)
		}
	}
	return nil
}

func publishable(p plan.Port, v plan.Publish) error {
	switch a := v.Address; {
	case v.Port == 0 || v.To == 0:
		return errors.New("port 0 is none: write 1 to 65535")
	case v.Protocol != unix.IPPROTO_TCP && v.Protocol != unix.IPPROTO_UDP:
		return fmt.Errorf("protocol %d cannot be published: only TCP and UDP can", v.Protocol)
	case a.IsMulticast() || a.IsLinkLocalUnicast() || a.Is4In6():
		return fmt.Errorf("address %s is none that others can ask for a port: write one of this node's, or none", a)
	case !answers(p.V4, p.Gateway4) && !answers(p.V6, p.Gateway6):
		return errors.New("the network has no gateway, so its containers can answer nobody outside of it: declare one, or publish in another network")
	case a.Is4() && !answers(p.V4, p.Gateway4) || a.Is6() && !answers(p.V6, p.Gateway6):
		return fmt.Errorf("the container has no address there, of a family with a gateway, that address %s of this node could lead to", a)
	}
	return nil
}

// answers says whether a container can answer somebody outside of its network from an address.
func answers(own, gateway netip.Addr) bool { return own.IsValid() && gateway.IsValid() }

// answerable leaves the family out in which a container cannot answer, of ports that every address of the node is to have.
func answerable(p plan.Port, all []plan.Publish) []plan.Publish {
	v4, v6 := answers(p.V4, p.Gateway4), answers(p.V6, p.Gateway6)
	if v4 == v6 || !p.V4.IsValid() || !p.V6.IsValid() {
		return all
	}
	all = slices.Clone(all)
	for i := range all {
		switch {
		case all[i].Address.IsValid():
		case v4:
			all[i].Address = netip.IPv4Unspecified()
		default:
			all[i].Address = netip.IPv6Unspecified()
		}
	}
	return all
}

// isFree says who has a port of this node already. own are those that the container is to have.
func (d *Dataplane) isFree(p maps.Publication, container string, own []maps.Publication) error {
	if slices.ContainsFunc(own, p.Clashes) {
		return errors.New("the container asks for it twice: leave one out")
	}
	for _, c := range d.wired() {
		if !slices.ContainsFunc(maps.PublicationsOf(c), p.Clashes) {
			continue
		}
		if c.Container == container {
			return nil // it stays with it
		}
		return fmt.Errorf("%s has it on this node: choose another port, or another address of the node", named(c.Attachment))
	}
	return bindable(p)
}

// wired are all containers that are wired, those that get no traffic now among them.
func (w *wiring) wired() []plan.Port {
	var all []plan.Port
	for _, c := range w.ports {
		all = append(all, c.Port)
	}
	for _, s := range w.strays {
		all = append(all, s.port)
	}
	return all
}

// named is what people know a container by.
func named(a plan.Attachment) string {
	if a.Name == "" {
		return whoIs(a.Container)
	}
	return fmt.Sprintf("%s (%s)", whoIs(a.Container), a.Name)
}

// bindable says whether a process of the host has a port: it takes the address for a moment, and listens to nobody.
func bindable(p maps.Publication) error {
	fd, err := portSocket(p)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil // this host has no such addresses, so no process has them
	}
	if err != nil {
		return fmt.Errorf("look whether a process of this host has it: %w", err)
	}
	defer unix.Close(fd)
	err = unix.Bind(fd, sockaddr(p.At))
	if errors.Is(err, unix.EADDRINUSE) {
		return errors.New("a process of this host has it: choose another port, or stop that (ss -lntup shows it)")
	}
	if err != nil {
		return fmt.Errorf("look whether a process of this host has it: %w", os.NewSyscallError("bind", err))
	}
	return nil
}

// portSocket is one that meets whoever listens at the port, but no connection that is closed already, and that may have an address
// which the host does not have yet.
func portSocket(p maps.Publication) (int, error) {
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	level, free := unix.IPPROTO_IP, unix.IP_FREEBIND
	if p.At.Addr().Is6() {
		family, level, free = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND
	}
	if p.Protocol == unix.IPPROTO_UDP {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	err = unix.SetsockoptInt(fd, level, free, 1)
	if kind == unix.SOCK_STREAM {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	}
	if family == unix.AF_INET6 {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1))
	}
	if err != nil {
		return -1, errors.Join(os.NewSyscallError("setsockopt", err), unix.Close(fd))
	}
	return fd, nil
}

func sockaddr(at netip.AddrPort) unix.Sockaddr {
	if at.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
}

// warnPublished tells of ports that are published and lead nowhere as things are.
func (d *Dataplane) warnPublished(orders []order) {
	for _, o := range orders {
		if len(o.Publish) == 0 {
			continue
		}
		if !entered(d.topo, o.Network) {
			d.log.Warn("ports are published that nobody outside of the overlay may come in by: give the network host = true, or peer an external network with it",
				"container", o.Container, "name", o.Name, "network", o.Network)
		}
		for _, v := range o.Publish {
			_, has := d.host.addresses[v.Address]
			if v.Address.IsValid() && !has && !v.Address.IsUnspecified() && !v.Address.IsLoopback() {
				d.log.Warn("a port is published at an address that this node does not have", "container", o.Container, "name", o.Name, "address", v.Address, "port", v.Port)
			}
		}
	}
}

// entered says whether anybody outside of the overlay may open flows to a network.
func entered(t *topology.Topology, name string) bool {
	n, ok := t.Network(name)
	if ok && n.Host {
		return true
	}
	return slices.ContainsFunc(t.Peerings, func(p topology.Peering) bool {
		from, ok := t.Network(p.From)
		return ok && from.Type == topology.External && p.To == name
	})
}

// publishes says whether any container has ports of this node.
func (w *wiring) publishes() bool {
	for _, c := range w.ports {
		if len(c.Publish) > 0 {
			return true
		}
	}
	return false
}

// servesLoopback says whether the host may reach published ports by its own addresses.
func (w *wiring) servesLoopback(h hostState) bool { return h.side.Stack != 0 && w.publishes() }

// followPublished serves what the host sends to itself while a port is published, and only then.
func (d *Dataplane) followPublished() error {
	lo := d.host.side.Loopback
	if d.servesLoopback(d.host) {
		d.attached[lo] = true
		return errors.Join(d.hooks.Attach(lo, hook.Loopback), d.dev.Localhost(true))
	}
	if !d.attached[lo] {
		return nil
	}
	delete(d.attached, lo)
	return errors.Join(d.dev.Localhost(false), d.hooks.Detach(lo))
}

// published finds the ports of this node that an interface's container has: an interface does not say it itself. What is wired now is known,
// and the tables tell what an earlier agent published.
func (d *Dataplane) published() (func(netdev.Port) []plan.Publish, error) {
	publishers, err := d.hooks.Maps().Publishers()
	if err != nil {
		return nil, err
	}
	known := map[int][]plan.Publish{}
	for _, s := range d.strays {
		known[s.ifindex] = s.port.Publish
	}
	for _, c := range d.ports {
		known[c.ifindex] = c.Publish
	}
	return func(p netdev.Port) []plan.Publish {
		if all, ok := known[p.Index]; ok {
			return all
		}
		return publishers.Of(p.Attachment)
	}, nil
}
