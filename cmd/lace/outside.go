// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

// What the two numbers of networks are called that no topology gives.
const (
	hostsName   = "hosts"
	outsideName = "outside"
)

// outerNames are those of hosts, and of what is outside and in no external network, by id.
func outerNames() map[uint32]string {
	return map[uint32]string{uint32(topology.HostsID): hostsName, uint32(topology.OutsideID): outsideName}
}

// externalOf is the external network that has an address: the longest prefix of all. nil: none has.
func externalOf(all []plan.External, a netip.Addr) *plan.External {
	var best *plan.External
	longest := -1
	for i := range all {
		for _, p := range all[i].Prefixes {
			if p.Bits() > longest && p.Contains(a) {
				best, longest = &all[i], p.Bits()
			}
		}
	}
	return best
}

// classified is the network of an address: of what is outside of the overlay the external one that has it.
func (n *names) classified(id uint32, a netip.Addr) uint32 {
	if id != uint32(topology.OutsideID) {
		return id
	}
	if e := externalOf(n.externals, a); e != nil {
		return uint32(e.ID)
	}
	return id
}

// isOuter says whether a network has no containers: hosts are in it, or what is outside.
func (n *names) isOuter(id uint32) bool {
	if id == uint32(topology.HostsID) || id == uint32(topology.OutsideID) {
		return true
	}
	return externalNamed(n.externals, id)
}

// externalNamed says whether a number is that of an external network.
func externalNamed(all []plan.External, id uint32) bool {
	return slices.ContainsFunc(all, func(e plan.External) bool { return uint32(e.ID) == id })
}

// translation is what the addresses and ports of a flow become on their way.
type translation struct {
	Src     netip.Addr `json:"src"`
	SrcPort uint16     `json:"src_port,omitempty"`
	Dst     netip.Addr `json:"dst"`
	DstPort uint16     `json:"dst_port,omitempty"`
	ICMPID  uint16     `json:"icmp_id,omitempty"`
}

// translated reads both ends as the tables have them: a query of ICMP has its identifier in place of the source port. nil: the flow
// is not translated.
func translated(src, dst netip.AddrPort, icmp bool) *translation {
	switch {
	case !src.IsValid():
		return nil
	case icmp:
		return &translation{Src: src.Addr(), Dst: dst.Addr(), ICMPID: src.Port()}
	}
	return &translation{Src: src.Addr(), SrcPort: src.Port(), Dst: dst.Addr(), DstPort: dst.Port()}
}

// hasAddress and hasPort are for filters; both are false where nothing is translated.
func (t *translation) hasAddress(a netip.Addr) bool { return t != nil && (t.Src == a || t.Dst == a) }
func (t *translation) hasPort(p uint) bool {
	return t != nil && (uint(t.SrcPort) == p || uint(t.DstPort) == p)
}

// words say what was changed: "as 192.0.2.1:12345" of the sender, "published 8080 > web:80" of the receiver. was has the flow's own
// addresses and ports.
func (t *translation) words(was *translation, to party) (words []string) {
	if t == nil {
		return nil
	}
	if t.Src != was.Src || t.SrcPort != was.SrcPort || t.ICMPID != was.ICMPID {
		words = append(words, "as "+t.sender())
	}
	if t.Dst != was.Dst || t.DstPort != was.DstPort {
		words = append(words, fmt.Sprintf("published %d > %s", was.DstPort, t.receiver(to)))
	}
	return words
}

// sender is "192.0.2.1:12345", or "192.0.2.1 id 77".
func (t *translation) sender() string {
	if t.ICMPID != 0 {
		return fmt.Sprintf("%s id %d", t.Src, t.ICMPID)
	}
	return netip.AddrPortFrom(t.Src, t.SrcPort).String()
}

// receiver is "web:80", or "10.40.1.7:80" where the container has no name.
func (t *translation) receiver(to party) string {
	if to.Name == "" {
		return netip.AddrPortFrom(t.Dst, t.DstPort).String()
	}
	return to.Name + ":" + strconv.Itoa(int(t.DstPort))
}
