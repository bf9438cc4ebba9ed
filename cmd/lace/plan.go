// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

func runPlan(_ context.Context, e *env, args []string) error {
	fs := newFlags("plan")
	node := fs.String("node", "", "name of the node in the topology (default: the host name)")
	file := fs.String("topology", defaultTopology, "topology `FILE`")
	asJSON := fs.Bool("json", false, "print JSON")
	if err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	t, err := topology.Load(*file)
	if err != nil {
		return err
	}
	name, err := nodeName(e, *node)
	if err != nil {
		return err
	}
	p, err := plan.Build(t, name, nil)
	if err != nil {
		return fmt.Errorf("plan node %s of %s: %w", name, *file, err)
	}
	return printPlan(e, p, *asJSON)
}

func printPlan(e *env, p *plan.Plan, asJSON bool) error {
	if !asJSON {
		_, err := p.WriteTo(e.stdout)
		return err
	}
	enc := json.NewEncoder(e.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(p)
}

// nodeName is the name given, or the host's.
func nodeName(e *env, given string) (string, error) {
	if given != "" {
		return given, nil
	}
	name, err := e.hostname()
	if err != nil {
		return "", fmt.Errorf("read the host name: %w; name the node with --node", err)
	}
	return name, nil
}
