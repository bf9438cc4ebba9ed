// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"fmt"
	"strconv"
	"strings"
)

// Canonical is the one text of a topology: a file that says the same, with every default written
// out and everything sorted by name. The hash is that of this text. Peerings are in it as the pairs
// that they join: the pairs are what they mean, whether names or labels say it.
func (t *Topology) Canonical() string {
	var w strings.Builder
	fmt.Fprintf(&w, "version = 1\n\n[underlay]\nlocator-block = %q\nencapsulation = %q\nl2-gso = %q\n",
		t.Underlay.LocatorBlock, t.Underlay.Encapsulation, t.Underlay.L2GSO)
	for _, n := range t.Nodes {
		n.canonical(&w)
	}
	for _, n := range t.Networks {
		n.canonical(&w)
	}
	for _, e := range t.Endpoints {
		e.canonical(&w)
	}
	for _, p := range t.Peerings {
		p.canonical(&w)
	}
	fmt.Fprintf(&w, "\n[masquerade]\nports = %q\n", t.Masquerade)
	t.Conntrack.canonical(&w)
	return w.String()
}

func (n *Node) canonical(w *strings.Builder) {
	fmt.Fprintf(w, "\n[%s]\nkind = %q\nunderlay = %q\nlocator = %q\n", nodeKey(n.Name), n.Kind, n.Underlay, n.Locator)
	if n.Kind == KindRouter {
		fmt.Fprintf(w, "network = %q\n", n.Network)
		for _, sid := range n.sids() {
			if sid.IsValid() {
				fmt.Fprintf(w, "sid.%s = %q\n", sid.key, sid)
			}
		}
	}
	if len(n.Uplinks) > 0 {
		fmt.Fprintf(w, "uplinks = %s\n", quoted(n.Uplinks))
	}
	if n.Via.IsValid() {
		fmt.Fprintf(w, "via = %q\n", n.Via)
	}
	canonicalLabels(w, n.Labels)
}

func canonicalLabels(w *strings.Builder, labels map[string]string) {
	if len(labels) > 0 {
		fmt.Fprintf(w, "labels = %s\n", inline(labels))
	}
}

// inline writes labels as the file would on one line.
func inline(labels map[string]string) string {
	pairs := make([]string, 0, len(labels))
	for _, k := range sortedKeys(labels) {
		pairs = append(pairs, assign(k, labels[k]))
	}
	return "{ " + strings.Join(pairs, ", ") + " }"
}

func assign(key, value string) string {
	if !isBare(key) {
		key = strconv.Quote(key)
	}
	return key + " = " + strconv.Quote(value)
}

// canonical writes how packets leave only where that was written: the other peerings have no such keys.
func (p Peering) canonical(w *strings.Builder) {
	fmt.Fprintf(w, "\n[[peering]]\nfrom = %q\nto = %q\n", p.From, p.To)
	if p.Masquerade {
		fmt.Fprintf(w, "masquerade = true\n")
	}
	if p.Egress != "" {
		fmt.Fprintf(w, "egress = %q\n", p.Egress)
	}
}

func (n *Network) canonical(w *strings.Builder) {
	fmt.Fprintf(w, "\n[%s]\ntype = %q\nid = %d\n", networkKey(n.Name), n.Type, n.ID)
	if n.Type == External {
		fmt.Fprintf(w, "prefixes = %s\n", quoted(n.Prefixes))
		canonicalLabels(w, n.Labels)
		return
	}
	words := n.words()
	fmt.Fprintf(w, "subnets = %s\nhost = %t\n", quoted(n.Subnets), n.Host)
	for _, f := range []Family{V4, V6} {
		if bits := n.blockBits(f); bits != 0 {
			fmt.Fprintf(w, "%s.%s = %d\n", words.size, f.key(), bits)
		}
	}
	if n.Type == L2 {
		n.canonicalSegment(w)
	}
	canonicalLabels(w, n.Labels)
	for _, name := range sortedKeys(n.given) {
		given := n.given[name]
		var blocks []string
		for _, f := range []Family{V4, V6} {
			if p := f.of(given); p.IsValid() {
				blocks = append(blocks, p.String())
			}
		}
		fmt.Fprintf(w, "%s = %s\n", joinKey(words.given, name), quoted(blocks))
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
