// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lace-net/lace/bpf"
)

// Flow is one direction of what the programs remember: a row of the flow table. A query of ICMP has the identifier
// as source port and the type as destination port; what has no ports has 0.
type Flow struct {
	Network    uint32 // the sender's
	To         uint32 // the receiver's
	Src, Dst   netip.AddrPort
	Protocol   uint8 // IP protocol number
	State      bpf.LaceFlowState
	Reply      bool          // against the direction in which it was opened
	Underlay   bool          // comes in from another node
	Picked     bool          // TCP: first seen in the middle
	Bridged    bool          // its frames are carried as they are: both ends are in one L2 network
	Direct     bool          // it goes to a device of the host, not to a container's veth
	Translated bool          // its packets become Rewrite
	Way        Way           // that its packets go on
	Age        time.Duration // since the first packet, to about a second
	Idle       time.Duration // since the last one that counts
	Packets    uint64
	Bytes      uint64     // IP header and what follows it
	Ifindex    uint32     // host end of the local container that it goes to; 0: to another node
	Peer       uint32     // plan.Peer.Index of that node, or of the one that it comes from
	SID        netip.Addr // outer destination, sent or expected; invalid: none
	Source     netip.Addr // Underlay: outer source that was last found good; invalid: none yet
	Line       uint32     // of the topology that lets it pass
	Generation uint32     // that decided
	Rewrite    Rewrite    // Translated

	key, back bpf.LaceFlowKey // of its row, and of the other direction's
}

// Rewrite is what addresses and ports of a packet become, of one that is masqueraded or for a published port. As in a Flow.
type Rewrite struct {
	Src, Dst netip.AddrPort
}

// RewriteOf reads the fields of struct rewrite of bpf/lib/types.h.
func RewriteOf(src, dst bpf.LaceAddr, sport, dport uint16) Rewrite {
	return Rewrite{Src: endOf(src, sport), Dst: endOf(dst, dport)}
}

// Way is enum way of bpf/lib/types.h: which way a packet goes on.
type Way uint8

const (
	WayContainer = Way(bpf.LaceWayWAY_CONTAINER) // to one of this node
	WayNode      = Way(bpf.LaceWayWAY_NODE)      // to another node
	WayOut       = Way(bpf.LaceWayWAY_OUT)       // out of the overlay, by the host's own routing
	WayHost      = Way(bpf.LaceWayWAY_HOST)      // to the host itself
	WayLoopback  = Way(bpf.LaceWayWAY_LOOPBACK)  // to the host itself: an answer to what it sent to itself
)

// String is the word for a way: "out".
func (w Way) String() string {
	words := []string{WayContainer: "container", WayNode: "node", WayOut: "out", WayHost: "host", WayLoopback: "loopback"}
	if int(w) < len(words) {
		return words[w]
	}
	return fmt.Sprintf("way_%d", uint8(w)) // of a newer agent's programs
}

// Connection is both directions of a flow, which share its state.
type Connection struct {
	Flow         // the direction in which it was opened; where only the answers are known, those
	Answer *Flow // the other; nil: it is not there
}

// Quiet is the time since a packet went in either direction.
func (c Connection) Quiet() time.Duration {
	if c.Answer == nil {
		return c.Idle
	}
	return min(c.Idle, c.Answer.Idle)
}

// flowStates are the words for enum flow_state. A test holds them against C.
var flowStates = []string{
	bpf.LaceFlowStateFLOW_NEW:         "new",
	bpf.LaceFlowStateFLOW_ANSWERED:    "answered",
	bpf.LaceFlowStateFLOW_ESTABLISHED: "established",
	bpf.LaceFlowStateFLOW_CLOSING:     "closing",
	bpf.LaceFlowStateFLOW_CLOSED:      "closed",
}

// FlowStates are the words for the states of a flow, from the first to the last.
func FlowStates() []string { return slices.Clone(flowStates) }

// FlowStateName is the word for a state: "established".
func FlowStateName(s bpf.LaceFlowState) string {
	if int(s) < len(flowStates) {
		return flowStates[s]
	}
	return fmt.Sprintf("state_%d", s) // of a newer agent's programs
}

// FlowTable is the table of flows, as OpenFlows gives it.
type FlowTable = *ebpf.Map

// EachFlow calls f with every row of a flow table, a batch at a time: its need of memory does not grow with the table.
// Rows that come or go meanwhile may be told or not, all others are told once. Times count to the call. An error of f
// ends it and is returned.
func EachFlow(table FlowTable, f func(Flow) error) error {
	now, err := flowTick()
	if err != nil {
		return err
	}
	return eachFlow(table, now, f)
}

func eachFlow(table *ebpf.Map, now uint32, f func(Flow) error) error {
	var failed error
	err := eachRow(table, func(k bpf.LaceFlowKey, v bpf.LaceFlow) error {
		failed = f(flowOf(k, v, now))
		return failed
	})
	if failed != nil || err == nil {
		return failed
	}
	return fmt.Errorf("read the flow table: %w", err)
}

// EachConnection calls f once with every flow that take wants, both directions together. It looks the other direction up
// row by row, so that memory stays bounded. take must say the same of both directions, unless they are translated: one of them
// is enough then, as they do not name the same addresses.
func EachConnection(table FlowTable, take func(Flow) bool, f func(Connection) error) error {
	now, err := flowTick()
	if err != nil {
		return err
	}
	return eachFlow(table, now, func(flow Flow) error {
		wanted := take(flow)
		if !wanted && !flow.Translated {
			return nil
		}
		other, err := answer(table, flow, now)
		if err != nil {
			return err
		}
		if !wanted && (other == nil || !take(*other)) {
			return nil
		}
		if flow.Reply && other != nil && !other.Reply {
			return nil // told with the direction that opened it
		}
		return f(Connection{flow, other})
	})
}

