// SPDX-License-Identifier: Apache-2.0

package main

import "context"

// laceL3 is Lace: the agent's data plane on both nodes, an L3 network between two containers.
var laceL3 = kind{name: "lace-l3", trials: routedTrials, build: laceBed(routedFabric)}

// laceL3SRH is the same with a segment routing header on the wire.
var laceL3SRH = kind{name: "lace-l3-srh", build: laceBed(routedFabric.with(`encapsulation = "srh"`))}

// laceL2 is an L2 network between two containers: whole frames on the wire, those that are still to be segmented behind a shim.
var laceL2 = kind{name: "lace-l2", kin: laceL3.name, trials: frameTrials, build: laceBed(frameFabric)}

// laceL2Segment has the frames segmented before they are encapsulated. What is never segmented goes as on laceL2.
var laceL2Segment = kind{name: "lace-l2-segment", kin: laceL2.name, metrics: []string{"tcp"},
	build: laceBed(frameFabric.with(`l2-gso = "segment"`))}

func laceBed(f fabric) func(context.Context, *bed) error {
	return func(_ context.Context, b *bed) error { return b.buildLace(f, f) }
}

// buildLace starts both nodes, each with its own fabric, and attaches a container at each.
func (b *bed) buildLace(fabrics ...fabric) error {
	if err := b.startNodes(fabrics...); err != nil {
		return err
	}
	for i, n := range b.agents {
		r, err := n.do(order{Do: "attach", Container: b.container(i), Network: fabrics[i].network, Netns: b.pod[i].path()})
		if err != nil {
			return err
		}
		b.serverAt(r.V4, r.V6) // the last one is the server
	}
	return nil
}

// container is the id of the pod's container.
func (b *bed) container(side int) string { return "bench/" + string(b.pod[side]) }
