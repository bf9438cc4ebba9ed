// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// Sighting is a MAC address that the topology does not know and that came in as the source of another node's frame.
type Sighting struct {
	Network topology.NetworkID
	MAC     plan.MAC
	Locator netip.Addr    // first 64 bits of the node's, the rest 0
	Age     time.Duration // since it was last seen, to about a second
}

// EachLearned calls f with every MAC address that was learned, a batch at a time: its need of memory does not grow with
// the table. Rows that come or go meanwhile may be told or not. Ages count to the call. An error of f ends it and is returned.
func (m *Maps) EachLearned(f func(Sighting) error) error {
	now, err := flowTick()
	if err != nil {
		return err
	}
	var failed error
	err = eachRow(m.learned, func(k bpf.LaceSightingKey, v bpf.LaceSighting) error {
		failed = f(sightingOf(k, v, now))
		return failed
	})
	if failed != nil || err == nil {
		return failed
	}
	return fmt.Errorf("read map learned: %w", err)
}

func sightingOf(k bpf.LaceSightingKey, v bpf.LaceSighting, now uint32) Sighting {
	var locator [16]byte
	binary.NativeEndian.PutUint64(locator[:8], v.Locator)
	return Sighting{Network: topology.NetworkID(k.Network), MAC: k.Mac.U8, Locator: netip.AddrFrom16(locator), Age: sinceTick(v.Seen, now)}
}
