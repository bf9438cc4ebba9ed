// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
)

// hostState is what the host itself is to the overlay, and where its interfaces lead.
type hostState struct {
	side      netdev.HostSide
	addresses map[netip.Addr]int
	egresses  []netdev.Egress
}

// readHost finds out what the host is now. The links of the plan have to be there.
func (d *Dataplane) readHost(p *plan.Plan) (hostState, error) {
	o, err := d.dev.Outlook(p)
	if err != nil {
		return hostState{}, fmt.Errorf("find out what the host is to the overlay: %w", err)
	}
	return hostState{o.HostSide(), o.Addresses(), o.Egresses()}, nil
}

// and adds what was there before and is not any more: it is still in use by the generation that is active.
func (s hostState) and(before hostState) hostState {
	if s.side.Stack == 0 {
		s.side.Stack, s.side.Peer, s.side.MAC = before.side.Stack, before.side.Peer, before.side.MAC
	}
	for _, e := range before.egresses {
		if !slices.ContainsFunc(s.egresses, func(n netdev.Egress) bool { return n.Index == e.Index }) {
			s.egresses = append(s.egresses, e)
		}
	}
	return s
}

// writeHost tells the programs what the host is. Only interfaces that have a program lead out: answers would be lost elsewhere.
// Flows that go by an address which the host has no more are removed, so that they begin anew with another one.
func (d *Dataplane) writeHost(s hostState, attached map[int]bool) error {
	m := d.hooks.Maps()
	var out []maps.Egress
	for _, e := range s.egresses {
		if attached[e.Index] {
			out = append(out, maps.Egress{Index: uint32(e.Index), Raw: e.Raw, V4: e.V4, V6: e.V6})
		}
	}
	err := m.SyncHost(maps.Host{Stack: uint32(s.side.Stack), Peer: uint32(s.side.Peer), Loopback: uint32(s.side.Loopback),
		MAC: s.side.MAC, V4: s.side.V4, V6: s.side.V6})
	gone, err2 := m.SyncAddresses(s.addresses)
	err3 := m.SyncEgresses(out)
	for _, a := range gone {
		d.log.Info("an address of this host is gone: flows by it begin anew", "address", a)
		d.collector.leave(whose{addr: a})
	}
	return errors.Join(err, err2, err3)
}
