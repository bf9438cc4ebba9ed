// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/lace-net/lace/dataplane"
	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
)

// The pace at which connections are opened to one server, and how long each lasts, as that of a short request does.
const (
	openPerSecond = 8000
	openFor       = 100 * time.Millisecond
	openSample    = 5 * time.Second // of one order
)

// masqueraded is what one node's masquerading was put to.
type masqueraded struct {
	Flows   int               `json:"flows"`             // at once, to one server, that were answered to their owners
	Opened  []float64         `json:"opened"`            // connections/s, to one server, one for each sample
	Refused int               `json:"refused"`           // of those
	Reasons map[string]uint64 `json:"reasons,omitempty"` // packets that were refused in those samples, by reason
}

// measureMasquerade has two containers talk to one server by very many flows at once, and one of them open connections to it for a while.
func (l *lab) measureMasquerade(ctx context.Context, rec *record) error {
	b := newBed(kind{name: "masquerade", build: func(_ context.Context, b *bed) error { return b.buildCrowdOutside() }}, l.opt.wire)
	l.apart = append(l.apart, b)
	if err := b.construct(ctx); err != nil {
		return fmt.Errorf("build bed masquerade: %w", err)
	}
	b.askHost()
	err := b.exchangeOwned(ctx, l.opt.family, l.opt.owned)
	m := &masqueraded{Flows: l.opt.owned, Reasons: map[string]uint64{}}
	for left := l.opt.opening; left > 0 && err == nil; left -= openSample {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		err = m.open(b, min(left, openSample))
	}
	rec.Masquerade = m
	l.log("answered %d flows at once, opened connections for %s, refused %d %v", m.Flows, l.opt.opening, m.Refused, m.Reasons)
	return err
}

// buildCrowdOutside attaches both containers to one node, which masquerades them.
func (b *bed) buildCrowdOutside() error {
	if _, err := b.buildOutside(); err != nil {
		return err
	}
	_, err := b.agents[0].do(order{Do: "attach", Container: b.container(1), Network: outsideFabric.network, Netns: b.pod[1].path(), Gateway: true})
	return err
}

// open takes one sample of opening connections.
func (m *masqueraded) open(b *bed, length time.Duration) error {
	r, err := b.agents[0].do(order{Do: "open", Container: b.container(0), Length: length})
	if err != nil {
		return err
	}
	m.Opened = append(m.Opened, tally{uint64(r.Opened), r.Took}.rate())
	m.Refused += r.Refused
	for reason, n := range r.Reasons {
		m.Reasons[reason] += n
	}
	return nil
}

// opener is a container's side of many short connections to one server, and the server's, both packets through the entry programs:
// the pace is that of the clock, whatever sockets would take.
type opener struct {
	pod, wire trial
	port      dataplane.Port
	node      netip.Addr // as which the container is masqueraded
	server    netip.AddrPort
	next      uint16 // port of the container
	open      []connection
}

// connection is one that was opened and is not closed yet.
type connection struct {
	own, taken netip.AddrPort // the container's, and what stands for it
	since      time.Time
}

func (n *node) newOpener(container string) (*opener, error) {
	port, err := n.port(container)
	if err != nil {
		return nil, err
	}
	wire, err := n.fromWire("uplink", hook.Uplink, udp(port.V4, port.V4), actRedirect)
	if err != nil {
		return nil, err
	}
	return &opener{port: port, node: netip.MustParseAddr(wire4[0]), server: netip.AddrPortFrom(netip.MustParseAddr(wire4[1]), trafficPort),
		pod: trial{name: "pod_l3", program: n.entry(hook.PodL3), ifindex: port.Ifindex, answer: actRedirect}, wire: wire}, nil
}

