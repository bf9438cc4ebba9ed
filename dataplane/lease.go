// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/topology"
)

// claim is who asks for which addresses of a network.
type claim struct {
	container, name string
	want            []netip.Addr // at most one a family
	sticky          bool
	network         *topology.Network
	endpoint        *topology.Endpoint // that a device is, where the topology declares it
}

const (
	maxStickyName = 63 // bytes of a name that the table of reservations holds
	maxInterfaces = 8  // of a container
)

// complete checks what a request says by itself, and names the interfaces.
func (r Request) complete() (Request, error) {
	switch {
	case r.Container == "":
		return r, errors.New("a container without an id cannot be attached")
	case len(r.Interfaces) == 0:
		return r, fmt.Errorf("%s asks for no network: name one", whoIs(r.Container))
	case len(r.Interfaces) > maxInterfaces:
		return r, fmt.Errorf("%s asks for %d networks: at most %d can be had", whoIs(r.Container), len(r.Interfaces), maxInterfaces)
	case r.Sticky && len(r.Name) > maxStickyName:
		return r, fmt.Errorf("name %q has %d bytes: addresses can be kept for a name of at most %d", r.Name, len(r.Name), maxStickyName)
	}
	r.Interfaces = slices.Clone(r.Interfaces)
	for i := range r.Interfaces {
		at := &r.Interfaces[i]
		if at.IfName == "" {
			at.IfName = fmt.Sprintf("eth%d", i)
		}
		for _, other := range r.Interfaces[:i] {
			if err := at.differs(other); err != nil {
				return r, fmt.Errorf("%s: %w", whoIs(r.Container), err)
			}
		}
	}
	return r, nil
}

// differs says what two interfaces of one container share that only one can have.
func (i Interface) differs(other Interface) error {
	switch {
	case i.Network == other.Network:
		return fmt.Errorf("network %s is asked for twice", i.Network)
	case i.IfName == other.IfName:
		return fmt.Errorf("networks %s and %s are both asked for as interface %s", other.Network, i.Network, i.IfName)
	case i.Gateway && other.Gateway:
		return fmt.Errorf("networks %s and %s are both asked for the default route: choose one", other.Network, i.Network)
	}
	return nil
}

// claims are what the interfaces of a request ask for.
func (w *wiring) claims(r Request) ([]claim, error) {
	claims := make([]claim, 0, len(r.Interfaces))
	for _, i := range r.Interfaces {
		n, err := w.network(i.Network)
		if err != nil {
			return nil, err
		}
		c := claim{container: r.Container, name: r.Name, want: i.IPs, sticky: r.Sticky, network: n}
		if i.Device != "" {
			if c.endpoint, err = w.deviceIn(n, r.Name, i); err != nil {
				return nil, err
			}
		}
		if err := apart(claims, n); err != nil {
			return nil, fmt.Errorf("attach %s: %w", whoIs(r.Container), err)
		}
		claims = append(claims, c)
	}
	return claims, nil
}

// apart refuses a network whose subnets overlap those of another one that is asked for with it: the container could not tell
// which of them an address is in.
func apart(claims []claim, n *topology.Network) error {
	for _, c := range claims {
		for _, have := range c.network.Subnets {
			for _, s := range n.Subnets {
				if s.Overlaps(have) {
					return fmt.Errorf("subnet %s of network %s overlaps %s of network %s: one container cannot be in both", s, n.Name, have, c.network.Name)
				}
			}
		}
	}
	return nil
}

// lease finds the addresses of a claim. undo makes the pool as it was before.
func (w *wiring) lease(c claim) (l *lease, undo func(), err error) {
	l, undo, err = w.pools[c.network.ID].lease(c)
	if err != nil {
		return nil, nil, fmt.Errorf("network %s: %w", c.network.Name, err)
	}
	return l, undo, nil
}

// leaseAll finds addresses for all claims, or for none.
func (w *wiring) leaseAll(claims []claim) (leases []*lease, undo func(), err error) {
	var undos []func()
	undo = func() {
		for _, u := range undos {
			u()
		}
	}
	for _, c := range claims {
		l, u, err := w.lease(c)
		if err != nil {
			undo()
			return nil, nil, err
		}
		leases, undos = append(leases, l), append(undos, u)
	}
	return leases, undo, nil
}

// Reserve holds the addresses of a container that exists and does not run, in all its networks or in none.
func (d *Dataplane) Reserve(_ context.Context, r Request) error {
	r, err := r.complete()
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	claims, err := d.claims(r)
	if err != nil {
		return err
	}
	leases, _, err := d.leaseAll(claims)
	if err != nil {
		return err
	}
	for i, l := range leases {
		d.remember(claims[i].network.ID, l)
	}
	return nil
}

// Release gives the addresses of a removed container back; those of a sticky name stay reserved for it.
func (d *Dataplane) Release(_ context.Context, id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.releaseContainer(id)
}

func (d *Dataplane) releaseContainer(id string) error {
	var errs []error
	for _, c := range d.of(id) {
		errs = append(errs, d.unwire(c))
	}
	for network, p := range d.pools {
		for l := range p.all() {
			if l.container == id {
				d.release(network, l)
			}
		}
	}
	return errors.Join(errs...)
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
		if _, _, err := p.lease(claim{name: r.Name, want: addrs(r.V4, r.V6), sticky: true}); err != nil {
			d.log.Warn("a sticky reservation is void", "name", r.Name, "err", err)
		}
	}
	return nil
}

func (w *wiring) network(name string) (*topology.Network, error) {
	n, ok := w.topo.Network(name)
	if ok && n.Type == topology.External {
		return nil, fmt.Errorf("network %s is external: what is in it is outside of the overlay; name a network of containers", name)
	}
	if ok {
		return n, nil
	}
	var names []string
	for _, n := range w.topo.Networks {
		if n.Type != topology.External {
			names = append(names, n.Name)
		}
	}
	slices.Sort(names)
	return nil, fmt.Errorf("network %q is not in the topology; there are: %s", name, strings.Join(names, ", "))
}
