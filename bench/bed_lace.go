// SPDX-License-Identifier: Apache-2.0

package main

import "context"

// laceL3 is Lace: the agent's data plane on both nodes, an L3 network between two containers.
var laceL3 = kind{name: "lace-l3", build: func(_ context.Context, b *bed) error { return buildLace(b, "reduced") }}

// laceL3SRH is the same with a segment routing header on the wire.
var laceL3SRH = kind{name: "lace-l3-srh", build: func(_ context.Context, b *bed) error { return buildLace(b, "srh") }}

func buildLace(b *bed, encapsulation string) error {
	if err := b.startNodes(encapsulation); err != nil {
		return err
	}
	for i, n := range b.agents {
		r, err := n.do(order{Do: "attach", Container: "bench/" + string(b.pod[i]), Netns: b.pod[i].path()})
		if err != nil {
			return err
		}
		b.serverAt(r.V4, r.V6) // the last one is the server
	}
	return nil
}
