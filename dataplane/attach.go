// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Request is what a container asks for.
type Request struct {
	Container string // containerd namespace + "/" + container id
	Name      string
	Network   string
	IPs       []netip.Addr // at most one a family; empty: chosen here
	MAC       plan.MAC     // zero: chosen here
	Sticky    bool         // the addresses stay reserved for the name when the container is removed
	Netns     string       // path of the network namespace
	IfName    string       // inside the container; empty: "eth0"
}

// Port is how a container is wired.
type Port struct {
	plan.Port
	Ifindex int // of the host end
	MTU     int
}

// Attach wires a container, or finds it wired as asked; a container that was wired before gets the same addresses again.
// When it fails nothing new is left: what was wired before stays as it was, or goes as a whole.
func (d *Dataplane) Attach(ctx context.Context, r Request) (Port, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return Port{}, fmt.Errorf("attach %s: waited for others too long: %w", r.Container, err)
	}
	n, err := d.network(r.Network)
	if err != nil {
		return Port{}, err
	}
	l, undo, err := d.lease(n, r)
	if err != nil {
		return Port{}, err
	}
	c, err := d.wire(ctx, n, l, r)
	if err != nil {
		undo()
		return Port{}, errors.Join(fmt.Errorf("attach container %s to network %s: %w", r.Container, n.Name, err), d.forgetGone())
	}
	l.running = true
	d.containers[r.Container] = c
	d.remember(n.ID, l)
	d.log.Info("attached", "container", r.Container, "name", r.Name, "network", n.Name, "v4", addrText(c.V4), "v6", addrText(c.V6), "port", c.HostIf)
	return d.port(c), nil
}

// maxStickyName is how many bytes of a name the table of reservations holds.
const maxStickyName = 63

func (w *wiring) lease(n *topology.Network, r Request) (*lease, func(), error) {
	switch b := n.Block(w.node); {
	case r.Container == "":
		return nil, nil, errors.New("a container without an id cannot be attached")
	case !b.V4.IsValid() && !b.V6.IsValid():
		return nil, nil, fmt.Errorf("network %s has no block on node %s", n.Name, w.node)
	case r.Sticky && len(r.Name) > maxStickyName:
		return nil, nil, fmt.Errorf("name %q has %d bytes: addresses can be kept for a name of at most %d", r.Name, len(r.Name), maxStickyName)
	}
	l, undo, err := w.pools[n.ID].lease(r.Container, r.Name, r.IPs, r.Sticky)
	if err != nil {
		return nil, nil, fmt.Errorf("network %s: %w", n.Name, err)
	}
	return l, undo, nil
}

// wire makes the port in the order that lets no packet pass too early: link, tables, program, and only
// then addresses and up.
func (d *Dataplane) wire(ctx context.Context, n *topology.Network, l *lease, r Request) (*container, error) {
	port, err := plan.NewPort(d.topo, d.node, d.attachment(n, l, r))
	if err != nil {
		return nil, err
	}
	if err := d.checkMAC(port); err != nil {
		return nil, err
	}
	if err := d.leaveOther(port); err != nil {
		return nil, err
	}
	spec := netdev.PortSpec{Port: port, Netns: r.Netns, MTU: d.podMTU}
	link, err := d.dev.CreatePort(spec)
	if err != nil {
		return nil, err
	}
	c := &container{Port: port, ifindex: link.Index, lease: l}
	if err := d.replace(c); err != nil {
		return nil, errors.Join(err, d.unwire(c))
	}
	if err := d.connect(ctx, c, spec); err != nil {
		if d.containers[c.Container] != nil { // wired as asked before, and still so
			return nil, err
		}
		return nil, errors.Join(err, d.unwire(c))
	}
	return c, nil
}

// checkMAC refuses a MAC address that another container of the network has: the bridge could not tell them apart.
func (d *Dataplane) checkMAC(p plan.Port) error {
	for id, c := range d.containers {
		if id != p.Container && c.NetworkID == p.NetworkID && c.MAC == p.MAC {
			return fmt.Errorf("MAC address %s is taken by container %s: ask for another one, or none", p.MAC, id)
		}
	}
	return nil
}

