// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Applied says what Apply did.
type Applied struct {
	Generation uint32        // that the programs go by now
	Changed    bool          // the topology is another one than before
	Took       time.Duration // from the call to the end
}

// Apply brings a topology into force while packets pass: links and routes of what is new are made first, then the tables
// become those of the new topology in one step, and what is gone is removed at last. A container whose network left, or whose
// addresses are in the node's block no more, stays wired and gets no traffic; its addresses stay its own, so that it goes
// on when a later topology has them again. On an error the topology before stays in force as a whole.
func (d *Dataplane) Apply(ctx context.Context, t *topology.Topology) (Applied, error) {
	began := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return Applied{}, fmt.Errorf("apply the topology: waited for others too long: %w", err)
	}
	next, err := d.draft(t)
	if err != nil {
		return Applied{}, fmt.Errorf("apply the topology: %w (the one before stays in force)", err)
	}
	done, err := d.bring(ctx, next)
	if err != nil {
		d.report(d.sync()) // takes back what was prepared
		return Applied{}, fmt.Errorf("apply the topology: %w (the one before stays in force)", err)
	}
	done.Took = time.Since(began)
	d.log.Info("topology applied", "hash", t.Hash, "generation", done.Generation, "changed", done.Changed, "took", done.Took)
	return done, nil
}

// draft is a topology with all that follows from it on this node.
type draft struct {
	wiring
	uplinkState
	plan *plan.Plan
}

// draft finds out what a topology makes of this node. Nothing changes.
func (d *Dataplane) draft(t *topology.Topology) (*draft, error) {
	if _, err := plan.Build(t, d.node, nil); err != nil {
		return nil, err
	}
	w, err := d.rewire(t)
	if err != nil {
		return nil, err
	}
	n := &draft{wiring: w}
	if n.plan, err = w.build(); err != nil {
		return nil, err
	}
	n.uplinkState, err = d.readUplinks(n.plan)
	return n, err
}

// bring makes a draft what holds.
func (d *Dataplane) bring(ctx context.Context, n *draft) (Applied, error) {
	if _, err := d.dev.Prepare(n.plan, netdev.Options{VRF: d.vrf, MTU: n.uplinkMTU}); err != nil {
		return Applied{}, err
	}
	if err := d.enter(n); err != nil {
		return Applied{}, err
	}
	resized, err := d.resizeFlows(n.plan.Conntrack.Max)
	if err != nil {
		return Applied{}, err
	}
	hops, err := d.nexthops(n.plan)
	if err != nil {
		return Applied{}, err
	}
	devices, err := d.devices(n.wiring, n.uplinkMTU)
	if err != nil {
		return Applied{}, err
	}
	if err := ctx.Err(); err != nil {
		return Applied{}, fmt.Errorf("it took too long: %w", err)
	}
	synced, err := d.hooks.Maps().Sync(n.plan, d.vrf, devices, hops)
	if err != nil && !synced.Switched {
		return Applied{}, err
	}
	changed := synced.Switched || resized || n.topo.Hash != d.topo.Hash
	d.report(errors.Join(err, d.settle(n)))
	return Applied{Generation: synced.Generation, Changed: changed}, nil
}

// enter puts programs where a draft wants them, and tells them what the host is to it. What is in use now stays so.
func (d *Dataplane) enter(n *draft) error {
	host, err := d.readHost(n.plan)
	if err != nil {
		return err
	}
	host = host.and(d.host)
	sites, err := d.sites(n.wiring, n.uplinks, host)
	if err != nil {
		return err
	}
	attached, _, err := d.attachTo(sites)
	return errors.Join(err, d.writeHost(host, attached))
}

// settle takes the draft over that holds now, and removes what only the topology before had. What fails is tried again by Run.
func (d *Dataplane) settle(n *draft) error {
	d.wiring, d.uplinkState, d.plan = n.wiring, n.uplinkState, n.plan
	d.vouch.Store(true)
	_, err := d.dev.Apply(d.plan, netdev.Options{VRF: d.vrf, MTU: d.uplinkMTU})
	return errors.Join(d.problem, d.beat(), err, d.attachAll())
}

