// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
)

// Facts of the host have no slot: they hold as soon as they are written, whatever the topology says.

// Host is what the host itself is to the overlay. Its addresses are written by SyncAddresses.
type Host struct {
	Stack    uint32     // index of lc-host; 0: there is none
	Peer     uint32     // … of lc-host-peer
	Loopback uint32     // … of lo
	MAC      plan.MAC   // of lc-host
	V4, V6   netip.Addr // what it calls itself to containers and to the outside; invalid: nothing
}

// Egress is an interface of the host that packets may leave by, as a program sees what comes in there.
type Egress struct {
	Index  uint32
	Raw    bool       // it has no Ethernet header
	V4, V6 netip.Addr // what containers are masqueraded as; invalid: they cannot be
}

// SyncHost writes what the host is.
func (m *Maps) SyncHost(h Host) error {
	row := bpf.LaceHost{Stack: h.Stack, Peer: h.Peer, Loopback: h.Loopback, V4: be32(h.V4)}
	row.V6.U8, row.Mac.U8 = addr(h.V6).U8, h.MAC
	have, _, err := m.host.Get(0)
	if err != nil || have == row {
		return err
	}
	return m.host.Put(0, row)
}

// SyncAddresses makes the host's addresses, with the interfaces that have them, those that the programs know. gone are the ones
// that it had before, in order: flows that go by them come to nothing.
func (m *Maps) SyncAddresses(addresses map[netip.Addr]int) (gone []netip.Addr, err error) {
	want := make(map[bpf.LaceAddr]uint32, len(addresses))
	for a, index := range addresses {
		want[bpf.LaceAddr{U8: addr(a).U8}] = uint32(index)
	}
	have, err := m.addresses.All()
	if err != nil {
		return nil, err
	}
	for a := range have {
		if _, stays := want[a]; !stays {
			gone = append(gone, unmapped(a.U8))
		}
	}
	slices.SortFunc(gone, netip.Addr.Compare)
	if _, err := m.addresses.change(have, want); err != nil {
		return gone, fmt.Errorf("tell the programs the host's addresses: %w", err)
	}
	return gone, nil
}

// SyncEgresses makes the interfaces that packets may leave by those that are given.
func (m *Maps) SyncEgresses(egresses []Egress) error {
	want := make(map[uint32]bpf.LaceEgress, len(egresses))
	for _, e := range egresses {
		want[e.Index] = egressRow(e)
	}
	if _, err := m.egresses.Sync(want); err != nil {
		return fmt.Errorf("tell the programs which interfaces lead out: %w", err)
	}
	return nil
}

func egressRow(e Egress) bpf.LaceEgress {
	row := bpf.LaceEgress{V4: be32(e.V4)}
	row.V6.U8 = addr(e.V6).U8
	if e.V4.IsValid() {
		row.Flags |= uint32(bpf.LaceEgressFlagsEGRESS_HAS_V4)
	}
	if e.V6.IsValid() {
		row.Flags |= uint32(bpf.LaceEgressFlagsEGRESS_HAS_V6)
	}
	if e.Raw {
		row.Flags |= uint32(bpf.LaceEgressFlagsEGRESS_RAW)
	}
	return row
}
