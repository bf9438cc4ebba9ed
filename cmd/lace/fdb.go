// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"text/tabwriter"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Kinds of what `lace fdb` knows.
const (
	atPort     = "port"     // of a container or device here
	atEndpoint = "endpoint" // of another node, as the topology declares
	atLearned  = "learned"  // of another node, as its frames say
)

// known is one line of `lace fdb`: a MAC address of an L2 network, and where it is.
type known struct {
	MAC       plan.MAC           `json:"mac"`
	Network   string             `json:"network"` // its name, or its number where the topology has none
	ID        topology.NetworkID `json:"id"`
	Kind      string             `json:"kind"`                // "port", "endpoint" or "learned"
	Container string             `json:"container,omitempty"` // of a port
	Name      string             `json:"name,omitempty"`      // of the container, device or endpoint
	Interface string             `json:"interface,omitempty"` // of a port: its host end
	Node      string             `json:"node,omitempty"`      // the other one
	SID       netip.Addr         `json:"sid,omitzero"`        // where frames for an endpoint are sent
	Age       *int64             `json:"age,omitempty"`       // seconds since a learned one was last seen
}

func runFDB(_ context.Context, e *env, args []string) error {
	flags := newFlags("fdb")
	file := flags.String("config", conf.DefaultFile, "settings `FILE`")
	asJSON := flags.Bool("json", false, "print JSON")
	network := flags.String("network", "", "only of this `network`")
	if err := parseFlags(flags, args, 0); err != nil {
		return err
	}
	s, err := agentSettings("fdb", []string{"--config", *file})
	if err != nil {
		return err
	}
	m, done, err := hook.OpenMaps(s.BPFFS)
	if err != nil {
		return err
	}
	defer done()
	n, err := newNames(e, s)
	if err != nil {
		return err
	}
	defer n.close()
	all, err := n.stations(m, *network)
	if err != nil {
		return err
	}
	if *asJSON {
		return printJSON(e.stdout, all)
	}
	return printStations(e.stdout, all)
}

// stations reads the tables: they bound what there may be. An empty network asks for all.
func (n *names) stations(m *maps.Maps, network string) ([]known, error) {
	generation, err := m.Generation()
	if err != nil {
		return nil, err
	}
	rows, err := m.FDB.All()
	if err != nil {
		return nil, err
	}
	all := []known{}
	add := func(k known) {
		if network == "" || k.Network == network {
			all = append(all, k)
		}
	}
	for k, row := range rows {
		if id := maps.Network(k.Scope); maps.Scope(id, maps.SlotOf(generation)) == k.Scope {
			add(n.station(id, k.Mac.U8, row))
		}
	}
	err = m.EachLearned(func(s maps.Sighting) error {
		age := int64(s.Age.Seconds())
		add(known{MAC: s.MAC, Network: n.network(uint32(s.Network)), ID: s.Network, Kind: atLearned, Node: n.nodeAt(s.Locator), Age: &age})
		return nil
	})
	slices.SortFunc(all, func(a, b known) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), slices.Compare(a.MAC[:], b.MAC[:]), cmp.Compare(a.Kind, b.Kind))
	})
	return all, err
}

// station names a row of the table.
func (n *names) station(id topology.NetworkID, mac plan.MAC, row bpf.LaceStation) known {
	k := known{MAC: mac, Network: n.network(uint32(id)), ID: id}
	if row.Ifindex != 0 {
		a := n.ports[row.Ifindex]
		k.Kind, k.Container, k.Name, k.Interface = atPort, a.Container, a.Name, n.link(row.Ifindex)
		return k
	}
	k.Kind, k.SID = atEndpoint, netip.AddrFrom16(row.Sid.U8)
	k.Name, k.Node = n.endpoints[stationKey{id, mac}], n.peer(row.Peer, k.SID)
	return k
}

// where is "web, interface lace0", "nas-2 at edge-2" or "edge-2".
func (k known) where() string {
	switch {
	case k.Kind == atPort:
		return cmp.Or(k.Name, shortID(k.Container), "?") + ", interface " + k.Interface
	case k.Name != "":
		return k.Name + " at " + k.Node
	}
	return cmp.Or(k.Node, "a node that is gone")
}

func printStations(out io.Writer, all []known) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NETWORK\tMAC\tKIND\tAGE\tWHERE")
	for _, k := range all {
		age := "-"
		if k.Age != nil {
			age = span(*k.Age)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", k.Network, k.MAC, k.Kind, age, k.where())
	}
	return w.Flush()
}