// wiring is what a topology makes of the containers and devices on this node.
type wiring struct {
	topo   *topology.Topology
	node   string
	pools  map[topology.NetworkID]*pool // those of networks that left keep their leases
	ports  map[place]*wired
	strays []stray
}

// rewire gives the containers and leases that there are their places in a topology: their interfaces say who they are, and what
// is leased now stays so where it fits. What holds now is not changed.
func (d *Dataplane) rewire(t *topology.Topology) (wiring, error) {
	w := wiring{topo: t, node: d.node, pools: map[topology.NetworkID]*pool{}, ports: map[place]*wired{}}
	for id, p := range d.pools {
		if !p.empty() {
			w.pools[id] = p
		}
	}
	for _, n := range t.Networks {
		p := poolOf(n, d.node)
		p.inherit(d.pools[n.ID])
		w.pools[n.ID] = p
	}
	ports, err := d.dev.Ports()
	if err != nil {
		return wiring{}, err
	}
	were, err := d.types()
	if err != nil {
		return wiring{}, err
	}
	published, err := d.published()
	if err != nil {
		return wiring{}, err
	}
	for _, p := range ports {
		if err := w.adopt(p, were[p.Index], published(p)); err != nil {
			d.log.Warn("a container's network is not as the topology says; it gets no traffic until that changes, or it is started again",
				"container", p.Attachment.Container, "network", p.Attachment.Network, "interface", p.Attachment.IfName, "err", err)
			w.strays = append(w.strays, stray{p.Index, were[p.Index], plan.Port{Attachment: p.Attachment, Publish: published(p)}})
		}
	}
	return w, d.keepReservations(w)
}

// types are those of the networks that interfaces were wired for, as far as that is known: the tables tell, also those of an earlier agent.
func (d *Dataplane) types() (map[int]topology.NetworkType, error) {
	types, err := d.hooks.Maps().PortTypes()
	if err != nil {
		return nil, err
	}
	for _, s := range d.strays {
		types[s.ifindex] = s.network
	}
	for _, c := range d.ports {
		types[c.ifindex] = c.Type
	}
	return types, nil
}

// adopt takes over an interface that was wired before, for a network of the type were; 0: not known.
func (w *wiring) adopt(p netdev.Port, were topology.NetworkType, published []plan.Publish) error {
	a := p.Attachment
	n, ok := w.topo.Network(a.Network)
	switch {
	case !ok || n.ID != a.NetworkID:
		return fmt.Errorf("network %s with id %d is not in the topology", a.Network, a.NetworkID)
	case were != 0 && n.Type != were:
		return fmt.Errorf("network %s was of type %s, and is of type %s", n.Name, were, n.Type)
	}
	if other := w.in(a.Container, n.ID); other != nil {
		return fmt.Errorf("it has %s there already", other.HostIf)
	}
	r := Request{Container: a.Container, Name: a.Name, Sticky: a.Sticky, Interfaces: []Interface{
		{Network: a.Network, IPs: addrs(a.V4, a.V6), MAC: a.MAC, IfName: a.IfName, Gateway: a.Gateway, Device: a.Device, Publish: published},
	}}
	orders, _, err := w.orders(r)
	if err != nil {
		return err
	}
	c := &wired{Port: orders[0].Port, ifindex: p.Index, lease: orders[0].lease}
	if a.Device == "" {
		c.Attachment = a // what the container has, though the topology may give it more by now
	}
	c.keepOwn(p.MTU)
	c.lease.running = true
	w.ports[placeOf(a)] = c
	return nil
}

// build plans the node with all that is wired, and completes what is known of it.
func (w *wiring) build() (*plan.Plan, error) {
	attachments := make([]plan.Attachment, 0, len(w.ports))
	for _, c := range w.ports {
		attachments = append(attachments, c.Attachment)
	}
	p, err := plan.Build(w.topo, w.node, attachments)
	if err != nil {
		return nil, err
	}
	for i := range p.Ports {
		c := w.ports[placeOf(p.Ports[i].Attachment)]
		p.Ports[i].Publish = c.Publish
		c.Port = p.Ports[i]
	}
	return p, nil
}
