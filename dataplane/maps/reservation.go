// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/lace-net/lace/topology"
)

// Reservation keeps addresses for a name whose container is removed.
type Reservation struct {
	Network topology.NetworkID
	Name    string // at most 63 bytes count
	V4, V6  netip.Addr
}

// Reservations is a table that only the agent reads and writes: a pinned map outlives it, as every
// other state of Lace does.
type Reservations struct {
	t Table[reservationKey, reservationRow]
}

type reservationKey struct {
	Network uint32
	Name    [64]byte
}

type reservationRow struct {
	V4, V6 [16]byte // zero: none; IPv4 as ::ffff:a.b.c.d
}

const maxReservations = 8192

// OpenReservations opens the table that is pinned below dir, or makes it.
func OpenReservations(dir string) (*Reservations, error) {
	m, err := ebpf.NewMapWithOptions(&ebpf.MapSpec{
		Name: "reservations", Type: ebpf.Hash, KeySize: 68, ValueSize: 32, MaxEntries: maxReservations,
		Flags:   1, // BPF_F_NO_PREALLOC
		Pinning: ebpf.PinByName,
	}, ebpf.MapOptions{PinPath: dir})
	if err != nil {
		return nil, fmt.Errorf("open table reservations below %s: %w", dir, err)
	}
	return &Reservations{Table[reservationKey, reservationRow]{"reservations", m}}, nil
}

// Close gives the descriptor back.
func (r *Reservations) Close() { r.t.m.Close() }

func keyOf(network topology.NetworkID, name string) reservationKey {
	key := reservationKey{Network: uint32(network)}
	copy(key.Name[:63], name)
	return key
}

// Put keeps a reservation, in place of an older one of the name.
func (r *Reservations) Put(v Reservation) error {
	return r.t.Put(keyOf(v.Network, v.Name), reservationRow{V4: addr(v.V4).U8, V6: addr(v.V6).U8})
}

// Delete gives a name's addresses up; one that has none is fine.
func (r *Reservations) Delete(network topology.NetworkID, name string) error {
	return r.t.Delete(keyOf(network, name))
}

// All reads every reservation.
func (r *Reservations) All() ([]Reservation, error) {
	rows, err := r.t.All()
	if err != nil {
		return nil, err
	}
	out := make([]Reservation, 0, len(rows))
	for k, v := range rows {
		name, _, _ := bytes.Cut(k.Name[:], []byte{0})
		out = append(out, Reservation{Network: topology.NetworkID(k.Network), Name: string(name), V4: unmap(v.V4), V6: unmap(v.V6)})
	}
	return out, nil
}

func unmap(b [16]byte) netip.Addr {
	if b == ([16]byte{}) {
		return netip.Addr{}
	}
	return netip.AddrFrom16(b).Unmap()
}
