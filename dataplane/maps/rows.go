// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Segmenter is the name under which Sync finds the interface that cuts GSO frames among its devices. It has no port.
const Segmenter = "laces0"

// Device is the kernel's side of a port.
type Device struct {
	Index uint32
	MTU   uint16 // largest IP packet that the container takes
}

// Nexthop is the way to a peer.
type Nexthop struct {
	Peer     uint32 // plan.Peer.Index
	Ifindex  uint32 // 0: there is no way
	MTU      uint16 // largest IPv6 packet, outer header included
	Raw      bool   // the uplink has no Ethernet header
	Known    bool   // the MAC addresses are known
	Dst, Src plan.MAC
}

// PutPort makes a container known to the active generation: first where packets for it go, then what it may send.
func (m *Maps) PutPort(p plan.Port, dev Device) error {
	s, err := m.active()
	if err != nil {
		return err
	}
	network, ok, err := m.Networks.Get(Scope(p.NetworkID, s))
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("make container %s known to the programs: network %d is not in their tables: apply the topology first", p.Container, p.NetworkID)
	}
	for k, v := range endpointRows(p, dev, s) {
		if err := m.Endpoints.Put(k, v); err != nil {
			return err
		}
	}
	for k, v := range stationOf(p, dev, s) {
		if err := m.FDB.Put(k, v); err != nil {
			return err
		}
	}
	if err := m.putMember(p, dev, s); err != nil {
		return err
	}
	if err := m.publish(p, s, publicationRowsOf(p, s)); err != nil {
		return err
	}
	return m.Ports.Put(bpf.LacePortKey{Ifindex: dev.Index, Slot: uint32(s)}, portRow(p, network.Traffic, dev))
}

// DeletePort forgets a container; what is not there is fine. index is that of its interface; 0: not known. Flows of the
// container go on until DecideAgain.
func (m *Maps) DeletePort(p plan.Port, index uint32) error {
	s, err := m.active()
	if err != nil {
		return err
	}
	errs := []error{m.publish(p, s, nil)}
	for k := range endpointRows(p, Device{}, s) {
		errs = append(errs, m.Endpoints.Delete(k))
	}
	for k := range stationOf(p, Device{}, s) {
		errs = append(errs, m.FDB.Delete(k))
	}
	if index != 0 {
		errs = append(errs, m.deleteMember(p.NetworkID, index, s))
		errs = append(errs, m.Ports.Delete(bpf.LacePortKey{Ifindex: index, Slot: uint32(s)}))
	}
	return errors.Join(errs...)
}

// PortTypes are the types of the networks that the interfaces in the active generation are in, by index.
func (m *Maps) PortTypes() (map[int]topology.NetworkType, error) {
	s, err := m.active()
	if err != nil {
		return nil, err
	}
	ports, err := m.Ports.All()
	if err != nil {
		return nil, err
	}
	networks, err := m.Networks.All()
	if err != nil {
		return nil, err
	}
	types := map[int]topology.NetworkType{}
	for k, p := range ports {
		n, ok := networks[Scope(topology.NetworkID(p.Network), s)]
		if Slot(k.Slot) == s && ok {
			types[int(k.Ifindex)] = typeOf(n)
		}
	}
	return types, nil
}

func typeOf(row bpf.LaceNetwork) topology.NetworkType {
	if row.Flags&uint32(bpf.LaceNetworkFlagsNETWORK_L2) != 0 {
		return topology.L2
	}
	return topology.L3
}

// rows are what a slot holds, but for the nexthops.
type rows struct {
	config    bpf.LaceConfig
	networks  map[uint32]bpf.LaceNetwork
	blocks    map[bpf.LaceBlockKey]bpf.LaceBlock
	peerings  map[bpf.LacePeeringKey]bpf.LacePeering
	externals map[bpf.LaceExternalKey]bpf.LaceExternal
	peers     map[bpf.LacePeerKey]bpf.LacePeer
	ports     map[bpf.LacePortKey]bpf.LacePort
	endpoints map[bpf.LaceEndpointKey]bpf.LaceEndpoint
	published publicationRows
	stations  stationRows
	groups    map[uint32]bpf.LaceGroup
	members   memberRows
}

