// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/lace-net/lace/topology"
)

// The large topology: as many peerings as networks, each network being peered with the next one.
const (
	largeNetworks = 64
	largeNodes    = 100
)

// measureApply times a topology that is large, the same once more, and the way back to the small one.
func (l *lab) measureApply(ctx context.Context, rec *record) error {
	b := newBed(kind{name: "apply", build: func(_ context.Context, b *bed) error { return b.startNodes(routedFabric, routedFabric) }}, l.opt.wire)
	l.apart = append(l.apart, b)
	if err := b.construct(ctx); err != nil {
		return fmt.Errorf("build bed apply: %w", err)
	}
	small, large := b.topologyOf(nodeNames[0]), filepath.Join(b.dir, "large.toml")
	if err := os.WriteFile(large, []byte(largeTopology()), 0o600); err != nil {
		return fmt.Errorf("write the large topology: %w", err)
	}
	for range min(l.opt.rounds, 5) {
		for _, step := range []struct {
			what, file string
			changes    bool
		}{{"large", large, true}, {"again", large, false}, {"back", small, true}} {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			r, err := b.agents[0].do(order{Do: "apply", Topology: step.file})
			if err != nil {
				return err
			}
			if r.Changed != step.changes {
				return fmt.Errorf("apply %s: changed is %v", step.what, r.Changed)
			}
			rec.Apply[step.what] = append(rec.Apply[step.what], float64(r.Took)/float64(time.Millisecond))
		}
	}
	l.log("applied %d networks, peered, on %d nodes", largeNetworks, largeNodes)
	return nil
}

// largeTopology is that of the bed with more nodes and networks.
func largeTopology() string {
	w := new(strings.Builder)
	for i := len(nodeNames) + 1; i <= largeNodes; i++ {
		w.WriteString(farNode(i, fmt.Sprintf("fd10::%x", 0x100+i)))
	}
	for i := range largeNetworks - 1 {
		fmt.Fprintf(w, "[network.large-%d]\ntype = \"l3\"\nid = %d\nsubnets = [\"10.%d.0.0/16\", \"fd61:%x::/48\"]\n", i, 1000+i, 100+i, i)
	}
	for i := range largeNetworks {
		fmt.Fprintf(w, "[[peering]]\nfrom = \"%s\"\nto = \"%s\"\n", largeName(i), largeName(i+1))
	}
	return routedFabric.and(w.String()).topology()
}

func largeName(i int) string {
	if i %= largeNetworks; i > 0 {
		return fmt.Sprintf("large-%d", i-1)
	}
	return routedFabric.network
}

// apply reads the file and makes it the topology that holds. Reading counts: an operator waits for it too.
func (n *node) apply(ctx context.Context, o order) (report, error) {
	began := time.Now()
	t, err := topology.Load(o.Topology)
	if err != nil {
		return report{}, err
	}
	done, err := n.d.Apply(ctx, t)
	return report{Took: time.Since(began), Changed: done.Changed}, err
}
