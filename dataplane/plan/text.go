// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/lace-net/lace/topology"
)

// String is the text that WriteTo writes.
func (p *Plan) String() string {
	var b strings.Builder
	p.WriteTo(&b) // a Builder takes everything
	return b.String()
}

// WriteTo writes the plan for people: a head, and a section of aligned columns for each kind of
// object. The same plan always gives the same text.
func (p *Plan) WriteTo(w io.Writer) (int64, error) {
	var b bytes.Buffer
	p.head(&b)
	names := p.names()
	section(&b, "interfaces", p.interfaceRows())
	section(&b, "routes", p.routeRows())
	section(&b, "SIDs", p.sidRows(names))
	section(&b, "external networks", p.externalRows())
	section(&b, "blocks", p.blockRows(names))
	section(&b, "peerings", p.peeringRows(names))
	section(&b, "stations", p.stationRows(names))
	section(&b, "members", p.memberRows(names))
	section(&b, "masquerade", p.masqueradeRows())
	section(&b, "conntrack", p.conntrackRows())
	section(&b, "map entries", p.mapRows(names))
	section(&b, "ports", p.portRows())
	return b.WriteTo(w)
}

func (p *Plan) head(w io.Writer) {
	fmt.Fprintf(w, "node %s, topology %s\n", p.Node, p.Hash)
	uplinks := "interfaces with a default route"
	if len(p.Uplinks) > 0 {
		uplinks = strings.Join(p.Uplinks, ", ")
	}
	rows := [][]string{
		{"underlay", p.Underlay.String()},
		{"locator", fmt.Sprintf("%s in %s", p.Locator, p.LocatorBlock)},
		{"encapsulation", fmt.Sprintf("%s, %d bytes", p.Encapsulation, p.Encapsulation.Overhead())},
		{"l2-gso", p.L2GSO.String()},
		{"uplinks", uplinks},
	}
	if p.Via.IsValid() {
		rows = append(rows, []string{"via", p.Via.String()})
	}
	columns(w, rows)
}

// section leaves out what is empty.
func section(w io.Writer, title string, rows [][]string) {
	if len(rows) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s\n", title)
	columns(w, rows)
}

func columns(w io.Writer, rows [][]string) {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintf(t, "  %s\n", strings.Join(row, "\t"))
	}
	t.Flush()
}

// names are what people call the numbers of the plan.
type names struct {
	networks map[topology.NetworkID]string
	peers    map[uint32]string
}

func (p *Plan) names() names {
	n := names{map[topology.NetworkID]string{topology.HostsID: "hosts", topology.OutsideID: "outside"}, map[uint32]string{0: p.Node}}
	for _, network := range p.Networks {
		n.networks[network.ID] = network.Name
	}
	for _, network := range p.Foreign {
		n.networks[network.ID] = network.Name
	}
	for _, network := range p.Externals {
		n.networks[network.ID] = network.Name
	}
	for _, peer := range p.Peers {
		n.peers[peer.Index] = peer.Name
	}
	return n
}

// egress is the other node that a peering leads out of the overlay by, "" where there is none.
func (n names) egress(p Peering) string {
	if p.Peer == 0 {
		return ""
	}
	return n.peers[p.Peer]
}

// network is the name of a network, or its number where the plan has none of its own of it.
func (n names) network(id topology.NetworkID) string {
	return cmp.Or(n.networks[id], fmt.Sprint(id))
}

func (p *Plan) interfaceRows() [][]string {
	var rows [][]string
	for _, n := range p.Networks {
		rows = append(rows,
			[]string{n.VRF, "vrf", fmt.Sprintf("network %s, table %d", n.Name, n.Table)},
			[]string{n.Bridge, "bridge", fmt.Sprintf("in %s, %s", n.VRF, bridgeText(n))})
	}
	if p.hostSide() {
		rows = append(rows, []string{HostSide, "veth", "the host's own packets, peer " + HostPeer})
	}
	for _, port := range p.Ports {
		rows = append(rows, port.interfaceRow())
	}
	return rows
}

// hostSide says whether the host's own stack meets the overlay: packets go to and from it by HostSide.
func (p *Plan) hostSide() bool { return len(p.HostRoutes) > 0 || len(p.Externals) > 0 }

func bridgeText(n Network) string {
	if n.Type == topology.L2 {
		return "no address"
	}
	return fmt.Sprintf("%s, mac %s", join(n.Gateways), GatewayMAC)
}

