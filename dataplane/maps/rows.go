// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

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

// PutPort makes a container known: first where packets for it go, then what it may send.
func (m *Maps) PutPort(p plan.Port, net *plan.Network, dev Device) error {
	for k, v := range endpointRows(p, dev) {
		if err := m.Endpoints.Put(k, v); err != nil {
			return err
		}
	}
	return m.Ports.Put(dev.Index, portRow(p, net, dev))
}

// DeletePort forgets a container; what is not there is fine.
func (m *Maps) DeletePort(p plan.Port, index uint32) error {
	var errs []error
	for k := range endpointRows(p, Device{}) {
		errs = append(errs, m.Endpoints.Delete(k))
	}
	if index != 0 {
		errs = append(errs, m.Ports.Delete(index))
	}
	return errors.Join(errs...)
}

// Sync makes every table hold the plan. devices has the ports' interfaces by their host name; a port
// without one is left out.
func (m *Maps) Sync(p *plan.Plan, devices map[string]Device) (Changes, error) {
	ports, endpoints := portRows(p, devices)
	var sum Changes
	var errs []error
	add := func(c Changes, err error) {
		sum = sum.Add(c)
		errs = append(errs, err)
	}
	add(m.Peers.Sync(peerRows(p)))
	add(m.Networks.Sync(networkRows(p)))
	add(m.Blocks.Sync(blockRows(p)))
	add(m.Endpoints.Sync(endpoints))
	add(m.Ports.Sync(ports))
	return sum, errors.Join(errs...)
}

// SyncNexthops writes the ways to the peers; a peer without one is refused with reason no_nexthop.
func (m *Maps) SyncNexthops(hops []Nexthop) error {
	want := map[uint32]bpf.LaceNexthop{}
	for _, h := range hops {
		if h.Peer == 0 || h.Peer >= m.nexthops.MaxEntries() {
			return fmt.Errorf("nexthop of peer %d: map nexthops has places for peers 1 to %d", h.Peer, m.nexthops.MaxEntries()-1)
		}
		want[h.Peer] = nexthopRow(h)
	}
	for i := uint32(1); i < m.nexthops.MaxEntries(); i++ {
		var have bpf.LaceNexthop
		if err := m.nexthops.Lookup(i, &have); err != nil {
			return fmt.Errorf("read row %d of map nexthops: %w", i, err)
		}
		if have == want[i] {
			continue
		}
		if err := m.nexthops.Put(i, want[i]); err != nil {
			return fmt.Errorf("write row %d of map nexthops: %w", i, err)
		}
	}
	return nil
}

func nexthopRow(h Nexthop) bpf.LaceNexthop {
	if h.Ifindex == 0 {
		return bpf.LaceNexthop{}
	}
	row := bpf.LaceNexthop{Ifindex: h.Ifindex, Mtu: h.MTU}
	if h.Known {
		row.Flags |= uint16(bpf.LaceNexthopFlagsNEXTHOP_MAC)
		row.Dst.U8, row.Src.U8 = h.Dst, h.Src
	}
	if h.Raw {
		row.Flags |= uint16(bpf.LaceNexthopFlagsNEXTHOP_RAW)
	}
	return row
}

func portRow(p plan.Port, net *plan.Network, dev Device) bpf.LacePort {
	row := bpf.LacePort{
		Network:  uint32(p.NetworkID),
		V4:       be32(p.V4),
		Gateway4: be32(p.Gateway4),
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
	for i, bits := range net.BlockBits4[:min(len(net.BlockBits4), len(row.Bits4))] {
		row.Bits4[i] = bits + 96
	}
	copy(row.Bits6[:], net.BlockBits6)
	return row
}

func endpointRows(p plan.Port, dev Device) map[bpf.LaceEndpointKey]bpf.LaceEndpoint {
	rows := map[bpf.LaceEndpointKey]bpf.LaceEndpoint{}
	row := bpf.LaceEndpoint{Ifindex: dev.Index, Mtu: dev.MTU}
	row.Mac.U8 = p.MAC
	if p.V4.IsValid() {
		k := bpf.LaceEndpointKey{Network: uint32(p.NetworkID)}
		k.Addr.U8 = addr(p.V4).U8
		rows[k] = row
	}
	if p.V6.IsValid() {
		k := bpf.LaceEndpointKey{Network: uint32(p.NetworkID)}
		k.Addr.U8 = addr(p.V6).U8
		rows[k] = row
	}
	return rows
}

func portRows(p *plan.Plan, devices map[string]Device) (map[uint32]bpf.LacePort, map[bpf.LaceEndpointKey]bpf.LaceEndpoint) {
	networks := map[topology.NetworkID]*plan.Network{}
	for i := range p.Networks {
		networks[p.Networks[i].ID] = &p.Networks[i]
	}
	ports := map[uint32]bpf.LacePort{}
	endpoints := map[bpf.LaceEndpointKey]bpf.LaceEndpoint{}
	for _, port := range p.Ports {
		dev, ok := devices[port.HostIf]
		if !ok {
			continue
		}
		ports[dev.Index] = portRow(port, networks[port.NetworkID], dev)
		for k, v := range endpointRows(port, dev) {
			endpoints[k] = v
		}
	}
	return ports, endpoints
}

func networkRows(p *plan.Plan) map[uint32]uint32 {
	rows := map[uint32]uint32{}
	for _, n := range p.Networks {
		rows[uint32(n.ID)] = 0
	}
	return rows
}

func peerRows(p *plan.Plan) map[uint64]bpf.LacePeer {
	rows := map[uint64]bpf.LacePeer{}
	for _, peer := range p.Peers {
		key, _ := firstHalf(peer.Locator.Prefix)
		rows[key] = bpf.LacePeer{Index: peer.Index, Network: uint32(peer.Network)}
	}
	return rows
}

func blockRows(p *plan.Plan) map[bpf.LaceBlockKey]bpf.LaceBlock {
	rows := map[bpf.LaceBlockKey]bpf.LaceBlock{}
	for _, b := range p.Blocks {
		k := bpf.LaceBlockKey{NetworkBits: uint32(b.Network)<<8 | mappedBits(b.Prefix)}
		k.Prefix.U8 = addr(b.Prefix.Masked().Addr()).U8
		v := bpf.LaceBlock{Peer: b.Peer}
		if b.Local {
			v.Flags = uint32(bpf.LaceBlockFlagsBLOCK_LOCAL)
		} else {
			v.Sid.U8 = addr(b.SID.Addr).U8
		}
		rows[k] = v
	}
	return rows
}