// open opens connections at the pace for a while, and closes those that have lasted long enough.
func (n *node) open(o order) (report, error) {
	if n.opener == nil {
		var err error
		if n.opener, err = n.newOpener(o.Container); err != nil {
			return report{}, err
		}
	}
	before, err := n.refusals()
	if err != nil {
		return report{}, err
	}
	r, err := n.opener.run(o.Length)
	if err != nil || r.Refused == 0 {
		return r, err
	}
	r.Reasons, err = n.refusals()
	for reason := range r.Reasons {
		if r.Reasons[reason] -= before[reason]; r.Reasons[reason] == 0 {
			delete(r.Reasons, reason)
		}
	}
	return r, err
}

// refusals are the packets that were refused so far, by reason.
func (n *node) refusals() (map[string]uint64, error) {
	counters, err := n.d.Hooks().Maps().Counters()
	sum := map[string]uint64{}
	for _, c := range counters {
		if maps.IsRefusal(c.Reason) {
			sum[maps.ReasonName(c.Reason)] += c.Packets
		}
	}
	return sum, err
}

// run says how many connections were opened, and how many more were refused.
func (p *opener) run(length time.Duration) (r report, err error) {
	start := time.Now()
	for tried := 0; time.Since(start) < length; {
		if err := p.closeUntil(time.Now().Add(-openFor)); err != nil {
			return r, err
		}
		for due := int(time.Since(start).Seconds() * openPerSecond); tried < due; tried++ {
			ok, err := p.connect()
			if err != nil {
				return r, err
			}
			if ok {
				r.Opened++
			} else {
				r.Refused++
			}
		}
		time.Sleep(time.Millisecond)
	}
	r.Took = time.Since(start)
	return r, nil
}

// firstOwn is the first port of the container: it uses them all in turn, as its kernel would.
const firstOwn = 10000

// connect shakes hands. It is false where the program refused that.
func (p *opener) connect() (bool, error) {
	p.next = max(p.next+1, firstOwn)
	c := connection{own: netip.AddrPortFrom(p.port.V4, p.next), since: time.Now()}
	sent, err := p.fromPod(c, flagSYN)
	if err != nil {
		return false, err
	}
	protocol, src, dst := flowOf(sent)
	if protocol != protocolTCP || src.Addr() != p.node || dst != p.server { // it is the answer of a refusal
		return false, nil
	}
	c.taken = src
	p.open = append(p.open, c)
	if err := p.fromServer(c, flagSYN|flagACK); err != nil {
		return false, err
	}
	return true, p.goOn(c, flagACK)
}

// closeUntil closes what was opened before then, from both sides.
func (p *opener) closeUntil(then time.Time) error {
	for len(p.open) > 0 && p.open[0].since.Before(then) {
		c := p.open[0]
		p.open = p.open[1:]
		err := errors.Join(p.goOn(c, flagFIN|flagACK), p.fromServer(c, flagFIN|flagACK), p.goOn(c, flagACK))
		if err != nil {
			return err
		}
	}
	p.open = slices.Clip(p.open)
	return nil
}

func (p *opener) fromPod(c connection, flags byte) ([]byte, error) {
	p.pod.packet = ethernet(plan.GatewayMAC, p.port.MAC, segment(c.own, p.server, flags))
	return p.pod.become()
}

// goOn makes sure that the connection still has what stands for it.
func (p *opener) goOn(c connection, flags byte) error {
	sent, err := p.fromPod(c, flags)
	if err != nil {
		return err
	}
	if _, src, dst := flowOf(sent); src != c.taken || dst != p.server {
		return fmt.Errorf("a connection of %s, for which %s stood, went on from %s to %s", c.own, c.taken, src, dst)
	}
	return nil
}

// fromServer makes sure that the container gets what is for it.
func (p *opener) fromServer(c connection, flags byte) error {
	f, err := wireFrame(segment(p.server, c.taken, flags))
	if err != nil {
		return err
	}
	p.wire.packet = f
	got, err := p.wire.become()
	if err != nil {
		return err
	}
	if _, _, dst := flowOf(got); dst != c.own {
		return fmt.Errorf("an answer to %s, which stands for %s, came to %s", c.taken, c.own, dst)
	}
	return nil
}
