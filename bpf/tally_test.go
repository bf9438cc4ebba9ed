// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"maps"
	"testing"

	"github.com/lace-net/lace/bpf"
	lacemaps "github.com/lace-net/lace/dataplane/maps"
)

// trafficReasons is the room for the reasons of one network in the table traffic.
const trafficReasons = 16

// tally are packets by network and reason, those that went on and those that were refused.
type tally map[bpf.LaceRefusalKey]uint64

// tally reads the counters of the networks.
func (n *node) tally() tally {
	n.t.Helper()
	out := tally{}
	numbered := n.numbered()
	for i, packets := range n.packets("traffic", (networks+1)*trafficReasons) {
		if packets > 0 {
			out[bpf.LaceRefusalKey{Network: numbered[uint32(i/trafficReasons)], Reason: uint32(i % trafficReasons)}] = packets
		}
	}
	var key bpf.LaceRefusalKey
	var refused bpf.LaceCounter
	rows := n.coll.Maps["refusals"].Iterate()
	for rows.Next(&key, &refused) {
		out[key] = refused.Packets
	}
	must(n.t, rows.Err())
	return out
}

// numbered are the networks of the active slot by the numbers of their counters; number 0 is no network's.
func (n *node) numbered() map[uint32]uint32 {
	n.t.Helper()
	all, err := n.maps.Networks.All()
	must(n.t, err)
	out := map[uint32]uint32{0: 0}
	for scope, network := range all {
		out[network.Traffic] = uint32(lacemaps.Network(scope))
	}
	return out
}

func (n *node) generation() uint32 {
	n.t.Helper()
	g, err := n.maps.Generation()
	must(n.t, err)
	return g
}

// since is what has been added to an earlier tally.
func (t tally) since(before tally) tally {
	out := tally{}
	for key, packets := range t {
		if more := packets - before[key]; more > 0 {
			out[key] = more
		}
	}
	return out
}

func wantTally(t testing.TB, got, want tally) {
	t.Helper()
	if maps.Equal(got, want) {
		return
	}
	t.Error("counters of the networks:")
	for name, of := range map[string]tally{"got": got, "want": want} {
		for key, packets := range of {
			t.Logf("%-4s network %d, %s: %d", name, key.Network, lacemaps.ReasonName(bpf.LaceReason(key.Reason)), packets)
		}
	}
}
