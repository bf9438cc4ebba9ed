// SPDX-License-Identifier: Apache-2.0

package main

import (
	"maps"
	"slices"
)

// wires are the offloads of the wire's ends. Veth passes large segments on untouched, which no real
// wire does; "sw" has them cut by the sender and put together by the receiver in software, like a NIC that cannot segment inside a tunnel.
var wires = map[string][]string{
	"tso": {"tso", "on"},
	"sw":  {"tso", "off", "gro", "on"},
	"nic": {"tx-ipxip6-segmentation", "off", "tx-ipxip4-segmentation", "off",
		"tx-udp_tnl-segmentation", "off", "tx-udp_tnl-csum-segmentation", "off",
		"tx-gre-segmentation", "off", "tx-gre-csum-segmentation", "off", "gro", "on"},
	"none": {"tso", "off", "gso", "off", "tx", "off", "gro", "on"},
}

func wireNames() []string { return slices.Sorted(maps.Keys(wires)) }
