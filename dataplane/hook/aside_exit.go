// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"fmt"
	"net/netip"

	"github.com/lace-net/lace/bpf"
)

// Exit is how a packet would leave the overlay, as the programs asked the host's own routes.
type Exit struct {
	Ifindex uint32     // of the interface; 0: they were not asked, or know no way
	Gateway netip.Addr // next hop: the destination itself where it is on the link
	Known   bool       // the next hop's MAC address is known
	MTU     uint16     // largest packet on the way
}

// Exit reads what the programs found out about the way out of the one packet that was run.
func (a *Aside) Exit() (Exit, error) {
	var perCPU []bpf.LaceContext
	if err := a.coll.Maps["contexts"].Lookup(uint32(0), &perCPU); err != nil {
		return Exit{}, fmt.Errorf("read what the programs know of a packet: %w", err)
	}
	for _, c := range perCPU {
		if c.Out != 0 {
			return Exit{Ifindex: c.Out, Gateway: netip.AddrFrom16(c.Gateway.U8).Unmap(), Known: c.Outside.Neighbour != 0, MTU: c.Mtu}, nil
		}
	}
	return Exit{}, nil
}
