// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/lace-net/lace/dataplane/hook"
	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/dataplane/plan"
)

// measureFlows runs the entry program on packets of flows drawn among few and among many, and times the collector
// among the many.
func (l *lab) measureFlows(ctx context.Context, rec *record) error {
	b := newBed(kind{name: "flows", build: laceBed(routedFabric)}, l.opt.wire)
	b.flows = l.opt.entries[1] + l.opt.entries[1]/5 // so many that the most entries are no pressure
	l.apart = append(l.apart, b)
	if err := b.construct(ctx); err != nil {
		return fmt.Errorf("build bed flows: %w", err)
	}
	for i, n := range b.agents {
		if _, err := n.do(order{Do: "fill", Container: b.container(i), Entries: l.opt.entries[i]}); err != nil {
			return err
		}
	}
	for range l.opt.rounds {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := l.flowRound(b, rec); err != nil {
			return err
		}
	}
	l.log("looked up among %d and among %d entries", l.opt.entries[0], l.opt.entries[1])
	return nil
}

func (l *lab) flowRound(b *bed, rec *record) error {
	for i, n := range b.agents {
		r, err := n.do(order{Do: "look", Runs: l.opt.runs})
		if err != nil {
			return err
		}
		rec.Flows[l.opt.entries[i]] = append(rec.Flows[l.opt.entries[i]], r.Programs[string(hook.PodL3)])
	}
	r, err := b.agents[1].do(order{Do: "collect"})
	rec.Collect = append(rec.Collect, float64(r.Took)/float64(time.Millisecond))
	return err
}

// flowCrowd is a container with very many flows.
type flowCrowd struct {
	trial
	flows int
}

// become makes the trial's packet one of the i-th flow: another port at either end.
func (c *flowCrowd) become(i int) {
	ports := c.packet[14+20:]
	binary.BigEndian.PutUint16(ports, uint16(1024+i%60000))
	binary.BigEndian.PutUint16(ports[2:], uint16(1024+i/60000))
}

// fill opens flows to a container of the other node, by the packets that would.
func (n *node) fill(o order) error {
	port, err := n.port(o.Container)
	if err != nil {
		return err
	}
	far := netip.AddrFrom4([4]byte{10, 60, 1, 77})
	if far4 := port.V4.As4(); far4[2] == 1 {
		far = netip.AddrFrom4([4]byte{10, 60, 2, 77})
	}
	program := n.d.Hooks().Collection().Programs[string(hook.PodL3)]
	n.crowd = &flowCrowd{trial{name: string(hook.PodL3), program: program, ifindex: port.Ifindex, answer: actRedirect,
		packet: ethernet(plan.GatewayMAC, port.MAC, udp(port.V4, far))}, o.Entries / 2}
	for i := range n.crowd.flows {
		n.crowd.become(i)
		if _, err := n.crowd.run(); err != nil {
			return fmt.Errorf("open flow %d of %d: %w", i+1, n.crowd.flows, err)
		}
	}
	return nil
}

// look runs the program on flows drawn among all, so that the caches help as little as they would.
func (n *node) look(o order) (report, error) {
	if n.crowd == nil {
		return report{}, errors.New("there are no flows yet: fill comes first")
	}
	n.crowd.vary = func() { n.crowd.become(rand.IntN(n.crowd.flows)) }
	return inTurn(o.Runs, n.crowd.trial)
}

func (n *node) collect() (report, error) {
	done, err := n.d.Hooks().Collect(maps.Collection{})
	if err == nil && done.Removed > 0 {
		err = fmt.Errorf("%d entries were collected, which should all stay", done.Removed)
	}
	return report{Took: done.Took}, err
}