// count is how many rows there are, but for those of arrays.
func (r *rows) count() int {
	return len(r.networks) + len(r.blocks) + len(r.peerings) + len(r.externals) + len(r.peers) + len(r.ports) +
		len(r.endpoints) + len(r.published) + len(r.stations) + len(r.groups) + len(r.members)
}

// empty says whether a slot takes no memory: that of arrays is there whether they are used or not.
func (r *rows) empty() bool { return r.count() == 0 }

// sameConfig says whether what is there and what is wanted differ in containers at most.
func (r *rows) sameConfig(o *rows) bool {
	return r.config == o.config && maps.Equal(r.networks, o.networks) && maps.Equal(r.blocks, o.blocks) &&
		maps.Equal(r.peerings, o.peerings) && maps.Equal(r.externals, o.externals) && maps.Equal(r.peers, o.peers) && sameStations(r.stations, o.stations) && sameGroups(r, o)
}

// read reads both slots.
func (m *Maps) read() ([2]*rows, error) {
	networks, err := split(m.Networks, slotOfScope)
	blocks, err2 := split(m.Blocks, func(k bpf.LaceBlockKey) Slot { return slotOfScope(k.Scope) })
	peerings, err3 := split(m.Peerings, func(k bpf.LacePeeringKey) Slot { return slotOfScope(k.Scope) })
	externals, err4 := split(m.Externals, func(k bpf.LaceExternalKey) Slot { return Slot(k.Slot &^ (1 << familyBit)) })
	peers, err5 := split(m.Peers, func(k bpf.LacePeerKey) Slot { return Slot(k.Slot) })
	ports, err6 := split(m.Ports, func(k bpf.LacePortKey) Slot { return Slot(k.Slot) })
	endpoints, err7 := split(m.Endpoints, func(k bpf.LaceEndpointKey) Slot { return slotOfScope(k.Scope) })
	published, err8 := split(m.Published, func(k bpf.LacePublicationKey) Slot { return Slot(k.Slot) })
	stations, err9 := split(m.FDB, func(k bpf.LaceFdbKey) Slot { return slotOfScope(k.Scope) })
	groups, err10 := split(m.Groups, slotOfScope)
	members, err11 := split(m.Members, func(k bpf.LaceMemberKey) Slot { return slotOfScope(k.Scope) })
	errs := []error{err, err2, err3, err4, err5, err6, err7, err8, err9, err10, err11}
	slots := [2]*rows{}
	for i := range slots {
		s := Slot(i)
		config, err := m.readConfig(s)
		errs = append(errs, err)
		slots[s] = &rows{config, networks[s], blocks[s], peerings[s], externals[s], peers[s], ports[s], endpoints[s], published[s], stations[s], groups[s], members[s]}
	}
	return slots, errors.Join(errs...)
}

func (m *Maps) readConfig(s Slot) (bpf.LaceConfig, error) {
	var c bpf.LaceConfig
	if err := m.config.Lookup(uint32(s), &c); err != nil {
		return c, fmt.Errorf("read map node_config: %w", err)
	}
	return c, nil
}

// split reads a table by slot.
func split[K, V comparable](t Table[K, V], slot func(K) Slot) (map[Slot]map[K]V, error) {
	out := map[Slot]map[K]V{0: {}, 1: {}}
	all, err := t.All()
	for k, v := range all {
		out[slot(k)][k] = v
	}
	return out, err
}

// wanted is what a generation is made of.
type wanted struct {
	plan     *plan.Plan
	vrf      bool
	devices  map[string]Device
	nexthops []Nexthop
	numbers  map[topology.NetworkID]uint32 // of the networks' counters
	fresh    []uint32                      // those among them that have to begin at zero
	places   map[member]uint32             // that ports have among those that get copies
}

func (w *wanted) rows(s Slot) *rows {
	r := &rows{
		config: w.configRow(), networks: w.networkRows(s), blocks: blockRows(w.plan, s),
		peerings: peeringRows(w.plan, s), externals: externalRows(w.plan, s), peers: peerRows(w.plan, s),
		ports: map[bpf.LacePortKey]bpf.LacePort{}, endpoints: answerRows(w.plan, s), published: publicationRows{},
		stations: w.stationRows(s),
	}
	r.groups, r.members = w.groupRows(s)
	for _, port := range w.plan.Ports {
		dev, ok := w.devices[port.HostIf]
		if !ok {
			continue
		}
		r.ports[bpf.LacePortKey{Ifindex: dev.Index, Slot: uint32(s)}] = portRow(port, w.numbers[port.NetworkID], dev)
		maps.Copy(r.endpoints, endpointRows(port, dev, s))
		maps.Copy(r.published, publicationRowsOf(port, s))
		maps.Copy(r.stations, stationOf(port, dev, s))
	}
	w.join(r, s)
	return r
}

