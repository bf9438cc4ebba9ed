// SPDX-License-Identifier: Apache-2.0

package netdev

import "github.com/lace-net/lace/dataplane/plan"

// LookNexthops resolves the next hop of every peer as Nexthops does, and changes nothing in the kernel:
// for commands beside the agent.
func (h *Handle) LookNexthops(p *plan.Plan) ([]Nexthop, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	hops, _, err := h.readNexthops(p)
	return hops, err
}
