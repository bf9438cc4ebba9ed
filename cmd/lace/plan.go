// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/lace-net/lace/dataplane/plan"
	"github.com/lace-net/lace/topology"
)

func runPlan(_ context.Context, e *env, args []string) error {
	fs := newFlags("plan")
	node := fs.String("node", "", "name of the node in the topology (default: the host name)")
	file := fs.String("topology", defaultTopology, "topology `FILE`")
	from := fs.String("from", "", "print only what changes when the topology takes the place of this `FILE`")
	asJSON := fs.Bool("json", false, "print JSON")
	if err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	name, p, err := filePlan(e, *node, *file)
	if err != nil {
		return err
	}
	if *from == "" {
		return printPlan(e, p, *asJSON)
	}
	_, old, err := filePlan(e, name, *from)
	if err != nil {
		return err
	}
	return printChanges(e.stdout, plan.Diff(old, p), *asJSON)
}

// filePlan is what a node makes of a topology file, without any container. The node is the host's own
// name where none is given; the name is returned.
func filePlan(e *env, node, file string) (string, *plan.Plan, error) {
	t, err := topology.Load(file)
	if err != nil {
		return "", nil, err
	}
	name, err := nodeName(e, node)
	if err != nil {
		return "", nil, err
	}
	p, err := plan.Build(t, name, nil)
	if err != nil {
		return "", nil, fmt.Errorf("plan node %s of %s: %w", name, file, err)
	}
	return name, p, nil
}

func printPlan(e *env, p *plan.Plan, asJSON bool) error {
	if asJSON {
		return printJSON(e.stdout, p)
	}
	_, err := p.WriteTo(e.stdout)
	return err
}

// printChanges prints one line a change.
func printChanges(w io.Writer, changes []plan.Change, asJSON bool) error {
	if asJSON {
		return printJSON(w, append([]plan.Change{}, changes...)) // a list, also where it is empty
	}
	if len(changes) == 0 {
		_, err := fmt.Fprintln(w, "nothing changes")
		return err
	}
	for _, c := range changes {
		if _, err := fmt.Fprintln(w, c); err != nil {
			return err
		}
	}
	return nil
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false) // "web > db" is for people too
	return enc.Encode(v)
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