func (w *wanted) configRow() bpf.LaceConfig {
	p := w.plan
	c := bpf.LaceConfig{LocatorBits: uint8(p.Locator.Bits()), Timeouts: timeoutsRow(p.Conntrack), Segmenter: w.devices[Segmenter].Index}
	c.Locator, c.LocatorMask = firstHalf(p.Locator.Prefix)
	c.LocatorBlock, c.LocatorBlockMask = firstHalf(p.LocatorBlock)
	if p.Encapsulation.Overhead() > 40 {
		c.Srh = 1
	}
	if w.vrf {
		c.Vrf = 1
	}
	if p.L2GSO == topology.Segment {
		c.L2Gso = uint8(bpf.LaceL2GsoL2GSO_SEGMENT)
	}
	c.Gateway.U8 = plan.GatewayMAC
	c.Outside = uint8(min(len(p.Externals), 255))
	c.FirstPort, c.LastPort = masqueradePorts(p.Masquerade)
	return c
}

func timeoutsRow(c topology.Conntrack) bpf.LaceTimeouts {
	return bpf.LaceTimeouts{
		TcpOpening: Ticks(c.TCPOpening), TcpEstablished: Ticks(c.TCPEstablished), TcpClosing: Ticks(c.TCPClosing),
		TcpClosed: Ticks(c.TCPClosed), UdpNew: Ticks(c.UDPNew), Udp: Ticks(c.UDP), Icmp: Ticks(c.ICMP), Other: Ticks(c.Other),
	}
}

func portRow(p plan.Port, traffic uint32, dev Device) bpf.LacePort {
	row := bpf.LacePort{
		Network:  uint32(p.NetworkID),
		V4:       be32(p.V4),
		Gateway4: be32(p.Gateway4),
		Traffic:  traffic,
		Mtu:      dev.MTU,
	}
	row.V6.U8, row.Gateway6.U8, row.Source.U8 = addr(p.V6).U8, addr(p.Gateway6).U8, addr(p.Source).U8
	row.Mac.U8 = p.MAC
	if p.V4.IsValid() {
		row.Flags |= uint32(bpf.LacePortFlagsPORT_HAS_V4)
	}
	if p.V6.IsValid() {
		row.Flags |= uint32(bpf.LacePortFlagsPORT_HAS_V6)
	}
	if p.DHCP {
		row.Flags |= uint32(bpf.LacePortFlagsPORT_DHCP)
	}
	if p.Device != "" {
		row.Flags |= uint32(bpf.LacePortFlagsPORT_DIRECT)
	}
	return row
}

func endpointRows(p plan.Port, dev Device, s Slot) map[bpf.LaceEndpointKey]bpf.LaceEndpoint {
	rows := map[bpf.LaceEndpointKey]bpf.LaceEndpoint{}
	row := bpf.LaceEndpoint{Ifindex: dev.Index, Mtu: dev.MTU, Flags: endpointFlags(p)}
	row.Mac.U8 = p.MAC
	for _, a := range []netip.Addr{p.V4, p.V6} {
		if a.IsValid() {
			rows[endpointKey(p.NetworkID, a, s)] = row
		}
	}
	return rows
}

func endpointKey(network topology.NetworkID, a netip.Addr, s Slot) bpf.LaceEndpointKey {
	k := bpf.LaceEndpointKey{Scope: Scope(network, s)}
	k.Addr.U8 = addr(a).U8
	return k
}

// answerRows are endpoints without an interface: questions for them are answered here, and nothing is delivered.
func answerRows(p *plan.Plan, s Slot) map[bpf.LaceEndpointKey]bpf.LaceEndpoint {
	rows := map[bpf.LaceEndpointKey]bpf.LaceEndpoint{}
	for _, station := range p.Stations {
		row := bpf.LaceEndpoint{}
		row.Mac.U8 = station.MAC
		for _, a := range station.Answers {
			rows[endpointKey(station.Network, a, s)] = row
		}
	}
	return rows
}

