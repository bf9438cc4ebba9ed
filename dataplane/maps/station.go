// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"maps"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

type stationRows = map[bpf.LaceFdbKey]bpf.LaceStation

func fdbKey(network topology.NetworkID, s Slot, mac plan.MAC) bpf.LaceFdbKey {
	k := bpf.LaceFdbKey{Scope: Scope(network, s)}
	k.Mac.U8 = mac
	return k
}

// stationRows are the MAC addresses of an L2 network at other nodes that do not follow from their addresses.
func (w *wanted) stationRows(s Slot) stationRows {
	rows := stationRows{}
	for _, at := range w.plan.Stations {
		row := bpf.LaceStation{Peer: at.Peer}
		row.Sid.U8 = addr(at.SID.Addr).U8
		rows[fdbKey(at.Network, s, at.MAC)] = row
	}
	return rows
}

// stationOf is the row of a port in an L2 network; none in others.
func stationOf(p plan.Port, dev Device, s Slot) stationRows {
	if p.Type != topology.L2 {
		return nil
	}
	return stationRows{fdbKey(p.NetworkID, s, p.MAC): {Ifindex: dev.Index, Mtu: dev.MTU, Flags: endpointFlags(p)}}
}

// endpointFlags of a port, in all rows that lead to it.
func endpointFlags(p plan.Port) uint32 {
	if p.Device != "" {
		return uint32(bpf.LaceEndpointFlagsENDPOINT_DIRECT)
	}
	return 0
}

// sameStations says whether two tables differ in the ports of this node at most.
func sameStations(a, b stationRows) bool { return maps.Equal(awayOf(a), awayOf(b)) }

// awayOf are the stations at other nodes.
func awayOf(rows stationRows) stationRows {
	away := stationRows{}
	for k, v := range rows {
		if v.Ifindex == 0 {
			away[k] = v
		}
	}
	return away
}
