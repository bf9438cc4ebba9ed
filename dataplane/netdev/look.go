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

// Detours are the priorities of the IPv6 rules of ours that stand before rules of the host with suppress_prefixlength, in their order.
func (h *Handle) Detours() ([]int, error) {
	_, ours, err := (&applier{Handle: h}).detours(&plan.Plan{})
	priorities := make([]int, len(ours))
	for i, r := range ours {
		priorities[i] = r.Priority
	}
	return priorities, err
}

// LinkNames are the names of all links by index.
func (h *Handle) LinkNames() (map[uint32]string, error) {
	links, err := h.host.links()
	if err != nil {
		return nil, err
	}
	names := make(map[uint32]string, len(links))
	for name, l := range links {
		names[uint32(l.Attrs().Index)] = name
	}
	return names, nil
}