// answer finds the other direction; nil where there is none.
func answer(table *ebpf.Map, f Flow, now uint32) (*Flow, error) {
	var v bpf.LaceFlow
	err := table.Lookup(&f.back, &v)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read a row of the flow table: %w", err)
	}
	other := flowOf(f.back, v, now)
	return &other, nil
}

// DeleteFlow removes both directions of a flow, and says whether one of them was still there. The next packet is
// decided as the first of a new flow.
func DeleteFlow(table FlowTable, f Flow) (bool, error) {
	deleted := false
	for _, k := range []bpf.LaceFlowKey{f.key, f.back} {
		err := table.Delete(&k)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return deleted, fmt.Errorf("delete a row of the flow table: %w", err)
		}
		deleted = deleted || err == nil
	}
	return deleted, nil
}

// flowTick is the time as the flow table has it: units of 2^30 ns of the coarse monotonic clock.
func flowTick() (uint32, error) {
	now, err := coarse()
	return uint32(now >> 30), err
}

func flowOf(k bpf.LaceFlowKey, v bpf.LaceFlow, now uint32) Flow {
	f := Flow{
		Network: k.Network, To: v.Network, Protocol: k.Protocol, State: bpf.LaceFlowState(v.State),
		Src: endOf(k.Src, k.Sport), Dst: endOf(k.Dst, k.Dport), Way: Way(v.Way),
		Reply: flagged(v, bpf.LaceFlowFlagsFLOW_REPLY), Underlay: flagged(v, bpf.LaceFlowFlagsFLOW_UNDERLAY), Picked: flagged(v, bpf.LaceFlowFlagsFLOW_PICKED),
		Bridged: flagged(v, bpf.LaceFlowFlagsFLOW_BRIDGED), Direct: flagged(v, bpf.LaceFlowFlagsFLOW_DIRECT),
		Translated: flagged(v, bpf.LaceFlowFlagsFLOW_TRANSLATED), Age: sinceTick(v.Since, now), Idle: sinceTick(v.Seen, now), Packets: v.Packets, Bytes: v.Bytes,
		Ifindex: v.Ifindex, Peer: v.Peer, Line: v.Line, Generation: v.Generation, key: k, back: answerKey(k, v),
	}
	if f.Translated {
		f.Rewrite = RewriteOf(v.To.Src, v.To.Dst, v.To.Sport, v.To.Dport)
	}
	f.SID, f.Source = outer(v.Sid.U8), outer(v.Source.U8)
	return f
}

// outer is an address of the underlay; invalid where there is none.
func outer(b [16]byte) netip.Addr {
	if a := netip.AddrFrom16(b); !a.IsUnspecified() {
		return a
	}
	return netip.Addr{}
}

func flagged(v bpf.LaceFlow, flag bpf.LaceFlowFlags) bool { return v.Flags&uint16(flag) != 0 }

// sinceTick is how long ago a tick was; the clock of a packet that comes just now may be ahead of ours.
func sinceTick(then, now uint32) time.Duration {
	return time.Duration(max(int32(now-then), 0)) << 30
}

// endOf is an address with its port.
func endOf(a bpf.LaceAddr, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(unmapped(a.U8), hostPort(port))
}

// unmapped is an address of the maps as people write it.
func unmapped(b [16]byte) netip.Addr { return netip.AddrFrom16(b).Unmap() }

// hostPort reads a port in network order.
func hostPort(be uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], be)
	return binary.BigEndian.Uint16(b[:])
}

// answerKey is the key of the other direction of a row: what its packets become, turned around.
func answerKey(k bpf.LaceFlowKey, v bpf.LaceFlow) bpf.LaceFlowKey {
	if flagged(v, bpf.LaceFlowFlagsFLOW_TRANSLATED) {
		k.Src, k.Dst, k.Sport, k.Dport = v.To.Src, v.To.Dst, v.To.Sport, v.To.Dport
	}
	return partner(k, v.Network)
}

// netPort is a port in network order.
func netPort(p uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, p))
}

// partner is the key of the other direction, whose sender is in the network that this one goes to.
func partner(k bpf.LaceFlowKey, network uint32) bpf.LaceFlowKey {
	back := k
	back.Network, back.Src, back.Dst = network, k.Dst, k.Src
	if k.Protocol == unix.IPPROTO_ICMP || k.Protocol == unix.IPPROTO_ICMPV6 {
		back.Dport = netPort(inverse(k.Protocol, hostPort(k.Dport)))
		return back
	}
	back.Sport, back.Dport = k.Dport, k.Sport
	return back
}

// inverse is the type of the answer to a query of ICMP, and of the query to an answer (RFC 792, RFC 4443).
func inverse(protocol uint8, kind uint16) uint16 {
	pairs := [][2]uint16{{0, 8}, {13, 14}}
	if protocol == unix.IPPROTO_ICMPV6 {
		pairs = [][2]uint16{{128, 129}}
	}
	for _, p := range pairs {
		switch kind {
		case p[0]:
			return p[1]
		case p[1]:
			return p[0]
		}
	}
	return kind
}
