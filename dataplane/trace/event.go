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
	Network    uint32        // the sender's; 0: not known
	To         uint32        // the receiver's; 0: not known
	Peer       uint32        // plan.Peer.Index of the node that it goes to or comes from; 0: neither
	Generation uint32        // that decided, and that Peer counts in
	Line       uint32        // of the topology that decided; 0: none
	SID        netip.Addr    // outer destination, sent or found; invalid: none
	MTU        uint16        // explain only: largest packet on the way
	Length     uint32        // bytes, from the first header on
	Missed     uint32        // events before this one, on its CPU, that the rate limit kept back
	Flow       Flow
}

// verdicts and stages are the words for the enums of bpf/lib. A test holds them against C.
var (
	verdicts = []string{
		bpf.LaceVerdictVERDICT_STEP:    "step",
		bpf.LaceVerdictVERDICT_PASSED:  "passed",
		bpf.LaceVerdictVERDICT_REFUSED: "refused",
		bpf.LaceVerdictVERDICT_ENDED:   "ended",
	}
	stages = []string{
		bpf.LaceStageSTAGE_ENTRY:     "entry",
		bpf.LaceStageSTAGE_ROUTE:     "route",
		bpf.LaceStageSTAGE_DELIVER:   "deliver",
		bpf.LaceStageSTAGE_GATEWAY:   "gateway",
		bpf.LaceStageSTAGE_ERROR:     "error",
		bpf.LaceStageSTAGE_BRIDGE:    "bridge",
		bpf.LaceStageSTAGE_NEIGHBOUR: "neighbour",
		bpf.LaceStageSTAGE_FLOOD:     "flood",
		bpf.LaceStageSTAGE_FRAME:     "frame",
	}
)

// VerdictName is the word for a verdict: "passed" is a new flow, "refused" a packet, "ended" a packet and with
// it the flow that was allowed and is not any more, "step" a packet that came to a stage.
func VerdictName(v bpf.LaceVerdict) string { return word(verdicts, "verdict", int(v)) }

// StageName is the word for a stage: "entry", "route", "deliver", "gateway", "error"; of L2 networks "bridge", "neighbour", "flood",
// "frame".
func StageName(s bpf.LaceStage) string { return word(stages, "stage", int(s)) }

// KnownVerdict says whether there is a verdict of that word.
func KnownVerdict(name string) bool { return slices.Contains(verdicts, name) }

func word(words []string, what string, i int) string {
	if i < len(words) {
		return words[i]
	}
	return fmt.Sprintf("%s_%d", what, i) // of a newer agent's programs
}

var errShort = errors.New("event is shorter than its 200 bytes: programs and command are of different versions")

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
		Flow: ParseFlow(raw.Head[:min(int(raw.HeadLen), len(raw.Head))], raw.Ethernet != 0),
	}
	if sid := netip.AddrFrom16(raw.Sid.U8); !sid.IsUnspecified() {
		e.SID = sid
	}
	return e, nil
}
