// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/cmd/lace/control"
	"github.com/lace-net/lace/conf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/netdev"
	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/dataplane/trace"
	"github.com/lace-net/lace/topology"
)

// explanation is what `lace explain` prints.
type explanation struct {
	From    origin        `json:"from"`
	To      string        `json:"to"` // "10.50.2.7:5432/tcp", or a MAC address
	Steps   []explainStep `json:"steps"`
	Verdict string        `json:"verdict"` // "passed", "refused", "ended", or "none": handed to the host
	Reason  string        `json:"reason,omitempty"`
	Meaning string        `json:"meaning,omitempty"`
	Line    *topologyLine `json:"line,omitempty"`
	Way     *way          `json:"way,omitempty"`
	Answer  string        `json:"answer,omitempty"` // to a question who has an address
	Flow    *liveFlow     `json:"flow,omitempty"`   // of the same kind, that is open now
	Next    string        `json:"next,omitempty"`   // what the other node has to say
	Notes   []string      `json:"notes,omitempty"`

	node   string // this one
	target netip.Addr
}

// explainStep is a stage that the packet came to, with what was known of it there.
type explainStep struct {
	Stage   string       `json:"stage"`
	Network string       `json:"network,omitempty"` // the sender's
	To      string       `json:"to,omitempty"`      // the receiver's network
	SID     netip.Addr   `json:"sid,omitzero"`
	Peer    string       `json:"peer,omitempty"`
	Output  string       `json:"output,omitempty"`
	MTU     uint16       `json:"mtu,omitempty"`
	Rewrite *translation `json:"rewrite,omitempty"` // what addresses and ports become
}

// topologyLine is the line of the topology that decided.
type topologyLine struct {
	File string `json:"file"`
	Line uint32 `json:"line"`
	Text string `json:"text,omitempty"` // empty where the file is not what it was
}

// liveFlow is a flow that is open now between the same ends.
type liveFlow struct {
	SourcePort uint16        `json:"source_port"`
	State      string        `json:"state"`
	Age        time.Duration `json:"age"`
	Packets    uint64        `json:"packets"` // of the direction that opened it
	Bytes      uint64        `json:"bytes"`
	Count      int           `json:"count"` // of such flows; the fields are of the one that is oldest
}

func runExplain(ctx context.Context, e *env, args []string) error {
	flags := newFlags("explain")
	file := flags.String("config", conf.DefaultFile, "settings `FILE`")
	asJSON := flags.Bool("json", false, "print JSON")
	from := flags.String("from", "", "`CONTAINER` or device of this node (name, namespace/id), an address of it, of another node or from outside of the overlay, or host: this host itself")
	to := flags.String("to", "", "`ADDRESS:PORT/PROTO`, as 10.40.2.7:80/tcp, [fd40::7]:53/udp or 10.40.2.7/icmp; 10.50.0.7/arp or fd50::7/nd for who has it; or a MAC address")
	network := flags.String("network", "", "the `network` of --from, where it could be in several")
	via := flags.String("via", "", "other `node` where a flow of a host or from outside of the overlay came in that is carried here")
	if err := parseFlags(flags, args, 0); err != nil {
		return err
	}
	if *from == "" || *to == "" {
		return usagef(flags, "--from and --to are wanted")
	}
	dst, err := parseTarget(*to)
	if err != nil {
		return usagef(flags, "--to: %v", err)
	}
	s, err := agentSettings("explain", []string{"--config", *file})
	if err != nil {
		return err
	}
	x, err := newExplainer(ctx, e, s)
	if err != nil {
		return err
	}
	defer x.dev.Close()
	result, err := x.explain(question{*from, *network, *via, dst})
	if err != nil {
		return err
	}
	if *asJSON {
		return printJSON(e.stdout, result)
	}
	return result.print(e.stdout)
}

// question is what the command line asks.
type question struct {
	from, network, via string
	to                 target
}

// explainer has what an explanation needs names from.
type explainer struct {
	bpffs string
	file  string // the topology
	plan  *plan.Plan
	topo  *topology.Topology // of the file; nil: it is not the one of the plan
	dev   *netdev.Handle
	host  *netdev.Outlook // where no container sends
	ports []netdev.Port
	links map[uint32]string
	notes []string
}

func newExplainer(ctx context.Context, e *env, s conf.Settings) (*explainer, error) {
	x := &explainer{bpffs: s.BPFFS, file: s.Topology}
	var err error
	if x.dev, err = netdev.Open(slog.New(slog.DiscardHandler)); err != nil {
		return nil, err
	}
	if x.ports, err = x.dev.Ports(); err == nil {
		x.links, err = x.dev.LinkNames()
	}
	if err == nil {
		err = x.readPlan(ctx, e, s)
	}
	if err != nil {
		x.dev.Close()
		return nil, err
	}
	return x, nil
}

