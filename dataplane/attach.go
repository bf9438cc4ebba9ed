// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Interface is one network that a container asks for.
type Interface struct {
	Network string
	IPs     []netip.Addr   // at most one a family; empty: chosen here
	MAC     plan.MAC       // zero: derived from the address
	IfName  string         // inside the container; empty: "eth" and the place in the request
	Gateway bool           // the container's default route leads here; at most one does
	Device  string         // a device of the host in place of a veth made here: see AttachDevice
	Publish []plan.Publish // ports of this node that lead to the container's addresses in this network
}

// Request is what a container asks for.
type Request struct {
	Container  string // containerd namespace + "/" + container id
	Name       string
	Sticky     bool        // the addresses stay reserved for the name when the container is removed
	Netns      string      // path of the network namespace
	Interfaces []Interface // no network twice
}

// Port is how an interface of a container is wired.
type Port struct {
	plan.Port
	Ifindex int // of the host end
	MTU     int // largest IP packet
}

// place is where a container is wired: its id and the name of the interface in it.
type place struct{ container, ifName string }

func placeOf(a plan.Attachment) place { return place{a.Container, a.IfName} }

// wired is an interface of a container that is wired.
type wired struct {
	plan.Port
	ifindex int
	own     int // MTU of a device, which keeps it; 0: that of the network
	lease   *lease
}

// mtu is the largest IP packet of the interface, where the uplinks take so large ones.
func (c *wired) mtu(uplink int) int {
	if c.own != 0 {
		return c.own
	}
	return uplink - c.Overhead
}

func (c *wired) device(uplink int) maps.Device {
	return maps.Device{Index: uint32(c.ifindex), MTU: uint16(min(c.mtu(uplink), maxMTU))}
}

// order is one interface of a request, with all that is known of it before the kernel is touched.
type order struct {
	plan.Port
	netns string
	lease *lease
}

// Attach wires a container to its networks, or finds it wired as asked; a container that was wired before gets the same addresses
// again, and loses the networks that it does not ask for any more. The ports are in the order of the request. When it fails nothing new is left: what was
// wired before stays as it was, or goes as a whole.
func (d *Dataplane) Attach(ctx context.Context, r Request) ([]Port, error) {
	if strings.HasPrefix(r.Container, devicePrefix) {
		return nil, fmt.Errorf("attach container %s: ids that begin with %s are those of devices; use another containerd namespace", r.Container, devicePrefix)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.attach(ctx, r)
}

func (d *Dataplane) attach(ctx context.Context, r Request) ([]Port, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("attach %s: waited for others too long: %w", r.Container, err)
	}
	r, err := r.complete()
	if err != nil {
		return nil, err
	}
	orders, undo, err := d.orders(r)
	if err != nil {
		return nil, err
	}
	if err := d.checkPublished(orders); err != nil {
		undo()
		return nil, fmt.Errorf("attach %s: %w", whoIs(r.Container), err)
	}
	all, err := d.wireAll(ctx, r.Container, orders)
	if err != nil {
		undo()
		return nil, errors.Join(err, d.forgetGone())
	}
	ports := make([]Port, 0, len(all))
	for _, c := range all {
		c.lease.running = true
		d.ports[placeOf(c.Attachment)] = c
		d.remember(c.NetworkID, c.lease)
		d.log.Info("attached", "container", r.Container, "name", r.Name, "network", c.Network, "interface", c.IfName,
			"v4", addrText(c.V4), "v6", addrText(c.V6), "port", c.HostIf)
		ports = append(ports, d.port(c))
	}
	d.report(d.followPublished())
	return ports, nil
}

// orders finds addresses for all interfaces of a request, and what follows from them. undo gives the addresses back.
func (w *wiring) orders(r Request) (orders []order, undo func(), err error) {
	claims, err := w.claims(r)
	if err != nil {
		return nil, nil, err
	}
	leases, undo, err := w.leaseAll(claims)
	if err != nil {
		return nil, nil, err
	}
	for i, c := range claims {
		o, err := w.order(r, r.Interfaces[i], c, leases[i])
		if err != nil {
			undo()
			return nil, nil, fmt.Errorf("attach %s to network %s: %w", whoIs(r.Container), c.network.Name, err)
		}
		orders = append(orders, o)
	}
	return orders, undo, nil
}

// order is what an interface becomes with its addresses.
func (w *wiring) order(r Request, i Interface, c claim, l *lease) (order, error) {
	a := plan.Attachment{
		Container: r.Container, Name: r.Name, Network: c.network.Name, NetworkID: c.network.ID, IfName: i.IfName,
		V4: l.v4, V6: l.v6, MAC: i.MAC, Sticky: r.Sticky, Gateway: i.Gateway, Device: i.Device,
	}
	switch {
	case c.endpoint != nil:
		a.MAC = c.endpoint.MAC
	case a.MAC == plan.MAC{}:
		a.MAC = macOf(c.network, l)
	}
	if a.MAC == (plan.MAC{}) {
		return order{}, errors.New("no MAC address follows from its addresses: give one")
	}
	if err := w.checkMAC(c, a); err != nil {
		return order{}, err
	}
	port, err := plan.NewPort(w.topo, w.node, a)
	port.Publish = answerable(port, i.Publish)
	return order{Port: port, netns: r.Netns, lease: l}, err
}

