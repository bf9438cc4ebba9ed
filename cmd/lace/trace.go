// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/trace"
)

// traced is one line of `lace trace`: an event with the names that belong to it.
type traced struct {
	Time        time.Time    `json:"time"`
	Node        string       `json:"node"`                   // this one
	Verdict     string       `json:"verdict"`                // "passed": a new flow; "refused": a packet; "ended": a packet and its flow
	Reason      string       `json:"reason"`                 // docs/reasons.md
	Stage       string       `json:"stage"`                  // where it was decided
	Container   string       `json:"container,omitempty"`    // that sent it, where it is of this node
	Name        string       `json:"name,omitempty"`         // … as people call it
	Network     string       `json:"network,omitempty"`      // the sender's
	FromNode    string       `json:"from_node,omitempty"`    // the sender's, where it is another one
	ToContainer string       `json:"to_container,omitempty"` // that it goes to, where it is of this node
	ToName      string       `json:"to_name,omitempty"`
	ToNetwork   string       `json:"to_network,omitempty"`
	ToNode      string       `json:"to_node,omitempty"`
	Interface   string       `json:"interface"` // where it came in
	Output      string       `json:"output,omitempty"`
	Way         string       `json:"way,omitempty"`        // of a new flow: "container", "node", "out", "host" or "loopback"
	SID         netip.Addr   `json:"sid,omitzero"`         // outer destination, sent or found
	File        string       `json:"file,omitempty"`       // the topology
	Line        uint32       `json:"line,omitempty"`       // … and the line of it that decided
	Generation  uint32       `json:"generation,omitempty"` // of the tables that decided
	Length      uint32       `json:"length"`
	Missed      uint32       `json:"missed,omitempty"`
	Flow        trace.Flow   `json:"flow"`
	Rewrite     *translation `json:"rewrite,omitempty"` // what its addresses and ports become

	from, to party
}

// traceFilter is what the command line asks to see; zero fields ask for everything.
type traceFilter struct {
	network, container, reason, verdict string
	address                             netip.Addr
	port                                uint
}

func (f traceFilter) takes(t *traced) bool {
	return (f.network == "" || f.network == t.Network || f.network == t.ToNetwork) &&
		(f.container == "" || t.from.is(f.container) || t.to.is(f.container)) &&
		(f.reason == "" || f.reason == t.Reason) &&
		(f.verdict == "" || f.verdict == t.Verdict) &&
		(!f.address.IsValid() || f.address == t.Flow.Src || f.address == t.Flow.Dst || t.Rewrite.hasAddress(f.address)) &&
		(f.port == 0 || f.port == uint(t.Flow.SrcPort) || f.port == uint(t.Flow.DstPort) || t.Rewrite.hasPort(f.port))
}

// check refuses what no event could ever have, before anybody waits for it.
func (f *traceFilter) check(flags *flag.FlagSet, count int) error {
	f.address = f.address.Unmap()
	switch {
	case f.reason != "" && !maps.KnownReason(f.reason):
		return usagef(flags, "there is no reason %q; docs/reasons.md lists them", f.reason)
	case f.verdict != "" && !trace.KnownVerdict(f.verdict):
		return usagef(flags, "there is no verdict %q; it is passed, refused or ended", f.verdict)
	case count < 0:
		return usagef(flags, "%d events cannot be shown; leave --count away to go on until interrupted", count)
	}
	return checkPort(flags, f.port)
}

func checkPort(flags *flag.FlagSet, port uint) error {
	if port > math.MaxUint16 {
		return usagef(flags, "there is no port %d; the highest is %d", port, math.MaxUint16)
	}
	return nil
}

var errEnough = errors.New("as many events as were asked for")

// tracing is a run of `lace trace`.
type tracing struct {
	filter traceFilter
	asJSON bool
	count  int // 0: no end
	seen   int
	names  *names
	out    io.Writer
}

func runTrace(ctx context.Context, e *env, args []string) error {
	t := &tracing{out: e.stdout}
	file, err := t.parse(args)
	if err != nil {
		return err
	}
	s, err := agentSettings("trace", []string{"--config", file})
	if err != nil {
		return err
	}
	r, err := trace.Open(hook.PinDir(s.BPFFS), filepath.Join(filepath.Dir(s.HookSocket), "trace.lock"))
	if err != nil {
		return err
	}
	defer r.Close()
	if t.names, err = newNames(e, s); err != nil {
		return err
	}
	defer t.names.close()
	fmt.Fprintln(e.stderr, "new flows and refused packets, as they come; end with Ctrl-C")
	if err := r.Each(ctx, t.show); !errors.Is(err, errEnough) {
		return err
	}
	return nil
}

