// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
)

// nftMasq is what container engines do for a pod that asks a host outside: veth, bridge, and the node's nftables masquerade.
var nftMasq = kind{name: "nft-masq", outside: true, build: func(ctx context.Context, b *bed) error {
	if err := b.buildNFT(ctx); err != nil {
		return err
	}
	b.askHost()
	return nil
}}

// nftDNAT is what they do for a host outside that asks a published port: the same way in, its destination changed by nftables.
var nftDNAT = kind{name: "nft-dnat", outside: true, build: func(ctx context.Context, b *bed) error {
	if err := b.buildNFT(ctx); err != nil {
		return err
	}
	b.askPublished(podAddr4(0), podAddr6(0))
	return nil
}}

// askHost has the pod ask the host at the far end of the wire.
func (b *bed) askHost() {
	b.client, b.server = b.pod[0], b.node[1]
	b.serverAt(wire4[1], wire6[1])
}

// askPublished has the host at the far end of the wire ask the node for what the pod serves at those addresses.
func (b *bed) askPublished(v4, v6 string) {
	b.client, b.server = b.node[1], b.pod[0]
	b.serverAt(v4, v6)
	b.publishAt(wire4[0], wire6[0])
}

// buildNFT puts the first side's pod in a bridge of its node, which routes for it and translates.
func (b *bed) buildNFT(ctx context.Context) error {
	if err := b.addPod(ctx, 0); err != nil {
		return err
	}
	if err := b.node[0].ip(ctx, "link add br0 type bridge", "link set br0 up", "link set pod0 master br0"); err != nil {
		return err
	}
	if err := b.routePod(ctx, 0, "br0"); err != nil {
		return err
	}
	return command(ctx, nftRules(), "ip", "netns", "exec", string(b.node[0]), "nft", "-f", "-")
}

// nftRules are the fewest that do it: engines have chains of filters besides, which each packet passes.
func nftRules() string {
	return fmt.Sprintf(`table inet engine {
	chain in {
		type nat hook prerouting priority dstnat
		fib daddr type local meta nfproto ipv4 meta l4proto { tcp, udp } th dport %[1]d dnat ip to %[2]s:%[1]d
		fib daddr type local meta nfproto ipv6 meta l4proto { tcp, udp } th dport %[1]d dnat ip6 to [%[3]s]:%[1]d
	}
	chain out {
		type nat hook postrouting priority srcnat
		oifname != "br0" ip saddr %[4]s.0/24 masquerade
		oifname != "br0" ip6 saddr %[5]s:/64 masquerade
	}
}
`, trafficPort, podAddr4(0), podAddr6(0), podNet4[0], podNet6[0])
}