// wireAll wires the interfaces one after the other. When one fails those that it has made before go.
func (d *Dataplane) wireAll(ctx context.Context, container string, orders []order) ([]*wired, error) {
	if err := d.leaveOther(container, orders); err != nil {
		return nil, fmt.Errorf("attach %s: take away what it does not ask for any more: %w", whoIs(container), err)
	}
	var all, fresh []*wired
	for _, o := range orders {
		c, isNew, err := d.wire(ctx, o)
		if err != nil {
			err = fmt.Errorf("attach %s to network %s: %w", whoIs(container), o.Network, err)
			for _, c := range fresh {
				err = errors.Join(err, d.unwire(c))
			}
			return nil, err
		}
		if all = append(all, c); isNew {
			fresh = append(fresh, c)
		}
	}
	return all, nil
}

// wire makes the port in the order that lets no packet pass too early: link, tables, program, and only
// then addresses and up. isNew: it was not wired like that before.
func (d *Dataplane) wire(ctx context.Context, o order) (c *wired, isNew bool, err error) {
	spec := netdev.PortSpec{Port: o.Port, Netns: o.netns, MTU: d.uplinkMTU - o.Overhead}
	link, err := d.link(spec)
	if err != nil {
		return nil, false, err
	}
	c = &wired{Port: o.Port, ifindex: link.Index, lease: o.lease}
	c.keepOwn(link.MTU)
	if err := d.replace(c); err != nil {
		return nil, false, errors.Join(err, d.unwire(c))
	}
	old := d.ports[placeOf(c.Attachment)]
	err = d.connect(ctx, c, spec)
	if err == nil && old != nil && !slices.Equal(old.Publish, c.Publish) {
		err = d.hooks.Maps().DecideAgain() // ports that lead elsewhere now
	}
	if err != nil && old == nil {
		err = errors.Join(err, d.unwire(c))
	}
	if err != nil {
		return nil, false, err
	}
	return c, old == nil, nil
}

// link makes the veth of a port, or takes the device that is to be it.
func (d *Dataplane) link(spec netdev.PortSpec) (netdev.Link, error) {
	if spec.Device == "" {
		return d.dev.CreatePort(spec)
	}
	link, err := d.dev.AdoptDevice(spec.Port, d.uplinks)
	if err != nil && d.ports[placeOf(spec.Attachment)] == nil {
		err = errors.Join(err, d.dev.ReleaseDevice(spec.Device))
	}
	return link, err
}

// unlink removes the veth of a port, or gives the device back.
func (d *Dataplane) unlink(a plan.Attachment) error {
	if a.Device == "" {
		return d.dev.DeletePort(a.HostIf())
	}
	return d.dev.ReleaseDevice(a.Device)
}

// leaveOther takes away what a container has and does not ask for any more, or asks for under another name: that goes first, as
// its MAC address may be the same.
func (d *Dataplane) leaveOther(container string, orders []order) error {
	asked, networks := map[place]topology.NetworkID{}, map[topology.NetworkID]bool{}
	for _, o := range orders {
		asked[placeOf(o.Attachment)], networks[o.NetworkID] = o.NetworkID, true
	}
	var errs []error
	for _, c := range d.of(container) {
		if id, ok := asked[placeOf(c.Attachment)]; ok && id == c.NetworkID {
			continue
		}
		errs = append(errs, d.unwire(c))
		if !networks[c.NetworkID] {
			d.release(c.NetworkID, c.lease)
		}
	}
	return errors.Join(errs...)
}

// replace forgets an earlier wiring of the container's interface that is not the same as c.
func (d *Dataplane) replace(c *wired) error {
	old := d.ports[placeOf(c.Attachment)]
	if old == nil || old.ifindex == c.ifindex && old.V4 == c.V4 && old.V6 == c.V6 && old.MAC == c.MAC {
		return nil
	}
	old.lease.running = false
	delete(d.ports, placeOf(c.Attachment))
	return d.forget(old)
}

func (d *Dataplane) connect(ctx context.Context, c *wired, spec netdev.PortSpec) error {
	for _, k := range addressesOf(c) {
		d.purge(k) // of whoever had the address before
	}
	if err := d.hooks.Maps().PutPort(c.Port, c.device(d.uplinkMTU)); err != nil {
		return err
	}
	if err := d.hooks.Attach(c.ifindex, programOf(c.Type)); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("it took too long: %w", err)
	}
	if c.Device != "" {
		return nil // what is behind it has the addresses
	}
	_, err := d.dev.ConfigurePort(spec)
	return err
}

// programOf is the program at ports of networks of a type.
func programOf(t topology.NetworkType) hook.Program {
	if t == topology.L2 {
		return hook.PodL2
	}
	return hook.PodL3
}

func (d *Dataplane) port(c *wired) Port {
	return Port{Port: c.Port, Ifindex: c.ifindex, MTU: c.mtu(d.uplinkMTU)}
}

// whoIs names a container or a device in errors.
func whoIs(container string) string {
	if device, ok := strings.CutPrefix(container, devicePrefix); ok {
		return "device " + device
	}
	return "container " + container
}

func addrs(all ...netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range all {
		if a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}
