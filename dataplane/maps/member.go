// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"maps"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// memberRemote marks the places of nodes: MEMBER_REMOTE of bpf/lib/types.h.
const memberRemote = 1 << 31

type memberRows = map[bpf.LaceMemberKey]bpf.LaceMember

// groupRows are the networks that replicate, by scope, and the places of the nodes that get copies.
func (w *wanted) groupRows(s Slot) (map[uint32]bpf.LaceGroup, memberRows) {
	groups, members := map[uint32]bpf.LaceGroup{}, memberRows{}
	for _, n := range w.plan.Networks {
		if n.Type == topology.L2 && n.Flood {
			groups[Scope(n.ID, s)] = bpf.LaceGroup{}
		}
	}
	for _, m := range w.plan.Members {
		scope := Scope(m.Network, s)
		g := groups[scope]
		row := bpf.LaceMember{Peer: m.Peer}
		row.Sid.U8 = addr(m.SID.Addr).U8
		members[bpf.LaceMemberKey{Scope: scope, Place: memberRemote | g.Remotes}] = row
		g.Remotes++
		groups[scope] = g
	}
	return groups, members
}

// join gives each port of a network that replicates a place in rows: the one that it has, or the lowest that is free then.
func (w *wanted) join(r *rows, s Slot) {
	for _, settled := range []bool{true, false} {
		for _, p := range w.plan.Ports {
			dev, there := w.devices[p.HostIf]
			place, has := w.places[member{p.NetworkID, dev.Index}]
			if !there || has != settled {
				continue
			}
			r.join(Scope(p.NetworkID, s), place, dev.Index, settled)
		}
	}
}

// join writes a port down as one that gets copies, at its place or at one that is free.
func (r *rows) join(scope, place, ifindex uint32, settled bool) {
	g, replicates := r.groups[scope]
	if !replicates {
		return
	}
	k := bpf.LaceMemberKey{Scope: scope, Place: place}
	if !settled {
		k = lowestFree(scope, func(k bpf.LaceMemberKey) bool { _, taken := r.members[k]; return taken })
	}
	r.members[k] = bpf.LaceMember{Ifindex: ifindex}
	g.Locals = max(g.Locals, k.Place+1)
	r.groups[scope] = g
}

// member is a port in a network.
type member struct {
	network topology.NetworkID
	ifindex uint32
}

// placesOf are those that ports have.
func placesOf(have memberRows) map[member]uint32 {
	places := map[member]uint32{}
	for k, v := range have {
		if v.Ifindex != 0 {
			places[member{Network(k.Scope), v.Ifindex}] = k.Place
		}
	}
	return places
}

func lowestFree(scope uint32, taken func(bpf.LaceMemberKey) bool) bpf.LaceMemberKey {
	k := bpf.LaceMemberKey{Scope: scope}
	for taken(k) {
		k.Place++
	}
	return k
}

// locals reads the places of ports in one network of the active generation. ok: the network replicates.
func (m *Maps) locals(scope uint32) (g bpf.LaceGroup, have memberRows, ok bool, err error) {
	g, ok, err = m.Groups.Get(scope)
	if !ok || err != nil {
		return g, nil, false, err
	}
	have = memberRows{}
	for place := range g.Locals {
		k := bpf.LaceMemberKey{Scope: scope, Place: place}
		v, there, err := m.Members.Get(k)
		if err != nil {
			return g, nil, false, err
		}
		if there {
			have[k] = v
		}
	}
	return g, have, true, nil
}

// putMember gives a port its place among those that get copies, where the network replicates: the row first, then the
// group that reaches it.
func (m *Maps) putMember(p plan.Port, dev Device, s Slot) error {
	scope := Scope(p.NetworkID, s)
	g, have, ok, err := m.locals(scope)
	if !ok || err != nil {
		return err
	}
	if _, has := placesOf(have)[member{p.NetworkID, dev.Index}]; has {
		return nil
	}
	k := lowestFree(scope, func(k bpf.LaceMemberKey) bool { _, taken := have[k]; return taken })
	if err := m.Members.Put(k, bpf.LaceMember{Ifindex: dev.Index}); err != nil {
		return err
	}
	if k.Place < g.Locals {
		return nil
	}
	g.Locals = k.Place + 1
	return m.Groups.Put(scope, g)
}

// deleteMember takes a port's place away, and makes the group as small as it can be.
func (m *Maps) deleteMember(network topology.NetworkID, index uint32, s Slot) error {
	scope := Scope(network, s)
	g, have, ok, err := m.locals(scope)
	if !ok || err != nil {
		return err
	}
	place, has := placesOf(have)[member{network, index}]
	if !has {
		return nil
	}
	k := bpf.LaceMemberKey{Scope: scope, Place: place}
	if err := m.Members.Delete(k); err != nil {
		return fmt.Errorf("place %d of network %d: %w", place, network, err)
	}
	delete(have, k)
	was := g.Locals
	g.Locals = 0
	for k := range have {
		g.Locals = max(g.Locals, k.Place+1)
	}
	if g.Locals == was {
		return nil
	}
	return m.Groups.Put(scope, g)
}

// sameGroups says whether two slots replicate to the same nodes.
func sameGroups(a, b *rows) bool {
	return maps.Equal(remotesOf(a.groups), remotesOf(b.groups)) && maps.Equal(nodesOf(a.members), nodesOf(b.members))
}

func remotesOf(rows map[uint32]bpf.LaceGroup) map[uint32]uint32 {
	remotes := map[uint32]uint32{}
	for scope, g := range rows {
		remotes[scope] = g.Remotes
	}
	return remotes
}

// nodesOf are the places of nodes.
func nodesOf(rows memberRows) memberRows {
	nodes := memberRows{}
	for k, v := range rows {
		if k.Place&memberRemote != 0 {
			nodes[k] = v
		}
	}
	return nodes
}