func (p Port) interfaceRow() []string {
	if p.Device != "" {
		return []string{p.HostIf, "device", fmt.Sprintf("on %s, given by name", p.Bridge)}
	}
	return []string{p.HostIf, "veth", fmt.Sprintf("on %s, peer %s in %s", p.Bridge, p.IfName, p.Container)}
}

func (p *Plan) routeRows() [][]string {
	rows := [][]string{{"main", "unreachable " + p.Locator.String(), "own SIDs are the programs'"}}
	for _, peer := range p.Peers {
		rows = append(rows, []string{"main", peer.Locator.String(), p.toPeer(peer)})
	}
	for _, route := range p.HostRoutes {
		rows = append(rows, []string{"main", route.String(), "the host's own packets, out of " + HostSide})
	}
	for _, n := range p.Networks {
		rows = append(rows, []string{n.VRF, "unreachable default", "nothing falls through to the host"})
	}
	return rows
}

// toPeer says how a peer is reached, as far as the topology tells.
func (p *Plan) toPeer(peer Peer) string {
	if p.Via.IsValid() {
		return fmt.Sprintf("to %s (%s), via %s where not on-link", peer.Name, peer.Underlay, p.Via)
	}
	return fmt.Sprintf("to %s (%s)", peer.Name, peer.Underlay)
}

// sidRows has this node's own SIDs and those that it sends to, each once.
func (p *Plan) sidRows(names names) [][]string {
	var rows [][]string
	for _, n := range p.Networks {
		rows = append(rows, []string{n.SID.String(), "End.DT46", n.Name, "here"})
		if n.Type == topology.L2 {
			rows = append(rows, []string{n.SID2U.String(), "End.DT2U", n.Name, "here"}, []string{n.SID2M.String(), "End.DT2M", n.Name, "here"})
		}
	}
	rows = append(rows, p.egressRows(names)...)
	seen := map[Member]bool{}
	for _, to := range p.targets() {
		if !seen[to] {
			rows = append(rows, []string{to.SID.String(), "send", names.network(to.Network), "to " + names.peers[to.Peer]})
		}
		seen[to] = true
	}
	return rows
}

// egressRows are SIDs where this node takes what leaves the overlay here.
func (p *Plan) egressRows(names names) [][]string {
	var rows [][]string
	seen := map[topology.NetworkID]bool{}
	for _, peering := range p.Peerings {
		if id := peering.To; peering.External && peering.Peer == 0 && !seen[id] {
			seen[id] = true
			rows = append(rows, []string{p.Locator.SID(topology.EndDT46, id).String(), "End.DT46", names.network(id), "here"})
		}
	}
	return rows
}

// targets are network, peer and SID of all that is sent to.
func (p *Plan) targets() []Member {
	segments, hosts := map[topology.NetworkID]bool{}, map[uint32]topology.Locator{}
	for _, n := range p.Networks {
		segments[n.ID] = n.Type == topology.L2
	}
	for _, peer := range p.Peers {
		if peer.Kind == topology.KindHost {
			hosts[peer.Index] = peer.Locator
		}
	}
	var targets []Member
	for _, b := range p.Blocks {
		if b.Local {
			continue
		}
		targets = append(targets, Member{b.Network, b.Peer, b.SID})
		if locator, is := hosts[b.Peer]; is && segments[b.Network] { // frames for its pool
			targets = append(targets, Member{b.Network, b.Peer, locator.SID(topology.EndDT2U, b.Network)})
		}
	}
	for _, s := range p.Stations {
		targets = append(targets, Member{s.Network, s.Peer, s.SID})
	}
	for _, peering := range p.Peerings {
		if peering.Peer != 0 {
			targets = append(targets, Member{peering.To, peering.Peer, peering.SID})
		}
	}
	return append(targets, p.Members...)
}

func (p *Plan) blockRows(names names) [][]string {
	var rows [][]string
	for _, b := range p.Blocks {
		where := "here"
		if !b.Local {
			where = fmt.Sprintf("on %s", names.peers[b.Peer])
		}
		rows = append(rows, []string{names.network(b.Network), b.Prefix.String(), where})
	}
	return rows
}

// peeringRows leave out who answers: answers need no peering.
func (p *Plan) peeringRows(names names) [][]string {
	var rows [][]string
	for _, peering := range p.Peerings {
		rows = append(rows, []string{
			names.network(peering.From) + " > " + names.network(peering.To), peering.Prefix.String(),
			joinWords(outward(peering, names.egress(peering)), fmt.Sprintf("line %d", peering.Line)),
		})
	}
	return rows
}

