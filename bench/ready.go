// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lace-net/lace/bpf"
)

// readyPatience bounds how long nodes may take to find out each other's MAC addresses.
const readyPatience = 20 * time.Second

// ready waits until the nodes know all MAC addresses of the wire: programs send by a slower way until then.
func (b *bed) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyPatience)
	defer cancel()
	for _, n := range b.agents {
		for n != nil {
			r, err := n.do(order{Do: "ready"})
			if err != nil {
				return err
			}
			if r.Ready {
				break
			}
			if !sleep(ctx, 50*time.Millisecond) {
				return fmt.Errorf("node %s has not found out the MAC addresses of its peers in %s", n.name, readyPatience)
			}
		}
	}
	return nil
}

// ready says whether the table of next hops has a MAC address for every peer.
func (n *node) ready() (report, error) {
	table := n.d.Hooks().Collection().Maps["nexthops"]
	if table == nil {
		return report{}, errors.New("the data plane has no table nexthops")
	}
	known := 0
	var index uint32
	var hop bpf.LaceNexthop
	rows := table.Iterate()
	for rows.Next(&index, &hop) {
		if hop.Flags&uint16(bpf.LaceNexthopFlagsNEXTHOP_MAC) != 0 {
			known++
		}
	}
	if err := rows.Err(); err != nil {
		return report{}, fmt.Errorf("read the next hops: %w", err)
	}
	return report{Ready: known >= len(n.d.Plan().Peers)}, nil
}
