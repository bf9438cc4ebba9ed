// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"github.com/lace-net/lace/dataplane/hook"
)

// endpointCounts are how many endpoints the two nodes of the bed know: few and many.
var endpointCounts = [2]int{10, 10_000}

// The frames that are sent to endpoints. Those that belong to no flow have their MAC address looked up each time.
const (
	frameToOne  = metricFDB
	frameToAny  = metricFDB + "-drawn" // of no flow, each to another endpoint
	frameOfFlow = metricFDB + "-flow"
)

// measureFDB runs the entry program on frames to endpoints of the other node, of which one node knows few and the other many.
func (l *lab) measureFDB(ctx context.Context, rec *record) error {
	b := newBed(kind{name: "fdb", build: func(_ context.Context, b *bed) error {
		return b.buildLace(withEndpoints(0), withEndpoints(1))
	}}, l.opt.wire)
	l.apart = append(l.apart, b)
	if err := b.construct(ctx); err != nil {
		return fmt.Errorf("build bed fdb: %w", err)
	}
	if err := b.ready(ctx); err != nil {
		return err
	}
	for range l.opt.rounds {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		for i, n := range b.agents {
			r, err := n.do(order{Do: "fdb", Container: b.container(i), Runs: l.opt.runs})
			if err != nil {
				return err
			}
			rec.noteFDB(endpointCounts[i], r.Programs)
		}
	}
	l.log("sent frames to one of %d and to one of %d endpoints", endpointCounts[0], endpointCounts[1])
	return nil
}

func (r *record) noteFDB(endpoints int, ns map[string]float64) {
	for name, took := range ns {
		if r.FDB[name] == nil {
			r.FDB[name] = map[int][]float64{}
		}
		r.FDB[name][endpoints] = append(r.FDB[name][endpoints], took)
	}
}

// withEndpoints declares the endpoints that the node at one end of the wire knows, all at the other end and outside the pools.
func withEndpoints(side int) fabric {
	w := new(strings.Builder)
	for i := range endpointCounts[side] {
		at := netip.AddrFrom4([4]byte{10, 61, byte(128 + i/250), byte(1 + i%250)})
		fmt.Fprintf(w, "[endpoint.e%d]\nnetwork=%q\nnode=%q\nmac=\"52:54:00:00:%02x:%02x\"\naddress=[%q]\n",
			i, frameFabric.network, nodeNames[1-side], i>>8, i&0xff, at)
	}
	return frameFabric.and(w.String())
}

// fdb sends frames to one endpoint, as most have few partners, and to endpoints drawn among all, so that the caches help as little as
// they would.
func (n *node) fdb(o order) (report, error) {
	port, err := n.port(o.Container)
	if err != nil {
		return report{}, err
	}
	network, _ := n.topo.Network(port.Network)
	endpoints := network.Endpoints()
	if len(endpoints) == 0 {
		return report{}, errors.New("the topology declares no endpoints")
	}
	to := endpoints[0]
	one := trial{name: frameToOne, program: n.entry(hook.PodL2), ifindex: port.Ifindex, answer: actRedirect,
		packet: frame(to.MAC, port.MAC, etherOther, make([]byte, packetSize))}
	drawn, flow := one, one
	drawn.name, drawn.packet = frameToAny, slices.Clone(one.packet)
	drawn.vary = func() {
		mac := endpoints[rand.IntN(len(endpoints))].MAC
		copy(drawn.packet, mac[:])
	}
	flow.name, flow.packet = frameOfFlow, ethernet(to.MAC, port.MAC, udp(port.V4, to.V4))
	return inTurn(o.Runs, one, drawn, flow)
}