// outward says how packets leave the overlay by a peering, "" where they do not.
func outward(p Peering, by string) string {
	how := ""
	if p.Masquerade {
		how = "masquerade"
	}
	if by != "" {
		how = joinWords(how, "by "+by)
	}
	return how
}

// joinWords leaves out what is empty.
func joinWords(words ...string) string {
	return strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), ", ")
}

func (p *Plan) externalRows() [][]string {
	var rows [][]string
	for _, e := range p.Externals {
		for _, prefix := range e.Prefixes {
			rows = append(rows, []string{e.Name, prefix.String(), fmt.Sprintf("line %d", e.Line)})
		}
	}
	return rows
}

// masqueradeRows are none where nothing is outside.
func (p *Plan) masqueradeRows() [][]string {
	if len(p.Externals) == 0 {
		return nil
	}
	return [][]string{{"ports", p.Masquerade.String()}}
}

func (p *Plan) stationRows(names names) [][]string {
	var rows [][]string
	for _, s := range p.Stations {
		rows = append(rows, []string{names.network(s.Network), s.MAC.String(), s.Name, "on " + names.peers[s.Peer], fmt.Sprintf("line %d", s.Line)})
	}
	return rows
}

func (p *Plan) memberRows(names names) [][]string {
	var rows [][]string
	for _, m := range p.Members {
		rows = append(rows, []string{names.network(m.Network), names.peers[m.Peer]})
	}
	return rows
}

func (p *Plan) conntrackRows() [][]string {
	c := p.Conntrack
	return [][]string{
		{"max", fmt.Sprintf("%d flows", c.Max)},
		{"tcp", fmt.Sprintf("opening %s, established %s, closing %s, closed %s", c.TCPOpening, c.TCPEstablished, c.TCPClosing, c.TCPClosed)},
		{"udp", fmt.Sprintf("new %s, answered %s", c.UDPNew, c.UDP)},
		{"icmp", c.ICMP.String()},
		{"other", c.Other.String()},
	}
}

// mapRows has map, key and value. What only the kernel knows, interface indexes, MTUs and the
// MAC addresses of the underlay, has its name in angle brackets.
func (p *Plan) mapRows(names names) [][]string {
	rows := [][]string{{"node_config", "0", fmt.Sprintf("locator %s, block %s, %s", p.Locator, p.LocatorBlock, p.Encapsulation)}}
	for _, n := range p.Networks {
		rows = append(rows, []string{"networks", fmt.Sprint(n.ID), networkValue(n)})
	}
	for _, n := range p.Foreign {
		rows = append(rows, []string{"networks", fmt.Sprint(n.ID), n.Name + ", not here"})
	}
	for _, n := range p.Externals {
		rows = append(rows, []string{"networks", fmt.Sprint(n.ID), n.Name + ", external"})
	}
	for _, peer := range p.Peers {
		rows = append(rows, []string{"peers", peer.Locator.String(), peerValue(peer, names)})
	}
	for _, peer := range p.Peers {
		rows = append(rows, []string{"nexthops", fmt.Sprint(peer.Index), fmt.Sprintf("<uplink>, <mac> towards %s", peer.Underlay)})
	}
	for _, b := range p.Blocks {
		rows = append(rows, []string{"blocks", fmt.Sprintf("%d %s", b.Network, b.Prefix), blockValue(b)})
	}
	for _, peering := range p.Peerings {
		rows = append(rows, []string{"peerings", fmt.Sprintf("%d %s", peering.From, peering.Prefix), peeringValue(peering)})
	}
	for _, n := range p.Externals {
		for _, prefix := range n.Prefixes {
			rows = append(rows, []string{"externals", prefix.String(), fmt.Sprintf("network %d, line %d", n.ID, n.Line)})
		}
	}
	for _, port := range p.Ports {
		rows = append(rows, []string{"ports", "<" + port.HostIf + ">", fmt.Sprintf("network %d, source %s, mac %s", port.NetworkID, port.Source, port.MAC)})
	}
	for _, port := range p.Ports {
		for _, a := range port.addresses() {
			rows = append(rows, []string{"endpoints", fmt.Sprintf("%d %s", port.NetworkID, a), fmt.Sprintf("<%s>, mac %s", port.HostIf, port.MAC)})
		}
	}
	for _, s := range p.Stations {
		for _, a := range s.Answers {
			rows = append(rows, []string{"endpoints", fmt.Sprintf("%d %s", s.Network, a), fmt.Sprintf("peer %d, mac %s", s.Peer, s.MAC)})
		}
	}
	return append(rows, p.segmentMapRows()...)
}

