// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// status is what `lace status` prints; it is read from the kernel, so it needs no running agent.
type status struct {
	Node     string          `json:"node"`
	Topology string          `json:"topology"`
	Problem  string          `json:"problem,omitempty"` // why the topology file cannot be told of
	Agent    bool            `json:"agent"`
	Networks []networkStatus `json:"networks"`
	Peers    []peerStatus    `json:"peers"`
	Ports    []portStatus    `json:"ports"`
	outsideStatus
	Conntrack  fill            `json:"conntrack"`
	Generation uint32          `json:"generation"` // of the tables that are active
	Counters   []counterStatus `json:"counters"`   // of the node
	Traffic    []trafficStatus `json:"traffic"`    // of each network

	names    map[uint32]string // of networks
	attached []plan.Attachment
}

// networkStatus is a network of this node.
type networkStatus struct {
	plan.Network
	Segment *segmentStatus `json:"segment,omitempty"` // of an L2 network
}

// segmentStatus is what an L2 network has more.
type segmentStatus struct {
	Gateways  []netip.Addr   `json:"gateways"`  // declared
	Pools     []netip.Prefix `json:"pools"`     // this node's
	Nodes     []string       `json:"nodes"`     // the others that have it
	Endpoints int            `json:"endpoints"` // that the topology declares, at all nodes
	Ports     int            `json:"ports"`     // containers and devices here
	Learned   int            `json:"learned"`   // MAC addresses that only frames of other nodes tell of
}

type peerStatus struct {
	Name    string     `json:"name"`
	Locator string     `json:"locator"`
	Gateway netip.Addr `json:"gateway"`
	MAC     string     `json:"mac"`
	Problem string     `json:"problem,omitempty"`
}

type portStatus struct {
	Container string     `json:"container"`
	Name      string     `json:"name,omitempty"`
	Network   string     `json:"network"`
	V4        netip.Addr `json:"v4"`
	V6        netip.Addr `json:"v6"`
	MAC       string     `json:"mac"`
	HostIf    string     `json:"interface"`
	IfName    string     `json:"if_name"`          // in the container
	Device    bool       `json:"device,omitempty"` // a device of the host that was given by name
	Up        bool       `json:"up"`
	MTU       int        `json:"mtu"`
}

type counterStatus struct {
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
	Refused bool   `json:"refused"`
	Help    string `json:"help"`
}

// trafficStatus is a reason's count in one network: that of the container on this node.
type trafficStatus struct {
	Network string `json:"network"` // its name, or its number where the topology has none; "": not known
	ID      uint32 `json:"id"`
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
	Refused bool   `json:"refused"`
}

func runStatus(_ context.Context, e *env, args []string) error {
	flags := newFlags("status")
	file := flags.String("config", conf.DefaultFile, "settings `FILE`")
	asJSON := flags.Bool("json", false, "print JSON")
	if err := parseFlags(flags, args, 0); err != nil {
		return err
	}
	s, err := agentSettings("status", []string{"--config", *file})
	if err != nil {
		return err
	}
	st, err := readStatus(e, s)
	if err != nil {
		return err
	}
	if *asJSON {
		return printJSON(e.stdout, st)
	}
	return st.print(e.stdout)
}

// readStatus goes on without a topology that makes sense: what the kernel holds does too.
func readStatus(e *env, s conf.Settings) (*status, error) {
	node, err := nodeName(e, s.Node)
	if err != nil {
		return nil, err
	}
	dev, err := netdev.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	// Empty lists, not null, for the readers of the JSON.
	st := &status{Node: node, Agent: agentRuns(s.HookSocket), Networks: []networkStatus{}, Peers: []peerStatus{},
		Ports: []portStatus{}, Counters: []counterStatus{}, Traffic: []trafficStatus{},
		outsideStatus: outsideStatus{Externals: []externalStatus{}, Egresses: []egressStatus{}, Published: []publishedStatus{}}}
	if p, err := st.readTopology(s.Topology); err != nil {
		st.Problem = err.Error()
	} else if err := errors.Join(st.readPeers(dev, p), st.readOutside(dev, p)); err != nil {
		return nil, err
	}
	if err := st.readPorts(dev); err != nil {
		return nil, err
	}
	return st, st.readTables(s.BPFFS)
}