// parse reads the command line. The result is the settings file.
func (t *tracing) parse(args []string) (string, error) {
	flags := newFlags("trace")
	file := flags.String("config", conf.DefaultFile, "settings `FILE`")
	flags.BoolVar(&t.asJSON, "json", false, "print one JSON object a line")
	flags.IntVar(&t.count, "count", 0, "end after so many `events`; 0: go on until interrupted")
	flags.StringVar(&t.filter.network, "network", "", "only from or to this `network`")
	flags.StringVar(&t.filter.container, "container", "", "only from or to the container with this `name` or namespace/id")
	flags.StringVar(&t.filter.reason, "reason", "", "only with this `reason`")
	flags.StringVar(&t.filter.verdict, "verdict", "", "only `passed`, refused or ended")
	flags.TextVar(&t.filter.address, "address", netip.Addr{}, "only from or to this `address`, before or after translation")
	flags.UintVar(&t.filter.port, "port", 0, "only from or to this `port`, before or after translation")
	if err := parseFlags(flags, args, 0); err != nil {
		return "", err
	}
	return *file, t.filter.check(flags, t.count)
}

func (t *tracing) show(ev trace.Event) error {
	line := t.names.trace(ev)
	if !t.filter.takes(line) {
		return nil
	}
	if err := line.print(t.out, t.asJSON); err != nil {
		return err
	}
	if t.seen++; t.seen == t.count {
		return errEnough
	}
	return nil
}

// trace names what an event is about.
func (n *names) trace(e trace.Event) *traced {
	n.lookFor(n.links[e.Ifindex] != "" && (e.Network == 0 || n.networks[e.Network] != ""))
	from, to := n.between(e.Network, e.To, e.Ifindex, e.Output, e.Flow.Src, e.Flow.Dst)
	switch {
	case n.comesIn(e):
		from.Node = n.peer(e.Peer, outerSource(e.Flow))
	case maps.Way(e.Way) == maps.WayNode:
		to.Node = n.peer(e.Peer, e.SID)
	default:
		e.SID = netip.Addr{} // of a way that its peering names and that it does not go
	}
	t := &traced{
		Time: e.Time, Node: n.node, Verdict: trace.VerdictName(e.Verdict), Reason: maps.ReasonName(e.Reason), Stage: trace.StageName(e.Stage),
		Container: from.Container, Name: from.Name, Network: from.Network, FromNode: from.Node,
		ToContainer: to.Container, ToName: to.Name, ToNetwork: to.Network, ToNode: to.Node,
		Interface: n.link(e.Ifindex), SID: e.SID, Line: e.Line, Generation: e.Generation, Length: e.Length, Missed: e.Missed, Flow: e.Flow,
		Rewrite: translated(e.Rewrite.Src, e.Rewrite.Dst, e.Flow.ICMPID != 0), from: from, to: to,
	}
	if e.Verdict == bpf.LaceVerdictVERDICT_PASSED {
		t.Way = maps.Way(e.Way).String()
	}
	if e.Output != 0 {
		t.Output = n.link(e.Output)
	}
	if e.Line != 0 {
		t.File = n.file
	}
	return t
}

// comesIn says whether a packet came from another node: to a SID of this one, or at no container's interface.
func (n *names) comesIn(e trace.Event) bool {
	if e.Outer != trace.SideNone {
		return false
	}
	if e.SID.IsValid() && n.locator.IsValid() {
		return n.isOwn(e.SID)
	}
	_, container := n.ports[e.Ifindex]
	return !container
}

func outerSource(f trace.Flow) netip.Addr {
	if f.Outer == nil {
		return netip.Addr{}
	}
	return f.Outer.Src
}

func (t *traced) print(w io.Writer, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(t)
	}
	out := bufio.NewWriter(w)
	fmt.Fprintf(out, "%s %-7s %-16s %-9s %-38s", t.Time.Format("15:04:05.000000"), t.Verdict, t.Reason, t.Stage, t.Flow)
	for _, part := range t.parts() {
		fmt.Fprint(out, "  ", part)
	}
	fmt.Fprintln(out)
	if t.Missed > 0 {
		fmt.Fprintf(out, "%16s%d more were not told: there were too many\n", "", t.Missed)
	}
	return out.Flush()
}

// parts are what is behind the columns: who, the rule, the SID, the length.
func (t *traced) parts() []string {
	was := &translation{Src: t.Flow.Src, SrcPort: t.Flow.SrcPort, Dst: t.Flow.Dst, DstPort: t.Flow.DstPort, ICMPID: t.Flow.ICMPID}
	parts := append([]string{ends(t.from, t.to, "interface "+t.Interface)}, t.Rewrite.words(was, t.to)...)
	if t.Line != 0 {
		parts = append(parts, rule(t.File, t.Line))
	}
	if t.SID.IsValid() && t.Flow.Outer == nil {
		parts = append(parts, "SID "+t.SID.String())
	}
	return append(parts, fmt.Sprintf("%d bytes", t.Length))
}

// ends are both parties as far as they are known; unknown says it where the sender is not.
func ends(from, to party, unknown string) string {
	words := []string{from.String()}
	if words[0] == "" {
		words[0] = unknown
	}
	if s := to.String(); s != "" {
		words = append(words, s)
	}
	return strings.Join(words, " > ")
}
