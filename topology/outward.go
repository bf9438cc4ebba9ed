// SPDX-License-Identifier: Apache-2.0

package topology

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
)

// way is how packets leave for an external network.
type way struct {
	masquerade bool
	egress     string
}

func (w way) String() string {
	words := "without masquerade"
	if w.masquerade {
		words = "with masquerade"
	}
	if w.egress != "" {
		words += ", egress = " + w.egress
	}
	return words
}

// sender is a network by its place, and one of its ways: the set of them is where it leads.
type sender struct {
	from int
	way
}

// way is how packets leave where a peering leads to external networks, and says whether that is right.
func (r *resolver) way(key string, p *rawPeering, to set) (w way, ok bool) {
	ok = true
	for _, name := range []string{"masquerade", "egress"} {
		if inside, any := to.beyond(r.external); any && r.lines.Has(joinKey(key, name)) {
			r.complain(joinKey(key, name), "leave it out, or name external networks only in to", "%s is no external network", r.networks[inside].Name)
			ok = false
		}
	}
	w.masquerade = p.Masquerade
	if p.Egress != nil {
		w.egress = *p.Egress
		ok = r.egress(joinKey(key, "egress"), w.egress) && ok
	}
	return w, ok
}

// egress says whether packets can leave by a node.
func (r *resolver) egress(key, name string) bool {
	node, known := r.byName[name]
	switch {
	case !known:
		r.unknownName(key, "node", name, maps.Keys(r.byName))
	case node.Kind == KindRouter:
		r.complain(key, "name a host", "%s is a router: Lace does not run there", name)
	default:
		return true
	}
	return false
}

// outerOnly refuses a peering that has external networks on both sides only.
func (r *resolver) outerOnly(key string, p *rawPeering, from, to set) bool {
	_, insideFrom := from.beyond(r.external)
	_, insideTo := to.beyond(r.external)
	if insideFrom || insideTo {
		return false
	}
	if p.From.name != nil && p.To.name != nil {
		key = joinKey(key, "to")
	}
	r.complain(key, "name a network of containers on one side", "joins external networks only, and what is between them is no concern of the overlay")
	return true
}

// leave notes how packets leave one network for another, where that is external.
func (r *resolver) leave(i, j int, w way) {
	if !r.external.has(j) {
		return
	}
	r.ways[pair{i, j}] = w
	if r.alike[sender{i, w}] == nil {
		r.alike[sender{i, w}] = newSet(len(r.networks))
	}
	r.alike[sender{i, w}].add(j)
}

// otherwise refuses a way to an external network that is not the one by which it is reached already.
func (r *resolver) otherwise(key string, i int, to set, w way) bool {
	if r.external.has(i) {
		return false
	}
	there := slices.Clone(to)
	there.keep(r.external)
	there.keep(r.reach[i])
	j, differs := there.beyond(r.alike[sender{i, w}])
	if differs {
		r.complain(key, "say the same in both, or leave one out", "%s to %s is there already (line %d), %s; here it is %s",
			r.networks[i].Name, r.networks[j].Name, r.joins[pair{i, j}], r.ways[pair{i, j}], w)
	}
	return differs
}

// prefixes counts what the data plane has to look up for peerings with external networks.
func (r *resolver) prefixes() int {
	sum := 0
	for p := range r.ways {
		sum += len(r.networks[p.to].Prefixes)
	}
	return sum
}

// open is the networks that hosts or external networks may open flows to.
func (r *resolver) open() set {
	open := newSet(len(r.networks))
	for i, n := range r.networks {
		if n.Host {
			open.add(i)
		}
	}
	for p := range r.joins {
		if r.external.has(p.from) {
			open.add(p.to)
		}
	}
	return open
}

// opener says who outside of the overlay may open flows to a network, the first of them.
func (r *resolver) opener(i int) string {
	if n := r.networks[i]; n.Host {
		return fmt.Sprintf("hosts (%s)", r.at(networkKey(n.Name, "host")))
	}
	for e := range r.external.all() {
		if line, is := r.joins[pair{e, i}]; is {
			return fmt.Sprintf("%s (line %d)", r.networks[e].Name, line)
		}
	}
	return "nobody"
}

// shadows refuses a prefix of an external network that is a subnet too, where both are peered with the same network: which of the two an
// address is in would be unclear. Of prefixes of different lengths the longer one decides.
func (r *resolver) shadows(near []set) {
	subnets := map[netip.Prefix][]placed{}
	for _, s := range r.subnetsOfMeeting(near, newSet(len(r.networks))) {
		subnets[s.Prefix] = append(subnets[s.Prefix], s)
	}
	for _, o := range r.outer {
		for _, s := range subnets[o.Prefix] {
			r.shadow(o, s, near)
		}
	}
}

func (r *resolver) shadow(o outer, s placed, near []set) {
	e := r.places[o.network.Name]
	third, shared := near[e].common(near[s.network])
	if !shared {
		return
	}
	r.complain(o.key, "make them differ, or leave a peering out", "%s is a subnet of %s (line %d) too, and both are peered with %s (lines %d and %d)",
		o.Prefix, r.networks[s.network].Name, s.line, r.networks[third].Name, r.joined(e, third), r.joined(s.network, third))
}
