// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/dataplane/plan"
)

// Nexthop is how packets to one peer leave this node.
type Nexthop struct {
	Peer    uint32 // plan.Peer.Index
	Ifindex int    // 0: no route now, Problem says why
	Raw     bool   // no Ethernet header: DstMAC and SrcMAC are zero
	Gateway netip.Addr
	DstMAC  plan.MAC // of the gateway
	SrcMAC  plan.MAC // of the device
	Known   bool     // packets can be sent: the gateway's MAC is known, or none is needed
	MTU     int      // of the device, or of the route where that is smaller
	Problem string
}

// Nexthops resolves the next hop of every peer, in the plan's order, and has the kernel keep the
// gateways' neighbour entries fresh (NTF_EXT_MANAGED, Linux 5.16), marked with our protocol number. It forgets those
// that no peer needs any more. Read it again when Watch calls.
func (h *Handle) Nexthops(p *plan.Plan) ([]Nexthop, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	hops, table, err := h.readNexthops(p)
	if err == nil {
		h.keepGateways(table)
	}
	return hops, err
}

// readNexthops notes the gateways' state for Watch, which waits meanwhile: what changes after the
// table was read is then told by a notice.
func (h *Handle) readNexthops(p *plan.Plan) ([]Nexthop, map[neighbourKey]neighbour, error) {
	h.gatewaysMu.Lock()
	defer h.gatewaysMu.Unlock()
	table, err := h.host.neighbours()
	if err != nil {
		return nil, nil, err
	}
	hops := make([]Nexthop, 0, len(p.Peers))
	gateways := map[neighbourKey]neighbour{}
	for i := range p.Peers {
		n, err := h.nexthop(p, &p.Peers[i], table)
		if err != nil {
			return nil, nil, err
		}
		if n.Gateway.IsValid() {
			key := neighbourKey{n.Ifindex, n.Gateway}
			gateways[key] = table[key]
		}
		hops = append(hops, n)
	}
	h.gateways = gateways
	return hops, table, nil
}

func (h *Handle) nexthop(p *plan.Plan, peer *plan.Peer, table map[neighbourKey]neighbour) (Nexthop, error) {
	n := Nexthop{Peer: peer.Index}
	hop, err := h.resolve(p, peer)
	var none *noRouteError
	if errors.As(err, &none) {
		n.Problem = none.why
		return n, nil
	}
	if err != nil {
		return n, fmt.Errorf("resolve the next hop to peer %s: %w", peer.Name, err)
	}
	n.Ifindex, n.Raw, n.Gateway, n.MTU = hop.dev.Attrs().Index, raw(hop.dev), hop.gateway, hop.dev.Attrs().MTU
	if hop.mtu > 0 {
		n.MTU = min(n.MTU, hop.mtu)
	}
	if n.Raw {
		n.Known = true
		return n, nil
	}
	gw := table[neighbourKey{n.Ifindex, n.Gateway}]
	n.SrcMAC, n.DstMAC, n.Known = macOf(hop.dev), gw.mac, gw.valid
	if !n.Known {
		n.Problem = fmt.Sprintf("the MAC address of %s on %s is not known yet", n.Gateway, hop.dev.Attrs().Name)
	}
	return n, nil
}

// Attributes of linux/neighbour.h.
const ndaProtocol = 12

// validStates are those in which a neighbour's MAC may be used.
const validStates = netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE | netlink.NUD_PERMANENT | netlink.NUD_NOARP

type neighbourKey struct {
	ifindex int
	addr    netip.Addr
}

type neighbour struct {
	mac   plan.MAC
	valid bool
	kept  bool // by us: managed, with our protocol
	ours  bool
}

// same compares what matters for sending.
func (n neighbour) same(o neighbour) bool { return n.mac == o.mac && n.valid == o.valid }

// neighbours lists the IPv6 neighbours.
func (c *conn) neighbours() (map[neighbourKey]neighbour, error) {
	rows, err := list(func() ([][]byte, error) {
		msg := &netlink.Ndmsg{Family: unix.AF_INET6}
		return c.request(unix.RTM_GETNEIGH, unix.NLM_F_DUMP, msg).Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	})
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	table := make(map[neighbourKey]neighbour, len(rows))
	for _, row := range rows {
		if k, n, ok := parseNeighbour(row); ok {
			table[k] = n
		}
	}
	return table, nil
}

// parseNeighbour reads an ndmsg (linux/neighbour.h): family 1, padding 3, ifindex 4, state 2,
// flags 1, type 1 byte, then attributes.
func parseNeighbour(b []byte) (k neighbourKey, n neighbour, ok bool) {
	const header = 12
	if len(b) < header || b[0] != unix.AF_INET6 {
		return k, n, false
	}
	at, err := parseAttributes(b[header:])
	if err != nil {
		return k, n, false
	}
	k.ifindex = int(binary.NativeEndian.Uint32(b[4:]))
	k.addr, ok = netip.AddrFromSlice(at[netlink.NDA_DST])
	mac := at[netlink.NDA_LLADDR]
	n.valid = binary.NativeEndian.Uint16(b[8:])&validStates != 0 && len(mac) == len(n.mac)
	if n.valid {
		copy(n.mac[:], mac)
	}
	ext, _ := at.number(netlink.NDA_FLAGS_EXT)
	proto, _ := at.number(ndaProtocol)
	n.ours = proto == protocol
	n.kept = n.ours && ext&netlink.NTF_EXT_MANAGED != 0
	return k, n, ok
}

// keepGateways has the kernel keep the gateways resolved, and gives up those that are no longer
// wanted. Without it packets still go, by the slower way, so that a failure is only logged.
func (h *Handle) keepGateways(table map[neighbourKey]neighbour) {
	h.gatewaysMu.Lock()
	want := h.gateways // never changed, only replaced
	h.gatewaysMu.Unlock()
	for k, n := range want {
		if n.kept {
			continue
		}
		if err := h.host.keep(k); err != nil {
			h.log.Warn("the kernel does not keep a gateway's neighbour entry", "gateway", k.addr, "ifindex", k.ifindex, "err", err)
		}
	}
	for k, n := range table {
		if _, ok := want[k]; n.ours && !ok {
			if err := h.host.forget(k); err != nil {
				h.log.Warn("cannot give up a former gateway's neighbour entry", "gateway", k.addr, "ifindex", k.ifindex, "err", err)
			}
		}
	}
}

// keep makes a managed neighbour entry, or makes the present one managed, whatever its state.
func (c *conn) keep(k neighbourKey) error {
	msg := &netlink.Ndmsg{Family: unix.AF_INET6, Index: uint32(k.ifindex), State: netlink.NUD_NONE}
	_, err := c.request(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK, msg,
		nl.NewRtAttr(netlink.NDA_DST, k.addr.AsSlice()),
		nl.NewRtAttr(netlink.NDA_FLAGS_EXT, nl.Uint32Attr(netlink.NTF_EXT_MANAGED)),
		nl.NewRtAttr(ndaProtocol, []byte{protocol}),
	).Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// forget removes a neighbour entry; the kernel makes a new one when it needs it.
func (c *conn) forget(k neighbourKey) error {
	err := c.NeighDel(&netlink.Neigh{LinkIndex: k.ifindex, Family: unix.AF_INET6, IP: k.addr.AsSlice()})
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
