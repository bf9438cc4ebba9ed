// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"fmt"
	"strconv"
	"strings"
)

// Canonical is the one text of a topology: a file that says the same, with every default written
// out and everything sorted by name. The hash is that of this text.
func (t *Topology) Canonical() string {
	var w strings.Builder
	fmt.Fprintf(&w, "version = 1\n\n[underlay]\nlocator-block = %q\nencapsulation = %q\n",
		t.Underlay.LocatorBlock, t.Underlay.Encapsulation)
	for _, n := range t.Nodes {
		n.canonical(&w)
	}
	for _, n := range t.Networks {
		n.canonical(&w)
	}
	return w.String()
}

func (n *Node) canonical(w *strings.Builder) {
	fmt.Fprintf(w, "\n[%s]\nkind = %q\nunderlay = %q\nlocator = %q\n", nodeKey(n.Name), n.Kind, n.Underlay, n.Locator)
	if n.Kind == KindRouter {
		fmt.Fprintf(w, "network = %q\nsid = { v4 = %q, v6 = %q }\n", n.Network, n.SID4, n.SID6)
	}
	if len(n.Uplinks) > 0 {
		fmt.Fprintf(w, "uplinks = %s\n", quoted(n.Uplinks))
	}
	if n.Via.IsValid() {
		fmt.Fprintf(w, "via = %q\n", n.Via)
	}
	if len(n.Labels) == 0 {
		return
	}
	pairs := make([]string, 0, len(n.Labels))
	for _, k := range sortedKeys(n.Labels) {
		pairs = append(pairs, strconv.Quote(k)+" = "+strconv.Quote(n.Labels[k]))
	}
	fmt.Fprintf(w, "labels = { %s }\n", strings.Join(pairs, ", "))
}

func (n *Network) canonical(w *strings.Builder) {
	fmt.Fprintf(w, "\n[%s]\ntype = %q\nid = %d\nsubnets = %s\n", networkKey(n.Name), n.Type, n.ID, quoted(n.Subnets))
	for _, f := range []Family{V4, V6} {
		if bits := n.blockBits(f); bits != 0 {
			fmt.Fprintf(w, "block-size.%s = %d\n", f.key(), bits)
		}
	}
	for _, name := range sortedKeys(n.given) {
		given := n.given[name]
		var blocks []string
		for _, f := range []Family{V4, V6} {
			if p := f.of(given); p.IsValid() {
				blocks = append(blocks, p.String())
			}
		}
		fmt.Fprintf(w, "%s = %s\n", joinKey("blocks", name), quoted(blocks))
	}
}

// quoted writes a list of strings.
func quoted[T any](list []T) string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = strconv.Quote(fmt.Sprint(v))
	}
	return "[" + strings.Join(out, ", ") + "]"
}
