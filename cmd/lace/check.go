// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/lace-net/lace/topology"
)

// defaultTopology is where the agent reads the topology unless its settings say otherwise.
const defaultTopology = "/etc/lace/topology.toml"

func runCheck(_ context.Context, e *env, args []string) error {
	fs := newFlags("check")
	if err := parseFlags(fs, args, 1); err != nil {
		return err
	}
	file := defaultTopology
	if fs.NArg() == 1 {
		file = fs.Arg(0)
	}
	t, err := topology.Load(file)
	if err != nil {
		return err
	}
	outer := externals(t)
	parts := []string{count(len(t.Nodes), "node"), count(len(t.Networks)-outer, "network")}
	if outer > 0 {
		parts = append(parts, count(outer, "external network"))
	}
	if n := len(t.Peerings); n > 0 {
		parts = append(parts, count(n, "peering"))
	}
	if n := endpoints(t); n > 0 {
		parts = append(parts, count(n, "endpoint"))
	}
	_, err = fmt.Fprintf(e.stdout, "%s: ok, topology %s, %s\n", file, t.Hash, strings.Join(parts, ", "))
	return err
}

func externals(t *topology.Topology) (n int) {
	for _, network := range t.Networks {
		if network.Type == topology.External {
			n++
		}
	}
	return n
}

func endpoints(t *topology.Topology) (n int) {
	for _, network := range t.Networks {
		n += len(network.Endpoints())
	}
	return n
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
