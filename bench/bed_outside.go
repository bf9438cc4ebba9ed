// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/lace-net/lace/dataplane/plan"
)

// laceMasq is a container of Lace that asks a host outside, masqueraded as its node.
var laceMasq = kind{name: "lace-masq", kin: nftMasq.name, outside: true, trials: masqueradeTrials,
	build: func(_ context.Context, b *bed) error {
		_, err := b.buildOutside()
		b.askHost()
		return err
	}}

// lacePublish is a host outside that asks a port which the node publishes for a container of Lace.
var lacePublish = kind{name: "lace-publish", kin: nftDNAT.name, outside: true, trials: publishTrials,
	build: func(_ context.Context, b *bed) error {
		r, err := b.buildOutside()
		if err == nil {
			b.askPublished(r.V4, r.V6)
		}
		return err
	}}

// outsideFabric lets the L3 network and what is at the wire open flows to each other.
var outsideFabric = routedFabric.and(`[network.wire]
type = "external"
prefixes = ["192.168.9.0/24", "fd10::/64"]
[[peering]]
from = "bench"
to = "wire"
masquerade = true
[[peering]]
from = "wire"
to = "bench"
`)

// buildOutside starts the first side's node and attaches its container, which can leave the overlay and has a port published.
func (b *bed) buildOutside() (report, error) {
	if err := b.startNodes(outsideFabric); err != nil {
		return report{}, err
	}
	return b.agents[0].do(order{Do: "attach", Container: b.container(0), Network: outsideFabric.network, Netns: b.pod[0].path(),
		Gateway: true, Publish: []plan.Publish{publish(protocolTCP), publish(protocolUDP)}})
}

func publish(protocol uint8) plan.Publish {
	return plan.Publish{Protocol: protocol, Port: trafficPort, To: trafficPort}
}