// leaveOther takes away what the container had in another network or under another interface name: that goes first,
// as its MAC address may be the same.
func (d *Dataplane) leaveOther(p plan.Port) error {
	c := d.containers[p.Container]
	if c == nil || c.HostIf == p.HostIf && c.NetworkID == p.NetworkID {
		return nil
	}
	err := d.unwire(c)
	if c.NetworkID != p.NetworkID {
		d.release(c.NetworkID, c.lease)
	}
	return err
}

// replace forgets an earlier wiring of the container's interface that is not the same as c.
func (d *Dataplane) replace(c *container) error {
	old := d.containers[c.Container]
	if old == nil || old.ifindex == c.ifindex && old.V4 == c.V4 && old.V6 == c.V6 && old.MAC == c.MAC {
		return nil
	}
	old.lease.running = false
	delete(d.containers, c.Container)
	return d.forget(old)
}

func (d *Dataplane) connect(ctx context.Context, c *container, spec netdev.PortSpec) error {
	for _, k := range addressesOf(c) {
		d.purge(k) // of whoever had the address before
	}
	if err := d.hooks.Maps().PutPort(c.Port, deviceOf(c.ifindex, d.podMTU)); err != nil {
		return err
	}
	if err := d.hooks.Attach(c.ifindex, hook.PodL3); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("it took too long: %w", err)
	}
	_, err := d.dev.ConfigurePort(spec)
	return err
}

func (d *Dataplane) attachment(n *topology.Network, l *lease, r Request) plan.Attachment {
	a := plan.Attachment{
		Container: r.Container, Name: r.Name, Network: n.Name, NetworkID: n.ID, IfName: r.IfName,
		V4: l.v4, V6: l.v6, MAC: r.MAC, Sticky: r.Sticky,
	}
	if a.IfName == "" {
		a.IfName = "eth0"
	}
	if a.MAC == (plan.MAC{}) {
		a.MAC = macOf(l)
	}
	return a
}

// macOf derives a container's MAC from its address: 02:4c and the IPv4 address, or four bytes of a hash
// of the IPv6 address. The same address always has the same MAC, so neighbour entries stay right.
func macOf(l *lease) plan.MAC {
	m := plan.MAC{0x02, 0x4c}
	if l.v4.IsValid() {
		b := l.v4.As4()
		copy(m[2:], b[:])
		return m
	}
	b := l.v6.As16()
	sum := sha256.Sum256(b[:])
	copy(m[2:], sum[:4])
	return m
}

// forget takes a port out of the tables and off its program. Its flows are decided again at once, and removed in a while.
func (d *Dataplane) forget(c *container) error {
	m := d.hooks.Maps()
	err := errors.Join(m.DeletePort(c.Port, uint32(c.ifindex)), m.DecideAgain(), d.hooks.Detach(c.ifindex))
	d.collector.leave(c)
	return err
}

// unwire takes everything of a port away. It goes on past failures, so that a container can always die.
func (d *Dataplane) unwire(c *container) error {
	c.lease.running = false
	delete(d.containers, c.Container)
	return errors.Join(d.forget(c), d.dev.DeletePort(c.HostIf))
}

// forgetGone forgets the containers whose interface went with their network namespace, and looks which ports no container has.
func (d *Dataplane) forgetGone() error {
	ports, err := d.dev.Ports()
	if err != nil {
		return err
	}
	index := map[string]int{}
	d.strays = nil
	for _, p := range ports {
		index[p.HostIf] = p.Index
		if c := d.containers[p.Attachment.Container]; c == nil || c.HostIf != p.HostIf {
			d.strays = append(d.strays, p.Index)
		}
	}
	var errs []error
	for id, c := range d.containers {
		if index[c.HostIf] == c.ifindex {
			continue
		}
		d.log.Info("a container's interface is gone", "container", id, "network", c.Network)
		c.lease.running = false
		delete(d.containers, id)
		errs = append(errs, d.forget(c))
	}
	return errors.Join(errs...)
}

