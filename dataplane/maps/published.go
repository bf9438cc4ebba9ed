// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Publication is a port of this node that leads to a container: one row of map published.
type Publication struct {
	At       netip.AddrPort // with 0.0.0.0 or :: it is had by every address of the family
	Protocol uint8          // 6: TCP, 17: UDP
}

// String is "192.0.2.1:8080/tcp".
func (p Publication) String() string {
	words := map[uint8]string{6: "tcp", 17: "udp"}
	return p.At.String() + "/" + cmp.Or(words[p.Protocol], fmt.Sprint(p.Protocol))
}

// Clashes says whether some packet is for both.
func (p Publication) Clashes(o Publication) bool {
	a, b := p.At.Addr(), o.At.Addr()
	return p.Protocol == o.Protocol && p.At.Port() == o.At.Port() && a.Is4() == b.Is4() &&
		(a == b || a.IsUnspecified() || b.IsUnspecified())
}

// PublicationsOf are the ports of this node that lead to a container: one for each family that it has, where no address is given.
func PublicationsOf(p plan.Port) []Publication {
	var all []Publication
	for _, l := range leading(p) {
		all = append(all, Publication{At: netip.AddrPortFrom(l.at, l.publish.Port), Protocol: l.publish.Protocol})
	}
	return all
}

// lead is a published port at an address of this node, or at every one of a family, and the container's address that it leads to.
type lead struct {
	publish plan.Publish
	at, to  netip.Addr
}

func leading(p plan.Port) (all []lead) {
	for _, v := range p.Publish {
		for _, to := range []netip.Addr{p.V4, p.V6} {
			if at, ok := publishedAt(v, to); ok {
				all = append(all, lead{v, at, to})
			}
		}
	}
	return all
}

// publishedAt is the address of this node that leads to one of a container's; not ok: none of its family does.
func publishedAt(v plan.Publish, to netip.Addr) (at netip.Addr, ok bool) {
	switch {
	case !to.IsValid():
		return at, false
	case v.Address.IsValid():
		return v.Address, v.Address.Is4() == to.Is4()
	case to.Is4():
		return netip.IPv4Unspecified(), true
	}
	return netip.IPv6Unspecified(), true
}

type publicationRows = map[bpf.LacePublicationKey]bpf.LacePublication

func publicationRowsOf(p plan.Port, s Slot) publicationRows {
	rows := publicationRows{}
	for _, l := range leading(p) {
		row := bpf.LacePublication{Network: uint32(p.NetworkID), Port: netPort(l.publish.To)}
		row.Addr.U8 = addr(l.to).U8
		rows[publicationKey(l.at, l.publish, s)] = row
	}
	return rows
}

func publicationKey(at netip.Addr, v plan.Publish, s Slot) bpf.LacePublicationKey {
	k := bpf.LacePublicationKey{Slot: uint32(s), Port: netPort(v.Port), Protocol: v.Protocol}
	if at.Is4() {
		k.V4 = 1
	}
	if !at.IsUnspecified() {
		k.Addr.U8 = addr(at).U8
	}
	return k
}

// publish makes the rows of a container in a slot those that are given.
func (m *Maps) publish(p plan.Port, s Slot, want publicationRows) error {
	all, err := m.Published.All()
	if err != nil {
		return err
	}
	have := publicationRows{}
	for k, v := range all {
		if a := unmapped(v.Addr.U8); Slot(k.Slot) == s && v.Network == uint32(p.NetworkID) && (a == p.V4 || a == p.V6) {
			have[k] = v
		}
	}
	_, err = m.Published.change(have, want)
	return err
}

// Publishers are the ports of this node that containers have, by network and address of those.
type Publishers map[publisher][]plan.Publish

type publisher struct {
	network topology.NetworkID
	addr    netip.Addr
}

// Publishers reads who has which ports in the active generation: a fresh agent knows it from nowhere else.
func (m *Maps) Publishers() (Publishers, error) {
	s, err := m.active()
	if err != nil {
		return nil, err
	}
	rows, err := m.Published.All()
	if err != nil {
		return nil, err
	}
	all := Publishers{}
	for k, v := range rows {
		if Slot(k.Slot) == s {
			who := publisher{topology.NetworkID(v.Network), unmapped(v.Addr.U8)}
			all[who] = append(all[who], publishOf(k, v))
		}
	}
	return all, nil
}

// publishOf reads a row. Its address is 0.0.0.0 or :: for every address of the family.
func publishOf(k bpf.LacePublicationKey, v bpf.LacePublication) plan.Publish {
	p := plan.Publish{Address: unmapped(k.Addr.U8), Protocol: k.Protocol, Port: hostPort(k.Port), To: hostPort(v.Port)}
	if k.V4 == 1 && p.Address.IsUnspecified() {
		p.Address = netip.IPv4Unspecified()
	}
	return p
}

// Of are those of one container, sorted by protocol, port and address: a port that every address of all its families has is one again.
func (p Publishers) Of(a plan.Attachment) []plan.Publish {
	var out []plan.Publish
	count := map[plan.Publish]int{} // families in which a port is had by every address
	families := 0
	for _, at := range []netip.Addr{a.V4, a.V6} {
		if !at.IsValid() {
			continue
		}
		families++
		for _, v := range p[publisher{a.NetworkID, at}] {
			if out = append(out, v); v.Address.IsUnspecified() {
				count[everywhere(v)]++
			}
		}
	}
	for i, v := range out {
		if v.Address.IsUnspecified() && count[everywhere(v)] == families {
			out[i] = everywhere(v)
		}
	}
	slices.SortFunc(out, func(a, b plan.Publish) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port), a.Address.Compare(b.Address))
	})
	return slices.Compact(out)
}

// everywhere is the same port, of all families.
func everywhere(v plan.Publish) plan.Publish {
	v.Address = netip.Addr{}
	return v
}
