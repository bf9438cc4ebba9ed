// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// stray is an interface of ours without traffic: that of a container whose network is not as it was, or one that a crash left.
type stray struct {
	ifindex int
	network topology.NetworkType // as it was when the interface was wired; 0: not known
	port    plan.Port            // as far as it is known: who it is, and what it publishes
}

// of are the interfaces of a container, by name.
func (w *wiring) of(container string) []*wired {
	var all []*wired
	for at, c := range w.ports {
		if at.container == container {
			all = append(all, c)
		}
	}
	slices.SortFunc(all, func(a, b *wired) int { return cmp.Compare(a.IfName, b.IfName) })
	return all
}

// in is the interface that a container has in a network, nil where it has none.
func (w *wiring) in(container string, network topology.NetworkID) *wired {
	for at, c := range w.ports {
		if at.container == container && c.NetworkID == network {
			return c
		}
	}
	return nil
}

// Attached returns how a container is wired, interface by interface in the order of their names. One whose network has left the
// topology is not among them.
func (d *Dataplane) Attached(id string) ([]Port, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ports []Port
	for _, c := range d.of(id) {
		ports = append(ports, d.port(c))
	}
	return ports, len(ports) > 0
}

// Detach takes a container's wiring away. Its addresses stay its own until Release.
func (d *Dataplane) Detach(_ context.Context, id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, c := range d.of(id) {
		d.log.Info("detached", "container", id, "network", c.Network, "interface", c.IfName)
		errs = append(errs, d.unwire(c))
	}
	return errors.Join(errs...)
}

// forget takes a port out of the tables and off its program. Its flows are decided again at once, and removed in a while.
func (d *Dataplane) forget(c *wired) error {
	m := d.hooks.Maps()
	err := errors.Join(m.DeletePort(c.Port, uint32(c.ifindex)), m.DecideAgain(), d.hooks.Detach(c.ifindex))
	d.collector.leave(addressesOf(c)...)
	if len(c.Publish) > 0 {
		err = errors.Join(err, d.followPublished())
	}
	return err
}

// unwire takes everything of a port away. It goes on past failures, so that a container can always die.
func (d *Dataplane) unwire(c *wired) error {
	c.lease.running = false
	delete(d.ports, placeOf(c.Attachment))
	return errors.Join(d.forget(c), d.unlink(c.Attachment))
}

// forgetGone forgets the interfaces that went with their container's network namespace, and devices that are gone, and looks which
// ports no container has.
func (d *Dataplane) forgetGone() error {
	ports, err := d.dev.Ports()
	if err != nil {
		return err
	}
	there := map[place]netdev.Port{}
	for _, p := range ports {
		there[placeOf(p.Attachment)] = p
	}
	var errs []error
	for at, c := range d.ports {
		if p, ok := there[at]; ok && p.Index == c.ifindex {
			c.keepOwn(p.MTU)
			continue
		}
		d.log.Info("a container's interface is gone", "container", at.container, "network", c.Network, "interface", at.ifName)
		c.lease.running = false
		delete(d.ports, at)
		errs = append(errs, d.forget(c))
		if c.Device != "" {
			d.release(c.NetworkID, c.lease)
		}
	}
	d.strays = d.straysAmong(ports)
	return errors.Join(errs...)
}

// keepOwn follows the MTU of a device, which is not Lace's to set.
func (c *wired) keepOwn(mtu int) {
	if c.Device != "" {
		c.own = mtu
	}
}

// straysAmong are the ports that no container has. What is known of them stays known.
func (w *wiring) straysAmong(ports []netdev.Port) []stray {
	var strays []stray
	for _, p := range ports {
		if c := w.ports[placeOf(p.Attachment)]; c != nil && c.ifindex == p.Index {
			continue
		}
		s := stray{ifindex: p.Index, port: plan.Port{Attachment: p.Attachment}}
		if i := slices.IndexFunc(w.strays, func(s stray) bool { return s.ifindex == p.Index }); i >= 0 {
			s = w.strays[i]
		}
		strays = append(strays, s)
	}
	return strays
}

// Retain detaches and releases every container that is not in live. Devices stay.
func (d *Dataplane) Retain(_ context.Context, live []string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	keep := map[string]bool{}
	for _, id := range live {
		keep[id] = true
	}
	gone := func(id string) bool { return id != "" && !keep[id] && !strings.HasPrefix(id, devicePrefix) }
	var errs []error
	for at := range d.ports {
		if gone(at.container) {
			d.log.Info("container is gone", "container", at.container)
			errs = append(errs, d.releaseContainer(at.container))
		}
	}
	for network, p := range d.pools {
		for l := range p.all() {
			if gone(l.container) {
				d.release(network, l)
			}
		}
	}
	errs = append(errs, d.dropStrays(gone))
	return errors.Join(errs...)
}

// dropStrays removes ports of ours that no container of the plan has: of those that are gone, or a second one in
// a network, which a crash left.
func (d *Dataplane) dropStrays(gone func(string) bool) error {
	ports, err := d.dev.Ports()
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range ports {
		a := p.Attachment
		if d.ports[placeOf(a)] == nil && (gone(a.Container) || d.in(a.Container, a.NetworkID) != nil) {
			errs = append(errs, d.hooks.Detach(p.Index), d.unlink(p.Attachment))
		}
	}
	return errors.Join(errs...)
}
