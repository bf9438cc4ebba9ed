// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
)

// vxlan is a bridge on each node and VXLAN between them, as Docker's overlay and flannel have it.
var vxlan = kind{name: "vxlan", overhead: 50, build: buildVXLAN}

func buildVXLAN(ctx context.Context, b *bed) error {
	if err := b.addPods(ctx); err != nil {
		return err
	}
	size := mtu - b.overhead
	for i, n := range b.node {
		err := n.ip(ctx,
			"link add br0 type bridge",
			fmt.Sprintf("link set br0 mtu %d up", size),
			fmt.Sprintf("link add vx0 type vxlan id 9 local %s remote %s dstport 4789 dev up0", wire4[i], wire4[1-i]),
			fmt.Sprintf("link set vx0 mtu %d master br0 up", size),
			"link set pod0 master br0")
		if err != nil {
			return err
		}
		if err := b.joinLAN(ctx, i); err != nil {
			return err
		}
	}
	b.serverAt(podOnLAN4[1], podOnLAN6[1])
	if b.wire != "none" {
		return nil
	}
	return b.plainTunnel(ctx)
}

// joinLAN gives a pod its address in the one subnet that both pods share.
func (b *bed) joinLAN(ctx context.Context, side int) error {
	return b.pod[side].ip(ctx,
		fmt.Sprintf("addr add %s/%d dev eth0", podOnLAN4[side], lanLength4),
		fmt.Sprintf("addr add %s/%d dev eth0 nodad", podOnLAN6[side], lanLength6))
}

// plainTunnel takes the tunnel device's own offloads away, for a wire that has none.
func (b *bed) plainTunnel(ctx context.Context) error {
	for _, n := range b.node {
		if err := n.offloads(ctx, "vx0", "tso", "off", "gso", "off", "tx", "off"); err != nil {
			return err
		}
	}
	return nil
}