func (st *status) readTopology(file string) (*plan.Plan, error) {
	t, err := topology.Load(file)
	if err != nil {
		return nil, err
	}
	st.names = networkNames(t)
	p, err := plan.Build(t, st.Node, nil)
	if err != nil {
		return nil, err
	}
	st.Topology = t.Hash.String()
	for _, planned := range p.Networks {
		row := networkStatus{Network: planned}
		if n, ok := t.Network(planned.Name); ok && n.Type == topology.L2 {
			row.Segment = segmentOf(t, n, st.Node)
		}
		st.Networks = append(st.Networks, row)
	}
	return p, nil
}

func segmentOf(t *topology.Topology, n *topology.Network, node string) *segmentStatus {
	s := &segmentStatus{Gateways: []netip.Addr{}, Pools: []netip.Prefix{}, Nodes: []string{}, Endpoints: len(n.Endpoints())}
	own := n.Block(node)
	for _, pool := range []netip.Prefix{own.V4, own.V6} {
		if pool.IsValid() {
			s.Pools = append(s.Pools, pool)
		}
	}
	for _, g := range []netip.Addr{n.Gateway4, n.Gateway6} {
		if g.IsValid() {
			s.Gateways = append(s.Gateways, g)
		}
	}
	for _, other := range t.Nodes {
		if other.Name != node && n.On(other.Name) {
			s.Nodes = append(s.Nodes, other.Name)
		}
	}
	return s
}

// segment is what is told of an L2 network; nil where there is none of that number.
func (st *status) segment(id topology.NetworkID) *segmentStatus {
	for _, n := range st.Networks {
		if n.ID == id {
			return n.Segment
		}
	}
	return nil
}

func (st *status) readPeers(dev *netdev.Handle, p *plan.Plan) error {
	hops, err := dev.LookNexthops(p)
	if err != nil {
		return err
	}
	for i, h := range hops {
		row := peerStatus{Name: p.Peers[i].Name, Locator: p.Peers[i].Locator.String(), Gateway: h.Gateway, Problem: h.Problem}
		if h.Known && !h.Raw {
			row.MAC = h.DstMAC.String()
		}
		st.Peers = append(st.Peers, row)
	}
	return nil
}

func (st *status) readPorts(dev *netdev.Handle) error {
	ports, err := dev.Ports()
	if err != nil {
		return err
	}
	for _, p := range ports {
		a := p.Attachment
		st.attached = append(st.attached, a)
		st.Ports = append(st.Ports, portStatus{Container: a.Container, Name: a.Name, Network: a.Network, V4: a.V4, V6: a.V6,
			MAC: a.MAC.String(), HostIf: p.HostIf, IfName: a.IfName, Device: a.Device != "", Up: p.Up, MTU: p.MTU})
		if s := st.segment(a.NetworkID); s != nil {
			s.Ports++
		}
	}
	slices.SortFunc(st.Ports, func(a, b portStatus) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), a.V4.Compare(b.V4), a.V6.Compare(b.V6))
	})
	return nil
}

func (st *status) readTables(bpffs string) error {
	m, done, err := hook.OpenMaps(bpffs)
	if err != nil {
		return err
	}
	defer done()
	if st.Generation, err = m.Generation(); err != nil {
		return err
	}
	if err := st.readConntrack(m); err != nil {
		return err
	}
	if err := st.readCounters(m); err != nil {
		return err
	}
	if err := errors.Join(st.readLearned(m), st.readPublished(m)); err != nil {
		return err
	}
	return st.readTraffic(m)
}

func (st *status) readLearned(m *maps.Maps) error {
	return m.EachLearned(func(l maps.Sighting) error {
		if s := st.segment(l.Network); s != nil {
			s.Learned++
		}
		return nil
	})
}

func (st *status) readConntrack(m *maps.Maps) error {
	table, err := m.OpenFlows()
	if err != nil {
		return err
	}
	defer table.Close()
	st.Conntrack.Max = int(table.MaxEntries())
	return maps.EachFlow(table, func(maps.Flow) error { st.Conntrack.Entries++; return nil })
}

func (st *status) readCounters(m *maps.Maps) error {
	counters, err := m.Counters()
	if err != nil {
		return err
	}
	for _, c := range counters {
		st.Counters = append(st.Counters, counterStatus{Reason: maps.ReasonName(c.Reason), Packets: c.Packets, Bytes: c.Bytes,
			Refused: maps.IsRefusal(c.Reason), Help: maps.ReasonHelp(c.Reason)})
	}
	return nil
}