// readPlan asks the agent, which knows what holds; without one the file has to do.
func (x *explainer) readPlan(ctx context.Context, e *env, s conf.Settings) error {
	now, err := askAgent(ctx, s.ControlSocket(), control.Request{Do: control.Plan}, lookDeadline)
	if errors.Is(err, control.ErrNoAgent) {
		return x.readFile(e, s.Node)
	}
	if err != nil {
		return err
	}
	x.file, x.plan = now.File, now.Plan
	t, err := topology.Load(x.file)
	if err == nil && t.Hash == x.plan.Hash {
		x.topo = t
		return nil
	}
	x.notes = append(x.notes, x.file+" is not the file any more that the agent has read: lines are those of the older one; `lace apply` makes it hold")
	return nil
}

func (x *explainer) readFile(e *env, node string) (err error) {
	if x.topo, err = topology.Load(x.file); err != nil {
		return err
	}
	if node, err = nodeName(e, node); err != nil {
		return err
	}
	var stay []plan.Attachment
	for _, p := range x.ports {
		if stays(x.topo, p.Attachment) {
			stay = append(stay, p.Attachment)
		}
	}
	if x.plan, err = plan.Build(x.topo, node, stay); err != nil {
		return fmt.Errorf("plan node %s of %s: %w", node, x.file, err)
	}
	x.notes = append(x.notes, "no agent runs: the tables are as the last one left them, names and lines are those of "+x.file)
	return nil
}

func (x *explainer) explain(q question) (*explanation, error) {
	o, err := x.findOrigin(q)
	if err != nil {
		return nil, err
	}
	to := q.to
	if o.host && !x.reachesOverlay(o, to) {
		return &explanation{From: *o, To: to.String(), Verdict: "none", Notes: x.notes,
			Meaning: "no network with host = true has the address, so the host's own routes take it elsewhere than into the overlay"}, nil
	}
	in, err := x.enter(o, to)
	if err != nil {
		return nil, err
	}
	aside, err := hook.LoadAside(x.bpffs)
	if err != nil {
		return nil, err
	}
	defer aside.Close()
	outcome, err := aside.Run(in.program, in.ifindex, in.frame)
	if err != nil {
		return nil, err
	}
	r := &explanation{From: *o, To: to.String(), Answer: answered(outcome.Reason, to, outcome.Frame), Notes: x.notes, node: x.plan.Node, target: to.addr}
	exit, err := aside.Exit()
	if err != nil {
		return nil, err
	}
	if err := x.tell(r, outcome, exit); err != nil {
		return nil, err
	}
	if to.flows() {
		r.Flow, err = x.openFlow(o, to)
	}
	return r, err
}

// tell puts names to what the programs told.
func (x *explainer) tell(r *explanation, o hook.Outcome, exit hook.Exit) error {
	var last trace.Event
	for _, raw := range o.Events {
		ev, err := trace.Decode(raw, time.Time{})
		if err != nil {
			return err
		}
		if ev.Verdict == bpf.LaceVerdictVERDICT_STEP {
			r.Steps = append(r.Steps, x.step(ev))
			continue // one may come after the verdict: the error stage
		}
		last = ev
	}
	switch {
	case last.Verdict != bpf.LaceVerdictVERDICT_STEP:
		r.Verdict, r.Reason = trace.VerdictName(last.Verdict), maps.ReasonName(last.Reason)
		r.Meaning = maps.ReasonHelp(last.Reason)
	case o.Reason != 0: // without a flow: what is answered at once
		r.Verdict, r.Reason, r.Meaning = "passed", maps.ReasonName(o.Reason), maps.ReasonHelp(o.Reason)
	default:
		r.Verdict, r.Meaning = "none", "no packet for Lace: the host's own stack gets it"
	}
	r.Line = x.line(last.Line)
	if last.Verdict == bpf.LaceVerdictVERDICT_PASSED {
		return x.tellWay(r, last, o.Frame, exit)
	}
	if r.From.Node != "" {
		r.Next = x.sender(r)
	} else if last.Reason == bpf.LaceReasonREASON_NO_EGRESS {
		r.Next = askRoutes(r)
	}
	return nil
}

func (x *explainer) step(ev trace.Event) explainStep {
	return explainStep{
		Stage: trace.StageName(ev.Stage), Network: x.network(ev.Network), To: x.network(ev.To), SID: ev.SID,
		Peer: x.peer(ev.Peer), Output: x.link(ev.Output), MTU: ev.MTU, Rewrite: rewritten(ev),
	}
}

// network is the name of a network by its id; empty for 0.
func (x *explainer) network(id uint32) string {
	if id == 0 {
		return ""
	}
	if name, ok := outerNames()[id]; ok {
		return name
	}
	for _, n := range x.plan.Externals {
		if uint32(n.ID) == id {
			return n.Name
		}
	}
	for _, n := range x.plan.Networks {
		if uint32(n.ID) == id {
			return n.Name
		}
	}
	for _, n := range x.plan.Foreign {
		if uint32(n.ID) == id {
			return n.Name
		}
	}
	for _, p := range x.ports {
		if uint32(p.Attachment.NetworkID) == id {
			return p.Attachment.Network // of a container whose network is gone
		}
	}
	return fmt.Sprintf("#%d", id)
}

