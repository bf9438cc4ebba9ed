// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
)

// routed is plain kernel forwarding between the pods' subnets, without a tunnel.
var routed = kind{name: "routed", build: buildRouted}

func buildRouted(ctx context.Context, b *bed) error {
	if err := b.addPods(ctx); err != nil {
		return err
	}
	if err := b.routePods(ctx); err != nil {
		return err
	}
	for i, n := range b.node {
		far := 1 - i
		err := n.ip(ctx,
			fmt.Sprintf("route add %s.0/24 via %s", podNet4[far], wire4[far]),
			fmt.Sprintf("route add %s:/64 via %s", podNet6[far], wire6[far]))
		if err != nil {
			return err
		}
	}
	return nil
}
