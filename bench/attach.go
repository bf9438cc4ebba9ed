// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// populations are how many containers a node has when a further one is attached and timed.
var populations = []int{1, 10, 100}

// crowd is a bed of its own for attaching: a node with many containers.
type crowd struct {
	*bed
	settings string // file of the real agent
	attached int
}

// measureAttach times Attach on a node that has more and more containers, and weighs the agent on it.
func (l *lab) measureAttach(ctx context.Context, rec *record) error {
	c, err := l.newCrowd(ctx)
	if err != nil {
		return fmt.Errorf("build bed attach: %w", err)
	}
	for _, n := range populations {
		if err := c.grow(ctx, n); err != nil {
			return err
		}
		ms, err := c.time(ctx, l.opt.attaches)
		if err != nil {
			return err
		}
		rec.Attach[n] = ms
		l.log("attached with %d containers there", n)
	}
	r, err := c.agents[0].do(order{Do: "agent", Lace: l.opt.lace, Settings: c.settings, Settle: l.opt.settle})
	rec.RSS = float64(r.RSS) / 1024
	return err
}

func (l *lab) newCrowd(ctx context.Context) (*crowd, error) {
	b := newBed(kind{name: "attach", build: func(_ context.Context, b *bed) error { return b.startNodes(routedFabric, routedFabric) }}, l.opt.wire)
	l.apart = append(l.apart, b)
	if err := b.construct(ctx); err != nil {
		return nil, err
	}
	c := &crowd{bed: b, settings: filepath.Join(b.dir, "lace.toml")}
	if err := os.WriteFile(c.settings, []byte(c.settingsText()), 0o600); err != nil {
		return nil, fmt.Errorf("write the agent's settings: %w", err)
	}
	return c, addEmptyNetns(ctx, c.container(0))
}

// settingsText is for an agent without containerd: it adopts what is attached and waits.
func (c *crowd) settingsText() string {
	at := func(name string) string { return filepath.Join(c.dir, name) }
	return fmt.Sprintf("node = %q\ntopology = %q\ncontainerd = %q\nnri-socket = %q\nhook-socket = %q\nbpffs = %q\n",
		nodeNames[0], c.topologyOf(nodeNames[0]), at("containerd.sock"), at("nri.sock"), at("lace.sock"), nodeBPFFS)
}

// grow attaches containers until there are n. There is always a namespace for a further one.
func (c *crowd) grow(ctx context.Context, n int) error {
	for ; c.attached < n; c.attached++ {
		if _, err := c.attach(c.attached); err != nil {
			return err
		}
		if err := addEmptyNetns(ctx, c.container(c.attached+1)); err != nil {
			return err
		}
	}
	return nil
}

// time attaches and releases the further container, in ms.
func (c *crowd) time(ctx context.Context, times int) ([]float64, error) {
	ms := make([]float64, 0, times)
	for range times {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		took, err := c.attach(c.attached)
		if err != nil {
			return nil, err
		}
		if _, err := c.agents[0].do(order{Do: "detach", Container: "bench/" + string(c.container(c.attached))}); err != nil {
			return nil, err
		}
		ms = append(ms, float64(took)/float64(time.Millisecond))
	}
	return ms, nil
}

func (c *crowd) attach(i int) (time.Duration, error) {
	at := c.container(i)
	r, err := c.agents[0].do(order{Do: "attach", Container: "bench/" + string(at), Network: routedFabric.network, Netns: at.path()})
	return r.Took, err
}

func (c *crowd) container(i int) ns { return ns(fmt.Sprintf("%sattach-c%d", netnsPrefix, i)) }