func peerOf(p *plan.Plan, index uint32) *plan.Peer {
	for i := range p.Peers {
		if p.Peers[i].Index == index {
			return &p.Peers[i]
		}
	}
	return nil
}

func (x *explainer) peerNamed(name string) *plan.Peer {
	for i := range x.plan.Peers {
		if x.plan.Peers[i].Name == name {
			return &x.plan.Peers[i]
		}
	}
	return nil
}

func (x *explainer) peer(index uint32) string {
	if index == 0 {
		return ""
	}
	if p := peerOf(x.plan, index); p != nil {
		return p.Name
	}
	return fmt.Sprintf("#%d", index)
}

func (x *explainer) link(index uint32) string {
	if index == 0 {
		return ""
	}
	return cmp.Or(x.links[index], fmt.Sprintf("#%d", index))
}

func (x *explainer) line(n uint32) *topologyLine {
	if n == 0 {
		return nil
	}
	l := &topologyLine{File: x.file, Line: n}
	if x.topo == nil {
		return l
	}
	text, err := os.ReadFile(x.file)
	if err == nil {
		l.Text = tableAt(strings.Split(string(text), "\n"), int(n))
	}
	return l
}

// tableAt is a line of the topology. One that opens a peering says nothing without its keys.
func tableAt(lines []string, n int) string {
	if n > len(lines) {
		return ""
	}
	text := strings.TrimSpace(lines[n-1])
	if !strings.HasPrefix(text, "[[") {
		return text
	}
	for _, line := range lines[n:] {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			break
		}
		if line != "" && !strings.HasPrefix(line, "#") {
			text += " " + line
		}
	}
	return text
}

// openFlow finds the flows of the question that are open now. The explained packet has not seen them: it is the first of
// its own.
func (x *explainer) openFlow(o *origin, to target) (*liveFlow, error) {
	m, done, err := hook.OpenMaps(x.bpffs)
	if err != nil {
		return nil, err
	}
	defer done()
	table, err := m.OpenFlows()
	if err != nil {
		return nil, err
	}
	defer table.Close()
	var found *liveFlow
	var state bpf.LaceFlowState
	err = maps.EachFlow(table, func(f maps.Flow) error {
		there := to.matches(f) && f.Network == o.flowNetwork() && f.Src.Addr() == o.Addr
		if !there || f.Reply || f.State == bpf.LaceFlowStateFLOW_CLOSED {
			return nil
		}
		if found == nil {
			found = &liveFlow{}
		}
		if found.Count++; f.Age >= found.Age {
			state = f.State
			found.SourcePort, found.State, found.Age = f.Src.Port(), maps.FlowStateName(state), f.Age
			found.Packets, found.Bytes = f.Packets, f.Bytes
		}
		return nil
	})
	return found, err
}

func (r *explanation) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "from\t%s\nto\t%s\n", r.From.describe(), r.To)
	for _, s := range r.Steps {
		fmt.Fprintf(w, "stage\t%s\n", s)
	}
	fmt.Fprintf(w, "verdict\t%s\n", r.sentence())
	if r.Line != nil {
		fmt.Fprintf(w, "line\t%s\n", r.Line)
	}
	if r.Way != nil {
		fmt.Fprintf(w, "way\t%s\n", r.Way)
	}
	if r.Answer != "" {
		fmt.Fprintf(w, "answer\t%s\n", r.Answer)
	}
	if r.Flow != nil {
		fmt.Fprintf(w, "flow\t%s\n", r.Flow)
	}
	if r.Next != "" {
		fmt.Fprintf(w, "next\t%s\n", r.Next)
	}
	for _, n := range r.Notes {
		fmt.Fprintf(w, "note\t%s\n", n)
	}
	return w.Flush()
}

func (r *explanation) sentence() string {
	if r.Reason == "" {
		return r.Verdict + ": " + r.Meaning
	}
	return fmt.Sprintf("%s, %s: %s", r.Verdict, r.Reason, r.Meaning)
}

func (s explainStep) String() string {
	words := []string{s.Stage}
	add := func(name, value string) {
		if value != "" {
			words = append(words, name+" "+value)
		}
	}
	add("network", s.Network)
	add("to", s.To)
	if s.SID.IsValid() {
		add("SID", s.SID.String())
	}
	add("node", s.Peer)
	add("interface", s.Output)
	if s.MTU > 0 {
		add("MTU", fmt.Sprint(s.MTU))
	}
	if s.Rewrite != nil {
		words = append(words, "becomes "+s.Rewrite.String())
	}
	return strings.Join(words, ", ")
}

func (l *topologyLine) String() string {
	if l.Text == "" {
		return fmt.Sprintf("%s:%d", l.File, l.Line)
	}
	return fmt.Sprintf("%s:%d: %s", l.File, l.Line, l.Text)
}

func (f *liveFlow) String() string {
	s := fmt.Sprintf("open from port %d: %s for %s, %d packets, %d bytes; its packets go by that decision", f.SourcePort, f.State, span(int64(f.Age.Seconds())), f.Packets, f.Bytes)
	if f.Count > 1 {
		s += fmt.Sprintf(" (and %d more)", f.Count-1)
	}
	return s
}
