// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
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
	Networks []plan.Network  `json:"networks"`
	Peers    []peerStatus    `json:"peers"`
	Ports    []portStatus    `json:"ports"`
	Counters []counterStatus `json:"counters"`
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
		enc := json.NewEncoder(e.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(st)
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
	st := &status{Node: node, Agent: agentRuns(s.HookSocket), Networks: []plan.Network{}, Peers: []peerStatus{},
		Ports: []portStatus{}, Counters: []counterStatus{}}
	if p, err := st.readTopology(s.Topology); err != nil {
		st.Problem = err.Error()
	} else if err := st.readPeers(dev, p); err != nil {
		return nil, err
	}
	if err := st.readPorts(dev); err != nil {
		return nil, err
	}
	return st, st.readCounters(s.BPFFS)
}

func (st *status) readTopology(file string) (*plan.Plan, error) {
	t, err := topology.Load(file)
	if err != nil {
		return nil, err
	}
	p, err := plan.Build(t, st.Node, nil)
	if err != nil {
		return nil, err
	}
	st.Topology, st.Networks = t.Hash.String(), append(st.Networks, p.Networks...)
	return p, nil
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
		st.Ports = append(st.Ports, portStatus{Container: a.Container, Name: a.Name, Network: a.Network, V4: a.V4, V6: a.V6,
			MAC: a.MAC.String(), HostIf: p.HostIf, Up: p.Up, MTU: p.MTU})
	}
	slices.SortFunc(st.Ports, func(a, b portStatus) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), a.V4.Compare(b.V4), a.V6.Compare(b.V6))
	})
	return nil
}

func (st *status) readCounters(bpffs string) error {
	m, done, err := hook.OpenMaps(bpffs)
	if err != nil {
		return err
	}
	defer done()
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

func (st *status) print(out io.Writer) error {
	agent := "running"
	if !st.Agent {
		agent = "not running: traffic goes on, containers that ask for Lace are refused"
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "node\t%s\ntopology\t%s\nagent\t%s\n", st.Node, cmp.Or(st.Topology, indented(st.Problem)), agent)
	fmt.Fprintf(w, "\nNETWORK\tID\tSID\tGATEWAYS\n")
	for _, n := range st.Networks {
		fmt.Fprintf(w, "%s\t%d\t%s\t%v\n", n.Name, n.ID, n.SID, n.Gateways)
	}
	fmt.Fprintf(w, "\nPEER\tLOCATOR\tNEXT HOP\n")
	for _, p := range st.Peers {
		fmt.Fprintf(w, "%s\t%s\t%s\n", p.Name, p.Locator, p.hop())
	}
	fmt.Fprintf(w, "\nCONTAINER\tNETWORK\tIPV4\tIPV6\tINTERFACE\tMTU\n")
	for _, p := range st.Ports {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\n", cmp.Or(p.Name, p.Container), p.Network, text(p.V4), text(p.V6), p.HostIf, p.MTU)
	}
	fmt.Fprintf(w, "\nREASON\tPACKETS\tBYTES\tMEANING\n")
	for _, c := range st.Counters {
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\n", c.Reason, c.Packets, c.Bytes, c.Help)
	}
	return w.Flush()
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
