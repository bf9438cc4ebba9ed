// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// devicePrefix begins the id of a device where a container has its own: "device/tap0".
const devicePrefix = "device/"

// DeviceRequest is a device of the host that is to join an L2 network: the tap of a virtual machine, or an end of a veth.
type DeviceRequest struct {
	Device  string // its name
	Network string
	Name    string       // of what is behind it; that of an endpoint which the topology declares, to be that
	IPs     []netip.Addr // at most one a family; empty: the endpoint's, else chosen here
	MAC     plan.MAC     // that frames out of it have; zero: the endpoint's, else derived from the address
}

// AttachDevice puts a device of the host into an L2 network, or finds it there. It is not given addresses: what is behind it has
// them. Where the topology declares an endpoint of that name, MAC or address at this node, it is that endpoint. It stays until
// DetachDevice, or until the device is gone.
func (d *Dataplane) AttachDevice(ctx context.Context, r DeviceRequest) (Port, error) {
	if r.Device == "" {
		return Port{}, errors.New("attach a device: it has no name")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	ports, err := d.attach(ctx, Request{Container: devicePrefix + r.Device, Name: r.Name, Interfaces: []Interface{
		{Network: r.Network, IPs: r.IPs, MAC: r.MAC, IfName: r.Device, Device: r.Device},
	}})
	if err != nil {
		return Port{}, err
	}
	return ports[0], nil
}

// DetachDevice takes a device out of its network, leaves it as it was found and gives its addresses back. One that is not attached is fine.
func (d *Dataplane) DetachDevice(_ context.Context, device string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	ports, err := d.dev.Ports()
	if err != nil {
		return err
	}
	errs := []error{d.releaseContainer(devicePrefix + device)}
	for _, p := range ports { // one whose network is not as the topology says
		if p.Attachment.Device == device && slices.ContainsFunc(d.strays, func(s stray) bool { return s.ifindex == p.Index }) {
			errs = append(errs, d.hooks.Detach(p.Index), d.unlink(p.Attachment))
		}
	}
	return errors.Join(errs...)
}

// deviceIn checks that a device can be in a network, and finds the endpoint that it is there.
func (w *wiring) deviceIn(n *topology.Network, name string, i Interface) (*topology.Endpoint, error) {
	if n.Type != topology.L2 {
		return nil, fmt.Errorf("attach device %s: network %s is routed (l3): devices of the host can join L2 networks only", i.Device, n.Name)
	}
	e, err := endpoint(n, name, i)
	if e == nil || err != nil {
		return nil, err
	}
	return e, w.is(e, i)
}

// endpoint finds the declared one that a device is, by its name, MAC or addresses; nil where it is none.
func endpoint(n *topology.Network, name string, i Interface) (*topology.Endpoint, error) {
	var found *topology.Endpoint
	for _, e := range n.Endpoints() {
		if e.Name != name && e.MAC != i.MAC && !slices.ContainsFunc(i.IPs, func(a netip.Addr) bool { return a == e.V4 || a == e.V6 }) {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("device %s could be endpoint %s or %s of the topology: name one of them, with its MAC and addresses or none", i.Device, found.Name, e.Name)
		}
		found = &e
	}
	return found, nil
}

// is says why a device is not the endpoint that it is taken for.
func (w *wiring) is(e *topology.Endpoint, i Interface) error {
	have := addrs(e.V4, e.V6)
	switch {
	case e.Node != w.node:
		return fmt.Errorf("endpoint %s is declared at node %s, not here (%s): attach it there, or change the topology (line %d)", e.Name, e.Node, w.node, e.Line)
	case i.MAC != plan.MAC{} && i.MAC != e.MAC:
		return fmt.Errorf("endpoint %s has MAC address %s in the topology (line %d), not %s: ask for that one, or none", e.Name, e.MAC, e.Line, i.MAC)
	case len(have) > 0 && slices.ContainsFunc(i.IPs, func(a netip.Addr) bool { return !slices.Contains(have, a) }):
		return fmt.Errorf("endpoint %s has the addresses %v in the topology (line %d), not %v: ask for those, or none", e.Name, have, e.Line, i.IPs)
	}
	return nil
}
