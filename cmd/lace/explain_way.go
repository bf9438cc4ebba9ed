// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"net/netip"

	"github.com/lace-net/lace/bpf"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/trace"
	"github.com/lace-net/lace/topology"
)

// way is where a packet goes: to a container here, to a node, to many, out of the overlay, or to this host itself.
type way struct {
	Kind      string       `json:"way,omitempty"` // "container", "node", "out", "host" or "loopback"
	Container string       `json:"container,omitempty"`
	Interface string       `json:"interface,omitempty"`
	Node      string       `json:"node,omitempty"`
	SID       netip.Addr   `json:"sid,omitzero"`
	Source    netip.Addr   `json:"source,omitzero"`   // outer
	NextHop   netip.Addr   `json:"next_hop,omitzero"` // out: the destination itself where it is on the link
	MTU       uint16       `json:"mtu,omitempty"`     // largest packet on the way
	Rewrite   *translation `json:"rewrite,omitempty"` // what addresses and ports become
	Copies    *copies      `json:"copies,omitempty"`

	masqueraded bool
}

// tellWay names where a packet goes that went on.
func (x *explainer) tellWay(r *explanation, ev trace.Event, frame []byte, exit hook.Exit) error {
	if ev.Reason != bpf.LaceReasonREASON_REPLICATED {
		r.Way = x.way(ev, frame, exit)
		r.Next = x.next(r, ev)
		return nil
	}
	to, err := x.copiesOf(ev, r.From.Node == "")
	if err != nil {
		return err
	}
	r.Way = &way{Copies: to}
	if r.From.Node != "" {
		r.Next = x.sender(r)
	} else if len(to.Nodes) > 0 {
		r.Next = fmt.Sprintf("each of these nodes copies it to its own ports. There run: %s", r.again())
	}
	return nil
}

func (x *explainer) way(ev trace.Event, frame []byte, exit hook.Exit) *way {
	kind := maps.Way(ev.Way)
	w := &way{Kind: kind.String(), MTU: ev.MTU, Rewrite: rewritten(ev)}
	w.masqueraded = w.Rewrite != nil && w.Rewrite.Src != ev.Flow.Src
	switch kind {
	case maps.WayContainer:
		w.Interface = x.link(ev.Output)
		if p := x.portAt(ev.Output); p != nil {
			w.Container = title(p.Attachment)
		}
	case maps.WayNode:
		w.Node, w.SID, w.Source = x.peer(ev.Peer), ev.SID, sourceOf(frame)
	case maps.WayOut:
		w.Interface, w.NextHop, w.MTU = x.link(exit.Ifindex), exit.Gateway, exit.MTU
	}
	return w
}

// rewritten is what an event says of it.
func rewritten(ev trace.Event) *translation {
	return translated(ev.Rewrite.Src, ev.Rewrite.Dst, ev.Flow.ICMPID != 0)
}

// next is what the other node decides, or has decided.
func (x *explainer) next(r *explanation, ev trace.Event) string {
	if r.From.Node != "" {
		return x.sender(r)
	}
	switch maps.Way(ev.Way) {
	case maps.WayOut:
		return askRoutes(r)
	case maps.WayNode:
		return x.nextNode(r, ev)
	}
	return ""
}

// askRoutes asks the host what it knows of the way out, as the programs do.
func askRoutes(r *explanation) string {
	return fmt.Sprintf("the host's own routes decide: ip route get %s from %s iif lc-host", r.target, r.From.Addr)
}

func (x *explainer) nextNode(r *explanation, ev trace.Event) string {
	if p := peerOf(x.plan, ev.Peer); p != nil && p.Kind == topology.KindRouter {
		return fmt.Sprintf("%s is a router: what it does with the packet is its own affair", p.Name)
	}
	if externalNamed(x.plan.Externals, ev.To) {
		return fmt.Sprintf("%s has it leave the overlay by its own routes. On %[1]s run: %s", r.Way.Node, r.again())
	}
	if x.isSegment(topology.NetworkID(ev.Network)) && ev.Network == ev.To {
		return fmt.Sprintf("%s looks for the port that it is for. On %[1]s run: %s", r.Way.Node, r.again())
	}
	return fmt.Sprintf("%s will be asked: may network %s open flows to %s at %s? On %[1]s run: %[5]s",
		r.Way.Node, x.network(ev.Network), x.network(ev.To), r.To, r.again())
}

// sender is where the question begins that is answered here.
func (x *explainer) sender(r *explanation) string {
	if p := x.peerNamed(r.From.Node); p != nil && p.Kind == topology.KindRouter {
		return ""
	}
	return fmt.Sprintf("%s decides first whether it sends the packet at all. On %[1]s run: %s", r.From.Node, r.again())
}

// again is the same question, for the other node.
func (r *explanation) again() string {
	ask := fmt.Sprintf("lace explain --from %s --to %s --network %s", r.From.Addr, r.To, r.From.Network)
	if r.From.outer && r.From.Node == "" {
		ask += " --via " + r.node
	}
	return ask
}

func (w *way) String() string {
	switch {
	case w.Copies != nil:
		return w.Copies.String()
	case w.Kind == maps.WayHost.String(), w.Kind == maps.WayLoopback.String():
		return "this host itself"
	case w.Kind == maps.WayOut.String():
		return w.out()
	case w.Node != "":
		return fmt.Sprintf("node %s, SID %s, outer source %s, path MTU %d", w.Node, w.SID, w.Source, w.MTU) + w.becomes()
	}
	s := "container " + cmp.Or(w.Container, "that is gone") + ", interface " + w.Interface
	if w.MTU > 0 {
		s += fmt.Sprintf(", MTU %d", w.MTU)
	}
	return s + w.becomes()
}

func (w *way) out() string {
	s := "out of the overlay by interface " + w.Interface
	if w.NextHop.IsValid() && !w.NextHop.IsUnspecified() {
		s += ", next hop " + w.NextHop.String()
	}
	return s + fmt.Sprintf(", path MTU %d", w.MTU) + w.becomes()
}

// becomes says what the packet has instead of its own addresses and ports.
func (w *way) becomes() string {
	switch {
	case w.Rewrite == nil:
		return ""
	case w.masqueraded:
		return ", becomes " + w.Rewrite.String() + " (the port is another for each flow)"
	}
	return ", becomes " + w.Rewrite.String()
}

// String is "192.0.2.1:12345 > 198.51.100.7:443".
func (t *translation) String() string {
	if t.ICMPID != 0 {
		return fmt.Sprintf("%s > %s id %d", t.Src, t.Dst, t.ICMPID)
	}
	return fmt.Sprintf("%s > %s", netip.AddrPortFrom(t.Src, t.SrcPort), netip.AddrPortFrom(t.Dst, t.DstPort))
}