// Attached returns how a container is wired.
func (d *Dataplane) Attached(id string) (Port, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.containers[id]
	if c == nil {
		return Port{}, false
	}
	return d.port(c), true
}

func (d *Dataplane) port(c *container) Port {
	return Port{Port: c.Port, Ifindex: c.ifindex, MTU: d.podMTU}
}

// Detach takes a container's wiring away. Its addresses stay its own until Release.
func (d *Dataplane) Detach(_ context.Context, id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.containers[id]
	if c == nil {
		return nil
	}
	d.log.Info("detached", "container", id, "network", c.Network)
	return d.unwire(c)
}

// Reserve holds the addresses of a container that exists and does not run.
func (d *Dataplane) Reserve(_ context.Context, r Request) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n, err := d.network(r.Network)
	if err != nil {
		return err
	}
	l, _, err := d.lease(n, r)
	if err == nil {
		d.remember(n.ID, l)
	}
	return err
}

// Release gives the addresses of a removed container back; those of a sticky name stay reserved for it.
func (d *Dataplane) Release(_ context.Context, id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.releaseContainer(id)
}

func (d *Dataplane) releaseContainer(id string) error {
	var err error
	if c := d.containers[id]; c != nil {
		err = d.unwire(c)
	}
	for network, p := range d.pools {
		for l := range p.all() {
			if l.container == id {
				d.release(network, l)
			}
		}
	}
	return err
}

// release ends a lease, or keeps it for the name.
func (d *Dataplane) release(network topology.NetworkID, l *lease) {
	if l.sticky && l.name != "" {
		l.container = ""
		return
	}
	d.pools[network].drop(l)
	d.remember(network, l)
}

// remember writes the reservation of a sticky name where it outlives this agent, and removes that of a name
// which is sticky no longer.
func (d *Dataplane) remember(network topology.NetworkID, l *lease) {
	if l.name == "" {
		return
	}
	var err error
	switch {
	case l.sticky:
		err = d.kept.Put(maps.Reservation{Network: network, Name: l.name, V4: l.v4, V6: l.v6})
	case !d.pools[network].sticks(l.name):
		err = d.kept.Delete(network, l.name)
	}
	if err != nil {
		d.log.Warn("the next agent will not know whether a name keeps its addresses", "name", l.name, "sticky", l.sticky, "err", err)
	}
}

// keepReservations takes over the sticky names that an earlier agent kept; the containers that run are known already.
func (d *Dataplane) keepReservations(w wiring) error {
	all, err := d.kept.All()
	if err != nil {
		return err
	}
	for _, r := range all {
		p := w.pools[r.Network]
		if p == nil || p.sticks(r.Name) {
			continue
		}
		if _, _, err := p.lease("", r.Name, addrs(r.V4, r.V6), true); err != nil {
			d.log.Warn("a sticky reservation is void", "name", r.Name, "err", err)
		}
	}
	return nil
}

// Retain detaches and releases every container that is not in live.
func (d *Dataplane) Retain(_ context.Context, live []string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	keep := map[string]bool{}
	for _, id := range live {
		keep[id] = true
	}
	var errs []error
	for id := range d.containers {
		if !keep[id] {
			d.log.Info("container is gone", "container", id)
			errs = append(errs, d.releaseContainer(id))
		}
	}
	for network, p := range d.pools {
		for l := range p.all() {
			if l.container != "" && !keep[l.container] {
				d.release(network, l)
			}
		}
	}
	errs = append(errs, d.dropStrays(keep))
	return errors.Join(errs...)
}

// dropStrays removes ports of ours that no container of the plan has: of networks that left the topology, or a
// second one that a crash left.
func (d *Dataplane) dropStrays(keep map[string]bool) error {
	ports, err := d.dev.Ports()
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range ports {
		id := p.Attachment.Container
		c := d.containers[id]
		if c == nil && !keep[id] || c != nil && c.HostIf != p.HostIf {
			errs = append(errs, d.hooks.Detach(p.Index), d.dev.DeletePort(p.HostIf))
		}
	}
	return errors.Join(errs...)
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
