// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
)

// fabric is what the topology of a Lace bed says besides its two nodes.
type fabric struct {
	underlay string // further lines of the table [underlay]
	network  string // that the containers of the bed join
	tables   string // this network, and whatever else there is
}

// routedFabric is one L3 network.
var routedFabric = fabric{network: "bench", tables: `[network.bench]
type = "l3"
id = 100
subnets = ["10.60.0.0/16", "fd60::/48"]
`}

// frameFabric is one L2 network.
var frameFabric = fabric{network: "bench-l2", tables: `[network.bench-l2]
type = "l2"
id = 200
subnets = ["10.61.0.0/16", "fd61::/64"]
`}

// with has one more line in the table [underlay].
func (f fabric) with(line string) fabric {
	f.underlay += line + "\n"
	return f
}

// and has further tables.
func (f fabric) and(tables string) fabric {
	f.tables += tables
	return f
}

// nodeNames are the nodes at the ends of a bed's wire.
var nodeNames = [2]string{"node-a", "node-b"}

// locatorBlock is where all locators lie.
const locatorBlock = "5f00:1ace::/32"

// topology is the text of the file, with the two nodes at the ends of the wire.
func (f fabric) topology() string {
	w := new(strings.Builder)
	fmt.Fprintf(w, "version = 1\n[underlay]\nlocator-block = %q\n%s", locatorBlock, f.underlay)
	for i, name := range nodeNames {
		fmt.Fprintf(w, "[node.%s]\nunderlay = %q\nlocator = %q\nuplinks = [\"up0\"]\nvia = %q\n",
			name, wire6[i], locatorOf(i+1), wire6[1-i])
	}
	return w.String() + f.tables
}

// locatorOf is that of the node with a number.
func locatorOf(node int) string { return fmt.Sprintf("5f00:1ace:%x::/48", node) }

// farNode is the table of a node that runs nowhere. The nodes of the bed are 1 and 2.
func farNode(number int, underlay string) string {
	return fmt.Sprintf("[node.far-%d]\nunderlay = %q\nlocator = %q\n", number, underlay, locatorOf(number))
}