// networkRows has the networks of this node, of those that they are peered with the lengths of the blocks, and the external ones.
func (w *wanted) networkRows(s Slot) map[uint32]bpf.LaceNetwork {
	rows := map[uint32]bpf.LaceNetwork{}
	for _, n := range w.plan.Networks {
		row := networkRow(n.Line, n.BlockBits4, n.BlockBits6, w.numbers[n.ID])
		row.Flags = uint32(bpf.LaceNetworkFlagsNETWORK_LOCAL)
		if n.Type == topology.L2 {
			segment(&row, n)
		}
		if n.Host {
			row.Flags |= uint32(bpf.LaceNetworkFlagsNETWORK_HOST)
		}
		rows[Scope(n.ID, s)] = row
	}
	for _, n := range w.plan.Foreign {
		rows[Scope(n.ID, s)] = networkRow(n.Line, n.BlockBits4, n.BlockBits6, w.numbers[n.ID])
	}
	for _, n := range w.plan.Externals {
		rows[Scope(n.ID, s)] = bpf.LaceNetwork{Flags: uint32(bpf.LaceNetworkFlagsNETWORK_EXTERNAL), Line: uint32(n.Line), Traffic: w.numbers[n.ID]}
	}
	return rows
}

// segment adds what an Ethernet segment has beside addresses.
func segment(row *bpf.LaceNetwork, n plan.Network) {
	row.Flags |= uint32(bpf.LaceNetworkFlagsNETWORK_L2)
	if n.Flood {
		row.Flags |= uint32(bpf.LaceNetworkFlagsNETWORK_FLOOD)
		row.FloodRate = uint32(n.FloodRate)
	}
	if n.Base6.IsValid() {
		row.Base6.U8 = addr(n.Base6.Masked().Addr()).U8
	}
}

func networkRow(line int, bits4, bits6 plan.Lengths, traffic uint32) bpf.LaceNetwork {
	row := bpf.LaceNetwork{Line: uint32(line), Traffic: traffic}
	for i, bits := range bits4[:min(len(bits4), len(row.Bits4))] {
		row.Bits4[i] = bits + 96
	}
	copy(row.Bits6[:], bits6)
	return row
}

func peerRows(p *plan.Plan, s Slot) map[bpf.LacePeerKey]bpf.LacePeer {
	rows := map[bpf.LacePeerKey]bpf.LacePeer{}
	for _, peer := range p.Peers {
		locator, _ := firstHalf(peer.Locator.Prefix)
		row := bpf.LacePeer{Index: peer.Index, Network: uint32(peer.Network)}
		if peer.Network != 0 {
			row.Sid4.U8, row.Sid6.U8 = routerSIDs(p, peer.Index)
		}
		row.SidL2.U8 = addr(peer.SIDL2.Addr).U8
		rows[bpf.LacePeerKey{Locator: locator, Slot: uint32(s)}] = row
	}
	return rows
}

// routerSIDs are where a router takes the packets of each family, which its blocks say.
func routerSIDs(p *plan.Plan, index uint32) (sid4, sid6 [16]uint8) {
	for _, b := range p.Blocks {
		switch {
		case b.Local || b.Frames || b.Peer != index:
		case b.Prefix.Addr().Is4():
			sid4 = addr(b.SID.Addr).U8
		default:
			sid6 = addr(b.SID.Addr).U8
		}
	}
	return sid4, sid6
}

func blockRows(p *plan.Plan, s Slot) map[bpf.LaceBlockKey]bpf.LaceBlock {
	rows := make(map[bpf.LaceBlockKey]bpf.LaceBlock, len(p.Blocks))
	for _, b := range p.Blocks {
		k := bpf.LaceBlockKey{Scope: Scope(b.Network, s), Bits: mappedBits(b.Prefix)}
		k.Prefix.U8 = addr(b.Prefix.Masked().Addr()).U8
		v := bpf.LaceBlock{Peer: b.Peer}
		if b.Local {
			v.Flags = uint32(bpf.LaceBlockFlagsBLOCK_LOCAL)
		} else {
			v.Sid.U8 = addr(b.SID.Addr).U8
		}
		if b.Frames {
			v.Flags |= uint32(bpf.LaceBlockFlagsBLOCK_FRAMES)
		}
		rows[k] = v
	}
	return rows
}
