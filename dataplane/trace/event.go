// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/lace-net/lace/bpf"
)

// Event is what the programs tell of a new flow or of a refused packet. Networks are told by their id.
type Event struct {
	Time       time.Time
	Verdict    bpf.LaceVerdict
	Reason     bpf.LaceReason
	Stage      bpf.LaceStage // where it was decided
	Ifindex    uint32        // where the packet came in
	Output     uint32        // interface of the local container that it goes to; 0: none
	Network    uint32        // the sender's; 0: not known; of what is outside the external one, or topology.OutsideID where none has the address
	To         uint32        // the receiver's; 0: not known; likewise
	Peer       uint32        // plan.Peer.Index of the node that it goes to or comes from; 0: neither
	Generation uint32        // that decided, and that Peer counts in
	Line       uint32        // of the topology that decided; 0: none
	SID        netip.Addr    // outer destination, sent or found; invalid: none
	MTU        uint16        // explain only: largest packet on the way
	Length     uint32        // bytes, from the first header on
	Missed     uint32        // events before this one, on its CPU, that the rate limit kept back
	Way        uint8         // that it goes on; the numbers are those of maps.Way
	Outer      Side          // where it came in, if neither a container nor a node sent it
	Rewrite    Rewrite       // what its addresses and ports become; zero where they stay
	Flow       Flow
}

// Rewrite is what the addresses and ports of a packet become. A query of ICMP has the identifier as source port.
type Rewrite struct {
	Src, Dst netip.AddrPort
}

// Side is enum outer_side of bpf/lib/types.h: where a packet came in that no container and no node sent.
type Side uint8

const (
	SideNone     = Side(bpf.LaceOuterSideOUTER_NONE)     // a container or a node sent it
	SideOutside  = Side(bpf.LaceOuterSideOUTER_OUTSIDE)  // an interface of the host, from outside of the overlay
	SideHost     = Side(bpf.LaceOuterSideOUTER_HOST)     // lc-host-peer, from the host's stack
	SideLoopback = Side(bpf.LaceOuterSideOUTER_LOOPBACK) // lo, from the host's stack to itself
)

// verdicts and stages are the words for the enums of bpf/lib. A test holds them against C.
var (
	verdicts = []string{
		bpf.LaceVerdictVERDICT_STEP:    "step",
		bpf.LaceVerdictVERDICT_PASSED:  "passed",
		bpf.LaceVerdictVERDICT_REFUSED: "refused",
		bpf.LaceVerdictVERDICT_ENDED:   "ended",
	}
	stages = []string{
		bpf.LaceStageSTAGE_ENTRY:      "entry",
		bpf.LaceStageSTAGE_ROUTE:      "route",
		bpf.LaceStageSTAGE_DELIVER:    "deliver",
		bpf.LaceStageSTAGE_GATEWAY:    "gateway",
		bpf.LaceStageSTAGE_ERROR:      "error",
		bpf.LaceStageSTAGE_BRIDGE:     "bridge",
		bpf.LaceStageSTAGE_NEIGHBOUR:  "neighbour",
		bpf.LaceStageSTAGE_FLOOD:      "flood",
		bpf.LaceStageSTAGE_FRAME:      "frame",
		bpf.LaceStageSTAGE_OUTER:      "outer",
		bpf.LaceStageSTAGE_OUTER_RAW:  "outer_raw",
		bpf.LaceStageSTAGE_ENTER:      "enter",
		bpf.LaceStageSTAGE_EXIT:       "exit",
		bpf.LaceStageSTAGE_MASQUERADE: "masquerade",
		bpf.LaceStageSTAGE_EGRESS:     "egress",
		bpf.LaceStageSTAGE_RELATED:    "related",
	}
)

// VerdictName is the word for a verdict: "passed" is a new flow, "refused" a packet, "ended" a packet and with
// it the flow that was allowed and is not any more, "step" a packet that came to a stage.
func VerdictName(v bpf.LaceVerdict) string { return word(verdicts, "verdict", int(v)) }

// StageName is the word for a stage: "entry", "route", "deliver", "gateway", "error"; of L2 networks "bridge", "neighbour", "flood",
// "frame"; of what is outside "outer", "outer_raw", "enter", "exit", "masquerade", "egress", "related".
func StageName(s bpf.LaceStage) string { return word(stages, "stage", int(s)) }

// KnownVerdict says whether there is a verdict of that word.
func KnownVerdict(name string) bool { return slices.Contains(verdicts, name) }

func word(words []string, what string, i int) string {
	if i < len(words) {
		return words[i]
	}
	return fmt.Sprintf("%s_%d", what, i) // of a newer agent's programs
}

var errShort = errors.New("event is shorter than its 240 bytes: programs and command are of different versions")

// Decode reads one event, which is a struct event of bpf/lib/types.h. origin is the wall clock at monotonic zero.
func Decode(b []byte, origin time.Time) (Event, error) {
	var raw bpf.LaceEvent
	if _, err := binary.Decode(b, binary.NativeEndian, &raw); err != nil {
		return Event{}, fmt.Errorf("%w: it has %d", errShort, len(b))
	}
	e := Event{
		Time: origin.Add(time.Duration(raw.Time)), Verdict: bpf.LaceVerdict(raw.Verdict), Reason: bpf.LaceReason(raw.Reason),
		Stage: bpf.LaceStage(raw.Stage), Ifindex: raw.Ifindex, Output: raw.Output, Network: raw.Network, To: raw.To,
		Peer: raw.Peer, Generation: raw.Generation, Line: raw.Line, MTU: raw.Mtu, Length: raw.Len, Missed: raw.Missed,
		Way: raw.Way, Outer: Side(raw.Outer), Flow: ParseFlow(raw.Head[:min(int(raw.HeadLen), len(raw.Head))], raw.Ethernet != 0),
	}
	if sid := netip.AddrFrom16(raw.Sid.U8); !sid.IsUnspecified() {
		e.SID = sid
	}
	if to := raw.Rewrite; raw.Translated != 0 {
		e.Rewrite = Rewrite{end(to.Src, to.Sport), end(to.Dst, to.Dport)}
	}
	return e, nil
}

// end reads an address and a port as the programs have them: IPv4 mapped, and in network order.
func end(a bpf.LaceAddr, port uint16) netip.AddrPort {
	b := binary.NativeEndian.AppendUint16(nil, port)
	return netip.AddrPortFrom(netip.AddrFrom16(a.U8).Unmap(), binary.BigEndian.Uint16(b))
}
