// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"

	"github.com/lace-net/lace/bpf"
)

// SyncNexthops writes the ways to the peers of the active generation; a peer without one is refused with reason no_nexthop.
func (m *Maps) SyncNexthops(hops []Nexthop) error {
	s, err := m.active()
	if err != nil {
		return err
	}
	return m.writeNexthops(s, hops)
}

// places is how many nexthops a slot has; the first is never used.
func (m *Maps) places() uint32 { return m.nexthops.m.MaxEntries() / 2 }

func (m *Maps) writeNexthops(s Slot, hops []Nexthop) error {
	first := uint32(s) * m.places()
	want := map[uint32]bpf.LaceNexthop{}
	for _, h := range hops {
		if h.Peer == 0 || h.Peer >= m.places() {
			return fmt.Errorf("nexthop of peer %d: map nexthops has places for peers 1 to %d", h.Peer, m.places()-1)
		}
		want[first+h.Peer] = nexthopRow(h)
	}
	have, err := m.nexthops.All()
	if err != nil {
		return err
	}
	for i, row := range have {
		if i < first || i >= first+m.places() || row == want[i] {
			continue
		}
		if err := m.nexthops.Put(i, want[i]); err != nil {
			return fmt.Errorf("nexthop of peer %d: %w", i-first, err)
		}
	}
	return nil
}

func nexthopRow(h Nexthop) bpf.LaceNexthop {
	if h.Ifindex == 0 {
		return bpf.LaceNexthop{}
	}
	row := bpf.LaceNexthop{Ifindex: h.Ifindex, Mtu: h.MTU}
	if h.Known {
		row.Flags |= uint16(bpf.LaceNexthopFlagsNEXTHOP_MAC)
		row.Dst.U8, row.Src.U8 = h.Dst, h.Src
	}
	if h.Raw {
		row.Flags |= uint16(bpf.LaceNexthopFlagsNEXTHOP_RAW)
	}
	return row
}