// segmentMapRows are those of L2 networks.
func (p *Plan) segmentMapRows() [][]string {
	var fdb, groups, members [][]string
	for _, s := range p.Stations {
		fdb = append(fdb, []string{"fdb", fmt.Sprintf("%d %s", s.Network, s.MAC), fmt.Sprintf("peer %d, SID %s", s.Peer, s.SID)})
	}
	for _, port := range p.Ports {
		if port.Type == topology.L2 {
			fdb = append(fdb, []string{"fdb", fmt.Sprintf("%d %s", port.NetworkID, port.MAC), "<" + port.HostIf + ">"})
		}
	}
	for _, n := range p.Networks {
		if !n.Flood {
			continue
		}
		here, others := p.group(n.ID)
		groups = append(groups, []string{"groups", fmt.Sprint(n.ID), fmt.Sprintf("%d ports, %d nodes", len(here), len(others))})
		for _, port := range here {
			members = append(members, []string{"members", fmt.Sprintf("%d <place>", n.ID), "<" + port.HostIf + ">"})
		}
		for i, m := range others {
			members = append(members, []string{"members", fmt.Sprintf("%d node %d", n.ID, i), fmt.Sprintf("peer %d, SID %s", m.Peer, m.SID)})
		}
	}
	return slices.Concat(fdb, groups, members)
}

// group is who gets copies of a network's frames for many.
func (p *Plan) group(id topology.NetworkID) (here []Port, others []Member) {
	for _, port := range p.Ports {
		if port.NetworkID == id {
			here = append(here, port)
		}
	}
	for _, m := range p.Members {
		if m.Network == id {
			others = append(others, m)
		}
	}
	return here, others
}

func networkValue(n Network) string {
	words := []string{n.Name}
	if n.Type == topology.L2 {
		words = append(words, "l2")
	}
	if n.Host {
		words = append(words, "host")
	}
	if n.Flood {
		words = append(words, "flood "+n.flood())
	}
	if n.Base6.IsValid() {
		words = append(words, "base "+n.Base6.String())
	}
	return strings.Join(words, ", ")
}

func peerValue(peer Peer, names names) string {
	if peer.Kind == topology.KindRouter && peer.SIDL2.IsValid() {
		return fmt.Sprintf("index %d, router of %s, takes frames at %s", peer.Index, names.network(peer.Network), peer.SIDL2)
	}
	if peer.Kind == topology.KindRouter {
		return fmt.Sprintf("index %d, router of %s", peer.Index, names.network(peer.Network))
	}
	return fmt.Sprintf("index %d", peer.Index)
}

func peeringValue(p Peering) string {
	network, by := fmt.Sprintf("network %d", p.To), ""
	if p.External {
		network += ", external"
	}
	if p.Peer != 0 {
		by = fmt.Sprintf("peer %d, SID %s", p.Peer, p.SID)
	}
	return joinWords(network, outward(p, by), fmt.Sprintf("line %d", p.Line))
}

func blockValue(b Block) string {
	if b.Local {
		return "local"
	}
	if b.Frames {
		return fmt.Sprintf("peer %d, frames only, SID %s", b.Peer, b.SID)
	}
	return fmt.Sprintf("peer %d, SID %s", b.Peer, b.SID)
}

func (p *Plan) portRows() [][]string {
	var rows [][]string
	for _, port := range p.Ports {
		rows = append(rows, []string{
			port.HostIf, port.Network, port.Container, cmp.Or(port.Name, "-"), port.IfName,
			join(port.addresses()), port.MAC.String(),
		})
	}
	return rows
}

// addresses are those that the port has.
func (p Port) addresses() []netip.Addr {
	return valid(p.V4, p.V6)
}

func valid(addrs ...netip.Addr) []netip.Addr {
	return slices.DeleteFunc(addrs, func(a netip.Addr) bool { return !a.IsValid() })
}

func join[T fmt.Stringer](list []T) string {
	words := make([]string, len(list))
	for i, v := range list {
		words[i] = v.String()
	}
	return strings.Join(words, " ")
}
