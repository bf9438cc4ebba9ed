// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Slot is one of the two places that each table of the configuration has: 0 or 1.
type Slot uint32

// SlotOf is the slot that a generation's rows are in.
func SlotOf(generation uint32) Slot { return Slot(generation & 1) }

// Scope is a network in a slot, as keys name it.
func Scope(network topology.NetworkID, s Slot) uint32 { return uint32(network) | uint32(s)<<slotBit }

// Network is the network of a scope.
func Network(scope uint32) topology.NetworkID { return topology.NetworkID(scope &^ (1 << slotBit)) }

func slotOfScope(scope uint32) Slot { return Slot(scope >> slotBit) }

// step counts a generation up and leaves its slot.
const step = 2

// Generation is what the programs go by now. Its lowest bit is the active slot; with every change that ends flows or may end
// some the rest is counted up, and a flow that was decided under another generation is decided again at its next packet.
func (m *Maps) Generation() (uint32, error) {
	var g uint32
	if err := m.generation.Lookup(uint32(0), &g); err != nil {
		return 0, fmt.Errorf("read map generation: %w", err)
	}
	return g, nil
}

func (m *Maps) active() (Slot, error) {
	g, err := m.Generation()
	return SlotOf(g), err
}

func (m *Maps) setGeneration(g uint32) error {
	if err := m.generation.Put(uint32(0), g); err != nil {
		return fmt.Errorf("write map generation: %w", err)
	}
	return nil
}

// DecideAgain has every flow decided again at its next packet: a container is gone.
func (m *Maps) DecideAgain() error {
	g, err := m.Generation()
	if err != nil {
		return err
	}
	return m.setGeneration(g + step)
}

// Synced says what Sync did.
type Synced struct {
	Changes           // rows of the slot that is active now
	Generation uint32 // that is active now
	Switched   bool   // a new generation was written: the configuration is another one
}

// Sync makes the tables hold the plan. devices has the ports' interfaces by their host name, and Segmenter's; a port without
// one is left out.
//
// Where networks, blocks, peerings, external networks, peers, stations and members at other nodes and what holds for the node are as the plan
// says, ports, what leads to them, and nexthops are changed in place. Else the whole is written to the slot that is not in use and becomes active with one write, so that
// no packet sees a part of it; when anything does not fit, what is active stays as it was. Rows of the slot that is not in
// use, which this or a killed agent left, are removed. vrf: the gateways' addresses are on bridges in VRFs.
func (m *Maps) Sync(p *plan.Plan, vrf bool, devices map[string]Device, hops []Nexthop) (Synced, error) {
	g, err := m.Generation()
	if err != nil {
		return Synced{}, err
	}
	have, err := m.read()
	if err != nil {
		return Synced{Generation: g}, err
	}
	now, other := SlotOf(g), SlotOf(g^1)
	w := wanted{plan: p, vrf: vrf, devices: devices, nexthops: hops, places: placesOf(have[now].members)}
	if err := w.number(have[now].networks, m.numbers()); err != nil {
		return Synced{Generation: g}, err
	}
	if want := w.rows(now); have[now].sameConfig(want) {
		done, err := m.changeInPlace(now, have[now], want, hops)
		return Synced{Changes: done, Generation: g}, errors.Join(err, m.clear(other, have[other]))
	}
	done, err := m.prepare(other, have[other], &w)
	if err != nil {
		return Synced{Generation: g}, errors.Join(fmt.Errorf("write a new generation beside the active one, which stays: %w", err), m.abandon(other))
	}
	next := (g + step) ^ 1
	if err := m.setGeneration(next); err != nil {
		return Synced{Generation: g}, errors.Join(err, m.abandon(other))
	}
	return Synced{Changes: done, Generation: next, Switched: true}, m.clear(now, have[now])
}

// changeInPlace brings the active slot's ports, what leads to them, and nexthops to what is wanted.
func (m *Maps) changeInPlace(s Slot, have, want *rows, hops []Nexthop) (Changes, error) {
	done, err := m.changePorts(have, want)
	return done, errors.Join(err, m.writeNexthops(s, hops))
}

// changePorts writes the tables of containers. Where packets for one go comes before what it may send.
func (m *Maps) changePorts(have, want *rows) (Changes, error) {
	return sum(
		func() (Changes, error) { return m.Endpoints.change(have.endpoints, want.endpoints) },
		func() (Changes, error) { return m.Published.change(have.published, want.published) },
		func() (Changes, error) { return m.FDB.change(have.stations, want.stations) },
		func() (Changes, error) { return m.Members.change(have.members, want.members) },
		func() (Changes, error) { return m.Groups.change(have.groups, want.groups) },
		func() (Changes, error) { return m.Ports.change(have.ports, want.ports) },
	)
}

// prepare writes a whole generation to a slot that is not in use.
func (m *Maps) prepare(s Slot, have *rows, w *wanted) (Changes, error) {
	want := w.rows(s)
	if !have.empty() {
		WaitForPackets() // those that were inside when the slot was left
	}
	if err := m.config.Put(uint32(s), want.config); err != nil {
		return Changes{}, fmt.Errorf("write map node_config: %w", err)
	}
	for _, n := range w.fresh {
		if err := m.zeroTraffic(n); err != nil {
			return Changes{}, err
		}
	}
	if err := m.writeNexthops(s, w.nexthops); err != nil {
		return Changes{}, err
	}
	return m.change(have, want)
}

// change writes all tables of rows, but for the arrays.
func (m *Maps) change(have, want *rows) (Changes, error) {
	return sum(
		func() (Changes, error) { return m.Peers.change(have.peers, want.peers) },
		func() (Changes, error) { return m.Networks.change(have.networks, want.networks) },
		func() (Changes, error) { return m.Blocks.change(have.blocks, want.blocks) },
		func() (Changes, error) { return m.Peerings.change(have.peerings, want.peerings) },
		func() (Changes, error) { return m.Externals.change(have.externals, want.externals) },
		func() (Changes, error) { return m.changePorts(have, want) },
	)
}

// sum does all steps, whatever fails, and adds up what they did.
func sum(steps ...func() (Changes, error)) (done Changes, err error) {
	for _, step := range steps {
		c, failed := step()
		done, err = done.Add(c), errors.Join(err, failed)
	}
	return done, err
}

// clear gives the memory of a slot back that is in use no more.
func (m *Maps) clear(s Slot, have *rows) error {
	if have.empty() {
		return nil
	}
	WaitForPackets()
	if _, err := m.change(have, &rows{}); err != nil {
		return fmt.Errorf("remove the rows of the generation before (slot %d): %w", s, err)
	}
	return nil
}

// abandon removes what was written to a slot that did not become active.
func (m *Maps) abandon(s Slot) error {
	have, err := m.read()
	if err != nil {
		return err
	}
	return m.clear(s, have[s])
}
