// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"net"
	"net/netip"

	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/plugin"
)

// seam is where plugin and dataplane meet: plugin's words on one side, dataplane's on the other.
type seam struct{ d *dataplane.Dataplane }

var _ plugin.Dataplane = seam{}

func (s seam) Attach(ctx context.Context, r plugin.Request) (plugin.Result, error) {
	port, err := s.d.Attach(ctx, request(r))
	if err != nil {
		return plugin.Result{}, err
	}
	return result(port), nil
}

func (s seam) Attached(container string) (plugin.Result, bool) {
	port, ok := s.d.Attached(container)
	if !ok {
		return plugin.Result{}, false
	}
	return result(port), true
}

func (s seam) Detach(ctx context.Context, container string) error {
	return s.d.Detach(ctx, container)
}

func (s seam) Reserve(ctx context.Context, r plugin.Request) error {
	return s.d.Reserve(ctx, request(r))
}

func (s seam) Release(ctx context.Context, container string) error {
	return s.d.Release(ctx, container)
}

func (s seam) Retain(ctx context.Context, live []string) error {
	return s.d.Retain(ctx, live)
}

func request(r plugin.Request) dataplane.Request {
	out := dataplane.Request{
		Container: r.Container, Name: r.Name, Network: r.Network, IPs: r.IPs, Sticky: r.Sticky, Netns: r.Netns, IfName: r.IfName,
	}
	copy(out.MAC[:], r.MAC)
	return out
}

func result(p dataplane.Port) plugin.Result {
	return plugin.Result{
		IfName: p.IfName, V4: host(p.V4), V6: host(p.V6), Gateway4: p.Gateway4, Gateway6: p.Gateway6,
		MAC: net.HardwareAddr(p.MAC[:]), MTU: p.MTU,
	}
}

// host is an address as it stands on a container's interface: alone, everything else is behind the gateway.
func host(a netip.Addr) netip.Prefix {
	if !a.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, a.BitLen())
}
