// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// outsideStatus is what lies between the overlay, the host and the outside.
type outsideStatus struct {
	Host      *hostStatus       `json:"host,omitempty"` // nothing: the topology joins no network with the host or the outside
	Externals []externalStatus  `json:"externals"`
	Egresses  []egressStatus    `json:"egresses"`  // interfaces by which packets leave
	Published []publishedStatus `json:"published"` // ports of this node that are containers'

	masquerade topology.Masquerade
}

// hostStatus is how the host meets the overlay.
type hostStatus struct {
	Interface string         `json:"interface"`   // lc-host
	Present   bool           `json:"present"`     // it is there
	V4        netip.Addr     `json:"v4,omitzero"` // what the host calls itself to containers
	V6        netip.Addr     `json:"v6,omitzero"`
	Routes    []netip.Prefix `json:"routes"` // what it reaches
}

// externalStatus is an external network and who is peered with it, as this node has it.
type externalStatus struct {
	plan.External
	From []openedBy `json:"from"` // that may open flows to it
	To   []string   `json:"to"`   // that it may open flows to
}

// openedBy is a network that may open flows to an external one.
type openedBy struct {
	Network    string `json:"network"`
	Masquerade bool   `json:"masquerade,omitempty"`
	Node       string `json:"node,omitempty"` // that packets leave by, where it is another one
}

// egressStatus is an interface by which packets leave, and as what containers are masqueraded there.
type egressStatus struct {
	Interface string     `json:"interface"`
	V4        netip.Addr `json:"v4,omitzero"`
	V6        netip.Addr `json:"v6,omitzero"`
}

// publishedStatus is a port of this node that is a container's.
type publishedStatus struct {
	Address   netip.Addr `json:"address,omitzero"` // of this node; nothing: every one
	Port      uint16     `json:"port"`
	Protocol  string     `json:"protocol"`
	To        uint16     `json:"to"` // that the container listens at
	Container string     `json:"container"`
	Name      string     `json:"name,omitempty"`
	Network   string     `json:"network"`
}

func (st *status) readOutside(dev *netdev.Handle, p *plan.Plan) error {
	st.masquerade = p.Masquerade
	for _, e := range p.Externals {
		st.Externals = append(st.Externals, st.external(p, e))
	}
	if len(p.Externals) == 0 && len(p.HostRoutes) == 0 {
		return nil
	}
	o, err := dev.Outlook(p)
	if err != nil {
		return err
	}
	for _, e := range o.Egresses() {
		st.Egresses = append(st.Egresses, egressStatus{e.Name, e.V4, e.V6})
	}
	side := o.HostSide()
	st.Host = &hostStatus{Interface: plan.HostSide, Present: side.Stack != 0, V4: side.V4, V6: side.V6,
		Routes: append([]netip.Prefix{}, p.HostRoutes...)} // a list, also where it is empty
	return nil
}

func (st *status) external(p *plan.Plan, e plan.External) externalStatus {
	row := externalStatus{External: e, From: []openedBy{}, To: []string{}}
	for _, peering := range p.Peerings {
		switch {
		case peering.To == e.ID:
			row.From = append(row.From, openedBy{st.names[uint32(peering.From)], peering.Masquerade, peerName(p, peering.Peer)})
		case peering.From == e.ID:
			row.To = append(row.To, st.names[uint32(peering.To)])
		}
	}
	row.From, row.To = slices.Compact(row.From), slices.Compact(row.To) // peerings are told by prefix, in the order of networks
	return row
}

// peerName is the name of another node by its index, "" of 0.
func peerName(p *plan.Plan, index uint32) string {
	if peer := peerOf(p, index); peer != nil {
		return peer.Name
	}
	return ""
}

func (st *status) readPublished(m *maps.Maps) error {
	publishers, err := m.Publishers()
	if err != nil {
		return err
	}
	for _, a := range st.attached {
		for _, p := range publishers.Of(a) {
			st.Published = append(st.Published, publishedStatus{p.Address, p.Port, protocolName(p.Protocol), p.To, a.Container, a.Name, a.Network})
		}
	}
	slices.SortStableFunc(st.Published, func(a, b publishedStatus) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol), a.Address.Compare(b.Address))
	})
	return nil
}

// print leaves out what the topology has none of.
func (o *outsideStatus) print(w io.Writer) {
	if h := o.Host; h != nil {
		fmt.Fprintf(w, "\nHOST\tIPV4\tIPV6\tREACHES\n%s\t%s\t%s\t%v\n", h.side(), text(h.V4), text(h.V6), h.Routes)
	}
	if len(o.Externals) > 0 {
		fmt.Fprintf(w, "\nEXTERNAL\tID\tPREFIXES\tOPENED FROM\tOPENS TO\n")
	}
	for _, e := range o.Externals {
		fmt.Fprintf(w, "%s\t%d\t%v\t%s\t%s\n", e.Name, e.ID, e.Prefixes, e.from(), cmp.Or(strings.Join(e.To, ", "), "-"))
	}
	if len(o.Externals) > 0 {
		fmt.Fprintf(w, "\nWAY OUT\tAS IPV4\tAS IPV6\tPORTS\n")
	}
	for _, e := range o.Egresses {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", e.Interface, text(e.V4), text(e.V6), o.masquerade)
	}
	if len(o.Published) > 0 {
		fmt.Fprintf(w, "\nPUBLISHED\tPORT\tCONTAINER\tNETWORK\n")
	}
	for _, p := range o.Published {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", p.at(), p.To, cmp.Or(p.Name, p.Container), p.Network)
	}
}

func (h *hostStatus) side() string {
	if !h.Present {
		return h.Interface + " is not there"
	}
	return h.Interface
}

// from is "web masqueraded, db by edge-2".
func (e externalStatus) from() string {
	var words []string
	for _, o := range e.From {
		s := o.Network
		if o.Masquerade {
			s += " masqueraded"
		}
		if o.Node != "" {
			s += " by " + o.Node
		}
		words = append(words, s)
	}
	return cmp.Or(strings.Join(words, ", "), "-")
}

// at is "192.0.2.1:8080/tcp", or "8080/tcp" at every address.
func (p publishedStatus) at() string {
	at := fmt.Sprint(p.Port)
	if p.Address.IsValid() {
		at = netip.AddrPortFrom(p.Address, p.Port).String()
	}
	return at + "/" + p.Protocol
}