func (st *status) readTraffic(m *maps.Maps) error {
	counters, err := m.NetworkCounters()
	if err != nil {
		return err
	}
	for _, c := range counters {
		name := st.names[c.Network]
		if name == "" && c.Network != 0 {
			name = strconv.FormatUint(uint64(c.Network), 10)
		}
		st.Traffic = append(st.Traffic, trafficStatus{Network: name, ID: c.Network, Reason: maps.ReasonName(c.Reason),
			Packets: c.Packets, Bytes: c.Bytes, Refused: maps.IsRefusal(c.Reason)})
	}
	return nil
}

func (st *status) print(out io.Writer) error {
	agent := "running"
	if !st.Agent {
		agent = "not running: traffic goes on, containers that ask for Lace are refused"
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "node\t%s\ntopology\t%s\nagent\t%s\n", st.Node, cmp.Or(st.Topology, indented(st.Problem)), agent)
	st.printNetworks(w)
	fmt.Fprintf(w, "\nPEER\tLOCATOR\tNEXT HOP\n")
	for _, p := range st.Peers {
		fmt.Fprintf(w, "%s\t%s\t%s\n", p.Name, p.Locator, p.hop())
	}
	fmt.Fprintf(w, "\nCONTAINER\tNETWORK\tAS\tIPV4\tIPV6\tINTERFACE\tMTU\n")
	for _, p := range st.Ports {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\n", cmp.Or(p.Name, p.Container), p.Network, p.as(), text(p.V4), text(p.V6), p.HostIf, p.MTU)
	}
	st.outsideStatus.print(w)
	fmt.Fprintf(w, "\nCONNTRACK\tGENERATION\n%s\t%d\n", st.Conntrack, st.Generation)
	fmt.Fprintf(w, "\nREASON\tPACKETS\tBYTES\tMEANING\n")
	for _, c := range st.Counters {
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\n", c.Reason, c.Packets, c.Bytes, c.Help)
	}
	fmt.Fprintf(w, "\nNETWORK\tREASON\tPACKETS\tBYTES\n")
	for _, c := range st.Traffic {
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\n", cmp.Or(c.Network, "-"), c.Reason, c.Packets, c.Bytes)
	}
	return w.Flush()
}

func (st *status) printNetworks(w io.Writer) {
	segments := 0
	fmt.Fprintf(w, "\nNETWORK\tID\tTYPE\tSID\tGATEWAYS\n")
	for _, n := range st.Networks {
		gateways := fmt.Sprint(n.Gateways)
		if n.Segment != nil {
			segments++
			gateways = fmt.Sprint(n.Segment.Gateways)
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\n", n.Name, n.ID, n.Type, n.SID, gateways)
	}
	if segments == 0 {
		return
	}
	fmt.Fprintf(w, "\nL2 NETWORK\tPOOLS\tFLOOD\tPORTS\tENDPOINTS\tLEARNED\tNODES\n")
	for _, n := range st.Networks {
		if s := n.Segment; s != nil {
			fmt.Fprintf(w, "%s\t%v\t%s\t%d\t%d\t%d\t%s\n", n.Name, s.Pools, n.flood(), s.Ports, s.Endpoints, s.Learned, listed(s.Nodes, "other"))
		}
	}
}

func (n networkStatus) flood() string {
	if !n.Flood {
		return "off"
	}
	return fmt.Sprintf("%d/s", n.FloodRate)
}

// as is the name of the interface in the container.
func (p portStatus) as() string {
	if p.Device {
		return "device"
	}
	return p.IfName
}

func (p peerStatus) hop() string {
	switch {
	case p.Problem != "":
		return p.Problem
	case p.MAC != "":
		return text(p.Gateway) + " " + p.MAC
	case p.Gateway.IsValid():
		return p.Gateway.String() + " (not resolved yet)"
	}
	return "point to point"
}

// indented keeps the lines of a text in the column behind the first.
func indented(s string) string { return strings.ReplaceAll(s, "\n", "\n\t") }

func text(a netip.Addr) string {
	if !a.IsValid() {
		return "-"
	}
	return a.String()
}
