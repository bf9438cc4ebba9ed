// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/lace-net/lace/dataplane/maps"
	"github.com/lace-net/lace/topology"
)

// Conntrack is what is known of the table of flows.
type Conntrack struct {
	Max     int           // flows that the table has room for
	Entries int           // rows at the last run of the collector; each direction of a flow has one
	States  []int         // of those, by bpf.LaceFlowState
	Removed int           // rows that it took away
	Took    time.Duration // how long it ran
	At      time.Time     // when; zero: not yet
}

// Conntrack is what the last run of the collector found.
func (d *Dataplane) Conntrack() Conntrack {
	c := &d.collector
	c.mu.Lock()
	defer c.mu.Unlock()
	seen := c.seen
	seen.States = slices.Clone(seen.States)
	return seen
}

const (
	collectEvery = 10 * time.Second
	collectOften = time.Second // while more than half of the table is in use
)

// directions are the rows that a flow has.
const directions = 2

// collector removes idle flows, and those of containers and host addresses that are gone.
type collector struct {
	mu      sync.Mutex
	seen    Conntrack
	failing bool
	full    bool
	gone    map[whose]struct{} // addresses whose flows are to go
	wake    chan struct{}

	running sync.Mutex // held while the flows of one container are removed
}

// whose are the flows that are to go: those from and to an address.
type whose struct {
	network topology.NetworkID // 0: of any, as the host's own address
	addr    netip.Addr
}

// maxGone bounds the addresses whose flows wait to be removed: those beyond are removed when they are idle.
const maxGone = 4096

// collectFlows keeps the table of flows from filling up, until ctx ends. While no agent runs nobody does: a full table then refuses
// new flows, and those that it holds live on.
func (d *Dataplane) collectFlows(ctx context.Context) {
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.collector.wake:
			d.purgeGone(ctx)
		case <-next.C:
			next.Reset(d.collect())
		}
	}
}

// collect runs the collector once, and says when to run it again.
func (d *Dataplane) collect() time.Duration {
	done, err := d.hooks.Collect(maps.Collection{Pressure: d.collector.pressed()})
	d.collector.judge(d, done, err)
	if err != nil || done.Entries*2 <= done.Room {
		return collectEvery
	}
	return collectOften
}

// pressed says whether more than three quarters of the table are in use.
func (c *collector) pressed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen.Entries*4 > c.seen.Max*directions*3
}

// judge keeps what a run has found, and tells once when the table is full, when it is so no more, and when the collector fails.
func (c *collector) judge(d *Dataplane, done maps.Collected, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		if !c.failing {
			d.log.Error("idle flows are not collected", "err", err)
		}
		c.failing = true
		return
	}
	c.failing = false
	c.seen = Conntrack{Max: done.Room / directions, Entries: done.Entries, States: done.States, Removed: done.Removed, Took: done.Took, At: time.Now()}
	switch nearly := done.Entries*64 >= done.Room*63; {
	case nearly && !c.full:
		c.full = true
		d.log.Warn("the table of flows is full: new flows are refused, those that are established go on; raise max in [conntrack] of the topology, or find who opens so many",
			"flows", c.seen.Max, "states", done.States)
	case c.full && done.Entries*4 < done.Room*3:
		c.full = false
		d.log.Info("the table of flows has room again", "flows", c.seen.Max, "rows", done.Entries)
	}
}

// addressesOf are those whose flows go with a container.
func addressesOf(c *wired) (out []whose) {
	for _, a := range addrs(c.V4, c.V6) {
		out = append(out, whose{c.NetworkID, a})
	}
	return out
}

// leave has the flows of addresses removed that are gone; it waits for nothing.
func (c *collector) leave(gone ...whose) {
	c.mu.Lock()
	for _, k := range gone {
		if len(c.gone) < maxGone {
			c.gone[k] = struct{}{}
		}
	}
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *collector) isGone(k whose) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.gone[k]
	return ok
}

func (c *collector) anyGone() (whose, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k := range c.gone {
		return k, true
	}
	return whose{}, false
}

// purgeGone removes the flows of all addresses that are gone.
func (d *Dataplane) purgeGone(ctx context.Context) {
	for ctx.Err() == nil {
		k, ok := d.collector.anyGone()
		if !ok {
			return
		}
		d.purge(k)
	}
}

// purge removes the flows of an address that is gone, or waits until they are removed. An address is given to
// another container only after that: it inherits no flow.
func (d *Dataplane) purge(k whose) {
	c := &d.collector
	if !c.isGone(k) {
		return
	}
	c.running.Lock()
	defer c.running.Unlock()
	if !c.isGone(k) {
		return
	}
	done, err := d.hooks.Collect(maps.Collection{All: true, Network: k.network, Addr: k.addr})
	if err != nil {
		d.log.Warn("the flows of an address that is gone stay until they are idle", "network", k.network, "address", k.addr, "err", err)
	} else {
		d.log.Debug("flows removed", "network", k.network, "address", k.addr, "rows", done.Removed)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.gone, k)
}

// resizeFlows gives the table of flows the room that the topology says, and says whether it had another.
func (d *Dataplane) resizeFlows(flows int) (bool, error) {
	done, err := d.hooks.Maps().SyncFlows(flows)
	if err != nil || !done.Resized {
		return false, err
	}
	d.log.Info("the table of flows has another size", "flows", flows, "rows", done.Kept)
	if done.LeftOut > 0 {
		d.log.Warn("the smaller table of flows has no room for all: those that were quiet longest are gone", "flows", flows, "rows gone", done.LeftOut)
	}
	return true, nil
}
