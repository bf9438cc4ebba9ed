// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"net"

	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/plugin"
)

// seam is where plugin and dataplane meet: plugin's words on one side, dataplane's on the other.
type seam struct{ d *dataplane.Dataplane }

var _ plugin.Dataplane = seam{}

func (s seam) Attach(ctx context.Context, r plugin.Request) ([]plugin.Result, error) {
	ports, err := s.d.Attach(ctx, request(r))
	return results(ports), err
}

func (s seam) Attached(container string) ([]plugin.Result, bool) {
	ports, ok := s.d.Attached(container)
	return results(ports), ok
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
	out := dataplane.Request{Container: r.Container, Name: r.Name, Sticky: r.Sticky, Netns: r.Netns}
	for _, i := range r.Interfaces {
		one := dataplane.Interface{Network: i.Network, IPs: i.IPs, IfName: i.IfName, Gateway: i.Gateway}
		copy(one.MAC[:], i.MAC)
		for _, p := range i.Publish {
			one.Publish = append(one.Publish, plan.Publish(p))
		}
		out.Interfaces = append(out.Interfaces, one)
	}
	return out
}

func results(ports []dataplane.Port) (all []plugin.Result) {
	for _, p := range ports {
		all = append(all, result(p))
	}
	return all
}

func result(p dataplane.Port) plugin.Result {
	r := plugin.Result{Network: p.Network, IfName: p.IfName, Gateway4: p.Gateway4, Gateway6: p.Gateway6,
		MAC: net.HardwareAddr(p.MAC[:]), MTU: p.MTU}
	for _, prefix := range p.Prefixes {
		if prefix.Addr().Is4() {
			r.V4 = prefix
		} else {
			r.V6 = prefix
		}
	}
	return r
}
