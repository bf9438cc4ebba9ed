// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
)

// seg6 is the kernel's own SRv6: H.Encaps.Red one way, End.DX4 and End.DX6 at the other end.
var seg6 = kind{name: "seg6", overhead: 40, build: buildSeg6}

func buildSeg6(ctx context.Context, b *bed) error {
	if err := b.addPods(ctx); err != nil {
		return err
	}
	if err := b.routePods(ctx); err != nil {
		return err
	}
	for i, n := range b.node {
		if err := n.sysctl(ctx, "net.ipv6.conf.all.seg6_enabled=1", "net.ipv6.conf.up0.seg6_enabled=1"); err != nil {
			return err
		}
		if err := n.ip(ctx, seg6Routes(i)...); err != nil {
			return err
		}
	}
	return nil
}

// seg6Routes are a node's way to the far locator, its encapsulation and its own SIDs: function 4 takes
// IPv4 packets, function 6 takes IPv6 packets.
func seg6Routes(side int) []string {
	far := 1 - side
	encap := "encap seg6 mode encap.red segs"
	return []string{
		fmt.Sprintf("sr tunsrc set %s1", locators[side]),
		fmt.Sprintf("route add %s/64 via %s", locators[far], wire6[far]),
		fmt.Sprintf("route add %s.0/24 %s %s4 dev up0", podNet4[far], encap, locators[far]),
		fmt.Sprintf("route add %s:/64 %s %s6 dev up0", podNet6[far], encap, locators[far]),
		fmt.Sprintf("route add %s4/128 encap seg6local action End.DX4 nh4 %s.2 dev pod0", locators[side], podNet4[side]),
		fmt.Sprintf("route add %s6/128 encap seg6local action End.DX6 nh6 %s:2 dev pod0", locators[side], podNet6[side]),
	}
}
